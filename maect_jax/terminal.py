"""What every entry point does the same: quiet libraries, one clear message for an error, an exit status."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import logging as absl_logging

from maect_jax.errors import ConfigError, MaectError

_KIND = {2: "config error", 3: "data error", 4: "checkpoint error", 5: "numerics error", 6: "stopped"}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `ConfigError`, like those of every other setting."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> None:
        raise ConfigError(f"{message}; {self.prog} --help lists what there is")


def guard(action: Callable[[], None]) -> int:
    """Runs `action`; an error that a user can mend is printed alone, without a traceback. Returns the exit status."""
    absl_logging.set_verbosity(absl_logging.ERROR)  # what Orbax, TFDS and Grain tell their developers
    logging.getLogger("maect_jax").handlers[:] = [logging.StreamHandler()]  # what this program tells its users
    logging.getLogger("maect_jax").propagate = False
    try:
        action()
        return 0
    except MaectError as error:
        text = "\n".join(f"  {line}" for line in str(error).splitlines())
        print(f"{_KIND.get(error.status, 'error')}:\n{text}", file=sys.stderr, flush=True)
        return error.status
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"file error:\n  {error}", file=sys.stderr, flush=True)
        return 1


def use_compilation_cache() -> None:
    """A second start does not compile again; JAX_COMPILATION_CACHE_DIR, where set, says where."""
    if not jax.config.jax_compilation_cache_dir:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "maect_jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
