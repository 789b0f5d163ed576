"""The loop of a training stage: next batch, one jitted step, and everything else late or rarely.

Order of one turn: wait for the batch · dispatch the step · read the metrics of two steps ago · every `log_every`
updates write them · every `monitor_every` updates evaluate · every `save_every` updates save. The host never waits for
the step it has just dispatched.
"""

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from maect_jax.errors import NumericsError
from maect_jax.training.checkpoint import Checkpoints, write_json
from maect_jax.training.logbook import Logbook
from maect_jax.training.progress import StageProgress
from maect_jax.training.state import TrainState
from maect_jax.training.stop import StopRequest

_LOG = logging.getLogger(__name__)

READ_LATE = 2  # steps between dispatching a step and reading its metrics
MAX_BAD_IN_A_ROW = 3


@dataclass
class Stage:
    """One training stage, ready to run.

    Attributes:
      name: 'pretrain', 'control', 'head' or 'tune'.
      folder: its folder in the work folder.
      step: jitted (state, batch) -> (state, metrics, embedding); the state is donated.
      batches: endless iterator of batches from the state's step on; see `data.batches.training`.
      updates, updates_per_epoch, batch: length of the stage; pictures an update.
      log_every, save_every: in updates.
      monitor_every: updates between two calls of `monitor`; 0 = never.
      monitor: (state, step) -> metrics to be written beside the others.
      health: jitted embedding -> dict of device scalars.
      hidden: names of metrics that mean nothing here (neighbour accuracy without labels).
      seconds: wall time that earlier, interrupted runs of this stage took.
      meta: JSON saved with each checkpoint, with the seconds so far beside it.
    """

    name: str
    folder: Any
    step: Callable
    batches: Any
    updates: int
    updates_per_epoch: int
    batch: int
    log_every: int
    save_every: int
    monitor_every: int
    monitor: Callable[[TrainState, int], dict]
    health: Callable
    hidden: tuple[str, ...]
    seconds: float
    meta: dict


def train(
    stage: Stage,
    state: TrainState,
    checkpoints: Checkpoints,
    logbook: Logbook,
    progress: StageProgress,
    stop: StopRequest,
) -> tuple[TrainState, float]:
    """Runs `stage` from the state's step to its end and saves the last state.

    Returns:
      the last state, and the stage's wall time in seconds, interruptions left out.

    Raises:
      Preempted: a stop was requested; the state is saved.
      NumericsError: three batches in a row were not finite; what they were is in `nonfinite.json`.
    """
    start, began = int(state.step), time.perf_counter()

    def save(step: int, state: TrainState) -> float:
        seconds = stage.seconds + time.perf_counter() - began
        checkpoints.save(step, state, stage.meta | {"seconds": seconds})
        return seconds

    meter = _Meter(stage, start, logbook, progress)
    try:
        for done in range(start + 1, stage.updates + 1):
            batch = next(stage.batches)
            state, metrics, embedding_be = stage.step(state, batch)
            if done % stage.log_every == 0 or done == stage.updates:
                metrics = metrics | stage.health(embedding_be)
            meter.push(done, batch["id"], metrics)
            if stop.signal is not None:
                meter.drain()
                save(done, state)
                checkpoints.wait()
                stop.raise_if_requested(f"in stage '{stage.name}' after update {done} of {stage.updates}; it is saved")
            if stage.monitor_every and (done % stage.monitor_every == 0 or done == stage.updates):
                meter.drain()
                with meter.pause():
                    found = stage.monitor(state, done)
                if found:
                    logbook.metrics(done, done / stage.updates_per_epoch, found)
            if done % stage.save_every == 0 and done < stage.updates:
                with meter.pause():
                    save(done, state)
        meter.drain()
        seconds = save(stage.updates, state)
        checkpoints.wait()
        return state, seconds
    finally:
        progress.close()


class _Meter:
    """Reads metrics late, watches for bad batches, and writes a line every `log_every` updates."""

    def __init__(self, stage: Stage, start: int, logbook: Logbook, progress: StageProgress):
        self._stage, self._logbook, self._progress = stage, logbook, progress
        self._pending: deque = deque()
        self._bad: deque = deque(maxlen=MAX_BAD_IN_A_ROW)
        self._start, self._skipped = start, None
        self._restart(start)

    def push(self, step: int, ids: jax.Array, metrics: dict) -> None:
        """Takes a step's metrics, which may not be computed yet, and reads those of an earlier one."""
        self._pending.append((step, ids, metrics))
        if len(self._pending) > READ_LATE:
            self._read(*self._pending.popleft())

    def drain(self) -> None:
        """Reads everything that is pending; waits for the device."""
        while self._pending:
            self._read(*self._pending.popleft())

    def pause(self) -> "_Meter":
        """Context whose time does not count as training."""
        return self

    def __enter__(self) -> None:
        self._pause_start = time.perf_counter()

    def __exit__(self, *_) -> None:
        self._paused += time.perf_counter() - self._pause_start

    def _read(self, step: int, ids: jax.Array, metrics: dict) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._watch(step, ids, values)
        self._progress.step(step)
        if step % self._stage.log_every == 0 or step == self._stage.updates:
            self._write(step, values)
        elif step == self._start + 1:  # the first update compiles: its time is no speed
            self._restart(step)

    def _restart(self, step: int) -> None:
        """Speeds are measured from this step on."""
        self._last_step, self._last_time, self._paused = step, time.perf_counter(), 0.0
        self._loaded = dataclasses.replace(self._stage.batches.telemetry)

    def _write(self, step: int, values: dict) -> None:
        elapsed = max(time.perf_counter() - self._last_time - self._paused, 1e-9)
        updates = max(step - self._last_step, 1)
        values["images_per_second"] = updates * self._stage.batch / elapsed
        values |= self._stage.batches.telemetry.since(self._loaded, elapsed)
        self._restart(step)
        del values["skipped_in_a_row"]
        for name in self._stage.hidden:
            values.pop(name, None)
        self._logbook.metrics(step, step / self._stage.updates_per_epoch, values)
        self._progress.line(step, values, elapsed / updates)

    def _watch(self, step: int, ids: jax.Array, values: dict) -> None:
        if self._skipped is not None and values["skipped"] > self._skipped:
            _LOG.warning("%s: update %d was not finite and is skipped", self._stage.name, step)
        self._skipped = values["skipped"]
        if not values["skipped_in_a_row"]:
            self._bad.clear()
            return
        seen = {name: repr(values[name]) for name in ("loss", "gradient_norm", "parameter_norm", "learning_rate")}
        self._bad.append({"step": step, **seen, "ids": np.asarray(ids).tolist()})
        if values["skipped_in_a_row"] < MAX_BAD_IN_A_ROW:
            return
        path = self._stage.folder / "nonfinite.json"
        write_json(path, {"stage": self._stage.name, "batches": list(self._bad)})
        raise NumericsError(
            f"{self._stage.name}: loss or gradient was not finite in {MAX_BAD_IN_A_ROW} batches in a row, at last in "
            f"update {step} (epoch {step / self._stage.updates_per_epoch:.2f}): loss {seen['loss']}, gradient norm "
            f"{seen['gradient_norm']}. None of them entered the weights; their sample ids are in {path}. Look at "
            "these pictures, or start a new work folder with a lower rate; the same command tries again from the last "
            "checkpoint."
        )
