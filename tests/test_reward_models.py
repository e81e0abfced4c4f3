"""Reward models: Bradley-Terry against TRL, scores against transformers' classifiers, the judge against a
dense model, and the commands end to end.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch
import transformers
from conftest import dense_logps, randomise_all, write_model, write_tokenizer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_classifier import PROMPTS, write_classifier

import policy as policy_module
import reward
import reward_model
import train
from data import load_records
from engine.record import read_jsonl
from engine.settings import check_settings
from minigrao import GRAO

ROOT = Path(__file__).parents[1]


# ------------------------------------------------------------------------------------------------------------
# Reward functions


class Lengths:
    """A scorer that says how many words an answer has, and remembers what it was asked."""

    def __call__(self, prompts, groups):
        self.asked = list(zip(prompts, groups))
        return [[float(len(text.split())) for text in group] for group in groups]


def test_raw_scores_ask_once_for_each_prompt_and_text():
    scorer = Lengths()
    f = reward.ModelReward(scorer, "rm", missing_eos_penalty=0.5)
    completions = ["a b", "a b", "", [{"role": "assistant", "content": "a b c"}]]
    prompt = [{"role": "user", "content": "q"}]
    assert f(
        prompts=[prompt, prompt, "p", prompt],
        completions=completions,
        truncated=[False, True, False, False],
        other=[1] * 4,
    ) == [2.0, 1.5, 0.0, 3.0]
    assert scorer.asked == [(prompt, ["a b", "a b c"]), ("p", [""])]
    assert f(prompts=["p"], completions=["x"]) == [1.0]  # as TRL calls it


def test_pairwise_by_hand():
    """R(o, y): the sign of the difference, a tie within the band, 0 for y itself, and a cut sample pays
    before the comparison.
    """
    scorer = Lengths()
    f = reward.ModelReward(scorer, "rm", missing_eos_penalty=1.0, pairwise=True, tie_band=1.0)
    completions = ["1 2 3 4", "1 2 3", "1 2", "1", "", "1 2 3 4", "1 2"]
    cut = [False, False, False, False, False, True, True]
    assert f(["q"] * 7, completions, truncated=cut, chosen=["1 2"] * 7) == [
        1.0,
        0.0,
        0.0,
        0.0,
        -1.0,
        0.0,
        0.0,
    ]
    assert reward.ModelReward(scorer, "rm", pairwise=True)(
        ["q"] * 3, ["1 2 3", "1", "3 4"], chosen=["1 2"] * 3
    ) == [1.0, -1.0, 0.0]
    scorer.asked = None
    assert (
        f(["q", "r"], ["1 2", "3"], chosen=["1 2", "3"]) == [0.0, 0.0] and scorer.asked == []
    )  # a reference is not compared with itself


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory):
    """A random model whose tokenizer has the letters A and B."""
    directory = tmp_path_factory.mktemp("chat")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conftest, "WORDS", [*conftest.WORDS[:-2], "A", "B"])
        write_model(directory, "qwen3", max_position_embeddings=512)
        write_tokenizer(directory)
    return str(directory)


def test_the_judge_reads_the_log_probs_of_its_verdict_and_asks_in_both_orders(chat_dir):
    policy = policy_module.Policy.load(chat_dir, device="cpu", dtype="float32", lora_rank=4)
    conftest.randomise(policy)  # the policy's own adapter must not judge
    judge = reward_model.Judge(policy, "chat", "harmless", most=50)
    cases = [("list 3 animals", "cat dog", "w7"), (PROMPTS[1], "w8 w9", "cat"), ("w30", "", "w31")]
    odds, said = judge.log_odds(*zip(*cases))
    base = transformers.AutoModelForCausalLM.from_pretrained(chat_dir, dtype=torch.float32).requires_grad_(
        False
    )
    total = 0.0
    for row, (prompt, o, y) in zip(odds.tolist(), cases):
        for value, (a, b), sign in zip(row, ((o, y), (y, o)), (1, -1)):
            ids = judge.question(prompt, a, b)
            log_a, log_b = (dense_logps(base, ids, policy.tokenizer.encode(letter))[0][0] for letter in "AB")
            assert value == pytest.approx(sign * float(log_a - log_b), abs=1e-4)
            total += float(log_a.exp() + log_b.exp())
    assert said == pytest.approx(total / 6, rel=1e-3)
    text = policy.tokenizer.decode(judge.question(*cases[0]))
    assert text.index("cat dog") < text.index("w7") and text.endswith("assistant <think> </think>")
    swapped = judge.log_odds(*([c[i] for c in cases] for i in (0, 2, 1)))[0]
    torch.testing.assert_close(swapped, -odds.flip(1))  # the other answer's case, seen from the other side


def test_verdicts_by_hand(monkeypatch):
    rows = {(1, 2): 1.0, (-1, -2): -1.0, (3, -3): 0.0, (-3, 3): 0.0, (0, 2): 0.0, (0, 0): 0.0}
    assert [reward_model.verdict(torch.tensor(row)) for row in rows] == list(rows.values())
    judge = object.__new__(reward_model.Judge)
    judge.log_odds = lambda prompts, answers, experts: (torch.tensor([[1.0, 1.0]] * len(prompts)), 1.0)
    assert judge(["q"] * 3, ["a", "y", "cut"], chosen=["y"] * 3, truncated=[False, False, True]) == [
        1.0,
        0.0,
        -1.0,
    ]


def test_position_bias_is_measured(capsys):
    judge = SimpleNamespace(
        log_odds=lambda *cases: (torch.tensor([[2.0, -1.0], [2.0, -1.0], [2.0, 1.0], [1.0, -2.0]]), 0.9)
    )
    assert reward.print_position([("q", "a", "b")] * 4, judge).tolist() == [0.0, 0.0, 1.0, 0.0]
    assert (
        "A wins 0.875 of the questions" in capsys.readouterr().out
    )  # 4 of 4 shown first, 3 of 4 shown second


# ------------------------------------------------------------------------------------------------------------
# The commands


def command(*flags):
    return reward.main([str(f) for f in flags])


SMALL = ["--model", "tiny", "--device", "cpu", "--train-pairs", "160", "--epochs", "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A reward model of the real script."""
    out = tmp_path_factory.mktemp("rm") / "reward"
    flags = ["train", *SMALL, "--quantize", "none", "--out", out]
    return out, subprocess.run(
        [sys.executable, ROOT / "reward.py", *flags], capture_output=True, text=True, cwd=ROOT
    )


