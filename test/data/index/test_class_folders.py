"""Folders whose names nearly say how often their images are shown, or say it in the wrong place, are pointed out."""

import pytest

from library.data.index.sources import Subset
from library.data.index.table import build_index
from library.errors import InputError


@pytest.fixture
def build(tmp_path, make_picture):
    """Indexes a folder of images with captions at the paths given."""

    def build(*names, **of_subset):
        for name in names:
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(make_picture(16, 8))
            path.with_suffix(".txt").write_text("text")
        return build_index([Subset(tmp_path / "data", ".txt", **of_subset)], use_cache=False)

    return build


def repeats(index):
    return [source.repeats for source in index.sources]


def test_names_that_are_almost_right(build, tmp_path):
    index = build("10 dog/1.jpg", "5-cat/1.jpg", "3_/1.jpg", "plain/1.jpg", "2023-holiday/1.jpg", "007/1.jpg")
    assert set(repeats(index)) == {1} and len(index) == 6
    assert index.warnings == (
        f"3 folders in {tmp_path}/data are almost named 'N_class words', and their images are shown once, without "
        "class words: 10 dog (name it 10_dog); 3_ (name it 3_WORDS); 5-cat (name it 5_cat).",
    )
    assert build(class_folders=False).warnings == ()  # as of --dataset_config, where names mean nothing


def test_a_project_folder_one_level_too_high(build, tmp_path):
    data = tmp_path / "data"
    index = build("img/10_sks dog/1.jpg", "reg/1_dog/1.jpg", "log/x.jpg")
    assert set(repeats(index)) == {1}
    deeper, regularisation = index.warnings
    assert deeper == (
        f"2 folders named 'N_class words' are not directly in {data}, so that their names mean nothing: "
        f"{data}/img/10_sks dog; {data}/reg/1_dog. Give the folder that they are in as --train_data_dir "
        f"(regularisation images as --reg_data_dir): {data}/img; {data}/reg."
    )
    assert regularisation.startswith(f"images in {data}/reg train like the others.")


def test_one_level_too_deep_and_in_the_right_place(build, tmp_path):
    assert build("10_dog/1.jpg", "10_dog/snow/1.jpg").warnings == ()
    (tmp_path / "data" / "10_dog").rename(tmp_path / "10_dog")
    index = build_index([Subset(tmp_path / "10_dog", ".txt")], use_cache=False)
    assert any("give its parent folder as --train_data_dir" in warning for warning in index.warnings)


def test_regularisation_images_in_their_own_place_are_no_fault(build):
    assert build("reg/1.jpg", flag="--reg_data_dir").warnings == ()


@pytest.mark.parametrize("name", ["99999999999999999999_dog", "20240131_trip", "100001_dog"])
def test_a_number_that_is_hardly_one_of_repeats_is_refused(build, tmp_path, name):
    (tmp_path / "data" / "20240131_empty").mkdir(parents=True)
    assert repeats(build("100000_dog/1.jpg")) == [100_000]
    with pytest.raises(InputError, match=f"data/{name}: the name of a folder 'N_class words' says .* N times"):
        build(f"{name}/deeper/1.jpg")
