"""The GPT: attention paths against a plain loop, causality, the reference's numbers."""

import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from reference import CPU, REFERENCE, cpu_knobs, draw_ids, redraw
from stage import ROOT

import train

SMALL = dict(
    depth=3,
    width=32,
    head_dim=8,
    window_pattern="SSL",
    value_gate_channels=8,
    softcap=15.0,
    bigram_rows=997,
    taps=0,
)
IDS = draw_ids(3, 24)
TARGETS = draw_ids(3, 24, seed=1)


def small(path="sdpa", **changes):
    """50 tokens, 24 positions, as it starts."""
    torch.manual_seed(0)
    return train.GPT(cpu_knobs(**{**SMALL, **changes}), 50, 24, CPU, path)


def plain_attention(q, k, v, window):
    """One position at a time: itself and `window` earlier ones."""
    out = torch.zeros_like(q)
    for t in range(q.size(1)):
        seen = slice(max(0, t - window), t + 1)
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, seen]) / math.sqrt(q.size(-1))
        out[:, t] = torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, seen])
    return out


@pytest.mark.parametrize("path", ["sdpa", "flex", "chunks"])
@pytest.mark.parametrize(
    "T, window", [(40, 0), (40, 1), (40, 38), (40, 39), (40, 40), (256, 64), (256, 128), (200, 33)]
)
def test_attention_paths_agree_with_a_plain_loop(path, T, window):
    qkv = torch.randn(3, 2, T, 3, 16, generator=torch.Generator().manual_seed(T + window))
    attend = train.ATTENTION[path](CPU, T, [window, T])
    assert torch.allclose(attend(*qkv, window), plain_attention(*qkv, window), atol=1e-5)


def test_window_mask_by_hand():
    assert train.window_mask(4, 1, CPU).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["fa3", "flex", "sdpa"])
@pytest.mark.parametrize("window", [1, 64, 1023, 1024, 2048])
def test_attention_paths_agree_on_a_gpu(path, window):
    device = torch.device("cuda")
    try:
        attend = train.ATTENTION[path](device, 2048, [window])
    except Exception as error:
        pytest.skip(f"{path}: {error}")
    qkv = torch.randn(3, 2, 2048, 4, 128, device=device, dtype=torch.bfloat16)
    ours = [x.clone().requires_grad_() for x in qkv]
    out = torch.compile(attend)(*ours, window)
    out.float().square().sum().backward()
    plain = [x.float().transpose(1, 2).requires_grad_() for x in qkv]
    wanted = F.scaled_dot_product_attention(*plain, attn_mask=train.window_mask(2048, window, device))
    wanted.square().sum().backward()
    assert torch.allclose(out.float(), wanted.transpose(1, 2), atol=2e-2)
    for got, want in zip(ours, plain):
        assert (got.grad.float().transpose(1, 2) - want.grad).norm() < 0.02 * want.grad.norm()


@pytest.mark.parametrize("path, taps", [("sdpa", 0), ("flex", 0), ("chunks", 3)])
@pytest.mark.parametrize("pattern", ["L", "SSL", "SSSL"])
@torch.no_grad()
def test_causal_and_rows_apart(path, taps, pattern):
    model = redraw(small(path, window_pattern=pattern, taps=taps))
    base = model(IDS)
    for t in range(1, 24):
        changed = torch.cat([IDS[:, :t], TARGETS[:, t:]], dim=1)
        moved = (model(changed) - base).abs().amax(dim=(0, 2))
        assert moved[:t].max() == 0
        assert moved[t:].max() > 1e-3
    alone = model(torch.stack([IDS[0], TARGETS[1], TARGETS[2]]))
    assert torch.equal(alone[0], base[0])
    assert not torch.equal(alone[1], base[1])


@torch.no_grad()
def test_short_windows_limit_what_a_block_sees():
    model = redraw(small(depth=2, window_pattern="S", short_window=0.25, bigram_rows=0))
    assert model.windows == [6, 24]  # the last block always sees the whole row
    model.blocks[1].attention.window = 6
    changed = IDS.clone()
    changed[:, 0] = (IDS[:, 0] + 1) % 50
    moved = (model(IDS) - model(changed)).abs().amax(dim=(0, 2))
    assert moved[:13].min() > 0  # two blocks of window 6 carry 12 positions, not 13
    assert moved[13:].max() == 0


