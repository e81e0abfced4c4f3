"""What a run leaves behind: one process to a place, whole or not at all, and read with suspicion."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch

import train
from data import UserError
from engine import folders, record
from engine.command_line import exit_status
from engine.folders import locked, reserve, to_json, whole_directory
from engine.record import RunFolder, read_jsonl
from minigrao import GRAO

ROOT = Path(__file__).parents[1]
SMALL = ["--model", "tiny", "--steps", "4", "--prompts-per-step", "2", "--group-size", "2"]
SMALL += ["--quantize", "none", "--eval-prompts", "4", "--eval-every", "2", "--max-new-tokens", "8"]


def grao(*flags, update=None):
    method = GRAO if update is None else record.dataclasses.replace(GRAO, update=update)
    return train.main(method, [str(f) for f in flags])


# ----------------------------------------------------------------------------------------------------------
# One process to a place


def test_the_second_one_is_told_who_has_the_place(tmp_path):
    """The folder's name was chosen at the start and made minutes later: two runs, one folder, both 'done'."""
    out = tmp_path / "new" / "run"
    with reserve(out, "run folder"):
        with pytest.raises(UserError, match=f"process {os.getpid()} on .*, since 20.* is writing it"):
            with reserve(out, "run folder"):
                raise AssertionError("two hold one place")
    with reserve(out, "run folder"):
        pass  # it is free again
    assert not list(tmp_path.iterdir())  # and nothing came of it


def test_a_killed_process_holds_nothing_and_its_leavings_go(tmp_path):
    out = tmp_path / "run"
    program = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from engine.folders import *\n"
        f"with reserve({str(out)!r}, 'run folder'), whole_directory({str(out)!r}) as tmp:\n"
        "    (tmp / 'half').write_text('written'); print(flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", program], **pipes)
    process.stdout.readline()
    with pytest.raises(UserError, match=f"process {process.pid} "), locked(out):
        pass
    process.kill()
    process.communicate()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".run.lock", f".run.{process.pid}.tmp"}
    (tmp_path / f".run.{os.getppid()}.tmp").mkdir()  # a living process's stays
    with reserve(out, "run folder"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [f".run.{os.getppid()}.tmp"]


def test_never_two_at_once(tmp_path):
    """A lock file that is deleted while another waits for it would let both in."""
    inside, most = [], []

    def work():
        for _ in range(200):
            with contextlib.suppress(folders.Taken), locked(tmp_path / "run"):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) > 100 and max(most) == 1


def test_the_working_directory_its_parents_and_links_are_refused(tmp_path, monkeypatch):
    """--overwrite --out . in a run folder deleted the old run, the new one and the user's notes."""
    run = tmp_path / "runs" / "old"
    run.mkdir(parents=True)
    (run / "config.json").write_text('{"method": "grao", "settings": {}}')
    (run / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(run)
    for out in (".", "..", str(run), str(tmp_path), "x/..", tmp_path / "link", "", "a\0b"):
        with pytest.raises(UserError, match="^--out"), reserve(out, "run folder", record.is_run, True):
            pass
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "notes.txt"]


def test_overwrite_leaves_alone_what_is_not_a_run(tmp_path):
    """Every Hugging Face model directory has a config.json, and --overwrite deleted weights and tokenizer."""
    model = tmp_path / "model"
    model.mkdir()
    for config in ('{"model_type": "qwen3"}', "not JSON", "[]"):
        (model / "config.json").write_text(config)
        with pytest.raises(UserError, match="not a run folder, so --overwrite leaves it alone"):
            with reserve(model, "run folder", record.is_run, True):
                pass
    tensors = {"rng": torch.zeros(1)}
    safetensors.torch.save_file(tensors, model / "checkpoint.safetensors", metadata={"trainer": "{}"})
    with reserve(model, "run folder", record.is_run, True):
        pass  # a run whose config.json is damaged


