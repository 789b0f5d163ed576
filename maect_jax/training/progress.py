"""How a run is doing: live on a terminal, one line a log step elsewhere."""

import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from maect_jax.durations import clock


class StageProgress:
    """Progress of one stage: two live lines on a terminal, however narrow, and a plain line a log step elsewhere.

    Args:
      stage: its name.
      updates: of the whole stage.
      updates_per_epoch: for the epoch that is shown.
      later: work of the stages that follow, in updates of this one (by FLOPs); for the ETA of the whole run.
      show: False on all processes but one.
    """

    def __init__(self, stage: str, updates: int, updates_per_epoch: int, later: float, show: bool):
        self._stage, self._updates, self._per_epoch, self._later = stage, updates, updates_per_epoch, later
        self._show, self._step, self._eta, self._details = show, 0, "compiling", ""
        console = Console()
        self._live = Live(get_renderable=self._render, console=console) if show and console.is_terminal else None
        if self._live:
            self._live.start()

    def _render(self) -> Group:
        row = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self._updates, completed=self._step, width=16)
        row.add_row(f"[bold]{self._stage}[/]", bar, f"{self._step}/{self._updates}", self._eta)
        return Group(row, Text(self._details, no_wrap=True, overflow="ellipsis"))

    def step(self, step: int) -> None:
        """Moves the bar; prints nothing."""
        self._step = step

    def line(self, step: int, values: dict[str, float], seconds_per_update: float) -> None:
        """Shows the state after `step` updates.

        `values` holds 'loss', 'learning_rate', 'images_per_second', 'data_wait' (share of time, 0..1).
        """
        remaining = self._updates - step
        self._step = step
        whole = clock((remaining + self._later) * seconds_per_update)
        self._eta = f"ETA {clock(remaining * seconds_per_update)}, run {whole}"
        self._details = (
            f"epoch {step / self._per_epoch:.1f}/{self._updates / self._per_epoch:.0f}  "
            f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  {values['images_per_second']:.0f} images/s  "
            f"data wait {100 * values['data_wait']:.1f} %"
        )
        if self._show and not self._live:
            where = f"{time.strftime('%H:%M:%S')} {self._stage:9} step {step}/{self._updates}"
            print(f"{where}  {self._details}  {self._eta}", flush=True)

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None
