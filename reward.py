"""Rewards: the verifier of the built-in tasks, and the paper's two metrics.

A record names its constraints (data/constraints.py), and a completion earns 1.0 only if it meets every one, was not cut off, and is no hack:

    {"prompt": "Write one short sentence about bees. Use only lowercase letters.",
     "constraints": [{"type": "lowercase"}], "min_words": 4, "about": ["bee", "honey"]}

    verifier([record["prompt"]], ["bees turn nectar into honey."], constraints=[record["constraints"]])   # [1.0]

A reward function has TRL's signature, f(prompts, completions, **columns) -> list[float]; prompts and completions are
strings or message lists.
"""
import math

import numpy as np

from data import UserError
from data.constraints import constraint_results, hack

# ------------------------------------------------------------------------------------------------------------- rewards

def last_text(messages, role):
    """The text of a string, or of the last message of `role` in a message list."""
    if isinstance(messages, str):
        return messages
    texts = [m["content"] for m in messages if m["role"] == role]
    return texts[-1] if texts else ""


def verifier(prompts, completions, constraints, truncated=None, min_words=None, about=None, **columns):
    """1.0 for a completion that meets all its constraints, ended by itself, and is no hack; else 0.0 -> list[float].

    constraints: one list per completion; truncated: one bool per completion, True where the length limit cut it;
    min_words, about: see hack(), one per completion. UserError names an unknown constraint or a wrong field.
    """
    none = [None] * len(completions)
    rewards = []
    for prompt, completion, wanted, cut, fewest, topic in zip(prompts, completions, constraints, truncated or none,
                                                              min_words or none, about or none, strict=True):
        prompt, text = last_text(prompt, "user"), last_text(completion, "assistant")
        met = all(constraint_results(text, wanted)) and not cut
        rewards.append(float(met and hack(prompt, text, fewest or 1, wanted, topic or ()) is None))
    return rewards


def checked_rewards(reward_fn, prompts, completions, columns):
    """Call a user's reward function -> list[float]; whatever goes wrong in it becomes a one-line UserError."""
    name = getattr(reward_fn, "__name__", type(reward_fn).__name__)
    try:
        rewards = reward_fn(prompts=prompts, completions=completions, **columns)
    except UserError:
        raise
    except Exception as error:  # the function is the user's: anything can come out of it
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"reward function {name}: raised {type(error).__name__}: {reason}") from error
    rewards = rewards.tolist() if hasattr(rewards, "tolist") else rewards  # an array or a tensor
    if not isinstance(rewards, (list, tuple)):
        raise UserError(f"reward function {name}: returned {type(rewards).__name__}; return one number per completion")
    if len(rewards) != len(completions):
        raise UserError(f"reward function {name}: returned {len(rewards)} rewards for {len(completions)} completions")
    rewards = [value.tolist() if hasattr(value, "tolist") else value for value in rewards]
    for i, value in enumerate(rewards):
        if isinstance(value, (list, tuple)):
            raise UserError(f"reward function {name}: item {i} is a list; return one number, not one per token")
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"reward function {name}: item {i} is {value!r}; return a finite number")
    return [float(value) for value in rewards]


# ------------------------------------------------------------------------------------------------------------- metrics

def pair(a, b):
    """Two sequences or tensors as equal, non-empty float arrays."""
    a, b = (np.asarray(x.tolist() if hasattr(x, "tolist") else list(x), dtype=float) for x in (a, b))
    if a.shape != b.shape or a.size == 0 or np.isnan(a).any() or np.isnan(b).any():
        raise ValueError(f"wanted: two equally long, non-empty sequences without NaN; got shapes {a.shape}, {b.shape}")
    return a, b


def ras(rewards, reference_rewards):
    """Relative Adversarial Score (GRAO, arXiv 2508.07750): shares of the queries, in [0, 1], on which the answer is
    rewarded above its reference, as it, and below it -> {"win", "tie", "loss"}. The paper's RAS is "win".

    Two equally long sequences or tensors; ValueError on other lengths, none at all, or NaN.
    """
    a, b = pair(rewards, reference_rewards)
    return {"win": float((a > b).mean()), "tie": float((a == b).mean()), "loss": float((a < b).mean())}


def nag(post, pre):
    """Normalized Alignment Gain (arXiv 2508.07750) of the trained policy's rewards over those before training.

    {"signed": wins minus losses, in [-1, 1], which is what the paper's tables hold (one entry is negative);
     "indicator": share of strict wins, the formula as printed}. ValueError as for ras.
    """
    shares = ras(post, pre)
    return {"signed": shares["win"] - shares["loss"], "indicator": shares["win"]}


def bootstrap_interval(values, level=0.95, n=2000, seed=0):
    """Percentile bootstrap (low, high) of the mean of `values`, (prompts,) or (prompts, samples): prompts are redrawn
    with replacement, because samples of one prompt are not independent. Equal values give an interval of width 0, which
    says little below about 30 prompts. ValueError for no values or NaN, or a level outside (0, 1)."""
    values = np.asarray(values.tolist() if hasattr(values, "tolist") else values, dtype=float)
    if values.size == 0 or np.isnan(values).any() or not 0 < level < 1:
        raise ValueError("bootstrap_interval wants at least one value, no NaN, and a level between 0 and 1")
    values = values.reshape(len(values), -1).mean(axis=1)
    means = values[np.random.default_rng(seed).integers(len(values), size=(n, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
