"""The reference recipe against the current train.py on the data in use, in one session; and where a step's time goes.

    uv run tests/bench_gpu.py                                   # 60 s, three seeds: reference, with our batch, current
    uv run tests/bench_gpu.py --seconds 300 --seeds 42 --arms reference current
    uv run tests/bench_gpu.py --arms reference shape windows    # speed at the reference's model, its windows and ours
    uv run tests/bench_gpu.py --parts                           # milliseconds of a step's parts
    uv run tests/bench_gpu.py --bytes                           # bytes that a step moves, as the compiler counts them

It runs on a CPU too. Runs follow each other in ABBA order, each a process of its own with the current frozen files; the
compile cache is empty at first, so an arm's first start is the cold one. The reference is the train.py of REFERENCE.
"""

import argparse
import dataclasses
import importlib.util
import itertools
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
COLUMNS = {  # of the table: width and decimals; runs give the figures, table() the rest
    "n": (2, 0),
    "tokens_s": (11, 0),
    "speed": (6, 3),
    "mfu": (6, 1),
    "cold_s": (7, 1),
    "warm_s": (7, 1),
    "evaluation": (10, 1),
    "steps": (6, 0),
    "val_bpb": (9, 6),
    "sd": (8, 6),
    "ratio": (7, 4),
    "+-": (7, 4),
    "memory_gb": (9, 1),
    "epochs": (7, 2),
    "gap": (7, 3),
}


# -- the two train.py and their knobs


def source(which):
    if which == "current":
        return (ROOT / "train.py").read_text(encoding="utf-8")
    return subprocess.check_output(["git", "show", f"{REFERENCE}:train.py"], cwd=ROOT, text=True)


def load(which):
    """train.py as a module; importing it does nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{which}_train.py"
        path.write_text(source(which), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    return module


def knobs(which):
    module = load(which)
    device, _ = module.pick_device()
    tier = device.type if device.type in module.TIERS else module.pick_tier(device)[0]
    return module.Knobs(**module.TIERS[tier])


def arm_source(name):
    """train.py of an arm: its own text, with borrowed knobs laid over its tier."""
    own, other, names = ARMS[name]
    text = source(own)
    if other is None:
        return text
    borrowed = {key: value for key, value in dataclasses.asdict(knobs(other)).items() if key in names}
    changed, count = re.subn(r"Knobs\(\*\*(TIERS\[[\w.]+\])\)", rf"Knobs(**{{**\1, **{borrowed!r}}})", text)
    assert count == 1, f"{own} train.py builds its knobs in {count} places"
    return changed


# -- runs


def abba(arms, seeds):
    """[(arm, seed), ...]: every other seed in reversed order, so that a drift of the machine hits all arms alike."""
    order = []
    for n, seed in enumerate(seeds):
        order += [(arm, seed) for arm in (arms if n % 2 == 0 else arms[::-1])]
    return order


def run(text, seed, seconds, scratch):
    """One run; {figure: value}. Raises RuntimeError with the end of its log."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    for name in ("prepare.py", "referee.py"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    (folder / "train.py").write_text(text, encoding="utf-8")
    changes = {"SEED": str(seed), "TIME_BUDGET": str(seconds), "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor"}
    began = time.monotonic()
    with open(folder / "run.log", "w") as out:
        command = [sys.executable, "train.py"]
        environment = {**os.environ, **changes}
        done = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    wall = time.monotonic() - began
    log = (folder / "run.log").read_text()
    if done.returncode:
        raise RuntimeError(log[-2000:])
    (path,) = [*folder.glob("runs/*.json"), *folder.glob("runs.jsonl")]
    return figures(log, json.loads(path.read_text()), wall)


def figures(log, record, wall):
    """{figure: value} of a run's log and record. wall: seconds of the whole process."""

    def number(key):
        value = re.search(rf"^{key}: +(\S+)", log, re.M)[1]
        return math.nan if value == "n/a" else float(value)

    losses = re.findall(r"\| loss (\d+\.\d+) \|", log)
    imports = wall - number("total_seconds")  # before the harness began to count, and after it ended
    return {
        "tokens_s": record["tokens"] / record["seconds"],
        "mfu": number("mfu_percent"),
        "start": imports + record["startup"],
        "evaluation": number("total_seconds") - record["startup"] - record["seconds"],
        "val_bpb": number("val_bpb"),
        "memory_gb": number("peak_vram_mb") / 1024,
        "epochs": number("epochs"),
        "steps": number("num_steps"),
        "train_loss": float(losses[-1]) if losses else math.nan,
    }


