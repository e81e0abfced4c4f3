"""The loop that every method shares: data order, rollouts, optimiser step, evaluation, log, checkpoint,
resume.

A method is a `settings.Method`; its `update(trainer, records) -> metrics` takes one optimisation step on B
records with the trainer's help, and its file calls `main(METHOD)`. The help, in the order in which a step
asks for it:

    batch = trainer.rollout(records)                 # G samples of the policy for each prompt, and their rewards (B, G)
    for part in trainer.scored(batch, sums):         # a micro-batch: logps, ref_logps, mask (b, G, T)
        loss(part.logps, ..., A[part.groups]).backward()
    metrics = batch.metrics | sums.means() | trainer.optimizer_step()

Everything random in a step (which prompts, which samples) follows from the seed and the step's number alone,
so a run that was stopped and resumed is the run that was never stopped.
"""

import importlib.util
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

from data import UserError, load_records
from data.floor import floor_columns
from engine.command_line import Stop, choose_command, exit_status, parse
from engine.draw import draw_curves
from engine.folders import write_whole
from engine.measures import summary
from engine.models import first_line, trim_memory
from engine.record import RunFolder, peak_memory, read_jsonl
from engine.report import report
from engine.settings import check_ranges, check_settings
from policy import Policy, Scored
from reward import checked_rewards, load_model_reward, verifier

# ---------------------------------------------------------------------------------------------------------------------------------
# What a step works on


class Sums:
    """The metrics of a step, gathered over its micro-batches."""

    def __init__(self):
        self.total, self.count = defaultdict(float), defaultdict(float)
        self.shares, self.largest = defaultdict(float), {}

    def add(self, name: str, values: Tensor, mask: Tensor | None = None):
        """Values that all count the same in the step's mean: one for each token, or for each completion."""
        values = values.detach() if mask is None else values.detach()[mask]
        self.total[name] += float(values.double().sum())
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


# ---------------------------------------------------------------------------------------------------------------------------------
# The trainer


