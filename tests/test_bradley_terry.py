"""Bradley-Terry training of a role: loss and gradient against TRL's, its order, its seeds, which evaluation
is kept.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import trl
from conftest import END_OF_TURN, random_ids, randomise_all

from data import UserError
from engine import bradley_terry, measures


def trl_loss(chosen, rejected, margin, centre):
    """TRL's RewardTrainer.compute_loss, called on the scores alone."""
    stub = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=centre),
        _total_train_tokens=0,
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics={"eval": defaultdict(list)},
    )
    inputs = {} if margin is None else {"margin": margin}
    return trl.RewardTrainer.compute_loss(
        stub, lambda **_: SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None]), inputs
    )


@pytest.mark.parametrize("margin", [None, torch.tensor([0.5, -1.0, 0.0, 2.0, 3.0])], ids=["plain", "margin"])
def test_loss_and_gradient_are_trls(margin):
    scores = 3 * torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    ours, theirs = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    loss, expected = bradley_terry.bradley_terry_loss(*ours, margin), trl_loss(*theirs, margin, None)
    torch.testing.assert_close(loss, expected)
    loss.backward(), expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_loss_is_stable_and_refuses_what_is_no_pair():
    chosen = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = bradley_terry.bradley_terry_loss(chosen, torch.zeros(2))  # log(sigmoid(x)) would be -inf
    loss.backward()
    assert loss.item() == 5e3 and chosen.grad.tolist() == [-0.5, 0.0]
    assert (
        bradley_terry.bradley_terry_loss(torch.zeros(1).bfloat16(), torch.zeros(1).bfloat16()).dtype
        == torch.float32
    )
    for args in (
        (torch.zeros(0), torch.zeros(0)),
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2), torch.zeros(1)),
    ):
        with pytest.raises(ValueError, match="chosen and rejected"):
            bradley_terry.bradley_terry_loss(*args)


GOOD, BAD = 40, 41  # the better answer of these pairs holds GOOD, the worse one BAD


def pairs(n, seed):
    prompts, answers = random_ids([3 + i % 4 for i in range(n)], seed), random_ids([3] * n, seed + 1)
    return [(p, [GOOD, *a, END_OF_TURN], [BAD, *a[:2], END_OF_TURN]) for p, a in zip(prompts, answers)]


def fitted(load, held_out=(), **options):
    policy = load()
    policy.add_role("reward")
    history = bradley_terry.fit_scorer(
        policy, "reward", pairs(24, 0), held_out, **dict(lr=1e-2, epochs=2, batch_size=8) | options
    )
    return policy, history


def parameters(policy):
    return [*policy.trainable("reward").values(), policy.heads["reward"].weight]


def test_a_role_learns_its_pairs_and_nothing_else_moves(load):
    before = {n: p.detach().clone() for n, p in load().hf.named_parameters()}
    policy, history = fitted(load, pairs(12, 7), epochs=4)
    assert history[-1]["held_out/accuracy"] > 0.9 and history[0]["train/loss"] > history[-1]["train/loss"]
    assert all(torch.equal(p, before[n]) for n, p in policy.hf.named_parameters() if ".reward." not in n)


def test_the_seed_decides_and_the_size_of_a_pass_does_not(load):
    a, b, c, d = (
        parameters(fitted(load, **o)[0])
        for o in (dict(seed=0), dict(seed=0), dict(seed=0, max_tokens_per_pass=1), dict(seed=1))
    )
    assert all(map(torch.equal, a, b)) and not all(map(torch.equal, a, d))
    # Normalised by the batch, not by the pass; Adam's first steps are signs, so a residue may move more.
    for x, y in zip(a, c):
        torch.testing.assert_close(x, y, atol=1e-3, rtol=0)


