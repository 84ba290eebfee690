"""Nights in commands, alone and in slots: whatever the state is, `next:` leads to the next idea and nothing is lost."""

import datetime
import os
import shutil
import subprocess
import sys
import time

import pytest
from stage import MODES, Stage, copied, next_of, train_text

# -- the follower

MENDED = train_text({0: -0.5}, note="mended")  # a loss: what is mended is dropped


def mender(night):
    """What an agent does with a line that is for it to read: it mends train.py and runs what stands behind `then`."""

    def mend(line):
        (night.folder / "train.py").write_text(MENDED)
        return line.replace("<idea>", "mended").split("then ")[-1].split(";")[0]

    return mend


STATES = {  # what its attempts do; the last word on such an idea alone, and in slots
    "never ran": ("score", "discard", "discard"),
    "lost once": ("lost score", "discard", "discard"),
    "lost for ever": ("lost", "crash", "crash"),
    "preempted twice": ("preempted preempted score", "discard", "discard"),
    "busy": ("busy busy busy busy score", "discard", "discard"),
    "oom": ("oom", "discard", "crash"),
    "nan": ("nan", "discard", "crash"),
    "error": ("error", "discard", "crash"),
    "harness": ("harness", "discard", "crash"),
    "timeout": ("timeout", "crash", "crash"),
    "crash outside Python": ("segfault", "discard", "crash"),
    "no score": ("exit", "discard", "crash"),
    "doubt": ("doubt", "discard", "discard"),
    "slowed once": ("slowed score", "discard", "discard"),
    "slowed for ever": ("slowed", "discard", "discard"),
}


@pytest.mark.parametrize("state", STATES)
def test_every_state_of_an_idea_leads_to_the_next_one(night, state):
    does, word_alone, word_in_slots = STATES[state]
    start = night.head
    night.idea("an idea", {0: -0.5}, does)
    night.follow(mender(night))
    assert night.head == start
    assert night.git("status", "--porcelain") == ""
    assert night.rows[-1][3] == (word_in_slots if night.slots else word_alone)
    assert f"autoresearch/{night.rows[-1][0]}"[13:] in night.refs


def test_the_row_of_a_score_that_does_not_count_says_so(slots):
    slots.idea("an idea", {0: 0.5}, "doubt")
    slots.follow()
    assert "does not count: a doubt of this test" in slots.rows[-1][4]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("state", ["lost for ever", "error", "timeout", "doubt", "slowed for ever"])
def test_a_baseline_is_run_again_or_mended_and_never_taken_off(tmp_path, state, mode):
    night = Stage(tmp_path, train_text(does=STATES[state][0]), slots=mode == "slots")
    project = night.git("rev-parse", "HEAD")
    lines = night.follow(mender(night))
    assert night.git("merge-base", project, "HEAD") == project
    assert night.git("status", "--porcelain") == ""
    assert not [line for line in lines if "crash" in line.split("#")[0]]
    assert [row[3] for row in night.rows] == ["keep"] * 3


GROUNDS = [{"PRETEND_DEVICE": "another"}, {"PRETEND_HARNESS": "89abcdef"}]


@pytest.mark.parametrize("ground", GROUNDS, ids=["device", "harness"])
def test_on_new_ground_the_base_runs_again_before_the_next_idea(night, ground):
    night.more = ground
    idea = night.idea("clearly better", {0: 0.1})
    night.follow()
    on_ground = [run for run in night.records if (run["device"], run["harness"]) != ("cpu (a stand-in)", "01234567")]
    base = night.git("rev-list", "HEAD").splitlines()[-1]
    seeds = [run["seed"] for run in on_ground if run["commit"] == base]
    assert len(set(seeds)) == len(seeds) >= 2
    assert night.words(idea) == (["keep"] if night.slots else ["discard"])  # alone it was put aside


def test_a_log_of_another_branch_is_named(night):
    night.idea("better", {0: 0.1})
    night.follow()
    night.git("checkout", "-q", "-b", "autoresearch/elsewhere", "main")
    night.commit("an idea of another night", {1: 0.1}, note="elsewhere")
    night.git("branch", "-q", "-D", "autoresearch/nov21")
    log = (night.folder / "results.tsv").read_text().splitlines()
    (night.folder / "results.tsv").write_text("\n".join(log[:1] + log[4:]) + "\n")
    night.slots = False
    shutil.rmtree(night.folder / "runs")
    night.referee("run")
    assert "for a new night move results.tsv away" in night.next


# -- killed at any moment

