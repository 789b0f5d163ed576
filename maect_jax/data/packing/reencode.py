"""A picture as it goes into a record: checked by decoding it, and made smaller where that is asked for."""

import io
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from maect_jax.data.host import npy
from maect_jax.data.host.crops import resize
from maect_jax.data.host.decode import Picture, open_picture
from maect_jax.errors import BadPicture

_LONGEST_JPEG = 65_500  # pixels of a side, in libjpeg
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
        image, is_npy, encoded = picture, picture.shape[2] not in (1, 3), b""
    elif is_npy := picture.startswith(npy.SIGNATURE):
        image, encoded = npy.pixels_of(picture, _npy_channels(picture), where), picture
    else:
        header = open_picture(picture, 3, where)
        image, encoded = replace(header, channels=1 if _is_grey(header) else 3).pixels(), picture
    channels, before = image.shape[2], len(encoded) or image.nbytes
    height, width = image.shape[:2]
    if short_side is not None and min(height, width) > short_side:
        # int() as in `crops.central_crop`, which then finds the shorter side right and resizes nothing
        long_side = int(short_side * max(height, width) / min(height, width))
        if long_side > _LONGEST_JPEG and not is_npy:
            raise BadPicture(where, f"{width}x{height} pixels are too long for a JPEG", "cut it")
        size = (long_side, short_side) if height > width else (short_side, long_side)
        small = _resized(image, *size)
        encoded = _npy_bytes(small) if is_npy else _jpeg_bytes(small, quality)
    elif not encoded:
        encoded = _npy_bytes(image) if is_npy else _saved(image, "PNG")
    return Packed(encoded, channels, is_npy, before)


def _is_grey(header: Picture) -> bool:
    if header.kind == "jpeg":
        return header.colours == "Gray"
    with Image.open(io.BytesIO(header.encoded)) as image:
        return image.mode in _GREY or image.mode.startswith("I;16")


def _npy_channels(encoded: bytes) -> int:
    """As its header says; any number where it has none, because it is refused then."""
    try:
        file = io.BytesIO(encoded)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return (*read(file)[0], 1, 1)[2]
    except Exception:  # NumPy's parser raises whatever it likes
        return 1


def _resized(image_hwc: np.ndarray, height: int, width: int) -> np.ndarray:
    if image_hwc.dtype == np.uint8:
        return resize(image_hwc, height, width)
    planes = [Image.fromarray(plane.astype(np.float32)) for plane in np.moveaxis(image_hwc, 2, 0)]
    small = np.stack([plane.resize((width, height), Image.Resampling.BICUBIC) for plane in planes], axis=2)
    return np.clip(np.rint(small), 0, np.iinfo(image_hwc.dtype).max).astype(image_hwc.dtype)


def _jpeg_bytes(image_hwc: np.ndarray, quality: int) -> bytes:
    """By Pillow, because simplejpeg's encoder always takes the fast, less exact transform."""
    return _saved(image_hwc, "JPEG", quality=quality, subsampling="4:2:0")


def _saved(image_hwc: np.ndarray, form: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image_hwc[:, :, 0] if image_hwc.shape[2] == 1 else image_hwc).save(file, form, **options)
    return file.getvalue()


def _npy_bytes(image_hwc: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, image_hwc, allow_pickle=False)
    return file.getvalue()
