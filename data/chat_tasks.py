"""Verifiable instructions in plain English, in the manner of IFEval, for chat models from 135M parameters on.

    python -m data.chat_tasks        # prints three records of each split

TRL's preference format plus the columns that the verifier reads:

    {"prompt": "Write one short sentence about bees. Use only lowercase letters.",
     "chosen": "honey is made by bees inside the hive.",
     "rejected": "Bees dance to show others where food is.",
     "constraints": [{"type": "lowercase"}, {"type": "short", "most": 30, "sentences": 1}],
     "min_words": 4,                                    # an answer has at least so many words,
     "about": {"names": ["bee", "honey", "hive"],       # one of these among them,
               "words": ["bloom", "crop", "nectar", ...], "topics": [2, 4, 2, ...]}}   # and some of these

A prompt is a topic of chat_topics.json x a task x one or two constraints x their phrasings; every fourth
prompt has two constraints. What the task itself asks for, one short sentence, say, is the last constraint,
`short`. The topics of the two splits are different ones, so that the splits share no prompt and no sentence.
`about` holds the words that belong to the topic, and in how many of the sixty topics each occurs: a text that
fits every topic says nothing of this one. `chosen` is good but not perfect: it meets each constraint besides
`short` with probability 0.8, by itself. `rejected` meets each with probability 0.4, and only such as `chosen`
meets too. Their misses are the ones that people and models make: a comma slips in, a capital stays, one
bullet is missing.
"""

import json
import random
import re
from collections import Counter
from pathlib import Path

from data.constraints import constraint_results
from data.errors import UserError
from data.words import FUNCTION_WORDS, on_topic, stem, words_of


def read_topics():
    """The topics of chat_topics.json, each with its column "about"."""
    topics = json.loads((Path(__file__).parent / "chat_topics.json").read_text(encoding="utf-8"))
    own = []  # of each topic: {stem: word}
    for topic in topics:
        words = [w for w in words_of(" ".join(topic["sentences"])) if len(w) > 2 and w not in FUNCTION_WORDS]
        own.append({stem(w): w for w in words + topic["words"].split() + topic["names"]})
    topics_with = Counter(word for words in own for word in words)
    for topic, words in zip(topics, own):
        telling = sorted((w for w in words if topics_with[w] <= COMMON), key=words.get)
        topic["about"] = {
            "names": topic["names"],
            "words": [words[w] for w in telling],
            "topics": [topics_with[w] for w in telling],
        }
    return topics


COMMON = 12  # a word that more topics have belongs to none
TOPICS = read_topics()
TWO_CONSTRAINTS = 0.25  # share of the prompts
CHOSEN_RATE = 0.8  # probability that `chosen` meets a constraint
REJECTED_RATE = 0.55  # probability that `rejected` meets one that `chosen` meets; about 0.4 in all
MIN_WORDS = 4
SHORT = 30  # words, of a sentence that is still short
# Tasks in a call: each split has about twice as many distinct prompts.
MOST = {"train": 20_000, "heldout": 10_000}

# What is asked, by the number of sentences that the answer has.
ASKS = {
    "one": [
        "Write one short sentence about {}.",
        "Tell me one fact about {} in a single short sentence.",
        "In one short sentence, say something about {}.",
        "Describe {} in one short sentence.",
        "Write a single sentence about {}. Keep it short.",
        "Give me one short, true sentence about {}.",
        "What is one thing to know about {}? Answer in one short sentence.",
        "Write a short sentence about {}.",
    ],
    "few": [
        "Write about {}.",
        "Tell me something about {}.",
        "What do you know about {}?",
        "Describe {} briefly.",
    ],
    "list": [
        "Name some facts about {}.",
        "Give me a short list of facts about {}.",
        "What should I know about {}?",
    ],
}

