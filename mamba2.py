"""Mamba-2 in one readable file.

    Tri Dao and Albert Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms
    Through Structured State Space Duality", ICML 2024, https://arxiv.org/abs/2405.21060 ("the
    paper" below).

In reading order:

    1. ssd_recurrent, ssd_quadratic, ssd   the sequence transformation in three forms
    2. Mamba2              the layer: projections, short convolution, SSD, gated norm
    3. Mamba2LM            the language model: embedding, residual blocks, head
    4. helpers of 1 to 3   checks, masks
    5. Mamba2Config        sizes and options, under the paper's and under transformers' names
    6. Mamba2ForCausalLM   the model in transformers: cache, loss, loading, generation
    7. Slices              one sequence on several GPUs

One idea carries all of it: a layer is a pure function of its input and its state,

    y, state = layer.step(u, state)

for any number of positions. One call prefills, resumes, decodes one token in constant time, or
forks a prompt. Its inputs are never modified, and any split of a sequence into calls gives, up to
rounding, the result of one call.

    code   paper    meaning
    b               batch
    l      T        length of the sequence
    c               chunks
    q, s   Q        positions in a chunk: of the output (q) and of the input (s)
    d               width of the model, or any number of channels
    h      H        heads
    p      P        channels per head, headdim
    n      N        size of the state of one channel, d_state
    g      G        groups of heads that share B and C;  r = h / g heads per group
    k               taps of the short convolution, d_conv
    x      X        input of SSD, "values" in the language of attention
    dt     Δ        step size, one per head and position
    A               decay rate, one negative number per head; the paper's A_t is exp(dt A)
    B, C   B, C     "keys" and "queries": what is written to the state and read from it
    D      D        skip connection
    state  h_t      the state of a head, (p, n) numbers
    L      L        the decays between positions, a 1-semiseparable matrix

Sequences are "packed" if several lie one after another in the same row; masked positions are
skipped, wherever they occur. "The original" is the authors' package mamba_ssm. "Differs:" marks
where this file departs on purpose from it, from the paper or from transformers' Mamba-2, and why.

Sections 1 to 5 need torch and einops only. On CUDA, the fused kernels of `kernels.py` (if it lies
beside this file) take over where `kernels` is mentioned, and nowhere else: set `kernels = None` if
you change the mathematics here. MIT licence: copy this file into your own work as you like.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import importlib.util
import math
import sys
from dataclasses import dataclass
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
    from transformers.generation import MaxLengthCriteria, StoppingCriteriaList, StopStringCriteria
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
    from transformers.modeling_utils import load_state_dict
    from transformers.utils import can_return_tuple
except ImportError as error:
    if error.name != "transformers":  # transformers is there, but broken: show that
        raise
    transformers, can_return_tuple = None, lambda function: function
    GenerationMixin = StoppingCriteriaList = object

    class PreTrainedConfig:
        """Takes the place of transformers' class, so that the layer works without it."""

        def __getattr__(self, name):
            if name in type(self).attribute_map:
                return getattr(self, type(self).attribute_map[name])
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

        def __setattr__(self, name, value):
            super().__setattr__(type(self).attribute_map.get(name, name), value)

    class PreTrainedModel(nn.Module):
        """Takes the place of transformers' class, so that this file can be imported without it."""

        def __init__(self, *args, **kwargs):
            raise ImportError("this class needs transformers: pip install 'transformers>=5.17'")


def _load_kernels():
    """The module `kernels.py` beside this file, or None.

    It is loaded by path and under a name of its own: `import kernels` may find Hugging Face's
    package of that name, which transformers must go on finding.
    """
    path = Path(__file__).with_name("kernels.py")
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location(f"{__name__}_kernels", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


kernels = _load_kernels()


# --------------------------------------------------------------------------------------------------
# 1. SSD, the state space dual form of a selective state space model, in three forms
# --------------------------------------------------------------------------------------------------
#
# All three compute, for each head, the selective state space model of the paper's equation (2),
#
#     state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T        (p, n)
#     y_t     = state_t C_t + D x_t                             (p)
#
# where the paper's A_t is exp(dt_t A), its B_t is dt_t B_t (Listing 1: X is dt x, A is dt A), and
# D x is a skip connection. They share one signature:
#
#     y, final_state = form(x, dt, A, B, C, D, initial_state=..., seq_idx=...)
#
#     x               (b, l, h, p)       input
#     dt              (b, l, h)          step sizes, after softplus: at least 0
#     A               (h)                negative decay rates
#     B, C            (b, l, g, n)       input and output projections; g divides h
#     D               (h), (h, p), None  skip connection
#     initial_state   (b, h, p, n)       the state before the first position; None is zero
#     seq_idx         (b, l) integers    labels of packed sequences, or None. Where the label
#                                        changes, another sequence begins, from a zero state. The
#                                        initial state belongs to the first position's sequence.
#     y               (b, l, h, p)       in x's dtype
#     final_state     (b, h, p, n)       float32, or float64 if x is
#
# l may be 0, and gradients reach every floating-point input. Inside, everything is float32 (float64
# if x is), autocast or not: states and decay sums accumulate over many steps and need this
# precision. (The fused kernel keeps states and sums in float32 too, but rounds the operands of its
# products to x's dtype.) Shapes or dtypes that do not fit are a ValueError or a TypeError.


def _without_autocast(function):
    """Run `function(x, ...)` in the dtypes of its arguments, inside torch.autocast too."""

    @functools.wraps(function)
    def wrapped(x, *args, **kwargs):
        if not isinstance(x, Tensor) or x.device.type == "meta":  # meta tensors have no autocast
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return wrapped


@_without_autocast
def ssd_recurrent(x, dt, A, B, C, D=None, *, chunk_size=None, initial_state=None, seq_idx=None):
    """SSD step by step: equation (2) as it stands, the linear mode of Section 3.4.1.

    Time O(l p n) per head; memory O(p n), or O(l p n) if gradients are wanted. This is how a token
    is decoded, and the definition that the other forms are compared with. Arguments and results: at
    the head of this section. chunk_size has no effect: the forms are interchangeable.
    """
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
    """Sums over segments: out_qs = log_decay_(s+1) + ... + log_decay_q, so that exp(out) is L.

    (..., q) in, (..., q, s) out, floating point: 0 on the diagonal and -inf above it.

    Differs: Listing 1 takes the difference of two prefix sums, which loses the digits of a weak
    decay that follows a strong one, and has no value after an infinite one. This adds up each
    segment.
    """
    q = log_decay.shape[-1]
    lower = torch.ones(q, q, dtype=torch.bool, device=log_decay.device).tril()
    terms = log_decay[..., None].expand(*log_decay.shape, q).masked_fill(~lower.tril(-1), 0)
    # terms: log_decay_q where q > s, and 0 elsewhere. They are summed down each column s.
    return terms.cumsum(-2).masked_fill(~lower, -torch.inf)  # (..., q, s)


@_without_autocast
def ssd_quadratic(x, dt, A, B, C, D=None, *, chunk_size=None, initial_state=None, seq_idx=None):
    """SSD as masked attention: y = (L ∘ C B^T) (dt x), the quadratic mode of Section 5.1.

    C are the queries, B the keys, dt x the values, and the decays L take the place of the softmax.
    Time O(l^2 (n + p)) and memory O(l^2) per head. Arguments and results: at the head of this
    section. chunk_size has no effect: the forms are interchangeable.
    """
    log_decay, D, state = _prepare(x, dt, A, B, C, D, initial_state, seq_idx)
    if x.shape[1] == 0:
        return torch.zeros_like(x), state
    y, state = _quadratic_in_chunks(x, dt, log_decay, B, C, D, state, chunks=1)
    return y[0], state


@_without_autocast
def ssd(x, dt, A, B, C, D=None, *, chunk_size=64, initial_state=None, seq_idx=None):
    """SSD in chunks (Section 6, Listing 1): quadratic inside a chunk, recurrent between chunks.

    With q = chunk_size positions in a chunk: time O(l (q n / r + q p + p n)) per head, nearly all
    of it in matrix products; memory, beside the arguments, O(l p + p n), or O(l (p + q + p n / q))
    if gradients are wanted. chunk_size changes speed, not results. Arguments and results: at the
    head of this section. A fused kernel takes over where it can.

    Differs: Listing 1 takes all chunks at once, and the recurrence between them as one more matrix
    product. Here the recurrence is a loop, and chunks are taken in slabs of bounded size.

    Raises:
        ValueError: chunk_size < 1.
    """
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size!r}: it must be an integer of at least 1")
    options = dict(initial_state=initial_state, seq_idx=seq_idx)
    if kernels and kernels.takes_ssd(x, dt, A, B, C, D, **options):
        return kernels.ssd(x, dt, A, B, C, D, **options)
    if isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] <= 1:
        return ssd_recurrent(x, dt, A, B, C, D, **options)  # one position is a step
    log_decay, D, state = _prepare(x, dt, A, B, C, D, **options)
    b, l, h, _ = x.shape
    full, rest = divmod(l, chunk_size)
    slab = (SLAB_ON_GPU if x.is_cuda else SLAB) // max(1, b * h * chunk_size**2)
    slab = max(1, min(full, slab))
    sizes = [slab * chunk_size] * (full // slab) + [full % slab * chunk_size, rest]
    sizes = [size for size in sizes if size > 0]  # a few slabs of many chunks, then what is left
    ys = []
    for piece in zip(*(t.split(sizes, dim=1) for t in (x, dt, log_decay, B, C)), strict=True):
        chunks = max(1, piece[0].shape[1] // chunk_size)
        y, state = _quadratic_in_chunks(*piece, D, state, chunks)
        ys += y
    return torch.cat(ys, dim=1), state  # (b, l, h, p), (b, h, p, n)


# Numbers in the matrices L of the chunks that are computed at once, the slab: enough for large
# operations; few enough for a CPU's cache, or for a small part of a GPU's memory.
SLAB, SLAB_ON_GPU = 2**19, 2**24


def _quadratic_in_chunks(x, dt, log_decay, B, C, D, state, chunks):
    """The quadratic form inside each of `chunks` equal chunks, the recurrence between them.

    The numbers are the steps of Listing 1. Products involving only B and C are computed once per
    group of heads; (r p) are all channels of a group.

    Args:
        x: (b, l, h, p).  dt, log_decay: (b, l, h).  B, C: (b, l, g, n).  D: (h, 1 or p) or None.
        state: (b, h, p, n), before the first chunk.

    Returns:
        y of each chunk, a list of (b, q, h, p).  state: (b, h, p, n), after the last chunk.
    """
    (p, g), dtype = (x.shape[3], B.shape[2]), x.dtype
    x, dt, B, C = (t.to(state.dtype) for t in (x, dt, B, C))
    axes = dict(c=chunks, g=g)
    x, xdt = (
        rearrange(t, "b (c q) (g r) p -> b c g r q p", **axes) for t in (x, x * dt[..., None])
    )
    xdt = xdt.contiguous()  # else each product would copy it, and keep the copy for its gradient
    log_decay = rearrange(log_decay, "b (c q) (g r) -> b c g r q", **axes)
    B, C = (rearrange(t, "b (c q) g n -> b c g q n", c=chunks) for t in (B, C))

    L = segsum(log_decay).exp()  # (b, c, g, r, q, s): decay from position s to position q
    from_start = log_decay.cumsum(-1).exp()[..., None]  # (b, c, g, r, q, 1): from before the chunk
    to_end = L[..., -1, :, None]  # (b, c, g, r, s, 1): to the chunk's last position

    # 1. Diagonal blocks: from the inputs of a chunk to its outputs, as attention.
    scores = C @ B.mT  # (b, c, g, q, s)
    inside = (scores[:, :, :, None] * L) @ xdt  # (b, c, g, r, q, p)
    if D is not None:
        inside = torch.addcmul(inside, rearrange(D, "(g r) p -> g r 1 p", g=g), x)
    # 2. From the inputs of a chunk to what it adds to the state.
    written = rearrange(xdt * to_end, "b c g r s p -> b c g (r p) s") @ B
    written = written.unflatten(3, (-1, p))  # (b, c, g, r, p, n)
    # From the state before each chunk: 4. to its outputs, and 3. to the state after it.
    state, ys = rearrange(state, "b (g r) p n -> b g r p n", g=g), []
    each = zip(*(t.unbind(1) for t in (C, inside, written, from_start)), strict=True)
    for C_c, inside_c, written_c, from_start_c in each:
        read = C_c @ state.flatten(2, 3).mT  # (b, g, q, (r p))
        read = rearrange(read, "b g q (r p) -> b g r q p", p=p)
        y = torch.addcmul(inside_c, from_start_c, read)  # (b, g, r, q, p)
        ys.append(rearrange(y, "b g r q p -> b q (g r) p").to(dtype))
        state = torch.addcmul(written_c, from_start_c[..., -1:, :], state)
    return ys, state.flatten(1, 2)


def _prepare(x, dt, A, B, C, D, initial_state, seq_idx):
    """Check the arguments of SSD and derive what all forms start from, in the computation's dtype.

    Returns:
        log_decay: (b, l, h), the logarithm of each step's decay: dt A, and -inf where another
            sequence begins, so that nothing of the one before is left (Section 8.3).
        D: (h, 1) or (h, p), or None.
        state: (b, h, p, n), the initial one.
    """
    _check_ssd(x, dt, A, B, C, D, initial_state, seq_idx)
    dtype = _at_least_float32(x.dtype)
    log_decay = dt.to(dtype) * A.to(dtype)
    if seq_idx is not None:
        log_decay = log_decay.masked_fill(_borders(seq_idx)[..., None], -torch.inf)
    if D is not None:
        D = (D if D.dim() == 2 else D[:, None]).to(dtype)
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3])
    return log_decay, D, initial_state.to(dtype)


