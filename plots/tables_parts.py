"""The tables of the suite's other parts: ablations, imperfect expert answers, UniAPL, its anchor."""

import numpy as np

from plots import suites
from plots.statistics import compare_paired
from plots.study import common_seeds, matrix
from plots.words import difference, floor_note, interval, label, markdown, missing_note, present

# arXiv 2508.07750, table 3: NAG in percent on helpful-base, of Qwen2.5-7B and Moonlight-16B.
PAPER_ABLATIONS = {
    "grao": (67.98, 55.06),
    "grao-without-imitation": (63.79, 49.87),
    "grao-without-exploration": (64.38, 43.86),
    "grao-without-regularizer": (61.18, 46.26),
}


def plain(logs, names, extra=()):
    """Reward, NAG, KL, length and cost of each, and further columns: (title, function of name)."""
    header = [
        "",
        "seeds",
        "mean reward",
        "NAG, %",
        "KL, nats/answer",
        "length",
        "generated tokens",
        "s a run",
    ]
    rows = []
    for name in present(logs, names):
        runs = logs[name].values()
        reward, nag = matrix(logs, name, "reward"), matrix(logs, name, "nag")
        row = [label(name), len(reward), interval(reward), interval(nag, percent=True, sign=True)]
        row += [interval(matrix(logs, name, "kl"), 2), interval(matrix(logs, name, "tokens"), 1)]
        row.append(f"{np.mean([log.tokens()[1][-1] for log in runs]):,.0f}")
        row.append(f"{np.median([log.seconds()[1][-1] for log in runs]):.0f}")
        rows.append([*row, *(column(name) for _, column in extra)])
    return (
        markdown([*header, *(title for title, _ in extra)], rows)
        + missing_note(logs, names)
        + floor_note(logs, names)
    )


def ablations(logs):
    names = ("grao", *suites.ABLATIONS)
    seeds = common_seeds(logs, present(logs, names))
    same = {name: {seed: logs[name][seed] for seed in seeds} for name in present(logs, names)}
    printed = {name: "{:.2f} / {:.2f}".format(*cells) for name, cells in PAPER_ABLATIONS.items()}
    theirs = ("paper: NAG, Qwen2.5-7B / Moonlight-16B", lambda name: printed.get(name, "–"))
    beta, clip = suites.equivalent(suites.BETA, suites.LAMBDA, suites.GROUP)
    text = plain(same, names, [theirs])
    text += (
        f"\nRe-weighted: `--without regularizer --beta {beta:.4g} --max-grad-norm {clip:.4g}`, which eq. (3) "
    )
    text += "says is the full objective over 1 + λ: (1 + λ) E + (β + λ/G) I = (1 + λ) (E + β' I), and AdamW "
    text += "does not see the factor.\n"
    if "grao-equivalent" in same and seeds:
        text += f"Largest gap between the two runs' training rewards at any step, over {len(seeds)} seeds: "
        text += f"{largest_gap(same, seeds):.3f}. Rounding alone sets them apart.\n"
    return text


def largest_gap(logs, seeds):
    """Between the training rewards of GRAO and of its re-weighted twin, at any step of any seed."""
    gaps = []
    for seed in seeds:
        _, full = logs["grao"][seed].curve("reward/mean")
        _, other = logs["grao-equivalent"][seed].curve("reward/mean")
        gaps.append(np.abs(full - other).max())
    return max(gaps)


def quality(logs):
    """A row for every method, a column for every share of right expert answers."""
    rows = []
    for method in suites.IMITATORS:
        names = [f"{method}-quality{share:g}" for share in suites.SHARES]
        if present(logs, names):
            cells = [interval(matrix(logs, name, "reward")) if name in logs else "–" for name in names]
            rows.append([label(method), *cells])
    if "grpo-quality1" in logs:
        cells = [interval(matrix(logs, "grpo-quality1", "reward"))] * len(suites.SHARES)
        rows.append([label("grpo") + " (does not read them)", *cells])
    header = ["mean reward, by share of right expert answers", *(f"{share:.0%}" for share in suites.SHARES)]
    return markdown(header, rows) + crossings(logs) + floor_note(logs, sorted(logs))


def crossings(logs):
    """The shares of right expert answers at which each method's line crosses GRPO's."""
    if "grpo-quality1" not in logs:
        return ""
    text = ""
    for method in suites.IMITATORS:
        gaps = gaps_to_grpo(logs, method)
        if gaps:
            text += f"\n{label(method)} {side_of_grpo(gaps)}"
    return text + "\n"


def gaps_to_grpo(logs, method):
    """[(share of right expert answers, mean reward minus GRPO's)], over the seeds that both have."""
    gaps = []
    for share in suites.SHARES:
        name = f"{method}-quality{share:g}"
        seeds = common_seeds(logs, ["grpo-quality1", name]) if name in logs else []
        if seeds:
            ours, theirs = matrix(logs, name, "reward", seeds), matrix(logs, "grpo-quality1", "reward", seeds)
            gaps.append((share, ours.mean() - theirs.mean()))
    return gaps


def side_of_grpo(gaps):
    """Where the line through (share, gap) passes 0, or on which side of it it stays, in words."""
    crossed = []
    for (s, a), (t, b) in zip(gaps, gaps[1:]):
        if a * b < 0:
            crossed.append(f"{s + (t - s) * a / (a - b):.0%}")
    if crossed:
        return f"crosses GRPO at {' and '.join(crossed)} of right expert answers."
    values = [gap for _, gap in gaps]
    side = "level somewhere, on one side of it elsewhere"
    if min(values) > 0:
        side = "ahead"
    elif max(values) < 0:
        side = "behind"
    return f"does not cross GRPO: {side}."


def uniapl(logs):
    """Pipelines, strengths, discriminators: difference from GRPO, log-likelihood of expert answers."""

    def over_grpo(name):
        seeds = common_seeds(logs, ["grpo", name]) if "grpo" in logs and name != "grpo" else []
        if not seeds:
            return "–"
        ours, theirs = matrix(logs, name, "reward", seeds), matrix(logs, "grpo", "reward", seeds)
        return difference(compare_paired(ours, theirs))

    def expert(name):
        return interval(matrix(logs, name, "logp_expert"), 2)

    names = suites.PARTS["uniapl"]
    extra = [("reward − GRPO's, same seeds", over_grpo), ("log p of the expert, nats/token", expert)]
    return plain({name: logs[name] for name in present(logs, names)}, names, extra) + (
        "\nThe paper: +5.77 % over GRPO on Qwen3-0.6B and +3.75 % on Qwen3-4B, its staged pipeline; other "
        "data and benchmarks than ours.\n"
    )


def anchor(logs):
    """What the discriminator tells apart and what is left of exploration, early and late."""

    def fifths(name, metric):
        rows = [log.curve(metric)[1] for log in logs[name].values()]
        if not all(map(len, rows)):
            return "–"
        n = max(1, len(rows[0]) // 5)
        return f"{np.mean([row[:n] for row in rows]):.3f} → {np.mean([row[-n:] for row in rows]):.3f}"

    columns = {
        "expert told from policy": "score/accuracy",
        "entropy, nats/token": "entropy",
        "distinct bigrams": "distinct/2",
        "length": "length/mean",
    }
    names = present(logs, ("chord", "uniapl", *suites.STRENGTHS, "uniapl-embedding", "uniapl-cotrained"))
    rows = []
    for name in names:
        rows.append([label(name), len(logs[name]), *(fifths(name, metric) for metric in columns.values())])
    return markdown(["first → last fifth", "seeds", *columns], rows)
