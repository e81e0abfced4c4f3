"""How much does an answer look like the expert's? D(q, y, o) of prompt q, expert answer y and candidate o;
and how to get more expert answers.

    python uniapl.py discriminator --model tiny --out runs/polar     # train one, test it on held-out prompts
    python uniapl.py --discriminator runs/polar                      # or polar, embedding, cotrained
    python uniapl.py teach --model DIR-OR-HUB-NAME --out FILE.jsonl  # expert answers from a larger model

polar      A scalar read after `q y <eos> q o <eos>`, by a LoRA adapter and head of its own on the shared
           frozen backbone; fixed during a run, made at its start. From POLAR (arXiv 2507.05197). The default.
embedding  Cosine between the mean final hidden states of o and of y, on the backbone alone. Never trained.
cotrained  D(q, o), trained at each step against the policy's own samples, as GAD does (arXiv 2511.10643).

Deviations. 2509.25148 uses "a modified POLAR" that is not published, so this is our reading of POLAR: no
pre-training on other policies, and the separator is the answer's EOS, because a frozen vocabulary has no
token to spare. cotrained is beyond the paper, which fixes D on purpose.

y here is the expert answer that D compares with, which POLAR calls the reference; the frozen model, elsewhere
the reference, is only ever the backbone here.
"""

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import UserError, load_records
from data.chat_tasks import another_answer as another_chat_answer
from data.tiny_tasks import another_answer as another_tiny_answer
from engine.bradley_terry import bradley_terry_loss, fit_scorer, group_scores, micro_batches
from engine.command_line import parse
from engine.folders import holds, reserve, to_json, whole_directory, write_whole
from engine.measures import accuracy, bootstrap_interval, right
from engine.record import environment
from engine.scoring import Pack
from engine.settings import DiscriminatorConfig, TeachConfig, check_settings
from policy import Policy
from reward import checked_rewards, verifier

ROLE, ABOUT = "discriminator", "discriminator.json"
# Samples of the policy to choose one of like length from: otherwise length is the first thing that polar
# learns, and often the last.
MATCHED = 4

# ------------------------------------------------------------------------------------------------------------
# Scores: higher is more like the expert. Only differences within a prompt's group are used, see
# adversarial_advantages.


def scores(
    name: str, policy: Policy, prompts: list, experts: list, candidates: list, most: int = 4096
) -> list:
    """D of each prompt's candidates -> list of lists of floats, without gradient.

    name: polar, embedding or cotrained; prompts, experts: lists of ids; candidates: for each prompt a list of
    answers' ids; most: tokens in a forward pass.
    """
    if name == "embedding":
        return embedding_scores(policy, prompts, experts, candidates, most)
    # cotrained does not see y beside o: trained against y itself, it would learn to detect copies and nothing
    # else.
    if name != "cotrained":
        prompts = [condition(q, y) for q, y in zip(prompts, experts)]
    return group_scores(policy, ROLE, prompts, candidates, most)


def condition(prompt: list, expert: list) -> list:
    """What polar reads before a candidate: the prompt, the expert's answer with its EOS, and the prompt
    again.
    """
    return prompt + expert + prompt  # the candidate follows, and its EOS is where the score is read


@torch.no_grad()
def embedding_scores(
    policy: Policy, prompts: list, experts: list, candidates: list, most: int = 4096
) -> list:
    """Cosine of mean hidden states, candidate against expert, in [-1, 1] -> list of lists of floats."""
    # micro_batches orders prompts by length, so scores are put back by index.
    found = [None] * len(prompts)
    groups = [[*group, y] for group, y in zip(candidates, experts)]  # y as one more completion of its prompt
    for part in micro_batches(prompts, groups, most):
        pack = Pack([prompts[i] for i in part], [groups[i] for i in part], policy.device)
        # The backbone, not the policy: a scale that moved with the policy could be satisfied by moving.
        with policy.role("backbone"):
            states = policy.hidden(pack).float()  # (N, D), a row for each token of the pack
        answer = pack.mask.nonzero()[:, 0]  # which completion each completion token belongs to
        sums = torch.zeros(len(pack.mask), states.shape[-1], device=policy.device)
        sums.index_add_(0, answer, states[pack.c_index[pack.mask]])  # a sum and a mean have one direction
        mean = F.normalize(sums, dim=-1).view(pack.B, pack.G, -1)
        cosines = (mean[:, :-1] * mean[:, -1:]).sum(-1)  # (b, G)
        for i, row in zip(part, cosines.tolist()):
            found[i] = row
    return found


