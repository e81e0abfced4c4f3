"""The baselines that GRAO and UniAPL are compared with: SFT, DPO, PPO and GRPO, on the same loop, data and flags as minigrao.py.

    python baselines.py sft     # mean log-likelihood of the reference answer           arXiv 2508.07750 eq. (1), 2604.23747
    python baselines.py dpo     # a classifier of chosen against rejected               arXiv 2305.18290 eq. (7)
    python baselines.py grpo    # clipped ratio, the group as baseline, KL in the loss  arXiv 2402.03300 eq. (3)
    python baselines.py ppo     # clipped ratio, a value function, KL in the reward     arXiv 1707.06347 eq. (7), 1506.02438 eq. (16)

First the losses, pure functions of tensors, then a step of each method. Where they leave the papers, and TRL, which many readers know:
- SFT averages over all target tokens of the optimisation step, not over means of micro-batches (2604.23747 traces a widespread weak SFT
  baseline to that). GRAO's mean of per-response means is `--per-response`. SFT and DPO score at temperature 1 whatever --temperature is.
- DPO has label smoothing (conservative DPO, ericmitchell.ai/cdpo.pdf). TRL 1.12's default DPO loss takes the setting and ignores it.
- GRPO's std is the population's (over G) plus 1e-6, a tied group's advantage exactly 0. The paper does not say which std; TRL divides by
  G - 1 and adds 1e-4: at G = 8 its advantages are 0.94 of these. The clip bounds are set apart (DAPO, 2503.14476). --aggregate is the
  paper's "sequence", DAPO's "token" (TRL's default) or Dr. GRPO's "constant" (2503.20783). The KL is off unless asked for, and then
  k3_ratio, whose gradient is that of KL(pi || ref); the paper's is `--kl k3 --kl-coef 0.04`. Each update takes the whole rollout.
- PPO puts the score on the EOS token, after which the value is 0. TRL puts it one position later and keeps a value there. The value loss is
  clipped as in OpenAI's code, not in the paper. Whitening divides by the population's std, TRL's by n - 1. Mini-batches are whole prompt
  groups, visited in random order. The value function is a LoRA adapter of its own, so no coefficient weighs its loss against the policy's.

logps, values and the like are (N, T): N completions, T positions. Where mask is 0 they may hold anything, NaN included; it reaches neither
value nor gradient. `parts` are detached scalars. Every loss is a sum over a count: compute it once for the optimisation step,
`n = normaliser(mask, aggregate)`, and pass `denominator=n` with each micro-batch; gradients then add up to the step's, however it was cut.
"""

import math
import sys
from dataclasses import dataclass

from data import UserError
from engine.command_line import answer_early
from engine.settings import Config, Method, setting

KL_ESTIMATES = ("k1", "k3", "k3_ratio")  # see losses.kl_estimate


@dataclass
class SFTConfig(Config):
    presets = {"tiny": dict(lr=1e-3, steps=400), "chat": dict(lr=1e-4)}
    per_response: bool = setting(
        False, "the mean of per-response means, as 2508.07750 eq. (1), not the mean over all tokens"
    )


@dataclass
class DPOConfig(Config):
    presets = {"tiny": dict(lr=1e-3, beta=0.5, steps=200), "chat": dict(lr=1e-4, beta=0.1)}
    beta: float = setting(None, "how firmly the reference holds the policy", above=0, high=100)
    label_smoothing: float = setting(
        0.0, "probability that a pair is labelled the wrong way round", low=0, high=0.5
    )


@dataclass
class GRPOConfig(Config):
    presets = {"tiny": dict(lr=2e-3), "chat": dict(lr=1e-4)}
    clip_low: float = setting(0.2, "the ratio is clipped below at 1 minus this", low=0, high=1)
    clip_high: float = setting(0.2, "and above at 1 plus this", low=0, high=100)
    kl_coef: float = setting(
        0.0, "weight of the KL to the reference in the loss (paper: 0.04)", low=0, high=100
    )
    kl: str = setting("k3_ratio", "its estimate; k3 is the paper's, see kl_estimate", choices=KL_ESTIMATES)
    aggregate: str = setting(
        "sequence",
        "sequence (paper), token (DAPO) or constant (Dr. GRPO)",
        choices=("sequence", "token", "constant"),
    )
    scale_advantages: str = setting(
        "std", "divide advantages by the group's std, or none (Dr. GRPO)", choices=("std", "none")
    )
    updates_per_rollout: int = setting(1, "optimiser updates on the samples of a step (mu)", low=1, high=1000)


