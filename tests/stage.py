"""A project of a test: the real referee/, the stand-in prepare.py, a train.py that pretends; in a git repository, alone or
with slots. Commands run as an agent runs them, in a shell, with a `uv` that is this interpreter."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SPACE = "\n".join(["#"] * 4)  # keeps the ideas apart, so that git can bring one onto another
BASE = 1.0  # mean score of the baseline
MODES = ("alone", "slots")


def train_text(gains=(), does="score", note="", **more):
    """Text of a train.py with a line for each of some ideas. gains: {number of the idea: what it gains}. Ideas 10 and 11
    harm each other."""
    gains = dict(gains)
    lines = [f"IDEA_{n} = {gains.get(n, 0.0)}\n{SPACE}" for n in range(12)]
    total = " - ".join([str(BASE), *(f"IDEA_{n}" for n in range(12))]) + " + 9 * min(IDEA_10, IDEA_11)"
    extra = "".join(f", {name}={value!r}" for name, value in more.items())
    call = f"prepare.pretend({total}, {does!r}{extra})"
    return "\n".join(["import prepare", "", f"NOTE = {note!r}", *lines, "if __name__ == '__main__':", f"    {call}\n"])


def write_program(path, body):
    """A shell script that can be called."""
    path.write_text(f"#!/bin/bash\n{body}")
    path.chmod(0o755)


@functools.cache
def quick_referee():
    """A copy of referee/ in which a run may take 2 seconds beyond its budget. Compiled once for all tests."""
    folder = Path(tempfile.mkdtemp()) / "referee"
    shutil.copytree(ROOT / "referee", folder, ignore=shutil.ignore_patterns("__pycache__"))
    run = folder / "run.py"
    run.write_text(run.read_text().replace("\nGRACE = 300 ", "\nGRACE = 2 "))
    return folder


class Stage:
    """folder: of the project. more: environment variables of its commands."""

    def __init__(self, place, text=None, slots=False):
        self.folder = place / "project"
        self.slots = slots
        self.jobs = place / "jobs"  # the queue of the engine
        self.programs = place / "bin"
        self.more = {}
        for path in (self.folder, self.programs, place / "tmp"):
            path.mkdir(parents=True)
        self.jobs.write_text("")
        write_program(self.programs / "uv", f'shift\ntest "$1" = prepare.py && exit 0\nexec {sys.executable} "$@"\n')
        self.environment = {
            **os.environ,
            "TIME_BUDGET": "1",
            "TMPDIR": str(place / "tmp"),
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "UV_PROJECT_ENVIRONMENT": sys.prefix,
        }
        self.make_project(text or train_text())
        if slots:
            self.make_engine()

    def make_project(self, text):
        (self.folder / "referee").symlink_to(quick_referee())
        for name in (".gitignore", ".gitattributes", "fleet"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.folder / name)
        (self.folder / "runs").mkdir()
        shutil.copy(ROOT / "runs/.gitignore", self.folder / "runs")
        shutil.copy(ROOT / "tests/stand_in.py", self.folder / "prepare.py")
        (self.folder / "train.py").write_text(text)
        self.git("init", "-q", "-b", "main")
        self.git("add", "-A")
        self.git("commit", "-qm", "start")
        self.git("checkout", "-q", "-b", "autoresearch/nov21")

    def make_engine(self):
        """Stands for Slurm: `sbatch` puts a job into a list, `squeue` shows it, work() runs it."""
        job = f'echo "PENDING/Priority $PWD/$*" >> {self.jobs}; echo "${{AUTORESEARCH_GPUS:-any}}" >> {self.jobs}.kinds'
        write_program(self.programs / "sbatch", f"shift $(($# - 3))\n{job}\necho Submitted\n")
        write_program(self.programs / "squeue", f"cat {self.jobs}\n")

    # -- what an agent does

    def shell(self, line, **more):
        """(exit status, output) of a command line."""
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env={**self.environment, **self.more, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        return done.returncode, done.stdout

    def referee(self, words, **more):
        """Output of a command of the referee."""
        return self.shell(f"uv run referee {words}", **more)[1]

    def git(self, *words):
        done = subprocess.run(["git", *words], cwd=self.folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def commit(self, subject, gains=(), does="score", **more):
        """Commits a change of train.py; returns the commit's seven digits."""
        path = self.folder / "train.py"
        found = re.findall(r"^IDEA_(\d+) = (.*)$", path.read_text(), re.M)
        now = {int(number): float(gain) for number, gain in found}
        path.write_text(train_text(now | dict(gains), does, **more))
        self.git("commit", "-qam", subject)
        return self.head

    def idea(self, subject, gains=(), does="score", **more):
        """Commits an idea and runs it, or sends it out and lets it run; returns its seven digits."""
        commit = self.commit(subject, gains, does, **more)
        self.out = self.referee("submit" if self.slots else "run")
        self.work()
        return commit

    def work(self, **more):
        """Runs all jobs of the queue, one after the other."""
        lines = self.jobs.read_text().splitlines()
        self.jobs.write_text("")
        for line in lines:
            script, commit, seed = line.split()[1:]
            self.slot(script.removesuffix("/fleet/slot.sh"), commit, seed, **more)

    def slot(self, folder, commit, seed, **more):
        """slot.sh by hand: its exit status."""
        command = ["fleet/slot.sh", commit, str(seed)]
        environment = {**self.environment, **self.more, **more}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True).returncode

    @property
    def next(self):
        """What `next:` says now, the command and the prose."""
        return next_of(self.referee("status"))

    def follow(self, mend=None, patience=30, **more):
        """Obeys `next:` to the letter until an idea is asked for; returns the lines. mend(line): what an agent does where
        the line is for it to read; returns a command line, or None to go on."""
        lines = []
        out = self.referee("status")
        while len(lines) < patience:
            line = next_of(out)
            lines.append(line)
            if "the next idea" in line:
                return lines
            command = line
            if line.startswith("#"):
                command = mend(line) if mend else None
                assert command, "\n".join(lines)
            out = self.shell(command, **more)[1]
            assert "Traceback" not in out or "ValueError: no" in out, out
            if self.slots or "next: " not in out:
                self.work(**more)
                out = self.referee("status")
        raise AssertionError("\n".join(lines))

    def baseline(self):
        """Three logged runs of the first commit."""
        if self.slots:
            self.referee("submit")
            self.work()
        self.follow()
        return self

    # -- what is there then

    @property
    def head(self):
        return self.git("rev-parse", "--short=7", "HEAD")

    @property
    def branch(self):
        """Subjects of the commits, newest first."""
        return self.git("log", "--format=%s").splitlines()

    @property
    def refs(self):
        return self.git("for-each-ref", "--format=%(refname:lstrip=2)", "refs/autoresearch").split()

    @property
    def records(self):
        """All records, oldest first."""
        return [json.loads(path.read_text()) for path in sorted((self.folder / "runs").glob("*.json"))]

    @property
    def rows(self):
        """Rows of results.tsv as lists, the header and stray lines left out."""
        path = self.folder / "results.tsv"
        lines = path.read_text().splitlines()[1:] if path.is_file() else []
        return [line.split("\t") for line in lines if line.count("\t") == 4]

    def words(self, commit):
        """The words on a commit in the log."""
        return [row[3] for row in self.rows if row[0] == commit]

    def forge(self, number=-1, **changes):
        """A further record like one that is there."""
        record = self.records[number] | changes
        stamp = re.sub(r"[-:]", "", record["time"])
        name = f"{stamp}-{record['commit'][:7]}-{record['seed']}-forged-{record['pid']}.json"
        (self.folder / "runs" / name).write_text(json.dumps(record))


def next_of(output):
    """What the last line of a command's output says is to be done."""
    last = output.rstrip("\n").splitlines()[-1]
    assert last.startswith("next: "), output
    return last.removeprefix("next: ")


def copied(night, place):
    """The same night in another place."""
    old = night.folder.parent
    new = place / "night"
    shutil.copytree(old, new, symlinks=True)
    copy = Stage.__new__(Stage)
    copy.__dict__.update(night.__dict__)
    copy.folder = new / "project"
    copy.jobs = new / "jobs"
    copy.programs = new / "bin"
    copy.more = {}
    copy.environment = {**night.environment, "TMPDIR": str(new / "tmp"), "PATH": f"{new / 'bin'}:{os.environ['PATH']}"}
    for record in (copy.folder / "runs").glob("*.json"):
        record.write_text(record.read_text().replace(str(old), str(new)))
    if copy.slots:
        copy.make_engine()
    return copy
