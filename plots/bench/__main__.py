"""Speed and memory of a training step beside TRL 1.16 and beside what the machine can do.

    python -m plots.bench --model SmolLM2-135M-Instruct.Q4_1.gguf --trl-python TRL/bin/python --out plots/bench/bench.json
    python -m plots.bench                   # random weights in SmolLM2-135M's shape; TRL if it is installed here
    python -m plots.bench --quick           # everything once, on the embedded model, in a minute

TRL 1.16 wants an environment of its own (`python -m venv TRL && TRL/bin/pip install -r requirements.txt trl==1.16`); without one our side is measured alone.
Both sides get the same model, token ids, group size, lengths (forced: no token ends an answer), LoRA rank and targets, precision, threads, loss
(GRPO: DAPO's token mean, ratio * k3 with beta 0.04; DPO: beta 0.1). Each side of each case is a process
of its own, both alive, taking turns step by step after a first step that does not count; the peak is the process's, loading included.

The limit. `machine` measures a bf16 product of 2048 x 2048 matrices (FLOP/s, 2 per multiply-add) and a copy (bytes read and written per second).
P_lin is the number of weights in the linear layers, V D the output head's, N the tokens with each prompt once, M the completion tokens, R the rows,
a(n) = 4 L H d n the FLOPs of attention for a query that sees n keys.
    rollout   sum over the new tokens of max(bytes / copy rate, FLOPs / matrix rate): bytes = 2 (P_lin + V D) + R 4 L K d n, the weights once and each
              row's keys and values in bf16; FLOPs = R (2 (P_lin + V D) + a(n))
    scoring   FLOPs / matrix rate: 2 N P_lin + 2 M V D + sum a(n)
    update    the same, and in the backward pass as much again for the linear layers (their weights are frozen), the head, and twice for attention
Share of the limit = limit / measured. LoRA's own products, softmax, norms and the optimiser are left out, so 1 cannot be reached.
A share of TRL's is not given: it pads, and computes a prompt once per sample.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

from data import UserError
from engine.models import find_model
from engine.record import environment, write_whole
from engine.sampling import LlamaDecoder, Sampler, base_layer, linear, prepack
from engine.scoring import CHUNK_ROWS
from plots.bench import memory
from plots.bench.worker import Worker, now
from policy import Policy

PROMPT, RANK, LR = 37, 16, 1e-5
PHASES = ("rollout", "scoring", "update")
PARTS = "loss,grpo,qwen3,sft,dpo,scaling,products,head,memory"  # of a whole run


# ---------------------------------------------------------------------------------------------------------------------------------
# What the machine can do


def machine(quick):
    """{"flops": of a bf16 matrix product, "bytes": of a copy}, per second, the best of several."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, size = (512, 2**24) if quick else (2048, 2**28)
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = {}
    for name, run in {"flops": lambda: a @ b, "bytes": lambda: target.copy_(source)}.items():
        times = []
        for _ in range(8):
            start = now()
            run()
            times.append(now() - start)
        seconds[name] = min(times)
    return {"flops": 2 * n**3 / seconds["flops"], "bytes": 2 * size / seconds["bytes"]}