@dataclass
class PPOConfig(Config):
    presets = {"tiny": dict(lr=1e-3, value_lr=1e-3, steps=75), "chat": dict(lr=1e-4, value_lr=1e-4)}
    clip: float = setting(0.2, "the ratio is clipped to 1 -+ this", low=0, high=1)
    value_clip: float = setting(
        0.2, "values are clipped to those at sampling time -+ this", above=0, high=1e6
    )
    value_lr: float = setting(None, "learning rate of the value function", above=0, high=1)
    kl_coef: float = setting(
        0.02, "weight of the KL to the reference in the reward, per token", low=0, high=100
    )
    gamma: float = setting(1.0, "discount per token", low=0, high=1)
    gae_lambda: float = setting(0.95, "GAE's lambda: 1 trusts returns, 0 the value function", low=0, high=1)
    ppo_epochs: int = setting(2, "passes over the samples of a step", low=1, high=1000)
    minibatches: int = setting(
        2, "optimiser updates in a pass, each on its own share of the prompts", low=1, high=4096
    )


CONFIGS = {"sft": SFTConfig, "dpo": DPOConfig, "ppo": PPOConfig, "grpo": GRPOConfig}

if __name__ == "__main__":
    answer_early(CONFIGS, __doc__)  # --help and mistyped flags: the imports below take seconds

import torch
import torch.nn.functional as F

from losses import (
    _clean,
    _masked_variance,
    _per_row,
    _want,
    _widen,
    aggregate_tokens,
    completion_mask,
    flat,
    kl_estimate,
    masked_mean,
    normaliser,
)
from train import Sums, main

# ------------------------------------------------------------------------------------------------------------------------ masked reductions


# -------------------------------------------------------------------------------------------------------------------------------------- SFT
def sft_loss(logps, mask, per_response=False, denominator=None):
    """Negative log-likelihood of the target tokens, (N, T) -> scalar, nats per token: over all tokens, or eq. (1)."""
    mask, logps = _clean(mask, logps=logps)
    aggregate = "sequence" if per_response else "token"  # 2508.07750 eq. (1), or the correction of 2604.23747
    return aggregate_tokens(-logps, mask, aggregate, denominator=denominator)


# -------------------------------------------------------------------------------------------------------------------------------------- DPO
def dpo_loss(
    chosen_logps,
    rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    beta=0.1,
    label_smoothing=0.0,
    denominator=None,
):
    """Four (N,) of log-probs summed over completions -> (scalar loss, chosen_rewards (N,), rejected_rewards (N,)).

    The rewards are the implicit ones, beta * log(pi / pi_ref), detached; only their difference is trained. label_smoothing in [0, 0.5] is
    the probability that a pair is labelled the wrong way round; the best reward margin is then finite, log((1 - eps) / eps).
    """
    given = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    shapes = [tuple(x.shape) for x in given]
    _want(
        len(shapes[0]) == 1 and len(set(shapes)) == 1,
        f"dpo_loss wants four (N,) of summed log-probs, got {shapes}",
    )
    _want(
        beta > 0 and 0 <= label_smoothing <= 0.5,
        f"want beta > 0 and label_smoothing in [0, 0.5], got {beta} and {label_smoothing}",
    )
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps = (_widen(x) for x in given)
    chosen_rewards = beta * (
        chosen_logps - ref_chosen_logps.detach()
    )  # 2305.18290 eq. (5); log Z cancels below
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps.detach())
    h, eps = chosen_rewards - rejected_rewards, label_smoothing
    losses = -(1 - eps) * F.logsigmoid(h) - eps * F.logsigmoid(
        -h
    )  # 2305.18290 eq. (7); eps is conservative DPO's
    n = torch.as_tensor(len(losses) if denominator is None else denominator)
    return losses.sum() / n.clamp(min=1), chosen_rewards.detach(), rejected_rewards.detach()


