"""Nights with known truths: what the rule of referee/verdict.py makes of 100 runs, beside what people would use instead.

    uv run bench/simulate_nights.py [--nights 300]

A run's score has noise of sd 1. Three rules: `lower` keeps what is lower than the best so far (the public project's),
`seeds` asks for three to five seeds and a t-test (this project's before), `one` is the shipped one. Printed for each
mixture of ideas: true progress in sd, the share of keeps that change nothing or harm, and by how many sd the night claims
more than the truth.
"""

import argparse
import math
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from referee import verdict  # noqa: E402  (found by the line above)

RUNS = 100


def gain_of_2(share, rest):
    """Ideas of which a share is 2 sd better and the others change the score by `rest`."""
    return lambda rng: -2.0 if rng.random() < share else rest


def small_gains(rng):
    """A third is half an sd better, the others change nothing."""
    return -0.5 if rng.random() < 1 / 3 else 0.0


def public(rng):
    """45 % null, 40 % harmful, 15 % gains of 0.4 to 14 sd, most of them small."""
    kind = rng.random()
    if kind < 0.45:
        return 0.0
    if kind < 0.85:
        return rng.expovariate(1 / 5.7)
    return -math.exp(rng.uniform(math.log(0.43), math.log(14.3)))


MIXTURES = {
    "all 2 sd better": gain_of_2(1.0, 0.0),
    "1 in 5 is 2 sd better, rest null": gain_of_2(0.2, 0.0),
    "1 in 5 is 2 sd better, rest 1 sd worse": gain_of_2(0.2, 1.0),
    "1 in 3 is 0.5 sd better, rest null": small_gains,
    "as in public nights": public,
}


@dataclass(eq=False)
class Commit:
    truth: float
    scores: list = field(default_factory=list)

    def run(self, rng):
        self.scores.append(rng.gauss(self.truth, 1.0))

    @property
    def mean(self):
        return sum(self.scores) / len(self.scores)


@dataclass
class Night:
    """progress and claim: in sd, more is better."""

    rng: random.Random
    draw: object
    runs: int = 0
    keeps: int = 0
    nulls: int = 0
    kept: Commit = field(default_factory=lambda: Commit(0.0))

    def run(self, commit):
        self.runs += 1
        commit.run(self.rng)

    def idea(self):
        return Commit(self.kept.truth + self.draw(self.rng))

    def keep(self, commit):
        self.keeps += 1
        self.nulls += commit.truth >= self.kept.truth
        self.kept = commit


def noise(commits):
    """(sd, degrees of freedom), pooled over commits."""
    squares = sum((score - commit.mean) ** 2 for commit in commits for score in commit.scores)
    df = sum(len(commit.scores) - 1 for commit in commits)
    return math.sqrt(squares / max(df, 1)), df


def lower(night):
    """Keep if lower than the best score so far; claims the difference of the two scores."""
    night.run(night.kept)
    first = night.kept
    while night.runs < RUNS:
        idea = night.idea()
        night.run(idea)
        if idea.scores[0] < night.kept.scores[0]:
            night.keep(idea)
    return first.scores[0] - night.kept.scores[0]


def level(commit, sd, first):
    scores = dict(enumerate(commit.scores))
    return verdict.level(scores, sd, chosen=commit is not first, sign=1)


def one(night):
    """The shipped rule; claims the difference of the two levels."""
    first = night.kept
    measured = [first]
    for _ in range(verdict.BASELINE_RUNS):
        night.run(first)
    ideas = 0
    while night.runs < RUNS:
        sd, _ = noise(measured)
        if ideas and ideas % verdict.CONTROL_EVERY == 0:
            night.run(night.kept)
            if night.kept not in measured:
                measured.append(night.kept)
        ideas += 1
        idea = night.idea()
        night.run(idea)
        if level(night.kept, sd, first) - idea.mean > verdict.KEEP * sd:
            night.keep(idea)
    sd, _ = noise(measured)
    return first.mean - level(night.kept, sd, first)


STUDENT = (6.31, 2.92, 2.35, 2.13, 2.02)  # one-sided 95 %, for 1 to 5 degrees of freedom; 2.0 for more


def seeds(night):
    """Three seeds decide by a t-test, five where three leave it open; hopeless ideas get one."""
    first = night.kept
    measured = [first]
    for _ in range(3):
        night.run(first)
    while night.runs < RUNS:
        idea = night.idea()
        measured.append(idea)
        while night.runs < RUNS:
            night.run(idea)
            sd, df = noise(measured)
            gain = night.kept.mean - idea.mean
            t = STUDENT[df - 1] if df <= len(STUDENT) else 2.0
            need = t * sd * math.sqrt(1 / len(idea.scores) + 1 / len(night.kept.scores))
            count = len(idea.scores)
            if gain <= sd / 2 or count >= 5 or (count >= 3 and not 0.7 * need < gain <= need):
                break
        if count >= 3 and gain > need:
            night.keep(idea)
    return first.mean - night.kept.mean


RULES = {"lower": lower, "seeds": seeds, "one": one}


def simulate(draw, rule, count):
    """(mean true progress, share of keeps that change nothing or harm, mean claim beyond the truth) of nights."""
    rng = random.Random(1)
    progress = claim = 0.0
    keeps = nulls = 0
    for _ in range(count):
        night = Night(rng, draw)
        claimed = rule(night)
        progress -= night.kept.truth / count
        claim += (claimed + night.kept.truth) / count
        keeps += night.keeps
        nulls += night.nulls
    return progress, nulls / max(1, keeps), claim


def table(count):
    """{(mixture, rule): what simulate() says}"""
    return {
        (mixture, name): simulate(draw, rule, count)
        for mixture, draw in MIXTURES.items()
        for name, rule in RULES.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nights", type=int, default=300, metavar="N", help="nights of each kind (300)")
    found = table(parser.parse_args().nights)
    print(f"{'100 runs, noise sd 1':<40}" + "".join(f"{name:>24}" for name in RULES) + "   one / lower")
    for mixture in MIXTURES:
        cells = [found[mixture, name] for name in RULES]
        text = "".join(f"{p:10.1f} {100 * null:4.0f} % {claim:+5.1f}" for p, null, claim in cells)
        print(f"{mixture:<40}{text}   {cells[2][0] / cells[0][0]:.2f}, claim {cells[2][2] / cells[0][2]:.2f}")


if __name__ == "__main__":
    main()
