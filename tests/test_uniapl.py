"""UniAPL: its losses against plain Python in fp64, its identities, and every variant as a user meets it."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_baselines import CLOCK, assert_same, gradients, letters, one_step, randomise

import train
import uniapl
from baselines import GRPO, SFT, grpo_loss, sft_loss
from data import UserError, tiny_tasks
from engine.command_line import parse
from engine.metrics import METRICS
from engine.record import read_jsonl
from engine.settings import check_settings
from uniapl import UNIAPL, VARIANTS

ROOT = Path(__file__).parents[1]
SMALL = [
    "--model",
    "tiny",
    "--steps",
    "4",
    "--prompts-per-step",
    "3",
    "--group-size",
    "4",
    "--eval-prompts",
    "6",
    "--eval-every",
    "2",
    "--warmup-steps",
    "0",
]
FEW = ["--discriminator-pairs", "20", "--discriminator-epochs", "1"]
B, G, T = 3, 4, 5


def trainer(variant, *flags, method=UNIAPL, reward_fn=letters):
    given = parse(
        method.config,
        [*SMALL, *(["--variant", variant, *FEW] if method is UNIAPL else []), *map(str, flags)],
        "",
    )
    return train.Trainer(method, check_settings(method.config(**given)), reward_fn)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(seed=0, rows=B * G):
    """logps (N, T) with gradient, NaN where masked, and mask: what a loss must not touch."""
    mask = torch.arange(T) < torch.randint(1, T + 1, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return torch.where(mask, -rand(rows, T, seed=seed).abs() - 0.1, torch.nan).requires_grad_(), mask


def loops(logps, mask):
    """The valid log-probs of each row, as leaves of their own."""
    return [[x.detach().clone().requires_grad_() for x in row[m]] for row, m in zip(logps, mask)]


def assert_same_loss(loss, logps, mask, expected, rows):
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logps)
    leaves = [x for row in rows for x in row]
    torch.testing.assert_close(gradient[mask], torch.stack(torch.autograd.grad(expected, leaves)))
    assert not gradient[~mask].any()


# ----------------------------------------------------------------------------------------------------------
# the parts


def test_advantages_of_scores_by_hand():
    A = uniapl.adversarial_advantages(torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.1 * 7] * 4], requires_grad=True))
    std = math.sqrt((4 + 1 + 0 + 9) / 4)  # of the population
    torch.testing.assert_close(A[0], torch.tensor([-2.0, -1.0, 0.0, 3.0]) / std, rtol=1e-5, atol=1e-6)
    assert not A[1].any() and not A.requires_grad
    scores = rand(B, G)
    torch.testing.assert_close(
        uniapl.adversarial_advantages(scores),
        uniapl.adversarial_advantages(100 * scores + 7),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("scores", (torch.zeros(4), torch.tensor([[math.nan, 1.0]])))
def test_scores_that_cannot_be_compared(scores):
    with pytest.raises(ValueError):
        uniapl.adversarial_advantages(scores)


def test_adversarial_loss_is_the_formula():
    logps, mask = tokens()
    A, rows = rand(B * G, seed=2).requires_grad_(), loops(logps, mask)
    expected = -sum(a.detach() * sum(row) / len(row) for a, row in zip(A, rows)) / len(rows)
    loss = uniapl.adversarial_loss(logps, A, mask)
    assert_same_loss(loss, logps, mask, expected, rows)
    assert torch.autograd.grad(uniapl.adversarial_loss(logps, A, mask), A, allow_unused=True) == (None,)
    ours, grpos = (
        torch.autograd.grad(x, logps)[0]
        for x in (uniapl.adversarial_loss(logps, A, mask), grpo_loss(logps, None, None, A, mask)[0])
    )
    torch.testing.assert_close(ours, grpos)  # GRPO's gradient on-policy, with another advantage


def test_phi_weights_without_gradient():
    """Through phi the loss would also lower the weight of what it cannot fit."""
    logps, mask = tokens()
    rows = loops(logps, mask)
    valid = [x for row in rows for x in row]
    expected = -sum(x.detach().exp() * (1 - x.detach().exp()) * x for x in valid) / len(valid)
    assert_same_loss(uniapl.sft_phi_loss(logps, mask), logps, mask, expected, rows)
    certain = torch.tensor([[0.0, math.log(0.5), -50.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(
        uniapl.sft_phi_loss(certain, torch.ones(1, 3, dtype=torch.bool)), certain
    )
    torch.testing.assert_close(gradient, -torch.tensor([[0.0, 0.25, 0.0]]) / 3)


@pytest.mark.parametrize("aggregate", ("sequence", "token"))
def test_luffy_shapes_the_experts_probability(aggregate):
    logps, mask = tokens()
    A, rows = rand(B * G, seed=2), loops(logps, mask)
    shaped = [[x.exp() / (x.exp() + 0.1) for x in row] for row in rows]
    if aggregate == "token":
        expected = -sum(a * f for a, row in zip(A, shaped) for f in row) / int(mask.sum())
    else:
        expected = -sum(a * sum(row) / len(row) for a, row in zip(A, shaped)) / len(rows)
    assert_same_loss(uniapl.luffy_loss(logps, A, mask, aggregate=aggregate), logps, mask, expected, rows)


def test_hpt_imitates_where_no_sample_passes():
    rewards = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.3, 0.2]])
    assert uniapl.hpt_switch(rewards).tolist() == [True, False, False] and uniapl.hpt_switch(
        rewards, 0.5
    ).tolist() == [True, False, True]


@pytest.mark.parametrize(
    "step, mu", ((0, 0.0), (1, 0.2), (4, 0.8), (5, 1.0), (10, 0.55), (15, 0.1), (16, 0.1), (10**6, 0.1))
)
def test_mu_schedule(step, mu):
    assert uniapl.chord_mu(step, 5, 10, 1.0, 0.1) == pytest.approx(mu)


def test_mu_schedule_at_its_corners():
    assert uniapl.chord_mu(0, 0, 200, 0.9, 0.05) == pytest.approx(0.9)  # CHORD's own setting: no warm-up
    assert uniapl.chord_mu(200, 0, 200, 0.9, 0.05) == 0.05 and uniapl.chord_mu(199, 0, 200, 0.9, 0.05) > 0.05
    assert uniapl.chord_mu(0, 0, 0, 0.9, 0.05) == uniapl.chord_mu(
        3, 3, 0, 0.9, 0.05
    ) == 0.05 and uniapl.chord_mu(2, 3, 0, 0.9, 0.05) == pytest.approx(0.6)
    mus = [uniapl.chord_mu(step, 7, 31, 0.9, 0.05) for step in range(60)]
    assert (
        max(mus) == mus[7] == 0.9 and mus[:8] == sorted(mus[:8]) and mus[7:] == sorted(mus[7:], reverse=True)
    )


def test_unified_is_the_sum_of_its_parts():
    """Value and gradient, in both of the notes' forms: the anchor counts once, whatever mu."""
    logps, mask = tokens()
    expert, expert_mask = tokens(seed=7, rows=B)
    A, A_D, mu, lam = rand(B * G, seed=2), rand(B * G, seed=3), 0.3, 0.7
    parts = lambda: (
        grpo_loss(logps, None, None, A, mask)[0],
        sft_loss(expert, expert_mask),
        uniapl.adversarial_loss(logps, A_D, mask),
    )  # noqa: E731
    grpo, sft, adversarial = parts()
    loss = uniapl.uniapl_loss(grpo, sft, adversarial, mu, lam)
    torch.testing.assert_close(loss, (1 - mu) * (grpo + lam * adversarial) + mu * (sft + lam * adversarial))
    whole = torch.autograd.grad(loss, (logps, expert))
    each = [torch.autograd.grad(part, (logps, expert), allow_unused=True) for part in parts()]
    torch.testing.assert_close(whole[0], (1 - mu) * each[0][0] + lam * each[2][0])
    torch.testing.assert_close(whole[1], mu * each[1][1])
    for mu, lam, only in ((0, 0, grpo), (1, 0, sft)):
        assert uniapl.uniapl_loss(grpo, sft, adversarial, mu, lam) == only


