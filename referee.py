"""The referee of autoresearch: what a night of experiments needs, whatever is measured. No experiment edits this file.

    uv run referee.py run [--seed N] [--wait S]                     runs HEAD's train.py and says what came of it
    uv run referee.py wait [--wait S]                               waits for a run that has been started
    uv run referee.py log [keep|discard|crash] [--note TEXT]        writes HEAD's run into results.tsv, goes back if dropped
    uv run referee.py status                                        branch, best, noise, last rows, and the next step

In a fleet (fleet/program.md), where commits run in slots and come back in any order:

    uv run referee.py submit [COMMIT] [--seed N] [--gpus KIND]      sends a commit to a slot, and takes it off the branch
    uv run referee.py log COMMIT [keep|discard|crash]               its rows; keeps it where the branch is its base

Each command takes the folder of the experiment as a last argument; without one it is the folder it is called in. There
train.py is run or, where there is none, ruler.py, which ends in a call of measure() and makes any metric an experiment.

Rooms, each using only those above it:

    1. CONSTANTS   budget, seed, versions, the error
    2. FILES       atomic writes, hashes, locks
    3. GIT         commits, folders
    4. EXPERIMENT  which file runs, which may be edited, what is measured
    5. CLOCK       the training budget
    6. RUN         what the harness saw of the run in progress
    7. RECORDS     runs/, one JSON file a run
    8. RESULTS     results.tsv, one row a run
    9. VERDICT     gain against noise
    10. LOOK       what the edited file must not do, read from its syntax tree
    11. WATCH      files, threads and functions that must be left alone while a run goes on
    12. SUMMARY    the block that a run prints, and its record
    13. GUARD      one run a device, under a watchdog, with one line for every failure
    14. MEASURE    the door for any other metric
    15. NIGHT      the state of a night, and the step that follows from it
    16. FLEET      commits that run in many slots at once
    17. COMMANDS   run, wait, log, status, submit
"""

import ast
import contextlib
import datetime
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path

# == 1. CONSTANTS ======================================================================================================

STARTED = time.monotonic()  # total_seconds and the hard limit count from here
RULES = 2  # version of what decides a score or a verdict; part of every fingerprint
GRACE = 300  # seconds for start, compilation and evaluation; this far beyond the budget the watchdog ends the run
FIRST_SEED = 42
MOST_LINES = 20  # that a command prints


class RefereeError(Exception):
    """A mistake of the user or the machine, in a sentence that says what to run. kind: of its FAIL line."""

    def __init__(self, message, kind="harness"):
        super().__init__(message)
        self.kind = kind


def require(condition, message, kind="harness"):
    """Raises RefereeError unless the condition holds."""
    if not condition:
        raise RefereeError(message, kind)


def whole_number(name, default, least, most):
    """(value of an environment variable, what is wrong with it or None)."""
    text = os.environ.get(name)
    if text is None:
        return default, None
    if text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most:
        return int(text), None
    return default, f"{name} is {text[:40]!r}; give a whole number from {least} to {most}, or unset it"


TIME_BUDGET, WRONG_BUDGET = whole_number(
    "TIME_BUDGET", 300, 1, 10**6
)  # seconds of training; guard() says what is wrong
SEED, WRONG_SEED = whole_number("SEED", FIRST_SEED, 0, 2**63 - 1)

# == 2. FILES ==========================================================================================================


def write_atomic(path, content):
    """Writes text or bytes under a temporary name, then renames: the file is whole or as it was."""
    path = Path(path)
    part = path.with_name(f"{path.name}.part")  # one that a kill leaves is the next writer's
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def hash_text(text):
    """SHA-256 of a text, 64 hex digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def hash_file(path):
    """SHA-256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_hash(source):
    """SHA-256 of what Python source does: comments, spacing and docstrings are left out. Text that is no Python is hashed
    as it stands."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return hash_text(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
                body[0] = ast.Pass()
    return hash_text(ast.unparse(tree))


def try_lock(path):
    """(open file, whether its flock is ours). The lock is held until the file is closed, at the latest by our end, and
    not by children that are forked from us."""
    file = open(path, "a+")
    os.register_at_fork(after_in_child=file.close)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return file, False
    return file, True


def usable_cores():
    """Cores this process may use, by affinity: a slot of a cluster has fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_key():
    """Names the processor for a lock: cpu, or the cores of a slot that has some of them only."""
    if usable_cores() == os.cpu_count() or not hasattr(os, "sched_getaffinity"):
        return "cpu"
    return "cpu-" + "-".join(str(core) for core in sorted(os.sched_getaffinity(0)))


def cpu_name():
    """Model and usable cores of this machine's processor."""
    found = None
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    model = found[1].strip() if found else platform.machine()
    return f"cpu ({model}, {usable_cores()} cores)"


# == 3. GIT ============================================================================================================


@dataclass(frozen=True)
class Repository:
    """What git says of a folder. trouble: its own words where it refuses."""

    folder: Path
    top: Path | None = None  # of this working tree
    common: Path | None = None  # .git of the main working tree
    own: Path | None = None  # .git of this working tree
    head: str | None = None  # 40 hex digits
    short: str | None = None  # 7 or more, as many as tell it from other commits
    parent: str | None = None
    subject: str = ""
    branch: str = ""  # empty on a detached HEAD
    trouble: str = ""


def git(folder, *words, data=None):
    """(standard output, error text or None) of a git command; data goes to its standard input."""
    command = ["git", "-c", "safe.directory=*", "-c", "core.quotePath=off", *words]
    environment = {**os.environ, "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, env=environment, input=data)
    except OSError as error:
        return b"", f"git cannot be run: {error.strerror}"
    if done.returncode == 0:
        return done.stdout, None
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return b"", said[0] if said else f"git {words[0]} failed"


def git_text(folder, *words):
    """Output of a git command as text without the last line end; empty where it fails."""
    out, _ = git(folder, *words)
    return out.decode("utf-8", "replace").rstrip("\n")


def must_git(folder, *words, data=None):
    """Runs a git command that changes something; RefereeError with git's words where it fails."""
    _, trouble = git(folder, *words, data=data)
    require(trouble is None, f"git says: {trouble}; settle that, then run this again (it goes on where it stopped)")


def repository(folder):
    """The Repository around a folder."""
    questions = ["--show-toplevel", "--path-format=absolute", "--git-common-dir", "--git-dir"]
    out, trouble = git(folder, "rev-parse", *questions)
    if trouble:
        return Repository(folder, trouble=trouble)
    top, common, own = out.decode("utf-8", "surrogateescape").splitlines()[:3]
    place = {"top": Path(top), "common": Path(common), "own": Path(own)}
    out, trouble = git(folder, "log", "-1", "--abbrev=7", "--format=%H%n%h%n%P%n%s")
    if trouble:
        return Repository(folder, **place, trouble="there is no commit yet")
    head, short, parents, subject = out.decode("utf-8", "replace").split("\n")[:4]
    parent = parents.split()[0] if parents else None
    branch = git_text(folder, "symbolic-ref", "-q", "--short", "HEAD")
    return Repository(folder, **place, head=head, short=short, parent=parent, subject=subject, branch=branch)


def committed(folder, name, commit="HEAD"):
    """Bytes of a file of this folder in a commit, None where it is not in it."""
    out, trouble = git(folder, "show", f"{commit}:./{name}")
    return None if trouble else out


def changed_files(folder, names):
    """Those of the named files that differ from HEAD, deleted ones among them."""
    changed = []
    for name in names:
        path = folder / name
        now = path.read_bytes() if path.is_file() else None
        if now != committed(folder, name):
            changed.append(name)
    return changed


# == 4. EXPERIMENT =====================================================================================================


@dataclass(frozen=True)
class Experiment:
    """What runs in a folder, which of its files may be edited, and what is measured."""

    folder: Path
    script: str = "train.py"
    edits: tuple = ("train.py",)
    frozen: tuple = ("prepare.py", "referee.py")
    metric: str = "val_bpb"
    lower_is_better: bool = True

    @property
    def edited(self):
        """The edited files as a phrase."""
        return " and ".join(self.edits)

    @property
    def results(self):
        return self.folder / "results.tsv"

    @property
    def log(self):
        return self.folder / "run.log"

    @property
    def started(self):
        """Names the run that `run` started: process, seed, commit."""
        return self.folder / "run.json"


def find_experiment(folder):
    """The Experiment of a folder. RefereeError where nothing there can be run."""
    folder = Path(folder).resolve()
    if (folder / "train.py").is_file():
        return Experiment(folder)
    ruler = folder / "ruler.py"
    require(ruler.is_file(), f"{folder} holds no train.py and no ruler.py; name the folder of an experiment")
    facts = ruler_facts(ruler)
    checked_names(folder, **facts)
    return Experiment(
        folder,
        script="ruler.py",
        edits=tuple(facts["edits"]),
        frozen=("ruler.py", *facts["frozen"]),
        metric=facts["metric"],
        lower_is_better=facts["lower_is_better"],
    )


def ruler_facts(path):
    """The literal arguments of the measure() call in a ruler, read without running it."""
    facts = {"lower_is_better": True, "frozen": []}
    try:
        tree = ast.parse(path.read_bytes())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        call = next(call for call in calls if ast.unparse(call.func).split(".")[-1] == "measure")
        for keyword in call.keywords:
            if keyword.arg in ("metric", "lower_is_better", "edits", "frozen"):
                facts[keyword.arg] = ast.literal_eval(keyword.value)
    except (SyntaxError, ValueError, StopIteration):
        raise RefereeError(f"{path} must end in referee.measure(...) with its arguments written out") from None
    require("metric" in facts and "edits" in facts, f"measure() in {path} needs metric=... and edits=[...]")
    return facts


def checked_names(folder, metric, lower_is_better, edits, frozen):
    """Raises RefereeError where the arguments of measure() cannot be meant."""
    named = isinstance(metric, str) and re.fullmatch(r"[A-Za-z]\w*", metric)
    require(named, f"the metric is called {metric!r}; give a name of letters, digits and _")
    require(lower_is_better in (True, False), "lower_is_better is True or False; correct the ruler")
    listed = isinstance(edits, (list, tuple)) and isinstance(frozen, (list, tuple)) and len(edits) > 0
    require(listed, "edits and frozen are lists of file names, edits with one at least; correct the ruler")
    for name in [*edits, *frozen]:
        inside = isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts
        require(inside, f"{name!r} is no path inside {folder}; correct the ruler")
        require((folder / name).exists(), f"there is no {name} in {folder}; correct the ruler or restore the file")


# == 5. CLOCK ==========================================================================================================


class Clock:
    """The training budget in seconds: starts with the first training batch, stops with the first evaluation, never
    pauses. `now` is an argument so that tests can feed it ticks."""

    def __init__(self, budget):
        self.budget = budget
        self.started = None
        self.stopped = None
        self.restarted = False
        self.last = 0.0  # seconds at the last sign of life
        self.longest = 0.0  # between two signs of life, the later one inside the budget
        self.last_step = 0.0
        self.steps = []  # seconds that each step took

    def start(self, now=None):
        """Only the first call counts; another is remembered, and makes the run's score one that does not compare."""
        if self.started is not None:
            self.restarted = True
            return
        self.started = time.monotonic() if now is None else now

    def stop(self, now=None):
        """Ends the budget; only the first call counts."""
        if self.stopped is None:
            self.stopped = time.monotonic() if now is None else now

    def elapsed(self, now=None):
        """Seconds of training so far; 0 before the first batch."""
        if self.started is None:
            return 0.0
        if self.stopped is not None:
            return self.stopped - self.started
        return (time.monotonic() if now is None else now) - self.started

    def touch(self, now=None):
        """A sign of life, at every batch drawn: rare ticks cannot make a step look long. Returns elapsed()."""
        elapsed = self.elapsed(now)
        if elapsed <= self.budget:
            self.longest = max(self.longest, elapsed - self.last)
        self.last = elapsed
        return elapsed

    def tick(self, now=None):
        """To be called at the end of every step; returns elapsed(). A step that ends late does not excuse itself."""
        elapsed = self.touch(now)
        self.steps.append(elapsed - self.last_step)
        self.last_step = elapsed
        return elapsed

    def overrun(self):
        """Seconds beyond the budget where they exceed the longest step and 2 % of the budget, else 0."""
        over = self.elapsed() - self.budget
        return over if over > max(self.longest, 0.02 * self.budget) else 0.0


clock = Clock(TIME_BUDGET)

# == 6. RUN ============================================================================================================


@dataclass
class Run:
    """What the harness itself saw of the run in progress; the edited file is never asked for it."""

    experiment: Experiment | None = None
    repository: Repository | None = None
    code: str = ""  # hash of the edited files
    score: float | None = None
    audit: float | None = None
    device: object = None  # of the model that was scored
    rows: int = 0  # rows drawn for training
    guarded: bool = False
    recorded: bool = False
    doubts: list = field(default_factory=list)  # why the score may not be compared, as sentences


this_run = Run()


def doubt(sentence):
    """Notes why this run's score may not be compared with others; the verdict is then none (sentence)."""
    if sentence not in this_run.doubts:
        this_run.doubts.append(sentence)


def hash_edits(experiment):
    """Hash of what the edited files do; two commits with the same one are the same idea."""
    parts = []
    for name in experiment.edits:
        path = experiment.folder / name
        text = path.read_bytes().decode("utf-8", "surrogateescape") if path.is_file() else ""
        parts.append(f"{name} {code_hash(text) if name.endswith('.py') else hash_text(text)}")
    return hash_text("\n".join(parts))[:16]


# == 7. RECORDS ========================================================================================================

NONE = None.__class__
REQUIRED = {  # of a record, with the types it may have; others are the run's own facts
    "time": (str,),
    "commit": (str, NONE),
    "seed": (int,),
    "score": (int, float, NONE),
    "fail": (dict, NONE),
    "code": (str,),
    "harness": (str, NONE),
    "device": (str, NONE),
    "why_not": (list,),
}


def runs_folder(folder, place):
    """runs/ of an experiment. It lies in the main working tree, so that all working trees share it."""
    if place.top is None or not folder.is_relative_to(place.top):
        return folder / "runs"
    return place.common.parent / folder.relative_to(place.top) / "runs"


def night_folder(experiment):
    """The folder whose night this run belongs to: the experiment's own, or in a slot (fleet/slot.sh) the one that
    AUTORESEARCH_NIGHT names."""
    return Path(os.environ.get("AUTORESEARCH_NIGHT") or experiment.folder)


def night_runs(experiment, place):
    """runs/ of that night."""
    folder = night_folder(experiment)
    return runs_folder(folder, place if folder == experiment.folder else repository(folder))


def in_slot():
    return "AUTORESEARCH_NIGHT" in os.environ


def write_record(runs, record):
    """Writes one file a run: nothing tears or interleaves, and logs of several machines are pooled by copying files."""
    runs.mkdir(parents=True, exist_ok=True)
    stamp = re.sub(r"[-:]", "", record["time"])
    host = re.sub(r"[^\w.-]", "_", record["host"])
    commit = (record["commit"] or "nocommit")[:7]
    name = f"{stamp}-{commit}-{record['seed']}-{host}-{record['pid']}.json"
    write_atomic(runs / name, json.dumps(record, indent=1) + "\n")


def sound(record):
    """Whether a record can be used: a damaged one must not spoil the runs after it."""
    if not isinstance(record, dict):
        return False
    for key, types in REQUIRED.items():
        if key not in record or not isinstance(record[key], types):
            return False
    if record["score"] is not None and not math.isfinite(record["score"]):
        return False
    if not all(isinstance(reason, str) for reason in record["why_not"]):
        return False
    return record["commit"] is None or re.fullmatch(r"[0-9a-f]{7,64}", record["commit"]) is not None


def read_runs(runs):
    """(sound records, oldest first; how many files were skipped) of a folder runs/."""
    found, skipped = [], 0
    for path in sorted(runs.glob("*.json")):
        try:
            record = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            record = None
        if sound(record):
            found.append(record)
        else:
            skipped += 1
    return found, skipped


def new_record(experiment, place, seed):
    """The fields that every record has, of a run that has no end yet."""
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "commit": place.head,
        "parent": place.parent,
        "subject": place.subject,
        "seed": seed,
        "metric": experiment.metric,
        "lower_is_better": experiment.lower_is_better,
        "score": None,
        "fail": None,
        "code": this_run.code,
        "harness": None,
        "device": None,
        "why_not": [],
        "slot": in_slot(),
    }


