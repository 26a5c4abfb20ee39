"""What a file is by its first bytes, whatever its name says: weights, or what was saved in their place.

Nothing here imports torch: a wrong file is named before anything is loaded.
"""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from library.errors import InputError

Form = Literal["safetensors", "pickle"]

_READ = 4096  # bytes
_LONGEST_HEADER = 100_000_000  # bytes, as the package safetensors has it
# What a file begins with that holds no weights, and what that is.
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive: unpack it"),
    (b"Rar!", "a RAR archive: unpack it"),
    (b"\xfd7zXZ", "an xz archive: unpack it"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive: unpack it"),
    (b"GGUF", "a GGUF file of quantised weights, which cannot be trained: give the model as .safetensors"),
    (b"\x89HDF", "an HDF5 file: give the model as .safetensors"),
    (b"\x89PNG", "a picture (PNG): give the model itself"),
    (b"\xff\xd8\xff", "a picture (JPEG): give the model itself"),
)
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")


def weight_form(path: Path) -> Form:
    """How a file of weights is written: as safetensors, or as a pickle of torch (in a zip archive or not).

    Raises:
        InputError: the file cannot be read, is cut off, or is something else; the message says what.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_READ)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    if not start:
        raise InputError(f"{path}: cut off: the file is empty. Copy or download it again.")
    if _is_safetensors(start):
        _check_length(path, size)
        return "safetensors"
    if start.startswith(b"PK\x03\x04"):
        return _form_of_archive(path, size)
    if start[0] == 0x80 and len(start) > 1 and 1 <= start[1] <= 5:  # a pickle's protocol
        return "pickle"
    raise InputError(f"{path}: {_what_else(start, size)}")


def _is_safetensors(start: bytes) -> bool:
    """Eight bytes with the length of a header, and a header in JSON."""
    length = int.from_bytes(start[:8], "little")
    return len(start) > 8 and start[8:9] == b"{" and length <= _LONGEST_HEADER


def _check_length(path: Path, size: int) -> None:
    """Raise InputError where the header of a safetensors file says that the file is longer than it is.

    A header that makes no sense is left to the reader of the file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    wanted = 8 + length
    if len(header) == length:
        try:
            entries = json.loads(header)
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
            wanted += max((end for end in ends if isinstance(end, int)), default=0)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return
    if size < wanted:
        raise InputError(
            f"{path}: damaged or cut off: by its header it has {wanted} bytes, and there are {size} (a download that "
            "broke off?). Copy or download it again."
        )


def _form_of_archive(path: Path, size: int) -> Form:
    """A zip archive that torch has written is a pickle; any other holds something to unpack."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"{path}: damaged or cut off: the end of its zip archive is missing ({size} bytes; a download that broke "
            "off?). Copy or download it again."
        ) from error
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return "pickle"
    raise InputError(f"{path}: is a zip archive of {_listed(names)}, not of a model's weights: unpack it.")


def _what_else(start: bytes, size: int) -> str:
    """What a file is that holds no weights, and what to do."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"version ") and b"git-lfs" in text[:60]:
        return (
            f"is a pointer of git-lfs ({size} bytes), not the file that it stands for. Run `git lfs pull` where the "
            "repository was cloned, or download the file itself."
        )
    if text[:16].lower().startswith(_PAGES):
        return (
            "is a web page, not a model: a server has sent a page in its place (for logging in, or with an error). "
            "Download it again, with a link to the file itself and the access that it needs."
        )
    other = next((what for mark, what in _OTHERS if start.startswith(mark)), None)
    if other or start[257:262] == b"ustar":
        return f"is {other or 'a tar archive: unpack it'}."
    if not any(start):
        return f"begins with zeros alone ({size} bytes): a download that broke off. Download it again."
    if _is_text(text):
        line = text.decode("utf-8", "replace").splitlines()[0]
        return (
            f"is text, not a model's weights ({line[:80]!r}): an error that a server has sent in its place, or another "
            "file. Give the file with the weights (.safetensors, .ckpt, .pt, .bin)."
        )
    return f"damaged or cut off, or no file of weights at all ({size} bytes). Copy or download it again."


def _is_text(start: bytes) -> bool:
    try:
        text = start[:200].decode("utf-8", "ignore")
    except ValueError:
        return False
    return len(text) > 3 and all(letter.isprintable() or letter in "\r\n\t" for letter in text)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"
