"""What the files promise about themselves: nothing happens at import, budgets, maps, dependencies."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

FILES = {"prepare.py": 800, "train.py": 650}


def source(name):
    return (ROOT / name).read_text(encoding="utf-8")


def effects(text):
    """Calls that run when a module is imported, besides those known to have no effect."""
    found = []

    def visit(node):
        if isinstance(node, (ast.FunctionDef, ast.Lambda, ast.AsyncFunctionDef)):
            for default in [*getattr(node, "decorator_list", []), *node.args.defaults]:
                visit(default)
            return
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Call) and not re.fullmatch(
            r"dataclass|Path|Path\(__file__\)\.resolve|time\.monotonic|_whole|range|dict|torch\.no_grad|Clock|Knobs",
            ast.unparse(node.func),
        ):
            found.append(ast.unparse(node))
        if isinstance(node, (ast.With, ast.For, ast.While)):
            found.append(ast.unparse(node))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(text))
    return found


@pytest.mark.parametrize("name", FILES)
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


def test_import_writes_and_prints_nothing(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.dont_write_bytecode = True; import train; import torch; "
        "assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])


@pytest.mark.parametrize("name, most", FILES.items())
def test_line_budget(name, most):
    assert len(source(name).splitlines()) <= most
    long = [line for line in source(name).splitlines() if len(line) > 120]
    assert not long, long


@pytest.mark.parametrize("name", FILES)
def test_map_agrees_with_rooms(name):
    text = source(name)
    rooms = re.findall(r"^# == (\d+)\. ([A-Z]+) =+$", text, re.M)
    mapped = re.findall(r"\b(\d+)\.? ([A-Z]{3,})\b", ast.get_docstring(ast.parse(text)))
    assert rooms == mapped and [int(n) for n, _ in rooms] == list(range(1, len(rooms) + 1))


def test_rooms_of_train():
    assert re.findall(r"^# == \d+\. ([A-Z]+)", source("train.py"), re.M) == [
        "KNOBS",
        "MODEL",
        "OPTIMIZER",
        "SCHEDULE",
        "RUN",
        "CONTRACT",
    ]


@pytest.mark.parametrize("name", FILES)
def test_functions_are_short(name):
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("name", FILES)
def test_rooms_depend_upwards_only(name):
    """A top-level statement may use, when it runs, only names defined above it; a function only those of its own room
    or of rooms above."""
    text = source(name)
    starts = [text[: m.start()].count("\n") + 1 for m in re.finditer(r"^# == \d+\.", text, re.M)]
    room = lambda line: sum(start <= line for start in starts)
    module = ast.parse(text)
    defined = {}
    for node in module.body:
        names = (
            [node.name]
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            else [n.id for target in getattr(node, "targets", []) for n in ast.walk(target) if isinstance(n, ast.Name)]
        )
        defined.update({n: node.lineno for n in names})
    for node in module.body:
        for use in ast.walk(node):
            if isinstance(use, ast.Name) and isinstance(use.ctx, ast.Load) and use.id in defined:
                assert room(defined[use.id]) <= room(use.lineno), f"{name}:{use.lineno} uses {use.id} from a later room"


def test_train_knows_the_project_through_the_door_only():
    import prepare

    tree = ast.parse(source("train.py"))
    local = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "prepare"]
    assert {a.name for n in local for a in n.names} <= set(prepare.__all__)
    used = {
        n.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "prepare"
    }
    assert used <= set(prepare.__all__)


def test_door_resolves(small):
    for name in small.__all__:
        getattr(small, name)
    assert (small.MAX_SEQ_LEN, small.EVAL_TOKENS) == (64, 4096)


def test_dependencies_are_the_seven():
    import prepare

    project = tomllib.loads(source("pyproject.toml"))["project"]
    names = sorted(re.match(r"[\w-]+", d)[0] for d in project["dependencies"])
    assert (
        names == sorted(prepare.RUNTIME) == ["kernels", "numpy", "pyarrow", "requests", "rustbpe", "tiktoken", "torch"]
    )
    assert "torch==2.13.0" in project["dependencies"] and project["requires-python"] == ">=3.11,<3.14"


def test_lock_comes_from_the_ordinary_index():
    lock = tomllib.loads(source("uv.lock"))
    sources = {tuple(p["source"].items())[0] for p in lock["package"]}
    assert sources == {("registry", "https://pypi.org/simple"), ("virtual", ".")}


def test_what_use_makes_is_ignored(project):
    for name in ("results.tsv", "runs.jsonl", "run.log", "progress.png", "ideas.md", "__pycache__/x"):
        assert subprocess.run(["git", "check-ignore", "-q", name], cwd=project).returncode == 0, name
