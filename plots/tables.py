"""The study's tables as Markdown, from its logs alone: budgets, comparison, steps to GRPO's reward, and one for every other part."""

import numpy as np

from plots import suites
from plots.statistics import compare_paired, holm, reach_ratio, two_level_interval
from plots.study import common_seeds, matrix

LABELS = {
    "base": "before training", "sft": "SFT", "dpo": "DPO", "ppo": "PPO", "ppo-4": "PPO, 4 updates", "grpo": "GRPO", "sft-grpo": "SFT → GRPO",
    "grao": "GRAO", "uniapl": "UniAPL (unified)", "chord": "CHORD (unified, λ = 0)", "a-sft": "A-SFT", "a-grpo": "A-GRPO", "sft-a-grpo": "SFT → A-GRPO",
    "a-sft-a-grpo": "A-SFT → A-GRPO", "ptx": "GRPO + 0.1 SFT (ptx)", "luffy": "LUFFY", "hpt": "HPT", "shaping": "shaped reward",
    "uniapl-embedding": "unified, embedding", "uniapl-cotrained": "unified, co-trained", "uniapl-lambda0.3": "unified, λ = 0.3",
    "uniapl-lambda1": "unified, λ = 1", "uniapl-lambda3": "unified, λ = 3", "a-grpo-lambda1": "A-GRPO, λ = 1", "shaping-lambda1": "shaped reward, λ = 1",
    "grao-without-imitation": "without imitation", "grao-without-exploration": "without exploration",
    "grao-without-regularizer": "without regulariser", "grao-equivalent": "without regulariser, re-weighted",
}  # fmt: skip

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
PAPER_ABLATIONS = {  # NAG on helpful-base
    "grao": (67.98, 55.06),
    "grao-without-imitation": (63.79, 49.87),
    "grao-without-exploration": (64.38, 43.86),
    "grao-without-regularizer": (61.18, 46.26),
}


def label(name):
    if name in suites.SENSITIVITY:
        return "GRAO, β = {:g}, λ = {:g}".format(*suites.SENSITIVITY[name])
    if name in suites.QUALITY:
        method, share = suites.QUALITY[name]
        return f"{LABELS[method]}, {share:.0%} right"
    return LABELS.get(name, name)


def markdown(header, rows):
    return (
        "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows))
        + "\n"
    )


def interval(values, digits=3, percent=False, sign=False):
    """A matrix (S, P) -> "mean [low, high]"."""
    scale, digits = (100, 1) if percent else (1, digits)
    mean, low, high = (
        round(scale * x, digits) + 0.0 for x in two_level_interval(values)
    )  # + 0.0: never -0.0
    plus = "+" if sign else ""
    return f"{mean:{plus}.{digits}f} [{low:{plus}.{digits}f}, {high:{plus}.{digits}f}]"


def present(logs, names):
    return [name for name in names if name in logs]


def missing_note(logs, names):
    absent = [LABELS.get(name, name) for name in names if name not in logs]
    return f"\nNot run: {', '.join(absent)}.\n" if absent else ""


# ---------------------------------------------------------------------------------------------------------------------------------
# Budgets


def budgets(logs):
    """What every method was given: steps, samples, generated tokens, updates, learning rate and where it is from, seconds."""
    rows = []
    for name in sorted(logs, key=list(suites.METHODS).index):
        runs = list(logs[name].values())
        c, sampled = runs[0].settings, [run.tokens()[1][-1] for run in runs]
        sampling = sum("tokens/generated" in line for line in runs[0].metrics)
        updates = runs[0].last("updates", c["steps"])
        rates = f"{c['lr']:g}" + (f", then {c['switch_lr']:g}" if c.get("switch_lr") else "")
        seconds = np.median([run.seconds()[1][-1] for run in runs])
        drawn = sampling * c["prompts_per_step"] * c["group_size"]
        rows.append(
            [
                label(name),
                len(runs),
                c["steps"],
                f"{updates:g}",
                c["prompts_per_step"],
                f"{drawn:,}",
                f"{np.mean(sampled):,.0f}",
                rates,
                runs[0].config["study"]["learning_rate"],
                f"{seconds:.0f}",
            ]
        )
    header = [
        "",
        "seeds",
        "steps",
        "optimiser updates",
        "prompts a step",
        "samples",
        "generated tokens",
        "learning rate",
    ]
    text = markdown([*header, "chosen from (reward on training prompts)", "s a run"], rows)
    environments = [run.config["environment"] for runs in logs.values() for run in runs.values()]
    about, commits = environments[0], sorted({str(each["commit"]) for each in environments})
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    return text + (
        f"\nSamples: prompts × G × the steps that sample. Samples drawn to train a fixed discriminator and for evaluation are not counted. Seconds: median, "
        f"training alone, {about['gpu'] or about['machine']}; {versions}; commit {', '.join(commits)}.\n"
    )


