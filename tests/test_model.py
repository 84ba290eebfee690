"""The GPT: attention paths against a plain loop, causality, the reference's numbers."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from reference import REFERENCE

import train

CPU = torch.device("cpu")
SMALL = replace(train.Knobs(**train.TIERS["cpu"]), depth=3, width=32, head_dim=8, window_pattern="SSL", value_gate_channels=8,
                softcap=15.0, bigram_rows=997)


def redrawn(model, seed=0):
    """Zero-initialised projections would make tests of what flows through them vacuous."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return model


def plain_attention(q, k, v, window):
    """One position at a time: itself and `window` earlier ones."""
    out = torch.zeros_like(q)
    B, T, H, D = q.shape
    for t in range(T):
        low = max(0, t - window)
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, low:t + 1]) / math.sqrt(D)
        out[:, t] = torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, low:t + 1])
    return out


@pytest.mark.parametrize("path", ["sdpa", "flex"])
@pytest.mark.parametrize("T, window", [(40, 0), (40, 1), (40, 7), (40, 38), (40, 39), (40, 40), (256, 64), (256, 128), (200, 33)])
def test_attention_paths_agree_with_a_plain_loop(path, T, window):
    g = torch.Generator().manual_seed(T + window)
    q, k, v = (torch.randn(2, T, 3, 16, generator=g) for _ in range(3))
    attend = train.ATTENTION[path](CPU, T, [window, T])
    assert torch.allclose(attend(q, k, v, window), plain_attention(q, k, v, window), atol=1e-5)


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
    x = [torch.randn(2, 2048, 4, 128, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    out = torch.compile(attend)(*x, window)
    out.float().square().sum().backward()
    y = [t.detach().float().requires_grad_() for t in x]
    mask = train.window_mask(2048, window, device)
    wanted = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in y), attn_mask=mask).transpose(1, 2)
    wanted.square().sum().backward()
    assert torch.allclose(out.float(), wanted, atol=2e-2)
    for got, want in zip(x, y):
        assert (got.grad.float() - want.grad).norm() < 0.02 * want.grad.norm()


@pytest.mark.parametrize("path", ["sdpa", "flex"])
@pytest.mark.parametrize("pattern", ["L", "SSL", "SSSL"])
def test_causal_and_rows_apart(path, pattern):
    model = redrawn(train.GPT(replace(SMALL, window_pattern=pattern), 50, 24, CPU, path))
    g = torch.Generator().manual_seed(0)
    ids, other = (torch.randint(50, (3, 24), generator=g) for _ in range(2))
    with torch.no_grad():
        base = model(ids)
        for t in range(24):
            moved = (model(torch.cat([ids[:, :t + 1], other[:, t + 1:]], dim=1)) - base).abs().amax(dim=(0, 2))
            assert moved[:t + 1].max() == 0 and (t == 23 or moved[t + 1:].max() > 1e-3)
        alone = model(torch.stack([ids[0], other[1], other[2]]))
        assert torch.equal(alone[0], base[0]) and not torch.equal(alone[1], base[1])