def test_train_writes_a_reward_model_that_beats_the_floors(trained):
    out, process = trained
    assert process.returncode == 0, process.stderr
    files = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "reward_model.json",
        "metrics.jsonl",
        "scores.jsonl",
        "calibration.png",
    }
    assert {p.name for p in out.iterdir()} == files
    for words in (
        "accuracy [95 % interval]",
        "the longer one wins (tokens)",
        "random",
        "expected calibration error",
        "share no dialogue",
    ):
        assert words in process.stdout
    info = json.loads((out / "reward_model.json").read_text())
    (m,) = info["evaluation"].values()
    assert (
        m["accuracy"] > 0.55
        and m["interval"][0] < m["accuracy"] < m["interval"][1]
        and m["pairs"] == len(read_jsonl(out / "scores.jsonl"))
    )
    assert (
        info["base"] == "tiny"
        and info["split"]["training"] == 160
        and info["settings"]["seed"] == 0
        and info["environment"]["versions"]
    )
    assert [line["step"] for line in read_jsonl(out / "metrics.jsonl")] == [2, 4, 6, 8, 10]


def test_a_reward_model_is_a_classifier_of_transformers(trained):
    out, _ = trained
    policy = policy_module.Policy.load("tiny", device="cpu")
    pad = policy.tokenizer.convert_tokens_to_ids("cat")  # any id but EOS, at which every text ends
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        policy.source, num_labels=1, pad_token_id=pad, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(base, str(out)).eval()
    records = [r for r in load_records("tasks", "heldout", level="tiny") if r["chosen"] != r["rejected"]]
    for record, line in list(zip(records, read_jsonl(out / "scores.jsonl"), strict=True))[:8]:
        for text, score in zip((record["chosen"], record["rejected"]), line["scores"]):
            ids = torch.tensor([policy.encode_prompt(record["prompt"]) + policy.encode_answer(text)])
            assert float(model(ids).logits[0, 0]) == pytest.approx(score, abs=2e-3)


def test_score_gives_the_numbers_of_train(trained, capsys, tmp_path):
    out, process = trained
    assert command("score", "--model", out, "--data", "tasks", "--device", "cpu") == 0
    said = capsys.readouterr().out
    assert next(line for line in said.splitlines() if "this reward model" in line) in process.stdout
    write_classifier(tmp_path / "classifier", max_position_embeddings=512)
    assert (
        command(
            "score", "--model", tmp_path / "classifier", "--data", "tasks", "--pairs", 20, "--device", "cpu"
        )
        == 0
    )
    assert "tasks: 20 pairs" in capsys.readouterr().out


def grao_trainer(reward_name):
    config = dict(
        model="tiny", device="cpu", quantize="none", steps=2, eval_prompts=4, reward=str(reward_name)
    )
    return train.Trainer(GRAO, check_settings(GRAO.config(**config)))


