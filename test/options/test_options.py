"""The command line of sdxl_pretrain.py: the reference's names and defaults, clear errors."""

import pytest

import sdxl_pretrain

REQUIRED = ["--pretrained_model_name_or_path=m", "--train_data_dir=d", "--resolution=64", "--output_dir=o"]


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


def test_the_older_spellings_of_optimizers_are_their_types_and_exclude_each_other(capsys):
    assert parse("--use_8bit_adam").optimizer.optimizer_type == "AdamW8bit"
    assert parse("--use_lion_optimizer").optimizer.optimizer_type == "Lion"
    assert parse().optimizer.optimizer_type == "AdamW"
    with pytest.raises(SystemExit):
        parse("--use_8bit_adam", "--optimizer_type=AdaFactor")
    assert "--optimizer_type: not allowed with argument --use_8bit_adam" in capsys.readouterr().err


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
            r"--resolutoin=64 --sead=1 --xyz: .*mean --resolution by --resolutoin\? .*mean --seed by --sead\?$",
        ),
        (["--sdp"], r"unrecognized arguments: --sdp: this script does not take it; (?!did you mean --sdpa)"),
        (["--network_module=networks.lora"], "unrecognized arguments: --network_module"),
        (["--resolution=64x64"], "--resolution.*width,height"),
        (["--resolution=0,64"], "--resolution.*width,height"),
        (["--train_batch_size=0"], "--train_batch_size.*at least 1"),
        (["--learning_rate=-1"], "--learning_rate.*at least 0"),
        (["--learning_rate=nan"], "--learning_rate.*at least 0"),
        (["--caption_dropout_rate=1.5"], "--caption_dropout_rate: must be a number from 0 to 1, got '1.5'"),
        (["--caption_separator="], "--caption_separator.*not be empty"),
        (["--token_warmup_step=-1"], "--token_warmup_step.*at least 0"),
        (["--max_token_length=100"], "--max_token_length: must be one of 77, 150, 225, 512, got '100'"),
        (["--face_crop_aug_range=3,2"], "--face_crop_aug_range.*smaller one first"),
        (["--face_crop_aug_range=3"], "--face_crop_aug_range.*LEAST,MOST"),
        (["--resize_interpolation=sharp"], "--resize_interpolation: must be one of lanczos, .*got 'sharp'"),
        (["--seed=-1"], "--seed: must be a whole number of at least 0"),
        ([f"--seed={2**64}"], r"--seed: must be a whole number of at least 0 and less than 2\*\*64"),
        (["--output_name=a/b"], "--output_name.*without '/'"),
        (["--max_train_steps=many"], "--max_train_steps: must be a whole number of at least 1, got 'many'"),
        (["--full_fp16", "--mixed_precision=fp16"], "Use --mixed_precision=fp16, which keeps fp32 weights"),
        (["--case_name=c/d"], "--case_name.*without '/'"),
    ],
)
def test_a_bad_argument_is_named_and_ends_with_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*arguments)
    assert stopped.value.code == 2
    import re

    assert re.search(message, capsys.readouterr().err)


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        sdxl_pretrain.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for shown_default in ("(2e-06)", "(1600)", "(.caption)", "(ddim)", "--enable_npu_flash_attention"):
        assert shown_default in shown
