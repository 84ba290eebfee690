"""Schedule, warm-up, loop and output of train.py, and the whole of it in a process."""

import io
import itertools
import os
import random
import re
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from reference import CPU, REFERENCE, TINY, draw_ids
from zygote import run_script

import train

CUDA = torch.device("cuda")
KNOBS = replace(
    train.Knobs(**REFERENCE),
    **TINY,
    depth=2,
    window_pattern="L",
    batch_tokens=2**13,
    micro_tokens=2**13,
    eval_tokens=2**14,
    muon_momentum_steps=100,
)


def model_and_optimizer(seed=3, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    model = train.GPT(replace(KNOBS, **changes), 60, 16, CPU, dtype=dtype)
    return model, train.make_optimizer(model)


def test_learning_rate_golden():
    def at(shares):
        return [round(train.lr_scale(k, share), 6) for share in shares]

    k = train.Knobs(**REFERENCE)
    assert at([0, 0.25, 0.5, 0.51, 0.75, 0.9, 0.99, 1.0, 1.3]) == [1, 1, 1, 0.98, 0.5, 0.2, 0.02, 0, 0]
    k = replace(k, warmup=0.1, warmdown=0.4, final_lr=0.05)
    assert at([0, 0.05, 0.1, 0.6, 0.8, 1.0, 1.3]) == [0, 0.5, 1, 1, 0.525, 0.05, 0.05]


def test_momentum_and_decay_golden():
    model, optimizer = model_and_optimizer()
    wide = next(group for group in optimizer.groups if group.params[0].shape == (128, 32))
    golden = {  # share of the budget, steps: rate, momentum, decay
        (0, 0): (0.08, 0.85, 0.2),
        (0.25, 150): (0.08, 0.9, 0.15),
        (0.5, 300): (0.08, 0.95, 0.1),
        (0.75, 800): (0.04, 0.95, 0.05),
        (1.0, 900): (0, 0.95, 0),
        (1.2, 901): (0, 0.95, 0),
    }
    for (progress, step), wanted in golden.items():
        train.set_rates(optimizer, train.Knobs(**REFERENCE), progress, step)
        assert (wide.lr.item(), wide.mu.item(), wide.weight_decay.item()) == pytest.approx(wanted)
    assert not any(group.lr or group.weight_decay for group in optimizer.groups)


def everything(model, optimizer):
    """(storage, bytes) of all tensors, found without the help of train.py; gradients; generators."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for i, group in enumerate(optimizer.groups):
        for name, value in vars(group).items():
            tensors = value if isinstance(value, list) else [value]
            found.update({f"{i} {name} {j}": t for j, t in enumerate(tensors) if torch.is_tensor(t)})
    state = {name: (t.data_ptr(), bytes(t.detach().reshape(-1).view(torch.uint8))) for name, t in found.items()}
    state["gradients"] = [p.grad for p in model.parameters()]
    state["python"] = random.getstate()
    state["numpy"] = repr(np.random.get_state())
    state["torch"] = torch.get_rng_state().tolist()
    state["training"] = model.training
    return state


def test_warm_up_leaves_no_trace():
    model, optimizer = model_and_optimizer(bigram_rows=64, dtype=torch.bfloat16)
    step = optimizer.step
    steps = []

    def careless_step():
        step()
        steps.append(everything(model, optimizer))
        random.random()
        np.random.rand()

    optimizer.step = careless_step
    before = everything(model, optimizer)
    assert train.warm_up(model, model, optimizer, 4, 8) == (4, 8)
    after = everything(model, optimizer)
    assert [name for name in before if before[name] != after[name]] == []
    assert len([name for name in before if before[name] != steps[0][name]]) > 40  # it did train meanwhile


def test_training_after_the_warm_up_is_as_without():
    def losses(warm):
        model, optimizer = model_and_optimizer()
        if warm:
            train.warm_up(model, model, optimizer, 4, 8)
        out = []
        for _ in range(4):
            loss = model(torch.randint(60, (4, 16)), torch.randint(60, (4, 16)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            out.append(loss.item())
        return out

    assert losses(True) == losses(False)


def test_parameters_without_a_gradient_are_named():
    model, optimizer = model_and_optimizer()
    model.blocks[1].attention.out.weight.requires_grad_(False)
    with pytest.raises(train.PrepareError, match="no gradient reaches blocks.1.attention.out.weight; use "):
        train.warm_up(model, model, optimizer, 4, 8)


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.AcceleratorError("CUDA error: out of memory"),
]


def limited(model, error, most, most_eval):
    """A forward that fails above so many rows."""

    def forward(ids, targets=None):
        if len(ids) > (most_eval if targets is None else most):
            raise error
        return model(ids, targets)

    return forward


@pytest.mark.parametrize("error", FULL)
def test_out_of_memory_halves_the_batch_that_does_not_fit(capsys, error):
    model, optimizer = model_and_optimizer()
    assert train.warm_up(model, limited(model, error, 5, 3), optimizer, 8, 4) == (4, 2)
    assert capsys.readouterr().out.splitlines() == [
        "out of memory: 4 rows at a time instead of 8, with more accumulation",
        "out of memory: 2 rows at a time instead of 4, in evaluation",
    ]
    with pytest.raises(type(error)):
        train.warm_up(model, limited(model, error, 0, 9), optimizer, 4, 4)


def test_other_errors_of_the_warm_up_end_the_run():
    model, optimizer = model_and_optimizer()
    with pytest.raises(RuntimeError, match="device-side assert"):
        train.warm_up(model, limited(model, RuntimeError("device-side assert"), 0, 0), optimizer, 8, 4)


def test_memory_is_counted_from_the_end_of_the_warm_up(monkeypatch):
    calls = []

    def largest(rows, what, attempt):
        calls.append(what)
        return rows

    monkeypatch.setattr(train, "largest", largest)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    model = SimpleNamespace(head=SimpleNamespace(weight=SimpleNamespace(device=CUDA)))
    assert train.warm_up(model, None, None, 8, 4) == (8, 4)
    assert calls == ["with more accumulation", "in evaluation", "reset"]


@pytest.mark.parametrize("user, wanted", [({}, "expandable_segments:True"), ({"PYTORCH_ALLOC_CONF": "x"}, "x")])
def test_the_allocator_is_told_before_the_gpu_is_used(user, wanted):
    text = (ROOT / "train.py").read_text()
    environ = dict(user)
    seen = []

    def guard(main):
        seen.append(environ["PYTORCH_ALLOC_CONF"])

    stand_ins = {"guard": guard, "main": None, "os": SimpleNamespace(environ=environ)}
    exec(text[text.index("if __name__ ==") :], {"__name__": "__main__", **stand_ins})
    assert seen == [wanted]


def gpu_of(monkeypatch, gigabytes):
    facts = SimpleNamespace(total_memory=int(gigabytes * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)


@pytest.mark.parametrize(
    "gigabytes, rows", [(75, 128), (40, 64), (22.4, 64), (14.9, 32), (11.2, 32), (7.5, 16), (1, 2)]
)
def test_small_gpus_start_with_a_micro_batch_that_fits(monkeypatch, capsys, gigabytes, rows):
    gpu_of(monkeypatch, gigabytes)
    assert train.fitting_rows(train.Knobs(**REFERENCE), 8192, 2048, CUDA) == (rows, rows)
    said = "" if rows == 128 else f"128 rows at a time would need 41.4 GB: {rows} instead\n"
    assert capsys.readouterr().out == said


def test_a_smaller_model_fits_in_larger_batches(monkeypatch):
    gpu_of(monkeypatch, 8)
    half = dict(REFERENCE, width=256)
    assert train.fitting_rows(train.Knobs(**half), 8192, 2048, CUDA)[0] == 32
    assert train.fitting_rows(train.Knobs(**half), 65536, 2048, CUDA)[0] == 16


CARDS = [139.8, 79.1, 79.6, 47.4, 44.4, 39.4, 31.4, 23.6, 22.1, 15.6, 11.6, 9.6, 7.7]
CARD_TIERS = [80, 80, 80, 48, 48, 24, 24, 24, 24, 12, 12, 8, 8]


@pytest.mark.parametrize("gigabytes, tier", list(zip(CARDS, CARD_TIERS)))
def test_memory_picks_the_tier_and_its_micro_batch_fits(monkeypatch, gigabytes, tier):
    gpu_of(monkeypatch, gigabytes)
    assert train.pick_tier(CUDA) == (f"cuda-{tier}", f"{gigabytes} GB of GPU memory")
    knobs = train.Knobs(**train.TIERS[f"cuda-{tier}"])
    assert train.fitting_rows(knobs, 8192, 2048, CUDA)[0] == knobs.micro_tokens // 2048


def test_other_devices_have_one_tier():
    assert train.pick_tier(CPU) == ("cpu", "no GPU")
    assert train.pick_tier(torch.device("mps")) == ("mps", "Apple's GPU")
    for name in ("cpu", "mps"):
        knobs = train.Knobs(**train.TIERS[name])
        assert train.fitting_rows(knobs, 8192, 2048, CPU) == (knobs.micro_tokens // 2048, knobs.eval_tokens // 2048)


class Ticks:
    """A clock that gains a second with every step."""

    now = 0.0

    def elapsed(self):
        return self.now

    def tick(self):
        self.now += 1
        return self.now


def batches():
    """Runs of consecutive ids: the next token can be learnt from the present one."""
    for epoch in itertools.count(1):
        rows = (draw_ids(4, 1, vocab=60, seed=epoch) + torch.arange(17)) % 60
        yield rows[:, :-1], rows[:, 1:], epoch


def halves():
    for ids, targets, epoch in batches():
        yield ids[:2], targets[:2], epoch
        yield ids[2:], targets[2:], epoch


def looped(monkeypatch, budget=40, accumulation=1, forward=None, loader=None, dtype=torch.float32):
    """(what train returns, the loss of every micro-batch, the model)."""
    monkeypatch.setattr(train, "clock", Ticks())
    monkeypatch.setattr(train, "TIME_BUDGET", budget)
    model, optimizer = model_and_optimizer(seed=0, dtype=dtype)
    losses = []

    def spy(ids, targets):
        loss = (forward or model)(ids, targets)
        losses.append(loss.item())
        return loss

    return train.train(model, spy, optimizer, loader or batches(), accumulation), losses, model


def test_loop_learns_and_ends_with_the_budget(monkeypatch):
    counted, losses, model = looped(monkeypatch)
    assert counted == (40, 40 * 64)
    # late and tight: what a wrong sign, an unshifted target or a lost rate would move
    assert losses[0] == pytest.approx(4.094, abs=0.01)
    assert sum(losses[-5:]) / 5 == pytest.approx(0.056, abs=0.02)
    assert not any(p.grad is not None for p in model.parameters())


def test_fp16_learns_what_fp32_learns(monkeypatch):
    _, wanted, _ = looped(monkeypatch)
    _, losses, _ = looped(monkeypatch, dtype=torch.float16)
    assert losses == pytest.approx(wanted, abs=0.1)


def test_fp16_gradients_are_scaled_and_the_loss_is_not(monkeypatch):
    norms = []
    shown = []
    monkeypatch.setattr(train.Optimizer, "step", lambda self: norms.append(self.params()[0].grad.norm().item()))
    monkeypatch.setattr(train.Progress, "show", lambda self, step, elapsed, loss, *rest: shown.append(loss))
    for dtype in (torch.float32, torch.float16):
        looped(monkeypatch, budget=1, dtype=dtype)
    assert norms[1] == pytest.approx(2**15 * norms[0], rel=0.01)
    assert shown[1] == pytest.approx(shown[0], rel=0.01)


@pytest.mark.parametrize(
    "bf16, capability, dtype",
    [(True, (9, 0), torch.bfloat16), (False, (7, 5), torch.float16), (False, (6, 1), torch.float32)],
)
def test_a_gpu_computes_in_what_its_tensor_cores_have(monkeypatch, bf16, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert train.pick_device() == (CUDA, dtype)


def test_accumulation_is_the_same_mathematics(monkeypatch):
    shown = []
    monkeypatch.setattr(train.Progress, "show", lambda self, step, elapsed, loss, *rest: shown.append(loss))
    counted, whole, _ = looped(monkeypatch, budget=6)
    accumulated, parts, _ = looped(monkeypatch, budget=6, accumulation=2, loader=halves())
    assert counted == accumulated == (6, 6 * 64)
    assert shown[6:] == pytest.approx(shown[:6], abs=2e-3)
    assert [(a + b) / 2 for a, b in zip(parts[::2], parts[1::2])] == pytest.approx(whole, abs=2e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 100.5])
def test_wild_loss_stops_at_once_and_names_the_step(monkeypatch, value):
    for budget, calls in ((40, 5), (4, 4)):  # the loss is read a step late; the very last one too
        values = itertools.chain([1.0, 1.0, 1.0, value], itertools.repeat(1.0))
        read = []

        def forward(ids, targets):
            read.append(next(values))
            return torch.tensor(read[-1], requires_grad=True)

        with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match="step 3"):
            patch.setattr(train.Optimizer, "step", lambda self: None)
            looped(patch, budget=budget, forward=forward)
        assert len(read) == calls


def shown_in(monkeypatch, live):
    """What 3,000 steps of a tenth of a second print."""
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: live)
    monkeypatch.setattr(train.sys, "stdout", out)
    progress = train.Progress(300)
    for step in range(1, 3001):
        progress.show(step, step / 10, 3.0, step, 1, 1.0)
    return out.getvalue()


def test_log_file_stays_short_and_terminal_is_one_line(monkeypatch):
    text = shown_in(monkeypatch, live=False)
    assert 20 <= text.count("\n") <= 26
    assert "loss 3.0000" in text
    text = shown_in(monkeypatch, live=True)
    assert text.count("\n") == 1
    assert text.count("\r") > 1000


def test_compiler_falls_back_where_it_does_not_work(monkeypatch, capsys):
    def broken(function, **options):
        raise RuntimeError("No working C++ compiler found\nlong trace")

    monkeypatch.setattr(torch, "compile", broken)
    assert train.pick_compiler(CPU) is train.uncompiled
    said = "torch.compile does not work here, so everything is slower: No working C++ compiler found\n"
    assert capsys.readouterr().out == said


def run_train(project, home, tmp_path):
    """(exit status, log) of train.py in a process of its own."""
    locks = tmp_path / "locks"
    locks.mkdir()
    changes = {"AUTORESEARCH_HOME": str(home), "TIME_BUDGET": "3", "TMPDIR": str(locks), "TORCH_COMPILE_DISABLE": "1"}
    status = run_script("train.py", project, {**os.environ, **changes}, project / "run.log")
    return status, (project / "run.log").read_text()


def test_the_real_thing_from_end_to_end(project, small_home, tmp_path):
    status, text = run_train(project, small_home, tmp_path)
    assert status == 0, text
    assert re.search(r"^---\nval_bpb:          \d\.\d{6}\ntraining_seconds: [3-9]\.\d\n", text, re.M)
    values = dict(re.findall(r"^(\w+): +(.+)$", text, re.M))
    assert int(values["num_steps"]) >= 2
    assert values["attention"] == "chunks"
    assert values["tier"] == "cpu"
    assert 0 < float(values["epochs"]) < 99
    assert text.count("\n") < 60
    assert subprocess.check_output(["git", "status", "--porcelain"], cwd=project) == b""


def test_unprepared_is_one_sentence(project, tmp_path):
    status, text = run_train(project, tmp_path / "nothing", tmp_path)
    assert status == 1
    assert "Traceback" not in text
    assert re.fullmatch(r"FAIL: harness: nothing is prepared in .*; run: uv run prepare.py.*", text.splitlines()[-1])


def test_a_wrong_knob_is_one_sentence(project, small_home, tmp_path):
    text = (project / "train.py").read_text()
    (project / "train.py").write_text(text.replace("width=128,", "width=100,"))
    status, text = run_train(project, small_home, tmp_path)
    assert status == 1
    assert "Traceback" not in text
    assert (
        "\nFAIL: harness: the knobs in train.py are wrong: width is not a multiple of head_dim; correct" in f"\n{text}"
    )
