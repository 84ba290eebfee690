"""Clock, guard, watchdog, summary and runs.jsonl, most of them in processes of their own with a stand-in train.py."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from prepare import Clock
from zygote import run_script

HEAD = """
import os, sys, time, torch, prepare
from prepare import SEED, Tokenizer, clock, evaluate_bpb, guard, make_dataloader, print_summary, PrepareError
class Bigram(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(512, 512)
    def forward(self, ids):
        return self.table(ids)
def train(seconds=0.2, seed=None):
    torch.manual_seed(SEED if seed is None else seed)
    tokenizer = Tokenizer.from_directory()
    loader, model = make_dataloader(tokenizer, 2, prepare.MAX_SEQ_LEN, "train"), Bigram()
    next(loader)
    while clock.tick() < seconds:
        next(loader)
        time.sleep(0.01)
    return model, tokenizer
def finish(model, tokenizer, **kw):
    evaluate_bpb(model, tokenizer, 8)
    print_summary(num_steps=7, total_tokens=12_345_678, num_params=50_332_176, depth=8, **kw)
"""

NINE = [
    "val_bpb",
    "training_seconds",
    "total_seconds",
    "peak_vram_mb",
    "mfu_percent",
    "total_tokens_M",
    "num_steps",
    "num_params_M",
    "depth",
]
REST = ["epochs", "attention", "tier", "seed", "dataset", "device", "harness"]


# -- the clock, fed ticks


def ticked(budget, *ticks, start=50.0):
    clock = Clock(budget)
    clock.start(now=start)
    for tick in ticks:
        clock.tick(now=start + tick)
    clock.stop(now=start + ticks[-1])
    return clock


def test_clock_counts_from_its_start_to_its_stop():
    clock = Clock(300)
    assert clock.elapsed(now=5) == 0.0
    clock.start(now=100)
    assert clock.elapsed(now=130.5) == 30.5 and clock.tick(now=131) == 31
    clock.stop(now=160)
    assert clock.elapsed(now=999) == 60


@pytest.mark.parametrize(
    "ticks, over",
    [
        ((1, 2, 300.9), 0.0),  # within 2 %
        ((100, 200, 299, 306.0), 0.0),  # 2 % exactly, past every step's end
        ((5, 299, 306.1), 6.1 - 6.1),  # shorter than the longest step (294 s)
        ((*range(1, 300), 306.5), 6.5),  # longer than 2 % and than every step that ended inside the budget
        ((*range(10, 300, 10), 310.5), 10.5),
        ((*range(10, 300, 10), 309.5), 0.0),
    ],
)
def test_overrun_is_what_exceeds_the_longest_step_and_two_percent(ticks, over):
    assert ticked(300, *ticks).overrun() == pytest.approx(over)


def test_time_that_was_never_ticked_is_an_overrun():
    clock = Clock(10)
    clock.start(now=0)
    for n in range(1, 11):
        clock.tick(now=n)
    clock.stop(now=15)  # five more seconds of training after the loop
    assert clock.overrun() == 5


# -- runs in a process


@pytest.fixture
def run(project, small_home, tmp_path):
    def go(body, budget=1, grace=30, wait=True, head=HEAD, commit=False, **env):
        text = head + textwrap.dedent(body) + f"\nif __name__ == '__main__':\n    guard(main, grace={grace})\n"
        (project / "train.py").write_text(text)
        if commit:
            subprocess.run(["git", "commit", "-qam", "an idea"], cwd=project, check=True)
        (tmp_path / "locks").mkdir(exist_ok=True)
        full = {
            **os.environ,
            "AUTORESEARCH_HOME": str(small_home),
            "TIME_BUDGET": str(budget),
            "TMPDIR": str(tmp_path / "locks"),
            **env,
        }
        if wait:
            return run_script("train.py", project, full, project / "run.log"), (project / "run.log").read_text()
        with open(project / "run.log", "w") as log:
            return subprocess.Popen(
                [sys.executable, "train.py"], cwd=project, env=full, stdout=log, stderr=subprocess.STDOUT
            )

    return go


def last(log):
    return log.rstrip("\n").splitlines()[-1]


def block(log):
    lines = log[log.index("---\n") + 4 :].rstrip("\n").splitlines()
    return dict(re.fullmatch(r"(\w+): +(\S.*)", line).groups() for line in lines)


def test_a_run_that_ends_well(run, project):
    status, log = run("def main(): finish(*train())", commit=True)
    assert status == 0, log
    values = block(log)
    assert list(values) == NINE + REST + ["verdict"]
    assert re.search(
        r"^---\nval_bpb:          \d+\.\d{6}\ntraining_seconds: 0\.\d\ntotal_seconds:    \d+\.\d\n"
        r"peak_vram_mb:     n/a\nmfu_percent:      n/a\ntotal_tokens_M:   12\.3\nnum_steps:        7\n"
        r"num_params_M:     50\.3\ndepth:            8\n",
        log,
        re.M,
    )
    assert (
        values["seed"] == "42"
        and values["dataset"] == "local"
        and values["verdict"].startswith("baseline (next SEED=43; ")
    )
    (record,) = map(json.loads, (project / "runs.jsonl").read_text().splitlines())
    commit = subprocess.run(
        ["git", "rev-parse", "--short=7", "HEAD"], cwd=project, capture_output=True, text=True
    ).stdout.strip()
    assert record["commit"] == commit and not record["dirty"] and record["seed"] == 42 and record["why_not"] == ""
    assert f"{record['val_bpb']:.6f}" == values["val_bpb"] and record["harness"] == values["harness"]
    assert record["device"] == values["device"] and 0.1 < record["seconds"] < 2
    assert "budget: 1 s instead of 300" in log
    git = subprocess.run(["git", "status", "--porcelain"], cwd=project, capture_output=True, text=True).stdout
    assert git == ""  # use leaves nothing


def test_runs_jsonl_survives_a_torn_line(run, project):
    (project / "runs.jsonl").write_text('{"time": "whole"}\n{"time": "tor')
    assert run("def main(): finish(*train())")[0] == 0
    lines = (project / "runs.jsonl").read_text().split("\n")
    assert (
        lines[:2] == ['{"time": "whole"}', '{"time": "tor'] and json.loads(lines[2])["seed"] == 42 and lines[3:] == [""]
    )


def test_audit_is_shown_when_asked(run):
    assert "audit_bpb" not in run("def main(): finish(*train())")[1]
    values = block(run("def main(): finish(*train())", AUDIT="1")[1])
    assert list(values) == NINE + REST + ["audit_bpb", "verdict"] and float(values["audit_bpb"]) > 0


def test_what_train_says_of_itself_is_not_asked():
    import inspect

    import prepare

    assert not {"val_bpb", "score", "seconds", "training_seconds"} & set(
        inspect.signature(prepare.print_summary).parameters
    )


@pytest.mark.parametrize(
    "body, reason",
    [
        ("def main(): finish(*train(seed=1))", "seed"),
        ("def main(): finish(*train(seconds=2.0))", "overrun by 1."),
        (
            "def main():\n    torch.manual_seed(SEED)\n    finish(Bigram(), Tokenizer.from_directory())",
            "no training batch",
        ),
        (
            "def main():\n    next(make_dataloader(Tokenizer.from_directory(), 2, 64, 'val'))\n    finish(*train())",
            "validation rows",
        ),
    ],
)
def test_a_run_that_may_not_be_compared_says_why(run, project, body, reason):
    status, log = run(body)
    assert status == 0 and reason in block(log)["verdict"]
    assert reason in json.loads((project / "runs.jsonl").read_text())["why_not"]


def test_seed_comes_from_the_environment(run):
    status, log = run("def main(): finish(*train())", SEED="43")
    assert block(log)["seed"] == "43" and block(log)["verdict"] == "none (train.py is in no commit; commit it first)"


@pytest.mark.parametrize(
    "body, kind, said",
    [
        ("def main(): raise PrepareError('nothing is prepared')", "harness", "nothing is prepared"),
        ("def main(): raise FloatingPointError('the loss was nan at step 12')", "nan", "step 12"),
        ("def main(): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate')", "oom", "out of memory"),
        ("def main(): raise MemoryError()", "oom", "micro-batch"),
        ("def main(): raise KeyError('x\\ny')", "error", "KeyError"),
        ("def main(): sys.exit(0)", "error", "ended early"),
        ("def main(): pass", "error", "without a score"),
        ("def main(): print_summary(1, 1, 1, 1)", "harness", "evaluate_bpb"),
        (
            "def main(): finish(lambda ids: torch.full((*ids.shape, 512), float('nan')), Tokenizer.from_directory())",
            "nan",
            "NaN",
        ),
        (
            "def main(): finish(lambda ids: torch.nn.functional.one_hot(ids.flip(1), 512).float(), Tokenizer.from_directory())",
            "harness",
            "future",
        ),
    ],
)
def test_a_failed_run_ends_with_one_line(run, project, body, kind, said):
    status, log = run(body)
    assert status == 1 and re.match(rf"FAIL: {kind}: \S", last(log)) and said in last(log), log
    assert log.count("FAIL:") == 1 and "---\n" not in log and not (project / "runs.jsonl").exists()
    assert ("Traceback" in log) == (said == "KeyError")


@pytest.mark.parametrize(
    "env", [{"SEED": "abc"}, {"SEED": "-1"}, {"TIME_BUDGET": "0"}, {"TIME_BUDGET": "5m"}, {"TIME_BUDGET": ""}]
)
def test_malformed_variables_are_refused(run, env):
    budget = env.pop("TIME_BUDGET", "1")
    status, log = run("def main(): finish(*train())", budget=budget, **env)
    assert status == 1 and last(log).startswith("FAIL: harness: ") and "whole number" in last(log)


def test_sigterm_is_a_failed_run(run, project):
    process = run("def main():\n    print('up', flush=True)\n    time.sleep(60)", wait=False)
    while "up" not in (project / "run.log").read_text():
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=20) == 1 and last((project / "run.log").read_text()).startswith(
        "FAIL: error: ended early"
    )


def test_device_is_taken_once(run, project):
    first = run("def main():\n    print('up', flush=True)\n    time.sleep(60)", wait=False)
    while "up" not in (project / "run.log").read_text():
        time.sleep(0.05)
    began = time.monotonic()
    status, log = run("def main(): finish(*train())")
    assert status == 1 and last(log).startswith("FAIL: busy: ") and str(first.pid) in last(log)
    assert time.monotonic() - began < 20
    first.kill()
    first.wait()
    assert run("def main(): finish(*train())")[0] == 0  # the lock went with its holder


@pytest.mark.parametrize("death", ["os.kill(os.getpid(), 9)", "os._exit(3)"])
def test_a_death_that_python_cannot_see_is_a_failed_run(run, project, death):
    process = run(f"def main(): {death}", wait=False)
    process.wait(timeout=30)
    until = time.monotonic() + 5
    while "FAIL" not in (project / "run.log").read_text() and time.monotonic() < until:
        time.sleep(0.05)
    assert last((project / "run.log").read_text()).startswith("FAIL: error: train.py was killed")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_watchdog_ends_a_hung_run_and_its_descendants_and_nothing_else(run, project, tmp_path):
    """The run hangs in a C call; a grandchild ignores SIGTERM, another has left its session and lost its parent."""
    scripts = {
        "stubborn": "signal.signal(signal.SIGTERM, signal.SIG_IGN); open(f'{os.getpid()}.pid', 'w'); time.sleep(99)",
        "child": "subprocess.Popen([sys.executable, 'stubborn.py']); time.sleep(99)",
        "parting": "subprocess.Popen([sys.executable, 'stubborn.py'], start_new_session=True)",
    }
    for name, text in scripts.items():
        (project / f"{name}.py").write_text(f"import os, signal, subprocess, sys, time\n{text}\n")
    process = run(
        """
        def main():
            import subprocess, ctypes
            subprocess.Popen([sys.executable, "child.py"])
            subprocess.run([sys.executable, "parting.py"])
            print("hanging", flush=True)
            ctypes.PyDLL(None).sleep(99)  # holds the interpreter lock: no thread of this process can run
        """,
        budget=1,
        grace=5,
        wait=False,
    )
    bystander = subprocess.Popen(["sleep", "60"])  # in the process group that the run inherited
    status = process.wait(timeout=40)
    log = (project / "run.log").read_text()
    assert status == -signal.SIGKILL and last(log).startswith("FAIL: timeout: "), log
    pids = [int(p.stem) for p in project.glob("*.pid")]
    time.sleep(0.2)
    assert len(pids) == 2 and not any(map(alive, pids))
    assert bystander.poll() is None
    bystander.kill()


def test_watchdog_leaves_with_the_run(run, project):
    process = run("def main():\n    print('up', flush=True)\n    time.sleep(60)", wait=False)
    while "up" not in (project / "run.log").read_text():
        time.sleep(0.05)
    children = lambda: [
        int(p)
        for p in subprocess.run(
            ["pgrep", "-f", f"_watch.{process.pid},"], capture_output=True, text=True
        ).stdout.split()
    ]
    assert len(children()) == 1
    process.kill()
    process.wait()
    for _ in range(100):
        if not children():
            break
        time.sleep(0.05)
    assert not children()


def test_without_git_nothing_breaks(run, project):
    import shutil

    shutil.rmtree(project / ".git")
    status, log = run("def main(): finish(*train())", GIT_CEILING_DIRECTORIES=str(project.parent))
    assert status == 0 and json.loads((project / "runs.jsonl").read_text())["commit"] is None
    assert block(log)["verdict"].startswith("none (") and "in no commit" in block(log)["verdict"]


def test_a_public_train_runs_without_guard(project, small_home, tmp_path):
    """The public project's use of the door: no guard, its own summary, logits without targets."""
    (project / "train.py").write_text(
        HEAD
        + textwrap.dedent("""
        from prepare import MAX_SEQ_LEN, TIME_BUDGET, EVAL_TOKENS
        model, tokenizer = train()
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            print(f"val_bpb:          {evaluate_bpb(model, tokenizer, 8):.6f}", MAX_SEQ_LEN, TIME_BUDGET, EVAL_TOKENS)
        """)
    )
    env = {**os.environ, "AUTORESEARCH_HOME": str(small_home), "TIME_BUDGET": "1"}
    done = subprocess.run([sys.executable, "train.py"], cwd=project, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"val_bpb: +\d\.\d{6} 64 1 4096", done.stdout), done.stderr
