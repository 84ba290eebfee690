"""Which attention path is taken, and how FlashAttention-3 is found, with stand-ins for GPUs and the hub."""

import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from reference import CPU

import train

CUDA = torch.device("cuda")
NAMES = ["fa3", "flex", "sdpa"]


def paths(monkeypatch, **attends):
    """ATTENTION with stand-ins; those that are not named are SDPA."""
    for name in NAMES:
        attend = attends.get(name, train.sdpa_attention(CPU, 256, [64]))
        monkeypatch.setitem(train.ATTENTION, name, lambda device, T, windows, attend=attend: attend)


def pick(monkeypatch, seconds, hopper=False):
    """seconds: of each path, in place of a measurement."""
    monkeypatch.setattr(train, "is_hopper", lambda device: hopper)
    monkeypatch.setattr(train, "time_attention", lambda name, *rest: seconds[name])
    return train.pick_attention(NAMES, (2, 256, 2, 16), [64, 256], CPU, torch.float32, train.uncompiled)


def test_hopper_takes_fa3_and_others_the_fastest(monkeypatch, capsys):
    paths(monkeypatch)
    seconds = {"fa3": 0.003, "flex": 0.001, "sdpa": 0.002}
    assert pick(monkeypatch, seconds, hopper=True) == "fa3"
    assert capsys.readouterr().out == ""
    assert pick(monkeypatch, seconds) == "flex"
    assert capsys.readouterr().out == "attention: fa3 3.0 ms, flex 1.0 ms, sdpa 2.0 ms\n"


def one_key_more(q, k, v, window):
    return train.sdpa_attention(CPU, 256, [window + 1])(q, k, v, window + 1)


def no_gradient_of_keys(q, k, v, window):
    return train.sdpa_attention(CPU, 256, [window])(q, k.detach() + 0 * k, v, window)


def broken(q, k, v, window):
    raise ValueError("no build for this card\nmore")


@pytest.mark.parametrize(
    "attend, reason",
    [
        (one_key_more, "AssertionError: its output is"),
        (no_gradient_of_keys, "AssertionError: its dk is 100 % off"),
        (broken, "ValueError: no build for this card)"),
    ],
)
def test_a_path_that_does_not_compute_what_sdpa_does_is_not_taken(monkeypatch, capsys, attend, reason):
    paths(monkeypatch, fa3=attend)
    assert pick(monkeypatch, {"flex": 0.001, "sdpa": 0.002}, hopper=True) == "flex"
    assert f"attention: fa3 does not work here ({reason}" in capsys.readouterr().out


def test_sdpa_is_left_where_nothing_can_be_timed(monkeypatch, capsys):
    paths(monkeypatch, fa3=broken, flex=broken, sdpa=broken)
    assert pick(monkeypatch, {}) == "sdpa"
    assert capsys.readouterr().out.count("does not work here") == 3


def test_the_probe_is_what_the_model_compiles(monkeypatch):
    """Three different tensors, in one graph, at the head dimension of the model."""
    seen = []

    def attend(q, k, v, window):
        seen.append((q.shape, len({q.data_ptr(), k.data_ptr(), v.data_ptr()}), window))
        return train.sdpa_attention(CPU, 256, [window])(q, k, v, window)

    paths(monkeypatch, fa3=attend)
    train.check_attention("fa3", 128, CPU, torch.float32, train.uncompiled)
    assert seen == [((1, 256, 2, 128), 3, 64)]


def test_timing_covers_every_block_at_the_real_shape(monkeypatch):
    seen = []

    def attend(q, k, v, window):
        seen.append((tuple(q.shape), window))
        time.sleep(0.001)
        return q * k * v

    paths(monkeypatch, flex=attend)
    spent = train.time_attention("flex", (2, 32, 2, 16), [8, 8, 32], CPU, torch.float32, train.uncompiled)
    assert seen[:3] == [((2, 32, 2, 16), 8), ((2, 32, 2, 16), 8), ((2, 32, 2, 16), 32)]
    assert 0.003 <= spent < 1


def test_what_may_work_where():
    assert train.attention_names(CPU, torch.bfloat16, train.compiled) == ["chunks"]
    assert train.attention_names(CPU, torch.bfloat16, train.uncompiled) == ["sdpa"]
    assert train.attention_names(CUDA, torch.float16, train.compiled) == ["sdpa"]
    assert train.attention_names(CUDA, torch.bfloat16, train.compiled) == NAMES
    assert train.attention_names(CUDA, torch.bfloat16, train.uncompiled) == ["fa3", "sdpa"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the kernels package and an empty cache; calls are noted."""
    calls = []

    def get_kernel(repository, version):
        calls.append((repository, version))
        return "from the hub"

    def get_local_kernel(path):
        calls.append(path.name)
        return "from the cache"

    stand_in = SimpleNamespace(get_kernel=get_kernel, get_local_kernel=get_local_kernel)
    monkeypatch.setitem(sys.modules, "kernels", stand_in)
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    return SimpleNamespace(calls=calls, module=stand_in, snapshots=tmp_path / "kernels--kernels-community--flash-attn3")


def test_fa3_comes_from_the_cache_before_the_hub(hub, monkeypatch):
    assert train.load_flash() == "from the hub"
    for commit in ("older", "newer"):
        (hub.snapshots / "snapshots" / commit).mkdir(parents=True)
        time.sleep(0.01)
    assert train.load_flash() == "from the cache"
    monkeypatch.setenv("LOCAL_KERNELS", "kernels-community/flash-attn3=/somewhere")  # get_kernel looks there first
    train.load_flash()
    assert hub.calls == [(train.FLASH, 1), "newer", (train.FLASH, 1)]


def test_a_silent_hub_is_given_up(hub, monkeypatch):
    def silent(repository, version):
        try:
            time.sleep(20)
        finally:
            time.sleep(20)  # as a pool of threads that is waited for

    monkeypatch.setattr(hub.module, "get_kernel", silent)
    monkeypatch.setattr(train, "FLASH_SECONDS", 0.1)
    handler = signal.getsignal(signal.SIGALRM)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer in 0.1 s"):
        train.load_flash()
    assert time.monotonic() - began < 5
    assert signal.getsignal(signal.SIGALRM) is handler


def test_flex_has_small_blocks_off_hopper(monkeypatch):
    from torch.nn.attention import flex_attention as flex

    seen = []

    def attention(q, k, v, block_mask, kernel_options):
        seen.append(kernel_options)
        return q

    monkeypatch.setattr(flex, "flex_attention", attention)
    monkeypatch.setattr(flex, "create_block_mask", lambda *shape, device: None)
    x = torch.zeros(1, 4, 1, 2)
    for capability in ((9, 0), (8, 6), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        train.flex_attention(CUDA, 4, [4])(x, x, x, 4)
    assert seen == [None, train.FLEX_OPTIONS, train.FLEX_OPTIONS]
