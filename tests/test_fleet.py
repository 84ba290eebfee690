"""Many commits at once: submit, slot.sh, status and log COMMIT, with an engine that is a list (tests/fleet_stage.py)."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import fleet_night
import pytest
from fleet_stage import Engine, idea, make, run_slot, text
from stage import git, next_step, records, referee, rows, write_program, write_uv
from test_night import killed_at


@pytest.fixture
def engine(tmp_path, monkeypatch):
    return Engine(tmp_path, monkeypatch)


@pytest.fixture
def project(tmp_path, engine):
    return make(tmp_path / "project")


@pytest.fixture(scope="module")
def kept_baseline(tmp_path_factory):
    """A project whose baseline is kept, to be copied."""
    folder = tmp_path_factory.mktemp("baseline")
    with pytest.MonkeyPatch.context() as patch:
        engine = Engine(folder, patch)
        project = make(folder / "project")
        for _ in range(3):
            referee(project, "submit")
        engine.work()
        out = referee(project, "log", git(project, "rev-parse", "--short=7", "HEAD"))[1]
        assert "the next idea" in next_step(out)
    return project


@pytest.fixture
def night(kept_baseline, engine, tmp_path):
    """A project whose baseline is kept."""
    return Path(shutil.copytree(kept_baseline, tmp_path / "project"))


def follow(folder, engine, patience=40, **environment):
    """Does what `next:` says, with all jobs done at once, until an idea is asked for; returns the steps."""
    steps = []
    out = referee(folder, "status")[1]
    while len(steps) < patience:
        step = next_step(out)
        steps.append(step)
        if step.startswith("the next idea"):
            return steps
        words = step.removeprefix("uv run referee.py ").split("; ")[0].split(" (")[0]
        if step.startswith("git cherry-pick"):
            git(folder, *words.split(" && ")[0].split()[1:])
            words = "submit"
        referee(folder, *words.split(":")[0].split(",")[0].split())
        engine.work(**environment)
        out = referee(folder, "status")[1]
    raise AssertionError("\n".join(steps))


def branch(folder):
    return git(folder, "log", "--format=%s").splitlines()


def row_words(folder, subject):
    return [row[3] for row in rows(folder) if row[4].startswith(subject)]


def test_a_baseline_takes_three_seeds_and_stays_on_the_branch(project, engine):
    start = git(project, "rev-parse", "HEAD")
    for seed in (42, 43, 44):
        status, out = referee(project, "submit")
        assert status == 0
        assert f"{start[:7]} with seed {seed}: Submitted" in out
    assert "the baseline has its 3 seeds" in referee(project, "submit")[1]
    assert git(project, "rev-parse", "HEAD") == start
    assert len(engine.list.read_text().splitlines()) == 3
    engine.work()
    out = referee(project, "status")[1]
    assert "baseline (mean" in out
    assert next_step(out) == f"uv run referee.py log {start[:7]}"
    referee(project, "log", start[:7])
    assert row_words(project, "baseline") == ["keep"] * 3


def test_an_idea_leaves_the_branch_at_once_and_comes_back_when_it_is_kept(night, engine):
    start = git(night, "rev-parse", "HEAD")
    commit, out = idea(night, "wider", {0: 0.02})
    assert git(night, "rev-parse", "HEAD") == start
    assert git(night, "status", "--porcelain") == ""
    assert next_step(out).startswith("the next idea")
    steps = follow(night, engine)
    assert steps[0].startswith("the next idea")  # it is queued
    engine.work()
    steps = follow(night, engine)
    assert steps[:2] == [f"uv run referee.py submit {commit[:7]}"] * 2
    assert branch(night) == ["wider", "start"]
    assert row_words(night, "wider") == ["keep"] * 3
    assert len({row[1] for row in rows(night)}) == 6  # three seeds of two commits
    assert git(night, "for-each-ref", "refs/autoresearch") == ""


def test_what_is_worse_is_dropped_and_kept_under_a_ref(night, engine):
    commit, _ = idea(night, "worse", {0: -0.02})
    engine.work()
    follow(night, engine)
    assert row_words(night, "worse") == ["discard"]
    assert branch(night) == ["start"]
    assert git(night, "for-each-ref", "--format=%(refname)", "refs/autoresearch") == f"refs/autoresearch/{commit[:7]}"


def test_gains_on_one_base_are_not_added_up_without_a_run_of_the_sum(night, engine):
    first, _ = idea(night, "first", {0: 0.02})
    time.sleep(1)  # git knows whole seconds; the older one is dealt with first
    second, _ = idea(night, "second", {1: 0.01})
    engine.work()
    steps = follow(night, engine)
    pick = f"git cherry-pick {second[:7]} && uv run referee.py submit (it gained on a base that is not the newest)"
    assert [step for step in steps if step.startswith(pick)], steps
    assert branch(night) == ["second", "first", "start"]
    head = git(night, "rev-parse", "HEAD")
    assert head != second
    assert {run["seed"] for run in records(night) if run["commit"] == head} == {42, 43, 44}
    assert row_words(night, "first") == ["keep"] * 3
    assert row_words(night, "second") == ["discard"] * 3 + ["keep"] * 3
    assert f"goes on as {head[:7]}" in [row[4] for row in rows(night) if row[0] == second[:7]][0]


def test_a_commit_is_judged_against_what_it_was_cut_from_not_against_the_newest_best(night, engine):
    first, _ = idea(night, "first", {0: 0.03})
    less, _ = idea(night, "less, but a gain", {1: 0.01})
    engine.work()
    out = referee(night, "status")[1]
    for seed in (43, 44):
        referee(night, "submit", first[:7], "--seed", str(seed))
        referee(night, "submit", less[:7], "--seed", str(seed))
    engine.work()
    referee(night, "log", first[:7])
    out = referee(night, "status")[1]
    assert f"{less[:7]} 'less, but a gain': keep (gain +0.0" in out
    assert next_step(out).startswith(f"git cherry-pick {less[:7]}")


def test_a_win_on_an_old_base_is_not_logged_as_a_keep(night, engine):
    first, _ = idea(night, "first", {0: 0.02})
    second, _ = idea(night, "second", {1: 0.02})
    for seed in ("43", "44"):
        referee(night, "submit", first[:7], "--seed", seed)
        referee(night, "submit", second[:7], "--seed", seed)
    engine.work()
    referee(night, "log", first[:7])
    for word in ([], ["keep"]):
        status, out = referee(night, "log", second[:7], *word)
        assert status == 1
        assert f"git cherry-pick {second[:7]}" in out
    assert row_words(night, "second") == []
    assert branch(night) == ["first", "start"]
    referee(night, "log", second[:7], "discard")  # as where the conflict cannot be settled
    assert row_words(night, "second") == ["discard"] * 3
    assert branch(night) == ["first", "start"]


def test_an_idea_that_is_done_before_its_baseline_waits_for_it(project, engine):
    start = git(project, "rev-parse", "--short=7", "HEAD")
    referee(project, "submit")
    early, _ = idea(project, "early", {0: 0.02})
    engine.work()
    out = referee(project, "status")[1]
    assert f"none (waits for {start}" in out
    assert next_step(out) == f"uv run referee.py submit {start}"
    follow(project, engine)
    assert branch(project) == ["early", "start"]


def test_a_preempted_run_is_no_crash_and_has_no_row(night, engine):
    commit, _ = idea(night, "slow", {0: 0.02}, seconds=30.0)
    ((folder, _, seed),) = engine.take()
    slot = subprocess.Popen(["fleet/slot.sh", commit, seed], cwd=folder, start_new_session=True)
    wait_for(lambda: "a lot of noise" in log_of(night, commit))
    assert next_step(referee(night, "status")[1]).startswith("the next idea")  # this machine knows that it runs
    os.kill(slot.pid, signal.SIGTERM)
    slot.wait()
    assert "FAIL: error: ended early (SystemExit SIGTERM)" in log_of(night, commit)
    out = referee(night, "status")[1]
    assert f"{commit[:7]} 'slow': lost; FAIL: error: ended early" in out
    assert next_step(out) == f"uv run referee.py submit {commit[:7]} --seed 42"
    assert row_words(night, "slow") == []
    assert "is not decided: lost" in referee(night, "log", commit[:7])[1]
    assert clones() == []


def test_a_slot_that_vanishes_is_lost_and_its_clone_is_removed_by_the_next(night, engine):
    commit, _ = idea(night, "slow", {0: 0.02}, seconds=30.0)
    ((folder, _, seed),) = engine.take()
    slot = subprocess.Popen(["fleet/slot.sh", commit, seed], cwd=folder, start_new_session=True)
    wait_for(lambda: "a lot of noise" in log_of(night, commit))
    os.killpg(slot.pid, signal.SIGKILL)
    slot.wait()
    assert len(clones()) == 1
    time.sleep(0.5)  # the watchdog says it
    assert next_step(referee(night, "status")[1]) == f"uv run referee.py submit {commit[:7]} --seed 42"
    other, _ = idea(night, "other", {1: -0.5})
    engine.work()
    assert clones() == []
    for _ in range(2):
        with open(night / f"runs/{commit}-42.log", "a") as log:
            log.write("slot: again\n")
    referee(night, "log", other[:7])
    assert (
        f"(lost 3 times); where the idea itself is the reason: uv run referee.py log {commit[:7]} crash"
        in next_step(referee(night, "status")[1])
    )
    referee(night, "log", commit[:7], "crash")
    assert row_words(night, "slow") == ["crash"]


def log_of(folder, commit, seed=42):
    path = folder / f"runs/{commit}-{seed}.log"
    return path.read_text() if path.exists() else ""


def clones():
    return [name for name in os.listdir(os.environ["TMPDIR"]) if name.startswith("autoresearch-slot")]


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_record_that_is_on_its_way_is_awaited(night, engine):
    commit, _ = idea(night, "wider", {0: -0.02})
    engine.take()
    log = night / f"runs/{commit}-42.log"
    log.write_text("slot: here\nval_bpb: 0.9\n")
    out = referee(night, "status")[1]
    assert "its record is awaited; val_bpb: 0.9" in out
    assert next_step(out).startswith("the next idea")
    os.utime(log, (0, 0))
    assert next_step(referee(night, "status")[1]) == f"uv run referee.py submit {commit[:7]} --seed 42"


def test_a_run_that_ends_while_the_queue_is_asked_gets_its_row(night, engine, tmp_path):
    commit, _ = idea(night, "worse", {0: -0.02})
    referee(night, "submit", commit[:7], "--seed", "43")
    engine.work()
    (late,) = (night / "runs").glob(f"*-{commit[:7]}-43-*.json")
    late.rename(tmp_path / late.name)
    write_program(tmp_path / "bin/squeue", f"mv {tmp_path}/{late.name} {late} 2> /dev/null\nexit 0\n")
    referee(night, "log", commit[:7])
    assert row_words(night, "worse") == ["discard"] * 2


def test_a_crash_is_one_row_and_the_commit_stays_reachable(night, engine):
    commit, _ = idea(night, "too wide", {}, does="oom")
    engine.work()
    out = referee(night, "status")[1]
    assert f"{commit[:7]} 'too wide': FAIL: oom: CUDA out of memory" in out
    assert next_step(out).startswith(f"uv run referee.py log {commit[:7]}; an idea that can be mended goes on with")
    referee(night, "log", commit[:7])
    referee(night, "log", commit[:7])
    assert [row[1:4] for row in rows(night) if row[4] == "too wide"] == [["nan", "0.0", "crash"]]
    assert git(night, "rev-parse", f"refs/autoresearch/{commit[:7]}") == commit


def test_two_kinds_of_device_share_no_table_and_a_keep_may_be_confirmed(night, engine):
    commit, _ = idea(night, "wider", {0: 0.02})
    start = git(night, "rev-parse", "--short=7", "HEAD")
    engine.work(PRETEND_DEVICE="H200")
    out = referee(night, "status")[1]
    assert f"none (no kept run compares; run {start} on this kind first)" in out
    assert next_step(out).startswith(
        f"uv run referee.py submit {start}, on the kind of device that {commit[:7]} ran on"
    )
    for seed in (42, 43, 44):
        referee(night, "submit", commit[:7], "--seed", str(seed))
    engine.work()
    assert "'wider': on H200 none" in referee(night, "status")[1]
    referee(night, "log", commit[:7])
    assert row_words(night, "wider") == ["keep"] * 4
    assert "; on" not in rows(night)[-1][4]
    for name in (start, commit[:7]):
        for seed in (45, 46, 47):
            referee(night, "submit", name, "--seed", str(seed), "--gpus", "h200:1")
    engine.work(PRETEND_DEVICE="H200")
    referee(night, "log", start)
    referee(night, "log", commit[:7])
    confirmed = [row for row in rows(night) if row[4].startswith("wider (on H200: keep (gain +0.01")]
    assert [row[3] for row in confirmed] == ["keep"] * 3
    assert branch(night) == ["wider", "start"]
    assert next_step(referee(night, "status")[1]).startswith("the next idea")


MOMENTS = ["must_git:1", "start_in_slot:1", "step_back:1", "must_git:2", "must_git:3", "finish_log:1"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_submit_killed_at_any_step_is_finished_by_what_next_says(night, engine, moment):
    (night / "train.py").write_text(text({0: 0.02}))
    git(night, "commit", "-qam", "wider")
    commit = git(night, "rev-parse", "HEAD")
    killed_at(night, ["submit"], moment)
    for _ in range(3):
        step = next_step(referee(night, "status")[1])
        if step.startswith("the next idea"):
            break
        referee(night, *step.split()[3:])
    assert [job[1:] for job in engine.take()] == [(commit, "42")]
    assert branch(night) == ["start"]
    assert git(night, "status", "--porcelain") == ""


@pytest.mark.parametrize("moment", ["write_row:1", "write_row:2", "keep_or_drop:1", "must_git:1", "must_git:2"])
@pytest.mark.parametrize("gain", [0.02, -0.02])
def test_log_killed_at_any_step_is_finished_by_what_next_says(night, engine, moment, gain):
    commit, _ = idea(night, "an idea", {0: gain})
    for seed in ("43", "44"):
        referee(night, "submit", commit[:7], "--seed", seed)
    engine.work()
    killed_at(night, ["log", commit[:7]], moment)
    follow(night, engine)
    assert row_words(night, "an idea") == ["keep" if gain > 0 else "discard"] * 3
    assert branch(night) == (["an idea", "start"] if gain > 0 else ["start"])
    assert git(night, "for-each-ref", "refs/autoresearch/out") == ""


def test_a_conflict_is_the_agents_to_settle(night, engine):
    first, _ = idea(night, "first", {0: 0.02})
    second, _ = idea(night, "second", {0: 0.03})
    for commit in (first, second):
        for seed in ("43", "44"):
            referee(night, "submit", commit[:7], "--seed", seed)
    engine.work()
    referee(night, "log", first[:7])
    subprocess.run(["git", "cherry-pick", second[:7]], cwd=night, capture_output=True)
    step = next_step(referee(night, "status")[1])
    assert step.startswith("settle the conflict in train.py, then git commit -qa --no-edit && uv run referee.py submit")
    (night / "train.py").write_text(text({0: 0.04}))
    git(night, "commit", "-qa", "--no-edit")
    assert next_step(referee(night, "status")[1]) == "uv run referee.py submit"
    follow(night, engine)
    assert branch(night) == ["second", "first", "start"]


def test_two_agents_share_runs_and_refs_and_repeat_nothing(night, engine, tmp_path):
    other = tmp_path / "other"
    git(night, "worktree", "add", "-q", str(other), "-b", "autoresearch/other", "main")
    tried, _ = idea(night, "wider", {0: -0.02})
    out = referee(other, "status")[1]
    assert "out on autoresearch/nov21: 'wider'" in out
    engine.work()
    for step in follow(other, engine):
        assert tried[:7] not in step  # it is the other's to deal with
    assert row_words(other, "baseline") == ["keep"] * 3  # the runs are the first agent's
    (other / "train.py").write_text(text({0: -0.02}) + "# the same\n")
    git(other, "commit", "-qam", "wide again")
    out = referee(other, "submit")[1]
    assert f"not submitted: the same file ran as {tried[:7]} 'wider'" in out
    assert engine.take() == []
    assert git(other, "log", "--format=%s") == "start"
    mine, _ = idea(other, "deeper", {1: 0.02})
    engine.work()
    follow(other, engine)
    assert branch(other) == ["deeper", "start"]
    assert branch(night) == ["start"]
    assert not (other / "runs").exists()


def test_fleet_program_is_executed_literally(kept_baseline, engine, tmp_path):
    """By the agent of tests/fleet_night.py; each job starts at once, and only this machine's list of processes knows it."""
    project = Path(shutil.copytree(kept_baseline, tmp_path / "project"))
    shutil.rmtree(project / "runs")
    (project / "results.tsv").unlink()
    git(project, "checkout", "-q", "main")
    git(project, "branch", "-q", "-D", "autoresearch/nov21")
    job = 'CUDA_VISIBLE_DEVICES=$RANDOM "$PWD/$1" $2 $3 > /dev/null 2>&1 &\nsleep 0.3\n'
    write_program(tmp_path / "bin/sbatch", f"shift $(($# - 3))\n{job}echo Submitted\n")
    write_program(tmp_path / "bin/squeue", "exit 0\n")
    write_uv(tmp_path / "bin")
    plan = [
        {"name": "wider", "line": 0, "gain": 0.02},
        {"name": "deeper", "line": 1, "gain": 0.03},
        {"name": "wider still", "line": 0, "gain": 0.021},
        {"name": "too wide", "line": 2, "gain": 0.0, "does": "oom"},
        {"name": "worse", "line": 3, "gain": -0.02},
    ]
    agent = fleet_night.Agent(project, plan, "nov25")
    agent.work()
    assert row_words(project, "baseline") == ["keep"] * 3
    assert {"wider", "deeper"} & set(branch(project))
    assert row_words(project, "too wide") == ["crash"]
    assert row_words(project, "worse") == ["discard"]
    kept = {row[0] for row in rows(project) if row[3] == "keep"}
    assert set(git(project, "log", "--format=%h", "--abbrev=7").split()) == kept
    assert git(project, "for-each-ref", "refs/autoresearch/out") == ""
    assert agent.shown <= 20


