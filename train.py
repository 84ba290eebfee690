"""The editable half of autoresearch: a small GPT, its optimizer and the 300-second loop. Experiments edit this file.

    uv run train.py                 # on a terminal: one live line, then the summary
    uv run train.py > run.log 2>&1  # in a file: a line every 12 seconds

Rooms, each using only those above it:

    1. KNOBS      every number an experiment may turn, one tier for each kind of device
    2. MODEL      GPT: attention paths, blocks, embeddings, head
    3. OPTIMIZER  Muon for matrices, AdamW for the rest, in one torch Optimizer
    4. SCHEDULE   learning rate, momentum and weight decay over the budget
    5. RUN        device, compilation, warm-up, the loop, what it prints
    6. CONTRACT   main(), and what the frozen half expects of it

Letters: B rows, T positions, C width, H heads, D channels of a head, V vocabulary.
"""

import contextlib
import gc
import random
import re
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import prepare
from prepare import (SEED, TIME_BUDGET, PrepareError, Tokenizer, clock, evaluate_bpb, guard, make_dataloader,
                     print_summary)

# == 1. KNOBS ==========================================================================================================

@dataclass(frozen=True)
class Knobs:
    """The defaults are the recipe for one H100; the tiers below change what another device needs."""

    # model
    depth: int = 8  # blocks
    width: int = 512  # channels C; 64 a block
    head_dim: int = 128  # D, also the channels that RoPE turns
    mlp_ratio: int = 4  # hidden channels of the MLP, in widths
    window_pattern: str = "SSSSL"  # repeated over the blocks: S short window, L the whole row; the last is always L
    short_window: float = 1 / 8  # of T: earlier tokens a position sees besides itself
    rope_base: float = 200_000.0
    qk_scale: float = 1.15  # root mean square of q and k after their norm: attention's logits grow with its square
    softcap: float = 15.0  # logits are squeezed into +-softcap; 0 leaves them alone
    bigram_rows: int = 0  # rows of a hashed table of token pairs that is added to the embedding; 0 for none
    value_gate_channels: int = 32  # channels of the normed input that gate the value embeddings
    # initial values
    embedding_std: float = 1.0
    head_std: float = 0.001  # near-uniform first predictions
    matrix_scale: float = 0.68  # matrices, value embeddings: uniform +- scale * sqrt(3 / C), so std = scale / sqrt(C)
    residual_init: float = 1.0  # x <- residual * x + x0 * (normed embedding), a pair for each block
    x0_init: float = 0.05
    # batch
    batch_tokens: int = 2**17  # tokens an optimizer step
    micro_tokens: int = 2**17  # tokens at a time: 64 rows of 2,048; halved when memory runs out
    eval_tokens: int = 2**18  # tokens at a time in evaluation
    bytes_per_token: int = 190_000  # GPU memory a token at a time needs: the reference's 45 GB for 2**18, and a tenth
    # optimizer; AdamW's rates but the scalars' are for width 768 and grow with (C / 768) ** -0.5
    matrix_lr: float = 0.04  # Muon, times sqrt(max(1, rows / columns))
    embedding_lr: float = 0.9
    value_embedding_lr: float = 0.9
    bigram_lr: float = 0.3  # as it is for every width; one second moment a row, no momentum
    head_lr: float = 0.005
    residual_lr: float = 0.005
    x0_lr: float = 0.5
    adam_betas: tuple = (0.8, 0.95)
    x0_betas: tuple = (0.96, 0.95)
    adam_eps: float = 1e-10
    muon_momentum: tuple = (0.85, 0.95)  # from, to
    muon_momentum_steps: int = 200  # steps the momentum takes to get there
    muon_beta2: float = 0.95  # of NorMuon's second moment
    weight_decay: float = 0.2  # of Muon's matrices, cautious; falls to 0 over the budget
    embedding_decay: float = 0.001  # AdamW's, times the rate, as in the next two
    value_embedding_decay: float = 0.003
    head_decay: float = 0.01
    # schedule
    warmup: float = 0.0  # share of the budget over which rates rise
    warmdown: float = 0.8  # share of the budget over which rates fall
    final_lr: float = 0.03  # share of the rate at the end

    def __post_init__(self):
        checks = {
            "width is not a multiple of head_dim": self.width % self.head_dim == 0,
            "head_dim is odd": self.head_dim % 2 == 0,
            "window_pattern has letters besides S and L": set(self.window_pattern) in ({"S"}, {"L"}, {"S", "L"}),
            "short_window is not in (0, 1]": 0 < self.short_window <= 1,
            "softcap or bigram_rows is below 0": self.softcap >= 0 and self.bigram_rows >= 0,
            "value_gate_channels exceeds width": 0 < self.value_gate_channels <= self.width,
            "depth, mlp_ratio or a token count is below 1": min(
                self.depth, self.mlp_ratio, self.batch_tokens, self.micro_tokens, self.eval_tokens) >= 1,
            "batch_tokens is not a multiple of micro_tokens": self.batch_tokens % self.micro_tokens == 0,
            "warmup + warmdown exceeds 1": 0 <= self.warmup and 0 <= self.warmdown and self.warmup + self.warmdown <= 1,
        }
        wrong = [reason for reason, holds in checks.items() if not holds]
        if wrong:
            raise PrepareError(f"the knobs in train.py are wrong: {'; '.join(wrong)}; correct them and run again")


