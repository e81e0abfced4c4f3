"""The policy: one frozen backbone, LoRA adapters as roles, sampling, and log-probabilities that never hold tokens x vocabulary.

    policy = Policy.load("tiny", quantize="nf4")                       # or a hub name, a local directory, a GGUF file
    prompts = [policy.encode_prompt("list 3 animals")]                 # token ids
    rollout = policy.generate(prompts, group_size=8, max_new_tokens=24, seed=0)
    scored = policy.token_logps(prompts, rollout.completions)          # (B, G, T), with gradient
    policy.save("adapter")                                             # PEFT format

Three ideas carry the file.
1. A *group* is a prompt with its G completions. `Pack` lays groups out as one ragged row of tokens, every prompt once, no padding;
   `shared_prefix_attention` lets each completion see its own prompt and its own past. Any transformers model that takes an attention
   function by name is scored this way, so linear layers spend nothing on padding or on a prompt repeated G times.
2. `ChunkedLogProb` takes hidden states through the output head a few rows at a time. d logp / d hidden = (W[y] - sum_v p_v W_v) / T
   is known in the forward pass, so it is computed there, and the backward pass only scales it: nothing is recomputed.
3. `sampling.Sampler` decodes from a 16-bit copy of the weights with LoRA merged in; the difference to the scored probabilities is logged.

Adapters are fp32 whatever the backbone; dropout is off everywhere, so the ratio of new to old probabilities is 1 before an update.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data import UserError
from sampling import Rollout, Sampler

TINY = Path(__file__).parent / "data" / "tiny"
CHUNK_LOGITS = 2**25  # logits alive at once in the output head: 128 MiB in fp32, about 220 tokens of a 151,936 vocabulary

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


# ---------------------------------------------------------------------------------------------------------------------------------
# Log-probabilities without a tokens x vocabulary matrix


class ChunkedLogProb(torch.autograd.Function):
    """log softmax(h W^T / T)[target] and the entropy of that softmax, a chunk of rows at a time.

    hidden (N, D), weight (V, D), bias (V,) or None, targets (N,) -> logp (N,), entropy (N,), both fp32, nats (fp64 for fp64 input).
    Gradient reaches `hidden` only: the head is frozen. The entropy is for logging and has no gradient.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature):
        precise = torch.promote_types(hidden.dtype, torch.float32)
        logp = hidden.new_empty(len(hidden), dtype=precise)
        entropy = torch.empty_like(logp)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = max(1, CHUNK_LOGITS // len(weight))
        for i in range(0, len(hidden), rows):
            chunk, y = slice(i, i + rows), targets[i : i + rows]
            logits = F.linear(hidden[chunk], weight, bias).to(precise).div_(temperature)  # (rows, V)
            lse = logits.logsumexp(-1)
            logp[chunk] = logits.gather(-1, y[:, None])[:, 0] - lse
            p = (logits - lse[:, None]).exp_()
            entropy[chunk] = lse - torch.linalg.vecdot(p, logits)
            if grad is not None:
                grad[chunk] = (weight[y] - p.to(weight.dtype) @ weight) / temperature
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, _):
        (grad,) = ctx.saved_tensors
        return grad * grad_logp[:, None].to(grad.dtype), None, None, None, None


# ---------------------------------------------------------------------------------------------------------------------------------
# A ragged batch of prompt groups


