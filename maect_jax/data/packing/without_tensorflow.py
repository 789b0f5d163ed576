"""The few functions that TFDS takes from TensorFlow to write most data sets, by the standard library and Pillow.

TFDS asks TensorFlow for files (`tf.io.gfile`), for PNG and JPEG (pixels that a set has as arrays; ImageNet's pictures
in CMYK), and for nothing else while it writes the picture sets that people train on. Within `standing_in()` its lazily
imported `tensorflow` is an object with just these; whatever else a data set asks for raises `NeedsTensorFlow`, which
names it. So whether a set needs TensorFlow to be prepared is found out by preparing it.
"""

import contextlib
import glob
import importlib.resources.abc
import importlib.util
import io
import os
import shutil

import numpy as np
from PIL import Image
from tensorflow_datasets.core import dataset_builder
from tensorflow_datasets.core.utils import lazy_imports_utils


class NeedsTensorFlow(AttributeError):
    """A data set asks for a function of TensorFlow that nothing else does; `asked_for` is its name."""

    def __init__(self, asked_for: str):
        super().__init__(f"{asked_for} is a function of TensorFlow")
        self.asked_for = asked_for


class _Module:
    """Named members; any other name raises NeedsTensorFlow."""

    def __init__(self, path: str, **members):
        self.__dict__ |= members
        self._path = path

    def __getattr__(self, name: str):
        raise NeedsTensorFlow(f"{self._path}.{name}")


class _Tensor:
    """A value with `.numpy()`, as TensorFlow's eager functions return it."""

    def __init__(self, value: np.ndarray | bytes):
        self._value = value

    def numpy(self) -> np.ndarray | bytes:
        return self._value

    def __getattr__(self, name: str):
        raise NeedsTensorFlow(f"tf.Tensor.{name}")


class _Refused(ValueError):
    """A picture that can not be decoded, as tf.errors.InvalidArgumentError."""


class _Exhausted(OSError):
    """As tf.errors.ResourceExhaustedError; never raised here, because the limit of open files is raised before."""


# ------------------------------------------------------------------------------------------------------------- files


def _open(name, mode: str = "r"):
    return open(name, mode, encoding=None if "b" in mode else "utf-8")


def _copy(source, target, overwrite: bool = False) -> None:
    _may_write(target, overwrite)
    shutil.copyfile(source, target)


def _rename(source, target, overwrite: bool = False) -> None:
    _may_write(target, overwrite)
    os.replace(source, target)


def _may_write(target, overwrite: bool) -> None:
    if not overwrite and os.path.exists(target):
        raise FileExistsError(f"{os.fspath(target)} is there already")


def _remove(path) -> None:
    os.remove(path)


def _glob(pattern) -> list[str]:
    patterns = pattern if isinstance(pattern, list | tuple) else [pattern]
    return sorted(path for one in patterns for path in glob.glob(os.fspath(one)))


def _listdir(path) -> list[str]:
    return sorted(os.listdir(path))


def _walk(path):
    for folder, subfolders, files in os.walk(path):
        subfolders.sort()
        yield folder, subfolders, sorted(files)


_GFILE = {
    "GFile": _open,
    "copy": _copy,
    "exists": os.path.exists,
    "glob": _glob,
    "isdir": os.path.isdir,
    "listdir": _listdir,
    "makedirs": lambda path: os.makedirs(path, exist_ok=True),
    "remove": _remove,
    "rename": _rename,
    "rmtree": shutil.rmtree,
    "walk": _walk,
}

# ---------------------------------------------------------------------------------------------------------- pictures


def _decode(encoded: bytes, channels: int = 0) -> _Tensor:
    """Pixels uint8 [h, w, c]; of CMYK RGB, of all others as many channels as there are, or as are asked for."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
            mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels)
            if mode is None:
                mode = image.mode if image.mode in ("L", "RGB", "RGBA") else "RGB"
            pixels = np.asarray(image.convert(mode))
    except (OSError, SyntaxError, ValueError) as error:
        raise _Refused(f"not a readable picture ({error})") from error
    return _Tensor(pixels[:, :, None] if pixels.ndim == 2 else pixels)


def _encode_png(pixels_hwc: np.ndarray) -> _Tensor:
    if pixels_hwc.dtype != np.uint8 or pixels_hwc.shape[2] == 2:
        raise NeedsTensorFlow(f"tf.image.encode_png of {pixels_hwc.dtype} with {pixels_hwc.shape[2]} channels")
    return _encode(pixels_hwc, format="PNG")


def _encode_jpeg(pixels_hwc: np.ndarray, format: str = "", quality: int = 95) -> _Tensor:
    # TensorFlow's default is 4:2:0, too; `format` says what the number of channels says
    return _encode(pixels_hwc, format="JPEG", quality=quality, subsampling="4:2:0")


def _encode(pixels_hwc: np.ndarray, **settings) -> _Tensor:
    file = io.BytesIO()
    Image.fromarray(pixels_hwc[:, :, 0] if pixels_hwc.shape[2] == 1 else pixels_hwc).save(file, **settings)
    return _Tensor(file.getvalue())


_IMAGE = {
    "decode_image": _decode,
    "decode_jpeg": _decode,
    "decode_png": _decode,
    "encode_jpeg": _encode_jpeg,
    "encode_png": _encode_png,
}

# --------------------------------------------------------------------------------------------------------- the whole

_NUMBERS = ("uint8", "uint16", "int8", "int16", "int32", "int64", "float32", "float64")


def _tensorflow() -> _Module:
    errors = {
        "InvalidArgumentError": _Refused,
        "NotFoundError": FileNotFoundError,
        "ResourceExhaustedError": _Exhausted,
        "UnimplementedError": NotImplementedError,
    }
    return _Module(
        "tf",
        executing_eagerly=lambda: True,
        compat=_Module("tf.compat", as_text=_as_text),
        errors=_Module("tf.errors", **errors),
        image=_Module("tf.image", **_IMAGE),
        io=_Module("tf.io", gfile=_Module("tf.io.gfile", **_GFILE)),
        bool=np.bool_,
        string=np.object_,  # what TFDS makes of it
        **{name: getattr(np, name) for name in _NUMBERS},
    )


def _as_text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


@contextlib.contextmanager
def standing_in(tensorflow: bool = True):
    """Within it, TFDS finds these functions where it would import TensorFlow; nothing is put into `sys.modules`.

    TFDS 4.9.10 asks for `importlib_resources` as well, which it does not name as a requirement; the standard library
    has the same under another name, and stands in for it also where `tensorflow` is False.
    """
    modules = [(lazy_imports_utils.tensorflow, _tensorflow())] if tensorflow else []
    if importlib.util.find_spec("importlib_resources") is None:
        modules.append((dataset_builder.importlib_resources, importlib.resources))
    before = [vars(lazy).get("_module") for lazy, _ in modules]
    for lazy, module in modules:
        vars(lazy)["_module"] = module  # where etils' LazyModule keeps what it has imported
    try:
        yield
    finally:
        for (lazy, _), module in zip(modules, before):
            if module is None:
                del vars(lazy)["_module"]
            else:
                vars(lazy)["_module"] = module
