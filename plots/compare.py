"""Run the study's grid: methods x seeds, several runs at a time, what is done already skipped.

    python -m plots.compare --suite tiny                 # under an hour on two cores, see below
    python -m plots.compare --suite tiny --quick         # the same programs and figures, next to no training
    python -m plots.compare --suite smollm2 --model FILE.gguf --part comparison
    python -m plots.compare --suite qwen3 --jobs 1       # a GPU and the hub, or --model DIR
    python -m plots.compare --suite hh --model FILE.gguf --data hh-helpful --reward DIR-A --judge-reward DIR-B
    python -m plots.figures --logs runs/tiny --out runs/tiny/figures           # what draws them

The grid is in plots/suites.py. Ctrl-C lets every run finish its step and save; the same command goes on from
there. A finished run is a folder OUT/NAME/seed-N with config.json (settings, command, versions, machine),
metrics.jsonl (what the figures read) and samples.jsonl (a line of columns for each of the two evaluations,
the first few answers as text); its checkpoint and adapter are deleted. `python -m plots.study pack` makes
one file of a finished study, and `unpack` these folders of it, to go on with (plots/study.py).

Learning rates come from tables sweep-SUITE-METHOD.json in OUT/sweeps, or else in --sweeps: the best by reward
on training prompts. `--sweep` makes the missing ones first.

What the tiny suite costs: 200 runs take about 5,700 seconds of one thread each, 48 minutes on two cores (one
go, nothing beside it).
"""

import contextlib
import json
import multiprocessing
import os
import shlex
import shutil
import sys
from pathlib import Path

import torch

from data import UserError
from data.graded import graded_tasks
from engine.command_line import exit_status
from engine.models import find_model
from engine.record import write_whole
from plots import flags, study, suites
from plots.jobs import Sweep, Task, check_flags, go, words_of
from plots.tables import budgets
from reward_model import find_scorer

ROOT = Path(__file__).parents[1]
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODELS = {"smollm2": SMOLLM2, "hh": SMOLLM2, "qwen3": "Qwen/Qwen3-0.6B"}  # where --model is not given


# ------------------------------------------------------------------------------------------------------------
# Flags


def command_line():
    """The parser of this command's own flags; what follows `--` is the runs' own."""
    p = flags.parser(__doc__)
    p.add_argument("--suite", choices=suites.SUITES, required=True)
    p.add_argument(
        "--part", nargs="+", choices=suites.PARTS, default=list(suites.PARTS), help="parts of the suite [all]"
    )
    p.add_argument(
        "--methods", nargs="+", choices=suites.METHODS, metavar="NAME", help="only these of the parts' runs"
    )
    p.add_argument("--quick", action="store_true", help="a few steps of fewer runs: does everything work?")
    p.add_argument("--seeds", type=int, help="so many of every run [by suite and part]")
    p.add_argument(
        "--jobs",
        type=int,
        help="runs at a time [a CPU: its cores, one thread each; a GPU: 1]. A run of SmolLM2 wants 4 GB",
    )
    p.add_argument("--out", help="folder of the logs [runs/SUITE]")
    p.add_argument("--model", help="smollm2, qwen3, hh: a hub name, a directory or a .gguf file")
    p.add_argument("--data", default="hh-helpful", help="hh: hh-helpful, hh-harmless or FILE.jsonl[.gz]")
    p.add_argument("--reward", help="hh: the reward model that trains, a folder of `python reward.py train`")
    p.add_argument("--judge-reward", help="hh: a second one, of other data, that judges; no run sees it")
    p.add_argument(
        "--sweeps",
        default=str(ROOT / "plots" / "logs" / "sweeps.jsonl.gz"),
        help="folder or packed file of tables of learning rates [plots/logs/sweeps.jsonl.gz]",
    )
    p.add_argument("--sweep", action="store_true", help="make the missing tables first, in OUT/sweeps")
    p.add_argument("--overwrite", action="store_true", help="run again what is there with other settings")
    p.add_argument("--list", action="store_true", help="print the command lines and stop")
    return p


