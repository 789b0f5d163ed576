"""Scores of a clustering: against the classes, from the table of counts, and of the clusters alone, from the features.

The first are float64 on the host and follow the definitions of Hubert and Arabie 1985 (ARI) and Vinh, Epps and Bailey
2010 (NMI and AMI with the arithmetic mean of the entropies), as scikit-learn does. The silhouette (Rousseeuw 1987) is
computed on the devices.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import pdist, squareform
from scipy.special import gammaln

from maect_jax.errors import DataError
from maect_jax.evaluation.clustering.nearest_centres import members, on_cpu
from maect_jax.evaluation.rows import check_rows, copy, pad_rows, round_up, split
from maect_jax.parallel.mesh import replicated

SILHOUETTE_ROWS = 50_000
CHUNK = 256  # rows of the silhouette at a time, a device: 51 MB of distances


def contingency(assignment, labels, clusters: int, classes: int) -> np.ndarray:
    """How many rows of each cluster are of each class, int64 [clusters, classes].

    Args:
      assignment: integers [rows] in 0..clusters-1.
      labels: integers [rows] in 0..classes-1.

    Raises:
      DataError: lengths differ, or a value is out of range.
    """
    assignment, labels = np.asarray(assignment), np.asarray(labels)
    if assignment.shape != labels.shape or assignment.ndim != 1 or not labels.size:
        raise DataError(f"clusters and labels: shapes {assignment.shape} and {labels.shape}, expected equal [rows]")
    for what, value, number in (("clusters", assignment, clusters), ("labels", labels, classes)):
        if value.min() < 0 or value.max() >= number:
            found = f"{what}: values {value.min()}..{value.max()}"
            raise DataError(f"{found}, expected 0..{number - 1}; leave out rows without a value")
    joint = assignment.astype(np.int64) * classes + labels
    return np.bincount(joint, minlength=clusters * classes).reshape(clusters, classes)


def matched_classes(table_kc: np.ndarray) -> np.ndarray:
    """Class of each cluster, int32 [clusters], in the one-to-one match that most rows agree with; -1 = none is left."""
    cluster, cls = linear_sum_assignment(table_kc, maximize=True)
    matched_k = np.full(table_kc.shape[0], -1, np.int32)
    matched_k[cluster] = cls
    return matched_k


def accuracy(table_kc: np.ndarray) -> float:
    """Share of rows, in [0, 1], whose cluster is matched with their class; what is left unmatched is wrong."""
    return float(table_kc[linear_sum_assignment(table_kc, maximize=True)].sum() / table_kc.sum())


def normalized_mutual_information(table_kc: np.ndarray) -> float:
    """Mutual information over the mean of both entropies, in [0, 1]; 1 where neither clusters nor classes divide."""
    mean = (_entropy(table_kc.sum(axis=1)) + _entropy(table_kc.sum(axis=0))) / 2
    return _mutual_information(table_kc) / mean if mean > 0 else 1.0


def adjusted_mutual_information(table_kc: np.ndarray) -> float:
    """As the normalised one, less what clusters and classes of these sizes share by chance: 0 expected, at most 1."""
    size_k, size_c = table_kc.sum(axis=1), table_kc.sum(axis=0)
    mean = (_entropy(size_k) + _entropy(size_c)) / 2
    if mean == 0:
        return 1.0
    if np.count_nonzero(size_k) == 1 or np.count_nonzero(size_c) == 1:
        return 0.0
    by_chance = expected_mutual_information(size_k, size_c)

    def away_from_zero(value):  # a row a cluster and a class leave 0 / 0 but for rounding
        return np.copysign(max(abs(value), np.finfo(np.float64).eps), value)

    return float(away_from_zero(_mutual_information(table_kc) - by_chance) / away_from_zero(mean - by_chance))


def adjusted_rand_index(table_kc: np.ndarray) -> float:
    """Agreement on pairs of rows, less that by chance: 0 expected, at most 1."""
    rows = int(table_kc.sum())
    together = int(np.square(table_kc).sum()) - rows  # ordered pairs of one cluster and one class
    in_cluster, in_class = (int(np.square(table_kc.sum(axis=axis)).sum()) - rows for axis in (1, 0))
    if together == in_cluster == in_class:
        return 1.0
    # Python's integers: the products overflow 64 bits from about 50,000 rows
    pairs = rows * (rows - 1)
    return (together * pairs - in_cluster * in_class) / ((in_cluster + in_class) * pairs / 2 - in_cluster * in_class)


def expected_mutual_information(size_k, size_c) -> float:
    """Mean mutual information, in nats, of two random partitions with clusters of the given sizes.

    Vinh, Epps and Bailey 2010, equation 24a: a sum over pairs of clusters and the number of rows they share, which is
    hypergeometric. Pairs of equal sizes have equal terms, and there are few different sizes.
    """
    size_k, size_c = np.asarray(size_k, np.int64), np.asarray(size_c, np.int64)
    rows = int(size_k.sum())
    log_factorial = gammaln(np.arange(rows + 1) + 1.0)
    b_b, times_b = np.unique(size_c[size_c > 0], return_counts=True)
    b_1b, total = b_b[None], 0.0
    for a, times in zip(*np.unique(size_k[size_k > 0], return_counts=True)):
        shared_s1 = np.arange(1, min(a, b_b[-1]) + 1)[:, None]
        possible_sb = (shared_s1 <= b_1b) & (shared_s1 >= a + b_1b - rows)
        left_sb, rest_sb = np.maximum(b_1b - shared_s1, 0), np.maximum(rows - a - b_1b + shared_s1, 0)
        log_ways_1b = log_factorial[a] + log_factorial[rows - a] + log_factorial[b_1b] + log_factorial[rows - b_1b]
        log_ways_s1 = log_factorial[shared_s1] + log_factorial[a - shared_s1] + log_factorial[rows]
        log_probability_sb = log_ways_1b - log_ways_s1 - log_factorial[left_sb] - log_factorial[rest_sb]
        term_sb = shared_s1 / rows * np.log(rows * shared_s1 / (a * b_1b)) * np.exp(log_probability_sb)
        total += times * (np.where(possible_sb, term_sb, 0).sum(axis=0) * times_b).sum()
    return float(total)


def _entropy(size: np.ndarray) -> float:
    """Nats."""
    share = size[size > 0] / size.sum()
    return float(-(share * np.log(share)).sum())


def _mutual_information(table_kc: np.ndarray) -> float:
    """Nats, at least 0."""
    cluster, cls = np.nonzero(table_kc)
    count, rows = table_kc[cluster, cls].astype(np.float64), table_kc.sum()
    log_ratio = np.log(count) - np.log(table_kc.sum(axis=1)[cluster]) - np.log(table_kc.sum(axis=0)[cls])
    return max(float((count / rows * (log_ratio + np.log(rows))).sum()), 0.0)


def davies_bouldin(features, assignment) -> float:
    """Davies-Bouldin index (1979), float64: lower is better, 0 at best; NaN with fewer than two clusters in use.

    Mean over the clusters of their worst ratio of (mean distance to the own mean, of both) to the means' distance.
    """
    features, assignment = np.asarray(features, np.float32), np.asarray(assignment)
    groups = [np.flatnonzero(assignment == cluster) for cluster in np.unique(assignment)]
    if len(groups) < 2:
        return float("nan")
    mean_kd = np.stack([features[group].mean(axis=0, dtype=np.float64) for group in groups])
    spread_k = np.array(
        [np.linalg.norm(features[group] - mean_d, axis=1).mean() for group, mean_d in zip(groups, mean_kd)]
    )
    distance_kk = squareform(pdist(mean_kd))
    distance_kk[distance_kk == 0] = np.inf  # among them that of each to itself
    return float(((spread_k[:, None] + spread_k) / distance_kk).max(axis=1).mean())


def silhouette(
    mesh: Mesh,
    features,
    assignment,
    *,
    rows: int = SILHOUETTE_ROWS,
    seed: int = 0,
    check: Callable[[], None] = lambda: None,
) -> float:
    """Mean silhouette coefficient by Euclidean distance, in [-1, 1]; NaN with fewer than two clusters in use.

    Args:
      features, assignment: float32 [n, width], integers [n] from 0.
      rows: at most so many, drawn by the seed, both have their coefficient taken and are compared with.
      check: called now and then; may raise to stop.

    Raises:
      DataError: shapes do not fit.
    """
    features, assignment = check_rows("clustering", features, assignment, int(np.max(assignment, initial=0)) + 1)
    if assignment.size > rows:
        sample = np.sort(np.random.default_rng(seed).choice(assignment.size, rows, replace=False))
        features, assignment = features[sample], assignment[sample]
    used, assignment = np.unique(assignment, return_inverse=True)
    if used.size < 2:
        return float("nan")
    count = assignment.size
    features = features - features.mean(axis=0)  # distances by inner products lose least of their digits there
    bank_nd, cluster_n = copy(mesh, features), copy(mesh, assignment.astype(np.int32))
    chunk = mesh.size * min(CHUNK, round_up(-(-count // mesh.size), 8))
    total = 0.0
    for start in range(0, count, chunk):
        check()
        row_b = np.arange(start, start + chunk)
        x_bd = split(mesh, pad_rows(features[start : start + chunk], chunk))
        coefficient_b = _silhouette(
            x_bd, split(mesh, row_b.astype(np.int32)), bank_nd, cluster_n, mesh=mesh, clusters=used.size
        )
        total += np.asarray(coefficient_b)[: count - start].sum(dtype=np.float64)
    return float(total / count)


@partial(jax.jit, static_argnames=("mesh", "clusters"))
def _silhouette(x_bd, row_b, bank_nd, cluster_n, *, mesh: Mesh, clusters: int):
    """Coefficients of the rows `row_b` of the bank."""
    product_nb = jnp.matmul(bank_nd, x_bd.T, precision=jax.lax.Precision.HIGHEST)
    squared_nb = jnp.square(bank_nd).sum(axis=1)[:, None] + jnp.square(x_bd).sum(axis=1) - 2 * product_nb
    self_nb = jnp.arange(cluster_n.size)[:, None] == row_b
    distance_nb = jnp.where(self_nb, 0, jnp.sqrt(jnp.maximum(squared_nb, 0)))
    sums = members(distance_nb, jnp.ones(cluster_n.size), cluster_n[:, None], clusters, on_cpu(mesh))
    sum_bk, size_k = sums[0][0].T, sums[1][0]
    own_bk = cluster_n[row_b][:, None] == jnp.arange(clusters)
    others_b = (own_bk * (size_k - 1)).sum(axis=1)
    inside_b = (own_bk * sum_bk).sum(axis=1) / jnp.maximum(others_b, 1)
    outside_b = jnp.where(own_bk, jnp.inf, sum_bk / size_k).min(axis=1)
    larger_b = jnp.maximum(inside_b, outside_b)
    coefficient_b = jnp.where((others_b > 0) & (larger_b > 0), (outside_b - inside_b) / larger_b, 0)
    return jax.lax.with_sharding_constraint(coefficient_b, replicated(mesh))
