"""A training state on disk: the files of its folder, and the manifest by which a reader knows that it is whole.

    NAME-state/
        manifest.json                               size and SHA-256 of every other file, the format's version
        state.json                                  `StateInfo`, and how many ranks wrote
        rows.json                                   by parameter [rank, first row, rows]: which rank has which
        OBJECT.safetensors, OBJECT.json             what all ranks share: tensors, and the structure around them
        rank00000-of-00004.OBJECT.safetensors, .json    what each rank has of its own

Nothing in it is a pickle. SHA-256 is the fastest strong hash of hashlib where the processor has instructions for it
(bench/state_save.py).
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from library.errors import InputError
from library.tensor_file import tensor_file
from library.training.state.lineage import Lineage, lineage_of
from library.training.state.tensor_rows import Rows
from library.training.state.tree import unpack

logger = logging.getLogger(__name__)

FORMAT = 2  # of the folder; a reader refuses any other
MANIFEST, INFO, ROWS = "manifest.json", "state.json", "rows.json"
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class StateInfo:
    """Where a run stood and what it was started with.

    Attributes:
        step: optimizer steps done.
        seed: of the run.
        plan: the data plan's fingerprint.
        options: plain values by flag.
        versions: of the packages that computed.
        metrics: what logging needs to go on: sums, averages, counts.
        lineage: which start of the run wrote it, and what that one went on from.
        identity: what is learned (`library.training.identity`).
    """

    step: int
    seed: int
    plan: str
    options: Mapping[str, Any]
    versions: Mapping[str, str]
    metrics: Mapping[str, Any]
    lineage: Lineage
    identity: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """A state. Tensors are backed by the files: copy before the folder's file system goes away.

    Attributes:
        whole: by name, what all ranks shared.
        own: what each rank of the run that wrote had of its own, by name; its files are opened when it is asked for.
        rows: which rank wrote which rows, by parameter.
    """

    info: StateInfo
    whole: Mapping[str, Any]
    own: Sequence[Mapping[str, Any]]
    rows: Mapping[str, Sequence[Rows]]


@dataclass(frozen=True)
class Entry:
    """One file in the manifest."""

    bytes: int
    sha256: str


def rank_prefix(rank: int, ranks: int) -> str:
    """'rank00000-of-00004.'"""
    return f"rank{rank:05d}-of-{ranks:05d}."


def write_json(path: Path, content: Any) -> Entry:
    """A new JSON file, fsynced."""
    return _write(path, [json.dumps(content, indent=1).encode()])


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Entry:
    """A new safetensors file of contiguous CPU tensors, fsynced; written from their memory, without another copy.

    Raises:
        TypeError: a type of number that the format does not have.
    """
    start_of_file, content = tensor_file(tensors, {})
    return _write(path, chain([start_of_file], content))


def write_manifest(folder: Path, entries: Mapping[str, Entry]) -> None:
    """The manifest, fsynced; with it the folder is a state."""
    write_json(
        folder / MANIFEST, {"format": FORMAT, "files": {name: asdict(entries[name]) for name in sorted(entries)}}
    )


def read_info(folder: Path) -> StateInfo:
    """`state.json` alone, not verified.

    Raises:
        InputError: it is not there or not what it should be.
    """
    return _info(_read_json(folder / INFO), folder)


def manifest_digest(folder: Path) -> str:
    """A digest of the manifest, and so of every file that it lists.

    Raises:
        InputError: it cannot be read.
    """
    return _hash(folder / MANIFEST)


def verify(folder: Path) -> None:
    """Check that a state is whole: every file of the manifest has its size and hash.

    Raises:
        InputError: it is not, or a newer version has written it; the message names file and reason.
    """
    entries = _read_manifest(folder)
    total_bytes = sum(entry.bytes for entry in entries.values())
    logger.info("checking the files of training state %s, %.2f GiB", folder, total_bytes / 2**30)
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{folder}: the file {name} is missing. Resume from another state.")
        size = path.stat().st_size
        if size != entry.bytes:
            raise InputError(
                f"{path}: cut off or grown ({size} bytes instead of {entry.bytes}). Resume from another state."
            )
    for name, entry in entries.items():  # after all sizes, which take no time
        if _hash(folder / name) != entry.sha256:
            raise InputError(
                f"{folder / name}: its bytes have changed since it was written. Resume from another state."
            )


def read_state(folder: Path, *, verified: bool = False) -> State:
    """Read a state; its tensors are mapped, so what is not used is not loaded.

    Args:
        verified: True where `verify` was called on it before, by this or another rank.

    Raises:
        InputError: it is not whole. What ranks have of their own may raise it later, where it is asked for.
    """
    if not verified:
        verify(folder)
    content = _read_json(folder / INFO)
    info, ranks = _info(content, folder), int(content.get("ranks", 1))
    stems = [name.removesuffix(".json") for name in _read_manifest(folder) if name.endswith(".json")]
    own = [_Objects(folder, rank_prefix(rank, ranks), stems) for rank in range(ranks)]
    not_shared = {Path(INFO).stem, Path(ROWS).stem, *(objects.prefix + name for objects in own for name in objects)}
    shared = [stem for stem in stems if stem not in not_shared]
    return State(info, {stem: _read_object(folder, stem) for stem in shared}, own, _read_rows(folder))


def _read_rows(folder: Path) -> dict[str, list[Rows]]:
    try:
        return {name: [Rows(*map(int, one)) for one in those] for name, those in _read_json(folder / ROWS).items()}
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder / ROWS}: damaged ({error}). Resume from another state.") from error


class _Objects(Mapping[str, Any]):
    """What one rank wrote of its own, by name, each read once it is asked for."""

    def __init__(self, folder: Path, prefix: str, stems: Iterable[str]) -> None:
        """
        Args:
            prefix: of this rank's files.
            stems: of all files.
        """
        self.prefix, self._folder = prefix, folder
        self._read: dict[str, Any] = {}
        self._names = [stem.removeprefix(prefix) for stem in stems if stem.startswith(prefix)]

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._read:
            self._read[name] = _read_object(self._folder, self.prefix + name)
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _read_object(folder: Path, stem: str) -> Any:
    from safetensors import SafetensorError, safe_open

    path = folder / f"{stem}.safetensors"
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return unpack(tensors, _read_json(folder / f"{stem}.json"))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}). Resume from another state.") from error


def _info(content: Mapping[str, Any], folder: Path) -> StateInfo:
    try:
        values = {field.name: content[field.name] for field in fields(StateInfo)}
    except KeyError as missing:
        raise InputError(f"{folder / INFO}: lacks {missing}. Resume from another state.") from missing
    try:
        info = StateInfo(**{**values, "lineage": lineage_of(values["lineage"])})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / INFO}: lineage: damaged ({error}). Resume from another state.") from error
    if type(info.step) is not int or info.step < 0:
        raise InputError(f"{folder / INFO}: step is {info.step!r}, no number of steps. Resume from another state.")
    return info


def _read_manifest(folder: Path) -> dict[str, Entry]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; --resume takes the folder of a training state (NAME-state).")
    content = _read_json(folder / MANIFEST)
    version = content.get("format")
    if isinstance(version, int) and version != FORMAT:
        raise InputError(
            f"{folder}: written by {'a newer' if version > FORMAT else 'an older'} version (format {version}, this one "
            f"reads {FORMAT}). Resume with that version, or from another state."
        )
    try:
        entries = {str(name): Entry(int(e["bytes"]), str(e["sha256"])) for name, e in content["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{folder / MANIFEST}: damaged ({error}). Resume from another state.") from error
    strange = [name for name in entries if name != Path(name).name or name == MANIFEST]
    if strange or INFO not in entries or version != FORMAT:
        raise InputError(
            f"{folder / MANIFEST}: damaged ({', '.join(strange) or 'no list'}). Resume from another state."
        )
    return entries


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path.parent}: no {path.name} in it, so it is no complete training state.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({error}). Resume from another state.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: damaged (no JSON object). Resume from another state.")
    return content


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> Entry:
    """A new file, hashed on the way and fsynced. Hashing, writing and fsync let other threads run meanwhile."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for piece in _pieces(parts):
            digest.update(piece)
            size += len(piece)
            written = 0
            while written < len(piece):
                written += os.write(descriptor, piece[written:])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Entry(size, digest.hexdigest())


def _pieces(parts: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), _CHUNK_BYTES):
            yield view[start : start + _CHUNK_BYTES]


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while length := file.readinto(buffer):
                digest.update(buffer[:length])
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}). Resume from another state.") from error
    return digest.hexdigest()
