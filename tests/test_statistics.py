"""plots/statistics.py against cases worked by hand and plain enumeration."""

import itertools
import math

import numpy as np
import pytest

from plots.statistics import (
    compare_paired,
    first_reach,
    holm,
    reach_ratio,
    seed_band,
    sign_flip_test,
    two_level_interval,
)


def half_width(values):
    _, low, high = two_level_interval(values)
    return (high - low) / 2


def test_interval_of_one_seed_is_over_prompts_and_of_one_prompt_over_seeds():
    x = np.random.default_rng(1).normal(size=200)
    expected = 1.96 * x.std() / math.sqrt(200)
    assert half_width(x[None, :]) == pytest.approx(expected, rel=0.1) == half_width(x[:, None])
    assert two_level_interval(np.full((3, 4), 0.7)) == pytest.approx((0.7, 0.7, 0.7), abs=1e-12)
    assert two_level_interval(x[None, :])[0] == pytest.approx(x.mean())


def test_prompts_are_crossed_with_seeds():
    """A hard prompt is hard for every seed: ten seeds do not make the prompts' part smaller, as prompts drawn
    apart for each seed would.
    """
    x = np.random.default_rng(2).normal(size=100)
    assert half_width(np.tile(x, (10, 1))) == pytest.approx(half_width(x[None, :]), rel=0.1)
    seeds = np.random.default_rng(3).normal(size=12)
    assert half_width(np.tile(seeds[:, None], (1, 50))) == pytest.approx(
        half_width(seeds[:, None]), rel=0.1
    )  # nor more prompts the seeds'


def test_interval_is_the_plain_bootstrap():
    x, rng = np.random.default_rng(4).normal(size=(4, 9)), np.random.default_rng(5)
    means = [x[rng.integers(4, size=4)][:, rng.integers(9, size=9)].mean() for _ in range(20000)]
    assert two_level_interval(x, n=20000)[1:] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)


@pytest.mark.parametrize(
    "values, level", [([], 0.95), ([[]], 0.95), ([1.0, 2.0], 0.95), ([[1.0, math.nan]], 0.95), ([[1.0]], 1.0)]
)
def test_interval_refuses(values, level):
    with pytest.raises(ValueError, match="wanted"):
        two_level_interval(values, level)


@pytest.mark.parametrize(
    "differences, p",
    [
        ([2.0], 1.0),  # +2 and -2 are as far from 0
        ([1, 1, 1], 2 / 8),
        ([1, 2, 3], 2 / 8),
        ([3, 1, -1], 6 / 8),  # |sum| = 3: reached by +-5 and by the four patterns that sum to +-3
        ([1, -1], 1.0),
        ([0, 0, 0, 0], 1.0),
        (
            [0.1] * 3 + [0.3],
            2 / 16,
        ),  # 0.1 + 0.1 + 0.1 is not 0.3 in floats: rounding must not decide what is a tie
        ([0.1, 0.1, 0.1, -0.3], 1.0),
    ],
)
def test_sign_flip_by_hand(differences, p):
    assert sign_flip_test(differences) == p


def test_sign_flip_above_the_exact_size_is_near_the_enumeration():
    d = np.random.default_rng(6).normal(0.4, 1, size=16)
    sums = [abs(sum(s * x for s, x in zip(signs, d))) for signs in itertools.product((1, -1), repeat=16)]
    exact = np.mean(np.array(sums) >= abs(d.sum()) - 1e-12)
    assert 0.01 < exact < 0.5 and sign_flip_test(d) == pytest.approx(exact, abs=0.01)
    assert sign_flip_test(np.full(50, 1.0)) == 1 / 20001  # never 0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )  # 0.04 * 1 may not fall below 0.03 * 2
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([0.02]) == [0.02] and holm([]) == []


def test_paired_comparison_names_what_it_generalises_over():
    a = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    few = compare_paired(a, np.zeros((2, 3)))
    assert (
        few["unit"] == "prompts" and few["difference"] == pytest.approx(2 / 3) and few["p"] == 2 / 8
    )  # prompts' means 1, 0.5, 0.5
    many = compare_paired(np.tile(a, (3, 1)), np.zeros((6, 3)))
    assert many["unit"] == "seeds" and many["p"] == 2 / 64
    assert compare_paired(a, a)["p"] == 1.0 and compare_paired(a, a)["difference"] == 0.0


def test_first_reach():
    assert first_reach([0, 10, 20], [0.0, 1.0, 0.5], 0.5) == 5.0
    assert first_reach([0, 10, 20], [0.3, 0.2, 0.4], 0.3) == 0.0
    assert math.isnan(first_reach([0, 10], [0.0, 0.1], 0.2))


def test_reach_ratio():
    steps, slow = [0, 10, 20], np.array([[0.0, 0.5, 1.0]] * 4)
    r = reach_ratio(steps, [[0.0, 1.0, 1.0]] * 4, slow)
    assert (r["target"], r["a"], r["b"], r["ratio"], r["low"], r["high"], r["never"]) == (
        1.0,
        10.0,
        20.0,
        0.5,
        0.5,
        0.5,
        0.0,
    )
    never = reach_ratio(steps, [[0.0, 0.1, 0.2]] * 4, slow)
    assert math.isnan(never["ratio"]) and math.isinf(never["low"]) and never["never"] == 1.0
    mixed = reach_ratio(steps, [[0.0, 0.5, 0.6], [0.0, 2.0, 2.0], [0.0, 0.5, 0.6], [0.0, 0.5, 0.6]], slow)
    # Only with seed 1 drawn twice or more is the mean's end, (n 2 + (4 - n) 0.6) / 4, at least 1.
    assert mixed["never"] == pytest.approx((3 / 4) ** 4 + (3 / 4) ** 3, abs=0.03) and math.isinf(
        mixed["high"]
    )


def test_seed_band():
    mean, low, high = seed_band([[0.0, 1.0], [2.0, 1.0]])
    assert mean.tolist() == [1.0, 1.0] and low.tolist() == [0.0, 1.0] and high.tolist() == [2.0, 1.0]
