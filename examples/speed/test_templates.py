"""uv run pytest -q test_templates.py: the pages and cases that the ruler checks too, one test each."""

import json

import pytest
import stopwatch

ENGINE = stopwatch.load(stopwatch.HERE / "templates.py")
PARTIALS = {"loop": "{% include 'loop' %}", "name": "<{{ name }}>"}
CASES = json.loads((stopwatch.HERE / "cases.json").read_text(encoding="utf-8"))
GOLDEN = stopwatch.read_pages(stopwatch.HERE / "golden")


@pytest.mark.parametrize("name", GOLDEN)
def test_page(name):
    data = json.loads((stopwatch.HERE / "pages/data.json").read_text(encoding="utf-8"))
    source = stopwatch.read_pages(stopwatch.HERE / "pages")[name]
    partials = stopwatch.read_pages(stopwatch.HERE / "pages/partials")
    assert ENGINE.Engine(partials).render(source, data) == GOLDEN[name]


@pytest.mark.parametrize("source, data, want", [case[1:] for case in CASES if case[3] is not None], ids=str)
def test_case(source, data, want):
    assert ENGINE.Engine(PARTIALS).render(source, data) == want


@pytest.mark.parametrize("source, data", [case[1:3] for case in CASES if case[3] is None], ids=str)
def test_wrong_template(source, data):
    with pytest.raises(ENGINE.TemplateError):
        ENGINE.Engine(PARTIALS).render(source, data)
