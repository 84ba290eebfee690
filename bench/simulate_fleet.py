"""Nights of 8 hours with many slots and known truths, by the rule of referee/verdict.py and the order of referee/night.py.

    uv run bench/simulate_fleet.py [--nights 100]

A run takes 390 s. One agent serves all slots: 20 s of thought for an idea, 3 s for a command that `next:` names. `single`
brings wins on an old base onto the newest one by one, `together` (the shipped order) all that wait as one trial. Ideas are
those of simulate_nights.py; `company`: on a base that has moved on, a gain is 30 % smaller than it was.
"""

import argparse
import heapq
import random
from dataclasses import dataclass, field

from simulate_nights import MIXTURES, Commit, level, noise

from referee import verdict

RUN = 390.0  # seconds of a run
THOUGHT = 20.0  # seconds of the agent for an idea
COMMAND = 3.0  # and for a command
HOURS = 8
WAITING = 2  # jobs in the queue while every slot works


@dataclass(eq=False)
class Trial(Commit):
    """A commit that is out. change: what it does where it was cut from; parts: the wins that it brings together."""

    base: Commit | None = None
    change: float = 0.0
    parts: list = field(default_factory=list)


@dataclass
class Fleet:
    rng: random.Random
    draw: object
    slots: list  # when each is free
    company: float  # what is left of a gain on a base that has moved on
    now: float = 0.0
    busy: float = 0.0
    sent: int = 0
    out: list = field(default_factory=list)  # heap of (end, number, Trial)
    starts: list = field(default_factory=list)
    kept: list = field(default_factory=list)
    waiting: list = field(default_factory=list)  # wins on an old base
    alone: list = field(default_factory=list)  # wins whose sum did not gain
    keeps: int = 0
    nulls: int = 0

    @property
    def tip(self):
        return self.kept[-1]

    def submit(self, trial):
        """Sends a trial into the slot that is free first."""
        start = max(heapq.heappop(self.slots), self.now)
        heapq.heappush(self.slots, start + RUN)
        self.busy += max(0.0, min(start + RUN, HOURS * 3600) - start)
        self.starts.append(start)
        self.sent += 1
        heapq.heappush(self.out, (start + RUN, self.sent, trial))

    def queued(self):
        self.starts = [start for start in self.starts if start > self.now]
        return len(self.starts)

    def sd(self):
        return noise([commit for commit in self.kept if len(commit.scores) > 1])[0]

    def gains(self, trial):
        below = level(trial.base, self.sd(), self.kept[0])
        return below - trial.mean > verdict.KEEP_IN_SLOTS * self.sd() / len(trial.scores) ** 0.5

    def keep(self, trial):
        self.keeps += 1
        self.nulls += trial.change >= 0
        self.kept.append(trial)

    def moved(self, trial):
        """The change of a win on the newest base."""
        return trial.change * self.company if trial.change < 0 else trial.change

    def bring(self, wins):
        """Wins on the newest base, as one trial."""
        change = sum(self.moved(win) for win in wins)
        self.submit(Trial(self.tip.truth + change, base=self.tip, change=change, parts=wins))


def together(fleet):
    """All wins that wait go onto the newest base as one trial, one such trial at a time; where it does not gain, one by
    one."""
    if any(len(trial.parts) > 0 for _, _, trial in fleet.out):
        return False
    wins = fleet.waiting or fleet.alone[:1]
    fleet.waiting = []
    fleet.alone = [win for win in fleet.alone if win not in wins]
    if wins:
        fleet.bring(wins)
    return bool(wins)


def single(fleet):
    """Every win goes onto the newest base by itself."""
    if not fleet.waiting:
        return False
    fleet.bring([fleet.waiting.pop(0)])
    return True


def night(rng, draw, slots, company, order):
    """The Fleet at the end of a simulated night."""
    fleet = Fleet(rng, draw, [0.0] * slots, company)
    baseline = Trial(0.0)
    for _ in range(verdict.BASELINE_RUNS):
        baseline.run(rng)
    fleet.kept.append(baseline)
    experiments = 0
    while fleet.now < HOURS * 3600:
        if fleet.out and fleet.out[0][0] <= fleet.now:
            fleet.now += COMMAND
            trial = heapq.heappop(fleet.out)[2]
            trial.run(rng)
            if trial in fleet.kept:
                continue  # a control
            experiments += 1
            if not fleet.gains(trial):
                fleet.alone += trial.parts if len(trial.parts) > 1 else []
            elif trial.base is fleet.tip:
                fleet.keep(trial)
            else:
                fleet.waiting.append(trial)
        elif order(fleet):
            fleet.now += COMMAND
        elif experiments >= verdict.CONTROL_EVERY:
            experiments -= verdict.CONTROL_EVERY
            fleet.now += COMMAND
            fleet.submit(fleet.tip)
        elif fleet.queued() < WAITING:
            fleet.now += THOUGHT
            change = draw(rng)
            fleet.submit(Trial(fleet.tip.truth + change, base=fleet.tip, change=change))
        else:
            fleet.now = min([fleet.out[0][0], *fleet.starts])
    return fleet


def simulate(draw, slots, company, order, count):
    """(mean true progress in sd, share of the slots busy, share of keeps that change nothing or harm)"""
    rng = random.Random(1)
    nights = [night(rng, draw, slots, company, order) for _ in range(count)]
    progress = -sum(each.tip.truth for each in nights) / count
    busy = sum(each.busy for each in nights) / (count * slots * HOURS * 3600)
    return progress, busy, sum(each.nulls for each in nights) / max(1, sum(each.keeps for each in nights))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nights", type=int, default=100, metavar="N", help="nights of each kind (100)")
    count = parser.parse_args().nights
    print(f"{'8 hours, noise sd 1':<42}{'1 slot':>16}{'16, single':>20}{'16, together':>20}  together/single, /1 slot")
    for mixture, draw in MIXTURES.items():
        for company, name in ((1.0, ""), (0.7, ", company")):
            cells = [
                simulate(draw, slots, company, order, count)
                for slots, order in ((1, together), (16, single), (16, together))
            ]
            text = "".join(f"{p:11.1f} {100 * busy:3.0f} {100 * null:3.0f} %" for p, busy, null in cells)
            ratios = f"{cells[2][0] / cells[1][0]:.2f}, {cells[2][0] / cells[0][0]:.1f}"
            print(f"{mixture + name:<42}{text}   {ratios}")


if __name__ == "__main__":
    main()
