"""--config_file and --output_config of sdxl_pretrain.py."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import toml

import sdxl_pretrain
from library.errors import InputError

REQUIRED = ["--pretrained_model_name_or_path=model", "--output_dir=out"]


def parsed(*arguments: str):
    script = sdxl_pretrain.SCRIPT
    return SimpleNamespace(**script.values(arguments))


@pytest.fixture
def written(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "run.toml").write_text(text)
        return f"--config_file={tmp_path / 'run.toml'}"

    return write


def test_the_file_holds_flags_in_any_sections_and_the_command_line_wins(written):
    args = parsed(
        written(
            'output_dir = "out"\n[model]\npretrained_model_name_or_path = "model"\n[a.b]\nlearning_rate = 1e-4\n'
            'train_text_encoder = true\nenable_bucket = false\nresolution = [1216, 832]\nmax_train_epoch = 3\n'
            'optimizer_args = ["weight_decay=0.1", "betas=0.9,0.99"]\nseed = 7\n'
        ),
        "--seed=8",
    )  # fmt: skip
    assert args.output_dir == Path("out") and args.pretrained_model_name_or_path == "model"
    assert args.learning_rate == 1e-4 and args.train_text_encoder is True and args.enable_bucket is False
    assert args.resolution == (1216, 832) and args.max_train_epochs == 3 and args.seed == 8
    assert args.optimizer_args == ("weight_decay=0.1", "betas=0.9,0.99")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate = 1", "lerning_rate is no flag of sdxl_pretrain.py; did you mean learning_rate?"),
        ('seed = "seven"', "seed must be a whole number of at least 0 and less than 2**64, got 'seven'"),
        ("max_train_steps = 1.5", "max_train_steps must be a whole number of at least 1, got 1.5"),
        ("max_train_steps = 0", "max_train_steps must be a whole number of at least 1, got 0"),
        ("shuffle_caption = 1", "shuffle_caption must be true or false, got 1"),
        ("learning_rate = true", "learning_rate must be a number of at least 0, got true"),
        ("seed = [1]", "seed must be a whole number of at least 0 and less than 2**64, got [1]"),
        ('optimizer_args = "a=1"', "optimizer_args must be a list of texts, got 'a=1'"),
        ('mixed_precision = "fp8"', "mixed_precision must be one of no, fp16, bf16, got 'fp8'"),
        ("output_config = true", "output_config is no flag of sdxl_pretrain.py"),
        ("seed = ", "is no valid TOML"),
    ],
)
def test_what_the_file_may_not_say_is_named(written, text, message):
    with pytest.raises(InputError) as error:
        parsed(*REQUIRED, written(text))
    (said,) = error.value.problems
    assert message in said and "run.toml" in said


def test_all_that_is_wrong_is_named_at_once(written):
    text = 'lerning_rate = 1\nseed = "seven"\n[more]\nshuffle_caption = 1\nmasked_loss = true\nmax_train_steps = 0\n'
    with pytest.raises(InputError) as error:
        parsed("--output_dir=out", "--sede=1", "--seed", "--resolution=64x64", "--lowram", written(text))
    expected = [
        "--seed needs a value", "--resolution must be", "--lowram is not supported", "did you mean --seed?",
        "lerning_rate is no flag", "seed must be", "shuffle_caption must be", "max_train_steps must be",
        "--pretrained_model_name_or_path is missing",
    ]  # fmt: skip
    said = error.value.problems
    assert len(said) == len(expected) and all(any(key in one for one in said) for key in expected)


def test_two_values_of_one_flag_are_an_error(written):
    with pytest.raises(InputError, match="use_8bit_adam = true is a second value of optimizer_type"):
        parsed(*REQUIRED, written('optimizer_type = "Lion"\nuse_8bit_adam = true\n'))
    assert parsed(*REQUIRED, written("use_8bit_adam = true\n")).optimizer_type == "AdamW8bit"
    assert parsed(*REQUIRED, written('optimizer_type = "Lion"\n'), "--use_8bit_adam").optimizer_type == "AdamW8bit"


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_file_is_utf_8_with_or_without_a_mark(tmp_path, mark):
    (tmp_path / "run.toml").write_text(f'{mark}caption_prefix = "un château"\n', encoding="utf-8")
    assert parsed(*REQUIRED, f"--config_file={tmp_path / 'run.toml'}").caption_prefix == "un château"


def test_another_encoding_is_named(tmp_path):
    (tmp_path / "run.toml").write_bytes('caption_prefix = "un château"\n'.encode("latin-1"))
    with pytest.raises(InputError, match=r"run\.toml is not UTF-8 \(byte 23 is 0xe2, perhaps Windows' CP1252"):
        parsed(*REQUIRED, f"--config_file={tmp_path / 'run.toml'}")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"other\.toml cannot be read: No such file"):
        parsed(*REQUIRED, f"--config_file={tmp_path / 'other'}")


@pytest.mark.parametrize("data", ["data", "https://me:key@data.test/{0..9}.tar?x=1", "pipe:KEY=key cat {0..9}.tar"])
def test_what_was_written_is_read_as_the_same_arguments(tmp_path, capsys, data):
    given = [
        *REQUIRED, "--resolution=1024,832", "--learning_rate=3e-5", "--enable_bucket", f"--train_data_dir={data}",
        "--optimizer_args", "weight_decay=0.1",
    ]  # fmt: skip
    file = tmp_path / "run.toml"
    assert sdxl_pretrain.main([*given, f"--config_file={file}", "--output_config"]) == 0
    assert toml.loads(file.read_text()).keys() == {
        "pretrained_model_name_or_path", "output_dir", "resolution", "learning_rate", "enable_bucket",
        "optimizer_args", *["train_data_dir"] * (data == "data"),
    }  # fmt: skip
    again = [] if data == "data" else [f"--train_data_dir={data}"]  # what holds a key is not written
    assert "key" not in file.read_text() and ("without its credentials" in file.read_text()) == bool(again)
    read, plain = vars(parsed(f"--config_file={file}", *again)), vars(parsed(*given))
    assert read.pop("config_file") == file and plain.pop("config_file") is None
    assert read == plain
    assert sdxl_pretrain.main([*given, f"--config_file={file}", "--output_config"]) == 2
    assert "is there already" in capsys.readouterr().err


def example(flag):
    """A value that is not the flag's default, as a word of the command line and on its own."""
    written = {
        "resolution": "96,64", "face_crop_aug_range": "1.5,3", "caption_extension": ".tags", "caption_separator": ";",
        "profile": "10..12",
    }  # fmt: skip
    if flag.kind.many:
        return ["a=1", "b=0.9,0.99"]
    if flag.kind.choices:
        return [str(next(value for value in reversed(flag.kind.choices) if value != flag.default))]
    numbers = {"N": "3", "X": "0.25", "GIB": "7.5"}
    return [written.get(flag.name) or numbers.get(flag.kind.metavar) or f'{flag.name} "ü" #1']


