"""What an encoded image's header says: its upright size, and whether it can be decoded at a bearable cost.

Sizes are those of the upright picture: EXIF orientation is applied first.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

from PIL import Image, UnidentifiedImageError, features

from library.data.bad_samples import SampleError
from library.data.image_formats import avif, jpeg, png, webp
from library.data.image_formats.colour_profile import Conversion, channels_of, conversion
from library.data.image_formats.exif import orientation_of
from library.data.image_formats.file_bytes import FIRST_BLOCK, Facts, FileBytes
from library.data.image_formats.jpeg import Jpeg
from library.data.image_formats.jpeg_data import WatchedJpeg

# By content, whatever the file's extension says. Pillow knows more kinds, of which some call other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "AVIF", "GIF", "TIFF")
MIN_SIDE_PX = 8  # one column of the VAE's latents; what is smaller holds no picture (a tracking pixel)
MAX_PIXELS = 178_956_970  # twice Pillow's own warning limit; more in one file is a decompression bomb
_TURNED = frozenset({5, 6, 7, 8})  # orientations that swap width and height
_HEADER_BYTES = 1 << 12  # hold the size in a BMP or GIF
MAX_BYTES = 1 << 29  # of one encoded image; more is no picture, and would be read into memory as a whole
_MAX_SCANS = 100  # of a progressive JPEG, each of which costs a pass over all pixels; ten are usual


@dataclass(frozen=True)
class Picture:
    """An image with its header read, its size and cost within bounds.

    Attributes:
        image: not decoded yet, and not turned.
        orientation: EXIF's, 1 to 8.
        icc: its colour profile; b"" if it has none.
        jpeg: of a JPEG, what its segments say, and its file without metadata.
        watched: of a JPEG, the file that the image is decoded from.
    """

    image: Image.Image
    orientation: int
    icc: bytes
    jpeg: Jpeg | None = None
    watched: WatchedJpeg | None = None

    @property
    def is_turned(self) -> bool:
        """Whether width and height are exchanged in the upright picture."""
        return self.orientation in _TURNED

    @property
    def upright_wh_px(self) -> tuple[int, int]:
        """Size of the upright picture."""
        return self.image.size[::-1] if self.is_turned else self.image.size


class Header(NamedTuple):
    """What the index wants to know of an image.

    Attributes:
        upright_wh_px: size of the upright picture.
        is_turned: whether EXIF exchanges width and height.
        profile: what its colour profile does.
    """

    upright_wh_px: tuple[int, int]
    is_turned: bool = False
    profile: Conversion = Conversion()


def upright_size(read: FileBytes) -> tuple[int, int]:
    """(width, height) in px of an encoded image as it is to be seen, from its header.

    Raises:
        SampleError: not an image, too small or too large.
    """
    return header(read).upright_wh_px


def header(read: FileBytes) -> Header:
    """What an image's first bytes say.

    Raises:
        SampleError: not an image, too small or too large.
    """

    def look() -> Header:
        found = _facts(read)
        _check_size(found.width, found.height)
        return _header(found)

    return reported(look)


def header_if_known(read: FileBytes) -> Header:
    """The same, but for an image whose size another file gives: what cannot be read says nothing, and costs nothing."""
    try:
        found = _facts_of_header(read)
    except MemoryError:  # says nothing about the sample
        raise
    except Exception:  # of the kinds that `reported` tells of
        found = None
    return Header((0, 0)) if found is None else _header(found)


def open_picture(data: bytes) -> Picture:
    """Read the header of a whole file.

    Raises:
        SampleError: it is too small, too large or made to take long; or, as whatever Pillow raises, no image.
    """
    if data.startswith(jpeg.START):
        bare = jpeg.without_metadata(data)
        if bare.scans > _MAX_SCANS:
            raise SampleError(f"a progressive JPEG of more than {_MAX_SCANS} scans, made to take long")
        if not bare.ended and not bare.data_end:
            raise OSError("image file is truncated: a JPEG of several scans without an end mark")
        watched = WatchedJpeg(bare)
        watched.image = _opened(watched)
        return Picture(watched.image, bare.orientation, bare.icc, bare, watched)
    if data.startswith(png.START):
        plain = png.without_metadata(data)
        return Picture(_opened(io.BytesIO(plain.data)), plain.orientation, plain.icc)
    if avif.is_avif(data):
        data = avif.without_exif(data)
    image = _opened(io.BytesIO(data))
    found = _facts_of_header(FileBytes.of(data))
    return Picture(image, _orientation(image) if found is None else found.orientation, _profile(image))


def known_kinds() -> list[str]:
    """The kinds of images that can be decoded with the Pillow that is installed, which may lack some."""
    codecs = {"JPEG": "jpg", "PNG": "zlib", "WEBP": "webp", "AVIF": "avif"}
    return [kind for kind in _FORMATS if kind not in codecs or features.check(codecs[kind])]


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


def _facts(read: FileBytes) -> Facts:
    """Size and orientation of any known kind of image."""
    found = _facts_of_header(read)
    if found is not None:
        return found
    image = None
    if read.size > _HEADER_BYTES:
        try:
            image = _opened(io.BytesIO(read(0, _HEADER_BYTES)))
        except SampleError:
            raise
        except Exception:  # a cut file makes decoders raise anything; the whole one decides
            image = None
    image = _opened(io.BytesIO(read(0, read.size))) if image is None else image
    return Facts(image.width, image.height, _orientation(image), _profile(image), channels_of(image))


def _facts_of_header(read: FileBytes) -> Facts | None:
    """Size and orientation of the kinds whose headers are read here; None of others."""
    start = read(0, min(read.size, FIRST_BLOCK))
    if start.startswith(jpeg.START):
        return jpeg.plain_facts(start) or jpeg.facts(read)
    if start.startswith(png.START):
        return png.facts(read)
    if webp.is_webp(start):
        return webp.facts(read)
    if avif.is_avif(start):
        try:
            return avif.facts(read)
        except SampleError:
            return None
    return None


def _header(found: Facts) -> Header:
    turned = found.orientation in _TURNED
    size = (found.height, found.width) if turned else (found.width, found.height)
    return Header(size, turned, conversion(found.icc, found.channels))


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise SampleError(f"{width}×{height} px is more than the {MAX_PIXELS} that one image may have")
    if min(width, height) < MIN_SIDE_PX:
        raise SampleError(f"{width}×{height} px is too small, {MIN_SIDE_PX} a side are the least")


def _opened(file: IO[bytes]) -> Image.Image:
    """Pillow's image with its header read and its size checked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of strange metadata and of sizes, which are judged here
        image = Image.open(file, formats=_FORMATS)
    _check_size(*image.size)
    if image.format == "TIFF" and image.mode in ("I", "F"):  # what is white is not said
        raise SampleError("its pixels are numbers of 32 bits; save it with 8 or 16 bits a colour")
    return image


def _orientation(image: Image.Image) -> int:
    exif = image.info.get("exif")
    return orientation_of(exif) if isinstance(exif, bytes) else 1


def _profile(image: Image.Image) -> bytes:
    icc = image.info.get("icc_profile")
    return icc if isinstance(icc, bytes) else b""
