"""Speed and memory of sampling and scoring beside transformers' own, alternating in one process.

    python -m plots.bench --model DIR          # any causal LM; without it a random model of SmolLM2-135M's shape is built
    python -m plots.bench --out plots/bench.json

Sampling: G samples of 64 forced tokens of one prompt, ours against `generate` of the same bf16 (or fp32) weights without an adapter.
Log-probs: 512 tokens through an output head of 151,936 x 1024, value and gradient, chunked against dense; then the growth of peak
memory with the number of tokens, each in a process of its own. Medians, and the ratio of the medians.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers

from policy import Policy
from record import environment, write_whole
from sampling import Sampler
from scoring import ChunkedLogProb

VOCABULARY, WIDTH = 151_936, 1024  # Qwen3-0.6B's output head


def alternate(functions, repeats):
    """{name: seconds (median)} and {name: (fastest, slowest)} of functions called in turn, after one warm-up round."""
    times = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                times[name].append(time.perf_counter() - start)
    return {n: statistics.median(t) for n, t in times.items()}, {n: (min(t), max(t)) for n, t in times.items()}


def bench_sampling(model, rows, prompt_tokens, tokens, repeats):
    policy = Policy.load(model)
    plain = transformers.AutoModelForCausalLM.from_pretrained(policy.source, dtype=policy.dtype, local_files_only=True).to(policy.device)
    prompt = torch.randint(10, min(1000, plain.config.vocab_size), (prompt_tokens,)).tolist()
    sampler = Sampler(policy.hf, [-1])  # no id ends an answer
    ids = torch.tensor([prompt] * rows, device=policy.device)

    def theirs():
        plain.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0)

    median, spread = alternate({"ours": lambda: sampler.generate([prompt], rows, tokens, 1.0, 0), "generate": theirs}, repeats)
    return {
        "rows": rows, "tokens": tokens, "seconds": median, "spread": spread, "tokens_per_second": {n: rows * tokens / t for n, t in median.items()},
        "speedup": median["generate"] / median["ours"],
    }


def head_case(tokens, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).mul_(0.02).to(dtype)
    return hidden, weight, torch.randint(VOCABULARY, (tokens,), generator=generator)


def chunked(hidden, weight, targets):
    logp, _ = ChunkedLogProb.apply(hidden, weight, None, targets, 1.0)
    return torch.autograd.grad(logp.sum(), hidden)[0]


def dense(hidden, weight, targets):
    logp = (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None])
    return torch.autograd.grad(logp.sum(), hidden)[0]


def bench_head(tokens, dtype, repeats):
    case = head_case(tokens, dtype)
    median, spread = alternate({"chunked": lambda: chunked(*case), "dense": lambda: dense(*case)}, repeats)
    return {"tokens": tokens, "dtype": str(dtype), "seconds": median, "spread": spread, "ratio": median["chunked"] / median["dense"]}


def peak_growth(task):
    """MiB by which the peak memory of this process grows in one forward and backward pass of the head. Linux."""
    name, tokens = task
    case = head_case(tokens, torch.bfloat16)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is held now
    before = peak_rss()
    {"chunked": chunked, "dense": dense}[name](*case)
    return peak_rss() - before


def peak_rss():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or .gguf of the model to sample from")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="write the numbers here as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or random_model(folder)
        result = {"environment": environment(), "model": args.model or "random weights in SmolLM2-135M's shape", "sampling": [], "head": [], "memory": []}
        for rows in (8, 32):
            row = bench_sampling(model, rows, 40, 64, args.repeats)
            result["sampling"].append(row)
            speed = row["tokens_per_second"]
            print(f"sampling {rows:>3} x 64 tokens: ours {speed['ours']:6.0f} tokens/s, generate {speed['generate']:6.0f}, {row['speedup']:.2f} x as fast")
    for dtype in (torch.bfloat16, torch.float32):
        row = bench_head(512, dtype, args.repeats)
        result["head"].append(row)
        print(f"log-probs of 512 tokens, vocabulary {VOCABULARY}, {dtype}: chunked {row['seconds']['chunked']:.2f} s, dense {row['seconds']['dense']:.2f} s, ratio {row['ratio']:.2f}")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for tokens in (512, 1024, 2048):
            peaks = dict(zip(("chunked", "dense"), pool.map(peak_growth, [("chunked", tokens), ("dense", tokens)], chunksize=1)))
            result["memory"].append({"tokens": tokens, "peak_growth_mib": peaks})
            print(f"peak memory of {tokens:>4} tokens, bf16: chunked {peaks['chunked']:6.0f} MiB, dense {peaks['dense']:6.0f} MiB")
    if args.out:
        write_whole(Path(args.out), json.dumps(result, indent=1) + "\n")


def random_model(folder):
    """SmolLM2-135M's shape with random weights and the embedded tokenizer, in `folder`."""
    config = transformers.LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        max_position_embeddings=8192, tie_word_embeddings=True, eos_token_id=2,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained("data/tiny").save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