def test_short_windows_limit_what_a_block_sees():
    knobs = replace(SMALL, depth=2, window_pattern="S", short_window=0.25, bigram_rows=0)
    model = redrawn(train.GPT(knobs, 50, 32, CPU))
    assert model.windows == [8, 32]  # the last block always sees the whole row
    model.windows = [8, 8]
    model.blocks[1].attention.window = 8
    ids = torch.randint(50, (1, 32), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % 50
    with torch.no_grad():
        moved = (model(ids) - model(changed)).abs().amax(dim=(0, 2))
    assert (moved[:17] > 0).all() and moved[17:].max() == 0  # two blocks of window 8 carry 16 positions, not 17


def test_loss_is_the_cross_entropy_of_the_logits():
    model = redrawn(train.GPT(SMALL, 50, 24, CPU))
    ids = torch.randint(50, (3, 25), generator=torch.Generator().manual_seed(2))
    raw = []
    model.head.register_forward_hook(lambda module, inputs, output: raw.append(output))
    logits = model(ids[:, :-1])
    assert raw[0].abs().max() > 5 and torch.allclose(logits, 15 * torch.tanh(raw[0] / 15), atol=1e-5)
    wanted = F.cross_entropy(logits.reshape(-1, 50), ids[:, 1:].reshape(-1))
    assert torch.allclose(model(ids[:, :-1], ids[:, 1:]), wanted, atol=1e-6)
    assert logits.dtype == torch.float32 and logits.abs().max() <= SMALL.softcap


def test_without_a_soft_cap_the_logits_are_the_heads():
    model, raw = redrawn(train.GPT(replace(SMALL, softcap=0.0), 50, 24, CPU)), []
    model.head.register_forward_hook(lambda module, inputs, output: raw.append(output))
    logits = model(torch.randint(50, (3, 24), generator=torch.Generator().manual_seed(2)))
    assert torch.equal(logits, raw[0]) and logits.abs().max() > 5


def test_q_and_k_have_the_scale_of_the_knob():
    """Attention's logits are those of unit queries and keys, times the square of the scale."""
    seen = []
    model = redrawn(train.GPT(replace(SMALL, qk_scale=1.3), 50, 24, CPU))
    attention = model.blocks[0].attention
    attention.attend = lambda q, k, v, window: seen.append((q, k)) or v
    model(torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(2)))
    q, k = ((x.square().mean(-1) ** 0.5).flatten() for x in seen[0])
    assert torch.allclose(q * k, torch.tensor(1.3**2), atol=1e-3)


def test_pairs_are_hashed_by_token_and_predecessor():
    ids = torch.randint(8192, (64, 257), generator=torch.Generator().manual_seed(0))
    rows = train.hash_pairs(ids, 8192, 5000)
    assert rows.shape == ids.shape and rows.min() >= 0 and rows.max() < 5000
    counts = torch.bincount(rows.flatten(), minlength=5000).float()  # 3.29 pairs a row, Poisson if the hash is good
    assert counts.var().item() == pytest.approx(counts.mean().item(), rel=0.1)
    for t in (0, 5, 256):  # a token moves its own row and its successor's, and no other
        other = ids.clone()
        other[:, t] = (ids[:, t] + 1) % 8192
        moved = (train.hash_pairs(other, 8192, 5000) != rows).float().mean(0)
        assert moved[t] > 0.9 and moved[:t].sum() == 0 and moved[t + 2:].sum() == 0 and (t == 256 or moved[t + 1] > 0.9)
    swapped = train.hash_pairs(torch.tensor([[3, 7, 3]]), 8192, 5000)[0]
    assert swapped[1] != swapped[2]  # 3 then 7 is not 7 then 3
    assert train.hash_pairs(torch.full((1, 2), 65535), 65536, 2**22).max() < 2**22  # no overflow at the largest vocabulary


def test_pair_table_starts_without_a_trace_and_is_learnt():
    torch.manual_seed(0)
    model = train.GPT(SMALL, 50, 24, CPU)
    ids = torch.randint(50, (3, 25))
    before = model(ids[:, :-1])
    assert not model.bigram.weight.any()
    with torch.no_grad():
        model.head.weight.normal_()
        model.bigram.weight.normal_()
    assert not torch.allclose(model(ids[:, :-1]), before)
    model(ids[:, :-1], ids[:, 1:]).backward()
    touched = train.hash_pairs(ids[:, :-1], 50, 997).unique()
    assert torch.equal(model.bigram.weight.grad.abs().sum(1).nonzero()[:, 0], touched)


def test_what_is_shipped_for_80_gb():
    shipped = train.GPT(train.Knobs(**train.TIERS["cuda-80"]), 8192, 2048, CPU, "sdpa", torch.bfloat16)
    assert sum(p.numel() for p in shipped.parameters()) == 50_332_176  # the reference's model
    assert shipped.windows == [256, 256, 256, 256, 2048, 256, 256, 2048]
    assert shipped.knobs.batch_tokens == shipped.knobs.micro_tokens == 2**17


