"""K-means: scikit-learn's result from the same start, blobs found, empty clusters, restarts, devices, padding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from maect_jax.errors import ConfigError, DataError
from maect_jax.evaluation.clustering import kmeans
from maect_jax.evaluation.clustering.nearest_centres import members, nearest
from maect_jax.parallel.mesh import make_mesh
from small import one_device

FITS = [kmeans.lloyd, partial(kmeans.mini_batch, batch=128)]
both = pytest.mark.parametrize("fit", FITS, ids=["lloyd", "mini_batch"])


def blobs(rows=600, width=16, centres=6, noise=0.3, seed=0):
    """Rows around far centres, float32, and which centre each is around."""
    rng = np.random.default_rng(seed)
    label_n = rng.integers(0, centres, rows)
    centre_kd = 3 * rng.standard_normal((centres, width))
    return (centre_kd[label_n] + noise * rng.standard_normal((rows, width))).astype(np.float32), label_n


def cloud(rows=403, width=12, seed=1):
    """Rows without clusters, far from the origin: Lloyd's iteration takes long, and rounding shows."""
    return (5 + np.random.default_rng(seed).standard_normal((rows, width))).astype(np.float32)


def inertia(x_nd, assignment_n):
    """Squared distances to the means of the clusters, summed in float64."""
    x_nd = x_nd.astype(np.float64)
    groups = [x_nd[assignment_n == cluster] for cluster in np.unique(assignment_n)]
    return sum(np.square(group - group.mean(axis=0)).sum() for group in groups)


def squared_distances(x_nd, centres_kd):
    return np.square(x_nd[:, None].astype(np.float64) - centres_kd[None]).sum(axis=2)


@pytest.mark.parametrize("devices", [1, 8])
def test_lloyd_from_given_centres_ends_where_scikit_learn_does(devices):
    x_nd = cloud()
    start_kd = x_nd[:9]
    reference = KMeans(9, init=start_kd, n_init=1).fit(x_nd)
    mesh = make_mesh(devices=jax.devices()[:devices])
    found = kmeans.lloyd(mesh, x_nd, 9, centres=start_kd[None])
    np.testing.assert_array_equal(found.assignment[0], reference.labels_)
    np.testing.assert_allclose(found.centres, reference.cluster_centers_, atol=1e-5)
    assert found.inertia[0] == pytest.approx(reference.inertia_, rel=1e-6)
    assert found.iterations[0] == reference.n_iter_ > 5


def test_iterations_end_at_the_maximum():
    x_nd = cloud()
    reference = KMeans(9, init=x_nd[:9], n_init=1, max_iter=3).fit(x_nd)
    found = kmeans.lloyd(one_device(), x_nd, 9, centres=x_nd[None, :9], max_iterations=3)
    np.testing.assert_array_equal(found.assignment[0], reference.labels_)
    assert found.iterations[0] == reference.n_iter_ == 3


@pytest.mark.parametrize("devices", [1, 8])
def test_an_empty_cluster_takes_the_farthest_rows(devices):
    x_nd, _ = blobs(rows=90)
    start_kd = np.concatenate([x_nd[:4], np.full((2, x_nd.shape[1]), 100, np.float32)])
    reference = KMeans(6, init=start_kd, n_init=1).fit(x_nd)
    found = kmeans.lloyd(make_mesh(devices=jax.devices()[:devices]), x_nd, 6, centres=start_kd[None])
    np.testing.assert_array_equal(found.assignment[0], reference.labels_)
    assert len(np.unique(found.assignment[0])) == 6


def test_fewer_distinct_rows_than_clusters_leave_clusters_empty():
    x_nd = np.repeat(np.eye(3, 5, dtype=np.float32), 10, axis=0)
    for fit in FITS:
        found = fit(one_device(), x_nd, 5)
        assert found.inertia[0] == pytest.approx(0, abs=1e-6)
        assert adjusted_rand_score(np.repeat(np.arange(3), 10), found.assignment[0]) == 1


@both
def test_blobs_are_found(fit):
    x_nd, label_n = blobs()
    found = fit(one_device(), x_nd, 6, restarts=3)
    assert adjusted_rand_score(label_n, found.assignment[found.best]) == 1
    assert found.inertia[found.best] == pytest.approx(inertia(x_nd, label_n), rel=1e-2)


@both
def test_inertia_and_assignment_are_those_of_all_rows(fit):
    x_nd = cloud()
    found = fit(one_device(), x_nd, 5, restarts=3)
    squared_nk = squared_distances(x_nd, found.centres)
    np.testing.assert_array_equal(found.assignment[found.best], squared_nk.argmin(axis=1))
    assert found.inertia[found.best] == pytest.approx(squared_nk.min(axis=1).sum(), rel=1e-5)
    assert found.best == found.inertia.argmin()
    assert found.assignment.shape == (3, 403) and found.assignment.dtype == np.int32


