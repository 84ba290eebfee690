"""The training budget in seconds, and who else used this run's cores meanwhile."""

import os
import resource
import time
from pathlib import Path

from referee.base import usable_cores

LATE = 0.02  # share of the budget by which a run may end late, whatever its steps take
SHORT = 2.0  # seconds of all cores below which their ticks of 10 ms say too little
LONG_STEP = 0.05  # share of the budget up to which the longest step excuses a late end


class Clock:
    """Starts with the first training batch, stops with the first evaluation, never pauses. `now` is an argument so that
    tests can feed it ticks."""

    def __init__(self, budget):
        self.budget = budget
        self.started = None
        self.stopped = None
        self.last = 0.0  # seconds at the last tick
        self.steps = []  # seconds that each step took
        self.cores = None  # Cores, from start to stop

    def start(self, now=None):
        """Only the first call counts."""
        if self.started is not None:
            return
        if now is None:
            self.cores = Cores()
        self.started = time.monotonic() if now is None else now

    def stop(self, now=None):
        """Ends the budget; only the first call counts."""
        if self.stopped is not None:
            return
        self.stopped = time.monotonic() if now is None else now
        if self.cores is not None:
            self.cores.stop()

    def elapsed(self, now=None):
        """Seconds of training so far; 0 before the first batch."""
        if self.started is None:
            return 0.0
        if self.stopped is not None:
            return self.stopped - self.started
        return (time.monotonic() if now is None else now) - self.started

    def tick(self, now=None):
        """To be called at the end of every step; returns elapsed()."""
        elapsed = self.elapsed(now)
        self.steps.append(elapsed - self.last)
        self.last = elapsed
        return elapsed

    def overrun(self):
        """Seconds beyond the budget where that is more than a step or a small share of the budget excuses, else 0. The
        step in which the budget ended is not known to be honest: the longest one before it counts."""
        over = self.elapsed() - self.budget
        ends = 0.0
        longest = 0.0
        for step in self.steps:
            ends += step
            if ends <= self.budget:
                longest = max(longest, step)
        excused = max(min(longest, LONG_STEP * self.budget), LATE * self.budget)
        return over if over > excused else 0.0

    def used_by_others(self):
        """Share of this run's cores that other processes used during the budget; None where that cannot be known."""
        return None if self.cores is None else self.cores.share


class Cores:
    """What is used of this process's cores from now on, by itself and by others, as Linux counts it in /proc/stat."""

    def __init__(self):
        self.share = None
        self.began = time.monotonic()
        self.busy = busy_seconds()
        self.own = own_seconds()

    def stop(self):
        busy = busy_seconds()
        seconds = (time.monotonic() - self.began) * len(usable_cores())
        if busy is None or self.busy is None or seconds < SHORT:
            return
        others = (busy - self.busy) - (own_seconds() - self.own)
        if others >= -0.05 * seconds:  # else the kernel's figures are not of these cores
            self.share = max(0.0, others) / seconds


def busy_seconds():
    """Seconds that the cores of this process have been busy since boot, None where the kernel does not say."""
    names = {f"cpu{core}" for core in usable_cores()}
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        rows = [list(map(int, line[1:8])) for line in lines if line and line[0] in names]
    except (OSError, ValueError):
        return None
    if len(rows) < len(names):
        return None
    idle = 3, 4  # idle, waiting for a disk
    ticks = sum(count for row in rows for column, count in enumerate(row) if column not in idle)
    return ticks / os.sysconf("SC_CLK_TCK")


def own_seconds():
    """CPU seconds of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
