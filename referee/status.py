"""`status`: what an agent needs after a loss of context, and programs too."""

import json

from referee.base import tail
from referee.book import STATUSES
from referee.common import line_of, said_of, say_next
from referee.night import read_night
from referee.table import next_need, read_until
from referee.verdict import counts, is_slowed, mean, noise, scores_by_file, table_of


def command_status(experiment, options):
    """Prints what an agent needs after a loss of context; the last line says what to do next."""
    night = read_night(experiment)
    facts = facts_of(night)
    if options.json:
        facts["next"] = line_of(night, next_need(night))
        print(json.dumps(facts, indent=1))
        return 0
    most = 3 if night.in_slots else 5
    for key, value in facts.items():
        if isinstance(value, list):
            print(f"{key}:{f' {len(value)}, the last ones (--json has all):' if len(value) > most else ''}")
            for each in value[-most:]:
                print(f"  {said(each)}"[:200])
        elif value:
            print(f"{key}: {said(value)}"[:300])
    return say_next(night)


def said(value):
    """A fact as text: of a dictionary its values."""
    if not isinstance(value, dict):
        return value
    return " ".join(f"{each:.6f}" if isinstance(each, float) else str(each) for each in value.values() if each != "")


def facts_of(night):
    """What `status` says."""
    head = night.head
    state = f"{' and '.join(night.changed)} changed" if night.changed else f"{night.experiment.edited} as committed"
    words = [row.status for row in night.book.rows]
    rows = [{"commit": r.commit, "score": r.score, "status": r.status, "text": r.description} for r in night.book.rows]
    facts = {
        "branch": f"{night.repository.branch or 'none (detached)'} at {head.short} {head.subject[:60]!r}, {state}",
        **table_facts(night),
        "log": ", ".join(f"{words.count(word)} {word}" for word in STATUSES),
        "rows": rows,
        "trouble": "; ".join(troubles(night)),
        "until": ", ".join(f"{key} {value}" for key, value in read_until(night).items()),
    }
    if night.running:
        last = (tail(night.experiment.log, 1) or ["no output yet"])[0]
        facts["running"] = f"{said_of(night.running)}; {last}"
    if not night.in_slots:
        facts["last run of HEAD"] = said_of_trial(night, night.on_head)
        return facts
    jobs = [f"{digits[:7]}:{seed} {state}" for (digits, seed), state in night.queue.jobs.items()]
    facts["jobs"] = ", ".join(jobs) or "none"
    idle = [trial for trial in night.trials if not trial.jobs and trial.commit in night.mine]
    facts["done"] = [
        f"{trial.commit.short} {trial.commit.subject[:40]!r}: {said_of_trial(night, trial)}" for trial in idle
    ]
    for branch, claims in night.claims.items():
        if branch != night.repository.branch:
            facts[f"out on {branch}"] = ", ".join(repr(commit.subject[:40]) for commit in claims)
    return facts


def table_facts(night):
    """Mean of the kept commit and noise, among the runs that compare with the newest one."""
    counted = [run for run in night.records if counts(run)]
    if not counted:
        return {"best": "no run has a score that counts yet"}
    table = table_of(counted[-1], night.records)
    files = scores_by_file(table)
    sd, df = noise(table)
    kept = [run for run in table if night.book.status(run.commit) == "keep"]
    facts = {
        "noise": {"sd": sd, "of": f"df {df}", "runs": f"{len(table)} runs compare", "on": f"on {table[-1].device}"}
    }
    facts["noise"]["harness"] = f"harness {table[-1].harness}"
    for name, run in (("first", kept[0]), ("best", kept[-1])) if kept else ():
        scores = files[run.code]
        facts[name] = {"commit": run.commit[:7], "mean": mean(scores), "runs": f"of {len(scores)} runs"}
    return facts


def troubles(night):
    """What the human should see: unreadable rows and records, runs whose score does not count."""
    found = [night.book.trouble()] if night.book.wrong else []
    if night.runs.damaged:
        found.append(f"runs: {night.runs.damaged} damaged files are skipped")
    if night.runs.older:
        again = "the kept commit runs again" if night.book.names_a_keep() else "they are left alone"
        found.append(f"runs: {night.runs.older} files of an earlier version, whose scores do not compare: {again}")
    for run in [run for run in night.records if run.score is not None and (run.why_not or is_slowed(run))][-2:]:
        reason = "; ".join(run.why_not) or f"slowed, others used {100 * run.others:.0f} % of its cores"
        found.append(f"{(run.commit or 'no commit')[:7]} seed {run.seed} does not count: {reason}")
    return found


def said_of_trial(night, trial):
    """What came of a commit, on each kind of device."""
    last = trial.last
    if last is None:
        return "it has not run"
    if last.fail:
        return f"seed {last.seed}, FAIL: {last.kind}: {last.fail['sentence']}"
    grounds = {run.ground: run for run in trial.runs if run.score is not None}
    several = len(grounds) > 1
    said = [
        f"{run.score_text} {night.verdict(trial, run)}{f' on {run.device}' if several else ''}"
        for run in grounds.values()
    ]
    return f"seed {last.seed}, " + "; ".join(said)
