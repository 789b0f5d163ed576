"""Libraries that only tests need."""

import importlib
import os
from types import ModuleType

import pytest


def needed(name: str) -> ModuleType:
    """The module of this name. Without it a test is skipped, and one in CI (environment variable CI) fails."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = f"{name} can not be imported ({error}); `make test` installs what tests need"
    if os.environ.get("CI"):
        pytest.fail(missing, pytrace=False)
    pytest.skip(missing, allow_module_level=True)