# type -> (task, phrasings); "{}" is filled with what the constraint asks for.
PHRASES = {
    "lowercase": (
        "one",
        [
            "Use only lowercase letters.",
            "Do not use any capital letters.",
            "Your whole answer must be in lowercase.",
        ],
    ),
    "uppercase": (
        "one",
        [
            "Use only capital letters.",
            "Write everything in capital letters.",
            "Your whole answer must be in ALL CAPS.",
        ],
    ),
    "no_comma": ("one", ["Do not use any commas.", "Avoid commas.", "Your answer must not contain a comma."]),
    "quotes": (
        "one",
        ["Put your whole answer in double quotation marks.", "Wrap the whole answer in double quotes."],
    ),
    "capital_words": ("one", ["Write at least {} in capital letters.", "Put at least {} in ALL CAPS."]),
    "words less than": (
        "one",
        [
            "Use fewer than {} words.",
            "Answer with less than {} words.",
            "Your answer must have fewer than {} words.",
        ],
    ),
    "words at least": (
        "few",
        [
            "Use at least {} words, but no more than two sentences.",
            "Answer in one or two sentences with at least {} words.",
        ],
    ),
    "sentences at least": (
        "few",
        ["Answer with at least {} short sentences.", "Write {} short sentences or more."],
    ),
    "sentences less than": (
        "few",
        ["Answer with fewer than {} short sentences.", "Use less than {} sentences, and keep them short."],
    ),
    "keywords": ("one", ["Use the words {}.", "Include the words {}.", "The words {} must appear."]),
    "forbidden": ("one", ["Do not use the word {}.", "Avoid the word {}.", "The word {} is not allowed."]),
    "letter_frequency": ("one", ["Use the letter {} times.", "Your answer must have the letter {} times."]),
    "start_with": (
        "one",
        ["Begin your answer with {}.", "Start with the words {}.", "Your answer must start with {}."],
    ),
    "end_with": ("one", ["End your answer with the words {}", "Finish with exactly this phrase: {}"]),
    "bullets": (
        "list",
        [
            "Use exactly {} short bullet points that start with '* '.",
            "Answer with a list of exactly {} short bullet points. Each starts with '* '.",
        ],
    ),
    "paragraphs": (
        "few",
        [
            "Write {} paragraphs of one short sentence each and put *** between them.",
            "Use exactly {} paragraphs of one sentence each, with the divider *** between them.",
        ],
    ),
    "title": (
        "one",
        [
            "Put a title in double angular brackets first, such as <<A Title>>.",
            "Begin with a title, wrapped in << and >>.",
        ],
    ),
    "postscript": (
        "one",
        ["Then add a postscript that starts with P.S.", "At the end, add a short P.S. to your answer."],
    ),
    "placeholders": (
        "one",
        [
            "Greet the reader first, with the placeholder [name].",
            "Begin with a greeting that has a placeholder in square brackets, such as [name].",
        ],
    ),
    "json": (
        "one",
        [
            'Answer in JSON with the keys "topic" and "fact".',
            'Give the answer as a JSON object with the keys "topic" and "fact".',
        ],
    ),
}
STARTS = ["I think", "I believe", "Did you know that", "It is true that"]
ENDS = ["That is all.", "I hope this helps.", "Thank you for asking.", "Is there anything else?"]
ASIDES = ["of course", "as you know", "by the way", "for sure"]
COUNT_WORDS = {1: "one word", 2: "two words"}
NUMBERS = {2: "two", 3: "three"}
KEYS = ["topic", "fact"]
# How many sentences a task allows that is not "one short sentence", and how many a constraint adds to one.
SENTENCES = {"words less than": 1, "words at least": 2, "paragraphs": 2}
ADDED_SENTENCES = {"end_with": 1, "placeholders": 1, "postscript": 1}

# What a small model meets now and then comes more often than what it hardly ever does.
EASY = [
    "no_comma",
    "words less than",
    "words at least",
    "sentences at least",
    "sentences less than",
    "forbidden",
    "letter_frequency",
    "capital_words",
    "placeholders",
    "bullets",
]
SINGLES = [kind for kind in PHRASES for _ in range(3 if kind in EASY else 1)]

