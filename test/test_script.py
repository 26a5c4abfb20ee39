"""How a script ends: with its own exit status, also where torch's threads would abort a process that takes its time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import atexit, os
from library.exit_status import run_script

class AbortsLate:  # as gloo's threads do while the interpreter is taken apart
    def __del__(self, abort=os.abort):
        abort()

def main():
    global late
    late = AbortsLate()
    atexit.register(print, "registered work is done")
    print("work is done")
    return {status}

run_script(main)
"""


def end(status, processes, script=SCRIPT):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(processes)}
    command = [sys.executable, "-c", script.format(status=status)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("status", [0, 2, 143])
def test_one_of_several_processes_keeps_its_exit_status_and_its_output(status):
    done = end(status, processes=2)
    assert done.returncode == status, done.stderr
    assert done.stdout.splitlines() == ["work is done", "registered work is done"]


def test_the_script_would_abort_otherwise():
    assert end(0, processes=1).returncode == -6


@pytest.mark.parametrize(("status", "expected"), [(0, 0), (7, 7), (None, 0)])
def test_a_process_alone_ends_as_any_other(status, expected):
    assert end(status, processes=1, script=SCRIPT.replace("abort()", "pass")).returncode == expected


def test_an_error_that_nobody_expects_is_shown():
    done = end("1 / 0", processes=2, script=SCRIPT.replace("abort()", "pass"))
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


SCRIPTS = [path for path in sorted(ROOT.glob("*.py")) if "SCRIPT = Script(" in path.read_text("utf-8")]
_SHARED_LINES = 6  # as many in a row would be a copy


def test_scripts_are_short_and_share_no_lines():
    """What two scripts have in common stands in the library. Lines of the same imports and of the ending count, too."""
    assert len(SCRIPTS) >= 3
    runs = {}
    for path in SCRIPTS:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
        assert len(lines) <= 120, path.name
        runs[path.name] = {tuple(lines[at : at + _SHARED_LINES]) for at in range(len(lines) - _SHARED_LINES + 1)}
    for one in runs:
        for other in runs:
            shared = runs[one] & runs[other] if one < other else set()
            assert not shared, f"{one} and {other}: {shared}"