# == 8. RESULTS ========================================================================================================

STATUSES = ("keep", "discard", "crash")


@dataclass(frozen=True)
class Row:
    """A row of results.tsv. commit: 7 or more hex digits; score: as it stands there."""

    commit: str
    score: str
    memory: str
    status: str
    description: str

    def is_of(self, commit):
        return commit is not None and commit.startswith(self.commit)


@dataclass(frozen=True)
class Results:
    """What results.tsv says. wrong: numbers of the lines that cannot be read; maybe_keep: one of them may name a keep."""

    rows: tuple = ()
    wrong: tuple = ()
    maybe_keep: bool = False
    trouble: str = ""

    def status(self, commit):
        """The last word on a commit, None where it has no row."""
        words = [row.status for row in self.rows if row.is_of(commit)]
        return words[-1] if words else None

    def names_a_keep(self):
        return self.maybe_keep or bool(self.trouble) or any(row.status == "keep" for row in self.rows)


def read_row(line):
    """The Row of a line, None where it is none."""
    parts = line.rstrip("\r").split("\t")
    if len(parts) < 5:
        return None
    commit, score, memory, status = (part.strip().lower() for part in parts[:4])
    number = r"-?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"
    good = re.fullmatch("[0-9a-f]{7,64}", commit) and re.fullmatch(f"nan|{number}", score) and status in STATUSES
    if not good or not re.fullmatch(f"{number}|n/a|", memory):
        return None
    return Row(commit, score, memory, status, "\t".join(parts[4:]))


