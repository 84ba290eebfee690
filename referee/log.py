"""`log`: runs become rows of results.tsv; then a commit is kept or dropped."""

from dataclasses import replace

from referee.base import RefereeError, git, require
from referee.book import Row, append_rows
from referee.common import full_commit, line_of, me, require_at_rest, say_next, step_back, update_refs
from referee.night import OUT, read_night
from referee.table import need_of


def command_log(experiment, options):
    """Writes runs into results.tsv, by the verdict or by a word, then keeps or drops the commit; without a commit or a word
    all that is decided, the best first. Row first, git second; repeated, it goes on where it stopped."""
    night = read_night(experiment)
    require_at_rest(night)
    require(not night.queue.trouble, night.queue.trouble)
    if options.restore:
        return restore(night)
    if options.commit:
        log_trial(night, named_trial(night, options.commit), options.status, options.note)
    elif options.status:
        trial = night.on_head
        again = f"to drop it run: {me(f'log {trial.commit.short} {options.status}')}"
        settled = trial.is_kept and options.status != "keep" and not night.unlogged(trial)
        require(not settled, f"nothing to log: {trial.commit.short} is kept; {again}")
        log_trial(night, trial, options.status, options.note)
    elif not log_decided(night, options.note):
        print("nothing to log: nothing is decided")
    return say_next(night)


def log_decided(night, note):
    """Logs every trial that is decided, the best first; returns how many."""
    logged = 0
    while True:
        trials = night.trials if night.in_slots else [night.on_head]
        decided = [trial for trial in trials if word_of(night, trial)]
        if not decided:
            return logged
        log_trial(night, max(decided, key=lambda trial: gain_of(night, trial)), None, note)
        logged += 1


def gain_of(night, trial):
    """By what trials that are decided are ordered: baselines and controls first, then the gain."""
    verdict = night.verdict(trial)
    if verdict.code in ("baseline", "control"):
        return float("inf")
    return float("-inf") if verdict.gain is None else verdict.gain


def word_of(night, trial):
    """The status that follows from the runs of a trial, empty where none does yet."""
    need = need_of(night, trial)
    if need is None:
        return ""
    if need.kind in ("crash", "discard"):
        return need.kind
    early = need.kind == "seed" and night.unlogged(trial) and not night.in_slots  # a baseline's first rows
    if need.kind != "log" and not early:
        return ""
    if trial.status in ("crash", "discard"):
        return trial.status
    return "discard" if night.verdict(trial).code == "discard" else "keep"


def named_trial(night, words):
    """The Trial of a commit that is out. Raises RefereeError where there is none."""
    digits = full_commit(night, words)
    for trial in night.trials:
        if trial.commit.hash == digits:
            return trial
    require(digits != night.head.hash, f"{digits[:7]} is an idea on the branch; run: {me('submit')}")
    raise RefereeError(f"{digits[:7]} is {night.book.status(digits) or 'not out on this branch'}; run: {me('status')}")


def log_trial(night, trial, word, note):
    """Writes the rows of a trial; then the branch goes forward to a kept one or back from a dropped one, and what was out is
    so no more."""
    short = trial.commit.short
    folder = night.experiment.folder
    if word is None:
        word = word_of(night, trial)
        need = need_of(night, trial)
        said = f"next: {line_of(night, need)}" if need else f"it is {trial.status}"
        require(word, f"{short} is not decided; {said}")
    require(trial.runs, f"{short} has not run yet; run: {me('run')}")
    require(not trial.jobs, f"{short} is not done: {trial.jobs}; run: {me('wait')}")
    on_branch = trial.commit in night.repository.history
    forward = word == "keep" and not on_branch
    pick = f"git cherry-pick -x {short} && {me('submit')}"
    require(not forward or trial.base == night.head.hash, f"{short} gained on a base that has moved on; run: {pick}")
    busy = f"{' and '.join(night.changed)} is being edited; finish and submit that, or git restore it"
    require(not forward or not night.changed, busy)
    print(f"{short}: {night.verdict(trial).reason[:250]}")
    write_rows(night, trial, word, note)
    refs = log_picked(night, trial, word)
    if trial.commit in night.mine:
        refs.append(f"delete {OUT}/{night.repository.branch}/{trial.commit.hash}")
        night.mine.pop(trial.commit)
    if forward:
        git(folder, "merge", "-q", "--ff-only", trial.commit.hash)
        night.repository = replace(night.repository, history=(trial.commit, *night.repository.history))
        print(f"{night.repository.branch} goes on from {short}")
    if word != "keep" and trial.base:
        refs.append(f"update refs/autoresearch/{short} {trial.commit.hash}")
        print(f"{short} is kept as refs/autoresearch/{short}")
    if word != "keep" and trial.commit == night.head and trial.base:
        step_back(night, trial, refs)
    else:
        update_refs(night, refs)


