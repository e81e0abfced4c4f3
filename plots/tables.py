"""The study's tables as Markdown, from its logs alone: budgets, comparison, steps to GRPO's reward, answers.

The tables of the suite's other parts are in plots/tables_parts.py.
"""

import numpy as np

from engine.measures import compare
from plots import suites
from plots.statistics import compare_paired, holm, reach_ratio
from plots.study import common_seeds, matrix
from plots.words import (
    LABELS,
    difference,
    floor_note,
    interval,
    label,
    markdown,
    missing_note,
    present,
    quoted,
)

COMPARED = (*suites.COMPARED, "ppo-4")

# arXiv 2508.07750, tables 1 to 3: (RAS, NAG) in percent of Qwen2.5-7B and Moonlight-16B; judge DeepSeek-V3.
PAPER = {
    "helpful": {
        "sft": ((30.95, 0.28), (43.45, -1.64)),
        "dpo": ((57.75, 54.12), (56.24, 26.20)),
        "ppo": ((60.87, 60.27), (64.37, 40.35)),
        "grpo": ((60.89, 60.74), (68.89, 50.82)),
        "grao": ((64.60, 67.98), (70.84, 55.06)),
    },
    "harmless": {
        "sft": ((51.43, 0.61), (60.52, 0.34)),
        "dpo": ((61.86, 25.32), (62.49, 3.98)),
        "ppo": ((66.11, 27.79), (70.97, 20.16)),
        "grpo": ((65.61, 28.26), (68.08, 12.11)),
        "grao": ((68.01, 31.06), (76.82, 34.85)),
    },
}


# ------------------------------------------------------------------------------------------------------------
# Budgets


def budgets(logs):
    """What every method was given: steps, updates, samples, tokens, rate and its source, seconds."""
    header = ["", "seeds", "steps", "optimiser updates", "prompts a step", "samples", "generated tokens"]
    header += ["learning rate", "chosen from (reward on training prompts)", "s a run"]
    rows = [budget(name, logs[name]) for name in sorted(logs, key=list(suites.METHODS).index)]
    environments = [run.config["environment"] for runs in logs.values() for run in runs.values()]
    about, commits = environments[0], sorted({str(each["commit"]) for each in environments})
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    return markdown(header, rows) + (
        "\nSamples: prompts × G × the steps that sample. Samples drawn to train a fixed discriminator and "
        "for evaluation are not counted. Seconds: median, training alone, "
        f"{about['gpu'] or about['machine']}; {versions}; commit {', '.join(commits)}.\n"
    )


def budget(name, runs):
    """A method's row, of its runs {seed: Log}."""
    runs = list(runs.values())
    c = runs[0].settings
    updates = runs[0].last("updates", c["steps"])
    sampling_steps = sum("tokens/generated" in line for line in runs[0].metrics)
    drawn = sampling_steps * c["prompts_per_step"] * c["group_size"]
    tokens = np.mean([run.tokens()[1][-1] for run in runs])
    seconds = np.median([run.seconds()[1][-1] for run in runs])
    rates = f"{c['lr']:g}" + (f", then {c['switch_lr']:g}" if c.get("switch_lr") else "")
    row = [label(name), len(runs), c["steps"], f"{updates:g}", c["prompts_per_step"], f"{drawn:,}"]
    return [*row, f"{tokens:,.0f}", rates, runs[0].config["study"]["learning_rate"], f"{seconds:.0f}"]


# ------------------------------------------------------------------------------------------------------------
# The comparison


def comparison(logs):
    """Every method beside the policy before training; GRAO's paired tests; the paper's numbers."""
    names = present(logs, COMPARED)
    first = next(iter(logs[names[0]].values()))
    judged = "judge_reward" in first.after
    header = ["", "seeds", "RAS, %", "NAG, %", "mean reward", *(["by the judge"] if judged else [])]
    header += ["KL to base, nats/answer", "length, tokens", "cut, %"]
    rows = [before_training(logs[names[0]], judged)]
    rows += [compared(logs, name, judged) for name in names]
    text = markdown(header, rows) + missing_note(logs, suites.COMPARED)
    text += "\nMean and 95 % interval, seeds and held-out prompts redrawn. "
    text += "NAG is wins minus losses against the policy before training. "
    text += f"Mean reward of the expert answers: {first.after['expert_reward'].mean():.3f}."
    if judged:
        text += " RAS and NAG are by the second reward model, which no run was trained with: "
        text += "its raw scores, without the mean reward's penalty for a cut answer."
    tests = paired(logs, names, "judged" if judged else "reward")
    return text + "\n" + floor_note(logs, names) + "\n" + tests + "\n" + paper(logs, names)


def before_training(runs, judged):
    """The row of the policy that all runs start from, of one method's runs {seed: Log}."""

    def column(name):
        return np.array([log.before[name] for log in runs.values()])

    prefix = "judge_" if judged else ""
    wins = compare(column(prefix + "reward"), column(prefix + "expert_reward")) > 0
    row = [LABELS["base"], len(runs), interval(wins, percent=True), "", interval(column("reward"))]
    if judged:
        row.append(interval(column("judge_reward")))
    return [*row, "0", interval(column("tokens"), 1), f"{100 * column('truncated').mean():.1f}"]


def compared(logs, name, judged):
    """A method's row."""

    def column(measure):
        return matrix(logs, name, measure)

    row = [f"**{label(name)}**" if name == "grao" else label(name), len(logs[name])]
    row += [interval(column("ras"), percent=True), interval(column("nag"), percent=True, sign=True)]
    row.append(interval(column("reward")))
    if judged:
        row.append(interval(column("judged")))
    row += [interval(column("kl"), 2), interval(column("tokens"), 1)]
    return [*row, f"{100 * column('truncated').mean():.1f}"]


