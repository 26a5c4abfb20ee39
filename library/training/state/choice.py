"""The training states of one output_dir: which one resumes, which may go, what a killed run left behind."""

import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from library.atomic_write import put_away, remove, remove_folder
from library.errors import InputError
from library.own_folder import is_own
from library.training.state.files import MANIFEST, read_info, verify
from library.training.state.names import STATE_SUFFIX, epoch_name, last_name, state_name, step_name
from library.training.state.retention import Retention
from library.training.state.run_lock import RunLock

logger = logging.getLogger(__name__)

_LEFT_BEHIND = re.compile(r"\.(?P<name>.+)\.(?P<what>partial\d*|previous|removed)")


def newest_valid(output_dir: Path, output_name: str | None) -> Path | None:
    """The newest attempt's state of the most steps, of those whose manifest holds; None where there is none.

    Attempts and steps decide, not times: a clock may have been set back. Whatever is passed over is logged with its
    reason. Call `clear_left_behind` before.
    """
    candidates = []
    for name in state_names(_entries(output_dir), output_name):
        folder = output_dir / name
        try:
            info = read_info(folder)
            candidates.append(((info.lineage.attempt, info.step), (folder / MANIFEST).exists(), name))
        except InputError as error:
            logger.warning("state passed over: %s", error)
    for _, _, name in sorted(candidates, reverse=True):
        try:
            verify(output_dir / name)
        except InputError as error:
            logger.warning("state passed over: %s", error)
            continue
        return output_dir / name
    return None


def state_names(names: Iterable[str], output_name: str | None) -> list[str]:
    """Of the names in an output_dir, those of this output_name's states, in the order of the alphabet."""
    names = list(names)
    steps, epochs = positions(names, output_name, STATE_SUFFIX)
    last = state_name(last_name(output_name))
    return sorted([*steps.values(), *epochs.values(), *(name for name in names if name == last)])


def obsolete(
    names: Iterable[str], saved: str, retention: Retention, output_name: str | None, suffix: str = STATE_SUFFIX
) -> list[str]:
    """Which states, or checkpoints of that suffix, may go once `saved` is durable; those of steps and of epochs are
    counted apart."""
    steps, epochs = positions(names, output_name, suffix)
    step = next((number for number, name in steps.items() if name == saved), None)
    epoch = next((number for number, name in epochs.items() if name == saved), None)
    going = []
    if step is not None:
        going += [steps[number] for number in retention.obsolete_steps(steps, step)]
    if epoch is not None:
        going += [epochs[number] for number in retention.obsolete_epochs(epochs, epoch)]
    return going


def remove_state(folder: Path) -> None:
    """Delete a state, if all in it was written by a run; killed in between, no half of it is left under its name."""
    if is_own(folder):
        remove_folder(folder)
    else:
        logger.warning("%s: not removed: it holds what no run has written, or its manifest is damaged", folder)


def clear_left_behind(
    output_dir: Path, lock: RunLock, is_checkpoint: Callable[[str], bool] = lambda name: False
) -> None:
    """Delete what a killed run was writing or deleting, and put back what it had moved aside to replace.

    The lock is the proof that no living run writes here. Before any rank writes a state: call it on rank 0, then let
    the others go on.

    Args:
        is_checkpoint: whether a name is one of the run's checkpoints, which are looked at as its states are.
    """
    if lock.output_dir != output_dir:
        raise ValueError(f"the lock is on {lock.output_dir}, not on {output_dir}")
    for name in _entries(output_dir):
        left = _LEFT_BEHIND.fullmatch(name)
        if left is None or not (left["name"].endswith(STATE_SUFFIX) or is_checkpoint(left["name"])):
            continue
        target = output_dir / left["name"]
        if left["what"] == "previous" and not target.exists():
            logger.warning("%s: a run was killed while it replaced this; the earlier one is back", target)
            (output_dir / name).rename(target)
        elif left["what"] == "previous":
            put_away(output_dir / name, target)
        else:
            logger.warning("%s: left behind by a run that was killed; deleted", output_dir / name)
            remove(output_dir / name)


def positions(names: Iterable[str], output_name: str | None, suffix: str) -> tuple[dict[int, str], dict[int, str]]:
    """Names with that suffix by step and by epoch, as far as they say so."""
    by_step = _pattern(step_name(output_name, 0), f"{0:08d}", suffix)
    by_epoch = _pattern(epoch_name(output_name, 0), f"{0:06d}", suffix)
    names = list(names)
    return (
        {int(match[1]): name for name in names if (match := by_step.fullmatch(name))},
        {int(match[1]): name for name in names if (match := by_epoch.fullmatch(name))},
    )


def _pattern(stem: str, zeros: str, suffix: str) -> re.Pattern[str]:
    """What a name with another number in the place of the zeros at its stem's end looks like."""
    number = rf"(\d{{{len(zeros)}}}|[1-9]\d{{{len(zeros)},}})"
    return re.compile(re.escape(stem.removesuffix(zeros)) + number + re.escape(suffix))


def _entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
