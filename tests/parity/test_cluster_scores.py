"""Clustering scores against the reference values."""

import pytest

import golden
from maect_jax.evaluation.clustering import cluster_scores as scores


@pytest.mark.parametrize("case", range(3))
def test_scores_are_those_of_the_reference(case):
    gold = golden.below(golden.arrays("cluster"), f"case{case}/")
    table_kc = scores.contingency(gold["assign"], gold["labels"], int(gold["n_clusters"]), int(gold["n_classes"]))
    assert scores.accuracy(table_kc) == pytest.approx(gold["acc"], abs=1e-10)
    assert scores.normalized_mutual_information(table_kc) == pytest.approx(gold["nmi"], abs=1e-10)
    assert scores.adjusted_mutual_information(table_kc) == pytest.approx(gold["ami"], abs=1e-10)
    assert scores.adjusted_rand_index(table_kc) == pytest.approx(gold["ari"], abs=1e-10)
    matched_n = scores.matched_classes(table_kc)[gold["assign"]]
    assert (matched_n == gold["labels"]).mean() == pytest.approx(gold["acc"], abs=1e-10)
