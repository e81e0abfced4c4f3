"""Speed and memory of a training step beside TRL 1.16 and beside what the machine can do.

    python -m plots.bench --model FILE.gguf --trl-python TRL/bin/python --out runs/bench.json
    python -m plots.bench                   # random weights in SmolLM2-135M's shape; TRL if it is installed
    here
    python -m plots.bench --quick           # everything once, on the embedded model, in a minute

TRL 1.16 wants an environment of its own (`python -m venv TRL`, then `TRL/bin/pip install -r requirements.txt
trl==1.16`); without one our side is measured alone. Both sides get the same model, token ids, group size,
lengths (forced: no token ends an answer), LoRA rank and targets, threads, loss (GRPO: DAPO's token mean,
ratio * k3 with beta 0.04; DPO: beta 0.1), and precision: bf16 where the machine multiplies it natively, else
fp32. Each side of each case is a process of its own, both alive, taking turns step by step after a first step
that does not count; the peak is the process's, loading included.

The command prints first how long it will take at most, and keeps to that: what no longer fits, and what
cannot run on this machine, is left out by name. `--minutes` asks for less.

The limit. `machine` measures a product of 2048 x 2048 matrices (FLOP/s, 2 per multiply-add) and a copy (bytes
read and written per second). P_lin is the number of weights in the linear layers, V D the output head's, N
the tokens with each prompt once, M the completion tokens, R the rows, s the bytes of a number, a(n) = 4 L H d
n the FLOPs of attention for a query that sees n keys.
    rollout   sum over the new tokens of max(bytes / copy rate, FLOPs / matrix rate):
              bytes = s (P_lin + V D) + R 2 s L K d n, the weights once and each row's keys and values;
              FLOPs = R (2 (P_lin + V D) + a(n))
    scoring   FLOPs / matrix rate: 2 N P_lin + 2 M V D + sum a(n)
    update    the same, and in the backward pass as much again for the linear layers (their weights are
    frozen) and
              the head, and twice for attention
Share of the limit = limit / measured. LoRA's own products, softmax, norms and the optimiser are left out, so
1 cannot be reached. A share of TRL's is not given: it pads, and computes a prompt once per sample.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from data import UserError
from engine.command_line import exit_status
from engine.models import find_model
from engine.record import environment, write_whole
from plots import flags
from plots.bench import cases, memory, models, plan, products
from plots.bench.limits import machine, precision
from policy import Policy

PARTS = {  # name for --only -> what it measures; the last two are not part of a whole run
    "loss": "the same loss and gradient on both sides",
    "grpo": "GRPO of 1, 2 and 4 prompts x 8 samples x 64 tokens",
    "qwen3": "GRPO of 1 x 8 x 64 on 4 layers of Qwen3-0.6B's shape",
    "sft": "SFT on 8 answers of 128 tokens",
    "dpo": "DPO on 8 pairs of 128 tokens",
    "scaling": "GRPO by group size and length, ours alone",
    "products": "the matrix products of a step alone",
    "head": "the output head beside a dense one",
    "memory": "largest tensors, a role's bytes, the arithmetic for a GPU",
    "checkpointing": "GRPO of 2 x 8 with gradient checkpointing on both sides",
    "sampling": "our sampler beside transformers' generate",
}
WHOLE = [name for name in PARTS if name not in ("checkpointing", "sampling")]


class Bench:
    """What the parts share: model, data, sides, rates, sizes. Its methods make the steps of each part."""

    def __init__(self, args, folder, python):
        self.quick, self.folder, self.repeats = args.quick, folder, 1 if args.quick else args.repeats
        self.dtype = precision()
        self.rates = machine(args.quick, self.dtype)
        self.ours = {"ours": (sys.executable, "bench.ours")}
        self.sides = self.ours | ({"TRL": (python, "bench.with_trl")} if python else {})
        tiny = find_model("tiny")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
        if args.quick:
            self.model = tiny
        elif args.model:
            self.model = find_model(args.model)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.model)
        else:
            self.model = self.random_model("smollm2", models.SMOLLM2)
        self.data = write_data(folder)
        self.tokens = 8 if args.quick else 64

    def random_model(self, name, shape):
        return models.random_model(f"{self.folder}/{name}", self.tokenizer, **shape)

    def case(self, method, prompts, group, tokens, model=None, **changes):
        return cases.make_case(method, model or self.model, prompts, group, tokens, data=self.data, **changes)

    def compared(self, part, case, title="chat", repeats=None, sides=None, warm=1):
        """The step that compares the sides on a case."""
        repeats, sides = repeats or self.repeats, sides or self.sides
        key = "scaling" if part == "scaling" else "cases"
        seconds = plan.case_seconds(case, sides, repeats, self.rates, warm)

        def work():
            return cases.compare(title, case, sides, repeats, self.rates, warm)

        return plan.Step(part, f"{title}, {cases.describe(case)}", key, seconds, work, many=True)

    def steps(self, wanted):
        """The steps of the wanted parts, in the order of PARTS."""
        makers = dict(
            loss=self.loss, grpo=self.grpo, qwen3=self.qwen3, sft=self.pairs, dpo=self.pairs,
            scaling=self.scaling, products=self.products, head=self.head, memory=self.memory,
            checkpointing=self.checkpointing, sampling=self.sampling,
        )  # fmt: skip
        return [step for part in PARTS if part in wanted for step in makers[part](part)]

    def loss(self, part):
        if "TRL" not in self.sides:
            return []
        seconds = sum(plan.LOADING.values()) + 60

        def work():
            return cases.same_loss(self.model, self.data, self.sides)

        return [plan.Step(part, "the same loss", "same_loss", seconds, work)]

    def grpo(self, part):
        sizes = (1,) if self.quick else (1, 2, 4)
        return [self.compared(part, self.case("grpo", prompts, 8, self.tokens)) for prompts in sizes]

    def qwen3(self, part):
        if self.quick:
            return []
        case = self.case("grpo", 1, 8, self.tokens, self.random_model("qwen3", models.SHALLOW))
        return [self.compared(part, case, "Qwen3, 4 layers")]

    def pairs(self, part):
        """SFT and DPO, which sample nothing."""
        return [self.compared(part, self.case(part, 2 if self.quick else 8, 0, 2 * self.tokens))]

    def scaling(self, part):
        """Ours alone, TRL's one batch would need tens of GB and minutes; one step each, the first."""
        grid = [(4, 128), (8, 128), (16, 128), (32, 128), (8, 512), (4, 2048)]
        steps = []
        for group, tokens in [(4, 8)] if self.quick else grid:
            case = self.case("grpo", 1, group, tokens)
            steps.append(self.compared(part, case, "scaling", repeats=1, sides=self.ours, warm=0))
        return steps

    def checkpointing(self, part):
        if self.quick:
            return []
        return [self.compared(part, self.case("grpo", 2, 8, self.tokens, checkpointing=True), repeats=1)]

    def sampling(self, part):
        wanted = [(2, "none")] if self.quick else [(8, "none"), (32, "none")]
        if torch.cuda.is_available():
            wanted.append((8, "nf4"))
        steps = []
        for rows, quantize in wanted:
            seconds = plan.case_seconds(self.case("grpo", 1, rows, self.tokens), self.ours, 5, self.rates)

            def work(rows=rows, quantize=quantize):
                return products.sampling(self.model, rows, self.tokens, self.repeats, self.dtype, quantize)

            steps.append(
                plan.Step(part, f"sampling of {rows} rows, {quantize}", part, 2 * seconds, work, many=True)
            )
        return steps

    def products(self, part):
        seconds = plan.case_seconds(self.case("grpo", 1, 8, self.tokens), self.ours, self.repeats, self.rates)

        def work():
            return products.products(self.model, self.rates, self.repeats, self.tokens, self.dtype)

        return [plan.Step(part, "products alone", part, seconds, work)]

    def head(self, part):
        size = (997, 64) if self.quick else ()
        numbers = size[0] * size[1] if size else models.QWEN3["vocab_size"] * models.QWEN3["hidden_size"]
        once = 6 * 512 * numbers / self.rates["flops"] / plan.SHARES["ours"]  # one head, value and gradient
        seconds = 4 * (self.repeats + 1) * (once + 0.5)  # two heads, and fp32 as well

        def times():
            return products.head_seconds(self.repeats, self.dtype, size)

        def peaks():
            return products.head_peaks(self.dtype, size)

        return [
            plan.Step(part, "output head, time", "head_seconds", 3 * seconds, times),
            plan.Step(
                part, "output head, memory", "head_peak_growth", 4 * plan.LOADING["ours"] + 12 * once, peaks
            ),
        ]

    def memory(self, part):
        profiled = self.model if self.quick else self.random_model("narrow", models.NARROW)
        layer = self.random_model("layer", models.ONE_LAYER)
        steps = []
        for tokens in (16, 32) if self.quick else (512, 1024):
            seconds = 2 * plan.case_seconds(
                self.case("grao", 1, 8, tokens, profiled), self.ours, 1, self.rates
            )

            def work(tokens=tokens):
                return cases.largest_tensors(profiled, self.data, self.ours["ours"], tokens)

            steps.append(
                plan.Step(
                    part, f"largest tensors, {tokens} tokens", "largest_tensors", seconds, work, many=True
                )
            )

        def arithmetic():
            policy = Policy.load(layer, dtype="bfloat16", device="cpu")
            return memory.gpu_table(memory.kept_per_token(policy, 16 if self.quick else 256))

        role = plan.Step(part, "one more role", "role_bytes", 60, lambda: memory.show_role(self.model))
        return [*steps, role, plan.Step(part, "arithmetic for a GPU", "gpu_arithmetic", 120, arithmetic)]