# ------------------------------------------------------------------------------------------------------------------------------------- GRPO
@torch.no_grad()
def grpo_advantages(rewards, scale="std", eps=1e-6, ddof=0):
    """Rewards (B, G) -> advantages (B, G), by group. scale="none" is Dr. GRPO's; ddof=1, eps=1e-4 are TRL's."""
    _want(scale in ("std", "none"), f"scale must be one of std, none, got {scale!r}")
    _want(
        rewards.dim() == 2 and rewards.numel(),
        f"rewards must be (B, G) with B, G >= 1, got {tuple(rewards.shape)}",
    )
    _want(
        torch.isfinite(rewards).all(), "rewards hold NaN or infinity"
    )  # which one step would spread to every weight
    r = _widen(rewards)
    A = r - r.mean(1, keepdim=True)
    if scale == "std":
        std = (A.square().sum(1, keepdim=True) / max(r.shape[1] - ddof, 1)).sqrt()
        A = A / (std + eps)  # 2402.03300 sec. 4.1.2
    tied = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)  # not std == 0: see _masked_variance
    return torch.where(tied, 0, A)


def _clipped_objective(logps, old_logps, A, mask, clip_low, clip_high):
    """All (N, T) and clean -> (objective per token, ratio, parts)."""
    log_ratio = (
        logps - (logps if old_logps is None else old_logps).detach()
    )  # None: on-policy, ratio exactly 1
    ratio = torch.exp(log_ratio)
    # The min lets the clip bind only where the ratio has already gone the way A wants: low for A < 0, high for A > 0.
    objective = torch.min(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)  # 1707.06347 eq. (7)
    with torch.no_grad():
        parts = {
            "clip_fraction_low": masked_mean((A < 0) & (ratio < 1 - clip_low), mask),
            "clip_fraction_high": masked_mean((A > 0) & (ratio > 1 + clip_high), mask),
            "ratio_mean": masked_mean(ratio, mask),
            "ratio_max": torch.where(mask, ratio, 0).amax(),
            "approx_kl": masked_mean(torch.expm1(log_ratio) - log_ratio, mask),  # KL(old || new), as k3
            "tokens": mask.sum(),  # the weight of these means where micro-batches are combined
        }
    return objective, ratio, parts


def grpo_loss(
    logps,
    old_logps,
    ref_logps,
    advantages,
    mask,
    clip_low=0.2,
    clip_high=0.2,
    kl_coef=0.0,
    kl="k3",
    aggregate="sequence",
    max_length=None,
    denominator=None,
):
    """GRPO's objective, negated. logps, old_logps, ref_logps, mask (N, T), advantages (N,) -> (scalar loss, parts).

    The ratio is clipped to [1 - clip_low, 1 + clip_high]. old_logps None: on-policy. ref_logps may be None if kl_coef is 0; where given,
    parts["kl"] reports the KL in any case. For kl see kl_estimate, for aggregate normaliser. On-policy the loss is 0 with "sequence", as
    advantages sum to 0 by group, and near 0 otherwise, as rows count by length; the gradient is not 0.
    """
    _want(
        clip_low >= 0 and clip_high >= 0,
        f"clip_low must not be negative, nor clip_high; got {clip_low} and {clip_high}",
    )
    _want(
        kl_coef == 0 or (kl_coef > 0 and ref_logps is not None),
        f"kl_coef is {kl_coef}: negative, or ref_logps is None",
    )
    A = _per_row("advantages", advantages, mask)
    mask, logps, old_logps, ref_logps, A = _clean(
        mask, logps=logps, old_logps=old_logps, ref_logps=ref_logps, A=A
    )
    objective, ratio, parts = _clipped_objective(logps, old_logps, A, mask, clip_low, clip_high)
    per_token = -objective  # (N, T)
    if ref_logps is not None:
        k = kl_estimate(logps, ref_logps, kl, ratio)
        parts["kl"] = masked_mean(k.detach(), mask)
        if kl_coef > 0:
            per_token = per_token + kl_coef * k
    return aggregate_tokens(per_token, mask, aggregate, max_length, denominator), parts  # 2402.03300 eq. (3)


