"""What the stages of one run share."""

from dataclasses import dataclass

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maect_jax.data.batches.bad import BadPictures
from maect_jax.data.sources.base import Source
from maect_jax.training.logbook import Logbook
from maect_jax.training.stop import StopRequest


@dataclass
class Run:
    """Everything the stages of one run share.

    Attributes:
      config: derived settings.
      workdir: the run's folder.
      mesh: devices.
      train, test: pictures; `test` may be None, then nothing is evaluated.
      logbook, stop: see their classes.
      leader: this process prints and writes.
      bad: what is done about pictures that can not be used.
    """

    config: ConfigDict
    workdir: epath.Path
    mesh: Mesh
    train: Source
    test: Source | None
    logbook: Logbook
    stop: StopRequest
    leader: bool
    bad: BadPictures

    def say(self, text: str) -> None:
        if self.leader:
            print(text, flush=True)
