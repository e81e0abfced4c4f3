"""UniAPL: demonstrations and rewards in one step, anchored by a discriminator. arXiv 2509.25148v1.

    python uniapl.py                                        # unified; tiny without a GPU, else Qwen3-0.6B
    python uniapl.py --variant a-sft-a-grpo --lambda-adv .3 # another pipeline: a line of VARIANTS below
    python uniapl.py discriminator --out DIR                # train a discriminator, see discriminator.py
    python uniapl.py teach --model MODEL --out FILE.jsonl   # expert answers from a teacher, see there

Read `uniapl_loss`, then `adversarial_loss`, then `update`, one optimisation step.

Of the paper: imitation of expert answers y and preference on the policy's own samples o_1..o_G in every step;
a third, adversarial part that compares o_i with y by a fixed, light discriminator, one score for each answer;
the plug-ins A-SFT, A-GRPO and A-CHORD; the staged pipelines; the discriminator as a loss of its own rather
than a shaped reward. v2 (2026) is a rewrite named "AAPA" and reports its best numbers for a staged pipeline.

Ours, where the paper (as far as it is known to us) leaves it open; the reasons stand where the code is:
- L_adv: the score-function gradient of D's group-normalised scores. How D is made: discriminator.py.
- lambda_adv = 0.1, learning rates, batch, temperature 1, LoRA on a frozen backbone; no KL unless --kl-coef.
- mu: CHORD's schedule over two thirds of --steps, so `a-chord` *is* `unified`. Both names are kept, as the
  paper reports both.
- One optimiser update for each rollout; imitation averages over all tokens of the step (2604.23747).
- The switch of a staged pipeline, and the warm-up of a co-trained discriminator.

Letters: mu weighs imitation here and counts GRPO's updates in baselines.py; lambda weighs the anchor here,
the regulariser in minigrao.py, and is GAE's lambda in PPO. D is the discriminator's score.
"""

import math
import sys
from dataclasses import dataclass

from data import UserError
from engine.command_line import answer_early, exit_status
from engine.settings import Config, DiscriminatorConfig, Method, TeachConfig, setting

# Variant -> objective of its first stage, and of its second if it has one.
SINGLE = ("unified", "a-sft", "a-grpo", "chord", "a-chord", "shaping", "ptx", "luffy", "hpt")
STAGED = {"sft-grpo": ("sft", "grpo"), "sft-a-grpo": ("sft", "a-grpo"), "a-sft-a-grpo": ("a-sft", "a-grpo")}
VARIANTS = {name: (name,) for name in SINGLE} | STAGED
MIXED = ("unified", "chord", "a-chord")  # weighted by mu
ANCHORED = ("unified", "a-chord", "a-sft", "a-grpo", "shaping")  # with a discriminator


@dataclass
class UniAPLConfig(Config):
    presets = {
        "tiny": dict(lr=2e-3, discriminator_pairs=512, discriminator_epochs=4, discriminator_lr=3e-3),
        "chat": dict(lr=1e-4, discriminator_pairs=256, discriminator_epochs=1, discriminator_lr=3e-4),
    }
    variant: str = setting("unified", "what to optimise, see VARIANTS in uniapl.py", choices=tuple(VARIANTS))
    # Too high a lambda is what the paper's ablations warn of: the policy copies the expert's manner and stops
    # exploring.
    lambda_adv: float = setting(0.1, "weight of the adversarial part", low=0, high=100)
    # mu, the weight of imitation in a mixed objective: CHORD's schedule, or a constant.
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
    # The neighbours' own.
    ptx_coef: float = setting(0.1, "ptx: weight of imitation beside GRPO", low=0, high=100)
    hpt_threshold: float = setting(
        0.0, "hpt: GRPO where a sample is rewarded above this, imitation elsewhere", low=-1e6, high=1e6
    )
    # L_GRPO, see baselines.py for the rest of it.
    kl_coef: float = setting(0.0, "weight of KL(pi || reference) in L_GRPO", low=0, high=100)
    aggregate: str = setting(
        "sequence",
        "L_GRPO: mean of per-sample means (sequence), or over all tokens (token, CHORD's)",
        choices=("sequence", "token"),
    )
    # The staged pipelines' switch.
    switch_step: float = setting(
        0.5, "staged variants: steps in stage 1, or below 1 their share of --steps", above=0, high=10**6
    )
    switch_lr: float = setting(None, "learning rate of stage 2 [--lr]", above=0, high=1)
    # The discriminator D(q, y, o), see discriminator.py.
    discriminator: str = setting(
        None,
        "polar, embedding, cotrained, or DIR of `uniapl.py discriminator` [polar where the variant has one]",
    )
    discriminator_pairs: int = setting(
        None, "polar: prompts to learn from at the start, a tenth for early stopping", low=10, high=10**6
    )
    discriminator_epochs: int = setting(None, "polar: passes over them", low=1, high=1000)
    discriminator_lr: float = setting(None, "polar, cotrained: learning rate", above=0, high=1)
    discriminator_warmup: int = setting(
        5, "cotrained: steps that train only the discriminator", low=0, high=10**6
    )
    parts_every: int = setting(
        5, "steps between measurements of the gradient's parts, each a backward pass more", low=1, high=10**6
    )