# -- bad input


def test_a_commit_that_does_not_exist(night):
    assert "there is no commit 1234567 here" in referee(night, "submit", "1234567")[1]
    assert "there is no commit 1234567 here" in referee(night, "log", "1234567")[1]
    missing = "f" * 40
    assert run_slot(night, missing, 42)[0] == 1
    assert f"FAIL: harness: there is no commit {missing}" in log_of(night, missing)
    assert clones() == []


def test_a_commit_that_is_not_out(night):
    first = git(night, "rev-parse", "--short=7", "HEAD")
    assert f"nothing to log: {first} is keep" in referee(night, "log", first)[1]
    assert "is kept; commit an idea" in referee(night, "submit")[1]


def test_an_edit_that_is_not_committed_is_not_submitted(night):
    (night / "train.py").write_text(text({0: 1.0}))
    assert "train.py is changed but not committed" in referee(night, "submit")[1]


# -- a baseline that does not count

PEEK = "import sys\n\nsys._getframe()\n"


def test_what_the_look_finds_is_not_sent_to_a_slot(project, engine):
    honest = (project / "train.py").read_text()
    (project / "train.py").write_text(PEEK + honest)
    git(project, "commit", "-qam", "peeks")
    status, out = referee(project, "submit")
    assert status != 0
    assert "not submitted, since its score would not count: train.py line 3 " in out
    assert "git commit -qam '<idea>' && uv run referee.py submit" in out
    assert engine.list.read_text() == ""
    (project / "train.py").write_text(honest)
    git(project, "commit", "-qam", "mended")
    assert "with seed 42: Submitted" in referee(project, "submit")[1]


