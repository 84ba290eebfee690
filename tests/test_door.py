"""The door as files in the wild use it: a train.py of its own, in a process, on the real harness; and the device."""

import json
import os
import re
import subprocess
import textwrap

import pytest
from test_metric import Bigram, score
from test_packing import loader
from zygote import run_script

from referee import base

HEAD = """
import os, sys, time, numpy, torch, prepare
from prepare import MAX_SEQ_LEN, SEED, TIME_BUDGET, PrepareError, Tokenizer
from prepare import clock, evaluate_bpb, guard, make_dataloader, print_summary

class Bigram(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(512, 512)

    def forward(self, ids):
        return self.table(ids)

def train(seconds=0.2, seed=SEED):
    torch.manual_seed(seed)
    tokenizer = Tokenizer.from_directory()
    loader, model = make_dataloader(tokenizer, 2, MAX_SEQ_LEN, "train"), Bigram()
    next(loader)
    while clock.tick() < seconds:
        next(loader)
        time.sleep(0.01)
    return model, tokenizer

def finish(model, tokenizer):
    evaluate_bpb(model, tokenizer, 8)
    print_summary(torch.tensor(7), numpy.int64(12_345_678), torch.tensor(50_332_176.0), 8, numpy.float32(0.398))

def main():
"""
KEYS = ["val_bpb", "training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent", "total_tokens_M", "num_steps"]
KEYS += ["num_params_M", "depth", "epochs", "attention", "tier", "seed", "dataset", "device", "harness"]


@pytest.fixture
def run(project, small_home, tmp_path):
    """run(body of main() in a train.py) -> (exit status, output, record or None), committed before it runs."""

    def go(body, call="guard(main)", **env):
        text = f"{HEAD}{textwrap.indent(textwrap.dedent(body), '    ')}\nif __name__ == '__main__':\n    {call}\n"
        (project / "train.py").write_text(text)
        subprocess.run(["git", "commit", "-qam", "an idea"], cwd=project, check=True)
        env = {**os.environ, "AUTORESEARCH_HOME": str(small_home), "TIME_BUDGET": "1", "TMPDIR": str(tmp_path)} | env
        status = run_script("train.py", project, env, project / "run.log")
        (record,) = [json.loads(path.read_text()) for path in (project / "runs").glob("*.json")]
        return status, (project / "run.log").read_text(), record

    return go


def block(log):
    lines = log[log.index("---\n") + 4 :].rstrip("\n").splitlines()
    return dict(re.fullmatch(r"(\w+): +(\S.*)", line).groups() for line in lines)


def test_a_run_that_ends_well(run, project):
    status, log, record = run("finish(*train())", AUDIT="1")
    assert status == 0, log
    values = block(log)
    assert list(values) == [*KEYS, "audit_bpb", "verdict"]
    assert [values[key] for key in KEYS[3:9]] == ["n/a", "39.80", "12.3", "7", "50.3", "8"]
    assert values["verdict"].startswith("baseline")
    assert values["val_bpb"] == f"{record['score']:.6f}"
    assert values["audit_bpb"] == f"{record['audit']:.6f}"
    assert record["harness"] == values["harness"]
    assert record["device"] == values["device"]
    assert record["why_not"] == []
    assert record["figures"]["steps"] == 7
    assert record["figures"]["ticks"] > 3
    assert subprocess.run(["git", "status", "--porcelain"], cwd=project, capture_output=True).stdout == b""


DOUBTS = {  # what main() does: what the verdict says
    "torch.nn.functional.cross_entropy = min\nfinish(*train(1.5, seed=1))": ("cross_entropy", "seed", "overrun by 0."),
    "torch.manual_seed(SEED)\nfinish(Bigram(), Tokenizer.from_directory())": ("no training batch was drawn",),
}


@pytest.mark.parametrize("body, reasons", DOUBTS.items())
def test_a_run_that_may_not_be_compared_says_why(run, body, reasons):
    status, log, record = run(body)
    assert status == 0, log
    verdict = block(log)["verdict"]
    assert verdict.startswith("none (")
    for reason in reasons:
        assert reason in verdict
    assert len(record["why_not"]) == len(reasons)


