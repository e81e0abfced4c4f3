"""Discriminators: what they read, what they learn from, and how they are tested; and the script that makes
expert answers.
"""

import json
import random
from collections import Counter

import pytest
import torch
from conftest import randomise_all
from test_uniapl import FEW, SMALL, trainer

import discriminator
import train
from data import UserError, chat_tasks, load_records, tiny_tasks
from data.chat_tasks import another_answer as another_chat_answer
from data.tiny_tasks import another_answer as another_tiny_answer
from discriminator import DiscriminatorConfig, another_expert, condition, expert_pairs, measure, scores
from engine.folders import read_jsonl
from engine.settings import check_settings
from policy import Policy
from uniapl import UNIAPL, command_line

PROMPTS, EXPERTS = [[5, 6, 7], [8, 9]], [[20, 21, 3], [22, 3]]
CANDIDATES = [[[10, 11, 12, 3], [14, 3]], [[15, 16, 3], [17, 18, 19]]]


@pytest.fixture(scope="module")
def policy(load):
    policy = load()
    randomise_all(policy.add_role("discriminator"))
    return policy


@pytest.fixture(scope="module")
def tiny():
    return Policy.load("tiny", quantize="nf4")


def config(**changes):
    return check_settings(DiscriminatorConfig(model="tiny", **{"pairs": 40, **changes}))


# ----------------------------------------------------------------------------------------------------------
# scores


def alone(policy, role, ids):
    """Hidden states of one sequence by itself."""
    with torch.no_grad(), policy.role(role):
        return policy.hidden(discriminator.Pack([ids[:1]], [[ids[1:]]], policy.device))


@pytest.mark.parametrize("most", (1, 4096))
def test_polar_reads_prompt_expert_prompt_candidate(policy, most):
    """The score is that of `q y q o` alone, at o's last token; the other candidates of the pack change
    nothing.
    """
    found = scores("polar", policy, PROMPTS, EXPERTS, CANDIDATES, most)
    for q, y, group, row in zip(PROMPTS, EXPERTS, CANDIDATES, found):
        for o, D in zip(group, row):
            state = alone(policy, "discriminator", q + y + q + o)[-1]
            assert D == pytest.approx(policy.heads["discriminator"](state).item(), rel=1e-3, abs=1e-4)
    others = scores("polar", policy, PROMPTS, EXPERTS[::-1], CANDIDATES, most)
    assert all(
        abs(a - b) > 1e-3 for x, y in zip(found, others) for a, b in zip(x, y)
    )  # it does compare with the expert


