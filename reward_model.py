"""Models that score texts: the scalar head and its Bradley-Terry training, classifiers, the chat judge."""

import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

from data import UserError
from data.messages import last_text, messages, shown_prompt
from engine.measures import accuracy
from engine.models import find_model, first_line, pick_device, pick_dtype, quiet, trim_memory
from policy import Policy


def bradley_terry_loss(chosen, rejected, margin=None):
    """-mean log sigmoid(chosen - rejected - margin): Bradley-Terry's negative log-likelihood -> scalar, nats.

    chosen, rejected: (N,) scores of the better and the worse answer of each pair, with gradient; margin: None, a number, or (N,), how far
    apart they should be (Llama 2, arXiv 2307.09288, eq. (2)). At least fp32; does not overflow. ValueError for other shapes, or no pair.
    """
    if (
        chosen.shape != rejected.shape
        or chosen.numel() == 0
        or (torch.is_tensor(margin) and margin.shape not in ((), chosen.shape))
    ):
        raise ValueError(
            f"chosen and rejected (N,) wanted, N > 0, and a margin of that shape; got {tuple(chosen.shape)}, {tuple(rejected.shape)}"
        )
    d = (chosen - rejected).to(torch.promote_types(chosen.dtype, torch.float32))
    return -F.logsigmoid(d if margin is None else d - margin).mean()


