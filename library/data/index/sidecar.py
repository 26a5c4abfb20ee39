"""What files beside a shard say of its samples: sizes and captions in KEY.parquet, their number in KEY_stats.json."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_COLUMNS = ("key", "status", "width", "height", "caption")


@dataclass(frozen=True)
class Facts:
    """What a table or a JSON says of a sample; 0 and None where it says nothing that can be used."""

    width: int = 0
    height: int = 0
    caption: str | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Facts":
        """Out of values of any types."""
        return cls(_pixels(values.get("width")), _pixels(values.get("height")), _caption(values.get("caption")))


@dataclass(frozen=True)
class Sidecar:
    """The successful rows of a shard's parquet.

    Attributes:
        facts: by key; a whole number as its digits.
        known: whether there is one that could be read.
        warnings: sentences about it.
    """

    facts: Mapping[str, Facts] = field(default_factory=dict)
    known: bool = False
    warnings: tuple[str, ...] = ()

    def of_keys(self, keys: Iterable[str]) -> tuple[dict[str, Facts], list[str], str]:
        """The facts of a tar's keys, then the keys that the tar does not have, then a warning or "".

        A key is the parquet's if it is equal, or without its folder, or by its number: tools that take keys for numbers
        drop leading zeros. What fits several is nobody's.
        """
        keys = list(keys)
        found = {key: key for key in keys if key in self.facts}
        if len(found) == len(self.facts):
            return {key: self.facts[key] for key in found}, [], ""
        for spelling in (_base, _number):
            mine = _unique(spelling, (key for key in keys if key not in found))
            theirs = _unique(spelling, self.facts.keys() - found.values())
            found |= {key: theirs[name] for name, key in mine.items() if name in theirs}
        taken = {*found.values(), *keys, *map(_base, keys), *map(_number, keys)}
        missing = [key for key in self.facts if not taken & ({key, _base(key), _number(key)} - {None})]
        strange = bool(keys and missing and not found)
        warning = f"none of the {len(missing)} keys of its parquet file is in the tar: it may be another shard's."
        return {key: self.facts[theirs_] for key, theirs_ in found.items()}, missing, warning if strange else ""


def read_sidecar(path: Path) -> Sidecar:
    """A shard's parquet file; where there is none, or none that can be read, an empty one."""
    if not path.is_file():
        return Sidecar()
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        present = [name for name in _COLUMNS if name in file.schema_arrow.names]
        table = file.read(columns=present)
        columns = {name: table[name].to_pylist() for name in present}
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError) as error:  # ValueError: text not in UTF-8
        reason = " ".join(str(error).split())
        return Sidecar(warnings=(f"its parquet file cannot be read ({reason}); sizes come from the shard itself.",))
    if "key" not in present:
        return Sidecar(warnings=("its parquet file has no column 'key'; sizes come from the shard itself.",))
    nothing = [None] * table.num_rows
    keys, widths, heights, captions = (columns.get(name, nothing) for name in ("key", "width", "height", "caption"))
    statuses = columns.get("status", ["success"] * table.num_rows)
    warnings = []
    if any(captions) and not any(isinstance(caption, str) for caption in captions):
        kind = file.schema_arrow.field("caption").type
        warnings.append(f"the captions in its parquet file are no texts ({kind}) and are not used.")
    facts: dict[str, Facts] = {}
    unsure: set[str] = set()
    for value, status, width, height, caption in zip(keys, statuses, widths, heights, captions, strict=True):
        key = _key(value)
        if key is None or status != "success":
            continue
        own = Facts(_pixels(width), _pixels(height), _caption(caption))
        if key in facts and facts[key] != own:
            unsure.add(key)
        facts.setdefault(key, own)
    if unsure:
        warnings.append(f"{len(unsure)} keys come twice in its parquet file with other values, which are not used.")
        facts |= dict.fromkeys(unsure, Facts())
    return Sidecar(facts, True, tuple(warnings))


def stated_samples(path: Path) -> int | None:
    """How many samples a shard's stats file says that it has; None where there is none that can be read."""
    try:
        return samples_of_stats(path.read_bytes())
    except (OSError, ValueError):
        return None


def samples_of_stats(content: bytes) -> int:
    """The number of samples in img2dataset's NAME_stats.json.

    Raises:
        ValueError: it is no such file.
    """
    try:
        found = json.loads(content)  # of any Unicode encoding, with and without a mark
    except RecursionError as error:
        raise ValueError("it is nested without end") from error
    number = whole_number(found.get("successes")) if isinstance(found, dict) else None
    if number is None:
        raise ValueError("it has no number 'successes'")
    return number


def whole_number(value: object) -> int | None:
    """A number of things that a file gives; None unless it is one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _key(value: object) -> str | None:
    """A key as text; None for what is none."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, str):
        return value
    number = whole_number(value)
    return None if number is None else str(number)


def _base(key: str) -> str:
    return key.rpartition("/")[2]


def _number(key: str) -> str | None:
    base = _base(key)
    return base.lstrip("0") or "0" if base.isdecimal() else None


def _unique(spelling: Any, keys: Iterable[str]) -> dict[str, str]:
    """Keys by how they are spelt, but for spellings that several have."""
    spelt = [(spelling(key), key) for key in keys]
    count = Counter(name for name, _ in spelt)
    return {name: key for name, key in spelt if name is not None and count[name] == 1}


def _pixels(value: object) -> int:
    """A size that a file gives, 0 unless it is a sensible whole number."""
    number = whole_number(value)
    return number if number is not None and 0 < number < 1 << 31 else 0


def _caption(value: object) -> str | None:
    """A caption that a file gives; None if there is none or it is empty."""
    return value if isinstance(value, str) and value.strip() else None
