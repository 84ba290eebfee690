"""program.md executed literally by tests/night.py, with a stand-in prepare.py whose runs end at once.

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

import night
import pytest
import stage
from stage import ROOT, commit, git, next_step, records, referee, rows, seeds, version


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A git repository with program.md's world around it: `uv run` is this interpreter, all data are prepared."""
    tools = tmp_path / "bin"
    tools.mkdir()
    stage.write_uv(tools)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("TIME_BUDGET", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    folder = stage.make(tmp_path / "project")
    git(folder, "branch", "-q", "origin-of-the-night")
    return folder


# baseline: mean 1.0007, sd 0.0007; gains under 0.00035 are dropped at once
DOZEN = [
    {"name": "clearly better", "versions": [version(seeds(0.99, 0.9907, 0.9893))]},
    {"name": "worse", "versions": [version(seeds(1.2))]},
    {"name": "lucky once", "versions": [version(seeds(0.9880, 0.9930))]},
    {"name": "lucky twice", "versions": [version(seeds(0.9880, 0.9885, 0.9960))]},
    {"name": "typo", "versions": [version() + "def (\n", version(seeds(0.97, 0.9705, 0.9695))]},
    {"name": "too wide", "versions": [version(does="oom"), version(does="oom", note="halved")]},
    {"name": "rate too high", "versions": [version(does="nan")]},
    {"name": "hangs", "versions": [version(does="hang")]},
    {"name": "looks ahead", "versions": [version(does="harness")]},
    {"name": "raises", "versions": [version(does="error"), version(seeds(0.98))]},
    {"name": "the same again", "versions": [version(seeds(1.2)) + "# a comment\n"]},
    {"name": "simpler", "versions": [version(seeds(0.9702), note="less")], "word": "keep"},
    {"name": "best", "versions": [version(seeds(0.95, 0.9503, 0.9497))]},
]
OUTCOME = {
    "clearly better": ["discard", "discard", "keep"],
    "worse": ["discard"],
    "lucky once": ["discard", "discard"],
    "lucky twice": ["discard", "discard", "discard"],
    "typo": ["discard", "discard", "keep"],
    "too wide": ["crash"],
    "rate too high": ["crash"],
    "hangs": ["crash"],
    "looks ahead": ["crash"],
    "raises": ["discard"],
    "the same again": ["discard"],
    "simpler": ["keep"],
    "best": ["discard", "discard", "keep"],
}


def check_the_morning(folder, plan):
    """Every run has its row, the branch holds exactly the kept commits, dropped ones are reachable, nothing else changed."""
    logged = rows(folder)
    last_word = {row[0]: row[3] for row in logged}
    assert {idea["name"] for idea in plan} <= {row[4] for row in logged}
    scored = {(run["commit"][:7], f"{run['score']:.6f}") for run in records(folder) if run["score"] is not None}
    assert scored == {(row[0], row[1]) for row in logged if row[1] != "nan"}
    assert len({(row[0], row[1]) for row in logged}) == len(logged), "a run has two rows"
    assert all((row[1] == "nan") == (row[3] == "crash") for row in logged)
    branch = git(folder, "log", "--format=%h", "--abbrev=7").split()
    kept = [word for word in dict.fromkeys(row[0] for row in logged) if last_word[word] == "keep"]
    assert branch == kept[::-1]
    refs = git(folder, "for-each-ref", "--format=%(refname:lstrip=2)", "refs/autoresearch").split()
    assert {ref for ref in refs if not ref.endswith("-edit")} == {c for c, word in last_word.items() if word != "keep"}
    assert git(folder, "status", "--porcelain") == ""
    assert git(folder, "diff", "--name-only", "origin-of-the-night", "HEAD") in ("train.py", "")
    assert git(folder, "branch", "--show-current") == "autoresearch/nov21"
    return logged, last_word


def check_the_dozen(folder):
    logged, _ = check_the_morning(folder, DOZEN)
    by_name = {name: [row[3] for row in logged if row[4] == name] for name in OUTCOME}
    assert by_name == OUTCOME
    assert [row[1] for row in logged if row[4] == "baseline"] == ["1.000000", "1.001400", "1.000700"]


def test_a_night_of_a_dozen(project):
    agent = night.Agent(project, DOZEN)
    agent.work()
    check_the_dozen(project)
    assert 2 <= agent.shown <= 20
    notes = (project / "ideas.md").read_text()
    assert all(idea["name"] in notes for idea in DOZEN)


def test_the_same_night_interrupted_again_and_again(project):
    """The agent forgets everything after every few commands and goes on from the files alone; a stray row is in the log."""
    rng = random.Random(0)
    interruptions = 0
    while True:
        try:
            night.Agent(project, DOZEN, patience=rng.randint(3, 15)).work()
            break
        except night.Interrupted:
            interruptions += 1
        if interruptions == 9:
            with open(project / "results.tsv", "a") as log:
                log.write("this is no row\n")
    check_the_dozen(project)
    assert interruptions >= 9
    assert "this is no row" in (project / "results.tsv").read_text()


def baseline(folder):
    """Three logged runs of the first commit."""
    git(folder, "checkout", "-q", "-b", "autoresearch/nov21")
    for _ in range(3):
        referee(folder, "run")
        referee(folder, "log")


def killed_at(folder, words, word):
    """A command of the referee that dies by SIGKILL just before its n-th call of a function: `word` is name:n."""
    name, _, count = word.partition(":")
    code = f"""
import os, sys
sys.argv = ["referee.py", *{words!r}]
sys.path.insert(0, ".")
import referee
left = {int(count or 1)}
sound = getattr(referee, {name!r})
def deadly(*a, **k):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), 9)
    return sound(*a, **k)
setattr(referee, {name!r}, deadly)
referee.main(sys.argv[1:])
"""
    subprocess.run([sys.executable, "-Bc", code], cwd=folder, env=stage.environment(), capture_output=True)


@pytest.mark.parametrize("moment", ["append_row", "go_back", "must_git:1", "must_git:2", "must_git:3", "finish_log"])
def test_log_killed_at_any_step_is_finished_by_what_next_says(project, moment):
    baseline(project)
    start = git(project, "rev-parse", "HEAD")
    worse = commit(project, version(seeds(1.2)), "worse")
    referee(project, "run")
    (project / "notes.txt").write_text("untracked")
    killed_at(project, ["log"], moment)
    while git(project, "rev-parse", "HEAD") != start:
        step = next_step(referee(project, "status")[1])
        assert step.startswith("uv run referee.py log")
        referee(project, "log")
    assert [row[3] for row in rows(project) if row[0] == worse] == ["discard"]
    assert git(project, "rev-parse", "--short=7", f"refs/autoresearch/{worse}") == worse
    assert git(project, "status", "--porcelain").split() == ["??", "notes.txt"]
    assert next_step(referee(project, "status")[1]).startswith("the next idea")


@pytest.mark.parametrize(
    "moment", ["start", "hash_edits", "birth", "write_atomic", "said_of", "command_wait", "show_end"]
)
def test_run_killed_at_any_step_loses_nothing(project, moment):
    killed_at(project, ["run"], moment)
    for _ in range(4):
        step = next_step(referee(project, "status")[1])
        if step == "uv run referee.py log":
            break
        referee(project, *step.split()[3:])
    assert step == "uv run referee.py log"
    assert [run["score"] for run in records(project)] == [1.0]


def test_a_run_that_is_killed_is_run_again_and_is_no_crash(project):
    (project / "train.py").write_text(version(seeds(1.0), seconds=30))
    git(project, "commit", "-qam", "slow")
    status, out = referee(project, "run", "--wait", "1")
    assert status == 0
    assert next_step(out) == "uv run referee.py wait"
    pid = json.loads((project / "run.json").read_text())["pid"]
    assert next_step(referee(project, "status")[1]) == "uv run referee.py wait"
    assert "a run is going on" in referee(project, "run")[1]
    assert "a run is going on" in referee(project, "log")[1]
    os.kill(pid, signal.SIGKILL)
    out = referee(project, "wait")[1]
    assert next_step(out) == "uv run referee.py run --seed 42"
    assert "says nothing of the idea" in referee(project, "log")[1]
    assert rows(project) == []


def test_nothing_runs_that_run_json_does_not_name(project):
    killed_at(project, ["run"], "write_atomic")
    time.sleep(1)
    assert not (project / "run.json").exists()
    assert records(project) == []


def test_a_run_outlives_the_agent_and_its_process_group(project):
    commit(project, version(seeds(1.0), seconds=2), "slow")
    command = [sys.executable, "referee.py", "run"]
    agent = subprocess.Popen(command, cwd=project, start_new_session=True, stdout=subprocess.DEVNULL)
    while not (project / "run.json").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(agent.pid, signal.SIGKILL)
    agent.wait()
    assert "val_bpb:          1.000000" in referee(project, "wait")[1]


def test_a_rerun_that_is_killed_is_run_again(project):
    baseline(project)
    commit(project, version(seeds(0.9)), "promising")
    referee(project, "run")
    assert next_step(referee(project, "log")[1]) == "uv run referee.py run --seed 43"
    text = (project / "prepare.py").read_text()
    (project / "prepare.py").write_text(text.replace("time.sleep(seconds)", "time.sleep(30)"))
    referee(project, "run", "--wait", "0")
    os.kill(json.loads((project / "run.json").read_text())["pid"], signal.SIGKILL)
    (project / "prepare.py").write_text(text)
    assert next_step(referee(project, "status")[1]) == "uv run referee.py run --seed 43"
    assert git(project, "log", "-1", "--format=%s") == "promising"


def test_after_a_change_of_the_ruler_the_kept_commit_runs_again_before_the_next_idea(project, monkeypatch):
    baseline(project)
    monkeypatch.setenv("PRETEND_HARNESS", "89abcdef")
    commit(project, version(seeds(0.99, 0.9907, 0.9893)), "clearly better")
    step = next_step(referee(project, "run")[1])
    assert step.startswith("uv run referee.py log discard, then uv run referee.py run for the kept commit")
    step = next_step(referee(project, "log", "discard")[1])
    assert step.startswith("uv run referee.py run --seed 42, since no run of this kept commit compares")
    for _ in range(6):
        if step.startswith("uv run"):
            step = next_step(referee(project, *step.split(",")[0].split()[3:])[1])
    assert step.startswith("the next idea")
    head = git(project, "rev-parse", "HEAD")
    again = [run["seed"] for run in records(project) if run["commit"] == head and run["harness"] == "89abcdef"]
    assert again == [42, 43, 44]


def test_a_mend_that_was_interrupted_goes_on(project):
    baseline(project)
    commit(project, version(does="error"), "raises")
    assert next_step(referee(project, "run")[1]).startswith("mend train.py, then git commit -qa --amend --no-edit")
    (project / "train.py").write_text(version(seeds(0.98)))
    assert next_step(referee(project, "status")[1]).startswith("finish the mend of train.py")
    git(project, "commit", "-qa", "--amend", "--no-edit")
    assert next_step(referee(project, "status")[1]) == "uv run referee.py run"
    assert "rerun" in referee(project, "run")[1]


def test_two_mends_and_no_more(project):
    baseline(project)
    commit(project, version(does="error"), "raises")
    for note in ("a", "b"):
        assert next_step(referee(project, "run")[1]).startswith("mend")
        (project / "train.py").write_text(version(does="error", note=note))
        git(project, "commit", "-qa", "--amend", "--no-edit")
    assert next_step(referee(project, "run")[1]) == "uv run referee.py log crash"


def test_a_lock_that_a_killed_git_left_is_removed_and_a_fresh_one_is_not(project):
    baseline(project)
    commit(project, version(seeds(1.2)), "worse")
    referee(project, "run")
    lock = project / ".git/index.lock"
    lock.write_text("")
    assert "run this again in 10 s" in referee(project, "log")[1]
    assert lock.exists()
    assert next_step(referee(project, "status")[1]).startswith("git is at work or was killed a moment ago: wait 10 s")
    os.utime(lock, (time.time() - 60, time.time() - 60))
    assert f"removed {lock}" in referee(project, "status")[1]
    assert next_step(referee(project, "log")[1]).startswith("the next idea")


def test_an_edit_under_a_stale_lock_can_be_taken_back(project):
    baseline(project)
    (project / "train.py").write_text(version(seeds(1.2)))
    lock = project / ".git/index.lock"
    lock.write_text("")
    os.utime(lock, (time.time() - 60, time.time() - 60))
    assert "git restore train.py" in next_step(referee(project, "status")[1])
    git(project, "restore", "train.py")


def test_an_edit_in_progress_is_kept_when_the_commit_under_it_is_dropped(project):
    baseline(project)
    worse = commit(project, version(seeds(1.2)), "worse")
    referee(project, "run")
    edit = version(seeds(0.5), note="begun too early")
    (project / "train.py").write_text(edit)
    out = referee(project, "log")[1]
    assert f"refs/autoresearch/{worse}-edit" in out
    assert git(project, "show", f"refs/autoresearch/{worse}-edit:train.py") == edit.strip()
    assert git(project, "status", "--porcelain") == ""


def test_what_a_human_changed_elsewhere_stays(project):
    baseline(project)
    (project / ".gitignore").write_text((project / ".gitignore").read_text() + "more\n")
    commit(project, version(seeds(1.2)), "worse, and a human's edit swept in")
    referee(project, "run")
    referee(project, "log")
    assert (project / ".gitignore").read_text().endswith("more\n")


def test_a_repeated_log_changes_nothing(project):
    baseline(project)
    commit(project, version(seeds(1.2)), "worse")
    referee(project, "run")
    referee(project, "log", "discard")
    before = (project / "results.tsv").read_text(), git(project, "rev-parse", "HEAD")
    for word in ([], ["discard"], ["crash"], []):
        referee(project, "log", *word)
    assert before == ((project / "results.tsv").read_text(), git(project, "rev-parse", "HEAD"))


def test_a_keep_may_be_dropped_on_second_thoughts(project):
    baseline(project)
    better = commit(project, version(seeds(0.9, 0.9, 0.9001)), "better, with three times the memory")
    for _ in range(3):
        referee(project, "run")
        referee(project, "log")
    assert rows(project)[-1][3] == "keep"
    assert "went back" in referee(project, "log", "discard")[1]
    assert [row[3] for row in rows(project) if row[0] == better][-1] == "discard"


def hundred(rng):
    plan, best = [], 1.0007
    for n in range(100):
        kind = rng.choices(["worse", "better", "close", "crash", "mended"], [40, 12, 25, 12, 11])[0]
        shift = {"worse": rng.uniform(0.002, 0.05), "better": -0.006, "mended": 0.01}.get(kind, rng.uniform(-0.001, 0))
        scores = [round(best + shift + rng.gauss(0, 0.0007), 6) for _ in range(3)]
        good = version(seeds(*scores), note=f"{n}")
        bad = rng.choice([version(does=does, note=f"{n}") for does in ("oom", "nan", "error")] + [f"def ( # {n}\n"])
        versions = {"crash": [bad], "mended": [bad, good]}.get(kind, [good])
        plan.append({"name": f"idea {n:03d}", "versions": versions})
        if kind == "better":
            best -= 0.006
    return plan


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_hundred_ideas_killed_at_random_moments(project, tmp_path):
    """kill -9 to the agent, its shell and often the run as well, every second or so; then a new agent reads the files."""
    plan = hundred(random.Random(4))
    rng = random.Random(5)
    kills = most = 0
    with_the_run = 0
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    began = time.monotonic()
    while True:
        with open(tmp_path / "agent.log", "w") as out:
            command = [sys.executable, ROOT / "tests/night.py", project, tmp_path / "plan.json"]
            agent = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            patience = rng.uniform(0.2, 1.8) if kills < 90 else 600
            status = agent.wait(timeout=patience)
            assert status == 0, (tmp_path / "agent.log").read_text()
            most = max(most, int((tmp_path / "agent.log").read_text().split()[0]))
            break
        except subprocess.TimeoutExpired:
            kills += 1
            if rng.random() < 0.6:
                with_the_run += 1
                kill_the_run(project)
            os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()
    logged, last_word = check_the_morning(project, plan)
    words = [*last_word.values()]
    counts = ", ".join(f"{words.count(word)} {word}" for word in ("keep", "discard", "crash"))
    print(
        f"\n{len(plan)} ideas, {len(logged)} rows, {len(records(project))} records, {kills} kills ({with_the_run} of them "
        f"with the run), {time.monotonic() - began:.0f} s: {counts}; at most {most} lines shown at once"
    )
    assert kills >= 90
    assert words.count("keep") >= 5


def kill_the_run(folder):
    try:
        os.kill(json.loads((folder / "run.json").read_text())["pid"], signal.SIGKILL)
    except (OSError, ValueError):
        pass


def test_tools_exist():
    """What program.md's commands use besides git and uv is on every machine."""
    for tool in ("grep", "tail", "printf", "sh", "ps"):
        assert shutil.which(tool), tool
