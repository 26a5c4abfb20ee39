"""Training all of the U-Net, and the text encoders that are asked for: pre-training, fine-tuning, DreamBooth.

Legend: B batch, C channels, H W latent rows and columns.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library import device as devices
from library.data.micro_batch import MicroBatch
from library.models.denoiser import Denoiser
from library.models.files.modelspec import modelspec
from library.models.files.write import save_model, saved_bytes
from library.models.model import Model
from library.models.text import TextStates, Tokens
from library.options.training import TrainingOptions
from library.training.engine.optimizers import ParameterGroup
from library.training.engine.precision import SAVE_DTYPES


class Full:
    """The U-Net trains whole, and each text encoder whose learning rate is above 0."""

    name = "full"

    def __init__(self, options: TrainingOptions, model: Model) -> None:
        """The module is made of the model's own networks."""
        self._model, self._saving, self._resolution = model, options.saving, options.data.resolution
        self._unet_rate = options.optimizer.learning_rate
        self._encoder_rates = options.text_encoders.rates(self._unet_rate) or (0.0,) * len(model.text_encoders)
        single_file = Path(options.model.pretrained_model_name_or_path).is_file()
        self._save_as = options.saving.save_model_as or ("safetensors" if single_file else "diffusers_safetensors")
        self.module = Denoiser(
            model,
            [rate > 0 for rate in self._encoder_rates],
            gradient_checkpointing=options.memory.gradient_checkpointing,
        )

    def groups(self) -> Sequence[ParameterGroup]:
        """The U-Net's parameters, and those of each text encoder that trains."""
        encoders = self.module.trained_encoders
        names = (
            [f"text_encoder{number + 1}" for number in range(len(encoders))] if len(encoders) > 1 else ["text_encoder"]
        )
        return [
            ParameterGroup("unet", list(self.module.unet.parameters()), self._unet_rate),
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
            replace(self._model, unet=module.unet, text_encoders=tuple(encoders)),
            self._saving.output_dir / stem,
            self._save_as,
            self._save_dtype,
            modelspec(
                title=stem,
                resolution_wh_px=self._resolution,
                prediction_type=self._model.prediction_type,
                architecture=self._model.family.architecture,
            ),
        )

    def saved_bytes(self) -> int:
        """What all parts of the model take in the precision that they are saved in."""
        return saved_bytes(self._model, self._save_dtype)

    def lines(self) -> list[str]:
        """The form and the precision of checkpoints."""
        return [f"checkpoints as: {self._save_as}, precision: {self._saving.save_precision or 'float'}"]

    @property
    def _save_dtype(self) -> torch.dtype | None:
        return SAVE_DTYPES[self._saving.save_precision]
