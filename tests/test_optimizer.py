"""Muon, AdamW and RowAdam, each against what defines it; who owns which parameter; the rates."""

import pytest
import torch
import torch.nn.functional as F
from reference import CPU, TINY, cpu_knobs, draw, draw_ids, keeping, redraw, tiny

import train
from bench.reference import REFERENCE


def adamw(params, lr=0.03, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0):
    return train.AdamW(params, train.adamw_update, lr=lr, betas=betas, eps=eps, decay=weight_decay)


def row_adam(table, lr=0.1, eps=1e-10):
    return train.RowAdam([table], lr=lr, beta2=0.95, eps=eps)


def muon(params, lr=0.1, decay=0.0):
    return train.Muon(params, train.muon_update, lr=lr, momentum=0.9, beta2=0.8, decay=decay)


def apply(group, *grads):
    """One step of a group."""
    for p, grad in zip(group.params, grads, strict=True):
        p.grad = grad.clone()
    train.Optimizer([group]).step()


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("betas, eps", [((0.8, 0.95), 1e-10), ((0.9, 0.999), 1e-3)])
def test_adamw_agrees_with_torch(decay, betas, eps):
    settings = dict(lr=0.03, betas=betas, eps=eps, weight_decay=decay)
    shapes = [(7, 5), (3,), (2, 2, 2)]
    ours = [draw(*shape) for shape in shapes]
    theirs = [p.clone().requires_grad_() for p in ours]
    group = adamw(ours, **settings)
    torchs = torch.optim.AdamW(theirs, **settings)
    for step in range(20):
        grads = [draw(*shape, seed=step) * (step % 3) for shape in shapes]
        for p, grad in zip(theirs, grads):
            p.grad = grad
        torchs.param_groups[0]["lr"] = 0.03 * (1 - step / 40)
        group.lr.fill_(0.03 * (1 - step / 40))
        apply(group, *grads)
        torchs.step()
    for p, q in zip(ours, theirs):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)


def test_rows_of_one_channel_move_as_by_adam_without_momentum():
    ours = draw(9, 1)
    theirs = ours.clone().requires_grad_()
    group = row_adam(ours, lr=0.03, eps=1e-8)
    torchs = torch.optim.Adam([theirs], lr=0.03, betas=(0.0, 0.95), eps=1e-8)
    for step in range(20):
        theirs.grad = draw(9, 1, seed=step) * (torch.arange(9)[:, None] % 3 != step % 3)
        apply(group, theirs.grad.to_sparse(1))  # a third of the rows untouched, another third each time
        torchs.step()
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_rows_share_one_second_moment_and_untouched_ones_stay():
    table = torch.ones(4, 3)
    grad = torch.tensor([[3.0, -4.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1e-3, 0.0, 0.0]])
    apply(row_adam(table), grad.to_sparse(1))
    moved = 1 - table
    assert torch.allclose(moved[0], 0.1 * grad[0] / (25 / 3) ** 0.5, atol=1e-5)
    assert not moved[1].any()
    assert torch.allclose(moved.square().mean(1)[[0, 2, 3]], torch.tensor(0.01), rtol=1e-3)


def test_a_row_that_stands_at_several_places_moves_once_by_the_sum():
    at_places = torch.sparse_coo_tensor([[1, 2, 1]], draw(3, 5), (4, 5), check_invariants=True)
    tables = [torch.ones(4, 5), torch.ones(4, 5)]
    apply(row_adam(tables[0]), at_places)
    apply(row_adam(tables[1]), at_places.to_dense().to_sparse(1))
    assert torch.allclose(*tables)


# -- Muon