# ------------------------------------------------------------------------------------------------------------
# In a step


def judge(trainer, name: str, batch) -> tuple[Tensor, dict]:
    """D of a step's samples (B, G), without gradient, and {metric: float}.

    A cotrained D also gathers its own gradient here; the optimiser's step that moves the policy moves it,
    too.
    """
    G = trainer.config.group_size
    if name == "cotrained":
        found, metrics = cotrain(trainer, batch)
    else:
        found, metrics = judge_fixed(trainer, name, batch), {}
    D = torch.tensor([row[:G] for row in found], device=trainer.policy.device)
    metrics["score/policy"] = float(D.mean())
    # Behind the samples' scores stands an expert answer's, where there is one to compare with.
    pairs = [(row[G], o) for row in found if len(row) > G for o in row[:G]]
    if pairs:
        experts, samples = zip(*pairs)
        metrics["score/expert"] = sum(experts) / len(experts)
        metrics["score/accuracy"] = accuracy(experts, samples)
    return D, metrics


def judge_fixed(trainer, name: str, batch) -> list:
    """Scores of the samples, and behind them that of a *second* expert answer: y beside itself would say
    nothing.
    """
    # Never y itself: polar was never shown a copy, embedding would always say 1.
    c, policy, groups = trainer.config, trainer.policy, []
    for record, samples in zip(batch.records, batch.completions):
        second = another_expert(record, c)
        groups.append([*samples, policy.encode_answer(second)] if second else samples)
    return scores(name, policy, batch.prompts, batch.experts, groups, c.micro_batch_tokens)


def cotrain(trainer, batch) -> tuple[list, dict]:
    """Scores of the samples and of y, and the gradient of GAD's loss (2511.10643) in D's own parameters:

        L_D = -E[ log σ( D(q, y) - D(q, o) ) ]      Bradley-Terry, y against each sample of its prompt

    The policy learns from the scores as they were before this update.
    """
    # Why in every step: in GAD a D that stood still was exploited after some hundred
    # steps, answers growing longer meanwhile. Watch score/accuracy and length/mean.
    c, policy, G = trainer.config, trainer.policy, trainer.config.group_size
    groups = [[*samples, y] for samples, y in zip(batch.completions, batch.experts)]
    found, total = [None] * len(groups), 0.0
    for part in micro_batches(batch.prompts, groups, c.micro_batch_tokens):
        # The role is held over the backward pass, which with gradient checkpointing computes the layers
        # again.
        with policy.role(ROLE):
            D = policy.sequence_scores([batch.prompts[i] for i in part], [groups[i] for i in part], ROLE)
            y, samples = D[:, -1:].expand(-1, G), D[:, :-1]  # (b, G) each
            loss = bradley_terry_loss(y.flatten(), samples.flatten())
            loss = loss * len(part) / len(groups)  # a mean over its own prompts; the step's is over B
            loss.backward()
        total += float(loss.detach())
        for i, row in zip(part, D.detach().tolist()):
            found[i] = row
    return found, {"discriminator/loss": total}


# ------------------------------------------------------------------------------------------------------------
# Pairs and training. POLAR learns to tell policies apart (2507.05197), a1 and a2 of one policy and b of
# another:
#
#     L = -E[ log σ( D(q, a1, a2) - D(q, a1, b) ) ]
#
# Here a1 and a2 are two expert answers and b is a sample of the policy that training starts from. Never the
# same text twice: with a2 = a1 the quickest way to a small loss is to detect copies, and no sample is a copy.