def test_what_the_look_finds_in_an_idea_can_be_mended(night, engine):
    (night / "train.py").write_text(PEEK + text({0: 0.02}))
    git(night, "commit", "-qam", "wider")
    out = referee(night, "submit")[1]
    assert "mend that, then git commit -qa --amend --no-edit && uv run referee.py submit" in out
    (night / "train.py").write_text(text({0: 0.02}))
    git(night, "commit", "-qa", "--amend", "--no-edit")
    assert "with seed 42: Submitted" in referee(night, "submit")[1]


@pytest.mark.parametrize("mended_before", [False, True])
def test_a_baseline_that_does_not_count_is_mended(project, engine, mended_before):
    start = git(project, "rev-parse", "--short=7", "HEAD")
    referee(project, "submit")
    engine.work(PRETEND_DOUBT="a doubt")
    assert next_step(referee(project, "status")[1]) == f"uv run referee.py log {start} discard: a doubt"
    if mended_before:
        idea(project, "mended", {0: 0.01})
    out = referee(project, "log", start, "discard")[1]
    assert row_words(project, "start (does not count: a doubt)") == ["discard"]
    if not mended_before:
        mend = "mend train.py (a doubt), then git commit -qam '<idea>' && uv run referee.py submit"
        assert next_step(out) == mend
        assert f"{start} does not count (a doubt); mend train.py" in referee(project, "submit")[1]
        idea(project, "mended", {0: 0.01})
    engine.work()
    follow(project, engine)
    assert branch(project) == ["mended", "start"]
    assert row_words(project, "baseline") == ["keep"] * 3


