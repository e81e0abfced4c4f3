"""The evaluation on held-out prompts: one answer each, what it earns, and how far the policy has moved."""

import torch

from engine.measures import summary


def evaluate(trainer) -> list:
    """One sample for each held-out prompt, the same draws every time -> list of dicts as in
    samples.jsonl.
    """
    rollout, texts, rewards = trainer.sample(trainer.held_out, 1, seed=2**31 + trainer.config.seed)
    expert_rewards = trainer.expert_rewards(trainer.held_out).tolist()
    kl, logp_expert = held_out_logps(trainer, rollout.completions)
    samples = []
    for i, record in enumerate(trainer.held_out):
        sample = {
            "step": trainer.step,
            "prompt": record["prompt"],
            "expert": record["chosen"],
            "completion": texts[i],
            "reward": float(rewards[i, 0]),
            "expert_reward": expert_rewards[i],
            "tokens": len(rollout.completions[i][0]),
            "truncated": rollout.truncated[i][0],
            "kl": kl[i],
            "logp_expert": logp_expert[i],
            "expert_tokens": len(record["expert_ids"]),
        }
        if "constraints" in record:
            sample["constraints"] = record["constraints"]
        samples.append(sample)
    return samples


@torch.no_grad()
def held_out_logps(trainer, completions):
    """Of each held-out prompt: log pi - log pi_ref of its sample, nats, whose mean estimates KL(pi ||
    ref); and J_imit of its expert answer.
    """
    prompts = [r["prompt_ids"] for r in trainer.held_out]
    members = [[ids[0], r["expert_ids"]] for ids, r in zip(completions, trainer.held_out)]
    kl, logp_expert = [], []
    for part in trainer.parts(prompts, members):
        scored, frozen = part.score(), part.score("reference")
        kl += (scored.logps - frozen.logps)[:, 0].sum(-1).tolist()
        logp_expert += scored.sequence_mean()[:, 1].tolist()
    return kl, logp_expert


def evaluation(samples):
    """What is logged of an evaluation -> {metric: float}."""
    s = summary(samples)
    means = {name: sum(sample[name] for sample in samples) / len(samples) for name in ("kl", "logp_expert")}
    measures = {
        name: s[name] for name in ("reward", "low", "high", "std", "q25", "median", "q75", "expert")
    } | means
    # eval/low and eval/high are None, and not logged, where the prompts are too few for an interval
    return {f"eval/{name}": value for name, value in measures.items() if value is not None}