def test_the_loss_has_the_pairs_margins_and_the_centring_term(load):
    policy = load()
    randomise_all(policy.add_role("reward"))
    scores = (
        policy.sequence_scores([p[0] for p in pairs(6, 0)], [list(p[1:]) for p in pairs(6, 0)]).detach().T
    )
    margins = torch.tensor([0.5, 0.5, 2.0, 0.5, 0.5, 0.5])  # one pair names its own
    mixed = [(*p, 2.0) if i == 2 else p for i, p in enumerate(pairs(6, 0))]
    line = bradley_terry.fit_scorer(
        policy, "reward", mixed, [], lr=1e-3, batch_size=6, margin=0.5, centre=0.1, max_tokens_per_pass=20
    )[0]
    assert line["train/loss"] == pytest.approx(float(trl_loss(*scores, margins, 0.1)), rel=1e-4)


def test_the_best_parameters_are_kept_and_patience_ends_it(load):
    """Held-out pairs that say the opposite: the more is learnt the worse, and the last parameters are the
    worst.
    """
    reversed_ = [(p, worse, better) for p, better, worse in pairs(12, 7)]
    policy, history = fitted(load, reversed_, epochs=8, eval_every=1, patience=3)
    best = max(line["held_out/accuracy"] for line in history)
    assert (
        len(history) < 24
        and history[-1]["held_out/accuracy"] < best
        and history[-1]["best_step"] == history[-4]["step"]
    )
    kept = bradley_terry.group_scores(
        policy, "reward", [p[0] for p in reversed_], [list(p[1:]) for p in reversed_]
    )
    assert measures.accuracy(*zip(*kept)) == best


@pytest.mark.parametrize(
    "accuracies, losses, best",
    [
        (
            [0.5, 0.7, 0.68, 0.66],
            [0.69, 0.66, 0.60, 0.62],
            3,
        ),  # within a standard error (0.046) of 0.7 the lowest loss wins
        ([0.5, 0.7, 0.64, 0.7], [0.69, 0.66, 0.60, 0.67], 2),  # 0.64 is not, whatever its loss
        (
            [0.6, 0.63, 0.75, 0.72],
            [0.66, 0.60, 0.65, 0.66],
            3,
        ),  # what was best is left behind by a higher accuracy
        # and then one that had been passed over may be the best: 0.79 leaves 0.745 behind, and 0.775 has less
        # loss than it
        ([0.745, 0.775, 0.79, 0.6], [0.50, 0.55, 0.70, 0.9], 2),
    ],
)
def test_accuracies_that_cannot_be_told_apart_are_decided_by_the_loss(
    load, monkeypatch, accuracies, losses, best
):
    policy, said = load(), iter(zip(accuracies, losses))
    policy.add_role("reward")
    real = bradley_terry.bradley_terry_loss

    def evaluation(*_):
        right, loss = next(said)
        monkeypatch.setattr(bradley_terry, "accuracy", lambda *_: right)
        monkeypatch.setattr(
            bradley_terry,
            "bradley_terry_loss",
            lambda better, worse, margin=None: real(better, worse, margin) if better.requires_grad else loss,
        )
        return [[0.0, 0.0]] * 100

    monkeypatch.setattr(bradley_terry, "group_scores", evaluation)
    history = bradley_terry.fit_scorer(
        policy, "reward", pairs(8, 0), pairs(100, 1), batch_size=2, eval_every=1
    )
    assert len(history) == 4 and history[-1]["best_step"] == best


def test_scores_come_back_in_order_whatever_the_batches(load):
    policy = load()
    randomise_all(policy.add_role("reward"))
    prompts, groups = (
        random_ids([5, 2, 9, 4]),
        [random_ids(lengths, seed=3) for lengths in ([3, 8], [1, 2, 3], [6, 6], [2])],
    )
    alone = [policy.sequence_scores([p], [group])[0].tolist() for p, group in zip(prompts, groups)]
    for most in (1, 30, 4096):
        for row, expected in zip(bradley_terry.group_scores(policy, "reward", prompts, groups, most), alone):
            assert row == pytest.approx(expected, abs=1e-5)
    with torch.no_grad():
        policy.heads["reward"].weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        bradley_terry.group_scores(policy, "reward", prompts, groups)
    with pytest.raises(UserError, match="not finite"):
        bradley_terry.fit_scorer(policy, "reward", pairs(4, 0), [])
