"""What a train.py might do to score without progress, each beside an honest twin that must pass. What only a reading of
the file shows is tried in the tests of referee.py."""

import functools
import os
import shutil
import threading
import time

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import run_prepare
from test_metric import Bigram, Fixed, one_hot, score, shifted

import referee

T, V = 64, 512  # of the small dataset


def doubts():
    return referee.this_run.doubts


def train_loader(prepare, B=2, length=T):
    return prepare.make_dataloader(prepare.Tokenizer.from_directory(), B, length, "train", device="cpu")


# -- text that a run must not have read

VAL_ROUTES = {
    "the loader": lambda prepare: next(prepare.make_dataloader(prepare.Tokenizer.from_directory(), 2, T, "val")),
    "packed rows": lambda prepare: prepare.Rows(prepare._dataset(), "val", T).fill(torch.zeros(1, T + 1).numpy()),
    "the dataset": lambda prepare: prepare._dataset().read("val"),
    "the judge": lambda prepare: prepare._bits_per_byte(Bigram(), prepare._dataset(), 8, "val", torch.device("cpu")),
}


@pytest.mark.parametrize("draw", VAL_ROUTES.values(), ids=VAL_ROUTES)
def test_val_rows_before_the_score(small, draw):
    draw(small)
    assert doubts() == ["validation rows were drawn before the score"]


def test_twin_val_rows_after_the_score(small):
    score(small, Bigram())
    next(small.make_dataloader(small.Tokenizer.from_directory(), 2, T, "val"))
    assert doubts() == []


def test_twin_second_loader_and_evaluation_on_train_rows(small):
    torch.manual_seed(small.SEED)
    first = train_loader(small)
    second = train_loader(small, 4, 32)  # a curriculum of T
    held = [next(second) for _ in range(3)]
    for inputs, targets, _ in held:
        F.cross_entropy(Bigram()(inputs).flatten(0, 1), targets.flatten())
    next(first)
    score(small, Bigram())
    assert doubts() == []
    assert referee.this_run.rows == 3 * 4 + 2


@pytest.mark.parametrize("split", ["train", "val", "audit"])
def test_token_files_read_past_the_loader(small, split):
    folder = small._dataset().folder
    (folder / f"{split}.tokens").read_bytes()
    assert len(doubts()) == 1
    assert doubts()[0].startswith(f"the data was read past the dataloader: {split}.tokens was opened by ")


def test_twin_other_files_are_free(small, tmp_path):
    folder = small._dataset().folder
    (folder / "tokenizer.json").read_bytes()
    (tmp_path / "val.tokens").write_text("mine")
    (tmp_path / "val.tokens").read_text()
    assert doubts() == []


def test_guard_opens_the_dataset_before_the_run(small, monkeypatch):
    monkeypatch.setattr(referee, "guard", lambda body, lock_key, limit: body())
    folder = os.path.join(os.environ["AUTORESEARCH_HOME"], "local")
    small.guard(lambda: open(os.path.join(folder, "val.tokens")).close())
    assert "val.tokens was opened" in doubts()[0]


def test_audit_is_not_for_the_run_to_ask(small, monkeypatch):
    monkeypatch.setenv("AUDIT", "1")
    score(small, Bigram())
    assert referee.this_run.audit is None
    assert "audit.tokens" not in small._dataset().files


def test_another_preparation_during_a_run_changes_nothing(small, small_home, tmp_path, monkeypatch):
    home = tmp_path / "home"
    shutil.copytree(small_home, home)
    monkeypatch.setenv("AUTORESEARCH_HOME", str(home))
    loader = train_loader(small)
    before = [small.MAX_SEQ_LEN, small._dataset().meta]
    text = tmp_path / "text"
    text.mkdir()
    (text / "other.txt").write_text("".join(f"some other words, number {n}, of another text\n" for n in range(9000)))
    done = run_prepare("--dataset", "local", "--path", text, "--vocab-size", 270, "--seq-len", 32)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("AUTORESEARCH_DATASET", "python")
    theirs = score(small, Bigram())
    assert small.Tokenizer.from_directory().get_vocab_size() == V
    assert next(loader)[0].max() >= 270
    assert [small.MAX_SEQ_LEN, small._dataset().meta] == before
    monkeypatch.setenv("AUTORESEARCH_HOME", str(small_home))
    monkeypatch.delenv("AUTORESEARCH_DATASET")
    small._dataset.cache_clear()
    assert theirs == score(small, Bigram())