# ---------------------------------------------------------------------------------------------------------------------------------
# The comparison


def comparison(logs):
    names = present(logs, (*suites.COMPARED, "ppo-4"))
    seeds = {name: list(logs[name]) for name in names}
    judged = "judge_reward" in logs[names[0]][seeds[names[0]][0]].after
    some = logs[names[0]]
    base = {
        k: np.array([log.before[k] for log in some.values()])
        for k in next(iter(some.values())).before
        if k not in ("step", "texts")
    }
    prefix = "judge_" if judged else ""
    header = [
        "",
        "seeds",
        "RAS, %",
        "NAG, %",
        "mean reward",
        *(["by the judge"] if judged else []),
        "KL to base, nats/answer",
        "length, tokens",
        "cut, %",
    ]
    rows = [
        [
            LABELS["base"],
            len(some),
            interval(base[prefix + "reward"] > base[prefix + "expert_reward"], percent=True),
            "",
            interval(base["reward"]),
            *([interval(base["judge_reward"])] if judged else []),
            "0",
            interval(base["tokens"], 1),
            f"{100 * base['truncated'].mean():.1f}",
        ]
    ]
    for name in names:
        m = {
            measure: matrix(logs, name, measure)
            for measure in (
                "ras",
                "nag",
                "reward",
                "kl",
                "tokens",
                "truncated",
                *(["judged"] if judged else []),
            )
        }
        rows.append(
            [
                f"**{label(name)}**" if name == "grao" else label(name),
                len(seeds[name]),
                interval(m["ras"], percent=True),
                interval(m["nag"], percent=True, sign=True),
                interval(m["reward"]),
                *([interval(m["judged"])] if judged else []),
                interval(m["kl"], 2),
                interval(m["tokens"], 1),
                f"{100 * m['truncated'].mean():.1f}",
            ]
        )
    share = np.mean(some[seeds[names[0]][0]].after["expert_reward"])
    text = markdown(header, rows) + missing_note(logs, suites.COMPARED)
    text += "\nMean and 95 % interval, seeds and held-out prompts redrawn. NAG is wins minus losses against the policy before training. "
    text += f"Mean reward of the expert answers: {share:.3f}."
    if judged:
        text += " RAS and NAG are by the second reward model, which no run was trained with: its raw scores, without the mean reward's penalty for a cut answer."
    return text + "\n\n" + paired(logs, names, "judged" if judged else "reward") + "\n" + paper(logs, names)


def paired(logs, names, measure):
    """GRAO against each of the others, on the same seeds and prompts, Holm-corrected."""
    others = [name for name in names if name != "grao"]
    if "grao" not in names or not others:
        return "GRAO or what to compare it with is not in these logs, so there is no paired test.\n"
    found = []
    for name in others:
        seeds = common_seeds(logs, ["grao", name])
        if seeds:
            found.append(
                (name, seeds, compare_paired(*(matrix(logs, n, measure, seeds) for n in ("grao", name))))
            )
    rows = []
    for (name, seeds, r), p in zip(found, holm([r["p"] for *_, r in found])):
        rows.append(
            [
                f"GRAO − {label(name)}",
                len(seeds),
                difference(r),
                f"{r['p']:.2g}",
                f"**{p:.2g}**" if p < 0.05 else f"{p:.2g}",
                r["unit"],
            ]
        )
    text = markdown(
        [
            "mean reward" + (" by the judge" if measure == "judged" else ""),
            "seeds",
            "difference",
            "p",
            "p, Holm",
            "flipped",
        ],
        rows,
    )
    return text + (
        "\nSign-flip permutation test of the paired differences (same seed, same prompts), two-sided. Flipped: seeds where there are six or more; "
        "otherwise prompts, which says nothing about seeds that were not run.\n"
    )


def difference(r):
    """compare_paired's result as text: the mean difference and its 95 % interval."""
    return "{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**r)


def paper(logs, names):
    """Our RAS and NAG beside the paper's."""
    header, rows = ["RAS / NAG, %", "ours"], []
    header += [f"paper: {model}, {data}-base" for data in PAPER for model in ("Qwen2.5-7B", "Moonlight-16B")]
    for name in names:
        ours = " / ".join(f"{100 * matrix(logs, name, measure).mean():.1f}" for measure in ("ras", "nag"))
        rows.append(
            [
                label(name),
                ours,
                *(
                    f"{cell[0]:.2f} / {cell[1]:.2f}"
                    for table in PAPER.values()
                    for cell in table.get(name, ())
                ),
            ]
        )
        rows[-1] += ["–"] * (len(header) - len(rows[-1]))
    return (
        markdown(header, rows)
        + "\nThe paper: HH-RLHF, a judge (DeepSeek-V3) that compares with y_ref; other models, data and reward than ours.\n"
    )


