"""Our sampler beside `generate`, the frozen weights' products alone, the output head beside a dense one."""

import statistics
from multiprocessing import get_context

import torch
import torch.nn.functional as F
import transformers

from engine.sampling import LlamaDecoder, Sampler, base_layer, linear, prepack
from engine.scoring import CHUNK_ROWS
from plots.bench import memory
from plots.bench.cases import PROMPT, make_case
from plots.bench.worker import now
from policy import Policy


def alternate(functions, repeats):
    """Functions called in turn, after one warm-up round -> {name: median seconds}, {name: (fastest,
    slowest)}.
    """
    times = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, function in functions.items():
            start = now()
            function()
            if i:
                times[name].append(now() - start)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return medians, {name: (min(seconds), max(seconds)) for name, seconds in times.items()}


def sampling(model, rows, tokens, repeats, dtype, quantize="none"):
    """Our sampler, with an adapter, against transformers' `generate` of the same weights without one."""
    policy = Policy.load(model, quantize=quantize, dtype=dtype)
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        policy.source, dtype=policy.dtype, local_files_only=True
    ).to(policy.device)
    prompt = make_case("grpo", model, 1, rows, tokens)["prompts"][0]
    sampler = Sampler(policy.hf, [-1])  # no id ends an answer
    ids = torch.tensor([prompt] * rows, device=policy.device)
    drawn = dict(do_sample=True, top_k=0, top_p=1.0, pad_token_id=0)

    def ours():
        sampler.generate([prompt], rows, tokens, 1.0, 0)

    def theirs():
        mask = torch.ones_like(ids)
        plain.generate(ids, attention_mask=mask, min_new_tokens=tokens, max_new_tokens=tokens, **drawn)

    median, spread = alternate({"ours": ours, "generate": theirs}, repeats)
    speed = {name: rows * tokens / seconds for name, seconds in median.items()}
    speedup = median["generate"] / median["ours"]
    print(
        f"sampling {rows} x {tokens}: ours {speed['ours']:.0f} tokens/s, generate {speed['generate']:.0f}, "
        f"{speedup:.2f} x as fast",
        flush=True,
    )
    row = {"rows": rows, "tokens": tokens, "quantize": quantize, "seconds": median, "spread": spread}
    return row | {"tokens_per_second": speed, "speedup": speedup}


# ------------------------------------------------------------------------------------------------------------
# The frozen weights' products, nothing between them


def products(model, rates, repeats, tokens, dtype):
    """What the matrix library leaves of the limit at the sizes of a step of 1 x 8 samples."""
    policy = Policy.load(model, quantize="none", dtype=dtype)
    rows = []
    with torch.no_grad():
        for batch in (8, 16, 32):
            work, limit = of_a_position(policy, batch, rates)
            rows.append(timed(f"a position of {batch} rows", work, limit, repeats))
        work, limit = of_an_update(policy, PROMPT + 8 * tokens, 8 * tokens, rates)
        rows.append(timed(f"an update of {8 * tokens} tokens", work, limit, repeats))
    return rows


def timed(what, work, limit, repeats):
    median, spread = alternate({"products": work}, repeats)
    seconds = median["products"]
    print(f"products alone, {what}: {1e3 * seconds:.1f} ms, {limit / seconds:.0%} of the limit", flush=True)
    row = {"what": what, "seconds": seconds, "spread": spread["products"]}
    return row | {"limit_seconds": limit, "share_of_limit": limit / seconds}


def of_a_position(policy, rows, rates):
    """(function, limit) of one decoded position: every merged weight, and the head, times `rows` states."""
    decoder, head = LlamaDecoder(policy.hf), policy.hf.get_output_embeddings().weight.detach()
    decoder.refresh()
    weights = [w for layer in decoder.weights for w in layer] + [prepack(head)]
    x = {}
    for width in {w.shape[1] for w in weights}:
        x[width] = torch.randn(rows, width, device=policy.device).to(head.dtype)
    numbers = sum(w.numel() for w in weights)

    def work():
        for w in weights:
            linear(x[w.shape[1]], w, None)

    moved, flops = head.element_size() * numbers, 2 * rows * numbers
    return work, max(moved / rates["bytes"], flops / rates["flops"])


def of_an_update(policy, n, m, rates):
    """(function, limit) of an update: each frozen weight forward and back for n tokens, the head for m."""
    head = policy.hf.get_output_embeddings().weight.detach()
    layers = [base_layer(p) for layer in LlamaDecoder(policy.hf).groups for group in layer for p in group]
    x = {}
    for width in {width for layer in layers for width in layer.weight.shape} | {head.shape[1]}:
        x[width] = torch.randn(n, width, device=policy.device).to(head.dtype)
    p = torch.randn(CHUNK_ROWS, len(head), device=policy.device).to(head.dtype)

    def work():
        for layer in layers:
            F.linear(x[layer.weight.shape[1]], layer.weight)
            x[layer.weight.shape[0]] @ layer.weight
        for i in range(0, m, CHUNK_ROWS):
            F.linear(x[head.shape[1]][i : min(i + CHUNK_ROWS, m)], head)
            p[: m - i] @ head

    numbers = sum(layer.weight.numel() for layer in layers)
    return work, 4 * (n * numbers + m * head.numel()) / rates["flops"]


# ------------------------------------------------------------------------------------------------------------
# The output head


def head_seconds(repeats, dtype, size=()):
    """Log-probs through a head of 151,936 x 1024 and their gradient: the time beside a dense one."""
    rows = []
    for precision in dict.fromkeys((dtype, "float32")):
        case = memory.head_case(512, getattr(torch, precision), *size)
        heads = {name: (lambda f=f, case=case: f(*case)) for name, f in memory.HEADS.items()}
        median, spread = alternate(heads, repeats)
        rows.append({"dtype": precision, "tokens": 512, "seconds": median, "spread": spread})
        print(
            f"log-probs and gradient of 512 tokens, {precision}: chunked {median['chunked']:.2f} s, "
            f"dense {median['dense']:.2f} s",
            flush=True,
        )
    return rows


def head_peaks(dtype, size=()):
    """The same heads' peak memory by number of tokens, each in a process of its own."""
    rows = []
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for tokens in (512, 1024):
            tasks = [(name, tokens, dtype, *size) for name in memory.HEADS]
            peaks = dict(zip(memory.HEADS, pool.map(memory.peak_growth, tasks, chunksize=1)))
            rows.append({"tokens": tokens, "dtype": dtype} | peaks)
            print(
                f"their peak memory, {tokens} tokens, {dtype}: chunked {peaks['chunked'] / 2**20:.0f} MiB, "
                f"dense {peaks['dense'] / 2**20:.0f} MiB",
                flush=True,
            )
    return rows
