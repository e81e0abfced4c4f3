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
    last = lines[-1]["step"]
    for axis, (title, label, names) in zip(axes.flat, panels):
        for step in stage_switches(lines):
            axis.axvline(step, color="black", linestyle=":", linewidth=0.8)
        axis.set_xlim(-0.03 * last, 1.03 * last)  # the same for what is logged in one stage only
        for name, colour in zip(names, COLOURS):
            draw_metric(axis, lines, name, colour)
        axis.set(title=title, ylabel=label, xlabel="step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path, dpi=110)


def stage_switches(lines):
    """The steps at which a staged run goes over to its next stage."""
    steps = []
    for before, line in zip(lines, lines[1:]):
        if line.get("stage") != before.get("stage", line.get("stage")):
            steps.append(line["step"])
    return steps


def draw_metric(axis, lines, name, colour):
    points = [(line["step"], line[name]) for line in lines if name in line]
    if not points:
        return
    x, y = zip(*points)
    if name == "eval/reward":
        draw_held_out(axis, lines, x, y, colour)
        return
    noisy = len(points) > 40 and name != "mu"  # mu is a schedule
    if noisy:  # a step's noise behind its running mean
        axis.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
    axis.plot(x, smooth(y) if noisy else y, color=colour, label=name.split("/")[-1])


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
    for (name, measured), colour in zip(info["evaluation"].items(), COLOURS):
        draw_reliability(axes[0], name, measured, colour)
        draw_by_length(axes[1], name, measured, colour)
    axes[0].plot([0.5, 1], [0.5, 1], ":", color="grey")
    axes[0].set(title="Reliability (area: pairs)", xlabel="sigmoid |score difference|")
    axes[0].set(ylabel="share that is right")
    axes[1].axhline(0.5, linestyle=":", color="grey")
    axes[1].set(title="Accuracy by length", xlabel="tokens(chosen) - tokens(rejected)", ylabel="accuracy")
    draw_history(axes[2], history)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        # The legend is below: the lines use all of the panel.
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    save_figure(figure, path, dpi=110)


def draw_reliability(axis, name, measured, colour):
    """The share that is right by confidence, a point's area by its number of pairs."""
    bins = measured["calibration"]["bins"]
    confidence, accuracy = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
    areas = [8 + 150 * b["n"] / measured["pairs"] for b in bins]
    axis.plot(
        confidence, accuracy, "-", color=colour, label=f"{name}\nECE {measured['calibration']['ece']:.3f}"
    )
    axis.scatter(confidence, accuracy, areas, color=colour)


def draw_by_length(axis, name, measured, colour):
    """Accuracy where the chosen answer is the shorter, and where it is the longer one."""
    middles = [(b["from"] + b["to"]) / 2 for b in measured["by_length"]]
    accuracy = [b["accuracy"] for b in measured["by_length"]]
    label = f"{name}\nprefers the longer: {measured['prefers_longer']:.2f}"
    axis.plot(middles, accuracy, "o-", color=colour, markersize=4, label=label)


def draw_history(axis, history):
    """A reward model's training, and the step that was kept."""
    for key, label, colour in (
        ("held_out/accuracy", "accuracy, stopping pairs", COLOURS[0]),
        ("train/loss", "loss, training pairs (nats)", COLOURS[1]),
        ("held_out/loss", "loss, stopping pairs (nats)", COLOURS[3]),
    ):
        points = [(line["step"], line[key]) for line in history if key in line]
        if points:
            axis.plot(*zip(*points), "o-", color=colour, markersize=3, label=label)
    if history and "best_step" in history[-1]:
        axis.axvline(history[-1]["best_step"], linestyle=":", color="grey", label="kept")
    axis.set(title="Training", xlabel="step")
