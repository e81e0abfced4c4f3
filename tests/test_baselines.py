"""SFT, DPO, GRPO and PPO as a user meets them: the updates on the tiny model, the real script, and what can
go wrong.

The losses themselves are compared with other people's in test_baselines_losses.py.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import reload

import baselines
import ppo
import train
from baselines import DPO, GRPO, METHODS, PPO, SFT
from data import UserError, tiny_tasks
from engine.command_line import parse
from engine.metrics import METRICS
from engine.record import read_jsonl
from engine.records import encode_records
from engine.settings import check_settings

ROOT = Path(__file__).parents[1]
SMALL = [
    "--model",
    "tiny",
    "--steps",
    "3",
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
TEST = {"ppo": ["--ppo-epochs", "2", "--minibatches", "2"]}
CLOCK = ("time/", "tokens/per_second", "memory/")  # metrics that differ from run to run


def trainer(method, *flags, reward_fn=None):
    given = parse(method.config, [*SMALL, *TEST.get(method.name, []), *map(str, flags)], "")
    return train.Trainer(method, check_settings(method.config(**given)), reward_fn)


def letters(prompts, completions, **columns):
    """A reward that differs between almost any two samples, so that every group has a signal."""
    return [sum(map(ord, text)) % 17 / 17 for text in completions]


def one_step(t):
    metrics = t.method.update(t, t.next_records())
    t.step += 1
    return metrics


def randomise(t, seed=0):
    """LoRA's B and the value head start at 0, where what lies before them has no gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in t.params.items():
            if "lora_A" not in name:
                p += 0.1 * torch.randn(p.shape, generator=generator)


def gradients(t):
    """The gradient of each update of the next step; nothing is updated."""
    seen = []
    t.config.max_grad_norm = 1e6
    t.optimizer.step = lambda: seen.append({n: p.grad.clone() for n, p in t.params.items()})
    one_step(t)
    return seen


def assert_same(a, b, rtol=1e-3):
    assert len(a) == len(b) and a[0].keys() == b[0].keys()
    for x, y in zip(a, b):
        for name in x:
            torch.testing.assert_close(
                x[name],
                y[name],
                rtol=rtol,
                atol=rtol * float(x[name].abs().max()),
                msg=lambda m, name=name: f"{name}: {m}",
            )
            assert x[name].abs().max() > 0, name


# ----------------------------------------------------------------------------------------------------- what
# all share


@pytest.mark.parametrize(
    "method, flags",
    [
        (SFT, []),
        (SFT, ["--per-response"]),
        (DPO, ["--label-smoothing", 0.1]),
        (PPO, []),
        (GRPO, ["--kl-coef", 0.1, "--updates-per-rollout", 2]),
        (GRPO, ["--aggregate", "token"]),
        (GRPO, ["--aggregate", "constant", "--kl-coef", 0.1, "--kl", "k3"]),
    ],
)
def test_gradient_does_not_depend_on_the_micro_batch(method, flags):
    """Means of micro-batch means weight a token by the company it is in; denominators are of the whole update
    instead.
    """
    runs = []
    for tokens in (1, 10**6):
        t = trainer(method, "--micro-batch-tokens", tokens, *flags, reward_fn=letters)
        randomise(t)
        runs.append(gradients(t))
    assert_same(*runs)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_one_step_moves_the_adapters_and_nothing_else(method):
    t = trainer(method, reward_fn=letters)
    before = {n: p.detach().clone() for n, p in t.policy.hf.named_parameters()}
    metrics = one_step(t)
    moved = {n for n, p in t.policy.hf.named_parameters() if not torch.equal(p, before[n])}
    assert all("lora_" in n for n in moved) and metrics["grad_norm"] > 0
    for adapter in ("default", "value") if method is PPO else ("default",):
        assert all(p.abs().max() > 0 for n, p in t.policy.trainable(adapter).items() if "lora_B" in n)
    assert set(metrics) <= set(METRICS) | set(method.metrics)  # nothing is logged that is not defined


