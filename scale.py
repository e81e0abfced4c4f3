"""GRAO and UniAPL on TRL's engine: the same losses where one GPU is not enough.

    torchrun --nproc_per_node 8 scale.py grao --config FILE.yaml    # or uniapl; docs/scale.md has such files

    GRAOTrainer(model, verifier, GRAOConfig(...), dataset(records), peft_config=LoraConfig(...)).train()

TRL samples, scores, spreads the work and saves; this file adds the expert answer y and the papers' losses.
When TRL has sampled o_1..o_G, y is rewarded with them and becomes one more row of the batch. Every row has a
weight w of its own, with its group's advantages and the denominators of the whole step inside it:

    loss = -sum over rows of w J,    J = 1/|o| sum_t log pi(o_t | q, o_<t)

so TRL may shuffle rows, cut them into micro-batches and spread them over ranks, groups torn or not. The
weights are gradients of minigrao.py's and uniapl.py's losses (`row_weights`); a method is but its `weigh`.

Deviations from minigrao.py and uniapl.py:
- Off-policy (num_iterations > 1, several optimisation steps a rollout, vLLM) a sample's log-probs count by
  pi / pi_old, clipped at 1 + epsilon_high and detached (as in CISPO, 2506.13585), times vLLM's correction. y
  was not sampled, so it has no ratio.
- UniAPL's loss on the screen: L_GRPO has the value of A log pi, not of A pi/pi. The gradient is the same.
- A group with an answer that no reward function scored (None) counts as tied: its advantages are 0.
- QLoRA's adapters are fp32, where TRL has bf16, but for FSDP and DeepSpeed, which want one dtype.
- No stages, co-trained discriminator, images, router's auxiliary loss, or options of TRL's losses.
"""

import inspect
import json
import logging
import math
import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

try:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a missing optional CPU kernel is no news
    import datasets
    import trl
    from accelerate.utils import gather_object
    from peft import PeftModel
    from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config, get_quantization_config
    from trl.trainer.utils import pad
except ImportError as error:
    install = f"scale.py needs TRL ({error}): pip install -r requirements-scale.txt"
    if __name__ != "__main__":
        raise ImportError(install) from error
    print(f"error: {install}", file=sys.stderr)
    sys.exit(2)

import torch

import discriminator
import uniapl
from baselines import grpo_advantages, grpo_loss, sft_loss
from data import UserError, load_records
from data.errors import first_line
from data.messages import last_text, messages
from engine.command_line import OneLineParser, exit_status
from engine.models import find_model
from engine.settings import check_settings
from minigrao import GraoConfig, grao_loss, group_advantages
from policy import Policy
from reward import ModelReward, load_reward
from reward_model import load_scorer

# ---------------------------------------------------------------- What is refused before anything is loaded

TESTED = ("1.12", "1.16")  # versions of TRL with which tests/test_scale.py passes
ARGUMENTS = {  # of the methods of GRPOTrainer that are overridden here, and of the one that is called
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_generate_and_score_completions": ("inputs",),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask", "logits_to_keep"),
}
# Settings of TRL's losses. `compute_loss` replaces these, so a value would be ignored in silence.
REPLACED = """beta loss_type scale_rewards importance_sampling_level multi_objective_aggregation delta
    entropy_coef use_adaptive_entropy top_entropy_quantile off_policy_mask_threshold""".split()


def check_trl():
    """UserError for a version of TRL that was not tested, or whose methods take other arguments."""
    why = None if ".".join(trl.__version__.split(".")[:2]) in TESTED else "was not tested"
    for name, wanted in ARGUMENTS.items():
        found = tuple(inspect.signature(getattr(GRPOTrainer, name, check_trl)).parameters)
        if found[1 : 1 + len(wanted)] != wanted:
            why = f"has other arguments for {name}"
    if why:
        tested = f"is tested with {' and '.join(TESTED)}: pip install -r requirements-scale.txt"
        raise UserError(f"TRL {trl.__version__} {why}; scale.py {tested}")


def check_groups(name, size, others, G):
    """UserError, with what would work, unless `size` (of setting `name`) times `others` are groups of G."""
    rows, least = size * others, G // math.gcd(G, others)
    if rows % G:
        divisors = ", ".join(str(d) for d in range(2, rows + 1) if rows % d == 0)
        whole = f"take {name} {least}, {2 * least}, {3 * least}... or num_generations {divisors}"
        raise UserError(f"{name} {size}: {rows} samples a rollout are no whole groups of {G}; {whole}")


