"""What files are called that a run writes (formats.md, "Names of what is written")."""

STATE_SUFFIX = "-state"
AVERAGE_SUFFIX = "-ema"  # of a checkpoint of the moving averages
LOCK_FILE, METRICS, ABANDONED = ".lock", "metrics.jsonl", "abandoned"
SAMPLE_FOLDER, DEBUG_FOLDER, PROFILE_FOLDER = "sample", "debug_dataset", "profile"
CASE_LOG_HEAD = "Network"  # the first word of {CaseName}.log
DEFAULT_EPOCH_NAME, DEFAULT_STEP_NAME, DEFAULT_LAST_NAME = "epoch", "at", "last"


def step_name(output_name: str | None, steps_done: int) -> str:
    """'NAME-step00000500'."""
    return f"{output_name or DEFAULT_STEP_NAME}-step{steps_done:08d}"


def epoch_name(output_name: str | None, epochs_done: int) -> str:
    """'NAME-000020'."""
    return f"{output_name or DEFAULT_EPOCH_NAME}-{epochs_done:06d}"


def last_name(output_name: str | None) -> str:
    """'NAME' or 'last'."""
    return output_name or DEFAULT_LAST_NAME


def state_name(stem: str) -> str:
    """'NAME-step00000500-state': the folder of the training state that belongs to a checkpoint's stem."""
    return f"{stem}{STATE_SUFFIX}"


def sample_name(output_name: str | None, time: str, position: str, index: int, seed: int | None) -> str:
    """'NAME_20240131235959_e000020_00_42.png'; `position` is the epoch as 'e000020' or the step as '000500'."""
    parts = [
        *([output_name] if output_name else []),
        time,
        position,
        f"{index:02d}",
        *([] if seed is None else [str(seed)]),
    ]
    return "_".join(parts) + ".png"