KILLED = """
import os, subprocess, sys
left = int(sys.argv[1])

def deadly(function):
    def before(*args, **words):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)
        return function(*args, **words)
    return before

os.replace, os.fork, subprocess.run = deadly(os.replace), deadly(os.fork), deadly(subprocess.run)
sys.path.insert(0, ".")
from referee.commands import main
status = main(sys.argv[2:])
sys.exit(7 if left > 0 else status)
"""


def killed_before(night, count, words):
    """A command that dies before its count-th effect (a git process, a file renamed, a fork); whether it did."""
    night.shell("true")
    command = [sys.executable, "-B", "-c", KILLED, str(count), *words]
    done = subprocess.run(command, cwd=night.folder, env={**night.environment, **night.more}, capture_output=True)
    return done.returncode != 7


def finish_killed(night):
    """What `next:` leads to after a kill, git's own lock aside."""
    lock = night.folder / ".git/index.lock"
    lock.unlink(missing_ok=True)
    time.sleep(0.05)
    night.work()
    return night.follow(mender(night))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("gain, word", [(0.1, "keep"), (-0.1, "discard")])
@pytest.mark.parametrize("mode", MODES)
def test_log_killed_before_any_of_its_effects_is_finished_by_next(begun, tmp_path, mode, gain, word):
    base = copied(begun[mode], tmp_path / "base")
    commit = base.idea("an idea", {0: gain})
    (base.folder / "notes.txt").write_text("untracked")
    for count in range(1, 30):
        night = copied(base, tmp_path / f"{count}")
        killed = killed_before(night, count, ["log"])
        finish_killed(night)
        assert night.words(commit) == [word], count
        assert (night.head == commit) == (word == "keep"), count
        assert (commit in night.refs) == (word == "discard"), count
        assert night.git("status", "--porcelain").split() == ["??", "notes.txt"], count
        if not killed:
            break
    assert count >= 4


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", MODES)
def test_a_start_killed_before_any_of_its_effects_is_finished_by_next(begun, tmp_path, mode):
    base = copied(begun[mode], tmp_path / "base")
    commit = base.commit("an idea", {0: -0.1})
    for count in range(1, 30):
        night = copied(base, tmp_path / f"{count}")
        killed = killed_before(night, count, ["submit" if mode == "slots" else "run"])
        finish_killed(night)
        assert night.words(commit) == ["discard"], count
        assert len(night.rows) == 4, count
        if not killed:
            break
    assert count >= 4


# -- alone


def test_a_run_outlives_the_agent_and_its_process_group(alone):
    alone.commit("slow", {0: -0.1}, seconds=2)
    agent = subprocess.Popen(
        [sys.executable, "-B", "referee", "run"], cwd=alone.folder, env=alone.environment, start_new_session=True
    )
    time.sleep(1)
    os.killpg(agent.pid, 9)
    agent.wait()
    assert alone.next == "uv run referee wait"
    assert "a run is going on" in alone.referee("run")
    assert "a run is going on" in alone.referee("log")
    assert "verdict:          discard" in alone.referee("wait")


def test_a_run_that_is_killed_has_a_record_and_is_run_again(alone):
    alone.commit("slow", {0: -0.1}, "score", seconds=30)
    assert next_of(alone.referee("run --wait 0")) == "uv run referee wait"
    os.kill(alone.records[-1]["pid"], 9)
    time.sleep(0.2)
    assert alone.records[-1]["fail"]["kind"] == "lost"
    assert alone.next.startswith("uv run referee run --seed 42  #")
    assert len(alone.rows) == 3


def test_a_repeated_log_changes_nothing(night):
    night.idea("worse", {0: -0.1})
    night.referee("log")
    before = night.rows, night.git("rev-parse", "HEAD"), night.refs
    for words in ("log", "log discard", "log crash", "log"):
        night.referee(words)
    assert before == (night.rows, night.git("rev-parse", "HEAD"), night.refs)


def test_a_keep_is_dropped_on_second_thoughts_by_its_name_only(alone):
    start = alone.head
    better = alone.idea("better, with three times the memory", {0: 0.1})
    alone.referee("log")
    assert f"uv run referee log {better} discard" in alone.referee("log discard")
    assert alone.head == better
    alone.referee(f"log {better} discard")
    assert alone.head == start
    assert alone.words(better) == ["keep", "discard"]


def test_a_word_of_the_agents_own(alone):
    worse = alone.idea("worse, but simpler", {0: -0.1})
    alone.referee("log keep --note 'two\twords'")
    assert alone.head == worse
    assert alone.rows[-1][3:] == ["keep", "worse, but simpler (two words)"]


