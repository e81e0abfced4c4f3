"""Every figure and table of the study, from its raw logs alone.

    python -m plots.figures --logs runs/tiny --out runs/tiny/figures

Writes results.md (all tables, each figure with what to look at), samples.md (the same prompts answered by every method) and the figures as PNG,
made for a width of 800 pixels. A part of the grid that was not run leaves its section out, and a line says so.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from engine.command_line import exit_status
from engine.draw import save_figure, smooth
from engine.record import write_whole
from plots import study, suites, tables
from plots.statistics import seed_band, two_level_interval
from plots.tables import label, present

# Okabe and Ito's palette, distinguishable without colour vision. A method has one colour everywhere; its variants have it too, with other marks.
COLOURS = {
    "base": "#999999", "sft": "#56B4E9", "dpo": "#CC79A7", "ppo": "#E69F00", "grpo": "#0072B2", "sft-grpo": "#000000", "grao": "#D55E00", "uniapl": "#009E73",
}  # fmt: skip
COLOURS |= {"ppo-4": COLOURS["ppo"]}
VARIANT = "#666666"  # pipelines and neighbours that are named beside their point
COMPARED = (*suites.COMPARED, "ppo-4")
WIDTH = 8.0  # inches; 100 of the README's pixels each
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "figure.constrained_layout.use": True, "savefig.dpi": 160, "svg.hashsalt": "0",
}  # fmt: skip


class Absent(Exception):
    """A figure's runs are not in the logs; the message names them."""


def need(logs, *names):
    absent = [label(name) for name in names if name not in logs]
    if absent:
        raise Absent(", ".join(absent))


def colour(name):
    return COLOURS.get(name) or next(
        (COLOURS[family] for family in ("uniapl", "grao") if name.startswith(family)), VARIANT
    )


def line_style(name):
    return "--" if name == "ppo-4" else "-"


def band(axis, x, rows, name, text=None, window=1, **style):
    """Mean of curves (S, T) over x with its 95 % band over seeds."""
    rows = np.array([smooth(list(row), window) for row in rows])
    mean, low, high = seed_band(rows)
    style = dict(color=colour(name), linestyle=line_style(name)) | style
    axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axis.plot(x, mean, label=label(name) if text is None else text, **style)


def curves(logs, name, metric, seeds=None):
    """(steps, (S, T)) of a metric; runs of another length are left out."""
    found = [logs[name][seed].curve(metric) for seed in (logs[name] if seeds is None else seeds)]
    steps = max((steps for steps, _ in found), key=len)
    rows = [values for own, values in found if len(own) == len(steps)]
    if not len(steps):
        raise Absent(f"{metric} of {label(name)}")
    return steps, np.array(rows)


def at_steps(logs, name, steps, of):
    """Median over seeds of a cumulative quantity at the given steps: of(log) -> (steps, values)."""
    rows = [np.interp(steps, *of(log)) for log in logs[name].values()]
    return np.median(rows, axis=0)


def dots(axis, logs, names, measure, percent=False, texts=True):
    """One row for each method: mean and 95 % interval over seeds and prompts."""
    scale = 100 if percent else 1
    for i, name in enumerate(names):
        mean, low, high = (scale * x for x in two_level_interval(study.matrix(logs, name, measure)))
        hollow = name == "ppo-4"
        axis.plot([low, high], [i, i], color=colour(name), linewidth=2, solid_capstyle="butt", zorder=2)
        axis.plot(
            mean, i, "o", color=colour(name), markerfacecolor="white" if hollow else colour(name), zorder=3
        )
    axis.set_yticks(range(len(names)), [label(name) for name in names] if texts else [""] * len(names))
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.tick_params(axis="y", length=0)


# ---------------------------------------------------------------------------------------------------------------------------------
# The figures: each takes the logs and returns a matplotlib figure, or raises Absent


