"""The policy: one frozen backbone, LoRA adapters as roles.

    policy = Policy.load("tiny", quantize="nf4")                       # or a hub name, a local directory, a GGUF file
    prompts = [policy.encode_prompt("list 3 animals")]                 # token ids
    rollout = policy.generate(prompts, group_size=8, max_new_tokens=24, seed=0)
    scored = policy.token_logps(prompts, rollout.completions)          # (B, G, T), with gradient
    policy.save("adapter")                                             # PEFT format

scoring.py says how completions get their log-probabilities, sampling.py how they are drawn; this file loads the model, keeps the
adapters' roles apart, and turns text into tokens.

Adapters are fp32 whatever the backbone; dropout is off everywhere, so the ratio of new to old probabilities is 1 before an update.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it reports a missing optional CPU kernel
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

from data import UserError
from sampling import Rollout, Sampler
from scoring import ChunkedLogProb, Pack, Scored, lora_forward

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
TINY = Path(__file__).parent / "data" / "tiny"

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


# ---------------------------------------------------------------------------------------------------------------------------------
# The model and its roles


class Policy:
    """A causal LM with LoRA adapters. `hf` is the transformers model (adapters injected), `peft` the PEFT model around it."""

    def __init__(self, hf, tokenizer, name, source, dtype):
        self.hf, self.tokenizer, self.name, self.source, self.dtype = hf, tokenizer, name, source, dtype
        self.device = next(hf.parameters()).device
        self.peft = self.reference_adapter = self.sampler = None
        self.heads = {}  # role -> its scalar head
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
        if device.type == "cpu":
            keep_freed_memory()
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
            with quiet():  # a FutureWarning about its name in transformers 6
                hf.gradient_checkpointing_enable({"use_reentrant": False})
        policy.layers = [m for m in hf.modules() if isinstance(m, LoraLayer)]
        for layer in policy.layers:
            if isinstance(layer.base_layer, torch.nn.Linear):  # GPT-2's Conv1D and the routers of mixtures keep PEFT's forward
                layer.forward = partial(lora_forward, layer)
        policy.activate("default")
        # Training mode throughout, without dropout: in eval mode bitsandbytes' CPU kernels repack NF4 weights for good at the first
        # forward without gradient and never give a gradient again; checkpointing, too, works in training mode only.
        hf.train()
        for module in hf.modules():  # rates of Dropout modules, and those that OPT and others hand to F.dropout or to attention
            for name in [n for n, rate in vars(module).items() if isinstance(rate, float) and (isinstance(module, torch.nn.Dropout) or "drop" in n)]:
                setattr(module, name, 0.0)
        policy.check_packing()
        return policy

    def trainable(self, adapter="default"):
        """An adapter's parameters by name, fp32: the policy's, or a further role's without its head."""
        return {n: p for n, p in self.peft.named_parameters() if ".lora_" in n and f".{adapter}." in n}

    # -- roles --------------------------------------------------------------------------------------------------------------------

    def add_role(self, name):
        """One more LoRA adapter on the backbone, of the policy adapter's shape, with a scalar head: a value function, a reward model, a
        discriminator. LoRA's B and the head start at 0, so it says 0 everywhere. Returns its parameters by name, head included.
        """
        shape = self.peft.peft_config["default"].to_dict() | {"lora_dropout": 0.0, "init_lora_weights": True, "inference_mode": False}
        self.peft.add_adapter(name, LoraConfig(**shape))
        self.activate("default")
        parameters = self.trainable(name)
        self.heads[name] = head = torch.nn.Linear(self.hf.get_output_embeddings().weight.shape[1], 1, device=self.device)  # fp32
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        for p in [*parameters.values(), *self.trainable().values()]:  # PEFT freezes what it does not call active
            p.requires_grad_(True)
        return parameters | {f"{name}_head.{n}": p for n, p in head.named_parameters()}

    def activate(self, adapter):
        """Make `adapter` the one that forward passes use; None is the backbone alone. Which parameters train is not touched."""
        for layer in self.layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]

    @contextlib.contextmanager
    def role(self, name):
        """Within the block forward passes are those of "policy", "reference", or a role of add_role; restored on the way out, by an
        exception too. With gradient checkpointing the backward pass computes forward again: it belongs into the same block."""
        before = [(layer._disable_adapters, layer._active_adapter) for layer in self.layers]
        self.activate({"policy": "default", "reference": self.reference_adapter, **{role: role for role in self.heads}}[name])
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
        """Final hidden states (N, D) of a Pack under the active role."""
        out = self.hf.base_model(input_ids=pack.ids, position_ids=pack.positions, use_cache=False, layout=pack)
        return out.last_hidden_state[0]

    def check_packing(self):
        """Refuse a model whose tokens reach each other other than through the attention function: by convolutions, recurrences, ALiBi.

        Two texts in one Pack must have the states that each has alone with the model's own attention. Otherwise no number would look wrong.
        """
        words = self.tokenizer.encode("The cat sat on the mat and looked at the dog .", add_special_tokens=False)
        texts = [(words * 6)[:6], (words[::-1] * 6)[:6]]
        try:
            with torch.no_grad(), quiet():
                packed = self.hidden(Pack([t[:3] for t in texts], [[t[3:]] for t in texts], self.device))
                packed = packed.view(2, 2, 3, -1).transpose(0, 1).flatten(1, 2).float()  # prompts, then completions -> texts
                self.hf.set_attn_implementation("sdpa")
                alone = self.hf.base_model(input_ids=torch.tensor(texts, device=self.device), use_cache=False).last_hidden_state.float()
            error = (packed - alone).norm() / alone.norm()
            if not error < 0.3:  # rounding in bf16 gives a few percent on ordinary text, a neighbour's influence about 1
                raise ValueError(f"states of a text among others differ by {error:.0%} from those of the text alone")
        except Exception as error:  # a forward pass that does not hand `layout` on to the attention function: TypeError
            raise UserError(f"model {self.name}: this architecture cannot be scored here ({first_line(error)}); choose another model") from error
        finally:
            self.hf.set_attn_implementation("shared_prefix")

    def token_logps(self, prompts, completions, temperature=1.0, role="policy"):
        """Log-probabilities of given completions under a role: Scored with (B, G, T) fields.

        prompts: B lists of ids; completions: B lists of G lists of ids (EOS included where the answer ended). temperature divides the
        logits, as in sampling: scores and samples must speak of one distribution. Peak memory does not grow with tokens x vocabulary.
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

    def token_values(self, prompts, completions, role="value"):
        """A role's scalar in the state before each completion token -> values (B, G, T) fp32, 0 where masked, and mask (B, G, T)."""
        pack = Pack(prompts, completions, self.device)
        with self.role(role):
            states = self.hidden(pack).index_select(0, pack.source[pack.mask])  # (valid tokens, D)
        values = self.heads[role](states.float())[:, 0]
        dense = torch.zeros(pack.mask.shape, device=self.device).masked_scatter(pack.mask, values)
        return dense.view(pack.B, pack.G, -1), pack.mask.view(pack.B, pack.G, -1)

    def generate(self, prompts, group_size=1, max_new_tokens=64, temperature=1.0, seed=0) -> Rollout:
        """Sample group_size completions for each of B prompts (lists of token ids) -> sampling.Rollout.

        temperature 0 is greedy. The same seed gives the same draws, whatever the batching. There is no top-p or top-k: with them
        the distribution sampled would not be the one scored.
        """
        if self.sampler is None:
            self.sampler = Sampler(self.hf, self.eos_ids)
        with self.role("policy"):
            return self.sampler.generate(prompts, group_size, max_new_tokens, temperature, seed)

    # -- saving -------------------------------------------------------------------------------------------------------------------

    def save(self, directory):
        """Write the policy adapter in PEFT's format (safetensors), whole or not at all."""
        with whole_directory(directory) as tmp:
            self.peft.save_pretrained(tmp, selected_adapters=["default"], save_embedding_layers=False)

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


