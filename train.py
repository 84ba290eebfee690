"""The editable half of autoresearch: a small GPT, its optimizer and the 300-second loop. Experiments edit this file.

    uv run train.py                 # on a terminal: one live line, then the summary
    uv run train.py > run.log 2>&1  # in a file: a line every 12 seconds

Rooms:

    1. KNOBS      every number an experiment may turn, and what differs on each kind of device
    2. MODEL      GPT: embeddings, blocks, head
    3. OPTIMIZER  Muon for matrices, AdamW for the rest
    4. SCHEDULE   learning rate, momentum and weight decay over the budget
    5. RUN        main() and the loop, and what the frozen half expects of them
    6. MACHINE    device, compilation, attention, warm-up, the progress line

Letters: B rows, T positions, C width, H heads, D channels of a head, L blocks, V vocabulary.
"""

import gc
import os
import random
import re
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import prepare
from prepare import SEED, TIME_BUDGET, PrepareError, Tokenizer, clock, evaluate_bpb, guard, make_dataloader

# == 1. KNOBS ==========================================================================================================


@dataclass(frozen=True)
class Knobs:
    """The recipe for one H100. A knob marked * is another one in TIERS below: on such a device change it there."""

    # model
    depth: int = 8  # * L
    width: int = 512  # * C; 64 a block
    head_dim: int = 128  # * D, also the channels that RoPE turns
    mlp_ratio: int = 4  # hidden channels of the MLP, in widths
    window_pattern: str = "SSSSL"  # * repeated over the blocks: S short window, L the whole row; the last is always L
    short_window: float = 1 / 8  # of T: earlier tokens a position sees besides itself
    rope_base: float = 200_000.0
    qk_scale: float = 1.15  # * root mean square of q and k after their norm: attention's logits grow with its square
    softcap: float = 15.0  # * logits are squeezed into +-softcap; 0 leaves them alone
    ngram_rows: tuple = ()  # * rows of hashed tables that are added to the embedding: of pairs, of triples, and so on
    value_gate_channels: int = 32  # channels of the normed input that gate the value embeddings
    taps: int = 0  # * earlier tokens that a short convolution mixes into the input of attention and MLP; 0 for none
    # initial values
    embedding_std: float = 1.0
    head_std: float = 0.001  # near-uniform first predictions
    matrix_scale: float = 0.68  # matrices, value embeddings: uniform +- scale * sqrt(3 / C), so std = scale / sqrt(C)
    # before each block x <- residual * x + x0 * (normed embedding): initial value and AdamW's rate of the two scales
    residual_init: float = 1.0
    residual_lr: float = 0.005
    x0_init: float = 0.05
    x0_lr: float = 0.5
    x0_betas: tuple = (0.96, 0.95)
    # batch
    batch_tokens: int = 2**17  # * tokens an optimizer step
    micro_tokens: int = 2**17  # * tokens at a time: 64 rows of 2,048; halved when memory runs out
    eval_tokens: int = 2**18  # * tokens at a time in evaluation
    fp16_loss_scale: float = 2.0**15  # about a micro-batch's tokens: a token's share of the mean is too small for fp16
    # AdamW; rates of embeddings and head are for width 768 and grow with (C / 768) ** -0.5
    embedding_lr: float = 0.9
    value_embedding_lr: float = 0.9
    head_lr: float = 0.005
    taps_lr: float = 0.02
    adam_betas: tuple = (0.8, 0.95)  # *
    adam_eps: float = 1e-10
    embedding_decay: float = 0.001  # times the rate, as in the next two
    value_embedding_decay: float = 0.003
    head_decay: float = 0.01
    ngram_lr: float = 0.3  # as it is for every width; one second moment a row, no momentum
    # Muon
    matrix_lr: float = 0.04  # times sqrt(max(1, rows / columns))
    muon_momentum: tuple = (0.85, 0.95)  # from, to
    muon_momentum_steps: int = 200  # * steps the momentum takes to get there
    muon_beta2: float = 0.95  # of NorMuon's second moment
    weight_decay: float = 0.2  # cautious; falls to 0 over the budget
    # schedule
    warmup: float = 0.0  # share of the budget over which rates rise
    warmdown: float = 0.8  # share of the budget over which rates fall
    final_lr: float = 0.03  # share of the rate at the end

    def __post_init__(self):
        """Raises PrepareError, which names every check that the values fail."""
        counts = (self.depth, self.mlp_ratio, self.batch_tokens, self.micro_tokens, self.eval_tokens, *self.ngram_rows)
        ramps = (self.warmup, self.warmdown)
        checks = {
            "width is not a multiple of head_dim": self.width % self.head_dim == 0,
            "head_dim is odd": self.head_dim % 2 == 0,
            "window_pattern has letters besides S and L": set(self.window_pattern) in ({"S"}, {"L"}, {"S", "L"}),
            "short_window is not in (0, 1]": 0 < self.short_window <= 1,
            "softcap or taps is below 0": min(self.softcap, self.taps) >= 0,
            "value_gate_channels is not between 1 and width": 0 < self.value_gate_channels <= self.width,
            "depth, mlp_ratio, a count of tokens or one of ngram_rows is below 1": min(counts) >= 1,
            "batch_tokens is not a multiple of micro_tokens": self.batch_tokens % max(1, self.micro_tokens) == 0,
            "warmup or warmdown is below 0, or their sum above 1": min(ramps) >= 0 and sum(ramps) <= 1,
        }
        wrong = [reason for reason, holds in checks.items() if not holds]
        if wrong:
            raise PrepareError(f"the knobs in train.py are wrong: {'; '.join(wrong)}; correct them and run again")


