"""A run that is asked to stop finishes its step, saves, and says so; asked twice, it ends at once."""

import os
import signal
import sys
import threading

from maect_jax.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Notices SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 while it is entered as a context.

    Python runs signal handlers only between bytecodes, so never during a long compilation. The interpreter's wake-up
    pipe is written at once, though: a thread reads it, keeps the first signal as a request and ends the process on the
    second.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "StopRequest":
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._old_pipe = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._old_handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        threading.Thread(target=self._watch, args=(reader,), name="stop-request", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_pipe)

    def _watch(self, reader: int) -> None:
        while received := os.read(reader, 1):
            if received[0] not in SIGNALS:
                continue
            name = signal.Signals(received[0]).name
            if self.signal is not None:
                os.write(sys.stderr.fileno(), f"\n{name} again: ending at once, without saving\n".encode())
                os._exit(128 + received[0])
            self.signal = signal.Signals(received[0])
            text = f"\n{name}: stopping after this step and saving; once more ends at once\n"
            os.write(sys.stderr.fileno(), text.encode())

    def raise_if_requested(self, where: str) -> None:
        """Raises Preempted when a signal came; `where` says what was going on, for the message."""
        if self.signal is not None:
            raise Preempted(f"{self.signal.name}: stopped {where}. The same command continues from here.")
