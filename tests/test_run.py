"""Schedule, warm-up, loop and output of train.py, and the whole of it in a process."""

import io
import itertools
import os
import random
import re
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import REFERENCE
from zygote import run_script

import train

CPU = torch.device("cpu")
KNOBS = replace(train.Knobs(**REFERENCE), depth=2, width=32, head_dim=16, value_gate_channels=8, window_pattern="L",
                batch_tokens=2**13, micro_tokens=2**13, eval_tokens=2**14, muon_momentum_steps=100)


def test_learning_rate_golden():
    k = train.Knobs(**REFERENCE)
    at = lambda *shares: [round(train.lr_scale(k, s), 6) for s in shares]
    assert at(0, 0.25, 0.5, 0.51, 0.75, 0.9, 0.99, 1.0, 1.3) == [1, 1, 1, 0.98, 0.5, 0.2, 0.02, 0, 0]
    k = replace(k, warmup=0.1, warmdown=0.4, final_lr=0.05)
    assert at(0, 0.05, 0.1, 0.6, 0.8, 1.0, 1.3) == [0, 0.5, 1, 1, 0.525, 0.05, 0.05]


def test_momentum_and_decay_golden():
    model = train.GPT(KNOBS, 60, 16, CPU)
    optimizer, k = train.make_optimizer(model), train.Knobs(**REFERENCE)
    rates = lambda: [(round(g["lr"], 6), round(g["momentum"], 6), round(g["weight_decay"], 6))
                     for g in optimizer.param_groups if g["kind"] == "muon" and g["params"][0].shape == (128, 32)][0]
    for progress, step, wanted in ((0, 0, (0.08, 0.85, 0.2)), (0.25, 150, (0.08, 0.9, 0.15)), (0.5, 300, (0.08, 0.95, 0.1)),
                                   (0.75, 800, (0.04, 0.95, 0.05)), (1.0, 900, (0, 0.95, 0)), (1.2, 901, (0, 0.95, 0))):
        train.set_rates(optimizer, k, progress, step)
        assert rates() == wanted
    assert all(g["lr"] == 0 and g["weight_decay"] == 0 for g in optimizer.param_groups)


def everything(model, optimizer):
    tensors = dict(model.state_dict()) | {"cos": model.cos, "sin": model.sin}
    for i, state in enumerate(optimizer.state.values()):
        tensors |= {f"{i} {name}": t for name, t in state.items()}
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return ({k: (t.data_ptr(), t.view(torch.uint8).numpy().tobytes() if t.dim() else t.item()) for k, t in tensors.items()}, groups,
            [p.grad for p in model.parameters()], random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist(),
            model.training)


def test_warm_up_leaves_no_trace():
    torch.manual_seed(3)
    model = train.GPT(replace(KNOBS, bigram_rows=64), 60, 16, CPU, dtype=torch.bfloat16)
    optimizer = train.make_optimizer(model)
    before, steps = everything(model, optimizer), []
    step = optimizer.step
    optimizer.step = lambda: (step(), steps.append(everything(model, optimizer)), random.random(), np.random.rand())
    assert train.warm_up(model, model, optimizer, 4, 8, 60, CPU) == (4, 8)
    assert steps and steps[0] != before  # it did train meanwhile
    after = everything(model, optimizer)
    assert all(a == b for a, b in zip(before, after)), [i for i, (a, b) in enumerate(zip(before, after)) if a != b]


