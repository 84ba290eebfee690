"""An agent that does what program.md says and nothing else: its commands are taken from there, its memory is the files.

    python tests/night.py PROJECT PLAN.json     # until every idea of the plan has a row; may be killed and started again

A plan is a list of ideas: {"name": ..., "versions": [train.py, mended train.py, ...], "word": a status of the agent's own}.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_LINES = 20


def section(text, title):
    return re.search(rf"^## {title}.*?\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]


def codes(text):
    """Code in a text."""
    return re.findall(r"`([^`\n]+)`", text)


def one(found, start):
    """The only code that begins so."""
    fitting = [code for code in found if code.startswith(start)]
    assert fitting, f"program.md has no command that begins with {start!r}"
    return fitting[0]


class Commands:
    """The commands of a program.md."""

    def __init__(self, text):
        setup = codes(section(text, "Set-up"))
        loop = codes(section(text, "One experiment"))
        self.branch = one(setup, "git checkout -q -b")
        self.notes = one(setup, "printf")
        self.check = next((code for code in setup if code.endswith("--check")), None)
        self.search = one(loop, "grep -i")
        self.commit = one(loop, "git commit -qam")
        self.mend = one(loop, "git commit -qa --amend")
        self.run = one(loop, self.caller(loop) + " run")
        self.log = one(loop, self.caller(loop) + " log")
        self.wait = one(loop, self.caller(loop) + " wait")
        self.status = one(codes(section(text, "After an interruption")), self.caller(loop) + " status")

    @staticmethod
    def caller(found):
        """How this program.md calls the referee: `uv run referee.py` or `uv run ../../referee.py`."""
        return re.match(r"uv run \S*referee\.py", one(found, "uv run "))[0]


class Interrupted(Exception):
    """Raised after as many commands as an Agent was given."""


class Agent:
    """edited: the file that the ideas change. patience: commands until it is interrupted."""

    def __init__(self, folder, plan, patience=10**9, program=ROOT / "program.md", edited="train.py"):
        self.folder = Path(folder)
        self.plan = plan
        self.patience = patience
        self.commands = Commands(Path(program).read_text(encoding="utf-8"))
        self.edited = self.folder / edited
        self.shown = 0

    def shell(self, command):
        """Output of a command, which may not be longer than program.md allows."""
        self.patience -= 1
        if self.patience < 0:
            raise Interrupted
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.shown = max(self.shown, len(done.stdout.splitlines()))
        assert self.shown <= MOST_LINES, (command, done.stdout)
        assert "Traceback (most recent call last)" not in done.stdout.split("FAIL:")[0] or "FAIL:" in done.stdout
        return done.stdout

    def set_up(self):
        self.shell(re.sub("<[^>]*>", "nov21", self.commands.branch))
        if self.commands.check:
            self.shell(self.commands.check)
        self.shell(self.commands.notes)

    def begin(self):
        """The output of the first command of a night, or of one that goes on."""
        if (self.folder / "results.tsv").exists():
            return self.shell(self.commands.status)
        self.set_up()
        return self.shell(self.commands.run)

    def work(self):
        """Until every idea of the plan is decided."""
        out = self.begin()
        while out is not None:
            out = self.follow(out)

    def follow(self, out):
        """Does what the last line of an output says; None where the night is over."""
        last = (out.rstrip("\n").splitlines() or [""])[-1]
        step = re.match(r"next: (.*)", last)
        if step is None:
            return self.shell(self.commands.status)  # an error, which says what to run; status says it too
        step = step[1]
        if step.startswith("the next idea"):
            return self.next_idea()
        if step.startswith(("git is at work", "wait a minute")):
            self.shell("sleep 1")
            return self.shell(self.commands.status)
        if step.startswith("finish the edit"):
            self.shell(f"git restore {self.edited.name}")
            return self.shell(self.commands.status)
        return self.do(step)

    def do(self, step):
        """A step that begins with a command of this night, or with an action."""
        if step.startswith(("mend", "finish the mend")):
            return self.mend()
        command = re.match(r"uv run \S*referee\.py (run --seed \d+|run|wait|log \w+|log)", step)
        assert command is not None, f"what is to be done is not clear: {step}"
        return self.referee(command[1])

    def referee(self, words):
        """A command of the referee; the agent's own word goes where its plan has one for this idea."""
        if words == "log":
            idea = self.idea_of_head()
            words = f"log {idea['word']}" if idea and "word" in idea else words
        out = self.shell(f"{Commands.caller([self.commands.run])} {words}")
        if words.startswith("log"):
            self.note()
        return out

    def head(self):
        return self.shell("git log -1 --format=%s").strip()

    def idea_of_head(self):
        name = self.head()
        return next((idea for idea in self.plan if idea["name"] == name), None)

    def note(self):
        """Writes the idea of the last row into ideas.md, once."""
        path = self.folder / "ideas.md"
        name = (self.folder / "results.tsv").read_text().splitlines()[-1].split("\t")[-1]
        if path.exists() and name not in path.read_text():
            with open(path, "a") as notes:
                notes.write(f"{name}\n")

    def next_idea(self):
        """Commits and runs the first idea of the plan that has no row."""
        for idea in self.plan:
            if not self.shell(self.commands.search.replace("<a word of it>", idea["name"] + "$")):
                self.edited.write_text(idea["versions"][0])
                self.shell(self.commands.commit.replace("<the idea in a few words>", idea["name"]))
                return self.shell(self.commands.run)
        return None

    def mend(self):
        """The next version of HEAD's idea, or a crash where there is none."""
        idea = self.idea_of_head()
        versions = idea["versions"] if idea else []
        held = self.shell(f"git show HEAD:./{self.edited.name} | md5sum")
        for number, text in enumerate(versions[:-1]):
            self.edited.write_text(text)
            if self.shell(f"cat {self.edited.name} | md5sum") == held:
                self.edited.write_text(versions[number + 1])
                self.shell(self.commands.mend)
                return self.shell(self.commands.run)
        self.shell(f"git restore {self.edited.name}")
        return self.referee("log crash")


if __name__ == "__main__":
    agent = Agent(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
    agent.work()
    print(f"{agent.shown} lines at most")
