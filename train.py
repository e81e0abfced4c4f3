"""The loop that every method shares: data order, rollouts, optimiser step, evaluation, log, checkpoint, resume.

A method is a `settings.Method`; its `update(trainer, records) -> metrics` takes one optimisation step on a list of records with the
trainer's help (`rollout`, `micro_batches`, `optimizer_step`), and its file calls `main(METHOD)`.

Everything random in a step (which prompts, which samples) follows from the seed and the step's number alone, so a run that was
stopped and resumed is the run that was never stopped.
"""

import math
import signal
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data import UserError, load_records
from engine.command_line import exit_status, parse
from engine.draw import draw_curves
from engine.measures import report, summary
from engine.models import trim_memory
from engine.record import RunFolder, peak_memory, read_jsonl
from engine.settings import check_settings
from policy import Policy
from reward import checked_rewards, load_model_reward, load_reward, verifier


class Sums:
    """Means over a whole step of quantities that arrive in micro-batches."""

    def __init__(self):
        self.total, self.count, self.largest = defaultdict(float), defaultdict(float), {}

    def add(self, name, values, mask=None):
        values = values.detach() if mask is None else values.detach()[mask]
        self.total[name] += float(values.double().sum())
        self.count[name] += values.numel()

    def means(self):
        return {name: total / max(self.count[name], 1) for name, total in self.total.items()} | self.largest

    def tokens(self, scored, reference, sampled):
        """KL, entropy and mismatch of a micro-batch: Scored by policy and by reference, and the sampler's own log-probs (lists)."""
        mask, d = scored.mask, (scored.logps - reference.logps).detach()
        self.add("kl/k1", d, mask)
        self.add("kl/k3", torch.expm1(-d) + d, mask)
        self.add("entropy", scored.entropy, mask)
        seen = torch.tensor([x for group in sampled for row in group for x in row], device=d.device)
        gap = (scored.logps.detach()[mask] - seen).abs()
        self.add("mismatch/mean", gap)
        self.largest["mismatch/max"] = max(self.largest.get("mismatch/max", 0.0), float(gap.max()))


# ---------------------------------------------------------------------------------------------------------------------------------
# The trainer


@dataclass
class Batch:
    """Rollouts of B prompts, G samples each."""

    records: list
    prompts: list  # B lists of ids
    completions: list  # B lists of G lists of ids
    references: list  # B lists of ids: `chosen`, EOS included
    sampled_logps: list  # as completions: log-probs as the sampler saw them
    rewards: torch.Tensor  # (B, G)
    reference_rewards: torch.Tensor  # (B,)
    metrics: dict