# Two constraints at once: one of each group, where the one does not decide the other.
CONTENT = ["sentences at least", "sentences less than", "keywords", "forbidden"]
WRAPPING = ["start_with", "end_with", "title", "placeholders"]
SURFACE = ["lowercase", "uppercase", "no_comma", "quotes", "capital_words"]
PAIRS = [
    (a, b)
    for a in CONTENT + WRAPPING + ["bullets", "words less than", "letter_frequency"]
    for b in SURFACE
    if (a, b)
    not in {
        ("start_with", "capital_words"),
        ("end_with", "capital_words"),  # "I" is a capital word
        ("title", "quotes"),
        ("bullets", "quotes"),  # a mark inside the quotes, or before them
        ("words less than", "no_comma"),
        ("letter_frequency", "no_comma"),
    }
]  # an aside adds words


def chat_tasks(split, n, seed=0):
    """`n` records (see the module docstring) of `split`, "train" or "heldout", with distinct prompts: a list
    of dicts.

    The same arguments give the same records, and a smaller `n` gives their beginning. UserError for an
    unknown split and for an `n` outside 0..MOST[split].
    """
    if split not in ("train", "heldout"):
        raise UserError(f"unknown split {split!r}: use 'train' or 'heldout'")
    if not 0 <= n <= MOST[split]:
        raise UserError(
            f"the {split} split gives up to {MOST[split]} tasks: n must lie between 0 and that, not {n}"
        )
    rng = random.Random(f"{split}/{seed}")
    topics = [topic for topic in TOPICS if topic["split"] == split]
    records, seen = [], set()
    while len(records) < n:
        record = make_record(rng, rng.choice(topics))
        if record["prompt"] not in seen:
            seen.add(record["prompt"])
            records.append(record)
    return records


def make_record(rng, topic):
    """One record about `topic` (an entry of chat_topics.json)."""
    kinds = list(rng.choice(PAIRS)) if rng.random() < TWO_CONSTRAINTS else [rng.choice(SINGLES)]
    ask = rng.choice(ASKS[PHRASES[kinds[0]][0]]).format(topic["topic"])
    constraints, phrases = [], []
    for kind in kinds:
        constraint, value = make_constraint(rng, kind, topic)
        constraints.append(constraint)
        phrases.append(rng.choice(PHRASES[kind][1]).format(value))
    limit = short_limit(kinds)
    met = [rng.random() < CHOSEN_RATE for _ in kinds]
    chosen = rejected = answer(rng, topic, kinds, constraints, met)
    for attempt in range(20):
        # after some attempts nothing but a miss can make a difference: the constraint leaves one sentence in
        # one form
        worse = [ok and attempt < 10 and rng.random() < REJECTED_RATE for ok in met]
        rejected = answer(rng, topic, kinds, constraints, worse)
        if rejected != chosen:
            break
    else:  # a miss that only one sentence makes, such as the forbidden word: say more
        rejected = (
            f"{chosen} {rng.choice([s for s in topic['sentences'] if s.lower() not in chosen.lower()])}"
        )
    return {
        "prompt": " ".join([ask, *rng.sample(phrases, len(phrases))]),
        "chosen": chosen,
        "rejected": rejected,
        "constraints": [*constraints, limit],
        "min_words": MIN_WORDS,
        "about": topic["about"],
    }


def short_limit(kinds):
    """The constraint that "one short sentence" or the like states; `kinds`: those of the others."""
    if PHRASES[kinds[0]][0] == "one":
        return {
            "type": "short",
            "most": SHORT,
            "sentences": 1 + sum(ADDED_SENTENCES.get(k, 0) for k in kinds),
        }
    most = {"type": "short", "most": SHORT}
    return most | ({"sentences": SENTENCES[kinds[0]]} if kinds[0] in SENTENCES else {})


def asked(record):
    """The constraints of a record of chat_tasks that answers meet or miss on purpose: all but `short`."""
    return [c for c in record["constraints"] if c["type"] != "short"]


