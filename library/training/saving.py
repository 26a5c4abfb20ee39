"""When a run saves and samples, and what the files are called (formats.md, "Names of what is written")."""

from dataclasses import dataclass

DEFAULT_EPOCH_NAME, DEFAULT_STEP_NAME, DEFAULT_LAST_NAME = "epoch", "at", "last"


@dataclass(frozen=True)
class Cadence:
    """Every so many steps and every so many epochs; None means never."""

    every_n_steps: int | None = None
    every_n_epochs: int | None = None

    def step_is_due(self, steps_done: int) -> bool:
        """True after a step whose number the cadence names."""
        return bool(self.every_n_steps) and steps_done % (self.every_n_steps or 1) == 0

    def epoch_is_due(self, epochs_done: int) -> bool:
        """True after an epoch whose number the cadence names."""
        return bool(self.every_n_epochs) and epochs_done % (self.every_n_epochs or 1) == 0


def step_name(output_name: str | None, steps_done: int) -> str:
    """'NAME-step00000500'."""
    return f"{output_name or DEFAULT_STEP_NAME}-step{steps_done:08d}"


def epoch_name(output_name: str | None, epochs_done: int) -> str:
    """'NAME-000020'."""
    return f"{output_name or DEFAULT_EPOCH_NAME}-{epochs_done:06d}"


def last_name(output_name: str | None) -> str:
    """'NAME' or 'last'."""
    return output_name or DEFAULT_LAST_NAME


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