def test_a_log_that_writes_no_row_says_so(night, engine):
    first = git(night, "rev-parse", "HEAD")
    referee(night, "submit", first, "--seed", "50")
    engine.work()
    referee(night, "log", first)
    git(night, "update-ref", f"refs/autoresearch/out/autoresearch/nov21/{first}", first)
    assert f"no new row: all runs of {first[:7]} have theirs" in referee(night, "log", first)[1]


def test_wait_says_why_it_does_not_wait(night, engine):
    idea(night, "worse", {0: -0.02})
    engine.work()
    out = referee(night, "wait")[1]
    assert out.startswith("not waiting: there is something to do first\nnext: uv run referee.py log ")


def test_two_commits_of_one_idea_become_one(night, engine):
    for number in (0, 1):
        (night / "train.py").write_text(text({0: 0.02, 1: 0.02 * number}))
        git(night, "commit", "-qam", f"idea {number}")
    referee(night, "submit")
    engine.work()
    follow(night, engine)
    assert branch(night) == ["idea 1", "start"]
    assert row_words(night, "idea") == ["keep"] * 3


def test_a_slot_without_the_environment(night, engine, monkeypatch):
    monkeypatch.setenv("UV_PROJECT_ENVIRONMENT", "/nowhere")
    commit, _ = idea(night, "wider", {0: 0.02})
    engine.work()
    out = referee(night, "status")[1]
    assert "lost; FAIL: harness: there is no /nowhere/bin/python on" in out
    assert next_step(out) == f"uv run referee.py submit {commit[:7]} --seed 42"


