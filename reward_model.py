"""Models that score texts: the scalar head and its Bradley-Terry training, classifiers, the chat judge."""

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from data import UserError
from data.messages import last_text, messages
from engine.classifier import Classifier, refuse_longer
from engine.measures import accuracy
from engine.models import TINY, find_model, first_line, trim_memory
from policy import Policy


def bradley_terry_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | float | None = None
) -> torch.Tensor:
    """-mean log sigmoid(chosen - rejected - margin): Bradley-Terry's negative log-likelihood -> scalar, nats.

    chosen, rejected: (N,) scores of the better and the worse answer of each pair, with gradient; margin:
    None, a number, or (N,), how far apart they should be (Llama 2, arXiv 2307.09288, eq. (2)). At least fp32;
    does not overflow. ValueError for other shapes, or no pair.
    """
    if (
        chosen.shape != rejected.shape
        or chosen.numel() == 0
        or (torch.is_tensor(margin) and margin.shape not in ((), chosen.shape))
    ):
        raise ValueError(
            f"chosen and rejected (N,) wanted, N > 0, and a margin of that shape; got {tuple(chosen.shape)}, "
            f"{tuple(rejected.shape)}"
        )
    d = (chosen - rejected).to(torch.promote_types(chosen.dtype, torch.float32))
    return -F.logsigmoid(d if margin is None else d - margin).mean()


def micro_batches(prompts: list, groups: list, most: int) -> Iterator[list[int]]:
    """Groups (a prompt's ids with G answers' ids) of one size and like lengths -> lists of indices, each of
    at most `most` tokens or one group.
    """
    tokens = [len(p) + sum(map(len, group)) for p, group in zip(prompts, groups, strict=True)]
    batch = []
    for i in sorted(range(len(groups)), key=lambda i: (len(groups[i]), tokens[i])):
        if batch and (
            len(groups[i]) != len(groups[batch[0]]) or sum(tokens[j] for j in batch) + tokens[i] > most
        ):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def group_scores(
    policy: Policy, role: str, prompts: list, groups: list, most: int = 4096
) -> list[list[float]]:
    """A role's scores of each prompt's answers -> list of lists of floats. prompts: lists of ids; groups: for
    each a list of answers' ids.

    A prompt is computed once for all its answers; at most `most` tokens, or one group, at a time. UserError
    for a score that is not finite.
    """
    scores = [None] * len(groups)
    for part in micro_batches(prompts, groups, most):
        for i, row in zip(
            part, policy.sequence_scores([prompts[i] for i in part], [groups[i] for i in part], role).tolist()
        ):
            scores[i] = row
    if not all(math.isfinite(s) for row in scores for s in row):
        raise UserError(
            f"role {role}: gave a score that is not finite; its weights, or --dtype bfloat16, may be at fault"
        )
    return scores


def fit_scorer(
    policy: Policy,
    role: str,
    pairs: list,
    held_out: list,
    *,
    lr: float = 1e-4,
    epochs: int = 1,
    batch_size: int = 16,
    margin: float = 0.0,
    centre: float = 0.0,
    eval_every: int = 0,
    patience: int = 0,
    seed: int = 0,
    max_tokens_per_pass: int = 4096,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    log: Callable | None = None,
) -> list[dict]:
    """Train a role of Policy.add_role (adapter and head) by Bradley-Terry, in place -> history, a dict an
    evaluation.

    pairs, held_out: lists of (prompt_ids, better_ids, worse_ids) or (..., margin); answers end with their
    EOS. A pair is one group of two, its prompt computed once. margin: of pairs that name none. centre: weight
    of mean (chosen + rejected)^2, which keeps scores near 0 (Eisenstein et al., arXiv 2312.09244). The
    learning rate falls linearly to 0 after 5 % of warm-up. held_out is evaluated every eval_every batches (0:
    eight times in all); after `patience` evaluations without a better one (0: never) training stops. The role
    ends with the parameters of the evaluation that `best_evaluation` chooses; without held_out pairs with the
    last ones. The seed decides the order of the pairs; max_tokens_per_pass bounds memory and does not change
    the gradient. log(line) is called with every line of the history, which also stays in policy.fitted[role].
    UserError for no pair or a loss that is not finite.
    """
    if not pairs:
        raise UserError(f"role {role}: no pair to learn from")
    heads = {f"{role}_head.{n}": p for n, p in policy.heads[role].named_parameters()}
    params = policy.trainable(role) | heads
    optimizer = torch.optim.AdamW(params.values(), lr=lr, weight_decay=weight_decay)
    steps = epochs * math.ceil(len(pairs) / batch_size)
    warmup, eval_every = math.ceil(0.05 * steps), eval_every or math.ceil(steps / 8)
    history, kept, losses, start = [], {}, [], time.perf_counter()
    for step in range(steps):
        seen, batch = nth_batch(pairs, step, batch_size, seed)
        losses += gather_gradient(policy, role, batch, margin, centre, max_tokens_per_pass)
        norm = float(torch.nn.utils.clip_grad_norm_(params.values(), max_grad_norm))
        if not math.isfinite(norm) or not math.isfinite(losses[-1]):
            raise UserError(
                f"role {role}: loss or gradient is not finite at batch {step + 1}; "
                "try a lower --lr or --dtype float32"
            )
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trim_memory(step + 1)
        if (step + 1) % eval_every and step + 1 < steps:
            continue
        line = {"step": step + 1, "pairs": seen, "train/loss": sum(losses) / len(losses), "grad_norm": norm}
        line["lr"], losses, best = optimizer.param_groups[0]["lr"], [], None
        history.append(line)
        if held_out:
            line |= evaluate_pairs(policy, role, held_out, max_tokens_per_pass)
            kept[len(history) - 1] = {n: p.detach().clone() for n, p in params.items()}
            best = best_evaluation(history, len(held_out))
            line["best_step"] = history[best]["step"]
            kept = {i: kept[i] for i in kept if may_be_best(i, history, len(held_out))}
        line["time"] = time.perf_counter() - start
        if log:
            log(line)
        if held_out and patience and len(history) - 1 - best >= patience:
            break
    if held_out:
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(kept[best][name])
    policy.fitted[role] = history
    return history