@pytest.mark.parametrize("method", (DPO, GRPO, PPO))
@pytest.mark.parametrize("reference", ("none", "adapter", "base"))
def test_the_reference_is_the_policy_at_the_first_step_or_the_base(method, reference, tmp_path):
    """From a saved adapter, "adapter off" is another model than the one training starts from: its KL would
    not begin at 0.
    """
    flags = []
    if reference != "none":
        start = trainer(SFT)
        randomise(start)
        start.policy.save(tmp_path / "adapter")
        flags = ["--from-adapter", tmp_path / "adapter", "--reference", reference]
    metrics = one_step(trainer(method, *flags, reward_fn=letters))
    distance = [metrics["dpo/margin"]] if method is DPO else [metrics["kl/k1"], metrics["kl/k3"]]
    assert all((d == 0) == (reference != "base") for d in distance)


# ----------------------------------------------------------------------------------------------------------
# SFT


@pytest.mark.parametrize("per_response", (False, True))
def test_sft_gradient_is_that_of_transformers(per_response, tmp_path):
    """transformers' own loss from labels: its batch mean is over all target tokens; of one row it is the
    row's mean.
    """
    t = trainer(SFT, "--quantize", "none", *(["--per-response"] if per_response else []))
    randomise(t)
    t.policy.save(tmp_path / "adapter")
    oracle = reload(t.policy.source, tmp_path / "adapter")
    records = t.next_records()
    rows = [r["prompt_ids"] + r["expert_ids"] for r in records]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    labels = torch.tensor(
        [
            [-100] * len(r["prompt_ids"]) + r["expert_ids"] + [-100] * (width - len(row))
            for r, row in zip(records, rows)
        ]
    )
    seen = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    for part in [slice(i, i + 1) for i in range(len(rows))] if per_response else [slice(None)]:
        loss = oracle(input_ids=ids[part], attention_mask=seen[part], labels=labels[part]).loss
        (loss / (len(rows) if per_response else 1)).backward()
    assert_same(gradients(t), [{n: p.grad for n, p in oracle.named_parameters() if n in t.params}])


# ----------------------------------------------------------------------------------------------------------
# DPO


def test_dpo_scores_the_reference_once_for_each_record():
    """Kept over passes over the data, and in the checkpoint: scored again in another batch they would round
    otherwise.
    """
    t = trainer(DPO, "--beta", 0.5)
    t.records = t.records[:4]
    score, scored = t.policy.token_logps, []

    def count(prompts, completions, *args, role="policy"):
        scored.extend(prompts if role == "reference" else [])
        return score(prompts, completions, *args, role=role)

    t.policy.token_logps = count
    first = one_step(t)
    assert (
        first["dpo/margin"] == 0
        and first["dpo/accuracy"] == 0.5
        and first["loss"] == pytest.approx(0.6931, abs=1e-4)
    )
    kept = t.kept["reference_logps"].clone()
    seen = ~kept.isnan()
    assert seen.any() and not seen.all()
    for _ in range(3):  # 12 pairs in all, three passes
        last = one_step(t)
    assert sorted(scored) == sorted(r["prompt_ids"] for r in t.records)
    assert torch.equal(t.kept["reference_logps"][seen], kept[seen])
    assert last["dpo/margin"] > 0 and last["dpo/accuracy"] > 0.5
    again = trainer(DPO)
    again.load_state(t.state(), {"step": t.step, "tokens_generated": 0})
    assert torch.equal(again.kept["reference_logps"][:4], t.kept["reference_logps"][:4])
    with torch.no_grad():
        for r in t.records:
            fresh = again.policy.token_logps(
                [r["prompt_ids"]], [[r["expert_ids"], r["rejected_ids"]]], role="reference"
            ).logps.sum(-1)[0]
            torch.testing.assert_close(
                fresh, t.kept["reference_logps"][r["record_index"]], rtol=1e-5, atol=1e-5
            )


def test_dpo_answers_have_one_eos():
    """A chat template that ends the answer too would give two, the second at log-prob -20, in every pair."""
    t = trainer(DPO)
    for r in t.records:
        for ids in (r["expert_ids"], r["rejected_ids"]):
            assert [i for i, token in enumerate(ids) if token in t.policy.eos_ids] == [len(ids) - 1]


# ----------------------------------------------------------------------------------------------------------
# GRPO