TIERS = {  # a GPU's memory in GB picks its row
    "cuda-80": dict(),
    "cuda-48": dict(batch_tokens=2**16, micro_tokens=2**16, eval_tokens=2**17),
    "cuda-24": dict(depth=5, batch_tokens=2**16, micro_tokens=2**16, eval_tokens=2**16),
    "cuda-12": dict(depth=4, width=384, batch_tokens=2**15, micro_tokens=2**15, eval_tokens=2**15),
    "cuda-8": dict(depth=4, width=256, batch_tokens=2**15, micro_tokens=2**14, eval_tokens=2**14),
    "mps": dict(depth=4, width=256, head_dim=64, batch_tokens=2**15, micro_tokens=2**14, eval_tokens=2**15),
    "cpu": dict(
        depth=4,
        width=128,
        head_dim=64,
        window_pattern="L",
        qk_scale=1.0,
        batch_tokens=2**12,
        micro_tokens=2**12,
        eval_tokens=2**14,
        muon_momentum_steps=100,
        softcap=0.0,
        ngram_rows=(2**17, 2**18),
        taps=3,
        adam_betas=(0.6, 0.99),
    ),
}

# == 2. MODEL ==========================================================================================================


def norm(x):
    """RMSNorm (arXiv:1910.07467) without weights over the last axis."""
    return F.rms_norm(x, (x.size(-1),)).to(x.dtype)  # autocast returns fp32 on CUDA, bf16 on a CPU