# --------------------------------------------------------------------------------------------------
# 2. The layer
# --------------------------------------------------------------------------------------------------


def causal_conv1d(x, weight, bias=None, *, initial_state=None, seq_idx=None):
    """Causal depthwise convolution and SiLU: y_t = silu(bias + sum_j weight_j x_{t-k+1+j}).

    Args:
        x: (b, l, d).
        weight, bias: (d, k), and (d) or None.
        initial_state: (b, k-1, d), the inputs before the first position; None is zeros.
        seq_idx: (b, l) integers or None; as in `ssd`. No tap reaches over a border.

    Returns:
        y: (b, l, d), in x's dtype; computed in float32 at least.
        final_state: (b, k-1, d), in x's dtype: the last inputs, zero if of an earlier sequence.
    """
    options = dict(initial_state=initial_state, seq_idx=seq_idx)
    if kernels and kernels.takes_causal_conv1d(x, weight, bias, **options):
        return kernels.causal_conv1d(x, weight, bias, **options)
    sizes = {}
    _require("x", x, "b l d", sizes)
    _require("weight", weight, "d k", sizes)
    b, l, d, k = (sizes[axis] for axis in "bldk")
    if bias is not None:
        _require("bias", bias, "d", sizes)
    if initial_state is None:
        initial_state = x.new_zeros(b, k - 1, d)
    _require("initial_state", initial_state, "b k-1 d", {**sizes, "k-1": k - 1})
    if seq_idx is not None:
        _require("seq_idx", seq_idx, "b l", sizes, "integers")
    number = _sequence_number(seq_idx, k - 1)

    # 1 * is a copy: else the gradient of the initial state would be a view that keeps the whole
    # window's gradient alive.
    window = torch.cat([1 * initial_state.to(x.dtype), x], dim=1)  # (b, k-1+l, d)
    final_state = last_inputs(window, k - 1, None, number)
    dtype = _at_least_float32(x.dtype)
    window, weight = window.to(dtype), weight.to(dtype)
    y = x.new_zeros(d, dtype=dtype) if bias is None else bias.to(dtype)
    for j in range(k):
        tap = window[:, j : j + l]  # (b, l, d)
        if number is not None:
            tap = tap.masked_fill((number[:, j : j + l] != number[:, k - 1 :])[..., None], 0)
        y = torch.addcmul(y, weight[:, j], tap)
    return F.silu(y).to(x.dtype), final_state


def last_inputs(window, count, lengths=None, number=None):
    """The state of a convolution: its last `count` = k-1 inputs, zero if of an earlier sequence.

    Args:
        window: (b, k-1+l, d), the state before, and l inputs.
        lengths: (b), how many of these inputs count; None is all.
        number: `_sequence_number` of the window, or None without packing.

    Returns:
        (b, k-1, d), a copy, so that it does not keep the whole window alive.
    """
    if lengths is None:
        state = window[:, window.shape[1] - count :].clone()
    else:
        index = lengths[:, None] + torch.arange(count, device=window.device)  # (b, k-1)
        state = _take(window, index)
    if number is None or count == 0:
        return state
    own = number[:, number.shape[1] - count :] if lengths is None else number.gather(1, index)
    return state.masked_fill((own != own[:, -1:])[..., None], 0)


def _sequence_number(seq_idx, before):
    """(b, before + l): packed sequences counted from 0, what comes before in the first; or None."""
    if seq_idx is None:
        return None
    return F.pad(_borders(seq_idx).cumsum(1), (before, 0))


def rms_norm(x, weight, eps, *, gate=None, groups=1):
    """RMSNorm: x / sqrt(mean(x^2) + eps) * weight, of x * silu(gate) if there is a gate.

    Args:
        x, gate: (..., d).
        weight: (d).
        eps: added to the mean square.
        groups: the mean is taken over each of so many equal parts of the last axis (Section 8.1).

    Returns:
        (..., d), in the gate's dtype, or in weight's without a gate; computed in float32 at least.
    """
    if kernels and kernels.takes_rms_norm(x, weight, eps, gate=gate, groups=groups):
        return kernels.rms_norm(x, weight, eps, gate=gate, groups=groups)
    sizes = {}
    _require("x", x, "... d", sizes)
    _require("weight", weight, "d", sizes)
    if gate is not None:
        _require("gate", gate, "... d", sizes)
        if gate.shape != x.shape:
            raise ValueError(f"gate has shape {tuple(gate.shape)}: it must be {tuple(x.shape)}")
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"groups = {groups}: it must divide the last axis of x, {x.shape[-1]}")
    dtype = _at_least_float32(x.dtype)
    x = x.to(dtype) if gate is None else x.to(dtype) * F.silu(gate.to(dtype))
    x = x.unflatten(-1, (groups, -1))  # (..., g, d / g)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x.flatten(-2) * weight).to(weight.dtype if gate is None else gate.dtype)


class CausalConv1d(nn.Module):
    """`causal_conv1d` with its parameters, which have the shapes of the published checkpoints."""

    def __init__(self, channels: int, taps: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self, x, initial_state=None, seq_idx=None):
        weight = self.weight.squeeze(1)  # (d, k)
        return causal_conv1d(x, weight, self.bias, initial_state=initial_state, seq_idx=seq_idx)


class RMSNorm(nn.Module):
    """`rms_norm` with its weight."""

    def __init__(self, width: int, eps: float, groups: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.groups = eps, groups

    def forward(self, x, gate=None):
        return rms_norm(x, self.weight, self.eps, gate=gate, groups=self.groups)


class Mamba2State(NamedTuple):
    """The state of one layer, immutable: all that the layer remembers.

    conv  (b, k-1, h p + 2 g n)   the last inputs of the convolution, in the dtype of in_proj's
                                  output: the layer's or, in autocast, autocast's
    ssm   (b, h, p, n)            the state of SSD, float32 (float64 in a float64 layer); a state
                                  that is passed in another dtype stays in it

    Differs: the original keeps one input more, channels first, and ssm in the weights' dtype.
    """

    conv: Tensor
    ssm: Tensor


class Mamba2(nn.Module):
    """The Mamba-2 layer (Section 7.1, Figure 6), functional in its state:

        u ── in_proj ─┬─ x, B, C ── conv1d, SiLU ─┐
          (b, l, d)   ├─ dt ── softplus ──────────┴─ ssd ── y ─┐
                      └─ z ────────────────────────────────────┴─ norm(y silu(z)) ── out_proj ── out

    with A = -exp(A_log) and dt = softplus(dt + dt_bias), as in Mamba-1, clamped to time_step_limit.

        layer = Mamba2(d_model=256)          # any options of Mamba2Config, or a Mamba2Config;
                                             # device and dtype mean what they do in nn.Linear
        y = layer(u)                         # (b, l, d) in, (b, l, d) out
        y, state = layer.step(u)             # the same, and the state after the last position
        y, state = layer.step(v, state)      # resumes there, with any number of positions

    Initialisation is the original's; parameters have the names and shapes of published checkpoints.

    Raises:
        TypeError, ValueError: as `Mamba2Config`.
    """

    def __init__(self, config: Mamba2Config | None = None, *, device=None, dtype=None, **options):
        super().__init__()
        if config is None:
            config = Mamba2Config(**options)
        elif options or not isinstance(config, Mamba2Config):
            found = f"{type(config).__module__}.{type(config).__qualname__}"
            raise TypeError(
                f"config is a {found}, with options {sorted(options)}: pass this file's "
                "Mamba2Config, or options by name alone, as in Mamba2(d_model=256); "
                "Mamba2Config.from_dict(config.to_dict()) translates transformers' class"
            )
        config.validate_architecture()
        self.config = config
        self.sizes = config.num_heads, config.head_dim, config.n_groups, config.state_size
        h, p, g, n = self.sizes
        self.widths = [h * p, h * p + 2 * g * n, h]  # of z, of x, B and C together, and of dt
        self.in_proj = nn.Linear(config.hidden_size, sum(self.widths), bias=config.use_bias)
        self.conv1d = CausalConv1d(self.widths[1], config.conv_kernel, config.use_conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(h))
        self.A_log = nn.Parameter(torch.empty(h))
        self.D = nn.Parameter(torch.empty(h))
        self.norm = RMSNorm(h * p, config.layer_norm_epsilon, groups=g)
        self.out_proj = nn.Linear(h * p, config.hidden_size, bias=config.use_bias)
        self.reset_parameters()
        if (device, dtype) != (None, None):
            self.to(device, dtype)

    @torch.no_grad()
    def reset_parameters(self, depth: int = 1):
        """Draw new weights as the original does; `depth` is the number of layers of the model.

        Projections and convolution keep PyTorch's default, uniform in +-1/sqrt(fan_in), divided by
        sqrt(depth) for out_proj. Biases of projections are 0, as in the original's models.
        """
        config = self.config

        def uniform(parameter, fan_in):
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)

        uniform(self.in_proj.weight, config.hidden_size)
        uniform(self.out_proj.weight, self.widths[0] * depth)
        uniform(self.conv1d.weight, config.conv_kernel)
        if config.use_conv_bias:
            uniform(self.conv1d.bias, config.conv_kernel)
        if config.use_bias:
            nn.init.zeros_(self.in_proj.bias)
            nn.init.zeros_(self.out_proj.bias)
        nn.init.ones_(self.norm.weight)
        nn.init.ones_(self.D)
        # A is uniform in [-16, -1]; dt log-uniform in [time_step_min, time_step_max].
        A = torch.empty_like(self.A_log, dtype=torch.float32).uniform_(1, 16)
        self.A_log.copy_(A.log())
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt = torch.empty_like(A).uniform_(low, high).exp().clamp(min=config.time_step_floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def step(self, u, state=None, mask=None, seq_idx=None, group=None):
        """The layer on some positions, from a state: prefill, resuming and decoding are this call.

        Args:
            u: (b, l, d), l >= 0.
            state: the Mamba2State that an earlier call returned; None is the empty one.
            mask: (b, l), bool or 0/1, or None. Masked positions are skipped, wherever they occur:
                the other outputs and the state are as if they had been left out. Their own outputs
                are 0. Or (b) integers: the positions of each row that exist, others after them.
            seq_idx: (b, l) integers or None: labels of packed sequences. Where the label changes,
                another sequence begins, with an empty state; `state` belongs to the sequence of the
                first position that is not masked.
            group: a process group, if each of its ranks has a slice of the sequence. u, mask and
                seq_idx are the slice, l may differ; `state` is the same on every rank: the one in
                front of the whole sequence. See `Slices`.

        Returns:
            y: (b, l, d), in the dtype of the projections.
            state: Mamba2State after the last position (with a group: of the last slice, on every
                rank). The one that was passed is unchanged; gradients pass through both.

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit; the message says what would.
        """
        return self(u, state, mask, seq_idx, group, return_state=True)  # so that hooks run

    def forward(self, u, state=None, mask=None, seq_idx=None, group=None, *, return_state=False):
        """y of `step`; with return_state=True what `step` returns. Arguments: see `step`."""
        _check_layer(self, u, state, mask, seq_idx)
        order, lengths, skipped = None, mask, None
        if mask is not None and mask.dim() == 2:
            order = Order(_as_bool("mask", mask))
            u, seq_idx, lengths = order.sort(u), order.sort_labels(seq_idx), order.lengths
        if lengths is not None:
            skipped = torch.arange(u.shape[1], device=u.device) >= lengths[:, None]  # (b, l)
            u = u.masked_fill(skipped[..., None], 0)  # whatever was there, even a NaN
        slices = Slices.of(group, self.config, u, lengths, seq_idx, state=state is not None)

        zxbcdt = self.in_proj(u)
        fused = None
        if kernels and lengths is None and slices is None:
            fused = kernels.layer(self, zxbcdt, state, seq_idx)
        if fused is not None:
            y, state = fused[0], Mamba2State(*fused[1:])
        else:
            z, xBC, dt = zxbcdt.split(self.widths, dim=-1)
            y, state = self._convolve_and_scan(xBC, dt, state, lengths, skipped, seq_idx, slices)
            y = self.norm(y, gate=z)
        y = self.out_proj(y)  # (b, l, d)
        if lengths is not None:
            y = y.masked_fill(skipped[..., None], 0)
        if order is not None:
            y = order.restore(y)
        return (y, state) if return_state else y

    def _convolve_and_scan(self, xBC, dt, state, lengths, skipped, seq_idx, slices):
        """Convolution and SSD, where information moves between positions.

        Returns (b, l, h p) and the new state. Positions from `lengths` on are `skipped` (b, l).
        """
        (h, p, g, n), k = self.sizes, self.config.conv_kernel
        dtype = _at_least_float32(dt.dtype)
        dt = F.softplus(dt + self.dt_bias.to(dtype))  # (b, l, h)
        dt = dt.clamp(*self.config.time_step_limit)
        if skipped is not None:  # nothing is written to the state, and nothing decays
            dt = dt.masked_fill(skipped[..., None], 0)
        A = -torch.exp(self.A_log.to(dtype))  # (h)
        conv, ssm = state or (xBC.new_zeros(xBC.shape[0], k - 1, xBC.shape[2]), None)
        if slices is not None:
            conv, conv_after = slices.states_of_convolution(xBC, conv)

        convolved, new_conv = self.conv1d(xBC, conv, seq_idx)
        if slices is not None:
            new_conv = conv_after
        elif lengths is not None:
            window = torch.cat([1 * conv.to(xBC.dtype), xBC], dim=1)
            new_conv = last_inputs(window, k - 1, lengths, _sequence_number(seq_idx, k - 1))
        x, B, C = convolved.split([h * p, g * n, g * n], dim=-1)
        x = x.unflatten(2, (h, p))  # (b, l, h, p)
        B, C = (t.unflatten(2, (g, n)) for t in (B, C))  # (b, l, g, n)
        # Differs: published configs say 256, which suits the original's kernels; plain PyTorch is
        # fastest at 64, and the result is the same.
        chunk_size = min(self.config.chunk_size, 64)
        scan = ssd if slices is None else functools.partial(ssd_of_slice, slices=slices)
        y, new_ssm = scan(
            x, dt, A, B, C, self.D, chunk_size=chunk_size, initial_state=ssm, seq_idx=seq_idx
        )
        if ssm is not None:
            new_ssm = new_ssm.to(ssm.dtype)
        return y.flatten(2), Mamba2State(new_conv, new_ssm)


# --------------------------------------------------------------------------------------------------
# 3. The language model
# --------------------------------------------------------------------------------------------------


class Mamba2Block(nn.Module):
    """A residual block: h + mixer(norm(h)); h (b, l, d) is the residual stream.

    Arguments and results are those of `Mamba2.step`.
    """

    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = Mamba2(config)

    def forward(self, h, state=None, mask=None, seq_idx=None, group=None):
        if kernels and mask is None and group is None:
            fused = kernels.block(self, h, state)
            if fused is not None:
                return fused[0], Mamba2State(*fused[1:])
        y, state = self.mixer(self.norm(h), state, mask, seq_idx, group, return_state=True)
        return h + y, state


def backbone_parts(config: Mamba2Config) -> dict[str, nn.Module]:
    """The modules of a model without its head, under the names of published checkpoints."""
    blocks = [Mamba2Block(config) for _ in range(config.num_hidden_layers)]
    return {
        "embeddings": nn.Embedding(config.vocab_size, config.hidden_size),
        "layers": nn.ModuleList(blocks),
        "norm_f": RMSNorm(config.hidden_size, config.layer_norm_epsilon),
    }


def run_blocks(blocks, h, states=None, *arguments, call=lambda block, *given: block(*given)):
    """The residual stream h (b, l, d) after all blocks, and the states of their layers.

    states: a Mamba2State for each block, or None. arguments: mask, seq_idx and group of
    `Mamba2.step`. call: how a block is called, for gradient checkpointing and the like.
    """
    new_states = []
    for block, state in zip(blocks, states or [None] * len(blocks), strict=True):
        h, state = call(block, h, state, *arguments)
        new_states.append(state)
    return h, tuple(new_states)


class Mamba2LM(nn.Module):
    """The language model (Section 9.2), and nothing else.

        logits, states = model(ids)                # ids (b, l), logits (b, l, vocabulary)
        logits, states = model(next_ids, states)   # resumes there, with any number of tokens

    The states are a Mamba2State for each layer.
    """

    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.config = config
        self.backbone = nn.ModuleDict(backbone_parts(config))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for block in self.backbone["layers"]:
            block.mixer.reset_parameters(depth=config.num_hidden_layers)
        nn.init.normal_(self.backbone["embeddings"].weight, std=config.initializer_range)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.backbone["embeddings"].weight

    def forward(self, ids, states=None):
        h = self.backbone["embeddings"](ids)  # (b, l, d)
        if self.config.residual_in_fp32:  # also with half-precision weights
            h = h.to(_at_least_float32(h.dtype))
        h, states = run_blocks(self.backbone["layers"], h, states)
        return self.lm_head(self.backbone["norm_f"](h)), states


# This is the whole model. What follows makes it usable: checks, configuration, transformers, GPUs.


# --------------------------------------------------------------------------------------------------
# 4. Helpers of sections 1 to 3
# --------------------------------------------------------------------------------------------------


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _borders(seq_idx: Tensor) -> Tensor:
    """(b, l) bool: whether another sequence begins at this position. The first is no border."""
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))[:, : seq_idx.shape[1]]


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x (b, l, ...) at the positions index (b, m) of each row: (b, m, ...)."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


