"""analysis.ipynb on every kind of log, as a page, and in a browser. `python tests/test_notebook.py FOLDER` draws a night."""

import itertools
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import IPython.display
import nbformat
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from matplotlib.text import Text

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from referee.book import Row, append_rows  # noqa: E402
from referee.records import Record, write_record  # noqa: E402
from referee.verdict import CONTROL_EVERY, judge  # noqa: E402

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
NOTES = "# To try\n\n- a plan\n\n# Kept\n\n- a win\n\n# Tried, and why it failed\n\n- SwiGLU: <slower> & $no$ better\n"
KNOBS = "Muon lr|embedding lr|head lr|weight decay|short window|batch|depth|width|soft cap|RoPE base|x0 scale|warm-down"
CHANGES = ["halved", "doubled", "x 0.7", "x 1.4", "off", "per layer", "late", "ramped"]


def row(n, score, status, text="an idea"):
    return f"{n:07x}\t{score}\t44.0\t{status}\t{text}\n"


def record(n, seed, score, minute=0, **more):
    """A Record of commit n, of a run that counts unless more says otherwise."""
    commit = f"{n:07x}"
    figures = {"seconds": 300.0, "total_seconds": 330.0, "dataset": "climbmix"}
    facts = {"time": f"2026-11-27T{minute // 60:02}:{minute % 60:02}:00Z", "host": "h", "pid": 1000 * n + seed}
    facts |= {"birth": None, "folder": "/night", "commit": commit.ljust(40, "0"), "parent": None, "subject": "an idea"}
    facts |= {"seed": seed, "metric": "val_bpb", "lower_is_better": True, "code": commit, "limit": 600, "score": score}
    facts |= {"fail": None, "harness": "cafe", "device": "H100", "figures": figures}
    return Record(**facts | more)


def simulated_night(folder, spread=0.0007, luck=8):
    """Plays a night of ideas with drawn effects by the referee's verdicts, and its morning; writes log, records, notes."""
    rng = random.Random(luck)
    records = []
    kept, level = record(0, 42, None).commit, 0.9979

    def run(n, seed, truth, text):
        """Runs commit n, which is as good as truth, and logs it; returns the status."""
        base = kept if n else None
        fail = (
            {"kind": "oom", "sentence": "out of memory; lower the micro-batch"} if rng.random() < 0.06 and n else None
        )
        score = None if fail else round(rng.gauss(truth, spread), 6)
        lines = [rng.randint(1, 30), rng.randint(0, 20)]
        new = record(n, seed, score, 6 * len(records), subject=text, base=base, lines=lines, fail=fail)
        verdict = judge(new, records, base, new.commit == kept)
        status = {"failed": "crash", "discard": "discard"}.get(verdict.code, "keep")
        records.append(new)
        write_record(folder / "runs", new)
        append_rows(folder / "results.tsv", [Row(new.commit[:7], new.score_text, "44.0", status, text)], "val_bpb")
        return status

    for seed in (42, 43, 44):
        run(0, seed, level, "baseline")
    ideas = [f"{knob} {change}" for knob in KNOBS.split("|") for change in CHANGES]
    rng.shuffle(ideas)
    for n, text in enumerate(ideas, 1):
        effect = -rng.expovariate(700) if rng.random() < 0.25 else rng.expovariate(200)
        if run(n, 42, level + effect, text) == "keep":
            kept, level = record(n, 42, None).commit, level + effect
        if n % CONTROL_EVERY == 0:
            run(int(kept[:7], 16), 50 + n, level, "control")
    for commit, truth in (("0" * 40, 0.9979), (kept, level)):
        for seed in (101, 102):
            val, audit = (round(rng.gauss(truth + offset, spread), 6) for offset in (0, 0.02))
            fresh = record(int(commit[:7], 16), seed, val, 6 * len(records), audit=audit)
            records.append(fresh)
            write_record(folder / "runs", fresh)
    (folder / "ideas.md").write_text(NOTES)


@dataclass
class Page:
    """What the notebook makes of a folder. drawn: the texts of the picture; names: those of the cells."""

    html: str
    text: str
    drawn: list
    names: dict


