"""The reference values that parity tests compare with: random small models, computed in PyTorch, kept outside the code.

They lie in the folder `golden` of MAECT_SHARED, or of `shared` beside the checkout; see the README there.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest


def _folder() -> Path:
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("MAECT_SHARED", beside)) / "golden"
    if not folder.is_dir():
        pytest.skip("reference values not found: set MAECT_SHARED to the folder that holds 'golden'")
    return folder


def arrays(name: str) -> dict[str, np.ndarray]:
    """All arrays of `<name>.npz`, keys as in its README; skips the test when the file is absent."""
    with np.load(_folder() / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def constants(name: str) -> dict:
    """Content of `<name>.json`."""
    return json.loads((_folder() / f"{name}.json").read_text())


def below(values: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The entries whose key starts with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
