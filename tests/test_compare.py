"""plots/compare.py as its users meet it: the quick suite to its figures, what is done is skipped, stop and go
on, failures are one line.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import randomise_all

from engine.command_line import exit_status
from engine.record import read_jsonl
from plots import compare, figures, jobs, suites, words

ROOT = Path(__file__).parents[1]


def start(module, *flags, **kwargs):
    command = [sys.executable, "-m", f"plots.{module}", *map(str, flags)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **kwargs,
    )


def finish(process, status=0):
    out, err = process.communicate()
    assert process.returncode == status and "Traceback" not in err, err
    return out, err


def logged(folder):
    """What a run measured, without the clock."""
    return [
        {k: v for k, v in line.items() if not k.startswith("time/")}
        for line in read_jsonl(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "quick"
    return out, finish(start("compare", "--suite", "tiny", "--quick", "--out", out))[0]


def test_the_quick_suite_to_its_figures(quick, tmp_path):
    out, printed = quick
    runs = suites.grid("tiny", quick=True)
    kept = {(path.parent.name, path.name) for path in out.glob("*/seed-*")}
    assert (
        kept == {(run.name, f"seed-{run.seed}") for run in runs}
        and f"[{len(runs)}/{len(runs)}]" in printed
        and "min left" in printed
    )
    assert (
        not (out / ".unfinished").exists()
        and max(f.stat().st_size for f in out.rglob("*.*") if f.is_file()) < 30_000
    )
    about = json.loads((out / "ppo" / "seed-1" / "config.json").read_text())
    assert (
        about["study"]["command"].startswith("python baselines.py ppo --model tiny")
        and about["environment"]["versions"]
        and about["settings"]["seed"] == 1
    )
    finish(start("figures", "--logs", out, "--out", tmp_path / "figures"))
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == set(figures.SECTIONS)
    results, samples = ((tmp_path / "figures" / name).read_text() for name in ("results.md", "samples.md"))
    for name in suites.COMPARED:
        assert (
            results.count(f"| {words.label(name)} |") + results.count(f"| **{words.label(name)}** |") >= 3
            and f"| {words.label(name)} |" in samples
        )
    assert f"| {words.label('grao')} |" in (out / "budgets.md").read_text()


def test_the_reweighted_ablation_is_the_full_objective(quick):
    """Two programs, one run: the same samples until rounding turns one over."""
    out, _ = quick
    full, other = (logged(out / name / "seed-0") for name in ("grao", "grao-equivalent"))
    assert [line["reward/mean"] for line in full[1:3]] == [line["reward/mean"] for line in other[1:3]]
    assert full[2]["logp/expert"] == pytest.approx(other[2]["logp/expert"], abs=2e-3)
    assert full[1]["loss"] == pytest.approx(1.6 * other[1]["loss"], rel=1e-3)
    without = logged(out / "grao-without-regularizer" / "seed-0")
    assert full[1]["loss"] != pytest.approx(without[1]["loss"], rel=1e-2)


def test_what_is_done_is_skipped_and_what_is_missing_or_broken_is_made(quick):
    out, _ = quick
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/seed-*/*")}
    kept = logged(out / "sft" / "seed-1")
    (out / "sft" / "seed-1" / "samples.jsonl").write_text("{")
    flags = ["--suite", "tiny", "--quick", "--part", "comparison", "--out", out]
    printed, _ = finish(start("compare", *flags))
    assert (
        "13 done already" in printed
        and "[1/1] sft seed 1" in printed
        and logged(out / "sft" / "seed-1") == kept
    )
    assert all(path.stat().st_mtime_ns == t for path, t in before.items() if "sft/seed-1" not in str(path))
    _, err = finish(
        start("compare", *flags, "--", "--lr", "0.5"), status=2
    )  # another run of the same name is no done run, nor is it thrown away
    assert "lr is " in err and "now wanted 0.5" in err and len(err.splitlines()) == 1


ABLATIONS, FOURTEEN = (
    ["--suite", "tiny", "--quick", "--part", "ablations", "--seeds", "1", "--jobs", "2"],
    ["--", "--steps", "14"],
)


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    finish(start("compare", *ABLATIONS, "--methods", "grao", "--out", out, *FOURTEEN))
    return logged(out / "grao" / "seed-0")


@pytest.mark.parametrize("how, status", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_stopped_and_gone_on_with_it_is_the_study_that_never_stopped(never_stopped, tmp_path, how, status):
    """Ctrl-C, or the runner killed, in the middle of a run: nothing half made is kept, no run outlives it,
    and it goes on from its checkpoint.
    """
    stopped = start("compare", *ABLATIONS, "--out", tmp_path, *FOURTEEN)
    log, deadline = tmp_path / ".unfinished" / "grao-0" / "metrics.jsonl", time.time() + 300
    while not (log.is_file() and len(read_jsonl(log)) > 3) and time.time() < deadline:
        time.sleep(0.05)
    stopped.send_signal(how)
    _, err = finish(stopped, status)  # returns when no run holds its output any more
    assert how == signal.SIGKILL or "go on with the same command" in err
    assert 3 <= read_jsonl(log)[-1]["step"] < 14 and not (tmp_path / "grao").exists()
    finish(start("compare", *ABLATIONS, "--methods", "grao", "--out", tmp_path, *FOURTEEN))
    again = logged(tmp_path / "grao" / "seed-0")
    assert again == never_stopped and [line["step"] for line in again] == list(range(15))
    assert (
        tmp_path / ".unfinished" / "grao-without-imitation-0"
    ).is_dir()  # not asked for this time: its checkpoint waits


def test_a_run_that_fails_is_one_line_and_the_rest_goes_on(tmp_path):
    flags = [
        "--suite",
        "hh",
        "--quick",
        "--part",
        "comparison",
        "--seeds",
        "1",
        "--model",
        "tiny",
        "--data",
        "tasks",
        "--out",
        tmp_path / "x",
    ]
    _, err = finish(
        start("compare", *flags, "--reward", "none", "--judge-reward", ROOT / "data" / "tiny"), status=2
    )
    lines = [line for line in err.splitlines() if "seed 0: failed (2): error: " in line]
    assert (
        len(lines) == len(suites.COMPARED)
        and "--reward none" in lines[0]
        and "7 of 7 runs failed" in err.splitlines()[-1]
    )


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--suite", "nosuch"], "nosuch"),
        (["--suite", "tiny", "--jobs", "0"], "--jobs 0"),
        (["--suite", "hh", "--reward", "a"], "--judge-reward"),
        (["--suite", "tiny", "--methods", "nosuch"], "nosuch"),
        (["--suite", "tiny", "--part", "comparison", "--methods", "luffy"], "--methods luffy"),
        (["--suite", "tiny", "--", "--group-size", "1"], "--group-size"),
        (["--suite", "tiny", "--", "--no-such-flag"], "no-such-flag"),
        (["--suite", "tiny", "--", "--seed", "3"], "--seed after --"),  # every seed would be this one
        (["--suite", "tiny", "--methods", "chord", "--", "--variant=ptx"], "--variant after --"),
        (["--suite", "smollm2", "--model", "none.gguf"], "none.gguf"),
        (
            ["--suite", "hh", "--model", "tiny", "--reward", "a", "--judge-reward", "none"],
            "reward model none",
        ),
    ],
)
def test_bad_flags_are_one_line(flags, said, capsys, monkeypatch):
    for name, value in (
        ("OMP_NUM_THREADS", "1"),
        ("PYTHONPATH", str(ROOT)),
    ):  # compare sets them for its runs; later tests must not inherit them
        monkeypatch.setenv(name, value)
    assert exit_status(lambda: compare.compare(flags)) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1 and "Traceback" not in err


def test_methods_are_chosen_by_name(capsys):
    compare.compare(
        ["--suite", "tiny", "--part", "comparison", "--seeds", "2", "--methods", "grao", "sft-grpo", "--list"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert ["minigrao.py" in line for line in lines] == [False, True, False, True] and all(
        "--variant sft-grpo" in line for line in lines[::2]
    )


def test_a_judge_scores_what_was_answered(load, tmp_path):
    policy = load("llama")
    randomise_all(policy.add_role("reward"))
    policy.save_role("reward", tmp_path / "judge")
    lines = [
        dict(
            step=s,
            prompt="list 3 animals",
            expert="cat dog",
            completion=f"dog w{s}",
            truncated=s == 1,
            reward=0.5,
        )
        for s in (0, 1)
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    jobs.score_samples(tmp_path / "samples.jsonl", tmp_path / "judge")
    scored = read_jsonl(tmp_path / "samples.jsonl")
    texts = ["dog w0", "dog w1", "cat dog"]
    a, b, y = policy.sequence_scores(
        [policy.encode_prompt("list 3 animals")], [[policy.encode_answer(text) for text in texts]]
    )[0].tolist()
    assert [line["judge_reward"] for line in scored] == pytest.approx(
        [a, b], abs=0.2
    )  # bf16; no penalty for being cut
    assert [line["judge_expert_reward"] for line in scored] == pytest.approx([y, y], abs=0.2) and scored[0][
        "reward"
    ] == 0.5
