"""Preference pairs: which can be used, and sets of them that share no dialogue."""

import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from data import UserError, load_records
from data.loaders import HUB_FOLDERS, read_records
from data.messages import shown_prompt
from engine.models import first_line
from engine.record import read_jsonl


def dialogue(prompt):
    """What two prompts of one dialogue have in common: the user's first message."""
    return (
        prompt if isinstance(prompt, str) else next((m["content"] for m in prompt if m["role"] == "user"), "")
    ).strip()


def usable_pairs(records, tokens, most, name, elsewhere=frozenset()):
    """Records whose two answers can be told apart and fit -> (records, each with "tokens": [of chosen, of rejected], {reason: how many were left out}).

    tokens(prompt, answer) -> length of the whole text; most: the longest; elsewhere: dialogues that other sets hold. Says on stderr what it left out.
    """
    kept, left, first = [], Counter(), {}
    for record in records:
        prompt, chosen, rejected, margin = (
            record["prompt"],
            record["chosen"],
            record.get("rejected"),
            record.get("margin", 0),
        )
        if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin):
            raise UserError(
                f"{name}: the margin of the prompt {shown_prompt(prompt)} is {margin!r}; write a finite number or leave it out"
            )
        if rejected is None:
            reason = "without a rejected answer"
        elif not chosen.strip() or not rejected.strip():
            reason = "with an empty answer"
        elif chosen.strip() == rejected.strip():
            reason = "with twice the same answer"
        elif dialogue(prompt) in elsewhere:
            reason = "of a dialogue that is measured on"
        else:
            lengths = [tokens(prompt, chosen), tokens(prompt, rejected)]
            if max(lengths) <= most:
                kept.append(record | {"tokens": lengths})
                continue
            reason = f"longer than {most} tokens"
        left[reason] += 1
        first.setdefault(reason, shown_prompt(prompt))
    if left:
        reasons = ", ".join(
            f"{count} {reason} (first: {first[reason]})" for reason, count in left.most_common()
        )
        print(f"{name}: left out {left.total()} of {len(records)} pairs: {reasons}", file=sys.stderr)
    if not kept:
        raise UserError(
            f"{name}: no pair to use, left out {', '.join(f'{count} {reason}' for reason, count in left.most_common()) or 'none'}"
        )
    return kept, dict(left)


def all_records(source, level):
    """Every record of a file; of the named sets the held-out ones."""
    return (
        load_records(source, "heldout", level=level)
        if source == "tasks" or source in HUB_FOLDERS
        else read_records(source)
    )


def set_apart(records, n, seed):
    """(most of the records, about n of them), no dialogue on both sides."""
    dialogues = sorted({dialogue(r["prompt"]) for r in records})
    size, apart, left = Counter(dialogue(r["prompt"]) for r in records), set(), n
    for i in np.random.default_rng(seed).permutation(len(dialogues)):
        if size[dialogues[i]] <= left:
            apart.add(dialogues[i])
            left -= size[dialogues[i]]
    return tuple([r for r in records if (dialogue(r["prompt"]) in apart) == side] for side in (False, True))


def read_samples(config):
    """samples.jsonl of a run -> (before, after), lists of its lines for the same prompts."""
    try:
        lines = read_jsonl(Path(config.samples))
        steps = sorted({line["step"] for line in lines})
        before, after = ([line for line in lines if line["step"] == step] for step in (steps[0], steps[-1]))
        wanted = ("prompt", "expert", "completion", "reward", "expert_reward", "truncated")
        if (
            len(steps) < 2
            or [x["prompt"] for x in before] != [x["prompt"] for x in after]
            or any(key not in line for line in lines for key in wanted)
        ):
            raise ValueError("it does not hold the same prompts before and after training")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"--samples {config.samples}: is not the samples.jsonl of a finished run ({first_line(error)})"
        ) from error
    return (before[: config.pairs or None], after[: config.pairs or None])
