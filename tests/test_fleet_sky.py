"""fleet/sky.yaml with the real SkyPilot: parsed by it, and in two slots of the one-node Slurm of tests/slurm.py.

uv run pytest -m sky -s     # sky, slurmctld, sshd, rsync on PATH, and root; fetches SkyPilot's own needs from PyPI
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fleet_stage
import pytest
import slurm
from stage import ROOT, git, records

SKY = shutil.which("sky")
SLURM_HOST = "Host test\n  HostName 127.0.0.1\n  Port {port}\n  User root\n  IdentityFile {folder}/user\n"
SSHD = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
PidFile {folder}/sshd.pid
StrictModes no
UsePAM no
PermitRootLogin yes
AuthorizedKeysFile .ssh/authorized_keys
MaxSessions 100
SetEnv SLURM_CONF={conf}
"""
pytestmark = [pytest.mark.sky, pytest.mark.skipif(SKY is None, reason="no SkyPilot here: pip install skypilot[slurm]")]


def python_of_sky():
    return str(Path(SKY).parent / "python")


def catalogs(home):
    """The two tables that SkyPilot would fetch."""
    folder = home / ".sky/catalogs/v8/common"
    folder.mkdir(parents=True)
    (folder / "accelerators.csv").write_text("AcceleratorName,Clouds\nH100,slurm\nH200,slurm\nA100-80GB,slurm\n")
    (folder / "metadata.csv").write_text("GPU,MemoryGB,Manufacturer\nH100,80,NVIDIA\nH200,141,NVIDIA\n")


