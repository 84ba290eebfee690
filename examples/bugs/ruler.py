"""The ruler of examples/bugs: how many examples of report.md and properties of checks.py bookings.py fails. Frozen.

    uv run ../../referee run     measures HEAD, in a second

Each is tried on a module executed anew. A module that does more than compute is not counted: it could read the answers
out of the files beside it.
"""

import ast
import datetime
import doctest
import sys
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import checks  # noqa: E402  (found by the line above)

import referee  # noqa: E402

TIMES = 200  # that a property is tried; days are short and numbers small, so that borders meet often
MODULES = set("bisect calendar collections dataclasses datetime functools heapq itertools math operator typing".split())
CLOSED = set("open exec eval compile globals locals vars getattr setattr input breakpoint sys os modules".split())


def require_plain(source):
    for node in ast.walk(ast.parse(source)):
        imported = {name.name for name in node.names} if isinstance(node, ast.Import) else set()
        imported |= {node.module} if isinstance(node, ast.ImportFrom) else set()
        used = {getattr(node, "id", getattr(node, "attr", ""))}
        beyond = (imported - MODULES) | (used & CLOSED) | {name for name in used if name.startswith("__")}
        if beyond:
            known = ", ".join(sorted(MODULES))
            said = f"bookings.py line {node.lineno} uses {beyond}, which is beyond its own code"
            raise referee.RefereeError(f"{said}; it may import {known}")


def execute(source):
    names = {"__name__": "bookings", "date": datetime.date}
    exec(source, names)
    return names


def failing_examples(source):
    """How many doctests of report.md fail; they are shown."""
    failed = 0
    for section in (HERE / "report.md").read_text(encoding="utf-8").split("\n## "):
        test = doctest.DocTestParser().get_doctest(section, execute(source), section.partition("\n")[0], None, 0)
        failed += doctest.DocTestRunner(verbose=False).run(test).failed
    return failed


def holds(check, source):
    """Whether a property is true every time. Answers are compared as text: an object may equal everything."""
    bookings = SimpleNamespace(**execute(source))
    try:
        answers = [check(bookings) for _ in range(TIMES)]
    except (Exception, SystemExit):
        return False
    return all(repr([got]) == repr([want]) for want, got in answers)


def count_failing(path=HERE / "bookings.py"):
    """(number, figures); 0 when there is nothing left to mend."""
    source = path.read_text(encoding="utf-8")
    require_plain(source)
    execute(source)  # a module that cannot be executed is an error of its own
    examples = failing_examples(source)
    failed = [name for name, check in vars(checks).items() if name.startswith("check_") and not holds(check, source)]
    for name in failed:
        print(f"fails: {name}")
    return examples + len(failed), {"examples": examples, "properties": len(failed)}


if __name__ == "__main__":
    referee.measure(
        count_failing,
        metric="failing",
        lower_is_better=True,
        edits=["bookings.py"],
        frozen=["checks.py", "report.md"],
        perfect=0,
        budget=30,
    )
