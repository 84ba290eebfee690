"""Runs a script as a process of its own without paying for the import of torch: forked from a server that has it."""

import multiprocessing
import os
import runpy
import sys

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
    for name in ("referee", "prepare", "train"):
        sys.modules.pop(name, None)
    runpy.run_path(script, run_name="__main__")


def run_script(script, folder, env, log):
    """Exit status of the script as a process; its output goes to log."""
    process = forkserver.Process(target=child, args=(script, folder, env, log))
    process.start()
    process.join(100)
    assert process.exitcode is not None, "still running after 100 s"
    return process.exitcode