def test_skypilot_reads_the_file(tmp_path):
    catalogs(tmp_path)
    code = "import sky; t = sky.Task.from_yaml('fleet/sky.yaml'); print(t.name, t.workdir, t.envs, len(t.resources))"
    environment = {**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    done = subprocess.run([python_of_sky(), "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["autoresearch . {'COMMIT': '', 'SEED': '42'} 3"], done.stdout + done.stderr


class Site:
    """Slurm, an sshd and SkyPilot, whose programs see root's home and curl as this folder has them."""

    def __init__(self, folder):
        self.folder, self.home, tools = folder, folder / "home", folder / "bin"
        for path in (self.home / ".ssh", self.home / ".slurm", tools):
            path.mkdir(parents=True)
        catalogs(self.home)
        self.holder = None
        self.path = f"{tools}:{Path(SKY).parent}:{os.environ['PATH']}"
        (self.home / ".bash_profile").write_text(f"export PATH={self.path}\n")
        uv = os.environ.get("UV") or shutil.which("uv")
        kept = [
            f"export {name}={os.environ[name]}\n" for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if name in os.environ
        ]
        change = f'for n in "${{!words[@]}}"; do [ "${{words[n]}}" = 3.10 ] && words[n]={python_of_sky()}; done\n'
        own_uv = folder / "uv"  # SkyPilot asks it for a Python 3.10
        fleet_stage.Engine.write(own_uv, f'{"".join(kept)}words=("$@")\n{change}exec {uv} "${{words[@]}}"\n')
        install = f'mkdir -p "$UV_INSTALL_DIR" && cp {own_uv} "$UV_INSTALL_DIR/uv"'
        fleet_stage.Engine.write(tools / "curl", f"echo '{install}'\n")
        runs = f'[ "$2" = prepare.py ] && exit 0\nshift\nexec {sys.executable} -B "$@"\n'
        fleet_stage.Engine.write(tools / "uv", f'[ "$1" = sync ] && exec ln -sfn {sys.prefix} .venv\n{runs}')

    def start(self):
        folder = self.folder
        lines = Path("/etc/passwd").read_text().splitlines()
        lines = [line.replace(":/root:", f":{self.home}:") if line.startswith("root:") else line for line in lines]
        (folder / "passwd").write_text("\n".join(lines) + "\n")
        mounts = f"mount --bind {folder}/passwd /etc/passwd && mount --bind {folder}/bin/curl {shutil.which('curl')}"
        command = ["unshare", "--mount", "sh", "-c", f"{mounts} && echo up && exec sleep infinity"]
        self.holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.holder.stdout.readline() == "up\n"
        out = self.call(sys.executable, str(ROOT / "tests/slurm.py"), f"{folder}/slurm")
        self.conf = out.strip().rpartition("=")[2]
        port = slurm.free_port()
        for key in ("host", "user"):
            self.call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{folder}/{key}")
        shutil.copy(folder / "user.pub", self.home / ".ssh/authorized_keys")
        (folder / "sshd").write_text(SSHD.format(port=port, folder=folder, conf=self.conf))
        (self.home / ".slurm/config").write_text(SLURM_HOST.format(port=port, folder=folder))
        Path("/run/sshd").mkdir(exist_ok=True)
        self.server = str(slurm.free_port())
        self.call(shutil.which("sshd"), "-f", f"{folder}/sshd", "-E", f"{folder}/sshd.log")

    def call(self, *words, cwd=None):
        """Runs a command inside; returns its output."""
        more = {"HOME": str(self.home), "PATH": self.path, "SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "TIME_BUDGET": "1"}
        if hasattr(self, "server"):
            more |= {"SLURM_CONF": self.conf, "SKYPILOT_API_SERVER_LOCAL_PORT": self.server}
            more |= {"AUTORESEARCH_CLUSTER": "night"}
        inside = ["nsenter", f"--mount=/proc/{self.holder.pid}/ns/mnt", f"--wd={cwd or self.folder}", *words]
        with open(self.folder / "out", "w+") as out:  # a file: servers that it leaves behind would hold a pipe open
            status = subprocess.run(inside, env={**os.environ, **more}, stdout=out, stderr=subprocess.STDOUT).returncode
            out.seek(0)
            text = out.read()
        assert status == 0, f"{words}: {text[-3000:]}"
        return text

    def stop(self):
        if self.holder is None:
            return
        for command in (["sky", "down", "-y", "night"], ["sky", "api", "stop"]):
            try:
                self.call(*command)
            except AssertionError as error:
                print(error)
        slurm.stop(self.folder / "slurm")
        if (self.folder / "sshd.pid").is_file():
            subprocess.run(["kill", (self.folder / "sshd.pid").read_text().strip()])
        self.holder.kill()
        self.holder.wait()


@pytest.fixture
def site():
    if not slurm.installed() or not all(map(shutil.which, ("sshd", "rsync", "unshare", "nsenter"))):
        pytest.skip("no Slurm or sshd here: as root, apt-get install slurm-wlm munge openssh-server rsync")
    site = Site(Path(tempfile.mkdtemp(prefix="sky-", dir="/tmp")))  # a socket's path has 107 characters at most
    try:
        site.start()
        yield site
    finally:
        site.stop()
        shutil.rmtree(site.folder, ignore_errors=True)


@pytest.mark.timeout(900)
def test_two_runs_at_once_come_back(site):
    project = fleet_stage.make(site.folder / "project", seconds=200.0)
    began = time.monotonic()
    options = ["-y", "--infra", "slurm/test", "--gpus", "H100:2", "-c", "night"]
    site.call("sky", "launch", *options, "fleet/sky.yaml", cwd=project)
    print(f"\nlaunch {time.monotonic() - began:.0f} s")
    referee = [sys.executable, "-B", "referee.py"]
    for seed in ("42", "43"):
        began = time.monotonic()
        said = site.call(*referee, "submit", "--seed", seed, "--gpus", "H100:1", cwd=project)
        print(f"submit {time.monotonic() - began:.0f} s")
        assert "Job submitted" in said or f"with seed {seed}: " in said
    out = site.call(*referee, "status", cwd=project)
    assert "out: 2 running, 0 queued" in out, out
    end = time.monotonic() + 400
    while len(records(project)) < 2 and time.monotonic() < end:
        time.sleep(5)
        out = site.call(*referee, "status", cwd=project)
    head = git(project, "rev-parse", "HEAD")
    assert {(run["commit"], run["seed"]) for run in records(project)} == {(head, 42), (head, 43)}, out
    assert (project / f"runs/{head}-42.log").is_file()
    out = site.call(*referee, "status", cwd=project)
    assert "out: 0 running" in out and "trouble" not in out and f"submit {head[:7]}" in out, out
