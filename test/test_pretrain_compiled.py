"""sdxl_pretrain.py with --torch_compile: training, files and states of a run without, and a clear no where it must."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import sdxl_pretrain
from library.errors import InputError
from library.options.compiling import DYNAMO_BACKENDS
from library.training.engine.compiling import check_backend
from library.training.rules import check_compiling
from test.models.small_sdxl import save_with_small_unet

STEPS = 4
STATE = "at-step00000002-state"


@pytest.fixture(scope="module")
def model_folder(sdxl, tmp_path_factory):
    """The tiny model with a U-Net of three kinds of blocks alone: every kind takes seconds to trace."""
    folder = tmp_path_factory.mktemp("model") / "sdxl"
    return save_with_small_unet(sdxl, folder, side_px=64, model_channels=64, channel_mult=(1, 1))


@pytest.fixture(scope="module")
def train(model_folder, small_shard, tmp_path_factory):
    """Runs the script on pictures of two aspect ratios; returns the exit status and the output folder."""
    root = tmp_path_factory.mktemp("compiled")

    def run(out, *arguments):
        AcceleratorState._reset_state(reset_partial_state=True)
        status = sdxl_pretrain.main(
            [
                f"--pretrained_model_name_or_path={model_folder}", f"--train_data_dir={small_shard}",
                "--resolution=64", "--enable_bucket", "--min_bucket_reso=32", "--max_bucket_reso=128",
                "--bucket_reso_steps=16", "--caption_extension=.txt", f"--output_dir={root / out}", "--seed=1",
                "--train_batch_size=2", f"--max_train_steps={STEPS}", "--learning_rate=1e-3", "--optimizer_args",
                "eps=1e-3", "--save_model_as=safetensors", "--max_data_loader_n_workers=0", *arguments,
            ]
        )  # fmt: skip
        return status, root / out

    return run


def lines(folder, name):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in found if name in line]


def assert_the_same_run(folder, other, files=("last.safetensors",)):
    """The optimizer's epsilon is large, so that a step follows the gradient and not the sign of its rounding."""
    for name in ("loss", "grad_norm"):
        assert lines(folder, name)[-2:] == pytest.approx(lines(other, name)[-2:], rel=1e-4)
    for file in files:
        mine, theirs = load_file(folder / file), load_file(other / file)
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=2e-5, msg=f"{file}: {key}")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red photo --w 48 --h 64 --s 1 --l 3\n")
    return f"--sample_prompts={path}"


@pytest.fixture(scope="module")
def both(train, prompts):
    """Two runs with all that holds on to weights, one of them compiled; and what that printed."""
    common = (
        "--gradient_checkpointing", "--use_ema", "--validation_split=0.2", "--validate_every_n_steps=2", prompts,
        "--sample_every_n_steps=2", "--save_state_every_n_steps=2", "--save_last_n_steps_state=99",
    )  # fmt: skip
    plain = train("plain", *common)
    compiled = train("compiled", *common, "--torch_compile", "--dynamo_backend=aot_eager")
    assert plain[0] == compiled[0] == 0
    return common, plain[1], compiled[1]


def test_a_compiled_run_is_the_plain_run(both):
    _, plain, compiled = both
    assert lines(compiled, "loss") == pytest.approx(lines(plain, "loss"), rel=1e-4)
    validations = [lines(folder, "loss/validation/step_average") for folder in (compiled, plain)]
    assert len(validations[0]) == 2 and validations[0] == pytest.approx(validations[1], rel=1e-4)
    assert_the_same_run(compiled, plain, ("last.safetensors", "last-ema.safetensors"))
    assert len(list((compiled / "sample").glob("*.png"))) == len(list((plain / "sample").glob("*.png"))) == 2


@pytest.mark.parametrize("compile_again", [True, pytest.param(False, marks=pytest.mark.all)])
def test_a_state_goes_on_with_and_without(train, both, compile_again):
    common, plain, compiled = both
    flags = ("--torch_compile", "--dynamo_backend=eager") if compile_again else ()
    status, out = train(f"resumed{compile_again}", *common, *flags, f"--resume={compiled / STATE}")
    assert status == 0
    assert_the_same_run(out, plain)
    one, other = (load_file(folder / STATE / "rank00000-of-00001.training.safetensors") for folder in (compiled, plain))
    assert one.keys() == other.keys()


