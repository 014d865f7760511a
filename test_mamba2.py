"""Tests of mamba2.py; their names are the claims.

What is right is written again here, from the paper (Dao and Gu 2024, arxiv.org/abs/2405.21060) and
without mamba2.py: `recurrence` is the SSD, `layer_by_hand` the layer, both position by position.
Nearly everything runs in float64, where two orders of summation differ by some 1e-14, so that 1e-10
leaves no room for a mistake. All of it runs on CUDA where there is one, and else on the CPU.
"""

import argparse
import builtins
import contextlib
import copy
import functools
import gc
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import textwrap
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from unittest import mock

import accelerate
import peft
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from transformers.generation import MaxLengthCriteria

import mamba2
from mamba2 import Mamba2, Mamba2Cache, Mamba2Config, Mamba2ForCausalLM, Mamba2State, ssd

ROOT = Path(mamba2.__file__).resolve().parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
FORMS = [mamba2.ssd_recurrent, mamba2.ssd_quadratic, ssd]
DRAW = dict(dtype=torch.float64, device=DEVICE)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def every_test(request):
    torch.manual_seed(0)
    random.seed(0)
    if request.node.name.startswith("test_kernel") and not RUNS:
        pytest.skip("kernels run on CUDA, or with TRITON_INTERPRET=1, and need Triton")


