"""Clock, records, guard, watchdog and the commands' answers to bad input; the runs are stand-ins without torch."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stage
from stage import commit, git, records, rows, seeds, train, version

import referee
from referee import Clock

# -- the clock, fed ticks


def ticked(budget, *ticks, start=50.0):
    clock = Clock(budget)
    clock.start(now=start)
    for tick in ticks:
        clock.tick(now=start + tick)
    clock.stop(now=start + ticks[-1])
    return clock


def test_clock_counts_from_its_start_to_its_stop():
    clock = Clock(300)
    assert clock.elapsed(now=5) == 0.0
    clock.start(now=100)
    assert clock.elapsed(now=130.5) == 30.5
    assert clock.tick(now=131) == 31
    clock.stop(now=160)
    clock.stop(now=200)
    assert clock.elapsed(now=999) == 60


def test_clock_starts_once():
    clock = Clock(300)
    clock.start(now=100)
    assert not clock.restarted
    clock.start(now=390)
    assert clock.restarted
    assert clock.elapsed(now=400) == 300


@pytest.mark.parametrize(
    "ticks, over",
    [
        ((1, 2, 300.9), 0.0),  # within 2 %
        ((100, 200, 299, 306.0), 0.0),  # 2 % exactly, past every step's end
        ((5, 299, 306.1), 0.0),  # shorter than the longest step (294 s)
        ((*range(1, 300), 306.5), 6.5),  # longer than 2 % and than every step that ended inside the budget
        ((*range(10, 300, 10), 310.5), 10.5),
        ((*range(10, 300, 10), 309.5), 0.0),
    ],
)
def test_overrun_is_what_exceeds_the_longest_step_and_two_percent(ticks, over):
    assert ticked(300, *ticks).overrun() == pytest.approx(over)


def test_time_that_was_never_ticked_is_an_overrun():
    clock = ticked(10, *range(1, 11))
    clock.stopped = clock.started + 15  # five more seconds of training after the loop
    assert clock.overrun() == 5


def test_rare_ticks_do_not_stretch_the_budget():
    clock = Clock(8)
    clock.start(now=0)
    for tenth in range(1, 148):
        clock.touch(now=tenth / 10)  # the loader, at every draw
        if tenth in (76, 147):
            clock.tick(now=tenth / 10)
    clock.stop(now=14.8)
    assert clock.overrun() == pytest.approx(6.8)


def test_steps_are_the_ticks_only():
    clock = Clock(10)
    clock.start(now=0)
    for now in (1, 2, 3):
        clock.touch(now=now - 0.5)
        clock.tick(now=now)
    assert clock.steps == [1, 1, 1]


# -- hashes


def test_a_change_of_comments_spacing_or_docstrings_is_no_other_file():
    one = 'def f(x):\n    """Says."""\n    return x + 1  # why\n'
    other = "def f( x ):\n\n    return x+1\n"
    assert referee.code_hash(one) != referee.code_hash(one.replace("+ 1", "+ 2"))
    assert referee.code_hash(one) == referee.code_hash('def f(x):\n    """Otherwise."""\n    return x + 1\n')
    assert referee.code_hash(other) == referee.code_hash("def f(x):\n    return x + 1\n")


def test_text_that_is_no_python_has_a_hash():
    assert referee.code_hash("def (") != referee.code_hash("def ((")


# -- runs in a process


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    return stage.make(tmp_path / "project")


def last(out):
    return out.rstrip("\n").splitlines()[-1]


def test_a_run_that_ends_well(project):
    status, out = train(project)
    assert status == 0
    assert last(out) == "verdict:          baseline (next SEED=43; mean 1.000000 of 1 seeds; noise unknown)"
    (record,) = records(project)
    assert record["commit"] == git(project, "rev-parse", "HEAD")
    assert (record["seed"], record["score"], record["why_not"]) == (42, 1.0, [])
    assert (record["ticks"], record["seconds"]) == (10, 1.0)
    assert record["tick_median"] == pytest.approx(0.1)
    assert git(project, "status", "--porcelain") == ""  # use leaves nothing
    (name,) = [path.name for path in (project / "runs").iterdir()]
    assert re.fullmatch(rf"\d{{8}}T\d{{6}}\.\d+Z-{record['commit'][:7]}-42-.+-\d+\.json", name)


def test_worktrees_share_the_records(project):
    git(project, "worktree", "add", "-q", "--detach", "../other")
    assert train(project.parent / "other", SEED="43")[0] == 0
    assert [record["seed"] for record in records(project)] == [43]


@pytest.mark.parametrize(
    "does, kind, said",
    [
        ("oom", "oom", "out of memory"),
        ("nan", "nan", "step 3"),
        ("harness", "harness", "the model sees the future"),
        ("error", "error", "ValueError"),
        ("exit", "error", "ended early"),
        ("hang", "timeout", "not done 3 s after the start"),
    ],
)
def test_a_failed_run_ends_with_one_line_and_leaves_a_record(project, does, kind, said):
    commit(project, version(does=does), "fails")
    status, out = stage.referee(project, "run")
    assert status == 1
    (record,) = records(project)
    assert record["score"] is None
    assert record["fail"]["kind"] == kind
    assert said in record["fail"]["sentence"]
    (line,) = [line for line in (project / "run.log").read_text().splitlines() if line.startswith("FAIL:")]
    assert line.startswith(f"FAIL: {kind}: ")
    assert line in out
    assert ("Traceback" in out) == (does == "error")


@pytest.mark.parametrize("text", ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "HIP out of memory"])
def test_other_words_for_out_of_memory(text):
    assert referee.failure(RuntimeError(text))[0] == "oom"


@pytest.mark.parametrize(
    "env",
    [{"SEED": "abc"}, {"SEED": "-1"}, {"SEED": str(2**64)}, {"SEED": "9" * 5000}, {"SEED": ""}]
    + [{"TIME_BUDGET": text} for text in ("0", "5m", "", "9" * 400, "1.5")],
)
def test_malformed_variables_are_refused_by_name(project, env):
    status, out = train(project, **env)
    (name,) = env
    assert status == 1
    assert last(out).startswith(f"FAIL: harness: {name} is '")
    assert "whole number" in last(out)


TWICE = """
import os, signal, time
from prepare import referee

