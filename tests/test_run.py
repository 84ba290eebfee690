"""Schedule, warm-up, loop and output of train.py, and the whole of it in a process."""

import io
import itertools
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from reference import CUDA, TINY, V, cpu_knobs, draw_ids, tiny
from zygote import run_script

import train
from bench.reference import REFERENCE, abba, arm_source

LOOP = dict(window_pattern="L", ngram_rows=(), taps=0, warmdown=0.5, final_lr=0.0, x0_init=0.1)
KNOBS = cpu_knobs(**TINY)
PROGRESS = train.Progress


def model_and_optimizer(**changes):
    model = tiny(**{**LOOP, **changes})
    return model, train.make_optimizer(model)


# -- schedule


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
        assert (wide.lr.item(), wide.mu.item(), wide.decay.item()) == pytest.approx(wanted)
    assert not any(group.lr for group in optimizer.groups)


# -- warm-up


def generators():
    return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()


def everything(model, optimizer):
    """(storage, bytes) of all tensors, found without the help of train.py, and the gradients."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for i, group in enumerate(optimizer.groups):
        for name, value in vars(group).items():
            tensors = value if isinstance(value, list) else [value]
            found.update({f"{i} {name} {j}": t for j, t in enumerate(tensors) if torch.is_tensor(t)})
    state = {
        name: (t.data_ptr(), t.detach().reshape(-1).view(torch.uint8).numpy().tobytes()) for name, t in found.items()
    }
    return {**state, "gradients": [p.grad for p in model.parameters()], "training": model.training}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_warm_up_leaves_no_trace(dtype):
    model, optimizer = model_and_optimizer(ngram_rows=(64, 64), taps=2, micro_tokens=64, eval_tokens=128, dtype=dtype)
    step = optimizer.step
    steps = []

    def careless_step():
        step()
        steps.append(everything(model, optimizer))
        random.random()
        np.random.rand()

    optimizer.step = careless_step
    before = everything(model, optimizer)
    assert train.warm_up(model, model, optimizer) == (4, 8)
    after = everything(model, optimizer)
    assert [name for name in before if before[name] != after[name]] == []
    assert len([name for name in before if before[name] != steps[0][name]]) > 40  # it did train meanwhile
    assert len(steps) == 2
    left = generators()
    random.seed(train.SEED)
    np.random.seed(train.SEED)
    torch.manual_seed(train.SEED)
    assert left == generators()


def test_parameters_without_a_gradient_are_named():
    model, optimizer = model_and_optimizer()
    model.blocks[1].attention.out.weight.requires_grad_(False)
    with pytest.raises(train.PrepareError, match="no gradient reaches blocks.1.attention.out.weight; use "):
        train.warm_up(model, model, optimizer)


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
    model, optimizer = model_and_optimizer(micro_tokens=128, eval_tokens=64)
    assert train.warm_up(model, limited(model, error, 5, 3), optimizer) == (4, 2)
    training, evaluation = capsys.readouterr().out.splitlines()
    assert re.search("out of memory: 4 rows .* instead of 8, .*accumulation", training)
    assert re.search("out of memory: 2 rows .* instead of 4, .*evaluation", evaluation)


def test_what_halving_cannot_mend_ends_the_run():
    model, optimizer = model_and_optimizer(micro_tokens=128)
    with pytest.raises(torch.OutOfMemoryError):
        train.warm_up(model, limited(model, FULL[0], 0, 9), optimizer)
    with pytest.raises(RuntimeError, match="device-side assert"):
        train.warm_up(model, limited(model, RuntimeError("device-side assert"), 0, 0), optimizer)


def test_memory_is_counted_from_the_end_of_the_warm_up(monkeypatch):
    calls = []

    def largest(rows, what, attempt):
        calls.append(what)
        return rows

    monkeypatch.setattr(train, "largest", largest)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    nothing = dict(state_dict=dict, load_state_dict=list, parameters=list)
    model = SimpleNamespace(knobs=KNOBS, T=16, head=SimpleNamespace(weight=SimpleNamespace(device=CUDA)), **nothing)
    train.warm_up(model, None, SimpleNamespace(groups=[]))
    assert calls == ["with more accumulation", "in evaluation", "reset"]


@pytest.mark.parametrize("user", [{}, {"PYTORCH_ALLOC_CONF": "x"}, {"PYTORCH_CUDA_ALLOC_CONF": "x"}])
def test_the_allocator_is_told_before_the_gpu_is_used_unless_the_user_has(user):
    text = (ROOT / "train.py").read_text()
    environ = dict(user)
    seen = []
    stand_ins = {"guard": lambda main: seen.append(dict(environ)), "main": None, "os": SimpleNamespace(environ=environ)}
    exec(text[text.index("if __name__ ==") :], {"__name__": "__main__", **stand_ins})
    assert seen == [user or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}]


# -- device


CARDS = [139.8, 79.1, 47.4, 44.4, 39.4, 31.4, 22.1, 15.6, 11.6, 9.6, 7.7, 3.9]


def test_memory_picks_the_tier(monkeypatch):
    tiers = []
    for gigabytes in CARDS:
        facts = SimpleNamespace(total_memory=int(gigabytes * 2**30))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
        tiers.append(train.pick_tier(CUDA)[0])
    assert tiers == [f"cuda-{size}" for size in (80, 80, 48, 48, 24, 24, 24, 12, 12, 8, 8, 8)]


@pytest.mark.parametrize("bf16, dtype", [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_computes_in_what_its_tensor_cores_have(monkeypatch, bf16, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert train.pick_device() == (CUDA, dtype)


def test_the_compiler_falls_back_where_it_does_not_work(monkeypatch, capsys):
    def broken(function, **options):
        raise RuntimeError("No working C++ compiler found\nlong trace")

    monkeypatch.setattr(torch, "compile", broken)
    assert train.pick_compiler(torch.device("cpu")) is train.uncompiled
    said = capsys.readouterr().out
    assert "No working C++ compiler found" in said
    assert said.count("\n") == 1


# -- the loop


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
        rows = (draw_ids(4, 1, seed=epoch) + torch.arange(17)) % V
        yield rows[:, :-1], rows[:, 1:], epoch


def halves():
    for ids, targets, epoch in batches():
        yield ids[:2], targets[:2], epoch
        yield ids[2:], targets[2:], epoch


def looped(monkeypatch, budget=40, accumulation=1, forward=None, loader=None, **changes):
    """(what train returns, the loss of every micro-batch, the model, what was read and shown)."""
    monkeypatch.setattr(train, "clock", Ticks())
    monkeypatch.setattr(train, "TIME_BUDGET", budget)
    model, optimizer = model_and_optimizer(seed=0, **changes)
    losses = []
    seen = []

    def spy(ids, targets):
        loss = (forward or model)(ids, targets)
        losses.append(loss.item())
        return loss

    class Progress(PROGRESS):
        def read(self, loss, step):
            seen.append((step, float(loss)))
            super().read(loss, step)

    monkeypatch.setattr(train, "Progress", Progress)
    return train.train(model, spy, optimizer, loader or batches(), accumulation), losses, model, seen


def test_loop_learns_and_ends_with_the_budget(monkeypatch):
    counted, losses, model, seen = looped(monkeypatch)
    assert counted == (40, 40 * 64)
    assert seen == [(step, pytest.approx(losses[step], rel=1e-5)) for step in (0, 10, 20, 30, 39)]
    # late and tight: what a wrong sign, an unshifted target or a lost rate would move
    golden = {0: 4.0922, 5: 2.0668, 10: 0.805, 20: 0.1219, 30: 0.0459, 39: 0.0415}
    assert {step: losses[step] for step in golden} == pytest.approx(golden, rel=0.03)
    assert all(p.grad is None for p in model.parameters())


def test_fp16_gradients_are_scaled_and_the_loss_is_not(monkeypatch):
    norms = []
    monkeypatch.setattr(train.Optimizer, "step", lambda self: norms.append(self.params()[0].grad.norm().item()))
    _, _, _, (plain, _) = looped(monkeypatch, budget=1)
    _, _, _, (scaled, _) = looped(monkeypatch, budget=1, dtype=torch.float16)
    assert norms[1] == pytest.approx(2**15 * norms[0], rel=0.01)
    assert scaled == pytest.approx(plain, rel=0.01)


def test_accumulation_is_the_same_mathematics(monkeypatch):
    counted, whole, model, seen = looped(monkeypatch, budget=6)
    accumulated, parts, other, read = looped(monkeypatch, budget=6, accumulation=2, loader=halves())
    assert counted == accumulated == (6, 6 * 64)
    assert [loss for _, loss in read] == pytest.approx([loss for _, loss in seen], abs=2e-3)
    assert [(a + b) / 2 for a, b in zip(parts[::2], parts[1::2])] == pytest.approx(whole, abs=2e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 100.5])
@pytest.mark.parametrize("budget, first, named", [(40, 10, 10), (40, 4, 10), (4, 3, 3)])
def test_a_wild_loss_is_named_at_the_tenth_step_and_at_the_end(monkeypatch, value, budget, first, named):
    steps = itertools.count()
    monkeypatch.setattr(train.Optimizer, "step", lambda self: None)

    def forward(ids, targets):
        return torch.tensor(value if next(steps) >= first else 1.0, requires_grad=True)

    with pytest.raises(FloatingPointError, match=f"at step {named}$"):
        looped(monkeypatch, budget=budget, forward=forward)
    assert next(steps) == named + 1


def shown_in(monkeypatch, live):
    """What 3,000 steps of a tenth of a second print."""
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: live)
    monkeypatch.setattr(train.sys, "stdout", out)
    progress = train.Progress()
    progress.read(torch.tensor(3.0), 0)
    for step in range(1, 3001):
        progress.show(step, step / 10, step, 1, 1.0)
    return out.getvalue()


def test_log_file_stays_short_and_terminal_is_one_line(monkeypatch):
    text = shown_in(monkeypatch, live=False)
    assert 20 <= text.count("\n") <= 26
    assert "loss 3.0000" in text
    text = shown_in(monkeypatch, live=True)
    assert text.count("\n") == 1
    assert text.count("\r") > 1000


# -- in a process


def settings(home, tmp_path):
    locks = tmp_path / "locks"
    locks.mkdir()
    changes = {"AUTORESEARCH_HOME": str(home), "TIME_BUDGET": "1", "TMPDIR": str(locks), "TORCH_COMPILE_DISABLE": "1"}
    return {**os.environ, **changes}


@pytest.mark.timeout(300)  # two imports of torch, one of its compiler
def test_the_real_thing_by_hand(small_project, small_home, tmp_path):
    project = small_project
    with open(project / "run.log", "w") as log:
        command = [sys.executable, "train.py"]
        environment = settings(small_home, tmp_path)
        done = subprocess.run(command, cwd=project, env=environment, stdout=log, stderr=subprocess.STDOUT)
    text = (project / "run.log").read_text()
    assert done.returncode == 0, text
    assert re.search(r"^---\nval_bpb:          \d\.\d{6}\ntraining_seconds: [1-9]\.\d\n", text, re.M)
    values = dict(re.findall(r"^(\w+): +(.+)$", text, re.M))
    assert int(values["num_steps"]) >= 1
    assert values["depth"] == "4"
    assert values["attention"] == "chunks"
    assert values["tier"] == "cpu"
    assert 0 < float(values["epochs"]) < 99
    assert text.count("\n") < 60
    assert subprocess.check_output(["git", "status", "--porcelain"], cwd=project) == b""


@pytest.mark.parametrize(
    "prepared, old, new, words",
    [
        (False, "", "", "nothing is prepared in .*; run: uv run prepare.py"),
        (
            True,
            "width=128,",
            "width=100,",
            "the knobs in train.py are wrong: width is not a multiple of head_dim; corr",
        ),
    ],
)
def test_a_mistake_is_one_sentence(project, small_home, tmp_path, prepared, old, new, words):
    text = (project / "train.py").read_text()
    (project / "train.py").write_text(text.replace(old, new, 1))
    environment = settings(small_home if prepared else tmp_path / "nothing", tmp_path)
    status = run_script("train.py", project, environment, project / "run.log")
    text = (project / "run.log").read_text()
    assert status == 1
    assert "Traceback" not in text
    assert re.search(rf"^FAIL: harness: {words}", text, re.M), text


def test_the_bench_runs_both_recipes_in_abba_order():
    order = abba(["a", "b"], [1, 2, 3])
    assert order == [("a", 1), ("b", 1), ("b", 2), ("a", 2), ("a", 3), ("b", 3)]
    assert "'warmdown': 0.5" in arm_source("reference", on_cpu=True)
    assert "'batch_tokens': 8192" in arm_source("reference", on_cpu=True)
    assert "'batch_tokens': 524288" in arm_source("reference", on_cpu=False)
