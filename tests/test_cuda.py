"""The commands on a CUDA device that is only pretended (pretend_cuda.py): no operator that CUDA refuses, the
CPU's numbers, and ceilings on what a decoded position and a training step cost there.

Each program below is one process, as torch must be imported under the pretence; tests read what it printed.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pretend_cuda
import pytest
import torch
from conftest import ROOT

from engine.models import pick_device, pick_dtype

BEGIN = f"""
import json, os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import pretend_cuda
device = pretend_cuda.install()
import torch
"""


def program(text, *arguments):
    """Run a program with `device` pretended -> what its last line of output says in JSON."""
    if reason := pretend_cuda.why_not():
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + text, *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------------------
# Which device, which type


def test_bf16_by_emulation_is_not_taken(monkeypatch):
    """torch calls bf16 supported on an RTX 20, where attention then keeps all its scores."""
    for major, dtype in ((7, torch.float32), (8, torch.bfloat16)):
        card = SimpleNamespace(major=major, minor=5)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, card=card: card)
        monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
        assert torch.cuda.is_bf16_supported()
        assert pick_dtype("auto", torch.device("cuda"), "Qwen/Qwen3-0.6B") == dtype


def test_apples_gpu_is_taken_where_nothing_is_quantised(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert [pick_device("auto", quantize).type for quantize in ("none", "nf4")] == ["mps", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto", "none").type == "cuda"


# ------------------------------------------------------------------------------------------------------------
# The pretence

REFUSALS = """
import torch.nn.functional as F
x, c = torch.randn(4, 6, device="cuda"), torch.randn(4, 6)
mask, long = torch.ones(4, 6, dtype=torch.bool), torch.tensor([1])
cases = {
    "same device": [
        lambda: x + c, lambda: torch.mm(x, c.t()), lambda: torch.cat([x, c]), lambda: x.index_select(0, long),
        lambda: F.embedding(long, x), lambda: x.masked_fill(mask, 0.0), lambda: torch.where(mask, x, 0.0),
        lambda: torch.stack([x[0, 0], torch.tensor(1.0)]),
    ],
    "can't convert cuda": [lambda: x.numpy()],
    "generator": [lambda: torch.randn(3, device="cuda", generator=torch.Generator())],
}
for words, calls in cases.items():
    for i, call in enumerate(calls):
        try:
            call()
        except (RuntimeError, TypeError) as error:
            assert words in str(error), (words, i, str(error)[:200])
        else:
            raise AssertionError(f"not refused: {words} {i}")

# What CUDA takes, and the CPU's numbers.
assert torch.equal((x + torch.tensor(2.0)).cpu(), x.cpu() + 2)  # a CPU scalar is an argument of the kernel
assert torch.equal(x[torch.tensor([1, 2])].cpu(), x.cpu()[[1, 2]])  # a CPU index is moved
w = torch.randn(6, 3, device="cuda", requires_grad=True)
(torch.ones(2, 6, device="cuda") @ w).sum().backward()
assert w.grad.is_cuda and torch.equal(w.grad.cpu(), torch.full((6, 3), 2.0))
q, k, v = (torch.randn(2, 4, 5, 8) for _ in range(3))
seen = torch.ones(5, 5, dtype=torch.bool).tril()
ours = F.scaled_dot_product_attention(q.cuda(), k.cuda(), v.cuda(), seen.cuda())
torch.testing.assert_close(ours.cpu(), F.scaled_dot_product_attention(q, k, v, seen))

# What it counts.
before = device.counts()
float(x.sum()), bool(x.any()), x[x > 0], x.nonzero(), x.cpu(), c.to("cuda"), x.view(-1), x[1:]
found = pretend_cuda.kinds(device.since(before))
assert [found[kind] for kind in ("item", "d2h", "h2d", "shape")] == [2, 1, 1, 2], found
bytes_ = device.live()
big = torch.empty(2**20, device="cuda")
assert device.live() - bytes_ == 2**22
del big
assert device.live() == bytes_

