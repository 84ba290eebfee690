"""bits per byte in closed form, and the probe against models that cheat."""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

B, T, V = 8, 64, 512  # of the small dataset


class Fixed(nn.Module):
    """logits(ids) from a function, with a parameter so that it has a device."""

    def __init__(self, f):
        super().__init__()
        self.f, self.p = f, nn.Parameter(torch.zeros(()))

    def forward(self, ids):
        return self.f(ids)


def one_hot(ids, scale=8.0):
    return F.one_hot(ids % V, V).float() * scale


class Bigram(nn.Module):
    """An honest model: logits depend on the current token alone."""

    def __init__(self, seed=0, scale=2.0):
        super().__init__()
        self.table = nn.Embedding(V, V)
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(V, V, generator=torch.Generator().manual_seed(seed)) * scale)

    def forward(self, ids):
        return self.table(ids)


def rows_of(prepare, split="val", count=64):
    rows = np.zeros((count, T + 1), np.uint16)
    prepare._filler(split, T)(rows)
    return torch.from_numpy(rows.astype(np.int64))


def score(prepare, model, batch=B):
    return prepare.evaluate_bpb(model, prepare.Tokenizer.from_directory(), batch)


def test_uniform_logits_cost_log2_vocab_a_token(small):
    sizes = small.Tokenizer.from_directory().token_bytes()
    targets = rows_of(small)[:, 1:]
    counted = (sizes[targets] > 0).sum().item()
    assert counted < targets.numel()  # some targets are BOS, and must not count
    wanted = math.log2(V) * counted / sizes[targets].sum().item()
    assert score(small, Fixed(lambda ids: torch.zeros(*ids.shape, V))) == pytest.approx(wanted, rel=1e-6)


def test_against_a_plain_computation(small):
    model, rows, sizes = Bigram(), rows_of(small), small.Tokenizer.from_directory().token_bytes()
    nats = 0.0
    for row in rows:
        for here, target in zip(row[:-1].tolist(), row[1:].tolist()):
            if sizes[target]:
                logits = model.table.weight[here].double()
                nats -= (logits[target] - logits.logsumexp(0)).item()
    assert score(small, model) == pytest.approx(nats / math.log(2) / sizes[rows[:, 1:]].sum().item(), rel=1e-5)


def test_oracle_scores_zero(small, monkeypatch):
    """Logits of the true target would score 0; the probe, which would refuse such a model, is set aside."""
    monkeypatch.setattr(small, "_probe", lambda *_: 0.0)
    truth = {tuple(row[:-1].tolist()): row[1:] for row in rows_of(small)}
    oracle = Fixed(lambda ids: torch.stack([one_hot(truth[tuple(row.tolist())], 100.0) for row in ids]))
    assert score(small, oracle) == pytest.approx(0, abs=1e-6)


def test_raw_bytes_weigh_one_and_specials_nothing(small):
    tokenizer = small.Tokenizer.from_directory()
    sizes = tokenizer.token_bytes()
    assert sizes[:256].tolist() == [1] * 256 and sizes[-4:].tolist() == [0] * 4
    assert tokenizer.get_bos_token_id() == V - 4 == tokenizer.enc.encode_single_token("<|reserved_0|>")
    partial = [i for i in range(V - 4) if "\ufffd" in tokenizer.decode([i])]
    assert partial and all(sizes[i] == len(tokenizer.enc.decode_single_token_bytes(i)) for i in partial)
    text = "naïve café, 漢字, 12345"
    assert sum(sizes[i].item() for i in tokenizer.encode(text)) == len(text.encode())


@pytest.mark.parametrize("batch", [1, 3, 7, 64, 100])
def test_batch_size_changes_nothing(small, batch):
    wanted = score(small, Bigram())
    small.clock.stopped = None
    assert score(small, Bigram(), batch) == pytest.approx(wanted, rel=1e-6)


def test_every_call_has_the_full_shape(small):
    shapes = set()

    def f(ids):
        shapes.add((tuple(ids.shape), ids.is_contiguous(), ids.dtype))
        return one_hot(ids)

    score(small, Fixed(f), 24)  # 64 rows: the last batch is padded
    assert shapes == {((24, T), True, torch.int64)}


def shifted(ids):
    return one_hot(torch.cat([ids[:, 1:], ids[:, -1:]], dim=1))


