"""reward.py against IFEval's own checkers, against hacks of every constraint, and against cases worked by
hand."""

import importlib
import random

import pytest

import reward
from data import UserError, chat_tasks, floor, tiny_tasks
from data import constraints as checks
from data.words import on_topic, stem
from engine import measures

tasks = importlib.import_module("data.chat_tasks")  # the package has a function of that name

ASK = "Write one short sentence about bees."
GOOD = "Bees turn sweet nectar into honey."


def earn(text, constraints, prompt=ASK, **columns):
    columns = {key: [value] for key, value in columns.items()}
    return reward.verifier([prompt], [text], [constraints], **columns)[0]


# ------------------------------------------------------------------------------------------- IFEval as oracle


def ifeval_cases():
    """(our constraint, IFEval's id, IFEval's arguments); sentences apart, which need a download."""
    cases = [
        ({"type": "uppercase"}, "change_case:english_capital", {}),
        ({"type": "lowercase"}, "change_case:english_lowercase", {}),
        ({"type": "no_comma"}, "punctuation:no_comma", {}),
        ({"type": "quotes"}, "startend:quotation", {}),
        ({"type": "json"}, "detectable_format:json_format", {}),
        ({"type": "title"}, "detectable_format:title", {}),
        ({"type": "title", "first": True}, "detectable_format:title", {}),
        ({"type": "json", "keys": ["topic", "fact"]}, "detectable_format:json_format", {}),
        (
            {"type": "placeholders", "n": 1, "first": True},
            "detectable_content:number_placeholders",
            {"num_placeholders": 1},
        ),
    ]
    for n in range(5):
        cases += [
            ({"type": "bullets", "n": n}, "detectable_format:number_bullet_lists", {"num_bullets": n}),
            ({"type": "paragraphs", "n": n}, "length_constraints:number_paragraphs", {"num_paragraphs": n}),
            (
                {"type": "placeholders", "n": n},
                "detectable_content:number_placeholders",
                {"num_placeholders": n},
            ),
        ]
        for relation in ("at least", "less than"):
            cases += [
                (
                    {"type": "words", "relation": relation, "n": 5 * n},
                    "length_constraints:number_words",
                    {"relation": relation, "num_words": 5 * n},
                ),
                (
                    {"type": "letter_frequency", "letter": "E", "relation": relation, "n": n},
                    "keywords:letter_frequency",
                    {"letter": "E", "let_relation": relation, "let_frequency": n},
                ),
                (
                    {"type": "capital_words", "relation": relation, "n": n},
                    "change_case:capital_word_frequency",
                    {"capital_relation": relation, "capital_frequency": n},
                ),
            ]
    for marker in ("P.S.", "P.P.S"):
        cases.append(
            (
                {"type": "postscript", "marker": marker},
                "detectable_content:postscript",
                {"postscript_marker": marker},
            )
        )
    for words in (["bees"], ["honey", "hive"], ["the"]):
        cases += [
            ({"type": "keywords", "words": words}, "keywords:existence", {"keywords": words}),
            ({"type": "forbidden", "words": words}, "keywords:forbidden_words", {"forbidden_words": words}),
        ]
    for phrase in ("That is all.", " honey ", "Is there anything else?"):
        cases.append(({"type": "end_with", "text": phrase}, "startend:end_checker", {"end_phrase": phrase}))
    return cases


EDGES = [
    "",
    " ",
    ".",
    '"',
    '""',
    '" "',
    "{}",
    "null",
    '```json\n{"a": 1}\n```',
    "``` [1] ```",
    "{'a': 1}",
    "* a\n* b",
    "*a\n** b\n-c",
    "- a\n  - b\n---\n",
    "*** a *** b ***",
    "a***b",
    "a *** *** b",
    "***",
    "<<>>",
    "<< >>",
    "<<a>> b>>",
    "<<a\nb>>",
    "[a] [b\nc] []",
    "P.S. x",
    "p. s. x",
    "P.P.S. y",
    "p.p.s",
    "PS: x",
    "ABC 123",
    "123",
    "É È",
    "a_b c-d",
    "NASA and the U.S. made A-B test I",
    "THEBEES behive",
    "the-bees",
    "Bees, bees",
    'ends that is all." ',
    "''honey'",
    "xhoneyz and hives",
    "honeys and hives_",
    "ho-ney",
    "é e",
    "I A",
    "Bees make honey. <<Bees>>",
    "Bees make honey in the hive, dear [name].",
    '"Bees make honey."',
    '{"topic": "bees", "fact": "Bees make honey."}',
]


