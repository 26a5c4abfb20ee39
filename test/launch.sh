#!/usr/bin/env bash
# What the SDXL pre-training launchers share; sourced by them, not run. They set their own defaults, add their own
# arguments to known_arguments, and call parse_arguments "$@", then launch. Everything a user can set is a --name=value
# below or there; an unknown one is an error.
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
save_state_every_n_minutes= # training states, of which those of the last 10,000 steps are kept; none if not given
resume=                     # auto, or the folder of a training state
nnodes=1                    # machines
nproc_per_node=1            # processes on each, one a device
node_rank=0                 # this machine's number
master_ip=                  # of machine 0
master_port=8989
start_timeout=600           # seconds that the machines wait for each other
save_every_n_epochs=20
by_torchrun=1               # 0: one process, without torchrun
demo=0
known_arguments="batch_size max_train_epoch max_train_steps mixed_precision resolution model_name vae tokenizer1_path tokenizer2_path dataset_name output_dir save_state_every_n_minutes resume"
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

# Fails unless an argument is a whole number in MIN .. MAX (no bound where MAX is empty).
check_number() {
    local name=$1 minimum=$2 maximum=$3 value=${!1}
    [[ $value =~ ^(0|[1-9][0-9]{0,8})$ ]] || fail "--$name=$value: must be a whole number"
    [ "$value" -ge "$minimum" ] || fail "--$name=$value: must be at least $minimum"
    [ -z "$maximum" ] || [ "$value" -le "$maximum" ] || fail "--$name=$value: must be at most $maximum${4:+ ($4)}"
}

# The machines and processes, before anything is built or waited for.
check_machines() {
    check_number batch_size 1 ""
    check_number nproc_per_node 1 ""
    check_number nnodes 1 ""
    check_number node_rank 0 $((nnodes - 1)) "the machines of --nnodes=$nnodes are 0 to $((nnodes - 1))"
    check_number master_port 1 65535
    check_number start_timeout 1 ""
    if [ "$nnodes" = 1 ]; then
        if [ -n "$master_ip" ] && ! is_given nnodes; then fail "--master_ip without --nnodes: how many machines are there?"; fi
        return
    fi
    [ -n "$master_ip" ] || fail "--nnodes=$nnodes needs --master_ip=ADDRESS, machine 0's, the same on all machines"
    is_given node_rank || fail "--nnodes=$nnodes needs --node_rank=NUMBER, 0 to $((nnodes - 1)), another on each machine"
}

is_given() { [[ "$given" == *" $1 "* ]]; }

# A path that is relative to where the user stands, made absolute; what is no path there (a hub name) stays as it is.
from_callers_folder() {
    local is_path=0
    case $1 in
        output_dir) is_path=1 ;;
        dataset_name | resume | model_name | vae | tokenizer1_path | tokenizer2_path) if [ -e "$caller/$2" ]; then is_path=1; fi ;;
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
demo_default() { is_given "$1" || printf -v "$1" %s "$2"; }

