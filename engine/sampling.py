"""Sampling: our own decode loop over a 16-bit copy of the weights.

    rollout = Sampler(hf_model, eos_ids).generate(prompts, group_size=8, max_new_tokens=64, seed=0)

Where the speed comes from, largest first (the benchmark in plots/ measures each):
- drawing a token by inverting the cumulative distribution with one uniform number (torch.multinomial on a CPU
  takes longer than the whole model's forward pass at a vocabulary of 50,000);
- weights with LoRA merged in, q/k/v and gate/up as one matrix each, refreshed before every rollout
  (`LlamaDecoder`);
- a prompt is computed once and its keys and values are copied to its G samples;
- a preallocated KV cache; rows that met an EOS are dropped from the batch;
- on a GPU a position is one CUDA graph, and the host looks at what was drawn every few positions only.
Models outside the Llama family decode through transformers' own forward pass, with the same cache, unmerged.

Every row has its own uniform numbers, drawn before decoding, so a sample does not depend on what else is in
the batch. `plain_generate` below is the same in a plain loop; the tests hold the fast way to its tokens.
"""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.scoring import frozen_weight, plain_attention

KV_BYTES = 2**30  # the cache of one batch on a CPU; more rows than fit are decoded in several batches
ALMOST_1 = 1 - 2**-24  # the largest fp32 number below 1
LOGITS = 2**25  # rows x vocabulary of one batch, 128 MiB in fp32


@dataclass
class Rollout:
    completions: list  # B lists of G lists of token ids; the EOS is included where the answer ended
    logps: list  # same shape: log-probability (nats) of each token as the sampler saw it
    truncated: list  # B lists of G bools: True where max_new_tokens came before an EOS


class PromptCache:
    """Keys and values of B prompts, left-padded to P slots, while a forward pass reads them."""

    def __init__(self, valid, layers, dtype):
        """valid (B, P): False on the padding."""
        B, P = valid.shape
        self.kv, self.valid, self.length = [None] * layers, valid, P
        causal = torch.ones(P, P, dtype=torch.bool, device=valid.device).tril()
        # Padding sees itself: a softmax over nothing would be NaN and spread through the values.
        itself = torch.eye(P, dtype=torch.bool, device=valid.device)
        self.bias = attention_bias((causal & valid[:, None, None, :]) | itself, dtype)  # (B, 1, P, P)

    def attend(self, layer, q, k, v, scaling):
        """q (B, H, P, d), k and v (B, K, P, d) -> (B, P, H, d)."""
        self.kv[layer] = torch.stack([k, v])
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        return F.scaled_dot_product_attention(q, k, v, self.bias, scale=scaling).transpose(1, 2)


class Cache:
    """Keys and values of R rows in S slots. A position writes one slot of all rows; rows are left-padded, so
    their positions differ. The slot and who sees what are tensors: nothing here depends on the position but
    their values, so the same kernels on the same addresses do for every position (`Sampler.step`).
    """

    def __init__(self, prompts, group_size, room):
        """The samples' cache: each prompt of a PromptCache copied group_size times, `room` more slots."""
        (B, P), kv = prompts.valid.shape, []
        self.length = P + room
        slots = round_up(self.length, 8)
        for i, small in enumerate(prompts.kv):  # (2, B, K, P, d)
            heads, width = small.shape[2], small.shape[-1]
            large = small.new_zeros(2, B, group_size, heads, slots, width)
            large[..., :P, :] = small.unsqueeze(2)
            kv.append(large.flatten(1, 2))
            prompts.kv[i] = None
        self.kv = kv
        seen = F.pad(prompts.valid.repeat_interleave(group_size, 0), (0, slots - P), value=False)
        self.bias = attention_bias(seen[:, None, None, :], prompts.bias.dtype)  # (R, 1, 1, S)
        self.slot = torch.tensor([P], device=seen.device)  # where the next position goes
        self.end = P  # attention reads the slots before this one

    def attend(self, layer, q, k, v, scaling):
        """q (R, H, 1, d), k and v (R, K, 1, d) of the next position -> (R, 1, H, d)."""
        (rows, heads, _, width), (keys, values) = q.shape, self.kv[layer]
        keys.index_copy_(2, self.slot, k)
        values.index_copy_(2, self.slot, v)
        # One query for each head: heads that share keys become the query axis, so keys are not repeated.
        q = q.reshape(rows, k.shape[1], -1, width)
        keys, values, bias = keys[:, :, : self.end], values[:, :, : self.end], self.bias[..., : self.end]
        out = F.scaled_dot_product_attention(q, keys, values, bias, scale=scaling)
        return out.reshape(rows, 1, heads, width)

    def keep(self, rows):
        """Drop all rows but these (index tensor). A layer at a time: two whole caches at once would be the
        peak of a step.
        """
        for i, kv in enumerate(self.kv):
            self.kv[i] = kv.index_select(1, rows)
        self.bias = self.bias.index_select(0, rows)


