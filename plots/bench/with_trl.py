"""The benchmark's worker for TRL's side: one process, one case, a step at a time.

Started by plots.bench in an environment that holds trl 1.16. TRL as it comes, output head fused with the
loss, PEFT's LoRA on all linear layers, and these settings: weights in the case's precision (in bf16 under
bf16 autocast), a step as one batch, gradient checkpointing off unless the case asks for it (on is TRL's
default: less memory, more time). Generation is its default without vLLM, transformers' `generate`. `train`
runs in a thread and waits for the benchmark before every step.
"""

import os
import queue
import tempfile
import threading

import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from plots.bench.worker import alternate_rewards, now, peak_bytes, serve

TIMES = 1000  # copies of the case's data, more than steps are taken


class GRPOOnIds(GRPOTrainer):
    """A prompt is the number of a list of token ids, so both sides see the same ones."""

    def _tokenize_prompts(self, prompts):
        return [self.case["prompts"][int(p)] for p in prompts], None, {}

    def _generate_single_turn(self, *args, **kwargs):
        start = now()
        out = super()._generate_single_turn(*args, **kwargs)
        self.clock["rollout"] += now() - start
        return out


class DPOOnIds(DPOTrainer):
    def _prepare_dataset(self, dataset, *args):
        return dataset


class TRL(TrainerCallback):
    def __init__(self, case):
        torch.set_num_threads(case["threads"])
        self.case, self.clock = case, {"rollout": 0.0, "scoring": 0.0}
        self.go, self.done, self.thread = queue.Queue(), queue.Queue(), None
        make = {"grpo": self.grpo, "sft": self.sft, "dpo": self.dpo}[case["method"]]
        lora = LoraConfig(
            task_type="CAUSAL_LM", r=case["rank"], lora_alpha=2 * case["rank"], target_modules="all-linear"
        )
        tokenizer = AutoTokenizer.from_pretrained(case["model"])
        given = dict(model=case["model"], processing_class=tokenizer, peft_config=lora, callbacks=[self])
        self.trainer = make(given)

    def settings(self):
        """What all three of TRL's configs are given."""
        case = self.case
        given = dict(output_dir=tempfile.mkdtemp(), max_steps=10**6, seed=0, bf16=case["dtype"] == "bfloat16")
        given |= dict(learning_rate=case["lr"], lr_scheduler_type="constant", weight_decay=0.0)
        given |= dict(gradient_checkpointing=case["checkpointing"], use_cpu=case["device"] == "cpu")
        given |= dict(report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True)
        given |= dict(dataloader_pin_memory=False, model_init_kwargs={"dtype": case["dtype"]})
        return given

    def grpo(self, given):
        case, B = self.case, len(self.case["prompts"])
        config = GRPOConfig(
            **self.settings(),
            shuffle_dataset=False,
            per_device_train_batch_size=B * case["group"],
            num_generations=case["group"],
            max_completion_length=case["tokens"],
            beta=case["beta"],
            temperature=1.0,
            generation_kwargs={"min_new_tokens": case["tokens"]},
        )
        GRPOOnIds.case, GRPOOnIds.clock = case, self.clock
        data = Dataset.from_list([{"prompt": str(i)} for i in range(B)] * TIMES)
        return GRPOOnIds(args=config, reward_funcs=alternate_rewards, train_dataset=data, **given)

    def sft(self, given):
        rows = []
        for prompt, answer in zip(self.case["prompts"], self.case["expert_ids"]):
            mask = [0] * len(prompt) + [1] * len(answer)
            rows.append({"input_ids": prompt + answer, "completion_mask": mask})
        config = SFTConfig(
            **self.settings(),
            shuffle_dataset=False,
            per_device_train_batch_size=len(rows),
            max_length=None,
            completion_only_loss=True,
        )
        return SFTTrainer(args=config, train_dataset=Dataset.from_list(rows * TIMES), **given)

    def dpo(self, given):
        case, rows = self.case, []
        for prompt, chosen, rejected in zip(case["prompts"], case["expert_ids"], case["rejected_ids"]):
            rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
        config = DPOConfig(
            **self.settings(), per_device_train_batch_size=len(rows), max_length=None, beta=case["beta"]
        )
        return DPOOnIds(args=config, train_dataset=Dataset.from_list(rows * TIMES), **given)

    # -- steps, in TRL's own loop

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        forward = model.forward

        def timed(*args, **kwargs):
            start = now()
            out = forward(*args, **kwargs)
            if not torch.is_grad_enabled():  # the reference's log-probs; sampling does not come through here
                self.clock["scoring"] += now() - start
            return out

        model.forward = timed

    def on_step_begin(self, *args, **kwargs):
        self.go.get()
        self.clock |= {"rollout": 0.0, "scoring": 0.0}
        self.start = now()

    def on_step_end(self, *args, **kwargs):
        total = now() - self.start
        self.done.put(
            {"total": total, **self.clock, "update": total - sum(self.clock.values()), "peak": peak_bytes()}
        )

    def train(self):
        try:
            self.trainer.train()
        except BaseException as error:  # the parent waits for an answer
            self.done.put({"error": repr(error)})
            raise

    def step(self):
        if self.thread is None:
            self.thread = threading.Thread(target=self.train, daemon=True)
            self.thread.start()
        self.go.put(None)
        return self.done.get()

    # -- the same loss on the same samples

    def loss(self, adapter, completions, advantages, gradient):
        """GRPO's loss on given completions under a saved adapter, its gradient written to a file.

        completions: one list of ids each, equally long.
        """
        trainer, model = self.trainer, self.trainer.model
        set_peft_model_state_dict(model, load_file(os.path.join(adapter, "adapter_model.safetensors")))
        prompt = torch.tensor([p for p in self.case["prompts"] for _ in range(self.case["group"])])
        ids = torch.tensor(completions)
        inputs = {
            "prompt_ids": prompt,
            "prompt_mask": torch.ones_like(prompt),
            "completion_ids": ids,
            "completion_mask": torch.ones_like(ids),
        }
        inputs |= {"advantages": torch.tensor(advantages), "num_items_in_batch": torch.tensor(ids.numel())}
        both = [torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask")]
        with torch.no_grad(), model.disable_adapter():
            inputs["ref_per_token_logps"] = trainer._get_per_token_logps_and_entropies(
                model, *both, ids.shape[1]
            )[0]
        trainer.current_gradient_accumulation_steps = 1
        model.train()
        loss = trainer._compute_loss(model, inputs)
        loss.backward()
        save_file(
            {n: p.grad.contiguous() for n, p in model.named_parameters() if p.grad is not None}, gradient
        )
        return {"loss": float(loss.detach())}


if __name__ == "__main__":
    serve(TRL)
