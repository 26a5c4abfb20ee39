"""The orientation in EXIF, whatever else stands there: JEITA CP-3451, sections 4.5 and 4.6; TIFF 6.0, section 2."""

import re
import struct

_ORIENTATION = 0x0112
# By TIFF's types: what a whole number of a type is read as. Cameras and programs write others than SHORT, too.
_WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}
_XMP = re.compile(rb"tiff:Orientation(?:=[\"']|>)([1-8])[\"'<]")


def orientation_of(exif: bytes, xmp: bytes = b"") -> int:
    """How the stored picture is turned, 1 to 8; 1 (upright) where EXIF says nothing that has a meaning.

    Args:
        exif: TIFF's structure, with or without "Exif" and zeros before it.
        xmp: asked where EXIF has no orientation.
    """
    found = _in_first_directory(exif.removeprefix(b"Exif").lstrip(b"\0"))
    if found is None and (match := _XMP.search(xmp)):
        found = int(match[1])
    return found if found is not None and 1 <= found <= 8 else 1


def _in_first_directory(tiff: bytes) -> int | None:
    """The orientation's number; None if there is none."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return None
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    if start + 2 > len(tiff):
        return None
    (count,) = struct.unpack_from(f"{order}H", tiff, start)
    for place in range(start + 2, min(start + 2 + 12 * count, len(tiff) - 11), 12):
        tag, kind, values = struct.unpack_from(f"{order}HHI", tiff, place)
        if tag == _ORIENTATION:
            form = _WHOLE_NUMBERS.get(kind)
            return struct.unpack_from(order + form, tiff, place + 8)[0] if form and values else 0
    return None
