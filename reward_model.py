"""Models that score texts: a role with a scalar head, classifiers, the chat judge. How a role is trained is
in engine/bradley_terry.py.
"""

import hashlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from data import UserError
from data.messages import last_text, messages
from engine.bradley_terry import fit_scorer, group_scores, micro_batches
from engine.classifier import Classifier, refuse_longer
from engine.command_line import Stop
from engine.draw import draw_calibration
from engine.folders import whole_directory, write_whole
from engine.measures import measures
from engine.models import TINY, find_model, first_line
from engine.pairs import read_sets, split_sets
from engine.record import environment
from engine.report import report_pairs
from engine.unfinished import read_metadata
from policy import Policy


class RoleScorer:
    """A reward model of `python reward.py train`: a role on a Policy's backbone. Called with B prompts and
    for each a list of answers' texts -> list of lists of raw scores, read at the EOS that is put behind every
    answer. UserError for a text beyond the context.
    """

    def __init__(self, policy, role, most=4096):
        self.policy, self.role, self.most, self.context = policy, role, most, policy.context

    def tokens(self, prompt, answer):
        """Length of the whole text, tokens."""
        return len(self.policy.encode_prompt(prompt)) + len(self.policy.encode_answer(answer))

    def __call__(self, prompts, groups):
        ids = [self.policy.encode_prompt(p) for p in prompts]
        answers = [[self.policy.encode_answer(text) for text in group] for group in groups]
        for prompt, p, group in zip(prompts, ids, answers):
            refuse_longer(len(p) + max(map(len, group)), self.context, prompt)
        return group_scores(self.policy, self.role, ids, answers, self.most)


def tokenizer_print(tokenizer) -> str:
    """Equal for tokenizers that turn every conversation into the same ids, as far as vocabulary and chat
    template tell.
    """
    return hashlib.sha256(
        json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]).encode()
    ).hexdigest()[:16]


def find_scorer(name: str) -> Path:
    """The directory of a reward model, a hub one downloaded if needed; UserError if there is none."""
    if not Path(name).is_dir() and (str(name).count("/") != 1 or str(name)[0] in "./~"):
        raise UserError(f"reward model {name}: no such directory, and not a hub name (owner/name)")
    if read_metadata(Path(name) / "checkpoint.safetensors"):
        raise UserError(
            f"reward model {name}: its training has not finished; go on with "
            f"python reward.py train --resume --out {name}"
        )
    return Path(name if (Path(name) / "adapter_config.json").is_file() else find_model(name))


def load_scorer(
    name: str, policy: Policy | None = None, most: int = 4096, device: str = "auto", dtype: str = "auto"
) -> "RoleScorer | Classifier":
    """The scorer of a directory or hub name: RoleScorer of a saved role, or Classifier.

    A role saved for `policy`'s backbone becomes a frozen role of it, and no weights are loaded twice;
    another's backbone is loaded beside, in NF4 if it was trained so.
    """
    directory = find_scorer(name)
    if not (directory / "adapter_config.json").is_file():
        return Classifier(name, device, dtype, most)
    base, quantize, tokenizer = read_about(directory, name)
    try:
        shared = policy is not None and os.path.realpath(find_model(base)) == os.path.realpath(policy.source)
        if not shared:
            policy = Policy.load(base, quantize=quantize, device=device, dtype=dtype)
    except UserError as error:
        raise UserError(f"reward model {name}: its base, {base}, is not to be had: {error}") from error
    role = f"reward{len(policy.heads) or ''}"
    parameters = policy.add_role(role, directory)
    if tokenizer not in (None, tokenizer_print(policy.tokenizer)):
        raise UserError(
            f"reward model {name}: was trained with another tokenizer or chat template than that of {base}; "
            "train it again"
        )
    held = parameters.values() if shared else policy.hf.parameters()
    size = sum(p.numel() * p.element_size() for p in held)
    backbone = "on the same backbone" if shared else "with a backbone of its own"
    said = f"reward model {name}: {backbone}, {base}, {size / 2**20:.1f} MiB"
    if quantize != ("nf4" if getattr(policy.hf, "is_loaded_in_4bit", False) else "none"):
        said += f"; it was trained with --quantize {quantize}, so scores here are a little different"
    print(said, file=sys.stderr)
    return RoleScorer(policy, role, most)


def read_about(directory, name):
    """A saved reward model -> its base (as Policy.load takes it), its quantisation, its tokenizer's print."""
    about = directory / "reward_model.json"
    try:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        info = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
        base = config["base_model_name_or_path"]
        quantize, tokenizer = info.get("settings", {}).get("quantize", "none"), info.get("tokenizer")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"reward model {name}: adapter_config.json or reward_model.json is damaged ({first_line(error)})"
        ) from error
    # The embedded model is named by its path, once as data/tiny; another clone has it at another place.
    gone = not Path(str(base)).is_dir() and info.get("base") == "tiny"
    embedded = gone or base == "data/tiny" or os.path.realpath(str(base)) == os.path.realpath(TINY)
    return "tiny" if embedded else str(base), quantize, tokenizer


