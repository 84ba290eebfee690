"""Small models for the tests of train.py, and an edited copy of it."""

import sys
from dataclasses import replace
from types import ModuleType

import torch
from conftest import ROOT

import train

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
TINY = dict(depth=2, width=32, head_dim=16, value_gate_channels=8)
V = 60
T = 16


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_ids(*shape, vocab=V, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def cpu_knobs(**changes):
    return replace(train.Knobs(**train.TIERS["cpu"]), **changes)


def tiny(path=train.sdpa_attention, dtype=torch.float32, seed=3, length=T, **changes):
    """A model of two blocks as it starts, with the knobs of the CPU tier."""
    torch.manual_seed(seed)
    knobs = cpu_knobs(**{**TINY, "ngram_rows": (97, 101), **changes})
    return train.GPT(knobs, V, length, CPU, path(CPU, length, train.block_windows(knobs, length)), dtype)


def redraw(model):
    """Zero-initialised projections would make tests of what flows through them vacuous."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return model


def edited(*edits):
    """train.py as a module, after edits (text that occurs once, text instead)."""
    text = (ROOT / "train.py").read_text(encoding="utf-8")
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    module = ModuleType("edited_train")
    sys.modules[module.__name__] = module  # dataclasses look there
    exec(compile(text, "train.py, edited", "exec"), module.__dict__)
    return module


def keeping(graphs):
    """A backend of torch.compile that appends each graph to a list and runs it as it is."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend
