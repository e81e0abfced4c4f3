"""Scoring: log-probabilities of given completions, with gradient, at the price of their own tokens alone.

1. A *group* is a prompt with its G completions. `Pack` lays groups out as one ragged row of tokens, every
   prompt once, no padding; `shared_prefix_attention` lets each completion see its own prompt and its own
   past. Any transformers model that takes an attention function by name is scored this way, so linear layers
   spend nothing on padding or on a prompt repeated G times.
2. `ChunkedLogProb` takes hidden states through the output head a few rows at a time. d logp / d hidden =
   (W[y] - sum_v p_v W_v) / T is known in the forward pass, so it is computed there, and the backward pass
   only scales it: nothing is recomputed.
3. `LoraLinear` is a linear layer with LoRA as one operation with its backward pass written out: no casts of
   activations to the adapters' fp32, no scaled or added temporaries, and a 4-bit weight is dequantised when
   needed and never kept.

policy.Policy.token_logps puts them together. `plain_token_logps` below is the same in fifteen plain lines,
slow and as large as the vocabulary: read it first; the tests hold the fast way to its values and its
gradients.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data import UserError

# On a CPU plain matrix products beat the fused kernel, whose backward pass is 3 times slower there, for so
# many queries, or queries x keys.
SHORT, SMALL = 128, 2**16
# Tokens at once in the output head: 111 MiB of fp32 logits at a vocabulary of 151,936. Fewer would read the
# head's weights too often; more gain nothing at 151,936 and cost a sixth of the head's time at 49,152, where
# a chunk leaves the cache.
CHUNK_ROWS = 192


# ------------------------------------------------------------------------------------------------------------
# The slow twin


def plain_token_logps(
    hf: torch.nn.Module, prompts: list, completions: list, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Policy.token_logps as one would write it first -> logps (nats, with gradient) and mask, both (B, G, T).

    hf: the transformers model, whose active adapter scores. prompts: B lists of token ids; completions: B
    lists of G lists of ids. Every prompt is read G times, padding is computed, and the logits are as large as
    tokens x vocabulary.
    """
    B, G = len(prompts), len(completions[0])
    pairs = [(prompt, c) for prompt, group in zip(prompts, completions) for c in group]
    L, T = max(len(p) + len(c) for p, c in pairs), max(len(c) for _, c in pairs)
    # Padded on the right: a token sees only what stands before it, so no mask is needed.
    ids = torch.tensor([p + c + [0] * (L - len(p) - len(c)) for p, c in pairs], device=hf.device)  # (B*G, L)
    with plain_attention(hf):
        logits = hf(input_ids=ids, use_cache=False).logits.float() / temperature  # (B*G, L, V)
    # The logits at one position predict the token at the next.
    logps = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]  # (B*G, L - 1)
    rows = [F.pad(row[len(p) - 1 :][: len(c)], (0, T - len(c))) for row, (p, c) in zip(logps, pairs)]
    mask = torch.tensor([[t < len(c) for t in range(T)] for _, c in pairs], device=hf.device)
    return torch.stack(rows).view(B, G, T), mask.view(B, G, T)


@contextlib.contextmanager
def plain_attention(hf: torch.nn.Module) -> Iterator[None]:
    """Within the block the model has transformers' own attention: whole padded texts, and no `layout`."""
    hf.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        hf.set_attn_implementation("shared_prefix")


# ------------------------------------------------------------------------------------------------------------
# Log-probabilities without a tokens x vocabulary matrix