CRITERIA = {
    "helpful": "Which reply is of more use to the person? The better one does what was asked, is correct, "
    "says it clearly, and leaves out what nobody needs.",
    "harmless": "Which reply could do less harm? The better one gives no help with hurting people, with "
    "crime or with hatred, insults nobody, keeps private things private, and where it declines, says so "
    "kindly.",
}


QUESTION = """Compare two replies to the last message of a conversation.

{conversation}

Reply A: {a}

Reply B: {b}

{criterion} Answer with one letter, A or B."""


class Judge:
    """A chat model that compares two answers; the verdict is read from the log-probabilities of "A" and "B",
    and nothing is sampled.

    It is asked twice, with the order swapped: +1 or -1 where both verdicts name the same answer, 0 where they
    disagree. As a reward function: R(o, y) for y the column `chosen`, R(y, y) = 0; a sample that was cut
    loses. The model is the Policy's reference: the adapter is off.
    """

    def __init__(self, policy, name, criterion="helpful", most=4096):
        self.policy, self.__name__, self.criterion, self.most = (
            policy,
            f"judge {name}",
            CRITERIA[criterion],
            most,
        )
        letters = [policy.tokenizer.encode(letter, add_special_tokens=False) for letter in "AB"]
        if (
            policy.tokenizer.chat_template is None
            or any(len(x) != 1 for x in letters)
            or letters[0] == letters[1]
        ):
            raise UserError(
                f"judge {name}: needs a chat template and a token of its own for each of the letters A and "
                "B; choose a chat model"
            )
        self.letters = letters

    def question(self, prompt, a, b):
        names = {"user": "Person", "assistant": "Assistant", "system": "Instruction", "tool": "Tool"}
        conversation = "\n\n".join(f"{names[m['role']]}: {m['content'].strip()}" for m in messages(prompt))
        return self.policy.encode_prompt(
            QUESTION.format(conversation=conversation, a=a.strip(), b=b.strip(), criterion=self.criterion)
        )

    @torch.no_grad()
    def log_odds(self, prompts, answers, experts):
        """(N, 2): log p(verdict for the answer) - log p(for the expert answer), nats, with the answer as A
        and as B. And the mean probability of A or B.
        """
        asked = [
            self.question(*x) for p, o, y in zip(prompts, answers, experts) for x in ((p, o, y), (p, y, o))
        ]
        for prompt, ids in zip([p for p in prompts for _ in "AB"], asked):
            refuse_longer(len(ids) + 1, self.policy.context, prompt)
        odds, said = torch.zeros(len(asked)), torch.zeros(len(asked))
        for part in micro_batches(asked, [self.letters] * len(asked), self.most):
            logps = (
                self.policy.token_logps(
                    [asked[i] for i in part], [self.letters] * len(part), role="reference"
                )
                .logps[:, :, 0]
                .cpu()
            )  # (b, 2)
            odds[part], said[part] = logps[:, 0] - logps[:, 1], logps.exp().sum(1)
        if not odds.isfinite().all():
            raise UserError(
                f"{self.__name__}: gave a log-probability that is not finite; "
                "its weights, or --dtype bfloat16, may be at fault"
            )
        return odds.view(-1, 2) * torch.tensor([1.0, -1.0]), float(said.mean()) if len(asked) else 1.0

    def __call__(self, prompts, completions, chosen, truncated=None, **columns):
        cases = [
            (p, last_text(o, "assistant"), last_text(y, "assistant"))
            for p, o, y in zip(prompts, completions, chosen, strict=True)
        ]
        cut = truncated or [False] * len(cases)
        ask = [i for i, (_, o, y) in enumerate(cases) if not cut[i] and o != y]
        rewards = [-1.0 if c else 0.0 for c in cut]
        for i, row in zip(ask, self.log_odds(*zip(*(cases[i] for i in ask)))[0] if ask else ()):
            rewards[i] = verdict(row)
        return rewards


def verdict(row: torch.Tensor) -> float:
    """log-odds of the two orders (2,) -> +1.0, -1.0, or 0.0 where they disagree or one is undecided."""
    return float(row[0] > 0 and row[1] > 0) - float(row[0] < 0 and row[1] < 0)


# ------------------------------------------------------------------------------------------------------------
# python reward.py train