def arguments(argv):
    """The checked flags; args.flags: the words after `--`, which every run is given."""
    own, theirs = argv, []
    if "--" in argv:
        own, theirs = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    args = command_line().parse_args(own)
    for name in ("jobs", "seeds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.suite == "hh" and not (args.reward and args.judge_reward):
        raise UserError(
            "--suite hh: needs --reward and --judge-reward, two reward models (python reward.py train)"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    args.jobs = args.jobs or (1 if torch.cuda.is_available() else cores)
    args.threads = max(1, cores // args.jobs)
    args.flags, args.out = theirs, args.out or f"runs/{args.suite}"
    args.sweep_places = [Path(args.out) / "sweeps", Path(args.sweeps)]  # the first that has a table is read
    args.model = args.model or MODELS.get(args.suite)
    return args


# ------------------------------------------------------------------------------------------------------------
# The study


def write_graded(suite, data, folder):
    """quality-SHARE.jsonl for every share: the suite's tasks with so many right expert answers; of a file,
    with so many pairs the right way round.
    """
    folder.mkdir(parents=True, exist_ok=True)
    level, n = suites.SUITES[suite].level, suites.SUITES[suite].records
    for share in suites.SHARES:
        if level:
            records = graded_tasks(level, n, share)
        else:
            records = study.swapped(data, share)[:n]
        write_whole(
            folder / f"quality-{share:g}.jsonl",
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records),
        )


def compare(argv):
    """The command -> True when the grid is done, None if it was stopped."""
    args = arguments(argv)
    graded = Path(args.out) / ".unfinished" / "data"
    places = {"model": args.model, "data": args.data, "reward": args.reward, "graded": str(graded)}
    runs = wanted_runs(args)
    sweeps = wanted_sweeps(runs, args, places)
    if args.list:
        list_commands(sweeps, runs, args, places)
        return True
    check_models(args)
    context = processes(args)
    if make_sweeps(sweeps, args, context) is None:
        return None
    tasks = [Task(run, args, places) for run in runs]
    waiting = [task for task in tasks if task.to_be_made(args.overwrite)]
    print(
        f"{args.suite}: {len(tasks)} runs, {len(tasks) - len(waiting)} done already; {args.jobs} at a time, "
        f"threads each: {os.environ['OMP_NUM_THREADS']}",
        flush=True,
    )
    if waiting:
        if "quality" in args.part:
            write_graded(args.suite, args.data, graded)
        if make_runs(waiting, len(tasks), args, context) is None:
            go_on = f"python -m plots.compare {shlex.join(argv)}"
            print(f"stopped; go on with the same command: {go_on}", file=sys.stderr)
            return None
        shutil.rmtree(graded, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: checkpoints of runs that were not asked for
            graded.parent.rmdir()
    write_whole(Path(args.out) / "budgets.md", budgets(study.load(args.out)))
    print(f"The logs are in {args.out}. Draw them, or make one file of them:")
    print(f"    python -m plots.figures --logs {args.out} --out {Path(args.out) / 'figures'}")
    print(f"    python -m plots.study pack {args.out} {args.out}.jsonl.gz")
    return True


def wanted_runs(args):
    """The runs of the grid that were asked for; UserError for none, or for flags that the grid sets."""
    runs = suites.grid(args.suite, args.part, args.seeds, args.quick)
    if args.methods:
        runs = [run for run in runs if run.name in args.methods]
    if not runs:
        raise UserError(f"--methods {' '.join(args.methods)}: not in {', '.join(args.part)} of this suite")
    for run in runs:
        check_flags(run, args.flags)
    return runs


def wanted_sweeps(runs, args, places):
    """With --sweep: one for every learning rate that some run takes."""
    if not args.sweep:
        return []
    keys = dict.fromkeys(key for run in runs for key in run.sweeps)
    return [Sweep(key, args, places) for key in keys]


def list_commands(sweeps, runs, args, places):
    for each in sweeps:
        print(shlex.join(["python", "-m", *each.words]))
    for run in runs:
        print(shlex.join(["python", *words_of(run, args, places)[0]]))


def check_models(args):
    """Find what every run needs once, so that it is missed once; a GGUF file is converted here."""
    if "{model}" in suites.SUITES[args.suite].flags:
        find_model(args.model)
    if args.judge_reward:
        find_scorer(args.judge_reward)


def processes(args):
    """What starts a run's process: on a CPU a fork of one that has imported torch; CUDA survives no fork."""
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["plots.jobs", "plots.tables"])
    return context


def make_sweeps(sweeps, args, context):
    """Make the sweeps that are missing -> True, or None if it was stopped; UserError if one failed."""
    missing = [each for each in sweeps if not each.done()]
    if not missing:
        return True
    print(f"{len(missing)} sweeps of learning rates, {args.jobs} at a time")
    failed = go(missing, args, context)
    if failed:
        where = Path(args.out) / ".unfinished"
        raise UserError(f"{len(failed)} sweeps failed ({', '.join(failed)}); their logs are in {where}")
    return None if failed is None else True


def make_runs(waiting, total, args, context):
    """Make the runs that are missing -> True, or None if it was stopped; UserError if one failed."""
    failed = go(waiting, args, context)
    if failed:
        names = ", ".join(failed[:5]) + (", ..." if len(failed) > 5 else "")
        raise UserError(f"{len(failed)} of {total} runs failed ({names}); the same command tries them again")
    return None if failed is None else True


if __name__ == "__main__":
    sys.exit(exit_status(lambda: compare(sys.argv[1:])))