def limits(case, rates):
    """Seconds that the machine needs for a step of a case, by phase: the docstring's formulae."""
    c = transformers.AutoConfig.from_pretrained(case["model"])
    d = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    L, D, q, kv = c.num_hidden_layers, c.hidden_size, c.num_attention_heads * d, c.num_key_value_heads * d
    P_lin, head = L * (2 * D * q + 2 * D * kv + 3 * D * c.intermediate_size), c.vocab_size * D
    B, T = len(case["prompts"]), case["tokens"]
    R = B * {"grpo": case["group"], "grao": case["group"], "dpo": 2, "sft": 1}[case["method"]]
    N, M = B * PROMPT + R * T, R * T

    def attention(n):  # FLOPs of one query that sees n keys
        return 4 * L * q * n

    scores = B * attention(PROMPT / 2) * PROMPT + M * attention(PROMPT + T / 2)
    forward = 2 * N * P_lin + 2 * M * head + scores
    backward = 2 * N * P_lin + 2 * M * head + 2 * scores
    rollout = 0.0
    for n in range(PROMPT, PROMPT + T):
        moved, flops = 2 * (P_lin + head) + R * 4 * L * kv * n, R * (2 * (P_lin + head) + attention(n))
        rollout += max(moved / rates["bytes"], flops / rates["flops"])
    return {
        "rollout": rollout if case["group"] else 0.0,
        "scoring": 0.0 if case["method"] == "sft" else forward / rates["flops"],
        "update": (forward + backward) / rates["flops"],
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------------------
# Cases


def random_ids(model, rows, n, generator):
    return torch.randint(
        10,
        min(1000, transformers.AutoConfig.from_pretrained(model).vocab_size),
        (rows, n),
        generator=generator,
    ).tolist()


def make_case(method, model, prompts, group, tokens, **changes):
    """One case: token ids drawn at random, and the settings that both sides follow."""
    generator = torch.Generator().manual_seed(0)
    answers = {kind: random_ids(model, prompts, tokens, generator) for kind in ("expert_ids", "rejected_ids")}
    return dict(
        method=method, model=model, prompts=random_ids(model, prompts, PROMPT, generator), group=group, tokens=tokens, lr=LR, rank=RANK, dtype="bfloat16", quantize="none",
        device="cuda" if torch.cuda.is_available() else "cpu", threads=torch.get_num_threads(), beta={"grpo": 0.04, "dpo": 0.1}.get(method, 0.0), checkpointing=False,
    ) | answers | changes  # fmt: skip


def describe(case):
    samples = f"{len(case['prompts'])} x {case['group']}" if case["group"] else f"{len(case['prompts'])}"
    return f"{case['method']} {samples} x {case['tokens']}" + (
        ", checkpointing" if case["checkpointing"] else ""
    )


def compare(name, case, sides, repeats, rates, warm=1):
    """Steps of the sides in turn -> a row: {"name", "sides": {side: medians, spread, tokens per second, peak, share of the limit}, "ratio"}, printed."""
    steps = {side: [] for side in sides}
    with ExitStack() as stack:
        workers = {
            side: stack.enter_context(Worker(python, module, case))
            for side, (python, module) in sides.items()
        }
        for worker in workers.values():
            worker.wait_until_ready()
        for i in range(warm + repeats):
            for side, worker in workers.items():
                step = worker.call("step")
                if i >= warm:
                    steps[side].append(step)
    limit, row = (
        limits(case, rates),
        {
            "name": name,
            "case": describe(case),
            "repeats": repeats,
            "first_step_counts": not warm,
            "sides": {},
        },
    )
    made = len(case["prompts"]) * case["group"] * case["tokens"]
    for side, measured in steps.items():
        median = {phase: statistics.median(s[phase] for s in measured) for phase in ("total", *PHASES)}
        one = {
            "seconds": median,
            "spread": [min(s["total"] for s in measured), max(s["total"] for s in measured)],
            "peak_bytes": max(s["peak"] for s in measured),
        }
        if made:
            one["tokens_per_second"] = made / median["rollout"]
        if side == "ours":
            one["limit_seconds"] = limit
            one["share_of_limit"] = {p: limit[p] / median[p] for p in PHASES if limit[p]} | {
                "total": sum(limit.values()) / median["total"]
            }
        row["sides"][side] = one
    if "TRL" in sides:
        ours, trl = row["sides"]["ours"], row["sides"]["TRL"]
        row["ratio"] = {
            "seconds": ours["seconds"]["total"] / trl["seconds"]["total"],
            "peak": ours["peak_bytes"] / trl["peak_bytes"],
        }
    show(row)
    return row


def show(row):
    for side, r in row["sides"].items():
        s = r["seconds"]
        low, high = r["spread"]
        line = f"{row['name'] + ', ' + row['case']:<36}{side:<5}{s['total']:7.2f} [{low:6.2f}, {high:6.2f}]{s['rollout']:8.2f}{s['scoring']:8.2f}{s['update']:8.2f}"
        line += f"{r['tokens_per_second']:9.0f}" if "tokens_per_second" in r else " " * 9
        line += f"{r['peak_bytes'] / 1e9:8.2f}"
        print(line + (f"{r['share_of_limit']['total']:8.0%}" if "share_of_limit" in r else ""), flush=True)
    if "ratio" in row:
        print(
            f"{'':<36}ours / TRL: {row['ratio']['seconds']:.2f} of the time, {row['ratio']['peak']:.2f} of the peak memory",
            flush=True,
        )


HEADER = f"{'case':<36}{'side':<5}{'s/step':>7} {'[min, max]':<16}{'rollout':>8}{'scoring':>8}{'update':>8}{'tokens/s':>9}{'peak GB':>8}{'limit':>8}"


def same_loss(model, data, sides, group=4, tokens=16):
    """GRPO's loss and gradient on the same samples, adapter and precision (fp32) on both sides -> relative differences."""
    case = make_case("grpo", model, 2, group, tokens, data=data, dtype="float32")
    generator = torch.Generator().manual_seed(1)
    completions = random_ids(model, 2 * group, tokens, generator)
    advantages = torch.randn(2 * group, generator=generator).tolist()
    answers, gradients = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for side, (python, module) in sides.items():
            with Worker(python, module, case) as worker:
                path = f"{folder}/{side}.safetensors"
                answers[side] = worker.call(
                    "loss",
                    adapter=f"{folder}/adapter",
                    completions=completions,
                    advantages=advantages,
                    gradient=path,
                )
                gradients[side] = flat_gradient(path)
    ours, theirs = gradients["ours"], gradients["TRL"]
    row = {
        "loss": {side: a["loss"] for side, a in answers.items()},
        "kl": answers["ours"]["kl"],
        "parameters": len(ours),
    }
    row["gradient_difference"] = float((ours - theirs).norm() / theirs.norm())
    print(
        f"the same loss on the same samples, fp32: ours {row['loss']['ours']:.7f}, TRL {row['loss']['TRL']:.7f}; gradients differ by {row['gradient_difference']:.1e} of their norm",
        flush=True,
    )
    return row


def flat_gradient(path):
    from safetensors.torch import load_file

    return torch.cat([g.flatten() for _, g in sorted(load_file(path).items())])


# ---------------------------------------------------------------------------------------------------------------------------------
# Sampling and the head by themselves; memory


def alternate(functions, repeats):
    """{name: seconds (median)} and {name: (fastest, slowest)} of functions called in turn, after one warm-up round."""
    times = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, function in functions.items():
            start = now()
            function()
            if i:
                times[name].append(now() - start)
    return {n: statistics.median(t) for n, t in times.items()}, {
        n: (min(t), max(t)) for n, t in times.items()
    }


def bench_sampling(model, rows, tokens, repeats, quantize="none"):
    """Our sampler, with an adapter, against transformers' `generate` of the same weights without one."""
    policy = Policy.load(model, quantize=quantize, dtype="bfloat16")
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        policy.source, dtype=policy.dtype, local_files_only=True
    ).to(policy.device)
    prompt = make_case("grpo", model, 1, rows, tokens)["prompts"][0]
    sampler = Sampler(policy.hf, [-1])  # no id ends an answer
    ids = torch.tensor([prompt] * rows, device=policy.device)

    def theirs():
        plain.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )

    median, spread = alternate(
        {"ours": lambda: sampler.generate([prompt], rows, tokens, 1.0, 0), "generate": theirs}, repeats
    )
    speed = {n: rows * tokens / t for n, t in median.items()}
    print(
        f"sampling {rows} x {tokens}: ours {speed['ours']:.0f} tokens/s, generate {speed['generate']:.0f}, {median['generate'] / median['ours']:.2f} x as fast",
        flush=True,
    )
    return {
        "rows": rows,
        "tokens": tokens,
        "seconds": median,
        "spread": spread,
        "tokens_per_second": speed,
        "speedup": median["generate"] / median["ours"],
    }


