"""What is measured of answers and of scores, with intervals, and how it is printed."""

import numpy as np

from data.constraints import constraint_results


def pair(a, b):
    """Two sequences or tensors as equal, non-empty float arrays."""
    a, b = (np.asarray(x.tolist() if hasattr(x, "tolist") else list(x), dtype=float) for x in (a, b))
    if a.shape != b.shape or a.size == 0 or np.isnan(a).any() or np.isnan(b).any():
        raise ValueError(
            f"wanted: two equally long, non-empty sequences without NaN; got shapes {a.shape}, {b.shape}"
        )
    return a, b


def accuracy(better, worse):
    """Share of pairs whose better answer scores higher, (N,) each; a tie counts half, so that scoring
    everything the same is worth 0.5.
    """
    better, worse = pair(better, worse)
    return float(((better > worse) + 0.5 * (better == worse)).mean())


def ras(rewards, reference_rewards):
    """Relative Adversarial Score (GRAO, arXiv 2508.07750): shares of the queries, in [0, 1], on which the
    answer is rewarded above the expert answer y (the paper's y_ref), as it, and below it -> {"win", "tie",
    "loss"}. The paper's RAS is "win".

    Two equally long sequences or tensors; ValueError on other lengths, none at all, or NaN.
    """
    a, b = pair(rewards, reference_rewards)
    return {"win": float((a > b).mean()), "tie": float((a == b).mean()), "loss": float((a < b).mean())}


def nag(post, pre):
    """Normalized Alignment Gain (arXiv 2508.07750) of the trained policy's rewards over those before
    training.

    {"signed": wins minus losses, in [-1, 1], which is what the paper's tables hold (one entry is negative);
     "indicator": share of strict wins, the formula as printed}. ValueError as for ras.
    """
    shares = ras(post, pre)
    return {"signed": shares["win"] - shares["loss"], "indicator": shares["win"]}


