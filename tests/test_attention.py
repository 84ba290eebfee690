"""The attention paths against a plain loop; the check against SDPA; which path is taken."""

import math

import pytest
import torch
from reference import CPU, CUDA, cpu_knobs, draw

import train


def plain_attention(q, k, v, window):  # (B, T, H, D) -> the same
    """One position at a time: itself and `window` earlier ones."""
    out = []
    for t in range(q.size(1)):
        seen = slice(max(0, t - window), t + 1)
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, seen]) / math.sqrt(q.size(-1))
        out.append(torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, seen]))
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("path", [train.sdpa_attention, train.flex_attention, train.chunked_attention])
@pytest.mark.parametrize("T, window", [(40, 0), (40, 1), (40, 38), (40, 39), (40, 40), (256, 64), (200, 33), (3, 1)])
def test_paths_agree_with_a_plain_loop(path, T, window):
    qkv = draw(3, 2, T, 3, 16, seed=T + window)
    attend = path(CPU, T, [window, T])
    torch.testing.assert_close(attend(*qkv, window), plain_attention(*qkv, window), atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fa3", "flex"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_paths_agree_on_a_gpu(name, head_dim):
    paths = train.attention_paths(CUDA, torch.bfloat16, train.compiled)
    if name not in paths:
        pytest.skip(f"{name} is not for this GPU")
    train.check_attention(paths[name], head_dim, CUDA, torch.bfloat16, train.compiled)


def path_of(attend):
    """A path that is this function, whatever the device."""
    return lambda device, T, windows: attend


@path_of
def one_key_more(q, k, v, window):
    return plain_attention(q, k, v, window + 1)


@path_of
def no_gradient_of_keys(q, k, v, window):
    return plain_attention(q, k.detach() + 0 * k, v, window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_path_that_computes_what_sdpa_does_passes(dtype):
    """Three different tensors, at the head dimension of the model, through the compiler."""
    seen = []

    def attend(q, k, v, window):
        seen.append((q.shape, len({q.data_ptr(), k.data_ptr(), v.data_ptr()}), window))
        return plain_attention(q, k, v, window)

    def compiler(function):
        seen.append(function)
        return function

    train.check_attention(path_of(attend), 32, CPU, dtype, compiler)
    assert seen == [attend, ((1, 256, 2, 32), 3, 64)]
    train.check_attention(train.chunked_attention, 16, CPU, dtype, compiler)


@pytest.mark.parametrize("path, offender", [(one_key_more, "output"), (no_gradient_of_keys, "dk")])
def test_a_path_that_computes_something_else_is_named(path, offender):
    with pytest.raises(AssertionError, match=f"its {offender} is"):
        train.check_attention(path, 16, CPU, torch.float32, train.uncompiled)


def pick(monkeypatch, device, **paths):
    monkeypatch.setattr(train, "attention_paths", lambda *where: paths)
    return train.pick_attention(cpu_knobs(), 64, device, torch.float32, train.uncompiled)


def test_the_first_path_that_works_is_taken_and_the_others_named(monkeypatch, capsys):
    def unmade(device, T, windows):
        raise ValueError("no build for this card\nmore")

    name, attend = pick(monkeypatch, CPU, chunks=train.chunked_attention, sdpa=unmade)
    assert name == "chunks"
    assert attend(*draw(3, 1, 64, 2, 16), 64).shape == (1, 64, 2, 16)
    assert capsys.readouterr().out == ""
    assert pick(monkeypatch, CPU, chunks=unmade, sdpa=train.sdpa_attention)[0] == "sdpa"
    said = capsys.readouterr().out
    assert "no build for this card" in said
    assert said.count("\n") == 1
    with pytest.raises(train.PrepareError, match="no attention path works"):
        pick(monkeypatch, CPU, chunks=unmade, sdpa=unmade)


def test_a_path_that_fails_its_check_is_named_and_left(monkeypatch, capsys):
    checked = []

    def check_attention(path, head_dim, *where):
        checked.append((path, head_dim))
        raise AssertionError("its dk is 9 % off")

    monkeypatch.setattr(train, "check_attention", check_attention)
    assert pick(monkeypatch, CUDA, fa3=one_key_more, sdpa=path_of(plain_attention))[0] == "sdpa"
    assert checked == [(one_key_more, cpu_knobs().head_dim)]
    assert "fa3 does not work here (its dk is 9 % off)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "device, dtype, compiler, hopper, names",
    [
        (CUDA, torch.bfloat16, train.compiled, True, ["fa3", "flex", "sdpa"]),
        (CUDA, torch.bfloat16, train.compiled, False, ["flex", "sdpa"]),
        (CUDA, torch.bfloat16, train.uncompiled, True, ["fa3", "sdpa"]),
        (CUDA, torch.float16, train.compiled, False, ["sdpa"]),
        (torch.device("mps"), torch.float32, train.uncompiled, False, ["sdpa"]),
        (CPU, torch.bfloat16, train.compiled, False, ["chunks", "sdpa"]),
        (CPU, torch.float32, train.uncompiled, False, ["sdpa"]),
    ],
)
def test_what_may_work_where(monkeypatch, device, dtype, compiler, hopper, names):
    monkeypatch.setattr(train, "is_hopper", lambda device: hopper)
    assert list(train.attention_paths(device, dtype, compiler)) == names
