"""The benchmark runs, says beforehand how long, and what it measures about memory holds.

No tensor of tokens x vocabulary, a role's bytes, the arithmetic for a GPU.
"""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, random_ids, randomise_all

from engine.command_line import exit_status
from plots.bench import memory, plan
from plots.bench.__main__ import main, trl_python
from plots.bench.cases import make_case, same_loss
from plots.bench.limits import limits, precision
from plots.bench.models import random_model

TRL = os.environ.get("MINIGRAO_TRL_PYTHON")


def test_the_benchmark_runs_end_to_end(tmp_path):
    """Our side alone, every part that takes a step: a missing number would be a hole in the table."""
    out = tmp_path / "bench.json"
    flags = ["--quick", "--only", "grpo,dpo,products,memory", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "plots.bench", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"MINIGRAO_TRL_PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert "TRL is not measured" in done.stderr and result["left_out"] == {}, done.stderr
    assert "at most " in done.stdout.splitlines()[1]  # before anything is measured
    assert result["precision"] == precision()
    grpo, dpo = (row["sides"]["ours"] for row in result["cases"])
    phases = [grpo["seconds"][phase] for phase in ("rollout", "scoring", "update")]
    assert min(phases) > 0 and grpo["seconds"]["total"] == pytest.approx(sum(phases))
    assert grpo["tokens_per_second"] > 0 and dpo["peak_bytes"] > 2**27
    assert 0 < grpo["share_of_limit"]["total"] < 1
    assert len(result["products"]) == 4
    assert all(0 < row["seconds"] and 0 < row["share_of_limit"] for row in result["products"])
    assert [row["tokens"] for row in result["largest_tensors"]] == [16, 32]
    assert all(max(row["largest"].values()) > 0 for row in result["largest_tensors"])
    role = result["role_bytes"]
    assert role["role"] == role["adapter and head"] < 0.3 * role["model"]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--quick", "--trl-python", "/nowhere/python"], "--trl-python /nowhere/python"),
        (["--only", "grpo,foo"], "--only foo: no such part; there are loss, grpo"),
        (["--repeats", "0"], "--repeats 0"),
        (["--minutes", "-1"], "--minutes -1"),
        (["--no-such-flag"], "no-such-flag"),
        (["--quick", "--out", "{results}"], "exists already"),
        (["--quick", "--out", "{letter}", "--overwrite"], "leaves it alone"),
    ],
)
def test_bad_flags_are_one_line_before_anything_is_measured(capsys, tmp_path, flags, said):
    """`--only foo` measured nothing, with status 0; `--out` wrote over whatever was there."""
    files = {"results": tmp_path / "results.json", "letter": tmp_path / "letter.json"}
    files["results"].write_text('{"machine": {}, "cases": []}')
    files["letter"].write_text("dear reader")
    assert exit_status(lambda: main([flag.format(**files) for flag in flags])) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and len(err.splitlines()) == 1
    assert files["letter"].read_text() == "dear reader"


def step(title, seconds, work):
    return plan.Step("part", title, title, seconds, work)


def test_a_part_that_cannot_run_is_named_and_the_rest_goes_on(capsys):
    """One operation that a machine does not have ended the whole benchmark, an hour of numbers with it."""

    def fails():
        raise RuntimeError("bf16 path needs the cpu support")

    steps = [step("broken", 1, fails), step("whole", 1, lambda: {"seconds": 2.0})]
    result = plan.go_through(steps, 10, {})
    assert result == {"left_out": {"broken": "bf16 path needs the cpu support"}, "whole": {"seconds": 2.0}}
    assert "left out: broken: bf16 path" in capsys.readouterr().err


def test_the_estimate_is_kept(capsys):
    """What may not fit is not begun, and what takes longer than all that is left is stopped."""
    steps = [
        step("slow", 0.3, lambda: time.sleep(60)),
        step("too large", 30, lambda: 1),
        step("small", 0.0, lambda: 2),
    ]
    began = time.monotonic()
    result = plan.go_through(steps, 0.5, {})
    assert time.monotonic() - began < 20 and result["small"] == 2
    assert "not done" in result["left_out"]["slow"] and "may take 30 s" in result["left_out"]["too large"]
    assert plan.announce(steps, None) == pytest.approx(30.3) and plan.announce(steps, 0.1) == 6.0
    assert "cut to 0.1 by --minutes" in capsys.readouterr().out


def test_precision_is_what_the_machine_multiplies(monkeypatch):
    """On a CPU without AVX512-BF16 both sides compute in fp32: bf16 crashed there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for native, dtype in ((False, "float32"), (True, "bfloat16")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        assert precision() == dtype
        assert make_case("sft", str(ROOT / "data" / "tiny"), 1, 0, 4)["dtype"] == dtype


@pytest.mark.skipif(not TRL, reason="MINIGRAO_TRL_PYTHON names no python of an environment with trl 1.16")
def test_trl_has_the_same_loss_and_gradient_on_the_same_samples(tmp_path):
    """TRL's default KL is ratio * k3; plain k3 is the same number with another gradient."""
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": f"name {i} drinks", "chosen": "tea"}) + "\n" for i in range(9)]
    data.write_text("".join(lines))
    sides = {"ours": (sys.executable, "bench.ours"), "TRL": (trl_python(TRL), "bench.with_trl")}
    row = same_loss(str(ROOT / "data" / "tiny"), str(data), sides)
    assert row["loss"]["ours"] == pytest.approx(row["loss"]["TRL"], rel=1e-5)
    assert row["gradient_difference"] < 1e-4 and row["kl"] > 1e-4


