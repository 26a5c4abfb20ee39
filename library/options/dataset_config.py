"""`--dataset_config`: a TOML or JSON file with several data sets, each of several subsets, for one run.

A subset is the options of the command line with those of [general], of its [[datasets]] and of its
[[datasets.subsets]] put over them, the inner ones last.
"""

import difflib
import json
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from library.address import location
from library.errors import InputError
from library.options.data import INTERPOLATIONS, DataOptions, SubsetOptions, extension, face_range, separator
from library.options.parser import fill
from library.options.read_config import read_config

Convert = Callable[[Any], Any]


def _whole(least: int) -> Convert:
    def convert(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"must be a whole number of at least {least}")
        return value

    return convert


def _of(kind: type, what: str) -> Convert:
    def convert(value: Any) -> Any:
        if not isinstance(value, kind):
            raise ValueError(f"must be {what}")
        return value

    return convert


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError("must be a number of at least 0")
    return float(value)


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError("must be a number from 0 to 1")
    return float(value)


def _resolution(value: Any) -> tuple[int, int]:
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2:
        raise ValueError("must be a whole number or [width, height]")
    width, height = map(_whole(1), sides)
    return width, height


def _face_range(value: Any) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("must be [least, most]")
    return face_range(",".join(map(str, value)))


def _interpolation(value: Any) -> str:
    if value not in INTERPOLATIONS:
        raise ValueError(f"must be one of {', '.join(INTERPOLATIONS)}")
    return str(value)


_flag, _text = _of(bool, "true or false"), _of(str, "a text")

# Key of the file: (option, conversion), by the innermost level that may hold it.
_SUBSET: dict[str, tuple[str, Convert]] = {
    "image_dir": ("train_data_dir", lambda value: location(_text(value))),
    "metadata_file": ("in_json", lambda value: Path(_text(value))),
    "is_reg": ("is_reg", _flag),
}
_INHERITED: dict[str, tuple[str, Convert]] = {
    "num_repeats": ("dataset_repeats", _whole(1)),
    "class_tokens": ("class_tokens", _text),
    "caption_extension": ("caption_extension", lambda value: extension(_text(value))),
    "shuffle_caption": ("shuffle_caption", _flag),
    "keep_tokens": ("keep_tokens", _whole(0)),
    "keep_tokens_separator": ("keep_tokens_separator", _text),
    "caption_separator": ("caption_separator", lambda value: separator(_text(value))),
    "secondary_separator": ("secondary_separator", _text),
    "caption_prefix": ("caption_prefix", _text),
    "caption_suffix": ("caption_suffix", _text),
    "enable_wildcard": ("enable_wildcard", _flag),
    "token_warmup_min": ("token_warmup_min", _whole(0)),
    "token_warmup_step": ("token_warmup_step", _number),
    "caption_dropout_rate": ("caption_dropout_rate", _share),
    "caption_dropout_every_n_epochs": ("caption_dropout_every_n_epochs", _whole(0)),
    "caption_tag_dropout_rate": ("caption_tag_dropout_rate", _share),
    "flip_aug": ("flip_aug", _flag),
    "color_aug": ("color_aug", _flag),
    "random_crop": ("random_crop", _flag),
    "face_crop_aug_range": ("face_crop_aug_range", _face_range),
    "alpha_mask": ("alpha_mask", _flag),
    "resize_interpolation": ("resize_interpolation", _interpolation),
    "validation_split": ("validation_split", _share),
    "validation_seed": ("validation_seed", _whole(0)),
}
_DATASET: dict[str, tuple[str, Convert]] = {
    "batch_size": ("train_batch_size", _whole(1)),
    "resolution": ("resolution", _resolution),
    "enable_bucket": ("enable_bucket", _flag),
    "min_bucket_reso": ("min_bucket_reso", _whole(1)),
    "max_bucket_reso": ("max_bucket_reso", _whole(1)),
    "bucket_reso_steps": ("bucket_reso_steps", _whole(1)),
    "bucket_no_upscale": ("bucket_no_upscale", _flag),
}
# What sd-scripts takes and this project does not do yet: only the value that leaves it off.
_NOT_YET: dict[str, tuple[Any, ...]] = {
    "conditioning_data_dir": (),
    "cache_info": (False,),
    "network_multiplier": (1,),
}