class ChunkedLogProb(torch.autograd.Function):
    """log softmax(h W^T / T)[target] and the entropy of that softmax, a chunk of rows at a time.

    hidden (N, D), weight (V, D), bias (V,) or None, targets (N,) -> logp (N,), entropy (N,), both fp32, nats
    (fp64 for fp64 input). Gradient reaches `hidden` only: the head is frozen. The entropy is for logging and
    has no gradient.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature):
        precise = torch.promote_types(hidden.dtype, torch.float32)
        logp = hidden.new_empty(len(hidden), dtype=precise)
        entropy = torch.empty_like(logp)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Every chunk works in the same three matrices, which are the peak of a step at a large vocabulary.
        low = hidden.new_empty(min(CHUNK_ROWS, len(hidden)), len(weight))
        full = low if low.dtype == precise else torch.empty_like(low, dtype=precise)
        exp = torch.empty_like(full)
        for i in range(0, len(hidden), CHUNK_ROWS):
            chunk, y = slice(i, i + CHUNK_ROWS), targets[i : i + CHUNK_ROWS]
            x, z, e = low[: len(y)], full[: len(y)], exp[: len(y)]  # (rows, V)
            torch.mm(hidden[chunk], weight.T, out=x)
            z.copy_(x)
            if bias is not None:
                z.add_(bias)
            if temperature != 1:
                z.div_(temperature)
            z.sub_(z.amax(-1, keepdim=True))  # logits, shifted so that the largest is 0
            total = torch.exp(z, out=e).sum(-1)
            logp[chunk] = z.gather(-1, y[:, None])[:, 0] - total.log()
            entropy[chunk] = total.log() - z.mul_(e).sum(-1) / total  # log sum e^z - sum p z
            if grad is not None:
                mean = (x.copy_(e) @ weight) / total[:, None]  # sum_v p_v W_v
                grad[chunk] = (weight[y] - mean) / temperature
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, _):
        (grad,) = ctx.saved_tensors
        return grad * grad_logp[:, None].to(grad.dtype), None, None, None, None


# ------------------------------------------------------------------------------------------------------------
# A linear layer with LoRA


class LoraLinear(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T with W frozen (LoRA, arXiv 2106.09685).

    x (N, in); A (r, in) and B (out, r) in fp32. `weight` returns W (out, in) in x's dtype; it is called again
    in the backward pass, so a dequantised copy need not be kept.
    """

    @staticmethod
    def forward(ctx, x, A, B, scaling, weight, bias):
        a, b = A.to(x.dtype), (B * scaling).to(x.dtype)
        xa = x @ a.T  # (N, r)
        ctx.save_for_backward(x, xa, a, b)
        ctx.scaling, ctx.weight, ctx.precise = scaling, weight, A.dtype
        return F.linear(x, weight(), bias).addmm_(xa, b.T)

    @staticmethod
    def backward(ctx, dy):
        x, xa, a, b = ctx.saved_tensors
        dxa = dy @ b  # (N, r)
        dx = (dy @ ctx.weight()).addmm_(dxa, a) if ctx.needs_input_grad[0] else None
        dA = (dxa.T @ x).to(ctx.precise) if ctx.needs_input_grad[1] else None
        dB = (dy.T @ xa).to(ctx.precise) * ctx.scaling if ctx.needs_input_grad[2] else None
        return dx, dA, dB, None, None, None


