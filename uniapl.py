"""UniAPL: demonstrations and rewards in one step, anchored by a discriminator. arXiv 2509.25148 (v1; v2 is rewritten as "AAPA").

    python uniapl.py                                         # the unified objective; the embedded model without a GPU, Qwen3-0.6B with one
    python uniapl.py --variant a-sft-a-grpo --lambda-adv 0.3 # another pipeline; every variant is a line in VARIANTS below
    python uniapl.py discriminator --out DIR                 # train and test a discriminator, see discriminator.py

Read `uniapl_loss`, then `adversarial_loss`, then `update`, one optimisation step.

Of the paper: imitation of expert answers y and preference on the policy's own samples o_1..o_G in every step; a third, adversarial part that
compares o_i with y by a fixed, light discriminator, one score for each answer; the plug-ins A-SFT, A-GRPO and A-CHORD; the staged pipelines; the
discriminator as a loss of its own rather than a shaped reward. v2 reports its best numbers for a staged pipeline, not for the unified one.

Ours, where the paper (as far as it is known to us) leaves it open:
- L_adv is the score-function gradient of D's group-normalised scores, -1/G sum_i A^D_i 1/|o_i| sum_t log pi(o_{i,t}): D is a frozen number.
  Its value says nothing of how near the policy is; watch score/* and the norm of its gradient.
- lambda_adv = 0.1, learning rates, batch, temperature 1, LoRA on a frozen backbone; the discriminators, see discriminator.py.
- mu follows CHORD (2508.11408): peak 0.9 at once, cosine to 0.05, over two thirds of --steps (CHORD: 200 steps). So `a-chord` *is* `unified`; both
  names are kept, as the paper reports both. --aggregate token is CHORD's L_GRPO, a mean over tokens; the default is GRPO's, over samples' means.
- One optimiser update for each rollout: GRPO's ratio is 1, so its clip never binds and there are no flags for it. No KL unless --kl-coef.
- Imitation averages over all tokens of the step's expert answers (2604.23747) and is scored at temperature 1, as baselines.py sft.
- At the switch of a staged pipeline the policy's AdamW moments are forgotten and the learning rate warms up again, at --switch-lr: stage 2 begins as
  a run of its own would. The reference of every KL stays what it was at the start, so kl/* is the distance to the base across both stages.
- A co-trained discriminator takes --discriminator-warmup steps in which the policy rests, from the first step that uses it. They count as steps.
- ptx, luffy and hpt are neighbours, on the same parts: InstructGPT's fixed mix, LUFFY's expert in the group, HPT's switch by prompt.

What makes a loss differ from a shaped reward: in a group whose rewards tie, normalising r + lambda D gives A^D whatever lambda is, so the anchor
enters at full strength there; as a loss of its own it enters at lambda everywhere.
"""

import itertools
import math
import sys
from dataclasses import dataclass

from data import UserError
from engine.command_line import answer_early, exit_status
from engine.settings import Config, DiscriminatorConfig, Method, setting

# Variant -> objective of its first stage, and of its second if it has one.
VARIANTS = {
    name: (name,)
    for name in ("unified", "a-sft", "a-grpo", "chord", "a-chord", "shaping", "ptx", "luffy", "hpt")
}
VARIANTS |= {
    "sft-grpo": ("sft", "grpo"),
    "sft-a-grpo": ("sft", "a-grpo"),
    "a-sft-a-grpo": ("a-sft", "a-grpo"),
}
MIXED = ("unified", "chord", "a-chord")  # weighted by mu
ANCHORED = ("unified", "a-chord", "a-sft", "a-grpo", "shaping")  # with a discriminator


