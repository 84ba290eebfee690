"""bits per byte in closed form, and what the judge refuses: sight of the future, of other rows, no numbers."""

import functools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import doubts, fresh_run
from test_packing import loader

from referee import run

B, T = 8, 64  # of the small dataset
V = 512


class Fixed(nn.Module):
    """logits(ids) from a function, with a parameter so that it has a device."""

    def __init__(self, f):
        super().__init__()
        self.f = f
        self.p = nn.Parameter(torch.zeros(()))

    def forward(self, ids):
        return self.f(ids)


class Bigram(nn.Module):
    """An honest model: logits depend on the current token alone."""

    def __init__(self, seed=0):
        super().__init__()
        self.table = nn.Embedding(V, V, _weight=2 * drawn(seed, V, V))

    def forward(self, ids):
        return self.table(ids)


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_hot(ids, scale=8.0):
    return F.one_hot(ids % V, V).float() * scale


def scored_rows(prepare):
    """(inputs, targets) of the 64 rows that are scored."""
    return next(loader(prepare, 64, "val"))[:2]


def score(prepare, model, batch=B):
    return prepare.evaluate_bpb(model, prepare.Tokenizer.from_directory(), batch)


# -- the number


@pytest.mark.parametrize("level", [0.0, 1e35])  # the sum of the second overflows fp32, which is no infinity
def test_uniform_logits_cost_log2_vocab_a_token(small, level):
    sizes = small.get_token_bytes()
    _, targets = scored_rows(small)
    counted = (sizes[targets] > 0).sum().item()
    assert counted < targets.numel()  # some targets are BOS, and must not count
    wanted = math.log2(V) * counted / sizes[targets].sum().item()
    assert score(small, Fixed(lambda ids: torch.full((*ids.shape, V), level))) == pytest.approx(wanted, rel=1e-6)


def test_against_a_plain_computation(small):
    model = Bigram()
    inputs, targets = scored_rows(small)
    sizes = small.get_token_bytes()
    surprise = -model.table.weight.detach().double().log_softmax(-1)[inputs, targets]
    wanted = surprise[sizes[targets] > 0].sum() / math.log(2) / sizes[targets].sum()
    assert score(small, model) == pytest.approx(wanted.item(), rel=1e-5)


def test_oracle_scores_zero(small, monkeypatch):
    """Logits of the true target would score 0; the probes, which would refuse such a model, are set aside."""
    monkeypatch.setattr(small, "draw_probes", lambda random, batches, B, T: {n: [] for n in range(batches)})
    truth = {tuple(row.tolist()): goal for row, goal in zip(*scored_rows(small))}
    oracle = Fixed(lambda ids: torch.stack([one_hot(truth[tuple(row.tolist())], 100.0) for row in ids]))
    assert score(small, oracle) == pytest.approx(0, abs=1e-6)


def test_raw_bytes_weigh_one_and_specials_nothing(small):
    tokenizer = small.Tokenizer.from_directory()
    sizes = small.get_token_bytes("cpu")
    assert sizes[:256].tolist() == [1] * 256
    assert sizes[-4:].tolist() == [0] * 4
    assert tokenizer.get_bos_token_id() == V - 4 == tokenizer.enc.encode_single_token("<|reserved_0|>")
    assert any("\ufffd" in tokenizer.decode([i]) for i in range(V - 4))  # partial UTF-8
    assert sizes[:-4].tolist() == [len(tokenizer.enc.decode_single_token_bytes(i)) for i in range(V - 4)]


@pytest.mark.parametrize("batch, rows_of_a_slice", [(1, 1), (7, 3), (40, 64), (100, 30)])
def test_batches_and_slices_change_nothing(small, monkeypatch, batch, rows_of_a_slice):
    wanted = score(small, Bigram())
    monkeypatch.setattr(small, "SLICE", rows_of_a_slice * T * V)
    assert score(small, Bigram(), batch) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 24])
def test_every_call_has_the_full_shape_and_nothing_but_ids(small, batch):
    seen = set()

    def f(*args, **kwargs):
        (ids,) = args
        layout = (tuple(ids.shape), ids.stride(), ids.dtype, ids.untyped_storage().nbytes())
        seen.add((layout, len(kwargs), torch.is_grad_enabled()))
        return one_hot(ids)

    model = Fixed(f)
    model.forward = f
    score(small, model, batch)
    assert seen == {(((batch, T), (T, 1), torch.int64, 8 * batch * T), 0, False)}  # the last batch is padded