TIERS = {  # what differs from the table above; a GPU's memory in GB picks its row
    "cuda-80": dict(),
    "cuda-48": dict(batch_tokens=2**16, micro_tokens=2**16, eval_tokens=2**17),
    "cuda-24": dict(depth=5, batch_tokens=2**16, micro_tokens=2**16, eval_tokens=2**16),
    "cuda-12": dict(depth=4, width=384, batch_tokens=2**15, micro_tokens=2**15, eval_tokens=2**15),
    "cuda-8": dict(depth=4, width=256, batch_tokens=2**15, micro_tokens=2**14, eval_tokens=2**14),
    "mps": dict(depth=4, width=256, head_dim=64, batch_tokens=2**15, micro_tokens=2**14, eval_tokens=2**15),
    "cpu": dict(depth=4, width=128, head_dim=64, window_pattern="L", batch_tokens=2**12, micro_tokens=2**12,
                eval_tokens=2**14, muon_momentum_steps=100, softcap=0.0, bigram_rows=2**15),
}

# == 2. MODEL ==========================================================================================================

def norm(x):
    """RMSNorm without weights over the last axis."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, cos, sin):  # x: (B, T, H, D); cos, sin: (T, 1, D / 2)
    """Rotary position embedding (RoFormer, arXiv:2104.09864) that pairs channel i with i + D / 2."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


def window_mask(T, window, device):  # -> (T, T) bool
    """True where a query (row) sees a key (column): itself and `window` earlier positions."""
    behind = torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)
    return (behind >= 0) & (behind <= window)


def flash_attention(device, T, windows):
    """FlashAttention-3 (arXiv:2407.08608) from the Hugging Face kernels hub. Raises where it cannot be had."""
    from kernels import get_kernel
    flash = get_kernel("kernels-community/flash-attn3", version=1).flash_attn_func

    def attend(q, k, v, window):
        out = flash(q, k, v, causal=True, window_size=(window, 0))
        return out[0] if isinstance(out, tuple) else out  # older builds return the log-sum-exp too

    return attend


def flex_attention(device, T, windows):
    """PyTorch's FlexAttention; fused where the model is compiled, and it has no backward on a CPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention as flex
    see = lambda window: lambda b, h, i, j: (i >= j) & (i - j <= window)
    masks = {window: create_block_mask(see(window), None, None, T, T, device=device) for window in set(windows)}

    def attend(q, k, v, window):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        return flex(q, k, v, block_mask=masks[window]).transpose(1, 2)

    return attend


def sdpa_attention(device, T, windows):
    """PyTorch's scaled-dot-product attention, with a mask for each window shorter than the row."""
    masks = {window: window_mask(T, window, device) for window in set(windows) if window < T - 1}

    def attend(q, k, v, window):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        mask = masks.get(window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)

    return attend