@dataclass
class UniAPLConfig(Config):
    presets = {
        "tiny": dict(lr=2e-3, discriminator_pairs=512, discriminator_epochs=4, discriminator_lr=3e-3),
        "chat": dict(lr=1e-4, discriminator_pairs=256, discriminator_epochs=1, discriminator_lr=3e-4),
    }
    variant: str = setting("unified", "what to optimise, see VARIANTS in uniapl.py", choices=tuple(VARIANTS))
    lambda_adv: float = setting(0.1, "weight of the adversarial part", low=0, high=100)
    mu: float = setting(
        None, "unified, chord, a-chord: a constant weight of imitation instead of the schedule", low=0, high=1
    )
    mu_warmup: int = setting(0, "steps in which mu rises from 0 to its peak", low=0, high=10**6)
    mu_decay: int = setting(
        None, "steps in which it then falls to its valley [two thirds of --steps]", low=0, high=10**6
    )
    mu_peak: float = setting(0.9, "largest mu", low=0, high=1)
    mu_valley: float = setting(0.05, "last mu", low=0, high=1)
    phi: bool = setting(
        False, "unified, chord, a-chord: CHORD-phi, expert tokens weighted by p (1 - p), mu constant [0.1]"
    )
    ptx_coef: float = setting(0.1, "ptx: weight of imitation beside GRPO", low=0, high=100)
    hpt_threshold: float = setting(
        0.0,
        "hpt: a prompt with a sample rewarded above this is trained by GRPO, any other by imitation",
        low=-1e6,
        high=1e6,
    )
    kl_coef: float = setting(0.0, "weight of KL(pi || reference) in L_GRPO", low=0, high=100)
    aggregate: str = setting(
        "sequence",
        "L_GRPO: mean of per-sample means (sequence), or over all tokens (token, CHORD's)",
        choices=("sequence", "token"),
    )
    switch_step: float = setting(
        0.5, "staged variants: steps in stage 1, or below 1 their share of --steps", above=0, high=10**6
    )
    switch_lr: float = setting(None, "learning rate of stage 2 [--lr]", above=0, high=1)
    discriminator: str = setting(
        None,
        "polar, embedding, cotrained, or a directory `uniapl.py discriminator` made [polar where the variant has one]",
    )
    discriminator_pairs: int = setting(
        None,
        "polar: prompts to learn from at the start, a tenth of them for early stopping",
        low=10,
        high=10**6,
    )
    discriminator_epochs: int = setting(None, "polar: passes over them", low=1, high=1000)
    discriminator_lr: float = setting(None, "polar, cotrained: learning rate", above=0, high=1)
    discriminator_warmup: int = setting(
        5, "cotrained: steps that train only the discriminator", low=0, high=10**6
    )
    parts_every: int = setting(
        5,
        "steps between measurements of the gradient's parts, each of which costs a backward pass",
        low=1,
        high=10**6,
    )


if __name__ == "__main__":  # --help and mistyped flags: the imports below take seconds
    answer_early({"": UniAPLConfig, "discriminator": DiscriminatorConfig}, __doc__)

import torch
from torch import Tensor

import discriminator
from baselines import grpo_advantages, grpo_loss, sft_loss
from losses import aggregate_tokens, completion_mask, denominator
from train import Part, Sums, Trainer, main, schedule

# ---------------------------------------------------------------------------------------------------------------------------------
# The objective


def uniapl_loss(grpo, sft, adversarial, mu: float, lambda_adv: float):
    """The objective of 2509.25148 on mixed data, of three scalars (tensors, or 0 for one that is not there):

        L = (1 - μ) (L_GRPO + λ L_adv) + μ (L_SFT + λ L_adv)
          = (1 - μ) L_GRPO + μ L_SFT + λ L_adv

    mu in [0, 1] weighs the two kinds of data as CHORD does (2508.11408): rewards on own samples, and demonstrations. The
    anchor, weight lambda_adv >= 0, counts once whatever mu is. mu = 1 is A-SFT, mu = 0 A-GRPO, lambda_adv = 0 CHORD.
    """
    return (1 - mu) * grpo + mu * sft + lambda_adv * adversarial


def adversarial_advantages(scores: Tensor) -> Tensor:
    """A^D_i = (D_i - mean D) / (std D + 1e-6), each prompt by itself: scores (B, G), in D's unit -> (B, G), detached.

    As GRPO's rewards, so that a score's unit does not matter; std is the population's, tied groups are exactly 0.
    ValueError for another shape, or a score that is not finite.
    """
    return grpo_advantages(scores)


def adversarial_loss(logps: Tensor, advantages: Tensor, mask: Tensor, denominator=None) -> Tensor:
    """L_adv = -1/N Σᵢ A^Dᵢ 1/|oᵢ| Σₜ log π(oᵢₜ): logps, mask (..., T), advantages (...,) -> scalar. Ours, see the module.

    D scores whole answers and is a frozen number: no gradient flows through it into tokens that were sampled. What remains
    is the score-function gradient: raise the likelihood of samples that D finds more like the expert's than their group.
    """
    logps = torch.where(mask, logps, 0)
    objective = advantages.detach()[..., None] * logps
    return aggregate_tokens(-objective, mask, "sequence", denominator=denominator)


