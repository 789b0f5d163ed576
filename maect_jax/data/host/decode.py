"""Encoded pictures to pixels: what a file may hold, and what becomes of each form.

  JPEG           libjpeg-turbo, to the bit what Pillow gives; reduced while decoding where that loses nothing
  PNG, WebP, BMP, GIF, PPM, TIFF, and JPEGs in CMYK or of odd samplings     Pillow
  .npy           uint8 or uint16 [h, w] or [h, w, c] with any number of channels; never unpickled

Pictures come out upright (EXIF), as 8 bit: 16-bit values are divided by 256, alpha is dropped, CMYK is converted, of
an animation or a file of several pages the first picture is taken. Refused by name: pixels without a fixed range
(32-bit integers and floats), LAB, more than MAX_PIXELS pixels or MAX_BYTES bytes, what is damaged or cut off.

No JAX here: it is what loader processes run.
"""

import io
import os
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from maect_jax.errors import BadPicture, DataError

# Pillow's own warning bound (a quarter of a GiB of RGB); checked here so that no global of Pillow is changed.
MAX_PIXELS = 89_478_485
MAX_BYTES = 1 << 28  # of an encoded picture

_JPEG, _NPY = b"\xff\xd8\xff", b"\x93NUMPY"
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
_ORIENTATION = 0x0112


def threads() -> int:
    """How many threads decode at once in this process; decoders let go of the interpreter while they work."""
    return min(16, os.cpu_count() or 1)


@dataclass(frozen=True)
class Picture:
    """An encoded picture of which the header is read.

    Attributes:
      encoded: the file's bytes; or the pixels themselves, where the set holds pixels.
      channels: wanted of the pixels.
      where: what an error calls the picture.
      height, width: upright, pixels.
      kind: 'jpeg' (libjpeg-turbo decodes it), 'npy', 'other' (Pillow) or 'pixels'.
      orientation: of EXIF, 1 = as it is; of JPEGs only, because Pillow turns the others itself.
    """

    encoded: bytes | np.ndarray
    channels: int
    where: str
    height: int
    width: int
    kind: str
    orientation: int = 1

    def pixels(self, reduction: int = 1) -> np.ndarray:
        """uint8 [h, w, channels]; of a JPEG `reduction` = 2, 4 or 8 gives ceil(side / reduction).

        Raises:
          BadPicture: it can not be decoded.
        """
        if self.kind == "jpeg":
            return _turned(_decode_jpeg(self, reduction), self.orientation)
        if self.kind == "pixels":
            return self.encoded
        return _decode_npy(self.encoded, self.channels, self.where) if self.kind == "npy" else _decode_other(self)


def open_picture(encoded: bytes | np.ndarray, channels: int, where: str) -> Picture:
    """Reads the header.

    Args:
      encoded: the file's bytes; pixels uint8 [h, w, c] are taken as they are.
      channels: 1 (grey) or 3 (RGB); of .npy files as many as they have.
      where: what an error calls the picture (its path, or data set and record number).

    Raises:
      BadPicture: no picture, too large, or of a form that is not taken.
      DataError: files of pictures do not give that number of channels.
    """
    if isinstance(encoded, np.ndarray):
        return Picture(encoded, channels, where, *encoded.shape[:2], "pixels")
    if len(encoded) > MAX_BYTES:
        raise BadPicture(where, f"{len(encoded)} bytes are more than {MAX_BYTES}", "scale the picture down")
    if encoded.startswith(_NPY):
        return Picture(encoded, channels, where, *_decode_npy(encoded, channels, where).shape[:2], "npy")
    if channels not in (1, 3):
        raise DataError(f"{where}: a picture file gives 1 or 3 channels, not {channels}; set channels to 1 or 3")
    if encoded.startswith(_JPEG):
        header = _jpeg_header(encoded, channels)
        if header:
            height, width = header
            _check_size(height, width, where)
            orientation = _orientation(encoded)
            if orientation in _TURNED:
                height, width = width, height
            return Picture(encoded, channels, where, height, width, "jpeg", orientation)
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            _check_size(image.height, image.width, where)
            if image.format == "TIFF":
                image.load()  # turns it, and only then is its size right
                turned = False
            else:
                turned = image.getexif().get(_ORIENTATION, 1) in _TURNED
            height, width = image.height, image.width
    except DataError:
        raise
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error, zlib.error …
        raise _undecodable(where, error) from error
    return Picture(encoded, channels, where, *((width, height) if turned else (height, width)), "other")


