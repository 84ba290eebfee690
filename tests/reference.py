"""The reference recipe, as knobs: the public baseline that the shipped recipe is measured against; and small models."""

from dataclasses import replace

import torch

import train

CPU = torch.device("cpu")
REFERENCE = dict(
    window_pattern="SSSL",
    short_window=1 / 2,
    rope_base=10_000.0,
    qk_scale=1.0,
    matrix_scale=1.0,
    x0_init=0.1,
    batch_tokens=2**19,
    micro_tokens=2**18,
    embedding_lr=0.6,
    value_embedding_lr=0.6,
    head_lr=0.004,
    muon_momentum_steps=300,
    embedding_decay=0.0,
    value_embedding_decay=0.0,
    head_decay=0.0,
    warmdown=0.5,
    final_lr=0.0,
)
TINY = dict(width=32, head_dim=16, value_gate_channels=8)


def draw_ids(*shape, vocab=50, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def redraw(model):
    """Zero-initialised projections would make tests of what flows through them vacuous."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return model


def cpu_knobs(**changes):
    return replace(train.Knobs(**train.TIERS["cpu"]), **changes)
