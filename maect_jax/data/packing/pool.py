"""Work on data sets in processes of which each holds the sets: ordered results, progress, and an end on request."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from maect_jax.data.packing.progress import PassProgress
from maect_jax.data.sources.base import Source
from maect_jax.errors import MaectError

_POLL = 0.2  # seconds between looks at how far the processes are


class Stopped(Exception):
    """This piece of work is no longer wanted."""


class Ticks:
    """How many pictures were done, counted over all processes; and whether they are to stop.

    `count` and `stop` are shared ctypes values.
    """

    def __init__(self, context):
        self.count, self.stop = context.Value("q", 0), context.RawValue("b", 0)

    def tick(self) -> None:
        """One more picture is done. Raises Stopped when no more are wanted."""
        with self.count.get_lock():
            self.count.value += 1
        if self.stop.value:
            raise Stopped


Work = Callable[[dict[str, Source], Any, Callable[[], None]], Any]

_held: dict[str, Any] = {}  # of a process of the pool: sources and ticks


def work_on(sources: dict[str, Source], work: Work, tasks: Sequence, *, workers: int, what: str, total: int) -> list:
    """work(sources, task, tick) for each task; tick() is called once for every picture.

    Args:
      sources: by split; each process gets its own.
      work: a function of a module, which processes import.
      tasks: each is one unit of work.
      workers: processes; 0 works in this one.
      what: is being done, for the progress.
      total: pictures, for the progress.

    Returns:
      The results in the order of the tasks.

    Raises:
      What `work` raises, as soon as it does. KeyboardInterrupt when interrupted; the processes have ended by then.
    """
    progress = PassProgress(what, total)
    context = multiprocessing.get_context("spawn")
    ticks = Ticks(context)
    try:
        if not workers:

            def tick():
                ticks.tick()
                progress.update(ticks.count.value)

            return [work(sources, task, tick) for task in tasks]
        workers = min(workers, len(tasks)) or 1
        pool = ProcessPoolExecutor(workers, context, initializer=_hold, initargs=(sources, ticks))
        try:
            futures = [pool.submit(_call, work, task) for task in tasks]
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, _POLL, FIRST_COMPLETED)
                for future in done:
                    future.result()
                progress.update(ticks.count.value)
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise MaectError(
                "a process of the pool has ended by itself, perhaps for want of memory; start again with fewer workers"
            ) from None
        finally:
            ticks.stop.value = 1
            pool.shutdown(cancel_futures=True)
    finally:
        progress.close()


def _hold(sources: dict[str, Source], ticks: Ticks) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and stops us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _held.update(sources=sources, ticks=ticks)


def _end_with_parent() -> None:
    """A parent that was killed can not stop its processes, and they would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(work: Work, task):
    return work(_held["sources"], task, _held["ticks"].tick)
