"""The logs of the study: what is kept of a run, how logs are packed, and how tables and figures read them.

    keep(run folder, OUT/NAME/seed-N, about)    config.json with `about`, metrics.jsonl, samples.jsonl: 30 kB
    load(OUT or FILE.jsonl.gz)                  -> {name: {seed: Log}}

samples.jsonl holds a line for each of the two evaluations, a column for each measure, in the order of the
held-out prompts, which is the same in every run on the same data:

    {"step": 60, "reward": [1.0, 0.0, ...], ..., "texts": [{"prompt", "expert", "completion"}, ...]}

While a study runs, plots.compare keeps each run as a folder, which is there whole or not at all. What is
published in plots/logs is one file a study, study-tiny.jsonl.gz, with its figures in study-tiny/figures:

    python -m plots.study pack runs/tiny FILE.jsonl.gz      # the folders stay
    python -m plots.study unpack FILE.jsonl.gz runs/tiny    # to go on with a study, or to look at a run

A line of it is a folder with its files, by name, as JSON (`zcat FILE | head -1`):

    {"folder": "grao/seed-0", "config.json": {...}, "metrics.jsonl": [{...}, ...], "samples.jsonl": [...]}

The same logs give the same bytes. Single runs and reward models are packed in the same way, into
single-runs.jsonl.gz, and so are the tables of learning rates, into sweeps.jsonl.gz.
"""

import gzip
import hashlib
import json
import sys
import zlib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import numpy as np

from data import UserError
from data.loaders import HUB_FOLDERS, download, read_records
from engine.command_line import exit_status
from engine.measures import compare
from engine.metrics import renamed
from engine.models import first_line, whole_directory
from engine.record import read_jsonl, write_whole
from plots import flags

TEXTS = 8  # held-out answers kept as text
COLUMNS = (
    "reward",
    "expert_reward",
    "floor_reward",
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


# ------------------------------------------------------------------------------------------------------------
# From a run folder to its logs


def keep(folder, target, about):
    """Reduce a finished run folder into `target`, whole or not at all -> mean held-out reward at its end."""
    config = json.loads((folder / "config.json").read_text()) | {"study": about}
    metrics = []
    for line in read_jsonl(folder / "metrics.jsonl"):
        metrics.append({name: short(line[name]) for name in METRICS if name in line})
    samples = read_jsonl(folder / "samples.jsonl")
    evaluations = []
    for step in sorted({sample["step"] for sample in samples}):
        evaluations.append(columns(step, [sample for sample in samples if sample["step"] == step]))
    files = {"config.json": config, "metrics.jsonl": metrics, "samples.jsonl": evaluations}
    with whole_directory(target) as tmp:
        write_files(tmp, files)
    return float(np.mean(evaluations[-1]["reward"]))


def columns(step, samples):
    """The samples of one evaluation as one line: a list for each measure, and the first few texts."""
    line = {"step": step}
    for name in COLUMNS:
        if name in samples[0]:
            line[name] = [short(float(sample[name])) for sample in samples]
    texts = []
    for sample in samples[:TEXTS]:
        texts.append({name: sample[name] for name in ("prompt", "expert", "completion")})
    return line | {"texts": texts}


# ------------------------------------------------------------------------------------------------------------
# Folders, and one file of them

# What is read and packed; everything else in a folder (adapter, checkpoint, pictures) is left where it is.
FILES = (
    "config.json",
    "metrics.jsonl",
    "samples.jsonl",
    "report.txt",
    "rates.txt",
    "reward_model.json",
    "sweep-*.json",
)


def is_log(name):
    return any(fnmatch(name, pattern) for pattern in FILES)


def parse(name, text):
    """A file's content: a list for .jsonl, what JSON holds for .json, else the text."""
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.split("\n") if line]
    return json.loads(text) if name.endswith(".json") else text


def write_files(folder, files):
    """The opposite of `parse` for a folder's files: {name: content}."""
    for name, content in files.items():
        if name.endswith(".jsonl"):
            content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in content)
        elif name.endswith(".json"):
            content = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (folder / name).write_text(content)


