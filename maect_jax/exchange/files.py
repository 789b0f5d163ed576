"""Weights files of any origin: their tensors by name, and the encoder they hold in one of the published layouts.

A file is told by its content, never by its extension, and nothing in it is executed. Every tensor must be accounted
for by a layout; names are taken as they are.
"""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike

import jax.numpy as jnp
import numpy as np
import safetensors

from maect_jax.errors import CheckpointError, ConfigError
from maect_jax.exchange.archive import MAGIC, Archive
from maect_jax.exchange.layouts import LAYOUTS, from_layout, misfits
from maect_jax.exchange.pth import Opaque, StoredTensor, describe, is_pth, read_pth, refusal

_WRAPPERS = ("model", "state_dict")
_MAX_HEADER = 100_000_000  # bytes; the bound of the safetensors format
_SHOWN = 4  # names of a list in a message

# ------------------------------------------------------------------------------------------------------------- tensors


def read_tensors(path: str | PathLike) -> tuple[dict[str, np.ndarray], str]:
    """The tensors of a weights file.

    Args:
      path: a local file of safetensors, of `torch.save` (PyTorch 1.6 or later), or of NumPy (`.npz`). A dictionary
        under 'model' or 'state_dict' is taken for the tensors; what lies beside it (optimizer, arguments) is not read.

    Returns:
      name -> array, of the shapes and types in the file (bfloat16: that of ml_dtypes), and the kind of the file:
      'safetensors', 'torch' or 'npz'. Values that are no tensors, such as an epoch, are left out.

    Raises:
      CheckpointError: in one line, why the file can not be read or is not safe to read.
    """
    kind = _kind(path)
    return {"safetensors": _read_safetensors, "torch": _read_torch, "npz": _read_npz}[kind](path), kind


def _kind(path: str | PathLike) -> str:
    try:
        with open(path, "rb") as file:
            start = file.read(9)
            if start.startswith(MAGIC):
                return "torch" if is_pth(Archive(file)) else "npz"
    except OSError as error:
        raise CheckpointError(f"{path}: can not be read ({error.strerror})") from None
    except CheckpointError as error:
        raise refusal(path, error) from None
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_HEADER:
        return "safetensors"
    if start[:1] == b"\x80":
        return "torch"  # before PyTorch 1.6; the reader says so
    raise CheckpointError(f"{path}: is neither safetensors, nor a file of torch.save, nor .npz")


def _read_safetensors(path: str | PathLike) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except Exception as error:  # whatever the library raises on bytes that may be hostile
        raise refusal(path, f"is damaged, or no safetensors file ({error})") from None


def _read_torch(path: str | PathLike) -> dict[str, np.ndarray]:
    return read_pth(path, part=_state_dict)


def _state_dict(tree: dict) -> dict[str, StoredTensor]:
    """The tensors of what `torch.save` was given: those under the one known wrapper, else those of the tree itself."""
    wrappers = [name for name in _WRAPPERS if isinstance(tree.get(name), dict)]
    if len(wrappers) > 1:
        raise CheckpointError("holds both 'model' and 'state_dict'; save the one that is meant")
    found = tree[wrappers[0]] if wrappers else tree
    tensors = {name: value for name, value in found.items() if isinstance(value, StoredTensor)}
    lost = [
        f"{name!a}: {describe(value)}"
        for name, value in found.items()
        if (isinstance(value, Opaque) and value.name.startswith("torch._"))  # torch._utils._rebuild_qtensor, …
        or (isinstance(value, StoredTensor) and not isinstance(name, str))
    ]
    if lost:
        raise CheckpointError(f"holds what may be weights and is not read here: {_some(lost)}; save plain tensors")
    if not tensors:
        entries = [f"{name!a}: {describe(value)}" for name, value in found.items()]
        raise CheckpointError(f"holds no tensors by name, but {_some(entries)}; save the model's state_dict()")
    return tensors


def _read_npz(path: str | PathLike) -> dict[str, np.ndarray]:
    """Arrays of numbers; arrays of Python objects would have to be unpickled and are refused."""
    try:
        with open(path, "rb") as file:
            archive, arrays = Archive(file), {}
            for name in archive.sizes:
                if not name.endswith(".npy"):
                    raise CheckpointError(f"is neither a file of torch.save nor .npz: it has a member {name!a}")
                content = io.BytesIO(archive.read(name))
                arrays[name.removesuffix(".npy")] = np.lib.format.read_array(content, allow_pickle=False)
            return arrays
    except Exception as error:  # whatever NumPy raises on a header that may be hostile
        raise refusal(path, error) from None