def late_shift(ids):
    out, leak = one_hot(ids), shifted(ids)
    out[:, -T // 8:] = leak[:, -T // 8:]
    return out


def early_shift(ids):
    out = one_hot(ids)
    out[:, :2] = shifted(ids)[:, :2]
    return out


def bidirectional(ids):
    torch.manual_seed(0)
    x = F.one_hot(ids, V).float() @ torch.randn(V, 16)
    return F.scaled_dot_product_attention(x, x, x) @ torch.randn(16, V)


def weak_bidirectional(ids):
    return one_hot(ids) + 0.01 * bidirectional(ids)


def pooled(ids):
    return one_hot(ids) + one_hot(ids).mean(dim=1, keepdim=True)


def last_token(ids):
    return one_hot(ids) + one_hot(ids[:, -1:]).expand(-1, T, -1)


@pytest.mark.parametrize("f", [shifted, late_shift, early_shift, bidirectional, weak_bidirectional, pooled, last_token])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_sight_of_the_future_is_refused(small, f, batch):
    with pytest.raises(small.PrepareError, match="sees the future"):
        score(small, Fixed(f), batch)
    assert small._Run.score is None


@pytest.mark.parametrize("f", [
    lambda ids: one_hot(ids) + one_hot(ids[:, :1]).mean(dim=0, keepdim=True), lambda ids: one_hot(ids.roll(1, 0)) + one_hot(ids),
    lambda ids: one_hot(ids) - one_hot(ids).cumsum(1).mean(dim=0, keepdim=True)])
def test_sight_of_other_rows_is_refused(small, f):
    with pytest.raises(small.PrepareError, match="mixes rows"):
        score(small, Fixed(f))


class Learner(nn.Module):
    """Remembers what followed what in the rows it was shown."""

    def __init__(self, rate):
        super().__init__()
        self.counts, self.rate = nn.Parameter(torch.zeros(V, V)), rate

    def forward(self, ids):
        out = self.counts[ids].clone()
        with torch.no_grad():
            self.counts.index_put_((ids[:, :-1].flatten(), ids[:, 1:].flatten()), torch.tensor(self.rate), accumulate=True)
        return out


@pytest.mark.parametrize("rate", [1.0, 1e-2, 1e-3])
def test_learning_while_judged_is_refused(small, rate):
    with pytest.raises(small.PrepareError, match="learns while it is judged"):
        score(small, Learner(rate))


def test_learning_after_the_probe_is_refused(small):
    model, calls = Learner(1.0), []
    learn = model.forward

    def forward(ids):
        calls.append(1)
        return learn(ids) if len(calls) > 12 else model.counts[ids]

    model.forward = forward
    with pytest.raises(small.PrepareError, match="scored again"):
        score(small, model)


def test_dropout_is_switched_off_and_random_logits_refused(small):
    model = nn.Sequential(Bigram(), nn.Dropout(0.5))
    model.train()
    assert score(small, model) == pytest.approx(score(small, Bigram()), rel=1e-6) and model.training
    with pytest.raises(small.PrepareError, match="random"):
        score(small, Fixed(lambda ids: one_hot(ids) + torch.rand(*ids.shape, V)))


def spoil(value, row, position):
    def f(ids):
        out = one_hot(ids)
        out[row, position, 3] = value
        return out
    return f


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row, position", [(0, 0), (-1, -1), (3, 33)])
def test_logits_that_are_not_finite_are_refused(small, value, row, position):
    with pytest.raises(small.PrepareError, match="NaN or infinity") as caught:
        score(small, Fixed(spoil(value, row, position)))
    assert caught.value.kind == "nan"


@pytest.mark.parametrize("f", [
    lambda ids: one_hot(ids)[:, :-1], lambda ids: one_hot(ids)[..., :-1], lambda ids: one_hot(ids).flatten(0, 1),
    lambda ids: (one_hot(ids), None), lambda ids: F.pad(one_hot(ids), (0, 8)), lambda ids: torch.zeros(())])
def test_another_shape_is_refused(small, f):
    with pytest.raises(small.PrepareError, match=r"\(B, T, vocab\)"):
        score(small, Fixed(f))


def test_the_model_never_sees_targets_or_gradients(small):
    seen = []

    def f(*args, **kwargs):
        seen.append((len(args), kwargs, torch.is_grad_enabled()))
        return one_hot(args[0])

    model = Fixed(f)
    model.forward = f
    score(small, model)
    assert set(map(str, seen)) == {"(1, {}, False)"}


def test_first_call_counts_and_later_ones_change_nothing(small):
    small.clock.start(now=100.0)
    first = score(small, Bigram())
    stopped, held = small.clock.stopped, small._Run.score
    second = score(small, Bigram(seed=1))
    assert first != second and (small.clock.stopped, small._Run.score) == (stopped, held) == (stopped, first)


def test_audit_only_when_asked(small, monkeypatch):
    score(small, Bigram())
    assert small._Run.audit is None
    small.clock.stopped = None
    monkeypatch.setenv("AUDIT", "1")
    score(small, Bigram())
    assert small._Run.audit and small._Run.audit != small._Run.score


def tiny_gpt(dtype, depth=2):
    from dataclasses import replace

    import train
    knobs = replace(train.Knobs(**train.TIERS["cpu"]), depth=depth, width=32, head_dim=16, window_pattern="SL", value_gate_channels=8)
    model = train.GPT(knobs, V, T, torch.device("cpu"), "sdpa", dtype)
    with torch.no_grad():  # the zeros of the first step would make causality vacuous
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_honest_model_passes(small, dtype, compiled):
    model = tiny_gpt(dtype)
    value = score(small, torch.compile(model, dynamic=False) if compiled else model)
    assert 0.5 < value < 60 and small._Run.score == value


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_honest_model_passes_on_a_gpu(small, dtype):
    model = tiny_gpt(dtype).to("cuda")
    model = tiny_gpt(dtype)
    import train
    moved = train.GPT(model.knobs, V, T, torch.device("cuda"), "sdpa", dtype)
    moved.load_state_dict(model.state_dict())
    assert score(small, torch.compile(moved, dynamic=False)) == pytest.approx(score(small, model), rel=0.02)
