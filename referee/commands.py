"""What agents and people type: run, wait, submit, until, and the command line. Each prints at most 20 lines."""

import argparse
import contextlib
import json
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

from referee import engines
from referee.base import RefereeError, git, read_repository, require, tail, write_atomic
from referee.book import STATUSES
from referee.common import (
    blobs_of,
    full_commit,
    me,
    name_folder,
    require_at_rest,
    said_of,
    say_next,
    step_back,
    update_refs,
)
from referee.experiment import Experiment, edits_on_disk, find_experiment, hash_edits
from referee.log import command_log
from referee.night import OUT, read_night
from referee.records import now, parse_record, picked_in, reread
from referee.run import lint_edits
from referee.status import command_status
from referee.supervisor import new_record, supervise
from referee.table import AMEND, COMMIT, free_seed, need_of, next_need
from referee.verdict import BASELINE_RUNS

SECONDS = 540  # that `run` and `wait` wait: agents end a command after ten minutes


def require_runnable(night, trial, start, seed):
    """The Record of a run of HEAD. Raises RefereeError where its score would not count: for what is not committed, other files
    that it changes, what lint finds. start: the command that goes on."""
    edited = night.experiment.edited
    require(not night.changed, f"{' and '.join(night.changed)} is changed but not committed; run: {COMMIT}")
    record = new_record(night.experiment, night.repository, night.book, seed)
    touched = [reason.split(" was edited")[0] for reason in record.why_not]
    names = " ".join(touched)
    also = " --worktree" if any(name.split("/")[0] in night.experiment.frozen for name in touched) else ""
    take_out = f"git restore --staged{also} --source={trial.base} -- {names} && git commit -q --amend --no-edit"
    require(not names, f"the idea changes {names} besides {edited}; take that out: {take_out}")
    found = "" if trial.is_kept else "; ".join(lint_edits(night.experiment)[:3])
    again = f"{AMEND if trial.base else COMMIT} && {me(start)}"
    require(not found, f"not started, since its score would not count: {found}; mend that, then {again}")
    return record


# -- run and wait


def command_run(experiment, options):
    """Starts HEAD's script detached, with its output in run.log, and waits for its end."""
    night = read_night(experiment)
    require_at_rest(night)
    trial = night.on_head
    seed = options.seed
    if seed is None:
        need = need_of(night, trial)
        require(need, f"{trial.commit.short} has been run and logged; commit the next idea, or give --seed N")
        done = need.kind in ("log", "crash", "discard") and not night.changed
        require(not done, f"{trial.commit.short} has a run that is not in results.tsv; run: {me('log')}")
        seed = need.seed if need.seed is not None else trial.last.seed
    record = start(night, require_runnable(night, trial, "run", seed))
    print(f"running {said_of(record)}; at most {options.wait:g} s are waited for", flush=True)
    return wait_for_run(night, record, options.wait)


def start(night, record):
    """Forks a supervisor, which goes on when this process is killed; returns the Record that it wrote."""
    experiment = night.experiment
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        log = os.open(experiment.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(target, stream)

        def tell(record):
            with contextlib.suppress(BrokenPipeError):
                os.write(writer, f"{record.name}\n".encode())
            os.close(writer)

        try:
            os._exit(supervise(experiment, night.repository, record, tell))
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader) as pipe:
        name = pipe.readline().strip()
    require(name, (tail(experiment.log, 1) or ["the run did not start"])[0])
    return parse_record((night.folder / name).read_bytes())


def command_wait(experiment, options):
    """Waits for the end of the run that was started here and prints it; in slots, until there is something to do."""
    night = read_night(experiment)
    if night.running is None and night.in_slots:
        return wait_for_slots(night, options.wait)
    require(night.here, f"no run has been started here; run: {me('run')}")
    return wait_for_run(night, night.running or night.here[-1], options.wait)