ATTENTION = {"fa3": flash_attention, "flex": flex_attention, "sdpa": sdpa_attention}


class Attention(nn.Module):
    """Causal attention with a window; QK norm after RoPE; token-value embeddings gated into v."""

    def __init__(self, knobs, attend, window, has_values):
        super().__init__()
        C, self.head_dim, self.sharpness = knobs.width, knobs.head_dim, knobs.qk_scale**2
        self.attend, self.window = attend, window
        self.query, self.key, self.value, self.out = (nn.Linear(C, C, bias=False) for _ in range(4))
        self.gate = nn.Linear(knobs.value_gate_channels, C // knobs.head_dim, bias=False) if has_values else None

    def forward(self, x, values, cos, sin):  # x: (B, T, C); values: (B, T, C) or None -> (B, T, C)
        B, T, C = x.shape
        q, k, v = (project(x).view(B, T, -1, self.head_dim) for project in (self.query, self.key, self.value))
        if self.gate is not None:
            gate = 2 * torch.sigmoid(self.gate(x[..., : self.gate.in_features]))  # (B, T, H)
            v = v + gate[..., None] * values.view_as(v)
        dtype, q, k = q.dtype, self.sharpness * norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        out = self.attend(q.to(dtype), k.to(dtype), v.to(dtype), self.window)  # (B, T, H, D); kernels take one dtype
        return self.out(out.reshape(B, T, C))


class Block(nn.Module):
    """Pre-norm attention and a squared-ReLU MLP (Primer, arXiv:2109.08668), each added to the residual stream."""

    def __init__(self, knobs, attend, window, has_values):
        super().__init__()
        self.attention = Attention(knobs, attend, window, has_values)
        self.up = nn.Linear(knobs.width, knobs.mlp_ratio * knobs.width, bias=False)
        self.down = nn.Linear(knobs.mlp_ratio * knobs.width, knobs.width, bias=False)

    def forward(self, x, values, cos, sin):  # x: (B, T, C) -> (B, T, C)
        x = x + self.attention(norm(x), values, cos, sin)
        return x + self.down(F.relu(self.up(norm(x))).square())


def hash_pairs(ids, vocab_size, rows):  # ids: (B, T) -> (B, T), in [0, rows)
    """A row for each token and the one before it (0 before the first), by Knuth's multiplicative hashing."""
    pairs = F.pad(ids[:, :-1], (1, 0)) * vocab_size + ids
    return ((pairs * 2_654_435_761 & 0xFFFF_FFFF) * rows) >> 32


class GPT(nn.Module):
    """ids (B, T) -> logits (B, T, V) in fp32, or with targets (B, T) the mean cross-entropy in nats."""

    def __init__(self, knobs, vocab_size, T, device, attention="sdpa", dtype=torch.float32):
        super().__init__()
        L, C = knobs.depth, knobs.width
        pattern = (knobs.window_pattern * L)[: L - 1] + "L"
        self.windows = [T if letter == "L" else int(T * knobs.short_window) for letter in pattern]
        self.knobs, self.T, self.dtype = knobs, T, dtype
        attend = ATTENTION[attention](device, T, self.windows)
        has_values = [i % 2 == (L - 1) % 2 for i in range(L)]  # every other block, the last included
        self.embedding = nn.Embedding(vocab_size, C)
        self.value_embeddings = nn.ModuleDict({str(i): nn.Embedding(vocab_size, C) for i in range(L) if has_values[i]})
        self.bigram = nn.Embedding(knobs.bigram_rows, C) if knobs.bigram_rows else None
        self.blocks = nn.ModuleList(Block(knobs, attend, self.windows[i], has_values[i]) for i in range(L))
        self.head = nn.Linear(C, vocab_size, bias=False)
        self.residual_scale = nn.Parameter(torch.full((L,), knobs.residual_init))
        self.x0_scale = nn.Parameter(torch.full((L,), knobs.x0_init))
        self.draw_weights()
        if dtype == torch.bfloat16:  # lookups move half the bytes; the matrices stay fp32 and are cast by autocast
            for table in self.tables():
                table.to(dtype)
        angles = torch.outer(torch.arange(T), knobs.rope_base ** -(torch.arange(0, knobs.head_dim, 2) / knobs.head_dim))
        self.register_buffer("cos", angles.cos()[:, None].to(dtype), persistent=False)  # (T, 1, D / 2)
        self.register_buffer("sin", angles.sin()[:, None].to(dtype), persistent=False)
        self.to(device)

    def tables(self):
        return [m for m in self.modules() if isinstance(m, nn.Embedding)]

    @torch.no_grad()
    def draw_weights(self):
        """Draws on the CPU, so that one seed gives the same weights on every device."""
        bound = self.knobs.matrix_scale * (3 / self.knobs.width) ** 0.5
        self.embedding.weight.normal_(std=self.knobs.embedding_std)
        self.head.weight.normal_(std=self.knobs.head_std)
        for table in self.value_embeddings.values():
            table.weight.uniform_(-bound, bound)
        self.bigram and self.bigram.weight.zero_()
        for block in self.blocks:
            attention = block.attention
            for matrix in (attention.query, attention.key, attention.value, block.up):
                matrix.weight.uniform_(-bound, bound)
            for matrix in (attention.out, block.down, attention.gate):
                if matrix is not None:  # a block starts as the identity, a gate at 1
                    matrix.weight.zero_()

    def forward(self, ids, targets=None):  # ids, targets: (B, T)
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            x = self.embedding(ids)  # (B, T, C)
            if self.bigram is not None:
                x = x + self.bigram(hash_pairs(ids, self.embedding.num_embeddings, self.bigram.num_embeddings))
            x = x0 = norm(x)
            for i, block in enumerate(self.blocks):
                values = self.value_embeddings[str(i)](ids) if str(i) in self.value_embeddings else None
                x = block(self.residual_scale[i] * x + self.x0_scale[i] * x0, values, self.cos, self.sin)
            logits = self.head(norm(x)).float()  # (B, T, V)
        if self.knobs.softcap:
            logits = self.knobs.softcap * torch.tanh(logits / self.knobs.softcap)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def flops_per_token(self):
        """6 for each weight of the matrices and the head, 12 * C for each key a query may see, causality not halved."""
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * weights + sum(12 * self.knobs.width * min(window, self.T) for window in self.windows)

# == 3. OPTIMIZER ======================================================================================================

# Quintic polynomials (a, b, c) of Polar Express (arXiv:2505.16932) for 5 steps: x <- a x + (b A + c A A) x, A = x x^T
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(g, dtype):  # g: (N, rows, columns) -> the same shape, in dtype
    """Moves every singular value of each matrix close to 1."""
    x = g.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)  # 1.02: bf16 must not leave the polynomials' range
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for a, b, c in POLAR_EXPRESS:
        A = x @ x.mT
        x = a * x + (b * A + c * (A @ A)) @ x
    return x.mT if tall else x


