import ctypes
import re

import pytest

from library.c_stderr import lines_to_c_stderr

WANTED = re.compile(rb"Corrupt")


def write(text):
    """As C code does it."""
    libc = ctypes.CDLL(None)
    libc.fputs(text, ctypes.c_void_p.in_dll(libc, "stderr"))
    return len(text)


def test_wanted_lines_are_returned_and_others_go_where_they_always_do(capfd):
    found = lines_to_c_stderr(lambda: write(b"Corrupt data\nsomething else\nCorrupt, too\n"), WANTED)
    assert found == (41, ["Corrupt data", "Corrupt, too"])
    assert lines_to_c_stderr(lambda: 7, WANTED) == (7, [])
    assert lines_to_c_stderr(lambda: write(b"Corrupt again\n"), WANTED)[1] == ["Corrupt again"]
    write(b"behind it\n")
    assert capfd.readouterr().err == "something else\nbehind it\n"


def test_an_error_comes_through_and_stderr_is_back(capfd):
    def fails():
        write(b"said before it failed\n")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        lines_to_c_stderr(fails, WANTED)
    write(b"behind it\n")
    assert capfd.readouterr().err == "said before it failed\nbehind it\n"