def rotate(x, cos, sin):  # x: (B, T, H, D); cos, sin: (T, 1, D / 2)
    """Rotary position embedding (RoFormer, arXiv:2104.09864) that pairs channel i with i + D / 2."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


class ShortConvolution(nn.Module):
    """Adds to each channel what it was at the last few tokens, weighted, as Primer (arXiv:2109.08668)
    does it behind q, k and v. It starts as the identity."""

    def __init__(self, taps, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(taps, width))

    def forward(self, x):  # x: (B, T, C) -> (B, T, C)
        mixed = x
        for behind, weight in enumerate(self.weight.to(x.dtype), start=1):
            mixed = mixed + weight * F.pad(x, (0, 0, behind, 0))[:, : x.size(1)]
        return mixed


class Attention(nn.Module):
    """Causal attention with a window; QK norm; token-value embeddings gated into v."""

    def __init__(self, knobs, attend, window, has_values):
        super().__init__()
        C = knobs.width
        self.head_dim = knobs.head_dim
        self.qk_product = knobs.qk_scale**2  # q carries the scale of both
        self.attend = attend
        self.window = window
        self.query = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.out = nn.Linear(C, C, bias=False)
        self.gate = nn.Linear(knobs.value_gate_channels, C // knobs.head_dim, bias=False) if has_values else None

    def forward(self, x, values, cos, sin):  # x: (B, T, C); values: (B, T, C) or None -> (B, T, C)
        B, T, C = x.shape
        matrices = [self.query.weight, self.key.weight, self.value.weight]  # three for Muon, one product
        q, k, v = F.linear(x, torch.cat(matrices)).view(B, T, 3, -1, self.head_dim).unbind(2)  # (B, T, H, D) each
        if self.gate is not None:
            gate = 2 * torch.sigmoid(self.gate(x[..., : self.gate.in_features]))  # (B, T, H)
            v = v + gate[..., None] * values.view_as(v).to(v.dtype)
        q = self.qk_product * rotate(norm(q), cos, sin)  # a rotation leaves the norm as it is: either order will do,
        k = rotate(norm(k), cos, sin)  # and this one keeps nothing for the backward but what the product gave
        return self.out(self.attend(q, k, v, self.window).reshape(B, T, C))


class Block(nn.Module):
    """Pre-norm attention and a squared-ReLU MLP (Primer, arXiv:2109.08668), each added to the residual stream."""

    def __init__(self, knobs, attend, window, has_values):
        super().__init__()
        C = knobs.width
        self.attention = Attention(knobs, attend, window, has_values)
        self.up = nn.Linear(C, knobs.mlp_ratio * C, bias=False)
        self.down = nn.Linear(knobs.mlp_ratio * C, C, bias=False)
        self.before_attention = ShortConvolution(knobs.taps, C) if knobs.taps else nn.Identity()
        self.before_mlp = ShortConvolution(knobs.taps, C) if knobs.taps else nn.Identity()

    def forward(self, x, values, cos, sin):  # x: (B, T, C) -> (B, T, C)
        x = x + self.attention(self.before_attention(norm(x)), values, cos, sin)
        hidden = F.relu(self.up(self.before_mlp(norm(x))))
        return x + self.down(hidden * hidden)  # square() would be fp32 under CUDA's autocast


HASH = 0x9E37_79B9_7F4A_7C15 - 2**64  # 2^64 over the golden ratio, odd, as a signed number


def hash_ngrams(ids, n, rows):  # ids: (B, T) -> (B, T), in [0, rows)
    """A row for each token with the n - 1 before it (0 before the first), by multiplicative hashing (Knuth)."""
    key = ids
    for behind in range(1, n):
        key = key * HASH + F.pad(ids, (behind, 0))[:, : ids.size(1)]
    high = (key * HASH >> 32) & 0xFFFF_FFFF  # the products wrap at 2^64; the upper half depends on every bit
    return high * rows >> 32


def block_windows(knobs, T):
    """The window of each block: how many earlier tokens a position sees besides itself."""
    pattern = (knobs.window_pattern * knobs.depth)[: knobs.depth - 1] + "L"
    return [T if letter == "L" else int(T * knobs.short_window) for letter in pattern]


class GPT(nn.Module):
    """ids (B, T) -> logits (B, T, V) in fp32, or with targets (B, T) the mean cross-entropy in nats.

    attend(q, k, v, window): of three (B, T, H, D), see MACHINE. dtype: of the matrix products; tables are bf16 where it
    is, else fp32. backward() takes loss_scale times the loss: Muon and AdamW move by a gradient's direction and need not
    know.
    """

    def __init__(self, knobs, vocab_size, T, device, attend, dtype=torch.float32):
        super().__init__()
        C = knobs.width
        L = knobs.depth
        self.knobs = knobs
        self.T = T
        self.dtype = dtype
        self.loss_scale = knobs.fp16_loss_scale if dtype == torch.float16 else 1.0
        self.windows = block_windows(knobs, T)
        has_values = [i % 2 == (L - 1) % 2 for i in range(L)]  # every other block, the last included
        self.embedding = nn.Embedding(vocab_size, C)
        self.value_embeddings = nn.ModuleDict({str(i): nn.Embedding(vocab_size, C) for i in range(L) if has_values[i]})
        self.ngrams = nn.ModuleList(nn.Embedding(rows, C, sparse=True) for rows in knobs.ngram_rows)
        self.blocks = nn.ModuleList(Block(knobs, attend, self.windows[i], has_values[i]) for i in range(L))
        self.head = nn.Linear(C, vocab_size, bias=False)
        self.residual_scale = nn.Parameter(torch.full((L,), knobs.residual_init))
        self.x0_scale = nn.Parameter(torch.full((L,), knobs.x0_init))
        self.draw_weights()
        if dtype == torch.bfloat16:  # lookups move half the bytes; the matrices stay fp32 and are cast by autocast
            for table in self.tables():
                table.to(dtype)
        frequencies = knobs.rope_base ** -(torch.arange(0, knobs.head_dim, 2) / knobs.head_dim)
        angles = torch.outer(torch.arange(T), frequencies)[:, None]  # (T, 1, D / 2)
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)
        self.to(device)

    def tables(self):
        return [module for module in self.modules() if isinstance(module, nn.Embedding)]

    @torch.no_grad()
    def draw_weights(self):
        """Draws on the CPU, so that one seed gives the same weights on every device."""
        bound = self.knobs.matrix_scale * (3 / self.knobs.width) ** 0.5
        self.embedding.weight.normal_(std=self.knobs.embedding_std)
        self.head.weight.normal_(std=self.knobs.head_std)
        for table in self.value_embeddings.values():
            table.weight.uniform_(-bound, bound)
        for table in self.ngrams:
            table.weight.zero_()
        for block in self.blocks:
            attention = block.attention
            for matrix in (attention.query, attention.key, attention.value, block.up):
                matrix.weight.uniform_(-bound, bound)
            attention.out.weight.zero_()  # a block starts as the identity
            block.down.weight.zero_()
            if attention.gate is not None:
                attention.gate.weight.zero_()  # a gate starts at 1

    @torch.compiler.disable  # it knows no sparse gradients
    def look_up_ngrams(self, ids):  # ids: (B, T) -> (B, T, C)
        return sum(table(hash_ngrams(ids, n, table.num_embeddings)) for n, table in enumerate(self.ngrams, start=2))

    def embed(self, ids):  # ids: (B, T) -> (B, T, C)
        x = self.embedding(ids)
        return x + self.look_up_ngrams(ids) if len(self.ngrams) else x

    def logits(self, ids, x):  # ids: (B, T); x: their embeddings, (B, T, C) -> (B, T, V), in fp32
        x0 = norm(x)
        x = x0
        for i, block in enumerate(self.blocks):
            values = self.value_embeddings[str(i)](ids) if str(i) in self.value_embeddings else None
            x = block(self.residual_scale[i] * x + self.x0_scale[i] * x0, values, self.cos, self.sin)
        logits = self.head(norm(x)).float()
        cap = self.knobs.softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def forward(self, ids, targets=None):  # ids, targets: (B, T)
        with torch.autocast(ids.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            x = self.embed(ids)  # the lookup of n-grams breaks the graph in there; what follows is compiled as one
            logits = self.logits(ids, x)
            return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def flops_per_token(self):
        """6 for each weight of the matrices and the head, 12 * C for each key a query may see, causality not halved."""
        weights = sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        keys = sum(min(window, self.T) for window in self.windows)
        return 6 * weights + 12 * self.knobs.width * keys


# == 3. OPTIMIZER ======================================================================================================

# Quintic polynomials (a, b, c) of Polar Express (arXiv:2505.16932) for 5 steps: x <- a x + (b A + c A A) x, A = x x^T
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def matrix_norm(x):  # x: (N, rows, columns) -> (N, 1, 1)
    return x.norm(dim=(-2, -1), keepdim=True)


def orthogonalize(g, dtype):  # g: (N, rows, columns) -> the same shape, in dtype
    """Moves every singular value of each matrix close to 1."""
    x = g.to(dtype)
    x = x / (matrix_norm(x) * 1.02 + 1e-6)  # 1.02: bf16 must not leave the polynomials' range
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for a, b, c in POLAR_EXPRESS:
        A = x @ x.mT
        x = a * x + (b * A + c * (A @ A)) @ x
    return x.mT if tall else x


def variance_axis(rows, columns):
    """The axis that NorMuon averages over: one second moment a row of a tall matrix, one a column of a wide one."""
    return -1 if rows >= columns else -2


def reduce_variance(u, second, beta2):  # u: (N, rows, columns)
    """NorMuon (arXiv:2510.05491): evens out the rows of a tall update (the columns of a wide one) by their running
    mean square, and gives each matrix its norm back. Updates `second` in place."""
    axis = variance_axis(u.size(-2), u.size(-1))
    second.copy_(beta2 * second + (1 - beta2) * u.square().mean(dim=axis, keepdim=True))
    even = u * second.clamp_min(1e-10).rsqrt()
    return even * (matrix_norm(u) / matrix_norm(even).clamp_min(1e-10))


def muon_update(params, grads, momentum, second, *, lr, mu, beta2, decay, dtype):
    """One Muon step (Jordan et al. 2024) for N matrices of one shape: Nesterov momentum, orthogonalized, evened out;
    weight decay only where it points the way of the update (arXiv:2510.12402).

    params, grads: N of (rows, columns). momentum: (N, rows, columns). second: reduce_variance's. dtype: of the products.
    """
    g = torch.stack(grads).float()
    momentum.copy_(mu * momentum + (1 - mu) * g)
    u = reduce_variance(orthogonalize(mu * momentum + (1 - mu) * g, dtype).float(), second, beta2)
    p = torch.stack(params)
    p = p - lr * (u + decay * p * (u * p >= 0))
    torch._foreach_copy_(params, p.unbind())  # one kernel


def adamw_update(params, grads, averages, squares, *, lr, betas, eps, decay, step):
    """One AdamW step (arXiv:1711.05101) for a list of tensors of any shapes. averages, squares: a list like params."""
    beta1, beta2 = betas
    for p, g, m, v in zip(params, grads, averages, squares):
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        denominator = (v / (1 - beta2**step)).sqrt() + eps
        p.copy_(p * (1 - lr * decay) - lr / (1 - beta1**step) * (m / denominator))


def rows_update(table, grad, square, seen, *, lr, beta2, eps, step):
    """One Adam step without momentum, with one second moment a row (after Adafactor, arXiv:1804.04235), that computes
    only the rows a batch has touched: the others' moment decays when they are touched next, which is the same. table:
    (rows, C). grad: a sparse tensor like it. square: (rows, 1). seen: (rows, 1), the step that touched a row last."""
    grad = grad.coalesce()
    rows = grad.indices()[0]
    g = grad.values().float()
    moment = beta2 ** (step - seen[rows]) * square[rows] + (1 - beta2) * g.square().mean(dim=-1, keepdim=True)
    square[rows] = moment
    seen[rows] = step
    update = lr * g / ((moment / (1 - beta2**step)).sqrt() + eps)
    table.index_add_(0, rows, -update.to(table.dtype))


class Group:
    """Parameters that are updated alike. state: every other tensor that a step changes, allocated at once, as zeros. The
    rates are tensors, so that a compiled update is not compiled again when they change."""

    def __init__(self, params, update, lr, decay=0.0):
        self.params = list(params)
        self.update = update
        self.initial_lr = lr
        self.lr = torch.tensor(lr)
        self.decay = torch.tensor(decay)
        self.steps = torch.tensor(0.0)
        self.state = [self.steps]

    def zeros(self, *shape, dtype=torch.float32):
        tensor = torch.zeros(shape, dtype=dtype, device=self.params[0].device)
        self.state.append(tensor)
        return tensor


class Muon(Group):
    """Matrices of one shape, updated as one stack. dtype: of the matrix products."""

    def __init__(self, params, update, *, lr, momentum, beta2, decay, dtype=torch.float32):
        super().__init__(params, update, lr, decay)
        rows, columns = self.params[0].shape
        self.mu = torch.tensor(momentum)
        self.fixed = dict(beta2=beta2, dtype=dtype)
        self.momentum = self.zeros(len(self.params), rows, columns)
        by_row = variance_axis(rows, columns) == -1
        self.second = self.zeros(len(self.params), *((rows, 1) if by_row else (1, columns)))

    def apply(self, grads):
        rates = dict(lr=self.lr, mu=self.mu, decay=self.decay)
        self.update(self.params, grads, self.momentum, self.second, **rates, **self.fixed)


class AdamW(Group):
    """Tensors of any shapes, each with a momentum and a second moment of its own, in its dtype."""

    def __init__(self, params, update, *, lr, betas, eps, decay=0.0):
        super().__init__(params, update, lr, decay)
        self.fixed = dict(betas=betas, eps=eps)
        self.averages = [self.zeros(*p.shape, dtype=p.dtype) for p in self.params]
        self.squares = [self.zeros(*p.shape, dtype=p.dtype) for p in self.params]

    def apply(self, grads):
        rates = dict(lr=self.lr, decay=self.decay, step=self.steps)
        self.update(self.params, grads, self.averages, self.squares, **rates, **self.fixed)


class RowAdam(Group):
    """Tables with sparse gradients, with one second moment a row and no momentum. Not compiled: a batch touches as many
    rows as it likes."""

    def __init__(self, params, *, lr, beta2, eps):
        super().__init__(params, rows_update, lr)
        self.fixed = dict(beta2=beta2, eps=eps)
        self.squares = [self.zeros(len(p), 1) for p in self.params]
        self.seen = [self.zeros(len(p), 1) for p in self.params]

    def apply(self, grads):
        for table, grad, square, seen in zip(self.params, grads, self.squares, self.seen):
            self.update(table, grad, square, seen, lr=self.lr, step=self.steps, **self.fixed)


class Optimizer:
    """All groups as one."""

    def __init__(self, groups):
        self.groups = [group for group in groups if group.params]

    @torch.no_grad()
    def step(self):
        for group in self.groups:
            group.steps += 1
            group.apply([p.grad for p in group.params])
        for p in self.params():
            p.grad = None

    def params(self):
        return [p for group in self.groups for p in group.params]


def uncompiled(function):
    """The compiler of devices that have none."""
    return function


def make_optimizer(model, compiler=uncompiled):
    """Gives every parameter of the model to exactly one group. AssertionError names those with none or several."""
    k = model.knobs
    scale = (k.width / 768) ** -0.5
    adamw = compiler(adamw_update)
    muon = compiler(muon_update)
    common = dict(betas=k.adam_betas, eps=k.adam_eps)
    values = model.value_embeddings.parameters()
    taps = [module.weight for module in model.modules() if isinstance(module, ShortConvolution)]
    groups = [
        AdamW([model.head.weight], adamw, lr=k.head_lr * scale, decay=k.head_decay, **common),
        AdamW([model.embedding.weight], adamw, lr=k.embedding_lr * scale, decay=k.embedding_decay, **common),
        AdamW(values, adamw, lr=k.value_embedding_lr * scale, decay=k.value_embedding_decay, **common),
        AdamW([model.residual_scale], adamw, lr=k.residual_lr, **common),
        AdamW([model.x0_scale], adamw, lr=k.x0_lr, betas=k.x0_betas, eps=k.adam_eps),
        AdamW(taps, adamw, lr=k.taps_lr, **common),
        RowAdam(model.ngrams.parameters(), lr=k.ngram_lr, beta2=k.adam_betas[1], eps=k.adam_eps),
    ]
    shapes = {}
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            shapes.setdefault(tuple(module.weight.shape), []).append(module.weight)
    common = dict(momentum=k.muon_momentum[0], beta2=k.muon_beta2, decay=k.weight_decay, dtype=model.dtype)
    for (rows, columns), matrices in shapes.items():
        groups.append(Muon(matrices, muon, lr=k.matrix_lr * max(1, rows / columns) ** 0.5, **common))
    optimizer = Optimizer(groups)
    owned = [id(p) for p in optimizer.params()]
    wrong = {name: owned.count(id(p)) for name, p in model.named_parameters() if owned.count(id(p)) != 1}
    assert not wrong, f"parameters with another number of owners than one: {wrong}"
    return optimizer


# == 4. SCHEDULE =======================================================================================================


def lr_scale(k, progress):
    """Factor on every learning rate after `progress` (0 to 1) of the budget: linear up, flat, linear down."""
    if progress < k.warmup:
        return progress / k.warmup
    if progress <= 1 - k.warmdown:
        return 1.0
    return k.final_lr + (1 - k.final_lr) * max(0.0, 1 - progress) / k.warmdown


def set_rates(optimizer, k, progress, step):
    """progress: share of the budget spent, above 1 in an overrun. step: optimizer steps already taken."""
    low, high = k.muon_momentum
    ramp = min(1.0, step / max(1, k.muon_momentum_steps))
    for group in optimizer.groups:
        group.lr.fill_(group.initial_lr * lr_scale(k, progress))
        if isinstance(group, Muon):
            group.mu.fill_(low + ramp * (high - low))
            group.decay.fill_(k.weight_decay * max(0.0, 1 - progress))


# == 5. RUN ============================================================================================================
# What the frozen half expects: guard() around main(); torch.manual_seed(SEED) before the first batch; nothing learned
# from text before it; a clock.tick() at the end of each step; model(ids) -> logits (B, T, V) that look back only;
# one evaluate_bpb, then one print_summary. Everything else in this file is yours to change.


def main():
    device, dtype = pick_device()
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    tokenizer = Tokenizer.from_directory()
    T = prepare.MAX_SEQ_LEN
    tier, why = pick_tier(device)
    knobs = Knobs(**TIERS[tier])
    compiler = pick_compiler(device)
    attention, attend = pick_attention(knobs, T, device, dtype, compiler)
    model = GPT(knobs, tokenizer.get_vocab_size(), T, device, attend, dtype)
    optimizer = make_optimizer(model, compiler)
    params = sum(p.numel() for p in model.parameters())
    print(
        f"{tier} tier ({why}): depth {knobs.depth}, width {knobs.width}, {params / 1e6:.1f}M parameters, "
        f"{knobs.batch_tokens:,} tokens a step, {attention}, {str(dtype)[6:]}, seed {SEED}; warming up",
        flush=True,
    )
    forward = compiler(model)
    rows, eval_rows = warm_up(model, forward, optimizer)
    loader = make_dataloader(tokenizer, rows, T, "train", device=device)
    gc.collect()
    gc.freeze()  # what lives by now is not searched for garbage again
    steps, tokens = train(model, forward, optimizer, loader, max(1, knobs.batch_tokens // (rows * T)))
    evaluate_bpb(forward, tokenizer, eval_rows)
    peak = peak_flops(device)
    mfu = model.flops_per_token() * tokens / clock.elapsed() / peak if peak else None
    prepare.print_summary(steps, tokens, params, knobs.depth, mfu=mfu, attention=attention, tier=tier)


def train(model, forward, optimizer, loader, accumulation):
    """Runs steps of `accumulation` micro-batches until the budget is spent; returns (steps, tokens). FloatingPointError:
    the loss went wild."""
    k = model.knobs
    progress = Progress()
    step = 0
    tokens = 0
    elapsed = 0.0
    ids, targets, epoch = next(loader)  # this starts the clock
    while elapsed < TIME_BUDGET:
        loss = 0.0
        for _ in range(accumulation):
            part = forward(ids, targets) / accumulation
            (model.loss_scale * part).backward()
            loss = loss + part.detach()
            tokens += ids.numel()
            ids, targets, epoch = next(loader)  # the host fills the next batch while the device works
        share = min(1.0, clock.elapsed() / TIME_BUDGET)
        set_rates(optimizer, k, share, step)
        optimizer.step()
        if step % 10 == 0:
            progress.read(loss, step)  # waits for the device
        step += 1
        elapsed = clock.tick()
        progress.show(step, elapsed, tokens, epoch, lr_scale(k, share))
    progress.read(loss, step - 1)
    return step, tokens


# == 6. MACHINE ========================================================================================================

PEAK_TFLOPS = {  # dense bf16, by a pattern of the device's name; the first match counts
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100|H200|GH200": 989.5,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
    "A10\\b": 125,
    "L4\\b": 121,
    "RTX 3090": 71,
    "RTX 4090": 165,
    "RTX 5090": 210,
    "RTX 6000 Ada": 364,
    "RTX PRO 6000": 504,
    "MI300X": 1307,
}


def peak_flops(device):
    """Dense bf16 FLOP/s of a device, None where unknown, as for a slice (MIG) of one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    found = [tflops for pattern, tflops in PEAK_TFLOPS.items() if re.search(pattern, name)]
    return found[0] * 1e12 if found and "MIG" not in name else None