# ---------------------------------------------------------------------------------------------------------------------------------
# The other parts


def reach(logs):
    """Steps until the mean held-out reward is what GRPO's is at its end."""
    rows = []
    for name in present(logs, (*suites.COMPARED, "ppo-4")) if "grpo" in logs else []:
        seeds = common_seeds(logs, ["grpo", name])
        if not seeds:
            continue
        steps, _ = logs["grpo"][seeds[0]].curve("eval/reward")
        a, b = ([logs[n][seed].curve("eval/reward")[1] for seed in seeds] for n in (name, "grpo"))
        if len({len(row) for row in [*a, *b]}) > 1:
            continue
        r = reach_ratio(steps, a, b)
        ratio, low, high = (
            f"{x:.2f}" if np.isfinite(x) else "never" for x in (r["ratio"], r["low"], r["high"])
        )
        here = f"{r['a']:.1f}" if np.isfinite(r["a"]) else f"not in {steps[-1]}"
        rows.append([label(name), len(seeds), here, f"{ratio} [{low}, {high}]", f"{r['never']:.0%}"])
    if not rows:
        return "GRPO is not in these logs, so there is no reward of its to reach.\n"
    text = markdown(
        [
            "",
            "seeds",
            "steps to GRPO's final reward",
            "of GRPO's steps [95 %]",
            "redraws that never get there",
        ],
        rows,
    )
    target = np.mean([log.last("eval/reward") for log in logs["grpo"].values()])
    text += f"\nGRPO's final mean held-out reward is {target:.3f} over its {len(logs['grpo'])} seeds; a method with fewer is compared on those it has. "
    text += "Means over seeds, linear between evaluations, seeds redrawn."
    return text + " The paper says about half the steps for GRAO.\n"


def plain(logs, names, extra=()):
    """Name, seeds, reward, NAG, KL, length, seconds of each, and further columns: (title, function of name)."""
    header = [
        "",
        "seeds",
        "mean reward",
        "NAG, %",
        "KL, nats/answer",
        "length",
        "generated tokens",
        "s a run",
        *(title for title, _ in extra),
    ]
    rows = []
    for name in present(logs, names):
        m = {measure: matrix(logs, name, measure) for measure in ("reward", "nag", "kl", "tokens")}
        cost = (
            np.mean([log.tokens()[1][-1] for log in logs[name].values()]),
            np.median([log.seconds()[1][-1] for log in logs[name].values()]),
        )
        rows.append(
            [
                label(name),
                len(m["reward"]),
                interval(m["reward"]),
                interval(m["nag"], percent=True, sign=True),
                interval(m["kl"], 2),
                interval(m["tokens"], 1),
                f"{cost[0]:,.0f}",
                f"{cost[1]:.0f}",
                *(column(name) for _, column in extra),
            ]
        )
    return markdown(header, rows) + missing_note(logs, names)


def ablations(logs):
    names = ("grao", *suites.ABLATIONS)
    seeds = common_seeds(logs, present(logs, names))
    same = {name: {seed: logs[name][seed] for seed in seeds} for name in present(logs, names)}
    printed = {name: "{:.2f} / {:.2f}".format(*cells) for name, cells in PAPER_ABLATIONS.items()}
    text = plain(
        same, names, [("paper: NAG, Qwen2.5-7B / Moonlight-16B", lambda name: printed.get(name, "–"))]
    )
    beta, clip = suites.equivalent(suites.BETA, suites.LAMBDA, suites.GROUP)
    text += (
        f"\nRe-weighted: `--without regularizer --beta {beta:.4g} --max-grad-norm {clip:.4g}`, which eq. (3) says is the full objective over 1 + λ: "
        "(1 + λ) E + (β + λ/G) I = (1 + λ) (E + β' I), and AdamW does not see the factor.\n"
    )
    if "grao-equivalent" in same and seeds:
        gaps = [
            np.abs(
                same["grao"][s].curve("reward/mean")[1] - same["grao-equivalent"][s].curve("reward/mean")[1]
            ).max()
            for s in seeds
        ]
        text += f"Largest gap between the two runs' training rewards at any step, over {len(seeds)} seeds: {max(gaps):.3f}. Rounding alone sets them apart.\n"
    return text


