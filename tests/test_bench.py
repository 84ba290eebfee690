"""Timings of feeding, for a person: uv run pytest -m bench -s; and tests of bench_gpu.py, which compares recipes.
BENCH_TEXT names a folder of parquet or text files; without it the built-in python corpus is used."""

import math
import os
import subprocess
import time

import bench_gpu
import numpy as np
import pytest
from conftest import fresh_run, run_prepare

TOKENS = 524_288


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    home = tmp_path_factory.mktemp("bench")
    folder = os.environ.get("BENCH_TEXT")
    args = ["--dataset", "local", "--path", folder] if folder else ["--dataset", "python"]
    done = run_prepare(*args, env={"AUTORESEARCH_HOME": str(home)})
    assert done.returncode == 0, done.stderr
    return home


@pytest.mark.bench
@pytest.mark.timeout(600)
def test_feeding(corpus, monkeypatch):
    import prepare

    monkeypatch.setenv("AUTORESEARCH_HOME", str(corpus))
    fresh_run(monkeypatch)
    T = prepare.MAX_SEQ_LEN
    tokenizer = prepare.Tokenizer.from_directory()
    loader = prepare.make_dataloader(tokenizer, TOKENS // T // 2, T, "train", device="cpu")
    times = []
    for _ in range(62):  # two micro-batches make 524,288 tokens; the first two open the files
        began = time.perf_counter()
        next(loader)
        times.append(time.perf_counter() - began)
    median = 2000 * np.median(times[2:])  # ms
    print(f"opening {1000 * times[0]:.0f} ms; {TOKENS:,} tokens: median {median:.2f} ms")
    assert median < 10


# -- bench_gpu.py: what it runs and what it prints


def test_runs_alternate():
    assert bench_gpu.abba(["a", "b"], [1, 2, 3]) == [("a", 1), ("b", 1), ("b", 2), ("a", 2), ("a", 3), ("b", 3)]


LOG = """step  1 | 1.0 of 2 s | loss 3.1000 | lr
step  2 | 2.0 of 2 s | loss 2.9000 | lr
val_bpb:          1.000000
total_seconds:    64.0
peak_vram_mb:     45056.0
mfu_percent:      n/a
num_steps:        950
epochs:           0.50
"""


def test_figures_of_a_run():
    measured = bench_gpu.figures(LOG, {"tokens": 3000, "seconds": 3.0, "startup": 50.0}, wall=66.0)
    assert math.isnan(measured.pop("mfu"))
    assert measured == {
        "tokens_s": 1000,
        "start": 52,
        "evaluation": 11,
        "val_bpb": 1,
        "memory_gb": 44,
        "epochs": 0.5,
        "steps": 950,
        "train_loss": 2.9,
    }


def test_table_compares_with_the_first_arm():
    run = dict(mfu=40.0, evaluation=9.0, memory_gb=44.0, epochs=0.5, steps=950, train_loss=2.9)
    results = {
        "reference": [run | dict(tokens_s=1000, val_bpb=bpb, start=s) for bpb, s in ((1.00, 50.0), (1.02, 10.0))],
        "current": [run | dict(tokens_s=1250, val_bpb=bpb, start=s) for bpb, s in ((0.95, 50.0), (0.97, 8.0))],
    }
    head, reference, current = (line.split() for line in bench_gpu.table(results, 3.0))
    reference = dict(zip(head, reference, strict=True))
    current = dict(zip(head, current, strict=True))
    ratio = 0.96 / 1.01
    wanted = {
        "arm": "current",
        "n": "2",
        "tokens_s": "1,250",
        "speed": "1.250",
        "mfu": "40.0",
        "cold_s": "50.0",
        "warm_s": "8.0",
        "evaluation": "9.0",
        "steps": "950",
        "val_bpb": "0.960000",
        "sd": "0.014142",
        "ratio": f"{ratio:.4f}",
        "+-": f"{ratio * math.hypot(0.01 / 0.96, 0.01 / 1.01):.4f}",
        "memory_gb": "44.0",
        "epochs": "0.50",
        "gap": f"{3 * 0.96 - 2.9:.3f}",
    }
    assert current == wanted
    assert (reference["val_bpb"], reference["ratio"], reference["+-"]) == ("1.010000", "1.0000", "0.0000")


def test_arms_borrow_knobs():
    if subprocess.run(["git", "cat-file", "-e", bench_gpu.REFERENCE], cwd=bench_gpu.ROOT).returncode:
        pytest.skip("the reference is not in this clone")
    ours = bench_gpu.knobs("current")
    assert f"'batch_tokens': {ours.batch_tokens}" in bench_gpu.arm_source("batch")
    assert bench_gpu.arm_source("reference") == bench_gpu.source("reference")
    windows = bench_gpu.arm_source("windows")
    assert f"'width': {ours.width}" in windows
    assert "'short_window'" not in windows
    assert "'short_window'" in bench_gpu.arm_source("shape")


@pytest.mark.slow
def test_bench_gpu_runs(small_home, monkeypatch, capsys):
    monkeypatch.setenv("AUTORESEARCH_HOME", str(small_home))
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    bench_gpu.compare(["reference", "current"], [42], 1)
    reference, current = capsys.readouterr().out.splitlines()[-2:]
    assert reference.startswith("reference")
    assert current.startswith("current")
    assert len(current.split()) == 16
