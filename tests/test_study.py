"""plots.study, the tables and the figures on made-up logs of every run: what is kept, drawn and counted."""

import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.image import imread

from data import UserError
from engine.command_line import exit_status
from engine.record import read_jsonl
from plots import axes, figures, study, suites, tables, tables_parts, words

PROMPTS, STEPS = 12, 6


def write_run(folder, name, seed, reward, judged=False):
    """A finished run folder, as train.run leaves it, whose held-out answers earn `reward` on average."""
    rng = np.random.default_rng([seed, len(name)])
    folder.mkdir(parents=True)
    settings = dict(steps=STEPS, prompts_per_step=2, group_size=8, lr=1e-3, switch_lr=None)
    environment = dict(versions={"torch": "2"}, gpu=None, machine="m", commit=f"c{seed}")
    (folder / "config.json").write_text(
        json.dumps(dict(method="m", settings=settings, environment=environment))
    )
    lines = []
    for step in range(STEPS + 1):
        line = {"step": step, "a/metric/nobody/draws": 1.0}
        if step:
            line |= {"loss": -step / 7, "time/update": 0.5, "memory/peak": 1.0}
            if name not in ("sft", "dpo"):
                line |= {
                    "reward/mean": reward * step / STEPS,
                    "tokens/generated": 100 * step,
                    "time/rollout": 0.5,
                }
                line |= {"entropy": 1.0, "distinct/2": 0.5, "length/mean": 5.0}
            if name.startswith("uniapl"):
                line |= {"score/accuracy": 1 - step / 10}
            line |= {f"share/{term}": 1 / 3 for term in ("exploration", "imitation", "regularizer")} | {
                "advantage/expert": 1 - step / 4
            }
        if step % 2 == 0:
            line |= {"eval/reward": 0.1 + (reward - 0.1) * step / STEPS}
        lines.append(line)
    samples = []
    for step in (0, STEPS):
        for i in range(PROMPTS):
            paid = float(i < round(PROMPTS * (reward if step else 0.25)))
            sample = dict(
                step=step, prompt=f"prompt {i} | x", expert=f"expert {i}", completion=f"{name} {step}"
            )
            sample |= dict(
                reward=paid, expert_reward=float(i % 2), tokens=5 + i % 3, expert_tokens=6, truncated=False
            )
            sample |= dict(kl=1 / 3 if step else 0.0, logp_expert=-float(rng.random()))
            samples.append(
                sample
                | ({"judge_reward": 2.0 if step else 0.0, "judge_expert_reward": 1.0} if judged else {})
            )
    for file, content in (("metrics", lines), ("samples", samples)):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))


def write_logs(out, names, seeds=2, judged=False):
    for name in names:
        for seed in range(seeds):
            write_run(out / ".unfinished" / f"{name}-{seed}", name, seed, REWARDS.get(name, 0.5), judged)
            about = dict(
                suite="tiny", name=name, seed=seed, command="python x.py", learning_rate="default", judge=None
            )
            study.keep(out / ".unfinished" / f"{name}-{seed}", out / name / f"seed-{seed}", about)
    return out


