"""Timings of feeding, for a person: uv run pytest -m bench -s; and tests of bench_gpu.py, which compares recipes.
BENCH_TEXT names a folder of parquet or text files; without it the built-in python corpus is used."""

import math
import os
import subprocess
import time

import bench_gpu
import numpy as np
import pytest
import torch
from conftest import fresh_run, run_prepare

TOKENS = 524_288


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    home, folder = tmp_path_factory.mktemp("bench"), os.environ.get("BENCH_TEXT")
    args = ["--dataset", "local", "--path", folder] if folder else ["--dataset", "python"]
    done = run_prepare(*args, env={"AUTORESEARCH_HOME": str(home)})
    assert done.returncode == 0, done.stderr
    print(f"\n{done.stdout}")
    return home


def naive_loader(tokenizer, texts, B, T, buffer_size=1000):
    """Tokenizes as it goes, 128 documents at a time, and scans its whole buffer for every placement."""
    buffer, at, bos = [], 0, tokenizer.get_bos_token_id()
    while True:
        rows = torch.empty(B, T + 1, dtype=torch.long)
        for row in rows:
            pos = 0
            while pos < T + 1:
                while len(buffer) < buffer_size:
                    buffer += tokenizer.encode(texts[at : at + 128], prepend=bos)
                    at = (at + 128) % len(texts)
                room, best, size = T + 1 - pos, -1, 0
                for i, document in enumerate(buffer):
                    if size < len(document) <= room:
                        best, size = i, len(document)
                if best < 0:
                    best = min(range(len(buffer)), key=lambda i: len(buffer[i]))
                document = buffer.pop(best)[:room]
                row[pos : pos + len(document)] = torch.tensor(document)
                pos += len(document)
        yield rows[:, :-1], rows[:, 1:]


@pytest.mark.bench
@pytest.mark.timeout(600)
def test_feeding(corpus, monkeypatch):
    import prepare

    monkeypatch.setenv("AUTORESEARCH_HOME", str(corpus))
    fresh_run(monkeypatch)
    folder, meta = prepare._prepared()
    T, tokenizer = meta["seq_len"], prepare.Tokenizer.from_directory()
    B = TOKENS // T // 2  # two micro-batches make 524,288 tokens
    loader = prepare.make_dataloader(tokenizer, B, T, "train", device="cpu")
    began = time.perf_counter()
    next(loader)
    opening = time.perf_counter() - began
    times = []
    for _ in range(30):
        began = time.perf_counter()
        next(loader), next(loader)
        times.append(1e3 * (time.perf_counter() - began))
    ours = TOKENS / np.median(times) * 1e3
    print(
        f"opening {1e3 * opening:.0f} ms; {TOKENS:,} tokens: median {np.median(times):.2f} ms, "
        f"min {min(times):.2f}, max {max(times):.2f} ({ours / 1e6:.0f}M tokens/s)"
    )

    tokens, lengths = np.fromfile(folder / "train.tokens", "<u2"), np.fromfile(folder / "train.docs", "<u4")
    parts = np.split(tokens, np.cumsum(lengths)[: 6400 - 1])[:6400]
    texts = [tokenizer.decode(part[1:].tolist()) for part in parts]
    rows = 64 * 2048 // T
    naive = naive_loader(tokenizer, texts, rows, T)
    next(naive)  # the first fill of the buffer is not counted
    began = time.perf_counter()
    for _ in range(2):
        next(naive)
    theirs = 2 * rows * T / (time.perf_counter() - began)
    print(f"a loader that tokenizes and scans as it goes: {theirs / 1e6:.2f}M tokens/s; ratio {ours / theirs:.0f}")
    assert np.median(times) < 10 and ours / theirs >= 20


# -- bench_gpu.py: what it runs and what it prints


def figures(**changes):
    return {
        "tokens_s": 1000.0,
        "mfu": 40.0,
        "start": 50.0,
        "evaluation": 9.0,
        "val_bpb": 1.0,
        "memory_gb": 44.0,
        "epochs": 0.5,
        "steps": 950,
        "train_loss": 2.9,
        **changes,
    }


def test_runs_alternate():
    assert bench_gpu.abba(["a", "b"], [42, 43, 44]) == [
        ("a", 42),
        ("b", 42),
        ("b", 43),
        ("a", 43),
        ("a", 44),
        ("b", 44),
    ]


def test_table_compares_with_the_first_arm():
    results = {
        "reference": [figures(val_bpb=1.00), figures(val_bpb=1.02, start=10.0)],
        "current": [figures(val_bpb=0.95, tokens_s=1250.0), figures(val_bpb=0.97, tokens_s=1250.0, start=8.0)],
    }
    head, reference, current = (line.split() for line in bench_gpu.table(results, 3.0))
    cell = lambda row, name: row[head.index(name)]
    assert (cell(current, "n"), cell(current, "tokens/s"), cell(reference, "val_bpb")) == ("2", "1,250", "1.010000")
    assert (
        cell(current, "speed") == "1.250" and cell(current, "sd") == "0.014142" and cell(reference, "ratio") == "1.0000"
    )
    assert cell(current, "ratio") == f"{0.96 / 1.01:.4f}" and cell(reference, "+-") == "0.0000"
    assert cell(current, "+-") == f"{0.96 / 1.01 * math.hypot(0.01 / 0.96, 0.01 / 1.01):.4f}"
    assert (
        cell(current, "gap") == f"{3 * 0.96 - 2.9:.3f}"
        and cell(reference, "cold_s") == "50.0"
        and cell(reference, "warm_s") == "10.0"
    )


def test_arms_borrow_knobs():
    if subprocess.run(
        ["git", "cat-file", "-e", bench_gpu.REFERENCE], cwd=bench_gpu.ROOT, capture_output=True
    ).returncode:
        pytest.skip("the reference is not in this clone")
    ours, theirs = (bench_gpu.knobs(which, "cuda") for which in ("current", "reference"))
    assert (theirs.batch_tokens, theirs.window_pattern, theirs.depth) == (2**19, "SSSL", 8)
    assert f"'batch_tokens': {ours.batch_tokens}" in bench_gpu.arm_source("batch", "cuda")
    assert bench_gpu.arm_source("reference", "cuda") == bench_gpu.source("reference")
    windows = bench_gpu.arm_source("windows", "cuda")
    assert (
        "'width': 512" in windows
        and "window_pattern'" not in windows.split("class Knobs")[0]
        and "'short_window'" not in windows
    )


@pytest.mark.slow
def test_bench_gpu_runs(small_home, monkeypatch, capsys):
    monkeypatch.setenv("AUTORESEARCH_HOME", str(small_home))
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    bench_gpu.compare(["reference", "current"], [42], 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("reference") and lines[-1].startswith("current") and len(lines[-1].split()) == 16
