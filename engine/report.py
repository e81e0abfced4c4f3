"""What a run says of itself at its end: one sentence, alarms where they hold, tables, and answers side by
side.

A mean reward alone can lie: a policy whose answers are all empty may earn 1.000 from a reward that has a
hole. So the sentence sets the reward beside the expert answers' and beside what a constant answer earns, with
an interval over the prompts, and every alarm is a fact about the answers themselves.

before, after: lists of dicts as in samples.jsonl, one for each held-out prompt, of the same prompts before
and after training. Where they have "floor" and "floor_reward" (the best constant answer and what it earns,
data/floor.py), the floor is told too.
"""

import math

import numpy as np

from data.constraints import constraint_results
from engine.measures import FEWEST, against_before, column, commonest, compare, gain, interval, summary

# Where an alarm begins.
EMPTY = 0.05  # share of empty answers
IDENTICAL = 0.25  # share of the prompts that get one and the same answer
CUT = 0.5  # share of answers cut at the length limit
FAILING = 0.5  # share of expert answers without reward
# KL(pi || ref), nats for each token of an answer. In the study's runs the sound ones end below 1.5, imitation
# of foreign texts included; of the eight above 2 seven had lost most of their reward. At 2 a token is e^2 = 7
# times as likely as under the reference, on average.
KL_SCALE = 2.0


# ------------------------------------------------------------------------------------------------------------
# One sentence


def bracket(found, form=".3f"):
    """An interval as text; nothing where there is none, because the prompts were too few."""
    return "" if found is None else f" [{found[0]:{form}}, {found[1]:{form}}]"


def standing(differences):
    """Above, below or level with what is compared, by the interval of the differences (N,); with few of them
    by their mean alone."""
    low, high = interval(differences) or (differences.mean(), differences.mean())
    if low > 0:
        return "above"
    return "below" if high < 0 else "level with"


def movement(before, after):
    """From where to where the mean reward went, and how certain that is."""
    old, new = column(before, "reward"), column(after, "reward")
    if not against_before(before, after).any():
        return f"Held-out reward stayed at {new.mean():.3f} on each of {len(new)} prompts"
    went = {"above": "rose", "below": "fell", "level with": "went"}[standing(new - old)]
    found = interval(new - old)
    difference = f"difference {(new - old).mean():+.3f}{bracket(found, '+.3f')}"
    if found is None:
        went, certainty = "went", f"over {len(new)} prompts, too few to tell it from chance"
    elif went == "went":
        certainty = f"paired over {len(new)} prompts, which may be chance"
    else:
        certainty = f"paired over {len(new)} prompts"
    return f"Held-out reward {went} from {old.mean():.3f} to {new.mean():.3f} ({difference}, {certainty})"


def opening(before, after):
    """The run in one sentence: from, to, against the expert answers and the floor, with what certainty."""
    new, expert = column(after, "reward"), column(after, "expert_reward")
    text = f"{movement(before, after)}: {standing(new - expert)} the expert answers' {expert.mean():.3f}"
    if "floor_reward" in after[0]:
        floor = column(after, "floor_reward")
        text += f", {standing(new - floor)} the no-skill floor {floor.mean():.3f}"
    return text + "."


# ------------------------------------------------------------------------------------------------------------
# Alarms


def alarms(before, after):
    """What in a run's answers and rewards forbids to take its mean reward at its word -> lines of text, none
    for a sound run."""
    found = [
        few_prompts(after),
        empty_answers(before, after),
        identical_answers(before, after),
        constant_reward(before, after),
        far_from_reference(after),
        failing_experts(before, after),
        cut_answers(before, after),
    ]
    return [text for text in found if text]


def few_prompts(after):
    if len(after) < FEWEST:
        few = f"{len(after)} held-out prompts are fewer than {FEWEST}"
        return f"{few}: no interval is given, and it may be chance"


def empty_share(samples):
    return sum(not s["completion"].strip() for s in samples) / len(samples)


def empty_answers(before, after):
    share = empty_share(after)
    if share > EMPTY:
        return f"{share:.0%} of the answers after training are empty (before: {empty_share(before):.0%})"


def most_given(samples, key="completion"):
    """(text, share of the prompts) of the answer that most prompts get; empty ones have an alarm of their
    own."""
    texts = [s[key].strip() for s in samples if s[key].strip()]
    if not texts:
        return "", 0.0
    text, share = commonest(texts)
    return text, share * len(texts) / len(samples)


def identical_answers(before, after):
    text, share = most_given(after)
    expert = most_given(after, "expert")[1]
    if share * len(after) > 1 and share > max(IDENTICAL, expert):
        return (
            f"{share:.0%} of the prompts get one and the same answer after training, {shown(text, 60)!r} "
            f"(before: {most_given(before)[1]:.0%}, expert answers: {expert:.0%})"
        )