def round_up(n, multiple):
    return -(-n // multiple) * multiple


def attention_bias(seen, dtype):
    """Booleans (..., S), True where seen -> what attention adds to its scores, 0 or -inf. A mask of booleans
    would be converted to this at every layer. Its rows begin at multiples of 8, or CUDA's kernel copies it.
    """
    S = seen.shape[-1]
    bias = torch.zeros(*seen.shape[:-1], round_up(S, 8), dtype=dtype, device=seen.device)[..., :S]
    return bias.masked_fill_(~seen, -torch.inf)


@dataclass
class Rows:
    """The rows of a batch: what `Sampler.step` reads and writes, all on the device."""

    cache: Cache
    uniform: torch.Tensor  # (R, T) the samples' random numbers
    tokens: torch.Tensor  # (R, T) what was drawn, and its log-probabilities, of all samples
    logps: torch.Tensor
    # And of the rows, fewer when samples have ended:
    place: torch.Tensor  # the next token's, in `tokens` and `logps` laid flat
    position: torch.Tensor  # the last token's
    token: torch.Tensor  # the last token
    running: torch.Tensor  # bool: no EOS yet

    def drop_ended(self):
        """Look which rows have met an EOS, for which the host waits, and drop them -> whether any are left.

        Dropping rows copies the cache, so several at a time.
        """
        left = int(self.running.sum())
        if 0 < left <= 0.8 * len(self.running):
            keep = self.running.nonzero()[:, 0]
            self.cache.keep(keep)
            for name in ("place", "position", "token", "running"):
                setattr(self, name, getattr(self, name).index_select(0, keep))
        return left > 0


class LlamaDecoder:
    """Llama, Qwen2, Qwen3 and Mistral over merged, fused weights; equal to transformers' up to rounding.

    hf: the transformers model with LoRA layers injected, whose active adapter is merged; 4-bit or not.
    """

    def __init__(self, hf):
        self.hf, self.model, config = hf, hf.base_model, hf.config
        self.dtype = self.model.embed_tokens.weight.dtype
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        self.groups = []  # for each layer: the fused linear layers and where they come from
        for layer in self.model.layers:
            a, m = layer.self_attn, layer.mlp
            qkv, gate_up = [a.q_proj, a.k_proj, a.v_proj], [m.gate_proj, m.up_proj]
            self.groups.append([qkv, [a.o_proj], gate_up, [m.down_proj]])
        self.qk_norms = []  # of each layer, (H + K, d): Qwen3 alone has them
        for layer in self.model.layers:
            if hasattr(layer.self_attn, "q_norm"):
                q, k = layer.self_attn.q_norm.weight, layer.self_attn.k_norm.weight
                self.qk_norms.append(torch.cat([q.expand(self.heads, -1), k.expand(self.kv_heads, -1)]))
        self.weights = None
        self.biases = [[self.fused_bias(g) for g in groups] for groups in self.groups]

    @staticmethod
    def supports(hf):
        config = hf.config
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        window = getattr(config, "use_sliding_window", config.model_type == "mistral")
        window = window and getattr(config, "sliding_window", None)
        known = config.model_type in ("llama", "qwen2", "qwen3", "mistral") and config.hidden_act == "silu"
        return known and rope in ("default", "linear", "llama3", "yarn") and not window

    @staticmethod
    def fused_bias(group):
        biases = [base_layer(p).bias for p in group]
        return None if biases[0] is None else torch.cat(biases)

    def refresh(self):
        """Merge the current adapters into the copy. In fp32, then rounded once."""
        self.weights = [
            [prepack(torch.cat([merged_weight(p).to(self.dtype) for p in group])) for group in groups]
            for groups in self.groups
        ]

    def release(self):
        """Give the copy's memory to training: the next rollout needs a new one anyway."""
        self.weights = None

    def forward(self, ids, positions, cache):
        """ids, positions (R, n) -> hidden states (R, n, D); keys and values go to the cache."""
        x = self.model.embed_tokens(ids)
        cos, sin = self.model.rotary_emb(x, positions)
        cos, sin = cos[:, None], half_negated(sin)[:, None]  # (R, 1, n, d)
        R, n = ids.shape
        for i, layer in enumerate(self.model.layers):
            (qkv, o, gate_up, down), (b_qkv, b_o, b_gate_up, b_down) = self.weights[i], self.biases[i]
            attention = layer.self_attn
            h = linear(self.norm(x, layer.input_layernorm), qkv, b_qkv).view(R, n, -1, self.width)
            qk, v = h.split([self.heads + self.kv_heads, self.kv_heads], 2)
            if self.qk_norms:  # Qwen3: one norm over all heads, v's unused, in place of two and two copies
                qk = F.rms_norm(h, (self.width,), None, self.eps)[:, :, : qk.shape[2]] * self.qk_norms[i]
            q, k = rotate(qk.transpose(1, 2), cos, sin).split([self.heads, self.kv_heads], 1)
            h = cache.attend(i, q, k, v.transpose(1, 2), attention.scaling)
            x = add_linear(x, h.reshape(R, n, -1), o, b_o)
            gate, up = linear(self.norm(x, layer.post_attention_layernorm), gate_up, b_gate_up).chunk(2, -1)
            x = add_linear(x, F.silu(gate) * up, down, b_down)
        return self.norm(x, self.model.norm)

    def norm(self, x, module):
        return F.rms_norm(x, x.shape[-1:], module.weight, self.eps)


class HFDecoder:
    """Any other model that takes an attention function by name: transformers' forward, adapters unmerged."""

    def __init__(self, hf):
        self.hf, self.model, config = hf, hf.base_model, hf.config
        self.dtype = hf.get_input_embeddings().weight.dtype
        self.kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def refresh(self):
        pass

    def release(self):
        pass

    def forward(self, ids, positions, cache):
        out = self.model(input_ids=ids, position_ids=positions, use_cache=False, layout=cache)
        return out.last_hidden_state


def prepack(weight: torch.Tensor) -> torch.Tensor:
    """On an x86 CPU, a weight (out, in) in oneDNN's blocked layout, for `linear`; elsewhere as it is.

    F.linear reads the plain layout at every call, and with the few rows of a decoded position that takes
    longer than multiplying: in fp32 on AVX2 packing took a rollout of 8 x 64 tokens from 20.6 s to 14.2.
    oneDNN multiplies bf16 only from AVX512 on (its presence alone says nothing), so there bf16 weights stay
    plain.
    """
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return weight
    packed = weight.dtype == torch.float32 and "AVX" in torch.backends.cpu.get_cpu_capability()
    packed |= weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()) if packed else weight


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b for a weight from `prepack`. Its slow twin is F.linear on the weight before packing."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def add_linear(x, h, weight, bias):
    """x (R, n, D) + h W^T + b; on a GPU into x itself, so that the sum is part of the product's kernel."""
    if x.is_cuda and bias is None:
        x.view(-1, x.shape[-1]).addmm_(h.view(-1, h.shape[-1]), weight.t())
        return x
    return x + linear(h, weight, bias)


