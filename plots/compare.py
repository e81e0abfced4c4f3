"""Run the study's grid: methods x seeds, several runs at a time, what is done already skipped.

    python -m plots.compare --suite tiny                                      # under an hour on two cores, see below
    python -m plots.compare --suite tiny --quick                              # the same programs and figures, next to no training
    python -m plots.compare --suite smollm2 --model FILE.gguf --part comparison
    python -m plots.compare --suite qwen3 --jobs 1                            # a GPU and the hub, or --model DIR
    python -m plots.compare --suite hh --model FILE.gguf --data hh-helpful --reward DIR-A --judge-reward DIR-B
    python -m plots.figures --logs runs/tiny --out runs/tiny/figures          # what draws them

The grid is in plots/suites.py. Ctrl-C lets every run finish its step and save; the same command goes on from there. A finished run is a
folder OUT/NAME/seed-N with config.json (settings, command, versions, machine), metrics.jsonl (what the figures read) and samples.jsonl (a line
of columns for each of the two evaluations, the first few answers as text); its checkpoint and adapter are deleted.
Learning rates come from SWEEPS/sweep-SUITE-METHOD.json, the best by reward on training prompts; `--sweep` makes the missing ones first.

What the tiny suite costs: 200 runs take about 5,700 seconds of one thread each, 48 minutes on two cores (one go, nothing beside it).
"""

import contextlib
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict
from multiprocessing.connection import wait
from pathlib import Path

import torch

import baselines
import minigrao
import uniapl
from data import UserError
from data.graded import graded_tasks
from engine.command_line import exit_status, parse
from engine.models import find_model, first_line
from engine.record import RunFolder, read_jsonl, write_whole
from engine.settings import check_settings
from plots import study, suites, sweep
from plots.tables import budgets
from reward import ModelReward
from reward_model import find_scorer, load_scorer
from train import main as train_main

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "minigrao.py": lambda argv: train_main(minigrao.GRAO, argv),
    "baselines.py": baselines.command_line,
    "uniapl.py": uniapl.command_line,
    "plots.sweep": lambda argv: exit_status(lambda: sweep.main(argv)),
}


def method_of(program):
    """("baselines.py sft") -> its Method."""
    name, *word = program.split()
    return (
        baselines.METHODS[word[0]]
        if word
        else {"minigrao.py": minigrao.GRAO, "uniapl.py": uniapl.UNIAPL}[name]
    )


# ---------------------------------------------------------------------------------------------------------------------------------
# What a run needs: its words, its learning rate, its data


