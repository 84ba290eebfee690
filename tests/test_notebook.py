"""analysis.ipynb executed on every kind of log."""

import contextlib
import io
import json
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
    "one row": (
        HEADER + row(1, "0.997900", "keep", "baseline"),
        ["1 experiments", "baseline 0.997900", "gain     0.000000"],
    ),
    "crash first": (
        HEADER + row(1, "0.000000", "crash") + row(2, "0.9", "keep", "baseline") + row(3, "0.8", "keep", "deeper"),
        ["crash    1", "baseline 0.900000", "best     0.800000", "0.100000  (11.11%)"],
    ),
    "all crashes": (HEADER + row(1, "nan", "crash") + row(2, "0.000000", "crash"), ["crash    2", "nothing was kept"]),
    "nothing kept": (HEADER + row(1, "1.1", "discard"), ["nothing was kept"]),
    "a worse keep": (
        HEADER + row(1, "1.0", "keep") + row(2, "0.9", "keep") + row(3, "0.95", "keep", "simpler"),
        ["best     0.900000", "-0.050000"],
    ),
    "a stray row": (
        HEADER + "oops\n" + row(1, "1.0", "keep"),
        ["line 2 of results.tsv has 1 of 5 fields", "1 experiments"],
    ),
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
    assert any("30 experiments" in o.get("text", "") for o in outputs) and any(
        "image/png" in o.get("data", {}) for o in outputs
    )


@pytest.mark.parametrize("case", LOGS)
def test_notebook_copes(case, tmp_path, monkeypatch):
    text, expected = LOGS[case]
    out = execute(text, tmp_path, monkeypatch)
    for words in expected:
        assert words in out, out
    assert (tmp_path / "progress.png").read_bytes()[:4] == b"\x89PNG" and (
        tmp_path / "progress.png"
    ).stat().st_size > 5000


def test_top_hits_are_ordered_by_their_own_gain(tmp_path, monkeypatch):
    out = execute(
        HEADER
        + row(1, "1.00", "keep", "baseline")
        + row(2, "0.99", "keep", "small")
        + row(3, "0.90", "keep", "large")
        + row(4, "0.88", "keep", "middling"),
        tmp_path,
        monkeypatch,
    )
    top = out[out.index("share") :]
    assert top.index("large") < top.index("middling") < top.index("small")
    assert "0.090000" in top and "0.020000" in top and "75.0%" in top


def record(n, seed, bpb, **more):
    return json.dumps(
        {
            "commit": f"{n:07x}",
            "seed": seed,
            "val_bpb": bpb,
            "seconds": 300.0,
            "tokens": 6_000_000,
            "audit_bpb": None,
            **more,
        }
    )


def test_reruns_are_a_mean_and_the_noise_is_theirs(tmp_path, monkeypatch):
    """Baseline 1.000, 1.002, 1.001: sd 0.001, df 2. A single run is beyond noise above 2.92 * 0.001 * sqrt(4 / 3) = 0.003372."""
    text = (
        HEADER
        + row(1, "1.000", "keep", "baseline")
        + row(1, "1.002", "keep", "baseline")
        + row(1, "1.001", "keep", "baseline")
        + row(2, "0.998", "keep", "luck")
        + row(3, "0.9900", "keep", "real")
        + row(4, "0.9890", "discard")
    )
    out = execute(text, tmp_path, monkeypatch)
    for words in (
        "4 experiments, 6 runs",
        "noise    0.001000  (sd of a run; measured, 2 degrees",
        "2 kept after the baseline, 1 beyond noise",
        "baseline 1.001000",
        "best     0.990000",
        "0.003372   False",
    ):
        assert words in out, (words, out)


def test_the_last_row_of_a_commit_is_its_status(tmp_path, monkeypatch):
    text = (
        HEADER
        + row(1, "1.0", "keep")
        + row(2, "0.9", "discard", "late")
        + row(2, "0.8", "discard")
        + row(2, "0.85", "keep")
    )
    out = execute(text, tmp_path, monkeypatch)
    assert "best     0.850000  (0000002: late)" in out and "keep     2" in out


def test_a_repeated_seed_counts_once(tmp_path, monkeypatch):
    records = [record(1, 42, 1.0), record(1, 42, 1.5), record(1, 43, 1.002), '{"commit": "tor']
    (tmp_path / "runs.jsonl").write_text("\n".join(records))
    out = execute(
        HEADER + row(1, "1.000000", "keep") + row(1, "1.5", "keep") + row(1, "1.002", "keep"), tmp_path, monkeypatch
    )
    assert "baseline 1.001000" in out and "20,000" in out and "no run with AUDIT=1" in out


def test_audit_stands_against_val(tmp_path, monkeypatch):
    records = [
        record(1, 101, 1.00, audit_bpb=1.10),
        record(1, 102, 1.02, audit_bpb=1.12),
        record(2, 101, 0.90, audit_bpb=1.05),
    ]
    (tmp_path / "runs.jsonl").write_text("\n".join(records) + "\n")
    out = execute(HEADER + row(1, "1.0", "keep") + row(2, "0.9", "keep"), tmp_path, monkeypatch)
    assert "gain on val 0.110000, on audit 0.060000" in out


def test_a_public_log_is_read_as_it_is(tmp_path, monkeypatch):
    """Its crashes are 0.000000, no commit is rerun: the noise is assumed, and keeps smaller than it are counted apart."""
    text = (
        HEADER
        + row(1, "0.997900", "keep", "baseline")
        + row(2, "0.000000", "crash", "double width")
        + "".join(
            row(n, f"{0.9979 - gain:.6f}", "keep", f"change {n}")
            for n, gain in enumerate((0.004, 0.0045, 0.009, 0.0092, 0.0121), 3)
        )
    )
    out = execute(text, tmp_path, monkeypatch)
    assert "assumed" in out and "5 kept after the baseline, 3 beyond noise" in out and "best     0.985800" in out
    assert "crash    1" in out


def test_notebook_is_stored_without_outputs():
    notebook = nbformat.read(ROOT / "analysis.ipynb", 4)
    nbformat.validate(notebook)
    assert all(not c.get("outputs") and c.get("execution_count") is None for c in notebook.cells)