def write_rows(night, trial, status, note=""):
    """Appends the rows of a trial's runs that have none, and says so. A word of the agent's own on what is logged is a row
    too."""
    unlogged = night.unlogged(trial)
    if not unlogged and status != trial.status:
        unlogged = [run for run in trial.runs if run.score is not None][-1:] or trial.runs[-1:]
    rows = [row_of(night, trial, status, note, record) for record in unlogged]
    if not rows:
        print(f"no new row: all runs of {trial.commit.short} have theirs")
        return
    append_rows(night.experiment.results, rows, night.experiment.metric)
    night.book = replace(night.book, rows=(*night.book.rows, *rows))
    for row in rows:
        print(f"logged: {row.commit} {row.score} {row.status} {row.description[:150]}")


def row_of(night, trial, status, note, record):
    """The Row of a run."""
    words = "baseline" if trial.base is None and status == "keep" else trial.commit.subject
    verdict = night.verdict(trial, record)
    if not note and record.score is not None:
        if not verdict.decides and status == "discard":
            note = f"does not count: {verdict.reason[:150]}"
        elif trial.is_kept and record.ground != trial.runs[0].ground:
            note = f"on {record.device}: {verdict}"
        elif verdict.code == "control":
            note = "control"
    memory = record.figures.get("memory_mb")
    memory = f"{memory / 1024:.1f}" if isinstance(memory, (int, float)) else "0.0"
    score = "nan" if status == "crash" else record.score_text
    return Row(trial.commit.short, score, memory, status, f"{words} ({note})" if note else words)


def log_picked(night, trial, status):
    """Rows of the wins that a trial brought onto a newer base; returns the updates of their refs. Where a sum did not gain,
    its parts go on one by one."""
    refs = []
    parts = [commit for commit in night.mine if commit.hash in trial.picked]
    if status != "keep" and len(trial.picked) > 1:
        return refs
    for commit in parts:
        win = night.trial(commit)
        note = f"kept in {trial.commit.short}" if status == "keep" else f"gained on {win.base[:7]} only"
        write_rows(night, win, status, note)
        night.mine.pop(commit)
        refs.append(f"delete {OUT}/{night.repository.branch}/{commit.hash}")
        refs.append(f"update refs/autoresearch/{commit.short} {commit.hash}")
        refs += log_picked(night, win, status)
    return refs


def restore(night):
    """Writes the rows that results.tsv has lost, from runs/: what is on the branch was kept."""
    on_branch = {commit.hash for commit in night.repository.history}
    rows = []
    for run in night.records:
        if run.interrupted or run.commit is None or run.audit is not None or night.book.rows_of(run.commit):
            continue
        status = "keep" if run.commit in on_branch else "discard"
        rows.append(
            Row(run.commit[:7], run.score_text, "0.0", "crash" if run.fail else status, f"{run.subject} (restored)")
        )
    append_rows(night.experiment.results, rows, night.experiment.metric)
    print(f"restored: {len(rows)} rows of results.tsv from {night.folder}")
    return say_next(read_night(night.experiment))
