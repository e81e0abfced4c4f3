"""The baselines that GRAO and UniAPL are compared with: SFT, DPO, PPO and GRPO, on the same loop, data and
flags as minigrao.py.

    python baselines.py sft     # mean log-likelihood of the expert answer              arXiv 2508.07750 eq. (1), 2604.23747
    python baselines.py dpo     # a classifier of chosen against rejected               arXiv 2305.18290 eq. (7)
    python baselines.py grpo    # clipped ratio, the group as baseline, KL in the loss  arXiv 2402.03300 eq. (3)
    python baselines.py ppo     # clipped ratio, a value function, KL in the reward     arXiv 1707.06347 eq. (7), 1506.02438 eq. (16)

A section for each method: what its paper says, the loss as a pure function of tensors, the settings, the
step. Equation numbers are those of the newest arXiv versions. Where these methods leave their papers, and
TRL, which many readers know:

- SFT averages over all target tokens of the optimisation step, not over means of micro-batches (2604.23747
  traces a widespread weak SFT baseline to that). GRAO's mean of per-response means is `--per-response`. SFT
  and DPO score at temperature 1 whatever --temperature is.
- DPO has label smoothing (conservative DPO, ericmitchell.ai/cdpo.pdf). TRL 1.12's default DPO loss takes the
  setting and ignores it.
- GRPO's std is the population's (over G) plus 1e-6, a tied group's advantage exactly 0. The paper does not
  say which std; TRL divides by G - 1 and adds 1e-4: at G = 8 its advantages are 0.94 of these. The clip
  bounds are set apart (DAPO, 2503.14476). --aggregate is the paper's "sequence", DAPO's "token" (TRL's
  default) or Dr. GRPO's "constant" (2503.20783). The KL is off unless asked for, and then k3_ratio, whose
  gradient is that of KL(pi || ref); the paper's is `--kl k3 --kl-coef 0.04`. Each update takes the whole
  rollout.
- PPO puts the score on the EOS token, after which the value is 0. TRL puts it one position later and keeps a
  value there. The value loss is clipped as in OpenAI's code, not in the paper. Whitening divides by the
  population's std, TRL's by n - 1. Mini-batches are whole prompt groups, visited in random order. The value
  function is a LoRA adapter of its own, so no coefficient weighs its loss against the policy's.

Shapes and denominators are those of losses.py: (..., T) with a mask, and `denominator`, the count of the
whole optimisation step. `parts` and `about` are detached scalars. One letter means two things in these
papers: beta is DPO's strength of the reference here, the weight of imitation in minigrao.py, and in GRPO's
paper the weight of the KL, which is kl_coef here. mu is GRPO's number of updates here (updates_per_rollout)
and the weight of imitation in uniapl.py. A reference (ref_logps, pi_ref) is always the frozen model.
"""

import math
import sys
from dataclasses import dataclass

from data import UserError
from engine.command_line import answer_early
from engine.settings import Config, Method, setting

KL = ("k1", "k3", "k3_ratio")  # see losses.kl_estimate


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
    kl: str = setting("k3_ratio", "its estimate; k3 is the paper's, see kl_estimate", choices=KL)
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
from torch import Tensor

from losses import (
    aggregate_tokens,
    clean,
    clipped_surrogate,
    denominator,
    explained_variance,
    kl_estimate,
    masked_mean,
    per_token,
    want,
    whiten,
    widen,
)
from train import Part, Sums, Trainer, main

# -----------------------------------------------------------------------------------------------------------
# SFT Imitation and nothing else: raise the likelihood of the expert answer y. 2508.07750 eq. (1):
#
#     J_SFT = E[ 1/|y| Σₜ log π(yₜ | q, y_<t) ]
#
# What it cannot do is get better than y, or learn from an answer of its own that was better.


def sft_loss(logps: Tensor, mask: Tensor, per_response=False, denominator=None) -> Tensor:
    """Negative log-likelihood of the target tokens, logps and mask (..., T) -> scalar, nats per token.

    Over all tokens (2604.23747), or with per_response the mean of the responses' own means (2508.07750 eq.
    (1)), in which a token of a short answer weighs more than one of a long answer.
    """
    mask, logps = clean(mask, logps=logps)
    aggregate = "sequence" if per_response else "token"
    return aggregate_tokens(-logps, mask, aggregate, denominator=denominator)


