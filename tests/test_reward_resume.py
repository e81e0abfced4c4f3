"""Training a reward model in pieces: what was stopped and resumed is what never stopped, to the last bit."""

import os
import shutil
import signal

import pytest
import torch
from conftest import END_OF_TURN, random_ids

import reward
import reward_model
from data import UserError
from engine import bradley_terry, unfinished
from engine.folders import read_jsonl


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


# ------------------------------------------------------------------------------------------------------------
# python reward.py train --resume


SMALL = [
    "--model",
    "tiny",
    "--device",
    "cpu",
    "--quantize",
    "none",
    "--train-pairs",
    "64",
    "--stop-pairs",
    "40",
]
SMALL += ["--epochs", "2", "--batch-size", "8", "--seed", "3", "--centre", "0.01"]


def train(*flags):
    return reward.main(["train", *map(str, flags)])


def in_step(n, what):
    """Fit.take_step that does something in its n-th step, before it is taken."""
    real = bradley_terry.Fit.take_step

    def take_step(fit):
        if fit.step == n - 1:
            what()
        return real(fit)

    return take_step


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def fail():
    raise RuntimeError("the power is gone")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A reward model whose training nobody stopped: 16 batches, evaluated after every second one."""
    out = tmp_path_factory.mktemp("whole") / "reward"
    assert train(*SMALL, "--out", out) == 0
    return out


def same_model(a, b):
    files = ("adapter_model.safetensors", "scores.jsonl")
    same = all((a / name).read_bytes() == (b / name).read_bytes() for name in files)
    lines = [timeless(read_jsonl(path / "metrics.jsonl")) for path in (a, b)]
    return same and lines[0] == lines[1] and {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()}


def test_ctrl_c_saves_after_the_batch_and_resume_goes_on(finished, tmp_path, monkeypatch, capsys):
    """Ctrl-C lost the whole training of a reward model, hours on a CPU."""
    out = tmp_path / "reward"
    with monkeypatch.context() as patch:
        patch.setattr(bradley_terry.Fit, "take_step", in_step(5, press_ctrl_c))
        assert train(*SMALL, "--out", out) == 130
    said = capsys.readouterr().err
    assert f"python reward.py train --resume --out {out}" in said
    assert unfinished.read_metadata(out / "checkpoint.safetensors")["numbers"]["step"] == 5
    assert reward.main(["score", "--model", str(out), "--data", "tasks"]) == 2
    assert "has not finished" in capsys.readouterr().err
    assert train("--resume", "--out", out) == 0
    assert same_model(out, finished)


def test_a_training_that_was_killed_goes_on_from_its_last_evaluation(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "reward"
    with monkeypatch.context() as patch:
        patch.setattr(bradley_terry.Fit, "take_step", in_step(8, fail))
        assert train(*SMALL, "--out", out) == 2
        # and once more after the last batch, while the finished role is being measured
        patch.undo()
        patch.setattr(reward_model, "measure_sets", lambda *_: fail())
        assert train("--resume", "--out", out) == 2
    assert unfinished.read_metadata(out / "checkpoint.safetensors")["numbers"]["step"] == 16
    assert train("--resume", "--out", out) == 0
    assert same_model(out, finished)


def test_ctrl_c_twice_leaves_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    out = tmp_path / "reward"

    def twice():
        press_ctrl_c()
        press_ctrl_c()

    monkeypatch.setattr(bradley_terry.Fit, "take_step", in_step(1, twice))
    assert train(*SMALL, "--out", out) == 130 and not out.exists()
    assert "nothing was written" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(bradley_terry.Fit, "take_step", in_step(4, twice))
    assert train(*SMALL, "--out", out) == 130
    assert f"--resume --out {out}" in capsys.readouterr().err
    assert unfinished.read_metadata(out / "checkpoint.safetensors")["numbers"]["step"] == 2


def test_overwrite_replaces_a_model_only_when_there_is_something_to_go_on_with(
    finished, tmp_path, monkeypatch
):
    out = tmp_path / "reward"
    shutil.copytree(finished, out)
    monkeypatch.setattr(bradley_terry.Fit, "take_step", in_step(2, fail))
    assert train(*SMALL, "--overwrite", "--out", out) == 2
    assert same_model(out, finished)
    monkeypatch.undo()
    monkeypatch.setattr(bradley_terry.Fit, "take_step", in_step(3, fail))
    assert train(*SMALL, "--overwrite", "--out", out) == 2
    assert [path.name for path in out.iterdir()] == ["checkpoint.safetensors"]


def test_what_cannot_be_resumed(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "reward"
    with monkeypatch.context() as patch:
        patch.setattr(bradley_terry.Fit, "take_step", in_step(3, press_ctrl_c))
        assert train(*SMALL, "--out", out) == 130
    damaged = tmp_path / "damaged"
    shutil.copytree(out, damaged)
    content = (out / "checkpoint.safetensors").read_bytes()
    (damaged / "checkpoint.safetensors").write_bytes(content[:-10])
    capsys.readouterr()
    for flags, words in (
        (["--resume", "--out", finished], "is finished"),
        (["--resume", "--out", tmp_path / "never"], "holds no checkpoint"),
        (["--resume", "--out", damaged], "holds no checkpoint"),
        (["--resume", "--out", out, "--lr", "0.5"], "lr was 0.001"),
        (["--resume", "--overwrite", "--out", out], "give one of them"),
        ([*SMALL, "--out", out], "--resume it"),
        ([*SMALL, "--out", finished], "--overwrite it"),
    ):
        assert train(*flags) == 2, flags
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("error: ") and words in said, (flags, said)
    assert (out / "checkpoint.safetensors").read_bytes() == content


def test_a_second_training_into_the_same_folder_is_told_who_has_it(tmp_path, monkeypatch, capsys):
    out = tmp_path / "reward"
    said = []

    def second():
        assert train(*SMALL, "--overwrite", "--out", out) == 2
        said.append(capsys.readouterr().err)
        fail()

    monkeypatch.setattr(bradley_terry.Fit, "take_step", in_step(3, second))
    assert train(*SMALL, "--out", out) == 2
    assert f"process {os.getpid()}" in said[0] and "is writing it" in said[0]