def write_data(folder):
    """A few pairs, only to build a Trainer; the cases bring their own token ids."""
    path = Path(folder) / "data.jsonl"
    with open(path, "w") as file:
        for i in range(2, 10):
            record = {"prompt": f"name {i} drinks", "chosen": "tea", "rejected": "cocoa"}
            file.write(json.dumps(record) + "\n")
    return str(path)


def trl_python(given):
    """The Python that runs TRL's side, or None with the reason on stderr."""
    python = given or os.environ.get("MINIGRAO_TRL_PYTHON") or sys.executable
    probe = "from importlib.metadata import version; v = version('trl'); print(v); "
    probe += "assert tuple(map(int, v.split('.')[:2])) >= (1, 16), v"
    try:
        found = subprocess.run([python, "-c", probe], capture_output=True, text=True)
        reason = "" if found.returncode == 0 else f"no trl >= 1.16 in {Path(python).name}'s environment"
    except OSError as error:
        reason = f"{python}: {error.strerror}"
    if reason and given:
        raise UserError(f"--trl-python {given}: {reason}")
    if reason:
        print(f"TRL is not measured ({reason}); see --trl-python", file=sys.stderr)
    return None if reason else python


# ------------------------------------------------------------------------------------------------------------
# The command


def arguments(argv):
    p = flags.parser(__doc__)
    p.add_argument("--model", help="directory, hub name or .gguf of the chat model")
    p.add_argument("--trl-python", help="the python of an environment with trl 1.16 [MINIGRAO_TRL_PYTHON]")
    p.add_argument("--repeats", type=int, default=3, help="steps of each side of a case [3]")
    p.add_argument("--only", help=f"parts, with commas, of {', '.join(PARTS)} [all but the last two]")
    p.add_argument("--minutes", type=float, help="at most so many [the estimate, which is printed first]")
    p.add_argument("--quick", action="store_true", help="the embedded model, one repeat: does it run?")
    p.add_argument("--out", type=Path, help="write the numbers here as JSON, again after each part")
    p.add_argument("--overwrite", action="store_true", help="replace --out, if it is of this command")
    args = p.parse_args(argv)
    args.only = args.only.split(",") if args.only else WHOLE
    for part in args.only:
        if part not in PARTS:
            raise UserError(f"--only {part}: no such part; there are {', '.join(PARTS)}")
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: must be at least 1")
    if args.minutes is not None and not args.minutes > 0:
        raise UserError(f"--minutes {args.minutes:g}: must be more than 0")
    return args


