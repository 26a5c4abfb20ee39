#!/usr/bin/env bash
# Training steps of SDXL's U-Net at 256 and at 512 pixels, batch 1, fp32, each in a process of its own, with the time and
# the peak memory of steps and of the final checkpoint. --size=full: beside the real text encoders and VAE, 3.6 GB more.
# Needs 15 GB of disk (--out FOLDER).
set -euo pipefail
# glibc keeps freed tensors of up to 32 MB for later ones, which do not fit them. As mappings of their own they go back:
# 2.6 GB less at this size, in the same time (docs/measurements/full_size.md).
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_-1048576}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for side in 256 512; do
    "${PYTHON:-python}" "$here/full_size.py" --size=unet --resolution "$side" "$@"
done
