"""An agent that does what `next:` and program.md say and nothing else; its memory is the files.

    python tests/agent.py FOLDER PLAN.json     # until every idea of the plan has its last word; may be killed and started again

A plan is a list of ideas: {"name": ..., "line": number of the line of train.py that it changes, "gain": ..., "does": [what the
first version does, the mended one, ...]}.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_LINES = 20


def command_of(name, start):
    """The first command of a program.md that begins so."""
    commands = re.findall(r"`([^`\n]+)`", (ROOT / name).read_text(encoding="utf-8"))
    return next(command for command in commands if command.startswith(start))


COMMIT = command_of("program.md", "git commit -qam").split("'")[0]
AMEND = command_of("program.md", "git commit -qa --amend")
STATUS = command_of("program.md", "uv run referee status")
CRASH = command_of("program.md", "uv run referee log crash")


class Agent:
    def __init__(self, folder, plan):
        self.folder = Path(folder)
        self.plan = plan
        self.shown = 0  # lines at most

    def shell(self, command):
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if "referee" in command and "--json" not in command:
            self.shown = max(self.shown, len(done.stdout.splitlines()))
        return done.stdout

    def work(self):
        while True:
            out = self.shell(STATUS)
            step = out.rstrip("\n").splitlines()[-1].removeprefix("next: ")
            if not step.startswith("#"):
                self.shell(step)
            elif "the next idea" in step:
                if not self.next_idea(step, out):
                    return
            else:
                self.read(step)

    def read(self, step):
        """A line that is for the agent to read."""
        if "settle the conflict" in step:
            self.shell("git cherry-pick --skip")
            self.shell(step.split("then ")[-1])
        elif "finish the edit" in step:
            self.shell("git restore train.py")
        elif "mend" in step:
            self.mend()
        else:
            raise AssertionError(step)

    def mend(self):
        """The next version of the idea that HEAD is, until there is none."""
        name = self.shell("git log -1 --format=%s").strip()
        idea = next((idea for idea in self.plan if idea["name"] == name), None)
        now = re.search(r"'(\w+)'(, seconds=.*)?\)", (self.folder / "train.py").read_text())[1]
        versions = idea["does"][idea["does"].index(now) + 1 :] if idea and now in idea["does"] else []
        if not versions:
            self.shell(CRASH)
            return
        self.edit(idea, versions[0])
        self.shell(AMEND)
        self.shell("uv run referee run")

    def next_idea(self, step, out):
        """Starts the first idea that nobody has tried; where there is none, waits until nothing is out. False at the end."""
        tried = self.shell("git log --all --format=%s").splitlines()
        for idea in self.plan:
            if idea["name"] in tried:
                continue
            self.edit(idea, idea["does"][0])
            self.shell(f"{COMMIT}'{idea['name']}'")
            self.shell(idea.get("environment", "") + step.split(" && ")[-1])
            return True
        if "jobs: none" in out or "jobs" not in out:
            facts = json.loads(self.shell("uv run referee status --json"))
            if not facts.get("done"):
                return False
            time.sleep(2)  # a record is on its way
        self.shell("uv run referee wait --wait 20")
        return True

    def edit(self, idea, does):
        path = self.folder / "train.py"
        text = re.sub(
            rf"^IDEA_{idea['line']} = .*$", f"IDEA_{idea['line']} = {idea['gain']}", path.read_text(), flags=re.M
        )
        path.write_text(re.sub(r"'\w+'(, seconds=.*)?\)$", rf"'{does}'\1)", text, flags=re.M))


if __name__ == "__main__":
    agent = Agent(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
    agent.work()
    print(agent.shown)
