"""The figures of the suite's other parts: GRAO's terms and weights, imperfect expert answers, UniAPL."""

import numpy as np

from engine.draw import plt
from plots import study, suites
from plots.axes import COLOURS, WIDTH, Absent, band, colour, curves, dots, means, need
from plots.statistics import two_level_interval
from plots.words import label, present

# ------------------------------------------------------------------------------------------------------------
# GRAO

ABLATION_LOOKS = {
    "grao": dict(linewidth=3, alpha=0.6),
    "grao-without-imitation": dict(color="#333333", linestyle="--"),
    "grao-without-exploration": dict(color="#666666", linestyle="-."),
    "grao-without-regularizer": dict(color="#aaaaaa"),
    "grao-equivalent": dict(color="#000000", linestyle=":", linewidth=1.6),
}
MARKS = "os^Dv"  # of the cells of beta and lambda, by lambda


def ablations(logs):
    """Each term left out, on the seeds that all of them have."""
    names = list(ABLATION_LOOKS)
    need(logs, *names)
    seeds = study.common_seeds(logs, names)
    if not seeds:
        raise Absent("a seed that all ablations share")
    same = {name: {seed: logs[name][seed] for seed in seeds} for name in names}
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.6), width_ratios=[3, 2])
    for i, (name, look) in enumerate(ABLATION_LOOKS.items()):
        steps, rows = curves(same, name, "reward/mean")
        band(left, steps, rows, name, window=5, **look)
        mean, low, high = two_level_interval(study.matrix(same, name, "nag"))
        shade = look.get("color", colour(name))
        filling = "white" if name == "grao-equivalent" else shade
        right.plot([100 * low, 100 * high], [i, i], color=shade, linewidth=2)
        right.plot(100 * mean, i, "o", color=shade, markerfacecolor=filling)
        right.annotate(label(name), (100 * low, i), (0, 6), textcoords="offset points", fontsize=8)
    left.set(xlabel="step", ylabel="reward of samples (running mean of 5)")
    left.set(title=f"Training prompts, {len(seeds)} seeds")
    left.legend(fontsize=8)
    right.set(title="Held out", xlabel="NAG, %", ylim=(len(names) - 0.5, -0.5), yticks=[])
    right.grid(axis="x", color="#dddddd", linewidth=0.6)
    return figure


def components(logs):
    """The loss, the shares of its three terms, and the advantage of y."""
    need(logs, "grao")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(WIDTH, 3.0))
    steps, rows = curves(logs, "grao", "loss")
    band(left, steps, rows, "grao", "")
    looks = {"exploration": ("#000000", "-"), "imitation": ("#666666", "--"), "regularizer": ("#666666", ":")}
    for term, (grey, style) in looks.items():
        steps, rows = curves(logs, "grao", f"share/{term}")
        band(middle, steps, rows, "grao", term.replace("z", "s"), window=5, color=grey, linestyle=style)
    steps, rows = curves(logs, "grao", "advantage/expert")
    band(right, steps, rows, "grao", "", window=5)
    right.axhline(0, color="#999999", linewidth=0.8)
    left.set(title="Total loss (Fig. 4)", xlabel="step", ylabel="nats")
    middle.set(title="Share of |term| (Fig. 5)", xlabel="step", ylim=(0, None))
    middle.legend(fontsize=8)
    right.set(title="Advantage of the expert answer", xlabel="step")
    return figure


def sensitivity(logs):
    """Reward by beta and lambda, and the same cells over the one number that eq. (3) says they differ in."""
    cells = {(suites.BETA, suites.LAMBDA): "grao"} | {cell: name for name, cell in suites.SENSITIVITY.items()}
    cells = {cell: name for cell, name in cells.items() if name in logs}
    if len(cells) < 4:
        raise Absent("four cells of beta and lambda")
    betas = sorted({beta for beta, _ in cells})
    lambdas = sorted({lam for _, lam in cells})
    most = min(len(logs[name]) for name in cells.values())  # seeds that every cell has
    grid = np.full((len(betas), len(lambdas)), np.nan)
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.4))
    for (beta, lam), name in cells.items():
        mean, low, high = two_level_interval(study.matrix(logs, name, "reward", list(logs[name])[:most]))
        grid[betas.index(beta), lambdas.index(lam)] = mean
        x = suites.equivalent(beta, lam, suites.GROUP)[0]
        right.plot([x, x], [low, high], color=COLOURS["grao"], linewidth=0.8, alpha=0.5)
        right.plot(x, mean, MARKS[lambdas.index(lam) % 5], color=COLOURS["grao"], markersize=5)
    draw_heat_map(left, grid, betas, lambdas)
    left.set(title=f"Mean reward, held out, {most} seed{'s' * (most > 1)}")
    right.set(xlabel="β' = (β + λ/G) / (1 + λ)", ylabel="mean reward", title="The same cells over β'")
    handles = []
    for i, lam in enumerate(lambdas):
        style = dict(linestyle="", marker=MARKS[i % 5], color=COLOURS["grao"])
        handles.append(plt.Line2D([], [], label=f"λ = {lam:g}", **style))
    right.legend(handles=handles, fontsize=8)
    return figure


def draw_heat_map(axis, grid, betas, lambdas):
    """The rewards (beta, lambda) as colours and numbers."""
    image = axis.imshow(grid, cmap="cividis", origin="lower", aspect="auto")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for i, j in np.ndindex(grid.shape):
        if np.isfinite(grid[i, j]):
            ink = "black" if grid[i, j] > middle else "white"
            axis.text(j, i, f"{grid[i, j]:.2f}", ha="center", va="center", color=ink)
    axis.set(xlabel="λ", ylabel="β")
    axis.set_xticks(range(len(lambdas)), [f"{x:g}" for x in lambdas])
    axis.set_yticks(range(len(betas)), [f"{x:g}" for x in betas])
    axis.spines[:].set_visible(False)
    axis.figure.colorbar(image, ax=axis)


