"""What is measured of answers and of scores, as pure functions of numbers: wins, ties and losses, means,
intervals, calibration.

How it is printed, and what is said beside it, is in engine/report.py.
"""

from collections import Counter

import numpy as np

# Scores closer than this share of their spread are a tie: bf16, in which most models score, keeps 8
# significant bits. One text scored in two batches was seen to differ by 2^-15 of the spread in fp32 (135 M
# parameters), in bf16 by 2^-9 (1.3 M) to 2^-2 (135 M and a random head). More than a tolerance can take, so
# texts that are known to be equal are a tie whatever their scores; what rounding is left between different
# texts tosses a coin and favours nobody.
BF16_STEP = 2.0**-8
# And closer than this share of their own size: fp32's 24 bits, less what a sum over some thousand products
# loses. It decides where there is no spread, because most scores are the same.
FP32_STEP = 2.0**-16
# Prompts below which a bootstrap over them promises more than it keeps: no interval is given.
FEWEST = 30

# ------------------------------------------------------------------------------------------------------------
# Which of two scores is higher


def pair(a, b):
    """Two sequences or tensors as equal, non-empty float arrays."""
    a, b = as_floats(a), as_floats(b)
    if a.shape != b.shape or a.size == 0 or np.isnan(a).any() or np.isnan(b).any():
        raise ValueError(
            f"wanted: two equally long, non-empty sequences without NaN; got shapes {a.shape}, {b.shape}"
        )
    return a, b


def as_floats(values):
    return np.asarray(values.tolist() if hasattr(values, "tolist") else list(values), dtype=float)


def tolerance(a, b):
    """The difference up to which two scores are a tie, in the scores' unit, one for each pair of a and b.

    BF16_STEP of the spread of all scores compared, which is their median distance from their median: a few
    answers with a penalty of 1000 would blow up a standard deviation, and with it the ties. At least
    FP32_STEP of the larger of the two scores.
    """
    scores = np.concatenate([a.ravel(), b.ravel()])
    scores = scores[np.isfinite(scores)]
    spread = np.median(np.abs(scores - np.median(scores))) if len(scores) else 0.0
    size = np.maximum(np.abs(a), np.abs(b))
    size = np.where(np.isfinite(size), size, 0.0)  # an infinite score is beyond every finite one
    return np.maximum(BF16_STEP * spread, FP32_STEP * size)


def compare(a, b, same_text=None):
    """Whose score is higher: +1.0 where that of `a` is, -1.0 where that of `b` is, 0.0 for a tie -> array of
    their shape.

    The one place that decides it. a, b: sequences, arrays or tensors of one shape; same_text: of that shape,
    True where both scores are of one text, which is a tie whatever rounding made of it. Scores within
    `tolerance` are a tie. ValueError for other shapes or NaN.
    """
    a, b = pair(a, b)
    limit = tolerance(a, b)
    signs = (a > b + limit).astype(float) - (a < b - limit)
    return signs if same_text is None else np.where(np.asarray(same_text, dtype=bool), 0.0, signs)


def right(better, worse):
    """1.0 where the better answer scores higher, 0.0 where the worse one does, 0.5 for a tie -> array of
    their shape."""
    return 0.5 + 0.5 * compare(better, worse)


def accuracy(better, worse):
    """Share of pairs whose better answer scores higher, (N,) each; a tie counts half, so scoring all the same
    is worth 0.5."""
    return float(right(better, worse).mean())


def shares(signs):
    """compare's result -> {"win", "tie", "loss"}, shares in [0, 1]."""
    return {
        "win": float((signs > 0).mean()),
        "tie": float((signs == 0).mean()),
        "loss": float((signs < 0).mean()),
    }


def ras(rewards, reference_rewards):
    """Relative Adversarial Score (GRAO, arXiv 2508.07750): shares of the queries, in [0, 1], on which the
    answer is rewarded above the expert answer y (the paper's y_ref), as it, and below it -> {"win", "tie",
    "loss"}. The paper's RAS is
    "win".

    Two equally long sequences or tensors; ValueError on other lengths, none at all, or NaN. A tie is what
    `compare` calls one.
    """
    return shares(compare(rewards, reference_rewards))


