"""Weighted nearest-neighbour classification of cached features.

As in MAE-CT (Lehner et al. 2023): optional standardisation by the train rows, rows of unit length, the k most
similar of the whole bank vote for their class with weight exp(similarity / temperature).

The bank lies split by rows over the devices; queries pass in chunks of one static shape, so that neither the whole
similarity matrix nor a second compiled program ever exists.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from maect_jax.errors import ConfigError
from maect_jax.evaluation.rows import check_rows, copy, pad_rows, round_up, split
from maect_jax.neighbors.topk import top_k_sharded_bank
from maect_jax.objectives.nnclr import unit
from maect_jax.parallel.mesh import replicated

CHUNK = 256  # queries at a time: 1.3 GB of similarities for the whole of ImageNet on one device


@dataclasses.dataclass(frozen=True)
class KnnPreset:
    """Every setting of a protocol; numbers of different presets do not compare.

    Attributes:
      k: number of neighbours that vote.
      temperature: divisor of the cosine similarity in the vote.
      standardise: subtract the train mean and divide by the unbiased train standard deviation + `epsilon`.
    """

    name: str
    k: int
    temperature: float
    standardise: bool
    epsilon: float


PRESETS = {
    preset.name: preset
    for preset in (
        KnnPreset("maect-knn", k=10, temperature=0.07, standardise=False, epsilon=0.0),
        KnnPreset("maect-knn-std", k=10, temperature=0.07, standardise=True, epsilon=1e-5),
    )
}


def classify(
    mesh: Mesh, bank_features, bank_labels, query_features, preset: KnnPreset, classes: int, chunk: int = CHUNK
) -> np.ndarray:
    """Class of each query by the vote of its k nearest bank rows; a tie goes to the lowest class.

    Args:
      mesh: devices over which the bank is split.
      bank_features, bank_labels: float32 [bank, width], integers [bank] in 0..classes-1; NumPy or jax arrays.
      query_features: float32 [queries, width].
      preset: one of `PRESETS`, or another.
      classes: number of classes.
      chunk: queries searched at a time.

    Returns:
      int32 [queries].

    Raises:
      ConfigError: preset.k exceeds the bank.
      DataError: shapes do not fit, or a label is out of range.
    """
    bank, labels = check_rows("bank", bank_features, bank_labels, classes)
    query, _ = check_rows("query", query_features)
    search = _Search(mesh, bank, preset.k, preset)
    labels = copy(mesh, labels)
    vote = partial(_vote, labels, mesh=mesh, temperature=preset.temperature, classes=classes)
    return np.concatenate([np.asarray(vote(*found))[:rows] for found, rows in search(query, chunk)])


def accuracy(
    mesh: Mesh,
    bank_features,
    bank_labels,
    query_features,
    query_labels,
    preset: KnnPreset,
    classes: int,
    chunk: int = CHUNK,
) -> float:
    """Share of queries, in [0, 1], that `classify` gives their own label; arguments and errors as there."""
    query, labels = check_rows("query", query_features, query_labels, classes)
    return float((classify(mesh, bank_features, bank_labels, query, preset, classes, chunk) == labels).mean())


def neighbors(mesh: Mesh, bank, query, k: int, chunk: int = CHUNK) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar bank rows of each query by cosine, without standardisation.

    Args:
      mesh: devices over which the bank is split.
      bank, query: float32 [bank, width] and [queries, width]; rows need not be of unit length.
      k: 1 <= k <= bank.

    Returns:
      cosine similarity float32 [queries, k] and row index int32 [queries, k], most similar first, ties by lower index.

    Raises:
      ConfigError: k exceeds the bank. DataError: shapes do not fit.
    """
    bank, _ = check_rows("bank", bank)
    query, _ = check_rows("query", query)
    found = [[np.asarray(part)[:rows] for part in parts] for parts, rows in _Search(mesh, bank, k)(query, chunk)]
    similarity, index = zip(*found)
    return np.concatenate(similarity), np.concatenate(index)


