"""Of a model's repository on the Hugging Face hub, the files that training needs."""

from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from library import hub
from library.models.files.weight_files import choose_weights, files_of

# What options of models take, in words.
MODEL, TOKENIZER = (
    "a diffusers folder or a single file",
    "a folder with tokenizer.json, or with vocab.json and merges.txt",
)
# The components of a pipeline with weights, as far as it has them; "" is a repository that holds one at its root.
_COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


def pipeline_files(names: Iterable[str]) -> list[str]:
    """Of a pipeline repository's files, those that training needs: one form of each component's weights."""
    names = list(names)
    small = {"model_index.json", "scheduler/scheduler_config.json"}
    small |= {f"{folder}/{file}" for folder in ("tokenizer", "tokenizer_2") for file in _TOKENIZER_FILES}
    return [name for name in names if name in small] + _component_files(names, _COMPONENTS)


def pipeline_tokenizer_files(names: Iterable[str]) -> list[str]:
    """Of a pipeline repository's files, those of its tokenizers, and those that tell its family."""
    return [name for name in pipeline_files(names) if name.startswith("tokenizer") or name.endswith(".json")]


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


def snapshot(name: str, flag: str, choose: Callable[[Iterable[str]], list[str]], takes: str = MODEL) -> Path:
    """The folder of a model's repository in the local cache, with the chosen files in it.

    Args:
        name: owner/name.
        flag: the option that named it, for messages.
        choose: from all file names of the repository those that are needed.
        takes: what the option takes instead.

    Raises:
        InputError: as library.hub.snapshot.
    """
    way_out = (
        f"Give {flag} a local path instead ({takes}), or download it where there is a network and set HF_HOME to that "
        "cache."
    )
    needs = TOKENIZER if takes == TOKENIZER else "weights with their configuration"
    return hub.snapshot(hub.Wanted(name, "model", flag, needs, way_out), choose, cached=())