@torch.no_grad()
def test_a_short_convolution_adds_earlier_tokens_by_channel():
    mix = train.ShortConvolution(2, 3)
    x = torch.arange(1.0, 13.0).view(1, 4, 3)
    assert torch.equal(mix(x), x)
    mix.weight.copy_(torch.tensor([[1.0, 0.0, 0.5], [0.0, 10.0, 0.0]]))
    assert mix(x).tolist() == [[[1, 2, 3], [5, 5, 7.5], [11, 28, 12], [17, 61, 16.5]]]


@torch.no_grad()
def test_taps_reach_attention_and_mlp_of_every_block():
    plain = redraw(small())
    model = small(taps=2)
    assert not model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    assert torch.equal(model(IDS), plain(IDS))
    for block in model.blocks:
        for mix in (block.before_attention, block.before_mlp):
            mix.weight.fill_(0.5)
            assert not torch.allclose(model(IDS), plain(IDS), atol=1e-3)
            mix.weight.zero_()


@pytest.mark.parametrize("softcap", [15.0, 0.0])
def test_logits_are_the_heads_softly_capped(softcap):
    model = redraw(small(softcap=softcap))
    raw = []
    model.head.register_forward_hook(lambda module, inputs, output: raw.append(output))
    logits = model(IDS)
    wanted = 15 * torch.tanh(raw[0] / 15) if softcap else raw[0]
    assert raw[0].abs().max() > 4
    assert torch.allclose(logits, wanted, atol=1e-5)
    assert torch.allclose(model(IDS, TARGETS), F.cross_entropy(wanted.reshape(-1, 50), TARGETS.reshape(-1)), atol=1e-6)


def test_the_slope_of_squared_relu_comes_from_its_output():
    x = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    train.SquaredReLU.apply(ours).pow(2).sum().backward()
    F.relu(theirs).square().pow(2).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5)


KERNELS = """
import torch, train

torch.manual_seed(0)

def compare(kernel, plain, inputs, *rest):
    for ours, theirs in zip(train.outcome(kernel, inputs, *rest), train.outcome(plain, inputs, *rest), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert ours.abs().max() > 0

for softcap in (15.0, 0.0):
    for V in (50, 1024, 2500):
        inputs = torch.randn(13, 16), 3 * torch.randn(V, 16)
        compare(train.fused_loss(), train.plain_loss, inputs, torch.randint(V, (13,)), softcap)
inputs = torch.randn(256, 64), torch.randn(256, 64) / 8, torch.randn(64, 256) / 16
compare(train.fused_mlp(), train.plain_mlp, inputs)
print("they agree")
"""


