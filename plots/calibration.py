"""calibration.png of a reward model, from its files: `python -m plots.calibration runs/reward`."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from plots.curves import COLOURS, save_figure


def draw_calibration(info, history, path):
    """Reliability, accuracy by length, and training, written whole. info: reward_model.json; history: lines of metrics.jsonl."""
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


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    draw_calibration(
        json.loads((folder / "reward_model.json").read_text()), lines, folder / "calibration.png"
    )
