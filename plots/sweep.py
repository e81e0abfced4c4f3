"""Choose a learning rate on the training split: short runs of one method, each scored on the prompts it trained on.

    python -m plots.sweep grpo --lrs 1e-4 3e-4 1e-3 --out plots/logs/sweep-grpo.json -- --model DIR --steps 20 --prompts-per-step 4

Every method is measured the same way: the mean reward of one sample for each training prompt (at most 1000) after the run, with its 95 %
interval. What follows `--` are the method's own flags. The JSON holds one line for each learning rate, and the command.

    python -m plots.sweep grpo --runs runs/grpo-3e-4 runs/grpo-1e-3 --out plots/logs/sweep-smollm2-grpo.json

makes the table of runs that are there already, where a run costs too much to be thrown away: measured in that way if each folder still has its
adapter; if it is down to its logs, by the mean reward of all samples of the last ten steps (--last), which a collapse near the end hardly moves.
"""

import dataclasses
import json
import sys
import tempfile
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import baselines
import minigrao
import train
import uniapl
from data import UserError
from engine.command_line import OneLineParser, exit_status, parse
from engine.folders import holds, read_jsonl, reserve, to_json, write_whole
from engine.measures import summary
from engine.models import first_line
from engine.record import environment
from engine.settings import check_settings

MOST = 1000  # training prompts to score; fewer where the run had fewer
METHODS = baselines.METHODS | {"grao": minigrao.GRAO, "uniapl": uniapl.UNIAPL}


def train_reward(method, given, lr, folder):
    """One short run at `lr`, then the policy's rewards on its training prompts -> {"lr", "reward", "low", "high", "tokens"}."""
    path = train.run(method, given | {"lr": lr, "out": str(folder)})
    if path is None:
        raise KeyboardInterrupt
    return final_reward(method, given | {"lr": lr}, path)


def final_reward(method, given, path):
    """The policy that a finished run has left in `path`, on its training prompts."""
    method = dataclasses.replace(method, setup=None)  # sampling needs no value function and no discriminator
    trainer = train.Trainer(
        method, check_settings(method.config(**given | {"from_adapter": str(path / "adapter")}))
    )
    trainer.held_out = trainer.records[:MOST]
    measured = summary(trainer.evaluate())
    return {"lr": given["lr"], "prompts": len(trainer.held_out)} | {
        key: measured[key] for key in ("reward", "low", "high", "reference", "tokens")
    }


def last_rewards(settings, lines, last):
    """A finished run's samples of its `last` steps -> {"lr", "steps", "samples", "reward"}."""
    lines = lines[-last:]
    samples = len(lines) * settings["prompts_per_step"] * settings["group_size"]
    return {
        "lr": settings["lr"],
        "steps": lines[-1]["step"],
        "samples": samples,
        "reward": sum(line["reward/mean"] for line in lines) / len(lines),
    }


def finished(method, paths, last):
    """The row of each finished run, all of one kind; UserError for what is not a run of `method`, or cannot be measured like the others."""
    runs, kept = [], [(path / "adapter").is_dir() for path in paths]
    for path in paths:
        try:
            config = json.loads((path / "config.json").read_text())
            name, settings = config["method"], dict(config["settings"])
            settings = dataclasses.asdict(METHODS[name].config(**settings))
            lines = [line for line in read_jsonl(path / "metrics.jsonl") if "reward/mean" in line]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--runs {path}: is not a run's folder ({first_line(error)})") from error
        if name != method.name:
            raise UserError(f"--runs {path}: is a run of {name}, not of {method.name}")
        if not lines and not all(kept):
            raise UserError(
                f"--runs {path}: {name} draws no samples in training, so every run's adapter is needed"
            )
        runs.append((path, settings, lines))
    if any(kept) and not all(kept):
        raise UserError(
            f"--runs {paths[kept.index(False)]}: has no adapter, {paths[kept.index(True)]} has one, and the two measures do not compare"
        )
    for path, settings, lines in runs:
        yield final_reward(method, settings, path) if all(kept) else last_rewards(settings, lines, last)


def main(argv):
    mine, theirs = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--lrs", type=float, nargs="+", help="learning rates to try")
    which.add_argument(
        "--runs", type=Path, nargs="+", help="folders of finished runs that differ in their learning rate"
    )
    parser.add_argument(
        "--last", type=int, default=10, help="--runs without adapters: steps whose samples count [10]"
    )
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the sweep in --out")
    args = parser.parse_args(mine)
    if args.last < 1:
        raise UserError(f"--last {args.last}: must be at least 1")
    method = METHODS[args.method]
    given = parse(method.config, theirs, "")
    rows, about = [], {"command": "python -m plots.sweep " + " ".join(argv), "environment": environment()}
    ways = {"kind": "sweep", "remedies": ["--overwrite it"]}
    with (
        reserve(args.out, ours=is_sweep, overwrite=args.overwrite, **ways) as out,
        tempfile.TemporaryDirectory() as folder,
    ):
        measured = (
            (train_reward(method, given, lr, Path(folder) / f"{lr:g}") for lr in args.lrs)
            if args.lrs
            else finished(method, args.runs, args.last)
        )
        for row in measured:
            rows.append(row)
            print(row)
            write_whole(out, to_json(about | {"rows": rows}, indent=1) + "\n")
    return rows


def is_sweep(path):
    return holds(path, "command", "rows")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