def test_a_slot_whose_temporary_folder_is_full(night, engine):
    commit, _ = idea(night, "wider", {0: 0.02})
    engine.work(TMPDIR="/dev/full")
    assert "lost; FAIL: harness: no clone could be made in /dev/full" in referee(night, "status")[1]


def test_a_record_that_cannot_be_written_stays_in_the_slot(night, engine, tmp_path):
    commit, _ = idea(night, "wider", {0: 0.02})
    ((folder, _, seed),) = engine.take()
    (night / "runs").rename(night / "elsewhere")
    (night / "runs").write_text("a file in the way")
    assert run_slot(folder, commit, seed)[0] == 0
    (night / "runs").unlink()
    (night / "elsewhere").rename(night / "runs")
    (log,) = [path for path in os.listdir(os.environ["TMPDIR"]) if path.startswith(f"autoresearch-{commit}")]
    with open(f"{os.environ['TMPDIR']}/{log}") as file:
        said = file.read()
    assert "none (the run could not be written into" in said
    (clone,) = clones()
    assert f"{clone}/runs; copy it to" in said
    (record,) = os.listdir(f"{os.environ['TMPDIR']}/{clone}/runs")
    os.rename(f"{os.environ['TMPDIR']}/{clone}/runs/{record}", night / "runs" / record)
    assert f"{commit[:7]} 'wider': rerun (next SEED=43" in referee(night, "status")[1]


