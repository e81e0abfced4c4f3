"""Eq. (3) and (4) of GRAO against plain Python, value and gradient in fp64."""

import math

import pytest
import torch

import baselines
from minigrao import grao_loss, group_advantages

GROUPS = ("samples", "with_reference")
TERMS = ("exploration", "imitation", "regularizer")
SHAPES = ((1, 2), (1, 5), (4, 3))  # (B, G)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_advantages(rewards, y, group, eps=1e-6):
    """Eq. (4) for one prompt, in Python."""
    members = rewards + [y] if group == "with_reference" else rewards
    mu = sum(members) / len(members)
    sigma = math.sqrt(sum((r - mu) ** 2 for r in members) / len(members))
    return [(r - mu) / (sigma + eps) for r in rewards], (y - mu) / (sigma + eps)


def plain_objective(J_expl, J_imit, A_o, A_y, beta, lam, without=None):
    """Eq. (3) for one prompt, in Python, and its gradient as the paper decomposes it."""
    G, on = len(J_expl), {term: float(term != without) for term in TERMS}
    J = (
        sum(
            on["exploration"] * a * j
            + on["imitation"] * beta * A_y * J_imit
            + on["regularizer"] * lam * a * (j - J_imit)
            for a, j in zip(A_o, J_expl)
        )
        / G
    )
    d_expl = [(on["exploration"] + on["regularizer"] * lam) * a / G for a in A_o]
    d_imit = on["imitation"] * beta * A_y - on["regularizer"] * lam * sum(A_o) / G
    return J, d_expl, d_imit


def batch(B, G, group):
    """J_expl, J_imit (with gradient), A_o, A_y."""
    J_expl, J_imit = -rand(B, G, seed=1).abs(), -rand(B, seed=2).abs()
    return (
        J_expl.requires_grad_(),
        J_imit.requires_grad_(),
        *group_advantages(rand(B, G, seed=3), rand(B, seed=4), group),
    )


# ----------------------------------------------------------------------------------------------------------
# Eq. (4)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("B, G", SHAPES)
def test_advantages_are_eq_4(B, G, group):
    """Mean and population deviation of each prompt's own group; the reference inside or outside of it."""
    rewards, y = rand(B, G, seed=3), rand(B, seed=4)
    A_o, A_y = group_advantages(rewards, y, group)
    expected = [plain_advantages(r, v, group) for r, v in zip(rewards.tolist(), y.tolist())]
    torch.testing.assert_close(A_o, torch.tensor([e[0] for e in expected], dtype=torch.float64))
    torch.testing.assert_close(A_y, torch.tensor([e[1] for e in expected], dtype=torch.float64))
    torch.testing.assert_close(A_o.sum(1), torch.zeros_like(A_y) if group == "samples" else -A_y)


