"""Settings and metrics: every flag and every logged number is defined here, once, with its unit.

A method's own settings are a dataclass derived from `Config`; the command line is made from its fields. What a method logs beyond
METRICS it defines in its `Method.metrics`. To change a default, look at the field, or at PRESETS where it depends on the model.
"""

import argparse
import dataclasses
import math
from dataclasses import dataclass, field

import torch

from data import UserError

# ---------------------------------------------------------------------------------------------------------------------------------
# Settings


def setting(default, help, low=None, high=None, choices=None, above=None):
    """A field of a Config: its default, its help text with the unit, and its legal range (low <= x <= high, x > above)."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices, above=above))


# What a setting left at None becomes: by the model, because a model of 1.3 M parameters and a chat model differ in everything.
PRESETS = {
    "tiny": dict(
        quantize="nf4",
        steps=100,
        prompts_per_step=32,
        max_new_tokens=24,
        lr=1e-3,
        micro_batch_tokens=2048,
        eval_prompts=1000,
        eval_every=25,
    ),
    "chat": dict(
        quantize=None,
        steps=200,
        prompts_per_step=4,
        max_new_tokens=128,
        lr=1e-4,
        micro_batch_tokens=1024,
        eval_prompts=64,
        eval_every=50,
    ),
}


@dataclass
class Config:
    presets = {}  # what a method changes in PRESETS: {"tiny": {...}, "chat": {...}}

    model: str = setting(
        "auto",
        "tiny, a hub name, a directory, a .gguf file; auto: Qwen/Qwen3-0.6B with a CUDA GPU, else tiny",
    )
    quantize: str = setting(
        None, "nf4 or none [tiny: nf4; others: nf4 on a GPU, none on a CPU]", choices=("nf4", "none")
    )
    data: str = setting("tasks", "tasks (built in), hh-helpful, hh-harmless, or FILE.jsonl[.gz]")
    reward: str = setting(
        "verifier",
        "verifier; a reward model, DIR or hub name; pairwise:DIR, its sign of score(o) - score(chosen); judge:MODEL, a chat model that compares them; or FILE.py:FUNCTION with TRL's signature f(prompts, completions, **columns)",
    )
    tie_band: float = setting(
        0.0, "with --reward pairwise:, score differences up to this are a tie", low=0, high=1e6
    )
    missing_eos_penalty: float = setting(
        1.0, "taken from a reward model's score of a sample that was cut at --max-new-tokens", low=0, high=1e6
    )
    criterion: str = setting("helpful", "what --reward judge: compares by", choices=("helpful", "harmless"))
    steps: int = setting(None, "optimisation steps", low=1, high=10**6)
    prompts_per_step: int = setting(None, "prompts in one optimisation step", low=1, high=4096)
    group_size: int = setting(8, "samples per prompt (G)", low=2, high=1024)
    max_new_tokens: int = setting(None, "longest sample, tokens", low=1, high=32768)
    temperature: float = setting(1.0, "sampling temperature; scores use it too", above=0, high=10)
    lr: float = setting(None, "learning rate of AdamW", above=0, high=1)
    lr_schedule: str = setting(
        "constant",
        "after the warm-up: constant, linear or cosine (to 0)",
        choices=("constant", "linear", "cosine"),
    )
    warmup_steps: int = setting(5, "steps of linear learning-rate warm-up", low=0, high=10**6)
    weight_decay: float = setting(0.01, "AdamW weight decay", low=0, high=1)
    max_grad_norm: float = setting(1.0, "clip the gradient's norm to this", above=0, high=1e6)
    lora_rank: int = setting(16, "rank of the LoRA adapter on every linear layer", low=1, high=1024)
    lora_alpha: int = setting(32, "LoRA scale times rank", low=1, high=4096)
    from_adapter: str = setting(None, "start from this saved adapter (a directory)")
    reference: str = setting(
        "adapter",
        "with --from-adapter, the frozen reference: that adapter, or the base",
        choices=("adapter", "base"),
    )
    micro_batch_tokens: int = setting(
        None,
        "tokens per backward pass, at least one prompt group; does not change the gradient",
        low=1,
        high=10**7,
    )
    gradient_checkpointing: str = setting(
        "auto",
        "on: recompute activations in the backward pass, less memory for more time; auto: on with a GPU",
        choices=("auto", "on", "off"),
    )
    max_prompt_tokens: int = setting(
        0, "leave out records with a longer prompt, tokens (0: no limit)", low=0, high=10**6
    )
    max_reference_tokens: int = setting(
        0, "leave out records with a longer reference answer, tokens (0: no limit)", low=0, high=10**6
    )
    eval_every: int = setting(
        None, "steps between evaluations on held-out prompts and between checkpoints", low=1, high=10**6
    )
    eval_prompts: int = setting(None, "held-out prompts to evaluate on, one sample each", low=2, high=10**5)
    seed: int = setting(0, "seed of everything", low=0, high=2**31 - 1)
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto: cuda if there is one")
    dtype: str = setting(
        "auto",
        "auto, float32 or bfloat16: compute type (adapters are always float32)",
        choices=("auto", "float32", "bfloat16"),
    )
    out: str = setting(None, "run folder [runs/METHOD-MODEL, numbered if taken]")
    resume: bool = setting(False, "go on from the checkpoint in --out, with the settings it was started with")
    overwrite: bool = setting(False, "replace the run in --out")


def check_settings(config):
    """UserError for the first value outside its range; fills None from PRESETS. Returns the config."""
    if config.model == "auto":
        config.model = (
            "Qwen/Qwen3-0.6B" if torch.cuda.is_available() and not config.device.startswith("cpu") else "tiny"
        )
    level = "tiny" if config.model == "tiny" else "chat"
    preset = PRESETS[level] | config.presets.get(level, {})
    for f in dataclasses.fields(config):
        value, flag, rule = getattr(config, f.name), "--" + f.name.replace("_", "-"), f.metadata
        if value is None:
            value = preset.get(f.name)
            setattr(config, f.name, value)
        if value is None:
            continue
        number = isinstance(value, (int, float))
        if rule["choices"] and value not in rule["choices"]:
            raise UserError(f"{flag} {value}: choose one of {', '.join(map(str, rule['choices']))}")
        too_low = number and (
            math.isnan(value)
            or (rule["low"] is not None and value < rule["low"])
            or (rule["above"] is not None and value <= rule["above"])
        )
        if too_low or (number and rule["high"] is not None and value > rule["high"]):
            bound = f"above {rule['above']}" if rule["above"] is not None else f"at least {rule['low']}"
            raise UserError(f"{flag} {value}: must be {bound} and at most {rule['high']}")
    gpu = torch.cuda.is_available() if config.device == "auto" else config.device.startswith("cuda")
    if getattr(config, "quantize", "") is None:
        config.quantize = "nf4" if gpu else "none"
    if getattr(config, "gradient_checkpointing", None) == "auto":
        config.gradient_checkpointing = "on" if gpu and config.model != "tiny" else "off"
    return config


def same(name):
    """The field `name` of Config, for another command's dataclass."""
    f = Config.__dataclass_fields__[name]
    return field(default=f.default, metadata=f.metadata)


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def parse(config_class, argv, description):
    """The flags of a config dataclass that were given on a command line -> {field: value}; make the config from it, then check it."""
    parser = OneLineParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for f in dataclasses.fields(config_class):
        flag, rule = "--" + f.name.replace("_", "-"), f.metadata
        presets = {name: preset | config_class.presets.get(name, {}) for name, preset in PRESETS.items()}
        by_model = [
            f"{name}: {preset[f.name]}" for name, preset in presets.items() if preset.get(f.name) is not None
        ]
        default = "" if f.default is None or f.type is bool else f" [{f.default}]"
        if by_model and f.name != "quantize":
            default = f" [{', '.join(by_model)}]"
        options = dict(default=argparse.SUPPRESS, help=(rule["help"] + default).replace("%", "%%"))
        if f.type is bool:
            parser.add_argument(flag, action="store_true", **options)
        else:
            parser.add_argument(
                flag, type=f.type, metavar="|".join(rule["choices"] or [f.type.__name__.upper()]), **options
            )
    return vars(parser.parse_args(argv))


