"""Rewards: the verifier of the built-in tasks, reward models, the pairwise judge, and the paper's two metrics.

    python reward.py train --data hh-helpful --out runs/reward        # a reward model: one more LoRA adapter with a scalar head
    python reward.py score --model runs/reward --data FILE            # accuracy on preference pairs; or any hub classifier with one output
    python reward.py judge --model CHAT-MODEL --data FILE             # a chat model asked twice, the order swapped
    python minigrao.py --reward runs/reward                           # or pairwise:runs/reward, or judge:CHAT-MODEL

A record of the tasks names its constraints (data/constraints.py), and a completion earns 1.0 only if it meets every one, was not cut off,
and is no hack:

    {"prompt": "Write one short sentence about bees. Use only lowercase letters.",
     "constraints": [{"type": "lowercase"}], "min_words": 4, "about": ["bee", "honey"]}

    verifier([record["prompt"]], ["bees turn nectar into honey."], constraints=[record["constraints"]])   # [1.0]

A reward function has TRL's signature, f(prompts, completions, **columns) -> list[float]; prompts and completions are
strings or message lists.
"""

import json
import math
import os
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from data import UserError
from engine.command_line import answer_early, choose_command, exit_status, parse
from engine.settings import check_settings, same, setting


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
        "reward model: a folder of `reward.py train`, or a sequence classifier with one output (DIR or hub name)",
    )
    data: str = setting(
        None,
        "preference pairs: tasks, hh-helpful, hh-harmless (their held-out pairs), or all of FILE.jsonl[.gz]; several with commas",
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


CONFIGS = {"train": TrainConfig, "score": ScoreConfig, "judge": JudgeConfig}

if __name__ == "__main__":
    answer_early(CONFIGS, __doc__)  # --help and mistyped flags: the imports below take seconds

import numpy as np

from data.constraints import constraint_results, hack
from data.loaders import load_records
from data.messages import last_text
from engine.draw import draw_calibration
from engine.folders import holds, reserve, whole_directory
from engine.measures import compare, interval, measures, nag, ras
from engine.models import find_model
from engine.pairs import all_records, dialogue, read_samples, set_apart, usable_pairs
from engine.record import environment
from engine.report import alarms, bracket, by_reward, report_pairs
from policy import Policy
from reward_model import (
    Judge,
    RoleScorer,
    bradley_terry_loss,
    fit_scorer,
    load_scorer,
    tokenizer_print,
    verdict,
)

__all__ = ["bradley_terry_loss", "checked_rewards", "nag", "ras", "verifier"]  # what other code calls

# ------------------------------------------------------------------------------------------------------------- rewards


def verifier(prompts, completions, constraints, truncated=None, min_words=None, about=None, **columns):
    """1.0 for a completion that meets all its constraints, ended by itself, and is no hack; else 0.0 -> list[float].

    constraints: one list per completion; truncated: one bool per completion, True where the length limit cut it;
    min_words, about: see hack(), one per completion. UserError names an unknown constraint or a wrong field.
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


def checked_rewards(reward_fn, prompts, completions, columns):
    """Call a user's reward function -> list[float]; whatever goes wrong in it becomes a one-line UserError."""
    name = getattr(reward_fn, "__name__", type(reward_fn).__name__)
    try:
        rewards = reward_fn(prompts=prompts, completions=completions, **columns)
    except UserError:
        raise
    except Exception as error:  # the function is the user's: anything can come out of it
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"reward function {name}: raised {type(error).__name__}: {reason}") from error
    rewards = rewards.tolist() if hasattr(rewards, "tolist") else rewards  # an array or a tensor
    if not isinstance(rewards, (list, tuple)):
        raise UserError(
            f"reward function {name}: returned {type(rewards).__name__}; return one number per completion"
        )
    if len(rewards) != len(completions):
        raise UserError(
            f"reward function {name}: returned {len(rewards)} rewards for {len(completions)} completions"
        )
    rewards = [value.tolist() if hasattr(value, "tolist") else value for value in rewards]
    for i, value in enumerate(rewards):
        if isinstance(value, (list, tuple)):
            raise UserError(
                f"reward function {name}: item {i} is a list; return one number, not one per token"
            )
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"reward function {name}: item {i} is {value!r}; return a finite number")
    return [float(value) for value in rewards]


