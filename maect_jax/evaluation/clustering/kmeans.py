"""K-means on a device mesh: restarts from k-means++ seeds, full (Lloyd) or on mini-batches.

Restarts run in groups, side by side. What a restart draws is a function of (seed, restart) alone: neither the devices
nor the other restarts change it.

Sources: Lloyd 1982; Arthur and Vassilvitskii 2007 (k-means++); Sculley 2010 (mini-batches). Tolerance, empty clusters
and rarely met centres are treated as in scikit-learn.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maect_jax.errors import ConfigError
from maect_jax.evaluation.clustering.kmeans_seeds import restart_keys, seeds_of_all, seeds_of_drawn
from maect_jax.evaluation.clustering.nearest_centres import (
    Rows,
    load_rows,
    look_at_rows,
    measure,
    members,
    nearest,
    on_cpu,
)
from maect_jax.evaluation.rows import copy
from maect_jax.parallel.mesh import replicated

STEPS = 100  # mini-batches of a restart
COLUMNS = 128  # clusters of a group of restarts: a matrix product gains little from more
STEPS_A_CALL = 10  # between two calls of `check`
RARE = 0.01  # a centre met less often than this share of the most frequent one starts anew


@dataclasses.dataclass(frozen=True)
class KMeansResult:
    """All restarts, and the centres of the best.

    Attributes:
      inertia: sum over all rows of the squared distance to the own centre, float64 [restarts].
      assignment: nearest centre of each row, int32 [restarts, rows].
      iterations: passes over the rows, or mini-batches, of each restart, int32 [restarts].
      best: the restart of lowest inertia.
      centres: float32 [clusters, width], of the best.
    """

    inertia: np.ndarray
    assignment: np.ndarray
    iterations: np.ndarray
    best: int
    centres: np.ndarray


def lloyd(
    mesh: Mesh,
    features,
    clusters: int,
    *,
    restarts: int = 1,
    seed: int = 0,
    max_iterations: int = 300,
    tolerance: float = 1e-4,
    centres=None,
    check: Callable[[], None] = lambda: None,
) -> KMeansResult:
    """K-means by Lloyd's iteration over all rows, until the centres stop moving.

    A restart ends when no row changes its cluster, or when the centres' squared moves sum to at most `tolerance` times
    the mean variance of a feature. An empty cluster takes the row farthest from its centre.

    Args:
      mesh: devices over which the rows are split.
      features: float32 [rows, width]; NumPy or jax array.
      clusters, restarts: numbers of centres, and of runs from seeds of their own.
      centres: initial centres, float32 [restarts, clusters, width], instead of k-means++ over all rows.
      check: called every few iterations; may raise to stop.

    Raises:
      ConfigError: a number below 1, or centres of another shape. DataError: fewer rows than clusters, or not finite.
    """
    _check_numbers(clusters=clusters, restarts=restarts, max_iterations=max_iterations)
    rows, mean_d, variance = load_rows(mesh, features, clusters)
    width = mean_d.size
    if centres is not None and np.shape(centres) != (restarts, clusters, width):
        raise ConfigError(f"k-means: centres of shape {np.shape(centres)}, expected {(restarts, clusters, width)}")

    def fit(restart_s: np.ndarray) -> tuple[jax.Array, np.ndarray]:
        if centres is None:
            start_skd = seeds_of_all(restart_keys(mesh, seed, restart_s), rows, mesh=mesh, clusters=clusters)
        else:
            start_skd = copy(mesh, np.asarray(centres, np.float32)[restart_s] - mean_d)
        state = _start(start_skd, rows, mesh=mesh)
        while not np.asarray(state.done_s).all():
            check()
            state = _iterate(state, rows, tolerance * variance, max_iterations, mesh=mesh, steps=STEPS_A_CALL)
        return state.centres_skd, np.asarray(state.iterations_s)

    return _run(mesh, rows, mean_d, clusters, restarts, fit)


def batch_size(clusters: int) -> int:
    """Rows of a mini-batch that suit a number of clusters: sixteen rows a cluster, but no less than 4096.

    With few rows a cluster the first centres that are means of several rows are nearer to every row than those that are
    still a single row each, and take them all: in wide features most clusters are then never found.
    """
    return max(4096, 16 * clusters)


def mini_batch(
    mesh: Mesh,
    features,
    clusters: int,
    *,
    restarts: int = 1,
    seed: int = 0,
    batch: int | None = None,
    steps: int = STEPS,
    check: Callable[[], None] = lambda: None,
) -> KMeansResult:
    """K-means on `steps` mini-batches: each centre is the mean of all rows of batches that were ever nearest to it.

    Batches have `batch` rows, drawn with replacement; None = `batch_size(clusters)`. Seeds come from k-means++ on
    3 * max(batch, clusters) rows, drawn likewise. Whenever ten rows a cluster have been drawn, centres met less than
    `RARE` times as often as the most frequent one move to rows of the batch. Inertia and assignment are those of all
    rows. Arguments and errors as in `lloyd`.
    """
    batch = batch_size(clusters) if batch is None else batch
    _check_numbers(clusters=clusters, restarts=restarts, batch=batch, steps=steps)
    rows, mean_d, _ = load_rows(mesh, features, clusters)

    def fit(restart_s: np.ndarray) -> tuple[jax.Array, np.ndarray]:
        key_s = restart_keys(mesh, seed, restart_s)
        centres_skd = seeds_of_drawn(key_s, rows, mesh=mesh, clusters=clusters, drawn=3 * max(batch, clusters))
        count_sk = copy(mesh, np.zeros((restart_s.size, clusters), np.float32))
        for first in range(0, steps, STEPS_A_CALL):
            check()
            last = min(first + STEPS_A_CALL, steps)
            centres_skd, count_sk = _descend(key_s, centres_skd, count_sk, rows, first, last, mesh=mesh, batch=batch)
        return centres_skd, np.full(restart_s.size, steps)

    return _run(mesh, rows, mean_d, clusters, restarts, fit)


class _State(NamedTuple):
    """Lloyd's iteration of a group of restarts."""

    centres_skd: jax.Array
    assignment_mrs: jax.Array
    iterations_s: jax.Array
    done_s: jax.Array


