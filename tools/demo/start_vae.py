"""Initial weights for the demo's VAE, computed by hand: it begins as block averages, and learns from there.

From random weights an AutoencoderKL this narrow takes very long to find colours: its last norm, in groups of two
channels here, removes each group's mean, and with it the absolute colour of a plain area. The initial weights avoid
this as follows. A feature f goes through the norm as the pair (f + kP, -f + kP), where P is a fixed pattern that zero
padding makes at the picture's rim. The pair's mean is fixed, and so, nearly, is its spread s, as kP is much larger than
f; what comes out is (f + kP) / s and (-f + kP) / s, whose difference is 2 f / s. With the negatives of both beside them
the SiLU after the norm is undone, too: silu(y) - silu(-y) = y.

Every residual branch starts at 0, so the encoder averages colours over 8×8 pixels and the decoder repeats them.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

_COLOURS = 3
_RIM = 3  # the decoder's feature that holds the pattern P
_SIGNS = ((1, 1), (-1, 1), (-1, -1), (1, -1))  # of f and of kP in the four channels of a feature
_STRENGTH = 3.0  # standard deviation of kP; features lie in -1 .. 1
_FIRST_LOG_VARIANCE = -5.0
# Brightness, red against green, yellow against blue: orthonormal, and little correlated in pictures.
_MIX_33 = (
    torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]]) / torch.tensor([[3.0], [2.0], [6.0]]).sqrt()
)


@torch.no_grad()
def set_start(vae: Any) -> None:
    """Set the weights of an AutoencoderKL with four levels and 64 channels at both ends, in place.

    Weights that the linear path does not need keep their random values.
    """
    for name, parameter in vae.named_parameters():
        if ".conv2." in name or ".to_out.0." in name:
            parameter.zero_()
    _start_encoder(vae.encoder)
    _start_decoder(vae.decoder)
    latents = vae.config.latent_channels
    vae.quant_conv.weight.copy_(torch.eye(2 * latents)[:, :, None, None])
    vae.quant_conv.bias.zero_()
    vae.quant_conv.weight[:_COLOURS, :_COLOURS, 0, 0] = _MIX_33
    vae.post_quant_conv.weight.copy_(torch.eye(latents)[:, :, None, None])
    vae.post_quant_conv.bias.zero_()
    vae.post_quant_conv.weight[:_COLOURS, :_COLOURS, 0, 0] = _MIX_33.T


def _start_encoder(encoder: Any) -> None:
    _copy_features(encoder.conv_in, _COLOURS)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                _copy_features(resnet.conv_shortcut, _COLOURS)
        if block.downsamplers is not None:
            convolution = block.downsamplers[0].conv
            _copy_features(convolution, _COLOURS)
            for feature in range(_COLOURS):
                # Padded at the right and bottom only: these four taps are the mean of a 2×2 block.
                convolution.weight[feature, feature] = torch.tensor([[0.25, 0.25, 0], [0.25, 0.25, 0], [0, 0, 0]])
    signs_F = torch.tensor([sign for sign, _ in _SIGNS], dtype=torch.float32)
    shortcut = encoder.down_blocks[-1].resnets[0].conv_shortcut
    for feature in range(_COLOURS):
        four = slice(4 * feature, 4 * feature + 4)
        shortcut.weight[four] = 0
        shortcut.bias[four] = 0
        shortcut.weight[four, feature, 0, 0] = signs_F
        for index, (_, sign) in enumerate(_SIGNS):
            _add_rim(encoder.mid_block.resnets[-1], 4 * feature + index, sign * _STRENGTH)
    _read_features(encoder.conv_out)
    log_variance = encoder.conv_out.weight.shape[0] // 2
    encoder.conv_out.weight[log_variance:] = 0
    encoder.conv_out.bias[log_variance:] = _FIRST_LOG_VARIANCE


def _start_decoder(decoder: Any) -> None:
    features = _COLOURS + 1
    _copy_features(decoder.conv_in, _COLOURS)
    decoder.conv_in.weight[_RIM] = 0
    decoder.conv_in.bias[_RIM] = 0
    _add_rim(decoder.mid_block.resnets[-1], _RIM, _STRENGTH)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                _copy_features(resnet.conv_shortcut, features)
        if block.upsamplers is not None:
            _copy_features(block.upsamplers[0].conv, features)
    shortcut = decoder.up_blocks[-1].resnets[0].conv_shortcut
    for feature in range(_COLOURS):
        four = slice(4 * feature, 4 * feature + 4)
        shortcut.weight[four] = 0
        shortcut.bias[four] = 0
        shortcut.weight[four, feature, 0, 0] = torch.tensor([float(sign) for sign, _ in _SIGNS])
        shortcut.weight[four, _RIM, 0, 0] = torch.tensor([float(sign) for _, sign in _SIGNS])
    _read_features(decoder.conv_out)


def _copy_features(convolution: Any, features: int) -> None:
    """Copy inputs 0 .. features - 1 to the same outputs; the other outputs keep their random weights."""
    middle = convolution.kernel_size[0] // 2
    convolution.weight[:features] = 0
    convolution.bias[:features] = 0
    for feature in range(features):
        convolution.weight[feature, feature, middle, middle] = 1


def _add_rim(resnet: Any, channel: int, strength: float) -> None:
    """Make a residual block add the rim pattern, with that standard deviation on 8×8 latents, to a channel.

    The block's first inner channels are made constant; a 3×3 sum over them is smaller where zero padding comes in.
    """
    resnet.norm2.weight[0] = 0
    resnet.norm2.bias[0] = 1
    pattern_HW = _taps_inside(8, 8)
    scale = strength / float(pattern_HW.std(correction=0))
    silu_of_one = 1 / (1 + math.exp(-1))
    resnet.conv2.weight[channel, 0] = scale / silu_of_one
    resnet.conv2.bias[channel] = -scale * float(pattern_HW.mean())


def _taps_inside(height: int, width: int) -> Tensor:
    """The number of taps of a 3×3 kernel inside the picture: 9, 6 at an edge, 4 in a corner."""
    return nn.functional.conv2d(torch.ones(1, 1, height, width), torch.ones(1, 1, 3, 3), padding=1)[0, 0]


def _read_features(convolution: Any) -> None:
    """Invert pair, norm and SiLU: output f is the signed sum over its four channels, times half the spread."""
    half_spread = 0.5 * math.sqrt(_STRENGTH**2 + 0.4)  # 0.4: about the mean square of a feature
    convolution.weight[:_COLOURS] = 0
    convolution.bias[:_COLOURS] = 0
    for feature in range(_COLOURS):
        for index, (sign, _) in enumerate(_SIGNS):
            convolution.weight[feature, 4 * feature + index, 1, 1] = sign * half_spread
