"""Runs a train.py without paying for the import of torch: forked from a server that has it, between the two halves of the
real supervisor."""

import contextlib
import io
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

from referee import supervisor
from referee.base import read_repository
from referee.book import read_book
from referee.experiment import Experiment
from referee.run import RECORD

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["torch", "tiktoken"])


def child(script, folder, env, log):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv = [script]
    for name in [name for name in sys.modules if name.split(".")[0] in ("referee", "prepare", "train")]:
        del sys.modules[name]
    runpy.run_path(script, run_name="__main__")


def run_script(script, folder, env, log):
    """Exit status of the script as a run; its output goes to log, and what the supervisor says behind it."""
    experiment = Experiment(Path(folder), script)
    repository = read_repository(Path(folder))
    book = read_book(experiment.results)
    record = supervisor.new_record(experiment, repository, book, int(env.get("SEED", "42")))
    path = supervisor.begin_record(experiment, repository, record)
    process = forkserver.Process(target=child, args=(script, folder, {**env, RECORD: str(path)}, log))
    process.start()
    process.join(100)
    assert process.exitcode is not None, "still running after 100 s"
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = supervisor.conclude(path, record, process.exitcode, None, book, repository)
    with open(log, "a") as file:
        file.write(said.getvalue())
    return status
