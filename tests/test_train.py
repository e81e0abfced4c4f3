"""The loop as its users meet it: the script, its folder, resume, Ctrl-C, and what a user can get wrong."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import minigrao
import train
from data import UserError
from engine.command_line import parse
from engine.measures import summary
from engine.metrics import METRICS
from engine.record import RunFolder, read_jsonl
from engine.report import report
from engine.settings import check_settings
from minigrao import GRAO

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
    "8",
    "--eval-every",
    "2",
]
CLOCK = ("time/", "tokens/per_second", "memory/")  # metrics that differ from run to run


def grao(*flags, **kwargs):
    return train.main(GRAO, [str(f) for f in flags], **kwargs)


def script(*flags, **kwargs):
    return subprocess.run(
        [sys.executable, ROOT / "minigrao.py", *map(str, flags)],
        capture_output=True,
        text=True,
        cwd=kwargs.pop("cwd", ROOT),
        **kwargs,
    )


def given(*flags):
    return parse(GRAO.config, [str(f) for f in flags], "")


def trainer(*flags, reward_fn=None):
    return train.Trainer(GRAO, check_settings(GRAO.config(**given(*SMALL, *flags))), reward_fn)


def timeless(lines):
    return [{k: v for k, v in line.items() if not k.startswith(CLOCK)} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run of the real script."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, script(*SMALL, "--out", out)


def test_script_trains_shows_and_saves(finished):
    out, process = finished
    assert process.returncode == 0, process.stderr
    for words in (
        "mean reward [95 % interval]",
        "careful: 8 held-out prompts are fewer than 30",
        "no-skill floor",
        "RAS win / tie / loss",
        "NAG",
        "To try next",
        "expert     ",
        "before  ",
        "after  ",
        str(out),
    ):
        assert words in process.stdout
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "samples.jsonl",
        "checkpoint.safetensors",
        "adapter",
        "curves.png",
        "report.txt",
    }
    lines = read_jsonl(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert set().union(*lines) <= set(METRICS) | set(GRAO.metrics)  # nothing is logged that is not defined
    assert lines[1]["kl/k1"] == lines[1]["kl/k3"] == 0  # before the first step the policy is the reference
    assert process.stdout.count("Held-out reward ") == 1
    config = json.loads((out / "config.json").read_text())
    assert (
        config["settings"]["steps"] == 4
        and config["settings"]["seed"] == 0
        and "torch" in config["environment"]["versions"]
    )
    samples = read_jsonl(out / "samples.jsonl")
    assert [s["step"] for s in samples] == [0] * 8 + [4] * 8 and {
        "prompt",
        "expert",
        "completion",
        "reward",
    } <= set(samples[0])
    # eight prompts have no interval, in no file; and both evaluations stand beside the same constant answers
    assert not {"eval/low", "eval/high"} & set().union(*lines)
    assert [s["floor"] for s in samples[:8]] == [s["floor"] for s in samples[8:]]
    assert all(s["floor_reward"] in (0, 1) for s in samples)


def test_another_reward_has_no_floor_that_would_be_guessed():
    t = trainer(reward_fn=lambda prompts, completions, **columns: [0.5] * len(prompts))
    assert train.with_floor(t, [{"reward": 0.5}] * len(t.held_out)) == [{"reward": 0.5}] * len(t.held_out)


def test_resume_is_the_run_that_never_stopped(finished, tmp_path, capsys):
    """A resume that repeats its last batch, or forgets AdamW's moments, ends elsewhere."""
    whole, _ = finished
    out = tmp_path / "stopped"

    def stop_in_step_3(trainer, records, update=minigrao.update):
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return update(trainer, records)

    assert train.main(dataclasses.replace(GRAO, update=stop_in_step_3), [*SMALL, "--out", str(out)]) == 130
    assert "--resume" in capsys.readouterr().err and read_jsonl(out / "metrics.jsonl")[-1]["step"] == 3
    assert grao("--resume", "--out", out) == 0
    assert timeless(read_jsonl(out / "metrics.jsonl")) == timeless(read_jsonl(whole / "metrics.jsonl"))
    assert read_jsonl(out / "samples.jsonl") == read_jsonl(whole / "samples.jsonl")
    a, b = (safetensors.torch.load_file(run / "checkpoint.safetensors") for run in (whole, out))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_same_seed_same_run_other_seed_other_run(tmp_path):
    runs = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert grao(*SMALL[:2], "--steps", 1, *SMALL[4:], "--seed", seed, "--out", tmp_path / name) == 0
        runs.append(timeless(read_jsonl(tmp_path / name / "metrics.jsonl")))
    assert runs[0] == runs[1] != runs[2]


