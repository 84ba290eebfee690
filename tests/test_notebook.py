"""analysis.ipynb executed on every kind of log. `python tests/test_notebook.py FOLDER` draws a simulated night."""

import contextlib
import io
import random
import shutil
import sys
import warnings
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from nbclient import NotebookClient

import referee

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
IDEAS = """baseline|halve the batch|depth 9, width 576|warm-down 0.7|embedding lr 0.8|head lr 0.006|no weight decay|
Muon momentum 0.97|window T/4|GELU instead of ReLU squared|SwiGLU, same parameters|soft cap 12|soft cap 30|
RoPE base 50,000|RoPE base 2,000|value embeddings in every layer|no value embeddings|gate on 64 channels|
x0 scale 0.2|drop x0|depth 12, width 384|heads of 64|pattern SSL|pattern SSSSL|all layers long|Muon lr 0.05|
Muon lr 0.03|three Polar Express steps|beta2 0.9 in NorMuon|Adam beta1 0.9|Adam beta2 0.99|initialise head at 0.01|
tie embeddings|a bigram table|a trigram table|hash bigrams to 64 k|linear decay to 10 %|cosine decay|
warm-up of 20 steps|batch ramp from 2^18|batch 2^18 with lr 0.7|sequence ramp 512 to 2048|MLP of 3.5 widths|
MLP of 5 widths|parallel attention and MLP|norm after attention|no final norm|learned norm weights|QK norm off|
QK gain 1.2|attention sink token|two value heads a layer|grouped queries, 2 for 1|multi-token prediction, 2 heads|
logit bias from unigrams|z-loss 1e-4|label smoothing 0.02|dropout 0.05|EMA of weights, last 20 %|
average of last 5 checkpoints|decay tables too|cautious decay off|decay 0.1|decay 0.3|residual scale lr 0.01|
skip from layer 2 to 6|U-net skips|layer drop 0.1|smear tokens by 1|convolution of 3 before attention|
gate the attention output|sparse gate per head|per-head temperature|first layer dense only|double width, half depth|
reuse layer 4 twice|fp8 head|compile with max-autotune|fused cross-entropy|micro-batch 64|larger evaluation batch|
sort by length|drop documents under 64 tokens|two epochs of 5 shards|Lion for tables|Adam for gates at 0.02|
Shampoo for head|clip at 1.0|Nesterov off|momentum ramp of 600 steps|lr scaled by depth|mu-P for the head|
head in fp32|orthogonal initialisation|value gate starts at 1|window ramp|window T/8 early|x0 in odd layers|
stochastic rounding|asymmetric rescale of logits|bigram table with gate|soft cap 15 on attention"""


def row(n, score, status, text="an idea"):
    return f"{n:07x}\t{score}\t44.0\t{status}\t{text}\n"


def record(n, seed, score, **more):
    """A record of runs/, of a run that counts unless more says otherwise."""
    name = f"{n:07x}"
    facts = {"time": "2026", "commit": name.ljust(40, "0"), "seed": seed, "score": score, "fail": None, "code": name}
    facts |= {"metric": "val_bpb", "lower_is_better": True, "harness": "cafe", "device": "H100", "dataset": "climbmix"}
    return facts | {"why_not": [], "ticks": 900, "seconds": 300.0, "tokens": 6_000_000, "host": "h", "pid": n} | more


def simulated_night(folder):
    """Plays IDEAS, of drawn effects, by the referee's verdicts with a noise sd of 0.0007, and writes the log."""
    rng, runs = random.Random(5), []
    best, memory = 0.9979, 44.0
    for n, idea in enumerate(IDEAS.replace("\n", "").split("|")):
        effect = rng.expovariate(200) if rng.random() < 0.75 else -rng.expovariate(450)
        score = best + effect if n else best
        used = memory + rng.choice([0, 0, 0, 1.5, -1.2])
        status, seed = "crash" if n and rng.random() < 0.07 else "rerun", 42
        while status in ("rerun", "none"):
            more = {"time": f"{len(runs):06}", "dataset": "simulated", "device": None}
            more["tokens"] = int(4.99e8 * rng.gauss(1 - (used - 44) / 150, 0.004))
            runs.append(record(n, seed, round(rng.gauss(score, 0.0007), 6), **more))
            referee.write_record(folder / "runs", runs[-1])
            seed += 1
            status = referee.verdict_on(runs[-1], runs, referee.read_results(folder / "results.tsv")).word
            status = "rerun" if n == 0 and seed < 45 else status.replace("baseline", "keep")
        new = referee.Row(f"{n:07x}", "nan" if status == "crash" else f"{score}", f"{used:.1f}", status, idea)
        referee.append_row(folder / "results.tsv", new, "val_bpb")
        if status == "keep":
            best, memory = score, used


