"""How much does an answer look like the expert's? Three discriminators D(q, y, o) of prompt q, expert answer y and candidate o.

    python uniapl.py discriminator --model tiny --out runs/polar     # train one and test it on held-out prompts
    python uniapl.py --discriminator runs/polar                      # polar (the default, trained at the start of a run), embedding, cotrained

polar      A scalar read after `q y <eos> q o <eos>`, by a LoRA adapter and head of its own on the shared frozen backbone; fixed during a run.
           POLAR (arXiv 2507.05197) learns to tell policies apart: -log sigmoid(D(q, a1, a2) - D(q, a1, b)), a1 and a2 of one policy and b of
           another. Here a1 and a2 are two expert answers and b is a sample of the policy that training starts from. There is no pre-training
           on other policies, and the separator is the answer's EOS, because a frozen vocabulary has no token to spare.
embedding  Cosine between the mean final hidden states of o and of y, on the backbone alone. Nothing is trained.
cotrained  D(q, o), trained at each step on -log sigmoid(D(q, y) - D(q, o)) as GAD does (arXiv 2511.10643). It does not see y beside o: a
           scorer that does would learn to detect copies. The same holds for polar, so there a1 and a2 are never the same text.

The second expert answer comes from the built-in tasks' generator, or from a record's column "experts", a list of texts, as
`python -m data.teach` writes it. Which of the two is a1 is a coin's throw; the candidates of a prompt do not see each other.
"""

import json
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from data import UserError, load_records
from data.chat_tasks import another_answer as another_chat_answer
from data.tiny_tasks import another_answer as another_tiny_answer
from engine.bradley_terry import bradley_terry_loss, fit_scorer, group_scores, micro_batches
from engine.command_line import parse
from engine.folders import holds, reserve, whole_directory, write_whole
from engine.measures import accuracy, bootstrap_interval, right
from engine.record import environment
from engine.scoring import Pack
from engine.settings import DiscriminatorConfig, check_settings
from policy import Policy

ROLE, ABOUT = "discriminator", "discriminator.json"
MATCHED = 4  # samples of the policy to choose one of like length from: otherwise length is the first thing that polar learns, and often the last

# ---------------------------------------------------------------------------------------------------------------------------------
# Scores


def scores(name, policy, prompts, experts, candidates, most=4096):
    """D of each prompt's candidates -> list of lists of floats. prompts, experts: lists of ids; candidates: for each a list of answers' ids."""
    if name == "embedding":
        return embedding_scores(policy, prompts, experts, candidates, most)
    if name != "cotrained":
        prompts = [condition(q, y) for q, y in zip(prompts, experts)]
    return group_scores(policy, ROLE, prompts, candidates, most)


def condition(prompt, expert):
    """What polar reads before a candidate: the prompt, the expert's answer with its EOS, and the prompt again."""
    return prompt + expert + prompt


@torch.no_grad()
def embedding_scores(policy, prompts, experts, candidates, most=4096):
    """Cosine of mean hidden states, candidate against expert, in [-1, 1] -> list of lists of floats."""
    found, groups = [None] * len(prompts), [[*group, y] for group, y in zip(candidates, experts)]
    for part in micro_batches(prompts, groups, most):
        pack = Pack([prompts[i] for i in part], [groups[i] for i in part], policy.device)
        with policy.role("backbone"):
            states = policy.hidden(pack).float()
        answer = pack.mask.nonzero()[:, 0]  # of each completion token
        mean = torch.zeros(len(pack.mask), states.shape[-1], device=policy.device).index_add_(
            0, answer, states[pack.c_index[pack.mask]]
        )
        mean = torch.nn.functional.normalize(mean, dim=-1).view(
            pack.B, pack.G, -1
        )  # a sum and a mean have one direction
        for i, row in zip(part, (mean[:, :-1] * mean[:, -1:]).sum(-1).tolist()):
            found[i] = row
    return found


def judge(trainer, name, batch):
    """D of a step's samples (B, G), without gradient, and what to log. A cotrained D also gathers its own gradient here."""
    c, policy, G = trainer.config, trainer.policy, trainer.config.group_size
    if name == "cotrained":
        groups = [[*group, y] for group, y in zip(batch.completions, batch.references)]
        found, total = [None] * len(groups), 0.0
        for part in micro_batches(batch.prompts, groups, c.micro_batch_tokens):
            with policy.role(ROLE):
                D = policy.sequence_scores(
                    [batch.prompts[i] for i in part], [groups[i] for i in part], ROLE
                )  # (b, G + 1)
                loss = (
                    bradley_terry_loss(D[:, -1:].expand(-1, G).flatten(), D[:, :-1].flatten())
                    * len(part)
                    / len(groups)
                )
                loss.backward()
            total += float(loss.detach())
            for i, row in zip(part, D.detach().tolist()):
                found[i] = row
        metrics = {"discriminator/loss": total}
    else:
        others = [another_expert(record, c) for record in batch.records]
        groups = [
            group + ([policy.encode_answer(text)] if text else [])
            for group, text in zip(batch.completions, others)
        ]
        found, metrics = (
            scores(name, policy, batch.prompts, batch.references, groups, c.micro_batch_tokens),
            {},
        )
    samples = torch.tensor([row[:G] for row in found], device=policy.device)
    metrics["score/policy"] = float(samples.mean())
    pairs = [(row[G], o) for row in found for o in row[:G] if len(row) > G]  # expert, sample
    if pairs:
        metrics |= {
            "score/expert": sum(e for e, _ in pairs) / len(pairs),
            "score/accuracy": accuracy(*zip(*pairs)),
        }
    return samples, metrics


