"""Weighted nearest-neighbour classification of cached features.

As in MAE-CT (Lehner et al. 2023): optional standardisation by the train rows, rows of unit length, the k most
similar of the whole bank vote for their class with weight exp(similarity / temperature).

The bank lies split by rows over the devices; queries pass in chunks of one static shape, which a device compares in
tiles with blocks of its rows. So neither the whole similarity matrix nor a second compiled program ever exists.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from maect_jax.errors import ConfigError
from maect_jax.evaluation.rows import check_rows, copy, pad_rows, round_up, split
from maect_jax.neighbors.topk import GROUP, top_k_sharded_bank
from maect_jax.objectives.nnclr import unit
from maect_jax.parallel.mesh import replicated

CHUNK = 2048  # queries that travel to the devices at a time


@dataclasses.dataclass(frozen=True)
class KnnPreset:
    """Every setting of a protocol; numbers of different presets do not compare.

    Attributes:
      k: number of neighbours that vote.
      temperature: divisor of the cosine similarity in the vote.
      standardise: subtract the train mean and divide by the unbiased train standard deviation + `epsilon`.
      feature: what the protocol is defined on: 'configured' (the model's own pooling after the final norm), 'cls' (CLS
        token after the final norm) or 'cls@last' (CLS token of the last block, before the final norm).

    Source: MAE-CT (Lehner et al. 2023), MIM-Refiner (Alkin et al. 2024), DINOv2 (Oquab et al. 2023) and Lightly.
    """

    name: str
    k: int
    temperature: float
    standardise: bool
    epsilon: float
    feature: str


def _plain(name: str, k: int, feature: str) -> KnnPreset:
    return KnnPreset(name, k, temperature=0.07, standardise=False, epsilon=0.0, feature=feature)


def _standardised(name: str, k: int, epsilon: float, feature: str) -> KnnPreset:
    return KnnPreset(name, k, temperature=0.07, standardise=True, epsilon=epsilon, feature=feature)


PRESETS = {
    preset.name: preset
    for preset in (
        _plain("maect-knn", 10, "configured"),
        _standardised("maect-knn-std", 10, 1e-5, "configured"),
        _standardised("mimrefiner-knn", 10, 1e-6, "cls@last"),
        _standardised("mimrefiner-knn-mean", 10, 1e-6, "mean@last"),
        _standardised("mimrefiner-hub-knn", 20, 1e-6, "cls"),
        _plain("dinov2-knn-10", 10, "cls"),
        _plain("dinov2-knn-20", 20, "cls"),
        _plain("dinov2-knn-100", 100, "cls"),
        _plain("dinov2-knn-200", 200, "cls"),
        _plain("lightly-knn", 200, "configured"),
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
    return classify_many(mesh, bank_features, bank_labels, query_features, [preset], classes, chunk)[0]


def classify_many(
    mesh: Mesh,
    bank_features,
    bank_labels,
    query_features,
    presets: Sequence[KnnPreset],
    classes: int,
    chunk: int = CHUNK,
) -> list[np.ndarray]:
    """What `classify` gives for each preset, in their order, with one search for all that standardise alike.

    Arguments and errors as there; the features are the same for all presets, whatever their `feature`.
    """
    bank, labels = check_rows("bank", bank_features, bank_labels, classes)
    query, _ = check_rows("query", query_features)
    for preset in presets:
        _check_k(f"k-NN, preset '{preset.name}'", preset.k, bank)
    label_q = copy(mesh, labels)
    predictions: dict[int, np.ndarray] = {}
    for epsilon in dict.fromkeys(map(_epsilon, presets)):  # in one order on every host
        alike = [i for i, preset in enumerate(presets) if _epsilon(preset) == epsilon]
        protocols = tuple((presets[i].k, presets[i].temperature) for i in alike)
        vote = partial(_vote, label_q, mesh=mesh, protocols=protocols, classes=classes)
        most = max(k for k, _ in protocols)
        predictions |= zip(alike, _Search(mesh, bank, most, epsilon)(query, chunk, vote))
    return [predictions[i] for i in range(len(presets))]


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
    _check_k("k-NN", k, bank)
    return _Search(mesh, bank, k)(query, chunk, lambda *found: found)


def _check_k(what: str, k: int, bank: np.ndarray) -> None:
    rows = bank.shape[0]
    if not 1 <= k <= rows:
        raise ConfigError(f"{what}: k = {k} neighbours of a bank of {rows} rows; k must lie in 1..{rows}")


def _epsilon(preset: KnnPreset) -> float | None:
    """What the search itself must know of a preset; None where nothing is standardised."""
    return preset.epsilon if preset.standardise else None


def padded_rows(rows: int, devices: int, k: int) -> int:
    """Length of a bank that the devices share; what is more than `rows` is masked in the search.

    Every device offers k candidates, so it holds at least k rows; many rows make up whole groups of the search.
    """
    each = max(-(-rows // devices), k)
    return devices * (each if each < GROUP else round_up(each, GROUP))


class _Search:
    """The bank on the devices, ready for chunks of queries."""

    def __init__(self, mesh: Mesh, bank: np.ndarray, k: int, epsilon: float | None = None):
        rows, self.width = bank.shape
        padded = padded_rows(rows, mesh.size, k)
        self.mesh, self.k = mesh, k
        self.valid_q = split(mesh, np.arange(padded) < rows)
        bank_qd = split(mesh, pad_rows(bank, padded))
        self.bank_qd, self.mean_d, self.scale_d = _prepare(bank_qd, self.valid_q, mesh=mesh, epsilon=epsilon)

    def __call__(self, query: np.ndarray, chunk: int, then: Callable[..., tuple]) -> tuple[np.ndarray, ...]:
        """`then` (similarity [chunk, k], index [chunk, k]) -> arrays [chunk, …], as one array of all queries each."""
        if query.shape[1] != self.width:
            raise ConfigError(f"k-NN: queries of width {query.shape[1]} for a bank of width {self.width}")
        rows = query.shape[0]
        chunk = min(chunk, round_up(rows, 8))
        found: list[tuple] = []
        for start in range(0, rows, chunk):
            part_bd = copy(self.mesh, pad_rows(query[start : start + chunk], chunk))
            near = _nearest(part_bd, self.bank_qd, self.valid_q, self.mean_d, self.scale_d, mesh=self.mesh, k=self.k)
            found.append(then(*near))
            found[-2:-1] = jax.device_get(found[-2:-1])  # while the devices search for the newest
        return tuple(np.concatenate(parts)[:rows] for parts in zip(*jax.device_get(found)))


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


@partial(jax.jit, static_argnames=("mesh", "protocols", "classes"))
def _vote(label_q, similarity_bk, index_bk, *, mesh: Mesh, protocols: tuple[tuple[int, float], ...], classes: int):
    """Winner int32 [batch] for each (k, temperature), of the same neighbours, nearest first."""
    label_bk = label_q[index_bk]
    # relative to the nearest: the same winner, and no overflow at a small temperature
    lag_bk = similarity_bk - similarity_bk[:, :1]

    def winner(k: int, temperature: float):
        votes_bc = jax.vmap(lambda label_k, weight_k: jnp.zeros(classes).at[label_k].add(weight_k))(
            label_bk[:, :k], jnp.exp(lag_bk[:, :k] / temperature)
        )
        return jnp.argmax(votes_bc, axis=1).astype(jnp.int32)

    winners = tuple(winner(*protocol) for protocol in protocols)
    return jax.lax.with_sharding_constraint(winners, replicated(mesh))
