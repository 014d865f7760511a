"""Mamba-2 in one readable file.

    "The paper" is Tri Dao and Albert Gu, "Transformers are SSMs: Generalized Models and Efficient
    Algorithms Through Structured State Space Duality", ICML 2024, https://arxiv.org/abs/2405.21060.

One idea carries all of it: a layer is a pure function, y, state = layer.step(u, state), for any
number of positions. It prefills, resumes, forks a prompt, decodes in constant time; and any split
of a sequence into calls gives, up to rounding, the result of one call. First come SSD, the layer
and the language model; then checks, configuration, transformers, several GPUs, and hybrids.

    code   paper    meaning
    b               batch
    l      T        length of the sequence
    c               chunks
    q, s   Q        positions in a chunk: of the output (q) and of the input (s)
    d               width of the model, or any number of channels
    h, p   H, P     heads, and channels per head (headdim)
    n      N        size of the state of one channel, d_state
    g      G        groups of heads that share B and C;  r = h / g heads per group
    k               taps of the short convolution, d_conv
    x      X        input of SSD, the "values" of attention
    dt     Δ        step size, one per head and position
    A               decay rate, one negative number per head; the paper's A_t is exp(dt A)
    B, C   B, C     "keys" and "queries": where the state is written and read
    D      D        skip connection
    state  h_t      the state of a head, (p, n) numbers
    L      L        the decays between positions, a 1-semiseparable matrix

"Packed" sequences lie one after another in the same row. "Differs:" marks what differs on purpose
from the paper, from transformers' Mamba-2 or from "the original", the authors' package mamba_ssm.

Section 6 and config.json files need transformers, all else torch and einops. On CUDA, `kernels.py`
replaces parts of this file: to change the mathematics, set `kernels` to None. MIT licence.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

try:
    import transformers
    from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput
    from transformers.utils import can_return_tuple
except ImportError as error:
    if error.name != "transformers":  # neither missing nor too old, but broken
        raise
    transformers, can_return_tuple = None, lambda function: function
    GenerationMixin, PreTrainedConfig, PreTrainedModel = object, object, nn.Module

# `kernels.py` next to this file, or None: not imported, as Hugging Face has a package `kernels`.
kernels = None
if (_path := Path(__file__).with_name("kernels.py")).is_file():
    _spec = importlib.util.spec_from_file_location(f"{__name__}_kernels", _path)
    kernels = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(kernels)


# ---- 1. SSD, the state space dual form of a selective state space model, in three forms ----------
# Each form computes, per head, the selective state space model of equation (2),
#
#     state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T        (p, n)
#     y_t     = state_t C_t + D x_t                             (p)
#
# where dt_t B_t is the paper's B_t (in Listing 1, X is dt x and A is dt A). All take and return:
#
#     x               (b, l, h, p)       input; l may be 0
#     dt              (b, l, h)          step sizes, after softplus: at least 0
#     A               (h)                negative decay rates
#     B, C            (b, l, g, n)       input and output projections; g divides h
#     D               (h), (h, p), None  skip connection
#     chunk_size      integer            only `ssd` uses it: it changes speed, not results
#     initial_state   (b, h, p, n)       the state before the first position; None is zero
#     seq_idx         (b, l) integers    labels of packed sequences, or None. Where they change, a
#                                        zero state begins; initial_state is the first sequence's.
#     y               (b, l, h, p)       in x's dtype
#     final_state     (b, h, p, n)       float32, or float64 if x is
#
# All is computed in float32 at least, also under autocast: states and sums of decays add up many
# steps. Every floating-point input has a gradient.


def _without_autocast(function):
    """`function(x, ...)`, run without autocast."""

    @functools.wraps(function)
    def wrapped(x, *args, **kwargs):
        device = x.device.type if isinstance(x, Tensor) and not x.is_meta else "cpu"
        with torch.autocast(device, enabled=False):
            return function(x, *args, **kwargs)

    return wrapped


@_without_autocast
def ssd_recurrent(x, dt, A, B, C, D=None, *, chunk_size=None, initial_state=None, seq_idx=None):
    """SSD step by step: equation (2), the linear mode of Section 3.4.1. Per head: time O(l p n),
    memory O(l (p + n) + p n), or O(l p n) with gradients."""
    # dt A (b, l, h), -inf where a packed sequence begins; D (h, 1) or (h, p); state (b, h, p, n)
    log_decay, D, state = _prepare(x, dt, A, B, C, D, initial_state, seq_idx)
    dtype, r = x.dtype, x.shape[2] // B.shape[2]
    x, dt, B, C = (t.to(state.dtype) for t in (x, dt, B, C))
    B, C = (repeat(t, "b l g n -> b l (g r) 1 n", r=r) for t in (B, C))
    decay = log_decay.exp()[..., None, None]  # (b, l, h, 1, 1)
    xdt = (x * dt[..., None])[..., None]  # (b, l, h, p, 1)
    ys = [x[:, :0]]  # keeps torch.cat valid when l = 0
    for decay_t, xdt_t, B_t, C_t in zip(*(t.unbind(1) for t in (decay, xdt, B, C)), strict=True):
        state = torch.addcmul(decay_t * state, xdt_t, B_t)  # (b, h, p, n)
        ys.append((state * C_t).sum(-1)[:, None])  # (b, 1, h, p)
    y = torch.cat(ys, dim=1)  # (b, l, h, p)
    if D is not None:
        y = y + D * x
    return y.to(dtype), state


def segsum(log_decay: Tensor) -> Tensor:
    """Sums over segments, (..., q) to (..., q, s): log_decay_(s+1) + ... + log_decay_q; 0 on the
    diagonal, -inf above it. The exponential of the result is L. Differs: Listing 1 subtracts two
    prefix sums, which loses digits if they are large, and gives NaN if infinite."""
    q = log_decay.shape[-1]
    lower = torch.ones(q, q, dtype=torch.bool, device=log_decay.device).tril()
    terms = log_decay[..., None].expand(*log_decay.shape, q)  # (..., q, s)
    terms = terms.masked_fill(~lower.tril(-1), 0)  # log_decay_q where q > s
    return terms.cumsum(-2).masked_fill(~lower, -torch.inf)  # (..., q, s)


@_without_autocast
def ssd_quadratic(x, dt, A, B, C, D=None, *, chunk_size=None, initial_state=None, seq_idx=None):
    """SSD as masked attention: y = (L ∘ C B^T) (dt x), the quadratic mode of Section 5.1, with the
    decays L in place of the softmax. Per head: time O(l^2 (n + p)), memory O(l^2)."""
    log_decay, D, state = _prepare(x, dt, A, B, C, D, initial_state, seq_idx)
    if x.shape[1] == 0:
        return torch.zeros_like(x), state
    y, state = _quadratic_in_chunks(x, dt, log_decay, B, C, D, state, chunks=1)
    return y[0], state


@_without_autocast
def ssd(x, dt, A, B, C, D=None, *, chunk_size=64, initial_state=None, seq_idx=None):
    """SSD in chunks (Section 6, Listing 1): quadratic inside a chunk, recurrent between chunks.

    With q = chunk_size: time O(l (q n / r + q p + p n)) per head, nearly all of it in matrix
    products; memory O(l p + p n), or O(l (p + q + p n / q)) with gradients.

    Differs: Listing 1 takes all chunks at once, and makes the recurrence between them a matrix
    product. Here a loop over slabs of chunks bounds memory, and the recurrence is a loop.
    """
    _check("chunk_size", chunk_size, *COUNT)
    options = dict(initial_state=initial_state, seq_idx=seq_idx)
    if kernels and (fused := kernels.ssd(x, dt, A, B, C, D, **options)) is not None:
        return fused
    if isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] <= 1:
        return ssd_recurrent(x, dt, A, B, C, D, **options)  # one position is a step
    log_decay, D, state = _prepare(x, dt, A, B, C, D, **options)
    b, l, h, _ = x.shape
    numbers = SLAB_ON_GPU if x.is_cuda else SLAB
    slab = chunk_size * max(1, numbers // max(1, b * h * chunk_size**2))
    full = l - l % chunk_size
    sizes = [min(slab, full - i) for i in range(0, full, slab)] + [l - full] * (l > full)
    ys = []
    for piece in zip(*(t.split(sizes, dim=1) for t in (x, dt, log_decay, B, C)), strict=True):
        chunks = max(1, piece[0].shape[1] // chunk_size)
        y, state = _quadratic_in_chunks(*piece, D, state, chunks)
        ys += y
    return torch.cat(ys, dim=1), state  # (b, l, h, p), (b, h, p, n)


# Numbers in the matrices L of a slab: many, for large operations; few, for a CPU's cache.
SLAB, SLAB_ON_GPU = 2**19, 2**24


def _quadratic_in_chunks(x, dt, log_decay, B, C, D, state, chunks):
    """Listing 1 for `chunks` equal chunks: a list of their y (b, q, h, p), and the new state.
    log_decay, D, state: see `_prepare`."""
    dtype, axes = x.dtype, dict(c=chunks, g=B.shape[2])
    x, dt, B, C = (t.to(state.dtype) for t in (x, dt, B, C))
    xdt = x * dt[..., None]
    x, xdt = (rearrange(t, "b (c q) (g r) p -> b c g r q p", **axes) for t in (x, xdt))
    xdt = xdt.contiguous()  # else each product copies it, and keeps the copy
    log_decay = rearrange(log_decay, "b (c q) (g r) -> b c g r q", **axes)
    B, C = (rearrange(t, "b (c q) g n -> b c g q n", **axes) for t in (B, C))

    L = segsum(log_decay).exp()  # (b, c, g, r, q, s): decay from position s to position q
    from_start = log_decay.cumsum(-1).exp()[..., None]  # (b, c, g, r, q, 1): from before the chunk
    to_end = L[..., -1, :, None]  # (b, c, g, r, s, 1): to the chunk's last position
    # 1. Diagonal blocks: from the inputs of a chunk to its outputs, as attention.
    scores = C @ B.mT  # (b, c, g, q, s)
    inside = (scores[:, :, :, None] * L) @ xdt  # (b, c, g, r, q, p)
    if D is not None:
        inside = torch.addcmul(inside, rearrange(D, "(g r) p -> g r 1 p", g=B.shape[2]), x)
    # 2. From the inputs of a chunk to what it adds to the state.
    written = rearrange(xdt * to_end, "b c g r s p -> b c g (r p) s") @ B
    written = rearrange(written, "b c g (r p) n -> b c (g r) p n", p=x.shape[-1])
    # 4. and 3., chunk by chunk: from the state before to the outputs, and to the state after.
    # from_start at the last position is the decay of the whole chunk.
    decay, ys = from_start[..., -1:, :].flatten(2, 3), []  # (b, c, h, 1, 1)
    each = zip(*(t.unbind(1) for t in (C, inside, from_start, written, decay)), strict=True)
    for C_c, inside_c, from_start_c, written_c, decay_c in each:
        read = C_c @ rearrange(state, "b (g r) p n -> b g n (r p)", g=B.shape[2])
        read = rearrange(read, "b g q (r p) -> b g r q p", p=x.shape[-1])
        y = torch.addcmul(inside_c, from_start_c, read)  # (b, g, r, q, p)
        ys.append(rearrange(y, "b g r q p -> b q (g r) p").to(dtype))
        state = torch.addcmul(written_c, decay_c, state)  # (b, h, p, n)
    return ys, state


# ---- 2. The layer --------------------------------------------------------------------------------


def causal_conv1d(
    x, weight, bias=None, *, initial_state=None, seq_idx=None, length=None, silu=True
):
    """Causal depthwise convolution and SiLU if silu: y_t = silu(bias + sum_j weight_j x_{t-k+1+j}).

    x (b, l, d); weight (d, k); bias (d) or None; initial_state (b, k-1, d), the inputs before x,
    None is zeros; seq_idx as in `ssd`: no tap crosses a border; length (b, 1), how many inputs of a
    row count, None is all. Returns y (b, l, d) and final_state (b, k-1, d), the last inputs that
    count, zero if of an earlier sequence; both in x's dtype, computed in float32 at least.
    """
    options, fused = dict(initial_state=initial_state, seq_idx=seq_idx), None
    if kernels and silu:
        fused = kernels.causal_conv1d(x, weight, bias, **options)
    if fused is not None and length is None:
        return fused
    sizes = _require({}, "b l d", x=x)
    _require(sizes, "d k", weight=weight)
    b, l, d, k = (sizes[axis] for axis in "bldk")
    _require(sizes, "d", bias=bias)
    _require({**sizes, "k-1": k - 1}, "b k-1 d", initial_state=initial_state)
    _require(sizes, "b l", "integers", seq_idx=seq_idx)
    if initial_state is None:
        initial_state = x.new_zeros(b, k - 1, d)
    # For each input in the window, the number of its sequence: 0 for the state's.
    number = None if seq_idx is None else F.pad(_borders(seq_idx).cumsum(1), (k - 1, 0))
    # 1 * copies: else the state's gradient would keep the window's alive.
    window = torch.cat([1 * initial_state.to(x.dtype), x], dim=1)  # (b, k-1+l, d)
    last = (l if length is None else length) + torch.arange(k - 1, device=x.device)
    final_state = _take(window, last)
    if number is not None:
        final_state = _erase(final_state, _take(number, last) != number[:, -1:])
    if fused is not None:
        return fused[0], final_state
    dtype = _at_least_float32(x.dtype)
    window, weight = window.to(dtype), weight.to(dtype)
    y = weight.new_zeros(d) if bias is None else bias.to(dtype)
    for j in range(k):
        tap = window[:, j : j + l]  # (b, l, d)
        if number is not None:
            tap = tap.masked_fill((number[:, j : j + l] != number[:, k - 1 :])[..., None], 0)
        y = torch.addcmul(y, weight[:, j], tap)
    return (F.silu(y) if silu else y).to(x.dtype), final_state


def rms_norm(x, weight, eps, *, gate=None, groups=1):
    """RMSNorm of x, or of x * silu(gate): x / sqrt(mean(x^2) + eps) * weight. x, gate, result
    (..., d), weight (d). The mean is over each of `groups` equal parts of the last axis (Section
    8.1). The result has the gate's dtype, or if there is no gate, the weight's."""
    fused = kernels and kernels.rms_norm(x, weight, eps, gate=gate, groups=groups)
    if fused is not None:
        return fused
    axes = x.dim() if isinstance(x, Tensor) else 1
    sizes = _require({}, " ".join("stuvwxyd"[-axes:]), x=x, gate=gate)  # d is the last axis
    _require(sizes, "d", weight=weight)
    dtype = _at_least_float32(x.dtype)
    x = x.to(dtype) if gate is None else x.to(dtype) * F.silu(gate.to(dtype))
    x = x.unflatten(-1, (groups, -1))  # (..., g, d / g), an error if g does not divide d
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x.flatten(-2) * weight).to(weight.dtype if gate is None else gate.dtype)


class CausalConv1d(nn.Conv1d):
    def __init__(self, channels: int, taps: int, bias: bool):
        super().__init__(channels, channels, taps, groups=channels, bias=bias)

    def forward(self, x, **options):
        return causal_conv1d(x, self.weight.squeeze(1), self.bias, **options)


class RMSNorm(nn.RMSNorm):
    def __init__(self, width: int, eps: float, groups: int = 1):
        super().__init__(width, eps)
        self.groups = groups

    def forward(self, x, gate=None):
        return rms_norm(x, self.weight, self.eps, gate=gate, groups=self.groups)


class Mamba2State(NamedTuple):
    """The state of a layer, immutable. Differs: the original keeps one input more, channels first,
    and ssm in the weights' dtype."""

    conv: Tensor  # (b, k-1, h p + 2 g n), the convolution's last inputs, in the dtype of in_proj(u)
    ssm: Tensor  # (b, h, p, n), the state of SSD: float32 at least, or the dtype it is passed in

    def map(self, function, *others: Mamba2State) -> Mamba2State:
        """The state of function(tensor, *tensors of the others) for each tensor."""
        return type(self)(*map(function, self, *others))

    def detach(self) -> Mamba2State:
        return self.map(Tensor.detach)

    def to(self, *args, **kwargs) -> Mamba2State:
        """The state on another device, or with ssm in another dtype, which steps keep: bfloat16
        takes half the memory, and on a GPU less time, but rounds small contributions away."""
        ssm = self.ssm.to(*args, **kwargs)
        return Mamba2State(self.conv.to(ssm.device), ssm)