def test_first_call_counts_and_later_ones_change_nothing(small):
    first = score(small, Bigram())
    stopped = run.this_run.clock.stopped
    assert abs(score(small, Bigram(seed=1)) - first) > 1e-3
    assert run.this_run.clock.stopped == stopped is not None
    assert run.this_run.score == first


def test_audit_only_when_asked(small, monkeypatch):
    score(small, Bigram())
    assert run.this_run.audit is None
    fresh_run(monkeypatch)
    monkeypatch.setattr(small, "AUDIT", True)
    score(small, Bigram())
    assert abs(run.this_run.audit - run.this_run.score) > 1e-3


FORKS = dict.fromkeys(["eval_tokens", "dataset", "seq_len", "max_steps", "backend", "rank", "world_size"], 3)


def test_keywords_of_forks_are_ignored_in_one_line(small, capsys):
    wanted = score(small, Bigram())
    assert small.evaluate_bpb(Bigram(), None, B, device="cpu", **FORKS) == pytest.approx(wanted, rel=1e-6)
    assert next(loader(small, 2, **FORKS))[0].shape == (2, T)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("evaluate_bpb ignores device='cpu', eval_tokens=3, ")
    assert lines[1].startswith("make_dataloader ignores eval_tokens=3, ")
    assert len(lines) == 2


# -- models that look where they must not, and what is no score


def shifted(ids):
    return one_hot(torch.cat([ids[:, 1:], ids[:, -1:]], dim=1))


def bidirectional(ids):
    x = drawn(0, V, 16)[ids]
    return F.scaled_dot_product_attention(x, x, x) @ drawn(1, 16, V)


def convolution(ids, length):
    """By FFT; without zeros that make it longer than the row, a row's end meets its start."""
    spectrum = torch.fft.rfft(drawn(2, V, 32)[ids], length, dim=1) * torch.fft.rfft(drawn(3, T, 32), length, dim=0)
    return torch.fft.irfft(spectrum, length, dim=1)[:, :T] @ drawn(4, 32, V) * 0.3


