"""Steps of both sides beside each other: what a case is, how its steps are taken in turn, what a row of it
says.
"""

import statistics
import tempfile
from contextlib import ExitStack

import torch
import transformers
from safetensors.torch import load_file

from plots.bench.limits import limits, precision
from plots.bench.worker import Worker

PROMPT, RANK, LR = 37, 16, 1e-5
PHASES = ("rollout", "scoring", "update")
BETAS = {"grpo": 0.04, "dpo": 0.1}


# ------------------------------------------------------------------------------------------------------------
# A case


def random_ids(model, rows, n, generator):
    vocabulary = transformers.AutoConfig.from_pretrained(model).vocab_size
    return torch.randint(10, min(1000, vocabulary), (rows, n), generator=generator).tolist()


def make_case(method, model, prompts, group, tokens, **changes):
    """One case: token ids drawn at random, and the settings that both sides follow."""
    generator = torch.Generator().manual_seed(0)
    case = {
        "expert_ids": random_ids(model, prompts, tokens, generator),
        "rejected_ids": random_ids(model, prompts, tokens, generator),
        "prompts": random_ids(model, prompts, PROMPT, generator),
    }
    case |= dict(method=method, model=model, group=group, tokens=tokens, lr=LR, rank=RANK, quantize="none")
    case |= dict(dtype=precision(), device="cuda" if torch.cuda.is_available() else "cpu")
    case |= dict(threads=torch.get_num_threads(), beta=BETAS.get(method, 0.0), checkpointing=False)
    return case | changes


def describe(case):
    prompts = len(case["prompts"])
    samples = f"{prompts} x {case['group']}" if case["group"] else f"{prompts}"
    checkpointing = ", checkpointing" if case["checkpointing"] else ""
    return f"{case['method']} {samples} x {case['tokens']}{checkpointing}"


# ------------------------------------------------------------------------------------------------------------
# Its steps


def compare(name, case, sides, repeats, rates, warm=1):
    """Steps of the sides in turn -> a row, printed.

    {"name", "case", "sides": {side: medians, spread, tokens per second, peak, share of the limit}, "ratio"}
    """
    row = {"name": name, "case": describe(case), "precision": case["dtype"], "repeats": repeats}
    row |= {"first_step_counts": not warm, "sides": {}}
    for side, steps in steps_in_turn(case, sides, repeats, warm).items():
        row["sides"][side] = summarised(steps, case, limits(case, rates) if side == "ours" else None)
    if "TRL" in sides:
        ours, trl = row["sides"]["ours"], row["sides"]["TRL"]
        row["ratio"] = {
            "seconds": ours["seconds"]["total"] / trl["seconds"]["total"],
            "peak": ours["peak_bytes"] / trl["peak_bytes"],
        }
    show(row)
    return row


def steps_in_turn(case, sides, repeats, warm):
    """{side: [measured steps]}, the sides alternating; the first `warm` steps of each do not count."""
    steps = {side: [] for side in sides}
    with ExitStack() as stack:
        workers = {}
        for side, (python, module) in sides.items():
            workers[side] = stack.enter_context(Worker(python, module, case))
        for worker in workers.values():
            worker.wait_until_ready()
        for i in range(warm + repeats):
            for side, worker in workers.items():
                step = worker.call("step")
                if i >= warm:
                    steps[side].append(step)
    return steps


def summarised(steps, case, limit):
    """One side's measured steps: medians, and beside them the limit where it is known."""
    median = {phase: statistics.median(step[phase] for step in steps) for phase in ("total", *PHASES)}
    totals = [step["total"] for step in steps]
    side = {"seconds": median, "spread": [min(totals), max(totals)]}
    side["peak_bytes"] = max(step["peak"] for step in steps)
    made = len(case["prompts"]) * case["group"] * case["tokens"]
    if made:
        side["tokens_per_second"] = made / median["rollout"]
    if limit:
        side["limit_seconds"] = limit
        shares = {phase: limit[phase] / median[phase] for phase in PHASES if limit[phase]}
        side["share_of_limit"] = shares | {"total": sum(limit.values()) / median["total"]}
    return side


HEADER = (
    f"{'case':<36}{'side':<5}{'s/step':>7} {'[min, max]':<16}{'rollout':>8}{'scoring':>8}{'update':>8}"
    f"{'tokens/s':>9}{'peak GB':>8}{'limit':>8}"
)


def show(row):
    for side, r in row["sides"].items():
        s, (low, high) = r["seconds"], r["spread"]
        line = f"{row['name'] + ', ' + row['case']:<36}{side:<5}{s['total']:7.2f} [{low:6.2f}, {high:6.2f}]"
        line += "".join(f"{s[phase]:8.2f}" for phase in PHASES)
        line += f"{r['tokens_per_second']:9.0f}" if "tokens_per_second" in r else " " * 9
        line += f"{r['peak_bytes'] / 1e9:8.2f}"
        line += f"{r['share_of_limit']['total']:8.0%}" if "share_of_limit" in r else ""
        print(line, flush=True)
    if "ratio" in row:
        time, peak = row["ratio"]["seconds"], row["ratio"]["peak"]
        print(f"{'':<36}ours / TRL: {time:.2f} of the time, {peak:.2f} of the peak memory", flush=True)


# ------------------------------------------------------------------------------------------------------------
# The same loss; the largest tensors


def same_loss(model, data, sides, group=4, tokens=16):
    """GRPO's loss and gradient on the same samples, adapter and precision (fp32) -> relative differences."""
    case = make_case("grpo", model, 2, group, tokens, data=data, dtype="float32")
    generator = torch.Generator().manual_seed(1)
    given = {
        "completions": random_ids(model, 2 * group, tokens, generator),
        "advantages": torch.randn(2 * group, generator=generator).tolist(),
    }
    answers, gradients = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for side, (python, module) in sides.items():
            path = f"{folder}/{side}.safetensors"
            with Worker(python, module, case) as worker:
                answers[side] = worker.call("loss", adapter=f"{folder}/adapter", gradient=path, **given)
            gradients[side] = flat_gradient(path)
    ours, theirs = gradients["ours"], gradients["TRL"]
    difference = float((ours - theirs).norm() / theirs.norm())
    loss = {side: answer["loss"] for side, answer in answers.items()}
    print(
        f"the same loss on the same samples, fp32: ours {loss['ours']:.7f}, TRL {loss['TRL']:.7f}; "
        f"gradients differ by {difference:.1e} of their norm",
        flush=True,
    )
    row = {"loss": loss, "kl": answers["ours"]["kl"], "parameters": len(ours)}
    return row | {"gradient_difference": difference}


def flat_gradient(path):
    return torch.cat([g.flatten() for _, g in sorted(load_file(path).items())])


def largest_tensors(model, data, side, tokens):
    """The largest tensors of a GRAO step, in a process of its own: none may grow with tokens x vocabulary."""
    case = make_case("grao", model, 1, 8, tokens, data=data)
    with Worker(*side, case) as worker:
        largest = worker.call("largest_tensors")["largest"]
    vocabulary = transformers.AutoConfig.from_pretrained(model).vocab_size
    print(f"largest tensors of a GRAO step, 8 x {tokens} tokens, vocabulary {vocabulary}:", flush=True)
    for name, size in largest.items():
        print(f"    {size / 1e6:8.1f} MB  {name}")
    return {"tokens": tokens, "vocabulary": vocabulary, "largest": largest}