def bench_products(model, rates, repeats, tokens):
    """The frozen weights' products of a step of 1 x 8 samples alone, nothing between them: what the matrix library leaves of the limit at these sizes."""
    policy = Policy.load(model, quantize="none", dtype="bfloat16")
    decoder = LlamaDecoder(policy.hf)
    decoder.refresh()
    head = policy.hf.get_output_embeddings().weight.detach()
    packed = [w for layer in decoder.weights for w in layer] + [prepack(head)]
    frozen = [base_layer(p) for layer in decoder.groups for group in layer for p in group]
    size = 2 * sum(w.numel() for w in packed)
    result = []

    def report(what, work, limit):
        median, spread = alternate({"products": work}, repeats)
        result.append(
            {
                "what": what,
                "seconds": median["products"],
                "spread": spread["products"],
                "limit_seconds": limit,
                "share_of_limit": limit / median["products"],
            }
        )
        print(
            f"products alone, {what}: {1e3 * median['products']:.1f} ms, {limit / median['products']:.0%} of the limit",
            flush=True,
        )

    def states(rows, width):
        return torch.randn(rows, width, device=policy.device).to(head.dtype)

    with torch.no_grad():
        for rows in (8, 16, 32):
            x = {width: states(rows, width) for width in {w.shape[1] for w in packed}}
            report(
                f"a position of {rows} rows",
                lambda: [linear(x[w.shape[1]], w, None) for w in packed],
                max(size / rates["bytes"], rows * size / rates["flops"]),
            )
        n, m = PROMPT + 8 * tokens, 8 * tokens
        x = {width: states(n, width) for width in {width for p in frozen for width in p.weight.shape}}
        p = states(CHUNK_ROWS, len(head))

        def update():
            for layer in frozen:
                F.linear(x[layer.weight.shape[1]], layer.weight)
                x[layer.weight.shape[0]] @ layer.weight
            for i in range(0, m, CHUNK_ROWS):
                F.linear(x[head.shape[1]][i : min(i + CHUNK_ROWS, m)], head)
                p[: m - i] @ head

        report(
            f"an update of {m} tokens",
            update,
            2 * (n * (size - 2 * head.numel()) + m * 2 * head.numel()) / rates["flops"],
        )
    return result


