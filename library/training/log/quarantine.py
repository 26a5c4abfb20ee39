"""The list of samples that could not be used, their count over all processes, and the stop when it is too high."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from library.data.bad_samples import kind, summary, too_many
from library.data.micro_batch import MicroBatch
from library.errors import TrainingError
from library.training.log.appended_lines import AppendedLines


class Quarantine:
    """Writes quarantine.jsonl (quarantine.rank1.jsonl … of the other processes) and counts.

    Attributes:
        count: places so far, over all processes, whose planned sample had to be replaced.
    """

    def __init__(
        self, accelerator: Accelerator, output_dir: Path, write_text: Callable[[str], None], samples: int, share: float
    ) -> None:
        """
        Args:
            write_text: shows a line to the user.
            samples: of an epoch.
            share: --max_bad_samples.
        """
        self.count = 0
        self._accelerator, self._write_text, self._samples, self._share = accelerator, write_text, samples, share
        rank = accelerator.process_index
        self._lines = AppendedLines(output_dir / ("quarantine.jsonl" if rank == 0 else f"quarantine.rank{rank}.jsonl"))
        self._kinds: Counter[str] = Counter()

    def begin(self, steps_done: int, left_out: Iterable[tuple[str, str]]) -> None:
        """List what the index left out, as of step 0, unless the run goes on.

        Args:
            steps_done: before this start.
            left_out: (name, reason); the same on all processes, so the main one lists it.
        """
        if self._accelerator.is_main_process and not steps_done:
            self._write(0, left_out)

    def add(self, step: int, batches: Sequence[MicroBatch], replaced: int) -> None:
        """List the bad samples of a step (from 0), count the replaced ones. Every process calls it at every step.

        Args:
            batches: of this process.
            replaced: samples over all processes.
        """
        bad = [entry for batch in batches for entry in batch.quarantined]
        self._write(step + 1, bad)
        self._kinds.update(kind(reason) for _, reason in bad)
        for name, reason in bad:
            self._write_text(f"sample {name} replaced: {reason}")
        self.count += replaced

    def stop_if_too_many(self, seen: int) -> None:
        """Stop on all processes at the same step, since all have the same count.

        Args:
            seen: samples of all steps so far, over all processes.

        Raises:
            TrainingError: more samples were bad than --max_bad_samples allows.
        """
        if not too_many(self.count, seen, self._samples, self._share):
            return
        kinds: Counter[str] = Counter()
        for part in gather_object([dict(self._kinds)]):
            kinds.update(part)
        listed = self._lines.path.with_name("quarantine*.jsonl")
        raise TrainingError(f"{summary(self.count, seen, self._share, kinds)} Each is listed in {listed}")

    def _write(self, step: int, bad: Iterable[tuple[str, str]]) -> None:
        self._lines.add(json.dumps({"step": step, "sample": name, "reason": reason}) for name, reason in bad)
