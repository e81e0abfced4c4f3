"""curves.png of one run, from its metrics alone: `draw_curves(lines of metrics.jsonl, panels, path)`."""

import math
import os

# A notebook exports a backend of its own to what it starts. Where the module behind it is not installed,
# importing matplotlib fails on that alone, and pictures are only written to files here.
os.environ["MPLBACKEND"] = "Agg"
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]  # Okabe and Ito's: told apart without colour vision


def draw_curves(lines, panels, path):
    """Small multiples over steps, written whole.

    panels: (title, y label, [metric names]); a metric nobody logged is left out.
    """
    panels = [p for p in panels if any(name in line for line in lines for name in p[2])]
    rows = math.ceil(len(panels) / 3)
    figure, axes = plt.subplots(rows, 3, figsize=(12, 3 * rows), squeeze=False, constrained_layout=True)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    switches = [
        line["step"]
        for before, line in zip(lines, lines[1:])
        if line.get("stage") != before.get("stage", line.get("stage"))
    ]
    for axis, (title, label, names) in zip(axes.flat, panels):
        for step in switches:
            axis.axvline(step, color="black", linestyle=":", linewidth=0.8)
        axis.set_xlim(
            -0.03 * lines[-1]["step"], 1.03 * lines[-1]["step"]
        )  # the same for what is logged in one stage only
        for name, colour in zip(names, COLOURS):
            points = [(line["step"], line[name]) for line in lines if name in line]
            if not points:
                continue
            x, y = zip(*points)
            short = name.split("/")[-1]
            if name == "eval/reward":
                draw_held_out(axis, lines, x, y, colour)
            elif (
                len(points) > 40 and name != "mu"
            ):  # a step's noise behind its running mean; mu is a schedule
                axis.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
                axis.plot(x, smooth(y), color=colour, label=short)
            else:
                axis.plot(x, y, color=colour, label=short)
        axis.set(title=title, ylabel=label, xlabel="step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path, dpi=110)


def draw_held_out(axis, lines, x, y, colour):
    """The held-out reward with its interval, which a run with few held-out prompts does not log."""
    low = [line["eval/low"] for line in lines if "eval/low" in line]
    high = [line["eval/high"] for line in lines if "eval/high" in line]
    if low:
        axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    label = "held-out, 95 % interval" if low else "held-out"
    axis.plot(x, y, "o-", color=colour, markersize=4, label=label)


def save_figure(figure, path, **options):
    """Write a figure whole or not at all, and close it. options: of savefig."""
    tmp = path.with_name(f".{path.stem}.tmp.png")
    try:
        figure.savefig(tmp, **options)
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)
        plt.close(figure)


def smooth(y, window=9):
    """Centred running mean, shorter at the ends."""
    half = window // 2
    return [sum(part) / len(part) for part in (y[max(0, i - half) : i + half + 1] for i in range(len(y)))]


def draw_calibration(info, history, path):
    """Reliability, accuracy by length, and training, written whole.

    info: reward_model.json; history: lines of metrics.jsonl.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), constrained_layout=True)
    for (name, m), colour in zip(info["evaluation"].items(), COLOURS):
        bins = m["calibration"]["bins"]
        axes[0].plot(
            [b["confidence"] for b in bins],
            [b["accuracy"] for b in bins],
            "-",
            color=colour,
            label=f"{name}\nECE {m['calibration']['ece']:.3f}",
        )
        axes[0].scatter(
            [b["confidence"] for b in bins],
            [b["accuracy"] for b in bins],
            [8 + 150 * b["n"] / m["pairs"] for b in bins],
            color=colour,
        )
        points = [((b["from"] + b["to"]) / 2, b["accuracy"]) for b in m["by_length"]]
        axes[1].plot(
            *zip(*points),
            "o-",
            color=colour,
            markersize=4,
            label=f"{name}\nprefers the longer: {m['prefers_longer']:.2f}",
        )
    axes[0].plot([0.5, 1], [0.5, 1], ":", color="grey")
    axes[0].set(
        title="Reliability (area: pairs)", xlabel="sigmoid |score difference|", ylabel="share that is right"
    )
    axes[1].axhline(0.5, linestyle=":", color="grey")
    axes[1].set(title="Accuracy by length", xlabel="tokens(chosen) - tokens(rejected)", ylabel="accuracy")
    for key, label, colour in (
        ("held_out/accuracy", "accuracy, stopping pairs", COLOURS[0]),
        ("train/loss", "loss, training pairs (nats)", COLOURS[1]),
        ("held_out/loss", "loss, stopping pairs (nats)", COLOURS[3]),
    ):
        points = [(line["step"], line[key]) for line in history if key in line]
        if points:
            axes[2].plot(*zip(*points), "o-", color=colour, markersize=3, label=label)
    if history and "best_step" in history[-1]:
        axes[2].axvline(history[-1]["best_step"], linestyle=":", color="grey", label="kept")
    axes[2].set(title="Training", xlabel="step")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(
            frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16)
        )  # below: the lines use all of the panel
    save_figure(figure, path, dpi=110)
