"""How large a picture may be, before any of it is decoded; and how an error calls one that is refused.

With these limits decoding takes less than a GiB of memory at its height, whatever the form.
"""

from maect_jax.errors import BadPicture

# Pillow's own warning bound (a quarter of a GiB of RGB); checked here so that no global of Pillow is changed.
MAX_PIXELS = 89_478_485
MAX_BYTES = 1 << 28  # of an encoded picture


def check_size(height: int, width: int, where: str, limit: int = MAX_PIXELS) -> None:
    """Raises BadPicture where a picture of that size, in pixels, is not to be decoded."""
    if height * width > limit:
        raise BadPicture(where, f"{width}x{height} pixels are more than {limit}", "scale the picture down")
    if not height or not width:
        raise unreadable(where, f"{width}x{height} pixels")


def unreadable(where: str, why: str, mend: str = "replace it") -> BadPicture:
    """What to raise for a file that holds no picture, or a damaged one; `why` may be a library's own message."""
    return BadPicture(where, f"not a readable picture ({' '.join(why.split())[:200]})", mend)
