"""What a run says at its end: the final block that launchers and people read, and {CaseName}.log."""

import platform
from dataclasses import dataclass
from pathlib import Path

from library.atomic_write import write_file
from library.training.state.names import CASE_LOG_HEAD


@dataclass(frozen=True)
class FinalFigures:
    """The figures of a finished run, all measured by the trainer itself."""

    images_per_second: float
    train_loss: float
    duration_seconds: float
    global_batch: int
    process_count: int
    batch_per_device: int
    quarantined: int = 0
    left_out: int = 0
    overflows: int = 0
    steps_not_updated: int = 0

    def block(self) -> str:
        """The final block of formats.md; lines for what went wrong are added only where something did."""
        lines = [
            "------------------ Final result ------------------",
            f"Final Performance images/sec : {self.images_per_second:.2f}",
            f"Final Train Loss : {self.train_loss:.4f}",
            f"E2E Training Duration sec : {self.duration_seconds:.0f}",
        ]
        trouble = {
            "Samples replaced (quarantine.jsonl)": self.quarantined,
            "Samples left out of the index (quarantine.jsonl)": self.left_out,
            "Loss scale overflows (steps repeated)": self.overflows,
            "Steps without update (loss not finite)": self.steps_not_updated,
        }
        return "\n".join([*lines, *(f"{name} : {count}" for name, count in trouble.items() if count)])

    def case_log(self, case_name: str, network: str) -> str:
        """The lines of {CaseName}.log. TrainingTime is milliseconds a step, DeviceType the host's processor family."""
        step_ms = 1000 * self.global_batch / self.images_per_second if self.images_per_second else 0.0
        entries = {
            CASE_LOG_HEAD: network,
            "RankSize": self.process_count,
            "BatchSize": self.batch_per_device,
            "DeviceType": platform.machine(),
            "CaseName": case_name,
            "ActualFPS": f"{self.images_per_second:.2f}",
            "TrainingTime": f"{step_ms:.2f}",
            "ActualLoss": f"{self.train_loss:.4f}",
            "E2ETrainingTime": f"{self.duration_seconds:.0f}",
        }
        return "".join(f"{name} = {value}\n" for name, value in entries.items())


def write_case_log(figures: FinalFigures, output_dir: Path, case_name: str, network: str) -> Path:
    """Write {CaseName}.log into the output folder, complete or not at all."""
    path = output_dir / f"{case_name}.log"
    write_file(path, lambda partial: partial.write_text(figures.case_log(case_name, network), encoding="utf-8"))
    return path
