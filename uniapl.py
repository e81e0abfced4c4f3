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

import discriminator
from baselines import grpo_advantages, grpo_loss, sft_loss
from losses import aggregate_tokens, completion_mask, flat, normaliser
from train import Sums, main, schedule

# ---------------------------------------------------------------------------------------------------------------------------------
# The objective


def uniapl_loss(grpo, sft, adversarial, mu, lambda_adv):
    """(1 - mu) (L_GRPO + lambda L_adv) + mu (L_SFT + lambda L_adv) = (1 - mu) L_GRPO + mu L_SFT + lambda L_adv, of scalars.

    mu = 1 is A-SFT, mu = 0 A-GRPO; lambda = 0 is CHORD. 2509.25148 weights the two kinds of data as CHORD does (2508.11408).
    """
    return (1 - mu) * grpo + mu * sft + lambda_adv * adversarial


def adversarial_advantages(scores):
    """A^D_i = (D_i - mean D) / (std D + 1e-6) by group: scores (B, G) -> (B, G), detached; std of the population; tied groups exactly 0.

    As GRPO's rewards, so that a score's unit does not matter. ValueError for another shape, or a score that is not finite.
    """
    return grpo_advantages(scores)


def adversarial_loss(logps, advantages, mask, denominator=None):
    """L_adv = -1/N sum_i A^D_i 1/|o_i| sum_t log pi(o_{i,t}): logps, mask (N, T), advantages (N,) -> scalar. Ours, see the module."""
    logps = torch.where(mask, logps, 0)
    return aggregate_tokens(-advantages.detach()[:, None] * logps, mask, "sequence", denominator=denominator)


def chord_mu(step, warmup, decay, peak, valley):
    """mu at a step (from 0): linear from 0 to `peak` over `warmup` steps, cosine to `valley` over `decay` steps, then constant. 2508.11408."""
    if step < warmup:
        return peak * step / warmup
    if step >= warmup + decay:
        return valley
    return valley + (peak - valley) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / decay))


def sft_phi_loss(logps, mask, denominator=None):
    """CHORD-phi, 2508.11408: -mean_t phi_t log p_t, phi_t = p_t (1 - p_t) without gradient. (N, T) -> scalar over all tokens.

    Tokens that the policy knows already or holds for impossible weigh little; p = 1/2 weighs most, 1/4.
    """
    logps = torch.where(mask, logps, 0)
    p = logps.detach().exp()
    return aggregate_tokens(-p * (1 - p) * logps, mask, "token", denominator=denominator)


def luffy_loss(logps, advantages, mask, gamma=0.1, aggregate="sequence", denominator=None):
    """LUFFY's off-policy part, 2504.14945: -f(pi) A with f(x) = x / (x + gamma). logps, mask (N, T), advantages (N,) -> scalar.

    The expert's own probabilities are unknown and taken as 1, so the ratio is pi itself; it is not clipped. f' is largest for unlikely tokens.
    """
    p = torch.where(mask, logps, 0).exp()
    return aggregate_tokens(
        -advantages.detach()[:, None] * p / (p + gamma), mask, aggregate, denominator=denominator
    )


def hpt_switch(rewards, threshold=0.0):
    """HPT, 2509.04419: rewards (B, G) -> (B,) bool, True where no sample passes, so that the expert is imitated and GRPO is off."""
    return rewards.amax(1) <= threshold


# ---------------------------------------------------------------------------------------------------------------------------------
# A step


def switch_step(c):
    """First step of stage 2, None for a variant of one stage."""
    if len(VARIANTS[c.variant]) == 1:
        return None
    step = c.switch_step if c.switch_step >= 1 else round(c.switch_step * c.steps)
    if step != int(step) or not 1 <= step < c.steps:
        raise UserError(
            f"--switch-step {c.switch_step:g}: of {c.steps} steps, stage 1 takes a whole number from 1 to {c.steps - 1}, or a share of them"
        )
    return int(step)


def stages(c):
    """[(objective, first step, first step at which the policy moves)]: a co-trained discriminator needs steps of its own before it is used."""
    found, resting = [], c.discriminator_warmup if c.discriminator == "cotrained" else 0
    for objective, begin, end in zip(
        VARIANTS[c.variant], (0, switch_step(c)), (switch_step(c) or c.steps, c.steps)
    ):
        moves = begin + resting * (objective in ANCHORED)
        if moves >= end:
            raise UserError(
                f"--discriminator-warmup {resting}: leaves the policy no step of the {end - begin} in which {objective} is optimised"
            )
        resting -= moves - begin
        found.append((objective, begin, moves))
    return found


def weights(c, objective, step):
    """Weights of (preference, imitation, adversarial part) at a step of an objective, and mu if it has one."""
    if objective in ("ptx", "luffy", "hpt"):
        return (1.0, c.ptx_coef if objective == "ptx" else 1.0, 0.0), None
    mu = float(objective in ("sft", "a-sft"))
    if objective in MIXED:
        decay = round(2 * c.steps / 3) if c.mu_decay is None else c.mu_decay
        mu = (
            chord_mu(step, c.mu_warmup, decay, c.mu_peak, c.mu_valley)
            if c.mu is None and not c.phi
            else (0.1 if c.mu is None else c.mu)
        )
    lam = c.lambda_adv if objective in ANCHORED and objective != "shaping" else 0.0
    return tuple(uniapl_loss(*part, mu, lam) for part in ((1, 0, 0), (0, 1, 0), (0, 0, 1))), mu