@pytest.mark.all
def test_updates_in_backward_are_those_of_the_plain_run(train, capfd):
    found = []
    for out, flags in (("fused", ()), ("fused-compiled", ("--torch_compile", "--dynamo_backend=eager"))):
        status, folder = train(out, "--fused_backward_pass", "--train_text_encoder", *flags)
        assert status == 0
        found.append(folder)
    assert_the_same_run(*found)
    printed = capfd.readouterr().err
    (line,) = [line for line in printed.splitlines() if "graphs compiled" in line]
    assert re.search(r"12 blocks of the U-Net as 3 programs by eager, \d+ graphs compiled, 0 graph breaks", line)


def test_a_dry_run_says_what_would_be_compiled(train, capfd):
    status, _ = train("dry", "--dry_run", "--torch_compile", "--dynamo_backend=eager")
    printed = capfd.readouterr().err
    assert status == 0, printed
    assert "torch.compile: 12 blocks of the U-Net as 3 programs by eager" in printed
    assert "estimated device memory of a step" in printed and "running training" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dynamo_backend=eager"], "--dynamo_backend=eager has nothing to act on without --torch_compile"),
        (["--torch_compile", "--dynamo_backend=cudagraphs"], "--dynamo_backend=cudagraphs needs an NVIDIA GPU"),
        (["--torch_compile", "--dynamo_backend=fx2trt"], "has no backend of that name, and no package brings one"),
        (
            ["--torch_compile", "--dynamo_backend=tvm"],
            "--dynamo_backend=tvm cannot be used here",
        ),
    ],
)
def test_what_cannot_compile_ends_before_anything_is_loaded(train, capfd, arguments, message):
    status, _ = train("refused", *arguments)
    printed = capfd.readouterr().err
    error = next(line for line in printed.splitlines() if line.startswith("error: "))
    assert status == 2 and message in error
    assert "Traceback" not in printed and "seed:" not in printed


@pytest.mark.parametrize("backend", DYNAMO_BACKENDS)
def test_on_ascend_what_makes_code_is_refused(backend):
    run, ascend = SimpleNamespace(torch_compile=True, dynamo_backend=backend), SimpleNamespace(type="npu")
    if backend in ("eager", "aot_eager"):
        check_compiling(run, ascend)
        return
    with pytest.raises(InputError, match=f"--dynamo_backend={backend} makes no code for Ascend.*--dynamo_backend=aot_"):
        check_compiling(run, ascend)


def test_inductor_without_a_compiler_says_what_to_install(train, capfd, monkeypatch):
    from torch._inductor import config, cpp_builder

    monkeypatch.setattr(config.cpp, "cxx", ("/no/such/g++",))
    cpp_builder.cpp_compiler_search.cache_clear()
    try:
        status, _ = train("refused", "--torch_compile")
    finally:
        cpp_builder.cpp_compiler_search.cache_clear()
    error = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))
    assert status == 2
    assert "install g++" in error and "--dynamo_backend=aot_eager or eager" in error


def test_a_backend_that_is_wrong_or_for_inference_is_refused():
    cpu = torch.device("cpu")
    known = torch.compiler.list_backends

    def wrong(graph, inputs):
        return lambda *given: [one * 1.01 for one in graph(*given)]

    def inference(graph, inputs):
        return lambda *given: [one.detach() for one in graph(*given)]

    from torch._dynamo import register_backend

    register_backend(wrong, name="wrong_for_this_test")
    register_backend(inference, name="inference_for_this_test")
    assert "wrong_for_this_test" in known(exclude_tags=())
    with pytest.raises(InputError, match="gives other outputs or gradients than torch"):
        check_backend("wrong_for_this_test", cpu)
    with pytest.raises(InputError, match="it is for inference alone"):
        check_backend("inference_for_this_test", cpu)
    check_backend("eager", cpu)


@pytest.mark.all
def test_inductor_trains_the_plain_run(train, both):
    common, plain, _ = both
    status, out = train("inductor", *common, "--torch_compile")
    assert status == 0
    assert_the_same_run(out, plain)