def folders(path):
    """The logs below a folder, or in a packed file: yields (folder's name, {file name: content}), by name.

    Folders whose name begins with a dot are work that is not finished. UserError for what is not there or
    damaged.
    """
    path = Path(path)
    if path.is_dir():
        yield from folders_below(path)
    elif path.name.endswith(".jsonl.gz") and path.is_file():
        yield from packed(path)
    else:
        raise UserError(f"{path}: neither a folder of logs nor a packed FILE.jsonl.gz (plots/study.py)")


def folders_below(root):
    found = {path.parent for pattern in FILES for path in root.rglob(pattern)}
    for folder in sorted(found):
        name = folder.relative_to(root)
        if any(part.startswith(".") for part in name.parts):
            continue
        try:
            files = {p.name: parse(p.name, p.read_text()) for p in sorted(folder.iterdir()) if is_log(p.name)}
        except (OSError, ValueError) as error:
            raise damaged(folder, error) from error
        yield name.as_posix(), files


def packed(path):
    try:
        for line in gzip.decompress(path.read_bytes()).decode().strip("\n").split("\n"):
            files = json.loads(line)
            yield files.pop("folder"), files
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is damaged ({first_line(error)})") from error


def damaged(folder, error):
    return UserError(f"{folder}: is damaged ({first_line(error)}); delete it and run plots.compare again")


def pack(folder, target):
    """Write the logs below a folder as one file, the same bytes for the same logs -> how many folders."""
    lines = []
    for name, files in folders(folder):
        lines.append(json.dumps({"folder": name} | files, ensure_ascii=False, separators=(",", ":")) + "\n")
    if not lines:
        raise UserError(f"{folder}: holds no logs (config.json, metrics.jsonl, samples.jsonl, sweep-*.json)")
    write_whole(
        target, gzip.compress("".join(lines).encode(), 9, mtime=0)
    )  # gzip would write the time of day
    return len(lines)


def unpack(path, target):
    """Write a packed file's folders below `target`, which must not be there yet -> how many."""
    if target.exists():
        raise UserError(f"{target} exists already: choose another folder")
    with whole_directory(target) as tmp:
        count = 0
        for name, files in folders(path):
            parts = PurePosixPath(name).parts
            if name.startswith("/") or ".." in parts or not all(map(is_log, files)):
                raise UserError(f"{path}: {name} is no folder of logs")  # nothing is written elsewhere
            (tmp / name).mkdir(parents=True, exist_ok=True)
            write_files(tmp / name, files)
            count += 1
    return count


# ------------------------------------------------------------------------------------------------------------
# What tables and figures read


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

    def steps(self):
        return np.array([line["step"] for line in self.metrics])

    def tokens(self):
        """(steps, tokens sampled until then)."""
        found = [line.get("tokens/generated", 0) for line in self.metrics]
        return self.steps(), np.maximum.accumulate(found)

    def seconds(self):
        """(steps, seconds of rollouts and updates until then): evaluations and start-up are left out."""
        spent = [line.get("time/rollout", 0.0) + line.get("time/update", 0.0) for line in self.metrics]
        return self.steps(), np.cumsum(spent)

    @property
    def settings(self):
        return self.config["settings"]


def load(path):
    """All kept runs below a folder, or in a packed file -> {name: {seed: Log}}, by name and seed.

    UserError if there is none, or one is damaged.
    """
    found = {}
    for folder, files in folders(path):
        if "study" not in files.get("config.json", ()):
            continue  # a single run, or tables of learning rates
        try:
            log = as_log(files)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise damaged(Path(path) / folder, error) from error
        found.setdefault(log.name, {})[log.seed] = log
    if not found:
        raise UserError(
            f"{path}: holds no logs of the study (NAME/seed-N/config.json); make them with "
            f"python -m plots.compare --out {path}"
        )
    return {name: dict(sorted(seeds.items())) for name, seeds in found.items()}


