"""Few-shot accuracy by ridge regression in closed form, the preset 'bigvision-fewshot'.

As in big_vision's few-shot evaluator: features standardised by the few train rows, a constant feature that is hardly
penalised, targets +1 for the class and -1 for the others. One eigendecomposition of the smaller Gram matrix serves
every strength of the penalty; it is computed in float64 on the host, where condition numbers of 1e9 do no harm.
There the strength is fixed; here it is chosen for each split on train rows that are not among the shots.

Axes: n train rows, d width + 1, c classes, r rank of the Gram matrix, p penalties.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from maect_jax.errors import DataError
from maect_jax.evaluation.probes.logistic_solver import predict
from maect_jax.evaluation.rows import check_rows, copy
from maect_jax.evaluation.splits import SplitScores, generate, in_class_rank, list_hash, score_splits


@dataclasses.dataclass(frozen=True)
class RidgePreset:
    """Every setting of a protocol; numbers of different presets do not compare.

    Attributes:
      feature: that the preset is defined on; 'configured' = what the model stands for a picture by.
      shots: train rows of each class.
      seeds: number of splits for each.
      penalties: candidates of l2, ascending; of equally good ones the largest is taken.
      epsilon: added to the standard deviation.
      constant: value of the constant feature.
      held_out: rows to choose the penalty on, at most about so many, the same number of each class where it has them.
    """

    name: str
    feature: str
    shots: tuple[int, ...]
    seeds: int
    penalties: tuple[float, ...]
    epsilon: float
    constant: float
    held_out: int


PRESET = RidgePreset(
    "bigvision-fewshot",
    "configured",
    shots=(5, 10, 25),
    seeds=3,
    penalties=tuple(2.0**power for power in range(-10, 21)),
    epsilon=1e-5,
    constant=100.0,
    held_out=5000,
)


@dataclasses.dataclass(frozen=True)
class RidgeFit:
    """Ridge regressions of one set of rows, for any penalty.

    Attributes:
      mean_d, scale_d: standardisation of features without the constant one.
      constant: value of the constant feature.
      left_dr, eigenvalue_r, right_rc: weights are left / (eigenvalue + l2) @ right; float64.
    """

    mean_d: np.ndarray
    scale_d: np.ndarray
    constant: float
    left_dr: np.ndarray
    eigenvalue_r: np.ndarray
    right_rc: np.ndarray

    def prepare(self, features) -> np.ndarray:
        """Features [rows, width] standardised and with the constant one, float64 [rows, width + 1]."""
        return np.pad((features - self.mean_d) / self.scale_d, [(0, 0), (0, 1)], constant_values=self.constant)

    def weights(self, penalty: float) -> np.ndarray:
        """float64 [width + 1, classes]."""
        return (self.left_dr / (self.eigenvalue_r + penalty)) @ self.right_rc


def fit(features, labels, classes: int, epsilon: float = PRESET.epsilon, constant: float = PRESET.constant) -> RidgeFit:
    """Decomposes the ridge regression of features [rows, width] on +-1 targets of labels [rows] in 0..classes-1."""
    x = np.asarray(features, np.float64)
    mean_d, scale_d = x.mean(axis=0), x.std(axis=0) + epsilon
    x_nd = np.pad((x - mean_d) / scale_d, [(0, 0), (0, 1)], constant_values=constant)
    target_nc = np.where(np.asarray(labels)[:, None] == np.arange(classes), 1.0, -1.0)
    if x_nd.shape[0] >= x_nd.shape[1]:
        eigenvalue_r, left_dr = np.linalg.eigh(x_nd.T @ x_nd)
        right_rc = left_dr.T @ (x_nd.T @ target_nc)
    else:
        eigenvalue_r, axes_nr = np.linalg.eigh(x_nd @ x_nd.T)
        left_dr, right_rc = x_nd.T @ axes_nr, axes_nr.T @ target_nc
    # rounding may leave a zero eigenvalue slightly negative
    return RidgeFit(mean_d, scale_d, constant, left_dr, np.maximum(eigenvalue_r, 0), right_rc)


def few_shot(
    mesh: Mesh,
    train_features,
    train_labels,
    test_features,
    test_labels,
    classes: int,
    data_hash: str,
    seed: int = 0,
    preset: RidgePreset = PRESET,
    check: Callable[[], None] = lambda: None,
) -> dict[int, SplitScores]:
    """Accuracy on the test rows for each number of shots that the data allow.

    A number of shots is left out where a class would have no row left to choose the penalty on.

    Args:
      mesh: devices over which the rows that are predicted are split.
      train_features, train_labels: float32 [rows, width], integers [rows]; rows with a negative label are not used.
      test_features, test_labels: float32 [test, width], integers [test] in 0..classes-1.
      data_hash: of the train rows; see `splits.generate`.
      seed: the splits are those of seeds seed, seed + 1, ….
      preset: the published one, or another.
      check: called before every fit; may raise to stop.

    Returns:
      shots -> scores.

    Raises:
      DataError: shapes do not fit, a label is out of range, or not even the smallest number of shots is possible.
    """
    labels = np.asarray(train_labels)
    train, _ = check_rows("train", train_features, np.maximum(labels, 0), classes)  # those without label are not used
    test, test_label = check_rows("test", test_features, test_labels, classes)
    count_c = np.bincount(labels[labels >= 0])
    fewest = int(count_c[count_c > 0].min(initial=len(labels)))
    allowed = [shots for shots in preset.shots if shots < fewest]
    if not allowed:
        found = f"a class has {fewest} train pictures; {min(preset.shots) + 1} are needed"
        raise DataError(f"{preset.name}: {found}, {min(preset.shots)} to learn from and one to choose the penalty on")
    each = max(1, preset.held_out // np.count_nonzero(count_c))
    scores = {}
    for shots in allowed:
        predictions, penalties, splits, held_out_rows = [], [], [], []
        for split_seed in range(seed, seed + preset.seeds):
            check()
            rows = generate(labels, shots, split_seed, data_hash)
            rank_n = in_class_rank(labels, split_seed, data_hash)
            held_out = np.flatnonzero((labels >= 0) & (rank_n >= shots) & (rank_n < shots + each))
            ridge = fit(train[rows], labels[rows], classes, preset.epsilon, preset.constant)
            penalty = _choose(mesh, ridge, train[held_out], labels[held_out], preset.penalties)
            predictions.append(_predict(mesh, ridge.weights(penalty)[None], ridge.prepare(test))[0])
            penalties.append(penalty)
            splits.append(list_hash(rows))
            held_out_rows.append(held_out.size)
        protocol = dataclasses.asdict(preset) | {
            "name": f"{preset.name} {shots} per class",
            "shots": shots,
            "seed": seed,
            "selection": "heldout",
            "candidates": len(preset.penalties),
            "held_out_rows": held_out_rows,
            "splits": splits,
        }
        scores[shots] = score_splits(np.stack(predictions), test_label, protocol, {"penalty": penalties})
    return scores


def _choose(mesh: Mesh, ridge: RidgeFit, features, labels, penalties: tuple[float, ...]) -> float:
    """The penalty that predicts the rows best, the largest of equals; the rows are turned to the axes once for all."""
    penalty_p = np.array(penalties)
    weights_prc = ridge.right_rc / (ridge.eigenvalue_r + penalty_p[:, None])[:, :, None]
    correct_pn = _predict(mesh, weights_prc, ridge.prepare(features) @ ridge.left_dr) == labels
    accuracy_p = correct_pn.mean(axis=1)
    return float(penalty_p[accuracy_p == accuracy_p.max()].max())


def _predict(mesh: Mesh, weights: np.ndarray, features: np.ndarray) -> np.ndarray:
    return predict(mesh, copy(mesh, weights.astype(np.float32)), features)
