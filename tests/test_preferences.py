"""Preference pairs: which are used, on which side of a split, and what a reward model is reported with."""

import json

import numpy as np
import pytest

import reward
import reward_model
from data import UserError, load_records
from engine import measures, pairs
from engine.report import report, report_pairs


def test_pairs_that_cannot_be_used_are_counted_and_named(capsys):
    def record(prompt, chosen, rejected="b"):
        return {"prompt": prompt, "chosen": chosen} | ({} if rejected is None else {"rejected": rejected})

    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "more"},
    ]
    records = [
        record("fine", "a"),
        record("same", "b "),
        record("empty", "a", " "),
        record("long", "a " * 9),
        record("none", "a", None),
        record(turns, "a"),
    ]
    kept, left = pairs.usable_pairs(records, lambda p, a: len(a.split()), 8, "FILE", {"hello"})
    assert [r["prompt"] for r in kept] == ["fine"] and kept[0]["tokens"] == [1, 1]
    reasons = (
        "twice the same answer",
        "an empty answer",
        "longer than 8",
        "without a rejected",
        "of a dialogue that is measured on",
    )
    assert all(any(reason in key for key in left) for reason in reasons) and list(left.values()) == [1] * 5
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and all(reason in said for reason in left)
        and "'long'" in said
        and "5 of 6" in said
    )
    with pytest.raises(UserError, match="no pair to use, left out 1 with twice the same answer"):
        pairs.usable_pairs(records[1:2], lambda p, a: 1, 8, "FILE")


def test_no_dialogue_is_on_both_sides():
    records = [
        {
            "prompt": [{"role": "user", "content": f"opening {i % 7}"}]
            + [{"role": "user", "content": str(i)}] * (i % 3)
        }
        for i in range(40)
    ]
    rest, apart = pairs.set_apart(records, 13, seed=0)
    assert len(rest) + len(apart) == 40 and 6 <= len(apart) <= 13
    assert not {pairs.dialogue(r["prompt"]) for r in rest} & {pairs.dialogue(r["prompt"]) for r in apart}


def test_a_held_out_dialogue_is_not_trained_on_even_where_it_is_too_long_to_be_measured(
    tmp_path, monkeypatch
):
    """A policy is evaluated on the held-out prompts, whatever their answers' length."""
    turns = [{"role": "user", "content": "list 3 animals"}, {"role": "assistant", "content": "cat dog fox"}]
    records = [
        {
            "prompt": [
                turns[0] | {"content": f"list {i % 30} animals"},
                turns[1],
                turns[0] | {"content": f"list {i} colors"},
            ],
            "chosen": "red " * (60 if i % 3 == 0 else 1),  # so all answers of a third of the dialogues
            "rejected": "cat",
            # a file that splits by turn, against better advice: six long ones, four short ones
            "split": "heldout" if i in range(30, 36) or i in range(6, 10) else "train",
        }
        for i in range(90)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    seen = {}

    def usable(records, tokens, most, name, elsewhere=frozenset(), real=pairs.usable_pairs):
        seen[name] = real(records, tokens, most, name, elsewhere)
        return seen[name]

    def stop(*_, **__):
        raise UserError("far enough")

    monkeypatch.setattr(pairs, "usable_pairs", usable)
    monkeypatch.setattr(reward_model, "fit_scorer", stop)
    assert (
        reward.main(
            [
                "train",
                "--model",
                "tiny",
                "--quantize",
                "none",
                "--data",
                str(path),
                "--max-tokens",
                "48",
                "--out",
                str(tmp_path / "rm"),
            ]
        )
        == 2
    )
    held_out = {pairs.dialogue(r["prompt"]) for r in load_records(path, "heldout")}
    measured = {pairs.dialogue(r["prompt"]) for r in seen["pairs.jsonl, held-out split"][0]}
    trained = {pairs.dialogue(r["prompt"]) for r in seen["training"][0]}
    assert measured < held_out and trained and not trained & held_out


def test_calibration_by_hand():
    logit = lambda p: float(np.log(p / (1 - p)))  # noqa: E731
    # two pairs at confidence 0.9, one right; two at 0.6, both right; a tie at 0.5, right by half
    better, worse = [logit(0.9), 0.0, logit(0.6), logit(0.6), 1.0], [0.0, logit(0.9), 0.0, 0.0, 1.0]
    c = measures.calibration(better, worse, bins=4)
    assert c["ece"] == pytest.approx((2 * 0.4 + abs(2.5 - (0.6 + 0.6 + 0.5))) / 5)
    assert [b["n"] for b in c["bins"]] == [3, 2] and c["bins"][1]["accuracy"] == 0.5


def test_a_length_shortcut_is_visible():
    lengths = [(5, 3), (9, 2), (2, 4), (3, 8), (4, 4)] * 6
    m = measures.measures([[float(a), float(b)] for a, b in lengths], lengths)
    assert m["accuracy"] == m["longer_wins"] == 0.5 and m["prefers_longer"] == 1.0
    assert m["correlation_with_length"] == pytest.approx(1.0)
    # on the same pairs it is right where length is, and only there
    assert m["over_longer"] == 0 and m["over_longer_interval"] == (0, 0)
    assert [b["accuracy"] for b in m["by_length"]][0] == 0.0 and [b["accuracy"] for b in m["by_length"]][
        -1
    ] == 1.0
    assert sum(b["n"] for b in m["by_length"]) == 30
    m = measures.measures([[1.0, 0.0]] * 30, [(5, 3), (3, 5), (4, 4)] * 10)
    assert (
        m["over_longer"] == 0.5
        and report_pairs("x", m).count("over the longer one, same pairs +0.500 [") == 1
    )
    assert (
        measures.measures([[1.0, 1.0]], [(3, 3)])["accuracy"] == 0.5
    )  # one pair, all equal: nothing divides by 0


def test_report_has_intervals_and_quartiles():
    one = {
        "prompt": "p",
        "expert": "r",
        "completion": "c",
        "tokens": 2,
        "truncated": False,
        "expert_reward": 1.0,
    }
    before = [one | {"reward": 0.0}] * 32
    after = [one | {"reward": 2.0, "completion": "d"}] * 24 + [one | {"reward": -1.0, "completion": "e"}] * 8
    text = report(before, after)
    wins = measures.bootstrap_interval([1.0] * 24 + [0.0] * 8)
    gain = measures.bootstrap_interval([1.0] * 24 + [-1.0] * 8)
    assert "-" not in str(wins)
    assert f"[{wins[0]:.3f}, {wins[1]:.3f}]" in text and f"[{gain[0]:+.3f}, {gain[1]:+.3f}]" in text
    assert "1.250 / 2.000 / 2.000" in text and "1.299" in text  # sqrt(27/16)
    # fewer prompts than an interval can speak of: none is printed
    assert "95 %" not in report(before[:29], after[:29]).replace("mean reward [95 % interval]", "")
    assert "[" not in report(before[:29], after[:29]).replace("mean reward [95 % interval]", "")
