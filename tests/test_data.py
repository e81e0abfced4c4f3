"""The built-in chat tasks, and the loaders: formats, splits, order, and each error in one line."""

import gzip
import importlib
import json
import math
import os
from collections import Counter
from pathlib import Path

import pytest

from data import UserError, chat_tasks, load_records, tiny_tasks
from data import constraints as checks

loaders = importlib.import_module("data.loaders")
tasks = importlib.import_module("data.chat_tasks")  # the package has a function of that name
TOPICS, asked = tasks.TOPICS, tasks.asked
HH = (
    Path(__file__).parents[2] / "shared" / "data" / "hh-rlhf"
)  # real data beside the checkout, where there is any


# ------------------------------------------------------------------------------------------------- chat tasks


def test_chat_tasks_are_deterministic_and_distinct():
    records = chat_tasks("train", 400, seed=3)
    assert records == chat_tasks("train", 400, seed=3) and records[:50] == chat_tasks("train", 50, seed=3)
    assert records != chat_tasks("train", 400, seed=4)
    assert len({r["prompt"] for r in records}) == 400
    assert all(
        set(r) == {"prompt", "chosen", "rejected", "constraints", "min_words", "about"} for r in records
    )
    assert all(r["chosen"] != r["rejected"] for r in records)


def test_chat_splits_share_no_topic():
    prompts = {
        s: {r["prompt"] for seed in range(3) for r in chat_tasks(s, 1000, seed)} for s in ("train", "heldout")
    }
    assert not prompts["train"] & prompts["heldout"]
    sentences = [s for topic in TOPICS for s in topic["sentences"]]
    assert len(set(sentences)) == len(sentences) and len({t["topic"] for t in TOPICS}) == len(TOPICS) == 60


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_chat_references_are_good_but_not_perfect(split):
    records = chat_tasks(split, 1500, seed=1)
    met = {
        key: [ok for r in records for ok in checks.constraint_results(r[key], asked(r))]
        for key in ("chosen", "rejected")
    }
    assert 0.75 < sum(met["chosen"]) / len(met["chosen"]) < 0.85
    assert 0.3 < sum(met["rejected"]) / len(met["rejected"]) < 0.5
    assert 0.2 < sum(len(asked(r)) == 2 for r in records) / len(records) < 0.32
    counts = Counter(c["type"] for r in records for c in r["constraints"])
    assert len(counts) >= 14 and min(counts.values()) >= 10
    for r in records:
        assert checks.hack(r["prompt"], r["chosen"], r["min_words"], r["constraints"], r["about"]) is None, r
        wanted, results = r["constraints"], checks.constraint_results(r["chosen"], r["constraints"])
        assert [c["type"] for c in wanted].index("short") == len(wanted) - 1
        assert results[-1] or not all(results), r  # an answer that is right is as short as its task asks


def test_chat_tasks_refuse_what_they_cannot_give():
    for split, n in (("test", 1), ("train", -1), ("heldout", 10**6)):
        with pytest.raises(UserError):
            chat_tasks(split, n)
    assert chat_tasks("train", 0) == []


# ------------------------------------------------------------------------------------------------------ files


def write(path, records):
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def preference(i, **more):
    return {"prompt": f"Question {i}?", "chosen": f"Answer {i}.", "rejected": "No.", **more}


def dialogue(*turns):
    return "".join(f"\n\n{'Human' if i % 2 == 0 else 'Assistant'}: {turn}" for i, turn in enumerate(turns))


def test_builtin_tasks():
    assert load_records("tasks", "train", n=5, seed=2) == chat_tasks("train", 5, 2)
    assert load_records("tasks", "heldout", n=5, level="tiny") == tiny_tasks("heldout", 5, 0)
    assert len(load_records("tasks", "heldout")) == 200


