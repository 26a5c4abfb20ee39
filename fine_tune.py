#!/usr/bin/env python
"""Fine-tuning of all of SD 1.x and 2.x: the U-Net, and the text encoder if asked.

    python fine_tune.py \\
        --pretrained_model_name_or_path=v1-5-pruned-emaonly.safetensors \\
        --train_data_dir=pictures --resolution=512,512 --enable_bucket --caption_extension=.txt \\
        --train_batch_size=4 --max_train_steps=3000 --learning_rate=5e-6 --clip_skip=2 \\
        --mixed_precision=fp16 --gradient_checkpointing --cache_latents --output_dir=test/output/fine_tuned

Which family a model is of, its files say; so do 768-v models of their prediction type, else add --v_parameterization.
Folders of images with captions, LAION shards and metadata (--in_json) are read in place. --dry_run prints the plan and
an estimate of memory.
"""

from dataclasses import dataclass

from library.options.training import SDTrainingOptions
from library.script import Script


@dataclass(frozen=True)
class Options(SDTrainingOptions):
    """The groups of every script that trains SD 1.x and 2.x."""


SCRIPT = Script(__doc__, Options, families=("sd1", "sd2"), recipe="library.training.recipes.full:Full")
main = SCRIPT.main

if __name__ == "__main__":
    SCRIPT.run()
