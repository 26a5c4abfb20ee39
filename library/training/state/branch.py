"""Makes an output folder hold one branch: what a start does not go on from is moved aside, and nothing is deleted.

    OUTPUT_DIR/abandoned/before-attempt-3/      what attempt 3 does not go on from, under the names that it had
        at-step00000004-state/, at-step00000004.safetensors, metrics.jsonl (the lines of such steps), ...

So later saves, the retention of old ones and --resume=auto meet the states and checkpoints of their own branch alone.
"""

import json
import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.atomic_write import sync, write_file
from library.errors import InputError
from library.options.saving import SAVE_ENDINGS
from library.training.state.choice import positions, state_names
from library.training.state.files import StateInfo, read_info
from library.training.state.lineage import Lineage, new_lineage
from library.training.state.names import ABANDONED, AVERAGE_SUFFIX, METRICS, STATE_SUFFIX, last_name, state_name

logger = logging.getLogger(__name__)

_BEFORE = "before-attempt-"
_ENDINGS = tuple(dict.fromkeys(SAVE_ENDINGS.values()))  # of a checkpoint's name
_QUARANTINE = re.compile(r"quarantine(\.rank\d+)?\.jsonl")


def start_branch(
    folder: Path,
    output_name: str | None,
    resumed: tuple[Path, StateInfo] | None,
    step_of_epoch: Callable[[int], int],
    in_use: Collection[Path] = (),
    configuration: str = "",
) -> Lineage:
    """Move aside what a start does not go on from. On the main process, before anything is written.

    Args:
        folder: the output folder, locked for this run.
        resumed: the folder of the state that the start goes on from, and what it says; None where it begins anew.
        step_of_epoch: the number of an epoch to the steps done at its end, for checkpoints that are named after epochs.
        in_use: files and folders that the run reads, which stay where they are.
        configuration: the name of a file that says how all of it was made; it goes with what is moved.

    Raises:
        InputError: the file system refuses.
    """
    parent = resumed[1] if resumed else None
    names = _entries(folder)
    infos = {name: _info(folder / name) for name in state_names(names, output_name)}
    attempts = [info.lineage.attempt for info in infos.values() if info] + _attempts_that_left(folder / ABANDONED)
    lineage = new_lineage(parent.lineage if parent else None, parent.step if parent else 0, attempts)
    branch = _Branch(folder, lineage, output_name, {path.resolve() for path in in_use})
    if parent is None and infos:
        _say_that_it_starts_anew(branch, infos)
    try:
        runs = _run_by_step(folder / METRICS)
        off = branch.move_states(infos)
        branch.move_checkpoints(names, runs, step_of_epoch, last_is_on=state_name(last_name(output_name)) not in off)
        branch.split_lists(names)
        if configuration in names and branch.moved:
            branch.move_file(configuration)
        if resumed:
            branch.bring_back(resumed[0])
    except OSError as error:
        raise InputError(
            f"--output_dir {folder}: what this run does not go on from cannot be moved to {branch.aside} "
            f"({error.strerror or error}). Nothing is lost. Mend the folder, or choose another."
        ) from error
    if branch.moved:
        logger.info("kept in %s: %s", branch.aside, ", ".join(branch.moved))
    return lineage


