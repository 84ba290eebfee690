"""The GPT: causality, windows, what each part computes, the reference's numbers, and that it is easy to edit."""

import math

import pytest
import torch
import torch.nn.functional as F
from reference import CPU, CUDA, V, cpu_knobs, draw, draw_ids, edited, keeping, redraw, tiny

import train
from bench.reference import REFERENCE

LENGTH = 24
IDS = draw_ids(3, LENGTH)
TARGETS = draw_ids(3, LENGTH, seed=1)
SMALL = dict(depth=3, head_dim=8, window_pattern="SSL", softcap=15.0, length=LENGTH)


def small(path=train.sdpa_attention, **changes):
    return tiny(path, **{**SMALL, "taps": 0, **changes})


@pytest.mark.parametrize("path", [train.sdpa_attention, train.flex_attention, train.chunked_attention])
@pytest.mark.parametrize("taps", [0, 3])
@pytest.mark.parametrize("pattern", ["L", "SSL"])
@torch.no_grad()
def test_causal_and_rows_apart(path, taps, pattern):
    model = redraw(small(path, window_pattern=pattern, taps=taps))
    base = model(IDS)
    for t in (1, 2, 5, 6, 7, 12, 18, 23):  # chunks of 6
        changed = torch.cat([IDS[:, :t], TARGETS[:, t:]], dim=1)
        moved = (model(changed) - base).abs().amax(dim=(0, 2))
        assert moved[:t].max() == 0
        assert moved[t:].max() > 1e-3
    alone = model(torch.stack([IDS[0], TARGETS[1], TARGETS[2]]))
    assert torch.equal(alone[0], base[0])
    assert not torch.equal(alone[1], base[1])


@torch.no_grad()
def test_short_windows_limit_what_a_block_sees():
    model = redraw(small(depth=2, window_pattern="S", short_window=0.25, ngram_rows=()))
    assert model.windows == [6, LENGTH]  # the last block always sees the whole row
    model.blocks[1].attention.window = 6
    changed = IDS.clone()
    changed[:, 0] = (IDS[:, 0] + 1) % V
    moved = (model(IDS) - model(changed)).abs().amax(dim=(0, 2))
    assert moved[:13].min() > 0  # two blocks of window 6 carry 12 positions, not 13
    assert moved[13:].max() == 0