# A graph runs at its replays only, on the tensors that it was captured with, and nothing in it may wait.
a, b = torch.zeros(2, device="cuda"), torch.ones(2, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    a += b * 2
assert a.tolist() == [0, 0]
graph.replay()
b += 1
graph.replay()
assert a.tolist() == [6, 6]
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        a += 1
        a.tolist()
except RuntimeError as error:
    assert "capturing" in str(error)
assert a.tolist() == [6, 6]
print(json.dumps("passed"))
"""


def test_the_pretence_refuses_what_cuda_refuses_and_counts():
    """A pretence that lets everything pass would make all that follows worthless."""
    assert program(REFUSALS) == "passed"


# ------------------------------------------------------------------------------------------------------------
# Decoding

DECODING = """
import contextlib, io
from pathlib import Path
from conftest import randomise, random_ids, write_model, write_tokenizer
from policy import Policy

prompts = {"equal": random_ids((5, 5, 5), seed=1), "unequal": random_ids((5, 1, 9), seed=1)}
result = {}


def load(family, on):
    directory = Path(sys.argv[1]) / family
    if not directory.exists():
        write_model(directory, family), write_tokenizer(directory)
    policy = Policy.load(str(directory), device=on, dtype="float32", lora_rank=4, lora_alpha=8)
    randomise(policy)
    return policy


def generate(policy, name, tokens, **changes):
    vars(policy.sampler).update(changes)
    notes = io.StringIO()
    before = device.counts()
    with contextlib.redirect_stderr(notes):
        rollout = policy.generate(prompts[name], 4, max_new_tokens=tokens, temperature=8.0, seed=3)
    return vars(rollout) | {"counts": device.since(before), "notes": notes.getvalue()}


for family in ("qwen3", "phi"):
    cuda, cpu = load(family, "cuda"), load(family, "cpu")
    for policy in (cuda, cpu):
        policy.generate(prompts["equal"], 1, max_new_tokens=1)  # makes the sampler
    found = {}
    for name in prompts:
        found[name] = {
            "cpu": generate(cpu, name, 40),
            "launches": generate(cuda, name, 40, graph=False),
            "graph": generate(cuda, name, 40, graph=True),
        }
        # Without an EOS: the cost of 16 positions, two looks among them, by a difference.
        eos, cuda.sampler.eos = cuda.sampler.eos, torch.tensor([-1], device="cuda")
        few, many = (generate(cuda, name, n, graph=False)["counts"] for n in (10, 26))
        found[name]["16 positions"] = pretend_cuda.kinds(many - few)
        cuda.sampler.eos = eos
    result[family] = found

# Little free memory: fewer prompts at once, the same tokens.
sampler, batches = cuda.sampler, []
decode, mem_get_info = sampler.decode, torch.cuda.mem_get_info
sampler.decode = lambda prompts, *rest: batches.append(len(prompts)) or decode(prompts, *rest)
row = 2 * 2 * sampler.decoder.kv_heads * sampler.decoder.width * 4 * (9 + 40)  # bytes
few = []
for samples in (12, 8, 1):
    torch.cuda.mem_get_info = lambda device: (2 * samples * row, 2**33)
    few.append(generate(cuda, "unequal", 40)["completions"])
torch.cuda.mem_get_info, sampler.decode = mem_get_info, decode
result["little memory"] = {"batches": batches, "completions": few}

# A step that waits cannot be captured: one line, once, and the same tokens.
draw_next = type(cuda.sampler).draw_next
waits = lambda self, rows, *rest: draw_next(self, rows, *rest) or rows.running.any().item() and None
type(cuda.sampler).draw_next = waits
again = [generate(cuda, "unequal", 40, graph=True), generate(cuda, "unequal", 40)]
result["failing"] = {"notes": [x["notes"] for x in again], "completions": [x["completions"] for x in again]}
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    return program(DECODING, tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("family", ("qwen3", "phi"))
@pytest.mark.parametrize("prompts", ("equal", "unequal"))
def test_decoding_draws_the_tokens_of_the_cpu(decoded, family, prompts):
    """By launches, and by the replays of a graph: one that misses what a position changes repeats a token."""
    found = decoded[family][prompts]
    lengths = {len(ids) for group in found["cpu"]["completions"] for ids in group}
    assert len(lengths) > 3  # rows end at different times, so batches shrink and graphs are captured anew
    for way in ("launches", "graph"):
        assert found[way]["completions"] == found["cpu"]["completions"], way
        assert found[way]["truncated"] == found["cpu"]["truncated"]
        for ours, theirs in zip(sum(found[way]["logps"], []), sum(found["cpu"]["logps"], []), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
        assert found[way]["notes"] == ""


# Launches of a layer and of the rest of a position: today's, to which nothing is added unseen.
@pytest.mark.parametrize("family, layer, rest", (("qwen3", 16, 35), ("phi", 50, 33)))
@pytest.mark.parametrize("prompts", ("equal", "unequal"))
def test_a_position_waits_for_nothing(decoded, family, layer, rest, prompts):
    """The host reads one number at a look, every 8 positions; in between it only launches, and unequal
    prompts cost nothing more. It was 5 waits and 26 launches a layer at each position, 5 more with a mask.
    """
    cost = decoded[family][prompts]["16 positions"]
    assert cost["waits"] == 2, cost
    assert cost["launch"] / 16 <= 2 * layer + rest, cost


def test_the_cache_takes_half_of_the_free_memory(decoded):
    """A constant of 1 GiB did not fit beside the rest on a small card, and starved a large one."""
    found = decoded["little memory"]
    assert found["batches"] == [3, 2, 1, 1, 1, 1]
    assert found["completions"] == [decoded["phi"]["unequal"]["cpu"]["completions"]] * 3


def test_a_capture_that_fails_is_one_line(decoded):
    first, second = decoded["failing"]["notes"]
    assert first.count("\n") == 1 and first.startswith("decoding without a CUDA graph: CUDA error")
    assert second == ""
    expected = decoded["phi"]["unequal"]["cpu"]["completions"]
    assert decoded["failing"]["completions"] == [expected, expected]


# ------------------------------------------------------------------------------------------------------------
# Commands

SHORT = (
    "--model tiny --prompts-per-step 2 --group-size 4 --max-new-tokens 8 --eval-prompts 2 --eval-every 100"
)
FP32 = "--quantize none --dtype float32"
COMMANDS = {
    "grao": f"minigrao.py --steps 3 {FP32} --gradient-checkpointing on",
    "grao nf4": "minigrao.py --steps 2 --quantize nf4 --dtype float32 --gradient-checkpointing off",
    "grpo": f"baselines.py grpo --steps 3 {FP32} --updates-per-rollout 2 --kl-coef 0.04",
    "ppo": f"baselines.py ppo --steps 3 {FP32}",
    "sft": f"baselines.py sft --steps 2 {FP32}",
    "dpo": f"baselines.py dpo --steps 2 {FP32}",
    "uniapl": f"uniapl.py --steps 3 {FP32} --discriminator embedding",
}
ON_CUDA_ALONE = {
    "grao bf16": "minigrao.py --steps 2 --quantize nf4 --dtype bfloat16 --gradient-checkpointing on"
}

RUN = """
from pathlib import Path
from engine.record import RunFolder, read_jsonl
folder, commands, alone, short = Path(sys.argv[1]), *map(json.loads, sys.argv[2:5])


def run(name, command, on):
    out = folder / f"{name} {on}"
    with pretend_cuda.Phases(device) as phases:
        status = pretend_cuda.run(*command.split(), *short.split(), "--device", on, "--out", str(out))
    lines = [line for line in read_jsonl(out / "metrics.jsonl") if line["step"]] if status == 0 else []
    phases = {phase: pretend_cuda.kinds(found[-1]) for phase, found in phases.found.items()}
    return {"status": status, "lines": lines, "phases": phases}


result = {}
for name, command in (commands | alone).items():
    result[name] = {on: run(name, command, on) for on in (("cuda", "cpu") if name in commands else ("cuda",))}

# Ctrl-C in the first step, then --resume.
log = RunFolder.log
stop = lambda: os.kill(os.getpid(), signal.SIGINT)
RunFolder.log = lambda self, line: log(self, line) or line["step"] == 1 and stop()
run("stopped", commands["grao"], "cuda")
RunFolder.log = log
status = pretend_cuda.run("minigrao.py", "--resume", "--out", str(folder / "stopped cuda"))
result["resumed"] = {"status": status, "lines": read_jsonl(folder / "stopped cuda" / "metrics.jsonl")[1:]}
result["allocator"] = os.environ["PYTORCH_ALLOC_CONF"]
print()
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """{name: {"cuda" or "cpu": {"status", "lines" of metrics.jsonl, "phases"}}} of every command above."""
    return program(RUN, tmp_path_factory.mktemp("cuda"), *map(json.dumps, (COMMANDS, ON_CUDA_ALONE, SHORT)))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_ends_with_the_losses_of_the_cpu(ran, name):
    cuda, cpu = ran[name]["cuda"], ran[name]["cpu"]
    assert cuda["status"] == cpu["status"] == 0
    assert len(cuda["lines"]) == len(cpu["lines"]) >= 2
    # PPO's numbers are over the four updates of a step, and AdamW's first steps are signs: where a gradient
    # is near 0, the two devices' rounding moves a parameter by a whole step in either direction.
    near = 1e-3 if name == "ppo" else 1e-4
    for ours, theirs in zip(cuda["lines"], cpu["lines"]):
        for metric in ("loss", "grad_norm"):
            assert ours[metric] == pytest.approx(theirs[metric], abs=near, rel=near), metric


def test_segments_of_memory_grow(ran):
    """Completions of ever other lengths leave holes between segments of fixed size."""
    assert ran["allocator"] == "expandable_segments:True"


def test_bf16_with_nf4(ran):
    lines = ran["grao bf16"]["cuda"]["lines"]
    assert len(lines) == 2 and all(0 < line["grad_norm"] < 1e3 for line in lines)


def test_resumed_is_the_run_that_never_stopped(ran):
    """AdamW's moments and the adapters come back to the device that they were on."""
    assert ran["resumed"]["status"] == 0
    for ours, theirs in zip(ran["resumed"]["lines"], ran["grao"]["cuda"]["lines"], strict=True):
        assert (ours["step"], ours["loss"]) == (theirs["step"], pytest.approx(theirs["loss"], abs=1e-6))


# (launches, waits) of a step without its rollout, two prompts in one micro-batch: a tenth above today's.
CEILINGS = {"grao": (2050, 53), "grpo": (3000, 82), "ppo": (12600, 272), "uniapl": (3300, 90)}


@pytest.mark.parametrize("name", CEILINGS)
def test_a_step_costs_no_more_than_it_did(ran, name):
    """On a GPU a step waits for its launches, and a synchronisation for all of them: neither creeps in."""
    found = ran[name]["cuda"]["phases"]["a step without its rollout"]
    launches, waits = CEILINGS[name]
    assert found["launch"] <= launches and found["waits"] <= waits, found
