"""The loop that every method shares: data order, rollouts, optimiser step, evaluation, log, checkpoint,
resume.

A method is a `settings.Method`; its `update(trainer, records) -> metrics` takes one optimisation step on B
records with the trainer's help, and its file calls `main(METHOD)`. The help, in the order in which a step
asks for it:

    batch = trainer.rollout(records)            # G samples of the policy for each prompt, rewards (B, G)
    for part in trainer.scored(batch, sums):    # a micro-batch: logps, ref_logps, mask (b, G, T)
        loss(part.logps, ..., A[part.groups]).backward()
    metrics = batch.metrics | sums.means() | trainer.optimizer_step()

Everything random in a step (which prompts, which samples) follows from the seed and the step's number alone,
so a run that was stopped and resumed is the run that was never stopped.
"""

import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import UserError
from data.floor import floor_columns
from engine.command_line import Stop, choose_command, exit_status, parse
from engine.evaluation import evaluate, evaluation
from engine.loop import finish, headline, resumed_config, take_steps
from engine.record import RunFolder
from engine.records import encode_records, read_records
from engine.settings import check_ranges, check_settings
from policy import Policy, Scored
from reward import checked_rewards, load_model_reward, load_reward, verifier

# ---------------------------------------------------------------------------------------------------------
# What a step works on


class Sums:
    """The metrics of a step, gathered over its micro-batches."""

    def __init__(self):
        self.total, self.count = defaultdict(float), defaultdict(float)
        self.shares, self.largest = defaultdict(float), {}

    def add(self, name: str, values: Tensor, mask: Tensor | None = None):
        """Values that all count the same in the step's mean: one for each token, or for each completion."""
        values = values.detach() if mask is None else values.detach()[mask]
        self.total[name] += float(values.cpu().double().sum())  # on the host: MPS has no fp64
        self.count[name] += values.numel()

    def mean(self, name: str, value: Tensor, n: int):
        """A mean over n prompts or tokens that the micro-batch has taken already."""
        self.total[name] += float(value.detach()) * int(n)
        self.count[name] += int(n)

    def share(self, name: str, value: Tensor):
        """A micro-batch's share of an update's loss. Its denominator is the update's, so shares add up and
        are not averaged.
        """
        self.shares[name] += float(value.detach())

    def ratio(self, about: dict):
        """What losses.clipped_surrogate says of a micro-batch's ratio pi / pi_old."""
        names = {"clip_fraction_low": "clip/low", "clip_fraction_high": "clip/high", "approx_kl": "kl/update"}
        for key, name in names.items():
            self.mean(name, about[key], about["tokens"])
        self.max("ratio/max", about["ratio_max"])

    def max(self, name: str, value: Tensor):
        self.largest[name] = max(self.largest.get(name, 0.0), float(value))

    def tokens(self, scored: Scored, ref_logps: Tensor, sampled: list):
        """KL, entropy and mismatch of samples, by the policy and by the reference; sampled: log-probs as the
        sampler saw them.
        """
        mask, d = scored.mask, (scored.logps - ref_logps).detach()
        self.add("kl/k1", d, mask)
        self.add("kl/k3", torch.expm1(-d) + d, mask)
        self.add("entropy", scored.entropy, mask)
        seen = torch.tensor([x for group in sampled for row in group for x in row], device=d.device)
        gap = (scored.logps.detach()[mask] - seen).abs()
        self.add("mismatch/mean", gap)
        self.max("mismatch/max", gap.max())

    def means(self, updates: int = 1) -> dict:
        """{metric: float}. updates: how many optimiser updates the losses' shares came from; a loss is their
        mean.
        """
        means = {name: total / max(self.count[name], 1) for name, total in self.total.items()}
        losses = {name: total / updates for name, total in self.shares.items()}
        return means | losses | self.largest


@dataclass
class Part:
    """A micro-batch: b of a step's B prompt groups, as many as one backward pass takes.

    `groups` is the slice of B that they are, so A[part.groups] are their advantages. Trainer.scored fills in
    the tensors, (b, G, T) with T the part's longest completion, 0 where mask is False; what else a method
    works out for these groups it may keep here as well.
    """

    policy: Policy
    groups: slice
    prompts: list  # b lists of ids
    completions: list  # b lists of G lists of ids
    temperature: float
    logps: Tensor | None = None  # log pi(o_t | q, o_<t), nats, with gradient
    ref_logps: Tensor | None = None  # likewise by the reference, without
    mask: Tensor | None = None  # bool, True on the completion's tokens, EOS included
    old_logps: Tensor | None = None  # by pi_old, the policy that the samples are held against (PPO, GRPO)
    old_values: Tensor | None = None  # by the value function at that time (PPO)

    def score(self, role: str = "policy") -> Scored:
        """Log-probabilities under a role, with gradient where it is enabled and the role trains."""
        return self.policy.token_logps(self.prompts, self.completions, self.temperature, role=role)

    def values(self) -> Tensor:
        """The value function before each token, (b, G, T), 0 where masked."""
        return self.policy.token_values(self.prompts, self.completions)[0]

    def cut(self, whole: Tensor) -> Tensor:
        """This part (b, G, T) of a tensor of the whole step (B, G, T')."""
        return whole[self.groups, :, : self.mask.shape[-1]]