def comparison(logs):
    names = present(logs, COMPARED)
    if not names:
        raise Absent("every method of the comparison")
    panels = {
        "ras": "RAS, %",
        "nag": "NAG, %",
        "reward": "mean reward",
        "kl": "KL to base,\nnats/answer",
        "tokens": "length, tokens",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 0.32 * len(names) + 0.9))
    for axis, (measure, text) in zip(axes, panels.items()):
        dots(axis, logs, names, measure, percent="%" in text, texts=axis is axes[0])
        axis.set_xlabel(text)
    experts = next(iter(logs[names[0]].values())).after["expert_reward"].mean()
    axes[2].axvline(experts, color=COLOURS["base"], linestyle=":", linewidth=1)
    return figure


def dynamics(logs):
    names = present(logs, COMPARED)
    need(logs, "grpo", "grao")
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 6.2), sharey=True)
    train, steps_axis, tokens_axis, time_axis = axes.flat
    for name in names:
        if any("reward/mean" in line for log in logs[name].values() for line in log.metrics):
            steps, rows = curves(logs, name, "reward/mean")
            band(train, steps, rows, name, "", window=5)
        steps, rows = curves(logs, name, "eval/reward")
        band(steps_axis, steps, rows, name)
        tokens = at_steps(logs, name, steps, study.Log.tokens) / 1000
        if tokens[-1]:
            band(tokens_axis, tokens, rows, name, "")
        band(time_axis, at_steps(logs, name, steps, study.Log.seconds), rows, name, "")
    target = curves(logs, "grpo", "eval/reward")[1][:, -1].mean()
    for axis in (steps_axis, tokens_axis, time_axis):
        axis.axhline(target, color=colour("grpo"), linestyle=":", linewidth=1)
    train.set(title="Training prompts", xlabel="step", ylabel="reward of samples (running mean of 5)")
    steps_axis.set(title="Held-out prompts", xlabel="step")
    tokens_axis.set(title="over generated tokens", xlabel="thousand tokens", ylabel="reward, held out")
    time_axis.set(title="over training time", xlabel="seconds")
    figure.legend(*steps_axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def ablations(logs):
    names = ("grao", *suites.ABLATIONS)
    need(logs, *names)
    seeds = study.common_seeds(logs, names)
    if not seeds:
        raise Absent("a seed that all ablations share")
    same = {name: {seed: logs[name][seed] for seed in seeds} for name in names}
    looks = dict(zip(names, (
        dict(linewidth=3, alpha=0.6), dict(color="#333333", linestyle="--"), dict(color="#666666", linestyle="-."), dict(color="#aaaaaa"),
        dict(color="#000000", linestyle=":", linewidth=1.6),
    )))  # fmt: skip
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.6), width_ratios=[3, 2])
    for name in names:
        steps, rows = curves(same, name, "reward/mean")
        band(left, steps, rows, name, window=5, **looks[name])
        mean, low, high = (100 * x for x in two_level_interval(study.matrix(same, name, "nag")))
        shade = looks[name].get("color", colour(name))
        right.plot([low, high], [names.index(name)] * 2, color=shade, linewidth=2)
        right.plot(
            mean,
            names.index(name),
            "o",
            color=shade,
            markerfacecolor="white" if name == "grao-equivalent" else shade,
        )
        right.annotate(label(name), (low, names.index(name)), (0, 6), textcoords="offset points", fontsize=8)
    left.set(
        xlabel="step",
        ylabel="reward of samples (running mean of 5)",
        title=f"Training prompts, {len(seeds)} seeds",
    )
    left.legend(fontsize=8)
    right.set(title="Held out", xlabel="NAG, %", ylim=(len(names) - 0.5, -0.5), yticks=[])
    right.grid(axis="x", color="#dddddd", linewidth=0.6)
    return figure