def test_on_the_same_backbone_it_is_one_more_role(trained, load, tmp_path, capsys):
    out, _ = trained
    t = grao_trainer(out)
    assert (
        t.reward_fn.scorer.policy is t.policy
        and "on the same backbone, tiny, 0.7 MiB\n" in capsys.readouterr().err
    )
    assert not any("reward" in name for name in t.params) and not any(
        p.requires_grad for p in t.policy.trainable("reward").values()
    )
    batch = t.rollout(t.next_records())
    text = t.policy.decode(batch.completions[0][0])
    ids = t.policy.encode_answer(text)  # scored as if it had ended
    expected = float(t.policy.sequence_scores([batch.prompts[0]], [[ids]])) - (
        batch.completions[0][0][-1] not in t.policy.eos_ids
    )
    assert float(batch.rewards[0, 0]) == pytest.approx(expected, abs=1e-4)

    other = load("llama")  # another base: loaded beside
    randomise_all(other.add_role("reward"))
    other.save_role("reward", tmp_path / "beside")
    t = grao_trainer(tmp_path / "beside")
    assert t.reward_fn.scorer.policy is not t.policy and "backbone of its own" in capsys.readouterr().err
    prompts, groups = ["list 3 animals"], [["cat", "dog w20"]]
    expected = other.sequence_scores(
        [other.encode_prompt(prompts[0])], [[other.encode_answer(x) for x in groups[0]]]
    )[0]
    assert t.reward_fn.scorer(prompts, groups)[0] == pytest.approx(
        expected.tolist(), abs=0.05
    )  # bf16 where the CPU has it


@pytest.mark.parametrize("prefix", ["", "pairwise:"])
def test_a_policy_trains_with_it_and_a_run_is_scored_again(trained, prefix, tmp_path, capsys):
    flags = [
        "--model",
        "tiny",
        "--device",
        "cpu",
        "--quantize",
        "none",
        "--steps",
        2,
        "--prompts-per-step",
        2,
        "--group-size",
        3,
        "--eval-prompts",
        6,
    ]
    assert (
        train.main(
            GRAO, [str(f) for f in [*flags, "--reward", f"{prefix}{trained[0]}", "--out", tmp_path / "run"]]
        )
        == 0
    )
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    if prefix:
        assert {s["reward"] for s in samples} <= {-1.0, 0.0, 1.0} and {
            s["expert_reward"] for s in samples
        } == {0.0}
        return
    capsys.readouterr()
    assert (
        command(
            "score", "--model", trained[0], "--samples", tmp_path / "run" / "samples.jsonl", "--device", "cpu"
        )
        == 0
    )
    own, other = capsys.readouterr().out.split("by " + str(trained[0]))
    lines = []
    for part in (own, other):
        lines.append([line for line in part.splitlines() if line[:2] == "  " and "careful: " not in line])
    assert len(lines[0]) == 4 and lines[0] == lines[1]  # the same model: no gap