def base_layer(module):
    return getattr(module, "base_layer", module)


def merged_weight(module: torch.nn.Module) -> torch.Tensor:
    """W + scaling * B A: a linear layer's weight with its active adapter, fp32, dequantised if it is NF4."""
    base = base_layer(module)
    weight = frozen_weight(base).float()
    if base is not module and not module.disable_adapters:
        (name,) = module.active_adapters
        A, B = module.lora_A[name].weight, module.lora_B[name].weight
        weight = torch.addmm(weight, B, A, alpha=module.scaling[name])
    return weight


def half_negated(sin):
    first, second = sin.chunk(2, -1)
    return torch.cat([-first, second], -1)


def rotate(x, cos, sin):
    """Rotary position embedding, halves convention (arXiv 2104.09864); sin from `half_negated`."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def draw(
    logits: torch.Tensor, temperature: float, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row from softmax(logits / temperature), by inverting its CDF, and its log-prob.

    logits (R, V), uniform (R,) in [0, 1) -> tokens (R,), logp (R,) fp32. temperature 0 takes the largest
    logit, logp at T = 1.
    """
    z = logits.float()
    if temperature not in (0, 1):
        z = z / temperature
    z = z - z.amax(-1, keepdim=True)
    cdf = z.exp().cumsum_(-1)  # unnormalised
    total = cdf[:, -1]
    if temperature == 0:
        tokens = z.argmax(-1)
    else:  # right=True never picks a token of probability 0
        tokens = torch.searchsorted(cdf, (uniform * total)[:, None], right=True)[:, 0]
        tokens.clamp_(max=z.shape[-1] - 1)
    return tokens, z.gather(-1, tokens[:, None])[:, 0] - total.log()