def reduce_variance(u, second, beta2):  # u: (N, rows, columns)
    """NorMuon (arXiv:2510.05491): evens out the rows of a tall update (the columns of a wide one) by their running
    mean square, and gives each matrix its norm back. Updates `second` in place."""
    axis = -1 if u.size(-2) >= u.size(-1) else -2
    second.copy_(beta2 * second + (1 - beta2) * u.square().mean(dim=axis, keepdim=True))
    even = u * second.clamp_min(1e-10).rsqrt()
    length = lambda x: x.norm(dim=(-2, -1), keepdim=True)
    return even * (length(u) / length(even).clamp_min(1e-10))


def muon_update(params, grads, momentum, second, lr, mu, beta2, decay, dtype):
    """One Muon step (Jordan et al. 2024) for N matrices of one shape: Nesterov momentum, orthogonalized, evened out;
    weight decay only where it points the way of the update (arXiv:2510.12402)."""
    g = torch.stack(grads).float()  # (N, rows, columns)
    momentum.copy_(mu * momentum + (1 - mu) * g)
    u = reduce_variance(orthogonalize(mu * momentum + (1 - mu) * g, dtype).float(), second, beta2)
    p = torch.stack(params)
    p = p - lr * (u + decay * p * (u * p >= 0))
    for param, new in zip(params, p.unbind()):
        param.copy_(new)


