"""What a run leaves behind: its folder, and what a reader needs to place its numbers.

runs/NAME/ holds config.json, metrics.jsonl (a line per step), samples.jsonl (held-out answers before and
after), curves.png, adapter/ in PEFT's format, checkpoint.safetensors, from which the run goes on exactly,
and, once the run is finished, report.txt. Everything is written whole or not at all; report.txt comes last,
so a folder that has it lacks nothing.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import platform
import subprocess
import sys
import zlib
from importlib.metadata import version
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from data.errors import UserError, first_line
from engine.folders import (
    Damaged,
    Taken,
    cannot_write,
    clean_up,
    holds,
    is_occupied,
    locked,
    parse_object,
    read_jsonl,
    reserve,
    to_json,
    whole_directory,
    write_whole,
)
from engine.settings import RENAMED_SETTINGS

try:
    import resource
except ImportError:  # Windows
    resource = None

# Of config.json and what stands beside it. 1 (no number): without report.txt; 2: with it.
FORMAT = 2
SAMPLE_TEXTS = ("expert", "completion")  # of a line of samples.jsonl, beside its prompt
SAMPLE_NUMBERS = ("reward", "expert_reward", "tokens", "kl", "logp_expert")


def is_run(path):
    """Whether a folder is a run's: only such a one is replaced by --overwrite."""
    return holds(path / "config.json", "method", "settings") or has_checkpoint(path)


