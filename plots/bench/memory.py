"""The benchmark's part on memory: largest tensors, output heads, a role's bytes, the arithmetic for a GPU.

`largest_tensors` watches every operation of a real step. `gpu_bytes` adds up what the same step holds on a
GPU in NF4; nothing in it is measured except the activations of one layer, which are counted on the CPU
(`kept_per_token`). An allocator's fragmentation comes on top.
"""

from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import scoring
from plots.bench.worker import peak_bytes
from policy import PASS_TOKENS, Policy

QWEN3 = dict(
    layers=28, width=1024, inner=3072, heads=16, kv_heads=8, head_dim=128, vocabulary=151_936
)  # Qwen3-0.6B


# ------------------------------------------------------------------------------------------------------------
# The largest tensors of a step


class LargestTensors(TorchDispatchMode):
    """Within it, the size in bytes of every storage that an operation returns.

    By dtype and shape of the tensor that it was first seen as. Storages in `known` do not count.
    """

    def __init__(self, known=()):
        super().__init__()
        self.known, self.sizes, self.seen = {x.untyped_storage().data_ptr() for x in known}, {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if not isinstance(x, torch.Tensor) or x.is_mkldnn:
                continue
            place, size = x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
            if place not in self.known and not (
                x.nbytes < size and self.seen.get(place) == size
            ):  # no part of what was counted whole
                self.seen[place] = size
                key = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
                self.sizes[key] = max(self.sizes.get(key, 0), size)
        return out

    def top(self, n=5):
        return dict(sorted(self.sizes.items(), key=lambda item: -item[1])[:n])


def largest_tensors(policy, update, n=5):
    """Call update() -> {dtype and shape: bytes} of the n largest tensors it made, parameters left out."""
    with LargestTensors(policy.hf.parameters()) as watch:
        update()
    return watch.top(n)


def kept_per_token(policy, tokens=256, rows=8):
    """Bytes that the backward pass of one layer keeps for a token: what checkpointing computes again."""
    prompt, completions = [5], [[7] * tokens for _ in range(rows)]
    weights, kept = {p.untyped_storage().data_ptr() for p in policy.hf.parameters()}, {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x  # held, so that no address comes twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        policy.hidden(scoring.Pack([prompt], [completions], policy.device))
    return (
        sum(x.untyped_storage().nbytes() for x in kept.values())
        / (tokens * rows + 1)
        / policy.hf.config.num_hidden_layers
    )


# ------------------------------------------------------------------------------------------------------------
# The arithmetic for a GPU


def gpu_bytes(group, tokens, kept, prompt=64, trained=1, frozen=1, rank=16, shape=QWEN3):
    """Bytes of one step on a GPU, weights in NF4: {"rollout": {item: bytes}, "training": {...}}.

    group samples and an expert answer as long as they; kept: bytes of activations per token in one layer,
    see kept_per_token; trained adapters (policy, value function) have gradients and AdamW's two moments,
    frozen ones (a reward model) do not. The reference is the backbone.
    """
    L, D, I, V = shape["layers"], shape["width"], shape["inner"], shape["vocabulary"]
    q, kv = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    linears = [(D, q), (D, kv), (D, kv), (q, D), (D, I), (D, I), (I, D)]  # of a layer
    weights = L * sum(a * b for a, b in linears)
    adapter = L * rank * sum(a + b for a, b in linears) * 4
    logits = group * V * 4
    rows = min(PASS_TOKENS, (group + 1) * tokens) + prompt  # of the largest pass
    head = min(scoring.CHUNK_ROWS, rows) * V
    both = {
        "weights, NF4": weights // 2,
        "their scales: 1 byte per 64 weights, 4 per 64 x 256": weights // 64 + weights // (64 * 256) * 4,
        "embedding = head, bf16": V * D * 2,
        "adapters, fp32": (trained + frozen) * adapter,
        "AdamW's moments": trained * 2 * adapter,
    }
    rollout = {
        "merged copy of the weights, bf16": weights * 2,
        "keys and values, bf16": L * 2 * kv * 2 * group * (prompt + tokens),
        "logits and their distribution, fp32": 4 * logits,
        "the largest matrix while it is merged, fp32": 2 * 2 * D * I * 4,
    }
    training = {
        "gradients": trained * adapter,
        "inputs of the layers (checkpoints), bf16": L * rows * D * 2,
        "activations of one layer": int(kept * rows),
        "its temporaries: 4 of the MLP's width": 4 * rows * I * 2,
        "one dequantised weight": D * I * 2,
        "states before the head, bf16 and fp32, and their gradient": rows * D * 8,
        "a chunk of logits: fp32 twice, bf16 once": head * 10,
    }
    return {"rollout": both | rollout, "training": both | training}


def gpu_peak(*args, **kwargs):
    return max(sum(items.values()) for items in gpu_bytes(*args, **kwargs).values())


def gpu_table(kept, group=8):
    """The arithmetic for Qwen3-0.6B -> {"rows": {...}, the goals' ratios}, printed."""
    cases = {"GRAO or GRPO": 1, "PPO": 2}
    peaks = {
        name: {tokens: gpu_peak(group, tokens, kept, trained=trained) for tokens in (512, 1024)}
        for name, trained in cases.items()
    }
    print(
        f"\nArithmetic, not a measurement: Qwen3-0.6B, NF4, rank 16, G = {group}, "
        "policy + reference + reward model, MB"
    )
    for phase in ("rollout", "training"):
        columns = [gpu_bytes(group, tokens, kept)[phase] for tokens in (512, 1024)]
        print(f"  {phase:<62}{'512':>8}{'1024':>8} tokens")
        for item in columns[0]:
            print(f"    {item:<60}" + "".join(f"{c[item] / 1e6:8.0f}" for c in columns))
        print(f"    {'sum':<60}" + "".join(f"{sum(c.values()) / 1e6:8.0f}" for c in columns))
    ratios = {
        "1024 / 512 tokens": peaks["GRAO or GRPO"][1024] / peaks["GRAO or GRPO"][512],
        "PPO / GRPO": peaks["PPO"][512] / peaks["GRAO or GRPO"][512],
    }
    print(
        "  peak: "
        + ", ".join(f"{name} {p[512] / 1e9:.2f} and {p[1024] / 1e9:.2f} GB" for name, p in peaks.items())
        + "; "
        + ", ".join(f"{n} {r:.2f}" for n, r in ratios.items())
    )
    return {
        "bytes": {tokens: gpu_bytes(group, tokens, kept) for tokens in (512, 1024)},
        "peaks": peaks,
        "ratios": ratios,
        "activations_per_token_and_layer": kept,
    }


# ------------------------------------------------------------------------------------------------------------
# A role


def held_bytes(policy):
    modules = [policy.hf, *policy.heads.values()]
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for m in modules
        for x in [*m.parameters(), *m.buffers()]
    }
    return sum(storages.values())


def role_bytes(model):
    """What a further role adds to a loaded model: {"model", "role", "adapter and head"} in bytes."""
    policy = Policy.load(model)
    before = held_bytes(policy)
    parameters = policy.add_role("reward")
    return {
        "model": before,
        "role": held_bytes(policy) - before,
        "adapter and head": sum(p.numel() * p.element_size() for p in parameters.values()),
    }


def show_role(model):
    """role_bytes, printed."""
    sizes = role_bytes(model)
    print("one more role: " + ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items()))
    return sizes


# ------------------------------------------------------------------------------------------------------------
# The output head


def head_case(tokens, dtype, vocabulary=QWEN3["vocabulary"], width=QWEN3["width"]):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).mul_(0.02).to(dtype)
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=generator)


def chunked(hidden, weight, targets):
    logp, _ = scoring.ChunkedLogProb.apply(hidden, weight, None, targets, 1.0)
    return torch.autograd.grad(logp.sum(), hidden)[0]


def dense(hidden, weight, targets):
    logp = (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None])
    return torch.autograd.grad(logp.sum(), hidden)[0]


HEADS = {"chunked": chunked, "dense": dense}


def peak_growth(task):
    """(name, tokens, dtype, vocabulary, width) -> bytes by which this process's peak grows. Linux.

    In one forward and backward pass of the head.
    """
    name, tokens, dtype, *size = task
    case = head_case(tokens, getattr(torch, dtype), *size)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is held now
    before = peak_bytes()
    HEADS[name](*case)
    return peak_bytes() - before
