"""A train.py that finishes at once, behind the real guard, summary, runs.jsonl and verdict: torch is a stub, so that a
run costs 0.3 s. A stand-in train.py imports this and calls run()."""

import sys
import time
from types import SimpleNamespace
from unittest.mock import MagicMock


def run(scores, does="score"):
    """scores: val_bpb by seed. does: score, oom, nan, hang, harness or error."""
    torch = MagicMock()
    torch.cuda.is_available = lambda: False
    torch.OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {})
    sys.modules.update({"torch": torch, "torch.nn": torch.nn, "torch.nn.functional": torch.nn.functional})
    import prepare
    meta = {"seq_len": 64, "eval_tokens": 4096, "files": {}, "dataset": "local", "splits": {"train": {"tokens": 10**6}}}
    prepare._prepared = lambda *_, **__: (None, meta)

    def main():
        print(f"cpu tier: a stand-in, seed {prepare.SEED}; warming up\n" + "a lot of noise\n" * 200, flush=True)
        if does == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        if does == "nan":
            raise FloatingPointError("the loss was nan at step 3")
        if does == "hang":
            time.sleep(60)
        if does == "error":
            raise ValueError("no")
        prepare._require(does != "harness", "the model sees the future; correct train.py")
        prepare.clock.start()
        prepare.clock.stop()
        prepare._Run.score, prepare._Run.device = scores[prepare.SEED], SimpleNamespace(type="cpu")
        prepare.print_summary(num_steps=1, total_tokens=10**6, num_params=1, depth=1)
    prepare.guard(main, grace=2)
