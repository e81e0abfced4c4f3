"""What every loss here is made of: masked means, the denominators of a step, estimates of the KL divergence."""

import torch

KL = ("k1", "k3", "k3_ratio")  # see kl_estimate


def _want(met, otherwise):
    if not met:
        raise ValueError(otherwise)


def _widen(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))  # bf16 -> fp32; fp64 stays


def _clean(mask, **tensors):
    """Check shapes; return mask as bool and the tensors in fp32 or wider, 0 where masked. None stays None.

    The zeros go in before any arithmetic: a mask multiplied in afterwards leaves NaN * 0 = NaN, gradient included.
    """
    _want(mask.dim() == 2 and mask.numel(), f"mask must be (N, T) with N, T >= 1, got {tuple(mask.shape)}")
    for name, x in tensors.items():
        _want(
            x is None or x.shape == mask.shape,
            f"{name} is {None if x is None else tuple(x.shape)} but mask is {tuple(mask.shape)}",
        )
    mask = mask.bool()
    return mask, *(None if x is None else torch.where(mask, _widen(x), 0) for x in tensors.values())


def _per_row(name, x, mask):  # (N,) -> (N, T)
    _want(
        x.shape == mask.shape[:1],
        f"{name} is {tuple(x.shape)} but mask is {tuple(mask.shape)}; want (N,) and (N, T)",
    )
    return x.detach()[:, None].expand_as(mask)


def masked_mean(x, mask, denominator=None):
    """Sum of the valid x over `denominator` (default: their number). Nothing valid: a 0 that can be differentiated."""
    mask, x = _clean(mask, x=x)
    n = mask.sum() if denominator is None else torch.as_tensor(denominator)
    return x.sum() / n.clamp(min=1)


def _masked_variance(x, mask, ddof=0):
    """Exactly 0 where all valid x are equal: seven times 0.1 do not average to 0.1, and a residue would remain."""
    varied = torch.where(mask, x, -torch.inf).amax() > torch.where(mask, x, torch.inf).amin()
    return varied * masked_mean((x - masked_mean(x, mask)).square(), mask, mask.sum() - ddof)


def normaliser(mask, aggregate="token", max_length=None):
    """The count an aggregate divides by; it adds up over micro-batches.

    "token": valid tokens. "sequence": rows, one without a valid token too: 1/G in GRPO's eq. (3) stays 1/G, as in TRL.
    "constant": rows * max_length (default T, which differs between micro-batches, so set it).
    """
    _want(
        aggregate in ("sequence", "token", "constant"),
        f"aggregate must be one of sequence, token, constant, got {aggregate!r}",
    )
    _want(max_length is None or max_length >= 1, f"max_length must be at least 1, got {max_length}")
    N, T = mask.shape
    counts = {"token": mask.bool().sum(), "sequence": N, "constant": N * (max_length or T)}
    return torch.as_tensor(counts[aggregate], device=mask.device)


def aggregate_tokens(x, mask, aggregate="token", max_length=None, denominator=None):
    """(N, T) -> scalar: mean of token means, mean over all tokens, or sum over N * max_length; see normaliser."""
    n = normaliser(mask, aggregate, max_length)
    mask, x = _clean(mask, x=x)
    if aggregate == "sequence":
        x = x / mask.sum(1, keepdim=True).clamp(min=1)  # 1/|o_i|: a row now sums to its token mean
    return masked_mean(x, mask, n if denominator is None else denominator)


def kl_estimate(logps, ref_logps, kind="k3", ratio=None):
    """Estimate KL(pi || ref) per token, from tokens that pi sampled; same shape as logps, no masking.

    All three are unbiased in value on-policy. Their gradients, in expectation and at a given prefix, are these:
        k1        log(pi/ref)               0, since E[grad log pi] = 0: noise as a loss; it belongs in the reward, as in token_rewards.
        k3        ref/pi - 1 - log(ref/pi)  that of KL(ref || pi), the other direction. GRPO's own.
        k3_ratio  (pi/pi_old) * k3          that of KL(pi || ref): the ratio brings in the score function.
    None of them charges a token for the KL of what it leads to; a penalty in the reward does. k1 can be negative, the others cannot.
    `ratio` is pi/pi_old with its gradient; None means on-policy, pi_old = pi.
    """
    _want(kind in KL, f"kl must be one of {', '.join(KL)}, got {kind!r}")
    _want(
        logps.shape == ref_logps.shape,
        f"logps is {tuple(logps.shape)} but ref_logps is {tuple(ref_logps.shape)}",
    )
    logps = _widen(logps)
    log_r = _widen(ref_logps).detach() - logps
    if kind == "k1":
        return -log_r
    k3 = torch.expm1(log_r) - log_r  # 2402.03300 eq. (4); exp(x) - 1 - x rounds below 0 in fp32
    return k3 if kind == "k3" else k3 * (torch.exp(logps - logps.detach()) if ratio is None else ratio)


def completion_mask(completions, device):
    """B lists of G lists of ids -> (N, T) bool, N = B * G, from lengths."""
    lengths = torch.tensor([len(ids) for group in completions for ids in group], device=device)
    return torch.arange(int(lengths.max()), device=device) < lengths[:, None]


def flat(x):  # (B, G, T) -> (N, T), the shape of the losses
    return x.flatten(0, 1)
