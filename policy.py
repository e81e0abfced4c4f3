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
import json
import logging
import math
import os
import shutil
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("bitsandbytes").setLevel(
    logging.ERROR
)  # on import it reports a missing optional CPU kernel
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

from data import UserError
from engine.models import (
    find_model,
    first_line,
    keep_freed_memory,
    pick_device,
    pick_dtype,
    quiet,
    whole_directory,
)
from engine.sampling import Rollout, Sampler
from engine.scoring import ChunkedLogProb, Pack, Scored, lora_forward

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

PASS_TOKENS = 4608  # completion tokens in one forward and backward pass: 8 samples of 512 and a reference answer; see Policy.in_passes


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
            raise UserError(
                f"model {name}: its tokenizer names no end-of-sequence token, so answers could not end"
            )
        self.context = getattr(hf.config, "max_position_embeddings", None) or 2**31
        for attribute in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(hf.config, attribute, None) not in (None, 1, 1.0):
                raise UserError(
                    f"model {name}: {attribute} is set, and log-probabilities here do not apply it; choose another model"
                )

    # -- loading ------------------------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        model="tiny",
        *,
        quantize="none",
        adapter=None,
        reference="adapter",
        lora_rank=16,
        lora_alpha=32,
        device="auto",
        dtype="auto",
        seed=0,
        gradient_checkpointing=False,
    ):
        """Load a model and give it a policy adapter.

        model: "tiny", a hub name, a local directory, or a .gguf file. quantize: "nf4" (bitsandbytes NF4, double quantisation) or "none".
        adapter: directory of a saved LoRA adapter to start from; the reference is then a frozen copy of it, or with
        reference="base" the backbone alone. dtype: "float32", "bfloat16" or "auto". Raises UserError for what a user can mend.
        """
        if quantize not in ("nf4", "none") or reference not in ("adapter", "base"):
            raise UserError(
                f"quantize is nf4 or none, reference is adapter or base; got {quantize!r} and {reference!r}"
            )
        device = pick_device(device, quantize)
        if device.type == "cpu":
            keep_freed_memory()
        dtype = pick_dtype(dtype, device, model)
        source = find_model(model)
        options = dict(
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        if quantize == "nf4":
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
            options["device_map"] = {"": device}
        try:
            with quiet():
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    source, trust_remote_code=False, local_files_only=True
                )
                hf = transformers.AutoModelForCausalLM.from_pretrained(source, **options)
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, SafetensorError... for an unusable directory
            raise UserError(
                f"model {model}: cannot be loaded as a causal LM with safetensors weights ({first_line(error)})"
            ) from error
        policy = cls(hf.to(device) if quantize == "none" else hf, tokenizer, model, source, dtype)
        hf.requires_grad_(False)
        # Before the adapters exist, because their initialisation is the first random draw of a run.
        torch.manual_seed(seed)
        if adapter is None:
            with quiet():
                config = LoraConfig(
                    task_type="CAUSAL_LM", r=lora_rank, lora_alpha=lora_alpha, target_modules="all-linear"
                )
                policy.peft = get_peft_model(hf, config, autocast_adapter_dtype=True)
        else:
            policy.peft = load_adapter(hf, adapter, "default", model)
            if reference == "adapter":
                load_adapter(policy.peft, adapter, "reference", model)
                policy.reference_adapter = "reference"
        policy.peft.peft_config["default"].base_model_name_or_path = (
            "data/tiny" if model == "tiny" else str(model)
        )
        hf.set_attn_implementation("shared_prefix")
        if gradient_checkpointing:
            with quiet():  # a FutureWarning about its name in transformers 6
                hf.gradient_checkpointing_enable({"use_reentrant": False})
        policy.layers = [m for m in hf.modules() if isinstance(m, LoraLayer)]
        for layer in policy.layers:
            if isinstance(
                layer.base_layer, torch.nn.Linear
            ):  # GPT-2's Conv1D and the routers of mixtures keep PEFT's forward
                layer.forward = partial(lora_forward, layer)
        policy.activate("default")
        # Training mode throughout, without dropout: in eval mode bitsandbytes' CPU kernels repack NF4 weights for good at the first
        # forward without gradient and never give a gradient again; checkpointing, too, works in training mode only.
        hf.train()
        for module in (
            hf.modules()
        ):  # rates of Dropout modules, and those that OPT and others hand to F.dropout or to attention
            for name in [
                n
                for n, rate in vars(module).items()
                if isinstance(rate, float) and (isinstance(module, torch.nn.Dropout) or "drop" in n)
            ]:
                setattr(module, name, 0.0)
        policy.check_packing()
        return policy

    def trainable(self, adapter="default"):
        """An adapter's parameters by name, fp32: the policy's, or a further role's without its head."""
        return {n: p for n, p in self.peft.named_parameters() if ".lora_" in n and f".{adapter}." in n}

    # -- roles --------------------------------------------------------------------------------------------------------------------

    def add_role(self, name, directory=None, bias=False):
        """One more LoRA adapter on the backbone with a scalar head: a value function, a reward model, a discriminator.

        New, it has the policy adapter's shape, LoRA's B and the head start at 0, so it says 0 everywhere, and it trains. From a directory
        of save_role it is as it was saved, and frozen. Returns its parameters by name, head included. UserError for an unusable directory.
        """
        saved, shape = (
            read_role(directory, self.name) if directory else ({}, self.peft.peft_config["default"].to_dict())
        )
        shape |= {
            "lora_dropout": 0.0,
            "init_lora_weights": True,
            "inference_mode": False,
            "task_type": "CAUSAL_LM",
            "modules_to_save": None,
        }
        width = self.hf.get_output_embeddings().weight.shape[1]
        try:
            self.peft.add_adapter(name, LoraConfig(**shape))
            parameters = self.trainable(name)
            self.heads[name] = head = torch.nn.Linear(width, 1, bias=bias, device=self.device)  # fp32
            with torch.no_grad():
                for p in head.parameters():
                    p.zero_()
                if directory:
                    named = {n.replace(f".{name}.", "."): p for n, p in parameters.items()} | {
                        HEAD: head.weight
                    }
                    if set(saved) != set(named):
                        raise ValueError("its tensors are not those of this model's layers")
                    for key, p in named.items():
                        if saved[key].shape != p.shape:
                            raise ValueError(f"{key} is {tuple(saved[key].shape)}, not {tuple(p.shape)}")
                        p.copy_(saved[key])
        except (ValueError, TypeError, RuntimeError) as error:  # PEFT's for a shape that it cannot build
            if not directory:
                raise
            raise UserError(f"adapter {directory}: does not fit {self.name} ({first_line(error)})") from error
        self.activate("default")
        parameters |= {f"{name}_head.{n}": p for n, p in head.named_parameters()}
        for p in [
            *self.trainable().values(),
            *parameters.values(),
        ]:  # PEFT freezes what it does not call active
            p.requires_grad_(True)
        for p in parameters.values():
            p.requires_grad_(directory is None)
        return parameters

    def save_role(self, role, directory):
        """Write a role's adapter and head, whole or not at all, as PEFT writes a sequence classifier with one label: read by add_role, and by

            PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=1, pad_token_id=PAD), directory)

        whose score is read at the last token that is not PAD, so PAD must not be the EOS that ends every text here.
        """
        head = self.heads[role]
        if head.bias is not None:
            raise ValueError(f"role {role}: transformers' classifiers have no bias in their head")
        config = LoraConfig(
            **self.peft.peft_config[role].to_dict()
            | {"task_type": "SEQ_CLS", "modules_to_save": ["score"], "inference_mode": True}
        )
        config.base_model_name_or_path = self.peft.peft_config["default"].base_model_name_or_path
        tensors = {n.replace(f".{role}.", "."): p for n, p in self.trainable(role).items()} | {
            HEAD: head.weight
        }
        with whole_directory(directory) as tmp:
            config.save_pretrained(str(tmp))
            save_file(
                {n: p.detach().cpu().contiguous() for n, p in tensors.items()},
                tmp / "adapter_model.safetensors",
                {"format": "pt"},
            )

    def activate(self, adapter):
        """Make `adapter` the one that forward passes use; None is the backbone alone. Which parameters train is not touched."""
        for layer in self.layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]

    @contextlib.contextmanager
    def role(self, name):
        """Within the block forward passes are those of "policy", "reference", "backbone" (no adapter), or a role of add_role; restored on the way out, by an
        exception too. With gradient checkpointing the backward pass computes forward again: it belongs into the same block."""
        before = [(layer._disable_adapters, layer._active_adapter) for layer in self.layers]
        self.activate(
            {
                "policy": "default",
                "reference": self.reference_adapter,
                "backbone": None,
                **{role: role for role in self.heads},
            }[name]
        )
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
            text = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, enable_thinking=False
            )
        except Exception as error:  # the template is Jinja written by the model's authors; it raises what it likes (TemplateError)
            raise UserError(
                f"model {self.name}: its chat template refuses the prompt {str(prompt)[:80]!r} ({first_line(error)})"
            ) from error
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_answer(self, text):
        """An answer -> its token ids with exactly one EOS, as the policy itself would have to sample them."""
        return self.tokenizer.encode(text, add_special_tokens=False) + [self.tokenizer.eos_token_id]

    def decode(self, ids):
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ).strip()

    # -- forward passes -----------------------------------------------------------------------------------------------------------

    def hidden(self, pack):
        """Final hidden states (N, D) of a Pack under the active role."""
        out = self.hf.base_model(
            input_ids=pack.ids, position_ids=pack.positions, use_cache=False, layout=pack
        )
        return out.last_hidden_state[0]

    def check_packing(self):
        """Refuse a model whose tokens reach each other other than through the attention function: by convolutions, recurrences, ALiBi.

        Two texts in one Pack must have the states that each has alone with the model's own attention. Otherwise no number would look wrong.
        """
        words = self.tokenizer.encode(
            "The cat sat on the mat and looked at the dog .", add_special_tokens=False
        )
        texts = [(words * 6)[:6], (words[::-1] * 6)[:6]]
        try:
            with torch.no_grad(), quiet():
                packed = self.hidden(Pack([t[:3] for t in texts], [[t[3:]] for t in texts], self.device))
                packed = (
                    packed.view(2, 2, 3, -1).transpose(0, 1).flatten(1, 2).float()
                )  # prompts, then completions -> texts
                self.hf.set_attn_implementation("sdpa")
                alone = self.hf.base_model(
                    input_ids=torch.tensor(texts, device=self.device), use_cache=False
                ).last_hidden_state.float()
            error = (packed - alone).norm() / alone.norm()
            if (
                not error < 0.3
            ):  # rounding in bf16 gives a few percent on ordinary text, a neighbour's influence about 1
                raise ValueError(
                    f"states of a text among others differ by {error:.0%} from those of the text alone"
                )
        except (
            Exception
        ) as error:  # a forward pass that does not hand `layout` on to the attention function: TypeError
            raise UserError(
                f"model {self.name}: this architecture cannot be scored here ({first_line(error)}); choose another model"
            ) from error
        finally:
            self.hf.set_attn_implementation("shared_prefix")

    def token_logps(self, prompts, completions, temperature=1.0, role="policy"):
        """Log-probabilities of given completions under a role: Scored with (B, G, T) fields.

        prompts: B lists of ids; completions: B lists of G lists of ids (EOS included where the answer ended). temperature divides the
        logits, as in sampling: scores and samples must speak of one distribution. Peak memory does not grow with tokens x vocabulary.
        """
        return Scored(
            *self.in_passes(
                partial(self._token_logps, temperature=temperature, role=role), prompts, completions
            )
        )

    def _token_logps(self, prompts, completions, temperature, role):
        pack = Pack(prompts, completions, self.device)
        with self.role(role):
            hidden = self.hidden(pack)
            head = self.hf.get_output_embeddings()
            states = hidden.index_select(0, pack.source[pack.mask])  # (valid tokens, D)
            logp, entropy = ChunkedLogProb.apply(
                states.to(head.weight.dtype), head.weight, head.bias, pack.targets[pack.mask], temperature
            )
        return pack.dense(logp), pack.mask.view(pack.B, pack.G, -1), pack.dense(entropy)

    def in_passes(self, score, prompts, completions):
        """score(prompts, completions) -> (B, G, T) tensors, for part of every group at a time where the groups have more than PASS_TOKENS tokens.

        Each pass is computed again in the backward pass, so what is kept for it is that of one pass, whatever the group's size and length.
        Other methods need not know: the value and the gradient are those of the whole group, for the time of one more forward pass.
        """
        tokens, G = sum(len(c) for group in completions for c in group), max(map(len, completions), default=1)
        if tokens <= PASS_TOKENS or G == 1:
            return score(prompts, completions)
        size = math.ceil(G / math.ceil(tokens / PASS_TOKENS))  # completions of a group in a pass
        T = max(len(c) for group in completions for c in group)
        passes = []
        for i in range(0, G, size):
            part = [group[i : i + size] for group in completions]
            out = checkpoint(score, prompts, part, use_reentrant=False, preserve_rng_state=False)
            passes.append([torch.nn.functional.pad(x, (0, T - x.shape[-1])) for x in out])
        return [torch.cat(x, 1) for x in zip(*passes)]

    def token_values(self, prompts, completions, role="value"):
        """A role's scalar in the state before each completion token -> values (B, G, T) fp32, 0 where masked, and mask (B, G, T)."""
        return tuple(self.in_passes(partial(self._token_values, role=role), prompts, completions))

    def _token_values(self, prompts, completions, role):
        pack = Pack(prompts, completions, self.device)
        with self.role(role):
            states = self.hidden(pack).index_select(0, pack.source[pack.mask])  # (valid tokens, D)
        return pack.dense(self.heads[role](states.float())[:, 0]), pack.mask.view(pack.B, pack.G, -1)

    def sequence_scores(self, prompts, completions, role="reward"):
        """A role's scalar in the state after the last token of each completion (its EOS) -> (B, G) fp32, with gradient where the role trains."""
        pack = Pack(prompts, completions, self.device)
        with self.role(role):
            states = self.hidden(pack).index_select(0, pack.last)  # (B*G, D)
        return self.heads[role](states.float()).view(pack.B, pack.G)

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
            base = transformers.AutoModelForCausalLM.from_pretrained(
                self.source, dtype=torch.bfloat16, use_safetensors=True, local_files_only=True
            )
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