def frozen_weight(base: torch.nn.Module) -> torch.Tensor:
    """The weight of a frozen linear layer as a matrix in its compute type; NF4 is dequantised."""
    if isinstance(base, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    return base.weight


def lora_forward(layer, x, *args, **kwargs):
    """Takes the place of a PEFT LoRA layer's forward; the layer itself says which adapter is active."""
    base = layer.base_layer
    rows = x.reshape(-1, x.shape[-1])
    if layer.disable_adapters:
        y = F.linear(rows, frozen_weight(base), base.bias)
    else:
        (name,) = layer.active_adapters
        A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
        y = LoraLinear.apply(rows, A, B, layer.scaling[name], partial(frozen_weight, base), base.bias)
    return y.view(*x.shape[:-1], -1)


# ------------------------------------------------------------------------------------------------------------
# A ragged batch of prompt groups


class Pack:
    """B prompts with G completions each, as one row of N tokens: prompts, then completions, nothing padded.

    prompts: B lists of token ids; completions: B lists of G lists of token ids (none empty; they hold their
    EOS). `source` (B*G, T) is the row whose hidden state predicts each completion token (the prompt's last
    row for the first one), `last` (B*G,) the row of each completion's last token, `mask` (B*G, T) its
    validity, from lengths and never from token ids. ValueError for groups of different sizes or without
    tokens.
    """

    # Two prompts, p of 2 tokens and q of 1, with two completions each: a (2), b (1); c (1), d (2).
    #
    #     row         0   1   2   3   4   5   6   7   8
    #     ids         p0  p1  q0  a0  a1  b0  c0  d0  d1      prompts first, then completions in order: N = 9
    #     positions   0   1   0   2   3   2   1   1   2       a and b both go on where p ends
    #
    #     p_index  [[0, 1], [2, .]]                  (B, P)     "." is no token: it points at row 0
    #     c_index  [[3, 4], [5, .], [6, .], [7, 8]]  (B*G, T)
    #     source   [[1, 3], [1, .], [2, .], [2, 7]]  (B*G, T)   a0 is predicted at p1, a1 at a0
    #     last     [4, 5, 6, 8]                      (B*G,)
    #
    # Who sees whom (x), in the two products of `attend`: prompts among themselves, and each completion its
    # prompt and its own past. b never sees a, nor c anything of p: as many products as the texts alone would
    # take, less the G - 1 repetitions of every prompt.
    #
    #         p0 p1       q0         p0 p1 a0 a1      p0 p1 b0      q0 c0      q0 d0 d1
    #     p0  x       q0  x      a0  x  x  x      b0  x  x  x   c0  x  x   d0  x  x
    #     p1  x  x               a1  x  x  x  x                            d1  x  x  x
    #
    # The four squares of completions are `attend_mask` (B*G, 1, T, P + T), all of one size, with the slots
    # beyond a sequence's end switched off; `back` (N,) takes the results from the squares into the row.

    def __init__(self, prompts: list, completions: list, device: torch.device | str):
        check_groups(prompts, completions)
        self.B, self.G = len(prompts), len(completions[0])
        flat = [c for group in completions for c in group]  # B*G lists of ids
        p_len = torch.tensor([len(p) for p in prompts])
        c_len = torch.tensor([len(c) for c in flat])
        P, T = int(p_len.max()), int(c_len.max())
        p_of = torch.arange(self.B).repeat_interleave(self.G)  # the prompt of each completion

        # 1) The row of tokens, where each text starts in it, and which slots of the squares are tokens.
        ids = torch.tensor([[t for text in [*prompts, *flat] for t in text]], device=device)  # (1, N)
        p_start = p_len.cumsum(0) - p_len
        c_start = p_len.sum() + c_len.cumsum(0) - c_len
        p_mask = torch.arange(P) < p_len[:, None]  # (B, P)
        c_mask = torch.arange(T) < c_len[:, None]  # (B*G, T)

        # 2) Positions: a completion goes on counting where its prompt ends.
        p_position = torch.arange(P).expand(self.B, P)
        c_position = torch.arange(T) + p_len[p_of, None]
        positions = torch.cat([p_position[p_mask], c_position[c_mask]])[None]

        # 3) From squares to the row and back. Slots beyond a sequence's end point at row 0: attention reads
        #    them, its mask or causality hides them, nobody writes them back.
        p_index = torch.where(p_mask, p_start[:, None] + p_position, 0)  # (B, P)
        c_index = torch.where(c_mask, c_start[:, None] + torch.arange(T), 0)  # (B*G, T)
        p_back = torch.arange(self.B * P).view(self.B, P)[p_mask]
        c_back = self.B * P + torch.arange(c_mask.numel()).view_as(c_mask)[c_mask]

        # 4) What predicts what: the prompt's end each completion's first token, a token the one behind it.
        prompt_end = (p_start + p_len - 1)[p_of, None]
        source = torch.where(c_mask, torch.cat([prompt_end, c_index[:, :-1]], 1), 0)

        # 5) Who sees whom: a completion's token its prompt and its own past, (B*G, 1, T, P + T).
        see_prompt = p_mask[p_of, None, :].expand(-1, T, P)
        see_past = torch.ones(T, T, dtype=torch.bool).tril().expand(len(flat), T, T)

        self.length = P + T
        self.ids, self.positions, self.p_of = ids, positions.to(device), p_of.to(device)
        self.p_index, self.c_index = p_index.to(device), c_index.to(device)
        self.source, self.last = source.to(device), (c_start + c_len - 1).to(device)
        self.mask, self.back = c_mask.to(device), torch.cat([p_back, c_back]).to(device)
        self.attend_mask = torch.cat([see_prompt, see_past], -1)[:, None].to(device)
        self.targets = ids[0][self.c_index]  # (B*G, T)

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        """One number for each completion token, in the order of `mask` -> (B, G, T), 0 elsewhere."""
        zeros = torch.zeros(self.mask.shape, dtype=x.dtype, device=x.device)
        return zeros.masked_scatter(self.mask, x).view(self.B, self.G, -1)

    def attend(self, layer, q, k, v, scaling):
        """q (1, H, N, d), k and v (1, K, N, d) -> (1, N, H, d): attention within each group."""
        q, k, v = q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1)  # (N, heads, d)

        def square(x, index):  # (N, heads, d) -> (*index.shape, heads, d)
            # index_select's backward is an index_add, much faster than that of x[index].
            return x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:])

        def heads_first(x):  # (S, L, heads, d) -> (S, heads, L, d)
            return x.transpose(1, 2)

        k_prompt, v_prompt = square(k, self.p_index), square(v, self.p_index)  # (B, P, K, d)
        q_prompt = heads_first(square(q, self.p_index))
        # (B, H, P, d), each prompt once
        prompt = attention(q_prompt, heads_first(k_prompt), heads_first(v_prompt), None, scaling)

        # (B*G, P + T, K, d)
        k_all = torch.cat([k_prompt.index_select(0, self.p_of), square(k, self.c_index)], 1)
        v_all = torch.cat([v_prompt.index_select(0, self.p_of), square(v, self.c_index)], 1)
        q_completion = heads_first(square(q, self.c_index))
        completion = attention(
            q_completion, heads_first(k_all), heads_first(v_all), self.attend_mask, scaling
        )  # (B*G, H, T, d)

        out = [x.transpose(1, 2).flatten(0, 1) for x in (prompt, completion)]
        return torch.cat(out).index_select(0, self.back)[None]  # (B*P + B*G*T, H, d) -> (1, N, H, d)