def pick_device():
    """(device, dtype): CUDA, else MPS, else CPU; bf16 where the device computes in it, fp16 on older tensor cores."""
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.device("cuda"), torch.bfloat16 if bf16 else torch.float16
    if torch.backends.mps.is_available():
        return torch.device("mps"), torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.device("cpu"), torch.bfloat16 if native else torch.float32  # emulated bf16 is many times slower


def pick_tier(device):
    """(a name in TIERS, why)."""
    if device.type != "cuda":
        return device.type, "no NVIDIA GPU"
    gigabytes = torch.cuda.get_device_properties(device).total_memory / 2**30
    size = max((size for size in (12, 24, 48, 80) if gigabytes > 0.9 * size), default=8)  # 24 GB show as 22 to 24
    return f"cuda-{size}", f"{gigabytes:.1f} GB of GPU memory"


def compiled(function):
    return torch.compile(function, dynamic=False)


def reason_of(error):
    """The first line of what an exception says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def pick_compiler(device):
    """torch.compile, or no compilation where it does not work (no C++ compiler, no Triton, MPS)."""
    if device.type == "mps":
        return uncompiled
    torch._dynamo.config.recompile_limit = 64  # one compilation for each shape of a stack of matrices, 8 by default

    def probe(x):
        return x * 2 + 1

    try:
        compiled(probe)(torch.ones(8, device=device))
    except Exception as error:
        print(f"torch.compile does not work here, so everything is slower: {reason_of(error)}")
        torch._dynamo.reset()
        return uncompiled
    return compiled


# An attention path is made for a device, T and the windows that will occur, and gives a function
# attend(q, k, v, window) of three (B, T, H, D) that returns (B, T, H, D).


def window_mask(T, window, device):  # -> (T, T) bool
    """True where a query (row) sees a key (column): itself and `window` earlier positions."""
    positions = torch.arange(T, device=device)
    behind = positions[:, None] - positions
    return (behind >= 0) & (behind <= window)


def flash_attention(device, T, windows):
    """FlashAttention-3 (arXiv:2407.08608), for Hopper, as prepare.py has fetched it."""
    flash = prepare.load_flash_attention()

    def attend(q, k, v, window):
        out = flash(q, k, v, causal=True, window_size=(window, 0))
        return out[0] if isinstance(out, tuple) else out  # older builds return the log-sum-exp too

    return attend


SMALL_BLOCKS = {  # off Hopper: with the default ones the backward spills registers (200 to 744 bytes a thread at D = 128)
    "bwd_BLOCK_M1": 32,
    "bwd_BLOCK_N1": 64,
    "bwd_BLOCK_M2": 64,
    "bwd_BLOCK_N2": 32,
    "bwd_num_stages": 2,
    "bwd_num_warps": 8,
}


def flex_attention(device, T, windows):
    """PyTorch's FlexAttention; fused where the model is compiled, and it has no backward on a CPU."""
    from torch.nn.attention import flex_attention as flex

    def block_mask(window):
        def sees(b, h, query, key):
            return (query >= key) & (query - key <= window)

        return flex.create_block_mask(sees, None, None, T, T, device=device)

    masks = {window: block_mask(window) for window in set(windows)}
    options = None if is_hopper(device) or device.type != "cuda" else SMALL_BLOCKS

    def attend(q, k, v, window):
        heads = [x.transpose(1, 2) for x in (q, k, v)]  # (B, H, T, D)
        return flex.flex_attention(*heads, block_mask=masks[window], kernel_options=options).transpose(1, 2)

    return attend