if __name__ == "__main__":
    # --help and mistyped flags are answered here, because the imports below take seconds.
    answer_early({"": UniAPLConfig, "discriminator": DiscriminatorConfig, "teach": TeachConfig}, __doc__)

import torch
from torch import Tensor

import discriminator
from baselines import grpo_advantages, grpo_loss, sft_loss
from engine.gradient import Gradient
from engine.measures import distinct
from losses import aggregate_tokens, completion_mask, denominator
from train import Batch, Part, Sums, Trainer, main, schedule

# ------------------------------------------------------------------------------------------------------------
# The objective. Two kinds of data teach the policy: expert answers y show it (imitation), rewards on its own
# samples tell it (preference). One after the other, RL drifts away from what SFT has shown; together, each
# step does both, and the anchor keeps the policy's whole answers near the expert's while the reward pulls.


def uniapl_loss(grpo, sft, adversarial, mu: float, lambda_adv: float):
    """The objective of 2509.25148 on mixed data, of three scalars (tensors, or 0 for one that is not there):

        L = (1 - μ) (L_GRPO + λ L_adv) + μ (L_SFT + λ L_adv)
          = (1 - μ) L_GRPO + μ L_SFT + λ L_adv

    mu          μ in [0, 1]: how much demonstrations count beside rewards, as CHORD weighs them (2508.11408)
    lambda_adv  λ >= 0: the anchor's weight, which counts once whatever mu is
    mu = 1 is A-SFT, mu = 0 A-GRPO, lambda_adv = 0 CHORD.
    """
    return (1 - mu) * grpo + mu * sft + lambda_adv * adversarial


def adversarial_advantages(scores: Tensor) -> Tensor:
    """A^D_i = (D_i - mean D) / (std D + 1e-6), each prompt by itself: scores (B, G), in D's unit -> (B, G),
    detached.

    As GRPO's rewards, because D's scores are unbounded and their unit means nothing. std is the population's,
    tied groups are exactly 0. ValueError for another shape, or a score that is not finite.
    """
    # Apart from the rewards' own: see the step.
    return grpo_advantages(scores)


def adversarial_loss(logps: Tensor, advantages: Tensor, mask: Tensor, denominator=None) -> Tensor:
    """L_adv = -1/N Σᵢ A^Dᵢ 1/|oᵢ| Σₜ log π(oᵢₜ). Ours, see the module.

    logps, mask (..., T), nats; advantages (...,), A^D of each sample; denominator: N of the step [the rows
    given]
    -> scalar.
    """
    # Why not differentiate D itself, as a GAN's generator does: o was sampled, and no gradient passes through
    # a choice of tokens. What is left is the score function: raise the likelihood of the samples that D finds
    # more like the expert's than the rest of their group. D's score belongs to the whole answer, so every
    # token gets the same A^D.
    logps = torch.where(mask, logps, 0)
    objective = advantages.detach()[..., None] * logps  # (..., T)
    return aggregate_tokens(
        -objective, mask, "sequence", denominator=denominator
    )  # 1/|o_i| in each row, then 1/N