def test_rope_turns_by_position_and_keeps_length():
    model = train.GPT(SMALL, 50, 24, CPU)
    x = torch.randn(1, 24, 2, 8, generator=torch.Generator().manual_seed(3))
    y = train.rotate(x, model.cos, model.sin)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), atol=1e-5) and torch.equal(y[:, 0], x[:, 0])
    q, k = (train.rotate(x[:, :1].expand(1, 24, 2, 8), model.cos, model.sin)[0, :, 0] for _ in range(2))
    dots = q @ k.T  # of one vector with itself, depends on the distance alone
    assert all(torch.allclose(dots.diagonal(n), dots.diagonal(n)[0].expand(24 - n), atol=1e-4) for n in (1, 5, 20))


@pytest.fixture(scope="module")
def reference():
    return train.GPT(train.Knobs(**REFERENCE), 8192, 2048, CPU, "sdpa", torch.bfloat16)


def test_the_reference_has_its_numbers(reference):
    assert sum(p.numel() for p in reference.parameters()) == 50_332_176
    assert reference.windows == [1024, 1024, 1024, 2048] * 2
    assert sorted(reference.value_embeddings) == ["1", "3", "5", "7"]
    matrices = 8 * 12 * 512 * 512 + 4 * 4 * 32
    attention = 12 * 512 * (6 * 1024 + 2 * 2048)
    assert reference.flops_per_token() == 6 * (matrices + 512 * 8192) + attention
    knobs = train.Knobs(**REFERENCE)
    assert (knobs.batch_tokens, knobs.micro_tokens // 2048, knobs.batch_tokens // knobs.micro_tokens) == (2**19, 128, 2)


def test_the_reference_starts_where_it_should(reference):
    std = lambda p: p.float().std().item()
    assert std(reference.embedding.weight) == pytest.approx(1, rel=0.01) and reference.embedding.weight.dtype == torch.bfloat16
    assert std(reference.head.weight) == pytest.approx(0.001, rel=0.01) and reference.head.weight.dtype == torch.float32
    bound = math.sqrt(3 / 512)
    for block in reference.blocks:
        a = block.attention
        for p in (a.query, a.key, a.value, block.up):
            assert std(p.weight) == pytest.approx(512**-0.5, rel=0.01) and p.weight.abs().max() <= bound
        assert not a.out.weight.any() and not block.down.weight.any() and (a.gate is None or not a.gate.weight.any())
    for table in reference.value_embeddings.values():
        assert table.weight.dtype == torch.bfloat16 and std(table.weight) == pytest.approx(512**-0.5, rel=0.01)
    assert reference.residual_scale.tolist() == [1.0] * 8 and torch.allclose(reference.x0_scale, torch.tensor(0.1))


def test_a_new_model_predicts_nearly_uniformly():
    model = train.GPT(SMALL, 50, 24, CPU)
    ids = torch.randint(50, (4, 24), generator=torch.Generator().manual_seed(4))
    assert model(ids, ids).item() == pytest.approx(math.log(50), abs=0.01)


def test_same_seed_same_weights():
    def draw():
        torch.manual_seed(7)
        return [p.clone() for p in train.GPT(SMALL, 50, 24, CPU).parameters()]
    assert all(map(torch.equal, draw(), draw()))


@pytest.mark.parametrize("change", [dict(width=100, head_dim=64), dict(window_pattern="SX"), dict(short_window=0.0), dict(depth=0),
                                    dict(batch_tokens=100, micro_tokens=64), dict(warmup=0.6, warmdown=0.6),
                                    dict(softcap=-1.0), dict(bigram_rows=-1), dict(value_gate_channels=999), dict(head_dim=3, width=9)])
def test_wrong_knobs_are_named(change):
    with pytest.raises(train.PrepareError, match="knobs in train.py are wrong"):
        replace(train.Knobs(**train.TIERS["cpu"]), **change)


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989.5), ("NVIDIA B200", 2250),
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA L40S", 362), ("NVIDIA A10", 125),
    ("NVIDIA L4", 121), ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 5090", 210),
    ("NVIDIA RTX 6000 Ada Generation", 364), ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 504),
    ("AMD Instinct MI300X", 1307), ("NVIDIA GeForce GTX 1080", None), ("NVIDIA L40", None)])
def test_peaks(name, tflops):
    assert train.peak_flops(name) == (tflops and tflops * 1e12)