def components(logs):
    need(logs, "grao")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(WIDTH, 3.0))
    steps, rows = curves(logs, "grao", "loss")
    band(left, steps, rows, "grao", "")
    for (term, style), grey in zip(
        {"exploration": "-", "imitation": "--", "regularizer": ":"}.items(), ("#000000", "#666666", "#666666")
    ):
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
    betas, lambdas = (sorted({cell[i] for cell in cells}) for i in (0, 1))
    grid = np.full((len(betas), len(lambdas)), np.nan)
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.4))
    most = min(len(logs[name]) for name in cells.values())
    for (beta, lam), name in cells.items():
        mean, low, high = two_level_interval(study.matrix(logs, name, "reward", list(logs[name])[:most]))
        grid[betas.index(beta), lambdas.index(lam)] = mean
        x = suites.equivalent(beta, lam, suites.GROUP)[0]
        right.plot([x, x], [low, high], color=COLOURS["grao"], linewidth=0.8, alpha=0.5)
        right.plot(x, mean, "os^Dv"[lambdas.index(lam) % 5], color=COLOURS["grao"], markersize=5)
    image = left.imshow(grid, cmap="cividis", origin="lower", aspect="auto")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for i, j in np.ndindex(grid.shape):
        if np.isfinite(grid[i, j]):
            left.text(
                j,
                i,
                f"{grid[i, j]:.2f}",
                ha="center",
                va="center",
                color="black" if grid[i, j] > middle else "white",
            )
    left.set(xlabel="λ", ylabel="β", title=f"Mean reward, held out, {most} seed{'s' * (most > 1)}")
    left.set_xticks(range(len(lambdas)), [f"{x:g}" for x in lambdas])
    left.set_yticks(range(len(betas)), [f"{x:g}" for x in betas])
    left.spines[:].set_visible(False)
    figure.colorbar(image, ax=left)
    right.set(xlabel="β' = (β + λ/G) / (1 + λ)", ylabel="mean reward", title="The same cells over β'")
    marks = [
        plt.Line2D([], [], linestyle="", marker="os^Dv"[i % 5], color=COLOURS["grao"], label=f"λ = {lam:g}")
        for i, lam in enumerate(lambdas)
    ]
    right.legend(handles=marks, fontsize=8)
    return figure


def quality(logs):
    need(logs, "grpo-quality1")
    lines = {m: [s for s in suites.SHARES if f"{m}-quality{s:g}" in logs] for m in suites.IMITATORS}
    if not any(lines.values()):
        raise Absent("methods on expert answers of graded quality")
    figure, axis = plt.subplots(figsize=(WIDTH, 3.8))
    for i, (method, shares) in enumerate(lines.items()):
        if shares:
            found = [
                two_level_interval(study.matrix(logs, f"{method}-quality{s:g}", "reward")) for s in shares
            ]
            mean, low, high = map(np.array, zip(*found))
            apart = 0.006 * (i - (len(lines) - 1) / 2)  # else the bars lie on each other
            axis.errorbar(
                np.add(shares, apart),
                mean,
                [mean - low, high - mean],
                fmt="o-",
                color=colour(method),
                markersize=5,
                label=label(method),
            )
    mean, low, high = two_level_interval(study.matrix(logs, "grpo-quality1", "reward"))
    ends = [min(suites.SHARES), 1.0]
    axis.fill_between(ends, [low] * 2, [high] * 2, color=colour("grpo"), alpha=0.15, linewidth=0)
    axis.plot(ends, [mean] * 2, color=colour("grpo"), label="GRPO, which does not read them")
    if (
        next(iter(logs["grpo-quality1"].values())).settings.get("reward", "verifier") == "verifier"
    ):  # whose mean over expert answers is that share
        axis.plot(ends, ends, color=COLOURS["base"], linestyle=":", label="the expert answers themselves")
    axis.axhline(
        np.mean([run.before["reward"].mean() for run in logs["grpo-quality1"].values()]),
        color=COLOURS["base"],
        linewidth=0.8,
        label="before training",
    )
    axis.set(xlabel="share of right expert answers", ylabel="mean reward, held out")
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def strengths(logs):
    """{lambda_adv: name} of the unified runs in the logs; CHORD is the one without an anchor."""
    found = {0.0: "chord", 0.1: "uniapl"} | {
        s: n for n, s in suites.STRENGTHS.items() if n.startswith("uniapl")
    }
    return {s: name for s, name in sorted(found.items()) if name in logs}


