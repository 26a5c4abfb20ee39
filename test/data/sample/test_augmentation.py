"""Crops, mirroring, colours and masks, mostly on pictures whose pixels say where they stand."""

import colorsys
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as reference

from library.data.fit import Fit
from library.data.order.buckets import fit
from library.data.sample.augmentation import ImageChanges, apply_gamma, face_in, is_mirrored, placed, shift_hue
from library.data.sample.decode import decode
from library.data.sample.prepare import Place, Treatment, prepare_sample
from library.data.sample.scaling import FILTERS, Filter
from library.diffusion.masks import latent_weights
from library.options.buckets import BucketOptions
from library.options.images import INTERPOLATIONS

SIZE, BUCKET = (240, 160), (64, 64)  # scaled to cover the bucket: 96×64
SQUARE = BucketOptions(BUCKET)


def saved(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def coordinates(width=SIZE[0], height=SIZE[1]):
    """A picture whose red says how far right a pixel is and whose green how far down, both in px."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8))


def sample(options, step=0, place=0, name="a.png", picture=None, seed=1, bucket_options=SQUARE):
    def fits(width, height):
        return fit((width, height), BUCKET, bucket_options)

    data = saved(picture or coordinates())
    return prepare_sample(name, data, "", Treatment(images=options), BUCKET, fits, Place(seed, step, place, 0))


def corners(found, scale=SIZE[1] / BUCKET[1]):
    """Left, top, right and bottom of what a sample shows, in px of the scaled picture, from its pixels alone."""
    inner = found.pixels_HWC[2:-2, 2:-2, :2].astype(float)  # at the very edge a filter has less to weigh
    left, right = np.median(inner[:, 0, 0]), np.median(inner[:, -1, 0])
    top, bottom = np.median(inner[0, :, 1]), np.median(inner[-1, :, 1])
    # A pixel's middle: (place + 0.5) of the scaled picture is (colour + 0.5) of the whole one.
    start = [(value + 0.5) / scale - 2.5 for value in (left, top)]
    end = [(value + 0.5) / scale + 2.5 for value in (right, bottom)]
    return [*start, *end]


class TestRandomCrop:
    def test_the_size_ids_are_where_the_pixels_come_from(self):
        lefts = []
        for step in range(60):
            found = sample(ImageChanges(random_crop=True), step)
            left, top, right, bottom = corners(found)
            assert found.size_ids[:2] == SIZE[::-1]
            assert found.size_ids[4:] == BUCKET[::-1]
            assert abs(left - found.size_ids[3]) < 0.6
            assert abs(top - found.size_ids[2]) < 0.6
            assert right - left == pytest.approx(BUCKET[0], abs=0.8)
            assert bottom - top == pytest.approx(BUCKET[1], abs=0.8)
            lefts.append(found.size_ids[3])
        assert min(lefts) < 4 and max(lefts) > 28  # of 0 … 32
        assert len(set(lefts)) > 20

    def test_every_place_in_the_room_is_reached_as_often_and_none_outside(self):
        options = ImageChanges(random_crop=True)
        random = np.random.default_rng(0)
        centred = Fit((70, 67), (3, 1))
        found = [placed(centred, (70, 67), BUCKET, options, None, random.random(5), False) for _ in range(4000)]
        counts = np.bincount([entry.crop_xy_px[0] for entry in found])
        assert len(counts) == 7  # 0 … 6
        assert counts.min() > 450 and counts.max() < 700  # 571 expected
        assert {entry.crop_xy_px[1] for entry in found} == {0, 1, 2, 3}
        last = placed(centred, (70, 67), BUCKET, options, None, np.full(5, np.nextafter(1, 0)), False)
        assert last.crop_xy_px == (6, 3)

    def test_without_upscaling_both_sides_are_cropped_at_random(self):
        options = ImageChanges(random_crop=True)
        larger = BucketOptions((128, 128), enable_bucket=True, bucket_no_upscale=True)  # the bucket is 90×80 floored
        found = [
            sample(options, step, picture=coordinates(90, 80), bucket_options=larger).size_ids[2:4]
            for step in range(30)
        ]
        assert max(top for top, _ in found) > 10
        assert max(left for _, left in found) > 18

    def test_it_depends_on_seed_step_and_place_alone(self):
        options = ImageChanges(random_crop=True)
        first = sample(options, 3, 4)
        again = sample(options, 3, 4)
        assert again.size_ids == first.size_ids
        assert (again.pixels_HWC == first.pixels_HWC).all()
        others = [sample(options, step, place, seed=seed) for step, place, seed in ((4, 4, 1), (3, 5, 1), (3, 4, 2))]
        assert all(other.size_ids != first.size_ids for other in others)

    def test_a_jpeg_decoded_at_reduced_scale_is_cropped_at_the_same_place(self):
        picture = coordinates(250, 160).resize((1000, 640), Image.Resampling.BILINEAR)
        data = saved(picture, "JPEG", quality=95, subsampling=0)
        for left, top in ((0, 0), (36, 0), (11, 0)):
            pixels, size_ids = decode(
                data, BUCKET, lambda width, height, left=left, top=top: Fit((100, 64), (left, top))
            )
            assert size_ids[2:4] == (top, left)
            middle = pixels[32, 32, :2].astype(float)  # 2.5 px of the small picture a pixel
            assert np.abs((middle + 0.5) / 2.5 - (left + 32.5, top + 32.5)).max() < 1.2


class TestFlip:
    def test_half_of_the_samples_are_the_unflipped_ones_mirrored_and_the_others_untouched(self):
        mirrored = 0
        for step in range(40):
            plain, found = sample(ImageChanges(), step), sample(ImageChanges(flip_aug=True), step)
            expected = plain.pixels_HWC[:, ::-1] if found.mirrored else plain.pixels_HWC
            assert (found.pixels_HWC == expected).all()
            mirrored += found.mirrored
        assert 10 < mirrored < 30

    def test_the_crop_of_a_mirrored_image_is_that_of_the_mirrored_file(self):
        """What a flipped sample says of itself is what it would say if the file itself were mirrored."""
        seen = set()
        for step in range(30):
            found = sample(ImageChanges(flip_aug=True, random_crop=True), step)
            if not found.mirrored:
                continue
            top, left = found.size_ids[2:4]
            seen.add(left)
            file = saved(coordinates().transpose(Image.Transpose.FLIP_LEFT_RIGHT))
            pixels, size_ids = decode(file, BUCKET, lambda width, height, at=(left, top): Fit((96, 64), at))
            assert size_ids == found.size_ids
            assert np.abs(pixels.astype(int) - found.pixels_HWC).max() <= 1
        assert len(seen) > 5

    def test_an_odd_pixel_of_the_centre_crop_is_on_the_other_side(self):
        entry = Fit((97, 64), (16, 0), mirrored=True)
        assert entry.seen_left_px(64) == 17
        assert sample(ImageChanges(flip_aug=True), step=0, picture=coordinates(97, 64)).size_ids[3] in (16, 17)

    def test_options_do_not_change_each_others_numbers(self):
        for step in range(12):
            both = sample(ImageChanges(flip_aug=True, random_crop=True), step)
            flipped, cropped = sample(ImageChanges(flip_aug=True), step), sample(ImageChanges(random_crop=True), step)
            assert both.mirrored == flipped.mirrored
            left = cropped.size_ids[3]
            assert both.size_ids[3] == (96 - 64 - left if both.mirrored else left)


class TestFaces:
    @pytest.mark.parametrize(
        ("name", "found"),
        [
            ("/data/anna_120_80_40_50.jpg", ((120, 80), (40, 50))),
            ("/data/00000.tar:000000012_120_80_40_50", ((120, 80), (40, 50))),
            ("/a_1_2_3_4/anna.jpg", None),
            ("anna_80_40_50.jpg", None),
            ("anna_120_80_0_50.jpg", None),
            ("anna_120_80_40_50_x.jpg", None),
        ],
    )
    def test_names(self, name, found):
        face = face_in(name)
        assert (face and (face.centre_xy_px, face.size_wh_px)) == found

    def test_the_crop_is_around_the_face_at_a_size_of_the_range(self):
        options = ImageChanges(face_crop_aug_range=(2.0, 4.0))
        scales = []
        for step in range(40):
            found = sample(options, step, name="x_150_90_24_20.png")
            pixels = found.pixels_HWC.astype(float)
            scale = 60 / (pixels[32, 62, 0] - pixels[32, 2, 0])  # px of the scaled picture a px of the whole
            middle = (pixels[31:33, 31:33, :2].mean(axis=(0, 1)) + 0.5).tolist()
            assert 2 - 0.15 < 64 / (24 * scale) < 4 + 0.15
            assert abs(middle[0] - 150) < 2.5 and abs(middle[1] - 90) < 2.5  # a twentieth of the face, and rounding
            top, left = found.size_ids[2:4]
            assert abs((middle[0] * scale) - (left + 32)) < 2
            assert abs((middle[1] * scale) - (top + 32)) < 2
            scales.append(scale)
        assert max(scales) / min(scales) > 1.4  # 0.67 … 1

    def test_at_the_edge_the_crop_stays_inside_and_nothing_is_enlarged_for_a_face(self):
        random = np.random.default_rng(0)
        options = ImageChanges(face_crop_aug_range=(1.0, 3.0), random_crop=True)
        for name, size in (
            ("x_3_3_5_5.jpg", SIZE),
            ("x_239_159_9_9.jpg", SIZE),
            ("x_9999_9_9_9.jpg", SIZE),
            ("x_5_5_9_9.jpg", (40, 50)),
        ):
            for _ in range(50):
                found = placed(Fit((96, 64), (16, 0)), size, BUCKET, options, face_in(name), random.random(5), False)
                covering = max(64 / size[0], 64 / size[1])
                assert all(
                    0 <= start <= length - 64
                    for start, length in zip(found.crop_xy_px, found.scaled_wh_px, strict=True)
                )
                assert found.scaled_wh_px[0] <= max(1, covering) * size[0] + 0.5

    def test_an_image_without_a_face_in_its_name_is_cropped_as_others(self):
        for options in (ImageChanges(), ImageChanges(random_crop=True)):
            with_range = ImageChanges(random_crop=options.random_crop, face_crop_aug_range=(1, 2))
            assert sample(with_range, 5).size_ids == sample(options, 5).size_ids


class TestColours:
    def test_a_third_of_the_samples_change_and_only_a_little(self):
        grey = Image.fromarray(np.random.default_rng(0).integers(60, 200, (64, 64, 3), dtype=np.uint8))
        plain = np.asarray(grey, int)
        changed = 0
        for step in range(150):
            found = sample(ImageChanges(color_aug=True), step, picture=grey)
            difference = np.abs(found.pixels_HWC - plain)
            changed += bool(difference.any())
            assert difference.mean() < 25
        assert 30 < changed < 70  # 50 expected

    @pytest.mark.parametrize("degrees", [-16, 5, 16])
    def test_hues_against_torchvision_and_colorsys(self, degrees):
        pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        ours = shift_hue(pixels, degrees).astype(int)
        theirs = reference.adjust_hue(torch.from_numpy(pixels).permute(2, 0, 1), degrees / 360).permute(1, 2, 0).numpy()
        assert np.abs(ours - theirs).max() <= 12  # Pillow has 256 hues: 1.4° are 6 of 255 of a full colour
        assert np.abs(ours - theirs).mean() < 1.5
        hue, saturation, value = colorsys.rgb_to_hsv(0.8, 0.3, 0.2)
        expected = np.array(colorsys.hsv_to_rgb((hue + degrees / 360) % 1, saturation, value)) * 255
        flat = np.full((1, 1, 3), np.round(np.array([0.8, 0.3, 0.2]) * 255), np.uint8)
        assert np.abs(shift_hue(flat, degrees)[0, 0] - expected).max() < 6

    @pytest.mark.parametrize("gamma", [0.95, 1.05])
    def test_gamma_against_torchvision(self, gamma):
        pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
        theirs = reference.adjust_gamma(torch.from_numpy(pixels).permute(2, 0, 1), gamma).permute(1, 2, 0).numpy()
        ours = apply_gamma(pixels, gamma)
        assert np.abs(ours.astype(int) - theirs).max() <= 1  # they cut fractions off
        assert ours[0, 0, 0] == 0 and ours[-1, -1, 0] == 255


class TestAlphaMask:
    def picture(self):
        """Colours that say where they stand; transparent left of 120."""
        image = coordinates().convert("RGBA")
        alpha = np.where(np.arange(240)[None] < 120, 0, 255).repeat(160, axis=0).reshape(160, 240)
        image.putalpha(Image.fromarray(alpha.astype(np.uint8)))
        return image

    def test_the_mask_is_cropped_and_mirrored_with_the_image_and_the_colours_stay(self):
        options = ImageChanges(alpha_mask=True, random_crop=True, flip_aug=True)
        shown = set()
        for step in range(20):
            found = sample(options, step, picture=self.picture())
            opaque = found.pixels_HWC[..., 0] >= 123  # the colour of what is right of the middle, scaled by 2.5
            transparent = found.pixels_HWC[..., 0] <= 116
            assert (found.extras["mask"][opaque] > 250).all()
            assert (found.extras["mask"][transparent] < 5).all()
            shown.add(found.mirrored)
            plain = sample(ImageChanges(random_crop=True, flip_aug=True), step, picture=coordinates())
            assert np.abs(found.pixels_HWC - plain.pixels_HWC.astype(int)).max() <= 1  # not white, not weighed by alpha
        assert shown == {True, False}

    def test_without_it_white_is_under_transparency(self):
        found = sample(ImageChanges(), picture=self.picture())
        assert "mask" not in found.extras
        assert (found.pixels_HWC[:, :24] == 255).all()

    @pytest.mark.parametrize("kind", ["RGB", "L", "P", "16"])
    def test_all_counts_of_an_image_without_alpha(self, kind):
        image = Image.new("I;16", (64, 64), 40_000) if kind == "16" else Image.new("RGB", (64, 64), "red").convert(kind)
        found = sample(ImageChanges(alpha_mask=True), picture=image)
        assert (found.extras["mask"] == 255).all()
        assert found.pixels_HWC.shape == (64, 64, 3)
        assert (found.pixels_HWC == sample(ImageChanges(), picture=image).pixels_HWC).all()

    def test_latents_weigh_as_much_as_of_them_is_seen(self):
        masks = torch.zeros(2, 16, 24, dtype=torch.uint8)
        masks[0, :8] = 255
        masks[1, :, :4] = 255
        weights = latent_weights(masks, (2, 3))
        assert weights.shape == (2, 1, 2, 3)
        assert weights[0, 0].tolist() == [[1, 1, 1], [0, 0, 0]]
        assert weights[1, 0].tolist() == [[0.5, 0, 0], [0.5, 0, 0]]


class TestInterpolation:
    @pytest.mark.parametrize("name", INTERPOLATIONS)
    def test_the_whole_picture_is_scaled_with_pillows_filter_of_that_name(self, name):
        filters = {"lanczos": "LANCZOS", "nearest": "NEAREST", "bilinear": "BILINEAR", "linear": "BILINEAR"}
        filters |= {"bicubic": "BICUBIC", "cubic": "BICUBIC", "area": "BOX"}
        colours = np.random.default_rng(4).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        image = Image.fromarray(colours).resize((600, 400), Image.Resampling.BICUBIC)
        data = saved(image, "JPEG", quality=95, subsampling=0)  # would be decoded at a quarter without a filter
        options = ImageChanges(resize_interpolation=FILTERS[name])
        treatment = Treatment(images=options)
        found = prepare_sample(
            "a", data, "", treatment, BUCKET, lambda width, height: Fit((96, 64), (16, 0)), Place(0, 0, 0, 0)
        )
        whole = Image.open(io.BytesIO(data)).resize((96, 64), Image.Resampling[filters[name]])
        differences = np.abs(np.asarray(whole, int)[:, 16:80] - found.pixels_HWC)
        # 2 by torch's kernels for AVX2; elsewhere Pillow scales, too, and averages some pixels before.
        assert differences.max() <= 3 and differences.mean() < 0.5

    def test_every_name_has_a_filter_and_every_filter_a_name(self):
        assert set(FILTERS) == set(INTERPOLATIONS)
        assert set(FILTERS.values()) == set(Filter)


def test_flips_are_drawn_only_where_asked_for():
    assert not is_mirrored(ImageChanges(), np.zeros(4))
    assert is_mirrored(ImageChanges(flip_aug=True), np.zeros(4))
    assert not is_mirrored(ImageChanges(flip_aug=True), np.full(4, 0.5))