def test_the_old_folder_is_moved_aside_before_the_new_one_comes_and_deleted_last(tmp_path, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()
    (out / "old").write_text("")
    rename = Path.rename

    def fail(self, target):
        if self.name.endswith(".tmp"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError), whole_directory(out):
        pass
    monkeypatch.undo()
    assert [p.name for p in tmp_path.rglob("*")] == ["run", "old"]

    out.rename(tmp_path / ".run.99999999.old")  # killed between the two renames
    with locked(out):
        assert (out / "old").exists()


def test_two_runs_at_once_get_two_folders_and_one_folder_one_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen = []

    def update(trainer, records):
        """At the first step of the one, start others beside it."""
        if not seen:
            seen.append(grao(*SMALL, "--steps", 1))
            seen.append(grao(*SMALL, "--out", "runs/grao-tiny"))
            seen.append(grao(*SMALL, "--out", "runs/grao-tiny", "--overwrite"))
            seen.append(grao("--resume", "--out", "runs/grao-tiny"))
        return GRAO.update(trainer, records)

    assert grao(*SMALL, update=update) == 0 and seen == [0, 2, 2, 2]
    assert capsys.readouterr().err.count(f"process {os.getpid()} on ") == 3
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["grao-tiny", "grao-tiny-2"]
    steps = [[line["step"] for line in read_jsonl(run / "metrics.jsonl")] for run in Path("runs").iterdir()]
    assert sorted(steps) == [[0, 1], [0, 1, 2, 3, 4]]


# ----------------------------------------------------------------------------------------------------------
# Going on


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run, and the same one interrupted after its third step."""
    folder = tmp_path_factory.mktemp("runs")
    assert grao(*SMALL, "--out", folder / "finished") == 0

    def stop(trainer, records):
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return GRAO.update(trainer, records)

    assert grao(*SMALL, "--out", folder / "interrupted", update=stop) == 130
    return folder


def copy(runs, name, tmp_path):
    target = tmp_path / "run"
    folders.shutil.copytree(runs / name, target)
    return target


@pytest.mark.parametrize("lost", [["report.txt"], ["report.txt", "curves.png", "adapter"]], ids=len)
def test_a_run_killed_after_its_last_step_is_completed(runs, tmp_path, lost):
    """Six of fifty killed runs had no adapter and no answers after training, and could not be resumed."""
    run = copy(runs, "finished", tmp_path)
    for name in lost:
        path = run / name
        folders.shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = [line for line in read_jsonl(run / "samples.jsonl") if line["step"] == 0]
    (run / "samples.jsonl").write_text("".join(to_json(line) + "\n" for line in before))
    assert grao("--resume", "--out", run) == 0
    for name in ("samples.jsonl", "report.txt", "adapter/adapter_model.safetensors", "metrics.jsonl"):
        assert (run / name).read_bytes() == (runs / "finished" / name).read_bytes()
    assert (run / "curves.png").is_file()


def test_a_folder_of_the_first_format_is_gone_on_with_and_one_of_a_later_is_refused(runs, tmp_path, capsys):
    run = copy(runs, "interrupted", tmp_path)
    config = json.loads((run / "config.json").read_text())
    assert config.pop("version") == record.FORMAT
    (run / "config.json").write_text(json.dumps(config | {"version": 99}))
    assert grao("--resume", "--out", run) == 2 and "format 99" in capsys.readouterr().err
    (run / "config.json").write_text(json.dumps(config))
    assert grao("--resume", "--out", run) == 0
    assert (run / "samples.jsonl").read_bytes() == (runs / "finished" / "samples.jsonl").read_bytes()


def changed(**changes):
    """Damage to config.json: other values, or a key less where the value is ..."""

    def damage(data):
        config = json.loads(data)
        for key, value in changes.items():
            part = config if key in config or key == "version" else config["settings"]
            part[key] = value
            if value is ...:
                del part[key]
        return json.dumps(config).encode()

    return damage


def tensors(change):
    """Damage to the checkpoint: change(tensors, metadata) alters them."""

    def damage(data):
        loaded = safetensors.torch.load(data)
        size = int.from_bytes(data[:8], "little")
        meta = json.loads(data[8 : 8 + size])["__metadata__"]
        meta["trainer"] = json.dumps(json.loads(meta["trainer"]) | {"checksum": None})
        change(loaded, meta)
        return safetensors.torch.save(loaded, metadata=meta)

    return damage


def first(loaded, prefix):
    return next(key for key in loaded if key.startswith(prefix))


DAMAGE = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "torn": lambda data: data[:-3],
    "zeros": lambda data: bytes(len(data)),
    "zeros at its end": lambda data: data[:-200] + bytes(200),
    "not UTF-8": lambda data: b"\xff\xfe" + data[2:],
    "a list": lambda data: b"[1, 2]\n",
    "a number": lambda data: b"7\n",
    "deep": lambda data: b"[" * 100_000,
}
CASES = [
    (name, kind, damage)
    for name in ("config.json", "metrics.jsonl", "samples.jsonl", "checkpoint.safetensors")
    for kind, damage in DAMAGE.items()
]
CASES += [
    ("config.json", f"{changes}", changed(**changes))
    for changes in (
        {"version": 99},
        {"version": "x"},
        {"method": ...},
        {"method": 3},
        {"settings": ...},
        {"settings": [1]},
        {"steps": "4"},
        {"steps": True},
        {"steps": 0},
        {"lr": "much"},
        {"lr": 10**400},
        {"model": 7},
        {"device": None},
        {"data": None},
        {"group": "everyone"},
        {"of_tomorrow": 1},
    )
]
CASES += [
    ("checkpoint.safetensors", kind, tensors(change))
    for kind, change in {
        "no rng": lambda t, m: t.pop("rng"),
        "no parameter": lambda t, m: t.pop(first(t, "param/")),
        "no moment": lambda t, m: t.pop(first(t, "exp_avg/")),
        # copy_ would broadcast it without a word
        "misshapen": lambda t, m: t.update({first(t, "param/"): torch.ones(1)}),
        "a misshapen moment": lambda t, m: t.update({first(t, "exp_avg/"): torch.ones(1)}),
        "another type": lambda t, m: t.update({first(t, "param/"): t[first(t, "param/")].double()}),
        "one too many": lambda t, m: t.update(of_tomorrow=torch.ones(1)),
        "no step": lambda t, m: m.update(trainer="{}"),
        "step 99": lambda t, m: m.update(trainer='{"step": 99, "tokens_generated": 1}'),
        "step 2.5": lambda t, m: m.update(trainer='{"step": 2.5, "tokens_generated": 1}'),
        "no metadata": lambda t, m: m.clear(),
    }.items()
]


def lines(change):
    """Damage to a .jsonl file: change(list of its objects) alters them."""

    def damage(data):
        found = [json.loads(line) for line in data.splitlines()]
        change(found)
        return "".join(json.dumps(line) + "\n" for line in found).encode()

    return damage


CASES += [
    ("metrics.jsonl", "a step is lost", lines(lambda x: x.pop(1))),
    ("metrics.jsonl", "a step twice", lines(lambda x: x.insert(1, x[1]))),
    ("metrics.jsonl", "a step is a text", lines(lambda x: x[1].update(step="1"))),
    ("samples.jsonl", "one is lost", lines(lambda x: x.pop(0))),
    ("samples.jsonl", "another prompt", lines(lambda x: x[0].update(prompt="other"))),
    ("samples.jsonl", "no reward", lines(lambda x: x[0].pop("reward"))),
    ("samples.jsonl", "null", lines(lambda x: x[0].update(kl=None))),
]


@pytest.fixture(scope="module")
def shared_trainer(runs):
    config = GRAO.config(**json.loads((runs / "interrupted" / "config.json").read_text())["settings"])
    return train.Trainer(GRAO, train.check_settings(config))


@pytest.mark.parametrize("name, kind, damage", CASES, ids=[f"{n} {k}" for n, k, _ in CASES])
@pytest.mark.parametrize("which", ["interrupted", "finished"])
def test_a_damaged_folder_is_one_line(
    which, name, kind, damage, runs, shared_trainer, tmp_path, monkeypatch, capsys
):
    """26 of 75 ended in a traceback; an empty metrics.jsonl lost the earlier lines without a word."""
    run = copy(runs, which, tmp_path)
    (run / name).write_bytes(damage((run / name).read_bytes()))
    (run / "report.txt").unlink(missing_ok=True)  # killed just before
    content = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def loaded(method, config, reward_fn):
        """The trainer as it is before a restore, without the seconds that it takes to load."""
        shared_trainer.config, shared_trainer.step = config, 0
        return shared_trainer

    monkeypatch.setattr(train, "Trainer", loaded)
    monkeypatch.setattr(train, "take_steps", lambda *_: pytest.fail("went on with a damaged run"))
    status, error = grao("--resume", "--out", run), capsys.readouterr().err
    assert (status, error.count("\n")) == (2, 1) and error.startswith("error: ")
    assert "unexpected" not in error and len(error) < 900
    assert content == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', bytes(100), b'{"step": 4}\n{"step'])
def test_what_was_logged_after_the_checkpoint_may_be_torn(tail, tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics.write_bytes(b'{"step": 0}\n{"step": 1}\n{"step": 2}\n' + tail)
    assert folder.lines_until(2) == [{"step": 0}, {"step": 1}, {"step": 2}]


# ----------------------------------------------------------------------------------------------------------
# What is written


def test_json_has_no_nan(tmp_path):
    """`Infinity` in metrics.jsonl is read by Python alone."""
    RunFolder(tmp_path).log({"step": 1, "loss": float("nan"), "reward/mean": float("inf"), "lr": 0.1})
    refuse = lambda name: pytest.fail(f"{name} is not JSON")
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "reward/mean": None, "lr": 0.1}
    assert to_json({"a": [(1.5, float("-inf"))]}) == '{"a": [[1.5, null]]}'


def test_a_machine_without_git(monkeypatch):
    """Slim containers and many laptops have none, and nothing ran there."""
    monkeypatch.setenv("PATH", "")
    found = record.environment()
    assert found["commit"] is None
    assert found["cpu"].endswith(torch.backends.cpu.get_cpu_capability()) and len(found["cpu"]) > 10


def test_ctrl_c_speaks_of_what_there_is(tmp_path, capsys):
    """While loading, it spoke of a checkpoint that did not exist."""

    def stop(folder):
        with RunFolder.reserved({"out": str(folder)}, GRAO) as run:
            run.begun = folder.name == "begun"
            raise KeyboardInterrupt

    for name, said in (("new", "stopped; nothing was written\n"), ("begun", "--resume --out")):
        assert exit_status(lambda name=name: stop(tmp_path / name)) == 130
        assert said in capsys.readouterr().err