@both
def test_one_and_eight_devices_give_one_result(fit):
    x_nd = cloud()
    one = fit(one_device(), x_nd, 5, restarts=3, seed=4)
    eight = fit(make_mesh(), x_nd, 5, restarts=3, seed=4)
    np.testing.assert_array_equal(one.assignment, eight.assignment)
    np.testing.assert_array_equal(one.iterations, eight.iterations)
    np.testing.assert_allclose(one.inertia, eight.inertia, rtol=1e-5)
    np.testing.assert_allclose(one.centres, eight.centres, atol=1e-5)


@both
def test_a_restart_does_not_depend_on_the_others(fit, monkeypatch):
    x_nd = cloud()
    alone = fit(one_device(), x_nd, 5, restarts=3, seed=2)
    monkeypatch.setattr(kmeans, "COLUMNS", 15)  # groups of three restarts, the second not full
    among_others = fit(one_device(), x_nd, 5, restarts=5, seed=2)
    assert len(np.unique(among_others.inertia)) > 1
    np.testing.assert_array_equal(alone.assignment, among_others.assignment[:3])
    np.testing.assert_allclose(alone.inertia, among_others.inertia[:3], rtol=1e-6)
    other_seed = fit(one_device(), x_nd, 5, restarts=3, seed=3)
    assert (alone.assignment != other_seed.assignment).any()


@pytest.mark.parametrize("cpu", [True, False])
def test_the_nearest_centre_is_that_of_lowest_index_among_equals(cpu):
    x_nd, centre_kd = cloud(rows=50), cloud(rows=6, seed=2)
    centre_kd[4] = centre_kd[1]
    index_ns, score_ns = nearest(jnp.asarray(x_nd), jnp.stack([centre_kd, centre_kd[::-1]]), cpu)
    squared_nk = squared_distances(x_nd, centre_kd)
    np.testing.assert_array_equal(index_ns[:, 0], squared_nk.argmin(axis=1))
    np.testing.assert_array_equal(index_ns[:, 1], squared_nk[:, ::-1].argmin(axis=1))
    expected_n = (np.square(x_nd.astype(np.float64)).sum(axis=1) - squared_nk.min(axis=1)) / 2
    np.testing.assert_allclose(score_ns[:, 0], expected_n, rtol=1e-5)


@pytest.mark.parametrize("cpu", [True, False])
def test_members_are_summed_and_counted_without_padding(cpu):
    rng = np.random.default_rng(5)
    x_rd, index_rs = rng.standard_normal((40, 6)).astype(np.float32), rng.integers(0, 4, (40, 3))
    valid_r = np.arange(40) < 33
    x_rd[~valid_r] = 0
    sum_skd, count_sk = members(x_rd, jnp.float32(valid_r), jnp.asarray(index_rs), 5, cpu)
    for s in range(3):
        for cluster in range(5):
            members_r = valid_r & (index_rs[:, s] == cluster)
            assert count_sk[s, cluster] == members_r.sum()
            np.testing.assert_allclose(sum_skd[s, cluster], x_rd[members_r].sum(axis=0, dtype=np.float64), atol=1e-5)


def test_mini_batches_come_near_full_lloyd():
    x_nd, _ = blobs(rows=2000, width=24, centres=20, noise=1.0)
    full = kmeans.lloyd(one_device(), x_nd, 20, restarts=4)
    drawn = kmeans.mini_batch(one_device(), x_nd, 20, restarts=4, batch=512)
    assert drawn.inertia.min() <= 1.03 * full.inertia.min()


def test_large_enough_batches_find_many_clusters_in_wide_features():
    x_nd, label_n = blobs(rows=4000, width=128, centres=200, noise=3.0)
    sizes = (kmeans.batch_size(200), 512)  # with less than three rows a cluster few centres take all rows
    found = [kmeans.mini_batch(one_device(), x_nd, 200, batch=batch, steps=20) for batch in sizes]
    enough, too_few = (adjusted_rand_score(label_n, run.assignment[0]) for run in found)
    assert enough > 0.8 > too_few


def test_seeds_spread_as_well_as_scikit_learns():
    x_nd, _ = blobs(rows=2000, centres=40, noise=0.1)
    ours = kmeans.lloyd(one_device(), x_nd, 40, restarts=5).inertia
    theirs = [KMeans(40, n_init=1, random_state=seed).fit(x_nd).inertia_ for seed in range(5)]
    assert np.median(ours) <= 1.05 * np.median(theirs)


def test_check_may_stop_the_work():
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    for fit in FITS:
        with pytest.raises(Stop):
            fit(one_device(), cloud(), 5, restarts=3, check=stop)


def test_unfit_rows_and_settings_are_told():
    x_nd = cloud(rows=20)
    with pytest.raises(DataError, match="20 rows for 21 clusters"):
        kmeans.lloyd(one_device(), x_nd, 21)
    with pytest.raises(ConfigError, match="restarts = 0"):
        kmeans.mini_batch(one_device(), x_nd, 3, restarts=0)
    with pytest.raises(ConfigError, match=r"centres of shape \(3, 12\), expected \(1, 3, 12\)"):
        kmeans.lloyd(one_device(), x_nd, 3, centres=x_nd[:3])
    x_nd[4, 2] = np.nan
    with pytest.raises(DataError, match="row 4 holds values that are not finite"):
        kmeans.lloyd(one_device(), x_nd, 3)