FUTURE = {
    "one ahead": shifted,
    "one ahead, late": lambda ids: torch.cat([one_hot(ids)[:, : -T // 8], shifted(ids)[:, -T // 8 :]], dim=1),
    "one ahead, early": lambda ids: torch.cat([shifted(ids)[:, :2], one_hot(ids)[:, 2:]], dim=1),
    "attention without a mask": bidirectional,
    "a little of it": lambda ids: one_hot(ids) + 0.01 * bidirectional(ids),
    "the mean of the row": lambda ids: one_hot(ids) + one_hot(ids).mean(dim=1, keepdim=True),
    "the last token": lambda ids: one_hot(ids) + one_hot(ids[:, -1:]).expand(-1, T, -1),
    "a wrapped convolution": lambda ids: convolution(ids, T),
}


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("f", FUTURE.values(), ids=FUTURE)
def test_sight_of_the_future_is_refused(small, f, batch):
    with pytest.raises(small.PrepareError, match="sees the future"):
        score(small, Fixed(f), batch)
    assert run.this_run.score is None


@pytest.mark.parametrize("strength, hint", [(0.003, True), (0.1, False)])
def test_only_a_small_leak_may_be_rounding(small, strength, hint):
    with pytest.raises(small.PrepareError, match="sees the future") as caught:
        score(small, Fixed(lambda ids: one_hot(ids) + strength * shifted(ids)))
    assert ("if that is rounding" in str(caught.value)) == hint


def spoilt(value, ids):
    out = one_hot(ids)
    out[-1, 33, 3] = value
    return out


def specials_at(value, ids):
    return torch.cat([one_hot(ids)[..., : V - 4], torch.full((*ids.shape, 4), value)], dim=2)


class Odd(torch.Tensor):
    pass


SPECIALS = r"never scored .*508, 509, 510, 511.*-1e4"
REFUSED = {  # what: (logits, kind of the failure, words of the sentence)
    "first tokens of all rows": (lambda ids: one_hot(ids) + one_hot(ids[:, :1]).mean(0, True), "harness", "mixes rows"),
    "the row before": (lambda ids: one_hot(ids) + one_hot(ids.roll(1, 0)), "harness", "mixes rows"),
    "the past of all": (lambda ids: one_hot(ids) - one_hot(ids).cumsum(1).mean(0, True), "harness", "mixes rows"),
    "random": (lambda ids: one_hot(ids) + torch.rand(*ids.shape, V), "harness", "random"),
    "NaN": (functools.partial(spoilt, math.nan), "nan", "NaN or infinity"),
    "infinity": (functools.partial(spoilt, math.inf), "nan", "NaN or infinity"),
    "minus infinity": (functools.partial(spoilt, -math.inf), "nan", "NaN or infinity"),
    "a difference beyond fp32": (lambda ids: 3e38 * (2 * one_hot(ids, 1.0) - 1), "nan", "too large for fp32"),
    "infinity where nothing is scored": (functools.partial(specials_at, -math.inf), "harness", SPECIALS),
    "a position short": (lambda ids: one_hot(ids)[:, :-1], "harness", r"\(B, T, vocab\)"),
    "an id short": (lambda ids: one_hot(ids)[..., :-1], "harness", r"\(B, T, vocab\)"),
    "flat": (lambda ids: one_hot(ids).flatten(0, 1), "harness", r"\(B, T, vocab\)"),
    "a tuple": (lambda ids: (one_hot(ids), None), "harness", "not .'tuple'"),
    "a padded vocabulary": (lambda ids: F.pad(one_hot(ids), (0, 8)), "harness", r"\(B, T, vocab\)"),
    "a subclass": (lambda ids: one_hot(ids).as_subclass(Odd), "harness", "plain torch.Tensor, not a Odd"),
}


@pytest.mark.parametrize("f, kind, said", REFUSED.values(), ids=REFUSED)
def test_what_is_no_score_is_refused(small, f, kind, said):
    with pytest.raises(small.PrepareError, match=said) as caught:
        score(small, Fixed(f))
    assert caught.value.kind == kind


# -- honest models


def attention(dtype, ids):
    """It looks back, in a type of its own."""
    embed, mix, head = (0.3 * drawn(0, *shape).to(ids.device, dtype) for shape in ((V, 32), (32, 96), (32, V)))
    q, k, v = (embed[ids] @ mix).unflatten(2, (6, 16)).transpose(1, 2).chunk(3, dim=1)
    seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    return (seen + embed[ids]) @ head


def experts(ids):
    """Tokens of all rows sorted by their expert, computed together, and put back."""
    x = drawn(3, V, 32)[ids].flatten(0, 1)
    order = (ids.flatten() % 4).argsort(stable=True)
    counts = (ids.flatten() % 4).bincount(minlength=4).tolist()
    out = torch.cat([part @ drawn(5 + n, 32, V) for n, part in enumerate(x[order].split(counts))])
    return out[order.argsort()].view(*ids.shape, V)


HONEST = {
    "attention in fp32": functools.partial(attention, torch.float32),
    "attention in bf16": functools.partial(attention, torch.bfloat16),
    "a long convolution": lambda ids: convolution(ids, 2 * T),
    "experts": experts,
    "a device that jitters": lambda ids: one_hot(ids) + 3e-3 * torch.rand(*ids.shape, V),
    "finite logits where nothing is scored": functools.partial(specials_at, -1e4),
}


@pytest.mark.parametrize("f", HONEST.values(), ids=HONEST)
def test_honest_models_pass(small, f):
    value = score(small, f)
    assert 0.5 < value < 60
    assert run.this_run.score == value
    assert doubts() == []


@pytest.mark.gpu
def test_an_honest_model_passes_on_a_gpu(small):
    model = functools.partial(attention, torch.bfloat16)
    there = score(small, torch.compile(Fixed(model).cuda(), dynamic=False))
    assert there == pytest.approx(score(small, Fixed(model)), rel=0.02)


def test_dropout_is_switched_off(small):
    model = nn.Sequential(Bigram(), nn.Dropout(0.5)).train()
    assert score(small, model) == pytest.approx(score(small, Bigram()), rel=1e-6)
    assert model.training