def has_checkpoint(path):
    try:
        with safetensors.safe_open(path / "checkpoint.safetensors", "pt") as file:
            return "trainer" in (file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return False


# ----------------------------------------------------------------------------------------------------------
# The run folder


class RunFolder:
    def __init__(self, path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.curves = self.path / "curves.png"
        self.adapter = self.path / "adapter"
        self.report = self.path / "report.txt"
        self.begun = False  # whether this process's run is in it: a folder that it would replace is not

    @classmethod
    @contextlib.contextmanager
    def reserved(cls, given, method):
        """The folder that the flags ask for, held until the block is left, so that no second run gets it.

        An earlier run in it is refused unless --overwrite or --resume says otherwise. An error that ends the
        block takes along where the run is, in `run_folder`; Ctrl-C takes along what is left of the run.
        """
        with contextlib.ExitStack() as stack:
            if given.get("out") is None:
                path = reserve_free_name(stack, given, method)
            elif given.get("resume"):
                path = stack.enter_context(resumable(Path(given["out"])))
            else:
                ways = {"kind": "run folder", "remedies": ["--resume it", "--overwrite it"]}
                overwrite = given.get("overwrite", False)
                path = stack.enter_context(reserve(given["out"], ours=is_run, overwrite=overwrite, **ways))
            folder = cls(path)
            folder.begun = given.get("resume", False)
            try:
                yield folder
            except KeyboardInterrupt as error:
                raise KeyboardInterrupt(folder.what_stands()) from error
            except (Exception, SystemExit) as error:
                error.run_folder = folder.path if folder.begun else None
                raise

    def what_stands(self):
        """What Ctrl-C has left of the run."""
        if self.begun:
            return f"stopped at once; go on from the last checkpoint with --resume --out {self.path}"
        return "stopped; nothing was written"

    def create(self, trainer, samples, metrics):
        """Begin a run: settings, the evaluation before training and a checkpoint appear together.

        An older run, which --overwrite gave up, makes way only then.
        """
        skip = ("resume", "overwrite", "out")
        settings = {k: v for k, v in dataclasses.asdict(trainer.config).items() if k not in skip}
        content = {
            "version": FORMAT,
            "method": trainer.method.name,
            "settings": settings,
            "environment": environment(),
        }
        with whole_directory(self.path) as tmp:
            started = RunFolder(tmp)
            write_whole(started.config, to_json(content, indent=2) + "\n")
            started.write_samples(samples)
            started.log(metrics)
            started.save(trainer)
            trainer.policy.save_fitted(tmp)
        self.begun = True

    def log(self, metrics):
        """Append one line; if the disk cannot take it whole, none of it stays."""
        size = self.metrics.stat().st_size if self.metrics.exists() else 0
        line = to_json({k: round(v, 6) if isinstance(v, float) else v for k, v in metrics.items()}) + "\n"
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            os.truncate(self.metrics, size)
            raise cannot_write(self.metrics, error) from error

    def save(self, trainer):
        tensors = trainer.state()
        meta = {"step": trainer.step, "tokens_generated": trainer.tokens_generated}
        meta["checksum"] = checksum(tensors)
        write_whole(self.checkpoint, safetensors.torch.save(tensors, metadata={"trainer": json.dumps(meta)}))

    def write_samples(self, samples):
        write_whole(self.samples, "".join(to_json(sample) + "\n" for sample in samples))

    # -- going on with a run --------------------------------------------------------------------------------

    def settings(self, method):
        """The settings that the run was started with. UserError for what cannot be those of `method`."""
        content = parse_object(self.read(self.config), f"--resume: {self.config}")
        number = content.get("version", 1)
        if type(number) is not int or number > FORMAT:
            raise UserError(
                f"--resume: {self.path} was written by another version of this program (format {number!r}; "
                f"this one reads up to {FORMAT}); start a new run"
            )
        if content.get("method") != method.name:
            raise UserError(
                f"--resume: {self.path} is a run of {content.get('method')}, not of {method.name}"
            )
        settings = content.get("settings")
        if not isinstance(settings, dict):
            raise Damaged(f"--resume: {self.config}: is damaged (it has no settings)")
        settings = {RENAMED_SETTINGS.get(name, name): value for name, value in settings.items()}
        fields = {f.name: f for f in dataclasses.fields(method.config)}
        for name, value in settings.items():
            if name not in fields:
                raise UserError(
                    f"--resume: {self.path} was written by another version of this program (format "
                    f"{number}), with a setting {name!r} that this one does not have; start a new run"
                )
            if not is_setting(value, fields[name]):
                raise Damaged(f"--resume: {self.config}: is damaged ({name} cannot be {value!r})")
        return settings

    def read(self, path):
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"--resume: {path} cannot be read ({error.strerror})") from error

    def restore(self, trainer):
        """Bring a fresh trainer to the checkpoint, the log back to its step -> samples before training."""
        try:
            with safetensors.safe_open(self.checkpoint, "pt") as file:
                meta = json.loads(file.metadata()["trainer"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            check_tensors(tensors, trainer)
            check_meta(meta, trainer)
            if meta.get("checksum") not in (None, checksum(tensors)):
                raise ValueError("its content is not what was written")
            trainer.load_state(tensors, meta)
        except (safetensors.SafetensorError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise UserError(
                f"--resume: {self.checkpoint} is damaged or of another version ({first_line(error)})"
            ) from error
        lines, samples = self.lines_until(trainer.step), self.samples_before(trainer)
        write_whole(self.metrics, "".join(to_json(line) + "\n" for line in lines))
        return samples

    def lines_until(self, last):
        """The lines of metrics.jsonl for steps 0 to `last`; what was logged after the checkpoint is dropped.

        A line that is cut or damaged after them costs nothing: the step is taken again.
        """
        lines = []
        for text in self.read(self.metrics).split(b"\n"):
            with contextlib.suppress(Damaged):
                lines.append(parse_object(text, self.metrics))
        lines = [line for line in lines if type(line.get("step")) is int and 0 <= line["step"] <= last]
        if [line["step"] for line in lines] != list(range(last + 1)):
            found = {line["step"] for line in lines}
            lost = next((step for step in range(last + 1) if step not in found), None)
            what = "steps stand twice" if lost is None else f"step {lost} is not in it"
            raise UserError(
                f"--resume: {self.metrics} is damaged ({what}, the checkpoint is of step {last}); "
                "restore the file, or start a new run"
            )
        return lines

    def samples_before(self, trainer):
        """The lines of samples.jsonl from before training, one for each held-out prompt."""
        if not self.samples.is_file():
            raise UserError(f"--resume: {self.samples} is missing; restore the file, or start a new run")
        lines = [line for line in read_jsonl(self.samples) if line.get("step") == 0]
        prompts = [record["prompt"] for record in trainer.held_out]
        if [line.get("prompt") for line in lines] != prompts or not all(map(is_sample, lines)):
            raise UserError(
                f"--resume: {self.samples} is damaged (before training it has not one answer for each of the "
                f"{len(prompts)} held-out prompts); restore the file, or start a new run"
            )
        return lines


def is_sample(line):
    texts = all(isinstance(line.get(name), str) for name in SAMPLE_TEXTS)
    numbers = all(isinstance(line.get(name), (int, float)) for name in SAMPLE_NUMBERS)
    return texts and numbers and isinstance(line.get("truncated"), bool)


def is_setting(value, f):
    """Whether a value read from JSON has the type of a config's field."""
    if value is None:
        return f.default is None
    if isinstance(value, bool):  # which Python takes for an int
        return f.type is bool
    return isinstance(value, (int, float) if f.type is float else f.type)


def check_meta(meta, trainer):
    """ValueError unless the checkpoint's own numbers can be those of this run."""
    step, tokens = meta["step"], meta["tokens_generated"]
    if type(step) is not int or not 0 <= step <= trainer.config.steps:
        raise ValueError(f"step {step!r} of a run of {trainer.config.steps} steps")
    if type(tokens) is not int or tokens < 0:
        raise ValueError(f"tokens_generated {tokens!r}")


def checksum(tensors):
    """Of names and bytes: a disk that lost its power may leave zeros where the tensors should be."""
    total = 0
    for name in sorted(tensors):
        content = tensors[name].reshape(-1).view(torch.uint8).numpy()
        total = zlib.crc32(content, zlib.crc32(name.encode(), total))
    return total


def check_tensors(tensors, trainer):
    """ValueError unless each parameter and its moments are there in the shape they have.

    A copy_ of another shape would be broadcast without a word.
    """
    wanted = {"rng": torch.get_rng_state()} | {f"param/{name}": p for name, p in trainer.params.items()}
    for name, p in trainer.params.items():
        moments = [key for key in (f"exp_avg/{name}", f"exp_avg_sq/{name}", f"step/{name}") if key in tensors]
        if len(moments) not in (0, 3):
            raise ValueError(f"optimizer state of {name} is not whole")
        for key in moments:
            wanted[key] = torch.zeros(()) if key.startswith("step/") else p
    for key, like in wanted.items():
        if key not in tensors:
            raise ValueError(f"no tensor {key}")
        if tensors[key].shape != like.shape or tensors[key].dtype != like.dtype:
            found = f"{tuple(tensors[key].shape)}, {tensors[key].dtype}"
            raise ValueError(f"tensor {key} is {found}, wanted {tuple(like.shape)}, {like.dtype}")
    for key in tensors:
        if key not in wanted and not key.startswith("kept/"):
            raise ValueError(f"tensor {key} is of something else")


def reserve_free_name(stack, given, method):
    """runs/METHOD-MODEL, or the first of -2, -3, ... that neither stands there nor is being written."""
    if given.get("resume"):
        raise UserError("--resume needs --out, the folder of the run to go on with")
    name = method.name
    if "model" in given:
        name += "-" + Path(given["model"]).name.removesuffix(".gguf")
    for number in itertools.count(1):
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if not is_occupied(path):
            with contextlib.suppress(Taken):  # by a run that has just begun: the next number
                return stack.enter_context(reserve(path, "run folder"))


@contextlib.contextmanager
def resumable(path):
    """Hold the folder of an interrupted run. UserError if there is nothing to go on with."""
    with locked(path):
        folder = RunFolder(path)
        if not folder.checkpoint.is_file() or not folder.config.is_file():
            raise UserError(
                f"--resume: {path} holds no checkpoint to resume from; start the run without --resume"
            )
        for file in (folder.metrics, folder.samples, folder.checkpoint, folder.curves, folder.adapter):
            clean_up(file)  # what the killed process was writing
        yield path


# ----------------------------------------------------------------------------------------------------------
# The machine


def environment():
    """What a reader needs to place the numbers: versions, machine, commit."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "numpy")
    return {
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        # Sums are added up in another order with other instructions, so numbers repeat on like machines only.
        "cpu": f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit(),
    }


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"


def commit():
    """Of this code; None where there is no git, or no repository."""
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def peak_memory():
    """GiB: of the GPU's allocator, or of the process; None where the system does not say."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    if resource is None:
        return None
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
