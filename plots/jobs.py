"""The runs of plots.compare: their command lines, their processes, and the runner that starts and stops them.

A Task is a run of the grid, a Sweep the choice of a learning rate; both have done(), start(context) and
collect(args), and `go` runs a list of them, some at a time.
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

import baselines
import minigrao
import uniapl
from data import UserError
from engine.command_line import exit_status, parse
from engine.models import first_line
from engine.record import RunFolder, read_jsonl, write_whole
from engine.settings import check_settings
from plots import study, suites, sweep
from reward import ModelReward
from reward_model import load_scorer
from train import main as train_main

PROGRAMS = {
    "minigrao.py": lambda argv: train_main(minigrao.GRAO, argv),
    "baselines.py": baselines.command_line,
    "uniapl.py": uniapl.command_line,
    "plots.sweep": lambda argv: exit_status(lambda: sweep.main(argv)),
}


def method_of(program):
    """("baselines.py sft") -> its Method."""
    name, *word = program.split()
    if word:
        return baselines.METHODS[word[0]]
    return {"minigrao.py": minigrao.GRAO, "uniapl.py": uniapl.UNIAPL}[name]


# ------------------------------------------------------------------------------------------------------------
# What a run needs: its words, its learning rate, its data


def best_rate(places, suite, key):
    """(learning rate, where it is from) of the first place that holds the sweep, or (None, "default").

    places: folders of tables, or packed files of them. UserError for a table that is none.
    """
    name = f"sweep-{suite}-{key}.json"
    for place in places:
        table = study.rates(place, name)
        if table is None:
            continue
        try:
            best = max(table["rows"], key=lambda row: row["reward"])["lr"]
            tried = ", ".join(f"{row['lr']:g}: {row['reward']:.3f}" for row in table["rows"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{place}: {name} is not a table of plots.sweep ({first_line(error)})") from error
        return best, f"{name}: {tried}"
    return None, "default"


def check_flags(run, flags):
    """UserError for a flag after `--` that is the runner's own, or part of what the run's name says."""
    said = {"--seed", "--out", "--resume", "--overwrite"}
    said |= names(suites.METHODS[run.name][1].split())
    if clash := said & names(flags):
        raise UserError(f"{min(clash)} after --: is set by the grid (plots/suites.py) in {run.name}")


def names(flags):
    """["--lr=1e-3", "--steps", "3"] -> {"--lr", "--steps"}."""
    return {word.split("=")[0] for word in flags if word.startswith("--")}


def words_of(run, args, places):
    """(words of a run's command line without --out, where its learning rates are from).

    A rate given on the command line wins.
    """
    words = [*run.program.split(), *(word.format(**places) for word in run.flags), *args.flags]
    sources = []
    for flag, key in zip(("--lr", "--switch-lr"), run.sweeps):
        rate, source = None, "given"
        if flag not in names(args.flags):
            rate, source = best_rate(args.sweep_places, args.suite, key)
        if rate is not None:
            words += [flag, f"{rate:g}"]
        sources.append(source)
    return words, "; ".join(dict.fromkeys(sources))


def settings_of(words):
    """The checked Config of a command line; UserError for one that its program would refuse."""
    count = 2 if words[0] == "baselines.py" else 1  # words that name the method
    method = method_of(" ".join(words[:count]))
    return check_settings(method.config(**parse(method.config, words[count:], "")))


# ------------------------------------------------------------------------------------------------------------
# One run, in a process of its own


def work(words, log, judge):
    """Run a command line, its output in `log`; `judge`: None, or (samples.jsonl, reward model) to score
    afterwards. Exits with its status.
    """
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
    """Add to every line of samples.jsonl what another reward model gives: judge_reward of the answer,
    judge_expert_reward of the expert's.

    Its raw scores: the penalty for a cut answer belongs to training, and would decide most comparisons by
    itself.
    """
    lines, judge = read_jsonl(path), ModelReward(load_scorer(model), model)
    prompts = [line["prompt"] for line in lines]
    scored = (judge(prompts, [line[kind] for line in lines]) for kind in ("completion", "expert"))
    lines = [line | {"judge_reward": a, "judge_expert_reward": b} for line, a, b in zip(lines, *scored)]
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
        """Settings in which a saved run is not the wanted one.

        What a setup fills in is None here, a setting newer than the run is not there, and files may have
        moved.
        """

        def same(a, b):
            return a == b or (isinstance(a, str) and isinstance(b, str) and Path(a).name == Path(b).name)

        ours = {k: v for k, v in self.wanted.items() if k in saved and v is not None}
        return [k for k, v in ours.items() if not same(saved[k], v)]

    def done(self):
        """Whether its logs are there, whole; UserError if they are of another run."""
        try:
            saved = json.loads((self.kept / "config.json").read_text())["settings"]
            ends = [read_jsonl(self.kept / f"{name}.jsonl")[-1]["step"] for name in ("metrics", "samples")]
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            return False  # nothing there, or nothing whole
        if changed := self.changed(saved):
            was, wanted = saved.get(changed[0]), self.wanted[changed[0]]
            raise UserError(
                f"{self.kept}: {changed[0]} is {was}, now wanted {wanted}: choose another --out, or "
                "--overwrite"
            )
        return ends == [self.wanted["steps"]] * 2

    def to_be_made(self, overwrite):
        """Whether it is to be run: what is there with other settings is, if --overwrite was given."""
        if not overwrite:
            return not self.done()
        try:
            return not self.done()
        except UserError:
            return True

    def start(self, context):
        """Begin it, or go on with it where a checkpoint of the same settings is there."""
        self.began = time.time()
        words = [*self.words, "--out", str(self.folder)]
        if self.can_go_on():
            words.append("--resume")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)
        self.process = context.Process(target=work, args=(words, str(self.log), self.judge), daemon=True)
        self.process.start()

    def can_go_on(self):
        """Whether a checkpoint is there, of the same settings and before the last step."""
        try:
            saved = json.loads((self.folder / "config.json").read_text())["settings"]
            begun = RunFolder(self.folder).checkpoint.is_file() and not self.changed(saved)
            return begun and not self.complete()
        except (OSError, ValueError, KeyError, IndexError):
            return False

    def complete(self):
        return RunFolder(self.folder).report.is_file()

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
    """The sweep of a method's learning rate; its table goes to OUT/sweeps."""

    def __init__(self, key, args, places):
        table = f"sweep-{args.suite}-{key}.json"
        self.places, self.path = args.sweep_places, args.sweep_places[0] / table
        method, self.rates, flags = suites.sweep(args.suite, key)
        flags = [word.format(**places) for word in flags]
        # --overwrite: what is at this place, in this command's own folder, is a table that was not finished.
        out = ["--overwrite", "--out", os.path.relpath(self.path)]
        self.words = ["plots.sweep", method, "--lrs", *self.rates, *out, "--", *flags, *args.flags]
        self.name, self.log = f"sweep {key}", Path(args.out) / ".unfinished" / f"sweep-{key}.log"

    def done(self):
        """Whether the first place that holds a table of it holds all of its rates."""
        for place in self.places:
            table = study.rates(place, self.path.name)
            if table is not None:
                tried = [row.get("lr") for row in table.get("rows", ())]
                return tried == [float(rate) for rate in self.rates]
        return False

    def start(self, context):
        self.began = time.time()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)
        self.process = context.Process(target=work, args=(self.words, str(self.log), None), daemon=True)
        self.process.start()

    def collect(self, args):
        self.log.unlink(missing_ok=True)
        rows = json.loads(self.path.read_text())["rows"]
        return "lr " + f"{max(rows, key=lambda row: row['reward'])['lr']:g}"


