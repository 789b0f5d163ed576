"""Pictures on the host: encoded bytes to uint8 arrays, crops and resizes, all with Pillow.

No JAX in this file: it is what loader processes run. Every function is pure; random crops are counters
(docs/design.md, decision 5): a function of (seed, epoch, sample id, view) and of nothing else.
"""

import io
import math
import os

import numpy as np
from PIL import Image, ImageOps

from maect_jax.errors import DataError

# Pillow's own warning bound (a quarter of a GiB of RGB); checked here so that no global of Pillow is changed.
MAX_PIXELS = 89_478_485

# First word of a Philox key is the seed, the second says what the numbers are for, so that no two uses share any.
ORDER, CROP, SUBSET = 1, 2, 3


def random_words(seed: int, purpose: int, counter: tuple[int, int, int], n: int) -> np.ndarray:
    """The n random uint64 words that belong to (seed, purpose, counter), uint64 [n].

    Raw words of the bit generator, because NumPy promises those to be the same in every version,
    and does not promise it of `Generator.permutation` or `Generator.uniform`.

    Args:
      seed: any int (taken modulo 2^64).
      purpose: ORDER, CROP or SUBSET.
      counter: three ints >= 0, for instance (epoch, sample id, view).
      n: how many words.
    """
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, purpose], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, *counter], np.uint64)).random_raw(n)


def threads() -> int:
    """How many threads decode at once in this process; Pillow lets go of the interpreter while it works."""
    return min(16, os.cpu_count() or 1)


def _open(encoded: bytes | str | os.PathLike, where: str) -> Image.Image:
    image = Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded)
    if image.width * image.height > MAX_PIXELS:
        raise DataError(
            f"{where}: {image.width}x{image.height} pixels are more than {MAX_PIXELS}; "
            "scale the picture down or take it out"
        )
    return image


def _undecodable(where: str, error: Exception) -> DataError:
    reason = "no such file" if isinstance(error, FileNotFoundError) else str(error) or type(error).__name__
    return DataError(f"{where}: not a readable picture ({reason}); replace the file or take it out")


def _upright(image: Image.Image) -> None:
    """Applies the camera's rotation in place; a broken EXIF block is no reason to lose the picture."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:
        image.load()  # raises when it is the pixels that are broken


def decode(encoded: bytes | str | os.PathLike, channels: int, where: str) -> np.ndarray:
    """An encoded picture as pixels, upright (EXIF), converted to grey or RGB.

    Args:
      encoded: the file's bytes, or its path.
      channels: 1 (grey) or 3 (RGB). Alpha is dropped; 16-bit grey is scaled to 8 bit.
      where: what an error calls the picture (its path, or data set and record number).

    Returns:
      uint8 [h, w, channels].

    Raises:
      DataError: the picture can not be read, or has more than MAX_PIXELS pixels.
    """
    if channels not in (1, 3):
        raise DataError(f"{where}: a picture file gives 1 or 3 channels, not {channels}; set channels to 1 or 3")
    mode = "L" if channels == 1 else "RGB"
    try:
        with _open(encoded, where) as image:
            image.load()
            _upright(image)
            if image.mode.startswith("I"):  # 16-bit grey: `convert` would clip at 255
                grey = np.asarray(image).astype(np.int64) >> 8
                image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
            elif image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except DataError:
        raise
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error, zlib.error …
        raise _undecodable(where, error) from error
    return pixels.reshape(*pixels.shape[:2], channels)


def header_size(encoded: bytes | str | os.PathLike, where: str) -> tuple[int, int]:
    """(height, width) as `decode` would give them, from the header alone where the format has one.

    Raises:
      DataError: as `decode`.
    """
    try:
        with _open(encoded, where) as image:
            if image.format == "TIFF":  # rotated by Pillow while loading
                return decode(encoded, 3, where).shape[:2]
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8) if image.format in ("JPEG", "WEBP") else False
            return (image.width, image.height) if turned else (image.height, image.width)
    except DataError:
        raise
    except Exception as error:
        raise _undecodable(where, error) from error


def resize(image_hwc: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic, antialiased (Pillow's filter). Unchanged when the size is right already.

    Args:
      image_hwc: uint8 [h, w, c], any c; channels are independent.
      height, width: of the result, pixels.

    Returns:
      uint8 [height, width, c].
    """
    if image_hwc.shape[:2] == (height, width):
        return image_hwc
    if image_hwc.shape[2] == 3:
        image = Image.fromarray(np.ascontiguousarray(image_hwc))
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(image_hwc, 2, 0)]
    resized = [np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) for plane in planes]
    return np.stack(resized, axis=2)


def crop_box(
    height: int,
    width: int,
    *,
    seed: int,
    epoch: int,
    sample_id: int,
    view: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Where view `view` of a sample is cut out in an epoch: (top, left, height, width) in pixels.

    The area is uniform in `scale`, the aspect ratio log-uniform in `ratio`, ten tries; when none fits, the largest
    central box whose aspect lies in `ratio`.

    Args:
      height, width: of the picture.
      seed, epoch, sample_id, view: what the box is a pure function of.
      scale: least and greatest share of the picture's area.
      ratio: least and greatest width / height.

    Source: torchvision's RandomResizedCrop (Szegedy et al. 2015, section 6).
    """
    words = random_words(seed, CROP, (epoch, sample_id, view), 40)
    uniform = ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(10, 4)
    for area_share, log_position, from_top, from_left in uniform.tolist():
        area = height * width * (scale[0] + area_share * (scale[1] - scale[0]))
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + log_position * (high - low))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(from_top * (height - box_height + 1))
            left = int(from_left * (width - box_width + 1))
            return top, left, box_height, box_width
    box_height, box_width = height, width
    if width / height < ratio[0]:
        box_height = max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        box_width = max(1, min(width, round(height * ratio[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def resized_crop(image_hwc: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """The box (top, left, height, width), cut out and then resized, so that nothing outside it bleeds in.

    Returns:
      uint8 [size, size, c].
    """
    top, left, height, width = box
    return resize(image_hwc[top : top + height, left : left + width], size, size)


def central_crop(image_hwc: np.ndarray, size: int, resize_ratio: float) -> np.ndarray:
    """What evaluation sees: shorter side to round(size * resize_ratio), then the central size x size pixels.

    Args:
      image_hwc: uint8 [h, w, c].
      size: of the result, pixels.
      resize_ratio: >= 1; 256/224 is the custom of ImageNet, 1 leaves a size x size picture untouched.

    Returns:
      uint8 [size, size, c].
    """
    height, width = image_hwc.shape[:2]
    short = round(size * resize_ratio)
    if height <= width:
        resized = resize(image_hwc, short, int(short * width / height))
    else:
        resized = resize(image_hwc, int(short * height / width), short)
    top, left = round((resized.shape[0] - size) / 2), round((resized.shape[1] - size) / 2)
    return resized[top : top + size, left : left + size]
