"""--dataset_config: levels, precedence, and what is said about keys that are wrong or not there yet."""

import json
from pathlib import Path

import pytest
import toml

import sdxl_pretrain
from library.errors import InputError

REQUIRED = ["--pretrained_model_name_or_path=m", "--output_dir=o"]


def options(path, *arguments):
    return sdxl_pretrain.SCRIPT.options([*REQUIRED, f"--dataset_config={path}", *arguments]).data


def written(folder, content, name="data.toml"):
    path = folder / name
    if isinstance(content, dict):
        content = json.dumps(content) if name.endswith(".json") else toml.dumps(content)
    path.write_text(content)
    return path


EXAMPLE = """
[general]
shuffle_caption = true
caption_extension = "txt"
enable_bucket = true
keep_tokens = 1
cache_info = false          # off, so nothing that is missing here

[[datasets]]
resolution = 1024
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = "a"
  num_repeats = 10
  class_tokens = "sks dog"
  keep_tokens = 3

  [[datasets.subsets]]
  image_dir = "b"
  metadata_file = "b.json"
  caption_dropout_rate = 0.5

[[datasets]]
resolution = [768, 512]
batch_size = 4
min_bucket_reso = 128

  [[datasets.subsets]]
  image_dir = "c"
  shuffle_caption = false
"""


def test_the_inner_level_wins_over_the_outer_one_and_that_over_the_command_line(tmp_path):
    path = written(tmp_path, EXAMPLE)
    found = options(path, "--keep_tokens=9", "--caption_separator=;", "--max_bucket_reso=2048", "--train_batch_size=7")
    a, b, c = found.subsets
    assert [subset.train_data_dir for subset in (a, b, c)] == [Path("a"), Path("b"), Path("c")]
    assert [subset.keep_tokens for subset in (a, b, c)] == [3, 2, 1]
    assert [subset.shuffle_caption for subset in (a, b, c)] == [True, True, False]
    assert [subset.resolution for subset in (a, b, c)] == [(1024, 1024), (1024, 1024), (768, 512)]
    assert [subset.min_bucket_reso for subset in (a, b, c)] == [256, 256, 128]
    assert [subset.dataset_repeats for subset in (a, b, c)] == [10, 1, 1]
    assert [subset.caption_dropout_rate for subset in (a, b, c)] == [0, 0.5, 0]
    assert (a.class_tokens, b.class_tokens) == ("sks dog", "")
    assert (a.in_json, b.in_json) == (None, Path("b.json"))
    for subset in (a, b, c):  # from the command line, where the file says nothing
        assert (subset.caption_separator, subset.max_bucket_reso, subset.enable_bucket) == (";", 2048, True)
        assert subset.caption_extension == ".txt"
    assert found.train_batch_size == 4
    assert found.resolution == (1024, 1024)


def test_json_is_read_the_same(tmp_path):
    path = written(tmp_path, toml.loads(EXAMPLE), "data.json")
    assert options(path).subsets == options(written(tmp_path, EXAMPLE)).subsets


def test_a_mark_before_the_text_is_no_part_of_it(tmp_path):
    marked = written(tmp_path, "\ufeff" + EXAMPLE, "marked.toml")
    assert options(marked).subsets == options(written(tmp_path, EXAMPLE)).subsets


CAPTIONS = {
    "caption_prefix": "photo of",
    "caption_suffix": "outside",
    "keep_tokens_separator": "|||",
    "secondary_separator": ";;;",
    "enable_wildcard": True,
    "token_warmup_min": 0,
    "token_warmup_step": 0.5,
    "caption_dropout_every_n_epochs": 2,
    "caption_tag_dropout_rate": 0.25,
}


@pytest.mark.parametrize("level", ["general", "dataset", "subset"])
def test_every_caption_option_is_taken_at_every_level(tmp_path, level):
    (subset,) = options(written(tmp_path, config(**{level: CAPTIONS})), "--caption_prefix=outer").subsets
    assert {name: getattr(subset, name) for name in CAPTIONS} == CAPTIONS


def config(general=None, dataset=None, subset=None):
    datasets = [{"resolution": 64, **(dataset or {}), "subsets": [{"image_dir": "a", **(subset or {})}]}]
    return {"general": general or {}, "datasets": datasets}


