"""A fleet without an engine: `sbatch` puts a run into a list, `squeue` shows that list, and the test runs it slot by slot."""

import os
import shutil
import subprocess
import sys

import stage
from stage import ROOT, git, referee, write_program

SPACE = "\n".join(["#"] * 4)  # keeps the ideas apart, so that git can bring one onto another


def text(gains=(), does="score", seconds=0.0, ideas=12):
    """Text of a train.py with a line for each of some ideas. gains: {number of the idea: what it gains}."""
    gains = dict(gains)
    lines = [f"IDEA_{n} = {gains.get(n, 0.0)}\n{SPACE}" for n in range(ideas)]
    names = ", ".join(f"IDEA_{n}" for n in range(ideas))
    call = f"prepare.pretend(prepare.gains({names}), {does!r}, seconds={seconds}, grace=60)"
    return "\n".join(["import prepare", "", *lines, "if __name__ == '__main__':", f"    {call}\n"])


def make(folder, **more):
    """A project with fleet/ in it, on a branch of its own."""
    stage.make(folder, text(**more))
    shutil.copytree(ROOT / "fleet", folder / "fleet")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--amend", "-m", "start")
    git(folder, "checkout", "-q", "-b", "autoresearch/nov21")
    return folder


class Engine:
    """Stands for Slurm. folder: where its programs and its list of jobs lie."""

    def __init__(self, folder, monkeypatch):
        self.list = folder / "jobs"
        self.list.write_text("")
        programs = folder / "bin"
        programs.mkdir()
        write_program(
            programs / "sbatch", f'shift $(($# - 3))\necho "PENDING/Priority $PWD/$*" >> {self.list}\necho Submitted\n'
        )
        write_program(programs / "squeue", f"cat {self.list}\n")
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        monkeypatch.setenv("UV_PROJECT_ENVIRONMENT", sys.prefix)
        monkeypatch.setenv("TIME_BUDGET", "1")

    def take(self):
        """All jobs of the list as [(folder, commit, seed)]; the list is empty then."""
        lines = self.list.read_text().splitlines()
        self.list.write_text("")
        jobs = []
        for line in lines:
            script, commit, seed = line.split()[1:]
            jobs.append((script.removesuffix("/fleet/slot.sh"), commit, seed))
        return jobs

    def work(self, **environment):
        """Runs all jobs, one after the other."""
        for job in self.take():
            run_slot(*job, **environment)


def run_slot(folder, commit, seed, **environment):
    """slot.sh by hand: (exit status, its log)."""
    command = ["fleet/slot.sh", commit, str(seed)]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def idea(folder, subject, gains, **more):
    """Commits an idea and submits it; returns (its 40 digits, what was printed)."""
    (folder / "train.py").write_text(text(gains, **more))
    git(folder, "commit", "-qam", subject)
    commit = git(folder, "rev-parse", "HEAD")
    status, out = referee(folder, "submit")
    assert status == 0, out
    return commit, out
