"""The reference recipe, as knobs: the public baseline that the shipped recipe is measured against; and real runs of both."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = dict(
    window_pattern="SSSL",
    short_window=1 / 2,
    rope_base=10_000.0,
    qk_scale=1.0,
    matrix_scale=1.0,
    x0_init=0.1,
    batch_tokens=2**19,
    micro_tokens=2**18,
    embedding_lr=0.6,
    value_embedding_lr=0.6,
    head_lr=0.004,
    muon_momentum_steps=300,
    embedding_decay=0.0,
    value_embedding_decay=0.0,
    head_decay=0.0,
    warmdown=0.5,
    final_lr=0.0,
)
ON_CPU = dict(  # what the first release changed of it for a CPU, and what the CPU tier has added since
    window_pattern="L",
    softcap=15.0,
    batch_tokens=2**13,
    micro_tokens=2**13,
    adam_betas=(0.8, 0.95),
    muon_momentum_steps=100,
    ngram_rows=(),
    taps=0,
)
ARMS = {"reference": REFERENCE, "shipped": {}}


def arm_source(arm, on_cpu):
    """train.py with the knobs of an arm laid over its tier."""
    knobs = {**REFERENCE, **ON_CPU} if on_cpu and arm == "reference" else ARMS[arm]
    text = (ROOT / "train.py").read_text(encoding="utf-8")
    changed, count = re.subn(r"Knobs\(\*\*TIERS\[tier\]\)", f"Knobs(**{{**TIERS[tier], **{knobs!r}}})", text)
    assert count == 1, f"train.py builds its knobs in {count} places"
    return changed


def abba(arms, seeds):
    """[(arm, seed), ...]: every other seed in reversed order, so that a drift of the machine hits all arms alike."""
    orders = [arms, arms[::-1]]
    return [(arm, seed) for n, seed in enumerate(seeds) for arm in orders[n % 2]]


def run(arm, seed, seconds, scratch, core=None):
    """A run of its own, on one core where that is given; {figure of its record: number}. RuntimeError: the end of its log.
    scratch: a folder that keeps the compile cache."""
    folder = Path(scratch) / f"{arm}-{seed}"
    folder.mkdir()
    shutil.copy(ROOT / "prepare.py", folder)
    shutil.copytree(ROOT / "referee", folder / "referee")
    (folder / "train.py").write_text(arm_source(arm, core is not None), encoding="utf-8")
    changes = {"SEED": str(seed), "TIME_BUDGET": str(seconds), "TMPDIR": str(folder)}  # a lock of its own
    changes["TORCHINDUCTOR_CACHE_DIR"] = f"{scratch}/inductor"
    pin = [] if core is None else ["taskset", "-c", str(core)]
    with open(folder / "run.log", "w") as log:
        command = [*pin, sys.executable, "train.py"]
        environment = {**os.environ, **changes}
        done = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{arm}, seed {seed}: {(folder / 'run.log').read_text()[-2000:]}")
    (path,) = folder.glob("runs/*.json")
    record = json.loads(path.read_text())
    figures = record["figures"]
    figures["val_bpb"] = record["score"]
    figures["tokens_s"] = figures["tokens"] / figures["seconds"]
    return {key: value for key, value in figures.items() if isinstance(value, (int, float))}


def show(results, keys):
    """Prints the mean and, of several runs, the sd of each key, an arm a line; and how the arms compare with the first.
    results: {arm: [what run() gave, ...]}."""
    first = next(iter(results))
    for arm, runs in results.items():
        cells = []
        for key in keys:
            values = [each[key] for each in runs if key in each]
            sd = f" (sd {statistics.stdev(values):.4g})" if len(values) > 1 else ""
            cells.append(f"{key} {statistics.fmean(values):.6g}{sd}" if values else f"{key} n/a")
        print(f"{arm}, {len(runs)} runs: {', '.join(cells)}")
        pairs = [a["val_bpb"] / b["val_bpb"] for a, b in zip(runs, results[first])]
        if arm != first:
            sd = f", sd {statistics.stdev(pairs):.4f}" if len(pairs) > 1 else ""
            print(f"{arm} / {first}: val_bpb x {statistics.fmean(pairs):.4f}{sd}")
