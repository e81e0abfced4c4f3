"""The study's grid as plain data: which runs, with which flags, in which part of which suite.

    grid("tiny") -> [Run, ...]        what plots/compare.py runs and plots/figures.py draws

A method's name is its name everywhere: folder, table, figure, colour. To add a run, add a line to METHODS and
its name to a part.

Budgets are equal in two ways: every run of a suite takes the same optimisation steps, with one optimiser
update each ("ppo-4", the usual PPO of two passes over two mini-batches, is the labelled exception), and every
run that samples draws prompts x G samples in each of its steps. A staged pipeline samples in its second half
only, SFT and DPO never; the tokens that were really generated are in the logs and in the table of budgets.
"""

from dataclasses import dataclass

# Name -> (program, its flags, the sweeps whose learning rates it takes, one for each stage).
METHODS = {
    "sft": ("baselines.py sft", "", "sft"),
    "dpo": ("baselines.py dpo", "", "dpo"),
    "ppo": ("baselines.py ppo", "--ppo-epochs 1 --minibatches 1", "ppo"),
    "ppo-4": ("baselines.py ppo", "--ppo-epochs 2 --minibatches 2", "ppo-4"),
    "grpo": ("baselines.py grpo", "", "grpo"),
    "sft-grpo": ("uniapl.py", "--variant sft-grpo", "sft grpo"),
    "grao": ("minigrao.py", "", "grao"),
    "uniapl": ("uniapl.py", "--variant unified", "uniapl"),
    # UniAPL's other pipelines and its neighbours. chord is unified without the anchor, lambda = 0.
    "chord": ("uniapl.py", "--variant chord", "uniapl"),
    "a-sft": ("uniapl.py", "--variant a-sft", "sft"),
    "a-grpo": ("uniapl.py", "--variant a-grpo", "grpo"),
    "sft-a-grpo": ("uniapl.py", "--variant sft-a-grpo", "sft grpo"),
    "a-sft-a-grpo": ("uniapl.py", "--variant a-sft-a-grpo", "sft grpo"),
    "ptx": ("uniapl.py", "--variant ptx", "uniapl"),
    "luffy": ("uniapl.py", "--variant luffy", "grpo"),
    "hpt": ("uniapl.py", "--variant hpt", "grpo"),
    "shaping": ("uniapl.py", "--variant shaping", "grpo"),
    "uniapl-embedding": ("uniapl.py", "--variant unified --discriminator embedding", "uniapl"),
    "uniapl-cotrained": ("uniapl.py", "--variant unified --discriminator cotrained", "uniapl"),
}
COMPARED = ("sft", "dpo", "ppo", "grpo", "sft-grpo", "grao", "uniapl")
BETA, LAMBDA, GROUP = 0.5, 0.6, 8  # minigrao.py's defaults, the paper's


def equivalent(beta, lam, group_size):
    """(beta', max_grad_norm') of the run `--without regularizer` that is (beta, lam), to rounding.

    Eq. (3) with y in the group is (1 + lam) E + (beta + lam / G) I for the exploration term E and the
    imitation term I, see minigrao.grao_loss. Divided by 1 + lam this is E + beta' I with
    beta' = (beta + lam / G) / (1 + lam). AdamW does not see a loss's scale, but the clip of the gradient's
    norm does, so it is divided too; the learning rate stays.
    """
    return (beta + lam / group_size) / (1 + lam), 1 / (1 + lam)