def wait_for_run(night, record, seconds):
    """Waits for the end of a run and prints it. Returns the exit status."""
    end = time.monotonic() + seconds
    while record.may_be_running and time.monotonic() < end:
        time.sleep(0.2)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(record.pid, os.WNOHANG)
    if record.may_be_running:
        print("\n".join([*tail(night.experiment.log, 1), f"it is still running\nnext: {me('wait')}"]))
        return 0
    record = reread(night.folder, record)
    others = [run for run in night.records if run.name != record.name]
    night.runs = replace(night.runs, records=(*others, record))
    for line in end_of(night, record):
        print(line)
    say_next(night)
    return 1 if record.fail else 0


def end_of(night, record):
    """Lines on what came of a run: score, costs and verdict from its record, or the end of its log and what failed."""
    if record.fail:
        log = [line for line in tail(night.experiment.log, 12) if not line.startswith("FAIL: ")]
        return [*log, f"FAIL: {record.kind}: {record.fail['sentence']}"]
    figures = record.figures
    lines = {night.experiment.metric: record.score_text, "audit": record.audit and f"{record.audit:.6f}"}
    base = [run for run in night.records if run.commit == record.base and run.ground == record.ground]
    costs_of_base = costs_of(base[-1].figures) if base else {}
    for name, text in costs_of(figures).items():
        before = costs_of_base.get(name, text)
        lines[name] = text if text == before else f"{text} (its base {before})"
    outside = [f"{key} {figures[key]}" for key in ("startup", "evaluation") if key in figures]
    lines["seconds"] = ", ".join([f"{figures.get('seconds')}, in all {figures.get('total_seconds')}", *outside])
    lines |= dict(list(figures.get("shown", {}).items())[:8])
    lines["lines"] = record.lines and f"+{record.lines[0]} -{record.lines[1]}"
    commits = {night.head.hash: night.head, **{commit.hash: commit for commit in night.mine}}
    lines["verdict"] = str(night.verdict(night.trial(commits.get(record.commit, night.head)), record))[:300]
    return [f"{key + ':':<17} {text}" for key, text in lines.items() if text is not None]


def costs_of(figures):
    """{line: text} of what a run used and did, which is shown beside its base's: an idea's price, or a machine that has
    changed its speed."""
    costs = {}
    for name, key in (("peak_vram_mb", "memory_mb"), ("num_params_M", "params"), ("total_tokens_M", "tokens")):
        if figures.get(key):
            costs[name] = f"{figures[key] / (1 if key == 'memory_mb' else 1e6):.1f}"
    if figures.get("ticks"):
        costs["num_steps"] = str(figures["ticks"])
    return costs


def wait_for_slots(night, seconds):
    """Waits until a run in a slot has ended, or there is something else to do than to have ideas."""
    end = time.monotonic() + seconds
    out = set(night.queue.jobs)
    idle = ("wait", "idea")
    if not out or next_need(night).kind not in idle:
        print("not waiting: there is something to do first")
        return say_next(night)
    while out <= set(night.queue.jobs) and next_need(night).kind in idle and time.monotonic() < end:
        time.sleep(2)
        night = read_night(night.experiment)
    return say_next(night)


# -- submit


def command_submit(experiment, options):
    """Sends HEAD, or a commit that is named, to a slot. An idea is first noted as out, then submitted, then taken off the
    branch; repeated, it goes on where it stopped."""
    night = read_night(experiment)
    require_at_rest(night)
    require(night.repository.branch, "HEAD is on no branch; run: git checkout -q autoresearch/<name>")
    slots = (experiment.folder / engines.SLOT).is_file()
    require(slots, f"there is no {engines.SLOT} in {experiment.folder}; slots need it")
    require(not night.queue.trouble, night.queue.trouble)
    gpus = options.gpus or os.environ.get("AUTORESEARCH_GPUS")
    if options.commit:
        digits = full_commit(night, options.commit)
        known = {commit.hash: commit for commit in (*night.mine, *night.repository.history)}
        pick = f"git cherry-pick -x {digits[:7]} && {me('submit')}"
        require(digits in known, f"{digits[:7]} is not out on this branch; to take it over run: {pick}")
        send(night, night.trial(known[digits]), options.seed, gpus)
    else:
        submit_head(night, options.seed, gpus)
    return say_next(read_night(experiment))


