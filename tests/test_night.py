"""program.md executed literally by tests/night.py, with a stand-in train.py that finishes at once.

    uv run pytest tests/test_night.py -m slow -s     # 100 ideas, killed at random moments; prints what came of it
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import night
import pytest
from conftest import ROOT


def version(scores=None, does="score", broken=""):
    return f"import stand_in\n{broken}\nif __name__ == '__main__':\n    stand_in.run({scores}, {does!r})\n"


def seeds(*scores):
    return {42 + n: score for n, score in enumerate(scores)}


@pytest.fixture
def scratch(project, tmp_path, monkeypatch):
    """A git repository with program.md's world around it: `uv` runs the stand-in, `sleep` is short."""
    tools, cache = tmp_path / "bin", tmp_path / "cache"
    tools.mkdir(), cache.mkdir()
    for name, text in (("uv", f'#!/bin/sh\nshift\ntest "$1" = prepare.py && exit 0\nexec {sys.executable} -B "$@"\n'),
                       ("sleep", f"#!/bin/sh\nexec {shutil.which('sleep')} 0.03\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    for name, value in {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "tests"), "TIME_BUDGET": "1",
                        "TMPDIR": str(cache)}.items():
        monkeypatch.setenv(name, value)
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    (project / "train.py").write_text(version(seeds(1.0, 1.0014, 1.0007)))
    git(project, "add", "-A")
    git(project, "commit", "-q", "--amend", "-m", "start")
    git(project, "branch", "-q", "origin-of-the-night")
    return project


def git(folder, *words):
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def rows_of(folder):
    return [line.split("\t") for line in (folder / "results.tsv").read_text().splitlines()[1:]]


def check_the_morning(folder, plan):
    """Every run has its row, the branch holds exactly the kept commits, dropped ones are reachable, nothing else changed."""
    rows = [row for row in rows_of(folder) if len(row) == 5]
    status = {row[0]: row[3] for row in rows}
    described = {row[4] for row in rows}
    assert {idea["name"] for idea in plan} <= described
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines() if line.endswith("}")]
    assert {(r["commit"], f"{r['val_bpb']:.6f}") for r in runs} == {(row[0], row[1]) for row in rows if row[1] != "nan"}
    assert len({(row[0], row[1]) for row in rows}) == len(rows), "a run has two rows"
    assert all((row[1] == "nan") == (row[3] == "crash") for row in rows)
    branch = git(folder, "log", "--format=%h", "--abbrev=7", "origin-of-the-night~0..HEAD").split()
    kept = [commit for commit in dict.fromkeys(row[0] for row in rows) if status[commit] == "keep"]
    assert [*branch, git(folder, "rev-parse", "--short=7", "origin-of-the-night")] == kept[::-1]
    refs = set(git(folder, "for-each-ref", "--format=%(refname:lstrip=2)", "refs/autoresearch").split())
    assert refs == {commit for commit in status if status[commit] != "keep"}
    for ref in refs:
        assert git(folder, "rev-parse", "--short=7", f"refs/autoresearch/{ref}") == ref
    assert git(folder, "status", "--porcelain") == ""
    assert git(folder, "diff", "--name-only", "origin-of-the-night", "HEAD") in ("train.py", "")
    assert git(folder, "branch", "--show-current") == "autoresearch/nov21"
    return rows, status


# noise: sd 0.0007, df 2; a first run is clear above 0.00236; best 1.0007
DOZEN = [
    {"name": "clearly better", "versions": [version(seeds(0.99))]},  # keep
    {"name": "worse", "versions": [version(seeds(1.2))]},
    {"name": "borderline and real", "versions": [version(seeds(0.9885, 0.9882, 0.9872))]},  # rerun, rerun, keep
    {"name": "borderline and luck", "versions": [version(seeds(0.9870, 0.9890))]},  # rerun, discard
    {"name": "typo", "versions": [version(broken="def ("), version(seeds(0.97))]},  # an error of Python, mended, keep
    {"name": "too wide", "versions": [version(does="oom"), version(does="oom") + "# halved\n"]},
    {"name": "rate too high", "versions": [version(does="nan")]},
    {"name": "hangs", "versions": [version(does="hang")]},
    {"name": "looks ahead", "versions": [version(does="harness")]},
    {"name": "raises", "versions": [version(does="error"), version(seeds(0.98))]},  # mended, discard
    {"name": "the same again", "versions": [version(seeds(1.2))]},  # the file of "worse"
    {"name": "best", "versions": [version(seeds(0.95))]},  # keep
]
OUTCOME = {"clearly better": ["keep"], "worse": ["discard"], "borderline and real": ["discard", "discard", "keep"],
           "borderline and luck": ["discard", "discard"], "typo": ["keep"], "too wide": ["crash"], "rate too high": ["crash"],
           "hangs": ["crash"], "looks ahead": ["crash"], "raises": ["discard"], "the same again": ["discard"], "best": ["keep"]}


def check_the_dozen(folder):
    rows, _ = check_the_morning(folder, DOZEN)
    by_name = {name: [row[3] for row in rows if row[4] == name] for name in OUTCOME}
    assert by_name == OUTCOME
    assert [row[1] for row in rows if row[4] == "baseline"] == ["1.000000", "1.001400", "1.000700"]


