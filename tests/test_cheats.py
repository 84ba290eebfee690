"""What a train.py might do to score without progress, each beside an honest twin that must pass. What only a reading of
the file shows is tried in the tests of the referee."""

import contextlib
import functools
import math
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import doubts, fresh_run, run_prepare, words
from test_metric import Bigram, Fixed, T, V, one_hot, score, shifted
from test_packing import loader

from referee import audit, run

# -- what a model does while the clock stands


class Does(Bigram):
    """Calls something(model, ids) at every call; returns what that returns, if it is logits."""

    def __init__(self, something):
        super().__init__()
        self.something = something
        self.calls = 0
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("turns", torch.ones(3, dtype=torch.complex64))

    def forward(self, ids):
        self.calls += 1
        logits = super().forward(ids)
        out = self.something(self, ids)
        return out if getattr(out, "shape", None) == logits.shape else logits


def learn(rate, quiet, model, ids):
    """Remembers what followed what in the rows it was shown, once it has been called `quiet` times."""
    if model.calls > quiet:
        places = ids[:, :-1].flatten(), ids[:, 1:].flatten()
        model.table.weight.index_put_(places, torch.tensor(rate), accumulate=True)


def start_thread(*_):
    threading.Thread(target=lambda: threading.Event().wait(5), daemon=True).start()


def use_library(model, ids):
    """As compilers do, whose threads outlive the call."""
    model.pool = ThreadPoolExecutor(1)
    model.pool.submit(int).result()


def judge_beside_a_thread(prepare):
    start_thread()
    score(prepare, Bigram())


def judge_and_go_on(prepare):
    score(prepare, Bigram())
    next(loader(prepare, split="val"))
    next(loader(prepare))


def judge_too_early(prepare):
    prepare.bits_per_byte(Bigram(), prepare.dataset_in_use(), 8, "val", torch.device("cpu"))


def take_another_seed(prepare):
    torch.manual_seed(prepare.SEED + 1)
    next(loader(prepare))


def train_on_two_lengths(prepare):
    torch.manual_seed(prepare.SEED)
    next(loader(prepare, 4, T=32))
    next(loader(prepare))
    score(prepare, Bigram())


def judge(something):
    return lambda prepare: score(prepare, Does(something))


VAL = "validation rows were drawn before the score"
CHANGED = "parameters or buffers of the model changed while it was judged"
DOUBTED = {  # what: (how, given the module prepare; the doubt)
    "val by the loader": (lambda prepare: next(loader(prepare, split="val")), VAL),
    "val by the dataset": (lambda prepare: prepare.dataset_in_use().read("val"), VAL),
    "val by the judge": (judge_too_early, VAL),
    "another seed": (take_another_seed, "the seed was not the harness's: call torch.manual_seed(SEED), here 42"),
    "a little learning": (judge(functools.partial(learn, 1e-6, 0)), CHANGED),
    "a weight": (judge(lambda model, ids: model.table.weight[V - 1].add_(1e-3)), CHANGED),  # of an id in no row
    "a buffer": (judge(lambda model, ids: model.seen.add_(1)), CHANGED),
    "a complex buffer": (judge(lambda model, ids: model.turns.mul_(1j)), CHANGED),
    "a thread": (judge(start_thread), "a thread was started while the model was judged"),
}
TWINS = {
    "val and training after the score": judge_and_go_on,
    "two lengths": train_on_two_lengths,
    "a grown buffer": judge(lambda model, ids: setattr(model, "seen", torch.ones(4))),
    "a thread from before": judge_beside_a_thread,
    "a library's thread": judge(use_library),
}


@pytest.mark.parametrize("how, said", DOUBTED.values(), ids=DOUBTED)
def test_what_makes_a_score_doubtful(small, how, said):
    how(small)
    assert doubts() == [said]


@pytest.mark.parametrize("how", TWINS.values(), ids=TWINS)
def test_twins_without_a_doubt(small, how):
    how(small)
    assert doubts() == []


