"""`--dataset_config`: a TOML or JSON file with several data sets, each of several subsets, for one run.

A subset is the options of the command line with those of [general], of its [[datasets]] and of its
[[datasets.subsets]] put over them, the inner ones last. Which flag may stand where its `at` says.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import InputError
from library.options.data import DataOptions, SubsetOptions
from library.options.flag import DATASET, ONE_SUBSET, SUBSET, Flag, Level, flag_names, flags_of_group, nested_group
from library.options.read_config import read_config

# What sd-scripts takes and this project does not do yet: only the value that leaves it off.
_NOT_YET: dict[str, tuple[Any, ...]] = {
    "conditioning_data_dir": (),
    "cache_info": (False,),
    "network_multiplier": (1,),
}


@dataclass(frozen=True)
class _Keys:
    """The flags that the file may hold, by their keys in it."""

    by_key: Mapping[str, Flag]

    def at(self, *levels: Level) -> dict[str, Flag]:
        """Those of some levels."""
        return {key: flag for key, flag in self.by_key.items() if flag.at in levels}


def data_options(data_type: type[DataOptions], values: Mapping[str, Any]) -> DataOptions:
    """The options of a run's data from the command line, and from the file of --dataset_config if there is one.

    Args:
        data_type: the script's; its `subsets` say of which type they are.
        values: of the command line and --config_file, by the flags' names.

    Raises:
        InputError: no data is named, or it is named twice; or as read_dataset_config.
    """
    nested = nested_group(data_type)
    if nested is None or not issubclass(nested[1], SubsetOptions):
        raise TypeError(
            f"{data_type.__name__} must say what a subset's options are: subsets: tuple[SubsetOptions, ...]"
        )
    subset_type = nested[1]
    base = {name: values[name] for name in flag_names(subset_type)}
    of_run = {name: values[name] for name in flag_names(data_type)}
    if values["dataset_config"] is None:
        for name in ("train_data_dir", "resolution"):
            if values[name] is None:
                raise InputError(f"--{name} is missing; give it, or --dataset_config.")
        found = [base]
        if values["reg_data_dir"] is not None:
            found.append(base | {"train_data_dir": values["reg_data_dir"], "in_json": None, "is_reg": True})
    else:
        for name in ("train_data_dir", "in_json", "reg_data_dir"):
            if values[name] is not None:
                raise InputError(f"--{name} and --dataset_config are two places of the data: give one of them.")
        keys = {flag.key: flag for flag in flags_of_group(data_type) if flag.at is not Level.RUN}
        shared = {flag.name for flag in keys.values() if flag.name in of_run}
        path = values["dataset_config"]
        found = read_dataset_config(path, _Keys(keys), base | {name: of_run[name] for name in shared})
        of_run |= _common(path, {key: flag for key, flag in keys.items() if flag.name in shared}, found)
        found = [{name: value for name, value in subset.items() if name not in shared} for subset in found]
    return data_type(subsets=tuple(subset_type(**subset) for subset in found), outer=base, **of_run)


def _common(path: Path, keys: Mapping[str, Flag], found: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run has one value of, though a data set may state it."""
    for key, flag in keys.items():
        values = {subset[flag.name] for subset in found}
        if len(values) > 1:
            raise InputError(
                f"{path}: {key} differs between the data sets ({', '.join(map(str, sorted(values)))}). A run has one: "
                "give the same for all."
            )
    return {flag.name: found[0][flag.name] for flag in keys.values()}


def read_dataset_config(path: Path, keys: _Keys, base: dict[str, Any]) -> list[dict[str, Any]]:
    """The options of each subset, by their names on the command line.

    Args:
        keys: that the file may hold.
        base: the options of the command line.

    Raises:
        InputError: the file cannot be read; a table is missing; a key is unknown, at a level that does not hold it, or
            not implemented; a value is not what its key takes.
    """
    content = read_config(path, "--dataset_config")
    _check_keys(path, "the file", content, {"general", "datasets"}, keys)
    of_dataset, of_subset = keys.at(DATASET, SUBSET), keys.at(SUBSET, ONE_SUBSET)
    general = _table(path, "[general]", content.get("general", {}))
    base = base | _values(path, "[general]", general, of_dataset, keys)
    found: list[dict[str, Any]] = []
    for number, dataset in enumerate(_tables(path, "datasets", content.get("datasets")), start=1):
        where = f"[[datasets]] {number}"
        own = {key: value for key, value in dataset.items() if key != "subsets"}
        outer = base | _values(path, where, own, of_dataset, keys)
        if outer["resolution"] is None:
            raise InputError(f"{path}: {where} has no resolution. Give it there, in [general], or as --resolution.")
        for position, subset in enumerate(_tables(path, f"subsets of {where}", dataset.get("subsets")), start=1):
            inner = f"[[datasets.subsets]] {position} of {where}"
            values = outer | _values(path, inner, subset, of_subset, keys) | {"dataset": number - 1}
            if values["train_data_dir"] is None:
                raise InputError(f"{path}: {inner} lacks image_dir, the folder or address of its images or shards.")
            found.append(values)
        if all(values["is_reg"] for values in found if values["dataset"] == number - 1):
            raise InputError(
                f"{path}: {where} has only subsets of is_reg = true. Regularisation images are shown as often as the "
                "others of their data set: add a subset to train on, or take is_reg out."
            )
    return found


def _table(path: Path, where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{path}: {where} must be a table of keys and values.")
    return value


def _tables(path: Path, where: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{path}: there are no {where}. It needs [[datasets]], each with [[datasets.subsets]].")
    return [_table(path, where, entry) for entry in value]


def _check_keys(path: Path, where: str, table: Mapping[str, Any], known: set[str], keys: _Keys) -> None:
    for key, value in table.items():
        if key in known:
            continue
        if key in keys.by_key:
            level = keys.by_key[key].at
            raise InputError(f"{path}: {key} does not belong in {where}; it goes into {level.value}.")
        if key in _NOT_YET:
            if value in _NOT_YET[key]:
                continue
            off = f", or set it to {json.dumps(_NOT_YET[key][0])}" if _NOT_YET[key] else ""
            raise InputError(f"{path}: {key} in {where} is not available here yet: take it out{off}.")
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known there: {', '.join(sorted(known))}."
        raise InputError(f"{path}: {key} in {where} is not known. {hint}")


def _values(
    path: Path, where: str, table: Mapping[str, Any], of_level: Mapping[str, Flag], keys: _Keys
) -> dict[str, Any]:
    """A table's values by the names of their flags.

    Args:
        of_level: the flags that the table may hold.
    """
    _check_keys(path, where, table, set(of_level), keys)
    values = {}
    for key, value in table.items():
        if key in of_level:
            try:
                values[of_level[key].name] = of_level[key].kind.from_file(value)
            except ValueError as error:
                raise InputError(f"{path}: {key} in {where} {error}.") from error
    return values
