"""What the benchmark's workers share.

Nothing of the product is imported here: TRL's worker runs in an environment of its own.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def alternate_rewards(prompts, completions, **columns):
    """0, 1, 0, 1, ... whatever was sampled: both sides have the same advantages, and no group is tied."""
    return [float(i % 2) for i in range(len(completions))]


def now():
    """Seconds, once the GPU has done what it was asked."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes():
    """Largest memory of this process so far: of the GPU's allocator, or the resident set (VmHWM; Linux)."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def serve(side):
    """In a worker: answer the parent's requests, one JSON line each.

    The first is the case, the others name a method of side(case).
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to stderr
    served = None
    for line in sys.stdin:
        request = json.loads(line)
        if served is None:
            served, answer = side(request), {}
        else:
            answer = getattr(served, request["call"])(**request["with"])
        print(json.dumps(answer), file=answers)
    os._exit(0)  # TRL's loop waits in a thread


class Worker:
    """In the parent: a process that holds one side of one case."""

    def __init__(self, python, module, case):
        threads = {name: str(case["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        self.module, self.log = module, tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [python, "-m", f"plots.{module}"],
            cwd=ROOT,
            env=os.environ | threads | quiet,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )
        self.send(case)
        self.ready = False

    def send(self, request):
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
        except BrokenPipeError:  # it has ended; what it said is in the log
            pass

    def answer(self):
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "it ended"}
        if "error" in answer:
            self.log.seek(0)
            last = "\n".join(self.log.read().splitlines()[-8:])
            raise RuntimeError(f"plots.{self.module}: {answer['error']}\n{last}")
        return answer

    def wait_until_ready(self):
        """Loaded: several workers load at the same time, and none while another one takes a step."""
        if not self.ready:
            self.answer()
            self.ready = True

    def call(self, method, **arguments):
        self.wait_until_ready()
        self.send({"call": method, "with": arguments})
        return self.answer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.log.close()
