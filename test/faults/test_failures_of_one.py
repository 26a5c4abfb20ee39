"""One process of two fails: both end within seconds, and both say why."""

import errno
import platform
import time
from pathlib import Path

import pytest

from test.faults.figures import write_section
from test.faults.runs import assert_undisturbed, states

TASK = "library.training.task:Task"
AVERAGES = ("--use_ema", "--ema_decay=0.5")
CHECKPOINTS = ("--save_every_n_steps=2",)
WITHIN_S = 25.0  # of what one process needs to fail by itself, on a machine that others share

# What fails, in which process, at which call, with which number of the system's (0: an error that nobody expects).
QUICK = {
    "a checkpoint of averages, zero1": (
        f"{TASK}.save",
        0,
        2,
        errno.ENOSPC,
        (*CHECKPOINTS, *AVERAGES, "--sharding=zero1"),
    ),
    "a step": (f"{TASK}.loss", 1, 3, 0, ()),
}
SLOW = {
    "finding the images": ("library.data.dataset:build_index", 1, 1, errno.EIO, ()),
    "loading the model": ("library.training.build:load_model", 1, 1, errno.EIO, ()),
    "the list of bad samples": ("library.training.log.quarantine:Quarantine.add", 1, 2, errno.ENOSPC, ()),
    "copying a state": ("library.training.state.writer:StateWriter._begin", 1, 2, 0, ("--save_state_every_n_steps=1",)),
    "validation": (f"{TASK}.validation_losses", 1, 1, 0, ("--validation_split=0.2", "--validate_every_n_steps=2")),
    "filling a cache": ("library.training.encoders:encode_moments", 0, 1, 0, ("--cache_latents",)),
    "exchanging a cache": ("library.data.cache.entries:MemoryShelf.read", 0, 1, 0, ("--cache_latents",)),
    "a checkpoint of averages, oss": (f"{TASK}.save", 0, 2, 0, (*CHECKPOINTS, *AVERAGES, "--sharding=oss")),
    "gathering the weights, fsdp": (f"{TASK}.save", 0, 1, 0, (*CHECKPOINTS, "--sharding=fsdp")),
    "the last checkpoint": (f"{TASK}.save", 0, 1, errno.EDQUOT, ()),
}


def _both_end(start_two, out: Path, target: str, rank: int, call: int, number: int, flags: tuple[str, ...]) -> float:
    """A run of two of which one fails; returns how many seconds after it the other ended."""
    faults = [[("fail", target, call, number)] if rank == place else [] for place in range(2)]
    ranks = start_two(out, *flags, faults_of=tuple(faults))
    first, other = ranks[rank], ranks[1 - rank]
    assert first.wait() in (1, 2), first.text
    began = time.monotonic()
    assert other.wait() == first.status, other.text
    seconds = time.monotonic() - began
    assert seconds < WITHIN_S
    for one in ranks:
        assert ("planted here" if number == 0 else "planted: ") in one.text, one.text
        assert "NoneType" not in one.text
    assert f"rank {rank} on " in other.text
    assert "Traceback" not in other.text
    return seconds


@pytest.mark.parametrize("place", QUICK)
def test_what_one_process_cannot_do_ends_both_and_both_say_it(start_two, tmp_path, place):
    _both_end(start_two, tmp_path / "out", *QUICK[place])


@pytest.mark.all
def test_so_it_is_wherever_one_process_can_fail(start_two, tmp_path):
    lines = ["| What fails | In | The other ended after |", "|---|---|---|"]
    for number, (place, planted) in enumerate((QUICK | SLOW).items()):
        seconds = _both_end(start_two, tmp_path / f"out{number}", *planted)
        lines.append(f"| {place} | rank {planted[1]} | {seconds:.1f} s |")
    write_section(
        "One process of two fails",
        [
            "An error is planted in one of two processes (gloo, no launcher). Both print its cause and end with the "
            "same status; `--ddp_timeout` is 30 minutes.",
            "",
            *lines,
        ],
    )


@pytest.mark.all
def test_a_checkpoint_that_one_process_writes_is_whole_though_another_fails_meanwhile(start_two, tmp_path):
    """It takes longer than a process may take to end once another has failed."""
    out = tmp_path / "out"
    fails = ("fail", "library.training.loop:Trainer._others_waiting", 1, 0)
    ranks = start_two(out, *CHECKPOINTS, faults_of=([("hold_checkpoint", str(tmp_path / "there"), 15.0)], [fails]))
    assert [one.wait() for one in ranks] == [1, 1], ranks[0].text
    assert "planted here" in ranks[0].text
    assert [path.name for path in out.glob("*.safetensors")] == ["at-step00000002.safetensors"]


@pytest.mark.parametrize("what", ["manifest", pytest.param("weights", marks=pytest.mark.all)])
def test_processes_that_see_different_states_do_not_go_on(start_two, tmp_path, what):
    out = tmp_path / "out"
    ranks = start_two(out, "--save_state_on_train_end", "--max_train_steps=1")
    assert [one.wait() for one in ranks] == [0, 0], ranks[0].text
    target = {"manifest": "manifest_digest", "weights": "bits_digest"}[what]
    others = [("answer", f"library.training.state.resume:{target}", "another")]
    ranks = start_two(out, faults_of=((), others))
    assert [one.wait() for one in ranks] == [2, 2], ranks[0].text
    named = {"manifest": "the training state", "weights": "the weights after resuming"}[what]
    for one in ranks:
        assert "rank 1 (on " in one.text and f"differs from rank 0 (on {platform.node()}) in {named}" in one.text


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.all)])
def test_a_state_that_one_process_cannot_write_is_written_after_the_next_step(
    start_two, undisturbed_two, tmp_path, rank
):
    """Of a write that fails once nothing is left but a line; the steps are those of a run whose disk was well."""
    out = tmp_path / "out"
    planted = [("fail", "library.training.state.writer:write_tensors", 1, errno.ENOSPC)]
    ranks = start_two(
        out, "--save_state_every_n_steps=3", faults_of=tuple(planted if place == rank else [] for place in (0, 1))
    )
    assert [one.wait() for one in ranks] == [0, 0], ranks[0].text
    assert "the training state cannot be written" in ranks[0].text and "No space left" in ranks[0].text
    assert states(out)[-1] == "at-step00000006-state" and 2 <= len(states(out)) <= 3, states(out)
    assert not [path for path in out.iterdir() if path.name.startswith(".at-step")]
    assert_undisturbed(out, undisturbed_two)
