"""Rows against the rule of the published metric, written out naively; the loader against the rows."""

import itertools
import random

import numpy as np
import pytest
import torch

from prepare import plan_rows


def naive_rows(lengths, batches, capacity, buffer_size):
    """The rule in its plainest form: scan the whole buffer for every placement."""
    def stream():
        for epoch in itertools.count(1):
            at = 0
            for count in batches:
                yield list(range(at, at + count)), epoch
                at += count
    source, buffer, epoch = stream(), [], 0
    while True:
        row, room = [], capacity
        while room:
            while len(buffer) < buffer_size:
                fresh, epoch = next(source)
                buffer += fresh
            best = None
            for i, doc in enumerate(buffer):
                if lengths[doc] <= room and (best is None or lengths[doc] > lengths[buffer[best]]):
                    best = i
            if best is None:
                best = min(range(len(buffer)), key=lambda i: lengths[buffer[i]])
            doc = buffer.pop(best)
            take = min(lengths[doc], room)
            row.append((doc, take))
            room -= take
        yield row, epoch


@pytest.mark.parametrize("seed, count, longest, capacity, buffer", [
    (0, 700, 40, 33, 50), (1, 30, 9, 17, 100), (2, 300, 200, 65, 64), (3, 5, 3, 9, 20), (4, 400, 64, 64, 1), (5, 1, 7, 5, 3)])
def test_equal_to_the_naive_packer(seed, count, longest, capacity, buffer):
    rng = random.Random(seed)
    lengths = [rng.randint(1, longest) for _ in range(count)]
    batches, left = [], count
    while left:
        batches.append(rng.randint(1, min(left, 13)))
        left -= batches[-1]
    fast, slow = plan_rows(lengths, batches, capacity, buffer), naive_rows(lengths, batches, capacity, buffer)
    for _ in range(600):
        documents, takes, epoch = next(fast)
        row, wanted_epoch = next(slow)
        assert list(zip(documents, takes)) == row and epoch == wanted_epoch
        assert sum(takes) == capacity


def test_hand_worked():
    # A row of 7 from documents of 5, 2, 4, 3, 2 tokens: the longest that fits is 0, then 1 (the earlier of 1 and 4).
    # Then 2 and 3. Document 4 is alone and fits; the buffer is empty then, refills, and 0 fits the remaining 5.
    plan = plan_rows([5, 2, 4, 3, 2], [5], 7, buffer_size=1)
    assert [next(plan) for _ in range(4)] == [
        ([0, 1], [5, 2], 1), ([2, 3], [4, 3], 1), ([4, 0], [2, 5], 2), ([2, 3], [4, 3], 2)]


def test_shortest_is_cropped_and_its_tail_dropped():
    plan = plan_rows([10, 8, 8, 9], [4], 5, buffer_size=2)
    taken = [next(plan)[:2] for _ in range(3)]
    assert taken == [([1], [5]), ([2], [5]), ([3], [5])]


def test_buffer_is_refilled_before_every_placement():
    # with a buffer of 2, the third document must have arrived before the second placement: it fits better
    plan = plan_rows([3, 1, 4], [1, 1, 1], 7, buffer_size=2)
    assert next(plan)[0] == [0, 2]


def split(prepare, name):
    folder, _ = prepare._prepared()
    tokens = np.fromfile(folder / f"{name}.tokens", "<u2")
    lengths = np.fromfile(folder / f"{name}.docs", "<u4").tolist()
    return tokens, lengths, np.fromfile(folder / f"{name}.batches", "<u4").tolist()


@pytest.mark.parametrize("name", ["train", "val"])
def test_loader_serves_the_naive_rows(small, name):
    tokens, lengths, batches = split(small, name)
    starts = np.cumsum([0, *lengths])
    rows, tokenizer = naive_rows(lengths, batches, 65, 1000), small.Tokenizer.from_directory()
    loader = small.make_dataloader(tokenizer, 4, 64, name, device="cpu")
    for _ in range(12):
        inputs, targets, epoch = next(loader)
        assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape == (4, 64)
        for i in range(4):
            row, wanted_epoch = next(rows)
            ids = np.concatenate([tokens[starts[d]:starts[d] + take] for d, take in row])
            assert inputs[i].tolist() == ids[:-1].tolist() and targets[i].tolist() == ids[1:].tolist()
        assert epoch == wanted_epoch


def test_documents_begin_with_bos_and_hold_the_text(small):
    tokens, lengths, batches = split(small, "val")
    tokenizer = small.Tokenizer.from_directory()
    starts = np.cumsum([0, *lengths[:-1]])
    assert (tokens[starts] == tokenizer.get_bos_token_id()).all() and sum(lengths) == len(tokens)
    assert (tokens == tokenizer.get_bos_token_id()).sum() == len(lengths)
    assert sum(batches) == len(lengths) and max(batches) <= 128
    text = tokenizer.decode(tokens[1:lengths[0]].tolist())
    assert tokenizer.encode(text) == tokens[1:lengths[0]].tolist() and len(text) > 30


def test_batches_already_served_are_never_overwritten(small):
    loader = small.make_dataloader(small.Tokenizer.from_directory(), 2, 64, "train", device="cpu")
    served = [next(loader) for _ in range(6)]
    copies = [(a.clone(), b.clone()) for a, b, _ in served]
    for _ in range(6):
        next(loader)
    assert all(torch.equal(a, x) and torch.equal(b, y) for (a, b, _), (x, y) in zip(served, copies))
    assert not torch.equal(served[0][0], served[2][0])


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_the_cpu(small):
    tokenizer = small.Tokenizer.from_directory()
    there = small.make_dataloader(tokenizer, 8, 64, "train", device="cuda")
    here = small.make_dataloader(tokenizer, 8, 64, "train", device="cpu")
    served = [next(there) for _ in range(50)]  # none awaited before the next is drawn
    for (a, b, e), (x, y, f) in zip(served, here):
        assert torch.equal(a.cpu(), x) and torch.equal(b.cpu(), y) and e == f


@pytest.mark.parametrize("wrong", ["audit", "test", ""])
def test_other_splits_are_refused(small, wrong):
    with pytest.raises(small.PrepareError, match="train or val"):
        next(small.make_dataloader(small.Tokenizer.from_directory(), 2, 64, wrong))


def test_first_train_batch_starts_the_clock_and_val_is_noted(small):
    torch.manual_seed(small.SEED)
    tokenizer = small.Tokenizer.from_directory()
    assert small.clock.started is None
    next(small.make_dataloader(tokenizer, 2, 64, "val", device="cpu"))
    assert small.clock.started is None and small._Run.val_drawn and "validation rows" in small._why_not()
    loader = small.make_dataloader(tokenizer, 2, 64, "train", device="cpu")
    assert small.clock.started is None
    next(loader)
    started = small.clock.started
    next(loader)
    assert started is not None and small.clock.started == started and small._Run.seed_ok and small._Run.rows == 4


def test_another_seed_is_noted(small):
    torch.manual_seed(small.SEED + 1)
    next(small.make_dataloader(small.Tokenizer.from_directory(), 2, 64, "train", device="cpu"))
    assert not small._Run.seed_ok and "seed" in small._why_not()