def _some(items: list[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


# ------------------------------------------------------------------------------------------------------------- encoder


@dataclass(frozen=True)
class OpenedEncoder:
    """An encoder from a file, and the sizes to build its model with.

    Attributes:
      params: float32 tree of `models.vit.ViT`.
      width, depth, heads, patch: see `models.vit.Size`.
      channels: of a picture.
      image_size: side of the picture in pixels.
      layout: the key of `exchange.layouts.LAYOUTS` that the file fits (timm's and MAE's encoders are the same).
      decoder: float32 tree of `models.mae.Decoder`, where the file has one.
      sha256: of the file, in hexadecimal.
    """

    params: dict
    width: int
    depth: int
    heads: int
    patch: int
    channels: int
    image_size: int
    layout: str
    decoder: dict | None
    sha256: str


def open_encoder(path: str | PathLike, image_size: int | None = None, heads: int | None = None) -> OpenedEncoder:
    """The encoder in a weights file of any published layout; see `read_tensors` for the files.

    Args:
      image_size: pixels a side, a multiple of the patch, instead of the size in the file. The fixed position table is
        computed for it.
      heads: attention heads, which no shape tells. Default: the published number, one a 64 channels (16 for the 1280
        of ViT-H).

    Raises:
      CheckpointError: the file can not be read, fits no layout name for name, holds weights that are no real numbers
        or positions other than the fixed sine-cosine table, or has an MLP that is not four times as wide.
      ConfigError: `image_size` or `heads` does not fit the file, or `heads` is needed.
    """
    tensors, _ = read_tensors(path)
    integers = [name for name, tensor in tensors.items() if not jnp.issubdtype(tensor.dtype, jnp.floating)]
    layout = _layout_of(path, tensors)
    if integers:
        raise refusal(path, f"weights that are no real numbers: {_some(integers)}")
    kernel = _first(tensors, layout, "patch")
    grid = round((_first(tensors, layout, "positions").shape[1]) ** 0.5)  # a class row more or less rounds away
    width, channels, patch, _ = kernel.shape
    try:
        tree = from_layout(tensors, layout)
    except CheckpointError as error:
        raise refusal(path, error) from None
    for part, leaves in tree.items():
        into, out = leaves["blocks"]["fc1"]["kernel"].shape[1:]
        if out != 4 * into:
            raise refusal(path, f"the {part}'s MLP is {out} wide; only four times the width, {4 * into}, is modelled")
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return OpenedEncoder(
        params=tree["encoder"],
        width=width,
        depth=len(tree["encoder"]["blocks"]["norm1"]["scale"]),
        heads=_heads(path, width, heads),
        patch=patch,
        channels=channels,
        image_size=_image_size(path, patch, grid, image_size),
        layout=layout,
        decoder=tree.get("decoder"),
        sha256=sha256,
    )


def _layout_of(path: str | PathLike, tensors: Mapping[str, np.ndarray]) -> str:
    """The first layout of an encoder that the tensors fit.

    Raises:
      CheckpointError: there is none; lists what differs from the nearest.
    """
    encoders = [layout for layout, rows in LAYOUTS.items() if any(row.path.startswith("encoder.") for row in rows)]
    differences = {layout: misfits(tensors, layout) for layout in encoders}
    nearest = min(encoders, key=lambda layout: sum(map(len, differences[layout].values())))
    lists = [f"{len(items)} {title}: {_some(items)}" for title, items in differences[nearest].items() if items]
    if lists:
        raise refusal(path, f"fits no known layout; compared with the nearest, {nearest}: {'; '.join(lists)}")
    return nearest


def _first(tensors: Mapping[str, np.ndarray], layout: str, kind: str) -> np.ndarray:
    """The tensor of the first row of a kind, which is the encoder's."""
    return next(tensors[row.names[0]] for row in LAYOUTS[layout] if row.kind == kind)


def _heads(path: str | PathLike, width: int, heads: int | None) -> int:
    if heads is None:
        if width % 64:
            raise ConfigError(f"heads: {path} has width {width}, for which no number of heads is published; give it")
        return 16 if width == 1280 else width // 64
    if heads < 1 or width % heads:
        raise ConfigError(f"heads: {heads} does not divide the width {width} of {path}; give a divisor")
    return heads


def _image_size(path: str | PathLike, patch: int, grid: int, image_size: int | None) -> int:
    if image_size is not None and (image_size < patch or image_size % patch):
        raise ConfigError(f"image_size: {image_size} is no multiple of the patch of {path}, {patch} pixels")
    return image_size or grid * patch