class Pack:
    """B prompts with G completions each, as one row of N tokens: all prompts, then all completions, nothing padded.

    prompts: B lists of token ids; completions: B lists of G lists of token ids (none empty; they hold their EOS).
    `source` (B*G, T) is the row whose hidden state predicts each completion token (the prompt's last row for the first one), `last`
    (B*G,) the row of each completion's last token, `mask` (B*G, T) its validity, from lengths and never from token ids.
    """

    def __init__(self, prompts, completions, device):
        groups = {len(group) for group in completions}
        if len(prompts) != len(completions) or len(groups) != 1:
            raise ValueError(f"{len(prompts)} prompts need as many groups of one size, got {len(completions)} of sizes {sorted(groups)}")
        if not all(prompts) or not all(c for group in completions for c in group):
            raise ValueError("a prompt or a completion has no tokens")
        self.B, self.G = len(prompts), groups.pop()
        flat = [c for group in completions for c in group]
        self.ids = torch.tensor([[t for seq in [*prompts, *flat] for t in seq]], device=device)  # (1, N)
        p_len = torch.tensor([len(p) for p in prompts])
        c_len = torch.tensor([len(c) for c in flat])
        P, T = int(p_len.max()), int(c_len.max())
        p_start = p_len.cumsum(0) - p_len
        c_start = p_len.sum() + c_len.cumsum(0) - c_len
        p_mask = torch.arange(P) < p_len[:, None]  # (B, P)
        c_mask = torch.arange(T) < c_len[:, None]  # (B*G, T)
        p_of = torch.arange(self.B).repeat_interleave(self.G)  # the prompt of each completion
        p_pos = torch.arange(P).expand(self.B, P)
        c_pos = torch.arange(T) + p_len[p_of, None]
        positions = torch.cat([p_pos[p_mask], c_pos[c_mask]])[None]
        # Slots beyond a sequence's end point at row 0: attention reads them, its mask or causality hides them, nobody writes them back.
        p_index = torch.where(p_mask, p_start[:, None] + p_pos, 0)  # (B, P)
        c_index = torch.where(c_mask, c_start[:, None] + torch.arange(T), 0)  # (B*G, T)
        prompt_end = (p_start + p_len - 1)[p_of, None]
        source = torch.where(c_mask, torch.cat([prompt_end, c_index[:, :-1]], 1), 0)
        # A completion token sees its prompt and its own past: (B*G, 1, T, P + T)
        see_prompt = p_mask[p_of, None, :].expand(-1, T, P)
        see_past = torch.ones(T, T, dtype=torch.bool).tril().expand(len(flat), T, T)
        attend = torch.cat([see_prompt, see_past], -1)[:, None]
        back = torch.cat([torch.arange(self.B * P).view(self.B, P)[p_mask], self.B * P + torch.arange(c_mask.numel()).view_as(c_mask)[c_mask]])
        last = c_start + c_len - 1
        self.length, self.p_of = P + T, p_of.to(device)
        self.positions, self.p_index, self.c_index, self.source, self.mask, self.attend_mask, self.back, self.last = (
            x.to(device) for x in (positions, p_index, c_index, source, c_mask, attend, back, last)
        )
        self.targets = self.ids[0][self.c_index]  # (B*G, T)

    def attend(self, layer, q, k, v, scaling):
        """q (1, H, N, d), k and v (1, K, N, d) -> (1, N, H, d): attention within each group, the prompt's part computed once."""
        repeat = q.shape[1] // k.shape[1]
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (N, heads, d)

        def rows(x, index):  # -> (*index.shape, heads, d); index_select's backward is an index_add, much faster than x[index]'s
            return x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:])

        def heads(x):  # (S, L, K, d) -> (S, H, L, d)
            return x.transpose(1, 2).repeat_interleave(repeat, 1)

        k_prompt, v_prompt = rows(k, self.p_index), rows(v, self.p_index)
        prompt = F.scaled_dot_product_attention(
            rows(q, self.p_index).transpose(1, 2), heads(k_prompt), heads(v_prompt), is_causal=True, scale=scaling
        )  # (B, H, P, d)
        completion = F.scaled_dot_product_attention(
            rows(q, self.c_index).transpose(1, 2),
            heads(torch.cat([k_prompt.index_select(0, self.p_of), rows(k, self.c_index)], 1)),
            heads(torch.cat([v_prompt.index_select(0, self.p_of), rows(v, self.c_index)], 1)),
            attn_mask=self.attend_mask,
            scale=scaling,
        )  # (B*G, H, T, d)
        out = torch.cat([x.transpose(1, 2).flatten(0, 1) for x in (prompt, completion)])  # (B*P + B*G*T, H, d)
        return out.index_select(0, self.back)[None]