def as_log(files):
    """One folder's files -> Log. Here, and nowhere else, old logs get the names of today."""
    config, samples = files["config.json"], renamed(files["samples.jsonl"])
    before, after = arrays(samples[0]), arrays(samples[-1])
    name, seed = config["study"]["name"], config["study"]["seed"]
    return Log(name, seed, config, renamed(files["metrics.jsonl"]), before, after)


def arrays(line):
    """A line of samples.jsonl, its measures as arrays (P,)."""
    return {name: np.array(v, dtype=float) if name in COLUMNS else v for name, v in line.items()}


def rates(path, name):
    """The table NAME of learning rates, sweep-SUITE-METHOD.json, in a folder or a packed file, or None.

    UserError if it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        try:
            return json.loads((path / name).read_text()) if (path / name).is_file() else None
        except ValueError as error:
            raise UserError(f"{path / name}: is not a table of plots.sweep ({first_line(error)})") from error
    if path.is_file():
        for _, files in folders(path):
            if name in files:
                return files[name]
    return None


def common_seeds(logs, names):
    """Seeds that every one of these names has: what is compared is compared on the same."""
    return sorted(set.intersection(*(set(logs[name]) for name in names))) if names else []


def matrix(logs, name, measure, seeds=None):
    """A measure of a method's answers after training -> (S, P), rows by seed.

    measure: "reward", "ras" (1 where it beats the expert answer's reward), "nag" (sign against the policy
    before training), "kl", "tokens", or another column. Where a judge scored the run, "ras", "nag" and
    "judged" are by the judge, "reward" by what trained it. UserError where runs answer other prompts.
    """
    rows = []
    for seed in logs[name] if seeds is None else seeds:
        rows.append(measured(logs[name][seed], measure))
    if len({len(row) for row in rows}) > 1:
        raise UserError(
            f"{name}: its seeds answered different numbers of held-out prompts; run them with one suite"
        )
    return np.array(rows)


def measured(log, measure):
    """One run's measure, (P,); see matrix."""
    before, after = log.before, log.after
    judged = "judge_" if "judge_reward" in after else ""
    if measure == "ras":
        return (compare(after[judged + "reward"], after[judged + "expert_reward"]) > 0).astype(float)
    if measure == "nag":
        return compare(after[judged + "reward"], before[judged + "reward"])
    return after[judged + "reward" if measure == "judged" else measure]


# ------------------------------------------------------------------------------------------------------------
# Pairs of which some are turned round


def swapped(source, share):
    """Preference pairs of a file or of the hub, of which `share` keep their order and the others are turned
    round.

    By a coin of each prompt's own, so that a larger share turns fewer of the same pairs.
    """
    records = []
    for record in read_records(download(source, "train") if source in HUB_FOLDERS else source):
        coin = int(hashlib.sha256(json.dumps(record["prompt"]).encode()).hexdigest(), 16) % 10**6 / 10**6
        if isinstance(record.get("rejected"), str) and record["rejected"].strip():
            turned = {"chosen": record["rejected"], "rejected": record["chosen"]}
            records.append(record if coin < share else record | turned)
    return records


# ------------------------------------------------------------------------------------------------------------
# The command


def main(argv):
    parser = flags.parser(__doc__)
    parser.add_argument("command", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path, help="pack: a folder of logs; unpack: FILE.jsonl.gz")
    parser.add_argument("target", type=Path, help="pack: FILE.jsonl.gz; unpack: a new folder")
    parser.add_argument("--overwrite", action="store_true", help="pack: replace a packed file")
    args = parser.parse_args(argv)
    if args.command == "unpack":
        print(f"{unpack(args.source, args.target)} folders are in {args.target}")
        return True
    if not args.target.name.endswith(".jsonl.gz"):
        raise UserError(f"{args.target}: call it NAME.jsonl.gz")
    flags.check_target(args.target, args.overwrite, lambda path: list(folders(path)))
    count = pack(args.source, args.target)
    print(f"{count} folders in {args.target}, {args.target.stat().st_size / 1e6:.2f} MB")
    return True


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
