"""bits per byte in closed form, and the probes against models that look where they must not."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import referee

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


def one_hot(ids, scale=8.0):
    return F.one_hot(ids % V, V).float() * scale


class Bigram(nn.Module):
    """An honest model: logits depend on the current token alone."""

    def __init__(self, seed=0, scale=2.0):
        super().__init__()
        weights = torch.randn(V, V, generator=torch.Generator().manual_seed(seed)) * scale
        self.table = nn.Embedding(V, V, _weight=weights)

    def forward(self, ids):
        return self.table(ids)


def scored_rows(prepare):
    """(inputs, targets) of the 64 rows that are scored."""
    inputs, targets, _ = next(prepare.make_dataloader(prepare.Tokenizer.from_directory(), 64, T, "val", device="cpu"))
    return inputs, targets


def score(prepare, model, batch=B):
    return prepare.evaluate_bpb(model, prepare.Tokenizer.from_directory(), batch)


def test_uniform_logits_cost_log2_vocab_a_token(small):
    sizes = small.get_token_bytes()
    _, targets = scored_rows(small)
    counted = (sizes[targets] > 0).sum().item()
    assert counted < targets.numel()  # some targets are BOS, and must not count
    wanted = math.log2(V) * counted / sizes[targets].sum().item()
    assert score(small, Fixed(lambda ids: torch.zeros(*ids.shape, V))) == pytest.approx(wanted, rel=1e-6)


def test_against_a_plain_computation(small):
    model = Bigram()
    inputs, targets = scored_rows(small)
    sizes = small.get_token_bytes()
    nats = 0.0
    for here, target in zip(inputs.flatten().tolist(), targets.flatten().tolist()):
        if sizes[target]:
            logits = model.table.weight[here].double()
            nats -= (logits[target] - logits.logsumexp(0)).item()
    assert score(small, model) == pytest.approx(nats / math.log(2) / sizes[targets].sum().item(), rel=1e-5)


def test_oracle_scores_zero(small, monkeypatch):
    """Logits of the true target would score 0; the probes, which would refuse such a model, are set aside."""
    monkeypatch.setattr(small, "_draw_probes", lambda judge, batches, B, T: {n: [] for n in range(batches)})
    inputs, targets = scored_rows(small)
    truth = {tuple(row.tolist()): goal for row, goal in zip(inputs, targets)}
    oracle = Fixed(lambda ids: torch.stack([one_hot(truth[tuple(row.tolist())], 100.0) for row in ids]))
    assert score(small, oracle) == pytest.approx(0, abs=1e-6)


def test_raw_bytes_weigh_one_and_specials_nothing(small):
    tokenizer = small.Tokenizer.from_directory()
    sizes = small.get_token_bytes("cpu")
    assert sizes.dtype == torch.int64
    assert sizes[:256].tolist() == [1] * 256
    assert sizes[-4:].tolist() == [0] * 4
    assert tokenizer.get_bos_token_id() == V - 4 == tokenizer.enc.encode_single_token("<|reserved_0|>")
    partial = [i for i in range(V - 4) if "\ufffd" in tokenizer.decode([i])]
    assert partial
    for i in range(V - 4):
        assert sizes[i] == len(tokenizer.enc.decode_single_token_bytes(i))
    text = "naïve café, 漢字, 12345"
    assert sizes[tokenizer.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize("batch", [1, 3, 7, 64, 100])
def test_batch_size_changes_nothing(small, batch):
    wanted = score(small, Bigram())
    assert score(small, Bigram(), batch) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("batch", [0, -1, 2.0, None])
def test_wrong_batch_sizes_are_refused(small, batch):
    with pytest.raises(small.PrepareError, match="batch_size"):
        score(small, Bigram(), batch)


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
    return torch.cat([one_hot(ids)[:, : -T // 8], shifted(ids)[:, -T // 8 :]], dim=1)


def early_shift(ids):
    return torch.cat([shifted(ids)[:, :2], one_hot(ids)[:, 2:]], dim=1)


def bidirectional(ids):
    x = F.one_hot(ids, V).float() @ torch.randn(V, 16, generator=torch.Generator().manual_seed(0))
    return F.scaled_dot_product_attention(x, x, x) @ torch.randn(16, V, generator=torch.Generator().manual_seed(1))


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
    assert referee.this_run.score is None


def first_tokens_of_all(ids):
    return one_hot(ids) + one_hot(ids[:, :1]).mean(dim=0, keepdim=True)


def row_before(ids):
    return one_hot(ids.roll(1, 0)) + one_hot(ids)


def past_of_all(ids):
    return one_hot(ids) - one_hot(ids).cumsum(1).mean(dim=0, keepdim=True)


@pytest.mark.parametrize("f", [first_tokens_of_all, row_before, past_of_all])
def test_sight_of_other_rows_is_refused(small, f):
    with pytest.raises(small.PrepareError, match="mixes rows"):
        score(small, Fixed(f))


class Learner(nn.Module):
    """Remembers what followed what in the rows it was shown."""

    def __init__(self, rate, quiet=0):
        super().__init__()
        self.counts = nn.Parameter(torch.zeros(V, V))
        self.rate = torch.tensor(rate)
        self.quiet = quiet  # calls before it begins

    def forward(self, ids):
        out = self.counts[ids].clone()
        self.quiet -= 1
        if self.quiet < 0:
            self.counts.index_put_((ids[:, :-1].flatten(), ids[:, 1:].flatten()), self.rate, accumulate=True)
        return out


@pytest.mark.parametrize("rate, quiet", [(1.0, 0), (1e-2, 0), (1.0, 12), (0.1, 5)])
def test_learning_while_judged_is_refused(small, rate, quiet):
    with pytest.raises(small.PrepareError, match="learns while it is judged"):
        score(small, Learner(rate, quiet))


def test_a_little_learning_is_a_doubt(small):
    score(small, Learner(1e-6))
    assert referee.this_run.doubts == ["parameters or buffers of the model changed while it was judged"]


def test_dropout_is_switched_off_and_random_logits_refused(small):
    model = nn.Sequential(Bigram(), nn.Dropout(0.5))
    model.train()
    assert score(small, model) == pytest.approx(score(small, Bigram()), rel=1e-6)
    assert model.training
    with pytest.raises(small.PrepareError, match="random"):
        score(small, Fixed(lambda ids: one_hot(ids) + torch.rand(*ids.shape, V)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row, position", [(0, 0), (-1, -1), (3, 33)])
def test_logits_that_are_not_finite_are_refused(small, value, row, position):
    def spoilt(ids):
        out = one_hot(ids)
        out[row, position, 3] = value
        return out

    with pytest.raises(small.PrepareError, match="NaN or infinity") as caught:
        score(small, Fixed(spoilt))
    assert caught.value.kind == "nan"


def without_specials(value):
    def f(ids):
        out = one_hot(ids)
        out[..., V - 4 :] = value
        return out

    return Fixed(f)


def test_infinity_at_ids_that_are_never_scored_is_said_as_such(small):
    with pytest.raises(small.PrepareError, match=r"never scored .*508, 509, 510, 511.*-1e4") as caught:
        score(small, without_specials(-math.inf))
    assert caught.value.kind == "harness"


def test_a_finite_value_there_is_fair(small):
    assert score(small, without_specials(-1e4)) > 0
    assert referee.this_run.doubts == []


WRONG_SHAPES = {
    "a position short": lambda ids: one_hot(ids)[:, :-1],
    "an id short": lambda ids: one_hot(ids)[..., :-1],
    "flat": lambda ids: one_hot(ids).flatten(0, 1),
    "a tuple": lambda ids: (one_hot(ids), None),
    "padded vocabulary": lambda ids: F.pad(one_hot(ids), (0, 8)),
    "a loss": lambda ids: torch.zeros(()),
}


@pytest.mark.parametrize("f", WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_another_shape_is_refused(small, f):
    with pytest.raises(small.PrepareError, match=r"\(B, T, vocab\)"):
        score(small, Fixed(f))


def test_the_model_never_sees_targets_or_gradients(small):
    seen = set()

    def f(*args, **kwargs):
        seen.add((len(args), len(kwargs), torch.is_grad_enabled(), args[0].untyped_storage().nbytes()))
        return one_hot(args[0])

    model = Fixed(f)
    model.forward = f
    score(small, model, 1)
    assert seen == {(1, 0, False, 8 * T)}  # not a byte beyond the ids


def test_first_call_counts_and_later_ones_change_nothing(small):
    small.clock.start(now=100.0)
    first = score(small, Bigram())
    stopped = small.clock.stopped
    second = score(small, Bigram(seed=1))
    assert first != second
    assert small.clock.stopped == stopped
    assert referee.this_run.score == first


def test_audit_only_when_asked(small, monkeypatch):
    score(small, Bigram())
    assert referee.this_run.audit is None
    monkeypatch.setattr(small, "AUDIT", True)
    small._dataset.cache_clear()
    small.clock.stopped = None
    score(small, Bigram())
    assert referee.this_run.audit
    assert referee.this_run.audit != referee.this_run.score


@pytest.mark.parametrize("name", ["device", "eval_tokens", "dataset", "seq_len", "max_steps", "rank", "anything"])
def test_keywords_of_forks_are_ignored_in_one_line(small, capsys, name):
    wanted = score(small, Bigram())
    tokenizer = small.Tokenizer.from_directory()
    assert small.evaluate_bpb(Bigram(), tokenizer, B, **{name: 3}) == wanted
    loader = small.make_dataloader(tokenizer, 2, T, "train", **{"device": "cpu", name: "cpu"})
    assert next(loader)[0].shape == (2, T)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"evaluate_bpb ignores {name}=3")
    assert len(lines) == (1 if name == "device" else 2)


def tiny_gpt(dtype, device="cpu"):
    from dataclasses import replace

    import train

    sizes = {"depth": 2, "width": 32, "head_dim": 16, "window_pattern": "SL", "value_gate_channels": 8}
    knobs = replace(train.Knobs(**train.TIERS["cpu"]), **sizes)
    model = train.GPT(knobs, V, T, torch.device(device), "sdpa", dtype)
    torch.manual_seed(0)
    with torch.no_grad():  # the zeros of the first step would make causality vacuous
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_honest_model_passes(small, dtype, compiled):
    model = tiny_gpt(dtype)
    value = score(small, torch.compile(model, dynamic=False) if compiled else model)
    assert 0.5 < value < 60
    assert referee.this_run.score == value
    assert referee.this_run.doubts == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_honest_model_passes_on_a_gpu(small, dtype):
    there = score(small, torch.compile(tiny_gpt(dtype, "cuda"), dynamic=False))
    assert there == pytest.approx(score(small, tiny_gpt(dtype)), rel=0.02)
