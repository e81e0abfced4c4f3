"""Preference pairs: train a reward model on them, and measure one, or a judge, on them. The commands of `python reward.py`.

    python reward.py train --data hh-helpful --out runs/reward                        # Bradley-Terry on pairs (prompt, chosen, rejected)
    python reward.py train --data A.jsonl,B.jsonl.gz --eval-data C.jsonl              # evaluated on C, too, whose dialogues are not trained on
    python reward.py score --model runs/reward --data FILE                            # DIR, or a hub classifier with one output
    python reward.py score --model runs/reward-b --samples runs/grao/samples.jsonl    # RAS and NAG of a run by another reward model
    python reward.py judge --model CHAT-MODEL --data FILE                             # asked twice, the order swapped

Three sets that share no dialogue: pairs to learn from, pairs at which training stops (of --data's training split), and pairs that are only
measured (its held-out split, and all of --eval-data). Two prompts are one dialogue if they open with the same message, so a later turn of a
dialogue is not on another side than an earlier one. Pairs that cannot be used are left out, counted and named; no text is ever cut.
"""

import json
import math
import random
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data import UserError, load_records
from data.loaders import HUB_FOLDERS, read_records
from models import first_line, whole_directory
from plots.calibration import draw_calibration
from policy import Policy
from record import environment, read_jsonl
from reward import (
    Judge,
    ModelReward,
    RoleScorer,
    accuracy,
    bootstrap_interval,
    fit_scorer,
    load_scorer,
    nag,
    ras,
    shown_prompt,
    tokenizer_print,
    verdict,
)
from settings import check_settings, parse, same, setting
from train import exit_status


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


# ---------------------------------------------------------------------------------------------------------------------------------
# Pairs


def dialogue(prompt):
    """What two prompts of one dialogue have in common: the user's first message."""
    return (
        prompt if isinstance(prompt, str) else next((m["content"] for m in prompt if m["role"] == "user"), "")
    ).strip()


def usable_pairs(records, tokens, most, name, elsewhere=frozenset()):
    """Records whose two answers can be told apart and fit -> (records, each with "tokens": [of chosen, of rejected], {reason: how many were left out}).

    tokens(prompt, answer) -> length of the whole text; most: the longest; elsewhere: dialogues that other sets hold. Says on stderr what it left out.
    """
    kept, left, first = [], Counter(), {}
    for record in records:
        prompt, chosen, rejected, margin = (
            record["prompt"],
            record["chosen"],
            record.get("rejected"),
            record.get("margin", 0),
        )
        if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin):
            raise UserError(
                f"{name}: the margin of the prompt {shown_prompt(prompt)} is {margin!r}; write a finite number or leave it out"
            )
        if rejected is None:
            reason = "without a rejected answer"
        elif not chosen.strip() or not rejected.strip():
            reason = "with an empty answer"
        elif chosen.strip() == rejected.strip():
            reason = "with twice the same answer"
        elif dialogue(prompt) in elsewhere:
            reason = "of a dialogue that is measured on"
        else:
            lengths = [tokens(prompt, chosen), tokens(prompt, rejected)]
            if max(lengths) <= most:
                kept.append(record | {"tokens": lengths})
                continue
            reason = f"longer than {most} tokens"
        left[reason] += 1
        first.setdefault(reason, shown_prompt(prompt))
    if left:
        reasons = ", ".join(
            f"{count} {reason} (first: {first[reason]})" for reason, count in left.most_common()
        )
        print(f"{name}: left out {left.total()} of {len(records)} pairs: {reasons}", file=sys.stderr)
    if not kept:
        raise UserError(
            f"{name}: no pair to use, left out {', '.join(f'{count} {reason}' for reason, count in left.most_common()) or 'none'}"
        )
    return kept, dict(left)


def all_records(source, level):
    """Every record of a file; of the named sets the held-out ones."""
    return (
        load_records(source, "heldout", level=level)
        if source == "tasks" or source in HUB_FOLDERS
        else read_records(source)
    )


def set_apart(records, n, seed):
    """(most of the records, about n of them), no dialogue on both sides."""
    dialogues = sorted({dialogue(r["prompt"]) for r in records})
    size, apart, left = Counter(dialogue(r["prompt"]) for r in records), set(), n
    for i in np.random.default_rng(seed).permutation(len(dialogues)):
        if size[dialogues[i]] <= left:
            apart.add(dialogues[i])
            left -= size[dialogues[i]]
    return tuple([r for r in records if (dialogue(r["prompt"]) in apart) == side] for side in (False, True))


# ---------------------------------------------------------------------------------------------------------------------------------
# Measures


