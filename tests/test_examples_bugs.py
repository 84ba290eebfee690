"""examples/bugs: every bug is seen, every fix pays, and a module that only looks right does not."""

import ast
import re
import sys

import pytest
from conftest import ROOT

FOLDER = ROOT / "examples/bugs"
sys.path.append(str(FOLDER))

import counting  # noqa: E402

SHIPPED = (FOLDER / "bookings.py").read_text(encoding="utf-8")
# what was planted: (as shipped, as it should be)
FIXES = {
    "touching": (
        "    return one[0] <= other[1] and other[0] <= one[1]\n",
        "    return one[0] < other[1] and other[0] < one[1]\n",
    ),
    "inner slot": (
        "            merged[-1] = (merged[-1][0], end)\n",
        "            merged[-1] = (merged[-1][0], max(merged[-1][1], end))\n",
    ),
    "ties": (
        "sorted(changes, key=lambda change: change[0]):",
        "sorted(changes):",
    ),
    "month drift": (
        "    dates = [first]\n"
        "    while len(dates) < count:\n"
        "        dates.append(add_months(dates[-1], 1))\n"
        "    return dates[:count]\n",
        "    return [add_months(first, number) for number in range(count)]\n",
    ),
    "lost cents": (
        "    total = sum(weights)\n    return [round(cents * weight / total) for weight in weights]\n",
        "    total = sum(weights)\n"
        "    parts = [cents * weight // total for weight in weights]\n"
        "    order = sorted(range(len(weights)), key=lambda index: (-(cents * weights[index] % total), index))\n"
        "    for index in order[: cents - sum(parts)]:\n"
        "        parts[index] += 1\n"
        "    return parts\n",
    ),
    "zero percent": (
        "    if not surcharge:\n        surcharge = SURCHARGE\n",
        "    if surcharge is None:\n        surcharge = SURCHARGE\n",
    ),
    "one list for all": (
        "    def __init__(self, bookings=[]):\n        self.bookings = bookings\n",
        "    def __init__(self, bookings=()):\n        self.bookings = list(bookings)\n",
    ),
    "every other": (
        "        before = len(self.bookings)\n"
        "        for booking in self.bookings:\n"
        "            if booking[2] == person:\n"
        "                self.bookings.remove(booking)\n"
        "        return before - len(self.bookings)\n",
        "        kept = [booking for booking in self.bookings if booking[2] != person]\n"
        "        cancelled = len(self.bookings) - len(kept)\n"
        "        self.bookings = kept\n"
        "        return cancelled\n",
    ),
}


@pytest.fixture
def count(tmp_path):
    """(failing, figures) of a bookings.py with this text."""

    def of(source):
        path = tmp_path / "bookings.py"
        path.write_text(source, encoding="utf-8")
        return counting.count(path)

    return of


def fixed(*names):
    source = SHIPPED
    for name in names:
        bad, good = FIXES[name]
        assert source.count(bad) == 1, name
        source = source.replace(bad, good)
    return source


def test_there_are_eight_bugs_and_eight_complaints():
    report = (FOLDER / "report.md").read_text(encoding="utf-8")
    assert len(FIXES) == 8
    assert len(re.findall(r"^\d\. ", report, re.M)) == 8


def test_shipped_module_fails_one_test_a_bug(count):
    failing, figures = count(SHIPPED)
    assert figures["failing_tests"] == 8
    assert figures["failing_checks"] >= 8
    assert failing == sum(figures.values())


@pytest.mark.parametrize("name", FIXES)
def test_each_fix_pays(count, name):
    before, _ = count(SHIPPED)
    after, figures = count(fixed(name))
    assert after < before
    assert figures["failing_tests"] == 7


@pytest.mark.parametrize("name", FIXES)
def test_each_bug_alone_is_seen_by_a_test_and_a_check(count, name):
    _, figures = count(fixed(*(other for other in FIXES if other != name)))
    assert figures["failing_tests"] >= 1
    assert figures["failing_checks"] >= 1


def test_all_fixes_give_nothing_to_complain_about(count):
    assert count(fixed(*FIXES)) == (0, {"failing_tests": 0, "failing_checks": 0})


def test_the_count_has_no_noise(count):
    assert {count(SHIPPED)[0] for _ in range(3)} == {count(SHIPPED)[0]}


def test_a_new_failure_costs_what_a_fix_gains(count):
    """The months are mended (a test and a check), the months' sum over the year is broken (a test and two checks)."""
    broken = fixed("month drift").replace(
        "number = date.year * 12 + date.month - 1 + months", "number = date.year * 12 + months"
    )
    assert count(broken)[0] >= count(SHIPPED)[0]


@pytest.mark.parametrize(
    "body", ["return None", "return 0", "return True", "return []", "raise ValueError('no')", "raise SystemExit(0)"]
)
def test_a_module_that_computes_nothing_scores_worse(count, body):
    tree = ast.parse(SHIPPED)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name != "__init__":
            node.body = ast.parse(body).body
    assert count(ast.unparse(tree))[0] > count(SHIPPED)[0]


def test_an_object_that_equals_everything_scores_worse(count):
    tree = ast.parse(SHIPPED)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name != "__init__":
            node.body = ast.parse("return Same()").body
    source = (
        ast.unparse(tree)
        + "\n\nclass Same(str):\n    def __eq__(self, other):\n        return True\n    __hash__ = str.__hash__\n"
    )
    with pytest.raises(counting.NotCounted):
        count(source.replace("__hash__ = str.__hash__", "also = str.__hash__"))
    assert count(source.replace("    __hash__ = str.__hash__\n", ""))[0] > count(SHIPPED)[0]


def test_answers_fitted_to_the_tests_mend_no_check(count):
    fitted = (
        SHIPPED
        + """

def share(cents, weights, honest=share):
    return [3334, 3333, 3333] if cents == 10000 else honest(cents, weights)


def rooms_needed(slots, honest=rooms_needed):
    return 1 if slots == [(60, 120), (0, 60), (120, 180)] else honest(slots)


def overlap(one, other, honest=overlap):
    return False if {one, other} == {(540, 600), (600, 660)} else honest(one, other)
"""
    )
    _, before = count(SHIPPED)
    _, after = count(fitted)
    assert after["failing_tests"] == before["failing_tests"] - 3
    assert after["failing_checks"] == before["failing_checks"]


@pytest.mark.parametrize(
    "line",
    [
        "import checks",
        "from test_bookings import same",
        "import sys",
        "import importlib",
        "X = open('checks.py').read()",
        "X = __import__('checks')",
        "X = eval('1')",
        "X = ().__class__",
        "X = getattr(re, 'x', 1)",
    ],
)
def test_a_module_that_looks_beyond_itself_is_not_counted(count, line):
    with pytest.raises(counting.NotCounted, match="bookings.py line"):
        count(SHIPPED + "\n\n" + line + "\n")


def test_a_module_that_cannot_be_read_is_an_error(count):
    with pytest.raises(SyntaxError):
        count("def (")
    with pytest.raises(ZeroDivisionError):
        count(SHIPPED + "\n1 / 0\n")


def test_what_fails_is_named(count, capsys):
    count(SHIPPED)
    out = capsys.readouterr().out
    assert "fails: test_bookings.py test_a_bill_of_three\n" in out
    assert "fails: checks.py check_share_gives_cent_by_cent\n" in out
