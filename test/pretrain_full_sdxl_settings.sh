#!/usr/bin/env bash
# The settings of SDXL pre-training, which its three launchers share; sourced by them, not run.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

# The published configuration of the system (docs/running.md, "The launcher").
script=sdxl_pretrain.py
save_every_n_epochs=20
argument batch_size 4 --train_batch_size                    # images per device
argument max_train_epoch 120 --max_train_epochs --max_train_epoch   # 13 is the performance run
argument max_train_steps "" --max_train_steps               # steps instead of epochs
argument mixed_precision fp16 --mixed_precision
argument resolution 1024,1024 --resolution
path_argument model_name stabilityai/stable-diffusion-xl-base-1.0 --pretrained_model_name_or_path
path_argument vae madebyollin/sdxl-vae-fp16-fix --vae
path_argument tokenizer1_path openai/clip-vit-large-patch14 --tokenizer1_path
path_argument tokenizer2_path laion/CLIP-ViT-bigG-14-laion2B-39B-b160k --tokenizer2_path
path_argument dataset_name laion --train_data_dir           # folder of LAION shards or of images with captions
argument save_state_every_n_minutes "" --save_state_every_n_minutes  # training states; none if not given

settings() {
    local kind=acc
    check_number batch_size 1 ""
    if [ "$max_train_epoch" = 13 ]; then kind=perf; fi
    flags=(
        --logging_dir="$output_dir/logs" --enable_bucket --caption_extension=.txt --shuffle_caption --keep_tokens=0
        --optimizer_type=oss --train_text_encoder --max_grad_norm=1 --gradient_accumulation_steps=1
        --seed=1 --max_token_length=77 --enable_npu_flash_attention --save_precision=float --save_model_as=safetensors
        --case_name="SDXL_bs${batch_size}_${processes}p_$kind"
    )
    if [ -n "$save_state_every_n_minutes" ]; then flags+=(--save_last_n_steps_state=10000); fi
    if [ -n "$max_train_steps" ]; then max_train_epoch="" given=${given/ max_train_epoch / }; fi
    if [ "$demo" = 1 ]; then demo_flags; else published_flags; fi
}

published_flags() {
    flags+=(
        --min_bucket_reso=512 --max_bucket_reso=2048
        --learning_rate=1e-6 --learning_rate_te1=1e-7 --learning_rate_te2=1e-7
        --lr_scheduler=cosine_with_restarts --lr_scheduler_num_cycles=1 --lr_warmup_steps=0
        --gradient_checkpointing --save_every_n_epochs="$save_every_n_epochs"
    )
}

# The demo's sizes, unless the user gave others (tools/demo/README.md says how they were found). Its global batch is 16
# on any number of processes (rounded up where they do not divide it), so that it learns the same everywhere.
demo_settings() {
    if is_given max_train_epoch; then wrong "--max_train_epoch: the demo counts in steps: --max_train_steps=NUMBER"; fi
    demo_default batch_size $(((16 + processes - 1) / processes))
    demo_default max_train_steps 800
    demo_default mixed_precision no
    demo_default resolution 64,64
    demo_default model_name "$demo_dir/model"
    demo_default dataset_name "$demo_dir/data"
    demo_default vae ""
    demo_default tokenizer1_path ""
    demo_default tokenizer2_path ""
}

demo_flags() {
    check_number max_train_steps 1 ""
    flags+=(
        --min_bucket_reso=48 --max_bucket_reso=80 --bucket_reso_steps=8
        --learning_rate=1.5e-3 --learning_rate_te1=2e-3 --learning_rate_te2=2e-3
        --optimizer_args "betas=0.9,0.99" "weight_decay=0.01"
        --lr_scheduler=cosine --lr_warmup_steps="$((max_train_steps / 16))"
        --caption_dropout_rate=0.1 --v_parameterization --zero_terminal_snr
        --sample_prompts="$demo_dir/data/prompts.txt" --sample_at_first --sample_every_n_steps="$max_train_steps"
        --max_data_loader_n_workers=1
    )
}

build_demo() {
    build_part data tools/demo/make_data.py
    build_part model tools/demo/make_model.py
}

judge_demo() {
    "$python" tools/demo/judge.py --expected "$demo_dir/data/expected.json" --samples "$output_dir/sample" \
        --grid "$output_dir/samples_before_after.png" --at_least 12
}