def test_commands_are_all_found():
    assert night.START.startswith("nohup uv run train.py > run.log") and night.BACK.count("&&") == 3 and len(night.AFTER) >= 4
    assert night.codes("1. `a`\n   ```\n   b &&\n     c\n   ```\n") == ["b &&\n  c\n", "a"]


def test_a_night_of_a_dozen(scratch):
    agent = night.Agent(scratch, DOZEN)
    agent.work()
    check_the_dozen(scratch)
    assert 2 <= agent.shown <= 20
    assert all(idea["name"] in (scratch / "ideas.md").read_text() for idea in DOZEN)
    log = (scratch / "run.log").read_text()
    assert "a lot of noise" in log and "verdict:          keep" in log


def test_the_same_night_interrupted_again_and_again(scratch):
    """The agent forgets everything after every few commands, and goes on from the files alone; a stray row is in the log."""
    rng, interruptions = random.Random(0), 0
    while True:
        try:
            night.Agent(scratch, DOZEN, patience=rng.randint(5, 25)).work()
            break
        except night.Interrupted:
            interruptions += 1
            if interruptions == 9:
                with open(scratch / "results.tsv", "a") as log:
                    log.write("this is no row\n")
    check_the_dozen(scratch)
    assert interruptions >= 9 and ["this is no row"] in rows_of(scratch)


def test_the_stray_row_is_shown_to_the_agent(scratch):
    agent = night.Agent(scratch, [])
    agent.work()
    with open(scratch / "results.tsv", "a") as log:
        log.write("this is no row\n")
    (scratch / "train.py").write_text(DOZEN[0]["versions"][0])
    agent.commit("an idea")
    agent.run()
    assert "results.tsv: line 5 is skipped" in agent.shell(night.READ)


@pytest.mark.parametrize("moment", ["git restore", "git reset", "git update-ref"])
def test_going_back_may_be_killed_anywhere_and_repeated(scratch, moment):
    """Step 7 cut off before one of its commands, then run twice more: the same end as if it had run once."""
    agent = night.Agent(scratch, [])
    agent.work()
    start = agent.head()
    (scratch / "train.py").write_text(DOZEN[1]["versions"][0])
    agent.commit("worse")
    dropped = agent.head()
    agent.shell(night.BACK)
    assert agent.head() == dropped  # it has no row yet
    agent.record("1.2", "discard", "%s")
    agent.shell(night.BACK[:night.BACK.index(moment)].rstrip("&| \n"))
    assert agent.head() == dropped
    (scratch / "notes.txt").write_text("untracked")
    for _ in range(2):
        agent.shell(night.BACK)
        assert agent.head() == start and agent.shell("git status --porcelain").split() == ["??", "notes.txt"]
    assert git(scratch, "rev-parse", "--short=7", f"refs/autoresearch/{dropped}") == dropped and len(rows_of(scratch)) == 4


def hundred(rng):
    plan, best = [], 1.0007
    for n in range(100):
        kind = rng.choices(["worse", "better", "close", "crash", "mended"], [40, 12, 25, 12, 11])[0]
        noise = lambda: rng.gauss(0, 0.0007)
        true = best + {"worse": rng.uniform(0.002, 0.05), "better": -0.006, "mended": 0.01}.get(kind, rng.uniform(-0.001, 0))
        good = version(seeds(*(round(true + noise(), 6) for _ in range(3)))) + f"# {n}\n"
        bad = rng.choice([version(does="oom"), version(does="nan"), version(does="error"), version(broken="def (")]) + f"# {n}\n"
        plan.append({"name": f"idea {n:03d}", "versions": {"crash": [bad], "mended": [bad, good]}.get(kind, [good])})
        best -= 0.006 * (kind == "better")
    return plan


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_hundred_ideas_killed_at_random_moments(scratch, tmp_path):
    """kill -9 to the agent, its shell and often the run as well, every second or so; then a new agent reads the files."""
    plan, rng, kills, with_the_run, most = hundred(random.Random(4)), random.Random(5), 0, 0, 0
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    began = time.monotonic()
    while True:
        with open(tmp_path / "agent.log", "w") as out:
            agent = subprocess.Popen([sys.executable, ROOT / "tests/night.py", scratch, tmp_path / "plan.json"], stdout=out,
                                     stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = agent.wait(timeout=rng.uniform(0.2, 2.5) if rng.random() < 0.8 else 9)  # 9: a run that stands still is seen
            assert status == 0, (tmp_path / "agent.log").read_text()
            most = max(most, int((tmp_path / "agent.log").read_text().split()[0]))
            break
        except subprocess.TimeoutExpired:
            kills += 1
            if rng.random() < 0.6:
                with_the_run += 1
                os.killpg(agent.pid, signal.SIGKILL)
            else:
                agent.kill()
            agent.wait()
    rows, status = check_the_morning(scratch, plan)
    words = [*status.values()]
    print(f"\n{len(plan)} ideas, {len(rows)} rows, {kills} kills ({with_the_run} of them with the run), {time.monotonic() - began:.0f} s: "
          + ", ".join(f"{words.count(word)} {word}" for word in ("keep", "discard", "crash")) + f"; at most {most} lines shown at once")
    assert kills >= 30 and words.count("keep") >= 5


def test_tools_exist():
    """What program.md's commands use besides git and uv is on every machine."""
    for tool in ("grep", "tail", "cut", "printf", "sleep", "nohup", "find", "rm"):
        assert shutil.which(tool), tool
    assert Path("/dev/null").exists()
