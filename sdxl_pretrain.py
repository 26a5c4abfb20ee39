#!/usr/bin/env python
"""SDXL pre-training and full fine-tuning, on Ascend NPUs, NVIDIA GPUs and the CPU.

One device:

    python sdxl_pretrain.py \\
        --pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0 \\
        --vae=madebyollin/sdxl-vae-fp16-fix --train_data_dir=laion --resolution=1024,1024 \\
        --enable_bucket --min_bucket_reso=512 --max_bucket_reso=2048 --caption_extension=.txt \\
        --train_batch_size=4 --max_train_epochs=1 --learning_rate=1e-6 \\
        --train_text_encoder --learning_rate_te1=1e-7 --learning_rate_te2=1e-7 \\
        --mixed_precision=fp16 --gradient_checkpointing --enable_npu_flash_attention --output_dir=test/output

LAION shards are read in place. --dry_run prints the plan and an estimate of memory. The launchers in test/ set the
whole configuration: `bash test/pretrain_full_1m_1p_sdxl.sh --demo` shows it at work on any machine.
"""

from dataclasses import dataclass

from library.options.training import SDXLTrainingOptions
from library.script import Script


@dataclass(frozen=True)
class Options(SDXLTrainingOptions):
    """The groups of every script that trains SDXL."""


SCRIPT = Script(__doc__, Options, families=("sdxl",), recipe="library.training.recipes.full:Full")
main = SCRIPT.main

if __name__ == "__main__":
    SCRIPT.run()
