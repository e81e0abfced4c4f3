"""The logs of the study: what is kept of a run, and how the tables and figures read it.

    keep(run folder, OUT/NAME/seed-N, about)      config.json with `about`, metrics.jsonl and samples.jsonl, reduced to about 30 kB
    load(OUT) -> {name: {seed: Log}}

samples.jsonl holds a line for each of the two evaluations, a column for each measure, in the order of the held-out prompts, which is the same in
every run on the same data: {"step": 60, "reward": [1.0, 0.0, ...], "tokens": [...], ..., "texts": [{"prompt", "expert", "completion"}, ...]}.
"""

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import UserError
from data.loaders import HUB_FOLDERS, download, read_records
from engine.command_line import OneLineParser
from engine.models import first_line, whole_directory
from engine.record import read_jsonl

TEXTS = 8  # held-out answers kept as text
COLUMNS = (
    "reward",
    "expert_reward",
    "tokens",
    "expert_tokens",
    "truncated",
    "kl",
    "logp_expert",
    "judge_reward",
    "judge_expert_reward",
)
METRICS = (  # what the figures draw over steps
    "step",
    "reward/mean",
    "reward/expert",
    "groups/no_signal",
    "length/mean",
    "kl/k1",
    "entropy",
    "loss",
    "tokens/generated",
    "updates",
    "time/rollout",
    "time/update",
    "share/exploration",
    "share/imitation",
    "share/regularizer",
    "objective/exploration",
    "objective/imitation",
    "objective/regularizer",
    "advantage/expert",
    "logp/expert",
    "gradient/imitation",
    "gradient/preference",
    "gradient/adversarial",
    "mu",
    "score/expert",
    "score/policy",
    "score/accuracy",
    "distinct/2",
    "stage",
    "eval/reward",
    "eval/expert",
    "eval/kl",
    "eval/logp_expert",
)


def short(value):
    """Four significant digits, which is more than any figure shows."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def keep(folder, target, about):
    """Reduce a finished run folder into `target`, whole or not at all -> mean held-out reward at its end."""
    config = json.loads((folder / "config.json").read_text()) | {"study": about}
    metrics = [
        {k: short(line[k]) for k in METRICS if k in line} for line in read_jsonl(folder / "metrics.jsonl")
    ]
    samples, lines = read_jsonl(folder / "samples.jsonl"), []
    for step in sorted({s["step"] for s in samples}):
        part = [s for s in samples if s["step"] == step]
        line = {"step": step} | {k: [short(float(s[k])) for s in part] for k in COLUMNS if k in part[0]}
        lines.append(
            line | {"texts": [{k: s[k] for k in ("prompt", "expert", "completion")} for s in part[:TEXTS]]}
        )
    with whole_directory(target) as tmp:
        (tmp / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        for name, content in (("metrics", metrics), ("samples", lines)):
            (tmp / f"{name}.jsonl").write_text(
                "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in content)
            )
    return float(np.mean(lines[-1]["reward"]))


@dataclass
class Log:
    """One run's logs. before, after: {column: (P,) array}, and "texts"."""

    name: str
    seed: int
    config: dict
    metrics: list
    before: dict
    after: dict

    def curve(self, metric):
        """(steps, values) of a metric where it was logged, as arrays."""
        points = [(line["step"], line[metric]) for line in self.metrics if metric in line]
        return np.array([p[0] for p in points]), np.array([p[1] for p in points], dtype=float)

    def last(self, metric, default=np.nan):
        values = self.curve(metric)[1]
        return float(values[-1]) if len(values) else default

    def tokens(self):
        """(steps, tokens sampled until then)."""
        steps, found = (
            [line["step"] for line in self.metrics],
            [line.get("tokens/generated", 0) for line in self.metrics],
        )
        return np.array(steps), np.maximum.accumulate(found)

    def seconds(self):
        """(steps, seconds of rollouts and updates until then): evaluations and start-up are left out."""
        steps = np.array([line["step"] for line in self.metrics])
        return steps, np.cumsum(
            [line.get("time/rollout", 0.0) + line.get("time/update", 0.0) for line in self.metrics]
        )

    @property
    def settings(self):
        return self.config["settings"]


def load(folder):
    """All kept runs below a folder -> {name: {seed: Log}}, by name and seed. UserError if there is none, or one is damaged."""
    found = {}
    for path in sorted(Path(folder).glob("*/seed-*/config.json")):
        if path.parts[-3].startswith("."):
            continue
        try:
            config = json.loads(path.read_text())
            metrics, samples = (
                read_jsonl(path.with_name(f"{name}.jsonl")) for name in ("metrics", "samples")
            )
            before, after = (
                {k: np.array(v, dtype=float) if k in COLUMNS else v for k, v in line.items()}
                for line in (samples[0], samples[-1])
            )
            name, seed = config["study"]["name"], config["study"]["seed"]
            found.setdefault(name, {})[seed] = Log(name, seed, config, metrics, before, after)
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"{path.parent}: is damaged ({first_line(error)}); delete it and run plots.compare again"
            ) from error
    if not found:
        raise UserError(
            f"{folder}: holds no logs of the study (NAME/seed-N/config.json); make them with python -m plots.compare --out {folder}"
        )
    return {name: dict(sorted(seeds.items())) for name, seeds in found.items()}


def common_seeds(logs, names):
    """Seeds that every one of these names has: what is compared is compared on the same."""
    return sorted(set.intersection(*(set(logs[name]) for name in names))) if names else []


def matrix(logs, name, measure, seeds=None):
    """A measure of a method's answers after training -> (S, P), rows by seed. UserError where runs answer other prompts.

    measure: "reward", "ras" (1 where it beats the expert answer's reward), "nag" (sign against the policy before training), "kl", "tokens", or
    another column. Where a judge scored the run, "ras", "nag" and "judged" are by the judge, "reward" by what trained it.
    """
    rows = []
    for seed in logs[name] if seeds is None else seeds:
        before, after = logs[name][seed].before, logs[name][seed].after
        judged = "judge_" if "judge_reward" in after else ""
        if measure == "ras":
            rows.append((after[judged + "reward"] > after[judged + "expert_reward"]).astype(float))
        elif measure == "nag":
            rows.append(np.sign(after[judged + "reward"] - before[judged + "reward"]))
        else:
            rows.append(after[judged + "reward" if measure == "judged" else measure])
    if len({len(row) for row in rows}) > 1:
        raise UserError(
            f"{name}: its seeds answered different numbers of held-out prompts; run them with one suite"
        )
    return np.array(rows)


def swapped(source, share):
    """Preference pairs of a file or of the hub, of which `share` keep their order and the others are turned round; by a coin of each prompt's own."""
    records = []
    for record in read_records(download(source, "train") if source in HUB_FOLDERS else source):
        coin = int(hashlib.sha256(json.dumps(record["prompt"]).encode()).hexdigest(), 16) % 10**6 / 10**6
        if isinstance(record.get("rejected"), str) and record["rejected"].strip():
            turned = {"chosen": record["rejected"], "rejected": record["chosen"]}
            records.append(record if coin < share else record | turned)
    return records


def parser(doc):
    return OneLineParser(
        description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