@pytest.mark.parametrize("level", ["tiny", "chat"])
def test_the_whole_pool_begins_as_a_part_of_it(level):
    """A run that leaves long records out reads them all and keeps the first that fit. Of the built-in tasks
    it once got 1000 and 200 instead, and the run was another one although nothing was too long."""
    every = load_records("tasks", "heldout", n=math.inf, seed=3, level=level)
    assert every[:400] == load_records("tasks", "heldout", n=400, seed=3, level=level)
    assert len(every) == loaders.MOST[level]["heldout"]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_a_file_is_split_by_its_prompts(tmp_path, name):
    path = write(
        tmp_path / name, [preference(i // 2, line=i, constraints=[{"type": "no_comma"}]) for i in range(600)]
    )
    train, heldout = load_records(path, "train"), load_records(path, "heldout")
    assert sorted(r["line"] for r in train + heldout) == list(
        range(600)
    )  # no record is lost, further columns stay
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in heldout}
    assert 30 <= len(heldout) <= 100
    assert load_records(path, "train", n=7) == train[:7] and load_records(path, "train") == train
    assert train != load_records(path, "train", seed=1)
    assert {r["line"] for r in load_records(path, "heldout", seed=1)} == {r["line"] for r in heldout}


def test_a_file_is_split_by_its_dialogues(tmp_path):
    """24 of 224 held-out prompts of HH-RLHF were once another turn of a training dialogue."""
    records = []
    for i in range(300):
        turns = [{"role": "user", "content": f"Question {i}?"}]
        records.append({"prompt": list(turns), "chosen": "Yes."})
        turns += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
        records.append({"prompt": turns, "chosen": "Because."})
        records.append({"prompt": [{"role": "system", "content": "Be brief."}, *turns], "chosen": "So."})
    path = write(tmp_path / "turns.jsonl", records)
    sides = {}
    for split in ("train", "heldout"):
        sides[split] = {loaders.dialogue(r["prompt"]) for r in load_records(path, split)}
    assert not sides["train"] & sides["heldout"] and 15 <= len(sides["heldout"]) <= 50
    assert len(sides["train"] | sides["heldout"]) == 300


def test_a_column_split_decides(tmp_path):
    """A generated file knows better than a hash which topics are held out."""
    records = [preference(i, split="heldout" if i % 3 == 0 else "train") for i in range(30)]
    path = write(tmp_path / "split.jsonl", records)
    for split in ("train", "heldout"):
        loaded = load_records(path, split)
        assert sorted(r["prompt"] for r in loaded) == sorted(
            r["prompt"] for r in records if r["split"] == split
        )
    for wrong in (preference(30, split="test"), preference(30, split=None), preference(30, split=[])):
        path = write(tmp_path / "wrong.jsonl", [*records, wrong])
        with pytest.raises(UserError, match='wrong.jsonl: .*"split".*"train" or "heldout"') as error:
            load_records(path, "train")
        assert "\n" not in str(error.value)
    path = write(tmp_path / "some.jsonl", [*records, preference(30)])
    with pytest.raises(UserError, match="some.jsonl: 1 of 31 records"):
        load_records(path, "train")
    path = write(tmp_path / "train.jsonl", [preference(i, split="train") for i in range(9)])
    with pytest.raises(UserError, match="no record for the heldout split"):
        load_records(path, "heldout")


def test_what_is_no_regular_file_is_refused_before_it_is_opened(tmp_path):
    """Opening a named pipe waits for a writer: the command hung without a word."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="pipe.jsonl: is not a regular file"):
        load_records(tmp_path / "pipe.jsonl", "train")


@pytest.mark.parametrize("count", range(2, 8))
def test_tiny_files_have_both_splits(tmp_path, count):
    path = write(tmp_path / "few.jsonl", [preference(i) for i in range(count)])
    sizes = [len(load_records(path, split)) for split in ("train", "heldout")]
    assert min(sizes) >= 1 and sum(sizes) == count


def test_messages_and_missing_rejected(tmp_path):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé\u2028llo?"}]
    path = write(
        tmp_path / "chat.jsonl",
        [{"prompt": prompt, "chosen": [{"role": "assistant", "content": "Hi."}]}, preference(1, rejected="")],
    )
    records = {str(r["prompt"]): r for r in load_records(path, "train") + load_records(path, "heldout")}
    assert records[str(prompt)] == {"prompt": prompt, "chosen": "Hi."}
    assert records["Question 1?"]["rejected"] == ""


GOOD = json.dumps(preference(1)).encode()
BAD_LINES = [  # (second line of the file, a word of the reason)
    (b"{", "not JSON"),
    (b"[1]", "list"),
    (b'"text"', "str"),
    (b"7", "int"),
    (b'{"prompt": "p"}', "chosen"),
    (b'{"chosen": "c"}', "prompt"),
    (b'{"prompt": 3, "chosen": "c"}', "int"),
    (b'{"prompt": "p", "chosen": 3}', "chosen"),
    (b'{"prompt": "p", "chosen": null}', "chosen"),
    (b'{"prompt": " ", "chosen": "c"}', "empty"),
    (b'{"prompt": "p", "chosen": ""}', "empty"),
    (b'{"prompt": "p", "chosen": "c", "rejected": 1}', "rejected"),
    (b'{"prompt": [], "chosen": "c"}', "empty"),
    (b'{"prompt": [{"role": "user"}], "chosen": "c"}', "content"),
    (b'{"prompt": [{"role": "boss", "content": "x"}], "chosen": "c"}', "role"),
    (b'{"prompt": [{"role": "assistant", "content": "x"}], "chosen": "c"}', "assistant"),
    (b'{"prompt": "p", "chosen": [{"role": "user", "content": "x"}]}', "chosen"),
    (b'{"prompt": "p", "chosen": "c", "score": NaN}', "NaN"),
    (b'{"prompt": "p", "chosen": "c", "score": -Infinity}', "Inf"),
    (b'{"prompt": "p", "chosen": "c", "margin": 1' + b"0" * 400 + b"}", "too large"),
    (b'{"prompt": "p", "chosen": "c", "margin": -1e999}', "too large"),
    (b'{"prompt": "\xff", "chosen": "c"}', "UTF-8"),
    (b'{"prompt": "\\ud800", "chosen": "c"}', "surrogate"),
    (b"[" * 100_000, "JSON"),
    (b'{"prompt": "p", "chosen": "c"} {}', "not JSON"),
]


@pytest.mark.parametrize("line, word", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named(tmp_path, line, word):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n")
    with pytest.raises(UserError) as error:
        load_records(path, "train")
    message = str(error.value)
    assert message.startswith(f"{path}, line 2") and word in message and "\n" not in message


def test_bad_files_are_named(tmp_path):
    files = {
        "none.jsonl": (None, "no such file"),
        "empty.jsonl": (b"", "no record"),
        "blank.jsonl": (b"\n \n", "no record"),
        "plain.jsonl.gz": (GOOD, "gzip"),
        "cut.jsonl.gz": (gzip.compress(GOOD)[:-9], "gzip"),
        "one.jsonl": (GOOD, "two different prompts"),
    }
    for name, (content, reason) in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            load_records(tmp_path / name, "heldout")
        assert str(tmp_path / name) in str(error.value) and reason in str(error.value), name
    with pytest.raises(UserError, match="directory"):
        load_records(tmp_path, "train")
    for arguments in (("tasks", "test"), ("tasks", "train", 0), ("tasks", "train", 1, 0, "big")):
        with pytest.raises(UserError):
            load_records(*arguments)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr(hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    with pytest.raises(UserError) as error:
        load_records("hh-helpful", "train")
    assert (
        "local" in str(error.value)
        and "helpful-base/train.jsonl.gz" in str(error.value)
        and "\n" not in str(error.value)
    )


def test_the_hub_gives_the_official_splits(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    path = write(tmp_path / "test.jsonl.gz", [{"chosen": dialogue("q", "a"), "rejected": dialogue("q", "b")}])
    asked = []
    monkeypatch.setattr(
        hub, "try_to_load_from_cache", lambda repo, name, **kwargs: asked.append(name) or str(path)
    )
    assert len(load_records("hh-harmless", "heldout")) == len(load_records("hh-helpful", "train")) == 1
    assert asked == ["harmless-base/test.jsonl.gz", "helpful-base/train.jsonl.gz"]


# ---------------------------------------------------------------------------------------------------- HH-RLHF


def test_dialogue_pairs(tmp_path):
    good = {
        "chosen": dialogue("q1", "a1", "q2\n\nmore", " yes"),
        "rejected": dialogue("q1", "a1", "q2\n\nmore", "no"),
        "id": 1,
    }
    bad = {
        "with different prompts": (dialogue("q", "a"), dialogue("p", "b")),
        "with an empty answer": (dialogue("q", "a"), dialogue("q", "")),
        "with twice the same answer": (dialogue("q", "a"), dialogue("q", "a")),
        "with a human turn in the answer": (dialogue("q", "a"), dialogue("q", "b", "q")),
        "with an empty turn": (dialogue("q", " ", "q", "a"), dialogue("q", " ", "q", "b")),
        "whose turns do not alternate": (
            dialogue("q", "a") + "\n\nAssistant: b",
            dialogue("q", "a") + "\n\nAssistant: c",
        ),
        "without an assistant's turn": ("\n\nHuman: q", "\n\nHuman: q"),
    }
    path = write(tmp_path / "hh.jsonl", [good] + [{"chosen": c, "rejected": r} for c, r in bad.values()])
    with pytest.warns(UserWarning, match="dropped 7 of 8 pairs") as caught:
        records = loaders.read_records(path)
    assert all(f"1 {reason}" in str(caught[0].message) for reason in bad)
    assert records == [
        {
            "prompt": [
                {"role": "user", "content": "q1"},
                {"role": "assistant", "content": "a1"},
                {"role": "user", "content": "q2\n\nmore"},
            ],
            "chosen": " yes",
            "rejected": "no",
            "id": 1,
        }
    ]


@pytest.mark.skipif(not HH.is_dir(), reason="the HH-RLHF files are not beside the checkout")
@pytest.mark.parametrize(
    "name, total",
    [
        ("helpful-base.test", 2354),
        ("harmless-base.test", 2312),
        ("helpful-online.test", 1137),
        ("helpful-rejection-sampled.test", 2249),
    ],
)
def test_real_dialogues_can_be_put_together_again(name, total):
    path = HH / f"{name}.jsonl.gz"
    originals = {(p["chosen"], p["rejected"]) for p in map(json.loads, gzip.open(path))}
    with pytest.warns(UserWarning, match=f"of {total} pairs"):
        records = loaders.read_records(path)
    assert 0.98 * total < len(records) < total
    for r in records:
        assert [m["role"] for m in r["prompt"]] == (["user", "assistant"] * len(r["prompt"]))[
            : len(r["prompt"])
        ]
        assert r["prompt"][-1]["role"] == "user"
        prefix = dialogue(*(m["content"] for m in r["prompt"]))
        assert tuple(f"{prefix}\n\nAssistant: {r[key]}" for key in ("chosen", "rejected")) in originals
