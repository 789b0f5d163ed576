"""Multinomial logistic regression, several problems at once, solved to a known distance from the optimum.

Objective over W [width, classes], without intercept: mean_i CE(softmax(x_i W), y_i) + l2 / 2 * |W|^2. The solver is
L-BFGS (Nocedal and Wright 2006, algorithm 7.5) with what this objective offers:

  * It is l2-strongly convex, so |gradient|^2 / (2 l2) bounds what it lies above its optimum. A problem is finished, and
    stands still, once this is below `TOLERANCE` of its value; `Solution.gap` tells it.
  * Loss and residual are computed from the differences between the other classes' logits and the own class's. Low-shot
    problems end with nearly every row fitted, where 1 - p would be all rounding; so float32 suffices for a relative gap
    of 1e-6 (published protocols compute in float64 or stop at a gap of 1e-3).
  * Logits are linear in the step, so a line search needs no product with the features: Newton's method along the line.
  * Features are turned into the axes of their second moment, which leaves the objective as it is and makes a good
    first guess of the inverse Hessian a diagonal: 1 / (second moment * mean of p (1 - p) + l2).

Axes: s problems, n rows, d width, e turned width, c classes, m remembered steps; k chunks of t test rows.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maect_jax.evaluation.rows import check_rows, copy, pad_rows, round_up, split
from maect_jax.parallel.mesh import replicated

TOLERANCE = 1e-6  # relative gap to the optimum
MAX_ITERATIONS = 1000
MEMORY = 10  # steps that L-BFGS remembers
LINE_TRIALS = 20  # points that a line search looks at
FLATNESS = 0.1  # a line search ends where the slope is this part of the first
CHUNK = 1024  # test rows at a time

_dot = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class Solution:
    """Where the solver stopped; all but the weights on the host.

    Attributes:
      weights_sdc: float32 [problems, width, classes], on every device.
      objective, gradient_norm: of these weights, float32 [problems].
      gap: bound on (objective - optimum) / objective, float32 [problems].
      iterations: int32 [problems].
    """

    weights_sdc: jax.Array = dataclasses.field(repr=False)
    objective: np.ndarray
    gradient_norm: np.ndarray
    gap: np.ndarray
    iterations: np.ndarray


def solve(mesh: Mesh, features, labels, l2, classes: int, max_iterations: int = MAX_ITERATIONS) -> Solution:
    """Minimises the objective of each problem.

    Args:
      mesh: devices over which the rows are split.
      features, labels: float32 [problems or 1, rows, width] and integers [problems or 1, rows]; 1 = the same rows for
        every problem. Rows with label -1 are padding and count for nothing.
      l2: > 0, float [problems].
      classes: labels are below.

    Returns:
      the solutions; those with `gap` above `TOLERANCE` were left after `max_iterations`, or where float32 ends.
    """
    features, labels = np.asarray(features, np.float32), np.asarray(labels, np.int32)
    missing = round_up(labels.shape[1], mesh.size) - labels.shape[1]
    features_snd = split(mesh, np.pad(features, [(0, 0), (0, missing), (0, 0)]), axis=1)
    label_sn = split(mesh, np.pad(labels, [(0, 0), (0, missing)], constant_values=-1), axis=1)
    l2_s = copy(mesh, np.asarray(l2, np.float32))
    weights_sdc, *rest = _solve(features_snd, label_sn, l2_s, max_iterations, mesh=mesh, classes=classes)
    return Solution(weights_sdc, *map(np.asarray, rest))


def predict(mesh: Mesh, weights_sdc, features) -> np.ndarray:
    """Class of each row by each set of weights: argmax of x W, the lowest of equals.

    Args:
      mesh: devices over which the rows are split.
      weights_sdc: float32 [problems, width, classes].
      features: float32 [rows, width].

    Returns:
      int32 [problems, rows].
    """
    features, _ = check_rows("test", features)
    chunk = round_up(min(CHUNK, len(features)), mesh.size)
    chunks = pad_rows(features, round_up(len(features), chunk)).reshape(-1, chunk, features.shape[1])
    found = np.asarray(_predict(weights_sdc, split(mesh, chunks, axis=1), mesh=mesh))
    return found.transpose(1, 0, 2).reshape(found.shape[1], -1)[:, : len(features)]


class _Problems(NamedTuple):
    """What is to be minimised, in turned features."""

    features_sne: jax.Array
    own_snc: jax.Array  # whether the class is the row's own
    weight_sn: jax.Array  # share of a row in the mean; 0 = padding
    l2_s: jax.Array
    moment_se: jax.Array  # mean square of each feature


class _State(NamedTuple):
    """What L-BFGS knows between two iterations."""

    weights_sec: jax.Array
    logits_snc: jax.Array
    objective_s: jax.Array
    gradient_sec: jax.Array
    spread_s: jax.Array  # mean of p (1 - p)
    scale_s: jax.Array  # of the first guess of the inverse Hessian
    steps_msec: jax.Array
    changes_msec: jax.Array  # of the gradient
    rho_ms: jax.Array  # 1 / <step, change>; 0 = nothing remembered
    active_s: jax.Array
    iterations_s: jax.Array
    iteration: jax.Array


@partial(jax.jit, static_argnames=("mesh", "classes"))
def _solve(features_snd, label_sn, l2_s, max_iterations, *, mesh: Mesh, classes: int):
    """(weights, objective, gradient norm, gap, iterations) of each problem."""
    by_rows = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))
    weight_sn = jnp.where(label_sn >= 0, 1 / (label_sn >= 0).sum(axis=1, keepdims=True), 0)
    axes_de = _axes(features_snd, weight_sn, mesh)
    turned_sne = jax.lax.with_sharding_constraint(_dot(features_snd, axes_de), by_rows)
    moment_se = (weight_sn[:, :, None] * jnp.square(turned_sne)).sum(axis=1)
    problems = _Problems(turned_sne, label_sn[:, :, None] == jnp.arange(classes), weight_sn, l2_s, moment_se)

    zero_sec = jnp.zeros((l2_s.size, axes_de.shape[1], classes))
    logits_snc = jax.lax.with_sharding_constraint(jnp.zeros((l2_s.size, label_sn.shape[1], classes)), by_rows)
    state = _State(
        zero_sec,
        logits_snc,
        *_evaluate(problems, zero_sec, logits_snc),
        scale_s=jnp.ones_like(l2_s),
        steps_msec=jnp.zeros((MEMORY, *zero_sec.shape)),
        changes_msec=jnp.zeros((MEMORY, *zero_sec.shape)),
        rho_ms=jnp.zeros((MEMORY, l2_s.size)),
        active_s=jnp.ones(l2_s.shape, bool),
        iterations_s=jnp.zeros(l2_s.shape, jnp.int32),
        iteration=jnp.int32(0),
    )
    state = jax.lax.while_loop(
        lambda state: state.active_s.any() & (state.iteration < max_iterations), partial(_iterate, problems), state
    )
    # the solver's own numbers carry the rounding of many steps and of the turn; what is told is computed afresh
    weights_sdc = jax.lax.with_sharding_constraint(_dot(axes_de, state.weights_sec), replicated(mesh))
    original = problems._replace(features_sne=features_snd)
    objective_s, gradient_sdc, _ = _evaluate(original, weights_sdc, _dot(features_snd, weights_sdc))
    norm_s = jnp.sqrt(_inner(gradient_sdc, gradient_sdc))
    told = objective_s, norm_s, _gap(objective_s, gradient_sdc, l2_s), state.iterations_s
    return weights_sdc, *jax.lax.with_sharding_constraint(told, replicated(mesh))


def _axes(features_snd, weight_sn, mesh: Mesh) -> jax.Array:
    """Orthonormal axes [d, e] that span all rows, those of the second moment pooled over the problems; e <= d.

    No optimum has a part that is orthogonal to every row, so fewer rows than features need no more axes than rows.
    """
    rows, width = features_snd.shape[0] * features_snd.shape[1], features_snd.shape[2]
    span_de = jnp.eye(width)
    if rows < width:
        span_de = jnp.linalg.qr(features_snd.reshape(rows, width).T)[0]
        features_snd = _dot(features_snd, span_de)
    weighted_sne = weight_sn[:, :, None] * features_snd
    moment_ee = jnp.einsum("snd,sne->de", weighted_sne, features_snd, precision=jax.lax.Precision.HIGHEST)
    turn_ee = jnp.linalg.eigh(jax.lax.with_sharding_constraint(moment_ee, replicated(mesh)))[1]
    return _dot(span_de, turn_ee) if rows < width else turn_ee


def _iterate(problems: _Problems, state: _State) -> _State:
    """A step of every unfinished problem: a product with the features for its logits, another for the gradient."""
    direction_sec = -_times_inverse_hessian(problems, state)
    logits_snc = _dot(problems.features_sne, direction_sec)
    length_s, moved_s = _search(problems, state, direction_sec, logits_snc)
    step_sec = length_s[:, None, None] * direction_sec
    weights_sec, logits_snc = state.weights_sec + step_sec, state.logits_snc + length_s[:, None, None] * logits_snc
    objective_s, gradient_sec, spread_s = _evaluate(problems, weights_sec, logits_snc)

    change_sec = gradient_sec - state.gradient_sec
    agreement_s = _inner(step_sec, change_sec)
    useful_s = agreement_s > 0
    rho_s = jnp.where(useful_s, 1 / jnp.where(useful_s, agreement_s, 1), 0)
    guessed_s = rho_s * _inner(change_sec, _first_guess(problems, spread_s) * change_sec)
    slot = state.iteration % MEMORY
    return _State(
        weights_sec,
        logits_snc,
        objective_s,
        gradient_sec,
        spread_s,
        scale_s=jnp.where(useful_s, 1 / jnp.where(useful_s, guessed_s, 1), state.scale_s),
        steps_msec=state.steps_msec.at[slot].set(step_sec),
        changes_msec=state.changes_msec.at[slot].set(change_sec),
        rho_ms=state.rho_ms.at[slot].set(rho_s),
        active_s=moved_s & (_gap(objective_s, gradient_sec, problems.l2_s) > TOLERANCE),
        iterations_s=state.iterations_s + moved_s,
        iteration=state.iteration + 1,
    )


def _evaluate(problems: _Problems, weights_sec, logits_snc):
    """Objective, gradient, and mean of p (1 - p) over rows and classes."""
    loss_sn, other_snc = _others(problems, logits_snc)
    missed_sn1 = other_snc.sum(axis=2, keepdims=True)
    residual_snc = problems.weight_sn[:, :, None] * jnp.where(problems.own_snc, -missed_sn1, other_snc)
    penalty_s = problems.l2_s / 2 * _inner(weights_sec, weights_sec)
    gradient_sec = _dot(problems.features_sne.mT, residual_snc) + problems.l2_s[:, None, None] * weights_sec
    spread_sn = (missed_sn1 * (1 - missed_sn1))[:, :, 0] + (other_snc * (1 - other_snc)).sum(axis=2)
    return _mean(problems, loss_sn) + penalty_s, gradient_sec, _mean(problems, spread_sn) / logits_snc.shape[2]


def _others(problems: _Problems, logits_snc):
    """Cross-entropy [s, n], and the probability [s, n, c] of every class but the row's own, where it is 0."""
    margin_snc = jnp.where(problems.own_snc, -jnp.inf, logits_snc - _own(problems, logits_snc))
    top_sn1 = jnp.maximum(margin_snc.max(axis=2, keepdims=True), 0)
    exp_snc = jnp.exp(margin_snc - top_sn1)
    rest_sn1 = jnp.expm1(-top_sn1) + exp_snc.sum(axis=2, keepdims=True)
    return (top_sn1 + jnp.log1p(rest_sn1))[:, :, 0], exp_snc / (1 + rest_sn1)