class Mamba2(nn.Module):
    """The Mamba-2 layer (Section 7.1, Figure 6), functional in its state:

        u ── in_proj ─┬─ x, B, C ── conv1d, SiLU ─┐
          (b, l, d)   ├─ dt ── softplus ──────────┴─ ssd ── y ─┐
                      └─ z ────────────────────────────────────┴─ norm(y silu(z)) ── out_proj ── out

    with A = -exp(A_log) and dt = softplus(dt + dt_bias), as in Mamba-1, clamped to time_step_limit.

        layer = Mamba2(256)                  # d_model and Mamba2Config's options, or a config
        y = layer(u)                         # (b, l, d) in, (b, l, d) out
        y, state = layer.step(u)             # the same, and the state after the last position
        y, state = layer.step(v, state)      # resumes there

    Parameters have the names and shapes of published checkpoints.
    """

    def __init__(self, d_model, *, depth=1, layer_idx=None, device=None, dtype=None, **options):
        super().__init__()  # layer_idx: as in the original, not used
        config = d_model
        if options or not isinstance(config, Mamba2Config):
            config = Mamba2Config(d_model=d_model, **options)
        config.validate_architecture()
        self.config, self.depth = config, depth  # depth: layers of the model, for initialisation
        self.sizes = config.num_heads, config.head_dim, config.n_groups, config.state_size
        h, p, g, n = self.sizes
        self.widths = [h * p, h * p + 2 * g * n, h]  # of z, of x, B and C together, and of dt
        self.in_proj = nn.Linear(config.hidden_size, sum(self.widths), bias=config.use_bias)
        self.conv1d = CausalConv1d(self.widths[1], config.conv_kernel, config.use_conv_bias)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(h)) for _ in range(3))
        self.norm = RMSNorm(h * p, config.layer_norm_epsilon, groups=g) if config.rmsnorm else None
        self.out_proj = nn.Linear(h * p, config.hidden_size, bias=config.use_bias)
        self.reset_parameters()
        self.to(device, dtype)

    @torch.no_grad()
    def reset_parameters(self):
        """Draw new weights as the original does, for a model of `depth` layers: projections and
        convolution uniform in +-1/sqrt(fan_in), out_proj divided by sqrt(depth)."""
        config = self.config
        for module in filter(None, (self.in_proj, self.out_proj, self.conv1d, self.norm)):
            module.reset_parameters()
        self.out_proj.weight.div_(self.depth**0.5)
        if config.use_bias:
            nn.init.zeros_(self.in_proj.bias)
            nn.init.zeros_(self.out_proj.bias)
        nn.init.ones_(self.D)
        A = torch.empty_like(self.A_log, dtype=torch.float32).uniform_(1, 16)
        self.A_log.copy_(A.log())
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt = torch.empty_like(A).uniform_(low, high).exp().clamp(min=config.time_step_floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def initial_state(self, batch: int) -> Mamba2State:
        """The state before the first position: zeros, float32 at least."""
        h, p, _, n = self.sizes
        options = dict(device=self.A_log.device, dtype=_at_least_float32(self.A_log.dtype))
        conv = torch.zeros(batch, self.config.conv_kernel - 1, self.widths[1], **options)
        return Mamba2State(conv, torch.zeros(batch, h, p, n, **options))

    def step(self, u, state=None, mask=None, seq_idx=None, group=None, *, starts=None):
        """y (b, l, d) and the Mamba2State after u (b, l, d), for prefill and for decoding.
        state: the Mamba2State of an earlier call, or None: zeros.
        mask: (b, l), bool or 0/1, or None. Masked positions are skipped, wherever they occur, as if
            they had been left out; their own outputs are 0.
        seq_idx: (b, l) integers or None: labels of packed sequences, as in `ssd`.
        group: a process group, if each rank has a slice of the sequence, see `Slices`. The new
            state is then that after this rank's slice.
        starts: (b, l) bool, instead of seq_idx: where sequences begin, at the first position too.
        """
        layout, u = self._sorted(u, mask, group, seq_idx=seq_idx, starts=starts)
        y, state = self(u, state, layout=layout)  # not forward, so that hooks run
        return layout.restore(y), state

    def forward(
        self, u, state=None, mask=None, seq_idx=None, group=None, *, starts=None, layout=None
    ):
        """y of `step`. With a `layout`, u is sorted by it: then y, sorted too, and the state."""
        if layout is not None:
            return self._run(u, state, layout)
        layout, u = self._sorted(u, mask, group, seq_idx=seq_idx, starts=starts)
        return layout.restore(self._run(u, state, layout)[0])

    def _sorted(self, u, mask, group, **rows):
        """The Layout for these arguments of `step`, and u sorted by it."""
        sizes = _require({}, "b l d", u=u)
        _require(sizes, "b l", "integers", **rows)
        if group is None:
            _, starts = targets_and_starts(mask=mask, **rows)
        else:
            _check("group", isinstance(self, Attention) and group, *NO_SLICES)
            _require(sizes, "b l", "a mask", mask=mask)  # before ranks communicate
            _, starts = Slices(group).gather(u, max(1, u.shape[1]), mask, **rows)
        layout = Layout.of(u, mask, group, starts)
        return layout, layout.sort(u)

    def _run(self, u, state, layout):
        """The layer itself, of sorted u: sorted y, and the new state."""
        _require({"d": self.config.hidden_size}, "b l d", u=u)
        zxbcdt = self.in_proj(u)
        if layout.slices:
            state = state or self.initial_state(len(u))
            zxbcdt, state = layout.slices.hand_over(zxbcdt, state, sends=False)
        state, fused = layout.begin(state), None
        if kernels and layout.skipped is None:
            fused = kernels.layer(self, zxbcdt, state, layout.seq_idx)
        y, conv, ssm = fused or self._convolve_and_scan(zxbcdt, state, layout)
        if layout.slices:
            y, _ = layout.slices.hand_over(y, (conv, ssm), sends=True)
        return self.out_proj(y), Mamba2State(conv, ssm)

    def _convolve_and_scan(self, zxbcdt, state, layout):
        """All between the projections: y (b, l, h p), and conv and ssm of the new state."""
        h, p, g, n = self.sizes
        z, xBC, dt = zxbcdt.split(self.widths, dim=-1)
        dtype = _at_least_float32(dt.dtype)
        dt = F.softplus(dt + self.dt_bias.to(dtype)).clamp(*self.config.time_step_limit)
        if layout.skipped is not None:  # at dt = 0 the state does not change
            dt = _erase(dt, layout.skipped)  # (b, l, h)
        A = -torch.exp(self.A_log.to(dtype))  # (h)

        conv, ssm = state or (None, None)
        options = dict(seq_idx=layout.seq_idx, length=layout.length)
        convolved, new_conv = self.conv1d(xBC, initial_state=conv, **options)
        x, B, C = convolved.split([h * p, g * n, g * n], dim=-1)
        x = x.unflatten(2, (h, p))  # (b, l, h, p)
        B, C = (t.unflatten(2, (g, n)) for t in (B, C))  # (b, l, g, n)
        # Differs: published configs say 256, for the original's kernels; plain PyTorch prefers 64.
        options = dict(chunk_size=min(self.config.chunk_size, 64), seq_idx=layout.seq_idx)
        y, new_ssm = ssd(x, dt, A, B, C, self.D, initial_state=ssm, **options)
        del convolved, x, B, C  # frees their memory for the norm
        new_ssm = new_ssm if ssm is None else new_ssm.to(ssm.dtype)
        y = y.flatten(2)  # (b, l, h p)
        y = self.norm(y, gate=z) if self.norm else (y * F.silu(z.to(dtype))).to(z.dtype)
        return y, new_conv, new_ssm


# ---- 3. The language model -----------------------------------------------------------------------


class Mamba2Block(nn.Module):
    """A residual block: hidden + mixer(norm(hidden)), (b, l, d), and the new state. In a hybrid
    the mixer may be attention, and hidden + mlp(norm2(hidden)) may follow."""

    def __init__(self, config: Mamba2Config, attends: bool = False):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        if attends:
            self.mixer = Attention(config.hidden_size, **config.attn_cfg or {})
        else:
            self.mixer = Mamba2(config, depth=config.num_hidden_layers)
        self.mlp = None
        if config.d_intermediate:
            self.norm2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
            self.mlp = GatedMLP(config.hidden_size, config.d_intermediate)

    def forward(self, hidden, state=None, layout=None):
        plain = all(part is None for part in layout or ())
        if kernels and plain and not self.mlp and (fused := kernels.block(self, hidden, state)):
            return fused[0], Mamba2State(*fused[1:])
        y, state = self.mixer(self.norm(hidden), state, layout=layout or Layout())
        hidden = hidden + y
        return (hidden + self.mlp(self.norm2(hidden)) if self.mlp else hidden), state


class Mamba2Backbone(nn.Module):
    """Embedding, residual blocks, final norm: from ids (b, l) or embeddings (b, l, d), and the
    Mamba2Cache of the tokens before, to hidden (b, l, d) and the new cache. mask, starts and group
    as in `Mamba2.step`, but the new cache is that of the whole sequence on every rank. To the list
    hidden_states it appends the input of each block, and hidden."""

    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        layers, attends = range(config.num_hidden_layers), config.attn_layer_idx or ()
        _check("attn_layer_idx", attends, f"must be in {layers}", lambda v: {*v} <= {*layers})
        self.layers = nn.ModuleList(Mamba2Block(config, i in attends) for i in layers)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(
        self, x, cache=None, mask=None, starts=None, group=None, hidden_states=None, use_cache=True
    ):
        hidden = x if x.is_floating_point() else self.embeddings(x.long())  # (b, l, d)
        if self.config.residual_in_fp32:
            hidden = hidden.to(_at_least_float32(hidden.dtype))
        cache = Mamba2Cache(()) if cache is None else cache
        layout = Layout.of(hidden, mask, group, starts)
        hidden, new_states = layout.sort(hidden), []
        states = cache.states or [None] * len(self.layers)
        wanted = len(self.layers), len(x)
        found = (len(states), len(states[0][0])) if cache.states else wanted
        rule = f"must be {wanted}: for samples or beams, pass cache.repeat(n)"
        _check("(layers, rows) of the cache", found, rule, lambda found: found == wanted)
        for block, state in zip(self.layers, states, strict=True):
            if hidden_states is not None:
                hidden_states.append(layout.restore(hidden))
            run = functools.partial(block, layout=layout)
            if self.gradient_checkpointing and self.training:
                run = functools.partial(_computed_again, block, run)
            hidden, state = run(hidden, state)
            new_states.append(state if use_cache else None)  # None frees its memory
        hidden = layout.restore(self.norm_f(hidden))
        if hidden_states is not None:
            hidden_states.append(hidden)
        if not use_cache:
            return hidden, None
        # A tensor: torch.compile would make a graph for each int.
        length = torch.full((), hidden.shape[1], device=hidden.device)
        if group is not None:
            dist.all_reduce(length, group=group)
            new_states = layout.slices.last(new_states)
        return hidden, Mamba2Cache(tuple(new_states), cache.length + length)


class Mamba2LM(nn.Module):
    """The bare language model (Section 9.2): from ids (b, l) and the Mamba2Cache of earlier ones to
    logits (b, l, vocabulary) and the new cache."""

    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.backbone = Mamba2Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        nn.init.normal_(self.backbone.embeddings.weight, std=config.initializer_range)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight

    def forward(self, ids, cache=None):
        hidden, cache = self.backbone(ids, cache)
        return self.lm_head(hidden), cache


# This is the whole model. What follows makes it usable.


# ---- 4. Helpers of sections 1 to 3 ---------------------------------------------------------------


def _prepare(x, dt, A, B, C, D, initial_state, seq_idx):
    """Check the arguments of SSD; return log_decay, D and state, as in `ssd_recurrent`, in float32
    at least. -inf, where a packed sequence begins, erases the state (Section 8.3)."""
    sizes = _require({}, "b l h p", x=x)
    _require(sizes, "b l h", dt=dt)
    _require(sizes, "h", A=A)
    _require(sizes, "b l g n", B=B, C=C)
    rule = f"groups of B and C, must divide the {sizes['h']} heads of x"
    _check("g", sizes["g"], rule, lambda g: g > 0 and sizes["h"] % g == 0)
    _require(sizes, "h p" if getattr(D, "ndim", 1) == 2 else "h", D=D)
    _require(sizes, "b h p n", initial_state=initial_state)
    _require(sizes, "b l", "integers", seq_idx=seq_idx)
    dtype = _at_least_float32(x.dtype)
    log_decay = dt.to(dtype) * A.to(dtype)
    if seq_idx is not None:
        log_decay = log_decay.masked_fill(_borders(seq_idx)[..., None], -torch.inf)
    D = None if D is None else D.reshape(sizes["h"], -1).to(dtype)
    state = x.new_zeros([sizes[a] for a in "bhpn"]) if initial_state is None else initial_state
    if x.shape[1] == 0:  # times 1, so that dt and A have gradients
        state = state * log_decay.sum(1).exp()[..., None, None]
    return log_decay, D, state.to(dtype)


class Layout(NamedTuple):
    """Which positions count, and where sequences begin, computed once for all layers. It sorts
    masked positions to the end of a row, a b c d e with mask 1 0 0 1 1 to a d e b c: the
    convolution then sees only positions that count, and SSD skips the rest with dt = 0."""

    length: Tensor | None = None  # (b, 1), with a mask: how many positions of a row count
    skipped: Tensor | None = None  # (b, l) bool, after sorting: the positions that do not count
    source: Tensor | None = None  # (b, l), where sorted positions come from
    slices: Slices | None = None
    seq_idx: Tensor | None = None  # (b, l), sorted: number of its sequence, 0 is the state's

    @classmethod
    def of(cls, x, mask=None, group=None, starts=None):
        """The layout of x (b, l, ...), with arguments as in `Mamba2.step`."""
        _require(dict(b=x.shape[0], l=x.shape[1]), "b l", "a mask", mask=mask)
        number = None if starts is None else starts.bool().cumsum(1)
        length = skipped = source = None
        if mask is not None:
            skipped, source = (~mask.bool()).sort(dim=1, stable=True)
            length = (~skipped).sum(1, keepdim=True)
            if number is not None:  # a start after the last position erases the new state
                number = torch.where(skipped, number[:, -1:], _take(number, source))
        return cls(length, skipped, source, None if group is None else Slices(group), number)

    def sort(self, x):
        """x (b, l, ...) sorted, with 0 at masked positions, even where x is NaN."""
        return x if self.skipped is None else _erase(_take(x, self.source), self.skipped)

    def restore(self, x):
        """The inverse of `sort`; masked positions are 0."""
        if self.skipped is None:
            return x
        return _take(_erase(x, self.skipped), self.source.argsort(dim=1))

    def begin(self, state):
        """The state before; erased where the first position begins another sequence."""
        if state is None or self.seq_idx is None:
            return state
        begins = self.seq_idx[:, :1].any(1)
        return state.map(lambda tensor: _erase(tensor, begins))


def targets_and_starts(labels=None, mask=None, seq_idx=None, position_ids=None, starts=None):
    """targets (b, l) or None: the label of the next unmasked position; -100 at masked ones, and at
    the last of a sequence. starts (b, l) or None: as given, of which a masked one is the next
    position's; or where unmasked seq_idx change; or unmasked position_ids are 0 or do not grow."""
    if seq_idx is not None and starts is not None:
        raise ValueError("seq_idx and starts both say where sequences begin: pass one of them")
    targets, given = None, [t for t in (labels, seq_idx, position_ids, starts) if t is not None]
    layout = Layout.of(given[0], mask) if given else None
    if seq_idx is not None:
        starts = layout.restore(_borders(layout.sort(seq_idx.long())))
    elif starts is None and position_ids is not None:
        position = layout.sort(position_ids.long())
        before = F.pad(position, (1, 0), value=-1)[:, :-1]
        starts = layout.restore((position == 0) | (position <= before))
    if labels is not None:
        targets = layout.sort(labels.long() + 100)  # the 0 of sort and restore is then -100
        if starts is not None:
            targets = _erase(targets, _borders(Layout.of(labels, mask, starts=starts).seq_idx))
        targets = layout.restore(F.pad(targets, (0, 1))[:, 1:]) - 100
    return targets, starts


def _erase(x, where):
    """x with 0 where `where` is True; `where` has x's first axes."""
    if x.shape[: where.dim()] != where.shape:  # PyTorch would broadcast it
        raise ValueError(f"a state has shape {tuple(x.shape)}: it must be for {len(where)} rows")
    return x.masked_fill(where[(..., *[None] * (x.dim() - where.dim()))], 0)


@dataclass(eq=False, repr=False)
class Mamba2Cache:
    """The states of all layers after some tokens, immutable, of constant size unless a layer is
    attention. torch.save writes it to a file, torch.load reads it."""

    states: tuple[Mamba2State | AttentionState, ...]
    length: Tensor | int = 0  # tokens seen, masked ones too: a tensor () after a forward pass

    # For transformers' generate, which passes only unread tokens if no layer is_linear.
    is_compileable, is_croppable, is_linear = False, False, (False,)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self.length)

    def map(self, function, *others: Mamba2Cache) -> Mamba2Cache:
        """As `Mamba2State.map`, for all layers; length stays."""
        layers = zip(self.states, *(cache.states for cache in others), strict=True)
        states = tuple(state.map(function, *layer) for state, *layer in layers)
        return Mamba2Cache(states, self.length)

    detach = Mamba2State.detach

    def select(self, rows) -> Mamba2Cache:
        """Rows of the batch: integers, or a bool mask."""
        return self.map(lambda tensor: tensor[torch.as_tensor(rows, device=tensor.device)])

    def repeat(self, times: int) -> Mamba2Cache:
        """Each row `times` times in succession, (b) to (b times): this forks a prompt."""
        return self.map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    @staticmethod
    def cat(caches) -> Mamba2Cache:
        """The rows of several caches in one batch. Its length is the longest: pad sequences that
        are passed whole with it later to that, on the left."""
        first, *others = caches
        joined = first.map(lambda *tensors: torch.cat(tensors), *others)
        return replace(joined, length=max(c.get_seq_length() for c in (first, *others)))

    def to(self, *args, **kwargs) -> Mamba2Cache:
        states = tuple(state.to(*args, **kwargs) for state in self.states)
        return Mamba2Cache(states, self.get_seq_length())


