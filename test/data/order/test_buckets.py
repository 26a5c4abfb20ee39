import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.order.buckets import assign_buckets, bucket_list, center_crops, fit, scaled_sizes
from library.errors import InputError
from library.options.buckets import BucketOptions

SDXL = BucketOptions((1024, 1024), True, 512, 2048, 64)
NO_UPSCALE = BucketOptions((1024, 1024), True, bucket_no_upscale=True)


def sizes(*pairs):
    return np.array(pairs, np.int64)


def bucket_of(size, options):
    return tuple(assign_buckets(sizes(size), options).sizes_K2[0].tolist())


def fitted(size, options):
    """(bucket, scaled size, left and top of the crop) of one image."""
    bucket = bucket_of(size, options)
    found = fit(size, bucket, options)
    return bucket, found.scaled_wh_px, found.crop_xy_px


def test_the_list_at_1024_holds_the_sizes_that_sdxl_was_trained_on():
    """The wide half; all are in Podell et al. 2023, appendix I (with a few more of less area)."""
    wide = [(1024, 1024), (1088, 960), (1152, 896), (1216, 832), (1280, 768), (1344, 768)]
    wide += [(1408, 704), (1472, 704), (1536, 640), (1600, 640), (1664, 576), (1728, 576), (1792, 576)]
    wide += [(1856, 512), (1920, 512), (1984, 512), (2048, 512)]
    listed = {tuple(pair) for pair in bucket_list(SDXL).tolist()}
    assert listed == set(wide) | {(height, width) for width, height in wide}


def test_a_small_list_by_hand():
    """256×192 px in cells of 64: 4·3 = 12. Widths of 2, 3, 4, 5, 6 cells: heights 6, 4, 3, 2, 2; the square 3×3."""
    cells = {(2, 6), (6, 2), (3, 4), (4, 3), (5, 2), (2, 5), (3, 3)}
    listed = bucket_list(BucketOptions((256, 192), True, 128, 384, 64))
    assert listed.tolist() == sorted([64 * width, 64 * height] for width, height in cells)


def test_sides_stop_at_the_longest_one():
    """Width 2 of 16 cells would give 8; the longest side is 6."""
    listed = bucket_list(BucketOptions((256, 256), True, 128, 384, 64)).tolist()
    assert [128, 384] in listed
    assert max(max(pair) for pair in listed) == 384


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1024, 1024), (1024, 1024)),
        ((300, 300), (1024, 1024)),
        ((1216, 832), (1216, 832)),  # its own size
        ((4000, 3000), (1152, 896)),  # 1.3333: 1152/896 = 1.2857, 1216/832 = 1.4615
        ((3000, 4000), (896, 1152)),  # 0.75: 896/1152 = 0.7778, 832/1216 = 0.6842
        ((10_000, 1), (2048, 512)),
        ((1, 10_000), (512, 2048)),
    ],
)
def test_the_nearest_ratio(size, bucket):
    assert bucket_of(size, SDXL) == bucket


