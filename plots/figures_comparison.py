"""The figures of the comparison: who wins, how a run gets there, what its answers are like, what it costs."""

import numpy as np

from engine.draw import plt
from plots import study, suites
from plots.axes import COLOURS, COMPARED, WIDTH, Absent, at_steps, band, colour, curves, dots, face, need
from plots.statistics import two_level_interval
from plots.words import label, present


def comparison(logs):
    """A panel for each measure, a row for each method."""
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
    """Reward over steps, tokens and seconds; the dotted line is GRPO's last one."""
    need(logs, "grpo", "grao")
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 6.2), sharey=True)
    train, by_step, by_token, by_second = axes.flat
    for name in present(logs, COMPARED):
        if any("reward/mean" in line for log in logs[name].values() for line in log.metrics):
            steps, rows = curves(logs, name, "reward/mean")
            band(train, steps, rows, name, "", window=5)
        steps, rows = curves(logs, name, "eval/reward")
        band(by_step, steps, rows, name)
        tokens = at_steps(logs, name, steps, study.Log.tokens) / 1000
        if tokens[-1]:
            band(by_token, tokens, rows, name, "")
        band(by_second, at_steps(logs, name, steps, study.Log.seconds), rows, name, "")
    target = curves(logs, "grpo", "eval/reward")[1][:, -1].mean()
    for axis in (by_step, by_token, by_second):
        axis.axhline(target, color=colour("grpo"), linestyle=":", linewidth=1)
    train.set(title="Training prompts", xlabel="step", ylabel="reward of samples (running mean of 5)")
    by_step.set(title="Held-out prompts", xlabel="step")
    by_token.set(title="over generated tokens", xlabel="thousand tokens", ylabel="reward, held out")
    by_second.set(title="over training time", xlabel="seconds")
    figure.legend(*by_step.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def distributions(logs):
    """Lengths of held-out answers, and log-likelihoods of the experts', of three methods."""
    names = ("sft", "grpo", "uniapl")
    need(logs, *names)
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.2))
    draw_lengths(left, logs, names)
    base = np.concatenate([log.before["logp_expert"] for log in logs["sft"].values()])
    scores = {"base": base} | {name: study.matrix(logs, name, "logp_expert").ravel() for name in names}
    for name, values in scores.items():
        shares = np.linspace(0, 1, len(values))
        right.plot(np.sort(values), shares, color=colour(name), label=label(name))
    lowest = np.quantile(np.concatenate(list(scores.values())), 0.01)
    right.set(title="Log-likelihood of expert answers", xlabel="mean log p, nats/token")
    right.set(ylabel="share of prompts below", xlim=(lowest, 0))
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    return figure


def draw_lengths(axis, logs, names):
    """Histograms of answers' lengths, the expert's dotted; the longest 0.5 % are drawn in the last bar."""
    expert = study.matrix(logs, "sft", "expert_tokens").ravel()
    lengths = {name: study.matrix(logs, name, "tokens").ravel() for name in names}
    top = np.quantile(np.concatenate([expert, *lengths.values()]), 0.995)
    bins = np.arange(0.5, top + 1.5) if top < 40 else np.linspace(0.5, top + 0.5, 40)
    common = dict(density=True, histtype="step", linewidth=1.5)
    axis.hist(np.clip(expert, 0, top), bins, label="expert", color="black", linestyle=":", **common)
    for name, values in lengths.items():
        axis.hist(np.clip(values, 0, top), bins, label=label(name), color=colour(name), **common)
    axis.set(title="Length of held-out answers", xlabel="tokens", ylabel="share per token")


def cost(logs):
    """Final reward over generated tokens, and over seconds of training."""
    names = present(logs, (*COMPARED, *suites.STAGED, "uniapl-embedding", "uniapl-cotrained"))
    if len(names) < 2:
        raise Absent("two methods to compare")
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 4.2), sharey=True)
    costs = {
        "thousand generated tokens": lambda log: log.tokens()[1][-1] / 1000,
        "seconds of training": lambda log: log.seconds()[1][-1],
    }
    marks = dict(zip((name for name in names if name not in COMPARED), "s^vDPX*<>hd"))
    for name in names:
        mean, low, high = two_level_interval(study.matrix(logs, name, "reward"))
        style = dict(color=colour(name), markerfacecolor=face(name), label=label(name), clip_on=False)
        for axis, of in zip(axes, costs.values()):
            x = np.median([of(log) for log in logs[name].values()])
            axis.plot([x, x], [low, high], color=colour(name), linewidth=0.8)
            axis.plot(x, mean, marks.get(name, "o"), **style)
    for axis, text in zip(axes, costs):
        axis.set(xlabel=text, xlim=(0, None))
    axes[0].set_ylabel("mean reward, held out")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure
