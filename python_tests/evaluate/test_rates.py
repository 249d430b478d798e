import math
import random

import pytest

from guardspace_kernels.evaluate.rates import PairedDifference, Rate, mcnemar


def test_wilson_intervals_of_known_counts():
    assert Rate(0, 10).interval() == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert Rate(30, 30).interval() == pytest.approx((0.8865, 1.0), abs=1e-4)
    assert Rate(81, 263).interval() == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert math.isnan(Rate(0, 0).value) and str(Rate(0, 0)) == "none"
    assert str(Rate(30, 30)) == "30 of 30, 100.0% [88.6, 100.0]"


@pytest.mark.parametrize("b, c, p", [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 0.0625), (1, 9, 22 / 1024), (0, 6, 2 / 64)])
def test_mcnemar_counts_the_disagreements_alone(b, c, p):
    first = [True] * b + [False] * c + [True] * 7
    second = [False] * b + [True] * c + [True] * 7
    assert mcnemar(first, second) == pytest.approx(p)
    assert mcnemar(second, first) == pytest.approx(p)


def paired(both, only_first, only_second, neither):
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return PairedDifference.of(first, second)


@pytest.mark.parametrize("cells, low, high", [((36, 12, 2, 0), 0.0569, 0.3404), ((0, 0, 0, 30), -0.1135, 0.1135)])
def test_newcombe_intervals_of_known_tables(cells, low, high):
    one, swapped = paired(*cells), paired(cells[0], cells[2], cells[1], cells[3])
    assert one.interval() == pytest.approx((-high, -low), abs=1e-4)
    assert swapped.interval() == pytest.approx((low, high), abs=1e-4)
    assert one.value == pytest.approx((cells[2] - cells[1]) / sum(cells))


def test_newcombe_intervals_cover_the_true_difference():
    """Of correlated pairs, where the interval of independent rates would be far too wide."""
    rng, covered, widths = random.Random(0), 0, []
    for _ in range(400):
        drawn = rng.choices(range(4), (0.7, 0.12, 0.04, 0.14), k=80)
        one = paired(*(drawn.count(cell) for cell in range(4)))
        low, high = one.interval()
        covered += low <= -0.08 <= high
        widths.append(high - low)
    assert 0.92 <= covered / 400 <= 0.985 and 0.15 < sum(widths) / 400 < 0.2


def test_a_difference_in_words():
    one = paired(40, 10, 0, 10)
    assert str(one) == "83.3% to 66.7%, -16.7 points [-26.9, -6.6], exact p = 0.002"
    assert math.isnan(paired(0, 0, 0, 0).interval()[0])