def make_constraint(rng, kind, topic):
    """A constraint that some sentences of `topic` can meet and some can miss, and the text for its phrase's
    "{}"."""
    sentences = topic["sentences"]
    words = {s: [w for w in re.findall(r"\w+", s.lower()) if len(w) >= 4] for s in sentences}
    some = rng.choice(sentences)
    if kind.startswith("words "):
        n = rng.choice([10, 11, 12])
        return {"type": "words", "relation": kind[6:], "n": n}, n
    if kind.startswith("sentences "):
        n = rng.choice([2, 3]) if kind.endswith("least") else 3
        return {"type": "sentences", "relation": kind[10:], "n": n}, NUMBERS[n]
    if kind == "capital_words":
        n = rng.choice([1, 2])
        return {"type": kind, "relation": "at least", "n": n}, COUNT_WORDS[n]
    if kind in ("bullets", "paragraphs"):
        n = rng.choice([2, 3]) if kind == "bullets" else 2
        return {"type": kind, "n": n}, NUMBERS[n]
    if kind == "keywords":
        # a pair that one sentence has and the others do not, and that is not all that it says of the topic
        pairs = [
            [first, second]
            for text in sentences
            for first in words[text]
            for second in words[text]
            if first not in second
            and second not in first
            and sum(meets(s, {"type": kind, "words": [first]}) for s in sentences) == 1
            and on_topic(text, topic["about"], [first, second])
        ]
        pair = rng.choice(pairs)
        return {"type": kind, "words": pair}, f"'{pair[0]}' and '{pair[1]}'"
    if kind == "forbidden":
        # three sentences do without it
        able = [w for w in words[some] if sum(meets(s, {"type": kind, "words": [w]}) for s in sentences) >= 3]
        word = rng.choice(able)
        return {"type": kind, "words": [word]}, f"'{word}'"
    if kind == "letter_frequency":
        counts = {letter: sorted(s.lower().count(letter) for s in sentences) for letter in "aeilnorst"}
        # two sentences on either side of n
        letter, n = rng.choice(
            [(letter, k) for letter, seen in counts.items() for k in range(2, 6) if seen[1] < k <= seen[-2]]
        )
        relation = rng.choice(["at least", "less than"])
        return {"type": kind, "letter": letter, "relation": relation, "n": n}, f"'{letter}' {relation} {n}"
    if kind in ("start_with", "end_with"):
        phrase = rng.choice(STARTS if kind == "start_with" else ENDS)
        return {"type": kind, "text": phrase}, f"'{phrase}'"
    fields = {
        "postscript": {"marker": "P.S."},
        "placeholders": {"n": 1, "first": True},
        "title": {"first": True},
        "json": {"keys": KEYS},
    }
    return {"type": kind, **fields.get(kind, {})}, ""


