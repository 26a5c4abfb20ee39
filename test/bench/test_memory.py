"""The table of configurations: the estimator sees what each flag saves."""

import copy
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCH))
    spec = importlib.util.spec_from_file_location("bench_memory", BENCH / "memory.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    sys.path.remove(str(BENCH))
    return module


def test_each_flag_of_the_table_saves_memory(bench, sdxl):
    plain = bench.Configuration(512, "bf16", checkpointing=False)
    small = [
        replace(plain, checkpointing=True),
        replace(plain, optimizer="AdaFactor", arguments=bench.ADAFACTOR),
        replace(plain, fused=True),
        replace(plain, sharding="fsdp", processes=8),
        replace(plain, update="kahan", fused=True),
        replace(plain, swap=6),
    ]
    sdxl = copy.deepcopy(sdxl)  # other tests train its text encoders, which are frozen here
    whole = bench.predict(sdxl, plain)

    def held(predicted):  # a tiny model's VAE takes more than its U-Net
        return predicted.weights + predicted.optimizer + predicted.backward

    for one in small:
        assert held(bench.predict(sdxl, one)) < held(whole), one.name
    assert bench.row(plain, whole).startswith("| 512 px, bf16: AdamW | 0.")
    assert len({one.name for one in bench.configurations()}) == len(bench.configurations())