_beta, _clip = equivalent(BETA, LAMBDA, GROUP)
ABLATIONS = {
    "grao-without-imitation": "--without imitation",
    "grao-without-exploration": "--without exploration",
    "grao-without-regularizer": "--without regularizer",
    "grao-equivalent": f"--without regularizer --beta {_beta:.10g} --max-grad-norm {_clip:.10g}",
}
BETAS, LAMBDAS = (0.0, 0.25, 0.5, 1.0), (0.0, 0.6, 1.2)
SENSITIVITY = {f"grao-beta{b:g}-lam{m:g}": (b, m) for b in BETAS for m in LAMBDAS if (b, m) != (BETA, LAMBDA)}
SHARES = (0.25, 0.5, 0.75, 1.0)  # of right expert answers
IMITATORS = (
    "sft",
    "sft-grpo",
    "grao",
    "uniapl",
)  # what the expert answers' quality reaches; GRPO does not look at them
QUALITY = {f"{m}-quality{share:g}": (m, share) for m in IMITATORS for share in SHARES} | {
    "grpo-quality1": ("grpo", 1.0)
}
STAGED = ("a-sft", "a-grpo", "sft-a-grpo", "a-sft-a-grpo", "chord", "ptx", "luffy", "hpt")
STRENGTHS = {  # name -> lambda_adv; 0.1 is the default
    "uniapl-lambda0.3": 0.3,
    "uniapl-lambda1": 1.0,
    "uniapl-lambda3": 3.0,
    "a-grpo-lambda1": 1.0,
    "shaping-lambda1": 1.0,
}


def with_flags(name, flags):
    program, given, sweeps = METHODS[name]
    return program, f"{given} {flags}", sweeps


METHODS |= {name: with_flags("grao", flags) for name, flags in ABLATIONS.items()}
METHODS |= {name: with_flags("grao", f"--beta {b:g} --lam {m:g}") for name, (b, m) in SENSITIVITY.items()}
METHODS |= {
    name: with_flags(m, f"--data {{graded}}/quality-{share:g}.jsonl") for name, (m, share) in QUALITY.items()
}
METHODS |= {
    name: with_flags(name.split("-lambda")[0], f"--lambda-adv {strength:g}")
    for name, strength in STRENGTHS.items()
}

UNANCHORED = ("sft-grpo", "chord", "ptx", "luffy", "hpt")  # programs of uniapl.py without a discriminator
PARTS = {
    "comparison": COMPARED,
    "ablations": ("grao", *ABLATIONS),
    "sensitivity": ("grao", *SENSITIVITY),
    "quality": tuple(QUALITY),
    "uniapl": (
        "sft",
        "grpo",
        "sft-grpo",
        "uniapl",
        *STAGED,
        "shaping",
        *STRENGTHS,
        "uniapl-embedding",
        "uniapl-cotrained",
    ),
}


@dataclass(frozen=True)
class Suite:
    flags: str  # of every run
    seeds: dict  # part -> seeds
    rates: str  # learning rates that a sweep tries, the same for every method
    # Of the built-in tasks whose expert answers are graded; None: shares of the data's pairs the right way
    # round.
    level: str = "chat"
    records: int = 3000  # in each graded file
    extra: dict = None  # name -> seeds, of runs beside those of PARTS["comparison"]
    sparse: str = ""  # flags of what is only in the other parts, where fewer points of a curve are wanted
    # False: the data has no second expert answer for polar to learn from; `embedding` takes its place.
    polar: bool = True


