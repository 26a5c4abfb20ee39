#!/usr/bin/env bash
# SDXL pre-training on one device of one machine. --demo shows the whole of it on any machine, in minutes.
#
#   bash test/pretrain_full_1m_1p_sdxl.sh [--demo] [--NAME=VALUE ...]      (--help lists the names)
source "$(dirname "${BASH_SOURCE[0]}")/launch_sdxl.sh"
by_torchrun=0
parse_arguments "$@"
launch
