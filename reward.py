"""Rewards: the built-in tasks' verifier, reward models, the pairwise judge, and the paper's two metrics.

    python reward.py train --data hh-helpful --out runs/reward  # one more LoRA adapter, with a scalar head
    python reward.py score --model runs/reward --data FILE      # accuracy on pairs; or any hub classifier
    python reward.py judge --model CHAT-MODEL --data FILE       # a chat model asked twice, in both orders
    python minigrao.py --reward runs/reward                     # or pairwise:DIR, judge:CHAT-MODEL, FILE.py:F

A record of the tasks names its constraints (data/constraints.py), and a completion earns 1.0 only if it meets
every one, was not cut off, and is no hack:

    {"prompt": "Write one short sentence about bees. Use only lowercase letters.",
     "constraints": [{"type": "lowercase"}], "min_words": 4, "about": ["bee", "honey"]}

    verifier([record["prompt"]], ["bees turn nectar into honey."], [record["constraints"]])  # [1.0]

A reward function has TRL's signature, f(prompts, completions, **columns) -> list[float]; prompts and
completions are strings or message lists.
"""

import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data import UserError
from data.constraints import constraint_results, hack
from data.loaders import load_records
from data.messages import last_text
from engine.command_line import exit_status, parse
from engine.draw import draw_calibration
from engine.measures import against_references, bootstrap_interval, measures, nag, ras, report_pairs
from engine.models import find_model, whole_directory
from engine.pairs import all_records, dialogue, read_samples, set_apart, usable_pairs
from engine.record import environment
from engine.settings import check_settings, same, setting
from engine.user_rewards import checked_rewards, load_function
from policy import Policy
from reward_model import (
    Judge,
    ModelReward,
    RoleScorer,
    bradley_terry_loss,
    fit_scorer,
    load_scorer,
    tokenizer_print,
    verdict,
)

__all__ = ["bradley_terry_loss", "checked_rewards", "nag", "ras", "verifier"]  # what other code calls

# ---------------------------------------------------------------------------------------------------- rewards


def verifier(
    prompts: list,
    completions: list,
    constraints: list,
    truncated: list | None = None,
    min_words: list | None = None,
    about: list | None = None,
    **columns,
) -> list[float]:
    """1.0 for a completion that meets all its constraints, ended by itself, and is no hack; else 0.0.

    constraints: one list per completion; truncated: one bool per completion, True where the length limit cut
    it; min_words, about: see hack(), one per completion. UserError names an unknown constraint or a wrong
    field.
    """
    none = [None] * len(completions)
    rewards = []
    for prompt, completion, wanted, cut, fewest, topic in zip(
        prompts, completions, constraints, truncated or none, min_words or none, about or none, strict=True
    ):
        prompt, text = last_text(prompt, "user"), last_text(completion, "assistant")
        met = all(constraint_results(text, wanted)) and not cut
        rewards.append(float(met and hack(prompt, text, fewest or 1, wanted, topic or ()) is None))
    return rewards


def load_reward(name: str) -> Callable | None:
    """verifier, or a function of the user's own file; None for a model, loaded once the policy is there."""
    if name == "verifier":
        return verifier
    if name.rpartition(":")[0].endswith(".py"):
        return load_function(name)
    model = name.removeprefix("pairwise:").removeprefix("judge:")
    if not Path(model).exists() and "/" not in model and model != "tiny":
        raise UserError(
            f"--reward {name}: choose verifier, FILE.py:FUNCTION, a reward model (DIR or hub name), "
            "pairwise:DIR, or judge:MODEL"
        )
    return None


def load_model_reward(config, policy: Policy) -> Callable:
    """--reward DIR|HUB-NAME, pairwise:DIR|HUB-NAME or judge:MODEL -> reward function, on `policy`'s backbone
    if it is the same one.
    """
    options = dict(device=config.device, dtype=config.dtype)
    kind, _, name = (
        config.reward.rpartition(":")
        if config.reward.startswith(("pairwise:", "judge:"))
        else ("", "", config.reward)
    )
    if kind == "judge":
        shared = os.path.realpath(find_model(name)) == os.path.realpath(policy.source)
        return Judge(
            policy if shared else Policy.load(name, quantize=config.quantize, **options),
            name,
            config.criterion,
            config.micro_batch_tokens,
        )
    scorer = load_scorer(name, policy, config.micro_batch_tokens, **options)
    return ModelReward(scorer, config.reward, config.missing_eos_penalty, kind == "pairwise", config.tie_band)


# ------------------------------------------------------------ the commands


