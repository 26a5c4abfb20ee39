#!/usr/bin/env bash
# SDXL pre-training on one device of one machine. --demo shows the whole of it on any machine, in minutes.
#
#   bash test/pretrain_full_1m_1p_sdxl.sh [--demo] [--NAME=VALUE ...] [-- FLAG ...]      (--help lists the names)
source "$(dirname "${BASH_SOURCE[0]}")/pretrain_full_sdxl_settings.sh"
launch "$@"