def data_options(args: Namespace) -> DataOptions:
    """The options of a run's data from the command line, and from the file of --dataset_config if there is one.

    Raises:
        InputError: no data is named, or it is named twice; or as read_dataset_config.
    """
    names = [field.name for field in fields(SubsetOptions)]
    no_flags: dict[str, Any] = {"class_tokens": "", "is_reg": False, "dataset": 0}
    base = {name: getattr(args, name) for name in names if name not in no_flags} | no_flags
    base["train_batch_size"] = args.train_batch_size
    if args.dataset_config is None:
        for name in ("train_data_dir", "resolution"):
            if base[name] is None:
                raise InputError(f"--{name} is missing; give it, or --dataset_config.")
        found = [base]
        if args.reg_data_dir is not None:
            found.append(base | {"train_data_dir": args.reg_data_dir, "in_json": None, "is_reg": True})
    else:
        for name in ("train_data_dir", "in_json", "reg_data_dir"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name} and --dataset_config are two places of the data: give one of them.")
        found = read_dataset_config(args.dataset_config, base)
    subsets = tuple(SubsetOptions(**{name: values[name] for name in names}) for values in found)
    for name in ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"):
        if getattr(args, name) is not None and not any(subset.validation_split for subset in subsets):
            raise InputError(f"--{name} has nothing to act on without --validation_split; add that, or leave it out.")
    return fill(DataOptions, args, subsets=subsets, train_batch_size=found[0]["train_batch_size"])


def read_dataset_config(path: Path, base: dict[str, Any]) -> list[dict[str, Any]]:
    """The options of each subset, by their names on the command line.

    Args:
        base: those of the command line.

    Raises:
        InputError: the file cannot be read, or a key or value in it is not known, not right or not available yet.
    """
    content = read_config(path, "--dataset_config")
    _check_keys(path, "the file", content, {"general", "datasets"})
    general = _table(path, "[general]", content.get("general", {}))
    base = base | _values(path, "[general]", general, _DATASET | _INHERITED)
    found: list[dict[str, Any]] = []
    for number, dataset in enumerate(_tables(path, "datasets", content.get("datasets")), start=1):
        where = f"[[datasets]] {number}"
        own = {key: value for key, value in dataset.items() if key != "subsets"}
        outer = base | _values(path, where, own, _DATASET | _INHERITED)
        if outer["resolution"] is None:
            raise InputError(f"{path}: {where} has no resolution. Give it there, in [general], or as --resolution.")
        for place, subset in enumerate(_tables(path, f"subsets of {where}", dataset.get("subsets")), start=1):
            inner = f"[[datasets.subsets]] {place} of {where}"
            if "image_dir" not in subset:
                raise InputError(f"{path}: {inner} lacks image_dir, the folder or address of its images or shards.")
            found.append(outer | _values(path, inner, subset, _SUBSET | _INHERITED) | {"dataset": number - 1})
        if all(values["is_reg"] for values in found if values["dataset"] == number - 1):
            raise InputError(
                f"{path}: {where} has only subsets of is_reg = true. Regularisation images are shown as often as the "
                "others of their data set: add a subset to train on, or take is_reg out."
            )
    if len(sizes := {values["train_batch_size"] for values in found}) > 1:
        raise InputError(
            f"{path}: batch_size differs between the data sets ({', '.join(map(str, sorted(sizes)))}). A run has one "
            "batch size: give the same for all."
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


def _check_keys(path: Path, where: str, table: dict[str, Any], known: set[str]) -> None:
    for key, value in table.items():
        if key in known:
            continue
        if key in _NOT_YET:
            if value in _NOT_YET[key]:
                continue
            off = f", or set it to {json.dumps(_NOT_YET[key][0])}" if _NOT_YET[key] else ""
            raise InputError(f"{path}: {key} in {where} is not available here yet: take it out{off}.")
        if key in _SUBSET or key in _INHERITED or key in _DATASET:
            level = "[[datasets.subsets]]" if key in _SUBSET else "[[datasets]] or [general]"
            raise InputError(f"{path}: {key} does not belong in {where}; it goes into {level}.")
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known there: {', '.join(sorted(known))}."
        raise InputError(f"{path}: {key} in {where} is not known. {hint}")


def _values(path: Path, where: str, table: dict[str, Any], keys: dict[str, tuple[str, Convert]]) -> dict[str, Any]:
    """A table's values by the names of their options."""
    _check_keys(path, where, table, set(keys))
    values = {}
    for key, value in table.items():
        if key in keys:
            option, convert = keys[key]
            try:
                values[option] = convert(value)
            except (ValueError, TypeError, ArgumentTypeError) as error:
                raise InputError(f"{path}: {key} in {where} {error}, got {value!r:.80}.") from error
    return values
