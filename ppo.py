"""PPO, arXiv 1707.06347v2, for answers instead of robots: a baseline of baselines.py, where its flags stand.

    python baselines.py ppo

Deviations from the paper, and from TRL, which many readers know:
- The score lies on the EOS token, after which the value is 0. TRL puts it one position later and keeps a
  value there.
- The value loss is clipped as in OpenAI's code, not in the paper.
- Whitening divides by the population's std, TRL's by n - 1.
- Mini-batches are whole prompt groups, visited in random order.
- The value function is a LoRA adapter of its own, so no coefficient weighs its loss against the policy's.

A value function V says what to expect at each token, and a token's advantage is what came beyond it
(1506.02438v6 eq. (16); 1707.06347v2 eq. (11) and (12)):

    δₜ = rₜ + γ V(sₜ₊₁) - V(sₜ)        Aₜ = Σₗ (γλ)ˡ δₜ₊ₗ

λ = 1 trusts what was sampled (unbiased, noisy), λ = 0 trusts V (biased, calm); it is no weight of a loss
here, as it is in minigrao.py and uniapl.py. sₜ is the prompt with the tokens before t. Shapes and
denominators are those of losses.py.
"""

import torch
from torch import Tensor

from data import UserError
from losses import (
    clean,
    clipped_surrogate,
    explained_variance,
    kl_estimate,
    masked_mean,
    per_token,
    want,
    whiten,
)
from train import Part, Sums, Trainer

# ---------------------------------------------------------------------------------------------------------
# What a token earned


@torch.no_grad()
def token_rewards(
    scores: Tensor, logps: Tensor, ref_logps: Tensor | None, mask: Tensor, kl_coef: float
) -> Tensor:
    """Rewards (..., T) of the samples' tokens: a KL penalty on each, the score on the EOS.

    scores (...,) of the whole answers, in the reward's unit; logps, ref_logps (..., T), nats; ref_logps may
    be None if kl_coef is 0. The EOS is the last valid token of a row, also of one that was cut at the length
    limit.
    """
    usable = kl_coef == 0 or (kl_coef > 0 and ref_logps is not None)
    want(usable, f"kl_coef is {kl_coef}: negative, or ref_logps is None")
    scores = per_token("scores", scores, mask)
    mask, logps, ref_logps, scores = clean(mask, logps=logps, ref_logps=ref_logps, scores=scores)
    # One reward, at the end: what came before earned its share by leading there, and gae passes it back.
    tokens_left = mask.flip(-1).cumsum(-1).flip(-1)  # valid ones, this one included
    score = torch.where(mask & (tokens_left == 1), scores, 0)  # all 0 in a row without tokens
    if ref_logps is None:
        return score
    # log pi - log pi_ref of the sampled token, 2402.03300 eq. (2). As a reward k1 is right, though as a loss
    # its expected gradient is 0: summed over an answer its expectation is KL(pi || pi_ref), and returns
    # charge a token for all of it.
    return score - kl_coef * kl_estimate(logps, ref_logps, "k1")


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma=1.0, lam=0.95) -> tuple[Tensor, Tensor]:
    """rewards, values (..., T) -> (advantages, returns), both (..., T), not whitened, 0 on padding.

    A row's last valid token ends its episode: the value after it is 0. Masked positions are no steps in time.
    """
    mask, rewards, values = clean(mask, rewards=rewards, values=values)
    advantages = torch.zeros_like(rewards + values)
    # Backwards, because A_t needs A_{t+1}. Past the end both are 0: no value is expected of what is never
    # written.
    A_next = V_next = advantages[..., 0].clone()  # (...,)
    for t in reversed(range(mask.shape[-1])):
        delta = rewards[..., t] + gamma * V_next - values[..., t]  # 1707.06347 eq. (12)
        A = delta + gamma * lam * A_next  # 1506.02438 eq. (16), as a recursion
        valid = mask[..., t]
        advantages[..., t] = torch.where(valid, A, 0)
        A_next, V_next = torch.where(valid, A, A_next), torch.where(valid, values[..., t], V_next)
    return advantages, advantages + values  # the return V should have said; values are 0 on padding


