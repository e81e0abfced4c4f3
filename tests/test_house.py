"""The house keeps its shape: imports run one way, the papers' files can be read, and the reading guide
names what exists.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the top to the bottom; a module imports from its own layer or from those behind it.
LAYERS = [
    {"plots", "scale", "chat"},
    {"minigrao", "uniapl", "baselines"},
    {"ppo"},
    {"discriminator", "losses"},
    {"train"},
    {"reward"},
    {"reward_model"},
    {"policy"},
    {"engine"},
    {"data"},
]
LAYER = {name: depth for depth, names in enumerate(LAYERS) for name in names}
# Lines with a comment for each line of code, at least.
LECTURES = {
    "minigrao.py": 0.33,
    "uniapl.py": 0.3,
    "ppo.py": 0.3,
    "baselines.py": 0.26,
    "discriminator.py": 0.22,
}
BRANCHES = (ast.If, ast.For, ast.While, ast.IfExp, ast.comprehension, ast.Try)


def sources():
    files = [
        *ROOT.glob("*.py"),
        *ROOT.glob("engine/**/*.py"),
        *ROOT.glob("data/**/*.py"),
        *ROOT.glob("plots/**/*.py"),
    ]
    assert len(files) > 30
    return [(file.relative_to(ROOT), ast.parse(file.read_text(encoding="utf-8"))) for file in files]


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_imports_run_one_way():
    upwards = []
    for file, tree in sources():
        own = LAYER[file.parts[0].removesuffix(".py")]
        for module in imported(tree):
            name = module.split(".")[0]
            if LAYER.get(name, len(LAYERS)) < own:
                upwards.append(f"{file} imports {module}")
    assert not upwards


def test_no_import_of_ours_hides_inside_a_function():
    hidden = []
    for file, tree in sources():
        for function in ast.walk(tree):
            if isinstance(function, (ast.FunctionDef, ast.Lambda)):
                names = {module.split(".")[0] for module in imported(function)}
                hidden += [
                    f"{file}: {getattr(function, 'name', 'lambda')}: {name}" for name in names & set(LAYER)
                ]
    assert not hidden


def test_no_file_is_longer_than_a_reader_bears():
    lengths = {
        str(file): len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file, _ in sources()
    }
    assert not {file: lines for file, lines in lengths.items() if lines > 560}


def code_and_comments(path):
    """(lines of code, lines with a comment) of a file; docstrings, rules and blank lines in neither."""
    text = path.read_text(encoding="utf-8")
    docstrings, code, comments = set(), set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.update(range(node.lineno, node.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        lines = range(token.start[0], token.end[0] + 1)
        if token.type == tokenize.COMMENT:
            comments.update(lines if set(token.string) - set("#- ") else ())
        elif token.string.strip():
            code.update(lines)
    return len(code - docstrings), len(comments)


@pytest.mark.parametrize("name, share", LECTURES.items())
def test_a_papers_file_is_a_lecture(name, share):
    """Comments that teach: about a line for every three lines of code."""
    code, comments = code_and_comments(ROOT / name)
    assert comments >= share * code, f"{name}: {comments} lines with a comment, {code} lines of code"


def test_a_step_is_short():
    """An optimisation step has at most 25 lines of code and 7 branches, so that it can be held in mind."""
    long = []
    for name in LECTURES:
        text = (ROOT / name).read_text(encoding="utf-8")
        for function in ast.parse(text).body:
            if not isinstance(function, ast.FunctionDef) or not re.search("update$|step$", function.name):
                continue
            lines = ast.get_source_segment(text, function).splitlines()[1:]
            start = function.body[1].lineno if ast.get_docstring(function) else function.body[0].lineno
            lines = text.splitlines()[start - 1 : function.end_lineno]
            code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
            branches = sum(isinstance(node, BRANCHES) for node in ast.walk(function))
            if len(code) > 25 or branches > 7:
                long.append(f"{name}: {function.name} has {len(code)} lines and {branches} branches")
    assert not long


def test_the_reading_guide_names_what_exists():
    """`file.py: function` of docs/reading.md, and `Class.method`."""
    guide = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)`[:,]? `([\w.]+)`", guide)
    assert len(named) > 30
    missing = []
    for file, name in named:
        body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        for part in name.split("."):
            found = [n for n in body if getattr(n, "name", None) == part]
            found += [n for n in body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == part]
            if not found:
                missing.append(f"{file}: {name}")
                break
            body = getattr(found[0], "body", [])
    assert not missing
