#!/usr/bin/env bash
# SDXL pre-training on several machines: the same command on each, with another --node_rank.
#
#   bash test/pretrain_full_nm_np_sdxl.sh --nnodes=2 --nproc_per_node=8 --node_rank=0 --master_ip=x.x.x.x \
#       --master_port=8989 [--demo] [--NAME=VALUE ...] [-- FLAG ...]      (--help lists the names)
source "$(dirname "${BASH_SOURCE[0]}")/pretrain_full_sdxl_settings.sh"
max_train_epoch=20000
save_every_n_epochs=200
takes_machines 8
launch "$@"
