"""Pictures of a run, as arrays, PNG and JPEG bytes. Pure functions: nothing here touches a file.

Axes in names and shapes: n pictures, q queries, k neighbours, then height, width, channels. Pictures are uint8 with any
number of channels: one or two are shown as grey (the first channel), more than three as their first three.
"""

import base64
import io

import numpy as np
from PIL import Image

SAME_CLASS = (22, 158, 108)  # green and red that also differ in brightness and in blue, for colour-blind readers
OTHER_CLASS = (229, 72, 77)
BACKGROUND = (255, 255, 255)
FRAME, GAP = 3, 3  # pixels


def as_rgb(images: np.ndarray) -> np.ndarray:
    """What is shown of pictures with any number of channels.

    Args:
      images: uint8 [..., h, w, c], c >= 1.

    Returns:
      uint8 [..., h, w, 3].

    Raises:
      ValueError: not uint8, or fewer than three axes, or an empty height, width or channel axis.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim < 3 or 0 in images.shape[-3:]:
        raise ValueError(f"pictures must be uint8 [..., h, w, c]; got {images.dtype} {list(images.shape)}")
    return images[..., :3] if images.shape[-1] >= 3 else np.repeat(images[..., :1], 3, axis=-1)


def resize(picture: np.ndarray, min_side: int = 0, max_side: int | None = None) -> np.ndarray:
    """Make a picture large enough to look at, or small enough to embed.

    Args:
      picture: uint8 [h, w, c].
      min_side: a smaller picture is enlarged by a whole factor, each pixel staying a sharp square.
      max_side: a larger picture is reduced (Lanczos), keeping its proportions.

    Returns:
      uint8 [H, W, 3].

    Raises:
      ValueError: as `as_rgb`.
    """
    picture = as_rgb(picture)
    height, width = picture.shape[:2]
    if min(height, width) < min_side:
        factor = -(-min_side // min(height, width))
        picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    elif max_side and max(height, width) > max_side:
        share = max_side / max(height, width)
        size = max(1, round(width * share)), max(1, round(height * share))
        picture = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
    return picture


def to_png(array: np.ndarray) -> bytes:
    """The RGB PNG file of one picture, uint8 [h, w, c]; the same bytes for the same array.

    Raises:
      ValueError: as `as_rgb`, or more than three axes.
    """
    if np.ndim(array) != 3:
        raise ValueError(f"to_png takes one picture [h, w, c]; got {list(np.shape(array))}")
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(as_rgb(array))).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def to_jpeg(array: np.ndarray) -> bytes:
    """The JPEG file of one picture, uint8 [h, w, c]: a fraction of the PNG's bytes for a photograph.

    Raises:
      ValueError: as `to_png`.
    """
    if np.ndim(array) != 3:
        raise ValueError(f"to_jpeg takes one picture [h, w, c]; got {list(np.shape(array))}")
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(as_rgb(array))).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def data_address(file: bytes) -> str:
    """The address of a PNG or JPEG file that holds the file itself."""
    kind = "png" if file.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file).decode('ascii')}"


def reconstruction_grid(
    original: np.ndarray, masked: np.ndarray, reconstructed: np.ndarray, min_side: int = 96
) -> np.ndarray:
    """What the autoencoder saw, what it made of it, and the truth: a row a picture.

    Args:
      original, masked, reconstructed: uint8 [n, h, w, c], n >= 1.
      min_side: smaller pictures are enlarged to at least this, in pixels.

    Returns:
      uint8 [H, W, 3]; columns are masked, reconstructed, original, with `GAP` white pixels between and around.

    Raises:
      ValueError: the three shapes differ, or they hold no picture.
    """
    columns = [np.asarray(part) for part in (masked, reconstructed, original)]
    shapes = [list(part.shape) for part in columns]
    if columns[0].ndim != 4 or shapes[0][0] == 0 or shapes.count(shapes[0]) != 3:
        raise ValueError(f"masked, reconstructed, original must have one shape [n, h, w, c]; got {shapes}")
    return _tiles([[resize(part[i], min_side) for part in columns] for i in range(shapes[0][0])])


def neighbor_grid(
    query: np.ndarray,
    neighbor: np.ndarray,
    query_label: np.ndarray,
    neighbor_label: np.ndarray,
    min_side: int = 48,
) -> np.ndarray:
    """Queries and their nearest neighbours: a row a query, the query first, then the most similar and onwards.

    Args:
      query: uint8 [q, h, w, c], q >= 1.
      neighbor: uint8 [q, k, h, w, c].
      query_label: integers [q].
      neighbor_label: integers [q, k].
      min_side: smaller pictures are enlarged to at least this, in pixels.

    Returns:
      uint8 [H, W, 3]: each picture whole, in a frame of `FRAME` pixels, `SAME_CLASS` around a neighbour whose label is
      the query's, `OTHER_CLASS` around any other, `BACKGROUND` around the query and around all neighbours of a query
      without a label (-1); `GAP` pixels between and around.

    Raises:
      ValueError: the shapes do not belong together; the message names them.
    """
    check_neighbors(query, neighbor, query_label, neighbor_label)
    rows = [[_framed(resize(picture, min_side), BACKGROUND)] for picture in query]
    for (i, j), label in np.ndenumerate(neighbor_label):
        color = BACKGROUND if query_label[i] < 0 else SAME_CLASS if label == query_label[i] else OTHER_CLASS
        rows[i].append(_framed(resize(neighbor[i, j], min_side), color))
    return _tiles(rows)


def check_neighbors(query: np.ndarray, neighbor: np.ndarray, query_label: np.ndarray, neighbor_label: np.ndarray):
    """Raise ValueError, naming the shapes, unless they are those that `neighbor_grid` describes."""
    shapes = [np.shape(array) for array in (query, neighbor, query_label, neighbor_label)]
    q, k = (*shapes[3], 0, 0)[:2]
    picture = shapes[0][1:]
    if len(picture) != 3 or q == 0 or k == 0 or shapes != [(q, *picture), (q, k, *picture), (q,), (q, k)]:
        raise ValueError(
            "neighbours need query [q, h, w, c], neighbor [q, k, h, w, c], query_label [q], neighbor_label [q, k]; got "
            + ", ".join(str(list(shape)) for shape in shapes)
        )


def _framed(picture: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """The picture [h, w, 3], whole, with a frame outside it: [h + 2 FRAME, w + 2 FRAME, 3]."""
    height, width = picture.shape[:2]
    framed = np.full((height + 2 * FRAME, width + 2 * FRAME, 3), color, np.uint8)
    framed[FRAME:-FRAME, FRAME:-FRAME] = picture
    return framed


def _tiles(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Rows of equally large pictures [h, w, 3] on one white sheet."""
    height, width = rows[0][0].shape[:2]
    size = (GAP + len(rows) * (height + GAP), GAP + len(rows[0]) * (width + GAP), 3)
    sheet = np.full(size, BACKGROUND, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = GAP + i * (height + GAP), GAP + j * (width + GAP)
            sheet[top : top + height, left : left + width] = picture
    return sheet
