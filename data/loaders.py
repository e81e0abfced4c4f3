"""Preference records from the built-in tasks, from HH-RLHF, or from a file.

    from data import load_records
    load_records("tasks", "train", n=1000, level="chat")
    load_records("hh-helpful", "heldout", n=200)               # from the Hugging Face hub
    load_records("pairs.jsonl.gz", "train")                    # a local file

One record, TRL's preference format; `prompt` is a string or a list of messages, further columns are kept:

    {"prompt": [{"role": "user", "content": "Which bread keeps longest?"}],
     "chosen": "Rye.", "rejected": "No idea."}

A line of a file is either such a record (`rejected` may be missing, answers may be messages) or a pair of
whole dialogues as in HH-RLHF (Bai et al., arXiv 2204.05862): {"chosen": "\\n\\nHuman: ...\\n\\nAssistant:
...", "rejected"}. A dialogue is cut at its last "\\n\\nAssistant:"; prompt + "\\n\\nAssistant: " + answer
gives it back exactly. Pairs that are no pairs are dropped, and one warning counts them.

Who is held out: of the built-in tasks topics or combinations that no training prompt has (see there), of
HH-RLHF the hub's own test files. The records of a file say it themselves in a column "split", "train" or
"heldout", or else a hash of the dialogue does: the later turns of one conversation, all of which begin with
its first message, are on one side.
"""

import gzip
import hashlib
import json
import math
import random
import re
import warnings
import zlib
from collections import Counter
from pathlib import Path

from data.chat_tasks import MOST as MOST_CHAT
from data.chat_tasks import chat_tasks
from data.errors import UserError
from data.tiny_tasks import MOST as MOST_TINY
from data.tiny_tasks import tiny_tasks

HUB_REPO = "Anthropic/hh-rlhf"
HUB_FOLDERS = {"hh-helpful": "helpful-base", "hh-harmless": "harmless-base"}
HUB_FILES = {"train": "train.jsonl.gz", "heldout": "test.jsonl.gz"}
SPLITS = ("train", "heldout")
HELD_OUT = 10  # percent of a file's dialogues
GENERATORS = {"tiny": tiny_tasks, "chat": chat_tasks}
TASKS = {"train": 1000, "heldout": 200}  # built-in tasks, where n is not given
MOST = {"tiny": MOST_TINY, "chat": MOST_CHAT}  # and as many as there are


def load_records(source, split, n=None, seed=0, level="chat"):
    """Records (list of dicts) of `split`, "train" or "heldout", in an order that `seed` decides.

    source: "tasks" (level "tiny" or "chat"), "hh-helpful", "hh-harmless", or the path of a .jsonl or
    .jsonl.gz file. n: at most so many; None gives all of a file, and 1000 or 200 of the built-in tasks;
    math.inf all of either, and the first ones are those that a smaller n gives. UserError, one line, for
    everything a user can put right.
    """
    source = str(source)
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: use 'train' or 'heldout'")
    if n is not None and n != math.inf and (type(n) is not int or n < 1):
        raise UserError(f"the number of records must be 1 or more, not {n!r}")
    if source == "tasks":
        if level not in GENERATORS:
            raise UserError(f"unknown level {level!r} of the built-in tasks: use 'tiny' or 'chat'")
        return GENERATORS[level](split, min(n or TASKS[split], MOST[level][split]), seed)
    if source in HUB_FOLDERS:
        records = read_records(download(source, split))
    else:
        records = split_records(read_records(source), split, source)
    random.Random(f"{split}/{seed}").shuffle(records)
    return records if n in (None, math.inf) else records[:n]


def download(source, split):
    """The path of an official HH-RLHF file, from the hub's cache or the hub."""
    # imported here: local data needs no hub
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    name = f"{HUB_FOLDERS[source]}/{HUB_FILES[split]}"
    cached = try_to_load_from_cache(HUB_REPO, name, repo_type="dataset")
    if isinstance(cached, str):
        return cached
    try:
        # without a network the download retries for half a minute and says so; this question fails at once
        get_hf_file_metadata(hf_hub_url(HUB_REPO, name, repo_type="dataset"), timeout=10)
        return hf_hub_download(HUB_REPO, name, repo_type="dataset")
    except Exception as error:  # the hub's client raises its own, the HTTP library's and the system's errors
        raise UserError(
            f"{source}: cannot get {name} of {HUB_REPO} from the hub ({type(error).__name__}); give the "
            "path of a local .jsonl or .jsonl.gz file instead"
        ) from error


