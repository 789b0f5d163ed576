"""One line that says how a run is doing: live on a terminal, one line a log step elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


def clock(seconds: float) -> str:
    """Seconds as 0:42, 12:05 or 3:07:30."""
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class StageProgress:
    """Progress of one stage.

    Args:
      stage: its name.
      updates: of the whole stage.
      updates_per_epoch: for the epoch that is shown.
      later: work of the stages that follow, in updates of this one (by FLOPs); for the ETA of the whole run.
      show: False on all processes but one.
    """

    def __init__(self, stage: str, updates: int, updates_per_epoch: int, later: float, show: bool):
        self._stage, self._updates, self._per_epoch, self._later = stage, updates, updates_per_epoch, later
        self._console = Console(quiet=not show)
        self._bar = None
        self._show = show
        if show and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[line]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(stage, total=updates, line="compiling")
            self._bar.start()

    def step(self, step: int) -> None:
        """Moves the bar; prints nothing."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def line(self, step: int, values: dict[str, float], seconds_per_update: float) -> None:
        """Shows the state after `step` updates.

        `values` holds 'loss', 'learning_rate', 'images_per_second', 'data_wait' (share of time, 0..1).
        """
        remaining = self._updates - step
        text = (
            f"epoch {step / self._per_epoch:.1f}/{self._updates / self._per_epoch:.0f}  step {step}/{self._updates}  "
            f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  {values['images_per_second']:.0f} images/s  "
            f"data wait {100 * values['data_wait']:.1f} %  "
            f"ETA {clock(remaining * seconds_per_update)}, run {clock((remaining + self._later) * seconds_per_update)}"
        )
        if self._bar:
            self._bar.update(self._task, completed=step, line=text)
        elif self._show:
            print(f"{time.strftime('%H:%M:%S')} {self._stage:9} {text}", flush=True)

    def say(self, text: str) -> None:
        """A sentence above the bar, or a line of its own."""
        if self._show:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
            sys.stdout.flush()

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None