class Order:
    """Masked positions moved to the end of each row; all others keep their order.

        mask     1 0 0 1 1        positions   a b c d e
        sorted   a d e b c        lengths     3

    So the convolution meets only inputs that exist, and SSD passes over the rest with dt = 0.
    """

    def __init__(self, mask: Tensor):  # (b, l) bool
        self.lengths = mask.sum(1)  # (b)
        after = self.lengths[:, None] + (~mask).cumsum(1)
        self.place = torch.where(mask, mask.cumsum(1), after) - 1  # (b, l), where each one goes
        position = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        self.index = torch.empty_like(self.place).scatter(1, self.place, position)  # the inverse

    def sort(self, x):
        return None if x is None else _take(x, self.index)

    def sort_labels(self, seq_idx):
        """Like `sort`, but masked positions get the label of the last one that exists."""
        if seq_idx is None or seq_idx.shape[1] == 0:
            return seq_idx
        position = torch.arange(seq_idx.shape[1], device=seq_idx.device)
        last = (self.lengths[:, None] - 1).clamp(min=0)  # (b, 1)
        return self.sort(seq_idx.long()).gather(1, torch.minimum(position, last))

    def restore(self, x):
        return _take(x, self.place)


def _as_bool(name: str, mask: Tensor) -> Tensor:
    """The mask as bool; a float one is checked not to be meant for adding to attention scores."""
    if mask.is_floating_point() and _is_eager(mask) and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"{name} holds other numbers than 0 and 1: it must be 1 where a position is read, 0 "
            f"where not; instead of one that is added to attention scores, pass {name} == 0"
        )
    return mask.bool()


