"""A fleet on SkyPilot: fleet/sky.yaml as SkyPilot itself reads it, what its queue prints, and how records come back.

uv run pytest -m sky     # the part that needs SkyPilot: `sky` on PATH
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from stage import ROOT, write_program

from referee import engines

SKY = shutil.which("sky")


@pytest.mark.sky
@pytest.mark.skipif(SKY is None, reason="no SkyPilot here: pip install 'skypilot[slurm]'")
def test_skypilot_reads_the_file(tmp_path):
    folder = tmp_path / ".sky/catalogs/v8/common"  # two tables that SkyPilot would fetch
    folder.mkdir(parents=True)
    (folder / "accelerators.csv").write_text("AcceleratorName,Clouds\nH100,slurm\nH200,slurm\nA100-80GB,slurm\n")
    (folder / "metadata.csv").write_text("GPU,MemoryGB,Manufacturer\nH100,80,NVIDIA\n")
    code = "import sky; t = sky.Task.from_yaml('fleet/sky.yaml'); print(t.name, t.workdir, t.envs, len(t.resources))"
    environment = {**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    command = [str(Path(SKY).parent / "python"), "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["autoresearch . {'COMMIT': '', 'SEED': '42'} 3"], done.stdout + done.stderr


def test_the_queue_of_skypilot_begins_with_a_line_of_words():
    commit = "f" * 40
    queue = (
        f'Fetching job queue for: night\n{{"night": [{{"job_name": "{commit}-43", "status": "JobStatus.PENDING"}}]}}\n'
    )
    assert engines.sky_lines(queue) == [f"PENDING slot.sh {commit} 43"]
    assert engines.sky_lines('Fetching job queue for: night\n{\n  "night": []\n}\n') == []
    with pytest.raises(ValueError):
        engines.sky_lines("no such cluster\n")


@pytest.mark.skipif(shutil.which("rsync") is None, reason="no rsync here")
def test_records_come_back_where_they_are_newer(tmp_path, monkeypatch):
    far = tmp_path / "far/sky_workdir/runs"
    here = tmp_path / "here/runs"
    far.mkdir(parents=True)
    here.mkdir(parents=True)
    for name, text in {"a.json": "far", "b.json": "far", "b.json.part": "far", "x.log": "two lines"}.items():
        (far / name).write_text(text)
    (far.parent / "train.py").write_text("far")
    (here / "a.json").write_text("here")
    (here / "x.log").write_text("a line")
    os.utime(far / "a.json", (1, 1))  # older than what is here
    os.utime(here / "x.log", (1, 1))
    write_program(tmp_path / "ssh", f'cd {tmp_path}/far && shift && exec "$@"\n')
    monkeypatch.setenv("RSYNC_RSH", str(tmp_path / "ssh"))
    monkeypatch.setenv("AUTORESEARCH_CLUSTER", "night")
    assert engines.bring_back(here) == ""
    found = {str(path.relative_to(here.parent)): path.read_text() for path in here.parent.rglob("*") if path.is_file()}
    assert found == {"runs/a.json": "here", "runs/b.json": "far", "runs/x.log": "two lines"}
    shutil.rmtree(far)
    assert engines.bring_back(here) == ""  # nothing has run there yet
    shutil.rmtree(far.parent)
    assert engines.bring_back(here).startswith("records stay on night:sky_workdir/runs, rsync says: ")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "rsync" in engines.bring_back(here)