def best_rate(folder, suite, key):
    """(learning rate, where it is from) of a sweep, or (None, "default")."""
    path = Path(folder) / f"sweep-{suite}-{key}.json"
    if not path.is_file():
        return None, "default"
    try:
        rows = json.loads(path.read_text())["rows"]
        return max(rows, key=lambda row: row["reward"])["lr"], f"{path.name}: " + ", ".join(
            f"{r['lr']:g}: {r['reward']:.3f}" for r in rows
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not a table of plots.sweep ({first_line(error)})") from error


def check_flags(run, flags):
    """UserError for a flag after `--` that is the runner's own, or part of what the run's name says."""
    said = {
        "--seed",
        "--out",
        "--resume",
        "--overwrite",
        *(word for word in suites.METHODS[run.name][1].split() if word.startswith("--")),
    }
    if clash := said & names(flags):
        raise UserError(f"{min(clash)} after --: is set by the grid (plots/suites.py) in {run.name}")


def names(flags):
    """["--lr=1e-3", "--steps", "3"] -> {"--lr", "--steps"}."""
    return {word.split("=")[0] for word in flags if word.startswith("--")}


def words_of(run, args, places):
    """(words of a run's command line without --out, where its learning rates are from). A rate given on the command line wins."""
    words = [*run.program.split(), *(word.format(**places) for word in run.flags), *args.flags]
    sources = []
    for flag, key in zip(("--lr", "--switch-lr"), run.sweeps):
        rate, source = (
            (None, "given") if flag in names(args.flags) else best_rate(args.sweeps, args.suite, key)
        )
        words += [flag, f"{rate:g}"] if rate is not None else []
        sources.append(source)
    return words, "; ".join(dict.fromkeys(sources))


def settings_of(words):
    """The checked Config of a command line; UserError for one that its program would refuse."""
    method = method_of(" ".join(words[:1] if words[0] != "baselines.py" else words[:2]))
    flags = words[2:] if words[0] == "baselines.py" else words[1:]
    return check_settings(method.config(**parse(method.config, flags, "")))


def write_graded(suite, data, folder):
    """quality-SHARE.jsonl for every share: the suite's tasks with so many right references; of a file, with so many pairs the right way round."""
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


# ---------------------------------------------------------------------------------------------------------------------------------
# One run, in a process of its own


def work(words, log, judge):
    """Run a command line, its output in `log`; `judge`: None, or (samples.jsonl, reward model) to score afterwards. Exits with its status."""
    os.setsid()  # Ctrl-C reaches the runner alone, which passes it on
    threading.Thread(target=stop_without_runner, daemon=True).start()
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = list(words)
    status = PROGRAMS[words[0]](list(words[1:]))
    if status == 0 and judge:
        status = exit_status(lambda: score_samples(*judge))
    sys.exit(status)


def stop_without_runner():
    """In a run: once the runner is gone, killed or with its terminal, save and stop, as on Ctrl-C."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGINT)


def score_samples(path, model):
    """Add to every line of samples.jsonl what another reward model gives: judge_reward of the answer, judge_reference_reward of the reference.

    Its raw scores: the penalty for a cut answer belongs to training, and would decide most comparisons by itself.
    """
    lines, judge = read_jsonl(path), ModelReward(load_scorer(model), model)
    prompts = [line["prompt"] for line in lines]
    scored = (judge(prompts, [line[kind] for line in lines]) for kind in ("completion", "reference"))
    lines = [line | {"judge_reward": a, "judge_reference_reward": b} for line, a, b in zip(lines, *scored)]
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return lines


class Task:
    """A run of the grid: where it is made, where its logs are kept, and whether it is done."""

    def __init__(self, run, args, places):
        self.run, self.name = run, f"{run.name} seed {run.seed}"
        self.words, self.rate_from = words_of(run, args, places)
        self.kept = Path(args.out) / run.name / f"seed-{run.seed}"
        self.folder = Path(args.out) / ".unfinished" / f"{run.name}-{run.seed}"
        self.log = self.folder.with_suffix(self.folder.suffix + ".log")
        self.judge = (self.folder / "samples.jsonl", args.judge_reward) if args.judge_reward else None
        self.wanted = asdict(settings_of(self.words))

    def changed(self, saved):
        """Settings in which a saved run is not the wanted one. What a setup fills in is None here, a setting newer than the run is not there, and files
        may have moved."""

        def same(a, b):
            return a == b or (isinstance(a, str) and isinstance(b, str) and Path(a).name == Path(b).name)

        ours = {k: v for k, v in self.wanted.items() if k in saved and v is not None}
        return [k for k, v in ours.items() if not same(saved[k], v)]

    def done(self):
        """Whether its logs are there, whole; UserError if they are of another run."""
        try:
            saved = json.loads((self.kept / "config.json").read_text())["settings"]
            metrics, samples = (read_jsonl(self.kept / f"{name}.jsonl") for name in ("metrics", "samples"))
            ends = metrics[-1]["step"], samples[-1]["step"]
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            return False  # nothing there, or nothing whole
        if changed := self.changed(saved):
            raise UserError(
                f"{self.kept}: {changed[0]} is {saved.get(changed[0])}, now wanted {self.wanted[changed[0]]}: choose another --out, or --overwrite"
            )
        return ends == (self.wanted["steps"],) * 2

    def start(self, context):
        """Begin it, or go on with it where a checkpoint of the same settings is there."""
        self.began = time.time()
        words = [*self.words, "--out", str(self.folder)]
        with contextlib.suppress(OSError, ValueError, KeyError):
            checkpoint = RunFolder(self.folder).checkpoint.is_file()
            if (
                checkpoint
                and not self.changed(json.loads((self.folder / "config.json").read_text())["settings"])
                and not self.complete()
            ):
                words.append("--resume")
        if words[-1] != "--resume":
            shutil.rmtree(self.folder, ignore_errors=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)
        self.process = context.Process(target=work, args=(words, str(self.log), self.judge), daemon=True)
        self.process.start()

    def complete(self):
        return read_jsonl(self.folder / "metrics.jsonl")[-1]["step"] >= self.wanted["steps"]

    def collect(self, args):
        """Keep the small logs and delete the rest -> a word on the result."""
        about = {
            "suite": args.suite,
            "name": self.run.name,
            "seed": self.run.seed,
            "command": shlex.join(["python", *self.words]),
            "learning_rate": self.rate_from,
            "judge": args.judge_reward and Path(args.judge_reward).name,
        }
        last = study.keep(self.folder, self.kept, about)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.log.unlink(missing_ok=True)
        return f"reward {last:.3f}"


class Sweep:
    """The sweep of a method's learning rate."""

    def __init__(self, key, args, places):
        self.path = Path(args.sweeps) / f"sweep-{args.suite}-{key}.json"
        method, self.rates, flags = suites.sweep(args.suite, key)
        flags = [word.format(**places) for word in flags]
        self.words = [
            "plots.sweep",
            method,
            "--lrs",
            *self.rates,
            "--out",
            os.path.relpath(self.path),
            "--overwrite",  # where a killed one has left its first rows
            "--",
            *flags,
            *args.flags,
        ]
        self.name, self.log = f"sweep {key}", Path(args.out) / ".unfinished" / f"sweep-{key}.log"

    def done(self):
        try:
            return [row["lr"] for row in json.loads(self.path.read_text())["rows"]] == [
                float(rate) for rate in self.rates
            ]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def start(self, context):
        self.began = time.time()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)
        self.process = context.Process(target=work, args=(self.words, str(self.log), None), daemon=True)
        self.process.start()

    def collect(self, args):
        self.log.unlink(missing_ok=True)
        rows = json.loads(self.path.read_text())["rows"]
        return "lr " + f"{max(rows, key=lambda row: row['reward'])['lr']:g}"


