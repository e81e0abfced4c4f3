"""The folder of a reward model while it is trained: who writes to it, and from where training goes on.

DIR/checkpoint.safetensors, the state of engine/bradley_terry.Fit and the settings it was started with, is all
there is until training is over; then the finished model takes the folder's place.
"""

import contextlib
import dataclasses
import json
from pathlib import Path

import safetensors
import safetensors.torch

from data.errors import UserError, first_line
from engine.folders import clean_up, holds, locked, reserve, whole_directory, write_whole
from engine.settings import check_settings

KEY = "reward model"  # of the metadata: {"settings", "numbers"} as JSON


def is_reward_model(path):
    """Whether a folder is a reward model, finished or not: only such a one is replaced by --overwrite."""
    return is_finished(path) or read_metadata(path / "checkpoint.safetensors") is not None


def is_finished(path):
    return holds(path / "reward_model.json", "base", "settings")


def read_metadata(path):
    """{"settings", "numbers"} of a checkpoint, None if it is none, or of something else."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {})[KEY])
    except (OSError, safetensors.SafetensorError, KeyError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("settings"), dict) else None


class ScorerFolder:
    def __init__(self, path, config):
        self.path, self.config = Path(path), config
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.begun = config.resume  # whether this training is in it: a model that it would replace is not

    @classmethod
    @contextlib.contextmanager
    def reserved(cls, config, given):
        """The folder --out, held until the block is left; its `config` is the one to train with.

        given: the flags {setting: value} that were given. Ctrl-C takes along what is left.
        """
        with contextlib.ExitStack() as stack:
            if config.resume:
                path = stack.enter_context(resumable(config))
                folder = cls(path, resumed_config(config, given, path))
            else:
                ways = {"kind": "reward model", "remedies": ["--resume it", "--overwrite it"]}
                ways |= {"ours": is_reward_model, "overwrite": config.overwrite}
                folder = cls(stack.enter_context(reserve(config.out, **ways)), config)
            try:
                yield folder
            except KeyboardInterrupt as error:
                raise KeyboardInterrupt(folder.what_stands()) from error
            except Exception as error:  # its traceback is kept in the folder, if there is one
                error.run_folder = folder.path if folder.begun else None
                raise

    def what_stands(self):
        """What Ctrl-C has left."""
        if self.begun:
            return f"stopped at once; go on from the last checkpoint with --resume --out {self.path}"
        return "stopped; nothing was written"

    def save(self, fit):
        """Write the state of training, whole or not at all. With the first one an older model makes way."""
        skip = ("resume", "overwrite", "out")
        settings = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in skip}
        tensors, numbers = fit.state()
        about = json.dumps({"settings": settings, "numbers": numbers})
        content = safetensors.torch.save(tensors, metadata={KEY: about})
        if self.begun:
            write_whole(self.checkpoint, content)
            return
        with whole_directory(self.path) as tmp:
            write_whole(tmp / self.checkpoint.name, content)
        self.begun = True

    def restore(self, fit):
        """Bring training to where it was saved; at the start of a new one nothing is done."""
        if not self.config.resume:
            return
        try:
            with safetensors.safe_open(self.checkpoint, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            fit.load_state(tensors, read_metadata(self.checkpoint)["numbers"])
        except (safetensors.SafetensorError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise UserError(
                f"--resume: {self.checkpoint} is damaged, or of other data ({first_line(error)})"
            ) from error


@contextlib.contextmanager
def resumable(config):
    """Hold the folder of an interrupted training. UserError if there is nothing to go on with."""
    path = Path(config.out)
    if config.overwrite:
        raise UserError("--resume goes on with a training and --overwrite replaces it: give one of them")
    with locked(path):
        if is_finished(path):
            raise UserError(f"--resume: the reward model in {path} is finished; train with --reward {path}")
        clean_up(path / "checkpoint.safetensors")  # what the killed process was writing
        if read_metadata(path / "checkpoint.safetensors") is None:
            raise UserError(f"--resume: {path} holds no checkpoint of a reward model; start without --resume")
        yield path


def resumed_config(config, given, path):
    """The settings that the training in `path` was started with. UserError if a flag asks for others."""
    settings = read_metadata(path / "checkpoint.safetensors")["settings"]
    try:
        saved = dataclasses.replace(config, **settings)
    except TypeError as error:
        raise UserError(
            f"--resume: {path} was written by another version of this program ({first_line(error)}); "
            "start a new training"
        ) from error
    wanted = check_settings(config)
    for name in given:
        if name not in ("resume", "out", "device") and getattr(wanted, name) != getattr(saved, name):
            raise UserError(
                f"--resume: {name} was {getattr(saved, name)} in {path}; leave the flag out, or start anew"
            )
    saved.device = wanted.device if "device" in given else saved.device
    return saved
