"""The constraints of the built-in tasks: checks in the manner of IFEval, and a guard against answers that are no answers.

    constraint_results("bees turn nectar into honey.", [{"type": "lowercase"}])          # [True]
    hack("Write one sentence about bees.", "bees bees bees")                              # "repetition"

Checks that IFEval has too (Zhou et al., arXiv 2311.07911) decide as Google's code, except:
- upper- and lowercase look at the letters only; IFEval also asks langdetect whether the text is English;
- sentences are counted by the splitter below instead of nltk's punkt, which is a download;
- capital words are found by a regular expression instead of nltk's tokeniser, for the same reason;
- keywords, forbidden words and postscript markers are plain text; IFEval reads them as regular expressions.
`start_with` and the three checks of the tiny vocabulary (items, order, separator) are not in IFEval.
What no check sees: whether the answer is true, and word salad that is varied enough.
"""

import json
import re
from collections import Counter

from data.errors import UserError

# ---------------------------------------------------------------------------------------------------------- counting

ABBREVIATIONS = {
    "mr",
    "mrs",
    "ms",
    "dr",
    "prof",
    "st",
    "vs",
    "e.g",
    "i.e",
    "jr",
    "sr",
    "approx",
    "p.s",
    "p.p.s",
}


def sentences(text):
    """Sentences of `text`: cut after . ! ? (and closing quotes or brackets) before white space; a piece needs a letter
    or digit to count. Abbreviations, initials ("J. Smith", "U.S.") and list numbers ("2. Wash") do not end one."""
    pieces, start = [], 0
    for end in re.finditer(r"[.!?…]+[\"'”’)\]*_]*(?=\s|$)", text):
        line = text[: end.start()].rsplit("\n", 1)[-1]
        token = (line.split() or [""])[-1].lstrip("\"'“‘([*_").lower()
        listed = token.isdigit() and not line.strip(" *-0123456789")
        short = token in ABBREVIATIONS or re.fullmatch(r"[b-hj-z]|[a-z](\.[a-z])+", token)
        if not (end.group().startswith(".") and (listed or short)):
            pieces.append(text[start : end.end()].strip())
            start = end.end()
    return [piece for piece in pieces + [text[start:].strip()] if re.search(r"[^\W_]", piece)]


def compare(count, constraint):
    """IFEval's two relations."""
    return count >= constraint["n"] if constraint["relation"] == "at least" else count < constraint["n"]


def items(text, constraint):
    """The words of a tiny-vocabulary answer that are neither commas nor ignored."""
    return [w for w in text.lower().split() if w != "," and w not in constraint.get("ignore", ())]


# ------------------------------------------------------------------------------------------------------------- checks


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


def check_json(text, c):
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def check_title(text, c):
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


def check_postscript(text, c):
    pattern = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}.get(
        c["marker"], re.escape(c["marker"].lower())
    )
    return re.search(pattern, text.lower()) is not None


def capital_words(text):
    """Words whose letters are all capital; a hyphenated word is one word, as in IFEval ("I" and "A" count)."""
    return [w for w in re.findall(r"\w+(?:[-./]\w+)*", text) if w.isupper()]


def contains(text, word):
    return re.search(re.escape(word), text, flags=re.IGNORECASE) is not None


def contains_word(text, word):
    return re.search(r"\b" + re.escape(word) + r"\b", text, flags=re.IGNORECASE) is not None


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
    "keywords": lambda text, c: all(contains(text, word) for word in c["words"]),
    "forbidden": lambda text, c: not any(contains_word(text, word) for word in c["words"]),
    "quotes": lambda text, c: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
    "json": check_json,
    "title": check_title,
    "letter_frequency": lambda text, c: compare(text.lower().count(c["letter"].lower()), c),
    "postscript": check_postscript,
    "placeholders": lambda text, c: len(re.findall(r"\[.*?\]", text)) >= c["n"],
    "capital_words": lambda text, c: compare(len(capital_words(text)), c),
}

# The fields each type needs; "ignore" of the tiny checks may be left out.
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
}


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
}


def constraint_results(text, constraints):
    """Whether `text` meets each of `constraints` -> list[bool]; UserError names an unknown type or a bad field."""
    if not isinstance(constraints, (list, tuple)):
        raise UserError(f'constraints must be a list of objects with a "type", not {constraints!r}')
    results = []
    for c in constraints:
        kind = c.get("type") if isinstance(c, dict) else None
        if not isinstance(kind, str) or kind not in CHECKS:
            raise UserError(f"constraint {c!r}: unknown type {kind!r}; known types: {', '.join(CHECKS)}")
        for field in FIELDS.get(kind, ()):
            wanted, valid = VALID[field]
            if field not in c or not valid(c[field]):
                raise UserError(
                    f"constraint {kind!r}: field {field!r} must be {wanted}, not {c.get(field)!r}"
                )
        if c.get("ignore") and not is_words(c["ignore"]):
            raise UserError(
                f"constraint {kind!r}: field 'ignore' must be a list of words, not {c['ignore']!r}"
            )
        results.append(bool(CHECKS[kind](text, c)))
    return results


