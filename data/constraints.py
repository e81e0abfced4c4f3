"""The constraints of the built-in tasks: checks in IFEval's manner, and a guard against no-answers.

    constraint_results("bees turn nectar into honey.", [{"type": "lowercase"}])          # [True]
    hack("Write one sentence about bees.", "bees bees bees")                              # "repetition"

Checks that IFEval has too (Zhou et al., arXiv 2311.07911) decide as Google's code, which the tests compare
them with, but for what this table says. Where it says stricter, an answer that IFEval lets pass may fail
here; nowhere is it the other way round.

    type              IFEval's code                  here
    upper, lowercase  langdetect says English, too   the letters alone decide
    sentences         by nltk's punkt, a download    by data/words.py
    capital_words     by nltk's tokeniser            by a regular expression; stricter for "at least": of two
                                                     letters or more, so that "I" and "A" are none
    keywords          a regular expression, anywhere stricter: plain text, as a word of its own, with the
                                                     ending of a plural or a verb at most
    forbidden         a regular expression, the word stricter: plain text, nor with such an ending, or with
                                                     "_", a digit, a hyphen or an accent
    letter_frequency  as typed                       stricter for "less than": "é" is an "e"
    postscript        a regular expression           plain text; and hack() wants words around it
    json              any JSON                       stricter where "keys" is given: an object that has them
                                                     all, each with a text of its own
    title             anywhere                       stricter where "first" is true: before everything
    placeholders      anywhere                       stricter where "first" is true: after five words at most

Not in IFEval: `start_with`, the three checks of the tiny vocabulary (items, order, separator), and `short`,
which checks what "one short sentence" asks for: at most so many sentences (a line is one at least), none too
long.

What earns a reward and should not, as far as is known: what is false; a true sentence about the topic with
its words shuffled, three times in four; a list of words that few topics share, with function words between
them, for the topics that have them (a text that is the same for all topics: for a fifth of them at the most,
and for 8 of the 12 that are held out if it was made with their word lists in hand); filler sentences after a
good one where several are asked for, and a good postscript after a filler; a forbidden word that is spelled
wrongly ("honeyz").
"""

import json
import re
from collections import Counter

from data.errors import UserError
from data.words import FUNCTION_WORDS, has_word, is_disguised, is_salad, on_topic, plain, sentences, words_of


def compare(count, constraint):
    """IFEval's two relations."""
    return count >= constraint["n"] if constraint["relation"] == "at least" else count < constraint["n"]


def items(text, constraint):
    """The words of a tiny-vocabulary answer that are neither commas nor ignored."""
    return [w for w in text.lower().split() if w != "," and w not in constraint.get("ignore", ())]


# ----------------------------------------------------------------------------------------------------- checks


def check_items(text, c):
    found = items(text, c)
    return len(found) == c["n"] == len(set(found)) and set(found) <= set(c["allowed"])


def check_order(text, c):
    found = items(text, c)
    return len(found) >= 2 and found == sorted(found, reverse=c["direction"] == "descending")


def check_separator(text, c):
    separator = c["text"].lower()
    words = [w for w in text.lower().split() if w == separator or w not in c.get("ignore", ())]
    marks = {separator, ","}  # a comma is never an item, also where the separator is another word
    return len(words) % 2 == 1 and all(
        (w == separator) if i % 2 else (w not in marks) for i, w in enumerate(words)
    )


def check_bullets(text, c):
    stars = re.findall(r"^\s*\*[^\*].*$", text, flags=re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, flags=re.MULTILINE)
    return len(stars) + len(dashes) == c["n"]


def check_paragraphs(text, c):
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    # a divider may open or close the answer; an empty paragraph in the middle fails
    count = len(parts) - sum(not part for part in {0: parts[0], len(parts) - 1: parts[-1]}.values())
    return all(parts[1:-1]) and count == c["n"]


def parsed_json(text):
    """The value that an answer in JSON holds, in a code fence or not; ValueError if it is none."""
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        return json.loads(text.removesuffix("```").strip())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def check_json(text, c):
    try:
        value = parsed_json(text)
    except ValueError:
        return False
    if not c.get("keys"):
        return True
    if not isinstance(value, dict) or not set(c["keys"]) <= set(value):
        return False
    texts = [value[key] for key in c["keys"]]
    return all(isinstance(t, str) and t.strip() for t in texts) and len(set(texts)) == len(texts)


