"""The pictures of an evaluation, as `figures/<what>_<stage>.npz` for the report: plain arrays, nothing pickled."""

import os

import numpy as np
from etils import epath
from sklearn.manifold import TSNE

from maect_jax.data.host.crops import central_crop
from maect_jax.data.sources.base import Source
from maect_jax.evaluation import knn
from maect_jax.evaluation.features import Features
from maect_jax.evaluation.pictures import choose_queries
from maect_jax.evaluation.task import Task
from maect_jax.evaluation.views import attention
from maect_jax.objectives.nnclr import unit

QUERIES, SHOWN = 12, 6  # neighbours
CLUSTERS, MEMBERS = 20, 10
POINTS = 1500  # of the scatter
ATTENDED = 6


def save(path: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an npz file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    temporary.replace(path)


def _path(task: Task, what: str) -> epath.Path:
    return task.folder / "figures" / f"{what}_{task.stage_folder}.npz"


def _classes(task: Task) -> np.ndarray:
    return np.asarray(task.classes, dtype=str)


def _pictures(task: Task, source: Source, ids: np.ndarray) -> np.ndarray:
    """uint8 [*ids.shape, size, size, c], cropped as the encoder sees them."""
    size, ratio = task.weights.encoder.image_size, task.weights.resize_ratio
    shown = np.stack([central_crop(source.image(int(i)), size, ratio) for i in ids.ravel()])
    return shown.reshape(*ids.shape, *shown.shape[1:])


def save_neighbors(task: Task, bank: Features, query: Features) -> None:
    """The same queries for every stage and their nearest training pictures.

    Where the queries are training pictures themselves (no labelled test set), a picture is not its own neighbour.
    """
    chosen = choose_queries(query.labels, QUERIES)
    own = task.test is task.train
    k = min(SHOWN + own, len(bank.labels))
    feature = task.weights.pooling
    similarity, index = knn.neighbors(task.mesh, bank.vectors(feature), query.vectors(feature)[chosen], k)
    if own:
        kept = np.argsort(bank.ids[index] == query.ids[chosen][:, None], axis=1, kind="stable")[:, : k - 1]
        similarity, index = np.take_along_axis(similarity, kept, 1), np.take_along_axis(index, kept, 1)
    arrays = {
        "query": _pictures(task, task.test, query.ids[chosen]),
        "neighbor": _pictures(task, task.train, bank.ids[index]),
        "query_label": query.labels[chosen],
        "neighbor_label": bank.labels[index],
        "similarity": similarity,
        "classes": _classes(task),
    }
    save(_path(task, "neighbors"), arrays)


def save_clusters(task: Task, features: Features, assignment_n: np.ndarray, cluster_class: np.ndarray) -> None:
    """The largest clusters of the test pictures, the pictures nearest their centre first.

    Args:
      assignment_n: int [n], cluster of each row of `features`.
      cluster_class: int [clusters], the class that the optimal assignment gives each cluster; -1 = none.
    """
    x_nd = np.asarray(unit(features.vectors(task.weights.pooling)))
    size = np.bincount(assignment_n, minlength=len(cluster_class))
    shown = np.argsort(-size, kind="stable")[:CLUSTERS]
    shown = shown[size[shown] > 0]
    rows = np.zeros((len(shown), MEMBERS), np.int64)
    valid, purity = np.zeros(rows.shape, bool), np.zeros(len(shown))
    for i, cluster in enumerate(shown):
        members = np.flatnonzero(assignment_n == cluster)
        nearest = members[np.argsort(-(x_nd[members] @ x_nd[members].mean(axis=0)), kind="stable")][:MEMBERS]
        rows[i, : len(nearest)], valid[i, : len(nearest)] = nearest, True
        purity[i] = np.bincount(features.labels[members]).max() / len(members)
    arrays = {
        "picture": _pictures(task, task.test, features.ids[rows]),
        "valid": valid,
        "label": features.labels[rows],
        "cluster_class": np.asarray(cluster_class)[shown],
        "size": size[shown],
        "purity": purity,
        "classes": _classes(task),
    }
    save(_path(task, "clusters"), arrays)


def save_scatter(task: Task, features: Features) -> None:
    """A plane in which neighbours stay neighbours: t-SNE of at most 1,500 test pictures, cosine distance.

    Source: van der Maaten and Hinton (2008); scikit-learn's implementation.
    """
    n = len(features.labels)
    chosen = np.sort(np.random.default_rng(0).permutation(n)[:POINTS])
    if len(chosen) < 10:
        return
    x = np.asarray(unit(features.vectors(task.weights.pooling)[chosen]))
    settings = {"init": "pca", "perplexity": min(30, len(chosen) / 4), "random_state": 0, "max_iter": 500}
    xy = TSNE(**settings).fit_transform(x).astype(np.float32)
    save(_path(task, "scatter"), {"xy": xy, "label": features.labels[chosen], "classes": _classes(task)})


def save_attention(task: Task, features: Features) -> None:
    """Where the CLS token of the last block looks, head by head, in one test picture of each of six classes."""
    chosen = choose_queries(features.labels, ATTENDED)
    pictures = _pictures(task, task.test, features.ids[chosen])
    arrays = {
        "picture": pictures,
        "attention": attention(task, pictures),
        "label": features.labels[chosen],
        "classes": _classes(task),
    }
    save(_path(task, "attention"), arrays)


def save_confusion(task: Task, matrix_cc: np.ndarray, source: str) -> None:
    """Which classes are taken for which: int [true, predicted]; `source` names the evaluation."""
    arrays = {"matrix": matrix_cc, "classes": _classes(task), "source": np.asarray(source)}
    save(_path(task, "confusion"), arrays)
