"""Data sets by hub name: their shards, images and captions downloaded into the hub's cache, then a folder like others.

One process of a machine downloads while the others wait for its lock, not in a collective. The download runs in a
process of its own, which a signal can end at once; whole files stay, so the next start goes on with it.
"""

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path, PurePosixPath

from library.data.index.kept_tables import locked
from library.data.index.rows import COMMON_CAPTION_EXTENSIONS, IMAGE_EXTENSIONS
from library.errors import InputError
from library.hub import Wanted, cached_snapshot, is_hub_name, refuse_missing_path, say_what_is_fetched, snapshot
from library.signals import leave_signals_to_parent

_POLL_S = 0.2
_LOCKS = ".sd_training"  # folder in the hub's cache


def local_data(path: Path, flag: str, caption_extension: str, between: Callable[[], None] = lambda: None) -> Path:
    """A path as it is, or the folder in the cache of the data set of that hub name.

    Args:
        flag: the option that named it, for messages.
        caption_extension: of the caption files that are wanted beside images.
        between: called again and again while something is downloaded here or in another process; may raise.

    Raises:
        InputError: it is a path whose beginning alone is here; the download cannot be had, or holds nothing to train
            on.
    """
    name = path.as_posix()
    if path.exists() or not is_hub_name(name):
        return path
    refuse_missing_path(name, flag)
    way_out = (
        "If a path is meant, check its spelling. Else give a local folder, or download the data set where there is a "
        "network and set HF_HOME to that cache."
    )
    needs = "shards, *.tar, or image files; images in the columns of a parquet are not read"
    wanted = Wanted(name, "dataset", flag, needs, way_out)
    patterns = _patterns(caption_extension)
    say_what_is_fetched(wanted)  # by this process: the one that downloads has no log
    with locked([_lock_folder(name)], between) as waited:
        if waited and (found := cached_snapshot(wanted, patterns)):
            return found
        return _download_in_process(wanted, patterns, between)


def _patterns(caption_extension: str) -> list[str]:
    """Patterns of the files that an index can use, as fnmatch has them."""
    # Two hundred thousand names by their full spelling would be compared with each other.
    extensions = {".tar", ".parquet", caption_extension, *IMAGE_EXTENSIONS, *COMMON_CAPTION_EXTENSIONS}
    return sorted({f"*{spelt}" for extension in extensions for spelt in (extension, extension.upper())})


def _choose(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The patterns, if there is a shard or an image among the files; else none."""
    found = {PurePosixPath(name).suffix.lower() for name in names}
    return list(patterns) if found & {".tar", *IMAGE_EXTENSIONS} else []


def _lock_folder(name: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / _LOCKS / name.replace("/", "--")


def _download_in_process(wanted: Wanted, patterns: Sequence[str], between: Callable[[], None]) -> Path:
    # Spawned, since a process with an accelerator and threads may not be forked.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_download, args=(sender, wanted, patterns), daemon=True)
    process.start()
    sender.close()
    try:
        while not receiver.poll(_POLL_S):
            between()
        result = receiver.recv()
    except EOFError:
        process.join()
        reason = f"the download's process ended with status {process.exitcode}"
        raise InputError(f"{wanted}: {reason}. Run again to go on with it. {wanted.way_out}") from None
    finally:
        process.terminate()
        process.join()
    if isinstance(result, InputError):
        raise result
    return result


def _download(sender: Connection, wanted: Wanted, patterns: Sequence[str]) -> None:
    """In its own process: send the folder, or the error."""
    leave_signals_to_parent()
    try:
        sender.send(snapshot(wanted, lambda names: _choose(names, patterns), cached=patterns))
    except InputError as error:
        sender.send(error)
