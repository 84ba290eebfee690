"""One run a device: its summary, what is noted of its end; measure(), the door for any other metric.

The script is the child of a supervisor, which has written its record. guard() notes there what came of it; what it could
not note the supervisor does, from the way in which the child ended.
"""

import contextlib
import math
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path

from referee import audit
from referee.base import RefereeError, cpu_name, require, try_lock, whole_number
from referee.clock import Clock
from referee.experiment import Experiment, edits_on_disk, fingerprint, ruled_experiment
from referee.lint import lint
from referee.records import Record, parse_record, write_record

STARTED = time.monotonic()  # total_seconds count from here
GRACE = 300  # seconds for start, compilation and evaluation; this far beyond the budget the supervisor ends a training
FIRST_SEED = 42
RECORD = "AUTORESEARCH_RECORD"  # path of the record of the run in progress, set by the supervisor


def environment_number(name, default, least, most):
    """The value of an environment variable; the default where it is malformed, which the supervisor refuses."""
    with contextlib.suppress(RefereeError):
        return whole_number(name, default, least, most)
    return default


SEED_RANGE = ("SEED", FIRST_SEED, 0, 2**63 - 1)
BUDGET_RANGE = ("TIME_BUDGET", 300, 1, 10**6)
SEED = environment_number(*SEED_RANGE)
TIME_BUDGET = environment_number(*BUDGET_RANGE)  # seconds of training

# -- the run in progress


@dataclass
class Run:
    """What the harness itself saw of the run in progress; the edited file is never asked for it."""

    clock: Clock = field(default_factory=lambda: Clock(TIME_BUDGET))
    experiment: Experiment | None = None
    record: Record | None = None
    path: Path | None = None  # of the record
    score: float | None = None
    audit: float | None = None
    evaluation: float | None = None  # seconds
    device: object = None  # of the model that was scored
    rows: int = 0  # rows drawn for training
    ended: bool = False  # whether the record says how
    doubts: list = field(default_factory=list)  # why the score may not be compared, as sentences


this_run = Run()


def doubt(sentence):
    """Notes why this run's score may not be compared with others."""
    if sentence not in this_run.doubts:
        this_run.doubts.append(sentence)


class TrainingClock:
    """What the edited file may know of the clock. The harness keeps start and stop for itself."""

    __slots__ = ()

    @property
    def budget(self):
        """Seconds of training."""
        return this_run.clock.budget

    def elapsed(self):
        """Seconds of training so far; 0 before the first batch."""
        return this_run.clock.elapsed()

    def tick(self):
        """To be called at the end of every step; returns elapsed()."""
        return this_run.clock.tick()


def finish(lines, facts, figures):
    """Prints the stamped block and writes the run's record. lines: {key: text} of the block, in order; facts: fields of
    the record; figures: what else is shown or drawn. The score is printed first, so that nothing that fails later loses
    it."""
    print("---")
    for key, text in lines.items():
        print(f"{key + ':':<17} {text}")
    sys.stdout.flush()
    run = this_run
    if run.record is None:
        print(f"{'verdict:':<17} none (guard() was not around main(), so this run has no record)", flush=True)
        return
    add_doubts()
    figures = {**figures, **step_figures(run.clock)}
    score = {"score": round(float(run.score), 6), "fail": None, "others": run.clock.used_by_others()}
    end_record(replace(run.record, **facts, **score, why_not=list(run.doubts), figures=plain(figures)))


def end_record(record):
    """Overwrites this run's record, the only time that this is done. Where the disk is full it goes into the temporary
    folder, and that is said."""
    run = this_run
    run.ended = True
    with audit.harness_only():
        try:
            write_record(run.path.parent, record)
        except OSError as error:
            spare = Path(tempfile.gettempdir())
            write_record(spare, record)
            print(
                f"the record could not be written ({error.strerror}); it is {spare / record.name}: copy it to {run.path}"
            )


