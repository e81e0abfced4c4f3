"""What counts as a win, a tie and a loss, and what a report says of a run: in one sentence, in alarms, in
tables."""

import numpy as np
import pytest
import torch

from engine.measures import (
    accuracy,
    bootstrap_interval,
    calibration,
    compare,
    measures,
    nag,
    ras,
    right,
    summary,
)
from engine.report import alarms, by_reward, opening, print_samples, report
from reward import ModelReward


def test_one_text_scored_in_two_batches_is_a_tie():
    """Every text was scored twice, in batches of other shapes: its two scores differ by 1e-7 of their size in
    fp32 and by a few thousandths in bf16, and the old comparison called 97 % of 1000 equal texts wins or
    losses."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=1000)
    single = scores * (1 + 1e-7 * rng.normal(size=1000))
    half = scores + 0.001 * rng.uniform(-1, 1, size=1000)
    for other in (single, half):
        assert ras(scores, other) == {"win": 0.0, "tie": 1.0, "loss": 0.0}
        assert nag(scores, other) == {"signed": 0.0, "indicator": 0.0}
        assert accuracy(scores, other) == 0.5
    noisy = scores + 0.3 * rng.normal(
        size=1000
    )  # more than any tolerance may swallow: there the text decides
    assert ras(scores, noisy)["tie"] < 0.02
    assert not compare(scores, noisy, same_text=[True] * 1000).any()


def test_what_differs_is_still_told_apart():
    """A tolerance that ate real differences would be worse than rounding: the spread sets it, not an offset
    and not an outlier."""
    assert compare([1.0, 0.0, 0.5], [0.0, 1.0, 0.5]).tolist() == [1, -1, 0]
    scores = np.linspace(-2, 2, 101)
    assert (compare(scores + 0.02, scores) == 1).all()
    assert (compare(1000 + scores + 0.1, 1000 + scores) == 1).all()  # a score's offset says nothing
    cut = np.where(np.arange(101) % 5 == 0, scores - 1000, scores)  # a fifth of the answers pays a penalty
    assert (compare(cut + 0.02, cut)[np.arange(101) % 5 != 0] == 1).all()
    assert compare([0.5], [0.501]).tolist() == [-1] and compare([0.5], [0.5 + 1e-7]).tolist() == [0]
    assert compare([np.inf, -np.inf, np.inf], [1.0, 1.0, np.inf]).tolist() == [1, -1, 0]
    assert compare(torch.tensor([[2.0, 1.0]]), np.array([[1.0, 2.0]])).tolist() == [[1, -1]]


def test_every_measure_of_pairs_calls_the_same_pairs_ties():
    better = np.array([1.0, 2.0, 3.0, 4.0])
    worse = better + 1e-9
    lengths = [(2, 1), (1, 2), (3, 1), (2, 2)]
    assert right(better, worse).tolist() == [0.5] * 4
    found = measures(np.stack([better, worse], axis=1), lengths)
    assert found["accuracy"] == 0.5 and [b["accuracy"] for b in found["by_length"]] == [0.5] * len(
        found["by_length"]
    )
    assert calibration(better, worse)["bins"] == [{"n": 4, "confidence": pytest.approx(0.5), "accuracy": 0.5}]


def test_a_pairwise_reward_calls_the_same_differences_ties():
    scores = {"y": 1.0, "rounding": 1.0 + 1e-7, "better": 1.5, "worse": -2.0, "near": 1.2}

    def scorer(prompts, groups):
        return [[scores[text] for text in group] for group in groups]

    answers = ["rounding", "better", "worse", "near", "y", "y", "better"]
    cut = [False, False, False, False, False, True, True]
    prompts, chosen = ["q"] * len(answers), ["y"] * len(answers)
    reward = ModelReward(scorer, "rm", missing_eos_penalty=0.9, pairwise=True)
    assert reward(prompts, answers, truncated=cut, chosen=chosen) == [0, 1, -1, 1, 0, -1, -1]
    band = ModelReward(scorer, "rm", missing_eos_penalty=0.9, pairwise=True, tie_band=0.3)
    assert band(prompts, answers, truncated=cut, chosen=chosen) == [0, 1, -1, 0, 0, -1, -1]
    assert reward(prompts, chosen, chosen=chosen) == [0] * len(answers)


ANSWER = {"prompt": "p", "expert": "r", "tokens": 2, "truncated": False, "expert_reward": 1.0}


def test_a_run_that_answers_with_the_expert_texts_ties_with_them():
    """The reward model saw answer and expert answer in different batches; RAS was 0.5 / 0 / 0.5 for a policy
    that had learnt them."""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(40):
        rewards = {"reward": 1.0 + 0.1 * rng.normal(), "expert_reward": 1.0 + 0.1 * rng.normal()}
        samples.append(ANSWER | {"completion": f"text {i}", "expert": f"text {i}"} | rewards)
    assert summary(samples)["ras"] == {"win": 0.0, "tie": 1.0, "loss": 0.0}
    assert summary(samples)["ras_interval"] == (0.0, 0.0)
    # the same words, cut at the limit, are another answer: it did not end, and lost its reward for it
    cut = [s | {"truncated": True, "reward": -1.0} for s in samples]
    assert summary(cut)["ras"] == {"win": 0.0, "tie": 0.0, "loss": 1.0}


def test_few_prompts_have_no_interval():
    rewards = np.arange(30.0)
    many = [ANSWER | {"completion": "c", "reward": r} for r in rewards]
    assert summary(many)["low"] < summary(many)["reward"] < summary(many)["high"]
    few = summary(many[:29])
    assert few["low"] is None and few["high"] is None and few["ras_interval"] is None
    assert measures([[1.0, 0.0]] * 29, [(1, 1)] * 29)["interval"] is None


# ------------------------------------------------------------------------------------------------------------
# The sentence and the alarms


def samples(rewards, expert=0.5, texts=None, floor=None, said=None, **columns):
    """Held-out answers, one per reward, whose texts differ unless they are given; said: by every expert."""
    found = []
    for i, reward in enumerate(rewards):
        sample = {"prompt": f"prompt {i}", "expert": said or f"expert {i}"}
        sample["completion"] = f"answer {i} {reward}"
        sample |= {"reward": float(reward), "expert_reward": float(expert), "tokens": 4, "kl": 2.0}
        sample |= {"truncated": False, **columns}
        if texts is not None:
            sample["completion"] = texts[i]
        if floor is not None:
            sample |= {"floor": "I like it very much.", "floor_reward": floor}
        found.append(sample)
    return found


def test_the_report_opens_with_what_happened_and_how_certain_it_is():
    before, after = samples([0.25] * 40), samples([0.75] * 30 + [0.25] * 10, floor=0.125)
    low, high = bootstrap_interval([0.5] * 30 + [0.0] * 10)
    assert opening(before, after) == (
        f"Held-out reward rose from 0.250 to 0.625 (difference +0.375 [{low:+.3f}, {high:+.3f}], "
        "paired over 40 prompts): "
        "above the expert answers' 0.500, above the no-skill floor 0.125."
    )
    assert opening(after, before).startswith("Held-out reward fell from 0.625 to 0.250 (difference -0.375 [")
    assert opening(after, before).endswith(": below the expert answers' 0.500.")
    same = opening(before, samples([0.25] * 40, floor=0.25))
    assert same == (
        "Held-out reward stayed at 0.250 on each of 40 prompts: below the expert answers' 0.500, "
        "level with the no-skill floor 0.250."
    )
    coin = opening(samples([0, 1] * 20), samples([1, 0] * 20))
    assert (
        "went from 0.500 to 0.500" in coin
        and "may be chance" in coin
        and "level with the expert answers'" in coin
    )


def test_a_collapse_is_not_a_triumph():
    """A run whose answers all became empty was reported as "mean reward 1.000 [1.000, 1.000], NAG +1.000"
    over two prompts."""
    before, after = samples([0.0, 0.0]), samples([1.0, 1.0], texts=["", ""], kl=120.0)
    text = report(before, after)
    first, *rest = text.split("\n\n")[0].splitlines()
    assert first == (
        "Held-out reward went from 0.000 to 1.000 (difference +1.000, over 2 prompts, "
        "too few to tell it from chance): above the expert answers' 0.500."
    )
    assert rest == [f"careful: {alarm}" for alarm in alarms(before, after)] and len(rest) == 4
    assert "[1.000" not in text and "[+1.000" not in text  # no interval of two prompts, anywhere


SOUND = [0.2, 0.8] * 20


def test_a_sound_run_has_no_alarm():
    assert alarms(samples(SOUND), samples(SOUND[::-1])) == []


@pytest.mark.parametrize(
    "after, words",
    [
        (samples(SOUND, texts=["", " \n", "x"] + [f"t {i}" for i in range(37)]), []),  # 1 in 20 may be empty
        (
            samples(SOUND, texts=["", " \n", ""] + [f"t {i}" for i in range(37)]),
            ["8% of the answers", "empty", "before: 0%"],
        ),
        (samples(SOUND, texts=["yes"] * 10 + [f"t {i}" for i in range(30)]), []),
        (
            samples(SOUND, texts=["yes"] * 11 + [f"t {i}" for i in range(29)]),
            ["28% of the prompts", "'yes'", "before: 2%", "expert answers: 2%"],
        ),
        # a task whose expert answers are one text, too: there it is no collapse
        (samples(SOUND, texts=["yes"] * 40, said="yes"), []),
        (samples([0.5] * 40), ["every answer after training earns the same, 0.500"]),
        (samples(SOUND[:29]), ["29 held-out prompts are fewer than 30"]),
        (samples(SOUND, kl=8.0), []),  # 2 nats a token
        (samples(SOUND, kl=8.4), ["the KL to the reference is 2.1 nats a token"]),
        (samples(SOUND, kl=float("inf")), ["the KL to the reference is inf nats a token"]),
        (samples(SOUND, truncated=True), ["100% of the answers after training were cut", "before: 0%"]),
    ],
)
def test_alarms_by_hand(after, words):
    found = alarms(samples(SOUND[: len(after)]), after)
    assert len(found) == bool(words) and all(word in found[0] for word in words)


def test_alarm_of_a_reward_that_never_varied_and_of_experts_that_fail():
    assert alarms(samples([0.5] * 40), samples([0.5] * 40)) == [
        "the reward never varied: 0.500 for every answer, before and after"
    ]
    before, after = samples([0, 1] * 20), samples([1, 1, 1, 0] * 10)
    for passing, words in ((21, []), (20, ["50% of the expert answers earn nothing"])):
        for part in (before, after):
            for i, sample in enumerate(part):
                sample["expert_reward"] = float(i < passing)
        found = alarms(before, after)
        assert len(found) == len(words) and all(word in alarm for word, alarm in zip(words, found))
    for sample in after:
        sample["reward"] -= 0.5  # on another scale nobody knows what failing is
    assert alarms(before, after) == []


def test_the_floor_stands_in_the_table_and_beside_the_answers():
    text = report(samples([0.0] * 40, floor=0.125), samples([1.0, 0.0] * 20, floor=0.125))
    assert "no-skill floor (constant answer)" in text and text.count("0.125") == 3 + 4
    assert text.count("no skill   I like it very much.  (0.125)") == 4
    assert "floor" not in report(samples([0.0] * 40), samples([1.0, 0.0] * 20))


def test_a_run_by_one_reward_in_four_lines():
    lines = by_reward(samples([0.0] * 40), samples([1.0, 0.0] * 20))
    gain = bootstrap_interval([1.0, 0.0] * 20)
    assert len(lines) == 4 and lines[0] == opening(samples([0.0] * 40), samples([1.0, 0.0] * 20))
    assert (
        "RAS 0.000 [0.000, 0.000] / 0.000 / 1.000" in lines[1] and "quartiles 0.000 0.500 1.000" in lines[2]
    )
    assert lines[3] == f"NAG     +0.500 [{gain[0]:+.3f}, {gain[1]:+.3f}] (wins alone 0.500)"
    assert "[" not in "".join(by_reward(samples([0.0] * 8), samples([1.0] * 8)))


def test_a_run_scored_again_has_its_alarms_once_and_no_floor_of_another_reward(capsys):
    before = samples(SOUND, floor=0.125)
    after = samples(SOUND[::-1], texts=[""] * 40, floor=0.125)

    def reward_fn(prompts, completions, chosen, truncated=None):
        return [float(len(text) % 2) for text in completions]

    print_samples("run/samples.jsonl", "length", reward_fn, before, after)
    recorded, other = capsys.readouterr().out.split("by length")
    assert recorded.startswith(
        "40 held-out prompts of run/samples.jsonl\nby the reward of the run\n  Held-out"
    )
    assert recorded.count("careful: 100% of the answers after training are empty") == 1
    assert "no-skill floor 0.125" in recorded and "floor" not in other
    assert "empty" not in other and "careful: every answer after training earns the same, 0.000" in other
