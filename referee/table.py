"""The one table that says what comes next, alone or in slots: need_of() what a trial needs, WORDS how that is said."""

import datetime
import json
import subprocess
import time
from dataclasses import dataclass

from referee.base import tail
from referee.night import is_idea
from referee.verdict import BASELINE_RUNS, CONTROL_EVERY, counts, exception, noise, table_of

FIRST_SEED = 42
WAITING = 2  # jobs in the queue while every slot works
SETTLING = 30  # seconds in which the record of a job that has ended may still be on its way, as over NFS
COMMIT = "git commit -qam '<idea>'"
AMEND = "git commit -qa --amend --no-edit"

# Ends that say nothing yet: launches with the same seed, then mends of the file, before the word is the idea's.
# A baseline is never dropped: it runs three times whatever happened, and is mended after that.
PATIENCE = {
    "lost": (3, 0, "crash"),
    "preempted": (3, 0, "crash"),
    "busy": (1000, 0, "crash"),
    "oom": (0, 1, "crash"),
    "nan": (0, 1, "crash"),
    "timeout": (0, 0, "crash"),
    "error": (0, 2, "crash"),
    "harness": (0, 2, "crash"),
    "doubt": (0, 2, "discard"),
    "slowed": (3, 0, "discard"),
}

# What to run for a need: (rank among many trials, alone, in slots); {r} is how the referee is called.
WORDS = {
    "log": (0, "{r} log", "{r} log"),
    "crash": (0, "{r} log crash", "{r} log"),
    "discard": (0, "{r} log discard", "{r} log"),
    "run": (1, "{r} run", "{r} submit"),
    "step back": (1, "", "{r} submit"),
    "seed": (1, "{r} run --seed {seed}", "{r} submit {commit} --seed {seed}"),
    "pick": (2, "git cherry-pick -x {commit}", "git cherry-pick -x {commit} && {r} submit"),
    "go on": (3, "git cherry-pick --continue", "git cherry-pick --continue"),
    "restore": (3, "{r} log --restore", "{r} log --restore"),
    "status": (3, "{r} status", "{r} status"),
    "wait": (4, "{r} wait", "{r} wait"),
    "prose": (5, "", ""),
    "idea": (6, "", ""),
}


@dataclass(frozen=True)
class Need:
    """kind: a key of WORDS, or `win`, which waits for others. why: prose, which stands behind a #."""

    kind: str
    commit: str = ""  # 7 digits of what is to run, or of several to be picked
    seed: int | None = None
    why: str = ""


# -- what a trial needs


def need_of(night, trial):
    """The Need of a trial, None where it is at rest; the first line that holds decides."""
    short = trial.commit.short
    if trial.jobs and trial.base is None and len({*trial.jobs, *(run.seed for run in trial.runs)}) < BASELINE_RUNS:
        return Need("run", short)  # its seeds go out together
    if is_on_its_way(night, trial) or waits_for_baseline(night, trial):
        return Need("wait")
    if trial.base and trial.status in ("discard", "crash"):
        return Need("log", why="it takes the dropped commit off the branch")
    if trial.last is None:
        return Need("seed", short, FIRST_SEED) if trial.commit in night.mine else Need("run", short, FIRST_SEED)
    verdict = night.verdict(trial)
    end = trial.last.kind or verdict.code
    if end in PATIENCE and (trial.last.interrupted or not trial.is_kept):
        return need_of_patience(night, trial, end, verdict)
    if trial.is_kept or end == "baseline":
        return need_at_rest(night, trial)
    if end in ("no_base", "no_noise"):
        return need_of_base(night, trial, verdict)
    if end == "keep" and night.in_slots and trial.base != night.head.hash and trial.commit != night.head:
        return Need("win", short)
    return Need("log", why=exception(trial.last, verdict))


def is_on_its_way(night, trial):
    """Whether a run of it is queued, runs, or has ended a moment ago and its record is still to come."""
    if trial.jobs or any(run.may_be_running for run in trial.runs):
        return True
    if not night.in_slots:
        return False
    ended = {str(run.seed) for run in trial.runs if run.kind != "lost"}
    logs = night.folder.glob(f"{trial.commit.hash}-*.log")
    return any(log.stem.rpartition("-")[2] not in ended and was_just_written(log) for log in logs)


def was_just_written(log):
    """Whether a slot wrote to a log a moment ago, and not that the run had failed before it had a record."""
    try:
        age = time.time() - log.stat().st_mtime
    except OSError:
        return False
    failed = any(line.startswith("FAIL: ") for line in tail(log, 1))
    return age < SETTLING and not failed


def waits_for_baseline(night, trial):
    """Whether what it was cut from is out and has no word yet."""
    out = {each.hash for each in night.mine}
    return trial.base in out and night.book.status(trial.base) is None