def test_the_kernels_agree_with_the_plain_forms():
    """In a process of its own: Triton's interpreter is chosen where Triton is imported."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", KERNELS],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout == "they agree\n", done.stderr


def wrong_loss(hidden, weight, targets, softcap):
    return train.plain_loss(hidden, weight, targets, softcap=0.5)


def wrong_mlp(x, up, down):
    return train.plain_mlp(x, 1.1 * up, down)


def slow_mlp(x, up, down):
    time.sleep(0.05)
    return train.plain_mlp(x, up, down)


def plain_in_other_words(*inputs):
    return (train.plain_mlp if len(inputs) == 3 else train.plain_loss)(*inputs)


def pick_kernels(monkeypatch, loss, mlp):
    """What is picked where the kernels are these. All is computed on the CPU."""

    def on_cpu(draw):
        return lambda *words, device=None, **more: draw(*words, **more)

    for name in ("randn", "randint"):
        monkeypatch.setattr(torch, name, on_cpu(getattr(torch, name)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(train, "fused_loss", lambda: loss)
    monkeypatch.setattr(train, "fused_mlp", lambda: mlp)
    cuda = SimpleNamespace(type="cuda")
    return train.pick_kernels(cpu_knobs(**SMALL), 2, 128, 50, cuda, torch.float32, train.uncompiled)


@pytest.mark.parametrize(
    "loss, mlp, reason",
    [
        (None, None, "object is not callable"),
        (wrong_loss, wrong_mlp, "% off"),
        (wrong_loss, slow_mlp, "ms where the plain form takes"),
    ],
)
def test_a_kernel_that_is_wrong_or_slow_is_not_taken(monkeypatch, capsys, loss, mlp, reason):
    assert pick_kernels(monkeypatch, loss, mlp) == (train.plain_loss, train.plain_mlp)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("plain_loss is used: ")
    assert lines[1].startswith("plain_mlp is used: ")
    assert reason in lines[1]


def test_a_kernel_that_agrees_is_taken(monkeypatch, capsys):
    ticks = iter(range(100))
    monkeypatch.setattr(train, "least_seconds", lambda call, device: next(ticks))  # the kernel is timed first
    assert pick_kernels(monkeypatch, plain_in_other_words, plain_in_other_words) == (plain_in_other_words,) * 2
    assert capsys.readouterr().out == ""


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [15.0, 0.0])
def test_the_kernels_agree_on_a_gpu(softcap):
    device = torch.device("cuda")
    train.check_loss(train.fused_loss(), 8192, softcap, device, torch.bfloat16, train.compiled)
    inputs = [torch.randn(*shape, device=device) / 16 for shape in ((1024, 256), (1024, 256), (256, 1024))]
    ours = train.outcome(train.compiled(train.fused_mlp()), [part.bfloat16() for part in inputs])
    train.check_agreement(ours, train.outcome(train.plain_mlp, inputs), ("output", "dx", "dup", "ddown"))


def test_a_cpu_takes_the_plain_forms():
    picked = train.pick_kernels(cpu_knobs(**SMALL), 2, 128, 50, CPU, torch.float32, train.uncompiled)
    assert picked == (train.plain_loss, train.plain_mlp)


def test_one_product_gives_query_key_and_value():
    model = redraw(small())
    attention = model.blocks[1].attention
    seen = []

    def attend(q, k, v, window):
        seen.extend([q, k, v])
        return v

    attention.attend = attend
    x = torch.randn(2, 24, 32)
    attention(x, None, model.cos, model.sin)
    q, k, v = [layer(x).view(2, 24, 4, 8) for layer in (attention.query, attention.key, attention.value)]
    assert torch.allclose(seen[2], v, atol=1e-5)
    for got, plain, scale in ((seen[0], q, attention.qk_product), (seen[1], k, 1.0)):
        assert torch.allclose(got, scale * train.norm(train.rotate(plain, model.cos, model.sin)), atol=1e-5)


def test_a_bf16_model_gives_fp32_logits():
    logits = train.GPT(cpu_knobs(**SMALL), 50, 24, CPU, dtype=torch.bfloat16)(IDS)
    assert logits.dtype == torch.float32


def test_a_bf16_model_is_bf16_throughout_where_autocast_norms_in_fp32(monkeypatch):
    """As autocast does on CUDA: the residual stream and what reaches the attention kernel stay bf16."""
    seen = []

    def note(module, inputs):
        seen.append(inputs[0].dtype)

    def attend(q, k, v, window):
        seen.extend([q.dtype, k.dtype, v.dtype])
        return v

    monkeypatch.setattr(F, "rms_norm", lambda x, shape: x.float() * x.float().square().mean(-1, keepdim=True).rsqrt())
    model = train.GPT(cpu_knobs(**SMALL), 50, 24, CPU, dtype=torch.bfloat16)
    for block in model.blocks:
        block.register_forward_pre_hook(note)
        block.attention.attend = attend
    model.head.register_forward_pre_hook(note)
    model(IDS)
    assert seen == [torch.bfloat16] * 13


def test_q_and_k_have_the_scale_of_the_knob():
    """Attention's logits are those of unit queries and keys, times the square of the scale."""
    seen = []

    def attend(q, k, v, window):
        seen.append((q.square().mean(-1) * k.square().mean(-1)).sqrt())
        return v

    model = redraw(small(qk_scale=1.3))
    model.blocks[0].attention.attend = attend
    model(IDS)
    assert torch.allclose(seen[0], torch.tensor(1.3**2), atol=1e-3)


