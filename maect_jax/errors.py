"""What can go wrong, with the exit status each error ends the program with.

A message names what (key or file), the value, and how to mend it. `launch.py` prints the message alone, without a
traceback, and exits with `status`.
"""


class MaectError(Exception):
    """Base of every error a user can cause or must act on."""

    status = 1


class ConfigError(MaectError):
    """One or more settings are wrong; `problems` holds one sentence each."""

    status = 2

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(MaectError):
    """A data set is missing, empty, unreadable or unfit for what it is needed for."""

    status = 3


class BadPicture(DataError):
    """One picture, or the record that holds it, can not be read. `data.bad` says whether another takes its place.

    Attributes:
      where: its path, or data set, shard and record.
      reason: what is wrong with it.
    """

    def __init__(self, where: str, reason: str, mend: str = "replace it"):
        super().__init__(f"{where}: {reason}; {mend}, or take it out")
        self.where, self.reason, self.mend = where, reason, mend

    def __reduce__(self):  # loader processes send it
        return BadPicture, (self.where, self.reason, self.mend)


class CheckpointError(MaectError):
    """A checkpoint is missing, damaged, or of another architecture or config."""

    status = 4


class NumericsError(MaectError):
    """Training met non-finite values several times in a row."""

    status = 5


class Preempted(MaectError):
    """The run was asked to stop (SIGTERM, SIGINT); its state is saved."""

    status = 6