def calibration(better, worse, bins=10):
    """How far sigmoid(|score difference|), the model's probability that the answer it prefers is the better one, is from being right.

    better, worse: (N,) scores -> {"ece": expected calibration error, sum over bins of n/N |accuracy - confidence| (Guo et al., arXiv
    1706.04599), "bins": [{"n", "confidence", "accuracy"}]} over equal parts of [0.5, 1]; a tie is right by half.
    """
    d = np.asarray(better, dtype=float) - np.asarray(worse, dtype=float)
    confidence, right = 1 / (1 + np.exp(-np.abs(d))), (d > 0) + 0.5 * (d == 0)
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    rows = [
        {
            "n": int((which == b).sum()),
            "confidence": float(confidence[which == b].mean()),
            "accuracy": float(right[which == b].mean()),
        }
        for b in range(bins)
        if (which == b).any()
    ]
    return {"ece": sum(r["n"] * abs(r["accuracy"] - r["confidence"]) for r in rows) / len(d), "bins": rows}


def by_length(better, worse, lengths, parts=5):
    """Accuracy where the chosen answer is the shorter one, and where it is the longer: quantile bins of len(chosen) - len(rejected), tokens."""
    d, longer = (
        np.asarray(better, dtype=float) - np.asarray(worse, dtype=float),
        np.array([a - b for a, b in lengths]),
    )
    edges = np.unique(np.quantile(longer, np.linspace(0, 1, parts + 1), method="nearest"))
    which = np.clip(np.searchsorted(edges, longer, side="right") - 1, 0, max(len(edges) - 2, 0))
    right = (d > 0) + 0.5 * (d == 0)
    parts = [which == b for b in sorted(set(which))]
    return [
        {
            "from": int(longer[p].min()),
            "to": int(longer[p].max()),
            "n": int(p.sum()),
            "accuracy": float(right[p].mean()),
        }
        for p in parts
    ]


def measures(scores, lengths):
    """scores, lengths (N, 2) of chosen and rejected -> every number that report_pairs prints and calibration.png shows."""
    (better, worse), (longer, shorter) = np.array(scores, dtype=float).T, np.array(lengths, dtype=float).T
    right, by_words = (
        (better > worse) + 0.5 * (better == worse),
        (longer > shorter) + 0.5 * (longer == shorter),
    )
    differ = longer != shorter
    correlation = (
        np.corrcoef(better - worse, longer - shorter)[0, 1]
        if len(better) > 1 and np.ptp(better - worse) and np.ptp(longer - shorter)
        else 0.0
    )
    return {
        "pairs": len(right),
        "accuracy": accuracy(better, worse),
        "interval": bootstrap_interval(right),
        "longer_wins": float(by_words.mean()),
        "longer_wins_interval": bootstrap_interval(by_words),
        "over_longer": float((right - by_words).mean()),
        "over_longer_interval": bootstrap_interval(right - by_words),
        "prefers_longer": float(((better > worse) == (longer > shorter))[differ].mean())
        if differ.any()
        else 0.5,
        "correlation_with_length": float(correlation),
        "by_length": by_length(better, worse, lengths),
        "calibration": calibration(better, worse),
        "chosen_mean": float(better.mean()),
        "chosen_std": float(better.std()),
        "rejected_mean": float(worse.mean()),
        "rejected_std": float(worse.std()),
    }


def report_pairs(name, m):
    text = f"\n{name}: {m['pairs']} pairs\n"
    rows = [
        ("this reward model", m["accuracy"], m["interval"]),
        ("the longer one wins (tokens)", m["longer_wins"], m["longer_wins_interval"]),
    ]
    text += f"  {'accuracy [95 % interval]':<34}\n"
    text += (
        "".join(f"    {label:<32}{value:.3f} [{low:.3f}, {high:.3f}]\n" for label, value, (low, high) in rows)
        + f"    {'random':<32}0.500\n"
    )
    text += f"    {'over the longer one, same pairs':<32}{m['over_longer']:+.3f} [{m['over_longer_interval'][0]:+.3f}, {m['over_longer_interval'][1]:+.3f}]\n"
    text += f"  prefers the longer answer of a pair: {m['prefers_longer']:.3f}; score and length differences correlate: {m['correlation_with_length']:+.2f}\n"
    bins = ", ".join(f"{b['from']}..{b['to']}: {b['accuracy']:.2f} ({b['n']})" for b in m["by_length"])
    text += f"  accuracy by tokens(chosen) - tokens(rejected): {bins}\n"
    text += f"  expected calibration error {m['calibration']['ece']:.3f}; scores (mean, deviation): chosen {m['chosen_mean']:.2f}, {m['chosen_std']:.2f}; "
    return text + f"rejected {m['rejected_mean']:.2f}, {m['rejected_std']:.2f}"


