"""The parent of a run: it writes the record, starts the script in a session of its own, ends it at the limit, passes SIGINT
and SIGTERM on, and says how it ended."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from referee.base import RefereeError, birth, git, read_blobs, require, whole_number
from referee.book import read_book
from referee.experiment import edits_on_disk, hash_edits
from referee.records import Record, now, picked_in, read_runs, reread, runs_folder, write_record
from referee.run import BUDGET_RANGE, GRACE, RECORD, SEED_RANGE
from referee.verdict import kept_below, verdict_on

RUNS = "AUTORESEARCH_RUNS"  # runs/ of the night, set by fleet/slot.sh
ENDING = 10  # seconds that a run has to end by itself after a signal


def new_record(experiment, repository, book, seed):
    """The Record of a run that is about to start, with what git says of the edited files."""
    head = repository.head
    record = Record(
        time=now(),
        host=socket.gethostname(),
        pid=os.getpid(),
        birth=birth(os.getpid()),
        folder=str(experiment.folder),
        commit=head and head.hash,
        parent=head and head.parent,
        subject=head.subject if head else "",
        seed=seed,
        metric=experiment.metric,
        lower_is_better=experiment.lower_is_better,
        code=hash_edits(edits_on_disk(experiment)),
        limit=experiment.budget or whole_number(*BUDGET_RANGE) + GRACE,
        slot=RUNS in os.environ,
        gpus=os.environ.get("AUTORESEARCH_GPUS") or None,
    )
    if experiment.script not in ("train.py", "ruler.py"):
        record.why_not.append(f"the run was of {experiment.script}; only train.py is an experiment")
    if head is None:
        record.why_not.append(f"{experiment.edited} is in no commit ({repository.trouble}); commit it first")
        return record
    blobs = head_blobs(experiment, repository)
    record.picked = picked_in(blobs["HEAD"].decode("utf-8", "replace"))
    record.why_not += [f"{name} is not what HEAD holds" for name in differing(experiment, repository, blobs)]
    ancestors = [commit.hash for commit in repository.history[1:]]
    record.base = head.parent if record.slot else kept_below(book, ancestors)
    if record.base is not None:
        record.lines, touched = changes_since(experiment, repository, record.base)
        record.why_not += [f"{name} was edited; an experiment edits {experiment.edited} only" for name in touched]
    return record


def begin_record(experiment, repository, record):
    """Writes the record of a run that is about to start; returns its path. Raises RefereeError where that cannot be done."""
    runs = Path(os.environ.get(RUNS) or runs_folder(experiment.folder, repository))
    try:
        write_record(runs, record)
    except OSError as error:
        require(False, f"the run could not be recorded in {runs} ({error.strerror}); make that folder writable")
    return runs / record.name


def head_blobs(experiment, repository):
    """{object name: bytes or None} of HEAD and of the edited files in it."""
    return read_blobs(repository, ["HEAD", *(f"HEAD:{repository.relative}{name}" for name in experiment.edits)])


def differing(experiment, repository, blobs):
    """The edited files that are not as HEAD holds them, deleted ones among them."""
    on_disk = edits_on_disk(experiment)
    return [name for name, data in on_disk.items() if data != blobs[f"HEAD:{repository.relative}{name}"]]


def changes_since(experiment, repository, base):
    """([lines added, lines taken out], names of changed files that may not be edited) in this folder, from base to HEAD."""
    added = 0
    removed = 0
    touched = []
    form = ["--numstat", "--no-renames", "--no-ext-diff", "--no-textconv", "-z", "--relative"]
    for line in git(experiment.folder, "diff", *form, base, "HEAD", "--", ".").split("\0"):
        plus, _, rest = line.partition("\t")
        minus, _, name = rest.partition("\t")
        if name in experiment.edits:
            added += int(plus) if plus.isdigit() else 0
            removed += int(minus) if minus.isdigit() else 0
        elif name:
            touched.append(name)
    return [added, removed], touched


def supervise(experiment, repository, record=None, on_start=lambda record: None):
    """Runs the experiment's script once, as a child in a session of its own; returns the exit status. Its output is this
    process's. record: made beforehand, by the process that this one was forked from; on_start: called with the Record
    once it is written."""
    try:
        book = read_book(experiment.results)
        record = record or new_record(experiment, repository, book, whole_number(*SEED_RANGE))
        record = replace(record, pid=os.getpid(), birth=birth(os.getpid()))
        path = begin_record(experiment, repository, record)
        on_start(record)
    except RefereeError as error:
        print(f"\nFAIL: {error.kind}: {error}", flush=True)
        return 1
    adopt_orphans()
    signals = []
    command = [sys.executable, str(experiment.folder / experiment.script)]
    environment = {**os.environ, "SEED": str(record.seed), RECORD: str(path)}
    child = subprocess.Popen(
        command, cwd=experiment.folder, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
    )

    def pass_on(number, frame):
        signals.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    kind = None if wait_for(child, record.limit, signals) else "timeout"
    end_descendants()
    return conclude(path, record, child.returncode, "preempted" if signals else kind, book, repository)


def conclude(path, record, status, kind, book, repository):
    """Says how a run ended, and notes it in its record where the child did not; returns the exit status. status: of the
    child; kind: of the failure where it is known."""
    record = reread(path.parent, record)
    records = read_runs(path.parent).records
    if record.kind == "lost":
        kind, sentence = how_it_ended(status, kind, record, records)
        record = replace(record, fail={"kind": kind, "sentence": sentence})
        write_record(path.parent, record)
    if record.fail:
        print(f"\nFAIL: {record.kind}: {record.fail['sentence']}", flush=True)
        return 1
    said = slot_verdict(record, records)
    if not record.slot:
        said = verdict_on(record, records, book, [commit.hash for commit in repository.history[1:]])
    print(f"{'verdict:':<17} {said}", flush=True)
    return 0


def wait_for(child, limit, signals):
    """Waits for the child, at most `limit` seconds, or ENDING seconds after a signal. Whether it ended by itself."""
    end = time.monotonic() + limit
    while True:
        try:
            child.wait(timeout=0.5)
            return True
        except subprocess.TimeoutExpired:
            if signals:
                end = min(end, time.monotonic() + ENDING)
                signals = []
            if time.monotonic() > end:
                break
    end_descendants()
    child.wait()
    return False


def how_it_ended(status, kind, record, records):
    """(kind, sentence) for a child that noted nothing itself."""
    if kind == "timeout":
        here = [run for run in records if run.host == record.host and run.score is not None]
        first = "it was the first run here, with an empty compile cache: run it again"
        advice = "look for a hang or slow work outside the budget" if here else first
        return kind, f"not done {record.limit:.0f} s after the start; {advice}"
    if kind == "preempted" or status in (-signal.SIGTERM, -signal.SIGINT):
        return "preempted", "ended early by a signal; run it again"
    if status == -signal.SIGKILL:
        return "lost", "the run was killed, by hand or because the machine had no memory left; run it again"
    if status < 0:
        return "error", f"it crashed outside Python ({signal.Signals(-status).name}); run it again"
    if status == 0:
        return (
            "error",
            "the script ended and noted no score; let it end in guard(main), and main() in print_summary(...)",
        )
    return "error", f"the script ended with status {status} and no score; what stands above says why"


def slot_verdict(record, records):
    """What is said in a slot, where nothing is judged."""
    known = {run.harness for run in records if run.score is not None and run.metric == record.metric}
    others = " and ".join(sorted(str(each) for each in known - {record.harness}))
    if others:
        return f"none (harness {record.harness} on {record.host}, {others} elsewhere: are data and files the same?)"
    return "none (a slot does not judge; uv run referee status does, in the night's folder)"


def adopt_orphans():
    """Linux: orphaned descendants become ours, so that the whole tree can be ended."""
    if sys.platform == "linux":
        import ctypes

        set_child_subreaper = 36  # PR_SET_CHILD_SUBREAPER
        ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


def end_descendants():
    """Kills every process below this one, until there is none."""
    for _ in range(50):
        below = descendants()
        if not below:
            return
        for pid in below:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)


def descendants():
    """PIDs of all living processes below this one: from /proc on Linux, from ps elsewhere."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(path.parent.name)] = int(path.read_text("latin-1").rpartition(")")[2].split()[1])
    if not parents:
        out = subprocess.run(["ps", "-Ao", "pid=,ppid="], capture_output=True, text=True).stdout
        parents = {int(words[0]): int(words[1]) for words in map(str.split, out.splitlines())}
    below = {os.getpid()}
    while True:
        more = {child for child, parent in parents.items() if parent in below} - below
        if not more:
            return below - {os.getpid()}
        below |= more
