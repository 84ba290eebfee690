"""Muon and AdamW, each against what defines it."""

from dataclasses import replace

import pytest
import torch
from reference import REFERENCE

import train

CPU = torch.device("cpu")
KNOBS = replace(train.Knobs(**train.TIERS["cpu"]), depth=2, width=32, head_dim=16, value_gate_channels=8)


def model_and_grads(seed=0):
    model = train.GPT(KNOBS, 60, 16, CPU)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    ids = torch.randint(60, (4, 17), generator=g)
    model(ids[:, :-1], ids[:, 1:]).backward()
    return model


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("betas, eps", [((0.8, 0.95), 1e-10), ((0.9, 0.999), 1e-3)])
def test_adamw_agrees_with_torch(decay, betas, eps):
    g = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (3,), (2, 2, 2)]
    ours = [torch.randn(s, generator=g).requires_grad_() for s in shapes]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    mine = train.MuonAdamW([dict(kind="adamw", params=ours, lr=0.03, betas=betas, eps=eps, weight_decay=decay)])
    torchs = torch.optim.AdamW(theirs, lr=0.03, betas=betas, eps=eps, weight_decay=decay)
    for step in range(20):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=g) * (step % 3)
            q.grad = p.grad.clone()
        mine.param_groups[0]["lr"] = torchs.param_groups[0]["lr"] = 0.03 * (1 - step / 40)
        mine.step()
        torchs.step()
    for p, q in zip(ours, theirs):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 48, 48), (2, 96, 32), (2, 32, 96), (1, 4, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalized_updates_have_singular_values_near_one(shape, dtype):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u = train.orthogonalize(g, dtype).float()
    values = torch.linalg.svdvals(u)
    assert values.min() > 0.7 and values.max() < 1.25
    # the directions are those of the gradient: U V^T of its singular value decomposition
    U, _, V = torch.linalg.svd(g, full_matrices=False)
    assert torch.nn.functional.cosine_similarity((U @ V).flatten(1), u.flatten(1)).min() > 0.97
    assert torch.allclose(train.orthogonalize(1000 * g, torch.float32), train.orthogonalize(g, torch.float32), atol=1e-3)


def test_zero_gradients_stay_zero():
    assert not train.orthogonalize(torch.zeros(2, 8, 4), torch.float32).any()


@pytest.mark.parametrize("shape, axis", [((2, 40, 10), -1), ((2, 10, 40), -2), ((2, 16, 16), -1)])
def test_variance_reduction_evens_out_and_keeps_the_norm(shape, axis):
    g = torch.Generator().manual_seed(1)
    u = torch.randn(shape, generator=g) * torch.logspace(-2, 0, max(shape[1:])).view((-1, 1) if axis == -1 else (1, -1))
    second = torch.zeros_like(u.mean(axis, keepdim=True))
    for _ in range(200):
        v = train.reduce_variance(u, second, 0.95)
    assert torch.allclose(v.norm(dim=(1, 2)), u.norm(dim=(1, 2)), rtol=1e-4)
    assert torch.allclose(second, u.square().mean(axis, keepdim=True), rtol=1e-3)
    spread = lambda x: (x.square().mean(axis).amax(1) / x.square().mean(axis).amin(1)).max()
    assert spread(v) < 1.01 and spread(u) > 100


def muon(p, grads, lr=0.1, mu=0.9, beta2=0.95, decay=0.0):
    p = p.clone().requires_grad_()
    optimizer = train.MuonAdamW([dict(kind="muon", params=[p], lr=lr, momentum=mu, beta2=beta2, weight_decay=decay)])
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach(), optimizer


def test_muon_moves_against_the_gradient_by_its_rate():
    g = torch.Generator().manual_seed(2)
    p, grad = torch.zeros(24, 24), torch.randn(24, 24, generator=g)
    moved, _ = muon(p, [grad], lr=0.1)
    assert (moved * grad).sum() < 0  # downhill
    assert moved.norm().item() == pytest.approx(0.1 * 24**0.5, rel=0.1)  # 24 singular values near 1, times the rate


def test_muon_momentum_is_nesterovs():
    """With an update that is linear in the gradient, momentum and look-ahead can be checked in closed form."""
    grads = [torch.full((1, 4, 4), float(n)) for n in (1, 2, 3)]
    seen, keep = [], train.orthogonalize
    train.orthogonalize = lambda g, dtype: (seen.append(g.clone()), keep(g, dtype))[1]
    try:
        muon(torch.zeros(4, 4), [g[0] for g in grads], mu=0.9)
    finally:
        train.orthogonalize = keep
    average = 0.0
    for g, got in zip((1.0, 2.0, 3.0), seen):
        average = 0.9 * average + 0.1 * g
        assert torch.allclose(got, torch.full((1, 4, 4), 0.1 * g + 0.9 * average), atol=1e-6)


def test_muon_decays_only_where_it_agrees_with_the_update():
    g = torch.Generator().manual_seed(3)
    p, grad = torch.randn(16, 16, generator=g), torch.randn(16, 16, generator=g)
    plain, _ = muon(p, [grad], decay=0.0)
    decayed, _ = muon(p, [grad], decay=0.5)
    update = (p - plain) / 0.1
    agrees = update * p >= 0
    assert 50 < agrees.sum() < 206
    assert torch.allclose((plain - decayed)[agrees], 0.1 * 0.5 * p[agrees], atol=1e-6)
    assert torch.equal(plain[~agrees], decayed[~agrees])


def test_stacked_matrices_move_as_if_alone():
    g = torch.Generator().manual_seed(4)
    params, grads = ([torch.randn(8, 24, generator=g) for _ in range(3)] for _ in range(2))
    together = [p.clone().requires_grad_() for p in params]
    optimizer = train.MuonAdamW([dict(kind="muon", params=together, lr=0.1, momentum=0.9, beta2=0.95, weight_decay=0.1)])
    for p, grad in zip(together, grads):
        p.grad = grad
    optimizer.step()
    for p, grad, got in zip(params, grads, together):
        assert torch.allclose(muon(p, [grad], decay=0.1)[0], got, atol=1e-5)


def test_every_parameter_has_one_owner_and_moves_in_one_step():
    model = model_and_grads()
    optimizer = train.make_optimizer(model)
    owned = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still


def test_an_orphan_or_shared_parameter_is_named():
    model = model_and_grads()
    model.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="extra"):
        train.make_optimizer(model)