def _check_numbers(**numbers: int) -> None:
    problems = [f"k-means: {name} = {number}; must be at least 1" for name, number in numbers.items() if number < 1]
    if problems:
        raise ConfigError(problems)


def _run(mesh: Mesh, rows: Rows, mean_d: np.ndarray, clusters: int, restarts: int, fit) -> KMeansResult:
    """Fits the restarts in groups of one size and looks at all rows with the centres found."""
    group = -(-restarts // -(-restarts // max(1, COLUMNS // clusters)))
    inertia, assignment, iterations, centres = [], [], [], None
    for first in range(0, restarts, group):
        restart_s = np.minimum(np.arange(first, first + group), restarts - 1)
        kept = slice(min(group, restarts - first))  # the last group repeats a restart where it is not full
        centres_skd, iterations_s = fit(restart_s)
        assignment_sn, inertia_sm = (np.asarray(found) for found in measure(rows, centres_skd, mesh=mesh))
        inertia_s = inertia_sm.sum(axis=1, dtype=np.float64)[kept]
        if inertia_s.min() < min(inertia, default=math.inf):
            centres = np.asarray(centres_skd[inertia_s.argmin()]) + mean_d
        inertia += inertia_s.tolist()
        assignment.append(assignment_sn[kept])
        iterations.append(iterations_s[kept])
    count = int(np.asarray(rows.valid_mr.sum()))
    return KMeansResult(
        inertia=np.array(inertia),
        assignment=np.concatenate(assignment)[:, :count],
        iterations=np.concatenate(iterations).astype(np.int32),
        best=int(np.argmin(inertia)),
        centres=centres,
    )


@partial(jax.jit, static_argnames="mesh")
def _start(centres_skd, rows: Rows, *, mesh: Mesh) -> _State:
    restarts = centres_skd.shape[0]
    assignment_mrs = jnp.full((*rows.valid_mr.shape, restarts), -1, jnp.int32)
    assignment_mrs = jax.lax.with_sharding_constraint(
        assignment_mrs, NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    )
    clocks = jnp.zeros(restarts, jnp.int32), jnp.zeros(restarts, bool)
    return _State(centres_skd, assignment_mrs, *jax.lax.with_sharding_constraint(clocks, replicated(mesh)))


@partial(jax.jit, static_argnames=("mesh", "steps"))
def _iterate(state: _State, rows: Rows, tolerance, max_iterations, *, mesh: Mesh, steps: int) -> _State:
    """At most `steps` iterations; a restart that is done keeps its centres."""

    def step(carry):
        number, state = carry
        assignment_mrs, score_mrs, *found = look_at_rows(mesh, rows, state.centres_skd)
        sum_skd, count_sk = jax.lax.cond(
            (found[1] == 0).any(),
            lambda: _fill_empty(rows, assignment_mrs, score_mrs, *found),
            lambda: tuple(found),
        )
        new_skd = jnp.where(count_sk[:, :, None] > 0, sum_skd / jnp.maximum(count_sk, 1)[:, :, None], state.centres_skd)
        new_skd = jnp.where(state.done_s[:, None, None], state.centres_skd, new_skd)
        moved_s = jnp.square(new_skd - state.centres_skd).sum(axis=(1, 2))
        iterations_s = state.iterations_s + ~state.done_s
        same_s = ((assignment_mrs == state.assignment_mrs) | ~rows.valid_mr[:, :, None]).all(axis=(0, 1))
        done_s = state.done_s | same_s | (moved_s <= tolerance) | (iterations_s >= max_iterations)
        return number + 1, _State(new_skd, assignment_mrs, iterations_s, done_s)

    def goes_on(carry):
        number, state = carry
        return (number < steps) & ~state.done_s.all()

    state = jax.lax.while_loop(goes_on, step, (0, state))[1]
    shared = (state.centres_skd, state.iterations_s, state.done_s)
    centres_skd, iterations_s, done_s = jax.lax.with_sharding_constraint(shared, replicated(mesh))
    return _State(centres_skd, state.assignment_mrs, iterations_s, done_s)


def _fill_empty(rows: Rows, assignment_mrs, score_mrs, sum_skd, count_sk):
    """Sums and numbers after each empty cluster has taken one of the rows farthest from their centres."""
    x_nd, valid_n = rows.flat()
    restarts, clusters, _ = sum_skd.shape

    def fill(assignment_n, score_n, sum_kd, count_k):
        squared_n = jnp.where(valid_n, jnp.square(x_nd).sum(axis=1) - 2 * score_n, 0)
        far_k, index_k = jax.lax.top_k(squared_n, clusters)
        empty_k = count_k == 0
        rank_k = jnp.maximum(jnp.cumsum(empty_k) - 1, 0)
        taken_k = index_k[rank_k]
        moves_k = empty_k & (far_k[rank_k] > 0)  # with fewer distinct rows than clusters some stay empty
        x_kd = x_nd[taken_k] * moves_k[:, None]
        left_kd = jax.ops.segment_sum(x_kd, assignment_n[taken_k], clusters)
        left_k = jax.ops.segment_sum(moves_k.astype(jnp.float32), assignment_n[taken_k], clusters)
        return jnp.where(moves_k[:, None], x_kd, sum_kd - left_kd), jnp.where(moves_k, 1, count_k - left_k)

    assignment_ns, score_ns = (found.reshape(-1, restarts) for found in (assignment_mrs, score_mrs))
    return jax.vmap(fill, in_axes=(1, 1, 0, 0))(assignment_ns, score_ns, sum_skd, count_sk)


@partial(jax.jit, static_argnames=("mesh", "batch"))
def _descend(key_s, centres_skd, count_sk, rows: Rows, first, last, *, mesh: Mesh, batch: int):
    """The mini-batches `first` to `last` - 1; `count_sk` is how many rows each centre is the mean of."""
    clusters, cpu = centres_skd.shape[1], on_cpu(mesh)
    x_nd, valid_n = rows.flat()
    total = valid_n.sum()
    every = -(-10 * clusters // batch)

    def step(number, centres_kd, count_k, key):
        index_b = jax.random.randint(jax.random.fold_in(jax.random.wrap_key_data(key), number), (batch,), 0, total)
        x_bd = x_nd[index_b]
        if batch % mesh.size == 0:
            x_bd = jax.lax.with_sharding_constraint(x_bd, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
        nearest_b1 = nearest(x_bd, centres_kd[None], cpu)[0]
        (sum_kd,), (met_k,) = members(x_bd, jnp.ones(batch), nearest_b1, clusters, cpu)
        new_k = count_k + met_k
        centres_kd = jnp.where(
            met_k[:, None] > 0, (centres_kd * count_k[:, None] + sum_kd) / jnp.maximum(new_k, 1)[:, None], centres_kd
        )
        rare_k = new_k < RARE * new_k.max()
        place_k = jnp.cumsum(rare_k) - 1
        moves_k = rare_k & (place_k < batch // 2) & ((number + 1) % every == 0)
        centres_kd = jnp.where(moves_k[:, None], x_bd[jnp.minimum(place_k, batch - 1)], centres_kd)
        return centres_kd, jnp.where(moves_k, jnp.where(rare_k, jnp.inf, new_k).min(), new_k)

    def body(number, carry):
        return jax.vmap(partial(step, number))(*carry, key_s)

    found = jax.lax.fori_loop(first, last, body, (centres_skd, count_sk))
    return jax.lax.with_sharding_constraint(found, replicated(mesh))