def chord_mu(step: int, warmup: int, decay: int, peak: float, valley: float) -> float:
    """mu at a step (from 0), 2508.11408: linear from 0 to `peak` over `warmup` steps, cosine to `valley` over
    `decay`.

    Early the expert knows better than the policy; kept up, imitation would hold the policy at the expert's
    level.
    """
    if step < warmup:
        return peak * step / warmup
    if step >= warmup + decay:
        return valley
    return valley + (peak - valley) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / decay))


def sft_phi_loss(logps: Tensor, mask: Tensor, denominator=None) -> Tensor:
    """CHORD-phi, 2508.11408: -meanₜ φₜ log pₜ with φₜ = pₜ (1 - pₜ). logps, mask (..., T) -> scalar over all
    tokens.
    """
    # Tokens that the policy knows already or holds for impossible weigh little; p = 1/2 weighs most, 1/4.
    logps = torch.where(mask, logps, 0)
    # phi is a weight. With gradient, the loss would also fall by moving p to where phi is small.
    p = logps.detach().exp()
    return aggregate_tokens(-p * (1 - p) * logps, mask, "token", denominator=denominator)


# ------------------------------------------------------------------------------------------------------------
# Stages, and the weights of a stage


@dataclass
class Stage:
    """Where a step stands in its variant's pipeline."""

    number: int  # 1 or 2
    objective: str
    begin: int  # the run's step at which it began
    moves: int  # the first step at which the policy moves: later than `begin` while a discriminator warms up


def switch_step(c: UniAPLConfig) -> int | None:
    """First step of stage 2, None for a variant of one stage. UserError where a stage would have no step."""
    if len(VARIANTS[c.variant]) == 1:
        return None
    step = c.switch_step if c.switch_step >= 1 else round(c.switch_step * c.steps)
    if step != int(step) or not 1 <= step < c.steps:
        raise UserError(
            f"--switch-step {c.switch_step:g}: of {c.steps} steps, stage 1 takes a whole number from 1 to "
            f"{c.steps - 1}, or a share of them"
        )
    return int(step)


def stages(c: UniAPLConfig) -> list[Stage]:
    """The variant's one or two stages. UserError if a discriminator's warm-up leaves the policy no step of
    one.
    """
    # A variant of one stage has it from the first step to the last.
    found, switch = [], switch_step(c)
    # A co-trained discriminator knows nothing at first, and A^D of its scores would be noise at full
    # strength, because normalising makes every score as loud as any other. So it learns alone for a while,
    # once in a run.
    resting = c.discriminator_warmup if c.discriminator == "cotrained" else 0
    for objective, begin, end in zip(VARIANTS[c.variant], (0, switch), (switch or c.steps, c.steps)):
        moves = begin + resting * (objective in ANCHORED)
        if moves >= end:
            raise UserError(
                f"--discriminator-warmup {resting}: leaves the policy no step of the {end - begin} in which "
                f"{objective} is optimised"
            )
        resting -= moves - begin
        found.append(Stage(len(found) + 1, objective, begin, moves))
    return found


def enter_stage(trainer: Trainer) -> Stage:
    """The step's stage. Stage 2 starts as a run of its own: AdamW's moments forgotten, the learning rate
    warming up.

    Of the step's number alone, so a resumed run repeats it.
    """
    c, optimizer = trainer.config, trainer.optimizer
    stage = [stage for stage in stages(c) if stage.begin <= trainer.step][-1]
    if stage.number == 2:
        if trainer.step == stage.begin:
            # Kept, they would drive the first steps of RL along SFT's gradient.
            for p in trainer.policy.trainable().values():
                optimizer.state.pop(p, None)
        # The reference stays what it was at the start of the run, so kl/* is the distance to it across both
        # stages.
        warm = schedule("constant", trainer.step - stage.begin, c.warmup_steps, c.steps)
        optimizer.param_groups[0]["base_lr"] = (c.switch_lr or c.lr) * warm
    return stage


def weights(c: UniAPLConfig, stage: Stage, step: int) -> tuple[float, float]:
    """(mu, lambda) of uniapl_loss at a step of the run: which of the losses the stage's objective has."""
    mu = 1.0 if stage.objective in ("sft", "a-sft") else 0.0
    if stage.objective in MIXED:
        mu = mixed_mu(c, max(0, step - stage.moves))  # a schedule of the stage's own, from its first move
    # shaping has D in its reward instead, see update.
    anchored = stage.objective in ANCHORED and stage.objective != "shaping"
    return mu, c.lambda_adv if anchored else 0.0