def test_gradient_does_not_depend_on_the_micro_batch():
    gradients = []
    for tokens in (1, 10**6):
        t = trainer("--micro-batch-tokens", tokens, "--max-grad-norm", 1000)
        seen = {}
        t.optimizer.step = lambda t=t, seen=seen: seen.update(
            {n: p.grad.clone() for n, p in t.params.items()}
        )
        GRAO.update(t, t.next_records())
        gradients.append(seen)
    largest = max(float(g.abs().max()) for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5 * largest)
    assert largest > 0


def test_one_step_moves_lora_b_and_nothing_else():
    t = trainer()
    before = {n: p.detach().clone() for n, p in t.policy.hf.named_parameters()}
    GRAO.update(t, t.next_records())
    moved = {n for n, p in t.policy.hf.named_parameters() if not torch.equal(p, before[n])}
    assert any("lora_B" in n for n in moved) and all("lora_" in n for n in moved)


def test_all_rewards_equal_give_no_gradient_and_no_nan():
    """An answer cut at the limit earns 0. When all are cut, and the expert fails too, nothing must move, NaN
    least of all.
    """
    t = trainer(reward_fn=lambda prompts, completions, **columns: [0.0] * len(prompts))
    before = {n: p.detach().clone() for n, p in t.params.items() if "lora_B" in n}
    metrics = GRAO.update(t, t.next_records())
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and metrics["groups/no_signal"] == 1
    assert all(torch.equal(t.params[n], b) for n, b in before.items())


def test_every_pass_over_the_data_sees_each_prompt_once_in_a_new_order():
    t = trainer("--steps", 8)
    n = len(t.records)
    order = t.order(2 * n)
    assert sorted(order[:n]) == sorted(order[n:]) == list(range(n)) and order[:n] != order[n:]


