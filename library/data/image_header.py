"""What an encoded image's header says: its upright size, and whether it can be decoded at a bearable cost.

Sizes are those of the upright picture: EXIF orientation is applied first.
"""

import io
import warnings
from collections.abc import Callable
from typing import Any

from PIL import Image, UnidentifiedImageError

from library.data.bad_samples import SampleError

# By content, whatever the file's extension says. Pillow knows more kinds, of which some call other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "AVIF", "GIF")
MIN_SIDE_PX = 8  # one column of the VAE's latents; what is smaller holds no picture (a tracking pixel)
MAX_PIXELS = 178_956_970  # twice Pillow's own warning limit; more in one file is a decompression bomb
_ORIENTATION = 0x0112  # the EXIF tag
_TURNED = frozenset({5, 6, 7, 8})  # orientations that swap width and height
# Only the header's size is asked for: these bytes hold it in nearly every file, whatever metadata comes before.
HEADER_BYTES = 1 << 16
MAX_BYTES = 1 << 29  # of one encoded image; more is no picture, and would be read into memory as a whole
_MAX_SCANS = 100  # of a progressive JPEG, each of which costs a pass over all pixels; ten are usual


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) in px of an encoded image as it is to be seen, from its header.

    Args:
        data: the file or at least its beginning (HEADER_BYTES).

    Raises:
        SampleError: not an image, too small or too large.
    """
    return reported(lambda: upright_size_of(open_image(data)))


def open_image(data: bytes) -> Image.Image:
    """The image with its header read, its size and cost within bounds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of strange metadata and of sizes, which are judged here
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise SampleError(f"{image.width}×{image.height} px is more than the {MAX_PIXELS} that one image may have")
    if min(image.size) < MIN_SIDE_PX:
        raise SampleError(f"{image.width}×{image.height} px is too small, {MIN_SIDE_PX} a side are the least")
    if image.info.get("progressive") and data.count(b"\xff\xda") > _MAX_SCANS:  # start-of-scan markers
        raise SampleError(f"a progressive JPEG of more than {_MAX_SCANS} scans, made to take long")
    return image


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 if there is none. (Asked for it, Pillow reads a whole PNG to find EXIF behind the pixels.)"""
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1
    return int(image.getexif().get(_ORIENTATION, 1))


def is_turned(image: Image.Image) -> bool:
    """Whether width and height are exchanged in the upright picture."""
    return orientation(image) in _TURNED


def upright_size_of(image: Image.Image) -> tuple[int, int]:
    """(width, height) in px of an image whose header is read."""
    return (image.height, image.width) if is_turned(image) else (image.width, image.height)


def reported(work: Callable[[], Any]) -> Any:
    """What work() returns; whatever an image decoder raises on damaged input becomes a SampleError with the reason."""
    try:
        return work()
    except (SampleError, MemoryError):  # no memory says nothing about the sample
        raise
    except UnidentifiedImageError as error:  # its own message holds an address in memory, another each time
        raise SampleError(f"UnidentifiedImageError: no image of a known kind ({' '.join(_FORMATS)})") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, EOFError …
        reason = str(error).rpartition(".cpp:")[2]  # torchvision's begins with the place in its source
        raise SampleError(f"{type(error).__name__}: {reason}".replace("\n", " ")[:300]) from error