@pytest.mark.parametrize("shape", [(3, 48, 48), (2, 96, 32), (2, 32, 96), (1, 4, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalized_updates_have_singular_values_near_one(shape, dtype):
    g = draw(*shape)
    u = train.orthogonalize(g, dtype).float()
    values = torch.linalg.svdvals(u)
    assert values.min() > 0.7
    assert values.max() < 1.25
    U, _, V = torch.linalg.svd(g, full_matrices=False)
    assert F.cosine_similarity((U @ V).flatten(1), u.flatten(1)).min() > 0.97  # the directions are the gradient's
    louder = train.orthogonalize(1000 * g, torch.float32)
    assert torch.allclose(louder, train.orthogonalize(g, torch.float32), atol=1e-3)


def test_zero_gradients_stay_zero():
    assert not train.orthogonalize(torch.zeros(2, 8, 4), torch.float32).any()


class PlainMuon:
    """One matrix in float64: singular values through the polynomials, rows evened out one by one."""

    def __init__(self, p, lr, decay, mu=0.9, beta2=0.8):
        self.p = p.double()
        self.lr = lr
        self.decay = decay
        self.mu = mu
        self.beta2 = beta2
        self.average = torch.zeros_like(self.p)
        self.variance = torch.zeros(max(p.shape), dtype=torch.float64)

    def step(self, grad):
        self.average = self.mu * self.average + (1 - self.mu) * grad.double()
        ahead = self.mu * self.average + (1 - self.mu) * grad.double()
        U, values, Vt = torch.linalg.svd(ahead, full_matrices=False)
        values = values / (1.02 * values.norm() + 1e-6)
        for a, b, c in train.POLAR_EXPRESS:
            values = a * values + b * values**3 + c * values**5
        u = U @ torch.diag(values) @ Vt
        wide = u.size(0) < u.size(1)
        rows = u.T if wide else u
        self.variance = self.beta2 * self.variance + (1 - self.beta2) * torch.stack(
            [row.square().mean() for row in rows]
        )
        even = torch.stack([row / spread for row, spread in zip(rows, self.variance.sqrt())])
        even = even * rows.norm() / even.norm()
        update = even.T if wide else even
        agrees = update.sign() * self.p.sign() >= 0
        self.p = self.p - self.lr * update - self.lr * self.decay * torch.where(agrees, self.p, 0)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (12, 12)])
def test_stacked_matrices_move_as_by_plain_muon_each(shape):
    together = list(draw(3, *shape).unbind())
    plain = [PlainMuon(p.clone(), lr=0.1, decay=0.3) for p in together]
    group = muon(together, decay=0.3)
    for step in range(6):
        grads = draw(3, *shape, seed=10 + step)
        apply(group, *grads)
        for each, grad in zip(plain, grads):
            each.step(grad)
    for each, p in zip(plain, together):
        torch.testing.assert_close(p, each.p.float(), atol=2e-3, rtol=2e-3)


# -- owners and rates


@pytest.mark.parametrize(
    "taps, rows, dtype", [(0, (), torch.float32), (2, (97, 9), torch.float32), (2, (97, 9), torch.bfloat16)]
)
def test_every_parameter_has_one_owner_and_moves_in_one_step(taps, rows, dtype):
    model = redraw(tiny(taps=taps, ngram_rows=rows, dtype=dtype))
    optimizer = train.make_optimizer(model)
    assert sorted(id(p) for p in optimizer.params()) == sorted(id(p) for p in model.parameters())
    assert all(group.params for group in optimizer.groups)
    assert not any(tensor.any() for group in optimizer.groups for tensor in group.state)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(draw_ids(4, 16), draw_ids(4, 16, seed=1)).backward()
    optimizer.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
    assert all(p.grad is None for p in model.parameters())


def test_an_orphan_and_a_parameter_owned_twice_are_named():
    model = tiny()
    model.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="'extra': 0"):
        train.make_optimizer(model)
    model = tiny()
    model.blocks[0].up.weight = model.blocks[1].up.weight
    with pytest.raises(AssertionError, match="up.weight': 2"):
        train.make_optimizer(model)