HEAD = "base_model.model.score.weight"  # what PEFT calls the head of a sequence classifier


def read_role(directory, base):
    """A saved role -> (tensors by name, LoraConfig as dict); UserError for a directory without adapter, without head, or with several outputs."""
    path = Path(directory)
    if not (path / "adapter_config.json").is_file() or not (path / "adapter_model.safetensors").is_file():
        raise UserError(
            f"adapter {directory}: needs adapter_config.json and adapter_model.safetensors (pickled weights are not read)"
        )
    try:
        tensors, shape = (
            load_file(path / "adapter_model.safetensors"),
            LoraConfig.from_pretrained(str(path)).to_dict(),
        )
    except (ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"adapter {directory}: cannot be read ({first_line(error)})") from error
    if HEAD not in tensors:
        raise UserError(
            f"adapter {directory}: has no scalar head ({HEAD}), so it scores nothing; is it a policy's adapter?"
        )
    if len(tensors[HEAD]) != 1:
        raise UserError(
            f"adapter {directory}: its head has {len(tensors[HEAD])} outputs; a score is one number"
        )
    return tensors, shape


def load_adapter(model, directory, name, base):
    """Add the LoRA adapter saved in `directory` to a model under `name`, checked against the backbone's shapes."""
    path = Path(directory)
    if not (path / "adapter_config.json").is_file() or not (path / "adapter_model.safetensors").is_file():
        raise UserError(
            f"adapter {directory}: needs adapter_config.json and adapter_model.safetensors (pickled weights are not read)"
        )
    try:
        made_for = json.loads((path / "adapter_config.json").read_text()).get("base_model_name_or_path")
    except ValueError as error:
        raise UserError(
            f"adapter {directory}: adapter_config.json is not JSON ({first_line(error)})"
        ) from error
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
        plain = all(
            key.endswith((".lora_A.weight", ".lora_B.weight")) for key in saved
        )  # no DoRA, biases, embeddings, whole modules
        if not plain or isinstance(model.get_output_embeddings(), LoraLayer):
            raise ValueError("only plain LoRA on the linear layers is supported, and none on the output head")
    except Exception as error:  # PEFT raises RuntimeError for shapes, ValueError for targets that do not exist, SafetensorError...
        raise UserError(
            f"adapter {directory}: does not fit {base}, it was made for {made_for} ({first_line(error)})"
        ) from error
    return model


def main(argv=None):
    """python policy.py merge ADAPTER --model MODEL --out DIR -> exit status."""
    parser = argparse.ArgumentParser(description="Write a plain 16-bit model with a saved adapter merged in.")
    parser.add_argument("command", choices=["merge"])
    parser.add_argument("adapter", help="adapter directory, such as runs/NAME/adapter")
    parser.add_argument(
        "--model",
        required=True,
        help="the model it was trained on: tiny, a hub name, a directory or a .gguf file",
    )
    parser.add_argument("--out", required=True, help="directory to write; must not exist")
    args = parser.parse_args(argv)
    try:
        if Path(args.out).exists():
            raise UserError(f"--out {args.out} exists already; choose another")
        difference = Policy.load(args.model, adapter=args.adapter).merge(args.out)
    except (UserError, OSError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    print(
        f"{args.out}: a 16-bit model; on a probe its log-probabilities differ from the adapter's by {difference:.4f} nats/token on average"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