def mixed_mu(c: UniAPLConfig, step: int) -> float:
    """mu at a step of a mixed objective: constant with --mu or --phi (CHORD-phi's 0.1), else CHORD's
    schedule.
    """
    if c.mu is not None:
        return c.mu
    if c.phi:
        return 0.1
    decay = round(2 * c.steps / 3) if c.mu_decay is None else c.mu_decay
    return chord_mu(step, c.mu_warmup, decay, c.mu_peak, c.mu_valley)


# ------------------------------------------------------------------------------------------------------------
# A step


def update(trainer: Trainer, records: list) -> dict:
    """One step of (1 - mu) L_GRPO + mu L_SFT + lambda L_adv on B records: all variants but the neighbours
    below.
    """
    c, sums, metrics = trainer.config, Sums(), {}
    stage = enter_stage(trainer)
    mu, lam = weights(c, stage, trainer.step)
    rests = trainer.step < stage.moves  # the policy, while its discriminator warms up
    gradient = Gradient(trainer)

    # The loss is a sum over two kinds of data, which lie in different micro-batches. Each brings the terms
    # that it has; a term that it has not is 0; what they leave in p.grad adds up to the gradient of all
    # three. So both kinds count in one optimiser step, and memory holds one micro-batch at a time.
    if stage.objective != "sft":
        # 1. Explore: o_1..o_G ~ pi, with the reward R(o_i) and the discriminator's score D(q, y, o_i), both
        #    (B, G).
        batch, D, metrics = judged_rollout(trainer, records)
        R = batch.rewards + c.lambda_adv * D if stage.objective == "shaping" else batch.rewards
        # Normalised apart. Together, as `shaping` does it, R + lambda D becomes A^D in every group whose
        # rewards tie, whatever lambda is: the anchor would be at full strength just where the reward says
        # nothing.
        A, A_D = grpo_advantages(R), adversarial_advantages(D)
        n = denominator(batch.completions, c.aggregate)  # the step's, before any micro-batch; see losses.py
        # Where neither term asks for a gradient, samples are scored without one, for the log alone.
        learns = (mu < 1 or lam > 0) and not rests
        for part in trainer.scored(batch, sums, grad=learns):  # logps, ref_logps, mask (b, G, T)
            L_grpo = preference_loss(c, part, A, n)
            L_adv = adversarial_loss(part.logps, A_D[part.groups], part.mask, denominator=A_D.numel())
            gradient.add(uniapl_loss(L_grpo, 0, L_adv, mu, lam), preference=L_grpo, adversarial=L_adv)

    # 2. Imitate the expert's answers y to the same prompts, so that exploration keeps its ground. N differs:
    #    samples and expert answers are counted apart, or the longer of the two would take mu into its own
    #    hands.
    n = denominator([[r["expert_ids"]] for r in records], "token")
    for part in trainer.scored_experts(records, grad=mu > 0 and not rests):  # logps, mask (b, 1, T)
        sums.add("logp/expert", part.logps, part.mask)
        L_sft = imitation_loss(c, part, n)
        gradient.add(uniapl_loss(0, L_sft, 0, mu, lam), imitation=L_sft)

    # 3. Step, on the sum of all that was gathered. A resting policy has no gradient, and AdamW leaves it
    #    alone.
    metrics |= {"stage": 0} if rests else {"stage": stage.number, "mu": mu}
    return metrics | finish(trainer, records, gradient, sums)


def judged_rollout(trainer: Trainer, records: list) -> tuple[Batch, Tensor, dict]:
    """(Batch, D (B, G) of its samples without gradient, 0 where there is no discriminator, metrics)."""
    c, ends = trainer.config, trainer.policy.eos_ids
    batch = trainer.rollout(records)
    metrics = batch.metrics | distinct(batch.completions, 1, ends) | distinct(batch.completions, 2, ends)
    if c.discriminator is None:
        return batch, torch.zeros_like(batch.rewards), metrics
    D, seen = discriminator.judge(trainer, kind(c), batch)
    return batch, D, metrics | seen


