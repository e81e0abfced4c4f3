"""The policy: one frozen backbone, LoRA adapters as roles.

    policy = Policy.load("tiny", quantize="nf4")               # or a hub name, a directory, a GGUF file
    prompts = [policy.encode_prompt("list 3 animals")]         # token ids
    rollout = policy.generate(prompts, group_size=8, max_new_tokens=24, seed=0)
    scored = policy.token_logps(prompts, rollout.completions)  # (B, G, T), with gradient
    policy.save("adapter")                                     # PEFT's format

scoring.py says how completions get their log-probabilities, sampling.py how they are drawn; this file loads
the model, keeps the adapters' roles apart, and turns text into tokens.

Adapters are fp32 whatever the backbone; dropout is off everywhere, so the ratio of new to old probabilities
is 1 before an update.
"""

import contextlib
import json
import math
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data import UserError
from engine.command_line import OneLineParser, answer, exit_status


def merge_flags(argv: list | None = None) -> Namespace:
    """python policy.py merge ADAPTER --model MODEL --out DIR."""
    parser = OneLineParser(description="Write a plain 16-bit model with a saved adapter merged in.")
    parser.add_argument("command", choices=["merge"])
    parser.add_argument("adapter", help="adapter directory, such as runs/NAME/adapter")
    parser.add_argument("--model", required=True, help="what it was trained on, as in training's --model")
    parser.add_argument("--out", required=True, help="directory to write; must not exist")
    return parser.parse_args(argv)


if __name__ == "__main__":
    answer(merge_flags)  # --help and mistyped flags: the imports below take seconds

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import torch  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from engine.adapters import HEAD, PLAIN, fill, read_adapter, read_role, saved_names, trainable  # noqa: E402
from engine.folders import reserve, whole_directory  # noqa: E402
from engine.models import (  # noqa: E402
    DEVICE_ERRORS,
    base_name,
    end_ids,
    find_model,
    first_line,
    keep_freed_memory,
    load_model,
    pick_device,
    pick_dtype,
    quiet,
    switch_off_dropout,
)
from engine.sampling import Rollout, Sampler  # noqa: E402
from engine.scoring import ChunkedLogProb, Pack, Scored, lora_forward, packing_error  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# Completion tokens in one pass: 8 samples of 512 and an expert answer; see Policy.in_passes.
PASS_TOKENS = 4608


# ------------------------------------------------------------------------------------------------------------
# The model and its roles


