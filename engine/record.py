"""What a run leaves behind and what it shows: the run folder and the before/after report.

runs/NAME/ holds config.json, metrics.jsonl (a line per step), samples.jsonl (held-out answers before and after), curves.png, adapter/ in
PEFT's format, and checkpoint.safetensors, from which the run goes on exactly. Everything is written whole or not at all.
"""

import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from data import UserError
from engine.models import first_line, whole_directory

# ---------------------------------------------------------------------------------------------------------------------------------
# The run folder: config.json, metrics.jsonl, samples.jsonl, checkpoint.safetensors, adapter/, curves.png


def write_whole(path, content):
    """Write bytes or text under a temporary name, then rename: the file is there whole or as it was."""
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        tmp.write_bytes(content.encode() if isinstance(content, str) else content)
        tmp.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        tmp.unlink(missing_ok=True)


def cannot_write(path, error):
    return UserError(
        f"cannot write {path.name} ({error.strerror}); make room on the disk, or choose another --out"
    )


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class RunFolder:
    def __init__(self, path):
        self.path = Path(path)
        self.metrics, self.samples, self.checkpoint = (
            self.path / n for n in ("metrics.jsonl", "samples.jsonl", "checkpoint.safetensors")
        )

    @classmethod
    def choose(cls, given, method):
        """The folder that the flags ask for; an earlier run is refused unless --overwrite or --resume says otherwise."""
        if given.get("out") is None:
            name = "-".join(
                [
                    method.name,
                    *([Path(given["model"]).name.removesuffix(".gguf")] if "model" in given else []),
                ]
            )
            numbered = (Path("runs") / (name if i == 1 else f"{name}-{i}") for i in range(1, 10**6))
            if given.get("resume"):
                raise UserError("--resume needs --out, the folder of the run to go on with")
            return cls(next(path for path in numbered if not path.exists()))
        folder = cls(given["out"])
        if given.get("resume"):
            if not folder.checkpoint.is_file() or not (folder.path / "config.json").is_file():
                raise UserError(
                    f"--resume: {folder.path} holds no checkpoint to resume from; start the run without --resume"
                )
        elif folder.path.exists() and not given.get("overwrite"):
            raise UserError(
                f"{folder.path} exists already: choose another --out, or --resume it, or --overwrite it"
            )
        return folder

    def create(self, trainer, samples, metrics):
        """Begin a run: settings, the evaluation before training, and a checkpoint appear together; an older run makes way only then."""
        if self.path.exists() and not (self.path / "config.json").is_file():
            raise UserError(
                f"{self.path} is not a run folder (it has no config.json), so --overwrite leaves it alone; choose another --out"
            )
        settings = {
            k: v
            for k, v in dataclasses.asdict(trainer.config).items()
            if k not in ("resume", "overwrite", "out")
        }
        with whole_directory(self.path) as tmp:
            content = {"method": trainer.method.name, "settings": settings, "environment": environment()}
            write_whole(tmp / "config.json", json.dumps(content, indent=2) + "\n")
            started = RunFolder(tmp)
            started.write_samples(samples)
            started.log(metrics)
            started.save(trainer)
            trainer.policy.save_fitted(tmp)

    def settings(self, method):
        try:
            content = json.loads((self.path / "config.json").read_text())
            name, settings = content["method"], content["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--resume: {self.path / 'config.json'} is damaged ({first_line(error)})"
            ) from error
        if name != method.name:
            raise UserError(f"--resume: {self.path} is a run of {name}, not of {method.name}")
        return settings

    def log(self, metrics):
        """Append one line; if the disk cannot take it whole, none of it stays."""
        size = self.metrics.stat().st_size if self.metrics.exists() else 0
        line = json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in metrics.items()}) + "\n"
        try:
            with open(self.metrics, "a") as file:
                file.write(line)
        except OSError as error:
            os.truncate(self.metrics, size)
            raise cannot_write(self.metrics, error) from error

    def save(self, trainer):
        meta = {"step": trainer.step, "tokens_generated": trainer.tokens_generated}
        write_whole(
            self.checkpoint, safetensors.torch.save(trainer.state(), metadata={"trainer": json.dumps(meta)})
        )

    def restore(self, trainer):
        """Bring a fresh trainer to the checkpoint, and the log back to its step."""
        try:
            with safetensors.safe_open(self.checkpoint, "pt") as file:
                meta = json.loads(file.metadata()["trainer"])
                trainer.load_state({key: file.get_tensor(key) for key in file.keys()}, meta)
        except (safetensors.SafetensorError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise UserError(
                f"--resume: {self.checkpoint} is damaged or of another version ({first_line(error)})"
            ) from error
        kept = (
            [line for line in read_jsonl(self.metrics) if line["step"] <= trainer.step]
            if self.metrics.exists()
            else []
        )
        write_whole(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    def write_samples(self, samples):
        write_whole(
            self.samples, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        )


def environment():
    """What a reader needs to place the numbers: versions, machine, commit."""
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True
    )
    return {
        "versions": {
            name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "numpy")
        },
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit.stdout.strip() or None,
    }


def peak_memory():
    """GiB."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform != "darwin" else 2**30)


# ---------------------------------------------------------------------------------------------------------------------------------
# The report