def sample_texts():
    texts = list(EDGES)
    for record in chat_tasks("train", 150, seed=1):
        texts += [record["chosen"], record["rejected"]]
    rng = random.Random(0)
    for text in texts[len(EDGES) : len(EDGES) + 100]:
        cut = rng.randrange(len(text))
        texts += [
            text.upper(),
            text.lower(),
            text[:cut],
            text[cut:],
            text[:cut] + rng.choice(EDGES) + text[cut:],
            text * 2,
        ]
    return texts


def test_checks_decide_as_ifeval(monkeypatch):
    pytest.importorskip("lm_eval.tasks.ifeval.instructions_registry")
    from lm_eval.tasks.ifeval import instructions, instructions_util
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
    from nltk import word_tokenize

    monkeypatch.setattr(
        instructions.langdetect, "detect", lambda text: "en"
    )  # ours has no language detection
    # without punkt the tokeniser works line by line
    monkeypatch.setattr(
        instructions_util.nltk, "word_tokenize", lambda text: word_tokenize(text, preserve_line=True)
    )
    texts, both, stricter = sample_texts(), set(), set()
    for constraint, name, arguments in ifeval_cases():
        oracle = INSTRUCTION_DICT[name](name)
        oracle.build_description(**arguments)
        kind, may_be_stricter = constraint["type"], is_stricter(constraint)
        for text in texts:
            ours, theirs = (
                checks.constraint_results(text, [constraint])[0],
                bool(oracle.check_following(text)),
            )
            assert ours == theirs or (may_be_stricter and theirs), (constraint, text)
            both.add((kind, ours))
            stricter |= {kind} if ours != theirs else set()
    types = {constraint["type"] for constraint, _, _ in ifeval_cases()}
    # each was seen to pass and fail, and each line of the table to make a difference
    assert len(types) >= 14 and both == {(t, ok) for t in types for ok in (True, False)}
    assert stricter == {constraint["type"] for constraint, _, _ in ifeval_cases() if is_stricter(constraint)}


def is_stricter(constraint):
    """Where an answer that IFEval lets pass may fail here: the table at the head of data/constraints.py."""
    if constraint["type"] in ("capital_words", "letter_frequency"):
        return (
            constraint["relation"]
            == {"capital_words": "at least", "letter_frequency": "less than"}[constraint["type"]]
        )
    return constraint["type"] in ("keywords", "forbidden") or bool({"keys", "first"} & set(constraint))


@pytest.mark.parametrize(
    "text, count",
    [
        ("", 0),
        ("...", 0),
        ("One.", 1),
        ("no end", 1),
        ("One. two! Three?", 3),
        ('He said "Go." Then left.', 2),
        ("Dr. Smith met J. Doe.", 1),
        ("It costs 3.5 dollars.", 1),
        ("Bees dance, e.g. in May. Yes.", 2),
        ("1. Wash it.\n2. Eat it.", 2),
        ("Really?! Wow...", 2),
        ("It is hot. P.S. Drink.", 2),
        ("I live in 2020. It is fine.", 2),
    ],
)
def test_sentences(text, count):
    assert len(checks.sentences(text)) == count


