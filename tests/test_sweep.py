"""plots/sweep.py: the learning rates of a method, compared on the prompts it trained on."""

import json

from plots import sweep


def test_a_sweep_scores_each_rate_on_the_training_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "MOST", 5)
    out = tmp_path / "sweep.json"
    flags = ["--model", "tiny", "--steps", "2", "--prompts-per-step", "3", "--eval-prompts", "2"]
    sweep.main(["sft", "--lrs", "1e-9", "0.5", "--out", str(out), "--", *flags])
    result = json.loads(out.read_text())
    small, large = result["rows"]
    assert (small["lr"], large["lr"]) == (1e-9, 0.5) and small["prompts"] == large["prompts"] == 5  # 6 were trained on, MOST are scored
    assert small["tokens"] != large["tokens"]  # each row is its own adapter's: 0.5 destroys the model
    assert result["command"].endswith(" ".join(flags)) and result["environment"]["versions"]["torch"]