def adamw_update(params, grads, averages, squares, lr, beta1, beta2, eps, decay, step):
    """One AdamW step (arXiv:1711.05101) for a list of tensors of any shapes."""
    for p, g, m, v in zip(params, grads, averages, squares):
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        denominator = (v / (1 - beta2**step)).sqrt() + eps
        p.copy_(p * (1 - lr * decay) - lr / (1 - beta1**step) * (m / denominator))


def rows_update(table, grad, square, lr, beta2, eps, step):
    """One Adam step without momentum, with one second moment a row (after Adafactor, arXiv:1804.04235): for a table of
    which a batch touches few rows, it moves a third of the memory."""
    g = grad.float()
    square.copy_(beta2 * square + (1 - beta2) * g.square().mean(dim=-1, keepdim=True))
    table.copy_(table - lr * g / ((square / (1 - beta2**step)).sqrt() + eps))


class MuonAdamW(torch.optim.Optimizer):
    """Groups of kind "muon" (matrices of one shape, updated as one stack), "rows" (one table) and "adamw" (anything).
    State is allocated here, as zeros. Rates are 0-D tensors: a compiled step is not compiled again when they change."""

    def __init__(self, groups, dtype=torch.float32, compiler=lambda f: f):
        super().__init__(groups, defaults={"step": 0, "weight_decay": 0.0})
        self.dtype, self.rates = dtype, {}
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]
            params = group["params"]
            if group["kind"] == "muon":
                stack = torch.zeros(len(params), *params[0].shape, device=params[0].device)
                axis = -1 if stack.size(-2) >= stack.size(-1) else -2
                self.state[params[0]] = {"momentum": stack, "second": torch.zeros_like(stack.mean(axis, keepdim=True))}
            elif group["kind"] == "rows":
                self.state[params[0]] = {"square": torch.zeros(len(params[0]), 1, device=params[0].device)}
            else:
                for p in params:
                    self.state[p] = {"average": torch.zeros_like(p), "square": torch.zeros_like(p)}
        self.muon_update, self.adamw_update, self.rows_update = map(compiler, (muon_update, adamw_update, rows_update))

    def rate(self, index, name, value):
        return self.rates.setdefault((index, name), torch.zeros(())).fill_(value)

    @torch.no_grad()
    def step(self):
        for index, group in enumerate(self.param_groups):
            group["step"] += 1
            params, rate = group["params"], lambda name, value: self.rate(index, name, value)
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            lr, decay = rate("lr", group["lr"]), rate("decay", group["weight_decay"])
            if group["kind"] == "muon":
                state = self.state[params[0]]
                self.muon_update(params, grads, state["momentum"], state["second"], lr, rate("mu", group["momentum"]),
                                 group["beta2"], decay, self.dtype)
            elif group["kind"] == "rows":
                self.rows_update(params[0], grads[0], self.state[params[0]]["square"], lr, group["betas"][1],
                                 group["eps"], rate("step", group["step"]))
            else:
                state = [self.state[p] for p in params]
                self.adamw_update(params, grads, [s["average"] for s in state], [s["square"] for s in state], lr,
                                  *group["betas"], group["eps"], decay, rate("step", group["step"]))