def test_an_edit_in_progress_is_kept_when_the_commit_under_it_is_dropped(alone):
    worse = alone.idea("worse", {0: -0.1})
    edit = train_text(note="begun too early")
    (alone.folder / "train.py").write_text(edit)
    alone.referee("log")
    assert alone.git("show", f"refs/autoresearch/{worse}-edit:train.py") == edit.strip()
    assert alone.git("status", "--porcelain") == ""


def test_commits_of_one_idea_are_dropped_together(night):
    start = night.head
    night.commit("first half", {0: -0.1})
    night.idea("second half", {0: -0.1, 1: -0.1})
    night.follow()
    assert night.head == start
    assert [row[3] for row in night.rows[3:]] == ["discard"]


def test_other_files_in_an_idea_are_refused_and_the_command_takes_them_out(night):
    (night.folder / ".gitignore").write_text("a human's edit\n")
    night.commit("an idea, and a human's edit swept in", {0: 0.1})
    out = night.referee("submit" if night.slots else "run")
    night.shell(out.split("take that out: ")[1])
    assert (night.folder / ".gitignore").read_text() == "a human's edit\n"
    assert night.git("diff", "--name-only", "HEAD~1", "HEAD") == "train.py"


def test_what_lint_finds_is_not_run(night):
    commit = night.commit("sly", {0: 0.1}, note="sly")
    text = (night.folder / "train.py").read_text()
    (night.folder / "train.py").write_text(text.replace("import prepare\n", "import prepare\nimport threading\n"))
    night.git("commit", "-qa", "--amend", "--no-edit")
    out = night.referee("submit" if night.slots else "run")
    assert "train.py line 2" in out
    assert commit not in str(night.records)


def test_a_lock_that_a_killed_git_left_is_removed_and_a_fresh_one_is_not(night):
    lock = night.folder / ".git/index.lock"
    lock.write_text("")
    assert night.next.startswith("uv run referee status  #")
    assert lock.exists()
    os.utime(lock, (time.time() - 60, time.time() - 60))
    assert "the next idea" in night.next
    assert not lock.exists()