def sdpa_attention(device, T, windows):
    """PyTorch's scaled-dot-product attention, with a mask for each window shorter than the row."""
    masks = {window: window_mask(T, window, device) for window in set(windows) if window < T - 1}

    def attend(q, k, v, window):
        heads = [x.transpose(1, 2) for x in (q, k, v)]  # (B, H, T, D)
        mask = masks.get(window)
        return F.scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=mask is None).transpose(1, 2)

    return attend


class Scores(torch.autograd.Function):
    """q @ k.mT for (N, queries, D) and (N, keys, D). PyTorch's own gradient of k would lie transposed in memory, and what
    works on it in the backward would read across its rows."""

    @staticmethod
    def forward(ctx, q, k):
        ctx.save_for_backward(q, k)
        return q @ k.mT

    @staticmethod
    def backward(ctx, grad):  # (N, queries, keys)
        q, k = ctx.saved_tensors
        return grad @ k, grad.mT @ q


def chunked_attention(device, T, windows):
    """Plain products and a softmax, for chunks of queries over the keys that they may see. On a CPU a compiler fuses what
    lies between the products, and PyTorch's own attention is slower."""
    masks = {window: window_mask(T, window, device) for window in set(windows)}
    chunk = max(1, T // 4)

    def attend(q, k, v, window):
        B, T, H, D = q.shape
        q, k, v = [x.transpose(1, 2).reshape(B * H, T, D) for x in (q, k, v)]
        mixed = []
        for start in range(0, T, chunk):
            end = min(start + chunk, T)
            first = max(0, start - window)  # the earliest key that a query of this chunk sees
            scores = D**-0.5 * Scores.apply(q[:, start:end], k[:, first:end]).float()  # (B H, queries, keys)
            scores = scores.masked_fill(~masks[window][start:end, first:end], -torch.inf)
            mixed.append(scores.softmax(-1).to(v.dtype) @ v[:, first:end])
        return torch.cat(mixed, dim=1).view(B, H, T, D).transpose(1, 2)

    return attend


def is_hopper(device):
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def attention_paths(device, dtype, compiler):
    """{name: path} to try here, the one to prefer first; each needs what stands in its line."""
    bf16_gpu = device.type == "cuda" and dtype == torch.bfloat16  # older cards have too little shared memory
    paths = {
        "fa3": (flash_attention, bf16_gpu and is_hopper(device)),
        "flex": (flex_attention, bf16_gpu and compiler is not uncompiled),  # eager, it holds all (T, T) scores
        "chunks": (chunked_attention, device.type == "cpu" and compiler is not uncompiled),
        "sdpa": (sdpa_attention, True),
    }
    return {name: path for name, (path, fits) in paths.items() if fits}


def pick_attention(knobs, T, device, dtype, compiler):
    """(name, attend) of the first path that computes what SDPA does, as the model compiles it."""
    for name, path in attention_paths(device, dtype, compiler).items():
        try:
            if device.type == "cuda" and name != "sdpa":
                check_attention(path, knobs.head_dim, device, dtype, compiler)
            return name, path(device, T, block_windows(knobs, T))
        except Exception as error:  # not fetched, no build for this GPU, no Triton: each raises its own
            print(f"attention: {name} does not work here ({reason_of(error)})", flush=True)
    raise PrepareError("no attention path works here; see the lines above")


def check_attention(path, head_dim, device, dtype, compiler):
    """AssertionError: this path differs from SDPA by more than 2 %, forward or backward, on a window of 64 in 256
    positions. A wrong window would train silently."""
    qkv = torch.randn(3, 1, 256, 2, head_dim, device=device, dtype=dtype)
    ours = outcome(compiler(path(device, 256, [64])), qkv)
    plain = outcome(sdpa_attention(device, 256, [64]), qkv.float())
    for name, a, b in zip(("output", "dq", "dk", "dv"), ours, plain):
        error = (a.float() - b).norm() / b.norm().clamp_min(1e-9)
        assert error < 0.02, f"its {name} is {100 * error:.0f} % off"


def outcome(attend, qkv):
    """[output, dq, dk, dv] where the output's square is the loss."""
    inputs = [x.detach().requires_grad_() for x in qkv]  # three tensors, as in the model
    out = attend(*inputs, 64)
    out.float().square().sum().backward()
    return [out.detach(), *(x.grad for x in inputs)]


def ran_out_of_memory(error):
    """CUDA runs out of memory in more ways than one: in torch's allocator, in cuBLAS, while a kernel is loaded."""
    return "out of memory" in str(error) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


def largest(rows, what, attempt):
    """Calls attempt(rows), with half the rows each time that the memory runs out; returns the rows that fit. Raises what
    attempt raises: other errors, or out of memory with one row."""
    while True:
        try:
            attempt(rows)
            return rows
        except RuntimeError as error:
            if rows == 1 or not ran_out_of_memory(error):
                raise
        gc.collect()  # what the error's traceback held
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rows //= 2
        print(f"out of memory: {rows} rows at a time instead of {2 * rows}, {what}", flush=True)


def warm_up(model, forward, optimizer):
    """Compiles and autotunes training, optimizer and evaluation on synthetic ids, and leaves no trace. Returns the rows of
    a micro-batch and of an evaluation batch that fit the memory. PrepareError: a parameter gets no gradient."""
    k = model.knobs
    device = model.head.weight.device
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def synthetic(rows):
        return torch.randint(model.head.out_features, (rows, model.T), device=device)

    def training(rows):
        for _ in range(2):  # the second step runs without compiling, and with every state in use
            (model.loss_scale * forward(synthetic(rows), synthetic(rows))).backward()
            missing = ", ".join(name for name, p in model.named_parameters() if p.grad is None)
            if missing:
                advice = "use them in the model's forward or take them out of it"
                raise PrepareError(f"no gradient reaches {missing}; {advice}")
            optimizer.step()

    @torch.no_grad()
    def evaluation(rows):
        model.eval()
        forward(synthetic(rows))
        model.train()

    rows = largest(max(1, k.micro_tokens // model.T), "with more accumulation", training)
    eval_rows = largest(max(1, k.eval_tokens // model.T), "in evaluation", evaluation)
    model.load_state_dict(weights)
    for tensor in [tensor for group in optimizer.groups for tensor in group.state]:
        tensor.zero_()
    for p in model.parameters():
        p.grad = None
    torch.manual_seed(SEED)
    random.seed(SEED)
    np.random.seed(SEED % 2**32)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # autotuning's copies are not the run's
    return rows, eval_rows


class Progress:
    """A live line on a terminal; a line every 12 seconds, at most 25 in all, in a file."""

    def __init__(self):
        self.live = sys.stdout.isatty()
        self.every = 0.2 if self.live else max(12, TIME_BUDGET / 25)  # seconds
        self.next = self.every
        self.loss = float("nan")

    def read(self, loss, step):
        """Waits for a loss in nats. FloatingPointError: it is no number, or above 100."""
        self.loss = loss.item()
        if not self.loss <= 100:
            raise FloatingPointError(f"the loss was {self.loss} at step {step}")

    def show(self, step, elapsed, tokens, epoch, scale):
        done = elapsed >= TIME_BUDGET
        if elapsed < self.next and not done:
            return
        self.next = elapsed + self.every
        line = (
            f"step {step:5d} | {elapsed:5.1f} of {TIME_BUDGET} s | loss {self.loss:.4f} | lr x {scale:.2f} | "
            f"{tokens / elapsed:,.0f} tokens/s | epoch {epoch}"
        )
        start = "\r" if self.live else ""
        print(f"{start}{line}", end="\n" if done or not self.live else "  ", flush=True)


if __name__ == "__main__":
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read when torch first uses the GPU
    guard(main)
