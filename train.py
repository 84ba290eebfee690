"""The editable half of autoresearch: a small GPT, its optimizer and the 300-second loop. Experiments edit this file.

    uv run train.py                 # on a terminal: one live line, then the summary
    uv run train.py > run.log 2>&1  # in a file: a line every 12 seconds

Rooms, each using only those above it:

    1. KNOBS      every number an experiment may turn, one tier for each kind of device
    2. MODEL      GPT: attention paths, blocks, embeddings, head
    3. KERNELS    loss and MLP of GPUs, faster forms of two functions of the model
    4. OPTIMIZER  Muon for matrices, AdamW for the rest
    5. SCHEDULE   learning rate, momentum and weight decay over the budget
    6. RUN        device, compilation, warm-up, the loop, what it prints
    7. CONTRACT   main(), and what the frozen half expects of it

Letters: B rows, T positions, C width, H heads, D channels of a head, V vocabulary.
"""

import contextlib
import gc
import os
import random
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import prepare
from prepare import SEED, TIME_BUDGET, PrepareError, Tokenizer, clock, evaluate_bpb, guard, make_dataloader

# == 1. KNOBS ==========================================================================================================


@dataclass(frozen=True)
class Knobs:
    """The defaults are the recipe for one H100; the tiers below change what another device needs.

    PrepareError names every check that the values fail.
    """

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
    taps: int = 0  # earlier tokens that a short convolution mixes into the input of attention and MLP; 0 for none
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
    fp16_loss_scale: float = 2.0**15  # about a micro-batch's tokens: a token's share of the mean is too small for fp16
    # GPU memory of a token at a time, in bytes: for each channel of a block, for each logit
    block_bytes: float = 36.0
    logit_bytes: float = 2.7
    # optimizer; AdamW's rates but the scalars' are for width 768 and grow with (C / 768) ** -0.5
    matrix_lr: float = 0.04  # Muon, times sqrt(max(1, rows / columns))
    embedding_lr: float = 0.9
    value_embedding_lr: float = 0.9
    bigram_lr: float = 0.3  # as it is for every width; one second moment a row, no momentum
    head_lr: float = 0.005
    residual_lr: float = 0.005
    x0_lr: float = 0.5
    taps_lr: float = 0.02
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
        counts = (self.depth, self.mlp_ratio, self.batch_tokens, self.micro_tokens, self.eval_tokens)
        ramps = (self.warmup, self.warmdown)
        checks = {
            "width is not a multiple of head_dim": self.width % self.head_dim == 0,
            "head_dim is odd": self.head_dim % 2 == 0,
            "window_pattern has letters besides S and L": set(self.window_pattern) in ({"S"}, {"L"}, {"S", "L"}),
            "short_window is not in (0, 1]": 0 < self.short_window <= 1,
            "softcap, bigram_rows or taps is below 0": min(self.softcap, self.bigram_rows, self.taps) >= 0,
            "value_gate_channels is not between 1 and width": 0 < self.value_gate_channels <= self.width,
            "depth, mlp_ratio or a token count is below 1": min(counts) >= 1,
            "batch_tokens is not a multiple of micro_tokens": self.batch_tokens % max(1, self.micro_tokens) == 0,
            "warmup or warmdown is below 0, or their sum above 1": min(ramps) >= 0 and sum(ramps) <= 1,
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
    "cpu": dict(
        depth=4,
        width=128,
        head_dim=64,
        window_pattern="L",
        batch_tokens=2**12,
        micro_tokens=2**12,
        eval_tokens=2**14,
        muon_momentum_steps=100,
        softcap=0.0,
        bigram_rows=2**15,
        taps=3,
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


def window_mask(T, window, device):  # -> (T, T) bool
    """True where a query (row) sees a key (column): itself and `window` earlier positions."""
    positions = torch.arange(T, device=device)
    behind = positions[:, None] - positions
    return (behind >= 0) & (behind <= window)


# An attention path is made for a device, T and the windows that will occur, and gives a function
# attend(q, k, v, window) of three (B, T, H, D) that returns (B, T, H, D).


FLASH = "kernels-community/flash-attn3"
FLASH_SECONDS = 60  # for the hub to deliver it, out of the 300 s that a run has besides its budget
FLEX_OPTIONS = {  # where the default blocks spill registers in the backward (200 to 744 bytes a thread at D = 128)
    "bwd_BLOCK_M1": 32,
    "bwd_BLOCK_N1": 64,
    "bwd_BLOCK_M2": 64,
    "bwd_BLOCK_N2": 32,
    "bwd_num_stages": 2,
    "bwd_num_warps": 8,
}


@contextlib.contextmanager
def time_limit(seconds):
    """TimeoutError once this takes longer, and again each second after: what cleans up may hang as well."""

    def stop(number, frame):
        raise TimeoutError(f"no answer in {seconds} s")

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def cached_flash():
    """The snapshot of FlashAttention-3 that was downloaded last, None where there is none."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(os.environ.get("KERNELS_CACHE") or HF_HUB_CACHE)
    snapshots = cache.glob(f"*--{FLASH.replace('/', '--')}/snapshots/*")
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def load_flash():
    """The kernel's module: as LOCAL_KERNELS names it, else from the local cache, which keeps one build from run to run
    and needs no network, else from the hub."""
    from kernels import get_kernel, get_local_kernel

    cached = cached_flash()
    if cached is not None and "LOCAL_KERNELS" not in os.environ:
        return get_local_kernel(cached)
    with time_limit(FLASH_SECONDS):
        return get_kernel(FLASH, version=1)


def flash_attention(device, T, windows):
    """FlashAttention-3 (arXiv:2407.08608) from the Hugging Face kernels hub. Raises where it cannot be had."""
    flash = load_flash().flash_attn_func

    def attend(q, k, v, window):
        out = flash(q, k, v, causal=True, window_size=(window, 0))
        return out[0] if isinstance(out, tuple) else out  # older builds return the log-sum-exp too

    return attend


def is_hopper(device):
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def flex_attention(device, T, windows):
    """PyTorch's FlexAttention; fused where the model is compiled, and it has no backward on a CPU."""
    from torch.nn.attention import flex_attention as flex

    def block_mask(window):
        def sees(b, h, query, key):
            return (query >= key) & (query - key <= window)

        return flex.create_block_mask(sees, None, None, T, T, device=device)

    masks = {window: block_mask(window) for window in set(windows)}
    options = None if is_hopper(device) or device.type != "cuda" else FLEX_OPTIONS

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
            scores = D**-0.5 * (q[:, start:end] @ k[:, first:end].mT).float()  # (B H, queries, keys)
            scores = scores.masked_fill(~masks[window][start:end, first:end], -torch.inf)
            mixed.append(scores.softmax(-1).to(v.dtype) @ v[:, first:end])
        return torch.cat(mixed, dim=1).view(B, H, T, D).transpose(1, 2)

    return attend


ATTENTION = {"fa3": flash_attention, "flex": flex_attention, "sdpa": sdpa_attention, "chunks": chunked_attention}


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


class SquaredReLU(torch.autograd.Function):
    """relu(x) ** 2 (Primer, arXiv:2109.08668). Its slope is twice the root of what it gives, so that nothing but the
    input of the next product is kept for the backward: half of what an MLP holds."""

    @staticmethod
    def forward(ctx, x):
        positive = F.relu(x)
        squares = positive * positive  # square() would be fp32 under CUDA's autocast
        ctx.save_for_backward(squares)
        return squares

    @staticmethod
    def backward(ctx, grad):
        (squares,) = ctx.saved_tensors
        return 2 * squares.sqrt() * grad


def plain_mlp(x, up, down):  # x: (N, C), up: (M, C), down: (C, M) -> (N, C)
    return F.linear(SquaredReLU.apply(F.linear(x, up)), down)


class Block(nn.Module):
    """Pre-norm attention and a squared-ReLU MLP, each added to the residual stream."""

    def __init__(self, knobs, attend, mlp, window, has_values):
        super().__init__()
        self.attention = Attention(knobs, attend, window, has_values)
        self.mlp = mlp
        self.up = nn.Linear(knobs.width, knobs.mlp_ratio * knobs.width, bias=False)
        self.down = nn.Linear(knobs.mlp_ratio * knobs.width, knobs.width, bias=False)
        self.before_attention = ShortConvolution(knobs.taps, knobs.width) if knobs.taps else nn.Identity()
        self.before_mlp = ShortConvolution(knobs.taps, knobs.width) if knobs.taps else nn.Identity()

    def forward(self, x, values, cos, sin):  # x: (B, T, C) -> (B, T, C)
        x = x + self.attention(self.before_attention(norm(x)), values, cos, sin)
        mixed = self.before_mlp(norm(x)).flatten(0, 1)
        return x + self.mlp(mixed, self.up.weight, self.down.weight).view_as(x)


def cap(logits, softcap):  # in fp32
    """Soft cap: squeezes logits into +-softcap; 0 leaves them alone."""
    logits = logits.float()
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def plain_loss(hidden, weight, targets, softcap):
    """Mean cross-entropy in nats of capped logits. hidden: (N, C), weight: (V, C), targets: (N,)."""
    return F.cross_entropy(cap(F.linear(hidden, weight), softcap), targets)


def hash_pairs(ids, vocab_size, rows):  # ids: (B, T) -> (B, T), in [0, rows)
    """A row for each token and the one before it (0 before the first), by Knuth's multiplicative hashing."""
    pairs = F.pad(ids[:, :-1], (1, 0)) * vocab_size + ids
    return ((pairs * 2_654_435_761 & 0xFFFF_FFFF) * rows) >> 32


def block_windows(knobs, T):
    """The window of each block: how many earlier tokens a position sees besides itself."""
    pattern = (knobs.window_pattern * knobs.depth)[: knobs.depth - 1] + "L"
    return [T if letter == "L" else int(T * knobs.short_window) for letter in pattern]


class GPT(nn.Module):
    """ids (B, T) -> logits (B, T, V) in fp32, or with targets (B, T) the mean cross-entropy in nats.

    attention: a name in ATTENTION. dtype: of the matrix products; tables are bf16 where it is, else fp32. loss, mlp:
    plain_loss and plain_mlp, or other forms of them.
    backward() takes loss_scale times the loss. Muon and AdamW move by a gradient's direction and need not know.
    """

    def __init__(
        self, knobs, vocab_size, T, device, attention="sdpa", dtype=torch.float32, loss=plain_loss, mlp=plain_mlp
    ):
        super().__init__()
        C = knobs.width
        L = knobs.depth
        self.knobs = knobs
        self.T = T
        self.dtype = dtype
        self.loss = loss
        self.loss_scale = knobs.fp16_loss_scale if dtype == torch.float16 else 1.0
        self.windows = block_windows(knobs, T)
        attend = ATTENTION[attention](device, T, self.windows)
        has_values = [i % 2 == (L - 1) % 2 for i in range(L)]  # every other block, the last included
        self.embedding = nn.Embedding(vocab_size, C)
        self.value_embeddings = nn.ModuleDict({str(i): nn.Embedding(vocab_size, C) for i in range(L) if has_values[i]})
        self.bigram = nn.Embedding(knobs.bigram_rows, C) if knobs.bigram_rows else None
        self.blocks = nn.ModuleList(Block(knobs, attend, mlp, self.windows[i], has_values[i]) for i in range(L))
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
        return [m for m in self.modules() if isinstance(m, nn.Embedding)]

    @torch.no_grad()
    def draw_weights(self):
        """Draws on the CPU, so that one seed gives the same weights on every device."""
        bound = self.knobs.matrix_scale * (3 / self.knobs.width) ** 0.5
        self.embedding.weight.normal_(std=self.knobs.embedding_std)
        self.head.weight.normal_(std=self.knobs.head_std)
        for table in self.value_embeddings.values():
            table.weight.uniform_(-bound, bound)
        if self.bigram is not None:
            self.bigram.weight.zero_()
        for block in self.blocks:
            attention = block.attention
            for matrix in (attention.query, attention.key, attention.value, block.up):
                matrix.weight.uniform_(-bound, bound)
            attention.out.weight.zero_()  # a block starts as the identity
            block.down.weight.zero_()
            if attention.gate is not None:
                attention.gate.weight.zero_()  # a gate starts at 1

    def hidden(self, ids):  # ids: (B, T) -> (B, T, C), normed
        x = self.embedding(ids)  # (B, T, C)
        if self.bigram is not None:
            x = x + self.bigram(hash_pairs(ids, self.embedding.num_embeddings, self.bigram.num_embeddings))
        x0 = norm(x)
        x = x0
        for i, block in enumerate(self.blocks):
            values = self.value_embeddings[str(i)](ids) if str(i) in self.value_embeddings else None
            x = block(self.residual_scale[i] * x + self.x0_scale[i] * x0, values, self.cos, self.sin)
        return norm(x)

    def forward(self, ids, targets=None):  # ids, targets: (B, T)
        with torch.autocast(ids.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            hidden = self.hidden(ids)
            if targets is None:
                return cap(self.head(hidden), self.knobs.softcap)  # (B, T, V)
            return self.loss(hidden.flatten(0, 1), self.head.weight, targets.flatten(), self.knobs.softcap)

    def flops_per_token(self):
        """6 for each weight of the matrices and the head, 12 * C for each key a query may see, causality not halved."""
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        keys = sum(min(window, self.T) for window in self.windows)
        return 6 * weights + 12 * self.knobs.width * keys


# == 3. KERNELS ========================================================================================================

# Each function here returns a faster form of a function of the model, for GPUs; it raises where there is no Triton. Change
# the plain form as you like: a kernel that does not compute the same is not used, and the log says so.


def fused_loss():
    """plain_loss() by a kernel that reads each logit from memory once and leaves its gradient in its place: they
    move twice instead of four times, and are gone before the backward. The log of the sum is online (arXiv:1805.02867)."""
    import triton
    import triton.language as tl

    @triton.jit
    def replace_by_gradient(logits, targets, losses, V, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0)
        logits += row.to(tl.int64) * V
        target = tl.load(targets + row)
        highest = tl.full((), float("-inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)  # of the powers of what lies below the highest
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z = tl.load(logits + columns, mask=columns < V, other=0.0).to(tl.float32)
            if SOFTCAP > 0:
                z = SOFTCAP * (2 * tl.sigmoid(2 * z / SOFTCAP) - 1)
            z = tl.where(columns < V, z, float("-inf"))
            higher = tl.maximum(highest, tl.max(z, 0))
            total = total * tl.exp(highest - higher) + tl.sum(tl.exp(z - higher), 0)
            highest = higher
        log_total = highest + tl.log(total)
        loss = log_total
        for start in range(0, V, BLOCK):  # the row comes from the cache this time
            columns = start + tl.arange(0, BLOCK)
            z = tl.load(logits + columns, mask=columns < V, other=0.0).to(tl.float32)
            slope = tl.full((BLOCK,), 1.0, tl.float32)
            if SOFTCAP > 0:
                tanh = 2 * tl.sigmoid(2 * z / SOFTCAP) - 1
                z = SOFTCAP * tanh
                slope = 1 - tanh * tanh
            is_target = tl.where(columns == target, 1.0, 0.0)
            loss -= tl.sum(is_target * z, 0)
            tl.store(logits + columns, slope * (tl.exp(z - log_total) - is_target), mask=columns < V)
        tl.store(losses + row, loss)

    class FusedLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, targets, softcap):
            weight = weight.to(hidden.dtype)
            logits = hidden @ weight.mT  # (N, V)
            N, V = logits.shape
            losses = torch.empty(N, dtype=torch.float32, device=hidden.device)
            replace_by_gradient[(N,)](logits, targets, losses, V, SOFTCAP=softcap, BLOCK=1024)
            ctx.save_for_backward(hidden, weight, logits)
            return losses.mean()

        @staticmethod
        def backward(ctx, grad):
            hidden, weight, gradient = ctx.saved_tensors
            share = grad / len(hidden)
            of_hidden = (gradient @ weight).float() * share
            of_weight = (gradient.mT @ hidden).float() * share
            return of_hidden.to(hidden.dtype), of_weight, None, None

    return FusedLoss.apply


def mlp_product():
    """A function launch(x, weight, squares): x @ weight, (N, K) by (K, M), with its squared ReLU, or where squares (N, M) are
    given, times the slope there, 2 sqrt(squares). N and M are multiples of 128, K of 64."""
    import triton
    import triton.language as tl

    blocks = dict(BLOCK_N=128, BLOCK_M=128, BLOCK_K=64)

    @triton.jit
    def product(
        x,  # (N, K)
        weight,  # (K, M) in any strides
        squares,  # (N, M), read where SLOPE
        out,  # (N, M)
        M,
        K,
        stride_k,
        stride_m,
        SLOPE: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        tile = tl.program_id(0)
        rows = (tile // (M // BLOCK_M)).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        columns = (tile % (M // BLOCK_M)) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        inner = tl.arange(0, BLOCK_K)
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in range(0, K, BLOCK_K):
            left = tl.load(x + rows * K + (start + inner)[None, :])
            right = tl.load(weight + (start + inner)[:, None] * stride_k + columns * stride_m)
            sums = tl.dot(left, right, sums)
        place = rows * M + columns
        if SLOPE:
            sums *= 2 * tl.sqrt(tl.load(squares + place).to(tl.float32))
        else:
            sums = tl.maximum(sums, 0.0)
            sums *= sums
        tl.store(out + place, sums)

    def launch(x, weight, squares=None):
        N, K = x.shape
        M = weight.size(1)
        out = torch.empty(N, M, dtype=x.dtype, device=x.device)
        tiles = (N // blocks["BLOCK_N"]) * (M // blocks["BLOCK_M"])
        options = dict(SLOPE=squares is not None, num_warps=8, num_stages=3, **blocks)
        product[(tiles,)](x, weight, out if squares is None else squares, out, M, K, *weight.stride(), **options)
        return out

    return launch


def fused_mlp():
    """plain_mlp() by a matrix product that ends in the squared ReLU, and in its backward in the slope: what lies between
    is never written."""
    launch = mlp_product()

    class FusedMLP(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, up, down):
            assert x.size(0) % 128 == up.size(0) % 128 == x.size(1) % 64 == 0, "rows or widths are no multiples of 128"
            up, down = up.to(x.dtype), down.to(x.dtype)
            squares = launch(x, up.mT)
            ctx.save_for_backward(x, up, down, squares)
            return squares @ down.mT

        @staticmethod
        def backward(ctx, grad):
            x, up, down, squares = ctx.saved_tensors
            of_hidden = launch(grad.contiguous(), down, squares)
            return of_hidden @ up, (of_hidden.mT @ x).float(), (grad.mT @ squares).float()

    return FusedMLP.apply


# == 4. OPTIMIZER ======================================================================================================

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


def rows_update(table, grad, square, *, lr, beta2, eps, step):
    """One Adam step without momentum, with one second moment a row (after Adafactor, arXiv:1804.04235): for a table of
    which a batch touches few rows, it moves a third of the memory. table: (rows, C). square: (rows, 1)."""
    g = grad.float()
    square.copy_(beta2 * square + (1 - beta2) * g.square().mean(dim=-1, keepdim=True))
    table.copy_(table - lr * g / ((square / (1 - beta2**step)).sqrt() + eps))


def uncompiled(function):
    """The compiler of devices that have none."""
    return function


class Group:
    """Parameters that are updated alike. `state`, every other tensor that a step changes, is allocated at once, as
    zeros. The rates are tensors, so that a compiled update is not compiled again when they change."""

    def __init__(self, params, update, lr, weight_decay=0.0):
        self.params = list(params)
        self.update = update
        self.initial_lr = lr
        self.lr = torch.tensor(lr)
        self.weight_decay = torch.tensor(weight_decay)
        self.steps = torch.tensor(0.0)
        self.state = [self.steps]

    def allocate(self, *shape, dtype=torch.float32):
        zeros = torch.zeros(shape, dtype=dtype, device=self.params[0].device)
        self.state.append(zeros)
        return zeros

    def step(self):
        self.steps += 1
        self.apply([p.grad for p in self.params])


class Muon(Group):
    """Matrices of one shape, updated as one stack. dtype: of the matrix products."""

    def __init__(self, params, update, *, lr, momentum, beta2, weight_decay, dtype=torch.float32):
        super().__init__(params, update, lr, weight_decay)
        N = len(self.params)
        rows, columns = self.params[0].shape
        self.mu = torch.tensor(momentum)
        self.fixed = dict(beta2=beta2, dtype=dtype)
        self.momentum = self.allocate(N, rows, columns)
        by_row = variance_axis(rows, columns) == -1
        self.second = self.allocate(N, rows, 1) if by_row else self.allocate(N, 1, columns)

    def apply(self, grads):
        rates = dict(lr=self.lr, mu=self.mu, decay=self.weight_decay)
        self.update(self.params, grads, self.momentum, self.second, **rates, **self.fixed)


class AdamW(Group):
    """Tensors of any shapes, each with a momentum and a second moment of its own, in its dtype."""

    def __init__(self, params, update, *, lr, betas, eps, weight_decay=0.0):
        super().__init__(params, update, lr, weight_decay)
        self.fixed = dict(betas=betas, eps=eps)
        self.averages = [self.allocate(*p.shape, dtype=p.dtype) for p in self.params]
        self.squares = [self.allocate(*p.shape, dtype=p.dtype) for p in self.params]

    def apply(self, grads):
        rates = dict(lr=self.lr, decay=self.weight_decay, step=self.steps)
        self.update(self.params, grads, self.averages, self.squares, **rates, **self.fixed)


class RowAdam(Group):
    """One table, with one second moment a row and no momentum."""

    def __init__(self, table, update, *, lr, beta2, eps):
        super().__init__([table], update, lr)
        self.fixed = dict(beta2=beta2, eps=eps)
        self.square = self.allocate(len(table), 1)

    def apply(self, grads):
        self.update(self.params[0], grads[0], self.square, lr=self.lr, step=self.steps, **self.fixed)


class Optimizer:
    """All groups as one."""

    def __init__(self, groups):
        self.groups = groups

    @torch.no_grad()
    def step(self):
        for group in self.groups:
            group.step()

    def zero_grad(self):
        for p in self.params():
            p.grad = None

    def params(self):
        return [p for group in self.groups for p in group.params]

    def state(self):
        return [tensor for group in self.groups for tensor in group.state]


def make_optimizer(model, compiler=uncompiled):
    """Gives every parameter of the model to exactly one group. AssertionError names those with none or several."""
    k = model.knobs
    scale = (k.width / 768) ** -0.5
    adamw = compiler(adamw_update)
    muon = compiler(muon_update)
    common = dict(betas=k.adam_betas, eps=k.adam_eps)
    tables = model.value_embeddings.parameters()
    groups = [
        AdamW([model.head.weight], adamw, lr=k.head_lr * scale, weight_decay=k.head_decay, **common),
        AdamW([model.embedding.weight], adamw, lr=k.embedding_lr * scale, weight_decay=k.embedding_decay, **common),
        AdamW(tables, adamw, lr=k.value_embedding_lr * scale, weight_decay=k.value_embedding_decay, **common),
        AdamW([model.residual_scale], adamw, lr=k.residual_lr, **common),
        AdamW([model.x0_scale], adamw, lr=k.x0_lr, betas=k.x0_betas, eps=k.adam_eps),
    ]
    if model.bigram is not None:
        update = compiler(rows_update)
        groups.append(RowAdam(model.bigram.weight, update, lr=k.bigram_lr, beta2=k.adam_betas[1], eps=k.adam_eps))
    taps = [module.weight for module in model.modules() if isinstance(module, ShortConvolution)]
    if taps:
        groups.append(AdamW(taps, adamw, lr=k.taps_lr, **common))
    shapes = {}
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            shapes.setdefault(tuple(module.weight.shape), []).append(module.weight)
    common = dict(momentum=k.muon_momentum[0], beta2=k.muon_beta2, weight_decay=k.weight_decay, dtype=model.dtype)
    for (rows, columns), matrices in shapes.items():
        groups.append(Muon(matrices, muon, lr=k.matrix_lr * max(1, rows / columns) ** 0.5, **common))
    optimizer = Optimizer(groups)
    owned = [id(p) for p in optimizer.params()]
    wrong = {name: owned.count(id(p)) for name, p in model.named_parameters() if owned.count(id(p)) != 1}
    assert not wrong, f"parameters with another number of owners than one: {wrong}"
    return optimizer


# == 5. SCHEDULE =======================================================================================================


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
            group.weight_decay.fill_(k.weight_decay * max(0.0, 1 - progress))


# == 6. RUN ============================================================================================================

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


def peak_flops(name):
    """Dense bf16 FLOP/s of a device, None where unknown, as for a slice (MIG) of one."""
    if "MIG" in name:
        return None
    for pattern, tflops in PEAK_TFLOPS.items():
        if re.search(pattern, name):
            return tflops * 1e12
    return None


def pick_device():
    """(device, dtype): CUDA, else MPS, else CPU; bf16 where the device computes in it, fp16 on older tensor cores."""
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.device("cuda"), torch.bfloat16
        tensor_cores = torch.cuda.get_device_capability() >= (7, 0)  # Volta and Turing
        return torch.device("cuda"), torch.float16 if tensor_cores else torch.float32
    if torch.backends.mps.is_available():
        return torch.device("mps"), torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.device("cpu"), torch.bfloat16 if native else torch.float32  # emulated bf16 is many times slower


def pick_tier(device):
    """(a name in TIERS, why)."""
    if device.type == "cpu":
        return "cpu", "no GPU"
    if device.type == "mps":
        return "mps", "Apple's GPU"
    gigabytes = torch.cuda.get_device_properties(device).total_memory / 2**30
    size = max((size for size in (12, 24, 48, 80) if gigabytes > 0.9 * size), default=8)  # 24 GB show as 22 to 24
    return f"cuda-{size}", f"{gigabytes:.1f} GB of GPU memory"


def compiled(function):
    return torch.compile(function, dynamic=False)


def reason_of(error):
    """The first line of what an exception says."""
    return (str(error).strip() or "no reason given").splitlines()[0]


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


def attention_names(device, dtype, compiler):
    """Names in ATTENTION that may work here, the one to prefer first. FlexAttention needs a compiler: without one it
    holds every row's (T, T) scores. Cards without bf16 have too little shared memory for the first two."""
    if device.type == "cpu" and compiler is not uncompiled:
        return ["chunks"]
    if device.type != "cuda" or dtype != torch.bfloat16:
        return ["sdpa"]
    return ["fa3", "sdpa"] if compiler is uncompiled else ["fa3", "flex", "sdpa"]


def outcome(function, inputs, *rest):
    """Forward and backward: [function(*inputs, *rest), and the gradients of the inputs where its square is the loss]."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs, *rest)
    out.float().square().sum().backward()
    return [out.detach(), *(x.grad for x in inputs)]


def check_agreement(outcomes, plain, names):
    """AssertionError: what two outcomes hold differs by more than 2 %."""
    for name, ours, theirs in zip(names, outcomes, plain):
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm().clamp_min(1e-9)
        assert error < 0.02, f"its {name} is {100 * error:.0f} % off"


def least_seconds(call, device):
    """The least of four calls, of which the first compiles."""
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def check_attention(name, head_dim, device, dtype, compiler):
    """AssertionError: this path differs from SDPA, by more than 2 %, on a window of 64 in 256 positions."""
    qkv = torch.randn(3, 1, 256, 2, head_dim, device=device, dtype=dtype)
    ours = outcome(compiler(ATTENTION[name](device, 256, [64])), qkv, 64)
    check_agreement(ours, outcome(sdpa_attention(device, 256, [64]), qkv.float(), 64), ("output", "dq", "dk", "dv"))


def time_attention(name, shape, windows, device, dtype, compiler):
    """Seconds of forward and backward over one call for each window. shape: (B, T, H, D)."""
    attend = compiler(ATTENTION[name](device, shape[1], windows))
    qkv = torch.randn(3, *shape, device=device, dtype=dtype)

    def all_windows():
        for window in windows:
            outcome(attend, qkv, window)

    return least_seconds(all_windows, device)


def pick_attention(names, shape, windows, device, dtype, compiler):
    """Of the paths that compute what SDPA does, as the model compiles them: FlashAttention-3 on Hopper, else the one
    that is fastest. shape: (B, T, H, D) of a micro-batch. windows: those of its blocks."""
    if len(names) == 1:
        return names[0]
    times = {}
    for name in names:
        try:
            check_attention(name, shape[-1], device, dtype, compiler)
            if name == "fa3" and is_hopper(device):
                return name
            times[name] = time_attention(name, shape, windows, device, dtype, compiler)
        except Exception as error:  # no network, no build for this GPU, no Triton: each raises its own
            print(f"attention: {name} does not work here ({type(error).__name__}: {reason_of(error)})", flush=True)
    gc.collect()  # a compiled path's graph can be a cycle, which held a gigabyte
    print("attention: " + ", ".join(f"{name} {1000 * times[name]:.1f} ms" for name in times), flush=True)
    return min(times, key=times.get, default="sdpa")


def check_loss(loss, vocab_size, softcap, device, dtype, compiler):
    """AssertionError: this loss differs from plain_loss(), by more than 2 %, on 64 positions."""
    hidden = torch.randn(64, 64, device=device, dtype=dtype)
    weight = torch.randn(vocab_size, 64, device=device, dtype=dtype)
    rest = (torch.randint(vocab_size, (64,), device=device), softcap)
    plain = outcome(plain_loss, (hidden.float(), weight.float()), *rest)
    check_agreement(outcome(compiler(loss), (hidden, weight), *rest), plain, ("value", "dhidden", "dweight"))


def check_mlp(mlp, rows, width, hidden, device, dtype, compiler):
    """AssertionError: this MLP differs from plain_mlp(), by more than 2 %, on 128 positions, or is slower on `rows`."""
    x = torch.randn(rows, width, device=device, dtype=dtype)
    up = torch.randn(hidden, width, device=device, dtype=dtype) / width**0.5
    down = torch.randn(width, hidden, device=device, dtype=dtype) / hidden**0.5
    few = (x[:128], up, down)
    plain = outcome(plain_mlp, [part.float() for part in few])
    check_agreement(outcome(compiler(mlp), few), plain, ("output", "dx", "dup", "ddown"))

    def seconds(form):
        form = compiler(form)
        return least_seconds(lambda: outcome(form, (x, up, down)), device)

    ours = seconds(mlp)
    theirs = seconds(plain_mlp)
    assert ours < theirs, f"{1000 * ours:.2f} ms where the plain form takes {1000 * theirs:.2f}"


def pick_kernel(make, check, plain):
    """What make() returns where check() accepts it, else the plain form."""
    try:
        kernel = make()
        check(kernel)
        return kernel
    except Exception as error:  # no Triton, no compiler, a shape that does not fit, a GPU on which it is slower
        print(f"{plain.__name__} is used: {make.__name__} does not work here ({reason_of(error)})", flush=True)
        return plain


def pick_kernels(knobs, rows, T, vocab_size, device, dtype, compiler):
    """(loss, mlp) for a GPT: the kernels where they work. rows: of a micro-batch."""
    if device.type != "cuda":
        return plain_loss, plain_mlp

    def accept_loss(loss):
        check_loss(loss, vocab_size, knobs.softcap, device, dtype, compiler)

    def accept_mlp(mlp):
        assert T % 128 == 0, f"rows of {T} are no multiple of 128"
        check_mlp(mlp, rows * T, knobs.width, knobs.mlp_ratio * knobs.width, device, dtype, compiler)

    loss = pick_kernel(fused_loss, accept_loss, plain_loss)
    mlp = pick_kernel(fused_mlp, accept_mlp, plain_mlp)
    gc.collect()  # compiled graphs are cycles, as above
    return loss, mlp


@contextlib.contextmanager
def without_trace(model, optimizer, device):
    """Puts weights, optimizer state, gradients and random generators back, in the same storages."""
    tensors = [*model.parameters(), *model.buffers(), *optimizer.state()]
    saved = [t.detach().clone() for t in tensors]
    python = random.getstate()
    numpy = np.random.get_state()
    cpu = torch.get_rng_state()
    accelerator = getattr(torch, device.type) if device.type != "cpu" else None
    if accelerator:
        on_device = accelerator.get_rng_state()
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, old in zip(tensors, saved):
                tensor.copy_(old)
        optimizer.zero_grad()
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if accelerator:
            accelerator.set_rng_state(on_device)


def fitting_rows(knobs, vocab_size, T, device):
    """Rows of a micro-batch and of an evaluation batch, halved until the GPU's memory should hold them: finding out
    costs a compilation each time."""
    rows = max(1, knobs.micro_tokens // T)
    eval_rows = max(1, knobs.eval_tokens // T)
    if device.type != "cuda":
        return rows, eval_rows
    memory = torch.cuda.get_device_properties(device).total_memory
    needed = T * (knobs.block_bytes * knobs.depth * knobs.width + knobs.logit_bytes * vocab_size)  # bytes a row
    fitting = rows
    while fitting > 1 and fitting * needed > memory:
        fitting //= 2
    if fitting < rows:
        print(f"{rows} rows at a time would need {rows * needed / 2**30:.1f} GB: {fitting} instead", flush=True)
    return fitting, max(1, eval_rows * fitting // rows)


def ran_out_of_memory(error):
    """CUDA runs out of memory in more ways than one: in torch's allocator, in cuBLAS, while a kernel is loaded."""
    text = str(error)
    return "out of memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text


def check_grads(model):
    """PrepareError names the parameters that a backward pass left without a gradient."""
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    if missing:
        names = ", ".join(missing)
        raise PrepareError(f"no gradient reaches {names}; use them in the model's forward or take them out of it")


def synthetic(model, rows):  # -> (rows, T)
    return torch.randint(model.head.out_features, (rows, model.T), device=model.head.weight.device)


def rehearse_training(model, forward, optimizer, rows):
    for _ in range(2):  # the second step runs without compiling, and with every state in use
        loss = forward(synthetic(model, rows), synthetic(model, rows))
        (model.loss_scale * loss).backward()
        check_grads(model)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def rehearse_evaluation(model, forward, rows):
    model.eval()
    forward(synthetic(model, rows))
    model.train()


def largest(rows, what, attempt):
    """Calls attempt(rows), with half the rows each time that the memory runs out; returns the rows that fit.

    Raises what attempt raises: other errors, or out of memory with one row.
    """
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


def warm_up(model, forward, optimizer, rows, eval_rows):
    """Compiles and autotunes training, optimizer and evaluation on synthetic ids, and leaves no trace.

    Returns the rows of a micro-batch and of an evaluation batch that fit the memory. PrepareError: a parameter gets no
    gradient. Raises what torch raises when one row does not fit.
    """
    device = model.head.weight.device

    def training(rows):
        with without_trace(model, optimizer, device):
            rehearse_training(model, forward, optimizer, rows)

    def evaluation(rows):
        with without_trace(model, optimizer, device):
            rehearse_evaluation(model, forward, rows)

    rows = largest(rows, "with more accumulation", training)
    eval_rows = largest(eval_rows, "in evaluation", evaluation)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # autotuning's copies are not the run's
    return rows, eval_rows


class Progress:
    """A live line on a terminal; a line every 12 seconds, at most 25 in all, in a file. budget: seconds."""

    def __init__(self, budget):
        self.budget = budget
        self.live = sys.stdout.isatty()
        self.every = 0.2 if self.live else max(12, budget / 25)  # seconds
        self.next = 0.0 if self.live else self.every
        self.loss = 0.0  # running sum that forgets a tenth a step, and its weight
        self.weight = 0.0

    def show(self, step, elapsed, loss, tokens, epoch, scale):
        self.loss = 0.9 * self.loss + 0.1 * loss
        self.weight = 0.9 * self.weight + 0.1
        done = elapsed >= self.budget
        if elapsed < self.next and not done:
            return
        self.next = elapsed + self.every
        line = (
            f"step {step:5d} | {elapsed:5.1f} of {self.budget} s | loss {self.loss / self.weight:.4f} | "
            f"lr x {scale:.2f} | {tokens / elapsed:,.0f} tokens/s | epoch {epoch}"
        )
        if self.live:
            print(f"\r{line}  ", end="\n" if done else "", flush=True)
        else:
            print(line, flush=True)


class PendingLoss:
    """A loss on its way to the CPU. Reading it waits only for the work queued before it was made: a step later, the
    device goes on meanwhile."""

    def __init__(self, loss, step):
        self.step = step
        self.copied = None
        if loss.device.type == "cuda":
            self.loss = loss.to("cpu", non_blocking=True)  # into pinned memory
            self.copied = torch.cuda.Event()
            self.copied.record()
        else:
            self.loss = loss.to("cpu")

    def read(self):
        """The loss in nats. FloatingPointError: it is no number, or above 100."""
        if self.copied is not None:
            self.copied.synchronize()
        value = self.loss.item()
        if not value <= 100:
            raise FloatingPointError(f"the loss was {value} at step {self.step}")
        return value


def train(model, forward, optimizer, loader, accumulation):
    """Runs steps of `accumulation` micro-batches until the budget is spent; returns (steps, tokens).

    FloatingPointError: the loss went wild.
    """
    k = model.knobs
    progress = Progress(TIME_BUDGET)
    step = 0
    tokens = 0
    elapsed = 0.0
    pending = None
    ids, targets, epoch = next(loader)  # this starts the clock
    while elapsed < TIME_BUDGET:
        loss = 0.0
        for _ in range(accumulation):
            part = forward(ids, targets) / accumulation
            (model.loss_scale * part).backward()
            loss = loss + part.detach()
            tokens += ids.numel()
            ids, targets, epoch = next(loader)  # the host fills the next batch while the device works
        newest = PendingLoss(loss, step)
        share = min(1.0, clock.elapsed() / TIME_BUDGET)
        set_rates(optimizer, k, share, step)
        optimizer.step()
        optimizer.zero_grad()
        if pending is None:
            pending = newest  # of the first step; later ones are read a step late
        value = pending.read()
        pending = newest
        step += 1
        elapsed = clock.tick()
        progress.show(step, elapsed, value, tokens, epoch, lr_scale(k, share))
    pending.read()
    return step, tokens


# == 7. CONTRACT =======================================================================================================
# What the frozen half expects: guard() around main(); torch.manual_seed(SEED) before the first batch; nothing learned
# from text before it; a clock.tick() at the end of each step; model(ids) -> logits (B, T, V) that look back only;
# one evaluate_bpb, then one print_summary, whose attention= names what the machine offers: runs with different names do
# not compare, so an idea that changes the arithmetic keeps the name. Everything else in this file is yours to change.


def main():
    device, dtype = pick_device()
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    tokenizer = Tokenizer.from_directory()
    T = prepare.MAX_SEQ_LEN
    tier, why = pick_tier(device)
    knobs = Knobs(**TIERS[tier])
    vocab_size = tokenizer.get_vocab_size()
    rows, eval_rows = fitting_rows(knobs, vocab_size, T, device)
    compiler = pick_compiler(device)
    names = attention_names(device, dtype, compiler)
    shape = (rows, T, knobs.width // knobs.head_dim, knobs.head_dim)
    attention = pick_attention(names, shape, block_windows(knobs, T), device, dtype, compiler)
    loss, mlp = pick_kernels(knobs, rows, T, vocab_size, device, dtype, compiler)
    model = GPT(knobs, vocab_size, T, device, attention, dtype, loss, mlp)
    optimizer = make_optimizer(model, compiler)
    num_params = sum(p.numel() for p in model.parameters())
    print(
        f"{tier} tier ({why}): depth {knobs.depth}, width {knobs.width}, {num_params / 1e6:.1f}M parameters, "
        f"{knobs.batch_tokens:,} tokens a step, {attention}, {str(dtype)[6:]}, seed {SEED}; warming up",
        flush=True,
    )

    forward = compiler(model)
    rows, eval_rows = warm_up(model, forward, optimizer, rows, eval_rows)
    accumulation = max(1, knobs.batch_tokens // (rows * T))
    loader = make_dataloader(tokenizer, rows, T, "train", device=device)
    gc.collect()
    gc.freeze()  # what lives by now is not searched for garbage again
    steps, tokens = train(model, forward, optimizer, loader, accumulation)
    evaluate_bpb(forward, tokenizer, eval_rows)

    mfu = None
    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    if peak:
        mfu = model.flops_per_token() * tokens / clock.elapsed() / peak
    prepare.print_summary(steps, tokens, num_params, knobs.depth, mfu=mfu, attention=attention, tier=tier)


if __name__ == "__main__":
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read when torch first uses the GPU
    guard(main)
