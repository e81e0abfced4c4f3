"""The baselines that GRAO and UniAPL are compared with: SFT, DPO, GRPO, and PPO, whose losses and step are in
ppo.py.

    baselines.py sft   mean log-likelihood of the expert answer              2508.07750v1 eq. (1), 2604.23747
    baselines.py dpo   a classifier of chosen against rejected               2305.18290v3 eq. (7)
    baselines.py grpo  clipped ratio, the group as baseline, KL in the loss  2402.03300v3 eq. (3)
    baselines.py ppo   clipped ratio, a value function, KL in the reward     1707.06347v2 eq. (7)

The same loop, data and flags as minigrao.py. A section for each method: what its paper says, the loss as a
pure function of tensors, the step. Where they leave their papers, and TRL, which many readers know:

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

Letters that two papers use for two things: beta is DPO's strength of the reference, and in minigrao.py the
weight of imitation; GRPO's paper calls the weight of the KL beta, which is kl_coef here. mu is GRPO's number
of updates, updates_per_rollout here, and in uniapl.py the weight of imitation. Shapes and denominators are
those of losses.py.
"""

import math
import sys
from dataclasses import dataclass

from engine.command_line import answer_early
from engine.settings import Config, Method, setting

KL = ("k1", "k3", "k3_ratio")  # see losses.kl_estimate


@dataclass
class SFTConfig(Config):
    # More steps than where samples are drawn: a step without a rollout costs next to nothing.
    presets = {"tiny": dict(lr=1e-3, steps=400), "chat": dict(lr=1e-4)}
    per_response: bool = setting(
        False, "the mean of per-response means, as 2508.07750 eq. (1), not the mean over all tokens"
    )


@dataclass
class DPOConfig(Config):
    presets = {"tiny": dict(lr=1e-3, beta=0.5, steps=200), "chat": dict(lr=1e-4, beta=0.1)}
    # Small: far from the reference for a small margin. Large: the reference is hardly left, and little is
    # learnt.
    beta: float = setting(None, "how firmly the reference holds the policy", above=0, high=100)
    label_smoothing: float = setting(
        0.0, "probability that a pair is labelled the wrong way round", low=0, high=0.5
    )


@dataclass
class GRPOConfig(Config):
    presets = {"tiny": dict(lr=2e-3), "chat": dict(lr=1e-4)}
    # The clip binds from the second update on; with one update for each rollout the ratio is 1.
    clip_low: float = setting(0.2, "the ratio is clipped below at 1 minus this", low=0, high=1)
    clip_high: float = setting(0.2, "and above at 1 plus this", low=0, high=100)
    kl_coef: float = setting(
        0.0, "weight of the KL to the reference in the loss (paper: 0.04)", low=0, high=100
    )
    kl: str = setting("k3_ratio", "its estimate; k3 is the paper's, see kl_estimate", choices=KL)
    # Whose token counts the same: every sample's mean, every token, or every token over a fixed length. The
    # first makes long wrong answers cheap, because each of their tokens is pushed down less.
    aggregate: str = setting(
        "sequence",
        "sequence (paper), token (DAPO) or constant (Dr. GRPO)",
        choices=("sequence", "token", "constant"),
    )
    scale_advantages: str = setting(
        "std", "divide advantages by the group's std, or none (Dr. GRPO)", choices=("std", "none")
    )
    # Rollouts are most of a step's time; more updates on each are cheap and off-policy.
    updates_per_rollout: int = setting(1, "optimiser updates on the samples of a step (mu)", low=1, high=1000)


@dataclass
class PPOConfig(Config):
    presets = {"tiny": dict(lr=1e-3, value_lr=1e-3, steps=75), "chat": dict(lr=1e-4, value_lr=1e-4)}
    clip: float = setting(0.2, "the ratio is clipped to 1 -+ this", low=0, high=1)
    value_clip: float = setting(
        0.2, "values are clipped to those at sampling time -+ this", above=0, high=1e6
    )
    # V starts at 0 everywhere, so in the first steps the advantages are the returns themselves.
    value_lr: float = setting(None, "learning rate of the value function", above=0, high=1)
    # In the reward, so that a token is charged for what it leads to, too; GRPO's is in the loss.
    kl_coef: float = setting(
        0.02, "weight of the KL to the reference in the reward, per token", low=0, high=100
    )
    # gamma = 1: an answer is short, and its first token earns the reward as much as its last one.
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