def need_of_patience(night, trial, end, verdict):
    """An end that says nothing yet of the idea: once more, or mended, until that has been tried often enough."""
    last = trial.last
    short = trial.commit.short
    said = f"FAIL: {last.kind}: {last.fail['sentence']}" if last.fail else verdict.reason
    launches, mends, word = PATIENCE[end]
    tries = [run for run in night.records if (run.parent, run.subject) == (last.parent, last.subject)]
    tries = [run for run in tries if (run.kind or night.verdict(trial, run).code) == end]
    started = sum((run.commit, run.seed) == (last.commit, last.seed) for run in tries)
    if started < launches or (trial.base is None and end == "timeout" and started < 3):
        return Need("seed", short, last.seed, said)
    start = "{r} submit" if night.in_slots else "{r} run"
    edited = night.experiment.edited
    if trial.base is None:
        return Need("prose", why=f"the baseline does not count ({said}): mend that, then {COMMIT} && {start}")
    if night.in_slots:
        mend = f"git cherry-pick {short}, the mend, {AMEND} && {start}"
        return Need(word, short, why=f"what can be mended goes on with {mend}" if mends else said)
    if len(tries) > mends:
        return Need(word, short, why=said)
    begun = "finish the mend of" if night.changed else "mend"
    return Need("prose", why=f"{begun} {edited}, then {AMEND} && {start}; if it cannot be mended: {{r}} log {word}")


def need_of_base(night, trial, verdict):
    """Its base has no run that compares, or only one: alone the idea is put aside for it, in slots it runs beside."""
    if trial.base is None:
        return Need("prose", why=f"{verdict.reason}; for a new night move results.tsv away, else go to that branch")
    if not night.in_slots:
        return Need("discard", why=f"{verdict.reason}; then run that, and git cherry-pick {trial.commit.short}")
    base = next(commit for commit in night.repository.history if commit.hash == trial.base)
    of_base = night.trial(base)
    if of_base.jobs:
        return Need("wait")
    done = {run.seed for run in of_base.counted if run.ground == trial.last.ground}
    kind = f" --gpus {trial.last.gpus}" if trial.last.gpus else ""
    return Need("seed", f"{base.short}{kind}", free_seed(done), verdict.reason)


def need_at_rest(night, trial):
    """A kept commit or a baseline: its runs while they are too few, its rows, a control after 16 experiments."""
    short = trial.commit.short
    newest = trial.counted if night.in_slots else [run for run in night.records if counts(run)]
    if not newest:
        return Need("seed", short, FIRST_SEED, "no run of it counts")
    table = table_of(newest[-1], night.records)
    own = [run for run in table if run.commit == trial.commit.hash]
    seeds = {run.seed for run in own}
    wanted = runs_wanted(trial, table, own)
    if len(seeds) < wanted:
        return Need("seed", short, free_seed({*seeds, *trial.jobs}), f"run {len(seeds) + 1} of {wanted}")
    if night.unlogged(trial) or trial.commit != night.head:
        return Need("log")
    if noise(table)[0] and experiments_since_control(night) >= CONTROL_EVERY:
        return Need("seed", short, free_seed({run.seed for run in trial.runs}), "a control: the kept commit once more")
    return None


def runs_wanted(trial, table, own):
    """Runs that a kept commit needs on a ground: three where it is the first one there and was not chosen there; two where
    the noise is unknown, or known to be zero."""
    sd, df = noise(table)
    is_first = not own or own[0].code == table[0].code
    was_chosen = trial.base is not None and trial.counted[:1] == own[:1]
    wanted = BASELINE_RUNS if is_first and not was_chosen else 1
    if df == 0:
        return max(wanted, 2)
    return min(wanted, 2) if sd == 0 else wanted


def experiments_since_control(night):
    """Commits that have run since one of them, a kept one, ran again."""
    seen = set()
    since = set()
    for run in night.records:
        if run.commit in seen and night.book.status(run.commit) == "keep":
            since = set()
        elif not run.interrupted:
            since.add(run.commit)
        seen.add(run.commit)
    return len(since)


def free_seed(taken):
    """The first seed from 42 on that is not taken."""
    seed = FIRST_SEED
    while seed in taken:
        seed += 1
    return seed


# -- what comes next


