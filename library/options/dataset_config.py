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

from library.errors import Problems
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


def data_options(data_type: type[DataOptions], values: Mapping[str, Any], problems: Problems) -> DataOptions:
    """The options of a run's data from the command line, and from the file of --dataset_config if there is one.

    Args:
        data_type: the script's; its `subsets` say of which type they are.
        values: of the command line and --config_file, by the flags' names.
        problems: takes up all that is wrong: no data is named, or it is named twice; or as `read_dataset_config`. The
            subsets in which nothing is wrong are returned nevertheless.
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
        missing = [name for name in ("train_data_dir", "resolution") if values[name] is None]
        problems.found += [f"--{name} is missing; give it, or --dataset_config." for name in missing]
        found = [] if missing else [base]
        if values["reg_data_dir"] is not None and not missing:
            found.append(base | {"train_data_dir": values["reg_data_dir"], "in_json": None, "is_reg": True})
    else:
        for name in ("train_data_dir", "in_json", "reg_data_dir"):
            if values[name] is not None:
                problems.found.append(f"--{name} and --dataset_config are two places of the data: give one of them.")
        keys = {flag.key: flag for flag in flags_of_group(data_type) if flag.at is not Level.RUN}
        shared = {key: flag for key, flag in keys.items() if flag.name in of_run}
        path = values["dataset_config"]
        outer = base | {flag.name: of_run[flag.name] for flag in shared.values()}
        found = read_dataset_config(path, _Keys(keys), outer, problems)
        of_run |= _common(path, shared, found, problems)
        found = [
            {name: value for name, value in subset.items() if name not in {flag.name for flag in shared.values()}}
            for subset in found
        ]
    return data_type(subsets=tuple(subset_type(**subset) for subset in found), outer=base, **of_run)


def _common(path: Path, keys: Mapping[str, Flag], found: list[dict[str, Any]], problems: Problems) -> dict[str, Any]:
    """What a run has one value of, though a data set may state it."""
    for key, flag in keys.items():
        values = {subset[flag.name] for subset in found}
        if len(values) > 1:
            problems.found.append(
                f"{path}: {key} differs between the data sets ({', '.join(map(str, sorted(values)))}). A run has one: "
                "give the same for all."
            )
    return {flag.name: found[0][flag.name] for flag in keys.values()} if found else {}


def read_dataset_config(path: Path, keys: _Keys, base: dict[str, Any], problems: Problems) -> list[dict[str, Any]]:
    """The options of each subset that says where its data are, by their names on the command line.

    Args:
        keys: that the file may hold.
        base: the options of the command line.
        problems: takes up all that is wrong: the file cannot be read; a table is missing; a key is unknown, at a level
            that does not hold it, or not implemented; a value is not what its key takes.
    """
    content: dict[str, Any] = {}
    with problems.noted():
        content = read_config(path, "--dataset_config")
    if not content and problems.found:
        return []
    file = _File(path, keys, problems)
    file.check_keys("the file", content, {"general", "datasets"})
    of_dataset, of_subset = keys.at(DATASET, SUBSET), keys.at(SUBSET, ONE_SUBSET)
    general = file.table("[general]", content.get("general", {}))
    base = base | file.values("[general]", general, of_dataset)
    found: list[dict[str, Any]] = []
    for number, dataset in enumerate(file.tables("datasets", content.get("datasets")), start=1):
        where = f"[[datasets]] {number}"
        own = {key: value for key, value in dataset.items() if key != "subsets"}
        outer = base | file.values(where, own, of_dataset)
        if outer["resolution"] is None and "resolution" not in {*general, *own}:
            file.note(f"{where} has no resolution. Give it there, in [general], or as --resolution.")
        of_this = []
        for position, subset in enumerate(file.tables(f"subsets of {where}", dataset.get("subsets")), start=1):
            inner = f"[[datasets.subsets]] {position} of {where}"
            values = outer | file.values(inner, subset, of_subset) | {"dataset": number - 1}
            if values["train_data_dir"] is None and not subset.get("image_dir"):
                file.note(f"{inner} lacks image_dir, the folder or address of its images or shards.")
            of_this.append(values)
        if of_this and all(values["is_reg"] for values in of_this):
            file.note(
                f"{where} has only subsets of is_reg = true. Regularisation images are shown as often as the others of "
                "their data set: add a subset to train on, or take is_reg out."
            )
        found += of_this
    return [values for values in found if None not in (values["train_data_dir"], values["resolution"])]


@dataclass(frozen=True)
class _File:
    """A file that is being read, and what was found to be wrong with it."""

    path: Path
    keys: _Keys
    problems: Problems

    def note(self, what: str) -> None:
        """Take note of something that is wrong."""
        self.problems.found.append(f"{self.path}: {what}")

    def table(self, where: str, value: Any) -> dict[str, Any]:
        """A value as a table; an empty one where it is none."""
        if isinstance(value, dict):
            return value
        self.note(f"{where} must be a table of keys and values.")
        return {}

    def tables(self, where: str, value: Any) -> list[dict[str, Any]]:
        """A value as tables; none where it is no list of them."""
        if not isinstance(value, list) or not value:
            self.note(f"there are no {where}. It needs [[datasets]], each with [[datasets.subsets]].")
            return []
        return [self.table(where, entry) for entry in value]

    def check_keys(self, where: str, table: Mapping[str, Any], known: set[str]) -> None:
        """Note the keys that a table may not hold."""
        for key, value in table.items():
            if key in known:
                continue
            if key in self.keys.by_key:
                level = self.keys.by_key[key].at
                self.note(f"{key} does not belong in {where}; it goes into {level.value}.")
            elif key in _NOT_YET:
                if value not in _NOT_YET[key]:
                    off = f", or set it to {json.dumps(_NOT_YET[key][0])}" if _NOT_YET[key] else ""
                    self.note(f"{key} in {where} is not available here yet: take it out{off}.")
            else:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"Did you mean {near[0]}?" if near else f"Known there: {', '.join(sorted(known))}."
                self.note(f"{key} in {where} is not known. {hint}")

    def values(self, where: str, table: Mapping[str, Any], of_level: Mapping[str, Flag]) -> dict[str, Any]:
        """A table's values by the names of their flags; those that can be read.

        Args:
            of_level: the flags that the table may hold.
        """
        self.check_keys(where, table, set(of_level))
        values = {}
        for key, value in table.items():
            if key in of_level:
                try:
                    values[of_level[key].name] = of_level[key].kind.from_file(value)
                except ValueError as error:
                    self.note(f"{key} in {where} {error}.")
        return values
