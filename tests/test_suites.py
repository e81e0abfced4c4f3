"""The grid as data: every command line is one its program takes, budgets are equal, and the re-weighted
ablation is the identity's.
"""

import dataclasses
import json

import pytest
import torch

import uniapl
from data import UserError, load_records
from data.graded import graded_tasks
from engine.command_line import parse
from engine.settings import check_settings
from minigrao import grao_loss, group_advantages
from plots import compare, jobs, suites, sweep, words
from reward import verifier

FLAGS = ["--model", "m.gguf", "--reward", "a", "--judge-reward", "b"]


def places(args):
    return {"model": args.model, "data": args.data, "reward": args.reward, "graded": "g"}


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("suite", suites.SUITES)
def test_every_command_line_is_one_its_program_takes(suite, quick, tmp_path):
    args = compare.arguments(["--suite", suite, *FLAGS, "--sweeps", str(tmp_path)])
    for run in suites.grid(suite, quick=quick):
        config = jobs.settings_of(jobs.words_of(run, args, places(args))[0])
        assert config.seed == run.seed and config.steps <= 200
        if run.program == "uniapl.py":
            config.switch_lr = config.switch_lr or config.lr
            uniapl.stages(config)  # what depends on several settings
    for key in {key for run in suites.grid(suite) for key in run.sweeps}:
        method, rates, flags = suites.sweep(suite, key)
        config = sweep.METHODS[method].config
        assert (
            check_settings(config(**parse(config, [f.format(**places(args)) for f in flags], ""))).steps
            and len(rates) >= 2
        )


def test_a_flag_that_does_not_exist_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(suites.METHODS, "sft", ("baselines.py sft", "--no-such-flag 1", "sft"))
    args = compare.arguments(["--suite", "tiny"])
    with pytest.raises(UserError, match="no-such-flag"):
        jobs.settings_of(jobs.words_of(suites.run("tiny", "sft", 0), args, places(args))[0])


@pytest.mark.parametrize("suite", suites.SUITES)
def test_budgets_are_equal(suite):
    args = compare.arguments(["--suite", suite, *FLAGS])
    configs = {
        run.name: jobs.settings_of(jobs.words_of(run, args, places(args))[0]) for run in suites.grid(suite)
    }
    assert (
        len(
            {
                (c.steps, c.prompts_per_step, c.group_size, c.max_new_tokens, c.temperature, c.eval_prompts)
                for c in configs.values()
            }
        )
        == 1
    )
    assert configs["ppo"].ppo_epochs * configs["ppo"].minibatches == configs["grpo"].updates_per_rollout == 1
    assert all(
        c.group_size == suites.GROUP and (c.beta, c.lam) == (suites.BETA, suites.LAMBDA)
        for c in [configs["grao"]]
    )


def test_the_grid_has_what_the_study_asks_for():
    runs = suites.grid("tiny")
    assert len(set(runs)) == len(runs) and {run.name for run in runs} == set(suites.METHODS)
    assert sum(run.name == "grao" for run in runs) >= 10 and len(suites.SHARES) == 4
    assert all(words.label(name) != name for name in suites.METHODS if name not in ("dpo",))
    assert {run.name for run in suites.grid("smollm2", ["comparison"])} == set(suites.COMPARED)
    assert (
        max(run.seed for run in suites.grid("tiny", seeds=2)) == 1
        and max(run.seed for run in suites.grid("tiny", ["quality"], seeds=7)) == 6
    )
    quick = suites.grid("tiny", quick=True)
    assert (
        set(suites.COMPARED) <= {run.name for run in quick}
        and max(run.seed for run in quick) == 1
        and len(quick) < 40
    )