def make_optimizer(model, compiler=lambda f: f):
    """Gives every parameter of the model to exactly one group, or says which has none or several."""
    k = model.knobs
    scale = (k.width / 768) ** -0.5
    adamw = lambda lr, params, decay=0.0, betas=k.adam_betas, kind="adamw": dict(
        kind=kind, lr=lr, params=list(params), betas=betas, eps=k.adam_eps, weight_decay=decay)
    groups = [
        adamw(k.head_lr * scale, model.head.parameters(), k.head_decay),
        adamw(k.embedding_lr * scale, model.embedding.parameters(), k.embedding_decay),
        adamw(k.value_embedding_lr * scale, model.value_embeddings.parameters(), k.value_embedding_decay),
        adamw(k.residual_lr, [model.residual_scale]),
        adamw(k.x0_lr, [model.x0_scale], betas=k.x0_betas),
        *([adamw(k.bigram_lr, model.bigram.parameters(), kind="rows")] if model.bigram else []),
    ]
    shapes = {}
    for matrix in model.blocks.parameters():
        shapes.setdefault(tuple(matrix.shape), []).append(matrix)
    for (rows, columns), matrices in shapes.items():
        groups.append(dict(kind="muon", lr=k.matrix_lr * max(1, rows / columns) ** 0.5, params=matrices,
                           momentum=k.muon_momentum[0], beta2=k.muon_beta2, weight_decay=k.weight_decay))
    owned = [id(p) for group in groups for p in group["params"]]
    wrong = {name: owned.count(id(p)) for name, p in model.named_parameters() if owned.count(id(p)) != 1}
    assert not wrong, f"parameters with another number of owners than one: {wrong}"
    return MuonAdamW(groups, dtype=model.dtype, compiler=compiler)

# == 4. SCHEDULE =======================================================================================================

def lr_scale(k, progress):
    """Factor on every learning rate after `progress` (0 to 1) of the budget: linear up, flat, linear down."""
    if progress < k.warmup:
        return progress / k.warmup
    return 1.0 if progress <= 1 - k.warmdown else k.final_lr + (1 - k.final_lr) * max(0.0, 1 - progress) / k.warmdown


def set_rates(optimizer, k, progress, step):
    """step: optimizer steps already taken."""
    share = min(1.0, step / max(1, k.muon_momentum_steps))
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lr_scale(k, progress)
        if group["kind"] == "muon":
            group["momentum"] = k.muon_momentum[0] + share * (k.muon_momentum[1] - k.muon_momentum[0])
            group["weight_decay"] = k.weight_decay * max(0.0, 1 - progress)

# == 5. RUN ============================================================================================================

PEAK_TFLOPS = (  # dense bf16, by device name; first match counts
    ("MIG", None), ("H100 PCIe", 756), ("H100 NVL", 835), ("H100|H200|GH200", 989.5), ("B200", 2250), ("A100", 312),
    ("L40S", 362), ("A10\\b", 125), ("L4\\b", 121), ("RTX 3090", 71), ("RTX 4090", 165), ("RTX 5090", 210),
    ("RTX 6000 Ada", 364), ("RTX PRO 6000", 504), ("MI300X", 1307),
)


def peak_flops(name):
    """Dense bf16 FLOP/s of a device, None where unknown."""
    for pattern, tflops in PEAK_TFLOPS:
        if re.search(pattern, name):
            return tflops and tflops * 1e12
    return None


