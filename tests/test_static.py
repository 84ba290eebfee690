"""What the files promise about themselves: plain statements, no effects at import, maps, arrows, dependencies."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

SOURCES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.py", "referee/*.py", "bench/*.py", "tests/*.py", "examples/**/*.py")
    for path in ROOT.glob(pattern)
)
ROOMS = ["prepare.py", "train.py"]
MODULES = "base experiment clock records book verdict lint audit run supervisor".split()
MODULES += "engines night table common log status commands".split()
TRAINING = ["audit", "base", "clock", "experiment", "lint", "records", "run"]  # all that a training process loads


def source(name):
    return (ROOT / name).read_text(encoding="utf-8")


# -- a statement does one thing


def folded(text):
    """(line, what) of statements that do more than one thing."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, (ast.BoolOp, ast.IfExp, ast.Tuple)):
            found.append((node.lineno, "an expression of several as a statement"))
        if isinstance(node, ast.IfExp) and any(isinstance(n, ast.IfExp) for n in ast.walk(node) if n is not node):
            found.append((node.lineno, "a conditional inside a conditional"))
        if isinstance(node, ast.Assign):
            found += [(node.lineno, what) for what in folded_assignment(node)]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            if (is_text(node.left) and is_condition(node.right)) or (is_text(node.right) and is_condition(node.left)):
                found.append((node.lineno, "a text times a condition"))
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(node, ast.stmt) and body[0].lineno == header_end(node):
            found.append((node.lineno, "a body on its header's line"))
    return sorted(found)


def folded_assignment(node):
    targets = [leaf for target in node.targets for leaf in ast.walk(target)]
    count = sum(
        isinstance(leaf, (ast.Name, ast.Attribute, ast.Subscript)) and isinstance(leaf.ctx, ast.Store)
        for leaf in targets
    )
    literal = isinstance(node.value, ast.Tuple) or len(node.targets) > 1
    if count > 2 and literal:
        yield "more than two targets in an assignment"
    if isinstance(node.value, ast.Lambda) and isinstance(node.targets[0], ast.Name):
        yield "a named lambda"


def is_text(node):
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)))


def is_condition(node):
    named_bool = isinstance(node, ast.Call) and ast.unparse(node.func) == "bool"
    return named_bool or isinstance(node, (ast.Compare, ast.BoolOp)) or isinstance(node, ast.UnaryOp)


def header_end(node):
    """The last line of a compound statement's header, decorators left out."""
    parts = [getattr(node, name, None) for name in ("test", "iter", "subject", "returns", "args")]
    lines = [part.end_lineno for part in parts if hasattr(part, "end_lineno")]
    lines += [item.context_expr.end_lineno for item in getattr(node, "items", [])]
    return max([node.lineno, *lines])


@pytest.mark.parametrize("name", SOURCES)
def test_a_statement_does_one_thing(name):
    assert folded(source(name)) == []


@pytest.mark.parametrize(
    "planted",
    [
        "a and b()",
        "a() or b()",
        "f(), g()",
        "f() if a else g()",
        "x = a if b else (c if d else e)",
        "a, b, c = 1, 2, 3",
        "a = b = c = 0",
        "f = lambda x: x",
        "s = 'x' * (a > b)",
        "s = f'{x}' * bool(a)",
        "s = (not a) * 'x'",
        "if a: f()",
        "for x in y: f()",
        "def f(): return 1",
        "class A: pass",
        "with a: f()",
        "while a: f()",
        "try: f()\nexcept E: pass",
    ],
)
def test_folded_statements_are_found(planted):
    assert folded(planted)


@pytest.mark.parametrize(
    "sound",
    [
        "a, b = 1, 2",
        "a, b, c = f()",
        "x = a if b else c",
        "s = 'x' * n",
        "if a:\n    f()",
        "f(lambda x: x)",
        "x = a and b",
    ],
)
def test_plain_statements_are_not(sound):
    assert folded(sound) == []


# -- import


def effects(text):
    """Calls that run when a module is imported, besides those known to have no effect."""
    harmless = (
        r"dataclass|field|fields|Path|Path\(__file__\)\.resolve|time\.monotonic|environment_number|range|dict|torch\.no_grad|Run"
        r"|Knobs|TrainingClock|Preset|re\.compile|set|os\.environ\.get|audit\.seal|contextlib\.contextmanager|functools\.\w+"
    )
    found = []

    def visit(node):
        if isinstance(node, (ast.FunctionDef, ast.Lambda, ast.AsyncFunctionDef)):
            for default in [*getattr(node, "decorator_list", []), *node.args.defaults]:
                visit(default)
            return
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Call) and not re.fullmatch(harmless, ast.unparse(node.func)):
            found.append(ast.unparse(node))
        if isinstance(node, (ast.With, ast.For, ast.While)):
            found.append(ast.unparse(node))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(text))
    return found