# -------------------------------------------------------------------------------------------------------- reward model


# ---------------------------------------------------------------------------------------------- models that score texts


class ModelReward:
    """A scorer as a reward function: the raw score, less `missing_eos_penalty` where the sample was cut (it is scored as if it had ended).

    pairwise: R(o, y) in {+1, 0, -1} as in GRAO's experiments, the sign of score(o) - score(y) with 0 within `tie_band`; y is the column
    `chosen`, and R(y, y) = 0. A prompt is computed once for all its samples.
    """

    def __init__(self, scorer, name, missing_eos_penalty=1.0, pairwise=False, tie_band=0.0):
        self.scorer, self.__name__, self.penalty, self.pairwise, self.tie_band = (
            scorer,
            name,
            missing_eos_penalty,
            pairwise,
            tie_band,
        )

    def __call__(self, prompts, completions, truncated=None, chosen=None, **columns):
        texts = [last_text(c, "assistant") for c in completions]
        experts = [last_text(y, "assistant") for y in chosen] if self.pairwise else texts
        keys, groups = [json.dumps(p) for p in prompts], {}  # prompt -> its different texts, in order
        for key, text, y in zip(keys, texts, experts, strict=True):
            if not self.pairwise or text != y:
                groups.setdefault(key, {}).update({text: None, y: None})
        prompt_of = dict(zip(keys, prompts))
        for key, row in zip(
            groups,
            self.scorer([prompt_of[key] for key in groups], [list(group) for group in groups.values()]),
        ):
            groups[key] = dict(zip(groups[key], row))
        cut = np.array(truncated or [False] * len(texts), dtype=float)
        if not self.pairwise:
            scores = [groups[key][text] for key, text in zip(keys, texts)]
            return (np.array(scores) - self.penalty * cut).tolist()
        return self.signs(groups, keys, texts, experts, cut)

    def signs(self, groups, keys, texts, experts, cut):
        """The sign of each difference, 0 for a tie; a text against itself is one, and where it was cut, a loss."""
        rewards = np.where(self.penalty * cut > self.tie_band, -1.0, 0.0)
        differ = [i for i, (text, y) in enumerate(zip(texts, experts)) if text != y]
        if differ:
            scores = np.array([groups[keys[i]][texts[i]] for i in differ]) - self.penalty * cut[differ]
            expert = np.array([groups[keys[i]][experts[i]] for i in differ])
            beyond = np.abs(scores - expert) > self.tie_band
            rewards[differ] = compare(scores, expert) * beyond
        return rewards.tolist()


# ------------------------------------------------------------------------------------------------- the pairwise judge


def load_model_reward(config, policy):
    """--reward DIR|HUB-NAME, pairwise:DIR|HUB-NAME or judge:MODEL -> reward function, on `policy`'s backbone where it is the same."""
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


# ------------------------------------------------------------------------------------------------------------- metrics


# ------------------------------------------------------------ the commands


def check_unknown(policy, prompts, config):
    tokens, unknown = sum(map(len, prompts)), sum(ids.count(policy.tokenizer.unk_token_id) for ids in prompts)
    if policy.tokenizer.unk_token_id is not None and unknown > 0.1 * tokens:
        raise UserError(
            f"data {config.data}: {unknown / tokens:.0%} of its tokens are unknown to model {config.model}; choose another --model"
        )


def train_command(config):
    ways = {"kind": "reward model", "remedies": ["--overwrite it"]}
    with reserve(config.out, ours=is_reward_model, overwrite=config.overwrite, **ways) as out:
        train_reward_model(config, out)


def is_reward_model(path):
    return holds(path / "reward_model.json", "base", "settings")


