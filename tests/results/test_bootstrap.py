"""Bootstrap intervals against the binomial and normal ones they approach."""

import numpy as np
import pytest
from scipy import stats

from maect_jax.results.bootstrap import interval


@pytest.mark.parametrize(("n", "share"), [(100, 0.3), (5000, 0.9)])
def test_interval_of_right_and_wrong_is_the_binomial_one(n, share):
    values = np.arange(n) < share * n
    low, high = interval(values)
    exact = stats.binom.ppf([0.025, 0.975], n, share) / n
    np.testing.assert_allclose([low, high], exact, atol=1.5 / np.sqrt(n) / 10)


def test_interval_of_many_values_is_near_the_normal_one():
    values = np.random.default_rng(1).normal(3.0, 2.0, 2000)
    low, high = interval(values)
    half = 1.96 * values.std() / np.sqrt(2000)
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.1 * half)


def test_interval_of_equal_values_has_no_width():
    assert interval(np.ones(7)) == (1.0, 1.0)


def test_interval_does_not_depend_on_the_order_of_pictures():
    values = np.random.default_rng(2).random(50) < 0.4
    assert interval(values) == interval(values[::-1])