def test_shaping_cancels_lambda_in_a_tied_group():
    """Normalised together, the anchor has full strength wherever the rewards say nothing; normalised apart it
    keeps to lambda.
    """
    D, tied = rand(1, G), torch.ones(1, G, dtype=torch.float64)
    shaped = [uniapl.grpo_advantages(tied + lam * D) for lam in (0.01, 0.1, 1.0)]
    for A in shaped:
        torch.testing.assert_close(A, uniapl.adversarial_advantages(D), rtol=1e-3, atol=1e-3)
    logps, mask = tokens(rows=G)
    apart = []
    for lam in (0.01, 0.1):
        loss = uniapl.uniapl_loss(
            grpo_loss(logps, None, None, uniapl.grpo_advantages(tied)[0], mask)[0],
            0.0,
            uniapl.adversarial_loss(logps, uniapl.adversarial_advantages(D)[0], mask),
            0.0,
            lam,
        )
        apart.append(torch.autograd.grad(loss, logps)[0])
    torch.testing.assert_close(apart[1], 10 * apart[0])


def test_distinct_n_by_hand():
    groups = [[[5, 6, 3], [5, 6, 7, 3]], [[9, 9, 3], [3]]]  # 3 ends an answer
    assert uniapl.distinct(groups, 1, [3]) == {"distinct/1": pytest.approx((3 / 5 + 1 / 2) / 2)}
    assert uniapl.distinct(groups, 2, [3]) == {"distinct/2": pytest.approx((2 / 3 + 1) / 2)}
    assert uniapl.distinct([[[3], [3]]], 1, [3]) == {}  # NaN would not be JSON