class PlainGPT:
    """What a GPT computes for one row, token by token, from the weights of a model."""

    def __init__(self, model, knobs):
        self.model = model
        self.knobs = knobs
        self.weights = {name: p.detach() for name, p in model.named_parameters()}

    def normed(self, x):
        return x / x.square().mean(-1, keepdim=True).sqrt()

    def turned(self, x, t):  # x: (D,)
        """Channels i and i + D / 2 as a complex number, turned by t times the frequency of i."""
        half = x.size(0) // 2
        angles = -t * self.knobs.rope_base ** (-torch.arange(half) / half)
        z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half), angles)
        return torch.cat([z.real, z.imag])

    def mixed(self, xs, name, t):
        taps = self.weights.get(f"{name}.weight", [])
        return xs[t] + sum(taps[n - 1] * xs[t - n] for n in range(1, len(taps) + 1) if n <= t)

    def attention(self, i, xs, ids):
        w = {part: self.weights[f"blocks.{i}.attention.{part}.weight"] for part in ("query", "key", "value", "out")}
        D = self.knobs.head_dim
        out = []
        for t in range(len(xs)):
            heads = []
            for h in range(self.knobs.width // D):
                rows = slice(h * D, h * D + D)
                q = self.turned(self.normed(w["query"][rows] @ xs[t]), t) * self.knobs.qk_scale
                seen = range(max(0, t - self.model.windows[i]), t + 1)
                keys = [self.turned(self.normed(w["key"][rows] @ xs[s]), s) * self.knobs.qk_scale for s in seen]
                shares = torch.stack([q @ key / D**0.5 for key in keys]).softmax(0)
                heads.append(sum(share * self.value(i, h, xs[s], ids[s]) for share, s in zip(shares, seen)))
            out.append(w["out"] @ torch.cat(heads))
        return out

    def value(self, i, h, x, token):
        rows = slice(h * self.knobs.head_dim, (h + 1) * self.knobs.head_dim)
        v = self.weights[f"blocks.{i}.attention.value.weight"][rows] @ x
        if (self.knobs.depth - 1 - i) % 2:
            return v
        gate = self.weights[f"blocks.{i}.attention.gate.weight"][h] @ x[: self.knobs.value_gate_channels]
        return v + 2 * torch.sigmoid(gate) * self.weights[f"value_embeddings.{i}.weight"][token, rows]

    def logits(self, ids):  # ids: (T,) -> (T, V)
        w = self.weights
        first = w["embedding.weight"][ids]
        for i, rows in enumerate(self.knobs.ngram_rows):
            first = first + w[f"ngrams.{i}.weight"][train.hash_ngrams(ids[None], i + 2, rows)[0]]
        x0 = list(self.normed(first))
        xs = x0
        for i in range(self.knobs.depth):
            xs = [w["residual_scale"][i] * x + w["x0_scale"][i] * first for x, first in zip(xs, x0)]
            mixed = [self.normed(x) for x in xs]
            mixed = [self.mixed(mixed, f"blocks.{i}.before_attention", t) for t in range(len(xs))]
            xs = [x + out for x, out in zip(xs, self.attention(i, mixed, ids))]
            mixed = [self.normed(x) for x in xs]
            mixed = [self.mixed(mixed, f"blocks.{i}.before_mlp", t) for t in range(len(xs))]
            hidden = [F.relu(w[f"blocks.{i}.up.weight"] @ x) ** 2 for x in mixed]
            xs = [x + w[f"blocks.{i}.down.weight"] @ h for x, h in zip(xs, hidden)]
        logits = self.normed(torch.stack(xs)) @ w["head.weight"].T
        return self.knobs.softcap * torch.tanh(logits / self.knobs.softcap) if self.knobs.softcap else logits


@pytest.mark.parametrize(
    "changes",
    [
        dict(ngram_rows=(), softcap=2.0),
        dict(taps=2, softcap=0.0, rope_base=100.0),
        dict(depth=2, window_pattern="S", qk_scale=1.5),
    ],
)
def test_the_model_computes_what_it_says(changes):
    model = redraw(small(**changes))
    wanted = PlainGPT(model, model.knobs).logits(IDS[0])
    assert wanted.abs().max() > 1
    torch.testing.assert_close(model(IDS[:1])[0], wanted, atol=1e-3, rtol=1e-3)
    loss = F.cross_entropy(wanted, TARGETS[0])
    torch.testing.assert_close(model(IDS[:1], TARGETS[:1]), loss, atol=1e-3, rtol=1e-3)


def test_what_the_shipped_tables_and_taps_add_starts_at_nothing():
    model = small(taps=2)
    assert len(model.ngrams) == 2
    assert not any(table.weight.any() for table in model.ngrams)
    assert not any(mix.weight.any() for mix in model.modules() if isinstance(mix, train.ShortConvolution))


def test_a_bf16_model_is_bf16_throughout_where_autocast_norms_in_fp32(monkeypatch):
    """As autocast does on CUDA: the residual stream and what reaches the attention kernel stay bf16; logits are fp32."""
    seen = []

    def attend(q, k, v, window):
        seen.extend([q.dtype, k.dtype, v.dtype])
        return v

    def note(module, inputs):
        seen.append(inputs[0].dtype)

    monkeypatch.setattr(F, "rms_norm", lambda x, shape: x.float() * x.float().square().mean(-1, keepdim=True).rsqrt())
    model = small(dtype=torch.bfloat16)
    for module in (*model.blocks, *(block.down for block in model.blocks), model.head):
        module.register_forward_pre_hook(note)
    for block in model.blocks:
        block.attention.attend = attend
    assert model(IDS).dtype == torch.float32
    assert seen == [torch.bfloat16] * (5 * 3 + 1)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_ngrams_are_hashed_by_token_and_predecessors(n):
    ids = draw_ids(64, 257, vocab=8192)
    rows = train.hash_ngrams(ids, n, 5000)
    counts = torch.bincount(rows.flatten(), minlength=5000).float()  # 3.29 a row, Poisson if the hash is good
    assert len(counts) == 5000
    assert counts.var().item() == pytest.approx(counts.mean().item(), rel=0.1)
    for t in (0, 5, 250):  # a token moves its own row and those of the next n - 1, and no other
        other = ids.clone()
        other[:, t] = (ids[:, t] + 1) % 8192
        moved = (train.hash_ngrams(other, n, 5000) != rows).float().mean(0)
        assert moved[t : t + n].min() > 0.9
        assert moved[:t].sum() + moved[t + n :].sum() == 0
    _, forth, back = train.hash_ngrams(torch.tensor([[3, 7, 3]]), n, 5000)[0]
    assert forth != back
    largest = train.hash_ngrams(torch.full((1, 4), 65535), n, 2**22)
    assert 0 <= largest.min() <= largest.max() < 2**22  # though the products wrap


# -- the shipped recipe and the reference's


@pytest.fixture(scope="module")
def reference():
    return train.GPT(train.Knobs(**REFERENCE), 8192, 2048, CPU, None, torch.bfloat16)


def test_the_reference_has_its_numbers(reference):
    assert sum(p.numel() for p in reference.parameters()) == 50_332_176
    assert reference.windows == [1024, 1024, 1024, 2048] * 2
    assert sorted(reference.value_embeddings) == ["1", "3", "5", "7"]
    weights = 8 * 12 * 512 * 512 + 4 * 4 * 32 + 512 * 8192
    assert reference.flops_per_token() == 6 * weights + 12 * 512 * (6 * 1024 + 2 * 2048)


def test_what_is_shipped_for_80_gb_has_the_references_shape(reference):
    with torch.device("meta"):
        shipped = train.GPT(train.Knobs(**train.TIERS["cuda-80"]), 8192, 2048, "meta", None, torch.bfloat16)
    assert shipped.windows == [256, 256, 256, 256, 2048, 256, 256, 2048]
    assert [p.shape for p in shipped.parameters()] == [p.shape for p in reference.parameters()]


def test_the_reference_starts_where_it_should(reference):
    def check(parameter, std, dtype=torch.float32):
        assert parameter.float().std().item() == pytest.approx(std, rel=0.01)
        assert parameter.dtype == dtype

    check(reference.embedding.weight, 1, torch.bfloat16)
    check(reference.head.weight, 0.001)
    for table in reference.value_embeddings.values():
        check(table.weight, 512**-0.5, torch.bfloat16)
    for block in reference.blocks:
        a = block.attention
        for matrix in (a.query, a.key, a.value, block.up):
            check(matrix.weight, 512**-0.5)
            assert matrix.weight.abs().max() <= math.sqrt(3 / 512)
        for matrix in (a.out, block.down, a.gate):
            assert matrix is None or not matrix.weight.any()
    assert reference.residual_scale.tolist() == [1.0] * 8
    assert torch.allclose(reference.x0_scale, torch.tensor(0.1))


def test_one_seed_draws_the_same_nearly_uniform_predictions():
    loss = small()(IDS, TARGETS)
    assert loss.item() == pytest.approx(math.log(V), abs=0.01)
    assert torch.equal(loss, small()(IDS, TARGETS))


# -- knobs


@pytest.mark.parametrize("tier", train.TIERS)
def test_every_tier_is_a_recipe(tier):
    knobs = train.Knobs(**train.TIERS[tier])
    assert min(knobs.micro_tokens, knobs.eval_tokens) >= 2048  # a row at a time


WRONG = {
    "width is not a multiple of head_dim": dict(width=100, head_dim=64),
    "head_dim is odd": dict(head_dim=3, width=99),
    "window_pattern": dict(window_pattern="SX"),
    "short_window": dict(short_window=0.0),
    "softcap": dict(softcap=-1.0),
    "ngram_rows": dict(ngram_rows=(8, 0)),
    "value_gate_channels": dict(value_gate_channels=999),
    "depth": dict(depth=0),
    "batch_tokens is not a multiple": dict(batch_tokens=100, micro_tokens=64),
    "their sum above 1": dict(warmup=0.6, warmdown=0.6),
    "below 0, or": dict(warmdown=-0.1),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_knobs_are_named_in_one_sentence(words):
    with pytest.raises(train.PrepareError, match=f"knobs in train.py are wrong: .*{words}.*; correct") as caught:
        cpu_knobs(**WRONG[words])
    assert "\n" not in str(caught.value)


PEAKS = {
    "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989.5,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None,
    "NVIDIA A10": 125,
    "NVIDIA L4": 121,
    "NVIDIA L40": None,
    "NVIDIA L40S": 362,
    "NVIDIA GeForce GTX 1080": None,
}


def test_peaks(monkeypatch):
    found = {}
    for name in PEAKS:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        peak = train.peak_flops(CUDA)
        found[name] = peak and peak / 1e12
    assert found == PEAKS
    assert train.peak_flops(CPU) is None


# -- edits that an agent makes

BIASED = ("logits = self.head(norm(x)).float()", "logits = self.head(norm(x)).float() + self.bias")
BIAS = (
    "self.draw_weights()\n        if",
    "self.bias = nn.Parameter(torch.zeros(vocab_size))\n        self.draw_weights()\n        if",
)
KNOB = ("    taps_lr: float = 0.02\n", "    taps_lr: float = 0.02\n    bias_lr: float = 0.5\n")
OWNER = (
    "        AdamW(taps, adamw, lr=k.taps_lr, **common),\n",
    "        AdamW(taps, adamw, lr=k.taps_lr, **common),\n        AdamW([model.bias], adamw, lr=k.bias_lr, **common),\n",
)


def made_by(module):
    knobs = module.Knobs(**module.TIERS["cpu"])
    torch.manual_seed(0)
    return module.GPT(knobs, V, LENGTH, CPU, module.sdpa_attention(CPU, LENGTH, [LENGTH]))


def test_one_edit_of_the_logits_changes_loss_and_evaluation_alike():
    plain = made_by(train)
    biased = made_by(edited(BIASED, BIAS))
    with torch.no_grad():
        biased.bias.copy_(draw(V))
        wanted = plain(IDS) + draw(V)
        assert torch.allclose(biased(IDS), wanted, atol=1e-5)
        assert torch.allclose(biased(IDS, TARGETS), F.cross_entropy(wanted.flatten(0, 1), TARGETS.flatten()), atol=1e-5)


def test_a_new_parameter_takes_its_knob_its_module_and_one_line_of_the_optimizer():
    module = edited(BIASED, BIAS)
    with pytest.raises(AssertionError, match="bias"):
        module.make_optimizer(made_by(module))
    module = edited(BIASED, BIAS, KNOB, OWNER)
    model = made_by(module)
    optimizer = module.make_optimizer(model)
    model(IDS, TARGETS).backward()
    optimizer.step()
    assert torch.allclose(model.bias.abs(), torch.tensor(0.5), atol=1e-3)  # Adam's first step is the rate


def test_the_model_is_one_graph_for_training_and_one_for_evaluation():
    graphs = []
    model = tiny(train.chunked_attention, taps=2, ngram_rows=(), length=LENGTH)
    forward = torch.compile(model, dynamic=False, fullgraph=True, backend=keeping(graphs))
    for _ in range(2):
        forward(IDS, TARGETS).backward()
        with torch.no_grad():
            model.eval()
            forward(IDS)
            model.train()
    assert len(graphs) == 2


def test_all_behind_the_lookup_of_ngrams_is_one_graph():
    graphs = []
    model = tiny(train.chunked_attention, length=LENGTH)
    torch.compile(model, dynamic=False, backend=keeping(graphs))(IDS, TARGETS)
    (behind,) = [graph.code for graph in graphs if "linear" in graph.code]
    assert "cross_entropy" in behind
