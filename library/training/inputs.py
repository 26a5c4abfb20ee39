"""The files and folders that a run reads, as its flags name them: what no run may write over, move or delete."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from library.address import user_path
from library.options.flag import RUN, Flags, PathTo
from library.options.model_paths import MODEL_PARTS, MODELS
from library.options.training import TrainingOptions
from library.options.values import values_of


@dataclass(frozen=True)
class Input:
    """A file or folder that the run reads.

    Attributes:
        name: of the flag that names it, without dashes.
        said: the flag, or the key of the file of data sets, for messages.
        is_data: images are looked for in it, at any depth.
    """

    name: str
    said: str
    path: Path
    is_data: bool

    def __str__(self) -> str:
        return f"{self.said} {self.path}"


def inputs(options: TrainingOptions) -> Iterator[Input]:
    """What the flags name of files and folders that are there; of several subsets, what each of them names.

    Names of models and tokenizers are texts, because they may be the hub's; of other flags a path alone counts, not a
    text that happens to be the name of a file.
    """
    flags, data = Flags(type(options)).by_name, options.data
    for name, values in values_of(options).items():
        path_to = flags[name].path_to
        if path_to in (PathTo.OUTPUT, PathTo.STATE):
            continue
        for value in values:
            if not isinstance(value, Path) and not (isinstance(value, str) and path_to in MODELS):
                continue
            path = user_path(str(value))
            if not os.path.lexists(path):
                continue
            said = f"--{name}"
            if data.dataset_config is not None and flags[name].at != RUN:
                said = f"{data.dataset_config}: {flags[name].key}"
            elif name == "train_data_dir" and path == data.reg_data_dir:
                said = "--reg_data_dir"
            yield Input(name, said, path, name in ("train_data_dir", "reg_data_dir"))
            if path_to in MODELS:
                yield from (Input(name, said, link, False) for link in _links_in(path))


def _links_in(folder: Path) -> Iterator[Path]:
    """The links among a model folder's files, its parts and their files: what they lead to is read, too."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:  # it is a file, or cannot be read, which is said where it is read
        return
    for entry in entries:
        is_part = entry.name in MODEL_PARTS
        if entry.is_symlink() and (is_part or not entry.is_dir()):  # not of a link to where a user keeps his runs
            yield entry
        if is_part:
            yield from _links_in(entry)


def input_paths(options: TrainingOptions) -> set[Path]:
    """The paths of what the run reads, links as they are."""
    return {read.path for read in inputs(options)}