def report(folder, monkeypatch):
    """The Page of a folder, made in this process: a kernel for each would cost 3 s."""
    shown = []
    names = {"__name__": "__main__"}
    monkeypatch.setenv("FOLDER", str(folder))
    monkeypatch.setattr(IPython.display, "display", shown.append)
    for cell in nbformat.read(ROOT / "analysis.ipynb", 4).cells:
        exec(compile(cell.source, "analysis.ipynb", "exec"), names)
    html = "".join(each.data for each in shown)
    text = unescape(re.sub("<style>.*?</style>|<[^>]+>", " ", html, flags=re.DOTALL))
    drawn = [each.get_text() for each in names["figure"].findobj(Text)]
    return Page(html, " ".join(text.split()), drawn, names)


@pytest.fixture
def page_of(tmp_path, monkeypatch):
    """page_of(log, *records): the Page of a folder with that results.tsv and runs/."""

    def run(log, *records):
        if log is not None:
            (tmp_path / "results.tsv").write_bytes(log.encode())
        for each in records:
            write_record(tmp_path / "runs", each)
        page = report(tmp_path, monkeypatch)
        assert (tmp_path / "progress.png").read_bytes().startswith(b"\x89PNG")
        return page

    return run


KEPT = HEADER + row(1, "1.0", "keep", "baseline") + row(2, "0.9", "keep", "deeper")
FOUND = "val_bpb 1 → 0.9, better by 10.00 %: not confirmed"
NOTHING = "Nothing better than the baseline was found"
BASELINE = "".join(row(1, score, "keep", "baseline") for score in (1.000, 1.002, 1.001))
LONG = [row(n, 1 - n / 1e4 + n % 3 / 100, "discard" if n % 3 else "keep", f"idea {n}") for n in range(1000)]
MORE = "commit\tval_bpb\tmemory_gb\tmfu\tstatus\tdescription\n"
MORE += "0000001\t1.0\t5\t58\tkeep\tone\n0000002\t0.9\t5\t5\tkeep\ttwo\n"
TURNED = "timestamp\tstatus\tdescription\ttokens\tcommit\tval_bpb\n7:00\tkeep\tfirst\t5\t0000001\t1.0\n"
LOGS = {
    "no file": (None, "No experiments yet|experiments: 0"),
    "header only": (HEADER, "No experiments yet|Crashed: 0."),
    "one row": (HEADER + row(1, "0.9979", "keep"), f"{NOTHING}|val_bpb of the baseline: 0.9979 (runs: 1 of 0000001)"),
    "crash first": (KEPT.replace("\n", "\n" + row(9, "0.000000", "crash"), 1), f"{FOUND}|crashed: 1"),
    "all crashes": (HEADER + row(1, "nan", "crash") + row(2, "0.0", "crash"), "Nothing was kept|Crashed: 2."),
    "nothing kept": (HEADER + row(1, "1.1", "discard"), "Nothing was kept|Dropped: 1"),
    "nothing found": (HEADER + BASELINE + row(2, 1.003, "discard"), f"{NOTHING}|runs: 3 of 0000001|sd of a run: 0.001"),
    "a worse keep": (KEPT + row(3, "1.1", "keep"), "val_bpb 1 → 1.1, worse by 10.00 %: not confirmed"),
    "noise unknown": (KEPT, f"{FOUND}|noise unknown|deeper (0000002) +0.1 ?"),
    "damaged lines": (KEPT + "oops\n" + row(3, "x", "keep"), f"{FOUND}|line 4, 5 cannot be read"),
    "infinite": (KEPT + row(3, "1e999", "keep") + row(4, "inf", "keep"), f"{FOUND}|line 5 cannot be read"),
    "CR line ends": (KEPT.replace("\n", "\r\n") + row(3, 2, "discard").replace("\n", "\r"), f"{FOUND}|experiments: 3"),
    "byte-order mark": ("\ufeff" + KEPT.replace("val_bpb", "loss"), "loss 1 → 0.9"),
    "no header": (KEPT.removeprefix(HEADER), FOUND),
    "more columns": (MORE, f"{FOUND}|two (0000002)"),
    "columns in another order": (TURNED + "7:05\tkeep\tnext\t6\t0000002\t0.9\n", f"{FOUND}|next (0000002)"),
    "a dropped zero": (KEPT + row(3, "0.000000", "discard"), f"{FOUND}|Dropped: 0"),
    "higher is better": (KEPT.replace("val_bpb", "score").replace("0.9", "1.5"), "score 1 → 1.5, better by 50.00 %"),
    "a long night": (HEADER + "".join(LONG), "experiments: 1000, kept: 333|and 233 more"),
    "not ASCII": (KEPT + row(3, "0.8", "keep", "注意 🚀"), "注意 🚀"),
}


