"""The verdict: worked examples, what it reads and what it skips, and a simulation of nights with known truths.

uv run pytest tests/test_verdict.py -s -k simulated     # prints the table
"""

import json
import math
import random
import statistics

import prepare
import pytest
from prepare import judge

BASE = [("aaaaaaa", 42, 1.0000), ("aaaaaaa", 43, 1.0010), ("aaaaaaa", 44, 1.0005)]  # mean 1.0005, sd 0.0005, df 2
KEPT = {"aaaaaaa": "keep"}


def runs(*rows):
    """Records from (commit, seed, score) or (commit, seed, score, hash of train.py); the hash is the commit if not given."""
    return [{"commit": c, "seed": s, "val_bpb": v, "train_sha256": (h or [c])[0]} for c, s, v, *h in rows]


def said(rows, statuses=KEPT):
    word, numbers = judge(runs(*rows), statuses)
    return f"{word} ({numbers})"


# -- worked by hand: t = 2.92 for df 2, and 0.0005 * sqrt(1 + 1/3) = 0.000577, so a first run is clear above 0.001686


@pytest.mark.parametrize(
    "score, word", [(0.9988, "keep"), (0.99882, "rerun"), (1.00049, "rerun"), (1.0006, "discard"), (1.1, "discard")]
)
def test_a_first_run(score, word):
    line = said([*BASE, ("bbbbbbb", 42, score)])
    assert (
        line.startswith(f"{word} (") and "clear above 0.001686 with 1 and 3 seeds; noise sd 0.000500, df 2" in line
    ), line
    assert ("next SEED=43; " in line) == (
        word == "rerun"
    ) and f"gain {1.0005 - score:+.6f} on aaaaaaa, 1.000500" in line


def test_the_baseline_names_its_next_seeds():
    assert said(BASE[:1]) == "baseline (next SEED=43; mean 1.000000 of 1 seeds; noise unknown)"
    assert said(BASE[:2]) == "baseline (next SEED=44; mean 1.000500 of 2 seeds; noise sd 0.000707, df 1)"
    assert said(BASE) == "baseline (mean 1.000500 of 3 seeds; noise sd 0.000500, df 2)"
    assert said([("aaaaaaa", 43, 1.0), ("aaaaaaa", 44, 1.0)]).startswith("baseline (next SEED=42; ")


def test_reruns_narrow_the_error_and_end_after_three_seeds():
    # df 3, pooled sd sqrt((2 * 0.0005^2 + 2 * 0.0001^2) / 3) = 0.000416, t 2.35, error 0.000416 * sqrt(1/2 + 1/3)
    line = said([*BASE, ("bbbbbbb", 42, 0.9995), ("bbbbbbb", 43, 0.9993)])
    assert (
        line.startswith("keep (gain +0.001100 on")
        and "clear above 0.000893 with 2 and 3 seeds; noise sd 0.000416, df 3" in line
    )
    second = [*BASE, ("bbbbbbb", 42, 1.0000), ("bbbbbbb", 43, 1.0004)]
    assert said(second).startswith("rerun (next SEED=44; gain +0.000300")
    assert said([*second, ("bbbbbbb", 44, 1.0001)]).startswith("discard (gain +0.000333")
    assert said([*second, ("bbbbbbb", 44, 1.0100)]).startswith("discard (gain -")
    assert said([*BASE, ("bbbbbbb", 43, 1.0004)]).startswith("rerun (next SEED=42; ")  # the first seed that has not run


def test_student():
    """One-sided 95 % points of Student's t for 1 to 5 degrees of freedom, 2.0 for more; by the number of pooled pairs."""
    for df, t in enumerate((6.31, 2.92, 2.35, 2.13, 2.02, 2.0, 2.0, 2.0, 2.0, 2.0), 1):
        pairs = [(f"{n:07x}", seed, 1.0 + 0.001 * (seed == 43)) for n in range(df) for seed in (42, 43)]
        line = said([*pairs, ("fffffff", 42, 0.9)], {"0000000": "keep"})
        need = t * 0.001 / math.sqrt(2) * math.sqrt(1 + 1 / 2)
        assert f"clear above {need:.6f} with 1 and 2 seeds; noise sd 0.000707, df {df}" in line, line
    assert all(prepare.STUDENT[n] == t for n, t in ((1, 2.92), (2, 2.35), (3, 2.13)))


def test_a_repeated_seed_counts_once():
    assert said([*BASE, ("aaaaaaa", 43, 9.0)]).startswith(
        "baseline (mean 1.000500 of 3 seeds; noise sd 0.000500, df 2; same file as aaaaaaa"
    )
    assert said([("aaaaaaa", 42, 1.0), ("aaaaaaa", 42, 1.1), ("bbbbbbb", 42, 0.5)]).startswith(
        "none (run aaaaaaa with another SEED first; "
    )