def recurrence(x, dt, A, B, C, D=None, initial_state=None, seq_idx=None):
    """The oracle: the paper's equation (2), position by position, in float64."""
    x, dt, A, B, C = (t.double() for t in (x, dt, A, B, C))
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    B, C = (t.repeat_interleave(h // g, dim=2)[:, :, :, None] for t in (B, C))  # (b, l, h, 1, n)
    state, ys = x.new_zeros(b, h, p, n), [x[:, :0]]
    if initial_state is not None:
        state = initial_state.double()
    for t in range(l):
        if seq_idx is not None and t > 0:
            same = seq_idx[:, t] == seq_idx[:, t - 1]
            state = state * same.double()[:, None, None, None]
        decay, step = (dt[:, t] * A).exp()[:, :, None, None], dt[:, t, :, None, None]
        state = decay * state + step * x[:, t, :, :, None] * B[:, t]
        ys.append((state * C[:, t]).sum(-1)[:, None])
    y = torch.cat(ys, 1)
    return (y if D is None else y + D.double().reshape(h, -1) * x), state


def ssd_inputs(b, l, h, p, g, n, *, D=(), state=True):
    """Random arguments of SSD, in float64; D is the shape of D after the heads, or None."""
    inputs = {
        "x": torch.randn(b, l, h, p, **DRAW),
        "dt": F.softplus(torch.randn(b, l, h, **DRAW)),
        "A": -torch.rand(h, **DRAW) - 0.05,
        "B": torch.randn(b, l, g, n, **DRAW),
        "C": torch.randn(b, l, g, n, **DRAW),
        "D": None if D is None else torch.randn(h, *D, **DRAW),
        "initial_state": torch.randn(b, h, p, n, **DRAW) if state else None,
    }
    return {name: t.requires_grad_() for name, t in inputs.items() if t is not None}


def labels(b, l):
    """Random seq_idx of zeros and ones: a label comes back for another sequence, as it may."""
    return (torch.rand(b, l, device=DEVICE) < 0.3).cumsum(1) % 2


def make_layer(attention=None, **options):
    """A small layer in float64 in which every parameter has a random value, and so an effect."""
    sizes = dict(d_model=10, d_state=5, headdim=5, ngroups=2, d_conv=4, chunk_size=4)
    layer = mamba2.Attention(10, **attention) if attention else Mamba2(**{**sizes, **options})
    layer = layer.to(DEVICE, torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return layer


def layer_inputs(layer, b, l):
    """Random u and state for a layer."""
    draw, state = dict(**DRAW, requires_grad=True), layer.initial_state(b)
    if isinstance(layer, mamba2.Attention):
        past = state.past.new_zeros(b, 3, *state.past.shape[2:])
        state = state._replace(past=past, counts=torch.rand(b, 3, device=DEVICE) < 0.7)
    state = state.map(lambda t: torch.randn(t.shape, **draw) if t.is_floating_point() else t)
    return torch.randn(b, l, layer.in_proj.weight.shape[1], **draw), state


tensors = lambda tree: [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def gradients(outputs, inputs, again=False):
    """Gradients of all inputs from cotangents on all outputs, the same for the same shapes."""
    inputs = [t for t in tensors(inputs) if t.is_floating_point()]
    loss = sum(0 * t.sum() for t in inputs)  # has a gradient, even where l = 0
    for output in tensors(outputs):
        draw = torch.Generator().manual_seed(output.numel())
        cotangent = torch.randn(output.shape, generator=draw, dtype=torch.float64)
        loss = loss + (output.double() * cotangent.to(output.device)).sum()
    options = dict(retain_graph=True, create_graph=again, materialize_grads=True)
    return torch.autograd.grad(loss, inputs, **options)


def assert_close(found, expected, tolerance=1e-10, case="", rounding=0):
    """Each tensor is equal, relative to the largest value in it, and each value to its rounding."""
    for i, (f, e) in enumerate(zip(tensors(found), tensors(expected), strict=True)):
        f, e = f.detach().double(), e.detach().double()
        limits = dict(atol=tolerance * e.abs().max().item() if e.numel() else 0.0, rtol=rounding)
        said = functools.partial("{} [{}]: {}".format, case, i)
        torch.testing.assert_close(f, e, **limits, msg=said)


def identical(found, expected):
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def in_pieces(function, arguments, name, cuts):
    """Outputs and state of a function of sequences, called on one piece after the other.
    name: of the function's argument for the state."""
    names = ("u", "mask", "seq_idx", "starts", "x", "dt", "B", "C")
    names += ("input_ids", "attention_mask", "position_ids")
    sequences = {key: arguments[key] for key in names if arguments.get(key) is not None}
    arguments, l = dict(arguments), next(iter(sequences.values())).shape[1]
    state, ys = arguments[name], []
    for start, end in zip([0, *cuts], [*cuts, l], strict=True):
        pieces = {key: t[:, start:end] for key, t in sequences.items()}
        y, state = function(**arguments | pieces | {name: state})
        ys.append(y)
    return torch.cat(ys, 1), state


def random_cuts(l, seq_idx=None, mask=None):
    """Where to cut for `in_pieces`: never between two packed sequences; some pieces are empty."""
    allowed = set(range(l + 1))
    for row, labels in enumerate([] if seq_idx is None else seq_idx.tolist()):
        exist = [t for t in range(l) if mask is None or mask[row, t]]
        for t, after in itertools.pairwise(exist):
            if labels[t] != labels[after]:
                allowed -= set(range(t + 1, after + 1))
    return sorted([0, l, *random.choices([*allowed], k=4)])


class Bytes(TorchDispatchMode):
    """Watches the tensors that operations make: most bytes alive at once, most bytes of one."""

    def __init__(self):
        super().__init__()
        self.known, self.alive, self.peak, self.largest = weakref.WeakSet(), 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in [t.untyped_storage() for t in tensors(out)]:
            if storage not in self.known:
                self.known.add(storage)
                weakref.finalize(storage, self.count, -storage.nbytes())
                self.count(storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        return out

    def count(self, nbytes):
        self.alive += nbytes
        self.peak = max(self.peak, self.alive)


# ---- SSD -----------------------------------------------------------------------------------------


def test_the_three_forms_are_the_recurrence_on_240_random_shapes_whole_and_in_pieces():
    for case in range(240):
        q = random.randint(1, 8)
        l = [0, 1, q - 1, q, q + 1, 3 * q + 7][case % 6]
        b, g, r = random.choice([0, 1, 2, 3]), random.randint(1, 3), random.randint(1, 3)
        p, n = random.choice([1, 3, 5, 8]), random.choice([1, 3, 4, 7])
        D, state = random.choice([None, (), (p,)]), random.random() < 0.5
        inputs = ssd_inputs(b, l, g * r, p, g, n, D=D, state=state)
        seq_idx = labels(b, l) if random.random() < 0.5 else None
        expected = recurrence(**inputs, seq_idx=seq_idx)
        derivatives = gradients(expected, inputs, again=case % 24 == 5)
        arguments = dict(initial_state=None, seq_idx=seq_idx, chunk_size=q) | inputs
        splits = [(form, []) for form in FORMS]
        splits.append((random.choice(FORMS), random_cuts(l, seq_idx)))
        for form, cuts in splits:
            found = in_pieces(form, arguments, "initial_state", cuts)
            case = f"{form.__name__} {b=} {l=} {q=} {g=} {r=} {p=} {n=} {D=} {cuts=} {seq_idx=}"
            first = gradients(found, inputs, again=derivatives[0].requires_grad)
            assert_close([*found, first], [*expected, derivatives], case=case)
            if form is ssd and derivatives[0].requires_grad:
                assert_close(gradients(first, inputs), gradients(derivatives, inputs), case=case)


PRECISION = [*itertools.product(DTYPES, (False, True))]
PRECISION.remove((torch.float16, True))  # its largest number is 65,504


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype, extreme", PRECISION)
def test_ssd_loses_only_roundings_also_in_autocast_and_extreme_steps(form, dtype, extreme):
    inputs, wide = ssd_inputs(2, 100, 4, 8, 2, 16), torch.promote_types(dtype, torch.float32)
    if extreme:
        with torch.no_grad():
            inputs["dt"].copy_(10 ** torch.empty_like(inputs["dt"]).uniform_(-8, 3))  # 1e-8 .. 1e3
            inputs["A"].copy_(-torch.tensor([1e-8, 1e-3, 30, 1e3]))
    narrow = {k: t.detach().to(dtype) for k, t in inputs.items()}
    mixed = {k: narrow[k] if k in "xBC" else t.detach().to(wide) for k, t in inputs.items()}
    # Inside all is `wide`. Sums of 100 terms lose some 10 of its roundings; exp(s) has the relative
    # error of s, up to 20 where it matters, and gradients are sums of such values. Results and
    # cotangents are rounded once to x's dtype, by at most half of its epsilon.
    inner, epsilon = (100 if extreme else 10) * torch.finfo(wide).eps, torch.finfo(dtype).eps
    double = mixed | {"dt": mixed["dt"].double()}  # x alone decides
    for given, seq_idx in ((narrow, None), (mixed, None), (double, labels(2, 100))):
        given = {k: t.clone().requires_grad_() for k, t in given.items()}
        expected, found = recurrence(**given, seq_idx=seq_idx), form(**given, seq_idx=seq_idx)
        assert [tensor.dtype for tensor in found] == [dtype, wide]
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            assert identical(form(**given, seq_idx=seq_idx), found)
        assert_close(found[0], expected[0], inner, rounding=epsilon / 2)
        assert_close(found[1], expected[1], inner)
        slopes = gradients(found, given), gradients(expected, given)
        assert_close(*slopes, 10 * inner + 2 * epsilon)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_a_packed_sequence_reaches_the_next_however_large_it_is(form):
    inputs, first = ssd_inputs(2, 10, 4, 3, 2, 5), torch.arange(10, device=DEVICE) < 5
    results = []
    for factor in (1.0, 1e200):
        large = inputs["x"] * torch.where(first, torch.tensor(factor, **DRAW), 1)[:, None, None]
        given = inputs | dict(x=large, initial_state=inputs["initial_state"] * factor)
        y, state = form(**given, seq_idx=first.int().expand(2, -1), chunk_size=4)
        results.append((y[:, 5:], state))
    assert identical(*results)


def test_the_chunked_form_makes_no_matrix_of_the_sequence_and_one_of_B_and_C_per_group(monkeypatch):
    b, l, h, p, g, n, q = 1, 1024, 8, 16, 2, 16, 64
    for name in ("SLAB", "SLAB_ON_GPU"):
        monkeypatch.setattr(mamba2, name, 2 * h * q * q)  # two chunks at once
    inputs = ssd_inputs(b, l, h, p, g, n, state=False)  # float64: no kernel, 8 bytes per number
    x_bytes, given = 8 * b * l * h * p, sum(t.nbytes for t in inputs.values())
    with torch.no_grad(), FlopCounterMode(display=False) as counter, Bytes() as forward:
        ssd(**inputs, chunk_size=q)
    # Alive at once: the inputs (views of them are counted), the outputs of the chunks and what they
    # are put together in, and of two chunks 4 matrices (h, q, q) or less.
    assert forward.peak <= given + 2 * x_bytes + 8 * (8 * b * h * q * q)
    assert forward.peak < 8 * l * l  # so less than one l x l matrix for one of 8 heads
    with Bytes() as training:
        ssd(**inputs, chunk_size=q)[0].sum().backward()
    assert training.largest <= x_bytes < 8 * l * l  # nor does the backward pass
    scores = g * q * q * n  # C B^T, for each group, not for each head
    a_chunk = scores + h * q * q * p + h * p * q * n + h * q * n * p
    assert counter.get_total_flops() <= 2 * b * (l // q) * a_chunk


# ---- The layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_convolution_and_norm_lose_only_the_rounding_of_their_results(dtype):
    x, z, w = (torch.randn(s, device=DEVICE).to(dtype) for s in ((2, 9, 8), (2, 9, 8), (8, 4)))
    before = x[:, :3]
    y, state = mamba2.causal_conv1d(x, w, w[:, 0], initial_state=before.double())
    normed = mamba2.rms_norm(x, w[:, 0], 1e-5, gate=z, groups=2)
    assert torch.equal(state, x[:, -3:]) and y.dtype == normed.dtype == dtype
    assert mamba2.rms_norm(x.double(), w[:, 0], 1e-5).dtype == dtype  # the weight's
    assert mamba2.rms_norm(x, w[:, 0].double(), 1e-5, gate=z).dtype == dtype  # the gate's
    x, z, w, before = (t.double() for t in (x, z, w, before))
    expected = mamba2.causal_conv1d(x, w, w[:, 0], initial_state=before)[0]
    expected = expected, mamba2.rms_norm(x, w[:, 0], 1e-5, gate=z, groups=2)
    # The arithmetic is in float32, with some 10 roundings of 1.2e-7; then half an epsilon of dtype.
    assert_close((y, normed), expected, 2e-6, rounding=torch.finfo(dtype).eps / 2)


def mamba2_by_hand(layer, u, state):
    """y (b, d) of one position u (b, d), and the state after it, from the published parameters."""
    c, (conv, ssm), b = layer.config, state, len(u)
    inner, gn = c.nheads * c.headdim, c.ngroups * c.d_state
    z, xBC, dt = layer.in_proj(u).split([inner, inner + 2 * gn, c.nheads], dim=-1)
    window = torch.cat([conv, xBC[:, None]], 1)
    xBC = (window * layer.conv1d.weight[:, 0].T).sum(1)  # (b, channels)
    xBC = xBC if layer.conv1d.bias is None else xBC + layer.conv1d.bias
    x, B, C = (xBC * torch.sigmoid(xBC)).split([inner, gn, gn], dim=-1)
    dt = torch.log1p(torch.exp(dt + layer.dt_bias)).clamp(*c.dt_limit)[:, None]
    x, A = x.view(b, 1, c.nheads, c.headdim), -torch.exp(layer.A_log)
    B, C = (part.view(b, 1, c.ngroups, c.d_state) for part in (B, C))
    y, ssm = recurrence(x, dt, A, B, C, layer.D, ssm)
    y = y.flatten(1) * z * torch.sigmoid(z)
    if c.rmsnorm:
        parts = y.unflatten(1, (c.ngroups, -1))
        parts = parts / torch.sqrt((parts**2).mean(-1, keepdim=True) + c.norm_epsilon)
        y = parts.flatten(1) * layer.norm.weight
    return layer.out_proj(y), Mamba2State(window[:, 1:], ssm)


def attention_by_hand(layer, u, state):
    (d, base), p, (conv, past, counts) = layer.rotary, layer.head_dim, state
    h, g = (width // p for width in layer.widths[:2])
    qkv = layer.in_proj(u)
    if layer.conv1d:
        window = torch.cat([conv, qkv[:, None]], 1)
        qkv = (window * layer.conv1d.weight[:, 0].T).sum(1) + layer.conv1d.bias
        conv = window[:, 1:]
    q, k, v = qkv.unflatten(1, (-1, p)).split([h, g, g], 1)
    angles = counts.sum(1)[:, None, None] * base ** (-torch.arange(0, d, 2, **DRAW) / d)

    def turned(x):  # (b, heads, p): pairs of channels are complex numbers
        z = torch.complex(x[..., : d // 2], x[..., d // 2 : d]) * torch.exp(1j * angles)
        return torch.cat([z.real, z.imag, x[..., d:]], -1)

    past = torch.cat([past, torch.cat([turned(k), v], 1)[:, None]], 1)  # (b, m, 2 g, p)
    counts = F.pad(counts, (0, 1), value=True)  # it sees itself
    keys, values = past.repeat_interleave(h // g, 2).chunk(2, 2)  # (b, m, h, p)
    scale = p**-0.5 if layer.scale is None else layer.scale
    weights = torch.exp(scale * (turned(q)[:, None] * keys).sum(-1)) * counts[..., None]
    weights = (weights / weights.sum(1, keepdim=True))[..., None]  # (b, m, h, 1)
    y = layer.out_proj((weights * values).sum(1).flatten(1))
    return y, mamba2.AttentionState(conv, past, counts)


def by_hand(layer, u, state=None, mask=None, seq_idx=None, starts=None):
    """`layer.step` (Section 7.1), position by position."""
    of_rows = lambda where, x: where.view(-1, *[1] * (x.dim() - 1))  # (b), as a mask of (b, ...)
    attends = isinstance(layer, mamba2.Attention)
    step = attention_by_hand if attends else mamba2_by_hand
    state = layer.initial_state(len(u)) if state is None else state
    mask = torch.ones(u.shape[:2], device=DEVICE) if mask is None else mask
    seq_idx = torch.zeros_like(mask) if seq_idx is None else seq_idx

    label, waits, ys = seq_idx.new_zeros(len(u)), torch.tensor(False), [u[:, :0]]
    for t in range(u.shape[1]):
        exists = mask[:, t].bool()
        # Another sequence begins: its label is not that of the last position that exists, if any;
        # or it starts here, or at masked positions before.
        begins = (seq_idx[:, t] != label) & mask[:, :t].any(1)
        if starts is not None:
            begins = starts[:, t].bool() | waits
            waits = begins & ~exists
        label = torch.where(exists, seq_idx[:, t], label)
        y, new = step(layer, u[:, t], [x.masked_fill(of_rows(begins, x), 0) for x in state])
        ys.append(torch.where(exists[:, None], y, 0)[:, None])
        if attends:  # keys and values of a masked position are there, and do not count
            past = torch.cat([state.past, new.past[:, -1:]], 1)
            state = state._replace(past=past, counts=F.pad(state.counts, (0, 1)))
        kept = [torch.where(of_rows(exists, x), x, o) for x, o in zip(new, state, strict=True)]
        state = type(new)(*kept)
    if starts is not None:  # after the last position: the next one's
        state = state.map(lambda x: x.masked_fill(of_rows(waits, x), 0))
    return torch.cat(ys, 1), state


def canonical(state):
    """With only those keys and values that count, after zeros in shorter rows."""
    if not isinstance(state, mamba2.AttentionState):
        return state
    counts, order = state.counts.long().sort(dim=1, stable=True)
    past = state.past.gather(1, order[..., None, None].expand(state.past.shape))
    start = counts.shape[1] - (int(counts.sum(1).max()) if counts.numel() else 0)
    past = (past * counts[..., None, None])[:, start:]
    return mamba2.AttentionState(state.conv, past, counts[:, start:])


ROTARY = dict(num_heads=4, num_heads_kv=2, head_dim=6, rotary_emb_dim=4, d_conv=3, causal=True)
ATTEND = ROTARY | dict(d_model=10)
SCALED = dict(num_heads=1, causal=True, rotary_emb_dim=10, rotary_emb_base=50.0, softmax_scale=0.7)
LAYERS = [
    dict(),
    dict(ngroups=1, d_conv=2, bias=True, dt_limit=(0.1, math.inf)),
    dict(ngroups=4, d_conv=7, conv_bias=False, norm_epsilon=0.1),
    dict(d_model=14, headdim=3, expand=1.5, ngroups=7, d_state=3, d_conv=3),
    dict(d_model=1, headdim=1, expand=1, ngroups=1, d_state=1, dt_limit=(0.05, 0.2)),
    dict(d_conv=1, bias=True, conv_bias=True, layer_idx=3),
    dict(rmsnorm=False, headdim=24, expand=4.8),
    dict(attention=dict(num_heads=2, causal=True, out_proj_bias=False)),
    dict(attention=ROTARY),
    dict(attention=SCALED | dict(d_conv=1, qkv_proj_bias=False)),
]
MASKS = """00000111111 11111100000 11100001111 11110000111 10110100101
           00000000000 11111111111 00000000001 10000000000 01111111110""".split()


@pytest.mark.parametrize("options", LAYERS)
def test_the_layer_is_the_layer_by_hand_masked_packed_resumed_and_in_any_pieces(options):
    """And a step modifies none of its inputs, so that a state can be resumed several times."""
    layer = make_layer(**options)
    runs = (torch.arange(11, device=DEVICE) // 4 % 2).expand(len(MASKS), -1)  # a label comes back
    for b, l in ((len(MASKS), 11), (3, 0), (0, 5)):
        (u, state), seen = layer_inputs(layer, b, l), digits(*MASKS)[:b, :l]
        others = [state, list(layer.parameters())]
        packed = random.choice([runs[:b, :l], labels(b, l)])
        ways = {}, dict(seq_idx=packed), dict(starts=labels(b, l) == 0)
        for start, mask, way in itertools.product((None, state), (None, seen), ways):
            y, end = by_hand(layer, u, start, mask, **way)
            expected = [y, canonical(end)]
            expected += [gradients(expected, [u, others])]
            given, seq_idx = dict(u=u, state=start, mask=mask, **way), way.get("seq_idx")
            if mask is not None:  # masked positions have no effect: neither NaN nor another label
                junk = u.detach().masked_fill(mask[..., None] == 0, math.nan).requires_grad_()
                kind = random.choice([torch.bool, torch.int64, torch.float32])
                given |= dict(u=junk, mask=mask.to(kind))
            if mask is not None and seq_idx is not None:
                given["seq_idx"] = seq_idx.masked_fill(mask == 0, 7)
            versions = [tensor._version for tensor in tensors(given)]
            for cuts in (random_cuts(l, seq_idx, mask), []):
                y, end = in_pieces(layer.step, given, "state", cuts)
                found = [y, canonical(end)]
                found += [gradients(found, [given["u"], others])]
                assert_close(found, expected, case=f"{start} {mask} {way} {cuts=}")
                assert_close(layer(**given), expected[0])
                for part in end:  # no other memory is kept alive
                    assert part.untyped_storage().nbytes() == part.nbytes
            assert [tensor._version for tensor in tensors(given)] == versions  # as they were
            if start is not None and l > 0:  # nor is memory shared; 0 is that of an empty tensor
                assert {t.data_ptr() for t in end} & {t.data_ptr() for t in start} <= {0}
            if start is not None and mask is not None:  # skipping all keeps the state bit for bit
                skipped = ~(mask.bool() | way.get("starts", mask < 0)).any(1)
                assert (y[skipped] == 0).all()
                rows = [s.map(lambda t, rows=skipped: t[rows]) for s in (end, start)]
                assert identical(*map(canonical, rows))


@pytest.mark.parametrize("options", [{}, dict(rmsnorm=False), ROTARY])
def test_a_layer_in_half_precision_keeps_its_state_in_float32_or_as_it_was_passed(options):
    """And it computes steps dt and decays A in float32. Of attention there is no such state."""
    attends, sizes = options is ROTARY, dict(d_state=16, headdim=8, ngroups=2)
    exact = mamba2.Attention(32, **ROTARY) if attends else Mamba2(32, **sizes, **options)
    exact = exact.to(DEVICE)
    u, half = torch.randn(2, 100, 32, device=DEVICE), copy.deepcopy(exact).bfloat16()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        cast = in_pieces(exact.step, dict(u=u, state=None), "state", [99])
        assert_close(exact(u.bfloat16()), cast[0], 0.02)  # is cast as float32 is
    wide = torch.bfloat16 if attends else torch.float32
    resumed = half.step(u.bfloat16(), exact.initial_state(2))  # which is float32
    for y, state in (resumed, half.step(u.bfloat16()), cast):
        assert [t.dtype for t in (y, *state[:2])] == [torch.bfloat16, torch.bfloat16, wide]
        # About ten roundings of 2^-9 (weights, input, projections, convolution, norm) in a row.
        assert_close(y, exact(u), 0.02)
    with mock.patch.object(mamba2, "ssd", wraps=ssd) as watched:
        without_kernels(half, u.bfloat16())
    if not attends:
        dt = half.in_proj(u.bfloat16())[..., -8:].float() + half.dt_bias.float()
        assert identical(watched.call_args.args[1:3], (F.softplus(dt), -half.A_log.float().exp()))


@pytest.mark.parametrize("method", [False, True])
def test_a_step_calls_hooks_and_projections_with_weights_of_another_dtype(method):
    layer, calls = make_layer(), []
    u, state = layer_inputs(layer, 2, 5)
    weight = (16 * layer.in_proj.weight).detach().round().to(torch.int8)
    layer.in_proj = nn.Module()  # a quantised projection; in torch.ao's, weight is a method
    layer.in_proj.weight = (lambda: weight) if method else weight
    layer.in_proj.forward = lambda u: F.linear(u, weight.to(u.dtype) / 16)
    layer.register_forward_hook(lambda *given: calls.append(1))
    found = layer.step(u, state)
    assert_close(found, by_hand(layer, u, state))
    assert calls == [1] and torch.equal(layer(u, state), found[0])


# ---- Refusals ------------------------------------------------------------------------------------


SSD_SHAPES = dict(x=(2, 5, 4, 3), dt=(2, 5, 4), A=(4,), B=(2, 5, 2, 6), C=(2, 5, 2, 6), D=(4, 3))
SSD_SHAPES |= dict(initial_state=(2, 4, 3, 6), seq_idx=(2, 5))
CONV_SHAPES = dict(x=(2, 5, 6), weight=(6, 4), bias=(6,), initial_state=(2, 3, 6), seq_idx=(2, 5))
NORM_SHAPES = dict(x=(2, 5, 6), weight=(6,), gate=(2, 5, 6))
STEP_SHAPES = dict(u=(2, 5, 10), conv=(2, 3, 40), ssm=(2, 4, 5, 5), mask=(2, 5))
FORWARD_SHAPES = dict.fromkeys(["input_ids", "position_ids", "seq_idx", "labels"], (2, 9))
NORM = functools.partial(mamba2.rms_norm, eps=1e-5)
STEP = lambda conv, ssm, **given: make_layer().step(state=Mamba2State(conv, ssm), **given)
FUNCTIONS = [*((form, SSD_SHAPES) for form in FORMS), (mamba2.causal_conv1d, CONV_SHAPES)]
FUNCTIONS += [(NORM, NORM_SHAPES), (STEP, STEP_SHAPES)]
FUNCTIONS.append((lambda **arguments: tiny()(**arguments), FORWARD_SHAPES))
for layer in (make_layer(), make_layer(ROTARY)):
    step = functools.partial(layer.step, torch.ones(3, 2, 10, **DRAW), layer.initial_state(3))
    FUNCTIONS += [(step, dict(starts=(3, 2))), (step, dict(seq_idx=(3, 2)))]


@pytest.mark.parametrize("function, shapes", FUNCTIONS)
def test_shapes_and_dtypes_that_do_not_fit_are_refused_and_never_broadcast(function, shapes):
    arguments = {name: torch.ones(shape, **DRAW) for name, shape in shapes.items()}
    integers = {"seq_idx", "starts", *FORWARD_SHAPES} & shapes.keys()
    arguments |= {name: arguments[name].long() for name in integers}
    function(**arguments)
    for name, right in arguments.items():
        wrong = [right[0], right[None], right[..., None]]
        for axis in range(right.dim()):
            one = right.narrow(axis, 0, 1)
            wrong += [one, torch.cat([right, one], axis), right.transpose(axis, -1)]
        for tensor in wrong:
            if tensor.shape != right.shape:
                with pytest.raises(ValueError, match="has shape .* must be"):
                    function(**arguments | {name: tensor})
        other = right.int() if right.is_floating_point() else right.float()
        for value in [*[other] * (name != "mask"), right.cfloat(), [1.0]]:
            found = value.dtype if isinstance(value, torch.Tensor) else "a list"
            with pytest.raises(TypeError, match=f"(initial_state|{name}) is {found}: it must be"):
                function(**arguments | {name: value})


# ---- Initialisation and optimiser groups ---------------------------------------------------------


def test_a_layer_is_initialised_as_in_the_original_from_the_seed_and_by_depth():
    layer = Mamba2(d_model=512, headdim=1, d_state=2, bias=True).to(DEVICE)  # 1024 heads
    states = []
    for depth in (1, 9):
        for parameter in layer.parameters():
            nn.init.constant_(parameter, math.nan)
        torch.manual_seed(1)
        layer.depth = depth
        layer.reset_parameters()
        states.append(copy.deepcopy(layer.state_dict()))
    first, deep = states
    deep["out_proj.weight"] *= 9**0.5
    assert_close(deep, first, 1e-6)  # a few roundings of float32
    log_dt = F.softplus(first["dt_bias"]).log()
    uniform = [(first["A_log"].exp(), 1, 16), (log_dt, math.log(0.001), math.log(0.1))]
    bounds = {"in_proj.weight": 512, "out_proj.weight": 1024, "conv1d.weight": 4, "conv1d.bias": 4}
    uniform += [(first[name], -(fan_in**-0.5), fan_in**-0.5) for name, fan_in in bounds.items()]
    for values, low, high in uniform:
        scaled = (values - low) / (high - low)  # in [0, 1], up to float32's exp and log
        assert -1e-5 < scaled.min() < 0.02 and 0.98 < scaled.max() < 1 + 1e-5
        assert abs(scaled.mean() - 0.5) < 5 / (12 * values.numel()) ** 0.5  # standard deviations
    assert (first["D"] == 1).all() and (first["norm.weight"] == 1).all()
    assert (first["in_proj.bias"] == 0).all() and (first["out_proj.bias"] == 0).all()
    layer = Mamba2(d_model=64, headdim=1, dt_min=0.02, dt_max=0.5, dt_init_floor=0.1)
    dt = F.softplus(layer.dt_bias)
    assert 0.1 * (1 - 1e-5) < dt.min() < 0.1 * (1 + 1e-5) and 0.3 < dt.max() < 0.5 * (1 + 1e-5)


def test_optimiser_groups_hold_every_parameter_once_and_exempt_the_right_ones():
    model = mamba2.Mamba2LM(Mamba2Config(d_model=8, headdim=4, n_layer=1, vocab_size=7, bias=True))
    model.frozen = nn.Linear(8, 8).requires_grad_(False)
    groups = mamba2.parameter_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, exempt = ([names[id(p)] for p in group["params"]] for group in groups)
    mixer = [f"backbone.layers.0.mixer.{name}.weight" for name in ("in_proj", "conv1d", "out_proj")]
    assert sorted(decaying) == sorted(["backbone.embeddings.weight", *mixer])
    others = {*names.values()} - {*decaying, "frozen.weight", "frozen.bias"}
    assert len(exempt) == 9 and {*exempt} == others


# ---- Configuration -------------------------------------------------------------------------------

ALIASES = dict(d_model=96, n_layer=3, d_state=17, headdim=32, ngroups=2, nheads=24, d_conv=5)
ALIASES |= dict(bias=True, conv_bias=False, dt_limit=(0.5, 2.0), dt_min=0.01, dt_max=0.2)
ALIASES |= dict(dt_init_floor=0.003, norm_epsilon=0.125, tie_embeddings=False, activation="swish")


@pytest.mark.parametrize("alias", ALIASES)
def test_an_option_has_its_name_in_transformers_and_its_name_in_the_paper_s_code(alias):
    name, value = Mamba2Config.attribute_map[alias], ALIASES[alias]
    assert hasattr(transformers.Mamba2Config(), name)
    for given in (alias, name):
        config = Mamba2Config(**{given: value})
        assert getattr(config, alias) == getattr(config, name) == value
        setattr(config, given, 77)
        assert getattr(config, alias) == getattr(config, name) == 77
    with pytest.raises(TypeError, match="has two names of one option"):
        Mamba2Config(**{alias: value, name: value})


def test_the_defaults_are_those_of_mamba2_130m():
    config, options = Mamba2Config(), dict(device="meta", dtype=torch.float16)
    parameters = Mamba2(config, **options).state_dict().values()
    assert all(value.is_meta and value.dtype == torch.float16 for value in parameters)
    with torch.device("meta"):
        parameters = Mamba2ForCausalLM(config).parameters()
    assert sum(value.numel() for value in parameters) == 128_989_632
    sizes = dict(n_layer=24, vocab_size=50288, d_state=128, headdim=64, ngroups=1, expand=2)
    sizes |= dict(nheads=24, d_conv=4, chunk_size=256, bias=False, conv_bias=True)
    sizes |= dict(dt_limit=(0, math.inf), dt_min=0.001, dt_max=0.1, dt_init_floor=1e-4)
    sizes |= dict(norm_epsilon=1e-5, residual_in_fp32=True, tie_embeddings=True, use_cache=True)
    sizes |= dict(bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.02)
    assert {name: getattr(config, name) for name in sizes} == sizes


COUNTS = "hidden_size num_hidden_layers state_size head_dim conv_kernel chunk_size"
IMPOSSIBLE = dict.fromkeys(COUNTS.split(), [0, -1, 2.0, True, "8", [8]])
IMPOSSIBLE |= dict(n_groups=[0, 5, 48, "2"], num_heads=[23, 0, 24.0, "24"], use_conv_bias=[1])
IMPOSSIBLE |= dict(hidden_act=["gelu", "relu", None], residual_in_fp32=["no"], vocab_size=[0])
IMPOSSIBLE |= dict(expand=[0, -2, math.inf, math.nan, "2"], tie_word_embeddings=[None])
IMPOSSIBLE |= dict(layer_norm_epsilon=[0, -1e-5, math.nan], d_intermediate=[-1, 2.0])
IMPOSSIBLE["time_step_limit"] = [(1.0, 0.5), (-1.0, 1.0), (0.0, 1.0, 2.0), (0.0,), (math.nan, 1.0)]

# Configurations as flash-linear-attention, transformers and the original write them, in short.
FLA = dict(model_type="mamba2", num_heads=24, head_dim=64, hidden_size=768, n_groups=1)
FLA |= dict(norm_eps=1e-3, rmsnorm=True, norm_before_gate=False, D_has_hdim=False, fuse_norm=True)
FLA |= dict(dt_limit=[0, 0.5], A_init_range=[1, 16], tie_word_embeddings=False)
TRANSFORMERS = dict(model_type="mamba2", num_heads=24, hidden_size=768)
ORIGINAL = dict(d_model=32, n_layer=2, vocab_size=61, ssm_cfg=dict(layer="Mamba2", headdim=8))
CHANGES = dict(rms_norm=False, rmsnorm=None, D_has_hdim=True, activation="gelu", hidden_act="gelu")
CHANGES |= dict(attn=dict(layers=[1]), d_inner=512, d_ssm=32)


def test_options_that_say_the_same_in_other_words_are_read():
    read = Mamba2Config.from_dict
    config = read(FLA)
    assert (config.layer_norm_epsilon, config.time_step_limit) == (1e-3, (0.0, 0.5))
    assert not config.tie_word_embeddings and config.num_heads == 24
    for name, value in itertools.product(("use_bias", "bias"), (True, False)):
        assert read({name: value}).use_bias is value
        assert read(TRANSFORMERS | {name: value}).use_bias is value
    assert read(dict(attn=None, d_ssm=None, attn_layer_idx=None, d_intermediate=0)).num_heads == 24
    # What a file in transformers' format leaves out has their defaults, which are not ours.
    there = read(TRANSFORMERS | dict(num_heads=16, head_dim=96))
    for name in ("n_groups", "eos_token_id", "tie_word_embeddings", "initializer_range"):
        theirs = getattr(transformers.Mamba2Config(), name)
        assert getattr(there, name) == theirs != getattr(Mamba2Config(), name)
    assert Mamba2Config(hidden_act="swish", attn_implementation="eager", dt_min=0.1).num_heads == 24


# ---- Importing, in interpreters of its own -------------------------------------------------------


def test_the_files_work_wherever_they_lie_without_transformers_and_take_no_other_s_name(tmp_path):
    copies = ("alone", "mamba2.py"), ("both", "mamba2.py"), ("both", "kernels.py")
    files = {f"{folder}/{file}": (ROOT / file).read_text() for folder, file in copies}
    files |= {"empty/transformers.py": "", "broken/transformers.py": "import missing_part"}
    for file, content in (files | {"hugging_face/kernels/__init__.py": ""}).items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(content)
    code = """
        import importlib.metadata, importlib.util, sys
        import pytest
        sys.modules["transformers"] = sys.modules["triton"] = None  # importing them now fails
        import torch
        import alone.mamba2, both.mamba2

        # The file alone is plain PyTorch; with kernels.py it loads that, under a name of its own.
        assert alone.mamba2.kernels is None and both.mamba2.kernels.ssd
        assert both.mamba2.kernels is sys.modules["both.mamba2_kernels"]
        assert "kernels" not in sys.modules
        for module in (alone.mamba2, both.mamba2):
            config = module.Mamba2Config(d_model=16, headdim=8, n_groups=2)
            config.state_size = 24
            assert (config.hidden_size, config.n_groups, config.head_dim) == (16, 2, 8)
            model, ids = module.Mamba2LM(config), torch.tensor([[1, 2, 3]])
            logits, _ = model(ids)
            last, _ = model(ids[:, 2:], model(ids[:, :2])[1])
            assert torch.allclose(last, logits[:, 2:], atol=1e-5)

        def again(folder, name):
            for module in ("transformers", "triton", "alone.mamba2", "kernels"):
                sys.modules.pop(module, None)
            sys.path[0] = folder
            return importlib.import_module(name)

        # A transformers that is too old counts as none; one that is broken is an error.
        assert again("empty", "alone.mamba2").transformers is None
        with pytest.raises(ModuleNotFoundError, match="missing_part"):
            again("broken", "alone.mamba2")

        # In a clone of the project, `import kernels` is what transformers means by it: Hugging
        # Face's package, if that is installed. A second clone on the path is no such package.
        sys.path[1:1] = ["both", "hugging_face"]
        assert "hugging_face" in again("both", "kernels").__file__
        sys.path.remove("hugging_face")
        kernels = again("both", "kernels")
        if not any(importlib.metadata.distributions(name="kernels")):
            assert kernels.ssd and kernels.__version__[0].isdigit()  # which it asks for
        mamba2 = importlib.import_module("mamba2")
        assert issubclass(mamba2.Mamba2ForCausalLM, mamba2.transformers.PreTrainedModel)
        assert mamba2.kernels is sys.modules["mamba2_kernels"] and mamba2.kernels.ssd
        assert sys.modules["kernels"] is kernels is not mamba2.kernels
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, check=True)


# ---- The language model, in transformers ---------------------------------------------------------

# transformers' own Mamba-2 convolves with cuDNN, which would round float32 to TF32.
torch.backends.cudnn.allow_tf32 = False
# The models below are so small that threads would only wait for each other, five times as long.
torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

F32 = 1e-4  # relative: what two orders of summation in float32 leave, after a few layers
F64 = 1e-10  # relative: the same in float64, with room for gradients, which cancel
VOCABULARY = 64
TINY = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=16)
TINY |= dict(head_dim=8, chunk_size=8, initializer_range=0.2)
ALL = dict(n_groups=2, use_bias=True, time_step_limit=(0.01, 0.1))  # every option that may leak
ATTENTION = dict(attn_layer_idx=[1], attn_cfg=ROTARY, d_intermediate=20)
HYBRID = dict(n_groups=2, **ATTENTION)
ATTENDING = lambda layer: Mamba2Config(attn_layer_idx=[layer], attn_cfg=ROTARY)
EITHER = pytest.mark.parametrize("options", [ALL, HYBRID], ids=["mamba2", "hybrid"])
GREEDY = dict(do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
THEIRS = transformers.Mamba2ForCausalLM
THEIR_CACHE = "cache" if mamba2.CACHE == "cache" else "cache_params"  # in their Mamba-2


def tiny(kind=Mamba2ForCausalLM, dtype=torch.float32, **options):
    """A small model, none of whose parameters is 0 or 1 throughout: that would hide mistakes."""
    torch.manual_seed(0)
    model = kind(Mamba2Config(**{**TINY, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            if name.endswith("out_proj.weight"):
                parameter.mul_(4)  # so that what comes next depends on more than the last token
    return model.to(DEVICE, dtype).eval()


def tokens(*shape, seed=0, vocabulary=VOCABULARY):
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(1, vocabulary, shape, generator=generator, device="cpu").to(DEVICE)


def model_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    return gradients


def assert_same_state(actual, expected, relative=0.0):
    assert_close(*([*map(canonical, cache.states)] for cache in (actual, expected)), relative)


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def load(folder, kind=Mamba2ForCausalLM, **options):
    return kind.from_pretrained(folder, **options).to(DEVICE).eval()


VARIANTS = [{}, dict(tie_word_embeddings=False), dict(time_step_limit=(0.01, 0.1))]
VARIANTS += [dict(use_bias=True, use_conv_bias=False, conv_kernel=2), dict(n_groups=8, head_dim=4)]
VARIANTS += [dict(residual_in_fp32=False, layer_norm_epsilon=1e-2)]


@torch.no_grad()
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_logits_and_loss_equal_those_of_transformers_own_mamba2(options, tmp_path):
    if "n_groups" in options and Version(transformers.__version__) <= Version("5.20.2"):
        pytest.skip("transformers <= 5.20.2 ignores groups in its gated norm")
    ours = tiny(chunk_size=256, **options)
    theirs = load(save(ours, tmp_path), THEIRS)
    for length in (1, 37, 300):
        ids = tokens(2, length)
        mine, reference = (m(ids, labels=ids, use_cache=True) for m in (ours, theirs))
        assert_close(mine.logits, reference.logits, F32)
        if length > 1:
            assert_close(mine.loss, reference.loss, F32)
        for step in range(0 if "time_step_limit" in options else 3):  # theirs forgets the limit
            new, given = tokens(2, 1, seed=step), {THEIR_CACHE: reference[THEIR_CACHE]}
            mine, reference = ours(new, cache=mine.cache), theirs(new, use_cache=True, **given)
            assert_close(mine.logits, reference.logits, F32)
        if not options.get("use_bias"):  # theirs lets a bias through the padding
            mask = torch.ones_like(ids)
            mask[0, : length // 3] = 0
            mine, reference = (model(ids, attention_mask=mask).logits for model in (ours, theirs))
            assert_close(mine[mask.bool()], reference[mask.bool()], F32)


def digits(*rows):
    return torch.tensor([[int(digit) for digit in row] for row in rows], device=DEVICE)


def padded():
    """A batch with masks of every kind, with nonsense at masked positions, and some labels -100."""
    rows = ["00000111111111111111", "11111111111110000000", "11110000000001111111"]
    rows += ["01101000111010110101", "00000000000000000000", "11111111111111111111"]
    mask = digits(*rows)
    ids = tokens(*mask.shape)
    labels = torch.where(tokens(*mask.shape, seed=1) % 5 == 0, -100, ids)
    labels = torch.where(mask.bool(), labels, tokens(*mask.shape, seed=2))
    return ids, mask, labels


def packed(mask):
    """Several sequences in each row of `padded`: their lengths, seq_idx, and positions, which count
    from 0 in each sequence, without what is masked; there they are nonsense."""
    lengths = [[1, 7, 12], [9, 10, 1], [3, 12, 5], [13, 6, 1], [10, 10], [8, 12]]
    rows = [[i % 2 for i, n in enumerate(row) for _ in range(n)] for row in lengths]
    parts = [exists.split(row) for row, exists in zip(lengths, mask.long(), strict=True)]
    positions = [torch.cat([part.cumsum(0) - 1 for part in row]) for row in parts]
    # In seq_idx labels come again: 0 1 0.
    return lengths, torch.tensor(rows, device=DEVICE), torch.stack(positions)


def mean_loss(model, pairs):
    """The loss of sequences that are run one by one, each token weighted equally."""
    pairs = [(model(ids[None]).logits[0, :-1], labels[1:]) for ids, labels in pairs if len(ids)]
    logits, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return F.cross_entropy(logits, labels)


@pytest.mark.parametrize("segment, again", [(0, False), (0, True), (40, False), (40, True)])
@pytest.mark.parametrize("name", ["lm_head.weight", "backbone.layers.0.mixer.in_proj.weight"])
def test_weights_that_change_before_the_backward_pass_are_an_error(name, segment, again):
    model, ids = tiny(tie_word_embeddings=False).train(), tokens(2, 80)
    if again:
        model.gradient_checkpointing_enable()
    loss = model(ids, labels=ids, segment_length=segment).loss
    with torch.no_grad():
        model.get_parameter(name).mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


MASKED_AND_PACKED = pytest.mark.parametrize("masked, apart", [(0, 0), (1, 0), (0, 1), (1, 1)])


@EITHER
@MASKED_AND_PACKED
def test_padded_and_packed_sequences_in_any_split_are_as_each_alone(masked, apart, options):
    model = tiny(dtype=torch.float64, **options)
    ids, mask, labels = padded()
    mask = mask if masked else torch.ones_like(mask)
    lengths, seq_idx, positions = packed(mask)
    # Whatever is masked disturbs no result and no gradient, not even a NaN.
    embeds = model.get_input_embeddings()(ids).masked_fill(mask[..., None] == 0, torch.nan)
    given = dict(attention_mask=mask if masked else None, labels=labels, use_cache=True)
    labelled = dict(seq_idx=seq_idx if apart else None)
    output, pairs = model(inputs_embeds=embeds, **given, **labelled), []
    for row, parts in enumerate(zip(ids, labels, mask.bool(), output.logits, strict=True)):
        last = None
        parts = (part.split(lengths[row] if apart else [20]) for part in parts)
        for i, y, exists, logits in zip(*parts, strict=True):
            pairs.append((i[exists], y[exists]))
            alone = model(i[exists][None], use_cache=True)
            assert_close(logits[exists], alone.logits[0], F64)
            last = alone.cache if exists.any() or last is None else last
        assert_same_state(output.cache.select([row]), last, F64)
    loss = mean_loss(model, pairs)
    assert output.loss.dtype == torch.float64
    assert_close(output.loss, loss, F64)
    assert_close(model_gradients(model, output.loss), model_gradients(model, loss))
    if apart:  # the same in other words
        assert_close(model(ids, position_ids=positions, **given).loss, loss)
        whole = torch.stack([torch.cat([*map(torch.arange, row)]) for row in lengths]).to(DEVICE)
        assert_close(model(ids, position_ids=whole, **given).loss, loss)  # masked ones count too
        for dtype in (torch.uint16, torch.uint8, torch.int8, torch.int16, torch.int32):
            assert_close(model(ids, seq_idx=seq_idx.to(dtype), **given).loss, loss)

    kinds = itertools.cycle([torch.uint8, torch.int8, torch.int16, torch.int32])
    call = functools.partial(model, use_cache=True, return_dict=False)
    for cuts in ((0,), (1, 3), (7, 8), (8, 10), (13,), (19, 20), range(1, 20)):
        given = dict(input_ids=ids, attention_mask=mask if masked else None, cache=None)
        given |= dict(position_ids=positions.to(next(kinds))) if apart else {}
        logits, cache = in_pieces(call, given, "cache", cuts)
        assert_close(logits[mask.bool()], output.logits[mask.bool()], F64)
        assert_same_state(cache, output.cache, F64)
        assert cache.get_seq_length() == 20


@torch.no_grad()
@pytest.mark.filterwarnings("error")
def test_a_cache_under_either_name_is_immutable_and_can_be_resumed_again():
    model, ids, new = tiny(), tokens(2, 9), tokens(2, 3, seed=1)
    longer = torch.cat([ids, new], 1)
    expected, text = model(longer).logits[:, 9:], model.generate(longer, **GREEDY)
    output = model(ids)
    cache, before = output.cache, output.cache.map(torch.clone)
    assert cache is output.past_key_values and cache.length == 9
    for name in ("cache", "past_key_values"):  # transformers' since 5.24, and before
        call = model(new, **{name: cache})
        assert_close(call.logits, expected, F32)
        assert call.cache.length == 12
        assert torch.equal(model.generate(longer, **{name: cache}, **GREEDY), text)
    assert_close(model(new, None, cache)[0], expected, F32)
    assert_same_state(cache, before)
    back = tree_map(lambda x: x, copy.deepcopy(output))  # as engines that cast outputs do
    assert type(back) is type(output) and back[mamba2.CACHE] is back.past_key_values is not None
    assert {*vars(cache)} == {"states", "length"}  # transformers marks caches that it is given


@EITHER
def test_rows_of_caches_are_selected_repeated_and_joined_and_continue_as_alone(options):
    model = tiny(dtype=torch.float64, **options)
    texts = [tokens(1, 4), tokens(2, 9, seed=1), tokens(1, 6, seed=2)]
    if options is HYBRID:  # keys and values of texts of one length
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            Mamba2Cache.cat(model(ids).cache for ids in texts)
        texts = [F.pad(ids, (9 - ids.shape[1], 0), value=5) for ids in texts]
    alone = torch.cat([model.generate(ids, **GREEDY)[:, ids.shape[1] :] for ids in texts])
    whole = torch.cat([F.pad(ids, (9 - ids.shape[1], 0)) for ids in texts])
    caches = [model(ids[:, :-1]).cache for ids in texts]
    joined = Mamba2Cache.cat(cache for cache in caches)
    assert joined.get_seq_length() == 8
    for rows in ([2, 0, 2], [-1], [True, False, True, True], torch.tensor([1, -3])):
        found, index = joined.select(rows), torch.as_tensor(rows).to(DEVICE)
        assert identical(found.states, tree_map(lambda t, i=index: t[i], joined.states))
    for read in (whole, whole[:, -1:]):  # all tokens, or only those that are new
        found = model.generate(read, attention_mask=whole > 0, cache=joined, **GREEDY)
        assert torch.equal(found[:, read.shape[1] :], alone)
    last = whole[:, -1:]
    forked = model(last.repeat_interleave(3, 0), cache=joined.repeat(3)).logits
    assert_close(forked, model(last, cache=joined).logits.repeat_interleave(3, 0), F64)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_weights", [torch.bfloat16, torch.float32, torch.float64])
def test_steps_and_files_keep_the_dtype_of_ssm_whatever_it_is(dtype, of_weights, tmp_path):
    model, ids = tiny(dtype=of_weights), tokens(2, 12)
    cache = model(ids[:, :6], seq_idx=ids[:, :6]).cache.to(dtype)
    # What the state holds, as exactly as the model computes.
    rounded = cache.to(torch.promote_types(of_weights, torch.float32))
    limit = 4 * 2**-7 if of_weights == torch.bfloat16 and CUDA else F32
    masks, labels = (None, tokens(2, 3) % 2 == 0), (None, tokens(2, 3, seed=3))
    for l, mask, seq_idx in itertools.product((0, 1, 3), masks, labels):
        mask, seq_idx = (None if t is None else t[:, :l] for t in (mask, seq_idx))
        given = dict(attention_mask=mask, seq_idx=seq_idx)
        found, exact = (model(ids[:, 6 : 6 + l], cache=c, **given) for c in (cache, rounded))
        # Within a call nothing is rounded, so that only the state before it is.
        assert_close(found.logits, exact.logits, limit)
        for state in found.cache.states:
            assert (state.conv.dtype, state.ssm.dtype) == (of_weights, dtype)
        # On a GPU one of the two may be a kernel's, which rounds differently before that.
        same = max(torch.finfo(dtype).eps, limit) if CUDA else 0
        assert_same_state(found.cache, exact.cache.to(dtype), same)
    joined = Mamba2Cache.cat([cache.select([1]), cache.repeat(2)])
    assert {state.ssm.dtype for state in joined.states} == {dtype}
    torch.save({"cache": cache, "state": cache.states[0]}, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", map_location=DEVICE, weights_only=True)
    back = loaded["cache"]  # of a file from which no code was run
    assert type(back) is Mamba2Cache and identical(loaded["state"], cache.states[0])
    assert identical(*([kept.states, kept.length] for kept in (back, cache)))


@torch.no_grad()
def test_steps_masks_and_training_are_exported_or_compiled_into_one_graph():
    model, ids = tiny(num_hidden_layers=1, vocab_size=4096, **ALL), tokens(2, 12)
    if Mamba2Cache not in torch.utils._pytree.SUPPORTED_NODES:
        torch.export.register_dataclass(Mamba2Cache)
    cache = model.prefill(ids[:, :7])
    given = dict(cache=cache, use_cache=True)
    exported = torch.export.export(model, (ids[:, 7:8],), given).module()
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend=counter)
    for step in (exported, compiled):
        past = cache
        for t in range(7, 12):
            output = step(ids[:, t : t + 1], cache=past, use_cache=True)
            past = output[mamba2.CACHE]
            assert_close(output.logits, model(ids[:, : t + 1]).logits[:, -1:], F32)
            assert type(past) is Mamba2Cache and past.get_seq_length() == t + 1
    assert counter.frame_count == 1  # for all tokens
    some = ids % 3 > 0
    exported = torch.export.export(model.backbone, (ids, None, some)).module()
    for mask in (some, ~some):
        found, expected = (kind(ids, mask, seq_idx=ids // 16) for kind in (compiled, model))
        assert_close(found.logits, expected.logits, F32)
        assert_same_state(found.cache, expected.cache, F32)
        assert_close(exported(ids, None, mask)[0], model.backbone(ids, None, mask)[0], F32)
    model.train()
    ids = tokens(1, 40)  # more rows than a chunk of logits
    with torch.enable_grad():
        losses = (kind(ids, labels=ids).loss for kind in (compiled, model))
        found, expected = (model_gradients(model, loss) for loss in losses)
    assert_close(found, expected, F32)


def test_the_outputs_are_those_that_were_asked_for_also_of_no_tokens():
    for options, shape in itertools.product((ALL, HYBRID), [(2, 0), (0, 5), (0, 0)]):
        model, ids = tiny(**options), tokens(*shape)
        output = model(ids, labels=ids, num_items_in_batch=1, use_cache=True)
        assert output.logits.shape == (*shape, VOCABULARY) and output.loss == 0
        assert not any(t.any() for t in tensors(output.cache.states))
    model, ids = tiny(), tokens(2, 9)
    output, last_logit = (model(ids, output_hidden_states=True, logits_to_keep=n) for n in (0, 1))
    assert identical(output.hidden_states, last_logit.hidden_states)  # those of all positions
    first, _, last = output.hidden_states
    assert torch.equal(first, model.get_input_embeddings()(ids))
    assert torch.equal(last, model.backbone(first)[0])
    assert torch.equal(model.lm_head(last), output.logits)
    assert output.loss is None and model(ids).hidden_states is None
    assert model(ids, labels=ids, use_cache=True).cache.length == 9
    assert model(ids, use_cache=False).cache is model(ids, labels=ids).cache is None
    assert model.train()(ids, output_attentions=None).cache is None  # unless it is asked for
    model.eval().config.use_cache = False
    (logits,) = model(ids, return_dict=False)
    assert torch.equal(logits, output.logits)
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 3


def test_logits_to_keep_are_a_part_of_all_logits_and_change_no_loss():
    model, ids = tiny(dtype=torch.float64), tokens(2, 9)
    logits, chosen = model(ids).logits, torch.tensor([0, 3, 8], device=DEVICE)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    kept = [(0, logits), (1, logits[:, -1:]), (4, logits[:, -4:]), (chosen, logits[:, chosen])]
    for training, length in itertools.product((False, True), (0, 2, 4, 64)):
        model.train(training)
        given = dict(segment_length=length)
        for keep, expected in kept:
            assert_close(model(ids, logits_to_keep=keep, **given).logits, expected, F64)
            output = model(ids, labels=ids.byte(), logits_to_keep=keep, **given)
            assert_close((output.logits, output.loss), (expected, loss), F64)
        output = model(ids, labels=ids, num_items_in_batch=torch.tensor(5), **given)
        assert_close(output.loss, loss * 16 / 5, F64)  # as Trainer does, to accumulate batches
        # In training and in segments, logits beside a loss are rarely wanted, and large.
        assert (output.logits is None) == (training or length in (2, 4))


IDS = torch.ones(2, 9, dtype=torch.long, device=DEVICE)
EMPTY = mamba2.Mamba2Cache(())
READ = lambda **options: Mamba2Config.from_dict(options)
REFUSED = {  # what is called, and for each error the arguments; cache=True: of a prompt of one row
    Mamba2: {
        r"ValueError: num_heads .nheads. = 2: times head_dim .* = 64 must be .* = 96": dict(
            d_model=48
        ),
        "ValueError: nheads. = 3: times head_dim": dict(d_model=64, nheads=3),
        "ValueError: d_model. = 10.5": dict(d_model=7, headdim=1, expand=1.5),
        "TypeError: no option 'use_mem_eff_path'": dict(d_model=64, use_mem_eff_path=True),
        "ValueError: d_model. = Mamba2Config": dict(d_model=Mamba2Config(), d_state=64),
    },
    READ: {
        r"ValueError: \(n_layer\) = '2': must be an integer": ORIGINAL | dict(n_layer="2"),
        "TypeError: norm_eps.* has two names of one option": FLA | dict(layer_norm_epsilon=1e-6),
        "ValueError: only False is implemented": FLA | dict(norm_before_gate=True),
        "ValueError: pad_.*_multiple = 0: must be an": ORIGINAL | dict(pad_vocab_size_multiple=0),
        "ValueError: layer = 'Mamba1': only 'Mamba2'": ORIGINAL | dict(ssm_cfg={}),
        "ValueError: ^model_type = 'mamba': only 'mamba2'": FLA | dict(model_type="mamba"),
    },
    mamba2.Attention: {
        "ValueError: causal = False: must be True": dict(d_model=10, num_heads=2),
        "ValueError: interleaved = True: must be": ATTEND | dict(rotary_emb_interleaved=True),
        "ValueError: num_heads = 4: must divide d_model": dict(d_model=10, num_heads=4),
        "TypeError: argument 'mlp_dim'": ATTEND | dict(mlp_dim=64),
    },
    mamba2.Mamba2LM: {
        f"ValueError: attn_layer_idx = .{i}.: must be in range.0, 24": dict(config=ATTENDING(i))
        for i in (-1, 24)
    },
    "forward": {
        "ValueError: exactly one of input_ids and": dict(inputs_embeds=torch.ones(2, 9, 32)),
        r"ValueError: shape \(2, 8\): it must be \(2, 9\)": dict(attention_mask=IDS[:, :8]),
        r"ValueError: shape \(2, 18\): .* \(2, 9\)": dict(attention_mask=IDS.repeat(1, 2)),
        "ValueError: must hold 0 and 1": dict(attention_mask=IDS - 2.0),
        "ValueError: must hold 0 and 1, not 0 alone: .* == 0": dict(attention_mask=0.0 * IDS),
        "ValueError: pass one Mamba2Cache": dict(past_key_values=transformers.DynamicCache()),
        r"ValueError: of the cache = \(2, 1\): must be \(2, 2\): .* pass cache.rep": dict(
            cache=True
        ),
        "TypeError: argument 'cu_seq_lens_q'": dict(cu_seq_lens_q=IDS[0]),
        "ValueError: segment_length = -1: must be 'auto', or an": dict(segment_length=-1),
        "ValueError: use segment_length=0": dict(segment_length=4, output_hidden_states=True),
        r"ValueError: logits_to_keep = \[0\]: must be an integer": dict(logits_to_keep=[0]),
    },
    "generate": {
        "ValueError: under one of its names": dict(cache=EMPTY, past_key_values=EMPTY),
        "ValueError: assisted generation is not supported": dict(prompt_lookup_num_tokens=3),
        "ValueError: 9 tokens, and the cache has seen 9: give the whole": dict(cache=True),
        "ValueError: _mask = .*: must end .*pad on the left": dict(attention_mask=0 * IDS[:1]),
        "ValueError: attention_mask's width = 3: must be 9": dict(attention_mask=IDS[:1, :3]),
    },
}
for name in ("seq_idx", "position_ids", "group"):
    message = f"ValueError: {name} = .*: generate takes none: read the prompt with `prefill`"
    REFUSED["generate"][message] = {name: IDS[:1]}
SAMPLES = dict(num_return_sequences=2, do_sample=True)
REFUSED["stream"] = REFUSED["generate"] | {
    "ValueError: one text for a prompt; for beam_search, use generate": dict(num_beams=2),
    "ValueError: yields one text": SAMPLES,
    "ValueError: streamer = 1: stream takes none": dict(streamer=1),
    "ValueError: could not locate a tokenizer": dict(stop_strings="a", tokenizer=1),
}
UNREPEATED = SAMPLES | dict(cache=True, attention_mask=torch.ones(1, 18, device=DEVICE))
REFUSED["generate"][r"ValueError: \(2, 1\): must be \(2, 2\): for samples"] = UNREPEATED
REFUSED = [(call, *case) for call, cases in REFUSED.items() for case in cases.items()]
SSD = ssd_inputs(2, 5, 4, 3, 3, 6)
for form, groups in itertools.product(FORMS, (3, 0)):
    given = SSD | {name: SSD[name][:, :, :groups] for name in "BC"}
    REFUSED.append((form, f"ValueError: g = {groups}: groups of B and C, must divide", given))
for layer in (make_layer(), make_layer(ROTARY)):
    u = torch.ones(3, 2, 10, **DRAW)
    given = dict(u=u, state=layer.initial_state(1), starts=u[..., 0] > 0)
    error = "ValueError: a state has shape .1, .*: it must be for 3 rows"
    REFUSED.append((layer.step, error, given))
    given = dict(u=u, starts=u[..., 0] > 0, seq_idx=IDS[:1].expand(3, -1)[:, :2])
    REFUSED.append((layer, "ValueError: seq_idx and starts both", given))
for name, value in [(name, value) for name, values in IMPOSSIBLE.items() for value in values]:
    error, changed_later = rf"^{name}( \(\w+\))? = ", Mamba2Config(d_model=768)
    must = f"ValueError: {error}{re.escape(repr(value))}: .*(must|only)"
    REFUSED.append((Mamba2Config, must, {name: value}))
    setattr(changed_later, name, value)
    REFUSED.append((Mamba2, f"ValueError: {error}", dict(d_model=changed_later)))
for value in (0, -3, 2.5, None, True):
    given = SSD | dict(chunk_size=value)
    REFUSED.append((ssd, f"ValueError: chunk_size = {value}: must be an integer", given))
for name, value in CHANGES.items():  # options that change the results, in every format
    error, option = rf"ValueError: {name}( .*|\))? = {re.escape(repr(value))}: ", {name: value}
    for file in ({}, FLA, TRANSFORMERS, ORIGINAL):
        REFUSED.append((READ, error, file | option))
    file = ORIGINAL | dict(ssm_cfg=ORIGINAL["ssm_cfg"] | option)
    REFUSED.append((READ, error, file))


@pytest.mark.parametrize("call, error, given", REFUSED)
def test_arguments_that_do_not_fit_are_refused_with_the_reason(call, error, given):
    """error: its type, and a regular expression of what it says."""
    kind, message = error.split(": ", 1)
    if isinstance(call, str):  # of a model
        model, ids = tiny(), IDS if call == "forward" else IDS[:1]
        given = dict(input_ids=ids) | given | ({} if call == "forward" else dict(max_new_tokens=3))
        if given.get("cache") is True:
            given["cache"] = model.prefill(IDS[:1])
        call = getattr(model, call)
    with pytest.raises(getattr(builtins, kind), match=message):
        list(call(**given))


@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_bfloat16_weights_keep_a_float32_residual_stream_and_state(residual_in_fp32):
    ids, options = tokens(2, 20), dict(residual_in_fp32=residual_in_fp32)
    model = tiny(dtype=torch.bfloat16, **options)
    output = model(ids, labels=ids, output_hidden_states=True, use_cache=True)
    residual = torch.float32 if residual_in_fp32 else torch.bfloat16
    assert {h.dtype for h in output.hidden_states[:-1]} == {residual}
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    assert output.cache.states[0].ssm.dtype == torch.float32
    # bfloat16 has 8 bits, 4e-3; 5e-2 leaves room for a dozen roundings in a row.
    assert_close(output.logits.float(), tiny(**options)(ids).logits, 5e-2)


@pytest.mark.parametrize("options", [{}, dict(expand=1.5, use_bias=True), HYBRID])
def test_the_first_loss_of_a_new_model_is_near_that_of_guessing(options):
    sizes = dict(vocab_size=1024, hidden_size=64, head_dim=16, num_hidden_layers=4)
    new = Mamba2ForCausalLM(Mamba2Config(**sizes, **options)).to(DEVICE)
    with torch.device("meta"):
        late = Mamba2ForCausalLM(Mamba2Config(**sizes, **options, tie_word_embeddings=False))
    ids = tokens(4, 64, vocabulary=1024)
    output = late(*2 * [ids.to("meta")], labels=ids.to("meta"), segment_length=9, logits_to_keep=0)
    assert output.logits.is_meta and output.logits.shape == (4, 64, 1024)
    late.to_empty(device=DEVICE)
    for parameter in late.parameters():
        nn.init.constant_(parameter, math.nan)
    late.apply(late._init_weights)
    for model, slack in ((new, 0.05), (late, 0.5)):  # a head of its own is drawn wider
        assert abs(model(ids, labels=ids).loss.item() - math.log(1024)) < slack
        for layer in model.backbone.layers:  # the original's depth scaling, by sqrt(4)
            out, depth = layer.mixer.out_proj, 4 if isinstance(layer.mixer, Mamba2) else 1
            assert 0.95 < out.weight.abs().max() * (depth * out.in_features) ** 0.5 <= 1
        assert abs(model.get_input_embeddings().weight.std().item() / 0.02 - 1) < 0.05


def test_sequences_begin_where_positions_are_0_or_do_not_grow():
    model, ids = tiny(dtype=torch.float64), tokens(2, 6)
    cache, labels = dict(cache=model(ids).cache), dict(seq_idx=digits("000011", "012222"))
    mask = dict(attention_mask=digits("001111", "110111"))
    others = dict(seq_idx=digits("001111", "011222"))
    first_masked = dict(attention_mask=digits("111011", "110011"))
    halves = dict(seq_idx=digits("000111", "000111"))
    for at, given, same in (
        (("012301", "000123"), {}, labels),  # as TRL packs rows of one length
        (("012301", "000123"), others, others),  # which win
        (("110123", "011234"), mask, mask),
        (("000123", "011234"), mask, mask),  # nonsense where it is masked
        (("123456", "567891"), {}, dict(seq_idx=digits("000000", "000001"))),
        (("678912", "678912"), cache, cache | dict(seq_idx=digits("000011", "000011"))),
        (("012345", "012345"), cache, {}),
        (("012012", "012012"), first_masked, first_masked | halves),
    ):
        found = model(ids, position_ids=digits(*at), **given).logits
        assert_close(found, model(ids, **same).logits)


# ---- Generate ------------------------------------------------------------------------------------


# Three prompts of different lengths, padded on the left.
PROMPTS = tokens(3, 12), digits("000000000111", "000111111111", "111111111111")


def streamed(model, ids, **options):
    return torch.cat([ids, torch.stack(list(model.stream(ids, **options)), 1)], 1)


def without_cache(model, ids, **options):
    """Text of transformers' own generate, which reads the whole text again for each token."""
    return transformers.GenerationMixin.generate(model, ids, use_cache=False, **options)


def test_a_stream_samples_in_float32_and_takes_a_generation_config():
    model, ids, texts = tiny(dtype=torch.bfloat16), tokens(1, 12).expand(500, -1), []
    config = dict(GREEDY, do_sample=True, top_k=0, max_new_tokens=4)
    config = transformers.GenerationConfig(**config)
    for write in (model.generate, functools.partial(streamed, model)):
        torch.manual_seed(1)
        texts.append(write(ids, generation_config=config))
    assert torch.equal(*texts)


TWICE_EVEN = lambda ids, *_, **__: (ids[:, 12:] % 2 == 0).sum(1) >= 2
# The last of these is in a prompt, where it ends nothing, though a piece of the prompt ends there.
ENDS = dict(eos_token_id=[*range(2, 64, 4), PROMPTS[0][2, 9].item()], pad_token_id=3)
WAYS = {
    "greedy": {},
    "sampled": dict(do_sample=True, temperature=1.3, top_k=20, top_p=0.9, min_p=0.01),
    "several samples": dict(do_sample=True, top_k=0, num_return_sequences=2),
    "beams": dict(num_beams=4, num_return_sequences=3, eos_token_id=7, length_penalty=2.0),
    "penalised": dict(repetition_penalty=1.5, no_repeat_ngram_size=2, max_new_tokens=30),
    "ended": dict(max_new_tokens=14, **ENDS),
    "ended samples": dict(do_sample=True, top_k=0, num_return_sequences=3, **ENDS),
    "long enough": dict(min_new_tokens=6, **ENDS),
    "a stop string": dict(stop_strings=[*"0123456789"], tokenizer=transformers.ByT5Tokenizer()),
    "a limit on rows": dict(stopping_criteria=[TWICE_EVEN]),
    "a limit of length": dict(stopping_criteria=[MaxLengthCriteria(17)]),
    "a limit that was reached before": dict(stopping_criteria=[MaxLengthCriteria(3)]),
}
HYBRID_WAYS = [(True, way) for way in ("greedy", "beams", "ended samples")]


@pytest.mark.parametrize("hybrid, way", [*((False, way) for way in WAYS), *HYBRID_WAYS])
@pytest.mark.parametrize("rows", [1, 3])
def test_text_logits_and_cache_are_those_without_a_cache_whatever_the_config_says(
    hybrid, way, rows
):
    kind = type("MyLM", (Mamba2ForCausalLM,), {})  # transformers < 5.24 sees no Mamba in the name
    options = dict(HYBRID if hybrid else ALL, use_cache=False, return_dict=False)
    model = tiny(kind, dtype=torch.float64, **options)
    (ids, mask), lengths = (t[:rows] for t in PROMPTS), []
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True, **WAYS[way]}
    samples, beams = options.get("num_return_sequences", 1), options.get("num_beams", 0)
    prompt, embeddings = dict(attention_mask=mask), model.get_input_embeddings()
    torch.manual_seed(1)
    expected = without_cache(model, ids, **prompt, **options)
    text, eos = expected.sequences, torch.tensor(options["eos_token_id"] or -1, device=DEVICE)
    exists = F.pad(mask.repeat_interleave(samples, 0), (0, text.shape[1] - 12), value=1)
    ended = torch.isin(text[:, 12:-1], eos).any()  # some rows before others
    assert ended == (len(text) > 1 and way in ("ended", "ended samples", "long enough"))

    calls = [(ids, prompt, 12), (ids, dict(use_cache=False, **prompt), 12)]
    if way == "greedy" and rows == 3:
        assert len(text[:, 12:].unique()) > 4  # it is no repetition, which anything could give
        dtypes = (torch.int32, torch.int16, torch.int8, torch.uint8)
        calls += [(ids.to(dtype), prompt, 12) for dtype in dtypes]
    calls += [(ids, prompt | {name: 5}, 12) for name in ("prefill_chunk_size", "segment_length")]
    calls += [(ids, dict(inputs_embeds=embeddings(ids), **prompt), 0)]
    reads_all = {"stopping_criteria", "stop_strings", "repetition_penalty"}  # also old tokens
    for length in (3, 8, 11):
        past = model.prefill(ids[:, :length], mask[:, :length]).repeat(max(samples, beams))
        past = dict(cache=past, **prompt)
        calls += [(ids, past, 12 - length)]
        calls += [] if options.keys() & reads_all else [(ids[:, length:], past, 12 - length)]
    embeddings.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    for given, more, count in calls:
        if samples == 1 and "stop_strings" not in options:  # which a stream refuses
            torch.manual_seed(1)
            found = streamed(model, given, **options | more)
            assert torch.equal(found[:, given.shape[1] :], text[:, 12:])
        lengths.clear()
        torch.manual_seed(1)
        streamer = None if beams else mock.Mock()
        output = model.generate(given, streamer=streamer, **options | more)
        assert torch.equal(output.sequences[:, given.shape[1] :], text[:, 12:])
        assert_close(list(output.logits), list(expected.logits), 1e-6)  # these are float32
        if not beams:
            seen = [call.args[0] for call in streamer.put.mock_calls[1:]]  # the first is the prompt
            assert torch.equal(torch.stack(seen, 1), text[:, 12:].cpu()) and streamer.end.called
        if not beams and not ended:
            assert sum(lengths) == count + text.shape[1] - 13  # no token is read again
        # The last beams' states are not those of the best texts, and rows that end read padding.
        if beams or len(text) > 1:
            assert output.cache is output[mamba2.CACHE] is None
            continue
        assert type(output.cache) is Mamba2Cache and output.cache is output.past_key_values
        assert output.cache.get_seq_length() == text.shape[1] - 1  # the last is not read yet
        assert_same_state(output.cache, model.prefill(text[:, :-1], exists[:, :-1]), F64)
    assert not beams or len(text.unique(dim=0)) == len(text) == 3 * rows


def test_streams_and_threads_of_one_model_do_not_disturb_each_other():
    model, texts = tiny(dtype=torch.float64), [tokens(2, 12, seed=seed) for seed in range(4)]
    expected, found = [model.generate(ids, **GREEDY) for ids in texts], texts
    for together in zip(*(model.stream(ids, **GREEDY) for ids in texts), strict=True):
        pairs = zip(found, together, strict=True)
        found = [torch.cat([text, token[:, None]], 1) for text, token in pairs]
        for token in together:  # a stream does not read it again
            token.zero_()
    assert identical(found, expected)
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda ids: model.generate(ids, **GREEDY), texts * 3)
        assert identical([*found], expected * 3)


def test_a_stream_asks_a_gpu_every_eighth_token_whether_the_text_is_over(monkeypatch):
    model, ids, read = tiny(), tokens(2, 12), []
    model.backbone.register_forward_pre_hook(lambda *_: read.append(1))
    on_gpu = ids.as_subclass(type("OnGpu", (torch.Tensor,), dict(is_cuda=True)))
    over = lambda ids, _: torch.full((2,), ids.shape[1] == 12 + 11, device=DEVICE)
    criteria = transformers.StoppingCriteriaList([over, MaxLengthCriteria(12 + 20)])
    config = transformers.GenerationConfig(num_return_sequences=1)
    tokens_read = model._stream(on_gpu, lambda _, scores: scores, criteria, config, use_cache=True)
    assert [len(read) for _ in tokens_read] == [8] * 8 + [16] * 3
    # Nothing else that a step does waits for a number.
    asked, ask = [], torch.Tensor.__bool__
    stream = model.stream(ids, **dict(GREEDY, eos_token_id=VOCABULARY))
    next(stream), next(stream)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda t: asked.append(t) or ask(t))
    assert len(list(stream)) == 10 and not asked


def test_a_prompt_is_read_in_segments_for_its_state_alone_and_resumed_in_its_last_sequence():
    model, ids, read, rows = tiny(dtype=torch.float64, **ALL), tokens(1, 12), [], []
    model.backbone.register_forward_pre_hook(lambda _, given: read.append(given[0].shape[1]))
    model.lm_head.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[1]))
    whole = torch.cat([ids.expand(3, -1), tokens(3, 5, seed=1)], 1)
    for labels in ("00111112222", "00111112223", "00111112233", "00111113333", "00000000000"):
        seq_idx, start = digits(labels), labels.index(labels[-1])  # of the last sequence
        expected = without_cache(model, whole[:, start:], **GREEDY)[:, -12:]
        read.clear(), rows.clear()
        first = model.prefill(ids[:, :9], seq_idx=seq_idx[:, :9])
        positions = torch.tensor([[i - labels.index(labels[i]) for i in (9, 10)]], device=DEVICE)
        pieces = model.prefill(ids[:, 9:11], cache=first, position_ids=positions)
        options = dict(segment_length=4, logits_to_keep=0)
        segments = model.prefill(ids[:, :11], seq_idx=seq_idx, **options)
        auto = [9] if CUDA else [5, 4]  # a GPU is not asked for so little at a time
        assert read == [*auto, 2, 4, 4, 3] and rows == [1, 1, 1]
        for cache in (pieces, segments):
            assert not any(t.requires_grad for t in tensors(cache.states))
            assert_same_state(cache, model(ids[:, start:11]).cache, F64)
            for write in (model.generate, functools.partial(streamed, model)):
                found = write(whole, cache=cache.repeat(3), **GREEDY)
                assert torch.equal(found[:, 17:], expected)


def without_graphs(model, ids, **options):
    with mock.patch.object(mamba2.kernels.DecodingGraph, "enabled", False):
        return model.generate(ids, **options)


def put(model, path, value):
    """The attribute at this path becomes value(what it was)."""
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, model)
    setattr(owner, name, value(getattr(owner, name)))


def move(model):
    """Other weights in other memory; a graph that still reads the old memory finds NaN."""
    for weight in model.parameters():
        old, weight.data = weight.data, weight.data * 1.3
        old.fill_(torch.nan)


CONV = "backbone.layers.0.mixer.conv1d"
# Whatever a step depends on, besides values of weights: each changes the logits of the next text.
DEPENDS = {
    "weights move": move,
    "a head": ("lm_head", lambda _: nn.Linear(32, 64, False, DEVICE, torch.bfloat16)),
    "the order of layers": ("backbone.layers", lambda layers: layers[::-1]),
    "an option": ("config.time_step_limit", lambda _: (0.3, 0.4)),
    "a layer's option": ("backbone.layers.1.mixer.config", lambda _: tiny(dt_limit=(1, 2)).config),
    "eps of a layer's norm": ("backbone.layers.0.mixer.norm.eps", lambda _: 3.0),
    "a layer twice": ("backbone.layers", lambda layers: nn.ModuleList([layers[0]] * 2)),
    # The same memory, read as (d, 1, k) of which d is the innermost.
    "a layout": (f"{CONV}.weight.data", lambda w: w.as_strided(w.shape, (1, 1, w.shape[0]))),
    "a lazy minus": ("backbone.norm_f.weight.data", torch._neg_view),
    "a bias": ("lm_head.bias", lambda _: nn.Parameter(torch.randn(64, **DRAW).bfloat16())),
    "no bias": (f"{CONV}.bias", lambda _: None),
    "a dtype": lambda m: m.to(torch.float16),
}
# Models with parts that a graph might not follow.
NO_GRAPH = {
    "training": lambda m: m.train(),
    "a hook": lambda m: m.backbone.layers[1].mixer.register_forward_hook(lambda *given: None),
    "a hook before": lambda m: m.lm_head.register_forward_pre_hook(lambda *given: None),
    "a forward of its own": ("forward", functools.partial),  # as accelerate wraps it
    "a head of another class": ("lm_head.__class__", lambda kind: type("Own", (kind,), {})),
    "a buffer": lambda m: m.lm_head.register_buffer("scale", torch.ones(1)),
    "compiled": lambda m: m.backbone.compile(backend="eager"),
    "sharded": ("lm_head.weight", lambda weight: type("Shard", (nn.Parameter,), {})(weight)),
    "a part elsewhere": lambda m: m.backbone.norm_f.to("meta"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", DEPENDS | NO_GRAPH)
def test_a_graph_is_made_anew_for_all_that_a_step_depends_on_if_it_can_follow(name):
    model, fingerprint = tiny(dtype=torch.bfloat16), mamba2.kernels._fingerprint

    def graph_and_logits():
        ids, given = tokens(2, 12), dict(GREEDY, output_logits=True, return_dict_in_generate=True)
        found = model.generate(ids, **given)
        graph, plain = mamba2.kernels.DecodingGraph.idle[model], without_graphs(model, ids, **given)
        assert_close(list(found.logits), list(plain.logits), 1e-2)
        return graph, model(ids).logits.float()

    before = fingerprint(model)
    for weight in model.parameters():
        weight.mul_(1.01)
    assert fingerprint(model) == before is not None  # new values in the old places
    runs = CUDA and name in DEPENDS
    old = graph_and_logits() if runs else None
    change = (DEPENDS | NO_GRAPH)[name]
    handle = put(model, *change) if isinstance(change, tuple) else change(model)
    after = fingerprint(model)
    assert after is None if name in NO_GRAPH else after not in (before, None)
    if "hook" in name:
        handle.remove()
        assert fingerprint(model) == before
    if runs:
        graph, logits = graph_and_logits()
        assert graph is not old[0] and relative_error(logits, old[1]) > 1e-3  # or it shows nothing


@torch.no_grad()
def test_a_graph_is_made_for_the_switches_of_pytorch():
    modes, matmul = mamba2.kernels._modes, torch.backends.cuda.matmul
    newer = Version(torch.__version__) >= Version("2.9")
    tf32 = ("fp32_precision", "tf32") if newer else ("allow_tf32", True)
    found = [modes()]
    with torch.enable_grad():
        assert modes() is None
    with torch.inference_mode():
        found.append(modes())
    with poisoned():
        found.append(modes())
    for name, value in (tf32, ("allow_bf16_reduced_precision_reduction", False)):
        old = getattr(matmul, name)
        setattr(matmul, name, value)
        found.append(modes())
        setattr(matmul, name, old)
    assert None not in found and len({*found}) == 5 and modes() == found[0]


@pytest.fixture
def taken(monkeypatch):
    """The graphs that texts take from now on: their steps are not captured, but run anywhere."""
    graphs, kernels = [], mamba2.kernels

    class PlainGraph(kernels.DecodingGraph):
        def __init__(self, text):
            self.model, self.modes, self.steps = text.model, kernels._modes(), 0
            self.states = [Mamba2State(*map(torch.clone, state)) for state in text.current.states]
            self.text = weakref.ref(text)
            graphs.append(self)

        def __call__(self, ids):
            self.token, self.steps = ids, self.steps + 1
            return self.step(self.model)

    kind = kernels.DecodingGraph
    monkeypatch.setattr(kind, "take", lambda text: PlainGraph(text) if kind.enabled else None)
    monkeypatch.setattr(kernels.Text, "of", kernels.Text)  # also on a CPU
    return graphs


def test_generate_gives_plain_steps_to_a_graph_and_all_others_to_the_model(taken):
    model, (ids, mask) = tiny(dtype=torch.float64), PROMPTS
    holes = mask.clone()
    holes[2, 10] = 0  # after tokens that all rows have, so that a graph has begun

    def switch(ids, scores):  # of PyTorch's, for the step of one token
        torch.use_deterministic_algorithms(ids.shape[1] == 17, warn_only=True)
        return scores

    for options, steps in (
        (dict(output_logits=True), [11]),
        (dict(output_hidden_states=True), []),
        (dict(guidance_scale=2), [11]),
        (dict(num_beams=3), [11]),
        (dict(logits_processor=[switch]), [10]),
        (dict(num_return_sequences=2, do_sample=True), [11]),
        (dict(eos_token_id=7), [7]),
        (dict(attention_mask=holes, prefill_chunk_size=1), [13]),
    ):
        given = dict(GREEDY, return_dict_in_generate=True, attention_mask=mask) | options
        torch.manual_seed(0)
        right = without_graphs(model, ids, **given)
        taken.clear()
        torch.manual_seed(0)
        found = model.generate(ids, **given)
        for name in ("sequences", "logits", "hidden_states"):
            assert_close(found.get(name), right.get(name))
        if right.cache is not None:  # of beams there is none
            assert_same_state(found.cache, right.cache, F64)
        assert [(graph.steps, graph.text()) for graph in taken] == [(n, None) for n in steps]
    taken.clear()
    streamed(model, ids, attention_mask=mask, **GREEDY)
    model(ids, mask)  # outside of generate there is none
    streamed(model, ids[-1:], cache=model.prefill(ids[-1:, :-1]), **GREEDY)
    assert [(graph.steps, graph.text()) for graph in taken] == [(11, None), (12, None)]


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_a_cuda_graph_decodes_what_the_plain_step_decodes():
    ids, idle = tokens(2, 12), mamba2.kernels.DecodingGraph.idle
    given = dict(GREEDY, max_new_tokens=1000)
    for options in ({}, dict(n_groups=2, use_bias=True)):
        model = tiny(**options)
        plain = without_graphs(model, ids, **given)
        assert model not in idle
        assert torch.equal(streamed(model, ids, **given), plain)
        graph = idle[model]
        assert torch.equal(model.generate(ids, **given), plain)
        for stream in (torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.default_stream()):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found = model.generate(ids, **given)
            torch.cuda.current_stream().wait_stream(stream)
            assert torch.equal(found, plain) and idle[model] is graph
    with torch.no_grad():  # new weights in the old place
        model.backbone.layers[0].mixer.in_proj.weight.mul_(1.5)
    changed = without_graphs(model, ids, **given)
    assert not torch.equal(changed, plain)
    assert torch.equal(streamed(model, ids, **given), changed) and idle[model] is graph
    graph = weakref.ref(idle[model])
    del model
    gc.collect()
    assert graph() is None  # freed with its model


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_kernel_graph_keeps_no_weights_while_it_is_not_used():
    model, ids = tiny(), tokens(2, 12)
    expected, stream = model.generate(ids, **GREEDY), model.stream(ids, **GREEDY)
    found = [next(stream) for _ in range(8)]
    old = StorageWeakRef(model.lm_head.weight.untyped_storage())
    model.to("cpu")
    found += stream  # a graph reads the old weights until the text ends
    assert torch.equal(torch.stack(found, 1), expected[:, 12:])
    gc.collect()
    assert old.expired() and model in mamba2.kernels.DecodingGraph.idle


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@torch.no_grad()
def test_kernel_graph_is_made_for_the_states_of_all_layers():
    model, ids = tiny(), tokens(1, 12)
    cache = model.prefill(ids)
    given = dict(GREEDY, return_dict_in_generate=True)
    given["attention_mask"] = torch.ones(1, 13, device=DEVICE, dtype=torch.long)
    first, last = cache.states
    mixed = (first, Mamba2State(last.conv, last.ssm.bfloat16()))
    for states in (cache.states, mixed, cache.states):
        past = type(cache)(states, cache.length)
        found = model.generate(ids[:, :1], cache=past, **given)
        assert [s.ssm.dtype for s in found.cache.states] == [s.ssm.dtype for s in states]
        for t in range(12):
            past = model(found.sequences[:, t : t + 1], cache=past, use_cache=True).cache
        assert_same_state(found.cache, past, 1e-2 if states is mixed else F32)


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("call", [0, 1])  # while it is tried out, while it is captured
def test_kernel_graph_that_found_no_memory_is_tried_again(call, monkeypatch):
    model, ids, kind = tiny(), tokens(2, 12), mamba2.kernels.DecodingGraph
    expected, step, count = without_graphs(model, ids, **GREEDY), kind.step, itertools.count()

    def failing(self, *given):
        logits = step(self, *given)
        if next(count) == call:
            raise torch.OutOfMemoryError("no memory")
        return logits

    monkeypatch.setattr(kind, "step", failing)
    with pytest.warns(UserWarning, match="without a CUDA graph: no memory"):
        assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert model not in kind.idle
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert model in kind.idle


# ---- Trainer, PEFT, pipelines --------------------------------------------------------------------

TEXTS = ["a", "bb bb bb bb bb", "no text at all", "text", "ab" * 9, "cd" * 12, "short", "to a to a"]


def byte_data():
    """TEXTS as token ids, and what makes batches of them: a collator that pads, three that pack."""
    tokenizer, packing = transformers.ByT5Tokenizer(), transformers.DataCollatorWithFlattening
    kinds = [{}, dict(return_seq_idx=True), dict(return_seq_idx=True, return_position_ids=False)]
    padding = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    data = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    return data, [padding, *(packing(**kind) for kind in kinds)]


adamw = lambda model: torch.optim.AdamW(mamba2.parameter_groups(model, 0.1), lr=1e-2)


def train(folder, data, collator, model, optimizer=None, resume=None, **options):
    """Train the model by transformers' Trainer, and return the losses on the way."""
    optimizer = optimizer or adamw(model)
    given = dict(max_steps=4, per_device_train_batch_size=4, logging_steps=1, save_strategy="no")
    given |= dict(use_cpu=DEVICE.type == "cpu", report_to=[], disable_tqdm=True)
    arguments = transformers.TrainingArguments(output_dir=str(folder), **{**given, **options})
    trainer = transformers.Trainer(model, arguments, collator, data, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resume)
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def test_collators_that_pad_or_pack_give_the_loss_of_the_texts_alone():
    model, (data, collators) = tiny(vocab_size=384, dtype=torch.float64), byte_data()
    texts = [torch.tensor(row["input_ids"], device=DEVICE) for row in data]
    loss = mean_loss(model, [(text, text) for text in texts])
    expected = model_gradients(model, loss)
    for collator in collators:
        batch = {k: v.to(DEVICE) for k, v in collator([dict(row) for row in data]).items()}
        found = model(**batch).loss
        assert_close(found, loss, F64)
        assert_close(model_gradients(model, found), expected)


def test_the_trainer_learns_the_same_whole_in_segments_accumulated_and_resumed(tmp_path):
    data, collators = byte_data()
    # With accelerate 1.15, an older Trainer divides once more, Llama's loss too.
    rows = 1 if Version(transformers.__version__) >= Version("5.23") else 4
    parts = dict(per_device_train_batch_size=rows, gradient_accumulation_steps=4 // rows)
    ways = [
        (0, dict(save_strategy="steps", save_steps=6)),
        (7, dict(gradient_checkpointing=True, **parts)),
        (0, dict(resume=str(tmp_path / "checkpoint-6"))),  # its log begins with the first six
    ]
    for collator in collators[:2]:
        runs = []
        for segment_length, given in ways:
            model = tiny(vocab_size=384, dtype=torch.float64, segment_length=segment_length)
            # AdamW would hide a factor.
            optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
            given |= dict(max_steps=9, max_grad_norm=0.0)
            losses = train(tmp_path, data, collator, model, optimizer, **given)
            assert len(losses) == 9 and sum(losses[-3:]) < 0.8 * sum(losses[:3])
            runs.append([[*model.parameters()], torch.tensor(losses)])
        for run in runs[1:]:
            assert_close(run[0], runs[0][0], F64)
            assert_close(run[1], runs[0][1], 1e-6)  # Trainer adds up losses in float32


def test_lora_trains_the_projections_and_can_be_saved_and_merged(tmp_path):
    ids, options = tokens(2, 9), dict(task_type="CAUSAL_LM", target_modules="all-linear")
    # Random from the first step on: at PEFT's zeros, half of the gradients are 0.
    model = peft.get_peft_model(tiny(), peft.LoraConfig(init_lora_weights=False, **options))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2 and all("lora_" in name for name in trained)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in trained.values())
    logits, before = model(ids).logits, tiny()(ids).logits
    assert (logits - before).abs().max() > 0.01 * before.abs().max()
    model.save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(tiny(), tmp_path).to(DEVICE)
    text, merged = model.generate(input_ids=ids, **GREEDY), model.merge_and_unload()
    assert torch.equal(merged.generate(ids, **GREEDY), text)
    for same in (back, merged):
        assert_close(same(ids).logits, logits, F32)


def test_a_pipeline_writes_what_generate_writes():
    model, tokenizer = tiny(vocab_size=384, dtype=torch.float64), transformers.ByT5Tokenizer()
    tokenizer.padding_side = "left"
    write = transformers.pipeline("text-generation", model, tokenizer=tokenizer, device=DEVICE)
    together = write(TEXTS[:4], batch_size=4, return_full_text=True, **GREEDY)
    for text, found in zip(TEXTS[:4], together, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids.to(DEVICE)
        expected = tokenizer.decode(model.generate(ids, **GREEDY)[0], skip_special_tokens=True)
        assert found[0]["generated_text"] == expected


@EITHER
@MASKED_AND_PACKED
@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_segments_train_weights_and_states_as_the_whole(masked, apart, layer_by_layer, options):
    model = tiny(dtype=torch.float64, **options).train()
    ids, mask, labels = padded()
    draw = lambda t: torch.randn_like(t).requires_grad_() if t.is_floating_point() else t
    states = tree_map(draw, model(ids, use_cache=True).cache.states)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    inputs = [*model.parameters(), embeds, *tensors(states)]
    given = dict(attention_mask=mask) if masked else {}
    given |= dict(seq_idx=packed(mask)[1]) if apart else {}
    given |= dict(inputs_embeds=embeds, labels=labels, cache=Mamba2Cache(states), use_cache=True)
    calls = []
    model.backbone.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    if layer_by_layer:
        model.gradient_checkpointing_enable(dict(use_reentrant=True))  # which is ignored

    def results(segment_length):
        calls.clear()
        output = model(segment_length=segment_length, **given)
        found = [output.loss, *tensors([*map(canonical, output.cache.states)])]
        assert not any(t.requires_grad for t in tensors(output.cache.detach().states))
        return found, gradients(output.loss + sum(t.square().sum() for t in found[1:]), inputs)

    expected = results(0)
    assert len(calls) == 1 + layer_by_layer
    assert all(gradient.abs().max() > 0 for gradient in expected[1])
    for segment_length in (1, 3, 7, 19, 20, 100, "auto"):
        assert_close(results(segment_length), expected, 1e-12, case=segment_length)
    model.gradient_checkpointing_disable()
    model.config.segment_length = 7  # for calls that leave the choice to the config
    assert_close(results(None), expected, 1e-12)
    assert len(calls) == 2 * 3  # times forward and again, times segments


def test_many_segments_in_autocast_lose_no_more_digits_than_one():
    exact, ids = tiny(dtype=torch.float64).train(), tokens(1, 400)
    expected = model_gradients(exact, exact(ids, labels=ids).loss)
    model, errors = tiny().train(), []
    for segment_length in (0, 2):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            output = model(ids, labels=ids, segment_length=segment_length, use_cache=True)
        assert output.cache.states[0].conv.dtype == torch.bfloat16
        found = model_gradients(model, output.loss)
        errors.append({n: (found[n] - e).norm() / e.norm() for n, e in expected.items()})
    # 200 gradients that are added up in bfloat16 would cost several times as much.
    for name, error in errors[0].items():
        assert errors[1][name] < 1.2 * error + 1e-3, name


def test_memory_grows_as_the_square_root_of_the_length_and_never_holds_all_logits():
    sizes = dict(hidden_size=64, head_dim=64, num_hidden_layers=4, chunk_size=64)
    model, ids, peaks = tiny(**sizes).cpu().train(), tokens(1, 4096).cpu(), []
    model.gradient_checkpointing_enable()
    for l, segment_length in ((256, "auto"), (1024, "auto"), (4096, "auto"), (4096, 0)):
        model.zero_grad()
        with Bytes() as watch:
            model(ids[:, :l], labels=ids[:, :l], segment_length=segment_length).loss.backward()
        # Views of the weights count among the bytes, and gradients, too.
        peaks.append(watch.peak - 2 * sum(p.nbytes for p in model.parameters()))
    assert peaks[1] <= 1.5**2 * peaks[0] and peaks[2] <= 1.5**2 * peaks[1]
    assert peaks[2] <= peaks[3] / 10
    model, l = tiny(vocab_size=1000).train(), 16384 if CUDA else 500
    with Bytes() as watch:
        model(tokens(1, l), labels=tokens(1, l)).loss.backward()
    assert watch.largest <= l * 1000 * 4 / 4  # a quarter of all logits, in float32


@torch.no_grad()
def test_a_long_text_is_evaluated_and_read_in_the_memory_of_one_segment():
    model, ids, peaks = tiny(), tokens(1, 4096), []
    whole = model(ids, labels=ids, use_cache=True)
    for l in (1024, 4096):
        with Bytes() as watch:
            output = model(ids[:, :l], labels=ids[:, :l], segment_length=64, use_cache=True)
        peaks.append(watch.peak - 8 * 5 * l)  # ids, targets, and what these are made of
    assert_close(output.loss, whole.loss, F32)
    assert_same_state(output.cache, whole.cache, F32)
    assert peaks[1] <= 1.05 * peaks[0]
    peaks = []
    for n_layer in (2, 6):
        model = tiny(num_hidden_layers=n_layer)
        with Bytes() as watch:
            model(ids[:, :200], use_cache=False, logits_to_keep=1)
        # States, which are not asked for, would come on top of the weights.
        peaks.append(watch.peak - sum(p.nbytes for p in model.parameters()))
    assert peaks[1] <= peaks[0]


# ---- Saving and loading --------------------------------------------------------------------------


def changed(model, folder, **changes):
    """A checkpoint in transformers' format, with another config; None: it lacks this."""
    path = save(model, folder) / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def original(model, folder, ssm_cfg=None, **options):
    """A checkpoint as the mamba_ssm package writes it, of a `tiny` model unless options differ."""
    folder.mkdir(exist_ok=True)
    of_tiny = dict(layer="Mamba2", d_state=16, headdim=8, chunk_size=8)
    config = dict(d_model=32, n_layer=2, vocab_size=VOCABULARY - 3)
    config |= dict(ssm_cfg=of_tiny | (ssm_cfg or {}), **options)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {k.replace("embeddings", "embedding"): v for k, v in model.state_dict().items()}
    torch.save(weights, folder / "pytorch_model.bin")


of_transformers = lambda model, folder: save(load(save(model, folder), THEIRS), folder)

MORE = dict(ngroups=2, d_conv=3, expand=1.5, bias=True, conv_bias=False, dt_limit=[0.01, 0.1])
UNTIED = dict(tie_embeddings=False, residual_in_fp32=False)
TOP = dict(pad_vocab_size_multiple=16, d_intermediate=0, attn_layer_idx=[], attn_cfg={})
TOP |= dict(rms_norm=True, fused_add_norm=True, **UNTIED)
SSM = MORE | dict(norm_before_gate=False, A_init_range=[1, 16])
CODESTRAL = dict(n_groups=8, head_dim=4, tie_word_embeddings=False)
ITS_FILE = dict(norm_before_gate=True, rms_norm=True, made_by="a test")  # without effect
ITS_FILE |= dict(time_step_limit=[0.0, math.inf])  # as Infinity
# mamba2-torch's config knows no groups, and has the 130m model's num_heads.
MAMBA2_TORCH = dict(n_groups=None, num_heads=24, initializer_range=None, emb_initializer_range=0.02)
MAMBA2_TORCH |= dict(tie_word_embeddings=None, tie_embeddings=True, tie_embedding_weights=True)
EVERY = ALL | dict(expand=1.5, layer_norm_epsilon=1e-3, use_cache=False, id2label={0: "no"})
NO_NORM = dict(rmsnorm=False)
SAVED = "n_groups residual_in_fp32 tie_word_embeddings vocab_size rmsnorm time_step_limit num_heads"
FORMATS = {  # options of the model, and what writes it
    "whole": (dict(pad_token_id=5), save, {}),
    "all options": (EVERY, save, {}),
    "transformers'": (dict(pad_token_id=5), of_transformers, {}),
    "transformers', untied": (dict(tie_word_embeddings=False), of_transformers, {}),
    "in shards": ({}, save, dict(max_shard_size="5KB")),
    # Loaded weights must not be scaled by depth once more.
    "no architectures": ({}, changed, dict(architectures=None, rescale_prenorm_residual=True)),
    "codestral in miniature": (CODESTRAL, changed, ITS_FILE),
    "mamba2-torch": ({}, changed, MAMBA2_TORCH),
    "original": ({}, original, {}),
    "original, all options": (MORE | UNTIED, original, dict(ssm_cfg=SSM, **TOP)),
    "without the norm": (NO_NORM, save, {}),
    "original, without the norm": (NO_NORM, original, dict(ssm_cfg=NO_NORM)),
    "hybrid": (HYBRID, save, {}),
    "original, hybrid": (HYBRID, original, dict(ssm_cfg=dict(ngroups=2), **ATTENTION)),
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_loads_and_is_saved_in_transformers_format_with_every_option(form, tmp_path):
    """Which transformers' own Mamba-2 reads or refuses, but never reads as something else."""
    options, write, given = FORMATS[form]
    model, ours = tiny(**options), tmp_path / "ours"
    write(model, tmp_path / "published", **given)
    shards = [*(tmp_path / "published").glob("model-*.safetensors")]
    assert (len(shards) > 3) == (form == "in shards")
    loaded = load(tmp_path / "published")
    tied, config = model.config.tie_word_embeddings, loaded.config
    assert (loaded.lm_head.weight is loaded.backbone.embeddings.weight) == tied
    save(loaded, ours)
    again, info = Mamba2ForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not info["missing_keys"]
    for same in (loaded, again):
        for name in (*SAVED.split(), *options):
            assert getattr(same.config, name) == getattr(model.config, name), name
        assert getattr(same.config, "made_by", None) == given.get("made_by")
    # All options are written, for others fill what is left out with defaults of their own.
    written = json.loads((ours / "config.json").read_text())
    assert written["model_type"] == "mamba2" and written["architectures"] == ["Mamba2ForCausalLM"]
    assert written.keys() >= mamba2._DEFAULTS.keys()
    written = model.config.to_dict()
    assert Mamba2Config(**written).to_dict() == written
    theirs = [load(ours, THEIRS)] if not options or "pad_token_id" in options else []
    weights, ids = dict(sorted(model.state_dict().items())), tokens(2, 9)
    for same in (loaded, again.to(DEVICE).eval(), *theirs):
        found = dict(sorted(same.state_dict().items()))
        assert found.keys() == weights.keys() and identical(found, weights)
        assert_close(same(ids)[0], model(ids)[0], F32)  # loaded memory is aligned in another way
    assert any("mixer.norm" in name for name in loaded.state_dict()) == config.rmsnorm
    if options is HYBRID or not config.rmsnorm:
        for kind in (THEIRS, transformers.AutoModelForCausalLM):
            with pytest.raises(Exception, match="num_heads"):
                kind.from_pretrained(ours, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("write, attention", [(save, []), (original, []), (save, [0])])
def test_dtype_device_map_and_offloading_are_kept(write, attention, tmp_path):
    model, folder = tiny(attn_layer_idx=attention, attn_cfg=ROTARY), tmp_path / "model"
    write(model, folder)
    assert {type(block).__name__ for block in model.backbone.layers} <= {*model._no_split_modules}
    places = dict.fromkeys(["backbone.embeddings", "lm_head", "backbone.layers.1"], str(DEVICE))
    places |= {"backbone.norm_f": "disk", "backbone.layers.0": "disk"}
    on_disk = dict(device_map=places, offload_folder=tmp_path / "weights")
    for options in (dict(dtype=torch.bfloat16), dict(device_map="auto"), on_disk):
        loaded = Mamba2ForCausalLM.from_pretrained(folder, **options).eval()
        dtype = options.get("dtype", torch.float32)
        assert {p.dtype for p in loaded.parameters()} == {dtype} and loaded.dtype == dtype
        place = "meta" if options is on_disk else "cpu" if "dtype" in options else DEVICE.type
        assert loaded.backbone.layers[0].mixer.out_proj.weight.device.type == place
        logits = loaded(tokens(2, 9).to(loaded.lm_head.weight.device)).logits
        tolerance = F32 if dtype == torch.float32 else 5e-2
        assert_close(logits.cpu(), model(tokens(2, 9)).logits.cpu(), tolerance)


WRONG = {  # what the error names: changes of the weights, and of the config
    "missing_keys.*lm_head.weight.*ignore_on_load_missing may": ({"lm_head.weight": None}, {}),
    "missing_keys.*in_proj.bias": ({}, dict(use_bias=True)),
    "unexpected_keys.*layers.2.mixer.D": ({"backbone.layers.2.mixer.D": torch.ones(8)}, {}),
    "mismatched_keys.*layers.1.mixer.D": ({"backbone.layers.1.mixer.D": torch.ones(7)}, {}),
    "mismatched_keys.*in_proj.weight": ({}, dict(state_size=8)),
    "tie_word_embeddings = True: its lm_head.weight": ({}, dict(tie_word_embeddings=True)),
}


@pytest.mark.parametrize("message", WRONG)
def test_weights_that_do_not_fit_the_config_are_errors_and_never_random(message, tmp_path):
    weights, config = WRONG[message]
    path = save(tiny(tie_word_embeddings=False), tmp_path) / "model.safetensors"
    weights = {k: v for k, v in {**load_file(path), **weights}.items() if v is not None}
    save_file(weights, path, metadata={"format": "pt"})
    config["ignore_mismatched_sizes"] = "mismatched" in message  # else it is transformers' error
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **config)


def test_the_auto_classes_find_this_file_on_request_and_not_before(tmp_path, monkeypatch):
    auto = transformers.models.auto
    mappings = auto.modeling_auto.MODEL_MAPPING, auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    for mapping in (auto.configuration_auto.CONFIG_MAPPING, *mappings):
        monkeypatch.setattr(mapping, "_extra_content", {**mapping._extra_content})  # undone later
    save(tiny(), tmp_path)
    read = transformers.AutoConfig.from_pretrained
    assert type(read(tmp_path)) is transformers.Mamba2Config
    for _ in range(2):
        mamba2.register_with_transformers()
    assert type(read(tmp_path)) is Mamba2Config
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)) is Mamba2ForCausalLM


def test_embedding_and_head_can_be_resized_and_replaced():
    for tied in (True, False):
        model, ids = tiny(tie_word_embeddings=tied), tokens(2, 9)
        before = model(ids).logits
        model.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
        assert_close(model(ids).logits[..., :VOCABULARY], before, F32)
        assert model(ids + 8).logits.shape == (2, 9, VOCABULARY + 8)
    model.set_input_embeddings(nn.Embedding(100, 32).to(DEVICE))
    model.lm_head = nn.Linear(32, 100).to(DEVICE)
    assert model(ids + 36, labels=ids + 36).loss.isfinite()


def test_a_model_with_a_head_of_its_own_begins_with_weights_drawn_for_it(tmp_path):
    class Judge(Mamba2ForCausalLM):
        _keys_to_ignore_on_load_missing = ["^judge"]

        def __init__(self, config):
            super().__init__(config)
            self.judge = nn.Sequential(nn.LayerNorm(config.hidden_size), nn.Linear(32, 1))
            self.post_init()

    save(tiny(), tmp_path)
    norm, linear = Judge.from_pretrained(tmp_path).judge
    assert (norm.weight == 1).all() and (norm.bias == 0).all()
    assert 0 < linear.weight.abs().max() <= 32**-0.5


# ---- Hybrids -------------------------------------------------------------------------------------

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=8)
BAMBA = SIZES | dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16)
if Version(transformers.__version__) > Version("5.20.2"):  # before, its norm ignores groups
    BAMBA["mamba_n_groups"] = 2
ZAMBA = SIZES | dict(layers_block_type=["mamba", "hybrid"], mamba_ngroups=2, mamba_d_state=16)
ZAMBA |= dict(time_step_min=0.4)
NEMOTRON = dict(hidden_size=32, layers_block_type=["mamba", "attention"], mamba_num_heads=6)
NEMOTRON |= dict(mamba_head_dim=8, n_groups=2, ssm_state_size=16, time_step_min=0.4)
FALCON = BAMBA | dict(mamba_d_ssm=48, mamba_n_heads=6, mamba_n_groups=2, ssm_in_multiplier=0.7)
FALCON |= dict(ssm_multipliers=[0.5, 2.0, 3.0, 0.2, 1.5], mamba_norm_before_gate=False)
FALCON |= dict(mamba_proj_bias=True, projectors_bias=True)
MIXERS = [  # a class in README's table of mixers, its module, and options of its configuration
    ("BambaMixer", "bamba", BAMBA | dict(mamba_proj_bias=True, mamba_d_conv=3)),
    ("BambaMixer", "bamba", BAMBA | dict(time_step_limit=(0.3, 0.9), rms_norm_eps=0.1)),
    ("GraniteMoeHybridMambaLayer", "granitemoehybrid", BAMBA | dict(mamba_conv_bias=False)),
    ("Zamba2MambaMixer", "zamba2", ZAMBA | dict(add_bias_linear=True)),
    ("NemotronHMamba2Mixer", "nemotron_h", NEMOTRON | dict(use_bias=True)),
    ("NemotronHMamba2Mixer", "nemotron_h", NEMOTRON | dict(layer_norm_epsilon=0.1)),
    ("FalconH1Mixer", "falcon_h1", FALCON | dict(mamba_rms_norm=False)),
    ("FalconH1Mixer", "falcon_h1", FALCON | dict(mamba_rms_norm=True)),
]


@torch.no_grad()
@pytest.mark.parametrize("name, module, options", MIXERS)
def test_mixers_of_transformers_load_as_the_table_in_the_readme_says(name, module, options):
    """Each row has options, made of the mixer's configuration c, and maybe lines that follow."""
    there = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    mixer = getattr(there, name)
    c = inspect.get_annotations(mixer.__init__, eval_str=True)["config"](**options)
    theirs = mixer(c, layer_idx=0).eval()
    for parameter in theirs.parameters():
        parameter.copy_(0.3 * torch.randn_like(parameter))
    if module == "falcon_h1":  # which its model does
        theirs.register_buffer("mup_vector", there.compute_mup_vector(c), persistent=False)
    (row,) = re.findall(rf"^\|[^|]*`{name}`.*\| (.*) \|$", README_TEXT, re.M)
    options, *lines = re.findall("`(.*?)`", row)
    layer = eval(f"Mamba2(d_model=c.hidden_size, {options})")
    layer.load_state_dict(theirs.state_dict())
    for line in lines:
        exec(line, dict(layer=layer, c=c, mixer=theirs))
    u = torch.randn(2, 37, 32)
    assert_close(layer(u), theirs(u), 1e-5)  # float32, in which their norms compute


def test_the_state_of_attention_grows_by_two_vectors_per_position_and_moves_in_its_dtype():
    layer = make_layer(ROTARY)
    states = [layer.step(layer_inputs(layer, 4, l)[0])[1] for l in range(5)]
    sizes = [sum(t.nbytes for t in state) for state in states]
    assert {b - a for a, b in itertools.pairwise(sizes)} == {4 * (8 * 2 * 2 * 6 + 1)}
    assert identical(states[4].to(DEVICE, torch.bfloat16), states[4])
    assert {t.device.type for t in states[4].to("meta")} == {"meta"}


def test_attention_is_compiled_in_one_graph():
    layer, results = make_layer(ROTARY), []
    u, state = layer_inputs(layer, 2, 5)
    mask, seq_idx = digits("01111", "10101"), digits("00011", "01111")
    for step in (layer.step, torch.compile(layer.step, fullgraph=True, backend="eager")):
        y, end = step(u, state, mask, seq_idx)
        assert type(end) is mamba2.AttentionState
        slopes = gradients([y, end[:2]], [u, state, list(layer.parameters())])
        results.append([y, end, slopes])
    assert_close(*results)


# The configurations of state-spaces/mamba2attn-2.7b and transformerpp-2.7b, as published.
PUBLISHED = dict(d_model=2560, vocab_size=50277, rms_norm=True, residual_in_fp32=True)
PUBLISHED |= dict(fused_add_norm=True, pad_vocab_size_multiple=16, tie_embeddings=True)
NO_BIASES = dict(causal=True, out_proj_bias=False, qkv_proj_bias=False)
MAMBA2ATTN = PUBLISHED | dict(d_intermediate=0, n_layer=64, ssm_cfg=dict(layer="Mamba2"))
MAMBA2ATTN |= dict(attn_layer_idx=[9, 18, 27, 36, 45, 56])
MAMBA2ATTN["attn_cfg"] = NO_BIASES | dict(num_heads=30, head_dim=128, rotary_emb_dim=64, d_conv=4)
TRANSFORMERPP = PUBLISHED | dict(d_intermediate=6912, n_layer=32, ssm_cfg={})
TRANSFORMERPP |= dict(attn_layer_idx=[*range(32)])
TRANSFORMERPP["attn_cfg"] = NO_BIASES | dict(num_heads=32, head_dim=80, rotary_emb_dim=40)
MLP = ["mlp.fc1.weight", "mlp.fc2.weight"]
HYBRIDS = {  # with the number of parameters; layers of a small one; published names in its second
    "mamba2attn": (MAMBA2ATTN, 2_697_590_880, [1], {"mixer.conv1d.weight", "mixer.conv1d.bias"}),
    "transformerpp": (TRANSFORMERPP, 2_666_457_600, [0, 1], {"norm2.weight", *MLP}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_load_as_published_and_decode_as_the_whole(name, tmp_path):
    config, count, layers, names = HYBRIDS[name]
    with torch.device("meta"):
        model = Mamba2ForCausalLM(Mamba2Config.from_dict(config))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    # Segments keep the keys and values of all before them: some segments take the least memory.
    assert 2 < 131_072 / model._segment_length("auto", 1, 131_072, None) < 20
    assert model._segment_length("auto", 1, 0, None) == 1

    config = config | dict(attn_layer_idx=layers, d_model=32, n_layer=2, vocab_size=61)
    config["ssm_cfg"] = config["ssm_cfg"] and dict(layer="Mamba2", headdim=8, d_state=8)
    config["attn_cfg"] = config["attn_cfg"] | dict(num_heads=3, head_dim=6, rotary_emb_dim=4)
    config["d_intermediate"] = min(config["d_intermediate"], 100)
    model = Mamba2ForCausalLM(Mamba2Config.from_dict(config)).double().to(DEVICE)
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    names = names | {"norm.weight", "mixer.in_proj.weight", "mixer.out_proj.weight"}
    assert model.backbone.layers[1].state_dict().keys() == names
    original(model, tmp_path, **config)
    model, ids = load(tmp_path, dtype=torch.float64), tokens(2, 14, vocabulary=61)
    h = model.backbone.embeddings(ids)
    for block in model.backbone.layers:
        h = h + by_hand(block.mixer, block.norm(h))[0]
        if block.mlp:
            y, gate = (block.norm2(h) @ block.mlp.fc1.weight.T).chunk(2, -1)
            h = h + (y * gate * torch.sigmoid(gate)) @ block.mlp.fc2.weight.T
    expected = model.backbone.norm_f(h) @ model.backbone.embeddings.weight.T
    assert_close(model(ids).logits, expected)
    call = functools.partial(model, return_dict=False)
    logits, cache = in_pieces(call, dict(input_ids=ids, cache=None), "cache", range(9, 14))
    assert_close(logits, expected)
    torch.save(cache, tmp_path / "cache.pt")
    assert identical(torch.load(tmp_path / "cache.pt").states, cache.states)


def test_attention_is_decoded_by_plain_steps_and_has_no_slices(monkeypatch):
    model, ids = tiny(**HYBRID), tokens(1, 4)
    if mamba2.kernels:  # there is no graph
        assert not {mamba2.Attention, mamba2.GatedMLP} & {*mamba2.kernels._kinds.values()}
        assert mamba2.kernels._fingerprint(model) is None
        assert mamba2.kernels._fingerprint(tiny()) is not None
        monkeypatch.setattr(mamba2.kernels, "block", mock.Mock(side_effect=AssertionError))
        model(ids[:, :1], cache=model.prefill(ids))
    slices = mock.Mock(gather=mock.Mock(return_value=(None, None)))
    monkeypatch.setattr(mamba2, "Slices", mock.Mock(return_value=slices))
    (layer,) = (part for part in model.modules() if isinstance(part, mamba2.Attention))
    u, of_backbone = torch.randn(1, 2, 32), dict(layout=mamba2.Layout(slices=slices))
    group = dict(group=object())
    calls = (model, ids, group), (layer.step, u, group), (layer, u, group), (layer, u, of_backbone)
    for call, given, options in calls:
        with pytest.raises(ValueError, match="attention has no slices: leave out group"):
            call(given, **options)
    assert not slices.mock_calls  # nothing is sent


@EITHER
def test_texts_are_classified_by_their_last_token_wherever_the_padding_is(options, tmp_path):
    language_model = tiny(dtype=torch.float64, tie_word_embeddings=False, **options)
    save(language_model, tmp_path)  # with a head, which is left out
    kind, backbone = mamba2.Mamba2ForSequenceClassification, language_model.backbone
    model = load(tmp_path, kind, dtype=torch.float64, num_labels=3)
    assert identical(model.backbone.state_dict(), backbone.state_dict())
    (ids, mask, _), scores = padded(), []
    labels = torch.tensor([0, 2, 1, 1, 0, 2], device=DEVICE)
    for row, exists in zip(ids, mask.bool(), strict=True):
        h = backbone(row[exists][None])[0][0, -1] if exists.any() else torch.zeros(32, **DRAW)
        scores.append(h @ model.score.weight.T)
    scores = torch.stack(scores)
    loss = F.cross_entropy(scores, labels)
    again = load(save(model, tmp_path / "again"), kind, dtype=torch.float64)
    for given in (dict(input_ids=ids), dict(inputs_embeds=model.get_input_embeddings()(ids))):
        for same in (model, again):
            output = same(attention_mask=mask, labels=labels, **given)
            assert_close((output.logits, output.loss), (scores, loss))
    assert_close(model(ids[-1:]).logits, scores[-1:])
    with pytest.raises(TypeError, match="unexpected keyword argument 'position_ids'"):  # no packing
        model(ids, position_ids=ids)
    assert not hasattr(model, "generate")


def test_the_trainer_and_the_pipeline_classify_texts(tmp_path):
    texts = [letter * length for letter in "ab" for length in (1, 3, 4, 7)]
    tokenizer = transformers.ByT5Tokenizer()
    labels = {0: "letter a", 1: "letter b"}
    config = Mamba2Config(**TINY | dict(vocab_size=384, initializer_range=1.0, id2label=labels))
    model = mamba2.Mamba2ForSequenceClassification(config).to(DEVICE)
    data = [tokenizer(text) | {"labels": int(text[0] == "b")} for text in texts]
    given = tmp_path, data, transformers.DataCollatorWithPadding(tokenizer), model
    losses = train(*given, max_steps=30, per_device_train_batch_size=8)
    assert losses[-1] < 0.1 * losses[0] and abs(losses[0] - math.log(2)) < 0.7
    classify = transformers.pipeline("text-classification", model.eval(), tokenizer=tokenizer)
    for batch_size in (1, 4):
        found = [row["label"] for row in classify(texts, batch_size=batch_size)]
        assert found == [f"letter {text[0]}" for text in texts]


# ---- README and notebook -------------------------------------------------------------------------

FSDP2_RUNS = Version(torch.__version__) >= Version("2.11")  # 2.7 fails; none between was tried
README, FIGURE = ROOT / "README.md", ROOT / ".figure.svg"
README_TEXT = README.read_text() if README.exists() else ""
BLOCKS = re.findall(r"^```python\n(.*?)^```", README_TEXT, re.M | re.S)


def figure_rows():
    """What README's figure shows: times of this and of mamba_ssm by label, from the tables; the
    measured time of a token by length of the context; bytes of the state, and of keys and values.
    """

    def times(begin, mine, other, part=0):
        """Two columns of a row that begins like this; of the second, if there are two."""
        row = re.search(rf"^\| {begin}.*$", README_TEXT, re.M)[0].splitlines()[-1].split("|")
        return tuple(float(row[column].split("/")[part]) for column in (mine, other))

    bars = {
        "SSD, 2.7b: forward": times("SSD, batch 8", 2, 3),
        "SSD, 2.7b: backward": times("SSD, batch 8", 2, 3, part=1),
        "a layer's training step": times("in a CUDA graph", 2, 3),
        "a prompt of 8,192 tokens": times("in a CUDA graph", 2, 3, part=1),
        "a token": times(r"mamba2-130m \| 1 ", 4, 6),
        "a token, 2.7b, batch 64": times(r"mamba2-2.7b \| 1 .*\n\| \| 64 ", 4, 6),
    }
    number = r"([\d.,\sand]+)"
    flat = re.search(rf"mamba2-130m\stakes{number}ms\sper\stoken\safter{number}tokens", README_TEXT)
    flat = [re.findall(r"[\d.,]*\d", part.replace(",", "")) for part in flat.groups()]
    flat = {float(context): float(ms) for ms, context in zip(*flat, strict=True)}
    c = Mamba2Config()  # mamba2-130m
    conv, ssm = Mamba2(c).initial_state(1)
    state = c.n_layer * (2 * conv.numel() + 4 * ssm.numel())  # in bfloat16 and in float32
    keys_and_values = 2 * c.n_layer * c.d_model * 2  # bytes per token, in bfloat16
    return bars, flat, state, keys_and_values


def draw_figure(file=FIGURE):
    """the README's figure from its tables"""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "mamba2", "font.size": 11})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    blue, red = dict(color="#0072B2"), dict(color="#D55E00")
    bars, flat, state, keys_and_values = figure_rows()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(1.1, 1))
    ratios = [theirs / mine for mine, theirs in bars.values()]
    left.bar_label(left.barh([*bars], ratios, **blue), fmt="%.1f×", padding=3)
    left.axvline(1, color="black", linestyle="--", linewidth=1)
    left.set(title="Speed relative to mamba_ssm", xlim=(0, max(ratios) + 0.8))
    left.invert_yaxis()
    mb, text = state / 1e6, f"{min(flat.values()):.3f} to {max(flat.values()):.3f} ms per token"
    right.loglog([*flat], [keys_and_values * context / 1e6 for context in flat], "s-", **red)
    right.loglog([*flat], [mb] * len(flat), "o-", **blue)
    right.text(1.5e4, 1843.2, "Transformer", ha="right", **red)
    right.text(1e6, 1.6 * mb, f"Mamba-2: {mb:.1f} MB", ha="right", **blue)
    right.text(1e6, 0.32 * mb, text, ha="right", size=9, **blue)
    right.set(title="Memory of one sequence", xlabel="context, tokens", ylim=(2, 2e5))
    right.set_xticks([100, 10_000, 1_000_000], ["100", "10,000", "1,000,000"])
    right.set_yticks([10, 1000, 100_000], ["10 MB", "1 GB", "100 GB"])
    right.minorticks_off()
    figure.tight_layout()
    figure.savefig(file, metadata=dict(Date=None))


def test_the_readme_s_figure_shows_the_numbers_of_its_tables(tmp_path):
    draw_figure(tmp_path / "figure.svg")
    files = FIGURE, tmp_path / "figure.svg"
    shown, drawn = (re.findall(">(.+)</text>", file.read_text()) for file in files)
    assert shown == drawn and sum(text.endswith("×") for text in shown) >= 5
    _, flat, state, keys_and_values = figure_rows()
    text = " ".join(README_TEXT.split())
    assert len(flat) >= 5 and f"{state / 1e6:.1f} MB" in text
    assert keys_and_values == 73_728 and "73,728 bytes per token" in text


def test_the_commands_in_the_readme_are_understood(capsys):
    commands = r"(?:python3?|torchrun [^`\n]*?) test_mamba2\.py([^`\n]*)"
    commands = re.findall(commands, README_TEXT)
    assert BLOCKS and len(commands) >= 5
    for command in commands:
        command_line(command.split())
    for dtype in (None, "bfloat16"):
        time_generation("tiny", 2, "7,70", dtype, prompt=5, new=3, seconds=0.01)
    row = r"^model.stream +(7|70) +[\d.]+ +-?[\d.]+ +([\d.]+)$"
    rows = re.findall(row, capsys.readouterr().out, re.M)
    assert [int(length) for length, _ in rows] == [7, 70] * 2 and len({mb for _, mb in rows}) == 1
    benchmark_training("tiny", "40", "plain,both")
    rows = re.findall(r"^ +40 +(plain|both) +\d+ +[\w.]+ +[\d,]+$", capsys.readouterr().out, re.M)
    assert rows == ["plain", "both"]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_readme_block_runs(number, tmp_path, monkeypatch):
    code, namespace = BLOCKS[number], {"__name__": "readme"}
    for need, met in {"# needs a hub": False, "# needs torch 2.11": FSDP2_RUNS}.items():
        if code.startswith(need) and not met:
            pytest.skip(f"block {number + 1} of README.md {need[2:]}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    of_torchrun = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
    with mock.patch.dict(os.environ, of_torchrun):
        exec(compile(code, f"README.md, block {number + 1}", "exec"), namespace)
    assert len(namespace) > 2  # it defined something: it is no empty block


def test_the_notebook_was_executed_in_order_without_errors_and_in_short_cells():
    notebook = json.loads((ROOT / "demo.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert len("".join(cell["source"]).splitlines()) <= 20, cell["source"]
        assert all(output["output_type"] != "error" for output in cell["outputs"])
    assert any(cell["outputs"] for cell in cells)


# ---- Several processes ---------------------------------------------------------------------------
# Each is a rank of torch.distributed, on the CPU with gloo, and of some tests also on a GPU with
# NCCL. What is right is what one process computes, in float64; every rank computes that as well as
# its own part.


def on_ranks(*worlds, nccl=False):
    """Make a test of `case(rank, world)`, which runs in each of `world` processes."""

    def decorate(case):
        backends = [("gloo", world) for world in worlds] + [("nccl", 2)] * nccl

        @pytest.mark.parametrize("backend, world", backends)
        def test(backend, world, tmp_path, monkeypatch):
            method = "spawn"
            if backend == "nccl" and torch.cuda.device_count() < world:
                pytest.skip(f"needs {world} GPUs")
            if backend == "gloo":  # which forks, and that CUDA does not survive
                monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
                torch.multiprocessing.set_forkserver_preload([__name__])
                method = "forkserver"
            given = case.__name__, backend, world, tmp_path
            options = dict(join=False, daemon=True, start_method=method)
            ranks = torch.multiprocessing.start_processes(run_on_rank, given, world, **options)
            end = time.monotonic() + 100
            while not ranks.join(max(0, end - time.monotonic())):  # returns when one has ended
                assert time.monotonic() < end, "no answer"

        test.case = case
        return test

    return decorate


def run_on_rank(rank, case, backend, world, folder):
    global DEVICE, FOLDER
    DEVICE, FOLDER = torch.device("cpu"), folder
    given = dict(init_method=f"file://{folder}/store", rank=rank, world_size=world)
    if backend == "nccl":
        given["device_id"] = DEVICE = torch.device("cuda", rank)
        torch.cuda.set_device(DEVICE)
        torch.set_default_device(DEVICE)
    DRAW["device"] = DEVICE
    dist.init_process_group(backend, timeout=timedelta(seconds=60), **given)
    torch.manual_seed(0)
    globals()[case].case(rank, world)  # its end ends the group; gloo may hang when told to


def mean(tensor):
    """The average over the ranks."""
    tensor = tensor.detach().clone()
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


def cut(ends, rank):
    return slice(([0, *ends])[rank], ends[rank])


@on_ranks(2, 4, nccl=True)
def test_a_model_on_slices_gives_loss_gradients_and_cache_of_the_whole(rank, world):
    l, turn, group, ids = torch.arange(40), itertools.count(), dist.group.WORLD, tokens(2, 40)
    plain = dict(input_ids=ids, labels=ids.masked_fill(ids % 6 == 0, -100))
    mask = torch.stack([(l % 7 != 3) & (l < 33), (l > 11) & (l % 5 != 0)]).long()
    packing = {4: dict(seq_idx=torch.stack([l // 10, l // 13]))}  # by conv_kernel
    packing[1] = dict(position_ids=torch.stack([l % 10, (l + 2) % 13]))
    # Positions of this rank, and how many of them are in a segment.
    ends = [[40 * (i + 1) // world for i in range(world)], [1, 10, 39, 40], [0, 12, 12, 40]]
    ends += [[0, 0, 40, 40], [0, 0, 0, 40]]
    layouts = [(l[cut(e[-world:], rank)], 0) for e in ends]
    for lengths in ([2] * world, [3, 5] if world == 2 else [1, 2, 4, 1]):
        segments = l.unflatten(0, (-1, sum(lengths)))  # each of them cut in slices
        layouts.append((segments.split(lengths, dim=1)[rank].flatten(), lengths[rank]))
    layouts = itertools.cycle(layouts)

    def results(model, part, past, **given):
        """The output, and the gradients of its loss and its states, by weights and past states."""
        past = past and past.map(lambda t: t.detach().requires_grad_(t.is_floating_point()))
        inputs = [*model.parameters(), *tensors(past.states if past else ())]
        for t in inputs:  # a rank may reach none of the past
            t.grad = torch.zeros_like(t)
        output = model(**part, cache=past, use_cache=True, logits_to_keep=0, **given)
        (output.loss + sum(t.square().sum() for t in tensors(output.cache.states))).backward()
        return output, [t.grad for t in inputs]

    for conv_kernel, masked, packed, later in itertools.product((4, 1), *3 * [(0, 1)]):
        model = tiny(dtype=torch.float64, conv_kernel=conv_kernel, **ALL).train()
        past = model(tokens(2, 9, seed=1), use_cache=True).cache if later else None
        whole = plain | dict(attention_mask=mask) if masked else plain
        whole = whole | packing[conv_kernel] if packed else whole
        expected, gradients = results(model, whole, past)
        if next(turn) % 4 > 1:
            model.gradient_checkpointing_enable()
        mine, length = next(layouts)
        part = {name: t[:, mine] for name, t in whole.items()}
        found, given = results(model, part, past, segment_length=length, group=group)
        assert_close([found.loss, found.logits], [expected.loss, expected.logits[:, mine]])
        assert_same_state(found.cache, expected.cache, F64)
        assert found.cache.length == expected.cache.length
        assert_close([mean(g) for g in given], gradients)
        if not length:  # of segments the slices do not follow one another
            layer, u = model.backbone.layers[0].mixer, expected.logits[..., :32].detach()
            starts = dict(starts=packing[1]["position_ids"] == 0)
            of_layer = (packing[4] if conv_kernel == 4 else starts) if packed else {}
            of_layer = of_layer | dict(mask=mask) if masked else of_layer
            here = {name: t[:, mine] for name, t in of_layer.items()}
            y = layer.step(u[:, mine], group=group, **here)[0]
            assert_close(y, layer(u, **of_layer)[:, mine])


needs_fsdp2 = pytest.mark.skipif(not FSDP2_RUNS, reason="FSDP2 of torch 2.7 fails")


def distribute(model, engine, blocks=8, **options):
    """blocks: how many of them FSDP2 gathers at once."""
    if engine == "DDP":
        return nn.parallel.DistributedDataParallel(model, **options)
    layers = [*model.backbone.layers]
    for i in range(0, len(layers), blocks):
        fully_shard(layers[i : i + blocks], **options)
    return fully_shard(model, **options)


def gathered(tensors):
    """DTensors and tensors, whole and detached."""
    return [t.detach().full_tensor() if isinstance(t, DTensor) else t.detach() for t in tensors]


def train_on(batches, model, optimizer, backward=torch.Tensor.backward, **given):
    """The losses of one step for each batch, averaged over the ranks."""
    losses = []
    for ids in batches:
        loss = model(ids, labels=ids, **given).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss))
    return losses


@on_ranks(2, 4, nccl=True)
def test_ddp_and_fsdp2_train_as_one_process_on_rows_and_on_slices(rank, world):
    b, l, batches = torch.arange(8), torch.arange(24), [tokens(8, 24, seed=i) for i in range(2)]
    mesh = dist.init_device_mesh(DEVICE.type, (world // 2, 2), mesh_dim_names=("rows", "slices"))
    sequence, pairs = dict(group=dist.group.WORLD), dict(group=mesh.get_group("slices"))
    pieces = l.unflatten(0, (-1, world, 2))[:, rank].flatten()  # of segments
    cases = [
        (b.chunk(world)[rank], l, {}),
        (b.chunk(world)[rank], l, dict(segment_length=7)),
        (b, l[cut({2: [17, 24], 4: [5, 5, 23, 24]}[world], rank)], sequence),
        (b, pieces, dict(segment_length=2, **sequence)),
        (b.chunk(world // 2)[rank // 2], l[cut([5, 24], rank % 2)], pairs),
    ]

    def results(engine, tied, batches, blocks=8, **given):
        model = tiny(dtype=torch.float64, tie_word_embeddings=tied).train()
        if "segment_length" in given:
            model.gradient_checkpointing_enable()
        model = distribute(model, engine, blocks) if engine else model
        optimizer = torch.optim.SGD(model.parameters(), lr=1)  # Adam would hide a factor
        losses = train_on(batches, model, optimizer, **given)
        return [*losses, *gathered(model.parameters())]

    expected = [results(None, tied, batches) for tied in (False, True)]
    for i, (rows, positions, given) in enumerate(cases):
        mine = [ids[rows][:, positions] for ids in batches]
        for engine in ("DDP", "FSDP2") if FSDP2_RUNS else ("DDP",):
            found = results(engine, i > 1, mine, blocks=1 + i % 2, **given)
            assert_close(found, expected[i > 1], case=f"{engine}, case {i}")


@needs_fsdp2
@on_ranks(2)
def test_mixed_precision_of_fsdp2_keeps_residual_stream_state_and_gradients_in_float32(rank, world):
    ids = tokens(8, 24)
    model = tiny().train()
    whole = model(ids, labels=ids)
    expected = [*model_gradients(model, whole.loss).values()]
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for dim, given in enumerate(({}, dict(group=dist.group.WORLD))):
        part = ids.chunk(world, dim)[rank]
        model = distribute(tiny().train(), "FSDP2", mp_policy=policy)
        output = model(part, labels=part, output_hidden_states=True, use_cache=True, **given)
        assert all(h.dtype == torch.float32 for h in output.hidden_states[:-1])
        for state in output.cache.states:
            assert (state.conv.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)
        output.loss.backward()
        # Numbers in bfloat16 are off by up to 2^-9 each; the loss is a mean of many, but in the
        # gradient of D, for example, terms cancel.
        assert_close(mean(output.loss), whole.loss, 2**-9)
        for f, e in zip(gathered(p.grad for p in model.parameters()), expected, strict=True):
            assert f.dtype == torch.float32 and relative_error(f, e) < 0.05


@needs_fsdp2
@on_ranks(2)
def test_a_sharded_model_is_saved_resumed_and_loaded_on_one_device(rank, world):
    def start():
        model = distribute(tiny(dtype=torch.float64).train(), "FSDP2")
        return model, adamw(model)

    batches = [tokens(8, 24, seed=seed).chunk(world)[rank] for seed in range(4)]
    train_on(batches[:2], *(started := start()))
    dcp.save(dict(enumerate(state_dict.get_state_dict(*started))), checkpoint_id=FOLDER / "sharded")
    uninterrupted = train_on(batches[2:], *started)
    model, _ = started = start()
    saved = dict(enumerate(state_dict.get_state_dict(*started)))
    dcp.load(saved, checkpoint_id=FOLDER / "sharded")
    state_dict.set_state_dict(*started, model_state_dict=saved[0], optim_state_dict=saved[1])
    assert identical(train_on(batches[2:], *started), uninterrupted)

    options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = state_dict.get_model_state_dict(model, options=options)  # on rank 0
    if rank == 0:
        model.save_pretrained(FOLDER / "whole", state_dict=full)
    dist.barrier()
    alone = load(FOLDER / "whole", dtype=torch.float64)
    assert identical(list(alone.parameters()), gathered(model.parameters()))
    assert alone.lm_head.weight is alone.backbone.embeddings.weight


@on_ranks(2)
def test_trainer_and_accelerate_train_on_ranks_as_in_one_process(rank, world):
    (data, collators), batches = byte_data(), tokens(16, 24).split(4)
    options = dict(max_grad_norm=0.0, max_steps=3, gradient_accumulation_steps=2)
    given = FOLDER, data, collators[0]
    model, of_bytes = tiny(dtype=torch.float64).train(), tiny(vocab_size=384, dtype=torch.float64)
    expected = train(*given, of_bytes, **options), train_on(batches, model, adamw(model))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    of_torchrun = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    with mock.patch.dict(os.environ, of_torchrun, MASTER_ADDR="localhost"):
        options |= dict(per_device_train_batch_size=2, ddp_backend="gloo")
        found = train(*given, tiny(vocab_size=384, dtype=torch.float64), **options)
        assert_close(torch.tensor(found), torch.tensor(expected[0]), 1e-6)
        given = dict(auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False)
        plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, **given)
        accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
        for engine in ("DDP", "FSDP2") if FSDP2_RUNS else ("DDP",):
            if engine == "FSDP2":  # on a CPU accelerate has to be told
                kind = accelerate.utils.DistributedType.FSDP
                accelerator.state.fsdp_plugin, accelerator.state.distributed_type = plugin, kind
                accelerate.PartialState._shared_state["distributed_type"] = kind
            model = tiny(dtype=torch.float64).train()
            loader = torch.utils.data.DataLoader(tokens(16, 24), batch_size=2)
            model, optimizer, loader = accelerator.prepare(model, adamw(model), loader)
            assert_close(train_on(loader, model, optimizer, accelerator.backward), expected[1])
        assert not FSDP2_RUNS or isinstance(model.backbone.layers[0], FSDPModule)


@on_ranks(2, 4, nccl=True)
def test_the_bytes_that_a_layer_sends_are_those_of_the_formula_at_any_length(rank, world):
    model, group, exchange = tiny().train(), dist.group.WORLD, dist.batch_isend_irecv
    config, layers = model.config, model.config.num_hidden_layers
    h, p, g, n = config.num_heads, config.head_dim, config.n_groups, config.state_size
    formula = 4 * 2 * (h * p * n + (config.conv_kernel - 1) * (h * p + 2 * g * n))
    with mock.patch.object(dist, "batch_isend_irecv", wraps=exchange) as watched:
        for forwards, segments, length in ((1, 1, 6), (1, 1, 48), (2, 3, 48), (3, 3, 48)):
            if forwards == 3:
                model.gradient_checkpointing_enable()
            ids = tokens(2, length)
            watched.reset_mock()
            model(ids, labels=ids, segment_length=length // segments, group=group).loss.backward()
            moves = [move for call in watched.mock_calls for move in call.args[0]]
            sent = sum(move.tensor.nbytes for move in moves if move.op is dist.isend)
            passes = forwards * (rank < world - 1) + (rank > 0)
            assert sent == layers * segments * passes * formula


@on_ranks(2, 4, nccl=True)
def test_ranks_that_call_differently_all_get_an_error(rank, world):
    model, ids, group = tiny().train(), tokens(2, 8), dist.group.WORLD
    shallow, checkpointed = tiny(num_hidden_layers=1).train(), tiny().train()
    checkpointed.gradient_checkpointing_enable()
    cache = model(ids, use_cache=True).cache
    layer, u = model.backbone.layers[0].mixer, torch.randn(2, 8, 32)
    step = lambda u=u, **given: layer.step(u, group=group, **given)
    usual = dict(input_ids=ids, labels=ids, group=group)
    call = lambda model=model, **changes: model(**usual | changes)
    for name, odd, *others in (
        ("batch", lambda: call(input_ids=ids[:1], labels=ids[:1])),
        ("arguments", lambda: call(labels=None)),
        ("segments", lambda: call(segment_length=4)),
        ("items", lambda: call(num_items_in_batch=3)),
        ("arguments", lambda: call(seq_idx=ids)),
        ("states", lambda: call(cache=cache)),
        ("dtype", lambda: call(input_ids=None, inputs_embeds=torch.randn(2, 8, 32))),
        ("num_hidden_layers", lambda: call(shallow)),
        ("checkpoints", lambda: call(checkpointed)),
        ("gradients", torch.no_grad()(call)),
        ("autocast", torch.autocast(DEVICE.type, torch.bfloat16)(call)),
        ("cache", lambda: call(use_cache=True)),
        ("training", lambda: call(tiny())),
        ("items", step),  # one rank in a layer, others in a model
        ("arguments", lambda: step(seq_idx=ids), step),  # all of them in a layer
        ("batch", lambda: step(u[:1]), step),
        ("gradients", torch.no_grad()(step), step),
        ("autocast", torch.autocast(DEVICE.type, torch.bfloat16)(step), step),
    ):
        with pytest.raises(ValueError, match=f"{name} = .*: one per rank, make them"):
            (odd if rank == world - 1 else [call, *others][-1])()
    call()  # nobody is out of step
    step()


@on_ranks(2)
def test_groups_without_this_rank_and_uses_that_are_not_supported_are_refused(rank, world):
    model, ids = tiny(), tokens(1, 8)
    other, step = dist.new_group([1]), model.backbone.layers[0].mixer.step
    for group in ("world", *[other] * (rank == 0)):
        for call in (functools.partial(model, ids), functools.partial(step, torch.randn(1, 2, 32))):
            with pytest.raises(ValueError, match="must be a process group that this rank belongs"):
                call(group=group)
    with pytest.raises(ValueError, match="segment_length = 'auto': must be an integer"):
        model(ids, labels=ids, segment_length="auto", group=dist.group.WORLD)
    cache = model(ids.chunk(2, dim=1)[rank], group=dist.group.WORLD).cache
    whole = torch.cat([ids, ids], dim=1)
    expected = model.generate(whole, **GREEDY)
    assert torch.equal(model.generate(whole, cache=cache, **GREEDY), expected)


# ---- The kernels ---------------------------------------------------------------------------------
# They run on CUDA, or as Python in Triton's interpreter, and are skipped by their name elsewhere:
# where there is no GPU, `test_the_kernels_pass_in_the_interpreter` runs these tests again with
# TRITON_INTERPRET=1. The reference is the twin in mamba2.py, in float64 on the CPU, which no kernel
# takes; the twin is compared with the paper above.

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HALF = torch.bfloat16 if CUDA else torch.float16  # the interpreter's bfloat16 is not CUDA's
KERNEL_DTYPES = [torch.float32, torch.float16, torch.bfloat16] if CUDA else [torch.float32, HALF]
PASSED_IN_THE_INTERPRETER = {  # how many, by settings and names
    ("", "test_kernel"): 120,
    ("portable", "test_kernel_is_its_twin and ssd"): 20,
}

TRITON = getattr(mamba2.kernels, "TRITON", False)
RUNS = TRITON and (CUDA or INTERPRETED)
HAS_INTERPRETER = TRITON and not (CUDA or INTERPRETED)
needs_cuda = pytest.mark.skipif(not (RUNS and CUDA), reason="needs CUDA and Triton")


def pairs(cases, variants):
    """All pairs on CUDA; in the interpreter, which is slow, each case takes the next variant."""
    chosen = itertools.product(cases, variants) if CUDA else zip(cases, itertools.cycle(variants))
    return list(chosen)


def in_each_dtype(cases):
    return pytest.mark.parametrize("case, dtype", pairs(cases, KERNEL_DTYPES), ids=str)


def without_kernels(form, *args, **options):
    with mock.patch.object(mamba2, "kernels", None):
        return form(*args, **options)


@contextlib.contextmanager
def poisoned():
    """Memory allocated in here holds NaN, so that what a kernel does not write is noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(5, device=DEVICE).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run_with_gradients(operation, inputs, cotangents):
    """Outputs by number and gradients by name, from the cotangents that are not None."""
    leaves = tree_map_only(torch.Tensor, torch.Tensor.detach, inputs)
    floats = {k: t for k, t in leaves.items() if torch.is_tensor(t) and t.is_floating_point()}
    for leaf in floats.values():
        leaf.requires_grad_()
    outputs = tensors(operation(**leaves))
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    wanted = [(o, c.to(o)) for o, c in zip(outputs, cotangents, strict=True) if c is not None]
    if wanted:
        given = [*zip(*wanted, strict=True)]
        found = torch.autograd.grad(given[0], [*floats.values()], given[1], materialize_grads=True)
        results |= {f"d {k}": g for k, g in zip(floats, found, strict=True)}
    return results


def relative_error(found, exact):
    found, exact = found.double().cpu(), exact.double().cpu()
    assert found.shape == exact.shape
    return ((found - exact).norm() / exact.norm().clamp(min=1e-30)).item()


P, N = (64, 128) if CUDA else (16, 16)  # headdim and d_state
randn = lambda *shape: torch.randn(*shape, device=DEVICE)
rand = lambda *shape: torch.rand(*shape, device=DEVICE)


def kernel_ssd_inputs(dtype, l, b=2, h=3, p=P, n=N, g=1, features=""):
    """Arguments of SSD as in a layer: x, B, C in dtype, all else in float32.
    l: a number, or (m, a) for m Q + a, where Q is the kernels' own chunk: 64 in bfloat16, else 32.
    features: state, seq: there is an initial state, there are sequences; sliced, odd: x, B and C
    are slices of one tensor, odd: whose rows begin at odd addresses; extreme, zero, growing:
    of steps; low: all is in dtype; mixed: B alone is not; no_D; wide_D: (h, p).
    """
    if isinstance(l, tuple):
        l = l[0] * (64 if dtype == torch.bfloat16 and n != 256 else 32) + l[1]
    widths = [int("odd" in features), h * p, g * n, g * n]
    _, x, B, C = randn(b, l, sum(widths)).to(dtype).split(widths, -1)
    x, B, C = x.unflatten(2, (h, p)), B.unflatten(2, (g, n)), C.unflatten(2, (g, n))
    if "sliced" not in features and "odd" not in features:
        x, B, C = x.contiguous(), B.contiguous(), C.contiguous()
    dt, A = 10 ** (2 * rand(b, l, h) - 3), -1 - 15 * rand(h)
    if "extreme" in features:
        dt, A = 10 ** (11 * rand(b, l, h) - 8), -(10 ** (6 * rand(h) - 3))
        if dtype == torch.float16:  # results of 1e5 would be infinite
            x, B = x / 8, B / 8
    elif "zero" in features:  # as at masked positions
        dt = dt * (rand(b, l, 1) < 0.5)
    elif "growing" in features:  # the first head's state, by some 4 % per step; others decay
        dt, A = 0.05 + dt / 2, torch.where(torch.arange(h, device=DEVICE) == 0, 0.7, A)
    D = None if "no_D" in features else randn(h, *[p] * ("wide_D" in features))
    B = B.to(HALF) if "mixed" in features else B
    state = randn(b, h, p, n) if "state" in features else None
    if "low" in features:
        dt, A, D, state = (t.to(dtype) for t in (dt, A, D, state))
    ids = (rand(b, l) < max(1.5 / max(l, 1), 0.03)).cumsum(1) % 3
    seq_idx = ids.short() if "seq" in features else None
    return dict(x=x, dt=dt, A=A, B=B, C=C, D=D, initial_state=state, seq_idx=seq_idx)


def kernel_conv_inputs(dtype, b, l, d, width=0, start=0, k=4, features=""):
    """Arguments of the convolution; its channels begin at `start` of a tensor of that width."""
    state = randn(b, k - 1, d).to(torch.float32 if "other" in features else dtype)
    # Sequences of one to five positions, or of some twenty.
    ids = (rand(b, l) < (0.4 if k == 3 or l < 5 else 0.05)).cumsum(1) % 3
    return dict(
        x=randn(b, l, width or d).to(dtype)[..., start : start + d],
        weight=(randn(d, k) / 2).to(dtype if k == 3 else torch.float32),
        bias=randn(d) if "bias" in features else None,
        initial_state=state if "state" in features else None,
        seq_idx=ids.to(torch.int32 if k == 4 else torch.int64) if "seq" in features else None,
    )


def kernel_norm_inputs(dtype, rows, d, width=0, groups=1, features="gate"):
    """features: gate; high: x is in float32. The gate, or else x, is a slice of a wider tensor."""
    wide = randn(1, rows, width or d)[..., :d]
    x, gate = (randn(1, rows, d), wide.to(dtype)) if "gate" in features else (wide, None)
    weight = randn(d).to(dtype if rows % 2 else torch.float32)
    x = x if "high" in features else x.to(dtype)
    return dict(x=x, weight=weight, gate=gate, eps=1e-5, groups=groups)


def kernel_middle_inputs(dtype, l, b=2, h=3, p=P, n=N, g=1, k=4, features=""):
    """Arguments of a layer's middle: the projection, the state, and parameters as in a layer.
    features: state, seq, limit, no_bias; other: the state has other dtypes; tiny: steps are of 1e-7
    to 3e-4, and the state is empty."""
    d, dt_bias = h * p + 2 * g * n, randn(h) - 3
    zxbcdt, conv, ssm = randn(b, l, h * p + d + h), randn(b, k - 1, d).to(dtype), randn(b, h, p, n)
    if "other" in features:
        conv, ssm = conv.float(), ssm.to(HALF)
    if "tiny" in features:
        zxbcdt[..., -h:] = -8 - 8 * rand(b, l, h) - dt_bias
        ssm = torch.zeros_like(ssm)
    elif l == 1:
        zxbcdt[..., -h:] *= 8  # steps from 1e-12 to 30
    return dict(
        zxbcdt=zxbcdt.to(dtype),
        conv=conv if "state" in features else None,
        ssm=ssm if "state" in features else None,
        seq_idx=(rand(b, l) < 0.05).cumsum(1) % 3 if "seq" in features else None,
        weight=randn(d, 1, k) / 2,
        bias=None if "no_bias" in features else randn(d).to(dtype),
        dt_bias=dt_bias,
        A_log=rand(h) * 2,
        D=randn(h).to(dtype),
        norm_weight=randn(h * p).to(dtype),
        groups=g,
        eps=1e-5,
        dt_limit=(0.02, 0.2) if "limit" in features else (0.0, math.inf),
    )


def kernel_norm_linear_inputs(dtype, rows, d, outputs, groups=1, features=""):
    return dict(
        x=randn(rows, 1, d).to(dtype),
        norm_weight=randn(d).to(dtype),
        weight=randn(outputs, d).to(dtype),
        bias=randn(outputs).to(dtype) if "bias" in features else None,
        gate=randn(rows, 1, d + 16).to(dtype)[..., 8:-8] if "gate" in features else None,
        residual=randn(rows, 1, outputs).to(dtype).float() if "residual" in features else None,
        eps=1e-5,
        groups=groups,
    )


def layer_middle(
    zxbcdt, conv, ssm, seq_idx, weight, bias, dt_bias, A_log, D, norm_weight, groups, eps, dt_limit
):
    """The twin of a layer's middle, from the twins of its parts."""
    h, hp, gn = len(D), len(norm_weight), (len(weight) - len(norm_weight)) // 2
    z, xBC, dt = zxbcdt.split([hp, len(weight), h], -1)
    start = dict(initial_state=conv, seq_idx=seq_idx)
    xBC, conv = mamba2.causal_conv1d(xBC, weight.squeeze(1), bias, **start)
    x, B, C = xBC.split([hp, gn, gn], -1)
    x, B, C = (t.unflatten(2, (n, -1)) for t, n in ((x, h), (B, groups), (C, groups)))
    dt = F.softplus(dt + dt_bias).clamp(*dt_limit)
    y, new = mamba2.ssd(x, dt, -A_log.exp(), B, C, D, initial_state=ssm, seq_idx=seq_idx)
    y = mamba2.rms_norm(y.flatten(2), norm_weight, eps, gate=z, groups=groups)
    return y, conv, new if ssm is None else new.to(ssm.dtype)


def norm_linear(x, norm_weight, eps, weight, bias=None, *, gate=None, groups=1, residual=None):
    y = F.linear(mamba2.rms_norm(x, norm_weight, eps, gate=gate, groups=groups), weight, bias)
    return y if residual is None else y + residual


KERNELS = {  # how inputs are drawn, and the twin
    "ssd": (kernel_ssd_inputs, ssd),
    "causal_conv1d": (kernel_conv_inputs, mamba2.causal_conv1d),
    "rms_norm": (kernel_norm_inputs, mamba2.rms_norm),
    "layer_middle": (kernel_middle_inputs, layer_middle),
    "norm_linear": (kernel_norm_linear_inputs, norm_linear),
}


def kernel_inputs(operation, dtype, **options):
    """Arguments by name, and whether they may have gradients."""
    inputs = KERNELS[operation][0](dtype, **options)
    token = operation == "layer_middle" and options["l"] == 1
    return inputs, operation != "norm_linear" and not token


# Of SSD in bfloat16 and float16, products have operands of 8 and 11 bits; in float32 they are sums
# of some 100 terms of 24 bits. The middle has more roundings on the way, of float16 also below its
# normal range; where it is a step of one position, there are two roundings before the norm.
KERNEL_TOLERANCE = {
    "ssd": {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2},
    "layer_middle": {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2},
    "step": {torch.float32: 8e-6, torch.float16: 2.4e-3, torch.bfloat16: 1.6e-2},
}
# One rounding to the result's dtype, after arithmetic in float32; for weights, sums of 10^4 terms.
KERNEL_SMALL = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}


def assert_kernel_right(operation, inputs, graded=True, only=None, tolerance=None):
    """Values and gradients of a kernel are those of its twin; `only`: of one output's cotangent."""
    twin, kernel = KERNELS[operation][1], getattr(mamba2.kernels, operation)
    dtype, step = next(iter(inputs.values())).dtype, operation == "layer_middle" and not graded
    widened = lambda t: t.cpu().double() if t.is_floating_point() else t.cpu()
    exact_inputs = tree_map_only(torch.Tensor, widened, inputs)
    before = tree_map_only(torch.Tensor, torch.clone, inputs)
    with torch.no_grad():
        cotangents = tensors(twin(**exact_inputs))
    for i, output in enumerate(cotangents):
        cotangents[i] = torch.randn_like(output).to(HALF) if only in (None, i) and graded else None
    with torch.set_grad_enabled(graded):
        exact = run_with_gradients(twin, exact_inputs, cotangents)
        rounded = without_kernels(run_with_gradients, twin, inputs, cotangents)
        with poisoned():
            found = run_with_gradients(kernel, inputs, cotangents)
    assert identical(inputs, before), "an input was modified"
    assert found.keys() == exact.keys()
    for key in exact:
        assert found[key].dtype == rounded[key].dtype, key
        limit = KERNEL_SMALL[found[key].dtype]
        if operation in KERNEL_TOLERANCE:
            limit = max(limit, KERNEL_TOLERANCE["step" if step else operation][dtype])
        if operation == "causal_conv1d" and key == "d initial_state":  # rounded like the state
            limit = KERNEL_SMALL[dtype]
        if operation == "ssd" and key == "d A":  # a sum over all positions of terms that cancel
            limit *= 3
        if operation == "layer_middle" and key in ("d A_log", "d D", "d dt_bias"):
            # So are these; three times what rounding the terms costs the twin is allowed.
            limit += 3 * relative_error(rounded[key], exact[key])
        if step and key == "output 1" and inputs["conv"].dtype == dtype:  # inputs, copied
            limit = 0
        error = relative_error(found[key], exact[key])
        assert error <= (tolerance or limit), f"{key}: {error:.1e}"  # also if it is NaN
    if step:
        again = kernel(**inputs, in_place=True)
        assert again[2] is inputs["ssm"] and identical(list(again), list(found.values()))
        assert torch.equal(inputs["conv"], before["conv"])


KERNEL_CASES = {operation: {} for operation in KERNELS}
KERNEL_CASES["ssd"] = {
    "one position": dict(l=(0, 1), features="state"),
    "Q - 1": dict(l=(1, -1), features="state"),
    "Q": dict(l=(1, 0)),
    "Q + 1": dict(l=(1, 1), features="state"),
    "3 Q + 7, sequences": dict(l=(3, 7), h=2, features="state seq"),
    "groups, slices of one tensor": dict(l=(2, 7), h=4, g=2, features="state sliced"),
    "slices at odd addresses, from zero": dict(l=(2, 9), features="seq odd"),
    "all in the dtype of x": dict(l=(1, 9), features="state low"),
    "a group for each head, no D": dict(l=(1, 9), g=3, features="no_D"),
    "extreme steps and decays": dict(l=(3, 7), features="state extreme"),
    "steps of 0": dict(l=(2, 7), features="state zero"),
    "a state that grows": dict(l=(2, 7), features="state seq growing"),
    "gradient of y alone": dict(l=(1, 5), only=0, features="seq"),
    "gradient of the final state alone": dict(l=(1, 5), only=1, features="state"),
    "segments": dict(l=(9, 5) if CUDA else (5, 5), h=2, segments=3, features="state seq"),
    "several heads a program": dict(l=(1, 3), h=6, g=2, split=(1, 3), features="state seq"),
    "uneven shares of heads": dict(l=(1, 3), h=5, split=(2, 3)),
    "several heads, several tiles each": dict(l=(1, 3), b=1, p=128, split=(1, 3)),
}
KERNEL_CONV = {
    "one position": dict(b=2, l=1, d=37, features="bias state"),
    "two positions, gradient of y": dict(b=2, l=2, d=300, only=0, features="seq state"),
    "two positions, gradient of the state": dict(b=2, l=2, d=36, only=1, features="state other"),
    "three positions": dict(b=2, l=3, d=300, width=331, start=5, features="bias"),
    "64 positions": dict(b=1, l=64, d=37, features="seq"),
    "65 positions": dict(b=2, l=65, d=16, width=600, start=96, features="bias state seq"),
    "200 positions": dict(b=1, l=200, d=24, width=48, start=8, features="bias seq"),
}
# Rows, channels, and the width of the tensor of which the gate, or x, is a slice.
KERNEL_NORM = [(3, 64), (1, 100), (7, 96, 200), (5, 600, 616), (9, 1000, 1001)]
KERNEL_CASES["layer_middle"] = {
    "two positions": dict(l=2, features="state other"),
    "63 positions, groups": dict(l=63, b=1, h=4, g=2, features="seq"),
    "64 positions, two taps, no bias": dict(l=64, b=1, k=2, features="state limit no_bias"),
    "70 positions, groups": dict(l=70, b=1, h=4, g=2, k=3, features="state seq"),
    "gradient of the output alone": dict(l=40, h=2, only=0, features="state"),
    "gradient of the convolution's state alone": dict(l=5, only=1, features="state seq other"),
    "gradient of the state alone": dict(l=40, h=2, only=2, features="state"),
    "a step": dict(l=1, b=3, features="state"),
    "a step, groups, a limit": dict(l=1, h=4, g=2, k=3, features="state limit"),
    "a step, a group for each head": dict(l=1, b=1, p=16, g=3, k=2, features="state other no_bias"),
    "a step, odd sizes, one tap": dict(l=1, p=24, n=20, k=1, features="state other"),
    "a step, tiny": dict(l=1, features="state tiny"),
}
KERNEL_CASES["norm_linear"] = {
    "one row, an odd width": dict(rows=1, d=700, outputs=33),
    "all else": dict(rows=2, d=96, outputs=70, groups=2, features="gate bias residual"),
    "wide groups": dict(rows=2, d=1536, outputs=20, groups=4, features="gate bias"),
}
KERNEL_SIZES = [(32, 128)]  # of headdim and d_state
if CUDA:
    KERNEL_SIZES += [(16, 16), (32, 256), (128, 64), (64, 256), (256, 32), (128, 256)]
    KERNEL_CASES["ssd"] |= {  # with so many programs several heads each are chosen unforced
        "a full GPU": dict(l=(4, 3), b=40, h=5, features="state sliced"),
        "a full GPU, groups": dict(l=(4, 3), b=24, h=6, g=2, features="seq"),
    }
    KERNEL_CONV |= {
        "130m": dict(b=2, l=1000, d=1792, width=3352, start=1536, features="bias state seq"),
        "2.7b": dict(b=1, l=333, d=5376, width=10576, start=5120, features="bias"),
    }
    KERNEL_NORM += [(1, 1536, 3352), (4096, 1536, 3352), (1000, 5120, 10576), (33, 8192, 18560)]
    KERNEL_NORM += [(65, 1000, 1001), (63, 1032), (130, 768), (9, 2560)]
    KERNEL_CASES["layer_middle"] |= {
        "130m": dict(l=2048, h=24, features="seq"),
        "codestral": dict(l=500, h=16, g=8, features="state"),
        "a step, 130m": dict(l=1, b=1, h=24, features="state"),
        "a step, 2.7b": dict(l=1, b=64, h=80, features="state other"),  # a full GPU
        "a step, codestral": dict(l=1, b=8, h=128, g=8, features="state"),
        "a step, d_state 256": dict(l=1, b=40, h=8, p=128, n=256, g=2, features="state"),
    }
    KERNEL_CASES["norm_linear"] |= {
        "2.7b, in": dict(rows=2, d=2560, outputs=10576),
        "2.7b, out": dict(rows=1, d=5120, outputs=2560, features="gate residual"),
        "codestral, out": dict(rows=2, d=8192, outputs=4096, groups=8, features="gate residual"),
    }
for p, n in KERNEL_SIZES:
    sizes = dict(b=1, p=p, n=n)
    KERNEL_CASES["ssd"] |= {
        f"headdim {p}, d_state {n}": dict(l=(2, 3), h=2, features="state seq", **sizes),
        f"headdim {p}, d_state {n}, from zero": dict(l=(3, 3), h=8 if CUDA else 2, **sizes),
    }
KERNEL_CASES["causal_conv1d"] = {
    f"{case}, {k} taps": dict(KERNEL_CONV[case], k=k) for case, k in pairs(KERNEL_CONV, (2, 3, 4))
}
NORM_FEATURES = "gate", "gate high", "alone", "alone high"
for groups, features, (rows, d, *width) in itertools.product((1, 2), NORM_FEATURES, KERNEL_NORM):
    sizes = dict(rows=rows, d=d, width=sum(width), groups=groups, features=features)
    KERNEL_CASES["rms_norm"][f"{(rows, d, *width)}, {groups} groups, {features}"] = sizes


@in_each_dtype([f"{name}: {case}" for name, cases in KERNEL_CASES.items() for case in cases])
def test_kernel_is_its_twin_in_values_gradients_and_steps_in_place(case, dtype, monkeypatch):
    operation, case = case.split(": ")
    if operation == "ssd" and "d_state 256" in case and dtype != torch.bfloat16:
        pytest.skip("there are no settings for a d_state of 256 in 4 bytes")
    options = dict(KERNEL_CASES[operation][case])
    for name in options.keys() & {"segments", "split"}:
        forced = options.pop(name)
        monkeypatch.setattr(mamba2.kernels, "_plans", {})
        monkeypatch.setattr(mamba2.kernels, f"_{name}", lambda *sizes, forced=forced: forced)
    only = options.pop("only", None)
    assert_kernel_right(operation, *kernel_inputs(operation, dtype, **options), only)


def test_kernel_ssd_is_right_where_a_state_grows_by_two_to_the_110_in_a_chunk():
    inputs = kernel_ssd_inputs(torch.float32, 31, h=2, features="state")
    inputs |= dict(dt=torch.full_like(inputs["dt"], 2.5), A=torch.tensor([1.0, -1], device=DEVICE))
    # Exponents of 110, of 24 bits, are right to 2^-17, and so are powers of 2 to 2^-17.5.
    assert_kernel_right("ssd", inputs, tolerance=3e-5)


def test_kernel_tells_tensors_apart_that_differ_in_layout_alone():
    """Plans are kept, but not for other strides or addresses."""
    wide = torch.randn(2, 9, 100, device=DEVICE)
    layouts = wide[..., 4:68].contiguous(), wide[..., 4:68], wide[..., 5:69], wide[:, :, 3:67]
    for x in (*layouts, wide[..., 4:68].mT.contiguous().mT):
        weight = torch.randn(64, 4, device=DEVICE)
        assert_kernel_right("causal_conv1d", dict(x=x, weight=weight), graded=False)
        given = dict(x=x, weight=weight[:, 0], eps=1e-5, gate=x)
        assert_kernel_right("rms_norm", given, graded=False)
        inputs = kernel_ssd_inputs(torch.float32, 9, b=2, h=2, p=32, n=16)
        for dt in (inputs["dt"], inputs["dt"].mT.contiguous().mT):
            inputs |= dict(x=x.unflatten(2, (2, 32)), dt=dt)
            assert_kernel_right("ssd", inputs, graded=False)


KERNEL_REPEATED = [
    *(["ssd: groups, slices of one tensor"] if CUDA else []),
    "ssd: slices at odd addresses, from zero",
    *("causal_conv1d: 64 positions, 3 taps", "layer_middle: 70 positions, groups"),
    *(f"rms_norm: (7, 96, 200), 1 groups, {features}" for features in ("gate", "alone")),
]


@in_each_dtype(KERNEL_REPEATED)
def test_kernel_has_the_same_bits_again_and_with_gradients_of_any_kind(case, dtype):
    operation, case = case.split(": ")
    inputs, _ = kernel_inputs(operation, dtype, **KERNEL_CASES[operation][case])
    kernel = getattr(mamba2.kernels, operation)
    with torch.no_grad():
        alone, again = kernel(**inputs), kernel(**inputs)
    assert identical(again, alone)
    cotangents = [torch.randn_like(t) for t in tensors(alone)]
    want = tensors(run_with_gradients(kernel, inputs, cotangents))
    assert identical(run_with_gradients(kernel, inputs, cotangents), want)

    negated = [torch.complex(c.float(), -c.float()).conj().imag for c in cotangents]
    assert all(gradient.is_neg() for gradient in negated)
    assert identical(run_with_gradients(kernel, inputs, negated), want)
    with Bytes() as watched:  # a mode sees one operation, and no launches that it could not follow
        assert identical(run_with_gradients(kernel, inputs, negated), want)
    assert watched.largest > 0
    # Hooks of saved tensors may return the same values in another layout, which is copied.
    lay_out = lambda t: t.mT.contiguous().mT if t.dim() == 3 else t
    with torch.autograd.graph.saved_tensors_hooks(lay_out, lay_out):
        found = run_with_gradients(kernel, inputs, [TwoTensor(c, c) for c in cotangents])
    limit = KERNEL_TOLERANCE.get(operation, KERNEL_SMALL)[dtype]
    for result, expected in zip(found.values(), want, strict=True):
        assert relative_error(getattr(result, "a", result), expected) <= limit


# NaN as GPUs make it: all bits but the sign. Rounding it must not carry into the sign.
NAN = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
KERNEL_NAN = [
    *(f"ssd: {name}" for name in ("dt", "negative dt", "A", "x", "B", "C", "D", "initial_state")),
    *(f"layer_middle: {name}" for name in ("dt_bias", "A_log", "D", "norm_weight", "dt", "ssm")),
]


@in_each_dtype(KERNEL_NAN)
def test_kernel_is_nan_where_its_twin_is_and_nowhere_else(case, dtype):
    """NaN is due where the recurrence has it; SSD's twin, in chunks, spreads it further. A dt below
    0 counts as NaN. Heads of a layer are groups, so that its norm does not spread NaN."""
    operation, cause = case.split(": ")
    kernel, twin = getattr(mamba2.kernels, operation), KERNELS[operation][1]
    exact = mamba2.ssd_recurrent if operation == "ssd" else twin
    name = "zxbcdt" if case == "layer_middle: dt" else cause.split(" ")[-1]
    at = {"zxbcdt": (0, 0, -1), "dt": (0, 9, 0)}.get(name, (0, 9 * (name in "xBC"), 0, 0))
    for l in (150 if CUDA else 40,) if operation == "ssd" else (1, 70 if CUDA else 9):
        sizes = dict(b=1, h=2, g=2, p=16, n=16, features="state limit")
        inputs, graded = kernel_inputs(operation, dtype, l=l, **sizes)
        inputs[name] = inputs[name].clone()
        at = at[: inputs[name].dim()]
        inputs[name][at] = NAN
        with torch.no_grad():
            outputs = without_kernels(exact, **inputs)
        assert 0 < outputs[0].isnan().sum() < outputs[0].numel()
        cotangents = [torch.randn_like(o) if graded else None for o in outputs]
        with torch.set_grad_enabled(graded):
            due = without_kernels(run_with_gradients, exact, inputs, cotangents)
            if cause == "negative dt":
                inputs["dt"][at] = -0.05
            found = run_with_gradients(kernel, inputs, cotangents)
        for key in due:
            assert not (due[key].isnan() & ~found[key].isnan()).any(), f"{key} lacks NaN"
        for seq_idx in (None, (torch.arange(l, device=DEVICE) >= l // 2)[None].long()):
            inputs["seq_idx"] = seq_idx
            with torch.no_grad():
                found = kernel(**inputs)
                inputs[name][at] = NAN
                allowed = without_kernels(twin, **inputs)
            for i, (f, a) in enumerate(zip(found, allowed, strict=True)):
                assert not (f.isnan() & ~a.isnan()).any(), f"output {i} has more NaN"


# Sizes that do not fit together, although each tensor could be right.
KERNEL_SILENT = {
    "ssd: 3 Q + 7, sequences": [dict(l=0), dict(b=0), dict(n=0), dict(g=3)],
    "causal_conv1d: 65 positions, 4 taps": [dict(l=0)],
    "rms_norm: (3, 64), 1 groups, gate": [dict(rows=0), dict(groups=0), dict(groups=3)],
    "layer_middle: 70 positions, groups": [dict(b=0), dict(l=1, features="seq"), dict(k=5)],
    "layer_middle: a step": [],
    "norm_linear: all else": [dict(rows=0), dict(rows=3)],
}
# Calls that a kernel could be expected to take: a user is told of them, because they cost time.
KERNEL_LOUD = {
    "ssd": {
        "headdim is 12": dict(p=12),
        "d_state is 10": dict(n=10),
        "one dtype": dict(features="mixed"),
        "D is .h, p.": dict(features="wide_D"),
    },
    "causal_conv1d": {"5 taps": dict(k=5)},
    "rms_norm": {"8200 channels": dict(d=8200)},
}


@pytest.mark.filterwarnings("error", "ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("case", KERNEL_SILENT)
def test_kernel_leaves_other_tensors_to_its_twin_silently_or_warns_once(case, monkeypatch):
    operation, name = case.split(": ")
    kernel, twin = getattr(mamba2.kernels, operation), KERNELS[operation][1]
    draw = functools.partial(kernel_inputs, operation, torch.float32)
    draw = functools.partial(draw, **KERNEL_CASES[operation][name])
    given, graded = draw()
    assert kernel(**given) is not None
    changes = [tree_map_only(torch.Tensor, lambda t: t.to("meta"), given)]
    changes += [draw(**sizes)[0] for sizes in KERNEL_SILENT[case]]
    for argument, tensor in given.items():
        if not torch.is_tensor(tensor):
            continue
        others = [tensor[None], tensor[..., 1:], tensor[:0], tensor.repeat_interleave(2, -1)]
        if operation != "layer_middle":  # whose arguments are a layer's
            others += [1.0, tensor.flatten()[0]]
        if tensor.is_floating_point():
            others += [tensor.double(), tensor.int(), TwoTensor(tensor, tensor)]
            others.append(torch.complex(tensor, -tensor).conj().imag)  # negated when it is read
            others += [tensor.bfloat16()] if INTERPRETED else []  # which it gets wrong
            if not graded and name + argument != "a stepnorm_weight":  # the norm has gradients
                others.append(tensor.clone().requires_grad_())
        else:
            others.append(tensor.float())
        changes += [{argument: other} for other in others]
    for i, change in enumerate(changes):
        assert kernel(**given | change) is None, f"change {i}: {change}"
    for message, sizes in KERNEL_LOUD.get(operation, {}).items():
        changed, _ = draw(**sizes)
        monkeypatch.setattr(mamba2.kernels, "_said", set())
        with pytest.warns(match=f"plain PyTorch runs .*{message}"):
            found = twin(**changed)
        assert identical(found, twin(**changed))  # it says so once
        assert kernel(**changed) is None
        assert identical(found, without_kernels(twin, **changed))


def kernel_layer(dtype, **options):
    """A layer whose sizes the kernels take, and the same in float64, which they do not take."""
    torch.manual_seed(1)
    sizes = dict(d_model=256, d_state=128, headdim=64) if CUDA else {}
    sizes = dict(d_model=16, d_state=16, headdim=16, ngroups=2) | sizes | options
    layer = Mamba2(**sizes).to(DEVICE, dtype)
    return layer, copy.deepcopy(layer).double()


@contextlib.contextmanager
def counted():
    """The names of the operations that the kernels run in here; "refused" if they do not."""
    ran = []

    def count(name, operation, *args, **options):
        result = operation(*args, **options)
        ran.append(name if result is not None else "refused")
        return result

    operations = {name: getattr(mamba2.kernels, name) for name in [*KERNELS, "layer_step"]}
    counting = {name: functools.partial(count, name, o) for name, o in operations.items()}
    with mock.patch.multiple(mamba2.kernels, **counting):
        yield ran


def layer_with_gradients(layer, step, u, mask=None, seq_idx=None, cuts=()):
    given = dict(u=u.detach().requires_grad_(), state=None, mask=mask, seq_idx=seq_idx)
    y, state = in_pieces(step, given, "state", cuts)
    loss = sum(part.double().sum() for part in (y.double().square(), *state))
    return [y, *state, *torch.autograd.grad(loss, [given["u"], *layer.parameters()])]


@in_each_dtype(["alone", "with a hook", "with a mask", "in autocast"])
def test_kernel_layer_is_the_layer_in_float64_whole_in_pieces_and_in_autocast(case, dtype):
    layer, exact = kernel_layer(torch.float32 if case == "in autocast" else dtype)
    if case == "with a hook":  # its module is called, so convolution, SSD and norm stay apart
        layer.norm.register_forward_hook(lambda module, args, y: y)
    b, l = (2, 300) if CUDA else (1, 36)
    u = torch.randn(b, l, layer.config.d_model, device=DEVICE).to(layer.D.dtype)
    mask = torch.rand(b, l, device=DEVICE) < 0.7 if case == "with a mask" else None
    seq_idx = (torch.arange(l, device=DEVICE) >= 2 * l // 3).int().expand(b, l)
    sequences = mask, seq_idx
    step = torch.autocast(DEVICE.type, dtype, case == "in autocast")(layer.step)
    want = layer_with_gradients(exact, exact.step, u.double(), *sequences)
    plain = without_kernels(layer_with_gradients, layer, step, u, *sequences)
    for cuts in ([], [l // 3, l // 3 + 1, l - 1]):
        with counted() as ran, poisoned():
            found = layer_with_gradients(layer, step, u, *sequences, cuts)
        apart = ["causal_conv1d", "ssd", "rms_norm"]
        pieces = [b - a for a, b in itertools.pairwise([0, *cuts, l])]
        fused = case in ("alone", "in autocast")
        want_ran = [["layer_middle"] if n > 1 and fused else apart for n in pieces]
        assert [name for name in ran if name != "refused"] == sum(want_ran, [])
        assert found[0].dtype == dtype
        for i, (f, p, w) in enumerate(zip(found, plain, want, strict=True)):
            assert f.dtype == p.dtype
            limit = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
            assert relative_error(f, w) <= 3 * relative_error(p, w) + limit, f"{cuts} [{i}]"
    step = functools.partial(torch.utils.checkpoint.checkpoint, step, use_reentrant=False)
    assert identical(layer_with_gradients(layer, step, u, *sequences, cuts), found)


def test_kernels_are_not_compiled_anew_for_other_lengths_and_rows(monkeypatch):
    """Whether a number is 1 or a multiple of 16, which Triton makes part of a kernel, stays."""
    layer, _ = kernel_layer(torch.float32)
    norm = mamba2.RMSNorm(layer.config.d_model, 1e-5).to(DEVICE)
    varying = {*mamba2.kernels.VARYING, "NSPLIT", "HPS"}  # shares of a group's heads: few numbers

    def recording(plan, **tensors):  # which launches nothing
        for kernel, _, given, options in plan.calls:
            numbers = kernel.arg_names[len(mamba2.kernels._tensors(kernel)) :]
            named = [(k, given[k]) for k in numbers if k not in varying]
            constants = kernel.fn.__annotations__
            kinds = [(k, v) if k in constants else (k, v == 1, v % 16 == 0) for k, v in named]
            compiled[-1].add((kernel.fn, *options.values(), *kinds))

    compiled = []
    monkeypatch.setattr(mamba2.kernels._Plan, "__call__", recording)
    for b, l in ((1, 2), (1, 16), (2, 17), (3, 48), (16, 3), (1, 70)):
        compiled.append(set())
        u = torch.randn(b, l, layer.config.d_model, device=DEVICE, requires_grad=True)
        layer(norm(u)).sum().backward()
    assert len(compiled[0]) >= 10
    for others in compiled[1:]:
        assert others == compiled[0], others ^ compiled[0]


def test_kernel_layer_and_block_call_adapters_hooks_and_other_forwards():
    config, called = kernel_layer(torch.float32)[0].config, []
    block = mamba2.Mamba2Block(config).to(DEVICE)
    u = torch.randn(1, 3, config.d_model, device=DEVICE)
    want, state = block(u)
    state = Mamba2State(*(t.detach() for t in state))

    class Adapter(nn.ModuleList):  # of one module
        def forward(self, *args, **options):
            called.append(self)
            return self[0](*args, **options)

    def run(block):
        """Which kernels run in a forward, its backward, and a token."""
        called.clear()
        with counted() as ran:
            y, _ = block(u)
            y.sum().backward()
            with torch.no_grad():
                block(u[:, :1], state)
        assert relative_error(y, want) <= 1e-5
        return ran

    assert run(block) == ["rms_norm", "layer_middle", "norm_linear", "layer_step", "norm_linear"]
    for name in ("mixer.conv1d", "mixer.norm", "norm", "mixer"):
        changed = copy.deepcopy(block)
        adapter = Adapter([changed.get_submodule(name)])
        changed.set_submodule(name, adapter)
        ran = run(changed)
        assert called == [adapter, adapter] and "norm_linear" not in ran
        assert ("layer_middle" in ran) == (name in ("norm", "mixer"))
        module = block.get_submodule(name)
        for hook, times in dict(forward_pre=2, forward=2, full_backward=1).items():
            register = getattr(module, f"register_{hook}_hook")
            with register(lambda *given: called.append(given[0])):
                run(block)
            assert called == [module] * times
        with mock.patch.object(module, "forward", None), pytest.raises(TypeError):
            block(u)
    with nn.modules.module.register_module_forward_hook(lambda m, *_: called.append(m)):
        run(block)
    assert all(called.count(module) == 2 for module in block.modules())


@pytest.mark.parametrize("options", [{}, dict(ngroups=2, bias=True, dt_limit=(0.01, 0.05))])
@torch.no_grad()
def test_kernel_block_decodes_a_token_of_few_rows_in_three_kernels(options):
    layer, _ = kernel_layer(HALF, **options)
    block = mamba2.Mamba2Block(layer.config).to(DEVICE, HALF)
    for parameter in block.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    exact = copy.deepcopy(block).double()
    h = torch.randn(5, 1, layer.config.d_model, device=DEVICE)
    before = h.clone()
    _, state = block(torch.randn_like(h).expand(-1, 3, -1))

    def run(rows):
        part = Mamba2State(*(t[:rows] for t in state))
        with counted() as ran:
            found, new = block(h[:rows], part)
        want, exact_new = exact(h[:rows].double(), Mamba2State(*(t.double() for t in part)))
        assert found.dtype == torch.float32 and relative_error(found, want) <= 1e-2
        assert relative_error(new.ssm, exact_new.ssm) <= 1e-2
        return ran

    three = ["norm_linear", "layer_step", "norm_linear"]
    assert run(1) == run(2) == three and "norm_linear" not in run(3)
    assert torch.equal(h, before)
    with torch.autocast(DEVICE.type, HALF), counted() as ran:
        block(h[:1], Mamba2State(*(t[:1] for t in state)))
    assert "norm_linear" not in ran
    weight = block.mixer.out_proj.weight
    weight.data = weight.t().contiguous().t()  # whose rows are not contiguous
    assert "norm_linear" not in run(1)


def test_kernel_leaves_transforms_and_all_but_single_tokens_without_gradients_to_its_twin():
    ad = torch.autograd.forward_ad
    layer, _ = kernel_layer(torch.float32)
    u = torch.randn(2, 3, layer.config.d_model, device=DEVICE)
    mask, one = torch.tensor([[1], [0]], device=DEVICE), u[:, :1]
    with torch.no_grad(), counted() as ran:
        _, state = layer.step(u)
        torch.enable_grad()(layer.step)(one, state)
        for call in ((u, state), (one,), (one[:, :0], state), (one, state, mask)):
            layer.step(*call)
        assert "layer_step" not in ran
        layer.step(one, state, seq_idx=mask)  # a label alone is no border
        assert ran.count("layer_step") == 1
    layer.requires_grad_(False)

    def tangent(call, x):
        with ad.dual_level():
            return ad.unpack_dual(call(ad.make_dual(x, torch.ones_like(x)))).tangent

    gradient = lambda call, x: torch.func.grad(lambda x: call(x).square().sum())(x)
    for call, x in ((layer, u), (lambda x: layer.step(x, state)[0], one)):
        for transform in (tangent, gradient, torch.no_grad()(tangent)):
            with counted() as ran:
                found = transform(call, x)
            assert {*ran} == {"refused"}
            assert relative_error(found, without_kernels(transform, call, x)) <= 1e-5


@pytest.mark.skipif(Version(torch.__version__) < Version("2.9"), reason="PyTorch before 2.9")
def test_kernels_run_whichever_switch_of_tf32_is_set(request):
    inputs, switch = kernel_ssd_inputs(torch.float32, 40, p=16, n=16), torch.backends.cuda.matmul
    name, expected = "fp32_precision", mamba2.ssd_recurrent(**inputs)[0]
    request.addfinalizer(functools.partial(setattr, switch, name, getattr(switch, name)))
    setattr(switch, name, "tf32")  # allow_tf32 raises now
    assert relative_error(mamba2.kernels.ssd(**inputs)[0], expected) <= 1e-2


def test_kernel_layer_and_its_step_are_captured_whole_by_torch_compile():
    layer, _ = kernel_layer(HALF if CUDA else torch.float32)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph.code)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    count = lambda name: [code.count(f"{mamba2.kernels.NAMESPACE}.{name}") for code in graphs]
    torch._dynamo.reset()
    l = 200 if CUDA else 9
    u = torch.randn(2, l, layer.config.d_model, device=DEVICE).to(layer.D.dtype)
    seq_idx = (torch.arange(l, device=DEVICE) >= 2 * l // 3).int().expand(2, l)
    step = torch.compile(layer.step, fullgraph=True, backend=backend)
    found = layer_with_gradients(layer, step, u, seq_idx=seq_idx)
    want = layer_with_gradients(layer, layer.step, u, seq_idx=seq_idx)
    limit = 1e-2 if CUDA else 1e-6
    assert all(relative_error(f, e) <= limit for f, e in zip(found, want, strict=True))
    assert count("layer_middle") == [1]

    torch._dynamo.reset()
    graphs.clear()
    step = torch.compile(layer.step, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for rows in (2, 3, 5):
            _, state = layer.step(u[:1, :5].expand(rows, -1, -1))
            token = torch.randn(rows, 1, layer.config.d_model, device=DEVICE).to(u.dtype)
            found, want = tensors(step(token, state)), tensors(layer.step(token, state))
            assert all(relative_error(f, e) <= 1e-2 for f, e in zip(found, want, strict=True))
    assert {*count("layer_step")} == {1}


@needs_cuda
def test_kernel_layer_is_captured_in_a_cuda_graph_and_replayed_on_other_input():
    layer, _ = kernel_layer(torch.bfloat16)
    static = torch.randn(2, 300, layer.config.d_model, device=DEVICE, dtype=torch.bfloat16)
    everything = functools.partial(layer_with_gradients, layer, layer.step, static)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            everything()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    static.copy_(torch.randn_like(static))
    for t in captured:
        t.detach().fill_(torch.nan)
    graph.replay()
    assert identical(captured, everything())


@needs_cuda
def test_kernel_layer_compiled_with_reduce_overhead_is_the_layer():
    layer, _ = kernel_layer(torch.float32)
    u, found = torch.randn(2, 300, 256, device=DEVICE, requires_grad=True), []
    for call in (layer, torch.compile(layer, mode="reduce-overhead", fullgraph=True)):
        for _ in range(4):  # the first two of which record CUDA graphs
            torch.compiler.cudagraph_mark_step_begin()
            y = call(u)
            gradients = torch.autograd.grad(y.square().mean(), [u, *layer.parameters()])
            results = [t.clone() for t in (y, *gradients)]
        found.append(results)
    for eager, compiled in zip(*found, strict=True):
        assert relative_error(compiled, eager) <= 1e-5


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernel_runs_on_the_gpu_of_its_tensors():
    inputs = kernel_ssd_inputs(torch.bfloat16, 200, features="state seq")
    expected = run_with_gradients(mamba2.kernels.ssd, inputs, [inputs["x"], None])
    inputs = {k: t.to("cuda:1") for k, t in inputs.items()}
    found = run_with_gradients(mamba2.kernels.ssd, inputs, [inputs["x"], None])
    assert all(t.device == torch.device("cuda:1") for t in found.values())
    assert identical({k: t.to(DEVICE) for k, t in found.items()}, expected)


@needs_cuda
def test_kernels_reach_beyond_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 70 * 2**30:
        pytest.skip("needs 75 GB of free memory")
    torch.cuda.empty_cache()
    # 4.5e9 elements of the projection and of its gradient, 2.2e9 of what the convolution, SSD and
    # the norm write, 8.7e9 of states at the borders of chunks. All but the last row is ballast.
    inputs, _ = kernel_inputs("layer_middle", torch.bfloat16, l=53_000, b=8, h=80)
    kernel = mamba2.kernels.layer_middle
    dy = torch.randn(8, 53_000, 80 * 64, device=DEVICE, dtype=torch.bfloat16)
    big = run_with_gradients(kernel, inputs, [dy, None, None])
    one = inputs | dict(zxbcdt=inputs["zxbcdt"][7:])
    alone = run_with_gradients(kernel, one, [dy[7:], None, None])
    for key in ("output 0", "output 1", "output 2", "d zxbcdt"):
        for end in (slice(1000), slice(-1000, None)):
            found, want = big[key][7:, end], alone[key][:, end]
            assert relative_error(found, want) <= 1e-2, key


@pytest.fixture(scope="session", autouse=True)
def interpreters(request):
    """Tests of the kernels in the interpreter, by settings: they run beside all other tests."""
    started = {}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k"]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for item in request.session.items:
        if item.originalname == "test_the_kernels_pass_in_the_interpreter" and HAS_INTERPRETER:
            settings, names = (item.callspec.params[name] for name in ("settings", "names"))
            environment = {**os.environ, "TRITON_INTERPRET": "1", "MAMBA2_KERNELS": settings}
            started[settings] = subprocess.Popen([*command, names], env=environment, **options)
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.skipif(not HAS_INTERPRETER, reason="the kernels run in this process, or not at all")
@pytest.mark.parametrize("settings, names", PASSED_IN_THE_INTERPRETER)
def test_the_kernels_pass_in_the_interpreter(settings, names, interpreters):
    said, _ = interpreters[settings].communicate()
    assert interpreters[settings].returncode == 0, said[-6000:]
    passed = int(re.search(r"(\d+) passed", said)[1])
    assert passed == PASSED_IN_THE_INTERPRETER[settings, names], said[-500:]


# For Triton; and the kind of our settings.
TARGETS = {"sm_80": "portable", "sm_86": "portable", "sm_89": "portable", "sm_90": "tma"}
TARGETS |= {"sm_90 portable": "portable", "sm_100": "portable", "sm_120": "portable"}
TARGETS["gfx942"] = "cdna"


def kernels_of_ssd(kind, dtype, n):
    """What compiles the kernels of SSD, by name: those of a layer of 2.7b on this kind of GPU."""
    kernels, found = mamba2.kernels, {}
    drawn = kernel_ssd_inputs(dtype, 4096, 8, 80, 64, n, features="sliced")
    drawn["dt"] = drawn["dt"].to(dtype)
    x, dt, A, B, C, *_ = inputs = drawn.values()
    raw = A, 0.0, math.inf

    def record(plan, **tensors):
        tensors |= plan.descriptors(tensors)
        for kernel, grid, numbers, options in plan.calls:
            names = kernels._tensors(kernel)
            given = numbers | {name: tensors.get(numbers.get(name, name)) for name in names}
            values = [given[name] for name in kernel.arg_names]
            compiling = functools.partial(kernel.warmup, *values, grid=grid, **options)
            name = kernel.fn.__name__.removesuffix("_kernel")
            if name == "walk":
                name = "border" if numbers["BORDERS"] else "segment"
            found[name] = compiling

    changes = dict(_kind=lambda device: kind, _segments=lambda *sizes: 2, _plans={})
    instead = mock.patch.object(kernels._Plan, "__call__", record)
    with mock.patch.multiple(kernels, **changes), instead:
        kernels._ssd_forward(*kernels._ssd_new(*inputs), *inputs, *raw)
        kernels._ssd_backward(x, None, *inputs, *raw, (x, dt, B, C))
    return found


def registers_and_spills(compiled, arch):
    """Registers for each thread, and bytes of them that are spilled to memory."""
    if "amdgcn" in compiled.asm:
        found = re.findall(r"vgpr_(?:spill_)?count:\s*(\d+)", compiled.asm["amdgcn"])
        return int(found[-2]), 4 * int(found[-1])
    folder = Path(mamba2.kernels.triton.__file__).parent / "backends" / "nvidia" / "bin"
    assemblers = sorted(folder.glob("ptxas*"), reverse=arch >= 100)  # the other is for Blackwell
    chip = f"--gpu-name=sm_{arch}" + "a" * (arch >= 90)
    options = dict(input=compiled.asm["ptx"], capture_output=True, text=True)
    commands = ([path, "-v", chip, "/dev/stdin", "-o", "/dev/null"] for path in assemblers)
    runs = (subprocess.run(command, **options) for command in commands)
    said = next(run.stderr for run in runs if run.returncode == 0)  # one may be too old
    spilled = max(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said)))
    return int(re.search(r"Used (\d+) registers", said)[1]), spilled


def print_targets(*words):
    """WORDS: what the kernels need on other GPUs, in lines with all of these words"""
    from triton.backends.compiler import GPUTarget

    global DEVICE
    DEVICE, triton = torch.device("meta"), mamba2.kernels.triton
    print(f"Triton {triton.__version__}, headdim 64. shared: a program's bytes of shared memory")
    print(f"{'target':16}{'dtype':10}{'d_state':>8}  {'kernel':10}  shared  registers  spilled")
    dtypes = torch.bfloat16, torch.float16, torch.float32
    for target, dtype, n in itertools.product(TARGETS, dtypes, (128, 256)):
        kind, number = TARGETS[target], re.search("[0-9]+", target)[0]
        gpu = ("hip", target, 64) if kind == "cdna" else ("cuda", int(number), 32)
        if (kind, 2 if dtype == torch.bfloat16 else 4, n == 256) not in mamba2.kernels.SETTINGS:
            continue
        at_hand = mock.Mock()  # what Triton asks for the GPU at hand
        at_hand.get_current_target.return_value = GPUTarget(*gpu)
        at_hand.get_current_device.return_value = target
        triton.runtime.driver.set_active(at_hand)
        for name, compiling in kernels_of_ssd(kind, dtype, n).items():
            line = f"{target:16}{str(dtype)[6:]:10}{n:8}  {name:10}"
            if all(word in line for word in words):
                compiled = compiling()
                registers, spilled = registers_and_spills(compiled, gpu[1])
                print(f"{line}{compiled.metadata.shared:8}{registers:11}{spilled:9}", flush=True)


@pytest.mark.skipif(INTERPRETED or not TRITON, reason="compiles kernels with Triton")
@pytest.mark.parametrize("target", ["sm_86", "sm_120"])  # which have 99 KB of shared memory
def test_the_largest_kernels_compile_for_other_gpus_and_fit(target):
    command = [sys.executable, __file__, "targets", target, "bfloat16", "128"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "FUSION" not in run.stderr, "Triton's default, which changes, is in use"
    said = run.stdout
    found = {line.split()[-4]: line.split()[-3:] for line in said.splitlines()[2:]}
    for kernel in ("scan", "chunk"):
        shared, _, spilled = map(int, found[kernel])
        assert 0 < shared <= 99 * 1024 and spilled < 512, said


# ---- Benchmarks: python test_mamba2.py --help ----------------------------------------------------

SHAPES = {
    "tiny": dict(d_model=64, n_layer=2, d_state=16, headdim=16, vocab_size=512),
    "130m": dict(d_model=768, n_layer=24),
    "2.7b": dict(d_model=2560, n_layer=64),
    "codestral": dict(d_model=4096, n_layer=64, ngroups=8),
}
METHODS = dict(plain=(0, False), layers=(0, True), segments=("auto", False), both=("auto", True))
LARGE = [("2.7b", 8, 4096), ("130m", 8, 2048)]
WORK = {  # parts to time; on a GPU: shapes, rows of the batch, lengths
    "ssd": ("fwd, bwd, fwd+bwd", [*LARGE, ("codestral", 2, 8192)]),
    "layer": ("fwd, fwd+bwd, fwd in graph, fwd+bwd in graph", LARGE),
    "prefill": ("fwd, fwd in graph", [("130m", 1, 8192), ("2.7b", 1, 8192)]),
    "token": ("fwd", []),  # `generation` times it on a GPU
}


numbers = lambda text: [int(number) for number in text.split(",") if number]
where = lambda: f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}"


@contextlib.contextmanager
def reported(case):
    """Print an error, such as of too little memory, or of a package that is missing, and go on."""
    try:
        yield
    except Exception as problem:
        print(f"{case}: {problem.__context__ or problem!r}"[:100], flush=True)


def milliseconds(call, seconds=2.0):
    """Median time of a call and of its work on a GPU, from calls that take so long together."""
    timer = Timer("call()", globals=dict(call=call), num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=seconds).median


def random_model(shape, **changes):
    torch.manual_seed(0)
    with DEVICE:
        return Mamba2ForCausalLM(Mamba2Config(**SHAPES[shape] | changes))


@torch.no_grad()
def in_model(work, model, ids, cache="cache"):
    """What does a piece of work in a model of ours or of transformers, which name its cache."""
    if work == "layer":
        return model.backbone.layers[0].mixer
    if work == "prefill":
        return functools.partial(model, logits_to_keep=1)
    return functools.partial(model, **{cache: getattr(model(ids, use_cache=True), cache)})


def in_transformers(work, ours, ids):
    if work == "ssd":
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

        scan = functools.partial(mamba2_chunk_scan, chunk_size=256, return_final_states=True)
        return lambda x, dt, A, B, C, D: scan(x, dt, A, B, C, D=D)
    peer = THEIRS(transformers.Mamba2Config(**ours.config.to_dict()))
    peer.load_state_dict(ours.state_dict())
    return in_model(work, peer, ids, THEIR_CACHE)


def in_mamba_ssm(work, ours=None, ids=None):
    """The same piece of work in the authors' package, with the weights of our model."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    from mamba_ssm.modules.mamba2 import causal_conv1d_fn
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as scan

    if work == "ssd":
        return lambda x, dt, A, B, C, D, **given: scan(x, dt, A, B, C, 256, D=D, **given)
    options = {k: getattr(ours.config, k) for k in ("headdim", "d_state")}
    options["use_mem_eff_path"] = causal_conv1d_fn is not None  # which one operation needs
    sizes = {k: getattr(ours.config, k) for k in ("d_model", "n_layer", "vocab_size")}
    config = MambaConfig(**sizes, ssm_cfg=dict(layer="Mamba2", **options))
    peer = MambaLMHeadModel(config, device=DEVICE, dtype=torch.bfloat16).eval()
    weights = ours.state_dict().items()
    peer.load_state_dict({k.replace("embeddings", "embedding"): w for k, w in weights})
    layer = peer.backbone.layers[0].mixer
    return layer if work == "layer" else functools.partial(peer, num_last_tokens=1)


def in_fla(work, ours, ids):
    """SSD in flash-linear-attention, where C, B and dt x are queries, keys and values."""
    from fla.ops.simple_gla import chunk_simple_gla

    def call(x, dt, A, B, C, D):
        B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], dim=2) for t in (B, C))
        y, _ = chunk_simple_gla(C, B, (x * dt[..., None]).to(x.dtype), g=dt * A, scale=1.0)
        return y + (D[:, None] * x).to(y.dtype)

    return call if work == "ssd" else None


def measure(call, part, inputs):
    """Milliseconds, on a CPU the peak of MiB, and the output or the first input's gradient."""
    leaves = [t.detach().requires_grad_("bwd" in part) for t in inputs]
    wanted = [*leaves, *(call.parameters() if isinstance(call, nn.Module) else ())]
    forward = lambda: tensors(call(*leaves))[0]
    backward = lambda y: torch.autograd.grad(y, wanted, dy, retain_graph=True)[0]
    run = torch.no_grad()(forward)
    found = run()
    torch.manual_seed(0)
    dy = torch.randn_like(found)
    if part == "bwd":
        run = functools.partial(backward, forward())
    elif "bwd" in part:  # no y may outlive it: a graph that is captured would use its nodes again
        run = lambda: backward(forward())
    if "bwd" in part:
        found = run()
    if CUDA:
        from triton.testing import do_bench, do_bench_cudagraph

        bench = do_bench_cudagraph if "graph" in part else do_bench
        return bench(run, return_mode="median"), "", found
    with Bytes() as watch:
        run()
    return milliseconds(run), f"{watch.peak / 2**20:8.0f}", found


def print_row(work, shape, b, l):
    c, dtype, model = Mamba2Config(**SHAPES[shape]), torch.bfloat16 if CUDA else torch.float32, None
    ids = tokens(b, 1 if work == "token" else l, vocabulary=c.vocab_size)
    if work == "ssd":
        torch.manual_seed(0)
        drawn = kernel_ssd_inputs(dtype, l, b, c.nheads, c.headdim, c.d_state, c.ngroups, "sliced")
        ours, inputs = ssd, [t for t in drawn.values() if t is not None]
    else:
        model = random_model(shape, n_layer=1 if work == "layer" else c.n_layer).to(dtype).eval()
        ours = in_model(work, model, ids)
        inputs = [randn(b, l, c.d_model).to(dtype) if work == "layer" else ids]
    sides = dict(ours=ours, plain=ours) if CUDA else dict(ours=ours)
    peers = dict(mamba_ssm=in_mamba_ssm, fla=in_fla) if CUDA else dict(transformers=in_transformers)
    for package, peer in peers.items():
        with reported(f"without {package}"):
            sides[package] = peer(work, model, ids)
    if work == "token":
        sides["compiled"] = functools.partial(torch.compile(ours.func), **ours.keywords)
    first = {}
    for (who, call), part in itertools.product(sides.items(), WORK[work][0].split(", ")):
        if call is None or ("graph" in part and (who == "plain" or not CUDA)):
            continue
        kernels = None if who == "plain" else mamba2.kernels
        with reported(f"{work}, {part}, {who}"), mock.patch.object(mamba2, "kernels", kernels):
            ms, peak, found = measure(call, part, inputs)
            ms_of_first, of_first = first.setdefault(part, (ms, found))
            differs = relative_error(found[:1], of_first[:1])
            name = f"{f'{work} {shape} b{b} l{l}':22} {part:17} {who:12}"
            print(f"{name}{ms:10.4f}{ms / ms_of_first:7.2f}  {differs:.1e}{peak}", flush=True)


def benchmark_work(*works, shape=None):
    """this, plain PyTorch and other packages: their differences are those from the first row"""
    print(f"{where()}{'':16}{'ms':>9}  ratio  differs{'' if CUDA else '     MiB'}")
    for work in works:
        on_gpu = CUDA and shape != "tiny"
        for row in WORK[work][1] if on_gpu else [(shape or "130m", 1, 2048)]:
            if shape in (None, row[0]):
                print_row(work, *row)
                torch.cuda.empty_cache()


def benchmark_cpu():
    """on the CPU, also where there is a GPU, beside transformers' own Mamba-2 (the default)"""
    global CUDA, DEVICE
    CUDA, DEVICE = False, torch.device("cpu")
    torch.set_num_threads(2)
    torch._inductor.config.freezing = True  # packs the weights for the CPU
    benchmark_work("ssd", "layer", "token")
    print("the same with another process busy on one of the cores")
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        benchmark_work("ssd")
        busy.kill()


def benchmark_errors():
    """errors of each form of SSD in each dtype, against the recurrence in float64"""
    torch.manual_seed(0)
    b, l, h, p, g, n = 2, 1000, 4, 64, 1, 128
    x, B, C = (torch.randn(b, l, *size, **DRAW) for size in ((h, p), (g, n), (g, n)))
    dt, A = 10 ** (2 * torch.rand(b, l, h, **DRAW) - 3), -1 - 15 * torch.rand(h, **DRAW)
    inputs = dict(x=x, dt=dt, A=A, B=B, C=C, D=torch.ones(h, **DRAW))
    cotangents = [torch.randn_like(x), torch.randn(b, h, p, n, **DRAW)]
    forms = {form.__name__: functools.partial(without_kernels, form) for form in FORMS}
    others = {"kernels.ssd": mamba2.kernels.ssd} if CUDA and RUNS else {}
    if CUDA and importlib.util.find_spec("mamba_ssm"):
        others["mamba_ssm"] = functools.partial(in_mamba_ssm("ssd"), return_final_states=True)
    print(f"{where()}: b {b}, l {l}, h {h}, p {p}, g {g}, n {n}; norms of errors over norms")
    print(" " * 27, *(f"{name:>8}" for name in ("y", "state", *(f"d {name}" for name in inputs))))
    for dtype in DTYPES:
        # As in a layer, x, B and C are in the dtype, all else in float32 at least.
        high = torch.promote_types(dtype, torch.float32)
        given = {k: t.to(dtype if k in "xBC" else high) for k, t in inputs.items()}
        rounded = [cotangents[0].to(dtype), cotangents[1].to(high)]
        doubles = {k: t.double() for k, t in given.items()}
        exact = run_with_gradients(recurrence, doubles, [t.double() for t in rounded])
        for name, form in (forms if dtype == torch.float64 else forms | others).items():
            found = run_with_gradients(form, given, rounded)
            errors = [f"{relative_error(found[key], exact[key]):8.1e}" for key in exact]
            print(f"{name:16} {str(dtype)[6:]:10}", *errors, flush=True)


def training_speed(shape, b, l, engine=None, again=False, steps=1, segment_length=0, **given):
    """The length of a segment, tokens per second and peak GB of training on (b, l) random tokens:
    bfloat16 autocast, float32 weights, fused AdamW. again: layers are computed again."""
    gc.collect()
    torch.cuda.empty_cache()
    model = random_model(shape).train()
    if again:
        model.gradient_checkpointing_enable()
    length = model._segment_length(segment_length, b, l, None)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, None, False)  # as in README
    options = dict(DDP=dict(gradient_as_bucket_view=True), FSDP2=dict(mp_policy=policy))
    if engine:
        model = distribute(model, engine, **options[engine])
    optimizer = torch.optim.AdamW(mamba2.parameter_groups(model, 0.1), lr=1e-4, fused=True)

    def seconds(l):
        start = time.perf_counter()
        ids = torch.randint(Mamba2Config(**SHAPES[shape]).vocab_size, (b, l), device=DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=engine != "FSDP2"):
            loss = model(ids, labels=ids, segment_length=length, **given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the GPU
        return time.perf_counter() - start

    for _ in range(2):  # the first compiles, and the second still asks for memory
        seconds(min(l, 3 * length))
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    speed = b * l / statistics.median(seconds(l) for _ in range(steps))
    return length, speed, torch.cuda.max_memory_allocated() / 1e9 if CUDA else math.nan


def benchmark_training(shape, lengths, methods="plain,layers,segments,both"):
    """SHAPE LENGTHS [--methods plain,layers,segments,both]: memory and speed on long sequences"""
    print(f"{where()}, mamba2-{shape}\n   length   method  segment     peak GB    tokens/s")
    for l, method in itertools.product(numbers(lengths), methods.split(",")):
        segment_length, again = METHODS[method]
        with reported(f"{l:9,} {method:>8}"):
            given = dict(again=again, segment_length=segment_length)
            length, speed, peak = training_speed(shape, 1, l, **given)
            print(f"{l:9,} {method:>8} {length:8,}{peak:12.1f} {speed:11,.0f}", flush=True)


PARALLEL = [  # engine, shape, rows of a rank, length, segment_length; all ranks share the slices
    ("DDP", "130m", 8, 4096, 0),
    ("FSDP2", "2.7b", 2, 4096, 0),
    ("DDP of slices", "2.7b", 1, 262144, 8192),
    ("DDP of slices", "2.7b", 1, 262144, 13108),
]
if not CUDA:
    PARALLEL = [("DDP", "tiny", 8, 64, 0), ("DDP of slices", "tiny", 1, 64, 8)]


def benchmark_parallel():
    """training on all GPUs against one of them, under torchrun or as a single process"""
    global DEVICE
    given = {}
    if not dist.is_torchelastic_launched():
        given = dict(store=dist.HashStore(), rank=0, world_size=1)
    if CUDA:
        given["device_id"] = DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(DEVICE)
    dist.init_process_group("nccl" if CUDA else "gloo", **given)
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        print(f"{where()}, {world} ranks: tokens/s per GPU, peak GB, ratio to one GPU")
    for case in PARALLEL:
        engine, shape, b, l, segment = case
        given = dict(steps=5, segment_length=segment)
        if rank == 0:
            _, alone, peak = training_speed(shape, b, l, **given)
            print(f"{case!s:45}{alone:12,.0f} {peak:8.1f}, one GPU", flush=True)
        if "slices" in engine:
            l, given["group"] = l // world, dist.group.WORLD
        dist.barrier()
        _, speed, peak = training_speed(shape, b, l, engine.split()[0], **given)
        if rank == 0:
            print(f"{case!s:45}{speed:12,.0f} {peak:8.1f} {speed / alone:8.3f}", flush=True)
    dist.destroy_process_group()


@torch.no_grad()
def time_generation(name, batch=1, contexts="", state_dtype=None, prompt=100, new=256, seconds=2.0):
    """NAME [--batch, --contexts 100,1000, --state-dtype]: time of a prompt, and of a token"""
    dtype = torch.bfloat16 if CUDA else torch.float32
    model = random_model(name) if name in SHAPES else Mamba2ForCausalLM.from_pretrained(name)
    model = model.to(DEVICE, dtype).eval()
    model.generation_config.eos_token_id = None  # every text has the length that was asked for
    greedy = lambda count: dict(cache=cache, max_new_tokens=count, do_sample=False)
    ways = {
        "model.stream": lambda count: [*model.stream(ids, **greedy(count))],
        "model.generate": lambda count: model.generate(ids, **greedy(count)),
    }
    if CUDA and importlib.util.find_spec("mamba_ssm"):
        theirs = in_mamba_ssm("prefill", model).func
        ways["mamba_ssm, cg=True"] = lambda count: theirs.generate(ids, prompt + 1 + count, cg=True)
    print(f"{where()}, {name}, {dtype}, batch {batch}")
    print("                       context   prefill s   ms a token   MB of state")
    for way, run in ways.items():
        for length in [prompt, *numbers(contexts)] if way == "model.stream" else [prompt]:
            ids = tokens(int(batch), length + 1, vocabulary=model.config.vocab_size)
            reading = milliseconds(lambda: model.prefill(ids[:, :-1]), seconds)  # noqa: B023
            cache = model.prefill(ids[:, :-1])
            cache = cache.to(getattr(torch, state_dtype)) if state_dtype else cache
            begun, all_ = (milliseconds(functools.partial(run, n), seconds) for n in (1, new + 1))
            states = sum(t.nbytes for t in tensors(cache.states))
            row = f"{way:18}{length:12,} {reading / 1e3:11.3f} {(all_ - begun) / new:12.3f}"
            print(row, f"{states / 1e6:13.1f}", flush=True)
    weights = sum(weight.nbytes for weight in model.parameters())
    source = torch.empty(2**28 if CUDA else 2**26, device=DEVICE)
    target = torch.empty_like(source)
    a_byte = milliseconds(lambda: target.copy_(source), seconds) / (2 * source.nbytes)
    print(f"floor: {(weights + 2 * states) * a_byte:.3f} ms a token, at the speed of a copy")


COMMANDS = dict(cpu=benchmark_cpu, errors=benchmark_errors, figure=draw_figure)
COMMANDS |= {work: functools.partial(benchmark_work, work) for work in ("ssd", "layer", "prefill")}
COMMANDS |= dict(generation=time_generation, training=benchmark_training)
COMMANDS |= dict(parallel=benchmark_parallel, targets=print_targets)


def command_line(arguments=None):
    """What is to run, with its arguments: an error if they do not fit."""
    what = [f"  {name:11}{getattr(run, 'func', run).__doc__}" for name, run in COMMANDS.items()]
    what = "\n".join(["Benchmarks of mamba2.py; tests: pytest", *what])
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=what, formatter_class=kind)
    parser.add_argument("command", nargs="?", default="cpu", choices=COMMANDS)
    parser.add_argument("words", nargs="*", help="as above; more of ssd, layer, prefill")
    parser.add_argument("--shape", choices=SHAPES, help="of ssd, layer, prefill; all unless given")
    for option in ("--methods", "--batch", "--contexts", "--state-dtype"):
        parser.add_argument(option)
    options = vars(parser.parse_intermixed_args(arguments))
    run, words = COMMANDS[options.pop("command")], options.pop("words")
    options = {name: value for name, value in options.items() if value is not None}
    try:
        inspect.signature(run).bind(*words, **options)
    except TypeError as problem:
        parser.error(problem)
    return functools.partial(run, *words, **options)


if __name__ == "__main__":
    command_line()()
