"""What a form to export to has to offer, and what all of them need: files, libraries that may be absent, strictness."""

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from maect_jax.errors import CheckpointError
from maect_jax.exchange.model import Model

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class Target(Protocol):
    """A form that others load: its files, and what their library computes from them.

    Attributes:
      name: as `--to` takes it, such as 'timm'.
      loader: the library that loads the form.
    """

    name: str
    loader: str

    def check(self, model: Model) -> None:
        """Raises ConfigError when the form can not express the model: what, why, and which form can."""

    def write(self, model: Model, folder: Path, metadata: Mapping[str, str]) -> None:
        """Writes weights and settings into an existing folder; `metadata` are texts for the header of the weights."""

    def usage(self, model: Model) -> str:
        """A few lines of Python that load and run what was written."""

    def outputs(
        self, model: Model, folder: Path, images_bchw: np.ndarray, noise_bn: np.ndarray
    ) -> dict[str, np.ndarray]:
        """What the library computes from a written folder, in float32.

        Args:
          model: what was written.
          folder: where.
          images_bchw: float32, normalised.
          noise_bn: float32, one number a patch and none twice in a row: the patches of the smallest are kept.

        Returns:
          Those that the form can express of
          'tokens' [batch, 1 + patches, width], of the whole picture, after the final norm where there is one;
          'features' [batch, width], the vector that stands for a picture and that a head is on;
          'logits' [batch, classes], where there is a head;
          'predictions' [batch, patches, values] of all patches in row-major order, and 'loss', a scalar, of those that
          are not kept, where there is a decoder. The targets of the loss are normalised patch by patch where the model
          says so; where it does not know (None), they are plain.

        Raises:
          ImportError: the library is missing or can not be imported.
          CheckpointError: the library misses tensors or meets others.
        """


def write_weights(folder: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes float32 tensors, which may be views, as `model.safetensors`, one after the other.

    Equal content gives equal bytes. The library's own writer puts the metadata in another order each time.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(({"format": "pt"} | dict(metadata)).items()))}
    end = 0
    for name, tensor in sorted(tensors.items()):
        start, end = end, end + 4 * tensor.size
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
    with open(folder / WEIGHTS, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in sorted(tensors.items()):
            file.write(np.ascontiguousarray(tensor, "<f4").data)


def write_config(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes `config.json`."""
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_library(name: str) -> ModuleType:
    """A module of a library that may be absent or broken.

    Raises:
      ImportError: in one line, whatever its import ended with.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # libraries that do not fit each other end in errors of any kind
        said = (str(error).strip() or "no message").splitlines()[0]
        raise ImportError(f"{name} can not be imported ({type(error).__name__}: {said})") from error


def refuse_misfits(library: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises CheckpointError when a library did not find all tensors in a file, or found others, naming them."""
    lists = {"missing": sorted(missing), "unexpected": sorted(unexpected)}
    found = [f"{len(names)} {title} ({', '.join(names[:4])})" for title, names in lists.items() if names]
    if found:
        raise CheckpointError(f"{library} does not take the tensors as written: {'; '.join(found)}")