def test_tiny_checks():
    items = {"type": "items", "n": 2, "allowed": ["ant", "fox"], "ignore": ["done"]}
    order = {"type": "order", "direction": "ascending", "ignore": ["done"]}
    comma = {"type": "separator", "text": ",", "ignore": ["done"]}
    cases = {
        "ant , fox done": (1, 1, 1),
        "FOX ANT DONE": (1, 0, 0),
        "ant fox": (1, 1, 0),
        "ant": (0, 0, 1),
        "ant , ant": (0, 1, 1),
        "ant , cat": (0, 1, 1),
        "ant , fox ,": (1, 1, 0),
        ", ant fox": (1, 1, 0),
        "ant , , fox": (1, 1, 0),
        "": (0, 0, 0),
        "ant , fox , ant": (0, 0, 1),
    }
    for text, wanted in cases.items():
        assert checks.constraint_results(text, [items, order, comma]) == [bool(w) for w in wanted], text
    down = {"type": "order", "direction": "descending"}
    assert checks.constraint_results("fox ant", [down]) == [True]
    assert checks.constraint_results("ant and fox", [{"type": "separator", "text": "and"}]) == [True]
    assert checks.constraint_results('"I think so."', [{"type": "start_with", "text": "I think"}]) == [True]


@pytest.mark.parametrize(
    "constraint, word",
    [
        ({"type": "rhyme"}, "rhyme"),
        ({}, "None"),
        ("lowercase", "lowercase"),
        ({"type": ["words"]}, "words"),
        ({"type": "words", "n": 3}, "relation"),
        ({"type": "words", "relation": "at most", "n": 3}, "at most"),
        ({"type": "bullets", "n": -1}, "n"),
        ({"type": "bullets", "n": True}, "n"),
        ({"type": "bullets", "n": "2"}, "n"),
        ({"type": "letter_frequency", "letter": "ab", "relation": "at least", "n": 1}, "letter"),
        ({"type": "keywords", "words": "bees"}, "words"),
        ({"type": "keywords", "words": []}, "words"),
        ({"type": "end_with", "text": " "}, "text"),
        ({"type": "order", "direction": "up"}, "direction"),
        ({"type": "separator", "text": ",", "ignore": "done"}, "ignore"),
    ],
)
def test_wrong_constraints_are_named(constraint, word):
    with pytest.raises(UserError) as error:
        checks.constraint_results("text", [constraint])
    assert word in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------ hacks

