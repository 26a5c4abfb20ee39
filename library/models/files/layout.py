"""How many blocks and layers a model has, as its files tell without a weight being read: for checks at the start."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from library.models.family import Family
from library.models.files.diffusers_config import unet_config_from_diffusers
from library.models.files.identify import family_of_folder, family_of_tensors
from library.models.files.weight_files import read_json, read_names

_MIDDLE_LAYERS = 3  # residual block, transformer, residual block
_UNET = "model.diffusion_model."  # before the names of a single file's U-Net


@dataclass(frozen=True)
class Layout:
    """What is counted; 0 where the names tell nothing.

    Attributes:
        unet_blocks: input and output blocks, the middle block's layers, and one each for what is before and behind.
        encoder_layers: of each text encoder; a single file may hold some that its family does not use.
    """

    family: Family
    unet_blocks: int
    encoder_layers: tuple[int, ...]


def read_layout(source: str, families: Sequence[Family]) -> Layout | None:
    """The layout of a model that is here as a diffusers folder or a .safetensors file; None for any other source.

    Raises:
        InputError: it is no model of the families, or cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _of_folder(path, family_of_folder(path, families))
    if path.is_file() and path.suffix == ".safetensors":
        names = list(read_names(path))
        return _of_names(names, family_of_tensors(dict.fromkeys(names), families, source))
    return None


def _of_folder(folder: Path, family: Family) -> Layout:
    file = folder / "unet" / "config.json"
    unet = unet_config_from_diffusers(read_json(file), str(file))
    levels, blocks = len(unet.channel_mult), unet.num_res_blocks + 1  # with the layer between levels, or the first one
    layers = tuple(
        read_json(folder / spec.folder / "config.json").get("num_hidden_layers", 0) for spec in family.encoders
    )
    return Layout(family, 2 * levels * blocks + _MIDDLE_LAYERS + 2, layers)


def _of_names(names: Sequence[str], family: Family) -> Layout:
    blocks = sum(_numbers(names, rf"{re.escape(_UNET)}{part}\.(\d+)\.") for part in ("input_blocks", "output_blocks"))
    layers = tuple(
        _numbers(names, rf"{re.escape(spec.single_file_prefix)}.*\.(?:layers|resblocks)\.(\d+)\.")
        for spec in family.encoders
    )
    return Layout(family, blocks + _MIDDLE_LAYERS + 2 if blocks else 0, layers)


def _numbers(names: Sequence[str], pattern: str) -> int:
    """How many different numbers the pattern's group takes at names' beginnings."""
    compiled = re.compile(pattern)
    return len({match[1] for name in names if (match := compiled.match(name))})
