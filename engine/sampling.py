"""Sampling: our own decode loop over a 16-bit copy of the weights.

    rollout = Sampler(hf_model, eos_ids).generate(prompts, group_size=8, max_new_tokens=64, seed=0)

Where the speed comes from, largest first (the benchmark in plots/ measures each):
- drawing a token by inverting the cumulative distribution with one uniform number (torch.multinomial on a CPU
  takes longer than the whole model's forward pass at a vocabulary of 50,000);
- weights with LoRA merged in, q/k/v and gate/up as one matrix each, refreshed before every rollout
  (`LlamaDecoder`);
- a prompt is computed once and its keys and values are copied to its G samples;
- a preallocated KV cache; rows that met an EOS are dropped from the batch.
Models outside the Llama family decode through transformers' own forward pass, with the same cache, unmerged.

Every row has its own uniform numbers, drawn before decoding, so a sample does not depend on what else is in
the batch. `plain_generate` below is the same in a plain loop; the tests hold the fast way to its tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.scoring import frozen_weight, plain_attention

KV_BYTES = 2**30  # the cache of one batch; more rows than fit are decoded in several batches
ALMOST_1 = 1 - 2**-24  # the largest fp32 number below 1
LOGITS = 2**25  # rows x vocabulary of one batch, 128 MiB in fp32


@dataclass
class Rollout:
    completions: list  # B lists of G lists of token ids; the EOS is included where the answer ended
    logps: list  # same shape: log-probability (nats) of each token as the sampler saw it
    truncated: list  # B lists of G bools: True where max_new_tokens came before an EOS


class Cache:
    """Keys and values of R rows and S slots. Rows are left-padded: one slot for all, positions differ."""

    def __init__(self, layers, rows, heads, slots, width, dtype, device):
        self.kv = [
            torch.zeros(2, rows, heads, slots, width, dtype=dtype, device=device) for _ in range(layers)
        ]
        self.slot, self.length = 0, slots
        self.mask = None  # (R, S) bool, False on left padding; None if there is none

    def attend(self, layer, q, k, v, scaling):
        """q (R, H, n, d), k and v (R, K, n, d) of the next n positions -> (R, n, H, d); n > 1: a prompt."""
        (rows, _, n, _), end = q.shape, self.slot + q.shape[2]
        keys, values = self.kv[layer]
        keys[:, :, self.slot : end], values[:, :, self.slot : end] = k, v
        repeat = q.shape[1] // k.shape[1]
        if n > 1:
            causal = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
            if self.mask is not None:
                # Padding sees itself: a softmax over nothing would be NaN and spread through the values.
                itself = torch.eye(n, dtype=torch.bool, device=q.device)
                causal = (causal & self.mask[:, None, None, :n]) | itself
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
            out = F.scaled_dot_product_attention(q, k, v, causal, scale=scaling)
        else:
            # One query for each head: heads that share keys become the query axis, so keys are not repeated.
            mask = None if self.mask is None else self.mask[:, None, None, :end]
            q = q.reshape(rows, k.shape[1], repeat, -1)
            out = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], mask, scale=scaling)
            out = out.reshape(rows, -1, 1, v.shape[-1])
        return out.transpose(1, 2)

    def fan_out(self, group_size, slots):
        """The cache of the samples: each prompt copied group_size times, with room for `slots` positions."""
        _, rows, heads, length, width = self.kv[0].shape
        big = Cache(len(self.kv), rows * group_size, heads, slots, width, self.kv[0].dtype, self.kv[0].device)
        for small, large in zip(self.kv, big.kv):
            large.view(2, rows, group_size, heads, slots, width)[..., :length, :] = small.unsqueeze(2)
        if self.mask is not None:
            big.mask = F.pad(self.mask.repeat_interleave(group_size, 0), (0, slots - length), value=True)
        big.slot = self.slot
        return big

    def keep(self, rows):
        """Drop all rows but these (index tensor). A layer at a time: two whole caches at once would be the
        peak of a step.
        """
        for i, kv in enumerate(self.kv):
            self.kv[i] = kv.index_select(1, rows)
        self.mask = None if self.mask is None else self.mask.index_select(0, rows)


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
        cos, sin = cos[:, None], sin[:, None]  # (R, 1, n, d)
        R, n = ids.shape
        for i, layer in enumerate(self.model.layers):
            (qkv, o, gate_up, down), (b_qkv, b_o, b_gate_up, b_down) = self.weights[i], self.biases[i]
            attention = layer.self_attn
            h = linear(self.norm(x, layer.input_layernorm), qkv, b_qkv).view(R, n, -1, self.width)
            qk, v = h.split([self.heads + self.kv_heads, self.kv_heads], 2)
            if hasattr(attention, "q_norm"):  # Qwen3
                q, k = qk.split([self.heads, self.kv_heads], 2)
                qk = torch.cat([self.norm(q, attention.q_norm), self.norm(k, attention.k_norm)], 2)
            q, k = rotate(qk.transpose(1, 2), cos, sin).split([self.heads, self.kv_heads], 1)
            h = cache.attend(i, q, k, v.transpose(1, 2), attention.scaling)
            x = x + linear(h.reshape(R, n, -1), o, b_o)
            gate, up = linear(self.norm(x, layer.post_attention_layernorm), gate_up, b_gate_up).chunk(2, -1)
            x = x + linear(F.silu(gate) * up, down, b_down)
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


def rotate(x, cos, sin):
    """Rotary position embedding, halves convention (arXiv 2104.09864)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


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
    """hf: a transformers causal LM with scoring.shared_prefix_attention; eos_ids: ids that end an answer."""

    def __init__(self, hf, eos_ids):
        self.hf = hf
        self.decoder = LlamaDecoder(hf) if LlamaDecoder.supports(hf) else HFDecoder(hf)
        self.device = hf.get_input_embeddings().weight.device
        self.eos = torch.tensor(eos_ids, device=self.device)

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
        rows = KV_BYTES // (numbers * self.decoder.dtype.itemsize * positions)
        return max(1, min(rows, LOGITS // self.hf.config.vocab_size) // group_size)

    def read_prompts(self, prompts, group_size, room):
        """Each prompt once -> of all samples: hidden state (R, D), cache with `room` slots, position (R,)."""
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        P = int(lengths.max())
        ids = torch.tensor([[0] * (P - len(p)) + p for p in prompts], device=self.device)
        valid = torch.arange(P, device=self.device) >= (P - lengths)[:, None]
        layers, heads, width = self.hf.config.num_hidden_layers, self.decoder.kv_heads, self.decoder.width
        cache = Cache(layers, len(prompts), heads, P, width, self.decoder.dtype, self.device)
        cache.mask = None if bool(valid.all()) else valid
        hidden = self.decoder.forward(ids, (valid.cumsum(-1) - 1).clamp_(min=0), cache)[:, -1]
        cache.slot = P
        cache = cache.fan_out(group_size, P + room)
        return hidden.repeat_interleave(group_size, 0), cache, lengths.repeat_interleave(group_size)

    def decode(self, prompts, group_size, temperature, uniform):
        """R = prompts x group_size rows -> tokens (R, T), logps (R, T), lengths (R,), ended (R,)."""
        R, T = uniform.shape
        hidden, cache, position = self.read_prompts(prompts, group_size, T)
        uniform = uniform.to(self.device)
        tokens = torch.zeros(R, T, dtype=torch.long, device=self.device)
        logps = torch.zeros(R, T, device=self.device)
        alive = torch.arange(R, device=self.device)  # which sample each row of the batch is
        running = torch.ones(R, dtype=torch.bool, device=self.device)  # of the rows of the batch
        for t in range(T):
            logits = linear(hidden.to(self.head.dtype), self.head, self.head_bias)
            token, logp = draw(logits, temperature, uniform[alive, t])
            tokens[alive[running], t], logps[alive[running], t] = token[running], logp[running]
            running &= ~torch.isin(token, self.eos)
            left = int(running.sum())
            if left == 0 or t == T - 1:
                break
            if left <= 0.8 * len(running):  # dropping rows copies the cache, so several at a time
                keep = running.nonzero()[:, 0]
                cache.keep(keep)
                alive, token, position, running = alive[keep], token[keep], position[keep], running[keep]
            hidden = self.decoder.forward(token[:, None], position[:, None], cache)[:, -1]
            cache.slot += 1
            position = position + 1
        is_eos = torch.isin(tokens, self.eos)
        # An unfinished row holds no EOS; zeros after a finished row's EOS do not matter even where 0 is an
        # EOS id, the first one counts.
        ended = is_eos.any(-1)
        lengths = torch.where(ended, is_eos.int().argmax(-1) + 1, T)
        return tokens.cpu(), logps.cpu(), lengths.tolist(), ended.tolist()
