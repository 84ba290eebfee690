"""What the commands have in common: how they are called, their last line, what is in their way."""

import contextlib
import os
from dataclasses import replace
from pathlib import Path

from referee.base import RefereeError, git, read_blobs, require
from referee.experiment import edits_on_disk
from referee.table import git_lock, next_need, words_of

_folder = ""  # of the experiment, as it was named; set by name_folder()


def name_folder(folder):
    """Notes the folder of the experiment as it was named, for what is printed to be run next."""
    global _folder
    _folder = folder


def caller():
    """How this folder is called from the one that the command was called in."""
    return f"uv run {os.path.relpath(Path(__file__).parent)}"


def me(words=""):
    return f"{caller()} {words} {_folder}".strip()


def say_next(night):
    """The last line of every command."""
    print(f"next: {line_of(night, next_need(night))}", flush=True)
    return 0


def line_of(night, need):
    """A Need as a line that a shell may run."""
    return words_of(night, need, caller(), _folder)


def require_at_rest(night):
    """Raises RefereeError while git is locked or a run goes on here."""
    lock = git_lock(night.repository)
    require(lock is None, f"git is at work or was killed a moment ago ({lock}); run this again in 10 s")
    if night.running:
        raise RefereeError(f"a run is going on ({said_of(night.running)}); run: {me('wait')}")


def said_of(record):
    """Commit, seed and process of a run."""
    return f"{(record.commit or 'no commit')[:7]} {record.subject[:60]!r}, seed {record.seed}, process {record.pid}"


def full_commit(night, words):
    """The 40 digits of a commit. Raises RefereeError where there is none or no one commit begins so."""
    with contextlib.suppress(RefereeError):
        return git(night.experiment.folder, "rev-parse", "--verify", "--quiet", f"{words}^{{commit}}")
    raise RefereeError(f"there is no commit {words} here, or more than one; run: {me('status')}")


def blobs_of(night, commit):
    """{edited file: bytes or None} in a commit."""
    names = {f"{commit}:{night.repository.relative}{name}": name for name in night.experiment.edits}
    return {names[key]: data for key, data in read_blobs(night.repository, list(names)).items()}


def update_refs(night, lines):
    if lines:
        data = "".join(f"{line}\n" for line in lines).encode()
        git(night.experiment.folder, "update-ref", "-m", "referee", "--stdin", data=data)


def step_back(night, trial, refs=()):
    """Takes the edited files, then the branch back to the base of HEAD; refs: further updates in the same transaction. What
    is changed in other files stays as it is, and an edit in progress is kept under a ref."""
    folder = night.experiment.folder
    if night.changed and edits_on_disk(night.experiment) != blobs_of(night, trial.base):
        edit = git(folder, "stash", "create")
        if edit:
            git(folder, "update-ref", f"refs/autoresearch/{trial.commit.short}-edit", edit)
            print(f"the uncommitted edit is kept as refs/autoresearch/{trial.commit.short}-edit")
    git(folder, "restore", f"--source={trial.base}", "--staged", "--worktree", "--", *night.experiment.edits)
    update_refs(night, [*refs, f"update HEAD {trial.base} {trial.commit.hash}"])
    below = [commit.hash for commit in night.repository.history].index(trial.base)
    night.repository = replace(night.repository, history=night.repository.history[below:])
    night.changed = []
    print(f"went back to {trial.base[:7]}")
