"""The clock, the verdict, the log and the records, by hand-made facts; the simulations of bench/ by their bars."""

import dataclasses
import json
import math
import sys

import pytest
from conftest import ROOT

from referee import base, book, clock, records, verdict

DIGITS = {name: 20 * f"{number:02x}" for number, name in enumerate(("base", "idea", "other", "kept"), 1)}


def run(name="idea", seed=42, score=1.0, **more):
    """A Record of a commit; its file is its own unless code= says otherwise."""
    facts = dict(time=f"2026-01-01T00:00:{seed % 60:02}Z", host="h", pid=seed, birth="1", folder="/f")
    facts |= dict(commit=DIGITS[name], parent=DIGITS["base"], subject=name, seed=seed, metric="val_bpb")
    facts |= dict(lower_is_better=True, code=name, limit=600, base=DIGITS["base"], lines=[3, 1], score=score)
    facts |= dict(fail=None, harness="cafe", device="cpu")
    return records.Record(**facts | more)


BASE = [run("base", 42 + n, score) for n, score in enumerate((1.0, 1.002, 1.001))]  # mean 1.001, sd 0.001


def judged(record, others=BASE, base_of="base", kept=False):
    return verdict.judge(record, list(others), base_of and DIGITS[base_of], kept)


# -- one run decides


@pytest.mark.parametrize("score, code", [(1.0004, "keep"), (1.0006, "discard"), (0.9, "keep"), (1.1, "discard")])
def test_a_gain_of_half_an_sd_on_the_baselines_mean_is_kept(score, code):
    assert judged(run(score=score)).code == code


def test_a_chosen_commit_is_taken_to_be_half_an_sd_worse():
    kept = run("kept", score=0.99)
    below = judged(run(score=0.9899), [*BASE, kept], "kept")
    assert below.code == "keep"  # 0.9905 - 0.9899 is more than half an sd
    assert judged(run(score=0.9901), [*BASE, kept], "kept").code == "discard"
    assert below.gain == pytest.approx(0.0006)


def test_a_control_pulls_the_level_back():
    kept = [run("kept", score=0.99), run("kept", 43, 0.992)]
    assert judged(run(score=0.9901), [*BASE, *kept], "kept").code == "keep"


def test_more_runs_of_an_idea_lower_the_bar():
    runs = [run(score=1.0006), run(seed=43, score=1.0006)]
    assert judged(runs[1], [*BASE, runs[0]]).code == "keep"


def test_in_slots_the_bar_is_an_sd():
    assert judged(run(score=1.0004, slot=True)).code == "discard"
    assert judged(run(score=0.9999, slot=True)).code == "keep"


def test_higher_may_be_better():
    higher = [dataclasses.replace(each, lower_is_better=False) for each in BASE]
    assert judged(run(score=1.0016, lower_is_better=False), higher).code == "keep"
    assert judged(run(score=1.0014, lower_is_better=False), higher).code == "discard"


@pytest.mark.parametrize("score, code", [(1.0 - 1e-9, "keep"), (1.0, "discard")])
def test_without_noise_any_gain_is_kept(score, code):
    quiet = [run("base", seed, 1.0) for seed in (42, 43)]
    assert judged(run(score=score), quiet).code == code


def test_gain_and_noise_are_said():
    found = judged(run(score=0.999))
    assert found.gain_in_sd == pytest.approx(2.0)
    assert "lines +3 -1" in str(found)
    assert "noise sd 0.001000, df 2" in str(found)


def test_noise_is_pooled_over_files():
    others = [*BASE, run("other", 42, 2.0), run("other", 43, 2.002)]
    sd, df = verdict.noise(others)
    assert df == 3
    assert sd == pytest.approx(math.sqrt((2e-6 + 2e-6) / 3))


def test_commits_of_one_file_are_one_pool():
    twin = run("other", 43, 0.9, code="idea")
    assert "the same file as 0303030" in judged(run(score=0.9), [*BASE, twin]).reason


def test_a_repeated_seed_counts_once_and_that_is_said():
    again = judged(run(score=2.0), [*BASE, run(score=0.9, time="2026-01-01T00:00:01Z")])
    assert again.code == "keep"
    assert "its first score counts" in again.reason


def test_the_base_itself_is_no_idea():
    assert judged(run(score=0.5, code="base")).code == "discard"


