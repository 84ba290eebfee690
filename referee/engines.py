"""Where a trial runs: this machine, Slurm, a SkyPilot cluster. fleet/slot.sh runs one commit with one seed on one device."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field

from referee.base import require

SLOT = "fleet/slot.sh"
QUEUED = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "CONFIGURING", "INIT", "SETTING_UP")


@dataclass(frozen=True)
class Queue:
    """jobs: {(commit, seed): "running", "queued" or "held"}. trouble: of an engine that does not answer."""

    jobs: dict = field(default_factory=dict)
    trouble: str = ""


def cluster():
    """Name of the SkyPilot cluster in use, None where there is none."""
    return os.environ.get("AUTORESEARCH_CLUSTER")


def read_queue():
    """What Slurm or the cluster of SkyPilot knows of runs of slot.sh."""
    if cluster():
        return ask(["sky", "queue", "--skip-finished", "--output", "json", cluster()], sky_lines)
    if shutil.which("squeue"):
        return ask(["squeue", "--noheader", "--me", "--format=%T/%r %o"], str.splitlines)
    return Queue()


def ask(question, lines_of):
    try:
        done = subprocess.run(question, capture_output=True, text=True, errors="replace", check=True)
        lines = lines_of(done.stdout)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return Queue(trouble=f"{question[0]} does not answer: {said[-1][:200] if said else 'no words'}")
    jobs = {}
    for line in lines:
        found = re.match(r"([^/]+)(.*) .*slot\.sh ([0-9a-f]{40,64}) (\d+)$", line.rstrip())
        if found:
            jobs[found[3], int(found[4])] = state_of_job(found[1], found[2])
    return Queue(jobs)


def state_of_job(state, reason):
    """running, queued, or held: one that waits for something else than a slot, as after a preemption."""
    if state.split()[0] not in QUEUED:
        return "running"
    return "held" if re.search("BeginTime|[Hh]eld", reason) else "queued"


def sky_lines(text):
    """Jobs of a SkyPilot cluster as lines `STATE slot.sh COMMIT SEED`; submit() calls a job COMMIT-SEED."""
    lines = []
    for jobs in json.loads(text[text.index("{") :]).values():  # a line of words stands before it
        for job in jobs:
            commit, _, seed = str(job.get("job_name")).partition("-")
            lines.append(f"{str(job.get('status')).rpartition('.')[2]} slot.sh {commit} {seed}")
    return lines


def bring_back(runs):
    """Copies records and logs that are newer on the SkyPilot cluster into runs/, through the ssh name that SkyPilot gives
    it; returns "" or what went wrong."""
    wanted = ["--include=/runs/", "--include=/runs/*.json", "--include=/runs/*.log", "--exclude=*"]
    places = [f"{cluster()}:sky_workdir/", f"{runs.parent}/"]
    command = ["rsync", "-rtuO", "--timeout=60", *wanted, *places]
    try:
        subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()
        said = "; ".join(line for line in said if not line.startswith("Warning: "))
        return f"records stay on {places[0]}runs, rsync says: {said[:200] or 'no words'}"
    return ""


def submit(folder, commit, seed, gpus):
    """Hands a run to the engine; returns what it said. gpus: the kind of device in the engine's words, as h200:1, None for
    any. Raises RefereeError where there is no engine or it refuses."""
    kind = ["--gpus", gpus] if gpus else []
    if cluster():
        names = ["--name", f"{commit}-{seed}", "--env", f"COMMIT={commit}", "--env", f"SEED={seed}"]
        names += ["--env", f"AUTORESEARCH_GPUS={gpus or ''}"]
        command = ["sky", "exec", "--detach-run", *kind, *names, cluster(), "fleet/sky.yaml"]
    else:
        command = ["sbatch", *kind, SLOT, commit, str(seed)]
    by_hand = f"CUDA_VISIBLE_DEVICES=0 {SLOT} {commit} {seed}"
    require(shutil.which(command[0]), f"there is no {command[0]} here; in a slot of your own run: {by_hand}")
    environment = {**os.environ, "AUTORESEARCH_GPUS": gpus or ""}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = (done.stdout.strip().splitlines() or ["nothing"])[-1]
    mend = "mend that, then run this again"
    if "configuration source" in said:
        mend = "export SLURM_CONF=<the slurm.conf of your cluster>, then run this again"
    require(done.returncode == 0, f"{command[0]} says: {said[:300]}; {mend}")
    return said
