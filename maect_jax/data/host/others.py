"""PNG, WebP, GIF, BMP, PPM and TIFF, and JPEGs of odd samplings: decoded by Pillow.

Only the readers of these forms are let near the bytes: others of Pillow start programs (EPS) or are hardly used. What
Pillow has to say besides, in warnings and in its log, is of use to nobody here: what is wrong with a picture is in the
error, and the rest (a broken EXIF block, an odd palette) is not wrong.
"""

import io
import logging
import warnings
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from maect_jax.data.host import forms
from maect_jax.data.host.limits import MAX_PIXELS, check_size, unreadable
from maect_jax.errors import BadPicture, DataError

warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

_READERS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


def size_of(encoded: bytes, where: str) -> tuple[int, int]:
    """(height, width) of the upright picture, from its header.

    Raises:
      BadPicture: no picture, too large, or of a form that is not taken.
    """
    try:
        image = _opened(encoded, where)
        turned = _may_be_turned(encoded, image.format) and _orientation(image) in _TURNED
    except Exception as error:
        raise _refused(encoded, where, error) from error
    return (image.width, image.height) if turned else (image.height, image.width)


def decode(encoded: bytes, channels: int, where: str) -> np.ndarray:
    """Pixels of the upright picture, uint8 [h, w, channels]; of an animation or several pages the first.

    Raises:
      BadPicture: as `size_of`; damaged or cut off.
    """
    try:
        if encoded.startswith(b"\x89PNG"):
            _check_sums(encoded)
        image = _eight_bits(_upright(_opened(encoded, where)))
        mode = "L" if channels == 1 else "RGB"
        if image.mode != mode:
            whole, image = image, image.convert(mode)
            whole.close()
        pixels = np.asarray(image)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, zlib.error …
        raise _refused(encoded, where, error) from error
    return pixels.reshape(*pixels.shape[:2], channels)


def _opened(encoded: bytes, where: str) -> Image.Image:
    """With its header read, when its size and mode are taken."""
    image = Image.open(io.BytesIO(encoded), formats=_READERS)
    # Pillow holds a WebP picture four times over while it decodes it
    check_size(image.height, image.width, where, MAX_PIXELS // 2 if image.format == "WEBP" else MAX_PIXELS)
    kind = None
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        kind = "floats" if image.mode == "F" else "integers of 32 bits, or with a sign,"
        kind += " have no fixed range"
    elif image.mode == "LAB":
        kind = "its colours are LAB"
    if kind:
        raise BadPicture(where, f"{image.format}: {kind}", "convert it to 8-bit RGB or grey")
    return image


def _upright(image: Image.Image) -> Image.Image:
    """Decoded, with the camera's rotation applied; a broken EXIF block is no reason to lose the picture."""
    image.load()
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:
        image.load()
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey is divided by 256, where Pillow's own conversion would clip it at 255."""
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        image.close()
        return Image.fromarray((grey.clip(0, 0xFFFF) >> 8).astype(np.uint8))
    return image


def _may_be_turned(encoded: bytes, form: str) -> bool:
    """Whether to ask for EXIF: Pillow gives the upright size of a TIFF, and decodes a PNG to look behind its pixels."""
    if form != "PNG":
        return form != "TIFF"
    return any(
        kind == b"eXIf" or encoded.startswith((b"Raw profile type exif\0", b"XML:com.adobe.xmp\0"), start)
        for kind, start, _ in _chunks(encoded)
    )


def _chunks(png: bytes):
    """(kind, start, end) of each chunk up to the last."""
    at = 8
    while at + 8 <= len(png):
        kind, start = png[at + 4 : at + 8], at + 8
        end = start + int.from_bytes(png[at : at + 4], "big")
        yield kind, start, end
        if kind == b"IEND":
            return
        at = end + 4


def _check_sums(png: bytes) -> None:
    """Compares the check sums of the pixels, which Pillow leaves out.

    Raises:
      ValueError: one does not fit.
    """
    view = memoryview(png)
    for kind, start, end in _chunks(png):
        if kind == b"IDAT" and zlib.crc32(view[start - 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ValueError("cut off" if end + 4 > len(png) else "the check sum of its pixels is wrong")


def _refused(encoded: bytes, where: str, error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    if isinstance(error, Image.DecompressionBombError):
        return BadPicture(where, f"more than {MAX_PIXELS} pixels", "scale the picture down")
    if isinstance(error, UnidentifiedImageError):
        return unreadable(where, *forms.foreign(encoded))
    return unreadable(where, f"damaged {forms.taken(encoded) or 'file'}: {str(error) or type(error).__name__}")