def test_training_while_judged(small):
    torch.manual_seed(small.SEED)
    batches = loader(small)
    next(batches)
    score(small, Does(lambda model, ids: next(batches)))
    assert doubts() == ["training batches were drawn while the model was judged"]


@pytest.mark.parametrize("rate, quiet", [(1.0, 0), (1e-2, 0), (1.0, 12), (0.1, 5)])
def test_learning_while_judged_is_refused(small, rate, quiet):
    with pytest.raises(small.PrepareError, match="learns while it is judged"):
        score(small, Does(functools.partial(learn, rate, quiet)))


def test_slow_learning_shows_at_the_end(small):
    with pytest.raises(small.PrepareError, match="scored again.*learns while it is judged"):
        score(small, Does(lambda model, ids: one_hot(ids) * (1 + 2e-5 * model.calls)), 2)


def test_what_eval_does_is_training_time(small):
    stopped = []
    model = Bigram()
    model.eval = lambda: stopped.append(run.this_run.clock.stopped)
    score(small, model)
    assert stopped == [None]
    assert run.this_run.clock.stopped is not None


def test_a_refused_model_has_no_second_try(small):
    with pytest.raises(small.PrepareError):
        score(small, Fixed(shifted))
    score(small, Bigram())
    assert run.this_run.score is None


def test_the_clock_at_the_door_cannot_be_set(small):
    assert {name for name in dir(small.clock) if not name.startswith("_")} == {"budget", "elapsed", "tick"}
    with pytest.raises(AttributeError):
        small.clock.budget = 10**6


# -- text that a run must not have read


@pytest.mark.parametrize("name", [f"prepared/{split}.tokens" for split in ("train", "val", "audit")] + ["shards/0"])
def test_text_read_past_the_loader(small, small_home, tmp_path, monkeypatch, name):
    shutil.copytree(small_home, tmp_path / "home")
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(run, "guard", lambda body, lock_key: body())
    (tmp_path / "home" / "local" / "shards").mkdir()
    (tmp_path / "home" / "local" / "shards" / "0").write_text("text")
    small.guard((tmp_path / "home" / "local" / name).read_bytes)  # which opens the dataset first
    assert len(doubts()) == 1
    assert f"read past the dataloader: {name.split('/')[1]} was opened by " in doubts()[0]


def test_twin_other_files_are_free(small, tmp_path):
    (small.dataset_in_use().folder / "tokenizer.json").read_bytes()
    (tmp_path / "val.tokens").write_text("mine")
    (tmp_path / "val.tokens").read_text()
    assert doubts() == []


def test_audit_is_not_for_the_run_to_ask(small, monkeypatch):
    monkeypatch.setenv("AUDIT", "1")
    score(small, Bigram())
    assert run.this_run.audit is None
    assert "audit.tokens" not in small.dataset_in_use().files


def test_another_preparation_during_a_run_changes_nothing(small, small_home, tmp_path, monkeypatch):
    wanted = score(small, Bigram())
    fresh_run(monkeypatch)
    shutil.copytree(small_home, tmp_path / "home")
    monkeypatch.setenv("AUTORESEARCH_HOME", str(tmp_path / "home"))
    batches = loader(small)
    (tmp_path / "other.txt").write_text(words(7, 20_000))
    done = run_prepare("--dataset", "local", "--path", tmp_path, "--vocab-size", 270, "--seq-len", 32)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("AUTORESEARCH_DATASET", "python")
    assert small.Tokenizer.from_directory().get_vocab_size() == V
    assert next(batches)[0].max() >= 270
    assert small.MAX_SEQ_LEN == T
    assert score(small, Bigram()) == pytest.approx(wanted, rel=1e-6)


# -- models that look where they should not, as seldom as they can


def two_back(ids):
    return one_hot(F.pad(ids, (2, 0))[:, :T])


def at_some_positions(look, model, ids):
    at = torch.randperm(T, generator=torch.Generator().manual_seed(5))[:34]  # of 64
    return one_hot(ids).index_copy(1, at, look(ids)[:, at])


def in_some_calls(when, look, model, ids):
    return look(ids) if when(model.calls) else one_hot(ids)