def check_title(text, c):
    if c.get("first") and not re.match(r"[\s\"'“*_#`]*<<", text):
        return False
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


def check_placeholders(text, c):
    found = list(re.finditer(r"\[.*?\]", text))
    if c.get("first") and found and len(words_of(text[: found[0].start()])) > GREETING:
        return False
    return len(found) >= c["n"]


def check_postscript(text, c):
    pattern = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}.get(
        c["marker"], re.escape(c["marker"].lower())
    )
    return re.search(pattern, text.lower()) is not None


def check_capital_words(text, c):
    """Words whose letters are all capital; a hyphenated word is one word, as in IFEval."""
    words = [w for w in re.findall(r"\w+(?:[-./]\w+)*", text) if w.isupper()]
    if c["relation"] == "at least":  # "I" and "A" are written so anyway
        words = [w for w in words if sum(ch.isalpha() for ch in w) >= 2]
    return compare(len(words), c)


def check_letters(text, c):
    text = plain(text) if c["relation"] == "less than" else text
    return compare(text.lower().count(c["letter"].lower()), c)


def check_forbidden(text, c):
    text = plain(text)
    # "ho-ney" and "ho_ney" read as "honey"
    joined = re.sub(r"(?<=[^\W\d_])[-‐‑_*.·]+(?=[^\W\d_])", "", text)
    return not any(has_word(text, plain(word)) or has_word(joined, plain(word)) for word in c["words"])


def check_short(text, c):
    pieces = [s for line in text.splitlines() if not is_wrapping(line) for s in sentences(line)]
    if c.get("sentences") and len(pieces) > c["sentences"]:
        return False
    return all(len(re.findall(r"\w+", piece)) <= c["most"] for piece in pieces)


def is_wrapping(line):
    """A line that is a title or the fence of a code block."""
    return re.fullmatch(r"\s*(<<.*>>|```\w*)\s*", line) is not None


def bare(text):
    """What IFEval's end checker compares: no outer white space or double quotes, lower case."""
    return text.strip().strip('"').lower()


CHECKS = {
    "items": check_items,
    "order": check_order,
    "separator": check_separator,
    "uppercase": lambda text, c: text.isupper(),
    "lowercase": lambda text, c: text.islower(),
    "no_comma": lambda text, c: "," not in text,
    "words": lambda text, c: compare(len(re.findall(r"\w+", text)), c),
    "sentences": lambda text, c: compare(len(sentences(text)), c),
    "bullets": check_bullets,
    "paragraphs": check_paragraphs,
    "start_with": lambda text, c: bare(text).startswith(c["text"].strip().lower()),
    "end_with": lambda text, c: bare(text).endswith(c["text"].strip().lower()),
    "keywords": lambda text, c: all(has_word(text, word) for word in c["words"]),
    "forbidden": check_forbidden,
    "quotes": lambda text, c: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
    "json": check_json,
    "title": check_title,
    "letter_frequency": check_letters,
    "postscript": check_postscript,
    "placeholders": check_placeholders,
    "capital_words": check_capital_words,
    "short": check_short,
}
GREETING = (
    5  # words that may stand before a placeholder that is asked for first: "Hello and welcome, dear [name]"
)

# The fields each type needs, and those that may be left out.
FIELDS = {
    "items": ("n", "allowed"),
    "order": ("direction",),
    "separator": ("text",),
    "words": ("relation", "n"),
    "sentences": ("relation", "n"),
    "bullets": ("n",),
    "paragraphs": ("n",),
    "start_with": ("text",),
    "end_with": ("text",),
    "keywords": ("words",),
    "forbidden": ("words",),
    "letter_frequency": ("letter", "relation", "n"),
    "postscript": ("marker",),
    "placeholders": ("n",),
    "capital_words": ("relation", "n"),
    "short": ("most",),
}
OPTIONAL = ("ignore", "keys", "first", "sentences")


def is_words(value):
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(w, str) and w.strip() for w in value)
    )