def _take(x, index):
    """x (b, l, ...) at the positions index (b, m), or (m) for all rows: (b, m, ...)."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


def _borders(seq_idx):
    """(b, l) bool: where another sequence begins; never the first position."""
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))[:, : seq_idx.shape[1]]


def _at_least_float32(dtype):
    return torch.promote_types(dtype, torch.float32)


def _computed_again(module, function, *inputs):
    """function(*inputs), computed again in the backward pass, which raises if the module's weights
    have changed meanwhile: `checkpoint` looks at tensors that it is passed."""
    count = len(inputs)  # `run` must not hold the inputs
    run = lambda *given: function(*given[:count])
    return checkpoint(run, *inputs, *module.parameters(), use_reentrant=False)


def _readable(x):
    """Whether x's values are known: not on the meta device, nor while PyTorch traces."""
    return not (x.is_meta or torch.compiler.is_compiling())


def _check(name, value, rule, holds):
    try:
        fits = holds(value)
    except (TypeError, ArithmeticError):  # of a wrong type, or 0
        fits = False
    if not fits:
        raise ValueError(f"{name} = {value!r}: {rule}")


def _require(sizes, axes, kind="floating-point numbers", **tensors):
    """Raise unless each tensor is None, or has axes as in "b l h" and numbers of that kind; "a
    mask" of floats must hold 0 and 1. Add sizes, by letter, to `sizes`; return it."""
    letters = axes.split()
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}: it must be a tensor")
        known = [sizes.setdefault(*pair) for pair in zip(letters, tensor.shape, strict=False)]
        if len(letters) != tensor.dim() or known != [*tensor.shape]:
            wanted = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must be ({wanted})")
        found = "floating-point numbers" if tensor.is_floating_point() else "integers"
        if tensor.is_complex() or kind not in (found, "a mask"):
            raise TypeError(f"{name} is {tensor.dtype}: it must be a tensor of {kind}")
        if kind == "a mask" and tensor.is_floating_point() and tensor.numel() and _readable(tensor):
            rule = "must hold 0 and 1, not 0 alone: if it is additive, pass mask == 0"
            if not ((tensor == 0) | (tensor == 1)).all() or not tensor.any():
                raise ValueError(f"{name}, a float mask, {rule}")
    return sizes


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """For `AdamW(parameter_groups(model, 0.1), lr=...)`: projections, convolutions and embeddings
    decay; parameters of one dimension (A_log, D, dt_bias, norms, biases) do not."""
    trained = [t for t in model.parameters() if t.requires_grad]
    decays, others = [t for t in trained if t.dim() > 1], [t for t in trained if t.dim() <= 1]
    return [dict(params=decays, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]


# ---- 5. Configuration ----------------------------------------------------------------------------

# What an option may be: a rule, and its test. ANY: no rule, or one elsewhere.
ANY = "", lambda value: True
COUNT = "must be an integer of at least 1", lambda v: type(v) is int and v >= 1
WIDTH = "must be an integer of at least 0", lambda v: type(v) is int and v >= 0
POSITIVE = "must be a positive number", lambda v: 0 < v < math.inf
LENGTH = "must be 'auto', or an integer of at least 0", lambda v: v == "auto" or WIDTH[1](v)
SWITCH = "must be True or False", lambda v: isinstance(v, bool)
SILU = "only 'silu' is implemented, also called 'swish'", lambda v: v in ("silu", "swish")
NO_SLICES = "attention has no slices: leave out group, or use DDP or FSDP2", lambda v: not v
LIMITS = "must be (low, high), 0 <= low <= high", lambda v: len(v) == 2 and 0 <= v[0] <= v[1]

OPTIONS = [  # name in transformers, in the paper's code, default, what it may be, meaning
    ("hidden_size", "d_model", 768, COUNT, "width of the model"),
    ("num_hidden_layers", "n_layer", 24, COUNT, "number of layers"),
    ("vocab_size", None, 50288, COUNT, "rows of the embedding"),
    ("state_size", "d_state", 128, COUNT, "n, size of the state of one channel"),
    ("head_dim", "headdim", 64, COUNT, "p, channels per head"),
    ("n_groups", "ngroups", 1, COUNT, "g, groups of heads that share B and C"),
    ("expand", None, 2, POSITIVE, "inner width / hidden_size, may be a fraction"),
    ("num_heads", "nheads", None, ANY, "h; None: expand * hidden_size / head_dim"),
    ("conv_kernel", "d_conv", 4, COUNT, "k, taps of the short convolution"),
    ("chunk_size", None, 256, COUNT, "chunk length; above 64 means 64; speed only"),
    ("segment_length", None, 0, LENGTH, "positions read at a time, 0: all; memory and speed"),
    ("hidden_act", "activation", "silu", SILU, "of convolution and gate"),
    ("use_bias", "bias", False, SWITCH, "biases in in_proj and out_proj"),
    ("use_conv_bias", "conv_bias", True, SWITCH, "bias in the convolution"),
    ("time_step_limit", "dt_limit", (0.0, math.inf), LIMITS, "dt is always clamped to this"),
    ("time_step_min", "dt_min", 0.001, POSITIVE, "lower bound of the initial dt, log-uniform"),
    ("time_step_max", "dt_max", 0.1, POSITIVE, "upper bound of the initial dt"),
    ("time_step_floor", "dt_init_floor", 1e-4, ANY, "least value of the initial dt"),
    ("layer_norm_epsilon", "norm_epsilon", 1e-5, POSITIVE, "of every RMSNorm"),
    ("rmsnorm", None, True, SWITCH, "an RMSNorm in the layer, after the gate"),
    ("residual_in_fp32", None, True, SWITCH, "residual stream, also with half-precision weights"),
    ("initializer_range", None, 0.02, ANY, "standard deviation of a new embedding"),
    ("tie_word_embeddings", "tie_embeddings", True, SWITCH, "the head is the embedding"),
    ("bos_token_id", None, 0, ANY, "first token of a text"),
    ("eos_token_id", None, 0, ANY, "last token of a text"),
    ("pad_token_id", None, 0, ANY, "token that fills up rows"),
    ("use_cache", None, True, ANY, "return a cache, unless in training or with labels"),
    ("attn_layer_idx", None, None, ANY, "layers with attention instead, counted from 0"),
    ("attn_cfg", None, None, ANY, "a dict of options of `Attention`"),
    ("d_intermediate", None, 0, WIDTH, "width of an MLP after each layer; 0 is none"),
]
_DEFAULTS = {name: default for name, _, default, *_ in OPTIONS}
# Options of every transformers configuration, and those of its Mamba-2 that have no effect here.
_COMMON = {*dir(PreTrainedConfig()), "attn_implementation", "experts_implementation"}
_COMMON |= {"rescale_prenorm_residual", "time_step_rank"}
# Options of other programs, with the only value that is implemented here.
_OTHERS = dict(model_type="mamba2", layer="Mamba2", rms_norm=True, norm_before_gate=False)
_OTHERS |= dict(D_has_hdim=False, d_inner=None, d_ssm=None, attn=None)


class Mamba2Config(PreTrainedConfig):
    """The options of a Mamba-2 model, listed in `OPTIONS`; the defaults are `mamba2-130m`'s. Each
    can be passed under both names, and with transformers also read and set under both. Options of
    all transformers configurations are accepted too."""

    model_type = "mamba2"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {alias: name for name, alias, *_ in OPTIONS if alias is not None}
    attribute_map["norm_eps"] = "layer_norm_epsilon"  # in flash-linear-attention

    def __init__(self, **options):
        given = {self.attribute_map.get(name, name): value for name, value in options.items()}
        if len(given) < len(options):
            raise TypeError(f"{sorted(options)} has two names of one option: give one of them")
        if unknown := given.keys() - _DEFAULTS.keys() - _COMMON:
            raise TypeError(f"Mamba2Config has no option {min(unknown)!r}: see mamba2.OPTIONS")
        for name, default in _DEFAULTS.items():
            setattr(self, name, given.pop(name, default))
        super().__init__(**given)
        # For transformers' own Mamba-2, which would scale loaded weights again.
        self.rescale_prenorm_residual = False
        # Differs: PEFT refuses LoRA on out_proj for "mamba2", since transformers does not call that
        # module. This file does. In saved files, model_type is "mamba2".
        self.model_type = "mamba2-single-file"
        self.validate_architecture()

    def validate_architecture(self):
        """Compute num_heads, and check all options."""
        self.time_step_limit = tuple(self.time_step_limit)  # JSON has no tuples
        for name, alias, _, rule, _ in OPTIONS:
            _check(f"{name} ({alias})" if alias else name, getattr(self, name), *rule)
        p, inner = self.head_dim, round(self.expand * self.hidden_size, 6)
        if self.num_heads is None:
            self.num_heads = round(inner / p)
        h = self.num_heads
        rule = f"times head_dim (headdim) = {p} must be expand * hidden_size (d_model) = {inner:g}"
        _check("num_heads (nheads)", h, rule, lambda h: COUNT[1](h) and h * p == inner)
        _check("n_groups", self.n_groups, f"must divide num_heads = {h}", lambda g: h % g == 0)

    def to_dict(self):
        """As in transformers, but num_heads is None for rmsnorm=False and for hybrids, so that its
        own Mamba-2, which would misread them, refuses the file."""
        theirs = self.rmsnorm and not (self.attn_layer_idx or self.d_intermediate)
        return super().to_dict() | ({} if theirs else {"num_heads": None})

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Read a `config.json`, in transformers' format or in the original one. What is not
        implemented is a ValueError."""
        options, theirs = dict(config_dict), {}
        if "ssm_cfg" in options:  # the original, such as state-spaces/mamba2-130m's
            ssm_cfg, multiple = options.pop("ssm_cfg"), options.pop("pad_vocab_size_multiple", 8)
            only_attention = len(options.get("attn_layer_idx") or ()) == options.get("n_layer")
            layer = "Mamba2" if only_attention else "Mamba1"
            options = {"layer": layer, **options, **ssm_cfg, "model_type": "mamba2"}
            _check("pad_vocab_size_multiple", multiple, *COUNT)
            options["vocab_size"] += -options["vocab_size"] % multiple
        elif "model_type" in options:
            if "norm_eps" not in options:  # not flash-linear-attention's
                options.pop("norm_before_gate", None)  # transformers writes it, and never reads it
            if "emb_initializer_range" in options:  # mamba2-torch, which computes the heads
                options.pop("num_heads", None)
            else:  # transformers, with defaults of its own
                theirs = transformers.Mamba2Config().to_dict()
        for name, only in _OTHERS.items():
            value = options.pop(name, only)
            if value != only and (value or only):  # None means False, 0 or []
                raise ValueError(f"{name} = {value!r}: only {only!r} is implemented")
        there = {cls.attribute_map.get(name, name) for name in options}
        options |= {name: theirs[name] for name in _DEFAULTS.keys() & theirs.keys() - there}
        others = options.keys() - {*_DEFAULTS, *cls.attribute_map, *_COMMON}
        extra = {name: options.pop(name) for name in others}  # without meaning here
        config = super().from_dict(options, **kwargs)
        vars(config[0] if isinstance(config, tuple) else config).update(extra)
        return config


# ---- 6. transformers: cache, loss, segments, loading, generation ---------------------------------

# transformers' name of the cache.
CACHE = "cache"
if transformers and not hasattr(CausalLMOutputWithPast, CACHE):  # before 5.24
    CACHE = "past_key_values"

    class CausalLMOutputWithPast(CausalLMOutputWithPast):
        cache = property(lambda self: self.past_key_values)


class Mamba2PreTrainedModel(PreTrainedModel):
    """A backbone, and how weights are drawn, loaded and saved. Subclasses add a head."""

    config_class = Mamba2Config
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Mamba2Block"]  # for device_map

    def __init__(self, config: Mamba2Config):
        super().__init__(config)
        self.backbone = Mamba2Backbone(config)

    def get_input_embeddings(self):
        return self.backbone.embeddings

    def set_input_embeddings(self, embeddings):
        self.backbone.embeddings = embeddings

    def _init_weights(self, module):
        if isinstance(module, (Mamba2, CausalConv1d, nn.Linear)):
            if not getattr(next(module.parameters()), "_is_hf_initialized", False):  # by loading
                module.reset_parameters()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a hub name or folder in mamba_ssm's, transformers' or Codestral's format. Weights
        that do not fit the config are a ValueError, of other shapes transformers' RuntimeError."""
        name, wants_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        kwargs.setdefault("key_mapping", {r"backbone\.embedding\.": "backbone.embeddings."})
        model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        if wrong := {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}:
            hint = "_keys_to_ignore_on_load_missing may name weights that a class of yours adds"
            raise ValueError(f"{str(name)!r} does not fit {cls.__name__}: {wrong}; {hint}")
        head, tied = model.get_output_embeddings(), model.config.tie_word_embeddings
        rule = "its lm_head.weight is not the embedding: pass tie_word_embeddings=False"
        same = head is None or head.weight is model.get_input_embeddings().weight
        _check("tie_word_embeddings", tied, rule, lambda tied: same or not tied)
        return (model, info) if wants_info else model

    def save_pretrained(self, *args, save_original_format=False, **kwargs):
        """As in transformers, but always with this file's names of weights."""
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)


