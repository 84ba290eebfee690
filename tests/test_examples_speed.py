"""examples/speed: what the stopwatch accepts, what it refuses, and that a cheat gains nothing."""

import json
import os
import random
import subprocess
import sys

import pytest
from conftest import ROOT

FOLDER = ROOT / "examples/speed"
sys.path.append(str(FOLDER))

import stopwatch  # noqa: E402

SHIPPED = (FOLDER / "templates.py").read_text(encoding="utf-8")
RENDER = "        return render_all(parse(source), Scope(data, self.partials))\n"


@pytest.fixture
def engine(tmp_path):
    """Writes a templates.py with some text replaced; gives its path."""

    def changed(old, new):
        assert SHIPPED.count(old) == 1, old
        path = tmp_path / "templates.py"
        path.write_text(SHIPPED.replace(old, new), encoding="utf-8")
        return path

    return changed


def ratio(path, rounds=4):
    return stopwatch.measure(path, rounds=rounds, templates=5)[0]


def test_shipped_engine_is_measured():
    score, figures = stopwatch.measure(rounds=2, templates=20)
    assert 1 < score < 100
    assert 5 < figures["peak_kb"] < 1000
    assert set(figures) == {"peak_kb", *stopwatch.read_pages(FOLDER / "pages")}


def test_pages_together_use_the_whole_language():
    sources = stopwatch.read_pages(FOLDER / "pages") | stopwatch.read_pages(FOLDER / "pages/partials")
    everything = "\n".join(sources.values())
    for word in (
        "assign",
        "if",
        "elsif",
        "else",
        "unless",
        "for",
        "include",
        "comment",
        "forloop.index",
        "limit:",
        "(1..",
    ):
        assert word in everything, word


def test_tests_of_the_example_pass():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_templates.py"]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_reference_is_the_shipped_engine():
    reference = (FOLDER / "reference.py").read_text(encoding="utf-8")
    assert reference.splitlines()[1:] == SHIPPED.splitlines()[1:]


def test_an_honest_gain_is_seen(engine):
    path = engine("class Engine:\n", "from functools import cache\n\nparse = cache(parse)\n\n\nclass Engine:\n")
    assert ratio(path) < 0.95 * ratio(FOLDER / "templates.py")


def test_a_slower_engine_is_seen(engine):
    path = engine(RENDER, RENDER.replace("return ", "") + RENDER)
    assert ratio(path) > 1.5 * ratio(FOLDER / "templates.py")


def test_remembered_outputs_gain_nothing(engine):
    """By page and data, kept in another module: no input comes twice."""
    cheat = (
        "        import re\n        known = re.__dict__.setdefault('known', {})\n        key = source + repr(data)\n"
    )
    cheat += (
        "        if key not in known:\n            known[key] = render_all(parse(source), Scope(data, self.partials))\n"
    )
    assert ratio(engine(RENDER, cheat + "        return known[key]\n")) > 0.95 * ratio(FOLDER / "templates.py")


LAZY = """        class Later(str):
            def __eq__(self, other):
                return True
        return Later()
"""
GOLDEN = """        import pathlib
        golden = [path.read_text() for path in pathlib.Path("GOLDEN").iterdir()]
        text = render_all(parse(source), Scope(data, self.partials))
        return next((known for known in golden if known[:40] == text[:40]), '')
""".replace("GOLDEN", str(FOLDER / "golden"))
CHEATS = {
    "an output remembered by its page": (RENDER, "        import re\n        known = re.__dict__.setdefault('pages', {})\n"
        "        if source not in known:\n            known[source] = render_all(parse(source), Scope(data, self.partials))\n"
        "        return known[source]\n"),
    "a text that works later": (RENDER, LAZY),
    "nothing at all": (RENDER, "        return ''\n"),
    "the golden file": (RENDER, GOLDEN),
    "no escape": ("html.escape(to_text(value))", "to_text(value)"),
    "no else after unless": ("        if markup is None:\n", "        if markup is None and self.negated:\n                return ''\n            if markup is None:\n"),
    "and and or from left to right": ("    for position, word in enumerate(words):\n",
                                      "    for position, word in reversed(list(enumerate(words))):\n"),
    "data changed": ("        self.frames = [data, {}]\n", "        self.frames = [data, data]\n"),
    "another error": ('raise TemplateError(f"unknown tag {word!r}")', 'raise ValueError(f"unknown tag {word!r}")'),
    "no error": ('    raise TemplateError(f"unknown tag {word!r}")', '    return Text("")'),
    "the reference": ("import html\n", "import html\nimport reference\n"),
    "the stopwatch": ("import html\n", "import html\nfrom stopwatch import time_page\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHEATS)
def test_cheat_is_refused(engine, name):
    path = engine(*CHEATS[name])
    with pytest.raises((stopwatch.WrongOutput, ValueError)):
        stopwatch.measure(path, rounds=1, templates=100)


def test_a_thread_beside_the_loop_is_refused(engine):
    thread = "import html\nimport threading\nimport time\n\nthreading.Thread(target=time.sleep, args=(5,), daemon=True).start()\n"
    with pytest.raises(stopwatch.WrongOutput, match="thread"):
        stopwatch.measure(engine("import html\n", thread), rounds=1, templates=1)


def test_no_input_comes_twice():
    rng = random.Random(1)
    data = json.loads((FOLDER / "pages/data.json").read_text(encoding="utf-8"))
    source = stopwatch.read_pages(FOLDER / "pages")["shop"]
    assert len({stopwatch.salted(source, rng) for _ in range(20)}) == 20
    assert len({json.dumps(stopwatch.varied(data, rng)) for _ in range(20)}) == 20


def test_inputs_keep_their_size():
    rng = random.Random(1)
    data = json.loads((FOLDER / "pages/data.json").read_text(encoding="utf-8"))
    sizes = [len(json.dumps(stopwatch.varied(data, rng))) for _ in range(20)]
    assert max(sizes) < 1.02 * min(sizes)


def test_a_round_leaves_no_module_behind():
    one, other = (stopwatch.load(FOLDER / "templates.py") for _ in range(2))
    assert one is not other
    assert "templates" not in sys.modules


def test_random_templates_show_something():
    rng = random.Random(1)
    reference = stopwatch.load(FOLDER / "reference.py")
    data = {"items": [{"name": "one"}, {"name": "two"}], "words": ["a"], "n": 2, "text": "t"}
    partials = {"card": "c", "sets": "s"}
    sources = [stopwatch.random_template(rng, 3) for _ in range(300)]
    texts = {reference.Engine(partials).render(source, data) for source in sources}
    assert len(texts) > 200
    for word in ("elsif", "unless", "comment", "include", "assign", "truncate", " and ", " or ", "limit"):
        assert any(word in source for source in sources), word


@pytest.mark.slow
def test_load_moves_the_ratio_little():
    quiet = ratio(FOLDER / "templates.py", 15)
    code = "x = list(range(200000))\nwhile True:\n    sum(x)"
    busy = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        loaded = ratio(FOLDER / "templates.py", 15)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    print(f"ratio {quiet:.3f} alone, {loaded:.3f} beside {len(busy)} busy processes")
    assert abs(loaded / quiet - 1) < 0.05