REWARDS = {
    "sft": 0.25,
    "grpo": 0.5,
    "grao": 0.75,
    "grpo-quality1": 0.5,
    "grao-quality0.25": 0.25,
    "grao-quality1": 0.75,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_logs(tmp_path_factory.mktemp("whole"), suites.METHODS)


def test_what_is_kept_is_small_and_reads_back(whole):
    folder = whole / "grao" / "seed-1"
    assert {path.name for path in folder.iterdir()} == {"config.json", "metrics.jsonl", "samples.jsonl"}
    lines = read_jsonl(folder / "samples.jsonl")
    assert (
        [line["step"] for line in lines] == [0, STEPS]
        and lines[1]["kl"] == [0.3333] * PROMPTS
        and len(lines[1]["texts"]) == study.TEXTS
    )
    assert set().union(*read_jsonl(folder / "metrics.jsonl")) <= set(study.METRICS)
    log = study.load(whole)["grao"][1]
    assert (
        log.after["reward"].sum() == 9
        and log.before["reward"].sum() == 3
        and log.last("tokens/generated") == 600
    )
    assert log.seconds()[1][-1] == STEPS and log.curve("eval/reward")[0].tolist() == [0, 2, 4, 6]
    assert set(study.load(whole)) == set(suites.METHODS)  # and nothing of .unfinished


def test_logs_without_texts_are_left_out_of_the_page_of_samples(whole):
    logs = study.load(whole)
    del logs["sft"][0].before["texts"], logs["sft"][0].after["texts"]
    page = tables.samples(logs)
    assert "| GRAO |" in page and "| SFT |" not in page
    for name in logs:
        logs[name][0].after["texts"] = []
    assert tables.samples(logs) == "The logs hold no texts.\n"


def test_measures_by_hand(whole):
    logs = study.load(whole)
    assert (
        study.matrix(logs, "grao", "ras").mean() == 5 / 12
    )  # of the nine paid answers, the four to odd prompts only tie
    assert study.matrix(logs, "grao", "nag").mean() == 6 / 12 and study.matrix(logs, "sft", "nag").mean() == 0
    assert study.matrix(logs, "grao", "reward").shape == (2, PROMPTS)


def test_the_no_skill_floor_stands_below_the_tables_that_have_one(whole):
    """A constant answer earned what the table showed for a trained policy, and no table said so."""
    logs = study.load(whole)
    assert words.floor_note(logs, ["grao"]) == "" and "No-skill floor" not in tables.comparison(logs)
    for name in ("grao", "sft", "grpo-quality1"):
        logs[name][0].after["floor_reward"] = np.array([0.25] * PROMPTS)
    for table in (tables.comparison, tables_parts.ablations, tables_parts.quality, tables_parts.uniapl):
        assert "\nNo-skill floor, the best of a few constant answers: 0.250.\n" in table(logs)


def test_a_judge_decides_ras_and_nag_and_not_the_reward(tmp_path):
    logs = study.load(write_logs(tmp_path, ["grao", "grpo"], judged=True))
    assert study.matrix(logs, "grao", "ras").mean() == study.matrix(logs, "grao", "nag").mean() == 1
    assert (
        study.matrix(logs, "grao", "reward").mean() == 0.75
        and study.matrix(logs, "grao", "judged").mean() == 2
    )
    text = tables.comparison(logs)
    assert "by the judge" in text and "second reward model" in text and "2.000 [2.000, 2.000]" in text


def test_every_figure_is_drawn_at_readme_width_and_every_method_is_in_the_tables(whole, tmp_path):
    assert figures.draw(study.load(whole), tmp_path) == list(figures.SECTIONS)
    for name in figures.SECTIONS:
        height, width, _ = imread(tmp_path / f"{name}.png").shape
        assert width == axes.WIDTH * 160 and height < 1.1 * width
    results, samples = ((tmp_path / name).read_text() for name in ("results.md", "samples.md"))
    assert all(f"]({name}.png)" in results for name in figures.SECTIONS)
    for name in suites.METHODS:
        assert f"| {words.label(name)} |" in results or f"| **{words.label(name)}** |" in results, name
    for name in suites.COMPARED:
        assert f"| {words.label(name)} | {name} {STEPS} (" in samples
    assert (
        "64.60 / 67.98" in results and "76.82 / 34.85" in results and "61.18 / 46.26" in results
    )  # the paper's own
    for text in (results, samples):  # every row of a table has its header's cells
        for block in text.split("\n\n"):
            rows = [row.replace("\\|", "").count("|") for row in block.splitlines() if row.startswith("|")]
            assert len(set(rows)) <= 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_numbers_in_the_tables(whole):
    logs = study.load(whole)
    row = next(line for line in tables.comparison(logs).splitlines() if line.startswith("| **GRAO**"))
    assert (
        "| 2 | 41.7 [" in row and "| +50.0 [" in row and "0.750 [" in row and "| 0.33 [0.33, 0.33] |" in row
    )
    row = next(line for line in tables.comparison(logs).splitlines() if line.startswith("| GRAO − SFT"))
    # Six prompts of twelve differ, all one way: 2 / 2^6 of the sign patterns. Seven tests; SFT's p is the
    # smallest of them, with no other.
    assert f"| 0.031 | {min(1, 7 * 2 / 2**6):.2g} | prompts |" in row
    row = next(line for line in tables.reach(logs).splitlines() if line.startswith("| GRAO"))
    assert "| 3.7 | 0.62 [0.62, 0.62] | 0% |" in row  # 0.1 + 0.65 s / 6 = 0.5 at s = 3.69
    assert (
        "\nSFT does not cross GRPO: level somewhere" in tables_parts.crossings(logs)
        and tables_parts.crossings({}) == ""
    )
    cut = {name: logs[name] for name in ("grpo-quality1", "grao-quality0.25", "grao-quality1")}
    assert "\nGRAO crosses GRPO at 62% of right expert answers." in tables_parts.crossings(
        cut
    )  # 0.25 below at 25 %, 0.25 above at 100 %
    cut["grpo-quality1"] = cut["grpo-quality1"] | {
        9: logs["grao-quality1"][0]
    }  # a seed of GRPO's alone is no part of that
    assert "\nGRAO crosses GRPO at 62% of right expert answers." in tables_parts.crossings(cut)
    row = next(line for line in tables_parts.anchor(logs).splitlines() if line.startswith("| unified, λ = 3"))
    assert row == "| unified, λ = 3 | 2 | 0.900 → 0.400 | 1.000 → 1.000 | 0.500 → 0.500 | 5.000 → 5.000 |"
    assert "| CHORD (unified, λ = 0) | 2 | – |" in tables_parts.anchor(logs)
    assert "commit c0, c1." in tables.budgets(logs)
    budget = next(line for line in tables.budgets(logs).splitlines() if line.startswith("| GRPO |"))
    assert "| 2 | 6 | 6 | 2 | 96 | 600 | 0.001 | default | 6 |" in budget
    assert "| 0 | 0 |" in next(
        line for line in tables.budgets(logs).splitlines() if line.startswith("| SFT |")
    )


def test_a_missing_part_leaves_its_figure_out_and_says_so(tmp_path, capsys):
    out = tmp_path / "figures"
    logs = write_logs(tmp_path / "logs", ["grao", "grpo"])
    out.mkdir()
    (out / "quality.png").write_text("of an earlier call")
    assert figures.main(["--logs", str(logs), "--out", str(out)])
    printed = capsys.readouterr().out
    assert {p.stem for p in out.glob("*.png")} == {"comparison", "dynamics", "components", "cost"}
    assert (
        "quality: left out, these runs are not in the logs" in printed
        and "Quality: left out" in (out / "results.md").read_text()
    )
    assert "Not run: SFT, DPO, PPO" in (out / "results.md").read_text()


@pytest.mark.parametrize("part", [part for part in suites.PARTS if part != "comparison"])
def test_the_logs_of_one_part_alone(tmp_path, part):
    logs = write_logs(tmp_path, suites.PARTS[part], seeds=1)
    assert part in figures.draw(study.load(logs), tmp_path / "figures")
    assert "answered by every method (seed 0)" in (tmp_path / "figures" / "samples.md").read_text()


def test_logs_that_are_none(tmp_path):
    with pytest.raises(UserError, match="holds no logs"):
        study.load(tmp_path)
    logs = write_logs(tmp_path, ["grao"])
    (logs / "grao" / "seed-1" / "samples.jsonl").write_text("{")
    with pytest.raises(UserError, match="seed-1: is damaged"):
        study.load(logs)


def test_one_packed_file_is_the_folders(whole, tmp_path):
    """A study was hundreds of folders; one file of it has to draw the same, byte for byte, and to give them
    back.
    """
    packed, again = tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"
    assert study.main(["pack", str(whole), str(packed)])
    assert study.main(["unpack", str(packed), str(tmp_path / "unpacked")])
    assert study.main(["pack", str(tmp_path / "unpacked"), str(again)])
    assert packed.read_bytes() == again.read_bytes()  # no time of day in it, and no order of the disk's
    folder = tmp_path / "unpacked" / "grao" / "seed-1"
    assert read_jsonl(folder / "samples.jsonl") == read_jsonl(whole / "grao" / "seed-1" / "samples.jsonl")
    few = ["grao", "grpo", "sft"]
    drawn = []
    for logs, out in ((study.load(whole), "c"), (study.load(packed), "d")):
        figures.draw({name: logs[name] for name in few}, tmp_path / out)
        drawn.append({path.name: path.read_bytes() for path in sorted((tmp_path / out).iterdir())})
    assert drawn[0] == drawn[1] and len(drawn[0]) > 3


def test_a_line_break_within_an_answer_is_not_the_end_of_a_line(tmp_path):
    """str.splitlines also cuts at U+2028, which JSON writes as it is."""
    files = {"config.json": {"a": "one\u2028two"}, "metrics.jsonl": [{"b": "three\x85four"}]}
    (tmp_path / "logs" / "x").mkdir(parents=True)
    study.write_files(tmp_path / "logs" / "x", files)
    study.pack(tmp_path / "logs", tmp_path / "x.jsonl.gz")
    assert (
        list(study.folders(tmp_path / "logs"))
        == [("x", files)]
        == list(study.folders(tmp_path / "x.jsonl.gz"))
    )


def test_old_names_are_read_as_todays():
    """Logs call y the reference: they stay as they are, and are read by the names of today."""
    log = study.load(ROOT / "plots" / "logs" / "study-smollm2.jsonl.gz")["grao"][0]
    assert len(log.curve("advantage/expert")[0]) == 40 and not len(log.curve("advantage/reference")[0])
    assert log.after["expert_reward"].shape == log.after["logp_expert"].shape == (200,)
    assert set(log.after["texts"][0]) == {"prompt", "expert", "completion"}


@pytest.mark.parametrize(
    "argv, said",
    [
        (["pack", "{logs}", "{there}"], "exists already"),
        (["pack", "{logs}", "{there}", "--overwrite"], "leaves it alone"),
        (["pack", "{logs}", "{new}.zip"], "jsonl.gz"),
        (["unpack", "{there}", "{new}"], "is damaged"),
        (["unpack", "{climbing}", "{new}"], "is no folder of logs"),
        (["pack", "{new}", "{new}.jsonl.gz"], "neither a folder of logs"),
        (["squeeze", "a", "b"], "squeeze"),
    ],
)
def test_packing_refuses_in_one_line(whole, tmp_path, capsys, argv, said):
    """A packed file of others must not write outside of its folder, nor pack over what is not ours."""
    paths = {"logs": whole, "new": tmp_path / "new"}
    paths |= {"there": tmp_path / "there.jsonl.gz", "climbing": tmp_path / "climbing.jsonl.gz"}
    paths["there"].write_bytes(b"a letter")
    line = {"folder": "../out", "config.json": {}}
    paths["climbing"].write_bytes(gzip.compress(json.dumps(line).encode()))
    assert exit_status(lambda: study.main([word.format(**paths) for word in argv])) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1
    assert paths["there"].read_bytes() == b"a letter" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["study-tiny", "study-smollm2", "study-hh"])