def test_every_listed_size_is_its_own_bucket():
    for own in bucket_list(SDXL).tolist():
        assert bucket_of(tuple(own), SDXL) == tuple(own)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 9000)), min_size=1, max_size=30),
    st.sampled_from([SDXL, BucketOptions((768, 512), True, 256, 1024, 64), BucketOptions((64, 64), True, 32, 128, 8)]),
)
def test_assignment_is_the_rule_applied_image_by_image(pairs, options):
    listed = [tuple(pair) for pair in bucket_list(options).tolist()]
    buckets = assign_buckets(sizes(*pairs), options)
    for row, (width, height) in enumerate(pairs):
        found = tuple(buckets.sizes_K2[buckets.bucket_of_row[row]].tolist())
        if (width, height) in listed:
            assert found == (width, height)
        else:
            distance = abs(found[0] / found[1] - width / height)
            assert distance == min(abs(w / h - width / height) for w, h in listed)
    assert sorted(set(buckets.bucket_of_row.tolist())) == list(range(len(buckets.sizes_K2)))  # no empty ones


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(64, 5000), st.integers(64, 5000)), min_size=1, max_size=20), st.booleans())
def test_scaled_images_cover_their_bucket_and_crops_lie_inside(pairs, no_upscale):
    if no_upscale:  # longer ones are an error, tested below
        pairs = [(width, min(max(height, width // 8), width * 8)) for width, height in pairs]
    options = NO_UPSCALE if no_upscale else SDXL
    image_N2 = sizes(*pairs)
    buckets = assign_buckets(image_N2, options)
    bucket_N2 = buckets.sizes_K2[buckets.bucket_of_row]
    scaled_N2 = scaled_sizes(image_N2, bucket_N2, options)
    crop_N2 = center_crops(scaled_N2, bucket_N2)
    assert (scaled_N2 >= bucket_N2).all()
    assert (crop_N2 >= 0).all()
    assert (crop_N2 + bucket_N2 <= scaled_N2).all()
    assert (np.abs(scaled_N2 - bucket_N2 - 2 * crop_N2) <= 1).all()  # at the centre
    if no_upscale:
        assert (scaled_N2 <= image_N2).all()
        assert (scaled_N2 - bucket_N2 < 64).all()
    else:
        assert (scaled_N2 == bucket_N2).any(axis=1).all()


def test_scale_and_crop_by_hand():
    # 4000×3000 into 1152×896: heights meet, 4000·896/3000 = 1194.67 → 1195, (1195 - 1152) // 2 = 21
    assert fitted((4000, 3000), SDXL) == ((1152, 896), (1195, 896), (21, 0))
    # 3000×4000 into 896×1152: widths meet
    assert fitted((3000, 4000), SDXL) == ((896, 1152), (896, 1195), (0, 21))
    assert fitted((1000, 1000), SDXL) == ((1024, 1024), (1024, 1024), (0, 0))


def test_half_a_pixel_is_rounded_up():
    """65×64 into 32×32: 32.5 → 33."""
    assert fitted((65, 64), BucketOptions((32, 32)))[1] == (33, 32)


def test_no_upscale_by_hand():
    # Small: its own size, floored to the step.
    assert fitted((500, 300), NO_UPSCALE) == ((448, 256), (500, 300), (26, 22))
    # 2000×1500 has more than 1024² px. At that area it is 1182.4×886.8. Width 1152 → height 864, bucket 1152×832, ratio
    # off by 0.051; height 832 → width 1109, bucket 1088×832, ratio off by 0.026: the height wins.
    assert fitted((2000, 1500), NO_UPSCALE) == ((1088, 832), (1109, 832), (10, 0))
    # 1500×2000: by width 832 → 1109 (832×1088, off by 0.0147), by height 1152 → 864 (832×1152, off by 0.028).
    assert fitted((1500, 2000), NO_UPSCALE) == ((832, 1088), (832, 1109), (0, 10))


def test_no_upscale_names_the_image_whose_side_is_under_the_step():
    options = NO_UPSCALE
    images = sizes((512, 512), (40, 300), (60_000, 100))
    with pytest.raises(InputError, match=r"img1 \(40×300\); img2 \(60000×100\)"):
        assign_buckets(images, options, lambda row: f"img{row}")


def test_without_buckets_there_is_one():
    buckets = assign_buckets(sizes((100, 30), (64, 640)), BucketOptions((72, 40)))
    assert buckets.sizes_K2.tolist() == [[72, 40]]
    assert buckets.bucket_of_row.tolist() == [0, 0]


def test_mean_error_of_a_bucket():
    """Ratios 2 and 0.5 in a square bucket: |1-2| and |1-0.5|."""
    buckets = assign_buckets(sizes((200, 100), (100, 200)), BucketOptions((64, 64)))
    assert (buckets.error_K / 2).tolist() == [0.75]


def test_an_image_of_another_size_than_indexed_is_still_cut_to_its_bucket():
    found = fit((200, 200), (448, 256), NO_UPSCALE)  # indexed as 500×300
    assert found.scaled_wh_px == (448, 448)
    assert found.crop_xy_px == (0, 96)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BucketOptions((100, 64)), r"--resolution 100,64.*multiples of 8.*104,64"),
        (BucketOptions((1024, 1024), True, 512, 2048, 20), r"--bucket_reso_steps 20"),
        (BucketOptions((1024, 1024), True, 500, 2048, 64), r"--min_bucket_reso 500.*512"),
        (BucketOptions((1024, 1024), True, 512, 2000, 64), r"--max_bucket_reso 2000.*2048"),
        (BucketOptions((64, 64), True, 256, 1024, 64), r"--min_bucket_reso 256.*--resolution 64,64"),
        (BucketOptions((2048, 2048), True, 256, 1024, 64), r"--max_bucket_reso 1024.*--resolution 2048,2048"),
        (BucketOptions((48, 640), True, 256, 1024, 64), r"--resolution 48,640.*--bucket_reso_steps 64"),
    ],
)
def test_contradicting_options_are_errors_that_name_the_flag(options, message):
    with pytest.raises(InputError, match=message):
        assign_buckets(sizes((100, 100)), options)
