"""Intervals and tests for outcomes that are crossed: the same prompts under several seeds.

Pooling seeds into one McNemar test would count each prompt several times; the bootstrap resamples both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000

Outcomes = NDArray[np.float64]  # (seeds, prompts): 1, 0, or NaN where a prompt does not count


@dataclass(frozen=True)
class Difference:
    """Of two methods' means: estimate, 95% interval, 90% interval and two-sided p-value, all by bootstrap."""

    estimate: float
    interval: tuple[float, float]
    narrow: tuple[float, float]
    p: float

    def within(self, margin: float) -> bool:
        """Whether both one-sided tests at 5% reject a difference of `margin` or more (TOST)."""
        return -margin < self.narrow[0] and self.narrow[1] < margin

    def not_below(self, margin: float) -> bool:
        """Whether the one-sided test at 5% rejects a loss of `margin` or more."""
        return -margin < self.narrow[0]


def mean(outcomes: Outcomes) -> float:
    """Mean over seeds of each seed's mean over the prompts that count there."""
    return float(np.nanmean(np.nanmean(outcomes, axis=1)))


def _resampled_means(outcomes: Outcomes, seeds: NDArray[np.int64], counts: NDArray[np.int64]) -> Outcomes:
    """(resamples,) means under `seeds`, (resamples, seeds) indices, and `counts`, (resamples, prompts) times."""
    there = ~np.isnan(outcomes)
    weights = counts.astype(np.float64)
    sums = weights @ np.where(there, outcomes, 0.0).T  # (resamples, seeds)
    sizes = weights @ there.T
    by_seed = sums / np.maximum(sizes, 1)
    return np.take_along_axis(by_seed, seeds, axis=1).mean(axis=1)


def two_way_bootstrap(a: Outcomes, b: Outcomes, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """Difference of means, ``a − b``, with seeds and prompts resampled together, the same for both.

    Raises ValueError where the two do not have the same seeds and prompts.
    """
    if a.shape != b.shape:
        raise ValueError(f"a has {a.shape} seeds and prompts, b {b.shape}; compare the same ones")
    rng = np.random.default_rng(seed)
    seeds = rng.integers(len(a), size=(resamples, len(a)))
    prompts = a.shape[1]
    counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    drawn = _resampled_means(a, seeds, counts) - _resampled_means(b, seeds, counts)
    low, narrow_low, narrow_high, high = np.quantile(drawn, (0.025, 0.05, 0.95, 0.975)).tolist()
    tail = min((drawn <= 0).mean(), (drawn >= 0).mean())
    p = float(min(1.0, 2 * max(tail, 1 / resamples)))
    return Difference(mean(a) - mean(b), (low, high), (narrow_low, narrow_high), p)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjustment of p-values for the number of comparisons."""
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return adjusted