class _Search:
    """The bank on the devices, ready for chunks of queries."""

    def __init__(self, mesh: Mesh, bank: np.ndarray, k: int, preset: KnnPreset | None = None):
        rows, self.width = bank.shape
        if not 1 <= k <= rows:
            raise ConfigError(f"k-NN: k = {k} neighbours of a bank of {rows} rows; k must lie in 1..{rows}")
        # every device offers k candidates, so it holds at least k rows; padding is masked in the search
        padded = mesh.size * max(-(-rows // mesh.size), k)
        self.mesh, self.k = mesh, k
        self.valid_q = split(mesh, np.arange(padded) < rows)
        bank_qd = split(mesh, pad_rows(bank, padded))
        standardise = preset is not None and preset.standardise
        self.bank_qd, self.mean_d, self.scale_d = _prepare(
            bank_qd, self.valid_q, mesh=mesh, epsilon=preset.epsilon if standardise else None
        )

    def __call__(self, query: np.ndarray, chunk: int):
        """Yields ((similarity [chunk, k], index [chunk, k]), number of rows that are no padding)."""
        if query.shape[1] != self.width:
            raise ConfigError(f"k-NN: queries of width {query.shape[1]} for a bank of width {self.width}")
        chunk = min(chunk, round_up(query.shape[0], 8))
        for start in range(0, query.shape[0], chunk):
            part = query[start : start + chunk]
            part_bd = copy(self.mesh, pad_rows(part, chunk))
            found = _nearest(part_bd, self.bank_qd, self.valid_q, self.mean_d, self.scale_d, mesh=self.mesh, k=self.k)
            yield found, part.shape[0]


@partial(jax.jit, static_argnames=("mesh", "epsilon"), donate_argnums=0)
def _prepare(bank_qd, valid_q, *, mesh: Mesh, epsilon: float | None):
    """Unit rows of the (standardised) bank, and what standardises the queries: (x - mean) / scale."""
    width = bank_qd.shape[1]
    mean_d, scale_d = jnp.zeros(width), jnp.ones(width)
    if epsilon is not None:
        count = valid_q.sum()

        def mean(x_qd):
            return jnp.where(valid_q[:, None], x_qd, 0).sum(axis=0) / count

        mean_d = mean(bank_qd)
        mean_d += mean(bank_qd - mean_d)  # the rounding of a long float32 sum is large beside a small deviation
        variance_d = mean(jnp.square(bank_qd - mean_d)) * count / jnp.maximum(count - 1, 1)
        scale_d = jnp.sqrt(variance_d) + epsilon
    mean_d, scale_d = jax.lax.with_sharding_constraint((mean_d, scale_d), replicated(mesh))
    return unit((bank_qd - mean_d) / scale_d), mean_d, scale_d


@partial(jax.jit, static_argnames=("mesh", "k"))
def _nearest(query_bd, bank_qd, valid_q, mean_d, scale_d, *, mesh: Mesh, k: int):
    found = top_k_sharded_bank(mesh, unit((query_bd - mean_d) / scale_d), bank_qd, valid_q, k)
    return jax.lax.with_sharding_constraint(found, replicated(mesh))


@partial(jax.jit, static_argnames=("mesh", "temperature", "classes"))
def _vote(label_q, similarity_bk, index_bk, *, mesh: Mesh, temperature: float, classes: int):
    # relative to the nearest: the same winner, and no overflow at a small temperature
    weight_bk = jnp.exp((similarity_bk - similarity_bk[:, :1]) / temperature)
    member_bkc = label_q[index_bk][:, :, None] == jnp.arange(classes)
    votes_bc = jnp.where(member_bkc, weight_bk[:, :, None], 0).sum(axis=1)
    prediction_b = jnp.argmax(votes_bc, axis=1).astype(jnp.int32)
    return jax.lax.with_sharding_constraint(prediction_b, replicated(mesh))
