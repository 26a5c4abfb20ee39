"""Progress bars whose reader has gone."""

import io
import threading

import pytest

from library.progress_bar import ProgressBar


class Gone:
    """A stream that nobody reads any more, from a number of writes on."""

    def __init__(self, writes):
        self.left = writes

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise BrokenPipeError(32, "Broken pipe")
        return len(text)

    def flush(self):
        if self.left < 0:
            raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("writes", [0, 1, 5])
def test_a_bar_that_cannot_be_written_ends_nothing_and_holds_up_no_other_thread(writes):
    """tqdm itself raises, and keeps the lock that logging beside a bar takes."""
    bar = ProgressBar(total=20, file=Gone(writes), mininterval=0, miniters=1)
    for _ in range(20):
        bar.update(1)
    got = []

    def log():
        with ProgressBar.external_write_mode(file=io.StringIO()):
            got.append(True)

    thread = threading.Thread(target=log, daemon=True)
    thread.start()
    thread.join(5)
    assert got == [True]
    bar.close()