@dataclass(frozen=True)
class Method:
    name: str
    config: type
    update: callable  # update(trainer, records) -> {metric: float}
    metrics: dict  # metrics of its own: name -> (unit, meaning and what a healthy curve looks like)
    panels: list  # of curves.png: (title, y label, [metric names])
    setup: callable = None  # setup(trainer), once, before the first step
    needs_rejected: bool = False
    next: str = "another --lr or --seed, or a chat model with --model DIR"  # what to try after a run, printed at its end


# ---------------------------------------------------------------------------------------------------------------------------------
# Metrics: every logged number, defined once

METRICS = {
    "step": ("steps", "optimisation steps taken"),
    "reward/mean": (
        "reward",
        "mean over the step's samples; rises, noisily, because each step has other prompts",
    ),
    "reward/std": ("reward", "standard deviation over the samples; falls when all succeed or all fail"),
    "reward/q25": ("reward", "lower quartile of the samples' rewards"),
    "reward/median": ("reward", "median of the samples' rewards"),
    "reward/q75": ("reward", "upper quartile of the samples' rewards"),
    "reward/reference": ("reward", "mean reward of the step's reference answers: flat, the line to cross"),
    "groups/no_signal": (
        "share",
        "groups whose samples all earn the same; near 1 nothing is left to compare",
    ),
    "length/min": ("tokens", "shortest sample"),
    "length/mean": ("tokens", "mean sample length; a steady drift without reward is a length hack"),
    "length/max": ("tokens", "longest sample; at max_new_tokens samples are cut"),
    "length/truncated": ("share", "samples cut at max_new_tokens; should fall"),
    "kl/k1": (
        "nats/token",
        "mean of log pi - log pi_ref over sampled tokens; unbiased for KL(pi || ref), can be negative on a batch",
    ),
    "kl/k3": (
        "nats/token",
        "mean of exp(-d) - 1 + d, d = log pi - log pi_ref; never negative, 0 at the first step, then grows slowly",
    ),
    "entropy": (
        "nats/token",
        "of the policy's next-token distribution at sampled tokens; falls, but not to 0 at once",
    ),
    "mismatch/mean": (
        "nats/token",
        "mean |log-prob when sampled - when scored|: the price of another precision; well under 0.1",
    ),
    "mismatch/max": ("nats/token", "its largest value in the step"),
    "ratio/max": ("-", "largest pi / pi_old of the step; exactly 1 with one update for each rollout"),
    "clip/low": (
        "share",
        "tokens with A < 0 whose ratio is below the clip range, so without gradient; 0 with one update, else under 0.2",
    ),
    "clip/high": ("share", "tokens with A > 0 whose ratio is above it; likewise"),
    "kl/update": (
        "nats/token",
        "KL(pi_old || pi) of the step's updates, estimated by k3; 0 with one update, else well under 0.1",
    ),
    "updates": ("updates", "optimiser updates so far, where a step may take several on one rollout"),
    "loss": ("nats", "the method's loss; its size says little, see the method"),
    "grad_norm": ("-", "norm of the gradient before clipping; steady, spikes are rare"),
    "lr": ("-", "learning rate of the step"),
    "tokens/generated": ("tokens", "sampled so far in the run"),
    "tokens/per_second": ("tokens/s", "sampling speed in the step's rollout"),
    "time/rollout": ("s", "the step's sampling and rewards"),
    "time/update": ("s", "the step's scoring, backward pass and optimiser"),
    "memory/peak": ("GiB", "peak so far: of the GPU's allocator, or of the process on a CPU"),
    "eval/reward": ("reward", "mean over held-out prompts, one sample each; the number to watch"),
    "eval/low": ("reward", "lower end of its 95 % bootstrap interval over prompts"),
    "eval/high": ("reward", "upper end"),
    "eval/std": ("reward", "standard deviation over the held-out prompts"),
    "eval/q25": ("reward", "lower quartile over them"),
    "eval/median": ("reward", "median"),
    "eval/q75": ("reward", "upper quartile"),
    "eval/reference": ("reward", "mean reward of the held-out references"),
    "eval/kl": (
        "nats/answer",
        "KL(pi || ref) of whole answers to held-out prompts: mean of log pi - log pi_ref of the samples; 0 at the start",
    ),
    "eval/logp_reference": (
        "nats/token",
        "mean J_imit of the held-out references, at the sampling temperature; rises while the policy imitates",
    ),
}
