"""Rewards: the verifier of the built-in tasks, reward models, the pairwise judge, and the paper's two
metrics.

    python reward.py train --data hh-helpful --out runs/reward   # a reward model: LoRA adapter, scalar head
    python reward.py train --resume --out runs/reward            # go on where Ctrl-C, or worse, stopped it
    python reward.py score --model runs/reward --data FILE       # accuracy on preference pairs; also of any
                                                                 # hub classifier with one output
    python reward.py judge --model CHAT-MODEL --data FILE        # a chat model asked twice, order swapped
    python minigrao.py --reward runs/reward                      # or pairwise:runs/reward, or judge:MODEL

A record of the tasks names its constraints (data/constraints.py), and a completion earns 1.0 only if it meets
every one, was not cut off, and is no hack:

    {"prompt": "Write one short sentence about bees. Use only lowercase letters.",
     "constraints": [{"type": "lowercase"}], "min_words": 4, "about": ["bee", "honey"]}

    verifier([record["prompt"]], ["bees turn nectar into honey."], constraints=[record["constraints"]])
    # [1.0]

A reward function has TRL's signature, f(prompts, completions, **columns) -> list[float]; prompts and
completions are strings or message lists.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
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
    resume: bool = setting(False, "go on with the training in --out, with the settings it was started with")
    overwrite: bool = setting(False, "replace the reward model in --out")


@dataclass
class ScoreConfig:
    presets = {}

    model: str = setting(
        None,
        "reward model: a folder of `reward.py train`, or a sequence classifier with one output "
        "(DIR or hub name)",
    )
    data: str = setting(
        None,
        "preference pairs: tasks, hh-helpful, hh-harmless (their held-out pairs), or all of "
        "FILE.jsonl[.gz]; several with commas",
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
from data.messages import last_text
from engine.bradley_terry import bradley_terry_loss
from engine.measures import FEWEST, compare, interval, measures, nag, ras
from engine.models import find_model
from engine.pairs import pairs_to_measure, read_samples
from engine.report import bracket, print_samples, report_pairs
from engine.settings import check_ranges
from engine.unfinished import ScorerFolder
from engine.user_rewards import checked_rewards, load_function
from policy import Policy
from reward_model import Judge, RoleScorer, load_scorer, score_pairs, train_reward_model, verdict

__all__ = ["bradley_terry_loss", "checked_rewards", "nag", "ras", "verifier"]  # what other code calls

# ------------------------------------------------------------------------------------------------------------
# Rewards


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


# ------------------------------------------------------------------------------------------------------------
# Models that score texts


class ModelReward:
    """A scorer as a reward function: the raw score, less `missing_eos_penalty` where the sample was cut (it
    is scored as if it had ended).

    pairwise: R(o, y) in {+1, 0, -1} as in GRAO's experiments, the sign of score(o) - score(y) with 0 within
    `tie_band`; y is the column `chosen`, and R(y, y) = 0. A prompt is computed once for all its samples.
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
        """The sign of each difference, 0 for a tie; a text against itself is one, and where it was cut, a
        loss.
        """
        rewards = np.where(self.penalty * cut > self.tie_band, -1.0, 0.0)
        differ = [i for i, (text, y) in enumerate(zip(texts, experts)) if text != y]
        if differ:
            scores = np.array([groups[keys[i]][texts[i]] for i in differ]) - self.penalty * cut[differ]
            expert = np.array([groups[keys[i]][experts[i]] for i in differ])
            beyond = np.abs(scores - expert) > self.tie_band
            rewards[differ] = compare(scores, expert) * beyond
        return rewards.tolist()