# ---------------------------------------------------------------------------------------------------------------------------------
# Pairs and training


def another_expert(record, config):
    """A second expert answer (str) that differs from `chosen`, or None: of the built-in tasks' generator, or from the column "experts"."""
    rng = random.Random(f"{config.seed}/{record['prompt']}")
    if config.data == "tasks":
        return (another_tiny_answer if config.model == "tiny" else another_chat_answer)(record, rng)
    experts = record.get("experts") or []
    if not isinstance(experts, list) or not all(isinstance(text, str) and text.strip() for text in experts):
        raise UserError(
            f"data {config.data}: 'experts' must be a list of answers; that of the prompt {str(record['prompt'])[:60]!r} is not"
        )
    experts = [text for text in experts if text != record["chosen"]]
    return rng.choice(experts) if experts else None


def expert_pairs(policy, records, config, seed, draws=1):
    """[(q y q, other expert answer, sample of the policy)] as ids, for fit_scorer; records without a second expert answer, or whose text
    passes the model's context, are left out and counted on stderr. Of `draws` samples the one nearest in length to the answer is taken."""
    rng, kept, without, long = random.Random(seed), [], 0, 0
    for record in records:
        second = another_expert(record, config)
        if second is None:
            without += 1
            continue
        pair = [policy.encode_answer(record["chosen"]), policy.encode_answer(second)]
        rng.shuffle(pair)  # roles: which of the two is the reference
        q = policy.encode_prompt(record["prompt"])
        if 2 * len(q) + len(pair[0]) + max(len(pair[1]), config.max_new_tokens) > policy.context:
            long += 1
        elif pair[0] != pair[1]:  # two texts that read the same would teach it to detect copies
            kept.append((q, *pair))
    if without + long:
        print(
            f"discriminator: left out {without} records without a second expert answer and {long} longer than the context",
            file=sys.stderr,
        )
    if not kept:
        raise UserError(
            f"data {config.data}: no record has a second expert answer (column 'experts', see python -m data.teach) for --discriminator polar "
            "to learn from; choose --discriminator embedding or cotrained"
        )
    rollout = policy.generate([q for q, _, _ in kept], draws, config.max_new_tokens, config.temperature, seed)
    pairs = []
    for (q, y, other), samples in zip(kept, rollout.completions):
        sample = min(samples, key=lambda ids: abs(len(ids) - len(other)))
        if sample != other:
            pairs.append((condition(q, y), other, sample))
    return pairs


