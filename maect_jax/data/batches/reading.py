"""Batches ahead of time: Grain has threads or processes load chunks, one thread puts whole batches on the devices."""

import functools
import itertools
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker

import grain
import jax
from absl import flags

from maect_jax.data.batches.bad import BadPictures
from maect_jax.data.batches.samples import EvaluationChunks, Notes, Rows, TrainingChunks
from maect_jax.data.batches.slots import Columns, Slots
from maect_jax.data.host.decode import threads
from maect_jax.errors import DataError

AHEAD = 2  # batches that are ready on the devices


@dataclass
class Telemetry:
    """What loading has cost since it began; written by the loader's thread, read by the training loop.

    Attributes:
      wait_seconds: that the consumer waited for batches.
      asked: batches it asked for.
      ready: batches that were ready when it asked, summed over all times; ready / asked is the mean queue depth.
      pictures: pictures loaded (not views).
      bytes: of encoded pictures that were read.
      load_seconds: reading, decoding and cropping, summed over threads and processes.
    """

    wait_seconds: float = 0.0
    asked: int = 0
    ready: int = 0
    pictures: int = 0
    bytes: int = 0
    load_seconds: float = 0.0

    def since(self, earlier: "Telemetry", seconds: float) -> dict[str, float]:
        """What is reported of the `seconds` since `earlier`.

        Returns:
          data_wait: share of the time that the consumer waited.
          data_ready: batches that were ready when one was asked for, of at most `AHEAD`; where batches are loaded.
          decode_per_second: pictures a loader thread or process read, decoded and cropped in a second of its work.
          data_mb_per_second: of encoded pictures, a second of time. These two only where something was loaded.
        """
        values = {"data_wait": min(1.0, (self.wait_seconds - earlier.wait_seconds) / seconds)}
        if asked := self.asked - earlier.asked:
            values["data_ready"] = (self.ready - earlier.ready) / asked
        if (pictures := self.pictures - earlier.pictures) and (work := self.load_seconds - earlier.load_seconds) > 0:
            values["decode_per_second"] = pictures / work
            values["data_mb_per_second"] = (self.bytes - earlier.bytes) / seconds / 1e6
        return values


class Reader:
    """Iterator over this host's batches on the devices, a few of them ready.

    Args:
      load: `samples.TrainingChunks` or `EvaluationChunks`; runs in loader threads or processes.
      steps: range of steps to read; `stop` 0 = for ever.
      workers: processes; 0 = threads of this one.
      place: local arrays, which are overwritten later -> arrays on the devices.
      bad: what is done about pictures that can not be used.

    Raises (while iterating):
      DataError: a chunk ended in an error, or too many pictures are bad.
    """

    def __init__(
        self,
        load: TrainingChunks | EvaluationChunks,
        steps: tuple[int, int],
        workers: int,
        place: Callable[[Columns], dict[str, jax.Array]],
        bad: BadPictures,
    ):
        self.telemetry = Telemetry()
        self._rows, self._place, self._source, self._bad = load.rows, place, load.source, bad
        self._first = steps[0]
        self._slots = Slots(load.layout(), self._first)
        self._chunks = _read_ahead(_Writer(load, self._slots), load.rows, *steps, workers)
        self._queue: queue.Queue = queue.Queue(AHEAD)
        self._stopped = threading.Event()
        self._ended = False
        self._workers = workers
        self._thread = threading.Thread(target=self._fill, name="batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        if self._ended:
            raise StopIteration
        began = time.perf_counter()
        self.telemetry.asked += 1
        self.telemetry.ready += self._queue.qsize()
        batch = self._queue.get()
        self.telemetry.wait_seconds += time.perf_counter() - began
        if isinstance(batch, BaseException):
            self._ended = True
            raise batch
        return batch

    def close(self) -> None:
        """Stops the loader threads and processes; a second time it does nothing."""
        if self._stopped.is_set():
            return
        self._ended = True
        self._stopped.set()
        self._slots.stop()
        while not self._queue.empty():  # the thread may be waiting to put one
            self._queue.get()
        self._thread.join()
        self._chunks.close()
        self._slots.close()
        self._queue.put(StopIteration())  # for another thread that still asks

    def _fill(self) -> None:
        try:
            if self._workers:
                _spawn_deaf_processes()
            for step in itertools.count(self._first):
                self._load(step)
                batch = self._place(self._slots.batch(step))
                jax.block_until_ready(batch)  # then its slot may be written again
                self._slots.free(step)
                self._put(batch)
                if self._stopped.is_set():
                    return
        except BaseException as error:  # StopIteration among them
            self._put(error)

    def _put(self, item) -> None:
        while not self._stopped.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _load(self, step: int) -> None:
        """Returns when all of this host's rows of a step are in their slot."""
        telemetry = self.telemetry
        for _ in range(self._rows.chunks):
            notes = self._next_notes()
            self._bad.note(self._source, notes.bad)
            if notes.error is not None:
                raise notes.error
            telemetry.pictures += self._rows.chunk
            telemetry.bytes += notes.bytes
            telemetry.load_seconds += notes.seconds

    def _next_notes(self) -> Notes:
        try:
            return next(self._chunks)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):  # Grain's words for a process that is gone
                raise
            raise DataError(
                "a loader process was killed, mostly because the machine ran out of memory; "
                f"lower data.workers (now {self._workers}) or free memory"
            ) from error


def _spawn_deaf_processes() -> None:
    """From now on this thread starts processes that do not hear what asks the program to stop.

    Such a signal goes to all processes of a terminal or a job; the main process then finishes its step and saves, for
    which it needs its loaders.
    """
    resource_tracker.ensure_running()  # when it starts, it makes the thread hear again
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))


@dataclass(frozen=True)
class _Writer:
    """Place in the stream -> the notes on the chunk, which is written where it belongs. Runs in the loaders."""

    load: TrainingChunks | EvaluationChunks
    slots: Slots

    def __call__(self, place: int) -> Notes:
        _end_with_parent()
        step, _ = self.load.rows.of(place)
        try:
            return self.load(place, self.slots.batch(step)) if self.slots.wait(step) else Notes()
        except Exception as error:
            try:
                pickle.dumps(error)
            except Exception:  # it would be lost on its way, and waited for
                raise RuntimeError(f"{type(error).__name__}: {error}") from None
            raise


@functools.cache
def _end_with_parent() -> None:
    """A main process that was killed can not stop its loaders, and they would wait for it for ever."""
    if (parent := multiprocessing.parent_process()) is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _read_ahead(load: _Writer, rows: Rows, start: int, stop: int, workers: int):
    """Grain's iterator over the notes on the chunks of steps `start` to `stop`, in their order whatever the workers."""
    stop = stop or 2**40 // rows.chunks
    chunks = grain.MapDataset.range(start * rows.chunks, stop * rows.chunks).map(load)
    if not workers:
        ahead = max(threads(), 2 * rows.chunks)
        return iter(chunks.to_iter_dataset(grain.ReadOptions(num_threads=threads(), prefetch_buffer_size=ahead)))
    if not flags.FLAGS.is_parsed():  # Grain reads its flags when it starts processes; outside absl.app no one did
        flags.FLAGS.mark_as_parsed()
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    buffer = max(1, -(-2 * rows.chunks // workers))
    return iter(chunks.to_iter_dataset(reading).mp_prefetch(grain.MultiprocessingOptions(workers, buffer)))