@dataclass
class Batch:
    """Rollouts of B prompts, G samples each."""

    records: list
    prompts: list  # B lists of ids
    completions: list  # B lists of G lists of ids
    experts: list  # B lists of ids: `chosen`, EOS included
    sampled_logps: list  # as completions: log-probs as the sampler saw them
    rewards: Tensor  # (B, G)
    expert_rewards: Tensor  # (B,)
    metrics: dict
    parts: list = field(default_factory=list)  # its micro-batches: Trainer.parts, or Trainer.minibatches

    def whole(self, name: str) -> Tensor:
        """A tensor that the parts keep, put together: (B, G, T) with T the step's longest sample, 0 beyond a
        part's own.
        """
        tensors = [getattr(part, name) for part in self.parts]
        T = max(x.shape[-1] for x in tensors)
        return torch.cat([torch.nn.functional.pad(x, (0, T - x.shape[-1])) for x in tensors])


# --------------------------------------------------------------------------------------------------------
# The trainer


class Trainer:
    """What a method's update works with: `policy`, `config`, `step`, and the helpers below."""

    def __init__(self, method, config, reward_fn=None):
        self.method, self.config, self.step = method, config, 0
        self.reward_fn = reward_fn or load_reward(config.reward)
        training, held_out = read_records(config, method, verified=self.reward_fn is verifier)
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
        self.records, self.held_out = encode_records(training, held_out, self.policy, config, method)
        self.params, self.param_groups = {}, []
        self.kept = {}  # tensors of a method's own that its next steps depend on; in the checkpoint
        self.train_parameters(self.policy.trainable(), config.lr)
        self.tokens_generated = 0
        if method.setup:
            method.setup(self)
        self.optimizer = torch.optim.AdamW(self.param_groups, weight_decay=config.weight_decay)

    def train_parameters(self, params: dict, lr: float):
        """Train these parameters (by name) at this learning rate, their gradient clipped apart from others'.
        For Method.setup.
        """
        self.params |= params
        self.param_groups.append({"params": list(params.values()), "base_lr": lr})

    # -- data ------------------------------------------------------------------------------------------------

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

    # -- what updates call -----------------------------------------------------------------------------------

    def rewards(self, records, completions, truncated):
        """Rewards of one text for each record -> list[float]."""
        skip = {"prompt", "prompt_ids", "expert_ids", "rejected_ids", "record_index"}
        names = {name for record in records for name in record} - skip
        columns = {name: [record.get(name) for record in records] for name in names}
        columns["truncated"] = truncated
        return checked_rewards(self.reward_fn, [r["prompt"] for r in records], completions, columns)

    def sample(self, records, group_size, seed):
        """Samples and their rewards -> (Rollout, texts (B*G), rewards (B, G) tensor)."""
        c, prompts = self.config, [r["prompt_ids"] for r in records]
        rollout = self.policy.generate(prompts, group_size, c.max_new_tokens, c.temperature, seed)
        texts = [self.policy.decode(ids) for group in rollout.completions for ids in group]
        truncated = [cut for group in rollout.truncated for cut in group]
        repeated = [record for record in records for _ in range(group_size)]
        rewards = torch.tensor(self.rewards(repeated, texts, truncated))
        return rollout, texts, rewards.view(len(records), group_size)

    def expert_rewards(self, records):
        return torch.tensor(self.rewards(records, [r["chosen"] for r in records], [False] * len(records)))

    def rollout(self, records: list) -> Batch:
        """G samples of the policy for each record, at --temperature, with rewards: a Batch."""
        start, c = time.perf_counter(), self.config
        rollout, _, rewards = self.sample(records, c.group_size, seed=c.seed * 1_000_003 + self.step)
        sampling = time.perf_counter() - start
        expert_rewards = self.expert_rewards(records)
        prompts = [r["prompt_ids"] for r in records]
        metrics = self.rollout_metrics(rollout, rewards, sampling)
        metrics |= {
            "reward/expert": float(expert_rewards.mean()),
            "time/rollout": time.perf_counter() - start,
        }
        return Batch(
            records,
            prompts,
            rollout.completions,
            [r["expert_ids"] for r in records],
            rollout.logps,
            rewards.to(self.policy.device),
            expert_rewards.to(self.policy.device),
            metrics,
            self.parts(prompts, rollout.completions),
        )

    def rollout_metrics(self, rollout, rewards, seconds):
        lengths = torch.tensor([len(ids) for group in rollout.completions for ids in group]).float()
        self.tokens_generated += int(lengths.sum())
        quartiles = torch.quantile(rewards.flatten(), torch.tensor([0.25, 0.5, 0.75])).tolist()
        return {
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std(correction=0)),
            **dict(zip(("reward/q25", "reward/median", "reward/q75"), quartiles)),
            "groups/no_signal": float((rewards.amax(1) == rewards.amin(1)).float().mean()),
            "length/min": float(lengths.min()),
            "length/mean": float(lengths.mean()),
            "length/max": float(lengths.max()),
            "length/truncated": float(torch.tensor(rollout.truncated).float().mean()),
            "tokens/generated": self.tokens_generated,
            "tokens/per_second": float(lengths.sum()) / seconds,
        }

    def parts(
        self, prompts: list, completions: list, temperature: float | None = None, first: int = 0
    ) -> list:
        """Cut groups into Parts: consecutive ones, of at most micro_batch_tokens tokens together but at least
        one whole group.

        prompts: B lists of ids, completions: B lists of G lists of ids; temperature: [--temperature]; first:
        where in the step's groups these ones begin.
        """
        temperature = self.config.temperature if temperature is None else temperature
        sizes = [len(q) + sum(map(len, group)) for q, group in zip(prompts, completions)]
        cuts, tokens = [0], 0
        for i, size in enumerate(sizes):
            if i > cuts[-1] and tokens + size > self.config.micro_batch_tokens:
                cuts.append(i)
                tokens = 0
            tokens += size
        parts = []
        for begin, end in zip(cuts, [*cuts[1:], len(prompts)]):
            groups = slice(first + begin, first + end)
            parts.append(Part(self.policy, groups, prompts[begin:end], completions[begin:end], temperature))
        return parts

    def scored(self, batch: Batch, sums: Sums, with_expert=False, grad=True) -> Iterator[Part]:
        """The step's samples a micro-batch at a time: Parts with logps, ref_logps and mask (b, G, T).

        with_expert: y is scored as one more completion of its prompt, the last one, so (b, G + 1, T): a
        prompt is then computed once for all G + 1. grad=False: of numbers to keep and not to train on. Asked
        again for the same batch, as for another update on the same samples, the policy is scored anew and the
        reference, which has not changed, is not.
        """
        parts, G = batch.parts, self.config.group_size
        if with_expert:
            members = [[*samples, y] for samples, y in zip(batch.completions, batch.experts)]
            parts = self.parts(batch.prompts, members)
        for part in parts:
            first = part.ref_logps is None
            if first:  # before the policy, whose graph would lie in memory meanwhile
                with torch.no_grad():
                    part.ref_logps = part.score("reference").logps
            with torch.set_grad_enabled(grad):
                scored = part.score()
            part.logps, part.mask = scored.logps, scored.mask
            if first:
                samples = scored.samples() if with_expert else scored
                ref_logps = part.ref_logps[:, :G, : samples.mask.shape[-1]]
                sums.tokens(samples, ref_logps, batch.sampled_logps[part.groups])
            yield part
            part.logps = part.logps.detach()  # the graph lives for its own turn only

    def scored_experts(self, records: list, temperature: float = 1.0, grad=True) -> Iterator[Part]:
        """The records' expert answers y likewise, in groups of one: Parts with logps and mask (b, 1, T)."""
        answers = [[r["expert_ids"]] for r in records]
        for part in self.parts([r["prompt_ids"] for r in records], answers, temperature):
            with torch.set_grad_enabled(grad):
                scored = part.score()
            part.logps, part.mask = scored.logps, scored.mask
            yield part

    def minibatches(self, batch: Batch, count: int) -> list:
        """The step's prompts in `count` shares -> lists of Parts; together they become batch.parts.

        The prompts are in random order already, so a share is consecutive. A share's parts are the same in
        every pass: scored in another cut a token's log-prob would round otherwise in bf16, and the ratio
        before the first update would not be exactly 1.
        """
        B, end, minibatches = len(batch.prompts), 0, []
        for i in range(count):
            begin, end = end, end + B // count + (i < B % count)  # as equal as possible, larger ones first
            parts = self.parts(batch.prompts[begin:end], batch.completions[begin:end], first=begin)
            minibatches.append(parts)
        batch.parts = [part for parts in minibatches for part in parts]
        return minibatches

    def shuffled(self, minibatches: list, epochs: int) -> Iterator[list]:
        """`epochs` passes over them, each in another order, of seed and step alone: a resume repeats it."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        for _ in range(epochs):
            for m in torch.randperm(len(minibatches), generator=generator).tolist():
                yield minibatches[m]

    def optimizer_step(self) -> dict:
        """Clip the gathered gradient, step, clear -> {"grad_norm", "lr"}, the policy's."""
        c = self.config
        factor = schedule(c.lr_schedule, self.step, c.warmup_steps, c.steps)
        norms = []  # the policy's first
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
            norms.append(float(torch.nn.utils.clip_grad_norm_(group["params"], c.max_grad_norm)))
        if not all(map(math.isfinite, norms)):
            raise UserError(
                f"step {self.step + 1}: the gradient is not finite; nothing was updated. Try a lower --lr or "
                "--dtype float32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norms[0], "lr": self.optimizer.param_groups[0]["lr"]}

    def note(self, text: str):
        """A line for the user, at the first step only."""
        if self.step == 0:
            tqdm.write(text)

    # -- state -----------------------------------------------------------------------------------------------

    def state(self) -> dict:
        """Everything the next step depends on, as tensors, for one safetensors file."""
        tensors = {f"kept/{name}": tensor for name, tensor in self.kept.items()}
        tensors["rng"] = torch.get_rng_state()
        for name, p in self.params.items():
            tensors[f"param/{name}"] = p.detach()
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"{key}/{name}"] = value
        return {k: v.cpu().contiguous().clone() for k, v in tensors.items()}

    def load_state(self, tensors: dict, meta: dict):
        """The inverse of `state`; meta: {"step", "tokens_generated"}."""
        self.step, self.tokens_generated = meta["step"], meta["tokens_generated"]
        torch.set_rng_state(tensors["rng"])
        self.kept = {}
        for key, value in tensors.items():
            if key.startswith("kept/"):
                self.kept[key.removeprefix("kept/")] = value.to(self.policy.device)
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(tensors[f"param/{name}"])
                self.optimizer.state[p] = {}
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{key}/{name}" in tensors:
                        device = "cpu" if key == "step" else p.device
                        self.optimizer.state[p][key] = tensors[f"{key}/{name}"].to(device)


