"""The reference recipe and the shipped one on this machine's GPU and the dataset in use: speed, memory, score.

    uv run bench/bench_gpu.py [--seconds 60] [--seeds 42 43] [--arm reference shipped]
    uv run bench/bench_gpu.py --parts    # milliseconds of a step's parts, of the shipped recipe
    uv run bench/bench_gpu.py --bytes    # bytes that a step moves, as the compiler counts them

--parts and --bytes take a CPU too. The compile cache is empty at first, so an arm's first start is the cold one.
"""

import argparse
import statistics
import sys
import tempfile
import time

from reference import ARMS, ROOT, abba, run, show

sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import prepare  # noqa: E402  (found by the line above)
import train  # noqa: E402

KEYS = ("val_bpb", "steps", "tokens_s", "mfu", "memory_mb", "startup", "evaluation")


def compare(arms, seeds, seconds):
    results = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as scratch:
        for arm, seed in abba(arms, seeds):
            found = run(arm, seed, seconds, scratch)
            results[arm].append(found)
            print(arm, seed, *(f"{key} {found[key]:.6g}" for key in KEYS if key in found), flush=True)
    show(results, KEYS)


def build():
    """(model, its compiled forward, optimizer, compiler, rows of a micro-batch), as train.main() builds them."""
    device, dtype = train.pick_device()
    torch.manual_seed(prepare.SEED)
    torch.set_float32_matmul_precision("high")
    T = prepare.MAX_SEQ_LEN
    tier, _ = train.pick_tier(device)
    knobs = train.Knobs(**train.TIERS[tier])
    compiler = train.pick_compiler(device)
    name, attend = train.pick_attention(knobs, T, device, dtype, compiler)
    vocab_size = prepare.Tokenizer.from_directory().get_vocab_size()
    model = train.GPT(knobs, vocab_size, T, device, attend, dtype)
    rows = max(1, knobs.micro_tokens // T)
    print(f"{tier}, {rows} rows of {T}, width {knobs.width}, vocabulary {vocab_size}, {name}, {dtype}, {device}")
    return model, compiler(model), train.make_optimizer(model, compiler), compiler, rows


def timed(name, function, device, repeats=20):
    """Prints the median milliseconds of function()."""
    times = []
    for _ in range(3 + repeats):  # the first three compile and fill caches
        began = time.perf_counter()
        function()
        prepare.synchronize(device)
        times.append(1000 * (time.perf_counter() - began))
    print(f"{name:<44} {statistics.median(times[3:]):9.3f} ms", flush=True)


def parts():
    model, forward, optimizer, compiler, rows = build()
    k = model.knobs
    C = k.width
    V = model.head.out_features
    device = model.head.weight.device
    ids = torch.randint(V, (rows, model.T), device=device)

    def both(name, function, *shapes):
        """Forward and backward of a function of tensors of these shapes."""
        tensors = [torch.randn(shape, device=device, dtype=model.dtype, requires_grad=True) for shape in shapes]
        compiled = compiler(function)

        def step():
            out = compiled(*tensors)
            torch.autograd.grad(out, tensors, torch.ones_like(out))

        timed(name, step, device)

    heads = (rows, model.T, C // k.head_dim, k.head_dim)
    for name, path in train.attention_paths(device, model.dtype, compiler).items():
        for window in sorted(set(model.windows)):
            try:
                attend = path(device, model.T, [window])
                both(f"{name}, window {window}", lambda q, k, v: attend(q, k, v, window), heads, heads, heads)
            except Exception as error:  # a path that this machine lacks
                print(f"{name}: {train.reason_of(error)}")
    hidden = k.mlp_ratio * C
    for name, inner, outer in (("q, k, v or out", C, C), ("up", C, hidden), ("down", hidden, C), ("head", C, V)):
        both(f"product {name} {inner} x {outer}", F.linear, (rows * model.T, inner), (outer, inner))
    both("the loss behind the head", lambda z: F.cross_entropy(z.float(), ids.flatten()), (rows * model.T, V))
    both("one embedding, gather and scatter", lambda table: F.embedding(ids, table), (V, C))

    def whole():
        (model.loss_scale * forward(ids, ids)).backward()

    timed("forward and backward, whole model", whole, device)
    grads = [p.grad for p in model.parameters()]

    def step():
        for p, grad in zip(model.parameters(), grads):
            p.grad = grad
        optimizer.step()

    timed("optimizer", step, device)
    loader = prepare.make_dataloader(prepare.Tokenizer.from_directory(), rows, model.T, "train", device=device)
    timed("feeding, if nothing hid it", lambda: next(loader), device)


def count_bytes():
    """Prints what Inductor counts for the graphs of a step: gigabytes read and written, each buffer once a kernel; and the
    peak of the GPU's memory."""
    from torch._inductor import compile_fx, config, metrics

    config.force_disable_caches = True  # a cached graph is not counted
    compile_fx.inductor_metrics_log.setLevel("INFO")
    compile_fx.inductor_metrics_log.propagate = False
    model, forward, optimizer, _, rows = build()
    device = model.head.weight.device
    ids = torch.randint(model.head.out_features, (rows, model.T), device=device)
    metrics.reset()
    (model.loss_scale * forward(ids, ids)).backward()
    optimizer.step()
    print(f"{metrics.num_bytes_accessed / 1e9:.2f} GB a step in {metrics.generated_kernel_count} generated kernels")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        (model.loss_scale * forward(ids, ids)).backward()
        optimizer.step()
        print(f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of memory at most")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--bytes", action="store_true")
    args = parser.parse_args()
    if args.parts:
        parts()
    elif args.bytes:
        count_bytes()
    else:
        compare(args.arm, args.seeds, args.seconds)


if __name__ == "__main__":
    main()
