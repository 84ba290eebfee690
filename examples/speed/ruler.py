"""The ruler of examples/speed: the time in which templates.py renders pages, by that of a fixed loop. Frozen.

    uv run ../../referee run     measures HEAD, in about 20 seconds

A round executes templates.py anew, draws a page that nobody has seen (pages.py) and renders it for some visitors. Before
and after it a fixed loop draws the same pages every time: matching, looking up and joining strings, work of the same kind,
so that what slows the machine slows both. The score is the median over the rounds of the page's time by the loop's. Both
are CPU seconds of this process: waiting for a core is not counted. Measured on one core, 24 scores of 100 rounds, alone
and beside a process that sums, churns through strings or streams through memory: sd 0.6 % of the mean, the four means
within 0.4 %. With a second engine as the loop, in turn with these: 0.8 %.
"""

import ast
import gc
import json
import os
import statistics
import sys
from pathlib import Path
from random import SystemRandom
from time import process_time

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import pages  # noqa: E402  (found by the line above)

import referee  # noqa: E402

VISITORS = 4  # for whom a page is rendered in a round, as a server renders a page again and again
MODULES = set("bisect collections dataclasses enum functools html itertools math operator re string typing".split())


def require(right, sentence):
    if not right:
        raise referee.RefereeError(f"{sentence}; mend templates.py")


def require_plain(source):
    """An engine needs neither pages.py nor this file, no clock, no file, no thread."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            known = ", ".join(sorted(MODULES))
            require(MODULES.issuperset(names), f"line {node.lineno} imports {names}; an engine may import {known}")


def require_same(got, want, what):
    """A text that is no plain str could do its work later, when nobody looks at the clock."""
    if type(got) is type(want) and got == want:
        return
    same = os.path.commonprefix([str(got), str(want)])
    there = f"{str(got)[len(same) :][:30]!r} and not {str(want)[len(same) :][:30]!r} after {same[-30:]!r}"
    require(False, f"wrong output: {what} gives {there}")


def execute(code):
    """What templates.py defines, without a trace of an earlier round."""
    names = {"__name__": "templates"}
    exec(code, names)
    return names


def check_cases(code):
    """cases.json: [what, source, data, text or null for a TemplateError]."""
    names = execute(code)
    for what, source, data, want in json.loads((HERE / "cases.json").read_text(encoding="utf-8")):
        try:
            got = names["Engine"]({"name": "<{{ name }}>"}).render(source, data)
        except names["TemplateError"]:
            got = None
        require_same(got, want, f"{what}, {source!r},")


def loop():
    """CPU seconds of the fixed loop."""
    start = process_time()
    for seed in range(8):
        pages.draw_page(seed, VISITORS)
    return process_time() - start


def time_round(code):
    """The time of a page by that of the loop."""
    engine = execute(code)["Engine"]
    seed = SystemRandom().getrandbits(64)
    page = pages.draw_page(seed, VISITORS)
    gc.collect()
    before = loop()
    start = process_time()
    render = engine(page.partials).render
    texts = [render(page.source, data) for data in page.visitors]
    seconds = process_time() - start
    after = loop()
    for got, want in zip(texts, page.texts(), strict=True):
        require_same(got, want, "a page")
    require(page == pages.draw_page(seed, VISITORS), "wrong output: the page's data are not what they were")
    return 2 * seconds / (before + after)


def render_time(path=HERE / "templates.py", rounds=400):
    """The score; RefereeError where anything came out differently, in whatever round."""
    source = path.read_text(encoding="utf-8")
    require_plain(source)
    code = compile(source, path.name, "exec")
    check_cases(code)
    gc.freeze()
    gc.disable()  # as timeit does: a collection falls on whoever happens to allocate next
    ratios = [time_round(code) for _ in range(rounds)]
    gc.enable()
    return statistics.median(ratios)


if __name__ == "__main__":
    referee.measure(
        render_time,
        metric="ratio",
        lower_is_better=True,
        edits=["templates.py"],
        frozen=["pages.py", "cases.json"],
        budget=120,
    )