ending = referee.record_failure


def late(*words):
    os.kill(os.getpid(), signal.SIGTERM)  # again, while the run is being ended
    time.sleep(0.1)
    ending(*words)


def main():
    referee.record_failure = late
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)


referee.guard(main, lambda: "cpu", 30)
"""


def test_sigterm_even_twice_is_one_failed_run(project):
    commit(project, TWICE, "ended from outside")
    status, out = train(project)
    assert status == 1
    assert last(out).startswith("FAIL: error: ended early")
    assert records(project)[0]["fail"]["kind"] == "error"


def wait_for(path, word):
    for _ in range(400):
        if path.exists() and word in path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"no {word} in {path}")


def started(project, text):
    """A run of that train.py that goes on in the background: (its PID, its log)."""
    commit(project, text, "goes on")
    stage.referee(project, "run", "--wait", "0")
    wait_for(project / "run.log", "warming up")
    return json.loads((project / "run.json").read_text())["pid"], project / "run.log"


def test_device_is_taken_once_and_freed_with_its_holder(project):
    pid, _ = started(project, version(seconds=30))
    status, out = train(project)
    assert status == 1
    assert last(out).startswith(f"FAIL: busy: process {pid} is using cpu")
    os.kill(pid, signal.SIGKILL)
    stage.referee(project, "wait")
    commit(project, version(seeds(1.0)), "quick")
    assert train(project)[0] == 0


def test_a_forked_worker_that_outlives_its_run_does_not_hold_the_device(project):
    fork = "import os, time\nif os.fork() == 0:\n    time.sleep(20)\n    os._exit(0)\n"
    text = version(seconds=30).replace("import prepare\n", "import prepare\nfrom prepare import referee\n")
    body = f"    guard = prepare.referee.take_device\n    def take(key):\n        lock = guard(key)\n        {fork.splitlines()[0]}\n"
    body += "        if os.fork() == 0:\n            time.sleep(20)\n            os._exit(0)\n        return lock\n"
    body += "    prepare.referee.take_device = take\n"
    pid, _ = started(project, text.replace("if __name__ == '__main__':\n", "if __name__ == '__main__':\n" + body))
    os.kill(pid, signal.SIGKILL)
    stage.referee(project, "wait")
    commit(project, version(seeds(1.0)), "quick")
    assert train(project)[0] == 0


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_watchdog_ends_a_hung_run_and_its_descendants_and_nothing_else(project):
    """The run hangs in a C call; a grandchild ignores SIGTERM, another has left its session and lost its parent."""
    scripts = {
        "stubborn": "signal.signal(signal.SIGTERM, signal.SIG_IGN); open(f'{os.getpid()}.pid', 'w'); time.sleep(99)",
        "child": "subprocess.Popen([sys.executable, 'stubborn.py']); time.sleep(99)",
        "parting": "subprocess.Popen([sys.executable, 'stubborn.py'], start_new_session=True)",
    }
    for name, text in scripts.items():
        (project / f"{name}.py").write_text(f"import os, signal, subprocess, sys, time\n{text}\n")
    (project / "train.py").write_text(
        "import ctypes, subprocess, sys\nfrom prepare import referee\n\n\n"
        "def main():\n"
        "    subprocess.Popen([sys.executable, 'child.py'])\n"
        "    subprocess.run([sys.executable, 'parting.py'])\n"
        "    ctypes.PyDLL(None).sleep(99)  # holds the interpreter lock: no thread of this process can run\n\n\n"
        "referee.guard(main, lambda: 'cpu', 4)\n"
    )
    bystander = subprocess.Popen(["sleep", "60"])  # in the process group that the run inherits
    status, out = train(project)
    assert status == -signal.SIGKILL
    assert last(out).startswith("FAIL: timeout: ")
    pids = [int(path.stem) for path in project.glob("*.pid")]
    time.sleep(0.2)
    assert len(pids) == 2
    assert not any(map(alive, pids))
    assert bystander.poll() is None
    bystander.kill()


def test_watchdog_leaves_with_the_run(project):
    pid, log = started(project, version(seconds=30))
    os.kill(pid, signal.SIGKILL)
    wait_for(log, "FAIL: error: the run was killed")
    table = subprocess.run(["ps", "-Ao", "args="], capture_output=True, text=True).stdout
    assert f"watch {pid} " not in table


def test_without_git_a_run_scores_but_does_not_compare(project):
    shutil.rmtree(project / ".git")
    status, out = train(project, GIT_CEILING_DIRECTORIES=str(project.parent))
    assert status == 0
    assert last(out).startswith("verdict:          none (train.py is in no commit (fatal: not a git repository")
    assert "next: uv run referee.py" not in out


def test_an_uncommitted_change_does_not_compare(project):
    (project / "train.py").write_text(version(seeds(0.5)))
    git(project, "update-index", "--assume-unchanged", "train.py")  # hides it from git status
    assert last(train(project)[1]) == "verdict:          none (train.py is not what HEAD holds; commit it first)"


def test_a_copy_elsewhere_is_not_recorded_under_this_commit(project):
    copy = project.parent / "copy"
    copy.mkdir()
    (copy / "train.py").write_text(version(seeds(0.5)))
    environment = stage.environment(PYTHONPATH=str(project))
    done = subprocess.run(
        [sys.executable, "../copy/train.py"], cwd=project, env=environment, capture_output=True, text=True
    )
    assert "none (train.py is in no commit" in done.stdout
    assert records(project) == []


def test_another_script_is_no_experiment(project):
    (project / "other.py").write_text(version(seeds(0.5)))
    git(project, "add", "other.py")
    git(project, "commit", "-qm", "another")
    command = [sys.executable, "other.py"]
    out = subprocess.run(command, cwd=project, env=stage.environment(), capture_output=True, text=True).stdout
    assert "none (the run was of other.py; only train.py is an experiment)" in out


def test_a_module_beside_train_does_not_compare(project):
    (project / "helper.py").write_text("RATE = 1\n")
    commit(project, "import helper\n" + version(seeds(0.5)), "in two files")
    assert "none (helper.py was imported; all of an experiment stands in train.py)" in train(project)[1]


def test_a_score_is_printed_even_where_it_cannot_be_recorded(project):
    (project / "runs").write_text("a file in the way")
    status, out = train(project)
    assert status == 0
    assert "val_bpb:          1.000000" in out
    assert "none (the run could not be written into" in last(out)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"score": 1}', "[" * 10**5]
    + [json.dumps({"time": "x", "commit": ["a"], "seed": 42, "score": 1.0, "fail": None, "code": "x"})]
    + [json.dumps({"time": "x", "commit": "a" * 40, "seed": "42", "score": 1e999, "fail": None, "code": "x"})],
)
def test_a_damaged_record_spoils_no_later_run(project, text):
    (project / "runs").mkdir()
    (project / "runs/damaged.json").write_text(text)
    status, out = train(project)
    assert status == 0
    assert "runs: 1 damaged files are skipped" in out
    assert "baseline (" in last(out)
    assert "1 damaged files" in stage.referee(project, "status")[1]


def test_an_old_log_of_runs_is_mentioned_once(project):
    (project / "runs.jsonl").write_text("{}\n")
    assert "runs.jsonl: from an earlier version" in train(project)[1]
    assert "runs.jsonl" not in train(project, SEED="43")[1]


def test_rows_that_cannot_be_read_are_named_in_the_run_and_no_keep_is_assumed(project):
    (project / "results.tsv").write_text("commit\tval_bpb\tmemory_gb\tstatus\tdescription\naaaaaaa 1.0 0.0 keep x\n")
    out = train(project)[1]
    assert "results.tsv: line 2 cannot be read" in out
    assert "none (no kept run compares; run the kept commit again)" in out


# -- commands


@pytest.mark.parametrize(
    "words, said",
    [
        (["go"], "invalid choice"),
        (["run", "--seed", "x"], "invalid int"),
        (["run", "--seed", "-1"], "whole number"),
        (["run", "--wait", "-1"], "seconds"),
        (["status", "nowhere"], "holds no train.py and no ruler.py"),
        (["status", "keep"], "belongs to log"),
        (["log", "keep", "discard"], "too many words"),
        (["log"], "has not run yet"),
        (["wait"], "no run has been started here"),
    ],
)
def test_bad_input_is_one_sentence_and_changes_nothing(project, words, said):
    before = sorted(project.rglob("*"))
    status, out = stage.referee(project, *words)
    assert status != 0
    assert len(out.strip().splitlines()) == 1
    assert out.startswith("error: ")
    assert said in out
    assert sorted(project.rglob("*")) == before


def test_run_refuses_what_is_not_committed(project):
    (project / "train.py").write_text(version(seeds(0.5)))
    assert "is changed but not committed; run: git commit -qam '<idea>'" in stage.referee(project, "run")[1]
    assert records(project) == []


def test_a_third_seed_that_keeps_is_said_to_be_logged_and_not_dropped(project):
    for _ in range(3):
        stage.referee(project, "run")
        stage.referee(project, "log")
    commit(project, version(seeds(0.9, 0.9001, 0.9002)), "better")
    for _ in range(2):
        stage.referee(project, "run")
        stage.referee(project, "log")
    out = stage.referee(project, "run")[1]
    assert "keep (gain +" in out
    assert last(out) == "next: uv run referee.py log"


def test_run_takes_the_next_seed_and_stops_when_there_is_none(project):
    for seed in (42, 43, 44):
        stage.referee(project, "run")
        assert "is not in results.tsv; run: uv run referee.py log" in stage.referee(project, "run")[1]
        stage.referee(project, "log")
        assert records(project)[-1]["seed"] == seed
    assert "has been run and logged" in stage.referee(project, "run")[1]
    assert "verdict" not in stage.referee(project, "run")[1]


def test_run_shows_score_steps_memory_and_verdict(project):
    out = stage.referee(project, "run")[1]
    for key in ("val_bpb:", "peak_vram_mb:", "num_steps:", "verdict:", "next:"):
        assert f"\n{key}" in out
    assert "a lot of noise" not in out


def test_log_writes_memory_note_and_header(project):
    commit(project, version(seeds(1.0), memory=2048.0), "base")
    stage.referee(project, "run")
    stage.referee(project, "log", "--note", "two\twords\n")
    text = (project / "results.tsv").read_text()
    assert text.startswith("commit\tval_bpb\tmemory_gb\tstatus\tdescription\n")
    assert rows(project)[0][1:] == ["1.000000", "2.0", "keep", "baseline (two words )"]


def test_a_slowed_run_is_to_be_run_again_and_is_not_logged(project):
    commit(project, version(seeds(1.0, 1.0014, 1.0007), steps=13), "base")
    stage.referee(project, "run")
    stage.referee(project, "log")
    slow = records(project)[0] | {"seed": 43, "ticks": 8, "pid": 1, "score": 1.3, "time": "2099-01-01T00:00:00.0Z"}
    (project / "runs/2099.json").write_text(json.dumps(slow))
    out = stage.referee(project, "status")[1]
    assert "slowed: 8 steps where seed 42 of the same file made 13" in out
    assert last(out) == "next: uv run referee.py run --seed 43"
    assert "1 runs that compare, 1 slowed ones left out" in out
    assert "does not count" in stage.referee(project, "log")[1]
    assert len(rows(project)) == 1


@pytest.mark.timeout(60)
def test_commands_are_quick_and_import_is_light(project):
    stage.referee(project, "run")
    record = records(project)[0]
    for number in range(300):
        (project / f"runs/{number:04}.json").write_text(json.dumps(record | {"pid": number, "seed": number + 100}))
    code = "import sys; import referee; print(sorted(set(sys.modules) & {'torch', 'numpy', 'prepare', 'argparse'}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
    assert done.stdout == "[]\n"
    began = time.monotonic()
    assert stage.referee(project, "status")[0] == 0
    assert time.monotonic() - began < 5  # 0.2 s where nothing else runs