@pytest.mark.parametrize("case", LOGS)
def test_every_kind_of_log_is_reported(case, page_of):
    log, expected = LOGS[case]
    page = page_of(log)
    for words in expected.split("|"):
        assert words in page.text
    assert page.drawn.count(page.names["headline"]) == 1


def test_text_of_agents_is_shown_as_it_is(page_of, tmp_path):
    text = "a<b>|c & $x^$ \\frac {d}"
    (tmp_path / "ideas.md").write_text(NOTES)
    page = page_of(HEADER + row(1, "1.0", "keep") + row(2, "0.9", "keep", text))
    assert f"{text} (0000002)" in page.text
    assert text in page.drawn
    assert "<b>" not in page.html
    assert "SwiGLU: <slower> & $no$ better" in page.text
    assert "a plan" not in page.text
    assert page.html.count("tex2jax_ignore") == page.html.count('class="night')


FIRST = [record(1, 42, 1.000), record(1, 43, 1.002), record(1, 44, 1.001)]
SECOND = record(2, 42, 0.990, lines=[12, 3], subject="deeper")
ROWS = BASELINE + row(2, 0.99, "keep", "deeper")


def test_a_keep_shows_its_gain_in_sd_and_lines(page_of):
    """sd 0.001 of three runs; the gain counts from the baseline's mean, the level of a chosen run is half an sd worse."""
    page = page_of(HEADER + ROWS, *FIRST, SECOND)
    assert "val_bpb 1.001 → 0.9905, better by 1.05 %: not confirmed" in page.text
    assert "deeper (0000002) +0.011 +11.0 +12 −3" in page.text
    assert "AUDIT=1 uv run referee run --seed 101" in page.text
    assert "kept, gain above 1 sd: 1" in page.drawn


def test_a_small_gain_is_an_open_dot(page_of):
    page = page_of(HEADER + BASELINE + row(2, 1.0005, "keep"), *FIRST, record(2, 42, 1.0005))
    assert "+0.0005 +0.5" in page.text
    assert "kept, gain below: 1" in page.drawn


@pytest.mark.parametrize(
    "case, val, audit, runs, word",
    [
        ("both gain", 0.99, 1.09, 2, "confirmed"),
        ("audit does not", 0.99, 1.1, 2, "not confirmed"),
        ("val does not", 1.001, 1.09, 2, "not confirmed"),
        ("one seed each", 0.99, 1.09, 1, "not confirmed"),
    ],
)
def test_the_claim_is_the_mornings(case, val, audit, runs, word, page_of):
    """Two fresh seeds of each: a gain is beyond 2 standard errors from 0.002 on."""
    fresh = [record(1, 101 + n, 1.003, audit=1.102) for n in range(runs)]
    fresh += [record(2, 101 + n, val, audit=audit) for n in range(runs)]
    page = page_of(HEADER + ROWS, *FIRST, SECOND, *fresh)
    assert f"val_bpb 1.003 → {val:g}, better by" in page.text
    assert page.names["headline"].endswith(f" sd): {word}")
    assert f"audit 1.102 → {audit:g}" in page.text
    assert "experiments: 4, kept: 1, crashed: 0" in page.text
    assert f"fresh seeds: {runs} of the baseline, {runs} of 0000002" in page.text


def test_a_run_that_does_not_count_says_why(page_of):
    """Neither is a doubt, nor a slowed run, nor one of another device, part of the claim."""
    runs = [record(2, 43, 0.5, why_not=["a doubt"]), record(2, 44, 0.4, others=0.5), record(2, 45, 7.0, device="cpu")]
    log = HEADER + ROWS + row(2, 0.5, "keep") + row(7, 0.3, "keep")
    page = page_of(log, *FIRST, SECOND, *runs)
    assert "1.001 → 0.9905" in page.text
    assert "Scores that do not count: 3." in page.text
    assert "0000002, seed 43 a doubt 0.500000" in page.text
    assert "slowed: other processes used 50 %" in page.text
    assert "another device: cpu" in page.text
    assert "1 rows have no run in runs/" in page.text


def test_a_night_is_timed_without_its_pauses(page_of):
    """Ten runs, six minutes apart, the last of 330 s; a pause of three hours in their middle."""
    minutes = [6 * n + 180 * (n > 4) for n in range(10)]
    page = page_of(HEADER + row(1, 1.0, "keep"), *(record(1, 42 + n, 1.0, minute) for n, minute in enumerate(minutes)))
    assert "1.0 h, runs: 10, 10.2 an hour" in page.text


