"""The command line: --help and mistyped flags are answered at once; whatever goes wrong is one line."""

import subprocess
import sys
from pathlib import Path

import pytest

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


def test_a_value_out_of_its_range_is_said_before_torch_is_imported():
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "minigrao.py", "--group-size", "1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert process.returncode == 2 and "torch" not in process.stderr
    assert process.stderr.endswith("error: --group-size 1: must be at least 2 and at most 1024\n")