@pytest.mark.parametrize(
    "flag", [flag for flag in sdxl_pretrain.SCRIPT.flags if flag.on_command_line], ids=lambda f: f.name
)
def test_every_flag_that_is_written_is_read_as_it_was(tmp_path, flag):
    if not flag.in_config_file:
        return
    words = [f"--{flag.name}"]
    if not flag.kind.switch:
        words = [*words, *example(flag)] if flag.kind.many else [f"--{flag.name}={example(flag)[0]}"]
    required = [word for word in REQUIRED if not word.startswith(f"--{flag.name}=")]
    file = tmp_path / "run.toml"
    assert sdxl_pretrain.main([*required, *words, f"--config_file={file}", "--output_config"]) == 0
    given, read = vars(parsed(*required, *words)), vars(parsed(f"--config_file={file}"))
    assert given[flag.name] not in (None, flag.default)
    assert read | {"config_file": None} == given


def test_only_toml_is_written(tmp_path, capsys):
    assert sdxl_pretrain.main([*REQUIRED, f"--config_file={tmp_path / 'run.json'}", "--output_config"]) == 2
    assert "name a .toml file" in capsys.readouterr().err and not (tmp_path / "run.json").exists()


def test_writing_needs_a_file(capsys):
    assert sdxl_pretrain.main([*REQUIRED, "--output_config"]) == 2
    assert "--output_config needs --config_file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ('optimizer_type = "AdaFactor"', "--use_lion_optimizer", {"optimizer_type": "Lion"}),
        ("use_lion_optimizer = true", "--optimizer_type=AdamW", {"optimizer_type": "AdamW"}),
        ("use_lion_optimizer = true", "--use_8bit_adam", {"optimizer_type": "AdamW8bit"}),
        ("use_8bit_adam = true", "--use_8bit_adam=false", {"optimizer_type": "AdamW"}),
        ('caption_extention = ".tags"', "--caption_extension=.txt", {"caption_extension": ".txt"}),
        ("max_train_epochs = 3", "--max_train_steps=5", {"max_train_steps": 5, "max_train_epochs": None}),
        ("max_train_steps = 3", "--max_train_epoch=5", {"max_train_steps": 1600, "max_train_epochs": 5}),
        ('train_data_dir = "a"\nin_json = "b.json"\nreg_data_dir = "c"', "--dataset_config=d.toml",
         {"train_data_dir": None, "in_json": None, "reg_data_dir": None, "dataset_config": Path("d.toml")}),
        ('dataset_config = "d.toml"', "--train_data_dir=a", {"train_data_dir": Path("a"), "dataset_config": None}),
        ("shuffle_caption = true", "--shuffle_caption=false", {"shuffle_caption": False}),
        ("xformers = true", "--xformers=false", {}),
        ("xformers = true\nmem_eff_attn = true", "--sdpa", {}),
        ("min_snr_gamma = 5", "--min_snr_gamma=0", {}),
        ('vae = "a"', "--vae=", {"vae": None}),
    ],
)  # fmt: skip
def test_the_command_line_wins_over_all_that_says_the_same_in_other_words(written, file, line, expected):
    values = vars(parsed(*REQUIRED, written(file), line))
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize("name", ["run_v1.2", "run", "a.b.toml", "run.TOML", "run.json"])
def test_a_name_with_dots_has_its_ending_added_unless_it_is_there(tmp_path, name):
    ends = name.lower().endswith((".toml", ".json"))
    file = tmp_path / (name if ends else f"{name}.toml")
    file.write_text('{"seed": 7}' if name.endswith("json") else "seed = 7")
    assert parsed(*REQUIRED, f"--config_file={tmp_path / name}").seed == 7


def test_what_windows_writes_as_a_path_is_no_toml_and_the_error_says_what_to_write(written):
    with pytest.raises(InputError, match="write paths with / or doubled backslashes, or in single quotes"):
        parsed(*REQUIRED, written('output_dir = "C:\\Users\\me"'))
    assert parsed(REQUIRED[0], written("output_dir = 'C:\\Users\\me'")).output_dir == Path("C:\\Users\\me")
    for key in ("output_dir", "pretrained_model_name_or_path", "train_data_dir", "vae", "resume"):
        with pytest.raises(InputError, match=rf"{key} .*has a tab or line break in it.*single quotes"):
            parsed(*REQUIRED, written(f'{key} = "D:\\train\\new"'))
