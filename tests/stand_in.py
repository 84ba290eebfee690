"""A prepare.py without torch, copied into a project of a test: runs end at once, behind the real referee.

A train.py there says what its run does:  prepare.pretend({42: 1.0, 43: 1.01}, "score", steps=10)
"""

import os
import random
import sys
import time

import referee

__all__ = ["gains", "pretend"]


class gains:
    """Scores of a model to which ideas add up, by seed: 1 less each gain, with noise of sd 0.001 that belongs to the
    seed and to the gains."""

    def __init__(self, *values):
        self.values = values

    def __getitem__(self, seed):
        return round(1.0 - sum(self.values) + random.Random(f"{seed} {self.values}").gauss(0.0, 0.001), 6)


def fail(does):
    """Raises what a real run raises."""
    if does == "oom":
        raise MemoryError("CUDA out of memory. Tried to allocate")
    if does == "nan":
        raise FloatingPointError("the loss was nan at step 3")
    if does == "error":
        raise ValueError("no")
    if does == "harness":
        raise referee.RefereeError("the model sees the future; correct train.py")
    if does == "hang":
        time.sleep(60)
    if does == "exit":
        sys.exit(0)


def pretend(scores, does="score", steps=10, seconds=0.0, memory=None, grace=2):
    """scores: val_bpb by seed. steps: that the clock is told of. seconds: that the run really takes."""

    def body():
        print(f"cpu tier: a stand-in, seed {referee.SEED}; warming up\n" + "a lot of noise\n" * 200, flush=True)
        time.sleep(seconds)
        fail(does)
        clock = referee.clock
        clock.start(now=0.0)
        for step in range(1, steps + 1):
            clock.tick(now=step * clock.budget / steps)
        clock.stop(now=float(clock.budget))
        referee.this_run.score = scores[referee.SEED]
        if "PRETEND_DOUBT" in os.environ:
            referee.doubt(os.environ["PRETEND_DOUBT"])
        lines = {"val_bpb": f"{scores[referee.SEED]:.6f}", "peak_vram_mb": "n/a", "num_steps": f"{steps}"}
        harness = os.environ.get("PRETEND_HARNESS", "01234567")
        device = os.environ.get("PRETEND_DEVICE", "cpu (a stand-in)")
        lines |= {"seed": f"{referee.SEED}", "harness": harness}
        referee.finish(lines, {"harness": harness, "device": device, "memory_mb": memory})

    referee.guard(body, lambda: os.environ.get("CUDA_VISIBLE_DEVICES", "cpu"), referee.TIME_BUDGET + grace)
