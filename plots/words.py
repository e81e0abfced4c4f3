"""How the study's tables and figures write: a method's name, a row of Markdown, a mean with its interval."""

from plots import suites
from plots.statistics import two_level_interval

LABELS = {
    "base": "before training",
    "sft": "SFT",
    "dpo": "DPO",
    "ppo": "PPO",
    "ppo-4": "PPO, 4 updates",
    "grpo": "GRPO",
    "sft-grpo": "SFT → GRPO",
    "grao": "GRAO",
    "uniapl": "UniAPL (unified)",
    "chord": "CHORD (unified, λ = 0)",
    "a-sft": "A-SFT",
    "a-grpo": "A-GRPO",
    "sft-a-grpo": "SFT → A-GRPO",
    "a-sft-a-grpo": "A-SFT → A-GRPO",
    "ptx": "GRPO + 0.1 SFT (ptx)",
    "luffy": "LUFFY",
    "hpt": "HPT",
    "shaping": "shaped reward",
    "uniapl-embedding": "unified, embedding",
    "uniapl-cotrained": "unified, co-trained",
    "uniapl-lambda0.3": "unified, λ = 0.3",
    "uniapl-lambda1": "unified, λ = 1",
    "uniapl-lambda3": "unified, λ = 3",
    "a-grpo-lambda1": "A-GRPO, λ = 1",
    "shaping-lambda1": "shaped reward, λ = 1",
    "grao-without-imitation": "without imitation",
    "grao-without-exploration": "without exploration",
    "grao-without-regularizer": "without regulariser",
    "grao-equivalent": "without regulariser, re-weighted",
}


def label(name):
    if name in suites.SENSITIVITY:
        return "GRAO, β = {:g}, λ = {:g}".format(*suites.SENSITIVITY[name])
    if name in suites.QUALITY:
        method, share = suites.QUALITY[name]
        return f"{LABELS[method]}, {share:.0%} right"
    return LABELS.get(name, name)


def present(logs, names):
    return [name for name in names if name in logs]


def missing_note(logs, names):
    absent = [LABELS.get(name, name) for name in names if name not in logs]
    return f"\nNot run: {', '.join(absent)}.\n" if absent else ""


def markdown(header, rows):
    """A table with a title above each column."""
    lines = []
    for row in (header, ["---"] * len(header), *rows):
        lines.append("| " + " | ".join(map(str, row)) + " |\n")
    return "".join(lines)


def interval(values, digits=3, percent=False, sign=False):
    """A matrix (S, P) -> "mean [low, high]"."""
    scale, digits = (100, 1) if percent else (1, digits)
    plus = "+" if sign else ""
    written = []
    for x in two_level_interval(values):
        rounded = round(scale * x, digits) + 0.0  # + 0.0: never -0.0
        written.append(f"{rounded:{plus}.{digits}f}")
    return "{} [{}, {}]".format(*written)


def difference(r):
    """compare_paired's result as text: the mean difference and its 95 % interval."""
    return "{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**r)


def quoted(text, width=300):
    """A model's answer within a cell of a table."""
    text = " / ".join(text.split("\n")).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    return text if len(text) <= width else text[: width - 1] + "…"


def floor_note(logs, names):
    """What the best constant answer earns on the same prompts, which a reward is to be told from.

    Logs of a reward without such answers have none (data/floor.py).
    """
    for name in present(logs, names):
        after = next(iter(logs[name].values())).after
        if "floor_reward" in after:
            floor = after["floor_reward"].mean()
            return f"\nNo-skill floor, the best of a few constant answers: {floor:.3f}.\n"
    return ""