def test_a_control_after_sixteen_experiments(alone):
    last = datetime.datetime.fromisoformat(alone.records[-1]["time"])
    for number in range(16):
        later = (last + datetime.timedelta(milliseconds=number + 1)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        alone.forge(0, commit=f"{number:040x}", code=f"{number}", pid=1000 + number, time=later)
    assert alone.next.startswith("uv run referee run --seed 45  # a control")
    alone.follow()
    assert alone.records[-1]["seed"] == 45
    assert alone.rows[-1][3:] == ["keep", "baseline"]


def test_one_run_decides_and_says_how_sure_it_is(alone):
    better = alone.idea("better", {0: 0.01}, steps=8)
    assert "sd, keep above 0.5" in alone.out
    assert "lines:            +2 -2" in alone.out
    assert "num_steps:        8 (its base 10)" in alone.out
    alone.referee("log")
    assert alone.head == better
    assert alone.words(better) == ["keep"]


def test_the_simpler_file_may_win_and_next_says_so(alone):
    middle = sum(run["score"] for run in alone.records) / 3 + 1e-6
    text = train_text(score=middle).replace("IDEA_9 = 0.0\n", "").replace(" - IDEA_9", "")
    (alone.folder / "train.py").write_text(text)
    alone.git("commit", "-qam", "one line less")
    alone.referee("run")
    assert "takes out 1 lines" in alone.next
    assert "log keep" in alone.next


# -- when it ends


@pytest.mark.parametrize("words", ["--hours 0", "--runs 1", "--target 1.5"])
def test_until(alone, words):
    alone.referee(f"until {words}")
    alone.idea("worse", {0: -0.1})
    alone.referee("log")
    assert "write the report" in alone.next
    assert "the next idea" in next_of(alone.referee("until"))


def test_status_for_programs(night):
    import json

    facts = json.loads(night.referee("status --json"))
    assert len(facts["rows"]) == 3
    assert "the next idea" in facts["next"]


# -- damage


@pytest.mark.parametrize("damage", ["gone", "empty", "header"])
def test_a_log_that_is_lost_is_written_again_from_the_records(alone, damage):
    alone.idea("better", {0: 0.1})
    alone.referee("log")
    alone.idea("worse", {1: -0.1})
    alone.referee("log")
    words = [row[:2] + row[3:4] for row in alone.rows]
    log = alone.folder / "results.tsv"
    header = log.read_text().splitlines()[0]
    log.write_text({"gone": "", "empty": "", "header": header + "\n"}[damage])
    if damage == "gone":
        log.unlink()
    assert alone.next.startswith("uv run referee log --restore  #")
    alone.follow()
    assert [row[:2] + row[3:4] for row in alone.rows] == words


def test_line_ends_and_missing_descriptions_are_read(alone):
    log = alone.folder / "results.tsv"
    rows = ["\t".join(row[:4]) for row in alone.rows]
    log.write_text("\r".join(["commit\tval_bpb\tmemory_gb\tstatus\tdescription", *rows]) + "\r")
    assert "the next idea" in alone.next


@pytest.mark.parametrize("score", [1e308, 10**400, "1", None, True])
def test_a_damaged_record_spoils_nothing(alone, score):
    alone.forge(score=score, pid=9)
    out = alone.referee("status")
    assert "1 damaged files" in out
    assert "the next idea" in out


def test_records_of_the_version_before_are_named_and_the_base_runs_again(alone):
    for path in (alone.folder / "runs").glob("*.json"):
        path.write_text(path.read_text().replace('"format": 2', '"format": 1'))
    assert "3 files of an earlier version" in alone.referee("status")
    alone.follow()
    assert len(alone.records) == 6


def test_a_results_tsv_that_is_no_file_is_one_sentence(alone):
    (alone.folder / "results.tsv").unlink()
    (alone.folder / "results.tsv").mkdir()
    status, out = alone.shell("uv run referee status")
    assert status == 1
    assert out.startswith("error: ")


def test_an_empty_file_in_the_place_of_runs_counts_as_absent(tmp_path):
    night = Stage(tmp_path)
    shutil.rmtree(night.folder / "runs")
    (night.folder / "runs").write_text("")
    assert "verdict:          baseline" in night.referee("run")


def test_records_that_cannot_be_written_are_seen_before_the_training(tmp_path):
    night = Stage(tmp_path)
    shutil.rmtree(night.folder / "runs")
    (night.folder / "runs").write_text("in the way")
    status, out = night.shell("uv run referee run")
    assert status == 1
    assert "could not be recorded" in out


# -- other people's settings

HOSTILE = """
[user]
    name = t
    email = t@example.org
    signingkey = nobody
[commit]
    gpgsign = true
[log]
    showSignature = true
    mailmap = true
    decorate = full
[color]
    ui = always
[core]
    autocrlf = true
    hooksPath = {hooks}
    abbrev = 12
[diff]
    external = false
    noprefix = true
    relative = true
    renames = copies
[status]
    short = true
    branch = true
[merge]
    ff = false
    verifySignatures = true
[format]
    pretty = oneline
[core]
    pager = false
[i18n]
    logOutputEncoding = utf-16
"""


def test_a_hostile_git_configuration_changes_nothing(begun, tmp_path):
    for mode in MODES:
        night = copied(begun[mode], tmp_path / mode)
        hooks = tmp_path / mode / "hooks"
        hooks.mkdir()
        for hook in ("pre-commit", "reference-transaction", "post-checkout", "pre-merge-commit"):
            (hooks / hook).write_text("#!/bin/sh\nexit 1\n")
            (hooks / hook).chmod(0o755)
        config = tmp_path / mode / "config"
        config.write_text(HOSTILE.format(hooks=hooks))
        better = night.commit("better", {0: 0.1})
        night.commit("and more", {0: 0.1, 1: 0.1})
        night.more = {"GIT_CONFIG_GLOBAL": str(config), "GIT_EXTERNAL_DIFF": "false", "GIT_PAGER": "false"}
        assert "Traceback" not in night.referee("status")
        night.follow()
        assert night.branch[-1] == "start"
        assert night.rows[-1][3] == "keep"
        assert better
        night.more = {}
        worse = night.commit("worse", {2: -0.1}, note="worse")
        night.more = {"GIT_CONFIG_GLOBAL": str(config)}
        night.follow()
        assert night.words(worse) == ["discard"]


@pytest.mark.parametrize("flag", ["-OO", "-X utf8=0"])
def test_status_prints_whatever_the_terminal_can_show(alone, flag):
    alone.idea("worse \u2603", {0: -0.1})
    alone.referee("log")
    line = f"{sys.executable} {flag} -B referee status"
    status, out = alone.shell(line, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert status == 0
    assert "Traceback" not in out


def test_the_end_of_a_pipe_is_no_error(alone):
    status, out = alone.shell("set -o pipefail; uv run referee status | head -n 1")
    assert "Error" not in out
    assert len(out.splitlines()) == 1


@pytest.mark.timeout(60)
def test_commands_are_short_and_quick(night):
    for number in range(300):
        night.forge(0, pid=1000 + number, time=f"2001-01-01T00:{number // 60:02}:{number % 60:02}Z")
    began = time.monotonic()
    out = night.referee("status")
    assert len(out.splitlines()) <= 20
    assert time.monotonic() - began < 5  # 0.15 s where nothing else runs