def train_reward_model(config, out):
    level = "tiny" if config.model == "tiny" else "chat"
    versions = environment()  # before training: the tree may change meanwhile
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
        f"reward model · {config.model} · {kind} on {policy.device} · learns from {len(pairs)} pairs, stops by {len(held_out)}, is measured on {on}; "
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
            "statement": "the pairs learnt from, stopped by and measured on share no dialogue (prompts that open with the same user message)",
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
        f"\nThe reward model is in {out}: train a policy with --reward {out}, score pairs with python reward.py score --model {out} --data FILE"
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
    """A run by `reward_fn`, beside the same by the reward that it was trained with, and the alarms of either."""
    print(f"{len(after)} held-out prompts of {config.samples}")
    others = rescored(reward_fn, before), rescored(reward_fn, after)
    said = []
    for title, parts in (("by the reward of the run", (before, after)), (f"by {name}", others)):
        print(f"{title}\n  " + "\n  ".join(by_reward(*parts)))
        for alarm in alarms(*parts):
            if alarm not in said:  # what is wrong with the answers is so by either reward
                print(f"  careful: {alarm}")
                said.append(alarm)


def rescored(reward_fn, samples):
    """The samples with the rewards that `reward_fn` gives to them and to their expert answers. The recorded floor is of another reward."""
    prompts, experts = [s["prompt"] for s in samples], [s["expert"] for s in samples]
    cut = [s["truncated"] for s in samples]
    rewards = reward_fn(prompts, [s["completion"] for s in samples], chosen=experts, truncated=cut)
    expert_rewards = reward_fn(prompts, experts, chosen=experts)
    found = []
    for sample, reward, expert in zip(samples, rewards, expert_rewards, strict=True):
        kept = {name: value for name, value in sample.items() if name != "floor_reward"}
        found.append(kept | {"reward": reward, "expert_reward": expert})
    return found


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
            [(s["prompt"], s["completion"], s["expert"]) for s in part if s["completion"] != s["expert"]]
            for part in (before, after)
        ]
        print_position([case for part in cases for case in part], judge)
        return print_samples(
            config, f"{judge.__name__}, {config.criterion}: +1, 0 or -1", judge, before, after
        )
    # both answers and the question go into one prompt: half the context each is safe, what is beyond is an error
    for name, records in pairs_to_measure(config, tokens, policy.context // 2, "chat").items():
        print(f"\n{name}: {len(records)} pairs, {judge.__name__}, {config.criterion}")
        verdicts = print_position([(r["prompt"], r["chosen"], r["rejected"]) for r in records], judge)
        right = (verdicts + 1) / 2
        longer = np.array([np.sign(a - b) for a, b in (r["tokens"] for r in records)]) / 2 + 0.5
        print(
            f"  chosen wins {np.mean(verdicts > 0):.3f}, ties {np.mean(verdicts == 0):.3f}, loses {np.mean(verdicts < 0):.3f}"
        )
        print(
            f"  accuracy, a tie worth half: {right.mean():.3f}{bracket(interval(right))}; "
            f"the longer one wins (tokens): {longer.mean():.3f}; random: 0.500"
        )


def print_position(cases, judge):
    """Ask the judge, say how it depends on the order -> verdicts (N,)."""
    odds, said = judge.log_odds(*zip(*cases))
    first = np.mean([[row[0] > 0, row[1] < 0] for row in odds.tolist()])  # the answer shown as A wins
    verdicts = np.array([verdict(row) for row in odds.tolist()])
    print(
        f"  position bias: reply A wins {first:.3f} of the questions (0.5: none); the orders agree on {np.mean(verdicts != 0):.3f} of {len(cases)} pairs; "
        f"A and B have {said:.3f} of the probability"
    )
    return verdicts


COMMANDS = {"train": train_command, "score": score_command, "judge": judge_command}


def main(argv):
    """python reward.py train|score|judge [flags] -> exit status, see engine.command_line.exit_status."""
    return exit_status(lambda: run(argv), stopped="stopped; nothing was written")


def run(argv):
    word, flags = choose_command(CONFIGS, argv, __doc__)
    config = CONFIGS[word](**parse(CONFIGS[word], flags, __doc__))
    if isinstance(config, ScoreConfig) and (
        config.model is None or (config.data is None) == (config.samples is None)
    ):
        raise UserError(f"reward.py {word}: needs --model, and either --data or --samples")
    COMMANDS[word](check_settings(config))
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
