"""JPEG by libjpeg-turbo: to the bit what Pillow gives, which holds the same library, in three quarters of the time.

It is asked to be strict. What libjpeg-turbo only warns of is damage, and from there on the pixels are garbage, which
Pillow gives without a word. (JPEG has no check sums: a flipped bit that leaves a valid stream is noticed by nobody.)
"""

import re

import numpy as np
import simplejpeg
from PIL import Image

SIGNATURE = b"\xff\xd8\xff"
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width

_ORIENTATION = 0x0112
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_LOSSLESS, _HIERARCHICAL = (0xC3, 0xC7, 0xCB, 0xCF), (0xC5, 0xC6, 0xCD, 0xCE, 0xDE)


def read_header(encoded: bytes) -> tuple[int, int, str] | None:
    """(height, width, colours) as stored; colours are 'Gray', 'YCbCr', 'RGB', 'CMYK' or 'YCCK'.

    None where simplejpeg does not know what it is: damage, or a sampling that only libjpeg's own interface takes.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded, strict=False)
    except (ValueError, KeyError):  # KeyError: a sampling or colour space that has no name there
        return None
    return height, width, colours


def decode(encoded: bytes, stored: tuple[int, int], colours: str, channels: int, reduction: int = 1) -> np.ndarray:
    """uint8 [h, w, channels] as stored, not yet turned; grey and CMYK as Pillow converts them.

    Args:
      encoded: the file's bytes.
      stored: height and width, pixels.
      colours: as of `read_header`.
      channels: 1 (grey) or 3 (RGB).
      reduction: 2, 4 or 8 gives ceil(side / reduction).

    Raises:
      ValueError: damaged or cut off, in the library's words.
    """
    least = {}
    if reduction > 1:
        height, width = (-(-side // reduction) for side in stored)
        least = {"min_height": height, "min_width": width, "min_factor": reduction}
    if colours in ("CMYK", "YCCK"):
        return _converted(_inks(simplejpeg.decode_jpeg(encoded, "CMYK", **least)), channels)
    if channels == 3 or colours == "Gray":
        return simplejpeg.decode_jpeg(encoded, "RGB" if channels == 3 else "GRAY", **least)
    return _converted(Image.fromarray(simplejpeg.decode_jpeg(encoded, "RGB", **least)), channels)


def _inks(stored: np.ndarray) -> Image.Image:
    """Of what is stored, which is overwritten: Adobe inverts, and Pillow takes everybody to do so."""
    np.invert(stored, out=stored)
    return Image.frombuffer("CMYK", stored.shape[1::-1], stored, "raw", "CMYK", 0, 1)


def _converted(image: Image.Image, channels: int) -> np.ndarray:
    image = image.convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], channels)


def _segments(encoded: bytes):
    """(marker, where it starts, where it ends) of each segment before the first scan."""
    at, end = 2, len(encoded) - 4
    while at < end and encoded[at] == 0xFF:
        marker = encoded[at + 1]
        if marker == 0xFF:  # fills up
            at += 1
            continue
        if marker == 0xDA:
            return
        length = encoded[at + 2] << 8 | encoded[at + 3]
        yield marker, at + 4, at + 2 + length
        at += 2 + length


def orientation(encoded: bytes) -> int:
    """How the camera was held, 1 to 8, as Pillow finds it in EXIF and then in XMP; 1 where it is not said or broken."""
    exif = xmp = b""
    for marker, start, end in _segments(encoded):
        if marker != 0xE1:
            continue
        if encoded.startswith(_EXIF, start):
            exif += encoded[start + 6 if exif else start : end]  # a long block goes on in the next segment
        elif encoded.startswith(_XMP, start):
            xmp = encoded[start:end]
    said = None
    if exif:
        try:
            block = Image.Exif()
            block.load(exif)
            said = block.get(_ORIENTATION)
        except Exception:  # a broken block is no reason to lose the picture
            return 1
    if said is None and (match := re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp)):
        said = int(match[1])
    return next((o for o in range(2, 9) if said == o), 1)


def turned(image_hwc: np.ndarray, orientation: int) -> np.ndarray:
    """Upright: the eight ways in which EXIF says a camera was held."""
    if orientation in TURNED:
        image_hwc = image_hwc.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image_hwc = image_hwc[::-1]
    if orientation in (2, 3, 6, 7):
        image_hwc = image_hwc[:, ::-1]
    return image_hwc


def stored_box(box: tuple[int, int, int, int], upright: tuple[int, int], orientation: int) -> tuple[int, int, int, int]:
    """Where a box (top, left, height, width) of the upright picture of size (height, width) lies as it is stored.

    Boxes are turned, not pictures, because a reduced picture of odd size does not end where the picture ends: counted
    from its other side, its pixels are up to a pixel off.
    """
    top, left, height, width = box
    if orientation in (3, 4, 7, 8):
        top = upright[0] - top - height
    if orientation in (2, 3, 6, 7):
        left = upright[1] - left - width
    return (left, top, width, height) if orientation in TURNED else (top, left, height, width)


def refusal(encoded: bytes) -> str | None:
    """What a JPEG is that is not taken, by its frame; None where its form is one that is."""
    for marker, start, _ in _segments(encoded):
        if marker in _LOSSLESS:
            return "lossless JPEG"
        if marker in _HIERARCHICAL:
            return "hierarchical JPEG"
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(encoded) > start + 6:
            bits, colours = encoded[start], encoded[start + 5]
            if bits != 8:
                return f"JPEG of {bits} bits"
            return None if colours in (1, 3, 4) else f"JPEG of {colours} colours"
    return None
