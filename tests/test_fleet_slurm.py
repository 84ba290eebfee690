"""A night of two agents on a real Slurm (tests/slurm.py) with four slots: jobs killed, requeued and lost, a full disk, wins
on old bases, the same ideas in both plans.

uv run pytest -m slurm -s     # prints what came of it
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import fleet_stage
import pytest
import slurm
from stage import git, records, rows, write_uv

SECONDS = 6.0  # that a run takes


def plan(rng, count, first_line, name):
    """Ideas of which one in five gains, one in eight crashes; some change a line that another one changes too."""
    ideas = []
    for number in range(count):
        draw = rng.random()
        idea = {
            "name": f"{name} {number}",
            "line": first_line + number % 12,
            "gain": round(rng.gauss(-0.004, 0.004), 6),
        }
        if draw < 0.2:
            idea["gain"] = 0.012 + 0.001 * number
        elif draw < 0.32:
            idea["does"] = rng.choice(["oom", "nan", "error"])
        ideas.append(idea)
    return ideas


class Watcher(threading.Thread):
    """Counts the running jobs twice a second, and does harm to some of them."""

    def __init__(self, environment, rng):
        super().__init__(daemon=True)
        self.environment, self.rng = environment, rng
        self.counts = []
        self.harm = Counter()
        self.over = threading.Event()

    def ask(self, *command):
        return slurm.ask(self.environment, *command)

    def run(self):
        began = time.monotonic()
        while not self.over.wait(0.5):
            jobs = self.ask("squeue", "--noheader", "--states=RUNNING", "--format=%i").split()
            self.counts.append(len(jobs))
            if len(jobs) == 4 and time.monotonic() - began > 20 and self.rng.random() < 0.04:
                self.do_harm(self.rng.choice(jobs))

    def do_harm(self, job):
        kind = self.rng.choice(["cancel", "requeue", "kill"])
        if kind == "cancel":
            self.ask("scancel", job)
        if kind == "requeue":
            self.ask("scontrol", "requeue", job)
            self.ask("scontrol", "update", f"jobid={job}", "StartTime=now")  # Slurm waits two minutes by itself
        if kind == "kill":
            self.ask("scancel", "--signal=KILL", "--full", job)
        self.harm[kind] += 1

    def busy(self):
        """Share of the four slots that worked, from the first moment at which all did to the last one."""
        first = self.counts.index(4)
        last = len(self.counts) - self.counts[::-1].index(4)
        counts = self.counts[first:last]
        return sum(counts) / len(counts) / 4


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    if not slurm.installed():
        pytest.skip("no Slurm here: as root, apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path has 107 characters at most
    environment = slurm.start(folder)
    tools = tmp_path / "bin"
    tools.mkdir()
    write_uv(tools)
    monkeypatch.setenv("SLURM_CONF", environment["SLURM_CONF"])
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("UV_PROJECT_ENVIRONMENT", sys.prefix)
    monkeypatch.setenv("TIME_BUDGET", "1")
    yield environment
    subprocess.run(["scancel", "--user=root"])
    slurm.stop(folder)
    shutil.rmtree(folder, ignore_errors=True)


def start_agent(folder, ideas, branch):
    path = folder.parent / f"{branch}.json"
    path.write_text(json.dumps(ideas))
    script = Path(__file__).parent / "fleet_night.py"
    log = open(folder.parent / f"{branch}.log", "w")
    return subprocess.Popen([sys.executable, str(script), str(folder), str(path), branch], stdout=log, stderr=log)


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_a_night_of_two_agents_on_four_slots(cluster, tmp_path):
    rng = random.Random(1)
    project = fleet_stage.make(tmp_path / "project", seconds=SECONDS, ideas=24)
    git(project, "checkout", "-q", "main")
    git(project, "branch", "-q", "-D", "autoresearch/nov21")
    other = tmp_path / "other"
    git(project, "worktree", "add", "-q", "--detach", str(other), "main")
    ideas = {"one": plan(rng, 26, 0, "wider"), "two": plan(rng, 14, 12, "deeper")}
    ideas["one"][3]["environment"] = "TMPDIR=/dev/full "  # a slot with a full disk
    ideas["two"] += ideas["one"][10:16]  # that both think of
    watcher = Watcher(cluster, rng)
    watcher.start()
    began = time.monotonic()
    agents = {"one": start_agent(project, ideas["one"], "one")}
    time.sleep(2)
    agents["two"] = start_agent(other, ideas["two"], "two")
    for branch, agent in agents.items():
        assert agent.wait() == 0, (tmp_path / f"{branch}.log").read_text()[-3000:]
    watcher.over.set()
    watcher.join()
    folders = {"one": project, "two": other}
    runs = records(project)
    check_every_run_is_logged_once(folders, runs)
    for branch, folder in folders.items():
        check_branch(folder, branch)
    tried = Counter(
        subject for folder in folders.values() for subject in git(folder, "log", "--all", "--format=%s").splitlines()
    )
    names = {idea["name"] for plan in ideas.values() for idea in plan}
    assert len(names) == 40
    assert names <= set(tried)
    left = [name for name in os.listdir(os.environ["TMPDIR"]) if name.startswith("autoresearch-slot")]
    assert left == []
    assert subprocess.run(["squeue", "--noheader"], capture_output=True, text=True).stdout == ""
    words = {branch: Counter(row[3] for row in rows(folder)) for branch, folder in folders.items()}
    print(f"\n{len(names)} ideas, {len(runs)} records, {dict(watcher.harm)}, {time.monotonic() - began:.0f} s, {words}")
    print(f"slots busy {watcher.busy():.1%}")
    assert sum(watcher.harm.values()) >= 3
    assert watcher.busy() >= 0.8  # the bar is 0.9 with runs of 300 s; here a run takes 6 s, and a job a second to start


def check_every_run_is_logged_once(folders, runs):
    logged = Counter((row[0], row[1]) for folder in folders.values() for row in rows(folder) if row[1] != "nan")
    scored = Counter({(run["commit"][:7], f"{run['score']:.6f}") for run in runs if run["score"] is not None})
    baseline = git(folders["one"], "rev-parse", "--short=7", "main")
    for key in scored:
        assert logged[key] == (2 if key[0] == baseline else 1), key  # both agents start from it
    assert set(logged) == set(scored)


def check_branch(folder, branch):
    """The branch holds exactly the kept commits; dropped ones are under a ref; nothing is out or changed."""
    last = {row[0]: row[3] for row in rows(folder)}
    kept = {commit for commit, word in last.items() if word == "keep"}
    assert set(git(folder, "log", "--format=%h", "--abbrev=7", f"autoresearch/{branch}").split()) == kept
    refs = git(folder, "for-each-ref", "--format=%(refname:lstrip=2)", "refs/autoresearch").split()
    assert {commit for commit, word in last.items() if word != "keep"} <= set(refs)
    assert not [ref for ref in refs if ref.startswith("out/")]
    assert git(folder, "status", "--porcelain") == ""