@dataclass
class TrainConfig:
    presets = {"tiny": dict(lr=1e-3, epochs=2), "chat": dict(lr=3e-4, epochs=1)}

    model: str = same("model")
    quantize: str = same("quantize")
    data: str = setting(
        "tasks",
        "pairs: tasks (built in), hh-helpful, hh-harmless, or FILE.jsonl[.gz]; several with commas between",
    )
    eval_data: str = setting(
        None, "measure on all of these files, too; a dialogue of theirs is not trained on"
    )
    max_tokens: int = setting(
        512, "leave out pairs whose prompt and longer answer have more tokens", low=8, high=10**6
    )
    train_pairs: int = setting(0, "learn from at most so many pairs (0: all)", low=0, high=10**7)
    stop_pairs: int = setting(
        200,
        "at most so many pairs, and a tenth, are kept from training to stop it by (0: none)",
        low=0,
        high=10**6,
    )
    epochs: int = setting(None, "passes over the pairs", low=1, high=1000)
    batch_size: int = setting(16, "pairs in one optimisation step", low=1, high=4096)
    margin: float = setting(
        0.0,
        "how far apart the scores should be, where a record has no number `margin` of its own",
        low=-100,
        high=100,
    )
    centre: float = setting(
        0.0,
        "weight of mean (chosen + rejected)^2, which keeps scores near 0 (0.01 is usual)",
        low=0,
        high=100,
    )
    patience: int = setting(
        3,
        "stop after so many evaluations without a better one, see reward.fit_scorer (0: never)",
        low=0,
        high=10**6,
    )
    eval_every: int = setting(
        0, "optimisation steps between them (0: eight evaluations in all)", low=0, high=10**6
    )
    lr: float = same("lr")
    weight_decay: float = same("weight_decay")
    max_grad_norm: float = same("max_grad_norm")
    lora_rank: int = same("lora_rank")
    lora_alpha: int = same("lora_alpha")
    micro_batch_tokens: int = same("micro_batch_tokens")
    gradient_checkpointing: str = same("gradient_checkpointing")
    seed: int = same("seed")
    device: str = same("device")
    dtype: str = same("dtype")
    out: str = setting(
        "runs/reward",
        "folder to write: adapter and head, reward_model.json, metrics.jsonl, scores.jsonl, calibration.png",
    )
    overwrite: bool = setting(False, "replace the reward model in --out")


@dataclass
class ScoreConfig:
    presets = {}

    model: str = setting(
        None,
        "reward model: a folder of `reward.py train`, or a sequence classifier with one output (DIR or hub "
        "name)",
    )
    data: str = setting(
        None,
        "preference pairs: tasks, hh-helpful, hh-harmless (their held-out pairs), or all of FILE.jsonl[.gz]; "
        "several with commas",
    )
    samples: str = setting(None, "instead of --data: samples.jsonl of a run, before and after training")
    max_tokens: int = setting(
        0,
        "leave out pairs whose prompt and longer answer have more tokens (0: the model's context)",
        low=0,
        high=10**6,
    )
    pairs: int = setting(0, "at most so many pairs (0: all)", low=0, high=10**7)
    missing_eos_penalty: float = same("missing_eos_penalty")
    micro_batch_tokens: int = same("micro_batch_tokens")
    device: str = same("device")
    dtype: str = same("dtype")


@dataclass
class JudgeConfig(ScoreConfig):
    model: str = setting(
        "auto", "chat model: a hub name, a directory, a .gguf file; auto: Qwen/Qwen3-0.6B with a CUDA GPU"
    )
    criterion: str = same("criterion")
    quantize: str = same("quantize")


def check_unknown(policy, prompts, config):
    tokens, unknown = sum(map(len, prompts)), sum(ids.count(policy.tokenizer.unk_token_id) for ids in prompts)
    if policy.tokenizer.unk_token_id is not None and unknown > 0.1 * tokens:
        raise UserError(
            f"data {config.data}: {unknown / tokens:.0%} of its tokens are unknown to model {config.model}; "
            "choose another --model"
        )


