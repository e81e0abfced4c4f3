"""curves.png of one run, from its metrics alone: `draw_curves(lines of metrics.jsonl, panels, path)`."""

import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = [
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
]  # Okabe and Ito's, distinguishable without colour vision


def draw_curves(lines, panels, path):
    """Small multiples over steps, written whole. panels: (title, y label, [metric names]); a metric nobody logged is left out."""
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
                ends = [[line[end] for line in lines if end in line] for end in ("eval/low", "eval/high")]
                axis.fill_between(x, *ends, color=colour, alpha=0.2, linewidth=0)
                axis.plot(x, y, "o-", color=colour, markersize=4, label="held-out, 95 % interval")
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