# ---------------------------------------------------------------------------------------------------------
# The two losses


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
    # The larger error counts: a value that has moved more than `clip` towards its return gets no gradient,
    # one that moved away gets all of it, as with the policy's min.
    error, clipped_error = (V - R).square(), (V.clamp(V_old - clip, V_old + clip) - R).square()
    parts = {"clip_fraction": masked_mean((clipped_error > error).detach(), mask), "tokens": mask.sum()}
    return 0.5 * masked_mean(torch.max(error, clipped_error), mask, denominator), parts


# ---------------------------------------------------------------------------------------------------------
# A step


def ppo_setup(trainer: Trainer):
    """The value function: one more LoRA adapter on the shared backbone, with a scalar head and a learning
    rate of its own.
    """
    c = trainer.config
    # Prompts are what is shared out: a prompt's samples stay together, and with them their computed prompt.
    if c.minibatches > c.prompts_per_step:
        raise UserError(
            f"--minibatches {c.minibatches}: must be at most --prompts-per-step, {c.prompts_per_step}; "
            "a prompt's samples stay together"
        )
    # Sharing the policy's adapter, its errors, large at first, would move the policy, too.
    trainer.train_parameters(trainer.policy.add_role("value", bias=True), c.value_lr)


def ppo_update(trainer: Trainer, records: list) -> dict:
    """One rollout of PPO on B prompts, then `ppo_epochs` passes of clipped updates over its mini-batches."""
    c, sums = trainer.config, Sums()

    # 1. Explore. A mini-batch is a list of micro-batches: one update, in as many backward passes as memory
    #    asks for.
    batch = trainer.rollout(records)
    minibatches = trainer.minibatches(batch, c.minibatches)

    # 2. Freeze what the updates are held against, pi_old, the reference and V_old, in the updates' own
    #    micro-batches: in bf16 another cut would round otherwise, and the first ratio pi / pi_old would not
    #    be exactly 1.
    for part in trainer.scored(batch, sums, grad=False):
        with torch.no_grad():  # of numbers to compare with; a graph of V would lie in memory for nothing
            part.old_logps, part.old_values = part.logps, part.values()
    old, ref, V = batch.whole("old_logps"), batch.whole("ref_logps"), batch.whole("old_values")  # (B, G, T)

    # 3. Credit: what each token was worth beyond V's expectation. Whitened over the rollout and not over a
    #    mini-batch, where a share of hard prompts would look as good as a share of easy ones.
    mask = batch.whole("mask")
    A, R = gae(token_rewards(batch.rewards, old, ref, mask, c.kl_coef), V, mask, c.gamma, c.gae_lambda)
    whitened = whiten(A, mask)

    # 4. Learn. The denominator is the mini-batch's, which is what an update takes; a micro-batch's would not
    #    add up.
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
            sums.ratio(about)
        metrics = trainer.optimizer_step()  # both adapters, each gradient clipped by its own norm
    updates = c.ppo_epochs * len(minibatches)
    metrics |= {"value/explained_variance": float(explained_variance(V, R, mask))}
    return batch.metrics | sums.means(updates) | metrics | {"updates": (trainer.step + 1) * updates}


def value_backward(c, part: Part, returns: Tensor, n: Tensor) -> tuple[Tensor, dict]:
    """The value function's loss on a part (b, G, T), and its backward pass -> (loss, parts), see
    ppo_value_loss.
    """
    # The role is held over both: with gradient checkpointing the backward pass computes the layers again,
    # with whichever adapter is active then.
    with part.policy.role("value"):
        loss, about = ppo_value_loss(part.values(), part.old_values, returns, part.mask, c.value_clip, n)
        loss.backward()
    return loss, about


CLIPPED = [
    ("Clipped", "share", ["clip/low", "clip/high", "clip/value"]),
    ("Largest ratio", "-", ["ratio/max"]),
    ("Loss", "nats", ["loss"]),
]
METRICS = {
    "clip/value": ("share", "values that moved out of their clip range towards the return; under 0.2"),
    "value/loss": ("reward^2", "half the squared error of the value function; falls"),
    # Before the step's updates. Below 0 the values mislead: a constant would do better.
    "value/explained_variance": (
        "share",
        "share of the returns' variance that V explains; rises from 0 to 1",
    ),
}
PANELS = [
    ("Explained variance", "share", ["value/explained_variance"]),
    ("Value loss", "reward^2", ["value/loss"]),
    *CLIPPED,
]
