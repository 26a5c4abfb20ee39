#!/usr/bin/env bash
# SDXL pre-training on the eight devices of one machine, one process a device; --nproc_per_node takes another number.
#
#   bash test/pretrain_full_1m_8p_sdxl.sh [--demo] [--NAME=VALUE ...] [-- FLAG ...]      (--help lists the names)
source "$(dirname "${BASH_SOURCE[0]}")/pretrain_full_sdxl_settings.sh"
takes_processes 8
launch "$@"