class Gradient:
    """Adds up a step's gradient in p.grad; where `apart`, each part by itself first, for their norms and cosines."""

    def __init__(self, params, apart):
        self.params, self.apart, self.parts, self.loss = list(params), apart, {}, 0.0

    def add(self, **parts):
        """parts: name=(weight, loss) of one graph. A weight of 0 leaves the loss out, so that it costs no backward pass and no rounding."""
        losses = {name: weight * loss for name, (weight, loss) in parts.items() if weight}
        self.loss += sum(float(loss.detach()) for loss in losses.values())
        losses = {name: loss for name, loss in losses.items() if loss.requires_grad}
        if not self.apart:
            if losses:
                sum(losses.values()).backward()
            return
        for left, (name, loss) in zip(reversed(range(len(losses))), losses.items()):
            found = torch.autograd.grad(loss, self.params, retain_graph=left > 0)
            self.parts[name] = (
                [a + b for a, b in zip(self.parts[name], found)] if name in self.parts else list(found)
            )

    def finish(self):
        """Norms and cosines of the parts, weights included: they sum to the step's gradient, before clipping."""
        norms, metrics = {}, {}
        for name, part in self.parts.items():
            for p, g in zip(self.params, part):
                p.grad = g.clone() if p.grad is None else p.grad.add_(g)
            norms[name] = float(torch.stack([g.square().sum() for g in part]).sum().sqrt())
        for i, a in enumerate(norms):
            metrics[f"gradient/{a}"] = norms[a]
            for b in list(norms)[i + 1 :]:
                if norms[a] and norms[b]:
                    dot = sum(float((x * y).sum()) for x, y in zip(self.parts[a], self.parts[b]))
                    metrics["cosine/" + "_".join(sorted((a, b)))] = dot / (norms[a] * norms[b])
        return metrics


def distinct(groups, n, ends):
    """{"distinct/n": share} (Li et al., arXiv 1510.03055) within each prompt's samples: different n-grams over all, mean over prompts; {}: none."""
    shares = []
    for group in groups:
        texts = [[t for t in ids if t not in ends] for ids in group]
        grams = [tuple(ids[i : i + n]) for ids in texts for i in range(len(ids) - n + 1)]
        shares += [len(set(grams)) / len(grams)] if grams else []
    return {f"distinct/{n}": sum(shares) / len(shares)} if shares else {}


def credit(c, objective, batch, D):
    """What each answer of a batch is worth to preference and imitation, where the objective says so itself.

    -> A (B, G) of the samples, A_y (B, 1) of the expert in the group (luffy), imitated (B, 1) bool: experts that are imitated.
    """
    rewards = batch.rewards + c.lambda_adv * D if objective == "shaping" else batch.rewards
    everyone = torch.ones(len(rewards), 1, dtype=torch.bool, device=rewards.device)
    if objective == "luffy":
        return *grpo_advantages(torch.cat([rewards, batch.reference_rewards[:, None]], 1)).split(
            [c.group_size, 1], 1
        ), everyone
    A = grpo_advantages(rewards)
    if objective == "hpt":
        fails = hpt_switch(rewards, c.hpt_threshold)[:, None]
        return torch.where(fails, 0.0, A), None, fails
    return A, None, everyone


