"""How a pass over a data set is doing: one live line on a terminal, a plain line now and then elsewhere."""

import sys
import time

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from maect_jax.durations import clock

_EVERY = 10.0  # seconds between plain lines


class PassProgress:
    """Progress over `total` pictures, on standard error, so that what is printed stays alone on standard output.

    Args:
      what: is being done, one word.
      total: pictures.
    """

    def __init__(self, what: str, total: int):
        self._what, self._total, self._done = what, total, 0
        self._began = self._printed = time.perf_counter()
        console = Console(stderr=True)
        self._live = Live(get_renderable=self._render, console=console) if console.is_terminal else None
        if self._live:
            self._live.start()

    def _render(self) -> Table:
        row = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self._total, completed=self._done, width=16)
        row.add_row(f"[bold]{self._what}[/]", bar, f"{self._done}/{self._total}", self._details())
        return row

    def _details(self) -> str:
        seconds = time.perf_counter() - self._began
        if not self._done:
            return "starting"
        rate = self._done / seconds
        return f"{rate:.0f} pictures/s  ETA {clock((self._total - self._done) / rate)}"

    def update(self, done: int) -> None:
        """Shows that `done` pictures are done."""
        self._done = done
        now = time.perf_counter()
        if not self._live and now - self._printed > _EVERY:
            self._printed = now
            print(f"{self._what} {done}/{self._total}  {self._details()}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None