def test_the_published_logs_give_the_published_tables(name, tmp_path):
    """The results that stand in the repository are those of the logs beside them."""
    logs = study.load(ROOT / "plots" / "logs" / f"{name}.jsonl.gz")
    results = (ROOT / "plots" / "logs" / name / "figures" / "results.md").read_text()
    assert tables.budgets(logs) in results and tables.comparison(logs) in results


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nosuch"])
def test_a_notebooks_backend_breaks_no_figure(backend):
    """Importing matplotlib fails where MPLBACKEND names a module that is not there, as a notebook may."""
    code = "import plots.figures, matplotlib; print(matplotlib.get_backend())"
    env = os.environ | {"MPLBACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.stdout.strip().lower() == "agg", done.stderr


def test_a_method_has_one_colour(whole):
    assert len({axes.COLOURS[name] for name in suites.COMPARED}) == len(suites.COMPARED)
    assert axes.colour("ppo-4") == axes.colour("ppo") and axes.colour("uniapl-lambda1") == axes.colour(
        "uniapl"
    )


def test_swapped_pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": f"p{i}", "chosen": "good", "rejected": "bad"}) + "\n" for i in range(300)
        )
    )
    kept = {share: [r["chosen"] == "good" for r in study.swapped(path, share)] for share in (0.25, 0.75, 1.0)}
    assert (
        all(kept[1.0])
        and 0.15 < np.mean(kept[0.25]) < 0.35
        and all(b or not a for a, b in zip(kept[0.25], kept[0.75]))
    )


def test_scores_of_one_text_in_two_batches_are_ties_in_the_tables(whole):
    logs = study.load(whole)
    log = logs["grao"][0]
    log.after["reward"] = log.after["expert_reward"] = log.before["reward"] = np.linspace(-1, 1, PROMPTS)
    log.after["reward"] = log.after["reward"] + 1e-7
    assert study.matrix(logs, "grao", "ras", [0]).sum() == study.matrix(logs, "grao", "nag", [0]).sum() == 0
