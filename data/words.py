"""Words: how a text is cut into sentences and words, when two are one, and whether they make an answer.

words_of("Bees' wings beat fast.")                       # ["bees", "wings", "beat", "fast"]
stem("berries") == stem("berry")                         # True
on_topic("I like bees very much.", about)                # False: names the topic and says nothing of it
is_salad("The of bees and nectar a the with.")           # True
"""

import re
import unicodedata

FUNCTION_WORDS = set(
    """a about above after all also an and any are as at be because been before being both but by can could
    did do does down each every for from had has have he her here hers him his how i if in into is it its just
    may me might more most much must my no nor not of off on once one only or other our out over own per she
    should so some such than that the their them then there these they this those to too under until up us
    very was we were what when where which while who why will with would you your""".split()
)
GREETINGS = set("dear greetings hello hey hi reader".split())
ABBREVIATIONS = set("mr mrs ms dr prof st vs e.g i.e jr sr approx p.s p.p.s".split())

# What makes an answer be about its topic: each content word besides the topic's name weighs 1 / (topics that
# have it). Together they weigh LEAST: one word that at most three of the sixty topics have, or two that six
# have. And on average they weigh SPECIFIC: as a word weighs 1 for all topics together, a text that is the
# same for every topic can reach that for 12 of the sixty, however long it is and whatever stands in it.
LEAST, SPECIFIC = 0.3, 1 / 12


def sentences(text):
    """Sentences of `text`: cut after . ! ? (and closing quotes or brackets) before white space; a piece needs
    a letter or digit to count. Abbreviations, initials ("J. Smith", "U.S.") and list numbers ("2. Wash") do
    not end one."""
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


def words_of(text):
    """Lowercase words of at least two characters, and "a" and "i": stray letters are not words."""
    words = re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())
    return [w for w in words if len(w) > 1 or w in "ai"]


def plain(text):
    """The text without accents and invisible characters, wide letters as usual ones: what a reader reads."""
    letters = unicodedata.normalize("NFKD", text)
    return "".join(ch for ch in letters if unicodedata.category(ch) not in ("Mn", "Cf"))


def has_word(text, word):
    """Whether `word` (a word or a phrase) stands in `text`, by itself or with the ending of a plural or of a
    verb, and not as a part of another word. Capitals do not matter; "_" and digits are no part of a word."""
    ending = r"(?:['’]?s|(?<=[sxz])es|(?<=[cs]h)es|d|ed|ing)?"
    pattern = rf"(?<![^\W\d_]){re.escape(word)}{ending}(?![^\W\d_])"
    return re.search(pattern, text, flags=re.IGNORECASE) is not None


# ----------------------------------------------------------------------------------------------------- topics

IRREGULAR = dict(
    pair.split("-")
    for pair in """ate-eat built-build caught-catch children-child drank-drink feet-foot flew-fly flown-fly
    grew-grow knives-knife leaves-leaf loaves-loaf mice-mouse ran-run rode-ride sang-sing swam-swim
    teeth-tooth""".split()
)


def stem(word):
    """What the forms of a word have in common: "bakes", "baked", "baking" -> "bak". Rough, for comparing
    only."""
    word = re.sub(r"['’]s$", "", word.lower())
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith("ies") and len(word) > 4:
        word = word[:-3] + "y"
    elif re.search(r"(s|x|z|ch|sh)es$", word):
        word = word[:-2]
    elif re.search(r"[^sui]s$", word) and len(word) > 3:
        word = word[:-1]
    verb = re.fullmatch(r"(.*[aeiouy].*)(ing|ed)", word)
    if verb and len(verb[1]) >= 3:
        word = re.sub(r"([bdgkmnprtv])\1$", r"\1", verb[1])
    return word[:-1] if word.endswith("e") and len(word) > 3 else word


def content_stems(text):
    """The stems of the words that carry meaning, greetings apart: a set of str."""
    return {stem(w) for w in words_of(text) if w not in FUNCTION_WORDS | GREETINGS}


def on_topic(text, about, given=()):
    """Whether `text` names its topic and says something that belongs to it, see LEAST.

    about: {"names": words of which one must occur, "words": words that belong to the topic, "topics": of each
    of them, in how many topics it occurs}; given: words that the prompt puts into the answerer's mouth, and
    so prove nothing.
    """
    said = content_stems(text)
    topics = dict(zip(map(stem, about["words"]), about["topics"]))
    named = said & {stem(name) for name in about["names"]}
    if not named:
        return False
    rest = said - {max(sorted(named), key=lambda name: topics.get(name, 0))} - {stem(word) for word in given}
    weight = sum(1 / topics[word] for word in rest & topics.keys())
    return weight >= max(LEAST, SPECIFIC * len(rest))


# ------------------------------------------------------------------------------------------------------ salad

ARTICLES = set("a an the my your our their its".split())
AFTER_ARTICLE = set("own other more most very few same only one much such some all us".split())  # "the other"
NEVER_LAST = ARTICLES | set("of from into at by with for and or but than because if every very".split())
UNJOINED = set("of from at into with".split())  # not before a second "of", "and", "or", "but"


def is_salad(text):
    """Words that make no sentence: no function word in twelve, or hardly anything but them; an article with
    no noun behind it ("the of"); a sentence that ends in an article or a conjunction. Seen in no sentence of
    the built-in topics, in 4 % of HH-RLHF's shorter answers, and in a quarter of the built-in sentences with
    their words shuffled."""
    words = words_of(text)
    function = sum(w in FUNCTION_WORDS for w in words)
    if len(words) >= 12 and not 1 <= function <= 0.75 * len(words):
        return True
    for piece in re.split(r"[.!?;:\n{}\[\]]+", text):
        said = words_of(piece)
        if len(said) >= 4 and said[-1] in NEVER_LAST:
            return True
        for word, following in zip(said, said[1:]):
            bare_article = word in ARTICLES and following in FUNCTION_WORDS - AFTER_ARTICLE
            if bare_article or (word in UNJOINED and following in ("of", "and", "or", "but")):
                return True
    return False


def is_disguised(text):
    """Letters of two alphabets in one word, or invisible characters inside one: it reads as what no check
    finds."""
    if re.search(r"[a-zA-Z][\u00ad\u200b-\u200f\u2060\ufeff]+[a-zA-Z]", text):
        return True
    for word in re.findall(r"[^\W\d_]{4,}", text):
        alphabets = {unicodedata.name(ch, "?").split()[0] for ch in word}
        if "LATIN" in alphabets and alphabets & {"CYRILLIC", "GREEK", "ARMENIAN", "CHEROKEE"}:
            return True
    return False