def test_the_best_rate_of_a_sweep_is_taken_and_each_stage_takes_its_own(tmp_path):
    for key, rows in {"sft": [(1e-3, 0.2), (2e-3, 0.4)], "grpo": [(1e-3, 0.9), (2e-3, 0.1)]}.items():
        (tmp_path / f"sweep-tiny-{key}.json").write_text(
            '{"rows": [' + ", ".join(f'{{"lr": {lr}, "reward": {r}}}' for lr, r in rows) + "]}"
        )
    args = compare.arguments(["--suite", "tiny", "--sweeps", str(tmp_path)])
    words, source = jobs.words_of(suites.run("tiny", "sft-grpo", 0), args, places(args))
    config = jobs.settings_of(words)
    assert (
        (config.lr, config.switch_lr) == (2e-3, 1e-3)
        and "0.002: 0.400" in source
        and "sweep-tiny-grpo.json" in source
    )
    assert jobs.words_of(suites.run("tiny", "dpo", 0), args, places(args))[1] == "default"
    args.flags = ["--lr", "3e-4"]  # wins over a sweep
    words, source = jobs.words_of(suites.run("tiny", "sft-grpo", 0), args, places(args))
    config = jobs.settings_of(words)
    assert (config.lr, config.switch_lr) == (3e-4, 1e-3) and source.startswith("given; sweep-tiny-grpo.json")
    args.flags = ["--lr=3e-4"]  # in either spelling
    words, _ = jobs.words_of(suites.run("tiny", "sft-grpo", 0), args, places(args))
    assert jobs.settings_of(words).lr == 3e-4
    args.flags = []

    (tmp_path / "sweep-tiny-dpo.json").write_text("{}")
    with pytest.raises(UserError, match="sweep-tiny-dpo.json"):
        jobs.words_of(suites.run("tiny", "dpo", 0), args, places(args))


@pytest.mark.parametrize("beta, lam", [(0.5, 0.6), (0.0, 0.3), (2.0, 1.2)])
def test_the_equivalent_run_has_the_same_gradient_but_for_a_factor(beta, lam):
    """Eq. (3) is (1 + lam) times the objective without the regulariser at another beta, so a clip scaled
    along clips it alike.
    """
    generator = torch.Generator().manual_seed(0)
    rewards, references = (
        torch.randint(0, 2, (5, 8), generator=generator).double(),
        torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]).double(),
    )
    A_o, A_y = group_advantages(rewards, references, "with_reference", eps=0.0)
    gradients = []
    other, clip = suites.equivalent(beta, lam, 8)
    for b, m, without in ((beta, lam, None), (other, lam, "regularizer")):
        x, y = (
            torch.randn(shape, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
            for shape in ((5, 8), (5,))
        )
        loss, _ = grao_loss(x, y, A_o, A_y, b, m, without)
        gradients.append([loss.detach()[None], *torch.autograd.grad(loss, (x, y), allow_unused=True)])
    for full, reweighted in zip(*gradients):
        torch.testing.assert_close(full, reweighted / clip)
    assert clip == pytest.approx(1 / (1 + lam)) and dataclasses.is_dataclass(suites.SUITES["tiny"])


# ------------------------------------------------------------------------------------------------------------
# References of a chosen quality


def paid(record, key="chosen"):
    columns = {k: [record[k]] for k in ("constraints", "min_words", "about") if k in record}
    return verifier([record["prompt"]], [record[key]], **columns)[0]


@pytest.mark.parametrize("level", ["tiny", "chat"])
def test_graded_references_are_right_as_often_as_asked(level):
    by_share = {share: graded_tasks(level, 200, share) for share in (0.0, 0.5, 1.0)}
    means = {share: sum(map(paid, records)) / 200 for share, records in by_share.items()}
    assert means[0.0] == 0 and means[1.0] == 1 and abs(means[0.5] - 0.5) < 0.1
    assert graded_tasks(level, 200, 0.5) == by_share[0.5]
    for none, half, full in zip(*by_share.values()):
        assert none["prompt"] == half["prompt"] == full["prompt"] and half in (
            none,
            full,
        )  # a larger share only puts wrong ones right
        assert half["experts"][0] == half["chosen"] and "rejected" not in half
    assert (
        sum(r["experts"][0] != r["experts"][1] for r in by_share[1.0]) > 150
    )  # a second one, for a discriminator to learn from


@pytest.mark.parametrize("level", ["tiny", "chat"])
def test_graded_files_hold_out_what_their_tasks_hold_out(level, tmp_path):
    """Held-out prompts of a graded file once stood on the topics that it trains on, and a third of their
    expert answers in its training records, while those of the other parts did not."""
    path = tmp_path / "quality.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in graded_tasks(level, 600, 1.0)))
    train, heldout = load_records(path, "train"), load_records(path, "heldout")
    assert (len(train), len(heldout)) == (540, 60)
    for split, records in (("train", train), ("heldout", heldout)):
        own = {r["prompt"]: r for r in load_records("tasks", split, n=len(records), level=level)}
        assert {r["prompt"] for r in records} == set(own)
        assert all(r["constraints"] == own[r["prompt"]]["constraints"] for r in records)
    if level == "chat":
        assert not {r["chosen"].lower() for r in train} & {r["chosen"].lower() for r in heldout}
        assert not {str(r["about"]) for r in train} & {str(r["about"]) for r in heldout}