def submit_head(night, seed, gpus):
    """A baseline stays on the branch. An idea becomes one commit and leaves it, sent out unless its file is out or ran."""
    trial = night.on_head
    require(not trial.is_kept, f"{trial.commit.short} is kept; commit an idea, or name a commit: {me('submit COMMIT')}")
    sent = trial.commit in night.mine
    half_back = sent and trial.base and edits_on_disk(night.experiment) == blobs_of(night, trial.base)
    if not half_back:
        require_runnable(night, trial, "submit", seed)
    if trial.base and trial.commit.parent != trial.base:
        trial = make_one_commit(night, trial)
    brought = picked_in(git(night.experiment.folder, "log", "-1", "--format=%b"))
    twin = same_file(night, trial) if trial.base and not sent and not brought else ""
    if twin:
        print(f"not submitted: the same file {twin}")
        return step_back(night, trial, [f"update refs/autoresearch/{trial.commit.short} {trial.commit.hash}"])
    done = {*trial.jobs, *(run.seed for run in trial.counted)}
    if trial.base is None and seed is None and len(done) >= BASELINE_RUNS:
        print(f"the baseline has its {BASELINE_RUNS} seeds")
    elif trial.base is None or not (trial.jobs or trial.runs):
        send(night, trial, seed, gpus)
    if trial.base:
        step_back(night, trial)


def send(night, trial, seed, gpus):
    """Notes a trial as out and hands it to the engine, unless that seed is out already. What it was sent to before, it is
    sent to again."""
    digits = trial.commit.hash
    seed = free_seed({*trial.jobs, *(run.seed for run in trial.counted)}) if seed is None else seed
    asked = [run.gpus for run in trial.runs if run.gpus]
    update_refs(night, [f"update {OUT}/{night.repository.branch}/{digits} {digits}"])
    if seed in trial.jobs:
        print(f"{digits[:7]} with seed {seed} is {trial.jobs[seed]} already")
        return
    said = engines.submit(night.experiment.folder, digits, seed, gpus or (asked[-1] if asked else None))
    print(f"{digits[:7]} with seed {seed}: {said}")


def make_one_commit(night, trial):
    """One commit of an idea that is several: of a sum, with the names of the commits that it brings."""
    folder = night.experiment.folder
    texts = git(folder, "log", "--reverse", "--format=%s%x00%b%x00", f"{trial.base}..HEAD").split("\0")
    picked = [f"(cherry picked from commit {digits})" for digits in picked_in("\n".join(texts[1::2]))]
    subject = "sum: " + "; ".join(text.strip() for text in texts[:-1:2]) if picked else trial.commit.subject
    git(folder, "reset", "-q", "--soft", trial.base)
    git(folder, "commit", "-q", "-m", "\n".join([subject, "", *picked]))
    print(f"what stood between {trial.base[:7]} and {trial.commit.short} is one commit now")
    night.repository = read_repository(folder)
    return night.on_head


def same_file(night, trial):
    """Where the file of HEAD is out or ran already, as a phrase; else empty. No slot is spent on it."""
    code = hash_edits(edits_on_disk(night.experiment))
    for run in night.records:
        if run.code == code and run.commit != trial.commit.hash and run.score is not None:
            return f"ran as {run.commit[:7]} {run.subject[:60]!r}: {run.score_text}"
    for branch, claims in night.claims.items():
        for commit in claims:
            if hash_edits(blobs_of(night, commit.hash)) == code:
                return f"is out as {commit.short} {commit.subject[:60]!r} on {branch}"
    return ""


# -- until