def answer(rng, topic, kinds, constraints, met):
    """An answer that meets exactly the constraints whose entry in `met` is true; `kinds` are their keys in
    PHRASES."""
    asked = {kind: (c, ok) for kind, c, ok in zip(kinds, constraints, met)}
    failed = {kind for kind, ok in zip(kinds, met) if not ok}
    sentences = choose_sentences(rng, topic["sentences"], asked)
    name = topic["topic"].removeprefix("the ").title()

    if "no_comma" in failed:
        sentences[0] = f"{sentences[0][:-1]}, {rng.choice(ASIDES)}."
    if "capital_words" in asked:
        long_words = sorted({w for w in re.findall(r"\w+", sentences[0]) if len(w) >= 4})
        for word in rng.sample(long_words, asked["capital_words"][0]["n"] - ("capital_words" in failed)):
            sentences[0] = re.sub(rf"\b{word}\b", word.upper(), sentences[0])
    if "start_with" in asked and "start_with" not in failed:
        phrase = asked["start_with"][0]["text"]
        sentences[0] = f"{phrase} {sentences[0][0].lower()}{sentences[0][1:]}"
        if phrase.startswith("Did"):
            sentences[0] = sentences[0][:-1] + "?"

    if "bullets" in asked and not ("bullets" in failed and len(sentences) == asked["bullets"][0]["n"]):
        text = "\n".join(f"* {s}" for s in sentences)
    elif "paragraphs" in asked:
        text = ("\n\n" if "paragraphs" in failed else "\n***\n").join(sentences)
    elif "postscript" in asked:
        text = rng.choice([" ", "\nPS: "] if "postscript" in failed else ["\nP.S. ", " P.S. "]).join(
            sentences
        )
    else:
        text = " ".join(sentences)

    if "end_with" in asked:
        phrase = asked["end_with"][0]["text"]
        text += " " + phrase if "end_with" not in failed else rng.choice(["", " " + phrase[:-1]])
    if "title" in asked:
        good, bad = ["<<{}>>\n", "<<All About {}>>\n"], ["<{}> ", "**{}**\n", "Title: {}\n"]
        text = rng.choice(bad if "title" in failed else good).format(name) + text
    if "placeholders" in asked:
        good, bad = ["Hello [name]! ", "Hi [name]! "], ["Hello there! ", "Dear reader! "]
        text = rng.choice(bad if "placeholders" in failed else good) + text
    if "json" in asked:
        fields = dict(zip(KEYS, (topic["topic"], text)))
        good, bad = (
            json.dumps(fields),
            [str(fields), json.dumps(fields)[:-1], f"topic: {topic['topic']}\nfact: {text}"],
        )
        text = rng.choice(bad) if failed else good

    if "lowercase" in asked and "lowercase" not in failed:
        text = text.lower()
    if "uppercase" in asked and ("uppercase" not in failed or rng.random() < 0.5):
        text = text.upper()
        if "uppercase" in failed:  # one word is forgotten
            word = rng.choice([w for w in re.findall(r"\w+", text) if len(w) > 2])
            text = re.sub(rf"\b{word}\b", word.lower(), text)
    if "quotes" in asked:
        text = rng.choice([text, f'"{text}']) if "quotes" in failed else f'"{text}"'
    return text


def answer_again(record, met, rng):
    """answer() for a record of chat_tasks; `met`: of the constraints that asked() gives."""
    topic = next(topic for topic in TOPICS if topic["about"] == record["about"])
    constraints = asked(record)
    kinds = [
        f"{c['type']} {c['relation']}" if c["type"] in ("words", "sentences") else c["type"]
        for c in constraints
    ]
    return answer(rng, topic, kinds, constraints, met)


def another_answer(record, rng):
    """A second reference (str) for a record of chat_tasks, made as its `chosen` was and never equal to it.

    Where one sentence in one form is all that meets a constraint, it is one that misses it.
    """
    for rate in [CHOSEN_RATE] * 20 + [0.0] * 20:
        text = answer_again(record, [rng.random() < rate for _ in asked(record)], rng)
        if text != record["chosen"]:
            return text
    sentences = next(topic["sentences"] for topic in TOPICS if topic["about"] == record["about"])
    return f"{record['chosen']} {rng.choice([s for s in sentences if s.lower() not in text.lower()])}"


def choose_sentences(rng, bank, asked):
    """As many sentences of `bank`, and such ones, as meet or miss the constraints that sentences alone
    decide."""
    count, ok_by_words = 1, []
    for kind, (c, ok) in asked.items():
        if kind == "sentences at least":
            count = c["n"] if ok else c["n"] - 1
        elif kind == "sentences less than":
            count = rng.choice([1, 2]) if ok else c["n"]
        elif kind == "bullets":
            count = c["n"] if ok else rng.choice([c["n"] - 1, c["n"], c["n"] + 1][: 5 - c["n"]])
        elif kind in ("words at least", "words less than"):
            count = 2 if ok == (kind == "words at least") else 1
        elif kind in ("paragraphs", "postscript"):
            count = 2
        if c["type"] in ("words", "keywords", "forbidden", "letter_frequency"):
            ok_by_words.append((c, ok))
    while True:
        sentences = rng.sample(bank, count)
        if all(meets(" ".join(sentences), c) == ok for c, ok in ok_by_words):
            return sentences


def meets(text, c):
    """Whether `text` meets a constraint."""
    return constraint_results(text, [c])[0]


if __name__ == "__main__":
    for split_ in ("train", "heldout"):
        for record_ in chat_tasks(split_, 3):
            print(split_, record_)