# -- models that look where they should not, as seldom as they can


def some_positions(ids, look):
    """one_hot, but at 34 of 64 positions what `look` says."""
    out = one_hot(ids)
    at = torch.randperm(T, generator=torch.Generator().manual_seed(5))[:34]
    out[:, at] = look(ids)[:, at]
    return out


def two_back(ids):
    return one_hot(F.pad(ids, (2, 0))[:, :T])


def test_a_leak_at_some_positions(small):
    with pytest.raises(small.PrepareError, match="sees the future"):
        score(small, Fixed(functools.partial(some_positions, look=shifted)))


def test_twin_looking_back_at_some_positions(small):
    score(small, Fixed(functools.partial(some_positions, look=two_back)))
    assert doubts() == []


class Counting(nn.Module):
    """What it does depends on the number of calls before: `odd` in every call but the first three, half of them, ..."""

    def __init__(self, odd, when):
        super().__init__()
        self.odd = odd
        self.when = when
        self.calls = 0

    def forward(self, ids):
        self.calls += 1
        return self.odd(ids) if self.when(self.calls) else one_hot(ids)


WHENS = {"but the first batch": lambda n: n > 3, "late": lambda n: n > 20, "every other call": lambda n: n % 2 == 0}


@pytest.mark.parametrize("when", WHENS.values(), ids=WHENS)
def test_a_leak_in_some_calls(small, when):
    with pytest.raises(small.PrepareError):
        score(small, Counting(shifted, when), 2)
    assert referee.this_run.score is None


@pytest.mark.parametrize("when", WHENS.values(), ids=WHENS)
def test_twin_counting_calls(small, when):
    score(small, Counting(one_hot, when), 2)
    assert doubts() == []


def test_what_is_probed_differs_from_run_to_run(small, monkeypatch):
    later = small._later_tokens
    probed = []

    def noted(judge, ids, cuts):
        probed[-1].add((*ids.flatten().tolist(), *cuts.tolist()))
        return later(judge, ids, cuts)

    monkeypatch.setattr(small, "_later_tokens", noted)
    for _ in range(2):
        probed.append(set())
        score(small, Bigram(), 2)
    assert min(map(len, probed)) >= 8  # with their cuts: the small val split has equal rows
    assert probed[0] != probed[1]


def test_ids_tell_nothing_of_what_lies_behind_them(small):
    def f(ids):
        beyond = ids.as_strided((1, T), (T, 1), 1)  # RuntimeError where the storage ends with the ids
        return one_hot(beyond)

    with pytest.raises(RuntimeError, match="out of bounds"):
        score(small, Fixed(f), 1)


def test_a_refused_model_has_no_second_try(small):
    with pytest.raises(small.PrepareError):
        score(small, Fixed(shifted))
    score(small, Bigram())
    assert referee.this_run.score is None


# -- learning while the clock stands


class TrainsInEval(Bigram):
    def eval(self):
        self.stopped = referee.clock.stopped
        with torch.no_grad():
            self.table.weight.mul_(0.5)
        return super().eval()


def test_what_eval_does_is_training_time(small):
    model = TrainsInEval()
    score(small, model)
    assert model.stopped is None
    assert small.clock.stopped is not None
    assert doubts() == []


class Drifts(Bigram):
    """Learns too little between two calls to be seen there."""

    calls = 0

    def forward(self, ids):
        self.calls += 1
        return one_hot(ids) * (1 + 2e-5 * self.calls)


def test_slow_learning_shows_at_the_end(small):
    with pytest.raises(small.PrepareError, match="scored again.*learns while it is judged"):
        score(small, Drifts(), 2)


