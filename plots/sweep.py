"""Choose a learning rate on the training split: short runs, scored on the prompts they trained on.

    python -m plots.sweep grpo --lrs 1e-4 3e-4 1e-3 --out runs/sweep-grpo.json -- --model DIR --steps 20

Every method is measured the same way: the mean reward of one sample for each training prompt (at most 1000)
after the run, with its 95 % interval. What follows `--` are the method's own flags. The JSON holds one line
for each learning rate, and the command.

    python -m plots.sweep grpo --runs runs/grpo-3e-4 runs/grpo-1e-3 --out runs/sweep-smollm2-grpo.json

makes the table of runs that are there already, where a run costs too much to be thrown away: measured in that
way if each folder still has its adapter; if it is down to its logs, by the mean reward of all samples of the
last ten steps (--last), which a collapse near the end hardly moves.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import baselines
import minigrao
import train
import uniapl
from data import UserError
from engine.command_line import exit_status, parse
from engine.evaluation import evaluate
from engine.folders import holds, read_jsonl, reserve, to_json, write_whole
from engine.measures import summary
from engine.models import first_line
from engine.record import environment
from engine.settings import check_settings
from plots import flags

MOST = 1000  # training prompts to score; fewer where the run had fewer
METHODS = baselines.METHODS | {"grao": minigrao.GRAO, "uniapl": uniapl.UNIAPL}


def train_reward(method, given, lr, folder):
    """One short run at `lr`, then the policy's rewards on its training prompts.

    -> {"lr", "prompts", "reward", "low", "high", "expert", "tokens"}
    """
    path = train.run(method, given | {"lr": lr, "out": str(folder)})
    if path is None:
        raise KeyboardInterrupt
    return final_reward(method, given | {"lr": lr}, path)


def final_reward(method, given, path):
    """The policy that a finished run has left in `path`, on its training prompts."""
    method = dataclasses.replace(method, setup=None)  # sampling needs no value function and no discriminator
    config = check_settings(method.config(**given | {"from_adapter": str(path / "adapter")}))
    trainer = train.Trainer(method, config)
    trainer.held_out = trainer.records[:MOST]
    measured = summary(evaluate(trainer))
    row = {"lr": given["lr"], "prompts": len(trainer.held_out)}
    return row | {name: measured[name] for name in ("reward", "low", "high", "expert", "tokens")}


def last_rewards(settings, lines, last):
    """A finished run's samples of its `last` steps -> {"lr", "steps", "samples", "reward"}."""
    lines = lines[-last:]
    return {
        "lr": settings["lr"],
        "steps": lines[-1]["step"],
        "samples": len(lines) * settings["prompts_per_step"] * settings["group_size"],
        "reward": sum(line["reward/mean"] for line in lines) / len(lines),
    }


def read_run(method, path):
    """(settings, lines that speak of samples) of a finished run; UserError for what is no run of `method`."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        name, settings = config["method"], dict(config["settings"])
        settings = dataclasses.asdict(METHODS[name].config(**settings))
        lines = [line for line in read_jsonl(path / "metrics.jsonl") if "reward/mean" in line]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--runs {path}: is not a run's folder ({first_line(error)})") from error
    if name != method.name:
        raise UserError(f"--runs {path}: is a run of {name}, not of {method.name}")
    return settings, lines


def finished(method, paths, last):
    """The row of each finished run, all measured in one way; UserError for runs that cannot be."""
    kept = [(path / "adapter").is_dir() for path in paths]
    runs = [read_run(method, path) for path in paths]
    for path, (_, lines) in zip(paths, runs):
        if not lines and not all(kept):
            raise UserError(
                f"--runs {path}: {method.name} draws no samples in training, so every run's adapter is needed"
            )
    if any(kept) and not all(kept):
        without, other = paths[kept.index(False)], paths[kept.index(True)]
        raise UserError(
            f"--runs {without}: has no adapter, {other} has one, and the two measures do not compare"
        )
    for path, (settings, lines) in zip(paths, runs):
        yield final_reward(method, settings, path) if all(kept) else last_rewards(settings, lines, last)


def command_line():
    p = flags.parser(__doc__)
    p.add_argument("method", choices=METHODS)
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--lrs", type=float, nargs="+", help="learning rates to try")
    which.add_argument(
        "--runs", type=Path, nargs="+", help="folders of finished runs that differ in their learning rate"
    )
    p.add_argument("--last", type=int, default=10, help="--runs without adapters: steps that count [10]")
    p.add_argument("--out", type=Path, required=True, help="JSON file to write")
    p.add_argument("--overwrite", action="store_true", help="replace --out, if it is a table of this command")
    return p


def main(argv):
    """The command -> the table's rows. The table is written again after each rate."""
    own, theirs = argv, []
    if "--" in argv:
        own, theirs = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    args = command_line().parse_args(own)
    if args.last < 1:
        raise UserError(f"--last {args.last}: must be at least 1")
    method = METHODS[args.method]
    given = parse(method.config, theirs, "")
    rows = []
    held = reserve(args.out, "table of learning rates", is_sweep, args.overwrite, ["--overwrite it"])
    with held as out, tempfile.TemporaryDirectory() as folder:
        measured = finished(method, args.runs, args.last) if args.runs else None
        if args.lrs:
            measured = (train_reward(method, given, lr, Path(folder) / f"{lr:g}") for lr in args.lrs)
        for row in measured:
            rows.append(row)
            print(row)
            command = "python -m plots.sweep " + " ".join(argv)
            result = {"command": command, "environment": environment(), "rows": rows}
            write_whole(out, to_json(result, indent=1) + "\n")
    return rows


def is_sweep(path):
    return holds(path, "command", "environment", "rows")


if __name__ == "__main__":
    sys.exit(
        exit_status(lambda: main(sys.argv[1:]), stopped="stopped; the rates measured so far are in --out")
    )
