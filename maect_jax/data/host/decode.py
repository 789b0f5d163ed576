"""Encoded pictures to pixels: what a file may hold, and what becomes of each form.

  JPEG           libjpeg-turbo, to the bit what Pillow gives; reduced while decoding where that loses nothing (`jpeg`)
  PNG, WebP, BMP, GIF, PPM, TIFF, and JPEGs of odd samplings     Pillow (`others`)
  .npy           uint8 or uint16 [h, w] or [h, w, c] with any number of channels; never unpickled (`npy`)

The form is told by the content, not by the file's name. Pictures come out upright (EXIF), as 8 bit: 16-bit values are
divided by 256 (of colour and of PPM, as Pillow does it), alpha is dropped, CMYK is converted, of an animation or a file
of several pages the first picture is taken. Refused by name: pixels without a fixed range (32-bit integers and floats),
LAB, JPEGs of 12 bits or without loss, forms that are not in the list, more than MAX_PIXELS pixels or MAX_BYTES bytes,
what is damaged or cut off.

No JAX here: it is what loader processes run.
"""

import os
from dataclasses import dataclass

import numpy as np

from maect_jax.data.host import jpeg, npy, others
from maect_jax.data.host.limits import MAX_BYTES, check_size, unreadable
from maect_jax.errors import BadPicture, DataError


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """How many threads decode at once in this process; decoders let go of the interpreter while they work."""
    return min(16, cores())


@dataclass(frozen=True)
class Picture:
    """An encoded picture of which the header is read.

    Attributes:
      encoded: the file's bytes; or the pixels themselves, where the set holds pixels.
      channels: wanted of the pixels.
      where: what an error calls the picture.
      height, width: upright, pixels.
      kind: 'jpeg' (libjpeg-turbo decodes it), 'npy', 'other' (Pillow) or 'pixels'.
      colours: of JPEGs, as `jpeg.read_header`.
      orientation: of JPEGs, by EXIF; 1 = stored as it is seen. Other forms are turned while they are decoded.
    """

    encoded: bytes | np.ndarray
    channels: int
    where: str
    height: int
    width: int
    kind: str
    colours: str = ""
    orientation: int = 1

    def pixels(self) -> np.ndarray:
        """Upright, uint8 [h, w, channels].

        Raises:
          BadPicture: it can not be decoded.
        """
        if self.kind == "jpeg":
            return jpeg.turned(self.stored(), self.orientation)
        if self.kind == "pixels":
            return self.encoded
        if self.kind == "npy":
            return npy.eight_bits(npy.pixels_of(self.encoded, self.channels, self.where))
        pixels = others.decode(self.encoded, self.channels, self.where)
        if pixels.shape[:2] != (self.height, self.width):
            raise unreadable(self.where, "its header gives another size than its pixels")
        return pixels

    def stored(self, reduction: int = 1) -> np.ndarray:
        """Of a JPEG, as it is stored (`orientation` is not applied), sides ceil(side / reduction); 1, 2, 4 or 8.

        Raises:
          BadPicture: it can not be decoded.
        """
        size = (self.height, self.width)
        if self.orientation in jpeg.TURNED:
            size = size[::-1]
        try:
            return jpeg.decode(self.encoded, size, self.colours, self.channels, reduction)
        except ValueError as error:
            raise _refused_jpeg(self.encoded, self.where, str(error)) from error


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
        raise BadPicture(where, f"more than {MAX_BYTES} bytes", "scale the picture down")
    if encoded.startswith(npy.SIGNATURE):
        return Picture(encoded, channels, where, *npy.pixels_of(encoded, channels, where).shape[:2], "npy")
    if channels not in (1, 3):
        raise DataError(f"{where}: a picture file gives 1 or 3 channels, not {channels}; set channels to 1 or 3")
    if encoded.startswith(jpeg.SIGNATURE):
        if header := jpeg.read_header(encoded):
            height, width, colours = header
            check_size(height, width, where)
            orientation = jpeg.orientation(encoded)
            if orientation in jpeg.TURNED:
                height, width = width, height
            return Picture(encoded, channels, where, height, width, "jpeg", colours, orientation)
        if jpeg.refusal(encoded):
            raise _refused_jpeg(encoded, where, "")
    return Picture(encoded, channels, where, *others.size_of(encoded, where), "other")


def decode(encoded: bytes | np.ndarray, channels: int, where: str) -> np.ndarray:
    """An encoded picture as pixels, uint8 [h, w, channels]; arguments and errors as `open_picture`."""
    return open_picture(encoded, channels, where).pixels()


def _refused_jpeg(encoded: bytes, where: str, why: str) -> BadPicture:
    if refusal := jpeg.refusal(encoded):
        return BadPicture(where, f"{refusal} is not taken", "convert it to an 8-bit JPEG or a PNG")
    if "premature end" in why.lower():
        return unreadable(where, "the JPEG is cut off or damaged: its pixels end too early")
    return unreadable(where, f"damaged JPEG: {why.rsplit('(): ', 1)[-1]}")
