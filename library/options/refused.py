"""Flags of sd-scripts that these scripts do not have: each says why, and what to use instead."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Refused:
    """One flag that is refused.

    Attributes:
        why: a sentence about the flag without its name, and what to use instead.
        switch: it has no value.
        taken: values that ask for what happens anyway, in lower case; "true" for a switch.
    """

    name: str
    why: str
    switch: bool = False
    taken: tuple[str, ...] = ()

    def refusal(self, value: str) -> str | None:
        """Why a value is refused; None where it changes nothing.

        Args:
            value: as it is written on the command line; true or false for a switch in a file.
        """
        off = self.switch and value.lower() == "false"
        taken = any(value.lower() == one or _is_number(value, one) for one in self.taken)
        return None if off or taken else f"--{self.name} is not supported: {self.why}"


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

_ALL = (
    Refused(
        "full_fp16",
        "fp16 weights have fp16 gradients, which loss scaling cannot bring back to "
        "their own size without losing the small ones, and squares of gradients below 2e-4, which optimizers keep, "
        "are 0. Use --mixed_precision=fp16, which keeps fp32 weights, or --mixed_precision=bf16 --full_bf16",
        switch=True,
    ),
    Refused("sdpa", "attention always runs by torch's SDPA here", switch=True, taken=_ALWAYS),
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
    Refused("min_snr_gamma", _ONE_WEIGHT),
    Refused("scale_v_pred_loss_like_noise_pred", _ONE_WEIGHT, switch=True),
    Refused("v_pred_like_loss", _ONE_WEIGHT, taken=("0",)),
    Refused("debiased_estimation_loss", _ONE_WEIGHT, switch=True),
)

REFUSED = {refused.name: refused for refused in _ALL}
