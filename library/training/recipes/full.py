"""Training all of the U-Net, and the text encoders that are asked for: pre-training, fine-tuning, DreamBooth.

Legend: B batch, C channels, H W latent rows and columns.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library import device as devices
from library.data.micro_batch import MicroBatch
from library.errors import InputError
from library.models.denoiser import Denoiser
from library.models.files.modelspec import modelspec
from library.models.files.write import save_model, saved_bytes
from library.models.model import Model
from library.models.text import TextStates, Tokens
from library.models.unet import UNet
from library.options.optimizer import wrong_number_of_rates
from library.options.training import TrainingOptions
from library.training.engine.optimizers import ParameterGroup
from library.training.engine.precision import SAVE_DTYPES

logger = logging.getLogger(__name__)


class Full:
    """The U-Net trains, whole or by block, and each text encoder that is asked for; a rate of 0 freezes."""

    name = "full"

    def __init__(self, options: TrainingOptions, model: Model) -> None:
        """The module is made of the model's own networks."""
        self._model, self._saving, self._resolution = model, options.saving, options.data.resolution
        self._unet_rate = options.optimizer.learning_rate
        self._encoder_rates = options.text_encoders.rates(self._unet_rate) or (0.0,) * len(model.text_encoders)
        self._save_as = options.saving.form(options.model.pretrained_model_name_or_path)
        self.module = Denoiser(
            model,
            [rate > 0 for rate in self._encoder_rates],
            gradient_checkpointing=options.memory.gradient_checkpointing,
            clip_skip=options.clip_skip,
        )
        self._block_rates = options.optimizer.block_rates
        self._unet_groups = self._groups_of_unet(self._block_rates)

    def _groups_of_unet(self, block_rates: Sequence[float]) -> list[ParameterGroup]:
        """The U-Net's groups, none where it is frozen. Without anything else that trains it stays at rate 0."""
        unet = self.module.unet
        if any(block_rates) or (self._unet_rate and not block_rates):
            return block_groups(unet, block_rates) or [ParameterGroup("unet", list(unet.parameters()), self._unet_rate)]
        if any(self._encoder_rates):
            unet.requires_grad_(False)
            return []
        logger.warning(
            "all learning rates are 0: nothing is learned, and checkpoints are the model as it was loaded; give "
            "--learning_rate, or --train_text_encoder with a rate"
        )
        return [ParameterGroup("unet", list(unet.parameters()), 0.0)]

    def groups(self) -> Sequence[ParameterGroup]:
        """The U-Net's parameters, whole or by block, and those of each text encoder that trains."""
        encoders = self.module.trained_encoders
        several = len(encoders) > 1
        names = [f"text_encoder{number + 1}" if several else "text_encoder" for number in range(len(encoders))]
        return [
            *self._unet_groups,
            *(
                ParameterGroup(name, trained, rate)
                for name, trained, rate in zip(names, encoders, self._encoder_rates, strict=True)
                if trained
            ),
        ]

    def predict(
        self, module: Any, noisy_BCHW: Tensor, t_B: Tensor, text: Tokens | TextStates, batch: MicroBatch
    ) -> Tensor:
        """The U-Net's prediction under the batch's captions and sizes."""
        return module(noisy_BCHW, t_B, text, devices.upload(batch.size_ids_B6, noisy_BCHW.device))

    def save(self, stem: str, module: Any) -> Path:
        """Write the whole model: what trains as `module` has it, what is frozen as it was loaded."""
        encoders = list(self._model.text_encoders)
        for place, trained in enumerate(self.module.trained_encoders):
            if trained:
                encoders[place] = module.text_encoders[place]
        return save_model(
            replace(self._model, unet=module.unet, text_encoders=tuple(encoders), originals=self.module.originals),
            self._saving.output_dir / stem,
            self._save_as,
            self._save_dtype,
            modelspec(
                title=stem,
                resolution_wh_px=self._resolution,
                prediction_type=self._model.prediction_type,
            ),
        )

    def saved_bytes(self) -> int:
        """What all parts of the model take in the precision that they are saved in."""
        return saved_bytes(self._model, self._save_dtype)

    def lines(self) -> list[str]:
        """The form and the precision of checkpoints."""
        encoders = [f"text encoder {number}" for number in range(1, len(self._encoder_rates) + 1)]
        frozen = [name for name, rate in zip(encoders, self._encoder_rates, strict=True) if not rate]
        if not self._unet_groups:
            frozen = ["the U-Net", *frozen]
        elif blocks := [f"{block:02d}" for block, rate in enumerate(self._block_rates) if not rate]:
            frozen = [f"blocks {' '.join(blocks)} of the U-Net", *frozen]
        return [
            f"checkpoints as: {self._save_as}, precision: {self._saving.save_precision or 'float'}",
            *([f"frozen: {', '.join(frozen)}"] if frozen else []),
        ]

    @property
    def _save_dtype(self) -> torch.dtype | None:
        return SAVE_DTYPES[self._saving.save_precision]


def block_groups(unet: UNet, rates: Sequence[float]) -> list[ParameterGroup]:
    """A group for each block of the U-Net; blocks whose rate is 0 are frozen and have none.

    Args:
        rates: of the embeddings of time and size, each input block, each layer of the middle block, each output block
            and the last layer; or one rate for all; () for no groups.

    Raises:
        InputError: there are not as many rates as blocks.
    """
    if not rates:
        return []
    if len(rates) == 1:
        return [ParameterGroup("unet", list(unet.parameters()), rates[0])]
    last = 1 + len(unet.input_blocks) + len(unet.middle_block) + len(unet.output_blocks)
    first = {
        "input_blocks": 1,
        "middle_block": 1 + len(unet.input_blocks),
        "output_blocks": 1 + len(unet.input_blocks) + len(unet.middle_block),
    }
    if len(rates) != last + 1:
        raise InputError(wrong_number_of_rates(len(rates), last + 1))
    of_blocks: list[list[nn.Parameter]] = [[] for _ in range(last + 1)]
    for name, parameter in unet.named_parameters():
        part, _, rest = name.partition(".")
        block = first[part] + int(rest.split(".")[0]) if part in first else last if part == "out" else 0
        of_blocks[block].append(parameter)
    groups = []
    for block, parameters in enumerate(of_blocks):
        if rates[block]:
            groups.append(ParameterGroup(f"unet_block{block:02d}", parameters, rates[block]))
        else:
            for parameter in parameters:
                parameter.requires_grad_(False)
    return groups