# -------------------------------------------------------------------------------------------------------------------------------------- PPO
@torch.no_grad()
def token_rewards(scores, logps, ref_logps, mask, kl_coef):
    """scores (N,), log-probs of the samples (N, T) -> rewards (N, T): a KL penalty per token, the score on the EOS.

    The EOS is the last valid token of a row, also of one cut at the length limit. ref_logps: None if kl_coef is 0.
    """
    _want(
        kl_coef == 0 or (kl_coef > 0 and ref_logps is not None),
        f"kl_coef is {kl_coef}: negative, or ref_logps is None",
    )
    scores = _per_row("scores", scores, mask)
    mask, logps, ref_logps, scores = _clean(mask, logps=logps, ref_logps=ref_logps, scores=scores)
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)  # (N, T); all False in a row without tokens
    score = torch.where(last, scores, 0)
    return (
        score if ref_logps is None else score - kl_coef * kl_estimate(logps, ref_logps, "k1")
    )  # 2402.03300 eq. (2)


@torch.no_grad()
def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """rewards, values (N, T) -> (advantages, returns), both (N, T), not whitened, 0 on padding.

    A row's last valid token ends its episode: the value after it is 0. Masked positions are no steps in time.
    """
    mask, rewards, values = _clean(mask, rewards=rewards, values=values)
    advantages = torch.zeros_like(rewards + values)
    A_next = V_next = advantages[:, 0].clone()  # (N,)
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * V_next - values[:, t]  # 1707.06347 eq. (12)
        A = delta + gamma * lam * A_next  # 1506.02438 eq. (16), as a recursion
        valid = mask[:, t]
        advantages[:, t] = torch.where(valid, A, 0)
        A_next, V_next = torch.where(valid, A, A_next), torch.where(valid, values[:, t], V_next)
    return advantages, advantages + values  # values are 0 on padding


@torch.no_grad()
def whiten(x, mask, eps=1e-8, ddof=0):
    """(N, T) -> mean 0, std 1 over the valid tokens of a whole rollout; 0 elsewhere, or if all equal. ddof=1: TRL's."""
    mask, x = _clean(mask, x=x)
    variance = _masked_variance(x, mask, ddof)
    return torch.where(mask & (variance > 0), (x - masked_mean(x, mask)) * (variance + eps).rsqrt(), 0)


def ppo_policy_loss(logps, old_logps, advantages, mask, clip=0.2, denominator=None):
    """PPO's clipped surrogate, negated, mean over tokens. All (N, T) -> (scalar loss, parts)."""
    _want(clip >= 0, f"clip must not be negative, got {clip}")
    mask, logps, old_logps, A = _clean(mask, logps=logps, old_logps=old_logps, advantages=advantages.detach())
    objective, _, parts = _clipped_objective(logps, old_logps, A, mask, clip, clip)
    return masked_mean(-objective, mask, denominator), parts


def ppo_value_loss(values, old_values, returns, mask, clip=0.2, denominator=None):
    """Half the squared error, clipped around the values at sampling time. All (N, T) -> (scalar loss, parts).

    The larger error counts: a value that has moved more than `clip` towards its return gets no gradient, one that moved away gets all of
    it. clip=float("inf") is the paper's, 1707.06347 eq. (9), times 1/2.
    """
    _want(clip >= 0, f"clip must not be negative, got {clip}")
    mask, V, V_old, R = _clean(mask, values=values, old_values=old_values.detach(), returns=returns.detach())
    error, clipped_error = (V - R).square(), (V.clamp(V_old - clip, V_old + clip) - R).square()
    parts = {"clip_fraction": masked_mean((clipped_error > error).detach(), mask), "tokens": mask.sum()}
    return 0.5 * masked_mean(torch.max(error, clipped_error), mask, denominator), parts


