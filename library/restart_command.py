"""The command by which a run that was stopped goes on."""

import os
import shlex
import sys
from collections.abc import Sequence

from library.redaction import addresses_redacted, shown_address

_LAUNCHED_BY = "LAUNCHER_COMMAND"  # set by test/launch.sh
_RESUME = "--resume"


def restart_command(script: str, words: Sequence[str]) -> str:
    """The command of this process with --resume=auto; the launcher's, where one has started it.

    Addresses in it are without credentials, which the user must then put in again.

    Args:
        script: its path, as it was started.
        words: of its command line, without the program's name.
    """
    launcher = shlex.split(os.environ.get(_LAUNCHED_BY, ""))
    if launcher:
        begin, words = launcher[:2], launcher[2:]
    else:
        begin = [sys.executable, script]
    kept, skip = [], False
    for word in words:
        if skip or word == _RESUME or word.startswith(f"{_RESUME}="):
            skip = word == _RESUME and not skip  # its value follows
            continue
        kept.append(_without_credentials(word))
    command = shlex.join([*begin, f"{_RESUME}=auto", *kept])
    if not launcher and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        command = shlex.join([script, f"{_RESUME}=auto", *kept])
        return f"{command}    (by torchrun, or whatever has started these processes)"
    return command


def _without_credentials(word: str) -> str:
    name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{name}{equals}{shown_address(value) if value.startswith('pipe:') else addresses_redacted(value)}"
