"""Whether what flags name is there: said before anything is imported, for all of them at once."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from library.errors import InputError
from library.hub import is_hub_name, refuse_missing_path
from library.options.flag import Flag, Flags, Level, PathTo
from library.options.model_paths import MODELS, problems_of_model


def problems_of_paths(flags: Flags, values: Mapping[str, list[Any]]) -> Iterator[str]:
    """A sentence for each path that is not there, or is of another kind than its flag reads.

    Args:
        values: those of each flag; several of one that differs between subsets.
    """
    config = next(iter(values["dataset_config"]))
    for flag in flags:
        if flag.path_to is None:
            continue
        if flag.path_to in MODELS:
            yield from problems_of_model(flag.path_to, f"--{flag.name}", values[flag.name][0])
            continue
        named = f"{config}: {flag.key}" if config and flag.at is not Level.RUN else f"--{flag.name}"
        for value in dict.fromkeys(values.get(flag.name, ())):  # of subsets none where no subset could be read
            is_other_flags = flag.at is not Level.RUN and value in values["reg_data_dir"]
            if value is not None and not is_other_flags and (problem := _problem(flag, value)):
                yield f"{named} {value}: {problem}"


def _problem(flag: Flag, value: Any) -> str | None:
    """What is wrong with a path, or None; addresses are asked for their shards later."""
    if not isinstance(value, (str, Path)) or (flag.path_to is PathTo.STATE and value == "auto"):
        return None
    path = Path(value)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError) as error:  # a name that is too long, or has a zero byte
        return f"cannot be looked for ({error})"
    match flag.path_to:
        case PathTo.FILE if not is_file:
            return "is a folder; name a file" if is_folder else "there is no such file"
        case PathTo.STATE if not is_folder:
            found = "is a file" if is_file else "no such folder"
            return f"{found}; --{flag.name} takes the folder of a training state, or auto"
        case PathTo.OUTPUT if os.path.lexists(path) and not is_folder:
            return "is there and is no folder; name another"
        case PathTo.DATA if not is_file and not is_folder:
            return _of_missing_data(path)
    return None


def _of_missing_data(path: Path) -> str | None:
    """What is wrong with a path that is not there; None where it may name a data set on the hub."""
    if path.is_symlink():
        return f"is a link to {path.readlink()}, which is not there"
    if not is_hub_name(path.as_posix()):
        parent = next(parent for parent in path.absolute().parents if parent.exists())
        return f"there is no such file or folder; of the path {parent} is there"
    try:
        refuse_missing_path(path.as_posix(), "")
    except InputError as error:
        return str(error).partition(": ")[2]
    return None
