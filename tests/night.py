"""An agent that does what program.md says and nothing else: its commands are taken from there, its memory is the files.

    python tests/night.py PROJECT PLAN.json     # until every idea of the plan has a row; may be killed and started again

A plan is a list of ideas: {"name": ..., "versions": [train.py, mended train.py, ...]}.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = (ROOT / "program.md").read_text(encoding="utf-8")
MOST_LINES = 20


def section(title):
    return re.search(rf"^## {title}.*?\n(.*?)(?=^## |\Z)", PROGRAM, re.M | re.S)[1]


def codes(text):
    """Code in a text, fenced blocks first."""
    fenced = [re.sub(r"^   ", "", block, flags=re.M) for block in re.findall(r"```\n(.*?)```", text, re.S)]
    return fenced + re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))


def numbered(title):
    """{number: code of that step}"""
    steps = re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |^$|\Z)", section(title), re.M | re.S)
    return {int(number): codes(text) for number, text in steps}


def one(found, start):
    return next(code for code in found if code.startswith(start))


SETUP, STEPS = numbered("Set-up"), numbered("One experiment")
BRANCH, CHECK, LOG, NOTES = (one(SETUP[n], start) for n, start in ((1, "git"), (3, "uv"), (5, "printf"), (4, "printf")))
SEARCH, COMMIT, START = one(STEPS[1], "grep"), one(STEPS[2], "rm"), one(STEPS[3], "nohup")
POLL, READ, ROW, BACK = one(STEPS[4], "sleep"), one(STEPS[4], "grep"), one(STEPS[6], "git log"), STEPS[7][0]
MEND = one(codes(section("One experiment")), "rm -f run.log && git add train.py && git commit -q --amend")
TAIL = one(codes(section("One experiment")), "tail -n 20")
AFTER = codes(section("After an interruption"))


class Interrupted(Exception):
    """Raised after as many commands as an Agent was given."""


class Agent:
    def __init__(self, folder, plan, patience=10**9, still=60.0):
        """still: seconds that stand for program.md's 10 minutes; longer than any run of the stand-in takes."""
        self.folder, self.plan, self.patience, self.still, self.shown = Path(folder), plan, patience, still, 0

    def shell(self, command):
        self.patience -= 1
        if self.patience < 0:
            raise Interrupted
        done = subprocess.run(["bash", "-c", command], cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
        self.shown = max(self.shown, len(done.stdout.splitlines()))
        assert self.shown <= MOST_LINES, (command, done.stdout)
        return done.stdout

    def read(self, name):
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def last(self, name):
        return (self.read(name).rstrip("\n").splitlines() or [""])[-1]

    def rows(self, commit):
        return [line for line in self.read("results.tsv").splitlines() if line.startswith(commit + "\t")]

    def head(self):
        return self.shell("git rev-parse --short=7 HEAD").strip()

    # -- steps

    def set_up(self):
        for command in (BRANCH.replace("<nov21>", "nov21"), CHECK, NOTES, LOG):
            self.shell(command)

    def work(self):
        """Until every idea of the plan is decided."""
        if not self.read("results.tsv"):
            self.set_up()
            self.run(42)
        else:
            self.resume()
        while (idea := self.next_idea()) is not None:
            (self.folder / "train.py").write_text(idea["versions"][0])
            self.commit(idea["name"])
            self.run()

    def next_idea(self):
        for idea in self.plan:
            if not self.shell(SEARCH.replace("<a word of it>", idea["name"] + "$")):
                return idea

    def commit(self, name):
        self.shell(COMMIT.replace("<the idea in a few words>", name))

    def run(self, seed=None):
        """Step 3 and all that follows from it."""
        self.shell((f"SEED={seed} " if seed else "") + START)
        self.wait()

    @staticmethod
    def ended(line):
        return re.match(r"verdict:|FAIL:|\w*(Error|Exception)\b", line)

    def wait(self):
        """Steps 4 to 8 of a run that goes on; a rerun is part of it."""
        since, before = time.monotonic(), None
        while not self.ended(line := (self.shell(POLL).splitlines() or [""])[-1]):
            since, before = (since if line == before else time.monotonic()), line
            if time.monotonic() - since > self.still:
                return self.again()
        self.decide()

    def again(self):
        self.run(42 + len(self.rows(self.head())))

    def decide(self):
        out = self.shell(READ)
        bpb = re.search(r"^val_bpb: +(\S+)$", out, re.M)
        if not bpb:
            return self.fail(out)
        word, numbers = re.search(r"^verdict: +(\w+) \((.*)\)$", out, re.M).groups()
        status = {"keep": "keep", "baseline": "keep"}.get(word, "discard")
        self.record(bpb[1], status, "baseline" if word == "baseline" else "%s")
        self.act(word, numbers)

    def act(self, word, numbers):
        """After the row: another seed, or back, and a note."""
        seed = re.match(r"next SEED=(\d+); ", numbers or "")
        if seed and word in ("rerun", "baseline"):
            return self.run(seed[1])
        self.finish()

    def finish(self):
        name = self.shell("git log -1 --format=%s").strip()
        self.shell(BACK)
        if name not in self.read("ideas.md"):
            with open(self.folder / "ideas.md", "a") as notes:
                notes.write(f"{name}\n")

    def fail(self, out):
        if "FAIL" not in out:
            self.shell(TAIL)
        if re.search("FAIL: busy|FAIL: error: train.py was killed|ended early", out):
            return self.again()
        text = self.read("train.py")
        name = self.shell("git log -1 --format=%s").strip()
        versions = next((idea["versions"] for idea in self.plan if idea["name"] == name), [text])
        mended = versions[versions.index(text) + 1:] if text in versions else []
        if mended:
            (self.folder / "train.py").write_text(mended[0])
            return self.mend()
        self.record("nan", "crash", "%s")
        self.finish()

    def mend(self):
        self.shell(MEND)
        self.run()

    def record(self, bpb, status, text):
        row = ROW.replace("<val_bpb>", bpb).replace("<memory_gb>", "0.0").replace("<status>", status).replace("%s", text)
        self.shell(row)

    def resume(self):
        state = [self.shell(command) for command in AFTER[:4]][2]
        log, rows = self.last("run.log"), self.rows(self.head())
        last = [row for line in self.read("results.tsv").splitlines() if len(row := line.split("\t")) == 5][-1]  # no stray one
        bpb = re.search(r"^val_bpb: +(\S+)$", self.read("run.log"), re.M)
        if (self.folder / "run.log").is_file():
            if not self.ended(log):
                return self.wait()
            if not rows or (bpb[1] not in last if bpb else "crash" not in last):
                if not bpb and "M" in state[:2]:  # git status comes first
                    return self.mend()
                return self.decide()
            if seed := re.match(r"verdict: +\w+ \(next SEED=(\d+)", log):
                return self.run(seed[1])
        self.shell(BACK)
        if self.shell("git status --short -uno"):
            self.shell(AFTER[-1])  # takes the edit back
        if not self.rows(self.head()):
            self.run()


if __name__ == "__main__":
    agent = Agent(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), still=5.0)
    agent.work()
    print(f"{agent.shown} lines at most")
