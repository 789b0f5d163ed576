"""How well nearest neighbours share a class: precision, mean average precision, purity; and who is taken for whom."""

import numpy as np
from jax.sharding import Mesh

from maect_jax.errors import ConfigError, DataError
from maect_jax.evaluation.knn import CHUNK, neighbors
from maect_jax.evaluation.rows import check_rows

PRECISION_AT = (1, 5, 10)


def retrieval(
    mesh: Mesh,
    bank_features,
    bank_labels,
    query_features=None,
    query_labels=None,
    *,
    classes: int,
    k: int = 10,
    chunk: int = CHUNK,
) -> dict[str, np.ndarray]:
    """What each query retrieves from the bank by cosine similarity; a measure is the mean of its values.

    A neighbour is relevant if its label is the query's. With hit(r) = 1 if the neighbour of rank r is relevant, else 0,
    and precision(r) = (hit(1) + … + hit(r)) / r:

      precision@1, @5, @10   precision(r).
      map@k                  average precision: sum over r = 1..k of hit(r) precision(r), divided by min(k, R), where R
                             is the number of relevant rows in the bank. 1 if as many neighbours are relevant as can
                             be; 0 for a query to which the bank has no relevant row.
      purity@k               share of the k neighbours that are relevant: precision(k), over all ranks.

    Args:
      mesh: devices over which the bank is split.
      bank_features, bank_labels: float32 [bank, width], integers [bank] in 0..classes-1.
      query_features, query_labels: likewise; None = each row of the bank in turn, which then never finds itself.
      classes: number of classes.
      k: rank down to which map and purity look.
      chunk: queries searched at a time.

    Returns:
      name of the measure -> float32 [queries], each in [0, 1].

    Raises:
      ConfigError: k, or the 10 of precision@10, exceeds the rows that can be found.
      DataError: shapes do not fit, or a label is out of range.

    Source: Manning, Raghavan & Schütze (2008), sections 8.4 (average precision, cut at k) and 16.3 (purity).
    """
    bank, bank_labels = check_rows("bank", bank_features, bank_labels, classes)
    alone = query_features is None
    query, query_labels = (bank, bank_labels) if alone else check_rows("query", query_features, query_labels, classes)
    depth, found = max(k, *PRECISION_AT), len(bank) - alone
    if k < 1 or depth > found:
        beside = ", its own left out" if alone else ""
        raise ConfigError(
            f"retrieval: k = {k}, with precision@{PRECISION_AT[-1]}, of a bank of {len(bank)} rows{beside}; "
            f"k must lie in 1..{found}, and at least {PRECISION_AT[-1]} rows are needed"
        )
    index = neighbors(mesh, bank, query, depth + alone, chunk)[1]
    if alone:
        index = _without_own(index)
    relevant = np.bincount(bank_labels, minlength=classes)[query_labels] - alone
    hit = bank_labels[index] == query_labels[:, None]
    precision = hit.cumsum(axis=1) / np.arange(1, depth + 1)
    average = (hit * precision)[:, :k].sum(axis=1) / np.clip(relevant, 1, k)
    measures = {f"precision@{rank}": precision[:, rank - 1] for rank in PRECISION_AT}
    measures |= {f"map@{k}": average, f"purity@{k}": precision[:, k - 1]}
    return {name: values.astype(np.float32) for name, values in measures.items()}


def _without_own(index_nk: np.ndarray) -> np.ndarray:
    """The neighbours of row n other than itself, one fewer; where equal rows took its place, the last is left out."""
    own_nk = index_nk == np.arange(len(index_nk))[:, None]
    own_nk[:, -1] |= ~own_nk.any(axis=1)
    return index_nk[~own_nk].reshape(len(index_nk), -1)


def confusion_matrix(labels, predictions, classes: int) -> np.ndarray:
    """How many pictures of each class (row) were taken for each class (column).

    Args:
      labels, predictions: integers [pictures] in 0..classes-1.
      classes: number of classes.

    Returns:
      int64 [classes, classes].

    Raises:
      DataError: lengths differ, or a value is out of range.
    """
    labels, predictions = np.asarray(labels, np.int64), np.asarray(predictions, np.int64)
    if labels.ndim != 1 or labels.shape != predictions.shape:
        raise DataError(f"confusion matrix: labels of shape {labels.shape}, predictions of shape {predictions.shape}")
    for what, values in (("labels", labels), ("predictions", predictions)):
        if values.size and not 0 <= values.min() <= values.max() < classes:
            raise DataError(
                f"confusion matrix: {what} {values.min()}..{values.max()}, expected 0..{classes - 1}; "
                "leave out rows without label"
            )
    return np.bincount(labels * classes + predictions, minlength=classes**2).reshape(classes, classes)
