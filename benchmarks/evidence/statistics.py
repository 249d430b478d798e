"""Intervals and tests for outcomes that are crossed: the same prompts under several seeds.

Pooling seeds into one McNemar test would count each prompt several times; the bootstrap resamples both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
FEWEST_SEEDS = 3

Key = TypeVar("Key")
Outcomes = NDArray[np.float64]  # (seeds, prompts): 1, 0, or NaN where a prompt does not count


@dataclass(frozen=True)
class Difference:
    """Of two methods' means: estimate, 95% and 90% intervals and two-sided p-value, all by bootstrap.

    Below :data:`FEWEST_SEEDS` seeds there is no p-value (NaN), and nothing is shown. With four seeds the tails are
    still those of four numbers: read the difference of each seed beside them.
    """

    estimate: float
    interval: tuple[float, float]
    interval90: tuple[float, float]
    p: float
    by_seed: tuple[float, ...]

    def not_below(self, margin: float) -> bool:
        """Whether the one-sided test at 5% rejects a loss of `margin` or more."""
        return len(self.by_seed) >= FEWEST_SEEDS and -margin < self.interval90[0]


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

    Of m seeds m − 1 are drawn at a time, which makes the variance between seeds unbiased (Rao and Wu 1988). Raises
    ValueError where the two do not have the same seeds and prompts.
    """
    if a.shape != b.shape:
        raise ValueError(f"a has {a.shape} seeds and prompts, b {b.shape}; compare the same ones")
    rng = np.random.default_rng(seed)
    seeds = rng.integers(len(a), size=(resamples, max(1, len(a) - 1)))
    prompts = a.shape[1]
    counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    drawn = _resampled_means(a, seeds, counts) - _resampled_means(b, seeds, counts)
    low, low90, high90, high = np.quantile(drawn, (0.025, 0.05, 0.95, 0.975)).tolist()
    tail = min((drawn <= 0).mean(), (drawn >= 0).mean())
    p = float(min(1.0, 2 * max(tail, 1 / resamples))) if len(a) >= FEWEST_SEEDS else float("nan")
    by_seed = tuple((np.nanmean(a, axis=1) - np.nanmean(b, axis=1)).tolist())
    return Difference(mean(a) - mean(b), (low, high), (low90, high90), p, by_seed)


def holm(p_values: Mapping[Key, float], family: int) -> dict[Key, float]:
    """Holm's adjustment for `family` comparisons, some of which may still be missing; NaN stays NaN."""
    adjusted, highest = {}, 0.0
    for rank, key in enumerate(sorted(p_values, key=lambda key: (np.isnan(p_values[key]), p_values[key]))):
        if not np.isnan(p_values[key]):
            highest = max(highest, min(1.0, (family - rank) * p_values[key]))
        adjusted[key] = float("nan") if np.isnan(p_values[key]) else highest
    return adjusted