def train_command(config):
    out, level = Path(config.out), "tiny" if config.model == "tiny" else "chat"
    versions = environment()  # before training: the tree may change meanwhile
    if out.exists() and not config.overwrite:
        raise UserError(f"{out} exists already: choose another --out, or --overwrite it")
    if out.exists() and not (out / "reward_model.json").is_file():
        raise UserError(
            f"{out} is not a reward model (it has no reward_model.json), so --overwrite leaves it alone; "
            "choose another --out"
        )
    sources = config.data.split(",")
    training = [r for s in sources for r in load_records(s, "train", seed=config.seed, level=level)]
    measured = {f"{Path(s).name}, held-out split": load_records(s, "heldout", level=level) for s in sources}
    measured |= {
        Path(s).name: all_records(s, level) for s in (config.eval_data.split(",") if config.eval_data else [])
    }
    # of those, too, that are too long to be measured: a policy may be evaluated on their prompts
    elsewhere = {dialogue(r["prompt"]) for records in measured.values() for r in records}

    policy = Policy.load(
        config.model,
        quantize=config.quantize,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        device=config.device,
        dtype=config.dtype,
        seed=config.seed,
        gradient_checkpointing=config.gradient_checkpointing == "on",
    )
    policy.add_role("reward")
    scorer, left = RoleScorer(policy, "reward", config.micro_batch_tokens), {}
    most = min(config.max_tokens, policy.context)
    for name, records in measured.items():
        measured[name], left[name] = usable_pairs(records, scorer.tokens, most, name)
    training, left["training"] = usable_pairs(training, scorer.tokens, most, "training", elsewhere)
    random.Random(config.seed).shuffle(training)  # of several files, each has its share of --train-pairs
    training, stop = set_apart(training, min(config.stop_pairs, len(training) // 10), config.seed)
    training = training[: config.train_pairs or None]

    def encoded(r):
        return (
            policy.encode_prompt(r["prompt"]),
            policy.encode_answer(r["chosen"]),
            policy.encode_answer(r["rejected"]),
            r.get("margin", config.margin),
        )

    pairs, held_out = ([encoded(r) for r in part] for part in (training, stop))
    check_unknown(policy, [p[0] for p in pairs], config)
    kind = "nf4" if config.quantize == "nf4" else str(policy.dtype).split(".")[-1]
    on = ", ".join(f"{len(records)} of {name}" for name, records in measured.items())
    print(
        f"reward model · {config.model} · {kind} on {policy.device} · learns from {len(pairs)} pairs, stops "
        f"by {len(held_out)}, is measured on {on}; "
        "the three share no dialogue",
        flush=True,
    )

    def log(line):
        print(" · ".join(f"{name} {value:.4g}" for name, value in line.items()), flush=True)

    history = fit_scorer(
        policy,
        "reward",
        pairs,
        held_out,
        lr=config.lr,
        epochs=config.epochs,
        batch_size=config.batch_size,
        margin=config.margin,
        centre=config.centre,
        eval_every=config.eval_every,
        patience=config.patience,
        seed=config.seed,
        max_tokens_per_pass=config.micro_batch_tokens,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        log=log,
    )
    results, lines = {}, []
    for name, records in measured.items():
        scores = scorer([r["prompt"] for r in records], [[r["chosen"], r["rejected"]] for r in records])
        results[name] = measures(scores, [r["tokens"] for r in records])
        lines += [{"set": name, "scores": s, "tokens": r["tokens"]} for s, r in zip(scores, records)]
        print(report_pairs(name, results[name]), flush=True)
    everything = [x for line in lines for x in line["scores"]]
    info = {
        "base": "tiny" if config.model == "tiny" else str(config.model),
        "tokenizer": tokenizer_print(policy.tokenizer),
        "scores": {"mean": float(np.mean(everything)), "std": float(np.std(everything))},
        "split": {
            "statement": "the pairs learnt from, stopped by and measured on share no dialogue (prompts that "
            "open with the same user message)",
            "training": len(pairs),
            "stop": len(held_out),
            "measured": {name: len(records) for name, records in measured.items()},
            "left_out": left,
        },
        "evaluation": results,
        "settings": {k: v for k, v in asdict(config).items() if k not in ("out", "overwrite")},
        "environment": versions,
    }
    with whole_directory(out) as tmp:
        policy.save_role("reward", tmp)
        (tmp / "reward_model.json").write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n")
        (tmp / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
        (tmp / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        draw_calibration(info, history, tmp / "calibration.png")
    print(
        f"\nThe reward model is in {out}: train a policy with --reward {out}, score pairs with python "
        f"reward.py score --model {out} --data FILE"
    )


def pairs_to_measure(config, tokens, context, level):
    """{name: usable pairs} of --data, each at most --pairs and --max-tokens."""
    found = {}
    for source in config.data.split(","):
        name = Path(source).name
        found[name] = usable_pairs(
            all_records(source, level), tokens, min(config.max_tokens or context, context), name
        )[0][: config.pairs or None]
    return found


def print_samples(config, name, reward_fn, before, after):
    """RAS and NAG of a run by `reward_fn`, beside those by the reward that it was trained with."""
    rewards, references = [], []
    for part in (before, after):
        prompts, answers = [s["prompt"] for s in part], [s["reference"] for s in part]
        rewards.append(
            reward_fn(
                prompts,
                [s["completion"] for s in part],
                chosen=answers,
                truncated=[s["truncated"] for s in part],
            )
        )
        references.append(reward_fn(prompts, answers, chosen=answers))
    print(f"{len(after)} held-out prompts of {config.samples}")
    recorded = (
        [[s["reward"] for s in part] for part in (before, after)],
        [[s["reference_reward"] for s in part] for part in (before, after)],
    )
    for title, numbers in (("by the reward of the run", recorded), (f"by {name}", (rewards, references))):
        print(f"{title}\n  " + "\n  ".join(against_references(*numbers)))


def score_command(config):
    scorer = load_scorer(
        config.model, most=config.micro_batch_tokens, device=config.device, dtype=config.dtype
    )
    if config.samples:
        return print_samples(
            config,
            config.model,
            ModelReward(scorer, config.model, config.missing_eos_penalty),
            *read_samples(config),
        )
    level = "tiny" if isinstance(scorer, RoleScorer) and scorer.policy.name == "tiny" else "chat"
    for name, records in pairs_to_measure(config, scorer.tokens, scorer.context, level).items():
        scores = scorer([r["prompt"] for r in records], [[r["chosen"], r["rejected"]] for r in records])
        print(report_pairs(name, measures(scores, [r["tokens"] for r in records])))


def judge_command(config):
    policy = Policy.load(config.model, quantize=config.quantize, device=config.device, dtype=config.dtype)
    judge = Judge(policy, config.model, config.criterion, config.micro_batch_tokens)

    def tokens(prompt, answer):
        return len(policy.encode_prompt(prompt)) + len(policy.encode_answer(answer))

    if config.samples:
        before, after = read_samples(config)
        cases = [
            [
                (s["prompt"], s["completion"], s["reference"])
                for s in part
                if s["completion"] != s["reference"]
            ]
            for part in (before, after)
        ]
        print_position([case for part in cases for case in part], judge)
        return print_samples(
            config, f"{judge.__name__}, {config.criterion}: +1, 0 or -1", judge, before, after
        )
    # Both answers and the question go into one prompt: half the context each is safe.
    for name, records in pairs_to_measure(config, tokens, policy.context // 2, "chat").items():
        print(f"\n{name}: {len(records)} pairs, {judge.__name__}, {config.criterion}")
        verdicts = print_position([(r["prompt"], r["chosen"], r["rejected"]) for r in records], judge)
        right = (verdicts + 1) / 2
        low, high = bootstrap_interval(right)
        longer = np.array([np.sign(a - b) for a, b in (r["tokens"] for r in records)]) / 2 + 0.5
        print(
            f"  chosen wins {np.mean(verdicts > 0):.3f}, ties {np.mean(verdicts == 0):.3f}, loses "
            f"{np.mean(verdicts < 0):.3f}"
        )
        print(
            f"  accuracy, a tie worth half: {right.mean():.3f} [{low:.3f}, {high:.3f}]; the longer one wins "
            f"(tokens): {longer.mean():.3f}; random: 0.500"
        )


def print_position(cases, judge):
    """Ask the judge, say how it depends on the order -> verdicts (N,)."""
    odds, said = judge.log_odds(*zip(*cases))
    first = np.mean([[row[0] > 0, row[1] < 0] for row in odds.tolist()])  # the answer shown as A wins
    verdicts = np.array([verdict(row) for row in odds.tolist()])
    print(
        f"  position bias: reply A wins {first:.3f} of the questions (0.5: none); the orders agree on "
        f"{np.mean(verdicts != 0):.3f} of {len(cases)} pairs; "
        f"A and B have {said:.3f} of the probability"
    )
    return verdicts


COMMANDS = {
    "train": (TrainConfig, train_command),
    "score": (ScoreConfig, score_command),
    "judge": (JudgeConfig, judge_command),
}


def main(argv: list[str]) -> int:
    """python reward.py train|score|judge [flags] -> exit status, see train.exit_status."""
    word = argv[0] if argv else ""
    if word in ("-h", "--help"):
        print(
            f"{__doc__}\nusage: python reward.py {'|'.join(COMMANDS)} [flags]; for the flags: python "
            "reward.py COMMAND --help"
        )
        return 0
    return exit_status(lambda: run(word, argv[1:]), stopped="stopped; nothing was written")


def run(word, flags):
    if word not in COMMANDS:
        raise UserError(
            f"{f'no command {word}' if word else 'no command'}: the first word is one of "
            f"{', '.join(COMMANDS)} (see --help)"
        )
    config_class, command = COMMANDS[word]
    sys.argv[0] = f"reward.py {word}"
    config = config_class(**parse(config_class, flags, __doc__))
    if isinstance(config, ScoreConfig) and (
        config.model is None or (config.data is None) == (config.samples is None)
    ):
        raise UserError(f"reward.py {word}: needs --model, and either --data or --samples")
    command(check_settings(config))
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