def test_a_file_that_has_run_is_said_and_shares_its_scores():
    line = said([*BASE, ("bbbbbbb", 42, 1.0, "aaaaaaa")])  # the same file under another commit: nothing new
    assert line.startswith("discard (gain +0.000000") and line.endswith("; same file as aaaaaaa: 1.000000)")
    assert "same file" not in said(
        [*BASE, ("bbbbbbb", 42, 0.9995), ("bbbbbbb", 43, 0.9993)]
    )  # a rerun is no repetition
    assert "same file as bbbbbbb: 0.999500" in said([*BASE, ("bbbbbbb", 42, 0.9995), ("bbbbbbb", 42, 0.9993)])


def test_best_is_the_lowest_mean_among_kept_commits():
    rows = [*BASE, ("bbbbbbb", 42, 0.9900), ("ccccccc", 42, 0.9800), ("ddddddd", 42, 0.9850)]
    assert "on ccccccc, 0.980000" in said(rows, {"aaaaaaa": "keep", "bbbbbbb": "keep", "ccccccc": "keep"})
    assert "on bbbbbbb, 0.990000" in said(rows, {"aaaaaaa": "keep", "bbbbbbb": "keep", "ccccccc": "discard"})
    lucky = [*rows[:-1], ("bbbbbbb", 43, 0.9720), ("ddddddd", 42, 0.9850)]
    assert "on ccccccc, 0.980000" in said(lucky, {"bbbbbbb": "keep", "ccccccc": "keep"})  # not the lowest run, 0.972
    assert said(rows, {}).startswith("baseline (")  # nothing is kept yet
    again = [*rows, ("ccccccc", 43, 0.9801)]  # a kept commit is compared with the other kept ones
    assert said(again, {"aaaaaaa": "keep", "ccccccc": "keep"}).startswith("keep (gain +0.020450 on aaaaaaa")


def test_unknown_noise_gives_no_verdict():
    assert said([BASE[0], ("bbbbbbb", 42, 0.5)]).startswith("none (run aaaaaaa with another SEED first; ")


# -- what is read

RECORD = {
    "commit": "bbbbbbb",
    "train_sha256": "bbbbbbb",
    "seed": 42,
    "val_bpb": 0.9980,
    "harness": "h1",
    "device": "cpu",
    "why_not": "",
}


@pytest.fixture
def logs(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "HERE", tmp_path)

    def write(records, rows):
        (tmp_path / "runs.jsonl").write_text(
            "".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records)
        )
        if rows is not None:
            (tmp_path / "results.tsv").write_bytes(rows.encode())
        return prepare._verdict(RECORD)

    return write


BASE_RECORDS = [{**RECORD, **r} for r in runs(*BASE)]
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"


def test_only_comparable_runs_count(logs, capsys):
    others = [
        {**RECORD, "harness": "h0", "val_bpb": 0.5},
        {**RECORD, "device": "H200", "val_bpb": 0.4},
        {**RECORD, "why_not": "the budget was overrun by 9.0 s", "val_bpb": 0.3},
        {**RECORD, "val_bpb": None},
        "\n",
        '{"commit": "bbbbbbb", "tor\n',
        "[]\n",
        "null\n",
        '{"harness": "h1"}\n',
    ]
    line = logs([*BASE_RECORDS, *others, RECORD], HEADER + "aaaaaaa\t1.0\t0.0\tkeep\tbaseline\n")
    assert line.startswith("keep (gain +0.002500 on aaaaaaa, 1.000500; ") and "same file" not in line
    assert capsys.readouterr().out == ""


def test_the_last_row_of_a_commit_is_its_status(logs):
    rows = HEADER + "aaaaaaa\t1.0\t0.0\tkeep\tbaseline\r\naaaaaaa\t1.0\t0.0\tdiscard\tbaseline\r\n"
    assert logs([*BASE_RECORDS, RECORD], rows).startswith("baseline (")
    assert logs([*BASE_RECORDS, RECORD], rows + "aaaaaaa0123456\tnan\t0.0\tKEEP\t\n").startswith(
        "keep ("
    )  # a longer hash


