"""Room for a few batches of a host: loaders write into it, devices read from it, nothing is copied between.

The room is a file in memory without a name, which loader processes open through the process that made it: it is gone
when the last of them is, however that ends. Where there are no such files (not Linux), it is a temporary one.

No JAX here: loader processes use it.
"""

import mmap
import os
import tempfile
import time
from dataclasses import dataclass

import numpy as np

Columns = dict[str, np.ndarray]  # rows of a batch: arrays whose axis 0 are the rows

SLOTS = 3  # batches: one on its way to the devices, one being filled, and one so that no loader waits for the slowest
PAUSE = 0.002  # seconds between two looks at whether a slot is free
_ALIGNED = 64  # bytes


@dataclass(frozen=True)
class Column:
    """Shape (rows first) and type of one column of a host's batch."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return -(-int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize // _ALIGNED) * _ALIGNED


def room(layout: dict[str, Column]) -> Columns:
    """Room for one batch, in ordinary memory."""
    return {name: np.empty(column.shape, column.dtype) for name, column in layout.items()}


class Slots:
    """Batches `first`, `first` + 1, … of equal layout, each in the slot of its number modulo `SLOTS`.

    A loader waits until its slot is free; the reader frees a slot when its batch is on the devices. Picklable: a copy
    in another process is the same room.

    Args:
      layout: columns by name.
      first: number of the first batch.
    """

    def __init__(self, layout: dict[str, Column], first: int):
        self._layout = layout
        self._slot = sum(column.bytes for column in layout.values())
        if hasattr(os, "memfd_create"):
            self._file = os.memfd_create("batches")
            self._path = f"/proc/{os.getpid()}/fd/{self._file}"
        else:
            self._file, self._path = tempfile.mkstemp(prefix="batches")
        os.ftruncate(self._file, _ALIGNED + SLOTS * self._slot)
        self._mark = int.from_bytes(os.urandom(7), "little")
        self._map()
        self._header[:] = first, False, self._mark

    def _map(self) -> None:
        memory = np.frombuffer(mmap.mmap(self._file, 0), np.uint8)
        self._header = memory[:24].view(np.int64)  # first batch that is not freed, whether stopped, mark
        self._memory = memory[_ALIGNED:]

    def __getstate__(self):
        return {name: self.__dict__[name] for name in ("_layout", "_slot", "_path", "_mark")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._file = os.open(self._path, os.O_RDWR)
        self._map()
        os.close(self._file)
        if self._header[2] != self._mark:  # the reader closed it, and another file has its number now
            raise FileNotFoundError(self._path)

    def batch(self, step: int) -> Columns:
        """The room of batch `step`, as arrays."""
        columns, start = {}, (step % SLOTS) * self._slot
        for name, column in self._layout.items():
            dtype = np.dtype(column.dtype)
            size = int(np.prod(column.shape)) * dtype.itemsize
            columns[name] = self._memory[start : start + size].view(dtype).reshape(column.shape)
            start += column.bytes
        return columns

    def wait(self, step: int) -> bool:
        """Returns when batch `step` may be written; False when the reader is gone and no one will read it."""
        while not self._header[1]:
            if step < self._header[0] + SLOTS:
                return True
            time.sleep(PAUSE)
        return False

    def free(self, step: int) -> None:
        """Batch `step` is read; batches are freed in their order."""
        self._header[0] = step + 1

    def stop(self) -> None:
        """Sends away who waits."""
        self._header[1] = True

    def close(self) -> None:
        """No process can come any more. The room itself goes with the last array in it."""
        os.close(self._file)
        if not self._path.startswith("/proc"):
            os.unlink(self._path)