def test_a_node_with_other_data_is_named(night, engine):
    commit, _ = idea(night, "wider", {0: 0.02})
    engine.work(PRETEND_HARNESS="89abcdef")
    assert "none (harness 89abcdef on" in log_of(night, commit)
    out = referee(night, "status")[1]
    assert "ran under harness 01234567, this one under 89abcdef" in out


def test_an_engine_that_does_not_answer_loses_nothing(night, engine, tmp_path):
    commit, _ = idea(night, "wider", {0: 0.02})
    write_program(tmp_path / "bin/squeue", "echo 'slurm_load_jobs error: no controller' >&2\nexit 1\n")
    step = next_step(referee(night, "status")[1])
    assert step.startswith(
        "wait a minute, then uv run referee.py status; squeue does not answer: slurm_load_jobs error"
    )
    status, out = referee(night, "submit", commit[:7])
    assert status == 1
    assert "squeue does not answer" in out
    assert len(engine.take()) == 1


def test_a_job_that_is_held_does_not_fill_the_queue(night, engine):
    for number in range(2):
        commit, _ = idea(night, f"idea {number}", {number: -0.02})
    engine.list.write_text(engine.list.read_text().replace("/Priority", "/BeginTime"))  # as after a preemption
    out = referee(night, "status")[1]
    assert "out: 0 running, 2 queued" in out
    assert next_step(out).startswith("the next idea")


def test_no_engine_at_all(night, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    if os.path.exists("/usr/bin/sbatch"):
        pytest.skip("there is an sbatch here")
    status, out = referee(night, "submit", git(night, "rev-parse", "HEAD"))
    assert "there is no sbatch here; in a slot of your own, by hand: CUDA_VISIBLE_DEVICES=0 fleet/slot.sh" in out


def test_wait_ends_when_there_is_something_to_do(night, engine):
    for number in range(2):
        commit, out = idea(night, f"idea {number}", {number: -0.02})
    assert next_step(out) == "uv run referee.py wait"
    assert next_step(referee(night, "wait", "--wait", "0")[1]) == "uv run referee.py wait"
    engine.work()
    began = time.monotonic()
    assert next_step(referee(night, "wait")[1]).startswith("uv run referee.py log")
    assert time.monotonic() - began < 10


def test_status_is_short_with_many_commits_out(night, engine):
    for number in range(9):
        idea(night, f"idea {number}", {number: -0.02})
    engine.work()
    for number in range(9, 12):
        idea(night, f"idea {number}", {number: -0.02})
    out = referee(night, "status")[1]
    assert len(out.splitlines()) <= 20
    assert "out: 0 running, 3 queued: " in out
