"""A Slurm of one node on this machine, with four GPUs that do not exist; needs slurm-wlm and munge, and root.

python tests/slurm.py FOLDER     # starts it and says how to use it; with --stop ends it
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
KillWait=5
JobRequeue=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=1000 Gres=gpu:h100:3,gpu:h200:1 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
GPUS = "".join(
    f"Name=gpu Type={kind} File=/dev/{file}\n"
    for kind, file in [("h100", "null"), ("h100", "zero"), ("h100", "full"), ("h200", "random")]
)


def installed():
    programs = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scontrol", "scancel")
    return os.geteuid() == 0 and all(shutil.which(program) for program in programs)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(folder):
    """Starts it in a folder; returns the environment its programs need."""
    folder = Path(folder)
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    places = [f"--{name}={folder}/munge.{end}" for name, end in (("key-file", "key"), ("socket", "socket"))]
    places += [f"--{name}={folder}/munge.{name}" for name in ("pid-file", "log-file", "seed-file")]
    subprocess.run(["munged", "--force", *places], check=True)
    host = socket.gethostname().split(".")[0]
    text = CONFIGURATION.format(host=host, folder=folder, port=free_port(), node_port=free_port())
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(GPUS)
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    for program, option in (("slurmctld", "-i"), ("slurmd", "-c")):
        subprocess.run([program, option, "-f", str(folder / "slurm.conf")], check=True)
    end = time.monotonic() + 30
    while "idle" not in ask(environment, "sinfo", "--noheader", "--format=%T"):
        assert time.monotonic() < end, (folder / "slurmctld.log").read_text()[-2000:]
        time.sleep(0.2)
    return environment


def ask(environment, *command):
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    return done.stdout


def stop(folder):
    for name in ("slurmd.pid", "slurmctld.pid", "munge.pid-file"):
        path = Path(folder) / name
        if path.is_file():
            subprocess.run(["kill", path.read_text().strip()], capture_output=True)


if __name__ == "__main__":
    if "--stop" in sys.argv:
        stop(sys.argv[1])
    else:
        for name, value in start(Path(sys.argv[1]).resolve()).items():
            print(f"export {name}={value}")