def shared_prefix_attention(module, query, key, value, attention_mask, *, layout, scaling=None, **kwargs):
    """transformers' attention interface; `layout` (a Pack, or a sampler's KV cache) knows who sees whom. Source: transformers docs."""
    window = kwargs.get("sliding_window")
    if (window and layout.length > window) or kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise UserError(f"{type(module).__name__} uses a sliding window shorter than the text, soft-capping or sinks: not supported")
    return layout.attend(module.layer_idx, query, key, value, scaling), None


ALL_ATTENTION_FUNCTIONS.register("shared_prefix", shared_prefix_attention)


@dataclass
class Scored:
    """What the policy thinks of given completions; every field (B, G, T), 0 where mask is False."""

    logps: torch.Tensor  # log pi(o_t | q, o_<t) at the sampling temperature, nats, with gradient unless under no_grad
    mask: torch.Tensor  # bool, True on completion tokens, EOS included
    entropy: torch.Tensor  # of the next-token distribution, nats, detached

    def sequence_mean(self):
        """(B, G): 1/|o| sum_t log pi(o_t), the length-normalised log-likelihood (J_expl and J_imit of GRAO)."""
        return self.logps.sum(-1) / self.mask.sum(-1)


# ---------------------------------------------------------------------------------------------------------------------------------
# The model and its roles