# ------------------------------------------------------------------------------------------------------------
# The runner


class Stop:
    """Ctrl-C or SIGTERM once: every run finishes its step and saves.

    Twice: they are killed; what their last checkpoint holds stands.
    """

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
    stop, report, waiting = Stop(), Report(len(tasks)), list(tasks)
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
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
                    report.finished(task, args, left=len(waiting) + len(stop.running))
                elif not stop.asked:
                    report.failed(task)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return None if stop.asked else report.failures


class Report:
    """A line for each run that ends, with the time that is left."""

    def __init__(self, total):
        self.total, self.done, self.failures, self.began = total, 0, [], time.time()

    def finished(self, task, args, left):
        self.done += 1
        minutes = (time.time() - self.began) / self.done * left / 60
        said, took = task.collect(args), time.time() - task.began
        print(
            f"[{self.done}/{self.total}] {task.name}: {said} · {took:.0f} s · about {minutes:.0f} min left",
            flush=True,
        )

    def failed(self, task):
        lines = task.log.read_text().strip().splitlines() if task.log.is_file() else []
        last = lines[-1] if lines else "no output"
        print(
            f"{task.name}: failed ({task.process.exitcode}): {last} · {task.log}", file=sys.stderr, flush=True
        )
        self.failures.append(task.name)