# ---------------------------------------------------------------------------------------------- The trainer


@dataclass
class ExpertConfig(GRPOConfig):
    """TRL's GRPOConfig without dropout, so that an unmoved policy's ratio is 1, and without thinking."""

    disable_dropout: bool = field(default=True, metadata={"help": "switch dropout off in the model"})

    def __post_init__(self):
        for f in fields(GRPOConfig):
            if f.name in REPLACED and getattr(self, f.name) != f.default:
                raise UserError(f"{f.name}: a setting of TRL's losses, which this one replaces; leave it out")
        world, G = int(os.environ.get("WORLD_SIZE", 1)), self.num_generations
        if self.generation_batch_size is None:
            pieces = self.steps_per_generation or self.gradient_accumulation_steps
            check_groups("per_device_train_batch_size", self.per_device_train_batch_size, world * pieces, G)
        if self.eval_strategy != "no":
            G = self.num_generations_eval or G
            check_groups("per_device_eval_batch_size", self.per_device_eval_batch_size, world, G)
        self.chat_template_kwargs = self.chat_template_kwargs or {"enable_thinking": False}
        super().__post_init__()


def row_weights(loss, tokens):
    """What each row is worth: -d loss / d J at J = 0, and everywhere, as the loss is linear in J. loss: from
    the rows' mean log-probs J (B, G + 1), y's last, to the step's; tokens (B, G + 1) -> (B, G + 1)."""
    with torch.enable_grad():
        J = torch.zeros(tokens.shape, device=tokens.device, requires_grad=True)
        return -torch.autograd.grad(loss(J), J)[0]


def total_rewards(rewards, weights):
    """rewards (B, M, F), NaN where a function said None -> (B, M), summed by weights (F,) as in TRL. A member
    that nobody scored leaves its group without a scale: all 0, so tied, so without advantages."""
    weights = weights.to(rewards.device)
    hole = rewards[..., weights != 0].isnan().all(2).any(1, keepdim=True)  # (B, 1)
    return torch.where(hole, 0.0, (rewards * weights).nansum(2))