def rates(model, share=0.0):
    """{a parameter's name: (its rate, its decay, its group)} after so much of the budget."""
    optimizer = train.make_optimizer(model)
    train.set_rates(optimizer, model.knobs, share, 0)
    owner = {id(p): group for group in optimizer.groups for p in group.params}
    groups = {name: owner[id(p)] for name, p in model.named_parameters()}
    return {name: (group.lr.item(), group.decay.item(), group) for name, group in groups.items()}


def test_rates_are_the_references():
    found = rates(train.GPT(train.Knobs(**REFERENCE), 8192, 64, CPU, None))
    scale = (512 / 768) ** -0.5
    wanted = {
        "head.weight": (0.004 * scale, 0.0, 1, dict(betas=(0.8, 0.95), eps=1e-10)),
        "embedding.weight": (0.6 * scale, 0.0, 1, dict(betas=(0.8, 0.95), eps=1e-10)),
        "value_embeddings.1.weight": (0.6 * scale, 0.0, 4, dict(betas=(0.8, 0.95), eps=1e-10)),
        "residual_scale": (0.005, 0.0, 1, dict(betas=(0.8, 0.95), eps=1e-10)),
        "x0_scale": (0.5, 0.0, 1, dict(betas=(0.96, 0.95), eps=1e-10)),
        "blocks.1.attention.query.weight": (0.04, 0.2, 32, dict(beta2=0.95, dtype=torch.float32)),
        "blocks.1.attention.gate.weight": (0.04, 0.2, 4, dict(beta2=0.95, dtype=torch.float32)),
        "blocks.1.up.weight": (0.08, 0.2, 8, dict(beta2=0.95, dtype=torch.float32)),
        "blocks.1.down.weight": (0.04, 0.2, 8, dict(beta2=0.95, dtype=torch.float32)),
    }
    for name, (lr, decay, count, fixed) in wanted.items():
        rate, decays, group = found[name]
        assert (rate, decays) == pytest.approx((lr, decay)), name
        assert len(group.params) == count, name
        assert group.fixed == fixed, name


def test_shipped_tables_decay_and_go_on_decaying():
    found = rates(tiny(taps=2), share=0.2)
    later = rates(tiny(taps=2), share=0.6)
    decays = {
        "head": 0.01,
        "embedding": 0.001,
        "value_embeddings.1": 0.003,
        "ngrams.1": 0.0,
        "blocks.0.before_mlp": 0.0,
    }
    for name, decay in decays.items():
        assert found[f"{name}.weight"][1] == later[f"{name}.weight"][1] == pytest.approx(decay), name
    assert later["blocks.0.up.weight"][1] == pytest.approx(0.2 * 0.4)
    assert isinstance(found["ngrams.1.weight"][2], train.RowAdam)
    assert found["ngrams.1.weight"][0] == pytest.approx(0.3)
    assert found["blocks.0.before_mlp.weight"][0] == pytest.approx(0.02)
    assert len(found["blocks.1.before_attention.weight"][2].params) == 4


def test_compiled_steps_agree_and_never_compile_again():
    graphs = []

    def build(compiler):
        weights = list(draw(3, 6, 6))
        update = compiler(train.muon_update)
        group = train.Muon(weights[:2], update, lr=0.1, momentum=0.9, beta2=0.95, decay=0.1)
        second = train.AdamW(weights[2:], compiler(train.adamw_update), lr=0.1, betas=(0.8, 0.95), eps=1e-10)
        return train.Optimizer([group, second])

    plain = build(train.uncompiled)
    compiled = build(lambda f: torch.compile(f, dynamic=False, fullgraph=True, backend=keeping(graphs)))
    for step in range(6):
        for optimizer in (plain, compiled):
            for p, grad in zip(optimizer.params(), draw(3, 6, 6, seed=step)):
                p.grad = grad
            train.set_rates(optimizer, cpu_knobs(**TINY), step / 6, step)
            optimizer.step()
        assert len(graphs) == 2
    for p, q in zip(plain.params(), compiled.params()):
        assert torch.allclose(p, q, atol=1e-5)