def table(results, nats_per_bpb):
    """Lines of text. results: {arm: [figures of each run]}; the first arm is what the others are compared with.
    nats_per_bpb: nats a token that make 1 bit a byte, for the gap between val and train loss."""
    lines = ["arm        " + " ".join(f"{name:>{width}}" for name, (width, _) in COLUMNS.items())]
    base = None
    for arm, runs in results.items():
        row = {key: statistics.fmean(each[key] for each in runs) for key in runs[0]}
        row["n"] = len(runs)
        row["sd"] = statistics.stdev(each["val_bpb"] for each in runs) if len(runs) > 1 else math.nan
        row["error"] = row["sd"] / math.sqrt(len(runs)) / row["val_bpb"]
        base = base or row
        row["speed"] = row["tokens_s"] / base["tokens_s"]
        row["ratio"] = row["val_bpb"] / base["val_bpb"]
        row["+-"] = 0.0 if row is base else row["ratio"] * math.hypot(row["error"], base["error"])
        row["cold_s"] = runs[0]["start"]
        row["warm_s"] = statistics.fmean(each["start"] for each in runs[1:]) if len(runs) > 1 else math.nan
        row["gap"] = nats_per_bpb * row["val_bpb"] - row["train_loss"]
        cells = [f"{row[name]:>{width},.{digits}f}" for name, (width, digits) in COLUMNS.items()]
        lines.append(f"{arm:<10} " + " ".join(cells))
    return lines


def val_bytes_per_token(batches=8):
    """Over the first rows of val, special tokens counting no byte."""
    import prepare

    loader = prepare.make_dataloader(prepare.Tokenizer.from_directory(), 16, prepare.MAX_SEQ_LEN, "val", device="cpu")
    sizes = prepare.get_token_bytes("cpu")
    return statistics.fmean(sizes[next(loader)[1]].float().mean().item() for _ in range(batches))


def compare(arms, seeds, seconds):
    import torch

    device, _ = load("current").pick_device()
    print(f"{seconds} s a run, {device}, torch {torch.__version__}", flush=True)
    results = {arm: [] for arm in arms}
    texts = {arm: arm_source(arm) for arm in arms}
    with tempfile.TemporaryDirectory() as scratch:
        for arm, seed in abba(arms, seeds):
            measured = run(texts[arm], seed, seconds, scratch)
            results[arm].append(measured)
            print(f"{arm} seed {seed}: {measured}", flush=True)
    print("\n".join(table(results, math.log(2) * val_bytes_per_token())))


# -- parts of a step


def build(module, k, rows, V, device, dtype, compiler):
    """(model, optimizer, name of the attention path), picked as train.py picks them. rows: of a micro-batch."""
    import prepare

    T = prepare.MAX_SEQ_LEN
    names = module.attention_names(device, dtype, compiler)
    shape = (rows, T, k.width // k.head_dim, k.head_dim)
    attention = module.pick_attention(names, shape, module.block_windows(k, T), device, dtype, compiler)
    loss, mlp = module.pick_kernels(k, rows, T, V, device, dtype, compiler)
    model = module.GPT(k, V, T, device, attention, dtype, loss, mlp)
    return model, module.make_optimizer(model, compiler), attention


def timed(function, device, repeats=20):
    """Median milliseconds."""
    import torch

    times = []
    for _ in range(3 + repeats):  # the first three compile and fill caches
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[3:])


def show(name, function, tensors, device):
    """Prints the time of function(*tensors) and of its backward, if it returns anything."""
    import torch

    def both():
        out = function(*tensors)
        if out is not None:
            out.backward(torch.ones_like(out))
        for x in tensors:
            x.grad = None

    print(f"{name:<44} {timed(both, device):9.3f} ms", flush=True)