SELDOM = {
    "some positions": at_some_positions,
    "but the first batch": functools.partial(in_some_calls, lambda call: call > 3),
    "late": functools.partial(in_some_calls, lambda call: call > 20),
    "every other call": functools.partial(in_some_calls, lambda call: call % 2 == 0),
}


@pytest.mark.parametrize("seldom", SELDOM.values(), ids=SELDOM)
def test_a_seldom_leak(small, seldom):
    with pytest.raises(small.PrepareError):
        score(small, Does(functools.partial(seldom, shifted)), 4)
    assert run.this_run.score is None


@pytest.mark.parametrize("seldom, look", [(SELDOM["some positions"], two_back), (SELDOM["late"], one_hot)])
def test_twin_seldom_and_honest(small, seldom, look):
    score(small, Does(functools.partial(seldom, look)), 4)
    assert doubts() == []


@pytest.mark.parametrize("batches, B", [(8, 8), (64, 1), (3, 2), (200, 64)])
def test_probes_reach_every_batch_and_position_they_can_pay_for(small, batches, B):
    probes = small.draw_probes(np.random.default_rng(), batches, B, T)
    cuts = [cut for each in probes.values() for cut in each]
    beside = [cut for cut in cuts if -1 in cut]  # one row is kept, the others are not
    assert [sorted(set(cut.tolist())) for cut in beside] == [[-1, T - 1]] * (3 if B > 1 else 0)
    kept = [place for cut in cuts if -1 not in cut for place in cut.tolist()]
    calls = max(8, min(math.ceil(63 / B), batches // 4))
    assert len(kept) == calls * B
    assert len(set(kept)) == min(63, calls * B)
    assert {0, T - 2} <= set(kept)
    assert sum(len(each) > 0 for each in probes.values()) >= min(calls, batches)


def test_what_is_probed_differs_from_run_to_run(small, monkeypatch):
    drawn = []
    draw_probes = small.draw_probes

    def noted(*settings):
        drawn.append(draw_probes(*settings))
        return drawn[-1]

    monkeypatch.setattr(small, "draw_probes", noted)
    score(small, Bigram(), 2)
    score(small, Bigram(), 2)
    assert str(drawn[0]) != str(drawn[1])


# -- another ruler


class Halves(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return out * 0.5 if any(name in str(function) for name in ("log_softmax", "sum", "cat")) else out


@contextlib.contextmanager
def halved(owner, name):
    """A function of torch returns half."""
    original = getattr(owner, name)

    def cheap(*args, **kwargs):
        out = original(*args, **kwargs)
        return out * 0.5 if out.is_floating_point() else out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, cheap)
        yield


METHODS = ("float", "log_softmax", "gather", "masked_fill", "neg", "sum", "double")
REPLACED = {"a mode": Halves} | {f"Tensor.{name}": functools.partial(halved, torch.Tensor, name) for name in METHODS}
REPLACED |= {name: functools.partial(halved, F, name) for name in ("cross_entropy", "log_softmax")}
REPLACED |= {"cat": functools.partial(halved, torch, "cat")}


@pytest.mark.parametrize("replaced", REPLACED.values(), ids=REPLACED)
def test_replaced_functions_of_torch_change_nothing(small, replaced):
    wanted = score(small, Bigram())
    with replaced():
        assert score(small, Bigram()) == pytest.approx(wanted, rel=1e-6)


def test_twin_default_device(small):
    wanted = score(small, Bigram())
    model = Bigram()
    torch.set_default_device("meta")  # what names no device would hold no numbers
    try:
        assert next(loader(small))[0].sum() > 0
        assert score(small, model) == pytest.approx(wanted, rel=1e-6)
    finally:
        torch.set_default_device(None)


def test_replaced_functions_of_the_frozen_half_are_named(small, monkeypatch):
    assert audit.broken_seals() == []
    monkeypatch.setattr(small, "draw_probes", lambda *args: {})
    monkeypatch.setattr(small.Judge, "nats", lambda self, ids, targets: torch.zeros(ids.shape))
    assert set(audit.broken_seals()) == {"prepare.Judge.nats", "prepare.draw_probes"}
