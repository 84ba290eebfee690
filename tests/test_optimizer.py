"""Muon and AdamW, each against what defines it."""

import pytest
import torch
import torch.nn.functional as F
from reference import CPU, REFERENCE, TINY, cpu_knobs, draw_ids, redraw

import train

KNOBS = cpu_knobs(depth=2, **TINY)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adamw(params, lr=0.03, betas=(0.8, 0.95), eps=1e-10, **more):
    return train.AdamW(params, train.adamw_update, lr=lr, betas=betas, eps=eps, **more)


def row_adam(table, lr=0.1, eps=1e-10):
    return train.RowAdam(table, train.rows_update, lr=lr, beta2=0.95, eps=eps)


def muon(params, lr=0.1, weight_decay=0.0):
    return train.Muon(params, train.muon_update, lr=lr, momentum=0.9, beta2=0.95, weight_decay=weight_decay)


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
    ours = [drawn(*shape) for shape in shapes]
    theirs = [p.clone().requires_grad_() for p in ours]
    group = adamw(ours, **settings)
    torchs = torch.optim.AdamW(theirs, **settings)
    for step in range(20):
        grads = [drawn(*shape, seed=step) * (step % 3) for shape in shapes]
        for p, grad in zip(theirs, grads):
            p.grad = grad
        torchs.param_groups[0]["lr"] = 0.03 * (1 - step / 40)
        group.lr.fill_(0.03 * (1 - step / 40))
        apply(group, *grads)
        torchs.step()
    for p, q in zip(ours, theirs):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)


def test_rows_of_one_channel_move_as_by_adam_without_momentum():
    ours = drawn(9, 1)
    theirs = ours.clone().requires_grad_()
    group = row_adam(ours, lr=0.03, eps=1e-8)
    torchs = torch.optim.Adam([theirs], lr=0.03, betas=(0.0, 0.95), eps=1e-8)
    for step in range(20):
        theirs.grad = drawn(9, 1, seed=step) * (torch.arange(9)[:, None] % 3 != step % 3)
        apply(group, theirs.grad)
        torchs.step()
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_rows_share_one_second_moment_and_untouched_ones_stay():
    table = torch.ones(4, 3)
    grad = torch.tensor([[3.0, -4.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1e-3, 0.0, 0.0]])
    apply(row_adam(table), grad)
    moved = 1 - table
    assert torch.allclose(moved[0], 0.1 * grad[0] / (25 / 3) ** 0.5, atol=1e-5)
    assert not moved[1].any()
    assert torch.allclose(moved.square().mean(1)[[0, 2, 3]], torch.tensor(0.01), rtol=1e-3)


