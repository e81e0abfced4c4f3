"""The KL estimators of baselines.py against the exact divergence: every sequence of a small vocabulary,
enumerated.
"""

import pytest
import torch
from test_baselines_losses import rand, value_and_grad

import baselines as B
from losses import kl_estimate

V = 5


def tables(length):
    """Logits (prefixes, V) of policy and reference: row 0 for the first token, row 1 + y1 for the second."""
    rows = 1 if length == 1 else 1 + V
    return rand(rows, V, seed=7), rand(rows, V, seed=8)


def sequences(theta, length):
    """Log-probs of every sequence, token by token: (V ** length, length)."""
    p = theta.log_softmax(-1)
    if length == 1:
        return p[0][:, None]
    return torch.stack([p[0].repeat_interleave(V), p[1:].flatten()], 1)


def exact_kl(theta, phi, length, reverse=False, fixed_prefix=True):
    """Sum over positions of E_prefix~pi KL(pi || ref), or KL(ref || pi); fixed_prefix: E_prefix not
    differentiated.
    """
    p, q = theta.log_softmax(-1), phi.log_softmax(-1)
    kl = (q.exp() * (q - p) if reverse else p.exp() * (p - q)).sum(1)  # (prefixes,)
    weight = torch.cat([torch.ones(1, dtype=p.dtype), p[0].exp()])[: len(kl)]
    return ((weight.detach() if fixed_prefix else weight) * kl).sum()


def expected(theta, phi, length, kl):
    """E_{y ~ pi} of grpo_loss with nothing but its KL term; the sampling itself is not differentiated."""
    logps, ref = sequences(theta, length), sequences(phi, length)
    weights = logps.detach().sum(1).exp()
    settings = {"kl_coef": 1.0, "kl": kl, "aggregate": "constant", "max_length": 1}
    return sum(
        w * B.grpo_loss(x[None], None, r[None], torch.zeros(1), torch.ones(1, length), **settings)[0]
        for w, x, r in zip(weights, logps, ref)
    )


@pytest.mark.parametrize("length", (1, 2))
def test_which_kl_each_estimator_follows(length):
    """k3 as a loss pulls along KL(ref || pi), its product with the ratio along KL(pi || ref), k1 along
    nothing.
    """
    theta, phi = tables(length)
    value, forward = value_and_grad(lambda x: exact_kl(x, phi, length), theta)
    _, reverse = value_and_grad(lambda x: exact_kl(x, phi, length, reverse=True), theta)
    for kl, gradient in (("k1", torch.zeros_like(theta)), ("k3", reverse), ("k3_ratio", forward)):
        ours = value_and_grad(lambda x, kl=kl: expected(x, phi, length, kl), theta)
        torch.testing.assert_close(ours[0], value)  # unbiased in value, all three
        torch.testing.assert_close(ours[1], gradient)
    assert (forward - reverse).abs().max() > 0.05
    # The KL of whole sequences also moves the prefixes; no per-token term in the loss sees that.
    whole = value_and_grad(lambda x: exact_kl(x, phi, length, fixed_prefix=False), theta)[1]
    assert torch.allclose(whole, forward) == (length == 1)


def test_k1_in_the_reward_follows_the_kl_of_whole_sequences():
    """PPO's place for the KL: E[return * grad log pi], undiscounted, is -grad KL(pi || ref), prefixes
    included.
    """
    theta, phi = tables(2)
    zeros, ones = torch.zeros(V * V, dtype=torch.float64), torch.ones(V * V, 2)

    def surrogate(x):
        logps = sequences(x, 2)
        rewards = B.token_rewards(zeros, logps, sequences(phi, 2), ones, kl_coef=1.0)
        returns = B.gae(rewards, torch.zeros_like(rewards), ones, gamma=1.0, lam=1.0)[1]
        return -(logps.detach().sum(1).exp()[:, None] * returns * logps).sum()

    torch.testing.assert_close(
        value_and_grad(surrogate, theta)[1],
        value_and_grad(lambda x: exact_kl(x, phi, 2, fixed_prefix=False), theta)[1],
    )


def test_k1_can_be_negative_and_k3_cannot():
    """Not even where logps and ref_logps differ in their last bits, as after one step: exp(x) - 1 - x would
    be.
    """
    x = rand(10_000).float()
    for scale in (1e-7, 1e-4, 1.0):
        k1, k3 = (kl_estimate(-x.abs(), -x.abs() + scale * x, kind) for kind in ("k1", "k3"))
        assert k1.min() < 0 <= k3.min()
