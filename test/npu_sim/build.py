"""Builds the simulated NPU's C++ extension once and keeps it by the hash of what it was made from."""

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("npu_sim.cpp")
FLAGS = ("-O1", "-std=c++20", "-shared", "-fPIC", "-w")  # -w: torch's own headers warn


def compiler() -> str | None:
    """The C++ compiler: $CXX, g++ or c++; None if there is none."""
    return next(
        (found for name in (os.environ.get("CXX"), "g++", "c++") if name and (found := shutil.which(name))), None
    )


@functools.lru_cache(maxsize=1)
def library() -> Path:
    """The built extension. The first caller builds it, callers beside it wait.

    Raises:
        RuntimeError: no compiler, or it fails; the message is the compiler's.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("the simulated NPU needs a C++ compiler: install g++")
    made_from = [SOURCE.read_bytes(), torch.__version__.encode(), " ".join((cxx, *FLAGS)).encode(), _version(cxx)]
    digest = hashlib.sha256(b"\0".join(made_from)).hexdigest()[:16]
    folder = _cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / f"npu_sim-{digest}.so"
    with (folder / f"{digest}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            _compile(cxx, built)
    return built


def _cache_folder() -> Path:
    asked = os.environ.get("NPU_SIM_CACHE")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(asked) if asked else cache / "sdxl_pretrain" / "npu_sim"


def _version(cxx: str) -> bytes:
    return subprocess.run([cxx, "--version"], capture_output=True, check=True).stdout


def _compile(cxx: str, built: Path) -> None:
    """Compile into a folder beside the target and rename: a half-written file never has the final name."""
    home = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=built.parent) as aside:
        made = Path(aside) / built.name
        command = [
            cxx, *FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            str(SOURCE), "-o", str(made),
            "-isystem", str(home / "include"), f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10", "-ltorch",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the simulated NPU does not build:\n{' '.join(command)}\n{done.stderr[-8000:]}")
        made.rename(built)