# ------------------------------------------------------------------------------------------------------------
# Memory

VOCABULARY = 5003  # a prime: no other tensor has such a side


@pytest.fixture(scope="module")
def wide(model_dir, load):
    """A random model whose vocabulary is large beside everything else in it."""
    from policy import Policy

    return Policy.load(model_dir("qwen3", vocab_size=VOCABULARY), device="cpu", dtype="float32", lora_rank=4)


def scored_and_sampled(policy, tokens, rows=4):
    def update():
        policy.eos_ids = [-1]
        samples = policy.generate(random_ids([5]), rows, tokens, 1.0, 0).completions
        with torch.no_grad():
            policy.token_logps(random_ids([5]), samples, role="reference")
        policy.token_logps(random_ids([5]), samples).logps.sum().backward()

    return update


def test_no_tensor_of_a_step_grows_with_tokens_times_vocabulary(monkeypatch, wide):
    """Rollout, reference, policy and backward pass, every operation watched.

    Logits of all tokens were 20 GB for a 0.6B model (trl #3678).
    """
    monkeypatch.setattr("engine.scoring.CHUNK_ROWS", 8)
    largest = []
    for tokens in (32, 64):
        watch = memory.LargestTensors(wide.hf.parameters())
        with watch:
            scored_and_sampled(wide, tokens)()
        largest.append(max(size for name, size in watch.sizes.items() if str(VOCABULARY) in name))
        assert (
            max(watch.sizes.values()) < 4 * 32 * VOCABULARY * 4 / 2
        )  # half the logits of the shorter batch, in fp32
    assert largest[0] == largest[1] == 8 * VOCABULARY * 4  # the chunk


def test_the_watch_sees_a_dense_head(wide):
    """The test above would pass with a watch that is blind to what happens inside an autograd function or its
    backward pass.
    """
    hidden, weight, targets = memory.head_case(64, torch.float32, VOCABULARY, 16)
    for name, logits in (
        ("dense", 64 * VOCABULARY * 4),
        ("chunked", 64 * VOCABULARY * 4),
    ):  # here one chunk holds all rows
        with memory.LargestTensors([weight]) as watch:
            memory.HEADS[name](hidden, weight, targets)
        assert max(watch.sizes.values()) == logits


def test_the_watch_counts_a_part_of_a_tensor_once():
    with memory.LargestTensors() as watch:
        torch.zeros(8, 4)[:2].add_(1)
    assert watch.sizes == {"float32 (8, 4)": 8 * 4 * 4}


def test_a_role_costs_its_adapter_and_its_head(load):
    policy = load()
    before = memory.held_bytes(policy)
    parameters = policy.add_role("reward")
    assert memory.held_bytes(policy) - before == sum(p.numel() * 4 for p in parameters.values())
    randomise_all(parameters)


def test_the_arithmetic_meets_the_goals():
    """Against Qwen3-0.6B's published sizes, and the three goals; 100 kB of activations per token and layer is
    above what is counted on the CPU.
    """
    training = memory.gpu_bytes(8, 512, 85e3)["training"]
    assert (
        training["embedding = head, bf16"] == 151_936 * 1024 * 2
        and training["weights, NF4"] * 2 == 440_401_920
    )  # 0.6 B with the embedding
    assert training["adapters, fp32"] == 2 * 28 * 16 * 22_528 * 4
    short, long, ppo = (
        memory.gpu_peak(8, tokens, 100e3, trained=trained)
        for tokens, trained in ((512, 1), (1024, 1), (512, 2))
    )
    assert short <= 3e9 and long <= 1.3 * short and ppo <= 1.3 * short


# ------------------------------------------------------------------------------------------------------------
# The limit


def test_the_limit_of_a_step_by_hand(tmp_path, model_dir):
    """SFT on one answer: 2 FLOPs for each weight and token forward, as many back; sampling one token at 1
    FLOP/s or 1 byte/s.
    """
    model = model_dir("qwen3")  # width 64, inner 96, 2 layers, 4 heads and 2 of keys of 16, vocabulary 97
    weights, head, scores = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96), 97 * 64, 4 * 2 * 64
    case = make_case("sft", model, 1, 0, 10, dtype="bfloat16")
    pairs = 37 * 37 / 2 + 10 * (37 + 5)
    assert limits(case, {"flops": 1.0, "bytes": 1.0}) == {
        "rollout": 0.0,
        "scoring": 0.0,
        "update": 4 * 47 * weights + 4 * 10 * head + 3 * scores * pairs,
    }
    one = make_case("grpo", model, 1, 3, 1, dtype="bfloat16")
    moved = 2 * (weights + head) + 3 * 4 * 2 * 32 * 37
    assert limits(one, {"flops": 1e30, "bytes": 1.0})["rollout"] == moved
    assert limits(one | {"dtype": "float32"}, {"flops": 1e30, "bytes": 1.0})["rollout"] == 2 * moved
    assert limits(one, {"flops": 1.0, "bytes": 1e30})["rollout"] == 3 * (2 * (weights + head) + scores * 37)


def test_a_random_model_can_be_sampled(tmp_path):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
    config = dict(
        model_type="qwen3",
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    model = random_model(tmp_path / "m", tokenizer, **config)
    from policy import Policy

    assert len(Policy.load(model, device="cpu").generate([[5, 6]], 2, 3).completions[0]) == 2