def chord_mu(step: int, warmup: int, decay: int, peak: float, valley: float) -> float:
    """mu at a step (from 0), 2508.11408: linear from 0 to `peak` over `warmup` steps, cosine to `valley` over `decay`, constant.

    Early the expert knows better than the policy; later imitation would hold it at the expert's level.
    """
    if step < warmup:
        return peak * step / warmup
    if step >= warmup + decay:
        return valley
    return valley + (peak - valley) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / decay))


def sft_phi_loss(logps: Tensor, mask: Tensor, denominator=None) -> Tensor:
    """CHORD-phi, 2508.11408: -meanₜ φₜ log pₜ with φₜ = pₜ (1 - pₜ). logps, mask (..., T) -> scalar over all tokens.

    Tokens that the policy knows already or holds for impossible weigh little; p = 1/2 weighs most, 1/4.
    """
    logps = torch.where(mask, logps, 0)
    p = (
        logps.detach().exp()
    )  # phi is a weight: with gradient the loss would also fall by no longer weighing what it cannot fit
    return aggregate_tokens(-p * (1 - p) * logps, mask, "token", denominator=denominator)


# ---------------------------------------------------------------------------------------------------------------------------------
# Stages, and the weights of a stage


@dataclass
class Stage:
    """Where a step stands in its variant's pipeline."""

    number: int  # 1 or 2
    objective: str
    begin: int  # the run's step at which it began
    moves: int  # the first step at which the policy moves: later, while a co-trained discriminator warms up


def switch_step(c: UniAPLConfig) -> int | None:
    """First step of stage 2, None for a variant of one stage."""
    if len(VARIANTS[c.variant]) == 1:
        return None
    step = c.switch_step if c.switch_step >= 1 else round(c.switch_step * c.steps)
    if step != int(step) or not 1 <= step < c.steps:
        raise UserError(
            f"--switch-step {c.switch_step:g}: of {c.steps} steps, stage 1 takes a whole number from 1 to {c.steps - 1}, "
            "or a share of them"
        )
    return int(step)


def stages(c: UniAPLConfig) -> list[Stage]:
    """The variant's one or two stages. UserError if a discriminator's warm-up leaves the policy no step of one."""
    found, switch = [], switch_step(c)
    # A co-trained discriminator knows nothing yet: it needs steps of its own before it is used, counted once.
    resting = c.discriminator_warmup if c.discriminator == "cotrained" else 0
    for objective, begin, end in zip(VARIANTS[c.variant], (0, switch), (switch or c.steps, c.steps)):
        moves = begin + resting * (objective in ANCHORED)
        if moves >= end:
            raise UserError(
                f"--discriminator-warmup {resting}: leaves the policy no step of the {end - begin} in which {objective} "
                "is optimised"
            )
        resting -= moves - begin
        found.append(Stage(len(found) + 1, objective, begin, moves))
    return found


def enter_stage(trainer: Trainer) -> Stage:
    """The step's stage. Stage 2 starts as a run of its own: AdamW's moments forgotten, the learning rate warming up.

    Of the step alone, so a resumed run repeats it. Moments kept from stage 1 would drive the first steps of stage 2 along SFT's gradient.
    """
    c, optimizer = trainer.config, trainer.optimizer
    stage = [stage for stage in stages(c) if stage.begin <= trainer.step][-1]
    if stage.number == 2:
        if trainer.step == stage.begin:
            for p in trainer.policy.trainable().values():
                optimizer.state.pop(p, None)
        warm = schedule("constant", trainer.step - stage.begin, c.warmup_steps, c.steps)
        optimizer.param_groups[0]["base_lr"] = (c.switch_lr or c.lr) * warm
    return stage


def weights(c: UniAPLConfig, stage: Stage, step: int) -> tuple[float, float]:
    """(mu, lambda) of uniapl_loss at a step of the run: which of the three losses a stage's objective has, and how much of each."""
    mu = 1.0 if stage.objective in ("sft", "a-sft") else 0.0
    if stage.objective in MIXED:
        mu = mixed_mu(c, max(0, step - stage.moves))
    anchored = (
        stage.objective in ANCHORED and stage.objective != "shaping"
    )  # shaping has D in its reward instead
    return mu, c.lambda_adv if anchored else 0.0