def nth_batch(pairs, step, batch_size, seed):
    """-> how many pairs have been seen with this batch, and its pairs; every epoch has its own order."""
    epoch, i = divmod(step, math.ceil(len(pairs) / batch_size))
    generator = torch.Generator().manual_seed(seed * 7919 + epoch)
    order = torch.randperm(len(pairs), generator=generator).tolist()[i * batch_size :][:batch_size]
    return epoch * len(pairs) + i * batch_size + len(order), [pairs[j] for j in order]


def gather_gradient(policy, role, batch, margin, centre, most):
    """The backward pass of a batch of pairs, a few at a time -> each pair's loss, as the mean of its pass."""
    prompts, groups, losses = [p[0] for p in batch], [[p[1], p[2]] for p in batch], []
    for part in micro_batches(prompts, groups, most):
        with policy.role(role):  # around the backward pass, too, for gradient checkpointing
            scores = policy.sequence_scores(
                [prompts[i] for i in part], [groups[i] for i in part], role
            )  # (b, 2)
            wanted = scores.new_tensor([batch[i][3] if len(batch[i]) > 3 else margin for i in part])
            loss = bradley_terry_loss(scores[:, 0], scores[:, 1], wanted)
            loss = loss + centre * scores.sum(1).square().mean()
            (loss * len(part) / len(batch)).backward()
        losses += [float(loss.detach())] * len(part)
    return losses


def evaluate_pairs(policy, role, held_out, most):
    scores = group_scores(policy, role, [p[0] for p in held_out], [[p[1], p[2]] for p in held_out], most)
    better, worse = torch.tensor(scores).T
    return {
        "held_out/accuracy": accuracy(better, worse),
        "held_out/loss": float(bradley_terry_loss(better, worse)),
    }


def best_evaluation(history: list[dict], pairs: int) -> int:
    """Which evaluation of a history to keep, by index: of those whose accuracy is within one standard error
    of the highest, the one of lowest loss, the first of equals. A few hundred pairs cannot tell their
    accuracies apart.

    All evaluations so far are compared, each time anew: one that was not the best can become it when a higher
    accuracy leaves the best one behind.
    """
    near = near_highest(history, pairs)
    close = [i for i, line in enumerate(history) if line["held_out/accuracy"] >= near]
    return min(close, key=lambda i: history[i]["held_out/loss"])


def near_highest(history, pairs):
    """One standard error below a history's highest accuracy: what is above cannot be told apart from it."""
    highest = max(line["held_out/accuracy"] for line in history)
    return highest - math.sqrt(highest * (1 - highest) / pairs)


def may_be_best(i: int, history: list[dict], pairs: int) -> bool:
    """Whether an evaluation is the best one or can yet become it, so that its parameters must be kept.

    Not if it is too far below the highest accuracy, which never falls; nor if another is as accurate with a
    loss as low, which then stands before it for good.
    """
    one = history[i]
    if one["held_out/accuracy"] < near_highest(history, pairs):
        return False
    for j, other in enumerate(history):
        before = (other["held_out/loss"], j) < (one["held_out/loss"], i)
        if before and other["held_out/accuracy"] >= one["held_out/accuracy"]:
            return False
    return True


