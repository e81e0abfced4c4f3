"""The documents keep their word: links lead somewhere, named files exist, flags are flags.

A README that names a flag which no program takes, or a file that was moved, is the first thing that a
newcomer runs into.
"""

import dataclasses
import re
from pathlib import Path

import pytest

import baselines
import discriminator
import minigrao
import reward
import uniapl

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_BYTES = 8 * 1024  # of the README: what a newcomer reads in five minutes

FOREIGN = {"--no-deps"}  # flags of other programs that the pages quote: pip's


def page(path):
    return path.read_text(encoding="utf-8")


def links(text):
    """Targets of [text](target) and ![text](target), without titles; those on the web are left out."""
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(text):
    """What GitHub makes of the headings: small letters, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ +(.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def flags_quoted(text):
    """--flags in code: indented blocks and `spans`. Prose has none."""
    code = re.findall(r"^ {4}.*$", text, flags=re.MULTILINE) + re.findall(r"`[^`\n]+`", text)
    return {flag for line in code for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", line)}


def flags_of_settings():
    """Every program makes its flags from the fields of a dataclass."""
    configs = [method.config for method in baselines.METHODS.values()]
    configs += [minigrao.GraoConfig, uniapl.UniAPLConfig, discriminator.DiscriminatorConfig]
    configs += [reward.TrainConfig, reward.ScoreConfig, reward.JudgeConfig]
    names = {field.name for config in configs for field in dataclasses.fields(config)}
    return {"--" + name.replace("_", "-") for name in names} | {"--help"}


def flags_of_parsers():
    """The scripts around them (plots/, data/, policy.py merge) name theirs in add_argument."""
    sources = [path for path in ROOT.rglob("*.py") if "tests" not in path.parts]
    return {flag for path in sources for flag in re.findall(r'add_argument\(\s*"(--[a-z0-9-]+)"', page(path))}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in links(page(path)):
        name, _, anchor = target.partition("#")
        file = (path.parent / name) if name else path
        assert file.exists(), f"{path.name} links to {target}"
        assert file.resolve().is_relative_to(ROOT), f"{path.name}: {target} leaves the repository"
        if anchor:
            assert anchor in anchors(page(file)), f"{path.name}: {target} has no such heading"


def test_the_map_names_files_that_exist():
    text = page(README)
    rows = text.split("## The map")[1].split("\n## ")[0]
    named = []
    for row in rows.splitlines():
        cells = row.split("|")
        if len(cells) > 2:
            named += re.findall(r"`([^`]+)`", cells[1])
    assert {"minigrao.py", "uniapl.py", "baselines.py", "engine/"} <= set(named)
    for name in named:
        assert (ROOT / name).exists(), f"the README's map names {name}"


def test_every_module_a_reader_meets_is_on_the_map():
    text = page(README)
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in text, f"{path.name} is missing from the README's map"


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= MOST_BYTES


def test_the_readme_names_the_test_command_that_ci_runs():
    """CI takes the command from this line (.ci/run, by sed); without it CI would run nothing and pass."""
    wanted = r"^ +pip install -r requirements-dev.txt && (.+)$"
    assert re.findall(wanted, page(README), flags=re.MULTILINE) == ["python -m pytest"]


def test_flags_in_the_readme_are_settings():
    known = flags_of_settings() | FOREIGN
    assert flags_quoted(page(README)) <= known


def test_flags_in_all_pages_exist():
    known = flags_of_settings() | flags_of_parsers() | FOREIGN
    for path in PAGES:
        if path.name != "scale.md":  # flags of torchrun, accelerate, TRL and vLLM
            assert flags_quoted(page(path)) <= known, path.name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_path_of_a_machine(path):
    found = re.findall(r"(?<![\w.])/(?:home|root|work|tmp|Users|mnt|data|opt)/\S*", page(path))
    assert not found


def test_verdicts_use_three_words():
    """A verdict is one of three words; whoever wants a fourth has to say what it rests on."""
    table = page(ROOT / "docs" / "results.md").split("## Verdicts")[1].split("\n\n")[1]
    for row in table.splitlines()[2:]:
        for cell in row.split("|")[2:4]:
            assert re.match(r" (holds|does not hold|undecided|not run)\b", cell), row
