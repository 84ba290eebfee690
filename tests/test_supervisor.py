"""Runs in processes: by hand, by command, and of any metric; how they end, and what is noted of it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from stage import Stage, next_of, quick_referee, train_text

from referee import run


@pytest.fixture
def fresh(tmp_path):
    return Stage(tmp_path)


def by_hand(night, words="train.py", **more):
    """(exit status, output) of a script that is run by hand."""
    return night.shell(f"{sys.executable} {words}", **more)


def last(out):
    return out.rstrip("\n").splitlines()[-1]


def test_a_run_by_hand_has_a_record_and_a_verdict_and_leaves_nothing_else(fresh):
    status, out = by_hand(fresh)
    assert status == 0
    assert last(out).startswith("verdict:          baseline (mean")
    assert "ran before" not in last(out)
    (record,) = fresh.records
    assert record["commit"] == fresh.git("rev-parse", "HEAD")
    assert record["score"] == pytest.approx(1.0, abs=0.01)
    assert record["figures"]["ticks"] == 10
    assert fresh.git("status", "--porcelain") == ""
    (name,) = [path.name for path in (fresh.folder / "runs").glob("*.json")]
    assert re.fullmatch(rf"\d{{8}}T\d{{6}}\.\d+Z-{record['commit'][:7]}-42-.+-\d+\.json", name)


def test_a_record_is_there_before_the_run_ends(fresh):
    fresh.commit("slow", seconds=5)
    fresh.referee("run --wait 0")
    (record,) = fresh.records
    assert record["fail"]["kind"] == "lost"
    assert record["score"] is None
    os.kill(record["pid"], signal.SIGKILL)


def test_working_trees_share_the_records(fresh):
    fresh.git("worktree", "add", "-q", "--detach", "../other")
    subprocess.run([sys.executable, "train.py"], cwd=fresh.folder.parent / "other", env=fresh.environment)
    assert len(fresh.records) == 1


ENDS = {
    "oom": ("oom", "out of memory"),
    "nan": ("nan", "step 3"),
    "harness": ("harness", "the model sees the future"),
    "error": ("error", "ValueError"),
    "exit": ("error", "called exit"),
    "timeout": ("timeout", "not done 3 s after the start"),
    "lost": ("lost", "was killed"),
    "preempted": ("preempted", "by a signal"),
    "segfault": ("error", "SIGSEGV"),
}


@pytest.mark.parametrize("does", ENDS)
def test_an_end_without_a_score_is_one_line_and_one_record(fresh, does):
    kind, said = ENDS[does]
    fresh.commit("fails", does=does)
    status, out = by_hand(fresh)
    assert status == 1
    assert last(out).startswith(f"FAIL: {kind}: ")
    assert said in last(out)
    assert out.count("FAIL:") == 1
    assert [record["fail"]["kind"] for record in fresh.records] == [kind]
    assert ("Traceback" in out) == (does == "error")


def test_a_first_run_that_is_too_slow_may_have_compiled(fresh):
    fresh.commit("hangs", does="timeout")
    assert "empty compile cache" in by_hand(fresh)[1]
    fresh.commit("runs")
    by_hand(fresh)
    fresh.commit("hangs again", does="timeout")
    assert "look for a hang" in by_hand(fresh)[1]


@pytest.mark.parametrize(
    "error, kind",
    [
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "oom"),
        (RuntimeError("HIP out of memory"), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "oom"),
        (KeyboardInterrupt(), "preempted"),
        (run.RefereeError("x", "busy"), "busy"),
    ],
)
def test_kinds_of_failures(error, kind):
    assert run.failure(error)[0] == kind


@pytest.mark.parametrize(
    "env",
    [{"SEED": "abc"}, {"SEED": "-1"}, {"SEED": str(2**64)}, {"SEED": "9" * 5000}, {"SEED": ""}]
    + [{"TIME_BUDGET": text} for text in ("0", "5m", "9" * 400, "1.5")],
    ids=str,
)
def test_malformed_variables_are_refused_by_name(fresh, env):
    status, out = by_hand(fresh, **env)
    (name,) = env
    assert status == 1
    assert last(out).startswith(f"FAIL: harness: {name} is '")
    assert fresh.records == []


def started(night, **more):
    """A slow run by hand: its supervisor, once the script is at work."""
    night.commit("slow", seconds=30, **more)
    log = open(night.folder / "run.log", "w")
    supervisor = subprocess.Popen(
        [sys.executable, "train.py"], cwd=night.folder, env=night.environment, stdout=log, stderr=log
    )
    for _ in range(200):
        time.sleep(0.05)
        if "warming up" in (night.folder / "run.log").read_text():
            return supervisor
    raise AssertionError("it does not start")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_even_twice_end_the_run_and_are_no_crash(fresh, number):
    supervisor = started(fresh)
    supervisor.send_signal(number)
    supervisor.send_signal(number)  # uv forwards it twice
    assert supervisor.wait(timeout=20) == 1
    assert [record["fail"]["kind"] for record in fresh.records] == ["preempted"]
    assert last((fresh.folder / "run.log").read_text()).startswith("FAIL: preempted: ")


def test_a_device_is_taken_once_and_freed_with_its_holder(fresh):
    supervisor = started(fresh)
    status, out = by_hand(fresh)
    assert status == 1
    assert last(out).startswith("FAIL: busy: process ")
    supervisor.send_signal(signal.SIGKILL)  # its child dies with it
    supervisor.wait()
    time.sleep(0.3)
    fresh.commit("quick")
    assert by_hand(fresh)[0] == 0


HANGS = """
import ctypes, os, signal, subprocess, sys, time
from referee import run