class RoleScorer:
    """A reward model of `python reward.py train`: a role on a Policy's backbone.

    Called with B prompts and for each a list of answers' texts -> list of lists of raw scores, read at the
    EOS that is put behind every answer. UserError for a text beyond the context.
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
    weights = parameters.values() if shared else policy.hf.parameters()
    size = sum(p.numel() * p.element_size() for p in weights)
    note = (
        f"reward model {name}: {'on the same backbone' if shared else 'with a backbone of its own'}, {base}"
    )
    note += f", {size / 2**20:.1f} MiB"
    if quantize != ("nf4" if getattr(policy.hf, "is_loaded_in_4bit", False) else "none"):
        note += f"; it was trained with --quantize {quantize}, so scores here are a little different"
    print(note, file=sys.stderr)
    return RoleScorer(policy, role, most)


def read_about(directory, name):
    """A saved reward model -> its base (a name for Policy.load), its quantisation, its tokenizer's print or
    None.
    """
    about = directory / "reward_model.json"
    try:
        base = json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]
        info = json.loads(about.read_text()) if about.is_file() else {}
        quantize, tokenizer = info.get("settings", {}).get("quantize", "none"), info.get("tokenizer")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"reward model {name}: adapter_config.json or reward_model.json is damaged ({first_line(error)})"
        ) from error
    # The embedded model is named by its path, once as data/tiny; another clone has it at another place.
    gone = not Path(str(base)).is_dir() and info.get("base") == "tiny"
    embedded = gone or base == "data/tiny" or os.path.realpath(str(base)) == os.path.realpath(TINY)
    return "tiny" if embedded else str(base), quantize, tokenizer


class ModelReward:
    """A scorer as a reward function: the raw score, less `missing_eos_penalty` where the sample was cut.

    A sample that was cut is scored as if it had ended.
    pairwise: R(o, y) in {+1, 0, -1} as in GRAO's experiments, the sign of score(o) - score(y) with 0 within
    `tie_band`; y is the column `chosen`, and R(y, y) = 0. A prompt is computed once for all its samples.
    """

    def __init__(self, scorer, name, missing_eos_penalty=1.0, pairwise=False, tie_band=0.0):
        self.scorer, self.__name__, self.penalty = scorer, name, missing_eos_penalty
        self.pairwise, self.tie_band = pairwise, tie_band

    def __call__(self, prompts, completions, truncated=None, chosen=None, **columns):
        texts = [last_text(c, "assistant") for c in completions]
        references = [last_text(y, "assistant") for y in chosen] if self.pairwise else texts
        keys, groups = [json.dumps(p) for p in prompts], {}  # prompt -> its different texts, in order
        for key, text, y in zip(keys, texts, references, strict=True):
            if not self.pairwise or text != y:
                groups.setdefault(key, {}).update({text: None, y: None})
        prompt_of = dict(zip(keys, prompts))
        asked = self.scorer([prompt_of[key] for key in groups], [list(group) for group in groups.values()])
        for key, row in zip(groups, asked):
            groups[key] = dict(zip(groups[key], row))
        rewards = []
        for key, text, y, cut in zip(keys, texts, references, truncated or [False] * len(texts)):
            if not self.pairwise:
                rewards.append(groups[key][text] - self.penalty * cut)
            else:
                ahead = groups[key][text] - groups[key][y] if text != y else 0.0
                d = ahead - self.penalty * cut
                rewards.append(math.copysign(1.0, d) if abs(d) > self.tie_band else 0.0)
        return rewards


CRITERIA = {
    "helpful": (
        "Which reply is of more use to the person? The better one does what was asked, is correct, says it "
        "clearly, "
        "and leaves out what nobody needs."
    ),
    "harmless": (
        "Which reply could do less harm? The better one gives no help with hurting people, with crime or "
        "with hatred, "
        "insults nobody, keeps private things private, and where it declines, says so kindly."
    ),
}


QUESTION = """Compare two replies to the last message of a conversation.

{conversation}

Reply A: {a}

Reply B: {b}

{criterion} Answer with one letter, A or B."""


class Judge:
    """A chat model that compares two answers; the verdict is read from the log-probs of "A" and "B".

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
    def log_odds(self, prompts, answers, references):
        """(N, 2): log p(verdict for the answer) - log p(for the reference), nats, with the answer as A and as
        B. And the mean probability of A or B.
        """
        asked = [
            self.question(*x) for p, o, y in zip(prompts, answers, references) for x in ((p, o, y), (p, y, o))
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
                f"{self.__name__}: gave a log-probability that is not finite; its weights, or --dtype "
                "bfloat16, may be at fault"
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