# ------------------------------------------------------------------------------------------------------------
# Imperfect expert answers


def quality(logs):
    """Final reward over the share of right expert answers; GRPO, which does not read them, is a line."""
    need(logs, "grpo-quality1")
    lines = {}
    for method in suites.IMITATORS:
        lines[method] = [share for share in suites.SHARES if f"{method}-quality{share:g}" in logs]
    if not any(lines.values()):
        raise Absent("methods on expert answers of graded quality")
    figure, axis = plt.subplots(figsize=(WIDTH, 3.8))
    for i, (method, shares) in enumerate(lines.items()):
        if shares:
            mean, bars = means(logs, [f"{method}-quality{share:g}" for share in shares])
            x = np.add(shares, 0.006 * (i - (len(lines) - 1) / 2))  # apart, else the bars lie on each other
            style = dict(fmt="o-", color=colour(method), markersize=5, label=label(method))
            axis.errorbar(x, mean, bars, **style)
    draw_levels(axis, logs)
    axis.set(xlabel="share of right expert answers", ylabel="mean reward, held out")
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def draw_levels(axis, logs):
    """GRPO, the expert answers themselves, and the policy before training, over all shares."""
    runs = logs["grpo-quality1"]
    mean, low, high = two_level_interval(study.matrix(logs, "grpo-quality1", "reward"))
    ends = [min(suites.SHARES), 1.0]
    axis.fill_between(ends, [low] * 2, [high] * 2, color=colour("grpo"), alpha=0.15, linewidth=0)
    axis.plot(ends, [mean] * 2, color=colour("grpo"), label="GRPO, which does not read them")
    settings = next(iter(runs.values())).settings
    if settings.get("reward", "verifier") == "verifier":  # whose mean over expert answers is that share
        axis.plot(ends, ends, color=COLOURS["base"], linestyle=":", label="the expert answers themselves")
    before = np.mean([run.before["reward"].mean() for run in runs.values()])
    axis.axhline(before, color=COLOURS["base"], linewidth=0.8, label="before training")


# ------------------------------------------------------------------------------------------------------------
# UniAPL


def strengths(logs):
    """{lambda_adv: name} of the unified runs in the logs; CHORD is the one without an anchor."""
    found = {0.0: "chord", 0.1: "uniapl"}
    found |= {s: name for name, s in suites.STRENGTHS.items() if name.startswith("uniapl")}
    return {s: name for s, name in sorted(found.items()) if name in logs}


def uniapl(logs):
    """Final rewards of the pipelines, of the anchor's strengths, of its two forms, of the discriminators."""
    need(logs, "uniapl", "a-grpo", "shaping")  # of the comparison, and of the part itself
    figure = plt.figure(figsize=(WIDTH, 6.4))
    spec = figure.add_gridspec(3, 2)
    left = figure.add_subplot(spec[:, 0])
    dots(left, logs, present(logs, ("sft", "grpo", "sft-grpo", "uniapl", *suites.STAGED)), "reward")
    left.set(title="Pipelines and neighbours", xlabel="mean reward, held out")
    top, sweep = figure.add_subplot(spec[0, 1]), strengths(logs)
    mean, bars = means(logs, sweep.values())
    top.errorbar(range(len(sweep)), mean, bars, fmt="o-", color=COLOURS["uniapl"], capsize=2)
    top.set_xticks(range(len(sweep)), [f"{s:g}" for s in sweep])
    top.set(title="Strength of the anchor (unified)", xlabel="λ (0: CHORD)", ylabel="mean reward")
    rows = {
        "A loss of its own, or shaping": ("a-grpo", "shaping", "a-grpo-lambda1", "shaping-lambda1"),
        "Discriminator (unified)": ("uniapl", "uniapl-embedding", "uniapl-cotrained"),
    }
    for row, (title, names) in enumerate(rows.items(), start=1):
        axis = figure.add_subplot(spec[row, 1])
        dots(axis, logs, present(logs, names), "reward")
        axis.set(title=title, xlabel="mean reward, held out")
    return figure


def anchor(logs):
    """What the discriminator tells apart and what is left of exploration, over steps.

    A line for each strength, on the seeds that all have.
    """
    sweep = strengths(logs)
    if len(sweep) < 2:
        raise Absent("two strengths of the anchor")
    seeds = study.common_seeds(logs, sweep.values())
    same = {name: {seed: logs[name][seed] for seed in seeds} for name in sweep.values()}
    figure, axes = plt.subplots(1, 4, figsize=(WIDTH, 2.9))
    panels = {
        "score/accuracy": "Expert told from policy",
        "entropy": "Entropy, nats/token",
        "distinct/2": "Distinct bigrams",
        "length/mean": "Length, tokens",
    }
    shades = plt.get_cmap("cividis")(np.linspace(0.9, 0, len(sweep)))
    for axis, (metric, title) in zip(axes, panels.items()):
        for shade, (strength, name) in zip(shades, sweep.items()):
            if strength or metric != "score/accuracy":  # without an anchor there is no discriminator
                steps, rows = curves(same, name, metric)
                band(axis, steps, rows, name, f"λ = {strength:g}", window=5, color=shade)
        axis.set(title=title, xlabel="step")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=len(sweep))
    return figure
