"""What is found out by reading a whole set once, kept in the user's cache folder.

The labels of ImageNet in TFDS's files lie beside the pictures, 144 GB of them; reading those once is enough. A file of
the cache is arrays without pickle, and one that is damaged or of another set is made anew.
"""

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

_LOG = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]


def cache_folder() -> Path:
    """XDG_CACHE_HOME or ~/.cache, and in it what is this program's."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "maect_jax"


def kept(path: Path, make: Callable[[], Arrays], fits: Callable[[Arrays], bool]) -> Arrays:
    """The arrays in the file `path`, or those that `make` gives, which are then written there.

    Args:
      path: a .npz in `cache_folder()`, named after all that the arrays depend on.
      make: finds the arrays; slow.
      fits: whether arrays can be those of this set; what does not fit is not kept.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {key: file[key] for key in file.files}
        if fits(found):
            return found
    except FileNotFoundError:
        pass
    except Exception as error:  # zipfile, zlib and NumPy raise many kinds for a damaged file
        _LOG.warning("%s is not readable (%s) and is made anew", path, error)
    made = make()
    if not fits(made):
        return made
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            np.savez(file, **made)
        os.replace(file.name, path)
    except OSError as error:  # a read-only home folder or a full disk: it works, only slower the next time
        _LOG.warning("%s can not be written (%s); it is made anew at the next start", path, error)
    return made