import ppo
from losses import (
    aggregate_tokens,
    clean,
    clipped_surrogate,
    denominator,
    kl_estimate,
    masked_mean,
    per_token,
    want,
    widen,
)
from train import Part, Sums, Trainer, main

# ---------------------------------------------------------------------------------------------------------
# SFT. Imitation and nothing else: raise the likelihood of the expert answer y. 2508.07750 eq. (1):
#
#     J_SFT = E[ 1/|y| Σₜ log π(yₜ | q, y_<t) ]
#
# What it cannot do is get better than y, or learn from an answer of its own that was better.


def sft_loss(logps: Tensor, mask: Tensor, per_response=False, denominator=None) -> Tensor:
    """Negative log-likelihood of the target tokens, logps and mask (..., T) -> scalar, nats per token.

    Over all tokens (2604.23747), or with per_response the mean of the responses' own means (2508.07750 eq.
    (1)), in which a token of a short answer weighs more than one of a long answer.
    """
    # EOS is one of the targets: masked out, the policy would learn what to say and never when to stop.
    mask, logps = clean(mask, logps=logps)
    aggregate = "sequence" if per_response else "token"
    return aggregate_tokens(-logps, mask, aggregate, denominator=denominator)


def sft_update(trainer: Trainer, records: list) -> dict:
    """One optimisation step of SFT on B expert answers: no rollout, no reward, no reference."""
    c, sums = trainer.config, Sums()
    # 1. The step's count, before the loop. With each micro-batch's own, the gradient would depend on how much
    #    memory there is, and a token in a short micro-batch would weigh more than one in a long one.
    answers = [[r["expert_ids"]] for r in records]
    n = denominator(answers, "sequence" if c.per_response else "token")
    # 2. Learn. A backward pass for each micro-batch, whose graph is then gone; gradients add up in p.grad.
    for part in trainer.scored_experts(records):  # logps, mask (b, 1, T)
        loss = sft_loss(part.logps, part.mask, c.per_response, denominator=n)
        loss.backward()
        sums.share("loss", loss)
        sums.add("logp/chosen", part.logps, part.mask)
    # 3. Step.
    return sums.means() | trainer.optimizer_step() | {"updates": trainer.step + 1}


SFT = Method(
    "sft",
    SFTConfig,
    sft_update,
    {"logp/chosen": ("nats/token", "mean log-prob of the expert answers; rises, then levels off")},
    [("Log-likelihood of expert answers", "nats/token", ["logp/chosen"]), ("Loss", "nats/token", ["loss"])],
)

# ---------------------------------------------------------------------------------------------------------
# DPO. Preference without a reward model and without samples. The policy that maximises a reward r under a KL
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
    # The implicit rewards, eq. (5) without beta log Z. They are nats of the whole answer: a mean over tokens
    # would be another objective, and would pay for length.
    chosen_rewards = beta * (widen(chosen_logps) - widen(ref_chosen_logps).detach())
    rejected_rewards = beta * (widen(rejected_logps) - widen(ref_rejected_logps).detach())
    # Only the difference h is trained, so both log-probs may fall together: nothing in eq. (7) minds.
    h, eps = chosen_rewards - rejected_rewards, label_smoothing
    # eq. (7), and with probability eps the pair is the other way round. logsigmoid, because
    # log(sigmoid(-100)) is -inf.
    losses = -(1 - eps) * F.logsigmoid(h) - eps * F.logsigmoid(-h)
    n = torch.as_tensor(len(losses) if denominator is None else denominator)
    return losses.sum() / n.clamp(min=1), chosen_rewards.detach(), rejected_rewards.detach()


