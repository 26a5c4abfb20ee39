#!/usr/bin/env bash
# The training step of SDXL's U-Net on one NVIDIA GPU with 80 GB, ours beside diffusers', in one command that is laid out
# to end within 8 minutes: bf16 plain and compiled by blocks, then fp16. It prints a table and a line of JSON for each.
#
#   bash bench/gpu.sh [ARGUMENT ...]     # --latent=64x64 --batch=1, say, for a smaller card; see bench/train_step.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(bash test/setup_env.sh | tail -n 1)
step() {
    echo "== $*"
    timeout 420 "$python" bench/train_step.py --size=full --batch=4 --device=cuda --gradient_checkpointing \
        --one_at_a_time --warmup=1 "$@"
}
step --dtype=bf16 --torch_compile --steps=6 "$@"
step --dtype=fp16 --steps=4 "$@"
