"""The clustering protocols: scores, choice of the run, number of clusters, preprocessing, Dogs-15, errors."""

import dataclasses

import jax
import numpy as np
import pytest
from sklearn import metrics
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler, normalize

from maect_jax.errors import ConfigError, DataError
from maect_jax.evaluation.clustering import cluster
from maect_jax.parallel.mesh import make_mesh
from small import one_device

OURS = dataclasses.replace(cluster.PRESETS["ours-cluster"], runs=4, batch=128, steps=20)


def rows(count=240, width=12, noise=0.9, seed=0):
    """Features around the means of the classes 1, 3, 4 and 6."""
    rng = np.random.default_rng(seed)
    label_n = np.array([1, 3, 4, 6])[rng.integers(0, 4, count)]
    mean_cd = rng.standard_normal((7, width))
    return (mean_cd[label_n] + noise * rng.standard_normal((count, width))).astype(np.float32), label_n


@pytest.mark.parametrize("algorithm", ["lloyd", "mini-batch"])
def test_scores_are_those_of_scikit_learn(algorithm):
    x_nd, label_n = rows()
    preset = dataclasses.replace(OURS, algorithm=algorithm)
    found = cluster.evaluate_cluster(one_device(), x_nd, label_n, preset, classes=8)
    unit_nd, of_n = normalize(x_nd.astype(np.float64)), found.assignment
    expected = {
        "nmi": metrics.normalized_mutual_info_score(label_n, of_n),
        "ami": metrics.adjusted_mutual_info_score(label_n, of_n),
        "ari": metrics.adjusted_rand_score(label_n, of_n),
        "silhouette": metrics.silhouette_score(unit_nd, of_n),
        "davies_bouldin": metrics.davies_bouldin_score(unit_nd, of_n),
    }
    for name, value in expected.items():
        assert found.scores[name] == pytest.approx(value, abs=1e-5), name
    np.testing.assert_array_equal(found.correct, found.cluster_class[of_n] == label_n)
    assert found.scores["acc"] == pytest.approx(found.correct.mean())
    assert sorted(found.cluster_class) == [1, 3, 4, 6]
    if algorithm == "lloyd":
        centre_kd = np.stack([unit_nd[of_n == k].mean(axis=0) for k in range(4)])
        assert found.scores["inertia"] == pytest.approx(np.square(unit_nd - centre_kd[of_n]).sum(), rel=1e-3)


def test_the_best_run_is_that_of_lowest_inertia_and_labels_choose_nothing():
    x_nd, label_n = rows(noise=2.5)
    found = cluster.evaluate_cluster(one_device(), x_nd, label_n, OURS, classes=8)
    assert found.best == found.runs["inertia"].argmin()
    assert len(np.unique(found.runs["inertia"])) > 1
    shuffled = cluster.evaluate_cluster(one_device(), x_nd, np.random.default_rng(0).permutation(label_n), OURS, 8)
    assert shuffled.best == found.best
    np.testing.assert_array_equal(shuffled.assignment, found.assignment)
    for name, value in found.runs.items():
        assert value.shape == (4,)
        assert found.scores[name] == value[found.best]
        assert found.mean[name] == pytest.approx(sum(value) / 4)
        assert found.std[name] ** 2 == pytest.approx(sum((value - found.mean[name]) ** 2) / 4)


def test_one_and_eight_devices_give_one_result():
    x_nd, label_n = rows()
    one = cluster.evaluate_cluster(one_device(), x_nd, label_n, OURS, classes=8)
    eight = cluster.evaluate_cluster(make_mesh(), x_nd, label_n, OURS, classes=8)
    np.testing.assert_array_equal(one.assignment, eight.assignment)
    assert one.scores == pytest.approx(eight.scores, rel=1e-5)
    assert one.protocol == eight.protocol


def test_the_algorithm_follows_the_number_of_rows_and_is_told():
    x_nd, label_n = rows()
    for lloyd_rows, algorithm, setting in ((240, "full Lloyd", "max_iterations"), (239, "mini-batch", "batch")):
        preset = dataclasses.replace(OURS, lloyd_rows=lloyd_rows)
        protocol = cluster.evaluate_cluster(one_device(), x_nd, label_n, preset, classes=8, seed=5).protocol
        assert protocol["algorithm"] == algorithm and setting in protocol
        assert (protocol["clusters"], protocol["rows"], protocol["seed"], protocol["runs"]) == (4, 240, 5, 4)