class Policy:
    """A causal LM with LoRA adapters: `hf`, the transformers model they are injected in, `peft` around it."""

    def __init__(self, hf, tokenizer, name: str, source: str, dtype: torch.dtype):
        self.hf, self.tokenizer, self.name, self.source, self.dtype = hf, tokenizer, name, source, dtype
        self.device = next(hf.parameters()).device
        self.peft = self.reference_adapter = self.sampler = None
        self.heads = {}  # role -> its scalar head
        self.fitted = {}  # role that was trained before the run and stays as it is -> how, see save_fitted
        self.eos_ids = end_ids(hf, tokenizer, f"model {name}")
        self.context = getattr(hf.config, "max_position_embeddings", None) or 2**31
        for attribute in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(hf.config, attribute, None) not in (None, 1, 1.0):
                raise UserError(
                    f"model {name}: {attribute} is set, and log-probabilities here do not apply it; "
                    "choose another model"
                )

    # -- loading --

    @classmethod
    def load(
        cls,
        model: str = "tiny",
        *,
        quantize: str = "none",
        adapter: str | Path | None = None,
        reference: str = "adapter",
        lora_rank: int = 16,
        lora_alpha: int = 32,
        device: str = "auto",
        dtype: str = "auto",
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ) -> "Policy":
        """Load a model and give it a policy adapter.

        model: "tiny", a hub name, a local directory, or a .gguf file. quantize: "nf4" (bitsandbytes NF4,
        double quantisation) or "none". adapter: directory of a saved LoRA adapter to start from; the
        reference is then a frozen copy of it, or with reference="base" the backbone alone. dtype: "float32",
        "bfloat16" or "auto". Raises UserError for what a user can mend.
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
        options = dict(dtype=dtype, attn_implementation="sdpa")
        if quantize == "nf4":
            nf4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
            nf4 = transformers.BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype)
            options["quantization_config"] = nf4
            options["device_map"] = {"": device}
        causal = transformers.AutoModelForCausalLM
        tokenizer, hf, missing = load_model(causal, source, f"model {model}", "causal LM", **options)
        if missing:
            raise UserError(
                f"model {model}: its files lack {len(missing)} of the weights ({missing[0]}); "
                "download or save it again"
            )
        policy = cls(hf.to(device) if quantize == "none" else hf, tokenizer, model, source, dtype)
        hf.requires_grad_(False)
        # Before the adapters exist, because their initialisation is the first random draw of a run.
        torch.manual_seed(seed)
        if adapter is None:
            policy.start_fresh(lora_rank, lora_alpha)
        else:
            policy.start_from(adapter, reference)
        policy.peft.peft_config["default"].base_model_name_or_path = base_name(model, source)
        policy.prepare(gradient_checkpointing)
        policy.check_packing()
        return policy

    def start_fresh(self, rank, alpha):
        """A policy adapter on every linear layer, with B = 0: it changes nothing yet."""
        config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules="all-linear")
        with quiet():
            self.peft = get_peft_model(self.hf, config, autocast_adapter_dtype=True)

    def start_from(self, directory, reference):
        """The policy adapter as saved in a directory; with reference="adapter" a frozen copy beside it."""
        tensors, shape, made_for = read_adapter(directory)
        try:
            with quiet():
                self.peft = get_peft_model(self.hf, LoraConfig(**shape, task_type="CAUSAL_LM"))
                fill(saved_names(self.peft, "default"), tensors)
                if reference == "adapter":
                    self.reference_adapter = "reference"
                    self.peft.add_adapter("reference", LoraConfig(**shape, task_type="CAUSAL_LM"))
                    fill(saved_names(self.peft, "reference"), tensors)
            plain = all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)
            if not plain or isinstance(self.peft.get_output_embeddings(), LoraLayer):
                raise ValueError("only plain LoRA on the linear layers is supported, none on the head")
        except DEVICE_ERRORS:
            raise
        except Exception as error:  # PEFT's for layers that it does not find or cannot wrap, and ours
            raise UserError(
                f"adapter {directory}: does not fit {self.name}, it was made for {made_for} "
                f"({first_line(error)})"
            ) from error
        for name, parameter in self.peft.named_parameters():
            parameter.requires_grad_(name in self.trainable())

    def prepare(self, gradient_checkpointing):
        """Our attention, our LoRA layers, no dropout: what scoring, sampling and training rely on."""
        hf = self.hf
        hf.set_attn_implementation("shared_prefix")
        if gradient_checkpointing:
            with quiet():  # a FutureWarning about its name in transformers 6
                hf.gradient_checkpointing_enable({"use_reentrant": False})
        self.layers = [m for m in hf.modules() if isinstance(m, LoraLayer)]
        for layer in self.layers:
            # GPT-2's Conv1D and the routers of mixtures keep PEFT's forward.
            if isinstance(layer.base_layer, torch.nn.Linear):
                layer.forward = partial(lora_forward, layer)
        self.activate("default")
        # Training mode throughout, without dropout: in eval mode bitsandbytes' CPU kernels repack NF4 weights
        # for good at the first forward without gradient and never give a gradient again; checkpointing, too,
        # works in training mode only.
        hf.train()
        switch_off_dropout(hf)

    def trainable(self, adapter: str = "default") -> dict[str, torch.nn.Parameter]:
        """An adapter's parameters by name, fp32: the policy's, or a further role's without its head."""
        return trainable(self.peft, adapter)

    # -- roles --

    def add_role(
        self, name: str, directory: str | Path | None = None, bias: bool = False
    ) -> dict[str, torch.nn.Parameter]:
        """One more LoRA adapter with a scalar head: a value function, a reward model, a discriminator.

        New, it has the policy adapter's shape, LoRA's B and the head start at 0, so it says 0 everywhere, and
        it trains. From a directory of save_role it is as it was saved, and frozen. Returns its parameters by
        name, head included. UserError for an unusable directory.
        """
        saved, config = {}, self.peft.peft_config["default"]
        shape = {field: getattr(config, field) for field in PLAIN}
        if directory:
            saved, shape = read_role(directory)
        width = self.hf.get_output_embeddings().weight.shape[1]
        head = torch.nn.Linear(width, 1, bias=bias, device=self.device)  # fp32
        for parameter in head.parameters():
            torch.nn.init.zeros_(parameter)
        try:
            self.peft.add_adapter(name, LoraConfig(**shape | {"lora_dropout": 0.0}, task_type="CAUSAL_LM"))
            if directory:
                fill(saved_names(self.peft, name) | {HEAD: head.weight}, saved)
        except (ValueError, TypeError, RuntimeError) as error:  # PEFT's for a shape that it cannot build
            if not directory or isinstance(error, DEVICE_ERRORS):
                raise
            raise UserError(f"adapter {directory}: does not fit {self.name} ({first_line(error)})") from error
        self.heads[name] = head
        self.activate("default")
        parameters = self.trainable(name) | {f"{name}_head.{n}": p for n, p in head.named_parameters()}
        for p in self.trainable().values():  # PEFT freezes what it does not call active
            p.requires_grad_(True)
        for p in parameters.values():
            p.requires_grad_(directory is None)
        return parameters

    def save_role(self, role: str, directory: str | Path) -> None:
        """Write a role's adapter and head, whole or not at all, as PEFT writes a classifier with one label.

        It is read by add_role, and by

            base = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=1, pad_token_id=PAD)
            PeftModel.from_pretrained(base, directory)

        whose score is read at the last token that is not PAD, so PAD must not be the EOS that ends every text
        here.
        """
        head = self.heads[role]
        if head.bias is not None:
            raise ValueError(f"role {role}: transformers' classifiers have no bias in their head")
        classifier = {"task_type": "SEQ_CLS", "modules_to_save": ["score"], "inference_mode": True}
        config = LoraConfig(**self.peft.peft_config[role].to_dict() | classifier)
        config.base_model_name_or_path = self.peft.peft_config["default"].base_model_name_or_path
        tensors = saved_names(self.peft, role) | {HEAD: head.weight}
        tensors = {name: p.detach().cpu().contiguous() for name, p in tensors.items()}
        with whole_directory(directory) as tmp:
            config.save_pretrained(str(tmp))
            save_file(tensors, tmp / "adapter_model.safetensors", {"format": "pt"})

    def activate(self, adapter: str | None) -> None:
        """Make `adapter` the one of forward passes; None: the backbone alone. What trains is not touched."""
        for layer in self.layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]

    @contextlib.contextmanager
    def role(self, name: str) -> Iterator[None]:
        """Within the block forward passes are those of "policy", "reference", "backbone" (no adapter), or a
        role of add_role. With gradient checkpointing the backward pass belongs into the same block.
        """
        before = [(layer._disable_adapters, layer._active_adapter) for layer in self.layers]
        adapters = {"policy": "default", "reference": self.reference_adapter, "backbone": None}
        self.activate((adapters | {role: role for role in self.heads})[name])
        try:
            yield
        finally:
            for layer, (disabled, active) in zip(self.layers, before):
                layer._disable_adapters, layer._active_adapter = disabled, active

    # -- text and tokens --

    def encode_prompt(self, prompt: str | list) -> list[int]:
        """A prompt (str, or messages up to the user's turn) -> token ids up to where the answer begins.

        Without thinking. UserError for a prompt that the chat template refuses, or of which nothing is left.
        """
        if self.tokenizer.chat_template is None:
            text = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt) + "\n"
            ids = self.tokenizer.encode(text)
        else:
            ids = self.tokenizer.encode(self.templated(prompt), add_special_tokens=False)
        if not ids:
            raise UserError(
                f"model {self.name}: nothing is left of the prompt {str(prompt)[:80]!r} as tokens"
            )
        return ids

    def templated(self, prompt):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, enable_thinking=False
            )
        # Jinja written by the model's authors; it raises what it likes (TemplateError)
        except Exception as error:
            raise UserError(
                f"model {self.name}: its chat template refuses the prompt {str(prompt)[:80]!r} "
                f"({first_line(error)})"
            ) from error

    def encode_answer(self, text: str) -> list[int]:
        """An answer -> its token ids with exactly one EOS, as the policy itself would have to sample them."""
        return self.tokenizer.encode(text, add_special_tokens=False) + [self.tokenizer.eos_token_id]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ).strip()

    # -- forward passes --

    def hidden(self, pack: Pack) -> torch.Tensor:
        """Final hidden states (N, D) of a Pack under the active role."""
        out = self.hf.base_model(
            input_ids=pack.ids, position_ids=pack.positions, use_cache=False, layout=pack
        )
        return out.last_hidden_state[0]

    def check_packing(self) -> None:
        """Refuse a model whose tokens reach each other in other ways than by attention, see packing_error."""
        words = self.tokenizer.encode(
            "The cat sat on the mat and looked at the dog .", add_special_tokens=False
        )
        try:
            with quiet():
                error = packing_error(self.hf, words)
            # Rounding in bf16 gives a few percent on ordinary text, a neighbour's influence about 1.
            if not error < 0.3:
                raise ValueError(
                    f"states of a text among others differ by {error:.0%} from those of the text alone"
                )
        except DEVICE_ERRORS:
            raise
        except Exception as error:  # a forward pass that does not hand `layout` on to attention: TypeError
            raise UserError(
                f"model {self.name}: this architecture cannot be scored here ({first_line(error)}); "
                "choose another model"
            ) from error

    def token_logps(
        self, prompts: list, completions: list, temperature: float = 1.0, role: str = "policy"
    ) -> Scored:
        """Log-probabilities of given completions under a role: Scored with (B, G, T) fields.

        prompts: B lists of ids; completions: B lists of G lists of ids (EOS included where the answer ended).
        temperature divides the logits, as in sampling: scores and samples must speak of one distribution.
        Peak memory does not grow with tokens x vocabulary.
        """
        score = partial(self._token_logps, temperature=temperature, role=role)
        return Scored(*self.in_passes(score, prompts, completions))

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
        """score(prompts, completions) -> (B, G, T) tensors, for at most PASS_TOKENS tokens at a time.

        Each pass is computed again in the backward pass, so what is kept for it is that of one pass, whatever
        the group's size and length. Other methods need not know: the value and the gradient are those of the
        whole group, for the time of one more forward pass.
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

    def token_values(
        self, prompts: list, completions: list, role: str = "value"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A role's scalar before each completion token -> values (B, G, T) fp32, 0 where masked; mask."""
        return tuple(self.in_passes(partial(self._token_values, role=role), prompts, completions))

    def _token_values(self, prompts, completions, role):
        pack = Pack(prompts, completions, self.device)
        with self.role(role):
            states = self.hidden(pack).index_select(0, pack.source[pack.mask])  # (valid tokens, D)
        return pack.dense(self.heads[role](states.float())[:, 0]), pack.mask.view(pack.B, pack.G, -1)

    def sequence_scores(self, prompts: list, completions: list, role: str = "reward") -> torch.Tensor:
        """A role's scalar at the last token of each completion (its EOS) -> (B, G) fp32, with gradient."""
        pack = Pack(prompts, completions, self.device)
        with self.role(role):
            states = self.hidden(pack).index_select(0, pack.last)  # (B*G, D)
        return self.heads[role](states.float()).view(pack.B, pack.G)

    def generate(
        self,
        prompts: list,
        group_size: int = 1,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> Rollout:
        """Sample group_size completions for each of B prompts (lists of token ids) -> sampling.Rollout.

        temperature 0 is greedy. The same seed gives the same draws, whatever the batching. There is no top-p
        or top-k: with them the distribution sampled would not be the one scored.
        """
        if self.sampler is None:
            self.sampler = Sampler(self.hf, self.eos_ids)
        with self.role("policy"):
            return self.sampler.generate(prompts, group_size, max_new_tokens, temperature, seed)

    # -- saving --

    def save(self, directory: str | Path) -> None:
        """Write the policy adapter in PEFT's format (safetensors), whole or not at all."""
        with whole_directory(directory) as tmp:
            self.peft.save_pretrained(tmp, selected_adapters=["default"], save_embedding_layers=False)

    def save_fitted(self, directory: Path) -> None:
        """Write every role that was trained for this run and then frozen to DIRECTORY/ROLE, with ROLE.json.

        Which parameters such a training keeps hangs on comparisons that another machine's rounding decides
        otherwise: with the role beside it a run can be repeated elsewhere.
        """
        for role, history in self.fitted.items():
            self.save_role(role, directory / role)
            about = json.dumps({"history": history}, indent=2) + "\n"
            (directory / role / f"{role}.json").write_text(about, encoding="utf-8")

    def merge(self, directory: str | Path) -> float:
        """Write a plain 16-bit model with the adapter merged in -> mean |difference of log-probs| on a probe.

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


def main(argv: list | None = None) -> int:
    """The command line -> exit status: 0, or 2 for an error that the user can mend, one line on stderr."""
    return exit_status(lambda: merge_command(merge_flags(argv)), stopped="stopped; nothing was written")


def merge_command(args: Namespace) -> str:
    with reserve(args.out, "merged model"):
        difference = Policy.load(args.model, adapter=args.adapter).merge(args.out)
    print(
        f"{args.out}: a 16-bit model; on a probe its log-probabilities differ from the adapter's by "
        f"{difference:.4f} nats/token on average"
    )
    return args.out


if __name__ == "__main__":
    sys.exit(main())