def quality(logs):
    """A row for every method, a column for every share of right expert answers."""
    rows = []
    for method in suites.IMITATORS:
        cells = [f"{method}-quality{share:g}" for share in suites.SHARES]
        if present(logs, cells):
            rows.append(
                [
                    label(method),
                    *(interval(matrix(logs, name, "reward")) if name in logs else "–" for name in cells),
                ]
            )
    if "grpo-quality1" in logs:
        rows.append(
            [
                label("grpo") + " (does not read them)",
                *[interval(matrix(logs, "grpo-quality1", "reward"))] * len(suites.SHARES),
            ]
        )
    return markdown(
        ["mean reward, by share of right expert answers", *(f"{share:.0%}" for share in suites.SHARES)], rows
    ) + crossings(logs)


def crossings(logs):
    """The shares of right expert answers at which each method's line through its means crosses GRPO's, means over the seeds that both have."""
    if "grpo-quality1" not in logs:
        return ""
    text = ""
    for method in suites.IMITATORS:
        seeds = {
            share: common_seeds(logs, ["grpo-quality1", name])
            for share in suites.SHARES
            if (name := f"{method}-quality{share:g}") in logs
        }
        shares = [share for share in seeds if seeds[share]]
        gaps = [
            matrix(logs, f"{method}-quality{s:g}", "reward", seeds[s]).mean()
            - matrix(logs, "grpo-quality1", "reward", seeds[s]).mean()
            for s in shares
        ]
        found = [
            s + (t - s) * a / (a - b) for s, t, a, b in zip(shares, shares[1:], gaps, gaps[1:]) if a * b < 0
        ]
        if gaps:
            side = (
                "ahead"
                if min(gaps) > 0
                else "behind"
                if max(gaps) < 0
                else "level somewhere, on one side of it elsewhere"
            )
            where = " and ".join(f"{x:.0%}" for x in found)
            text += f"\n{label(method)} " + (
                f"crosses GRPO at {where} of right expert answers."
                if found
                else f"does not cross GRPO: {side}."
            )
    return text + "\n"


def uniapl(logs):
    """The staged and unified pipelines, the strengths and the discriminators: the difference from GRPO, and the log-likelihood of expert answers."""

    def over_grpo(name):
        seeds = common_seeds(logs, ["grpo", name]) if "grpo" in logs and name != "grpo" else []
        return (
            difference(compare_paired(*(matrix(logs, n, "reward", seeds) for n in (name, "grpo"))))
            if seeds
            else "–"
        )

    def expert(name):
        return interval(matrix(logs, name, "logp_expert"), 2)

    names = suites.PARTS["uniapl"]
    same = {name: logs[name] for name in present(logs, names)}
    text = plain(
        same, names, [("reward − GRPO's, same seeds", over_grpo), ("log p of the expert, nats/token", expert)]
    )
    return (
        text
        + "\nThe paper: +5.77 % over GRPO on Qwen3-0.6B and +3.75 % on Qwen3-4B, its staged pipeline; other data and benchmarks than ours.\n"
    )


def anchor(logs):
    """What the discriminator tells apart and what is left of exploration, in the first and the last fifth of training; means over seeds."""

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
    return markdown(
        ["first → last fifth", "seeds", *columns],
        [[label(n), len(logs[n]), *(fifths(n, m) for m in columns.values())] for n in names],
    )


def samples(logs, count=6):
    """The same held-out prompts answered by every method, one seed. Logs whose texts were taken out, as of data not to be published, are left out."""
    names = present(logs, (*suites.COMPARED, "ppo-4")) or sorted(logs)
    seed = min(common_seeds(logs, names), default=None)
    if seed is None:
        return "The methods have no seed in common.\n"
    names = [name for name in names if logs[name][seed].after.get("texts")]
    if not names:
        return "The logs hold no texts.\n"
    first, text = (
        logs[names[0]][seed],
        f"# The same prompts, answered by every method (seed {seed})\n\nIn brackets: the reward.\n",
    )
    for i, before in enumerate(first.before["texts"][:count]):
        prompt = before["prompt"] if isinstance(before["prompt"], str) else before["prompt"][-1]["content"]
        rows = [
            ["expert", f"{quoted(before['expert'])} ({first.after['expert_reward'][i]:g})"],
            ["before training", f"{quoted(before['completion'])} ({first.before['reward'][i]:g})"],
        ]
        for name in names:
            after = logs[name][seed].after
            same = after["texts"][i]["prompt"] == before["prompt"]
            rows.append(
                [
                    label(name),
                    f"{quoted(after['texts'][i]['completion'])} ({after['reward'][i]:g})"
                    if same
                    else "(other prompts)",
                ]
            )
        text += f"\n**{quoted(prompt, 600)}**\n\n" + markdown(["", ""], rows)
    return text


def quoted(text, width=300):
    text = " / ".join(text.split("\n")).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    return text if len(text) <= width else text[: width - 1] + "…"
