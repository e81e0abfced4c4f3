"""plots/sweep.py: the learning rates of a method, compared on the prompts it trained on."""

import json
import shutil

import pytest

import train
from engine.command_line import exit_status, parse
from plots import sweep


def test_a_sweep_scores_each_rate_on_the_training_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "MOST", 5)
    out = tmp_path / "sweep.json"
    flags = ["--model", "tiny", "--steps", "2", "--prompts-per-step", "3", "--eval-prompts", "2"]
    sweep.main(["sft", "--lrs", "1e-9", "0.5", "--out", str(out), "--", *flags])
    result = json.loads(out.read_text())
    small, large = result["rows"]
    assert (small["lr"], large["lr"]) == (1e-9, 0.5) and small["prompts"] == large[
        "prompts"
    ] == 5  # 6 were trained on, MOST are scored
    assert small["tokens"] != large["tokens"]  # each row is its own adapter's: 0.5 destroys the model
    assert result["command"].endswith(" ".join(flags)) and result["environment"]["versions"]["torch"]


def test_finished_runs_that_kept_their_adapters_are_measured_as_a_sweep_is(tmp_path):
    flags = [
        "--model",
        "tiny",
        "--steps",
        "2",
        "--prompts-per-step",
        "3",
        "--group-size",
        "2",
        "--eval-prompts",
        "2",
        "--max-new-tokens",
        "8",
    ]
    rates = ["1e-9", "0.5"]
    for lr in rates:
        train.run(
            sweep.METHODS["grpo"],
            parse(sweep.METHODS["grpo"].config, [*flags, "--lr", lr, "--out", str(tmp_path / lr)], ""),
        )
    swept = sweep.main(["grpo", "--lrs", *rates, "--out", str(tmp_path / "a.json"), "--", *flags])
    runs = [str(tmp_path / lr) for lr in rates]
    assert sweep.main(["grpo", "--runs", *runs, "--out", str(tmp_path / "b.json")]) == swept
    shutil.rmtree(tmp_path / "0.5" / "adapter")
    assert (
        exit_status(lambda: sweep.main(["grpo", "--runs", *runs, "--out", str(tmp_path / "c.json")])) == 2
        and not (tmp_path / "c.json").exists()
    )


def write_run(folder, method, rewards, lr):
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"method": method, "settings": {"lr": lr, "prompts_per_step": 3, "group_size": 4}})
    )
    lines = [{"step": 0, "eval/reward": 9.0}] + [
        {"step": i + 1, **({} if r is None else {"reward/mean": r})} for i, r in enumerate(rewards)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_finished_runs_make_a_table_from_their_last_ten_steps(tmp_path):
    slow, fast = (
        write_run(tmp_path / f"{lr}", "grpo", rewards, lr)
        for lr, rewards in ((1e-3, [0.0] * 5 + [0.25] * 10), (3e-4, [0.5] * 4))
    )
    rows = sweep.main(["grpo", "--runs", slow, fast, "--out", str(tmp_path / "t.json")])
    assert rows == [
        {"lr": 1e-3, "steps": 15, "samples": 120, "reward": 0.25},
        {"lr": 3e-4, "steps": 4, "samples": 48, "reward": 0.5},
    ]
    assert json.loads((tmp_path / "t.json").read_text())["rows"] == rows
    again = ["grpo", "--runs", slow, "--last", "12", "--out", str(tmp_path / "t.json"), "--overwrite"]
    (row,) = sweep.main(again)
    assert row == {"lr": 1e-3, "steps": 15, "samples": 144, "reward": pytest.approx(2.5 / 12)}


def test_a_table_is_not_written_over_unasked(tmp_path, capsys):
    """Hours of runs went into it; and what is no table of ours stays, even with --overwrite."""
    table, letter = tmp_path / "table.json", tmp_path / "letter.json"
    run = write_run(tmp_path / "run", "grpo", [0.25] * 3, 1e-3)
    sweep.main(["grpo", "--runs", run, "--out", str(table)])
    letter.write_text('{"dear": "reader"}')
    for out, flags, said in ((table, [], "exists already"), (letter, ["--overwrite"], "leaves it alone")):
        before = out.read_bytes()
        argv = ["grpo", "--runs", run, "--out", str(out), *flags]
        assert exit_status(lambda argv=argv: sweep.main(argv)) == 2 and out.read_bytes() == before
        err = capsys.readouterr().err
        assert said in err and len(err.splitlines()) == 1
    assert sweep.main(["grpo", "--runs", run, "--out", str(table), "--overwrite"])[0]["steps"] == 3


@pytest.mark.parametrize(
    "argv, said",
    [
        (["grpo", "--lrs", "fast", "--out", "x"], "fast"),
        (["nosuch", "--lrs", "1", "--out", "x"], "nosuch"),
        (["grpo", "--runs", "x", "--last", "0", "--out", "x"], "--last 0"),
        ([], "required"),
    ],
)
def test_bad_flags_are_one_line(capsys, argv, said):
    """argparse prints its usage in front of the error."""
    assert exit_status(lambda: sweep.main(argv)) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "method, rewards, said",
    [("sft", [None] * 3, "draws no samples"), ("ppo", [0.1], "not of"), (None, [], "is not a run's folder")],
)
def test_other_runs_are_one_line(tmp_path, capsys, method, rewards, said):
    path = write_run(tmp_path / "x", method, rewards, 1e-3) if method else str(tmp_path / "none")
    assert (
        exit_status(
            lambda: sweep.main(
                ["sft" if method == "sft" else "grpo", "--runs", path, "--out", str(tmp_path / "t.json")]
            )
        )
        == 2
    )
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1
