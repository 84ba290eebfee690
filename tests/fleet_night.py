"""An agent that does what fleet/program.md says and nothing else, with slots instead of a device.

    python tests/fleet_night.py FOLDER PLAN.json BRANCH     # until every idea of the plan has its last word

A plan is a list of ideas {"name": ..., "line": number of the line of train.py that it changes, "gain": ..., "does": ...}.
"""

import json
import re
import sys
from pathlib import Path

import night
from night import ROOT, codes, one, section


class Agent(night.Agent):
    """branch: autoresearch/<branch> is its own."""

    def __init__(self, folder, plan, branch):
        super().__init__(folder, plan)
        text = (ROOT / "fleet/program.md").read_text(encoding="utf-8")
        setup, loop = codes(section(text, "Set-up")), codes(section(text, "The loop"))
        self.commands.branch = re.sub("<[^>]*>", branch, one(setup, "git checkout -q -b"))
        self.commands.check = one(setup, "uv run prepare.py")
        self.commands.notes = one(setup, "printf")
        self.commands.search = one(loop, "git log --all")
        self.commands.commit = one(loop, "git commit -qam")
        self.go_on = one(loop, "git commit -qa --no-edit")
        self.abort = one(loop, "git cherry-pick --abort")
        self.commands.status = one(codes(section(text, "After an interruption")), "uv run referee.py status")
        self.submitted = 0

    def begin(self):
        if not (self.folder / "results.tsv").exists():
            self.set_up()
        return self.shell(self.commands.status)

    def do(self, step):
        if step.startswith("settle the conflict"):
            return self.give_up_pick()
        if step.startswith("git cherry-pick"):
            return self.pick(step)
        command = re.match(r"uv run referee\.py [\w -]+", step)
        assert command is not None, f"what is to be done is not clear: {step}"
        return self.shell(command[0].strip().removesuffix(" on the kind of device that"))

    def pick(self, step):
        """Brings a gain onto the newest base; where that fails, the idea is given up."""
        commit = re.match(r"git cherry-pick (\w+)", step)[1]
        self.shell(f"git cherry-pick {commit}")
        if self.shell("git status --porcelain --untracked-files=no"):
            self.shell(self.abort)
            return self.shell(f"uv run referee.py log {commit} discard")
        return self.shell("uv run referee.py submit")

    def give_up_pick(self):
        self.shell(self.abort)
        return self.shell(self.commands.status)

    def next_idea(self):
        """Submits the first idea that nobody has tried; where there is none, waits until nothing is out."""
        for idea in self.plan:
            if self.shell(self.commands.search.replace("<a word of it>", f"^{idea['name']}$")):
                continue
            self.edit(idea)
            self.shell(self.commands.commit.replace("<the idea in a few words>", idea["name"]))
            self.submitted += 1
            return self.shell(idea.get("environment", "") + "uv run referee.py submit")
        out = self.shell(self.commands.status)
        if re.search(r"^out: 0 running, 0 queued\n(?!  )", out, re.M):
            return None  # a commit that is listed below still awaits a record
        self.shell("sleep 2")
        return self.shell(self.commands.status)

    def edit(self, idea):
        text = self.edited.read_text()
        text = re.sub(rf"^IDEA_{idea['line']} = .*$", f"IDEA_{idea['line']} = {idea['gain']}", text, flags=re.M)
        if "does" in idea:
            text = text.replace("'score'", repr(idea["does"]))
        self.edited.write_text(text)


if __name__ == "__main__":
    agent = Agent(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), sys.argv[3])
    agent.work()
    print(f"{agent.submitted} ideas, {agent.shown} lines at most")