def dialogue(prompt):
    """What the prompts of one dialogue have in common (str): the user's first message, or the prompt if it is
    a text."""
    if isinstance(prompt, str):
        return prompt.strip()
    for message in prompt:
        if message["role"] == "user":
            return message["content"].strip()
    return prompt[0]["content"].strip()


def split_records(records, split, path):
    """The records of `split`: as their column "split" says, or by a hash of the dialogue. The same in every
    run, whatever the seed, and on every machine."""
    if any("split" in r for r in records):
        remedy = 'the column "split" must name both somewhere'
        chosen = [r for r, side in zip(records, own_splits(records, path)) if side == split]
    else:
        remedy = "a file needs at least two different prompts, by their first messages"
        keys = [hashlib.sha256(json.dumps(dialogue(r["prompt"])).encode()).hexdigest() for r in records]
        distinct = sorted(set(keys))
        held_out = {key for key in distinct if int(key, 16) % 100 < HELD_OUT}
        if len(distinct) > 1:  # a tiny file still gets both splits
            held_out = held_out or {distinct[0]}
            held_out -= {distinct[-1]} if len(held_out) == len(distinct) else set()
        chosen = [r for r, key in zip(records, keys) if (key in held_out) == (split == "heldout")]
    if not chosen:
        raise UserError(f"{path}: no record for the {split} split; {remedy}")
    return chosen


def own_splits(records, path):
    """The column "split" of all records -> list of str."""
    missing = sum("split" not in r for r in records)
    if missing:
        raise UserError(
            f'{path}: {missing} of {len(records)} records have no "split"; give it to all of them, or to none'
        )
    for record in records:
        if record["split"] not in SPLITS:
            shown = str(record["split"])[:40]
            raise UserError(f'{path}: a record\'s "split" is {shown!r}; it must be "train" or "heldout"')
    return [r["split"] for r in records]


# ------------------------------------------------------------------------------------------------------ files