def constant_reward(before, after):
    new, old = column(after, "reward"), column(before, "reward")
    if compare(new, np.full(len(new), new[0])).any():
        return None
    if compare(np.append(new, old), np.full(len(new) + len(old), new[0])).any():
        return f"every answer after training earns the same, {new[0]:.3f}: the reward tells nothing apart"
    return f"the reward never varied: {new[0]:.3f} for every answer, before and after"


def far_from_reference(after):
    if "kl" not in after[0]:
        return None
    kl = column(after, "kl").sum() / max(column(after, "tokens").sum(), 1)
    if not math.isfinite(kl) or kl > KL_SCALE:
        return (
            f"the KL to the reference is {kl:.1f} nats a token, beyond {KL_SCALE:g}: the answers have left "
            "what the model could say before"
        )


def failing_experts(before, after):
    """Only where a reward is 1 or 0, passed or failed: another scale does not say what failing is."""
    expert = column(after, "expert_reward")
    everything = np.concatenate([expert, column(before, "reward"), column(after, "reward")])
    failed = (expert == 0).mean()
    if np.isin(everything, (0.0, 1.0)).all() and failed >= FAILING:
        return f"{failed:.0%} of the expert answers earn nothing: to imitate them is to learn to fail"


def cut_answers(before, after):
    share = column(after, "truncated").mean()
    if share > CUT:
        was = column(before, "truncated").mean()
        return f"{share:.0%} of the answers after training were cut at the length limit (before: {was:.0%})"


# ------------------------------------------------------------------------------------------------------------
# Tables


def report(before, after):
    """The sentence, the alarms, the before/after table, the constraint types, and four prompts side by side,
    as text."""
    text = opening(before, after) + "\n"
    for alarm in alarms(before, after):
        text += f"careful: {alarm}\n"
    return text + "\n" + table(before, after) + constraint_table(before, after) + examples(before, after)


def table(before, after):
    b, a = summary(before), summary(after)
    signs = against_before(before, after)
    change, certain = gain(signs), interval(signs)
    rows = [(f"held-out prompts: {len(after)}", "before", "after")]

    def row(title, cell):
        rows.append((title, cell(b), cell(a)))

    row("mean reward [95 % interval]", lambda s: f"{s['reward']:.3f}{bracket(limits(s))}")
    row("  deviation", lambda s: f"{s['std']:.3f}")
    row("  quartiles", lambda s: f"{s['q25']:.3f} / {s['median']:.3f} / {s['q75']:.3f}")
    row("expert answers' reward", lambda s: f"{s['expert']:.3f}")
    if "floor" in a:
        row("no-skill floor (constant answer)", lambda s: f"{s['floor']:.3f}")
    row("RAS win / tie / loss", lambda s: "{win:.3f} / {tie:.3f} / {loss:.3f}".format(**s["ras"]))
    if certain:
        row("  wins, 95 % interval", lambda s: bracket(s["ras_interval"]).strip())
    rows.append(
        ("NAG wins - losses (wins alone)", "", f"{change['signed']:+.3f} ({change['indicator']:.3f})")
    )
    if certain:
        rows.append(("  95 % interval over prompts", "", bracket(certain, "+.3f").strip()))
    row("length, tokens (share cut)", lambda s: f"{s['tokens']:.1f} ({s['truncated']:.2f})")
    return "\n".join(f"{title:<32}{x:>24}{y:>24}" for title, x, y in rows) + "\n"


def limits(s):
    """The interval of a summary's mean reward, or None."""
    return None if s["low"] is None else (s["low"], s["high"])


def constraint_table(before, after):
    """The share of constraints that the answers meet, by type; nothing for data without constraints."""
    types = sorted({c["type"] for s in after for c in s.get("constraints", [])})
    if not types:
        return ""
    text = f"\n{'share met, by constraint type':<32}{'before':>24}{'after':>24}{'expert':>14}{'n':>6}\n"
    for kind in types:
        old, n = constraint_share(before, "completion", kind)
        new, _ = constraint_share(after, "completion", kind)
        expert, _ = constraint_share(after, "expert", kind)
        text += f"  {kind:<30}{old:>24.2f}{new:>24.2f}{expert:>14.2f}{n:>6}\n"
    return text


def constraint_share(samples, key, kind):
    """(share, n) of the constraints of one type that the answers under `key` meet."""
    met = []
    for sample in samples:
        for ok, constraint in zip(
            constraint_results(sample[key], sample["constraints"]), sample["constraints"]
        ):
            if constraint["type"] == kind:
                met.append(ok)
    return sum(met) / len(met), len(met)


