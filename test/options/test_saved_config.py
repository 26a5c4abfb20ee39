"""The configuration that a run leaves beside its output is one that it can be started from again, and holds no keys."""

import dataclasses

import pytest

import sdxl_pretrain
from library.options.saved_config import config_path, config_text, write_config
from library.user_text import parse_toml

REQUIRED = ["--pretrained_model_name_or_path=m", "--train_data_dir=d", "--resolution=64,32"]


def options(*words):
    return sdxl_pretrain.SCRIPT.options(words)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--output_name=cat", "--optimizer_args", "weight_decay=0.1", "betas=0.9,0.99", "--use_8bit_adam"],
        ["--face_crop_aug_range=1,2.5", "--reg_data_dir=r", '--caption_prefix=say "é"\\', "--max_token_length=225"],
    ],
)
def test_a_run_started_from_it_has_the_same_options(tmp_path, more):
    then = options(*REQUIRED, f"--output_dir={tmp_path}", "--seed=3", *more)
    write_config(then, seed=3)
    file = config_path(then)
    assert file == tmp_path / ("cat.config.toml" if "--output_name=cat" in more else "run.config.toml")
    now = options(f"--config_file={file}")
    assert dataclasses.replace(now, config=then.config) == then


def test_what_a_data_set_configuration_inherits_stands_in_it(tmp_path):
    data = tmp_path / "data.toml"
    data.write_text("[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'a'\nkeep_tokens = 2\n")
    then = options("--pretrained_model_name_or_path=m", f"--output_dir={tmp_path}", f"--dataset_config={data}",
                   "--keep_tokens=1", "--shuffle_caption", "--seed=3")  # fmt: skip
    write_config(then, seed=3)
    now = options(f"--config_file={config_path(then)}")
    assert dataclasses.replace(now, config=then.config) == then


def test_the_file_that_a_run_was_started_from_stays_as_it_is(tmp_path):
    write_config(options(*REQUIRED, f"--output_dir={tmp_path}"), seed=3)
    file = tmp_path / "run.config.toml"
    mine = file.read_text() + "# mine\n"
    file.write_text(mine)
    write_config(options(f"--config_file={file}", "--max_train_steps=7"), seed=4)
    assert file.read_text() == mine


def test_the_seed_that_was_drawn_is_in_it():
    drawn = options(*REQUIRED, "--output_dir=o")
    assert drawn.run.seed is None and parse_toml(config_text(drawn, seed=77))["seed"] == 77


def test_credentials_are_not(tmp_path):
    data = "--train_data_dir=https://me:hidden@data.test/{0..9}.tar?key=secret"
    text = config_text(options("--output_dir=o", *REQUIRED, data), seed=1)
    assert "hidden" not in text and "secret" not in text and "train_data_dir" not in parse_toml(text)
    assert '# train_data_dir = "https://data.test/{0..9}.tar"  # without its credentials' in text
    plain = "https://data.test/{0..9}.tar"
    text = config_text(options("--output_dir=o", *REQUIRED, f"--train_data_dir={plain}"), seed=1)
    assert parse_toml(text)["train_data_dir"] == plain


TEXTS = [
    "C:\\xmodels",
    "\\x41",
    "a\x7fb",
    "\x1b",
    "\x85",
    "\u2028",
    'say "é"',
    "\\\\u0041",
    "'''",
    "漢\U0001f600",
    "a\tb",
]


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_is_read_as_it_was(text):
    """The package toml lost a backslash before an x, and failed at control characters."""
    given = ["--output_dir=o", *REQUIRED, f"--caption_prefix={text}", "--optimizer_args", text, "b"]
    written = parse_toml(config_text(options(*given), seed=1))
    assert (written["caption_prefix"], written["optimizer_args"]) == (text, [text, "b"])
    assert (written["learning_rate"], written["enable_bucket"], written["seed"]) == (2e-6, False, 1)


def test_a_path_that_is_no_utf_8_is_a_comment():
    text = config_text(options("--output_dir=o", *REQUIRED, "--in_json=a\udcff.json"), seed=1)
    assert "in_json" not in parse_toml(text) and '# in_json = "a\\udcff.json"  # no UTF-8' in text
    assert text.encode()