def schedule(kind, step, warmup, steps):
    """Factor on the learning rate at a step (from 0): linear warm-up, then constant, or linear or cosine to 0
    after the last step.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[kind]


# --------------------------------------------------------------------------------------------------------
# The run


def run(method, given, reward_fn=None):
    """Train, or go on with a run. given: {setting: value} as from the command line.

    Returns the run folder's path, or None if it was stopped.
    """
    check_ranges(method.config(**given))
    with RunFolder.reserved(given, method) as folder:
        config = resumed_config(method, given, folder) if given.get("resume") else method.config(**given)
        trainer = Trainer(method, check_settings(config), reward_fn)
        before = folder.restore(trainer) if config.resume else None
        print(headline(trainer))
        with Stop() as stop:
            if before is None:
                before = with_floor(trainer, evaluate(trainer))
                folder.create(trainer, before, {"step": 0} | evaluation(before))
            after = take_steps(trainer, folder, stop)
        trainer.policy.save(folder.adapter)
        if trainer.step < config.steps:
            go_on = f"python {Path(sys.argv[0]).name} --resume --out {folder.path}"
            print(f"stopped after step {trainer.step}; go on with: {go_on}", file=sys.stderr)
            return None
        finish(trainer, folder, before, after)
    return folder.path


def with_floor(trainer, samples):
    """Held-out samples with "floor" and "floor_reward", of data/floor.py, where the reward is the verifier.

    Which constant answer another reward would like best is a guess, or a search of its own.
    """
    if trainer.reward_fn is not verifier:
        return samples
    floor = floor_columns(trainer.held_out, verifier)
    return [sample | columns for sample, columns in zip(samples, floor)]


def main(method, argv=None, reward_fn=None, description=""):
    """The command line of a Method, or of a dict {first word: Method} -> exit status.

    0 finished, 2 an error that the user can mend (one line on stderr), 130 stopped.
    """
    return exit_status(lambda: command(method, argv, reward_fn, description))


def command(method, argv, reward_fn, description):
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(method, dict):
        word, argv = choose_command(method, argv, description)
        method = method[word]
    return run(method, parse(method.config, argv, description), reward_fn)
