"""Rows against the rule of the published metric, written out naively; the loader against the rows."""

import itertools
import random

import numpy as np
import pytest
import torch
from conftest import doubts

from prepare import plan_rows
from referee import run


def naive_rows(lengths, batches, capacity, buffer_size):
    """The rule in its plainest form: scan the whole buffer for every placement."""
    documents = itertools.cycle(range(len(lengths)))
    refills = ((count, epoch) for epoch in itertools.count(1) for count in batches)
    buffer = []
    while True:
        row = []
        room = capacity
        while room:
            while len(buffer) < buffer_size:
                count, epoch = next(refills)
                buffer += itertools.islice(documents, count)
            fitting = [place for place, document in enumerate(buffer) if lengths[document] <= room]
            if fitting:
                best = max(fitting, key=lambda place: lengths[buffer[place]])  # the first of equals
            else:
                best = min(range(len(buffer)), key=lambda place: lengths[buffer[place]])
            document = buffer.pop(best)
            take = min(lengths[document], room)
            row.append((document, take))
            room -= take
        yield row, epoch


SETTINGS = [(0, 700, 40, 33, 50), (1, 30, 9, 17, 100), (2, 300, 200, 65, 64), (3, 5, 3, 9, 20), (4, 400, 64, 64, 1)]


@pytest.mark.parametrize("seed, count, longest, capacity, buffer_size", [*SETTINGS, (5, 1, 7, 5, 3)])
def test_equal_to_the_naive_packer(seed, count, longest, capacity, buffer_size):
    rng = random.Random(seed)
    lengths = [rng.randint(1, longest) for _ in range(count)]
    batches = []
    while sum(batches) < count:
        batches.append(rng.randint(1, min(count - sum(batches), 13)))
    fast = plan_rows(lengths, batches, capacity, buffer_size)
    slow = naive_rows(lengths, batches, capacity, buffer_size)
    for _ in range(600):
        documents, takes, epoch = next(fast)
        assert (list(zip(documents, takes)), epoch) == next(slow)
        assert sum(takes) == capacity


HAND_WORKED = {
    # Rows of 7 from 5, 2, 4, 3, 2 tokens: the longest that fits is 0, then 1 (the earlier of 1 and 4); then 2 and 3.
    # Document 4 is alone and fits; the buffer is empty then, refills, and 0 fits the remaining 5.
    "the longest that fits": (
        ([5, 2, 4, 3, 2], [5], 7, 1),
        [([0, 1], [5, 2], 1), ([2, 3], [4, 3], 1), ([4, 0], [2, 5], 2), ([2, 3], [4, 3], 2)],
    ),
    "the shortest is cropped and its tail dropped": (
        ([10, 8, 8, 9], [4], 5, 2),
        [([1], [5], 1), ([2], [5], 1), ([3], [5], 1)],
    ),
    # With a buffer of 2 the third document has arrived before the second placement: it fits better.
    "refilled before every placement": (([3, 1, 4], [1, 1, 1], 7, 2), [([0, 2], [3, 4], 1)]),
}


@pytest.mark.parametrize("settings, rows", HAND_WORKED.values(), ids=HAND_WORKED)
def test_hand_worked(settings, rows):
    assert list(itertools.islice(plan_rows(*settings), len(rows))) == rows


def files(prepare, split):
    """(ids, tokens of each document, documents of each refill) as they lie on the disk."""
    folder = prepare.dataset_in_use().folder
    return [np.fromfile(folder / f"{split}.{kind}", dtype) for kind, dtype in prepare.SPLIT_FILES.items()]


def loader(prepare, B=2, split="train", T=64, **more):
    return prepare.make_dataloader(prepare.Tokenizer.from_directory(), B, T, split, **{"device": "cpu", **more})


@pytest.mark.parametrize("split, T, buffer_size", [("train", 64, 1000), ("val", 64, 1000), ("train", 24, 50)])
def test_loader_serves_the_naive_rows(small, split, T, buffer_size):
    tokens, lengths, batches = files(small, split)
    starts = np.cumsum(lengths) - lengths
    rows = naive_rows(lengths.tolist(), batches.tolist(), T + 1, buffer_size)
    served = list(
        itertools.islice(loader(small, 4, split, T, buffer_size=buffer_size), 12)
    )  # all before any is compared
    for inputs, targets, epoch in served:
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape == targets.shape == (4, T)
        assert inputs.is_contiguous()
        for i in range(4):
            row, wanted_epoch = next(rows)
            ids = np.concatenate([tokens[starts[document] : starts[document] + take] for document, take in row])
            assert inputs[i].tolist() == ids[:-1].tolist()
            assert targets[i].tolist() == ids[1:].tolist()
        assert epoch == wanted_epoch


def test_documents_begin_with_bos_and_hold_the_text(small):
    tokens, lengths, batches = files(small, "val")
    tokenizer = small.Tokenizer.from_directory()
    starts = np.cumsum(lengths) - lengths
    assert np.flatnonzero(tokens == tokenizer.get_bos_token_id()).tolist() == starts.tolist()
    assert sum(lengths) == len(tokens)
    assert sum(batches) == len(lengths)
    assert max(batches) <= 128
    first = tokens[1 : lengths[0]].tolist()
    assert tokenizer.encode(tokenizer.decode(first)) == first


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_the_cpu(small):
    served = list(itertools.islice(loader(small, 8, device="cuda"), 50))  # none awaited before the next is drawn
    for (inputs, targets, epoch), wanted in zip(served, loader(small, 8)):
        assert torch.equal(inputs.cpu(), wanted[0])
        assert torch.equal(targets.cpu(), wanted[1])
        assert epoch == wanted[2]


def other_tokenizer(prepare):
    tokens = [chr(byte) for byte in range(256)]
    return prepare.Tokenizer.from_vocabulary(prepare.Vocabulary("x", prepare.SPECIAL_TOKENS, tokens))


WRONG_CALLS = {  # words of the sentence: how
    "serves train or val, not 'audit'": lambda prepare: loader(prepare, split="audit"),
    "above 0, not 0, 64": lambda prepare: loader(prepare, B=0),
    "above 0, not 2, '64'": lambda prepare: loader(prepare, T="64"),
    "above 0, not 2, 64, 0": lambda prepare: loader(prepare, buffer_size=0),
    "not that of the prepared": lambda prepare: prepare.make_dataloader(other_tokenizer(prepare), 2, 64, "train"),
}


@pytest.mark.parametrize("said", WRONG_CALLS)
def test_wrong_calls_are_refused_before_the_first_draw(small, said):
    with pytest.raises(small.PrepareError, match=said):
        WRONG_CALLS[said](small)


def test_ids_beyond_the_vocabulary_are_refused(small, monkeypatch):
    tokens, lengths, batches = files(small, "train")
    monkeypatch.setattr(small.Dataset, "read", lambda *_: [np.maximum(tokens, 512), lengths, batches])
    with pytest.raises(small.PrepareError, match="train.tokens holds ids beyond the vocabulary.*uv run prepare.py"):
        next(loader(small))


def test_first_train_batch_starts_the_clock(small):
    torch.manual_seed(small.SEED)
    next(loader(small, split="val"))
    batches = loader(small)
    assert small.clock.elapsed() == 0
    next(batches)
    started = run.this_run.clock.started
    next(batches)
    assert run.this_run.clock.started == started > 0
    assert run.this_run.rows == 4
    assert doubts() == ["validation rows were drawn before the score"]
    small.evaluate_bpb(lambda ids: torch.zeros(*ids.shape, 512), None, 8)
    next(batches)
    assert run.this_run.rows == 4  # what is drawn after the score trains nothing that counts
