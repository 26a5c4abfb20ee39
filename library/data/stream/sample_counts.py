"""How many samples the shards of a stream have, where files beside them say so.

webdataset's tools write `sizes.json` in the shards' folder, {"00000.tar": 10000, …}; img2dataset writes
`00000_stats.json` beside each shard, {"successes": 9321, …}.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from library.data.stream.shard_bytes import Patience, ShardError, ShardStream

_PATIENCE = Patience(timeout_s=10, tries=3)
_MOST_BYTES = 1 << 26
_AT_ONCE = 16


def sample_count(addresses: Sequence[str], patience: Patience = _PATIENCE) -> int | None:
    """Samples of all shards together; None unless all are known."""
    if any(address.startswith("pipe:") for address in addresses):
        return None
    folders = sorted({_parts(address)[0] for address in addresses})
    sizes = {folder: _read(f"{folder}/sizes.json", patience) for folder in folders}
    counts = [_whole(sizes[folder].get(name)) for folder, name, _ in map(_parts, addresses)]
    if None not in counts:
        return _sum(counts)
    if _of_stats(addresses[0], patience) is None:
        return None
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        counts = list(pool.map(lambda address: _of_stats(address, patience), addresses))
    return None if None in counts else _sum(counts)


def _sum(counts: Sequence[int | None]) -> int | None:
    return sum(count for count in counts if count is not None) or None


def _of_stats(address: str, patience: Patience) -> int | None:
    folder, name, query = _parts(address)
    return _whole(_read(f"{folder}/{name.removesuffix('.tar')}_stats.json{query}", patience).get("successes"))


def _parts(address: str) -> tuple[str, str, str]:
    """Folder, name and query string of a shard."""
    path, mark, query = address.partition("?")
    folder, _, name = path.rpartition("/")
    return folder, name, mark + query


def _read(address: str, patience: Patience) -> dict[str, object]:
    """The object in a JSON file; an empty one where there is none to be had."""
    stream, parts, size = ShardStream(address, patience), [], 0
    try:
        while size < _MOST_BYTES and (data := stream.read(1 << 20)):
            parts.append(data)
            size += len(data)
        found = json.loads(b"".join(parts))
    except (ShardError, ValueError, RecursionError):
        return {}
    finally:
        stream.close()
    return found if isinstance(found, dict) else {}


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
