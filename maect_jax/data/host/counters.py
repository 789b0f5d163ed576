"""What is random on the host, as counters: functions of (seed, epoch, sample id, view) and of nothing else.

So the number of hosts, devices and workers changes nothing, and a run resumes by its step number (docs/data.md).
No JAX in this file: loader processes run it.
"""

import functools
import math
import threading

import numpy as np

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
    return _generator(seed, purpose, counter).random_raw(n)


_THREAD = threading.local()


def _generator(seed: int, purpose: int, counter: tuple[int, int, int]) -> np.random.Philox:
    """This thread's generator, set to the start of (seed, purpose, counter): making one takes three times as long."""
    if not hasattr(_THREAD, "generator"):
        _THREAD.generator = np.random.Philox(key=0)
        _THREAD.state = _THREAD.generator.state
    generator, state = _THREAD.generator, _THREAD.state
    state["state"]["key"][:] = seed & 0xFFFFFFFFFFFFFFFF, purpose
    state["state"]["counter"][:] = 0, *counter
    state["buffer_pos"] = 4  # of 4: no word of an earlier counter is left
    generator.state = state
    return generator


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The sample ids of an epoch in the order they are seen; a pure function of its arguments.

    Args:
      seed: of the run.
      epoch: from 0.
      n: samples in the training set.

    Returns:
      int32 [n], a permutation (read-only).
    """
    order = np.argsort(random_words(seed, ORDER, (epoch, 0, 0), n), kind="stable").astype(np.int32)
    order.flags.writeable = False
    return order


def step_ids(seed: int, step: int, batch: int, n: int) -> np.ndarray:
    """The sample ids of global step `step`, int32 [batch]; the last n % batch of an epoch are dropped."""
    epoch, within = divmod(step, n // batch)
    return epoch_order(seed, epoch, n)[within * batch : (within + 1) * batch]


def subset_ids(n: int, limit: int | None) -> np.ndarray:
    """`limit` of n sample ids, always the same ones, drawn over the whole set; int32, ascending."""
    if limit is None or limit >= n:
        return np.arange(n, dtype=np.int32)
    drawn = np.argsort(random_words(0, SUBSET, (0, 0, 0), n), kind="stable")[:limit]
    return np.sort(drawn).astype(np.int32)


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
    generator = _generator(seed, CROP, (epoch, sample_id, view))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area_share, log_position, from_top, from_left = ((x >> 11) * 2.0**-53 for x in generator.random_raw(4).tolist())
        area = height * width * (scale[0] + area_share * (scale[1] - scale[0]))
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