def bench_head(repeats, quick):
    """Log-probs through an output head of 151,936 x 1024, value and gradient: the time beside a dense one, and the peak by number of tokens."""
    size = (997, 64) if quick else ()
    result = {"seconds": [], "peak_growth_bytes": []}
    for dtype in (torch.bfloat16, torch.float32):
        case = memory.head_case(512, dtype, *size)
        median, spread = alternate({name: lambda f=f: f(*case) for name, f in memory.HEADS.items()}, repeats)
        result["seconds"].append({"dtype": str(dtype), "tokens": 512, "seconds": median, "spread": spread})
        print(
            f"log-probs and gradient of 512 tokens, {dtype}: chunked {median['chunked']:.2f} s, dense {median['dense']:.2f} s",
            flush=True,
        )
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for tokens in (512, 1024):
            peaks = dict(
                zip(
                    memory.HEADS,
                    pool.map(
                        memory.peak_growth, [(name, tokens, *size) for name in memory.HEADS], chunksize=1
                    ),
                )
            )
            result["peak_growth_bytes"].append({"tokens": tokens} | peaks)
            print(
                f"their peak memory, {tokens} tokens, bf16: chunked {peaks['chunked'] / 2**20:.0f} MiB, dense {peaks['dense'] / 2**20:.0f} MiB",
                flush=True,
            )
    return result


