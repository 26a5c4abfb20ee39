"""The benchmark of the full size, at a tiny one: it trains by the trainer and finds its checkpoint as it should be."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

PATH = Path(__file__).resolve().parents[2] / "bench" / "full_size.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_full_size", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_trains_and_saves_by_the_trainer_and_says_what_that_took(bench, tmp_path, capsys):
    AcceleratorState._reset_state(reset_partial_state=True)
    bench.main(["--size=tiny", "--resolution=64", "--steps=1", f"--out={tmp_path}"])
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(printed[-1])
    assert set(result["peak_gb"]) == {"weights made", "step 1", "checkpoint"}
    assert result["losses"][0] > 0 and result["step_seconds"][0] > 0
    assert result["checkpoint_gb"] * 1e9 > 4 * result["all_parameters"]
    assert any(line.startswith("peak resident memory, checkpoint") for line in printed)
    assert not list(tmp_path.iterdir())


def test_the_full_size_is_sdxls(bench):
    with torch.device("meta"):
        unet = bench.UNet(bench.SIZES["full"]["unet"])
    assert sum(parameter.numel() for parameter in unet.parameters()) == bench.UNET_PARAMETERS


def test_a_checkpoint_that_differs_is_noticed(bench, tmp_path):
    from library.families import SDXL
    from library.models.model import Model
    from library.tensor_file import tensor_file

    torch.manual_seed(0)
    unet = bench.materialised(lambda: bench.UNet(bench.TINY))
    start, content = tensor_file({f"model.diffusion_model.{name}": t for name, t in unet.state_dict().items()}, {})
    (tmp_path / "x.safetensors").write_bytes(start + b"".join(content))
    model = Model(SDXL, unet, None, (), (), {})
    assert bench.differing_tensors(tmp_path / "x.safetensors", model) == []
    unet.out[2].bias.data += 1
    assert bench.differing_tensors(tmp_path / "x.safetensors", model) == ["out.2.bias"]
