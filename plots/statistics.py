"""The study's statistics as pure functions of arrays: intervals, a paired test, where curves cross.

A result is a matrix (S seeds, P prompts): every seed trains its own policy, all answer the same held-out
prompts. The two are crossed, not nested, so a redrawn prompt is redrawn for all seeds; drawing prompts apart
for each seed would average a hard prompt's effect away.
"""

import numpy as np

EXACT = 14  # up to so many differences all sign patterns are enumerated: 2^14


def two_level_interval(values, level=0.95, n=2000, seed=0):
    """Percentile bootstrap of the mean of `values` (S, P) -> (mean, low, high), in their unit.

    Seeds are redrawn with replacement, and prompts. With one seed or one prompt that level is fixed, and the
    interval speaks of the other alone. ValueError for no value, NaN, or a level outside (0, 1).
    """
    x = np.asarray(values, dtype=float)
    if x.ndim != 2 or x.size == 0 or np.isnan(x).any() or not 0 < level < 1:
        raise ValueError(
            "wanted: (seeds, prompts) without NaN and a level between 0 and 1; "
            f"got shape {x.shape}, level {level}"
        )
    rng = np.random.default_rng(seed)
    # How often each seed and each prompt is drawn; the mean of a redrawn matrix is then w x v / (S P).
    w, v = (rng.multinomial(size, np.full(size, 1 / size), size=n) for size in x.shape)  # (n, S), (n, P)
    means = ((w @ x) * v).sum(1) / x.size
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(x.mean()), float(low), float(high)


def seed_band(rows, level=0.95, n=1000, seed=0):
    """Curves (S, T) -> (mean, low, high), each (T,): pointwise percentile bootstrap over seeds.

    One seed gives a band of width 0.
    """
    rows = np.asarray(rows, dtype=float)
    means = rows[np.random.default_rng(seed).integers(len(rows), size=(n, len(rows)))].mean(1)  # (n, T)
    return rows.mean(0), *np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)


def sign_flip_test(differences, n=20_000, seed=0):
    """Two-sided p of a paired permutation test that the mean of `differences` (N,) is 0.

    If it is, each difference may as well have had the other sign.     Exact up to N = EXACT, where the
    smallest p is 2 / 2^N; above it `n` random patterns and the observed one. ValueError for none, or NaN.
    """
    d = np.asarray(differences, dtype=float)
    if d.ndim != 1 or d.size == 0 or np.isnan(d).any():
        raise ValueError(f"wanted: a sequence of differences without NaN; got shape {d.shape}")
    observed = abs(d.sum())
    tolerance = 1e-9 * np.abs(d).sum()  # sums of the same numbers in another order must count as ties
    if d.size <= EXACT:
        patterns = 1 - 2 * (np.arange(2**d.size)[:, None] >> np.arange(d.size) & 1)  # (2^N, N) of +-1
        return float((np.abs(patterns @ d) >= observed - tolerance).mean())
    rng, hits = np.random.default_rng(seed), 1
    for begin in range(0, n, 1000):
        patterns = rng.choice([-1.0, 1.0], size=(min(1000, n - begin), d.size))
        hits += int((np.abs(patterns @ d) >= observed - tolerance).sum())
    return hits / (n + 1)


def holm(p_values):
    """Holm's step-down correction -> adjusted p in the given order.

    With them sorted, the k-th (from 0) is multiplied by m - k, never falling, at most 1.
    Rejecting where the result is at most alpha keeps the chance of any false rejection below alpha, however
    the tests depend on each other.
    """
    p, adjusted, largest = list(p_values), [0.0] * len(p_values), 0.0
    for k, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - k) * p[i]))
        adjusted[i] = largest
    return adjusted


def compare_paired(a, b):
    """a minus b, results (S, P) of the same seeds and prompts.

    -> {"difference", "low", "high", "p", "unit"}
    The interval is two-level. The unit that p generalises over, whose differences the test flips: seeds from
    six on, because a policy is trained once for each; with fewer the smallest p would be above 0.05, and
    prompts are flipped instead, which says nothing about other seeds.
    """
    d = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    mean, low, high = two_level_interval(d)
    unit = "seeds" if len(d) >= 6 else "prompts"
    return {
        "difference": mean,
        "low": low,
        "high": high,
        "p": sign_flip_test(d.mean(1 if unit == "seeds" else 0)),
        "unit": unit,
    }


def first_reach(x, y, target):
    """The first x at which the line through the points (x, y) is at least `target`, nan if never."""
    for i, value in enumerate(y):
        if value >= target:
            if i == 0:
                return float(x[0])
            return float(x[i - 1] + (x[i] - x[i - 1]) * (target - y[i - 1]) / (value - y[i - 1]))
    return float("nan")


def reach_ratio(x, a, b, n=2000, seed=0):
    """How much sooner curves `a` (S, T) over x (T,) reach the last value of curves `b`.

    -> {"target", "a", "b", "ratio", "low", "high", "never"}: a and b are the x at which the mean curves reach
    the target, ratio is a / b. The interval redraws seeds, the same for a and
    b, and `never` is the share of redraws in which a does not get there, which count as infinite. b reaches
    its own last value at the end, or before if it fell back.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)

    def reached(rows):
        ends = b[rows].mean(0)
        return first_reach(x, a[rows].mean(0), ends[-1]), first_reach(x, ends, ends[-1]), ends[-1]

    here, there, target = reached(np.arange(len(a)))
    rng, ratios = np.random.default_rng(seed), []
    for _ in range(n):
        p, q, _ = reached(rng.integers(len(a), size=len(a)))
        ratios.append(p / q if q else np.nan)
    ratios = np.where(np.isnan(ratios), np.inf, ratios)
    low, high = np.quantile(ratios, [0.025, 0.975], method="closest_observation")
    return {
        "target": float(target),
        "a": here,
        "b": there,
        "ratio": here / there if there else float("nan"),
        "low": float(low),
        "high": float(high),
        "never": float(np.isinf(ratios).mean()),
    }