def test_judge_as_a_command_and_as_a_reward(chat_dir, tmp_path, capsys):
    records = [{"prompt": f"list w{i} cat", "chosen": f"w{i} w5", "rejected": "dog"} for i in range(20, 40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert (
        command(
            "judge",
            "--model",
            chat_dir,
            "--data",
            tmp_path / "pairs.jsonl",
            "--criterion",
            "harmless",
            "--device",
            "cpu",
        )
        == 0
    )
    said = capsys.readouterr().out
    assert (
        "position bias: reply A wins" in said
        and "chosen wins" in said
        and "longer one wins (tokens): 1.000" in said
    )
    flags = [
        "--model",
        chat_dir,
        "--data",
        tmp_path / "pairs.jsonl",
        "--device",
        "cpu",
        "--steps",
        1,
        "--prompts-per-step",
        2,
        "--group-size",
        2,
        "--max-new-tokens",
        4,
        "--eval-prompts",
        2,
        "--reward",
        f"judge:{chat_dir}",
        "--out",
        tmp_path / "run",
    ]
    assert train.main(GRAO, [str(f) for f in flags]) == 0
    assert {s["reward"] for s in read_jsonl(tmp_path / "run" / "samples.jsonl")} <= {-1.0, 0.0, 1.0}
    capsys.readouterr()
    assert (
        command(
            "judge", "--model", chat_dir, "--samples", tmp_path / "run" / "samples.jsonl", "--device", "cpu"
        )
        == 0
    )
    assert "position bias" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# Bad input: one line on stderr, status 2


def refused(capsys, *flags):
    capsys.readouterr()
    assert command(*flags) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("error: ") and not any("Traceback" in line for line in error)
    return error[-1]


def test_models_that_are_no_reward_models(trained, load, model_dir, tmp_path, capsys):
    out, _ = trained

    def edited(name, file, change):
        shutil.copytree(out, tmp_path / name)
        if name == "moved":
            (tmp_path / name / "reward_model.json").unlink()  # it knows that the base is the embedded model
        content = json.loads((tmp_path / name / file).read_text())
        change(content)
        (tmp_path / name / file).write_text(json.dumps(content))
        return tmp_path / name

    write_classifier(tmp_path / "two", labels=2)
    write_classifier(tmp_path / "nan").score.weight.data.fill_(float("nan"))
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    save_file(
        weights | {"score.weight": weights["score.weight"] * float("nan")},
        tmp_path / "nan" / "model.safetensors",
        {"format": "pt"},
    )
    write_classifier(tmp_path / "vocabulary", vocab_size=50)
    write_classifier(tmp_path / "short", max_position_embeddings=8)
    load().save(tmp_path / "adapter")
    for model, words in (
        (model_dir(), "has no scalar head"),  # transformers would make one up, at random
        (tmp_path / "two", "2 outputs"),
        (tmp_path / "nan", "not finite"),
        (tmp_path / "vocabulary", "its tokenizer has 97 tokens and the model 50"),
        (tmp_path / "short", "no pair to use"),
        (tmp_path / "adapter", "no scalar head"),  # a policy's
        (tmp_path / "nowhere", "no such directory"),
        (tmp_path, "config.json"),
        (
            edited(
                "moved",
                "adapter_config.json",
                lambda c: c.update(base_model_name_or_path=str(tmp_path / "gone")),
            ),
            "its base",
        ),
        (
            edited("other", "adapter_config.json", lambda c: c.update(base_model_name_or_path=model_dir())),
            "does not fit",
        ),
        (edited("tokens", "reward_model.json", lambda c: c.update(tokenizer="0")), "another tokenizer"),
    ):
        assert words in refused(capsys, "score", "--model", model, "--data", "tasks", "--device", "cpu"), (
            model
        )


def test_flags_and_files_that_cannot_be_used(trained, tmp_path, capsys):
    out, _ = trained
    (tmp_path / "same.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"list {i} animals", "chosen": "cat", "rejected": "cat"}) + "\n"
            for i in "23456"
        )
    )
    for name, prompt, more in (
        ("margin", "list {} animals", {"margin": "far"}),
        ("foreign", "enumerate thirteen vertebrates {}", {}),
    ):
        lines = [
            json.dumps({"prompt": prompt.format(i), "chosen": "cat", "rejected": "dog"} | more) + "\n"
            for i in range(30)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "samples.jsonl").write_text('{"step": 0}\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("not a reward model")
    new = tmp_path / "new"
    for flags, words in (
        ([], "no command"),
        (["sing"], "train, score, judge"),
        (["score", "--model", out], "--data or --samples"),
        (["score", "--data", "tasks"], "--model"),
        (["score", "--model", out, "--data", tmp_path / "none.jsonl"], "no such file"),
        (["score", "--model", out, "--data", tmp_path / "same.jsonl"], "twice the same answer"),
        (
            ["score", "--model", out, "--samples", tmp_path / "samples.jsonl"],
            "samples.jsonl of a finished run",
        ),
        (["judge", "--model", "tiny", "--data", "tasks"], "letters A and B"),
        (["train", *SMALL, "--out", tmp_path / "folder"], "exists"),
        (["train", *SMALL, "--out", tmp_path / "folder", "--overwrite"], "not a reward model"),
        (["train", *SMALL, "--data", tmp_path / "same.jsonl", "--out", new], "no pair to use"),
        (["train", *SMALL, "--max-tokens", "9", "--out", new], "longer than 9 tokens"),
        (["train", *SMALL, "--lr", "0", "--out", new], "--lr"),
        (["train", *SMALL, "--data", tmp_path / "margin.jsonl", "--out", new], "'far'"),
        (["train", *SMALL, "--data", tmp_path / "foreign.jsonl", "--out", new], "unknown to model tiny"),
    ):
        assert words in refused(capsys, *flags), flags
    assert not new.exists()
    flags = ["--model", "tiny", "--reward", "judge:tiny", "--out", new]
    assert (
        train.main(GRAO, [str(f) for f in flags]) == 2
        and "letters A and B" in capsys.readouterr().err
        and not new.exists()
    )


def test_an_interrupted_training_leaves_nothing(tmp_path, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(reward_model, "fit_scorer", stop)
    assert command("train", *SMALL, "--out", tmp_path / "reward") == 130
    assert list(tmp_path.iterdir()) == [] and "nothing was written" in capsys.readouterr().err