def preference_loss(c: UniAPLConfig, part: Part, A: Tensor, n: Tensor) -> Tensor:
    """L_GRPO of a micro-batch; A (B, G), n the step's count. One update a rollout, so pi_old is pi and
    nothing clips.
    """
    # k3_ratio, because as a loss it has the gradient of KL(pi || pi_ref); see losses.kl_estimate. aggregate
    # "token" is CHORD's L_GRPO, a mean over tokens; the default is GRPO's, over samples' means.
    settings = dict(kl_coef=c.kl_coef, kl="k3_ratio", aggregate=c.aggregate, denominator=n)
    loss, _ = grpo_loss(part.logps, None, part.ref_logps, A[part.groups], part.mask, **settings)
    return loss


def imitation_loss(c: UniAPLConfig, part: Part, n: Tensor) -> Tensor:
    """L_SFT of a micro-batch of expert answers, or CHORD-phi's; n: the tokens of all the step's expert
    answers.
    """
    # At temperature 1, as baselines.py sft: nobody sampled y at another.
    loss = sft_phi_loss if c.phi else sft_loss
    return loss(part.logps, part.mask, denominator=n)


def finish(trainer: Trainer, records: list, gradient: Gradient, sums: Sums) -> dict:
    """The optimiser's step on what was gathered -> metrics."""
    # Clipping the sum keeps the parts' proportions; clipped apart, lambda and mu would mean little where
    # norms are large.
    lengths = [len(r["expert_ids"]) for r in records]
    metrics = {"length/expert": sum(lengths) / len(lengths), "loss": gradient.loss}
    return metrics | gradient.finish() | sums.means() | trainer.optimizer_step()


# ------------------------------------------------------------------------------------------------------------
# The discriminator of a run


def kind(c: UniAPLConfig) -> str:
    """How the run's discriminator scores: polar, embedding or cotrained; a directory holds a polar one."""
    return c.discriminator if c.discriminator in ("embedding", "cotrained") else "polar"


def setup(trainer: Trainer):
    """Check what depends on several settings, and make the discriminator. UserError where settings do not
    fit.
    """
    c, policy = trainer.config, trainer.policy
    if (c.phi or c.mu is not None) and c.variant not in MIXED:
        flag = "phi" if c.phi else "mu"
        raise UserError(f"--{flag} is for the variants {', '.join(MIXED)}; {c.variant} does not weigh by mu")
    # A variant without an anchor may still be watched by a discriminator, so nobody is stopped from naming
    # one.
    if c.discriminator is None and set(VARIANTS[c.variant]) & set(ANCHORED):
        c.discriminator = "polar"
    stages(c)  # for its errors, before the discriminator takes its time
    if c.discriminator and kind(c) == "polar":
        discriminator.check_context(policy, trainer.records, c)
        # Fixed during the run, as the paper has it: kept in the checkpoint and, in no parameter group, not
        # trained.
        trainer.params |= discriminator.make_polar(policy, c)
    elif c.discriminator == "cotrained":
        trainer.train_parameters(policy.add_role(discriminator.ROLE), c.discriminator_lr)


# ------------------------------------------------------------------------------------------------------------
# The neighbours' steps: other ways to learn from y and from rewards at once, over the same parts. None has an
# anchor. The difference between two methods is the difference between two of these functions.


def ptx_update(trainer: Trainer, records: list) -> dict:
    """L_GRPO + ptx_coef L_SFT: InstructGPT's mix (2203.02155v1, eq. (2)) at a constant weight, a strong
    baseline.
    """
    c, sums, gradient = trainer.config, Sums(), Gradient(trainer)
    # A discriminator, if --discriminator names one, only watches here: its scores are logged and not used.
    batch, _, metrics = judged_rollout(trainer, records)
    A, n = grpo_advantages(batch.rewards), denominator(batch.completions, c.aggregate)
    for part in trainer.scored(batch, sums):
        L_grpo = preference_loss(c, part, A, n)
        gradient.add(L_grpo, preference=L_grpo)
    n = denominator([[y] for y in batch.experts], "token")
    for part in trainer.scored_experts(records, grad=c.ptx_coef > 0):
        sums.add("logp/expert", part.logps, part.mask)
        L_sft = imitation_loss(c, part, n)
        # Unlike (1 - mu) and mu: whatever the coefficient, preference keeps its full weight.
        gradient.add(c.ptx_coef * L_sft, imitation=L_sft)
    return metrics | {"stage": 1} | finish(trainer, records, gradient, sums)