@dataclass
class _Branch:
    """An output folder on its way to holding one branch."""

    folder: Path
    lineage: Lineage
    output_name: str | None
    in_use: Collection[Path]

    def __post_init__(self) -> None:
        self.aside = self.folder / ABANDONED / f"{_BEFORE}{self.lineage.attempt}"
        self.moved: list[str] = []

    def move_states(self, infos: Mapping[str, StateInfo | None]) -> list[str]:
        """Move the states that are not on the branch, the newest first; returns their names."""
        steps, _ = positions(infos, self.output_name, STATE_SUFFIX)
        named = {name: step for step, name in steps.items()}
        off = []
        for name, info in infos.items():
            if info is None:  # damaged: its name alone says where it was
                on = named.get(name, self.lineage.step + 1) <= self.lineage.step
            else:
                on = self.lineage.includes(info.lineage.run_id, info.step)
            if not on:
                off.append((info.step if info else 0, name))
        names = [name for _, name in sorted(off, reverse=True)]
        for name in names:
            self._move(name)
        return names

    def move_checkpoints(
        self, names: Collection[str], runs: Mapping[int, str], step_of_epoch: Callable[[int], int], last_is_on: bool
    ) -> None:
        """Move the checkpoints that are not on the branch.

        Args:
            runs: by step the run that did it.
            last_is_on: whether the last checkpoint's state, if any, is on the branch.
        """
        goes_on = self.lineage.step > 0
        ends_on = goes_on and all(self.lineage.includes(run, step) for step, run in runs.items())
        for ending in (form for average in ("", AVERAGE_SUFFIX) for form in (average + one for one in _ENDINGS)):
            steps, epochs = positions(names, self.output_name, ending)
            found = [(step, name) for step, name in steps.items()]
            found += [(step_of_epoch(epoch), name) for epoch, name in epochs.items()]
            for step, name in found:
                whose = runs.get(step)
                on = step <= self.lineage.step and (whose is None or self.lineage.includes(whose, step))
                if not on:
                    self._move_checkpoint(name)
            last = last_name(self.output_name) + ending
            state_is_on = last_is_on and state_name(last_name(self.output_name)) in names
            if last in names and not (goes_on and (ends_on or state_is_on)):
                self._move_checkpoint(last)

    def split_lists(self, names: Collection[str]) -> None:
        """Leave in metrics.jsonl and the lists of bad samples the lines of the branch alone."""
        for name in (one for one in names if one == METRICS or _QUARANTINE.fullmatch(one)):
            if not self.lineage.step:
                self._move(name)
                continue
            texts = (self.folder / name).read_text(encoding="utf-8", errors="replace").splitlines()
            on = [text for text in texts if self._on_branch(text)]
            off = [text for text in texts if not self._on_branch(text)]
            if off:
                self._write(self.aside / name, off)
                self._write(self.folder / name, on)
                self.moved.append(f"{len(off)} lines of {name}")

    def bring_back(self, state: Path) -> None:
        """Where the state was set aside in this folder before: put it in its place, and its branch's metrics."""
        abandoned = self.folder / ABANDONED
        if not state.resolve().is_relative_to(abandoned.resolve()):
            return
        state.rename(self.folder / state.name)
        sync(self.folder)
        lists = [self.folder / METRICS, *sorted(abandoned.glob(f"*/{METRICS}"))]
        texts = [text for path in lists if path.exists() for text in path.read_text(encoding="utf-8").splitlines()]
        on = {text: _step_and_run(text) for text in texts if self._on_branch(text)}
        ordered = sorted(on, key=lambda text: (on[text] or (0, ""))[0])  # stable: a step's own line stays the first
        self._write(self.folder / METRICS, ordered)
        logger.info("%s is back in %s", state.name, self.folder)

    def _on_branch(self, text: str) -> bool:
        """Whether a line is of a step that the branch has; a damaged one is not."""
        found = _step_and_run(text)
        if found is None:
            return False
        step, run = found
        return step <= self.lineage.step and (run is None or self.lineage.includes(run, step))

    def move_file(self, name: str) -> None:
        """Move a file, unless the run reads it."""
        if (self.folder / name).resolve() not in self.in_use:
            self._move(name)

    def _move_checkpoint(self, name: str) -> None:
        path = self.folder / name
        is_checkpoint = path.is_file() or (path / "model_index.json").exists()
        whole = path.resolve()
        if is_checkpoint and not any(used == whole or used.is_relative_to(whole) for used in self.in_use):
            self._move(name)

    def _move(self, name: str) -> None:
        self.aside.mkdir(parents=True, exist_ok=True)
        (self.folder / name).rename(self.aside / name)
        sync(self.aside)
        sync(self.folder)
        self.moved.append(name)

    def _write(self, path: Path, lines: Collection[str]) -> None:
        content = "".join(f"{line}\n" for line in lines)
        write_file(path, lambda partial: partial.write_text(content, encoding="utf-8"))


def _run_by_step(path: Path) -> dict[int, str]:
    """The run that did a step last, as far as the lines of metrics.jsonl say so."""
    runs: dict[int, str] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        found = _step_and_run(text)
        if found is not None and found[1] is not None:
            runs[found[0]] = found[1]
    return runs


def _step_and_run(text: str) -> tuple[int, str | None] | None:
    """The step of a line, and the run id if it has one; None for a line that a power cut has damaged."""
    try:
        line: Any = json.loads(text)
        return int(line["step"]), line.get("run")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _info(folder: Path) -> StateInfo | None:
    try:
        return read_info(folder)
    except InputError:
        return None


def _attempts_that_left(abandoned: Path) -> list[int]:
    """The attempts that have moved something aside."""
    names = _entries(abandoned)
    return [int(name.removeprefix(_BEFORE)) for name in names if re.fullmatch(_BEFORE + r"\d+", name)]


def _say_that_it_starts_anew(branch: _Branch, infos: Mapping[str, StateInfo | None]) -> None:
    readable = {name: info for name, info in infos.items() if info}
    newest = max(readable, key=lambda name: (readable[name].lineage.attempt, readable[name].step), default=None)
    what = f", the newest of step {readable[newest].step}" if newest else ""
    where = branch.aside / newest if newest else branch.aside
    logger.warning(
        "--output_dir %s holds training states%s, and this run starts from the beginning: a run goes on from them only "
        "with --resume=auto, which was not given. They are kept in %s. To go on from them after all, end this run and "
        "give --resume=%s",
        branch.folder, what, branch.aside, where,
    )  # fmt: skip


def _entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
