"""What every loss here is made of: masked means, the denominators of a step, estimates of the KL divergence.

Shapes. A loss takes tensors (..., T): T token positions, and before them whatever counts the completions, so
(N, T) and (B, G, T) are the same to it. `mask` is True on the tokens of a completion, its EOS included. Where
it is False the other tensors may hold anything, NaN included; it reaches neither value nor gradient.

Denominators. Every loss is a sum over a count. The count belongs to the whole optimisation step: take it
once, from the lengths, and hand it to each micro-batch as `denominator`. Gradients then add up to the step's,
however it was cut. A mean of the micro-batches' own means would weigh a token by the company it happens to be
in, which is how many published SFT baselines came out weak (arXiv 2604.23747).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

AGGREGATES = ("sequence", "token", "constant")  # see normaliser
KL = ("k1", "k3", "k3_ratio")  # see kl_estimate


def want(met, otherwise):
    if not met:
        raise ValueError(otherwise)


def widen(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))  # bf16 -> fp32; fp64 stays


def clean(mask, **tensors):
    """Check shapes; return mask as bool and the tensors in fp32 or wider, 0 where masked. None stays None.

    The zeros go in before any arithmetic: a mask multiplied in afterwards leaves NaN * 0 = NaN, gradient
    included.
    """
    want(mask.dim() >= 2 and mask.numel(), f"mask must be (N, T) with N, T >= 1, got {tuple(mask.shape)}")
    mask, cleaned = mask.bool(), []
    for name, x in tensors.items():
        if x is None:
            cleaned.append(None)
            continue
        want(x.shape == mask.shape, f"{name} is {tuple(x.shape)} but mask is {tuple(mask.shape)}")
        cleaned.append(torch.where(mask, widen(x), 0))
    return mask, *cleaned


def per_token(name, x, mask):
    """One number for each completion, (...,) -> (..., T), without gradient: advantages and scores are data to
    a loss.
    """
    shapes = f"{name} is {tuple(x.shape)} but mask is {tuple(mask.shape)}; want (N,) and (N, T)"
    want(x.shape == mask.shape[:-1], shapes)
    return x.detach()[..., None].expand_as(mask)


def masked_mean(x: Tensor, mask: Tensor, denominator: Tensor | int | None = None) -> Tensor:
    """Sum of the valid x over `denominator` (default: their number). Nothing valid: a 0 that can be
    differentiated.
    """
    mask, x = clean(mask, x=x)
    n = mask.sum() if denominator is None else torch.as_tensor(denominator)
    return x.sum() / n.clamp(min=1)


def masked_variance(x, mask, ddof=0):
    """Exactly 0 where all valid x are equal: seven times 0.1 do not average to 0.1, and a residue would
    remain.
    """
    varied = torch.where(mask, x, -torch.inf).amax() > torch.where(mask, x, torch.inf).amin()
    return varied * masked_mean((x - masked_mean(x, mask)).square(), mask, mask.sum() - ddof)


def normaliser(mask: Tensor, aggregate: str = "token", max_length: int | None = None) -> Tensor:
    """The count that an aggregate divides by; it adds up over micro-batches.

    "token": valid tokens. "sequence": completions, one without a valid token too: 1/G in GRPO's eq. (3) stays
    1/G, as in TRL. "constant": completions * max_length (default T, which differs between micro-batches, so
    set it).
    """
    want(aggregate in AGGREGATES, f"aggregate must be one of {', '.join(AGGREGATES)}, got {aggregate!r}")
    want(max_length is None or max_length >= 1, f"max_length must be at least 1, got {max_length}")
    N, T = mask.shape[:-1].numel(), mask.shape[-1]
    counts = {"token": mask.bool().sum(), "sequence": N, "constant": N * (max_length or T)}
    return torch.as_tensor(counts[aggregate], device=mask.device)


def denominator(completions: Sequence, aggregate: str = "token", max_length: int | None = None) -> Tensor:
    """The step's normaliser, before anything is scored: completions are B lists of G lists of token ids."""
    return normaliser(completion_mask(completions), aggregate, max_length)