def update(trainer, records):
    """One optimisation step of the variant on B records."""
    c, policy, sums, metrics = trainer.config, trainer.policy, Sums(), {}
    stage, (objective, begin, moves) = [(i, s) for i, s in enumerate(stages(c), 1) if s[1] <= trainer.step][
        -1
    ]
    (w_preference, w_imitation, w_adversarial), mu = weights(c, objective, max(0, trainer.step - moves))
    resting = trainer.step < moves
    if stage == 2:
        begin_stage(trainer, begin)
    gradient = Gradient(policy.trainable().values(), apart=trainer.step % c.parts_every == 0)
    experts = [[r["reference_ids"]] for r in records]
    expert_mask = completion_mask(experts, policy.device)  # (B, T)
    n_expert = normaliser(expert_mask, "token")
    imitated = torch.ones(len(records), 1, dtype=torch.bool, device=policy.device)

    if objective != "sft":  # the policy's own samples: preference and adversarial part
        batch = trainer.rollout(records)
        prompts, samples = batch.prompts, batch.completions
        metrics |= batch.metrics | distinct(samples, 1, policy.eos_ids) | distinct(samples, 2, policy.eos_ids)
        D = torch.zeros_like(batch.rewards)  # (B, G)
        if c.discriminator:
            D, seen = discriminator.judge(trainer, kind(c), batch)
            metrics |= seen
        A_D = adversarial_advantages(D)
        A, A_y, imitated = credit(c, objective, batch, D)
        n = normaliser(completion_mask(samples, policy.device), c.aggregate)
        if objective == "luffy":  # one group, one count
            n_expert = n = n + normaliser(expert_mask, c.aggregate)
        if (
            objective == "hpt"
        ):  # the token mean over imitated experts, weighted by their share of the prompts: all is SFT, none is GRPO
            n_expert = (expert_mask & imitated).sum().clamp(min=1) / imitated.float().mean().clamp(min=1e-9)
            metrics["hpt/imitated"] = float(imitated.float().mean())
        for part in trainer.micro_batches(prompts, samples):
            with torch.set_grad_enabled(not resting):
                scored = policy.token_logps(prompts[part], samples[part], c.temperature)
            with torch.no_grad():
                reference = policy.token_logps(prompts[part], samples[part], c.temperature, role="reference")
            sums.tokens(scored, reference, batch.sampled_logps[part])
            logps, mask = flat(scored.logps), flat(scored.mask)
            grpo, _ = grpo_loss(
                logps,
                None,
                flat(reference.logps),
                A[part].flatten(),
                mask,
                kl_coef=c.kl_coef,
                kl="k3_ratio",
                aggregate=c.aggregate,
                denominator=n,
            )
            adversarial = adversarial_loss(logps, A_D[part].flatten(), mask, denominator=A_D.numel())
            gradient.add(preference=(w_preference, grpo), adversarial=(w_adversarial, adversarial))

    prompts = [r["prompt_ids"] for r in records]
    for part in trainer.micro_batches(prompts, experts):  # the expert's answers: imitation
        with torch.set_grad_enabled(w_imitation > 0 and not resting):
            scored = policy.token_logps(
                prompts[part], experts[part], c.temperature if objective == "luffy" else 1.0
            )
        sums.add("logp/expert", scored.logps, scored.mask)
        logps, mask = flat(scored.logps), flat(scored.mask)
        if objective == "luffy":
            imitation = luffy_loss(
                logps, A_y[part].flatten(), mask, aggregate=c.aggregate, denominator=n_expert
            )
        else:
            imitation = (sft_phi_loss if c.phi else sft_loss)(
                logps, mask & imitated[part], denominator=n_expert
            )
        gradient.add(imitation=(w_imitation, imitation))

    metrics |= {
        "length/expert": float(expert_mask.sum(1).float().mean()),
        "stage": 0 if resting else stage,
        "loss": gradient.loss,
    }
    metrics |= (
        gradient.finish()
        | sums.means()
        | trainer.optimizer_step()
        | ({} if mu is None or resting else {"mu": mu})
    )
    return metrics | {"lr": trainer.optimizer.param_groups[0]["lr"]}


def begin_stage(trainer, begin):
    """Stage 2 starts as a run of its own: AdamW's moments forgotten, the learning rate warming up. From the step alone, so a resumed run repeats it."""
    c, params = trainer.config, trainer.policy.trainable().values()
    if trainer.step == begin:
        for p in params:
            trainer.optimizer.state.pop(p, None)
    warm = schedule("constant", trainer.step - begin, c.warmup_steps, c.steps)
    trainer.optimizer.param_groups[0]["base_lr"] = (c.switch_lr or c.lr) * warm


def kind(c):
    """How the discriminator of the settings scores: polar, embedding or cotrained; a directory holds a polar one."""
    return c.discriminator if c.discriminator in ("embedding", "cotrained") else "polar"


def setup(trainer):
    """Check what depends on several settings, and make the discriminator."""
    c, policy = trainer.config, trainer.policy
    if (c.phi or c.mu is not None) and c.variant not in MIXED:
        raise UserError(
            f"--{'phi' if c.phi else 'mu'} is for the variants {', '.join(MIXED)}; {c.variant} does not weigh by mu"
        )
    if c.discriminator is None and set(VARIANTS[c.variant]) & set(ANCHORED):
        c.discriminator = "polar"
    stages(c)
    if c.discriminator and kind(c) == "polar":
        discriminator.check_context(policy, trainer.records, c)
    if c.discriminator == "polar":
        if c.resume:
            policy.add_role(discriminator.ROLE)  # the checkpoint fills it
        else:
            discriminator.train_at_start(policy, c)
        trainer.params |= discriminator.freeze(
            policy
        )  # saved in the checkpoint and, in no parameter group, not trained
    elif c.discriminator == "cotrained":
        trainer.train_parameters(policy.add_role(discriminator.ROLE), c.discriminator_lr)
    elif c.discriminator not in (None, "embedding"):
        discriminator.load(policy, c.discriminator)


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
UNIAPL = Method("uniapl", UniAPLConfig, update, METRICS, PANELS, setup, next=NEXT)


def command_line(argv):
    if argv[:1] == ["discriminator"]:
        sys.argv[0] = "uniapl.py discriminator"
        return exit_status(lambda: discriminator.command_line(argv[1:], discriminator.__doc__))
    return main(UNIAPL, argv, description=__doc__)


if __name__ == "__main__":
    sys.exit(command_line(sys.argv[1:]))