VALID = {
    "n": ("a whole number >= 0", lambda v: type(v) is int and v >= 0),
    "relation": ('"at least" or "less than"', lambda v: v in ("at least", "less than")),
    "direction": ('"ascending" or "descending"', lambda v: v in ("ascending", "descending")),
    "letter": ("one letter a-z", lambda v: isinstance(v, str) and re.fullmatch("[A-Za-z]", v)),
    "text": ("a text", lambda v: isinstance(v, str) and v.strip()),
    "marker": ("a text", lambda v: isinstance(v, str) and v.strip()),
    "words": ("a list of words", is_words),
    "allowed": ("a list of words", is_words),
    "most": ("a whole number >= 1", lambda v: type(v) is int and v >= 1),
    "sentences": ("a whole number >= 1", lambda v: type(v) is int and v >= 1),
    "keys": ("a list of words", is_words),
    "first": ("true or false", lambda v: type(v) is bool),
    "ignore": ("a list of words", lambda v: not v or is_words(v)),
}


def constraint_results(text, constraints):
    """Whether `text` meets each of `constraints` -> list[bool]; UserError names an unknown type or a bad
    field."""
    if not isinstance(constraints, (list, tuple)):
        raise UserError(f'constraints must be a list of objects with a "type", not {constraints!r}')
    results = []
    for c in constraints:
        kind = c.get("type") if isinstance(c, dict) else None
        if not isinstance(kind, str) or kind not in CHECKS:
            raise UserError(f"constraint {c!r}: unknown type {kind!r}; known types: {', '.join(CHECKS)}")
        fields = FIELDS.get(kind, ())
        for field in (*fields, *(field for field in OPTIONAL if c.get(field) is not None)):
            wanted, valid = VALID[field]
            if field not in c or not valid(c[field]):
                raise UserError(
                    f"constraint {kind!r}: field {field!r} must be {wanted}, not {c.get(field)!r}"
                )
        results.append(bool(CHECKS[kind](text, c)))
    return results


# ------------------------------------------------------------------------------------------------------ hacks


def is_empty(text, rest, min_words):
    """No answer, or marks without content. `rest` is the text without the phrases that the prompt demands."""
    words = [w for w in words_of(rest) if re.search(r"[^\W\d_]", w)]
    stray = re.findall(r"\b[b-hj-z]\b(?!\.)", text.lower())
    postscript = re.search(r"(?is)^(.*?)\bp\.\s?(?:p\.\s?)?s\b\.?(.*)$", text)
    # each bullet, each paragraph, and the text before and after P.S. is a small answer, of two words where
    # prose is asked
    parts = [
        *re.findall(r"(?m)^[ \t]*[-*](?:[ \t]+(.*))?$", text),
        *filter(str.strip, text.split("***")),
        *(postscript.groups() if postscript else ()),
    ]
    # and these want a word: each placeholder and title, and what is left without them
    pieces = [
        *re.findall(r"\[(.*?)\]", text),
        *re.findall(r"<<(.*?)>>", text),
        re.sub(r"\[.*?\]|<<.*?>>", " ", rest),
    ]
    return (
        len(words) < min_words
        or any(len(words_of(part)) < min(2, min_words) for part in parts)
        or not all(words_of(piece) for piece in pieces)
        or text.strip().strip("`").lower() in ("null", "true", "false")
        or len(stray) >= 3
        and len(stray) > 0.4 * (len(stray) + len(words))  # "e e e e bees"
        or len(re.findall(r"(?m)^[ \t]*--+[ \t]*$", text)) >= 2  # rules, which IFEval counts as bullets
        or len(sentences(text)) >= 3
        and all(len(words_of(s)) < 2 for s in sentences(text))
    )


