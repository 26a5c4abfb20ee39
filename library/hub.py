"""Repositories of the Hugging Face hub: files are downloaded once into its cache (HF_HOME) and read from there.

HF_ENDPOINT chooses another server of the same interface, HF_HUB_OFFLINE=1 keeps to the cache, HF_TOKEN or `hf auth
login` gives access to what is not public.
"""

import contextlib
import errno
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from library.errors import InputError
from library.redaction import redacted

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# No repository is called so: a text that ends like this is the path of a file.
_OF_FILES = (
    *(".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".onnx", ".tar", ".gz", ".tgz", ".zip", ".parquet"),
    *(".json", ".jsonl", ".csv", ".toml", ".yaml", ".txt"),
)
_TIMEOUT_S = 20


@dataclass(frozen=True)
class Wanted:
    """A request to the hub.

    Attributes:
        name: owner/name.
        kind: "model" or "dataset".
        flag: the option that named the repository, for messages.
        needs: the files that training needs, in words.
        way_out: what the user can do instead; it ends all messages.
    """

    name: str
    kind: str
    flag: str
    needs: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.flag} {self.name}"


def is_hub_name(source: str) -> bool:
    """True if a text has the form owner/name; the caller must first check that no such path exists."""
    spelt = _NAME.fullmatch(source) is not None and "--" not in source and ".." not in source
    return spelt and source[-1] not in ".-" and PurePosixPath(source).suffix.lower() not in _OF_FILES


def refuse_missing_path(source: str, flag: str) -> None:
    """Refuse a text of the form owner/name that is meant as a path: OWNER is here, and NAME is not in it.

    A data disk that is not mounted leaves such a path (data/laion), and the hub may have a stranger's repository of
    the name.

    Raises:
        InputError
    """
    owner, _, name = source.partition("/")
    if os.path.lexists(owner):
        raise InputError(
            f"{flag} {source}: '{owner}' is here and has no '{name}'. Check spelling and that the disk is mounted. "
            f"It is not looked for on the Hugging Face hub, since it reads as a path; if the hub's {source} is meant, "
            f"download it and give its folder, or start where there is no '{owner}'."
        )


def say_what_is_fetched(wanted: Wanted) -> None:
    """Log what comes from where, before the first byte."""
    from huggingface_hub import constants

    what = f"{wanted}: no such path here; it is taken as the {wanted.kind} repository of that name"
    if constants.HF_HUB_OFFLINE:
        logger.info("%s in the hub's cache, %s", what, constants.HF_HUB_CACHE)
        return
    place = f"{redacted(constants.ENDPOINT)}/{'datasets/' * (wanted.kind == 'dataset')}{wanted.name}"
    logger.info("%s: %s is fetched into %s, as far as it is not there yet", what, place, constants.HF_HUB_CACHE)


def local_path(source: str, flag: str) -> Path | None:
    """A file or folder that a flag names; None for what can only be a repository of the hub (owner/name).

    Raises:
        InputError: nothing is there, and the text is no name of a repository, or names a place in a folder that is
            here: an unmounted disk or a misspelt path is not looked up among strangers' repositories.
    """
    path = Path(source).expanduser()
    try:
        if source.strip() and path.exists():
            return path
        dead = path.readlink() if path.is_symlink() else None
    except OSError as error:
        raise InputError(f"{flag} {source}: cannot be looked at ({error.strerror}).") from error
    if not source.strip():
        raise InputError(f"{flag} is empty (a variable that is not set?). Give a path, or a hub name (owner/name).")
    if dead is not None:
        raise InputError(f"{flag} {source}: it is a link to {dead}, and nothing is there.")
    if not is_hub_name(source):
        raise InputError(f"{flag} {source}: no such file or folder, and not spelt as a hub name (owner/name).")
    refuse_missing_path(source, flag)
    return None


def snapshot(wanted: Wanted, choose: Callable[[Iterable[str]], list[str]], cached: Sequence[str]) -> Path:
    """The folder of a hub repository in the local cache, with the chosen files in it.

    Args:
        choose: returns the names, or patterns of names, of the needed files out of all names in the repository.
        cached: patterns of files that a cached copy must have completely to be used when the hub cannot be reached;
            without patterns any cached copy is used.

    Raises:
        InputError: there is no such repository, it needs a licence to be accepted, it has none of the files, or it is
            neither cached nor to be reached.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    say_what_is_fetched(wanted)
    endpoint = redacted(constants.ENDPOINT)
    try:
        # Not list_repo_files: it tries again for 23 s when there is no network.
        ask = HfApi().dataset_info if wanted.kind == "dataset" else HfApi().model_info
        info = ask(wanted.name, timeout=_TIMEOUT_S)
        names = [file.rfilename for file in info.siblings or ()]
    except GatedRepoError as error:
        raise InputError(
            f"{wanted}: the hub wants you to accept its licence and log in first (hf auth login). {wanted.way_out}"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{wanted}: no file or folder of this name here, and no such {wanted.kind} repository at "
            f"{endpoint} (or it is private: hf auth login). {wanted.way_out}"
        ) from error
    except Exception as error:
        # Offline, a proxy, a server's fault: the client raises many kinds. A copy in the cache serves for all of them.
        found = cached_snapshot(wanted, cached)
        if found is not None:
            return found
        raise InputError(
            f"{wanted}: no file or folder of this name here, not in the hub's cache ({constants.HF_HUB_CACHE}), and "
            f"{endpoint} cannot be reached ({_reason(error)}). {wanted.way_out}"
        ) from error
    chosen = choose(names)
    if not chosen:
        raise InputError(
            f"{wanted}: the {wanted.kind} at {endpoint} has none of the files needed ({wanted.needs}). {wanted.way_out}"
        )
    try:
        return Path(snapshot_download(wanted.name, repo_type=wanted.kind, allow_patterns=chosen))
    except Exception as error:
        with contextlib.suppress(Exception):  # the same copy may be whole in the cache
            return Path(
                snapshot_download(wanted.name, repo_type=wanted.kind, local_files_only=True, allow_patterns=chosen)
            )
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"{wanted}: no space left in the hub's cache ({constants.HF_HUB_CACHE}). Make room and run again, "
                f"which goes on with the download, or set HF_HOME to a larger disk. {wanted.way_out}"
            ) from error
        raise InputError(
            f"{wanted}: the download broke off ({_reason(error)}). Run again to go on with it. {wanted.way_out}"
        ) from error


def cached_snapshot(wanted: Wanted, patterns: Sequence[str]) -> Path | None:
    """The repository's folder in the cache if it has all files of these patterns; the hub is not contacted."""
    from huggingface_hub import snapshot_download

    with contextlib.suppress(Exception):
        return Path(
            snapshot_download(wanted.name, repo_type=wanted.kind, local_files_only=True, allow_patterns=list(patterns))
        )
    return None


def _reason(error: Exception) -> str:
    """The first line of an error's text, or its kind; the addresses in it may be signed."""
    text = redacted(str(error).strip())
    return text.splitlines()[0] if text else type(error).__name__