def keep_freed_memory():
    """Have glibc keep freed memory for the next tensor: given back and mapped anew, every large temporary costs its page faults."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


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
        made_for = json.loads((path / "adapter_config.json").read_text()).get("base_model_name_or_path")
    except ValueError as error:
        raise UserError(f"adapter {directory}: adapter_config.json is not JSON ({first_line(error)})") from error
    try:
        with quiet():
            if isinstance(model, PeftModel):
                model.load_adapter(str(path), adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, str(path), adapter_name=name, is_trainable=True)
        with safe_open(path / "adapter_model.safetensors", "pt") as file:
            saved = set(file.keys())
        if saved != set(get_peft_model_state_dict(model, adapter_name=name)):
            raise ValueError("its tensors are not those of this model's layers")
        plain = all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in saved)  # no DoRA, biases, embeddings, whole modules
        if not plain or isinstance(model.get_output_embeddings(), LoraLayer):
            raise ValueError("only plain LoRA on the linear layers is supported, and none on the output head")
    except Exception as error:  # PEFT raises RuntimeError for shapes, ValueError for targets that do not exist, SafetensorError...
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


def main(argv=None):
    """python policy.py merge ADAPTER --model MODEL --out DIR -> exit status."""
    parser = argparse.ArgumentParser(description="Write a plain 16-bit model with a saved adapter merged in.")
    parser.add_argument("command", choices=["merge"])
    parser.add_argument("adapter", help="adapter directory, such as runs/NAME/adapter")
    parser.add_argument("--model", required=True, help="the model it was trained on: tiny, a hub name, a directory or a .gguf file")
    parser.add_argument("--out", required=True, help="directory to write; must not exist")
    args = parser.parse_args(argv)
    try:
        if Path(args.out).exists():
            raise UserError(f"--out {args.out} exists already; choose another")
        difference = Policy.load(args.model, adapter=args.adapter).merge(args.out)
    except (UserError, OSError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    print(f"{args.out}: a 16-bit model; on a probe its log-probabilities differ from the adapter's by {difference:.4f} nats/token on average")
    return 0


if __name__ == "__main__":
    sys.exit(main())