def paired(logs, names, measure):
    """GRAO against each of the others, on the same seeds and prompts, Holm-corrected."""
    others = [name for name in names if name != "grao"]
    if "grao" not in names or not others:
        return "GRAO or what to compare it with is not in these logs, so there is no paired test.\n"
    found = []
    for name in others:
        seeds = common_seeds(logs, ["grao", name])
        if seeds:
            result = compare_paired(matrix(logs, "grao", measure, seeds), matrix(logs, name, measure, seeds))
            found.append((name, seeds, result))
    rows = []
    for (name, seeds, r), p in zip(found, holm([r["p"] for *_, r in found])):
        corrected = f"**{p:.2g}**" if p < 0.05 else f"{p:.2g}"
        row = [f"GRAO − {label(name)}", len(seeds), difference(r), f"{r['p']:.2g}", corrected, r["unit"]]
        rows.append(row)
    title = "mean reward" + (" by the judge" if measure == "judged" else "")
    return markdown([title, "seeds", "difference", "p", "p, Holm", "flipped"], rows) + (
        "\nSign-flip permutation test of the paired differences (same seed, same prompts), two-sided. "
        "Flipped: seeds where there are six or more; otherwise prompts, which says nothing about seeds that "
        "were not run.\n"
    )


def paper(logs, names):
    """Our RAS and NAG beside the paper's."""
    header, rows = ["RAS / NAG, %", "ours"], []
    for data in PAPER:
        header += [f"paper: {model}, {data}-base" for model in ("Qwen2.5-7B", "Moonlight-16B")]
    for name in names:
        ours = " / ".join(f"{100 * matrix(logs, name, measure).mean():.1f}" for measure in ("ras", "nag"))
        row = [label(name), ours]
        for table in PAPER.values():
            row += ["{:.2f} / {:.2f}".format(*cell) for cell in table.get(name, ())]
        rows.append(row + ["–"] * (len(header) - len(row)))
    return markdown(header, rows) + (
        "\nThe paper: HH-RLHF, a judge (DeepSeek-V3) that compares with y_ref; other models, "
        "data and reward than ours.\n"
    )


def reach(logs):
    """Steps until the mean held-out reward is what GRPO's is at its end."""
    rows = []
    for name in present(logs, COMPARED) if "grpo" in logs else []:
        row = reach_row(logs, name)
        if row:
            rows.append(row)
    if not rows:
        return "GRPO is not in these logs, so there is no reward of its to reach.\n"
    header = ["", "seeds", "steps to GRPO's final reward", "of GRPO's steps [95 %]"]
    target = np.mean([log.last("eval/reward") for log in logs["grpo"].values()])
    return markdown([*header, "redraws that never get there"], rows) + (
        f"\nGRPO's final mean held-out reward is {target:.3f} over its {len(logs['grpo'])} seeds; a method "
        "with fewer is compared on those it has. Means over seeds, linear between evaluations, seeds "
        "redrawn. The paper says about half the steps for GRAO.\n"
    )


def reach_row(logs, name):
    """A method's row, or None where it shares no seed or no evaluated steps with GRPO."""
    seeds = common_seeds(logs, ["grpo", name])
    if not seeds:
        return None
    steps, _ = logs["grpo"][seeds[0]].curve("eval/reward")
    ours = [logs[name][seed].curve("eval/reward")[1] for seed in seeds]
    theirs = [logs["grpo"][seed].curve("eval/reward")[1] for seed in seeds]
    if len({len(row) for row in [*ours, *theirs]}) > 1:
        return None
    r = reach_ratio(steps, ours, theirs)
    written = []
    for x in (r["ratio"], r["low"], r["high"]):
        written.append(f"{x:.2f}" if np.isfinite(x) else "never")
    here = f"{r['a']:.1f}" if np.isfinite(r["a"]) else f"not in {steps[-1]}"
    return [label(name), len(seeds), here, "{} [{}, {}]".format(*written), f"{r['never']:.0%}"]


# ------------------------------------------------------------------------------------------------------------
# Answers


def samples(logs, count=6):
    """The same held-out prompts answered by every method, one seed.

    Logs whose texts were taken out, as of data not to be published, are left out.
    """
    names = present(logs, COMPARED) or sorted(logs)
    seed = min(common_seeds(logs, names), default=None)
    if seed is None:
        return "The methods have no seed in common.\n"
    names = [name for name in names if logs[name][seed].after.get("texts")]
    if not names:
        return "The logs hold no texts.\n"
    first = logs[names[0]][seed]
    text = f"# The same prompts, answered by every method (seed {seed})\n\nIn brackets: the reward.\n"
    for i, before in enumerate(first.before["texts"][:count]):
        prompt = before["prompt"] if isinstance(before["prompt"], str) else before["prompt"][-1]["content"]
        rows = [
            ["expert", f"{quoted(before['expert'])} ({first.after['expert_reward'][i]:g})"],
            ["before training", f"{quoted(before['completion'])} ({first.before['reward'][i]:g})"],
        ]
        rows += [[label(name), answer(logs[name][seed].after, i, before["prompt"])] for name in names]
        text += f"\n**{quoted(prompt, 600)}**\n\n" + markdown(["", ""], rows)
    return text


def answer(after, i, prompt):
    """A run's i-th answer with its reward, if it is to this prompt."""
    if after["texts"][i]["prompt"] != prompt:
        return "(other prompts)"
    return f"{quoted(after['texts'][i]['completion'])} ({after['reward'][i]:g})"