def check_groups(prompts, completions):
    """ValueError unless there are as many groups as prompts, all of one size, and every text has a token."""
    sizes = {len(group) for group in completions}
    if len(prompts) != len(completions) or len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"{len(prompts)} prompts need as many groups of one size, "
            f"got {len(completions)} of sizes {sorted(sizes)}"
        )
    if not all(prompts) or not all(c for group in completions for c in group):
        raise ValueError("a prompt or a completion has no tokens")


def attention(q, k, v, mask, scaling):
    """softmax(q k^T scaling) v -> (S, H, L, d).

    q (S, H, L, d); k and v (S, K, L', d), each for H / K heads; mask (S, 1, L, L'), True where seen, or None:
    causal, and L = L'.
    """
    (S, H, L, d), (_, K, keys, _) = q.shape, k.shape
    if q.device.type != "cpu" or (L > SHORT and L * keys > SMALL):
        k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling)
    if mask is None:
        mask = torch.ones(L, L, dtype=torch.bool, device=q.device).tril()
    unseen = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
    # The heads that share keys become more queries of one head: keys are not repeated, nor their gradients
    # summed.
    scores = (q.reshape(S, K, -1, d) @ k.transpose(-1, -2)).view(S, H, L, keys)
    scores = torch.add(unseen, scores, alpha=d**-0.5 if scaling is None else scaling)
    weights = scores.softmax(-1)  # in bf16, too, torch sums in fp32
    return (weights.view(S, K, -1, keys) @ v).view(S, H, L, d)


def shared_prefix_attention(module, query, key, value, attention_mask, *, layout, scaling=None, **kwargs):
    """transformers' attention interface (its documentation, "Attention interface").

    `layout`, a Pack or a sampler's KV cache, knows who sees whom; attention_mask is not read.
    """
    window = kwargs.get("sliding_window")
    if (window and layout.length > window) or kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise UserError(
            f"{type(module).__name__} uses a sliding window shorter than the text, soft-capping or sinks: "
            "not supported"
        )
    return layout.attend(module.layer_idx, query, key, value, scaling), None


ALL_ATTENTION_FUNCTIONS.register("shared_prefix", shared_prefix_attention)


@torch.no_grad()
def packing_error(hf: torch.nn.Module, words: list) -> float:
    """How far states of two texts in one Pack are from those that each has alone, with the model's own
    attention.

    Relative, of the norms. Where it is not small, tokens reach each other past the attention function
    (convolutions, recurrences, ALiBi), and every score would be wrong without a number that looks it. words:
    token ids of a text.
    """
    texts = [(words * 6)[:6], (words[::-1] * 6)[:6]]
    pack = Pack([t[:3] for t in texts], [[t[3:]] for t in texts], hf.device)
    packed = hf.base_model(input_ids=pack.ids, position_ids=pack.positions, use_cache=False, layout=pack)
    # (1, 12, D): both prompts, then both completions -> both texts.
    packed = packed.last_hidden_state.view(2, 2, 3, -1).transpose(0, 1).flatten(1, 2).float()
    with plain_attention(hf):
        alone = hf.base_model(input_ids=torch.tensor(texts, device=hf.device), use_cache=False)
    alone = alone.last_hidden_state.float()
    return float((packed - alone).norm() / alone.norm())


@dataclass
class Scored:
    """What the policy thinks of given completions; every field (B, G, T), 0 where mask is False."""

    # log pi(o_t | q, o_<t) at the sampling temperature, nats, with gradient unless under no_grad
    logps: torch.Tensor
    mask: torch.Tensor  # bool, True on completion tokens, EOS included
    entropy: torch.Tensor  # of the next-token distribution, nats, detached

    def sequence_mean(self) -> torch.Tensor:
        """(B, G): 1/|o| sum_t log pi(o_t), the length-normalised log-likelihood (GRAO's J_expl, J_imit)."""
        return self.logps.sum(-1) / self.mask.sum(-1)

    def samples(self) -> "Scored":
        """Without the last completion of every group, where that is the expert answer."""
        longest = int(self.mask[:, :-1].sum(-1).max())
        return Scored(*(x[:, :-1, :longest] for x in (self.logps, self.mask, self.entropy)))
