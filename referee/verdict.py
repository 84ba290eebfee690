"""Gain against noise: one run decides.

A kept change that changes nothing costs no progress, a run spent on another seed costs an idea. So a change is kept when
its score is better than the level of the kept commit below it by a part of the noise. The numbers were chosen by
bench/simulate_nights.py.
"""

import math
from dataclasses import dataclass

KEEP = 0.5  # sd of a run's score by which a single run has to be better than the level
KEEP_IN_SLOTS = 1.0  # the same where many ideas are tried at once
LUCK = 0.5  # sd by which a score that was chosen is better than the truth, if it is one run
BASELINE_RUNS = 3
CONTROL_EVERY = 16  # experiments, after which the kept commit runs once more
SLOWED = 0.2  # share of a run's cores that others may use
MANY_LINES = 20  # added ones, for which a gain of one sd is asked


@dataclass(frozen=True)
class Verdict:
    """code: baseline, control, keep or discard; failed, doubt, slowed, no_base or no_noise where the score says nothing.
    gain: in units of the metric, better is more."""

    code: str
    reason: str
    gain: float | None = None
    sd: float | None = None

    @property
    def decides(self):
        return self.code in ("baseline", "control", "keep", "discard")

    @property
    def gain_in_sd(self):
        """None where the noise is zero or no gain is known."""
        return self.gain / self.sd if self.gain is not None and self.sd else None

    def __str__(self):
        return f"{self.code if self.decides else 'none'} ({self.reason})"


def table_of(record, records):
    """The records that compare with one: those that count, on the same ground."""
    return [run for run in records if counts(run) and run.ground == record.ground]


def counts(record):
    """Whether a run has a score that may be compared. One of the morning, with an audit, is of another kind."""
    sound = record.score is not None and not record.why_not and record.commit is not None
    return sound and record.audit is None and not is_slowed(record)


def is_slowed(record):
    return record.others is not None and record.others > SLOWED


def scores_by_file(table):
    """{hash of the edited files: {seed: score}}. Commits of one file share their scores; of a seed that was run again
    the first score counts."""
    files = {}
    for run in table:
        files.setdefault(run.code, {}).setdefault(run.seed, run.score)
    return files


def noise(table):
    """(standard deviation of a run's score, degrees of freedom), pooled over the files that ran with several seeds."""
    squares = 0.0
    df = 0
    for scores in scores_by_file(table).values():
        middle = mean(scores)
        squares += math.fsum((score - middle) ** 2 for score in scores.values())
        df += len(scores) - 1
    return math.sqrt(squares / max(df, 1)), df


def mean(scores):
    """Mean of {seed: score}."""
    return math.fsum(scores.values()) / len(scores)


def level(scores, sd, chosen, sign):
    """What a kept commit's score is taken to be: a chosen one was lucky, by half an sd if it is one run."""
    return mean(scores) + (sign * LUCK * sd / len(scores) if chosen else 0.0)


def kept_below(book, ancestors):
    """The newest kept commit among the ancestors of a commit (hashes, newest first), None where there is none."""
    kept = [row.commit for row in book.rows if row.status == "keep" and book.status(row.commit) == "keep"]
    return next((commit for commit in ancestors if commit.startswith(tuple(kept))), None) if kept else None


def verdict_on(record, records, book, ancestors):
    """The Verdict on a record, given all records, the log, and the commits below its own."""
    others = [run for run in records if run != record]
    base = kept_below(book, ancestors)
    first = base is None and not book.names_a_keep()
    return judge(record, others, base, first or book.status(record.commit) == "keep")


def judge(record, records, base, kept):
    """The Verdict on a record. records: all others; base: the newest kept commit that it was cut from, None where there
    is none; kept: whether its own commit is in the log as kept, or is the first of the night."""
    if record.fail:
        return Verdict("failed", f"it failed: {record.kind}")
    if record.why_not:
        return Verdict("doubt", "; ".join(record.why_not))
    if is_slowed(record):
        share = f"{100 * record.others:.0f} % of its cores"
        return Verdict("slowed", f"slowed: other processes used {share}; run it again when they have ended")
    table = [*table_of(record, records), record]
    files = scores_by_file(table)
    mine = files[record.code]
    sd, df = noise(table)
    known = f"noise sd {sd:.6f}, df {df}" if df else "noise unknown"
    if kept:
        counted = f"mean {mean(mine):.6f} of {len(mine)} seeds"
        parts = [counted, known, *repeats(record, table)]
        return Verdict("control" if base else "baseline", "; ".join(parts), sd=sd if df else None)
    base_runs = [run for run in table if run.commit == base]
    if not base_runs:
        return Verdict("no_base", why_no_base(record, [run for run in records if run.commit == base], base))
    if df == 0:
        return Verdict("no_noise", f"the noise is unknown: {base[:7]} has to run with another seed")
    theirs = files[base_runs[0].code]
    sign = 1 if record.lower_is_better else -1
    below = level(theirs, sd, table[0].code != base_runs[0].code, sign)
    gain = sign * (below - mean(mine))
    need = (KEEP_IN_SLOTS if record.slot else KEEP) * sd / math.sqrt(len(mine))
    code = "keep" if gain > need else "discard"
    parts = [f"gain {gain:+.6f}", f"on {base[:7]} at {below:.6f} of {len(theirs)} runs", known]
    if sd:
        parts.insert(1, f"{gain / sd:+.1f} sd, keep above {need / sd:.1f}")
    if record.lines:
        parts.append(f"lines +{record.lines[0]} -{record.lines[1]}")
    return Verdict(code, "; ".join([*parts, *repeats(record, table)]), gain, sd)


def why_no_base(record, runs, base):
    """Why a record has no base to compare with, as a phrase. runs: those of its base, on other grounds."""
    if base is None:
        return "results.tsv names no commit that this one was cut from"
    if any(run.device == record.device and run.score is not None for run in runs):
        ran = f"{base[:7]} ran under harness {runs[-1].harness}, this one under {record.harness}"
        return f"{ran}: a frozen file or the data have changed (git status), or it has to run again"
    return f"{base[:7]} has no run on {record.device}"


def repeats(record, table):
    """A phrase where the last run of a table repeats an earlier one of the same file."""
    for each in table[:-1]:
        if each.code != record.code:
            continue
        if each.commit != record.commit:
            return [f"the same file as {each.commit[:7]}: {each.score:.6f}"]
        if each.seed == record.seed:
            return [f"seed {record.seed} ran before, and its first score counts: {each.score:.6f}"]
    return []


def exception(record, verdict):
    """Why the simpler file may win against the verdict, as a phrase; empty where it does not. program.md says so."""
    if verdict.code not in ("keep", "discard") or not record.lines or not verdict.sd:
        return ""
    added, removed = record.lines
    by = verdict.gain_in_sd
    if verdict.code == "discard" and removed > added and by > -0.5:
        what = "loses" if by < 0 else "gains"
        return f"takes out {removed - added} lines and {what} {abs(by):.2f} sd: log keep"
    if verdict.code == "keep" and added - removed > MANY_LINES and by < 1:
        return f"adds {added - removed} lines for {by:.2f} sd: log discard"
    return ""