class Trainer:
    """What a method's update works with: `policy`, `config`, `step`, and the helpers below."""

    def __init__(self, method, config, reward_fn=None):
        self.method, self.config, self.step = method, config, 0
        self.reward_fn = reward_fn or load_reward(config.reward)
        wanted = {"records": config.steps * config.prompts_per_step, "held_out": config.eval_prompts}
        self.load_data(wanted)
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

    # -- data
    # ---------------------------------------------------------------------------------------------------------------------

    def load_data(self, wanted):
        """self.records, self.held_out. UserError where they lack a column that the reward or the method
        reads.

        A run shorter than one pass over the data reads, encodes and checks only the records it will use;
        where long ones are left out, others take their place, so then all are read.
        """
        c, method = self.config, self.method
        level = "tiny" if c.model == "tiny" else "chat"
        if c.max_prompt_tokens or c.max_expert_tokens:
            wanted = dict.fromkeys(wanted, math.inf)
        self.records = load_records(c.data, "train", wanted["records"], seed=c.seed, level=level)
        self.held_out = load_records(c.data, "heldout", wanted["held_out"], seed=0, level=level)
        if self.reward_fn is verifier and not all("constraints" in r for r in self.records + self.held_out):
            raise UserError(
                f"data {c.data}: has no 'constraints' for the verifier to check; use --data tasks, or another --reward"
            )
        for record in self.records if method.needs_rejected else ():
            if not isinstance(record.get("rejected"), str):
                raise UserError(
                    f"data {c.data}: {method.name} needs a 'rejected' answer in every record; the one of the prompt "
                    f"{str(record['prompt'])[:60]!r} has none"
                )

    def encode_all(self, wanted):
        """Token ids of all prompts and expert answers that this run can meet, checked against the context
        before anything is trained.
        """
        c, dropped, kept = self.config, 0, {}
        for part, most in wanted.items():
            kept[part] = []
            for record in getattr(self, part):
                if len(kept[part]) == most:
                    break
                encoded = self.encode(record, with_rejected=self.method.needs_rejected and part == "records")
                if encoded is None:
                    dropped += 1
                else:
                    kept[part].append(encoded | {"record_index": len(kept[part])})
            if not kept[part]:
                raise UserError(
                    f"data {c.data}: no record is short enough for --max-prompt-tokens and --max-expert-tokens"
                )
        self.records, self.held_out = kept["records"], kept["held_out"]
        if dropped:
            print(
                f"left out {dropped} records longer than --max-prompt-tokens or --max-expert-tokens",
                file=sys.stderr,
            )
        self.check_unknown()

    def encode(self, record, with_rejected):
        """A record with its token ids; None if it is longer than the flags allow. UserError if it passes the
        model's context.
        """
        c, policy = self.config, self.policy
        ids = policy.encode_prompt(record["prompt"])
        answers = {"expert_ids": policy.encode_answer(record["chosen"])}
        if with_rejected:
            answers["rejected_ids"] = policy.encode_answer(record["rejected"])
        longest = max(map(len, answers.values()))
        if 0 < c.max_prompt_tokens < len(ids) or 0 < c.max_expert_tokens < longest:
            return None
        if len(ids) + max(longest, c.max_new_tokens) > policy.context:
            raise UserError(f"data {c.data}: {too_long(record, len(ids), longest, c, policy.context)}")
        return record | {"prompt_ids": ids, **answers}

    def check_unknown(self):
        """UserError where the model's vocabulary hardly covers the prompts: it would train on <unk>."""
        prompts, unk = (
            [r["prompt_ids"] for r in self.records + self.held_out],
            self.policy.tokenizer.unk_token_id,
        )
        tokens, unknown = sum(map(len, prompts)), sum(ids.count(unk) for ids in prompts)
        if unk is not None and unknown > 0.1 * tokens:
            raise UserError(
                f"data {self.config.data}: {unknown / tokens:.0%} of its tokens are unknown to model {self.config.model}; "
                "choose another --model"
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

    # -- what updates call
    # --------------------------------------------------------------------------------------------------------

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
        """`epochs` passes over them, each in another order, of seed and step alone: a resumed run repeats it."""
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
                f"step {self.step + 1}: the gradient is not finite; nothing was updated. Try a lower --lr or --dtype float32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norms[0], "lr": self.optimizer.param_groups[0]["lr"]}

    def note(self, text: str):
        """A line for the user, at the first step only."""
        if self.step == 0:
            tqdm.write(text)

    # -- evaluation
    # ---------------------------------------------------------------------------------------------------------------

    def evaluate(self) -> list:
        """One sample for each held-out prompt, the same draws every time -> list of dicts as in
        samples.jsonl.
        """
        rollout, texts, rewards = self.sample(self.held_out, 1, seed=2**31 + self.config.seed)
        expert_rewards = self.expert_rewards(self.held_out).tolist()
        kl, logp_expert = self.held_out_logps(rollout.completions)
        samples = []
        for i, record in enumerate(self.held_out):
            sample = {
                "step": self.step,
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
    def held_out_logps(self, completions):
        """Of each held-out prompt: log pi - log pi_ref of its sample, nats, whose mean estimates KL(pi ||
        ref); and J_imit of its expert answer.
        """
        prompts = [r["prompt_ids"] for r in self.held_out]
        members = [[ids[0], r["expert_ids"]] for ids, r in zip(completions, self.held_out)]
        kl, logp_expert = [], []
        for part in self.parts(prompts, members):
            scored, frozen = part.score(), part.score("reference")
            kl += (scored.logps - frozen.logps)[:, 0].sum(-1).tolist()
            logp_expert += scored.sequence_mean()[:, 1].tolist()
        return kl, logp_expert

    # -- state
    # --------------------------------------------------------------------------------------------------------------------

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


def too_long(record, prompt, answer, c, context):
    """What does not fit into the context, in tokens, and which flag helps: the record's, or the samples'."""
    said = f"the prompt {str(record['prompt'])[:60]!r} has {prompt} tokens and its answer {answer}; "
    if prompt + answer <= context and c.max_new_tokens > answer:
        said += f"with --max-new-tokens {c.max_new_tokens} that passes the model's context of {context}: "
        return said + f"set it to at most {context - prompt} for this prompt"
    said += f"with {c.max_new_tokens} new tokens that passes the model's context of {context}: "
    return said + "set --max-prompt-tokens and --max-expert-tokens to leave such records out"


def schedule(kind, step, warmup, steps):
    """Factor on the learning rate at a step (from 0): linear warm-up, then constant, or linear or cosine to 0
    after the last step.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[kind]


def load_reward(name):
    """verifier, or a function of the user's own Python file; None for a model, which is loaded once the
    policy is there.
    """
    if name == "verifier":
        return verifier
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        model = name.removeprefix("pairwise:").removeprefix("judge:")
        if not Path(model).exists() and "/" not in model and model != "tiny":
            raise UserError(
                f"--reward {name}: choose verifier, FILE.py:FUNCTION, a reward model (DIR or hub name), pairwise:DIR, or judge:MODEL"
            )
        return None
    if not Path(path).is_file():
        raise UserError(f"--reward {name}: no file {path}")
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, function)
    except Exception as error:  # it is the user's program
        raise UserError(
            f"--reward {name}: cannot be loaded ({type(error).__name__}: {first_line(error)})"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------------------
# The loop


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
                before = with_floor(trainer, trainer.evaluate())
                folder.create(trainer, before, {"step": 0} | evaluation(before))
            after = take_steps(trainer, folder, stop)
        trainer.policy.save(folder.adapter)
        if trainer.step < config.steps:
            go_on = f"python {Path(sys.argv[0]).name} --resume --out {folder.path}"
            print(f"stopped after step {trainer.step}; go on with: {go_on}", file=sys.stderr)
            return None
        finish(trainer, folder, before, after)
    return folder.path


def resumed_config(method, given, folder):
    """The settings of the run in `folder`. UserError if it is finished, or a flag asks for other settings."""
    if given.get("overwrite"):
        raise UserError("--resume goes on with a run and --overwrite replaces it: give one of them")
    config = method.config(**folder.settings(method) | {"resume": True})
    wanted = check_settings(method.config(**given))
    for name in given:
        saved = getattr(config, name)
        if name not in ("resume", "out", "device") and getattr(wanted, name) != saved:
            raise UserError(
                f"--resume: {name} was {saved} in {folder.path}; leave the flag out, or start a new run"
            )
    if folder.report.is_file():
        raise UserError(
            f"--resume: {folder.path} has finished its {config.steps} steps; go on from it with "
            f"--from-adapter {folder.adapter}"
        )
    config.device = given.get("device", config.device)
    return config


def headline(trainer):
    """What is trained, on what, with how much of it."""
    c, policy = trainer.config, trainer.policy
    kind = "nf4" if c.quantize == "nf4" else str(policy.dtype).removeprefix("torch.")
    count = sum(p.numel() for p in trainer.params.values() if p.requires_grad)
    return (
        f"{trainer.method.name} · {c.model} · {kind} on {policy.device} · LoRA rank {c.lora_rank}, "
        f"{count / 1e6:.2f} M trained · {len(trainer.records)} training and {len(trainer.held_out)} "
        "held-out prompts"
    )


def take_steps(trainer, folder, stop):
    """Steps until the last one, or until `stop` is asked for -> the last evaluation, None without one."""
    steps, every, after = trainer.config.steps, trainer.config.eval_every, None
    bar = tqdm(total=steps, initial=trainer.step, desc=trainer.method.name, unit="step", dynamic_ncols=True)
    with bar:  # closed before an error is reported
        while trainer.step < steps and not stop.asked:
            metrics = take_step(trainer)
            due = trainer.step % every == 0 or trainer.step == steps
            if due:
                after = trainer.evaluate()
                metrics |= evaluation(after)
            trim_memory(trainer.step)
            folder.log({"step": trainer.step} | metrics)
            bar.set_postfix_str(postfix(metrics))
            bar.update()
            if due or stop.asked:
                folder.save(trainer)
                draw(trainer.method, folder)
    return after


def take_step(trainer):
    """One optimisation step on the run's next prompts -> its metrics."""
    start = time.perf_counter()
    metrics = trainer.method.update(trainer, trainer.next_records())
    trainer.step += 1
    metrics["time/update"] = time.perf_counter() - start - metrics.get("time/rollout", 0.0)
    metrics["memory/peak"] = peak_memory()
    return metrics


def draw(method, folder):
    lines = [{k: v for k, v in line.items() if v is not None} for line in read_jsonl(folder.metrics)]
    draw_curves(lines, PANELS + method.panels, folder.curves)


def finish(trainer, folder, before, after):
    """What a finished run has and an interrupted one lacks; report.txt, written last, is the sign."""
    if after is None:  # killed after its last checkpoint: nothing was left to train
        after = trainer.evaluate()
        draw(trainer.method, folder)
    after = [new | floor_of(old) for old, new in zip(before, after)]
    folder.write_samples(before + after)
    text = report(before, after)
    write_whole(folder.report, text + "\n")
    print("\n" + text)
    print(
        f"The run is in {folder.path}: curves.png, metrics.jsonl, samples.jsonl, report.txt, adapter/ (loads "
        "with peft.PeftModel.from_pretrained)."
    )
    print(f"To try next: {trainer.method.next}; or go on from here: --from-adapter {folder.adapter}")


# Panels of curves.png that every method has: (title, y label, metrics).
PANELS = [
    ("Reward", "reward", ["reward/mean", "reward/expert", "eval/reward"]),
    ("KL to the reference", "nats/token", ["kl/k1", "kl/k3"]),
    ("Entropy", "nats/token", ["entropy"]),
    ("Length of samples", "tokens", ["length/min", "length/mean", "length/max"]),
    ("Shares", "share", ["length/truncated", "groups/no_signal"]),
]


def with_floor(trainer, samples):
    """Held-out samples with "floor" and "floor_reward", of data/floor.py, where the reward is the verifier.

    Which constant answer another reward would like best is a guess, or a search of its own.
    """
    if trainer.reward_fn is not verifier:
        return samples
    floor = floor_columns(trainer.held_out, verifier)
    return [sample | columns for sample, columns in zip(samples, floor)]


def floor_of(sample):
    return {name: sample[name] for name in ("floor", "floor_reward") if name in sample}


def evaluation(samples):
    s = summary(samples)
    means = {name: sum(sample[name] for sample in samples) / len(samples) for name in ("kl", "logp_expert")}
    measures = {
        name: s[name] for name in ("reward", "low", "high", "std", "q25", "median", "q75", "expert")
    } | means
    # eval/low and eval/high are None, and not logged, where the prompts are too few for an interval
    return {f"eval/{name}": value for name, value in measures.items() if value is not None}


def postfix(metrics):
    names = {
        "reward/mean": "reward",
        "reward/expert": "expert",
        "kl/k1": "kl",
        "entropy": "ent",
        "length/mean": "len",
        "loss": "loss",
    }
    return " ".join(f"{short} {metrics[name]:.3g}" for name, short in names.items() if name in metrics)


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