def _is_eager(x: Tensor) -> bool:
    """Whether x's values can be read now, which waits for a GPU: not while torch.compile traces, in
    transforms of torch.func, while a CUDA graph is captured, or on the meta device."""
    if x.is_meta or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _require(name, tensor, axes, sizes, kind="floating-point numbers"):
    """Raise unless `tensor` has these axes and holds numbers of that kind.

    axes: letters, as in "b l h". sizes: known sizes by letter, to which the tensor's are added.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: it must be a tensor")
    letters, shape = axes.split(), tensor.shape
    if letters[0] == "..." and tensor.dim() > 0:
        letters, shape = letters[-1:], shape[-1:]
    fits = len(letters) == len(shape)
    for letter, size in zip(letters, shape, strict=False):
        fits = fits and sizes.get(letter, size) == size
    if not fits:
        wanted = ", ".join(str(sizes.get(letter, letter)) for letter in axes.split())
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must be ({wanted})")
    sizes.update(zip(letters, shape, strict=True))
    found = "floating-point numbers" if tensor.is_floating_point() else "integers"
    found = "complex numbers" if tensor.is_complex() else found
    found = "booleans" if tensor.dtype == torch.bool else found
    if found != kind and not (kind == "a mask" and found != "complex numbers"):
        raise TypeError(f"{name} is {tensor.dtype}: it must be a tensor of {kind}")


def _check_ssd(x, dt, A, B, C, D, initial_state, seq_idx):
    """Raise a TypeError or ValueError unless these are what all forms of SSD take."""
    sizes = {}
    _require("x", x, "b l h p", sizes)
    _require("dt", dt, "b l h", sizes)
    _require("A", A, "h", sizes)
    _require("B", B, "b l g n", sizes)
    _require("C", C, "b l g n", sizes)
    if sizes["g"] == 0 or sizes["h"] % sizes["g"]:
        g, h = sizes["g"], sizes["h"]
        shape = tuple(B.shape)
        raise ValueError(f"B has shape {shape}: its groups, {g}, must be a divisor of {h} heads")
    if D is not None:
        _require("D", D, "h p" if isinstance(D, Tensor) and D.dim() == 2 else "h", sizes)
    if initial_state is not None:
        _require("initial_state", initial_state, "b h p n", sizes)
    if seq_idx is not None:
        _require("seq_idx", seq_idx, "b l", sizes, "integers")


def _check_layer(layer, u, state, mask, seq_idx):
    """Raise a TypeError or ValueError unless these are what `Mamba2.step` takes."""
    h, p, _, n = layer.sizes
    sizes = {"d": layer.config.hidden_size, "h": h, "p": p, "n": n, "c": layer.widths[1]}
    _require("u", u, "b l d", sizes)
    weight = getattr(layer.in_proj, "weight", u)  # an adapter may have none, or take any dtype
    if type(layer.in_proj) is nn.Linear and u.dtype != weight.dtype:
        castable = torch.float64 not in (u.dtype, weight.dtype)
        if not (castable and torch.is_autocast_enabled(u.device.type)):
            raise TypeError(f"u is {u.dtype}, the weights {weight.dtype}: make them the same")
    if isinstance(mask, Tensor) and mask.dim() == 1:
        _require("mask", mask, "b", sizes, "integers")
    elif mask is not None:
        _require("mask", mask, "b l", sizes, "a mask")
    if seq_idx is not None:
        _require("seq_idx", seq_idx, "b l", sizes, "integers")
    if state is not None:
        if not isinstance(state, tuple) or len(state) != 2:
            found = type(state).__name__
            raise TypeError(f"state is a {found}: it must be step's second result, a Mamba2State")
        _require("state.conv", state[0], "b k-1 c", {**sizes, "k-1": layer.config.conv_kernel - 1})
        _require("state.ssm", state[1], "b h p n", sizes)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The two groups for an optimiser: `AdamW(parameter_groups(model, 0.1), lr=...)`.

    Weights of projections, convolutions and embeddings decay; A_log, D, dt_bias, norms and biases
    do not.

    Differs: the original marks the latter with an attribute; copying a parameter loses that
    attribute but not the shape, so we test for one dimension.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


# --------------------------------------------------------------------------------------------------
# 5. Configuration
# --------------------------------------------------------------------------------------------------

# What an option may be: a rule, and whether it holds.
NUMBERS = {int, float}
ANY = "", lambda value: True
COUNT = "must be an integer of at least 1", lambda v: type(v) is int and v >= 1
HEADS = "must be an integer of at least 1, or None", lambda v: v is None or COUNT[1](v)
POSITIVE = "must be a positive number", lambda v: type(v) in NUMBERS and 0 < v < math.inf
NOT_NEGATIVE = "must not be negative", lambda v: type(v) in NUMBERS and 0 <= v < math.inf
SWITCH = "must be True or False", lambda v: isinstance(v, bool)
SILU = "only 'silu' is implemented, also called 'swish'", lambda v: v in ("silu", "swish")
LIMITS = (
    "must be (low, high) with 0 <= low <= high; (0.0, math.inf) is no limit",
    lambda v: type(v) is tuple and len(v) == 2 and {*map(type, v)} <= NUMBERS and 0 <= v[0] <= v[1],
)
SEGMENT = (
    "must be a number of positions, 'auto', or 0 for the whole sequence at once",
    lambda v: v == "auto" or (type(v) is int and v >= 0),
)

OPTIONS = [  # name in transformers, in the paper's code, default, what it may be, meaning
    ("hidden_size", "d_model", 768, COUNT, "width of the model"),
    ("num_hidden_layers", "n_layer", 24, COUNT, "number of layers"),
    ("vocab_size", None, 50288, COUNT, "rows of the embedding"),
    ("state_size", "d_state", 128, COUNT, "n, size of the state of one channel"),
    ("head_dim", "headdim", 64, COUNT, "p, channels per head"),
    ("n_groups", "ngroups", 1, COUNT, "g, groups of heads that share B and C"),
    ("expand", None, 2, POSITIVE, "inner width / hidden_size, may be a fraction"),
    ("num_heads", "nheads", None, HEADS, "h; None: expand * hidden_size / head_dim"),
    ("conv_kernel", "d_conv", 4, COUNT, "k, taps of the short convolution"),
    ("chunk_size", None, 256, COUNT, "chunk length; above 64 means 64; speed only"),
    ("segment_length", None, 0, SEGMENT, "positions read at a time; memory and speed only"),
    ("hidden_act", None, "silu", SILU, "of convolution and gate"),
    ("use_bias", "bias", False, SWITCH, "biases in in_proj and out_proj"),
    ("use_conv_bias", "conv_bias", True, SWITCH, "bias in the convolution"),
    ("time_step_limit", "dt_limit", (0.0, math.inf), LIMITS, "dt is always clamped to this"),
    ("time_step_min", "dt_min", 0.001, POSITIVE, "initial dt is log-uniform from here"),
    ("time_step_max", "dt_max", 0.1, POSITIVE, "to here"),
    ("time_step_floor", "dt_init_floor", 1e-4, NOT_NEGATIVE, "and at least this"),
    ("layer_norm_epsilon", "norm_epsilon", 1e-5, POSITIVE, "of every RMSNorm"),
    ("residual_in_fp32", None, True, SWITCH, "residual stream, also with half-precision weights"),
    ("initializer_range", None, 0.02, NOT_NEGATIVE, "standard deviation of a new embedding"),
    ("tie_word_embeddings", "tie_embeddings", True, SWITCH, "the head is the embedding"),
    ("bos_token_id", None, 0, ANY, "first token of a text"),
    ("eos_token_id", None, 0, ANY, "last token of a text"),
    ("pad_token_id", None, 0, ANY, "token that fills up rows"),
    ("use_cache", None, True, ANY, "return a cache, unless the model is training"),
]
_DEFAULTS = {name: default for name, _, default, *_ in OPTIONS}
# Options of every transformers configuration, and those of its Mamba-2 that have no effect here.
_COMMON = {n for n in dir(PreTrainedConfig) if not callable(getattr(PreTrainedConfig, n))}
_COMMON |= {"attn_implementation", "experts_implementation", "rescale_prenorm_residual"}
_COMMON = _COMMON - {"model_type"} | {"time_step_rank", "_name_or_path"}
# Options of other programs that change the results, with the only value that is implemented.
_OTHERS = {"rms_norm": True, "rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False}
_OTHERS |= {"d_inner": None, "d_ssm": None, "d_intermediate": 0, "attn": None}
_OTHERS |= {"attn_layer_idx": [], "layer": "Mamba2", "activation": "silu"}


def _check(name, value, rule, holds):
    if not holds(value):
        raise ValueError(f"{name} = {value!r}: {rule}")


class Mamba2Config(PreTrainedConfig):
    """Sizes and options of a Mamba-2 model. The defaults are those of the published `mamba2-130m`.

    `OPTIONS` above lists them. Each can be passed, read and set under transformers' name, which is
    also its name in `config.json`, or under that of the paper's code. Options of all transformers
    configurations (`dtype`, `id2label`, ...) are accepted too. Unknown ones are a TypeError, values
    that make no Mamba-2 a ValueError.
    """

    model_type = "mamba2"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {alias: name for name, alias, *_ in OPTIONS if alias is not None}

    def __init__(self, **options):
        for alias, name in self.attribute_map.items():
            if alias in options and name in options:
                raise TypeError(f"{alias!r} and {name!r} are one option: give one of them")
        options = {self.attribute_map.get(name, name): value for name, value in options.items()}
        for name, default in _DEFAULTS.items():
            setattr(self, name, options.pop(name, default))
        common = {name: options.pop(name) for name in options.keys() & _COMMON}
        if options.get("model_type") == self.model_type:  # of a config.to_dict()
            del options["model_type"]
        for name in options:
            raise TypeError(f"Mamba2Config has no option {name!r}: see mamba2.OPTIONS")
        if transformers is not None:
            super().__init__(**common)
            # Saved for transformers' own Mamba-2, which would scale *loaded* weights once more.
            self.rescale_prenorm_residual = False
            # Differs: PEFT bars LoRA on the out_proj of transformers' Mamba-2, which it knows by
            # model_type and whose weight is accessed there without calling the module. Ours always
            # calls it. What is saved is the class's own model_type, "mamba2".
            self.model_type = "mamba2-single-file"
        self.validate_architecture()

    def validate_architecture(self):
        """Compute num_heads if it is None; raise a ValueError unless the sizes make a Mamba-2.

        transformers calls this by its name, whenever it makes or changes a configuration.
        """
        if isinstance(self.time_step_limit, list):  # JSON has no tuples
            self.time_step_limit = tuple(self.time_step_limit)
        for name, _, _, kind, _ in OPTIONS:
            _check(name, getattr(self, name), *kind)
        p, inner = self.head_dim, self.expand * self.hidden_size
        if self.num_heads is None:
            self.num_heads = round(inner) // p
        h = self.num_heads
        rule = (
            f"num_heads * head_dim = {h} * {p} must equal expand * hidden_size = {self.expand} * "
            f"{self.hidden_size} = {inner}; choose a head_dim that divides it, and leave num_heads "
            "out to have it computed"
        )
        _check("num_heads", h, rule, lambda h: math.isclose(h * p, inner))
        rule = f"must divide the number of heads, {h}"
        _check("n_groups", self.n_groups, rule, lambda g: h % g == 0)
        rule = f"must be at most time_step_max, {self.time_step_max}"
        _check("time_step_min", self.time_step_min, rule, lambda low: low <= self.time_step_max)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Read a `config.json`, in transformers' format (flash-linear-attention and mamba2-torch
        write it too) or in the original one. What is not implemented is a ValueError."""
        _check("config", config_dict, "must be a dict", lambda v: isinstance(v, dict))
        options = dict(config_dict)
        if "ssm_cfg" in options:
            options = _from_original(**options)
        kind = options.pop("model_type", None)
        rule = "not a Mamba-2 checkpoint, whose is 'mamba2'"
        _check("model_type", kind, rule, lambda v: v in (None, "mamba2", "mamba2-single-file"))
        # transformers has written norm_before_gate = True, into Codestral's file too, but has never
        # read it. It has effect in flash-linear-attention, whose files also have rmsnorm, norm_eps.
        if kind and not options.keys() & {"rmsnorm", "norm_eps"}:
            options.pop("norm_before_gate", None)
        if "norm_eps" in options:
            options["norm_epsilon"] = options.pop("norm_eps")
        for name in options.keys() & _OTHERS.keys():
            value, only = options.pop(name), _OTHERS[name]
            if value != only and (value or only):  # None means False, 0 or []
                raise ValueError(f"{name} = {value!r}: only {only!r} is implemented")
        if "emb_initializer_range" in options:  # by mamba2-torch: one group; it computes the heads
            options.pop("num_heads", None)
        elif kind:  # options that are left out have transformers' defaults
            there = {cls.attribute_map.get(name, name) for name in options}
            theirs = transformers.Mamba2Config().to_dict()
            options |= {name: theirs[name] for name in _DEFAULTS.keys() & theirs.keys() - there}
        # What else is in the file is kept as an attribute, and means nothing here.
        names = options.keys() - {*_DEFAULTS, *cls.attribute_map, *_COMMON}
        others = {name: options.pop(name) for name in names}
        config = super().from_dict(options, **kwargs)
        vars(config[0] if isinstance(config, tuple) else config).update(others)
        return config


def _from_original(ssm_cfg, pad_vocab_size_multiple=8, model_type=None, **options) -> dict:
    """A `config.json` of the mamba_ssm package, such as state-spaces/mamba2-130m's, made flat."""
    _check("ssm_cfg", ssm_cfg, "must be a dict", lambda v: isinstance(v, dict))
    known = {*_OTHERS, *Mamba2Config.attribute_map, "expand", "chunk_size"}
    known |= {"A_init_range", "conv_init", "use_mem_eff_path"}  # no effect on loaded weights
    for name in ssm_cfg.keys() - known:
        raise ValueError(f"ssm_cfg.{name} = {ssm_cfg[name]!r}: this option is not implemented")
    for name in ("d_model", "n_layer", "vocab_size"):
        _check(name, options.get(name), *COUNT)
    _check("pad_vocab_size_multiple", pad_vocab_size_multiple, *COUNT)
    options["vocab_size"] += -options["vocab_size"] % pad_vocab_size_multiple
    return {**options, "layer": "Mamba1", **ssm_cfg}


# --------------------------------------------------------------------------------------------------
# 6. transformers: cache, loss, segments, loading, generation
# --------------------------------------------------------------------------------------------------
#
# Names that no documentation promises. A test
# (`test_transformers_still_has_the_private_names_that_this_file_uses`)
# looks for each. Those of transformers, which calls or reads them in a model:
#
#     _init_weights                         draws the weights of a module
#     _is_hf_initialized                    of a parameter: loaded, not to be drawn
#     _tied_weights_keys                    the head's weight, which is the embedding's
#     _keys_to_ignore_on_load_missing       weights that a checkpoint may lack
#     _keys_to_ignore_on_load_unexpected    ... or have in excess
#     _load_pretrained_model                loads files into a model that has no memory yet
#     _no_split_modules                     what device_map keeps on one device
#     _is_stateful                          False allows speculative decoding
#     _supports_default_dynamic_cache       False: generate makes no cache of its own
#     _expand_inputs_for_generation         several samples or beams for a prompt
#     _get_stopping_criteria                tell which rows have ended
#     _prefill                              the first forward pass of generate, for stream too
#
# and of torch, here and in kernels.py:
#
#     _is_replica                           of a model in torch.nn.DataParallel
#     torch.Tensor._version                 counts changes in place
#     torch._C._are_functorch_transforms_active, torch.autograd.forward_ad._current_level,
#     torch._C._len_torch_dispatch_stack, torch._subclasses.fake_tensor.FakeTensor
#                                           whether values can be read, and nobody else watches

# Outputs and generation call the cache so. Callers of this file may use either name.
CACHE = "cache"
if transformers and not hasattr(CausalLMOutputWithPast, "cache"):  # before 5.24
    CACHE = "past_key_values"

    class BaseModelOutputWithPast(BaseModelOutputWithPast):
        cache = property(lambda self: self.past_key_values)

    class CausalLMOutputWithPast(CausalLMOutputWithPast):
        cache = property(lambda self: self.past_key_values)


