"""Whether the data of a JPEG fill its picture: decoders make grey of what is missing, and say nothing.

A sequential JPEG is handed to Pillow in pieces. Whenever the decoder asks for the next piece, it has come as far as the
data before let it. So a picture that is complete long before the end of its data has lost its place in them, and a
picture whose last row is not there when they end has too few. torchvision's decoder takes no pieces: there it is what
libjpeg says to stderr that tells.
"""

import io
import re
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image

from library.c_stderr import lines_to_c_stderr
from library.data.bad_samples import SampleError
from library.data.image_formats.jpeg import END, Jpeg

Pixels = TypeVar("Pixels")
_GREY = 128  # what libjpeg makes of blocks without data
_CORNER_PX = 8
# How libjpeg's warnings begin (jerror.h); only those of damaged data are of interest.
_OF_LIBJPEG = re.compile(
    rb"Corrupt JPEG|Premature end|Inconsistent progression|Invalid SOS|Warning: unknown|Unknown Adobe"
)
_DAMAGE = re.compile(r"Corrupt JPEG data|Premature end")
_SURPLUS = re.compile(r"(\d+) extraneous bytes before marker")
_MOST_SURPLUS = 64  # bytes
_SPARE_BYTES = 8  # may be missing or be too many: encoders differ in how they end


class WatchedJpeg(io.BytesIO):
    """A file for Pillow, read in pieces; after decoding it knows whether the data filled the picture.

    Only sequential files of one scan can be judged so; of others nothing is found.
    """

    def __init__(self, jpeg: Jpeg) -> None:
        self._ended, self._has_last_row = jpeg.ended, dict[int, bool]()
        self.image: Image.Image | None = None  # set before it is decoded
        if not jpeg.data_end:
            super().__init__(jpeg.data)
            self._early = self._late = 0
            return
        whole = jpeg.data[: jpeg.data_end].rstrip(b"\xff")  # fill bytes before the end mark (T.81, B.1.1.2)
        data = whole.rstrip(b"\0")  # they may fill, too, or be codes: they are put back
        zeros = len(whole) - len(data) + _SPARE_BYTES
        early = len(data) - _SPARE_BYTES
        self._early = early if early > jpeg.data_start else 0  # reads of headers are never cut
        self._late = len(data) + zeros
        super().__init__(data + bytes(zeros) + END)

    def read(self, size: int | None = -1) -> bytes:
        """As of any file, but no read goes past one of the two places."""
        position = self.tell()
        cuts = (self._early, self._late)
        if position in cuts and self.image is not None:
            self._has_last_row[position] = _has_last_row(self.image)
        end = min((cut for cut in cuts if cut > position), default=None)
        if end is not None and size is not None and not 0 <= size <= end - position:
            size = end - position
        return super().read(size)

    def check(self) -> None:
        """After decoding.

        Raises:
            SampleError: the data do not fill the picture.
            OSError: nor is there an end mark.
        """
        if self.image is None or not self._late:
            return
        # Pillow does not ask for more once it has all rows; should it, they were there before.
        if self.tell() <= self._early or self._has_last_row.get(self._early, False):
            raise SampleError("damaged inside: a JPEG whose data go on after its picture is complete")
        if not self._has_last_row.get(self._late, True) and _has_last_row(self.image):
            if not self._ended:
                raise OSError("image file is truncated: its data end before its picture is complete")
            raise SampleError("damaged inside: a JPEG whose data end before its picture is complete")


def decoded(decode: Callable[[], Pixels]) -> tuple[Pixels, list[str]]:
    """What decode() makes of a JPEG by libjpeg, and what libjpeg says to be damaged in it.

    Only the first thing comes that it notices.
    """
    pixels, said = lines_to_c_stderr(decode, _OF_LIBJPEG)
    return pixels, [line for line in said if _DAMAGE.match(line)]


def is_doubtful(line: str, jpeg: Jpeg) -> bool:
    """Whether libjpeg may say so of a whole picture, too: some encoders leave a few bytes more or less."""
    surplus = _SURPLUS.search(line)
    if jpeg.data_end and not jpeg.restarts:
        return surplus is not None or "premature end" in line
    return surplus is not None and int(surplus[1]) <= _MOST_SURPLUS


def ends_grey(pixels_HWC: np.ndarray) -> bool:
    """Whether the last pixels are what missing data become. Pictures may be so; then `WatchedJpeg` decides."""
    return bool((pixels_HWC[-_CORNER_PX:, -_CORNER_PX:] == _GREY).all())


def _has_last_row(image: Image.Image) -> bool:
    """Whether anything stands in the last row; before it is decoded it is zero."""
    width, height = image.size
    return image.im.crop((0, height - 1, width, height)).getbbox() is not None