def pick_device():
    """(device, dtype): CUDA, else MPS, else CPU; bf16 where the device computes in it."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float32
    if torch.backends.mps.is_available():
        return torch.device("mps"), torch.float32
    native = any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("avx512_bf16", "amx_tile"))
    return torch.device("cpu"), torch.bfloat16 if native else torch.float32  # emulated bf16 is many times slower


def pick_tier(device):
    """(a name in TIERS, why)."""
    if device.type != "cuda":
        return device.type, "no GPU" if device.type == "cpu" else "Apple's GPU"
    gigabytes = torch.cuda.get_device_properties(device).total_memory / 2**30
    size = max((size for size in (12, 24, 48, 80) if gigabytes > 0.9 * size), default=8)  # 24 GB show as 22 to 24
    return f"cuda-{size}", f"{gigabytes:.1f} GB of GPU memory"


def pick_compiler(device):
    """torch.compile, or the identity where it does not work (no C++ compiler, no Triton, MPS)."""
    compiler = lambda f: torch.compile(f, dynamic=False)
    if device.type == "mps":
        return lambda f: f
    torch._dynamo.config.recompile_limit = 64  # one compilation for each shape of a stack of matrices, 8 by default
    try:
        compiler(lambda x: x * 2 + 1)(torch.ones(8, device=device))
        return compiler
    except Exception as error:
        print(f"torch.compile does not work here, so everything is slower: {str(error).strip().splitlines()[0]}")
        torch._dynamo.reset()
        return lambda f: f


def pick_attention(device, dtype, head_dim, compiler):
    """The first attention path whose forward and backward work here."""
    if device.type == "cuda":
        for name in ("fa3", "flex") if dtype == torch.bfloat16 else ():
            try:
                q = torch.randn(1, 256, 2, head_dim, device=device, dtype=dtype, requires_grad=True)
                attend = ATTENTION[name](device, 256, [64])
                compiler(lambda x: attend(x, x, x, 64))(q).sum().backward()
                torch.cuda.synchronize()
                return name
            except Exception as error:  # no network, no build for this GPU, no Triton: each raises its own
                print(f"attention: {name} does not work here ({type(error).__name__})", flush=True)
    return "sdpa"


@contextlib.contextmanager
def without_trace(model, optimizer, device):
    """Puts weights, optimizer state, step counters, gradients and random generators back, in the same storages."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    saved = [t.detach().clone() for t in tensors]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_device = getattr(torch, device.type).get_rng_state() if device.type != "cpu" else None
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, old in zip(tensors, saved):
                tensor.copy_(old)
        for group, old in zip(optimizer.param_groups, groups):
            group.update(old)
        optimizer.zero_grad(set_to_none=True)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if on_device is not None:
            getattr(torch, device.type).set_rng_state(on_device)


