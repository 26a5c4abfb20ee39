#!/usr/bin/env bash
# SDXL pre-training on the eight devices of one machine, one process a device; --nproc_per_node takes another number.
#
#   bash test/pretrain_full_1m_8p_sdxl.sh [--demo] [--NAME=VALUE ...]      (--help lists the names)
source "$(dirname "${BASH_SOURCE[0]}")/launch_sdxl.sh"
nproc_per_node=8
known_arguments+=" nproc_per_node"
parse_arguments "$@"
launch