def _own(problems: _Problems, x_snc):
    return jnp.where(problems.own_snc, x_snc, 0).sum(axis=2, keepdims=True)


def _mean(problems: _Problems, x_sn):
    return (problems.weight_sn * x_sn).sum(axis=1)


def _inner(a_sec, b_sec):
    return (a_sec * b_sec).sum(axis=(1, 2))


def _gap(objective_s, gradient_sec, l2_s):
    """Bound on (objective - optimum) / objective, by strong convexity."""
    return _inner(gradient_sec, gradient_sec) / (2 * l2_s * objective_s)


def _search(problems: _Problems, state: _State, direction_sec, direction_snc):
    """Length of the step along a direction, of which the logits are given too, and whether there is one to take.

    Newton's method on the slope, kept between the points where it is known to be negative and positive.
    """
    l2_s = problems.l2_s
    slope_s, square_s = _inner(state.gradient_sec, direction_sec), _inner(direction_sec, direction_sec)
    norm_s, product_s = _inner(state.weights_sec, state.weights_sec), _inner(state.weights_sec, direction_sec)
    margin_snc = direction_snc - _own(problems, direction_snc)

    def look(length_s):
        """Objective, its slope and its curvature at a point of the line."""
        loss_sn, other_snc = _others(problems, state.logits_snc + length_s[:, None, None] * direction_snc)
        first_sn = (other_snc * margin_snc).sum(axis=2)
        second_sn = (other_snc * jnp.square(margin_snc)).sum(axis=2) - jnp.square(first_sn)
        loss_s, first_s, second_s = (_mean(problems, x_sn) for x_sn in (loss_sn, first_sn, second_sn))
        penalty_s = l2_s * (norm_s / 2 + length_s * product_s + jnp.square(length_s) * square_s / 2)
        return loss_s + penalty_s, first_s + l2_s * (product_s + length_s * square_s), second_s + l2_s * square_s

    def body(carry):
        length_s, low_s, high_s, found_s, trial = carry
        objective_s, here_s, curvature_s = look(length_s)
        # the slope is known far better than the objective, whose rounding must not end the search
        lower_s = objective_s <= state.objective_s * (1 + 1e-5)
        found_s |= lower_s & (jnp.abs(here_s) <= FLATNESS * jnp.abs(slope_s))
        low_s, high_s = jnp.where(here_s < 0, length_s, low_s), jnp.where(here_s < 0, high_s, length_s)
        newton_s = length_s - here_s / curvature_s
        bracketed_s = jnp.where(jnp.isinf(high_s), 2 * length_s, (low_s + high_s) / 2)
        next_s = jnp.where((newton_s > low_s) & (newton_s < high_s), newton_s, bracketed_s)
        return jnp.where(found_s, length_s, next_s), low_s, high_s, found_s, trial + 1

    start = jnp.ones_like(l2_s), jnp.zeros_like(l2_s), jnp.full_like(l2_s, jnp.inf), ~state.active_s, 0
    length_s, _, _, found_s, _ = jax.lax.while_loop(
        lambda carry: (~carry[3]).any() & (carry[4] < LINE_TRIALS), body, start
    )
    found_s &= state.active_s & (slope_s < 0)
    return jnp.where(found_s, length_s, 0), found_s