class Mamba2ForCausalLM(Mamba2PreTrainedModel, GenerationMixin):
    """The language model, for transformers' generate, Trainer, PEFT and pipelines."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}
    _supports_default_dynamic_cache = classmethod(lambda cls: False)  # else 5.17 makes one
    _is_stateful = True  # a state cannot be rewound, as speculative decoding needs
    _reorder_cache = staticmethod(lambda cache, rows: cache.select(rows))  # of beams

    def __init__(self, config: Mamba2Config):
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, cache=None, inputs_embeds=None, labels=None,
        use_cache=None, logits_to_keep=None, output_hidden_states=None, *, seq_idx=None, group=None,
        num_items_in_batch=None, segment_length=None, past_key_values=None, **others,
    ):  # fmt: skip
        """Logits, and with `labels` the loss. Arguments are those of all transformers models, and:
        attention_mask: `Mamba2.step`'s mask, or longer on the left, for what the cache has seen.
        cache, or past_key_values: the Mamba2Cache of an earlier call, or one of your own states.
        labels: (b, l), the tokens, or -100: see `targets_and_starts`.
        logits_to_keep: how many last positions get logits, or a tensor of indices; 0 is all. None
            is all, but with labels no position at all, if in training or in several segments.
        seq_idx: as in `Mamba2.step`; or None: position_ids, see `targets_and_starts`.
        group: as in `Mamba2.step`; caches and loss are those of the whole sequence.
        segment_length: positions in a segment (of this rank, with a group), see `_in_segments`;
            "auto" for about the least memory; 0 for all at once; None: the config's.
        """
        past = _one_cache(cache, past_key_values)
        text = past if kernels and isinstance(past, kernels.Text) else None  # generate on CUDA
        logits = text and text.decode(input_ids, attention_mask, output_hidden_states)
        if logits is not None:
            return CausalLMOutputWithPast(logits=logits, **{CACHE: text})
        # generate passes its tokenizer on to the model.
        position_ids, _ = others.pop("position_ids", None), others.pop("tokenizer", None)
        rows = dict(seq_idx=seq_idx, position_ids=position_ids, labels=labels)
        seen = text or past.states
        x, mask = _inputs(input_ids, inputs_embeds, attention_mask, others, seen, **rows)
        b, l = x.shape[:2]
        length = self._segment_length(segment_length, b, l, group)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        if group is None:
            targets, starts = targets_and_starts(mask=mask, **rows)
        else:
            _check("attn_layer_idx", self.config.attn_layer_idx, *NO_SLICES)
            # Must be equal on all ranks, or a rank would wait forever.
            same = dict(items=num_items_in_batch is not None, states=len(past.states))
            same |= dict(segments=max(1, -(-l // length)), cache=use_cache, training=self.training)
            same["checkpoints"] = self.backbone.gradient_checkpointing
            same |= {name: getattr(self.config, name) for name in _DEFAULTS}
            targets, starts = Slices(group).gather(x, length, mask, same, **rows)
        fits = lambda keep: keep is None or torch.is_tensor(keep) or WIDTH[1](keep)
        _check("logits_to_keep", logits_to_keep, f"{WIDTH[0]}, or a tensor", fits)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = [] if output_hidden_states else None
        no_logits = logits_to_keep is None and labels is not None and (self.training or l > length)
        first = l if no_logits else 0  # first position with logits
        if isinstance(logits_to_keep, int) and logits_to_keep > 0:
            first = max(0, l - logits_to_keep)
        whole, options = (x, mask, starts, targets), (use_cache, group, hidden_states)
        loss, hidden, cache = self._in_segments(whole, past, length, first, *options)
        if labels is not None:
            items = (targets != -100).sum()
            if group is not None:
                loss, items = (_SumOfRanks.apply(t, group) for t in (loss, items))
            loss = loss / (items if num_items_in_batch is None else num_items_in_batch)
        hidden = hidden[:, logits_to_keep] if torch.is_tensor(logits_to_keep) else hidden
        logits = None if no_logits else self.lm_head(hidden)
        states = hidden_states and tuple(hidden_states)
        cache = text.now(cache) if text else cache  # generate holds one Text throughout
        return CausalLMOutputWithPast(loss, logits, hidden_states=states, **{CACHE: cache})

    def _in_segments(self, whole, cache, length, first, use_cache, group, hidden_states):
        """Backbone and loss over a sequence, in segments of `length` positions, each from the state
        after the one before. Only these states are kept for the backward pass, which computes each
        segment again: for length s, memory grows as s + l / s; for the best s, as sqrt(l).
        whole: x (b, l) or (b, l, d); mask, starts and targets, (b, l) or None.
        Returns the summed loss or None; hidden from the position `first` on; the cache or None."""

        def run(x, mask, starts, targets, cache, keep_cache):
            hidden, cache = self.backbone(x, cache, mask, starts, group, hidden_states, keep_cache)
            return None if targets is None else self.summed_loss(hidden, targets), hidden, cache

        x, losses, kept = whole[0], [], []
        count = max(1, -(-x.shape[1] // length))
        again = count > 1 and torch.is_grad_enabled()
        call = functools.partial(_computed_again, self, run) if again else run
        pieces = [[None] * count if t is None else t.split(length, dim=1) for t in whole]
        if count > 1 and hidden_states is not None:
            raise ValueError("output_hidden_states holds all positions: use segment_length=0")
        # autocast's cache of a weight would sum its gradients of all segments in bfloat16.
        device = "cpu" if x.is_meta else x.device.type
        enabled = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=enabled, cache_enabled=False):
            for i, piece in enumerate(zip(*pieces, strict=True)):
                loss, hidden, cache = call(*piece, cache, use_cache or i < count - 1)
                losses.append(loss)
                if first < (i + 1) * length or i == count - 1:  # an empty view would keep hidden
                    kept.append(hidden[:, max(0, first - i * length) :])
        loss = None if losses[0] is None else sum(losses)
        return loss, torch.cat(kept, dim=1), cache

    def summed_loss(self, hidden, targets):
        """The summed cross entropy of hidden (b, l, d) and targets (b, l), -100 left out. Logits
        are computed part by part, and again for the backward pass if there are several parts."""

        def loss_of(hidden, targets):
            logits = self.lm_head(hidden)  # (positions, vocabulary)
            logits = logits.to(_at_least_float32(logits.dtype))
            return F.cross_entropy(logits, targets.to(logits.device), reduction="sum")

        # hidden_size positions: logits as large as the head's weight; a GPU is slow with fewer.
        size = max(self.config.hidden_size, 4096 if targets.is_cuda else 64)
        hidden, targets = hidden.flatten(0, 1).split(size), targets.flatten().split(size)
        parts = [*zip(hidden, targets, strict=True)]
        if len(parts) == 1:
            return loss_of(*parts[0])
        return sum(_computed_again(self.lm_head, loss_of, *part) for part in parts)

    def _segment_length(self, length, b, l, group):
        config = self.config
        length = config.segment_length if length is None else length
        _check("segment_length", length, *(LENGTH if group is None else WIDTH))
        if length == "auto":
            # Kept for the backward pass, per layer and channel: `state` numbers per segment, with
            # half of a hybrid's keys and values, and `position` per position of one segment.
            attention = len(config.attn_layer_idx or ()) / config.num_hidden_layers
            state, position = config.state_size + l * attention, 8
            if self.backbone.gradient_checkpointing:  # each layer's input, and all of one layer
                position = 1 / config.expand + 8 / config.num_hidden_layers
            length = math.ceil(math.sqrt(l * state / position))
            if self.device.type == "cuda":  # launching kernels has a cost
                length = max(length, 2**34 // max(1, b * config.hidden_size**2))
        return max(1, min(length or l, l))

    @torch.no_grad()
    def prefill(self, input_ids, attention_mask=None, cache=None, **options):
        """The Mamba2Cache after a prompt, read in segments: see `forward`."""
        fixed = dict(use_cache=True, return_dict=True, output_hidden_states=False, logits_to_keep=1)
        length = "auto" if options.get("group") is None else 0
        options = {"segment_length": length, **options, **fixed}
        return self(input_ids, attention_mask, cache, **options).cache

    def generate(self, inputs=None, generation_config=None, **options):
        """As in transformers, always with a cache; on CUDA, a step is a CUDA graph. With `cache`,
        ids are the whole sequence, or only new tokens with an attention_mask of it all; for n beams
        or samples per row, pass `cache.repeat(n)`. With `return_dict_in_generate=True`, the cache
        returned has seen all but the last token; it is None for beams and for several rows."""
        rule = "generate takes none: read the prompt with `prefill`, and pass its cache"
        for name in ("seq_idx", "position_ids", "group"):
            _check(name, options.get(name), rule, lambda value: value is None)
        mask, ids = options.get("attention_mask"), options.get("input_ids", inputs)
        rule = "must end in 1, where a row's next token is read: pad on the left"
        _check("attention_mask", mask, rule, lambda mask: mask is None or mask[:, -1:].all())
        cache = _one_cache(options.pop("cache", None), options.pop("past_key_values", None))
        given, seen = options.get("inputs_embeds"), cache.get_seq_length()
        given = ids if given is None else given
        count = 1 if given is None else given.shape[1]  # bos_token_id alone
        if mask is not None and not cache.states:
            rule = f"must be {count}, as there is no cache"
            _check("attention_mask's width", mask.shape[1], rule, lambda width: width == count)
        if count <= seen and (mask is None or mask.shape[1] == count):
            rule = "give the whole sequence and new tokens, or these with an attention_mask of all"
            raise ValueError(f"{count} tokens, and the cache has seen {seen}: {rule}")
        cache = Mamba2Cache(cache.states, cache.length)  # a copy, for transformers to mark
        cache = kernels.Text.of(self, cache) if kernels else cache
        options |= {CACHE: cache, "use_cache": True}
        output = super().generate(inputs, generation_config, **options)
        if isinstance(output, dict):
            several = len(output.sequences) > 1 or hasattr(output, "beam_indices")
            cache = None if several else Mamba2Cache(output[CACHE].states, output[CACHE].length)
            output[CACHE] = output.cache = cache
        return output

    def stream(self, input_ids, **options):
        """Yield the tokens (b) that `generate(input_ids, **options)` would append, one position at
        a time; neither beams nor several samples of a row. On CUDA, eight positions come at once,
        because looking for the end waits for the GPU."""
        rule = "stream takes none: it is an iterator, with a loop of its own"
        _check("streamer", options.get("streamer"), rule, lambda value: value is None)
        return self.generate(input_ids, custom_generate=type(self)._stream, **options)

    @torch.no_grad()
    def _stream(self, ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        """`stream`, with all prepared by transformers, until all rows have ended."""
        config = generation_config
        mode = config.get_generation_mode().value
        if mode not in ("greedy_search", "sample") or config.num_return_sequences != 1:
            raise ValueError(f"stream yields one text for a prompt; for {mode}, use generate")
        pads = config.eos_token_id if config.pad_token_id is None else config.pad_token_id
        pad = pads[0] if isinstance(pads, list) else pads
        pads_rows = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        waits = len(stopping_criteria) > 1  # else only the length ends a text
        output, running = None, torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        while output is None or ids.shape[1] < stopping_criteria.max_length:
            tokens, alive = [], []
            for _ in range(8 if ids.is_cuda else 1):
                if output is None:
                    output = self._prefill(ids, config, kwargs)
                else:
                    output = self(ids[:, -1:], cache=output.cache, use_cache=True, return_dict=True)
                scores = logits_processor(ids, output.logits[:, -1].float())
                if config.do_sample:
                    token = torch.multinomial(scores.softmax(-1), 1)[:, 0]
                else:
                    token = scores.argmax(-1)
                token = token.masked_fill(~running, pad) if pads_rows else token
                ids = torch.cat([ids, token[:, None]], dim=1)
                running = running & ~stopping_criteria(ids, scores) if waits else running
                tokens.append(token)
                alive.append(running)
                if ids.shape[1] >= stopping_criteria.max_length:
                    break
            alive = torch.stack(alive).any(1).tolist() if waits else [True] * len(tokens)
            for token, goes_on in zip(tokens, alive, strict=True):
                yield token
                if not goes_on:
                    return


class Mamba2ForSequenceClassification(Mamba2PreTrainedModel):
    """The backbone, and config.num_labels scores for each text, from its last unmasked token."""

    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_missing = ["score.weight"]
    _keys_to_ignore_on_load_unexpected = ["lm_head.weight"]

    def __init__(self, config: Mamba2Config):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, labels=None, inputs_embeds=None, **more):
        x, mask = _inputs(input_ids, inputs_embeds, attention_mask, more)
        hidden, _ = self.backbone(x, None, mask, use_cache=False)
        if mask is not None:
            hidden = _take(hidden, mask.cumsum(1).argmax(1, keepdim=True))
        logits, loss = self.score(hidden[:, -1]), None
        if labels is not None:
            loss = self.loss_function(labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss, logits)


def _one_cache(cache, past_key_values):
    """The cache, under either name, or an empty one."""
    given = [cache for cache in (cache, past_key_values) if cache is not None]
    kinds = (Mamba2Cache, kernels.Text) if kernels else Mamba2Cache
    fits = len(given) < 2 and all(isinstance(cache, kinds) for cache in given)
    _check("cache", given, "pass one Mamba2Cache, under one of its names", lambda _: fits)
    return given[0] if given else Mamba2Cache(())


def _inputs(ids, embeds, mask, others, seen=None, **rows):
    """Check, and return ids (b, l) or embeddings (b, l, d), and their mask (b, l), None if nothing
    is masked. If a cache has seen tokens, the mask may begin with theirs. rows: (b, l) or None."""
    others = [name for name, value in others.items() if value is not None and value is not False]
    if others:
        raise TypeError(f"forward() got an unexpected keyword argument {others[0]!r}")
    if (ids is None) == (embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    sizes = _require({}, "b l d", inputs_embeds=embeds)
    _require(sizes, "b l", "integers", input_ids=ids, **rows)
    if mask is not None:
        mask = mask[:, max(0, mask.shape[1] - sizes["l"]) :] if seen else mask
        _require(sizes, "b l", "a mask", attention_mask=mask)
        mask = None if _readable(mask) and mask.bool().all() else mask.bool()
    return embeds if ids is None else ids, mask


def register_with_transformers():
    """Make AutoConfig and AutoModelForCausalLM use this file for "mamba2"."""
    transformers.AutoConfig.register("mamba2", Mamba2Config, exist_ok=True)
    transformers.AutoModelForCausalLM.register(Mamba2Config, Mamba2ForCausalLM, exist_ok=True)


# ---- 7. One sequence on several GPUs -------------------------------------------------------------


class Slices:
    """Each rank of a process group has a slice of the sequence (Section 8.2), of any length, 0 too:

        model(ids, labels=ids, group=group).loss.backward()          # ids: (b, l of this rank)
        y, state = layer.step(u, state, mask, seq_idx, group)        # u: (b, l of this rank, d)

    For each layer and segment, a rank receives the state from the rank before, runs the layer, and
    sends the new state to the next: 4 b (h p n + (k-1) (h p + 2 g n)) bytes, twice that in float64.
    The backward pass goes the other way. Each of R ranks returns the loss of the whole sequence and
    has R times its slice's part of the gradient: the average, as in DDP and FSDP, is the gradient
    in one process. With segment_length, a rank has a slice of each segment:
    ids.unflatten(1, (-1, R, segment_length))[:, :, rank].flatten(1).
    """

    def __init__(self, group):
        rule = "must be a process group that this rank belongs to"
        _check("group", group, rule, lambda group: isinstance(group, dist.ProcessGroup))
        self.group, self.rank, self.ranks = group, dist.get_rank(group), dist.get_world_size(group)

    def gather(self, x, length, mask=None, same=None, **text):
        """`targets_and_starts` of the whole sequence, at this rank's positions, those of x, in
        slices of `length`. All ranks raise if their options `same` or their arguments differ."""
        text = {name: rows for name, rows in text.items() if rows is not None}
        same = dict(same or {}, batch=x.shape[0], dtype=x.dtype, arguments=[*text])
        autocast = torch.is_autocast_enabled(x.device.type)
        same |= dict(gradients=torch.is_grad_enabled(), autocast=autocast)
        every = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
        rows = [every * self.rank, every if mask is None else mask, *text.values()]
        rows, ranks = torch.stack([row.long() for row in rows]).cpu(), [None] * self.ranks
        dist.all_gather_object(ranks, (same, rows, length), group=self.group)
        for name in dict.fromkeys(name for options, *_ in ranks for name in options):
            values = [options.get(name) for options, *_ in ranks]
            rule = "one per rank, make them equal"
            _check(name, values, rule, lambda values: all(value == values[0] for value in values))
        parts = [rows.split(length, dim=2) for _, rows, length in ranks]
        segments = [torch.cat(slices, dim=2) for slices in zip(*parts, strict=True)]
        rank, mask, *rows = torch.cat(segments, dim=2).to(x.device)  # (b, l) of the whole sequence
        found = targets_and_starts(mask=mask.bool(), **dict(zip(text, rows, strict=True)))
        return [None if t is None else t[rank == self.rank].view(x.shape[:2]) for t in found]

    def hand_over(self, x, state, *, sends):
        """Send `state` to the next rank, or receive one like it from the rank before (the first
        keeps its own). Returns x and the state; `_Handover` says why x passes through."""
        # What is received always requires gradients, because the rank before waits for them.
        anchor = torch.zeros((), requires_grad=torch.is_grad_enabled() and not sends)
        peer = self.rank + (1 if sends else -1)
        x, conv, ssm = _Handover.apply(self.group, peer, sends, anchor, x, *state)
        return x, Mamba2State(conv, ssm.to(state[1].dtype))

    def last(self, states):
        """The states of the last rank, on all ranks."""
        erase = torch.full((), self.rank < self.ranks - 1, device=states[0].ssm.device)
        layers = (torch.stack(tensors) for tensors in zip(*states, strict=True))  # layers, b, ...
        layers = (_SumOfRanks.apply(t.masked_fill(erase, 0), self.group) for t in layers)
        return [Mamba2State(*pair) for pair in zip(*layers, strict=True)]


class _Handover(torch.autograd.Function):
    """`Slices.hand_over`. The state's gradient goes the other way; as x passes through, that comes
    before the gradients of what computed x."""

    @staticmethod
    def forward(ctx, group, peer, sends, anchor, x, *state):
        ctx.way = group, peer, sends
        return x, *_move(state, *ctx.way)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, *dstate):
        group, peer, sends = ctx.way
        moved = _move(dstate, group, peer, not sends)
        own = sends or peer < 0  # else the gradient is that of another rank's state
        return None, None, None, None, dx, *(moved if own else (None, None))


def _move(tensors, group, peer, sends):
    """Send the tensors to the rank `peer`, or receive such tensors; without such a rank, return
    them. They travel in float32 at least: the receiver's may have another dtype."""
    if not 0 <= peer < dist.get_world_size(group):
        return tensors
    moved = [t.to(_at_least_float32(t.dtype)).contiguous() for t in tensors]
    move, moved = (dist.isend, moved) if sends else (dist.irecv, [*map(torch.empty_like, moved)])
    moves = [dist.P2POp(move, tensor, group=group, group_peer=peer) for tensor in moved]
    for request in dist.batch_isend_irecv(moves):
        if not (sends and moved[0].is_cuda):  # NCCL itself keeps a tensor until it is sent
            request.wait()
    return tensors if sends else moved