HACKS = [  # each meets the letter of its constraint
    (
        {"type": "lowercase"},
        ["a", "ok", "bees bees bees bees", "write one short sentence about bees", "e e e e e"],
    ),
    (
        {"type": "uppercase"},
        ["A", "BEES", "BEES BEES BEES BEES", "WRITE ONE SHORT SENTENCE ABOUT BEES.", "A B C D E"],
    ),
    ({"type": "no_comma"}, ["", " ", ".", "...", "bees", ASK, "honey bees honey bees honey bees honey bees"]),
    ({"type": "quotes"}, ['""', '" "', '"."', '"bees"', f'"{ASK}"', '"bees bees bees bees bees"']),
    (
        {"type": "json"},
        [
            "{}",
            "[]",
            "null",
            "1",
            '"bees"',
            '{"a": "b", "c": "d"}',
            '["bees", "bees", "bees", "bees"]',
            f'{{"a": "{ASK}"}}',
        ],
    ),
    (
        {"type": "title"},
        ["<<x>>", "<<.>> bees make honey daily", "<<Bees Make Sweet Honey>>", f"<<Bees>> {ASK}"],
    ),
    ({"type": "words", "relation": "less than", "n": 9}, ["", "x", "bees", "bees bees bees bees", ASK]),
    (
        {"type": "words", "relation": "at least", "n": 8},
        ["bees " * 8, "a b c d e f g h", "bees make honey " * 3, "Bees make honey. " * 3, ASK + " " + ASK],
    ),
    (
        {"type": "sentences", "relation": "at least", "n": 3},
        ["Aa. Bb. Cc.", "Bees. Honey. Hive. Wax.", "Bees fly. " * 3],
    ),
    ({"type": "sentences", "relation": "less than", "n": 3}, ["", "!", "Bees!", ASK]),
    (
        {"type": "bullets", "n": 3},
        [
            "* \n* \n* ",
            "* a\n* b\n* c",
            "-\n-\n-\nBees make sweet honey",
            "* bees\n* bees\n* bees",
            "---\n---\n---\n" + GOOD,
            "* Bees fly far.\n* Bees fly far.\n* Bees fly far.",
        ],
    ),
    (
        {"type": "paragraphs", "n": 2},
        [".\n***\n.", GOOD + "\n***\n.", f"{GOOD}\n***\n{GOOD}", f"{ASK}\n***\n{ASK}"],
    ),
    ({"type": "start_with", "text": "I think that it is"}, ["I think that it is", "i think that it is."]),
    (
        {"type": "end_with", "text": "Is there anything else?"},
        [
            "Is there anything else?",
            "Ok. Is there anything else?",
            "Is there anything else? Is there anything else?",
        ],
    ),
    (
        {"type": "keywords", "words": ["honey", "hive"]},
        ["honey hive", "honey hive honey hive honey hive", "hive honey."],
    ),
    ({"type": "forbidden", "words": ["sting"]}, ["", "no", "bees bees bees bees", ASK]),
    (
        {"type": "letter_frequency", "letter": "e", "relation": "at least", "n": 5},
        ["eeeee", "e e e e e bees", "beeeee make some honey", "bees bees bees bees"],
    ),
    (
        {"type": "letter_frequency", "letter": "z", "relation": "less than", "n": 1},
        ["", "bees", "bee bee bee bee"],
    ),
    (
        {"type": "postscript", "marker": "P.S."},
        ["P.S.", "P.S. P.S. P.S. P.S.", GOOD + " P.S.", f"P.S. {GOOD}", f"{GOOD} P.S. {GOOD}"],
    ),
    (
        {"type": "placeholders", "n": 2},
        [
            "[][]",
            GOOD + " [] []",
            "[a] [b] bees fly far home",
            "[name] [place] [food] [date]",
            "[bees] [bees] [bees] [bees]",
        ],
    ),
    ({"type": "capital_words", "relation": "at least", "n": 3}, ["BEES BEES BEES BEES", ASK.upper()]),
    ({"type": "items", "n": 1, "allowed": ["bees"]}, ["bees"]),
    ({"type": "order", "direction": "ascending"}, ["bees bees bees bees", "a a a a"]),
    (
        {"type": "short", "most": 9, "sentences": 2},
        ["", "bees", "bees bees bees bees", ASK, "Bees buzz. Bees."],
    ),
    ({"type": "separator", "text": ","}, ["bees , bees , bees , bees", "a , b , c , d"]),
]


@pytest.mark.parametrize("constraint, answers", HACKS, ids=[c["type"] for c, _ in HACKS])
def test_a_hack_earns_nothing(constraint, answers):
    for text in answers:
        assert checks.constraint_results(text, [constraint]) == [True], text  # else it would prove nothing
        assert earn(text, [constraint], min_words=4) == 0.0, text


def test_hacks_cover_every_check():
    assert {c["type"] for c, _ in HACKS} == set(checks.CHECKS)


ABOUT = next(topic["about"] for topic in tasks.TOPICS if topic["topic"] == "bees")