def command_until(experiment, options):
    """Notes when the night ends, or that only the human ends it."""
    night = read_night(experiment)
    asked = {"hours": options.hours, "runs": options.runs, "target": options.target}
    asked = {name: value for name, value in asked.items() if value is not None}
    path = night.folder / "until"
    if asked:
        night.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"since": now(), **asked}) + "\n")
    else:
        path.unlink(missing_ok=True)
    ends = " or ".join(f"{name} {value:g}" for name, value in asked.items())
    print(f"the night ends at {ends}" if asked else "only the human ends the night")
    return say_next(night)


# -- the command line


def command_supervise(words):
    """The parent of a script that was started by hand or in a slot."""
    script = Path(words[0] if words else "train.py").resolve()
    try:
        experiment = Experiment(script.parent, script.name, (script.name,))
        if script.name in ("train.py", "ruler.py"):
            experiment = find_experiment(script.parent)
    except RefereeError as error:
        return f"\nFAIL: {error.kind}: {error}"
    return supervise(experiment, read_repository(script.parent))


def parse(words):
    """(command, folder, options) of a command line."""
    parser = argparse.ArgumentParser(prog="referee", description=__doc__)
    parser.error = lambda message: sys.exit(f"error: {message}; run: {me('--help')}")
    parser.add_argument("command", choices=list(FUNCTIONS))
    parser.add_argument("words", nargs="*", metavar="keep|discard|crash|COMMIT|FOLDER", help="folder of the experiment")
    parser.add_argument("--seed", type=int, metavar="N", help="of the run; else the next one that HEAD needs")
    parser.add_argument("--gpus", metavar="KIND", help="kind of device for submit, as h200:1 (Slurm, SkyPilot)")
    parser.add_argument("--wait", type=float, metavar="S", default=SECONDS, help=f"seconds to wait ({SECONDS})")
    parser.add_argument("--note", metavar="TEXT", default="", help="added to the description in results.tsv")
    parser.add_argument("--restore", action="store_true", help="log: write lost rows from runs/")
    parser.add_argument("--json", action="store_true", help="status: for programs")
    parser.add_argument("--hours", type=float, metavar="H", help="until: when the night ends")
    parser.add_argument("--runs", type=int, metavar="N", help="until: after as many runs")
    parser.add_argument("--target", type=float, metavar="X", help="until: when a kept commit is as good")
    options = parser.parse_args(words)
    states = [word for word in options.words if word in STATUSES]
    commits = [word for word in options.words if re.fullmatch("[0-9a-f]{7,64}", word)]
    folders = [word for word in options.words if word not in states and word not in commits]
    few = len(states) <= 1 and len(folders) <= 1 and len(commits) <= 1
    require(few, f"too many words: {' '.join(options.words)}; run: {me('--help')}")
    require(not states or options.command == "log", f"{states[:1]} belongs to log; run: {me('--help')}")
    named = not commits or options.command in ("log", "submit")
    require(named, f"a commit, {commits[:1]}, belongs to log and submit; run: {me('--help')}")
    require(options.seed is None or 0 <= options.seed < 2**63, f"--seed is {options.seed}; give a whole number from 0")
    require(options.wait >= 0, f"--wait is {options.wait}; give seconds")
    options.status = states[0] if states else None
    options.commit = commits[0] if commits else None
    return options.command, folders[0] if folders else "", options


FUNCTIONS = {
    "run": command_run,
    "wait": command_wait,
    "log": command_log,
    "status": command_status,
    "submit": command_submit,
    "until": command_until,
}


def main(words):
    if words[:1] == ["supervise"]:
        return command_supervise(words[1:])
    try:
        sys.stdout.reconfigure(errors="backslashreplace")
        command, folder, options = parse(words)
        name_folder(folder)
        status = FUNCTIONS[command](find_experiment(folder or "."), options)
        sys.stdout.flush()
        return status
    except RefereeError as error:
        return f"error: {error}"
    except BrokenPipeError:  # as in `status | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        return f"error: {error}; mend that, then run this again"
    except KeyboardInterrupt:
        return f"\ninterrupted; a run that was started goes on; run: {me('wait')}"