def test_training_after_the_warm_up_is_as_without():
    def losses(warm):
        torch.manual_seed(3)
        model = train.GPT(KNOBS, 60, 16, CPU)
        optimizer = train.make_optimizer(model)
        if warm:
            train.warm_up(model, model, optimizer, 4, 8, 60, CPU)
        out = []
        for _ in range(4):
            ids = torch.randint(60, (4, 17))
            loss = model(ids[:, :-1], ids[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            out.append(loss.item())
        return out
    assert losses(True) == losses(False)


def test_out_of_memory_halves_the_micro_batch(capsys):
    model = train.GPT(KNOBS, 60, 16, CPU)
    optimizer = train.make_optimizer(model)

    def forward(ids, targets=None):
        if len(ids) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(ids, targets)

    assert train.warm_up(model, forward, optimizer, 16, 8, 60, CPU) == (4, 2)
    said = capsys.readouterr().out.strip().splitlines()
    assert len(said) == 2 and "4 rows at a time instead of 8" in said[1]

    def hopeless(ids, targets=None):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        train.warm_up(model, hopeless, optimizer, 4, 4, 60, CPU)


@pytest.mark.parametrize("gigabytes, rows", [(80, 128), (48, 64), (24, 32), (16, 32), (12, 16), (8, 16), (1, 2)])
def test_small_gpus_start_with_a_micro_batch_that_fits(monkeypatch, gigabytes, rows):
    facts = type("Facts", (), {"total_memory": gigabytes * 10**9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    assert train.fitting_rows(train.Knobs(**REFERENCE), 2048, torch.device("cuda")) == (rows, rows)
    assert train.fitting_rows(train.Knobs(**train.TIERS["cpu"]), 2048, CPU) == (2, 8)


@pytest.mark.parametrize("gibibytes, tier", [(139.8, 80), (79.1, 80), (79.6, 80), (47.4, 48), (44.4, 48), (39.4, 24), (31.4, 24),
                                             (23.6, 24), (22.1, 24), (15.6, 12), (11.6, 12), (9.6, 8), (7.7, 8), (3.9, 8)])
def test_memory_picks_the_tier_and_its_micro_batch_fits(monkeypatch, gibibytes, tier):
    facts = type("Facts", (), {"total_memory": int(gibibytes * 2**30)})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    name, why = train.pick_tier(torch.device("cuda"))
    assert (name, why) == (f"cuda-{tier}", f"{gibibytes:.1f} GB of GPU memory")
    knobs = train.Knobs(**train.TIERS[name])
    if gibibytes > 4:  # the tier's own micro-batch is not halved
        assert train.fitting_rows(knobs, 2048, torch.device("cuda"))[0] == knobs.micro_tokens // 2048


def test_other_devices_have_one_tier():
    assert train.pick_tier(CPU) == ("cpu", "no GPU") and train.pick_tier(torch.device("mps")) == ("mps", "Apple's GPU")
    for tier in train.TIERS.values():
        train.Knobs(**tier)


class Ticks:
    """A clock that gains a second with every step."""

    def __init__(self):
        self.now = 0.0

    def elapsed(self):
        return self.now

    def tick(self):
        self.now += 1
        return self.now


def batches(seed=0):
    """Runs of consecutive ids: the next token can be learnt from the present one."""
    g = torch.Generator().manual_seed(seed)
    for epoch in itertools.count(1):
        rows = (torch.randint(60, (4, 1), generator=g) + torch.arange(17)) % 60
        yield rows[:, :-1], rows[:, 1:], epoch


def looped(monkeypatch, budget=40, accumulation=1, forward=None, loader=None, seed=0, knobs=KNOBS):
    monkeypatch.setattr(train, "clock", Ticks())
    monkeypatch.setattr(train, "TIME_BUDGET", budget)
    torch.manual_seed(seed)
    model = train.GPT(knobs, 60, 16, CPU)
    optimizer, seen = train.make_optimizer(model), []

    def spy(ids, targets):
        loss = (forward or model)(ids, targets)
        seen.append(loss.item())
        return loss

    return train.train(model, spy, optimizer, loader or batches(), accumulation, 64), seen, model, optimizer


def test_loop_learns_and_ends_with_the_budget(monkeypatch, capsys):
    (steps, tokens), losses, model, optimizer = looped(monkeypatch)
    assert (steps, tokens) == (40, 40 * 64)
    # late and tight: what a wrong sign, an unshifted target or a lost rate would move
    assert losses[0] == pytest.approx(4.094, abs=0.01) and sum(losses[-5:]) / 5 == pytest.approx(0.18, abs=0.12)
    assert optimizer.param_groups[0]["step"] == 40
    assert all(p.grad is None for p in model.parameters())


def test_accumulation_is_the_same_mathematics(monkeypatch):
    def halves(loader):
        for ids, targets, epoch in loader:
            yield ids[:2], targets[:2], epoch
            yield ids[2:], targets[2:], epoch
    shown = []
    monkeypatch.setattr(train.Progress, "show", lambda self, step, elapsed, loss, *rest: shown.append(loss))
    _, whole, _, _ = looped(monkeypatch, budget=6)
    (steps, tokens), parts, _, _ = looped(monkeypatch, budget=6, accumulation=2, loader=halves(batches()))
    assert steps == 6 and len(parts) == 12 and tokens == 12 * 64 and shown[6:] == pytest.approx(shown[:6], abs=2e-3)
    assert [(a + b) / 2 for a, b in zip(parts[::2], parts[1::2])] == pytest.approx(whole, abs=2e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 100.5])
def test_wild_loss_stops_at_once_and_names_the_step(monkeypatch, value):
    calls = []

    def forward(ids, targets):
        calls.append(1)
        return torch.tensor(value if len(calls) == 4 else 1.0, requires_grad=True)

    with pytest.raises(FloatingPointError, match="step 3"):
        looped(monkeypatch, forward=forward)
    assert len(calls) == 5  # the loss is read a step late
    calls.clear()
    with pytest.raises(FloatingPointError, match="step 3"):
        looped(monkeypatch, forward=forward, budget=4)  # the very last step


def test_log_file_stays_short_and_terminal_is_one_line(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(train.sys, "stdout", out)
    shown = train.Progress(300)
    for step in range(1, 3001):
        shown.show(step, step / 10, 3.0, step, 1, 1.0)
    assert 20 <= len(out.getvalue().splitlines()) <= 26 and "loss 3.0000" in out.getvalue()
    out = io.StringIO()
    out.isatty = lambda: True
    monkeypatch.setattr(train.sys, "stdout", out)
    shown = train.Progress(300)
    for step in range(1, 3001):
        shown.show(step, step / 10, 3.0, step, 1, 1.0)
    assert out.getvalue().count("\n") == 1 and out.getvalue().count("\r") > 1000


def test_compiler_falls_back_where_it_does_not_work(monkeypatch, capsys):
    def broken(f, **kw):
        def fail(*_):
            raise RuntimeError("No working C++ compiler found\nlong trace")
        return fail
    monkeypatch.setattr(torch, "compile", broken)
    f = lambda x: x
    assert train.pick_compiler(CPU)(f) is f
    assert capsys.readouterr().out == "torch.compile does not work here, so everything is slower: No working C++ compiler found\n"


def environment(home, tmp_path, **more):
    locks = tmp_path / "locks"
    locks.mkdir(exist_ok=True)
    return {**os.environ, "AUTORESEARCH_HOME": str(home), "TIME_BUDGET": "3", "TMPDIR": str(locks), "TORCH_COMPILE_DISABLE": "1",
            **more}


def test_the_real_thing_from_end_to_end(project, small_home, tmp_path):
    log = project / "run.log"
    status = run_script("train.py", project, environment(small_home, tmp_path), log)
    text = log.read_text()
    assert status == 0, text
    assert re.search(r"^---\nval_bpb:          \d\.\d{6}\ntraining_seconds: [3-9]\.\d\n", text, re.M)
    values = dict(re.findall(r"^(\w+): +(.+)$", text, re.M))
    assert int(values["num_steps"]) >= 2 and values["attention"] == "sdpa" and values["tier"] == "cpu"
    assert 0 < float(values["epochs"]) < 99 and len(text.splitlines()) < 60
    assert subprocess.run(["git", "status", "--porcelain"], cwd=project, capture_output=True, text=True).stdout == ""
    assert len((project / "runs.jsonl").read_text().splitlines()) == 1


def test_unprepared_is_one_sentence(project, tmp_path):
    log = project / "run.log"
    status = run_script("train.py", project, environment(tmp_path / "nothing", tmp_path), log)
    text = log.read_text()
    assert status == 1 and "Traceback" not in text
    assert re.fullmatch(r"FAIL: harness: nothing is prepared in .*; run: uv run prepare.py.*", text.strip().splitlines()[-1])


def test_a_wrong_knob_is_one_sentence(project, small_home, tmp_path):
    text = (project / "train.py").read_text()
    (project / "train.py").write_text(text.replace("width=128, head_dim=64", "width=100, head_dim=64"))
    log = project / "run.log"
    assert run_script("train.py", project, environment(small_home, tmp_path), log) == 1
    said = log.read_text().strip().splitlines()[-1]
    assert said.startswith("FAIL: harness: the knobs in train.py are wrong: width is not a multiple of head_dim")
    assert "Traceback" not in log.read_text()
