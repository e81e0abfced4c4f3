"""The built-in tasks with expert answers of a chosen quality: a given share of them meets every constraint,
each of the others misses one or more.

    graded_tasks("tiny", 1000, share=0.5)    # records as of tiny_tasks or chat_tasks, with two columns more:
                                             # "experts": `chosen` and another; "split": who trains on it

What to read off: where imitation stops paying. A record is right or wrong by a coin of its own that does not
depend on `share`, so a larger share only puts wrong answers right, and the prompts stay the same.
"""

import random

from data.chat_tasks import answer_again, asked, chat_tasks
from data.constraints import constraint_results, hack
from data.loaders import HELD_OUT
from data.tiny_tasks import CHOSEN_RATE, answer, tiny_tasks

# After which a record keeps its last answer: a few chat tasks leave one sentence in one form to be right.
ATTEMPTS = 60


def graded_tasks(level, n, share, seed=0):
    """`n` records of "tiny" or "chat" tasks (list of dicts, without `rejected`), `share` in [0, 1] of them
    answered right.

    A tenth of them, at the end, come from the tasks' own held-out split and say so in a column "split", which
    load_records reads: a hash of their prompts would hold out prompts on topics that are trained on. The same
    arguments give the same records. UserError or ValueError for an `n` beyond the pool, as the tasks' own.
    """
    tasks = {"tiny": tiny_tasks, "chat": chat_tasks}[level]
    held_out = n * HELD_OUT // 100
    records = []
    for split, size in (("train", n - held_out), ("heldout", held_out)):
        for record in tasks(split, size, seed):
            rng = random.Random(f"{seed}/{record['prompt']}")
            right = rng.random() < share
            rng = random.Random(f"{seed}/{right}/{record['prompt']}")
            experts = [graded_answer(level, record, right, rng) for _ in range(2)]
            del record["rejected"]
            records.append(record | {"chosen": experts[0], "experts": experts, "split": split})
    return records


def graded_answer(level, record, right, rng):
    """An answer (str) that meets all constraints of a record, or not all."""
    constraints = record["constraints"] if level == "tiny" else asked(record)
    for _ in range(ATTEMPTS):
        met = [right or rng.random() < CHOSEN_RATE for _ in constraints]
        if not right:
            met[rng.randrange(len(met))] = False
        text = answer(constraints, met, rng) if level == "tiny" else answer_again(record, met, rng)
        if is_right(record, text) == right:
            break
    return text


def is_right(record, text):
    """What the verifier pays: every constraint met, and no hack."""
    constraints = record["constraints"]
    honest = (
        hack(record["prompt"], text, record.get("min_words") or 1, constraints, record.get("about") or ())
        is None
    )
    return honest and all(constraint_results(text, constraints))