def fitting_rows(knobs, T, device):
    """Rows of a micro-batch and of an evaluation batch, halved until the GPU's memory should hold them: finding out
    costs a compilation each time."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")
    rows, eval_rows = max(1, knobs.micro_tokens // T), max(1, knobs.eval_tokens // T)
    while rows > 1 and rows * T * knobs.bytes_per_token > memory:
        rows, eval_rows = rows // 2, max(1, eval_rows // 2)
    return rows, eval_rows


def warm_up(model, forward, optimizer, rows, eval_rows, vocab_size, device):
    """Compiles and autotunes training, optimizer and evaluation on synthetic ids, and leaves no trace.
    Returns the rows of a micro-batch and of an evaluation batch that fit the memory."""
    while True:
        try:
            with without_trace(model, optimizer, device):
                draw = lambda n: torch.randint(vocab_size, (n, model.T), device=device)
                for _ in range(2):  # the second step runs without compiling, and with every state in use
                    forward(draw(rows), draw(rows)).backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                model.eval()
                with torch.no_grad():
                    forward(draw(eval_rows))
                model.train()
            return rows, eval_rows
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        torch.cuda.empty_cache()
        rows, eval_rows = max(1, rows // 2), max(1, eval_rows // 2)
        print(f"out of memory: {rows} rows at a time instead of {2 * rows}, with more accumulation", flush=True)


class Progress:
    """A live line on a terminal; a line every 12 seconds, at most 25 in all, in a file."""

    def __init__(self, budget):
        self.live, self.budget, self.loss, self.weight = sys.stdout.isatty(), budget, 0.0, 0.0
        self.every, self.next = (0.2, 0.0) if self.live else (max(12, budget / 25), max(12, budget / 25))

    def show(self, step, elapsed, loss, tokens, epoch, scale):
        self.loss, self.weight = 0.9 * self.loss + 0.1 * loss, 0.9 * self.weight + 0.1
        done = elapsed >= self.budget
        if elapsed < self.next and not done:
            return
        self.next = elapsed + self.every
        line = (f"step {step:5d} | {elapsed:5.1f} of {self.budget} s | loss {self.loss / self.weight:.4f} | "
                f"lr x {scale:.2f} | {tokens / elapsed:,.0f} tokens/s | epoch {epoch}")
        print(f"\r{line}  " if self.live else line, end="\n" if done or not self.live else "", flush=True)


def read_later(loss, step):
    """A function that returns a loss, or raises FloatingPointError. It waits only for the work queued before this call:
    called a step later, it lets the GPU go on."""
    copied = torch.cuda.Event() if loss.device.type == "cuda" else None
    copy = loss.to("cpu", non_blocking=copied is not None)  # pinned where it is asynchronous
    copied and copied.record()

    def read():
        copied and copied.synchronize()
        if not (value := copy.item()) <= 100:
            raise FloatingPointError(f"the loss was {value} at step {step}")
        return value

    return read


def train(model, forward, optimizer, loader, accumulation, micro_tokens):
    """Runs steps until the budget is spent; returns (steps, tokens). FloatingPointError: the loss went wild."""
    k, progress, step, tokens, elapsed, last = model.knobs, Progress(TIME_BUDGET), 0, 0, 0.0, None
    ids, targets, epoch = next(loader)  # this starts the clock
    while elapsed < TIME_BUDGET:
        loss = 0.0
        for _ in range(accumulation):
            part = forward(ids, targets) / accumulation
            part.backward()
            loss = loss + part.detach()
            ids, targets, epoch = next(loader)  # the host fills the next batch while the device works
        this = read_later(loss, step)
        share = min(1.0, clock.elapsed() / TIME_BUDGET)
        set_rates(optimizer, k, share, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = (last or this)()  # a step late: meanwhile the device works
        step, tokens, last, elapsed = step + 1, tokens + accumulation * micro_tokens, this, clock.tick()
        progress.show(step, elapsed, value, tokens, epoch, lr_scale(k, share))
    last()
    return step, tokens

# == 6. CONTRACT =======================================================================================================
# What the frozen half expects: guard() around main(); torch.manual_seed(SEED) before the first batch; nothing learned
# from text before it; a clock.tick() at the end of each step; model(ids) -> logits (B, T, V) that look back only;
# one evaluate_bpb, then one print_summary. Everything else in this file is yours to change.


def main():
    device, dtype = pick_device()
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    tokenizer, T, (tier, why) = Tokenizer.from_directory(), prepare.MAX_SEQ_LEN, pick_tier(device)
    knobs, vocab_size = Knobs(**TIERS[tier]), tokenizer.get_vocab_size()
    compiler = pick_compiler(device)
    attention = pick_attention(device, dtype, knobs.head_dim, compiler)
    model = GPT(knobs, vocab_size, T, device, attention, dtype)
    optimizer = make_optimizer(model, compiler)
    num_params = sum(p.numel() for p in model.parameters())
    print(f"{tier} tier ({why}): depth {knobs.depth}, width {knobs.width}, {num_params / 1e6:.1f}M parameters, "
          f"{knobs.batch_tokens:,} tokens a step, {attention}, {str(dtype)[6:]}, seed {SEED}; warming up", flush=True)

    forward = compiler(model)
    rows, eval_rows = fitting_rows(knobs, T, device)
    rows, eval_rows = warm_up(model, forward, optimizer, rows, eval_rows, vocab_size, device)
    accumulation = max(1, knobs.batch_tokens // (rows * T))
    loader = make_dataloader(tokenizer, rows, T, "train", device=device)
    gc.collect(), gc.freeze()  # what lives by now is not searched for garbage again
    steps, tokens = train(model, forward, optimizer, loader, accumulation, rows * T)
    evaluate_bpb(forward, tokenizer, eval_rows)

    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    mfu = peak and model.flops_per_token() * tokens / clock.elapsed() / peak
    print_summary(num_steps=steps, total_tokens=tokens, num_params=num_params, depth=knobs.depth, mfu=mfu,
                  attention=attention, tier=tier)


if __name__ == "__main__":
    guard(main)
