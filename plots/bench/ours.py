"""The benchmark's worker for this repository's side: one process, one case, a step at a time.

Started by plots.bench.
"""

import torch
from safetensors.torch import save_file

import baselines
from engine.settings import check_settings
from minigrao import GRAO
from plots.bench import memory
from plots.bench.worker import alternate_rewards, now, peak_bytes, serve
from train import Trainer

METHODS = baselines.METHODS | {"grao": GRAO}


def settings(case):
    """The case as settings of its method, with TRL's losses."""
    given = dict(model=case["model"], data=case["data"], dtype=case["dtype"], device=case["device"])
    given |= dict(quantize=case["quantize"], lora_rank=case["rank"], lora_alpha=2 * case["rank"])
    given |= dict(prompts_per_step=len(case["prompts"]), group_size=max(2, case["group"]), steps=10**6)
    given |= dict(lr=case["lr"], weight_decay=0.0, warmup_steps=0, max_new_tokens=case["tokens"])
    given |= dict(gradient_checkpointing="on" if case["checkpointing"] else "off", eval_prompts=2)
    if case["method"] == "grpo":
        given |= dict(kl="k3_ratio", kl_coef=case["beta"], aggregate="token")
    elif case["method"] == "dpo":
        given |= dict(beta=case["beta"])
    return given


class Ours:
    """A Trainer whose records are the case's token ids."""

    def __init__(self, case):
        torch.set_num_threads(case["threads"])
        method = METHODS[case["method"]]
        config = check_settings(method.config(**settings(case)))
        self.case, self.trainer = case, Trainer(method, config, alternate_rewards)
        self.policy = self.trainer.policy
        self.policy.eos_ids = [-1]  # no id ends an answer: lengths are forced
        self.trainer.records = self.records = [
            {"prompt": "", "chosen": "", "prompt_ids": ids, "record_index": i}
            for i, ids in enumerate(case["prompts"])
        ]
        for kind in ("expert_ids", "rejected_ids"):
            for record, ids in zip(self.records, case[kind]):
                record[kind] = ids
        self.score, self.policy.token_logps = self.policy.token_logps, self.timed_logps
        self.scoring = 0.0

    def timed_logps(self, *args, **kwargs):
        start = now()
        scored = self.score(*args, **kwargs)
        if not torch.is_grad_enabled():
            self.scoring += now() - start
        return scored

    def step(self):
        """One optimisation step -> seconds: total, rollout, scoring, update.

        Scoring are log-probs without gradient, the update those with it, and the optimiser.
        """
        self.trainer.kept.clear()  # DPO scores the reference in its first pass over the data only
        self.scoring, start = 0.0, now()
        metrics = self.trainer.method.update(self.trainer, self.records)
        self.trainer.step += 1
        total, rollout = now() - start, metrics.get("time/rollout", 0.0)
        return {
            "total": total,
            "rollout": rollout,
            "scoring": self.scoring,
            "update": total - rollout - self.scoring,
            "peak": peak_bytes(),
        }

    def loss(self, adapter, completions, advantages, gradient):
        """GRPO's loss on given completions, its gradient written to a file.

        The adapter is made here, away from LoRA's zeros, and saved.
        """
        c, policy, G = self.trainer.config, self.policy, self.case["group"]
        generator = torch.Generator().manual_seed(0)
        for name, p in policy.trainable().items():
            if "lora_B" in name:
                p.data = 0.02 * torch.randn(p.shape, generator=generator).to(p)
        policy.save(adapter)
        groups = [completions[i : i + G] for i in range(0, len(completions), G)]
        with torch.no_grad():
            reference = self.score(self.case["prompts"], groups, role="reference")
        scored = self.score(self.case["prompts"], groups)
        logps, ref_logps, mask = (x.flatten(0, 1) for x in (scored.logps, reference.logps, scored.mask))
        loss, parts = baselines.grpo_loss(
            logps,
            None,
            ref_logps,
            torch.tensor(advantages),
            mask,
            kl_coef=c.kl_coef,
            kl=c.kl,
            aggregate=c.aggregate,
        )
        loss.backward()
        save_file({n: p.grad.contiguous() for n, p in policy.trainable().items()}, gradient)
        return {"loss": float(loss.detach()), "kl": float(parts["kl"])}

    def largest_tensors(self):
        return {"largest": memory.largest_tensors(self.policy, self.step)}


if __name__ == "__main__":
    serve(Ours)
