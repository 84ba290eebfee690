"""Nights of 8 hours with 1, 4 and 16 slots, simulated with the referee's own judge().

uv run pytest tests/test_fleet_nights.py -m bench -s     # the whole table, some minutes

A run takes 390 s. One agent serves all slots: 20 s of thought for an idea, 3 s for a command that `next:` names; in waves the
ideas are thought of while the slots work. Ideas are drawn as in public nights (tests/test_verdict.py), in units of the noise.
Gains overlap: with every keep that an idea was not cut from, its gain is with a chance of 0.3 only half of what it was.
"""

import heapq
import random
from dataclasses import dataclass, field

import pytest
from test_verdict import public, run

from referee import ENOUGH, judge

RUN = 390.0  # seconds of a run
THOUGHT = 20.0  # seconds of the agent for an idea
COMMAND = 3.0  # and for a command
HOURS = 8
WAITING = 2  # jobs in the queue


@dataclass
class Idea:
    """A commit: what it was cut from, what it does to the score there, and which seeds have been sent out."""

    commit: str
    bases: tuple
    change: float
    truth: float
    null: bool
    seeds: int = 0
    returned: int = 0


@dataclass
class Night:
    """The state of a simulated night. Times are seconds."""

    rng: random.Random
    slots: list  # when each is free
    now: float = 0.0
    worked: float = 0.0
    records: list = field(default_factory=list)
    kept: list = field(default_factory=list)  # Ideas, the branch
    done: list = field(default_factory=list)  # heap of (end, number, Idea, seed)
    starts: list = field(default_factory=list)  # of runs that have been sent out
    count: int = 0
    sent: int = 0
    keeps: int = 0
    false: int = 0

    @property
    def end(self):
        return HOURS * 3600.0

    def draw(self):
        change = public(self.rng)
        return self.idea(change, change == 0)

    def idea(self, change, null):
        """An Idea cut from the branch as it stands."""
        self.count += 1
        bases = tuple(each.commit for each in self.kept)
        truth = self.kept[-1].truth if self.kept else 0.0
        return Idea(f"{self.count:07x}", bases, change, truth + change, null)

    def submit(self, idea):
        """Sends an idea's next seed into the slot that is free first."""
        start = max(heapq.heappop(self.slots), self.now)
        heapq.heappush(self.slots, start + RUN)
        self.worked += max(0.0, min(start + RUN, self.end) - start)
        self.starts.append(start)
        self.sent += 1
        heapq.heappush(self.done, (start + RUN, self.sent, idea, 42 + idea.seeds))
        idea.seeds += 1

    def submit_up_to(self, idea, seeds):
        """Sends an idea out until so many of its seeds are out or done."""
        while idea.seeds < seeds:
            self.submit(idea)

    def waiting(self):
        self.starts = [start for start in self.starts if start > self.now]
        return len(self.starts)

    def verdict(self, idea, seed):
        self.records.append(run(idea.commit, seed, 100 + idea.truth + self.rng.gauss(0.0, 1.0)))
        return judge(self.records, dict.fromkeys(idea.bases, "keep")).word

    def change_on_the_newest(self, idea):
        """What an idea does on the newest base: a gain may overlap with the keeps that came in between."""
        change = idea.change
        for _ in self.kept[len(idea.bases) :]:
            change *= 0.5 if self.rng.random() < 0.3 and change < 0 else 1.0
        return change

    def keep(self, idea):
        """Puts an idea on the branch."""
        idea.change = self.change_on_the_newest(idea)
        idea.truth = self.kept[-1].truth + idea.change
        self.keeps += 1
        self.false += idea.change >= 0
        self.kept.append(idea)

    def rebased(self, idea):
        """The same idea on the newest base."""
        return self.idea(self.change_on_the_newest(idea), idea.null)


def start(rng, slots):
    """A night whose baseline has run with three seeds and is kept."""
    night = Night(rng, [0.0] * slots)
    baseline = night.idea(0.0, True)
    for seed in (42, 43, 44):
        night.verdict(baseline, seed)
    night.kept.append(baseline)
    return night