# ----------------------------------------------------------------------------------------------------------
# the update


def parameters(t):
    return {n: p.detach().clone() for n, p in t.policy.trainable().items()}


@pytest.mark.parametrize(
    "flags, method, theirs",
    [
        (["a-grpo", "--lambda-adv", 0], GRPO, []),
        (["a-grpo", "--lambda-adv", 0, "--aggregate", "token"], GRPO, ["--aggregate", "token"]),
        (["a-sft", "--lambda-adv", 0], SFT, []),
        (["unified", "--mu", 0, "--lambda-adv", 0], GRPO, []),
        (["unified", "--mu", 1, "--lambda-adv", 0], SFT, []),
        (["ptx", "--ptx-coef", 0, "--kl-coef", 0.2], GRPO, ["--kl-coef", 0.2]),
        (["shaping", "--lambda-adv", 0], GRPO, []),
        (["hpt", "--hpt-threshold", 99], SFT, []),
        (["hpt", "--hpt-threshold", -99], GRPO, []),
    ],
)
@pytest.mark.parametrize("tokens", (60, 10**6))
def test_without_the_anchor_it_is_grpo_or_sft_exactly(flags, method, theirs, tokens):
    """The same parameters after two steps, bit for bit: the discriminator watches and leaves no trace.
    Measuring the parts does not either.
    """
    shared = ["--micro-batch-tokens", tokens, "--lr", 1e-2]
    ours, other = (
        trainer(*flags, *shared, "--parts-every", 2, "--discriminator", "embedding"),
        trainer(None, *theirs, *shared, method=method),
    )
    for _ in range(2):
        one_step(ours), one_step(other)
    theirs = parameters(other)
    for name, p in parameters(ours).items():
        assert torch.equal(p, theirs[name]), name


@pytest.mark.parametrize("variant", ("unified", "a-chord"))
def test_the_step_is_the_gradient_of_uniapl_loss(variant):
    """The update takes the parts one by one; here the three losses are put together in one graph from the
    same samples.
    """
    t = trainer(variant, "--mu", 0.3, "--lambda-adv", 0.7, "--quantize", "none")
    randomise(t)
    t.params = t.policy.trainable()
    seen, rollout, judge = {}, t.rollout, uniapl.discriminator.judge
    t.rollout = lambda records: seen.setdefault("batch", rollout(records))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uniapl.discriminator, "judge", lambda *a: seen.setdefault("D", judge(*a)))
        (step,) = gradients(t)
    batch, (D, _) = seen["batch"], seen["D"]
    scored, expert = (
        t.policy.token_logps(batch.prompts, batch.completions),
        t.policy.token_logps(batch.prompts, [[y] for y in batch.experts]),
    )
    J = scored.logps.sum(-1) / scored.mask.sum(-1)  # (B, G)

    def normalised(x):
        return (x - x.mean(1, keepdim=True)) / (x.std(1, correction=0, keepdim=True) + 1e-6)

    grpo, adversarial = (-(normalised(x) * J).mean() for x in (batch.rewards, D))
    sft = -expert.logps.sum() / expert.mask.sum()
    uniapl.uniapl_loss(grpo, sft, adversarial, 0.3, 0.7).backward()
    policy = t.policy.trainable()
    assert_same([step], [{n: p.grad for n, p in policy.items()}])


