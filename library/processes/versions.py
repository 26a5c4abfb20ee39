"""What must be the same wherever processes of one run start: the libraries' versions and this project's code."""

import hashlib
import platform
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_CODE = ("*.py", "library/**/*.py", "third_patch/**/*.py")
_LIBRARIES = (
    "torch", "torch_npu", "accelerate", "fairscale", "diffusers", "transformers", "tokenizers", "numpy", "Pillow",
)  # fmt: skip
_DIGEST_LETTERS = 12


@lru_cache(maxsize=1)
def software() -> dict[str, str]:
    """Versions by name, and a digest of the project's code; the version of a missing library is 'none'."""
    return {
        "Python": platform.python_version(),
        **{name: _version(name) for name in _LIBRARIES},
        "this project's code": _code_digest(),
    }


def differences(ours: Mapping[str, object], theirs: Mapping[str, object]) -> list[str]:
    """A text for each entry that differs, for example 'torch (2.14.1 and 2.13.0)'."""
    names = [*ours, *(name for name in theirs if name not in ours)]
    pairs = ((name, ours.get(name, "none"), theirs.get(name, "none")) for name in names)
    return [f"{name} ({one} and {other})" for name, one, other in pairs if one != other]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def _code_digest() -> str:
    """A digest of all code that training runs, by which machines notice different code."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _CODE for path in _ROOT.glob(pattern)):
        digest.update(f"{path.relative_to(_ROOT)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:_DIGEST_LETTERS]