def test_grpo_loss_is_zero_while_it_learns(capsys):
    """Users take a loss of 0 for a bug. On-policy it is 0 by construction, and its gradient is not; the first
    step says so.
    """
    t = trainer(GRPO, reward_fn=letters)
    for first in (True, False):
        metrics = one_step(t)
        assert metrics["ratio/max"] == 1 and abs(metrics["loss"]) < 1e-6 and metrics["grad_norm"] > 1e-3
        assert ("The loss will be 0" in capsys.readouterr().out) == first
    one_step(trainer(GRPO, "--aggregate", "token", reward_fn=letters))
    assert "The loss will stay near 0" in capsys.readouterr().out
    one_step(trainer(GRPO, "--updates-per-rollout", 2, "--kl-coef", 0.1, "--kl", "k1", reward_fn=letters))
    said = capsys.readouterr().out
    assert "The loss" not in said and "k1 in the loss has an expected gradient of 0" in said


def test_grpo_takes_several_updates_on_one_rollout():
    t = trainer(GRPO, "--updates-per-rollout", 3, "--lr", 0.02, reward_fn=letters)
    generate, calls = t.policy.generate, []
    t.policy.generate = lambda *args: calls.append(1) or generate(*args)
    metrics = [one_step(t), one_step(t)]
    assert len(calls) == 2 and [m["updates"] for m in metrics] == [3, 6]
    assert metrics[0]["ratio/max"] > 1 and metrics[0]["kl/update"] > 0 and metrics[0]["kl/k3"] == 0
    assert next(iter(t.optimizer.state.values()))["step"] == 6


# ----------------------------------------------------------------------------------------------------------
# PPO


def test_values_are_those_of_a_plain_forward_pass_and_zero_elsewhere(tmp_path):
    """Read in the state before each token, EOS included, nothing after it; other completions of the pack
    change nothing.
    """
    t = trainer(PPO, "--quantize", "none")
    randomise(t)
    policy, prompts = t.policy, [[5, 6, 7], [8, 9]]
    completions = [[[10, 11, 12, 13], [14]], [[15, 16], [17, 18, 19]]]
    values, mask = policy.token_values(prompts, completions)
    policy.peft.save_pretrained(tmp_path, selected_adapters=["value"])
    oracle = reload(policy.source, tmp_path / "value")
    for b, prompt in enumerate(prompts):
        for g, answer in enumerate(completions[b]):
            states = (
                oracle.get_base_model()
                .model(torch.tensor([prompt + answer]))
                .last_hidden_state[0, len(prompt) - 1 : -1]
            )
            torch.testing.assert_close(
                values[b, g, : len(answer)], policy.heads["value"](states)[:, 0], rtol=1e-4, atol=1e-4
            )
            assert mask[b, g].sum() == len(answer) and (values[b, g, len(answer) :] == 0).all()


def test_value_and_policy_share_no_gradient():
    t = trainer(PPO)
    randomise(t)
    sides = {
        "value": {n for n in t.params if "value" in n},
        "policy": {n for n in t.params if "value" not in n},
    }
    assert {"value_head.weight", "value_head.bias"} < sides["value"] and sides["policy"] == set(
        t.policy.trainable()
    )
    prompts, answers = [[5, 6, 7]], [[[10, 11, 12]]]
    for side, output in (
        ("value", lambda: t.policy.token_values(prompts, answers)[0]),
        ("policy", lambda: t.policy.token_logps(prompts, answers).logps),
    ):
        output().sum().backward()
        assert {n for n, p in t.params.items() if p.grad is not None} == sides[side]
        t.optimizer.zero_grad(set_to_none=True)


