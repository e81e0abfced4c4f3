"""Training a reward model in pieces: what was stopped and resumed is what never stopped, to the last bit."""

import pytest
import torch
from conftest import END_OF_TURN, random_ids

from data import UserError
from engine import bradley_terry


def pairs(n, seed):
    """The better answer of a pair holds token 40, the worse one 41."""
    prompts, answers = random_ids([3 + i % 4 for i in range(n)], seed), random_ids([3] * n, seed + 1)
    return [(p, [40, *a, END_OF_TURN], [41, *a[:2], END_OF_TURN]) for p, a in zip(prompts, answers)]


class Memory:
    """A folder in memory: what fit_scorer saves it takes up again."""

    saved = None

    def save(self, fit):
        self.saved = fit.state()

    def restore(self, fit):
        if self.saved:
            fit.load_state(*self.saved)


class StopAt:
    """`asked` turns true when it has been looked at so many times, once after every batch."""

    def __init__(self, batches):
        self.left = batches

    @property
    def asked(self):
        self.left -= 1
        return self.left <= 0


def fit(policy, folder=None, stop=None, **options):
    options = dict(lr=1e-2, epochs=3, batch_size=8, eval_every=2, patience=4, centre=0.01) | options
    learn, keep = pairs(24, 0), pairs(12, 7)
    return bradley_terry.fit_scorer(policy, "reward", learn, keep, folder=folder, stop=stop, **options)


def role(policy):
    policy.add_role("reward")
    return policy


def weights(policy):
    return [*policy.trainable("reward").values(), policy.heads["reward"].weight]


def timeless(history):
    return [{k: v for k, v in line.items() if k != "time"} for line in history]


@pytest.mark.parametrize("batches", [1, 2, 5, 8])
def test_stopped_and_resumed_is_never_stopped(load, batches):
    """A resume that repeats a batch, or forgets AdamW's moments, the losses since the last evaluation or the
    best parameters so far, ends elsewhere. 9 batches in all: stopped off and on an evaluation, in the second
    epoch, before the last.
    """
    whole, stopped, resumed = (role(load()) for _ in range(3))
    history = fit(whole)
    folder = Memory()
    assert fit(stopped, folder, StopAt(batches)) is None
    assert folder.saved[1]["step"] == batches
    assert timeless(fit(resumed, folder)) == timeless(history)
    assert all(map(torch.equal, weights(resumed), weights(whole)))
    assert not all(map(torch.equal, weights(stopped), weights(whole)))


def test_a_stop_after_the_last_batch_is_the_end(load):
    """Nothing is left to resume: the best parameters are taken, as if nobody had asked."""
    policy, folder = role(load()), Memory()
    assert len(fit(policy, folder, StopAt(9))) == 5 and folder.saved[1]["step"] == 9
    again = role(load())
    assert len(fit(again, folder)) == 5  # killed while it was being measured: no step is taken twice
    assert all(map(torch.equal, weights(policy), weights(again)))


def test_a_state_of_other_data_is_refused(load):
    folder = Memory()
    fit(role(load()), folder, StopAt(2))
    with pytest.raises(ValueError, match="of 24 pairs, and the data now has 12"):
        policy = role(load())
        bradley_terry.fit_scorer(policy, "reward", pairs(12, 0), pairs(12, 7), folder=folder, epochs=3)
    tensors, numbers = folder.saved
    name = next(name for name in tensors if name.startswith("exp_avg/"))
    folder.saved = tensors | {name: tensors[name][:1, :1]}, numbers
    with pytest.raises(ValueError, match="wanted"):
        fit(role(load()), folder)


def test_patience_counts_the_same_after_a_resume(load):
    reversed_ = [(p, worse, better) for p, better, worse in pairs(12, 7)]
    runs = []
    for stop in (None, StopAt(3)):
        policy, folder = role(load()), Memory()
        options = dict(lr=1e-2, epochs=8, batch_size=8, eval_every=1, patience=3, folder=folder)
        history = bradley_terry.fit_scorer(policy, "reward", pairs(24, 0), reversed_, stop=stop, **options)
        if history is None:
            policy = role(load())
            history = bradley_terry.fit_scorer(policy, "reward", pairs(24, 0), reversed_, **options)
        runs.append((timeless(history), weights(policy)))
    assert runs[0][0] == runs[1][0] and len(runs[0][0]) < 24
    assert all(map(torch.equal, runs[0][1], runs[1][1]))


def test_no_pair_is_an_error(load):
    with pytest.raises(UserError, match="no pair"):
        bradley_terry.fit_scorer(role(load()), "reward", [], [])