def dpo_update(trainer: Trainer, records: list) -> dict:
    """One optimisation step of DPO on B pairs, offline: the policy never sees an answer of its own."""
    c, sums, B = trainer.config, Sums(), len(records)
    trainer.note(DPO_NOTE)
    # 1. A pair is a prompt with a group of two, so that its prompt is computed once.
    pairs = [[r["expert_ids"], r["rejected_ids"]] for r in records]
    prompts = [r["prompt_ids"] for r in records]
    # 2. Learn. At temperature 1, because nothing was sampled.
    for part in trainer.parts(prompts, pairs, temperature=1.0):
        ref_chosen, ref_rejected = pair_reference(trainer, records[part.groups], part).unbind(1)  # (b,) each
        chosen, rejected = part.score().logps.sum(-1).unbind(1)  # (b, 2, T) -> (b, 2) -> two (b,)
        settings = (c.beta, c.label_smoothing, B)  # B, the step's denominator, and not the part's b
        loss, r_chosen, r_rejected = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, *settings)
        loss.backward()
        sums.share("loss", loss)
        margin = r_chosen - r_rejected
        # A tie is half right: at the first step pi = pi_ref, every margin is 0, and the accuracy is chance.
        right = (margin > 0) + 0.5 * (margin == 0)
        about = {
            "logp/chosen": chosen,
            "logp/rejected": rejected,
            "dpo/accuracy": right,
            "dpo/margin": margin,
        }
        for name, values in (about | {"dpo/chosen": r_chosen, "dpo/rejected": r_rejected}).items():
            sums.add(name, values)
    # 3. Step.
    return sums.means() | trainer.optimizer_step() | {"updates": trainer.step + 1}


DPO_NOTE = (
    "DPO trains a difference: log-probs of chosen answers may fall (logp/chosen) while those of rejected "
    "ones fall faster. That is normal."
)


@torch.no_grad()
def pair_reference(trainer: Trainer, records: list, part: Part) -> Tensor:
    """log pi_ref of a part's chosen and rejected answers, (b, 2), nats."""
    # The reference never changes, so each record is scored once: at its first visit, then kept for later
    # passes over the data, and in the checkpoint. Scored again in another micro-batch it would round
    # otherwise, and a resumed run would not be the run that was never stopped. NaN: not yet scored.
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
        "logp/chosen": ("nats", "mean summed log-prob of chosen answers; may fall, see DPO_NOTE"),
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


# ---------------------------------------------------------------------------------------------------------
# GRPO. PPO (ppo.py) without a value function: what a sample is worth is measured against the other samples of
# its prompt. 2402.03300v3 eq. (3), and sec. 4.1.2 for the advantage:
#
#     J_GRPO = 1/G Σᵢ 1/|oᵢ| Σₜ [ min( ratio Aᵢ, clip(ratio, 1 - ε, 1 + ε) Aᵢ ) - β KL(π || π_ref) ]
#     Aᵢ = (rᵢ - mean r) / std r          ratio = π(oᵢₜ) / π_old(oᵢₜ)
#
# One advantage serves all tokens of a sample: which of them earned it, GRPO does not ask.


@torch.no_grad()
def grpo_advantages(rewards: Tensor, scale: str = "std", eps: float = 1e-6, ddof: int = 0) -> Tensor:
    """Rewards (B, G) -> advantages (B, G), each prompt by itself, without gradient.

    scale="none" is Dr. GRPO's; ddof=1, eps=1e-4 are TRL's. ValueError for another shape, NaN or infinity.
    """
    want(scale in ("std", "none"), f"scale must be one of std, none, got {scale!r}")
    shape = f"rewards must be (B, G) with B, G >= 1, got {tuple(rewards.shape)}"
    want(rewards.dim() == 2 and rewards.numel(), shape)
    # One NaN would spread to every weight in one step.
    want(torch.isfinite(rewards).all(), "rewards hold NaN or infinity")
    # The group's mean is the baseline: it lowers the gradient's variance and, being the same for all G, says
    # nothing of its own. Over the batch instead, an easy prompt would make all of its samples look good.
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
    A = per_token("advantages", advantages, mask)  # (...,) -> (..., T), the same for every token of a sample
    # old_logps and ref_logps are numbers by now: neither pi_old nor the reference is trained.
    mask, logps, old_logps, ref_logps, A = clean(
        mask, logps=logps, old_logps=old_logps, ref_logps=ref_logps, A=A
    )
    objective, ratio, parts = clipped_surrogate(logps, old_logps, A, mask, clip_low, clip_high)
    loss = -objective  # (..., T)
    if ref_logps is not None:
        k = kl_estimate(logps, ref_logps, kl, ratio)
        parts["kl"] = masked_mean(k.detach(), mask)
        # Weight 0 leaves it out: 0 * inf would be NaN, where the reference gives a token no probability at
        # all.
        if kl_coef > 0:
            loss = loss + kl_coef * k
    return aggregate_tokens(loss, mask, aggregate, max_length, denominator), parts  # 2402.03300 eq. (3)


