"""analysis.ipynb executed on every kind of log."""

import contextlib
import io
import random
import shutil
import warnings

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"


def row(n, bpb, status, text="an idea"):
    return f"{n:07x}\t{bpb}\t44.0\t{status}\t{text}\n"


def night(count, seed=0):
    rng, best, lines = random.Random(seed), 1.0, [row(1, "0.997900", "keep", "baseline")]
    for n in range(2, count + 1):
        draw = rng.random()
        if draw < 0.1:
            lines.append(row(n, "nan", "crash", "too wide"))
        elif draw < 0.3:
            best -= rng.random() * 0.003
            lines.append(row(n, f"{best:.6f}", "keep", f"idea {n} with a rather long description of what was done"))
        else:
            lines.append(row(n, f"{best + rng.random() * 0.05:.6f}", "discard"))
    return "".join(lines)


LOGS = {
    "no file": (None, ["no experiments"]),
    "header only": (HEADER, ["no experiments", "none"]),
    "one row": (HEADER + row(1, "0.997900", "keep", "baseline"), ["1 experiments", "baseline 0.997900", "gain     0.000000"]),
    "crash first": (HEADER + row(1, "0.000000", "crash") + row(2, "0.9", "keep", "baseline") + row(3, "0.8", "keep", "deeper"),
                    ["crash    1", "baseline 0.900000", "best     0.800000", "0.100000  (11.11%)"]),
    "all crashes": (HEADER + row(1, "nan", "crash") + row(2, "0.000000", "crash"), ["crash    2", "nothing was kept"]),
    "nothing kept": (HEADER + row(1, "1.1", "discard"), ["nothing was kept"]),
    "a worse keep": (HEADER + row(1, "1.0", "keep") + row(2, "0.9", "keep") + row(3, "0.95", "keep", "simpler"),
                     ["best     0.900000", "-0.050000"]),
    "a stray row": (HEADER + "oops\n" + row(1, "1.0", "keep"), ["line 2 of results.tsv has 1 of 5 fields", "1 experiments"]),
    "tabs in a description": (HEADER + row(1, "1.0", "keep", "a\tb"), ["1 experiments"]),
    "a long night": (HEADER + night(1000), ["1000 experiments", "keep rate"]),
}


def copied(text, folder):
    shutil.copy(ROOT / "analysis.ipynb", folder)
    if text is not None:
        (folder / "results.tsv").write_text(text)
    return nbformat.read(folder / "analysis.ipynb", 4)


def execute(text, folder, monkeypatch):
    """The cells in order, in this process: a kernel for each would cost 3 s."""
    notebook = copied(text, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MPLBACKEND", "agg")
    out, names = io.StringIO(), {"__name__": "__main__"}
    with contextlib.redirect_stdout(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for cell in notebook.cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, "cell", "exec"), names)
    names["plt"].close("all")
    return out.getvalue()


def test_notebook_runs_in_a_kernel(tmp_path):
    notebook = copied(HEADER + night(30), tmp_path)
    NotebookClient(notebook, timeout=100, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
    assert any("30 experiments" in o.get("text", "") for o in outputs) and any("image/png" in o.get("data", {}) for o in outputs)


@pytest.mark.parametrize("case", LOGS)
def test_notebook_copes(case, tmp_path, monkeypatch):
    text, expected = LOGS[case]
    out = execute(text, tmp_path, monkeypatch)
    for words in expected:
        assert words in out, out
    assert (tmp_path / "progress.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "progress.png").stat().st_size > 5000


def test_top_hits_are_ordered_by_their_own_gain(tmp_path, monkeypatch):
    out = execute(HEADER + row(1, "1.00", "keep", "baseline") + row(2, "0.99", "keep", "small") + row(3, "0.90", "keep", "large")
                  + row(4, "0.88", "keep", "middling"), tmp_path, monkeypatch)
    top = out[out.index("share"):]
    assert top.index("large") < top.index("middling") < top.index("small")
    assert "0.090000" in top and "0.020000" in top and "75.0%" in top


def test_notebook_is_stored_without_outputs():
    notebook = nbformat.read(ROOT / "analysis.ipynb", 4)
    nbformat.validate(notebook)
    assert all(not c.get("outputs") and c.get("execution_count") is None for c in notebook.cells)