# ---------------------------------------------------------------------------------------------------------------------------------
# The commands


def check_unknown(policy, prompts, config):
    tokens, unknown = sum(map(len, prompts)), sum(ids.count(policy.tokenizer.unk_token_id) for ids in prompts)
    if policy.tokenizer.unk_token_id is not None and unknown > 0.1 * tokens:
        raise UserError(
            f"data {config.data}: {unknown / tokens:.0%} of its tokens are unknown to model {config.model}; choose another --model"
        )


def train_command(config):
    out, level = Path(config.out), "tiny" if config.model == "tiny" else "chat"
    versions = environment()  # before training: the tree may change meanwhile
    if out.exists() and not config.overwrite:
        raise UserError(f"{out} exists already: choose another --out, or --overwrite it")
    if out.exists() and not (out / "reward_model.json").is_file():
        raise UserError(
            f"{out} is not a reward model (it has no reward_model.json), so --overwrite leaves it alone; choose another --out"
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


def read_samples(config):
    """samples.jsonl of a run -> (before, after), lists of its lines for the same prompts."""
    try:
        lines = read_jsonl(Path(config.samples))
        steps = sorted({line["step"] for line in lines})
        before, after = ([line for line in lines if line["step"] == step] for step in (steps[0], steps[-1]))
        wanted = ("prompt", "reference", "completion", "reward", "reference_reward", "truncated")
        if (
            len(steps) < 2
            or [x["prompt"] for x in before] != [x["prompt"] for x in after]
            or any(key not in line for line in lines for key in wanted)
        ):
            raise ValueError("it does not hold the same prompts before and after training")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"--samples {config.samples}: is not the samples.jsonl of a finished run ({first_line(error)})"
        ) from error
    return (before[: config.pairs or None], after[: config.pairs or None])


def against_references(rewards, references):
    """rewards and references' rewards, before and after, as (before, after) -> lines of a report: mean, RAS, NAG, with intervals over prompts."""
    lines = []
    for word, r, y in zip(("before", "after"), rewards, references):
        shares, (low, high) = ras(r, y), bootstrap_interval(np.greater(r, y))
        q = np.quantile(r, [0.25, 0.5, 0.75])
        lines.append(
            f"{word:<8}reward {np.mean(r):.3f} (deviation {np.std(r):.3f}, quartiles {q[0]:.3f} {q[1]:.3f} {q[2]:.3f}), reference {np.mean(y):.3f}; "
            f"RAS {shares['win']:.3f} [{low:.3f}, {high:.3f}] / {shares['tie']:.3f} / {shares['loss']:.3f}"
        )
    gain, (low, high) = (
        nag(rewards[1], rewards[0]),
        bootstrap_interval(np.sign(np.subtract(rewards[1], rewards[0]))),
    )
    return [
        *lines,
        f"NAG     {gain['signed']:+.3f} [{low:+.3f}, {high:+.3f}] (wins alone {gain['indicator']:.3f})",
    ]


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
    # both answers and the question go into one prompt: half the context each is safe, what is beyond is an error
    for name, records in pairs_to_measure(config, tokens, policy.context // 2, "chat").items():
        print(f"\n{name}: {len(records)} pairs, {judge.__name__}, {config.criterion}")
        verdicts = print_position([(r["prompt"], r["chosen"], r["rejected"]) for r in records], judge)
        right = (verdicts + 1) / 2
        low, high = bootstrap_interval(right)
        longer = np.array([np.sign(a - b) for a, b in (r["tokens"] for r in records)]) / 2 + 0.5
        print(
            f"  chosen wins {np.mean(verdicts > 0):.3f}, ties {np.mean(verdicts == 0):.3f}, loses {np.mean(verdicts < 0):.3f}"
        )
        print(
            f"  accuracy, a tie worth half: {right.mean():.3f} [{low:.3f}, {high:.3f}]; the longer one wins (tokens): {longer.mean():.3f}; random: 0.500"
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


COMMANDS = {
    "train": (TrainConfig, train_command),
    "score": (ScoreConfig, score_command),
    "judge": (JudgeConfig, judge_command),
}


def main(argv):
    """python reward.py train|score|judge [flags] -> exit status, see train.exit_status."""
    word = argv[0] if argv else ""
    if word in ("-h", "--help"):
        print(
            f"{__doc__}\nusage: python reward.py {'|'.join(COMMANDS)} [flags]; for the flags: python reward.py COMMAND --help"
        )
        return 0
    return exit_status(lambda: run(word, argv[1:]), stopped="stopped; nothing was written")


def run(word, flags):
    if word not in COMMANDS:
        raise UserError(
            f"{f'no command {word}' if word else 'no command'}: the first word is one of {', '.join(COMMANDS)} (see --help)"
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
