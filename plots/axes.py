"""What the study's figures share: a method's colour, curves with bands, rows of dots with intervals."""

import numpy as np

from engine.draw import smooth
from plots import study, suites
from plots.statistics import seed_band, two_level_interval
from plots.words import label

# Okabe and Ito's palette, distinguishable without colour vision. A method has one colour everywhere; its
# variants have it too, with other marks.
COLOURS = {
    "base": "#999999",
    "sft": "#56B4E9",
    "dpo": "#CC79A7",
    "ppo": "#E69F00",
    "ppo-4": "#E69F00",
    "grpo": "#0072B2",
    "sft-grpo": "#000000",
    "grao": "#D55E00",
    "uniapl": "#009E73",
}
VARIANT = "#666666"  # pipelines and neighbours that are named beside their point
COMPARED = (*suites.COMPARED, "ppo-4")
WIDTH = 8.0  # inches; 100 of the README's pixels each
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
    "svg.hashsalt": "0",
}


class Absent(Exception):
    """A figure's runs are not in the logs; the message names them."""


def need(logs, *names):
    absent = [label(name) for name in names if name not in logs]
    if absent:
        raise Absent(", ".join(absent))


def colour(name):
    if name in COLOURS:
        return COLOURS[name]
    for family in ("uniapl", "grao"):
        if name.startswith(family):
            return COLOURS[family]
    return VARIANT


def line_style(name):
    return "--" if name == "ppo-4" else "-"


def face(name):
    """The filling of a method's mark: PPO's second version is hollow."""
    return "white" if name == "ppo-4" else colour(name)


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
        mean, low, high = two_level_interval(study.matrix(logs, name, measure))
        ends = [scale * low, scale * high]
        axis.plot(ends, [i, i], color=colour(name), linewidth=2, solid_capstyle="butt", zorder=2)
        axis.plot(scale * mean, i, "o", color=colour(name), markerfacecolor=face(name), zorder=3)
    axis.set_yticks(range(len(names)), [label(name) for name in names] if texts else [""] * len(names))
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.tick_params(axis="y", length=0)


def means(logs, names, measure="reward"):
    """(mean, interval's distance below, above), each (N,): what errorbar takes."""
    found = np.array([two_level_interval(study.matrix(logs, name, measure)) for name in names])
    mean, low, high = found.T
    return mean, [mean - low, high - mean]