@pytest.mark.parametrize(
    "constraint, hacks, honest",
    [
        (
            {"type": "json", "keys": ["topic", "fact"]},
            [f'"{GOOD}"', f'{{"a": "{GOOD}"}}', f'["{GOOD}"]', f'{{"topic": "", "fact": "{GOOD}"}}'],
            f'{{"topic": "bees", "fact": "{GOOD}"}}',
        ),
        (
            {"type": "keywords", "words": ["nectar", "honey"]},
            ["Bees turn sweet nectar into xhoneyz.", "Bees turn xnectar in hives into honey."],
            "Bees turn sweet nectars into honey.",
        ),
        (
            {"type": "forbidden", "words": ["honey"]},
            [
                f"Bees turn sweet nectar into {word}."
                for word in (
                    "honeys",
                    "honey_",
                    "_honey",
                    "hóney",
                    "ho-ney",
                    "ho\u200bney",
                    "honey's taste",
                    "honey2",
                )
            ],
            "Bees turn sweet nectar into wax.",
        ),
        ({"type": "title", "first": True}, [f"{GOOD} <<Bees>>", f"{GOOD}\n<<Bees>>"], f"<<Bees>>\n{GOOD}"),
        (
            {"type": "placeholders", "n": 1, "first": True},
            [f"{GOOD} Bye [name]!"],
            f"Hello dear [name]! {GOOD}",
        ),
        (
            {"type": "short", "most": 30, "sentences": 1},
            [
                f"{GOOD} They fly far. They dance a lot. They sting.",
                f"{GOOD}\nThey fly far",
                " ".join(["Bees turn nectar of many bright flowers into honey"] * 4),
            ],
            GOOD,
        ),
        (
            {"type": "capital_words", "relation": "at least", "n": 2},
            ["I think A bee turns sweet nectar into honey."],
            "BEES turn sweet NECTAR into honey.",
        ),
        (
            {"type": "letter_frequency", "letter": "e", "relation": "less than", "n": 2},
            ["Bees turn nectar into sweet honey.", "Bés turn néctar into honéy."],
            "A hive of bugs is full of wax from this busy wing.",
        ),
    ],
)
def test_the_letter_of_a_constraint_is_not_its_meaning(constraint, hacks, honest):
    """Each of these once earned what an honest answer earns: JSON without the keys that were asked for, a
    word hidden in another, a forbidden one with an ending, a title at the end, four sentences for one, "I"
    and "A" in capitals."""
    for text in hacks:
        assert checks.constraint_results(text, [constraint]) == [False], text
    assert checks.constraint_results(honest, [constraint]) == [True]


def test_an_answer_says_something_of_its_topic():
    """One text for every topic, with the topic's name put in, once earned 1.0 on 99 % of the prompts."""
    for text in (
        "I like bees very much.",
        "Bees are very important to many people in the world.",
        "I think that bees and the water of a day in the park are good for people.",
        "<<Bees and Honey>> This is a thing that many people like.",
        "Bees and plane egg sun planet vegetable mammal bones grow by a nectar.",
        "<<Bees>> Hello [name]! I like them.",
    ):
        assert checks.hack(ASK, text, 4, (), ABOUT) == "off-topic", text
    keywords = [{"type": "keywords", "words": ["nectar", "flowers"]}]  # the prompt's own words prove nothing
    assert (
        checks.hack(ASK, "I like bees and nectar and flowers very much.", 4, keywords, ABOUT) == "off-topic"
    )
    assert checks.hack(ASK, "Bees like nectar and the queen and flowers.", 4, keywords, ABOUT) is None
    for text in (
        "The of bees and nectar in a hive.",
        "Bees and honey of and nectar in hive.",
        "Bees collect nectar from.",
    ):
        assert checks.hack(ASK, text, 4, (), ABOUT) == "salad", text
    assert checks.hack(ASK, "Bees turn nectar into h\u043eney.", 4, (), ABOUT) == "disguised"  # a Cyrillic o
    for text in (GOOD, "A bee is an insect with wings.", "Bees are vital because they pollinate our crops."):
        assert checks.hack(ASK, text, 4, (), ABOUT) is None, text


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_constant_answers_earn_next_to_nothing(split):
    """ "I like {topic} very much." earned 0.32 of the chat tasks, and an answer in all forms at once 0.47."""
    records = chat_tasks(split, 1000, seed=1)
    best = floor.no_skill_floor(records, reward.verifier)
    assert 0 < best.mean < 0.03 and best.mean == sum(best.rewards) / 1000
    columns = {key: [r[key] for r in records] for key in ("constraints", "min_words", "about")}
    prompts = [r["prompt"] for r in records]
    for texts in floor.constant_templates(records).values():
        assert sum(reward.verifier(prompts, texts, **columns)) / 1000 <= best.mean
    paid = reward.verifier(prompts, [r["chosen"] for r in records], **columns)
    assert 0.7 < sum(paid) / 1000 < 0.85