@pytest.mark.parametrize("name", ["prepare.py", "train.py", *(f"referee/{name}.py" for name in (*MODULES, "__main__"))])
def test_import_is_free(name):
    assert effects(source(name)) == []


@pytest.mark.parametrize(
    "planted",
    [
        "print('x')",
        "import torch\nN = torch.cuda.device_count()",
        "X = open('f').read()",
        "class A:\n    x = open('f')",
        "def f(x=open('g')): pass",
        "for i in range(3): pass",
    ],
)
def test_import_check_can_fail(planted):
    assert effects(planted)


def test_import_writes_and_prints_nothing_and_loads_no_commands(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.dont_write_bytecode = True; import train, torch; "
        "assert not torch.cuda.is_initialized(); print(sorted(n[8:] for n in sys.modules if n.startswith('referee.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"{TRAINING}\n", done.stderr
    assert list(tmp_path.iterdir()) == []


# -- arrows run one way


def imported(name):
    """Dotted names of what a file imports."""
    found = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{each.name}" for each in node.names}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_a_module_of_the_referee_uses_those_above_it_and_the_standard_library(module):
    above = MODULES[: MODULES.index(module)]
    for name in imported(f"referee/{module}.py"):
        first, _, rest = name.partition(".")
        assert first in sys.stdlib_module_names or (first == "referee" and rest.split(".")[0] in above), name


@pytest.mark.parametrize("module", MODULES)
def test_a_module_of_the_referee_is_named_and_is_pages_not_a_book(module):
    assert re.search(rf"\b{module}\b", source("referee/__init__.py"))
    assert len(source(f"referee/{module}.py").splitlines()) <= 360


@pytest.mark.parametrize("name", ROOMS)
def test_map_agrees_with_rooms(name):
    text = source(name)
    rooms = re.findall(r"^# == (\d+)\. ([A-Z]+) =+$", text, re.M)
    assert rooms == re.findall(r"^    (\d+)\. ([A-Z]{3,})\b", ast.get_docstring(ast.parse(text), clean=False), re.M)
    assert [int(number) for number, _ in rooms] == list(range(1, len(rooms) + 1))


def test_a_reader_of_train_meets_model_optimizer_and_loop_before_the_machine():
    rooms = re.findall(r"^# == \d+\. ([A-Z]+)", source("train.py"), re.M)
    assert rooms == ["KNOBS", "MODEL", "OPTIMIZER", "SCHEDULE", "RUN", "MACHINE"]


@pytest.mark.parametrize("name", SOURCES)
def test_functions_are_short(name):
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


# -- the door and the project


def test_train_knows_the_project_through_the_door_only():
    import prepare

    tree = ast.parse(source("train.py"))
    local = {name.split(".")[1] for name in imported("train.py") if name.startswith("prepare.")}
    attributes = [
        node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    ]
    assert local | {node.attr for node in attributes if node.value.id == "prepare"} <= set(prepare.__all__)


def test_door_resolves(small):
    for name in small.__all__:
        getattr(small, name)
    assert (small.MAX_SEQ_LEN, small.EVAL_TOKENS) == (64, 4096)


def test_dependencies_are_the_seven():
    import prepare

    project = tomllib.loads(source("pyproject.toml"))["project"]
    names = sorted(re.match(r"[\w-]+", each)[0] for each in project["dependencies"])
    assert names == sorted(prepare.RUNTIME)
    assert names == ["kernels", "numpy", "pyarrow", "requests", "rustbpe", "tiktoken", "torch"]


def test_lock_comes_from_the_ordinary_index():
    lock = tomllib.loads(source("uv.lock"))
    sources = {tuple(package["source"].items())[0] for package in lock["package"]}
    assert sources == {("registry", "https://pypi.org/simple"), ("virtual", ".")}


USED = ["results.tsv", "runs/x.json", "runs/until", "run.log", "progress.png", "analysis.html", "ideas.md"]
USED += ["referee/__pycache__/x", "examples/speed/runs/x", "examples/speed/results.tsv"]


@pytest.mark.parametrize("name", USED)
def test_what_use_makes_is_ignored(name):
    assert subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT).returncode == 0


def test_runs_is_shipped_and_line_ends_are_the_same_everywhere():
    assert (ROOT / "runs/.gitignore").read_text() == "*\n!.gitignore\n"
    assert (ROOT / ".gitattributes").read_text() == "* text=auto eol=lf\n"