SUITES = {
    "tiny": Suite(
        "--model tiny --steps 50 --prompts-per-step 16 --group-size 8 --max-new-tokens 24 "
        "--eval-prompts 256 --eval-every 10",
        dict(comparison=10, ablations=5, sensitivity=2, quality=3, uniapl=2),
        "5e-4 1e-3 2e-3 4e-3",
        level="tiny",
        extra={"ppo-4": 5},
        sparse="--eval-every 25",
    ),
    "smollm2": Suite(
        "--model {model} --steps 40 --prompts-per-step 4 --group-size 8 --max-new-tokens 64 "
        "--micro-batch-tokens 1024 --eval-prompts 200 --eval-every 20",
        dict(comparison=3, ablations=1, sensitivity=1, quality=1, uniapl=1),
        "1e-4 3e-4 1e-3",
    ),
    "qwen3": Suite(
        "--model {model} --steps 200 --prompts-per-step 8 --group-size 8 --max-new-tokens 256 "
        "--eval-prompts 200 --eval-every 20",
        dict(comparison=3, ablations=3, sensitivity=1, quality=1, uniapl=1),
        "3e-5 1e-4 3e-4",
    ),
    "hh": Suite(
        "--model {model} --data {data} --reward {reward} --steps 40 --prompts-per-step 4 --group-size 8 "
        "--max-new-tokens 64 --max-prompt-tokens 256 "
        "--max-expert-tokens 128 --micro-batch-tokens 1024 --eval-prompts 200 --eval-every 20",
        dict(comparison=1, ablations=1, sensitivity=1, quality=1, uniapl=1),
        "1e-4 3e-4 1e-3",
        level=None,
        polar=False,
    ),
}
# --quick: the same programs and figures with next to no training; a later flag wins over an earlier one.
QUICK = "--steps 4 --prompts-per-step 4 --eval-prompts 16 --eval-every 4"
QUICK_UNIAPL = "--discriminator-pairs 16 --discriminator-epochs 1 --discriminator-warmup 1"
QUICK_NAMES = {
    "sensitivity": ("grao", "grao-beta0.5-lam0", "grao-beta0.25-lam0.6", "grao-beta0.25-lam0"),
    "quality": ("sft-quality0.25", "sft-quality1", "grao-quality0.25", "grao-quality1", "grpo-quality1"),
    "uniapl": (
        "sft",
        "grpo",
        "sft-grpo",
        "uniapl",
        "a-grpo",
        "shaping",
        "uniapl-lambda1",
        "uniapl-embedding",
    ),
}


@dataclass(frozen=True)
class Run:
    name: str
    seed: int
    program: str  # "baselines.py sft"
    flags: tuple  # words without learning rate and --out; {model}, {data}, ... are filled in by plots/jobs.py
    sweeps: tuple


def grid(suite, parts=tuple(PARTS), seeds=None, quick=False):
    """The runs of some parts of a suite, each once, cheap and telling ones first.

    seeds: so many of every part.
    """
    s, wanted = SUITES[suite], {}  # (name, seed) -> None, in order
    for part in parts:
        names = QUICK_NAMES.get(part, PARTS[part]) if quick else PARTS[part]
        n = seeds or ((2 if part == "comparison" else 1) if quick else s.seeds[part])
        wanted |= {(name, seed): None for seed in range(n) for name in names}
        if part == "comparison" and s.extra and not quick:
            wanted |= {(name, seed): None for name, most in s.extra.items() for seed in range(min(most, n))}
    return [run(suite, name, seed, quick) for name, seed in wanted]


def run(suite, name, seed, quick=False):
    s, (program, flags, sweeps) = SUITES[suite], METHODS[name]
    words = f"{s.flags} {flags}"
    if name not in COMPARED and name not in (s.extra or {}):
        words += f" {s.sparse}"
    if (
        program == "uniapl.py"
        and not s.polar
        and "--discriminator" not in flags
        and flags.split()[1] not in UNANCHORED
    ):
        words += " --discriminator embedding"
    if quick:
        words += f" {QUICK}" + (f" {QUICK_UNIAPL}" if program == "uniapl.py" else "")
    return Run(name, seed, program, (*words.split(), "--seed", str(seed)), tuple(sweeps.split()))


def sweep(suite, key):
    """plots.sweep's command for METHODS[key] at the suite's own budget: (method, rates, flags), words."""
    program, *rest = METHODS[key][0].split()
    method = rest[0] if rest else {"minigrao.py": "grao", "uniapl.py": "uniapl"}[program]
    flags = [*run(suite, key, 0).flags]
    steps = flags[flags.index("--steps") + 1]
    return method, SUITES[suite].rates.split(), [*flags, "--eval-prompts", "16", "--eval-every", steps]
