"""The door for any other metric: a ruler of a few lines becomes an experiment with everything that train.py has."""

import json
import shutil

import pytest
import stage
from stage import ROOT, git, next_step, records, rows

RULER = """
import math
import subprocess
import sys
import time
import referee


def measured():
    import program
    return float(program.score()), {"figure": 7}


if __name__ == "__main__":
    referee.measure(measured, metric="faults", edits=["program.py"], frozen=["data"], budget=20)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An experiment below the top of a repository: a ruler, a program to edit, frozen data."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    top = tmp_path / "project"
    folder = top / "faults"
    (folder / "data").mkdir(parents=True)
    shutil.copy(ROOT / ".gitignore", top)
    shutil.copy(ROOT / "referee.py", folder)
    (folder / "ruler.py").write_text(RULER)
    (folder / "program.py").write_text("def score():\n    return 9\n")
    (folder / "data/facts.txt").write_text("one\n")
    git(top, "init", "-q", "-b", "main")
    git(top, "add", "-A")
    git(top, "commit", "-qm", "start")
    return folder


def edit(folder, text, subject, name="program.py"):
    (folder / name).write_text(text)
    git(folder, "commit", "-qam", subject)


def run(folder):
    return stage.referee(folder, "run")[1]


def log(folder, *words):
    return stage.referee(folder, "log", *words)[1]


def test_a_ruler_prints_and_records_its_metric(folder):
    out = run(folder)
    assert "faults:           9.000000" in out
    assert "figure:           7" in out
    assert next_step(out) == "uv run referee.py log"
    (record,) = records(folder)
    assert (record["metric"], record["score"], record["figures"]) == ("faults", 9.0, {"figure": 7})
    assert record["lower_is_better"] is True
    assert git(folder, "status", "--porcelain") == ""


def baseline(folder):
    for _ in range(2):
        run(folder)
        out = log(folder)
    return out


def test_two_equal_baselines_say_that_there_is_no_noise(folder):
    assert next_step(baseline(folder)).startswith("the next idea: edit program.py")
    assert (folder / "results.tsv").read_text().startswith("commit\tfaults\tmemory_gb\tstatus\tdescription\n")


def test_any_gain_is_kept_at_once_and_any_loss_dropped(folder):
    baseline(folder)
    edit(folder, "def score():\n    return 8\n", "one fewer")
    assert "keep (gain +1.000000" in run(folder)
    log(folder)
    edit(folder, "def score():\n    return 8.5\n", "worse")
    assert "discard (gain -0.500000" in run(folder)
    assert "went back" in log(folder)
    assert [row[3] for row in rows(folder)] == ["keep", "keep", "keep", "discard"]
    assert (folder / "program.py").read_text() == "def score():\n    return 8\n"


def test_higher_may_be_better(folder):
    edit(folder, RULER.replace('edits=["program.py"]', 'edits=["program.py"], lower_is_better=False'), "up", "ruler.py")
    baseline(folder)
    edit(folder, "def score():\n    return 10\n", "more")
    assert "keep (gain +1.000000" in run(folder)


@pytest.mark.parametrize("name", ["data/facts.txt", "ruler.py"])
def test_an_edit_outside_the_editable_files_gets_no_verdict(folder, name):
    baseline(folder)
    path = folder / name
    path.write_text(path.read_text() + "\n# two\n")
    edit(folder, "def score():\n    return 1\n", "with a changed test")
    assert f"none ({name} was edited; an experiment edits program.py only" in run(folder)


def test_a_changed_test_is_another_table(folder):
    run(folder)
    edit(folder, "two\n", "another test", "data/facts.txt")
    run(folder)
    first, second = records(folder)
    assert first["harness"] != second["harness"]


@pytest.mark.parametrize(
    "body, kind, said",
    [
        ("raise KeyError('x')", "error", "KeyError"),
        ("time.sleep(60)", "timeout", "not done 1 s after the start"),
        ("return math.nan", "nan", "the score is nan"),
        ("return math.inf", "nan", "the score is inf"),
        ("return None", "error", "returned None, which is no number"),
        ("return True", "error", "no number"),
        ("return 'fast'", "error", "no number"),
        ("return 1.0, 3", "error", "figures are no dict"),
        ("raise referee.RefereeError('page 3 is wrong')", "harness", "page 3 is wrong"),
        ("subprocess.run([sys.executable, '-c', 'exit(1)'], check=True)", "error", "CalledProcessError"),
    ],
)
def test_a_ruler_that_gives_no_score_ends_in_the_matching_line(folder, body, kind, said):
    text = RULER.replace("    import program\n", f"    {body}\n").replace(
        "budget=20", f"budget={1 if kind == 'timeout' else 20}"
    )
    edit(folder, text, "broken", "ruler.py")
    out = run(folder)
    line = next(line for line in out.splitlines() if line.startswith("FAIL: "))
    assert line.startswith(f"FAIL: {kind}: ")
    assert said in line
    assert records(folder)[0]["fail"]["kind"] == kind


@pytest.mark.parametrize(
    "old, new, said",
    [
        ('"faults"', '"faults a page"', "the metric is called 'faults a page'"),
        ('["program.py"]', '["missing.py"]', "there is no missing.py"),
        ('["program.py"]', "[]", "with one at least"),
        ('["program.py"]', '["../program.py"]', "is no path inside"),
        ('["data"]', '["nothing"]', "there is no nothing"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(folder, old, new, said):
    edit(folder, RULER.replace(old, new), "wrong", "ruler.py")
    before = sorted(folder.rglob("*"))
    for out in (run(folder), stage.referee(folder, "status")[1]):
        assert said in out
        assert "Traceback" not in out
        assert len(out.strip().splitlines()) == 1
    assert sorted(folder.rglob("*")) == before


def test_outside_git_is_one_sentence(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    shutil.move(folder, tmp_path / "alone")
    out = run(tmp_path / "alone")
    assert "run: git init" in out
    assert len(out.strip().splitlines()) == 1
    assert not (tmp_path / "alone/runs").exists()


def test_the_folder_may_be_an_argument(folder):
    shutil.copy(ROOT / "referee.py", folder.parent)
    assert "faults: " in stage.referee(folder.parent, "run", "faults")[1]
    assert [json.loads(path.read_text())["score"] for path in (folder / "runs").iterdir()] == [9.0]
    assert "logged" in stage.referee(folder.parent, "log", "keep", "faults")[1]