def test_ppo_puts_the_score_on_the_last_token_and_the_kl_on_each(monkeypatch):
    seen = {}

    def spy(rewards, values, mask, *args):  # (B, G, T); here in rows (N, T)
        seen.update(rewards=rewards.flatten(0, 1), values=values.flatten(0, 1), mask=mask.flatten(0, 1))
        return gae(rewards, values, mask, *args)

    gae = ppo.gae
    monkeypatch.setattr(ppo, "gae", spy)
    t = trainer(PPO, "--reference", "base", "--kl-coef", 0.5, reward_fn=letters)
    randomise(t)  # so that the policy is not the reference and values are not 0
    rollout = t.rollout
    t.rollout = lambda records: seen.setdefault("batch", rollout(records))
    one_step(t)
    mask, batch = seen["mask"], seen["batch"]
    assert (
        (seen["rewards"][~mask] == 0).all()
        and (seen["values"][~mask] == 0).all()
        and (seen["values"][mask] != 0).all()
    )
    untrained = trainer(
        PPO, reward_fn=letters
    )  # as the reference; the sampler's log-probs stand for the policy's
    i = 0
    for b, group in enumerate(batch.completions):
        with torch.no_grad():
            reference = untrained.policy.token_logps([batch.prompts[b]], [group]).logps[0]
        for g, ids in enumerate(group):
            expected = -0.5 * (torch.tensor(batch.sampled_logps[b][g]) - reference[g, : len(ids)])
            expected[-1] += batch.rewards[b, g]
            torch.testing.assert_close(seen["rewards"][i, : len(ids)], expected, rtol=1e-3, atol=1e-3)
            i += 1


@pytest.mark.parametrize("tokens", (1, 10**6))
def test_ppo_ratio_is_exactly_one_before_an_update(tokens):
    """Old log-probs from a batch of another shape differ in the last bits, in bf16 in the third digit."""
    t = trainer(PPO, "--micro-batch-tokens", tokens, reward_fn=letters)
    randomise(t)
    t.optimizer.step = lambda: None
    metrics = one_step(t)
    assert (
        metrics["ratio/max"] == 1
        and metrics["kl/update"] == metrics["clip/low"] == metrics["clip/high"] == 0
        and metrics["updates"] == 4
    )


@pytest.mark.parametrize("prompts, count, sizes", ((4, 3, [2, 1, 1]), (5, 3, [2, 2, 1]), (6, 2, [3, 3])))
def test_ppo_makes_as_many_mini_batches_as_asked(prompts, count, sizes):
    """3 of 4 prompts silently became 2 (torch.chunk rounds the size up): fewer updates than the flag says."""
    t = trainer(PPO, "--prompts-per-step", prompts, "--minibatches", count, reward_fn=letters)
    batch = t.rollout(t.next_records())
    minibatches = t.minibatches(batch, count)
    assert [sum(len(part.prompts) for part in parts) for parts in minibatches] == sizes
    groups = [range(prompts)[part.groups] for parts in minibatches for part in parts]
    assert [i for group in groups for i in group] == list(range(prompts))
    assert one_step(t)["updates"] == t.config.ppo_epochs * count


def test_ppo_gradient_with_checkpointing():
    """The backward pass computes layers again, with whichever adapter is active then: the value's must be."""
    runs = []
    for flags in ([], ["--gradient-checkpointing", "on"]):
        t = trainer(PPO, *flags, reward_fn=letters)
        randomise(t)
        runs.append(gradients(t))
    assert_same(*runs)


def test_value_function_has_its_own_learning_rate_and_learns():
    t = trainer(
        PPO,
        "--lr",
        1e-3,
        "--value-lr",
        1e-2,
        "--ppo-epochs",
        4,
        reward_fn=lambda completions, **_: [0.7] * len(completions),
    )
    errors = [one_step(t)["value/loss"] for _ in range(3)]
    assert [group["lr"] for group in t.optimizer.param_groups] == [1e-3, 1e-2] and errors[2] < 0.5 * errors[0]


def test_ppo_resumed_is_the_run_that_never_stopped(tmp_path):
    """The value adapter, its head and AdamW's moments of both are in the checkpoint; the order of
    mini-batches follows from the step.
    """
    flags = [*SMALL, "--minibatches", "3", "--steps", "3"]
    assert train.main(PPO, [*flags, "--out", str(tmp_path / "whole")]) == 0

    def stop_in_step_2(trainer, records):
        if trainer.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return PPO.update(trainer, records)

    assert (
        train.main(
            dataclasses.replace(PPO, update=stop_in_step_2), [*flags, "--out", str(tmp_path / "stopped")]
        )
        == 130
    )
    assert train.main(PPO, ["--resume", "--out", str(tmp_path / "stopped")]) == 0
    a, b = (
        safetensors.torch.load_file(tmp_path / run / "checkpoint.safetensors") for run in ("whole", "stopped")
    )
    assert (
        a.keys() == b.keys() and "exp_avg/value_head.weight" in a and all(torch.equal(a[k], b[k]) for k in a)
    )
    logs = [
        [
            {k: v for k, v in line.items() if not k.startswith(CLOCK)}
            for line in read_jsonl(tmp_path / run / "metrics.jsonl")
        ]
        for run in ("whole", "stopped")
    ]
    assert logs[0] == logs[1]


