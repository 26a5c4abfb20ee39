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

import argparse
import time
from functools import partial

from library.imports import import_quickly
from library.options import caches, config_file, data, dataset_config, model, optimization, run
from library.options.parser import StrictParser, fill
from library.script import run_main, run_script
from library.signals import Signals


def build_parser() -> argparse.ArgumentParser:
    """The flags of this script, one option group a concern."""
    summary, _, details = (__doc__ or "").partition("\n")
    parser = StrictParser(prog="sdxl_pretrain.py", description=summary, epilog=details)
    model.add_arguments(parser)
    data.add_arguments(parser)
    caches.add_arguments(parser)
    optimization.add_arguments(parser)
    run.add_run_arguments(parser)
    run.add_saving_arguments(parser)
    run.add_preview_arguments(parser)
    config_file.add_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Train; returns the exit status."""
    started = time.perf_counter()
    args = config_file.parse_arguments(build_parser(), argv)
    with Signals() as signals:
        return run_main(lambda: train(args, signals, started))


def train(args: argparse.Namespace, signals: Signals, started: float) -> None:
    """Turn the arguments into options and run the task; what needs torch is imported here, after --help."""
    import_quickly("library.training.run", "library.training.task", "third_patch")
    from library.options.options import Options
    from library.training.run import run as run_training
    from library.training.task import SDXLPretraining, load_token_counter
    from third_patch import PATCHES, apply

    options = Options(
        data=dataset_config.data_options(args),
        caches=fill(caches.CacheOptions, args),
        optimization=fill(optimization.OptimizationOptions, args),
        run=fill(run.RunOptions, args),
        saving=fill(run.SavingOptions, args),
        preview=fill(run.PreviewOptions, args),
    )
    model_options = fill(model.ModelOptions, args)
    undo = apply(PATCHES)
    try:
        make_task, load_counter = (
            partial(SDXLPretraining, model_options, options),
            partial(load_token_counter, model_options),
        )
        run_training(options, make_task, load_counter, signals, started)
    finally:
        undo()


if __name__ == "__main__":
    run_script(main)