class Policy:
    """A causal LM with LoRA adapters. `hf` is the transformers model (adapters injected), `peft` the PEFT model around it."""

    def __init__(self, hf, tokenizer, name, source, dtype):
        self.hf, self.tokenizer, self.name, self.source, self.dtype = hf, tokenizer, name, source, dtype
        self.device = next(hf.parameters()).device
        self.peft = self.reference_adapter = self.sampler = None
        eos = hf.generation_config.eos_token_id if hf.generation_config else None
        eos = set(eos if isinstance(eos, (list, tuple)) else [eos]) | {tokenizer.eos_token_id}
        self.eos_ids = sorted(eos - {None})  # Qwen3 has two; each ends a completion
        if not self.eos_ids or tokenizer.eos_token_id is None:
            raise UserError(f"model {name}: its tokenizer names no end-of-sequence token, so answers could not end")
        self.context = getattr(hf.config, "max_position_embeddings", None) or 2**31
        for attribute in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(hf.config, attribute, None) not in (None, 1, 1.0):
                raise UserError(f"model {name}: {attribute} is set, and log-probabilities here do not apply it; choose another model")

    # -- loading ------------------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, model="tiny", *, quantize="none", adapter=None, reference="adapter", lora_rank=16, lora_alpha=32, device="auto",
             dtype="auto", seed=0, gradient_checkpointing=False):
        """Load a model and give it a policy adapter.

        model: "tiny", a hub name, a local directory, or a .gguf file. quantize: "nf4" (bitsandbytes NF4, double quantisation) or "none".
        adapter: directory of a saved LoRA adapter to start from; the reference is then a frozen copy of it, or with
        reference="base" the backbone alone. dtype: "float32", "bfloat16" or "auto". Raises UserError for what a user can mend.
        """
        if quantize not in ("nf4", "none") or reference not in ("adapter", "base"):
            raise UserError(f"quantize is nf4 or none, reference is adapter or base; got {quantize!r} and {reference!r}")
        device = pick_device(device)
        dtype = pick_dtype(dtype, device, model)
        source = find_model(model)
        options = dict(dtype=dtype, attn_implementation="sdpa", use_safetensors=True, trust_remote_code=False, local_files_only=True)
        if quantize == "nf4":
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
            )
            options["device_map"] = {"": device}
        try:
            with quiet():
                tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=True)
                hf = transformers.AutoModelForCausalLM.from_pretrained(source, **options)
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, SafetensorError... for an unusable directory
            raise UserError(f"model {model}: cannot be loaded as a causal LM with safetensors weights ({first_line(error)})") from error
        policy = cls(hf.to(device) if quantize == "none" else hf, tokenizer, model, source, dtype)
        hf.requires_grad_(False)
        # Before the adapters exist, because their initialisation is the first random draw of a run.
        torch.manual_seed(seed)
        if adapter is None:
            with quiet():
                config = LoraConfig(task_type="CAUSAL_LM", r=lora_rank, lora_alpha=lora_alpha, target_modules="all-linear")
                policy.peft = get_peft_model(hf, config, autocast_adapter_dtype=True)
        else:
            policy.peft = load_adapter(hf, adapter, "default", model)
            if reference == "adapter":
                load_adapter(policy.peft, adapter, "reference", model)
                policy.reference_adapter = "reference"
        policy.peft.peft_config["default"].base_model_name_or_path = "data/tiny" if model == "tiny" else str(model)
        hf.set_attn_implementation("shared_prefix")
        if gradient_checkpointing:
            hf.gradient_checkpointing_enable({"use_reentrant": False})
            hf.enable_input_require_grads()
        policy.layers = [m for m in hf.modules() if isinstance(m, LoraLayer)]
        policy.activate("default")
        # Training mode throughout, without dropout: in eval mode bitsandbytes' CPU kernels repack NF4 weights for good at the first
        # forward without gradient and never give a gradient again; checkpointing, too, works in training mode only.
        hf.train()
        for module in hf.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
        return policy

    def trainable(self):
        """The policy adapter's parameters by name, fp32."""
        return {n: p for n, p in self.peft.named_parameters() if ".default." in n}

    # -- roles --------------------------------------------------------------------------------------------------------------------

    def activate(self, adapter):
        """Make `adapter` the one that forward passes use; None is the backbone alone. Which parameters train is not touched."""
        for layer in self.layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]

    @contextlib.contextmanager
    def role(self, name):
        """Within the block forward passes are those of "policy" or "reference"; restored on the way out, by an exception too."""
        before = [(layer._disable_adapters, layer._active_adapter) for layer in self.layers]
        self.activate({"policy": "default", "reference": self.reference_adapter}[name])
        try:
            yield
        finally:
            for layer, (disabled, active) in zip(self.layers, before):
                layer._disable_adapters, layer._active_adapter = disabled, active

    # -- text <-> tokens ----------------------------------------------------------------------------------------------------------

    def encode_prompt(self, prompt):
        """A prompt (str, or chat messages ending with the user's turn) -> token ids up to where the answer begins. No thinking."""
        if self.tokenizer.chat_template is None:
            text = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt) + "\n"
            return self.tokenizer.encode(text)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, enable_thinking=False)
        except Exception as error:  # the template is Jinja written by the model's authors; it raises what it likes (TemplateError)
            raise UserError(f"model {self.name}: its chat template refuses the prompt {str(prompt)[:80]!r} ({first_line(error)})") from error
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_answer(self, text):
        """An answer -> its token ids with exactly one EOS, as the policy itself would have to sample them."""
        return self.tokenizer.encode(text, add_special_tokens=False) + [self.tokenizer.eos_token_id]

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    # -- forward passes -----------------------------------------------------------------------------------------------------------

    def hidden(self, pack):
        """Final hidden states (N, D) of a Pack under the active role, under autocast where the backbone is 16-bit."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = self.hf.base_model(input_ids=pack.ids, position_ids=pack.positions, use_cache=False, layout=pack)
        return out.last_hidden_state[0]

    def token_logps(self, prompts, completions, temperature=1.0, role="policy"):
        """Log-probabilities of given completions under a role: Scored with (B, G, T) fields.

        prompts: B lists of ids; completions: B lists of G lists of ids (EOS included where the answer ended). temperature divides the
        logits, as in sampling (PITFALL: scores and samples must agree). Peak memory does not grow with tokens x vocabulary.
        """
        pack = Pack(prompts, completions, self.device)
        with self.role(role):
            hidden = self.hidden(pack)
            head = self.hf.get_output_embeddings()
            states = hidden.index_select(0, pack.source[pack.mask])  # (valid tokens, D)
            logp, entropy = ChunkedLogProb.apply(states.to(head.weight.dtype), head.weight, head.bias, pack.targets[pack.mask], temperature)
        shape = (pack.B, pack.G, -1)
        dense = [torch.zeros(pack.mask.shape, dtype=x.dtype, device=x.device).masked_scatter(pack.mask, x) for x in (logp, entropy)]
        return Scored(dense[0].view(shape), pack.mask.view(shape), dense[1].view(shape))

    def generate(self, prompts, group_size=1, max_new_tokens=64, temperature=1.0, seed=0) -> Rollout:
        """Sample group_size completions for each of B prompts (lists of token ids) -> sampling.Rollout.

        temperature 0 is greedy. The same seed gives the same draws, whatever the batching. There is no top-p or top-k: with them
        the distribution sampled would not be the one scored.
        """
        if self.sampler is None:
            self.sampler = Sampler(self.hf, self.eos_ids)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32), self.role("policy"):
            return self.sampler.generate(prompts, group_size, max_new_tokens, temperature, seed)

    # -- saving -------------------------------------------------------------------------------------------------------------------

    def save(self, directory):
        """Write the policy adapter in PEFT's format (safetensors), whole or not at all."""
        with whole_directory(directory) as tmp:
            self.peft.save_pretrained(tmp, selected_adapters=["default"])

    def merge(self, directory):
        """Write a plain 16-bit model with the adapter merged in; returns the mean |difference of log-probs| to this policy on a probe.

        The backbone is loaded again in bf16: merging into 4-bit weights would round the adapter away.
        """
        with whole_directory(directory) as tmp, quiet():
            self.save(tmp / "adapter")
            base = transformers.AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.bfloat16, use_safetensors=True, local_files_only=True)
            merged = PeftModel.from_pretrained(base, str(tmp / "adapter")).merge_and_unload()
            shutil.rmtree(tmp / "adapter")
            merged.save_pretrained(tmp)
            self.tokenizer.save_pretrained(tmp)
            prompt, answer = self.encode_prompt("list 3 animals"), self.encode_answer("cat dog fox")
            with torch.no_grad():
                ours = self.token_logps([prompt], [[answer]]).logps[0, 0].cpu()
                logits = merged(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
                theirs = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
        return float((ours - theirs).abs().mean())


# ---------------------------------------------------------------------------------------------------------------------------------
# Finding and reading models


def pick_device(device):
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: not usable here ({first_line(error)}); try --device cpu") from error
    return torch.device(device)


def pick_dtype(dtype, device, model):
    """The compute type: bf16 where the hardware multiplies it natively; fp32 for the tiny model, too small to gain from bf16."""
    if dtype in ("float32", "bfloat16"):
        return getattr(torch, dtype)
    if dtype != "auto":
        raise UserError(f"--dtype {dtype}: choose auto, float32 or bfloat16")
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported()
    else:
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native and model != "tiny" else torch.float32


def find_model(model):
    """A model's local directory: the embedded one, a directory, a converted GGUF file, or a hub snapshot (downloaded if needed)."""
    if model == "tiny":
        return str(TINY)
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"model {model}: the directory has no config.json, so it is not a transformers model")
        return str(path)
    if str(model).endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"model {model}: no such file")
        return convert_gguf(path)
    if str(model).count("/") != 1 or str(model)[0] in "./~":
        raise UserError(f"model {model}: no such directory, and not a hub name (owner/name); try --model tiny")
    import huggingface_hub as hub

    wanted = dict(allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"])
    try:
        return hub.snapshot_download(model, local_files_only=True, **wanted)
    except Exception:  # not cached yet: any of the hub's many error types
        pass
    help_ = "try --model tiny, a local directory, or a .gguf file"
    try:
        hub.get_session().head(hub.constants.ENDPOINT, timeout=5)  # the download itself would retry for a minute
    except Exception as error:
        raise UserError(f"model {model}: the hub cannot be reached ({first_line(error)}); {help_}") from error
    try:
        return hub.snapshot_download(model, **wanted)
    except Exception as error:
        raise UserError(f"model {model}: the hub does not give it ({first_line(error)}); {help_}") from error


def convert_gguf(path):
    """Read a GGUF file once (slow: it is dequantised) and keep it as a safetensors directory in the user's cache."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    out = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "minigrao" / f"{path.stem}-{key}"
    if out.is_dir():
        return str(out)
    print(f"converting {path.name} to {out} (once)", file=sys.stderr)
    try:
        with quiet():
            loaded = transformers.AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
            # A model read from GGUF refuses to be saved; the same weights in a model built from its plain config do not.
            del loaded.config.quantization_config
            plain = transformers.AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
            plain.load_state_dict(loaded.state_dict())
            plain.generation_config = loaded.generation_config
            with whole_directory(out) as tmp:
                plain.save_pretrained(tmp)
                tokenizer.save_pretrained(tmp)
    except ImportError as error:
        raise UserError(f"model {path}: reading GGUF needs the gguf package: pip install gguf") from error
    except Exception as error:
        raise UserError(f"model {path}: not a readable GGUF file of a known architecture ({first_line(error)})") from error
    return str(out)


def load_adapter(model, directory, name, base):
    """Add the LoRA adapter saved in `directory` to a model under `name`, checked against the backbone's shapes."""
    path = Path(directory)
    if not (path / "adapter_config.json").is_file() or not (path / "adapter_model.safetensors").is_file():
        raise UserError(f"adapter {directory}: needs adapter_config.json and adapter_model.safetensors (pickled weights are not read)")
    try:
        with quiet():
            if isinstance(model, PeftModel):
                model.load_adapter(str(path), adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, str(path), adapter_name=name, is_trainable=True)
        with safe_open(path / "adapter_model.safetensors", "pt") as file:
            saved = set(file.keys())
        config = model.peft_config[name]
        if saved != set(get_peft_model_state_dict(model, adapter_name=name)):
            raise ValueError("its tensors are not those of this model's layers")
        if config.peft_type != "LORA" or config.use_dora or isinstance(model.get_output_embeddings(), LoraLayer):
            raise ValueError("only plain LoRA on the layers is supported, no DoRA and no adapter on the output head")
    except Exception as error:  # PEFT raises RuntimeError for shapes, ValueError for targets that do not exist, SafetensorError...
        made_for = json.loads((path / "adapter_config.json").read_text()).get("base_model_name_or_path")
        raise UserError(f"adapter {directory}: does not fit {base}, it was made for {made_for} ({first_line(error)})") from error
    return model


# ---------------------------------------------------------------------------------------------------------------------------------
# Small tools


@contextlib.contextmanager
def whole_directory(directory):
    """Yield a temporary sibling; on success it takes the directory's place, on failure it is removed and nothing has changed."""
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    tmp = directory.parent / f".{directory.name}.{os.getpid()}.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        tmp.mkdir()
        yield tmp
        if directory.exists():
            shutil.rmtree(directory)
        tmp.rename(directory)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


@contextlib.contextmanager
def quiet():
    """Keep the libraries' harmless noise (a missing optional CPU kernel, loading reports) from the user."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(open(os.devnull, "w")):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
