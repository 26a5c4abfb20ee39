"""The names that a run writes in its output folder, all of them, by kind."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from library.models.files.own_checkpoint import is_own_checkpoint
from library.options.saved_config import CONFIG_HEAD, config_path
from library.options.saving import SAVE_ENDINGS
from library.options.training import TrainingOptions
from library.training.state.names import (
    ABANDONED,
    AVERAGE_SUFFIX,
    CASE_LOG_HEAD,
    DEBUG_FOLDER,
    LOCK_FILE,
    METRICS,
    PROFILE_FOLDER,
    SAMPLE_FOLDER,
    epoch_name,
    last_name,
    sample_name,
    state_name,
    step_name,
)

LAUNCHER_LOG = "WORKER_LOG"  # the variable by which a launcher says where its logs are, without their endings
_TEMPORARY = re.compile(r"\.(.+)\.(partial.*|previous|removed)")  # library.atomic_write's names
_TEMPORARY_BYTES = len(os.fsencode("..partial00000"))
_CACHE_FOLDER = "cache"  # library.data.cache.locations, where the data's own folder may not be written to


@dataclass(frozen=True)
class Written:
    """A name in --output_dir, or names that differ by a number, that a run writes.

    Attributes:
        what: lies under the name, for messages.
        flag: chooses the name.
        example: one of the names.
        pattern: of all of them; its group, if any, is the number.
        is_folder: whether it is a folder.
        is_own: whether this project has written what lies there, where it would be replaced; None where it stays, or is
            moved aside.
        is_due: whether the run writes the name with that number.
        moved_aside: whether a run that begins anew moves aside what lies there (library.training.state.branch).
        only_grows: whether it is a folder of which nothing is ever replaced or removed.
    """

    what: str
    flag: str
    example: str
    pattern: str
    is_folder: bool = False
    is_own: Callable[[Path], bool] | None = None
    is_due: Callable[[int], bool] = lambda number: True
    moved_aside: bool = False
    only_grows: bool = False

    @property
    def is_numbered(self) -> bool:
        """Whether these are names that differ by the number of a step or epoch."""
        return re.compile(self.pattern).groups > 0

    def has(self, name: str, ignore_case: bool = False) -> bool:
        """Whether a name is one of these, or what stands beside one while it is written."""
        beside = _TEMPORARY.fullmatch(name)
        for one in (name, beside[1] if beside else name):
            found = re.fullmatch(self.pattern, one, re.IGNORECASE if ignore_case else 0)
            if found and (not found.groups() or self.is_due(int(found[1]))):
                return True
        return False


def written_names(options: TrainingOptions) -> list[Written]:
    """All names that a run with these options writes in its output folder; with --debug_dataset it is one."""
    if options.data.debug_dataset:
        return [_growing("the page of --debug_dataset", "--output_dir", DEBUG_FOLDER)]
    return [*_checkpoints(options), *_states(options), *_others(options), *_logs(options)]


def longest_name(options: TrainingOptions) -> str:
    """The longest name that the run writes, as far as it is known: of a checkpoint, a state or a sample picture."""
    picture = sample_name(options.saving.output_name, "20240131235959", "e000020", 0, 2**63)
    names = [picture, *(one.example for one in written_names(options))]
    return max(names, key=lambda name: len(os.fsencode(name)))


def name_bytes(name: str) -> int:
    """How many bytes a name takes, that which it has while it is written included."""
    return len(os.fsencode(name)) + _TEMPORARY_BYTES


def _fixed(what: str, flag: str, name: str, is_own: Callable[[Path], bool] | None = None) -> Written:
    return Written(what, flag, name, re.escape(name), is_own=is_own)


def _growing(what: str, flag: str, name: str) -> Written:
    return Written(what, flag, name, re.escape(name), is_folder=True, only_grows=True)


def _stems(options: TrainingOptions) -> Iterator[tuple[str, str, str, Callable[[int], bool]]]:
    """What is saved, and of its names an example, the pattern, and which numbers are due."""
    saving, run = options.saving, options.run
    name = saving.output_name
    yield "the final checkpoint", last_name(name), re.escape(last_name(name)), lambda number: True
    if every := saving.save_every_n_steps:
        most = None if run.max_train_epochs else run.max_train_steps
        yield "a checkpoint", step_name(name, every), _numbered(step_name(name, 0), 8), _multiples(every, most)
    if every := saving.save_every_n_epochs:
        most = run.max_train_epochs
        yield "a checkpoint", epoch_name(name, every), _numbered(epoch_name(name, 0), 6), _multiples(every, most)


def _multiples(every: int, most: int | None) -> Callable[[int], bool]:
    return lambda number: number > 0 and number % every == 0 and (most is None or number <= most)


def _numbered(name: str, digits: int) -> str:
    """A pattern of a name that ends with a number of at least so many digits."""
    return re.escape(name[:-digits]) + rf"(\d{{{digits},}})"


def _checkpoints(options: TrainingOptions) -> Iterator[Written]:
    """Checkpoints of every cadence, and those of the moving average."""
    ending = SAVE_ENDINGS[options.saving.form(options.model.pretrained_model_name_or_path)]
    flag = "--output_name" if options.saving.output_name else "--output_dir"
    for what, example, pattern, is_due in _stems(options):
        for average in ("", AVERAGE_SUFFIX) if options.ema.use_ema else ("",):
            end = average + ending
            named = f"{what} of the moving average" if average else what
            yield Written(
                named, flag, example + end, pattern + re.escape(end), not ending, is_own_checkpoint, is_due, True
            )


def _states(options: TrainingOptions) -> Iterator[Written]:
    """Training states; at any step one may be asked for by a signal."""
    name, end = options.saving.output_name, state_name("")
    flag = "--output_name" if name else "--output_dir"
    yield Written(
        "a training state", flag, step_name(name, 1) + end, _numbered(step_name(name, 0), 8) + re.escape(end), True
    )
    if options.states.save_state or options.states.save_state_on_train_end:
        yield Written("the final training state", flag, last_name(name) + end, re.escape(last_name(name) + end), True)
    if options.states.save_state and options.saving.save_every_n_epochs:
        pattern = _numbered(epoch_name(name, 0), 6) + re.escape(end)
        yield Written("a training state", flag, epoch_name(name, 1) + end, pattern, True)


def _others(options: TrainingOptions) -> Iterator[Written]:
    """What a run writes besides."""
    yield _fixed("the lock", "--output_dir", LOCK_FILE)
    yield _fixed("the metrics", "--output_dir", METRICS)
    yield Written("the list of bad samples", "--output_dir", "quarantine.jsonl", r"quarantine(?:\.rank\d+)?\.jsonl")
    yield _growing("what an earlier run left", "--output_dir", ABANDONED)
    configuration = config_path(options)
    flag = "--output_name" if options.saving.output_name else "--output_dir"
    yield _fixed("the configuration", flag, configuration.name, is_own=_begins_with(CONFIG_HEAD))
    if options.preview.sample_prompts is not None:
        yield _growing("the sample pictures", "--output_dir", SAMPLE_FOLDER)
    if options.logs.profile is not None:
        yield _growing("the profile", "--output_dir", PROFILE_FOLDER)
    caches = options.caches
    if caches.cache_latents_to_disk or caches.cache_text_encoder_outputs_to_disk:
        yield _growing("caches", "--output_dir", _CACHE_FOLDER)


def _logs(options: TrainingOptions) -> Iterator[Written]:
    """Logs: of the case, of TensorBoard, of the launcher."""
    if options.logs.case_name:
        yield _fixed(
            "the run's figures", "--case_name", f"{options.logs.case_name}.log", is_own=_begins_with(CASE_LOG_HEAD)
        )
    out = Path(os.path.abspath(options.saving.output_dir))  # noqa: PTH100 - links are to stay
    if options.logs.logging_dir is not None:
        board = Path(os.path.abspath(options.logs.logging_dir))  # noqa: PTH100
        if board != out and board.is_relative_to(out):
            yield _growing("TensorBoard's events", "--logging_dir", board.relative_to(out).parts[0])
    stem = os.environ.get(LAUNCHER_LOG, "")
    if stem and Path(stem).parent == out:
        name = re.escape(Path(stem).name)
        yield Written("the launcher's log", "the launcher", f"{Path(stem).name}.log", rf"{name}(?:\.rank\d+)?\.log")


def _begins_with(head: str) -> Callable[[Path], bool]:
    """Whether a text file is one that this project has written, by its first words; one that is empty counts, too."""

    def is_own(path: Path) -> bool:
        try:
            with path.open("rb") as file:
                start = file.read(len(head.encode()))
        except OSError:
            return False
        return start in (b"", head.encode())

    return is_own
