"""What a path into a run stands for: its complete stages, one of them, or one checkpoint."""

from dataclasses import dataclass

import yaml
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maect_jax import handover
from maect_jax.config import TRAINED, default
from maect_jax.errors import CheckpointError
from maect_jax.training.checkpoint import absolute


@dataclass(frozen=True)
class Trained:
    """Weights of a run.

    Attributes:
      stage: whose.
      step: updates done.
      folder: of the stage.
      complete: the end of the stage; else a checkpoint on the way, or one that was asked for by its folder.
    """

    stage: str
    step: int
    folder: epath.Path
    complete: bool

    @property
    def name(self) -> str:
        """'tune' for the end of a stage, 'tune @ 300' for a checkpoint."""
        return self.stage if self.complete else f"{self.stage} @ {self.step}"

    @property
    def checkpoint(self) -> epath.Path:
        """The step's folder."""
        return self.folder / "checkpoints" / str(self.step)

    def read(self, mesh: Mesh) -> dict:
        """The parts of the checkpoint; see `handover.parts_of`. That of a complete stage is checked by its hash."""
        return handover.read_stage(self.folder, mesh)[0] if self.complete else handover.read_step(self.checkpoint, mesh)


def trained_at(path: str, run: epath.Path, config: ConfigDict) -> list[Trained]:
    """The weights at `path`, which lies in the work folder `run`: of every complete stage, or of what it names.

    Raises:
      CheckpointError: nothing complete there.
    """
    root = absolute(path)
    if root == run:
        found = stages_of(config, run)
        if not found:
            raise CheckpointError(f"--weights: '{path}' has no complete stage yet; continue its training first")
        return found
    if root.parent == run:
        if not (root / "DONE.json").exists():
            raise CheckpointError(
                f"--weights: the stage '{path}' is not complete; continue its training, or give a checkpoint in it, "
                f"{root / 'checkpoints'}/<step>"
            )
        return [_complete(root)]
    stage = root.parent.parent
    return [Trained(stage.name, int(root.name), stage, complete=False)]


def stages_of(config: ConfigDict, run: epath.Path) -> list[Trained]:
    """Every complete stage with an encoder of its own; the pre-training may lie in the run it started from."""
    return [_complete(folder) for folder in handover.evaluated_folders(config, run).values()]


def _complete(folder: epath.Path) -> Trained:
    return Trained(folder.name, handover.read_done(folder)["step"], folder, complete=True)


def run_folder(path: str) -> epath.Path | None:
    """The work folder that a path stands in: a run, a stage of it, or a stage's checkpoint; None for anything else."""
    root = absolute(path)
    folders = [root]
    if root.name in TRAINED:
        folders.append(root.parent)
    if root.name.isdigit() and root.parent.name == "checkpoints":
        folders.append(root.parent.parent.parent)
    return next((folder for folder in folders if (folder / "config.resolved.yaml").exists()), None)


def run_settings(root: epath.Path) -> ConfigDict:
    """The settings the run in `root` was trained with.

    Raises:
      CheckpointError: they are missing or damaged.
    """
    path = root / "config.resolved.yaml"
    try:
        config = default()
        config.update(yaml.safe_load(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: can not be read ({reason}); it says which model the run trained") from None
    return config
