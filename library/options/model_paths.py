"""Models that flags name: whether they are there and may be models, as far as files tell without being read."""

from collections.abc import Iterator
from pathlib import Path

from library.errors import InputError
from library.file_kind import weight_form
from library.hub import local_path
from library.options.flag import PathTo

MODELS = (PathTo.MODEL, PathTo.VAE, PathTo.TOKENIZER)
MODEL_FLAG, VAE_FLAG = "--pretrained_model_name_or_path", "--vae"
_PARTS, _WEIGHTS = ("unet", "text_encoder", "text_encoder_2"), (".safetensors", ".bin")  # the VAE may be another
_TOKENIZER_FOLDERS = ("tokenizer", "tokenizer_2")
MODEL_PARTS = (*_PARTS, *_TOKENIZER_FOLDERS, "vae", "scheduler")  # the folders of a pipeline
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


def problems_of_model(kind: PathTo, flag: str, source: str | None) -> Iterator[str]:
    """What is wrong with a flag's model, VAE or tokenizer: it is not there, or is something else.

    A name of the hub is not looked up.
    """
    if source is None:
        return
    try:
        path = local_path(source, flag)
    except InputError as error:
        yield str(error)
        return
    try:
        if path is not None:
            _check(kind, path)
    except InputError as error:
        yield f"{flag} {error}"


def check_pipeline_folder(folder: Path) -> None:
    """Raise InputError where a folder is no diffusers model, or none of a part's weights are weights.

    It names single files that are in the folder.
    """
    if (folder / "unet" / "config.json").is_file():
        for part in _PARTS:
            _check_part(folder / part)
        return
    singles = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".safetensors", ".ckpt"))
    hint = f" There are single files in it; give one of them: {', '.join(singles[:3])}." if singles else ""
    raise InputError(f"{folder}: no diffusers model: it has no unet/config.json.{hint}")


def _check_part(folder: Path) -> None:
    """Raise InputError where all files of weights in a folder are something else: a clone without git-lfs, say."""
    first: InputError | None = None
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in _WEIGHTS:
            try:
                weight_form(path)
                return
            except InputError as error:
                first = first or error
    if first is not None:
        raise first


def check_tokenizer_folder(folder: Path) -> None:
    """Raise InputError where a folder holds no tokenizer, and is no pipeline that holds some."""
    places = [folder, *(folder / name for name in _TOKENIZER_FOLDERS)]
    if not any((place / name).is_file() for place in places for name in _TOKENIZER_FILES):
        raise InputError(f"{folder}: no tokenizer there (tokenizer.json, or vocab.json and merges.txt).")


def _check(kind: PathTo, path: Path) -> None:
    if kind is PathTo.TOKENIZER:
        check_tokenizer_folder(path)
    elif path.is_file():
        weight_form(path)
    elif not path.is_dir():
        raise InputError(f"{path}: it is neither a file nor a folder.")
    elif kind is PathTo.MODEL:
        check_pipeline_folder(path)
    elif not any((place / "config.json").is_file() for place in (path, path / "vae")):
        raise InputError(f"{path}: no VAE there: neither config.json nor vae/config.json.")
