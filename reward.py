"""Rewards: the verifier of the built-in tasks, and the paper's two metrics.

A record names its constraints (data/constraints.py), and a completion earns 1.0 only if it meets every one, was not cut off, and is no hack:

    {"prompt": "Write one short sentence about bees. Use only lowercase letters.",
     "constraints": [{"type": "lowercase"}], "min_words": 4, "about": ["bee", "honey"]}

    verifier([record["prompt"]], ["bees turn nectar into honey."], constraints=[record["constraints"]])   # [1.0]

A reward function has TRL's signature, f(prompts, completions, **columns) -> list[float]; prompts and completions are
strings or message lists.
"""
import math
import time

import numpy as np
import torch
import torch.nn.functional as F

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


# -------------------------------------------------------------------------------------------------------- reward model

def bradley_terry_loss(chosen, rejected, margin=None):
    """-mean log sigmoid(chosen - rejected - margin): Bradley-Terry's negative log-likelihood -> scalar, nats.

    chosen, rejected: (N,) scores of the better and the worse answer of each pair, with gradient; margin: None, a number, or (N,), how far
    apart they should be (Llama 2, arXiv 2307.09288, eq. (2)). At least fp32; does not overflow. ValueError for other shapes, or no pair.
    """
    if chosen.shape != rejected.shape or chosen.numel() == 0 or (torch.is_tensor(margin) and margin.shape not in ((), chosen.shape)):
        raise ValueError(f"chosen and rejected (N,) wanted, N > 0, and a margin of that shape; got {tuple(chosen.shape)}, {tuple(rejected.shape)}")
    d = (chosen - rejected).to(torch.promote_types(chosen.dtype, torch.float32))
    return -F.logsigmoid(d if margin is None else d - margin).mean()


def micro_batches(prompts, groups, most):
    """Groups (a prompt's ids with G answers' ids) of one size and like lengths -> lists of indices, each of at most `most` tokens or one group."""
    tokens = [len(p) + sum(map(len, group)) for p, group in zip(prompts, groups, strict=True)]
    batch = []
    for i in sorted(range(len(groups)), key=lambda i: (len(groups[i]), tokens[i])):
        if batch and (len(groups[i]) != len(groups[batch[0]]) or sum(tokens[j] for j in batch) + tokens[i] > most):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def group_scores(policy, role, prompts, groups, most=4096):
    """A role's scores of each prompt's answers -> list of lists of floats. prompts: lists of ids; groups: for each a list of answers' ids.

    A prompt is computed once for all its answers; at most `most` tokens, or one group, at a time. UserError for a score that is not finite.
    """
    scores = [None] * len(groups)
    for part in micro_batches(prompts, groups, most):
        for i, row in zip(part, policy.sequence_scores([prompts[i] for i in part], [groups[i] for i in part], role).tolist()):
            scores[i] = row
    if not all(math.isfinite(s) for row in scores for s in row):
        raise UserError(f"role {role}: gave a score that is not finite; its weights, or --dtype bfloat16, may be at fault")
    return scores


def accuracy(better, worse):
    """Share of pairs whose better answer scores higher, (N,) each; a tie counts half, so that scoring everything the same is worth 0.5."""
    better, worse = pair(better, worse)
    return float(((better > worse) + 0.5 * (better == worse)).mean())


def fit_scorer(policy, role, pairs, held_out, *, lr=1e-4, epochs=1, batch_size=16, margin=0.0, centre=0.0, eval_every=0, patience=0, seed=0,
               max_tokens_per_pass=4096, weight_decay=0.01, max_grad_norm=1.0, log=None):
    """Train a role of Policy.add_role (adapter and head) by Bradley-Terry, in place -> history, a list of dicts, one per evaluation.

    pairs, held_out: lists of (prompt_ids, better_ids, worse_ids) or (..., margin); answers end with their EOS. A pair is one group of
    two, its prompt computed once. margin: of pairs that name none. centre: weight of mean (chosen + rejected)^2, which keeps scores near
    0 (Eisenstein et al., arXiv 2312.09244). The learning rate falls linearly to 0 after 5 % of warm-up. held_out is evaluated every
    eval_every batches (0: eight times in all); after `patience` evaluations without a better accuracy (0: never) training stops.
    The role ends with the parameters of its best evaluation (accuracy, then loss); without held_out pairs with the last ones.
    The seed decides the order of the pairs; max_tokens_per_pass bounds memory and does not change the gradient.
    log(line) is called with every line of the history. UserError for no pair or a loss that is not finite.
    """
    if not pairs:
        raise UserError(f"role {role}: no pair to learn from")
    params = policy.trainable(role) | {f"{role}_head.{n}": p for n, p in policy.heads[role].named_parameters()}
    optimizer = torch.optim.AdamW(params.values(), lr=lr, weight_decay=weight_decay)
    steps = epochs * math.ceil(len(pairs) / batch_size)
    warmup, eval_every = math.ceil(0.05 * steps), eval_every or math.ceil(steps / 8)
    history, best, kept, losses, start = [], None, None, [], time.perf_counter()
    for step in range(steps):
        epoch, begin = divmod(step * batch_size, batch_size * math.ceil(len(pairs) / batch_size))
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed * 7919 + epoch)).tolist()
        batch = [pairs[i] for i in order[begin : begin + batch_size]]
        prompts, groups = [p[0] for p in batch], [[p[1], p[2]] for p in batch]
        for part in micro_batches(prompts, groups, max_tokens_per_pass):
            with policy.role(role):  # around the backward pass, too, for gradient checkpointing
                scores = policy.sequence_scores([prompts[i] for i in part], [groups[i] for i in part], role)  # (b, 2)
                wanted = scores.new_tensor([batch[i][3] if len(batch[i]) > 3 else margin for i in part])
                loss = bradley_terry_loss(scores[:, 0], scores[:, 1], wanted) + centre * scores.sum(1).square().mean()
                (loss * len(part) / len(batch)).backward()
            losses += [float(loss.detach())] * len(part)
        norm = float(torch.nn.utils.clip_grad_norm_(params.values(), max_grad_norm))
        if not math.isfinite(norm) or not math.isfinite(losses[-1]):
            raise UserError(f"role {role}: loss or gradient is not finite at batch {step + 1}; try a lower --lr or --dtype float32")
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % eval_every and step + 1 < steps:
            continue
        line = {"step": step + 1, "pairs": min((epoch * len(pairs)) + begin + batch_size, (epoch + 1) * len(pairs)),
                "train/loss": sum(losses) / len(losses), "grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]}
        losses = []
        if held_out:
            scores = torch.tensor(group_scores(policy, role, [p[0] for p in held_out], [[p[1], p[2]] for p in held_out], max_tokens_per_pass))
            line |= {"held_out/accuracy": accuracy(scores[:, 0], scores[:, 1]), "held_out/loss": float(bradley_terry_loss(scores[:, 0], scores[:, 1]))}
            if best is None or (line["held_out/accuracy"], -line["held_out/loss"]) > best[:2]:
                best = (line["held_out/accuracy"], -line["held_out/loss"], step + 1, len(history))
                kept = {n: p.detach().clone() for n, p in params.items()}
            line["best_step"] = best[2]
        history.append(line | {"time": time.perf_counter() - start})
        if log:
            log(history[-1])
        if best and patience and len(history) - 1 - best[3] >= patience:
            break
    if kept:
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(kept[name])
    return history


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