def bench_tensors(model, data, lengths):
    """The largest tensors of a GRAO step at two lengths, in a process of its own: none may grow with tokens x vocabulary."""
    rows = []
    for tokens in lengths:
        case = make_case("grao", model, 1, 8, tokens, data=data)
        with Worker(sys.executable, "bench.ours", case) as worker:
            rows.append(
                {
                    "tokens": tokens,
                    "vocabulary": transformers.AutoConfig.from_pretrained(model).vocab_size,
                    **worker.call("largest_tensors"),
                }
            )
        print(
            f"largest tensors of a GRAO step, 8 x {tokens} tokens, vocabulary {rows[-1]['vocabulary']}:",
            flush=True,
        )
        for name, size in rows[-1]["largest"].items():
            print(f"    {size / 1e6:8.1f} MB  {name}")
    return rows


# ---------------------------------------------------------------------------------------------------------------------------------
# Models and the table


def random_model(folder, tokenizer, **config):
    """A causal LM of random weights with a borrowed tokenizer, written to `folder`."""
    made = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), dtype=torch.bfloat16
    )
    made.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


SMOLLM2 = dict(model_type="llama", vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
               max_position_embeddings=8192, tie_word_embeddings=True, eos_token_id=2)  # fmt: skip
QWEN3 = dict(model_type="qwen3", vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
             max_position_embeddings=8192, tie_word_embeddings=True)  # fmt: skip


def trl_python(given):
    """The Python that runs TRL's side, or None with the reason on stderr."""
    python = given or os.environ.get("MINIGRAO_TRL_PYTHON") or sys.executable
    probe = "from importlib.metadata import version; v = version('trl'); assert tuple(map(int, v.split('.')[:2])) >= (1, 16), v; print(v)"
    try:
        found = subprocess.run([python, "-c", probe], capture_output=True, text=True)
        reason = "" if found.returncode == 0 else f"no trl >= 1.16 in {Path(python).name}'s environment"
    except OSError as error:
        reason = f"{python}: {error.strerror}"
    if reason and given:
        raise UserError(f"--trl-python {given}: {reason}")
    if reason:
        print(f"TRL is not measured ({reason}); see --trl-python", file=sys.stderr)
    return None if reason else python