@pytest.mark.parametrize("shape", [(3, 48, 48), (2, 96, 32), (2, 32, 96), (1, 4, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalized_updates_have_singular_values_near_one(shape, dtype):
    g = drawn(*shape)
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


@pytest.mark.parametrize("shape, axis", [((2, 40, 10), -1), ((2, 10, 40), -2), ((2, 16, 16), -1)])
def test_variance_reduction_evens_out_and_keeps_the_norm(shape, axis):
    def spread(x):
        rows = x.square().mean(axis)
        return (rows.amax(1) / rows.amin(1)).max()

    scales = torch.logspace(-2, 0, max(shape[1:]))
    u = drawn(*shape) * scales.unsqueeze(axis)
    second = torch.zeros_like(u.mean(axis, keepdim=True))
    for _ in range(200):
        v = train.reduce_variance(u, second, 0.95)
    assert torch.allclose(v.norm(dim=(1, 2)), u.norm(dim=(1, 2)), rtol=1e-4)
    assert torch.allclose(second, u.square().mean(axis, keepdim=True), rtol=1e-3)
    assert spread(u) > 100
    assert spread(v) < 1.01


def test_muon_moves_against_the_gradient_by_its_rate():
    p = torch.zeros(24, 24)
    apply(muon([p]), drawn(24, 24))
    assert (p * drawn(24, 24)).sum() < 0  # downhill
    assert p.norm().item() == pytest.approx(0.1 * 24**0.5, rel=0.1)  # 24 singular values near 1, times the rate


def test_muon_momentum_is_nesterovs(monkeypatch):
    """What is orthogonalized has a closed form."""
    seen = []

    def record(g, dtype):
        seen.append(g[0, 0, 0].item())
        return g

    monkeypatch.setattr(train, "orthogonalize", record)
    group = muon([torch.zeros(4, 4)])
    for value in (1.0, 2.0, 3.0):
        apply(group, torch.full((4, 4), value))
    averages = [0.1, 0.9 * 0.1 + 0.2, 0.9 * (0.9 * 0.1 + 0.2) + 0.3]
    assert seen == pytest.approx([0.1 * n + 0.9 * average for n, average in zip((1, 2, 3), averages)])


def test_muon_decays_only_where_it_agrees_with_the_update():
    start = drawn(16, 16)
    plain = start.clone()
    decayed = start.clone()
    apply(muon([plain]), drawn(16, 16, seed=1))
    apply(muon([decayed], weight_decay=0.5), drawn(16, 16, seed=1))
    agrees = (start - plain) * start >= 0
    assert 50 < agrees.sum() < 206
    assert torch.allclose((plain - decayed)[agrees], 0.1 * 0.5 * start[agrees], atol=1e-6)
    assert torch.equal(plain[~agrees], decayed[~agrees])


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_stacked_matrices_move_as_if_alone(shape):
    together = list(drawn(3, *shape))
    alone = [p.clone() for p in together]
    grads = drawn(3, *shape, seed=1)
    apply(muon(together, weight_decay=0.1), *grads)
    for p, grad, got in zip(alone, grads, together):
        apply(muon([p], weight_decay=0.1), grad)
        assert torch.allclose(p, got, atol=1e-5)


def model_and_optimizer(dtype=torch.float32, **changes):
    model = redraw(train.GPT(cpu_knobs(**{**TINY, "depth": 2, **changes}), 60, 16, CPU, dtype=dtype))
    return model, train.make_optimizer(model)


def test_every_parameter_moves_in_one_step_and_every_state_starts_at_zero():
    model, optimizer = model_and_optimizer()
    assert not any(tensor.any() for tensor in optimizer.state())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(draw_ids(4, 16), draw_ids(4, 16, seed=1)).backward()
    optimizer.step()
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


def test_an_orphan_is_named():
    model, _ = model_and_optimizer()
    model.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="extra"):
        train.make_optimizer(model)


def owners(model):
    """The group of each parameter, by identity."""
    return {id(p): group for group in train.make_optimizer(model).groups for p in group.params}


def test_rates_are_the_references():
    model = train.GPT(train.Knobs(**REFERENCE), 8192, 64, CPU)
    owner = owners(model)
    scale = (512 / 768) ** -0.5
    wanted = [
        (model.head.weight, 0.004 * scale, (0.8, 0.95)),
        (model.embedding.weight, 0.6 * scale, (0.8, 0.95)),
        (model.value_embeddings["1"].weight, 0.6 * scale, (0.8, 0.95)),
        (model.residual_scale, 0.005, (0.8, 0.95)),
        (model.x0_scale, 0.5, (0.96, 0.95)),
    ]
    for p, lr, betas in wanted:
        assert owner[id(p)].initial_lr == lr
        assert owner[id(p)].fixed == {"betas": betas, "eps": 1e-10}
        assert owner[id(p)].weight_decay == 0
    block = model.blocks[1]
    a = block.attention
    for p, lr, count in ((a.query, 0.04, 32), (block.up, 0.08, 8), (block.down, 0.04, 8), (a.gate, 0.04, 4)):
        group = owner[id(p.weight)]
        assert (group.initial_lr, len(group.params)) == (lr, count)
        assert group.fixed["beta2"] == 0.95
        assert group.weight_decay.item() == pytest.approx(0.2)


def test_taps_have_a_rate_of_their_own_and_no_decay():
    model, optimizer = model_and_optimizer(taps=2)
    taps = [mix.weight for block in model.blocks for mix in (block.before_attention, block.before_mlp)]
    (group,) = [group for group in optimizer.groups if any(p is taps[0] for p in group.params)]
    assert list(map(id, group.params)) == list(map(id, taps))
    assert isinstance(group, train.AdamW)
    assert group.initial_lr == 0.02
    assert group.weight_decay == 0


def test_shipped_tables_decay_and_go_on_decaying():
    model, optimizer = model_and_optimizer(bigram_rows=64)
    owner = {id(p): group for group in optimizer.groups for p in group.params}
    train.set_rates(optimizer, model.knobs, 0.9, 10)
    decays = {model.head: 0.01, model.embedding: 0.001, model.value_embeddings["1"]: 0.003, model.bigram: 0.0}
    for table, decay in decays.items():
        assert owner[id(table.weight)].weight_decay.item() == pytest.approx(decay)
    assert owner[id(model.x0_scale)].weight_decay == 0
    assert isinstance(owner[id(model.bigram.weight)], train.RowAdam)
    assert owner[id(model.bigram.weight)].initial_lr == 0.3


def test_compiled_steps_agree_and_never_compile_again():
    compiles = []

    def count(graph, inputs):
        compiles.append(1)
        return graph.forward

    def build(compiler):
        weights = list(drawn(3, 6, 6))
        update = compiler(train.muon_update)
        rates = dict(lr=0.1, momentum=0.9, beta2=0.95, weight_decay=0.1)
        second = train.AdamW(weights[2:], compiler(train.adamw_update), lr=0.1, betas=(0.8, 0.95), eps=1e-10)
        return train.Optimizer([train.Muon(weights[:2], update, **rates), second])

    plain = build(train.uncompiled)
    compiled = build(lambda f: torch.compile(f, dynamic=False, backend=count))
    for step in range(6):
        for optimizer in (plain, compiled):
            for p, grad in zip(optimizer.params(), drawn(3, 6, 6, seed=step)):
                p.grad = grad
            train.set_rates(optimizer, KNOBS, step / 6, step)
            optimizer.step()
        assert len(compiles) == 2
    for p, q in zip(plain.params(), compiled.params()):
        assert torch.allclose(p, q, atol=1e-5)