def read_records(path):
    """All usable records of a .jsonl or .jsonl.gz file, in its order."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a directory; give a .jsonl or .jsonl.gz file")
    if not path.exists():
        raise UserError(
            f"{path}: no such file; give the path of a .jsonl or .jsonl.gz file, or one of tasks, "
            + ", ".join(HUB_FOLDERS)
        )
    if not path.is_file():  # a named pipe would be waited for, for ever
        raise UserError(f"{path}: is not a regular file; write the records into one")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz" or content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"{path}: not a complete gzip file ({error}); compress it again, or name it .jsonl"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error

    records, dropped, pairs = [], Counter(), 0
    # bytes are cut at \n only: U+2028 and the like are allowed inside a JSON string
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = parse_line(line, where)
        if is_dialogue_pair(record):
            pairs += 1
            record, reason = split_dialogues(record)
            if reason:
                dropped[reason] += 1
                continue
        records.append(checked_record(record, where))
    if dropped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
        warnings.warn(f"{path}: dropped {dropped.total()} of {pairs} pairs: {reasons}", stacklevel=3)
    if not records:
        raise UserError(
            f"{path}: holds no {'usable ' if pairs else ''}record; write one JSON object per line"
        )
    return records


def parse_line(line, where):
    """One line of bytes as a JSON object."""

    def refuse(name):
        raise UserError(f"{where}: {name} is not valid JSON; use a number or null")

    def finite(kind):
        def number(digits):
            # 1e999 would be read as infinity, and an integer of 400 digits fails wherever it meets a float
            if math.isinf(float(digits)):
                raise UserError(f"{where}: the number {digits[:20]}... is too large; use one below 1e308")
            return kind(digits)

        return number

    try:
        record = json.loads(
            line.decode("utf-8"), parse_constant=refuse, parse_int=finite(int), parse_float=finite(float)
        )
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: half of a surrogate pair (\\ud800 to \\udfff); write the whole character"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON ({error.msg}, column {error.colno}); write one object per line"
        ) from error
    except (RecursionError, ValueError) as error:
        raise UserError(
            f"{where}: not readable JSON ({type(error).__name__}); write a flat object"
        ) from error
    if not isinstance(record, dict):
        raise UserError(
            f'{where}: a {type(record).__name__}, not an object such as {{"prompt": ..., "chosen": ...}}'
        )
    return record


def checked_record(record, where):
    """The record with its answers as strings, or a UserError that names what is wrong."""
    for field in ("prompt", "chosen"):
        if field not in record:
            raise UserError(f'{where}: no field {field!r}; a record needs "prompt" and "chosen"')
    record = dict(record)
    if not isinstance(record["prompt"], str):
        check_messages(record["prompt"], f"{where}: prompt")
        if record["prompt"][-1]["role"] == "assistant":
            raise UserError(f'{where}: prompt ends with an assistant message; move it to "chosen"')
    elif not record["prompt"].strip():
        raise UserError(f"{where}: prompt is empty; write a prompt or delete the line")
    for field in ("chosen", "rejected"):
        if field not in record:
            continue
        if not isinstance(record[field], str):
            check_messages(record[field], f"{where}: {field}")
            if len(record[field]) != 1 or record[field][0]["role"] != "assistant":
                raise UserError(
                    f"{where}: {field} must be a text or one assistant message; "
                    'the others belong into "prompt"'
                )
            record[field] = record[field][0]["content"]
        if field == "chosen" and not record[field].strip():  # an empty rejected answer is a fair bad example
            raise UserError(f"{where}: {field} is empty; write an answer or delete the line")
    return record


def check_messages(value, what):
    """Raise a UserError unless `value` is a non-empty list of messages."""
    if not isinstance(value, list):
        raise UserError(f"{what} is of type {type(value).__name__}; write a text or a list of messages")
    if not value:
        raise UserError(f"{what} is empty; write at least one message")
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in (
            "system",
            "user",
            "assistant",
            "tool",
        ):
            raise UserError(f'{what}: each message needs a "role" of system, user, assistant or tool')
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise UserError(f'{what}: each message needs a "content" that is a text and not empty')


# ---------------------------------------------------------------------------------------------------- HH-RLHF


def is_dialogue_pair(record):
    """HH-RLHF's format: whole dialogues in `chosen`, and no prompt."""
    return "prompt" not in record and str(record.get("chosen", "")).startswith("\n\nHuman:")


def split_dialogues(record):
    """(record with prompt and answers, None), or (None, why the pair is dropped)."""
    chosen, rejected = record["chosen"], record.get("rejected")
    prefix, mark, answer = chosen.rpartition("\n\nAssistant:")
    if not mark:
        return None, "without an assistant's turn"
    answers = {"chosen": answer}
    if rejected is not None:
        other, _, answers["rejected"] = str(rejected).rpartition("\n\nAssistant:")
        if other != prefix:
            return None, "with different prompts"
    if not all(text.strip() for text in answers.values()):
        return None, "with an empty answer"
    if len(set(answers.values())) == 1 and rejected is not None:
        return None, "with twice the same answer"
    if any(re.search("\n\nHuman:", text) for text in answers.values()):
        return None, "with a human turn in the answer"
    turns = re.split(r"\n\n(Human|Assistant):", prefix)[1:]
    roles, texts = turns[::2], turns[1::2]
    if roles != ["Human", "Assistant"] * (len(roles) // 2) + ["Human"]:
        return None, "whose turns do not alternate"
    if not all(text.strip() for text in texts):
        return None, "with an empty turn"
    # only the one space after the colon goes: the dialogue can be put together again, character for character
    prompt = [
        {"role": "user" if role == "Human" else "assistant", "content": text.removeprefix(" ")}
        for role, text in zip(roles, texts)
    ]
    return {**record, "prompt": prompt, **{k: text.removeprefix(" ") for k, text in answers.items()}}, None
