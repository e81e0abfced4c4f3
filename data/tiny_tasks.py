"""Small verifiable instructions for the tiny model: "list 3 animals , in reverse order , end with done".

    python -c "from data.tiny_tasks import tiny_tasks; print(*tiny_tasks('train', 3), sep='\\n')"

A record is TRL's preference format plus the column that the verifier reads:

    {"prompt": "list 2 animals , in upper case , end with done",
     "chosen": "FOX DOG DONE",
     "rejected": "fox dog bear",
     "constraints": [{"type": "items", "n": 2, "allowed": ["ant", "bear", ...], "ignore": ["done"]},
                     {"type": "uppercase"},
                     {"type": "end_with", "text": "done"}]}

Every prompt asks for items and for up to three things more; words and punctuation are separated by single
spaces. `chosen` is good but not perfect: it meets about 80 % of all constraints (0.79), and about half of the
experts' answers meet all of theirs. So a method can be seen to imitate the expert, and to go beyond it.
`rejected` meets about a third (0.32 to 0.35), and always fewer than `chosen`. Nothing here needs more than
the standard library, and no file is read.

The splits share no combination of number, category and extras: a held-out prompt asks for something that no
training prompt asks for, in whatever words. (Were whole prompts held out, 98.6 % of them would differ from a
training prompt in the verb alone, which changes nothing that an answer has to do.) What is held out is the
combination, not its parts: each word, each number and each kind of constraint occurs in training.
"""

import functools
import hashlib
import itertools
import random

# Ten words to a category would do as well; eight keep the vocabulary near 200 and alphabetical order
# learnable.
CATEGORIES = {
    "animals": ["ant", "bear", "cat", "dog", "fox", "horse", "lion", "wolf"],
    "fruits": ["apple", "banana", "cherry", "grape", "lemon", "mango", "peach", "plum"],
    "colors": ["black", "blue", "brown", "gray", "green", "red", "white", "yellow"],
    "tools": ["axe", "drill", "file", "hammer", "knife", "saw", "shovel", "wrench"],
    "drinks": ["beer", "cider", "cocoa", "coffee", "juice", "milk", "tea", "water"],
    "sports": ["boxing", "chess", "golf", "hockey", "judo", "rugby", "soccer", "tennis"],
    "trees": ["ash", "birch", "cedar", "elm", "maple", "oak", "pine", "willow"],
    "metals": ["brass", "copper", "gold", "iron", "lead", "nickel", "silver", "tin"],
}
VERBS = ["list", "name", "write", "give"]
COUNTS = [2, 3, 4, 5]
STARTS = ["here", "sure", "ok"]
ENDS = ["done", "end", "bye"]
DIRECTIONS = {"ascending": "in alphabetical order", "descending": "in reverse order"}
SEPARATOR = ","

SPLITS = {"train": range(0, 75), "heldout": range(75, 100)}  # hash of the combination modulo 100
MOST = {"train": 48_976, "heldout": 16_176}  # distinct prompts of each split
MAX_EXTRAS = 3
# How often a prompt has 0, 1, 2, 3 constraints besides the items; more of them make it harder.
EXTRAS_WEIGHTS = [0.10, 0.30, 0.35, 0.25]
# Before the conditioning in tiny_tasks, which moves them to 0.79 and to 0.32 to 0.35.
CHOSEN_RATE, REJECTED_RATE = 0.78, 0.55


