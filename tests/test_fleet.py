"""Many commits at once: submit, slot.sh, status and log, with an engine that is a list (tests/stage.py)."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from stage import Stage, copied, next_of, train_text, write_program


def pick(night, commits, line=None):
    """Does what `next: git cherry-pick -x ...` says, and lets the sum run."""
    line = line or night.next
    assert line.startswith(f"git cherry-pick -x {' '.join(commits)} && uv run referee submit  #"), line
    night.shell(line)
    night.work()


def wins(night, *numbers, gain=0.02):
    """Ideas that gain, cut from one base and sent out together; their commits."""
    commits = [night.commit_and_send(f"idea {number}", {number: gain}) for number in numbers]
    night.work()
    return commits


@pytest.fixture(autouse=True)
def sending(monkeypatch):
    def commit_and_send(self, subject, gains, does="score", words="submit", **more):
        commit = self.commit(subject, gains, does, **more)
        self.out = self.referee(words)
        time.sleep(1.1 - time.time() % 1)  # git knows whole seconds; the older commit is dealt with first
        return commit

    monkeypatch.setattr(Stage, "commit_and_send", commit_and_send, raising=False)


# -- the branch


def test_a_baseline_takes_three_seeds_at_once_and_stays_on_the_branch(tmp_path):
    night = Stage(tmp_path, slots=True)
    start = night.head
    for _ in range(3):
        night.referee("submit")
    assert "the baseline has its 3 seeds" in night.referee("submit")
    assert len(night.jobs.read_text().splitlines()) == 3
    assert night.head == start
    night.work()
    assert night.next == "uv run referee log"
    night.follow()
    assert night.words(start) == ["keep"] * 3


def test_an_idea_leaves_the_branch_at_once_and_comes_back_when_it_is_kept(slots):
    start = slots.head
    commit = slots.commit_and_send("wider", {0: 0.02})
    assert slots.head == start
    assert slots.git("status", "--porcelain") == ""
    assert "the next idea" in next_of(slots.out)
    slots.work()
    slots.follow()
    assert slots.branch == ["wider", "start"]
    assert slots.words(commit) == ["keep"]
    assert slots.refs == []


def test_an_idea_that_is_done_before_its_baseline_waits_for_it(tmp_path):
    night = Stage(tmp_path, slots=True)
    night.referee("submit")
    commit = night.commit_and_send("early", {0: 0.02})
    night.work()
    lines = night.follow()
    assert not [line for line in lines if commit in line]
    assert night.branch == ["early", "start"]


def test_all_that_is_decided_is_logged_at_once_the_best_first(slots):
    worse, better, best = [
        slots.commit_and_send(name, {number: gain})
        for number, (name, gain) in enumerate([("worse", -0.02), ("better", 0.02), ("best", 0.04)])
    ]
    slots.work()
    out = slots.referee("log")
    assert slots.head == best
    assert "gain +0.04" in out
    assert slots.words(worse) == ["discard"]
    assert slots.words(better) == []
    pick(slots, [better], next_of(out))


def test_wins_on_one_base_go_onto_the_newest_together(slots):
    first, second, third = wins(slots, 0, 1, 2)
    slots.referee("log")
    head = slots.head
    others = [commit for commit in (first, second, third) if commit != head]
    pick(slots, others)
    assert slots.next == "uv run referee log"
    slots.referee("log")
    assert slots.branch[0].startswith("sum: ")
    assert len(slots.branch) == 3
    assert [slots.words(commit) for commit in others] == [["keep"], ["keep"]]
    assert [row[4] for row in slots.rows if row[0] in others] == [
        f"idea {number} (kept in {slots.head})" for number in range(3) if [first, second, third][number] in others
    ]
    assert not [ref for ref in slots.refs if "out/" in ref]


def test_one_sum_is_out_at_a_time(slots):
    wins(slots, 0, 1)
    slots.referee("log")
    slots.shell(slots.next)
    late = slots.commit_and_send("late", {2: 0.02})
    jobs = slots.jobs.read_text().splitlines()
    slots.jobs.write_text(jobs[0] + "\n")  # the late one is done first
    slots.slot(slots.folder, *jobs[1].split()[2:])
    slots.referee("log")
    assert "cherry-pick" not in slots.next
    slots.work()
    slots.follow()
    assert late in slots.words.__self__.git("log", "--all", "--format=%h")
    assert sum("keep" in row[3] for row in slots.rows) >= 6


def test_where_a_sum_does_not_gain_its_parts_go_one_by_one(slots):
    first, second = wins(slots, 10, 11)
    slots.referee("log")
    kept = slots.head
    (other,) = {first, second} - {kept}
    pick(slots, [other])
    slots.referee("log")
    assert slots.head == kept
    assert slots.words(other) == ["discard"]
    assert f"gained on {slots.branch[-1]}" not in slots.rows[-1][4]
    assert [row[3] for row in slots.rows[-2:]] == ["discard", "discard"]


def test_parts_of_a_sum_that_failed_are_tried_alone(slots):
    """0 gains alone; 10 and 11 harm each other, so the sum of 10 and 0 on 11 does not gain, and 0 alone does."""
    commits = wins(slots, 0, 10) + wins(slots, 11, gain=0.05)
    slots.referee("log")
    assert slots.head == commits[2]
    pick(slots, commits[:2])
    slots.referee("log")
    lines = slots.follow()
    picks = [line.split(" && ")[0].split()[3:] for line in lines if line.startswith("git cherry-pick")]
    assert sorted(map(len, picks)) == [1, 1]
    assert slots.words(commits[0]) == ["keep"]
    assert slots.words(commits[1]) == ["discard"]


def test_a_win_on_an_old_base_is_not_logged_as_a_keep(slots):
    first, second = wins(slots, 0, 1)
    slots.referee("log")
    (other,) = {first, second} - {slots.head}
    assert f"git cherry-pick -x {other}" in slots.referee(f"log {other} keep")
    assert slots.words(other) == []


def test_a_conflict_is_the_agents_to_settle_or_to_leave_out(slots):
    first = slots.commit_and_send("first", {0: 0.02})
    second = slots.commit_and_send("second", {0: 0.03})
    slots.work()
    slots.referee("log")
    assert slots.head == second
    slots.shell(slots.next)
    assert "settle the conflict in train.py" in slots.next
    assert f"log {first} discard" in slots.next
    (slots.folder / "train.py").write_text(train_text({0: 0.05}))
    slots.git("commit", "-qa", "--no-edit")
    assert slots.next == "uv run referee submit"
    slots.follow()
    assert slots.branch == ["first", "second", "start"]


def test_a_conflict_that_is_left_out(slots):
    first = slots.commit_and_send("first", {0: 0.02})
    slots.commit_and_send("second", {0: 0.03})
    slots.work()
    slots.referee("log")
    slots.shell(slots.next)
    slots.git("cherry-pick", "--skip")
    slots.referee(f"log {first} discard")
    assert "the next idea" in slots.next
    assert first in slots.refs


def test_two_commits_of_one_idea_become_one(slots):
    slots.commit("half", {0: 0.01})
    whole = slots.commit_and_send("whole", {0: 0.01, 1: 0.01})
    slots.work()
    slots.follow()
    assert slots.branch == ["whole", "start"]
    assert slots.head != whole


# -- what is sent, and where


def test_the_same_file_is_not_sent_twice(slots):
    first = slots.commit_and_send("an idea", {0: 0.02})
    slots.commit_and_send("the same once more", {0: 0.02})
    assert f"is out as {first}" in slots.out
    slots.work()
    slots.follow()
    slots.git("checkout", "-q", "-B", "autoresearch/nov21", "HEAD~1")
    slots.commit_and_send("and again", {0: 0.02})
    assert f"ran as {first}" in slots.out


def test_a_run_that_is_lost_is_sent_to_the_same_kind_of_device(slots):
    slots.commit_and_send("an idea", {0: 0.02}, "lost score", words="submit --gpus h200:1")
    kinds = slots.jobs.with_name("jobs.kinds")
    slots.work(AUTORESEARCH_GPUS="h200:1")
    slots.shell(slots.next)
    assert kinds.read_text().split()[-2:] == ["h200:1", "h200:1"]


def test_a_setting_names_the_kind_of_device(slots):
    slots.more = {"AUTORESEARCH_GPUS": "a100:1"}
    slots.commit_and_send("an idea", {0: 0.02})
    assert slots.jobs.with_name("jobs.kinds").read_text().split()[-1] == "a100:1"


def test_a_keep_is_confirmed_on_another_kind_of_device(slots):
    (commit,) = wins(slots, 0)
    slots.follow()
    base = slots.git("rev-parse", "--short=7", "HEAD~1")
    for what in (f"{base} --seed 42", f"{base} --seed 43", f"{commit} --seed 42"):
        slots.referee(f"submit {what}")
        slots.work(PRETEND_DEVICE="another")
    slots.follow()
    last = [row for row in slots.rows if row[0] == commit][-1]
    assert last[3] == "keep"
    assert "on another: " in last[4]


def test_a_traceback_is_a_crash_at_first_sight(slots):
    commit = slots.commit("typo", {0: 0.02})
    text = (slots.folder / "train.py").read_text()
    (slots.folder / "train.py").write_text("def (\n" + text)
    slots.git("commit", "-qa", "--amend", "--no-edit")
    commit = slots.head
    slots.referee("submit")
    slots.work()
    slots.follow()
    assert slots.words(commit) == ["crash"]
    assert len([run for run in slots.records if run["commit"].startswith(commit)]) == 1


# -- agents


def second_agent(night):
    """Another agent, in a working tree and on a branch of its own."""
    other = copied.__globals__["Stage"].__new__(Stage)
    other.__dict__.update(night.__dict__)
    other.folder = night.folder.parent / "second"
    night.git("worktree", "add", "-q", str(other.folder), "-b", "autoresearch/second", "main")
    return other


def test_two_agents_share_runs_and_repeat_nothing(slots):
    other = second_agent(slots)
    other.follow()
    first = slots.commit_and_send("an idea", {0: 0.02})
    assert "out on autoresearch/nov21: 'an idea'" in other.referee("status")
    other.commit_and_send("the same idea", {0: 0.02})
    assert f"is out as {first}" in other.out
    assert len(other.rows) == 3


def test_what_another_agent_kept_is_taken_over_as_one_sum(slots):
    other = second_agent(slots)
    for number in (0, 1):
        wins(slots, number)
        slots.follow()
    other.follow()
    wins(other, 2)
    other.follow()
    assert other.branch == ["idea 2", "start"]
    status, out = other.shell("git cherry-pick -x main..autoresearch/nov21 && uv run referee submit")
    assert status == 0, out
    other.work()
    other.follow()
    assert other.branch == ["sum: idea 0; idea 1", "idea 2", "start"]


@pytest.mark.parametrize("words", ["submit 0123456789", "log 0123456789 keep"])
def test_a_commit_that_does_not_exist(slots, words):
    status, out = slots.shell(f"uv run referee {words}")
    assert status == 1
    assert "there is no commit 0123456789" in out


def test_a_commit_of_somebody_else_is_not_submitted(slots):
    slots.git("checkout", "-q", "-b", "other")
    foreign = slots.commit("foreign", {0: 0.02})
    slots.git("checkout", "-q", "autoresearch/nov21")
    assert f"git cherry-pick -x {foreign}" in slots.referee(f"submit {foreign}")


# -- the engine


def test_a_full_queue_is_waited_for(slots):
    for number in range(2):
        slots.commit_and_send(f"idea {number}", {number: 0.02})
    assert slots.next == "uv run referee wait"


def test_a_job_that_is_held_does_not_fill_the_queue(slots):
    for number in range(2):
        slots.commit_and_send(f"idea {number}", {number: 0.02})
    slots.jobs.write_text(slots.jobs.read_text().replace("PENDING/Priority", "PENDING/BeginTime"))
    assert "the next idea" in slots.next


def test_wait_waits_for_what_was_just_sent(slots):
    slots.commit_and_send("an idea", {0: 0.02})
    began = time.monotonic()
    out = slots.referee("wait --wait 3")
    assert time.monotonic() - began > 3
    assert "not waiting" not in out


def test_wait_ends_when_a_job_has_ended(slots):
    slots.commit_and_send("an idea", {0: 0.02})
    waiting = subprocess.Popen(
        ["bash", "-c", "uv run referee wait --wait 60"],
        cwd=slots.folder,
        env=slots.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    time.sleep(1)
    slots.work()
    assert "next: uv run referee log" in waiting.communicate(timeout=30)[0]


def test_an_engine_that_does_not_answer_loses_nothing(slots):
    slots.commit_and_send("an idea", {0: 0.02})
    write_program(slots.programs / "squeue", "echo slurm_load_jobs error: no contact >&2\nexit 1\n")
    assert slots.next.startswith("uv run referee status  # wait a minute first: squeue does not answer")
    assert "no contact" in slots.referee("log")
    slots.make_engine()
    slots.work()
    slots.follow()
    assert slots.branch[0] == "an idea"


def test_without_an_engine_a_slot_by_hand_is_named(tmp_path):
    night = Stage(tmp_path)
    night.environment["PATH"] = f"{night.programs}:/usr/bin:/bin"
    if shutil.which("sbatch", path=night.environment["PATH"]):
        pytest.skip("there is a Slurm here")
    out = night.referee("submit")
    assert "CUDA_VISIBLE_DEVICES=0 fleet/slot.sh" in out
    command = out.split("run: ")[1].strip()
    night.shell(command)
    assert night.records[-1]["slot"]


def test_a_record_that_is_on_its_way_is_awaited(slots):
    commit = slots.commit_and_send("an idea", {0: 0.02})
    digits = slots.git("rev-parse", commit)
    slots.jobs.write_text("")
    log = slots.folder / f"runs/{digits}-42.log"
    log.write_text("slot: it has just ended\n")
    assert commit not in slots.next
    os.utime(log, (time.time() - 60, time.time() - 60))
    assert slots.next.startswith(f"uv run referee submit {commit} --seed 42")


def test_status_is_short_with_many_commits_out(slots):
    for number in range(9):
        slots.commit_and_send(f"idea {number}", {number: -0.02})
    slots.work()
    assert len(slots.referee("status").splitlines()) <= 20


# -- slot.sh


def test_a_slot_passes_sigterm_on_and_leaves_nothing(slots):
    commit = slots.commit_and_send("slow", {0: 0.02}, seconds=30)
    line = slots.jobs.read_text().split()
    slots.jobs.write_text("")
    slot = subprocess.Popen(["fleet/slot.sh", *line[2:]], cwd=slots.folder, env=slots.environment)
    for _ in range(100):
        time.sleep(0.1)
        if slots.records[-1]["commit"].startswith(commit):
            break
    time.sleep(0.5)
    slot.send_signal(signal.SIGTERM)
    slot.wait(timeout=20)
    assert slots.records[-1]["fail"]["kind"] == "preempted"
    assert not list((slots.folder.parent / "tmp").glob("autoresearch-slot-*"))
    assert slots.next.startswith(f"uv run referee submit {commit} --seed 42")


def test_the_clone_of_a_killed_slot_is_removed_by_the_next(slots):
    left = slots.folder.parent / "tmp/autoresearch-slot-abc-999999"
    left.mkdir()
    slots.commit_and_send("an idea", {0: 0.02})
    slots.work()
    assert not left.exists()


def test_a_slot_without_the_environment_says_so(slots):
    slots.commit_and_send("an idea", {0: 0.02})
    slots.work(UV_PROJECT_ENVIRONMENT="/nowhere")
    assert "uv sync" in "".join(path.read_text() for path in (slots.folder / "runs").glob("*.log"))


def test_a_node_with_other_data_is_named(slots):
    slots.commit_and_send("an idea", {0: 0.02})
    slots.work(PRETEND_HARNESS="89abcdef")
    logs = "".join(path.read_text() for path in (slots.folder / "runs").glob("*.log"))
    assert "harness 89abcdef on" in logs
    assert "01234567 elsewhere" in logs