def test_malformed_rows_are_named_and_skipped(logs, capsys):
    bad = [
        "aaaaaaa 1.0 0.0 discard spaces",
        "aaaaaaa\t1.0\tdiscard",
        "aaaaaaa\t1.0\t0.0\tdropped\tno such word",
        "nonsense",
        "\ufffd\t\t\t\t",
        "zzzzzzz\t1.0\t0.0\tdiscard\tno hash",
        "aaaaaaa\tgood\t0.0\tdiscard\tno number",
    ]
    rows = HEADER + "aaaaaaa\t1.0\t0.0\tkeep\tbaseline\n\n" + "\n".join(bad)
    assert logs([*BASE_RECORDS, RECORD], rows).startswith("keep (")
    out = capsys.readouterr().out.splitlines()
    assert [int(line.split("line ")[1].split()[0]) for line in out] == [4, 5, 6, 7, 8, 9, 10] and all(
        "results.tsv" in x for x in out
    )


def test_no_log_yet_is_no_error(logs):
    assert logs([RECORD], None).startswith("baseline (next SEED=43; ")


# -- nights with known truths

SD = 0.0007  # of a run's score


def idea(rng):
    """True change of an idea: 45 % null, 40 % harmful, 15 % gains of 0.0003 to 0.01."""
    kind = rng.random()
    if kind < 0.45:
        return 0.0
    return rng.expovariate(1 / 0.004) if kind < 0.85 else -math.exp(rng.uniform(math.log(0.0003), math.log(0.01)))


def night(rng, rule, ideas=70):
    """Runs `ideas` ideas, each on top of what was kept; counts nulls, nulls kept, harm kept, gain offered, gain had, runs."""
    truth, records, statuses = 1.0, [], {}
    commit, count = 0, dict.fromkeys(("ideas", "null", "false", "harm", "offered", "had", "runs"), 0)

    def run(commit, true, seed):
        records.append(
            {"commit": f"{commit:07x}", "train_sha256": f"{commit:07x}", "seed": seed, "val_bpb": rng.gauss(true, SD)}
        )
        return rule(records, statuses)

    for seed in (42, 43, 44):
        run(0, truth, seed)
        statuses["0000000"] = "keep"
    for commit in range(1, ideas + 1):
        change, seed = idea(rng), 42
        while (word := run(commit, truth + change, seed)) == "rerun":
            statuses[f"{commit:07x}"], seed = "discard", seed + 1
        count["runs"] += seed - 41
        statuses[f"{commit:07x}"] = word
        kept = word == "keep"
        truth += change * kept
        for key, amount in (
            ("ideas", 1),
            ("null", change == 0),
            ("false", kept and change == 0),
            ("harm", kept and change > 0),
            ("offered", max(0.0, -change)),
        ):
            count[key] += amount
    count["had"] = 1.0 - truth
    return count


def verdict(records, statuses):
    return judge(records, statuses)[0]


def greedy(records, statuses):
    """The single-run rule: lower than every kept score so far."""
    kept = [r["val_bpb"] for r in records[:-1] if statuses.get(r["commit"]) == "keep"]
    return "keep" if records[-1]["val_bpb"] < min(kept, default=math.inf) else "discard"


def nights(rule, count=120):
    rng = random.Random(1)
    each = [night(rng, rule) for _ in range(count)]
    total = {key: sum(n[key] for n in each) for key in each[0]}
    return {
        "false keeps, % of null ideas": 100 * total["false"] / total["null"],
        "harmful kept a night": total["harm"] / count,
        "gain had, % of offered": 100 * total["had"] / total["offered"],
        "runs an idea": total["runs"] / total["ideas"],
    }


def test_simulated_nights():
    """False keeps at most 5 % of null ideas, at least 80 % of the gain, at most 1.5 runs an idea; greedy beside it."""
    ours, theirs = nights(verdict), nights(greedy)
    print(f"\n{'120 nights of 70 ideas, noise sd 0.0007':<40} {'verdict':>8} {'greedy':>8}")
    for key in ours:
        print(f"{key:<40} {ours[key]:8.2f} {theirs[key]:8.2f}")
    false, harm, gain, runs_each = ours.values()
    assert false <= 5 and gain >= 80 and runs_each <= 1.5 and harm < 0.2
    assert theirs["false keeps, % of null ideas"] > 10  # the test can tell a rule that keeps luck


def test_the_noise_of_a_night_is_recovered():
    """The deviation behind the verdict is the pooled one: close to the truth after many reruns."""
    rng = random.Random(2)
    records = [
        {"commit": f"{n:07x}", "train_sha256": f"{n:07x}", "seed": 42 + s, "val_bpb": rng.gauss(1 - n / 100, SD)}
        for n in range(40)
        for s in range(2)
    ]
    numbers = judge(records, {"0000000": "keep"})[1]
    pooled = (
        statistics.fmean((a["val_bpb"] - b["val_bpb"]) ** 2 / 2 for a, b in zip(records[::2], records[1::2])) ** 0.5
    )
    assert f"noise sd {pooled:.6f}, df 40" in numbers and abs(pooled - SD) < 0.0002
