"""The figures of docs/scaling.md: formulas by hand and against the libraries, FLOPs against diffusers, the document
against the scripts, and the counted bytes of real processes against the formulas.
"""

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "scaling.md"


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses, and the other benchmark, look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scaling():
    return load("scaling")


@pytest.fixture(scope="module")
def model(scaling):
    return scaling.sdxl()


@pytest.fixture(scope="module")
def step_flops(scaling, model):
    return scaling.step_flops(model)


# Formulas, worked by hand


@pytest.fixture
def trained(scaling):
    """12 elements in three parameters; FSDP2 gathers the first two as one, the last is the root's."""
    return scaling.Trained(numels=(3, 5, 4), groups=(8, 4))


def by_kind(calls):
    return sorted((call.kind, call.bytes) for call in calls)


def test_collectives_of_a_small_case(scaling, trained):
    assert by_kind(scaling.collectives("ddp", trained, 2)) == [("all_reduce", 48)]
    # OSS on 2 ranks: 3 to rank 0, 5 to rank 1, 4 to rank 0, which then has the fewest.
    both = [("broadcast", 20), ("broadcast", 28), ("reduce", 20), ("reduce", 28)]
    assert by_kind(scaling.collectives("oss", trained, 2)) == both
    # torch's deals out the largest first: 5 to rank 0, 4 to rank 1, 3 to rank 1.
    assert by_kind(scaling.collectives("zero1", trained, 2)) == [
        ("all_reduce", 48), ("broadcast", 20), ("broadcast", 28)
    ]  # fmt: skip
    assert by_kind(scaling.collectives("fsdp", trained, 2)) == [
        ("all_gather", 16), ("all_gather", 32), ("all_gather", 32), ("reduce_scatter", 16), ("reduce_scatter", 32)
    ]  # fmt: skip
    half = scaling.collectives("fsdp", trained, 2, gathered_bytes=2)
    assert sum(call.bytes for call in half if call.kind == "all_gather") == 40


def test_bytes_time_and_memory_of_a_small_case(scaling, trained, monkeypatch):
    # 4 ranks, 48 bytes of gradients: an all-reduce sends 2 · 3/4 · 48 a rank, a reduce and a broadcast as much.
    assert scaling.sent(scaling.collectives("ddp", trained, 4), 4) == 72
    assert scaling.sent(scaling.collectives("oss", trained, 4), 4) == 72
    # 16 devices are two nodes of 8: inside 2 · 7/8 · S, between nodes an eighth each, 2 · 1/2 · S/8.
    links = scaling.Links("", inside=1e-9, between=1e-9, latency_inside=1e6, latency_between=1e7)  # 1 byte, 1 s, 10 s
    found = scaling.seconds([scaling.Collective("all_reduce", 80)], 16, links)
    assert found.bandwidth == found.one_root == pytest.approx(140 + 10)
    assert found.latency == pytest.approx(2 * (3 * 1 + 1 * 10)) and found.bound == "bandwidth"
    # A reduce goes once, and between the nodes all of it by the root's NIC if it is not spread.
    found = scaling.seconds([scaling.Collective("reduce", 80)], 16, links)
    assert (found.bandwidth, found.one_root) == (pytest.approx(70 + 5), pytest.approx(70 + 40))
    assert scaling.seconds([scaling.Collective("reduce", 1)] * 100, 16, links).bound == "latency"

    assert scaling.state_bytes("ddp", trained, 2) == {"weights": 48, "gradients": 48, "moments": 96}
    assert scaling.state_bytes("oss", trained, 2) == {"weights": 48, "gradients": 48, "moments": 8 * 7}
    monkeypatch.setattr(scaling, "BUCKET_ELEMENTS", 4)  # 3 goes in rank 0's bucket; 4 and 5 are reduced alone
    assert scaling.state_bytes("oss", trained, 2)["gradients"] == 4 * (3 + 5)
    assert scaling.state_bytes("fsdp", trained, 2) == {"weights": 24, "gradients": 24, "moments": 48}


def test_utilisation_of_a_small_case(scaling):
    reached, share = scaling.utilisation(images_per_second=16, devices=8, flops_per_image=25e12, peak_tflops=100)
    assert (reached, share) == (50, 0.5)


# Against what we did not write


