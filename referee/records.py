"""runs/: a record is written when a run is started and overwritten once, at its end."""

import datetime
import json
import re
import socket
import time
from dataclasses import asdict, dataclass, field, fields

from referee.base import birth, write_atomic

FORMAT = 2
INTERRUPTED = ("lost", "preempted", "busy")  # ends that say nothing of the idea
LARGEST = 1e12  # a score beyond it is damage
SAME = ("harness", "device", "metric")  # runs that agree in these share a table


@dataclass
class Record:
    """What is known of a run. As long as it goes on, and for ever where it was killed, fail says lost."""

    time: str  # of the start, UTC
    host: str
    pid: int  # of the supervisor
    birth: str | None  # tells the process from a later one with its number
    folder: str  # where the run was started
    commit: str | None  # 40 hex digits
    parent: str | None
    subject: str
    seed: int
    metric: str
    lower_is_better: bool
    code: str  # hash of what the edited files do
    limit: float  # seconds after which the supervisor ends it
    base: str | None = None  # the commit that it was cut from
    lines: list | None = None  # added and taken out since then
    picked: list = field(default_factory=list)  # commits that it brings onto a newer base
    slot: bool = False
    gpus: str | None = None  # the kind of device that was asked for, in the engine's words
    score: float | None = None
    audit: float | None = None
    fail: dict | None = field(default_factory=lambda: {"kind": "lost", "sentence": "the run was killed"})
    why_not: list = field(default_factory=list)  # why the score does not count, as sentences
    others: float | None = None  # share of the run's cores that other processes used
    harness: str | None = None
    device: str | None = None
    figures: dict = field(default_factory=dict)  # everything else that is shown or drawn
    format: int = FORMAT

    @property
    def kind(self):
        """Of the failure, None for a run with a score."""
        return self.fail["kind"] if self.fail else None

    @property
    def interrupted(self):
        return self.kind in INTERRUPTED

    @property
    def ground(self):
        """What has to be the same for scores to compare."""
        return tuple(getattr(self, name) for name in SAME)

    @property
    def score_text(self):
        return "nan" if self.score is None else f"{self.score:.6f}"

    @property
    def name(self):
        """Of its file."""
        stamp = re.sub(r"[-:]", "", self.time)
        host = re.sub(r"[^\w.-]", "_", self.host)
        return f"{stamp}-{(self.commit or 'nocommit')[:7]}-{self.seed}-{host}-{self.pid}.json"

    @property
    def may_be_running(self):
        """Whether its process lives; of another machine that cannot be seen, so there it may until its limit is over."""
        if self.kind != "lost":
            return False
        if self.host == socket.gethostname():
            return self.birth is not None and birth(self.pid) == self.birth
        return time.time() < datetime.datetime.fromisoformat(self.time).timestamp() + self.limit


def now():
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def runs_folder(folder, repository):
    """runs/ of an experiment. It lies in the main working tree, so that all working trees share it."""
    if repository.top is None or not folder.is_relative_to(repository.top):
        return folder / "runs"
    return repository.common.parent / folder.relative_to(repository.top) / "runs"


def write_record(runs, record):
    """One file a run: nothing tears or interleaves, and logs of several machines are pooled by copying files. Raises
    OSError."""
    if runs.is_file() and runs.stat().st_size == 0:  # what Codex's sandbox leaves in the place of a missing folder
        runs.unlink()
    runs.mkdir(parents=True, exist_ok=True)
    ignore = runs / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n")
    write_atomic(runs / record.name, json.dumps(asdict(record), indent=1) + "\n")


def parse_record(data):
    """The Record of a file's bytes. Raises ValueError where it is damaged, LookupError where it is of another version."""
    facts = json.loads(data)
    if not isinstance(facts, dict):
        raise ValueError("no object")
    if facts.get("format") != FORMAT:
        raise LookupError("another version")
    known = {name: facts[name] for name in FIELDS if name in facts}
    try:
        record = Record(**known)
        sound = is_sound(record)
    except (TypeError, AttributeError, KeyError):
        sound = False
    if not sound:
        raise ValueError("damaged")
    return record


FIELDS = [each.name for each in fields(Record)]


def is_sound(record):
    """Whether the fields that are computed with are what they must be."""
    texts = (record.time, record.host, record.subject, record.metric, record.code, record.folder)
    facts = [
        all(isinstance(text, str) for text in texts),
        datetime.datetime.fromisoformat(record.time) is not None,
        record.commit is None or re.fullmatch("[0-9a-f]{40,64}", record.commit) is not None,
        type(record.seed) is int and 0 <= record.seed < 2**63,
        type(record.pid) is int,
        type(record.limit) in (int, float),
        record.score is None or (type(record.score) in (int, float) and abs(record.score) <= LARGEST),
        record.fail is None or isinstance(record.fail["kind"] + record.fail["sentence"], str),
        (record.score is None) == (record.fail is not None),
        all(isinstance(reason, str) for reason in record.why_not),
        record.lines is None or [type(count) for count in record.lines] == [int, int],
        record.audit is None or type(record.audit) is float,
        record.others is None or type(record.others) is float,
        isinstance(record.figures, dict),
        isinstance(record.picked, list),
    ]
    return all(facts)


@dataclass(frozen=True)
class Runs:
    """What runs/ holds. damaged, older: how many files are not read."""

    records: tuple = ()  # oldest first
    damaged: int = 0
    older: int = 0


def picked_in(message):
    """Commits that `git cherry-pick -x` noted in a message."""
    return re.findall(r"\(cherry picked from commit ([0-9a-f]{40,64})\)", message)


def read_runs(folder):
    """The Runs of a folder."""
    found = []
    damaged = 0
    older = 0
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(parse_record(path.read_bytes()))
        except LookupError:
            older += 1
        except (OSError, ValueError, RecursionError):
            damaged += 1
    return Runs(tuple(found), damaged, older)


def reread(folder, record):
    """The record as its file says now."""
    try:
        return parse_record((folder / record.name).read_bytes())
    except (OSError, ValueError, LookupError, RecursionError):
        return record