def train_polar(policy, config, *, pairs, epochs, lr, log=None):
    """A new role, trained on `pairs` prompts of the training split, a tenth of them kept for early stopping -> (training pairs, history).

    Its prompts are drawn with another seed than the run's, so of the built-in tasks mostly others than the policy is trained on.
    """
    policy.add_role(ROLE)
    records = load_records(
        config.data, "train", pairs, seed=config.seed + 1, level="tiny" if config.model == "tiny" else "chat"
    )
    known = expert_pairs(policy, records, config, config.seed * 7919 + 1, MATCHED)
    cut = max(1, len(known) // 10)
    history = fit_scorer(
        policy,
        ROLE,
        known[cut:],
        known[:cut],
        lr=lr,
        epochs=epochs,
        seed=config.seed,
        max_tokens_per_pass=config.micro_batch_tokens,
        log=log,
    )
    return known[cut:], history


def train_at_start(policy, c):
    """A polar discriminator for a run with the settings `c`, and a line on how well it tells the expert from the policy."""
    start = time.perf_counter()
    known, history = train_polar(
        policy, c, pairs=c.discriminator_pairs, epochs=c.discriminator_epochs, lr=c.discriminator_lr
    )
    share = max(line["held_out/accuracy"] for line in history)
    print(
        f"discriminator: {len(known)} pairs in {time.perf_counter() - start:.0f} s; right on {share:.3f} of the pairs kept for early stopping"
    )


def check_context(policy, records, c):
    """UserError if a record's prompt, expert answer, prompt and sample do not fit into the model's context together."""
    for r in records:
        second = another_expert(r, c)
        length = len(condition(r["prompt_ids"], r["reference_ids"])) + max(
            c.max_new_tokens, len(policy.encode_answer(second)) if second else 0
        )
        if length > policy.context:
            raise UserError(
                f"data {c.data}: the polar discriminator reads {length} tokens for the prompt {str(r['prompt'])[:60]!r}, more than the model's context of "
                f"{policy.context}: set --max-prompt-tokens and --max-reference-tokens, or choose --discriminator embedding"
            )


def freeze(policy):
    """The discriminator's parameters by name, no longer trained."""
    params = policy.trainable(ROLE) | {
        f"{ROLE}_head.{n}": p for n, p in policy.heads[ROLE].named_parameters()
    }
    for p in params.values():
        p.requires_grad_(False)
    return params


def load(policy, directory):
    """Add a discriminator saved by `python uniapl.py discriminator`, frozen. UserError for anything else: a reward model reads no expert answer."""
    if not (Path(directory) / ABOUT).is_file():
        raise UserError(
            f"--discriminator {directory}: choose polar, embedding or cotrained, or a directory made by python uniapl.py discriminator --out DIR"
        )
    policy.add_role(ROLE, directory)


# ---------------------------------------------------------------------------------------------------------------------------------
# python uniapl.py discriminator


def measure(policy, known, unseen, most):
    """Accuracy at telling expert from policy on `unseen` pairs, in all and by length difference, beside what length alone achieves.

    -> list of (name, pairs, share, low, high). "length alone" prefers the longer answer or the shorter one, whichever was right more
    often on the `known` pairs. Ties count half; intervals are 95 % bootstrap intervals over prompts.
    """
    D = group_scores(policy, ROLE, [p[0] for p in unseen], [[p[1], p[2]] for p in unseen], most)
    correct = right([expert for expert, _ in D], [sample for _, sample in D])
    gap = np.array([len(p[1]) - len(p[2]) for p in unseen])  # tokens, expert - policy
    direction = 1 if sum(np.sign(len(p[1]) - len(p[2])) for p in known) >= 0 else -1
    by_length = 0.5 + 0.5 * np.sign(gap) * direction
    rows = [
        ("all", correct),
        ("expert shorter", correct[gap < 0]),
        ("same length", correct[gap == 0]),
        ("expert longer", correct[gap > 0]),
    ]
    rows.append((f"length alone: the {'longer' if direction > 0 else 'shorter'} one", by_length))
    return [(name, len(x), float(x.mean()), *bootstrap_interval(x)) for name, x in rows if len(x)]


def command_line(argv, description):
    """Train and test one -> the directory written; UserError for what a user can mend."""
    c = check_settings(DiscriminatorConfig(**parse(DiscriminatorConfig, argv, description)))
    if c.out is None:
        raise UserError("discriminator: --out DIR is needed, the directory to write")
    ways = {"kind": "discriminator", "remedies": ["--overwrite it"]}
    with reserve(c.out, ours=is_discriminator, overwrite=c.overwrite, **ways):
        return train_and_test(c)


def is_discriminator(path):
    return holds(path / ABOUT, "settings", "test")


def train_and_test(c):
    policy = Policy.load(
        c.model,
        quantize=c.quantize,
        adapter=c.from_adapter,
        lora_rank=c.lora_rank,
        lora_alpha=c.lora_alpha,
        device=c.device,
        dtype=c.dtype,
        seed=c.seed,
        gradient_checkpointing=c.gradient_checkpointing == "on",
    )
    records = load_records(
        c.data, "heldout", c.test_pairs, seed=0, level="tiny" if c.model == "tiny" else "chat"
    )
    unseen = expert_pairs(policy, records, c, seed=2**31 + c.seed)
    start = time.perf_counter()
    known, history = train_polar(
        policy, c, pairs=c.pairs, epochs=c.epochs, lr=c.lr, log=lambda line: print(progress(line))
    )
    rows = measure(policy, known, unseen, c.micro_batch_tokens)
    print(
        f"\n{len(known)} pairs in {time.perf_counter() - start:.0f} s; told the expert from the policy on held-out prompts, share [95 % interval]:"
    )
    for name, n, share, low, high in rows:
        print(f"  {name:<30}{share:.3f} [{low:.3f}, {high:.3f}]   n = {n}")
    settings = {k: v for k, v in asdict(c).items() if k not in ("out", "overwrite")}
    test = [dict(zip(("pairs", "n", "share", "low", "high"), row)) for row in rows]
    with whole_directory(c.out) as tmp:
        policy.save_role(ROLE, tmp)
        write_whole(
            tmp / ABOUT,
            json.dumps(
                {"settings": settings, "environment": environment(), "test": test, "history": history},
                indent=1,
            )
            + "\n",
        )
    print(f"It is in {c.out}: python uniapl.py --discriminator {c.out}")
    return c.out


def progress(line):
    return f"  batch {line['step']:>4}: loss {line['train/loss']:.3f}, right on {line['held_out/accuracy']:.3f} of the pairs kept for early stopping"
