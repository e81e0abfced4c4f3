"""A user's own reward: the file that is loaded, the function that is called, and every way in which they
fail.
"""

import sys

import pytest

import reward
from data import UserError
from engine.user_rewards import checked_rewards


def load(tmp_path, text, function="f"):
    (tmp_path / "mine.py").write_text(text)
    return reward.load_reward(f"{tmp_path / 'mine.py'}:{function}")


def refused(function, *words):
    with pytest.raises(UserError) as error:
        checked_rewards(function, ["p", "p"], ["a", "b"], {})
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert all(word in str(error.value) for word in words), error.value


# ------------------------------------------------------------------------------------------------------------
# The function


def test_a_function_that_changes_its_arguments_changes_copies():
    """samples.jsonl showed the stripped completions and the sorted constraints as if the run had had them."""

    def vandal(prompts, completions, words, **columns):
        prompts[0][0]["content"] = "another"
        completions[:] = ["x"] * len(completions)
        words[0].clear()
        return [1.0, 2.0]

    prompts, completions, words = [[{"role": "user", "content": "q"}], "p"], ["a", "b"], [["bee"], ["hive"]]
    assert checked_rewards(vandal, prompts, completions, {"words": words}) == [1.0, 2.0]
    assert prompts[0][0]["content"] == "q" and completions == ["a", "b"] and words == [["bee"], ["hive"]]


@pytest.mark.parametrize("value", (1e39, -1e39, 10**400, 3.5e38))
def test_a_reward_beyond_fp32_is_refused(value):
    """Finite as Python's float and infinite in the tensor: it trained to the end and wrote Infinity in the
    log.
    """
    refused(lambda **_: [1.0, value], "item 1", "beyond fp32")


def test_the_largest_reward_of_fp32_is_one():
    torch = pytest.importorskip("torch")
    largest = torch.finfo(torch.float32).max
    rewards = checked_rewards(lambda **_: [largest, -largest], ["p", "p"], ["a", "b"], {})
    assert torch.tensor(rewards).isfinite().all()


class Broken:
    """What a user's own class may do."""

    def __init__(self, kind):
        self.kind = kind

    def tolist(self):
        if self.kind == "tolist":
            raise ValueError("no list\nto be had")
        return self

    def __repr__(self):
        raise RuntimeError("no words")


class Speechless(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def test_rewards_that_cannot_be_read_or_shown_are_one_line():
    """tolist was called, and repr taken, outside of what catches a user's errors."""
    refused(lambda **_: Broken("tolist"), "ValueError: no list to be had")
    refused(lambda **_: [Broken("tolist"), 1.0], "ValueError")
    refused(lambda **_: [1.0, Broken("repr")], "item 1 is a Broken")

    def raises(**_):
        raise Speechless

    refused(raises, "Speechless")


def test_a_function_that_ends_the_program_is_an_error():
    """sys.exit() in a reward ended the run with status 0, as if it had finished."""
    refused(lambda **_: sys.exit(0), "SystemExit")


# ------------------------------------------------------------------------------------------------------------
# The file


def test_a_file_with_postponed_annotations_and_a_dataclass(tmp_path):
    """A dataclass looks its module up in sys.modules; the file was not there while it ran."""
    f = load(
        tmp_path,
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Rule:\n"
        "    worth: float = 2.0\n"
        "def f(prompts, completions, **columns):\n"
        "    return [Rule().worth for _ in completions]\n",
    )
    assert checked_rewards(f, ["p"], ["a"], {}) == [2.0]


def test_a_file_imports_its_neighbours_and_is_not_mistaken_for_ours(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("WORTH = 3.0\n")
    (tmp_path / "reward.py").write_text(
        "from neighbour_of_mine import WORTH\n"
        "def f(completions, **_):\n"
        "    return [WORTH] * len(completions)\n"
    )
    before = list(sys.path)
    f = reward.load_reward(f"{tmp_path / 'reward.py'}:f")
    assert checked_rewards(f, ["p"], ["a"], {}) == [3.0]
    assert sys.path == before and sys.modules["reward"] is reward


@pytest.mark.parametrize(
    "text, function, word",
    (
        ("import sys; sys.exit(0)", "f", "SystemExit"),
        ("1 / 0", "f", "ZeroDivisionError"),
        ("def f(:", "f", "SyntaxError"),
        ("import no_such_neighbour", "f", "ModuleNotFoundError"),
        ("f = 1", "f", "f is a int, not a function"),
        ("f = 1", "g", "AttributeError"),
    ),
)
def test_files_that_cannot_be_used(tmp_path, text, function, word):
    before = list(sys.path)
    with pytest.raises(UserError, match=word) as error:
        load(tmp_path, text, function)
    assert "\n" not in str(error.value) and "--reward" in str(error.value) and sys.path == before


def test_names_that_are_no_reward(tmp_path):
    with pytest.raises(UserError, match="no file"):
        reward.load_reward(f"{tmp_path}/nowhere.py:f")
    with pytest.raises(UserError, match="choose verifier, FILE.py:FUNCTION"):
        reward.load_reward("verifyer")
    assert reward.load_reward("verifier") is reward.verifier
    assert reward.load_reward("owner/model") is None  # loaded once the policy is there
