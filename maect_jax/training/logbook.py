"""What a run writes down while it trains: `metrics.jsonl` is the record, TensorBoard files are a view of it.

A logger that fails (a full disk, a folder that is gone) says so once and never stops training.
"""

import json
import logging
import math
import time

import numpy as np
from etils import epath
from tensorboardX import SummaryWriter

_LOG = logging.getLogger(__name__)


class Logbook:
    """Metrics of all stages of one work folder.

    Args:
      workdir: the run's folder.
      write: False on all processes but one.
    """

    def __init__(self, workdir: str | epath.Path, write: bool = True):
        self._workdir = epath.Path(workdir)
        self._write = write
        self._board: SummaryWriter | None = None
        self._stage = ""
        self._failed: set[str] = set()

    def start_stage(self, stage: str, step: int) -> None:
        """Makes the record continue at `step`: lines of a lost future of this stage, and a torn last line, go."""
        self._stage = stage
        if not self._write:
            return
        self._try("metrics.jsonl", lambda: _drop(self._workdir / "metrics.jsonl", stage, step))
        self._close_board()

        def open_board():
            self._board = SummaryWriter(
                str(self._workdir / "tensorboard" / stage), purge_step=step + 1 if step else None
            )

        self._try("TensorBoard", open_board)

    def metrics(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """One line: stage, step, epoch, Unix time, and every value."""
        if not self._write:
            return
        values = {name: float(value) for name, value in values.items()}
        record = {"stage": self._stage, "step": step, "epoch": round(epoch, 4), "time": round(time.time(), 3)}
        line = json.dumps(record | {n: v if math.isfinite(v) else None for n, v in values.items()})

        def append():
            with open(self._workdir / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(line + "\n")

        self._try("metrics.jsonl", append)
        if self._board:
            self._try("TensorBoard", lambda: [self._board.add_scalar(n, v, step) for n, v in values.items()])

    def picture(self, name: str, image_hwc: np.ndarray, step: int) -> None:
        """A picture uint8 [h, w, 3] for TensorBoard."""
        if self._board:
            self._try("TensorBoard", lambda: self._board.add_image(name, image_hwc, step, dataformats="HWC"))

    def close(self) -> None:
        self._close_board()

    def _close_board(self) -> None:
        if self._board:
            self._try("TensorBoard", self._board.close)
            self._board = None

    def _try(self, what: str, action) -> None:
        try:
            action()
        except Exception as error:  # a sink is never worth the run
            if what not in self._failed:
                _LOG.warning("%s can not be written (%s); training goes on without it", what, error)
            self._failed.add(what)


def _drop(path: epath.Path, stage: str, step: int) -> None:
    """Rewrites the record without this stage's lines after `step` and without lines that are no JSON."""
    if not path.exists():
        return
    lines = path.read_bytes().decode(errors="replace").splitlines()
    kept = [
        line for line in lines if (record := _parsed(line)) and (record["stage"] != stage or record["step"] <= step)
    ]
    if kept != lines:
        temporary = path.parent / f".{path.name}.tmp"
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(path)


def _parsed(line: str) -> dict | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and "stage" in record and "step" in record else None