def luffy_loss(
    logps: Tensor, advantages: Tensor, mask: Tensor, gamma=0.1, aggregate="sequence", denominator=None
) -> Tensor:
    """LUFFY's off-policy part, 2504.14945: -f(π) A with f(x) = x / (x + γ). logps, mask (..., T), advantages
    (...,)
    -> scalar. gamma here is LUFFY's, no discount."""
    # The importance ratio is pi over whoever wrote the answer. The expert's probabilities are unknown and
    # taken as 1, so the ratio is pi itself. Plain, its gradient pi * grad log pi is next to nothing for the
    # unlikely tokens that there is most to learn from; f' is largest for exactly those. Nothing is clipped:
    # there is no old policy.
    p = torch.where(mask, logps, 0).exp()
    objective = advantages.detach()[..., None] * p / (p + gamma)
    return aggregate_tokens(-objective, mask, aggregate, denominator=denominator)


def luffy_update(trainer: Trainer, records: list) -> dict:
    """LUFFY: the expert answer joins the group as one more member, with an advantage, not a weight."""
    c, sums, gradient = trainer.config, Sums(), Gradient(trainer)
    batch, _, metrics = judged_rollout(trainer, records)
    # One group of G + 1: y is raised only as far as its reward beats the samples', unlike in SFT.
    group = torch.cat([batch.rewards, batch.expert_rewards[:, None]], 1)  # (B, G + 1)
    A, A_y = grpo_advantages(group).split([c.group_size, 1], 1)  # (B, G), (B, 1)
    # One group, one count: counted apart, a lone y would weigh as much as all G samples.
    n = denominator(batch.completions, c.aggregate) + denominator([[y] for y in batch.experts], c.aggregate)
    for part in trainer.scored(batch, sums):
        L_grpo = preference_loss(c, part, A, n)
        gradient.add(L_grpo, preference=L_grpo)
    # y at the samples' temperature, because they share a group: its likelihood is compared with theirs.
    for part in trainer.scored_experts(records, c.temperature):
        sums.add("logp/expert", part.logps, part.mask)
        L_luffy = luffy_loss(part.logps, A_y[part.groups], part.mask, aggregate=c.aggregate, denominator=n)
        gradient.add(L_luffy, imitation=L_luffy)
    return metrics | {"stage": 1} | finish(trainer, records, gradient, sums)


def hpt_switch(rewards: Tensor, threshold: float = 0.0) -> Tensor:
    """HPT's gate, 2509.04419: rewards (B, G) -> (B,) bool, True where no sample passes and the expert is
    imitated.
    """
    return rewards.amax(1) <= threshold


def hpt_update(trainer: Trainer, records: list) -> dict:
    """HPT: a prompt none of whose samples passes is trained by imitation, any other by GRPO."""
    c, sums, gradient = trainer.config, Sums(), Gradient(trainer)
    batch, _, metrics = judged_rollout(trainer, records)
    fails = hpt_switch(batch.rewards, c.hpt_threshold)[:, None]  # (B, 1)
    # Where all samples fail alike A is 0 anyway; a threshold above the lowest reward makes the where()
    # matter.
    A = torch.where(fails, 0.0, grpo_advantages(batch.rewards))
    n = denominator(batch.completions, c.aggregate)  # of all samples, masked out or not: the step's B stays B
    for part in trainer.scored(batch, sums):
        L_grpo = preference_loss(c, part, A, n)
        gradient.add(L_grpo, preference=L_grpo)
    # The token mean over the imitated experts, weighted by their share of the prompts: all is SFT, none is
    # GRPO.
    share = fails.float().mean()
    tokens = completion_mask([[y] for y in batch.experts]).to(fails.device) & fails[..., None]  # (B, 1, T)
    n = tokens.sum().clamp(min=1) / share.clamp(min=1e-9)
    for part in trainer.scored_experts(records):
        sums.add("logp/expert", part.logps, part.mask)
        L_sft = sft_loss(part.logps, part.mask & fails[part.groups][..., None], denominator=n)
        gradient.add(L_sft, imitation=L_sft)
    return metrics | {"stage": 1, "hpt/imitated": float(share)} | finish(trainer, records, gradient, sums)