def sft_update(trainer: Trainer, records: list) -> dict:
    """One optimisation step of SFT on B expert answers: no rollout, no reward, no reference."""
    c, sums = trainer.config, Sums()
    # The step's count, before the loop. With each micro-batch's own, the gradient would depend on how much
    # memory there is.
    answers = [[r["expert_ids"]] for r in records]
    n = denominator(answers, "sequence" if c.per_response else "token")
    for part in trainer.scored_experts(records):  # logps, mask (b, 1, T)
        loss = sft_loss(part.logps, part.mask, c.per_response, denominator=n)
        loss.backward()  # gradients add up in p.grad
        sums.share("loss", loss)
        sums.add("logp/chosen", part.logps, part.mask)
    return sums.means() | trainer.optimizer_step() | {"updates": trainer.step + 1}


SFT = Method(
    "sft",
    SFTConfig,
    sft_update,
    {"logp/chosen": ("nats/token", "mean log-prob of the expert answers; rises, then levels off")},
    [("Log-likelihood of expert answers", "nats/token", ["logp/chosen"]), ("Loss", "nats/token", ["loss"])],
)

# -----------------------------------------------------------------------------------------------------------
# DPO Preference without a reward model and without samples. The policy that maximises a reward r under a KL
# penalty of weight beta has r(q, y) = beta log π(y | q) / π_ref(y | q) + beta log Z(q) (2305.18290 eq. (5)),
# so a policy *is* a reward model; train it as one on pairs, chosen y_w against rejected y_l (eq. (7)):
#
#     L_DPO = -E[ log σ( beta log π(y_w)/π_ref(y_w) - beta log π(y_l)/π_ref(y_l) ) ]
#
# Z(q) is the same for both answers and cancels, which is the whole trick: nobody could compute it.


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    denominator: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Four (N,) of log-probs summed over completions, nats -> (scalar loss, chosen_rewards (N,),
    rejected_rewards (N,)).

    The rewards are the implicit ones, beta * log(pi / pi_ref), detached; only their difference is trained.
    label_smoothing in [0, 0.5] is the probability that a pair is labelled the wrong way round; the best
    reward margin is then finite, log((1 - eps) / eps). Sums, not means: eq. (5) speaks of the whole answer's
    probability. ValueError for other shapes and settings.
    """
    given = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    shapes = [tuple(x.shape) for x in given]
    same = len(shapes[0]) == 1 and len(set(shapes)) == 1
    want(same, f"dpo_loss wants four (N,) of summed log-probs, got {shapes}")
    settings = f"want beta > 0 and label_smoothing in [0, 0.5], got {beta} and {label_smoothing}"
    want(beta > 0 and 0 <= label_smoothing <= 0.5, settings)
    chosen_rewards = beta * (widen(chosen_logps) - widen(ref_chosen_logps).detach())  # eq. (5) without log Z
    rejected_rewards = beta * (widen(rejected_logps) - widen(ref_rejected_logps).detach())
    h, eps = chosen_rewards - rejected_rewards, label_smoothing
    # eq. (7); with probability eps the pair is the other way round. logsigmoid, because log(sigmoid(h)) is
    # -inf at -100.
    losses = -(1 - eps) * F.logsigmoid(h) - eps * F.logsigmoid(-h)
    n = torch.as_tensor(len(losses) if denominator is None else denominator)
    return losses.sum() / n.clamp(min=1), chosen_rewards.detach(), rejected_rewards.detach()


def dpo_update(trainer: Trainer, records: list) -> dict:
    """One optimisation step of DPO on B pairs, offline: the policy never sees an answer of its own."""
    c, sums, B = trainer.config, Sums(), len(records)
    trainer.note(
        "DPO trains a difference: log-probs of chosen answers may fall (logp/chosen) while those of rejected ones fall "
        "faster. That is normal."
    )
    # A pair is a prompt with a group of two, so its prompt is computed once. Temperature 1: nothing was
    # sampled.
    prompts, pairs = [r["prompt_ids"] for r in records], []
    for r in records:
        pairs.append([r["expert_ids"], r["rejected_ids"]])
    for part in trainer.parts(prompts, pairs, temperature=1.0):
        ref_chosen, ref_rejected = pair_reference(trainer, records[part.groups], part).unbind(1)
        chosen, rejected = part.score().logps.sum(-1).unbind(1)  # (b, 2, T) -> (b, 2) -> two (b,)
        settings = (c.beta, c.label_smoothing, B)  # B: the denominator is the step's
        loss, r_chosen, r_rejected = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, *settings)
        loss.backward()
        sums.share("loss", loss)
        margin = r_chosen - r_rejected
        about = {"logp/chosen": chosen, "logp/rejected": rejected, "dpo/chosen": r_chosen}
        about |= {"dpo/rejected": r_rejected, "dpo/margin": margin}
        about["dpo/accuracy"] = (margin > 0) + 0.5 * (
            margin == 0
        )  # a tie, as at the first step, is half right
        for name, values in about.items():
            sums.add(name, values)
    return sums.means() | trainer.optimizer_step() | {"updates": trainer.step + 1}


@torch.no_grad()
def pair_reference(trainer: Trainer, records: list, part: Part) -> Tensor:
    """log pi_ref of a part's chosen and rejected answers, (b, 2), nats: the reference never changes, so once
    for each record.

    Kept for later passes over the data, and in the checkpoint: scored again in another micro-batch they would
    round otherwise, and a resumed run would not be the run that was never stopped.
    """
    never = torch.full((len(trainer.records), 2), math.nan, device=trainer.policy.device)
    kept = trainer.kept.setdefault("reference_logps", never)
    index = [r["record_index"] for r in records]
    new = [i for i in range(len(index)) if kept[index[i], 0].isnan()]
    if new:
        prompts, pairs = [part.prompts[i] for i in new], [part.completions[i] for i in new]
        scored = trainer.policy.token_logps(prompts, pairs, role="reference")
        kept[[index[i] for i in new]] = scored.logps.sum(-1)
    return kept[index]


DPO = Method(
    "dpo",
    DPOConfig,
    dpo_update,
    {
        "logp/chosen": (
            "nats",
            "mean summed log-prob of chosen answers; may fall while rejected falls faster",
        ),
        "logp/rejected": ("nats", "likewise of rejected answers; falls"),
        "dpo/chosen": ("-", "beta * log(pi / pi_ref) of chosen answers; 0 at first, then often negative"),
        "dpo/rejected": ("-", "likewise of rejected answers; falls"),
        "dpo/margin": ("-", "chosen minus rejected; 0 at the first step, then rises"),
        "dpo/accuracy": ("share", "pairs with a positive margin, ties as a half; 0.5 at first, then rises"),
    },
    [
        ("Implicit rewards", "-", ["dpo/chosen", "dpo/rejected", "dpo/margin"]),
        ("Pairs ranked rightly", "share", ["dpo/accuracy"]),
        ("Log-likelihood", "nats", ["logp/chosen", "logp/rejected"]),
        ("Loss", "nats", ["loss"]),
    ],
    needs_rejected=True,
)


def log_ratio(sums: Sums, about: dict):
    """Into the step's metrics what clipped_surrogate says of a micro-batch."""
    for key, name in (
        ("clip_fraction_low", "clip/low"),
        ("clip_fraction_high", "clip/high"),
        ("approx_kl", "kl/update"),
    ):
        sums.mean(name, about[key], about["tokens"])
    sums.max("ratio/max", about["ratio_max"])


