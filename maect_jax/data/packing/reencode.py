"""A picture as it goes into a record: checked by decoding it, and made smaller where that is asked for."""

import io
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from maect_jax.data.host.crops import resize
from maect_jax.data.host.decode import decode, open_picture

_NPY, _JPEG = b"\x93NUMPY", b"\xff\xd8\xff"
_GREY = ("1", "L", "LA", "La", "I", "F")


@dataclass(frozen=True)
class Packed:
    """A picture for a record.

    Attributes:
      encoded: its bytes.
      channels: 1 for grey pictures, 3 for others; of .npy as many as it has.
      npy: whether it is in NumPy's form.
      source_bytes: that it had before.
    """

    encoded: bytes
    channels: int
    npy: bool
    source_bytes: int


def packed(picture: bytes | np.ndarray, where: str, short_side: int | None, quality: int) -> Packed:
    """What is put into the record of a picture.

    Bytes go in unchanged, unless the shorter side (upright, as EXIF says) is longer than `short_side`: then the picture
    is decoded as for training, resized (bicubic, antialiased) and written as a JPEG, grey as grey, colours as 4:2:0; an
    .npy file stays one, of the same type. Pixels become a PNG, or an .npy where the channels are neither 1 nor 3.

    Args:
      picture: encoded, or pixels uint8 [h, w, c].
      where: what an error calls it.
      short_side: pixels; None = leave every size as it is.
      quality: of JPEGs, 1..100.

    Raises:
      BadPicture: it can not be decoded.
    """
    if isinstance(picture, np.ndarray):
        image, npy, encoded = picture, picture.shape[2] not in (1, 3), b""
    elif npy := picture.startswith(_NPY):
        image, encoded = _array(picture, where), picture
    else:
        image, encoded = decode(picture, 1 if _is_grey(picture, where) else 3, where), picture
    channels, before = image.shape[2], len(encoded) or image.nbytes
    height, width = image.shape[:2]
    if short_side is not None and min(height, width) > short_side:
        # int() as in `crops.central_crop`, which then finds the shorter side right and resizes nothing
        tall = height > width
        size = (
            (int(short_side * height / width), short_side) if tall else (short_side, int(short_side * width / height))
        )
        small = _resized(image, *size)
        encoded = _npy_bytes(small) if npy else _jpeg_bytes(small, quality)
    elif not encoded:
        encoded = _npy_bytes(image) if npy else _png_bytes(image)
    return Packed(encoded, channels, npy, before)


def _is_grey(encoded: bytes, where: str) -> bool:
    open_picture(encoded, 3, where)  # refuses what is too large or no picture
    if encoded.startswith(_JPEG):
        try:
            return simplejpeg.decode_jpeg_header(encoded, strict=False)[2] == "Gray"
        except ValueError:  # of a form that Pillow decodes
            pass
    with Image.open(io.BytesIO(encoded)) as image:
        return image.mode in _GREY or image.mode.startswith("I;16")


def _array(encoded: bytes, where: str) -> np.ndarray:
    """uint8 or uint16 [h, w, c] of an .npy file."""
    channels = 1
    try:
        file = io.BytesIO(encoded)
        if np.lib.format.read_magic(file) == (1, 0):
            shape = np.lib.format.read_array_header_1_0(file)[0]
        else:
            shape = np.lib.format.read_array_header_2_0(file)[0]
        channels = shape[2] if len(shape) == 3 else 1
    except Exception:  # what is wrong is said by `decode`
        pass
    decode(encoded, channels, where)  # refuses every other type, and what is too large or cut off
    array = np.load(io.BytesIO(encoded), allow_pickle=False)
    return array if array.ndim == 3 else array[:, :, None]


def _resized(image_hwc: np.ndarray, height: int, width: int) -> np.ndarray:
    if image_hwc.dtype == np.uint8:
        return resize(image_hwc, height, width)
    planes = [Image.fromarray(plane.astype(np.float32)) for plane in np.moveaxis(image_hwc, 2, 0)]
    small = np.stack([plane.resize((width, height), Image.Resampling.BICUBIC) for plane in planes], axis=2)
    return np.clip(np.rint(small), 0, np.iinfo(image_hwc.dtype).max).astype(image_hwc.dtype)


def _jpeg_bytes(image_hwc: np.ndarray, quality: int) -> bytes:
    grey = image_hwc.shape[2] == 1
    colours = {"colorspace": "GRAY", "colorsubsampling": "Gray"} if grey else {"colorspace": "RGB"}
    options = colours if grey else colours | {"colorsubsampling": "420"}
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image_hwc), quality, **options)


def _png_bytes(image_hwc: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image_hwc[:, :, 0] if image_hwc.shape[2] == 1 else image_hwc).save(file, "PNG")
    return file.getvalue()


def _npy_bytes(image_hwc: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, image_hwc, allow_pickle=False)
    return file.getvalue()