class Trainer:
    """What a method's update works with: `policy`, `config`, `step`, and the helpers below."""

    def __init__(self, method, config, reward_fn=None):
        self.method, self.config, self.step = method, config, 0
        self.reward_fn = reward_fn or load_reward(config.reward)
        level = "tiny" if config.model == "tiny" else "chat"
        # A run shorter than one pass over the data reads, encodes and checks only the records it will use; where long ones are left
        # out, others take their place.
        shorter = config.max_prompt_tokens or config.max_reference_tokens
        wanted = {"records": config.steps * config.prompts_per_step, "held_out": config.eval_prompts}
        self.records = load_records(
            config.data, "train", None if shorter else wanted["records"], seed=config.seed, level=level
        )
        self.held_out = load_records(
            config.data, "heldout", None if shorter else wanted["held_out"], seed=0, level=level
        )
        if self.reward_fn is verifier and not all("constraints" in r for r in self.records + self.held_out):
            raise UserError(
                f"data {config.data}: has no 'constraints' for the verifier to check; use --data tasks, or another --reward"
            )
        for record in self.records if method.needs_rejected else ():
            if not isinstance(record.get("rejected"), str):
                raise UserError(
                    f"data {config.data}: {method.name} needs a 'rejected' answer in every record; the one of the prompt "
                    f"{str(record['prompt'])[:60]!r} has none"
                )
        self.policy = Policy.load(
            config.model,
            quantize=config.quantize,
            adapter=config.from_adapter,
            reference=config.reference,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            device=config.device,
            dtype=config.dtype,
            seed=config.seed,
            gradient_checkpointing=config.gradient_checkpointing == "on",
        )
        self.reward_fn = self.reward_fn or load_model_reward(config, self.policy)
        self.encode_all(wanted)
        self.params, self.param_groups = {}, []
        self.kept = {}  # tensors of a method's own that its next steps depend on
        self.train_parameters(self.policy.trainable(), config.lr)
        self.tokens_generated = 0
        if method.setup:
            method.setup(self)
        self.optimizer = torch.optim.AdamW(self.param_groups, weight_decay=config.weight_decay)

    def train_parameters(self, params, lr):
        """Train these parameters (by name) at this learning rate, their gradient clipped apart from others'. For Method.setup."""
        self.params |= params
        self.param_groups.append({"params": list(params.values()), "base_lr": lr})

    # -- data ---------------------------------------------------------------------------------------------------------------------

    def encode_all(self, wanted):
        """Token ids of all prompts and references that this run can meet, checked against the context before anything is trained."""
        c, policy = self.config, self.policy
        unknown, dropped, tokens = 0, 0, 0
        for part, most in wanted.items():
            kept = []
            for record in getattr(self, part):
                if len(kept) == most:
                    break
                ids, answer = policy.encode_prompt(record["prompt"]), policy.encode_answer(record["chosen"])
                answers = {"reference_ids": answer}
                if self.method.needs_rejected and part == "records":
                    answers["rejected_ids"] = policy.encode_answer(record["rejected"])
                longest = max(map(len, answers.values()))
                if 0 < c.max_prompt_tokens < len(ids) or 0 < c.max_reference_tokens < longest:
                    dropped += 1
                    continue
                if len(ids) + max(longest, c.max_new_tokens) > policy.context:
                    raise UserError(
                        f"data {c.data}: the prompt {str(record['prompt'])[:60]!r} has {len(ids)} tokens and its answer {longest}; with "
                        f"{c.max_new_tokens} new tokens that passes the model's context of {policy.context}: set --max-prompt-tokens and "
                        "--max-reference-tokens to leave such records out"
                    )
                tokens += len(ids)
                unknown += (
                    ids.count(policy.tokenizer.unk_token_id)
                    if policy.tokenizer.unk_token_id is not None
                    else 0
                )
                kept.append(record | {"prompt_ids": ids, "record_index": len(kept), **answers})
            if not kept:
                raise UserError(
                    f"data {c.data}: no record is short enough for --max-prompt-tokens and --max-reference-tokens"
                )
            setattr(self, part, kept)
        if dropped:
            print(
                f"left out {dropped} records longer than --max-prompt-tokens or --max-reference-tokens",
                file=sys.stderr,
            )
        if unknown > 0.1 * tokens:
            raise UserError(
                f"data {c.data}: {unknown / tokens:.0%} of its tokens are unknown to model {c.model}; choose another --model"
            )

    def order(self, n):
        """The first n record indices of the run: a new seeded permutation for every pass over the data."""
        indices, epoch = [], 0
        while len(indices) < n:
            generator = torch.Generator().manual_seed(self.config.seed * 7919 + epoch)
            indices += torch.randperm(len(self.records), generator=generator).tolist()
            epoch += 1
        return indices[:n]

    def next_records(self):
        B = self.config.prompts_per_step
        return [self.records[i] for i in self.order((self.step + 1) * B)[-B:]]

    # -- what updates call --------------------------------------------------------------------------------------------------------

    def rewards(self, records, completions, truncated):
        """Rewards of one text for each record -> list[float]."""
        skip = {"prompt", "prompt_ids", "reference_ids", "rejected_ids", "record_index"}
        names = {name for record in records for name in record} - skip
        columns = {name: [record.get(name) for record in records] for name in names} | {
            "truncated": truncated
        }
        return checked_rewards(self.reward_fn, [r["prompt"] for r in records], completions, columns)

    def sample(self, records, group_size, seed):
        """Samples and their rewards -> (Rollout, texts (B*G), rewards (B, G) tensor)."""
        c = self.config
        rollout = self.policy.generate(
            [r["prompt_ids"] for r in records], group_size, c.max_new_tokens, c.temperature, seed
        )
        texts = [self.policy.decode(ids) for group in rollout.completions for ids in group]
        truncated = [cut for group in rollout.truncated for cut in group]
        repeated = [record for record in records for _ in range(group_size)]
        return (
            rollout,
            texts,
            torch.tensor(self.rewards(repeated, texts, truncated)).view(len(records), group_size),
        )

    def reference_rewards(self, records):
        return torch.tensor(self.rewards(records, [r["chosen"] for r in records], [False] * len(records)))

    def rollout(self, records):
        """G samples of the policy for each record, with rewards: a Batch."""
        start = time.perf_counter()
        rollout, _, rewards = self.sample(
            records, self.config.group_size, seed=self.config.seed * 1_000_003 + self.step
        )
        sampling = time.perf_counter() - start
        reference_rewards = self.reference_rewards(records)
        lengths = torch.tensor([len(ids) for group in rollout.completions for ids in group]).float()
        self.tokens_generated += int(lengths.sum())
        q25, median, q75 = torch.quantile(rewards.flatten(), torch.tensor([0.25, 0.5, 0.75])).tolist()
        metrics = {
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std(correction=0)),
            "reward/q25": q25,
            "reward/median": median,
            "reward/q75": q75,
            "reward/reference": float(reference_rewards.mean()),
            "groups/no_signal": float((rewards.amax(1) == rewards.amin(1)).float().mean()),
            "length/min": float(lengths.min()),
            "length/mean": float(lengths.mean()),
            "length/max": float(lengths.max()),
            "length/truncated": float(torch.tensor(rollout.truncated).float().mean()),
            "tokens/generated": self.tokens_generated,
            "tokens/per_second": float(lengths.sum()) / sampling,
            "time/rollout": time.perf_counter() - start,
        }
        return Batch(
            records,
            [r["prompt_ids"] for r in records],
            rollout.completions,
            [r["reference_ids"] for r in records],
            rollout.logps,
            rewards.to(self.policy.device),
            reference_rewards.to(self.policy.device),
            metrics,
        )

    def micro_batches(self, prompts, completions, begin=0, end=None):
        """Consecutive slices of the groups begin..end (default: all B), each of at most micro_batch_tokens tokens, at least one group."""
        end, tokens = len(prompts) if end is None else end, 0
        for i in range(begin, end):
            size = len(prompts[i]) + sum(map(len, completions[i]))
            if i > begin and tokens + size > self.config.micro_batch_tokens:
                yield slice(begin, i)
                begin, tokens = i, 0
            tokens += size
        yield slice(begin, end)

    def optimizer_step(self):
        """Clip the gathered gradient, step, clear -> {"grad_norm", "lr"}."""
        c = self.config
        factor = schedule(c.lr_schedule, self.step, c.warmup_steps, c.steps)
        norms = []  # the policy's first
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
            norms.append(float(torch.nn.utils.clip_grad_norm_(group["params"], c.max_grad_norm)))
        if not all(map(math.isfinite, norms)):
            raise UserError(
                f"step {self.step + 1}: the gradient is not finite; nothing was updated. Try a lower --lr or --dtype float32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norms[0], "lr": c.lr * factor}

    def note(self, text):
        """A line for the user, at the first step only."""
        if self.step == 0:
            tqdm.write(text)

    # -- evaluation ---------------------------------------------------------------------------------------------------------------

    def evaluate(self):
        """One sample for each held-out prompt, the same draws every time -> list of dicts as in samples.jsonl."""
        rollout, texts, rewards = self.sample(self.held_out, 1, seed=2**31 + self.config.seed)
        reference_rewards = self.reference_rewards(self.held_out).tolist()
        kl, logp_reference = self.held_out_logps(rollout.completions)
        return [
            {
                "step": self.step,
                "prompt": r["prompt"],
                "reference": r["chosen"],
                "completion": text,
                "reward": float(reward),
                "reference_reward": reference,
                "tokens": len(ids[0]),
                "truncated": cut[0],
                "kl": kl[i],
                "logp_reference": logp_reference[i],
                "reference_tokens": len(r["reference_ids"]),
                **({"constraints": r["constraints"]} if "constraints" in r else {}),
            }
            for i, (r, text, reward, reference, ids, cut) in enumerate(
                zip(
                    self.held_out,
                    texts,
                    rewards[:, 0],
                    reference_rewards,
                    rollout.completions,
                    rollout.truncated,
                )
            )
        ]

    @torch.no_grad()
    def held_out_logps(self, completions):
        """Of each held-out prompt: log pi - log pi_ref of its sample, nats, whose mean estimates KL(pi || ref); and J_imit of its reference."""
        prompts = [r["prompt_ids"] for r in self.held_out]
        members = [[ids[0], r["reference_ids"]] for ids, r in zip(completions, self.held_out)]
        kl, logp_reference = [], []
        for part in self.micro_batches(prompts, members):
            scored, frozen = (
                self.policy.token_logps(prompts[part], members[part], self.config.temperature, role)
                for role in ("policy", "reference")
            )
            kl += (scored.logps - frozen.logps)[:, 0].sum(-1).tolist()
            logp_reference += scored.sequence_mean()[:, 1].tolist()
        return kl, logp_reference

    # -- state --------------------------------------------------------------------------------------------------------------------

    def state(self):
        """Everything the next step depends on, as tensors, for one safetensors file."""
        tensors = {"rng": torch.get_rng_state()} | {
            f"kept/{name}": tensor for name, tensor in self.kept.items()
        }
        for name, p in self.params.items():
            tensors[f"param/{name}"] = p.detach()
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"{key}/{name}"] = value
        return {k: v.cpu().contiguous().clone() for k, v in tensors.items()}

    def load_state(self, tensors, meta):
        self.step, self.tokens_generated = meta["step"], meta["tokens_generated"]
        torch.set_rng_state(tensors["rng"])
        self.kept = {
            k.removeprefix("kept/"): v.to(self.policy.device)
            for k, v in tensors.items()
            if k.startswith("kept/")
        }
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(tensors[f"param/{name}"])
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors]
                self.optimizer.state[p] = {
                    k: tensors[f"{k}/{name}"].to("cpu" if k == "step" else p.device) for k in keys
                }


