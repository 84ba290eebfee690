"""The state of a night: trials, as files, git and the engine tell them.

A trial is a commit with its runs. Alone, HEAD is the only one; in slots, commits that are out stand under
refs/autoresearch/out/<branch>/.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from referee.base import Commit, Repository, ask_git, read_repository, require
from referee.book import Book, read_book
from referee.engines import Queue, bring_back, cluster, read_queue
from referee.experiment import Experiment
from referee.records import Runs, picked_in, read_runs, runs_folder
from referee.supervisor import differing, head_blobs
from referee.verdict import counts, is_slowed, kept_below, verdict_on

OUT = "refs/autoresearch/out"


@dataclass
class Trial:
    """A commit with its runs."""

    commit: Commit
    ancestors: list  # hashes of the commits below it, newest first
    base: str | None  # the one that it was cut from: kept, or the baseline that is out; None for a baseline itself
    runs: list  # its Records but those of the morning, oldest first
    status: str | None  # the last word of results.tsv
    jobs: dict = field(default_factory=dict)  # {seed: "running", "queued" or "held"}
    picked: tuple = ()  # commits that it brings onto a newer base

    @property
    def last(self):
        return self.runs[-1] if self.runs else None

    @property
    def is_kept(self):
        return self.status == "keep"

    @property
    def counted(self):
        return [run for run in self.runs if counts(run)]


@dataclass
class Night:
    """The state of a night, as its files, git and the engine tell it."""

    experiment: Experiment
    repository: Repository
    folder: Path  # runs/
    book: Book
    runs: Runs
    changed: list  # edited files that HEAD does not hold so
    claims: dict  # {branch: {Commit: commits that it picks}} of what is out, oldest first
    queue: Queue

    @property
    def records(self):
        return self.runs.records

    @property
    def head(self):
        return self.repository.head

    @property
    def mine(self):
        return self.claims.get(self.repository.branch, {})

    @property
    def in_slots(self):
        """Whether this night works with slots."""
        return bool(self.claims) or (bool(self.records) and self.records[-1].slot)

    @property
    def here(self):
        """The Records of runs that were started in this folder."""
        return [run for run in self.records if run.folder == str(self.experiment.folder)]

    @property
    def running(self):
        """The Record of a run that goes on in this folder, None where there is none."""
        return next((run for run in self.here[::-1] if run.may_be_running), None)

    @property
    def on_head(self):
        return self.trial(self.head)

    @property
    def trials(self):
        """What is out, and HEAD unless it is an idea that has not been sent."""
        out = [self.trial(commit) for commit in self.mine]
        head = self.on_head
        return out if self.head in self.mine or is_idea(head) else [*out, head]

    def trial(self, commit):
        branch = [each.hash for each in self.repository.history]
        below = branch.index(commit.parent) if commit.parent in branch else len(branch)
        ancestors = branch[below:] or [commit.parent or ""]
        base = kept_below(self.book, ancestors)
        if not self.book.names_a_keep():
            base = next((each.hash for each in self.mine if each.hash in ancestors), None)
        runs = [run for run in self.records if run.commit == commit.hash and run.audit is None]
        jobs = {seed: state for (digits, seed), state in self.queue.jobs.items() if digits == commit.hash}
        status = self.book.status(commit.hash)
        return Trial(commit, ancestors, base, runs, status, jobs, self.mine.get(commit, ()))

    def verdict(self, trial, record=None):
        """The Verdict on a run of a trial, by default the last one."""
        return verdict_on(record or trial.last, self.records, self.book, trial.ancestors)

    def unlogged(self, trial):
        """Runs of a trial that are to have a row: every score that was not slowed, and one failure of the idea's own."""
        runs = [run for run in trial.runs if not run.interrupted and not is_slowed(run)]
        runs = [run for run in runs if not self.book.logged(run, runs)]
        failed = [run for run in runs if run.fail and not trial.is_kept]
        return [run for run in runs if run.score is not None] + failed[-1:]


def is_idea(trial):
    """Whether a commit on the branch waits for its first word."""
    return trial.base is not None and trial.status is None


def read_night(experiment):
    """The Night of an experiment's folder. Raises RefereeError outside of a repository with a commit."""
    repository = read_repository(experiment.folder)
    start = "run: git init && git add -A && git commit -m start"
    require(repository.head, f"{experiment.folder}: {repository.trouble}; {start}")
    folder = runs_folder(experiment.folder, repository)
    claims = read_claims(repository)
    queue = read_queue() if claims else Queue()
    ended = {each.hash for each in claims.get(repository.branch, ())} - {digits for digits, _ in queue.jobs}
    if cluster() and ended and not queue.trouble:
        queue = replace(queue, trouble=bring_back(folder))
    runs = read_runs(folder)  # after the queue was asked: a job that is in it no more has left its record
    changed = differing(experiment, repository, head_blobs(experiment, repository))
    return Night(experiment, repository, folder, read_book(experiment.results), runs, changed, claims, queue)


def read_claims(repository):
    """{branch: {Commit: commits that it picks}} of all commits that are out, oldest first."""
    packed = repository.common / "packed-refs"
    if not (repository.common / OUT).is_dir() and not (packed.is_file() and OUT in packed.read_text()):
        return {}
    form = "%(refname)%09%(objectname)%09%(objectname:short=7)%09%(parent)%09%(subject)%09%(body)%00"
    out, _ = ask_git(repository.folder, "for-each-ref", "--sort=committerdate", f"--format={form}", f"{OUT}/")
    claims = {}
    for line in out.decode("utf-8", "replace").split("\0\n")[:-1]:
        name, digits, short, parents, subject, body = line.split("\t", 5)
        commit = Commit(digits, short, parents.split()[0] if parents else None, subject)
        branch = name.removeprefix(f"{OUT}/").rpartition("/")[0]
        claims.setdefault(branch, {})[commit] = tuple(picked_in(body))
    return claims
