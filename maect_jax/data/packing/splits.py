"""The splits of whatever a name stands for, for commands that work on a whole data set."""

import logging
import os
from pathlib import Path

from maect_jax.data.packing.manifest import SPLITS, is_packed, read_manifest
from maect_jax.data.sources.base import Source
from maect_jax.data.sources.layout import SPLIT_FOLDERS
from maect_jax.data.sources.open import open_source
from maect_jax.data.sources.split_files import split_of
from maect_jax.errors import DataError

_LOG = logging.getLogger(__name__)


def open_splits(name: str, *, split: str | None = None, channels: int | None = None) -> dict[str, Source]:
    """The training split of `name` and, if there is one, its test split.

    Args:
      name: as `open_source` takes it.
      split: only this one.
      channels: of the decoded pictures; None = as many as a packed folder says that its pictures have, else 3.

    Raises:
      DataError: see `open_source`. That there is no test split at all is no error.
    """
    sources, failed = open_each(name, split=split, channels=channels)
    for error in failed.values():
        raise error
    return sources


def open_each(
    name: str, *, split: str | None = None, channels: int | None = None
) -> tuple[dict[str, Source], dict[str, DataError]]:
    """The splits that can be opened, and why others can not; arguments as `open_splits`."""
    folder = Path(name).expanduser()
    try:
        packed = read_manifest(folder) if is_packed(folder) else None
    except DataError as error:
        return {}, {split or "train": error}
    if channels is None:
        channels = packed.channels if packed and packed.channels not in (1, 3) else 3
    wanted = [s for s in SPLITS if (s == split if split else packed is None or s in packed.splits)]
    sources, failed = {}, {}
    for each in wanted:
        try:
            sources[each] = open_source(name, each, channels=channels, key=each)
        except DataError as error:
            if each == "test" and len(wanted) == 2 and not packed and not _names_a_test_split(folder):
                _LOG.warning("no test split (%s)", error)
            else:
                failed[each] = error
    return sources, failed


def _names_a_test_split(folder: Path) -> bool:
    """Whether something in a folder is called as a test split is; then that it can not be opened is an error."""
    if not folder.is_dir():
        return False
    return any(split_of(Path(entry.path)) in SPLIT_FOLDERS["test"] for entry in os.scandir(folder))