# ---------------------------------------------------------------------------------------------------------------------------------
# The runner


class Stop:
    """Ctrl-C or SIGTERM once: every run finishes its step and saves. Twice: they are killed; what their last checkpoint holds stands."""

    def __init__(self):
        self.running, self.asked = [], False

    def __call__(self, *_):
        if not self.asked:
            print(
                "\nstopping: every run finishes its step and saves (Ctrl-C again: at once)", file=sys.stderr
            )
        for task in self.running:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(task.process.pid, signal.SIGKILL if self.asked else signal.SIGINT)
        self.asked = True


def go(tasks, args, context):
    """Run tasks, --jobs at a time, reporting each -> names of those that failed. None if it was stopped."""
    stop, failed, waiting, total, done, began = Stop(), [], list(tasks), len(tasks), 0, time.time()
    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        while stop.running or (waiting and not stop.asked):
            while waiting and len(stop.running) < args.jobs and not stop.asked:
                waiting[0].start(context)
                stop.running.append(waiting.pop(0))
            wait([task.process.sentinel for task in stop.running], timeout=1)
            for task in [task for task in stop.running if not task.process.is_alive()]:
                task.process.join()
                stop.running.remove(task)
                if task.process.exitcode == 0:
                    done += 1
                    left = (time.time() - began) / done * (len(waiting) + len(stop.running))
                    print(
                        f"[{done}/{total}] {task.name}: {task.collect(args)} · {time.time() - task.began:.0f} s · about {left / 60:.0f} min left",
                        flush=True,
                    )
                elif not stop.asked:
                    text = task.log.read_text().strip().splitlines() if task.log.is_file() else []
                    print(
                        f"{task.name}: failed ({task.process.exitcode}): {text[-1] if text else 'no output'} · {task.log}",
                        file=sys.stderr,
                        flush=True,
                    )
                    failed.append(task.name)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return None if stop.asked else failed


