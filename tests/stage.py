"""A project of a test: the real referee.py, the stand-in prepare.py, a train.py that pretends; in a git repository."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def version(scores=None, does="score", note="", **facts):
    """Text of a train.py. note: makes it another file."""
    extra = "".join(f", {name}={value!r}" for name, value in facts.items())
    call = f"prepare.pretend({scores!r}, {does!r}{extra})"
    return f"import prepare\n\nNOTE = {note!r}\nif __name__ == '__main__':\n    {call}\n"


def seeds(*scores):
    """{42: first score, 43: second, ...}"""
    return {42 + n: score for n, score in enumerate(scores)}


def git(folder, *words):
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def make(folder, text=None):
    """The project in a new folder, committed on a branch of its own."""
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "referee.py", folder)
    shutil.copy(ROOT / ".gitignore", folder)
    shutil.copy(ROOT / "tests/stand_in.py", folder / "prepare.py")
    (folder / "train.py").write_text(text or version(seeds(1.0, 1.0014, 1.0007)))
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "start")
    return folder


def write_program(path, body):
    """A shell script that can be called."""
    path.write_text(f"#!/bin/bash\n{body}")
    path.chmod(0o755)


def write_uv(folder):
    """A stand-in for uv: `uv run` is this interpreter, and all data are prepared."""
    write_program(folder / "uv", f'shift\ntest "$1" = prepare.py && exit 0\nexec {sys.executable} -B "$@"\n')


def environment(**more):
    return {**os.environ, "TIME_BUDGET": "1", **more}


def referee(folder, *words, **more):
    """A command of referee.py as the agent runs it: (exit status, output)."""
    command = [sys.executable, "-B", "referee.py", *words]
    done = subprocess.run(
        command, cwd=folder, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout


def train(folder, **more):
    """train.py run by hand: (exit status, output)."""
    command = [sys.executable, "-B", "train.py"]
    done = subprocess.run(
        command, cwd=folder, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout


def commit(folder, text, subject):
    """Commits another train.py; returns the commit's seven digits."""
    (folder / "train.py").write_text(text)
    git(folder, "commit", "-qam", subject)
    return git(folder, "rev-parse", "--short=7", "HEAD")


def records(folder):
    """All records of a project, oldest first."""
    return [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]


def rows(folder):
    """Rows of results.tsv as lists, the header and stray lines left out."""
    path = folder / "results.tsv"
    lines = path.read_text().splitlines()[1:] if path.is_file() else []
    return [line.split("\t") for line in lines if line.count("\t") == 4]


def next_step(output):
    """What the last line of a command's output says is to be done."""
    last = output.rstrip("\n").splitlines()[-1]
    assert last.startswith("next: "), output
    return last.removeprefix("next: ")