class StartsThread(Bigram):
    def __init__(self, seconds, join):
        super().__init__()
        self.seconds = seconds
        self.join = join
        self.thread = None

    def forward(self, ids):
        if self.thread is None:
            self.thread = threading.Thread(target=lambda: time.sleep(self.seconds), daemon=True)
            self.thread.start()
            if self.join:
                self.thread.join()
        return super().forward(ids)


def test_a_thread_while_the_model_is_judged(small):
    score(small, StartsThread(seconds=5, join=False))
    assert doubts() == ["a thread was started while the model was judged"]


def test_twin_a_thread_from_before(small):
    model = StartsThread(seconds=1, join=False)
    model(torch.zeros(1, T, dtype=torch.int64))
    score(small, model)
    assert doubts() == []


class ChangesItself(Bigram):
    """Adds a little to what no row needs, where the score does not show it."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.register_buffer("seen", torch.zeros(3))
        self.plain = torch.zeros(3)

    def forward(self, ids):
        if self.kind == "parameter":
            self.table.weight[V - 1] += 1e-3
        if self.kind == "buffer":
            self.seen += 1
        if self.kind == "grown buffer":
            self.seen = torch.ones(4)
        if self.kind == "cache":
            self.plain += 1
        return super().forward(ids)


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_weights_that_change_while_they_are_judged(small, kind):
    score(small, ChangesItself(kind))
    assert doubts() == ["parameters or buffers of the model changed while it was judged"]


@pytest.mark.parametrize("kind", ["grown buffer", "cache"])
def test_twin_what_a_model_keeps_for_itself(small, kind):
    score(small, ChangesItself(kind))
    assert doubts() == []


def test_twin_averaged_weights(small):
    model, average = Bigram(), Bigram(seed=1)
    with torch.no_grad():
        average.table.weight.lerp_(model.table.weight, 0.1)
    model.load_state_dict(average.state_dict())
    score(small, model)
    assert doubts() == []


# -- another ruler


@pytest.mark.parametrize("owner, name", [(F, "cross_entropy"), (F, "log_softmax"), (torch, "gather"), (torch, "where")])
def test_replaced_functions_of_torch_change_nothing(small, monkeypatch, owner, name):
    wanted = score(small, Bigram())
    small.clock.stopped = None
    original = getattr(owner, name)
    monkeypatch.setattr(
        owner, name, lambda *args, **kwargs: original(*args, **kwargs) * (1 if name == "where" else 0.5)
    )
    assert score(small, Bigram()) == wanted


@pytest.mark.parametrize("name", ["float", "sum", "log_softmax", "gather", "masked_fill", "neg", "isfinite"])
def test_replaced_methods_of_tensors_change_nothing(small, monkeypatch, name):
    wanted = score(small, Bigram())
    original = getattr(torch.Tensor, name)

    def cheap(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        return out * 0.5 if out.dim() == 3 else out

    monkeypatch.setattr(torch.Tensor, name, cheap, raising=False)
    assert score(small, Bigram()) == wanted


class Halves(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return out * 0.5 if "log_softmax" in str(function) else out


def test_a_mode_of_torch_changes_nothing(small):
    wanted = score(small, Bigram())
    with Halves():
        assert score(small, Bigram()) == wanted


def test_twin_default_device(small):
    wanted = score(small, Bigram())
    torch.set_default_device("meta")  # what names no device would hold no numbers
    try:
        loader = small.make_dataloader(small.Tokenizer.from_directory(), 2, T, "train", device="cpu")
        assert next(loader)[0].sum() > 0
        assert small.get_token_bytes().sum() > 0
        model = Bigram().to_empty(device="cpu")
        model.table.weight.data.copy_(torch.randn(V, V, generator=torch.Generator().manual_seed(0), device="cpu") * 2)
        assert score(small, model) == wanted
    finally:
        torch.set_default_device(None)


class Odd(torch.Tensor):
    pass


def test_a_tensor_subclass(small):
    with pytest.raises(small.PrepareError, match="plain torch.Tensor, not a Odd"):
        score(small, Fixed(lambda ids: one_hot(ids).as_subclass(Odd)))


def test_a_tokenizer_of_other_bytes_changes_nothing(small):
    class Doubled(small.Tokenizer):
        def token_bytes(self):
            return 2 * small.get_token_bytes()

    wanted = score(small, Bigram())
    assert small.evaluate_bpb(Bigram(), Doubled.from_directory(), 8) == wanted
    assert small.evaluate_bpb(Bigram(), None, 8) == wanted


def test_replaced_functions_of_the_frozen_half_are_named(small, monkeypatch):
    assert referee.broken_seals() == []
    monkeypatch.setattr(small, "_require_kept", lambda *args: None)
    monkeypatch.setattr(small.Judge, "nats", lambda self, ids, targets: torch.zeros(ids.shape))
    assert referee.broken_seals() == ["prepare.Judge.nats", "prepare._require_kept"]


def test_another_seed(small):
    torch.manual_seed(small.SEED + 1)
    next(train_loader(small))
    assert doubts() == [f"the seed was not the harness's: call torch.manual_seed(SEED), here {small.SEED}"]


def test_every_draw_is_a_sign_of_life(small):
    small.clock.start(now=time.monotonic() - 100)
    loader = train_loader(small)
    next(loader)
    assert small.clock.last == pytest.approx(100, abs=5)
    assert small.clock.steps == []


@pytest.mark.parametrize("grace, limit", [(10**6, 300), (2, 2)])
def test_grace_has_a_limit(small, monkeypatch, grace, limit):
    seen = []
    monkeypatch.setattr(referee, "guard", lambda body, lock_key, seconds: seen.append(seconds))
    small.guard(print, grace=grace)
    assert seen == [small.TIME_BUDGET + limit]


# -- honest techniques that compute in unusual ways


def long_convolution(ids):
    """A causal convolution over the row by FFT, padded with zeros."""
    generator = torch.Generator().manual_seed(2)
    x = F.one_hot(ids, V).float() @ torch.randn(V, 32, generator=generator)
    kernel = torch.randn(T, 32, generator=generator) * 0.3
    y = torch.fft.irfft(torch.fft.rfft(x, 2 * T, dim=1) * torch.fft.rfft(kernel, 2 * T, dim=0), 2 * T, dim=1)[:, :T]
    return y @ torch.randn(32, V, generator=generator)


def wrapped_convolution(ids):
    x = one_hot(ids)
    return torch.fft.irfft(torch.fft.rfft(x, T, dim=1) * torch.fft.rfft(torch.ones(T, 1), T, dim=0), T, dim=1)


def sorted_experts(ids):
    """Tokens of all rows sorted by their expert, computed together in bf16, and put back."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(V, 32, generator=generator)[ids].flatten(0, 1).bfloat16()
    experts = [torch.randn(32, V, generator=generator).bfloat16() for _ in range(4)]
    order = (ids.flatten() % 4).argsort(stable=True)
    counts = (ids.flatten() % 4).bincount(minlength=4).tolist()
    out = torch.cat([part @ expert for part, expert in zip(x[order].split(counts), experts)])
    return out[order.argsort()].view(*ids.shape, V)


@pytest.mark.parametrize("f", [long_convolution, sorted_experts])
def test_twin_unusual_and_honest(small, f):
    score(small, Fixed(f))
    assert doubts() == []


def test_a_convolution_that_wraps_around(small):
    with pytest.raises(small.PrepareError, match="sees the future"):
        score(small, Fixed(wrapped_convolution))


@pytest.mark.parametrize("strength, hint", [(0.003, True), (1.0, False)])
def test_only_a_small_leak_may_be_rounding(small, strength, hint):
    with pytest.raises(small.PrepareError, match="sees the future") as caught:
        score(small, Fixed(lambda ids: one_hot(ids) + strength * shifted(ids)))
    assert ("if that is rounding (an FFT in bf16 can do it)" in str(caught.value)) == hint
