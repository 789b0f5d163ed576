"""One line of `results.jsonl` for every number, with all that is needed to make it again or compare it.

Lines are only ever added; of several with one identity (stage, seed, evaluation, metric, names of protocol and test
set) the newest counts. What lies under 'protocol' decides whether two numbers may stand side by side; everything else
is told beside it.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import jax
import numpy as np
from etils import epath

import maect_jax

SCHEMA = 2
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "grain", "numpy", "scipy")


@dataclass(frozen=True)
class Record:
    """A number and where it comes from.

    Attributes:
      stage: whose weights: 'pretrain', 'control', 'tune', 'tune, raw', or the name of a file.
      seed: of the run.
      evaluation, metric: such as 'knn' and 'accuracy'.
      value: the number; `unit` is 'fraction' for shares in 0..1, else ''.
      interval: 95 % bootstrap interval over the test pictures, or None where pictures have no share of their own.
      std, values: over splits, seeds or restarts, where there are several.
      protocol: every setting that has to be equal in a comparison; 'name' and 'version' are the preset's.
      found: what was chosen or came out beside the number: rates, epochs, iterations.
      weights: 'sha256' of the encoder parameters, and 'source', 'stage', 'step', 'average'.
      model: shape of the encoder.
      cost: 'seconds' of the evaluation, 'cache' whether its features were read from disk.
    """

    stage: str
    seed: int
    evaluation: str
    metric: str
    value: float
    unit: str
    interval: tuple[float, float] | None
    std: float | None
    values: list[float] | None
    protocol: dict[str, Any]
    found: dict[str, Any]
    weights: dict[str, Any]
    model: dict[str, Any]
    cost: dict[str, Any]
    software: dict[str, Any] = field(default_factory=lambda: software())
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = SCHEMA


def software() -> dict[str, Any]:
    """Versions and devices behind a number."""
    devices = jax.devices()
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "maect_jax": maect_jax.__version__,
        "python": platform.python_version(),
        **versions,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
    }


def weights_hash(params: dict) -> str:
    """SHA-256 of names, shapes, types and bytes of a parameter tree, independent of devices and order."""
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    for name, leaf in sorted((jax.tree_util.keystr(path), leaf) for path, leaf in leaves):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name}{array.shape}{array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def identity(record: dict) -> tuple:
    """What two records must share for the newer one to replace the older: subject, protocol and test set by name."""
    keys, protocol = ("stage", "seed", "evaluation", "metric"), record["protocol"]
    test = protocol.get("test")
    return (*(record.get(key) for key in keys), protocol["name"], test.get("name") if isinstance(test, dict) else test)


def add_records(path: epath.Path, records: Iterable[Record]) -> None:
    """Adds records to the file; what is there stays as it is, torn lines included. Programs may do so at once."""
    new = "".join(json.dumps(asdict(record)) + "\n" for record in records).encode()
    if "://" in str(path):  # a store without appending
        old = path.read_bytes() if path.exists() else b""
        path.write_bytes(old + b"\n" * bool(old and not old.endswith(b"\n")) + new)
        return
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        torn = size and os.pread(file.fileno(), 1, size - 1) != b"\n"
        file.write(b"\n" * bool(torn) + new)


def read_records(path: epath.Path) -> list[dict]:
    """The newest record of each identity, in the order in which identities first appear; damaged lines are left out."""
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    newest: dict[tuple, dict] = {}
    for line in text.splitlines():
        if record := _parsed(line):
            newest[identity(record)] = record
    return list(newest.values())


def _parsed(line: str) -> dict | None:
    """A record, or None for a line that a crash or a full disk tore, or that is none."""
    try:
        record = json.loads(line)
        good = isinstance(record["protocol"]["name"], str) and isinstance(record["value"], int | float)
        return record if good else None
    except (json.JSONDecodeError, KeyError, TypeError):
        return None