def plain(value):
    """A figure as JSON has it: numbers of numpy and torch become Python's, what is no number becomes text."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def step_figures(clock):
    """Seconds and steps, as the clock saw them."""
    steps = sorted(clock.steps)
    figures = {"seconds": round(clock.elapsed(), 2), "total_seconds": round(time.monotonic() - STARTED, 1)}
    if clock.started is not None:
        figures["startup"] = round(clock.started - STARTED, 1)
    if steps:
        figures["ticks"] = len(steps)
        figures["tick_median"] = round(steps[len(steps) // 2], 5)
        figures["tick_p90"] = round(steps[len(steps) * 9 // 10], 5)
    return figures


def add_doubts():
    """What only the end of a run can show."""
    clock, experiment = this_run.clock, this_run.experiment
    if clock.started is None:
        doubt("no training batch was drawn")
    if clock.overrun() > 0:
        doubt(f"the budget was overrun by {clock.overrun():.1f} s")
    for name in audit.broken_seals():
        doubt(f"{name} was replaced while the run went on")
    if experiment.script == "train.py":
        known = (experiment.script, *experiment.edits, *experiment.frozen)
        for name in audit.borrowed_modules(experiment.folder, known):
            doubt(f"{name} was imported; all of an experiment stands in {experiment.edited}")


# -- the child: the script itself


def guard(body, lock_key, experiment=None):
    """Runs body() as the one run on its device. lock_key: a function that names the device. Exits with 0 after a score,
    else with 1. A script that was started by hand is handed over to a supervisor first."""
    script = Path(sys.modules["__main__"].__file__).resolve()
    if RECORD not in os.environ:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, str(Path(__file__).parent), "supervise", str(script)])
    end_with_parent()
    try:
        begin(experiment or Experiment(script.parent), Path(os.environ.pop(RECORD)))
        lock = take_device(lock_key())  # held while this frame lives
        body()
        require(this_run.ended, "the run ended without a score; call evaluate_bpb and print_summary", "error")
        lock.close()
    except BaseException as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not end the ending
        kind, sentence = failure(error)
        sys.stdout.flush()
        if this_run.record and not this_run.ended:
            fail = {"kind": kind, "sentence": sentence}
            figures = step_figures(this_run.clock)
            end_record(replace(this_run.record, fail=fail, why_not=list(this_run.doubts), figures=figures))
        sys.exit(1)


def begin(experiment, path):
    """Takes over the record that the supervisor wrote, and looks at the edited files."""
    run = this_run
    run.experiment = experiment
    run.path = path
    run.record = parse_record(path.read_bytes())
    run.doubts += run.record.why_not
    for sentence in lint_edits(experiment):
        doubt(sentence)
    audit.watch([path.parent], "the harness's records were written past it", doubt)


def lint_edits(experiment):
    """What the edited Python files must not do, as sentences with line numbers."""
    doors = {}
    for name in experiment.frozen:
        path = experiment.folder / name
        text = path.read_text("utf-8", errors="replace") if path.suffix == ".py" and path.is_file() else ""
        names = re.search(r"^__all__ = \[([^]]*)\]", text, re.MULTILINE)
        if names:
            doors[path.stem] = set(re.findall(r"\w+", names[1]))
    sentences = []
    for name, data in edits_on_disk(experiment).items():
        for line, sentence in lint(data, doors) if name.endswith(".py") and data else ():
            sentences.append(f"{name} line {line}: {sentence}")
    return sentences


def take_device(key):
    """Locks a device for this user on this machine; returns the open lock file. RefereeError where another run has it."""
    safe = re.sub(r"[^\w.-]", "_", key)
    lock, ours = try_lock(Path(tempfile.gettempdir()) / f"autoresearch-{os.getuid()}-{safe}.lock")
    lock.seek(0)
    holder = lock.read()
    require(ours, f"process {holder} is using {key}; wait for it or end it, then run again", "busy")
    lock.truncate(0)
    print(os.getpid(), end="", file=lock, flush=True)
    return lock


def failure(error):
    """(kind, sentence) for what ended a run; prints the traceback of what nobody foresaw."""
    text = " ".join(str(error).split())
    if isinstance(error, RefereeError):
        return error.kind, text
    if isinstance(error, FloatingPointError):
        return "nan", f"{text}; lower a learning rate and run again"
    if is_out_of_memory(error):
        return "oom", f"{text.split('. ')[0]}; lower the micro-batch or the model and run again"
    if isinstance(error, KeyboardInterrupt):
        return "preempted", "ended early by Ctrl-C; run it again"
    if isinstance(error, SystemExit):
        return "error", f"it called exit ({text or 'no status'}) before there was a score"
    traceback.print_exception(error)
    return "error", f"{type(error).__name__}: {text}; the traceback above says where"


def is_out_of_memory(error):
    """CUDA runs out of memory in more ways than one, and torch's allocator of a CPU has words of its own."""
    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def end_with_parent():
    """Linux: this process is killed when its supervisor is, so that no run goes on without a limit."""
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)


# -- any metric


def measure(function, *, metric, edits, frozen=(), lower_is_better=True, perfect=None, budget=300):
    """Runs function() as an experiment, as the last statement of a ruler.py:

        if __name__ == "__main__":
            referee.measure(render_time, metric="seconds", edits=["engine.py"], frozen=["pages"], budget=60)

    function() returns the score, or the score and a dict of further figures, which are printed and recorded; it may run
    any command, so the edited files may be of any language. edits: the files that an experiment may change; frozen: files
    and folders that decide the score besides the ruler (tests, data): all are hashed into the fingerprint, so that a
    changed test is another table and never an improvement. perfect: a score that cannot be bettered, which ends the
    night. Paths are relative to the ruler's folder, which must lie in a git repository; the arguments are written out as
    literals, since the commands read them without running the ruler. budget: seconds from the start after which the run
    is a FAIL: timeout. A score that is no finite number, or an exception, ends in a FAIL line too; RefereeError says why
    in words of your own."""
    folder = Path(sys.modules["__main__"].__file__).resolve().parent

    def body():
        harness = fingerprint(this_run.experiment)
        clock = this_run.clock
        clock.start()
        this_run.score, figures = scored(function())
        clock.stop()
        shown = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in figures.items()}
        lines = {metric: f"{this_run.score:.6f}", "seconds": f"{clock.elapsed():.1f}", **shown}
        lines |= {"seed": SEED, "device": cpu_name(), "harness": harness}
        finish(lines, {"harness": harness, "device": cpu_name()}, {"shown": figures})

    this_run.clock.budget = budget
    try:
        experiment = ruled_experiment(folder, metric, edits, frozen, lower_is_better, perfect, budget)
    except RefereeError as error:
        sys.exit(f"\nFAIL: {error.kind}: {error}")  # nothing is written
    guard(body, lambda: f"ruler-{re.sub('[^A-Za-z0-9]', '_', str(folder))[-80:]}", experiment)


def scored(result):
    """(score, figures) of what a ruler's function returned."""
    score, figures = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    score = score.item() if hasattr(score, "item") else score
    number = isinstance(score, (int, float)) and not isinstance(score, bool)
    require(number, f"the ruler returned {score!r}, which is no number; let its function return a float", "error")
    require(math.isfinite(score), f"the score is {score}; let the ruler return a finite number", "nan")
    require(isinstance(figures, dict), "the ruler's figures are no dict; return (score, {name: value})", "error")
    return float(score), plain(figures)
