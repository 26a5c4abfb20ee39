#!/usr/bin/env python
"""Fine-tuning of all of SDXL: the U-Net, by block if asked, and both text encoders.

    python sdxl_train.py \\
        --pretrained_model_name_or_path=sd_xl_base_1.0.safetensors --vae=madebyollin/sdxl-vae-fp16-fix \\
        --train_data_dir=pictures --resolution=1024,1024 --enable_bucket --caption_extension=.txt \\
        --train_batch_size=1 --max_train_steps=3000 --learning_rate=4e-7 --optimizer_type=AdaFactor \\
        --optimizer_args scale_parameter=False relative_step=False warmup_init=False \\
        --mixed_precision=bf16 --gradient_checkpointing --cache_latents --output_dir=test/output/fine_tuned

Folders of images with captions, LAION shards and metadata are read in place. --dry_run prints the plan and an estimate
of memory. Flags are those of sdxl_pretrain.py, which trains from the same code, and --block_lr.
"""

from dataclasses import dataclass

from library.options.optimizer import BlockRateOptimizerOptions
from library.options.training import SDXLTrainingOptions
from library.script import Script


@dataclass(frozen=True)
class Options(SDXLTrainingOptions):
    """The groups of every script that trains SDXL, and learning rates by block."""

    optimizer: BlockRateOptimizerOptions


SCRIPT = Script(__doc__, Options, families=("sdxl",), recipe="library.training.recipes.full:Full")
main = SCRIPT.main

if __name__ == "__main__":
    SCRIPT.run()