def is_repetition(text):
    """A word, a phrase or a sentence said again instead of an answer. The shares were set on natural answers
    of 2 to 400 words: about 1 % of HH-RLHF's preferred ones are taken for repetition, none of the built-in
    references."""
    words = words_of(text)
    content = Counter(w.rstrip("s") for w in words if len(w) > 2 and w not in FUNCTION_WORDS)
    top, total = max(content.values(), default=0), sum(content.values())
    if (
        total >= 2
        and (top > total / 2 or top >= 4 and top > 0.3 * total)
        or len(words) >= 2
        and len(set(words)) == 1
    ):
        return True
    # "bzzzz", "zzz", "bees bees bees"
    if re.search(r"([a-z])\1{3,}|\b(?!www|iii|xxx)([a-z])\2{2,}\b|\b(\w+)(?:[\s,]+\3\b){2,}", text.lower()):
        return True
    said = Counter(" ".join(words_of(re.sub(r"\d+", "", s))) for s in re.split(r"[.!?;\n]+|\*\*\*", text))
    again = sum((count - 1) * len(s.split()) for s, count in said.items() if len(s.split()) >= 3)
    if again > 0.1 * len(words):
        return True
    grams = list(zip(words, words[1:], words[2:]))
    counts = Counter(grams)
    if len(grams) >= 4 and len(counts) < 0.75 * len(grams):
        return True
    covered = {
        i + k
        for i, g in enumerate(grams)
        for k in range(3)
        if counts[g] > 1 and sum(w not in FUNCTION_WORDS for w in g) >= 2
    }
    return len(covered) > 0.5 * len(words)


def is_echo(prompt, rest):
    """The prompt, or a long run of its words, given back: half of the answer, or ten words in a row of a
    short one. (Long answers to prompts that hold a text quote it by right.)"""
    asked, words = words_of(prompt), words_of(rest)
    if not words:
        return False
    if words == asked:
        return True
    runs = {tuple(asked[i : i + 4]) for i in range(len(asked) - 3)}
    copied, run, longest = set(), 0, 0
    for i in range(len(words) - 3):
        hit = tuple(words[i : i + 4]) in runs
        run = run + 1 if hit else 0
        longest = max(longest, run + 3 if run else 0)
        copied.update(range(i, i + 4) if hit else ())
    # a list that the prompt asks to sort is copied legitimately; an instruction has function words in it
    if not any(words[i] in FUNCTION_WORDS for i in copied):
        return False
    return (
        len(copied) >= 0.5 * len(words) or longest >= min(10, len(asked)) and len(copied) >= 0.2 * len(words)
    )


def texts_of(value):
    """The texts in a JSON value, one after another, without the keys."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return "\n".join(texts_of(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value)


def without(text, phrases):
    """The text without some phrases, which stand by themselves in it."""
    for phrase in phrases:
        text = re.sub(rf"(?<!\w){re.escape(phrase.strip())}(?!\w)", " ", text, flags=re.IGNORECASE)
    return text


def hack(prompt, text, min_words=1, constraints=(), about=()):
    """Why `text` is no honest answer: "empty", "echo", "repetition", "disguised", "off-topic" or "salad";
    None for an honest one.

    min_words: the fewest words an answer has. about: words (or their beginnings) of which one must occur; or,
    for an answer in prose, the object that words.on_topic reads. Phrases that the prompt quotes or the
    constraints demand do not count as echo, and are no answer by themselves; of an answer in JSON the values
    count.
    """
    if any(c["type"] == "json" for c in constraints):
        try:
            text = texts_of(parsed_json(text))
        except ValueError:
            pass  # the constraint is not met; what else is wrong is said all the same
    demanded = [c["text"] for c in constraints if c["type"] in ("start_with", "end_with")]
    keywords = [w for c in constraints if c["type"] == "keywords" for w in c["words"]]
    quoted = [q.strip() for q in re.findall(r"(?<!\w)[\"'“‘](.+?)[\"'”’](?!\w)", prompt)]
    rest = without(text, demanded + [q for q in quoted if len(q.split()) > 1])
    if is_empty(text, rest, min_words):
        return "echo" if rest != text and not is_empty(text, text, min_words) else "empty"
    for phrase in demanded + quoted + keywords:
        # a word that no answer holds keeps the words before and after the phrase apart
        prompt = re.sub(
            rf"(?<!\w){re.escape(phrase.strip())}(?!\w)", " qqphraseqq ", prompt, flags=re.IGNORECASE
        )
    if is_echo(prompt, rest):
        return "echo"
    if is_repetition(text):
        return "repetition"
    if is_disguised(text):
        return "disguised"
    if isinstance(about, dict):
        body = re.sub(r"\[.*?\]|<<.*?>>", " ", rest)  # what stands in a title only says nothing
        if not on_topic(body, about, keywords):
            return "off-topic"
        return "salad" if is_salad(body) else None
    if about and not any(w.startswith(tuple(a.lower() for a in about)) for w in words_of(text)):
        return "off-topic"
    return None
