#!/usr/bin/env bash
# What the SDXL pre-training launchers share; sourced by them, not run. They set `processes` (per machine) and call
# parse_arguments "$@", then launch. Everything a user can set is a --name=value below; an unknown one is an error.
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The published configuration of the system (README, "The launchers").
batch_size=4                # images per device
max_train_epoch=120         # 13 is the performance run
max_train_steps=            # steps instead of epochs
mixed_precision=fp16
resolution=1024,1024
model_name=stabilityai/stable-diffusion-xl-base-1.0
vae=madebyollin/sdxl-vae-fp16-fix
tokenizer1_path=openai/clip-vit-large-patch14
tokenizer2_path=laion/CLIP-ViT-bigG-14-laion2B-39B-b160k
dataset_name=laion          # folder of LAION shards or of images with captions
output_dir=                 # default: test/output/DEVICE_ID
demo=0
known_arguments="batch_size max_train_epoch max_train_steps mixed_precision resolution model_name vae tokenizer1_path tokenizer2_path dataset_name output_dir"
given=" "                   # names that the user gave

fail() { echo "$(basename "$0"): $1" >&2; exit 2; }

parse_arguments() {
    local argument name
    for argument in "$@"; do
        case $argument in
            --demo) demo=1 ;;
            --help | -h) usage; exit 0 ;;
            --*=*)
                name=${argument%%=*}; name=${name#--}
                [[ " $known_arguments " == *" $name "* ]] || fail "unknown argument --$name; known are --demo and --NAME=VALUE for: $known_arguments"
                printf -v "$name" %s "$(from_callers_folder "$name" "${argument#*=}")"
                given+="$name "
                ;;
            *) fail "unknown argument $argument; arguments are --demo and --NAME=VALUE for: $known_arguments" ;;
        esac
    done
}

# A path that is relative to where the user stands, made absolute; what is no path there (a hub name) stays as it is.
from_callers_folder() {
    local is_path=0
    case $1 in
        output_dir) is_path=1 ;;
        dataset_name | model_name | vae | tokenizer1_path | tokenizer2_path) if [ -e "$caller/$2" ]; then is_path=1; fi ;;
    esac
    if [[ $is_path = 1 && -n "$2" && "$2" != /* ]]; then echo "$caller/$2"; else echo "$2"; fi
}

usage() {
    echo "usage: bash test/$(basename "$0") [--demo] [--NAME=VALUE ...]"
    echo "  --demo  builds a small model and data set offline, trains in minutes, judges the pictures"
    local name
    for name in $known_arguments; do echo "  --$name=${!name}"; done
}

# Sets a default that holds in the demo only, unless the user gave the argument.
demo_default() { [[ "$given" == *" $1 "* ]] || printf -v "$1" %s "$2"; }

train_arguments() {
    train=(
        --pretrained_model_name_or_path="$model_name" --train_data_dir="$dataset_name" --output_dir="$output_dir"
        --logging_dir="$output_dir/logs" --resolution="$resolution" --enable_bucket --caption_extension=.txt
        --shuffle_caption --keep_tokens=0 --train_batch_size="$batch_size" --mixed_precision="$mixed_precision"
        --optimizer_type=oss --train_text_encoder --lr_warmup_steps=0 --max_grad_norm=1 --gradient_accumulation_steps=1
        --seed=1 --max_token_length=77 --enable_npu_flash_attention --save_precision=float --save_model_as=safetensors
        --case_name="$case_name"
    )
    if [ -n "$max_train_steps" ]; then
        train+=(--max_train_steps="$max_train_steps")
    else
        train+=(--max_train_epochs="$max_train_epoch")
    fi
    if [ "$demo" = 1 ]; then
        demo_train_arguments
    else
        train+=(
            --vae="$vae" --tokenizer1_path="$tokenizer1_path" --tokenizer2_path="$tokenizer2_path"
            --min_bucket_reso=512 --max_bucket_reso=2048
            --learning_rate=1e-6 --learning_rate_te1=1e-7 --learning_rate_te2=1e-7
            --lr_scheduler=cosine_with_restarts --lr_scheduler_num_cycles=1
            --gradient_checkpointing --save_every_n_epochs="$save_every_n_epochs"
        )
    fi
}

# The demo's sizes, unless the user gave others (tools/demo/README.md says how they were found).
demo_settings() {
    demo_default batch_size 16
    demo_default max_train_steps 800
    demo_default mixed_precision no
    demo_default resolution 64,64
    demo_default model_name "$demo_dir/model"
    demo_default dataset_name "$demo_dir/data"
}

demo_train_arguments() {
    train+=(
        --min_bucket_reso=48 --max_bucket_reso=80 --bucket_reso_steps=8
        --learning_rate=1.5e-3 --learning_rate_te1=2e-3 --learning_rate_te2=2e-3
        --optimizer_args "betas=0.9,0.99" "weight_decay=0.01" --lr_scheduler=cosine
        --lr_warmup_steps="$((max_train_steps / 16))"
        --caption_dropout_rate=0.1 --v_parameterization --zero_terminal_snr
        --sample_prompts="$demo_dir/data/prompts.txt" --sample_at_first --sample_every_n_steps="$max_train_steps"
        --max_data_loader_n_workers=1
    )
}

build_demo() {
    echo "building the demo's data set and model in $demo_dir"
    "$python" tools/demo/make_data.py --out "$demo_dir/data"
    "$python" tools/demo/make_model.py --out "$demo_dir/model"
}

judge_demo() {
    "$python" tools/demo/judge.py --expected "$demo_dir/data/expected.json" --samples "$output_dir/sample" \
        --grid "$output_dir/samples_before_after.png" --at_least 12
}

# Trains and, in the demo, judges. Ends with the trainer's exit status; its output goes to the log and the screen.
launch() {
    local device_id=${ASCEND_DEVICE_ID:-${DEVICE_ID:-0}} status=0
    python=$(bash test/setup_env.sh | tail -n 1)
    # The card that DEVICE_ID names is the one that trains, unless the user has chosen the visible ones.
    if [ "$processes" = 1 ] && [ -n "${ASCEND_DEVICE_ID:-}" ]; then
        export ASCEND_RT_VISIBLE_DEVICES=${ASCEND_RT_VISIBLE_DEVICES:-$ASCEND_DEVICE_ID}
    fi
    # shellcheck source=test/env_npu.sh
    source test/env_npu.sh
    if [ "$demo" = 1 ]; then
        demo_dir=${output_dir:-test/output/demo}
        output_dir=$demo_dir/$device_id
        demo_settings
        # The demo's layers are too small to share: on a busy machine OpenMP's threads wait for each other, many times
        # as long as they compute (docs/measurements/demo.md).
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    fi
    output_dir=${output_dir:-test/output/$device_id}
    [ "$max_train_epoch" = 13 ] && local kind=perf || local kind=acc
    case_name=SDXL_bs${batch_size}_${processes}p_$kind
    mkdir -p "$output_dir"
    local log=$output_dir/train_$device_id.log
    if [ "$demo" = 1 ]; then build_demo; fi
    train_arguments
    export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
    "$python" sdxl_pretrain.py "${train[@]}" 2>&1 | tee "$log" || status=${PIPESTATUS[0]}
    if [ "$status" != 0 ]; then
        echo "$(basename "$0"): training failed with exit status $status; log: $log" >&2
        return "$status"
    fi
    if [ "$demo" = 1 ]; then judge_demo; fi
}