@dataclass(frozen=True, eq=False, repr=False)
class Mamba2Cache:
    """The state of a whole model after some tokens; immutable.

    A forward pass takes one as `cache` and returns a new one; the old one can be used again, to
    continue the same prompt in another way. Its size does not depend on how many tokens it has
    seen.

        states    a Mamba2State for each layer
        length    tokens seen, masked ones included: a tensor (), so that a compiled or exported
                  step does not depend on its value; get_seq_length() is an int
        seq_idx   None without packing, or (b, 2): for each row the label of the sequence that it
                  ended in, and whether it has seen one (1) or only masked positions (0)
    """

    states: tuple[Mamba2State, ...]
    length: Tensor | int = 0
    seq_idx: Tensor | None = None

    def __repr__(self) -> str:
        kinds = {f"{tuple(state.ssm.shape)} {state.ssm.dtype}" for state in self.states}
        layers = f"{len(self.states)} layers of {', '.join(kinds)}"
        return f"Mamba2Cache(length={self.get_seq_length()}, {layers}, {self.nbytes:,} bytes)"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self.length)

    @property
    def nbytes(self) -> int:
        """Bytes that the states take."""
        return sum(tensor.nbytes for state in self.states for tensor in state)

    def map(self, function, *others: Mamba2Cache) -> Mamba2Cache:
        """A cache of function(tensor, *tensors of the others), for each tensor but length."""
        rows = zip(*(cache.states for cache in (self, *others)), strict=True)
        states = tuple(Mamba2State(*map(function, *layers)) for layers in rows)
        labels = [cache.seq_idx for cache in (self, *others)]
        seq_idx = None if labels[0] is None else function(*labels)
        return Mamba2Cache(states, self.length, seq_idx)

    def select(self, rows) -> Mamba2Cache:
        """Rows of the batch in a new order: integers, negative from the end, or a bool mask."""
        rows = torch.as_tensor(rows).flatten()
        rows = rows if rows.numel() else rows.long()  # an empty list has no integers
        if self.states and not rows.is_cuda:  # a GPU would fail later, and for good
            rows = torch.arange(len(self.states[0].ssm))[rows]
        return self.map(lambda tensor: tensor[rows.to(tensor.device)])

    def repeat(self, times: int) -> Mamba2Cache:
        """Each row `times` times in a row: (b) becomes (b times). This forks a prompt."""
        return self.map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    @staticmethod
    def cat(caches) -> Mamba2Cache:
        """One batch of the rows of several caches, whose prompts may have different lengths.

        Its length is the longest one: whole sequences are then padded to it on the left.
        """
        first, *others = caches
        if any((cache.seq_idx is None) != (first.seq_idx is None) for cache in others):
            raise ValueError("some caches have a seq_idx and some have none: make it all or none")
        joined = first.map(lambda *tensors: torch.cat(tensors), *others)
        length = max(cache.get_seq_length() for cache in (first, *others))
        return Mamba2Cache(joined.states, length, joined.seq_idx)

    def detach(self) -> Mamba2Cache:
        """The cache without its history of gradients."""
        return self.map(Tensor.detach)

    def to(self, *args, **kwargs) -> Mamba2Cache:
        """The cache on another device, or with ssm in another dtype; arguments as for Tensor.to.

        Steps keep the dtype of ssm: half of it takes half the memory and time, and forgets small
        contributions sooner. conv, a few inputs, keeps its own.
        """
        ssm = [state.ssm.to(*args, **kwargs) for state in self.states]
        if not all(tensor.is_floating_point() for tensor in ssm):
            raise TypeError(f"ssm would be {ssm[0].dtype}: it must hold floating-point numbers")
        conv = [
            state.conv.to(tensor.device) for state, tensor in zip(self.states, ssm, strict=True)
        ]
        seq_idx = None if self.seq_idx is None else self.seq_idx.to(ssm[0].device)
        return Mamba2Cache(tuple(map(Mamba2State, conv, ssm)), self.length, seq_idx)

    def save(self, path):
        """Write the cache to a safetensors file."""
        from safetensors.torch import save

        tensors = {"length": torch.tensor(self.get_seq_length())}
        for i, (conv, ssm) in enumerate(self.states):
            tensors |= {f"layers.{i}.conv": conv, f"layers.{i}.ssm": ssm}
        if self.seq_idx is not None:
            tensors["seq_idx"] = self.seq_idx
        # Copies, since a file holds no tensor twice, and one state may serve two layers.
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
        Path(path).write_bytes(save(tensors))

    @classmethod
    def load(cls, path, device="cpu") -> Mamba2Cache:
        """Read a cache that `save` wrote."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:  # into memory: safetensors' load_file would leave the tensors views of the file
            tensors = load(Path(path).read_bytes())
        except SafetensorError:
            tensors = {}
        count = sum(name.endswith(".ssm") for name in tensors)
        names = [[f"layers.{i}.{part}" for part in Mamba2State._fields] for i in range(count)]
        if {"length", *sum(names, [])} != tensors.keys() - {"seq_idx"}:
            raise ValueError(f"{str(path)!r} holds no cache: it must be a file that `save` wrote")
        if (seq_idx := tensors.get("seq_idx")) is not None:
            _require("seq_idx", seq_idx, "b 2", {"2": 2}, "integers")
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        states = tuple(Mamba2State(*(tensors[name] for name in layer)) for layer in names)
        return cls(states, tensors["length"], tensors.get("seq_idx"))


torch.serialization.add_safe_globals([Mamba2State, Mamba2Cache])  # torch.load may make them


def _follow_labels(past: Mamba2Cache, seq_idx, exists) -> Mamba2Cache:
    """The cache with zero states in rows where another sequence begins, and rows' last labels.

    seq_idx, exists: (b, l), the labels of the next positions, and which of them are not masked.
    """
    first, any_exist = _first_label(seq_idx, exists)
    last, _ = _first_label(seq_idx.flip(1), exists.flip(1))
    if past.seq_idx is None:
        past = Mamba2Cache(past.states, past.length, torch.stack([first, first * 0], dim=1))
    label, seen = past.seq_idx[:, 0], past.seq_idx[:, 1] != 0
    ended = any_exist & seen & (first != label)  # (b)
    states = _where(ended, past.map(torch.zeros_like), past).states
    label = torch.stack([torch.where(any_exist, last, label), (any_exist | seen).long()], dim=1)
    return Mamba2Cache(states, past.length, label)


def _where(rows, ours: Mamba2Cache, others: Mamba2Cache) -> Mamba2Cache:
    """The other cache, with `ours` in these rows (b)."""
    return others.map(lambda b, a: torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b), ours)


def _first_label(labels, exists):
    """(b), the label of each row's first position that exists; (b) bool, whether there is one."""
    labels, exists = F.pad(labels.long(), (0, 1)), F.pad(exists, (0, 1))  # so that l > 0
    return labels.gather(1, exists.int().argmax(1, keepdim=True))[:, 0], exists.any(1)


class Mamba2PreTrainedModel(PreTrainedModel):
    """What the models below share: initialisation, strict loading and complete saving."""

    config_class = Mamba2Config
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Mamba2Block"]
    _is_stateful = False

    def _init_weights(self, module):
        if isinstance(module, Mamba2):
            if not getattr(module.A_log, "_is_hf_initialized", False):
                module.reset_parameters(depth=self.config.num_hidden_layers)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
        elif not isinstance(module, CausalConv1d):  # the Mamba2 around it takes care of it
            super()._init_weights(module)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs
    ):
        """Load a published or saved model by its name on the hub or its folder, in the original
        mamba_ssm format, in transformers' format, or Codestral-Mamba's.

        Raises:
            OSError, ValueError: the checkpoint or a file of it is not there, is damaged, of another
                architecture, or its weights are not exactly those of the model that its config
                describes. Nothing is ever filled up with random weights, even if
                `ignore_mismatched_sizes` asks for it.
        """
        name = pretrained_model_name_or_path
        kwargs.setdefault("key_mapping", {r"backbone\.embedding\.": "backbone.embeddings."})
        try:
            model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
            if model.all_tied_weights_keys != model.get_expanded_tied_weights_keys(True):
                hint = "pass tie_word_embeddings=False to load both"
                raise ValueError(f"the file's lm_head.weight differs from its embedding: {hint}")
            wrong = {k: sorted(info[k]) for k in ("missing_keys", "unexpected_keys") if info[k]}
            if wrong:
                hint = "names what is new in it as _keys_to_ignore_on_load_missing"
                raise ValueError(f"{wrong}; a class of your own {hint}, a list of patterns")
        except Exception as error:  # of any library, and any length
            raise (OSError if isinstance(error, OSError) else ValueError)(
                f"{str(name)!r} cannot be loaded as the {cls.__name__} that its config describes: "
                f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            ) from error
        return (model, info) if output_loading_info else model

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, files, load_config, *args):
        """Refuse what transformers would cast, overwrite, or fetch from elsewhere in silence."""
        shards = (load_config.sharded_metadata or {}).get("weight_map", {}).values()
        if elsewhere := [shard for shard in shards if Path(shard).name != shard]:
            raise ValueError(f"shard {elsewhere[0]!r} is not a file beside the index")
        weights = dict(state_dict or {})
        for file in (state_dict is None and files) or ():
            weights.update(load_state_dict(file))  # mapped, not read
        for name, weight in weights.items():
            if not (weight.is_floating_point() or load_config.hf_quantizer):
                raise ValueError(f"{name} is of {weight.dtype}, and must be floating-point")
            if (other := name.replace("embedding.", "embeddings.")) != name and other in weights:
                raise ValueError(f"{name} and {other} are one weight: leave one out")
        info, index = super()._load_pretrained_model(model, state_dict, files, load_config, *args)
        if info.mismatched_keys:  # nothing has been allocated for these yet
            raise ValueError(f"mismatched_keys {sorted(info.mismatched_keys)}")
        return info, index

    def save_pretrained(self, save_directory, is_main_process=True, **kwargs):
        """As in transformers, but always under the standard names, and without leaving the single
        file of an earlier save beside shards: it would be loaded in their place."""
        kwargs = {"save_original_format": False, **kwargs}
        super().save_pretrained(save_directory, is_main_process, **kwargs)
        folder = Path(save_directory)
        if is_main_process and any(folder.glob("model-*-of-*.safetensors")):
            (folder / "model.safetensors").unlink(missing_ok=True)


class Mamba2Model(Mamba2PreTrainedModel):
    """Embedding, blocks and final norm: the language model without its head."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # of a Mamba2ForCausalLM's checkpoint

    def __init__(self, config: Mamba2Config):
        super().__init__(config)
        for name, part in backbone_parts(config).items():
            self.add_module(name, part)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings

    def set_input_embeddings(self, embeddings):
        self.embeddings = embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        *,
        seq_idx=None,
        group=None,
        past_key_values=None,
        **others,
    ):
        """Run the model on some tokens, from a cache if there is one.

        Args:
            input_ids: (b, l) integers, or inputs_embeds: (b, l, d). Exactly one of them.
            attention_mask: (b, l), or longer on the left, for what the cache has seen; 0 marks
                positions that are skipped, wherever they occur. None is no such position.
            cache: the Mamba2Cache of an earlier call, which is not changed; or one of states to
                start from, such as trained ones: Mamba2Cache(states), a Mamba2State per layer.
            use_cache: return a new cache; None is the config's choice, and no cache in training.
            output_hidden_states: also return the input of every block, and the final output.
            seq_idx: (b, l) integers, labels of packed sequences: where the label changes, another
                begins. With a cache, also where it changes from the last call to this one.
            group: a process group, if each of its ranks has a slice of the sequence. Then all that
                is (b, l, ...) here is of the slice, and the cache that is passed is the same on
                every rank: what is before the first slice. The cache that is returned is after the
                last slice, on every rank. See `Slices`.
            past_key_values: another name of `cache`.
            others: position_ids, and what DataCollatorWithFlattening adds; see `_packing`.

        Returns:
            BaseModelOutputWithPast: last_hidden_state (b, l, d), cache, hidden_states.
        """
        past = _one_cache(cache, past_key_values)
        x = _one_input(input_ids, inputs_embeds, self.config.hidden_size)
        mask = _as_mask(attention_mask, x, past)
        seq_idx = _packing(x, seq_idx, mask, past, others)
        if past.states and len(past.states) != len(self.layers):
            raise ValueError(f"{len(past.states)} states for {len(self.layers)} layers: one each")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache is None:  # DataParallel cannot gather caches
            use_cache = self.config.use_cache and not self.training
            use_cache = use_cache and not hasattr(self, "_is_replica")
        h = self.embeddings(input_ids.long()) if inputs_embeds is None else inputs_embeds
        if self.config.residual_in_fp32:
            h = h.to(_at_least_float32(h.dtype))
        order = lengths = None
        if mask is not None:  # once for all layers
            order = Order(mask)
            h = order.sort(h.masked_fill(~mask[..., None], 0))  # whatever was there, even a NaN
            seq_idx, lengths = order.sort_labels(seq_idx), order.lengths
        checkpoints = self.gradient_checkpointing and self.training
        options = dict(states=len(past.states) > 0, checkpoints=checkpoints)
        slices = Slices.of(group, self.config, h, lengths, seq_idx, **options)
        length = past.length + (h.shape[1] if slices is None else slices.length)
        if seq_idx is not None:
            exists = (
                torch.ones_like(seq_idx, dtype=torch.bool) if order is None else order.sort(mask)
            )
            past = _follow_labels(past, *((seq_idx, exists) if slices is None else slices.ends))

        hidden_states = []

        def call(block, h, *arguments):
            if output_hidden_states:
                hidden_states.append(h)
            if checkpoints:
                h, state = recomputed(block, block, h, *arguments)
            else:
                h, state = block(h, *arguments)
            return h, state if use_cache else None  # it would only take memory

        given = lengths, seq_idx, slices
        h, states = run_blocks(self.layers, h, past.states, *given, call=call)
        hidden_states.append(self.norm_f(h))
        if order is not None:
            hidden_states = [
                order.restore(h).masked_fill(~mask[..., None], 0) for h in hidden_states
            ]
        if use_cache and not isinstance(length, Tensor):
            length = torch.full((), length, device=h.device)
        cache = Mamba2Cache(states, length, past.seq_idx) if use_cache else None
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states[-1],
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            **{CACHE: cache},
        )


def _one_cache(cache, past_key_values):
    """The cache, which callers may pass under either name; an empty one if there is none."""
    if cache is not None and past_key_values is not None:
        raise TypeError("cache and past_key_values are one argument: give one of them")
    cache = past_key_values if cache is None else cache
    if cache is None:
        return Mamba2Cache(())
    if not isinstance(cache, (Mamba2Cache, GenerationCache)):
        raise TypeError(
            f"cache is a {type(cache).__name__}: it must be the Mamba2Cache that an earlier call "
            "of this model returned"
        )
    return cache


def _one_input(input_ids, inputs_embeds, width):
    """Whichever of the two is passed, (b, l) or (b, l, d)."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if inputs_embeds is None:
        _require("input_ids", input_ids, "b l", {}, "integers")
        return input_ids
    _require("inputs_embeds", inputs_embeds, "b l d", {"d": width})
    return inputs_embeds


