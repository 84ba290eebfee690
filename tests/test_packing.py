"""Rows against the rule of the published metric, written out naively; the loader against the rows."""

import itertools
import random

import numpy as np
import pytest
import torch

import referee
from prepare import plan_rows


def naive_rows(lengths, batches, capacity, buffer_size):
    """The rule in its plainest form: scan the whole buffer for every placement."""

    def stream():
        for epoch in itertools.count(1):
            at = 0
            for count in batches:
                yield list(range(at, at + count)), epoch
                at += count

    source, buffer = stream(), []
    epoch = 0
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


@pytest.mark.parametrize(
    "seed, count, longest, capacity, buffer",
    [
        (0, 700, 40, 33, 50),
        (1, 30, 9, 17, 100),
        (2, 300, 200, 65, 64),
        (3, 5, 3, 9, 20),
        (4, 400, 64, 64, 1),
        (5, 1, 7, 5, 3),
    ],
)
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
        assert list(zip(documents, takes)) == row
        assert epoch == wanted_epoch
        assert sum(takes) == capacity


def test_hand_worked():
    # A row of 7 from documents of 5, 2, 4, 3, 2 tokens: the longest that fits is 0, then 1 (the earlier of 1 and 4).
    # Then 2 and 3. Document 4 is alone and fits; the buffer is empty then, refills, and 0 fits the remaining 5.
    plan = plan_rows([5, 2, 4, 3, 2], [5], 7, buffer_size=1)
    assert [next(plan) for _ in range(4)] == [
        ([0, 1], [5, 2], 1),
        ([2, 3], [4, 3], 1),
        ([4, 0], [2, 5], 2),
        ([2, 3], [4, 3], 2),
    ]


def test_shortest_is_cropped_and_its_tail_dropped():
    plan = plan_rows([10, 8, 8, 9], [4], 5, buffer_size=2)
    taken = [next(plan)[:2] for _ in range(3)]
    assert taken == [([1], [5]), ([2], [5]), ([3], [5])]


def test_buffer_is_refilled_before_every_placement():
    # with a buffer of 2, the third document must have arrived before the second placement: it fits better
    plan = plan_rows([3, 1, 4], [1, 1, 1], 7, buffer_size=2)
    assert next(plan)[0] == [0, 2]


def files(prepare, name):
    """(ids, tokens of each document, documents of each refill) as they lie on the disk."""
    folder = prepare._dataset().folder
    tokens = np.fromfile(folder / f"{name}.tokens", "<u2")
    lengths = np.fromfile(folder / f"{name}.docs", "<u4").tolist()
    return tokens, lengths, np.fromfile(folder / f"{name}.batches", "<u4").tolist()


def loader(prepare, B=2, split="train", T=64, **more):
    return prepare.make_dataloader(prepare.Tokenizer.from_directory(), B, T, split, **{"device": "cpu", **more})


@pytest.mark.parametrize("name, T, buffer_size", [("train", 64, 1000), ("val", 64, 1000), ("train", 24, 50)])
def test_loader_serves_the_naive_rows(small, name, T, buffer_size):
    tokens, lengths, batches = files(small, name)
    starts = np.cumsum([0, *lengths])
    rows = naive_rows(lengths, batches, T + 1, buffer_size)
    served = loader(small, 4, name, T, buffer_size=buffer_size)
    for _ in range(12):
        inputs, targets, epoch = next(served)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape == targets.shape == (4, T)
        assert inputs.is_contiguous()
        for i in range(4):
            row, wanted_epoch = next(rows)
            ids = np.concatenate([tokens[starts[d] : starts[d] + take] for d, take in row])
            assert inputs[i].tolist() == ids[:-1].tolist()
            assert targets[i].tolist() == ids[1:].tolist()
        assert epoch == wanted_epoch


def test_documents_begin_with_bos_and_hold_the_text(small):
    tokens, lengths, batches = files(small, "val")
    tokenizer = small.Tokenizer.from_directory()
    bos = tokenizer.get_bos_token_id()
    starts = np.cumsum([0, *lengths[:-1]])
    assert (tokens[starts] == bos).all()
    assert (tokens == bos).sum() == len(lengths)
    assert sum(lengths) == len(tokens)
    assert sum(batches) == len(lengths)
    assert max(batches) <= 128
    text = tokenizer.decode(tokens[1 : lengths[0]].tolist())
    assert tokenizer.encode(text) == tokens[1 : lengths[0]].tolist()
    assert len(text) > 30


def test_batches_already_served_are_never_overwritten(small):
    batches = loader(small)
    served = [next(batches) for _ in range(6)]
    copies = [(a.clone(), b.clone()) for a, b, _ in served]
    for _ in range(6):
        next(batches)
    for (a, b, _), (x, y) in zip(served, copies):
        assert torch.equal(a, x)
        assert torch.equal(b, y)
    assert not torch.equal(served[0][0], served[2][0])


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_the_cpu(small):
    there = loader(small, 8, device="cuda")
    served = [next(there) for _ in range(50)]  # none awaited before the next is drawn
    for (a, b, e), (x, y, f) in zip(served, loader(small, 8)):
        assert torch.equal(a.cpu(), x)
        assert torch.equal(b.cpu(), y)
        assert e == f


WRONG_CALLS = {
    "audit": ({"split": "audit"}, "train or val"),
    "no split": ({"split": ""}, "train or val"),
    "no rows": ({"B": 0}, "above 0"),
    "T in words": ({"T": "64"}, "above 0"),
    "no buffer": ({"buffer_size": 0}, "above 0"),
}


@pytest.mark.parametrize("wrong, said", WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_calls_are_refused_before_the_first_draw(small, wrong, said):
    with pytest.raises(small.PrepareError, match=said):
        loader(small, **wrong)


def test_another_tokenizer_is_refused_before_the_first_draw(small):
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)}
    special = {name: 256 + n for n, name in enumerate(small.SPECIAL_TOKENS)}
    other = small.Tokenizer(tiktoken.Encoding("x", pat_str="x", mergeable_ranks=ranks, special_tokens=special))
    with pytest.raises(small.PrepareError, match="not that of the prepared data"):
        small.make_dataloader(other, 2, 64, "train")


def test_ids_beyond_the_vocabulary_are_refused(small, monkeypatch):
    read = small.Dataset.read

    def damaged(dataset, split):
        tokens, *rest = read(dataset, split)
        return [np.maximum(tokens, 512), *rest]

    monkeypatch.setattr(small.Dataset, "read", damaged)
    with pytest.raises(small.PrepareError, match="train.tokens holds ids beyond the vocabulary.*uv run prepare.py"):
        next(loader(small))


def test_first_train_batch_starts_the_clock(small):
    torch.manual_seed(small.SEED)
    next(loader(small, split="val"))
    batches = loader(small)
    assert small.clock.started is None
    next(batches)
    started = small.clock.started
    next(batches)
    assert started is not None
    assert small.clock.started == started
    assert referee.this_run.rows == 4
    assert referee.this_run.doubts == ["validation rows were drawn before the score"]
    small.evaluate_bpb(lambda ids: torch.zeros(*ids.shape, 512), None, 8)
    next(batches)
    assert referee.this_run.rows == 4  # what is drawn after the score trains nothing that counts