def aggregate_tokens(x, mask, aggregate="token", max_length=None, denominator=None) -> Tensor:
    """(..., T) -> scalar: mean of token means, mean over all tokens, or sum over N * max_length; see
    normaliser.
    """
    n = normaliser(mask, aggregate, max_length)
    mask, x = clean(mask, x=x)
    if aggregate == "sequence":
        x = x / mask.sum(-1, keepdim=True).clamp(min=1)  # 1/|o_i|: a row now sums to its token mean
    return masked_mean(x, mask, n if denominator is None else denominator)


def kl_estimate(logps: Tensor, ref_logps: Tensor, kind: str = "k3", ratio: Tensor | None = None) -> Tensor:
    """Estimate KL(pi || ref) per token, from tokens that pi sampled; same shape as logps, no masking.

    All three are unbiased in value on-policy. Their gradients, in expectation and at a given prefix, are
    these:
        k1        log(pi/ref)               0, since E[grad log pi] = 0: noise as a loss; it belongs in the
                                            reward, as in token_rewards.
        k3        ref/pi - 1 - log(ref/pi)  that of KL(ref || pi), the other direction. GRPO's own.
        k3_ratio  (pi/pi_old) * k3          that of KL(pi || ref): the ratio brings in the score function.
    None of them charges a token for the KL of what it leads to; a penalty in the reward does. k1 can be
    negative, the others cannot. `ratio` is pi/pi_old with its gradient; None means on-policy, pi_old = pi.
    """
    want(kind in KL, f"kl must be one of {', '.join(KL)}, got {kind!r}")
    shapes = f"logps is {tuple(logps.shape)} but ref_logps is {tuple(ref_logps.shape)}"
    want(logps.shape == ref_logps.shape, shapes)
    logps = widen(logps)
    log_r = widen(ref_logps).detach() - logps
    if kind == "k1":
        return -log_r
    k3 = torch.expm1(log_r) - log_r  # 2402.03300 eq. (4); exp(x) - 1 - x rounds below 0 in fp32
    if kind == "k3":
        return k3
    # On-policy the ratio is 1 in value; written out like this it still has its gradient, grad log pi.
    return k3 * (torch.exp(logps - logps.detach()) if ratio is None else ratio)


def completion_mask(completions: Sequence) -> Tensor:
    """B lists of G lists of ids -> (B, G, T) bool: from lengths, never from ids, because pad may be EOS."""
    lengths = torch.tensor([[len(ids) for ids in group] for group in completions])  # (B, G)
    return torch.arange(int(lengths.max())) < lengths[..., None]


# What GRPO and PPO share. # Samples are drawn from pi_old and several updates made on them, so pi moves away
# from the policy that drew them. The importance ratio π/π_old corrects for that, and the clip stops a token's
# gradient once the ratio has gone far enough. 1707.06347 eq. (7):
#
#     L_CLIP = E[ min( ratio A, clip(ratio, 1 - ε, 1 + ε) A ) ]


def clipped_surrogate(logps, old_logps, A, mask, clip_low, clip_high):
    """All (..., T) and clean -> (objective per token, ratio, parts). old_logps None: on-policy, the ratio is
    exactly 1.
    """
    log_ratio = logps - (logps if old_logps is None else old_logps).detach()
    ratio = torch.exp(log_ratio)
    # The min lets the clip bind only where the ratio has already gone the way A wants: low for A < 0, high
    # for A > 0. Where it has gone the wrong way the gradient stays, so that the next update can take it back.
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


@torch.no_grad()
def whiten(x: Tensor, mask: Tensor, eps: float = 1e-8, ddof: int = 0) -> Tensor:
    """(..., T) -> mean 0, std 1 over the valid tokens of a whole rollout; 0 elsewhere, or if all equal.
    ddof=1: TRL's.
    """
    mask, x = clean(mask, x=x)
    variance = masked_variance(x, mask, ddof)
    return torch.where(mask & (variance > 0), (x - masked_mean(x, mask)) * (variance + eps).rsqrt(), 0)


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns): 1 perfect, 0 no better than a constant (or all returns are
    equal).
    """
    mask, V, R = clean(mask, values=values, returns=returns)
    total = masked_variance(R, mask)
    return torch.where(total > 0, 1 - masked_variance(R - V, mask) / total, 0)