def arguments(argv):
    argv, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = study.parser(__doc__)
    parser.add_argument("--suite", choices=suites.SUITES, required=True)
    parser.add_argument(
        "--part", nargs="+", choices=suites.PARTS, default=list(suites.PARTS), help="parts of the suite [all]"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=suites.METHODS,
        metavar="NAME",
        help="only these of the parts' runs [all]",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of fewer runs: to see that everything works"
    )
    parser.add_argument("--seeds", type=int, help="so many of every run [by suite and part]")
    parser.add_argument(
        "--jobs",
        type=int,
        help="runs at a time [a CPU: its cores, one thread each; a GPU: 1]. A run of SmolLM2 wants 4 GB",
    )
    parser.add_argument("--out", help="folder of the logs [runs/SUITE]")
    parser.add_argument("--model", help="smollm2, qwen3, hh: a hub name, a directory or a .gguf file")
    parser.add_argument(
        "--data", default="hh-helpful", help="hh: hh-helpful, hh-harmless or FILE.jsonl[.gz] [hh-helpful]"
    )
    parser.add_argument(
        "--reward", help="hh: the reward model that trains, a folder of `python reward.py train`"
    )
    parser.add_argument(
        "--judge-reward", help="hh: a second one, trained on other data, that judges; no run sees it"
    )
    parser.add_argument(
        "--sweeps", default=str(ROOT / "plots" / "logs"), help="folder of the sweeps' tables [plots/logs]"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="make the missing sweeps of learning rates first"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="run again what is there with other settings"
    )
    parser.add_argument("--list", action="store_true", help="print the command lines and stop")
    args = parser.parse_args(argv)
    args.flags, args.out = flags, args.out or f"runs/{args.suite}"
    for name in ("jobs", "seeds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    args.jobs = args.jobs or (1 if torch.cuda.is_available() else cores)
    args.threads = max(1, cores // args.jobs)
    if args.suite == "hh" and not (args.reward and args.judge_reward):
        raise UserError(
            "--suite hh: needs --reward and --judge-reward, two reward models (python reward.py train)"
        )
    args.model = args.model or {
        "smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "hh": "SmolLM2-135M-Instruct.Q4_1.gguf",
    }.get(args.suite, "Qwen/Qwen3-0.6B")
    return args


def compare(argv):
    """The command -> True when the grid is done, None if it was stopped."""
    args = arguments(argv)
    graded = Path(args.out) / ".unfinished" / "data"
    places = {"model": args.model, "data": args.data, "reward": args.reward, "graded": str(graded)}
    runs = [
        run
        for run in suites.grid(args.suite, args.part, args.seeds, args.quick)
        if run.name in (args.methods or [run.name])
    ]
    if not runs:
        raise UserError(f"--methods {' '.join(args.methods)}: not in {', '.join(args.part)} of this suite")
    for run in runs:
        check_flags(run, args.flags)
    sweeps = (
        [Sweep(key, args, places) for key in dict.fromkeys(key for run in runs for key in run.sweeps)]
        if args.sweep
        else []
    )
    if args.list:
        for words in [s.words for s in sweeps] + [words_of(run, args, places)[0] for run in runs]:
            print(shlex.join(["python", *(["-m"] if words[0] == "plots.sweep" else []), *words]))
        return True
    if "{model}" in suites.SUITES[args.suite].flags:
        find_model(args.model)  # missed once, not by every run; and a GGUF file is converted once
    if args.judge_reward:
        find_scorer(args.judge_reward)  # not first missed when the first run is trained
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Every run is a process of its own. On a CPU they are forked from one that has imported torch and transformers; CUDA survives no fork.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    if not torch.cuda.is_available():
        context.set_forkserver_preload(["baselines", "minigrao", "uniapl", "plots.sweep", "plots.tables"])
    missing = [s for s in sweeps if not s.done()]
    if missing:
        print(f"{len(missing)} sweeps of learning rates, {args.jobs} at a time")
        failed = go(missing, args, context)
        if failed is None:
            return None
        if failed:
            raise UserError(
                f"{len(failed)} sweeps failed ({', '.join(failed)}); their logs are in {Path(args.out) / '.unfinished'}"
            )
    tasks = [Task(run, args, places) for run in runs]
    if args.overwrite:
        waiting = []
        for task in tasks:
            with contextlib.suppress(UserError):
                if task.done():
                    continue
            waiting.append(task)
    else:
        waiting = [task for task in tasks if not task.done()]
    threads = os.environ["OMP_NUM_THREADS"]
    print(
        f"{args.suite}: {len(tasks)} runs, {len(tasks) - len(waiting)} done already; {args.jobs} at a time, threads each: {threads}",
        flush=True,
    )
    if waiting:
        if "quality" in args.part:
            write_graded(args.suite, args.data, graded)
        failed = go(waiting, args, context)
        if failed is None:
            print(
                f"stopped; go on with the same command: python -m plots.compare {shlex.join(argv)}",
                file=sys.stderr,
            )
            return None
        if failed:
            names = ", ".join(failed[:5]) + ", ..." * (len(failed) > 5)
            raise UserError(
                f"{len(failed)} of {len(tasks)} runs failed ({names}); the same command tries them again"
            )
        shutil.rmtree(graded, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: checkpoints of runs that were not asked for this time
            graded.parent.rmdir()
    write_whole(Path(args.out) / "budgets.md", budgets(study.load(args.out)))
    print(
        f"The logs are in {args.out}. Draw them: python -m plots.figures --logs {args.out} --out {Path(args.out) / 'figures'}"
    )
    return True


if __name__ == "__main__":
    sys.exit(exit_status(lambda: compare(sys.argv[1:])))