class ExpertTrainer(GRPOTrainer):
    """GRPOTrainer with each prompt's expert answer y as one more row; a subclass says what a row is worth.
    n samples on this rank; B prompts on all ranks, G samples each; F reward functions."""

    def __init__(self, model, reward_funcs, args, train_dataset, **options):
        check_trl()
        for name in ("tools", "environment_factory", "rollout_func"):
            if options.get(name):
                raise UserError(f"{name}: an expert answer has no turns with tools; leave it out")
        if "chosen" not in (train_dataset.column_names or ["chosen"]):  # a stream may not know its columns
            raise UserError("the data has no column `chosen`, the expert answer y; see scale.dataset")
        trained = model.named_parameters() if isinstance(model, PeftModel) else ()
        adapter = {name: p.data for name, p in trained if p.requires_grad}
        super().__init__(model, reward_funcs, args, train_dataset, **options)
        quantised = getattr(self.model, "is_quantized", False)
        if quantised and not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            for name, p in self.model.named_parameters():
                if p.requires_grad:  # in bf16, as TRL leaves it, AdamW's small steps would vanish
                    p.data = adapter.get(name, p.data).float()

    def weigh(self, rewards, expert_rewards, tokens):
        """rewards (B, G, F), expert_rewards (B, F), tokens (B, G + 1), of y the last -> w (B, G + 1)."""
        raise NotImplementedError

    def expert_loss(self, logps, mask):
        """What a row of y with weight 1 adds to the loss: logps, mask (1, T) -> scalar, here -J."""
        return sft_loss(logps, mask)

    @property
    def mode(self):
        return "train" if self.model.training else "eval"

    # -- 1) y is rewarded with the samples, and the rows are weighed

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """As TRL's: all ranks' samples' rewards (B G, F). Leaves self.weights and self.experts, y's rows."""
        n, world = len(inputs), self.accelerator.num_processes
        G = self.num_generations if self.mode == "train" else self.num_generations_eval
        first, counts, brought = self.groups(n, G)
        texts = [last_text(inputs[i]["chosen"], "assistant") for i in brought]
        # With one EOS, as the policy would have to sample it, and never cut, or it would teach not to end.
        ids = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        ids = [y + [self._tokenizer.eos_token_id] for y in ids]
        if not isinstance(completions[0], str):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        ends = getattr(self, "eos_token_ids", [self._tokenizer.eos_token_id])  # TRL 1.12 knows one
        cut = [sample[-1] not in ends for sample in completion_ids_list] + [False] * len(brought)
        rows = columns([inputs[i] for i in [*range(n), *brought]], cut)
        prompts, completions = prompts + [prompts[i] for i in brought], [*map(stripped, completions), *texts]
        rewards = super()._calculate_rewards(rows, prompts, completions, completion_ids_list + ids)
        rewards = rewards.view(world, n + len(brought), -1)
        R = rewards[:, :n].flatten(0, 1)  # (B G, F): the ranks' rows in turn are the groups in order
        R_y = torch.cat([part[n : n + count] for part, count in zip(rewards, counts)])  # (B, F)
        self.weights, w_y = self.own_weights(R, R_y, completion_ids_list, ids[: len(first)])  # (n,)
        self.experts = list(zip(first, ids, w_y))  # row of its prompt, ids, weight
        self._metrics[self.mode]["reward/expert"].append(R_y[:, 0].nanmean().item())
        return R

    def groups(self, n, G):
        """Rows of n that begin a group, their number on each rank, and the rows whose y this rank brings."""
        first = [i for i in range(n) if (self.accelerator.process_index * n + i) % G == 0]
        # One rank brings y where several share a group. But all must hand over as many rows, so some bring
        # row 0's again, which is dropped later.
        counts = gather_object([len(first)])
        return first, counts, first + [0] * (max(counts) - len(first))

    def own_weights(self, R, R_y, samples, experts):
        """weigh() for all ranks -> the weights of this rank's samples (n,) and experts (list)."""
        G, n, rank = len(R) // len(R_y), len(samples), self.accelerator.process_index
        tokens = torch.tensor(gather_object([len(ids) for ids in samples])).view(-1, G)
        y_tokens = torch.tensor(gather_object([len(ids) for ids in experts]))
        tokens = torch.cat([tokens, y_tokens[:, None]], 1).to(R.device)
        w, before = (
            self.weigh(R.view(-1, G, R.shape[1]), R_y, tokens),
            -(-rank * n // G),
        )  # groups begun before
        return w[:, :G].flatten()[rank * n : (rank + 1) * n], w[before:, G][: len(experts)].tolist()

    # -- 2) y becomes a row

    def _generate_and_score_completions(self, inputs):
        """As TRL's, with y's rows behind the samples: "sampled" (rows,) tells them apart, "weight" is w."""
        output, n = super()._generate_and_score_completions(inputs), len(inputs)
        pieces = self.args.steps_per_generation if self.mode == "train" else 1
        # Ranks wait for each other in every forward pass, so each needs as many rows: empty ones fill up.
        rows = math.ceil(max(gather_object([n + len(self.experts)])) / pieces) * pieces
        added = self.experts + [(0, [], 0.0)] * (rows - n - len(self.experts))
        source, ids = [i for i, _, _ in added], [torch.tensor(y, dtype=torch.long) for _, y, _ in added]

        def longer(name, new, value=0):
            old = output[name].expand_as(output["completion_ids"])  # vLLM's ratio may be one number a row
            return pad([*old, *new], padding_value=value, pad_to_multiple_of=self.pad_to_multiple_of)

        result = {}
        for name in ("prompt_ids", "prompt_mask"):
            result[name] = torch.cat([output[name], output[name][source]])
        result["completion_ids"] = longer("completion_ids", ids, self._tokenizer.pad_token_id)
        result["completion_mask"] = longer("completion_mask", [torch.ones_like(row) for row in ids])
        for name in ("old_per_token_logps", "importance_sampling_ratio"):
            if name in output:
                result[name] = longer(name, [torch.zeros(len(row)) for row in ids])
        result["sampled"] = torch.arange(rows, device=self.weights.device) < n
        result["weight"] = torch.cat([self.weights, self.weights.new_tensor([w for _, _, w in added])])
        return result

    # -- 3) the loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """-sum of w J over a micro-batch's rows, scaled so that gradients add up to the step's."""
        mask, sampled, w = inputs["completion_mask"].bool(), inputs["sampled"], inputs["weight"]
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        score = self._get_per_token_logps_and_entropies
        logps, entropy = score(model, ids, attention, mask.shape[1], compute_entropy=True)[:2]  # (rows, T)
        logps = torch.where(mask, logps, 0)
        J = (self.ratio(logps, inputs) * logps).sum(1) / mask.sum(1).clamp(min=1)  # (rows,)
        loss = -(w * J)[sampled].sum()
        for row in (~sampled).nonzero():  # one by one: expert_loss need not be linear in J
            loss = loss + w[row].sum() * self.expert_loss(logps[row], mask[row])
        seen = mask & sampled[:, None]
        sums = self.accelerator.reduce(torch.stack([entropy[seen].sum(), seen.sum()]).detach(), "sum")
        self._metrics[self.mode]["entropy"].append(float(sums[0] / sums[1].clamp(min=1)))
        # w is for the rollout on all ranks. Gradients are averaged over ranks and summed over a step's micro-
        # batches: all of the rollout's or, where TRL is told so, a share of them, which stands for all.
        share = 1.0
        if self.mode == "train":
            share = self.args.steps_per_generation / self.current_gradient_accumulation_steps
        return loss * self.accelerator.num_processes * share

    def ratio(self, logps, inputs):
        """What samples' log-probs (rows, T) count by, 1 on-policy; clipped above only, where it does harm."""
        ratio = torch.ones_like(logps)
        if "old_per_token_logps" in inputs:
            log_ratio = logps.detach() - inputs["old_per_token_logps"]
            ratio = log_ratio.exp().clamp(max=1 + self.epsilon_high)
        return ratio * inputs.get("importance_sampling_ratio", 1.0)


def stripped(completion):
    """A completion, text or messages, without blanks around it, as train.py's reward functions get it."""
    if isinstance(completion, str):
        return completion.strip()
    return [m | {"content": m["content"].strip()} if m.get("content") else m for m in completion]


# ----------------------------------------------------------------------------------------------------- GRAO


def as_in(config, name):
    """The setting `name` of another config of this project: one default, one help text."""
    f = config.__dataclass_fields__[name]
    help = f.metadata["help"].replace("%", "%%")
    return field(default=f.default, metadata={"help": help, "choices": f.metadata["choices"]})


@dataclass
class GRAOConfig(ExpertConfig):
    imitation: float = as_in(GraoConfig, "beta")  # TRL's own beta is the weight of a KL
    lam: float = as_in(GraoConfig, "lam")
    group: str = as_in(GraoConfig, "group")
    without: str | None = as_in(GraoConfig, "without")

    def __post_init__(self):
        check_settings(GraoConfig(beta=self.imitation, lam=self.lam, group=self.group, without=self.without))
        super().__post_init__()


class GRAOTrainer(ExpertTrainer):
    """2508.07750 on TRL; minigrao.py is the one to read."""

    def weigh(self, rewards, expert_rewards, tokens):
        c, rewards = self.args, torch.cat([rewards, expert_rewards[:, None]], 1)
        R = total_rewards(rewards, self.reward_weights)  # (B, G + 1)
        A_o, A_y = group_advantages(R[:, :-1], R[:, -1], c.group)  # eq. (4)

        def loss(J):
            return grao_loss(J[:, :-1], J[:, -1], A_o, A_y, c.imitation, c.lam, c.without)[0]  # eq. (3)

        return row_weights(loss, tokens)


# --------------------------------------------------------------------------------------------------- UniAPL

MIXED, ANCHORED = ("unified", "chord"), ("unified", "a-sft", "a-grpo")  # weighted by mu; with a discriminator
VARIANTS = ("unified", "a-sft", "a-grpo", "chord", "luffy", "hpt")


@dataclass
class UniAPLConfig(ExpertConfig):
    variant: str = field(default="unified", metadata={"help": "what to optimise", "choices": VARIANTS})
    lambda_adv: float = as_in(uniapl.UniAPLConfig, "lambda_adv")
    mu: float | None = as_in(uniapl.UniAPLConfig, "mu")
    mu_warmup: int = as_in(uniapl.UniAPLConfig, "mu_warmup")
    mu_decay: int | None = as_in(uniapl.UniAPLConfig, "mu_decay")
    mu_peak: float = as_in(uniapl.UniAPLConfig, "mu_peak")
    mu_valley: float = as_in(uniapl.UniAPLConfig, "mu_valley")
    phi: bool = as_in(uniapl.UniAPLConfig, "phi")
    aggregate: str = as_in(uniapl.UniAPLConfig, "aggregate")
    hpt_threshold: float = as_in(uniapl.UniAPLConfig, "hpt_threshold")

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise UserError(f"variant {self.variant}: one of {', '.join(VARIANTS)}; for others see uniapl.py")
        if (self.phi or self.mu is not None) and self.variant not in MIXED:
            raise UserError(f"mu and phi are for the variants {', '.join(MIXED)}, not for {self.variant}")
        if self.temperature != 1 and self.variant != "luffy":
            raise UserError("temperature: imitation is scored at 1, and TRL has one temperature for all rows")
        given = {name: getattr(self, name) for name in UniAPLConfig.__annotations__}
        check_settings(uniapl.UniAPLConfig(**given))
        super().__post_init__()


class UniAPLTrainer(ExpertTrainer):
    """2509.25148 on TRL; uniapl.py is the one to read. If lambda_adv counts, the last of reward_funcs is the
    discriminator D(q, y, o), `Discriminator(DIR)` or any classifier; in the reward its weight is 0."""

    def __init__(self, model, reward_funcs, args, train_dataset, **options):
        self.anchored = args.variant in ANCHORED and args.lambda_adv > 0
        count = len(reward_funcs) if isinstance(reward_funcs, list) else 1
        if self.anchored and count < 2:
            raise UserError(f"{args.variant}: reward_funcs is [reward, discriminator]; or lambda_adv is 0")
        if self.anchored and args.reward_weights is None:
            args.reward_weights = [1.0] * (count - 1) + [0.0]
        super().__init__(model, reward_funcs, args, train_dataset, **options)

    def weigh(self, rewards, expert_rewards, tokens):
        c, mu, lam = self.args, self.mu(), self.args.lambda_adv * self.anchored
        A, imitated = self.credit(rewards, expert_rewards)  # (B, G) or, with y, (B, G + 1); (B, 1)
        A_D = uniapl.adversarial_advantages(total_rewards(rewards[..., -1:], torch.ones(1)))  # (B, G)
        mask = torch.arange(int(tokens.max()), device=tokens.device) < tokens[..., None]  # (B, G + 1, T)
        explored = mask[:, : A.shape[1]]

        def loss(J):
            logps = J[..., None].expand(mask.shape)  # of rows of equal tokens, whose mean is J at any length
            samples, expert = logps[:, : A.shape[1]], logps[:, -1]
            grpo, _ = grpo_loss(samples, None, None, A, explored, aggregate=c.aggregate)
            # The mean over all imitated tokens, by the share of prompts that are imitated.
            sft = sft_loss(expert, mask[:, -1] & imitated) * imitated.float().mean()
            if c.variant in ("luffy", "hpt"):
                return grpo + sft
            adversarial = uniapl.adversarial_loss(samples, A_D, explored)
            return uniapl.uniapl_loss(grpo, sft, adversarial, mu, lam)

        return row_weights(loss, tokens)

    def credit(self, rewards, expert_rewards):
        """Advantages of the groups' members, and whose y is imitated (B, 1): what the variant decides."""
        if self.args.variant == "luffy":  # y is one of the group, and explored rather than imitated
            rewards = torch.cat([rewards, expert_rewards[:, None]], 1)
            A = grpo_advantages(total_rewards(rewards, self.reward_weights))
            return A, torch.zeros_like(A[:, :1], dtype=torch.bool)
        R = total_rewards(rewards, self.reward_weights)  # (B, G)
        if self.args.variant == "hpt":  # a prompt is either imitated or explored
            fails = uniapl.hpt_switch(R, self.args.hpt_threshold)[:, None]
            return torch.where(fails, 0.0, grpo_advantages(R)), fails
        return grpo_advantages(R), torch.ones_like(R[:, :1], dtype=torch.bool)

    def mu(self):
        """Weight of imitation at this step: a-sft's 1, a-grpo's 0, or CHORD's schedule, which is logged."""
        c = self.args
        if c.variant not in MIXED:
            return float(c.variant == "a-sft")
        mu, decay = 0.1 if c.phi and c.mu is None else c.mu, c.mu_decay
        if mu is None:
            decay = round(2 * self.state.max_steps / 3) if decay is None else decay
            mu = uniapl.chord_mu(self.state.global_step, c.mu_warmup, decay, c.mu_peak, c.mu_valley)
        self._metrics[self.mode]["mu"].append(mu)
        return mu

    def expert_loss(self, logps, mask):
        """CHORD's phi and LUFFY's shaping are not linear in J: their own losses of a row with weight 1."""
        if self.args.phi:
            return uniapl.sft_phi_loss(logps, mask)
        if self.args.variant == "luffy":
            return uniapl.luffy_loss(logps, torch.ones(len(logps), device=logps.device), mask)
        return super().expert_loss(logps, mask)


class Discriminator:
    """D(q, y, o) of `uniapl.py discriminator --out DIR` as a reward function, on a backbone of its own. It
    reads the samples' ids, so its base must be the trained model. A rank loads it when first asked."""

    def __init__(self, directory):
        self.directory, self.policy, self.__name__ = directory, None, "discriminator"
        self.settings = json.loads((Path(directory) / discriminator.ABOUT).read_text())["settings"]

    def __call__(self, prompts, completions, completion_ids, chosen, **columns):
        if self.policy is None:
            self.policy = Policy.load(self.settings["model"], quantize=self.settings["quantize"])
            discriminator.load(self.policy, self.directory)
        q = [self.policy.encode_prompt(prompt) for prompt in prompts]
        y = [self.policy.encode_answer(last_text(answer, "assistant")) for answer in chosen]
        found = discriminator.scores("polar", self.policy, q, y, [[ids] for ids in completion_ids])
        return [row[0] for row in found]


# ----------------------------------------------------- From this project's records to TRL's, and the script


def dataset(records, plain=False):
    """Records -> datasets.Dataset of `prompt` (messages, or plain texts), `chosen` and `record`, the whole
    as JSON: Arrow gives all rows of a column the same keys, and each constraint has its own."""
    prompts = [r["prompt"] if plain else messages(r["prompt"]) for r in records]
    rows = [{"prompt": p, "chosen": r["chosen"], "record": json.dumps(r)} for p, r in zip(prompts, records)]
    return datasets.Dataset.from_list(rows)


def columns(inputs, truncated):
    """Rows as reward functions see them: all columns of all records, and whether the answer was cut."""
    rows = [
        json.loads(row.get("record", "{}")) | row | {"truncated": cut} for row, cut in zip(inputs, truncated)
    ]
    names = {name for row in rows for name in row}  # TRL wants every column in every row
    return [dict.fromkeys(names) | row for row in rows]


@dataclass
class ScriptArguments:
    data: str = "tasks"  # hh-helpful, hh-harmless, FILE.jsonl[.gz]
    records: int | None = None  # at most
    eval_prompts: int = 64  # where eval_strategy is set
    reward: str = "verifier"  # FILE.py:FUNCTION, or a model: DIR or hub name
    discriminator: str | None = None  # DIR of uniapl.py discriminator, or a classifier's hub name


class Parser(OneLineParser, TrlParser):
    """TRL's own, with errors of one line."""


def run(argv):
    methods = {"grao": (GRAOTrainer, GRAOConfig), "uniapl": (UniAPLTrainer, UniAPLConfig)}
    if not argv or argv[0] not in methods:
        raise UserError("the first word is grao or uniapl: scale.py grao --config FILE.yaml")
    trainer_class, config_class = methods[argv[0]]
    try:
        parser = Parser((ScriptArguments, config_class, ModelConfig))
        script, args, model = parser.parse_args_and_config(argv[1:])
    except (ValueError, TypeError) as error:  # TRL's and transformers' own checks
        raise UserError(f"settings: {first_line(error)}") from error
    name = model.model_name_or_path or "tiny"
    level, held_out = "tiny" if name == "tiny" else "chat", None
    records = dataset(load_records(script.data, "train", script.records, seed=args.seed, level=level))
    if args.eval_strategy != "no":
        held_out = dataset(load_records(script.data, "heldout", script.eval_prompts, level=level))
    args.model_init_kwargs = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
    model.lora_target_modules = model.lora_target_modules or "all-linear"  # as in policy.py
    options = dict(quantization_config=get_quantization_config(model), peft_config=get_peft_config(model))
    rewards = [load_reward(script.reward) or ModelReward(load_scorer(script.reward), script.reward)]
    if D := script.discriminator:
        rewards.append(Discriminator(D) if (Path(D) / discriminator.ABOUT).is_file() else D)
    trainer = trainer_class(find_model(name), rewards, args, records, eval_dataset=held_out, **options)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"saved in {args.output_dir}; minigrao.py --from-adapter reads an adapter")
    return True


if __name__ == "__main__":
    sys.exit(exit_status(lambda: run(sys.argv[1:])))
