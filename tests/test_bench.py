"""Timings of feeding, for a person: uv run pytest -m bench -s
BENCH_TEXT names a folder of parquet or text files; without it the built-in python corpus is used."""

import os
import time

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
                    buffer += tokenizer.encode(texts[at:at + 128], prepend=bos)
                    at = (at + 128) % len(texts)
                room, best, size = T + 1 - pos, -1, 0
                for i, document in enumerate(buffer):
                    if size < len(document) <= room:
                        best, size = i, len(document)
                if best < 0:
                    best = min(range(len(buffer)), key=lambda i: len(buffer[i]))
                document = buffer.pop(best)[:room]
                row[pos:pos + len(document)] = torch.tensor(document)
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
    print(f"opening {1e3 * opening:.0f} ms; {TOKENS:,} tokens: median {np.median(times):.2f} ms, "
          f"min {min(times):.2f}, max {max(times):.2f} ({ours / 1e6:.0f}M tokens/s)")

    tokens, lengths = np.fromfile(folder / "train.tokens", "<u2"), np.fromfile(folder / "train.docs", "<u4")
    parts = np.split(tokens, np.cumsum(lengths)[:6400 - 1])[:6400]
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