def decode(encoded: bytes | np.ndarray, channels: int, where: str) -> np.ndarray:
    """An encoded picture as pixels, uint8 [h, w, channels]; arguments and errors as `open_picture`."""
    return open_picture(encoded, channels, where).pixels()


def _check_size(height: int, width: int, where: str) -> None:
    if height * width > MAX_PIXELS:
        raise BadPicture(where, f"{width}x{height} pixels are more than {MAX_PIXELS}", "scale the picture down")


def _undecodable(where: str, error: Exception) -> BadPicture:
    return BadPicture(where, f"not a readable picture ({str(error) or type(error).__name__})", "replace it")


# ------------------------------------------------------------------------------------------------------------- JPEG


def _jpeg_header(encoded: bytes, channels: int) -> tuple[int, int] | None:
    """(height, width) as stored, or None where Pillow is to decode it: CMYK, odd samplings, colour to grey."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded, strict=False)
    except ValueError:
        return None
    return (height, width) if colours == "Gray" or (channels == 3 and colours in ("YCbCr", "RGB")) else None


def _orientation(encoded: bytes) -> int:
    if encoded.find(b"Exif\0\0", 0, 1 << 17) < 0:
        return 1
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block is no reason to lose the picture
        return 1


def _decode_jpeg(picture: Picture, reduction: int) -> np.ndarray:
    colours = "GRAY" if picture.channels == 1 else "RGB"
    height, width = picture.height, picture.width
    if picture.orientation in _TURNED:
        height, width = width, height
    least = {}
    if reduction > 1:
        least = {"min_height": -(-height // reduction), "min_width": -(-width // reduction), "min_factor": reduction}
    try:
        return simplejpeg.decode_jpeg(picture.encoded, colours, **least)
    except ValueError as error:
        raise _undecodable(picture.where, error) from error


def _turned(image_hwc: np.ndarray, orientation: int) -> np.ndarray:
    """Upright: the eight ways in which EXIF says a camera was held."""
    if orientation in _TURNED:
        image_hwc = image_hwc.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image_hwc = image_hwc[::-1]
    if orientation in (2, 3, 6, 7):
        image_hwc = image_hwc[:, ::-1]
    return image_hwc


# ----------------------------------------------------------------------------------------------------------- others


def _decode_other(picture: Picture) -> np.ndarray:
    mode = "L" if picture.channels == 1 else "RGB"
    try:
        with Image.open(io.BytesIO(picture.encoded)) as image:
            _check_size(image.height, image.width, picture.where)
            image.load()
            _upright(image)
            if refusal := _refusal(image):
                raise BadPicture(picture.where, refusal, "convert it to 8-bit RGB or grey")
            if image.mode.startswith("I"):  # 16-bit grey: `convert` would clip at 255
                grey = np.asarray(image).astype(np.int64) >> 8
                image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
            elif image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except DataError:
        raise
    except Exception as error:
        raise _undecodable(picture.where, error) from error
    return pixels.reshape(*pixels.shape[:2], picture.channels)


def _upright(image: Image.Image) -> None:
    """Applies the camera's rotation in place; a broken EXIF block is no reason to lose the picture."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:
        image.load()  # raises when it is the pixels that are broken


def _refusal(image: Image.Image) -> str | None:
    """Why pixels of this mode are not taken, or None."""
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        kind = "floats" if image.mode == "F" else "integers"
        return f"32-bit {kind} have no fixed range"
    return f"colours are {image.mode}" if image.mode == "LAB" else None


def _decode_npy(encoded: bytes, channels: int, where: str) -> np.ndarray:
    try:
        file = io.BytesIO(encoded)
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if dtype not in (np.uint8, np.uint16) or len(shape) not in (2, 3) or not all(shape):
            raise BadPicture(
                where, f"{dtype} {list(shape)} is no picture", "give uint8 or uint16 [height, width, channels]"
            )
        _check_size(*shape[:2], where)
        array = np.load(io.BytesIO(encoded), allow_pickle=False)
    except DataError:
        raise
    except Exception as error:
        raise _undecodable(where, error) from error
    pixels = array if array.dtype == np.uint8 else (array >> 8).astype(np.uint8)
    pixels = pixels if pixels.ndim == 3 else pixels[:, :, None]
    if pixels.shape[2] != channels:
        raise DataError(f"{where}: {pixels.shape[2]} channels, not {channels}; set channels to {pixels.shape[2]}")
    return pixels