@torch.no_grad()
def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns): 1 perfect, 0 no better than a constant (or all returns are equal)."""
    mask, V, R = _clean(mask, values=values, returns=returns)
    total = _masked_variance(R, mask)
    return torch.where(total > 0, 1 - _masked_variance(R - V, mask) / total, 0)


# -------------------------------------------------------------------------------------------------------------------- a step of each method


def sft_update(trainer, records):
    """One optimisation step of SFT on B reference answers."""
    c, policy, sums = trainer.config, trainer.policy, Sums()
    prompts, answers = [r["prompt_ids"] for r in records], [[r["reference_ids"]] for r in records]
    n = normaliser(completion_mask(answers, policy.device), "sequence" if c.per_response else "token")
    parts = list(trainer.micro_batches(prompts, answers))
    for part in parts:
        scored = policy.token_logps(prompts[part], answers[part])
        loss = sft_loss(flat(scored.logps), flat(scored.mask), c.per_response, denominator=n)
        loss.backward()
        sums.add("loss", loss * len(parts))  # a mean over parts that add up
        sums.add("logp/chosen", scored.logps, scored.mask)
    return sums.means() | trainer.optimizer_step() | {"updates": trainer.step + 1}


def dpo_update(trainer, records):
    """One optimisation step of DPO on B pairs, each a prompt with a group of two: chosen and rejected."""
    c, policy, sums, B = trainer.config, trainer.policy, Sums(), len(records)
    trainer.note(
        "DPO trains a difference: log-probs of chosen answers may fall (logp/chosen) while those of rejected ones fall faster. That is normal."
    )
    prompts, pairs = (
        [r["prompt_ids"] for r in records],
        [[r["reference_ids"], r["rejected_ids"]] for r in records],
    )
    index = [r["record_index"] for r in records]
    # Kept in the checkpoint too: scored again in another micro-batch they would round otherwise.
    frozen = trainer.kept.setdefault(
        "reference_logps", torch.full((len(trainer.records), 2), math.nan, device=policy.device)
    )
    for part in trainer.micro_batches(prompts, pairs):
        if new := [
            i for i in range(B)[part] if frozen[index[i], 0].isnan()
        ]:  # the others are known from an earlier pass over the data
            with torch.no_grad():
                scored = policy.token_logps(
                    [prompts[i] for i in new], [pairs[i] for i in new], role="reference"
                )
            frozen[[index[i] for i in new]] = scored.logps.sum(-1)
        scored = policy.token_logps(prompts[part], pairs[part])
        chosen, rejected = scored.logps.sum(-1).unbind(1)
        loss, r_chosen, r_rejected = dpo_loss(
            chosen, rejected, *frozen[index[part]].unbind(1), c.beta, c.label_smoothing, denominator=B
        )
        loss.backward()
        margin = r_chosen - r_rejected
        values = {
            "logp/chosen": chosen,
            "logp/rejected": rejected,
            "dpo/chosen": r_chosen,
            "dpo/rejected": r_rejected,
            "dpo/margin": margin,
            "dpo/accuracy": (margin > 0) + 0.5 * (margin == 0),
            "loss": (loss * B / len(margin)).expand(len(margin)),
        }
        for name, value in values.items():
            sums.add(name, value)
    return sums.means() | trainer.optimizer_step() | {"updates": trainer.step + 1}


def grpo_update(trainer, records):
    """One rollout of GRPO on B prompts, and one or several optimiser updates on it."""
    c, policy, sums = trainer.config, trainer.policy, Sums()
    if c.kl == "k1" and c.kl_coef > 0:
        trainer.note(
            "--kl k1 in the loss has an expected gradient of 0: it adds noise and holds nothing. Choose k3_ratio or k3."
        )
    if c.updates_per_rollout == 1:
        size = (
            "be 0, plus the KL term if there is one,"
            if c.aggregate == "sequence"
            else "stay near 0 (samples count by length)"
        )
        trainer.note(
            f"The loss will {size} while the policy learns: its ratio is 1, and a group's advantages sum to 0. The gradient is not 0; watch reward/mean."
        )
    batch = trainer.rollout(records)
    prompts, samples = batch.prompts, batch.completions
    A = grpo_advantages(batch.rewards, c.scale_advantages)  # (B, G)
    n = normaliser(completion_mask(samples, policy.device), c.aggregate, c.max_new_tokens)
    parts = list(trainer.micro_batches(prompts, samples))
    old, frozen = [None] * len(parts), []
    for _ in range(c.updates_per_rollout):  # 2402.03300, algorithm 1, line 10
        for i, part in enumerate(parts):
            scored = policy.token_logps(prompts[part], samples[part], c.temperature)
            if old[i] is None:
                with torch.no_grad():
                    frozen.append(
                        policy.token_logps(prompts[part], samples[part], c.temperature, role="reference")
                    )
                sums.tokens(scored, frozen[i], batch.sampled_logps[part])
            loss, about = grpo_loss(
                flat(scored.logps),
                old[i],
                flat(frozen[i].logps),
                A[part].flatten(),
                flat(scored.mask),
                c.clip_low,
                c.clip_high,
                c.kl_coef,
                c.kl,
                c.aggregate,
                c.max_new_tokens,
                denominator=n,
            )
            loss.backward()
            if (
                old[i] is None
            ):  # pi_old is this policy before its first update, not the sampler with its other precision
                old[i] = flat(scored.logps.detach())
            sums.add("loss", loss * len(parts))
            add_ratio(sums, about)
        metrics = trainer.optimizer_step()
    return batch.metrics | sums.means() | metrics | {"updates": (trainer.step + 1) * c.updates_per_rollout}


def add_ratio(sums, about):  # what _clipped_objective says about the ratio
    for key, name in {
        "clip_fraction_low": "clip/low",
        "clip_fraction_high": "clip/high",
        "approx_kl": "kl/update",
    }.items():
        sums.add(name, about[key].expand(int(about["tokens"])))
    sums.largest["ratio/max"] = max(sums.largest.get("ratio/max", 0.0), float(about["ratio_max"]))


def ppo_setup(trainer):
    most = trainer.config.prompts_per_step
    if trainer.config.minibatches > most:
        raise UserError(
            f"--minibatches {trainer.config.minibatches}: must be at most --prompts-per-step, {most}; a prompt's samples stay together"
        )
    trainer.train_parameters(trainer.policy.add_role("value", bias=True), trainer.config.value_lr)


def ppo_update(trainer, records):
    """One rollout of PPO on B prompts, and some epochs of optimiser updates on its mini-batches."""
    c, policy, sums = trainer.config, trainer.policy, Sums()
    batch = trainer.rollout(records)
    prompts, samples, G = batch.prompts, batch.completions, c.group_size
    mask = completion_mask(samples, policy.device)  # (N, T)
    # A step's prompts are in random order already, so mini-batches are consecutive. The same cuts are scored before and during the updates:
    # the first update's ratio is then exactly 1, also in bf16, where another shape would round otherwise.
    shares = torch.arange(len(prompts)).chunk(c.minibatches)
    minibatches = [
        list(trainer.micro_batches(prompts, samples, int(share[0]), int(share[-1]) + 1)) for share in shares
    ]

    old, frozen, V = (torch.zeros(mask.shape, device=policy.device) for _ in range(3))
    with torch.no_grad():
        for part in (part for parts in minibatches for part in parts):
            scored, reference = (
                policy.token_logps(prompts[part], samples[part], c.temperature, role)
                for role in ("policy", "reference")
            )
            here = (
                slice(part.start * G, part.stop * G),
                slice(scored.mask.shape[-1]),
            )  # the micro-batch in (N, T)
            old[here], frozen[here] = flat(scored.logps), flat(reference.logps)
            V[here] = flat(policy.token_values(prompts[part], samples[part])[0])
            sums.tokens(scored, reference, batch.sampled_logps[part])
    A, returns = gae(
        token_rewards(batch.rewards.flatten(), old, frozen, mask, c.kl_coef), V, mask, c.gamma, c.gae_lambda
    )
    whitened = whiten(A, mask)
    generator = torch.Generator().manual_seed(
        c.seed * 1_000_003 + trainer.step
    )  # of seed and step alone, so a resumed run repeats it
    for parts in [
        minibatches[m]
        for _ in range(c.ppo_epochs)
        for m in torch.randperm(len(minibatches), generator=generator).tolist()
    ]:
        n = mask[parts[0].start * G : parts[-1].stop * G].sum()
        losses = torch.zeros(2, device=policy.device)  # the policy's and the value function's; parts add up
        for part in parts:
            scored = policy.token_logps(prompts[part], samples[part], c.temperature)
            valid = flat(scored.mask)
            here = (slice(part.start * G, part.stop * G), slice(valid.shape[1]))
            loss, about = ppo_policy_loss(
                flat(scored.logps), old[here], whitened[here], valid, c.clip, denominator=n
            )
            loss.backward()
            with policy.role("value"):
                values, _ = policy.token_values(prompts[part], samples[part])
                value_loss, value_about = ppo_value_loss(
                    flat(values), V[here], returns[here], valid, c.value_clip, denominator=n
                )
                value_loss.backward()
            losses += torch.stack([loss, value_loss]).detach()
            add_ratio(sums, about)
            sums.add("clip/value", value_about["clip_fraction"].expand(int(valid.sum())))
        for name, value in zip(("loss", "value/loss"), losses):
            sums.add(name, value)
        metrics = trainer.optimizer_step()
    metrics |= {
        "value/explained_variance": float(explained_variance(V, returns, mask)),
        "updates": (trainer.step + 1) * c.ppo_epochs * len(minibatches),
    }
    return batch.metrics | sums.means() | metrics


SFT = Method(
    "sft",
    SFTConfig,
    sft_update,
    {"logp/chosen": ("nats/token", "mean log-prob of the references; rises, then levels off")},
    [("Log-likelihood of references", "nats/token", ["logp/chosen"]), ("Loss", "nats/token", ["loss"])],
)
DPO = Method(
    "dpo",
    DPOConfig,
    dpo_update,
    {
        "logp/chosen": (
            "nats",
            "mean summed log-prob of chosen answers; that it falls is normal while logp/rejected falls faster",
        ),
        "logp/rejected": ("nats", "likewise of rejected answers; falls"),
        "dpo/chosen": (
            "-",
            "implicit reward beta * log(pi / pi_ref) of chosen answers; 0 at the first step, then often negative, which is normal",
        ),
        "dpo/rejected": ("-", "likewise of rejected answers; falls"),
        "dpo/margin": ("-", "chosen minus rejected; 0 at the first step, then rises"),
        "dpo/accuracy": (
            "share",
            "pairs with a positive margin, ties as a half; 0.5 at the first step, then rises",
        ),
    },
    [
        ("Implicit rewards", "-", ["dpo/chosen", "dpo/rejected", "dpo/margin"]),
        ("Pairs ranked rightly", "share", ["dpo/accuracy"]),
        ("Log-likelihood", "nats", ["logp/chosen", "logp/rejected"]),
        ("Loss", "nats", ["loss"]),
    ],
    needs_rejected=True,
)
CLIPPED = [
    ("Clipped", "share", ["clip/low", "clip/high", "clip/value"]),
    ("Largest ratio", "-", ["ratio/max"]),
    ("Loss", "nats", ["loss"]),
]
GRPO = Method("grpo", GRPOConfig, grpo_update, {}, CLIPPED)
PPO = Method(
    "ppo",
    PPOConfig,
    ppo_update,
    {
        "clip/value": ("share", "values that moved out of their clip range towards the return; under 0.2"),
        "value/loss": ("reward^2", "half the squared error of the value function; falls"),
        "value/explained_variance": (
            "share",
            "of the returns, before the step's updates; rises from 0 towards 1; below 0 the values mislead",
        ),
    },
    [
        ("Explained variance", "share", ["value/explained_variance"]),
        ("Value loss", "reward^2", ["value/loss"]),
        *CLIPPED,
    ],
    ppo_setup,
)
METHODS = {method.name: method for method in (SFT, DPO, PPO, GRPO)}


def command_line(argv=None):
    """The method's name and its flags -> exit status, see train.main."""
    return main(METHODS, argv, description=__doc__)


if __name__ == "__main__":
    sys.exit(command_line())