def begin(bench, args):
    """What stands at the head of the JSON, printed in short."""
    rates, load, cores = bench.rates, os.getloadavg()[0], os.cpu_count()
    if load > 0.5:
        busy = f"the machine is busy (load {load:.1f} on {cores} cores)"
        print(f"note: {busy}: these numbers are indicative only", file=sys.stderr)
    print(
        f"{bench.dtype} matrix product {rates['flops'] / 1e9:.0f} GFLOP/s, "
        f"copy {rates['bytes'] / 1e9:.1f} GB/s, {torch.get_num_threads()} threads"
    )
    random = "tiny" if args.quick else "random weights in SmolLM2-135M's shape"
    name = Path(args.model).name if args.model and not args.quick else random
    result = {"environment": environment(), "load_at_start": load, "quick": args.quick, "machine": rates}
    result |= {"threads": torch.get_num_threads(), "precision": bench.dtype, "model": name}
    return result | {"lora_rank": cases.RANK, "prompt_tokens": cases.PROMPT, "cases": []}


def main(argv=None):
    """The command -> its numbers; UserError where nothing at all could be measured."""
    args, start = arguments(argv), time.time()
    if args.out:
        flags.check_target(args.out, args.overwrite, ours=("machine", "cases"))
    python = trl_python(args.trl_python)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder, python)
        result = begin(bench, args)
        steps = bench.steps(args.only)
        allowed = plan.announce(steps, args.minutes)
        print(cases.HEADER, flush=True)

        def save():
            result["minutes"] = (time.time() - start) / 60
            if args.out:
                write_whole(args.out, json.dumps(result, indent=1) + "\n")

        plan.go_through(steps, allowed, result, save)
        save()
    if len(result["left_out"]) == len(steps):
        raise UserError(f"nothing was measured: {', '.join(args.only)} cannot run here")
    return result


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:]), stopped="stopped; what was measured is in --out"))
