"""What C code writes to stderr during a call: decoders say there, and nowhere else, what is wrong with their input.

C's own variable is exchanged for the time of the call, not the file descriptor: what Python, other programs or crash
handlers write meanwhile goes where it always does. Only glibc lets the variable be set; elsewhere nothing is caught.
"""

import ctypes
import os
import platform
import re
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

Result = TypeVar("Result")
_LOCK = threading.Lock()


class _Memory:
    """A C stream into memory. It is never closed, since another thread may be about to write to it."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        for name in ("ftell", "fflush", "rewind"):
            getattr(libc, name).argtypes = [ctypes.c_void_p]
        libc.ftell.restype = ctypes.c_long
        libc.open_memstream.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        libc.open_memstream.restype = ctypes.c_void_p
        self._libc, self._content, self._size = libc, ctypes.c_void_p(), ctypes.c_size_t()
        self.variable = ctypes.c_void_p.in_dll(libc, "stderr")
        self.stream = libc.open_memstream(ctypes.byref(self._content), ctypes.byref(self._size))
        if not self.stream:
            raise OSError("no stream into memory")

    def take(self) -> bytes:
        """What was written since the last call."""
        count = self._libc.ftell(self.stream)
        if count <= 0:
            return b""
        self._libc.fflush(self.stream)
        found = ctypes.string_at(self._content.value or 0, count)
        self._libc.rewind(self.stream)
        return found


@lru_cache(None)
def _memory() -> _Memory | None:
    """This process's; None where there is none to be had."""
    if platform.libc_ver()[0] != "glibc":
        return None
    try:
        return _Memory()
    except (OSError, AttributeError, ValueError):
        return None


def lines_to_c_stderr(work: Callable[[], Result], wanted: re.Pattern[bytes]) -> tuple[Result, list[str]]:
    """What work() returns, and the lines that C code of this process wrote to stderr meanwhile.

    Args:
        wanted: of those that begin so; others are written to stderr.

    Raises:
        What work raises.
    """
    memory = _memory()
    if memory is None:
        return work(), []
    with _LOCK:
        usual = memory.variable.value
        try:
            memory.variable.value = memory.stream
            result = work()
        finally:
            memory.variable.value = usual
            lines = memory.take().splitlines(keepends=True)
            if others := b"".join(line for line in lines if not wanted.match(line)):
                os.write(2, others)
    return result, [line.decode("utf-8", "replace").strip() for line in lines if wanted.match(line)]