def _as_mask(attention_mask, x, past):
    """(b, l) bool from transformers' attention_mask, or None where nothing is masked."""
    if attention_mask is None:
        return None
    b, l = x.shape[:2]
    _require("attention_mask", attention_mask, "b l", {}, "a mask")
    seen = attention_mask.shape[1] - l  # positions that the cache has seen and the mask covers, too
    if seen and _is_eager(x) and seen != past.get_seq_length():
        seen = 0
    _require("attention_mask", attention_mask, "b l", dict(b=b, l=seen + l), "a mask")
    mask = _as_bool("attention_mask", attention_mask[:, seen:])
    # Nothing masked is the common case, and worth asking for.
    return None if _is_eager(mask) and bool(mask.all()) else mask


def _packing(x, seq_idx, mask, past, others):
    """seq_idx, from position_ids if need be: packed sequences begin where positions are 0.

    `others` are arguments by name that transformers may pass: position_ids, flash attention's
    lengths of packed sequences (accepted beside one of the two, since they say the same), and
    output_attentions. Anything else is a TypeError.
    """
    positions, attentions = others.pop("position_ids", None), others.pop("output_attentions", None)
    flash = "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"
    known = flash if seq_idx is not None or positions is not None else ()
    if unknown := [name for name in others if name not in known]:
        hint = "pass seq_idx with it" if unknown[0] in flash else "it is unknown here"
        raise TypeError(f"forward() got an unexpected keyword argument {unknown[0]!r}: {hint}")
    if attentions:
        raise ValueError("output_attentions = True: Mamba-2 has no attentions; leave it out")
    sizes = dict(b=x.shape[0], l=x.shape[1])
    if seq_idx is not None:
        _require("seq_idx", seq_idx, "b l", sizes, "integers")
    if positions is not None:
        _require("position_ids", positions, "b l", sizes, "integers")
        begins = positions == 0
        continues = F.pad(positions[:, 1:] - positions[:, :-1] == 1, (1, 0))
        fits = begins | continues
        if seq_idx is not None:  # then both must say the same
            fits &= F.pad(begins[:, 1:], (1, 0)) == _borders(seq_idx)
        fits = fits if mask is None else fits | ~mask
        if past.states or (_is_eager(x) and not fits.all()):
            raise ValueError(
                "position_ids must count up from 0 in each packed sequence, and come without a "
                "cache: leave them out, and pass seq_idx where packed sequences need labels"
            )
        seq_idx = begins.cumsum(1) if seq_idx is None else seq_idx
    return None if seq_idx is None else seq_idx.long()


