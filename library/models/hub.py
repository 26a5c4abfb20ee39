"""Model names of the Hugging Face hub: downloaded once into its cache (HF_HOME), read from there when offline.

HF_ENDPOINT chooses another server of the same interface, HF_HUB_OFFLINE=1 keeps to the cache.
"""

import contextlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from library.errors import InputError
from library.models.weight_files import choose_weights, files_of

# The components of an SDXL pipeline with weights; "" is a repository that holds one component at its root.
_COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TIMEOUT_S = 20
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


def is_hub_name(source: str) -> bool:
    """True for what is spelt as owner/name; the caller has looked for a path of that spelling before."""
    return _NAME.fullmatch(source) is not None


def pipeline_files(names: Iterable[str]) -> list[str]:
    """Of a pipeline repository's files, those that training needs: one form of each component's weights."""
    names = list(names)
    small = {"model_index.json", "scheduler/scheduler_config.json"}
    small |= {f"{folder}/{file}" for folder in ("tokenizer", "tokenizer_2") for file in _TOKENIZER_FILES}
    return [name for name in names if name in small] + _component_files(names, _COMPONENTS)


def vae_files(names: Iterable[str]) -> list[str]:
    """Of a repository's files, those of its VAE: in `vae/` where there is one, else at the root."""
    names = list(names)
    return _component_files(names, ("vae",) if "vae/config.json" in names else ("",))


def tokenizer_files(names: Iterable[str]) -> list[str]:
    """Of a repository's files, those of the tokenizer at its root, with the configuration it may refer to."""
    return [name for name in names if name in (*_TOKENIZER_FILES, "config.json")]


def _component_files(names: list[str], folders: Iterable[str]) -> list[str]:
    """The configuration and the chosen weights in each folder ("" is the root), as far as they exist."""
    wanted = []
    for folder in folders:
        inside = [PurePosixPath(name).name for name in names if str(PurePosixPath(name).parent) == (folder or ".")]
        chosen = choose_weights(inside)
        files = ["config.json", *(files_of(chosen, inside) if chosen else [])]
        wanted += [f"{folder}/{name}".lstrip("/") for name in inside if name in files]
    return wanted


def snapshot(name: str, flag: str, choose: Callable[[Iterable[str]], list[str]]) -> Path:
    """The folder of a hub repository in the local cache, with the chosen files in it.

    Args:
        name: owner/name.
        flag: the option that named it, for messages.
        choose: from all file names of the repository those that are needed.

    Raises:
        InputError: there is no such repository, it needs a licence to be accepted, or it is neither cached nor to be
            reached.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    way_out = (
        f"Give {flag} a local path instead (a diffusers folder or a single file), or download it where there is a "
        f"network and set HF_HOME to that cache."
    )
    try:
        # Not list_repo_files: it tries again for 23 s when there is no network.
        names = [file.rfilename for file in HfApi().model_info(name, timeout=_TIMEOUT_S).siblings or ()]
    except GatedRepoError as error:
        raise InputError(
            f"{flag} {name}: the hub wants you to accept its licence and log in first (hf auth login). {way_out}"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{flag} {name}: no file or folder of this name here, and no such repository at {constants.ENDPOINT} "
            f"(or it is private). {way_out}"
        ) from error
    except Exception as error:
        # Offline, a proxy, a server's fault: the client raises many kinds. A copy in the cache serves for all of them.
        return _cached(name, flag, error, way_out)
    wanted = choose(names)
    if not wanted:
        raise InputError(
            f"{flag} {name}: the repository at {constants.ENDPOINT} has none of the files needed. {way_out}"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        with contextlib.suppress(Exception):  # the same copy may be whole in the cache
            return Path(snapshot_download(name, local_files_only=True, allow_patterns=wanted))
        raise InputError(
            f"{flag} {name}: the download broke off ({_reason(error)}). Run again to go on with it. {way_out}"
        ) from error


def _cached(name: str, flag: str, cause: Exception, way_out: str) -> Path:
    """The repository's folder in the cache, whatever of it is there."""
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=[]))
    except Exception as error:
        raise InputError(
            f"{flag} {name}: no file or folder of this name here, not in the hub's cache ({constants.HF_HUB_CACHE}), "
            f"and {constants.ENDPOINT} cannot be reached ({_reason(cause)}). {way_out}"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an error's text, or its kind."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
