"""Do the features cluster by object: k-means on cached features, scored against the classes.

Many runs from k-means++ seeds; the best is that of lowest inertia, so labels choose nothing. Beside its scores stand
mean and standard deviation over the runs. Labels are read by the scores alone, and for the number of clusters.

Presets: 'ours-cluster' takes the classes that have rows; 'imagenet-val' all 1000 of ImageNet's validation set;
'imagenet-dogs-15' the fifteen dogs of Chang et al. 2017 (deep adaptive image clustering), see `select_classes`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from maect_jax.errors import ConfigError, DataError
from maect_jax.evaluation.clustering import cluster_scores, kmeans
from maect_jax.evaluation.clustering.nearest_centres import Rows, load_rows
from maect_jax.evaluation.rows import check_rows
from maect_jax.objectives.nnclr import unit
from maect_jax.parallel.mesh import replicated

IMAGENET_DOGS_15 = (
    "n02085936",
    "n02086646",
    "n02088238",
    "n02091467",
    "n02097130",
    "n02099601",
    "n02101388",
    "n02101556",
    "n02102177",
    "n02105056",
    "n02105412",
    "n02105855",
    "n02107142",
    "n02110958",
    "n02112137",
)
PREPROCESSING = ("none", "l2", "standardise", "pca-<width>")
ALGORITHMS = ("auto", "lloyd", "mini-batch")
EPSILON = 1e-5  # added to the standard deviation


@dataclasses.dataclass(frozen=True)
class ClusterPreset:
    """Every setting of a protocol; numbers of different presets do not compare.

    Attributes:
      feature: that the preset is defined on; 'configured' = what the model stands for a picture by.
      clusters: number of clusters, and of classes that the rows must be of; None = of those that have rows.
      class_names: of the classes to be selected before, see `select_classes`; None = all.
      preprocessing: 'none'; 'l2', rows of unit length; 'standardise', features of mean 0 and standard deviation 1;
        'pca-<width>', the rows' first so many principal components, then of unit length.
      algorithm: 'lloyd', 'mini-batch', or 'auto': Lloyd's up to `lloyd_rows` rows.
      runs: restarts from seeds of their own.
      max_iterations, tolerance: of `kmeans.lloyd`.
      batch, steps: of `kmeans.mini_batch`; a batch of None follows from the number of clusters.
      silhouette_rows: sample of the silhouette, at most.
    """

    name: str
    feature: str = "configured"
    clusters: int | None = None
    class_names: tuple[str, ...] | None = None
    preprocessing: str = "l2"
    algorithm: str = "auto"
    lloyd_rows: int = 100_000  # mini-batches that find as good clusters take as long up to about here
    runs: int = 100
    max_iterations: int = 300
    tolerance: float = 1e-4
    batch: int | None = None
    steps: int = kmeans.STEPS
    silhouette_rows: int = cluster_scores.SILHOUETTE_ROWS


PRESETS = {
    preset.name: preset
    for preset in (
        ClusterPreset("ours-cluster"),
        ClusterPreset("imagenet-val", clusters=1000),
        ClusterPreset("imagenet-dogs-15", clusters=15, class_names=IMAGENET_DOGS_15),
    )
}

SCORES = {
    "acc": cluster_scores.accuracy,
    "nmi": cluster_scores.normalized_mutual_information,
    "ami": cluster_scores.adjusted_mutual_information,
    "ari": cluster_scores.adjusted_rand_index,
}


@dataclasses.dataclass(frozen=True)
class ClusterResult:
    """What the clustering measured.

    Attributes:
      scores: of the best run: 'acc', 'nmi', 'ami', 'ari', 'silhouette', 'davies_bouldin', 'inertia'. Silhouette and
        Davies-Bouldin are NaN where all rows fell into one cluster.
      mean, std: over the runs, of 'acc', 'nmi', 'ami', 'ari' and 'inertia'; std divides by the number of runs.
      runs: the same of each run, float64 [runs].
      best: the run of lowest inertia, from 0.
      assignment: cluster of each row in the best run, int32 [rows].
      cluster_class: class that each cluster of the best run is matched with, int32 [clusters].
      correct: rows whose cluster is matched with their class, bool [rows]; their share is 'acc'.
      protocol: every setting.
    """

    scores: dict[str, float]
    mean: dict[str, float]
    std: dict[str, float]
    runs: dict[str, np.ndarray] = dataclasses.field(repr=False)
    best: int
    assignment: np.ndarray = dataclasses.field(repr=False)
    cluster_class: np.ndarray = dataclasses.field(repr=False)
    correct: np.ndarray = dataclasses.field(repr=False)
    protocol: dict = dataclasses.field(repr=False)


def evaluate_cluster(
    mesh: Mesh,
    features,
    labels,
    preset: ClusterPreset,
    classes: int,
    seed: int = 0,
    check: Callable[[], None] = lambda: None,
) -> ClusterResult:
    """Clusters the rows and scores every run.

    Args:
      mesh: devices over which the rows are split.
      features, labels: float32 [rows, width], integers [rows] in 0..classes-1; NumPy or jax arrays.
      preset: one of `PRESETS`, or another.
      classes: number of classes that labels may name; those without rows do not count.
      seed: of the runs.
      check: called now and then; may raise to stop.

    Raises:
      ConfigError: a setting that can not work.
      DataError: shapes do not fit, a label is missing or out of range, rows of a single class, classes that are not the
        preset's, fewer rows than clusters, or a value that is not finite.
    """
    _check_preset(preset)
    features, labels = check_rows("clustering", features, labels, classes)
    present = np.unique(labels)
    if present.size < 2:
        raise DataError("clustering labels: all rows are of one class; scores need at least two")
    if preset.clusters not in (None, present.size):
        expected = f"the preset '{preset.name}' needs {preset.clusters}"
        raise DataError(f"clustering labels: rows of {present.size} classes, but {expected}; choose another preset")
    label_n = np.searchsorted(present, labels)
    features = preprocess(mesh, features, preset.preprocessing)
    settings = {"restarts": preset.runs, "seed": seed, "check": check}
    rows, clusters = labels.size, present.size
    full = preset.algorithm == "lloyd" or (preset.algorithm == "auto" and rows <= preset.lloyd_rows)
    if full:
        length = {"max_iterations": preset.max_iterations, "tolerance": preset.tolerance}
        found = kmeans.lloyd(mesh, features, clusters, **length, **settings)
    else:
        length = {"batch": preset.batch or kmeans.batch_size(clusters), "steps": preset.steps}
        found = kmeans.mini_batch(mesh, features, clusters, **length, **settings)

    runs = {name: np.zeros(preset.runs) for name in SCORES} | {"inertia": found.inertia}
    for run, assignment_n in enumerate(found.assignment):
        check()
        table_kc = cluster_scores.contingency(assignment_n, label_n, clusters, clusters)
        for name, score in SCORES.items():
            runs[name][run] = score(table_kc)
    best_n = found.assignment[found.best]
    matched_k = cluster_scores.matched_classes(cluster_scores.contingency(best_n, label_n, clusters, clusters))
    own = {
        "silhouette": cluster_scores.silhouette(mesh, features, best_n, rows=preset.silhouette_rows, check=check),
        "davies_bouldin": cluster_scores.davies_bouldin(features, best_n),
    }
    return ClusterResult(
        scores={name: float(value[found.best]) for name, value in runs.items()} | own,
        mean={name: float(value.mean()) for name, value in runs.items()},
        std={name: float(value.std()) for name, value in runs.items()},
        runs=runs,
        best=found.best,
        assignment=best_n,
        cluster_class=present[matched_k].astype(np.int32),
        correct=matched_k[best_n] == label_n,
        protocol={
            "preset": preset.name,
            "feature": preset.feature,
            "class_names": None if preset.class_names is None else list(preset.class_names),
            "preprocessing": preset.preprocessing,
            "clusters": int(clusters),
            "clusters_rule": "number of classes that have rows",
            "runs": preset.runs,
            "algorithm": "full Lloyd" if full else "mini-batch",
            "algorithm_rule": f"full Lloyd up to {preset.lloyd_rows} rows" if preset.algorithm == "auto" else "set",
            **length,
            "seeding": "greedy k-means++, "
            + ("all rows" if full else f"{3 * max(length['batch'], clusters)} drawn rows"),
            "seed": seed,
            "selection": "lowest inertia over all rows, no labels",
            "candidates": preset.runs,
            "rows": rows,
            "silhouette_rows": min(rows, preset.silhouette_rows),
        },
    )


def select_classes(labels, class_names: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    """Indices, ascending, of the rows of the wanted classes.

    Args:
      labels: integers [rows], indices into class_names; negative = no label, never selected.
      class_names: of the data, such as WordNet ids 'n02085936'.
      wanted: some of them, such as `IMAGENET_DOGS_15`.

    Raises:
      DataError: lists the wanted classes that the data do not name or have no row of.
    """
    labels = np.asarray(labels)
    index_of = {name: index for index, name in enumerate(class_names)}
    missing = [name for name in wanted if name not in index_of or not (labels == index_of[name]).any()]
    if missing:
        known = (
            f"the data's classes are named like '{class_names[0]}'" if len(class_names) else "the data name no class"
        )
        raise DataError(f"clustering: no rows of the classes {', '.join(missing)}; {known}")
    return np.flatnonzero(np.isin(labels, [index_of[name] for name in wanted]))


def preprocess(mesh: Mesh, features, how: str) -> np.ndarray:
    """The features as they are clustered, float32 [rows, width or fewer].

    Args:
      features: float32 [rows, width].
      how: see `ClusterPreset.preprocessing`.

    Raises:
      ConfigError: unknown, or more components than rows or features.
    """
    features, _ = check_rows("clustering", features)
    components = _components(how)
    if components is not None and not 1 <= components <= min(features.shape):
        most = f"1..{min(features.shape)}, as there are {features.shape[0]} rows of width {features.shape[1]}"
        raise ConfigError(f"cluster preprocessing '{how}': components must lie in {most}")
    if how == "none":
        return features
    if how == "l2":
        return np.asarray(unit(features))
    if how == "standardise":
        scale_d = features.std(axis=0, ddof=1, dtype=np.float64) + EPSILON
        return ((features - features.mean(axis=0, dtype=np.float64)) / scale_d).astype(np.float32)
    rows, _, _ = load_rows(mesh, features, clusters=1)
    axes_dp = np.linalg.eigh(np.asarray(_covariance(rows, mesh=mesh), np.float64))[1][:, : -components - 1 : -1]
    turned_np = np.asarray(_turn(rows, axes_dp.astype(np.float32), mesh=mesh))[: len(features)]
    return np.asarray(unit(turned_np))


def _components(how: str) -> int | None:
    """Number of principal components that the preprocessing keeps; None = it takes none."""
    if how in PREPROCESSING[:3]:
        return None
    kind, _, number = how.partition("-")
    if kind != "pca" or not number.isdecimal():
        raise ConfigError(f"cluster preprocessing '{how}' is unknown; it is one of {', '.join(PREPROCESSING)}")
    return int(number)


def _check_preset(preset: ClusterPreset) -> None:
    _components(preset.preprocessing)
    if preset.algorithm not in ALGORITHMS:
        raise ConfigError(f"cluster algorithm '{preset.algorithm}' is unknown; it is one of {', '.join(ALGORITHMS)}")


@partial(jax.jit, static_argnames="mesh")
def _covariance(rows: Rows, *, mesh: Mesh):
    """Times the number of rows, [width, width]; the rows are centred."""
    x_nd, _ = rows.flat()
    product_de = jnp.matmul(x_nd.T, x_nd, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.with_sharding_constraint(product_de, replicated(mesh))


@partial(jax.jit, static_argnames="mesh")
def _turn(rows: Rows, axes_dp, *, mesh: Mesh):
    turned_np = jnp.matmul(rows.flat()[0], axes_dp, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.with_sharding_constraint(turned_np, replicated(mesh))
