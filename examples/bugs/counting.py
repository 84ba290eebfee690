"""How examples/bugs is measured: tests and checks that fail, each run on a module loaded anew. Frozen.

A module that does more than compute is not counted at all: it could read the answers out of the files beside it.
"""

import ast
import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODULES = {
    "bisect",
    "calendar",
    "collections",
    "dataclasses",
    "datetime",
    "functools",
    "heapq",
    "itertools",
    "math",
    "operator",
}
MODULES |= {"re", "typing"}
CLOSED = {"open", "exec", "eval", "compile", "globals", "locals", "vars", "getattr", "setattr", "input", "breakpoint"}


class NotCounted(Exception):
    """The module reaches for more than it needs."""


def require_plain(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for name in names_in(node):
            inner = name.startswith("__") and name not in ("__name__", "__slots__")
            if inner or name in CLOSED:
                raise NotCounted(f"{path.name} line {node.lineno} uses {name}, which reaches beyond its own code")
        for name in modules_in(node):
            if name.split(".")[0] not in MODULES:
                raise NotCounted(
                    f"{path.name} line {node.lineno} imports {name}; it may import {', '.join(sorted(MODULES))}"
                )


def names_in(node):
    if isinstance(node, ast.Name):
        return [node.id]
    return [node.attr] if isinstance(node, ast.Attribute) else []


def modules_in(node):
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    return [node.module or "."] if isinstance(node, ast.ImportFrom) else []


def load(path):
    """The file as a module, in the place of any earlier one."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def fails(file, name, times, subject):
    """Whether a function of a file raises anything, called `times` times with the subject loaded anew."""
    load(subject)
    function = getattr(load(file), name)
    try:
        for _ in range(times):
            function()
    except (Exception, SystemExit):
        return True
    return False


def count(subject=HERE / "bookings.py"):
    """(failing tests and checks, figures), and the names of those that fail on the screen."""
    require_plain(subject)
    load(subject)  # a module that cannot be imported is an error of its own, not thirty failing tests
    failing = {}
    for file, prefix in (("test_bookings.py", "test_"), ("checks.py", "check_")):
        module = load(HERE / file)
        names = [name for name in vars(module) if name.startswith(prefix)]
        times = getattr(module, "CASES", 1)
        failing[file] = [name for name in names if fails(HERE / file, name, times, subject)]
        for name in failing[file]:
            print(f"fails: {file} {name}")
    tests, checks = (len(names) for names in failing.values())
    return tests + checks, {"failing_tests": tests, "failing_checks": checks}