@pytest.mark.parametrize("value", ["cache_info"])
def test_what_is_not_there_yet_is_refused_where_it_is_asked_for(tmp_path, value):
    with pytest.raises(InputError, match=rf"data\.toml: {value} in \[\[datasets\.subsets\]\] 1 .*not available.*false"):
        options(written(tmp_path, config(subset={value: True})))
    assert options(written(tmp_path, config(subset={value: False}))).subsets


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (config(subset={"num_repeat": 3}), r"num_repeat in \[\[datasets\.subsets\]\] 1.*Did you mean num_repeats"),
        (config(general={"image_dir": "x"}), r"image_dir does not belong in \[general\].*\[\[datasets\.subsets\]\]"),
        (config(subset={"resolution": 512}), r"resolution does not belong in \[\[datasets\.subsets\]\] 1"),
        (config(subset={"num_repeats": 0}), r"num_repeats .* at least 1 and less than 2\*\*31, got 0"),
        (config(subset={"num_repeats": True}), r"num_repeats .* whole number"),
        (config(subset={"shuffle_caption": 1}), r"shuffle_caption .* true or false, got 1"),
        (config(subset={"caption_dropout_rate": 1.5}), r"caption_dropout_rate .* 0 to 1, got 1\.5"),
        (config(subset={"caption_separator": ""}), r"caption_separator .* must not be empty"),
        (config(subset={"caption_extension": " "}), r"caption_extension .* must be one file extension"),
        (config(subset={"image_dir": ""}), r"lacks image_dir"),
        (config(subset={"token_warmup_step": -1}), r"token_warmup_step .* at least 0, got -1"),
        (config(subset={"is_reg": True}), r"\[\[datasets\]\] 1 has only subsets of is_reg = true"),
        (config(general={"is_reg": True}), r"is_reg does not belong in \[general\].*\[\[datasets\.subsets\]\]"),
        (config(subset={"image_dir": 3}), r"image_dir .* a text, got 3"),
        (config(dataset={"resolution": [1, 2, 3]}), r"resolution in \[\[datasets\]\] 1 .*\[width, height\]"),
        (
            config(subset={"conditioning_data_dir": "x"}),
            r"conditioning_data_dir .* not available here yet",
        ),
        (config(general={"cache_info": True}), r"cache_info in \[general\] is not available"),
        ({"datasets": [{"subsets": [{"image_dir": "a"}]}]}, r"\[\[datasets\]\] 1 has no resolution"),
        ({"datasets": [{"resolution": 64, "subsets": [{}]}]}, r"1 of \[\[datasets\]\] 1 lacks image_dir"),
        ({"datasets": [{"resolution": 64}]}, r"no subsets of \[\[datasets\]\] 1"),
        ({"general": {}}, r"there are no datasets"),
        ({"datasets": [], "subsets": []}, r"subsets in the file is not known"),
        ("a = = 1", r"--dataset_config .*data\.toml is no valid TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        options(written(tmp_path, content))


def test_batch_sizes_that_differ_are_an_error(tmp_path):
    content = config(dataset={"batch_size": 2})
    content["datasets"] += config(dataset={"batch_size": 4})["datasets"]
    with pytest.raises(InputError, match=r"batch_size differs between the data sets \(2, 4\)"):
        options(written(tmp_path, content))


@pytest.mark.parametrize("flag", ["--train_data_dir=d", "--in_json=x.json", "--reg_data_dir=r"])
def test_the_data_is_named_in_one_place(tmp_path, flag):
    with pytest.raises(InputError, match=rf"{flag.partition('=')[0]} and --dataset_config"):
        options(written(tmp_path, config()), flag)


def test_regularisation_images_are_a_subset_of_their_own(tmp_path):
    given = ["--train_data_dir=d", "--resolution=64", "--in_json=x.json", "--shuffle_caption"]
    (only,) = sdxl_pretrain.SCRIPT.options([*REQUIRED, *given]).data.subsets
    train, reg = sdxl_pretrain.SCRIPT.options([*REQUIRED, *given, "--reg_data_dir=r"]).data.subsets
    assert train == only and not train.is_reg
    assert (reg.train_data_dir, reg.in_json, reg.is_reg, reg.shuffle_caption) == (Path("r"), None, True, True)
    content = config()
    content["datasets"] += config()["datasets"]
    content["datasets"][1]["subsets"].append({"image_dir": "r", "is_reg": True})
    found = options(written(tmp_path, content)).subsets
    assert [(subset.dataset, subset.is_reg) for subset in found] == [(0, False), (1, False), (1, True)]


def test_no_data_at_all_is_an_error():
    for given, missing in (("--resolution=64", "--train_data_dir"), ("--train_data_dir=d", "--resolution")):
        with pytest.raises(InputError, match=f"{missing} is missing; give it, or --dataset_config"):
            sdxl_pretrain.SCRIPT.options([*REQUIRED, given])


def test_a_file_that_is_not_there_or_of_another_kind(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.toml cannot be read: No such file"):
        options(tmp_path / "nowhere.toml")
    with pytest.raises(InputError, match=r"must be a \.toml or a \.json"):
        options(tmp_path / "data.yaml")


def test_image_options_stand_at_every_level(tmp_path):
    content = config(
        general={"flip_aug": True, "face_crop_aug_range": [1, 3]},
        dataset={"random_crop": True, "resize_interpolation": "area"},
        subset={"color_aug": True, "alpha_mask": True},
    )
    content["datasets"][0]["subsets"].append({"image_dir": "b", "flip_aug": False, "face_crop_aug_range": [2.0, 2.5]})
    first, second = options(written(tmp_path, content), "--resize_interpolation=cubic").subsets
    shown = [(each.flip_aug, each.random_crop, each.color_aug, each.alpha_mask) for each in (first, second)]
    assert shown == [(True, True, True, True), (False, True, False, False)]
    assert [each.face_crop_aug_range for each in (first, second)] == [(1.0, 3.0), (2.0, 2.5)]
    assert first.resize_interpolation == "area"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("face_crop_aug_range", [3, 1], "the smaller one first"),
        ("face_crop_aug_range", 2, r"must be two numbers .*\[least, most\]"),
        ("face_crop_aug_range", ["1", "x"], "must be two numbers"),
        ("resize_interpolation", "sharp", "must be one of lanczos"),
        ("flip_aug", 1, "true or false"),
    ],
)
def test_image_options_that_cannot_be_are_named(tmp_path, key, value, message):
    with pytest.raises(InputError, match=rf"{key} in .*{message}"):
        options(written(tmp_path, config(subset={key: value})))
