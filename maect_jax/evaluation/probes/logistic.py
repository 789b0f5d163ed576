"""Low-shot accuracy by logistic regression: presets, and what they make of the splits of a training set."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from maect_jax.errors import ConfigError, DataError
from maect_jax.evaluation.probes.logistic_solver import MAX_ITERATIONS, MEMORY, TOLERANCE, predict, solve
from maect_jax.evaluation.rows import check_rows, hold_out, pad_rows
from maect_jax.evaluation.splits import SplitScores, list_hash, score_splits

AT_ONCE = 8  # strengths solved together: neighbours in the sweep need about as many iterations
WORKSPACE = 2**30  # float32 values on a device, at most, while several strengths are solved together


@dataclasses.dataclass(frozen=True)
class LogisticPreset:
    """Every setting of a protocol; numbers of different presets do not compare.

    Attributes:
      feature: that the preset is defined on; 'configured' = what the model stands for a picture by.
      unit_rows: from each train row its own mean (over the features) is subtracted, then it is scaled to unit length.
      preprocess_test: whether test rows are treated like that, too. It changes probabilities, not the predicted class:
        train rows that sum to zero leave an optimum whose columns do.
      strengths: l2 * rows = 1 / C; of several the best on a held-out tenth of the split, the strongest of equals.
    """

    name: str
    feature: str
    unit_rows: bool
    preprocess_test: bool
    strengths: tuple[float, ...]


PRESETS = {
    preset.name: preset
    for preset in (
        # MSN's protocol (Assran et al. 2022) as MAE-CT (Lehner et al. 2023) uses it
        LogisticPreset("maect-logreg", "cls@last", unit_rows=True, preprocess_test=False, strengths=(0.00025,)),
        # DINOv2 (Oquab et al. 2023), released code; there in float64, and with an intercept
        LogisticPreset(
            "dinov2-logreg",
            "configured",
            unit_rows=False,
            preprocess_test=False,
            strengths=tuple((10 ** -np.linspace(-6, 5, 45)).tolist()),
        ),
    )
}


def low_shot(
    mesh: Mesh,
    train_features,
    train_labels,
    test_features,
    test_labels,
    splits: list[np.ndarray],
    preset: LogisticPreset,
    classes: int,
    seed: int = 0,
    check: Callable[[], None] = lambda: None,
) -> SplitScores:
    """Accuracy on the test rows of what is learnt from the rows of each split.

    Args:
      mesh: devices.
      train_features, train_labels: float32 [rows, width], integers [rows]; labels outside the splits play no part.
      test_features, test_labels: float32 [test, width], integers [test] in 0..classes-1.
      splits: indices of train rows; see `splits.generate` and `splits.read_list`. One of all rows is a split, too.
      preset: one of `PRESETS`, or another.
      seed: of the tenth on which one of several strengths is chosen.
      check: called between solutions; may raise to stop.

    Raises:
      ConfigError: no split. DataError: shapes do not fit, a row or label is out of range, or a split of fewer than ten
        rows to choose a strength on.
    """
    if not splits:
        raise ConfigError("low-shot: no split of the train rows was given; at least one is needed")
    train_labels, (test, test_label) = np.asarray(train_labels), check_rows("test", test_features, test_labels, classes)
    rows = []
    for number, split_rows in enumerate(splits, 1):
        wrong = np.setdiff1d(split_rows, np.arange(len(train_labels)))
        if wrong.size:
            raise DataError(f"low-shot: split {number} asks for row {wrong[0]} of {len(train_labels)} train rows")
        x, y = check_rows(f"split {number}", np.asarray(train_features[split_rows]), train_labels[split_rows], classes)
        rows.append((_unit_rows(x) if preset.unit_rows else x, y))
    strengths = [_choose(mesh, x, y, preset, classes, seed, check) for x, y in rows]
    check()
    most = max(len(y) for _, y in rows)
    features = np.stack([pad_rows(x, most) for x, _ in rows])
    labels = np.stack([pad_rows(y, most, fill=-1) for _, y in rows])
    l2 = [strength / len(y) for strength, (_, y) in zip(strengths, rows)]
    solution = solve(mesh, features, labels, l2, classes)
    prediction = predict(mesh, solution.weights_sdc, _unit_rows(test) if preset.preprocess_test else test)
    protocol = dataclasses.asdict(preset) | {
        "intercept": False,
        "solver": f"L-BFGS, float32, to a relative gap of {TOLERANCE:g} or {MAX_ITERATIONS} iterations",
        "selection": "heldout" if len(preset.strengths) > 1 else "none",
        "candidates": len(preset.strengths),
        "seed": seed,
        "splits": [list_hash(split_rows) for split_rows in splits],
        "split_rows": [len(y) for _, y in rows],
    }
    found = {"strength": strengths, "C": [1 / strength for strength in strengths]} | {
        name: getattr(solution, name).tolist() for name in ("objective", "gradient_norm", "gap", "iterations")
    }
    return score_splits(prediction, test_label, protocol, found)


def _unit_rows(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(axis=1, keepdims=True, dtype=np.float64)
    return (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def _choose(mesh: Mesh, x: np.ndarray, y: np.ndarray, preset: LogisticPreset, classes: int, seed: int, check) -> float:
    """The strength with which nine tenths of the rows best predict the other tenth."""
    strengths = np.array(preset.strengths)
    if len(strengths) == 1:
        return float(strengths[0])
    kept, held_out = hold_out(y, seed)
    # a problem needs about six arrays of logits' size, and the steps and gradients that L-BFGS remembers
    size = classes * (6 * -(-len(kept) // mesh.size) + (2 * MEMORY + 6) * x.shape[1])
    at_once = int(np.clip(WORKSPACE // size, 1, min(AT_ONCE, len(strengths))))
    accuracy = []
    for start in range(0, len(strengths), at_once):
        check()
        group = pad_rows(strengths[start : start + at_once], at_once, fill=strengths[-1])  # one compiled program
        solution = solve(mesh, x[None, kept], y[None, kept], group / len(kept), classes)
        accuracy.append((predict(mesh, solution.weights_sdc, x[held_out]) == y[held_out]).mean(axis=1))
    accuracy = np.concatenate(accuracy)[: len(strengths)]
    return float(strengths[accuracy == accuracy.max()].max())