def test_rates_are_the_references():
    model = train.GPT(train.Knobs(**REFERENCE), 8192, 64, CPU)
    groups = {tuple(g["params"][0].shape): g for g in train.make_optimizer(model).param_groups if g["kind"] == "muon"}
    assert {s: (g["lr"], len(g["params"])) for s, g in groups.items()} == {
        (512, 512): (0.04, 32), (2048, 512): (0.08, 8), (512, 2048): (0.04, 8), (4, 32): (0.04, 4)}
    owner = {id(p): g for g in train.make_optimizer(model).param_groups for p in g["params"]}
    scale = (512 / 768) ** -0.5
    for p, lr, betas in ((model.head.weight, 0.004 * scale, (0.8, 0.95)), (model.embedding.weight, 0.6 * scale, (0.8, 0.95)),
                         (model.value_embeddings["1"].weight, 0.6 * scale, (0.8, 0.95)),
                         (model.residual_scale, 0.005, (0.8, 0.95)), (model.x0_scale, 0.5, (0.96, 0.95))):
        group = owner[id(p)]
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (lr, betas, 1e-10, 0.0)
    assert all(g["weight_decay"] == 0.2 and g["beta2"] == 0.95 for g in groups.values())


def test_shipped_tables_decay_and_matrices_too():
    model = train.GPT(replace(KNOBS, bigram_rows=64), 60, 16, CPU)
    owner = {id(p): g for g in train.make_optimizer(model).param_groups for p in g["params"]}
    decay = lambda p: owner[id(p)]["weight_decay"]
    tables = model.head.weight, model.embedding.weight, model.value_embeddings["1"].weight, model.bigram.weight, model.x0_scale
    assert [decay(p) for p in tables] == [0.01, 0.001, 0.003, 0.0, 0.0]
    optimizer = train.make_optimizer(model)
    train.set_rates(optimizer, model.knobs, 0.9, 10)
    assert {g["weight_decay"] for g in optimizer.param_groups if g["kind"] == "adamw"} == {0.0, 0.001, 0.003, 0.01}
    assert owner[id(model.bigram.weight)]["kind"] == "rows" and owner[id(model.bigram.weight)]["lr"] == 0.3


def test_rows_of_one_channel_move_as_by_adam_without_momentum():
    g = torch.Generator().manual_seed(6)
    ours = torch.randn(9, 1, generator=g).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    mine = train.MuonAdamW([dict(kind="rows", params=[ours], lr=0.03, betas=(0.8, 0.95), eps=1e-8)])
    torchs = torch.optim.Adam([theirs], lr=0.03, betas=(0.0, 0.95), eps=1e-8)
    for step in range(20):
        ours.grad = torch.randn(9, 1, generator=g) * (torch.arange(9)[:, None] % 3 != step % 3)
        theirs.grad = ours.grad.clone()
        mine.step()
        torchs.step()
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_rows_share_one_second_moment_and_untouched_ones_stay():
    table, grad = torch.ones(4, 3).requires_grad_(), torch.tensor([[3.0, -4.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1e-3, 0.0, 0.0]])
    optimizer = train.MuonAdamW([dict(kind="rows", params=[table], lr=0.1, betas=(0.8, 0.95), eps=1e-10)])
    table.grad = grad.clone()
    optimizer.step()
    moved = 1 - table.detach()
    assert torch.allclose(moved[0], 0.1 * grad[0] / (25 / 3) ** 0.5, atol=1e-5) and not moved[1].any()
    assert torch.allclose(moved.square().mean(1)[[0, 2, 3]], torch.tensor(0.01), rtol=1e-3)


def test_state_is_zeros_from_the_start():
    optimizer = train.make_optimizer(model_and_grads())
    tensors = [t for s in optimizer.state.values() for t in s.values()]
    assert len(optimizer.state) == sum(1 if g["kind"] in ("muon", "rows") else len(g["params"]) for g in optimizer.param_groups)
    assert tensors and not any(t.any() for t in tensors)


def test_compiled_steps_agree_and_never_compile_again(monkeypatch):
    compiles = []

    def counting(graph, inputs):
        compiles.append(1)
        return graph.forward

    g = torch.Generator().manual_seed(5)
    def build(compiler):
        params = [torch.randn(6, 6, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in range(3)]
        groups = [dict(kind="muon", params=params[:2], lr=0.1, momentum=0.9, beta2=0.95, weight_decay=0.1),
                  dict(kind="adamw", params=params[2:], lr=0.1, betas=(0.8, 0.95), eps=1e-10)]
        return params, train.MuonAdamW(groups, compiler=compiler)
    plain, compiled = build(lambda f: f), build(lambda f: torch.compile(f, dynamic=False, backend=counting))
    for step in range(6):
        grads = [torch.randn(6, 6, generator=g) for _ in range(3)]
        for params, optimizer in (plain, compiled):
            for p, grad in zip(params, grads):
                p.grad = grad.clone()
            train.set_rates(optimizer, KNOBS, step / 6, step)
            optimizer.step()
        if step == 0:
            first = len(compiles)
    assert first == len(compiles) == 2
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(plain[0], compiled[0]))
