"""What the files promise about themselves: plain statements, no effects at import, maps, budgets, dependencies."""

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib

import pytest
from conftest import ROOT

FILES = ["prepare.py", "referee.py", "train.py"]
PLAIN = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("examples/**/*.py"), *ROOT.glob("fleet/*.py")]
)
TOKENS = {  # of code, comments and docstrings free: where the files stood when this was set; raising one says why
    "prepare.py": 9920,
    "referee.py": 17610,  # 4,300 of them the room FLEET
}


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


@pytest.mark.parametrize("name", PLAIN)
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


# -- budgets


def code_tokens(text):
    """Tokens of code: without comments, line ends, indentation and docstrings."""
    free = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstrings.add(node.body[0].lineno)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    counted = [token for token in tokens if token.type not in free]
    return sum(not (token.type == tokenize.STRING and token.start[0] in docstrings) for token in counted)


def test_tokens_are_counted():
    assert code_tokens('"""Doc."""\nx = 1  # why\n\n\ndef f():\n    """Doc."""\n    return x\n') == 3 + 5 + 2


@pytest.mark.parametrize("name, most", TOKENS.items())
def test_token_budget(name, most):
    assert code_tokens(source(name)) <= most


@pytest.mark.parametrize("name", FILES)
def test_functions_are_short(name):
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


# -- import


def effects(text):
    """Calls that run when a module is imported, besides those known to have no effect."""
    harmless = (
        r"dataclass|field|Path|Path\(__file__\)\.resolve|time\.monotonic|whole_number|range|dict|torch\.no_grad|Clock|Run|Knobs"
        r"|Preset|re\.compile|set|frozenset|float|os\.environ\.get|referee\.seal|contextlib\.contextmanager|functools\.\w+"
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
    )
    code += "assert not torch.cuda.is_initialized()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])


def test_the_referee_needs_the_standard_library_only():
    imported = set()
    for node in ast.walk(ast.parse(source("referee.py"))):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported <= set(sys.stdlib_module_names)


# -- rooms


@pytest.mark.parametrize("name", FILES)
def test_map_agrees_with_rooms(name):
    text = source(name)
    rooms = re.findall(r"^# == (\d+)\. ([A-Z]+) =+$", text, re.M)
    mapped = re.findall(r"^    (\d+)\. ([A-Z]{3,})\b", ast.get_docstring(ast.parse(text), clean=False), re.M)
    assert rooms == mapped
    assert [int(number) for number, _ in rooms] == list(range(1, len(rooms) + 1))


def test_rooms_of_train():
    rooms = re.findall(r"^# == \d+\. ([A-Z]+)", source("train.py"), re.M)
    assert rooms == ["KNOBS", "MODEL", "KERNELS", "OPTIMIZER", "SCHEDULE", "RUN", "CONTRACT"]


@pytest.mark.parametrize("name", FILES)
def test_rooms_depend_upwards_only(name):
    """A top-level statement may use, when it runs, only names defined above it; a function only those of its own room
    or of rooms above."""
    text = source(name)
    starts = [text[: match.start()].count("\n") + 1 for match in re.finditer(r"^# == \d+\.", text, re.M)]

    def room(line):
        return sum(start <= line for start in starts)

    module = ast.parse(text)
    defined = {}
    for node in module.body:
        names = [
            leaf.id
            for target in getattr(node, "targets", [])
            for leaf in ast.walk(target)
            if isinstance(leaf, ast.Name)
        ]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        defined.update({each: node.lineno for each in names})
    for node in module.body:
        for use in ast.walk(node):
            if isinstance(use, ast.Name) and isinstance(use.ctx, ast.Load) and use.id in defined:
                assert room(defined[use.id]) <= room(use.lineno), f"{name}:{use.lineno} uses {use.id} from a later room"


# -- the door and the project


def test_train_knows_the_project_through_the_door_only():
    import prepare

    tree = ast.parse(source("train.py"))
    local = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "prepare"]
    assert {name.name for node in local for name in node.names} <= set(prepare.__all__)
    attributes = [
        node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    ]
    assert {node.attr for node in attributes if node.value.id == "prepare"} <= set(prepare.__all__)


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
    assert "torch==2.13.0" in project["dependencies"]
    assert project["requires-python"] == ">=3.11,<3.14"


def test_lock_comes_from_the_ordinary_index():
    lock = tomllib.loads(source("uv.lock"))
    sources = {tuple(package["source"].items())[0] for package in lock["package"]}
    assert sources == {("registry", "https://pypi.org/simple"), ("virtual", ".")}


@pytest.mark.parametrize(
    "name",
    [
        "results.tsv",
        "runs/x.json",
        "run.log",
        "run.json",
        "progress.png",
        "ideas.md",
        "__pycache__/x",
        "examples/speed/runs/x",
    ],
)
def test_what_use_makes_is_ignored(project, name):
    assert subprocess.run(["git", "check-ignore", "-q", name], cwd=project).returncode == 0
