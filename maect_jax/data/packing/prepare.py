"""Builds TFDS data sets as ArrayRecord files, with what is missing said in one line.

TensorFlow is not needed for most of them (`without_tensorflow`); where it is, that is found out by the attempt.
"""

import importlib.util
import platform
import re
import tarfile
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.util import DownloadError

from maect_jax.data.packing.without_tensorflow import NeedsTensorFlow, standing_in
from maect_jax.data.sources.shards import allow_open_files
from maect_jax.data.sources.tfds import check_name, data_folder, preparation
from maect_jax.errors import DataError

_KEY = "data prepare"
_BUCKETS = 1000  # files that TFDS sorts a large set with, all open at once
_ARCHIVE = re.compile(r"ILSVRC2012_img_\w+\.tar")


def prepare(name: str, data_dir: str | None, manual_dir: str | None) -> tfds.core.DatasetInfo:
    """Builds the data set, or finds it built.

    Args:
      name: TFDS name, 'set', 'set/config' or 'set/config:version'.
      data_dir: where prepared sets are kept; as `tfds.data_folder` finds it when None.
      manual_dir: where files are that have to be got by hand; <data_dir>/downloads/manual when None.

    Returns:
      What TFDS says of it.

    Raises:
      DataError: no such set; it lies there in another format; an archive is missing or cut off; a download fails; a
        package is needed that is not installed; TFDS fails in another way.
    """
    check_name(name, _KEY)
    folder = data_folder(data_dir)
    manual = Path(manual_dir).expanduser() if manual_dir else folder / "downloads" / "manual"
    allow_open_files(_BUCKETS)
    try:
        info = _prepared(name, folder) or _build(name, folder, manual)
    except DataError:
        raise
    except Exception as error:  # a builder may raise anything
        raise _explained(error, name, data_dir, manual) from error
    if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise DataError(
            f"{_KEY}: {info.data_dir} is there already, in the {info.file_format.value} format; delete it or choose "
            f"another --data-dir, and run again: {preparation(name, data_dir)}"
        )
    return info


def _prepared(name: str, folder: Path) -> tfds.core.DatasetInfo | None:
    try:
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=folder).info
    except tfds.core.DatasetNotFoundError:
        return None


def _build(name: str, folder: Path, manual: Path) -> tfds.core.DatasetInfo:
    """First without TensorFlow; where that is not enough and TensorFlow is installed, with it."""
    with_tensorflow = False
    while True:
        try:
            with standing_in(tensorflow=not with_tensorflow):
                builder = tfds.builder(name, data_dir=folder, file_format="array_record")
                _check_archives(name, builder, manual)
                config = tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
                builder.download_and_prepare(download_config=config)
            return builder.info
        except Exception as error:
            if with_tensorflow or not _asked_for(error) or importlib.util.find_spec("tensorflow") is None:
                raise
            with_tensorflow = True


def _check_archives(name: str, builder: tfds.core.DatasetBuilder, manual: Path) -> None:
    """ImageNet's archives are there and whole, before hours are spent on them.

    TFDS leaves a split out when its archive is missing, and takes a tar that is cut off between two members for a
    shorter one.
    """
    wanted = sorted(set(_ARCHIVE.findall(builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "")))
    missing = [file for file in wanted if not (manual / file).is_file()]
    if missing:
        raise DataError(
            f"{_KEY}: TFDS {name!r} is made from {' and '.join(wanted)}, and {manual} has no {' and no '.join(missing)}"
            "; get what is missing from https://image-net.org/download.php (login needed), put it there or give its "
            "folder as --manual-dir"
        )
    for file in wanted:
        try:
            whole = _is_whole(manual / file)
        except tarfile.ReadError as error:
            whole = False
            if "unexpected end of data" not in str(error):
                raise DataError(f"{_KEY}: {manual / file} is no tar archive ({error}); download it again") from error
        if not whole:
            size = (manual / file).stat().st_size
            raise DataError(f"{_KEY}: {manual / file} is cut off at byte {size}; download it again")


def _is_whole(path: Path) -> bool:
    """Whether a tar has all its members' bytes, and after them the block of zeros that ends it."""
    end = 0
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    with open(path, "rb") as file:
        file.seek(end)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _explained(error: Exception, name: str, data_dir: str | None, manual: Path) -> DataError:
    """The error that says in one line what to do about what TFDS raised."""
    if asked_for := _asked_for(error):
        return _needs_tensorflow(name, data_dir, asked_for)
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            package = cause.name.split(".")[0]
            return DataError(
                f"{_KEY}: TFDS {name!r} needs the package {package!r} to be prepared; install it (mostly "
                f"`pip install {package}`) and run this again"
            )
    text = _line(error)
    if isinstance(error, NonMatchingChecksumError):
        return DataError(f"{_KEY}: TFDS {name!r}: a file is not the one that TFDS knows: {text}")
    if any(isinstance(cause, DownloadError | ConnectionError) or _of_requests(cause) for cause in causes):
        return DataError(
            f"{_KEY}: TFDS {name!r} can not be downloaded ({text}); connect this machine, set HTTPS_PROXY, or put the "
            f"file under its own name into {manual}"
        )
    if isinstance(error, AssertionError) and "anual" in text:
        return DataError(f"{_KEY}: TFDS {name!r} needs files that are got by hand: {text}")
    return DataError(f"{_KEY}: TFDS could not prepare {name!r}: {type(error).__name__}: {text}")


def _asked_for(error: Exception) -> str | None:
    """What of TensorFlow was missing, where that is what the error is about."""
    for cause in _causes(error):
        if isinstance(cause, NeedsTensorFlow):
            return cause.asked_for
        if isinstance(cause, ImportError) and (cause.name or "").split(".")[0] == "tensorflow":
            return cause.name
    return None


def _needs_tensorflow(name: str, data_dir: str | None, asked_for: str) -> DataError:
    """TensorFlow needs no change of the other packages; the CPU build is enough and exists for these machines."""
    small = platform.system() in ("Linux", "Windows") and platform.machine().lower() in ("x86_64", "amd64")
    package = "tensorflow-cpu" if small else "tensorflow"
    return DataError(
        f"{_KEY}: TFDS {name!r} needs TensorFlow to be prepared (it asks for {asked_for}): for this one step "
        f'`pip install "{package}>=2.20"`, in this environment or in another one that has maect_jax, and run '
        f"`{preparation(name, data_dir)}` there; what it writes is read without TensorFlow"
    )


def _causes(error: BaseException | None):
    """The error and what it was raised from, first to last."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _of_requests(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in ("requests", "urllib3")


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else f"{text[:200]} … {text[-200:]}"
