"""What a run shows of its data before it trains: cut captions, and with --debug_dataset a page of samples."""

import logging
from collections.abc import Iterator

from library.data.contact_sheet import write_contact_sheet
from library.data.loader import worker_deaths_reported
from library.data.micro_batch import MicroBatch
from library.data.training_set import TrainingSet
from library.models.text import Tokens
from library.models.token_counts import TokenCounter
from library.options.training import TrainingOptions
from library.signals import Signals
from library.training.state.names import DEBUG_FOLDER

logger = logging.getLogger(__name__)


def caption_lines(data: TrainingSet, counter: TokenCounter, is_main_process: bool) -> list[str]:
    """How many captions are cut off; only the main process, which logs it, reads them."""
    if not is_main_process:
        return []
    return data.caption_lines(counter, counter.most)


def show_data(
    options: TrainingOptions, data: TrainingSet, counter: TokenCounter, start_step: int, steps: int, signals: Signals
) -> None:
    """Report on the data, and write the first samples of the run, of all its processes, as a page."""
    for line in (*data.report(), *data.caption_lines(counter, counter.most)):
        logger.info(line)
    shown = data.of_one_process()

    def batches() -> Iterator[MicroBatch]:
        for batch in shown.loader(lambda captions: Tokens(()), steps, start_step):
            signals.stop_if_requested()
            yield batch

    page = options.saving.output_dir / DEBUG_FOLDER / "index.html"
    with worker_deaths_reported():
        write_contact_sheet(page, batches(), counter, counter.most)