OTHERS = {
    "a failure": ({"score": None, "fail": {"kind": "oom", "sentence": "x"}}, "failed"),
    "a doubt": ({"why_not": ["a reason"]}, "doubt"),
    "slowed": ({"others": 0.21}, "slowed"),
    "another device": ({"device": "gpu"}, "no_base"),
    "another harness": ({"harness": "beef"}, "no_base"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_score_that_says_nothing(name):
    changes, code = OTHERS[name]
    found = judged(run(**changes))
    assert found.code == code
    assert str(found).startswith("none (")


def test_a_little_company_is_no_slowing():
    assert judged(run(score=0.9, others=0.19)).code == "keep"


def test_unknown_noise_decides_nothing():
    assert judged(run(score=0.5), BASE[:1]).code == "no_noise"


@pytest.mark.parametrize("changes", [{"why_not": ["x"]}, {"others": 0.5}, {"device": "gpu"}, {"audit": 1.0}])
def test_runs_that_do_not_count_are_no_noise(changes):
    extra = run("base", 45, 5.0, **changes)
    assert judged(run(score=0.9), [*BASE, extra]).sd == pytest.approx(0.001)


@pytest.mark.parametrize(
    "lines, score, said",
    [
        ([1, 12], 1.0014, "takes out 11 lines"),  # loses 0.4 sd
        ([1, 12], 1.0016, ""),
        ([12, 1], 1.0014, ""),
        ([30, 2], 1.0003, "adds 28 lines"),  # 0.7 sd
        ([30, 2], 0.9999, ""),
        ([20, 2], 1.0003, ""),
    ],
)
def test_the_simpler_file_is_an_exception(lines, score, said):
    record = run(score=score, lines=lines)
    assert verdict.exception(record, judged(record)).startswith(said)
    assert bool(verdict.exception(record, judged(record))) == bool(said)


def rows(*words):
    return book.Book(tuple(book.Row(DIGITS[name], "1.0", "0.0", word) for name, word in words))


def test_the_first_commit_of_a_night_is_its_baseline():
    assert verdict.verdict_on(BASE[0], BASE, rows(), []).code == "baseline"


def test_a_kept_commit_that_runs_again_is_a_control():
    again = run("kept", 43, 0.99)
    log = rows(("base", "keep"), ("kept", "keep"))
    assert verdict.verdict_on(again, [*BASE, again], log, [DIGITS["base"]]).code == "control"


def test_the_last_word_on_a_commit_is_its_status():
    log = rows(("base", "keep"), ("kept", "keep"), ("kept", "discard"))
    assert verdict.kept_below(log, [DIGITS["kept"], DIGITS["base"]]) == DIGITS["base"]


def test_simulated_nights_reach_the_bars():
    sys.path.insert(0, str(ROOT / "bench"))
    import simulate_nights

    found = simulate_nights.table(40)
    ratios = [found[mixture, "one"][0] / found[mixture, "lower"][0] for mixture in simulate_nights.MIXTURES]
    claims = [found[mixture, "one"][2] / found[mixture, "lower"][2] for mixture in simulate_nights.MIXTURES]
    assert min(ratios) >= 0.85
    assert sorted(ratios)[2] >= 0.95
    assert max(claims) <= 2 / 3


def test_simulated_fleets_reach_the_bars():
    sys.path.insert(0, str(ROOT / "bench"))
    import simulate_fleet as fleet

    draw = fleet.MIXTURES["as in public nights"]
    one = fleet.simulate(draw, 1, 1.0, fleet.together, 6)
    single = fleet.simulate(draw, 16, 1.0, fleet.single, 6)
    together = fleet.simulate(draw, 16, 1.0, fleet.together, 6)
    assert together[0] >= 1.5 * single[0]
    assert together[0] >= 10 * one[0]
    assert together[1] >= 0.95


# -- the clock, fed ticks


def ticked(budget, *ticks, end=None):
    found = clock.Clock(budget)
    found.start(now=50.0)
    for tick in ticks:
        found.tick(now=50.0 + tick)
    found.stop(now=50.0 + (end or ticks[-1]))
    return found


def test_clock_counts_from_its_first_start_to_its_first_stop():
    found = clock.Clock(300)
    assert found.elapsed(now=5) == 0.0
    found.start(now=100)
    found.start(now=120)
    assert found.tick(now=131) == 31
    found.stop(now=160)
    found.stop(now=200)
    assert found.elapsed(now=999) == 60


@pytest.mark.parametrize(
    "ticks, over",
    [
        ((1, 2, 305.9), 0.0),  # within 2 % of the budget
        ((*range(10, 301, 10), 309.9), 0.0),  # a step of 10 s
        ((*range(1, 300), 306.5), 6.5),  # longer than 2 % and than every step that ended inside
        ((*range(20, 301, 20), 314.9), 0.0),  # up to 5 %
        ((*range(20, 301, 20), 315.5), 15.5),
        ((285, 570), 270.0),  # rare ticks excuse no more than that
    ],
)
def test_overrun_is_what_neither_a_step_nor_a_share_of_the_budget_excuses(ticks, over):
    assert ticked(300, *ticks).overrun() == pytest.approx(over)


def test_work_after_the_last_tick_is_an_overrun():
    assert ticked(100, *range(1, 101), end=105).overrun() == pytest.approx(5)


def test_what_others_use_of_our_cores_is_known_or_not_claimed(monkeypatch):
    busy = iter([10.0, 30.0, 5.0, None])
    monkeypatch.setattr(clock, "busy_seconds", lambda: next(busy))
    monkeypatch.setattr(clock, "own_seconds", lambda: 0.0)
    monkeypatch.setattr(clock, "usable_cores", lambda: [0, 1])
    times = iter([0.0, 20.0, 0.0, 20.0])
    monkeypatch.setattr(clock.time, "monotonic", lambda: next(times))
    shared = clock.Cores()
    shared.stop()
    assert shared.share == pytest.approx(0.5)
    unknown = clock.Cores()
    unknown.stop()
    assert unknown.share is None


# -- results.tsv and the records


@pytest.mark.parametrize(
    "line", ["a1b2c3d\t1.0\t0.0\tkeep\tx", "A1B2C3D\t1e-3\t\tkeep", "a1b2c3d\tnan\tn/a\tCRASH\tx\ty"]
)
def test_rows_that_can_be_read(line):
    assert book.read_row(line) is not None


@pytest.mark.parametrize("line", ["a1b2c3d 1.0 0.0 keep x", "a1b2c3\t1.0\t0\tkeep\tx", "a1b2c3d\t4,84\t0\tkeep\tx"])
def test_a_row_that_cannot_be_read_is_named_and_may_be_a_keep(tmp_path, line):
    path = tmp_path / "results.tsv"
    path.write_text("commit\tval_bpb\n" + line + "\n")
    found = book.read_book(path)
    assert found.wrong == (2,)
    assert found.names_a_keep()


def test_rows_are_appended_and_what_stood_there_stays(tmp_path):
    path = tmp_path / "results.tsv"
    path.write_bytes(b"commit\tx\r\nstray\xff")
    book.append_rows(path, [book.Row("a1b2c3d", "1.0", "0.0", "keep", "two\nlines")], "x")
    assert path.read_bytes() == b"commit\tx\r\nstray\xff\na1b2c3d\t1.0\t0.0\tkeep\ttwo lines\n"


def test_two_runs_with_one_score_need_two_rows():
    twins = [run(seed=42), run(seed=43)]
    one_row = book.Book((book.Row(DIGITS["idea"], "1.000000", "0.0", "keep"),))
    assert one_row.logged(twins[0], twins)
    assert not one_row.logged(twins[1], twins)


DAMAGE = ["", "{", "[]", "null", "[" * 10**5, '{"format": 2}'] + [
    json.dumps(dataclasses.asdict(run()) | change)
    for change in ({"commit": ["a"]}, {"seed": "42"}, {"score": 1e308}, {"why_not": [1]}, {"time": "x"}, {"fail": {}})
]


@pytest.mark.parametrize("text", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_record_is_skipped_and_counted(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    records.write_record(tmp_path, run())
    found = records.read_runs(tmp_path)
    assert len(found.records) == 1
    assert found.damaged + found.older == 1


def test_a_run_of_another_machine_may_go_on_until_its_limit(monkeypatch):
    lost = run(score=None, fail={"kind": "lost", "sentence": "x"}, time=records.now(), host="elsewhere")
    assert lost.may_be_running
    assert not dataclasses.replace(lost, time="2026-01-01T00:00:00Z").may_be_running


def test_a_change_of_comments_spacing_or_docstrings_is_no_other_file():
    one = 'def f(x):\n    """Says."""\n    return x + 1  # why\n'
    assert base.code_hash(one) == base.code_hash("def f( x ):\n\n    'Otherwise'\n    return x+1\n")
    assert base.code_hash(one) != base.code_hash(one.replace("+ 1", "+ 2"))
    assert base.code_hash("def (") != base.code_hash("def ((")