def test_what_failed_and_why(page_of, tmp_path):
    fail = {"kind": "oom", "sentence": "out of memory"}
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "damaged.json").write_text("{")
    failed = record(3, 42, None, fail=fail, subject="huge")
    lost = record(3, 41, None, fail={"kind": "lost", "sentence": "the run was killed"})
    page = page_of(HEADER + ROWS + row(3, "nan", "crash"), *FIRST, SECOND, lost, failed)
    assert "huge: out of memory" in page.text
    assert "Failed runs: 1 lost, 1 oom." in page.text
    assert "experiments: 5, kept: 1, crashed: 1" in page.text
    assert "1 files are damaged" in page.text


def test_wins_that_a_sum_brought_on_are_one_change(page_of):
    """Commits 2 and 3 gained on the baseline and are kept as commit 4, which gains both."""
    parts = [record(n, 42, 0.99, n, base=FIRST[0].commit) for n in (2, 3)]
    whole = record(4, 42, 0.98, 4, base=FIRST[0].commit, picked=[part.commit for part in parts], subject="both")
    rows = row(2, 0.99, "keep") + row(3, 0.99, "keep") + row(4, 0.98, "keep")
    page = page_of(HEADER + BASELINE + rows, *FIRST, *parts, whole)
    assert "Kept: 1, 1 by more than 1 sd. # change gain in sd lines 6 both (0000004) +0.021 +21.0" in page.text


def test_a_metric_of_which_more_is_better(page_of):
    facts = {"metric": "points", "lower_is_better": False}
    runs = [record(1, 42, 50, **facts), record(1, 43, 50, **facts), record(2, 42, 60, **facts)]
    page = page_of(HEADER.replace("val_bpb", "points") + row(1, 50, "keep") + row(2, 60, "keep"), *runs)
    assert "points 50 → 60, better by 20.00 %: not confirmed" in page.text
    assert "points (higher is better)" in page.drawn
    assert "kept, gain above 1 sd: 1" in page.drawn


def test_labels_of_a_night_do_not_overlap(tmp_path, monkeypatch):
    simulated_night(tmp_path)
    figure = report(tmp_path, monkeypatch).names["draw"]()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) > 5
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


# -- the page itself


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """The path of the page of a simulated night, as its user makes it."""
    folder = tmp_path_factory.mktemp("night")
    simulated_night(folder)
    command = ["-m", "jupyter", "nbconvert", "--to", "html", "--execute", "--no-input", "--output-dir", str(folder)]
    environment = {**os.environ, "FOLDER": str(folder)}
    subprocess.run([sys.executable, *command, "analysis.ipynb"], cwd=ROOT, env=environment, check=True)
    return folder / "analysis.html"


def browse(path, *options):
    """Output of a headless Chromium that opens a page, without a network."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --hide-scrollbars --window-size=400,1000"
    own = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={path.parent / 'chromium'}"]
    command = ["chromium", *flags.split(), *own, *options, path.as_uri()]
    environment = {**os.environ, "TMPDIR": "/tmp"}  # where its socket's name stays short
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_is_one_file_without_code(html):
    text = html.read_text()
    assert "sd): confirmed" in text
    assert "import base64" not in text
    assert "Traceback" not in text
    assert 'src="data:image/png;base64,' in text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium (apt-get install chromium)")
def test_a_browser_shows_claim_and_picture(html):
    """On a screen of a phone's width: the claim stands in the page, and the picture's green is on the screen."""
    dom = browse(html, "--dump-dom")
    assert re.search("val_bpb 0.9.* → 0.9.*, better by .* %.*: confirmed", dom)
    screenshot = html.with_name("phone.png")
    browse(html, f"--screenshot={screenshot}")
    pixels = imread(screenshot)[..., :3]
    green = abs(pixels - to_rgb("#1a7f37")).max(axis=2) < 0.05
    assert green.sum() > 200
    assert green.any(axis=0).nonzero()[0].max() < 390


def test_the_notebook_is_stored_without_outputs():
    notebook = nbformat.read(ROOT / "analysis.ipynb", 4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)


if __name__ == "__main__":
    where = Path(sys.argv[1]).resolve()
    where.mkdir(exist_ok=True)
    simulated_night(where)
    with pytest.MonkeyPatch.context() as patch:
        print(report(where, patch).text)