def mixed_mu(c: UniAPLConfig, step: int) -> float:
    """mu at a step of a mixed objective: constant with --mu or --phi (CHORD-phi's 0.1), else CHORD's schedule."""
    if c.mu is not None:
        return c.mu
    if c.phi:
        return 0.1
    decay = round(2 * c.steps / 3) if c.mu_decay is None else c.mu_decay
    return chord_mu(step, c.mu_warmup, decay, c.mu_peak, c.mu_valley)


# ---------------------------------------------------------------------------------------------------------------------------------
# A step


def update(trainer: Trainer, records: list) -> dict:
    """One step of (1 - mu) L_GRPO + mu L_SFT + lambda L_adv on B records: every variant but the neighbours at the end."""
    c, sums, metrics = trainer.config, Sums(), {}
    stage = enter_stage(trainer)
    mu, lam = weights(c, stage, trainer.step)
    rests = trainer.step < stage.moves  # the policy, while its discriminator warms up
    gradient = Gradient(trainer)

    # The loss is a sum over two kinds of data. They lie in different micro-batches, each of which brings the terms that it
    # has; a term that it has not is 0, and what the micro-batches leave in p.grad adds up to the gradient of all three.
    if stage.objective != "sft":
        # 1. The policy's own samples o_1..o_G (B, G): the reward R says which to prefer, D which look like the expert's.
        #    The two are normalised apart: together, lambda would cancel in every group whose rewards tie.
        batch, D, metrics = judged_rollout(trainer, records)
        R = batch.rewards + c.lambda_adv * D if stage.objective == "shaping" else batch.rewards
        A, A_D = grpo_advantages(R), adversarial_advantages(D)
        n = denominator(batch.completions, c.aggregate)
        learns = (
            mu < 1 or lam > 0
        ) and not rests  # scored without a graph, for the log alone, where nothing asks for one
        for part in trainer.scored(batch, sums, grad=learns):  # logps, ref_logps, mask (b, G, T)
            L_grpo = preference_loss(c, part, A, n)
            L_adv = adversarial_loss(part.logps, A_D[part.groups], part.mask, denominator=A_D.numel())
            gradient.add(uniapl_loss(L_grpo, 0, L_adv, mu, lam), preference=L_grpo, adversarial=L_adv)

    # 2. The expert's answers y: imitation in the same step, so that exploration keeps its ground.
    n = denominator([[r["expert_ids"]] for r in records], "token")
    for part in trainer.scored_experts(records, grad=mu > 0 and not rests):  # logps, mask (b, 1, T)
        sums.add("logp/expert", part.logps, part.mask)
        L_sft = imitation_loss(c, part, n)
        gradient.add(uniapl_loss(0, L_sft, 0, mu, lam), imitation=L_sft)

    # 3. Step.
    metrics |= {"stage": 0} if rests else {"stage": stage.number, "mu": mu}
    return metrics | finish(trainer, records, gradient, sums)


def preference_loss(c, part: Part, A: Tensor, n: Tensor) -> Tensor:
    """L_GRPO of a micro-batch; A (B, G), n the step's count. One update a rollout: the ratio is 1, so no clip and no old_logps."""
    settings = dict(kl_coef=c.kl_coef, kl="k3_ratio", aggregate=c.aggregate, denominator=n)
    loss, _ = grpo_loss(part.logps, None, part.ref_logps, A[part.groups], part.mask, **settings)
    return loss


def imitation_loss(c, part: Part, n: Tensor) -> Tensor:
    """L_SFT of a micro-batch of expert answers, or CHORD-phi's; n: the tokens of all the step's."""
    loss = sft_phi_loss if c.phi else sft_loss
    return loss(part.logps, part.mask, denominator=n)


def judged_rollout(trainer: Trainer, records: list) -> tuple:
    """(Batch, D (B, G) of its samples, without gradient and 0 where there is no discriminator, metrics)."""
    c, ends = trainer.config, trainer.policy.eos_ids
    batch = trainer.rollout(records)
    D, seen = torch.zeros_like(batch.rewards), {}
    if c.discriminator:
        D, seen = discriminator.judge(trainer, kind(c), batch)
    return (
        batch,
        D,
        batch.metrics | seen | distinct(batch.completions, 1, ends) | distinct(batch.completions, 2, ends),
    )


