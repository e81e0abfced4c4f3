"""Preference pairs: which can be used, and sets of them that share no dialogue."""

import math
import random
import sys
from collections import Counter
from dataclasses import dataclass
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
    """Records whose two answers can be told apart and fit -> (records, each with "tokens": [of chosen, of
    rejected], {reason: how many were left out}).

    tokens(prompt, answer) -> length of the whole text; most: the longest; elsewhere: dialogues that other
    sets hold. Says on stderr what it left out.
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
                f"{name}: the margin of the prompt {shown_prompt(prompt)} is {margin!r}; "
                "write a finite number or leave it out"
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
        reasons = ", ".join(f"{count} {reason}" for reason, count in left.most_common())
        raise UserError(f"{name}: no pair to use, left out {reasons or 'none'}")
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


@dataclass
class PairSets:
    """Preference pairs that share no dialogue; records with "tokens", [of chosen, of rejected]."""

    training: list
    stop: list  # kept from training to stop it by
    measured: dict  # name -> records
    left_out: dict  # name -> {reason: how many}

    def statement(self):
        """What reward_model.json says of them."""
        return {
            "statement": "the pairs learnt from, stopped by and measured on share no dialogue "
            "(prompts that open with the same user message)",
            "training": len(self.training),
            "stop": len(self.stop),
            "measured": {name: len(records) for name, records in self.measured.items()},
            "left_out": self.left_out,
        }


def read_sets(config, level):
    """The records of --data and --eval-data -> (to train on, {name: to measure on}), not yet apart."""
    training, measured = [], {}
    for source in config.data.split(","):
        training += load_records(source, "train", seed=config.seed, level=level)
        measured[f"{Path(source).name}, held-out split"] = load_records(source, "heldout", level=level)
    for source in config.eval_data.split(",") if config.eval_data else []:
        measured[Path(source).name] = all_records(source, level)
    return training, measured


def split_sets(training, measured, config, tokens, most):
    """Leave out what cannot be used, and what shares a dialogue with a measured set -> PairSets.

    tokens(prompt, answer) -> length of the whole text; most: the longest.
    """
    # of those, too, that are too long to be measured: a policy may be evaluated on their prompts
    elsewhere = {dialogue(r["prompt"]) for records in measured.values() for r in records}
    usable, left = {}, {}
    for name, records in measured.items():
        usable[name], left[name] = usable_pairs(records, tokens, most, name)
    training, left["training"] = usable_pairs(training, tokens, most, "training", elsewhere)
    random.Random(config.seed).shuffle(training)  # of several files, each has its share of --train-pairs
    training, stop = set_apart(training, min(config.stop_pairs, len(training) // 10), config.seed)
    return PairSets(training[: config.train_pairs or None], stop, usable, left)


def pairs_to_measure(config, tokens, context, level):
    """{name: usable pairs} of --data, each at most --pairs and --max-tokens."""
    found = {}
    for source in config.data.split(","):
        name = Path(source).name
        found[name] = usable_pairs(
            all_records(source, level), tokens, min(config.max_tokens or context, context), name
        )[0][: config.pairs or None]
    return found


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
