"""Seeds of k-means: greedy k-means++ (Arthur and Vassilvitskii 2007), many restarts at once."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from maect_jax.evaluation.clustering.nearest_centres import Rows
from maect_jax.evaluation.rows import copy
from maect_jax.parallel.mesh import replicated


def restart_keys(mesh: Mesh, seed: int, restart_s: np.ndarray) -> jax.Array:
    """Key data of each restart, a function of (seed, restart) alone."""
    key_s = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(restart_s.astype(np.uint32))
    return copy(mesh, np.asarray(jax.random.key_data(key_s)))


def _seed(key, x_nd, valid_n, clusters: int) -> jax.Array:
    """Greedy k-means++ of one restart: centres [clusters, width].

    In each round a few candidates are drawn without replacement, a row with probability proportional to its squared
    distance to the nearest centre so far; the one that leaves the smallest sum is taken. A draw is the winner of a race
    in which a row needs an exponential time over its weight: unlike a search in cumulated weights, the winner hardly
    ever depends on how a sum is rounded, hence on the devices.
    """
    candidates = 2 + int(math.log(clusters))  # at most `clusters`, hence never padding
    squared_n = jnp.square(x_nd).sum(axis=1)

    def draw(round_, weight_n, number):
        bits_n = jax.random.bits(jax.random.fold_in(key, round_), weight_n.shape)
        time_n = -jnp.log1p(-(bits_n.astype(jnp.float32) + 0.5) * 2.0**-32) / weight_n
        return jax.lax.top_k(-time_n, number)[1]

    def squared_distance(x_td):
        product_nt = jnp.einsum("nd,td->nt", x_nd, x_td, precision=jax.lax.Precision.HIGHEST)
        squared_nt = squared_n[:, None] - 2 * product_nt + jnp.square(x_td).sum(axis=1)
        return jnp.where(valid_n[:, None], jnp.maximum(squared_nt, 0), 0)

    def add_centre(round_, carry):
        centres_kd, nearest_n = carry
        x_td = x_nd[draw(round_, nearest_n, candidates)]
        nearest_nt = jnp.minimum(nearest_n[:, None], squared_distance(x_td))
        best = nearest_nt.sum(axis=0).argmin()
        return centres_kd.at[round_].set(x_td[best]), nearest_nt[:, best]

    first_1d = x_nd[draw(0, valid_n.astype(jnp.float32), 1)]
    centres_kd = jnp.zeros((clusters, x_nd.shape[1])).at[0].set(first_1d[0])
    return jax.lax.fori_loop(1, clusters, add_centre, (centres_kd, squared_distance(first_1d)[:, 0]))[0]


@partial(jax.jit, static_argnames=("mesh", "clusters"))
def seeds_of_all(key_s, rows: Rows, *, mesh: Mesh, clusters: int) -> jax.Array:
    """Seeds among all rows, [restarts, clusters, width]."""
    centres_skd = jax.vmap(lambda key: _seed(jax.random.wrap_key_data(key), *rows.flat(), clusters))(key_s)
    return jax.lax.with_sharding_constraint(centres_skd, replicated(mesh))


@partial(jax.jit, static_argnames=("mesh", "clusters", "drawn"))
def seeds_of_drawn(key_s, rows: Rows, *, mesh: Mesh, clusters: int, drawn: int) -> jax.Array:
    """Seeds among `drawn` rows, which each restart draws with replacement; [restarts, clusters, width]."""
    x_nd, valid_n = rows.flat()

    def seed(key):
        sample_key, seed_key = jax.random.split(jax.random.wrap_key_data(key))
        x_id = x_nd[jax.random.randint(sample_key, (drawn,), 0, valid_n.sum())]
        return _seed(seed_key, x_id, jnp.ones(drawn, bool), clusters)

    return jax.lax.with_sharding_constraint(jax.vmap(seed)(key_s), replicated(mesh))