def test_no_text_is_on_topic_for_more_than_a_fifth_of_the_topics():
    """A word weighs 1 for all topics together, so the weights alone set the bound: here against the greediest
    text."""
    chosen, most = [], 0
    candidates = sorted({w for topic in tasks.TOPICS for w in topic["about"]["words"]})[::7]
    for _ in range(8):
        counts = {}
        for word in candidates:
            text = " ".join([*chosen, word])
            abouts = [topic["about"] for topic in tasks.TOPICS]
            counts[word] = sum(on_topic(f"{about['names'][0]} {text}", about) for about in abouts)
        chosen.append(max(counts, key=counts.get))
        most = max(most, *counts.values())
    assert 5 < most <= 12 == len(tasks.TOPICS) / 5


def test_the_floor_of_other_records():
    tiny = floor.no_skill_floor(tiny_tasks("heldout", 500), reward.verifier)
    assert tiny.template.startswith("{") and 0 < tiny.mean < 0.06
    chats = [
        {"prompt": [{"role": "user", "content": ASK}], "constraints": [], "about": ["bee"]},
        {"prompt": "Why?"},
    ]
    answers = floor.constant_templates(chats)
    assert answers["I like {topic} very much."] == ["I like bees very much.", "I like it very much."]
    assert "{2 items}" not in answers  # there are none to name
    best = floor.no_skill_floor(
        chats, lambda prompts, completions, **columns: [len(text) for text in completions]
    )
    assert best.rewards == [float(len(text)) for text in answers[best.template]]
    with pytest.raises(ValueError, match="no records"):
        floor.no_skill_floor([], reward.verifier)


@pytest.mark.parametrize(
    "one, other",
    [("bees", "bee"), ("berries", "berry"), ("leaves", "leaf"), ("baking", "bakes"), ("runs", "running")],
)
def test_stems(one, other):
    assert stem(one) == stem(other)


def test_hack_names_its_reason():
    assert checks.hack(ASK, "") == checks.hack(ASK, "?!") == checks.hack(ASK, "bees", min_words=4) == "empty"
    assert checks.hack(ASK, ASK.lower()) == "echo"
    assert checks.hack(ASK, "Bees buzz. Bees buzz. Bees buzz. Bees buzz.") == "repetition"
    assert checks.hack(ASK, "My answer is fine now.", about=["bee"]) == "off-topic"
    assert checks.hack(ASK, GOOD, min_words=4, about=["bee"]) is None
    assert checks.hack("name 2 animals", "ant fox") is None  # two words are an answer where no more is asked
    asked = "Use the words 'sweet honey' and 'hive'. End with 'That is all for today, my friend.'"
    assert checks.hack(asked, "The hive is full of sweet honey. That is all for today, my friend.", 4) is None
    assert checks.hack("sort ant bear fox wolf in order", "ant bear fox wolf") is None


def test_verifier_reads_messages_and_truncation():
    user, assistant = [{"role": "user", "content": ASK}], [{"role": "assistant", "content": GOOD}]
    assert reward.verifier([user], [assistant], [[{"type": "no_comma"}]]) == [1.0]
    assert earn(GOOD, [{"type": "no_comma"}], truncated=True) == 0.0
    assert earn(GOOD, [{"type": "no_comma"}], truncated=False, other=1) == 1.0
    assert earn(ASK, [], prompt=user) == 0.0


def test_references_that_meet_their_constraints_are_no_hacks():
    for records in (chat_tasks("train", 1500), chat_tasks("heldout", 800), tiny_tasks("train", 800)):
        columns = {
            key: [r[key] for r in records]
            for key in ("constraints", "min_words", "about")
            if key in records[0]
        }
        earned = reward.verifier([r["prompt"] for r in records], [r["chosen"] for r in records], **columns)
        met = [all(checks.constraint_results(r["chosen"], r["constraints"])) for r in records]
        assert earned == [float(ok) for ok in met] and 0.4 < sum(earned) / len(earned) < 0.9


