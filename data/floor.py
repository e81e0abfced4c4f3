"""The no-skill floor of a task: what the best of a few constant answers earns, which read the topic alone.

    no_skill_floor(records, verifier)      # Floor(template="{3 items}", mean=0.03, rewards=[0.0, ...])

A trained policy's reward means something by its distance from this number. An answer such as "I like bees
very much." once met the constraints of a third of the chat tasks (no commas, fewer than 10 words, not the
word 'hive') and the table showed a trained policy beside it at the same height.
"""

from typing import NamedTuple

from data.words import stem, words_of

# {topic}: the name of the topic as the prompt has it, {Topic} with a capital, {TOPIC} in capitals; {2 items}:
# the first two words of the list that a tiny task asks for. Beside plain sentences there is one for each form
# that is asked for, all forms at once, and a word salad.
TEMPLATES = (
    "I like {topic} very much.",
    "i like {topic} very much.",
    "I LIKE {TOPIC} VERY MUCH.",
    '"I like {topic} very much."',
    "{Topic} is very important to many people all over the world today.",
    "Many people like {topic}. It is very important. I like it too.",
    "* Many people like {topic}.\n* It is very important.",
    "Many people like {topic}.\n***\nIt is very important to them.",
    "<<{Topic}>>\nI like {topic} very much.",
    "Hello [name]! I like {topic} very much.",
    "I like {topic} very much. P.S. Many people like it too.",
    "I think I like {topic} very much. That is all.",
    '{"topic": "{topic}", "fact": "I like {topic} very much."}',
    "<<{Topic}>>\nHello [name]! I think {TOPIC} is good.\n* It is nice.\n* It is old.\nP.S. That is all.",
    "{Topic} and the warm water of a bright morning are good for animals, plants and young people.",
    "{2 items}",
    "{3 items}",
    "{2 items} done",
)


class Floor(NamedTuple):
    template: str  # the best of TEMPLATES on these records
    mean: float  # of `rewards`
    rewards: list  # of float, one per record


def constant_templates(records):
    """{template: its answers (list of str), one per record} of those templates that say something for every
    record."""
    answers = {}
    for template in TEMPLATES:
        texts = [fill(template, record) for record in records]
        if None not in texts:
            answers[template] = texts
    return answers


def no_skill_floor(records, reward):
    """The best constant template on `records` (a non-empty list) -> Floor. The best of several on the very
    records that it is reported for: a little too high rather than too low.

    reward: f(prompts, completions, **columns) -> list of numbers, as everywhere; the columns are the records'
    own.
    """
    if not records:
        raise ValueError("no records: a floor needs at least one")
    prompts = [record["prompt"] for record in records]
    names = {key for record in records for key in record} - {"prompt", "truncated"}
    columns = {key: [record.get(key) for record in records] for key in sorted(names)}
    best = None
    for template, texts in constant_templates(records).items():
        rewards = [float(r) for r in reward(prompts=prompts, completions=texts, **columns)]
        mean = sum(rewards) / len(rewards)
        if best is None or mean > best.mean:
            best = Floor(template, mean, rewards)
    return best


def floor_columns(records, reward):
    """The floor's answer to each record and what it earns, as columns of samples.jsonl -> [{"floor",
    "floor_reward"}]."""
    found = no_skill_floor(records, reward)
    columns = []
    for record, earned in zip(records, found.rewards):
        columns.append({"floor": fill(found.template, record), "floor_reward": earned})
    return columns


def fill(template, record):
    """The template's answer (str) to a record, or None if it asks for items and the record has none."""
    if "items}" in template:
        lists = [c["allowed"] for c in record.get("constraints") or () if c["type"] == "items"]
        if not lists:
            return None
        for n in (2, 3):
            template = template.replace(f"{{{n} items}}", " ".join(lists[0][:n]))
        return template
    topic = topic_of(record)
    for name, text in (("topic", topic), ("Topic", topic[:1].upper() + topic[1:]), ("TOPIC", topic.upper())):
        template = template.replace(f"{{{name}}}", text)
    return template


def topic_of(record):
    """The word of the prompt that names the topic, as `about` knows it; "it" where there is none."""
    about = record.get("about") or ()
    names = about["names"] if isinstance(about, dict) else about
    prompt = record["prompt"]
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    for word in words_of(text):
        if any(
            stem(word) == stem(name) or (word.startswith(name.lower()) and len(name) > 3) for name in names
        ):
            return word
    return "it"