def bootstrap_interval(values, level=0.95, n=2000, seed=0):
    """Percentile bootstrap (low, high) of the mean of `values`, (prompts,) or (prompts, samples): prompts are
    redrawn with replacement, because samples of one prompt are not independent. Equal values give an interval
    of width 0, which says little below about 30 prompts. ValueError for no values or NaN, or a level outside
    (0, 1).
    """
    values = np.asarray(values.tolist() if hasattr(values, "tolist") else values, dtype=float)
    if values.size == 0 or np.isnan(values).any() or not 0 < level < 1:
        raise ValueError("bootstrap_interval wants at least one value, no NaN, and a level between 0 and 1")
    values = values.reshape(len(values), -1).mean(axis=1)
    means = values[np.random.default_rng(seed).integers(len(values), size=(n, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def calibration(better, worse, bins=10):
    """How far sigmoid(|score difference|), the model's probability that the answer it prefers is the better
    one, is from being right.

    better, worse: (N,) scores -> {"ece": expected calibration error, sum over bins of n/N |accuracy -
    confidence| (Guo et al., arXiv 1706.04599), "bins": [{"n", "confidence", "accuracy"}]} over equal parts of
    [0.5, 1]; a tie is right by half.
    """
    d = np.asarray(better, dtype=float) - np.asarray(worse, dtype=float)
    confidence, right = 1 / (1 + np.exp(-np.abs(d))), (d > 0) + 0.5 * (d == 0)
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    rows = [
        {
            "n": int((which == b).sum()),
            "confidence": float(confidence[which == b].mean()),
            "accuracy": float(right[which == b].mean()),
        }
        for b in range(bins)
        if (which == b).any()
    ]
    return {"ece": sum(r["n"] * abs(r["accuracy"] - r["confidence"]) for r in rows) / len(d), "bins": rows}


def by_length(better, worse, lengths, parts=5):
    """Accuracy where the chosen answer is the shorter one, and where it is the longer: quantile bins of
    len(chosen) - len(rejected), tokens.
    """
    d, longer = (
        np.asarray(better, dtype=float) - np.asarray(worse, dtype=float),
        np.array([a - b for a, b in lengths]),
    )
    edges = np.unique(np.quantile(longer, np.linspace(0, 1, parts + 1), method="nearest"))
    which = np.clip(np.searchsorted(edges, longer, side="right") - 1, 0, max(len(edges) - 2, 0))
    right = (d > 0) + 0.5 * (d == 0)
    parts = [which == b for b in sorted(set(which))]
    return [
        {
            "from": int(longer[p].min()),
            "to": int(longer[p].max()),
            "n": int(p.sum()),
            "accuracy": float(right[p].mean()),
        }
        for p in parts
    ]


def measures(scores, lengths):
    """scores, lengths (N, 2) of chosen and rejected -> every number that report_pairs prints and
    calibration.png shows.
    """
    (better, worse), (longer, shorter) = np.array(scores, dtype=float).T, np.array(lengths, dtype=float).T
    right, by_words = (
        (better > worse) + 0.5 * (better == worse),
        (longer > shorter) + 0.5 * (longer == shorter),
    )
    differ = longer != shorter
    correlation = (
        np.corrcoef(better - worse, longer - shorter)[0, 1]
        if len(better) > 1 and np.ptp(better - worse) and np.ptp(longer - shorter)
        else 0.0
    )
    return {
        "pairs": len(right),
        "accuracy": accuracy(better, worse),
        "interval": bootstrap_interval(right),
        "longer_wins": float(by_words.mean()),
        "longer_wins_interval": bootstrap_interval(by_words),
        "over_longer": float((right - by_words).mean()),
        "over_longer_interval": bootstrap_interval(right - by_words),
        "prefers_longer": float(((better > worse) == (longer > shorter))[differ].mean())
        if differ.any()
        else 0.5,
        "correlation_with_length": float(correlation),
        "by_length": by_length(better, worse, lengths),
        "calibration": calibration(better, worse),
        "chosen_mean": float(better.mean()),
        "chosen_std": float(better.std()),
        "rejected_mean": float(worse.mean()),
        "rejected_std": float(worse.std()),
    }


def report_pairs(name, m):
    text = f"\n{name}: {m['pairs']} pairs\n"
    rows = [
        ("this reward model", m["accuracy"], m["interval"]),
        ("the longer one wins (tokens)", m["longer_wins"], m["longer_wins_interval"]),
    ]
    text += f"  {'accuracy [95 % interval]':<34}\n"
    text += (
        "".join(f"    {label:<32}{value:.3f} [{low:.3f}, {high:.3f}]\n" for label, value, (low, high) in rows)
        + f"    {'random':<32}0.500\n"
    )
    text += f"    {'over the longer one, same pairs':<32}{m['over_longer']:+.3f} [{m['over_longer_interval'][0]:+.3f}, {m['over_longer_interval'][1]:+.3f}]\n"
    text += f"  prefers the longer answer of a pair: {m['prefers_longer']:.3f}; score and length differences correlate: {m['correlation_with_length']:+.2f}\n"
    bins = ", ".join(f"{b['from']}..{b['to']}: {b['accuracy']:.2f} ({b['n']})" for b in m["by_length"])
    text += f"  accuracy by tokens(chosen) - tokens(rejected): {bins}\n"
    text += f"  expected calibration error {m['calibration']['ece']:.3f}; scores (mean, deviation): chosen {m['chosen_mean']:.2f}, {m['chosen_std']:.2f}; "
    return text + f"rejected {m['rejected_mean']:.2f}, {m['rejected_std']:.2f}"


def against_experts(rewards, experts):
    """rewards and the expert answers' rewards, before and after, as (before, after) -> lines of a report:
    mean, RAS, NAG, with intervals over prompts.
    """
    lines = []
    for word, r, y in zip(("before", "after"), rewards, experts):
        shares, (low, high) = ras(r, y), bootstrap_interval(np.greater(r, y))
        q = np.quantile(r, [0.25, 0.5, 0.75])
        lines.append(
            f"{word:<8}reward {np.mean(r):.3f} (deviation {np.std(r):.3f}, quartiles {q[0]:.3f} {q[1]:.3f} {q[2]:.3f}), expert {np.mean(y):.3f}; "
            f"RAS {shares['win']:.3f} [{low:.3f}, {high:.3f}] / {shares['tie']:.3f} / {shares['loss']:.3f}"
        )
    gain, (low, high) = (
        nag(rewards[1], rewards[0]),
        bootstrap_interval(np.sign(np.subtract(rewards[1], rewards[0]))),
    )
    return [
        *lines,
        f"NAG     {gain['signed']:+.3f} [{low:+.3f}, {high:+.3f}] (wins alone {gain['indicator']:.3f})",
    ]


def distinct(groups, n, ends):
    """{"distinct/n": share} (Li et al., arXiv 1510.03055): different n-grams over all of a prompt's samples,
    mean over prompts.

    groups: B lists of G lists of ids; ends: the EOS ids, which are left out. {} where no sample has n tokens.
    """
    shares = []
    for group in groups:
        texts = [[t for t in ids if t not in ends] for ids in group]
        grams = [tuple(ids[i : i + n]) for ids in texts for i in range(len(ids) - n + 1)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return {f"distinct/{n}": sum(shares) / len(shares)} if shares else {}


def summary(samples):
    """Of one evaluation: mean reward with its 95 % interval, deviation and quartiles, RAS with the interval
    of its wins, length.
    """
    rewards, experts = (np.array([s[k] for s in samples], dtype=float) for k in ("reward", "expert_reward"))
    low, high = bootstrap_interval(rewards)
    q25, median, q75 = np.quantile(rewards, [0.25, 0.5, 0.75]).tolist()
    return {
        "reward": float(rewards.mean()),
        "low": low,
        "high": high,
        "expert": float(experts.mean()),
        "std": float(rewards.std()),
        "q25": q25,
        "median": median,
        "q75": q75,
        "ras": ras(rewards, experts),
        "ras_interval": bootstrap_interval(rewards > experts),
        "tokens": sum(s["tokens"] for s in samples) / len(samples),
        "truncated": sum(s["truncated"] for s in samples) / len(samples),
    }


def report(before, after):
    """The before/after table, the constraint types, and four prompts side by side, as text."""
    b, a = summary(before), summary(after)
    post, pre = ([s["reward"] for s in samples] for samples in (after, before))
    gain, (low, high) = nag(post, pre), bootstrap_interval(np.sign(np.subtract(post, pre)))
    rows = [
        (f"held-out prompts: {len(after)}", "before", "after"),
        (
            "mean reward [95 % interval]",
            *(f"{s['reward']:.3f} [{s['low']:.3f}, {s['high']:.3f}]" for s in (b, a)),
        ),
        ("  deviation", *(f"{s['std']:.3f}" for s in (b, a))),
        ("  quartiles", *(f"{s['q25']:.3f} / {s['median']:.3f} / {s['q75']:.3f}" for s in (b, a))),
        ("expert answers' reward", *(f"{s['expert']:.3f}" for s in (b, a))),
        ("RAS win / tie / loss", *("{win:.3f} / {tie:.3f} / {loss:.3f}".format(**s["ras"]) for s in (b, a))),
        ("  wins, 95 % interval", *("[{:.3f}, {:.3f}]".format(*s["ras_interval"]) for s in (b, a))),
        ("NAG wins - losses (wins alone)", "", f"{gain['signed']:+.3f} ({gain['indicator']:.3f})"),
        ("  95 % interval over prompts", "", f"[{low:+.3f}, {high:+.3f}]"),
        ("length, tokens (share cut)", *(f"{s['tokens']:.1f} ({s['truncated']:.2f})" for s in (b, a))),
    ]
    text = "\n".join(f"{name:<32}{x:>24}{y:>24}" for name, x, y in rows) + "\n"
    types = sorted({c["type"] for s in after for c in s.get("constraints", [])})
    if types:
        text += f"\n{'share met, by constraint type':<32}{'before':>24}{'after':>24}{'expert':>14}{'n':>6}\n"
    for kind in types:
        met = [
            constraint_share(samples, key, kind)
            for samples, key in ((before, "completion"), (after, "completion"), (after, "expert"))
        ]
        text += f"  {kind:<30}{met[0][0]:>24.2f}{met[1][0]:>24.2f}{met[2][0]:>14.2f}{met[0][1]:>6}\n"
    for i in range(min(4, len(after))):
        prompt = (
            after[i]["prompt"] if isinstance(after[i]["prompt"], str) else after[i]["prompt"][-1]["content"]
        )
        text += f"\nprompt     {shown(prompt)}\nexpert     {shown(after[i]['expert'])}  ({after[i]['expert_reward']:.3g})\n"
        for name, s in (("before", before[i]), ("after", after[i])):
            text += f"{name:<10} {shown(s['completion'])}  ({s['reward']:.3g})\n"
    return text


def constraint_share(samples, key, kind):
    """(share, n) of the constraints of one type that the answers under `key` meet."""
    met = [
        ok
        for s in samples
        for ok, c in zip(constraint_results(s[key], s["constraints"]), s["constraints"])
        if c["type"] == kind
    ]
    return sum(met) / len(met), len(met)


def shown(text, width=200):
    text = " / ".join(text.split("\n"))
    return text if len(text) <= width else text[: width - 1] + "…"