def finish(trainer: Trainer, records: list, gradient: "Gradient", sums: Sums) -> dict:
    """The optimiser's step on what was gathered -> metrics."""
    lengths = [len(r["expert_ids"]) for r in records]
    metrics = {"length/expert": sum(lengths) / len(lengths), "loss": gradient.loss}
    return metrics | gradient.finish() | sums.means() | trainer.optimizer_step()


class Gradient:
    """Adds up a step's gradient in p.grad; every --parts-every steps each part's by itself first, for their norms and cosines."""

    def __init__(self, trainer: Trainer):
        self.params = list(trainer.policy.trainable().values())
        self.apart = trainer.step % trainer.config.parts_every == 0
        self.parts, self.loss = {}, 0.0

    def add(self, loss: Tensor, **terms: Tensor):
        """A micro-batch's loss, linear in the `terms` it was made of, whose names are the parts'. Without a graph it is only counted."""
        self.loss += float(loss.detach())
        if not loss.requires_grad:
            return
        if not self.apart:
            loss.backward()
            return
        # loss = sum_k w_k L_k, so its derivative by L_k is the weight w_k, and w_k times L_k's gradient is what k gives to the step.
        weights = torch.autograd.grad(loss, list(terms.values()), retain_graph=True)
        wanted = [(name, w) for name, w in zip(terms, weights) if w]
        for left, (name, weight) in zip(reversed(range(len(wanted))), wanted):
            found = torch.autograd.grad(terms[name], self.params, weight, retain_graph=left > 0)
            before = self.parts.get(name, [0.0] * len(found))
            self.parts[name] = [a + b for a, b in zip(before, found)]

    def finish(self) -> dict:
        """Norms and cosines of the parts, weights included: they sum to the step's gradient, before clipping."""
        norms, metrics = {}, {}
        for name, part in self.parts.items():
            for p, g in zip(self.params, part):
                p.grad = g.clone() if p.grad is None else p.grad.add_(g)
            norms[name] = float(torch.stack([g.square().sum() for g in part]).sum().sqrt())
            metrics[f"gradient/{name}"] = norms[name]
        for a, b in itertools.combinations(sorted(norms), 2):
            if norms[a] and norms[b]:
                dot = sum(float((x * y).sum()) for x, y in zip(self.parts[a], self.parts[b]))
                metrics[f"cosine/{a}_{b}"] = dot / (norms[a] * norms[b])
        return metrics