@pytest.mark.parametrize(
    "flags",
    (
        ["unified"],
        ["unified", "--phi", "--aggregate", "token"],
        ["a-sft"],
        ["shaping"],
        ["ptx"],
        ["luffy"],
        ["luffy", "--aggregate", "token"],
        ["hpt", "--hpt-threshold", 0.9],
        ["unified", "--discriminator", "cotrained", "--discriminator-warmup", 0],
    ),
)
def test_gradient_does_not_depend_on_the_micro_batch(flags):
    """Nor on whether the parts are measured apart. Denominators are the step's: means of means favour tokens
    in short company.
    """
    runs = []
    for tokens, every in ((1, 1), (10**6, 3)):
        embedding = [] if "--discriminator" in flags else ["--discriminator", "embedding"]
        t = trainer(
            *flags, *embedding, "--lambda-adv", 0.5, "--micro-batch-tokens", tokens, "--parts-every", every
        )
        randomise(t)
        t.step = 1
        runs.append(gradients(t))
    assert_same(*runs)


def test_the_parts_norms_and_cosines():
    t = trainer(
        "unified", "--mu", 0.3, "--lambda-adv", 0.7, "--parts-every", 1, "--discriminator", "embedding"
    )
    randomise(t)
    t.config.max_grad_norm, t.optimizer.step = 1e6, lambda: None
    m = one_step(t)
    norms = {a: m[f"gradient/{a}"] for a in ("imitation", "preference", "adversarial")}
    cosines = {
        ("imitation", "preference"): m["cosine/imitation_preference"],
        ("adversarial", "imitation"): m["cosine/adversarial_imitation"],
        ("adversarial", "preference"): m["cosine/adversarial_preference"],
    }
    assert all(norms.values()) and all(abs(c) <= 1 for c in cosines.values())
    square = sum(x * x for x in norms.values()) + sum(
        2 * norms[a] * norms[b] * c for (a, b), c in cosines.items()
    )
    assert m["grad_norm"] == pytest.approx(math.sqrt(square), rel=1e-3)  # the parts sum to the gradient
    t.step = 2
    t.config.parts_every = 5
    assert not any(name.startswith(("gradient/", "cosine/")) for name in one_step(t))


@pytest.mark.parametrize("discriminator", ("polar", "cotrained"))
def test_policy_and_discriminator_share_no_gradient(discriminator):
    """A^D is a number to the policy, and the discriminator learns from its own loss alone, or not at all."""
    t = trainer("unified", "--discriminator", discriminator, "--discriminator-warmup", 0, "--mu", 0.5)
    randomise(t)
    own = {n for n in t.params if "discriminator" in n}
    assert "discriminator_head.weight" in own and own | set(t.policy.trainable()) == set(t.params)
    trained = {id(p) for group in t.optimizer.param_groups for p in group["params"]}
    assert {n for n, p in t.params.items() if id(p) in trained} == set(t.params) - (
        own if discriminator == "polar" else set()
    )
    seen = {}
    t.optimizer.step = lambda: seen.update({n: p.grad for n, p in t.params.items()})
    one_step(t)
    if discriminator == "polar":
        assert all(seen[n] is None for n in own)
        return
    together = seen.copy()
    t = trainer(
        "unified", "--discriminator", discriminator, "--discriminator-warmup", 4 - 1, "--mu", 0.5
    )  # the same samples, the policy at rest
    randomise(t)
    t.optimizer.step = lambda: seen.update({n: p.grad for n, p in t.params.items()})
    one_step(t)
    assert all(torch.equal(seen[n], together[n]) for n in own) and all(
        seen[n] is None for n in t.policy.trainable()
    )


def test_cotrained_warms_up_before_the_policy_moves():
    t = trainer(
        "a-sft-a-grpo",
        "--discriminator",
        "cotrained",
        "--discriminator-warmup",
        1,
        "--switch-step",
        2,
        "--discriminator-lr",
        0.01,
    )
    states = [parameters(t)]
    lines = []
    for _ in range(4):
        lines.append(one_step(t))
        states.append(parameters(t))
    moved = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in zip(states, states[1:])]
    assert moved == [False, True, True, True] and [line["stage"] for line in lines] == [0, 1, 2, 2]
    assert (
        lines[0]["discriminator/loss"] == pytest.approx(math.log(2))
        and lines[3]["discriminator/loss"] < lines[0]["discriminator/loss"]
    )
    t = trainer(
        "sft-a-grpo", "--discriminator", "cotrained", "--discriminator-warmup", 1
    )  # SFT needs no discriminator
    assert [one_step(t)["stage"] for _ in range(4)] == [1, 1, 0, 2]