train_arguments() {
    train=(
        --pretrained_model_name_or_path="$model_name" --train_data_dir="$dataset_name" --output_dir="$output_dir"
        --logging_dir="$output_dir/logs" --resolution="$resolution" --enable_bucket --caption_extension=.txt
        --shuffle_caption --keep_tokens=0 --train_batch_size="$batch_size" --mixed_precision="$mixed_precision"
        --optimizer_type=oss --train_text_encoder --lr_warmup_steps=0 --max_grad_norm=1 --gradient_accumulation_steps=1
        --seed=1 --max_token_length=77 --enable_npu_flash_attention --save_precision=float --save_model_as=safetensors
        --case_name="$case_name"
    )
    if [ -n "$save_state_every_n_minutes" ]; then
        train+=(--save_state_every_n_minutes="$save_state_every_n_minutes" --save_last_n_steps_state=10000)
    fi
    if [ -n "$resume" ]; then train+=(--resume="$resume"); fi
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

# The demo's sizes, unless the user gave others (tools/demo/README.md says how they were found). Its global batch is 16
# on any number of processes (rounded up where they do not divide it), so that it learns the same everywhere.
demo_settings() {
    demo_default batch_size $(((16 + processes - 1) / processes))
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
    build_part data tools/demo/make_data.py
    build_part model tools/demo/make_model.py
}

# Builds a part of the demo with a tool unless it is there as the tools make it. It is built aside and renamed, so that machines
# that share the folder may do it at once: the first one's stays.
build_part() {
    local target=$demo_dir/$1 made_by aside
    made_by=$(cat tools/demo/*.py tools/demo/vae.safetensors | sha256sum | cut -d' ' -f1)
    if [ "$(cat "$target/.made_by" 2>/dev/null)" = "$made_by" ]; then return; fi
    echo "building the demo's $1 in $target"
    mkdir -p "$demo_dir"
    aside=$(mktemp -d "$demo_dir/.$1.XXXXXX")
    chmod 755 "$aside"
    "$python" "$2" --out "$aside" | sed "s#$aside#$target#"
    echo "$made_by" > "$aside/.made_by"
    if [ "$(cat "$target/.made_by" 2>/dev/null)" != "$made_by" ]; then rm -rf "$target"; fi
    mv -T "$aside" "$target" 2>/dev/null || rm -rf "$aside"
    [ -e "$target/.made_by" ] || fail "$target cannot be made"
}

judge_demo() {
    "$python" tools/demo/judge.py --expected "$demo_dir/data/expected.json" --samples "$output_dir/sample" \
        --grid "$output_dir/samples_before_after.png" --at_least 12
}

# Runs a command; its output goes to a log and to the screen. Ends with its status. The command has a process group of
# its own and gets SIGTERM, Ctrl-C and SIGHUP from here, so that each comes once: the trainer saves at the first one and
# ends at once at a second one. The log takes in what it says after that, too.
run_logged() {
    local log=$1 logger child name status=0
    shift
    exec 3> >(trap "" INT TERM HUP; exec tee ${resume:+-a} "$log")
    logger=$!
    set -m  # a background command then has its own process group, and does not ignore Ctrl-C
    (trap - INT TERM HUP; exec "$@") >&3 2>&1 3>&- &
    child=$!
    set +m
    exec 3>&-
    for name in TERM INT HUP; do
        # shellcheck disable=SC2064
        trap "kill -$name $child 2>/dev/null || true" "$name"
    done
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do status=0; wait "$child" || status=$?; done  # a signal ends `wait`, too
    trap - INT TERM HUP
    wait "$logger" || true
    return "$status"
}

# The output folder and the log in it; machines that share the folder write logs of their own.
name_output() {
    local device_id=${ASCEND_DEVICE_ID:-${DEVICE_ID:-0}} kind=acc
    processes=$((nnodes * nproc_per_node))
    if [ "$demo" = 1 ]; then
        demo_dir=${output_dir:-test/output/demo}
        output_dir=$demo_dir/$device_id
        demo_settings
        # The demo's layers are too small to share: on a busy machine OpenMP's threads wait for each other, many times
        # as long as they compute (docs/measurements/demo.md).
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    fi
    output_dir=${output_dir:-test/output/$device_id}
    if [ "$max_train_epoch" = 13 ]; then kind=perf; fi
    case_name=SDXL_bs${batch_size}_${processes}p_$kind
    log_stem=$output_dir/train_$device_id
    if [ "$node_rank" != 0 ]; then log_stem+=.node$node_rank; fi
}

# Trains and, in the demo, judges. Ends with the trainer's exit status: that of the first process that failed.
launch() {
    local command status=0
    check_machines
    python=$(bash test/setup_env.sh | tail -n 1)
    # The card that DEVICE_ID names is the one that trains, unless the user has chosen the visible ones.
    if [ "$nnodes" = 1 ] && [ "$nproc_per_node" = 1 ] && [ -n "${ASCEND_DEVICE_ID:-}" ]; then
        export ASCEND_RT_VISIBLE_DEVICES=${ASCEND_RT_VISIBLE_DEVICES:-$ASCEND_DEVICE_ID}
    fi
    export NNODES=$nnodes
    # shellcheck source=test/env_npu.sh
    source test/env_npu.sh
    name_output
    mkdir -p "$output_dir"
    if [ "$demo" = 1 ]; then build_demo; fi
    train_arguments
    export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
    command=("$python")
    if [ "$by_torchrun" = 1 ]; then
        command+=(
            -m library.processes.launch --nnodes="$nnodes" --nproc_per_node="$nproc_per_node" --node_rank="$node_rank"
            --master_ip="$master_ip" --master_port="$master_port" --start_timeout="$start_timeout" --log="$log_stem" --
        )
        echo "log: $log_stem.log, those of the other processes beside it: $(basename "$log_stem").rank1.log and so on"
    fi
    run_logged "$log_stem.log" "${command[@]}" sdxl_pretrain.py "${train[@]}" || status=$?
    if [ "$status" != 0 ]; then
        if [ "$by_torchrun" = 0 ]; then
            echo "$(basename "$0"): training failed with exit status $status; log: $log_stem.log" >&2
        fi  # otherwise what failed first has been said last
        return "$status"
    fi
    if [ "$demo" = 1 ] && [ "$node_rank" = 0 ]; then judge_demo; fi
}