def distinct(groups: list, n: int, ends: list) -> dict:
    """{"distinct/n": share} (Li et al., arXiv 1510.03055): different n-grams over all of a prompt's samples, mean over prompts.

    groups: B lists of G lists of ids; ends: the EOS ids, which are left out. {} where no sample has n tokens.
    """
    shares = []
    for group in groups:
        texts = [[t for t in ids if t not in ends] for ids in group]
        grams = [tuple(ids[i : i + n]) for ids in texts for i in range(len(ids) - n + 1)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return {f"distinct/{n}": sum(shares) / len(shares)} if shares else {}


# ---------------------------------------------------------------------------------------------------------------------------------
# The discriminator of a run


def kind(c: UniAPLConfig) -> str:
    """How the discriminator of the settings scores: polar, embedding or cotrained; a directory holds a polar one."""
    return c.discriminator if c.discriminator in ("embedding", "cotrained") else "polar"


def setup(trainer: Trainer):
    """Check what depends on several settings, and make the discriminator."""
    c, policy = trainer.config, trainer.policy
    if (c.phi or c.mu is not None) and c.variant not in MIXED:
        flag = "phi" if c.phi else "mu"
        raise UserError(f"--{flag} is for the variants {', '.join(MIXED)}; {c.variant} does not weigh by mu")
    if c.discriminator is None and set(VARIANTS[c.variant]) & set(ANCHORED):
        c.discriminator = "polar"
    stages(c)  # for its errors
    if c.discriminator and kind(c) == "polar":
        discriminator.check_context(policy, trainer.records, c)
    if c.discriminator == "polar":
        if c.resume:
            policy.add_role(discriminator.ROLE)  # the checkpoint fills it
        else:
            discriminator.train_at_start(policy, c)
        # Fixed during the run: saved in the checkpoint and, in no parameter group, not trained.
        trainer.params |= discriminator.freeze(policy)
    elif c.discriminator == "cotrained":
        trainer.train_parameters(policy.add_role(discriminator.ROLE), c.discriminator_lr)
    elif c.discriminator not in (None, "embedding"):
        discriminator.load(policy, c.discriminator)


# ---------------------------------------------------------------------------------------------------------------------------------
# The neighbours' steps: other ways to learn from y and from rewards at once, over the same parts. None has an anchor, and none needs mu.


def ptx_update(trainer: Trainer, records: list) -> dict:
    """L_GRPO + ptx_coef L_SFT: InstructGPT's mix (2203.02155, eq. (2)) at a constant weight. The honest strong baseline."""
    c, sums, gradient = trainer.config, Sums(), Gradient(trainer)
    batch, _, metrics = judged_rollout(trainer, records)
    A = grpo_advantages(batch.rewards)
    n = denominator(batch.completions, c.aggregate)
    for part in trainer.scored(batch, sums):
        L_grpo = preference_loss(c, part, A, n)
        gradient.add(L_grpo, preference=L_grpo)
    n = denominator([[y] for y in batch.experts], "token")
    for part in trainer.scored_experts(records, grad=c.ptx_coef > 0):
        sums.add("logp/expert", part.logps, part.mask)
        L_sft = imitation_loss(c, part, n)
        gradient.add(c.ptx_coef * L_sft, imitation=L_sft)
    return metrics | {"stage": 1} | finish(trainer, records, gradient, sums)


def luffy_loss(logps, advantages, mask, gamma=0.1, aggregate="sequence", denominator=None) -> Tensor:
    """LUFFY's off-policy part, 2504.14945: -f(π) A with f(x) = x / (x + γ). logps, mask (..., T), advantages (...,) -> scalar.

    The expert's own probabilities are unknown and taken as 1, so the ratio is pi itself; it is not clipped. f' is largest
    for unlikely tokens, which a plain ratio would leave without gradient.
    """
    p = torch.where(mask, logps, 0).exp()
    objective = advantages.detach()[..., None] * p / (p + gamma)
    return aggregate_tokens(-objective, mask, aggregate, denominator=denominator)


def luffy_update(trainer: Trainer, records: list) -> dict:
    """LUFFY: the expert answer joins the group as one more member, with an advantage and not with a weight."""
    c, sums, gradient = trainer.config, Sums(), Gradient(trainer)
    batch, _, metrics = judged_rollout(trainer, records)
    # One group of G + 1: y is good only as far as its reward beats the samples', unlike in SFT.
    group = torch.cat([batch.rewards, batch.expert_rewards[:, None]], 1)  # (B, G + 1)
    A, A_y = grpo_advantages(group).split([c.group_size, 1], 1)  # (B, G), (B, 1)
    # One group, one count: counted apart, a lone y would weigh as much as all G samples.
    n = denominator(batch.completions, c.aggregate) + denominator([[y] for y in batch.experts], c.aggregate)
    for part in trainer.scored(batch, sums):
        L_grpo = preference_loss(c, part, A, n)
        gradient.add(L_grpo, preference=L_grpo)
    # At the samples' temperature, because they share a group.
    for part in trainer.scored_experts(records, c.temperature):
        sums.add("logp/expert", part.logps, part.mask)
        L_luffy = luffy_loss(part.logps, A_y[part.groups], part.mask, aggregate=c.aggregate, denominator=n)
        gradient.add(L_luffy, imitation=L_luffy)
    return metrics | {"stage": 1} | finish(trainer, records, gradient, sums)


def hpt_switch(rewards: Tensor, threshold: float = 0.0) -> Tensor:
    """HPT, 2509.04419: rewards (B, G) -> (B,) bool, True where no sample passes, so that the expert is imitated and GRPO is off."""
    return rewards.amax(1) <= threshold


def hpt_update(trainer: Trainer, records: list) -> dict:
    """HPT: a prompt none of whose samples passes is trained by imitation, any other by GRPO."""
    c, sums, gradient = trainer.config, Sums(), Gradient(trainer)
    batch, _, metrics = judged_rollout(trainer, records)
    fails = hpt_switch(batch.rewards, c.hpt_threshold)[:, None]  # (B, 1)
    A = torch.where(fails, 0.0, grpo_advantages(batch.rewards))
    n = denominator(batch.completions, c.aggregate)
    for part in trainer.scored(batch, sums):
        L_grpo = preference_loss(c, part, A, n)
        gradient.add(L_grpo, preference=L_grpo)
    # The token mean over the imitated experts, weighted by their share of the prompts: all is SFT, none is GRPO.
    share, tokens = fails.float().mean(), completion_mask([[y] for y in batch.experts]).to(fails.device)
    n = (tokens & fails[..., None]).sum().clamp(min=1) / share.clamp(min=1e-9)
    for part in trainer.scored_experts(records):
        sums.add("logp/expert", part.logps, part.mask)
        L_sft = sft_loss(part.logps, part.mask & fails[part.groups][..., None], denominator=n)
        gradient.add(L_sft, imitation=L_sft)
    return metrics | {"stage": 1, "hpt/imitated": float(share)} | finish(trainer, records, gradient, sums)


NEIGHBOURS = {"ptx": ptx_update, "luffy": luffy_update, "hpt": hpt_update}


def step(trainer: Trainer, records: list) -> dict:
    """The variant's step."""
    return NEIGHBOURS.get(trainer.config.variant, update)(trainer, records)


METRICS = {
    "stage": (
        "-",
        "1 or 2; 0 while a co-trained discriminator warms up and the policy rests. A dotted line in curves.png marks where it changes",
    ),
    "mu": ("-", "weight of imitation, 1 - mu that of preference; falls by its schedule"),
    "gradient/imitation": (
        "-",
        "norm of imitation's part of the gradient, its weight included; every --parts-every steps. Falls with mu and as y gets likely",
    ),
    "gradient/preference": ("-", "likewise of preference; 0 while all groups tie"),
    "gradient/adversarial": ("-", "likewise of the adversarial part; should not drown the others"),
    "cosine/imitation_preference": ("-", "cosine between two parts: below 0 they work against each other"),
    "cosine/adversarial_imitation": (
        "-",
        "likewise; above 0 while the discriminator wants what the expert did",
    ),
    "cosine/adversarial_preference": ("-", "likewise; far below 0 the anchor pulls away from the reward"),
    "score/expert": (
        "D",
        "mean score of expert answers: a second one for polar and embedding, which compare with the first. Flat unless co-trained",
    ),
    "score/policy": (
        "D",
        "mean score of the samples; rises towards the expert's. Beyond it the discriminator is being exploited",
    ),
    "score/accuracy": (
        "share",
        "pairs in which the expert outscores a sample of the same prompt, ties as a half; falls towards 0.5 as the policy comes near",
    ),
    "discriminator/loss": (
        "nats",
        "Bradley-Terry loss of a co-trained discriminator, before its update; 0.69 is chance",
    ),
    "distinct/1": (
        "share",
        "different tokens over all tokens in a prompt's samples; falls as exploration narrows, and as samples lengthen",
    ),
    "distinct/2": ("share", "likewise of pairs of tokens"),
    "length/expert": ("tokens", "mean length of the step's expert answers, the length to compare with"),
    "logp/expert": (
        "nats/token",
        "mean log-prob of the expert's tokens; rises while the policy imitates, and may fall under preference alone",
    ),
    "hpt/imitated": ("share", "prompts none of whose samples passes, so the expert is imitated; falls"),
}
PANELS = [
    ("Gradient by part", "norm", ["gradient/imitation", "gradient/preference", "gradient/adversarial"]),
    (
        "Cosines of the parts",
        "-",
        ["cosine/imitation_preference", "cosine/adversarial_imitation", "cosine/adversarial_preference"],
    ),
    ("Discriminator's score", "D", ["score/expert", "score/policy"]),
    ("Expert told from policy", "share", ["score/accuracy"]),
    ("Distinct-n of samples", "share", ["distinct/1", "distinct/2"]),
    ("Length against the expert's", "tokens", ["length/mean", "length/expert"]),
    ("Log-likelihood of the expert", "nats/token", ["logp/expert"]),
    ("Weight of imitation", "-", ["mu"]),
]
NEXT = "--variant sft-a-grpo (staged), --lambda-adv 0 (no anchor), --discriminator cotrained, --seed 1, or a chat model with --model DIR"
UNIAPL = Method("uniapl", UniAPLConfig, step, METRICS, PANELS, setup, next=NEXT)


def command_line(argv):
    if argv[:1] == ["discriminator"]:
        sys.argv[0] = "uniapl.py discriminator"
        return exit_status(lambda: discriminator.command_line(argv[1:], discriminator.__doc__))
    return main(UNIAPL, argv, description=__doc__)


if __name__ == "__main__":
    sys.exit(command_line(sys.argv[1:]))
