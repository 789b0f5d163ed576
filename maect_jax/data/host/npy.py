"""Pictures in NumPy's .npy form: the header is read here, word by word; nothing is evaluated or unpickled."""

import re

import numpy as np

from maect_jax.data.host.limits import check_size, unreadable
from maect_jax.errors import BadPicture, DataError

SIGNATURE = b"\x93NUMPY"
_LONGEST_HEADER = 4096
_KIND = re.compile(rb"'descr': *'([<>|=]?[A-Za-z][0-9]*)'")
_ORDER = re.compile(rb"'fortran_order': *(True|False)")
_SHAPE = re.compile(rb"'shape': *\(((?:[0-9]{1,18}, *){0,8}[0-9]{0,18}) *\)")


def pixels_of(encoded: bytes, channels: int, where: str) -> np.ndarray:
    """The array in `encoded`, of which memory is shared: uint8 or uint16 [h, w, channels], the latter as it is stored.

    Raises:
      BadPicture: damaged or cut off, too large, or no array of that kind (objects among them).
      DataError: another number of channels.
    """
    lengths = {1: 2, 2: 4, 3: 4}.get(encoded[6]) if len(encoded) > 12 else None
    if lengths is None:
        raise unreadable(where, "damaged .npy file: its header can not be read")
    start = 8 + lengths
    header = int.from_bytes(encoded[8:start], "little")
    text = encoded[start : start + header]
    found = [form.search(text) for form in (_KIND, _ORDER, _SHAPE)]
    if header > _LONGEST_HEADER or len(text) < header or not all(found):
        raise unreadable(where, "the header of the .npy file does not describe an array of numbers")
    kind, order, sides = (match[1].decode() for match in found)
    shape = tuple(int(side) for side in sides.split(",") if side.strip())
    if kind.lstrip("<>|=") not in ("u1", "u2") or len(shape) not in (2, 3) or not all(shape):
        mend = "give uint8 or uint16 [height, width, channels]"
        raise BadPicture(where, f".npy of type {kind!r} and shape {list(shape)} is no picture", mend)
    check_size(*shape[:2], where)
    shape = (*shape, 1)[:3]
    if shape[2] != channels:
        raise DataError(f"{where}: {shape[2]} channels, not {channels}; set channels to {shape[2]}")
    dtype = np.dtype(kind)
    held, wanted = len(encoded) - start - header, dtype.itemsize * shape[0] * shape[1] * shape[2]
    if held < wanted:
        raise unreadable(where, f"the .npy file is cut off: {held} of {wanted} bytes of pixels")
    array = np.frombuffer(encoded, dtype, shape[0] * shape[1] * shape[2], start + header)
    return array.reshape(shape[::-1]).T if order == "True" else array.reshape(shape)


def eight_bits(array: np.ndarray) -> np.ndarray:
    """uint8 of uint8 or uint16: 16-bit values are divided by 256."""
    return array if array.dtype == np.uint8 else (array >> 8).astype(np.uint8)
