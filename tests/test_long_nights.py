"""Long nights of an agent that obeys program.md: killed again and again, alone; two agents on a real Slurm whose jobs are
killed, requeued and lost.

    uv run pytest -m slow -s      # a hundred ideas, ninety kills
    uv run pytest -m slurm -s     # needs slurm-wlm and munge, as root
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import slurm
from stage import Stage, train_text

AGENT = str(Path(__file__).parent / "agent.py")


def plan_of(rng, count, name, first_line=0, gain=0.012):
    """Ideas of which one in five gains, one in five crashes, half of them for good."""
    ideas = []
    for number in range(count):
        draw = rng.random()
        idea = {"name": f"{name} {number}", "line": first_line + number % 9, "does": ["score"]}
        idea["gain"] = round(gain + 0.001 * number if draw < 0.2 else rng.gauss(-0.004, 0.004), 6)
        if 0.2 <= draw < 0.4:
            idea["does"] = [rng.choice(["oom", "nan", "error"])] + ["score"] * (draw < 0.3)
        ideas.append(idea)
    return ideas


def start_agent(night, plan, log):
    path = night.folder.parent / f"{night.folder.name}.plan"
    path.write_text(json.dumps(plan))
    command = [sys.executable, AGENT, str(night.folder), str(path)]
    return subprocess.Popen(
        command,
        env={**night.environment, **night.more},
        stdout=open(log, "w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def check_the_morning(night, plan, beside=()):
    """Every run has its row, the branch holds what is kept, what was dropped is reachable, nothing else changed. beside:
    nights that share the runs."""
    rows = night.rows
    every = [row for each in (night, *beside) for row in each.rows]
    last = {row[0]: row[3] for row in rows}
    scored = [run for run in night.records if run["score"] is not None]
    assert {(run["commit"][:7], f"{run['score']:.6f}") for run in scored} <= {(row[0], row[1]) for row in every}
    assert len({(row[0], row[1]) for row in rows if row[1] != "nan"}) == len([row for row in rows if row[1] != "nan"])
    assert all((row[1] == "nan") == (row[3] == "crash") for row in rows)
    branch = night.git("log", "--format=%h", "--abbrev=7").split()
    kept = {commit for commit, word in last.items() if word == "keep"}
    assert set(branch) <= kept
    dropped = {commit for commit, word in last.items() if word != "keep"}
    refs = set(night.git("for-each-ref", "--format=%(refname:lstrip=2)", "refs/autoresearch").split())
    assert dropped <= refs
    assert night.git("status", "--porcelain") == ""
    assert night.git("diff", "--name-only", "main", "HEAD") in ("train.py", "")
    subjects = night.git("log", "--all", "--format=%s").splitlines()
    assert {idea["name"] for idea in plan} <= set(subjects)
    return Counter(last.values())


def test_a_night_of_a_dozen_ideas(alone):
    plan = plan_of(random.Random(3), 12, "idea")
    log = alone.folder.parent / "agent.log"
    assert start_agent(alone, plan, log).wait() == 0, log.read_text()
    words = check_the_morning(alone, plan)
    assert words["keep"] >= 2
    assert 5 <= int(log.read_text()) <= 20


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_hundred_ideas_killed_at_random_moments(tmp_path):
    """kill -9 to the agent, its shell and often the run as well, every second or so; then a new agent reads the files."""
    night = Stage(tmp_path)
    rng = random.Random(5)
    plan = plan_of(random.Random(4), 100, "idea", gain=0.002)
    kills = 0
    with_the_run = 0
    began = time.monotonic()
    while True:
        log = tmp_path / "agent.log"
        agent = start_agent(night, plan, log)
        try:
            assert agent.wait(rng.uniform(0.3, 2.5) if kills < 90 else 1200) == 0, log.read_text()
            break
        except subprocess.TimeoutExpired:
            kills += 1
            if rng.random() < 0.6 and night.records:
                with_the_run += 1
                kill(night.records[-1]["pid"])
            os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()
            (night.folder / ".git/index.lock").unlink(missing_ok=True)
    words = check_the_morning(night, plan)
    seconds = time.monotonic() - began
    print(
        f"\n100 ideas, {len(night.rows)} rows, {len(night.records)} records, {kills} kills, {with_the_run} with the run"
    )
    print(f"{seconds:.0f} s: {dict(words)}; at most {log.read_text().strip()} lines shown at once")
    assert kills >= 90


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass


# -- a real Slurm


class Watcher(threading.Thread):
    """Counts the running jobs twice a second, and does harm to some of them."""

    def __init__(self, environment, rng):
        super().__init__(daemon=True)
        self.environment = environment
        self.rng = rng
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
        self.harm[kind] += 1
        if kind == "cancel":
            self.ask("scancel", job)
        elif kind == "kill":
            self.ask("scancel", "--signal=KILL", "--full", job)
        else:
            self.ask("scontrol", "requeue", job)
            self.ask("scontrol", "update", f"jobid={job}", "StartTime=now")  # Slurm waits two minutes by itself

    def busy(self):
        """Share of the four slots that worked, from the first moment at which all did to the last one."""
        first = self.counts.index(4)
        last = len(self.counts) - self.counts[::-1].index(4)
        counts = self.counts[first:last]
        return sum(counts) / len(counts) / 4


@pytest.fixture
def cluster():
    if not slurm.installed():
        pytest.skip("no Slurm here: as root, apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path has 107 characters at most
    environment = slurm.start(folder)
    yield environment
    slurm.ask(environment, "scancel", "--user=root")
    slurm.stop(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_a_night_of_two_agents_on_four_slots(cluster, tmp_path):
    one = Stage(tmp_path, train_text(seconds=6.0))
    one.environment |= {"SLURM_CONF": cluster["SLURM_CONF"], "TIME_BUDGET": "20"}
    for _ in range(3):
        one.referee("submit")
    two = Stage.__new__(Stage)
    two.__dict__.update(one.__dict__)
    two.folder = tmp_path / "second"
    one.git("worktree", "add", "-q", str(two.folder), "-b", "autoresearch/second", "main")
    plans = {one: plan_of(random.Random(1), 26, "wider"), two: plan_of(random.Random(2), 14, "deeper", 9)}
    for idea in plans[two]:
        idea["line"] = 9
    plans[one][3]["environment"] = "TMPDIR=/dev/full "  # a slot with a full disk
    plans[two] += plans[one][10:16]  # that both think of
    watcher = Watcher(cluster, random.Random(1))
    watcher.start()
    began = time.monotonic()
    agents = {}
    for night, plan in plans.items():
        agents[night] = start_agent(night, plan, tmp_path / f"{night.folder.name}.log")
        time.sleep(2)
    for night, agent in agents.items():
        assert agent.wait() == 0, (tmp_path / f"{night.folder.name}.log").read_text()[-3000:]
    watcher.over.set()
    watcher.join()
    words = {night.folder.name: dict(check_the_morning(night, plan, plans)) for night, plan in plans.items()}
    left = [path for path in (tmp_path / "tmp").iterdir() if path.name.startswith("autoresearch-slot")]
    assert left == []
    assert slurm.ask(cluster, "squeue", "--noheader") == ""
    assert sum(len([row for row in night.rows if row[3] == "keep"]) for night in plans) > 8
    harm = dict(watcher.harm)
    print(f"\n46 ideas, {len(one.records)} records, {harm}, {time.monotonic() - began:.0f} s, {words}")
    print(f"slots busy {watcher.busy():.1%}")