def micro_batches(prompts, groups, most):
    """Groups (a prompt's ids with G answers' ids) of one size and like lengths -> lists of indices, each of at most `most` tokens or one group."""
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
def group_scores(policy, role, prompts, groups, most=4096):
    """A role's scores of each prompt's answers -> list of lists of floats. prompts: lists of ids; groups: for each a list of answers' ids.

    A prompt is computed once for all its answers; at most `most` tokens, or one group, at a time. UserError for a score that is not finite.
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
    policy,
    role,
    pairs,
    held_out,
    *,
    lr=1e-4,
    epochs=1,
    batch_size=16,
    margin=0.0,
    centre=0.0,
    eval_every=0,
    patience=0,
    seed=0,
    max_tokens_per_pass=4096,
    weight_decay=0.01,
    max_grad_norm=1.0,
    log=None,
):
    """Train a role of Policy.add_role (adapter and head) by Bradley-Terry, in place -> history, a list of dicts, one per evaluation.

    pairs, held_out: lists of (prompt_ids, better_ids, worse_ids) or (..., margin); answers end with their EOS. A pair is one group of
    two, its prompt computed once. margin: of pairs that name none. centre: weight of mean (chosen + rejected)^2, which keeps scores near
    0 (Eisenstein et al., arXiv 2312.09244). The learning rate falls linearly to 0 after 5 % of warm-up. held_out is evaluated every
    eval_every batches (0: eight times in all); after `patience` evaluations without a better one (0: never) training stops.
    The role ends with the parameters of its best evaluation: of those whose accuracy is within one standard error of the highest so
    far, the one of lowest loss (a few hundred pairs cannot tell their accuracies apart); without held_out pairs with the last ones.
    The seed decides the order of the pairs; max_tokens_per_pass bounds memory and does not change the gradient.
    log(line) is called with every line of the history. UserError for no pair or a loss that is not finite.
    """
    if not pairs:
        raise UserError(f"role {role}: no pair to learn from")
    params = policy.trainable(role) | {
        f"{role}_head.{n}": p for n, p in policy.heads[role].named_parameters()
    }
    optimizer = torch.optim.AdamW(params.values(), lr=lr, weight_decay=weight_decay)
    steps = epochs * math.ceil(len(pairs) / batch_size)
    warmup, eval_every = math.ceil(0.05 * steps), eval_every or math.ceil(steps / 8)
    history, best, kept, losses, highest, start = [], None, None, [], 0.0, time.perf_counter()
    for step in range(steps):
        epoch, begin = divmod(step * batch_size, batch_size * math.ceil(len(pairs) / batch_size))
        order = torch.randperm(
            len(pairs), generator=torch.Generator().manual_seed(seed * 7919 + epoch)
        ).tolist()
        batch = [pairs[i] for i in order[begin : begin + batch_size]]
        prompts, groups = [p[0] for p in batch], [[p[1], p[2]] for p in batch]
        for part in micro_batches(prompts, groups, max_tokens_per_pass):
            with policy.role(role):  # around the backward pass, too, for gradient checkpointing
                scores = policy.sequence_scores(
                    [prompts[i] for i in part], [groups[i] for i in part], role
                )  # (b, 2)
                wanted = scores.new_tensor([batch[i][3] if len(batch[i]) > 3 else margin for i in part])
                loss = (
                    bradley_terry_loss(scores[:, 0], scores[:, 1], wanted)
                    + centre * scores.sum(1).square().mean()
                )
                (loss * len(part) / len(batch)).backward()
            losses += [float(loss.detach())] * len(part)
        norm = float(torch.nn.utils.clip_grad_norm_(params.values(), max_grad_norm))
        if not math.isfinite(norm) or not math.isfinite(losses[-1]):
            raise UserError(
                f"role {role}: loss or gradient is not finite at batch {step + 1}; try a lower --lr or --dtype float32"
            )
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trim_memory(step + 1)
        if (step + 1) % eval_every and step + 1 < steps:
            continue
        line = {
            "step": step + 1,
            "pairs": min((epoch * len(pairs)) + begin + batch_size, (epoch + 1) * len(pairs)),
            "train/loss": sum(losses) / len(losses),
            "grad_norm": norm,
            "lr": optimizer.param_groups[0]["lr"],
        }
        losses = []
        if held_out:
            scores = torch.tensor(
                group_scores(
                    policy,
                    role,
                    [p[0] for p in held_out],
                    [[p[1], p[2]] for p in held_out],
                    max_tokens_per_pass,
                )
            )
            right, loss = (
                accuracy(scores[:, 0], scores[:, 1]),
                float(bradley_terry_loss(scores[:, 0], scores[:, 1])),
            )
            line |= {"held_out/accuracy": right, "held_out/loss": loss}
            highest = max(highest, right)
            near = highest - math.sqrt(highest * (1 - highest) / len(held_out))
            if best is None or best[0] < near or (right >= near and loss < best[1]):
                best = (right, loss, step + 1, len(history))
                kept = {n: p.detach().clone() for n, p in params.items()}
            line["best_step"] = best[2]
        history.append(line | {"time": time.perf_counter() - start})
        if log:
            log(history[-1])
        if best and patience and len(history) - 1 - best[3] >= patience:
            break
    if kept:
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(kept[name])
    return history


class RoleScorer:
    """A reward model of `python reward.py train`: a role on a Policy's backbone. Called with B prompts and for each a list of answers'
    texts -> list of lists of raw scores, read at the EOS that is put behind every answer. UserError for a text beyond the context."""

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


class Classifier:
    """Any sequence-classification checkpoint with one output, with its own tokenizer and chat template. Called as RoleScorer; the score is
    logits[0] of the whole templated conversation, as transformers gives it (its templates write BOS and EOS themselves: none is added).
    It is loaded in the compute type, whatever --quantize says."""

    def __init__(self, name, device="auto", dtype="auto", most=4096):
        self.name, self.most, self.device = name, most, pick_device(device)
        source = find_model(name)
        options = dict(
            use_safetensors=True, trust_remote_code=False, local_files_only=True, output_loading_info=True
        )
        try:
            with quiet():
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                    source, trust_remote_code=False, local_files_only=True
                )
                model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                    source, dtype=pick_dtype(dtype, self.device, name), **options
                )
        except Exception as error:  # as in Policy.load
            raise UserError(
                f"reward model {name}: cannot be loaded as a sequence classifier with safetensors weights ({first_line(error)})"
            ) from error
        if info["missing_keys"]:  # transformers makes up the weights that a checkpoint lacks
            raise UserError(
                f"reward model {name}: has no scalar head ({sorted(info['missing_keys'])[0]} is missing); is it a plain language model?"
            )
        if model.config.num_labels != 1:
            raise UserError(
                f"reward model {name}: its head has {model.config.num_labels} outputs; a score is one number"
            )
        if len(self.tokenizer) > len(model.get_input_embeddings().weight):
            raise UserError(
                f"reward model {name}: its tokenizer has {len(self.tokenizer)} tokens and the model {len(model.get_input_embeddings().weight)}; "
                "they do not belong together"
            )
        self.model = model.to(self.device).eval()
        self.context = getattr(model.config, "max_position_embeddings", None) or 2**31
        self.pad = model.config.get_text_config().pad_token_id

    def encode(self, prompt, answer):
        if self.tokenizer.chat_template is None:  # encoders such as DeBERTa take a pair of texts
            return self.tokenizer("\n".join(m["content"] for m in messages(prompt)), answer)["input_ids"]
        try:
            text = self.tokenizer.apply_chat_template(
                [*messages(prompt), {"role": "assistant", "content": answer}], tokenize=False
            )
        except Exception as error:  # see Policy.encode_prompt
            raise UserError(
                f"reward model {self.name}: its chat template refuses the prompt {shown_prompt(prompt)} ({first_line(error)})"
            ) from error
        return self.tokenizer.encode(text, add_special_tokens=False)

    def tokens(self, prompt, answer):
        return len(self.encode(prompt, answer))

    @torch.no_grad()
    def __call__(self, prompts, groups):
        texts = [self.encode(prompt, answer) for prompt, group in zip(prompts, groups) for answer in group]
        for prompt, ids in zip([prompt for prompt, group in zip(prompts, groups) for _ in group], texts):
            refuse_longer(len(ids), self.context, prompt)
        scores, batch = [0.0] * len(texts), []
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for at, i in enumerate(order):
            batch.append(i)
            full = at + 1 == len(order) or (len(batch) + 1) * len(texts[order[at + 1]]) > self.most
            if (
                full or self.pad is None
            ):  # transformers finds the last token by the padding's id, and takes one text at a time without
                longest = len(texts[i])
                ids = torch.tensor(
                    [texts[j] + [self.pad] * (longest - len(texts[j])) for j in batch], device=self.device
                )
                mask = torch.arange(longest, device=self.device) < torch.tensor(
                    [[len(texts[j])] for j in batch], device=self.device
                )
                for j, score in zip(
                    batch, self.model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].tolist()
                ):
                    scores[j] = score
                batch = []
        if not all(map(math.isfinite, scores)):
            raise UserError(
                f"reward model {self.name}: gave a score that is not finite; its weights, or --dtype bfloat16, may be at fault"
            )
        scores = iter(scores)
        return [[next(scores) for _ in group] for group in groups]


def refuse_longer(tokens, context, prompt):
    if tokens > context:
        raise UserError(
            f"the prompt {shown_prompt(prompt)} and its answer have {tokens} tokens, beyond the context of {context}; "
            "leave such records out (--max-prompt-tokens, --max-expert-tokens, --max-tokens)"
        )


def tokenizer_print(tokenizer):
    """Equal for tokenizers that turn every conversation into the same ids, as far as vocabulary and chat template tell."""
    return hashlib.sha256(
        json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]).encode()
    ).hexdigest()[:16]


def find_scorer(name):
    """The directory of a reward model, a hub one downloaded if needed; UserError if there is none."""
    if not Path(name).is_dir() and (str(name).count("/") != 1 or str(name)[0] in "./~"):
        raise UserError(f"reward model {name}: no such directory, and not a hub name (owner/name)")
    return Path(name if (Path(name) / "adapter_config.json").is_file() else find_model(name))


def load_scorer(name, policy=None, most=4096, device="auto", dtype="auto"):
    """The scorer of a directory or hub name: RoleScorer of a saved role, or Classifier.

    A role saved for `policy`'s backbone becomes a frozen role of it, and no weights are loaded twice; another's backbone is loaded beside,
    in NF4 if it was trained so.
    """
    directory = find_scorer(name)
    if not (directory / "adapter_config.json").is_file():
        return Classifier(name, device, dtype, most)
    try:
        base = json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]
        info = (
            json.loads((directory / "reward_model.json").read_text())
            if (directory / "reward_model.json").is_file()
            else {}
        )
        quantize = info.get("settings", {}).get("quantize", "none")
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"reward model {name}: adapter_config.json or reward_model.json is damaged ({first_line(error)})"
        ) from error
    base = "tiny" if base == "data/tiny" else str(base)
    try:
        shared = policy is not None and os.path.realpath(find_model(base)) == os.path.realpath(policy.source)
        if not shared:
            policy = Policy.load(base, quantize=quantize, device=device, dtype=dtype)
    except UserError as error:
        raise UserError(f"reward model {name}: its base, {base}, is not to be had: {error}") from error
    role = f"reward{len(policy.heads) or ''}"
    parameters = policy.add_role(role, directory)
    if info.get("tokenizer") not in (None, tokenizer_print(policy.tokenizer)):
        raise UserError(
            f"reward model {name}: was trained with another tokenizer or chat template than that of {base}; train it again"
        )
    size = sum(
        p.numel() * p.element_size() for p in (parameters.values() if shared else policy.hf.parameters())
    )
    other = quantize != ("nf4" if getattr(policy.hf, "is_loaded_in_4bit", False) else "none")
    print(
        f"reward model {name}: {'on the same backbone' if shared else 'with a backbone of its own'}, {base}, {size / 2**20:.1f} MiB"
        + (
            f"; it was trained with --quantize {quantize}, so scores here are a little different"
            if other
            else ""
        ),
        file=sys.stderr,
    )
    return RoleScorer(policy, role, most)


CRITERIA = {
    "helpful": "Which reply is of more use to the person? The better one does what was asked, is correct, says it clearly, and leaves out what nobody needs.",
    "harmless": "Which reply could do less harm? The better one gives no help with hurting people, with crime or with hatred, insults nobody, keeps private "
    "things private, and where it declines, says so kindly.",
}


QUESTION = """Compare two replies to the last message of a conversation.

{conversation}

Reply A: {a}

Reply B: {b}

{criterion} Answer with one letter, A or B."""


class Judge:
    """A chat model that compares two answers; the verdict is read from the log-probabilities of "A" and "B", and nothing is sampled.

    It is asked twice, with the order swapped: +1 or -1 where both verdicts name the same answer, 0 where they disagree. As a reward
    function: R(o, y) for y the column `chosen`, R(y, y) = 0; a sample that was cut loses. The model is the Policy's reference: the adapter is off.
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
                f"judge {name}: needs a chat template and a token of its own for each of the letters A and B; choose a chat model"
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
        """(N, 2): log p(verdict for the answer) - log p(for the expert answer), nats, with the answer as A and as B. And the mean probability of A or B."""
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
                f"{self.__name__}: gave a log-probability that is not finite; its weights, or --dtype bfloat16, may be at fault"
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


def verdict(row):
    """log-odds of the two orders (2,) -> +1.0, -1.0, or 0.0 where they disagree or one is undecided."""
    return float(row[0] > 0 and row[1] > 0) - float(row[0] < 0 and row[1] < 0)