def test_the_batch_follows_the_number_of_clusters_where_it_is_not_set():
    x_nd, label_n = rows()
    preset = dataclasses.replace(OURS, algorithm="mini-batch", batch=None, runs=1, steps=2)
    protocol = cluster.evaluate_cluster(one_device(), x_nd, label_n, preset, classes=8).protocol
    assert (protocol["batch"], protocol["steps"]) == (4096, 2)
    assert protocol["seeding"] == "greedy k-means++, 12288 drawn rows"


@pytest.mark.parametrize("devices", [1, 8])
def test_preprocessing_is_that_of_scikit_learn(devices):
    mesh = make_mesh(devices=jax.devices()[:devices])
    x_nd = rows(count=101)[0] * np.linspace(0.1, 4, 12, dtype=np.float32) + 3
    wide_nd = x_nd.astype(np.float64)
    np.testing.assert_array_equal(cluster.preprocess(mesh, x_nd, "none"), x_nd)
    np.testing.assert_allclose(cluster.preprocess(mesh, x_nd, "l2"), normalize(wide_nd), atol=1e-6)
    standard_nd = StandardScaler().fit_transform(wide_nd) * np.sqrt(100 / 101)  # unbiased deviation
    np.testing.assert_allclose(cluster.preprocess(mesh, x_nd, "standardise"), standard_nd, atol=1e-3)
    ours_np, theirs_np = cluster.preprocess(mesh, x_nd, "pca-5"), normalize(PCA(5).fit_transform(wide_nd))
    np.testing.assert_allclose(ours_np @ ours_np.T, theirs_np @ theirs_np.T, atol=1e-4)  # but for their signs


def test_a_constant_feature_is_standardised_to_zero():
    x_nd = rows()[0]
    x_nd[:, 3] = 7
    found_nd = cluster.preprocess(one_device(), x_nd, "standardise")
    assert np.isfinite(found_nd).all() and not found_nd[:, 3].any()


def test_rows_of_the_wanted_classes_are_selected():
    names = ["n02085936", "n01440764", "n02086646", "n02123045"]
    labels = np.array([3, 0, 2, 1, -1, 0])
    np.testing.assert_array_equal(cluster.select_classes(labels, names, ["n02086646", "n02085936"]), [1, 2, 5])
    with pytest.raises(DataError, match="n02087394, n02088364; the data's classes are named like 'n02085936'"):
        cluster.select_classes(labels, names, ["n02085936", "n02087394", "n02088364"])
    with pytest.raises(DataError, match="n02123045"):
        cluster.select_classes(labels[1:], names, ["n02123045"])


def test_presets_name_their_classes():
    dogs = cluster.PRESETS["imagenet-dogs-15"]
    assert dogs.class_names == cluster.IMAGENET_DOGS_15
    assert dogs.clusters == len(set(dogs.class_names)) == 15
    assert cluster.PRESETS["imagenet-val"].clusters == 1000
    assert cluster.PRESETS["ours-cluster"].runs == 100 and cluster.PRESETS["ours-cluster"].preprocessing == "l2"


def test_rows_of_one_place_have_scores_against_the_classes_only():
    x_nd = np.ones((240, 12), np.float32)
    found = cluster.evaluate_cluster(one_device(), x_nd, np.arange(240) % 4, OURS, classes=4)
    assert (found.scores["acc"], found.scores["ari"], found.scores["inertia"]) == pytest.approx((1 / 4, 0, 0))
    assert np.isnan(found.scores["silhouette"]) and np.isnan(found.scores["davies_bouldin"])


def test_unfit_data_and_settings_are_told():
    x_nd, label_n = rows()

    def run(labels=label_n, **changes):
        cluster.evaluate_cluster(one_device(), x_nd, labels, dataclasses.replace(OURS, **changes), classes=8)

    with pytest.raises(DataError, match=r"clustering labels: values -1\.\.6"):
        run(np.where(np.arange(240) == 5, -1, label_n))
    with pytest.raises(DataError, match="rows of 4 classes, but the preset 'ours-cluster' needs 1000"):
        run(clusters=1000)
    with pytest.raises(DataError, match="all rows are of one class"):
        run(np.zeros(240, int))
    with pytest.raises(ConfigError, match="'whiten' is unknown; it is one of none, l2"):
        run(preprocessing="whiten")
    with pytest.raises(ConfigError, match=r"'pca-13': components must lie in 1\.\.12"):
        run(preprocessing="pca-13")
    with pytest.raises(ConfigError, match="'elkan' is unknown"):
        run(algorithm="elkan")


def test_check_may_stop_the_evaluation():
    def stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        cluster.evaluate_cluster(one_device(), *rows(), OURS, classes=8, check=stop)
