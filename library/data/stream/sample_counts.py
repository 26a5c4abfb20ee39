"""How many samples the shards of a stream have, where files beside them say so.

webdataset's tools write `sizes.json` in the shards' folder, {"00000.tar": 10000, …}; img2dataset writes
`00000_stats.json` beside each shard, {"successes": 9321, …}.
"""

import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from library.data.index.sidecar import samples_of_stats, whole_number
from library.data.stream.shard_bytes import Patience, ShardError, ShardStream
from library.redaction import shown_address

logger = logging.getLogger(__name__)

_PATIENCE = Patience(timeout_s=10, tries=3)
_MOST_BYTES = 1 << 26
_AT_ONCE = 16


def sample_counts(addresses: Sequence[str], patience: Patience = _PATIENCE) -> list[int | None]:
    """Samples of each shard; None where that is not known. A file that is there and cannot be read is a warning."""
    unknown: list[int | None] = [None] * len(addresses)
    if any(address.startswith("pipe:") for address in addresses):
        return unknown
    damaged: list[str] = []
    folders = sorted({_parts(address)[0] for address in addresses})
    sizes = {folder: _sizes(f"{folder}/sizes.json", patience, damaged) for folder in folders}
    counts = [whole_number(sizes[folder].get(name)) for folder, name, _ in map(_parts, addresses)]
    if None in counts and _of_stats(addresses[0], patience, damaged) is not None:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            counts = list(pool.map(lambda address: _of_stats(address, patience, damaged), addresses))
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        logger.warning("the numbers of samples beside the shards are not known from %s%s", damaged[0], more)
    return counts


def _sizes(address: str, patience: Patience, damaged: list[str]) -> dict[str, Any]:
    content = _read(address, patience)
    try:
        found = json.loads(content) if content is not None else {}
    except (ValueError, RecursionError) as error:
        found, reason = None, str(error)
    else:
        reason = "it is no object"
    if isinstance(found, dict):
        return found
    damaged.append(f"{shown_address(address)}: {reason}")
    return {}


def _of_stats(address: str, patience: Patience, damaged: list[str]) -> int | None:
    folder, name, query = _parts(address)
    file = f"{folder}/{name.removesuffix('.tar')}_stats.json{query}"
    content = _read(file, patience)
    try:
        return None if content is None else samples_of_stats(content)
    except ValueError as error:
        damaged.append(f"{shown_address(file)}: {error}")
        return None


def _parts(address: str) -> tuple[str, str, str]:
    """Folder, name and query string of a shard."""
    path, mark, query = address.partition("?")
    folder, _, name = path.rpartition("/")
    return folder, name, mark + query


def _read(address: str, patience: Patience) -> bytes | None:
    """A file's content; None where there is none to be had."""
    stream, parts, size = ShardStream(address, patience), [], 0
    try:
        while size < _MOST_BYTES and (data := stream.read(1 << 20)):
            parts.append(data)
            size += len(data)
        return b"".join(parts)
    except ShardError:
        return None
    finally:
        stream.close()