# ----------------------------------------------------------------------------------------------------------
# the script


def script(*flags):
    return subprocess.run(
        [sys.executable, ROOT / "baselines.py", *map(str, flags)], capture_output=True, text=True, cwd=ROOT
    )


@pytest.mark.parametrize("name", METHODS)
def test_script_trains_and_saves(name, tmp_path):
    process = script(name, *SMALL, "--out", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "samples.jsonl",
        "checkpoint.safetensors",
        "adapter",
        "curves.png",
        "report.txt",
    }
    assert [line["step"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2, 3]
    assert (
        "mean reward [95 % interval]" in process.stdout
        and json.loads((tmp_path / "run" / "config.json").read_text())["method"] == name
    )
    assert len(
        safetensors.torch.load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    ) == len(trainer(SFT).params)  # no value adapter


def test_script_names_its_methods(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["baselines.py"])
    for flags in ([], ["ppl"], ["--steps", "3"]):
        assert baselines.command_line(flags) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "sft, dpo, ppo, grpo" in error
    assert baselines.command_line(["--help"]) == 0 and "sft|dpo|ppo|grpo" in capsys.readouterr().out
    assert baselines.command_line(["dpo", "--help"]) == 0
    said = capsys.readouterr().out
    assert "usage: baselines.py dpo" in said and "--label-smoothing" in said
    assert (
        f"[tiny: {DPO.config.presets['tiny']['lr']}, chat: " in said
    )  # a method's own default, not the loop's


def one_line_error(method, capsys, *flags, **kwargs):
    assert train.main(method, [*SMALL, *map(str, flags)], **kwargs) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_dpo_without_rejected_answers(tmp_path, capsys):
    records = [
        {k: r[k] for k in ("prompt", "chosen", "rejected", "constraints")} for r in tiny_tasks("train", 30)
    ]
    del records[0]["rejected"], records[20]["rejected"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    error = one_line_error(
        DPO, capsys, "--steps", 100, "--data", tmp_path / "data.jsonl", "--out", tmp_path / "run"
    )
    assert (
        "'rejected'" in error
        and (records[0]["prompt"] in error or records[20]["prompt"] in error)
        and not (tmp_path / "run").exists()
    )


def test_dpo_checks_the_length_of_rejected_answers():
    t = trainer(DPO)
    t.records[0]["rejected"] = "cat " * t.policy.context
    with pytest.raises(UserError, match="context"):
        encode_records(t.records, t.held_out, t.policy, t.config, DPO)


def test_ppo_with_rewards_for_tokens(tmp_path, capsys):
    error = one_line_error(
        PPO,
        capsys,
        "--out",
        tmp_path / "run",
        reward_fn=lambda completions, **_: [[0.5] * len(c.split()) for c in completions],
    )
    assert "return one number, not one per token" in error


def test_ppo_with_more_mini_batches_than_prompts(tmp_path, capsys):
    assert "--minibatches 4" in one_line_error(PPO, capsys, "--minibatches", 4, "--out", tmp_path / "run")


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_adapter_of_another_model(method, load, tmp_path, capsys):
    load("qwen3").save(tmp_path / "adapter")
    error = one_line_error(method, capsys, "--from-adapter", tmp_path / "adapter", "--out", tmp_path / "run")
    assert "does not fit tiny" in error


def test_resume_by_another_method(tmp_path, capsys):
    assert train.main(SFT, [*SMALL, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert train.main(PPO, ["--resume", "--out", str(tmp_path / "run")]) == 2
    assert "is a run of sft, not of ppo" in capsys.readouterr().err
