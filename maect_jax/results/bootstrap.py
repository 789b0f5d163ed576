"""How far a number could have been off with other test pictures."""

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
_CHUNK = 2**22  # draws at a time


def interval(values_n: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean, at 95 %.

    Args:
      values_n: what each test picture contributes: 0 or 1 where it is right or wrong, or any number; [n].
      seed: of the resampling.

    Returns:
      (low, high) in the units of `values_n`.

    Source: Efron & Tibshirani (1993), chapter 13.
    """
    values_n = np.asarray(values_n, np.float64)
    rng, n = np.random.default_rng(seed), len(values_n)
    distinct, count = np.unique(values_n, return_counts=True)
    if len(distinct) <= 64:  # drawing how often each value occurs is drawing the pictures, and quick for any n
        means = rng.multinomial(n, count / n, RESAMPLES) @ distinct / n
    else:
        rows = max(1, _CHUNK // n)
        sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
        means = np.concatenate([values_n[rng.integers(0, n, (size, n))].mean(axis=1) for size in sizes])
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)
