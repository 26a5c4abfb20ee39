"""The layers of a U-Net and of text encoders by the classes and paths under which networks of others look for them.

LyCORIS and sd-scripts' networks walk `named_modules()`, look for containers by the names of diffusers' and sd-scripts'
classes, and name what they store after the paths of the layers in them. A view is a tree of empty modules with those
classes and paths. The layers in it are the network's own: what is done to them through the view is done to the network,
and a layer that is put in another's place (peft) takes that place in the network, too.
"""

from typing import Any

from torch import nn

from library.models.files.key_maps import unet_to_diffusers
from library.models.unet import (
    GEGLU,
    Attention,
    Downsample,
    FeedForward,
    ResBlock,
    SpatialTransformer,
    TransformerBlock,
    UNet,
    Upsample,
)


class NetworkView(nn.Module):
    """One level of a view."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, tuple[nn.Module, str]] = {}  # by name here: a layer's parent, and its name there

    def show(self, name: str, parent: nn.Module, name_there: str) -> None:
        """Have a layer of the network here, by a name of its own."""
        self.add_module(name, parent.get_submodule(name_there))
        self._shown[name] = parent, name_there

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.__dict__.get("_shown", ()):
            parent, name_there = self._shown[name]
            setattr(parent, name_there, value)


# A class here: the field's name of it, and the paths, here and in diffusers, of a layer that lies in it.
_CONTAINERS: dict[type[nn.Module], tuple[str, str, str]] = {
    ResBlock: ("ResnetBlock2D", "in_layers.0", "norm1"),
    SpatialTransformer: ("Transformer2DModel", "norm", "norm"),
    Downsample: ("Downsample2D", "op", "conv"),
    Upsample: ("Upsample2D", "conv", "conv"),
    TransformerBlock: ("BasicTransformerBlock", "norm1", "norm1"),
    Attention: ("CrossAttention", "to_q", "to_q"),
    FeedForward: ("FeedForward", "net.2", "net.2"),
    GEGLU: ("GEGLU", "proj", "proj"),
}
_CLASSES = {kind: type(name, (NetworkView,), {}) for kind, (name, _, _) in _CONTAINERS.items()}


def unet_view(unet: UNet, diffusers_paths: bool) -> NetworkView:
    """The U-Net's layers, in containers of the field's classes.

    Args:
        diffusers_paths: paths as in diffusers (`down_blocks.0.attentions.0.…`), by which sd-scripts names the modules
            of SD 1.x and 2.x; otherwise Stability's (`input_blocks.1.1.…`), by which it names SDXL's.
    """
    layers = {
        old.rpartition(".")[0]: (new if diffusers_paths else old).rpartition(".")[0]
        for old, new in unet_to_diffusers(unet.config).items()
    }
    classes: dict[str, type[NetworkView]] = {}
    for path, module in unet.named_modules():
        for kind, (_, layer, layer_in_diffusers) in _CONTAINERS.items():
            if isinstance(module, kind):
                inside = layer_in_diffusers if diffusers_paths else layer
                classes[layers[f"{path}.{layer}"].removesuffix(f".{inside}")] = _CLASSES[kind]
    view = NetworkView()
    for path, path_here in layers.items():
        level: Any = view
        *above, name = path_here.split(".")
        for depth, part in enumerate(above, start=1):
            if part not in level._modules:
                level.add_module(part, classes.get(".".join(above[:depth]), NetworkView)())
            level = level.get_submodule(part)
        parent, _, name_there = path.rpartition(".")
        level.show(name, unet.get_submodule(parent), name_there)
    return view


def text_encoder_view(text_encoder: nn.Module) -> nn.Module:
    """The text encoder below a level `text_model`, which files have and transformers 5 has left out of CLIPTextModel.

    CLIPTextModelWithProjection has it, and is its own view.
    """
    if hasattr(text_encoder, "text_model"):
        return text_encoder
    view = NetworkView()
    view.add_module("text_model", text_encoder)
    return view