def parts():
    """Prints milliseconds of forward and backward of each part, on one micro-batch of the tier."""
    import torch
    import torch.nn.functional as F

    import prepare

    module = load("current")
    device, dtype = module.pick_device()
    k = knobs("current")
    T = prepare.MAX_SEQ_LEN
    tokenizer = prepare.Tokenizer.from_directory()
    V = tokenizer.get_vocab_size()
    C = k.width
    rows, _ = module.fitting_rows(k, V, T, device)
    compiler = module.pick_compiler(device)
    shape = (rows, T, C // k.head_dim, k.head_dim)
    windows = module.block_windows(k, T)
    print(f"{rows} rows of {T}, width {C}, vocabulary {V}, {dtype}, {device}, torch {torch.__version__}")

    def draw(*shapes):
        return [torch.randn(*each, device=device, dtype=dtype, requires_grad=True) for each in shapes]

    def cross_entropy(logits):
        return F.cross_entropy(module.cap(logits, k.softcap), ids.flatten())

    def loss_by(form):
        return compiler(lambda hidden, weight: form(hidden, weight, ids.flatten(), k.softcap))

    names = module.attention_names(device, dtype, compiler)
    for name, window in itertools.product(names, sorted(set(windows))):
        try:
            attend = compiler(module.ATTENTION[name](device, T, [window]))
            show(f"{name}, window {window}", lambda *qkv: attend(*qkv, window), draw(shape, shape, shape), device)
        except Exception as error:  # a path that this machine lacks
            print(f"{name}: {type(error).__name__}")
    ids = torch.randint(V, (rows, T), device=device)
    hidden = k.mlp_ratio * C
    for name, inner, outer in (("q, k, v or out", C, C), ("up", C, hidden), ("down", hidden, C), ("head", C, V)):
        show(f"GEMM {name} {inner} x {outer}", F.linear, draw((rows * T, inner), (outer, inner)), device)
    show("soft cap and cross-entropy", compiler(cross_entropy), draw((rows * T, V)), device)
    of_loss = [(rows * T, C), (V, C)]
    of_mlp = [(rows * T, C), (hidden, C), (C, hidden)]
    forms = [
        ("loss", module.plain_loss, module.fused_loss, loss_by, of_loss),
        ("MLP", module.plain_mlp, module.fused_mlp, compiler, of_mlp),
    ]
    for name, plain, make, wrap, shapes in forms:
        show(f"{name}, products and all", wrap(plain), draw(*shapes), device)
        try:
            show(f"{name}, by the kernel", wrap(make()), draw(*shapes), device)
        except Exception as error:  # no Triton
            print(f"{name} kernel: {type(error).__name__}")
    show("one embedding, gather and scatter", lambda weight: F.embedding(ids, weight), draw((V, C)), device)
    model, optimizer, _ = build(module, k, rows, V, device, dtype, compiler)
    forward = compiler(model)
    show("forward and backward, whole model", lambda: forward(ids, ids), [], device)
    show("optimizer", optimizer.step, [], device)
    loader = prepare.make_dataloader(tokenizer, rows, T, "train", device=device)
    print(f"{'feeding, if nothing hid it':<44} {timed(lambda: next(loader), device):9.3f} ms")


def count_bytes():
    """Prints what Inductor counts for the graphs of a step: gigabytes read and written, each buffer once a kernel; and the
    peak of the GPU's memory. What a kernel of our own writes is counted twice, as if it were read as well."""
    import logging

    import torch
    from torch._inductor import compile_fx, config, metrics

    import prepare

    config.force_disable_caches = True  # a cached graph is not counted
    compile_fx.inductor_metrics_log.setLevel(logging.INFO)
    compile_fx.inductor_metrics_log.propagate = False
    module = load("current")
    device, dtype = module.pick_device()
    k = knobs("current")
    T = prepare.MAX_SEQ_LEN
    V = prepare.Tokenizer.from_directory().get_vocab_size()
    rows, _ = module.fitting_rows(k, V, T, device)
    compiler = module.pick_compiler(device)
    model, optimizer, attention = build(module, k, rows, V, device, dtype, compiler)
    metrics.reset()
    module.rehearse_training(model, compiler(model), optimizer, rows)
    print(
        f"{rows} rows of {T}, depth {k.depth}, width {k.width}, vocabulary {V}, {attention}, {model.loss.__name__}, {device}"
    )
    print(f"{metrics.num_bytes_accessed / 1e9:.2f} GB a step in {metrics.generated_kernel_count} generated kernels")
    if device.type == "cuda":
        print(f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of memory at most")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["reference", "batch", "current"])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--bytes", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.parts:
        parts()
    elif args.bytes:
        count_bytes()
    else:
        compare(args.arms, args.seeds, args.seconds)


if __name__ == "__main__":
    main()
