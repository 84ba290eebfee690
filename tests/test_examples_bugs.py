"""examples/bugs: every bug is seen, every fix pays, and a module that only looks right does not."""

import ast
import functools
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples/bugs"
SHIPPED = (FOLDER / "bookings.py").read_text(encoding="utf-8")
FIXES = {  # what was planted: (as shipped, as it should be)
    "touching": ("one[0] <= other[1] and other[0] <= one[1]", "one[0] < other[1] and other[0] < one[1]"),
    "inner slot": ("(merged[-1][0], end)", "(merged[-1][0], max(merged[-1][1], end))"),
    "ties": ("sorted(changes, key=lambda change: change[0])", "sorted(changes)"),
    "month drift": ("dates.append(add_months(dates[-1], 1))", "dates.append(add_months(first, len(dates)))"),
    "lost cents": (
        "    return [round(cents * weight / total) for weight in weights]\n",
        "    parts = [cents * weight // total for weight in weights]\n"
        "    order = sorted(range(len(weights)), key=lambda index: (-(cents * weights[index] % total), index))\n"
        "    for index in order[: cents - sum(parts)]:\n"
        "        parts[index] += 1\n"
        "    return parts\n",
    ),
    "zero percent": ("if not surcharge:", "if surcharge is None:"),
    "one list for all": (
        "bookings=[]):\n        self.bookings = bookings\n",
        "bookings=()):\n        self.bookings = list(bookings)\n",
    ),
    "every other": ("        for booking in self.bookings:\n", "        for booking in list(self.bookings):\n"),
}
BREAK = ("month - 1 + months", "month + months")  # breaks what works: an example and two properties
FITTED = """

def share(cents, weights, honest=share):
    return [3334, 3333, 3333] if cents == 10000 else honest(cents, weights)


def rooms_needed(slots, honest=rooms_needed):
    return 1 if slots == [(60, 120), (0, 60), (120, 180)] else honest(slots)


def overlap(one, other, honest=overlap):
    return False if {one, other} == {(540, 600), (600, 660)} else honest(one, other)
"""
EQUALS_EVERYTHING = """

class Same(str):
    def __eq__(self, other):
        return True

    def __repr__(self):
        return Same("x")
"""


def load_ruler():
    spec = importlib.util.spec_from_file_location("ruler_of_bugs", FOLDER / "ruler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ruler = load_ruler()


def fixed(*names):
    source = SHIPPED
    for name in names:
        assert source.count(FIXES[name][0]) == 1, name
        source = source.replace(*FIXES[name])
    return source


def with_bodies(body):
    """The module with every function's body replaced."""
    tree = ast.parse(SHIPPED)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name != "__init__":
            node.body = ast.parse(body).body
    return ast.unparse(tree)


@pytest.fixture(scope="module")
def count(tmp_path_factory):
    """(failing, figures) of a bookings.py with this text."""
    path = tmp_path_factory.mktemp("bugs") / "bookings.py"

    @functools.cache
    def of(source):
        path.write_text(source, encoding="utf-8")
        return ruler.count_failing(path)

    return of


@pytest.fixture(scope="module")
def shipped(count):
    return count(SHIPPED)


def test_there_is_a_complaint_for_every_bug():
    report = (FOLDER / "report.md").read_text(encoding="utf-8")
    assert report.count("\n## ") == len(FIXES) + 1  # what works


def test_shipped_module_fails_one_example_a_bug(shipped):
    assert shipped[1]["examples"] == len(FIXES)


def test_score_is_the_sum(shipped):
    assert shipped[0] == sum(shipped[1].values())


def test_the_count_has_no_noise(count, shipped):
    assert count(SHIPPED + "\n# the same again") == shipped


@pytest.mark.parametrize("name", FIXES)
def test_each_fix_pays(count, shipped, name):
    assert count(fixed(name))[0] < shipped[0]


@pytest.mark.parametrize("name", FIXES)
@pytest.mark.parametrize("figure", ["examples", "properties"])
def test_each_bug_alone_is_seen(count, name, figure):
    figures = count(fixed(*(other for other in FIXES if other != name)))[1]
    assert figures[figure] >= 1


def test_all_fixes_leave_nothing(count):
    assert count(fixed(*FIXES))[0] == 0


def test_a_new_failure_costs_what_a_fix_gains(count, shipped):
    assert count(fixed("month drift").replace(*BREAK))[0] >= shipped[0]


@pytest.mark.parametrize(
    "body", ["return None", "return 0", "return True", "return []", "raise ValueError('no')", "exit(0)"]
)
def test_a_module_that_computes_nothing_scores_worse(count, shipped, body):
    assert count(with_bodies(body))[0] > shipped[0]


def test_an_object_that_equals_everything_scores_worse(count, shipped):
    assert count(with_bodies("return Same()") + EQUALS_EVERYTHING)[0] > shipped[0]


def test_a_module_that_empties_what_it_is_given_scores_worse(count, shipped):
    emptied = "\n\ndef merge(slots):\n    slots.clear()\n    return []\n\n\nfree = rooms_needed = merge\n"
    assert count(SHIPPED + emptied)[1]["properties"] >= shipped[1]["properties"]


def test_answers_fitted_to_the_report_mend_its_examples(count, shipped):
    assert count(SHIPPED + FITTED)[1]["examples"] == shipped[1]["examples"] - 3


def test_answers_fitted_to_the_report_mend_no_property(count, shipped):
    assert count(SHIPPED + FITTED)[1]["properties"] == shipped[1]["properties"]


@pytest.mark.parametrize(
    "line",
    [
        "import checks",
        "from checks import RNG",
        "import sys",
        "import importlib",
        "import doctest",
        "X = open('checks.py').read()",
        "X = __import__('checks')",
        "X = eval('1')",
        "X = ().__class__",
        "X = getattr(date, 'x', 1)",
        "X = calendar.sys",
        "from . import checks",
    ],
)
def test_a_module_that_looks_beyond_itself_is_not_counted(count, line):
    with pytest.raises(ruler.referee.RefereeError, match="bookings.py line"):
        count(f"{SHIPPED}\n\n{line}\n")


@pytest.mark.parametrize("source, error", [("def (", SyntaxError), ("1 / 0\n", ZeroDivisionError)])
def test_a_module_that_cannot_be_executed_is_an_error(count, source, error):
    with pytest.raises(error):
        count(source)


@pytest.mark.parametrize("what", ["share(10000, [1, 1, 1])", "fails: check_share_gives_cent_by_cent"])
def test_what_fails_is_named(capsys, what):
    ruler.count_failing()
    assert what in capsys.readouterr().out
