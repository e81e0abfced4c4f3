"""Every figure and table of the study, from its raw logs alone.

    python -m plots.figures --logs runs/tiny --out runs/tiny/figures
    python -m plots.figures --logs plots/logs/study-tiny.jsonl.gz --out plots/logs/study-tiny/figures

Writes results.md (all tables, each figure with what to look at), samples.md (the same prompts answered by
every method) and the figures as PNG, made for a width of 800 pixels. A part of the grid that was not run
leaves its section out, and a line says so. The figures are in figures_comparison.py and figures_parts.py, the
tables in tables.py and tables_parts.py.
"""

import sys
from pathlib import Path

from engine.command_line import exit_status
from engine.draw import plt, save_figure
from engine.record import write_whole
from plots import figures_comparison, figures_parts, flags, study, tables, tables_parts
from plots.axes import STYLE, Absent

# File: (title, what to look at, figure, table). A figure takes the logs and returns a matplotlib figure, or
# raises Absent.
SECTIONS = {
    "comparison": (
        "Comparison (the paper's tables 1 and 2)",
        "whether GRAO's interval clears the others', and what it pays in KL and length; "
        "dotted: the expert answers",
        figures_comparison.comparison,
        tables.comparison,
    ),
    "dynamics": (
        "Dynamics (Fig. 2)",
        "where a curve first passes the dotted line, GRPO's final reward; the order changes with the axis",
        figures_comparison.dynamics,
        tables.reach,
    ),
    "ablations": (
        "Ablations (Table 3, Fig. 3)",
        "the dotted black line on the wide orange one: without the regulariser and re-weighted it is the "
        "same run",
        figures_parts.ablations,
        tables_parts.ablations,
    ),
    "components": (
        "Components (Fig. 4 and 5)",
        "imitation while the expert answers beat the samples, then exploration; "
        "below 0 the expert answers are pushed away",
        figures_parts.components,
        None,
    ),
    "sensitivity": (
        "Sensitivity to β and λ",
        "whether the cells fall on one curve over β': then λ does nothing that β could not",
        figures_parts.sensitivity,
        None,
    ),
    "quality": (
        "Imperfect expert answers",
        "where a method's line crosses GRPO's, and whether SFT stays below the expert answers it imitates",
        figures_parts.quality,
        tables_parts.quality,
    ),
    "uniapl": (
        "UniAPL: staged, unified, anchored",
        "unified against SFT → GRPO, and whether the anchor (λ) moves anything beyond its interval",
        figures_parts.uniapl,
        tables_parts.uniapl,
    ),
    "anchor": (
        "A stronger anchor",
        "whether accuracy falls towards 0.5, which is coming near or exploiting, and whether entropy and "
        "bigrams sink as λ grows",
        figures_parts.anchor,
        tables_parts.anchor,
    ),
    "distributions": (
        "Lengths and expert log-likelihood",
        "which methods keep the expert's length, and which move away from the expert's answers",
        figures_comparison.distributions,
        None,
    ),
    "cost": (
        "Cost against quality",
        "up and to the left is better: the same reward for fewer tokens or seconds",
        figures_comparison.cost,
        None,
    ),
}


def draw(logs, out):
    """Write figures, results.md and samples.md into `out` -> names of the figures that were drawn."""
    out.mkdir(parents=True, exist_ok=True)
    drawn, first = [], next(iter(next(iter(logs.values())).values()))
    text = f"# Results: {first.config['study']['suite']}\n\n## Budgets\n\n{tables.budgets(logs)}"
    for name, (title, look, figure, table) in SECTIONS.items():
        text += f"\n## {title}\n\n"
        try:
            with plt.rc_context(STYLE):
                save_figure(figure(logs), out / f"{name}.png", metadata={"Software": None})
        except Absent as absent:
            plt.close("all")
            (out / f"{name}.png").unlink(missing_ok=True)
            note = f"{name}: left out, these runs are not in the logs: {absent}"
            print(note)
            text += note[0].upper() + note[1:] + ".\n"
            continue
        drawn.append(name)
        text += f"What to look at: {look}.\n\n![{name}]({name}.png)\n"
        text += f"\n{table(logs)}" if table else ""
    write_whole(out / "results.md", text)
    write_whole(out / "samples.md", tables.samples(logs))
    return drawn


def main(argv):
    parser = flags.parser(__doc__)
    parser.add_argument("--logs", required=True, help="folder of plots.compare, or a packed FILE.jsonl.gz")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    drawn = draw(study.load(args.logs), args.out)
    print(f"{len(drawn)} figures, results.md and samples.md are in {args.out}")
    return True


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