def next_need(night):
    """The Need of the night: what is in the way, then what its trials need, then the end, then the next idea."""
    own = night.repository.own
    lock = git_lock(night.repository)
    edited = night.experiment.edited
    if lock:
        return Need("status", why=f"git is at work or was killed a moment ago ({lock}): wait 10 s first")
    if night.queue.trouble:
        return Need("status", why=f"wait a minute first: {night.queue.trouble}")
    if (own / "CHERRY_PICK_HEAD").exists():
        short = (own / "CHERRY_PICK_HEAD").read_text()[:7]
        settle = f"settle the conflict in {edited}, then git commit -qa --no-edit && {{r}} status"
        return Need("prose", why=f"{settle}; or leave it out: git cherry-pick --skip, then {{r}} log {short} discard")
    if (own / "sequencer").exists():
        return Need("go on")
    if night.running:
        return Need("wait")
    if lost_its_log(night):
        return Need(
            "restore", why="results.tsv has no row, but runs/ holds runs of this branch; for a new night empty runs/"
        )
    need = need_in_slots(night) if night.in_slots else need_of(night, night.on_head)
    reached = until_reached(night)
    if reached and (need is None or need.kind in ("seed", "run", "pick")):
        return Need("prose", why=f"the night is over ({reached}): write the report, as program.md says")
    if need is not None and not (need.kind in ("run", "seed") and night.changed):
        return need
    start = "{r} submit" if night.in_slots else "{r} run"
    if night.changed:
        return Need("idea", why=f"finish the edit of {edited}, then {COMMIT} && {start}; or git restore {edited}")
    return Need("idea", why=f"the next idea: edit {edited}, then {COMMIT} && {start}")


def lost_its_log(night):
    """Whether results.tsv is gone or empty though commits below HEAD have runs."""
    below = {commit.hash for commit in night.repository.history[1:]}
    return (
        not night.book.rows
        and not night.book.wrong
        and any(counts(run) and run.commit in below for run in night.records)
    )


def need_in_slots(night):
    """The Need that comes first among all trials, None where an idea can be sent out."""
    if is_idea(night.on_head):
        return Need("step back" if night.head in night.mine else "run")
    needs = {trial.commit: need_of(night, trial) for trial in night.trials}
    wins = [commit for commit, need in needs.items() if need and need.kind == "win"]
    found = [need for need in needs.values() if need and need.kind not in ("wait", "win")]
    bringing = [commit for commit, picked in night.mine.items() if picked and commit not in wins]
    if wins and not bringing:
        found.append(need_of_wins(night, wins))
    if found:
        return min(found, key=lambda need: WORDS[need.kind][0])
    return Need("wait") if list(night.queue.jobs.values()).count("queued") >= WAITING else None


def need_of_wins(night, wins):
    """Wins on a base that has moved on go onto the newest one together; where that did not gain, one by one."""
    brought = {digits for commit in wins for digits in night.mine[commit]}  # a win may be a sum of others
    wins = [commit for commit in wins if commit.hash not in brought]
    sums = [run.picked for run in night.records if len(run.picked) > 1 and not run.interrupted]
    fresh = [commit for commit in wins if not any(commit.hash in picked for picked in sums)]
    chosen = [commit.short for commit in fresh or wins[:1]]
    return Need("pick", " ".join(chosen), why="what gained on a base that has moved on, on the newest one")


def words_of(night, need, caller, folder=""):
    """A Need as a line that a shell may run: a command, and prose behind a #. caller: how the referee is called; folder:
    of the experiment, where it was named."""
    command = WORDS[need.kind][2 if night.in_slots else 1]
    command = command.format(r=caller, seed=need.seed, commit=need.commit)
    why = " ".join(need.why.replace("{r}", caller).split())
    if folder and command.startswith(caller):
        command = f"{command} {folder}"
    return f"{command}  # {why}".strip() if why else command


def git_lock(repository):
    """A lock file of git, None where there is none. One that is older than 5 s while no git runs on this machine was
    left by a git that was killed: it is removed."""
    found = [path for path in (repository.own / "index.lock", repository.own / "HEAD.lock") if path.exists()]
    if not found:
        return None
    names = subprocess.run(["ps", "-Ao", "comm="], capture_output=True, text=True).stdout.split()
    for lock in found:
        if "git" in names or time.time() - lock.stat().st_mtime <= 5:
            return lock
        lock.unlink(missing_ok=True)
        print(f"removed {lock}, which a killed git had left")
    return None


# -- when a night ends


def read_until(night):
    """{"since": time, "hours", "runs", "target"} of `until`, empty where only the human ends the night."""
    try:
        facts = json.loads((night.folder / "until").read_bytes())
        datetime.datetime.fromisoformat(facts["since"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return facts


def until_reached(night):
    """Why the night is over, as a phrase; empty while it goes on."""
    experiment = night.experiment
    facts = read_until(night)
    head = night.on_head
    scores = [experiment.sign * run.score for run in head.counted] if head.is_kept else []
    for word, goal in (("perfect", experiment.perfect), ("the target", facts.get("target"))):
        if goal is not None and scores and sum(scores) / len(scores) <= experiment.sign * goal:
            return f"{experiment.metric} is {word}, {goal:g}"
    if "hours" in facts:
        since = datetime.datetime.fromisoformat(facts["since"]).timestamp()
        if time.time() - since >= 3600 * facts["hours"]:
            return f"{facts['hours']:g} hours are over"
    made = sum(run.time >= facts["since"] and not run.interrupted for run in night.records) if facts else 0
    return f"{made} runs are made" if made >= facts.get("runs", 10**9) else ""
