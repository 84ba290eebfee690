"""A prepare.py without torch, copied into a project of a test: runs end at once, behind the real referee.

A train.py there says what its run does:  prepare.pretend(1.0, "lost score")  is killed when it first runs, and scores then.
"""

import os
import random
import signal
import tempfile
import time
from pathlib import Path

from referee import run
from referee.base import RefereeError, hash_text

__all__ = ["pretend"]
NOISE = 0.001  # sd of a score


def attempt(key):
    """How often this commit was run with this seed before."""
    path = Path(tempfile.gettempdir()) / f"attempts-{hash_text(key)[:16]}"
    with open(path, "a") as file:
        file.write("x")
    return path.stat().st_size - 1


RAISED = {
    "oom": MemoryError("CUDA out of memory. Tried to allocate"),
    "nan": FloatingPointError("the loss was nan at step 3"),
    "error": ValueError("no"),
    "harness": RefereeError("the model sees the future; correct train.py"),
    "busy": RefereeError("process 1 is using cpu; wait for it or end it, then run again", "busy"),
    "exit": SystemExit(0),
}
SIGNALS = {"lost": signal.SIGKILL, "preempted": signal.SIGTERM, "segfault": signal.SIGSEGV}


def end(does):
    """Ends as a real run does that has no score."""
    if does in RAISED:
        raise RAISED[does]
    if does in SIGNALS:
        os.kill(os.getpid(), SIGNALS[does])
    if does == "timeout":
        time.sleep(60)


def pretend(mean, does="score", steps=10, seconds=0.0, memory=None, score=None):
    """mean: of the score over seeds. does: what each attempt does, the last one from then on; besides the ends above and
    `score`, `doubt` and `slowed`. seconds: that the run really takes. score: in the place of mean and noise."""

    def body():
        state = run.this_run
        print(f"cpu tier: a stand-in, seed {run.SEED}; warming up\n" + "a lot of noise\n" * 200, flush=True)
        time.sleep(seconds)
        deeds = does.split()
        deed = deeds[min(attempt(f"{state.record.commit} {run.SEED}"), len(deeds) - 1)]
        end(deed)
        clock = state.clock
        clock.start(now=0.0)
        for step in range(1, steps + 1):
            clock.tick(now=step * clock.budget / steps)
        clock.stop(now=float(clock.budget))
        state.score = mean + random.Random(f"{run.SEED} {mean}").gauss(0.0, NOISE) if score is None else score
        if deed == "doubt":
            run.doubt("a doubt of this test")
        if deed == "slowed":
            clock.used_by_others = lambda: 0.5
        harness = os.environ.get("PRETEND_HARNESS", "01234567")
        device = os.environ.get("PRETEND_DEVICE", "cpu (a stand-in)")
        lines = {"val_bpb": f"{state.score:.6f}", "peak_vram_mb": "n/a", "num_steps": f"{steps}", "harness": harness}
        run.finish(lines, {"harness": harness, "device": device}, {"memory_mb": memory})

    run.guard(body, lambda: os.environ.get("CUDA_VISIBLE_DEVICES", "cpu"))