def schedule(kind, step, warmup, steps):
    """Factor on the learning rate at a step (from 0): linear warm-up, then constant, or linear or cosine to 0 after the last step."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[kind]


# ---------------------------------------------------------------------------------------------------------------------------------
# The loop


class Stop:
    """Ctrl-C once: finish the step and save. Twice: KeyboardInterrupt; the last checkpoint stands."""

    def __enter__(self):
        self.asked = False
        self.before = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def handle(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step, then saving (Ctrl-C again: stop at once)", file=sys.stderr)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def run(method, given, reward_fn=None):
    """Train. given: {setting: value} as from the command line. Returns the run folder's path, or None if it was stopped."""
    folder = RunFolder.choose(given, method)
    resume = given.get("resume", False)
    config = method.config(**(folder.settings(method) | {"resume": True} if resume else given))
    if resume:
        check_settings(wanted := method.config(**given))
        changed = [
            name
            for name in given
            if name not in ("resume", "out", "device") and getattr(wanted, name) != getattr(config, name)
        ]
        if changed:
            raise UserError(
                f"--resume: {changed[0]} was {getattr(config, changed[0])} in {folder.path}; leave the flag out, or start a new run"
            )
        config.device = given.get("device", config.device)
    check_settings(config)
    trainer = Trainer(method, config, reward_fn)
    policy = trainer.policy
    if resume:
        folder.restore(trainer)
        if trainer.step >= config.steps:
            raise UserError(
                f"--resume: {folder.path} has finished its {config.steps} steps; go on from it with --from-adapter {folder.path}/adapter"
            )
        before = [s for s in read_jsonl(folder.samples) if s["step"] == 0]
    count = sum(p.numel() for p in trainer.params.values() if p.requires_grad)
    print(
        f"{method.name} · {config.model} · {config.quantize if config.quantize == 'nf4' else str(policy.dtype).split('.')[-1]} on {policy.device} · "
        f"LoRA rank {config.lora_rank}, {count / 1e6:.2f} M trained · {len(trainer.records)} training and {len(trainer.held_out)} held-out prompts"
    )
    with Stop() as stop:
        if not resume:
            before = trainer.evaluate()
            folder.create(trainer, before, {"step": 0} | evaluation(before))
        with tqdm(
            total=config.steps, initial=trainer.step, desc=method.name, unit="step", dynamic_ncols=True
        ) as bar:  # closed before an error is reported
            while trainer.step < config.steps and not stop.asked:
                start = time.perf_counter()
                metrics = method.update(trainer, trainer.next_records())
                trainer.step += 1
                metrics["time/update"] = time.perf_counter() - start - metrics.get("time/rollout", 0.0)
                metrics["memory/peak"] = peak_memory()
                due = trainer.step % config.eval_every == 0 or trainer.step == config.steps
                if due:
                    after = trainer.evaluate()
                    metrics |= evaluation(after)
                trim_memory(trainer.step)
                folder.log({"step": trainer.step} | metrics)
                bar.set_postfix_str(postfix(metrics))
                bar.update()
                if due or stop.asked:
                    folder.save(trainer)
                    draw_curves(
                        read_jsonl(folder.metrics), PANELS + method.panels, folder.path / "curves.png"
                    )
    policy.save(folder.path / "adapter")
    script = Path(sys.argv[0]).name
    if trainer.step < config.steps:
        print(
            f"stopped after step {trainer.step}; go on with: python {script} --resume --out {folder.path}",
            file=sys.stderr,
        )
        return None
    folder.write_samples(before + after)
    print("\n" + report(before, after))
    print(
        f"The run is in {folder.path}: curves.png, metrics.jsonl, samples.jsonl, adapter/ (loads with peft.PeftModel.from_pretrained)."
    )
    print(f"To try next: {method.next}; or go on from here: --from-adapter {folder.path / 'adapter'}")
    return folder.path


