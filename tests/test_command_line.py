"""The command line: --help and mistyped flags are answered at once; whatever goes wrong is one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data import UserError
from engine import command_line
from engine.command_line import exit_status

ROOT = Path(__file__).parents[1]
PROGRAMS = [
    ["minigrao.py"],
    ["uniapl.py"],
    ["uniapl.py", "discriminator"],
    ["uniapl.py", "teach"],
    ["baselines.py", "ppo"],
    ["reward.py", "train"],
    ["policy.py"],
]


@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
@pytest.mark.parametrize("flags, status", [(["--help"], 0), (["--lr", "foo"], 2), (["--no-such-flag"], 2)])
def test_flags_are_answered_without_importing_torch(program, flags, status):
    """--help took 6 s, nearly all of them the import of torch, transformers and peft."""
    command = [sys.executable, "-X", "importtime", program[0], *program[1:], *flags]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = process.stderr.splitlines()
    imported = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    said = [line for line in lines if not line.startswith("import time:")]
    assert process.returncode == status
    assert not imported & {"torch", "transformers", "safetensors", "numpy", "matplotlib"}
    assert (len(said), process.stdout == "") == ((0, False) if status == 0 else (1, True))


def test_imports_are_silent():
    """Whether bitsandbytes' note on a missing kernel reached the user hung on the order of imports."""
    modules = "uniapl, discriminator, engine.scoring"
    process = subprocess.run(
        [sys.executable, "-c", f"import {modules}"], capture_output=True, text=True, cwd=ROOT
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_a_value_out_of_its_range_is_said_before_torch_is_imported():
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "minigrao.py", "--group-size", "1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert process.returncode == 2 and "torch" not in process.stderr
    assert process.stderr.endswith("error: --group-size 1: must be at least 2 and at most 1024\n")


# ----------------------------------------------------------------------------------------------------------
# Whatever goes wrong is one line


def raising(error):
    def work():
        raise error

    return work


class Silent(Exception):
    def __str__(self):
        raise RuntimeError("an error that cannot say what it is")


@pytest.mark.parametrize(
    "error, said",
    [
        (UserError("--lr 7: too\nhigh\x1b[31m"), "error: --lr 7: too high [31m"),
        (UserError("no such file " + "x" * 300_000 + "; try --data tasks"), "; try --data tasks"),
        (KeyError("column"), "error: unexpected: KeyError ('column'); its traceback is in "),
        (Silent(), "error: unexpected: Silent (Silent); its traceback is in "),
        (SystemExit(0), "error: unexpected: sys.exit was called (0); its traceback is in "),  # was status 0
        (OSError(28, "No space left on device"), "look at the disk's room"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else "",
)
def test_every_error_is_one_line_and_status_2(error, said, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command_line.tempfile, "tempdir", str(tmp_path))
    assert exit_status(raising(error)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err and len(err) < 1000
    kept = [path.read_text() for path in tmp_path.iterdir()]
    assert len(kept) == ("traceback" in err) and all("in work" in text for text in kept)


def test_a_traceback_is_kept_in_the_folder_of_the_run(capsys, tmp_path):
    error = RuntimeError("shapes")
    error.run_folder = tmp_path
    assert exit_status(raising(error)) == 2
    assert f"its traceback is in {tmp_path}/minigrao-error.log" in capsys.readouterr().err
    assert "RuntimeError: shapes" in (tmp_path / "minigrao-error.log").read_text()


def in_python(program, **options):
    """A short program that has exit_status and knows no torch."""
    head = "import sys; from engine.command_line import *\n"
    return subprocess.run(
        [sys.executable, "-u", "-c", head + program], stderr=subprocess.PIPE, text=True, cwd=ROOT, **options
    )


def test_a_reader_that_goes_away_ends_it_quietly():
    """`| head -1` ended with "look at the disk's room and permissions"."""
    read, write = os.pipe()
    os.close(read)
    process = in_python("sys.exit(exit_status(lambda: print('a report') or 0))", stdout=write)
    os.close(write)
    assert (process.returncode, process.stderr) == (141, "")


def test_a_terminal_that_knows_only_ascii():
    """The first line of a run has a middle dot, and the run ended there."""
    ascii = os.environ | {"PYTHONIOENCODING": "ascii"}
    program = "sys.exit(exit_status(lambda: print('grao \\xb7 tiny') or 0))"
    process = in_python(program, stdout=subprocess.PIPE, env=ascii)
    assert (process.returncode, process.stdout, process.stderr) == (0, "grao \\xb7 tiny\n", "")


def test_ctrl_c_while_importing_is_one_line():
    process = in_python("answer(lambda: None)\nraise KeyboardInterrupt")
    assert process.stderr == "stopped; nothing was written\n" and process.returncode != 0
