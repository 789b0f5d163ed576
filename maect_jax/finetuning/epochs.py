"""What is measured after each epoch, and which epoch is chosen: on held-out training pictures, never on test pictures.

The published protocol reports the best epoch on the test pictures themselves; that number stands beside ours, under
its own name.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maect_jax.data.device.augment import normalise
from maect_jax.finetuning.model import Classifier
from maect_jax.finetuning.step import evaluated_params
from maect_jax.models.patches import patchify
from maect_jax.parallel.mesh import replicated
from maect_jax.training.checkpoint import Checkpoints
from maect_jax.training.state import TrainState

SELECTION_RULE = "highest accuracy, then lowest cross-entropy, then the earlier epoch"
Scorer = Callable[[dict, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Score(NamedTuple):
    """A classifier on a set of pictures: `correct` bool [pictures] in their order, mean cross-entropy in nats."""

    correct: np.ndarray
    nats: float

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())


def make_scorer(model: Classifier, mean: tuple[float, ...], std: tuple[float, ...], mesh: jax.sharding.Mesh) -> Scorer:
    """Jitted (parameters, pictures uint8 [batch, size, size, c], labels [batch]) -> (correct bool, nats) [batch]."""

    def scorer(params: dict, images_bhwc: jax.Array, label_b: jax.Array) -> tuple[jax.Array, jax.Array]:
        images_bhwc = normalise(images_bhwc.astype(jnp.float32), mean, std)
        logits_bc, _ = model.apply({"params": params}, patchify(images_bhwc, model.encoder.patch))
        own_b = jnp.take_along_axis(logits_bc, jnp.maximum(label_b, 0)[:, None], axis=1)[:, 0]
        return logits_bc.argmax(axis=1) == label_b, jax.nn.logsumexp(logits_bc, axis=1) - own_b

    return jax.jit(scorer, out_shardings=replicated(mesh))


def score(scorer: Scorer, params: dict, batches: Iterable[dict], check: Callable[[], None]) -> Score:
    """The score of every picture of `data.batches.evaluation`; `check` is called before each batch."""
    correct, nats, waiting = [], [], None

    def read(found: tuple) -> None:
        correct_b, nats_b, valid_b = (np.asarray(x) for x in found)
        correct.append(correct_b[valid_b])
        nats.append(nats_b[valid_b])

    for batch in batches:
        check()
        valid_b = jax.device_put(batch["valid"], replicated(batch["valid"].sharding.mesh))
        found = (*scorer(params, batch["image"], batch["label"]), valid_b)
        if waiting is not None:  # read one batch late: the device works on while the host waits
            read(waiting)
        waiting = found
    read(waiting)
    return Score(np.concatenate(correct), float(np.concatenate(nats).mean(dtype=np.float64)))


class Epochs:
    """The accuracies so far, and the test pictures that the two choices got right; survives in a checkpoint's JSON.

    Attributes:
      table: a dict an epoch: epoch (from 1), held_out and test (accuracies), held_out_nats and test_nats.
    """

    def __init__(self, saved: dict | None = None):
        saved = saved or {"table": [], "correct": {}}
        self.table: list[dict] = saved["table"]
        self._correct: dict[str, str] = saved["correct"]

    def add(self, held_out: Score, test: Score) -> bool:
        """Takes the next epoch's scores; returns whether it is the best one on the held-out pictures."""
        row = {"epoch": len(self.table) + 1}
        for part, found in (("held_out", held_out), ("test", test)):
            row |= {part: found.accuracy, f"{part}_nats": found.nats}
        self.table.append(row)
        best = {part: self.best(part) is row for part in ("held_out", "test")}
        packed = np.packbits(test.correct).tobytes().hex()
        self._correct |= {part: packed for part, is_best in best.items() if is_best}
        return best["held_out"]

    def best(self, part: str) -> dict:
        """The best row by 'held_out' (what is chosen) or by 'test' (as published)."""
        return max(self.table, key=lambda row: (row[part], -row[f"{part}_nats"]))

    def correct(self, part: str, pictures: int) -> np.ndarray:
        """Which test pictures the best epoch by `part` got right, bool [pictures]."""
        packed = np.frombuffer(bytes.fromhex(self._correct[part]), np.uint8)
        return np.unpackbits(packed, count=pictures).astype(bool)

    def saved(self) -> dict:
        """Plain data for a checkpoint; a copy that later epochs do not change."""
        return {"table": [dict(row) for row in self.table], "correct": dict(self._correct)}


class Monitor:
    """Measures the classifier after each epoch and keeps the weights of the best; called by the loop as (state, step).

    Args:
      scorer: from `make_scorer`.
      held_out, test: batches of the pictures; see `score`.
      chosen: where the weights of the chosen epoch go. The two newest choices stay, so that the older one is there
        when a run is killed before the checkpoint that counts on the newer one.
      meta: of the run's checkpoints; its 'epochs' is continued (None = none yet) and kept up to date. The chosen
        weights get its 'stage', 'provenance' and 'classes'.
      check: called before each batch; may raise to stop.
    """

    def __init__(
        self,
        *,
        scorer: Scorer,
        held_out: Iterable[dict],
        test: Iterable[dict],
        chosen: Checkpoints,
        meta: dict,
        check: Callable[[], None],
    ):
        self.epochs = Epochs(meta["epochs"])
        self._scorer, self._held_out, self._test, self._check = scorer, held_out, test, check
        self._chosen, self._meta = chosen, meta

    def __call__(self, state: TrainState, step: int) -> dict[str, float]:
        params = evaluated_params(state)
        on_held_out, on_test = (
            score(self._scorer, params, batches, self._check) for batches in (self._held_out, self._test)
        )
        if self.epochs.add(on_held_out, on_test):
            about = {name: self._meta[name] for name in ("stage", "provenance", "classes")}
            self._chosen.save(step, {"params": params}, about)
            self._chosen.wait()
        self._meta["epochs"] = self.epochs.saved()
        return {"held_out_accuracy": on_held_out.accuracy, "test_accuracy": on_test.accuracy}
