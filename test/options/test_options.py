"""The command line of sdxl_pretrain.py: the reference's names and defaults, clear errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sdxl_pretrain
from library.errors import InputError
from library.options.rules import log_idle_flags

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = ["--pretrained_model_name_or_path=owner/model", "--train_data_dir=d", "--resolution=64", "--output_dir=o"]


def parse(*arguments):
    return sdxl_pretrain.SCRIPT.options([*REQUIRED, *arguments])


def test_defaults_are_the_references():
    options = parse()
    (subset,), optimizer, data = options.data.subsets, options.optimizer, options.data
    assert (subset.min_bucket_reso, subset.max_bucket_reso, subset.bucket_reso_steps) == (256, 1024, 64)
    assert (optimizer.learning_rate, optimizer.max_grad_norm, optimizer.lr_scheduler) == (2e-6, 1.0, "constant")
    assert (options.run.max_train_steps, data.train_batch_size, data.max_data_loader_n_workers) == (1600, 1, 8)
    assert (subset.caption_extension, options.precision.mixed_precision) == (".caption", "no")
    assert options.preview.sample_sampler == "ddim"


def test_the_older_spellings_of_optimizers_are_their_types_and_exclude_each_other():
    assert parse("--use_8bit_adam").optimizer.optimizer_type == "AdamW8bit"
    assert parse("--use_lion_optimizer").optimizer.optimizer_type == "Lion"
    assert parse().optimizer.optimizer_type == "AdamW"
    with pytest.raises(InputError, match="--optimizer_type and --use_8bit_adam give --optimizer_type two values"):
        parse("--use_8bit_adam", "--optimizer_type=AdaFactor")
    assert parse("--use_8bit_adam", "--optimizer_type=AdamW8bit").optimizer.optimizer_type == "AdamW8bit"


def test_every_flag_of_the_mission_is_taken_and_lands_in_an_option_group(tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat")
    options = parse(
        "--max_train_epoch=3", "--vae=v", "--tokenizer1_path=a", "--tokenizer2_path=b", "--enable_bucket",
        "--bucket_no_upscale", "--output_name=n", "--save_every_n_epochs=2", "--save_every_n_steps=5",
        "--save_precision=float",
        "--save_model_as=ckpt", "--logging_dir=l", "--gradient_checkpointing", "--gradient_accumulation_steps=2",
        "--train_text_encoder", "--learning_rate_te1=1e-7", "--learning_rate_te2=1e-7", "--lr_warmup_steps=4",
        "--lr_scheduler=cosine_with_restarts", "--lr_scheduler_num_cycles=2", "--lr_scheduler_power=2", "--seed=1",
        "--shuffle_caption", "--keep_tokens=1", "--optimizer_type=oss", "--max_token_length=512",
        "--enable_npu_flash_attention", "--no_half_vae", f"--sample_prompts={prompts}", "--sample_every_n_steps=7",
        "--sample_every_n_epochs=1", "--sample_at_first", "--dry_run",
    )  # fmt: skip
    assert options.run.max_train_epochs == 3
    assert options.model.max_token_length == 512
    assert options.data.resolution == (64, 64)
    assert options.text_encoders.learning_rate_te2 == 1e-7
    assert options.saving.save_model_as == "ckpt"
    assert options.preview.sample_at_first


def test_resolution_is_width_then_height():
    assert parse("--resolution=1024,768").data.resolution == (1024, 768)


def test_an_extension_without_its_dot_gets_one():
    assert parse("--caption_extension=txt").data.subsets[0].caption_extension == ".txt"
    assert parse("--caption_extention=txt").data.subsets[0].caption_extension == ".txt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resolutoin=64"], "--resolutoin.*did you mean --resolution"),
        (["--resolut=64"], "unrecognized arguments"),
        (
            ["--resolutoin=64", "--sead=1", "--xyz"],
            r"--resolutoin=64: .*mean --resolution\?\n.*--sead=1: .*mean --seed\?\n.*--xyz: .*--help lists the flags$",
        ),
        (["--sdp"], r"unrecognized arguments: --sdp: this script does not take it; (?!did you mean --sdpa)"),
        (["--network_module=networks.lora"], "--network_module is not supported: .*no network"),
        (["words", "--seed=1"], "--output_dir takes one value, and --output_dir=o words has 2"),
        (["--seed=1", "2"], "--seed takes one value, and --seed=1 2 has 2"),
        (["--seed"], "--seed needs a value: --seed=N"),
        (["--enable_bucket=yes"], "--enable_bucket=yes: --enable_bucket is a switch"),
        (["--resolution=64x64"], "--resolution.*width,height"),
        (["--resolution=0,64"], "--resolution.*width,height"),
        (["--train_batch_size=0"], "--train_batch_size.*at least 1"),
        (["--learning_rate=-1"], "--learning_rate.*at least 0"),
        (["--learning_rate=nan"], "--learning_rate.*at least 0"),
        (["--caption_dropout_rate=1.5"], "--caption_dropout_rate must be a number from 0 to 1, got '1.5'"),
        (["--caption_separator="], "--caption_separator.*not be empty"),
        (["--caption_extension="], r"--caption_extension.*must be one file extension, such as \.txt"),
        (["--caption_extension=*.txt"], r"--caption_extension.*must be one file extension"),
        (["--caption_extension=txt,caption"], r"--caption_extension.*must be one file extension"),
        (["--token_warmup_step=-1"], "--token_warmup_step.*at least 0"),
        (["--max_token_length=100"], "--max_token_length must be one of 75, 77, 150, 225, 512, got '100'"),
        (["--face_crop_aug_range=3,2"], "--face_crop_aug_range.*smaller one first"),
        (["--face_crop_aug_range=3"], "--face_crop_aug_range.*LEAST,MOST"),
        (["--resize_interpolation=sharp"], "--resize_interpolation must be one of lanczos, .*got 'sharp'"),
        (["--seed=-1"], "--seed must be a whole number of at least 0"),
        ([f"--seed={2**64}"], r"--seed must be a whole number of at least 0 and less than 2\*\*64"),
        (["--output_name=a/b"], "--output_name.*without '/'"),
        *(
            (["--output_name=" + name], "--output_name.*without line breaks")
            for name in (" ", "a\r", "a\nb", "a\x1b[1mb")
        ),
        (["--max_train_steps=many"], "--max_train_steps must be a whole number of at least 1, got 'many'"),
        (["--full_fp16", "--mixed_precision=fp16"], "Use --mixed_precision=fp16, which keeps fp32 weights"),
        (["--dataset_repeats=99999999999999999999"], r"--dataset_repeats.*less than"),
        (["--case_name=c/d"], "--case_name.*without '/'"),
    ],
)
def test_a_bad_argument_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        parse(*arguments)


def test_help_shows_every_default(capsys):
    assert sdxl_pretrain.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for shown_default in ("(2e-06)", "(1600)", "(.caption)", "(ddim)", "--enable_npu_flash_attention"):
        assert shown_default in shown


@pytest.mark.parametrize(
    ("given", "steps"), [("0", 0), ("0.1", 20), ("0.0", 0), ("1", 1), ("30", 30), ("30.0", 30), ("0.999", 199)]
)
def test_a_warm_up_below_one_is_a_share_of_the_run(given, steps):
    assert parse(f"--lr_warmup_steps={given}").optimizer.warmup_steps(200) == steps


@pytest.mark.parametrize("given", ["-1", "1.5", "nan", "inf", "some"])
def test_a_warm_up_of_no_number_of_steps_is_refused(given):
    with pytest.raises(InputError, match="--lr_warmup_steps must be a whole number of steps, or a share of the run"):
        parse(f"--lr_warmup_steps={given}")


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        (["--max_bucket_reso=2048"], "--max_bucket_reso does nothing without --enable_bucket"),
        (
            ["--keep_tokens=2"],
            "--keep_tokens does nothing without --shuffle_caption, --token_warmup_step, or --caption_",
        ),
        (["--lr_scheduler=linear", "--lr_scheduler_num_cycles=3"], "without --lr_scheduler=cosine_with_restarts"),
        (["--sample_sampler=euler"], "--sample_sampler=euler does nothing without --sample_prompts"),
        (["--prior_loss_weight=0.5"], "--prior_loss_weight does nothing without --reg_data_dir or --dataset_config"),
        (["--no_half_vae"], "--no_half_vae does nothing without --mixed_precision=fp16 or --mixed_precision=bf16"),
        (["--max_bucket_reso=2048", "--enable_bucket", "--keep_tokens=2", "--shuffle_caption"], None),
        (["--max_bucket_reso=1024", "--keep_tokens=0", "--lr_scheduler_power=1"], None),
    ],
)
def test_a_flag_that_does_nothing_is_said_in_the_log(caplog, given, instead):
    """sd-scripts takes such a flag, and so do command lines that users have."""
    log_idle_flags(sdxl_pretrain.SCRIPT.flags, parse(*given))
    assert [instead in record.message for record in caplog.records] == ([True] if instead else [])


def test_words_before_the_first_flag_are_named():
    with pytest.raises(InputError, match="unrecognized arguments: some words: values stand behind their flag"):
        sdxl_pretrain.SCRIPT.options(["some", "words", *REQUIRED])


class TestOneReport:
    """All that is wrong with the flags, the files that they name, and the rules between them, is said at once."""

    @pytest.fixture
    def files(self, tmp_path):
        (tmp_path / "run.toml").write_text("sample_at_first = true\nxformers = true\nuse_emma = true\nseed = -1\n")
        (tmp_path / "data.toml").write_text(
            "generals = 1\n[general]\nkeep_token = 1\n[[datasets]]\nbatch_sizes = 2\nresolution = 0\n"
            "[[datasets.subsets]]\nnum_repeats = 0\nshuffle_captions = true\n[[datasets.subsets]]\nimage_dir = 'a'\n"
            "[[datasets]]\nresolution = 64\nenable_bucket = 1\n"
        )
        (tmp_path / "prompts.txt").write_text("a --x 1\nb --w wide\n")
        return tmp_path

    def test_it_names_everything(self, files, capsys):
        status = sdxl_pretrain.main(
            ["--pretrained_model_name_or_path=owner/model", f"--config_file={files / 'run'}", "--resolutoin=64",
             "--lr_warmup_steps=9",
             f"--dataset_config={files / 'data.toml'}", f"--sample_prompts={files / 'prompts.txt'}", "--fp8_base",
             "--offload_ema", "--learning_rate_te1=1e-5", "--train_batch_size=none", "--save_last_n_steps=3"]
        )  # fmt: skip
        said = capsys.readouterr().err.splitlines()
        expected = [
            "--resolutoin=64: this script does not take it; did you mean --resolution?", "--fp8_base is not supported",
            "--train_batch_size must be a whole number", "xformers is not supported",
            "use_emma is no flag of sdxl_pretrain.py; did you mean use_ema?", "seed must be a whole number",
            "--output_dir is missing", "generals in the file is not known. Did you mean general?",
            "keep_token in [general] is not known. Did you mean keep_tokens?", "batch_sizes in [[datasets]] 1",
            "resolution in [[datasets]] 1 must be", "num_repeats in [[datasets.subsets]] 1 of [[datasets]] 1 must be",
            "shuffle_captions in [[datasets.subsets]] 1", "1 of [[datasets]] 1 lacks image_dir",
            "enable_bucket in [[datasets]] 2 must be true or false", "there are no subsets of [[datasets]] 2",
            "prompts.txt:1: option --x", "prompts.txt:2: --w takes", "--lr_warmup_steps=9 has no effect",
            "--learning_rate_te1=1e-05 trains nothing", "--save_last_n_steps has nothing to act on",
        ]  # fmt: skip
        assert status == 2 and all(line.startswith("error: ") for line in said)
        assert [line for line in said if not any(each in line for each in expected)] == []
        assert [each for each in expected if not any(each in line for line in said)] == []

    def test_buckets_that_contradict_each_other_are_in_it(self, capsys):
        words = [
            "--resolution=512",
            "--enable_bucket",
            "--min_bucket_reso=500",
            "--max_bucket_reso=100",
            "--offload_ema",
        ]
        assert sdxl_pretrain.main([*REQUIRED, *words, "--offload_ema"]) == 2
        said = capsys.readouterr().err
        for problem in (
            "--min_bucket_reso 500 must be a multiple", "--max_bucket_reso 100 must be a multiple",
            "--max_bucket_reso 100 is less than the longer side", "--offload_ema has nothing to act on",
        ):  # fmt: skip
            assert problem in said

    def test_what_only_follows_from_another_error_is_not_in_it(self, files, capsys):
        """--offload_ema has something to act on once --use_ema is spelt right."""
        sdxl_pretrain.main([*REQUIRED, "--use_emma", "--offload_ema", "--max_train_steps=x", "--lr_warmup_steps=2000"])
        said = capsys.readouterr().err
        assert "did you mean --use_ema?" in said and "--offload_ema has nothing" not in said
        assert "is longer than the run" not in said

    def test_every_path_that_is_not_there_is_in_it_before_torch_is_imported(self, tmp_path):
        (tmp_path / "file").touch()
        (tmp_path / "gone").symlink_to(tmp_path / "disk")
        (tmp_path / "data.toml").write_text(
            "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'gone'\nmetadata_file = 'none.json'\n"
            "[[datasets.subsets]]\nimage_dir = 'file/a/b'\n"
        )
        code = (
            "import sys, sdxl_pretrain\n"
            "common = ['--pretrained_model_name_or_path=owner/model', '--output_dir=file', '--logging_dir=file']\n"
            "common += ['--resume=file']\n"
            "line = ['--resolution=64', '--train_data_dir=a/b/c', '--reg_data_dir=data', '--in_json=x.json']\n"
            "for words in (line, ['--dataset_config=data.toml']):\n"
            "    assert sdxl_pretrain.main([*common, *words]) == 2\n"
            "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        common = [
            "--output_dir file: is there and is no folder; name another",
            "--resume file: is a file; --resume takes the folder of a training state, or auto",
            "--logging_dir file: is there and is no folder; name another",
        ]
        missing = f"there is no such file or folder; of the path {tmp_path}"
        assert sorted(done.stderr.splitlines()) == sorted(
            f"error: {line}" for line in [
                *common, f"--train_data_dir a/b/c: {missing} is there", f"--reg_data_dir data: {missing} is there",
                "--in_json x.json: there is no such file",
                *common, f"data.toml: image_dir gone: is a link to {tmp_path / 'disk'}, which is not there",
                "data.toml: metadata_file none.json: there is no such file",
                f"data.toml: image_dir file/a/b: {missing}/file is there",
            ]
        )  # fmt: skip