def test_cotrained_does_not_see_the_expert_beside_the_candidate(policy):
    found = scores("cotrained", policy, PROMPTS, EXPERTS, CANDIDATES)
    assert found == scores("cotrained", policy, PROMPTS, EXPERTS[::-1], CANDIDATES)
    state = alone(policy, "discriminator", PROMPTS[0] + CANDIDATES[0][0])[-1]
    assert found[0][0] == pytest.approx(policy.heads["discriminator"](state).item(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("most", (1, 4096))
def test_embedding_is_the_cosine_of_mean_states_of_the_backbone(policy, most):
    found = scores("embedding", policy, PROMPTS, EXPERTS, CANDIDATES, most)
    for q, y, group, row in zip(PROMPTS, EXPERTS, CANDIDATES, found):
        mean = {i: alone(policy, "backbone", q + o)[len(q) :].mean(0) for i, o in enumerate([*group, y])}
        for i, D in enumerate(row):
            assert D == pytest.approx(
                float(torch.cosine_similarity(mean[i], mean[len(group)], dim=0)), abs=1e-4
            )
    assert scores("embedding", policy, PROMPTS, EXPERTS, [[y] for y in EXPERTS]) == [[pytest.approx(1)]] * 2
    with_adapter = alone(policy, "policy", PROMPTS[0])
    assert (
        with_adapter - alone(policy, "backbone", PROMPTS[0])
    ).abs().max() > 0.01  # so the adapter would show


# ----------------------------------------------------------------------------------------------------------
# pairs


@pytest.mark.parametrize(
    "make, another",
    ((tiny_tasks, another_tiny_answer), (chat_tasks, another_chat_answer)),
    ids=("tiny", "chat"),
)
def test_a_second_reference_is_another_text_of_the_same_kind(make, another):
    from reward import verifier

    records, rng = make("train", 1000), random.Random(0)
    texts = [another(r, rng) for r in records]
    assert all(text != r["chosen"] for text, r in zip(texts, records))
    columns = {k: [r.get(k) for r in records] for k in ("prompt", "constraints", "min_words", "about")}
    passed = [
        sum(verifier(columns["prompt"], answers, **{k: v for k, v in columns.items() if k != "prompt"}))
        / 1000
        for answers in ([r["chosen"] for r in records], texts)
    ]
    assert abs(passed[0] - passed[1]) < 0.08  # neither a better nor a worse expert


def test_roles_of_a_pair_are_random_and_never_the_same_text(tiny):
    """A fixed order of the two experts, or a copy of the reference as the positive, is learnt in their
    place.
    """
    c, records = config(max_new_tokens=24), load_records("tasks", "train", 200, seed=1, level="tiny")
    pairs, where = expert_pairs(tiny, records, c, 3), Counter()
    assert pairs == expert_pairs(tiny, records, c, 3)
    asked = [(tiny.encode_prompt(r["prompt"]), tiny.encode_answer(r["chosen"])) for r in records]
    for prompt, positive, negative in pairs:
        q, chosen = next((q, y) for q, y in asked if prompt[: len(q)] == prompt[-len(q) :] == q)
        reference = prompt[len(q) : -len(q)]
        assert prompt == condition(q, reference) and positive != reference and negative != positive
        assert (
            chosen in (reference, positive) and positive[-1] == reference[-1] == tiny.tokenizer.eos_token_id
        )
        where["reference" if reference == chosen else "positive"] += 1
    assert len(pairs) >= 195 and min(where.values()) > 70
    near, far = (
        [abs(len(p[1]) - len(p[2])) for p in expert_pairs(tiny, records, c, 3, draws)] for draws in (8, 1)
    )
    assert sum(near) < 0.5 * sum(far)  # of eight samples the one nearest in length


def test_experts_of_a_file():
    c, record = config(data="file.jsonl"), {"prompt": "list 2 animals", "chosen": "cat dog"}
    assert another_expert(record, c) is None and another_expert(record | {"experts": ["cat dog"]}, c) is None
    several = record | {"experts": ["cat dog", "ant fox", "bear lion"]}
    assert {another_expert(several, config(data="file.jsonl", seed=s)) for s in range(20)} == {
        "ant fox",
        "bear lion",
    }
    with pytest.raises(UserError, match="experts"):
        another_expert(record | {"experts": ["", "cat"]}, c)


def test_pairs_that_cannot_be_used_are_counted_or_refused(tiny, capsys):
    c = config(data="file.jsonl", max_new_tokens=8)
    good, short = (
        {"prompt": "list 2 animals", "chosen": "cat dog", "experts": ["ant fox"]},
        {"prompt": "list 3 fruits", "chosen": "plum"},
    )
    long = {"prompt": "list 2 animals", "chosen": "cat " * 300, "experts": ["ant"]}
    assert len(expert_pairs(tiny, [good, short, long], c, 0)) <= 1
    assert "left out 1 records without a second expert answer and 1 longer" in capsys.readouterr().err
    with pytest.raises(UserError, match="embedding or cotrained"):
        expert_pairs(tiny, [short], c, 0)


# ------------------------------------------------------------------------------------------------------
# learning, testing


def test_polar_learns_what_sets_the_expert_apart(tiny_file):
    """An expert who always ends with "bye" is told from the policy on unseen prompts, whatever the length."""
    c = config(data=str(tiny_file), pairs=100, epochs=4, lr=3e-3, max_new_tokens=12)
    policy = Policy.load("tiny", quantize="nf4")
    unseen = expert_pairs(policy, load_records(c.data, "heldout", 40), c, 5)
    known, _ = discriminator.train_polar(policy, c, pairs=100, epochs=4, lr=3e-3)
    name, n, share, low, high = measure(policy, known, unseen, 4096)[0]
    assert name == "all" and n == len(unseen) and share > 0.85 and low <= share <= high


@pytest.fixture
def tiny_file(tmp_path):
    rng = random.Random(0)
    records = [
        r | {"chosen": r["chosen"] + " bye", "experts": [another_tiny_answer(r, rng) + " bye"]}
        for r in tiny_tasks("train", 250)
    ]
    (tmp_path / "bye.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return tmp_path / "bye.jsonl"


def test_the_test_splits_by_length_and_names_the_floor(monkeypatch):
    """By hand: four pairs, expert 1 longer, 2 longer, equal, 1 shorter; right, wrong, a tie, right."""
    pairs = [([1], [1] * n, [1] * m) for n, m in ((3, 2), (3, 1), (2, 2), (1, 2))]
    monkeypatch.setattr(
        discriminator, "group_scores", lambda *_: [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [2.0, 1.0]]
    )
    found = {name: (n, share) for name, n, share, _, _ in measure(None, pairs, pairs, 0)}
    by_length = {"expert shorter": (1, 1.0), "same length": (1, 0.5), "expert longer": (2, 0.5)}
    assert found == by_length | {"all": (4, 0.625), "length alone: the longer one": (4, 0.625)}
    assert "length alone: the shorter one" in [
        row[0] for row in measure(None, [([1], [1], [1, 1])], pairs, 0)
    ]


def test_judge_scores_samples_and_a_second_expert():
    t = trainer("a-grpo", "--discriminator", "polar")
    batch = t.rollout(t.next_records())
    D, metrics = discriminator.judge(t, "polar", batch)
    plain = scores("polar", t.policy, batch.prompts, batch.experts, batch.completions)
    torch.testing.assert_close(D, torch.tensor(plain), rtol=1e-3, atol=1e-4)
    seconds = [[t.policy.encode_answer(another_expert(r, t.config))] for r in batch.records]
    expert = [row[0] for row in scores("polar", t.policy, batch.prompts, batch.experts, seconds)]
    wins = [(e > o) + 0.5 * (e == o) for e, row in zip(expert, plain) for o in row]
    assert metrics["score/expert"] == pytest.approx(sum(expert) / 3, abs=1e-4) and metrics[
        "score/accuracy"
    ] == pytest.approx(sum(wins) / 12)
    t.config.data, batch.records = (
        "file.jsonl",
        [{k: v for k, v in r.items() if k != "experts"} for r in batch.records],
    )
    assert (
        "score/expert" not in discriminator.judge(t, "embedding", batch)[1]
    )  # y beside itself would say nothing


def test_a_reward_model_is_no_discriminator(tiny, tmp_path, capsys):
    policy = Policy.load("tiny", quantize="nf4")
    policy.add_role("reward")
    policy.save_role("reward", tmp_path / "rm")
    assert (
        command_line([*SMALL, *FEW, "--discriminator", str(tmp_path / "rm"), "--out", str(tmp_path / "run")])
        == 2
    )
    assert "made by python uniapl.py discriminator" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# teach


def test_teacher_answers_pass_and_are_distinct(tmp_path, capsys):
    out = tmp_path / "teacher.jsonl"
    flags = [
        "teach",
        "--model",
        "tiny",
        "--quantize",
        "nf4",
        "--prompts",
        "40",
        "--samples",
        "6",
        "--max-new-tokens",
        "24",
        "--out",
        str(out),
    ]
    assert command_line(flags) == 0
    said, records = capsys.readouterr().out, [json.loads(line) for line in out.read_text().splitlines()]
    from reward import verifier

    prompts = {r["prompt"] for r in tiny_tasks("train", 40)}
    for r in records:
        answers = [r["chosen"], *r["experts"]]
        assert r["prompt"] in prompts and len(set(answers)) == len(answers) <= 6 and "rejected" not in r
        assert verifier(
            [r["prompt"]] * len(answers), answers, constraints=[r["constraints"]] * len(answers)
        ) == [1.0] * len(answers)
    assert (
        "240 answers to 40 prompts" in said
        and f"{len(records)} prompts kept" in said
        and 5 < len(records) < 40
    )
    assert load_records(str(out), "train")  # it is data for the methods
    assert command_line(flags) == 2 and "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, said",
    (
        (["--samples", "0"], "--samples 0"),
        (["--temperature", "0"], "--temperature"),
        (["--model", "nowhere"], "model nowhere"),
        (["--max-new-tokens", "1"], "nothing to write"),
        (["--data", "PLAIN"], "constraints"),
    ),
)
def test_teach_refuses_what_cannot_work(flags, said, tmp_path, capsys):
    (tmp_path / "plain.jsonl").write_text(
        "".join(json.dumps({"prompt": f"list {n} animals", "chosen": "cat"}) + "\n" for n in range(9))
    )
    flags = [str(tmp_path / "plain.jsonl") if f == "PLAIN" else f for f in flags]
    assert (
        command_line(
            [
                "teach",
                "--model",
                "tiny",
                "--prompts",
                "3",
                "--samples",
                "2",
                "--out",
                str(tmp_path / "t.jsonl"),
                *flags,
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "t.jsonl").exists()


def test_a_runs_polar_discriminator_stays_with_it_and_repeats_it(tmp_path):
    """Which of its checkpoints is kept hangs on rounding, so that another CPU could not repeat a run of
    UniAPL.
    """
    small = "--model tiny --device cpu --quantize none --steps 1 --prompts-per-step 2 --group-size 2"
    small += " --eval-prompts 2"
    small += " --discriminator-pairs 20 --discriminator-epochs 1"
    for name, kind in (("run", "polar"), ("again", tmp_path / "run" / "discriminator")):
        flags = [*small.split(), "--discriminator", str(kind), "--out", str(tmp_path / name)]
        assert train.main(UNIAPL, flags) == 0
    assert {p.name for p in (tmp_path / "run" / "discriminator").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "discriminator.json",
    }
    assert not (tmp_path / "again" / "discriminator").exists()  # it was not trained there

    def numbers(name):
        lines = read_jsonl(tmp_path / name / "metrics.jsonl")
        unlike = ("time/", "memory/", "tokens/per_second")
        return [{k: v for k, v in line.items() if not k.startswith(unlike)} for line in lines]

    assert numbers("run") == numbers("again") and "score/policy" in numbers("run")[1]