# What is not here: SRFT (2506.19767), and GAD (2511.10643), whose discriminator is the only reward.
NEIGHBOURS = {"ptx": ptx_update, "luffy": luffy_update, "hpt": hpt_update}


def step(trainer: Trainer, records: list) -> dict:
    """The variant's step on B records -> {metric: float}."""
    return NEIGHBOURS.get(trainer.config.variant, update)(trainer, records)


# ------------------------------------------------------------------------------------------------------------
# Metrics, figures, main

METRICS = {
    "stage": ("-", "1 or 2; 0 while a co-trained discriminator warms up and the policy rests"),
    "mu": ("-", "weight of imitation, 1 - mu that of preference; falls by its schedule"),
    # Every --parts-every steps. Their vectors sum to the step's gradient before clipping.
    "gradient/imitation": ("-", "norm of imitation's weighted gradient; falls with mu and as y gets likely"),
    "gradient/preference": ("-", "likewise of preference; 0 while all groups tie"),
    "gradient/adversarial": ("-", "likewise of the adversarial part; should not drown the others"),
    "cosine/imitation_preference": ("-", "cosine between two parts: below 0 they work against each other"),
    "cosine/adversarial_imitation": ("-", "likewise; above 0 while D wants what the expert did"),
    "cosine/adversarial_preference": ("-", "likewise; far below 0 the anchor pulls away from the reward"),
    # polar and embedding compare with y, so they are shown a second expert answer and never y itself.
    "score/expert": ("D", "mean score of (second) expert answers; flat unless D is co-trained"),
    "score/policy": ("D", "of the samples; rises towards the expert's, beyond it D is being exploited"),
    "score/accuracy": ("share", "pairs in which the expert outscores a sample, ties as a half; falls to 0.5"),
    "discriminator/loss": ("nats", "Bradley-Terry loss of a co-trained D, before its update; 0.69 is chance"),
    "distinct/1": ("share", "different tokens over all in a prompt's samples; falls as exploration narrows"),
    "distinct/2": ("share", "likewise of pairs of tokens; both fall as samples lengthen"),
    "length/expert": ("tokens", "mean length of the step's expert answers, the length to compare with"),
    "logp/expert": ("nats/token", "mean log-prob of y's tokens; rises while the policy imitates"),
    "hpt/imitated": ("share", "prompts none of whose samples passes, so the expert is imitated; falls"),
}
PANELS = [
    ("Gradient by part", "norm", ["gradient/imitation", "gradient/preference", "gradient/adversarial"]),
    ("Cosines of the parts", "-", [name for name in METRICS if name.startswith("cosine/")]),
    ("Discriminator's score", "D", ["score/expert", "score/policy"]),
    ("Expert told from policy", "share", ["score/accuracy"]),
    ("Distinct-n of samples", "share", ["distinct/1", "distinct/2"]),
    ("Length against the expert's", "tokens", ["length/mean", "length/expert"]),
    ("Log-likelihood of the expert", "nats/token", ["logp/expert"]),
    ("Weight of imitation", "-", ["mu"]),
]
NEXT = (
    "--variant sft-a-grpo (staged), --lambda-adv 0 (no anchor), --discriminator cotrained, --seed 1, "
    "or a chat model with --model DIR"
)
UNIAPL = Method("uniapl", UniAPLConfig, step, METRICS, PANELS, setup, next=NEXT)
COMMANDS = {"discriminator": discriminator.train_command, "teach": discriminator.teach_command}


def command_line(argv: list | None = None) -> int:
    """python uniapl.py [discriminator|teach] [flags] -> exit status, see train.main."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        return main(UNIAPL, argv, description=__doc__)
    sys.argv[0] = f"uniapl.py {argv[0]}"  # what usage calls the program
    return exit_status(lambda: COMMANDS[argv[0]](argv[1:]), stopped="stopped; nothing was written")


if __name__ == "__main__":
    sys.exit(command_line())