def uniforms(rows: int, tokens: int, seed: int) -> torch.Tensor:
    """The random numbers of a rollout, (rows, tokens) fp32 in [0, 1): the same whatever the device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, tokens, generator=generator, dtype=torch.float64).float().clamp_(max=ALMOST_1)


@torch.no_grad()
def plain_generate(
    hf: torch.nn.Module,
    eos_ids: list,
    prompts: list,
    group_size: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
) -> Rollout:
    """The slow twin of Sampler.generate: no cache, no batch, no merged weights, all text again at each token.

    hf: the transformers model, whose active adapter samples. The rest, and the tokens, as in Policy.generate.
    """
    uniform = uniforms(len(prompts) * group_size, max_new_tokens, seed).view(len(prompts), group_size, -1)
    rollout = Rollout([], [], [])
    for b, prompt in enumerate(prompts):
        completions, all_logps = [], []
        for g in range(group_size):
            ids, logps = [], []
            while len(ids) < max_new_tokens and not (ids and ids[-1] in eos_ids):
                with plain_attention(hf):
                    text = torch.tensor([prompt + ids], device=hf.device)
                    logits = hf(input_ids=text, use_cache=False).logits[0, -1].float()  # (V,)
                # temperature 0 is greedy, and its log-probability that at T = 1
                logp = (logits / (temperature or 1)).log_softmax(-1)
                # The token in whose share of [0, 1) the uniform number falls, the shares in the ids' order.
                ends = logp.exp().cumsum(-1).cpu()
                token = int((ends <= uniform[b, g, len(ids)]).sum()) if temperature else int(logits.argmax())
                ids.append(token)
                logps.append(float(logp[token]))
            completions.append(ids)
            all_logps.append(logps)
        rollout.completions.append(completions)
        rollout.logps.append(all_logps)
        rollout.truncated.append([ids[-1] not in eos_ids for ids in completions])
    return rollout


class Sampler:
    """hf: a transformers causal LM with scoring.shared_prefix_attention; eos_ids: ids that end an answer.

    look: positions between two looks at which rows have ended; reach: attention reads slots up to a multiple
    of this. Between, no shape changes and the host reads nothing, so a GPU is never waited for; rows that end
    go on unread until the next look. A CPU waits for nobody: 1 and 1 there, and nothing is computed in vain.
    graph: whether a GPU's step is captured in a CUDA graph, which launches its kernels as one.
    """

    def __init__(self, hf, eos_ids):
        self.hf = hf
        self.decoder = LlamaDecoder(hf) if LlamaDecoder.supports(hf) else HFDecoder(hf)
        self.device = hf.get_input_embeddings().weight.device
        self.eos = torch.tensor(eos_ids, device=self.device)
        self.graph = self.device.type == "cuda"
        self.look, self.reach = (8, 64) if self.device.type == "cuda" else (1, 1)

    @torch.no_grad()
    def generate(
        self, prompts: list, group_size: int, max_new_tokens: int, temperature: float, seed: int
    ) -> Rollout:
        """See policy.Policy.generate. The slow twin is `plain_generate`."""
        head = self.hf.get_output_embeddings()
        self.decoder.refresh()
        self.head, self.head_bias = prepack(head.weight.detach()), head.bias
        uniform = uniforms(len(prompts) * group_size, max_new_tokens, seed)
        at_once = self.prompts_at_once(max(map(len, prompts)) + max_new_tokens, group_size)
        rollout = Rollout([], [], [])
        for i in range(0, len(prompts), at_once):
            part = prompts[i : i + at_once]
            tokens, logps, lengths, ended = self.decode(
                part, group_size, temperature, uniform[i * group_size :][: len(part) * group_size]
            )
            for j in range(0, len(tokens), group_size):
                rows = range(j, j + group_size)
                rollout.completions.append([tokens[r, : lengths[r]].tolist() for r in rows])
                rollout.logps.append([logps[r, : lengths[r]].tolist() for r in rows])
                rollout.truncated.append([not ended[r] for r in rows])
        self.decoder.release()
        self.head = None
        return rollout

    def prompts_at_once(self, positions, group_size):
        """How many prompts are decoded together, so that their samples' cache and logits stay in bounds."""
        numbers = self.hf.config.num_hidden_layers * 2 * self.decoder.kv_heads * self.decoder.width
        rows = cache_bytes(self.device) // (numbers * self.decoder.dtype.itemsize * positions)
        return max(1, min(rows, LOGITS // self.hf.config.vocab_size) // group_size)

    def read_prompts(self, prompts, group_size, uniform):
        """Each prompt once -> of its samples: hidden state (R, D) at its end, Rows without a token yet."""
        lengths = torch.tensor([len(p) for p in prompts])
        P, (R, T) = int(lengths.max()), uniform.shape
        ids = torch.tensor([[0] * (P - len(p)) + p for p in prompts], device=self.device)
        valid = (torch.arange(P) >= (P - lengths)[:, None]).to(self.device)
        cache = PromptCache(valid, self.hf.config.num_hidden_layers, self.decoder.dtype)
        hidden = self.decoder.forward(ids, (valid.cumsum(-1) - 1).clamp_(min=0), cache)[:, -1]
        rows = Rows(
            cache=Cache(cache, group_size, T),
            uniform=uniform.to(self.device),
            tokens=torch.zeros(R, T, dtype=torch.long, device=self.device),
            logps=torch.zeros(R, T, device=self.device),
            place=torch.arange(0, R * T, T, device=self.device),
            position=(lengths.repeat_interleave(group_size) - 1).to(self.device),
            token=torch.zeros(R, dtype=torch.long, device=self.device),
            running=torch.ones(R, dtype=torch.bool, device=self.device),
        )
        return hidden.repeat_interleave(group_size, 0), rows

    def decode(self, prompts, group_size, temperature, uniform):
        """R = prompts x group_size rows -> tokens (R, T), logps (R, T), lengths (R,), ended (R,)."""
        T = uniform.shape[1]
        hidden, rows = self.read_prompts(prompts, group_size, uniform)
        self.draw_next(rows, hidden, temperature)
        cache, P, shape, replay = rows.cache, rows.cache.end, None, None
        for t in range(1, T):  # t tokens of every row are drawn
            if t % self.look == 0 and not rows.drop_ended():
                break
            cache.end = min(round_up(P + t, self.reach), cache.bias.shape[-1])
            if shape != (len(rows.token), cache.end):  # what was captured is of other shapes
                shape, replay = (len(rows.token), cache.end), None
            if replay:
                replay()
            else:
                self.step(rows, temperature)
                replay = self.capture(rows, temperature) if self.graph and t + 1 < T else None
        is_eos = torch.isin(rows.tokens, self.eos)
        # An unfinished row holds no EOS; in a finished one the first counts, whatever was drawn behind it.
        ended = is_eos.any(-1)
        lengths = torch.where(ended, is_eos.int().argmax(-1) + 1, T)
        return rows.tokens.cpu(), rows.logps.cpu(), lengths.tolist(), ended.tolist()

    def step(self, rows, temperature):
        """One more token of every row. All that it reads and writes has the same shape and place the next
        time, and the host reads nothing: only so can a CUDA graph replay it.
        """
        cache = rows.cache
        cache.bias.index_fill_(-1, cache.slot, 0.0)
        rows.position.add_(1)
        hidden = self.decoder.forward(rows.token[:, None], rows.position[:, None], cache)[:, -1]
        cache.slot.add_(1)
        self.draw_next(rows, hidden, temperature)

    def draw_next(self, rows, hidden, temperature):
        """hidden (R, D) at each row's end -> its next token, drawn and written down."""
        logits = linear(hidden.to(self.head.dtype), self.head, self.head_bias)
        token, logp = draw(logits, temperature, rows.uniform.take(rows.place))
        rows.token.copy_(token)
        rows.tokens.view(-1).index_copy_(0, rows.place, token)
        rows.logps.view(-1).index_copy_(0, rows.place, logp)
        rows.running.logical_and_((token[:, None] != self.eos).all(-1))
        rows.place.add_(1)

    def capture(self, rows, temperature):
        """The step as one CUDA graph -> the function that replays it; None, with one line, where that fails.

        Capturing runs nothing. It follows a step that was run, so what kernels set up once is set up.
        """
        try:
            graph = torch.cuda.CUDAGraph()
            # A capture that fails leaves its own stream the current one; the outer context puts ours back.
            with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream()):
                with torch.cuda.graph(graph):
                    self.step(rows, temperature)
        except Exception as error:  # of the driver, of a model that waits: no reason not to sample
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            print(f"decoding without a CUDA graph: {reason}", file=sys.stderr)
            self.graph = False
            return None
        return graph.replay


def cache_bytes(device):
    """Bound on the cache of one batch: KV_BYTES, on CUDA half of what is free there and not in use."""
    if device.type != "cuda":
        return KV_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, kept
    return (free + unused) // 2