# Panels of curves.png that every method has: (title, y label, metrics).
PANELS = [
    ("Reward", "reward", ["reward/mean", "reward/reference", "eval/reward"]),
    ("KL to the reference", "nats/token", ["kl/k1", "kl/k3"]),
    ("Entropy", "nats/token", ["entropy"]),
    ("Length of samples", "tokens", ["length/min", "length/mean", "length/max"]),
    ("Shares", "share", ["length/truncated", "groups/no_signal"]),
]


def evaluation(samples):
    s = summary(samples)
    means = {
        name: sum(sample[name] for sample in samples) / len(samples) for name in ("kl", "logp_reference")
    }
    measures = {
        name: s[name] for name in ("reward", "low", "high", "std", "q25", "median", "q75", "reference")
    } | means
    return {f"eval/{name}": value for name, value in measures.items()}


def postfix(metrics):
    names = {
        "reward/mean": "reward",
        "reward/reference": "ref",
        "kl/k1": "kl",
        "entropy": "ent",
        "length/mean": "len",
        "loss": "loss",
    }
    return " ".join(f"{short} {metrics[name]:.3g}" for name, short in names.items() if name in metrics)


def main(method, argv=None, reward_fn=None, description=""):
    """The command line of a method -> exit status: 0 finished, 2 an error the user can mend (one line on stderr), 130 stopped."""
    return exit_status(lambda: run(method, parse(method.config, argv, description), reward_fn))