def load_model_reward(config, policy: Policy) -> Callable:
    """--reward DIR|HUB-NAME, pairwise:DIR|HUB-NAME or judge:MODEL -> reward function, on `policy`'s backbone
    where it is the same.
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


# ------------------------------------------------------------------------------------------------------------
# The commands


def train_command(given):
    """python reward.py train: given, {setting: value} -> the folder written, None if it was stopped."""
    config = TrainConfig(**given)
    check_ranges(config)
    with ScorerFolder.reserved(config, given) as folder:
        return train_reward_model(check_settings(folder.config), folder)


def score_command(config):
    """python reward.py score: a reward model on preference pairs, or on the answers of a run."""
    options = dict(most=config.micro_batch_tokens, device=config.device, dtype=config.dtype)
    scorer = load_scorer(config.model, **options)
    if config.samples:
        reward_fn = ModelReward(scorer, config.model, config.missing_eos_penalty)
        print_samples(config.samples, config.model, reward_fn, *read_samples(config))
        return
    level = "tiny" if isinstance(scorer, RoleScorer) and scorer.policy.name == "tiny" else "chat"
    for name, records in pairs_to_measure(config, scorer.tokens, scorer.context, level).items():
        scores = score_pairs(scorer, records)
        print(report_pairs(name, measures(scores, [r["tokens"] for r in records])))


def judge_command(config):
    """python reward.py judge: a chat model on preference pairs, or on the answers of a run."""
    policy = Policy.load(config.model, quantize=config.quantize, device=config.device, dtype=config.dtype)
    judge = Judge(policy, config.model, config.criterion, config.micro_batch_tokens)
    if config.samples:
        judge_samples(config, judge)
        return

    def tokens(prompt, answer):
        return len(policy.encode_prompt(prompt)) + len(policy.encode_answer(answer))

    # both answers and the question go into one prompt: half the context each is safe, what is beyond is an
    # error
    for name, records in pairs_to_measure(config, tokens, policy.context // 2, "chat").items():
        print(f"\n{name}: {len(records)} pairs, {judge.__name__}, {config.criterion}")
        judge_pairs(judge, records)


def judge_samples(config, judge):
    before, after = read_samples(config)
    cases = []
    for s in before + after:
        if s["completion"] != s["expert"]:
            cases.append((s["prompt"], s["completion"], s["expert"]))
    print_position(cases, judge)
    print_samples(config.samples, f"{judge.__name__}, {config.criterion}: +1, 0 or -1", judge, before, after)


def judge_pairs(judge, records):
    verdicts = print_position([(r["prompt"], r["chosen"], r["rejected"]) for r in records], judge)
    right = (verdicts + 1) / 2
    longer = np.mean([np.sign(chosen - rejected) for chosen, rejected in (r["tokens"] for r in records)])
    print(
        f"  chosen wins {np.mean(verdicts > 0):.3f}, ties {np.mean(verdicts == 0):.3f}, "
        f"loses {np.mean(verdicts < 0):.3f}"
    )
    print(
        f"  accuracy, a tie worth half: {right.mean():.3f}{bracket(interval(right))}; "
        f"the longer one wins (tokens): {0.5 + longer / 2:.3f}; random: 0.500"
    )
    if len(records) < FEWEST:
        print(f"  careful: fewer than {FEWEST} pairs: no interval is given, and it may be chance")


def print_position(cases, judge):
    """Ask the judge, say how it depends on the order -> verdicts (N,)."""
    odds, said = judge.log_odds(*zip(*cases))
    first = np.mean([[row[0] > 0, row[1] < 0] for row in odds.tolist()])  # the answer shown as A wins
    verdicts = np.array([verdict(row) for row in odds.tolist()])
    print(
        f"  position bias: reply A wins {first:.3f} of the questions (0.5: none); "
        f"the orders agree on {np.mean(verdicts != 0):.3f} of {len(cases)} pairs; "
        f"A and B have {said:.3f} of the probability"
    )
    return verdicts


COMMANDS = {"score": score_command, "judge": judge_command}


def main(argv: list[str]) -> int:
    """python reward.py train|score|judge [flags] -> exit status, see engine.command_line.exit_status."""
    return exit_status(lambda: run(argv), stopped="stopped; nothing was written")


def run(argv):
    word, flags = choose_command(CONFIGS, argv, __doc__)
    given = parse(CONFIGS[word], flags, __doc__)
    if word == "train":
        return train_command(given)
    config = CONFIGS[word](**given)
    if config.model is None or (config.data is None) == (config.samples is None):
        raise UserError(f"reward.py {word}: needs --model, and either --data or --samples")
    COMMANDS[word](check_settings(config))
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