def test_pairs_are_hashed_by_token_and_predecessor():
    ids = draw_ids(64, 257, vocab=8192)
    rows = train.hash_pairs(ids, 8192, 5000)
    counts = torch.bincount(rows.flatten(), minlength=5000).float()  # 3.29 pairs a row, Poisson if the hash is good
    assert len(counts) == 5000
    assert counts.var().item() == pytest.approx(counts.mean().item(), rel=0.1)
    for t in (0, 5, 255):  # a token moves its own row and its successor's, and no other
        other = ids.clone()
        other[:, t] = (ids[:, t] + 1) % 8192
        moved = (train.hash_pairs(other, 8192, 5000) != rows).float().mean(0)
        assert moved[t : t + 2].min() > 0.9
        assert moved[:t].sum() + moved[t + 2 :].sum() == 0
    _, forth, back = train.hash_pairs(torch.tensor([[3, 7, 3]]), 8192, 5000)[0]
    assert forth != back
    largest = train.hash_pairs(torch.full((1, 2), 65535), 65536, 2**22)
    assert 0 <= largest.min() <= largest.max() < 2**22  # no overflow at the largest vocabulary


def test_pair_table_starts_without_a_trace_and_is_learnt():
    model = small()
    assert not model.bigram.weight.any()
    before = redraw(model)(IDS)
    with torch.no_grad():
        model.bigram.weight.zero_()
    assert not torch.allclose(model(IDS), before)
    model(IDS, TARGETS).backward()
    touched = train.hash_pairs(IDS, 50, 997).unique()
    assert torch.equal(model.bigram.weight.grad.any(1).nonzero()[:, 0], touched)


def test_rope_turns_by_distance_and_keeps_length():
    model = small()
    x = torch.randn(1, 24, 2, 8, generator=torch.Generator().manual_seed(3))
    y = train.rotate(x, model.cos, model.sin)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert torch.equal(y[:, 0], x[:, 0])
    turned = train.rotate(x[:, :1].expand(1, 24, 2, 8), model.cos, model.sin)[0, :, 0]
    dots = turned @ turned.T
    for distance in (1, 5, 20):
        same = dots.diagonal(distance)
        assert same.max() - same.min() < 1e-4
    assert dots.diagonal(1)[0] < dots[0, 0] - 1e-3


@pytest.fixture(scope="module")
def reference():
    return train.GPT(train.Knobs(**REFERENCE), 8192, 2048, CPU, "sdpa", torch.bfloat16)


def test_the_reference_has_its_numbers(reference):
    assert sum(p.numel() for p in reference.parameters()) == 50_332_176
    assert reference.windows == [1024, 1024, 1024, 2048] * 2
    assert sorted(reference.value_embeddings) == ["1", "3", "5", "7"]
    weights = 8 * 12 * 512 * 512 + 4 * 4 * 32 + 512 * 8192
    assert reference.flops_per_token() == 6 * weights + 12 * 512 * (6 * 1024 + 2 * 2048)


def test_what_is_shipped_for_80_gb(reference):
    shipped = train.GPT(train.Knobs(**train.TIERS["cuda-80"]), 8192, 2048, CPU, "sdpa", torch.bfloat16)
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
    assert loss.item() == pytest.approx(math.log(50), abs=0.01)
    assert torch.equal(loss, small()(IDS, TARGETS))


WRONG = [
    dict(width=100, head_dim=64),
    dict(window_pattern="SX"),
    dict(short_window=0.0),
    dict(depth=0),
    dict(batch_tokens=100, micro_tokens=64),
    dict(warmup=0.6, warmdown=0.6),
    dict(softcap=-1.0),
    dict(bigram_rows=-1),
    dict(value_gate_channels=999),
    dict(head_dim=3, width=9),
]


@pytest.mark.parametrize("changes", WRONG)
def test_wrong_knobs_are_named(changes):
    with pytest.raises(train.PrepareError, match="knobs in train.py are wrong: .*; correct"):
        cpu_knobs(**changes)


PEAKS = {
    "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989.5,
    "NVIDIA B200": 2250,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None,
    "NVIDIA L40S": 362,
    "NVIDIA A10": 125,
    "NVIDIA L4": 121,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4090": 165,
    "NVIDIA GeForce RTX 5090": 210,
    "NVIDIA RTX 6000 Ada Generation": 364,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 504,
    "AMD Instinct MI300X": 1307,
    "NVIDIA GeForce GTX 1080": None,
    "NVIDIA L40": None,
}


@pytest.mark.parametrize("name", PEAKS)
def test_peaks(name):
    peak = train.peak_flops(name)
    assert PEAKS[name] == (peak and peak / 1e12)