def tiny_tasks(split, n, seed=0):
    """`n` records (see the module docstring) of `split`, "train" or "heldout", as a list of dicts.

    The same arguments give the same records, and a smaller `n` gives their beginning. The prompts of a call
    are distinct, and the splits share no combination, whatever `n` and `seed`. Raises ValueError for an
    unknown split, and for an `n` that is negative or larger than MOST[split].
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use 'train' or 'heldout'")
    if not 0 <= n <= MOST[split]:
        raise ValueError(
            f"the {split} split has {MOST[split]} distinct prompts: n must lie between 0 and that, not {n}"
        )
    pool = _pool(split)
    rng = random.Random(f"{split}/{seed}")
    # Drawn by the kinds of constraints, not uniformly: else the forbidden words, which have most variants,
    # would crowd out the rest.
    waiting = {kinds: rng.sample(prompts, len(prompts)) for kinds, prompts in pool.items()}
    siblings = [sum(len(kinds) == k for kinds in pool) for k in range(MAX_EXTRAS + 1)]
    records = []
    while len(records) < n:
        kinds = list(waiting)
        weights = [EXTRAS_WEIGHTS[len(k)] / siblings[len(k)] for k in kinds]
        drawn = rng.choices(kinds, weights)[0]
        prompt, *spec = waiting[drawn].pop()
        if not waiting[drawn]:
            del waiting[drawn]
        constraints = _constraints(*spec)
        # A reference that meets nothing teaches nothing, and a preference wants a difference.
        good = _follow(constraints, CHOSEN_RATE, rng, at_least=1)
        bad = _follow(constraints, REJECTED_RATE, rng, at_most=sum(good) - 1)
        records.append(
            {
                "prompt": prompt,
                "chosen": answer(constraints, good, rng),
                "rejected": answer(constraints, bad, rng),
                "constraints": constraints,
            }
        )
    return records


def answer(constraints, follow, rng):
    """An answer (str) that meets exactly those of `constraints` whose entry in `follow` (list of bool) is
    true.

    The failures are those that a careless writer makes: one item too few or too many, a word of another
    category, the wrong order, lower case, no commas, a missing first or last word, a forbidden word. `rng` is
    a random.Random.
    """
    asked = {c["type"]: c for c in constraints}
    kept = {c["type"] for c, followed in zip(constraints, follow) if followed}
    n, allowed = asked["items"]["n"], asked["items"]["allowed"]
    taboo = asked["forbidden"]["words"] if "forbidden" in asked else []
    picked = [] if "forbidden" in kept else list(taboo)
    if "items" not in kept and rng.random() < 0.2:
        picked.append(rng.choice([w for members in CATEGORIES.values() for w in members if w not in allowed]))
    elif "items" not in kept:
        n += (
            -1 if n > 2 and rng.random() < 0.7 else 1
        )  # two items at least: one alone has no order and no separator
    picked += rng.sample([w for w in allowed if w not in taboo], n - len(picked))
    rng.shuffle(picked)
    if "order" in asked:
        ordered = sorted(picked, reverse=asked["order"]["direction"] == "descending")
        while "order" not in kept and picked == ordered:
            rng.shuffle(picked)
        picked = ordered if "order" in kept else picked
    text = (f" {SEPARATOR} " if "separator" in kept else " ").join(picked)
    if "start_with" in kept:
        text = f"{asked['start_with']['text']} {text}"
    if "end_with" in kept:
        text = f"{text} {asked['end_with']['text']}"
    return text.upper() if "uppercase" in kept else text


def another_answer(record, rng):
    """A second reference (str) for a record of tiny_tasks, made as its `chosen` was and never equal to it."""
    while True:
        text = answer(
            record["constraints"], _follow(record["constraints"], CHOSEN_RATE, rng, at_least=1), rng
        )
        if text != record["chosen"]:
            return text


def words():
    """Every word of the prompts and answers, the answers' also in upper case: a sorted list of distinct
    str."""
    said = [w for ws in CATEGORIES.values() for w in ws] + STARTS + ENDS + [SEPARATOR]
    asked = " ".join(
        [*VERBS, *CATEGORIES, *DIRECTIONS.values(), "without in upper case with commas start end"]
    )
    return sorted({*said, *(w.upper() for w in said), *asked.split(), *map(str, COUNTS)})


def _follow(constraints, rate, rng, at_least=0, at_most=None):
    """Independent coins, one per constraint, tossed again until their sum lies within the bounds."""
    while True:
        follow = [rng.random() < rate for _ in constraints]
        if at_least <= sum(follow) <= (len(follow) if at_most is None else at_most):
            return follow


@functools.cache
def _pool(split):
    """{kinds of constraints besides the items: [(prompt, arguments of _constraints), ...]} in a fixed
    order."""
    pool = {}
    for category, allowed in CATEGORIES.items():
        options = itertools.product(
            [None, *allowed],
            [None, *DIRECTIONS],
            [False, True],
            [False, True],
            [None, *STARTS],
            [None, *ENDS],
        )
        for extras in options:
            kinds = tuple(i for i, option in enumerate(extras) if option)
            if len(kinds) > MAX_EXTRAS:
                continue
            for n in COUNTS:
                # Everything but the verb, which changes nothing that an answer has to do: were it hashed too,
                # nearly every held-out prompt would ask for what a training prompt asks for. A stable hash,
                # unlike hash(): the split is the same in every process and on every machine.
                combination = _prompt("", n, category, *extras)
                if int(hashlib.sha256(combination.encode()).hexdigest(), 16) % 100 not in SPLITS[split]:
                    continue
                for verb in VERBS:
                    prompt = _prompt(verb, n, category, *extras)
                    pool.setdefault(kinds, []).append((prompt, n, category, *extras))
    return pool


def _prompt(verb, n, category, forbidden, direction, upper, commas, start, end):
    clauses = [
        f"{verb} {n} {category}",
        forbidden and f"without {forbidden}",
        direction and DIRECTIONS[direction],
        upper and "in upper case",
        commas and "with commas",
        start and f"start with {start}",
        end and f"end with {end}",
    ]
    return " , ".join(clause for clause in clauses if clause)


def _constraints(n, category, forbidden, direction, upper, commas, start, end):
    ignore = [word for word in (start, end) if word]
    constraints = [
        {"type": "items", "n": n, "allowed": list(CATEGORIES[category]), "ignore": ignore},
        forbidden and {"type": "forbidden", "words": [forbidden]},
        direction and {"type": "order", "direction": direction, "ignore": ignore},
        upper and {"type": "uppercase"},
        commas and {"type": "separator", "text": SEPARATOR, "ignore": ignore},
        start and {"type": "start_with", "text": start},
        end and {"type": "end_with", "text": end},
    ]
    return [c for c in constraints if c]