def test_answers_meet_what_they_are_meant_to_meet():
    rng = random.Random(0)
    for kinds in [[kind] for kind in tasks.PHRASES] + [list(pair) for pair in tasks.PAIRS]:
        for topic in rng.sample(tasks.TOPICS, 12):
            constraints = [tasks.make_constraint(rng, kind, topic)[0] for kind in kinds]
            met = [rng.random() < 0.6 for _ in kinds]
            text = tasks.answer(rng, topic, kinds, constraints, met)
            assert checks.constraint_results(text, constraints) == met, (kinds, text)


# --------------------------------------------------------------------------------- user functions and metrics


def bad_raise(prompts, completions, **columns):
    raise KeyError("no\nsuch column")


@pytest.mark.parametrize(
    "function, word",
    [
        (bad_raise, "KeyError"),
        (lambda **k: [1.0], "1 rewards for 2"),
        (lambda **k: None, "NoneType"),
        (lambda **k: [1.0, None], "item 1 is None"),
        (lambda **k: [float("nan"), 1], "item 0 is nan"),
        (lambda **k: [1, float("inf")], "item 1 is inf"),
        (lambda **k: ["1", 1], "item 0 is '1'"),
        (lambda **k: [[1.0, 2.0], [1.0]], "per token"),
        (lambda: [1, 2], "TypeError"),
    ],
)
def test_reward_functions_that_fail(function, word):
    with pytest.raises(UserError) as error:
        reward.checked_rewards(function, ["p", "p"], ["a", "b"], {"constraints": [[], []]})
    assert word in str(error.value) and function.__name__ in str(error.value) and "\n" not in str(error.value)


def test_reward_functions_that_work():
    torch = pytest.importorskip("torch")
    columns = {"constraints": [[{"type": "lowercase"}]] * 2}
    answers = ["bees fly far.", "Bees fly far."]
    assert reward.checked_rewards(reward.verifier, [ASK] * 2, answers, columns) == [1.0, 0.0]
    assert reward.checked_rewards(lambda **k: torch.tensor([1, 2]), [ASK] * 2, answers, {}) == [1.0, 2.0]
    with pytest.raises(UserError, match="unknown type"):
        reward.checked_rewards(reward.verifier, [ASK], ["a"], {"constraints": [[{"type": "rhyme"}]]})


def test_ras_and_nag_by_hand():
    torch = pytest.importorskip("torch")
    a, b = [1.0, 0.0, 0.5, 2.0], [0.0, 1.0, 0.5, 1.0]  # win, loss, tie, win
    for x, y in ((a, b), (torch.tensor(a), torch.tensor(b))):
        assert measures.ras(x, y) == {"win": 0.5, "tie": 0.25, "loss": 0.25}
        assert measures.nag(x, y) == {"signed": 0.25, "indicator": 0.5}
    assert measures.nag([0, 0, 1], [1, 1, 0]) == pytest.approx({"signed": -1 / 3, "indicator": 1 / 3})
    for x, y in (([1.0], [1.0, 2.0]), ([], []), ([float("nan")], [1.0])):
        with pytest.raises(ValueError):
            measures.ras(x, y)
        with pytest.raises(ValueError):
            measures.nag(x, y)


def test_bootstrap_interval():
    values = [1.0] * 30 + [0.0] * 70
    low, high = measures.bootstrap_interval(values)
    assert (low, high) == measures.bootstrap_interval(values)
    normal = 1.96 * (0.3 * 0.7 / 100) ** 0.5  # 0.09
    assert low == pytest.approx(0.3 - normal, abs=0.02) and high == pytest.approx(0.3 + normal, abs=0.02)
    # eight samples of each prompt are no eight prompts
    assert measures.bootstrap_interval([[v] * 8 for v in values]) == (low, high)
    assert measures.bootstrap_interval([1.0]) == (1.0, 1.0)
    for bad in ([], [float("nan")]):
        with pytest.raises(ValueError):
            measures.bootstrap_interval(bad)