FAILURES = {  # what main() does: kind and words of the FAIL line
    "raise PrepareError('nothing is prepared')": ("harness", "nothing is prepared"),
    "pass": ("error", "without a score"),
    "print_summary(1, 1, 1, 1)": ("harness", "evaluate_bpb"),
    "finish(lambda ids: 0.0 / torch.zeros(*ids.shape, 512), Tokenizer.from_directory())": ("nan", "NaN"),
}


@pytest.mark.parametrize("body", FAILURES)
def test_a_failed_run_ends_with_one_line(run, body):
    kind, said = FAILURES[body]
    status, log, record = run(body)
    last = log.rstrip("\n").splitlines()[-1]
    assert status == 1
    assert last.startswith(f"FAIL: {kind}: ")
    assert said in last
    assert "---\n" not in log
    assert record["fail"]["kind"] == kind


def test_a_public_train_runs_without_guard(run):
    """The public project's use of the door: no guard, its own summary, evaluation under autocast."""
    body = """
        from prepare import EVAL_TOKENS
        model, tokenizer = train()
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            print(f"val_bpb:          {evaluate_bpb(model, tokenizer, 8):.6f}", MAX_SEQ_LEN, TIME_BUDGET, EVAL_TOKENS)
        """
    log = run(body, call="main()")[1]
    assert re.search(r"val_bpb: +\d\.\d{6} 64 1 4096\n", log)
    assert "verdict" not in log


def test_a_summary_without_a_score_or_a_record(small, capsys):
    with pytest.raises(small.PrepareError, match="no score yet; call evaluate_bpb"):
        small.print_summary(7, 12_345_678, 50_332_176, 8)
    next(loader(small, 8))
    value = score(small, Bigram())
    small.print_summary(num_steps=7, total_tokens=12_345_678, num_params=50_332_176, depth=8)
    lines = block(capsys.readouterr().out)
    assert list(lines) == [*KEYS, "verdict"]
    assert lines["val_bpb"] == f"{value:.6f}"
    assert lines["epochs"] == f"{8 * 65 / small.dataset_in_use().meta['splits']['train']['tokens']:.2f}"
    assert lines["harness"] == small.fingerprint(small.dataset_in_use().meta, small.own_code())
    assert lines["verdict"].startswith("none (guard() was not around main()")


# -- the device


def no_gpu(said):
    def raises():
        raise RuntimeError(said)

    return {"is_available": lambda: False, "init": raises}


def gpu(major, minor):
    answers = {"is_available": True, "get_device_capability": (major, minor), "get_device_name": "Some GPU"}
    answers["get_arch_list"] = ["sm_75", "sm_90a", "compute_90"]
    return {name: lambda *_, answer=answer: answer for name, answer in answers.items()}


OLD = "The NVIDIA driver on your system is too old (found version 12080). Please update your GPU driver"
DEVICES = {  # what: (what torch.cuda says, CUDA_VISIBLE_DEVICES, the key of the lock or words of the refusal)
    "an old driver": (no_gpu(OLD), "0", "too old.*R580.*CUDA 13"),
    "an old driver, hidden": (no_gpu(OLD), "", "cpu"),
    "an old GPU": (gpu(6, 1), "0", r"no kernels for Some GPU \(sm_61\), only for sm_75"),
    "a slice": (gpu(9, 0), "MIG-77,MIG-78", "MIG-77"),
}


@pytest.mark.parametrize("cuda, visible, wanted", DEVICES.values(), ids=DEVICES)
def test_a_gpu_that_torch_cannot_use_is_no_silent_night(small, monkeypatch, cuda, visible, wanted):
    for name, answer in cuda.items():
        monkeypatch.setattr(small.torch.cuda, name, answer)
    monkeypatch.setattr(small.torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if wanted.startswith(("cpu", "MIG")):
        assert small.lock_key().startswith(wanted)
    else:
        with pytest.raises(small.PrepareError, match=wanted):
            small.lock_key()


@pytest.mark.parametrize("cores, key", [({3, 1}, "cpu-1-3"), (set(range(8)), "cpu")])
def test_slots_of_one_processor_lock_their_own_cores(monkeypatch, cores, key):
    monkeypatch.setattr(base.os, "sched_getaffinity", lambda pid: cores, raising=False)
    monkeypatch.setattr(base.os, "cpu_count", lambda: 8)
    assert base.cpu_key() == key