# ----------------------------------------------------------------------------------------------------------
# GRPO PPO without a value function: what a sample is worth is measured against the other samples of its
# prompt. 2402.03300 eq. (3), sec. 4.1.2:
#
#     J_GRPO = 1/G Σᵢ 1/|oᵢ| Σₜ [ min( ratio Aᵢ, clip(ratio, 1 - ε, 1 + ε) Aᵢ ) - β KL(π || π_ref) ]      Aᵢ = (rᵢ - mean r) / std r
#
# One advantage serves all tokens of a sample: which of them earned it, GRPO does not ask.


@torch.no_grad()
def grpo_advantages(rewards: Tensor, scale: str = "std", eps: float = 1e-6, ddof: int = 0) -> Tensor:
    """Rewards (B, G) -> advantages (B, G), each prompt by itself. scale="none" is Dr. GRPO's; ddof=1,
    eps=1e-4 are TRL's.
    """
    want(scale in ("std", "none"), f"scale must be one of std, none, got {scale!r}")
    shape = f"rewards must be (B, G) with B, G >= 1, got {tuple(rewards.shape)}"
    want(rewards.dim() == 2 and rewards.numel(), shape)
    # One NaN would spread to every weight in one step.
    want(torch.isfinite(rewards).all(), "rewards hold NaN or infinity")
    r = widen(rewards)
    A = r - r.mean(1, keepdim=True)
    if scale == "std":
        std = (A.square().sum(1, keepdim=True) / max(r.shape[1] - ddof, 1)).sqrt()
        A = A / (std + eps)  # 2402.03300 sec. 4.1.2
    tied = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)  # not std == 0: see losses.masked_variance
    return torch.where(tied, 0, A)


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    kl: str = "k3",
    aggregate: str = "sequence",
    max_length: int | None = None,
    denominator: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO's objective, negated. logps, old_logps, ref_logps, mask (..., T), advantages (...,) -> (scalar
    loss, parts).

    The ratio is clipped to [1 - clip_low, 1 + clip_high]. old_logps None: on-policy. ref_logps may be None if
    kl_coef is 0; where given, parts["kl"] reports the KL in any case. For kl see kl_estimate, for aggregate
    normaliser. On-policy the loss is 0 with "sequence", as advantages sum to 0 by group, and near 0
    otherwise, as rows count by length; the gradient is not 0.
    """
    clips = f"clip_low must not be negative, nor clip_high; got {clip_low} and {clip_high}"
    want(clip_low >= 0 and clip_high >= 0, clips)
    usable = kl_coef == 0 or (kl_coef > 0 and ref_logps is not None)
    want(usable, f"kl_coef is {kl_coef}: negative, or ref_logps is None")
    A = per_token("advantages", advantages, mask)
    mask, logps, old_logps, ref_logps, A = clean(
        mask, logps=logps, old_logps=old_logps, ref_logps=ref_logps, A=A
    )
    objective, ratio, parts = clipped_surrogate(logps, old_logps, A, mask, clip_low, clip_high)
    per_token_loss = -objective  # (..., T)
    if ref_logps is not None:
        k = kl_estimate(logps, ref_logps, kl, ratio)
        parts["kl"] = masked_mean(k.detach(), mask)
        if kl_coef > 0:
            per_token_loss = per_token_loss + kl_coef * k
    return aggregate_tokens(
        per_token_loss, mask, aggregate, max_length, denominator
    ), parts  # 2402.03300 eq. (3)


def grpo_update(trainer: Trainer, records: list) -> dict:
    """One rollout of GRPO on B prompts, and one or several optimiser updates on it (2402.03300, algorithm 1)."""
    c, sums = trainer.config, Sums()
    grpo_notes(trainer)

    # 1. Explore, and compare each sample with the others of its prompt.
    batch = trainer.rollout(records)
    A = grpo_advantages(batch.rewards, c.scale_advantages)  # (B, G)
    n = denominator(batch.completions, c.aggregate, c.max_new_tokens)
    settings = dict(kl=c.kl, aggregate=c.aggregate, max_length=c.max_new_tokens, denominator=n)
    settings |= dict(clip_low=c.clip_low, clip_high=c.clip_high, kl_coef=c.kl_coef)

    # 2. Learn, with updates_per_rollout updates on the same samples (algorithm 1, line 10).
    for _ in range(c.updates_per_rollout):
        for part in trainer.scored(batch, sums):  # logps, ref_logps, mask (b, G, T)
            if part.old_logps is None:
                # pi_old is this policy before its first update, not the sampler with its other precision: the
                # first ratio is then exactly 1, and the clip measures what the updates do and nothing else.
                part.old_logps = part.logps.detach()
            advantages = A[part.groups]
            loss, about = grpo_loss(
                part.logps, part.old_logps, part.ref_logps, advantages, part.mask, **settings
            )
            loss.backward()
            sums.share("loss", loss)
            log_ratio(sums, about)
        metrics = trainer.optimizer_step()
    updates = {"updates": (trainer.step + 1) * c.updates_per_rollout}
    return batch.metrics | sums.means(c.updates_per_rollout) | metrics | updates


def grpo_notes(trainer: Trainer):
    """What a newcomer would take for a bug, said before it is seen."""
    c = trainer.config
    if c.kl == "k1" and c.kl_coef > 0:
        trainer.note(
            "--kl k1 in the loss has an expected gradient of 0: it adds noise and holds nothing. Choose k3_ratio or k3."
        )
    size = "stay near 0 (samples count by length)"
    if c.aggregate == "sequence":
        size = "be 0, plus the KL term if there is one,"
    if c.updates_per_rollout == 1:
        trainer.note(
            f"The loss will {size} while the policy learns: its ratio is 1, and a group's advantages sum to 0. "
            "The gradient is not 0; watch reward/mean."
        )


CLIPPED = [
    ("Clipped", "share", ["clip/low", "clip/high", "clip/value"]),
    ("Largest ratio", "-", ["ratio/max"]),
    ("Loss", "nats", ["loss"]),
]
GRPO = Method("grpo", GRPOConfig, grpo_update, {}, CLIPPED)

# -----------------------------------------------------------------------------------------------------------
# PPO A value function V says what to expect at each token, and a token's advantage is what came beyond it
# (1506.02438 eq. (16)):
#
#     δₜ = rₜ + γ V(sₜ₊₁) - V(sₜ)        Aₜ = Σₗ (γλ)ˡ δₜ₊ₗ
#
# lambda = 1 trusts what was sampled (unbiased, noisy), lambda = 0 trusts V (biased, calm). In texts the
# reward comes once, at the end, and the KL to the reference is taken from the reward token by token
# (InstructGPT's way, and the reason why k1 is right here).


@torch.no_grad()
def token_rewards(
    scores: Tensor, logps: Tensor, ref_logps: Tensor | None, mask: Tensor, kl_coef: float
) -> Tensor:
    """scores (...,), log-probs of the samples (..., T) -> rewards (..., T): a KL penalty per token, the score
    on the EOS.

    The EOS is the last valid token of a row, also of one cut at the length limit. ref_logps: None if kl_coef
    is 0.
    """
    usable = kl_coef == 0 or (kl_coef > 0 and ref_logps is not None)
    want(usable, f"kl_coef is {kl_coef}: negative, or ref_logps is None")
    scores = per_token("scores", scores, mask)
    mask, logps, ref_logps, scores = clean(mask, logps=logps, ref_logps=ref_logps, scores=scores)
    tokens_left = mask.flip(-1).cumsum(-1).flip(-1)  # valid ones, this one included
    score = torch.where(mask & (tokens_left == 1), scores, 0)  # all 0 in a row without tokens
    if ref_logps is None:
        return score
    return score - kl_coef * kl_estimate(logps, ref_logps, "k1")  # 2402.03300 eq. (2)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma=1.0, lam=0.95) -> tuple[Tensor, Tensor]:
    """rewards, values (..., T) -> (advantages, returns), both (..., T), not whitened, 0 on padding.

    A row's last valid token ends its episode: the value after it is 0. Masked positions are no steps in time.
    """
    mask, rewards, values = clean(mask, rewards=rewards, values=values)
    advantages = torch.zeros_like(rewards + values)
    A_next = V_next = advantages[..., 0].clone()  # (...,): 0 after the end
    for t in reversed(range(mask.shape[-1])):
        delta = rewards[..., t] + gamma * V_next - values[..., t]  # 1707.06347 eq. (12)
        A = delta + gamma * lam * A_next  # 1506.02438 eq. (16), as a recursion
        valid = mask[..., t]
        advantages[..., t] = torch.where(valid, A, 0)
        A_next, V_next = torch.where(valid, A, A_next), torch.where(valid, values[..., t], V_next)
    return advantages, advantages + values  # the return V should have said; values are 0 on padding


def ppo_policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2, denominator=None
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate, negated, mean over tokens. All (..., T) -> (scalar loss, parts)."""
    want(clip >= 0, f"clip must not be negative, got {clip}")
    mask, logps, old_logps, A = clean(mask, logps=logps, old_logps=old_logps, advantages=advantages.detach())
    objective, _, parts = clipped_surrogate(logps, old_logps, A, mask, clip, clip)
    return masked_mean(-objective, mask, denominator), parts


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.2, denominator=None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error, clipped around the values at sampling time. All (..., T) -> (scalar loss,
    parts).

    The larger error counts: a value that has moved more than `clip` towards its return gets no gradient, one
    that moved away gets all of it. clip=float("inf") is the paper's, 1707.06347 eq. (9), times 1/2.
    """
    want(clip >= 0, f"clip must not be negative, got {clip}")
    old_values, returns = old_values.detach(), returns.detach()
    mask, V, V_old, R = clean(mask, values=values, old_values=old_values, returns=returns)
    error, clipped_error = (V - R).square(), (V.clamp(V_old - clip, V_old + clip) - R).square()
    parts = {"clip_fraction": masked_mean((clipped_error > error).detach(), mask), "tokens": mask.sum()}
    return 0.5 * masked_mean(torch.max(error, clipped_error), mask, denominator), parts


def ppo_setup(trainer: Trainer):
    """The value function: one more LoRA adapter on the shared backbone, with a scalar head and a learning
    rate of its own.
    """
    c = trainer.config
    if c.minibatches > c.prompts_per_step:
        raise UserError(
            f"--minibatches {c.minibatches}: must be at most --prompts-per-step, {c.prompts_per_step}; "
            "a prompt's samples stay together"
        )
    trainer.train_parameters(trainer.policy.add_role("value", bias=True), c.value_lr)


def ppo_update(trainer: Trainer, records: list) -> dict:
    """One rollout of PPO on B prompts, then `ppo_epochs` passes of clipped updates over its mini-batches."""
    c, sums = trainer.config, Sums()

    # 1. Explore. Mini-batches are lists of micro-batches: an update each, in as many backward passes as
    #    memory asks for.
    batch = trainer.rollout(records)
    minibatches = trainer.minibatches(batch, c.minibatches)

    # 2. Freeze what the updates are held against, pi_old, the reference and V_old, in the updates' own
    #    micro-batches.
    for part in trainer.scored(batch, sums, grad=False):
        with torch.no_grad():
            part.old_logps, part.old_values = part.logps, part.values()
    old, ref, V = batch.whole("old_logps"), batch.whole("ref_logps"), batch.whole("old_values")  # (B, G, T)

    # 3. Credit: what each token was worth beyond V's expectation. Whitened over the rollout, not over a
    #    mini-batch, where a share of hard prompts would look as good as a share of easy ones.
    mask = batch.whole("mask")
    A, R = gae(token_rewards(batch.rewards, old, ref, mask, c.kl_coef), V, mask, c.gamma, c.gae_lambda)
    whitened = whiten(A, mask)

    # 4. Learn. The denominator is the mini-batch's, because that is what an update takes.
    for minibatch in trainer.shuffled(minibatches, c.ppo_epochs):
        n = sum(part.mask.sum() for part in minibatch)
        for part in minibatch:
            logps, A_part = part.score().logps, part.cut(whitened)
            loss, about = ppo_policy_loss(logps, part.old_logps, A_part, part.mask, c.clip, n)
            loss.backward()
            V_loss, V_about = value_backward(c, part, part.cut(R), n)
            sums.share("loss", loss)
            sums.share("value/loss", V_loss)
            sums.mean("clip/value", V_about["clip_fraction"], V_about["tokens"])
            log_ratio(sums, about)
        metrics = trainer.optimizer_step()  # both adapters, each gradient clipped by its own norm
    updates = c.ppo_epochs * len(minibatches)
    metrics |= {"value/explained_variance": float(explained_variance(V, R, mask))}
    return batch.metrics | sums.means(updates) | metrics | {"updates": (trainer.step + 1) * updates}


def value_backward(c, part: Part, returns: Tensor, n: Tensor) -> tuple[Tensor, dict]:
    """The value function's loss on a part, and its backward pass.

    The role is held over both: with gradient checkpointing the backward pass computes the layers again, with
    whichever adapter is active.
    """
    with part.policy.role("value"):
        loss, about = ppo_value_loss(part.values(), part.old_values, returns, part.mask, c.value_clip, n)
        loss.backward()
    return loss, about


PPO = Method(
    "ppo",
    PPOConfig,
    ppo_update,
    {
        "clip/value": ("share", "values that moved out of their clip range towards the return; under 0.2"),
        "value/loss": ("reward^2", "half the squared error of the value function; falls"),
        # Before the step's updates. Below 0 the values mislead.
        "value/explained_variance": ("share", "share of the returns' variance; rises from 0 towards 1"),
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