def uniapl(logs):
    need(logs, "uniapl", "a-grpo", "shaping")  # of the comparison, and of the part itself
    sweep = strengths(logs)
    figure = plt.figure(figsize=(WIDTH, 6.4))
    spec = figure.add_gridspec(3, 2)
    pipelines = present(logs, ("sft", "grpo", "sft-grpo", "uniapl", *suites.STAGED))
    left = figure.add_subplot(spec[:, 0])
    dots(left, logs, pipelines, "reward")
    left.set(title="Pipelines and neighbours", xlabel="mean reward, held out")
    top = figure.add_subplot(spec[0, 1])
    found = [two_level_interval(study.matrix(logs, name, "reward")) for name in sweep.values()]
    mean, low, high = map(np.array, zip(*found))
    top.errorbar(
        range(len(sweep)), mean, [mean - low, high - mean], fmt="o-", color=COLOURS["uniapl"], capsize=2
    )
    top.set_xticks(range(len(sweep)), [f"{s:g}" for s in sweep])
    top.set(title="Strength of the anchor (unified)", xlabel="λ (0: CHORD)", ylabel="mean reward")
    for row, title, names in (
        (1, "A loss of its own, or shaping", ("a-grpo", "shaping", "a-grpo-lambda1", "shaping-lambda1")),
        (2, "Discriminator (unified)", ("uniapl", "uniapl-embedding", "uniapl-cotrained")),
    ):
        axis = figure.add_subplot(spec[row, 1])
        dots(axis, logs, present(logs, names), "reward")
        axis.set(title=title, xlabel="mean reward, held out")
    return figure


def anchor(logs):
    """What the discriminator tells apart and what is left of exploration, over steps: a line for each strength, on the seeds that all have."""
    sweep = strengths(logs)
    if len(sweep) < 2:
        raise Absent("two strengths of the anchor")
    seeds = study.common_seeds(logs, sweep.values())
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
                steps, rows = curves({name: {seed: logs[name][seed] for seed in seeds}}, name, metric)
                band(axis, steps, rows, name, f"λ = {strength:g}", window=5, color=shade)
        axis.set(title=title, xlabel="step")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=len(sweep))
    return figure


def distributions(logs):
    names = ("sft", "grpo", "uniapl")
    need(logs, *names)
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.2))
    expert = study.matrix(logs, "sft", "expert_tokens").ravel()
    lengths = {name: study.matrix(logs, name, "tokens").ravel() for name in names}
    top = np.quantile(np.concatenate([expert, *lengths.values()]), 0.995)
    bins = np.arange(0.5, top + 1.5) if top < 40 else np.linspace(0.5, top + 0.5, 40)
    scores = {name: study.matrix(logs, name, "logp_expert").ravel() for name in names}
    scores = {"base": np.concatenate([log.before["logp_expert"] for log in logs["sft"].values()])} | scores
    for name, values in ({"expert": expert} | lengths).items():
        style = dict(color="black", linestyle=":") if name == "expert" else dict(color=colour(name))
        left.hist(
            np.clip(values, 0, top),
            bins,
            density=True,
            histtype="step",
            linewidth=1.5,
            label="expert" if name == "expert" else label(name),
            **style,
        )
    for name, values in scores.items():
        values = np.sort(values)
        right.plot(values, np.linspace(0, 1, len(values)), color=colour(name), label=label(name))
    left.set(title="Length of held-out answers", xlabel="tokens", ylabel="share per token")
    lowest = np.quantile(np.concatenate(list(scores.values())), 0.01)
    right.set(
        title="Log-likelihood of expert answers",
        xlabel="mean log p, nats/token",
        ylabel="share of prompts below",
        xlim=(lowest, 0),
    )
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    return figure