def test_cotrained_learns_to_tell_the_expert():
    t = trainer(
        "unified",
        "--discriminator",
        "cotrained",
        "--discriminator-warmup",
        39,
        "--steps",
        40,
        "--discriminator-lr",
        0.01,
    )
    t.records = t.records[:3]
    lines = [one_step(t) for _ in range(25)]
    assert lines[0]["score/accuracy"] == 0.5 and sum(line["score/accuracy"] for line in lines[-5:]) / 5 > 0.8


def test_stage_2_begins_as_a_run_of_its_own():
    t = trainer("sft-grpo", "--switch-step", 0.5, "--switch-lr", 0.02, "--warmup-steps", 2)
    lines, ages = [], []
    for _ in range(4):
        lines.append(one_step(t))
        ages.append(max(int(state["step"]) for state in t.optimizer.state.values()))
    assert [line["stage"] for line in lines] == [1, 1, 2, 2] and ages == [1, 2, 1, 2]
    assert [line["lr"] for line in lines] == pytest.approx([5e-4 * 2, 2e-3, 0.01, 0.02])
    assert "reward/mean" not in lines[1] and "reward/mean" in lines[2] and "mu" in lines[2]


def test_staged_pipeline_is_the_two_methods_in_turn():
    """SFT's parameters at the switch are baselines.py's."""
    t, other = trainer("sft-grpo", "--switch-step", 2), trainer(None, "--lr", 2e-3, method=SFT)
    for _ in range(2):
        one_step(t), one_step(other)
    theirs = parameters(other)
    assert all(torch.equal(p, theirs[n]) for n, p in parameters(t).items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_step_moves_the_policy_and_logs_what_is_defined(variant):
    t = trainer(variant, "--discriminator", "embedding", "--switch-step", 1)
    before = {n: p.detach().clone() for n, p in t.policy.hf.named_parameters()}
    lines = [one_step(t), one_step(t)]
    moved = {n for n, p in t.policy.hf.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= {n.removeprefix("base_model.model.") for n in t.policy.trainable()}
    assert all(set(line) <= set(METRICS) | set(UNIAPL.metrics) for line in lines)
    assert {
        "entropy",
        "distinct/1",
        "distinct/2",
        "length/expert",
        "kl/k3",
        "logp/expert",
        "score/policy",
        "score/expert",
        "score/accuracy",
    } <= set(lines[1])


# ----------------------------------------------------------------------------------------------------------
# the script

FILES = {"config.json", "metrics.jsonl", "samples.jsonl", "checkpoint.safetensors", "adapter", "curves.png"}
FILES |= {"report.txt"}
EXTRA = [["--discriminator", "cotrained", "--discriminator-warmup", "1"], ["--variant", "chord", "--phi"]]


@pytest.mark.parametrize("flags", [["--variant", variant] for variant in VARIANTS] + EXTRA, ids=" ".join)
def test_every_variant_trains_and_saves(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["uniapl.py"])
    assert uniapl.command_line([*SMALL, *FEW, *flags, "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    trained = {"discriminator"} if settings["discriminator"] == "polar" else set()  # it stays with the run
    assert {p.name for p in (tmp_path / "run").iterdir()} == FILES | trained
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2] and "eval/reward" in lines[2]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["method"] == "uniapl"
    adapter = safetensors.torch.load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert not any("discriminator" in name for name in adapter) and any(
        p.any() for n, p in adapter.items() if "lora_B" in n
    )


def test_script_with_a_discriminator_of_its_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["uniapl.py"])
    make = ["discriminator", "--model", "tiny", "--out", str(tmp_path / "D")]
    assert uniapl.command_line([*make, "--pairs", "30", "--test-pairs", "20", "--epochs", "1"]) == 0
    said = capsys.readouterr().out
    assert "told the expert from the policy on held-out prompts" in said and "length alone" in said
    assert uniapl.command_line(make) == 2 and "exists already" in capsys.readouterr().err
    process = subprocess.run(
        [
            sys.executable,
            ROOT / "uniapl.py",
            *SMALL,
            "--steps",
            "1",
            "--discriminator",
            tmp_path / "D",
            "--out",
            tmp_path / "run",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert process.returncode == 0, process.stderr
    assert (
        "score/accuracy" in read_jsonl(tmp_path / "run" / "metrics.jsonl")[1]
        and "discriminator:" not in process.stdout
    )


@pytest.mark.parametrize(
    "stop, flags",
    (
        (
            1,
            [
                "--variant",
                "a-sft-a-grpo",
                "--discriminator",
                "cotrained",
                "--discriminator-warmup",
                "1",
                "--switch-step",
                "2",
            ],
        ),  # after the warm-up
        (
            2,
            [
                "--variant",
                "a-sft-a-grpo",
                "--discriminator",
                "cotrained",
                "--discriminator-warmup",
                "1",
                "--switch-step",
                "2",
            ],
        ),  # at the switch
        (3, ["--variant", "sft-a-grpo"]),
    ),
    ids=("cotrained", "switch", "polar"),
)
def test_resumed_is_the_run_that_never_stopped(flags, stop, tmp_path, monkeypatch):
    """Over the warm-up and the switch; a polar discriminator comes from the checkpoint and is not trained
    again.
    """
    flags = [*SMALL, *FEW, *flags]
    assert train.main(UNIAPL, [*flags, "--out", str(tmp_path / "whole")]) == 0

    def stopping(trainer, records):
        if trainer.step == stop - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return UNIAPL.update(trainer, records)

    assert (
        train.main(dataclasses.replace(UNIAPL, update=stopping), [*flags, "--out", str(tmp_path / "stopped")])
        == 130
    )
    monkeypatch.setattr(uniapl.discriminator, "fit_scorer", None)
    assert train.main(UNIAPL, ["--resume", "--out", str(tmp_path / "stopped")]) == 0
    a, b = (
        safetensors.torch.load_file(tmp_path / run / "checkpoint.safetensors") for run in ("whole", "stopped")
    )
    assert (
        a.keys() == b.keys()
        and "param/discriminator_head.weight" in a
        and all(torch.equal(a[k], b[k]) for k in a)
    )
    assert ("exp_avg/discriminator_head.weight" in a) == ("cotrained" in flags)
    logs = [read_jsonl(tmp_path / run / "metrics.jsonl") for run in ("whole", "stopped")]
    assert (
        len(
            {
                str([{k: v for k, v in line.items() if not k.startswith(CLOCK)} for line in log])
                for log in logs
            }
        )
        == 1
    )


# ----------------------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--variant", "sft-grpo", "--switch-step", "4"], "--switch-step 4"),
        (["--variant", "sft-grpo", "--switch-step", "1.5"], "--switch-step 1.5"),
        (["--variant", "sft-grpo", "--switch-step", "0.05"], "--switch-step 0.05"),
        (["--variant", "sft-grpo", "--switch-step", "0"], "--switch-step"),
        (["--variant", "grpo"], "--variant"),
        (["--mu", "1.1"], "--mu"),
        (["--variant", "a-grpo", "--mu", "0.1"], "--mu is for"),
        (["--variant", "ptx", "--phi"], "--phi is for"),
        (["--lambda-adv", "-1"], "--lambda-adv"),
        (["--discriminator", "nowhere"], "--discriminator nowhere"),
        (["--discriminator", "data/tiny"], "made by python uniapl.py discriminator"),
        (["--discriminator", "cotrained", "--discriminator-warmup", "4"], "--discriminator-warmup 4"),
        (["--max-new-tokens", "220"], "context"),
    ],
)
def test_bad_settings(flags, said, tmp_path, capsys):
    assert uniapl.command_line([*SMALL, *FEW, *flags, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error and not (tmp_path / "run").exists()


def test_data_without_what_is_needed(tmp_path, capsys):
    file, out = tmp_path / "data.jsonl", ["--out", str(tmp_path / "run")]
    records = [{k: r[k] for k in ("prompt", "chosen", "constraints")} for r in tiny_tasks("train", 40)]
    for change, said in (
        ({}, "no record has a second expert answer"),
        ({"experts": "cat"}, "'experts' must be a list"),
        ({"chosen": ""}, "chosen is empty"),
    ):
        file.write_text("".join(json.dumps(r | change) + "\n" for r in records))
        assert uniapl.command_line([*SMALL, *FEW, "--data", str(file), *out]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and said in error
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    for discriminator in ("embedding", "cotrained"):  # which need no second answer
        assert (
            uniapl.command_line(
                [
                    *SMALL,
                    "--discriminator",
                    discriminator,
                    "--discriminator-warmup",
                    "1",
                    "--data",
                    str(file),
                    "--overwrite",
                    *out,
                ]
            )
            == 0
        )


def test_discriminator_command_needs_a_place_to_write(capsys):
    assert uniapl.command_line(["discriminator", "--model", "tiny"]) == 2
    assert "--out DIR is needed" in capsys.readouterr().err
    with pytest.raises(UserError, match="--pairs 3"):
        check_settings(uniapl.discriminator.DiscriminatorConfig(pairs=3))