def _first_guess(problems: _Problems, spread_s) -> jax.Array:
    """Diagonal of the inverse Hessian [s, e, 1], up to a factor, were all rows and classes fitted equally well."""
    return 1 / (problems.moment_se * spread_s[:, None] + problems.l2_s[:, None])[:, :, None]


def _times_inverse_hessian(problems: _Problems, state: _State) -> jax.Array:
    """The gradient times L-BFGS's inverse Hessian: the two loops over the remembered steps."""

    def backward(i, carry):
        x_sec, alpha_ms = carry
        slot = (state.iteration - 1 - i) % MEMORY
        alpha_s = state.rho_ms[slot] * _inner(state.steps_msec[slot], x_sec)
        return x_sec - alpha_s[:, None, None] * state.changes_msec[slot], alpha_ms.at[slot].set(alpha_s)

    def forward(i, x_sec):
        slot = (state.iteration + i) % MEMORY
        beta_s = state.rho_ms[slot] * _inner(state.changes_msec[slot], x_sec)
        return x_sec + (alpha_ms[slot] - beta_s)[:, None, None] * state.steps_msec[slot]

    x_sec, alpha_ms = jax.lax.fori_loop(0, MEMORY, backward, (state.gradient_sec, jnp.zeros_like(state.rho_ms)))
    x_sec *= state.scale_s[:, None, None] * _first_guess(problems, state.spread_s)
    return jax.lax.fori_loop(0, MEMORY, forward, x_sec)


@partial(jax.jit, static_argnames="mesh")
def _predict(weights_sdc, features_ktd, *, mesh: Mesh):
    prediction_kst = jax.lax.map(lambda x_td: _dot(x_td, weights_sdc).argmax(axis=2).astype(jnp.int32), features_ktd)
    return jax.lax.with_sharding_constraint(prediction_kst, replicated(mesh))