def asynchronous(rng, slots, rebase, together=True):
    """Ideas are sent out whenever fewer than two jobs wait. A win on an old base is run again on the newest one, or, without
    rebase, kept as it is."""
    night = start(rng, slots)
    while night.now < night.end:
        if night.done and night.done[0][0] <= night.now:
            night.now += COMMAND
            _, _, idea, seed = heapq.heappop(night.done)
            word = night.verdict(idea, seed)
            idea.returned += 1
            if idea.returned < idea.seeds:
                continue  # more of its runs are out
            if word == "rerun":
                night.submit_up_to(idea, max(ENOUGH if together else 0, idea.returned + 1))
            elif word == "keep" and rebase and len(idea.bases) < len(night.kept):
                night.submit_up_to(night.rebased(idea), ENOUGH if together else 1)
            elif word == "keep":
                night.keep(idea)
        elif night.waiting() < WAITING:
            night.now += THOUGHT
            night.submit(night.draw())
        else:
            night.now = min([night.done[0][0], *night.starts])
    return night


def in_waves(rng, slots):
    """All slots start together and are waited for; of the wave's wins the best is kept, the others run again on it."""
    night = start(rng, slots)
    again = []
    while night.now < night.end:
        wave = again[:slots]
        again = again[slots:]
        while len(wave) < slots:
            wave.append(night.draw())
        for idea in wave:
            night.now += COMMAND
            night.submit(idea)
        wins = []
        while night.done:
            end, _, idea, seed = heapq.heappop(night.done)
            night.now = max(night.now, end)
            word = night.verdict(idea, seed)
            if word == "rerun":
                again.append(idea)
            if word == "keep":
                wins.append(idea)
        if wins:
            best = min(wins, key=lambda idea: mean_score(night, idea))
            moved = len(best.bases) < len(night.kept)
            again += [night.rebased(best)] if moved else []
            if not moved:
                night.keep(best)
            again += [night.rebased(idea) for idea in wins if idea is not best]
    return night


def mean_score(night, idea):
    scores = [record["score"] for record in night.records if record["commit"] == idea.commit]
    return sum(scores) / len(scores)


POLICIES = {
    "waves": in_waves,
    "asynchronous, rebase": lambda rng, slots: asynchronous(rng, slots, rebase=True),
    "asynchronous, seed by seed": lambda rng, slots: asynchronous(rng, slots, rebase=True, together=False),
    "asynchronous, keep both": lambda rng, slots: asynchronous(rng, slots, rebase=False),
}


def table(count):
    """{(policy, slots): (experiments an hour, busy, gain in sd, keeps, share of keeps that are false)}, printed."""
    found = {}
    print(f"\n{'policy':<27} slots  runs/h   busy   gain  keeps  false")
    for slots in (1, 4, 16):
        for name, policy in POLICIES.items():
            rng = random.Random(slots)
            nights = [policy(rng, slots) for _ in range(count)]
            busy = sum(night.worked for night in nights) / (count * slots * HOURS * 3600)
            gain = -sum(night.kept[-1].truth for night in nights) / count
            keeps = sum(night.keeps for night in nights)
            false = sum(night.false for night in nights) / max(1, keeps)
            runs = sum(len(night.records) for night in nights) / count / HOURS
            found[name, slots] = runs, busy, gain, keeps / count, false
            print(f"{name:<27} {slots:>5} {runs:7.1f} {busy:6.1%} {gain:6.1f} {keeps / count:6.1f} {false:6.1%}")
    return found


def check(found):
    one, many = found["asynchronous, rebase", 1], found["asynchronous, rebase", 16]
    assert many[1] >= 0.95
    assert many[2] >= 3 * one[2]
    assert many[4] <= 0.10
    assert found["waves", 16][1] < many[1]
    assert found["waves", 16][2] < many[2]


def test_a_few_nights():
    check(table(12))


@pytest.mark.bench
@pytest.mark.timeout(1800)
def test_many_nights():
    check(table(40))