@pytest.mark.parametrize("group", GROUPS)
def test_advantages_are_over_the_group_not_the_batch(group):
    """A generous prompt beside a strict one: normalised together, all answers to the first looked good."""
    rewards, y = rand(2, 4, seed=3), rand(2, seed=4)
    shift, scale = (
        torch.tensor([100.0, 0.0], dtype=torch.float64),
        torch.tensor([3.0, 1.0], dtype=torch.float64),
    )
    moved = group_advantages(rewards * scale[:, None] + shift[:, None], y * scale + shift, group)
    for a, b, c in zip(
        group_advantages(rewards, y, group), moved, group_advantages(rewards[:1], y[:1], group)
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # up to eps
        torch.testing.assert_close(a[:1], c)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("reward", (0.1 * 7, 1 / 3, 1e8 + 0.1, -2.7e-9, 0.0))
@pytest.mark.parametrize("G", (2, 6, 7))
def test_a_tied_group_has_advantage_exactly_0(G, reward, dtype):
    """The mean of equal numbers is off by a rounding error, which over an equally small deviation is an
    advantage of 1.
    """
    rewards = torch.full((1, G), reward, dtype=dtype)
    for group in GROUPS:
        A_o, A_y = group_advantages(rewards, rewards[:, 0], group)
        assert not A_o.any() and not A_y.any()


def test_tied_samples_beside_another_reference():
    """samples: no scale, nothing to learn. with_reference: a better answer is imitated, with the largest
    advantage there is.
    """
    rewards, y = torch.full((1, 4), 0.7), torch.tensor([0.9])
    assert not torch.cat([x.flatten() for x in group_advantages(rewards, y, "samples")]).any()
    A_o, A_y = group_advantages(rewards, y, "with_reference")
    torch.testing.assert_close(A_y, torch.tensor([2.0]), rtol=1e-4, atol=0)  # sqrt(G)
    torch.testing.assert_close(A_o, torch.full((1, 4), -0.5), rtol=1e-4, atol=0)


def test_a_tie_in_one_group_leaves_the_others_alone():
    A_o, A_y = group_advantages(torch.tensor([[0.7] * 3, [0.0, 1.0, 0.5]]), torch.tensor([0.7, 1.0]))
    assert not A_o[0].any() and A_y[0] == 0 and A_o[1].abs().max() > 1 and A_y[1] > 0.5


def test_whole_numbers_as_rewards():
    """Verifiers pay 0 and 1; integer means would be an error or, divided, 0."""
    A_o, A_y = group_advantages(torch.tensor([[0, 1, 1]]), torch.tensor([1]))
    assert (
        torch.equal(A_o, group_advantages(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([1.0]))[0])
        and A_y[0] > 0
    )


@pytest.mark.parametrize(
    "rewards, y", (((3,), (3,)), ((2, 3), (3,)), ((2, 3), (2, 1)), ((2, 3), ()), ((2, 3, 1), (2,)))
)
def test_shapes_that_would_broadcast_are_refused(rewards, y):
    with pytest.raises(ValueError, match="rewards"):
        group_advantages(torch.zeros(rewards), torch.zeros(y))


def test_an_unknown_group_is_refused():
    with pytest.raises(ValueError, match="batch"):
        group_advantages(torch.zeros(2, 3), torch.zeros(2), group="batch")


# ----------------------------------------------------------------------------------------------------------
# Eq. (3)


@pytest.mark.parametrize("without", (None, *TERMS))
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("B, G", SHAPES)
@pytest.mark.parametrize("beta, lam", ((0.5, 0.6), (0.0, 0.6), (0.5, 0.0), (0.0, 0.0)))
def test_loss_is_eq_3(B, G, group, beta, lam, without):
    """Value, gradient, each ablation; the parts sum to the objective, the loss is its negative."""
    J_expl, J_imit, A_o, A_y = batch(B, G, group)
    loss, parts = grao_loss(J_expl, J_imit, A_o, A_y, beta, lam, without)
    plain = [
        plain_objective(*row, beta, lam, without)
        for row in zip(J_expl.tolist(), J_imit.tolist(), A_o.tolist(), A_y.tolist())
    ]
    assert loss.item() == pytest.approx(-sum(p[0] for p in plain) / B, rel=1e-12, abs=1e-14)
    d_expl, d_imit = torch.autograd.grad(loss, (J_expl, J_imit))
    torch.testing.assert_close(d_expl, -torch.tensor([p[1] for p in plain], dtype=torch.float64) / B)
    torch.testing.assert_close(d_imit, -torch.tensor([p[2] for p in plain], dtype=torch.float64) / B)
    assert tuple(parts) == TERMS and sum(parts.values()).item() == pytest.approx(-loss.item(), rel=1e-12)
    assert not any(value.requires_grad for value in parts.values()) and (
        without is None or parts[without] == 0
    )


@pytest.mark.parametrize("group", GROUPS)
def test_the_regulariser_only_weighs_anew(group):
    """J = (1 + lam) * exploration + (beta + lam / G or beta) * imitation: no direction that was not there
    before.
    """
    beta, lam, G = 0.5, 0.6, 5
    J_expl, J_imit, A_o, A_y = batch(4, G, group)
    weight = beta + (lam / G if group == "with_reference" else 0)
    identity = ((1 + lam) * (A_o * J_expl).mean(1) + weight * A_y * J_imit).mean()
    loss, _ = grao_loss(J_expl, J_imit, A_o, A_y, beta, lam)
    torch.testing.assert_close(-loss, identity)
    for ours, theirs in zip(
        torch.autograd.grad(-loss, (J_expl, J_imit)), torch.autograd.grad(identity, (J_expl, J_imit))
    ):
        torch.testing.assert_close(ours, theirs)


def test_value_and_gradient_are_different_things():
    """With equal log-likelihoods the objective of a group is 0, and its gradient is not: users took a loss of
    0 for a bug.
    """
    A_o, A_y = group_advantages(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([0.0]), "samples")
    J_expl = torch.full((1, 3), -2.0, requires_grad=True)
    loss, _ = grao_loss(J_expl, torch.tensor([-2.0]), A_o, A_y, beta=0.0, lam=0.6)
    (gradient,) = torch.autograd.grad(loss, J_expl)
    assert abs(loss.item()) < 1e-6 and gradient.abs().min() > 0.3
    assert gradient[0, 0] > 0 > gradient[0, 1]  # descent lowers the worst answer and raises the better ones


def test_advantages_carry_no_gradient():
    """Through rewards that come from a network the policy would learn to please the normaliser."""
    J_expl, J_imit, A_o, A_y = batch(2, 3, "samples")
    A_o.requires_grad_(), A_y.requires_grad_()
    loss, _ = grao_loss(J_expl, J_imit, A_o, A_y, 0.5, 0.6)
    assert torch.autograd.grad(loss, (A_o, A_y), allow_unused=True) == (None, None)


def test_all_tied_is_a_differentiable_0():
    J_expl, J_imit, *_ = batch(2, 3, "samples")
    A_o, A_y = group_advantages(torch.full((2, 3), 0.7), torch.full((2,), 0.7))
    loss, _ = grao_loss(J_expl, J_imit, A_o, A_y, 0.5, 0.6)
    assert loss == 0 and not any(g.any() for g in torch.autograd.grad(loss, (J_expl, J_imit)))


def test_the_average_is_over_prompts():
    """Micro-batches weighted by their prompts give the gradient of the whole batch."""
    J_expl, J_imit, A_o, A_y = batch(4, 3, "with_reference")
    whole = torch.autograd.grad(grao_loss(J_expl, J_imit, A_o, A_y, 0.5, 0.6)[0], (J_expl, J_imit))
    parts = [(slice(0, 1), 1 / 4), (slice(1, 4), 3 / 4)]
    split = sum(w * grao_loss(J_expl[s], J_imit[s], A_o[s], A_y[s], 0.5, 0.6)[0] for s, w in parts)
    for a, b in zip(whole, torch.autograd.grad(split, (J_expl, J_imit))):
        torch.testing.assert_close(a, b)


def test_exploration_alone_is_on_policy_grpo():
    """With one update for each rollout the gradient of log pi is that of the ratio: what GRAO adds to GRPO is
    imitation, and nothing else.
    """
    B, G, T = 3, 4, 5
    generator = torch.Generator().manual_seed(0)
    logps = -torch.rand(B, G, T, generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, G, 1), generator=generator)
    rewards = torch.rand(B, G, generator=generator, dtype=torch.float64)
    A, A_y = group_advantages(rewards, rewards[:, 0], "samples")
    J = (logps * mask).sum(-1) / mask.sum(-1)
    grao, _ = grao_loss(J, J[:, 0].detach(), A, A_y, beta=0.0, lam=0.0)
    grpo, _ = baselines.grpo_loss(
        logps.flatten(0, 1),
        None,
        None,
        baselines.grpo_advantages(rewards).flatten(),
        mask.flatten(0, 1),
        aggregate="sequence",
    )
    torch.testing.assert_close(*(torch.autograd.grad(loss, logps)[0] for loss in (grao, grpo)))