# -------------------------------------------------------------------------------------------------------------- hacks

FUNCTION_WORDS = set(
    """a about above after all also an and any are as at be because been before being both but by can
    could did do does down each every for from had has have he her here hers him his how i if in into is it its just
    may me might more most much must my no nor not of off on once one only or other our out over own per she should so
    some such than that the their them then there these they this those to too under until up us very was we were what
    when where which while who why will with would you your""".split()
)


def words_of(text):
    """Lowercase words of at least two characters, and "a" and "i": stray letters are not words."""
    words = re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())
    return [w for w in words if len(w) > 1 or w in "ai"]


def is_empty(text, rest, min_words):
    """No answer, or marks without content. `rest` is the text without the phrases that the prompt demands."""
    words = [w for w in words_of(rest) if re.search(r"[^\W\d_]", w)]
    stray = re.findall(r"\b[b-hj-z]\b(?!\.)", text.lower())
    postscript = re.search(r"(?is)^(.*?)\bp\.\s?(?:p\.\s?)?s\b\.?(.*)$", text)
    # everything here wants a word in it: each bullet, paragraph, placeholder and title, the text before and after P.S.,
    # and what is left without titles and placeholders
    pieces = [
        *re.findall(r"(?m)^[ \t]*[-*](?:[ \t]+(.*))?$", text),
        *filter(str.strip, text.split("***")),
        *re.findall(r"\[(.*?)\]", text),
        *re.findall(r"<<(.*?)>>", text),
        *(postscript.groups() if postscript else ()),
        re.sub(r"\[.*?\]|<<.*?>>", " ", rest),
    ]
    return (
        len(words) < min_words
        or not all(words_of(piece) for piece in pieces)
        or text.strip().strip("`").lower() in ("null", "true", "false")
        or len(stray) >= 3
        and len(stray) > 0.4 * (len(stray) + len(words))  # "e e e e bees"
        or len(re.findall(r"(?m)^[ \t]*--+[ \t]*$", text)) >= 2  # rules, which IFEval counts as bullets
        or len(sentences(text)) >= 3
        and all(len(words_of(s)) < 2 for s in sentences(text))
    )


def is_repetition(text):
    """A word, a phrase or a sentence said again instead of an answer. The shares were set on natural answers of 2 to
    400 words: about 1 % of HH-RLHF's preferred ones are taken for repetition, none of the built-in references."""
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
    """The prompt, or a long run of its words, given back: half of the answer, or ten words in a row of a short
    one. (Long answers to prompts that hold a text quote it by right.)"""
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


def hack(prompt, text, min_words=1, constraints=(), about=()):
    """Why `text` is no honest answer: "empty", "echo", "repetition" or "off-topic"; None for an honest one.

    min_words: the fewest words an answer has; about: words (or their beginnings) of which one must occur, if given.
    Phrases that the prompt quotes or the constraints demand do not count as echo, and are no answer by themselves.
    """
    demanded = [c["text"].strip() for c in constraints if c["type"] in ("start_with", "end_with")]
    quoted = [q.strip() for q in re.findall(r"(?<!\w)[\"'“‘](.+?)[\"'”’](?!\w)", prompt)]
    rest = text
    for phrase in demanded + [q for q in quoted if len(q.split()) > 1]:
        rest = re.sub(rf"(?<!\w){re.escape(phrase)}(?!\w)", " ", rest, flags=re.IGNORECASE)
    if is_empty(text, rest, min_words):
        return "echo" if rest != text and not is_empty(text, text, min_words) else "empty"
    for phrase in demanded + quoted + [w for c in constraints if c["type"] == "keywords" for w in c["words"]]:
        # a word that no answer holds keeps the words before and after the phrase apart
        prompt = re.sub(
            rf"(?<!\w){re.escape(phrase.strip())}(?!\w)", " qqphraseqq ", prompt, flags=re.IGNORECASE
        )
    if is_echo(prompt, rest):
        return "echo"
    if is_repetition(text):
        return "repetition"
    if about and not any(w.startswith(tuple(a.lower() for a in about)) for w in words_of(text)):
        return "off-topic"
    return None