def cost(logs):
    names = present(logs, (*COMPARED, *suites.STAGED, "uniapl-embedding", "uniapl-cotrained"))
    if len(names) < 2:
        raise Absent("two methods to compare")
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 4.2), sharey=True)
    rewards = {name: two_level_interval(study.matrix(logs, name, "reward")) for name in names}
    costs = {
        "thousand generated tokens": lambda log: log.tokens()[1][-1] / 1000,
        "seconds of training": lambda log: log.seconds()[1][-1],
    }
    marks = dict(zip((name for name in names if name not in COMPARED), "s^vDPX*<>hd"))
    for axis, (text, of) in zip(axes, costs.items()):
        for name in names:
            mean, low, high = rewards[name]
            x = np.median([of(log) for log in logs[name].values()])
            axis.plot([x, x], [low, high], color=colour(name), linewidth=0.8)
            face = "white" if name == "ppo-4" else colour(name)
            axis.plot(
                x,
                mean,
                marks.get(name, "o"),
                color=colour(name),
                markerfacecolor=face,
                label=label(name),
                clip_on=False,
            )
        axis.set(xlabel=text, xlim=(0, None))
    axes[0].set_ylabel("mean reward, held out")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


# File: (title, what to look at, figure, table).
SECTIONS = {
    "comparison": (
        "Comparison (the paper's tables 1 and 2)",
        "whether GRAO's interval clears the others', and what it pays in KL and length; dotted: the expert answers",
        comparison,
        tables.comparison,
    ),
    "dynamics": (
        "Dynamics (Fig. 2)",
        "where a curve first passes the dotted line, GRPO's final reward; the order changes with the axis",
        dynamics,
        tables.reach,
    ),
    "ablations": (
        "Ablations (Table 3, Fig. 3)",
        "the dotted black line on the wide orange one: without the regulariser and re-weighted it is the same run",
        ablations,
        tables.ablations,
    ),
    "components": (
        "Components (Fig. 4 and 5)",
        "imitation while the expert answers beat the samples, then exploration; below 0 they are pushed away",
        components,
        None,
    ),
    "sensitivity": (
        "Sensitivity to β and λ",
        "whether the cells fall on one curve over β': then λ does nothing that β could not",
        sensitivity,
        None,
    ),
    "quality": (
        "Imperfect expert answers",
        "where a method's line crosses GRPO's, and whether SFT stays below the expert answers it imitates",
        quality,
        tables.quality,
    ),
    "uniapl": (
        "UniAPL: staged, unified, anchored",
        "unified against SFT → GRPO, and whether the anchor (λ) moves anything beyond its interval",
        uniapl,
        tables.uniapl,
    ),
    "anchor": (
        "A stronger anchor",
        "whether accuracy falls towards 0.5, which is coming near or exploiting, and whether entropy and bigrams sink as λ grows",
        anchor,
        tables.anchor,
    ),
    "distributions": (
        "Lengths and expert log-likelihood",
        "which methods keep the expert's length, and which move away from the expert's answers",
        distributions,
        None,
    ),
    "cost": (
        "Cost against quality",
        "up and to the left is better: the same reward for fewer tokens or seconds",
        cost,
        None,
    ),
}


def draw(logs, out):
    """Write figures, results.md and samples.md into `out` -> names of the figures that were drawn."""
    out.mkdir(parents=True, exist_ok=True)
    drawn, first = [], next(iter(next(iter(logs.values())).values()))
    text = f"# Results: {first.config['study']['suite']}\n\n## Budgets\n\n{tables.budgets(logs)}"
    for name, (title, look, figure, table) in SECTIONS.items():
        text += f"\n## {title}\n\n"
        try:
            with plt.rc_context(STYLE):
                save_figure(figure(logs), out / f"{name}.png", metadata={"Software": None})
            drawn.append(name)
            text += f"What to look at: {look}.\n\n![{name}]({name}.png)\n"
            text += f"\n{table(logs)}" if table else ""
        except Absent as absent:
            plt.close("all")
            (out / f"{name}.png").unlink(missing_ok=True)
            note = f"{name}: left out, these runs are not in the logs: {absent}"
            print(note)
            text += note[0].upper() + note[1:] + ".\n"
    write_whole(out / "results.md", text)
    write_whole(out / "samples.md", tables.samples(logs))
    return drawn


def main(argv):
    parser = study.parser(__doc__)
    parser.add_argument("--logs", required=True, help="folder of plots.compare: NAME/seed-N/")
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args(argv)
    drawn = draw(study.load(args.logs), Path(args.out))
    print(f"{len(drawn)} figures, results.md and samples.md are in {args.out}")
    return True


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