class Mamba2ForCausalLM(Mamba2PreTrainedModel, GenerationMixin):
    """The Mamba-2 language model, for generate, Trainer, PEFT and pipelines of transformers.

        model = Mamba2ForCausalLM.from_pretrained("state-spaces/mamba2-130m")
        ids = model.generate(**tokenizer("Mamba is", return_tensors="pt"), max_new_tokens=20)

    `generate(ids, cache=cache)` resumes from a cache. As always in transformers, ids are the whole
    sequence, or new tokens alone with an attention_mask that covers the whole sequence.
    """

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}
    accepts_loss_kwargs = True  # Trainer passes num_items_in_batch

    def __init__(self, config: Mamba2Config):
        super().__init__(config)
        self.backbone = Mamba2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=None,
        output_hidden_states=None,
        *,
        seq_idx=None,
        group=None,
        num_items_in_batch=None,
        segment_length=None,
        progress=False,
        past_key_values=None,
        **others,
    ):
        """Logits, and with `labels` the loss. All other arguments: see `Mamba2Model.forward`.

        Args:
            labels: (b, l) integers, the tokens themselves, which are shifted here: position t
                predicts the next position of its sequence that is not masked. -100 is not
                predicted. The logits of all positions are never held at once for it.
            logits_to_keep: return logits of the last so many positions (0: all), or of those in a
                tensor of indices. None is all, but none with labels in training or in segments,
                where logits_to_keep=0 returns them.
            group: the loss is that of the whole sequence, on every rank. Gradients of parameters,
                averaged over the ranks as DDP and FSDP do, are those of one process.
            num_items_in_batch: divide the summed loss by this, not by the number of predictions.
            segment_length: positions in a segment, see `read_in_segments`; "auto" for about the
                least memory that does not leave a GPU idle; 0 for the whole sequence at once; None
                for the config's choice. With a group: positions in this rank's slice of a segment.
            progress: show a progress bar over the segments.

        Returns:
            CausalLMOutputWithPast: loss, logits (b, l, vocabulary), cache, hidden_states.
        """
        cache = _one_cache(cache, past_key_values)
        x = _one_input(input_ids, inputs_embeds, self.config.hidden_size)
        if isinstance(cache, GenerationCache):
            given = dict(others, input_ids=input_ids, inputs_embeds=inputs_embeds, seq_idx=seq_idx)
            given |= dict(attention_mask=attention_mask, logits_to_keep=logits_to_keep)
            return cache.read(dict(given, output_hidden_states=output_hidden_states))
        mask = _as_mask(attention_mask, x, cache)
        seq_idx = _packing(x, seq_idx, mask, cache, others)
        b, l = x.shape[:2]
        length = self._segment_length(segment_length, b, l, group)
        count, targets = max(1, -(-l // length)), None
        if group is not None:
            options = dict(labels=labels is not None, items=num_items_in_batch is not None)
            _agree(group, x, segments=count, **options)
        if labels is not None:
            _require("labels", labels, "b l", dict(b=b, l=l), "integers")
            targets = next_tokens(labels.long(), mask, seq_idx, group, length)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if count > 1 and output_hidden_states:
            raise ValueError(
                f"output_hidden_states = True, segment_length = {length}: segments are there so "
                "that nothing of this size is held; leave one of the two out"
            )
        first = 0  # the first position whose logits are wanted
        if logits_to_keep is None and labels is not None and (self.training or count > 1):
            first = l + 1  # none
        elif isinstance(logits_to_keep, int) and logits_to_keep > 0:
            first = max(0, l - logits_to_keep)
        options = dict(use_cache=use_cache, output_hidden_states=output_hidden_states, group=group)
        loss, h, output = read_in_segments(
            self, (x, mask, seq_idx, targets), cache, length, first, progress, options
        )
        if labels is not None:
            items = (targets != -100).sum()
            if group is not None:
                loss, items = (_all_gather(t[None], group).sum() for t in (loss, items))
            loss = loss / (items if num_items_in_batch is None else num_items_in_batch)
        keep = logits_to_keep if torch.is_tensor(logits_to_keep) else slice(None)
        logits = None if h is None else self.lm_head(h[:, keep])
        given = {CACHE: getattr(output, CACHE), "hidden_states": output.hidden_states}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **given)

    def summed_loss(self, h, targets):
        """The summed cross entropy of logits of h (b, l, d) against targets (b, l), -100 left out.

        The logits of a few rows at a time are made, used and freed, and made again for the backward
        pass; if all rows are that few, their logits are kept for it.
        """

        def summed_loss(h, targets):
            logits = self.lm_head(h)  # (rows, vocabulary)
            logits = logits.to(_at_least_float32(logits.dtype))
            return F.cross_entropy(logits, targets.to(logits.device), reduction="sum")

        # With so many rows, logits take the memory of the head's weight, or 256 KB; a GPU needs
        # more work.
        rows = max(self.config.hidden_size, 2**16 // self.config.vocab_size)
        rows = max(rows, 4096 if h.is_cuda else 0)
        chunks = [*zip(h.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)]
        if len(chunks) == 1:
            return summed_loss(*chunks[0])
        return sum(recomputed(self.lm_head, summed_loss, *chunk) for chunk in chunks)

    def _segment_length(self, length, b, l, group=None):
        """How many of l positions are in a segment; `length` is what the caller asked for."""
        if length is None:
            length = self.config.segment_length
        _check("segment_length", length, *SEGMENT)
        if length == "auto" and group is not None:
            raise ValueError("segment_length = 'auto': slices depend on it, so give it as a number")
        if length == "auto":
            # Memory is l / s times what is kept between segments and s times what a position
            # leaves for the backward pass: roughly these numbers. The best s makes both equal.
            config, (inner, channels, heads) = self.config, self.backbone.layers[0].mixer.widths
            between = inner * config.state_size + (config.conv_kernel - 1) * channels
            inside = 4 * (inner + channels + heads)
            if self.backbone.gradient_checkpointing:
                inside = config.hidden_size + inside / config.num_hidden_layers
            count = max(1, math.ceil(math.sqrt(l * inside / between)))
            if self.device.type == "cuda":  # the GPU must have more to do than the host that asks
                size = sum(weight.numel() for weight in self.backbone.layers[0].parameters())
                count = max(1, min(count, int(b * l * size / 1e11)))
            length = -(-l // count)  # all of one length, but for the last
        return length or max(1, l)

    @torch.no_grad()
    def prefill(self, input_ids, attention_mask=None, cache=None, **options):
        """The Mamba2Cache after a prompt, which can be saved, and resumed any number of times.

        Read in segments, a prompt of any length takes the memory of one. Arguments: see `forward`;
        segment_length is "auto" unless given.
        """
        options = {"segment_length": "auto", **options, "logits_to_keep": 1}
        options |= dict(use_cache=True, return_dict=True)
        return self(input_ids, attention_mask, cache, **options).cache

    # Generation: transformers' own, on a GenerationCache.

    def generate(self, inputs=None, generation_config=None, **options):
        """As in all of transformers; on CUDA, a step of the model by one token is a CUDA graph."""

        def option(name):  # as in transformers: what a configuration leaves out is the model's
            value = options.get(name, getattr(generation_config, name, None))
            default = None if name in options else getattr(self.generation_config, name, None)
            return default if value is None else value

        given = _one_cache(options.pop("cache", None), options.pop("past_key_values", None))
        self._check_generate(inputs, options, option)
        if count := option("assistant_early_exit"):  # not transformers' way, which changes config
            options |= dict(assistant_model=self.first_layers(count), assistant_early_exit=None)
        if option("use_cache") is False:
            if getattr(given, "states", True):
                raise ValueError("use_cache = False: leave it out, or leave out the cache")
            return super().generate(inputs, generation_config, **options)
        cache = given if isinstance(given, GenerationCache) else GenerationCache(self, given)
        cache.recording |= bool(option("is_assistant"))  # its tokens may be rejected
        outer = _generating.set(cache)
        try:
            output = super().generate(inputs, generation_config, **options, **{CACHE: cache})
        finally:
            _generating.reset(outer)
            cache.close()
        if isinstance(output, dict) and not option("is_assistant"):  # an assistant goes on with it
            # The states of the last beams are not those of the texts that are returned.
            value = None if hasattr(output, "beam_indices") else cache.value()
            output[CACHE] = output.cache = value
        return output

    def first_layers(self, count: int) -> Mamba2ForCausalLM:
        """A model of the first `count` layers, with this one's weights: its own draft."""
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = count
        with torch.device("meta"):
            model = type(self)(config)
        for name, part in self.backbone.named_children():
            setattr(model.backbone, name, part[:count] if name == "layers" else part)
        model.lm_head, model.generation_config = self.lm_head, copy.deepcopy(self.generation_config)
        model.generation_config.assistant_early_exit = None  # it has no draft of its own
        return model.train(self.training)

    def generate_batch(self, *args, **kwargs):
        raise ValueError("generate_batch needs attention's keys: pad on the left and use generate")

    def _check_generate(self, ids, options, option):
        ids = options.get("input_ids") if ids is None else ids
        sizes = {}
        for name, value in {"input_ids": ids, "seq_idx": options.get("seq_idx")}.items():
            if value is not None:
                _require(name, value, "b l", sizes, "integers")
        if ids is not None and 0 in ids.shape and options.get("inputs_embeds") is None:
            raise ValueError(f"input_ids has shape {tuple(ids.shape)}: it must hold a token")
        mask = options.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and not (exists := mask[:, -1:] != 0).all():
            raise ValueError(
                f"attention_mask[{exists.long().argmin()}] ends in 0, where the row's next token "
                "would be read: pad on the left, tokenizer.padding_side = 'left'; every row needs "
                "a token"
            )

        packed = options.get("seq_idx") is not None or options.get("inputs_embeds") is not None
        chunked = packed and option("prefill_chunk_size")  # by transformers, which cuts ids alone
        first = "read the prompt with `prefill` if need be, and generate from its cache"
        for name, wrong, remedy in (
            ("group", options.get("group"), first),
            ("prefill_chunk_size", chunked, f"with seq_idx or inputs_embeds, {first}"),
            ("cache_implementation", option("cache_implementation"), "a state needs none"),
        ):
            if wrong:
                raise ValueError(f"{name} = {wrong!r}: leave it out; {remedy}")

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def _expand_inputs_for_generation(self, expand_size=1, **kwargs):
        if expand_size > 1 and (cache := _generating.get()) is not None:
            cache.replace(cache.value().repeat(expand_size))
        return super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)

    def _get_stopping_criteria(self, generation_config, **kwargs):
        criteria = super()._get_stopping_criteria(generation_config=generation_config, **kwargs)
        cache = _generating.get()
        if cache is None or generation_config.num_beams > 1:
            return criteria
        return _WatchedCriteria(criteria, cache)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        inputs_embeds=None,
        is_first_iteration=False,
        **kwargs,
    ):
        kwargs.pop("tokenizer", None)  # of stop_strings: transformers hands it on to the model
        # transformers takes ids that come with a cache for the whole sequence, unless a longer
        # attention_mask comes with them, and cuts off what the cache has seen.
        cache, seen = kwargs.get(CACHE), 0
        if isinstance(cache, GenerationCache):
            seen = cache.get_seq_length()
            if cache.recording and input_ids.shape[1] > seen:
                next_sequence_length = input_ids.shape[1] - seen
        if next_sequence_length is not None and next_sequence_length <= 0:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens, and the cache has seen {seen}: give "
                "the whole sequence with at least one token that the cache has not seen, or new "
                "tokens with an attention_mask that covers the whole sequence; inputs_embeds must "
                "be of the whole sequence"
            )
        seq_idx, length = kwargs.pop("seq_idx", None), input_ids.shape[1]
        given = dict(inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration)
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, **given, **kwargs
        )
        # What is generated belongs to the prompt's last sequence, as a cache knows.
        if seq_idx is not None and (cache is None or is_first_iteration):
            more = seq_idx[:, -1:].expand(-1, length - seq_idx.shape[1])
            seq_idx = torch.cat([seq_idx, more], dim=1)
            inputs["seq_idx"] = seq_idx[:, -(next_sequence_length or length) :]
        return inputs

    def stream(self, input_ids, **options):
        """Yield the tokens, (b) by (b), that `generate(input_ids, **options)` would append.

            for token in model.stream(ids, max_new_tokens=100, do_sample=True, top_p=0.9):
                print(tokenizer.decode(token), end="", flush=True)

        transformers prepares prompt, sampling and stopping, so that all arguments mean the same. On
        CUDA the host does not wait for each token: it checks for the end of the text every eight.

        Raises:
            ValueError: options that mean more than one token after the other, such as beams.
        """
        for name in ("assistant_model", "assistant_early_exit", "streamer", "custom_generate"):
            if options.get(name) is not None:
                raise ValueError(f"{name} is an option of generate: stream has a loop of its own")
        config = options.get("generation_config") or self.generation_config
        # transformers loses the tokenizer on its way to a custom_generate that is a function.
        if config.stop_strings is not None:
            raise ValueError(
                f"generation_config.stop_strings = {config.stop_strings!r}: set it to None, and "
                "pass stop_strings= and tokenizer= to stream"
            )
        if (strings := options.pop("stop_strings", None)) is not None:
            if options.get("tokenizer") is None:
                raise ValueError("stop_strings are looked for in text: pass the tokenizer, too")
            stop = StopStringCriteria(options["tokenizer"], strings)
            options["stopping_criteria"] = [*(options.get("stopping_criteria") or []), stop]
        options["use_cache"] = True
        return self.generate(input_ids, custom_generate=type(self)._stream, **options)

    def _stream(
        self, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
    ):
        """What transformers calls to generate, with all arguments prepared: an iterator."""
        mode = generation_config.get_generation_mode()
        if mode not in ("greedy_search", "sample") or generation_config.num_return_sequences != 1:
            raise ValueError(
                f"generation mode {mode.value!r} with num_return_sequences = "
                f"{generation_config.num_return_sequences}: stream yields one text for a prompt, "
                "token by token; use generate"
            )
        output = self._prefill(input_ids, generation_config, model_kwargs)
        return self._tokens(
            input_ids, output, logits_processor, stopping_criteria, generation_config
        )

    @torch.no_grad()
    def _tokens(self, ids, output, logits_processor, stopping_criteria, config):
        """Yield tokens (b) after the prompt `ids` (b, l), which gave `output`."""
        text, length = F.pad(ids, (0, 64)), ids.shape[1]
        limits = [c for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
        criteria = [c for c in stopping_criteria if c not in limits]
        count = max(1, min([config.max_length, *(c.max_length for c in limits)]) - length)
        ends = [c.eos_token_id for c in criteria if hasattr(c, "eos_token_id")]
        pad = config.pad_token_id
        if ends and pad is None:
            pad = ends[0].flatten()[0].item()
        unfinished = torch.ones(ids.shape[0], dtype=torch.bool, device=ids.device)
        step = dict.fromkeys(("inputs_embeds", "attention_mask", "seq_idx", "logits_to_keep"))
        step["output_hidden_states"] = False
        every = 8 if ids.is_cuda else 1
        waiting, overs = [], []
        logits, cache = output.logits[:, -1], output.cache
        try:
            for left in reversed(range(count)):
                scores = logits_processor(text[:, :length], logits.float())
                if config.do_sample:
                    token = torch.multinomial(scores.softmax(-1), 1)[:, 0]
                else:
                    token = scores.argmax(-1)
                if ends:  # rows that have ended are filled up
                    token = token.masked_fill(~unfinished, pad)
                if length == text.shape[1]:  # double the buffer: appending stays O(1) amortised
                    text = F.pad(text, (0, length))
                text[:, length], length = token, length + 1
                if not criteria:
                    yield token
                else:
                    for criterion in criteria:
                        unfinished = unfinished & ~criterion(text[:, :length], scores)
                    waiting.append(token)
                    overs.append(~unfinished.any())
                    if len(waiting) == every or left == 0:
                        over = [*torch.stack(overs).tolist(), True]  # waits for the GPU
                        yield from waiting[: over.index(True) + 1]
                        if over.index(True) < len(waiting):
                            return
                        waiting, overs = [], []
                if left > 0:
                    output = cache.read(dict(step, input_ids=text[:, length - 1 : length]))
                    logits = output.logits[:, -1]
        finally:
            cache.close()


_generating = contextvars.ContextVar("_generating", default=None)  # this thread's GenerationCache


class _WatchedCriteria(StoppingCriteriaList):
    """Stopping criteria that tell the cache which rows have ended."""

    def __init__(self, criteria, cache):
        super().__init__(criteria)
        self.cache = cache

    def __call__(self, input_ids, scores, **kwargs):
        done = super().__call__(input_ids, scores, **kwargs)
        self.cache.rows_have_ended(done)
        return done


class GenerationCache:
    """What `generate` carries from token to token: a Mamba2Cache, exchanged for the next in place.

    It keeps the states of rows that have ended, decodes with a CUDA graph where `kernels` can, and
    forgets tokens, for speculative decoding: a state cannot be rewound, but an older one (`base`)
    and the tokens since then (`since`) can be kept, and read again.
    """

    is_compileable = False
    is_linear = (False,)  # if all were True, generate would pass tokens that were already read

    def __init__(self, model, cache: Mamba2Cache):
        self.model, self.recording, self.decoder, self.mask = model, False, None, None
        self.ended = self.ended_before = self.frozen = None
        self.replace(cache)

    def replace(self, cache: Mamba2Cache):
        self.current, self.length = cache, cache.get_seq_length()
        self.base, self.since = cache, None
        if self.decoder:
            self.decoder.load(cache)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def value(self) -> Mamba2Cache:
        """The Mamba2Cache after all tokens that are not forgotten."""
        cache = self.current
        if cache is None:
            mask = None if self.mask is None else self.mask[:, : self.length]
            cache = self.model.prefill(self.since, mask, self.base)
        if self.decoder:
            states = tuple(Mamba2State(*state) for state in self.decoder.states())
            cache = Mamba2Cache(states, self.length, cache.seq_idx)
        return cache if self.frozen is None else _where(*self.frozen, cache)

    def close(self):
        """Give back the decoder."""
        if self.decoder:
            self.current = self.value()
            self.decoder.close()
        self.decoder = None

    def rows_have_ended(self, done):
        """Note which rows (b) ended with the token that was just chosen."""
        if not self.recording:  # in speculative decoding the token may be rejected
            self.ended_before = self.ended
            self.ended = done if self.ended is None else self.ended | done

    def read(self, options):
        """The model's output for more tokens; options are those of its forward."""
        ids, embeds = options["input_ids"], options["inputs_embeds"]
        length = (embeds if ids is None else ids).shape[1]
        rows = self.ended_before  # the last token of these rows has been read by now
        if rows is not None and rows.any():
            if self.frozen is None or (rows & ~self.frozen[0]).any():
                self.frozen = rows, self.value()
        if self.recording:
            output = self._read_again(options)
        elif (output := self._decode(ids, options)) is None:
            if self.decoder:
                self.close()  # and continue from its states
            output = self.model(**options, cache=self.current, use_cache=True, return_dict=True)
            self.current = output.cache
        self.length += length
        output[CACHE] = self
        return output

    def _decode(self, ids, options):
        """The output for one token (b, 1) with a CUDA graph, or None where that is impossible."""
        mask, seq_idx = options["attention_mask"], options["seq_idx"]
        if not kernels or ids is None or ids.shape[1] != 1 or seq_idx is not None:
            return None
        if options["output_hidden_states"] or (mask is not None and not mask[:, -1].all()):
            return None  # masked: in a prompt that is read token by token
        if self.decoder is None and self.current.states:
            self.decoder = kernels.decoder(self.model, self.current) or False
        return CausalLMOutputWithPast(logits=self.decoder(ids)) if self.decoder else None

    # Speculative decoding, for one row:

    @property
    def is_croppable(self):
        return self.recording

    def activate_past_recording(self):
        self.recording = True

    def crop(self, tokens: int):
        """Forget the last -tokens tokens or, if positive, all after the first `tokens`.

        If that forgets nothing, all tokens are there to stay.
        """
        start, length = self.base.get_seq_length(), self.length
        tokens = int(tokens)
        kept = min(tokens if tokens > 0 else length + tokens, length)
        if kept < start:
            raise ValueError(f"crop({tokens}): {start - kept} of these tokens were there to stay")
        if kept == length and self.current is not None:
            self.base, self.since = self.current, None
        elif kept < length:
            self.current = self.base if kept == start else None
            self.since = None if kept == start else self.since[:, : kept - start]
        self.length = kept

    def _read_again(self, options):
        """The output for ids (1, l) after the tokens that were not forgotten."""
        ids, self.mask = options["input_ids"], options["attention_mask"]
        if ids is None or options["seq_idx"] is not None:
            raise ValueError(
                "speculative decoding reads input_ids alone: with inputs_embeds or seq_idx, read "
                "the prompt with `prefill`, and generate from its cache"
            )
        l = ids.shape[1]
        if self.current is None and self.since.shape[1] > 32:  # too many to read each time
            self.replace(self.value())
        since = ids if self.since is None else torch.cat([self.since, ids], dim=1)
        cache, new = (self.base, since) if self.current is None else (self.current, ids)
        keep = options["logits_to_keep"] or l
        options = {**options, "input_ids": new, "logits_to_keep": keep}
        output = self.model(**options, cache=cache, use_cache=True, return_dict=True)
        if output.hidden_states is not None:
            output.hidden_states = tuple(h[:, -l:] for h in output.hidden_states)
        self.since, self.current = since, output.cache
        return output

    def reorder_cache(self, beam_idx):
        self.replace(self.value().select(beam_idx))


def read_in_segments(model, whole, cache, length, first, progress, options):
    """A Mamba2ForCausalLM's backbone and loss over a sequence, in segments of `length` positions.

    Each segment starts from the state after the one before, and no intermediate tensor spans the
    whole sequence, except integers. Results and gradients are those of the whole. For the backward
    pass only the states between segments are kept; a segment is computed again when its turn comes,
    which costs one more forward pass. So memory grows as s + l / s with the length s of a segment,
    and as the square root of l with the best s.

    Args:
        whole: tokens (b, l) or embeddings (b, l, d); mask, seq_idx and targets, (b, l) or None.
        first: the first position whose hidden state is returned.
        options: further arguments of the backbone's forward.

    Returns:
        the summed loss or None; hidden states (b, l - first, d); the backbone's last output.
    """

    def segment(x, mask, seq_idx, targets, cache, last):
        name = "inputs_embeds" if x.is_floating_point() else "input_ids"
        given = {**options, "attention_mask": mask, "seq_idx": seq_idx, "cache": cache}
        given["use_cache"] = options["use_cache"] if last else True
        output = model.backbone(**{name: x}, **given, return_dict=True)
        h = output.last_hidden_state
        return None if targets is None else model.summed_loss(h, targets), output

    total = whole[0].shape[1]
    count = max(1, -(-total // length))
    run = segment if count == 1 else functools.partial(recomputed, model, segment)
    pieces = [[None] * count if t is None else t.split(length, dim=1) for t in whole]
    segments = zip(*pieces, strict=True)
    if progress:
        from tqdm.auto import tqdm

        segments = tqdm(segments, total=count, unit=" segments")
    losses, kept = [], []
    with _without_weight_cache(whole[0]):
        for i, piece in enumerate(segments):
            loss, output = run(*piece, cache, i == count - 1)
            losses.append(loss)
            cache, h = getattr(output, CACHE), output.last_hidden_state
            end = min((i + 1) * length, total)
            if first < end or first == end == total:  # else the slice would keep all of h alive
                kept.append(h[:, max(0, first - i * length) :])
    h = torch.cat(kept, dim=1) if kept else None
    return None if losses[0] is None else sum(losses), h, output


def _without_weight_cache(x):
    """Autocast as it is on x's device, with its weight-cast cache disabled.

    With that cache, weights are cast once for all segments, and their gradients added in bfloat16.
    """
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, cache_enabled=False)


def recomputed(module, function, *arguments):
    """function(*arguments), which is computed again for the backward pass and keeps nothing for it.

    Like autograd with saved tensors, the backward pass refuses weights of the module that were
    changed in place since. torch.func does not support checkpointing: there nothing is recomputed.
    """
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return function(*arguments)
    # Of these very tensors: FSDP exchanges a module's parameters between the two passes.
    weights = () if torch.compiler.is_compiling() else module.parameters()
    versions = [(weight, weight._version) for weight in weights]

    def checked(*arguments):
        if any(weight._version != version for weight, version in versions):
            raise RuntimeError(
                "weights were modified in place between the forward pass and the backward pass, "
                "which computes the former again: call backward() before optimizer.step()"
            )
        return function(*arguments)

    return checkpoint(checked, *arguments, use_reentrant=False)


def next_tokens(labels, mask=None, seq_idx=None, group=None, length=0):
    """(b, l), for each position the label that it has to predict; -100 where there is none.

    That is the label of the next position that is not masked, unless it is of another sequence.
    With a group: for this rank's slices, of `length` positions in each segment.
    """
    if group is not None:
        return _next_tokens_of_slices(labels, mask, seq_idx, length, group)
    order = None
    if mask is not None:
        order = Order(mask)
        labels, seq_idx = order.sort(labels.masked_fill(~mask, -100)), order.sort_labels(seq_idx)
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
    if seq_idx is not None:
        ends = F.pad(_borders(seq_idx), (0, 1))[:, 1:]
        targets = targets.masked_fill(ends, -100)
    if order is not None:
        targets = order.restore(targets).masked_fill(~mask, -100)
    return targets


def register_with_transformers():
    """Make AutoConfig, AutoModel and AutoModelForCausalLM use this file for "mamba2"."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    AutoConfig.register("mamba2", Mamba2Config, exist_ok=True)
    AutoModel.register(Mamba2Config, Mamba2Model, exist_ok=True)
    AutoModelForCausalLM.register(Mamba2Config, Mamba2ForCausalLM, exist_ok=True)


# --------------------------------------------------------------------------------------------------
# 7. One sequence on several GPUs
# --------------------------------------------------------------------------------------------------


class Slices:
    """What a rank knows of a sequence of which each rank of a group has a slice (Section 8.2).

        y, state = layer.step(u, state, mask, seq_idx, group)        # u: (b, l of this rank, d)
        model(ids, labels=ids, group=group).loss.backward()          # ids: (b, l of this rank)

    In the order of ranks, the slices are the sequence; they may be of any lengths, 0 too. What
    crosses a border is what a layer's state is made of:

    - The convolution needs the last k-1 inputs before the slice: one all-gather of those of each
      slice.
    - SSD is linear in its state. Each rank scans its slice from a zero state; one all-gather of the
      final states (p, n) and of the total decays gives the state before each slice. That is the
      recurrence between chunks (step 3 of Listing 1) with slices for chunks. What it adds to the
      outputs is one matrix product.

    Bytes that a rank sends per layer and forward pass to each of the R-1 others, whatever the
    length (e: bytes of a number of the projections; 8 instead of 4 in a float64 layer):

        b (4 h (p n + 1) + e (k-1) (h p + 2 g n))

    The backward pass, recomputation and each further segment send the same again. For one row of
    mamba2-2.7b in bfloat16 this is 2.65 MB.

    Gradients flow back along the same path: each rank gets its part of the gradients, and the parts
    add up. The loss of `Mamba2ForCausalLM` is the whole sequence's on every rank, so the average of
    its gradients over the ranks is one process's gradient, which is what DDP and FSDP compute.

    With segment_length, each segment is cut in slices, and a rank has its slices of all segments
    one after another: ids.unflatten(1, (-1, R, segment_length))[:, :, rank].flatten(1).

    In shapes here r is ranks, if not (g r), which is heads; s is segments.

    Raises:
        TypeError: group is not a process group that this rank belongs to.
        ValueError: the ranks' options differ; every rank raises, before anything else is exchanged.
    """

    @classmethod
    def of(cls, group, *arguments, **options):
        """None without a group. The model passes its own on to its layers: it stays as it is."""
        if group is None or isinstance(group, Slices):
            return group
        return cls(group, *arguments, **options)

    def __init__(self, group, config, x, lengths, seq_idx, **options):
        options.update({name: getattr(config, name) for name in _DEFAULTS})
        self.length = sum(_agree(group, x, **options, seq_idx=seq_idx is not None))
        self.group, self.rank = group, dist.get_rank(group)
        b, l = x.shape[:2]
        lengths = torch.full((b,), l, device=x.device) if lengths is None else lengths
        labels = x.new_zeros((b, l), dtype=torch.int64) if seq_idx is None else seq_idx.long()
        # Of each slice, gather the labels of its first position and of its last m.
        self.m = max(1, config.conv_kernel - 1)
        self.last = lengths[:, None] + torch.arange(-self.m, 0, device=x.device)  # (b, m)
        index = F.pad(self.last, (1, 0))  # (b, 1+m)
        exists = (index >= 0) & (lengths[:, None] > 0)
        labels = F.pad(labels, (0, 1)).gather(1, index.clamp(min=0))
        ends = _all_gather(torch.stack([labels, exists.long()]), group)  # (r, 2, b, 1+m)
        self.last_labels, last_exist = rearrange(ends[..., 1:], "r two b m -> two b (r m)")
        self.last_exist = last_exist.bool()
        labels, exist = rearrange(ends, "r two b m -> two b (r m)")
        self.ends = labels, exist.bool()  # all that `_follow_labels` needs of the whole sequence
        # (b), whether this slice begins another sequence than the one before it.
        cut = self.rank * (1 + self.m)
        own = [t[:, cut : cut + 1 + self.m] for t in self.ends]
        first, any_exist = _first_label(*own)
        before, any_before = _first_label(*(t[:, :cut].flip(1) for t in self.ends))
        self.begins = any_before & any_exist & (first != before)

    def states_of_convolution(self, xBC, state):
        """The state (b, k-1, d) of the convolution before this slice, and after the last one."""
        last = _take(F.pad(xBC, (0, 0, 0, 1)), self.last.clamp(min=0))  # (b, m, d)
        last = rearrange(_all_gather(last, self.group), "r b m d -> b (r m) d")

        def state_after(slices):
            count = slices * self.m
            order = Order(self.last_exist[:, :count])
            window = torch.cat([1 * state.to(last.dtype), order.sort(last[:, :count])], dim=1)
            labels = order.sort_labels(self.last_labels[:, :count])
            number = _sequence_number(labels, state.shape[1])
            return last_inputs(window, state.shape[1], order.lengths, number)

        before = state_after(self.rank).masked_fill(self.begins[:, None, None], 0)
        return before, state_after(dist.get_world_size(self.group))


@_without_autocast
def ssd_of_slice(
    x, dt, A, B, C, D=None, *, slices, chunk_size=64, initial_state=None, seq_idx=None
):
    """`ssd` of this rank's slice. initial_state and final_state are those of the whole sequence."""
    y, written = ssd(x, dt, A, B, C, D, chunk_size=chunk_size, seq_idx=seq_idx)
    log_decay, _, state = _prepare(x, dt, A, B, C, D, initial_state, seq_idx)
    from_start = F.pad(log_decay, (0, 0, 1, 0)).cumsum(1).exp()  # (b, 1+l, h)

    decay = from_start[:, -1, :, None].masked_fill(slices.begins[:, None, None], 0)  # (b, h, 1)
    ends = _all_gather(torch.cat([decay, written.flatten(2)], dim=2), slices.group)
    states = [state]  # before each slice, and after the last one
    for slice_ in ends:  # (b, h, 1 + p n)
        decay, written = slice_[..., :1, None], slice_[..., 1:].unflatten(2, state.shape[2:])
        states.append(decay * states[-1] + written)  # (b, h, p, n)

    # Not states[slices.rank]: gradients must reach the all-gather on every rank, or others wait.
    state = torch.stack(states)[slices.rank].masked_fill(slices.begins[:, None, None, None], 0)
    state = rearrange(state.to(C.dtype), "b (g r) p n -> b g n (r p)", g=B.shape[2])
    read = rearrange(C, "b l g n -> b g l n") @ state  # (b, g, l, (r p))
    read = rearrange(read, "b g l (r p) -> b l (g r) p", p=x.shape[3])
    return torch.addcmul(y, from_start[:, 1:, :, None].to(y.dtype), read), states[-1]


def _next_tokens_of_slices(labels, mask, seq_idx, length, group):
    """`next_tokens` for this rank's slices, of `length` positions in each segment."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mask = torch.ones_like(labels) if mask is None else mask
    seq_idx = torch.zeros_like(labels) if seq_idx is None else seq_idx
    mine = torch.stack([t.long() for t in (labels, mask, seq_idx)])  # (3, b, l)
    mine = [F.pad(t, (0, 1)) for t in mine.split(length, dim=2)]  # one more, which is masked
    firsts = [t.gather(2, t[1:2].argmax(2, keepdim=True).expand(3, -1, 1)) for t in mine]
    firsts = rearrange(_all_gather(torch.stack(firsts), group), "r s i b 1 -> i b (s r)")
    # Between this rank's slices, the first positions that exist of the others' stand for these.
    between = [firsts[:, :, i * size + rank + 1 :][:, :, : size - 1] for i in range(len(mine))]
    pieces = [t for pair in zip(mine, between, strict=True) for t in pair]
    labels, mask, seq_idx = torch.cat(pieces, dim=2)
    targets = next_tokens(labels, mask.bool(), seq_idx).split([t.shape[2] for t in pieces], dim=1)
    return torch.cat([t[:, :-1] for t in targets[::2]], dim=1)


def _agree(group, x, **options):
    """The lengths of x (b, l, ...) on all ranks, once it is sure that all else is the same."""
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise TypeError(f"group = {group}: it must be a process group that this rank belongs to")
    options.update(batch=x.shape[0], dtype=x.dtype, gradients=torch.is_grad_enabled())
    options.update(autocast=torch.is_autocast_enabled(x.device.type))
    ranks = [None] * dist.get_world_size(group)
    dist.all_gather_object(ranks, (x.shape[1], options), group=group)
    lengths, ranks = zip(*ranks, strict=True)
    for name in sorted({name for rank in ranks for name in rank}):
        values = [rank.get(name) for rank in ranks]
        if any(value != values[0] for value in values):
            raise ValueError(f"{name} = {values} on the ranks of the group: make it equal on all")
    return lengths


class _AllGather(torch.autograd.Function):
    """Each rank's x, (r, ...). Backward: the gradients of x from all ranks, added up."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        ranks = x.new_empty(dist.get_world_size(group), *x.shape)
        dist.all_gather([*ranks.unbind()], x.contiguous(), group=group)
        return ranks

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        parts = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        dist.all_to_all_single(parts, gradient.contiguous(), group=ctx.group)
        return parts.sum(0), None


_all_gather = _AllGather.apply


if kernels:
    kernels.register(
        Linear=nn.Linear,
        CausalConv1d=CausalConv1d,
        RMSNorm=RMSNorm,
        Mamba2=Mamba2,
        Mamba2Block=Mamba2Block,
        Mamba2Model=Mamba2Model,
        Mamba2ForCausalLM=Mamba2ForCausalLM,
    )
