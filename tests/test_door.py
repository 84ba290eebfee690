"""The door as files in the wild use it: a train.py of its own, in a process, on the real harness."""

import json
import os
import re
import subprocess
import textwrap

import pytest
from zygote import run_script

HEAD = """
import os, sys, time, torch, prepare
from prepare import MAX_SEQ_LEN, SEED, TIME_BUDGET, PrepareError, Tokenizer
from prepare import clock, evaluate_bpb, guard, make_dataloader, print_summary

class Bigram(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(512, 512)

    def forward(self, ids):
        return self.table(ids)

def train(seconds=0.2, seed=None):
    torch.manual_seed(SEED if seed is None else seed)
    tokenizer = Tokenizer.from_directory()
    loader, model = make_dataloader(tokenizer, 2, MAX_SEQ_LEN, "train"), Bigram()
    next(loader)
    while clock.tick() < seconds:
        next(loader)
        time.sleep(0.01)
    return model, tokenizer

def finish(model, tokenizer, **kw):
    evaluate_bpb(model, tokenizer, 8)
    print_summary(num_steps=7, total_tokens=12_345_678, num_params=50_332_176, depth=8, **kw)
"""
KEYS = ["val_bpb", "training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent", "total_tokens_M", "num_steps"]
KEYS += ["num_params_M", "depth", "epochs", "attention", "tier", "seed", "dataset", "device", "harness"]
FORM = (
    r"^---\nval_bpb:          \d+\.\d{6}\ntraining_seconds: 0\.\d\ntotal_seconds:    \d+\.\d\n"
    r"peak_vram_mb:     n/a\nmfu_percent:      n/a\ntotal_tokens_M:   12\.3\nnum_steps:        7\n"
    r"num_params_M:     50\.3\ndepth:            8\n"
)


@pytest.fixture
def run(project, small_home, tmp_path):
    """run(body of a train.py) -> (exit status, output), committed before it runs."""

    def go(body, call="guard(main, grace=30)", **env):
        text = f"{HEAD}{textwrap.dedent(body)}\nif __name__ == '__main__':\n    {call}\n"
        (project / "train.py").write_text(text)
        subprocess.run(["git", "commit", "-qam", "an idea"], cwd=project, check=True)
        (tmp_path / "locks").mkdir(exist_ok=True)
        full = {
            **os.environ,
            "AUTORESEARCH_HOME": str(small_home),
            "TIME_BUDGET": "1",
            "TMPDIR": str(tmp_path / "locks"),
        }
        status = run_script("train.py", project, full | env, project / "run.log")
        return status, (project / "run.log").read_text()

    return go


def block(log):
    lines = log[log.index("---\n") + 4 :].rstrip("\n").splitlines()
    return dict(re.fullmatch(r"(\w+): +(\S.*)", line).groups() for line in lines)


def records(project):
    return [json.loads(path.read_text()) for path in sorted((project / "runs").glob("*.json"))]


def test_a_run_that_ends_well(run, project):
    status, log = run("def main():\n    finish(*train())")
    assert status == 0, log
    values = block(log)
    assert list(values) == [*KEYS, "verdict"]
    assert re.search(FORM, log, re.M)
    assert values["verdict"].startswith("baseline (next SEED=43; ")
    (record,) = records(project)
    assert f"{record['score']:.6f}" == values["val_bpb"]
    assert record["harness"] == values["harness"]
    assert record["device"] == values["device"]
    assert record["why_not"] == []
    assert record["ticks"] > 3
    assert subprocess.run(["git", "status", "--porcelain"], cwd=project, capture_output=True, text=True).stdout == ""


def test_audit_is_shown_when_asked(run):
    values = block(run("def main():\n    finish(*train())", AUDIT="1")[1])
    assert list(values) == [*KEYS, "audit_bpb", "verdict"]
    assert float(values["audit_bpb"]) > 0


@pytest.mark.parametrize(
    "body, reason",
    [
        ("finish(*train(seed=1))", "seed"),
        ("finish(*train(seconds=2.0))", "overrun by 1."),
        ("torch.manual_seed(SEED)\n    finish(Bigram(), Tokenizer.from_directory())", "no training batch"),
        ("next(make_dataloader(Tokenizer.from_directory(), 2, 64, 'val'))\n    finish(*train())", "val"),
        ("pair = train()\n    clock.start()\n    finish(*pair)", "clock.start() was called again"),
        (
            "import torch.nn.functional as F\n    F.cross_entropy = min\n    finish(*train())",
            "changes torch.nn.functional",
        ),
    ],
)
def test_a_run_that_may_not_be_compared_says_why(run, project, body, reason):
    status, log = run(f"def main():\n    {body}")
    assert status == 0, log
    assert block(log)["verdict"].startswith("none (")
    assert reason in block(log)["verdict"]
    assert reason in "; ".join(records(project)[0]["why_not"])


@pytest.mark.parametrize(
    "body, kind, said",
    [
        ("raise PrepareError('nothing is prepared')", "harness", "nothing is prepared"),
        ("raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate')", "oom", "out of memory"),
        ("pass", "error", "without a score"),
        ("print_summary(1, 1, 1, 1)", "harness", "evaluate_bpb"),
        (
            "finish(lambda ids: torch.nn.functional.one_hot(ids.flip(1), 512).float(), Tokenizer.from_directory())",
            "harness",
            "future",
        ),
        (
            "finish(lambda ids: torch.full((*ids.shape, 512), float('nan')), Tokenizer.from_directory())",
            "nan",
            "NaN",
        ),
    ],
)
def test_a_failed_run_ends_with_one_line(run, project, body, kind, said):
    status, log = run(f"def main():\n    {body}")
    last = log.rstrip("\n").splitlines()[-1]
    assert status == 1
    assert last.startswith(f"FAIL: {kind}: ")
    assert said in last
    assert "---\n" not in log
    assert records(project)[0]["fail"]["kind"] == kind


def test_a_public_train_runs_without_guard(run, project):
    """The public project's use of the door: no guard, its own summary, evaluation under autocast."""
    body = """
        from prepare import EVAL_TOKENS

        def main():
            model, tokenizer = train()
            model.eval()
            with torch.autocast("cpu", torch.bfloat16):
                print(f"val_bpb:          {evaluate_bpb(model, tokenizer, 8):.6f}", MAX_SEQ_LEN, TIME_BUDGET, EVAL_TOKENS)
        """
    status, log = run(body, call="main()")
    assert status == 0, log
    assert re.search(r"val_bpb: +\d\.\d{6} 64 1 4096", log)
    assert "verdict" not in log
    assert records(project) == []