def prepared(text, folder, records=()):
    """The notebook, in a folder with a log and with records."""
    for name in ("analysis.ipynb", "referee.py"):
        shutil.copy(ROOT / name, folder)
    if text is not None:
        (folder / "results.tsv").write_text(text)
    for n, facts in enumerate(records):
        referee.write_record(folder / "runs", facts | {"pid": n})
    return nbformat.read(folder / "analysis.ipynb", 4)


def execute(notebook, folder, monkeypatch):
    """(what the cells print and the picture says, their names), in this process: a kernel for each would cost 3 s."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()) as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for cell in notebook.cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, "cell", "exec"), names)
    figure, plt = names["figure"], names["plt"]
    plt.close("all")
    words = [each.get_text() for each in figure.findobj(plt.Text)]
    return "\n".join([out.getvalue(), *words, f"{len(figure.axes)} panels"]), names


@pytest.fixture
def check(tmp_path, monkeypatch):
    """check(log, records, expected): the notebook draws its picture and says all phrases of expected, split at |."""

    def run(text, expected, *records):
        out, _ = execute(prepared(text, tmp_path, records), tmp_path, monkeypatch)
        assert (tmp_path / "progress.png").stat().st_size > 5000
        for words in expected.split("|"):
            assert words in out, out
        return out

    return run


KEPT = HEADER + row(1, "1.0", "keep", "baseline") + row(2, "0.9", "keep", "deeper")
LONG = [row(n, 1 - n / 1e4 + n % 3 / 100, "discard" if n % 3 else "keep") for n in range(1000)]
LOGS = {
    "no file": (None, "no experiments|nothing measured"),
    "header only": (HEADER, "no experiments|none"),
    "one row": (HEADER + row(1, "0.9979", "keep"), "1 experiments|baseline 0.997900|gain     0.000000"),
    "crash first": (KEPT.replace("\n", "\n" + row(9, "0.000000", "crash"), 1), "crashed (1)|1.0000 to 0.9000, -10.0 %"),
    "all crashes": (HEADER + row(1, "nan", "crash") + row(2, "0.0", "crash"), "crashed (2)|nothing was kept"),
    "nothing kept": (HEADER + row(1, "1.1", "discard"), "nothing was kept|discarded (1)"),
    "a worse keep": (KEPT + row(3, "0.95", "keep"), "best     0.900000|-0.050000"),
    "a stray row": (KEPT + "oops\n", "line 4 cannot be read|2 experiments"),
    "inf": (KEPT + row(3, "inf", "keep") + row(4, "1e999", "keep"), "line 4 cannot|best     0.900000"),
    "$": (KEPT + row(3, "0.8", "keep", "$x^ and $\\frac"), "$x^ and $\\frac"),
    "byte-order mark": ("\ufeff" + KEPT.replace("val_bpb", "loss"), "2 experiments|loss 1.0000 to 0.9000"),
    "a long night": (HEADER + "".join(LONG), "1000 experiments|keep rate: 334 of 1000"),
    "last row decides": (KEPT + row(2, "0.8", "discard") + row(2, "0.85", "keep"), "best     0.850000|keep     2"),
    "constant memory": (KEPT, "1 panels"),
    "memory that varies": (KEPT.replace("44.0", "40.0", 1), "memory, GB|2 panels"),
}


@pytest.mark.parametrize("case", LOGS)
def test_notebook_copes(case, check):
    check(*LOGS[case])


def test_notebook_runs_in_a_kernel(tmp_path):
    notebook = prepared(KEPT, tmp_path)
    NotebookClient(notebook, timeout=100, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = str([cell.get("outputs") for cell in notebook.cells])
    assert "2 experiments" in outputs
    assert "image/png" in outputs


def test_top_hits_are_ordered_by_their_own_gain(check):
    out = check(KEPT + row(3, "0.7", "keep", "large") + row(4, "0.55", "keep", "middling"), "44.4 %")
    top = out[out.index("share") :]
    assert top.index("large") < top.index("middling") < top.index("deeper")


def test_reruns_are_a_mean_and_the_noise_is_theirs(check):
    """Baseline 1.000, 1.002, 1.001: sd 0.001, df 2. Beyond noise: above 2.92 * 0.001 * sqrt(4 / 3) = 0.003372."""
    scores = [(1, 1.000), (1, 1.002), (1, 1.001), (2, 0.998), (3, 0.9900)]
    expected = "4 experiments, 6 rows|noise    0.001000  (sd of a run; measured, 2 degrees|1 beyond noise"
    expected += "|baseline 1.001000|0.003372   False|not beyond noise (1)"
    check(HEADER + "".join(row(*each, "keep") for each in scores) + row(4, "0.9890", "discard"), expected)


def test_a_public_log_is_read_as_it_is(check):
    """No commit is rerun there: the noise is assumed, and keeps smaller than it are counted apart."""
    gains = (0, 0.004, 0.0045, 0.009, 0.0092, 0.0121)
    rows = [row(n, 0.9979 - gain, "keep") for n, gain in enumerate(gains)]
    check(HEADER + "".join(rows), "assumed|5 kept after the baseline, 3 beyond noise|best     0.985800")


def test_records_name_the_table_and_what_does_not_count(check):
    """Of two tables the one with more runs is drawn; a slowed run and one with a doubt are listed."""
    runs = [record(1, 42, 1.0), record(1, 43, 1.002), record(2, 42, 0.9), record(2, 43, 0.5, ticks=400)]
    runs += [record(2, 44, 0.4, why_not=["a doubt"]), record(1, 45, 7.0, device="cpu")]
    expected = "climbmix, H100: val_bpb 1.0010 to 0.9000, -10.1 %|3 runs do not count|another table: cpu|a doubt"
    check(KEPT, expected + "|slowed: 400 steps where seed 42 of the same file made 900|20,000", *runs)


def test_audit_stands_against_val(check):
    runs = [record(1, 42, 1.0, audit=1.10), record(1, 43, 1.02, audit=1.12), record(2, 42, 0.9, audit=1.05)]
    check(KEPT, "gain on val 0.110000, on audit 0.060000", *runs)


def test_a_metric_of_which_more_is_better(check):
    facts = {"metric": "points", "lower_is_better": False, "dataset": None}
    runs = [record(1, 42, 50, **facts), record(1, 43, 50, **facts), record(2, 42, 60, **facts)]
    check(KEPT, "H100: points 50.00 to 60.00, +20.0 %|points (higher is better)|baseline, 1 beyond noise", *runs)


def test_labels_of_a_dense_night_lie_a_line_apart(tmp_path, monkeypatch):
    simulated_night(tmp_path)
    _, names = execute(prepared(None, tmp_path), tmp_path, monkeypatch)
    axes, angle = names["figure"].axes[0], np.radians(names["SLANT"])
    points = [axes.transData.transform(text.xy) * 72 / axes.figure.dpi + text.xyann for text in axes.texts]
    assert len(points) == len(names["kept"]) > 10
    assert np.diff(np.sort(points @ np.array([-np.sin(angle), np.cos(angle)]))).min() > 10


def test_notebook_is_stored_without_outputs():
    notebook = nbformat.read(ROOT / "analysis.ipynb", 4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)


if __name__ == "__main__":
    where = Path(sys.argv[1]).resolve()
    simulated_night(where)
    with pytest.MonkeyPatch.context() as patch:
        print(execute(prepared(None, where), where, patch)[0])