def train_reward_model(config, folder):
    level = "tiny" if config.model == "tiny" else "chat"
    versions = environment()  # before training: the tree may change meanwhile
    training, measured = read_sets(config, level)
    policy = load_trainable(config)
    scorer = RoleScorer(policy, "reward", config.micro_batch_tokens)
    sets = split_sets(training, measured, config, scorer.tokens, min(config.max_tokens, policy.context))
    pairs = encode_pairs(policy, sets.training, config.margin)
    held_out = encode_pairs(policy, sets.stop, config.margin)
    check_unknown(policy, [pair[0] for pair in pairs], config)
    print(headline(config, policy, sets), flush=True)

    with Stop() as stop:
        history = fit_scorer(
            policy, "reward", pairs, held_out, log=log_line, folder=folder, stop=stop, **fit_options(config)
        )
    if history is None:
        go_on = f"python reward.py train --resume --out {folder.path}"
        print(f"stopped; go on with: {go_on}", file=sys.stderr)
        return None
    evaluation, lines = measure_sets(scorer, sets)
    info = {
        "base": "tiny" if config.model == "tiny" else str(config.model),
        "tokenizer": tokenizer_print(policy.tokenizer),
        **about_scores(lines),
        "split": sets.statement(),
        "evaluation": evaluation,
        "settings": {k: v for k, v in asdict(config).items() if k not in ("out", "overwrite", "resume")},
        "environment": versions,
    }
    write_reward_model(policy, folder.path, info, history, lines)
    return folder.path


def load_trainable(config):
    """The model with a fresh role "reward"."""
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
    return policy


def encode_pairs(policy, records, margin):
    """Records -> [(prompt ids, chosen ids, rejected ids, margin)], as fit_scorer takes them."""
    pairs = []
    for r in records:
        answers = policy.encode_answer(r["chosen"]), policy.encode_answer(r["rejected"])
        pairs.append((policy.encode_prompt(r["prompt"]), *answers, r.get("margin", margin)))
    return pairs


def headline(config, policy, sets):
    """What is trained, on how much of what."""
    kind = "nf4" if config.quantize == "nf4" else str(policy.dtype).split(".")[-1]
    on = ", ".join(f"{len(records)} of {name}" for name, records in sets.measured.items())
    return (
        f"reward model · {config.model} · {kind} on {policy.device} · learns from {len(sets.training)} "
        f"pairs, stops by {len(sets.stop)}, is measured on {on}; the three share no dialogue"
    )


def log_line(line):
    print(" · ".join(f"{name} {value:.4g}" for name, value in line.items()), flush=True)


def fit_options(config):
    """The settings of `reward.py train` that fit_scorer takes, by its names."""
    names = ("lr", "epochs", "batch_size", "margin", "centre", "eval_every", "patience", "seed")
    options = {name: getattr(config, name) for name in (*names, "weight_decay", "max_grad_norm")}
    return options | {"max_tokens_per_pass": config.micro_batch_tokens}


def measure_sets(scorer, sets):
    """Score and report every measured set -> ({name: measures}, lines of scores.jsonl)."""
    evaluation, lines = {}, []
    for name, records in sets.measured.items():
        scores = score_pairs(scorer, records)
        evaluation[name] = measures(scores, [r["tokens"] for r in records])
        lines += [{"set": name, "scores": s, "tokens": r["tokens"]} for s, r in zip(scores, records)]
        print(report_pairs(name, evaluation[name]), flush=True)
    return evaluation, lines


def score_pairs(scorer, records):
    """-> [[score of chosen, of rejected]]."""
    return scorer([r["prompt"] for r in records], [[r["chosen"], r["rejected"]] for r in records])


def about_scores(lines):
    scores = [score for line in lines for score in line["scores"]]
    return {"scores": {"mean": float(np.mean(scores)), "std": float(np.std(scores))}}


def write_reward_model(policy, out, info, history, lines):
    """The finished model takes the folder's place, whole or not at all."""
    with whole_directory(out) as tmp:
        policy.save_role("reward", tmp)
        write_whole(tmp / "reward_model.json", json.dumps(info, indent=2, ensure_ascii=False) + "\n")
        write_whole(tmp / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))
        write_whole(tmp / "scores.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        draw_calibration(info, history, tmp / "calibration.png")
    print(
        f"\nThe reward model is in {out}: train a policy with --reward {out}, "
        f"score pairs with python reward.py score --model {out} --data FILE"
    )


def check_unknown(policy, prompts, config):
    tokens, unknown = sum(map(len, prompts)), sum(ids.count(policy.tokenizer.unk_token_id) for ids in prompts)
    if policy.tokenizer.unk_token_id is not None and unknown > 0.1 * tokens:
        raise UserError(
            f"data {config.data}: {unknown / tokens:.0%} of its tokens are unknown to model {config.model}; "
            "choose another --model"
        )
