"""The reference recipe against the current train.py on the data in use, in one session; and where a step's time goes.

    uv run tests/bench_gpu.py                                     # 60 s, three seeds: reference, with our batch, current
    uv run tests/bench_gpu.py --seconds 300 --seeds 42 --arms reference current
    uv run tests/bench_gpu.py --arms reference shape windows      # tokens/s at the reference's model, with its windows and with ours
    uv run tests/bench_gpu.py --parts                             # milliseconds of a step's parts

It runs on a CPU too. Runs follow each other in ABBA order, each a process of its own with the current prepare.py; the compile
cache is empty at first, so an arm's first start is the cold one. The reference is the train.py of REFERENCE, from git.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = "f0e9d4f"  # the first release: the public baseline's recipe
BATCH = ("batch_tokens", "micro_tokens")
MODEL = ("depth", "width", "head_dim", "mlp_ratio")
WINDOWS = ("window_pattern", "short_window")
ARMS = {  # name: (whose train.py, whose knobs it borrows, which)
    "reference": ("reference", None, ()),
    "batch": ("reference", "current", BATCH),  # the reference given our batch size
    "shape": ("current", "reference", MODEL + WINDOWS),  # our code on the reference's model
    "windows": ("current", "reference", MODEL),  # the same, with our windows
    "current": ("current", None, ()),
}


# -- the two train.py and their knobs


def source(which):
    if which == "current":
        return (ROOT / "train.py").read_text(encoding="utf-8")
    return subprocess.run(
        ["git", "show", f"{REFERENCE}:train.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def load(which):
    """train.py as a module; importing it does nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{which}_train.py"
        path.write_text(source(which), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def knobs(which, device):
    import torch

    module = load(which)
    if device in module.TIERS:
        return module.Knobs(**module.TIERS[device])
    return module.Knobs(
        **module.TIERS[module.pick_tier(torch.device(device))[0] if torch.cuda.is_available() else "cuda-80"]
    )


def arm_source(name, device):
    """train.py of an arm: its own text, with borrowed knobs laid over its tier."""
    own, other, names = ARMS[name]
    borrowed = (
        {key: value for key, value in dataclasses.asdict(knobs(other, device)).items() if key in names} if other else {}
    )
    text = source(own)
    (built,) = re.findall(r"Knobs\(\*\*TIERS\[([\w.]+)\]\)", text)  # the one place that builds them
    return (
        text.replace(f"Knobs(**TIERS[{built}])", f"Knobs(**{{**TIERS[{built}], **{borrowed!r}}})") if borrowed else text
    )


# -- runs


def abba(arms, seeds):
    """[(arm, seed), ...]: every other seed in reversed order, so that a drift of the machine hits all arms alike."""
    return [(arm, seed) for n, seed in enumerate(seeds) for arm in (arms if n % 2 == 0 else arms[::-1])]


def run(text, seed, seconds, scratch):
    """One run; {figure: value}. Raises RuntimeError with the end of its log."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    shutil.copy(ROOT / "prepare.py", folder)
    (folder / "train.py").write_text(text, encoding="utf-8")
    env = {
        **os.environ,
        "SEED": str(seed),
        "TIME_BUDGET": str(seconds),
        "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
    }
    began = time.monotonic()
    with open(folder / "run.log", "w") as log:
        status = subprocess.run(
            [sys.executable, "train.py"], cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    wall, log = time.monotonic() - began, (folder / "run.log").read_text()
    if status.returncode:
        raise RuntimeError(log[-2000:])
    record = json.loads((folder / "runs.jsonl").read_text())
    line = lambda key: re.search(rf"^{key}: +(\S+)", log, re.M)[1]
    number = lambda key: math.nan if line(key) == "n/a" else float(line(key))
    losses = re.findall(r"\| loss (\d+\.\d+) \|", log)
    imports = wall - number("total_seconds")  # before prepare.py began to count, and after it ended
    return {
        "tokens_s": record["tokens"] / record["seconds"],
        "mfu": number("mfu_percent"),
        "start": imports + record["startup"],
        "evaluation": number("total_seconds") - record["startup"] - record["seconds"],
        "val_bpb": record["val_bpb"],
        "memory_gb": number("peak_vram_mb") / 1024,
        "epochs": number("epochs"),
        "steps": int(line("num_steps")),
        "train_loss": float(losses[-1]) if losses else math.nan,
    }


def spread(values):
    return statistics.stdev(values) if len(values) > 1 else math.nan


def table(results, nats_per_bpb):
    """Lines of text. results: {arm: [figures of each run]}, the first arm is what the others are compared with.
    nats_per_bpb: nats a token that make 1 bit a byte, for the gap between val and train loss."""
    mean = lambda arm, key: statistics.fmean(r[key] for r in results[arm])
    base = next(iter(results))
    lines = [
        f"{'arm':<10} {'n':>2} {'tokens/s':>11} {'speed':>6} {'MFU%':>6} {'cold_s':>7} {'warm_s':>7} {'eval_s':>7} {'steps':>6} "
        f"{'val_bpb':>9} {'sd':>8} {'ratio':>7} {'+-':>7} {'GB':>6} {'epochs':>7} {'gap':>7}"
    ]
    for arm, runs in results.items():
        errors = [
            spread([r["val_bpb"] for r in results[a]]) / math.sqrt(len(results[a])) / mean(a, "val_bpb")
            for a in (arm, base)
        ]
        ratio = mean(arm, "val_bpb") / mean(base, "val_bpb")
        warm = [r["start"] for r in runs[1:]] or [math.nan]
        gap = nats_per_bpb * mean(arm, "val_bpb") - mean(arm, "train_loss")
        lines.append(
            f"{arm:<10} {len(runs):>2} {mean(arm, 'tokens_s'):>11,.0f} {mean(arm, 'tokens_s') / mean(base, 'tokens_s'):>6.3f} "
            f"{mean(arm, 'mfu'):>6.1f} {runs[0]['start']:>7.1f} {statistics.fmean(warm):>7.1f} {mean(arm, 'evaluation'):>7.1f} "
            f"{mean(arm, 'steps'):>6.0f} {mean(arm, 'val_bpb'):>9.6f} {spread([r['val_bpb'] for r in runs]):>8.6f} {ratio:>7.4f} "
            f"{0.0 if arm == base else ratio * math.hypot(*errors):>7.4f} {mean(arm, 'memory_gb'):>6.1f} {mean(arm, 'epochs'):>7.2f} "
            f"{gap:>7.3f}"
        )
    return lines


def compare(arms, seeds, seconds):
    import prepare
    import torch

    meta = prepare._prepared()[1]
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    print(
        f"dataset {meta['dataset']}, T {meta['seq_len']}, {seconds} s a run, {device}, torch {torch.__version__}",
        flush=True,
    )
    results, texts = {arm: [] for arm in arms}, {arm: arm_source(arm, device) for arm in arms}
    val = meta["splits"]["val"]
    with tempfile.TemporaryDirectory() as scratch:
        for arm, seed in abba(arms, seeds):
            figures = run(texts[arm], seed, seconds, scratch)
            results[arm].append(figures)
            print(
                f"{arm} seed {seed}: " + ", ".join(f"{key} {value:.6g}" for key, value in figures.items()), flush=True
            )
    print("\n".join(table(results, math.log(2) * val["bytes"] / val["tokens"])))


# -- parts of a step


def timed(function, device, repeats=20):
    """Median milliseconds."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        function()
        wait()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def parts(which):
    """Prints milliseconds of forward and backward of each part, on one micro-batch of the tier."""
    import prepare
    import torch
    import torch.nn.functional as F

    module = load(which)
    chosen, dtype = module.pick_device()
    device, meta = chosen.type, prepare._prepared()[1]
    k, T, V = knobs(which, device), meta["seq_len"], meta["vocab_size"]
    rows, _ = module.fitting_rows(k, T, chosen)
    compiler = module.pick_compiler(chosen)
    C, H = k.width, k.width // k.head_dim
    draw = lambda *shape: torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)
    show = lambda name, ms: print(f"{name:<44} {ms:9.3f} ms", flush=True)
    print(
        f"{which} train.py, {rows} rows of {T}, width {C}, vocabulary {V}, {dtype}, {device}, torch {torch.__version__}"
    )

    def both(function, *inputs):
        out = function(*inputs)
        out.backward(torch.ones_like(out))
        for x in inputs:
            x.grad = None

    windows = sorted({T, int(T * k.short_window)})
    for name, path in module.ATTENTION.items():
        for window in windows:
            with contextlib.suppress(Exception):  # a path that this machine lacks
                attend = path(chosen, T, [window])
                fast = (
                    compiler(lambda q, key, v: attend(q, key, v, window))
                    if name == "flex"
                    else lambda q, key, v: attend(q, key, v, window)
                )
                q, key, v = (draw(rows, T, H, k.head_dim) for _ in range(3))
                show(f"attention {name}, window {window}", timed(lambda: both(fast, q, key, v), device))
    for name, inner, outer in (
        ("q, k, v or out", C, C),
        ("MLP up", C, k.mlp_ratio * C),
        ("MLP down", k.mlp_ratio * C, C),
        ("head", C, V),
    ):
        x, weight = draw(rows * T, inner), draw(outer, inner)
        show(f"GEMM {name} {inner} x {outer}", timed(lambda: both(F.linear, x, weight), device))
    logits, targets = draw(rows * T, V), torch.randint(V, (rows * T,), device=device)
    squeeze = (lambda z: k.softcap * torch.tanh(z / k.softcap)) if k.softcap else lambda z: z
    loss = compiler(lambda z: F.cross_entropy(squeeze(z.float()), targets))
    show("soft cap and cross-entropy", timed(lambda: both(loss, logits), device))
    table_, ids = draw(V, C), torch.randint(V, (rows * T,), device=device)
    show("one embedding, gather and scatter", timed(lambda: both(lambda t: F.embedding(ids, t), table_), device))
    del logits
    model = module.GPT(k, V, T, chosen, module.pick_attention(chosen, dtype, k.head_dim, compiler), dtype)
    optimizer, forward = module.make_optimizer(model, compiler), compiler(model)
    ids = torch.randint(V, (rows, T), device=device)
    step = lambda: forward(ids, ids).backward()
    show("forward and backward, whole model", timed(step, device))
    show("optimizer", timed(optimizer.step, device))
    loader = prepare.make_dataloader(prepare.Tokenizer.from_directory(), rows, T, "train", device=device)
    show("feeding, if nothing hid it", timed(lambda: next(loader), device))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["reference", "batch", "current"])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--parts", nargs="?", const="current", choices=["reference", "current"])
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    parts(args.parts) if args.parts else compare(args.arms, args.seeds, args.seconds)


if __name__ == "__main__":
    main()
