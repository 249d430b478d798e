"""Rates with intervals, and what two models' answers to the same prompts differ by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959964  # of a two-sided 95% interval


@dataclass(frozen=True)
class Rate:
    """A count out of n."""

    count: int
    n: int

    @property
    def value(self) -> float:
        """NaN out of none."""
        return self.count / self.n if self.n else math.nan

    def interval(self, z: float = _Z) -> tuple[float, float]:
        """Wilson score interval (95% by default): ``(p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)``."""
        if not self.n:
            return math.nan, math.nan
        centre = (self.value + z * z / (2 * self.n)) / (1 + z * z / self.n)
        half = z / (1 + z * z / self.n) * math.sqrt(self.value * (1 - self.value) / self.n + z * z / (4 * self.n**2))
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.count} of {self.n}, {self.value:.1%} [{100 * low:.1f}, {100 * high:.1f}]" if self.n else "none"


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Two-sided exact McNemar p-value of two paired sequences: with b and c pairs in which only one is true,
    ``min(1, 2 Σ_{i ≤ min(b, c)} C(b + c, i) / 2^(b + c))``."""
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


@dataclass(frozen=True)
class PairedDifference:
    """What two models' rates on the same prompts differ by.

    Attributes:
        first, second: their rates.
        both, only_first, only_second: of how many prompts it is true for both models, or for one alone.
        p: of the exact McNemar test that the rates are the same.
    """

    first: Rate
    second: Rate
    both: int
    only_first: int
    only_second: int
    p: float

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> PairedDifference:
        pairs = list(zip(first, second, strict=True))
        n = len(pairs)
        counts = pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True))
        return cls(Rate(sum(first), n), Rate(sum(second), n), *counts, mcnemar(first, second))

    @property
    def value(self) -> float:
        """The second rate minus the first."""
        return self.second.value - self.first.value

    def interval(self, z: float = _Z) -> tuple[float, float]:
        """Newcombe's hybrid score interval for paired proportions (95% by default).

        With the rates p₁, p₂ and their Wilson intervals (l, u):
        ``d − √(δ₂² − 2φ δ₂ ε₁ + ε₁²)`` to ``d + √(ε₂² − 2φ ε₂ δ₁ + δ₁²)``, where d = p₂ − p₁, δ = p − l, ε = u − p
        and φ is the correlation of the pairs, corrected for continuity.

        Source: R. G. Newcombe, Statistics in Medicine 17 (1998), 2635–2650, method 10.
        """
        if not self.first.n:
            return math.nan, math.nan
        neither = self.first.n - self.both - self.only_first - self.only_second
        product: float = self.both * neither - self.only_first * self.only_second
        if product > 0:
            product = max(0.0, product - self.first.n / 2)
        sizes = [
            self.first.count,
            self.first.n - self.first.count,
            self.second.count,
            self.second.n - self.second.count,
        ]
        correlation = product / math.sqrt(math.prod(sizes)) if all(sizes) else 0.0
        below, above = [], []
        for rate in (self.first, self.second):
            low, high = rate.interval(z)
            below.append(rate.value - low)
            above.append(high - rate.value)

        def reach(a: float, b: float) -> float:
            return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

        return self.value - reach(below[1], above[0]), self.value + reach(above[1], below[0])

    def __str__(self) -> str:
        low, high = (100 * bound for bound in self.interval())
        return (
            f"{self.first.value:.1%} to {self.second.value:.1%}, {100 * self.value:+.1f} points [{low:+.1f}, "
            f"{high:+.1f}], exact p = {self.p:.2g}"
        )
