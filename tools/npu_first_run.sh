#!/usr/bin/env bash
# The first hour on an Ascend machine: checks, one after the other, and one report of them to send back.
#
#   bash tools/npu_first_run.sh [FOLDER]        (default: test/output/first_run)
#
# It needs no model and no data of yours: it builds the demo's. With MODEL=/path/of/sdxl and DATA=/path/of/shards it also
# trains SDXL for 60 steps on all NPUs and gives images/s, for which 10.4 were published for 8 of them. A check that fails
# does not stop the others. FOLDER/report.txt has versions, results and the end of each failed check's log.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(mkdir -p "${1:-test/output/first_run}" && cd "${1:-test/output/first_run}" && pwd) || exit 2
report=$folder/report.txt
python=$(bash test/setup_env.sh | tail -n 1) || exit 2
# shellcheck source=../test/env_npu.sh
source test/env_npu.sh
: > "$report"
failed=0

say() { echo "$@" | tee -a "$report"; }

# check NAME COMMAND ...: runs it, its output to a log of that name; a line in the report.
check() {
    local name=$1 log=$folder/$1.log began=$SECONDS status=0
    shift
    "$@" > "$log" 2>&1 || status=$?
    if [ "$status" = 0 ]; then
        say "ok      $name ($((SECONDS - began)) s)"
    else
        failed=$((failed + 1))
        say "FAILED  $name ($((SECONDS - began)) s), status $status; the end of $log:"
        tail -n 25 "$log" | sed 's/^/        /' | tee -a "$report"
    fi
    return "$status"
}

# train NAME FLAG ...: two steps of the demo's model.
train() {
    local name=$1
    shift
    check "$name" "$python" sdxl_pretrain.py --pretrained_model_name_or_path="$folder/model" \
        --train_data_dir="$folder/data" --output_dir="$folder/$name" --resolution=64,64 --caption_extension=.txt \
        --train_batch_size=2 --max_train_steps=2 --seed=1 --learning_rate=1e-4 --save_model_as=safetensors \
        --train_text_encoder --learning_rate_te1=1e-5 --learning_rate_te2=1e-5 --max_data_loader_n_workers=0 "$@"
}

say "== $(date -u +%FT%TZ) =="
check versions "$python" tools/npu_checks.py versions && cat "$folder/versions.log" | tee -a "$report"
if command -v npu-smi >/dev/null; then check npu-smi npu-smi info && cat "$folder/npu-smi.log" >> "$report"; fi
for file in /usr/local/Ascend/driver/version.info "${ASCEND_HOME_PATH:-/none}"/version.cfg \
    "${ASCEND_HOME_PATH:-/none}"/*/ascend_toolkit_install.info; do
    if [ -r "$file" ]; then { echo "-- $file"; cat "$file"; } >> "$report"; fi
done

check numbers "$python" tools/npu_checks.py numbers
cat "$folder/numbers.log" | tee -a "$report"
declare -A images=([data]="--images=64")
for part in model data; do
    [ -e "$folder/$part" ] || check "build-$part" "$python" "tools/demo/make_$part.py" --out "$folder/$part" ${images[$part]:-}
done

# Everything on the device: an operator without a kernel there is an error, not a slow detour by the CPU.
export TORCH_NPU_FALLBACK_CPU_DISABLE=1
train fp32
train fp16 --mixed_precision=fp16 --sample_at_first --sample_prompts="$folder/data/prompts.txt" --gradient_checkpointing
train flash-attention --mixed_precision=fp16 --enable_npu_flash_attention
train bf16 --mixed_precision=bf16 --enable_npu_flash_attention
train full_bf16 --mixed_precision=bf16 --full_bf16
train profile --mixed_precision=fp16 --profile=2
unset TORCH_NPU_FALLBACK_CPU_DISABLE
grep -h "attention: " "$folder"/{fp16,flash-attention,bf16}.log 2>/dev/null | tee -a "$report"

devices=$("$python" -c "import torch, torch_npu; print(torch.npu.device_count())" 2>/dev/null || echo 0)
say "NPUs: $devices"
if [ "$devices" -ge 2 ]; then
    # An overflow on one of two NPUs, with every way of sharding: both repeat the step, and their weights stay the same.
    check overflow "$python" -m torch.distributed.run --standalone --nproc_per_node=2 test/npu_sim/inside/overflow.py "$folder"
fi
if [ -n "${MODEL:-}" ] && [ -n "${DATA:-}" ] && [ "$devices" -ge 1 ]; then
    check speed bash test/pretrain_full_1m_8p_sdxl.sh --nproc_per_node="$devices" --model_name="$MODEL" \
        --dataset_name="$DATA" --max_train_steps=60 --output_dir="$folder/speed" -- --profile=50..51
    grep -h "images/sec" "$folder/speed.log" | tail -n 1 | tee -a "$report"
    say "(published for 8 NPUs: 10.4 images/s)"
else
    say "skipped speed: give MODEL=/path/of/sdxl and DATA=/path/of/shards"
fi
say "== $failed checks failed; send back $report =="
[ "$failed" = 0 ]