def test_records_left_out_for_their_length_are_replaced(tmp_path):
    lines = [
        {"prompt": f"list {n} animals" + " , in upper case" * (i % 2), "chosen": "cat " * (i + 1)}
        for i, n in enumerate((2, 3, 4, 5) * 5)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    t = trainer(
        "--data",
        tmp_path / "data.jsonl",
        "--max-expert-tokens",
        10,
        "--steps",
        2,
        reward_fn=lambda prompts, **columns: [0.0] * len(prompts),
    )
    assert len(t.records) == 6 and all(len(r["expert_ids"]) <= 10 for r in t.records + t.held_out)


@pytest.mark.parametrize(
    "kind, values", [("constant", [0.5, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.5]), ("cosine", [0.5, 1, 1, 0.5])]
)
def test_learning_rate_schedule(kind, values):
    assert [train.schedule(kind, step, 2, 4) for step in range(4)] == pytest.approx(values)


def test_report_by_hand():
    one = {"prompt": "p", "expert": "r", "completion": "c", "tokens": 2, "truncated": False}
    before = [one | {"reward": r, "expert_reward": 1.0} for r in (0.0, 0.0, 1.0, 0.0)]
    one["completion"] = "d"  # the same text would be a tie, whatever it earned
    after = [one | {"reward": r, "expert_reward": 1.0} for r in (1.0, 2.0, 0.0, 0.0)]
    assert summary(after)["reward"] == 0.75 and summary(after)["ras"] == {
        "win": 0.25,
        "tie": 0.25,
        "loss": 0.5,
    }
    text = report(before, after)
    assert "0.250 / 0.250 / 0.500" in text and "+0.250 (0.500)" in text


# ----------------------------------------------------------------------------------------------------------
# Bad input: one line on stderr that names the thing, status 2, nothing written


def bad_reward(kind):
    def reward(prompts, completions, **columns):
        if kind == "raises":
            raise RuntimeError("no such table")
        return {"nan": [float("nan")] * len(prompts), "count": [1.0], "nested": [[1.0]] * len(prompts)}[kind]

    return reward


@pytest.mark.parametrize("kind", ["raises", "nan", "count", "nested"])
def test_bad_reward_function(kind, tmp_path, capsys):
    assert grao(*SMALL, "--out", tmp_path / "run", reward_fn=bad_reward(kind)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "reward function" in error and not (tmp_path / "run").exists()


RECORD = {"prompt": "list 3 animals", "chosen": "cat dog fox"}


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--model", "nowhere"], "nowhere"),
        (["--model", "{tmp}"], "config.json"),
        (["--data", "{tmp}/none.jsonl"], "none.jsonl"),
        (["--data", "{tmp}/empty.jsonl"], "empty.jsonl"),
        (["--data", "{tmp}/broken.jsonl"], "2"),
        (["--data", "{tmp}/plain.jsonl"], "constraints"),
        (["--data", "{tmp}/long.jsonl"], "--max-prompt-tokens"),
        (["--data", "{tmp}/foreign.jsonl"], "unknown"),
        (["--data", "{tmp}/single.jsonl"], "two different prompts"),
        (["--from-adapter", "{tmp}"], "adapter_config.json"),
        (["--reward", "{tmp}/none.py:f"], "none.py"),
        (["--reward", "something"], "something"),
        (["--group-size", "1"], "--group-size"),
        (["--steps", "0"], "--steps"),
        (["--steps", "many"], "--steps"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--temperature", "0"], "--temperature"),
        (["--beta", "-0.5"], "--beta"),
        (["--max-new-tokens", "1000000000"], "--max-new-tokens"),
        (["--max-new-tokens", "4096"], "--max-new-tokens 4096 that passes"),
        (["--group", "everyone"], "--group"),
        (["--without", "sleep"], "--without"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--resume", "--out", "{tmp}/never"], "never"),
        (["--resume"], "--out"),
        (["--out", "{tmp}"], "exists"),
        (["--out", "{tmp}", "--overwrite"], "not a run folder"),
        (["--out", "."], "working directory"),
        (["--out", "..", "--overwrite"], "working directory"),
        (["--out", "{tmp}/plain.jsonl/run"], "cannot be used"),
        (["--out", "x" * 300], "cannot be used"),
    ],
)
def test_bad_input(flags, named, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text(json.dumps(RECORD) + "\n{not json\n")
    (tmp_path / "plain.jsonl").write_text(
        "".join(json.dumps(RECORD | {"prompt": f"list {n} animals"}) + "\n" for n in (2, 3, 4))
    )
    items = [{"type": "items", "n": 3, "allowed": ["cat", "dog", "fox"], "ignore": []}]
    for name, prompt in (
        ("long", "list 3 animals " * 400),
        ("foreign", "please enumerate thirteen vertebrates"),
    ):
        lines = [
            json.dumps(RECORD | {"prompt": prompt + f" {n}", "constraints": items}) + "\n" for n in (2, 3, 4)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "single.jsonl").write_text(json.dumps(RECORD | {"constraints": items}) + "\n")
    before = sorted(tmp_path.rglob("*"))
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    run = [] if "--out" in flags or "--resume" in flags else ["--out", str(tmp_path / "run")]
    assert grao(*SMALL, *flags, *run) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and error.count("\n") == 0 and named in error
    assert sorted(tmp_path.rglob("*")) == before


def test_resume_with_changed_settings_and_after_the_end(finished, capsys):
    out, _ = finished
    before = (out / "checkpoint.safetensors").read_bytes()
    cases = (["--lr", "0.5"], "lr"), (["--beta", "1"], "beta"), ([], "finished"), (["--overwrite"], "one of")
    for flags, named in cases:
        assert grao("--resume", "--out", out, *flags) == 2
        assert named in capsys.readouterr().err
    assert (out / "checkpoint.safetensors").read_bytes() == before


def test_damaged_checkpoint(finished, tmp_path, capsys):
    out, _ = finished
    broken = tmp_path / "run"
    broken.mkdir()
    (broken / "config.json").write_text((out / "config.json").read_text())
    (broken / "checkpoint.safetensors").write_bytes(b"not a checkpoint")
    assert grao("--resume", "--out", broken) == 2
    assert "damaged" in capsys.readouterr().err


def test_full_disk(tmp_path):
    """A file-size limit of 100 kB stands for the full disk: the checkpoint does not fit, and no part of the
    run stays behind.
    """
    limit = lambda: (
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    process = script(*SMALL, "--out", tmp_path / "run", preexec_fn=limit)
    assert (
        process.returncode == 2 and process.stderr.count("\n") == 1 and process.stderr.startswith("error: ")
    )
    assert not list(tmp_path.iterdir())


def test_log_line_that_does_not_fit_leaves_no_half(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.log({"step": 1})

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, text):
            self.file.write(text[:5])
            self.file.flush()
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        "builtins.open", lambda path, mode, real=open, **options: Full(real(path, mode, **options))
    )
    with pytest.raises(UserError, match="metrics.jsonl.*No space left"):
        folder.log({"step": 2})
    monkeypatch.undo()
    assert read_jsonl(folder.metrics) == [{"step": 1}]


def test_from_adapter_starts_where_the_other_run_ended(finished):
    out, _ = finished
    t = trainer("--from-adapter", out / "adapter")
    prompts, answers = [t.records[0]["prompt_ids"]], [[t.records[0]["expert_ids"]]]
    with torch.no_grad():
        policy, reference = (
            t.policy.token_logps(prompts, answers, role=role).logps for role in ("policy", "reference")
        )
        fresh = trainer().policy.token_logps(prompts, answers).logps
    assert torch.equal(policy, reference) and not torch.allclose(policy, fresh)