def grpo_update(trainer: Trainer, records: list) -> dict:
    """One rollout of GRPO on B prompts, and one or several updates on it (2402.03300v3, algorithm 1)."""
    c, sums = trainer.config, Sums()
    grpo_notes(trainer)

    # 1. Explore: o_1..o_G ~ pi for each prompt, and their rewards.
    batch = trainer.rollout(records)

    # 2. Compare each sample with the others of its prompt. n is the step's count, before any micro-batch.
    A = grpo_advantages(batch.rewards, c.scale_advantages)  # (B, G)
    n = denominator(batch.completions, c.aggregate, c.max_new_tokens)
    settings = dict(kl=c.kl, aggregate=c.aggregate, max_length=c.max_new_tokens, denominator=n)
    settings |= dict(clip_low=c.clip_low, clip_high=c.clip_high, kl_coef=c.kl_coef)

    # 3. Learn, with updates_per_rollout updates on the same samples (algorithm 1, line 10).
    for _ in range(c.updates_per_rollout):
        for part in trainer.scored(batch, sums):  # logps, ref_logps, mask (b, G, T)
            if part.old_logps is None:
                # pi_old is this policy before its first update, not the sampler with its other precision: the
                # first ratio is then exactly 1, and the clip measures what the updates do and nothing else.
                part.old_logps = part.logps.detach()
            logps = part.logps, part.old_logps, part.ref_logps
            loss, about = grpo_loss(*logps, A[part.groups], part.mask, **settings)
            loss.backward()
            sums.share("loss", loss)
            sums.ratio(about)
        metrics = trainer.optimizer_step()
    updates = {"updates": (trainer.step + 1) * c.updates_per_rollout}
    return batch.metrics | sums.means(c.updates_per_rollout) | metrics | updates


def grpo_notes(trainer: Trainer):
    """What a newcomer would take for a bug, said before it is seen."""
    c = trainer.config
    # E[grad log pi] = 0 at every prefix, see losses.kl_estimate.
    if c.kl == "k1" and c.kl_coef > 0:
        trainer.note(
            "--kl k1 in the loss has an expected gradient of 0: it adds noise and holds nothing. "
            "Choose k3_ratio or k3."
        )
    # A group's advantages sum to 0 and the ratio is 1 in value, so the value cancels; the ratio's gradient
    # does not.
    size = "stay near 0 (samples count by length)"
    if c.aggregate == "sequence":
        size = "be 0, plus the KL term if there is one,"
    if c.updates_per_rollout == 1:
        trainer.note(
            f"The loss will {size} while the policy learns: its ratio is 1, and a group's advantages sum "
            "to 0. The gradient is not 0; watch reward/mean."
        )


GRPO = Method("grpo", GRPOConfig, grpo_update, {}, ppo.CLIPPED)

# ---------------------------------------------------------------------------------------------------------
# PPO, and main

PPO = Method("ppo", PPOConfig, ppo.ppo_update, ppo.METRICS, ppo.PANELS, ppo.ppo_setup)
# Its losses go by these names, too, beside the others' (`ppo` is the file to read).
gae, token_rewards = ppo.gae, ppo.token_rewards
ppo_policy_loss, ppo_value_loss = ppo.ppo_policy_loss, ppo.ppo_value_loss
METHODS = {method.name: method for method in (SFT, DPO, PPO, GRPO)}


def command_line(argv=None):
    """The method's name and its flags -> exit status, see train.main."""
    return main(METHODS, argv, description=__doc__)


if __name__ == "__main__":
    sys.exit(command_line())