def read_results(path):
    """The Results of a file; one that is missing has no rows."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Results()
    except OSError as error:
        return Results(trouble=f"results.tsv cannot be read ({error.strerror})")
    rows, wrong = [], []
    maybe_keep = False
    for number, line in enumerate(data.decode("utf-8-sig", "replace").split("\n"), 1):
        row = read_row(line)
        if row is not None:
            rows.append(row)
        elif line.strip() and not (number == 1 and line.startswith("commit\t")):
            wrong.append(number)
            maybe_keep = maybe_keep or re.search("kee?p", line.replace("\0", ""), re.I) is not None
    return Results(tuple(rows), tuple(wrong), maybe_keep)


def append_row(path, row, metric):
    """Adds a row as one atomic write of the whole file; what else stands there stays, byte for byte."""
    header = f"commit\t{metric}\tmemory_gb\tstatus\tdescription\n".encode()
    try:
        before = path.read_bytes()
    except FileNotFoundError:
        before = header
    if before and not before.endswith(b"\n"):
        before += b"\n"
    text = "\t".join([row.commit, row.score, row.memory, row.status, " ".join(row.description.split())])
    write_atomic(path, before + text.encode("utf-8", "replace") + b"\n")


# == 9. VERDICT ========================================================================================================

STUDENT = (6.31, 2.92, 2.35, 2.13, 2.02)  # t, one-sided 95 %, for 1 to 5 degrees of freedom; 2.0 for more
ENOUGH = 3  # seeds of one file before it can be kept; this and the next two come from tests/test_verdict.py's nights
MOST = 5  # seeds of one file, where three have not decided
NEAR = 0.7  # of the gain that is needed: from there on another seed may decide
SLOWED = 1.25  # a run this many times slower a step than another of the same file does not count
SAME = ("harness", "device", "attention", "metric")  # runs that agree in these share a table


@dataclass(frozen=True)
class Verdict:
    """word: keep, rerun, discard, baseline or none. seed: the next one to run, None where no run is missing."""

    word: str
    reason: str
    seed: int | None = None

    def __str__(self):
        return f"{self.word} ({self.reason})"


def scores_by_commit(runs):
    """{commit: {seed: score}} of comparable records, oldest first. Commits of one file share their scores; of a seed
    that was run again the first score counts."""
    commits, files = {}, {}
    for run in runs:
        scores = files.setdefault(run["code"], {})
        scores.setdefault(run["seed"], run["score"])
        commits[run["commit"]] = scores
    return commits


def pooled_noise(commits):
    """(standard deviation of a run's score, degrees of freedom), over all files that ran with two seeds or more."""
    squares, df = 0.0, 0
    for scores in {id(scores): scores for scores in commits.values()}.values():
        middle = mean(scores)
        squares += math.fsum((score - middle) ** 2 for score in scores.values())
        df += len(scores) - 1
    return math.sqrt(squares / max(df, 1)), df


def student(df):
    """One-sided 95 % point of Student's t."""
    return STUDENT[df - 1] if 0 < df <= len(STUDENT) else 2.0


def mean(scores):
    """Mean of {seed: score}."""
    return math.fsum(scores.values()) / len(scores)


def next_seed(scores):
    """The first seed from 42 on that has no score."""
    seed = FIRST_SEED
    while seed in scores:
        seed += 1
    return seed


def judge(runs, statuses):
    """The Verdict on the last of runs: comparable records, oldest first. statuses: the last word of results.tsv on each
    commit. Student's t-test on means over seeds, with one standard deviation for all files. A gain is kept only when
    ENOUGH seeds confirm it: a keep after one lucky run would be the bar for all that follow. One that is near to clear
    then gets up to MOST."""
    run = runs[-1]
    sign = 1 if run.get("lower_is_better", True) else -1
    commits = scores_by_commit(runs)
    mine = commits[run["commit"]]
    sd, df = pooled_noise(commits)
    noise = f"noise sd {sd:.6f}, df {df}" if df else "noise unknown"
    noise += same_file(runs) + same_draws(mine, sd)
    quiet = df > 0 and sd == 0  # a metric without noise: one run says all
    seed = None if len(mine) >= ENOUGH or quiet else next_seed(mine)
    after = "" if seed is None else f"next SEED={seed}; "
    others = [commit for commit in commits if statuses.get(commit) == "keep" and commit != run["commit"]]
    if not others:
        counted = f"{after}mean {mean(mine):.6f} of {len(mine)} seeds; {noise}"
        if statuses.get(run["commit"]) == "keep":
            return Verdict("keep", f"{counted}; measured again", seed)
        return Verdict("baseline", counted, seed)
    best = min(others, key=lambda commit: sign * mean(commits[commit]))
    gain = sign * (mean(commits[best]) - mean(mine))
    need = student(df) * sd * math.sqrt(1 / len(mine) + 1 / len(commits[best]))
    numbers = (
        f"gain {gain:+.6f} on {best[:7]}, {mean(commits[best]):.6f}; clear above {need:.6f} with {len(mine)} and "
        f"{len(commits[best])} seeds; {noise}"
    )
    if df == 0:
        return Verdict("none", f"the noise is unknown: run {best[:7]} with another SEED first; {numbers}")
    if gain <= sd / 2:
        return Verdict("discard", numbers)
    if seed is None and NEAR * need < gain <= need and len(mine) < MOST:
        seed = next_seed(mine)
    if seed is not None:
        return Verdict("rerun", f"next SEED={seed}; {numbers}", seed)
    return Verdict("keep" if gain > need else "discard", numbers)


def same_file(runs):
    """A phrase where the last run repeats an earlier one, else nothing."""
    run = runs[-1]
    for each in runs[:-1]:
        again = each["commit"] != run["commit"] or each["seed"] == run["seed"]
        if each["code"] == run["code"] and again:
            return f"; same file as {each['commit'][:7]}: {each['score']:.6f}"
    return ""


def same_draws(scores, sd):
    """A phrase where the seeds of a file differ by a twentieth of the noise or less, else nothing."""
    alike = len(scores) > 1 and max(scores.values()) - min(scores.values()) <= sd / 20
    return "; its seeds hardly differ: does it draw from SEED?" if alike and sd > 0 else ""


def pace(run):
    """Seconds a step of a record, None where it has no steps."""
    steps, seconds = run.get("ticks"), run.get("seconds")
    if isinstance(steps, int) and isinstance(seconds, (int, float)) and steps > 0 and seconds > 0:
        return seconds / steps
    return None


def fastest_by_file(runs):
    """{hash of the edited files: of its last three records the one that made its steps fastest}. Three slow runs in a
    row are what the machine is now: a night must not wait for ever for the speed it once had."""
    latest = {}
    for run in runs:
        if pace(run) is not None:
            latest.setdefault(run["code"], []).append(run)
    return {code: min(group[-3:], key=pace) for code, group in latest.items()}


def slowed_against(run, fastest):
    """The fast run of the same file that made its steps over a quarter faster than this one, else None."""
    twin = fastest.get(run["code"])
    if twin is None or pace(run) is None:
        return None
    return twin if pace(run) > SLOWED * pace(twin) else None


def table_of(record, runs):
    """The records that compare with one: scored without doubts, on the same kind of device, under one fingerprint."""
    same = [run for run in runs if all(run.get(key) == record.get(key) for key in SAME)]
    return [run for run in same if run["score"] is not None and not run["why_not"] and run["commit"]]


def verdict_on(record, runs, results, bases=None):
    """The Verdict on a record, given all records (this one among them) and what results.tsv says. bases: the commits it
    was cut from, where only those of them that were kept are compared with; None for every kept commit."""
    if record["fail"]:
        return Verdict("none", f"it failed: {record['fail'].get('kind')}")
    if record["why_not"]:
        return Verdict("none", "; ".join(record["why_not"]))
    table = table_of(record, runs)
    fastest = fastest_by_file(table)
    faster = slowed_against(record, fastest)
    if faster:
        return Verdict(
            "none",
            f"slowed: {record['ticks']} steps where seed {faster['seed']} of the same file made {faster['ticks']}; "
            "run it again when the machine is quiet",
            record["seed"],
        )
    counted = [run for run in table if run is not record and not slowed_against(run, fastest)]
    if results.trouble:
        return Verdict("none", f"{results.trouble}; mend that, then: uv run referee.py status")
    commits = {run["commit"] for run in counted if bases is None or run["commit"] in bases}
    statuses = {commit: results.status(commit) for commit in {*commits, record["commit"]}}
    if results.names_a_keep() and "keep" not in statuses.values():
        return Verdict("none", f"no kept run compares; {run_first(record, runs, results, bases)}")
    return judge([*counted, record], statuses)


def run_first(record, runs, results, bases):
    """The kept commit that has to run before a record can be judged, as a phrase: the last one that it was cut from."""
    kept = [run for run in runs if run["score"] is not None and results.status(run["commit"]) == "keep"]
    kept = [run for run in kept if bases is None or run["commit"] in bases]
    if not kept:
        return "run the kept commit again"
    base = kept[-1]
    if base["harness"] != record["harness"] and base["device"] == record["device"]:
        there = f"{base['host']} and {record['host']}" if base["host"] != record["host"] else record["host"]
        return (
            f"{base['commit'][:7]} ran under harness {base['harness']}, this one under {record['harness']} "
            f"({there}): make data and frozen files the same, or run {base['commit'][:7]} again"
        )
    if (base["harness"], base["device"]) == (record["harness"], record["device"]):
        return (
            f"{base['commit'][:7]} ran with attention={base.get('attention')!r}, this one with "
            f"{record.get('attention')!r}: where the machine offers the same, an idea keeps the name"
        )
    return f"run {base['commit'][:7]} on this kind first"


# == 10. LOOK ==========================================================================================================

HARNESS_VARIABLES = re.compile(r"SEED|TIME_BUDGET|AUDIT|AUTORESEARCH_\w*|HOME|TMPDIR|USER|CUDA_VISIBLE_DEVICES|GIT_\w*")
FREE = {"config", "backends"}  # settings below these names may be changed
PROCESSES = {"threading", "_thread", "multiprocessing", "concurrent", "subprocess", "asyncio", "pty"}
OTHERS_MEMORY = {"ctypes", "atexit", "inspect", "mock", "unittest", "faulthandler"}
OS_CALLS = re.compile(r"os\.(fork\w*|system|popen|exec\w+|spawn\w+|posix_spawn\w*|_exit|kill|dup2?|putenv|unsetenv)")
INNARDS = re.compile(
    r"_getframe|_current_frames|f_back|f_locals|f_globals|__globals__|__code__|__closure__|__builtins__|gi_frame|tb_frame"
    r"|get_referrers|get_objects|get_referents|settrace|setprofile|addaudithook|import_module|redirect_stdout"
    r"|redirect_stderr"
)


class Look(ast.NodeVisitor):
    """Collects (line, sentence) for what an edited file does to the harness. In one process nothing stops a determined
    cheat; this tells one who drifts into it. doors: {frozen module: names that may be used}."""

    def __init__(self, doors):
        self.doors = doors
        self.imported = {}  # local name: dotted path of what it stands for
        self.found = []

    def say(self, node, sentence):
        self.found.append((node.lineno, sentence))

    def path(self, node):
        """Dotted path of an expression that begins at an imported name, else None."""
        if isinstance(node, ast.Name):
            return self.imported.get(node.id)
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            above = self.path(node.value)
            if above is None:
                return None
            return f"{above}.{node.attr}" if isinstance(node, ast.Attribute) else f"{above}[]"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("vars", "getattr") and node.args:
            return self.path(node.args[0])
        return None

    def visit_Import(self, node):
        for name in node.names:
            self.check_module(node, name.name)
            self.imported[name.asname or name.name.split(".")[0]] = (
                name.name if name.asname else name.name.split(".")[0]
            )

    def visit_ImportFrom(self, node):
        self.check_module(node, node.module or "")
        for name in node.names:
            self.imported[name.asname or name.name] = f"{node.module}.{name.name}"
            self.check_door(node, node.module, name.name)

    def check_module(self, node, module):
        parts = set(module.split("."))
        if parts & PROCESSES:
            self.say(node, f"imports {module}: no threads or processes of its own")
        if parts & (OTHERS_MEMORY | {"importlib", "builtins"}):
            self.say(node, f"imports {module}, which reaches beyond its own code")
        if module == "referee":
            self.say(node, "imports referee; prepare is the door")

    def check_door(self, node, module, name):
        if module in self.doors and name not in self.doors[module]:
            self.say(node, f"uses {module}.{name}, which is outside the door of {module}")

    def visit_Attribute(self, node):
        above = self.path(node.value)
        self.check_door(node, above, node.attr)
        if INNARDS.fullmatch(node.attr):
            self.say(node, f"uses {node.attr}, which reaches beyond its own code")
        if above == "sys" and node.attr == "modules":
            self.say(node, "uses sys.modules, which reaches beyond its own code")
        self.generic_visit(node)

    def visit_Name(self, node):
        if node.id in ("exec", "eval", "__import__", "globals", "__builtins__"):
            self.say(node, f"uses {node.id}, so that what runs is not what is written")

    def visit_Call(self, node):
        called = self.path(node.func) or ""
        if OS_CALLS.fullmatch(called):
            self.say(node, f"calls {called}: no processes, and no files of the harness")
        if called.startswith("os.environ.") and called.split(".")[2] in ("update", "setdefault", "pop", "clear"):
            self.check_variables(node, node.args, node.keywords)
        if isinstance(node.func, ast.Name) and node.args:
            self.check_by_name(node, node.func.id, self.path(node.args[0]))
        changes = re.fullmatch(r"(.*__dict__)\.(update|setdefault|pop)", called)
        if changes:
            self.check_change(node, changes[1])
        self.generic_visit(node)

    def check_by_name(self, node, function, path):
        """setattr, getattr and vars on something imported."""
        if function in ("setattr", "delattr"):
            self.check_change(node, path)
        if function == "vars":
            self.check_door(node, path, "__dict__")
        if function == "getattr" and len(node.args) > 1:
            name = node.args[1]
            self.check_door(node, path, name.value if isinstance(name, ast.Constant) else "a name that is computed")

    def check_variables(self, node, arguments, keywords=()):
        """Environment variables that are set or removed: the harness's own, or one that cannot be read here."""
        names = [keyword.arg for keyword in keywords]
        for argument in arguments[:1]:
            keys = argument.keys if isinstance(argument, ast.Dict) else [argument]
            names += [key.value if isinstance(key, ast.Constant) else None for key in keys]
        for name in names:
            if not isinstance(name, str) or HARNESS_VARIABLES.fullmatch(name):
                self.say(node, f"sets the environment variable {name or 'of some name'}, which is the harness's")

    def check_change(self, node, path):
        if path is not None and not FREE & set(re.split(r"[.\[]", path)):
            self.say(node, f"changes {path}, which is not its own")

    def change(self, target):
        if isinstance(target, (ast.Tuple, ast.List)):
            for part in target.elts:
                self.change(part)
        elif isinstance(target, ast.Starred):
            self.change(target.value)
        elif isinstance(target, ast.Subscript) and self.path(target.value) == "os.environ":
            self.check_variables(target, [target.slice])
        elif isinstance(target, (ast.Attribute, ast.Subscript)):
            self.check_change(target, self.path(target))

    def visit_Assign(self, node):
        for target in node.targets:
            self.change(target)
            if isinstance(target, ast.Name):
                self.alias(target.id, node.value)
        self.generic_visit(node)

    def alias(self, name, value):
        """A name given to something imported stands for it from here on; given anything else it no longer does."""
        path = self.path(value) if isinstance(value, (ast.Name, ast.Attribute)) else None
        if path is not None:
            self.imported[name] = path
        else:
            self.imported.pop(name, None)

    def visit_AugAssign(self, node):
        self.change(node.target)
        self.generic_visit(node)

    def visit_AnnAssign(self, node):
        self.change(node.target)
        self.generic_visit(node)

    def visit_Delete(self, node):
        for target in node.targets:
            self.change(target)

    def visit_For(self, node):
        self.change(node.target)
        self.generic_visit(node)

    def visit_With(self, node):
        for item in node.items:
            if item.optional_vars is not None:
                self.change(item.optional_vars)
        self.generic_visit(node)


def look(source, doors=None):
    """[(line, sentence)] for what a file does to the harness, oldest line first; empty for a file that is no Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    finder = Look(doors or {})
    finder.visit(tree)
    return sorted(set(finder.found))


# == 11. WATCH =========================================================================================================

_watched = {}  # (device, inode) of a file: what is said when somebody opens it
_readers = set()  # threads that read for the harness
_seals = []  # (name, namespace, key, code) of functions as they were compiled
_hooked = False


def watch_files(paths, said):
    """From now on whoever opens one of these files outside reading() makes this run's score one that does not compare."""
    global _hooked
    for path in paths:
        with contextlib.suppress(OSError):
            facts = os.stat(path)
            _watched[facts.st_dev, facts.st_ino] = f"{said}: {Path(path).name}"
    if not _hooked:
        sys.addaudithook(_on_event)
        _hooked = True


def _on_event(event, arguments):
    """The audit hook (PEP 578). It stays for the life of the process, so it is cheap where nothing is opened."""
    if event != "open" or not _watched or threading.get_ident() in _readers:
        return
    with contextlib.suppress(OSError, ValueError, TypeError):
        facts = os.stat(arguments[0])
        said = _watched.get((facts.st_dev, facts.st_ino))
        if said is not None:
            doubt(f"{said} was opened{_caller()}")


def _caller():
    """Where in the running script this thread is, as a phrase."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == script:
            return f" by {Path(script).name} in line {frame.f_lineno}"
        frame = frame.f_back
    return " by other code"


@contextlib.contextmanager
def reading():
    """While this lasts, this thread opens watched files for the harness."""
    thread = threading.get_ident()
    inner = thread in _readers
    _readers.add(thread)
    try:
        yield
    finally:
        if not inner:
            _readers.discard(thread)


def seal(module):
    """Notes the functions and methods of a module of the frozen half, so that a replaced one is noticed."""
    for name, value in vars(module).items():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if callable(value) and hasattr(value, "__code__"):
            _seals.append((f"{module.__name__}.{name}", vars(module), name, value, value.__code__))
        if isinstance(value, type):
            for key, method in vars(value).items():
                if hasattr(method, "__code__"):
                    _seals.append((f"{module.__name__}.{name}.{key}", value, key, method, method.__code__))


def broken_seals():
    """Names of sealed functions that are no longer what they were."""
    broken = []
    for name, owner, key, function, code in _seals:
        now = owner.get(key) if isinstance(owner, dict) else vars(owner).get(key)
        if now is not function or function.__code__ is not code:
            broken.append(name)
    return broken


# == 12. SUMMARY =======================================================================================================


def finish(lines, facts):
    """Prints the stamped block and writes the run's record. lines: {key: text} of the block, in order; facts: what else
    the record holds: harness (the fingerprint) and device at least. The score is printed first, so that nothing that
    fails later loses it."""
    print("---")
    for key, text in lines.items():
        print(f"{key + ':':<17} {text}")
    sys.stdout.flush()
    run = this_run
    add_doubts()
    record = new_record(run.experiment, run.repository, SEED) | facts
    record |= step_facts() | {"score": round(run.score, 6), "why_not": list(run.doubts)}
    trouble = save_record(record)
    run.recorded = True
    said = f"none ({trouble})" if trouble else str(spoken_verdict(record))
    print(f"{'verdict:':<17} {said}", flush=True)


def save_record(record):
    """Writes this run's record into runs/ of its night; returns what went wrong as a sentence, else None. In a slot the
    record then goes into the slot's own clone, which slot.sh keeps."""
    experiment, place = this_run.experiment, this_run.repository
    runs = night_runs(experiment, place)
    try:
        write_record(runs, record)
        return None
    except OSError as error:
        trouble = f"the run could not be written into {runs}: {error.strerror}; free some room, then "
    own = runs_folder(experiment.folder, place)
    if own == runs:
        return f"{trouble}run it again"
    try:
        write_record(own, record)
        return f"{trouble}copy what is in {own} there"
    except OSError:
        return f"{trouble}run it again"


def spoken_verdict(record):
    """The verdict on a record just written; names the rows of results.tsv that it cannot read."""
    experiment = this_run.experiment
    results = read_results(experiment.results)
    if results.wrong:
        print(f"results.tsv: {wrong_lines(results)}")
    before, skipped = read_runs(night_runs(experiment, this_run.repository))
    if skipped:
        print(f"runs: {skipped} damaged files are skipped")
    if len(before) <= 1 and (experiment.folder / "runs.jsonl").is_file():
        print("runs.jsonl: from an earlier version, whose scores do not compare with these; it is not read any more")
    runs = [run for run in before if run["time"] != record["time"] or run["pid"] != record["pid"]]
    if in_slot():
        return slot_verdict(record, runs)
    return verdict_on(record, [*runs, record], results)


def slot_verdict(record, runs):
    """What a run in a slot says: it is judged when it is logged, against the commits it was cut from."""
    others = {run["harness"] for run in runs if run["score"] is not None and run["metric"] == record["metric"]}
    if record["harness"] in others or not others:
        return Verdict("none", "this slot does not judge; uv run referee.py status does, in the night's folder")
    known = " and ".join(sorted(str(each) for each in others))
    return Verdict(
        "none", f"harness {record['harness']} on {record['host']}, {known} elsewhere: are its data and files the same?"
    )


def wrong_lines(results):
    """The lines of results.tsv that cannot be read, as a phrase."""
    numbers = ", ".join(str(number) for number in results.wrong[:5])
    more = f" and {len(results.wrong) - 5} more" if len(results.wrong) > 5 else ""
    return f"line {numbers}{more} cannot be read (commit, score, memory_gb, keep|discard|crash, text between tabs)"


def step_facts():
    """Steps and their seconds, as the clock saw them."""
    steps = sorted(clock.steps)
    count = len(steps)
    facts = {
        "seconds": round(clock.elapsed(), 2),
        "total_seconds": round(time.monotonic() - STARTED, 1),
        "ticks": count,
    }
    if clock.started is not None:
        facts["startup"] = round(clock.started - STARTED, 1)
    if count:
        facts["tick_median"] = round(steps[count // 2], 5)
        facts["tick_p90"] = round(steps[count * 9 // 10], 5)
    return facts


def add_doubts():
    """What only the end of a run can show."""
    if not this_run.guarded:
        doubt("guard() was not around main()")
    if clock.started is None:
        doubt("no training batch was drawn")
    if clock.restarted:
        doubt("clock.start() was called again; the loader starts the clock, once")
    if clock.overrun() > 0:
        doubt(f"the budget was overrun by {clock.overrun():.1f} s")
    for name in broken_seals():
        doubt(f"{name} was replaced while the run went on")
    for name in borrowed_modules():
        doubt(f"{name} was imported; all of an experiment stands in {this_run.experiment.edited}")


def borrowed_modules():
    """Files of the experiment's folder that were imported, besides those that may be edited and the frozen ones."""
    experiment = this_run.experiment
    known = {str(experiment.folder / name) for name in (experiment.script, *experiment.edits, *experiment.frozen)}
    found = set()
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None) or ""
        inside = Path(path).parent == experiment.folder
        if inside and path not in known and "prepare.py" in experiment.frozen:
            found.add(Path(path).name)
    return sorted(found)


# == 13. GUARD =========================================================================================================


def watch(pid, seconds, line):
    """Runs in a process of its own: ends process `pid` and all its descendants after `seconds` and says so. It signals
    single processes, never a group, which the caller's shell may share."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.2)
        if os.getppid() != pid:  # it died in a way that guard() could not see
            os.write(1, b"\nFAIL: error: the run was killed or crashed outside Python; run it again\n")
            return
    send(pid, signal.SIGSTOP)  # it starts nothing more
    for _ in range(10):  # again, for what was being started meanwhile
        for target in descendants(pid):
            send(target, signal.SIGKILL)
        time.sleep(0.05)
    os.write(1, f"\n{line}\n".encode())
    send(pid, signal.SIGKILL)


def send(pid, number):
    with contextlib.suppress(OSError):
        os.kill(pid, number)


def descendants(pid):
    """PIDs of all processes below one, this process left out."""
    parents = parents_of_all()
    below = {pid}
    while True:
        more = {child for child, parent in parents.items() if parent in below and os.getpid() not in (child, parent)}
        if more <= below:
            return below - {pid}
        below |= more


def parents_of_all():
    """{pid: parent's pid} of every process: from /proc on Linux, from ps elsewhere."""
    table = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            table[int(path.parent.name)] = int(path.read_text("latin-1").rpartition(")")[2].split()[1])
    if not table:
        out = subprocess.run(["ps", "-Ao", "pid=,ppid="], capture_output=True, text=True).stdout
        table = {int(words[0]): int(words[1]) for words in map(str.split, out.splitlines())}
    return table


def start_watchdog(limit):
    """The watchdog process. A process, because threads stall inside C calls."""
    line = f"FAIL: timeout: not done {limit} s after the start; look for a hang or slow work outside the budget"
    left = limit - (time.monotonic() - STARTED)
    command = [sys.executable, "-IS", os.path.realpath(__file__), "watch", str(os.getpid()), str(left), line]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def adopt_orphans():
    """Linux: orphaned descendants become ours, so that the watchdog finds the whole tree."""
    if sys.platform == "linux":
        import ctypes

        set_child_subreaper = 36  # PR_SET_CHILD_SUBREAPER
        ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


def identify(experiment):
    """Notes which commit and which file this run is of, and why they might not be what they seem."""
    run = this_run
    run.experiment = experiment
    run.repository = repository(experiment.folder)
    run.code = hash_edits(experiment)
    if run.repository.head is None:
        doubt(f"{experiment.edited} is in no commit ({run.repository.trouble}); commit it first")
        return
    for name in changed_files(experiment.folder, experiment.edits):
        held = committed(experiment.folder, name) is not None
        reason = "is not what HEAD holds" if held else "is in no commit"
        doubt(f"{name} {reason}; commit it first")


def seen_in_edits(experiment):
    """What the look finds in the edited Python files, as sentences with line numbers."""
    doors = {}
    for name in experiment.frozen:
        path = experiment.folder / name
        text = path.read_text(errors="replace") if path.suffix == ".py" and path.is_file() else ""
        names = re.search(r"^__all__ = (\[[^]]*\])", text, re.MULTILINE)
        if names:
            doors[path.stem] = set(ast.literal_eval(names[1]))
    sentences = []
    for name in experiment.edits:
        path = experiment.folder / name
        if path.suffix == ".py" and path.is_file():
            for line, sentence in look(path.read_bytes(), doors):
                sentences.append(f"{name} line {line} {sentence}")
    return sentences


def take_device(key):
    """Locks a device for this user on this machine; returns the open lock file. RefereeError where another run has it."""
    safe = re.sub(r"[^\w.-]", "_", key)
    lock, ours = try_lock(Path(tempfile.gettempdir()) / f"autoresearch-{os.getuid()}-{safe}.lock")
    lock.seek(0)
    holder = lock.read()
    require(ours, f"process {holder} is using {key}; wait for it or end it, then run again", "busy")
    lock.truncate(0)
    print(os.getpid(), end="", file=lock, flush=True)
    return lock


def script_experiment():
    """The Experiment of the script that runs, for a train.py."""
    script = Path(getattr(sys.modules["__main__"], "__file__", "train.py")).resolve()
    if script.name != "train.py":
        doubt(f"the run was of {script.name}; only train.py is an experiment")
    return Experiment(script.parent, script=script.name, edits=(script.name,))


def guard(body, lock_key, limit, experiment=None):
    """Runs body() as the one run on its device, under a watchdog that ends it and its descendants `limit` seconds after
    the start. lock_key: a function that names the device. Exits with 0 after a score, else with 1 and the line
    FAIL: <oom|nan|timeout|busy|harness|error>: what happened, what to do."""
    adopt_orphans()
    watchdog = start_watchdog(limit)
    signal.signal(signal.SIGTERM, on_sigterm)
    failed = None
    try:
        require(not WRONG_BUDGET, WRONG_BUDGET)
        require(not WRONG_SEED, WRONG_SEED)
        this_run.guarded = True
        identify(experiment or script_experiment())
        for sentence in seen_in_edits(this_run.experiment):
            doubt(sentence)
        lock = take_device(lock_key())  # held while this frame lives
        body()
        require(this_run.recorded, "the run ended without a score; call evaluate_bpb and print_summary", "error")
        lock.flush()
    except BaseException as error:
        failed = failure(error)
    watchdog.kill()
    watchdog.wait()
    if failed:
        sys.stderr.flush()
        record_failure(*failed)
        print(f"\nFAIL: {failed[0]}: {failed[1]}", flush=True)
    sys.exit(1 if failed else 0)


def on_sigterm(number, frame):
    """The first SIGTERM ends the run; another (uv forwards it twice) must not end the ending."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit("SIGTERM")


def failure(error):
    """(kind, sentence) for what ended a run; prints the traceback of what nobody foresaw."""
    text = " ".join(str(error).split())
    if isinstance(error, RefereeError):
        return error.kind, text
    if isinstance(error, FloatingPointError):
        return "nan", f"{text}; lower a learning rate and run again"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or says_out_of_memory(text):
        return "oom", f"{text.split('. ')[0]}; lower the micro-batch or the model and run again"
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return "error", f"ended early ({type(error).__name__} {text}); run it again"
    traceback.print_exception(error)
    return "error", f"{type(error).__name__}: {text}; the traceback above says where"


def says_out_of_memory(text):
    return "out of memory" in text.lower() or "CUBLAS_STATUS_ALLOC_FAILED" in text


def record_failure(kind, sentence):
    """A record of a run without a score. A preempted or busy one has a record too: it is no crash of the idea."""
    run = this_run
    if run.recorded or run.experiment is None:
        return
    fail = {"kind": kind, "sentence": sentence}
    record = (
        new_record(run.experiment, run.repository, SEED) | step_facts() | {"fail": fail, "why_not": list(run.doubts)}
    )
    trouble = save_record(record)
    if trouble:
        print(f"\n{trouble}", flush=True)


# == 14. MEASURE =======================================================================================================


def measure(function, *, metric, edits, frozen=(), lower_is_better=True, budget=300):
    """Runs function() as an experiment, as the last statement of a ruler.py:

        if __name__ == "__main__":
            referee.measure(render_time, metric="seconds", edits=["engine.py"], frozen=["pages"], budget=60)

    function() returns the score, or the score and a dict of further figures, which are printed and recorded; it may run
    any command, so the edited files may be of any language. edits: the files that an experiment may change; frozen: files
    and folders that decide the score besides the ruler (tests, data): all are hashed into the fingerprint, so that a
    changed test is another table and never an improvement. Paths are relative to the ruler's folder, which must lie in a
    git repository; the arguments are written out as literals, since the commands read them without running the ruler.
    budget: seconds from the start after which the run is a FAIL: timeout. A score that is no finite number, or an
    exception, ends in a FAIL line too; RefereeError("sentence") says why in words of your own."""
    ruler = Path(sys.modules["__main__"].__file__).resolve()
    folder = ruler.parent
    frozen = (ruler.name, *frozen)
    experiment = Experiment(folder, ruler.name, tuple(edits), tuple(frozen), metric, lower_is_better)

    def body():
        harness = fingerprint(experiment, budget)
        check_untouched(experiment)
        clock.start()
        score, figures = scored(function())
        clock.stop()
        this_run.score = score
        shown = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in figures.items()}
        lines = {metric: f"{score:.6f}", "seconds": f"{clock.elapsed():.1f}", **shown}
        lines |= {"seed": SEED, "device": cpu_name(), "harness": harness}
        finish(lines, {"harness": harness, "device": cpu_name(), "figures": figures})

    clock.budget = budget
    try:
        checked_names(folder, metric, lower_is_better, edits, frozen)
        place = repository(folder)
        require(
            place.head is not None, f"{folder} needs a git repository with a commit ({place.trouble}); run: git init"
        )
    except RefereeError as error:
        sys.exit(f"\nFAIL: {error.kind}: {error}")  # nothing is written
    guard(body, lambda: f"ruler-{hash_text(str(folder))[:12]}", budget, experiment)


def scored(result):
    """(score, figures) of what a ruler's function returned."""
    score, figures = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    number = isinstance(score, (int, float)) and not isinstance(score, bool)
    require(number, f"the ruler returned {score!r}, which is no number; let its function return a float", "error")
    require(math.isfinite(score), f"the score is {score}; let the ruler return a finite number", "nan")
    require(isinstance(figures, dict), "the ruler's figures are no dict; return (score, {name: value})", "error")
    return float(score), {str(name): value for name, value in figures.items()}


def frozen_files(experiment):
    """Every file below the frozen paths, caches left out, in the order of their names."""
    found = set()
    for name in experiment.frozen:
        path = experiment.folder / name
        inner = path.rglob("*") if path.is_dir() else [path]
        found |= {file for file in inner if file.is_file() and "__pycache__" not in file.parts}
    return sorted(found)


def fingerprint(experiment, budget):
    """8 hex digits over all that defines a ruler's number: the frozen files, the budget, the referee's rules."""
    parts = [f"{RULES} {budget} {experiment.metric}"]
    for file in frozen_files(experiment):
        name = file.relative_to(experiment.folder)
        digest = code_hash(file.read_text("utf-8")) if file.suffix == ".py" else hash_file(file)
        parts.append(f"{name} {digest}")
    return hash_text("\n".join(parts))[:8]


def check_untouched(experiment):
    """A doubt for every tracked file of the folder, besides those that may be edited, that differs from the kept commit
    this one was cut from."""
    results = read_results(experiment.results)
    base = kept_ancestor(this_run.repository, results)
    if base is None:
        return
    changed = git_text(experiment.folder, "diff", "--name-only", "--relative", base, "--", ".").splitlines()
    for name in changed:
        if name not in experiment.edits:
            doubt(f"{name} was edited; an experiment edits {experiment.edited} only")


def kept_ancestor(place, results):
    """The newest commit below HEAD whose last row says keep, None where there is none."""
    kept = [row.commit for row in results.rows if row.status == "keep"]
    if not kept:
        return None
    for commit in git_text(place.folder, "rev-list", "--max-count=2000", "HEAD").splitlines()[1:]:
        if results.status(commit) == "keep":
            return commit
    return None


# == 15. NIGHT =========================================================================================================

START = 'read -r go && exec "$@" < /dev/null'  # sh waits for a line: killed before run.json is written, nothing starts
AGAIN = re.compile(r"ended early|was killed|was preempted|has no end")  # a run that stopped through no fault of its own
MENDS = {"oom": 1, "nan": 1, "error": 2, "harness": 2, "timeout": 0}  # tries to mend an idea, by what failed
COMMIT = "git commit -qam '<idea>'"
MEND = "git commit -qa --amend --no-edit"


def me(words=""):
    """How this file is called from the folder that its command was called in."""
    return f"uv run {_called_as} {words}{_folder}".rstrip()


_called_as = "referee.py"  # path of this file from there, and the folder that was named; set by main()
_folder = ""


def birth(pid):
    """What tells this process from a later one with its number; None where it has ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text("latin-1").rpartition(")")[2].split()
        return None if words[0] in "ZX" else words[19]  # start, in clock ticks since boot
    except OSError:
        if Path("/proc/self/stat").is_file():
            return None
    out = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True).stdout
    state, _, started = out.strip().partition(" ")
    return None if not state or state.startswith("Z") else started.strip()


def started_run(experiment):
    """What run.json says of the last run that was started here, None where there is none that can be read."""
    try:
        facts = json.loads(experiment.started.read_bytes())
    except (OSError, ValueError):
        return None
    needed = {"pid", "birth", "seed", "time", "host", "commit", "subject"}
    if not isinstance(facts, dict) or not needed <= set(facts):
        return None
    return facts if isinstance(facts["pid"], int) and isinstance(facts["time"], str) else None


def is_running(facts):
    return facts is not None and birth(facts["pid"]) == facts["birth"]


def record_of(facts, runs):
    """The record of a started run, None where it has none (yet)."""
    for run in reversed(runs):
        same_process = run.get("pid") == facts["pid"] and run.get("host") == facts["host"]
        if same_process and run["time"] >= facts["time"]:
            return run
    return None


def settle(experiment, place):
    """Writes the record of a started run that ended without one (killed, or ended by the watchdog). Returns run.json's
    facts, None where no run was started here."""
    facts = started_run(experiment)
    if facts is None or is_running(facts):
        return facts
    if record_of(facts, read_runs(runs_folder(experiment.folder, place))[0]) is None:
        kind, sentence = last_failure(experiment.log)
        record = new_record(experiment, place, facts["seed"])
        for key in ("pid", "host", "commit", "parent", "subject", "code"):
            record[key] = facts.get(key)
        record["fail"] = {"kind": kind, "sentence": sentence}
        write_record(runs_folder(experiment.folder, place), record)
    return facts


def tail(path, count):
    """The last lines of a log, without empty ones, each cut to 200 characters."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 65536))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = [line.split("\r")[-1].rstrip()[:200] for line in text.splitlines()]
    return [line for line in lines if line][-count:]


def last_failure(log):
    """(kind, sentence) of a run that wrote no record, from the end of its log."""
    for line in reversed(tail(log, 5)):
        found = re.match(r"FAIL: (\w+): (.*)", line)
        if found:
            return found[1], found[2]
    last = (tail(log, 1) or ["nothing"])[0]
    if re.match(r"\w*(Error|Exception|Interrupt)\b", last):
        return "error", last
    return "error", f"the run was killed; its log has no end, the last line is: {last}"


@dataclass
class Night:
    """The state of a night, as its files and git tell it."""

    experiment: Experiment
    place: Repository
    results: Results
    runs: list  # all sound records, oldest first
    skipped: int = 0
    changed: list = field(default_factory=list)  # edited files that HEAD does not hold so
    running: dict | None = None  # run.json's facts of a run that goes on
    lock: Path | None = None  # a lock file of git
    bases: tuple | None = None  # newest first, the commits that HEAD was cut from, where only those are compared with

    @property
    def head_runs(self):
        return [run for run in self.runs if run["commit"] == self.place.head]

    @property
    def last(self):
        """The last record of HEAD, None where it has not run."""
        return self.head_runs[-1] if self.head_runs else None

    @property
    def status(self):
        """The last word of results.tsv on HEAD."""
        return self.results.status(self.place.head)

    @property
    def verdict(self):
        return self.verdict_of(self.last)

    def verdict_of(self, record):
        """The Verdict on a record of HEAD as if it were the newest."""
        others = [run for run in self.runs if run is not record]
        return verdict_on(record, [*others, record], self.results, self.bases)

    @property
    def on_new_ground(self):
        """Whether the newest score is of another harness or device than all runs of HEAD."""
        scored = [run for run in self.runs if run["score"] is not None and not run["why_not"]]
        grounds = {(run["harness"], run["device"]) for run in self.head_runs if run["score"] is not None}
        return bool(scored) and (scored[-1]["harness"], scored[-1]["device"]) not in grounds

    @property
    def unfinished(self):
        """Whether HEAD's discard rows are those of an idea that is still being run with other seeds."""
        scored = [run for run in self.head_runs if run["score"] is not None]
        return self.status == "discard" and bool(scored) and self.verdict_of(scored[-1]).word == "rerun"

    @property
    def tries(self):
        """Launches of this idea that gave no score: its mends keep parent and subject."""
        same = [run for run in self.runs if run.get("parent") == self.place.parent]
        same = [run for run in same if run.get("subject") == self.place.subject]
        return [run for run in same if run["score"] is None or run["why_not"]]

    def logged(self, record):
        """Whether a record has its row: a crash one for the commit, a score as many as runs gave it."""
        rows = [row for row in self.results.rows if row.is_of(self.place.head)]
        if record["fail"]:
            return any(row.status == "crash" for row in rows)
        text = score_text(record)
        twins = {run["seed"] for run in self.head_runs if score_text(run) == text and not run["why_not"]}
        return sum(row.score == text for row in rows) >= max(1, len(twins))


def score_text(record):
    return "nan" if record["score"] is None else f"{record['score']:.6f}"


def read_night(experiment):
    """The Night of an experiment's folder, settled."""
    place = repository(experiment.folder)
    require(
        place.head is not None,
        f"{experiment.folder}: {place.trouble}; run: git init && git add -A && git commit -m start",
    )
    started = settle(experiment, place)
    runs, skipped = read_runs(runs_folder(experiment.folder, place))
    return Night(
        experiment,
        place,
        read_results(experiment.results),
        runs,
        skipped,
        changed=changed_files(experiment.folder, experiment.edits),
        running=started if is_running(started) else None,
        lock=git_lock(place),
    )


def git_lock(place):
    """A lock file of git, None where there is none. One that is older than 5 s while no git runs on this machine was
    left by a git that was killed: it is removed."""
    found = [path for path in (place.own / "index.lock", place.own / "HEAD.lock") if path.exists()]
    if not found:
        return None
    names = subprocess.run(["ps", "-Ao", "comm="], capture_output=True, text=True).stdout.split()
    for lock in found:
        if "git" in names or time.time() - lock.stat().st_mtime <= 5:
            return lock
        lock.unlink(missing_ok=True)
        print(f"removed {lock}, which a killed git had left")
    return None


def require_unlocked(night):
    """Raises RefereeError while git is locked."""
    said = f"git is at work or was killed a moment ago ({night.lock}); run this again in 10 s"
    require(night.lock is None, said)


def unlocked_step():
    """What is to be done while git is locked."""
    return f"git is at work or was killed a moment ago: wait 10 s, then {me('status')}"


def next_step(night):
    """What is to be done now, as one line that begins with a command or an action."""
    edited = night.experiment.edited
    if night.running:
        return f"{me('wait')}"
    if night.lock:
        return unlocked_step()
    if night.last is None:
        if night.changed:
            return f"finish the edit of {edited} and commit it ({COMMIT}), or git restore {edited}; then {me('run')}"
        return f"{me('run')}"
    return after_run(night)


def after_run(night):
    """The step after a run of HEAD."""
    edited = night.experiment.edited
    last, verdict = night.last, night.verdict
    if verdict.word != "none" and not night.logged(last):
        return me("log")
    if night.status in ("discard", "crash") and not night.unfinished:
        return f"{me('log')} (it takes the dropped commit off the branch)"
    if last["fail"]:
        return after_failure(night)
    if verdict.word == "none":
        return after_none(night)
    if verdict.seed is not None and (night.status != "keep" or verdict.word != "rerun"):
        return f"{me('run')} --seed {verdict.seed}"
    if night.changed:
        return f"finish the edit of {edited}, then {COMMIT} && {me('run')}; or git restore {edited}"
    if night.status == "keep" and night.on_new_ground:
        return f"{me('run')} --seed {FIRST_SEED}, since no run of this kept commit compares with the newest one"
    return f"the next idea: edit {edited}, then {COMMIT} && {me('run')}"


def was_interrupted(run):
    """Whether a record is of a run that was preempted or killed, or found its device taken."""
    fail = run["fail"] or {}
    return fail.get("kind") == "busy" or AGAIN.search(str(fail.get("sentence"))) is not None


def after_failure(night):
    """The step after a run of HEAD that failed."""
    kind = str(night.last["fail"].get("kind"))
    alike = [run for run in night.tries if run["fail"] and run["fail"].get("kind") == kind]
    again = was_interrupted(night.last)
    if kind == "busy":
        return f"{me('run')}, when the other run is over"
    if night.changed:
        return f"finish the mend of {night.experiment.edited}, then {MEND} && {me('run')}"
    if again and len([run for run in alike if was_interrupted(run)]) <= 2:
        return f"{me('run')} --seed {night.last['seed']}"
    if again or len(alike) > MENDS.get(kind, 2):
        return f"{me('log crash')}"
    return f"mend {night.experiment.edited}, then {MEND} && {me('run')}; if it cannot be mended: {me('log crash')}"


def after_none(night):
    """The step after a run of HEAD whose score does not count."""
    reason = night.verdict.reason
    if reason.startswith("slowed"):
        return f"{me('run')} --seed {night.last['seed']}"
    if night.changed:
        return f"finish the edit of {night.experiment.edited}, then {MEND} && {me('run')}"
    if ("no kept run compares" in reason and "attention=" not in reason) or "noise is unknown" in reason:
        return f"{me('log discard')}, then {me('run')} for the kept commit, then this idea once more"
    if len(night.tries) > 2 and night.results.names_a_keep():
        return f"{me('log discard')}"
    if "commit it first" in reason:
        return f"{me('run')} --seed {night.last['seed']}"
    return f"mend what the verdict says, then {MEND} && {me('run')}; or {me('log discard')}"


# == 16. FLEET =========================================================================================================

SLOT = "fleet/slot.sh"  # runs one commit with one seed on one device
OUT = "refs/autoresearch/out"  # below it a branch, below that the commits cut from it that have no last word yet
WAITING = 2  # jobs that wait in the queue while every slot works
SETTLING = 30  # seconds in which the record of a job that has ended may still be on its way, as over NFS
LOST = 3  # runs without a result after which the idea itself is suspected
QUEUED = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "CONFIGURING", "INIT", "SETTING_UP")


@dataclass
class Trial:
    """A commit that is out. night: the state of the night as seen from this commit, in which it is HEAD."""

    night: Night
    tip: str  # the commit at which the branch stands
    jobs: dict  # {seed: "running", "queued" or "held"}
    waits_for: str | None = None  # the baseline that it was cut from, while that one is not logged
    successor: str | None = None  # the commit that brings the same idea onto a newer base

    @property
    def commit(self):
        return self.night.place.head

    @property
    def short(self):
        return self.night.place.short

    @property
    def kept(self):
        return self.night.status == "keep"

    @property
    def is_baseline(self):
        return self.commit == self.tip and not self.night.results.names_a_keep()

    @property
    def verdicts(self):
        """[(record, Verdict)], one for each kind of device, in the order in which the kinds first ran."""
        kinds = {}
        for run in self.night.head_runs:
            if run["score"] is not None:
                kinds[tuple(run.get(key) for key in SAME)] = run
        return [(run, self.verdict_on_kind(run)) for run in kinds.values()]

    def verdict_on_kind(self, record):
        if self.waits_for:
            return Verdict("none", f"waits for {self.waits_for[:7]}, which it was cut from")
        return self.night.verdict_of(record)

    @property
    def verdict(self):
        """The first verdict that says something of the idea, else the first; None where no run has a score."""
        verdicts = [verdict for _, verdict in self.verdicts]
        decided = [verdict for verdict in verdicts if verdict.word != "none"]
        return (decided or verdicts or [None])[0]

    @property
    def wants_more_seeds(self):
        """Whether the seeds that it needs at least should all be out at once: those of a baseline, of a win that has been
        brought onto a newer base, and of an idea whose first run was good. In simulated nights with 16 slots that makes
        1.9 times the progress of one seed after the other (tests/test_fleet_nights.py)."""
        last = self.night.last
        if last is not None and not was_interrupted(last) and (last["fail"] or last["why_not"]):
            return False
        scored = {run["seed"] for run in self.night.head_runs if run["score"] is not None}
        namesakes = [run for run in self.night.runs if run.get("subject") == self.night.place.subject]
        brought = any(run["score"] is not None and run["commit"] != self.commit for run in namesakes)
        hopeful = bool(scored) and self.verdict.word == "rerun"
        return (self.is_baseline or brought or hopeful) and len(scored | set(self.jobs)) < ENOUGH

    @property
    def unlogged(self):
        """Records that have no row and deserve one: scores, and failures of the idea's own."""
        runs = [run for run in self.night.head_runs if not was_interrupted(run) and not self.night.logged(run)]
        scored = [run for run in runs if run["score"] is not None]
        failed = [run for run in runs if run["fail"] and not self.kept]
        return scored + failed[-1:]

    @property
    def times_lost(self):
        """Starts in a slot that came to nothing."""
        starts = sum(line.startswith("slot: ") for log in slot_logs(self.night) for line in tail(log, 2000))
        silent = max(starts - len(self.night.head_runs), 0)
        return silent + sum(map(was_interrupted, self.night.head_runs))


@dataclass
class Fleet:
    """What is out in a night. trouble: of an engine that does not answer."""

    night: Night
    trials: list
    jobs: dict  # {(commit, seed): "running", "queued" or "held"}, those of other branches among them
    trouble: str
    elsewhere: dict  # {branch: {commit: (parent, subject)}} of other branches
    base: str | None  # the commit below HEAD that HEAD was cut from: kept, or the baseline that is out

    @property
    def on_idea(self):
        """Whether HEAD is an idea that has not been taken off the branch."""
        return self.base is not None and self.night.status != "keep"

    @property
    def known(self):
        """{commit: Trial}"""
        return {trial.commit: trial for trial in self.trials}

    @property
    def in_use(self):
        """Whether this night works with slots."""
        return bool(self.trials) or any(run.get("slot") for run in self.night.runs)

    @property
    def at_rest(self):
        """Whether HEAD is what ideas are cut from: kept, or the baseline, which is out or was given up."""
        return not self.on_idea and (self.night.status is not None or self.night.place.head in self.known)

    @property
    def given_up(self):
        """Whether HEAD is a baseline that was dropped, as one whose score does not count."""
        return self.at_rest and self.night.status != "keep" and self.night.place.head not in self.known


def slot_logs(night):
    """The logs of HEAD's runs in slots, the last written one at the end."""
    runs = runs_folder(night.experiment.folder, night.place)
    return sorted(runs.glob(f"{night.place.head}-*.log"), key=lambda path: path.stat().st_mtime)


def jobs_of_engines():
    """({(commit, seed): "running", "queued" or "held"}, trouble or ""): runs of slot.sh that Slurm, a cluster of SkyPilot and
    this machine know of."""
    questions = [["ps", "-Ao", "stat=,args="]]
    if shutil.which("squeue"):
        questions.append(["squeue", "--noheader", "--me", "--format=%T/%r %o"])
    if os.environ.get("AUTORESEARCH_CLUSTER"):
        questions.append(["sky", "queue", "--skip-finished", "--output", "json", os.environ["AUTORESEARCH_CLUSTER"]])
    jobs = {}
    for question in questions:
        try:
            done = subprocess.run(question, capture_output=True, text=True, errors="replace", check=True)
            lines = sky_lines(done.stdout) if question[0] == "sky" else done.stdout.splitlines()
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            return {}, f"{question[0]} does not answer: {said[-1][:200] if said else 'no words'}"
        for line in lines:
            found = re.match(r"([^/]+)(.*) .*slot\.sh ([0-9a-f]{40,64}) (\d+)$", line.rstrip())
            if found:
                jobs[found[3], int(found[4])] = state_of_job(found[1], found[2])
    return jobs, ""


def state_of_job(state, reason):
    """running, queued, or held: one that waits for something else than a slot, as after a preemption."""
    if state.split()[0] not in QUEUED:
        return "running"
    return "held" if re.search("BeginTime|[Hh]eld", reason) else "queued"


def sky_lines(text):
    """Jobs of a SkyPilot cluster as lines `STATE slot.sh COMMIT SEED`; start_in_slot() calls a job COMMIT-SEED."""
    lines = []
    for jobs in json.loads(text[text.index("{") :]).values():  # a line of words stands before it
        for job in jobs:
            commit, _, seed = str(job.get("job_name")).partition("-")
            lines.append(f"{str(job.get('status')).rpartition('.')[2]} slot.sh {commit} {seed}")
    return lines


def bring_back(runs):
    """Copies records and logs of the slots of a SkyPilot cluster into runs/, through the ssh name that SkyPilot gives it,
    but no record that is here already; returns "" or what went wrong."""
    here = "".join(f"/runs/{path.name}\n" for path in runs.glob("*.json"))
    wanted = ["--include=/runs/", "--include=/runs/*.json", "--include=/runs/*.log", "--exclude=*"]
    places = [f"{os.environ['AUTORESEARCH_CLUSTER']}:sky_workdir/", f"{runs.parent}/"]
    command = ["rsync", "-rtO", "--timeout=60", "--exclude-from=-", *wanted, *places]
    try:
        subprocess.run(command, input=here, capture_output=True, text=True, errors="replace", check=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()
        said = "; ".join(line for line in said if not line.startswith("Warning: "))
        return f"records stay on {places[0]}runs, rsync says: {said[:200] or 'no words'}"
    return ""


def claims(place):
    """{branch: {commit: (parent, subject)}} of all commits that are out, oldest first."""
    form = "--format=%(refname) %(objectname) %(parent)%09%(subject)"
    found = {}
    for line in git_text(place.folder, "for-each-ref", "--sort=committerdate", form, f"{OUT}/").splitlines():
        words, _, subject = line.partition("\t")
        name, commit, *parents = words.split()
        branch = name.removeprefix(f"{OUT}/").rpartition("/")[0]
        found.setdefault(branch, {})[commit] = (parents[0] if parents else None, subject)
    return found


def ancestors(place, commits):
    """{commit: list of the commits before it, newest first}, along first parents."""
    parents = {}
    for line in git_text(place.folder, "rev-list", "--parents", "--max-count=5000", *commits).splitlines():
        commit, *before = line.split()
        parents[commit] = before[0] if before else None
    found = {}
    for commit in commits:
        found[commit] = []
        before = parents.get(commit)
        while before is not None:
            found[commit].append(before)
            before = parents.get(before)
    return found


def read_fleet(night):
    """The Fleet of a night's branch."""
    place = night.place
    elsewhere = claims(place)
    mine = elsewhere.pop(place.branch, {}) if place.branch else {}
    slots = any(run.get("slot") for run in night.runs)
    jobs, trouble = jobs_of_engines() if mine or slots else ({}, "")
    runs = runs_folder(night.experiment.folder, place)
    ended = set(mine) - {commit for commit, _ in jobs}
    if os.environ.get("AUTORESEARCH_CLUSTER") and ended and not trouble:
        trouble = bring_back(runs)
    if mine:  # read after the queue was asked: a job that is in it no more has left its record
        night.runs, night.skipped = read_runs(runs)
    before = ancestors(place, [place.head, *mine])
    kept = {row.commit[:7] for row in night.results.rows if night.results.status(row.commit) == "keep"}
    bases = [base for base in before[place.head] if base[:7] in kept]
    if not kept:
        bases = [base for base in before[place.head] if base in mine][-1:]  # the baseline, which is out
    fleet = Fleet(night, [], jobs, trouble, elsewhere, bases[0] if bases else None)
    tip = fleet.base if fleet.on_idea else place.head
    newest = {subject: commit for commit, (_, subject) in mine.items()}
    newest |= {place.subject: place.head}
    for commit, (parent, subject) in mine.items():
        seen = replace(place, head=commit, short=commit[:7], parent=parent, subject=subject)
        seen_night = replace(night, place=seen, changed=[], bases=tuple(before[commit]))
        trial = Trial(seen_night, tip, {seed: state for (out, seed), state in jobs.items() if out == commit})
        open_bases = [base for base in before[commit] if base in mine and base[:7] not in kept]
        trial.waits_for = open_bases[0] if open_bases else None
        trial.successor = newest[subject] if newest[subject] != commit and parent != tip else None
        fleet.trials.append(trial)
    return fleet


def fleet_step(fleet):
    """What is to be done now in a night that works with slots."""
    night = fleet.night
    edited = night.experiment.edited
    if night.lock:
        return unlocked_step()
    if fleet.trouble:
        return f"wait a minute, then {me('status')}; {fleet.trouble}"
    if (night.place.own / "CHERRY_PICK_HEAD").exists():
        settled = f"git commit -qa --no-edit && {me('submit')}"
        return f"settle the conflict in {edited}, then {settled}; or git cherry-pick --abort"
    if not fleet.at_rest:
        return me("submit")
    if night.changed:
        return f"finish the edit of {edited}, then {COMMIT} && {me('submit')}; or git restore {edited}"
    steps = [step for step in (trial_step(fleet, trial) for trial in fleet.trials) if step is not None]
    if steps:
        return min(steps, key=lambda step: step[0])[1]
    if fleet.given_up:
        return f"mend {edited} ({said_of_last(night)}), then {COMMIT} && {me('submit')}"
    if list(fleet.jobs.values()).count("queued") >= WAITING:
        return me("wait")
    return f"the next idea: edit {edited}, then {COMMIT} && {me('submit')}"


def said_of_last(night):
    """Why the last run of HEAD does not count, or what it failed of."""
    if night.last is None:
        return "it was lost in its slot"
    if night.last["fail"]:
        return f"FAIL: {night.last['fail'].get('kind')}: {night.last['fail'].get('sentence')}"
    return night.verdict.reason or str(night.verdict)


def trial_step(fleet, trial):
    """(rank, what is to be done about a commit that is out), None while it has to be waited for. What is kept comes
    first, since the next idea is cut from it; then what frees a commit, then what fills a slot."""
    short, night = trial.short, trial.night
    verdict = trial.verdict
    if trial.wants_more_seeds:
        return 2, me(f"submit {short}")
    if trial.jobs:
        return None
    last = night.last
    if is_settling(night):
        return None
    if last is None or was_interrupted(last):
        return 2, lost_step(trial)
    if trial.kept:
        return 1, me(f"log {short}")
    if last["fail"]:
        mend = f"git cherry-pick {short}, the mend, {MEND} && {me('submit')}"
        return 1, f"{me(f'log {short}')}; an idea that can be mended goes on with {mend}"
    if verdict.word == "none":
        return none_step(fleet, trial)
    if verdict.seed is not None:
        return 2, me(f"submit {short} --seed {verdict.seed}")
    if verdict.word == "keep" and night.place.parent != trial.tip and not trial.successor:
        pick = f"git cherry-pick {short} && {me('submit')}"
        return 0, f"{pick} (it gained on a base that is not the newest); if that fails: {me(f'log {short} discard')}"
    return 0 if verdict.word in ("keep", "baseline") else 1, me(f"log {short}")


def is_settling(night):
    """Whether the log of a run in a slot was written a moment ago, does not say that the run failed, and has no record."""
    known = {str(run["seed"]) for run in night.head_runs if not was_interrupted(run)}
    for log in slot_logs(night):
        failed = any(line.startswith("FAIL: ") for line in tail(log, 3))
        fresh = time.time() - log.stat().st_mtime < SETTLING
        if fresh and not failed and log.stem.rpartition("-")[2] not in known:
            return True
    return False


def lost_step(trial):
    """The step for a run that ended without a result."""
    last = trial.night.last
    again = me(f"submit {trial.short} --seed {last['seed'] if last else FIRST_SEED}")
    lost = trial.times_lost
    if lost < LOST:
        return again
    return f"{again} (lost {lost} times); where the idea itself is the reason: {me(f'log {trial.short} crash')}"


def none_step(fleet, trial):
    """(rank, step) for a commit whose score does not count, None while a run of its base has to be waited for."""
    reason, runs = trial.verdict.reason, trial.night.head_runs
    if trial.waits_for:
        return None
    if reason.startswith("slowed") and len(runs) <= LOST:
        return 2, me(f"submit {trial.short} --seed {trial.night.last['seed']}")
    if "no kept run compares" in reason or "noise is unknown" in reason:
        base = next((base for base in trial.night.bases if trial.night.results.status(base) == "keep"), None)
        if base in fleet.known and fleet.known[base].jobs:
            return None
        if base is not None:
            return 2, f"{me(f'submit {base[:7]}')}, on the kind of device that {trial.short} ran on: {reason}"
    return 1, f"{me(f'log {trial.short} discard')}: {reason}"


def fleet_lines(fleet):
    """The lines of `status` on what is out, done and lost."""
    running = [trial for trial in fleet.trials if trial.jobs]
    states = [state for trial in running for state in trial.jobs.values()]
    names = [f"{trial.short}:{seed}" for trial in running for seed in sorted(trial.jobs)]
    counts = f"{states.count('running')} running, {len(states) - states.count('running')} queued"
    lines = [f"out: {counts}{': ' if names else ''}{' '.join(names)}"]
    for trial in [trial for trial in fleet.trials if not trial.jobs][:5]:
        lines.append(f"  {trial.short} {trial.night.place.subject[:40]!r}: {said_of_trial(trial)}")
    for branch, out in list(fleet.elsewhere.items())[:2]:
        lines.append(f"out on {branch}: {', '.join(repr(subject[:40]) for _, subject in out.values())}")
    return [line[:300] for line in lines]


def said_of_trial(trial):
    """What came of a commit without a job, on each kind of device."""
    last = trial.night.last
    if last is None or was_interrupted(last):
        log = (slot_logs(trial.night) or [None])[-1]
        words = (tail(log, 1) if log else None) or ["it has not run"]
        return f"{'its record is awaited' if last is None and is_settling(trial.night) else 'lost'}; {words[0]}"
    if last["fail"]:
        return said_of_last(trial.night)
    verdicts = trial.verdicts
    if len(verdicts) == 1:
        return str(verdicts[0][1])
    return "; ".join(f"on {run['device']} {verdict}"[:120] for run, verdict in verdicts)


def start_in_slot(folder, commit, seed, gpus):
    """Hands a run to the engine; returns what it said. gpus: the kind of device in the engine's words, as h200:1, None
    for any. RefereeError where there is no engine or it refuses."""
    cluster = os.environ.get("AUTORESEARCH_CLUSTER")
    kind = ["--gpus", gpus] if gpus else []
    if cluster:
        names = ["--name", f"{commit}-{seed}", "--env", f"COMMIT={commit}", "--env", f"SEED={seed}"]
        command = ["sky", "exec", "--detach-run", *kind, *names, cluster, "fleet/sky.yaml"]
    else:
        command = ["sbatch", *kind, SLOT, commit, str(seed)]
    by_hand = f"by hand: CUDA_VISIBLE_DEVICES=0 {SLOT} {commit} {seed}"
    require(shutil.which(command[0]), f"there is no {command[0]} here; in a slot of your own, {by_hand}")
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = (done.stdout.strip().splitlines() or ["nothing"])[-1]
    mend = "mend that, then run this again"
    if "configuration source" in said:
        mend = "export SLURM_CONF=<the slurm.conf of your cluster>, then run this again"
    require(done.returncode == 0, f"{command[0]} says: {said[:300]}; {mend}")
    return said


# == 17. COMMANDS ======================================================================================================


def command_run(experiment, seed=None, seconds=540):
    """Starts HEAD's script detached, with its output in run.log, and waits for its end."""
    night = read_night(experiment)
    require_idle(night)
    changed = " and ".join(night.changed)
    require(not changed, f"{changed} is changed but not committed; run: {COMMIT}")
    if seed is None:
        seed = seed_to_run(night)
    require_unlocked(night)
    facts = start(experiment, night.place, seed)
    print(f"running {said_of(facts)}; at most {seconds} s are waited for", flush=True)
    return command_wait(experiment, seconds)


def seed_to_run(night):
    """The first seed that HEAD has no score of that counts."""
    if night.last is None:
        return FIRST_SEED
    if night.last["fail"] or night.verdict.word == "none":
        return night.last["seed"]
    done = night.logged(night.last) and night.status is not None
    short, seed = night.place.short, night.verdict.seed
    require(seed is not None or not done, f"{short} has been run and logged; commit the next idea, or give --seed N")
    require(done, f"{short} has a run that is not in results.tsv; run: {me('log')}")
    return seed


def start(experiment, place, seed):
    """Starts the script; returns what run.json holds of it. It goes on when this process is killed."""
    this_run.code = hash_edits(experiment)
    command = ["sh", "-c", START, "sh", sys.executable, experiment.script]
    environment = {**os.environ, "SEED": str(seed), "PYTHONUNBUFFERED": "1"}
    with open(experiment.log, "wb") as log:
        process = subprocess.Popen(
            command,
            cwd=experiment.folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    facts = new_record(experiment, place, seed) | {"pid": process.pid, "birth": birth(process.pid)}
    write_atomic(experiment.started, json.dumps(facts) + "\n")
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(b"go\n")
        process.stdin.close()
    return facts


def said_of(facts):
    """Commit, seed and process of a started run."""
    return f"{(facts['commit'] or 'no commit')[:7]} {facts['subject']!r}, seed {facts['seed']}, process {facts['pid']}"


def require_idle(night):
    """Raises RefereeError while a run goes on."""
    if night.running:
        raise RefereeError(f"a run is going on ({said_of(night.running)}); run: {me('wait')}")


def what_next(fleet):
    """The next step of a night, with or without slots."""
    night = fleet.night
    return fleet_step(fleet) if fleet.in_use and not night.running else next_step(night)


def command_wait(experiment, seconds=540):
    """Waits for the end of the run that was started here and prints it; in a fleet, until there is something to do.
    Returns the exit status."""
    place = repository(experiment.folder)
    facts = started_run(experiment)
    if not is_running(facts):
        fleet = read_fleet(read_night(experiment))
        if fleet.in_use:
            return wait_for_fleet(fleet, seconds)
    require(facts is not None, f"no run has been started here; run: {me('run')}")
    end = time.monotonic() + seconds
    while is_running(facts) and time.monotonic() < end:
        time.sleep(0.2)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(facts["pid"], os.WNOHANG)
    if is_running(facts):
        for line in tail(experiment.log, 1):
            print(line)
        print(f"it is still running\nnext: {me('wait')}")
        return 0
    settle(experiment, place)
    record = record_of(facts, read_runs(runs_folder(experiment.folder, place))[0])
    show_end(experiment, record)
    print(f"next: {what_next(read_fleet(read_night(experiment)))}")
    return 1 if record is None or record["fail"] else 0


def wait_for_fleet(fleet, seconds):
    """Waits until something can be done in the fleet."""
    end = time.monotonic() + seconds
    step = what_next(fleet)
    if step != me("wait"):
        print("not waiting: there is something to do first")
    while step == me("wait") and time.monotonic() < end:
        time.sleep(2)
        step = what_next(read_fleet(read_night(fleet.night.experiment)))
    print(f"next: {step}")
    return 0


SHOWN = (
    "training_seconds",
    "seconds",
    "peak_vram_mb",
    "num_steps",
    "total_tokens_M",
    "num_params_M",
    "audit_bpb",
    "seed",
)


def show_end(experiment, record):
    """Score, memory, steps and verdict of a run that ended, or the end of its log and what failed."""
    if record is None or record["fail"]:
        fail = record["fail"] if record else {"kind": "error", "sentence": "the run has no record"}
        line = f"FAIL: {fail.get('kind')}: {fail.get('sentence')}"
        for each in tail(experiment.log, 12):
            if not each.startswith("FAIL: "):
                print(each)
        print(line)
        return
    figures = tuple(record.get("figures") or ())
    wanted = (experiment.metric, *SHOWN, *figures[:8], "results.tsv", "runs", "runs.jsonl", "verdict")
    for line in tail(experiment.log, 30):
        if line.split(":")[0] in wanted:
            print(line)


def command_log(experiment, word=None, note="", commit=None):
    """Writes the last run of HEAD into results.tsv and, where it is dropped, goes back; or the runs of a commit that is
    out. Row first, git second; repeated, it goes on where it stopped, and changes nothing where it is done."""
    night = read_night(experiment)
    place = night.place
    require_idle(night)
    fleet = read_fleet(night)
    if commit is not None or place.head in fleet.known:
        return log_trial(fleet, commit or place.head, word, note)
    require(night.last is not None, f"{place.short} has not run yet; run: {me('run')}")
    if dropped_before(night, word):
        print(f"nothing to log: {night.results.rows[-1].commit} has been dropped")
        return finish_log(night)
    status = word or own_word(night)
    if not night.logged(night.last) or status != night.status:
        write_row(night, status, note)
    night.results = read_results(experiment.results)
    going_on = word is None and night.unfinished
    if night.status in ("discard", "crash") and not going_on:
        go_back(night)
    return finish_log(night)


def finish_log(night):
    """Ends `log` with the line that says what to do next."""
    print(f"next: {what_next(read_fleet(read_night(night.experiment)))}")
    return 0


def log_trial(fleet, commit, word, note):
    """Writes the rows of a commit that is out, keeps or drops it, and takes it off the list of those that are out."""
    night = fleet.night
    require(not fleet.trouble, fleet.trouble)
    commit = full_commit(night, commit)
    trial = fleet.known.get(commit)
    if trial is None:
        status = night.results.status(commit)
        require(status is not None, f"{commit[:7]} is not out on this branch; run: {me('status')}")
        print(f"nothing to log: {commit[:7]} is {status}")
        return finish_log(night)
    seeds = " and ".join(f"seed {seed} is {state}" for seed, state in trial.jobs.items())
    require(not trial.jobs, f"{trial.short} is not done ({seeds}); run: {me('wait')}")
    require(not is_settling(trial.night), f"a record of {trial.short} is on its way; run this again in {SETTLING} s")
    status = "keep" if trial.kept else word or word_of_trial(fleet, trial)
    moved = status == "keep" and not trial.kept and commit != trial.tip and trial.night.place.parent != trial.tip
    if moved and not trial.successor:
        step = f"git cherry-pick {trial.short} && {me('submit')}"
        raise RefereeError(f"{trial.short} gained on a base that is not the newest; run: {step}, then log this one")
    if moved:
        status = "discard"
        note = note or f"gained on {trial.night.place.parent[:7]}; goes on as {trial.successor[:7]}"
    require_unlocked(night)
    if status == "keep" and commit != night.place.head:
        changed = " and ".join(night.changed)
        require(not changed, f"{changed} is being edited; finish and submit that, or git restore {changed}; then this")
        require(fleet.at_rest, f"{night.place.short} is not in a slot yet; run: {me('submit')}")
    nothing = {"score": None}  # of a commit that was lost whenever it ran, and is given up
    unlogged = trial.unlogged or ([] if trial.night.status else [nothing])
    for record in unlogged:
        write_row(trial.night, status, note or confirmed(trial, record), record)
    if not unlogged:
        print(f"no new row: all runs of {trial.short} have theirs")
    keep_or_drop(night, trial, status)
    return finish_log(night)


def full_commit(night, words):
    """The 40 digits of a commit; RefereeError where there is none or no one commit begins so."""
    found = git_text(night.place.folder, "rev-parse", "--verify", "--quiet", f"{words}^{{commit}}")
    require(found, f"there is no commit {words} here, or more than one; run: {me('status')}")
    return found


def word_of_trial(fleet, trial):
    """The status that follows from the runs of a commit. RefereeError where none does yet."""
    last = trial.night.last
    if not trial.unlogged and trial.night.status is not None:
        return trial.night.status  # a repeated log
    if last is not None and last["fail"] and not was_interrupted(last):
        return "crash"
    step = trial_step(fleet, trial)
    open_still = trial.verdict is None or trial.verdict.word in ("none", "rerun") or trial.verdict.seed is not None
    require(
        not open_still, f"{trial.short} is not decided: {said_of_trial(trial)}; next: {step[1] if step else me('wait')}"
    )
    return "discard" if trial.verdict.word == "discard" else "keep"


def confirmed(trial, record):
    """A note for a row of a commit that was kept before: what the verdict is on another kind of device."""
    if not trial.kept:
        return ""
    return f"on {record['device']}: {trial.verdict_on_kind(record)}"


def keep_or_drop(night, trial, status):
    """Takes the branch forward to a kept commit, keeps a dropped one under a ref; then the commit is out no more."""
    place, short = night.place, trial.short
    if status == "keep" and trial.night.place.parent == place.head:
        must_git(place.folder, "merge", "-q", "--ff-only", trial.commit)
        print(f"{place.branch} goes on from {short}")
    if status != "keep":
        must_git(place.folder, "update-ref", f"refs/autoresearch/{short}", trial.commit)
        print(f"{short} is kept as refs/autoresearch/{short}")
    must_git(place.folder, "update-ref", "-d", f"{OUT}/{place.branch}/{trial.commit}")


def command_submit(experiment, commit=None, seed=None, gpus=None):
    """Sends HEAD, or a commit that is named, to a slot. An idea is first noted as out, then submitted, then taken off the
    branch; repeated, it goes on where it stopped, and never takes off a commit that is kept."""
    night = read_night(experiment)
    place = night.place
    require_idle(night)
    require_unlocked(night)
    require(place.branch, "HEAD is on no branch; run: git checkout -q autoresearch/<name>")
    require((experiment.folder / SLOT).is_file(), f"there is no {SLOT} in {experiment.folder}; a fleet needs it")
    fleet = read_fleet(night)
    require(not fleet.trouble, fleet.trouble)
    idea = commit is None and fleet.on_idea
    if commit is None:
        require_submittable(night, fleet)
    if idea and make_one_commit(night, fleet):
        return command_submit(experiment, None, seed, gpus)
    if idea and repeats(night):
        go_back(night)
        return finish_log(night)
    target = full_commit(night, commit or place.head)
    must_git(place.folder, "update-ref", f"{OUT}/{place.branch}/{target}", target)
    out = [job for known, job in fleet.jobs if known == target]
    scored = [run["seed"] for run in night.runs if run["commit"] == target and run["score"] is not None]
    if idea and out:
        print(f"{target[:7]} is in a slot already")
    elif seed is None and target == place.head and not idea and len({*out, *scored}) >= ENOUGH:
        print(f"the baseline has its {ENOUGH} seeds")
    elif seed in out:
        print(f"{target[:7]} with seed {seed} is {fleet.jobs[target, seed]} already")
    else:
        seed = next_seed({*out, *scored}) if seed is None else seed
        print(f"{target[:7]} with seed {seed}: {start_in_slot(experiment.folder, target, seed, gpus)}")
    if idea:
        step_back(night)
    return finish_log(night)


def require_submittable(night, fleet):
    """Raises RefereeError where HEAD is nothing that can be sent to a slot."""
    place, changed = night.place, " and ".join(night.changed)
    half_gone_back = fleet.on_idea and place.head in fleet.known and not unlike_parent(night.experiment, place)
    require(not changed or half_gone_back, f"{changed} is changed but not committed; run: {COMMIT}")
    require(night.status != "keep", f"{place.short} is kept; commit an idea, or name a commit: {me('submit COMMIT')}")
    said = f"{place.short} does not count ({said_of_last(night)})"
    require(not fleet.given_up, f"{said}; mend {night.experiment.edited}, then {COMMIT} && {me('submit')}")
    seen = seen_in_edits(night.experiment)
    mend = f"mend that, then {MEND if fleet.on_idea else COMMIT} && {me('submit')}"
    require(half_gone_back or not seen, f"not submitted, since its score would not count: {'; '.join(seen)}; {mend}")


def make_one_commit(night, fleet):
    """Makes one commit of an idea that is two or more, as if the last ones had amended the first; whether it did."""
    place, base = night.place, fleet.base
    if place.parent == base:
        return False
    must_git(place.folder, "reset", "-q", "--soft", base)
    must_git(place.folder, "commit", "-q", "-m", place.subject)
    print(f"what stood between {base[:7]} and {place.short} is one commit now")
    return True


def repeats(night):
    """Whether the same file has run already; says as what. Its score is known then, and no slot is spent on it."""
    code = hash_edits(night.experiment)
    for run in night.runs:
        if run["code"] == code and run["score"] is not None and run["commit"] != night.place.head:
            print(f"not submitted: the same file ran as {run['commit'][:7]} {run.get('subject')!r}: {score_text(run)}")
            return True
    return False


def dropped_before(night, word):
    """Whether this is a repetition of a `log` that has dropped a commit: HEAD is where that one went back to."""
    if word not in ("discard", "crash") or night.status is None or not night.results.rows:
        return False
    newest = night.results.rows[-1]
    if newest.status == "keep" or newest.is_of(night.place.head):
        return False
    return git_text(night.place.folder, "rev-parse", f"{newest.commit}^") == night.place.head


def own_word(night):
    """The status that follows from a run by itself. RefereeError where none does."""
    fail, verdict = night.last["fail"], night.verdict
    if fail:
        said = f"that run says nothing of the idea ({fail.get('sentence')}); run: {me('run')}"
        require(not was_interrupted(night.last) or night.status == "crash", said)
        return "crash"
    if night.logged(night.last) and night.status is not None:
        return night.status
    step = next_step(night)
    require(verdict.word != "none", f"the run does not count: {verdict.reason}; next: {step}")
    return "keep" if verdict.word in ("keep", "baseline") else "discard"


def write_row(night, status, note, record=None):
    """Appends the row of a run of HEAD, without a record that of its last one, and says so."""
    record, place = record or night.last, night.place
    first = [row.description for row in night.results.rows if row.is_of(place.head)][:1]
    baseline = first == ["baseline"] or (night.last is not None and night.verdict.word == "baseline")
    subject = "baseline" if baseline else place.subject
    if status == "discard" and record["score"] is not None and not note:
        note = uncounted(night, record)
    description = f"{subject} ({note})" if note else subject
    memory = record.get("memory_mb")
    memory = f"{memory / 1024:.1f}" if isinstance(memory, (int, float)) else "0.0"
    row = Row(place.short, "nan" if status == "crash" else score_text(record), memory, status, description)
    append_row(night.experiment.results, row, night.experiment.metric)
    print(f"logged: {row.commit} {row.score} {row.status} {row.description}")


def uncounted(night, record):
    """A note for the row of a score that does not count, so that it does not read like a bad idea; else none."""
    verdict = night.verdict_of(record)
    return f"does not count: {verdict.reason[:150]}" if verdict.word == "none" else ""


def go_back(night):
    """Keeps HEAD under a ref, then takes the edited files and the branch one commit back. What is changed in other files
    stays as it is, and an edit in progress is kept under a ref too."""
    experiment, place = night.experiment, night.place
    folder = experiment.folder
    require(place.parent is not None, f"{place.short} is the first commit; there is nothing to go back to")
    require_unlocked(night)
    must_git(folder, "update-ref", f"refs/autoresearch/{place.short}", place.head)
    step_back(night)
    print(f"{place.short} is kept as refs/autoresearch/{place.short}")


def step_back(night):
    """Takes the edited files and the branch one commit back."""
    experiment, place = night.experiment, night.place
    folder = experiment.folder
    if unlike_parent(experiment, place) and night.changed:
        edit = git_text(folder, "stash", "create")
        if edit:
            must_git(folder, "update-ref", f"refs/autoresearch/{place.short}-edit", edit)
            print(f"the uncommitted edit is kept as refs/autoresearch/{place.short}-edit")
    names = [name for name in experiment.edits if (folder / name).exists() or committed(folder, name) is not None]
    must_git(folder, "restore", f"--source={place.parent}", "--staged", "--worktree", "--", *names)
    must_git(folder, "reset", "-q", "--soft", place.parent)
    print(f"went back to {place.parent[:7]}")


def unlike_parent(experiment, place):
    """Whether an edited file differs from what the commit before HEAD holds: if not, a going back was interrupted."""
    for name in experiment.edits:
        path = experiment.folder / name
        now = path.read_bytes() if path.is_file() else None
        if now != committed(experiment.folder, name, place.parent):
            return True
    return False


def command_status(experiment):
    """Prints what an agent needs after a loss of context; the last line says what to do next."""
    night = read_night(experiment)
    fleet = read_fleet(night)  # before the table: it may find records that have just come
    place, results = night.place, night.results
    state = f"{' and '.join(night.changed)} changed" if night.changed else f"{experiment.edited} as committed"
    print(f"branch: {place.branch or 'none (detached)'} at {place.short} {place.subject[:60]!r}, {state}")
    for line in table_lines(night):
        print(line)
    words = [row.status for row in results.rows]
    counts = ", ".join(f"{words.count(word)} {word}" for word in STATUSES)
    print(f"log: {len(words)} rows: {counts}; the last ones:")
    for row in results.rows[-3 if fleet.in_use else -5 :]:
        print(f"  {row.commit} {row.score} {row.status} {row.description[:80]}")
    for line in trouble_lines(night):
        print(line[:300])
    if night.running:
        print(f"running: {said_of(night.running)}; {(tail(experiment.log, 1) or ['no output yet'])[0]}")
    elif fleet.in_use:
        for line in fleet_lines(fleet):
            print(line)
    elif night.last is not None:
        ending = f"FAIL: {night.last['fail'].get('kind')}" if night.last["fail"] else score_text(night.last)
        print(f"last run of HEAD: seed {night.last['seed']}, {ending}; {str(night.verdict)[:240]}")
    print(f"next: {what_next(fleet)}")
    return 0


def table_lines(night):
    """Best commit and noise among the runs that compare with the newest one."""
    scored = [run for run in night.runs if run["score"] is not None and not run["why_not"] and run["commit"]]
    if not scored:
        return ["best: no run has a score that counts yet"]
    table = table_of(scored[-1], night.runs)
    fastest = fastest_by_file(table)
    every = len(table)
    table = [run for run in table if not slowed_against(run, fastest)]
    slowed = f", {every - len(table)} slowed ones left out" if len(table) < every else ""
    commits = scores_by_commit(table)
    sd, df = pooled_noise(commits)
    kept = [commit for commit in commits if night.results.status(commit) == "keep"]
    sign = 1 if night.experiment.lower_is_better else -1
    lines = ["best: nothing kept yet"]
    if kept:
        best = min(kept, key=lambda commit: sign * mean(commits[commit]))
        seeds = len(commits[best])
        lines = [
            f"best: {best[:7]} {mean(commits[best]):.6f} (mean of {seeds} seeds), first {mean(commits[kept[0]]):.6f}"
        ]
    known = f"sd {sd:.6f}, df {df}" if df else "unknown"
    device = scored[-1]["device"]
    return [
        *lines,
        f"noise: {known}; {len(table)} runs that compare{slowed}, on {device}, harness {scored[-1]['harness']}",
    ]


def trouble_lines(night):
    """What the human should see: unreadable rows and records, runs whose score does not count."""
    lines = []
    if night.results.trouble:
        lines.append(night.results.trouble)
    if night.results.wrong:
        lines.append(f"results.tsv: {wrong_lines(night.results)}")
    if night.skipped:
        lines.append(f"runs: {night.skipped} damaged files are skipped")
    if night.lock:
        lines.append(f"git: {night.lock} exists")
    for run in [run for run in night.runs if run["why_not"] and not run["fail"]][-3:]:
        lines.append(
            f"does not count: {(run['commit'] or 'no commit')[:7]}, seed {run['seed']}: {'; '.join(run['why_not'])}"
        )
    return lines


def usage_error(message):
    sys.exit(f"error: {message}; run: {me('--help')}")


def parse(words):
    """(command, folder, status word, commit, options) of a command line."""
    import argparse

    parser = argparse.ArgumentParser(prog="referee.py", description=__doc__.split("\n\n")[0])
    parser.error = usage_error
    parser.add_argument("command", choices=["run", "wait", "log", "status", "submit"])
    parser.add_argument(
        "words",
        nargs="*",
        metavar="keep|discard|crash|COMMIT|FOLDER",
        help="status and commit for log, commit for submit; folder of the experiment",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the run; else the next one that HEAD needs")
    parser.add_argument("--gpus", metavar="KIND", help="kind of device for submit, as h200:1 (Slurm, SkyPilot)")
    parser.add_argument("--wait", type=float, metavar="S", default=540, help="seconds to wait for the end (540)")
    parser.add_argument("--note", metavar="TEXT", default="", help="added to the description in results.tsv")
    args = parser.parse_args(words)
    states = [word for word in args.words if word in STATUSES]
    commits = [word for word in args.words if re.fullmatch("[0-9a-f]{7,64}", word)]
    folders = [word for word in args.words if word not in states and word not in commits]
    few = len(states) <= 1 and len(folders) <= 1 and len(commits) <= 1
    require(few, f"too many words: {' '.join(args.words)}; run: {me('--help')}")
    require(not states or args.command == "log", f"{states[:1]} belongs to log; run: {me('--help')}")
    named = not commits or args.command in ("log", "submit")
    require(named, f"a commit, {commits[:1]}, belongs to log and submit; run: {me('--help')}")
    require(args.seed is None or 0 <= args.seed < 2**63, f"--seed is {args.seed}; give a whole number from 0")
    require(args.wait >= 0, f"--wait is {args.wait}; give seconds")
    folder = folders[0] if folders else "."
    return args.command, folder, states[0] if states else None, commits[0] if commits else None, args


def name_caller(folder):
    """Notes how this file was called, for what is printed to be run next."""
    global _called_as, _folder
    _called_as = os.path.relpath(__file__)
    _folder = "" if folder == "." else f" {folder}"


def main(words):
    if words[:1] == ["watch"]:
        return watch(int(words[1]), float(words[2]), words[3])
    try:
        command, folder, word, commit, options = parse(words)
        name_caller(folder)
        experiment = find_experiment(folder)
        if command == "run":
            return command_run(experiment, options.seed, options.wait)
        if command == "wait":
            return command_wait(experiment, options.wait)
        if command == "log":
            return command_log(experiment, word, options.note, commit)
        if command == "submit":
            return command_submit(experiment, commit, options.seed, options.gpus)
        return command_status(experiment)
    except RefereeError as error:
        return f"error: {error}"
    except OSError as error:
        return f"error: {error}; mend that, then run this again"
    except KeyboardInterrupt:
        return f"\ninterrupted; a run that was started goes on; run: {me('wait')}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