def another_expert(record: dict, config) -> str | None:
    """A second expert answer that differs from `chosen`: from the built-in tasks' generator, or of the column
    "experts".

    None where there is none. UserError if the column is no list of answers.
    """
    rng = random.Random(
        f"{config.seed}/{record['prompt']}"
    )  # of the prompt alone: the same one whenever it is asked
    if config.data == "tasks":
        return (another_tiny_answer if config.model == "tiny" else another_chat_answer)(record, rng)
    experts = record.get("experts") or []
    if not isinstance(experts, list) or not all(isinstance(text, str) and text.strip() for text in experts):
        prompt = f"{str(record['prompt'])[:60]!r}"
        raise UserError(
            f"data {config.data}: 'experts' must be a list of answers; that of the prompt {prompt} is not"
        )
    experts = [text for text in experts if text != record["chosen"]]
    return rng.choice(experts) if experts else None


def expert_pairs(policy: Policy, records: list, config, seed: int, draws: int = 1) -> list:
    """[(q y q, other expert answer, sample of the policy)] as ids, for fit_scorer.

    draws: samples of each prompt to choose the third from. UserError if there is no pair, see two_experts.
    """
    asked = two_experts(policy, records, config, random.Random(seed))
    # b of the loss above: the same prompts, answered by the policy that training starts from. Of `draws`
    # samples the one nearest in length to the expert's answer, so that there is more to see than its length.
    prompts = [q for q, _, _ in asked]
    rollout = policy.generate(prompts, draws, config.max_new_tokens, config.temperature, seed)
    pairs = []
    for (q, y, other), samples in zip(asked, rollout.completions):
        sample = min(samples, key=lambda ids: abs(len(ids) - len(other)))
        if sample != other:  # a policy that says word for word what the expert says is no negative
            pairs.append((condition(q, y), other, sample))
    return pairs


def two_experts(policy: Policy, records: list, config, rng: random.Random) -> list:
    """[(q, y, another expert answer)] as ids, of the records that have both and fit into the context.

    The others are counted on stderr. UserError if none is left.
    """
    found, left = [], Counter()
    for record in records:
        second = another_expert(record, config)
        if second is None:
            left["without a second expert answer"] += 1
            continue
        pair = [policy.encode_answer(record["chosen"]), policy.encode_answer(second)]
        # Which of the two is y is a coin's throw: a fixed order would let D learn the generator's habits
        # instead.
        rng.shuffle(pair)
        q = policy.encode_prompt(record["prompt"])
        if 2 * len(q) + len(pair[0]) + max(len(pair[1]), config.max_new_tokens) > policy.context:
            left["longer than the context"] += 1
        elif pair[0] != pair[1]:  # two texts that read the same would teach it to detect copies, too
            found.append((q, *pair))
    if left:
        without, long = left["without a second expert answer"], left["longer than the context"]
        said = f"{without} records without a second expert answer and {long} longer than the context"
        print(f"discriminator: left out {said}", file=sys.stderr)
    if not found:
        raise UserError(
            f"data {config.data}: no record has a second expert answer (column 'experts', see python "
            "uniapl.py teach) for --discriminator polar to learn from; choose --discriminator embedding "
            "or cotrained"
        )
    return found


