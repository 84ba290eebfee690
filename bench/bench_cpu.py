"""Real training of the reference recipe and of the shipped one on the dataset in use, each run on one core.

    uv run bench/bench_cpu.py --seconds 300 --seeds 42 43 44 [--arm reference shipped] [--cores 0 1] [--depth 8]

The runs follow each other in ABBA order; with several cores as many go on at a time, each on its own.
"""

import argparse
import os
import queue
import tempfile
from concurrent.futures import ThreadPoolExecutor

from reference import ARMS, ON_CPU, abba, run, show

KEYS = ("val_bpb", "steps", "tokens_s", "startup", "evaluation")


def compare(arms, seeds, seconds, cores):
    """Prints each run and what the arms make of all. The first arm is what the others are compared with."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    free = queue.Queue()
    for core in cores:
        free.put(core)
    found = {}

    def one(job):
        core = free.get()
        found[job] = run(*job, seconds, scratch, core)
        free.put(core)
        print(*job, *(f"{key} {found[job][key]:.6g}" for key in KEYS), f"core {core}", flush=True)

    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(len(cores)) as pool:
        list(pool.map(one, abba(arms, seeds)))
    show({arm: [found[arm, seed] for seed in seeds] for arm in arms}, KEYS)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--arm", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--cores", type=int, nargs="+", default=sorted(os.sched_getaffinity(0)))
    parser.add_argument("--depth", type=int, help="blocks of both, the tier's unless given")
    args = parser.parse_args()
    if args.depth is not None:
        ON_CPU["depth"] = args.depth
        ARMS["shipped"]["depth"] = args.depth
    compare(args.arm, args.seeds, args.seconds, args.cores)


if __name__ == "__main__":
    main()
