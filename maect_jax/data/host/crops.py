"""Pixels to what a model sees: random-resized crops for training, the central crop for evaluation.

Both use the bicubic filter of Pillow (a = -0.5), antialiased: stretched by the factor by which the picture shrinks.
Evaluation is done by Pillow itself, to the bit. Training crops are cut and resized in one pass by fast_image_resize
(SIMD, the same results on every CPU), as exact as Pillow and at most some grey levels from it, because both round
between their two passes; where it is not installed, Pillow does it.

No JAX here: it is what loader processes run.
"""

import numpy as np
from PIL import Image

from maect_jax.data.host.decode import Picture
from maect_jax.data.host.jpeg import stored_box, turned
from maect_jax.data.host.limits import MAX_PIXELS

try:
    from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
except ImportError:  # there is no wheel of it for this machine
    Resizer = None

Box = tuple[int, int, int, int]  # top, left, height, width in pixels of the upright picture

REDUCED = 2  # a picture is decoded at a half, a quarter, an eighth while every crop stays this many times its size


def reduction_for(boxes: list[Box], size: int) -> int:
    """By how much (1, 2, 4 or 8) a JPEG may be reduced while it is decoded, for crops of `size` pixels.

    The decoder reduces by leaving out frequencies of each 8x8 block, which is not the bicubic filter; as long as the
    crops are at least `REDUCED` times too large afterwards the difference is about one grey level in the mean (tested).
    """
    smallest = min(min(height, width) for _, _, height, width in boxes)
    return next((r for r in (8, 4, 2) if smallest >= r * REDUCED * size), 1)


def training_crops(picture: Picture, boxes: list[Box], size: int, out_vssc: np.ndarray | None = None) -> np.ndarray:
    """The boxes of one picture, from one decode, each resized to size x size.

    Args:
      picture: its header.
      boxes: one a view.
      size: of the results, pixels.
      out_vssc: contiguous array that they are written to; None = a new one.

    Returns:
      uint8 [views, size, size, channels].

    Raises:
      BadPicture: it can not be decoded.
    """
    if out_vssc is None:
        out_vssc = np.empty((len(boxes), size, size, picture.channels), np.uint8)
    if picture.kind != "jpeg":
        image = picture.pixels()
        for crop, box in zip(out_vssc, boxes):
            resized_crop(image, box, crop)
        return out_vssc
    reduction = reduction_for(boxes, size)
    image, upright = picture.stored(reduction), (picture.height, picture.width)
    for crop, box in zip(out_vssc, boxes):
        resized_crop(image, stored_box(box, upright, picture.orientation), crop, reduction)
        if picture.orientation != 1:
            crop[:] = turned(crop, picture.orientation).copy()
    return out_vssc


def resized_crop(image_hwc: np.ndarray, box: Box, out_ssc: np.ndarray, reduction: int = 1) -> None:
    """Writes the box, cut out and then resized, to `out_ssc`: nothing outside the box bleeds in.

    Args:
      image_hwc: uint8 [h, w, c], `reduction` times smaller than the picture that `box` is of.
      box: top, left, height, width.
      out_ssc: uint8 [size, size, c], contiguous; overwritten.
      reduction: with 2 and more, up to one pixel beside the box has a weight, because the box need not end at a pixel.
    """
    size = out_ssc.shape[0]
    top, left, height, width = box
    bottom, right = -(-(top + height) // reduction), -(-(left + width) // reduction)
    first_row, first_column = top // reduction, left // reduction
    cut = image_hwc[first_row:bottom, first_column:right]
    inner = (
        left / reduction - first_column,
        top / reduction - first_row,
        min(width / reduction, cut.shape[1]),
        min(height / reduction, cut.shape[0]),
    )
    if Resizer is None or image_hwc.shape[2] not in _PIXELS:
        whole = inner == (0, 0, cut.shape[1], cut.shape[0])
        out_ssc[:] = resize(cut, size, size, None if whole else inner)
        return
    kind = _PIXELS[image_hwc.shape[2]]
    source = ImageData(cut.shape[1], cut.shape[0], kind, cut.tobytes())
    target = ImageData(size, size, kind)
    options = _BICUBIC
    if reduction > 1:
        options = _BICUBIC.copy()
        options.crop_box = CropBox(*inner)
    Resizer().resize(source, target, options)
    out_ssc[:] = np.frombuffer(target.get_buffer(), np.uint8).reshape(out_ssc.shape)


def resize(image_hwc: np.ndarray, height: int, width: int, box=None) -> np.ndarray:
    """Bicubic, antialiased, by Pillow. Unchanged when the size is right already.

    Args:
      image_hwc: uint8 [h, w, c], any c; channels are independent.
      height, width: of the result, pixels.
      box: (left, top, width, height) of what is resized, in pixels and parts of pixels; None = the whole.

    Returns:
      uint8 [height, width, c].
    """
    if box is None and image_hwc.shape[:2] == (height, width):
        return image_hwc
    edges = None if box is None else (box[0], box[1], box[0] + box[2], box[1] + box[3])

    def resized(pixels):
        image = Image.fromarray(np.ascontiguousarray(pixels))
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=edges))

    if image_hwc.shape[2] == 3:
        return resized(image_hwc)
    return np.stack([resized(plane) for plane in np.moveaxis(image_hwc, 2, 0)], axis=2)


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
        tall, wide = short, int(short * width / height)
    else:
        tall, wide = int(short * height / width), short
    top, left = round((tall - size) / 2), round((wide - size) / 2)
    if tall * wide > MAX_PIXELS:  # a strip a few pixels high would become gigabytes: only its centre is resized
        across, down = width / wide, height / tall
        return resize(image_hwc, size, size, (left * across, top * down, size * across, size * down))
    return resize(image_hwc, tall, wide)[top : top + size, left : left + size]


if Resizer is not None:
    _PIXELS = {1: PixelType.U8, 3: PixelType.U8x3}
    _BICUBIC = ResizeOptions(resize_alg=ResizeAlg.convolution(FilterType.catmull_rom), use_alpha=False)
else:
    _PIXELS = {}
