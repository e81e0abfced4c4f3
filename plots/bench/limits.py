"""What the machine can do, and the least it would need for a step by the formulae of plots.bench."""

import torch
import transformers

from engine.models import pick_dtype
from plots.bench.worker import now


def precision():
    """The precision both sides compute in: "bfloat16" where the machine multiplies it natively, else
    "float32".

    A CPU without AVX512-BF16 emulates bf16, many times slower than fp32, and oneDNN refuses to pack it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return str(pick_dtype("auto", device, model="")).removeprefix("torch.")


def machine(quick, dtype):
    """{"flops": of a matrix product in this precision, "bytes": of a copy}, per second, the best of 8."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, size = (512, 2**24) if quick else (2048, 2**28)
    a = torch.randn(n, n, device=device).to(getattr(torch, dtype))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "flops": 2 * n**3 / fastest(lambda: a @ a),
        "bytes": 2 * size / fastest(lambda: target.copy_(source)),
    }


def fastest(run, times=8):
    """Seconds of the fastest of several calls."""
    seconds = []
    for _ in range(times):
        start = now()
        run()
        seconds.append(now() - start)
    return min(seconds)


def limits(case, rates):
    """Seconds that the machine needs for a step of a case, by phase: the formulae of plots.bench."""
    c = transformers.AutoConfig.from_pretrained(case["model"])
    d = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    L, D, q, kv = c.num_hidden_layers, c.hidden_size, c.num_attention_heads * d, c.num_key_value_heads * d
    P_lin, head = L * (2 * D * q + 2 * D * kv + 3 * D * c.intermediate_size), c.vocab_size * D
    B, T, prompt = len(case["prompts"]), case["tokens"], len(case["prompts"][0])
    R = B * {"grpo": case["group"], "grao": case["group"], "dpo": 2, "sft": 1}[case["method"]]
    N, M = B * prompt + R * T, R * T
    size = 2 if case["dtype"] == "bfloat16" else 4  # bytes of a number

    def attention(n):  # FLOPs of one query that sees n keys
        return 4 * L * q * n

    scores = B * attention(prompt / 2) * prompt + M * attention(prompt + T / 2)
    forward = 2 * N * P_lin + 2 * M * head + scores
    backward = 2 * N * P_lin + 2 * M * head + 2 * scores
    rollout = 0.0
    for n in range(prompt, prompt + T):
        moved = size * (P_lin + head) + R * 2 * size * L * kv * n
        flops = R * (2 * (P_lin + head) + attention(n))
        rollout += max(moved / rates["bytes"], flops / rates["flops"])
    return {
        "rollout": rollout if case["group"] else 0.0,
        "scoring": 0.0 if case["method"] == "sft" else forward / rates["flops"],
        "update": (forward + backward) / rates["flops"],
    }