@pytest.fixture
def four_pretended_ranks():
    """A process group of 4 ranks in one process, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def test_shards_and_buckets_are_the_libraries(scaling, four_pretended_ranks, monkeypatch):
    from fairscale.nn.data_parallel import ShardedDataParallel
    from fairscale.optim import OSS
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.manual_seed(0)
    widths = torch.randint(1, 60, (24,)).tolist()
    module = nn.Sequential(*(nn.Linear(one, other) for one, other in itertools.pairwise(widths)))
    trained = scaling.Trained(tuple(parameter.numel() for parameter in module.parameters()), ())
    zero1 = ZeroRedundancyOptimizer(module.parameters(), torch.optim.AdamW)
    oss = OSS(module.parameters(), torch.optim.AdamW)
    for method, optimizer in (("zero1", zero1), ("oss", oss)):
        parts = optimizer._partition_parameters() if method == "zero1" else optimizer.partition_parameters()
        theirs = [sum(p.numel() for group in part for p in group["params"]) for part in parts]
        assert scaling.optimizer_shards(method, trained, 4) == theirs

    monkeypatch.setattr(scaling, "BUCKET_ELEMENTS", 1500)
    sharded = ShardedDataParallel(module, oss, reduce_buffer_size=1500)
    sharded.refresh_trainable()
    buckets = [bucket.buffer.numel() for bucket in sharded._bucket_list]
    alone = [
        parameter.numel()
        for parameter, bucketed in zip(sharded._trainable_params, sharded._should_bucket_grad, strict=True)
        if not bucketed
    ]
    assert len(alone) > 2
    reduces = [call.bytes // 4 for call in scaling.collectives("oss", trained, 4) if call.kind == "reduce"]
    assert sorted(reduces) == sorted(buckets + alone)


def test_parameters_are_sdxls(model):
    parts = model.unet, model.text_encoders[0], model.text_encoders[1]
    counts = [sum(parameter.numel() for parameter in part.parameters()) for part in parts]
    assert counts == [2_567_463_684, 123_060_480, 694_659_840]  # Podell et al. 2023 and the published files
    assert sum(parameter.numel() for parameter in model.vae.parameters()) == 83_653_863


def test_the_unets_flops_are_diffusers(scaling, model, step_flops):
    from diffusers import UNet2DConditionModel

    from library.models.files.diffusers_config import unet_config_to_diffusers

    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(unet_config_to_diffusers(model.unet.config))
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        inputs = torch.empty(1, 4, 128, 128), torch.empty(1), torch.empty(1, 77, 2048)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        theirs(*inputs, added_cond_kwargs=added)
    assert step_flops.unet_forward == counter.get_total_flops()
    # Its attention by hand: 4 · queries · keys · channels a layer; 10 layers of 640 channels, 60 of 1280.
    by_hand = sum(
        layers * 4 * queries * keys * channels
        for layers, queries, channels in ((10, 64 * 64, 640), (60, 32 * 32, 1280))
        for keys in (queries, 77)
    )
    products = counter.get_flop_counts()["Global"]
    assert products[torch.ops.aten.bmm] == by_hand


def test_backward_is_twice_forward_and_checkpointing_nearly_one_more(step_flops):
    forward = step_flops.unet_forward + step_flops.text_forward
    assert step_flops.model - step_flops.vae_encoding == pytest.approx(3 * forward, rel=0.005)
    assert 0.7 * forward < step_flops.run - step_flops.model < forward


# The document


def test_the_documents_tables_are_the_scripts(scaling, model, step_flops):
    document = DOCUMENT.read_text(encoding="utf-8")
    assert scaling.with_tables(document, scaling.tables(model, step_flops)) == document, (
        "run python bench/scaling.py --write docs/scaling.md"
    )


def test_a_document_without_a_place_for_a_table_is_an_error(scaling):
    with pytest.raises(ValueError, match="0 places for the table 'flops'"):
        scaling.with_tables("<!-- other -->\n<!-- end -->", {"flops": "| |"})


# Real processes


@pytest.fixture(scope="module")
def measured(scaling):
    """bench/collectives.py on 2 processes: its tables and its JSON line."""
    command = [sys.executable, str(ROOT / "bench" / "collectives.py"), "--processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    *lines, last = done.stdout.splitlines()
    return lines, json.loads(last)["results"][0]


def test_real_steps_move_what_the_formulas_say(scaling, measured):
    collectives = load("collectives")
    _, result = measured
    sizes = collectives.trained()
    for method in scaling.METHODS:
        calls, seen = scaling.collectives(method, sizes, 2), result["methods"][method]
        assert seen["payload"] == collectives.totals(calls), method
        assert sum(seen["calls"].values()) == len(calls), method
        held = [2 * 4 * size for size in scaling.optimizer_shards(method, sizes, 2)]
        assert seen["moments"] == pytest.approx(held, rel=1e-3), method
    if result["own_loopback"]:  # the kernel's count: DDP all-reduces with the best algorithm, in gloo, too
        for method, seen in result["methods"].items():
            assert seen["loopback"] == pytest.approx(seen["predicted"], rel=0.05), method
        ddp = 2 * scaling.sent(scaling.collectives("ddp", sizes, 2), 2)
        assert result["methods"]["ddp"]["loopback"] == pytest.approx(ddp, rel=0.05)


def test_the_documents_measured_steps_have_the_formulas_of_now(measured):
    """Name, formula, counted and the best algorithm's bytes; gloo's and the kernel's are measurements."""
    lines, _ = measured
    now = [line.split(" | ")[:5] for line in lines if line.startswith("| 2 | ") and " in " in line]
    written = [line.split(" | ")[:5] for line in DOCUMENT.read_text(encoding="utf-8").splitlines()]
    assert len(now) == 4 and all(row in written for row in now)
