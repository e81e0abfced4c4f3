"""y was once called "reference", as the frozen model is. Logs and flags of that time are still understood."""

import json

from test_train import SMALL

from engine.metrics import METRICS, RENAMED
from engine.record import RunFolder, read_jsonl
from engine.settings import check_settings
from minigrao import GRAO
from plots.study import COLUMNS
from train import Trainer, main, parse

OLD = {new: old for old, new in RENAMED.items()}


def test_new_names_are_defined_and_old_ones_are_gone():
    known = set(METRICS) | set(GRAO.metrics) | set(COLUMNS) | {"expert"}
    assert set(RENAMED.values()) <= known and not set(RENAMED) & known


def test_old_logs_are_read_by_todays_names(tmp_path):
    """Curves of earlier runs would otherwise end in a KeyError, or be drawn without their line to cross."""
    path = tmp_path / "samples.jsonl"
    old = {
        "step": 0,
        "reference_reward": [1.0, 0.0],
        "texts": [{"prompt": "p", "reference": "r", "completion": "c"}],
    }
    path.write_text(
        json.dumps(old) + "\n" + json.dumps({"step": 1, "reward/reference": 0.5, "kl/k1": 0.1}) + "\n"
    )
    texts = [{"prompt": "p", "expert": "r", "completion": "c"}]
    assert read_jsonl(path) == [
        {"step": 0, "expert_reward": [1.0, 0.0], "texts": texts},
        {"step": 1, "reward/expert": 0.5, "kl/k1": 0.1},
    ]


def test_the_old_flag_is_the_new_one():
    for flag in ("--max-expert-tokens", "--max-reference-tokens"):
        given = parse(GRAO.config, [*SMALL, flag, "10"], "")
        assert given["max_expert_tokens"] == 10
    t = Trainer(GRAO, check_settings(GRAO.config(**given)))
    assert all(len(r["expert_ids"]) <= 10 for r in t.records + t.held_out)


def test_a_run_with_the_old_names_is_resumed(tmp_path):
    """config.json, metrics.jsonl and samples.jsonl as the former version left them, stopped after its first
    step.
    """
    run = RunFolder(tmp_path / "run")

    def stop_at_once(trainer, records):
        raise KeyboardInterrupt

    flags = [*SMALL, "--steps", "2", "--out", str(run.path)]
    stopped = GRAO.__class__(**{**vars(GRAO), "update": stop_at_once})
    assert main(stopped, flags) == 130
    config = json.loads((run.path / "config.json").read_text())
    config["settings"]["max_reference_tokens"] = config["settings"].pop("max_expert_tokens")
    (run.path / "config.json").write_text(json.dumps(config))
    for path in (run.metrics, run.samples):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        old = [{OLD.get(name, name): value for name, value in line.items()} for line in lines]
        assert old != lines
        path.write_text("".join(json.dumps(line) + "\n" for line in old))
    assert main(GRAO, ["--resume", "--out", str(run.path)]) == 0
    assert all("eval/expert" in line for line in read_jsonl(run.metrics) if "eval/reward" in line)
    assert all("expert_reward" in line for line in map(json.loads, run.samples.read_text().splitlines()))