def nag(post, pre):
    """Normalized Alignment Gain (arXiv 2508.07750) of the trained policy's rewards over those before
    training.

    {"signed": wins minus losses, in [-1, 1], which is what the paper's tables hold (one entry is negative);
     "indicator": share of strict wins, the formula as printed}. ValueError as for ras.
    """
    return gain(compare(post, pre))


def gain(signs):
    """compare's result, after against before -> nag's."""
    found = shares(signs)
    return {"signed": found["win"] - found["loss"], "indicator": found["win"]}


# ------------------------------------------------------------------------------------------------------------
# Intervals


def bootstrap_interval(values, level=0.95, n=2000, seed=0):
    """Percentile bootstrap (low, high) of the mean of `values`, (prompts,) or (prompts, samples): prompts are
    redrawn with replacement, because samples of one prompt are not independent. Equal values give an interval
    of width 0, which says little below about 30 prompts. ValueError for no values or NaN, or a level outside
    (0, 1)."""
    values = np.asarray(values.tolist() if hasattr(values, "tolist") else values, dtype=float)
    if values.size == 0 or np.isnan(values).any() or not 0 < level < 1:
        raise ValueError("bootstrap_interval wants at least one value, no NaN, and a level between 0 and 1")
    values = values.reshape(len(values), -1).mean(axis=1)
    means = values[np.random.default_rng(seed).integers(len(values), size=(n, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def interval(values):
    """bootstrap_interval of what is to be printed: None where there are fewer than FEWEST values."""
    return bootstrap_interval(values) if len(values) >= FEWEST else None


# ------------------------------------------------------------------------------------------------------------
# Held-out answers: lists of dicts as in samples.jsonl, one for each prompt


def column(samples, name):
    return np.array([sample[name] for sample in samples], dtype=float)


def against_expert(samples):
    """compare of each answer's reward with its expert answer's -> (N,). An answer that was cut is not the
    text that the expert wrote."""
    same = [s["completion"] == s["expert"] and not s["truncated"] for s in samples]
    return compare(column(samples, "reward"), column(samples, "expert_reward"), same)


def against_before(before, after):
    """compare of the rewards after training with those before, of the same prompts -> (N,)."""
    same = []
    for old, new in zip(before, after, strict=True):
        same.append(old["completion"] == new["completion"] and old["truncated"] == new["truncated"])
    return compare(column(after, "reward"), column(before, "reward"), same)


def summary(samples):
    """Of one evaluation: mean reward with its 95 % interval (None, None with fewer than FEWEST prompts),
    deviation, quartiles, mean reward of the expert answers and of the no-skill floor where the samples have
    it, RAS with the interval of its wins (or None), mean length and the share that was cut."""
    rewards, signs = column(samples, "reward"), against_expert(samples)
    low, high = interval(rewards) or (None, None)
    q25, median, q75 = np.quantile(rewards, [0.25, 0.5, 0.75]).tolist()
    floor = {"floor": float(column(samples, "floor_reward").mean())} if "floor_reward" in samples[0] else {}
    return floor | {
        "reward": float(rewards.mean()),
        "low": low,
        "high": high,
        "expert": float(column(samples, "expert_reward").mean()),
        "std": float(rewards.std()),
        "q25": q25,
        "median": median,
        "q75": q75,
        "ras": shares(signs),
        "ras_interval": interval(signs > 0),
        "tokens": float(column(samples, "tokens").mean()),
        "truncated": float(column(samples, "truncated").mean()),
    }


def commonest(texts):
    """(text, share of all) of the text that occurs most often."""
    text, count = Counter(texts).most_common(1)[0]
    return text, count / len(texts)


# ------------------------------------------------------------------------------------------------------------
# Preference pairs: what a reward model is reported with


def calibration(better, worse, bins=10):
    """How far sigmoid(|score difference|), the model's probability that the answer it prefers is the better
    one, is from being right.

    better, worse: (N,) scores -> {"ece": expected calibration error, sum over bins of n/N |accuracy -
    confidence| (Guo et al., arXiv 1706.04599), "bins": [{"n", "confidence", "accuracy"}]} over equal parts of
    [0.5, 1]; a tie is right by half.
    """
    better, worse = pair(better, worse)
    confidence = 1 / (1 + np.exp(-np.abs(better - worse)))
    correct = right(better, worse)
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    rows, error = [], 0.0
    for b in range(bins):
        inside = which == b
        if not inside.any():
            continue
        n, sure, met = int(inside.sum()), float(confidence[inside].mean()), float(correct[inside].mean())
        rows.append({"n": n, "confidence": sure, "accuracy": met})
        error += n * abs(met - sure) / len(better)
    return {"ece": error, "bins": rows}


def by_length(better, worse, lengths, parts=5):
    """Accuracy where the chosen answer is the shorter one, and where it is the longer.

    lengths: (N, 2) tokens of chosen and rejected; bins are quantiles of their difference -> [{"from", "to",
    "n", "accuracy"}].
    """
    longer = np.array([chosen - rejected for chosen, rejected in lengths])
    correct = right(better, worse)
    edges = np.unique(np.quantile(longer, np.linspace(0, 1, parts + 1), method="nearest"))
    which = np.clip(np.searchsorted(edges, longer, side="right") - 1, 0, max(len(edges) - 2, 0))
    rows = []
    for b in np.unique(which):
        inside = which == b
        low, high = int(longer[inside].min()), int(longer[inside].max())
        rows.append(
            {"from": low, "to": high, "n": int(inside.sum()), "accuracy": float(correct[inside].mean())}
        )
    return rows


def correlation(x, y):
    """Pearson's, or 0 where one of them does not vary."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def measures(scores, lengths):
    """scores, lengths (N, 2) of chosen and rejected -> every number that report_pairs prints and
    calibration.png shows.

    Intervals are over pairs, and None with fewer than FEWEST of them.
    """
    better, worse = np.array(scores, dtype=float).T
    longer, shorter = np.array(lengths, dtype=float).T
    correct = right(better, worse)
    by_words = 0.5 + 0.5 * np.sign(
        longer - shorter
    )  # of the rule "the longer one is better"; lengths are exact
    differ = longer != shorter
    prefers_chosen, chosen_longer = compare(better, worse) > 0, longer > shorter
    agree = (prefers_chosen == chosen_longer)[differ]
    return {
        "pairs": len(correct),
        "accuracy": float(correct.mean()),
        "interval": interval(correct),
        "longer_wins": float(by_words.mean()),
        "longer_wins_interval": interval(by_words),
        "over_longer": float((correct - by_words).mean()),
        "over_longer_interval": interval(correct - by_words),
        "prefers_longer": float(agree.mean()) if differ.any() else 0.5,
        "correlation_with_length": correlation(better - worse, longer - shorter),
        "by_length": by_length(better, worse, lengths),
        "calibration": calibration(better, worse),
        "chosen_mean": float(better.mean()),
        "chosen_std": float(better.std()),
        "rejected_mean": float(worse.mean()),
        "rejected_std": float(worse.std()),
    }


def distinct(groups, n, ends):
    """{"distinct/n": share} (Li et al., arXiv 1510.03055): different n-grams over all of a prompt's
    samples, mean over prompts.

    groups: B lists of G lists of ids; ends: the EOS ids, which are left out. {} where no sample has n tokens.
    """
    shares = []
    for group in groups:
        texts = [[t for t in ids if t not in ends] for ids in group]
        grams = [tuple(ids[i : i + n]) for ids in texts for i in range(len(ids) - n + 1)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return {f"distinct/{n}": sum(shares) / len(shares)} if shares else {}
