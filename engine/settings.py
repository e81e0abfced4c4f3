"""Settings: every flag is defined here, once, with its unit.

A method's own settings are a dataclass derived from `Config`; the command line is made from its fields. To
change a default, look at the field, or at PRESETS where it depends on the model. Like engine/command_line.py
this does not import torch.
"""

import dataclasses
from dataclasses import dataclass, field

from data.errors import UserError

# ------------------------------------------------------------------------------------------------------------
# Settings


def setting(default, help, low=None, high=None, choices=None, above=None):
    """A field of a Config: default, help text with the unit, legal range (low <= x <= high, x > above)."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices, above=above))


# What a setting left at None becomes, by the model: 1.3 M parameters and a chat model differ in everything.
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


# Former spelling -> today's: the flags go on working, and runs that were started with them can be resumed.
RENAMED_SETTINGS = {"max_reference_tokens": "max_expert_tokens"}


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
        "verifier; a reward model, DIR or hub name; pairwise:DIR, its sign of score(o) - score(chosen); "
        "judge:MODEL, a chat model that compares them; "
        "or FILE.py:FUNCTION with TRL's signature f(prompts, completions, **columns)",
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
    max_expert_tokens: int = setting(
        0, "leave out records with a longer expert answer, tokens (0: no limit)", low=0, high=10**6
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


def check_ranges(config):
    """UserError for the first value outside its range; None is in every range. Returns the config."""
    for f in dataclasses.fields(config):
        value, flag, rule = getattr(config, f.name), "--" + f.name.replace("_", "-"), f.metadata
        if value is None:
            continue
        if rule["choices"] and value not in rule["choices"]:
            raise UserError(f"{flag} {value}: choose one of {', '.join(map(str, rule['choices']))}")
        if isinstance(value, (int, float)) and not in_range(value, **rule):
            bound = f"above {rule['above']}" if rule["above"] is not None else f"at least {rule['low']}"
            raise UserError(f"{flag} {value}: must be {bound} and at most {rule['high']}")
    return config


def in_range(value, low, high, above, **rule):
    """low <= value <= high, value > above, where they are set; NaN is in no range."""
    if low is not None and not value >= low:
        return False
    if above is not None and not value > above:
        return False
    return high is None or value <= high


def check_settings(config):
    """Fill in what depends on the machine and on the model. Returns the config; UserError as check_ranges."""
    import torch  # here, because --help and mistyped flags are answered without it

    check_ranges(config)
    gpu = torch.cuda.is_available() and not config.device.startswith("cpu")
    if config.model == "auto":
        config.model = "Qwen/Qwen3-0.6B" if gpu else "tiny"
    level = "tiny" if config.model == "tiny" else "chat"
    for name, value in (PRESETS[level] | config.presets.get(level, {})).items():
        if getattr(config, name, "") is None:
            setattr(config, name, value)
    if getattr(config, "quantize", "") is None:
        config.quantize = "nf4" if gpu else "none"
    if getattr(config, "gradient_checkpointing", None) == "auto":
        config.gradient_checkpointing = "on" if gpu and config.model != "tiny" else "off"
    return check_ranges(config)


def same(name):
    """The field `name` of Config, for another command's dataclass."""
    f = Config.__dataclass_fields__[name]
    return field(default=f.default, metadata=f.metadata)


@dataclass
class DiscriminatorConfig:
    """python uniapl.py discriminator; here, because discriminator.py imports torch."""

    presets = {"tiny": dict(lr=3e-3, pairs=1024, epochs=4), "chat": dict(lr=3e-4, pairs=256, epochs=1)}

    model: str = same("model")
    quantize: str = same("quantize")
    data: str = setting(
        "tasks",
        "tasks (built in), or FILE.jsonl[.gz] with a column 'experts' as python uniapl.py teach writes it",
    )
    from_adapter: str = setting(None, "tell the expert from this policy (a directory), not from the base")
    pairs: int = setting(
        None, "prompts to learn from, a tenth of them for early stopping", low=10, high=10**6
    )
    test_pairs: int = setting(256, "held-out prompts to test on", low=2, high=10**5)
    epochs: int = setting(None, "passes over the pairs", low=1, high=1000)
    lr: float = setting(None, "learning rate of AdamW", above=0, high=1)
    max_new_tokens: int = same("max_new_tokens")
    temperature: float = same("temperature")
    lora_rank: int = same("lora_rank")
    lora_alpha: int = same("lora_alpha")
    micro_batch_tokens: int = same("micro_batch_tokens")
    gradient_checkpointing: str = same("gradient_checkpointing")
    seed: int = same("seed")
    device: str = same("device")
    dtype: str = same("dtype")
    out: str = setting(None, "directory to write")
    overwrite: bool = setting(False, "replace an earlier discriminator in --out")


@dataclass
class TeachConfig:
    """python uniapl.py teach; here, because discriminator.py imports torch."""

    presets = {}

    model: str = setting(None, "the teacher: a hub name, a directory, a .gguf file, or tiny")
    adapter: str = setting(None, "a LoRA adapter of it, such as runs/NAME/adapter")
    quantize: str = setting("none", "nf4: 4-bit weights", choices=("nf4", "none"))
    data: str = setting("tasks", "tasks (built in) or FILE.jsonl with 'constraints'")
    level: str = setting(
        None, "of the tasks: tiny or chat [tiny for --model tiny, else chat]", choices=("tiny", "chat")
    )
    out: str = setting(None, "JSONL file to write; must not exist")
    prompts: int = setting(1000, "prompts of the training split", low=1, high=10**6)
    samples: int = setting(8, "answers to each", low=1, high=1024)
    max_new_tokens: int = setting(128, "longest answer, tokens", low=1, high=32768)
    temperature: float = same("temperature")
    seed: int = same("seed")
    device: str = same("device")


@dataclass(frozen=True)
class Method:
    name: str
    config: type
    update: callable  # update(trainer, records) -> {metric: float}
    metrics: dict  # metrics of its own: name -> (unit, meaning and what a healthy curve looks like)
    panels: list  # of curves.png: (title, y label, [metric names])
    setup: callable = None  # setup(trainer), once, before the first step
    needs_rejected: bool = False
    # What to try after a run, printed at its end.
    next: str = "another --lr or --seed, or a chat model with --model DIR"
