"""Flags of sd-scripts that a script here does not have: each says why, and what to use instead."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refused:
    """One flag that is refused.

    Attributes:
        why: a sentence about the flag without its name, and what to use instead.
        switch: it has no value.
        taken: values that ask for what happens anyway, in lower case; "true" for a switch.
        replaces: flags that a configuration file has in vain where this one is taken on the command line.
    """

    name: str
    why: str
    switch: bool = False
    taken: tuple[str, ...] = ()
    replaces: tuple[str, ...] = ()

    def refusal(self, value: str) -> str | None:
        """Why a value is refused; None where it changes nothing.

        Args:
            value: as it is written on the command line; true or false for a switch in a file.
        """
        off = value == "" or (self.switch and value.lower() == "false")
        taken = any(value.lower() == one or _is_number(value, one) for one in self.taken)
        return None if off or taken else f"--{self.name} is not supported: {self.why}"

    def refusal_of(self, value: Any) -> str | None:
        """Why a value of a file is refused; None where it changes nothing. An empty text or list is no value."""
        return self.refusal(" ".join(map(str, value)) if isinstance(value, list) else str(value))


def _is_number(text: str, number: str) -> bool:
    """Whether both are the same number, however it is written."""
    try:
        return float(text) == float(number)
    except ValueError:
        return False


_NO_UPLOAD = "nothing is uploaded to the hub here; upload OUTPUT_DIR with `hf upload` afterwards, and leave it out"
_ONE_WEIGHT = "the loss is not weighed by the timestep here; leave it out"
_SDPA = "attention runs by torch's SDPA, which has such kernels, too; leave it out"
_LOGS = "logs go to metrics.jsonl and, with --logging_dir, to TensorBoard; leave it out"
_ALWAYS = ("true",)
_NO_NETWORK = (
    "no network (LoRA and the like) is trained by a script here yet; leave it out, and all of the model trains"
)
_NO_CONTROL = "no ControlNet is trained by a script here yet; leave it out"
_NO_INVERSION = "textual inversion is not trained by a script here yet; leave it out"
_METADATA = "checkpoints say of themselves what ModelSpec asks for, and no more; leave it out"
_SCHEDULES = "the schedules are those that --lr_scheduler lists; leave it out"
_RESUME = "use --resume, which goes on exactly where a training state was saved"
_FP32 = "weights are kept in fp32, or with --full_bf16 in bf16; leave it out"
_DDP = "how gradients are exchanged is not chosen here; leave it out"
_L2 = "the loss is the mean squared error (l2) here; leave it out"
_UNIFORM = "all timesteps are alike probable and weigh the same here; leave it out"
_SHARDED = "use --sharding=zero1 or fsdp"
_CONSOLE = "the log goes to standard error; leave it out"

_ALL = (
    Refused(
        "full_fp16",
        "fp16 weights have fp16 gradients, which loss scaling cannot bring back to "
        "their own size without losing the small ones, and squares of gradients below 2e-4, which optimizers keep, "
        "are 0. Use --mixed_precision=fp16, which keeps fp32 weights, or --mixed_precision=bf16 --full_bf16",
        switch=True,
    ),
    Refused(
        "sdpa",
        "attention always runs by torch's SDPA here",
        switch=True,
        taken=_ALWAYS,
        replaces=("xformers", "diffusers_xformers", "mem_eff_attn"),
    ),
    Refused(
        "xformers",
        _SDPA,
        switch=True,
    ),
    Refused(
        "diffusers_xformers",
        _SDPA,
        switch=True,
    ),
    Refused(
        "mem_eff_attn",
        _SDPA,
        switch=True,
    ),
    Refused("log_with", _LOGS, taken=("tensorboard",)),
    Refused("wandb_api_key", _LOGS),
    Refused(
        "persistent_data_loader_workers",
        "the workers always stay from epoch to epoch",
        switch=True,
        taken=_ALWAYS,
    ),
    Refused(
        "lowram",
        "where a model is loaded to first is not chosen here; leave it out",
        switch=True,
    ),
    Refused(
        "use_safetensors",
        "use --save_model_as=safetensors or diffusers_safetensors",
        switch=True,
    ),
    Refused("save_n_epoch_ratio", "use --save_every_n_epochs"),
    Refused("tokenizer_cache_dir", "files of the hub are kept where HF_HOME says; leave it out"),
    Refused("dataset_class", "no code of a data set's own is loaded; use --dataset_config"),
    Refused("huggingface_repo_id", _NO_UPLOAD),
    Refused("huggingface_repo_type", _NO_UPLOAD),
    Refused("huggingface_path_in_repo", _NO_UPLOAD),
    Refused("huggingface_token", _NO_UPLOAD),
    Refused("huggingface_repo_visibility", _NO_UPLOAD),
    Refused("save_state_to_huggingface", _NO_UPLOAD, switch=True),
    Refused("resume_from_huggingface", "download the state, and name its folder by --resume", switch=True),
    Refused("async_upload", _NO_UPLOAD, switch=True),
    Refused(
        "noise_offset",
        "noise has no offset here; for dark and bright pictures use --zero_terminal_snr with --v_parameterization",
        taken=("0",),
    ),
    Refused("adaptive_noise_scale", "noise has no offset here; leave it out", taken=("0",)),
    Refused("multires_noise_iterations", "noise has one resolution here; leave it out", taken=("0",)),
    Refused("multires_noise_discount", "noise has one resolution here; leave it out", taken=("0.3",)),
    Refused("ip_noise_gamma", "the input is not perturbed here; leave it out", taken=("0",)),
    Refused("min_timestep", "timesteps are drawn from the whole schedule; leave it out", taken=("0",)),
    Refused("max_timestep", "timesteps are drawn from the whole schedule; leave it out", taken=("1000",)),
    Refused("min_snr_gamma", _ONE_WEIGHT, taken=("0",)),
    Refused("scale_v_pred_loss_like_noise_pred", _ONE_WEIGHT, switch=True),
    Refused("v_pred_like_loss", _ONE_WEIGHT, taken=("0",)),
    Refused("debiased_estimation_loss", _ONE_WEIGHT, switch=True),
    Refused("noise_offset_random_strength", "noise has no offset here; leave it out", switch=True),
    Refused("ip_noise_gamma_random_strength", "the input is not perturbed here; leave it out", switch=True),
    Refused("noise_offset_type", "noise has no offset here; leave it out", taken=("original",)),
    Refused("loss_type", _L2, taken=("l2",)),
    Refused("huber_schedule", _L2, taken=("snr",)),
    Refused("huber_c", _L2, taken=("0.1",)),
    Refused("huber_scale", _L2, taken=("1",)),
    Refused("weighting_scheme", _UNIFORM, taken=("uniform", "none")),
    Refused("logit_mean", _UNIFORM, taken=("0",)),
    Refused("logit_std", _UNIFORM, taken=("1",)),
    Refused("mode_scale", _UNIFORM, taken=("1.29",)),
    Refused("lr_scheduler_type", _SCHEDULES),
    Refused("lr_scheduler_args", _SCHEDULES),
    Refused("lr_decay_steps", _SCHEDULES, taken=("0",)),
    Refused("lr_scheduler_timescale", _SCHEDULES),
    Refused("lr_scheduler_min_lr_ratio", _SCHEDULES, taken=("0",)),
    Refused("epoch", "sd-scripts has no such flag, and its GUI does not hand it on; use --max_train_epochs"),
    Refused("initial_epoch", _RESUME),
    Refused("initial_step", _RESUME),
    Refused("skip_until_initial_step", _RESUME, switch=True),
    Refused("log_prefix", "TensorBoard's folders are named by the time; leave it out, or choose another --logging_dir"),
    Refused("log_tracker_name", _LOGS),
    Refused("log_tracker_config", _LOGS),
    Refused("wandb_run_name", _LOGS),
    Refused("log_config", "each run writes its configuration to OUTPUT_DIR", switch=True, taken=_ALWAYS),
    Refused("console_log_level", _CONSOLE),
    Refused("console_log_file", _CONSOLE),
    Refused("console_log_simple", _CONSOLE, switch=True),
    Refused("metadata_title", _METADATA),
    Refused("metadata_author", _METADATA),
    Refused("metadata_description", _METADATA),
    Refused("metadata_license", _METADATA),
    Refused("metadata_tags", _METADATA),
    Refused("training_comment", _METADATA),
    Refused("no_metadata", _METADATA, switch=True),
    Refused("fp8_base", _FP32, switch=True),
    Refused("fp8_base_unet", _FP32, switch=True),
    Refused("ddp_gradient_as_bucket_view", _DDP, switch=True),
    Refused("ddp_static_graph", _DDP, switch=True),
    Refused("deepspeed", _SHARDED, switch=True),
    Refused("zero_stage", _SHARDED),
    Refused("highvram", "memory that was used is always kept for what comes", switch=True, taken=_ALWAYS),
    Refused("disable_mmap_load_safetensors", "how a file is read is not chosen here; leave it out", switch=True),
    Refused("fused_optimizer_groups", "use --fused_backward_pass, which needs no groups"),
    Refused("cpu_offload_checkpointing", "use --gradient_checkpointing and --blocks_to_swap", switch=True),
    Refused("cache_info", "what is known of the images is always kept beside them, in an index", switch=True),
    Refused("network_module", _NO_NETWORK),
    Refused("network_weights", _NO_NETWORK),
    Refused("network_dim", _NO_NETWORK),
    Refused("network_alpha", _NO_NETWORK),
    Refused("network_dropout", _NO_NETWORK),
    Refused("network_args", _NO_NETWORK),
    Refused("network_train_unet_only", _NO_NETWORK, switch=True),
    Refused("network_train_text_encoder_only", _NO_NETWORK, switch=True),
    Refused("dim_from_weights", _NO_NETWORK, switch=True),
    Refused("scale_weight_norms", _NO_NETWORK),
    Refused("base_weights", _NO_NETWORK),
    Refused("base_weights_multiplier", _NO_NETWORK),
    Refused("unet_lr", "use --learning_rate, which is the U-Net's"),
    Refused(
        "text_encoder_lr", "each text encoder has a rate of its own: --learning_rate_te, or --learning_rate_te1, _te2"
    ),
    Refused("no_token_padding", "captions are padded as the text encoders were trained; leave it out", switch=True),
    Refused("stop_text_encoder_training", "a text encoder trains to the end or not at all; leave it out"),
    Refused("controlnet_model_name_or_path", _NO_CONTROL),
    Refused("conditioning_data_dir", _NO_CONTROL),
    Refused("control_net_lr", _NO_CONTROL),
    Refused("cond_emb_dim", _NO_CONTROL),
    Refused("weights", _NO_INVERSION),
    Refused("num_vectors_per_token", _NO_INVERSION),
    Refused("token_string", _NO_INVERSION),
    Refused("init_word", _NO_INVERSION),
    Refused("use_object_template", _NO_INVERSION, switch=True),
    Refused("use_style_template", _NO_INVERSION, switch=True),
    # of other scripts here
    Refused("v2", "this script trains SDXL; fine_tune.py trains SD 2.x", switch=True),
    Refused(
        "clip_skip",
        "SDXL conditions on the layers that it was trained with, the second from the end of each text encoder",
        taken=("1", "2"),  # sd-scripts ignores it for SDXL; 2 is what happens, and 1 what its users have as a default
    ),
    Refused("learning_rate_te", "SDXL has two text encoders: use --learning_rate_te1 and --learning_rate_te2"),
    Refused("tokenizer_path", "SDXL has two text encoders: use --tokenizer1_path and --tokenizer2_path"),
    Refused("learning_rate_te1", "this family has one text encoder: use --learning_rate_te"),
    Refused("learning_rate_te2", "this family has one text encoder: use --learning_rate_te"),
    Refused("tokenizer1_path", "this family has one text encoder: use --tokenizer_path"),
    Refused("tokenizer2_path", "this family has one text encoder: use --tokenizer_path"),
    Refused("block_lr", "sdxl_train.py has rates by block; leave it out here"),
)

REFUSED = {refused.name: refused for refused in _ALL}
