"""examples/speed: what the ruler accepts, what it refuses, and that a cheat gains nothing."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples/speed"
SHIPPED = (FOLDER / "templates.py").read_text(encoding="utf-8")
RENDER = "        return render(TAG.split(source), self)\n"
LOOP = '    result = ""\n    position = 0\n'
CALLED = "render(TAG.split(source), self)"
PARTS = "[WORD.findall(part) for part in PART.findall(markup)]"  # what is scanned again and again
REMEMBERED = "\n\nfrom functools import cache  # noqa: E402\n\n\n@cache\ndef parts(markup):\n    return [WORD.findall(part) for part in PART.findall(markup)]\n"


def load_ruler():
    spec = importlib.util.spec_from_file_location("ruler_of_speed", FOLDER / "ruler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ruler = load_ruler()
draw_page = ruler.pages.draw_page


@pytest.fixture
def engine(tmp_path):
    """Writes a templates.py with some text replaced; gives its path."""

    def changed(old, new):
        assert SHIPPED.count(old) == 1, old
        path = tmp_path / "templates.py"
        path.write_text(SHIPPED.replace(old, new), encoding="utf-8")
        return path

    return changed


def ratio(path=FOLDER / "templates.py"):
    """The least of three short measurements: a busy machine moves one of them by a tenth."""
    return min(ruler.render_time(path, rounds=6) for _ in range(3))


@pytest.fixture(scope="module")
def shipped():
    return ratio()


def skeletons(page):
    """The tags of a page without names and numbers."""
    return re.findall(r"\{[{%] *\w+|\| *\w+|[<>=!]+", re.sub(r"\b[a-z]{6}\b|\d", "", page.source))


# == the measure


def test_shipped_engine_is_measured(shipped):
    assert 0.5 < shipped < 20


def test_an_honest_gain_is_seen(engine, shipped):
    path = engine(PARTS, "parts(markup)")
    path.write_text(path.read_text(encoding="utf-8") + REMEMBERED)
    assert ratio(path) < 0.93 * shipped


def test_a_slower_engine_is_seen(engine, shipped):
    assert ratio(engine(LOOP, LOOP + "    sum(range(2000))\n")) > 1.5 * shipped


@pytest.mark.slow
def test_load_moves_the_ratio_little():
    quiet = ruler.render_time(rounds=60)
    code = "x = list(range(200000))\nwhile True:\n    sum(x)"
    busy = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        loaded = ruler.render_time(rounds=60)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    print(f"ratio {quiet:.3f} alone, {loaded:.3f} beside {len(busy)} busy processes")
    assert abs(loaded / quiet - 1) < 0.05


# == pages that nobody has seen


def test_no_page_comes_twice():
    assert len({draw_page(seed, 1).source for seed in range(20)}) == 20


def test_no_structure_comes_twice():
    """An engine that knows a page by its tags has nothing to look up."""
    assert len({str(skeletons(draw_page(seed, 1))) for seed in range(20)}) == 20


def test_no_visitor_comes_twice():
    page = draw_page(0, 20)
    assert len({json.dumps(data) for data in page.visitors}) == 20


@pytest.mark.parametrize(
    "size", [lambda page: len(page.source), lambda page: len(page.texts()[0])], ids=["page", "text"]
)
def test_pages_keep_their_size(size):
    sizes = [size(draw_page(seed, 1)) for seed in range(20)]
    assert max(sizes) < 1.2 * min(sizes)


def test_pages_and_cases_use_the_whole_language():
    words = ruler.execute(SHIPPED)
    used = draw_page(0, 1).source + (FOLDER / "cases.json").read_text(encoding="utf-8")
    known = [*words["FILTERS"], *words["OPERATORS"], *words["TAGS"], "elsif", "else"]
    assert [word for word in known if f" {word}" not in used] == []


# == cheats and mistakes

KNOWN = "        import re\n        known = re.__dict__.setdefault('known', {})\n"
LAZY = """        class Later(str):
            def __eq__(self, other):
                return True
        return Later()
"""
CHEATS = {
    "an output remembered by its page": (
        RENDER,
        f"{KNOWN}        if source not in known:\n            known[source] = {CALLED}\n        return known[source]\n",
    ),
    "a text that works later": (RENDER, LAZY),
    "nothing at all": (RENDER, "        return ''\n"),
    "no escape": ("html.escape(to_text(value))", "to_text(value)"),
    "escape twice": ("html.escape(to_text(value))", "html.escape(html.escape(to_text(value)))"),
    "no else after if": ('word == "else" or ', 'word != "else" and '),
    "and and or from left to right": ("in enumerate(words):", "in reversed(list(enumerate(words))):"),
    "one operator for another": ('"<=": operator.le', '"<=": operator.lt'),
    "a filter left out": ('    "truncate": truncate,\n', '    "truncate": lambda value, *_: to_text(value),\n'),
    "a loop that is not closed": (
        "        engine.frames.pop()\n    return result\n\n\ndef render_assign",
        "    return result\n\n\ndef render_assign",
    ),
    "data changed": ("self.frames = [data, {}]", "self.frames = [data, data]"),
    "another error": ('raise TemplateError(f"unknown tag {word!r}")', 'raise ValueError(f"unknown tag {word!r}")'),
    "no error": ('            raise TemplateError(f"unknown tag {word!r}")', "            continue"),
    "the answers": ("import html\n", "import html\nimport pages\n"),
    "the ruler": ("import html\n", "import html\nfrom ruler import loop\n"),
    "a file": ("import html\n", "import html\nimport pathlib\n"),
    "a clock": ("import html\n", "import html\nfrom time import process_time\n"),
    "a thread beside the loop": ("import html\n", "import html\nimport threading\n"),
    "another import": ("import html\n", "import html\nfrom . import pages\n"),
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheat_is_refused(engine, name):
    path = engine(*CHEATS[name])
    with pytest.raises(Exception):
        ruler.render_time(path, rounds=12)


def test_outputs_remembered_by_page_and_data_gain_nothing(engine, shipped):
    """Kept in another module, which is not loaded anew: no input comes twice."""
    cheat = (
        f"{KNOWN}        key = source + repr(data)\n        if key not in known:\n            known[key] = {CALLED}\n"
    )
    assert ratio(engine(RENDER, f"{cheat}        return known[key]\n")) > 0.85 * shipped


def test_a_purge_of_compiled_patterns_gains_nothing(engine, shipped):
    """It would slow a loop that has its patterns compiled by name."""
    assert ratio(engine(RENDER, f"        re.purge()\n{RENDER}")) > 0.85 * shipped


def test_nothing_is_carried_from_round_to_round():
    assert ruler.execute(SHIPPED)["Engine"] is not ruler.execute(SHIPPED)["Engine"]


def test_what_is_wrong_is_named(engine):
    path = engine('"upcase": lambda value: to_text(value).upper()', '"upcase": lambda value: to_text(value)')
    with pytest.raises(ruler.referee.RefereeError, match="no spaces"):
        ruler.render_time(path, rounds=1)