def examples(before, after, count=4):
    """The first prompts with their expert answer, and the policy's before and after, rewards in brackets."""
    text = ""
    for old, new in list(zip(before, after))[:count]:
        prompt = new["prompt"] if isinstance(new["prompt"], str) else new["prompt"][-1]["content"]
        text += f"\nprompt     {shown(prompt)}\n"
        text += f"expert     {shown(new['expert'])}  ({new['expert_reward']:.3g})\n"
        text += f"before     {shown(old['completion'])}  ({old['reward']:.3g})\n"
        text += f"after      {shown(new['completion'])}  ({new['reward']:.3g})\n"
        if "floor_reward" in new:
            text += f"no skill   {shown(new['floor'])}  ({new['floor_reward']:.3g})\n"
    return text


def shown(text, width=200):
    text = " / ".join(text.split("\n"))
    return text if len(text) <= width else text[: width - 1] + "…"


def by_reward(before, after):
    """A run by one reward, in a few lines: the sentence, reward and RAS before and after, NAG, with intervals
    over prompts."""
    lines = [opening(before, after)]
    for word, samples in (("before", before), ("after", after)):
        s = summary(samples)
        won = f"{s['ras']['win']:.3f}{bracket(s['ras_interval'])}"
        lines.append(
            f"{word:<8}reward {s['reward']:.3f} (deviation {s['std']:.3f}, "
            f"quartiles {s['q25']:.3f} {s['median']:.3f} {s['q75']:.3f}), expert {s['expert']:.3f}; "
            f"RAS {won} / {s['ras']['tie']:.3f} / {s['ras']['loss']:.3f}"
        )
    signs = against_before(before, after)
    change = gain(signs)
    certain = bracket(interval(signs), "+.3f")
    return [*lines, f"NAG     {change['signed']:+.3f}{certain} (wins alone {change['indicator']:.3f})"]


def print_samples(path, name, reward_fn, before, after):
    """A run, the samples.jsonl at `path`, by `reward_fn`, beside the same by the reward that it was trained
    with, and the alarms of either.
    """
    print(f"{len(after)} held-out prompts of {path}")
    others = rescored(reward_fn, before), rescored(reward_fn, after)
    said = []
    for title, parts in (("by the reward of the run", (before, after)), (f"by {name}", others)):
        print(f"{title}\n  " + "\n  ".join(by_reward(*parts)))
        for alarm in alarms(*parts):
            if alarm not in said:  # what is wrong with the answers is so by either reward
                print(f"  careful: {alarm}")
                said.append(alarm)


def rescored(reward_fn, samples):
    """The samples with the rewards that `reward_fn` gives to them and to their expert answers. The recorded
    floor is of another reward.
    """
    prompts, experts = [s["prompt"] for s in samples], [s["expert"] for s in samples]
    cut = [s["truncated"] for s in samples]
    rewards = reward_fn(prompts, [s["completion"] for s in samples], chosen=experts, truncated=cut)
    expert_rewards = reward_fn(prompts, experts, chosen=experts)
    found = []
    for sample, reward, expert in zip(samples, rewards, expert_rewards, strict=True):
        kept = {name: value for name, value in sample.items() if name != "floor_reward"}
        found.append(kept | {"reward": reward, "expert_reward": expert})
    return found


def report_pairs(name, m):
    """What `measures` found on one set of preference pairs, as text."""
    text = f"\n{name}: {m['pairs']} pairs\n"
    if m["interval"] is None:
        text += f"  careful: fewer than {FEWEST} pairs: no interval is given, and it may be chance\n"
    text += "  accuracy [95 % interval]\n"
    text += f"    {'this reward model':<32}{m['accuracy']:.3f}{bracket(m['interval'])}\n"
    longer = f"{m['longer_wins']:.3f}{bracket(m['longer_wins_interval'])}"
    text += f"    {'the longer one wins (tokens)':<32}{longer}\n"
    text += f"    {'random':<32}0.500\n"
    over = f"{m['over_longer']:+.3f}{bracket(m['over_longer_interval'], '+.3f')}"
    text += f"    {'over the longer one, same pairs':<32}{over}\n"
    text += f"  prefers the longer answer of a pair: {m['prefers_longer']:.3f}; "
    text += f"score and length differences correlate: {m['correlation_with_length']:+.2f}\n"
    bins = [f"{b['from']}..{b['to']}: {b['accuracy']:.2f} ({b['n']})" for b in m["by_length"]]
    text += f"  accuracy by tokens(chosen) - tokens(rejected): {', '.join(bins)}\n"
    text += f"  expected calibration error {m['calibration']['ece']:.3f}; scores (mean, deviation): "
    text += f"chosen {m['chosen_mean']:.2f}, {m['chosen_std']:.2f}; "
    return text + f"rejected {m['rejected_mean']:.2f}, {m['rejected_std']:.2f}"