def train_polar(
    policy: Policy, config, *, pairs: int, epochs: int, lr: float, log: Callable | None = None
) -> tuple:
    """A new role, trained on `pairs` prompts of the training split, a tenth of them kept for early stopping.

    -> (training pairs, history, a dict for each evaluation).
    """
    policy.add_role(ROLE)
    level = "tiny" if config.model == "tiny" else "chat"
    # Drawn with another seed than the run's, so of the built-in tasks mostly other prompts than the policy
    # trains on.
    records = load_records(config.data, "train", pairs, seed=config.seed + 1, level=level)
    known = expert_pairs(policy, records, config, config.seed * 7919 + 1, MATCHED)
    # A tenth decides when to stop, and is told to nobody else: the accuracy printed for a run is of these
    # pairs, and flatters. The command below tests on held-out prompts instead.
    cut = max(1, len(known) // 10)
    settings = dict(lr=lr, epochs=epochs, seed=config.seed, max_tokens_per_pass=config.micro_batch_tokens)
    history = fit_scorer(policy, ROLE, known[cut:], known[:cut], log=log, **settings)
    return known[cut:], history


# ------------------------------------------------------------------------------------------------------------
# The fixed discriminator of a run


def make_polar(policy: Policy, c) -> dict:
    """The run's polar discriminator, fixed -> its parameters by name, for the checkpoint.

    Empty where --discriminator names a directory, from which it is read again in a resumed run.
    """
    if c.discriminator != "polar":
        load(policy, c.discriminator)
        return {}
    if c.resume:
        # The checkpoint fills it. Trained again on another machine it would round otherwise, and the run that
        # goes on would not be the run that was stopped.
        policy.add_role(ROLE)
    else:
        train_at_start(policy, c)
    return freeze(policy)


def train_at_start(policy: Policy, c):
    """Train polar for a run with the settings `c`, and print how well it tells the expert from the policy."""
    start = time.perf_counter()
    settings = dict(pairs=c.discriminator_pairs, epochs=c.discriminator_epochs, lr=c.discriminator_lr)
    known, history = train_polar(policy, c, **settings)
    share, seconds = max(line["held_out/accuracy"] for line in history), time.perf_counter() - start
    said = f"right on {share:.3f} of the pairs kept for early stopping"
    print(f"discriminator: {len(known)} pairs in {seconds:.0f} s; {said}")


def check_context(policy: Policy, records: list, c):
    """UserError if a record's prompt, expert answer, prompt and sample together pass the context."""
    # Checked before training, because a step that meets such a record would end the run.
    for r in records:
        second = another_expert(r, c)
        answer = max(c.max_new_tokens, len(policy.encode_answer(second)) if second else 0)
        length = len(condition(r["prompt_ids"], r["expert_ids"])) + answer
        if length > policy.context:
            raise UserError(
                f"data {c.data}: the polar discriminator reads {length} tokens for the prompt "
                f"{str(r['prompt'])[:60]!r}, more than the model's context of {policy.context}: set "
                "--max-prompt-tokens and --max-expert-tokens, or choose --discriminator embedding"
            )


def freeze(policy: Policy) -> dict:
    """The discriminator's parameters by name, head included, no longer trained."""
    # Without gradient, and so without AdamW's moments: a fixed D costs its weights and nothing more.
    params = policy.trainable(ROLE)
    params |= {f"{ROLE}_head.{name}": p for name, p in policy.heads[ROLE].named_parameters()}
    for p in params.values():
        p.requires_grad_(False)
    return params


def load(policy: Policy, directory: str):
    """Add a discriminator saved by `python uniapl.py discriminator`, frozen.

    UserError for anything else: a reward model reads no expert answer, so its score would mean something
    else.
    """
    if not (Path(directory) / ABOUT).is_file():
        raise UserError(
            f"--discriminator {directory}: choose polar, embedding or cotrained, or a directory made by "
            "python uniapl.py discriminator --out DIR"
        )
    policy.add_role(ROLE, directory)


# ------------------------------------------------------------------------------------------------------------
# python uniapl.py discriminator


def measure(policy: Policy, known: list, unseen: list, most: int) -> list:
    """Accuracy at telling expert from policy on `unseen` pairs, in all and by length difference, beside a
    floor.

    -> [(name, pairs, share, low, high)]; ties count half; intervals are 95 % bootstrap intervals over
    prompts.
    """
    # Each pair is one group of two under its condition q y q, so both are read in one pass.
    D = group_scores(policy, ROLE, [p[0] for p in unseen], [[p[1], p[2]] for p in unseen], most)
    # A tie is half right, so that a D that says the same of everything gets 0.5 and not 0 or 1.
    correct = right([expert for expert, _ in D], [sample for _, sample in D])
    gap = np.array([len(p[1]) - len(p[2]) for p in unseen])  # tokens, expert - policy
    # The floor, "length alone": prefer the longer answer or the shorter one, whichever was right more often
    # on the `known` pairs. A discriminator that is no better has learnt to count.
    # +1: longer is better; 0 differences and ties of the count go to the longer one.
    direction = 1 if sum(np.sign(len(p[1]) - len(p[2])) for p in known) >= 0 else -1
    by_length = 0.5 + 0.5 * np.sign(gap) * direction
    rows = [
        ("all", correct),
        ("expert shorter", correct[gap < 0]),
        ("same length", correct[gap == 0]),
        ("expert longer", correct[gap > 0]),
    ]
    rows.append((f"length alone: the {'longer' if direction > 0 else 'shorter'} one", by_length))
    # The shares by length are each of other pairs: a D that counts tokens is right on one side and wrong on
    # the other.
    return [(name, len(x), float(x.mean()), *bootstrap_interval(x)) for name, x in rows if len(x)]


def train_command(argv: list) -> str:
    """Train one and test it -> the directory written; UserError for what a user can mend."""
    c = check_settings(DiscriminatorConfig(**parse(DiscriminatorConfig, argv, __doc__)))
    if c.out is None:
        raise UserError("discriminator: --out DIR is needed, the directory to write")
    with reserve(c.out, "discriminator", is_discriminator, c.overwrite, remedies=["--overwrite it"]):
        return train_and_test(c)


def is_discriminator(path: Path) -> bool:
    return holds(path / ABOUT, "settings", "test")


def train_and_test(c: DiscriminatorConfig) -> str:
    # The policy to tell from the expert: the base, or the adapter that the run will start from.
    checkpointing = c.gradient_checkpointing == "on"
    options = dict(lora_rank=c.lora_rank, lora_alpha=c.lora_alpha, gradient_checkpointing=checkpointing)
    policy = load_policy(c, adapter=c.from_adapter, dtype=c.dtype, **options)
    level = "tiny" if c.model == "tiny" else "chat"
    records = load_records(c.data, "heldout", c.test_pairs, seed=0, level=level)
    unseen = expert_pairs(policy, records, c, seed=2**31 + c.seed)
    start = time.perf_counter()
    # The test's samples are drawn before D exists, by the policy that D is to tell from the expert.
    known, history = train_polar(policy, c, pairs=c.pairs, epochs=c.epochs, lr=c.lr, log=print_progress)
    rows = measure(policy, known, unseen, c.micro_batch_tokens)
    print_test(rows, len(known), time.perf_counter() - start)
    about = {
        "settings": {k: v for k, v in asdict(c).items() if k not in ("out", "overwrite")},
        "environment": environment(),
        "test": [dict(zip(("pairs", "n", "share", "low", "high"), row)) for row in rows],
        "history": history,
    }
    with whole_directory(c.out) as tmp:
        policy.save_role(ROLE, tmp)
        write_whole(tmp / ABOUT, json.dumps(about, indent=1) + "\n")
    print(f"It is in {c.out}: python uniapl.py --discriminator {c.out}")
    return c.out


def load_policy(c, **options) -> Policy:
    return Policy.load(c.model, quantize=c.quantize, device=c.device, seed=c.seed, **options)


def print_test(rows: list, known: int, seconds: float):
    what = "told the expert from the policy on held-out prompts, share [95 % interval]"
    print(f"\n{known} pairs in {seconds:.0f} s; {what}:")
    for name, n, share, low, high in rows:
        print(f"  {name:<30}{share:.3f} [{low:.3f}, {high:.3f}]   n = {n}")


def print_progress(line: dict):
    right = f"right on {line['held_out/accuracy']:.3f} of the pairs kept for early stopping"
    print(f"  batch {line['step']:>4}: loss {line['train/loss']:.3f}, {right}")


# ------------------------------------------------------------------------------------------------------------
# python uniapl.py teach: a larger model answers the prompts, the verifier decides what is kept (rejection
# sampling). Every prompt with an answer that passes becomes a record: `chosen` is the first such answer,
# `experts` the different others, from which polar takes its second one, and the columns that the verifier
# reads stay:
#
#     {"prompt": "Write one short sentence about bees. Use only lowercase letters.",
#      "chosen": "bees live in hives.", "experts": ["a bee makes honey."], "constraints": [{"type":
#      "lowercase"}], ...}


def teach(
    policy: Policy, records: list, samples: int, max_new_tokens: int, temperature=1.0, seed=0, at_once=16
) -> tuple[list, Counter]:
    """Sample answers of a teacher, keep what passes the verifier -> (records as above, counts by name).

    at_once: prompts in a batch of the sampler.
    """
    kept, counts = [], Counter()
    for begin in range(0, len(records), at_once):
        part = records[begin : begin + at_once]
        prompts = [policy.encode_prompt(r["prompt"]) for r in part]
        rollout = policy.generate(prompts, samples, max_new_tokens, temperature, seed + begin)
        for record, group, cut in zip(part, rollout.completions, rollout.truncated):
            passed = passing(record, [policy.decode(ids) for ids in group], cut)
            answers = list(dict.fromkeys(passed))  # each once, in order: polar wants different ones
            counts.update(prompts=1, samples=samples, cut=sum(cut), passed=len(passed), distinct=len(answers))
            if answers:
                # `rejected` goes, too: it belonged to another answer.
                gone = ("prompt", "chosen", "rejected", "experts")
                rest = {name: value for name, value in record.items() if name not in gone}
                kept.append(
                    {"prompt": record["prompt"], "chosen": answers[0], "experts": answers[1:], **rest}
                )
    return kept, counts


def passing(record: dict, texts: list, cut: list) -> list:
    """The answers to one prompt that the verifier pays, whole and not empty."""
    # The verifier takes a column entry for each answer; an answer cut at the length limit fails whatever it
    # says.
    columns = {name: [value] * len(texts) for name, value in record.items() if name != "prompt"}
    rewards = checked_rewards(verifier, [record["prompt"]] * len(texts), texts, columns | {"truncated": cut})
    found = []
    for text, reward, is_cut in zip(texts, rewards, cut):
        if reward >= 1 and text.strip() and not is_cut:
            found.append(text)
    return found


def teach_command(argv: list) -> str:
    """Write a teacher's expert answers -> the file written; UserError for what a user can mend."""
    c = check_settings(TeachConfig(**parse(TeachConfig, argv, __doc__)))
    if c.model is None or c.out is None:
        raise UserError("teach: --model (the teacher) and --out FILE.jsonl are needed")
    with reserve(c.out, "file of answers") as out:
        kept = ask_teacher(c)
        write_whole(out, "".join(to_json(record) + "\n" for record in kept))
    print(f"They are in {c.out}: python uniapl.py --data {c.out}")
    return c.out


def ask_teacher(c: TeachConfig) -> list:
    """The records to write; UserError if there are none."""
    level = c.level or ("tiny" if c.model == "tiny" else "chat")
    records = load_records(c.data, "train", c.prompts, seed=c.seed, level=level)
    if not all("constraints" in r for r in records):
        raise UserError(f"data {c.data}: has no 'constraints' for the verifier to check")
    # No reference is needed: nothing is trained, so the backbone stands in for it.
    policy = load_policy(c, adapter=c.adapter, reference="base")
    kept, n = teach(policy, records, c.samples, c.max_new_tokens, c.temperature, c.seed)
    print(
        f"{n['samples']} answers to {n['prompts']} prompts: {n['cut']} cut at the length limit, "
        f"{n['passed']} passed the verifier, {n['distinct']} of them different; {len(kept)} prompts kept"
    )
    if not kept:
        raise UserError(
            f"no answer of {c.model} passed, so there is nothing to write; take a larger model, or more "
            "--samples"
        )
    return kept