STUBBORN = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open(f'{os.getpid()}.pid', 'w'); time.sleep(99)"

def main():
    subprocess.Popen([sys.executable, "-c", STUBBORN])
    subprocess.run([sys.executable, "-c", f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], start_new_session=True)"])
    ctypes.PyDLL(None).sleep(99)  # holds the interpreter lock: no thread of this process can run

if __name__ == "__main__":
    run.guard(main, lambda: "cpu")
"""


def test_at_the_limit_a_hung_run_ends_with_all_its_descendants_and_nothing_else(fresh):
    """A descendant ignores SIGTERM, another has left the session and lost its parent."""
    (fresh.folder / "train.py").write_text(HANGS)
    fresh.git("commit", "-qam", "hangs")
    bystander = subprocess.Popen(["sleep", "60"])
    assert last(by_hand(fresh)[1]).startswith("FAIL: timeout: ")
    pids = [path.stem for path in fresh.folder.glob("*.pid")]
    assert len(pids) == 2
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert bystander.poll() is None
    bystander.kill()


# -- why a score does not count


def test_without_git_a_run_scores_but_does_not_compare(fresh):
    shutil.rmtree(fresh.folder / ".git")
    status, out = by_hand(fresh, GIT_CEILING_DIRECTORIES=str(fresh.folder.parent))
    assert status == 0
    assert last(out).startswith("verdict:          none (train.py is in no commit")


def test_an_uncommitted_change_that_git_does_not_see(fresh):
    (fresh.folder / "train.py").write_text(train_text({0: 0.5}))
    fresh.git("update-index", "--assume-unchanged", "train.py")
    assert "none (train.py is not what HEAD holds" in by_hand(fresh)[1]


def test_a_copy_elsewhere_is_not_recorded_under_this_commit(fresh):
    copy = fresh.folder.parent / "copy"
    copy.mkdir()
    shutil.copy(fresh.folder / "train.py", copy)
    out = by_hand(fresh, "../copy/train.py", PYTHONPATH=str(fresh.folder))[1]
    assert "none (train.py is in no commit" in out
    assert fresh.records == []


def test_another_script_is_no_experiment(fresh):
    shutil.copy(fresh.folder / "train.py", fresh.folder / "other.py")
    fresh.git("add", "other.py")
    fresh.git("commit", "-qm", "another")
    assert "only train.py is an experiment" in by_hand(fresh, "other.py")[1]


@pytest.mark.parametrize("module", ["helper", "parts.helper"])
def test_a_module_of_its_own_does_not_compare(fresh, module):
    path = fresh.folder / f"{module.replace('.', '/')}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text("RATE = 1\n")
    (fresh.folder / "train.py").write_text(f"import {module}\n" + train_text())
    fresh.git("commit", "-qam", "in two files")
    assert f"{path.relative_to(fresh.folder)} was imported" in by_hand(fresh)[1]


def test_what_lint_finds_by_hand_is_a_doubt(fresh):
    (fresh.folder / "train.py").write_text("import threading\n" + train_text())
    fresh.git("commit", "-qam", "sly")
    assert "none (train.py line 1: " in by_hand(fresh)[1]
    assert fresh.records[0]["why_not"]


def test_a_record_of_its_own_making_is_noticed(fresh):
    body = "\n\ndef cheat():\n    open('runs/mine.json', 'w').close()\n\n\nend = cheat\n"
    stand_in = fresh.folder / "prepare.py"
    stand_in.write_text(stand_in.read_text().replace("        end(deed)\n", "        __import__('__main__').cheat()\n"))
    (fresh.folder / "train.py").write_text(train_text().replace("if __name__", body + "if __name__"))
    fresh.git("commit", "-qam", "sly")
    assert "the harness's records were written past it" in by_hand(fresh)[1]


def test_a_replaced_function_of_the_frozen_half_is_noticed(fresh):
    stand_in = fresh.folder / "prepare.py"
    stand_in.write_text(stand_in.read_text() + "\n\nfrom referee import audit\n\naudit.seal(run)\n")
    fresh.git("commit", "-qam", "sealed")
    assert "replaced" not in by_hand(fresh)[1]
    sly = "def reach(x):\n    return x\n\n\nreach([prepare])[0].run.step_figures = lambda clock: {}\n"
    (fresh.folder / "train.py").write_text(train_text().replace("NOTE", sly + "NOTE", 1))
    fresh.git("commit", "-qam", "sly")
    assert "run.step_figures was replaced while the run went on" in by_hand(fresh)[1]


def test_a_score_is_kept_where_the_record_cannot_be_overwritten(fresh):
    stand_in = fresh.folder / "prepare.py"
    full = "        run.this_run.path.parent.rename('gone')\n        Path('runs').write_text('in the way')\n        end(deed)\n"
    stand_in.write_text(stand_in.read_text().replace("        end(deed)\n", full))
    fresh.git("commit", "-qam", "the disk is full")
    out = by_hand(fresh)[1]
    assert "val_bpb:          1.0" in out
    spare = re.search(r"it is (\S+): copy it", out)[1]
    assert json.loads(Path(spare).read_text())["score"] is not None


@pytest.mark.parametrize("value", [numpy.int64(7), numpy.float32(7), torch.tensor(7)])
def test_a_number_of_another_type_is_written_as_a_number(value):
    assert json.loads(json.dumps(run.plain({"figure": value}))) == {"figure": 7}


def test_what_json_does_not_know_is_written_as_text():
    assert "object" in json.dumps(run.plain({"figure": {"a": [object()]}}))


# -- the command line


@pytest.mark.parametrize(
    "words, said",
    [
        ("go", "invalid choice"),
        ("run --seed x", "invalid int"),
        ("run --seed -1", "whole number"),
        ("run --wait -1", "seconds"),
        ("status nowhere", "holds no train.py and no ruler.py"),
        ("status keep", "belongs to log"),
        ("log keep discard", "too many words"),
        ("log keep", "has not run yet"),
        ("wait", "no run has been started here"),
    ],
)
def test_bad_input_is_one_sentence_and_changes_nothing(fresh, words, said):
    before = sorted(fresh.folder.rglob("*"))
    status, out = fresh.shell(f"uv run referee {words}")
    assert status != 0
    assert out.startswith("error: ")
    assert len(out.strip().splitlines()) == 1
    assert said in out
    assert sorted(fresh.folder.rglob("*")) == before


def test_run_refuses_what_is_not_committed(fresh):
    (fresh.folder / "train.py").write_text(train_text({0: 0.5}))
    assert "is changed but not committed" in fresh.referee("run")
    assert fresh.records == []


def test_an_import_is_light_and_a_command_too(fresh):
    code = "import sys, referee; print(sorted(set(sys.modules) & {'torch', 'numpy', 'prepare', 'referee.night'}))"
    assert fresh.shell(f'{sys.executable} -c "{code}"')[1] == "[]\n"


# -- any metric

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
def ruled(tmp_path):
    """An experiment below the top of a repository: a ruler, a program to edit, frozen data."""
    night = Stage(tmp_path)
    top = night.folder
    night.folder = top / "faults"
    (night.folder / "data").mkdir(parents=True)
    (night.folder / "referee").symlink_to(quick_referee())
    (night.folder / "ruler.py").write_text(RULER)
    (night.folder / "program.py").write_text("def score():\n    return 9\n")
    (night.folder / "data/facts.txt").write_text("one\n")
    night.git("add", "-A")
    night.git("commit", "-qm", "start")
    return night


def edit(night, text, subject, name="program.py"):
    (night.folder / name).write_text(text)
    night.git("commit", "-qam", subject)
    return night.referee("run")


def test_a_ruler_prints_and_records_its_metric(ruled):
    out = ruled.referee("run")
    assert "faults:           9.000000" in out
    assert "figure:           7" in out
    (record,) = ruled.records
    assert (record["metric"], record["score"], record["figures"]["shown"]) == ("faults", 9.0, {"figure": 7})
    assert ruled.git("status", "--porcelain") == ""


def test_two_equal_runs_say_that_there_is_no_noise_and_any_gain_is_kept(ruled):
    ruled.follow()
    assert len(ruled.records) == 2
    assert "verdict:          keep" in edit(ruled, "def score():\n    return 8\n", "one fewer")
    ruled.referee("log")
    assert "verdict:          discard" in edit(ruled, "def score():\n    return 8.5\n", "worse")
    ruled.follow()
    assert (ruled.folder / "program.py").read_text().endswith("return 8\n")


def test_higher_may_be_better(ruled):
    edit(ruled, RULER.replace("budget=20", "budget=20, lower_is_better=False"), "up", "ruler.py")
    ruled.follow()
    assert "verdict:          keep" in edit(ruled, "def score():\n    return 10\n", "more")


def test_a_metric_that_cannot_get_better_ends_the_night(ruled):
    edit(ruled, RULER.replace("budget=20", "budget=20, perfect=0"), "ends at 0", "ruler.py")
    ruled.follow()
    edit(ruled, "def score():\n    return 0\n", "none left")
    assert "write the report" in next_of(ruled.referee("log"))


@pytest.mark.parametrize("name", ["data/facts.txt", "ruler.py"])
def test_an_idea_that_changes_what_measures_it_is_refused(ruled, name):
    ruled.follow()
    (ruled.folder / name).write_text((ruled.folder / name).read_text() + "\n# two\n")
    out = edit(ruled, "def score():\n    return 1\n", "with a changed test")
    assert f"the idea changes {name} besides program.py" in out
    out = ruled.shell(f"{sys.executable} ruler.py")[1]
    assert f"none ({name} was edited" in out


def test_a_changed_test_is_another_table(ruled):
    ruled.referee("run")
    edit(ruled, "two\n", "another test", "data/facts.txt")
    first, second = ruled.records
    assert first["harness"] != second["harness"]


@pytest.mark.parametrize(
    "body, kind, said",
    [
        ("raise KeyError('x')", "error", "KeyError"),
        ("time.sleep(60)", "timeout", "not done 1 s after the start"),
        ("return math.nan", "nan", "the score is nan"),
        ("return None", "error", "returned None"),
        ("return True", "error", "no number"),
        ("return 1.0, 3", "error", "figures are no dict"),
        ("raise referee.RefereeError('page 3 is wrong')", "harness", "page 3 is wrong"),
        ("subprocess.run([sys.executable, '-c', 'exit(1)'], check=True)", "error", "CalledProcessError"),
    ],
)
def test_a_ruler_that_gives_no_score_ends_in_the_matching_line(ruled, body, kind, said):
    text = RULER.replace("    import program\n", f"    {body}\n")
    out = edit(ruled, text.replace("=20", "=1") if kind == "timeout" else text, "broken", "ruler.py")
    line = next(line for line in out.splitlines() if line.startswith("FAIL: "))
    assert line.startswith(f"FAIL: {kind}: ")
    assert said in line


@pytest.mark.parametrize(
    "old, new, said",
    [
        ('"faults"', '"faults a page"', "the metric is called"),
        ('["program.py"]', '["missing.py"]', "there is no missing.py"),
        ('["program.py"]', "[]", "with one at least"),
        ('["program.py"]', '["../program.py"]', "is no path inside"),
        ("budget=20", "budget=0", "give seconds above 0"),
        ("budget=20", "perfect='x'", "cannot be bettered"),
    ],
)
def test_a_ruler_that_cannot_be_meant_is_one_sentence(ruled, old, new, said):
    out = edit(ruled, RULER.replace(old, new), "wrong", "ruler.py")
    assert said in out
    assert len(out.strip().splitlines()) == 1
    assert ruled.records == []


def test_outside_git_is_one_sentence(ruled):
    shutil.move(ruled.folder, ruled.folder.parents[1] / "outside")
    ruled.folder = ruled.folder.parents[1] / "outside"
    out = ruled.referee("run")
    assert "run: git init" in out
    assert not (ruled.folder / "runs").exists()


def test_the_folder_may_be_an_argument(ruled):
    ruled.folder = ruled.folder.parent
    assert "faults: " in ruled.referee("run faults")
    assert next_of(ruled.referee("status faults")) == "uv run referee run --seed 43 faults  # run 2 of 3"