def bench(args, folder):
    start, cores = time.time(), os.cpu_count()
    python = trl_python(args.trl_python)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(
            f"note: the machine is busy (load {load:.1f} on {cores} cores): these numbers are indicative only",
            file=sys.stderr,
        )
    sides = {"ours": (sys.executable, "bench.ours")} | ({"TRL": (python, "bench.with_trl")} if python else {})
    ours = {"ours": sides["ours"]}
    tiny = find_model("tiny")
    if args.quick:
        model = tiny
    else:
        model = (
            find_model(args.model)
            if args.model
            else random_model(
                f"{folder}/smollm2", transformers.AutoTokenizer.from_pretrained(tiny), **SMOLLM2
            )
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    data = f"{folder}/data.jsonl"
    lines = [
        json.dumps({"prompt": f"name {i} drinks", "chosen": "tea", "rejected": "cocoa"}) for i in range(2, 10)
    ]  # only to build a Trainer
    Path(data).write_text("\n".join(lines) + "\n")
    shallow = dict(QWEN3, num_hidden_layers=4)
    narrow = dict(
        QWEN3,
        num_hidden_layers=2,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )

    def due(name):
        return name in (args.only or PARTS).split(",")

    rates = machine(args.quick)
    result = {
        "environment": environment(), "load_at_start": load, "quick": args.quick, "threads": torch.get_num_threads(), "machine": rates,
        "model": Path(args.model).name if args.model else ("tiny" if args.quick else "random weights in SmolLM2-135M's shape"), "lora_rank": RANK, "prompt_tokens": PROMPT,
    }  # fmt: skip
    print(
        f"bf16 matrix product {rates['flops'] / 1e9:.0f} GFLOP/s, copy {rates['bytes'] / 1e9:.1f} GB/s, {torch.get_num_threads()} threads"
    )
    if python and due("loss"):
        result["same_loss"] = same_loss(model, data, sides)
    print(HEADER, flush=True)
    rows = result["cases"] = []
    few = 8 if args.quick else 64
    if due("grpo"):
        for prompts in (1,) if args.quick else (1, 2, 4):
            rows.append(
                compare(
                    "chat", make_case("grpo", model, prompts, 8, few, data=data), sides, args.repeats, rates
                )
            )
    if due("checkpointing") and not args.quick:
        rows.append(
            compare(
                "chat", make_case("grpo", model, 2, 8, few, data=data, checkpointing=True), sides, 1, rates
            )
        )
    if due("qwen3") and not args.quick:
        wide = random_model(f"{folder}/qwen3", tokenizer, **shallow)
        rows.append(
            compare(
                "Qwen3, 4 layers", make_case("grpo", wide, 1, 8, few, data=data), sides, args.repeats, rates
            )
        )
        shutil.rmtree(wide)
    for method in ("sft", "dpo"):
        if due(method):
            rows.append(
                compare(
                    "chat",
                    make_case(method, model, 2 if args.quick else 8, 0, 2 * few, data=data),
                    sides,
                    args.repeats,
                    rates,
                )
            )
    if due("scaling"):
        print(
            "scaling, ours alone: TRL's one batch would need tens of GB and minutes; one step each, the first"
        )
        grid = [(4, 8)] if args.quick else [(4, 128), (8, 128), (16, 128), (32, 128), (8, 512), (4, 2048)]
        result["scaling"] = [
            compare("scaling", make_case("grpo", model, 1, group, tokens, data=data), ours, 1, rates, warm=0)
            for group, tokens in grid
        ]
    if due("sampling"):
        result["sampling"] = [
            bench_sampling(model, rows_, few, args.repeats) for rows_ in ((2,) if args.quick else (8, 32))
        ]
        if torch.cuda.is_available():
            result["sampling_nf4"] = bench_sampling(model, 8, few, args.repeats, quantize="nf4")
    if due("products"):
        result["products"] = bench_products(model, rates, args.repeats, few)
    if due("head"):
        result["head"] = bench_head(args.repeats, args.quick)
    if due("memory"):
        profiled = model if args.quick else random_model(f"{folder}/narrow", tokenizer, **narrow)
        result["largest_tensors"] = bench_tensors(profiled, data, (16, 32) if args.quick else (512, 1024))
        result["role_bytes"] = memory.role_bytes(model)
        print(
            "one more role: "
            + ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in result["role_bytes"].items())
        )
        layer = random_model(
            f"{folder}/layer", tokenizer, **dict(QWEN3, num_hidden_layers=1, vocab_size=2**16)
        )
        kept = memory.kept_per_token(
            Policy.load(layer, dtype="bfloat16", device="cpu"), 16 if args.quick else 256
        )
        result["gpu_arithmetic"] = memory.gpu_table(kept)
    result["minutes"] = (time.time() - start) / 60
    return result


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="directory, hub name or .gguf of the chat model")
    parser.add_argument(
        "--trl-python", help="the python of an environment with trl 1.16 [MINIGRAO_TRL_PYTHON, else this one]"
    )
    parser.add_argument("--repeats", type=int, default=3, help="steps of each side of a case [3]")
    parser.add_argument(
        "--only",
        help=f"parts, with commas [{PARTS}], or also checkpointing (2 x 8 with it on both sides), sampling (beside generate)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="the embedded model, small sizes, one repeat: does it run?"
    )
    parser.add_argument("--out", help="write the numbers here as JSON")
    args = parser.parse_args(argv)
    if args.quick:
        args.repeats = 1
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = bench(args, folder)
        if args.out:
            write_whole(Path(args.out), json.dumps(result, indent=1) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