class _SumOfRanks(torch.autograd.Function):
    """all_reduce, with a gradient."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        dist.all_reduce(x := x.clone(), group=group)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _SumOfRanks.apply(gradient.contiguous(), ctx.group), None


# ---- 8. Hybrids: attention and MLPs in the language model ----------------------------------------


class AttentionState(NamedTuple):
    """The state of an `Attention` layer, immutable, after m positions."""

    conv: Tensor  # (b, k-1, h p + 2 g p), the convolution's last inputs; k = 1 without one
    past: Tensor  # (b, m, 2 g, p), rotated keys, then values, in the dtype of in_proj(u)
    counts: Tensor  # (b, m) bool: False where masked, and in earlier packed sequences

    map, detach = Mamba2State.map, Mamba2State.detach

    def to(self, *args, **kwargs) -> AttentionState:
        device = self.past[:0].to(*args, **kwargs).device
        return self.map(lambda tensor: tensor.to(device))


class Attention(nn.Module):
    """Causal softmax attention with the interface of `Mamba2`, without slices, and with a state
    that grows; h num_heads, p head_dim, g num_heads_kv. Differs: initialisation ignores the depth.

        u ── in_proj ── q, k, v ── conv1d ── rotate q and k ── softmax(q k^T) v ── out_proj ── out

        layer = Attention(256, num_heads=4, causal=True)  # the original's options and defaults
        y, state = layer.step(u, state)
    """

    step, forward, _sorted = Mamba2.step, Mamba2.forward, Mamba2._sorted

    def __init__(
        self, d_model, num_heads, num_heads_kv=None, head_dim=None, causal=False, d_conv=0,
        rotary_emb_dim=0, rotary_emb_base=10000.0, rotary_emb_interleaved=False,
        softmax_scale=None, qkv_proj_bias=True, out_proj_bias=True,
    ):  # fmt: skip
        super().__init__()
        rule = "must divide d_model if there is no head_dim"
        _check("num_heads", num_heads, rule, lambda h: head_dim or d_model % h == 0)
        self.head_dim = p = head_dim or d_model // num_heads
        _check("causal", causal, "must be True", lambda v: v)
        _check("rotary_emb_interleaved", rotary_emb_interleaved, "must be False", lambda v: not v)
        self.rotary, self.scale = (rotary_emb_dim, rotary_emb_base), softmax_scale
        self.widths = [num_heads * p, *[(num_heads_kv or num_heads) * p] * 2]  # of q, k and v
        self.in_proj = nn.Linear(d_model, sum(self.widths), qkv_proj_bias)
        self.conv1d = CausalConv1d(sum(self.widths), d_conv, bias=True) if d_conv else None
        self.out_proj = nn.Linear(self.widths[0], d_model, out_proj_bias)

    def initial_state(self, batch: int, like: Tensor | None = None) -> AttentionState:
        """The state before the first position: m is 0."""
        zeros = (self.in_proj.weight if like is None else like).new_zeros
        k = self.conv1d.weight.shape[2] if self.conv1d else 1
        past = zeros(batch, 0, 2 * self.widths[1] // self.head_dim, self.head_dim)
        return AttentionState(zeros(batch, k - 1, sum(self.widths)), past, past[..., 0, 0].bool())

    def _run(self, u, state, layout):
        _check("group", layout.slices, *NO_SLICES)
        qkv = self.in_proj(u)  # (b, l, h p + 2 g p)
        state = layout.begin(state or self.initial_state(len(u), qkv))
        (conv, past, counts), number = state, layout.seq_idx  # 0 for the state's sequence
        number = qkv.new_zeros(qkv.shape[:2]).long() if number is None else number
        if self.conv1d:
            options = dict(seq_idx=layout.seq_idx, length=layout.length, silu=False)
            qkv, conv = self.conv1d(qkv, initial_state=conv, **options)
        index = torch.arange(qkv.shape[1], device=qkv.device)
        position = counts.sum(1, keepdim=True) + index  # (b, l)
        # Each packed sequence begins at 0.
        position = position - (position * _borders(number)).cummax(1).values
        q, k, v = (t.unflatten(2, (-1, self.head_dim)) for t in qkv.split(self.widths, dim=-1))
        q, k = (rotate(t, position, *self.rotary) for t in (q, k))
        options = dict(is_causal=True)  # faster than a mask
        if past.shape[1] > 0 or layout.seq_idx is not None:
            old = counts[:, None] & (number == 0)[..., None]  # (b, l, m)
            new = (number[..., None] == number[:, None]).tril()  # (b, l, l)
            options = dict(attn_mask=torch.cat([old, new], dim=2)[:, None])  # (b, 1, l, m + l)
        past = torch.cat([past.to(qkv.dtype), torch.cat([k, v], dim=2)], dim=1)
        k, v = past.chunk(2, dim=2)  # (b, m + l, g, p)
        options = dict(scale=self.scale, enable_gqa=q.shape[2] != k.shape[2], **options)
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), **options)
        new = number == number[:, -1:]  # of the last sequence
        new = new if layout.skipped is None else new & ~layout.skipped
        counts = torch.cat([counts & (number == 0).all(1, keepdim=True), new], dim=1)
        return self.out_proj(y.transpose(1, 2).flatten(2)), AttentionState(conv, past, counts)


def rotate(x, position, d, base):
    """Rotary embedding of x (b, l, h, p) at positions (b, l): of the first d channels, i and
    i + d/2 are a pair, rotated by base^(-2i/d) per position."""
    exponent = torch.arange(0, d, 2, dtype=_at_least_float32(x.dtype), device=x.device) / d
    angle = position[..., None, None] * base**-exponent  # (b, l, 1, d/2)
    a, b, rest = x.to(angle.dtype).tensor_split([d // 2, d], dim=-1)
    turned = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    return torch.cat([*turned, rest], dim=-1).to(x.dtype)


class GatedMLP(nn.Module):
    """fc2(y silu(gate)), y, gate = fc1(x); width is rounded up to a multiple of 128."""

    def __init__(self, d_model: int, width: int):
        super().__init__()
        width += -width % 128
        self.fc1 = nn.Linear(d_model, 2 * width, bias=False)
        self.fc2 = nn.Linear(width, d_model, bias=False)

    def forward(self, x):
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * F.silu(gate))


torch.serialization.add_safe_globals([Mamba2State, AttentionState, Mamba2Cache])  # for torch.load
if kernels:  # may stand in for calls of these
    kernels.register(nn.Linear, CausalConv1d, RMSNorm, Mamba2, Mamba2Block)
    kernels.register(Mamba2Backbone, Mamba2ForCausalLM, Mamba2State, Mamba2Cache)
