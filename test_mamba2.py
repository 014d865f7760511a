"""Tests of mamba2.py; their names are the claims.

What is right is written again here, from the paper (Dao and Gu 2024, arxiv.org/abs/2405.21060) and
without mamba2.py: `recurrence` is the SSD, `layer_by_hand` the layer, both position by position.
Nearly everything runs in float64, where two orders of summation differ by some 1e-14, so that 1e-10
leaves no room for a mistake. All of it runs on CUDA where there is one, and else on the CPU.
"""

import argparse
import contextlib
import copy
import functools
import gc
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import textwrap
import time
import traceback
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import accelerate
import peft
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.generation import (
    BaseStreamer,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import mamba2
from mamba2 import (
    GenerationCache,
    Mamba2,
    Mamba2Cache,
    Mamba2Config,
    Mamba2ForCausalLM,
    Mamba2Model,
    Mamba2State,
    parameter_groups,
    ssd,
    ssd_quadratic,
    ssd_recurrent,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
FORMS = [ssd_recurrent, ssd_quadratic, ssd]
DRAW = dict(dtype=torch.float64, device=DEVICE)


@pytest.fixture(autouse=True)
def seeds():
    torch.manual_seed(0)
    random.seed(0)


def recurrence(x, dt, A, B, C, D=None, initial_state=None, seq_idx=None):
    """The oracle: the paper's equation (2), position by position, in float64."""
    x, dt, A, B, C = (t.double() for t in (x, dt, A, B, C))
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    group = [head // (h // g) for head in range(h)]
    state, ys = x.new_zeros(b, h, p, n), [x.new_zeros(b, 0, h, p)]
    if initial_state is not None:
        state = initial_state.double()
    for t in range(l):
        if seq_idx is not None and t > 0:
            goes_on = (seq_idx[:, t] == seq_idx[:, t - 1]).double()
            state = state * goes_on[:, None, None, None]
        key, query = B[:, t, group, None, :], C[:, t, group, None, :]  # (b, h, 1, n)
        decay, step = (dt[:, t] * A).exp()[:, :, None, None], dt[:, t, :, None, None]
        state = decay * state + step * x[:, t, :, :, None] * key
        y = (state * query).sum(-1)  # (b, h, p)
        if D is not None:
            y = y + (D.double() if D.dim() == 2 else D.double()[:, None]) * x[:, t]
        ys.append(y[:, None])
    return torch.cat(ys, 1), state


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


def make_layer(**options):
    """A small layer in float64 in which every parameter has a random value, and so an effect."""
    sizes = dict(d_model=10, d_state=5, headdim=5, ngroups=2, d_conv=4, chunk_size=4)
    layer = Mamba2(**{**sizes, **options}).to(DEVICE, torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return layer


def layer_inputs(layer, b, l):
    """Random u and state for a layer."""
    c, draw = layer.config, dict(**DRAW, requires_grad=True)
    channels = c.nheads * c.headdim + 2 * c.ngroups * c.d_state
    conv = torch.randn(b, c.d_conv - 1, channels, **draw)
    ssm = torch.randn(b, c.nheads, c.headdim, c.d_state, **draw)
    return torch.randn(b, l, c.d_model, **draw), Mamba2State(conv, ssm)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def gradients(outputs, inputs):
    """Gradients of all inputs from cotangents on all outputs, the same for the same shapes."""
    loss = sum(0 * t.sum() for t in tensors(inputs))  # has a gradient, even where l = 0
    for output in tensors(outputs):
        draw = torch.Generator().manual_seed(output.numel())
        cotangent = torch.randn(output.shape, generator=draw, dtype=torch.float64)
        loss = loss + (output.double() * cotangent.to(output.device)).sum()
    return torch.autograd.grad(loss, tensors(inputs), retain_graph=True, materialize_grads=True)


def assert_close(found, expected, tolerance=1e-10, case="", rounding=0):
    """Each tensor is equal, relative to the largest value in it, and each value to its rounding."""
    for i, (f, e) in enumerate(zip(tensors(found), tensors(expected), strict=True)):
        f, e = f.detach().double(), e.detach().double()
        assert f.shape == e.shape, f"{case} [{i}]"
        if e.numel():
            error, scale = (f - e).abs().max(), e.abs().max()
            message = f"{case} [{i}]: error {error:.1e} where values are {scale:.1e}"
            assert ((f - e).abs() <= tolerance * scale + rounding * e.abs()).all(), message


def assert_same(found, expected, inputs, case=""):
    """The results are equal, and so are their gradients for all inputs."""
    assert_close(found, expected, case=case)
    assert_close(gradients(found, inputs), gradients(expected, inputs), case=f"{case} gradient")


def identical(found, expected):
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def in_pieces(step, l, state, cuts):
    """Outputs and state of `step(slice, state)`, called on one piece after the other."""
    ys = []
    for start, end in zip([0, *cuts], [*cuts, l], strict=True):
        y, state = step(slice(start, end), state)
        ys.append(y)
    return torch.cat(ys, 1), state


class Bytes(TorchDispatchMode):
    """Watches the tensors that operations make: most bytes alive at once, most bytes of one."""

    def __init__(self):
        super().__init__()
        self.watched, self.alive, self.peak, self.largest = {}, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (tensor.untyped_storage() for tensor in tensors(out)):
            if storage._cdata not in self.watched:
                forget = functools.partial(self.forget, storage._cdata, storage.nbytes())
                self.watched[storage._cdata] = weakref.ref(storage, forget)
                self.alive += storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    def forget(self, key, nbytes, _):
        del self.watched[key]
        self.alive -= nbytes


# ---- SSD -----------------------------------------------------------------------------------------


def test_the_three_forms_are_the_recurrence_on_240_random_shapes():
    for case in range(240):
        q = random.randint(1, 8)
        l = [0, 1, q - 1, q, q + 1, 3 * q + 7][case % 6]
        b, g, r = random.choice([0, 1, 2, 3]), random.randint(1, 3), random.randint(1, 3)
        p, n = random.choice([1, 3, 5, 8]), random.choice([1, 3, 4, 7])
        D = random.choice([None, (), (p,)])
        inputs = ssd_inputs(b, l, g * r, p, g, n, D=D, state=random.random() < 0.5)
        seq_idx = labels(b, l) if random.random() < 0.5 else None
        expected = recurrence(**inputs, seq_idx=seq_idx)
        expected = [*expected, gradients(expected, inputs)]
        for form in FORMS:
            found = form(**inputs, seq_idx=seq_idx, chunk_size=q)
            case = f"{form.__name__} b={b} l={l} q={q} g={g} r={r} p={p} n={n} D={D} {seq_idx}"
            assert_close([*found, gradients(found, inputs)], expected, case=case)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_passes_on_every_input_and_state(form):
    inputs = ssd_inputs(1, 5, 2, 2, 1, 2, D=(2,))
    seq_idx = torch.tensor([[0, 0, 0, 1, 1]], device=DEVICE)  # the border is inside of a chunk

    def function(*given):
        return form(**dict(zip(inputs, given, strict=True)), seq_idx=seq_idx, chunk_size=2)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_the_chunked_form_can_be_differentiated_twice():
    inputs, seq_idx = ssd_inputs(1, 4, 2, 1, 1, 2), torch.tensor([[0, 1, 1, 1]], device=DEVICE)

    def function(*given):
        return ssd(**dict(zip(inputs, given, strict=True)), seq_idx=seq_idx, chunk_size=2)

    assert torch.autograd.gradgradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_costs_the_rounding_of_the_result_alone(form, dtype, monkeypatch):
    inputs = {k: t.detach().to(dtype) for k, t in ssd_inputs(2, 200, 4, 8, 2, 16).items()}
    wide = torch.promote_types(dtype, torch.float32)
    mixed = {k: t if k in ("x", "B", "C") else t.to(wide) for k, t in inputs.items()}
    mixed["D"] = mixed["D"] + 0.001  # has no bfloat16, and as it is float32 needs none
    for given in (inputs, mixed):  # all of x's dtype; or as in a layer: dt, A, D, state wider
        exact_y, exact_state = recurrence(**given)
        # Inside all is `wide`, whose sums of up to 200 terms lose some 10 of its roundings; the
        # result is rounded once to x's dtype, by at most half of its epsilon. A kernel may round
        # products too, that it feeds to matrix units: two roundings more.
        inner, epsilon = 10 * torch.finfo(wide).eps, torch.finfo(dtype).eps
        y, state = form(**given)
        assert (y.dtype, state.dtype) == (dtype, wide)
        assert_close((y, state), (exact_y, exact_state), inner + 2 * epsilon)
        with monkeypatch.context() as patch:
            patch.setattr(mamba2, "kernels", None)
            y, state = form(**given)
            assert form(**given | {"dt": given["dt"].double()})[1].dtype == wide  # x alone decides
        assert (y.dtype, state.dtype) == (dtype, wide)
        assert_close(state, exact_state, inner)
        assert_close(y, exact_y, inner, rounding=epsilon / 2)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_does_not_reach_into_ssd(form):
    for dtype in (torch.bfloat16, torch.float32):
        inputs = {k: t.detach().to(dtype) for k, t in ssd_inputs(2, 70, 4, 8, 2, 16).items()}
        outside = form(**inputs)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            assert identical(form(**inputs), outside)


@pytest.mark.parametrize("form", FORMS)
def test_extreme_steps_and_decays_are_finite_and_right(form):
    b, l, h = 2, 70, 5
    inputs = ssd_inputs(b, l, h, 3, 1, 4)
    with torch.no_grad():
        inputs["dt"].copy_(10 ** torch.empty_like(inputs["dt"]).uniform_(-8, 3))  # 1e-8 .. 1e3
        inputs["A"].copy_(-torch.tensor([1e-8, 1e-3, 1, 30, 1e3]))
    single = {k: t.detach().float().requires_grad_() for k, t in inputs.items()}
    for seq_idx in (None, labels(b, l)):
        expected = recurrence(**inputs, seq_idx=seq_idx)
        assert_same(form(**inputs, seq_idx=seq_idx), expected, inputs, list(inputs))
        found = form(**single, seq_idx=seq_idx)
        # float32: exp(s) has the relative error of s, up to 20 epsilons of 1.2e-7 where it matters;
        # gradients are sums of such values, and of y.
        assert_close(found, expected, 1e-5)
        assert_close(gradients(found, single), gradients(expected, inputs), 1e-4, list(inputs))


@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_one_sequence_reaches_the_next_however_large_it_is(form):
    inputs, first = ssd_inputs(2, 10, 4, 3, 2, 5), torch.arange(10, device=DEVICE) < 5
    results = []
    for factor in (1.0, 1e200):
        large = inputs["x"] * torch.where(first, torch.tensor(factor, **DRAW), 1)[:, None, None]
        given = inputs | dict(x=large, initial_state=inputs["initial_state"] * factor)
        y, state = form(**given, seq_idx=first.int().expand(2, -1), chunk_size=4)
        results.append((y[:, 5:], state))
    assert identical(*results)


@pytest.mark.parametrize("form", [ssd_quadratic, ssd])
def test_a_weak_decay_after_a_strong_one_keeps_its_digits(form):
    l = 64
    inputs = {k: t.detach() for k, t in ssd_inputs(1, l, 1, 3, 1, 4, D=None, state=False).items()}
    inputs["A"].fill_(-1)
    inputs["dt"].fill_(0.01)
    inputs["dt"][:, 1], inputs["x"][:, 1] = 1e6, 0  # forget everything, write nothing
    expected, _ = recurrence(**inputs)
    single = {name: tensor.float() for name, tensor in inputs.items()}
    found, _ = form(**single, chunk_size=l)
    assert_close(found, expected, 1e-5)  # some 20 epsilons of float32
    # The obvious formula, with L from differences of prefix sums, is wrong already in the second
    # digit: next to 1e6 float32 has no digits after the point but sixteenths.
    x, dt, B, C = (single[name][0] for name in ("x", "dt", "B", "C"))
    sums = (dt[:, 0] * single["A"]).cumsum(0)  # (l)
    naive = ((C[:, 0] @ B[:, 0].T) * (sums[:, None] - sums).exp().tril()) @ (dt * x[:, 0])
    exact = expected[0, :, 0]
    assert (naive - exact).abs().max() > 0.02 * exact.abs().max()


def test_the_chunked_form_holds_no_matrix_of_the_sequence(monkeypatch):
    b, l, h, p, g, n, q = 1, 1024, 8, 16, 2, 16, 64
    for name in ("SLAB", "SLAB_ON_GPU"):
        monkeypatch.setattr(mamba2, name, 2 * h * q * q)  # two chunks at once
    inputs = ssd_inputs(b, l, h, p, g, n, state=False)  # float64: no kernel, 8 bytes a number
    x_bytes, given = 8 * b * l * h * p, sum(8 * t.numel() for t in inputs.values())
    with torch.no_grad(), Bytes() as forward:
        ssd(**inputs, chunk_size=q)
    # Alive at once: the inputs (views of them are counted), the outputs of the chunks and what they
    # are put together in, and of two chunks 4 matrices (h, q, q) or less.
    assert forward.peak <= given + 2 * x_bytes + 8 * (8 * b * h * q * q)
    assert forward.peak < 8 * l * l  # so less than one l x l matrix for one of 8 heads
    with Bytes() as training:
        y, _ = ssd(**inputs, chunk_size=q)
        y.sum().backward()
    assert training.largest <= x_bytes  # the backward pass makes no larger tensor either
    assert x_bytes < 8 * l * l and x_bytes < 8 * b * (l // q) * q * q * h * n


def test_products_with_B_and_C_are_made_once_for_a_group():
    b, l, h, p, g, n, q = 2, 96, 12, 8, 3, 16, 32
    with FlopCounterMode(display=False) as counter:
        ssd(**ssd_inputs(b, l, h, p, g, n), chunk_size=q)
    scores = g * q * q * n  # C B^T, for each group, not for each head
    a_chunk = scores + h * q * q * p + h * p * q * n + h * q * n * p
    assert counter.get_total_flops() <= 2 * b * (l // q) * a_chunk


BAD_SSD = {
    "x of one axis": dict(x=(2,)),
    "x of three axes": dict(x=(2, 5, 12)),
    "dt of other heads": dict(dt=(2, 5, 3)),
    "A of other heads": dict(A=(2,)),
    "groups that do not divide": dict(B=(2, 5, 3, 6), C=(2, 5, 3, 6)),
    "no group": dict(B=(2, 5, 0, 6), C=(2, 5, 0, 6)),
    "B of another length": dict(B=(2, 1, 2, 6), C=(2, 1, 2, 6)),
    "C of another state": dict(C=(2, 5, 2, 1)),
    "a scalar D": dict(D=()),
    "D of other channels": dict(D=(4, 1)),
    "a state turned round": dict(initial_state=(2, 4, 6, 3)),
    "a state for one row": dict(initial_state=(1, 4, 3, 6)),
    "seq_idx of another length": dict(seq_idx=(2, 4)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", BAD_SSD)
def test_ssd_refuses_shapes_that_do_not_fit(form, case):
    inputs, name = ssd_inputs(2, 5, 4, 3, 2, 6), next(iter(BAD_SSD[case]))
    for changed, shape in BAD_SSD[case].items():
        dtype = torch.int64 if changed == "seq_idx" else torch.float64
        inputs[changed] = torch.ones(shape, dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match="must be") as raised:
        form(**inputs)
    assert str(raised.value).startswith(f"{name} has shape {BAD_SSD[case][name]}: ")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D", "initial_state", "seq_idx"])
def test_ssd_refuses_dtypes_that_mean_nothing(form, name):
    inputs = ssd_inputs(2, 5, 4, 3, 2, 6)
    bad = torch.zeros(2, 5) if name == "seq_idx" else inputs[name].detach().int()
    cases = (bad, bad.dtype), (bad.cfloat(), "torch.complex64"), ([1.0], "a list")
    for bad, found in cases:
        with pytest.raises(TypeError, match=f"{name} is {found}: it must"):
            form(**inputs | {name: bad if isinstance(bad, list) else bad.to(DEVICE)})


@pytest.mark.parametrize("chunk_size", [0, -3, 2.5, None, True])
def test_ssd_refuses_chunks_of_no_positions(chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size = {chunk_size}: it must be"):
        ssd(**ssd_inputs(1, 5, 2, 2, 1, 2), chunk_size=chunk_size)


# ---- Convolution and norm ------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_convolution_is_torchs_between_the_borders(k):
    b, d, draw = 2, 5, dict(**DRAW, requires_grad=True)
    weight, bias, before = (torch.randn(s, **draw) for s in ((d, k), (d,), (b, k - 1, d)))
    for l in (0, 1, 2, 3, 4, 9):
        x = torch.randn(b, l, d, **draw)
        for state in (None, before):
            window = torch.cat([torch.zeros_like(before) if state is None else state, x], 1)
            y = x.mT if l == 0 else F.silu(F.conv1d(window.mT, weight[:, None], bias, groups=d))
            found = mamba2.causal_conv1d(x, weight, bias, initial_state=state)
            assert_same(found, (y.mT, window[:, l:]), [x, weight, bias, before])

    # Sequences of 4, 1, 2 and 3 positions in a row; the third has the label of the first again.
    x, sizes = torch.randn(b, 10, d, **draw), [4, 1, 2, 3]
    seq_idx = torch.tensor([[0, 0, 0, 0, 1, 0, 0, 2, 2, 2]] * b, device=DEVICE)
    found = mamba2.causal_conv1d(x, weight, initial_state=before, seq_idx=seq_idx)
    parts = [mamba2.causal_conv1d(part, weight) for part in x.split(sizes, 1)]
    parts[0] = mamba2.causal_conv1d(x[:, :4], weight, initial_state=before)
    assert_same(found, (torch.cat([y for y, _ in parts], 1), parts[-1][1]), [x, weight, before])


def gated_norm_by_hand(y, z, weight, eps, groups):
    width, parts = y.shape[-1] // groups, []
    for i in range(groups):
        part = slice(i * width, (i + 1) * width)
        gated = y[..., part] * z[..., part] * torch.sigmoid(z[..., part])
        size = torch.sqrt((gated**2).sum(-1, keepdim=True) / width + eps)
        parts.append(gated / size * weight[part])
    return torch.cat(parts, -1)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_the_gated_norm_is_one_norm_for_each_group(groups):
    norm = mamba2.RMSNorm(12, eps=0.3, groups=groups).to(DEVICE, torch.float64)
    nn.init.normal_(norm.weight)
    y, z = torch.randn(2, 2, 5, 12, **DRAW, requires_grad=True)
    expected = gated_norm_by_hand(y, z, norm.weight, 0.3, groups)
    assert_same(norm(y, gate=z), expected, [y, z, norm.weight])
    one = torch.full_like(z, 1.2784645427610738)  # where z * sigmoid(z) is 1
    expected = gated_norm_by_hand(y, one, norm.weight, 0.3, groups)
    assert_same(norm(y), expected, [y, norm.weight])


def test_convolution_and_norm_refuse_what_does_not_fit():
    x, weight = torch.ones(2, 5, 6, device=DEVICE), torch.ones(6, 4, device=DEVICE)
    for error, message, arguments in (
        (TypeError, "x is a list", dict(x=[1.0])),
        (TypeError, "x is torch.int64", dict(x=x.long())),
        (ValueError, r"weight has shape \(4, 6\)", dict(weight=weight.mT)),
        (ValueError, r"weight .* must be \(6, k\)", dict(weight=weight[:, None])),
        (ValueError, r"bias has shape \(4,\)", dict(bias=weight[0])),
        (ValueError, r"initial_state has shape \(2, 4, 6\)", dict(initial_state=x[:, 1:])),
        (ValueError, r"seq_idx has shape \(2, 4\)", dict(seq_idx=x[:, 1:, 0].long())),
        (TypeError, "seq_idx is torch.float32", dict(seq_idx=x[..., 0])),
    ):
        with pytest.raises(error, match=message):
            mamba2.causal_conv1d(**{"x": x, "weight": weight, **arguments})
    weight = weight[:, 0]
    for error, message, arguments in (
        (TypeError, "x is a list", dict(x=[1.0])),
        (TypeError, "x is torch.int64", dict(x=x.long())),
        (TypeError, "gate is torch.int64", dict(gate=x.long())),
        (ValueError, r"gate has shape \(5, 6\)", dict(gate=x[0])),
        (ValueError, r"weight has shape \(5,\)", dict(weight=weight[1:])),
        (ValueError, "groups = 4: it must divide", dict(groups=4)),
        (ValueError, "groups = 0: it must divide", dict(groups=0)),
        (ValueError, "groups = -2: it must divide", dict(groups=-2)),
    ):
        with pytest.raises(error, match=message):
            mamba2.rms_norm(**{"x": x, "weight": weight, "eps": 1e-5, **arguments})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_convolution_and_norm_cost_the_rounding_of_the_result_alone(dtype):
    x, z, weight = (torch.randn(s, device=DEVICE).to(dtype) for s in ((2, 9, 8), (2, 9, 8), (8, 4)))
    norm = mamba2.RMSNorm(8, 1e-5, groups=2).to(DEVICE, dtype)
    y, state = mamba2.causal_conv1d(x, weight, weight[:, 0])
    found = y, norm(x, gate=z)
    wide = mamba2.causal_conv1d(x, weight, initial_state=x[:, :3].double())[1], z.double()
    assert wide[0].dtype == dtype and norm(wide[1], gate=z).dtype == norm(wide[1]).dtype == dtype
    assert copy.deepcopy(norm).double()(x, gate=z).dtype == dtype
    x, z, weight, norm = x.double(), z.double(), weight.double(), copy.deepcopy(norm).double()
    expected = mamba2.causal_conv1d(x, weight, weight[:, 0])[0], norm(x, gate=z)
    assert found[0].dtype == found[1].dtype == dtype and identical(state, x[:, -3:].to(dtype))
    # The arithmetic is in float32, with some 10 roundings of 1.2e-7; then half an epsilon of dtype.
    assert_close(found, expected, 2e-6, rounding=torch.finfo(dtype).eps / 2)


# ---- The layer -----------------------------------------------------------------------------------


def layer_by_hand(layer, u, state=None):
    """y of the layer (Section 7.1), from its parameters, in their published order and meaning."""
    c, inner = layer.config, layer.config.nheads * layer.config.headdim
    b, l, gn, k = *u.shape[:2], c.ngroups * c.d_state, c.d_conv
    z, x, B, C, dt = layer.in_proj(u).split([inner, inner, gn, gn, c.nheads], dim=-1)
    xBC = torch.cat([x, B, C], -1)
    before = xBC.new_zeros(b, k - 1, inner + 2 * gn) if state is None else state.conv
    window, conv = torch.cat([before, xBC], 1), torch.zeros_like(xBC)
    for t in range(l):
        for j in range(k):
            conv[:, t] += layer.conv1d.weight[:, 0, j] * window[:, t + j]
        if layer.conv1d.bias is not None:
            conv[:, t] += layer.conv1d.bias
    x, B, C = (conv * torch.sigmoid(conv)).split([inner, gn, gn], dim=-1)
    low, high = (torch.tensor(limit, **DRAW) for limit in c.dt_limit)
    dt = torch.minimum(torch.maximum(torch.log1p(torch.exp(dt + layer.dt_bias)), low), high)
    x, B = x.reshape(b, l, c.nheads, c.headdim), B.reshape(b, l, c.ngroups, c.d_state)
    C, A = C.reshape(b, l, c.ngroups, c.d_state), -torch.exp(layer.A_log)
    y, ssm = recurrence(x, dt, A, B, C, layer.D, None if state is None else state.ssm)
    weight, eps = layer.norm.weight, c.norm_epsilon
    y = gated_norm_by_hand(y.reshape(b, l, inner), z, weight, eps, c.ngroups)
    return layer.out_proj(y), Mamba2State(window[:, l:], ssm)


LAYERS = {
    "defaults": {},
    "one group": dict(ngroups=1),
    "as many groups as heads": dict(ngroups=4),
    "expand = 1.5, odd sizes": dict(d_model=14, headdim=3, expand=1.5, ngroups=7, d_state=3),
    "one head, one channel": dict(d_model=1, headdim=1, expand=1, ngroups=1, d_state=1),
    "all biases": dict(bias=True, conv_bias=True),
    "no biases": dict(bias=False, conv_bias=False),
    "dt limits": dict(dt_limit=(0.05, 0.2)),
    "a low dt limit": dict(dt_limit=(0.1, math.inf), bias=True),
    "no convolution": dict(d_conv=1),
    "seven taps, another eps": dict(d_conv=7, norm_epsilon=0.1),
}


@pytest.mark.parametrize("case", LAYERS)
def test_the_layer_is_the_layer_written_by_hand(case):
    layer = make_layer(**LAYERS[case])
    u, given_state = layer_inputs(layer, 2, 11)
    for state in (None, given_state):
        expected, found = layer_by_hand(layer, u, state), layer.step(u, state)
        assert_same(found, expected, [u, state, list(layer.parameters())])
        assert isinstance(found[1], Mamba2State) and torch.equal(layer(u, state), found[0])
        tokens = in_pieces(lambda t, s: layer.step(u[:, t], s), 11, state, range(1, 11))
        assert_close(tokens, expected)  # dt's limits hold in single steps too


@pytest.mark.parametrize("what", [*FORMS, "layer", "layer without convolution"])
def test_any_split_of_the_sequence_gives_the_same_state(what):
    b, l = 2, 23
    seq_idx = (torch.arange(l, device=DEVICE) // 8).expand(b, l)
    if what in FORMS:
        inputs = ssd_inputs(b, l, 4, 3, 2, 5)
        state = inputs.pop("initial_state")
        given = [inputs, state]

        def step(piece, state):
            part = {k: t if k in ("A", "D") else t[:, piece] for k, t in inputs.items()}
            options = dict(seq_idx=seq_idx[:, piece], chunk_size=random.randint(1, 6))
            return what(**part, initial_state=state, **options)
    else:
        layer = make_layer(d_conv=4 if what == "layer" else 1)
        u, state = layer_inputs(layer, b, l)
        given = [u, state, list(layer.parameters())]

        def step(piece, state):
            return layer.step(u[:, piece], state, seq_idx=seq_idx[:, piece])

    for start in (None, state):
        for _ in range(3):
            # Anywhere but at borders between sequences; a single token, and empty pieces.
            cuts = random.choices([i for i in range(l) if i % 8], k=4)
            cuts = sorted([0, 3, 4, *cuts, cuts[0], l])
            assert_same(in_pieces(step, l, start, cuts), step(slice(l), start), given, cuts)


@pytest.mark.parametrize("l", [0, 1, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_a_state_is_a_value_that_can_be_used_again(l, masked):
    layer = make_layer()
    (u, _), (v, _), (prompt, _) = (layer_inputs(layer, 2, n) for n in (l, l, 6))
    mask = torch.rand(2, l, device=DEVICE) < 0.5 if masked else None
    _, state = layer.step(prompt)
    given = tensors([u, v, mask, state])
    before = [(part.clone(), part._version) for part in given]
    forks = [layer.step(w, state, mask) for w in (u, v, u)]
    for y, end in forks:  # each goes back through the one state, and none spoils it for the next
        (y.sum() + end.ssm.square().sum()).backward(retain_graph=True)
    for part, (value, version) in zip(given, before, strict=True):
        assert torch.equal(part, value) and part._version == version
    assert identical(forks[0], forks[2])
    for _, end in forks:  # they share no memory, nor keep alive what they were computed from
        for part, old in zip(end, state, strict=True):
            assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
            assert l == 0 or part.data_ptr() != old.data_ptr()


MASKS = """00000111111 11111100000 11100001111 10110100101 00000000000 11111111111 00000000001
           10000000000 01111111110""".split()


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("masked, packed", [(True, False), (False, True), (True, True)])
def test_masked_positions_do_not_exist_and_packed_sequences_are_separate(
    k, with_state, masked, packed
):
    layer, l, b = make_layer(d_conv=k, bias=True, dt_limit=(0.2, 2.0)), 11, len(MASKS)
    u, state = layer_inputs(layer, b, l)
    state = state if with_state else None
    mask = torch.tensor([[int(digit) for digit in row] for row in MASKS], device=DEVICE)
    seen = mask.bool() if masked else torch.ones_like(mask, dtype=torch.bool)
    idx = labels(b, l) if packed else torch.zeros_like(mask)

    rows = []  # what is seen of each row, each of its sequences by itself
    for row in range(b):
        row_u, label = u[row : row + 1, seen[row]], idx[row, seen[row]]
        borders = (label[1:] != label[:-1]).nonzero()[:, 0] + 1
        end, ys = None if state is None else Mamba2State(*(s[row : row + 1] for s in state)), []
        for i, part in enumerate(row_u.tensor_split(borders.cpu(), 1)):
            y, end = layer.step(part, end if i == 0 else None)
            ys.append(y[0])
        rows.append((torch.cat(ys), *end))
    expected = [torch.cat(parts) for parts in zip(*rows, strict=True)]

    others = [state, list(layer.parameters())]
    expected += gradients(expected, [u, others])
    # What masked positions hold is not heard: neither NaN, nor a label of their own.
    junk = u.detach().masked_fill(~seen[..., None], math.nan).requires_grad_()
    junk_idx = idx.masked_fill(~seen, 7) if packed else None
    for kind in (torch.bool, torch.int64, torch.float32) if masked else (None,):
        y, end = layer.step(junk, state, mask.to(kind) if masked else None, junk_idx)
        assert (y[~seen] == 0).all()
        found = [y[seen], *end]
        assert_close([*found, gradients(found, [junk, others])], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 4])
def test_masked_tokens_leave_the_state_as_it_is_to_the_last_bit(dtype, k):
    layer = make_layer(d_conv=k, bias=True).to(dtype)
    _, state = layer.step(layer_inputs(layer, 3, 7)[0].to(dtype))
    for l in (1, 2, 6):
        u = torch.full((3, l, 10), math.nan, dtype=dtype, device=DEVICE)
        y, after = layer.step(u, state, torch.zeros(3, l, device=DEVICE))
        assert (y == 0).all() and identical(after, state)


@pytest.mark.parametrize("b, l", [(0, 3), (2, 0), (0, 0)])
def test_no_rows_and_no_tokens_are_inputs_too(b, l):
    layer = make_layer()
    u, state = layer_inputs(layer, b, l)
    full, idx = torch.ones(b, l, device=DEVICE), torch.zeros(b, l, dtype=torch.int, device=DEVICE)
    for start in (None, state):
        for mask, seq_idx in ((None, None), (full, None), (None, idx), (full, idx)):
            y, after = layer.step(u, start, mask, seq_idx)
            zeros = [torch.zeros_like(part) for part in state]
            assert y.shape == (b, l, 10) and identical(after, start or zeros)
            assert all((g == 0).all() for g in gradients(y, list(layer.parameters())))


@pytest.mark.parametrize("what", [*FORMS, "layer", "masked layer"])
def test_no_output_depends_on_what_comes_later(what):
    l, layer = 11, make_layer()
    if what in FORMS:
        inputs = ssd_inputs(1, l, 4, 3, 2, 5)
        given, (y, _) = [inputs[k] for k in ("x", "dt", "B", "C")], what(**inputs, chunk_size=4)
    else:
        mask = torch.arange(l, device=DEVICE)[None] != 3 if what == "masked layer" else None
        u, _ = layer_inputs(layer, 1, l)
        given, y = [u], layer(u, mask=mask)
    for t in (0, 2, 4, 7, 10):
        found = torch.autograd.grad(y[:, t].square().sum(), given, retain_graph=True)
        assert all((gradient[:, t + 1 :] == 0).all() for gradient in found)  # exactly
        assert (found[0][:, [0, t]] != 0).any(-1).all()  # but it does on what came before


@torch.no_grad()
@pytest.mark.parametrize("l", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_state_that_is_given_in_half_precision_stays_in_it(dtype, l):
    layer = Mamba2(d_model=16, d_state=16, headdim=16).to(DEVICE, dtype)
    u = torch.randn(2, 6, 16, device=DEVICE).to(dtype)
    _, (conv, ssm) = layer.step(u)
    y, exact = layer.step(u[:, :l], Mamba2State(conv, ssm))
    assert ssm.dtype == exact.ssm.dtype == torch.float32
    half_y, half = layer.step(u[:, :l], Mamba2State(conv, ssm.to(dtype)))
    assert half.ssm.dtype == dtype
    epsilon = torch.finfo(dtype).eps  # the state is rounded twice, and y follows it
    assert_close([half.ssm, half_y], [exact.ssm, y], 4 * epsilon)


def test_a_layer_in_half_precision_keeps_its_state_in_float32():
    exact = Mamba2(d_model=32, d_state=16, headdim=8, ngroups=2).to(DEVICE)
    u = torch.randn(2, 100, 32, device=DEVICE)
    half = copy.deepcopy(exact).bfloat16()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        cast = in_pieces(lambda piece, state: exact.step(u[:, piece], state), 100, None, [99])
        assert_close(exact(u.bfloat16()), cast[0], 0.02)  # is cast as float32 is
    for y, state in (half.step(u.bfloat16()), cast):
        dtypes = [tensor.dtype for tensor in (y, *state)]
        assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32]
        # About ten roundings of 2^-9 (weights, input, projections, convolution, norm) in a row.
        assert_close(y, exact(u), 0.02)
    conv, ssm = state
    for mask in (None, torch.ones(2, 100, device=DEVICE)):  # conv's dtype is the layer's
        _, after = half.step(u.bfloat16(), Mamba2State(conv.float(), ssm.double()), mask)
        assert [tensor.dtype for tensor in after] == [torch.bfloat16, torch.float64]


def test_steps_and_decays_of_a_layer_in_half_precision_have_the_digits_of_float32(monkeypatch):
    layer = Mamba2(d_model=16, headdim=8).to(DEVICE, torch.bfloat16)
    u, seen = torch.randn(2, 9, 16, device=DEVICE).bfloat16(), []

    def watched(x, dt, A, *others, **options):
        seen.extend([dt, A])
        return ssd(x, dt, A, *others, **options)

    monkeypatch.setattr(mamba2, "kernels", None)
    monkeypatch.setattr(mamba2, "ssd", watched)
    layer(u)
    dt = layer.in_proj(u)[..., -4:].float() + layer.dt_bias.float()
    assert identical(seen, [F.softplus(dt), -layer.A_log.float().exp()])


def test_a_step_runs_the_hooks_of_the_layer():
    layer, calls = make_layer(), []
    layer.register_forward_hook(lambda *given: calls.append(1))
    layer.step(layer_inputs(layer, 1, 3)[0])
    assert calls == [1]


def test_a_projection_may_hold_its_weights_in_another_dtype():
    class Quantised(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.weight = (16 * linear.weight).detach().round().to(torch.int8)

        def forward(self, u):
            return F.linear(u, self.weight.to(u.dtype) / 16)

    layer = make_layer()
    u, state = layer_inputs(layer, 2, 5)
    layer.in_proj = Quantised(layer.in_proj)
    assert_close(layer.step(u, state), layer_by_hand(layer, u, state))
    Quantised.weight = lambda self: None  # as torch.ao's quantised projections have it
    weight = layer.in_proj.__dict__.pop("weight")
    Quantised.forward = lambda self, u: F.linear(u, weight.to(u.dtype) / 16)
    assert_close(layer.step(u, state), layer_by_hand(layer, u, state))


def test_a_decoded_token_costs_the_same_memory_after_ten_tokens_and_a_thousand():
    layer, sizes = make_layer(), []
    u = layer_inputs(layer, 1, 1000)[0].detach()
    with torch.no_grad():
        for context in (9, 999):
            _, state = layer.step(u[:, :context])
            with Bytes() as tracker:
                _, state = layer.step(u[:, :1], state)
            sizes.append([tracker.peak, *(part.untyped_storage().nbytes() for part in state)])
    assert sizes[0] == sizes[1]
    assert sizes[0][1:] == [8 * 3 * (20 + 2 * 2 * 5), 8 * 4 * 5 * 5]


def test_a_graph_of_the_layer_is_captured_whole_and_is_right():
    layer = make_layer()
    seq_idx = torch.tensor([[0] * 4 + [1] * 6, [0] * 7 + [1] * 3], device=DEVICE)
    mask = torch.tensor([[0, 0] + [1] * 8, [1, 0] * 5], device=DEVICE)
    step = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    for l, extra in ((10, ()), (10, (mask, seq_idx)), (1, ())):
        u, state = layer_inputs(layer, 2, l)
        found = step(u, state, *extra)
        assert isinstance(found[1], Mamba2State)
        expected = layer.step(u, state, *extra)
        assert_same(found, expected, [u, state, list(layer.parameters())])


BAD_LAYER = {
    "u without a batch": (dict(u=(5, 10)), ValueError, "(5, 10)"),
    "u of another width": (dict(u=(2, 5, 9)), ValueError, "(2, 5, 9)"),
    "mask of another length": (dict(mask=(2, 6)), ValueError, "(2, 6)"),
    "mask without a batch": (dict(mask=(5,)), ValueError, "(5,)"),
    "mask of attention": (dict(mask=(2, 5, 5)), ValueError, "(2, 5, 5)"),
    "seq_idx of another batch": (dict(seq_idx=(1, 5)), ValueError, "(1, 5)"),
    "conv state too long": (dict(conv=(2, 4, 40)), ValueError, "(2, 4, 40)"),
    "conv state of other channels": (dict(conv=(2, 3, 41)), ValueError, "(2, 3, 41)"),
    "conv state of another batch": (dict(conv=(1, 3, 40)), ValueError, "(1, 3, 40)"),
    "ssm state of another batch": (dict(ssm=(1, 4, 5, 5)), ValueError, "(1, 4, 5, 5)"),
    "ssm state of other heads": (dict(ssm=(2, 2, 5, 5)), ValueError, "(2, 2, 5, 5)"),
    "seq_idx that is not integers": (dict(seq_idx=(2, 5)), TypeError, "float"),
}


@pytest.mark.parametrize("case", BAD_LAYER)
def test_the_layer_refuses_what_does_not_fit(case):
    changes, error, part_of_message = BAD_LAYER[case]
    shapes = dict(u=(2, 5, 10), conv=(2, 3, 40), ssm=(2, 4, 5, 5), mask=(2, 5)) | changes
    given = {name: torch.ones(shape, **DRAW) for name, shape in shapes.items()}
    state = Mamba2State(given.pop("conv"), given.pop("ssm"))
    with pytest.raises(error, match="must") as raised:
        make_layer().step(state=state, **given)
    assert part_of_message in str(raised.value)


# ---- Initialisation and optimiser groups ---------------------------------------------------------


def test_a_layer_alone_is_initialised_as_in_the_original():
    with DEVICE:
        layer = Mamba2(d_model=512, headdim=1, d_state=2)  # 1024 heads, to see distributions
        biased = Mamba2(d_model=8, headdim=4, bias=True)
        other = Mamba2(d_model=64, headdim=1, dt_min=0.02, dt_max=0.5, dt_init_floor=0.1)
    A, dt, slack = layer.A_log.exp(), F.softplus(layer.dt_bias), 1e-5  # of float32's exp and log
    assert 1 - slack < A.min() < 1.2 and 15.8 < A.max() < 16 * (1 + slack)
    assert 0.001 * (1 - slack) < dt.min() < 0.0011 and 0.09 < dt.max() < 0.1 * (1 + slack)
    # Uniform, and log-uniform: the means of 1024 draws, within five standard deviations.
    assert abs(A.mean() - 8.5) < 5 * 15 / 12**0.5 / 32
    assert abs(dt.log().mean() - math.log(0.01)) < 5 * math.log(100) / 12**0.5 / 32
    dt = F.softplus(other.dt_bias)
    assert 0.1 * (1 - slack) < dt.min() < 0.1 * (1 + slack) and 0.3 < dt.max() < 0.5 * (1 + slack)
    assert (layer.D == 1).all() and (layer.norm.weight == 1).all()
    assert (biased.in_proj.bias == 0).all() and (biased.out_proj.bias == 0).all()
    bounds = {"in_proj.weight": 512, "out_proj.weight": 1024, "conv1d.weight": 4, "conv1d.bias": 4}
    for name, fan_in in bounds.items():
        scaled = layer.get_parameter(name) * fan_in**0.5  # uniform in [-1, 1]
        assert 0.99 < scaled.abs().max() < 1 + slack and abs(scaled.mean()) < 0.05
    y = layer(torch.randn(2, 50, 512, device=DEVICE))
    assert 0.01 < y.std() < 1  # neither vanishing nor exploding, nor NaN


def test_initialisation_follows_the_seed_and_scales_out_proj_by_depth():
    layer, states = Mamba2(d_model=16, headdim=4, bias=True).to(DEVICE), []
    for depth in (1, 1, 9):
        for parameter in layer.parameters():
            nn.init.constant_(parameter, math.nan)
        torch.manual_seed(1)
        layer.reset_parameters(depth)
        states.append(copy.deepcopy(layer.state_dict()))
    first, again, deep = states
    assert identical(first, again)
    deep["out_proj.weight"] *= 9**0.5
    assert_close(deep, first, 1e-6)  # a few roundings of float32


def test_optimiser_groups_hold_every_parameter_once_and_exempt_the_right_ones():
    model = nn.Module()
    model.embeddings = nn.Embedding(7, 8)
    model.block = mamba2.Mamba2Block(Mamba2Config(d_model=8, headdim=4, bias=True))
    model.head = nn.Linear(8, 7)
    model.head.weight = model.embeddings.weight  # tied
    model.frozen = nn.Linear(8, 8).requires_grad_(False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay, exempt = mamba2.parameter_groups(model, 0.1)
    assert (decay["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    decaying = "conv1d.weight in_proj.weight out_proj.weight".split()
    decaying = ["embeddings.weight", *(f"block.mixer.{name}" for name in decaying)]
    assert sorted(names[id(p)] for p in decay["params"]) == sorted(decaying)
    free = "A_log D dt_bias conv1d.bias in_proj.bias out_proj.bias norm.weight".split()
    free = ["block.norm.weight", "head.bias", *(f"block.mixer.{name}" for name in free)]
    assert sorted(names[id(p)] for p in exempt["params"]) == sorted(free)


# ---- Configuration -------------------------------------------------------------------------------

TWO_NAMES = {
    ("hidden_size", "d_model"): 96,
    ("num_hidden_layers", "n_layer"): 3,
    ("state_size", "d_state"): 17,
    ("head_dim", "headdim"): 32,
    ("n_groups", "ngroups"): 2,
    ("num_heads", "nheads"): 24,
    ("conv_kernel", "d_conv"): 5,
    ("use_bias", "bias"): True,
    ("use_conv_bias", "conv_bias"): False,
    ("time_step_limit", "dt_limit"): (0.5, 2.0),
    ("time_step_min", "dt_min"): 0.01,
    ("time_step_max", "dt_max"): 0.2,
    ("time_step_floor", "dt_init_floor"): 0.003,
    ("layer_norm_epsilon", "norm_epsilon"): 0.125,
    ("tie_word_embeddings", "tie_embeddings"): False,
}


@pytest.mark.parametrize("names", TWO_NAMES, ids=" = ".join)
def test_an_option_has_two_names(names):
    for given in names:
        config = Mamba2Config(**{given: TWO_NAMES[names]})
        assert [getattr(config, name) for name in names] == 2 * [TWO_NAMES[names]]
        setattr(config, given, 77)
        assert [getattr(config, name) for name in names] == [77, 77]
    with pytest.raises(TypeError, match="one option"):
        Mamba2Config(**dict.fromkeys(names, TWO_NAMES[names]))


def test_the_defaults_are_those_of_mamba2_130m():
    config = Mamba2Config(d_model=768)
    shapes = {name: tuple(value.shape) for name, value in Mamba2(config).state_dict().items()}
    assert shapes == {
        "dt_bias": (24,),
        "A_log": (24,),
        "D": (24,),
        "in_proj.weight": (3352, 768),
        "conv1d.weight": (1792, 1, 4),
        "conv1d.bias": (1792,),
        "norm.weight": (1536,),
        "out_proj.weight": (768, 1536),
    }
    sizes = dict(n_layer=24, vocab_size=50288, d_state=128, headdim=64, ngroups=1, expand=2)
    sizes |= dict(nheads=24, d_conv=4, chunk_size=256, bias=False, conv_bias=True)
    sizes |= dict(dt_limit=(0, math.inf), dt_min=0.001, dt_max=0.1, dt_init_floor=1e-4)
    sizes |= dict(norm_epsilon=1e-5, residual_in_fp32=True, tie_embeddings=True, use_cache=True)
    sizes |= dict(bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.02)
    assert {name: getattr(config, name) for name in sizes} == sizes


def test_a_layer_takes_options_or_a_config_of_any_sizes_that_fit():
    for options in (
        dict(d_model=7, headdim=2, expand=2, d_state=3),
        dict(d_model=24, expand=1.5, headdim=9),
        dict(d_model=3, expand=5, headdim=15, d_conv=1),
        dict(d_model=30, n_groups=3, head_dim=10, num_heads=6, chunk_size=7),
        dict(d_model=6, ngroups=4, headdim=1, nheads=12, d_conv=9),
        dict(d_model=4, headdim=2, dt_min=0.1, dt_max=0.1, dt_limit=(0.1, 0.1)),
    ):
        layer, other = Mamba2(**options).to(DEVICE), Mamba2(Mamba2Config(**options)).to(DEVICE)
        other.load_state_dict(layer.state_dict())
        u = torch.randn(2, 5, options["d_model"], device=DEVICE)
        y = layer(u)
        assert y.shape == u.shape and y.isfinite().all() and torch.equal(y, other(u))


def test_a_layer_is_made_on_a_device_and_in_a_dtype_as_any_other():
    layer = Mamba2(d_model=32, headdim=8, device="meta", dtype=torch.bfloat16)
    linear = nn.Linear(32, 32, device="meta", dtype=torch.bfloat16)
    for parameter in layer.parameters():
        assert (parameter.device, parameter.dtype) == (linear.weight.device, linear.weight.dtype)
    assert Mamba2(d_model=32, headdim=8, dtype=torch.float64).A_log.dtype == torch.float64


IMPOSSIBLE = {
    "hidden_size": [0, -1, 2.5, True, "768", [768]],
    "num_hidden_layers": [0],
    "vocab_size": [0, 1.0],
    "state_size": [0, -4],
    "head_dim": [0, 2.0],
    "n_groups": [0, 5, 48, "2"],
    "conv_kernel": [0],
    "chunk_size": [0, 2.5],
    "expand": [0, -2, math.inf, math.nan, "2"],
    "num_heads": [23, 0, 24.0, "24"],
    "hidden_act": ["gelu", "relu", None],
    "use_conv_bias": [1],
    "residual_in_fp32": ["no"],
    "tie_word_embeddings": [None],
    "time_step_limit": [(1.0, 0.5), (-1.0, 1.0), (0.0, 1.0, 2.0), (0.0,), (math.nan, 1.0)]
    + [None, 5, "12", ("low", 1.0), ({}, 1.0), ("0.0", "1.0"), (False, True)],
    "time_step_min": [0, -0.1, 0.5, "0.001"],
    "time_step_floor": [-1e-4],
    "layer_norm_epsilon": [0, -1e-5, math.nan],
    "initializer_range": [-0.02],
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_sizes_are_errors_that_say_what_would_do(name):
    for value in IMPOSSIBLE[name]:
        with pytest.raises(ValueError, match="must|only") as raised:
            Mamba2Config(**{name: value})
        assert str(raised.value).startswith(f"{name} = {value!r}: ")
        config = Mamba2Config(d_model=768)
        setattr(config, name, value)  # a config that was spoilt later is no better
        with pytest.raises(ValueError, match=f"{name} = "):
            Mamba2(config)


def test_options_that_do_not_fit_or_exist_are_errors():
    with pytest.raises(ValueError, match=r"num_heads = 15: .* 15 \* 100 must .* 2 \* 768 = 1536"):
        Mamba2Config(head_dim=100)
    with pytest.raises(ValueError, match=r"num_heads = 5: .* 1\.5 \* 7 = 10\.5"):
        Mamba2Config(d_model=7, expand=1.5, headdim=2)
    with pytest.raises(TypeError, match="'d_modell'"):
        Mamba2Config(d_modell=64)
    with pytest.raises(TypeError, match="'model_type'"):
        Mamba2Config(model_type="llama")
    assert Mamba2Config(attn_implementation="eager").d_model == 768  # which all models are asked
    with pytest.raises(TypeError, match="'use_mem_eff_path'"):
        Mamba2(d_model=64, headdim=8, use_mem_eff_path=True)
    config = Mamba2Config(d_model=64)
    for arguments, options in (((64,), {}), ((config,), dict(d_model=64)), (({},), {})):
        with pytest.raises(TypeError, match="Mamba2Config"):
            Mamba2(*arguments, **options)


NO_CONFIG = {
    r"config = \[64\]: must be a dict": [64],
    "d_inner = 512: only None is implemented": dict(d_model=64, d_inner=512),
    "ssm_cfg = 'Mamba2': must be a dict": dict(ssm_cfg="Mamba2"),
    "d_model = None: must be an integer": dict(ssm_cfg=dict(layer="Mamba2")),
    "vocab_size = '61': must be an integer": dict(vocab_size="61"),
    "n_layer = '2': must be an integer": dict(n_layer="2"),
    "pad_vocab_size_multiple = 0: must be an integer": dict(pad_vocab_size_multiple=0),
    "pad_vocab_size_multiple = '8': must be an integer": dict(pad_vocab_size_multiple="8"),
    "state_size = '16': must be an integer": dict(ssm_cfg=dict(layer="Mamba2", d_state="16")),
}


@pytest.mark.parametrize("message", NO_CONFIG)
def test_a_file_that_holds_no_configuration_is_an_error_that_says_so(message):
    given = NO_CONFIG[message]
    original = dict(d_model=32, n_layer=2, vocab_size=61, ssm_cfg=dict(layer="Mamba2", headdim=8))
    whole = isinstance(given, list) or "d_inner" in given or given.keys() == {"ssm_cfg"}
    if not whole or "state_size" in message:
        given = original | given
    with pytest.raises(ValueError, match=message):
        Mamba2Config.from_dict(given)


# What flash-linear-attention writes, in short.
FLA = dict(model_type="mamba2", num_heads=24, head_dim=64, hidden_size=768, n_groups=1)
FLA |= dict(norm_eps=1e-3, rmsnorm=True, norm_before_gate=False, D_has_hdim=False, fuse_norm=True)
FLA |= dict(dt_limit=[0.0, 0.5], A_init_range=[1, 16], tie_word_embeddings=False)
CHANGES = dict(rms_norm=[False], rmsnorm=[False, None], norm_before_gate=[True])
CHANGES |= dict(D_has_hdim=[True], activation=["gelu"], hidden_act=["gelu", "relu"], d_ssm=[32])
CHANGES |= dict(attn=[dict(layers=[1])], attn_layer_idx=[[1]], d_intermediate=[64], layer=["S4"])


@pytest.mark.parametrize("name", CHANGES)
def test_an_option_that_changes_the_results_is_refused_by_name_in_every_format(name):
    config = Mamba2Config.from_dict(FLA)
    assert (config.layer_norm_epsilon, config.time_step_limit) == (1e-3, (0.0, 0.5))
    assert not config.tie_word_embeddings and config.num_heads == 24
    of_transformers = dict(model_type="mamba2", num_heads=24, hidden_size=768)
    of_original = dict(d_model=768, n_layer=2, vocab_size=61)
    for value in CHANGES[name]:
        given = {name: value}
        formats = [
            {**FLA, **given},
            given,
            {**of_original, "ssm_cfg": dict(layer="Mamba2") | given},
        ]
        formats += [{**of_original, "ssm_cfg": dict(layer="Mamba2")} | given]
        if name != "norm_before_gate":  # which transformers' Mamba-2 writes, and never reads
            formats += [of_transformers | given]
        if name == "layer":  # is an option of ssm_cfg only, where it comes first
            formats = formats[:3]
        if name == "hidden_act":  # is an option of all but ssm_cfg
            formats.pop(2)
        for options in formats:
            with pytest.raises(ValueError, match=f"{name} = .*only .* is implemented"):
                Mamba2Config.from_dict(options)


def test_options_that_say_the_same_in_other_words_are_read():
    assert Mamba2Config(hidden_act="swish").num_heads == 24
    for given in (dict(use_bias=True), dict(bias=True), dict(use_bias=False), dict(bias=False)):
        for more in ({}, dict(model_type="mamba2", num_heads=24, hidden_size=768)):
            assert Mamba2Config.from_dict(given | more).use_bias == [*given.values()][0]
    assert Mamba2Config.from_dict(
        dict(attn=None, d_ssm=None, attn_layer_idx=None, d_intermediate=0)
    )
    for given in (dict(d_model=64, hidden_size=128), {**FLA, "layer_norm_epsilon": 1e-6}):
        with pytest.raises(TypeError, match="are one option"):
            Mamba2Config.from_dict(given)


# ---- Importing, in interpreters of its own -------------------------------------------------------


def clone(folder, *names):
    """Copy files of the project into a folder, and return the folder."""
    folder.mkdir(parents=True)
    for name in names:
        shutil.copy(Path(mamba2.__file__).with_name(name), folder)
    return folder


def run_python(code, folder, *path):
    """Run code in a fresh interpreter in a folder, which comes first on its path, then `path`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-c", textwrap.dedent(code) + "\nprint('reached the end')"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("reached the end\n"), done.stderr


def test_layer_and_ssd_need_torch_and_einops_alone_wherever_the_files_lie(tmp_path):
    clone(tmp_path / "mypackage", "mamba2.py", "kernels.py").joinpath("__init__.py").touch()
    clone(tmp_path / "alone", "mamba2.py").joinpath("__init__.py").touch()
    for name, content in {"broken": "import missing_part", "empty": ""}.items():
        (tmp_path / name / "transformers").mkdir(parents=True)
        (tmp_path / name / "transformers" / "__init__.py").write_text(content)
    code = """
        import importlib, sys
        import pytest
        sys.modules["transformers"] = sys.modules["triton"] = None  # importing them now fails
        import torch
        import alone.mamba2, mypackage.mamba2

        # The file alone is plain PyTorch; with its sidecar it loads that, under a name of its own.
        assert alone.mamba2.kernels is None
        sidecar = mypackage.mamba2.kernels
        assert sidecar.__file__ == mypackage.__path__[0] + "/kernels.py" and sidecar.takes_ssd
        assert sidecar.__name__ == "mypackage.mamba2_kernels" and "kernels" not in sys.modules
        assert sys.modules[sidecar.__name__] is sidecar

        for module in (alone.mamba2, mypackage.mamba2):
            Mamba2, Mamba2Config, ssd = module.Mamba2, module.Mamba2Config, module.ssd
            one = torch.ones(1, 1, 1, 1)
            y, state = ssd(one, one[0], -one[0, 0, 0], one, one)
            assert y.item() == state.item() == 1

            config = Mamba2Config(d_model=16, headdim=8, n_groups=2)
            config.d_state = 24
            assert (config.hidden_size, config.ngroups, config.state_size) == (16, 2, 24)
            for options, error in {"d_modell": TypeError, "hidden_size": TypeError}.items():
                with pytest.raises(error):
                    Mamba2Config(d_model=16, **{options: 16})
            with pytest.raises(ValueError, match="head_dim"):
                Mamba2Config(d_model=16, headdim=5)
            with pytest.raises(AttributeError, match="no_such_option"):
                config.no_such_option

            layer, u, losses = Mamba2(config), torch.randn(2, 9, 16), []
            optimizer = torch.optim.AdamW(module.parameter_groups(layer, 0.1), lr=0.01)
            for _ in range(20):
                losses.append((layer(u) - u).square().mean())
                optimizer.zero_grad()
                losses[-1].backward()
                optimizer.step()
            assert losses[-1] < 0.9 * losses[0]

            for use in (
                lambda: module.Mamba2ForCausalLM(config),
                lambda: module.Mamba2Model(config),
            ):
                with pytest.raises(ImportError, match="needs transformers: pip install"):
                    use()
            model, ids = module.Mamba2LM(config), torch.tensor([[1, 2, 3]])
            logits, states = model(ids)
            last, _ = model(ids[:, 2:], model(ids[:, :2])[1])
            assert torch.allclose(last, logits[:, 2:], atol=1e-5)

        # A transformers that is too old to have what it takes is as good as none; but one that
        # lacks something that it needs is broken, and that must be seen.
        for folder in ("empty", "broken"):
            sys.modules.pop("transformers", None)
            sys.modules.pop("alone.mamba2", None)
            sys.path.insert(0, folder)
            if folder == "empty":
                assert importlib.import_module("alone.mamba2").transformers is None
            else:
                with pytest.raises(ModuleNotFoundError) as raised:
                    importlib.import_module("alone.mamba2")
                assert raised.value.name == "missing_part"
            sys.path.remove(folder)
    """
    run_python(code, tmp_path)


IMPORT_IN_THE_CLONE = """
    import importlib.util, sys
    import kernels  # by somebody who means Hugging Face's
    {check}
    from transformers import PreTrainedModel  # asks for Hugging Face's kernels, and their version
    from mamba2 import Mamba2, Mamba2Config, Mamba2ForCausalLM, ssd
    import mamba2
    assert mamba2.kernels.__file__ == {folder!r} + "/kernels.py" and mamba2.kernels.takes_ssd
    assert mamba2.kernels.__name__ == "mamba2_kernels"
    assert sys.modules["kernels"] is kernels is not mamba2.kernels
    assert issubclass(Mamba2ForCausalLM, PreTrainedModel)
    for name in ("once", "again"):  # nothing in it, such as an operator's name, can be taken once
        spec = importlib.util.spec_from_file_location(name, {folder!r} + "/kernels.py")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


def test_the_clone_leaves_the_name_kernels_to_hugging_faces_package(tmp_path):
    pytest.importorskip("transformers")
    from transformers.utils import import_utils

    folder, site = clone(tmp_path / "clone", "mamba2.py", "kernels.py"), tmp_path / "site"
    # A stand-in of a version that this transformers takes, with the name that it failed for, and
    # all others: what it imports at once are types and decorators.
    version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.18.2")
    stand_in = """
        class Anything(type):
            def __getattr__(self, name):
                return self
        class CUDAProperties(metaclass=Anything):
            def __new__(cls, *args, **options):
                return lambda same: same
        def __getattr__(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return CUDAProperties
    """
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(textwrap.dedent(stand_in))
    (site / f"kernels-{version}.dist-info").mkdir()
    metadata = site / f"kernels-{version}.dist-info" / "METADATA"
    metadata.write_text(f"Name: kernels\nVersion: {version}\n")
    check = f"assert kernels.CUDAProperties and kernels.__file__.startswith({str(site)!r})"
    run_python(IMPORT_IN_THE_CLONE.format(check=check, folder=str(folder)), folder, site)


def test_the_clone_works_without_hugging_faces_package_kernels(tmp_path):
    pytest.importorskip("transformers")
    if any(importlib.metadata.distributions(name="kernels")):
        pytest.skip("Hugging Face's kernels is installed here; the test before this one covers it")
    folder = clone(tmp_path / "clone", "mamba2.py", "kernels.py")
    check = "assert kernels.takes_ssd; from packaging.version import parse; "
    check += "parse(kernels.__version__)  # transformers does so"
    other = clone(tmp_path / "other", "mamba2.py", "kernels.py")  # a second copy is none, either
    run_python(IMPORT_IN_THE_CLONE.format(check=check, folder=str(folder)), folder, other)


# --------------------------------------------------------------------------------------------------
# The language model, in transformers
# --------------------------------------------------------------------------------------------------

ROOT = Path(mamba2.__file__).resolve().parent
# transformers' own Mamba-2 convolves with cuDNN, which would round float32 to TF32.
torch.backends.cudnn.allow_tf32 = False
# The models below are so small that threads would only wait for each other, five times as long.
torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

F32 = 1e-4  # relative: what two orders of summation in float32 leave, after a few layers
F64 = 1e-10  # relative: the same in float64, with room for gradients, which cancel
VOCABULARY = 64
TINY = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    state_size=16,
    head_dim=8,
    chunk_size=8,
    initializer_range=0.2,
)
ALL = dict(n_groups=2, use_bias=True, time_step_limit=(0.01, 0.1))  # every option that may leak
GREEDY = dict(do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)


# ---------------------------------------------------------------------------------------- helpers


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
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocabulary, shape, generator=generator).to(DEVICE)


def assert_same_gradients(actual, expected, relative=F64):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert expected[name].abs().max() > 0, name
        assert_close(actual[name], expected[name], relative)


def model_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_state(actual, expected, relative=0.0):
    assert_close(actual.states, expected.states, relative)


def assert_same_model(actual, expected, relative=F32):
    """Equal weights, and equal logits but for rounding: loaded memory is aligned in another way."""
    weights, others = actual.state_dict(), expected.state_dict()
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert weight.dtype == others[name].dtype and torch.equal(weight, others[name]), name
    ids = tokens(2, 9).to(actual.device)
    assert_close(actual(ids)[0], expected(ids)[0], relative)


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def load(folder, kind=Mamba2ForCausalLM, **options):
    return kind.from_pretrained(folder, **options).to(DEVICE).eval()


def edit_json(path, **changes):
    """Change entries of a JSON file; None takes one out."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_weights(folder, **changes):
    """Change tensors of a checkpoint; None takes one out."""
    path = folder / "model.safetensors"
    weights = {**load_file(path), **changes}
    save_file({k: v for k, v in weights.items() if v is not None}, path, metadata={"format": "pt"})


def test_transformers_still_has_the_private_names_that_this_file_uses():
    """The first of the language model: what a new version lacks is named before it fails elsewhere.

    The names are those of a comment in mamba2.py, which lists all that it uses.
    """
    code, private = Path(mamba2.__file__).read_text(), r"(?<!\w)_[a-z]\w+"
    comment = code[code.index("# 6. transformers") :].split("\n\n")[0]
    of_torch = re.findall(r"torch\.[\w.]*\w", comment)
    listed = set(re.findall(private, comment))
    hooks = {name for name in listed if name.endswith("_hooks")}

    parts = transformers.modeling_utils, transformers.generation.utils, nn.Module
    there = set(re.findall(r"\w+", " ".join([*map(inspect.getsource, parts), *of_torch])))
    gone = [f"transformers {transformers.__version__}: {name}" for name in listed - hooks - there]
    of_torch += [f"torch.nn.Module().{name}" for name in hooks]
    of_torch += [f"torch.nn.modules.module._global{name}" for name in hooks]
    for name in of_torch:
        try:
            eval(name)
        except AttributeError:
            gone.append(f"torch {torch.__version__}: {name}")
    if not hasattr(peft.tuners.tuners_utils.BaseTunerLayer, "adapter_layer_names"):
        gone.append(f"peft {peft.__version__}: adapter_layer_names")
    assert not gone, "what mamba2.py uses is gone from " + ", from ".join(sorted(gone))

    used = set(re.findall(private, code.replace(comment, "")))
    own = set(re.findall(r"(?:^|def |class |self\.)(_[a-z]\w+)(?:\(|:| = )", code, re.M))
    bases = transformers.PreTrainedModel, transformers.GenerationMixin, nn.Module
    own = {name for name in own if not any(hasattr(base, name) for base in bases)}
    # Of NamedTuple, kernels.py, config.json and the original; parts of names.
    own |= {"_asdict", "_fields", "_allows_tf32", "_name_or_path", "_no_weight_decay"}
    own |= {f"_global{name}" for name in hooks} | {"_kernels", "_max"}
    assert used - own <= listed, f"a comment in mamba2.py does not list {used - own - listed}"


# ---------------------------------------------------------- the same as transformers' own Mamba-2

THEIR_CACHE = "cache" if mamba2.CACHE == "cache" else "cache_params"  # since transformers 5.24

their_groups_are_right = Version(transformers.__version__) > Version("5.20.2")
needs_groups = pytest.mark.skipif(
    not their_groups_are_right, reason="transformers <= 5.20.2 ignores groups in its gated norm"
)
VARIANTS = [
    pytest.param({}, id="tied"),
    pytest.param(dict(tie_word_embeddings=False), id="untied"),
    pytest.param(dict(use_bias=True, use_conv_bias=False, conv_kernel=2), id="biases"),
    pytest.param(dict(residual_in_fp32=False, layer_norm_epsilon=1e-2), id="residual"),
    pytest.param(dict(time_step_limit=(0.01, 0.1)), id="dt limit"),
    pytest.param(dict(n_groups=8, head_dim=4), id="8 groups", marks=needs_groups),
]


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 37, 300])
@pytest.mark.parametrize("options", VARIANTS)
def test_logits_and_loss_equal_those_of_transformers_own_mamba2(options, length, tmp_path):
    ours = tiny(chunk_size=256, **options)
    theirs = load(save(ours, tmp_path), transformers.Mamba2ForCausalLM)
    ids = tokens(2, length)
    mine, reference = ours(ids, labels=ids), theirs(ids, labels=ids)
    assert_close(mine.logits, reference.logits, F32)
    if length > 1:
        assert_close(mine.loss, reference.loss, F32)

    if "time_step_limit" in options:
        return  # theirs forgets the limit after the prompt
    past, their_past = mine.cache, theirs(ids, use_cache=True)[THEIR_CACHE]
    for step in range(3):
        new = tokens(2, 1, seed=step)
        mine = ours(new, past_key_values=past)
        past, reference = mine.cache, theirs(new, **{THEIR_CACHE: their_past})
        assert_close(mine.logits, reference.logits, F32)

    if not options.get("use_bias"):  # theirs lets a bias through the padding
        mask = torch.ones_like(ids)
        mask[0, : length // 3] = 0
        mine, reference = (model(ids, attention_mask=mask).logits for model in (ours, theirs))
        assert_close(mine[mask.bool()], reference[mask.bool()], F32)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_own_mamba2_saves_gives_the_same_logits_here(tied, tmp_path):
    torch.manual_seed(0)
    options = dict(num_heads=8, n_groups=1, tie_word_embeddings=tied, pad_token_id=5)
    config = transformers.Mamba2Config(**TINY, **options)
    theirs = transformers.Mamba2ForCausalLM(config).to(DEVICE).eval()
    ours = load(save(theirs, tmp_path))
    ids = tokens(2, 37)
    assert_close(ours(ids).logits, theirs(ids).logits, F32)
    assert ours.config.pad_token_id == 5
    # What a file in their format leaves out is what they take for it; our defaults are others.
    content = dict(model_type="mamba2", num_heads=16, head_dim=8, hidden_size=64)
    (tmp_path / "config.json").write_text(json.dumps(content))
    config, defaults = Mamba2Config.from_pretrained(tmp_path), transformers.Mamba2Config()
    for name in ("n_groups", "eos_token_id", "tie_word_embeddings", "initializer_range"):
        assert getattr(config, name) == getattr(defaults, name) != getattr(Mamba2Config(), name)


# ------------------------------------------------------------------- a cache, and what it promises


@torch.no_grad()
def test_one_call_and_any_split_into_calls_with_a_cache_give_the_same():
    model, ids = tiny(dtype=torch.float64, **ALL), tokens(3, 20)
    mask = torch.rand(3, 20, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.4
    seq_idx = torch.tensor([4] * 8 + [2] * 5 + [4] * 7, device=DEVICE).expand(3, 20)
    for given in ({}, dict(seq_idx=seq_idx), dict(attention_mask=mask, seq_idx=seq_idx)):
        whole = model(ids, use_cache=True, **given)
        for split in range(21):  # 8 and 13, where a sequence ends, among them
            past, logits = None, []
            for part in (slice(0, split), slice(split, split + 2), slice(split + 2, 20)):
                pieces = {name: value[:, part] for name, value in given.items()}
                output = model(ids[:, part], past_key_values=past, use_cache=True, **pieces)
                past = output.past_key_values
                logits.append(output.logits)
            exists = given.get("attention_mask", torch.ones_like(mask))
            assert_close(torch.cat(logits, 1)[exists], whole.logits[exists], F64)
            assert_same_state(past, whole.past_key_values, F64)
            assert past.get_seq_length() == 20


# Of one thing: transformers' name since 5.24, and the one before.
CACHE_NAMES = ["cache", "past_key_values"]


@torch.no_grad()
def test_cache_and_past_key_values_are_two_names_of_one_thing():
    model, ids, new = tiny(), tokens(2, 9), tokens(2, 3, seed=1)
    longer = torch.cat([ids, new], 1)
    for kind in (model, model.backbone):
        output = kind(ids)
        assert output.cache is output.past_key_values and output.cache.length == 9
        assert (
            kind(ids, use_cache=False).cache is None is kind(ids, use_cache=False).past_key_values
        )
        calls = [kind(new, **{name: output.cache}) for name in CACHE_NAMES]
        calls.append(kind(new, None, output.cache))
        assert all(torch.equal(call[0], calls[0][0]) for call in calls)
        assert not torch.equal(calls[0][0], kind(new)[0])
        back = copy.deepcopy(output)  # and made again of its fields, as by engines that cast them
        back = tree_map(lambda x: x, back)  # keeps transformers' own name alone, before 5.24
        assert type(back) is type(output) and back[mamba2.CACHE] is back.past_key_values is not None
    cache = model(ids).cache
    for name in CACHE_NAMES:
        assert_same_state(model.prefill(new, **{name: cache}), calls[0].cache, F32)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            text = model.generate(longer, **{name: cache}, **GREEDY)
        assert torch.equal(text, model.generate(longer, **GREEDY))
        stream = streamed(model, longer, **{name: cache}, **GREEDY)
        assert torch.equal(stream, text)


@torch.no_grad()
def test_a_cache_is_a_value_that_can_be_used_again():
    model, ids = tiny(), tokens(2, 9)
    cache = model(ids).past_key_values
    before = cache.map(torch.clone)
    once = model(tokens(2, 3, seed=1), past_key_values=cache)
    longer = torch.cat([ids, ids[:, :1]], 1)
    with_generate = [model.generate(longer, past_key_values=cache, **GREEDY) for _ in range(2)]
    again = model(tokens(2, 3, seed=1), past_key_values=cache)
    assert_same_state(cache, before)
    assert cache.length == 9 and once.past_key_values.length == 12
    assert torch.equal(once.logits, again.logits)
    assert torch.equal(*with_generate)
    assert torch.equal(with_generate[0], model.generate(longer, **GREEDY))
    with pytest.raises(ValueError, match="at least one token that the cache has not seen"):
        model.generate(ids, past_key_values=cache, **GREEDY)
    with pytest.raises(AttributeError):
        cache.length = 3


def test_segments_that_do_not_divide_keep_no_logits():
    model, ids = tiny().train(), tokens(2, 10)
    for length in (4, 64):
        output = model(ids, labels=ids, segment_length=length)
        assert output.logits is None and torch.isfinite(output.loss)
    for keep, kept in ((0, 10), (3, 3), (7, 7)):
        output = model(ids, labels=ids, segment_length=4, logits_to_keep=keep)
        assert_close(output.logits, model(ids).logits[:, -kept:], F32)
    model.config.output_hidden_states = True
    with pytest.raises(ValueError, match="output_hidden_states = True, segment_length = 4"):
        model(ids, labels=ids, segment_length=4)


def test_whatever_is_masked_disturbs_no_gradient():
    model, ids = tiny(dtype=torch.float64), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[1, 4] = 0
    gradients = []
    for fill in (0.0, torch.nan):
        embeddings = model.get_input_embeddings()(ids).detach()
        embeddings = embeddings.masked_fill(mask[..., None] == 0, fill).requires_grad_()
        model.zero_grad()
        model(attention_mask=mask, inputs_embeds=embeddings, labels=ids.int()).loss.backward()
        gradients.append([embeddings.grad, *(p.grad for p in model.backbone.layers.parameters())])
    assert identical(*gradients)


def test_mistakes_of_newcomers_are_answered(tmp_path):
    model, ids = tiny().cpu(), tokens(2, 9).cpu()  # a GPU is not asked which ids it was given
    cache, layer, u = model.prefill(ids), model.backbone.layers[0].mixer, torch.randn(2, 9, 32)
    right = torch.ones(2, 9).long()
    right[0, 7:] = 0
    junk = tmp_path / "junk.safetensors"
    junk.write_text("not of safetensors")
    save_file({"weight": u}, tmp_path / "weights.safetensors")
    on_a_cpu = [  # a GPU reports these later, and for good
        (lambda: model(ids + 64), IndexError, "index out of range"),
        (lambda: model(ids, labels=ids - 64), IndexError, "Target -.* is out of bounds"),
    ]
    for call, error, message in (
        (lambda: model(ids[0]), ValueError, r"input_ids has shape \(9,\): it must be \(b, l\)"),
        (lambda: model([[1, 2]]), TypeError, "input_ids is a list: it must be a tensor"),
        (lambda: model(ids.float()), TypeError, "input_ids is torch.float32: .* of integers"),
        (
            lambda: model(inputs_embeds=torch.zeros(2, 9, 31)),
            ValueError,
            r"inputs_embeds has shape \(2, 9, 31\): it must be \(b, l, 32\)",
        ),
        (lambda: model(ids, [[1] * 9] * 2), TypeError, "attention_mask is a list"),
        (lambda: model(ids, ids.repeat(1, 2)), ValueError, r"\(2, 18\): it must be \(2, 9\)$"),
        (lambda: model(ids, ids.repeat(1, 3), cache), ValueError, r"\(2, 27\): .* \(2, 9\)$"),
        (lambda: model(ids[:1], past_key_values=cache), ValueError, r"state.conv .* \(1, 3, 96\)"),
        (lambda: Mamba2Config(n_layers=3), TypeError, "no option 'n_layers'"),
        (lambda: Mamba2(d_model=64, layer_idx=3), TypeError, "no option 'layer_idx'"),
        (lambda: Mamba2(64), TypeError, r"config is a builtins.int.* Mamba2\(d_model=256\)"),
        (
            lambda: model.generate(ids, attention_mask=right),
            ValueError,
            r"mask\[0\] ends in 0.*left",
        ),
        (lambda: model.stream(ids, attention_mask=right), ValueError, "pad on the left"),
        (lambda: Mamba2Config(to_dict=3), TypeError, "no option 'to_dict'"),
        (lambda: Mamba2Config(use_bias="no"), ValueError, "use_bias = 'no': must be True or False"),
        (
            lambda: Mamba2ForCausalLM(transformers.Mamba2Config(num_hidden_layers=1)),
            TypeError,
            r"Mamba2Config.from_dict\(config.to_dict\(\)\) translates",
        ),
        (
            lambda: mamba2.rms_norm(torch.ones(2, 8), torch.ones(1), 1e-5),
            ValueError,
            r"weight has shape \(1,\): it must be \(8",
        ),
        (
            lambda: mamba2.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5, groups=3),
            ValueError,
            "groups = 3: it must divide the last axis of x, 8",
        ),
        *(on_a_cpu if not CUDA else []),
        (lambda: model(ids, ids - 1.0), ValueError, "other numbers than 0 and 1: .* == 0"),
        (lambda: layer(u, mask=u[..., 0]), ValueError, "mask holds other numbers than 0 and 1"),
        (lambda: layer(u.double()), TypeError, "u is torch.float64, the weights torch.float32"),
        (lambda: layer.step(u, layer.step(u)), ValueError, r"conv has .* must be \(2, 3, 96\)"),
        (lambda: layer.step(u, (u, u, u)), TypeError, "state is a tuple: it must be step's second"),
        (lambda: layer.step(u, u), TypeError, "state is a Tensor: it must be step's second result"),
        (lambda: model.stream("text"), TypeError, "input_ids is a str: it must be a tensor"),
        (lambda: cache.to(torch.int8), TypeError, "ssm would be torch.int8"),
        (lambda: Mamba2Cache.load(junk), ValueError, "holds no cache: it must be a file that"),
        (
            lambda: Mamba2Cache.load(tmp_path / "weights.safetensors"),
            ValueError,
            "weights.safetensors' holds no cache",
        ),
        (lambda: Mamba2Cache.load(tmp_path / "nothing"), FileNotFoundError, "nothing"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert torch.equal(layer(u, mask=torch.ones(2, 9)), layer(u))
    assert re.fullmatch(
        r"Mamba2Cache\(length=9, . layers of .* torch.float32, .* bytes\)", str(cache)
    )
    theirs = transformers.Mamba2Config(num_hidden_layers=1).to_dict()
    assert Mamba2Config.from_dict(theirs).num_hidden_layers == 1
    half = cache.to(dtype=torch.bfloat16)
    assert [t.dtype for t in half.states[0]] == [torch.float32, torch.bfloat16]


@torch.no_grad()
def test_what_is_not_asked_for_takes_no_memory():
    ids, peaks = tokens(1, 200), []
    for n_layer in (2, 6):
        model = tiny(num_hidden_layers=n_layer)
        with Bytes() as watch:
            model(ids, use_cache=False, logits_to_keep=1)
        # Views of the weights count among the bytes; states and hidden states would come on top.
        peaks.append(watch.peak - sum(p.nbytes for p in model.parameters()))
    assert peaks[1] <= peaks[0]


@torch.no_grad()
def test_a_cache_can_be_forked_selected_moved_and_mapped():
    model, ids = tiny(), tokens(2, 9)
    seq_idx = torch.tensor([[1] * 9, [2] * 9], device=DEVICE)
    cache = model(ids, seq_idx=seq_idx).past_key_values
    new = tokens(6, 4, seed=1)
    forked = model(new, past_key_values=cache.repeat(3)).logits
    whole = model(torch.cat([ids.repeat_interleave(3, 0), new], 1)).logits[:, 9:]
    assert_close(forked, whole, F32)

    chosen = torch.tensor([1, 0, 1])
    selected = cache.select(chosen)
    assert_same_state(selected, model(ids[chosen]).past_key_values, F32)
    assert selected.seq_idx[:, 0].tolist() == [2, 1, 2] and selected.length == 9
    assert identical(cache.select([1, 0, 1]).states, selected.states)
    assert cache.nbytes == 4 * sum(s.conv.numel() + s.ssm.numel() for s in cache.states)
    assert cache.repeat(3).nbytes == 3 * cache.nbytes
    moved = cache.to("cpu")
    assert {t.device.type for t in (moved.seq_idx, *tensors(moved.states))} == {"cpu"}
    doubled = cache.map(lambda tensor: 2 * tensor)
    assert torch.equal(doubled.states[1].ssm, 2 * cache.states[1].ssm)
    assert torch.equal(doubled.seq_idx, 2 * cache.seq_idx)
    sizes = [
        sum(t.numel() for s in c.states for t in s)
        for c in (cache, model(ids[:, :1])["past_key_values"])
    ]
    assert sizes[0] == sizes[1]


@torch.no_grad()
def test_rows_of_a_cache_are_chosen_as_rows_of_a_tensor():
    cache = tiny()(tokens(3, 9), seq_idx=tokens(3, 9)).cache
    for rows in ([2, 0, 2], [-1], [True, False, True], [], 1, torch.tensor([1, -3])):
        found, index = cache.select(rows), torch.as_tensor(rows).reshape(-1).to(DEVICE)
        index = index if len(index) else index.long()
        expected = [t[index] for t in tensors(cache.states)]
        assert identical(tensors(found.states), expected)
        assert torch.equal(found.seq_idx, cache.seq_idx[index]) and found.length == 9
    for rows in ([3], [True], [0.5]):
        with pytest.raises(IndexError):
            cache.select(rows)


@torch.no_grad()
def test_requests_of_different_prompts_become_one_batch_and_go_on_as_alone():
    model = tiny(dtype=torch.float64, **ALL)
    texts = [tokens(1, 4), tokens(2, 9, seed=1), tokens(1, 6, seed=2)]
    alone = [model.generate(ids, **GREEDY)[:, ids.shape[1] :] for ids in texts]
    for labelled in (False, True):
        caches = []
        for i, ids in enumerate(texts):
            read = ids[:, :-1]
            caches.append(model(read, seq_idx=0 * read + i if labelled else None).cache)
        joined = Mamba2Cache.cat(cache for cache in caches)
        assert joined.get_seq_length() == 8
        assert not labelled or joined.seq_idx[:, 0].tolist() == [0, 1, 1, 2]
        whole = torch.cat([F.pad(ids, (9 - ids.shape[1], 0)) for ids in texts])
        found = model.generate(whole, attention_mask=whole > 0, cache=joined, **GREEDY)
        assert torch.equal(found[:, 9:], torch.cat(alone))
        new = model.generate(whole[:, -1:], attention_mask=whole > 0, cache=joined, **GREEDY)
        assert torch.equal(new[:, 1:], torch.cat(alone))
    with pytest.raises(ValueError, match="some caches have a seq_idx and some have none"):
        Mamba2Cache.cat([caches[0], model.prefill(texts[0])])


def chooses_rows(dtype):
    try:
        return len(torch.zeros(2, device=DEVICE).to(dtype)[torch.tensor([0])]) == 1
    except RuntimeError:
        return False


STATE_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
STATE_DTYPES += [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(
            not chooses_rows(dtype),
            reason=f"torch {torch.__version__} chooses no rows of {dtype}",
        ),
    )
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
]


@torch.no_grad()
@pytest.mark.parametrize("dtype", STATE_DTYPES)
@pytest.mark.parametrize("of_weights", [torch.float32, torch.float64])
def test_steps_keep_the_dtype_of_ssm_whatever_it_is(dtype, of_weights):
    model, ids = tiny(dtype=of_weights), tokens(2, 12)
    cache = model(ids[:, :6]).cache.to(dtype)
    rounded = cache.to(of_weights)  # what the state holds, as exactly as the model computes

    def kinds(cache):
        return {state.ssm.dtype for state in cache.states}

    layer, u = model.backbone.layers[0].mixer, torch.randn(2, 3, 32, device=DEVICE).to(of_weights)
    for l, mask in itertools.product((0, 1, 3), (None, tokens(2, 3) % 2 == 0)):
        given = None if mask is None else mask[:, :l]
        _, state = layer.step(u[:, :l], cache.states[0], given)
        assert state.ssm.dtype == dtype and state.conv.dtype == of_weights
        for seq_idx in (None, tokens(2, l, seed=3)):
            output = model(ids[:, 6 : 6 + l], given, cache, seq_idx=seq_idx)
            assert kinds(output.cache) == {dtype}
            exact = model(ids[:, 6 : 6 + l], given, rounded, seq_idx=seq_idx)
            # Within a call nothing is rounded, so that only the state before it is.
            assert_close(output.logits, exact.logits, F32)
            # On a GPU one of the two may be a kernel's, which rounds differently before that.
            same = max(torch.finfo(dtype).eps, F32) if CUDA else 0
            found, right = output.cache.to(of_weights), exact.cache.to(dtype).to(of_weights)
            assert_same_state(found, right, same)
    end = model.generate(ids, **GREEDY)[0, 15].item()
    given = dict(GREEDY, eos_token_id=end, return_dict_in_generate=True)
    assert kinds(model.generate(ids, cache=cache, **given).cache) == {dtype}
    assert kinds(cache.select([1])) == kinds(cache.repeat(2)) == kinds(cache.detach()) == {dtype}
    assert kinds(Mamba2Cache.cat([cache, cache])) == {dtype}


@torch.no_grad()
@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.uint16, torch.uint64, torch.int64]
)
def test_labels_of_packed_sequences_are_any_integers(dtype):
    model, ids = tiny(dtype=torch.float64), tokens(2, 9)
    layer, u = model.backbone.layers[0].mixer, torch.randn(2, 9, 32, **DRAW)
    mask, kind = tokens(2, 9, seed=1) % 4 > 0, torch.iinfo(dtype)
    plain = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 0], device=DEVICE).expand(2, 9)
    odd = [t if t < 2**63 else t - 2**64 for t in (kind.min, kind.max, 1)]
    seq_idx = torch.tensor(odd, device=DEVICE)[plain].view(torch.uint64).to(dtype)
    if dtype.itemsize == 8:
        seq_idx = torch.tensor(odd, device=DEVICE)[plain].view(dtype)
    for masked in (None, mask):
        expected = model(ids, masked, seq_idx=plain)
        found = model(ids, masked, seq_idx=seq_idx, labels=ids)
        assert_close(found.logits, expected.logits, F64)
        assert_close(found.loss, model(ids, masked, seq_idx=plain, labels=ids).loss, F64)
        assert_close(layer(u, mask=masked, seq_idx=seq_idx), layer(u, mask=masked, seq_idx=plain))
        for cut in range(10):  # a label is none of "nothing seen yet", not even the smallest
            first, second = slice(0, cut), slice(cut, 9)
            part = [None if masked is None else masked[:, cut_] for cut_ in (first, second)]
            past = model(ids[:, first], part[0], seq_idx=seq_idx[:, first]).cache
            output = model(ids[:, second], part[1], past, seq_idx=seq_idx[:, second])
            assert_close(output.logits, expected.logits[:, cut:], F64)
            assert_same_state(output.cache, expected.cache, F64)
    for call in (lambda t: model(ids, seq_idx=t), lambda t: layer(u, seq_idx=t)):
        with pytest.raises(TypeError, match="seq_idx is a list: it must be a tensor"):
            call(plain.tolist())
        with pytest.raises(TypeError, match="seq_idx is torch.bool: .* of integers"):
            call(plain > 0)


@torch.no_grad()
def test_files_that_hold_no_cache_are_refused_and_a_cache_keeps_no_file(tmp_path):
    cache, path = tiny()(tokens(2, 9), seq_idx=tokens(2, 9)).cache, tmp_path / "cache.safetensors"
    cache.save(path)
    good, whole = load_file(path), path.read_bytes()
    loaded = Mamba2Cache.load(path)
    path.write_bytes(bytes(len(whole)))  # a view of the file would be 0 now, or end the process
    assert_same_state(loaded, cache.to("cpu"))

    def without(*names, **more):
        return {k: t for k, t in good.items() if k not in names} | more

    for content in (
        {},
        without("length"),
        without("layers.0.conv"),
        without("layers.1.ssm"),
        without("layers.0.conv", "layers.0.ssm"),
        without(weight=torch.ones(2)),
    ):
        save_file(content, path)
        with pytest.raises(ValueError, match="cache.safetensors' holds no cache"):
            Mamba2Cache.load(path)
    for cut in (0, 7, len(whole) // 2):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="holds no cache"):
            Mamba2Cache.load(path)
    for seq_idx in (torch.zeros(2).long(), torch.zeros(2, 3).long(), torch.zeros(2, 2)):
        save_file(without(seq_idx=seq_idx), path)
        with pytest.raises((ValueError, TypeError), match="seq_idx .* must be"):
            Mamba2Cache.load(path)
    path.write_bytes(whole)
    with pytest.raises(RuntimeError, match="device string: gpu"):
        Mamba2Cache.load(path, device="gpu")
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        cache.save("no/such/folder/cache.safetensors")
    # One state for two layers, and lists in place of tuples, are written like all others.
    for states in ((cache.states[0],) * 2, [[*state] for state in cache.states]):
        Mamba2Cache(states, 9).save(path)
        assert identical(
            tensors(Mamba2Cache.load(path, DEVICE).states), [t for s in states for t in s]
        )


@torch.no_grad()
def test_a_step_is_exported_and_compiled_once_for_all_tokens():
    model, ids = tiny(), tokens(2, 12)
    if Mamba2Cache not in torch.utils._pytree.SUPPORTED_NODES:
        torch.export.register_dataclass(Mamba2Cache)
    cache = model.prefill(ids[:, :7])
    given = dict(cache=cache, use_cache=True)
    exported = torch.export.export(model, (ids[:, 7:8],), given).module()
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend=counter)
    for step in (exported, compiled):
        past = cache
        for t in range(7, 12):
            output = step(ids[:, t : t + 1], cache=past, use_cache=True)
            past = output[mamba2.CACHE]
            assert_close(output.logits, model(ids[:, : t + 1]).logits[:, -1:], F32)
            assert type(past) is Mamba2Cache and past.get_seq_length() == t + 1
            assert type(past.states[0]) is Mamba2State
    assert counter.frame_count == 1


@torch.no_grad()
def test_a_layer_with_a_mask_is_exported_without_sorting():
    layer = make_layer().float()
    u, mask = torch.randn(2, 9, layer.config.hidden_size, device=DEVICE), tokens(2, 9) % 3 > 0
    exported = torch.export.export(layer, (u,), dict(mask=mask))
    operations = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert operations and not any("sort" in name for name in operations)
    for given in (mask, ~mask, mask.flip(1)):
        assert_close(exported.module()(u, mask=given), layer(u, mask=given), F32)


@torch.no_grad()
def test_replicas_of_data_parallel_give_outputs_that_can_be_gathered(monkeypatch):
    model, ids = tiny(), tokens(4, 9)
    whole = model(ids, labels=ids)
    # As torch.nn.DataParallel does with two GPUs, without GPUs.
    replicas = [copy.deepcopy(model) for _ in range(2)]
    for module in itertools.chain(*(replica.modules() for replica in replicas)):
        module._is_replica = True
    pairs = zip(replicas, ids.chunk(2), strict=True)
    outputs = [replica(part, labels=part) for replica, part in pairs]
    gather = torch.nn.parallel.scatter_gather
    monkeypatch.setattr(
        gather.Gather, "apply", lambda device, dim, *t: torch.stack(t).flatten(0, 1)
    )
    outputs = [{k: v[None] if v.dim() == 0 else v for k, v in o.items()} for o in outputs]
    gathered = gather.gather(outputs, DEVICE)
    assert_close(gathered["logits"], whole.logits, F32)
    assert_close(gathered["loss"].mean(), whole.loss, F32)
    assert whole.cache is not None and replicas[0](ids, use_cache=True).cache is not None


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_cache_survives_a_file_that_runs_no_code(dtype, tmp_path):
    model, path = tiny(dtype=dtype, num_hidden_layers=12), tmp_path / "prompt.safetensors"
    cache = model(tokens(2, 9), seq_idx=torch.full((2, 9), 7, device=DEVICE)).past_key_values
    cache.save(path)
    back = Mamba2Cache.load(path, device=DEVICE)
    assert_same_state(back, cache)
    assert [t.dtype for s in back.states for t in s] == [t.dtype for s in cache.states for t in s]
    assert back.length == 9 and torch.equal(back.seq_idx, cache.seq_idx)
    new = tokens(2, 3, seed=1)
    logits = [model(new, past_key_values=c).logits for c in (cache, back)]
    assert torch.equal(*logits)
    spread = cache.map(lambda tensor: tensor.repeat_interleave(2, dim=-1)[..., ::2])
    assert not spread.states[0].ssm.is_contiguous()
    spread.save(path)
    assert_same_state(Mamba2Cache.load(path, DEVICE), cache)
    with torch.enable_grad():
        model(new, past_key_values=cache).past_key_values.save(path)
    assert Mamba2Cache.load(path).length == 12
    Mamba2Cache(cache.states, 3).save(path)
    assert Mamba2Cache.load(path).seq_idx is None
    with safe_open(path, framework="pt") as file:
        assert "layers.11.ssm" in file.keys()


def test_gradients_pass_through_a_cache_until_it_is_detached():
    model, ids = tiny(dtype=torch.float64, **ALL).train(), tokens(2, 12)
    first = model(ids[:, :5], use_cache=True)
    rest = model(ids[:, 5:], past_key_values=first.past_key_values).logits
    whole = model(ids).logits
    assert model(ids).past_key_values is None  # none in training, unless it is asked for
    weights = torch.randn_like(whole)
    in_parts = model_gradients(model, (torch.cat([first.logits, rest], 1) * weights).sum())
    assert_same_gradients(in_parts, model_gradients(model, (whole * weights).sum()))
    detached = first.past_key_values.detach()
    assert first.past_key_values.states[0].ssm.requires_grad
    assert not any(t.requires_grad for s in detached.states for t in s)


def test_initial_states_are_honoured_and_can_be_trained():
    model, ids = tiny(), tokens(2, 9)
    cache = model(ids).past_key_values.detach()
    states = tuple(Mamba2State(*(t.clone().requires_grad_() for t in s)) for s in cache.states)
    for kind in (model, model.backbone):
        from_states = kind(ids, past_key_values=Mamba2Cache(states))
        assert torch.equal(from_states[0], kind(ids, past_key_values=cache)[0])
        assert not torch.equal(from_states[0], kind(ids)[0])
    model(ids, past_key_values=Mamba2Cache(states), labels=ids).loss.backward()
    assert all(t.grad.abs().max() > 0 for s in states for t in s)
    with pytest.raises(ValueError, match="1 states for 2 layers"):
        model(ids, past_key_values=Mamba2Cache(states[:1]))
    # A call of which all is masked begins no sequence, so that the states wait for the next.
    zeros, start = torch.zeros_like(ids), Mamba2Cache(cache.states)
    unread = model(ids, zeros, start, seq_idx=zeros).past_key_values
    found = model(ids, past_key_values=unread, seq_idx=zeros + 1).logits
    assert_close(found, model(ids, past_key_values=cache).logits, F32)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 6])
def test_masked_tokens_leave_the_state_as_it_was(length):
    model = tiny(**ALL)
    before = model(tokens(2, 9), seq_idx=torch.zeros_like(tokens(2, 9))).past_key_values
    mask = torch.zeros(2, length, dtype=torch.long, device=DEVICE)
    seq_idx = torch.full((2, length), 9, device=DEVICE)
    for given in ({}, {"seq_idx": seq_idx}):
        output = model(tokens(2, length), mask, before, **given)
        assert_same_state(output.past_key_values, before)
        assert torch.equal(output.past_key_values.seq_idx, before.seq_idx)
    assert output.past_key_values.length == 9 + length
    empty = model(tokens(2, length), mask).past_key_values
    assert all(not t.any() for s in empty.states for t in s)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 0), (0, 5), (0, 0)])
def test_no_tokens_and_no_rows_are_valid_input(shape):
    model, ids = tiny(**ALL), tokens(*shape)
    cache = model(tokens(shape[0], 4)).past_key_values
    for given in ({}, dict(attention_mask=ids, seq_idx=ids)):
        output = model(ids, past_key_values=cache, **given)
        assert output.logits.shape == (*shape, VOCABULARY)
        assert output.past_key_values.length == 4 + shape[1]
        if shape[1] == 0:
            assert_same_state(output.past_key_values, cache)
    assert model(ids, labels=ids, num_items_in_batch=1).loss == 0


@torch.no_grad()
def test_the_outputs_are_those_that_were_asked_for():
    model, ids = tiny(), tokens(2, 9)
    output = model(ids, output_hidden_states=True)
    assert [tuple(h.shape) for h in output.hidden_states] == 3 * [(2, 9, 32)]
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    last = model.backbone(inputs_embeds=output.hidden_states[0]).last_hidden_state
    assert torch.equal(last, output.hidden_states[-1])
    assert output.loss is None and model(ids).hidden_states is None
    assert model(ids, use_cache=False).past_key_values is None
    as_tuple = model(ids, return_dict=False, use_cache=False)
    assert len(as_tuple) == 1 and torch.equal(as_tuple[0], output.logits)
    assert len(model.backbone(ids, return_dict=False)) == 2
    model.config.use_cache = False
    assert model(ids).past_key_values is None
    model.config.output_hidden_states, model.config.return_dict = True, False
    for kind in (model, model.backbone):
        first, hidden_states = kind(ids)
        assert torch.is_tensor(first) and len(hidden_states) == 3


@torch.no_grad()
def test_logits_to_keep_are_a_part_of_all_logits():
    model, ids = tiny(dtype=torch.float64), tokens(2, 9)
    logits = model(ids).logits
    chosen = torch.tensor([0, 3, 8], device=DEVICE)
    for keep, kept in ((1, logits[:, -1:]), (4, logits[:, -4:]), (chosen, logits[:, chosen])):
        assert_close(model(ids, logits_to_keep=keep).logits, kept, F64)
        assert_close(model(ids, logits_to_keep=keep, segment_length=2).logits, kept, F64)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    for keep in (None, 0, 1, 4, chosen):  # says nothing about the loss
        assert_close(model(ids, labels=ids, logits_to_keep=keep).loss, loss, F64)
    model.train()  # where logits beside a loss are rarely wanted, and large
    assert model(ids, labels=ids).logits is None
    assert_close(model(ids).logits, logits, F64)
    assert_close(model(ids, labels=ids, logits_to_keep=0).logits, logits, F64)


BAD_ARGUMENTS = [
    ("unexpected.*cu_seqlens", dict(cu_seqlens=tokens(2))),
    ("unexpected.*cache_params", dict(cache_params=None)),
    ("unexpected.*atention_mask", dict(atention_mask=tokens(2, 9))),
    ("cache is a tuple", dict(past_key_values=((1, 2), (3, 4)))),
    ("cache is a DynamicCache", dict(cache=transformers.DynamicCache())),
    ("are one argument", dict(cache=Mamba2Cache(()), past_key_values=Mamba2Cache(()))),
]


@pytest.mark.parametrize("kind", [Mamba2ForCausalLM, Mamba2Model])
@pytest.mark.parametrize("message, arguments", BAD_ARGUMENTS, ids=[m for m, _ in BAD_ARGUMENTS])
def test_an_argument_that_is_not_understood_is_a_type_error(kind, message, arguments):
    with pytest.raises(TypeError, match=message):
        tiny(kind)(tokens(2, 9), **arguments)


def test_arguments_that_do_not_fit_are_value_errors():
    model, ids = tiny(), tokens(2, 9)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="no attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match=r"shape \(2, 8\): it must be \(2, 9\)"):
        model(ids, attention_mask=ids[:, :8])
    with pytest.raises(ValueError, match=r"must be \(2, 9\)"):
        model(ids, attention_mask=ids[:1])
    with pytest.raises(ValueError, match=r"seq_idx has shape \(2, 8\).*\(2, 9\)"):
        model(ids, seq_idx=ids[:, :8])
    with pytest.raises(ValueError, match=r"labels has shape \(2, 8\).*\(2, 9\)"):
        model(ids, labels=ids[:, :8])
    with pytest.raises(ValueError, match=r"conv has shape \(1, 3, 96\): it must be \(2, 3, 96\)"):
        model(ids, past_key_values=model(ids[:1]).past_key_values)


# ----------------------------------------------------------------------------- numbers of any kind


def test_float64_is_honoured_inside():
    # With float32 anywhere inside, the difference quotient would be noise: 1e-7 / 1e-6.
    model, ids = tiny(dtype=torch.float64, **ALL), tokens(2, 20)
    loss = model(ids, labels=ids).loss
    assert loss.dtype == torch.float64
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            direction, center = torch.randn_like(parameter), parameter.clone()
            at = []
            for step in (1e-6, -1e-6):
                parameter.copy_(center + step * direction)
                at.append(model(ids, labels=ids).loss)
            parameter.copy_(center)
            slope = (parameter.grad * direction).sum()
            # 1e-8 is ten times the rounding of a loss of 5 in float64, divided by 2e-6.
            assert abs((at[0] - at[1]) / 2e-6 - slope) <= 1e-8 < slope.abs()


def test_a_model_on_no_device_gives_shapes():
    model, ids = tiny().to("meta"), tokens(2, 9).to("meta")
    output = model(ids, ids, labels=ids, seq_idx=ids, segment_length=4, logits_to_keep=0)
    assert output.logits.shape == (2, 9, VOCABULARY) and output.loss.shape == ()
    assert output.logits.is_meta and output.cache.length.is_meta


@torch.no_grad()
@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_bfloat16_weights_keep_a_float32_residual_stream_and_state(residual_in_fp32):
    ids, options = tokens(2, 20), dict(residual_in_fp32=residual_in_fp32)
    model = tiny(dtype=torch.bfloat16, **options)
    output = model(ids, labels=ids, output_hidden_states=True)
    residual = torch.float32 if residual_in_fp32 else torch.bfloat16
    assert {h.dtype for h in output.hidden_states[:-1]} == {residual}
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    assert output.past_key_values.states[0].ssm.dtype == torch.float32
    # bfloat16 has 8 bits, 4e-3; 5e-2 leaves room for a dozen roundings in a row.
    assert_close(output.logits.float(), tiny(**options)(ids).logits, 5e-2)


@pytest.mark.parametrize("options", [{}, dict(expand=1.5, hidden_size=64), dict(n_groups=2)])
def test_the_first_loss_of_a_new_model_is_near_that_of_guessing(options):
    torch.manual_seed(0)
    sizes = dict(vocab_size=1024, hidden_size=64, head_dim=16, num_hidden_layers=4)
    model = Mamba2ForCausalLM(Mamba2Config(**{**sizes, **options})).to(DEVICE)
    ids = tokens(4, 64, vocabulary=1024)
    assert abs(model(ids, labels=ids).loss.item() - math.log(1024)) < 0.05
    for layer in model.backbone.layers:  # the original's depth scaling, by sqrt(4)
        width = layer.mixer.out_proj.in_features
        assert 0.95 < layer.mixer.out_proj.weight.abs().max() * (4 * width) ** 0.5 <= 1
    assert abs(model.get_input_embeddings().weight.std().item() / 0.02 - 1) < 0.05


def test_a_model_that_is_made_on_no_device_is_initialised_later():
    with torch.device("meta"):
        model = Mamba2ForCausalLM(Mamba2Config(**TINY, use_bias=True, tie_word_embeddings=False))
    model.to_empty(device=DEVICE)
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)
    model.apply(model._init_weights)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert (model.backbone.norm_f.weight == 1).all()


@torch.no_grad()
def test_a_width_that_is_no_multiple_of_the_models_works(tmp_path):
    model, ids = tiny(expand=1.5, dtype=torch.float64), tokens(2, 9)
    assert model.config.num_heads == 6
    whole, prompt = model(ids).logits, model(ids[:, :8])
    assert_close(
        model(ids[:, 8:], past_key_values=prompt.past_key_values).logits, whole[:, 8:], F64
    )
    again = load(save(model, tmp_path))
    assert again.config.expand == 1.5
    assert_same_model(again, model, F64)


# -------------------------------------------------------------------- padded, packed, or by itself

MASK_KINDS = [
    "00000111111111111111",
    "11111111111110000000",
    "11110000000001111111",
    "01101000111010110101",
    "00000000000000000000",
    "11111111111111111111",
]


def padded():
    """A batch with masks of every kind, with nonsense at masked positions, and some labels -100."""
    mask = torch.tensor([[int(c) for c in row] for row in MASK_KINDS], device=DEVICE)
    ids = tokens(*mask.shape)
    labels = torch.where(tokens(*mask.shape, seed=1) % 5 == 0, -100, ids)
    labels = torch.where(mask.bool(), labels, tokens(*mask.shape, seed=2))
    return ids, mask, labels


def packed():
    """Several sequences in each row of `padded`: their lengths, and seq_idx."""
    lengths = [[1, 7, 12], [9, 10, 1], [3, 12, 5], [13, 6, 1], [10, 10], [8, 12]]
    rows = [[i % 2 for i, n in enumerate(row) for _ in range(n)] for row in lengths]
    return lengths, torch.tensor(rows, device=DEVICE)  # where labels come again: 0 1 0


def summed_loss(logits, labels):
    """The loss of one sequence, and how many tokens it predicts."""
    labels = labels[1:]
    return F.cross_entropy(logits[:-1], labels, reduction="sum"), (labels != -100).sum()


def mean_loss(model, pairs):
    """The loss of sequences that are run one by one, each token weighted equally."""
    parts = [summed_loss(model(ids[None]).logits[0], labels) for ids, labels in pairs if len(ids)]
    return sum(loss for loss, _ in parts) / sum(count for _, count in parts)


def test_a_padded_batch_gives_what_its_rows_give_alone():
    model = tiny(dtype=torch.float64, **ALL)
    ids, mask, labels = padded()
    exists = mask.bool()
    output = model(ids, mask, labels=labels, use_cache=True)
    for row in range(len(ids)):
        alone = model(ids[row, exists[row]][None], use_cache=True)
        assert_close(output.logits[row, exists[row]], alone.logits[0], F64)
        chosen = output.past_key_values.select(torch.tensor([row]))
        assert_same_state(chosen, alone.past_key_values, F64)
    loss = mean_loss(model, [(i[e], y[e]) for i, y, e in zip(ids, labels, exists, strict=True)])
    assert_close(output.loss, loss, F64)
    assert_same_gradients(model_gradients(model, output.loss), model_gradients(model, loss))


@torch.no_grad()
def test_steps_after_a_padded_prompt_give_what_they_give_after_the_prompt_alone():
    model = tiny(dtype=torch.float64, **ALL)
    ids, mask, _ = padded()
    past = model(ids, mask).past_key_values
    new = tokens(len(ids), 4, seed=3)
    steps = []
    for t in range(4):
        mask = F.pad(mask, (0, 1), value=1)  # as generate does: the mask of all tokens so far
        output = model(new[:, t : t + 1], mask, past)
        past = output.past_key_values
        steps.append(output.logits)
    for row, line in enumerate(MASK_KINDS):
        exists = torch.tensor([c == "1" for c in line], device=DEVICE)
        alone = model(torch.cat([ids[row, exists], new[row]])[None]).logits[:, -4:]
        assert_close(torch.cat(steps, 1)[row : row + 1], alone, F64)


@pytest.mark.parametrize("masked", [False, True])
def test_packed_sequences_give_what_they_give_apart(masked):
    model = tiny(dtype=torch.float64, **ALL)
    ids, mask, labels = padded()
    if not masked:
        mask = torch.ones_like(mask)
    lengths, seq_idx = packed()
    output = model(ids, mask if masked else None, labels=labels, seq_idx=seq_idx)
    for dtype in (torch.uint8, torch.int32):
        again = model(ids, mask if masked else None, labels=labels, seq_idx=seq_idx.to(dtype))
        assert torch.equal(again.loss, output.loss)
    documents, logits = [], []
    for row, parts in enumerate(zip(ids, labels, mask.bool(), output.logits, strict=True)):
        for i, y, exists, o in zip(*(part.split(lengths[row]) for part in parts), strict=True):
            documents.append((i[exists], y[exists]))
            logits.append(o[exists])
    # A sequence that is masked as a whole leaves its neighbours side by side, still apart unless
    # they have one label; the rows above have no such case.
    for (i, _), o in zip(documents, logits, strict=True):
        assert_close(o, model(i[None]).logits[0], F64)
    loss = mean_loss(model, documents)
    assert_close(output.loss, loss, F64)
    assert_same_gradients(model_gradients(model, output.loss), model_gradients(model, loss))


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(return_flash_attn_kwargs=True),
        dict(return_seq_idx=True),
        dict(return_flash_attn_kwargs=True, return_seq_idx=True, return_position_ids=False),
    ],
    ids=lambda options: "+".join(options) or "defaults",
)
def test_a_collator_that_packs_gives_the_loss_of_the_sequences_apart(options):
    model = tiny(dtype=torch.float64, **ALL)
    rows = [tokens(n, seed=n).tolist() for n in (5, 1, 9, 2)]
    batch = transformers.DataCollatorWithFlattening(**options)([{"input_ids": r} for r in rows])
    batch = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in batch.items()}
    pairs = [(torch.tensor(row, device=DEVICE),) * 2 for row in rows]
    loss = mean_loss(model, pairs)
    output = model(**batch)
    assert_close(output.loss, loss, F64)
    assert_same_gradients(model_gradients(model, output.loss), model_gradients(model, loss))
    alone = torch.cat([model(row[None]).logits[0] for row, _ in pairs])
    assert_close(output.logits[0], alone, F64)
    labels = batch.pop("labels")
    hidden = model(**batch, output_hidden_states=True).hidden_states[-1]
    assert_close(model.backbone(**batch)[0], hidden)
    assert_close(model(**batch, labels=labels, segment_length=3).loss, loss, F64)


def test_positions_that_begin_again_at_0_are_borders_and_others_are_refused():
    model, ids = tiny(dtype=torch.float64), tokens(2, 6)

    def positions(*rows):
        return torch.tensor([[int(c) for c in row] for row in rows], device=DEVICE)

    at = positions("012301", "000123")  # as TRL packs rows of one length
    labels = positions("000011", "012222")
    for given in (dict(position_ids=at), dict(position_ids=at, seq_idx=labels)):
        assert_close(model(ids, **given).logits, model(ids, seq_idx=labels).logits)
    mask = positions("001111", "110111")
    for at in (positions("110123", "011234"), positions("000123", "011234")):  # nonsense there
        assert_close(model(ids, mask, position_ids=at).logits, model(ids, mask).logits, F64)
    for wrong in ("123456", "012456", "012344", "543210", "011111"):
        with pytest.raises(ValueError, match="must count up from 0 in each packed sequence"):
            model(ids, position_ids=positions(wrong, "012345"))
    with pytest.raises(ValueError, match="count up from 0 .* labels"):  # two meanings at once
        model(ids, position_ids=positions("012012", "012345"), seq_idx=0 * ids)
    with pytest.raises(ValueError, match="without a cache"):
        model(ids, cache=model(ids).cache, position_ids=positions("678901", "678901"))
    with pytest.raises(ValueError, match=r"position_ids has shape \(1, 6\): it must be \(2, 6\)"):
        model(ids, position_ids=at[:1])
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
        for kind in (model, model.backbone):
            with pytest.raises(TypeError, match=f"{name}'.* pass seq_idx"):
                kind(ids, **{name: 6})


# --------------------------------------------------------------------------------------- generate


def prompts():
    """Three prompts of different lengths, padded on the left."""
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.long, device=DEVICE)
    mask[0, :9] = mask[1, :3] = 0
    return ids, mask


def generate_by_hand(model, ids, steps, choose):
    for _ in range(steps):
        ids = torch.cat([ids, choose(ids, model(ids, use_cache=False).logits[:, -1].float())], 1)
    return ids


@torch.no_grad()
def test_greedy_text_is_that_of_a_loop_without_a_cache():
    model, ids = tiny(**ALL), tokens(2, 12)
    by_hand = generate_by_hand(model, ids, 12, lambda _, logits: logits.argmax(1, keepdim=True))
    assert len(set(by_hand[0, 12:].tolist())) > 4  # it is no repetition, which anything could give
    assert torch.equal(model.generate(ids, **GREEDY), by_hand)
    assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), by_hand)


SAMPLING = [
    dict(temperature=0.7),
    dict(top_k=5),
    dict(top_p=0.6),
    dict(min_p=0.3),
    dict(repetition_penalty=1.8),
    dict(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
]


@torch.no_grad()
@pytest.mark.parametrize("options", SAMPLING, ids=lambda options: "+".join(options))
def test_sampled_text_is_that_of_a_loop_without_a_cache(options):
    model, ids = tiny(dtype=torch.float64), tokens(2, 12)
    kinds = dict(
        repetition_penalty=RepetitionPenaltyLogitsProcessor,
        temperature=TemperatureLogitsWarper,
        top_k=TopKLogitsWarper,
        top_p=TopPLogitsWarper,
        min_p=MinPLogitsWarper,
    )
    process = LogitsProcessorList([kinds[name](options[name]) for name in kinds if name in options])

    def choose(ids, logits):
        return torch.multinomial(process(ids, logits).softmax(-1), 1)

    torch.manual_seed(3)
    by_hand = generate_by_hand(model, ids, 12, choose)
    torch.manual_seed(3)
    given = {**GREEDY, "do_sample": True, "top_k": 0, **options}
    assert torch.equal(model.generate(ids, **given), by_hand)


@torch.no_grad()
@pytest.mark.parametrize("options", [dict(num_beams=4), dict(num_beams=4, length_penalty=2.0)])
def test_beams_are_the_same_with_and_without_a_cache(options):
    model = tiny(dtype=torch.float64)
    ids, mask = prompts()
    given = {**GREEDY, **options, "num_return_sequences": 3, "eos_token_id": 7}
    given |= dict(attention_mask=mask, return_dict_in_generate=True, output_scores=True)
    cached, uncached = (model.generate(ids, use_cache=use, **given) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    assert_close(cached.sequences_scores, uncached.sequences_scores, 1e-5)  # they are float32
    assert len(cached.sequences) == 9 and len(cached.sequences.unique(dim=0)) == 9
    assert cached.cache is None  # the last beams' states are not those of the best texts
    greedy = model.generate(ids, attention_mask=mask, **GREEDY)
    assert not torch.equal(cached.sequences[::3, : greedy.shape[1]], greedy)


@torch.no_grad()
def test_a_batch_that_is_padded_on_the_left_continues_as_each_prompt_alone():
    model = tiny(dtype=torch.float64, **ALL)
    ids, mask = prompts()
    together = model.generate(ids, attention_mask=mask, **GREEDY)[:, 12:]
    for row in range(3):
        prompt = ids[row, mask[row].bool()][None]
        assert torch.equal(together[row], model.generate(prompt, **GREEDY)[0, prompt.shape[1] :])


@torch.no_grad()
@pytest.mark.parametrize("history", [3, 8])
@pytest.mark.parametrize("padded", [False, True])
def test_generate_goes_on_from_a_cache_with_all_tokens_or_with_the_new_ones(history, padded):
    model = tiny(dtype=torch.float64)
    ids, mask = prompts()
    mask = mask if padded else torch.ones_like(mask)
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    state = model(expected[:, :-1], F.pad(mask, (0, 11), value=1)).past_key_values
    cache = model(ids[:, :history], mask[:, :history]).past_key_values
    new = ids[:, history:]
    calls = [(ids, {"attention_mask": mask}), (new, {"attention_mask": mask})]
    if not padded:
        calls.append((ids, {}))
        if history >= new.shape[1]:  # else they look like all tokens
            with pytest.raises(ValueError, match="new tokens with an attention_mask that cov"):
                model.generate(new, past_key_values=cache, **GREEDY)
    for given, options in calls:
        options |= dict(past_key_values=cache, return_dict_in_generate=True)
        output = model.generate(given, **options, **GREEDY)
        assert torch.equal(output.sequences[:, given.shape[1] :], expected[:, 12:])
        assert_same_state(output.past_key_values, state, F64)  # the text alone could be chance


class MyLM(Mamba2ForCausalLM):
    """By whose name transformers before 5.24 does not know a Mamba."""


@torch.no_grad()
@pytest.mark.parametrize("kind", [Mamba2ForCausalLM, MyLM])
def test_all_tokens_with_a_cache_give_text_and_logits_of_all_tokens_without(kind):
    model, ids = tiny(kind, dtype=torch.float64), tokens(2, 12)
    given = dict(**GREEDY, return_dict_in_generate=True, output_logits=True)
    expected = model.generate(ids, **given)
    at_once = model(expected.sequences).logits[:, 11:-1]
    lengths = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    for history in (1, 6, 11):
        cache = model.prefill(ids[:, :history])
        before = cache.map(torch.clone)
        lengths.clear()
        found = model.generate(ids, cache=cache, **given)
        assert lengths == [12 - history] + 11 * [1]  # no token is read again
        assert torch.equal(found.sequences, expected.sequences)
        assert_close(torch.stack(found.logits, 1).double(), at_once, 1e-6)  # they are in float32
        assert_same_state(found.past_key_values, expected.past_key_values, F64)
        assert_same_state(cache, before)


class LateStop(transformers.generation.utils.DeferredStopCheck):
    """What transformers does on MPS, where it hears of the end one forward pass late."""

    is_supported = staticmethod(
        lambda device, cache, returned, is_assistant: (
            not is_assistant and (cache is None or cache.is_croppable or not returned)
        )
    )


@torch.no_grad()
@pytest.mark.parametrize("returned", [False, True])
def test_a_token_that_is_read_after_the_end_leaves_nothing_in_a_cache(returned, monkeypatch):
    model, ids, late = tiny(dtype=torch.float64), tokens(1, 12), []
    given = {**GREEDY, "return_dict_in_generate": returned}
    given["eos_token_id"] = model.generate(ids, **GREEDY)[0, 18].item()

    def run():
        cache = model.prefill(ids[:, :5])
        output = model.generate(ids, cache=cache, **given)
        found = [output.sequences, output.past_key_values] if returned else [output, cache]
        return found[0], found[1].get_seq_length(), model(ids[:, :3], cache=found[1]).logits

    expected = run()
    event = type("Event", (), dict(record=lambda _: late.append(1), synchronize=lambda _: None))
    monkeypatch.setattr(torch, "Event", lambda **_: event())
    monkeypatch.setattr(transformers.generation.utils, "DeferredStopCheck", LateStop)
    text, length, logits = run()
    assert not (late and returned)  # a cache that cannot forget tokens must not be returned
    assert torch.equal(text, expected[0]) and text.shape[1] < 24
    assert length == expected[1]
    assert_close(logits, expected[2], F64)


@torch.no_grad()
def test_the_cache_that_generate_returns_can_be_gone_on_from():
    model = tiny(dtype=torch.float64)
    ids, mask = prompts()
    long = model.generate(ids, attention_mask=mask, **{**GREEDY, "max_new_tokens": 20})
    first = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    assert first.past_key_values.length == 23  # the last token has not been fed yet
    mask, given = F.pad(mask, (0, 12), value=1), {**GREEDY, "max_new_tokens": 8}
    cache = first.past_key_values
    second = model.generate(first.sequences, attention_mask=mask, past_key_values=cache, **given)
    assert torch.equal(second, long)


class Letters:
    """A tokenizer whose tokens are one letter each: enough for stop strings."""

    def get_vocab(self):
        return {chr(64 + i): i for i in range(VOCABULARY)}

    def __call__(self, text, **options):
        return {"input_ids": [ord(letter) - 64 for letter in text]}

    def _convert_id_to_token(self, token):
        return chr(64 + token)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


def endings(text, start):
    """For each kind: options of generate that end a text so, and what tells in a text by hand."""
    eos = text[0, start + 2].item()
    string = "".join(chr(64 + i) for i in text[1, start + 3 : start + 5].tolist())

    def at_eos(row):
        return row[-1] == eos

    def at_string(row):
        return "".join(chr(64 + i) for i in row).endswith(string)

    def at_rule(row):
        return sum(token % 2 == 0 for token in row) >= 2

    by_string = dict(stop_strings=[string], tokenizer=Letters())
    by_rule = dict(stopping_criteria=[StopRows()])
    return {
        "eos": (dict(eos_token_id=eos), at_eos),
        "stop strings": (by_string, at_string),
        "a criterion": (by_rule, at_rule),
        "all": (
            dict(eos_token_id=eos) | by_string | by_rule,
            lambda row: at_eos(row) or at_string(row) or at_rule(row),
        ),
    }


def until_the_end(text, mask, start, ended):
    """The mask of a text (b, l) that begins at `start`: 0 after the token that ended a row."""
    mask = F.pad(mask, (0, text.shape[1] - start), value=1)
    for row, line in enumerate(text.tolist()):
        ends = [t for t in range(start, len(line)) if ended(line[start : t + 1])]
        if ends:
            mask[row, ends[0] + 1 :] = 0
    return mask


@torch.no_grad()
@pytest.mark.parametrize("kind", ["eos", "stop strings", "a criterion", "all"])
@pytest.mark.parametrize("how", ["greedy", "sampled", "several", "by a decoder", "from a cache"])
def test_the_cache_of_rows_that_ended_early_goes_on_as_the_text_with_its_mask(
    kind, how, monkeypatch
):
    model = tiny(dtype=torch.float64, **ALL)
    ids, mask = prompts()
    given = dict(GREEDY, max_new_tokens=14, return_dict_in_generate=True, attention_mask=mask)
    if how in ("sampled", "several"):
        given |= dict(do_sample=True, top_k=0)
    if how == "several":
        given |= dict(num_return_sequences=2)
    if how == "from a cache":
        given |= dict(cache=model.prefill(ids[:, :7], mask[:, :7]))
    if how == "by a decoder":
        monkeypatch.setattr(mamba2.kernels, "decoder", PlainDecoder)
    for seed in range(20):  # until some rows end early; samples differ from device to device
        torch.manual_seed(seed)
        end, ended = endings(model.generate(ids, **given).sequences, 12)[kind]
        torch.manual_seed(seed)
        first = model.generate(ids, **given | end)
        whole = mask.repeat_interleave(len(first.sequences) // 3, 0)
        exists = until_the_end(first.sequences, whole, 12, ended)
        if (exists[:, -3:-1] == 0).any() and exists[:, -2].any():
            break

    def check(output, mask):
        text, cache = output.sequences, output.cache
        seen = cache.get_seq_length()
        assert type(cache) is Mamba2Cache and seen == text.shape[1] - 1
        assert (mask[:, -3:-1] == 0).any() and mask[:, -2].any()  # some rows ended earlier
        assert_same_state(cache, model(text[:, :seen], mask[:, :seen]).cache, F64)

    mask = until_the_end(first.sequences, mask.repeat_interleave(len(first[0]) // 3, 0), 12, ended)
    check(first, mask)
    # The next turn: all of the text, or what the cache has not seen.
    new, length = tokens(len(mask), 4, seed=8), first.sequences.shape[1] + 4
    whole, mask = torch.cat([first.sequences, new], 1), F.pad(mask, (0, 4), value=1)
    greedy = dict(GREEDY, attention_mask=mask, max_new_tokens=6)
    expected = model.generate(whole, use_cache=False, **greedy)[:, length:]
    unseen = whole[:, first.cache.get_seq_length() :]
    for turn in (whole, unseen):
        found = model.generate(turn, cache=first.cache, **greedy)[:, turn.shape[1] :]
        assert torch.equal(found, expected)
    logits = model(unseen, mask, first.cache).logits[:, 1:]
    assert_close(logits, model(whole, mask).logits[:, -4:], F64)
    # And the turn after it, whose rows end early too.
    greedy |= dict(max_new_tokens=14, return_dict_in_generate=True, cache=first.cache)
    end, ended = endings(model.generate(whole, **greedy).sequences, length)["eos"]
    second = model.generate(whole, **greedy | end)
    check(second, until_the_end(second.sequences, mask, length, ended))


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 5, 100])
def test_a_long_prompt_can_be_read_in_pieces(size):
    model = tiny(dtype=torch.float64)
    ids, mask = prompts()
    given = dict(attention_mask=mask, **GREEDY)
    whole = model.generate(ids, **given)
    assert torch.equal(model.generate(ids, prefill_chunk_size=size, **given), whole)
    assert torch.equal(model.generate(ids, segment_length=size, **given), whole)


SPECULATION = {
    "prompt lookup": lambda: dict(prompt_lookup_num_tokens=3),
    "early exit": lambda: dict(assistant_early_exit=1),
    "assistant": lambda: dict(assistant_model=tiny(dtype=torch.float64, num_hidden_layers=1)),
    "assistant that is always right": lambda: dict(assistant_model=tiny(dtype=torch.float64)),
}


@pytest.mark.parametrize("how", SPECULATION)
@torch.no_grad()
def test_speculative_decoding_gives_the_greedy_text(how):
    model, passes = tiny(dtype=torch.float64), []
    given = dict(GREEDY, max_new_tokens=40, eos_token_id=VOCABULARY)  # which lookup must have
    for ids, mask in ((tokens(1, 12), torch.ones(1, 12)), [t[1:2] for t in prompts()]):
        mask = mask.long().to(DEVICE)
        expected = model.generate(ids, attention_mask=mask, **given)
        cache = model(ids[:, :7], mask[:, :7]).past_key_values
        hook = model.backbone.register_forward_pre_hook(lambda *_: passes.append(1))
        for past in (None, cache):
            given_cache = {} if past is None else dict(past_key_values=past)
            found = model.generate(
                ids, attention_mask=mask, **given, **given_cache, **SPECULATION[how]()
            )
            assert torch.equal(found, expected)
        hook.remove()
        assert_same_state(cache, model(ids[:, :7], mask[:, :7]).past_key_values)  # is a value still
    if how == "assistant that is always right":
        assert len(passes) <= 4 * 20  # of both models, for 40 tokens each time


@torch.no_grad()
@pytest.mark.parametrize("how", SPECULATION)
def test_the_cache_that_comes_back_from_speculation_is_that_of_the_text(how, tmp_path):
    model = tiny(dtype=torch.float64)
    ids, mask = (t[1:2] for t in prompts())
    for length, end in itertools.product((14, 15, 16, 17, 40), (VOCABULARY, 12)):
        given = dict(GREEDY, max_new_tokens=length, eos_token_id=end, return_dict_in_generate=True)
        if end == 12:  # a token in the middle of the text
            text = model.generate(ids, attention_mask=mask, **given | dict(eos_token_id=VOCABULARY))
            given["eos_token_id"] = text.sequences[0, 12 + length // 2].item()
        output = model.generate(ids, attention_mask=mask, **given, **SPECULATION[how]())
        cache, seen = output.cache, output.cache.get_seq_length()
        assert type(cache) is Mamba2Cache and cache is output.past_key_values
        whole = F.pad(mask, (0, length), value=1)[:, :seen]
        assert output.sequences.shape[1] - 1 <= seen <= output.sequences.shape[1]
        assert_same_state(cache, model(output.sequences[:, :seen], whole).cache, F64)
        cache.save(tmp_path / "cache.safetensors")
    # A packed prompt is read first: then its cache knows which sequence goes on.
    seq_idx = torch.arange(12, device=DEVICE)[None] // 5
    given = dict(GREEDY, eos_token_id=VOCABULARY)
    with pytest.raises(ValueError, match="with inputs_embeds or seq_idx, read the prompt with"):
        model.generate(ids, seq_idx=seq_idx, **given, **SPECULATION[how]())
    expected = model.generate(ids[:, 10:], **given)[:, 2:]
    packed = model.prefill(ids[:, :11], seq_idx=seq_idx[:, :11])
    if "assistant" not in how and how != "early exit":  # an assistant reads the prompt as its own
        found = model.generate(ids, cache=packed, **given, **SPECULATION[how]())
        assert torch.equal(found[:, 12:], expected)


@torch.no_grad()
def test_early_exit_leaves_the_configuration_alone_whatever_happens():
    model, ids = tiny(dtype=torch.float64, num_hidden_layers=3), tokens(1, 12)
    given = dict(GREEDY, eos_token_id=VOCABULARY)
    expected, logits = model.generate(ids, **given), model(ids).logits
    seen = []

    class Interrupt(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            # What another thread would find now.
            assert torch.equal(model(ids).logits, logits) and len(model.backbone.layers) == 3
            assert model.config.num_hidden_layers == 3
            seen.append(1)
            if input_ids.shape[1] > 15:
                raise KeyboardInterrupt
            return torch.zeros(1, dtype=torch.bool, device=DEVICE)

    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, assistant_early_exit=1, stopping_criteria=[Interrupt()], **given)
    assert len(seen) > 1 and torch.equal(model(ids).logits, logits)
    with ThreadPoolExecutor(2) as threads:
        texts = threads.map(lambda n: model.generate(ids, assistant_early_exit=n, **given), (1, 2))
        found = [model(ids).logits for _ in range(20)]
        assert identical([*texts], [expected] * 2) and identical(found, [logits] * 20)
    model.generation_config.assistant_early_exit = 1  # in the configuration it means the same
    assert torch.equal(model.generate(ids, **given), expected)
    assert torch.equal(model.generate(ids, transformers.GenerationConfig(**given)), expected)
    assert model.generation_config.assistant_early_exit == 1
    assert {model.config.num_hidden_layers, len(model.backbone.layers)} == {3}


@torch.no_grad()
def test_a_mamba2_can_assist_another_and_sample():
    model, ids = tiny(), tokens(1, 12)
    given = dict(max_new_tokens=30, do_sample=True, eos_token_id=None, pad_token_id=0)
    torch.manual_seed(1)
    text = model.generate(ids, assistant_model=tiny(num_hidden_layers=1), **given)
    assert text.shape == (1, 42) and torch.equal(text[:, :12], ids)


@torch.no_grad()
@pytest.mark.parametrize("prompt", [5, 40])  # more tokens than are read again each time
def test_speculative_decoding_forgets_what_may_be_forgotten_and_nothing_else(prompt):
    model, ids = tiny(dtype=torch.float64), tokens(1, prompt + 20)
    cache = GenerationCache(model, Mamba2Cache(()))
    cache.activate_past_recording()
    model(ids[:, :prompt], cache=cache)
    seen = prompt
    for read, forget in ((6, 2), (1, 0), (3, 3), (4, 1), (2, -9)):
        new, fork = ids[:, seen : seen + read], copy.copy(cache)
        logits = model(new, cache=cache, logits_to_keep=read).logits
        assert_close(logits, model(ids[:, : seen + read]).logits[:, seen:], F64)
        last = model(new, cache=fork, logits_to_keep=1).logits
        assert_close(last, logits[:, -1:], F64)
        if forget >= 0:
            cache.crop(-forget)
            seen += read - forget
        else:
            seen += read
            cache.crop(seen - 1)  # counted from the start
            seen -= 1
        cache.crop(seen + 1)  # of no more tokens than there are
        assert cache.get_seq_length() == seen
        assert_same_state(cache.value(), model(ids[:, :seen]).cache, F64)
    with pytest.raises(ValueError, match="were there to stay"):
        cache.crop(-50)
    with pytest.raises(ValueError, match="reads input_ids alone"):
        model(inputs_embeds=model.get_input_embeddings()(ids), cache=cache)


class StopRows(StoppingCriteria):
    """Ends each row at its second even token: a criterion without eos_token_id."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, 12:] % 2 == 0).sum(1) >= 2


def streamed(model, ids, **options):
    return torch.cat([ids, torch.stack(list(model.stream(ids, **options)), 1)], 1)


STREAMS = {
    "greedy": {},
    "sampled": dict(do_sample=True, temperature=1.3, top_k=20, top_p=0.9, min_p=0.01),
    "penalised": dict(repetition_penalty=1.5, no_repeat_ngram_size=2),
    "penalised and long": dict(repetition_penalty=1.5, max_new_tokens=150),
    "ended": dict(eos_token_id=[46, 57, 51, 7], pad_token_id=3),
    "a limit on rows": dict(stopping_criteria=[StopRows()], max_new_tokens=9, pad_token_id=0),
    "a limit of length": dict(stopping_criteria=[MaxLengthCriteria(17)]),
    "a limit that was reached before": dict(stopping_criteria=[MaxLengthCriteria(3)]),
    "without a cache": dict(use_cache=False),
    "long enough": dict(eos_token_id=[46, 57, 51, 7], pad_token_id=3, min_new_tokens=6),
}


@pytest.mark.parametrize("case", STREAMS)
@torch.no_grad()
def test_a_stream_yields_what_generate_appends(case):
    model = tiny(dtype=torch.float64)
    ids, mask = prompts()
    given = {**GREEDY, "max_new_tokens": 30, **STREAMS[case]}
    for kwargs in (dict(attention_mask=mask), {}):
        torch.manual_seed(1)
        expected = model.generate(ids, **kwargs, **given)
        torch.manual_seed(1)
        assert torch.equal(streamed(model, ids, **kwargs, **given), expected)
    assert case != "ended" or expected.shape[1] < 42
    cache = model.prefill(ids[:, :7], mask[:, :7])
    before = cache.map(torch.clone)
    # With a cache, transformers before 5.23 (seen in 5.17) gives chunks the mask's first columns.
    chunked = case != "without a cache" and Version(transformers.__version__) >= Version("5.23")
    for chunk in (None, 2) if chunked else (None,):
        kwargs = dict(attention_mask=mask, prefill_chunk_size=chunk)
        expected = model.generate(ids, **kwargs, **{**given, "do_sample": False})
        found = streamed(
            model, ids, past_key_values=cache, **kwargs, **{**given, "do_sample": False}
        )
        assert torch.equal(found, expected)
    assert identical(cache.states, before.states)


@torch.no_grad()
def test_a_stream_of_a_bfloat16_model_samples_in_float32():
    model, ids = tiny(dtype=torch.bfloat16), tokens(1, 12).expand(500, -1)
    given = dict(GREEDY, do_sample=True, top_k=0, max_new_tokens=4)
    torch.manual_seed(1)
    expected = model.generate(ids, **given)
    torch.manual_seed(1)
    assert torch.equal(streamed(model, ids, **given), expected)


def test_streams_of_one_model_do_not_disturb_each_other():
    model = tiny(dtype=torch.float64)
    given = dict(GREEDY, max_new_tokens=20)
    texts = [tokens(2, 12, seed=seed) for seed in range(3)]
    expected = [model.generate(ids, **given)[:, 12:] for ids in texts]
    both = zip(*(model.stream(ids, **given) for ids in texts), strict=True)
    for found, right in zip(zip(*both, strict=True), expected, strict=True):
        assert torch.equal(torch.stack(found, 1), right)


def test_what_a_stream_cannot_mean_is_refused_at_once():
    model, ids = tiny(), tokens(2, 12)
    for given, message in (
        (dict(num_beams=2, max_new_tokens=3), "beam_search"),
        (
            dict(do_sample=True, num_return_sequences=2, max_new_tokens=3),
            "num_return_sequences = 2",
        ),
        (dict(assistant_model=model), "assistant_model is an option of generate"),
        (dict(streamer=Recorder()), "streamer is an option of generate"),
        (dict(custom_generate="a/b"), "custom_generate is an option of generate"),
        (dict(tempratur=1.0), "tempratur"),
    ):
        with pytest.raises(ValueError, match=message):
            model.stream(ids, **given)


@torch.no_grad()
def test_sampled_tokens_have_the_frequencies_of_their_probabilities():
    model = tiny(vocab_size=16)
    ids, count = tokens(1, 6, vocabulary=16), 4000
    options = dict(do_sample=True, temperature=0.7, top_k=12, top_p=0.95)
    logits = (model(ids).logits[0, -1].double() / 0.7).sort(descending=True)
    probabilities = logits.values[:12].softmax(0)
    kept = int((probabilities.cumsum(0) < 0.95).sum()) + 1
    probabilities = probabilities[:kept] / probabilities[:kept].sum()
    assert 4 < kept < 12
    torch.manual_seed(2)
    drawn = next(model.stream(ids.expand(count, -1), max_new_tokens=1, **options))
    counts = torch.stack([(drawn == token).sum() for token in logits.indices[:kept]])
    assert counts.sum() == count
    expected = count * probabilities
    chi_square = ((counts - expected).square() / expected).sum().item()
    # Of chi-square's distribution with m degrees of freedom, 0.9999 lie below (Wilson, Hilferty).
    m = kept - 1
    assert chi_square < m * (1 - 2 / (9 * m) + 3.719 * math.sqrt(2 / (9 * m))) ** 3


@torch.no_grad()
def test_a_prompt_is_read_once_and_gone_on_from_many_times(tmp_path):
    model, ids = tiny(dtype=torch.float64), tokens(1, 30)
    state = model.prefill(ids, segment_length=7)
    assert_same_state(state, model(ids).past_key_values, F64)
    state.save(tmp_path / "prompt.safetensors")
    state = Mamba2Cache.load(tmp_path / "prompt.safetensors", DEVICE)
    questions = tokens(3, 5, seed=1)
    whole = torch.cat([ids.expand(3, -1), questions], 1)
    found = model.generate(whole, past_key_values=state.repeat(3), **GREEDY)
    assert torch.equal(found, model.generate(whole, **GREEDY))
    half = state.to(torch.bfloat16)
    assert model(questions[:1], past_key_values=half).past_key_values.states[0].ssm.dtype == (
        torch.bfloat16
    )


def test_prefill_reads_segments_and_makes_neither_logits_nor_gradients():
    model, ids, segments, rows = tiny(), tokens(1, 30), [], []
    model.backbone.register_forward_pre_hook(lambda *_: segments.append(1))
    model.lm_head.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[:2]))
    auto = 1 if CUDA else 4  # a GPU is not asked for so little at a time
    for options, count in (({}, auto), (dict(segment_length=7), 5), (dict(logits_to_keep=0), auto)):
        segments.clear()
        assert not any(t.requires_grad for t in tensors(model.prefill(ids, **options).states))
        assert len(segments) == count and rows.pop() == (1, 1)


def greedy_steps(model, ids, steps):
    """Text of a loop of plain steps: no graph, no transformers."""
    cache, new = None, ids
    with torch.no_grad():
        for _ in range(steps):
            output = model(new, past_key_values=cache, use_cache=True)
            new, cache = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
            ids = torch.cat([ids, new], dim=1)
    return ids


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_a_cuda_graph_decodes_what_the_plain_step_decodes():
    ids = tokens(2, 12)
    given = dict(GREEDY, max_new_tokens=1000)
    for options in ({}, dict(n_groups=2, use_bias=True)):
        model = tiny(**options)
        plain = greedy_steps(model, ids, 1000)
        assert torch.equal(streamed(model, ids, **given), plain)
        graph = mamba2.kernels.DecodingGraph.idle[model]
        assert torch.equal(model.generate(ids, **given), plain)
        assert mamba2.kernels.DecodingGraph.idle[model] is graph
    with torch.no_grad():  # new weights in the old place
        model.backbone.layers[0].mixer.in_proj.weight.mul_(1.5)
    changed = greedy_steps(model, ids, 1000)
    assert not torch.equal(changed, plain)
    assert torch.equal(streamed(model, ids, **given), changed)
    assert mamba2.kernels.DecodingGraph.idle[model] is graph
    model.to(torch.bfloat16)  # and in another
    changed = greedy_steps(model, ids, 100)
    assert torch.equal(streamed(model, ids, **{**given, "max_new_tokens": 100}), changed)
    graph = weakref.ref(mamba2.kernels.DecodingGraph.idle[model])
    del model
    gc.collect()
    assert graph() is None  # freed with its model


@torch.no_grad()
def test_generate_takes_embeddings_for_a_prompt():
    model = tiny(dtype=torch.float64)
    ids, mask = prompts()
    embeddings = model.get_input_embeddings()(ids)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    given = dict(inputs_embeds=embeddings, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(**given), expected[:, 12:])
    assert torch.equal(model.generate(ids, **given), expected)


def test_threads_generate_with_one_model_without_disturbing_each_other():
    model = tiny()
    texts = [tokens(1, 12, seed=seed) for seed in range(4)]
    expected = [model.generate(ids, **GREEDY) for ids in texts]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda ids: model.generate(ids, **GREEDY), texts * 3))
    assert identical(found, expected * 3)


@torch.no_grad()
def test_a_stream_is_its_own_whatever_is_done_with_its_tokens():
    model, ids = tiny(dtype=torch.float64, return_dict=False, use_cache=False), tokens(2, 12)
    expected = tiny(dtype=torch.float64).generate(ids, **GREEDY)[:, 12:]
    found = []
    for token in model.stream(ids, **GREEDY):
        found.append(token.clone())
        token.zero_()
    assert torch.equal(torch.stack(found, 1), expected)
    assert model.prefill(ids).length == 12
    embeddings = model.get_input_embeddings()(ids)
    found = list(model.stream(None, inputs_embeds=embeddings, **GREEDY))
    assert torch.equal(torch.stack(found, 1), expected)


@torch.no_grad()
def test_a_cache_is_shared_by_several_samples_and_beams():
    model, ids = tiny(dtype=torch.float64), tokens(2, 12)
    cache = model.prefill(ids[:, :9])
    for given in (dict(num_beams=3), dict(do_sample=True, num_return_sequences=3)):
        given = {**GREEDY, **given}
        torch.manual_seed(0)
        expected = model.generate(ids, **given)
        torch.manual_seed(0)
        assert torch.equal(model.generate(ids, past_key_values=cache, **given), expected)


@torch.no_grad()
def test_speculation_gives_hidden_states_to_who_asks():
    model, ids = tiny(dtype=torch.float64), tokens(1, 12).repeat(1, 2)
    given = dict(GREEDY, return_dict_in_generate=True, output_hidden_states=True)
    given["eos_token_id"] = VOCABULARY  # never; transformers 5.5 must have one here
    output = model.generate(ids, prompt_lookup_num_tokens=3, **given)
    hidden = torch.cat([step[-1] for step in output.hidden_states], dim=1)
    whole = model(output.sequences[:, :-1], output_hidden_states=True).hidden_states[-1]
    assert_close(hidden, whole, F64)


def _replace_head(model):
    model.lm_head = copy.deepcopy(model.lm_head)
    torch.nn.init.normal_(model.lm_head.weight)


def _give_own_options(mixer, **options):
    mixer.config = copy.deepcopy(mixer.config)
    vars(mixer.config).update(options)


def _read_in_another_order(weight):
    """Another layout of the same memory: (d, 1, k), of which d is the innermost now."""
    weight.data = weight.data.as_strided(weight.shape, (1, 1, weight.shape[0]))


# Whatever a step depends on, besides values of weights: each changes the logits.
DEPENDS = {
    "an option": lambda m: setattr(m.config, "time_step_limit", (0.3, 0.4)),
    "an option of one layer": lambda m: _give_own_options(
        m.backbone.layers[1].mixer, time_step_limit=(0.3, 0.4)
    ),
    "the residual stream's dtype": lambda m: setattr(m.config, "residual_in_fp32", False),
    "eps": lambda m: setattr(m.backbone.norm_f, "eps", 3.0),
    "eps of a layer's norm": lambda m: setattr(m.backbone.layers[0].mixer.norm, "eps", 3.0),
    "groups": lambda m: setattr(m.backbone.layers[0].mixer.norm, "groups", 4),
    "a head": _replace_head,
    "the order of layers": lambda m: setattr(m.backbone, "layers", m.backbone.layers[::-1]),
    "a layer twice": lambda m: setattr(
        m.backbone, "layers", nn.ModuleList([m.backbone.layers[0]] * 2)
    ),
    "an address": lambda m: setattr(m.lm_head.weight, "data", m.lm_head.weight.data * 1.5),
    "a layout": lambda m: _read_in_another_order(m.backbone.layers[0].mixer.conv1d.weight),
    "a lazy minus": lambda m: setattr(
        m.backbone.norm_f.weight, "data", torch._neg_view(m.backbone.norm_f.weight.data)
    ),
    "a bias": lambda m: setattr(
        m.lm_head,
        "bias",
        nn.Parameter(torch.randn(VOCABULARY, device=DEVICE, dtype=torch.bfloat16)),
    ),
    "no bias": lambda m: setattr(m.backbone.layers[0].mixer.conv1d, "bias", None),
    "a dtype": lambda m: m.to(torch.float16),
}
PLACE = dict(device=DEVICE)


def fingerprint(model):
    return mamba2.kernels._fingerprint(model, model.device)


@pytest.mark.parametrize("name", DEPENDS)
def test_a_graph_is_made_for_all_that_a_step_depends_on(name):
    model = tiny(dtype=torch.bfloat16)
    before = fingerprint(model)
    assert before is not None and fingerprint(model) == before
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
    assert fingerprint(model) == before  # new values in the old place
    DEPENDS[name](model)
    assert fingerprint(model) not in (before, None)


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("name", DEPENDS)
@torch.no_grad()
def test_kernel_graph_is_made_anew_for_all_that_a_step_depends_on(name):
    model, ids = tiny(dtype=torch.bfloat16), tokens(2, 12)
    given = dict(GREEDY, output_logits=True, return_dict_in_generate=True)

    def both():
        """Logits of steps: by a graph, and plain."""
        found = model.generate(ids, **given)
        assert model in mamba2.kernels.DecodingGraph.idle
        output, logits = model(found.sequences[:, :12], use_cache=True, logits_to_keep=1), []
        for t in range(12, 24):
            logits.append(output.logits[:, -1])
            output = model(found.sequences[:, t : t + 1], cache=output.cache, use_cache=True)
        return torch.stack(found.logits, 1).float(), torch.stack(logits, 1).float()

    assert_close(*both(), 1e-2)
    first = mamba2.kernels.DecodingGraph.idle[model]
    before = model(ids).logits.float()
    DEPENDS[name](model)
    assert relative_error(model(ids).logits.float(), before) > 1e-3  # or it would show nothing
    assert_close(*both(), 1e-2)
    assert mamba2.kernels.DecodingGraph.idle[model] is not first


class OwnLinear(nn.Linear):
    factor = 1.0

    def forward(self, x):
        return self.factor * super().forward(x)


# Models with parts that a graph might not follow.
NO_GRAPH = {
    "training": lambda m: m.train(),
    "a hook": lambda m: m.backbone.layers[1].mixer.register_forward_hook(lambda *given: None),
    "a hook before": lambda m: m.lm_head.register_forward_pre_hook(lambda *given: None),
    # as accelerate wraps it
    "a forward of its own": lambda m: setattr(m, "forward", functools.partial(m.forward)),
    "a wrapped head": lambda m: setattr(
        m, "lm_head", nn.Sequential(nn.Dropout(0.5), m.lm_head).eval()
    ),
    "a head of another class": lambda m: setattr(m, "lm_head", OwnLinear(32, VOCABULARY).eval()),
    "another class": lambda m: setattr(
        m, "__class__", type("Own", (Mamba2ForCausalLM,), dict(forward=None))
    ),
    "a buffer": lambda m: m.lm_head.register_buffer("scale", torch.ones(1)),
    "compiled": lambda m: m.backbone.compile(backend="eager"),
    "sharded": lambda m: setattr(
        m.lm_head, "weight", type("Shard", (nn.Parameter,), {})(m.lm_head.weight)
    ),
    "a part elsewhere": lambda m: m.backbone.norm_f.to("meta"),
    "an adapter": lambda m: peft.get_peft_model(
        m, peft.LoraConfig(target_modules=["in_proj"], task_type="CAUSAL_LM")
    ),
}


@pytest.mark.parametrize("name", NO_GRAPH)
def test_a_model_gets_no_graph_if_it_has_parts_that_a_graph_might_not_follow(name):
    model = tiny()
    device = model.device
    assert mamba2.kernels._fingerprint(model, device) is not None
    handle = NO_GRAPH[name](model)
    assert mamba2.kernels._fingerprint(model, device) is None
    if "hook" in name:
        handle.remove()
        assert mamba2.kernels._fingerprint(model, device) is not None


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_kernel_graph_is_not_taken_where_it_is_switched_off_or_the_model_is_watched(monkeypatch):
    model, ids, idle = tiny(), tokens(2, 12), mamba2.kernels.DecodingGraph.idle
    expected, seen = model.generate(ids, **GREEDY), []
    assert idle.pop(model)
    monkeypatch.setattr(mamba2.kernels.DecodingGraph, "enabled", False)
    assert torch.equal(model.generate(ids, **GREEDY), expected) and model not in idle
    monkeypatch.undo()
    model.lm_head.register_forward_hook(lambda *given: seen.append(given))
    assert torch.equal(model.generate(ids, **GREEDY), expected) and model not in idle
    assert len(seen) == 12


@torch.no_grad()
def test_a_graph_is_made_for_the_switches_of_pytorch(monkeypatch):
    modes, matmul = mamba2.kernels._modes, torch.backends.cuda.matmul
    before = modes()
    assert before is not None
    with torch.enable_grad():
        assert modes() is None
    if CUDA:
        with torch.autocast("cuda", torch.bfloat16):
            assert modes() is None
    with torch.inference_mode():
        assert modes() not in (before, None)
    torch.use_deterministic_algorithms(True)
    assert modes() not in (before, None)
    torch.use_deterministic_algorithms(False)
    newer = Version(torch.__version__) >= Version("2.9")
    tf32 = ("fp32_precision", "tf32") if newer else ("allow_tf32", True)
    for name, other in (tf32, ("allow_bf16_reduced_precision_reduction", False)):
        old = getattr(matmul, name)
        setattr(matmul, name, other)
        try:
            assert modes() not in (before, None)
        finally:
            setattr(matmul, name, old)
    assert modes() == before


class PlainGraph:
    """Stands in for a DecodingGraph on any device: steps of the model as it was at first."""

    def __init__(self, model, cache):
        self.model, self.cache, self.steps = copy.deepcopy(model), cache, 0

    def __call__(self, ids):
        output = self.model(ids, cache=self.cache, use_cache=True)
        self.cache, self.steps = output.cache, self.steps + 1
        return output.logits[:, -1]

    def copies(self):
        return [tuple(state) for state in self.cache.map(torch.clone).states]

    def load(self, cache):
        self.cache = cache


def _move_all(model):
    """Other weights in other memory; what the old ones leave is filled with NaN."""
    for weight in model.parameters():
        old = weight.data
        weight.data = old * 1.3
        if CUDA:  # a graph that still read it would fail
            size = old.numel()
            del old
            torch.full((size,), torch.nan, dtype=weight.dtype, device=DEVICE)


def _assign(model):
    state = {name: weight * 1.3 for name, weight in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


MEANWHILE = {
    "weights move": _move_all,
    "one weight moves": lambda m: setattr(
        m.backbone.layers[1].mixer.out_proj.weight,
        "data",
        m.backbone.layers[1].mixer.out_proj.weight.data * -2,
    ),
    "parameters are replaced": _assign,
    "the head is replaced": _replace_head,
    "a layer is replaced": lambda m: m.backbone.layers.__setitem__(
        0, copy.deepcopy(m.backbone.layers[1])
    ),
    "layers change places": lambda m: setattr(m.backbone, "layers", m.backbone.layers[::-1]),
}


@pytest.mark.parametrize("name", MEANWHILE)
@torch.no_grad()
def test_what_happens_to_weights_between_two_tokens_reaches_the_next(name, monkeypatch):
    ids, taken, kernels = tokens(2, 12), [], mamba2.kernels
    given = dict(GREEDY, max_new_tokens=30)
    if not CUDA:

        def take(model, cache):
            taken.append(PlainGraph(model, cache))
            return taken[-1]

        monkeypatch.setattr(kernels.DecodingGraph, "take", take)
        monkeypatch.setattr(kernels.DecodingGraph, "give_back", lambda model, graph: None)

    def text(tokens_of, change):
        model, found = tiny(), []
        for i, token in enumerate(tokens_of(model)):
            found.append(token)
            if i == 10:
                torch.manual_seed(1)
                change(model)
        return torch.stack(found, 1)

    def steps(model):
        new, cache = ids, None
        for _ in range(30):
            output = model(new, cache=cache, use_cache=True)
            new, cache = output.logits[:, -1].argmax(-1, keepdim=True), output.cache
            yield new[:, 0]

    def stream(model):
        return model.stream(ids, **given)

    plain = text(steps, lambda model: None)
    assert torch.equal(text(stream, lambda model: None), plain)
    expected = text(steps, MEANWHILE[name])
    assert not torch.equal(expected, plain)
    assert torch.equal(text(stream, MEANWHILE[name]), expected)
    if taken:
        assert [graph.steps for graph in taken] == [29, 10]  # and plain steps after them


@torch.no_grad()
def test_a_decoder_without_its_graph_has_states_and_takes_others(monkeypatch):
    model, ids = tiny(dtype=torch.float64), tokens(2, 12)
    closed, kernels = [], mamba2.kernels
    monkeypatch.setattr(kernels.DecodingGraph, "give_back", lambda *given: closed.append(given))
    first, second = model.prefill(ids[:, :6]), model.prefill(ids)
    for valid in (True, False):
        decoder = kernels.Decoder(model, PlainGraph(model, first), type(first))
        decoder(ids[:, 6:7])
        if not valid:
            _assign(model)
            cache = decoder.graph.cache
            cache = model(ids[:, 7:8], cache=cache, use_cache=True).cache
            decoder(ids[:, 7:8])
            assert_close([t for s in decoder.states() for t in s], tensors(cache.states), F64)
        decoder.load(second)
        want = model(ids[:, :1], cache=second, use_cache=True)
        assert_close(decoder(ids[:, :1]), want.logits, F64)
        assert_close([t for s in decoder.states() for t in s], tensors(want.cache.states), F64)
        decoder.close()
        assert len(closed) == 1  # a graph out of use is not kept


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@torch.no_grad()
def test_kernel_graph_keeps_no_weights_while_it_is_not_used():
    model, ids = tiny(), tokens(2, 12)
    stream = model.stream(ids, **GREEDY)
    next(stream), next(stream)
    old = StorageWeakRef(model.lm_head.weight.untyped_storage())
    model.to("cpu")
    assert not old.expired()  # a graph may read it
    with pytest.raises(RuntimeError):  # as a plain step: ids are on the GPU
        next(stream)
    gc.collect()
    assert old.expired()
    model.to(DEVICE)
    model.generate(ids, **GREEDY)
    assert model in mamba2.kernels.DecodingGraph.idle
    old = StorageWeakRef(model.lm_head.weight.untyped_storage())
    model.to("cpu")
    gc.collect()
    assert old.expired()


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@torch.no_grad()
def test_kernel_graph_is_made_for_the_states_of_all_layers():
    model, ids = tiny(), tokens(2, 12)
    cache = model.prefill(ids)
    given = dict(GREEDY, return_dict_in_generate=True)
    given["attention_mask"] = torch.ones(2, 13, device=DEVICE, dtype=torch.long)
    first, last = cache.states
    mixed = (first, Mamba2State(last.conv, last.ssm.bfloat16()))
    for states in (cache.states, mixed, cache.states):
        found = model.generate(ids[:, :1], cache=type(cache)(states, cache.length), **given)
        assert [s.ssm.dtype for s in found.cache.states] == [s.ssm.dtype for s in states]
        past, new = type(cache)(states, cache.length), found.sequences
        for t in range(12):
            past = model(new[:, t : t + 1], cache=past, use_cache=True).cache
        assert_same_state(found.cache, past, 1e-2 if states is mixed else F32)


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("call", [0, 3])  # while it is tried out, while it is captured
def test_kernel_graph_that_found_no_memory_is_tried_again(call, monkeypatch):
    model, ids, kind = tiny(), tokens(2, 12), mamba2.kernels.DecodingGraph
    expected, calls, step = greedy_steps(model, ids, 12), [], kind.step

    def failing(self, *given):
        logits = step(self, *given)
        calls.append(1)
        if len(calls) == call + 1:
            raise torch.OutOfMemoryError("no memory")
        return logits

    monkeypatch.setattr(kind, "step", failing)
    with pytest.warns(UserWarning, match="without a CUDA graph: no memory"):
        assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert model not in kind.idle
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert model in kind.idle


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_kernel_graph_is_used_on_one_stream_after_another():
    model, ids = tiny(), tokens(2, 12)
    expected = greedy_steps(model, ids, 100)
    given, graphs = dict(GREEDY, max_new_tokens=100), []
    for stream in (torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.default_stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = model.generate(ids, **given)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(found, expected)
        graphs.append(mamba2.kernels.DecodingGraph.idle[model])
    assert graphs[0] is graphs[1] is graphs[2]


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@torch.no_grad()
def test_kernel_graph_is_left_for_plain_steps_where_autocast_begins():
    model, ids = tiny(), tokens(2, 12)
    stream = model.stream(ids, **GREEDY)
    found = [next(stream) for _ in range(5)]
    with torch.autocast("cuda", torch.bfloat16):
        found.append(next(stream))
    found += stream
    assert torch.stack(found, 1).shape == (2, 12)
    assert model not in mamba2.kernels.DecodingGraph.idle


class PlainDecoder:
    """Stands in for a CUDA graph on any device: plain steps, whose logits lie in one place."""

    def __init__(self, model, cache):
        self.model, self.cache, self.steps, self.closed = model, cache, 0, False
        self.logits = torch.empty(len(cache.states[0].ssm), 1, VOCABULARY, **DRAW)

    def __call__(self, ids):
        assert not self.closed
        output = self.model(ids, cache=self.cache, use_cache=True)
        self.cache, self.steps = output.cache, self.steps + 1
        return self.logits.copy_(output.logits)

    def states(self):
        return self.cache.map(torch.clone).states

    def load(self, cache):
        self.cache = cache

    def close(self):
        self.closed = True


@torch.no_grad()
def test_generate_gives_plain_steps_to_a_decoder_and_all_others_to_the_model(monkeypatch):
    model = tiny(dtype=torch.float64)
    ids, mask = prompts()
    text = dict(inputs=ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    texts = [{}, dict(output_logits=True), dict(output_hidden_states=True), dict(guidance_scale=2)]
    texts += [dict(num_beams=3), dict(num_return_sequences=2, do_sample=True)]
    texts += [dict(eos_token_id=model.generate(**text).sequences[0, 18].item())]

    def run(given):
        torch.manual_seed(0)
        return model.generate(**text | given)

    expected = [run(given) for given in texts]
    streamed_text = streamed(model, ids, attention_mask=mask, **GREEDY)
    taken = []

    def decoder(model, cache):
        taken.append(PlainDecoder(model, cache))
        return taken[-1]

    monkeypatch.setattr(mamba2.kernels, "decoder", decoder)
    for given, right in zip(texts, expected, strict=True):
        taken.clear()
        found = run(given)
        assert torch.equal(found.sequences, right.sequences)
        assert_close(list(found.logits or ()), list(right.logits or ()))
        assert_close(list(found.hidden_states or ()), list(right.hidden_states or ()))
        if right.cache is not None:  # of beams there is none
            assert_same_state(found.cache, right.cache, F64)
            assert found.cache.get_seq_length() == right.cache.get_seq_length()
        assert [decoder.closed for decoder in taken] == [True] * len(taken)
        if "output_hidden_states" in given:
            assert not taken
        elif "guidance_scale" not in given:
            assert [decoder.steps for decoder in taken] == [found.sequences.shape[1] - 13]
    taken.clear()
    assert torch.equal(streamed(model, ids, attention_mask=mask, **GREEDY), streamed_text)
    assert [decoder.steps for decoder in taken] == [11] and taken[0].closed
    model(ids, mask)
    assert len(taken) == 1  # outside of generate there is none


@torch.no_grad()
def test_a_decoder_gives_its_states_back_for_what_it_cannot_read(monkeypatch):
    model = tiny(dtype=torch.float64)
    ids, mask = prompts()
    mask[2, 10] = 0  # after tokens that all rows have, so that a decoder has begun
    given = dict(attention_mask=mask, prefill_chunk_size=1, return_dict_in_generate=True, **GREEDY)
    expected, taken = model.generate(ids, **given), []

    def decoder(model, cache):
        taken.append(PlainDecoder(model, cache))
        return taken[-1]

    monkeypatch.setattr(mamba2.kernels, "decoder", decoder)
    found = model.generate(ids, **given)
    assert torch.equal(found.sequences, expected.sequences)
    assert_same_state(found.cache, expected.cache, F64)
    assert [decoder.steps for decoder in taken] == [1, 12]
    assert all(decoder.closed for decoder in taken)


class Recorder(BaseStreamer):
    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, value):
        self.seen += value.flatten().tolist()

    def end(self):
        self.ended = True


class StopAt(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


@torch.no_grad()
def test_a_streamer_sees_each_token_and_every_stop_is_kept():
    model, ids = tiny(), tokens(1, 12)
    text, streamer = model.generate(ids, **GREEDY)[0].tolist(), Recorder()
    model.generate(ids, streamer=streamer, **GREEDY)
    assert streamer.seen == text and streamer.ended
    stop = text[15]
    until = text[: 12 + text[12:].index(stop) + 1]
    assert model.generate(ids, stopping_criteria=[StopAt(stop)], **GREEDY)[0].tolist() == until
    assert model.generate(ids, **{**GREEDY, "eos_token_id": stop})[0].tolist() == until
    assert model.generate(ids, **GREEDY | {"max_new_tokens": None, "max_length": 14}).shape[1] == 14
    other = tokens(1, 12, seed=5)
    both = model.generate(torch.cat([ids, other]), **{**GREEDY, "eos_token_id": stop})
    rest = both[0, len(until) :].tolist()
    assert both[0, : len(until)].tolist() == until and set(rest) <= {0}  # pad_token_id


@torch.no_grad()
def test_several_samples_of_one_prompt_are_those_of_the_prompt_repeated():
    model = tiny()
    ids, mask = prompts()
    given = {**GREEDY, "do_sample": True, "top_k": 0}
    torch.manual_seed(0)
    several = model.generate(ids, attention_mask=mask, num_return_sequences=2, **given)
    torch.manual_seed(0)
    ids, mask = ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
    assert torch.equal(several, model.generate(ids, attention_mask=mask, **given))
    assert not torch.equal(several[0], several[1])


def test_what_generate_cannot_do_right_is_refused():
    model, ids = tiny(), tokens(1, 12)
    with pytest.raises(ValueError, match="tempratur"):
        model.generate(ids, tempratur=1.0, **GREEDY)
    with pytest.raises((TypeError, ValueError), match="position_ids"):
        model.generate(ids, position_ids=ids, **GREEDY)
    for name, bad in itertools.product(CACHE_NAMES, ({}, ((1, 2),), transformers.DynamicCache())):
        with pytest.raises(TypeError, match="cache is a"):
            model.generate(ids, **{name: bad}, **GREEDY)
    cache = model(ids).cache
    for write in (model.generate, model.stream):
        with pytest.raises(TypeError, match="are one argument"):
            write(ids, cache=cache, past_key_values=cache, **GREEDY)
        if mamba2.CACHE != "cache":  # since 5.24 transformers itself takes it for another name
            with pytest.raises(ValueError, match="cache_params"):
                write(ids, cache_params=cache, **GREEDY)


@torch.no_grad()
def test_what_generate_cannot_read_is_answered_with_the_remedy():
    model, ids = tiny(), tokens(2, 12)
    embeddings, seq_idx = model.get_input_embeddings()(ids), 0 * ids
    for given, error, message in (
        (dict(inputs=ids[0]), ValueError, r"input_ids has shape \(12,\): it must be \(b, l\)"),
        (dict(inputs=[[1, 2]]), TypeError, "input_ids is a list: it must be a tensor"),
        (dict(input_ids=[[1, 2]]), TypeError, "input_ids is a list: it must be a tensor"),
        (dict(inputs=ids > 9), TypeError, "input_ids is torch.bool: .* of integers"),
        (dict(inputs=ids.float()), TypeError, "input_ids is torch.float32: .* of integers"),
        (dict(inputs=ids[:, :0]), ValueError, r"has shape \(2, 0\): it must hold a token"),
        (dict(inputs=ids[:0]), ValueError, r"has shape \(0, 12\): it must hold a token"),
        (dict(inputs=ids, seq_idx=seq_idx.tolist()), TypeError, "seq_idx is a list: it must"),
        (dict(inputs=ids, seq_idx=seq_idx[:, 1:]), ValueError, r"\(2, 11\): it must be \(2, 12\)"),
        (dict(inputs=ids, cache_implementation="paged"), ValueError, "= 'paged': leave it out; a"),
        (dict(inputs=ids, cache_implementation="static"), ValueError, "'static': leave it out"),
        (
            dict(inputs=ids, seq_idx=seq_idx, prefill_chunk_size=4),
            ValueError,
            "prefill_chunk_size = 4: leave it out; with seq_idx .* read the prompt with `prefill`",
        ),
        (
            dict(inputs_embeds=embeddings, prefill_chunk_size=4),
            ValueError,
            "prefill_chunk_size = 4: leave it out; with .* inputs_embeds, read the prompt with",
        ),
        (dict(inputs=ids, group=3), ValueError, "group = 3: leave it out; read the prompt with"),
        (
            dict(inputs=ids, cache=model.prefill(ids[:, :5]), use_cache=False),
            ValueError,
            "use_cache = False: leave it out, or leave out the cache",
        ),
    ):
        with pytest.raises(error, match=message):
            model.generate(**given, **GREEDY)
    with pytest.raises(ValueError, match="generate_batch .*: pad on the left and use generate"):
        model.generate_batch([[1, 2], [3]])
    model.generation_config.cache_implementation = "paged"
    with pytest.raises(ValueError, match="cache_implementation = 'paged': leave it out"):
        model.generate(ids, **GREEDY)
    model.generation_config.cache_implementation = None
    model.generation_config.prefill_chunk_size = 4
    with pytest.raises(ValueError, match="prefill_chunk_size = 4"):
        model.generate(ids, seq_idx=seq_idx, **GREEDY)
    # The remedy.
    model.generation_config.prefill_chunk_size = None
    cache = model.prefill(ids[:, :11], seq_idx=tokens(2, 11), segment_length=4)
    found = model.generate(ids, cache=cache, **GREEDY)
    expected = model.generate(ids, seq_idx=F.pad(tokens(2, 11), (0, 1), "replicate"), **GREEDY)
    assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_tokens_are_integers_of_any_size(dtype):
    model, ids = tiny(), tokens(2, 12)
    assert torch.equal(model.generate(ids.to(dtype), **GREEDY), model.generate(ids, **GREEDY))
    assert torch.equal(streamed(model, ids.to(dtype), **GREEDY), model.generate(ids, **GREEDY))
    assert torch.equal(model(ids.to(dtype), labels=ids.to(dtype)).loss, model(ids, labels=ids).loss)


@torch.no_grad()
def test_a_packed_cache_goes_on_with_the_labels_of_the_whole_or_of_what_is_new():
    model, ids = tiny(dtype=torch.float64), tokens(2, 12)
    for new in ("222", "223", "233", "333"):  # where the last sequence begins, with the cache at 9
        seq_idx = torch.tensor([int(c) for c in "001111122" + new], device=DEVICE).expand(2, 12)
        last = 9 + new.find("3") if "3" in new else 7
        expected = model.generate(ids[:, last:], **GREEDY)[:, 12 - last :]
        cache = model(ids[:, :9], seq_idx=seq_idx[:, :9]).cache
        assert torch.equal(model.generate(ids, seq_idx=seq_idx, **GREEDY)[:, 12:], expected)
        found = model.generate(ids, seq_idx=seq_idx, cache=cache, **GREEDY)
        assert torch.equal(found[:, 12:], expected)
        given = dict(attention_mask=torch.ones_like(ids), cache=cache, **GREEDY)
        found = model.generate(ids[:, 9:], seq_idx=seq_idx[:, 9:], **given)
        assert torch.equal(found[:, 3:], expected)
        if new == "222":  # the cache knows
            assert torch.equal(model.generate(ids, cache=cache, **GREEDY)[:, 12:], expected)


# ------------------------------------------------------------------------ Trainer, PEFT, pipelines

TEXTS = ["a", "bb bb bb bb bb", "no text at all", "text", "ab" * 9, "cd" * 12, "short", "to a to a"]


def byte_data():
    tokenizer = transformers.ByT5Tokenizer()
    return tokenizer, [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]


def train(folder, collator, data, model=None, optimizer=None, resume=None, **options):
    """What transformers' Trainer makes of a model, and the losses on the way."""
    if model is None:
        model = tiny(vocab_size=384, dtype=torch.float64)
    if optimizer is None:
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2)
    given = dict(max_steps=6, per_device_train_batch_size=4, logging_steps=1, save_strategy="no")
    given |= dict(use_cpu=DEVICE.type == "cpu", report_to=[], disable_tqdm=True)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(folder), **{**given, **options}),
        train_dataset=data,
        data_collator=collator,
        optimizers=(optimizer, None),
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def collators(tokenizer):
    padding = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    packing = transformers.DataCollatorWithFlattening(
        return_position_ids=False, return_seq_idx=True
    )
    return padding, packing


def test_the_trainer_lowers_the_loss_of_padded_and_of_packed_batches(tmp_path):
    tokenizer, data = byte_data()
    for collator in collators(tokenizer):
        _, losses = train(tmp_path, collator, data, max_steps=12)
        assert len(losses) == 12 and sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_padding_and_packing_collators_give_the_same_loss():
    model, (tokenizer, data) = tiny(vocab_size=384, dtype=torch.float64), byte_data()
    batches = [collator([dict(row) for row in data]) for collator in collators(tokenizer)]
    assert batches[0]["input_ids"].shape[0] == 8 and batches[1]["input_ids"].shape[0] == 1
    losses = [model(**{k: v.to(DEVICE) for k, v in batch.items()}).loss for batch in batches]
    assert_close(*losses, F64)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="transformers 5.5's Trainer with accelerate 1.15 divides once more, Llama's loss too",
)
def test_accumulated_gradients_are_those_of_the_big_batch(tmp_path):
    tokenizer, data = byte_data()
    weights = []
    for size, accumulation in ((4, 1), (1, 4)):
        model = tiny(vocab_size=384, dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        given = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
        train(
            tmp_path,
            collators(tokenizer)[0],
            data,
            model,
            optimizer,
            max_steps=1,
            max_grad_norm=0.0,
            **given,
        )
        weights.append(dict(model.named_parameters()))
    before = dict(tiny(vocab_size=384, dtype=torch.float64).named_parameters())
    for name in before:
        assert not torch.equal(weights[0][name], before[name])
        assert_close(weights[1][name], weights[0][name], F64)


def test_training_that_is_resumed_ends_where_it_would_have_ended(tmp_path):
    tokenizer, data = byte_data()
    given = dict(save_strategy="steps", save_steps=2, max_steps=4)
    whole, losses = train(tmp_path, collators(tokenizer)[0], data, **given)
    resumed, rest = train(
        tmp_path, collators(tokenizer)[0], data, resume=str(tmp_path / "checkpoint-2"), **given
    )
    assert rest == losses  # the log of the first half is restored too
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert_close(one, other, F64)
    last = load(tmp_path / "checkpoint-4", dtype=torch.float64)
    assert_same_model(last, resumed.to(DEVICE).eval(), F64)


def test_weight_decay_spares_all_but_projections_convolutions_and_embedding():
    model = tiny(**ALL)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    kept = {re.sub(r".*\.\d\.", "", names[id(p)]) for p in decayed["params"]}
    assert kept == {"backbone.embeddings.weight"} | {
        f"mixer.{part}.weight" for part in ("in_proj", "out_proj", "conv1d")
    }
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_the_loss_is_divided_by_the_number_of_items_that_is_given():
    model, ids = tiny(dtype=torch.float64), tokens(2, 9)
    loss = model(ids, labels=ids).loss
    count = torch.tensor(16, device=DEVICE)  # as Trainer does, to accumulate unequal batches
    parts = [slice(0, 2), slice(2, 9)]
    mine = [model(ids[:, p], labels=ids[:, p], num_items_in_batch=count).loss for p in parts]
    alone = [model(ids[:, p], labels=ids[:, p]).loss * (p.stop - p.start - 1) / 8 for p in parts]
    assert_close(torch.stack(mine), torch.stack(alone), F64)
    assert_close(model(ids, labels=ids, num_items_in_batch=4).loss, loss * 16 / 4, F64)


def test_gradient_checkpointing_computes_twice_and_changes_no_gradient():
    model, ids = tiny(dtype=torch.float64, **ALL).train(), tokens(2, 20)
    mask, seq_idx = (ids % 4 > 0).long(), torch.arange(20, device=DEVICE).expand(2, 20) // 8
    calls = []
    model.backbone.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    given = dict(attention_mask=mask, seq_idx=seq_idx, labels=ids)
    expected = model_gradients(model, model(ids, **given).loss)
    assert len(calls) == 1
    for times, kwargs in enumerate((None, {}, dict(use_reentrant=False)), 1):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        assert_same_gradients(model_gradients(model, model(ids, **given).loss), expected)
        assert len(calls) == 1 + 2 * times
    model.gradient_checkpointing_disable()
    assert_same_gradients(model_gradients(model, model(ids, **given).loss), expected)
    assert len(calls) == 8


# --------------------------------------------------------------------------------- long sequences


SEGMENTS = [1, 3, 7, 19, 20, 100, "auto"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_segments_of_any_length_give_loss_and_gradients_of_the_whole(masked, apart, layer_by_layer):
    model = tiny(dtype=torch.float64, **ALL).train()
    ids, mask, labels = padded()
    states = model(ids, use_cache=True).past_key_values.states
    states = [Mamba2State(*map(torch.randn_like, state)) for state in states]
    leaves = [model.get_input_embeddings()(ids), *tensors(states)]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    given = dict(attention_mask=mask if masked else None, seq_idx=packed()[1] if apart else None)
    if layer_by_layer:
        model.gradient_checkpointing_enable()

    def results(segment_length):
        parts = iter(leaves[1:])
        output = model(
            inputs_embeds=leaves[0],
            labels=labels,
            past_key_values=Mamba2Cache([Mamba2State(next(parts), next(parts)) for _ in states]),
            segment_length=segment_length,
            use_cache=True,
            **given,
        )
        used = [p for p in model.parameters() if p is not model.get_input_embeddings().weight]
        inputs = [*used, model.lm_head.weight, *leaves]
        loss = output.loss + sum(t.square().sum() for t in tensors(output.past_key_values.states))
        return [output.loss, *tensors(output.past_key_values.states)], gradients(loss, inputs)

    expected = results(0)
    for segment_length in SEGMENTS:
        found = results(segment_length)
        assert_close(found, expected, 1e-12, case=segment_length)


def test_segments_add_up_gradients_over_batches_and_from_token_ids():
    model = tiny(dtype=torch.float64, **ALL).train()
    ids, mask, labels = padded()
    total = (labels != -100).sum()

    def results(segment_length):
        model.zero_grad()
        for rows in (slice(0, 2), slice(2, 6)):
            given = dict(attention_mask=mask[rows], labels=labels[rows], num_items_in_batch=total)
            model(ids[rows], segment_length=segment_length, **given).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = results(0)
    for segment_length in SEGMENTS:
        assert_same_gradients(results(segment_length), expected, 1e-12)
    model.config.segment_length = 3  # None, in a call, is the config's choice
    calls = []
    model.backbone.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_same_gradients(results(None), expected, 1e-12)
    assert len(calls) == 2 * 2 * 7  # batches, times forward and again, times segments


def test_many_segments_in_autocast_cost_no_more_than_one():
    exact, ids = tiny(dtype=torch.float64).train(), tokens(1, 400)
    expected = model_gradients(exact, exact(ids, labels=ids).loss)
    model, errors = tiny().train(), []
    for segment_length in (0, 2):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = model(ids, labels=ids, segment_length=segment_length).loss
        with torch.autocast(DEVICE.type, torch.float16), torch.no_grad():  # is the caller's choice
            state = model(ids, use_cache=True, segment_length=segment_length).past_key_values
        assert state.states[0].conv.dtype == torch.float16
        found = model_gradients(model, loss)
        errors.append(
            {n: ((found[n] - expected[n]).norm() / expected[n].norm()).item() for n in expected}
        )
    # 200 gradients that are added up in bfloat16 would cost several times as much.
    for name, error in errors[0].items():
        assert errors[1][name] < 1.2 * error + 1e-3, name


def peak(model, run):
    """Bytes alive at most in `run().backward()`, above those of weights and gradients."""
    model.zero_grad()
    for parameter in model.parameters():
        parameter.grad = None
    with Bytes() as watch:
        run().backward()
    # Views of the weights count among the bytes too.
    return watch.peak - 2 * sum(p.nbytes for p in model.parameters())


def grid_loss(model, ids, group, length):
    """The loss with checkpoints of cells of `group` layers by `length` positions, to compare with.

    This is multi-axis gradient checkpointing (arXiv 2411.19460), in our chunked cross entropy.
    """

    def cell(layers, h, states):
        new = []
        for layer, state in zip(layers, states, strict=True):
            h, state = layer(h, state)
            new.append(state)
        return h, new

    backbone = model.backbone
    segments = [*backbone.embeddings(ids).split(length, dim=1)]
    for i in range(0, len(backbone.layers), group):
        layers, states = backbone.layers[i : i + group], [None] * group
        for j, h in enumerate(segments):
            segments[j], states = checkpoint(cell, layers, h, states, use_reentrant=False)
    h = backbone.norm_f(torch.cat(segments, dim=1))
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    return model.summed_loss(h, targets) / (ids.shape[1] - 1)


@pytest.mark.parametrize("masked", [False, True])
def test_states_and_their_gradients_keep_nothing_longer_alive(masked):
    layer = make_layer()
    u, state = layer_inputs(layer, 2, 50)
    _, new = layer.step(u, state, torch.rand(2, 50, device=DEVICE) < 0.8 if masked else None)
    for tensor in (*new, *torch.autograd.grad(sum(t.square().sum() for t in new), state)):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_memory_grows_as_the_square_root_of_the_length():
    sizes = dict(hidden_size=64, head_dim=64, state_size=16, num_hidden_layers=8, vocab_size=256)
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(Mamba2Config(**sizes)).train()
    model.gradient_checkpointing_enable()
    ids = tokens(1, 2**14, vocabulary=256).cpu()

    def bounded(l):
        return peak(model, lambda: model(ids[:, :l], labels=ids[:, :l], segment_length="auto").loss)

    peaks = {l: bounded(l) for l in (2**k for k in range(10, 15))}
    for l in list(peaks)[1:]:
        assert peaks[l] <= 1.5 * peaks[l // 2], (l, peaks)
    l = 2**14
    layers = peak(model, lambda: model(ids[:, :l], labels=ids[:, :l]).loss)
    grid = peak(model, lambda: grid_loss(model, ids[:, :l], 4, 512))  # the best of nine cells
    print("bounded:", peaks, "layers:", layers, "grid:", grid)
    assert peaks[l] <= layers / 10 and peaks[l] <= grid / 3


def test_no_logits_of_the_whole_sequence_exist_where_only_the_loss_is_wanted():
    model, l = tiny(vocab_size=1000).train(), 16384 if CUDA else 500
    ids = tokens(1, l)
    with Bytes() as watch:
        model(ids, labels=ids).loss.backward()
    assert watch.largest <= l * 1000 * 4 / 4  # a quarter of them, in float32


@torch.no_grad()
def test_a_long_text_is_evaluated_and_read_in_the_memory_of_one_segment():
    model, ids = tiny(), tokens(1, 4096)
    whole = model(ids, labels=ids)
    peaks = []
    for l in (1024, 4096):
        given = dict(labels=ids[:, :l], segment_length=64)
        with Bytes() as watch:
            output = model(ids[:, :l], **given)
        peaks.append(watch.peak - 8 * 5 * l)  # ids, targets, and what these are made of
        assert output.logits is None
    assert_close(output.loss, whole.loss, F32)
    assert_same_state(output.past_key_values, whole.past_key_values, F32)
    assert peaks[1] <= 1.05 * peaks[0]
    last = model(ids, segment_length=64, logits_to_keep=3)
    assert_close(last.logits, whole.logits[:, -3:], F32)


def test_progress_is_shown_over_the_segments(capsys):
    model, ids = tiny().train(), tokens(1, 20)
    model(ids, labels=ids, segment_length=5, progress=True).loss.backward()
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["whole", "segments", "checkpoints", "both", "chunks of the loss"])
def test_weights_that_change_between_the_two_passes_are_an_error(how):
    vocabulary = 4096 if how == "chunks of the loss" else VOCABULARY  # of 32 rows each
    model, ids = tiny(vocab_size=vocabulary).train(), tokens(2, 40)
    if how in ("checkpoints", "both"):
        model.gradient_checkpointing_enable()
    segment_length = 3 if how in ("segments", "both") else 0
    names = ["lm_head.weight"]
    if how != "chunks of the loss":
        names += dict(model.named_parameters())
    for name in names:
        if how == "whole" and name.endswith(("A_log", "dt_bias", "conv1d.bias")):
            continue  # these are not read again
        loss = model(ids, labels=ids, segment_length=segment_length).loss
        with torch.no_grad():
            model.get_parameter(name).mul_(1.5)
        with pytest.raises(RuntimeError, match="modified (in place|by an inplace)"):
            loss.backward()
    model(ids, labels=ids, segment_length=segment_length).loss.backward()  # as it should be


def test_segments_that_make_no_sense_are_errors():
    model, ids = tiny(), tokens(1, 20)
    for length in (-1, 2.5, "all", True):
        with pytest.raises(ValueError, match=f"segment_length = {length!r}.*must be a number"):
            model(ids, segment_length=length)
        with pytest.raises(ValueError, match=f"segment_length = {length!r}.*must be a number"):
            Mamba2Config(segment_length=length)
    with pytest.raises(ValueError, match="leave one of the two out"):
        model(ids, segment_length=5, output_hidden_states=True)
    assert model(ids, segment_length=20, output_hidden_states=True).hidden_states is not None


def test_the_trainer_trains_in_segments(tmp_path):
    tokenizer, data = byte_data()
    for collator in collators(tokenizer):
        runs = []
        for segment_length in (0, 7):
            model = tiny(vocab_size=384, dtype=torch.float64, segment_length=segment_length)
            model, losses = train(tmp_path, collator, data, model, gradient_checkpointing=True)
            runs.append([torch.tensor(losses), *model.parameters()])
        assert_close(runs[1], runs[0], F64)


TARGETS = {"in": ["in_proj"], "out": ["out_proj"], "both": ["in_proj", "out_proj"], "all": None}


@pytest.mark.parametrize("where", TARGETS)
def test_lora_trains_the_projections_and_merges_and_comes_back(where, tmp_path):
    ids = tokens(2, 9)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=TARGETS[where] or "all-linear", lora_alpha=8
    )
    model = peft.get_peft_model(tiny(), lora)
    before = model(ids).logits.detach()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * (1 if where in ("in", "out") else 2)
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    model.train()
    for _ in range(2):  # lora_B begins at 0, so that lora_A moves in the second step only
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.eval()(ids).logits
    assert (after - before).abs().max() > 0.01 * before.abs().max()
    model.save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(tiny(), tmp_path).to(DEVICE)
    assert_close(back(ids).logits, after, F32)
    text = model.generate(input_ids=ids, **GREEDY)
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(ids, **GREEDY), text)
    assert isinstance(merged, Mamba2ForCausalLM)
    assert_close(merged(ids).logits, after, F32)


def test_lora_on_the_convolution_is_an_error_and_not_a_silence():
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["conv1d"])
    with pytest.raises(ValueError, match="CausalConv1d.* is not supported"):
        peft.get_peft_model(tiny(), lora)


@torch.no_grad()
def test_a_pipeline_writes_what_generate_writes():
    model, tokenizer = tiny(vocab_size=384, dtype=torch.float64), transformers.ByT5Tokenizer()
    tokenizer.padding_side = "left"
    write = transformers.pipeline("text-generation", model, tokenizer=tokenizer, device=DEVICE)
    expected = []
    for text in TEXTS[:4]:
        ids = tokenizer(text, return_tensors="pt").input_ids.to(DEVICE)
        expected.append(model.generate(ids, **GREEDY)[0].tolist())
        written = write(text, return_tensors=True, **GREEDY)
        assert written[0]["generated_token_ids"] == expected[-1]
    together = write(TEXTS[:4], batch_size=4, return_full_text=True, **GREEDY)
    for one, ids in zip(together, expected, strict=True):
        assert one[0]["generated_text"] == tokenizer.decode(ids, skip_special_tokens=True)


AUTO = """
import json, sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
import mamba2
folder = sys.argv[1]
names = [type(AutoConfig.from_pretrained(folder)).__module__]
mamba2.register_with_transformers()
mamba2.register_with_transformers()
config = AutoConfig.from_pretrained(folder)
models = [auto.from_pretrained(folder) for auto in (AutoModelForCausalLM, AutoModel)]
models += [AutoModelForCausalLM.from_config(config)]
print(json.dumps(names + [f"{type(x).__module__}.{type(x).__name__}" for x in [config, *models]]))
"""


def test_the_auto_classes_find_this_file_on_request_and_not_before(tmp_path):
    save(tiny(), tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", AUTO, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    before, *after = json.loads(result.stdout.splitlines()[-1])
    assert before.startswith("transformers.")
    names = "Mamba2Config Mamba2ForCausalLM Mamba2Model Mamba2ForCausalLM"
    assert after == [f"mamba2.{name}" for name in names.split()]


@torch.no_grad()
def test_the_whole_model_compiles_into_one_graph():
    model, ids = tiny(num_hidden_layers=1, **ALL), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[1, 3:5] = 0
    past = model(ids, mask).past_key_values
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    calls = dict(input_ids=ids, use_cache=False), dict(input_ids=ids[:, :1], past_key_values=past)
    for given in (*calls, dict(input_ids=ids, attention_mask=mask, seq_idx=ids // 16)):
        expected, actual = model(**given), compiled(**given)
        assert_close(actual.logits, expected.logits, F32)
        if expected.past_key_values:
            assert_same_state(actual.past_key_values, expected.past_key_values, F32)
    model.train()
    given = dict(input_ids=tokens(1, 50), labels=tokens(1, 50))  # more rows than a chunk of logits
    with torch.enable_grad():
        expected, actual = (model_gradients(model, f(**given).loss) for f in (model, compiled))
    assert_same_gradients(actual, expected, F32)


# ---------------------------------------------------------------------------- saving and loading


def test_saving_and_loading_keeps_weights_and_every_option(tmp_path):
    options = {**TINY, **ALL, "layer_norm_epsilon": 1e-3, "eos_token_id": 5, "id2label": {0: "no"}}
    model = tiny(**options)
    model.config.made_by = "a test"
    again = load(save(model, tmp_path / "a"))
    for name, value in {**options, "made_by": "a test", "num_heads": 8}.items():
        assert getattr(again.config, name) == value, name
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["model_type"] == "mamba2" and config["architectures"] == ["Mamba2ForCausalLM"]
    twice = load(save(again, tmp_path / "b"))
    assert config.items() <= json.loads((tmp_path / "b" / "config.json").read_text()).items()
    assert_same_model(again, model)
    assert_same_model(twice, model)
    assert mamba2._DEFAULTS.keys() <= config.keys()  # for others fill what is left out with theirs
    given = dict(output_loading_info=True)
    third, info = Mamba2ForCausalLM.from_pretrained(tmp_path / "a", **given)
    assert_same_model(third.to(DEVICE).eval(), model)
    assert not info["missing_keys"] and third.config.model_type == model.config.model_type
    assert callable(model.push_to_hub)


@torch.no_grad()
def test_the_embedding_can_be_resized_and_replaced():
    for tied in (True, False):
        model, ids = tiny(tie_word_embeddings=tied), tokens(2, 9)
        before = model(ids).logits
        model.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
        assert_close(model(ids).logits[..., :VOCABULARY], before, F32)
        assert model(ids + 8).logits.shape == (2, 9, VOCABULARY + 8)
    other = nn.Embedding(VOCABULARY, TINY["hidden_size"]).to(DEVICE)
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is model.backbone.embeddings is other


@pytest.mark.parametrize("form", ["whole", "sharded", "bin", "no architectures", "backbone"])
@pytest.mark.parametrize("kind", [Mamba2ForCausalLM, Mamba2Model])
@torch.no_grad()
def test_transformers_format_loads_in_every_form(form, kind, tmp_path):
    model = tiny()
    save(model.backbone if form == "backbone" else model, tmp_path)
    weights = tmp_path / "model.safetensors"
    if form == "sharded":
        weights.unlink()
        save(model, tmp_path, max_shard_size="5KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    elif form == "bin":
        weights.unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    elif form == "no architectures":
        edit_json(tmp_path / "config.json", architectures=None)
    loaded = load(tmp_path, kind)
    assert_same_model(loaded, model if kind is Mamba2ForCausalLM else model.backbone)


def test_loaded_weights_are_not_scaled_by_depth_again(tmp_path):
    model = tiny()
    edit_json(save(model, tmp_path / "a") / "config.json", rescale_prenorm_residual=True)
    again = load(save(load(tmp_path / "a"), tmp_path / "b"))
    theirs = load(tmp_path / "b", transformers.Mamba2ForCausalLM)
    for loaded in (load(tmp_path / "a"), again, theirs):
        assert_same_model(loaded, model)


def original(folder, model=None, ssm_cfg=None, **changes):
    """A checkpoint as the mamba_ssm package writes it, of a `tiny` model."""
    folder.mkdir(exist_ok=True)
    config = dict(d_model=32, d_intermediate=0, n_layer=2, vocab_size=VOCABULARY - 3)
    config |= dict(attn_layer_idx=[], attn_cfg={}, rms_norm=True, residual_in_fp32=True)
    config |= dict(fused_add_norm=True, pad_vocab_size_multiple=16, tie_embeddings=True)
    config["ssm_cfg"] = dict(layer="Mamba2", d_state=16, headdim=8, chunk_size=8)
    config["ssm_cfg"] |= ssm_cfg or {}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    weights = (model or tiny()).state_dict()
    names = {name: name.replace("embeddings", "embedding") for name in weights}
    torch.save({names[k]: v for k, v in weights.items()}, folder / "pytorch_model.bin")
    return folder


@torch.no_grad()
def test_the_original_format_loads_and_is_saved_under_the_standard_names(tmp_path):
    model = tiny()
    loaded = load(original(tmp_path / "original", model))
    assert_same_model(loaded, model)
    assert loaded.lm_head.weight is loaded.backbone.embeddings.weight
    assert_same_model(load(tmp_path / "original", Mamba2Model), model.backbone)
    save(loaded, tmp_path / "ours")
    save(model, tmp_path / "expected")
    names = [set(load_file(tmp_path / f / "model.safetensors")) for f in ("ours", "expected")]
    assert "backbone.embeddings.weight" in names[0] and names[0] == names[1]
    for kind in (Mamba2ForCausalLM, transformers.Mamba2ForCausalLM):
        assert_same_model(load(tmp_path / "ours", kind), model)


@torch.no_grad()
def test_the_original_formats_options_are_understood(tmp_path):
    given = dict(ngroups=2, d_conv=3, expand=1.5, bias=True, conv_bias=False, dt_limit=[0.01, 0.1])
    model = tiny(tie_embeddings=False, residual_in_fp32=False, **given)
    given |= dict(norm_before_gate=False, A_init_range=[1, 16])
    changes = dict(tie_embeddings=False, residual_in_fp32=False)
    loaded = load(original(tmp_path, model, given, **changes))
    assert_same_model(loaded, model)
    assert loaded.config.time_step_limit == (0.01, 0.1) and not loaded.config.residual_in_fp32
    assert not loaded.config.tie_word_embeddings


def test_what_the_original_format_leaves_out_is_what_mamba_ssm_takes_for_it():
    ssm = dict(layer="Mamba2", d_state=16, headdim=8, conv_init=None, use_mem_eff_path=True)
    given = dict(d_model=32, n_layer=2, vocab_size=61, ssm_cfg=ssm | dict(rmsnorm=True))
    before = copy.deepcopy(given)
    config = Mamba2Config.from_dict(given)
    assert given == before and config.vocab_size == 64  # a multiple of 8
    assert config.residual_in_fp32 and config.tie_word_embeddings
    for name, value in dict(rmsnorm=False, D_has_hdim=True).items():
        with pytest.raises(ValueError, match=f"{name} = {value}: only .* is implemented"):
            Mamba2Config.from_dict(given | dict(ssm_cfg=ssm | {name: value}))
    config = Mamba2Config.from_dict(dict(d_model=64))  # no format at all: our options
    assert (config.hidden_size, config.n_groups) == (64, 1)


@torch.no_grad()
@pytest.mark.parametrize("infinity", ["Infinity", '{"__float__": "Infinity"}'])
def test_codestral_in_miniature_loads(infinity, tmp_path):
    model = tiny(n_groups=8, head_dim=4, tie_word_embeddings=False)
    path = save(model, tmp_path) / "config.json"
    without_effect = dict(norm_before_gate=True, rms_norm=True, time_step_rank=2)
    edit_json(path, **without_effect, time_step_limit=[0.0, "LIMIT"], architectures=None)
    path.write_text(path.read_text().replace('"LIMIT"', infinity))
    loaded = load(tmp_path)
    assert loaded.config.time_step_limit == (0.0, math.inf)
    assert_same_model(loaded, model)
    assert not torch.equal(loaded.lm_head.weight, loaded.backbone.embeddings.weight)


@torch.no_grad()
@pytest.mark.parametrize("form", ["theirs", "original"])
@pytest.mark.parametrize("options", [dict(dtype=torch.bfloat16), dict(device_map="auto")], ids=str)
def test_dtype_and_device_map_are_kept(form, options, tmp_path):
    model = tiny()
    save(model, tmp_path) if form == "theirs" else original(tmp_path, model)
    loaded = Mamba2ForCausalLM.from_pretrained(tmp_path, **options).eval()
    dtype = options.get("dtype", torch.float32)
    assert {p.dtype for p in loaded.parameters()} == {dtype} and loaded.dtype == dtype
    assert loaded.device.type == ("cpu" if "dtype" in options else DEVICE.type)
    assert_same_model(loaded, model.to(loaded.device, dtype), F32 if dtype.itemsize == 4 else 5e-2)


@torch.no_grad()
def test_offloaded_layers_give_the_same_logits(tmp_path):
    model, ids = tiny(), tokens(2, 9)
    expected = model(ids).logits
    save(model, tmp_path / "model")
    places = dict.fromkeys(["backbone.embeddings", "lm_head", "backbone.layers.1"], str(DEVICE))
    places |= {"backbone.norm_f": "disk", "backbone.layers.0": "disk"}
    on_disk = Mamba2ForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "weights"
    ).eval()
    assert on_disk.backbone.layers[0].mixer.D.device.type == "meta"
    assert_close(on_disk(ids).logits, expected, F32)
    in_memory = accelerate.cpu_offload(tiny(), execution_device=DEVICE)
    assert in_memory.backbone.layers[0].mixer.D.device.type == "meta"
    assert_close(in_memory(ids).logits, expected, F32)


NAMES = dict(D="backbone.layers.1.mixer.D", out="backbone.layers.0.mixer.out_proj.weight")
WRONG_WEIGHTS = [
    ("missing.*" + re.escape(NAMES["D"]), {NAMES["D"]: None}),
    ("missing.*backbone.embeddings.weight", {"backbone.embeddings.weight": None}),
    ("missing.*lm_head.weight", {"lm_head.weight": None}),
    ("unexpected.*backbone.layers.2.mixer.D", {"backbone.layers.2.mixer.D": torch.ones(8)}),
    (re.escape(NAMES["D"]), {NAMES["D"]: torch.ones(7)}),
    (re.escape(NAMES["out"]), {NAMES["out"]: torch.ones(64, 32)}),
]


@pytest.mark.parametrize("message, changes", WRONG_WEIGHTS, ids=[m for m, _ in WRONG_WEIGHTS])
@pytest.mark.parametrize("options", [{}, dict(ignore_mismatched_sizes=True)], ids=["", "ignore"])
def test_weights_that_do_not_fit_the_config_are_named(message, changes, options, tmp_path):
    edit_weights(save(tiny(tie_word_embeddings=False), tmp_path), **changes)
    with pytest.raises(ValueError, match=message):
        Mamba2ForCausalLM.from_pretrained(tmp_path, **options)


def test_a_checkpoint_of_the_backbone_gives_no_untied_language_model(tmp_path):
    save(tiny(Mamba2Model, tie_word_embeddings=False), tmp_path)
    with pytest.raises(ValueError, match="missing.*lm_head.weight"):
        Mamba2ForCausalLM.from_pretrained(tmp_path)


WRONG_SIZES = {"num_hidden_layers": 3, "state_size": 8, "vocab_size": 48, "use_bias": True}


@pytest.mark.parametrize("name", WRONG_SIZES)
def test_a_config_that_does_not_fit_the_weights_is_an_error(name, tmp_path):
    edit_json(save(tiny(), tmp_path) / "config.json", **{name: WRONG_SIZES[name]})
    with pytest.raises(ValueError, match="mismatched_keys|missing_keys|unexpected_keys"):
        Mamba2ForCausalLM.from_pretrained(tmp_path)


def test_sizes_far_beyond_the_weights_are_refused_before_anything_is_allocated(tmp_path):
    edit_json(save(tiny(), tmp_path) / "config.json", vocab_size=10**12)
    with pytest.raises(ValueError, match="mismatched_keys.*embeddings.weight.*1000000000000"):
        Mamba2ForCausalLM.from_pretrained(tmp_path)


def test_a_head_that_is_not_the_embedding_makes_no_tied_model(tmp_path):
    model = tiny(tie_word_embeddings=False)
    edit_json(save(model, tmp_path) / "config.json", tie_word_embeddings=True)
    with pytest.raises(
        ValueError, match="lm_head.weight differs.*: pass tie_word_embeddings=False"
    ):
        Mamba2ForCausalLM.from_pretrained(tmp_path)
    assert_same_model(load(tmp_path, tie_word_embeddings=False), model)
    edit_weights(tmp_path, **{"lm_head.weight": model.backbone.embeddings.weight.clone()})
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is loaded.backbone.embeddings.weight


def test_an_embedding_under_two_names_is_refused(tmp_path):
    other = {"backbone.embedding.weight": torch.zeros(VOCABULARY, 32)}
    edit_weights(save(tiny(), tmp_path), **other)
    for kind in (Mamba2ForCausalLM, Mamba2Model):
        with pytest.raises(ValueError, match="embedding.weight and backbone.embeddings.weight are"):
            kind.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_real_numbers_are_refused_and_not_cast(dtype, tmp_path):
    path = original(tmp_path) / "pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    weights[NAMES["D"]] = torch.ones(8, dtype=dtype)
    torch.save(weights, path)
    with pytest.raises(ValueError, match=f"{NAMES['D']} is of {dtype}"):
        Mamba2ForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{NAMES['D']} is of {dtype}"):
        Mamba2ForCausalLM.from_pretrained(None, config=tiny().config, state_dict=weights)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_an_error_that_names_the_checkpoint(file, kept, tmp_path):
    folder = tmp_path / "truncated"
    save(tiny(), folder) if file == "model.safetensors" else original(folder)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: int(kept * len(content))])
    with pytest.raises((ValueError, OSError), match="truncated' cannot be loaded"):
        Mamba2ForCausalLM.from_pretrained(folder)


def test_a_missing_shard_is_named(tmp_path):
    save(tiny(), tmp_path, max_shard_size="5KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises((ValueError, OSError), match=gone.name):
        Mamba2ForCausalLM.from_pretrained(tmp_path)


class Payload:
    """What a malicious pickle holds: to load it is to call a function."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    original(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save({**torch.load(path, weights_only=True), "extra": Payload()}, path)
    with pytest.raises(Exception, match="(?i)weights.only"):
        Mamba2ForCausalLM.from_pretrained(tmp_path)
    assert not Path("it-ran").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", ["folder", "random", "pickle", "list", "numbers"])
def test_a_file_that_holds_no_weights_is_an_error_that_names_the_checkpoint(
    file, content, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = save(tiny(), tmp_path / "damaged")
    (folder / "model.safetensors").unlink()
    path = folder / file
    if content == "folder":
        path.mkdir()
    elif content == "random":
        path.write_bytes(random.randbytes(5000))
    elif content == "pickle":
        path.write_bytes(pickle.dumps(Payload()))
    else:
        torch.save([1, 2] if content == "list" else dict(a=1), path)
    with pytest.raises((ValueError, OSError), match="damaged' cannot be loaded"):
        Mamba2ForCausalLM.from_pretrained(folder)
    assert not Path("it-ran").exists()


NO_INDEX = {
    "no map": dict(weight_map=None),
    "no metadata": dict(metadata=None),
    "a list for a map": dict(weight_map=[1]),
    "a number for a shard": dict(weight_map={NAMES["D"]: 3}),
    "a shard that is missing": dict(weight_map={NAMES["D"]: "gone.safetensors"}),
    "a shard that is absolute": dict(weight_map={NAMES["D"]: "ELSEWHERE"}),
    "a shard that is above": dict(weight_map={NAMES["D"]: "../elsewhere.safetensors"}),
}


@pytest.mark.parametrize("what", NO_INDEX)
def test_an_index_that_is_damaged_is_an_error_that_names_the_checkpoint(what, tmp_path):
    folder = save(tiny(), tmp_path / "damaged", max_shard_size="5KB")
    path, elsewhere = folder / "model.safetensors.index.json", tmp_path / "elsewhere.safetensors"
    shards = json.loads(path.read_text())["weight_map"]
    (folder / shards[NAMES["D"]]).rename(elsewhere)  # so that it is whole, if others are read
    changes = copy.deepcopy(NO_INDEX[what])
    if isinstance(changes.get("weight_map"), dict):
        [value] = changes["weight_map"].values()
        value = str(elsewhere) if value == "ELSEWHERE" else value
        gone = shards[NAMES["D"]]
        changes["weight_map"] = {k: value if v == gone else v for k, v in shards.items()}
    edit_json(path, **changes)
    with pytest.raises((ValueError, OSError), match="damaged' cannot be loaded"):
        Mamba2ForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("content", ["[1]", "{", "3"])
def test_a_config_that_is_no_config_is_an_error_that_names_the_checkpoint(content, tmp_path):
    folder = save(tiny(), tmp_path / "damaged")
    (folder / "config.json").write_text(content)
    with pytest.raises((ValueError, OSError), match="damaged' cannot be loaded"):
        Mamba2ForCausalLM.from_pretrained(folder)


def test_the_checkpoint_can_be_passed_by_its_name_in_transformers(tmp_path):
    model = tiny()
    path = save(model, tmp_path)
    loaded = Mamba2ForCausalLM.from_pretrained(pretrained_model_name_or_path=path)
    assert_same_model(loaded.to(DEVICE), model)


def test_what_was_saved_last_is_what_loads(tmp_path):
    """In shards or as one file, over one that was saved the other way."""
    for size in ("5KB", "5GB", "5KB", "5KB", "5GB", "5GB"):
        model = tiny(dtype=torch.float64)
        with torch.no_grad():
            model.backbone.norm_f.weight.copy_(torch.rand(32))
        loaded = load(save(model, tmp_path, max_shard_size=size), dtype=torch.float64)
        assert_same_model(loaded, model, F64)
        assert (tmp_path / "model.safetensors").exists() == (size == "5GB")


def test_what_mamba2_torch_converts_loads(tmp_path):
    """Its config knows no groups, leaves out what is tied, and has the 130m model's num_heads."""
    model = tiny()
    names = dict(hidden_size=32, num_hidden_layers=2, state_size=16, head_dim=8, chunk_size=8)
    config = dict(model_type="mamba2", vocab_size=VOCABULARY, num_heads=24, expand=2, **names)
    config |= dict(conv_kernel=4, layer_norm_epsilon=1e-5, use_bias=False, use_conv_bias=True)
    config |= dict(emb_initializer_range=0.02, conv_initializer_range=None, hidden_act="silu")
    config |= dict(A_initializer_range=[1, 16], tie_embedding_weights=True, tie_embeddings=True)
    config |= dict(use_triton_kernels=True, intermediate_size=64, output_last_ssm_states=False)
    config |= dict(time_step_limit=[0.0, math.inf], residual_in_fp32=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = {k.replace("embeddings", "embedding"): v for k, v in model.state_dict().items()}
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load(tmp_path)
    assert_same_model(loaded, model)
    assert (loaded.config.n_groups, loaded.config.tie_word_embeddings) == (1, True)
    assert_same_model(load(save(loaded, tmp_path / "again")), model)


OTHERS = {
    "layer = 'Mamba1'": dict(ssm_cfg={}),
    r"attn_layer_idx = \[9\]: only \[\] is implemented": dict(attn_layer_idx=[9]),
    "d_intermediate = 64: only 0 is implemented": dict(d_intermediate=64),
    "ssm_cfg.gate_rank = 3: .*not implemented": dict(
        ssm_cfg=dict(layer="Mamba2", d_state=16, headdim=8, gate_rank=3)
    ),
    "norm_before_gate = True": dict(ssm_cfg=dict(layer="Mamba2", norm_before_gate=True)),
    "rms_norm = False": dict(rms_norm=False),
}


@pytest.mark.parametrize("message", OTHERS)
def test_other_architectures_in_the_original_format_are_refused_with_the_reason(message, tmp_path):
    changes = dict(OTHERS[message])
    edit_json(original(tmp_path) / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        Mamba2ForCausalLM.from_pretrained(tmp_path)


def test_mamba1_in_transformers_format_is_refused(tmp_path):
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)
    save(transformers.MambaForCausalLM(config), tmp_path)
    for kind in (Mamba2ForCausalLM, Mamba2Model, Mamba2Config):
        with pytest.raises(ValueError, match="model_type = 'mamba': not a Mamba-2 checkpoint"):
            kind.from_pretrained(tmp_path)


def test_options_that_other_implementations_write_are_read_or_refused():
    theirs = dict(model_type="mamba2", num_heads=128, norm_eps=1e-3)
    assert Mamba2Config.from_dict(theirs).layer_norm_epsilon == 1e-3
    config = Mamba2Config.from_dict(theirs)
    config.layer_norm_epsilon = 1e-6
    assert Mamba2Config.from_dict(config.to_dict()).layer_norm_epsilon == 1e-6
    original = dict(model_type="mamba2", num_heads=128)
    for given, name in ((theirs, "rms_norm"), (original, "rmsnorm")):
        assert Mamba2Config.from_dict({**given, name: True})
        with pytest.raises(ValueError, match=f"{name} = False: only True is implemented"):
            Mamba2Config.from_dict({**given, name: False})


# ------------------------------------------------------------------------------ in other hands


def test_a_stop_string_ends_a_text():
    model, tokenizer = tiny(vocab_size=384), transformers.ByT5Tokenizer()
    prompt = tokenizer("ab", return_tensors="pt").to(DEVICE)
    ids = prompt.input_ids
    plain = model.generate(**prompt, **GREEDY)
    text = tokenizer.decode(plain[0, ids.shape[1] :])
    given = dict(GREEDY, stop_strings=[text[1]], tokenizer=tokenizer)
    ended = model.generate(**prompt, **given)
    assert ids.shape[1] < ended.shape[1] < plain.shape[1]
    assert torch.equal(ended, plain[:, : ended.shape[1]])
    assert torch.equal(streamed(model, ids, attention_mask=prompt.attention_mask, **given), ended)
    with pytest.raises(ValueError, match="pass the tokenizer, too"):
        model.stream(ids, stop_strings=["a"])
    model.generation_config.stop_strings = ["a"]
    with pytest.raises(ValueError, match=r"stop_strings = \['a'\]: set it to None, and pass"):
        model.stream(ids, tokenizer=tokenizer)


def test_a_packed_prompt_goes_on_with_its_last_sequence():
    model, ids = tiny(dtype=torch.float64), tokens(2, 7)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2, device=DEVICE)
    expected = model.generate(ids[:, 3:], **GREEDY)[:, 4:]
    for options in ({}, dict(use_cache=False)):
        found = model.generate(ids, seq_idx=seq_idx, **options, **GREEDY)
        assert torch.equal(found[:, 7:], expected)
    assert torch.equal(streamed(model, ids, seq_idx=seq_idx, **GREEDY)[:, 7:], expected)


def test_a_model_is_transformed_by_torch_func():
    model, ids = tiny(dtype=torch.float64, vocab_size=4096), tokens(3, 40, vocabulary=4096)
    parameters = dict(model.named_parameters())

    def loss(parameters, ids, **options):
        given = dict(labels=ids[None], attention_mask=ids[None] % 5 > 0, **options)
        return torch.func.functional_call(model, parameters, (ids[None],), given).loss

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, ids)
    for i, row in enumerate(ids):
        expected = torch.autograd.grad(loss(parameters, row), [*parameters.values()])
        assert_close([gradient[i] for gradient in each.values()], expected)
        found = torch.func.grad(loss)(parameters, row, segment_length=16)
        assert_close([*found.values()], expected)


def test_states_are_loaded_with_a_checkpoint(tmp_path):
    model, ids = tiny(), tokens(2, 7)
    cache = model(ids).past_key_values
    path = tmp_path / "checkpoint.pt"
    torch.save({"cache": cache, "state": cache.states[0]}, path)
    loaded = torch.load(path, map_location=DEVICE)
    assert_same_state(loaded["cache"], cache)
    assert identical(loaded["state"], cache.states[0]) and loaded["cache"].length == 7


def test_a_model_with_a_head_of_its_own_begins_with_weights_drawn_for_it(tmp_path):
    class Judge(Mamba2ForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.judge = nn.Sequential(nn.LayerNorm(config.hidden_size), nn.Linear(32, 1))
            self.post_init()

    save(tiny().cpu(), tmp_path)
    with pytest.raises(ValueError, match="names what is new in it as _keys_to_ignore_on_load_mis"):
        Judge.from_pretrained(tmp_path)
    Judge._keys_to_ignore_on_load_missing = ["^judge"]
    norm, linear = Judge.from_pretrained(tmp_path).judge
    assert (norm.weight == 1).all() and (norm.bias == 0).all()
    assert 0 < linear.weight.abs().max() <= 32**-0.5

    model = tiny(tie_word_embeddings=False)
    model.lm_head = nn.Linear(32, 100).to(DEVICE)
    ids = tokens(2, 9)
    assert model(ids, labels=ids + 36).loss.isfinite()


def test_a_config_is_made_again_of_its_own_dictionary():
    config = Mamba2Config(**TINY)
    assert Mamba2Config(**config.to_dict()).to_dict() == config.to_dict()


# --------------------------------------------------------------------------- README and notebook

FSDP2_RUNS = Version(torch.__version__) >= Version("2.11")  # 2.7 fails; none between was tried
README = ROOT / "README.md"
BLOCKS = (
    re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S) if README.exists() else []
)


def test_the_readme_s_figure_shows_the_numbers_of_its_tables():
    bars, flat, state, keys_and_values = figure_rows()
    figure, text = FIGURE.read_text(), " ".join(README.read_text().split())
    assert len(flat) >= 5 and len(bars) >= 5
    drawn = re.findall(r">([\d.]+)×<", figure)
    assert drawn == [f"{theirs / mine:.1f}" for mine, theirs in bars.values()]
    milliseconds = f"{min(flat.values()):.3f} to {max(flat.values()):.3f} ms per token"
    assert f">{milliseconds}<" in figure
    megabytes = f"{state / 1e6:.1f} MB"
    assert f"Mamba-2: {megabytes}<" in figure and megabytes in text
    assert keys_and_values == 73_728 and "73,728 bytes per token" in text


def test_the_commands_in_the_readme_are_understood(capsys):
    commands = re.findall(
        r"(?:python3?|torchrun [^`\n]*?) test_mamba2\.py([^`\n]*)", README.read_text()
    )
    assert len(commands) >= 6
    for command in commands:
        command_line().parse_args(command.split())
    sampling = dict.fromkeys(GENERATION) | dict(temperature=0.8, top_k=5)
    for dtype in (None, "bfloat16"):
        benchmark_generation("tiny", 2, 5, 3, [7, 70], dtype, sampling)
    rows = re.findall(r"^ +(7|70) +[\d.]+ +-?[\d.]+ +([\d.]+)$", capsys.readouterr().out, re.M)
    assert [int(length) for length, _ in rows] == [7, 70] * 2 and len({mb for _, mb in rows}) == 1


def test_the_readme_has_code_to_run():
    assert README.is_file() and BLOCKS


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_readme_block_runs(number, tmp_path, monkeypatch):
    first = BLOCKS[number].splitlines()[0]
    needs = {"needs a hub": False, "needs a GPU": torch.cuda.is_available()}
    needs["needs torch 2.11"] = FSDP2_RUNS
    for need, met in needs.items():
        if first.startswith("#") and need in first and not met:
            pytest.skip(f"block {number + 1} of README.md {need}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    alone = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
    for name, value in alone.items():  # as torchrun with one process
        monkeypatch.setenv(name, value)
    namespace = {"__name__": "readme"}
    exec(compile(BLOCKS[number], f"README.md, block {number + 1}", "exec"), namespace)
    assert len(namespace) > 2  # it defined something: it is no empty block


def test_the_notebook_was_executed_in_order_without_errors_and_in_short_cells():
    notebook = json.loads((ROOT / "demo.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert len("".join(cell["source"]).splitlines()) <= 20, cell["source"]
        assert all(output["output_type"] != "error" for output in cell["outputs"])
    assert any(cell["outputs"] for cell in cells)


# --------------------------------------------------------------------------------------------------
# Several processes
# --------------------------------------------------------------------------------------------------
#
# Each is a rank of torch.distributed, on the CPU, with gloo. What is right is what one process
# gives, in float64; every rank computes that beside its own part.


class Ranks:
    """Processes that wait for cases, so many as a world has; forked from one that has this file."""

    def __init__(self, world, folder):
        self.world, self.folder, self.runs, self.processes = world, folder, 0, []

    def run(self, name):
        """Run a case in all processes; what fails in any of them fails here."""
        if not self.processes:
            self.start()
        self.runs += 1
        for _, pipe in self.processes:
            pipe.send((name, self.folder / str(self.runs)))
        errors = [pipe.recv() if pipe.poll(100) else "no answer" for _, pipe in self.processes]
        if any(errors):
            self.stop()  # for they may be out of step
        assert not any(errors), "\n".join(f"rank {i}: {e}" for i, e in enumerate(errors) if e)

    def start(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.folder.mkdir(exist_ok=True)
        store = self.folder / f"store{self.runs}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # CUDA does not survive a fork
            for rank in range(self.world):
                pipe, other = context.Pipe()
                given = rank, self.world, other, store
                process = context.Process(target=Ranks.serve, args=given, daemon=True)
                process.start()
                self.processes.append((process, pipe))

    def stop(self):
        for process, _ in self.processes:
            process.kill()
        self.processes = []

    @staticmethod
    def serve(rank, world, pipe, store):
        global DEVICE
        DEVICE = DRAW["device"] = torch.device("cpu")
        given = dict(init_method=f"file://{store}", rank=rank, world_size=world)
        dist.init_process_group("gloo", timeout=timedelta(seconds=60), **given)
        while True:
            name, Ranks.here = pipe.recv()
            torch.manual_seed(0)
            try:
                CASES[name](rank, world)
                pipe.send(None)
            except BaseException:
                pipe.send(traceback.format_exc())


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    ranks = {world: Ranks(world, folder / str(world)) for world in (2, 4)}
    yield ranks
    for processes in ranks.values():
        processes.stop()


CASES = {}


def on_ranks(*worlds):
    """Make a test of `case(rank, world)`, which runs in each of `world` processes."""

    def decorate(case):
        CASES[case.__name__] = case

        @pytest.mark.parametrize("world", worlds)
        def test(ranks, world):
            ranks[world].run(case.__name__)

        return test

    return decorate


def summed(tensors):
    """The tensors, added up over all ranks."""
    tensors = [tensor.detach().clone() for tensor in tensors]
    for tensor in tensors:
        dist.all_reduce(tensor)
    return tensors


CUTS = {  # where the slices of 23 positions end
    2: [[12, 23], [2, 23], [23, 23], [0, 23], [22, 23]],
    4: [[6, 12, 18, 23], [1, 2, 3, 23], [0, 9, 9, 23], [20, 21, 22, 23], [0, 0, 0, 23]],
}


def cut(ends, rank):
    return slice(([0, *ends])[rank], ends[rank])


def with_gradients_of(inputs, outputs, cotangents):
    """The outputs, and the gradients of the inputs; a float64 0 where there is none."""
    loss = sum((o * c).sum() for o, c in zip(tensors(outputs), cotangents, strict=True))
    given = dict(materialize_grads=True, allow_unused=True)
    return tensors(outputs), torch.autograd.grad(loss, tensors(inputs), **given)


@on_ranks(2, 4)
def test_a_layer_on_slices_of_a_sequence_is_the_layer_on_the_whole(rank, world):
    l, group = 23, dist.group.WORLD
    some = torch.rand(2, l) < 0.6
    late = (torch.arange(l) > 13) & some  # the first slices are masked as a whole
    masks, seq_idxs = (None, some, late), (None, labels(2, l), torch.arange(l).expand(2, l) // 6)
    for d_conv in (4, 1):
        layer = make_layer(d_conv=d_conv)
        u, state = layer_inputs(layer, 2, l)
        inputs = [u, *state, *layer.parameters()]
        cotangents = [torch.randn_like(t) for t in (u, *state)]
        cuts = itertools.cycle(CUTS[world])
        for mask, seq_idx, start in itertools.product(masks, seq_idxs, (None, state)):
            # Every rank's loss has a part of the final state in it.
            y, *end = cotangents
            whole = layer.step(u, start, mask, seq_idx)
            expected = with_gradients_of(inputs, whole, [y, *((1 + world) * t for t in end)])
            for ends in itertools.islice(cuts, 3 if d_conv == 4 else 1):
                mine = cut(ends, rank)
                m, s = (None if t is None else t[:, mine] for t in (mask, seq_idx))
                if m is not None and m.all():
                    m = None  # which is what the model makes of it
                outputs = layer.step(u[:, mine], start, m, s, group)
                part = 1 / world + 1
                given = [y[:, mine], *(part * t for t in end)]
                found, gradients = with_gradients_of(inputs, outputs, given)
                case = f"{ends}, masked: {mask is not None} {mask is late}, k = {d_conv}"
                assert_close(found, [expected[0][0][:, mine], *expected[0][1:]], case=case)
                assert_close(summed(gradients), expected[1], case=f"{case}, gradients")


def averaged(model):
    """Gradients of all parameters, averaged over the ranks as DDP and FSDP do."""
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(named) == len(list(model.parameters()))
    return dict(
        zip(named, (t / dist.get_world_size() for t in summed(named.values())), strict=True)
    )


def long_batch():
    """Two rows of 40 positions: ids, a mask, labels with gaps, and packed sequences."""
    ids, l = tokens(2, 40), torch.arange(40)
    mask = torch.stack([(l % 7 != 3) & (l < 33), (l > 11) & (l % 5 != 0)]).long()
    return ids, mask, ids.masked_fill(ids % 6 == 0, -100), torch.stack([l // 10, l // 13])


@on_ranks(2, 4)
def test_a_model_on_slices_gives_loss_gradients_and_cache_of_the_whole(rank, world):
    model, group = tiny(dtype=torch.float64, **ALL).train(), dist.group.WORLD
    ids, mask, labels, seq_idx = long_batch()
    first = model(tokens(2, 9, seed=1), seq_idx=torch.ones(2, 9).long(), use_cache=True)
    cuts = [[40 * (i + 1) // world for i in range(world)], [1, 10, 39, 40], [0, 12, 12, 40]]
    for masked, apart, cache in itertools.product([0, 1], [0, 1], [None, first.past_key_values]):
        whole = dict(input_ids=ids, labels=labels)
        whole |= dict(attention_mask=mask) if masked else {}
        whole |= dict(seq_idx=seq_idx) if apart else {}
        given = dict(past_key_values=cache and cache.detach(), use_cache=True, logits_to_keep=0)
        expected = model(**whole, **given)
        gradients = model_gradients(model, expected.loss)
        for ends, again in zip(cuts, (False, True, False), strict=True):
            mine = cut(ends[-world:], rank)
            if again:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            found = model(**{k: t[:, mine] for k, t in whole.items()}, **given, group=group)
            found.loss.backward()
            assert_close([found.loss, found.logits], [expected.loss, expected.logits[:, mine]])
            assert_same_state(found.past_key_values, expected.past_key_values, F64)
            assert found.past_key_values.length == expected.past_key_values.length
            assert identical(found.past_key_values.seq_idx, expected.past_key_values.seq_idx)
            assert_same_gradients(averaged(model), gradients)
            model.gradient_checkpointing_disable()


@on_ranks(2, 4)
def test_segments_of_slices_give_loss_and_gradients_of_the_whole(rank, world):
    model, group = tiny(dtype=torch.float64).train(), dist.group.WORLD
    ids, mask, labels, seq_idx = long_batch()
    whole = dict(input_ids=ids, attention_mask=mask, labels=labels, seq_idx=seq_idx)
    expected = model(**whole)
    gradients = model_gradients(model, expected.loss)
    for length in (1, 5):
        mine = {
            k: t.unflatten(1, (-1, world, length))[:, :, rank].flatten(1) for k, t in whole.items()
        }
        for again in (False, True):
            if again:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            loss = model(**mine, segment_length=length, group=group).loss
            loss.backward()
            assert_close(loss, expected.loss)
            assert_same_gradients(averaged(model), gradients)
        model.gradient_checkpointing_disable()


# ---- Trained by the engines of torch.distributed, as they are


needs_fsdp2 = pytest.mark.skipif(
    not FSDP2_RUNS, reason="FSDP2 of torch 2.7 fails where segments are computed again"
)


def distribute(model, engine, **options):
    if engine == "DDP":
        return nn.parallel.DistributedDataParallel(model, **options)
    options = {"mesh": init_device_mesh(DEVICE.type, (dist.get_world_size(),)), **options}
    for layer in model.backbone.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def reduce_gradients_now(model, now):
    """A context in which gradients are added up over the ranks, or kept for later."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext() if now else model.no_sync()
    model.set_requires_gradient_sync(now)
    return contextlib.nullcontext()


def gathered(named):
    """Tensors by name, whole and detached."""
    named = {name.removeprefix("module."): t.detach() for name, t in named}
    return {k: t.full_tensor() if isinstance(t, DTensor) else t.clone() for k, t in named.items()}


def mean(loss):
    return summed([loss])[0] / dist.get_world_size()


def train_on_ranks(model, part, engine, steps=3, accumulate=1, **given):
    """Losses of some steps, the gradients of the first, and the last weights; on any engine."""
    model = distribute(model, engine) if engine else model
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3)
    losses = []
    for step in range(steps):
        total = 0
        for i in range(accumulate):
            ids = part(tokens(8, 24, seed=accumulate * step + i))
            with (
                reduce_gradients_now(model, i == accumulate - 1)
                if engine
                else contextlib.nullcontext()
            ):
                loss = model(ids, labels=ids, **given).loss / accumulate
                loss.backward()
            total += mean(loss.detach())
        if step == 0:
            gradients = gathered((name, p.grad) for name, p in model.named_parameters())
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, gathered(model.named_parameters())


def check_training(engine, rank, world):
    slices = [0, *CUTS_OF_24[world]]

    def rows(ids):
        return ids.chunk(world)[rank]

    def piece(ids):
        return ids[:, slices[rank] : slices[rank + 1]]

    def pieces(ids):  # of segments of two positions on each rank
        return ids.unflatten(1, (-1, world, 2))[:, :, rank].flatten(1)

    def piece_of_rows(ids):
        rows, column = ids.chunk(world // 2)[rank // 2], rank % 2
        return rows[:, :5] if column == 0 else rows[:, 5:]

    sequence = dict(group=dist.group.WORLD)
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("rows", "slices"))
    pairs = dict(group=mesh.get_group("slices"))
    expected = {}
    for name, part, given, tied, accumulate, checkpoints in (
        ("rows", rows, {}, True, 1, False),
        ("rows, accumulated", rows, {}, False, 2, False),
        ("rows, segments, checkpoints", rows, dict(segment_length=7), False, 2, True),
        ("slices", piece, sequence, True, 1, True),
        ("slices, accumulated", piece, sequence, False, 2, False),
        ("rows, each in two slices", piece_of_rows, pairs, True, 1, False),
        (
            "slices, segments, checkpoints",
            pieces,
            dict(segment_length=2, **sequence),
            True,
            1,
            True,
        ),
    ):
        key = tied, accumulate
        options = dict(dtype=torch.float64, tie_word_embeddings=tied)
        if key not in expected:  # one process, whose every rank has everything
            model = tiny(**options).train()
            expected[key] = train_on_ranks(model, lambda ids: ids, None, accumulate=accumulate)
        model = tiny(**options).train()
        if checkpoints:
            model.gradient_checkpointing_enable()
        found = train_on_ranks(model, part, engine, accumulate=accumulate, **given)
        for of_one, of_ranks in zip(expected[key], found, strict=True):
            if isinstance(of_one, dict):
                assert of_one.keys() == of_ranks.keys(), name
                of_one, of_ranks = [*of_one.values()], [of_ranks[key] for key in of_one]
            assert_close(of_ranks, of_one, case=f"{engine}, {name}")


CUTS_OF_24 = {2: [17, 24], 4: [5, 5, 23, 24]}


@on_ranks(2, 4)
def test_ddp_trains_as_one_process_on_rows_and_on_slices(rank, world):
    check_training("DDP", rank, world)


@needs_fsdp2
@on_ranks(2, 4)
def test_fsdp2_trains_as_one_process_on_rows_and_on_slices(rank, world):
    check_training("FSDP2", rank, world)


@needs_fsdp2
@on_ranks(2)
def test_mixed_precision_of_fsdp2_keeps_residual_stream_state_and_gradients_in_float32(rank, world):
    ids = tokens(8, 24)
    expected = model_gradients(model := tiny().train(), (whole := model(ids, labels=ids)).loss)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for part, given in (
        (ids.chunk(world)[rank], {}),
        (ids.chunk(world, dim=1)[rank], dict(group=dist.group.WORLD)),
    ):
        model = distribute(tiny().train(), "FSDP2", mp_policy=policy)
        asked = dict(output_hidden_states=True, use_cache=True)
        output = model(part, labels=part, **asked, **given)
        assert all(h.dtype == torch.float32 for h in output.hidden_states[:-1])
        for state in output.past_key_values.states:
            assert (state.conv.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)
        output.loss.backward()
        found = gathered((name, p.grad) for name, p in model.named_parameters())
        # Numbers in bfloat16 are off by up to 2^-9 each; the loss is a mean of many, but in the
        # gradient of D, for example, terms cancel.
        assert_close(mean(output.loss), whole.loss, 2**-9)
        for name in expected:
            assert found[name].dtype == torch.float32
            error = (found[name] - expected[name]).norm() / expected[name].norm()
            assert error < 0.05, f"{name}: {error}"


@needs_fsdp2
@on_ranks(2)
def test_a_sharded_model_is_saved_resumed_and_loaded_on_one_device(rank, world):
    folder = Ranks.here

    def start():
        model = distribute(tiny(dtype=torch.float64).train(), "FSDP2")
        return model, torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2)

    def losses(model, optimizer, steps):
        for step in steps:
            ids = tokens(8, 24, seed=step).chunk(world)[rank]
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()

    model, optimizer = start()
    list(losses(model, optimizer, range(2)))
    weights, moments = get_state_dict(model, optimizer)
    dcp.save(dict(model=weights, optimizer=moments), checkpoint_id=folder / "sharded")
    uninterrupted = list(losses(model, optimizer, range(2, 5)))

    model, optimizer = start()
    weights, moments = get_state_dict(model, optimizer)
    saved = dict(model=weights, optimizer=moments)
    dcp.load(saved, checkpoint_id=folder / "sharded")
    set_state_dict(
        model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"]
    )
    assert list(losses(model, optimizer, range(2, 5))) == uninterrupted

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_model_state_dict(model, options=options)  # on rank 0
    if rank == 0:
        model.save_pretrained(folder / "whole", state_dict=full)
    dist.barrier()
    alone = load(folder / "whole", dtype=torch.float64)
    expected = gathered(model.named_parameters())
    assert all(torch.equal(w, expected[name]) for name, w in alone.named_parameters())
    assert alone.lm_head.weight is alone.backbone.embeddings.weight
    assert_close(alone(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


class Sent:
    """Counts the bytes that mamba2.py's layers send to other ranks, in its two collectives."""

    def __init__(self):
        self.bytes, self.collectives = 0, (dist.all_gather, dist.all_to_all_single)

    def __enter__(self):
        all_gather, all_to_all = self.collectives

        def counted_all_gather(outputs, x, *args, **options):
            self.count(x, len(outputs) - 1)
            return all_gather(outputs, x, *args, **options)

        def counted_all_to_all(output, x, *args, **options):
            self.count(x, (len(x) - 1) / len(x))
            return all_to_all(output, x, *args, **options)

        dist.all_gather, dist.all_to_all_single = counted_all_gather, counted_all_to_all
        return self

    def __exit__(self, *_):
        dist.all_gather, dist.all_to_all_single = self.collectives

    def count(self, x, copies):
        if x.is_floating_point() and x.dim() >= 3:  # not the loss, nor labels
            self.bytes += round(x.nbytes * copies)

    @staticmethod
    def formula(config, b, e, e_state=4):
        """What the docstring of Slices says of a layer, for one pass and one other rank."""
        h, p, g, n = config.num_heads, config.head_dim, config.n_groups, config.state_size
        convolution = e * (config.conv_kernel - 1) * (h * p + 2 * g * n)
        return b * (e_state * h * (p * n + 1) + convolution)


@on_ranks(2, 4)
def test_the_bytes_that_a_layer_sends_are_those_of_the_formula_at_any_length(rank, world):
    for passes, checkpoints, segments in ((2, False, 1), (3, True, 1), (3, False, 3), (4, True, 3)):
        for length in (6, 48):
            model = tiny().train()
            if checkpoints:
                model.gradient_checkpointing_enable()
            ids = tokens(2, length)
            given = dict(segment_length=length // segments, group=dist.group.WORLD)
            with Sent() as sent:
                model(ids, labels=ids, **given).loss.backward()
            layers = model.config.num_hidden_layers * passes * segments * (world - 1)
            assert sent.bytes == layers * Sent.formula(model.config, 2, 4)


# ---- Errors on ranks: of all, and of one


@on_ranks(2, 4)
def test_ranks_that_call_differently_all_get_an_error(rank, world):
    group, odd = dist.group.WORLD, rank == world - 1
    model, other = tiny().train(), tiny(num_hidden_layers=1).train()
    ids, embeds = tokens(2, 8), torch.randn(2, 8, 32)
    cache = model(ids, use_cache=True).past_key_values
    plain = dict(input_ids=ids, labels=ids)
    for name, given in {
        "batch": dict(input_ids=ids[:1], labels=ids[:1]),
        "labels": dict(labels=None),
        "segments": dict(segment_length=4),
        "items": dict(num_items_in_batch=3),
        "seq_idx": dict(seq_idx=ids),
        "states": dict(past_key_values=cache),
        "dtype": dict(input_ids=None, inputs_embeds=embeds),
    }.items():
        with pytest.raises(ValueError, match=f"{name} = .* on the ranks of the group: make it"):
            model(**{**plain, **(given if odd else {})}, group=group)
    with pytest.raises(ValueError, match="num_hidden_layers = "):
        (other if odd else model)(**plain, group=group)
    with pytest.raises(ValueError, match="gradients = "), torch.set_grad_enabled(odd):
        model(**plain, group=group)
    cast = torch.autocast("cpu", torch.bfloat16, enabled=odd)
    with pytest.raises(ValueError, match="autocast = "), cast:
        model(**plain, group=group)
    if odd:
        model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="checkpoints = "):
        model(**plain, group=group)
    layer = make_layer()
    u, state = layer_inputs(layer, 2, 8)
    with pytest.raises(ValueError, match="state = "):
        layer.step(u, state if odd else None, group=group)
    layer.step(u, state, group=group)  # nobody is out of step


@on_ranks(2)
def test_what_a_group_cannot_mean_is_refused(rank, world):
    model, ids = tiny(), tokens(1, 8)
    other = dist.new_group([1])
    for group in ("world", *[other] * (rank == 0)):
        with pytest.raises(TypeError, match="must be a process group that this rank belongs to"):
            model(ids, group=group)
    with pytest.raises(ValueError, match="segment_length = 'auto': slices depend on it"):
        model(ids, labels=ids, segment_length="auto", group=dist.group.WORLD)
    with pytest.raises(ValueError, match="group = .*read the prompt with"):
        model.generate(ids, group=dist.group.WORLD, max_new_tokens=2)
    cache = model(ids.chunk(2, dim=1)[rank], group=dist.group.WORLD).past_key_values
    given = dict(past_key_values=cache, **GREEDY)
    expected = model.generate(torch.cat([ids, ids], dim=1), **GREEDY)
    assert torch.equal(model.generate(torch.cat([ids, ids], dim=1), **given), expected)


@on_ranks(2)
def test_a_rank_that_fails_leaves_no_other_waiting(rank, world):
    given = dict(group=dist.new_group(timeout=timedelta(seconds=1)))
    model, ids, start = tiny().train(), tokens(1, 8), time.perf_counter()
    model(ids, labels=ids, **given)
    if rank == 1:
        with pytest.raises(ValueError, match="labels has shape"):
            model(ids, labels=ids[:, 1:], **given)
        time.sleep(3)  # if it ended, the other would hear of it at once
    else:
        with pytest.raises(RuntimeError, match="Timed out"):
            model(ids, labels=ids, **given)
    assert time.perf_counter() - start < 20


# ---- torchrun, with transformers' Trainer and with accelerate

LAUNCHED = """
import json, sys
from test_mamba2 import *

DEVICE = torch.device("cpu")
tokenizer, data = byte_data()
padding = collators(tokenizer)[0]
options = dict(use_cpu=True, ddp_backend="gloo", max_grad_norm=0.0, max_steps=4)
options |= dict(per_device_train_batch_size=int(sys.argv[2]))
found = {"Trainer": train(sys.argv[1], padding, data, **options)[1]}

plugin = accelerate.FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
)
accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
for name in ("DDP", "FSDP2") if FSDP2_RUNS else ("DDP",):
    if name == "FSDP2" and accelerator.num_processes > 1:  # on a CPU accelerate has to be told
        kind = accelerate.utils.DistributedType.FSDP
        accelerator.state.fsdp_plugin, accelerator.state.distributed_type = plugin, kind
        accelerate.PartialState._shared_state["distributed_type"] = kind
    model = tiny(dtype=torch.float64).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2)
    loader = torch.utils.data.DataLoader(tokens(16, 24), batch_size=int(sys.argv[2]))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    found[name] = []
    for ids in loader:
        loss = model(ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found[name].append(accelerator.reduce(loss.detach(), "mean").item())
    if name == "FSDP2" and accelerator.num_processes > 1:
        sharded = torch.distributed.fsdp.FSDPModule
        assert all(isinstance(layer, sharded) for layer in model.backbone.layers)
if accelerator.is_main_process:
    Path(sys.argv[1], f"{accelerator.num_processes}.json").write_text(json.dumps(found))
accelerator.end_training()
os._exit(0)  # gloo's threads may still hold tensors: they would abort an interpreter that ends
"""


def test_trainer_and_accelerate_under_torchrun_train_as_one_process(tmp_path):
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for processes, rows in ((1, 4), (2, 2)):
        launch = [*torchrun, f"--nproc_per_node={processes}", script, tmp_path, str(rows)]
        done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    assert one.keys() == two.keys()
    for name in one:
        assert len(two[name]) == 4 and two[name][3] < two[name][0]
        assert_close(torch.tensor(two[name]).double(), torch.tensor(one[name]).double(), 1e-6)


# --------------------------------------------------------------------------------------------------
# The kernels
# --------------------------------------------------------------------------------------------------
#
# They run on CUDA, or as Python in Triton's interpreter: `test_the_kernels_pass_in_the_interpreter`
# runs all of this again with TRITON_INTERPRET=1 where there is no GPU. What is right is the twin in
# mamba2.py, in float64 on the CPU, which no kernel takes; it is compared with the paper above.

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HALF = torch.bfloat16 if CUDA else torch.float16  # the interpreter's bfloat16 is not CUDA's
SSD_DTYPES = [torch.float32, torch.float16, torch.bfloat16] if CUDA else [torch.float32, HALF]
SMALL_DTYPES = [torch.float32, torch.float16, torch.bfloat16] if CUDA else [torch.float32, HALF]
PASSED_IN_THE_INTERPRETER = 238

needs_kernels = pytest.mark.skipif(
    not getattr(mamba2.kernels, "TRITON", False) or not (CUDA or INTERPRETED),
    reason="kernels run on CUDA, or with TRITON_INTERPRET=1, and need Triton",
)
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs CUDA")


@contextlib.contextmanager
def poisoned():
    """Whatever memory is allocated in here holds NaN: what a kernel does not write, shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(5, device=DEVICE).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run_with_gradients(operation, inputs, cotangents, **static):
    """Outputs by number and gradients by name, from the cotangents that are not None."""
    leaves = {k: t.detach() for k, t in inputs.items() if t is not None}
    floats = {k: t.requires_grad_() for k, t in leaves.items() if t.is_floating_point()}
    outputs = operation(**leaves, **static)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(o, c.to(o)) for o, c in zip(outputs, cotangents, strict=True) if c is not None]
    found = torch.autograd.grad(
        [o for o, _ in pairs], list(floats.values()), [c for _, c in pairs], materialize_grads=True
    )
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return results | {f"d {k}": g for k, g in zip(floats, found, strict=True)}


def relative_error(found, exact):
    found, exact = found.double().cpu(), exact.double().cpu()
    assert found.shape == exact.shape
    return ((found - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def assert_kernel_right(
    name, inputs, tolerance, case, only=None, loose=(), sums=(), twin=None, **static
):
    """Values and gradients of a kernel are those of its twin; `only`: of one output's cotangent.

    loose: other tolerances, by name. sums: gradients that are sums of terms which cancel, so that
    rounding the terms costs more: three times what it costs the twin, in these dtypes, is allowed.
    """
    exact_inputs = {
        k: t if t is None else t.cpu().double() if t.is_floating_point() else t.cpu()
        for k, t in inputs.items()
    }
    twin = twin or getattr(mamba2, name)
    with torch.no_grad():
        outputs = twin(**exact_inputs, **static)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [
        torch.randn_like(o).to(HALF) if only in (None, i) else None for i, o in enumerate(outputs)
    ]
    exact = run_with_gradients(twin, exact_inputs, cotangents, **static)
    takes = getattr(mamba2.kernels, f"takes_{name}", None)  # a layer's middle answers itself
    assert takes is None or takes(**inputs, **static)
    with poisoned():
        found = run_with_gradients(getattr(mamba2.kernels, name), inputs, cotangents, **static)
    assert found.keys() == exact.keys()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba2, "kernels", None)
        rounded = run_with_gradients(twin, inputs, cotangents, **static) if sums else {}
    for key in exact:
        error, limit = relative_error(found[key], exact[key]), dict(loose).get(key, tolerance)
        if key in sums:
            limit += 3 * relative_error(rounded[key], exact[key])
        assert error <= limit, f"{case}, {key}: {error:.1e}"  # also if it is NaN
        if key.startswith("d "):
            assert found[key].dtype == inputs[key[2:]].dtype


def kernel_ssd_inputs(dtype, l, b=2, h=3, p=None, n=None, g=1, D=(), **features):
    """Arguments of SSD as in a layer: x, B, C in dtype, all else in float32.

    features: state, seq: there is an initial state, there are sequences; sliced: x, B and C are
    slices of one tensor, "odd" where rows begin at odd addresses; steps: "extreme", "zero" or
    "growing"; low: all is in dtype.
    """
    p, n = p or (64 if CUDA else 16), n or (128 if CUDA else 16)
    draw, sliced, steps = dict(device=DEVICE), features.get("sliced"), features.get("steps")
    widths = [int(sliced == "odd"), h * p, g * n, g * n]
    _, x, B, C = torch.randn(b, l, sum(widths), **draw).to(dtype).split(widths, -1)
    x, B, C = x.unflatten(2, (h, p)), B.unflatten(2, (g, n)), C.unflatten(2, (g, n))
    if not sliced:
        x, B, C = x.contiguous(), B.contiguous(), C.contiguous()
    dt, A = 10 ** (2 * torch.rand(b, l, h, **draw) - 3), -1 - 15 * torch.rand(h, **draw)
    if steps == "extreme":
        dt = 10 ** (11 * torch.rand(b, l, h, **draw) - 8)
        A = -(10 ** (6 * torch.rand(h, **draw) - 3))
    elif steps == "zero":  # as at masked positions
        dt = dt * (torch.rand(b, l, 1, **draw) < 0.5)
    elif steps == "growing":  # the first head's state grows by some 4 % per step, others decay
        dt, A = 0.05 + dt / 2, torch.where(torch.arange(h, device=DEVICE) == 0, 0.7, A)
    D = None if D is None else torch.randn(h, *((p,) if D else ()), **draw)
    state = torch.randn(b, h, p, n, **draw) if features.get("state") else None
    if features.get("low"):
        dt, A, D, state = (t.to(dtype) for t in (dt, A, D, state))
    borders = torch.rand(b, l, **draw) < max(1.5 / l, 0.03)
    seq_idx = borders.cumsum(1) % 3 if features.get("seq") else None
    return dict(x=x, dt=dt, A=A, B=B, C=C, D=D, initial_state=state, seq_idx=seq_idx)


# Lengths are (m, a) for m Q + a, where Q is the kernels' own chunk: 64 in bfloat16, else 32.
KERNEL_SSD = {
    "one position": dict(l=(0, 1), state=True),
    "Q - 1": dict(l=(1, -1), state=True),
    "Q": dict(l=(1, 0), D=(1,)),
    "Q + 1": dict(l=(1, 1), state=True),
    "3 Q + 1, from zero": dict(l=(3, 1)),
    "3 Q + 7": dict(l=(3, 7), D=(1,), state=True),
    "groups, slices of one tensor": dict(l=(3, 7), h=4, g=2, sliced=True, state=True),
    "slices at odd addresses": dict(l=(1, 9), sliced="odd", seq=True),
    "all in the dtype of x": dict(l=(1, 9), low=True, state=True),
    "a group for each head, no D": dict(l=(1, 9), g=3, D=None),
    "sequences": dict(l=(3, 7), seq=True, state=True, D=(1,)),
    "extreme steps and decays": dict(l=(3, 7), steps="extreme", state=True),
    "steps of zero": dict(l=(3, 7), steps="zero", state=True, seq=True),
    "a state that grows": dict(l=(2, 7), steps="growing", state=True, seq=True),
    "gradient of y alone": dict(l=(1, 5), only=0, seq=True),
    "gradient of the final state alone": dict(l=(1, 5), only=1, state=True),
    "segments": dict(l=(9, 5), segments=4, state=True, seq=True),
    "several heads a program": dict(l=(2, 3), h=6, g=2, split=(1, 3), state=True, seq=True),
    "uneven shares of heads": dict(l=(2, 3), h=5, split=(2, 3), D=(1,)),
    "several heads, several tiles each": dict(l=(1, 3), b=1, p=128, split=(1, 3), D=(1,)),
}
if CUDA:  # enough programs that the kernels choose so themselves
    KERNEL_SSD["a full GPU"] = dict(l=(4, 3), b=40, h=5, sliced=True, state=True)
    KERNEL_SSD["a full GPU, groups"] = dict(l=(4, 3), b=24, h=6, g=2, seq=True, D=(1,))
SIZES = [(16, 16), (32, 128), (128, 64), (64, 256), (256, 32), (128, 256)] if CUDA else [(32, 256)]
KERNEL_SSD |= {
    f"headdim {p}, d_state {n}": dict(l=(2, 3), b=1, h=2, p=p, n=n, state=True, D=(1,), seq=True)
    for p, n in SIZES
}
KERNEL_SSD |= {
    f"headdim {p}, d_state {n}, from zero": dict(l=(3, 3), b=1, h=8, p=p, n=n) for p, n in SIZES
}


@needs_kernels
@pytest.mark.parametrize("case", KERNEL_SSD)
@pytest.mark.parametrize("dtype", SSD_DTYPES, ids=str)
def test_kernel_ssd_is_its_twin_in_values_and_gradients(dtype, case, monkeypatch):
    options = dict(KERNEL_SSD[case])
    monkeypatch.setattr(mamba2.kernels, "_replays", {})  # of a call that was not forced
    for name in ("segments", "split"):
        if name in options:
            forced = options.pop(name)
            monkeypatch.setattr(mamba2.kernels, f"_{name}", lambda *sizes, forced=forced: forced)
    (m, a), only = options.pop("l"), options.pop("only", None)
    q = 64 if dtype == torch.bfloat16 and options.get("n") != 256 else 32
    inputs = kernel_ssd_inputs(dtype, m * q + a, **options)
    if dtype == torch.float16 and "extreme" in case:  # results of 1e5 would be infinite
        inputs |= dict(x=inputs["x"] / 8, B=inputs["B"] / 8)
    # bfloat16 and float16: products have operands of 8 and 11 bits. float32: sums of some 100 terms
    # of 24 bits. The gradient of A is one number a head, a sum over all positions of terms of both
    # signs, which cancel.
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    assert_kernel_right("ssd", inputs, tolerance, case, only, loose={"d A": 3 * tolerance})


KERNEL_CONV = {  # b, l, channels, width of the tensor they are a slice of, its start; and features
    "one position": (2, 1, 37, 0, 0, "bias state"),
    "two positions": (2, 2, 256, 600, 96, "seq state"),
    "three positions": (2, 3, 300, 331, 5, "bias"),
    "63 positions": (2, 63, 37, 0, 0, "seq"),
    "64 positions": (1, 64, 300, 331, 5, "bias state seq"),
    "65 positions": (2, 65, 256, 600, 96, "bias state seq"),
    "200 positions": (1, 200, 40, 48, 8, "bias seq"),
}
if CUDA:
    KERNEL_CONV["130m"] = 2, 1000, 1792, 3352, 1536, "bias state seq"
    KERNEL_CONV["2.7b"] = 1, 333, 5376, 10576, 5120, "bias"
# One rounding to the dtype, after arithmetic in float32 and for weights sums of 10^4 terms.
KERNEL_SMALL = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}


@needs_kernels
@pytest.mark.parametrize("case", KERNEL_CONV)
@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("dtype", SMALL_DTYPES, ids=str)
def test_kernel_convolution_is_its_twin_in_values_and_gradients(dtype, k, case):
    b, l, d, width, start, features = KERNEL_CONV[case]
    wide = torch.randn(b, l, width or d, device=DEVICE).to(dtype)
    weight = torch.randn(d, k, device=DEVICE) / 2
    inputs = dict(x=wide[..., start : start + d], weight=weight.to(dtype) if k == 3 else weight)
    if "bias" in features:
        inputs["bias"] = torch.randn(d, device=DEVICE)
    if "state" in features:
        inputs["initial_state"] = torch.randn(b, k - 1, d, device=DEVICE).to(dtype)
    if "seq" in features:  # sequences of one to five positions, or of some twenty
        ids = (torch.rand(b, l, device=DEVICE) < (0.4 if k == 3 or l < 5 else 0.05)).cumsum(1) % 3
        inputs["seq_idx"] = ids.int() if k == 4 else ids
    loose = {"d weight": KERNEL_SMALL[inputs["weight"].dtype], "d bias": 2e-6}
    for only in (None, 0, 1) if l == 2 or CUDA and l == 65 else (None,):
        assert_kernel_right("causal_conv1d", inputs, KERNEL_SMALL[dtype], case, only, loose)


KERNEL_NORM_LINEAR = {  # rows, d, outputs, groups, features
    "one row": (1, 64, 100, 1, ""),
    "one row, an odd width": (1, 700, 33, 1, ""),
    "groups and all else": (2, 96, 70, 2, "gate bias residual"),
    "two rows, an odd width": (2, 700, 33, 1, "residual"),
    "wide groups": (2, 1536, 20, 4, "gate bias"),
}
if CUDA:
    KERNEL_NORM_LINEAR |= {
        "130m, in": (1, 768, 3352, 1, ""),
        "130m, out": (1, 1536, 768, 1, "gate residual"),
        "2.7b, in": (2, 2560, 10576, 1, ""),
        "2.7b, out": (1, 5120, 2560, 1, "gate residual"),
        "codestral, out": (2, 8192, 4096, 8, "gate residual"),
    }


@needs_kernels
@pytest.mark.parametrize("case", KERNEL_NORM_LINEAR)
@pytest.mark.parametrize("dtype", SMALL_DTYPES, ids=str)
def test_kernel_norm_linear_is_the_norm_and_the_projection_in_float64(dtype, case):
    rows, d, outputs, groups, features = KERNEL_NORM_LINEAR[case]

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, device=DEVICE).to(dtype)

    x, norm_weight, weight = draw(rows, 1, d), draw(d), draw(outputs, d)
    bias = draw(outputs) if "bias" in features else None
    gate = draw(rows, 1, d + 16)[..., 8:-8] if "gate" in features else None
    residual = draw(rows, 1, outputs, dtype=torch.float32) if "residual" in features else None
    with torch.no_grad(), poisoned():
        found = mamba2.kernels.norm_linear(
            x, norm_weight, 1e-5, weight, bias, gate=gate, groups=groups, residual=residual
        )
    assert found.dtype == (dtype if residual is None else torch.float32)
    given = (x, norm_weight, weight, bias, gate, residual)
    x, norm_weight, weight, bias, gate, residual = (t if t is None else t.double() for t in given)
    y = mamba2.rms_norm(x, norm_weight, 1e-5, gate=gate, groups=groups)
    exact = F.linear(y, weight, bias) + (0 if residual is None else residual)
    limit = KERNEL_SMALL[dtype if residual is None else torch.float32]
    assert relative_error(found, exact) <= limit


@needs_kernels
def test_kernel_norm_linear_leaves_many_rows_and_gradients_to_others():
    x, w = torch.randn(3, 8, device=DEVICE), torch.randn(8, device=DEVICE)
    weight = torch.randn(6, 8, device=DEVICE)
    takes = mamba2.kernels.takes_norm_linear
    assert takes(x[:2], w, 1e-5, weight) and not takes(x, w, 1e-5, weight)
    assert not takes(x[:1], w, 1e-5, weight.requires_grad_())
    with torch.no_grad():
        assert takes(x[:1], w, 1e-5, weight)
        for arguments in (
            (x[:1], w[1:], 1e-5, weight),
            (x[:1], w, 1e-5, weight[:, 1:]),
            (x[:1], w, 1e-5, weight, w),
            (x[:1].double(), w, 1e-5, weight),
        ):
            assert not takes(*arguments)
            with pytest.raises(ValueError, match="mamba2.Mamba2Block takes any tensors"):
                mamba2.kernels.norm_linear(*arguments)


@needs_kernels
def test_kernel_convolution_rounds_a_state_to_the_dtype_of_x_as_its_twin_does():
    x, weight = torch.randn(2, 5, 8, device=DEVICE).to(HALF), torch.randn(8, 4, device=DEVICE)
    state = torch.randn(2, 3, 8, device=DEVICE)
    found = mamba2.causal_conv1d(x, weight, initial_state=state)
    assert identical(found, mamba2.causal_conv1d(x, weight, initial_state=state.to(HALF)))
    assert found[1].dtype == HALF


@needs_kernels
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", SMALL_DTYPES, ids=str)
def test_kernel_norm_is_its_twin_in_values_and_gradients(dtype, groups, gated):
    shapes = [(3, 64, 0), (1, 100, 0), (7, 96, 200), (5, 1536, 1600)]
    if CUDA:
        shapes += [(1, 1536, 3352), (4096, 1536, 3352), (1000, 5120, 10576), (33, 8192, 18560)]
        shapes += [(65, 1000, 1001), (63, 1032, 0), (130, 768, 0), (9, 2560, 0)]
    for rows, d, width in shapes:
        wide = torch.randn(1, rows, width or d, device=DEVICE)[..., :d]
        for x_dtype in {dtype, torch.float32}:
            weight = torch.randn(d, device=DEVICE).to(dtype if rows % 2 else torch.float32)
            x = torch.randn(1, rows, d, device=DEVICE) if gated else wide
            inputs = dict(x=x.to(x_dtype), weight=weight)
            if gated:
                inputs["gate"] = wide.to(dtype)
            result = dtype if gated else weight.dtype
            case = f"{rows} rows of {d} in {width}, x {x_dtype}, weight {weight.dtype}"
            loose = {key: KERNEL_SMALL[t.dtype] for key, t in (("d x", inputs["x"]),)}
            loose = loose | {"output 0": KERNEL_SMALL[result]} if not gated else {}
            assert_kernel_right(
                "rms_norm", inputs, KERNEL_SMALL[dtype], case, loose=loose, eps=1e-5, groups=groups
            )
            y = mamba2.rms_norm(**inputs, eps=1e-5, groups=groups)
            assert y.dtype == result, "the result has the gate's dtype, or the weight's"


def kernel_layer(dtype, **options):
    """A layer whose sizes the kernels take, and the same in float64, which they do not take."""
    torch.manual_seed(1)
    sizes = dict(d_model=256, d_state=128, headdim=64) if CUDA else {}
    sizes = dict(d_model=16, d_state=16, headdim=16, ngroups=2) | sizes | options
    layer = Mamba2(**sizes).to(DEVICE, dtype)
    return layer, copy.deepcopy(layer).double()


@contextlib.contextmanager
def counted(monkeypatch):
    """The names of the operations that the kernels run in here; "refused" if they do not."""
    ran = []
    with monkeypatch.context() as patch:
        for name in (
            "ssd",
            "causal_conv1d",
            "rms_norm",
            "layer_middle",
            "layer_step",
            "norm_linear",
        ):
            operation = getattr(mamba2.kernels, name)

            def counting(*args, name=name, operation=operation, **options):
                result = operation(*args, **options)
                ran.append(name if result is not None else "refused")
                return result

            patch.setattr(mamba2.kernels, name, counting)
        yield ran


@needs_kernels
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("dtype", SSD_DTYPES, ids=str)
def test_kernel_layer_is_the_layer_in_float64_whole_and_in_pieces(dtype, hooked, monkeypatch):
    layer, exact = kernel_layer(dtype)
    if hooked:  # modules with hooks have to be called, so convolution, SSD and norm stay apart
        layer.norm.register_forward_hook(lambda module, args, y: y)
    l = 300 if CUDA else 40
    u = torch.randn(2, l, layer.config.d_model, device=DEVICE).to(dtype)
    seq_idx = (torch.arange(l, device=DEVICE) >= 2 * l // 3).int().expand(2, l)
    cotangent = torch.randn(u.shape, device=DEVICE).to(dtype)

    def everything(layer, u, cuts):
        leaf = u.detach().requires_grad_()
        step = lambda piece, state: layer.step(leaf[:, piece], state, None, seq_idx[:, piece])
        y, state = in_pieces(step, l, None, cuts)
        loss = (y * cotangent.to(y)).double().sum() + state.ssm.double().sum()
        return [y, *state, *torch.autograd.grad(loss, [leaf, *layer.parameters()])]

    want = everything(exact, u.double(), [])
    with monkeypatch.context() as patch:
        patch.setattr(mamba2, "kernels", None)
        plain = everything(layer, u, [])
    for cuts in ([], [l // 2], [l // 3, l // 3 + 1, l - 1]):
        with counted(monkeypatch) as ran, poisoned():
            found = everything(layer, u, cuts)
        apart = ["causal_conv1d", "ssd", "rms_norm"]
        pieces = [b - a for a, b in itertools.pairwise([0, *cuts, l])]
        want_ran = [["layer_middle"] if n > 1 and not hooked else apart for n in pieces]
        assert [name for name in ran if name != "refused"] == sum(want_ran, [])
        for i, (f, p, w) in enumerate(zip(found, plain, want, strict=True)):
            assert f.dtype == p.dtype
            limit = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
            assert relative_error(f, w) <= 3 * relative_error(p, w) + limit, f"{cuts} [{i}]"


def layer_middle(  # the twin of the kernels' operation, from the twins of its parts
    zxbcdt,
    conv,
    ssm,
    seq_idx,
    weight,
    bias,
    dt_bias,
    A_log,
    D,
    norm_weight,
    *,
    groups,
    eps,
    dt_limit,
):
    h, hp, d = len(D), len(norm_weight), len(weight)
    z, xBC, dt = zxbcdt.split([hp, d, h], -1)
    start = dict(initial_state=conv, seq_idx=seq_idx)
    xBC, conv = mamba2.causal_conv1d(xBC, weight.squeeze(1), bias, **start)
    x, B, C = xBC.split([hp, (d - hp) // 2, (d - hp) // 2], -1)
    x, B, C = (t.unflatten(2, (n, -1)) for t, n in ((x, h), (B, groups), (C, groups)))
    dt = F.softplus(dt + dt_bias).clamp(*dt_limit)
    y, ssm = mamba2.ssd(x, dt, -A_log.exp(), B, C, D, initial_state=ssm, seq_idx=seq_idx)
    return mamba2.rms_norm(y.flatten(2), norm_weight, eps, gate=z, groups=groups), conv, ssm


# Length, sizes of the layer, features; and whose cotangent alone there is.
KERNEL_MIDDLE = {
    "two positions": (2, {}, "state"),
    "63 positions, groups": (63, dict(g=2, h=4), "seq"),
    "64 positions": (64, {}, ""),
    "150 positions, groups": (150, dict(b=1, g=2, h=6, k=3), "state seq"),
    "a limit, two taps, no bias": (40, dict(k=2), "state limit no_bias"),
    "gradient of the output alone": (70, {}, "state", 0),
    "gradient of the convolution's state alone": (5, {}, "state seq", 1),
    "gradient of the state alone": (70, {}, "state", 2),
}
if CUDA:
    KERNEL_MIDDLE["130m"] = 2048, dict(h=24), "seq"
    KERNEL_MIDDLE["codestral"] = 500, dict(h=16, g=8), "state"


@needs_kernels
@pytest.mark.parametrize("case", KERNEL_MIDDLE)
@pytest.mark.parametrize("dtype", SSD_DTYPES, ids=str)
def test_kernel_middle_is_the_layer_between_its_projections(dtype, case, monkeypatch):
    l, sizes, features, *only = KERNEL_MIDDLE[case]
    inputs, static = kernel_middle_inputs(dtype, l, features=features, **sizes)
    # As for SSD, with more roundings on the way, of float16 also below its normal range. Gradients
    # of numbers a head are sums over all positions, of terms that cancel.
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    sums = ["d A_log", "d D", "d dt_bias"]
    only = only[0] if only else None
    assert_kernel_right(
        "layer_middle", inputs, tolerance, case, only, sums=sums, twin=layer_middle, **static
    )


def kernel_middle_inputs(dtype, l, b=2, h=3, g=1, k=4, features=""):
    """Arguments of a layer's middle: tensors, in dtype or float32; then None and numbers."""
    p, n, draw = 64 if CUDA else 16, 128 if CUDA else 16, dict(device=DEVICE)
    d = h * p + 2 * g * n
    seq = (torch.rand(b, l, **draw) < 0.05).cumsum(1) % 3
    inputs = dict(
        zxbcdt=torch.randn(b, l, h * p + d + h, **draw).to(dtype),
        conv=torch.randn(b, k - 1, d, **draw).to(dtype) if "state" in features else None,
        ssm=torch.randn(b, h, p, n, **draw) if "state" in features else None,
        seq_idx=seq if "seq" in features else None,
        weight=torch.randn(d, 1, k, **draw) / 2,
        bias=None if "no_bias" in features else torch.randn(d, **draw).to(dtype),
        dt_bias=torch.randn(h, **draw) - 3,
        A_log=torch.rand(h, **draw) * 2,
        D=torch.randn(h, **draw).to(dtype),
        norm_weight=torch.randn(h * p, **draw).to(dtype),
    )
    limit = (0.02, 0.2) if "limit" in features else (0.0, math.inf)
    static = {k: t for k, t in inputs.items() if t is None}
    static |= dict(groups=g, eps=1e-5, dt_limit=limit)
    return {k: t for k, t in inputs.items() if t is not None}, static


# What another operation does, or what does not fit; of it nothing is said here.
KERNEL_MIDDLE_REFUSED = {
    "float64": lambda i: {k: t.double() for k, t in i.items()},
    "on no device": lambda i: {k: t.to("meta") for k, t in i.items()},
    "one position": lambda i: i | dict(zxbcdt=i["zxbcdt"][:, :1], conv=None, ssm=None),
    "one position, too wide": lambda i: i | dict(zxbcdt=i["zxbcdt"][:, :1].repeat(1, 1, 2)),
    "no rows": lambda i: i | {k: i[k][:0] for k in ("zxbcdt", "conv", "ssm")},
    "no batch": lambda i: i | dict(zxbcdt=i["zxbcdt"][0]),
    "a wider projection": lambda i: i | dict(zxbcdt=i["zxbcdt"].repeat(1, 1, 2)),
    "weight flat": lambda i: i | dict(weight=i["weight"].squeeze(1)),
    "five taps": lambda i: i | dict(weight=i["weight"].repeat(1, 1, 2)[..., :5], conv=None),
    "a bias of other channels": lambda i: i | dict(bias=i["bias"][1:]),
    "D for each channel": lambda i: i | dict(D=i["D"][:, None].repeat(1, 16)),
    "A of other heads": lambda i: i | dict(A_log=i["A_log"][1:]),
    "a head more": lambda i: i | dict(dt_bias=torch.cat([i["dt_bias"], i["dt_bias"][:1]])),
    "state of other rows": lambda i: i | dict(ssm=i["ssm"][:1]),
    "state of another length": lambda i: i | dict(conv=i["conv"][:, 1:]),
    "labels that are not integers": lambda i: i | dict(seq_idx=i["zxbcdt"][..., 0]),
    "labels of 16 bits": lambda i: i | dict(seq_idx=i["zxbcdt"][..., 0].short()),
    "no norm": lambda i: i | dict(norm_weight=None),
}


@needs_kernels
def test_kernels_are_not_compiled_anew_for_other_lengths_and_rows(monkeypatch):
    """Whether a number is 1 or a multiple of 16, which Triton makes part of a kernel, stays."""
    layer, _ = kernel_layer(torch.float32)
    norm = mamba2.RMSNorm(layer.config.d_model, 1e-5).to(DEVICE)
    launch, varying = mamba2.kernels._launch, {*mamba2.kernels.VARYING}
    varying.add("NSPLIT")  # into how many shares the heads go: one, or more

    def recording(*calls):
        for kernel, _, tensors, numbers, options in calls:
            named = zip(kernel.arg_names[len(tensors) :], numbers, strict=False)
            kinds = [(k, v == 1, v % 16 == 0) for k, v in named if k not in varying]
            compiled[-1].add((kernel.fn, *options.values(), *kinds))
        launch(*calls)

    compiled = []
    monkeypatch.setattr(mamba2.kernels, "_launch", recording)
    for b, l in ((1, 2), (1, 16), (2, 17), (3, 48), (16, 3), (1, 70)):
        compiled.append(set())
        u = torch.randn(b, l, layer.config.d_model, device=DEVICE, requires_grad=True)
        layer(norm(u)).sum().backward()
    assert len(compiled[0]) >= 10
    for others in compiled[1:]:
        assert others == compiled[0], others ^ compiled[0]


@needs_kernels
@pytest.mark.parametrize("case", KERNEL_MIDDLE_REFUSED)
def test_kernel_middle_answers_none_where_it_cannot_run(case):
    inputs, static = kernel_middle_inputs(torch.float32, 5, features="state")
    assert mamba2.kernels.layer_middle(**static, **inputs) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mamba2.kernels.layer_middle(**(static | KERNEL_MIDDLE_REFUSED[case](inputs))) is None


@needs_kernels
def test_kernel_middle_takes_and_returns_a_state_in_other_dtypes_as_the_layer_does():
    layer, _ = kernel_layer(HALF)
    u = torch.randn(2, 5, layer.config.d_model, device=DEVICE).to(HALF)
    _, state = layer.step(u)
    state = [t.detach() for t in state]
    other = Mamba2State(state[0].float() * (1 + 1e-4), state[1].to(HALF))
    y, new = layer.step(u, other)
    assert (new.conv.dtype, new.ssm.dtype) == (HALF, HALF)
    wide, wider = layer.step(u, Mamba2State(other.conv.to(HALF), other.ssm.float()))
    assert wider.ssm.dtype == torch.float32
    assert identical((y, *new), (wide, wider.conv, wider.ssm.to(HALF)))


@needs_kernels
def test_kernel_layer_with_a_mask_passes_over_masked_positions(monkeypatch):
    layer, exact = kernel_layer(torch.float32)
    u = torch.randn(2, 9, layer.config.d_model, device=DEVICE)
    mask = torch.rand(2, 9, device=DEVICE) < 0.5
    with counted(monkeypatch) as ran:
        y, state = layer.step(u, mask=mask)
    assert ran == ["causal_conv1d", "ssd", "rms_norm"]
    for found, want in zip((y, *state), tensors(exact.step(u.double(), mask=mask)), strict=True):
        assert relative_error(found, want) <= 1e-5


@needs_kernels
def test_kernel_layer_calls_modules_that_are_more_than_their_kind(monkeypatch):
    class Adapter(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, *args, **options):
            self.calls += 1
            return self.inner(*args, **options)

    plain, _ = kernel_layer(torch.float32)
    u, called = torch.randn(2, 5, plain.config.d_model, device=DEVICE), []
    with counted(monkeypatch) as ran:
        want = plain(u)
        assert ran == ["layer_middle"]
        for name in ("conv1d", "norm"):
            layer = copy.deepcopy(plain)
            setattr(layer, name, Adapter(getattr(layer, name)))
            assert relative_error(layer(u), want) <= 1e-6 and getattr(layer, name).calls == 1
            for hook in ("forward_pre_hook", "forward_hook", "full_backward_hook"):
                layer = copy.deepcopy(plain)
                getattr(getattr(layer, name), f"register_{hook}")(lambda *a: called.append(a[0]))
                layer(u).sum().backward()
                assert called.pop() is getattr(layer, name) and not called
            layer = copy.deepcopy(plain)
            monkeypatch.setattr(getattr(layer, name), "forward", called.append)
            with pytest.raises(TypeError):
                layer(u)
        assert ran.count("layer_middle") == 1
        with torch.no_grad():
            _, state = plain.step(u)
            plain.step(u[:, :1], state)
            assert ran[-3:] == ["layer_step", "rms_norm", "layer_middle"]
            ran.clear()
            layer = copy.deepcopy(plain)
            layer.conv1d = Adapter(layer.conv1d)
            layer.step(u[:, :1], state)
            assert layer.conv1d.calls == 1 and "layer_step" not in ran


KERNEL_STEP = {  # rows, and options of the layer
    "one group": (3, {}),
    "groups, biases, a limit": (2, dict(ngroups=2, d_conv=3, bias=True, dt_limit=(0.01, 0.05))),
    "a group for each head": (
        1,
        dict(d_model=32, headdim=16, ngroups=4, d_conv=2, conv_bias=False),
    ),
    "odd sizes, one tap": (2, dict(d_model=36, headdim=24, d_state=20, ngroups=1, d_conv=1)),
}
if CUDA:
    KERNEL_STEP["130m"] = 1, dict(d_model=768)
    KERNEL_STEP["2.7b"] = 64, dict(d_model=2560)  # a full GPU
    KERNEL_STEP["codestral"] = 8, dict(d_model=4096, ngroups=8)
    KERNEL_STEP["d_state 256"] = 40, dict(d_model=512, headdim=128, d_state=256)


def kernel_step_inputs(dtype, state_dtype, rows, options):
    """A layer, the same in float64, and what is between its projections for one token."""
    layer, exact = kernel_layer(dtype, **options)
    draw = dict(device=DEVICE)
    wide = torch.randn(rows, 1, sum(layer.widths), **draw)
    wide[..., -layer.widths[2] :] *= 8  # steps from 1e-12 to 30
    _, xBC, dt = wide.to(dtype).split(layer.widths, -1)
    heads = (layer.config.num_heads, layer.config.head_dim, layer.config.state_size)
    conv = torch.randn(rows, layer.config.conv_kernel - 1, layer.widths[1], **draw).to(dtype)
    state = Mamba2State(conv, torch.randn(rows, *heads, **draw).to(state_dtype))
    with torch.no_grad():
        for parameter in (layer.A_log, layer.D, layer.dt_bias):
            parameter.add_(torch.randn_like(parameter))
    for name in ("A_log", "D", "dt_bias"):
        getattr(exact, name).data = getattr(layer, name).data.double()
    return layer, exact, xBC, dt, state


def kernel_step(layer, xBC, dt, state):
    """What the layer has the kernel do."""
    weights = layer.conv1d.weight, layer.conv1d.bias, layer.dt_bias, layer.A_log, layer.D
    limit = layer.config.time_step_limit
    y, *new = mamba2.kernels.layer_step(xBC, dt, *state, *weights, dt_limit=limit)
    return y, Mamba2State(*new)


@needs_kernels
@pytest.mark.parametrize("case", KERNEL_STEP)
@pytest.mark.parametrize("state_dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("dtype", SMALL_DTYPES, ids=str)
def test_kernel_step_is_the_layer_in_float64_for_one_token(dtype, state_dtype, case):
    layer, exact, xBC, dt, state = kernel_step_inputs(dtype, state_dtype, *KERNEL_STEP[case])
    before = [t.clone() for t in state]
    with torch.no_grad(), poisoned():
        y, new = kernel_step(layer, xBC, dt, state)
    assert identical(state, before)
    assert (y.dtype, new.conv.dtype, new.ssm.dtype) == (dtype, dtype, state_dtype)
    with torch.no_grad():
        wide = [t.double() for t in (xBC, dt, *state)]
        want, exact_new = exact._convolve_and_scan(*wide[:2], Mamba2State(*wide[2:]), *4 * [None])
    # x, B and C are rounded to the dtype after the convolution, y once more, the state to its own.
    limit = 4 * KERNEL_SMALL[dtype]
    assert relative_error(y, want) <= limit
    assert torch.equal(new.conv.double(), exact_new.conv)
    assert relative_error(new.ssm, exact_new.ssm) <= max(limit, KERNEL_SMALL[state_dtype])


@needs_kernels
def test_kernel_step_keeps_the_digits_of_small_steps():
    layer, exact, xBC, dt, state = kernel_step_inputs(torch.float32, torch.float32, 2, {})
    empty = Mamba2State(state.conv, torch.zeros_like(state.ssm))
    small = -8 - 8 * torch.rand_like(dt) - layer.dt_bias.detach()  # steps from 1e-7 to 3e-4
    with torch.no_grad():
        _, new = kernel_step(layer, xBC, small, empty)
        wide = Mamba2State(*(t.double() for t in empty))
        _, want = exact._convolve_and_scan(xBC.double(), small.double(), wide, *4 * [None])
    errors = (new.ssm - want.ssm).norm(dim=(2, 3)) / want.ssm.norm(dim=(2, 3))  # for each head
    assert errors.max() <= 1e-5


@needs_kernels
def test_kernel_step_goes_on_like_the_layer_and_writes_where_it_is_told_to(monkeypatch):
    monkeypatch.setattr(mamba2.kernels, "_said", set())
    layer, _ = kernel_layer(HALF)
    u = torch.randn(2, 6, layer.config.d_model, device=DEVICE).to(HALF)
    with torch.no_grad():
        want, end = layer.step(u)
        y, start = layer.step(u[:, :2])
        with counted(monkeypatch) as ran:
            ys, state = in_pieces(lambda t, s: layer.step(u[:, 2:][:, t], s), 4, start, [1, 2, 3])
    assert ran.count("layer_step") == 4 and "ssd" not in ran
    for f, w in zip((torch.cat([y, ys], 1), *state), (want, *end), strict=True):
        assert relative_error(f, w) <= 1e-2

    weights = (layer.conv1d.weight, layer.conv1d.bias, layer.dt_bias, layer.A_log, layer.D)
    _, xBC, dt = torch.randn(2, 1, sum(layer.widths), device=DEVICE).to(HALF).split(layer.widths, 2)
    with torch.no_grad():
        expected = mamba2.kernels.layer_step(xBC, dt, *start, *weights)
        out = torch.full_like(start.conv, torch.nan), start.ssm
        found = mamba2.kernels.layer_step(xBC, dt, *start, *weights, out=out)
        assert identical(found, expected) and found[1] is out[0] and found[2] is start.ssm
        for refused, reason in (
            ((start.conv, start.ssm), "out.0. overlaps conv"),
            ((out[0].double(), start.ssm), "out.0. is not bfloat16"),
            ((out[0], start.ssm.to(HALF)), "dtypes"),
            ((out[0], start.ssm.mT.contiguous().mT), "contiguous"),
            ((out[0][:, 1:], start.ssm), "shape of out.0."),
        ):
            with pytest.raises(ValueError, match=rf"{reason}.*; mamba2\.Mamba2 takes any tensors"):
                mamba2.kernels.layer_step(xBC, dt, *start, *weights, out=refused)


@needs_kernels
def test_kernel_step_leaves_to_the_layer_what_is_not_one_token_without_gradients(monkeypatch):
    layer, exact = kernel_layer(torch.float32)
    u = torch.randn(2, 2, layer.config.d_model, device=DEVICE)
    _, state = layer.step(u)
    state = Mamba2State(*(t.detach() for t in state))
    mask = torch.tensor([[1], [0]], device=DEVICE)
    one = u[:, :1]
    with counted(monkeypatch) as ran, warnings.catch_warnings():
        warnings.filterwarnings("error", "plain PyTorch runs")
        layer.step(one, state)  # wants gradients
        with torch.no_grad():
            layer.step(u, state)
            layer.step(one)  # has no state
            layer.step(one[:, :0], state)
            layer.step(one, state, mask)
            exact.step(one.double(), Mamba2State(*(t.double() for t in state)))
        assert "layer_step" not in ran
        with torch.no_grad():
            layer.step(one, state)
            layer.step(one, state, seq_idx=mask)  # a label alone is no border
    assert ran.count("layer_step") == 2


@needs_kernels
def test_kernel_step_is_captured_whole_by_torch_compile_for_any_number_of_rows():
    layer, _ = kernel_layer(HALF)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    torch._dynamo.reset()
    step = torch.compile(layer.step, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for rows in (2, 3, 5):
            u = torch.randn(rows, 5, layer.config.d_model, device=DEVICE).to(HALF)
            _, state = layer.step(u)
            found, want = step(u[:, :1], state), layer.step(u[:, :1], state)
            for f, e in zip(tensors(found), tensors(want), strict=True):
                assert relative_error(f, e) <= 1e-2
    for graph in graphs:
        assert sum(f"{mamba2.kernels.NAMESPACE}.layer_step" in target for target in graph) == 1


@needs_kernels
@pytest.mark.parametrize("options", [{}, dict(ngroups=2, bias=True, dt_limit=(0.01, 0.05))])
def test_kernel_block_decodes_a_token_of_few_rows_in_three_kernels(options, monkeypatch):
    layer, _ = kernel_layer(HALF, **options)
    block = mamba2.Mamba2Block(layer.config).to(DEVICE, HALF)
    exact = copy.deepcopy(block).double()
    h = torch.randn(5, 1, layer.config.d_model, device=DEVICE)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        exact.load_state_dict(block.state_dict())
        _, state = block(torch.randn_like(h).expand(-1, 3, -1))

        def run(rows):
            part = Mamba2State(*(t[:rows] for t in state))
            with counted(monkeypatch) as ran:
                found, new = block(h[:rows], part)
            wide = Mamba2State(*(t.double() for t in part))
            want, exact_new = exact(h[:rows].double(), wide)
            assert found.dtype == torch.float32 and relative_error(found, want) <= 1e-2
            assert relative_error(new.ssm, exact_new.ssm) <= 1e-2
            return ran

        three, before = ["norm_linear", "layer_step", "norm_linear"], h.clone()
        assert run(1) == run(2) == three and "norm_linear" not in run(3)
        assert torch.equal(h, before)
        seen = []
        handle = block.mixer.out_proj.register_forward_hook(lambda *given: seen.append(given))
        assert "norm_linear" not in run(1) and len(seen) == 1
        handle.remove()
        assert run(1) == three
        with torch.autocast(DEVICE.type, HALF), counted(monkeypatch) as ran:
            block(h[:1], Mamba2State(*(t[:1] for t in state)))
        assert "norm_linear" not in ran
        weight = block.mixer.out_proj.weight
        weight.data = weight.t().contiguous().t()  # whose rows are not contiguous
        assert "norm_linear" not in run(1)


@needs_kernels
def test_kernel_block_calls_whatever_stands_in_place_of_its_layer():
    class Adapter(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **options):
            return self.inner(*args, **options)

    layer, _ = kernel_layer(HALF)
    block = mamba2.Mamba2Block(layer.config).to(DEVICE, HALF)
    adapted = copy.deepcopy(block)
    adapted.mixer = Adapter(adapted.mixer)
    h = torch.randn(2, 5, layer.config.d_model, device=DEVICE)
    with torch.no_grad():
        want, state = block(h)
        found, new = adapted(h)
        assert identical([found, *new], [want, *state])
        found, want = adapted(h[:, :1], new)[0], block(h[:, :1], state)[0]
        assert relative_error(found, want) <= 1e-2


@needs_kernels
def test_kernel_block_decodes_whichever_parameter_is_trained():
    layer, _ = kernel_layer(torch.float32)
    block = mamba2.Mamba2Block(layer.config).to(DEVICE).requires_grad_(False)
    h = torch.randn(1, 1, layer.config.d_model, device=DEVICE)
    _, state = block(h)
    for parameter in block.parameters():
        parameter.requires_grad_(True)
        found = [block(h, state)[0], without_kernels(block, h, state)[0]]
        gradients = [torch.autograd.grad(y.sum(), parameter)[0] for y in found]
        assert relative_error(*gradients) <= 1e-4
        parameter.requires_grad_(False)


class Scaled(torch.Tensor):
    """Eighths, kept as integers: at its address are none of its numbers."""

    @staticmethod
    def __new__(cls, eighths):
        layout = dict(strides=eighths.stride(), dtype=torch.float32, device=eighths.device)
        return torch.Tensor._make_wrapper_subclass(cls, eighths.shape, **layout)

    def __init__(self, eighths):
        self.eighths = eighths

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].eighths)
        args = torch.utils._pytree.tree_map_only(cls, lambda t: t.eighths / 8, args)
        return function(*args, **(kwargs or {}))


@needs_kernels
@torch.no_grad()
def test_kernel_leaves_numbers_that_lie_elsewhere_to_its_twin():
    layer, _ = kernel_layer(torch.float32)
    block = mamba2.Mamba2Block(layer.config).to(DEVICE)
    h = torch.randn(1, 1, layer.config.d_model, device=DEVICE)
    _, state = block(h)
    eighths = (8 * torch.randn_like(block.mixer.in_proj.weight)).round()
    block.mixer.in_proj.weight = nn.Parameter(Scaled(eighths.to(torch.int8)), requires_grad=False)
    wrapped = block(h, state)[0]
    block.mixer.in_proj.weight = nn.Parameter(eighths / 8)
    assert relative_error(wrapped, block(h, state)[0]) <= 1e-5

    x, w = torch.randn(3, 32, device=DEVICE), torch.randn(32, device=DEVICE)
    negated = torch.complex(x, -x).conj().imag  # a sign that is applied when it is read
    assert negated.is_neg() and torch.equal(negated, x)
    found = mamba2.rms_norm(negated, w, 1e-5)
    assert relative_error(found, mamba2.rms_norm(x, w, 1e-5)) <= 1e-6


@needs_kernels
def test_kernel_gradients_may_be_lazily_negated_or_lie_elsewhere():
    x, w = torch.randn(2, 7, 16, device=DEVICE), torch.randn(16, 4, device=DEVICE)
    middle, static = kernel_middle_inputs(torch.float32, 7, features="state")
    operations = mamba2.kernels.ssd, mamba2.kernels.causal_conv1d, mamba2.kernels.layer_middle
    norm = lambda **given: mamba2.kernels.rms_norm(**given, eps=1e-5)
    for operation, inputs in (
        (operations[0], kernel_ssd_inputs(torch.float32, 7, p=16, n=16, state=True)),
        (operations[1], dict(x=x, weight=w)),
        (functools.partial(operations[2], **static), middle),
        (norm, dict(x=x, weight=w[:, 0].clone(), gate=x + 1)),
    ):
        outputs = operation(**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        eighths = [(8 * torch.randn_like(output)).round() for output in outputs]
        want = run_with_gradients(operation, inputs, [e / 8 for e in eighths])
        negated = [torch.complex(e / 8, -e / 8).conj().imag for e in eighths]
        assert all(gradient.is_neg() for gradient in negated)
        scaled = [Scaled(e.to(torch.int8)) for e in eighths]
        for kind in (negated, scaled):
            for _ in range(2):
                assert identical(run_with_gradients(operation, inputs, kind), want)


@needs_kernels
@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels are right in bfloat16")
def test_kernel_in_the_interpreter_leaves_bfloat16_to_plain_pytorch(monkeypatch):
    layer, exact = kernel_layer(torch.bfloat16)
    u = torch.randn(2, 40, layer.config.d_model, device=DEVICE).bfloat16()
    weight = layer.conv1d.weight.squeeze(1)
    with counted(monkeypatch) as ran:
        y, state = layer.step(u)
        gradient = torch.autograd.grad(y.float().square().sum(), layer.in_proj.weight)[0]
        with torch.no_grad():
            token, _ = layer.step(u[:, :1], state)
            block = mamba2.Mamba2Block(layer.config).to(DEVICE, torch.bfloat16)
            block(u[:1, :1].float(), Mamba2State(*(t[:1] for t in state)))
            mamba2.causal_conv1d(u.repeat(1, 1, 8)[..., : len(weight)], weight)
    assert set(ran) == {"refused"}
    want, exact_state = exact.step(u.double())
    want_gradient = torch.autograd.grad(want.square().sum(), exact.in_proj.weight)[0]
    assert relative_error(y, want) <= 2e-2 and relative_error(gradient, want_gradient) <= 4e-2
    assert relative_error(token, exact.step(u[:, :1].double(), exact_state)[0]) <= 3e-2


# NaN as GPUs make it: all bits but the sign. Rounding it must not carry into the sign.
NAN = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)


def assert_nan_is_not_swallowed(found, due):
    for key, values in due.items():
        assert not (values.isnan() & ~found[key].isnan()).any(), key


def assert_nan_is_not_spread(found, allowed):
    for i, (f, a) in enumerate(zip(found, allowed, strict=True)):
        assert not (f.isnan() & ~a.isnan()).any(), f"output {i}"


@needs_kernels
@pytest.mark.parametrize("name", ["dt", "A", "x", "B", "C", "D", "initial_state"])
@pytest.mark.parametrize("dtype", SSD_DTYPES, ids=str)
def test_kernel_ssd_is_nan_where_its_twin_is(dtype, name):
    """NaN is due where the recurrence has it; its twin, in chunks, spreads it further."""
    l, sizes = 150 if CUDA else 40, dict(b=1, h=4, g=2, p=16, n=16)
    inputs = kernel_ssd_inputs(dtype, l, state=True, **sizes)
    tensor = inputs[name] = inputs[name].clone()
    tensor[(0, 9 if name in ("dt", "x", "B", "C") else 0, 0, 0)[: tensor.dim()]] = NAN
    cotangents = [torch.randn_like(inputs["x"]), torch.randn_like(inputs["initial_state"])]
    due = run_with_gradients(ssd_recurrent, inputs, cotangents)
    assert due["output 0"].isnan().any() and not due["output 0"].isnan().all()
    found = run_with_gradients(mamba2.kernels.ssd, inputs, cotangents)
    assert_nan_is_not_swallowed(found, due)
    for seq_idx in (None, (torch.arange(l, device=DEVICE) >= l // 2)[None].long()):
        inputs["seq_idx"] = seq_idx
        found = mamba2.kernels.ssd(**inputs)
        assert_nan_is_not_spread(found, without_kernels(mamba2.ssd, **inputs))


@needs_kernels
@pytest.mark.parametrize("name", ["dt_bias", "A_log", "D", "norm_weight", "zxbcdt", "ssm"])
@pytest.mark.parametrize("dtype", SSD_DTYPES, ids=str)
def test_kernel_middle_and_step_are_nan_where_the_layer_is(dtype, name):
    """Each head is a group, so that NaN in one does not reach the other by way of the norm."""
    for l in (1, 70 if CUDA else 35):
        inputs, static = kernel_middle_inputs(dtype, l, b=1, h=2, g=2, features="state limit")
        tensor = inputs[name] = inputs[name].clone()
        tensor[(0, 0, -1) if name == "zxbcdt" else 0] = NAN  # of the last head's step
        out = torch.randn(1, l, len(inputs["norm_weight"]), device=DEVICE)
        cotangents = out, torch.randn_like(inputs["conv"]), torch.randn_like(inputs["ssm"])
        given = inputs, cotangents
        plain = without_kernels(run_with_gradients, layer_middle, *given, **static)
        assert any(values.isnan().any() for values in plain.values())
        with torch.no_grad():  # one position is a step, which has no gradients
            found = mamba2.kernels.layer_middle(**inputs, **static)
        assert_nan_is_not_spread(found, [plain[f"output {i}"] for i in range(3)])
        if l > 1:
            found = run_with_gradients(mamba2.kernels.layer_middle, *given, **static)
        else:
            plain = {f"output {i}": plain[f"output {i}"] for i in range(3)}
            found = dict(zip(plain, found, strict=True))
        assert_nan_is_not_swallowed(found, plain)


@needs_kernels
def test_kernel_ssd_takes_a_decay_of_zero_at_once():
    """A = -inf: nothing is left of the state after one step, but all after the last position."""
    inputs = kernel_ssd_inputs(torch.float32, 40, p=16, n=16, state=True)
    inputs["A"][0] = -torch.inf
    draws = torch.randn_like(inputs["x"]), torch.randn_like(inputs["initial_state"])
    found = run_with_gradients(mamba2.kernels.ssd, inputs, draws)
    want = run_with_gradients(ssd_recurrent, inputs, draws)
    for key in want.keys() - {"d A", "d dt"}:  # which are multiples of A, or 0 · A
        assert relative_error(found[key], want[key]) <= 1e-5, key


@needs_kernels
def test_kernel_ssd_is_right_where_a_state_grows_by_two_to_the_110_in_a_chunk():
    inputs = kernel_ssd_inputs(torch.float32, 31, h=2, state=True)
    inputs |= dict(dt=torch.full_like(inputs["dt"], 2.5), A=torch.tensor([1.0, -1], device=DEVICE))
    # Exponents of 110, of 24 bits, are right to 2^-17, and so are powers of 2 to 2^-17.5.
    assert_kernel_right("ssd", inputs, 3e-5, "growth")


@needs_kernels
@pytest.mark.parametrize("dtype", SSD_DTYPES, ids=str)
def test_kernel_ssd_takes_a_step_below_zero_for_nan(dtype):
    inputs = kernel_ssd_inputs(dtype, 70, state=True)
    draws = torch.randn_like(inputs["x"]), torch.randn_like(inputs["initial_state"])
    results = []
    for value in (-0.05, torch.nan):
        dt = inputs["dt"].clone()
        dt[0, 20, 0] = value
        results.append(run_with_gradients(mamba2.kernels.ssd, inputs | dict(dt=dt), draws))
    found, want = results
    assert want["output 0"][0, 20:, 0].isnan().all() and want["output 1"][0, 0].isnan().all()
    assert want["output 0"].isnan().sum() == want["output 0"][0, 20:, 0].numel()
    for key in want:
        assert torch.equal(found[key].nan_to_num(7), want[key].nan_to_num(7)), key


@needs_kernels
def test_kernel_steps_aside_for_what_has_to_see_every_operation():
    ad = torch.autograd.forward_ad
    layer, _ = kernel_layer(torch.float32)
    layer.requires_grad_(False)
    w, options = torch.randn(32, device=DEVICE), layer.config.d_model
    given = {"norm": (3, 32), "layer": (1, 5, options), "step": (1, 1, options)}
    state = layer.step(torch.randn(1, 3, options, device=DEVICE))[1]
    calls = {
        "norm": lambda x: mamba2.rms_norm(x, w, 1e-5),
        "layer": layer,
        "step": lambda x: layer.step(x, state)[0],
    }
    for name, call in calls.items():
        x = torch.randn(given[name], device=DEVICE)
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients), ad.dual_level():
                dual = ad.make_dual(x, torch.ones_like(x))
                found = ad.unpack_dual(call(dual)).tangent
                want = ad.unpack_dual(without_kernels(call, dual)).tangent
                assert relative_error(found, want) <= 1e-5


@needs_kernels
@torch.no_grad()
def test_kernel_is_one_operation_for_modes_that_watch():
    x, w, seen = torch.randn(3, 32, device=DEVICE), torch.ones(32, device=DEVICE), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    for _ in range(2):  # recorded, and replayed
        mamba2.rms_norm(x, w, 1e-5)
        seen.clear()
        with Watch():
            mamba2.rms_norm(x, w, 1e-5)
        assert "rms_norm" in seen[0]


@needs_kernels
@torch.no_grad()
def test_kernel_sees_hooks_of_all_modules():
    layer, _ = kernel_layer(HALF)
    block = mamba2.Mamba2Block(layer.config).to(DEVICE, HALF)
    h, seen = torch.randn(1, 3, layer.config.d_model, device=DEVICE), []
    _, state = block(h)
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        for given in ((h,), (h[:, :1], state)):
            seen.clear()
            block(*given)
            assert set(seen) == set(block.modules())
    finally:
        handle.remove()


@needs_kernels
def test_kernel_call_with_one_tensor_twice_does_not_stop_others_from_being_replayed():
    x, w, replays = torch.randn(3, 32, device=DEVICE), torch.ones(32, device=DEVICE), []
    mamba2.kernels._replays.clear()
    with torch.no_grad():
        twice = mamba2.rms_norm(x, w, 1e-5, gate=x)
        for _ in range(2):
            assert torch.equal(mamba2.rms_norm(x, w, 1e-5, gate=x.clone()), twice)
        replays = [*mamba2.kernels._replays.values()]
    assert len(replays) == 1 and replays[0]


@needs_kernels
def test_kernel_call_within_another_leaves_both_right(monkeypatch):
    """As from a signal handler or a finaliser, which run wherever Python happens to be."""
    inputs, static = kernel_middle_inputs(torch.float32, 20, b=1, h=4, features="state")
    x, w = torch.randn(3, 32, device=DEVICE), torch.randn(32, device=DEVICE)
    kernels, launch, calls = mamba2.kernels, mamba2.kernels._launch, []
    cotangents = [torch.ones_like(t) for t in kernels.layer_middle(**inputs, **static)]

    def interrupted(*given):
        launch(*given)
        calls.append(given)
        if len(calls) == at:
            inner.append(kernels.rms_norm(x, w, 1e-5))

    run = lambda: run_with_gradients(kernels.layer_middle, inputs, cotangents, **static)
    want, normed = run(), kernels.rms_norm(x, w, 1e-5)
    monkeypatch.setattr(kernels, "_launch", interrupted)
    for at in (2, 5):  # after one of the launches, of which three are forward, four backward
        monkeypatch.setattr(kernels, "_replays", {})
        calls, inner = [None] * at, []
        if at % 2:
            kernels.rms_norm(x, w, 1e-5)  # so that the one within is replayed
        calls.clear()
        for _ in range(3):
            with poisoned():
                assert identical(run(), want)
        assert len(inner) == 1 and torch.equal(inner[0], normed)
        assert len(kernels._replays) >= 3 and all(kernels._replays.values())


@needs_kernels
def test_kernel_of_the_convolution_takes_what_a_hook_of_saved_tensors_returns():
    x, w = torch.randn(1, 9, 16, device=DEVICE), torch.randn(16, 4, device=DEVICE)

    def gradients():
        leaves = x.detach().requires_grad_(), w.detach().requires_grad_()
        y = mamba2.causal_conv1d(*leaves)[0]
        return torch.autograd.grad(y.square().sum(), leaves)

    def pack(tensor):
        return tensor.transpose(-1, -2).contiguous() if tensor.dim() == 3 else tensor

    def unpack(tensor):
        return tensor.transpose(-1, -2) if tensor.dim() == 3 else tensor

    want = gradients()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        assert identical(gradients(), want)


@needs_kernels
@needs_cuda
def test_kernel_step_decodes_in_a_cuda_graph_with_the_bits_of_the_layer():
    layer, _ = kernel_layer(torch.bfloat16)
    us = torch.randn(5, 2, 1, layer.config.d_model, device=DEVICE, dtype=torch.bfloat16)
    weights = (layer.conv1d.weight, layer.conv1d.bias, layer.dt_bias, layer.A_log, layer.D)
    with torch.no_grad():
        _, state = layer.step(us[0])
        state = Mamba2State(state.conv, state.ssm.bfloat16())
        static, conv, ssm = us[0].clone(), state.conv.clone(), state.ssm.clone()

        def step():
            z, xBC, dt = layer.in_proj(static).split(layer.widths, dim=-1)
            out = torch.empty_like(conv), ssm
            y, new_conv, _ = mamba2.kernels.layer_step(xBC, dt, conv, ssm, *weights, out=out)
            conv.copy_(new_conv)
            return layer.out_proj(layer.norm(y, gate=z))

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = step()
        conv.copy_(state.conv)
        ssm.copy_(state.ssm)
        for u in us:
            static.copy_(u)
            graph.replay()
            want, state = layer.step(u, state)
            assert identical((y, conv, ssm), (want, *state))


@needs_kernels
@pytest.mark.parametrize("dtype", SSD_DTYPES, ids=str)
def test_kernel_results_have_the_same_bits_twice(dtype):
    l = 200 if CUDA else 70
    inputs = kernel_ssd_inputs(dtype, l, h=4, g=2, state=True, seq=True, sliced=True)
    x, gate = torch.randn(2, 2, 150 if CUDA else 20, 96, device=DEVICE).to(dtype)
    weight = torch.randn(96, 4, device=DEVICE)

    middle, static = kernel_middle_inputs(dtype, l, h=4, g=2, features="state seq")
    out = torch.randn_like(middle["zxbcdt"][..., : len(middle["norm_weight"])])

    def everything():
        torch.manual_seed(2)
        draws = torch.randn(3, *inputs["x"].shape, device=DEVICE)
        runs = [
            ("ssd", inputs, [draws[0], torch.randn_like(inputs["initial_state"])], {}),
            ("causal_conv1d", dict(x=x, weight=weight), [gate, x[:, :3]], {}),
            ("rms_norm", dict(x=x, gate=gate, weight=weight[:, 0]), [gate], dict(eps=1e-5)),
            ("rms_norm", dict(x=x, weight=weight[:, 0]), [gate], dict(eps=1e-5)),
            ("layer_middle", middle, [out, middle["conv"], middle["ssm"]], static),
        ]
        return [
            run_with_gradients(getattr(mamba2.kernels, name), given, cotangents, **static)
            for name, given, cotangents, static in runs
        ]

    assert identical(everything(), everything())


@needs_kernels
@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch before 2.9"
)
def test_kernels_run_whichever_switch_of_tf32_is_set():
    inputs, x = kernel_ssd_inputs(torch.float32, 40, p=16, n=16), torch.randn(2, 64, device=DEVICE)
    switch = torch.backends.cuda.matmul
    before, switch.fp32_precision = switch.fp32_precision, "tf32"  # allow_tf32 raises now
    try:
        y, _ = mamba2.kernels.ssd(**inputs)
        normed = mamba2.kernels.rms_norm(x, x[0], 1e-5)
    finally:
        switch.fp32_precision = before
    assert relative_error(y, ssd_recurrent(**inputs)[0]) <= 1e-2
    assert normed.isfinite().all()


@needs_kernels
def test_kernel_calls_that_are_replayed_have_the_bits_of_first_calls(monkeypatch):
    dtype, l = (torch.bfloat16, 200) if CUDA else (torch.float32, 40)
    x, gate = torch.randn(2, 2, 20, 96, device=DEVICE)
    draw = functools.partial(kernel_ssd_inputs, dtype, l)
    middle, options = kernel_middle_inputs(dtype, l, h=4, g=2, features="state seq limit")
    replays = {}
    monkeypatch.setattr(mamba2.kernels, "_replays", replays)

    def run(name, inputs, static):
        operation = getattr(mamba2.kernels, name)
        with torch.no_grad():
            alone = tensors(operation(**inputs, **static))
        cotangents = [torch.ones_like(output) for output in alone]
        return [*alone, *run_with_gradients(operation, inputs, cotangents, **static).values()]

    for name, inputs, static in (
        ("ssd", draw(h=4, g=2, state=True, seq=True, sliced=True), {}),
        ("ssd", draw(sliced="odd"), {}),  # what is copied first cannot be replayed
        ("causal_conv1d", dict(x=x, weight=torch.randn(96, 4, device=DEVICE)), {}),
        ("rms_norm", dict(x=x, gate=gate, weight=x[0, 0].clone()), dict(eps=1e-5)),
        ("layer_middle", middle, options),
    ):
        replays.clear()
        run(name, inputs, static)
        kinds = len(replays)
        for tensor in tensors(inputs):
            if tensor.is_floating_point():
                tensor.mul_(1 + torch.rand(tensor.shape, device=DEVICE).to(tensor.dtype))
        found = run(name, inputs, static)
        assert len(replays) == kinds, f"{name}: of another kind"
        replays.clear()
        assert identical(found, run(name, inputs, static)), name

    others = draw(p=16, n=16, h=2, g=2, state=True)
    one = others | dict(B=others["x"], C=others["x"])  # which of them is it that a kernel reads?
    replays.clear()
    run("ssd", one, {})
    found = run("ssd", others, {})
    replays.clear()
    assert identical(found, run("ssd", others, {}))


@needs_kernels
def test_kernel_layer_is_captured_whole_by_torch_compile(monkeypatch):
    layer, _ = kernel_layer(HALF if CUDA else torch.float32)
    l = 200 if CUDA else 40
    u = torch.randn(2, l, layer.config.d_model, device=DEVICE, dtype=layer.D.dtype)
    seq_idx = (torch.arange(l, device=DEVICE) >= 2 * l // 3).int().expand(2, l)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    def everything(step):
        leaf = u.detach().requires_grad_()
        y, state = step(leaf, None, None, seq_idx)
        loss = y.float().square().sum() + state.ssm.sum() + state.conv.float().sum()
        return [y, *state, *torch.autograd.grad(loss, [leaf, *layer.parameters()])]

    torch._dynamo.reset()
    found = everything(torch.compile(layer.step, fullgraph=True, backend=backend))
    assert len(graphs) == 1
    assert sum(f"{mamba2.kernels.NAMESPACE}.layer_middle" in target for target in graphs[0]) == 1
    for f, e in zip(found, everything(layer.step), strict=True):
        assert relative_error(f, e) <= (1e-2 if CUDA else 1e-6)


@needs_kernels
@needs_cuda
def test_kernel_layer_is_captured_in_a_cuda_graph_and_replayed_on_other_input():
    layer, _ = kernel_layer(torch.bfloat16)
    static = torch.randn(2, 300, layer.config.d_model, device=DEVICE, dtype=torch.bfloat16)

    def everything():
        leaf = static.detach().requires_grad_()
        y, state = layer.step(leaf)
        loss = y.float().square().sum() + state.ssm.sum() + state.conv.float().sum()
        return [y, *state, *torch.autograd.grad(loss, [leaf, *layer.parameters()])]

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


# What is not meant for kernels, or does not fit; of it nothing is said.
KERNEL_SILENT = {
    "float64": lambda i: {k: t.double() for k, t in i.items()},
    "on no device": lambda i: {k: t.to("meta") for k, t in i.items()},
    "no positions": lambda i: i | {k: i[k][:, :0] for k in ("x", "dt", "B", "C")},
    "no rows": lambda i: i | {k: i[k][:0] for k in ("x", "dt", "B", "C", "initial_state")},
    "x flat": lambda i: i | dict(x=i["x"].flatten(2)),
    "x a number": lambda i: i | dict(x=1.0),
    "no B": lambda i: i | dict(B=None),
    "C of another length": lambda i: i | dict(C=i["C"][:, 1:]),
    "groups that do not divide": lambda i: i | {k: i[k].repeat(1, 1, 2, 1) for k in "BC"},
    "no groups": lambda i: i | {k: i[k][:, :, :0] for k in "BC"},
    "D of other heads": lambda i: i | dict(D=i["D"][1:]),
    "D a number": lambda i: i | dict(D=i["D"][0]),
    "labels that are not integers": lambda i: i | dict(seq_idx=i["dt"][:, :, 0]),
    "A a list": lambda i: i | dict(A=[1.0]),
    "B of integers": lambda i: i | dict(B=i["B"].int()),
}
# And of which a user hears, because it costs time.
KERNEL_LOUD = {
    "headdim is 12": lambda i: i | dict(x=i["x"][..., :12], initial_state=None),
    "d_state is 10": lambda i: i | {k: i[k][..., :10] for k in ("B", "C", "initial_state")},
    "one dtype": lambda i: i | dict(B=i["B"].to(HALF)),
    "seq_idx is torch.int16": lambda i: i | dict(seq_idx=(i["dt"][:, :, 0] < 0.01).short()),
}


@needs_kernels
@pytest.mark.parametrize("case", KERNEL_SILENT)
def test_kernel_ssd_leaves_to_its_twin_without_a_word(case):
    inputs = kernel_ssd_inputs(torch.float32, 5, p=16, n=16, state=True)
    del inputs["seq_idx"]
    assert mamba2.kernels.takes_ssd(**inputs)
    changed = KERNEL_SILENT[case](inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mamba2.kernels.takes_ssd(**changed) is False
    with pytest.raises(ValueError, match=r"kernels\.ssd: .*; mamba2\.ssd"):
        mamba2.kernels.ssd(**changed)


@needs_kernels
@pytest.mark.parametrize("case", KERNEL_LOUD)
def test_kernel_ssd_leaves_to_its_twin_with_one_warning(case, monkeypatch):
    monkeypatch.setattr(mamba2.kernels, "_said", set())
    inputs = kernel_ssd_inputs(torch.float32, 40, p=16, n=16, state=True)
    inputs = KERNEL_LOUD[case](inputs)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            found = mamba2.ssd(**inputs)
    told = [str(w.message) for w in said if "plain PyTorch runs" in str(w.message)]
    assert len(told) == 1 and case in told[0]
    with pytest.raises(ValueError, match=case):
        mamba2.kernels.ssd(**inputs)
    exact = {k: t.double() if t is not None and k != "seq_idx" else t for k, t in inputs.items()}
    for f, e in zip(found, mamba2.ssd(**exact), strict=True):
        assert relative_error(f, e) <= 1e-6


@needs_kernels
def test_kernels_of_convolution_and_norm_leave_the_same_to_their_twins(monkeypatch):
    monkeypatch.setattr(mamba2.kernels, "_said", set())
    x, weight = torch.randn(2, 5, 8, device=DEVICE), torch.randn(8, 4, device=DEVICE)
    conv, norm = mamba2.kernels.takes_causal_conv1d, mamba2.kernels.takes_rms_norm
    w = weight[:, 0]
    assert conv(x, weight) and norm(x, w, 1e-5, gate=x) and norm(x, w, 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for refused in (
            conv(x.double(), weight),
            conv(x.to("meta"), weight.to("meta")),
            conv(x[:, :0], weight),
            conv(x[0], weight),
            conv(x, w),
            conv(x, weight[1:]),
            conv(x, weight, w[1:]),
            conv(x, weight, initial_state=x),
            conv(x, weight, seq_idx=x[..., 0]),
            conv(None, weight),
            norm(x, None, 1e-5),
            norm(x.double(), w, 1e-5, gate=x),
            norm(x, w, 1e-5, gate=x[:1]),
            norm(x, w[1:], 1e-5, gate=x),
            norm(x, w, 1e-5, gate=x, groups=3),
            norm(x, w, 1e-5, gate=x, groups=0),
            norm(x, w, w[0], gate=x),
            norm(x[:0], w, 1e-5, gate=x[:0]),
            norm(w[0], w, 1e-5, gate=w[0]),
        ):
            assert refused is False
    wide = torch.randn(2, 1, 8200, device=DEVICE)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert not conv(x, torch.randn(8, 5, device=DEVICE))
            assert not conv(x.mT, torch.randn(5, 4, device=DEVICE))
            assert not norm(wide, wide[0, 0], 1e-5, gate=wide)
            assert norm(wide, wide[0, 0], 1e-5, gate=wide, groups=2)
    assert len(said) == 3
    for warning, part in zip(said, ("5 taps", "channels of x", "8200 channels"), strict=True):
        assert part in str(warning.message)
    for refuse in (
        lambda: mamba2.kernels.causal_conv1d(x, torch.randn(8, 5, device=DEVICE)),
        lambda: mamba2.kernels.rms_norm(wide, wide[0, 0], 1e-5),
    ):
        with pytest.raises(ValueError, match="takes any tensors"):
            refuse()


@needs_kernels
def test_kernels_leave_a_layer_to_its_twins_in_transforms_of_torch_func(monkeypatch):
    layer, _ = kernel_layer(torch.float32)
    u = torch.randn(2, 5, layer.config.d_model, device=DEVICE)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (u,)).square().sum()

    with counted(monkeypatch) as ran:
        found = torch.func.grad(loss)(parameters)
    want = torch.autograd.grad(layer(u).square().sum(), list(layer.parameters()))
    assert set(ran) == {"refused"}
    for f, w in zip(found.values(), want, strict=True):  # A's are sums of terms that cancel
        assert relative_error(f, w) <= 1e-4


@needs_kernels
def test_kernels_that_are_executed_again_leave_those_of_before_alone():
    spec = importlib.util.spec_from_file_location("again", mamba2.kernels.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    inputs = kernel_ssd_inputs(torch.float32, 40, p=16, n=16, state=True)
    expected = mamba2.kernels.ssd(**inputs)
    assert identical(again.ssd(**inputs), expected)
    again._replays.clear()
    del again._prepare  # now the second one's operations fail, whose names are its own
    for module in (again, mamba2.kernels):
        torch._dynamo.reset()
        for run in (module.ssd, torch.compile(module.ssd, fullgraph=True, backend="aot_eager")):
            if module is again:
                with pytest.raises(NameError, match="_prepare"):
                    run(**inputs)
            else:
                assert identical(run(**inputs), expected)


@needs_kernels
@needs_cuda
def test_kernel_layer_in_autocast_is_the_layer_in_float64(monkeypatch):
    layer, exact = kernel_layer(torch.float32)
    u = torch.randn(2, 300, layer.config.d_model, device=DEVICE)
    with counted(monkeypatch) as ran, torch.autocast("cuda", torch.bfloat16):
        y = layer(u)
    assert ran == ["layer_middle"] and y.dtype == torch.bfloat16
    gradient = torch.autograd.grad(y.float().square().sum(), layer.in_proj.weight)[0]
    want = exact(u.double())
    want_gradient = torch.autograd.grad(want.square().sum(), exact.in_proj.weight)[0]
    assert relative_error(y, want) <= 2e-2 and relative_error(gradient, want_gradient) <= 4e-2


@needs_kernels
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernel_runs_on_the_gpu_of_its_tensors():
    inputs = kernel_ssd_inputs(torch.bfloat16, 200, state=True, seq=True)
    expected = run_with_gradients(mamba2.kernels.ssd, inputs, [inputs["x"], None])
    inputs = {k: t.to("cuda:1") for k, t in inputs.items()}
    found = run_with_gradients(mamba2.kernels.ssd, inputs, [inputs["x"], None])
    assert all(t.device == torch.device("cuda:1") for t in found.values())
    assert identical({k: t.to(DEVICE) for k, t in found.items()}, expected)


@needs_kernels
@needs_cuda
def test_kernels_reach_beyond_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 45 * 2**30:
        pytest.skip("needs 45 GB of free memory")
    torch.cuda.empty_cache()
    bf16, end = dict(device=DEVICE, dtype=torch.bfloat16), slice(-60, None)

    def assert_same_end(big, name, inputs, cotangents, pick, **static):
        """The end of the big results is what float64 gives for the end of the inputs."""
        inputs = {k: pick(t).cpu().double() for k, t in inputs.items()}
        exact = run_with_gradients(getattr(mamba2, name), inputs, cotangents, **static)
        for key, t in big.items():
            found, want = t[:, end], exact[key][:, end]
            assert relative_error(found, want) <= 1e-2, (name, key)

    l, d = 420_000, 5376  # 2.26e9 elements, 4.5 GB each
    x, weight = torch.randn(1, l, d, **bf16), torch.randn(d, 4, device=DEVICE)
    last = lambda t: t[:, -70:] if t.ndim == 3 else t
    with torch.no_grad():
        y, _ = mamba2.kernels.causal_conv1d(x, weight)
    big = run_with_gradients(mamba2.kernels.causal_conv1d, dict(x=x, weight=weight), [y, None])
    big = {k: last(big[k]).clone() for k in ("output 0", "d x")}
    inputs = dict(x=x, weight=weight)
    assert_same_end(big, "causal_conv1d", inputs, [last(y).cpu(), None], last)

    inputs = dict(x=y, gate=x, weight=weight[:, 0])
    big = run_with_gradients(mamba2.kernels.rms_norm, inputs, [y], eps=1e-5)
    big = {k: last(big[k]).clone() for k in ("output 0", "d x", "d gate")}
    assert_same_end(big, "rms_norm", inputs, [last(y).cpu()], last, eps=1e-5)
    del x, y, inputs, big

    # The states at the borders of SSD's chunks: 2.7e9 elements. All but the last row is ballast.
    inputs = kernel_ssd_inputs(torch.bfloat16, 32768, b=8, h=80, sliced=True)
    inputs = {k: t for k, t in inputs.items() if t is not None}
    dy = torch.randn(inputs["x"].shape, **bf16)
    big = run_with_gradients(mamba2.kernels.ssd, inputs, [dy, None])
    one = {k: t[7:] if t.ndim > 2 else t for k, t in inputs.items()}
    alone = run_with_gradients(mamba2.kernels.ssd, one, [dy[7:], None])
    for key in ("output 0", "output 1", "d x", "d dt", "d B", "d C"):
        assert relative_error(big[key][7:], alone[key]) <= 1e-2, key
    del inputs, dy, big, one, alone

    # The projection of a layer, and its gradient: 2.2e9 elements.
    inputs, static = kernel_middle_inputs(torch.bfloat16, 26_000, b=8, h=80)
    dout = torch.randn(8, 26_000, 80 * 64, **bf16)
    big = run_with_gradients(mamba2.kernels.layer_middle, inputs, [dout, None, None], **static)
    one = inputs | dict(zxbcdt=inputs["zxbcdt"][7:])
    alone = run_with_gradients(mamba2.kernels.layer_middle, one, [dout[7:], None, None], **static)
    for key in ("output 0", "output 1", "output 2", "d zxbcdt"):
        assert relative_error(big[key][7:], alone[key]) <= 1e-2, key


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the kernels run in this process")
def test_the_kernels_pass_in_the_interpreter():
    if not getattr(mamba2.kernels, "TRITON", False):
        pytest.skip("Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_kernel"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*command, str(Path(__file__))], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed == PASSED_IN_THE_INTERPRETER, done.stdout[-500:]


# --------------------------------------------------------------------------------------------------
# Benchmark: `python test_mamba2.py` compares with transformers' own Mamba-2, in plain PyTorch
# --------------------------------------------------------------------------------------------------


def milliseconds(functions, repeats=7):
    """Median time of each function; they alternate, so that noise meets all of them."""
    times = [[] for _ in functions]
    for _ in range(repeats + 1):  # the first is for warming up
        for function, record in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            record.append(1e3 * (time.perf_counter() - start))
    return [sorted(record[1:])[repeats // 2] for record in times]


def report(name, theirs, ours, unit="ms"):
    ratio = f"{theirs / ours:.2f} to 1"
    print(f"{name:48} {theirs:8.1f} {ours:8.1f} {unit:3} {ratio:>12}", flush=True)


def benchmark():
    from transformers.models.mamba2 import modeling_mamba2 as their

    torch.manual_seed(0)
    torch.set_num_threads(2)
    print("shapes of mamba2-130m, float32, 2 threads, medians   transformers     ours", flush=True)

    b, l, h, p, g, n = 1, 2048, 24, 64, 1, 128
    inputs = [torch.randn(b, l, h, p), 0.1 * torch.rand(b, l, h), -16 * torch.rand(h)]
    inputs += [torch.randn(b, l, g, n), torch.randn(b, l, g, n)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    layer = Mamba2(d_model=768)
    config = dict(hidden_size=768, num_heads=h, n_groups=g, vocab_size=50288)
    their_layer = their.Mamba2Mixer(transformers.Mamba2Config(**config), layer_idx=0)
    u = torch.randn(b, l, 768, requires_grad=True)

    def without_gradients(function):
        return torch.no_grad()(function)

    def with_gradients(function):
        return lambda: sum(tensor.sum() for tensor in tensors(function())).backward()

    def their_ssd():
        name = "mamba2_chunk_scan"  # since transformers 5.21; a method of the layer before
        return getattr(their, name)(*inputs, chunk_size=256, return_final_states=True)

    for what, theirs, ours in (
        (f"SSD, {l} positions", their_ssd, lambda: ssd(*inputs)),
        (f"layer, {l} positions", lambda: their_layer(u), lambda: layer(u)),
    ):
        for how, mode in (("forward", without_gradients), ("+ backward", with_gradients)):
            pair = mode(theirs), mode(ours)
            report(f"{what}: {how}", *milliseconds(pair))
            peaks = []
            for function in pair:
                with Bytes() as watch:
                    function()
                peaks.append(watch.peak / 2**20)
            report("    peak memory beside the inputs", *peaks, unit="MiB")

    model = Mamba2ForCausalLM(Mamba2Config()).eval()
    their_config = transformers.Mamba2Config(
        **config, num_hidden_layers=24, tie_word_embeddings=True
    )
    their_model = transformers.Mamba2ForCausalLM(their_config).eval()
    with torch.no_grad():
        token = torch.tensor([[17]])
        cache = model(token, use_cache=True).past_key_values
        their_cache = their_model(token, use_cache=True)[THEIR_CACHE]
        theirs, ours = (
            lambda: their_model(token, **{THEIR_CACHE: their_cache}),
            lambda: model(token, past_key_values=cache),
        )
        report("decoding a token, 24 layers", *milliseconds((theirs, ours), repeats=21))
        torch._inductor.config.freezing = True  # packs the weights for the CPU
        compiled = torch.compile(model)
        frozen = lambda: compiled(token, past_key_values=cache)  # noqa: E731
        report("    the same, ours compiled", *milliseconds((theirs, frozen), repeats=21))

    print("\nours, a token after a context of ...        ms   MB of state")
    layers = Mamba2ForCausalLM(Mamba2Config(n_layer=2, vocab_size=256)).eval()
    cache, seen, steps, sizes = None, 0, [], []
    contexts = [100, 1_000, 10_000, 100_000]
    with torch.no_grad():
        for context in contexts:
            for piece in torch.randint(256, (1, context - seen)).split(4096, dim=1):
                cache = layers(piece, past_key_values=cache, logits_to_keep=1).past_key_values
            seen = context
            sizes.append(cache.nbytes / 1e6)
            steps.append(functools.partial(layers, token, past_key_values=cache))
        for row in zip(contexts, milliseconds(steps, repeats=101), sizes, strict=True):
            print("{:>38,} tokens {:6.2f} {:8.2f}".format(*row))


def benchmark_errors():
    """Each form of SSD in each dtype against the recurrence in float64: values and gradients."""
    torch.manual_seed(0)
    b, l, h, p, g, n = 2, 1000, 4, 64, 1, 128
    draw = dict(device=DEVICE, dtype=torch.float64)
    x, B, C = (torch.randn(b, l, *size, **draw) for size in ((h, p), (g, n), (g, n)))
    dt, A = 10 ** (2 * torch.rand(b, l, h, **draw) - 3), -1 - 15 * torch.rand(h, **draw)
    inputs = dict(x=x, dt=dt, A=A, B=B, C=C, D=torch.ones(h, **draw))
    cotangents = [torch.randn_like(x), torch.randn(b, h, p, n, **draw)]
    forms = {form.__name__: form for form in FORMS}
    forms["ssd"] = functools.partial(without_kernels, ssd)
    if CUDA and mamba2.kernels is not None:
        forms["kernels.ssd"] = mamba2.kernels.ssd
    if CUDA and importlib.util.find_spec("mamba_ssm"):
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        forms["mamba_ssm"] = functools.partial(
            mamba_chunk_scan_combined, chunk_size=256, return_final_states=True
        )
    where = torch.cuda.get_device_name() if CUDA else "CPU"
    print(
        f"{where}, torch {torch.__version__}: b {b}, l {l}, h {h}, p {p}, g {g}, n {n}; errors are"
    )
    print("norms of differences over norms; state and sums are float32 at least in every form")
    columns = "y", "state", *(f"d {name}" for name in inputs)
    print(" " * 27, *(f"{column:>8}" for column in columns))
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        # As in a layer: x, B and C in the dtype, and all else in float32 at least. What is compared
        # with has the same rounded inputs.
        high = torch.promote_types(dtype, torch.float32)
        given = {k: t.to(dtype if k in "xBC" else high) for k, t in inputs.items()}
        rounded = [cotangents[0].to(dtype), cotangents[1].to(high)]
        doubles = {k: t.double() for k, t in given.items()}
        exact = run_with_gradients(recurrence, doubles, [t.double() for t in rounded])
        for name, form in forms.items():
            if name not in ("kernels.ssd", "mamba_ssm") or dtype != torch.float64:
                found = run_with_gradients(form, given, rounded)
                errors = [f"{relative_error(found[key], exact[key]):8.1e}" for key in exact]
                print(f"{name:16} {str(dtype)[6:]:10}", *errors, flush=True)


def without_kernels(form, *args, **options):
    kernels, mamba2.kernels = mamba2.kernels, None
    try:
        return form(*args, **options)
    finally:
        mamba2.kernels = kernels


SHAPES = {
    "tiny": dict(d_model=64, n_layer=2, d_state=16, headdim=16, vocab_size=512),
    "130m": dict(d_model=768, n_layer=24),
    "370m": dict(d_model=1024, n_layer=48),
    "780m": dict(d_model=1536, n_layer=48),
    "1.3b": dict(d_model=2048, n_layer=48),
    "2.7b": dict(d_model=2560, n_layer=64),
}


def benchmark_training(shape, lengths, methods):
    """A step of training on one sequence: bfloat16 autocast, float32 weights, fused AdamW."""
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__, "mamba2-" + shape)
    with DEVICE:
        model = Mamba2ForCausalLM(Mamba2Config(**SHAPES[shape])).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-4, fused=True)

    def step(l, segment_length):
        ids = torch.randint(model.config.vocab_size, (1, l), device=DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = model(ids, labels=ids, segment_length=segment_length).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()  # waits for the GPU

    print("   length  segment  layers     peak GB    tokens/s")
    for l in lengths:
        for method in methods:
            segments, layers = {
                "plain": (0, False),
                "layers": (0, True),
                "segments": ("auto", False),
                "both": ("auto", True),
            }[method]
            if layers:
                model.gradient_checkpointing_enable()
            else:
                model.gradient_checkpointing_disable()
            length = model._segment_length(segments, 1, l)
            row = f"{l:9,} {length:8,}  {'again' if layers else 'kept '} "
            try:
                step(min(l, 3 * length), length)  # compiles, reserves memory
                torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                step(l, segments)
                seconds = time.perf_counter() - start
                row += f"{torch.cuda.max_memory_allocated() / 1e9:12.1f} {l / seconds:11,.0f}"
            except torch.OutOfMemoryError:
                optimizer.zero_grad()
                torch.cuda.empty_cache()
                row += "   out of memory"
            print(row, flush=True)


# What ranks share, engine, shape, rows of a rank, length, segment_length of one GPU and on ranks.
PARALLEL = [
    "rows:DDP:130m:8:4096:0:0",
    "rows:FSDP2:2.7b:2:4096:0:0",
    "sequence:DDP:2.7b:1:262144:8192:8192",
]


def benchmark_parallel(cases, steps, checkpoints):
    """Training on all GPUs against one of them: under torchrun, or as a single process."""
    global DEVICE
    alone = dict(store=dist.HashStore(), rank=0, world_size=1)
    given = {} if dist.is_torchelastic_launched() else alone
    if CUDA:
        DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(DEVICE)
    dist.init_process_group("nccl" if CUDA else "gloo", **given)
    rank, world = dist.get_rank(), dist.get_world_size()
    bf16 = torch.bfloat16

    def show(*words):
        if rank == 0:
            print(*words, flush=True)

    def run(kind, engine, shape, b, l, segment):
        """Tokens a second and GPU, the peak of memory, and bytes sent by a layer."""
        torch.manual_seed(0)
        with DEVICE:
            model = Mamba2ForCausalLM(Mamba2Config(**SHAPES[shape])).train()
        if checkpoints:
            model.gradient_checkpointing_enable()
        config, given, part = model.config, {}, l
        if engine == "FSDP2":
            # cast_forward_inputs would round the residual stream and the states of layers.
            options = dict(mp_policy=MixedPrecisionPolicy(bf16, torch.float32, None, False))
        else:
            options = dict(gradient_as_bucket_view=True)
        if engine is not None:
            model = distribute(model, engine, **options)
        if kind == "sequence":
            given = dict(segment_length=segment)
            if engine is not None:
                given["group"], part = dist.group.WORLD, l // world
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-4, fused=True)

        def step():
            ids = torch.randint(config.vocab_size, (b, part), device=DEVICE)
            with torch.autocast(DEVICE.type, bf16, enabled=engine != "FSDP2"):
                loss = model(ids, labels=ids, **given).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()  # waits for the GPU

        with Sent() as sent:
            step()  # compiles, reserves memory
        start = time.perf_counter()
        for _ in range(steps):
            step()
        speed = b * part * steps / (time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else math.nan
        formula = 0
        if "group" in given:
            count = -(-part // (segment or part))
            formula = (
                (2 + (count > 1) + checkpoints) * count * (world - 1) * Sent.formula(config, b, 2)
            )
        return speed, peak, sent.bytes / config.num_hidden_layers, formula

    show(torch.cuda.get_device_name() if CUDA else "CPU", torch.__version__, f"{world} ranks")
    show("                                                tokens/s and GPU   peak GB   of one GPU")
    for case in cases:
        kind, engine, shape, *sizes = case.split(":")
        b, l, segment_alone, segment = map(int, sizes)
        if rank == 0:
            alone = run(kind, None, shape, b, l, segment_alone)
            show(f"{case + ', one of them':48}{alone[0]:16,.0f} {alone[1]:9.1f}")
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        dist.barrier()
        speed, peak, sent, formula = run(kind, engine, shape, b, l, segment)
        if rank == 0:
            show(f"{case:48}{speed:16,.0f} {peak:9.1f} {speed / alone[0]:12.3f}")
            if kind == "sequence":
                show(
                    f"    sent by a rank, a layer and step: {sent:,.0f} bytes; formula {formula:,}"
                )
    dist.destroy_process_group()


def seconds(functions, repeats=5):
    """Median time of each function, as `milliseconds`, but until the GPU is done too."""

    def finished(function):
        def run():
            function()
            if CUDA:
                torch.cuda.synchronize()

        return run

    return [1e-3 * time for time in milliseconds([finished(f) for f in functions], repeats)]


def bytes_a_second():
    """What a copy on this device reads and writes."""
    source = torch.empty(2**28 if CUDA else 2**26, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds([lambda: target.copy_(source)])[0]


def mamba_ssm_model(config, dtype):
    """The original's model with the same sizes, or None where mamba_ssm is not installed."""
    try:
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    except ImportError:
        return None
    sizes = dict(d_model=config.d_model, n_layer=config.n_layer, vocab_size=config.vocab_size)
    theirs = MambaConfig(**sizes, d_intermediate=0, ssm_cfg=dict(layer="Mamba2"))
    return MambaLMHeadModel(theirs, device=DEVICE, dtype=dtype).eval()


@torch.no_grad()
def benchmark_generation(name, batch, prompt, new, contexts, state_dtype, sampling):
    """Time of a prompt and of each token after it, on a GPU in bfloat16, with CUDA graphs."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if CUDA else torch.float32
    if name in SHAPES:
        with DEVICE:
            model = Mamba2ForCausalLM(Mamba2Config(**SHAPES[name]))
    else:
        model = Mamba2ForCausalLM.from_pretrained(name)
    model = model.to(DEVICE, dtype).eval()
    model.generation_config.eos_token_id = None  # every text has the length that was asked for
    ids = torch.randint(1, model.config.vocab_size, (batch, prompt), device=DEVICE)
    sampling = {option: value for option, value in sampling.items() if value is not None}
    sampling["do_sample"] = bool(sampling)
    if state_dtype is None:
        cache = None
    else:  # all but the last token of the prompt
        cache = model.prefill(ids[:, :-1]).to(getattr(torch, state_dtype))

    def streamed(count):
        for _ in model.stream(ids, past_key_values=cache, max_new_tokens=count, **sampling):
            pass

    def generated(count):
        model.generate(ids, past_key_values=cache, max_new_tokens=count, **sampling)

    rows = {"model.stream": streamed, "model.generate": generated}
    if (theirs := mamba_ssm_model(model.config, dtype)) is not None and not sampling["do_sample"]:
        rows["mamba_ssm, cg=True"] = lambda count: theirs.generate(
            ids, max_length=prompt + count, cg=True
        )
    weights = sum(weight.nbytes for weight in model.parameters())
    states = sum(t.nbytes for t in tensors((cache or model.prefill(ids[:, :1])).states))
    floor = (weights + 2 * states) / bytes_a_second()
    where = torch.cuda.get_device_name() if CUDA else "CPU"
    print(f"{where}, torch {torch.__version__}, {name}, {dtype}, batch {batch}, {sampling}")
    print(f"weights {weights / 1e6:,.0f} MB, states {states / 1e6:,.1f} MB: at least", end=" ")
    print(f"{1e3 * floor:.3f} ms a token at the speed of a copy")
    print(f"{'':20} prompt of {prompt:,}: ms   ms a token    tokens/s   share of the floor")
    for count in (new + 1, 1):  # once, for what is done once
        for run in rows.values():
            run(count)
    times = seconds([functools.partial(run, n) for run in rows.values() for n in (1, new + 1)])
    for row, first, all_ in zip(rows, times[::2], times[1::2], strict=True):
        token = (all_ - first) / new
        print(f"{row:20} {1e3 * first:18.2f} {1e3 * token:12.3f}", end=" ")
        print(f"{batch / token:11,.0f} {100 * floor / token:18.0f} %", flush=True)

    if contexts:
        print("\n         context   prefill s   ms a token   MB of state")
    for context in contexts:
        ids = torch.randint(1, model.config.vocab_size, (batch, context + 1), device=DEVICE)
        (prefill,) = seconds([lambda: model.prefill(ids[:, :-1])], repeats=1)  # noqa: B023
        cache = model.prefill(ids[:, :-1])
        streamed(new)
        first, all_ = seconds([functools.partial(streamed, n) for n in (1, new + 1)])
        row = f"{context:16,} {prefill:11.3f} {1e3 * (all_ - first) / new:12.3f}"
        print(row, f"{cache.nbytes / 1e6:13.1f}", flush=True)


FIGURE = ROOT / ".figure.svg"


def figure_rows():
    """What README's figure shows: times of this and of mamba_ssm by label, from the tables; the
    measured time of a token by length of the context; bytes of the state, and of keys and values.
    """
    text = README.read_text()

    def times(row, mine, other, part=0, table=""):
        """Two columns of the first row that begins like this, below a row that begins like that."""
        begin = text.index("| " + row, text.index("| " + table if table else ""))
        cells = text[begin:].splitlines()[0].split("|")
        return tuple(float(cells[column].split("/")[part]) for column in (mine, other))

    bars = {
        "SSD, 2.7b: forward": times("SSD, batch 8", 2, 3),
        "SSD, 2.7b: backward": times("SSD, batch 8", 2, 3, part=1),
        "a layer's training step": times("layer of mamba2-130m", 2, 3, part=1),
        "a prompt of 8,192 tokens": times("prompt of 8,192 tokens", 2, 3),
        "a token": times("mamba2-130m | 1 |", 4, 6),
        "a token, 2.7b, batch 64": times("| 64 | bfloat16", 4, 6, table="mamba2-2.7b | 1 |"),
    }
    number = r"([\d.,\sand]+)"
    flat = re.search(rf"mamba2-130m\stakes{number}ms\sper\stoken\safter{number}tokens", text)
    numbers = [re.findall(r"[\d.,]*\d", part) for part in flat.groups()]
    milliseconds, contexts = ([float(n.replace(",", "")) for n in part] for part in numbers)
    config = Mamba2Config()  # mamba2-130m, whose states are counted without allocating them
    with torch.device("meta"):
        model = mamba2.Mamba2LM(config).to(torch.bfloat16)
        _, states = model(torch.zeros(1, 1, dtype=torch.int64))
    state = sum(tensor.nbytes for layer in states for tensor in layer)
    keys_and_values = 2 * config.n_layer * config.d_model * 2  # bytes per token, in bfloat16
    return bars, dict(zip(contexts, milliseconds, strict=True)), state, keys_and_values


def draw_figure():
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "mamba2", "font.size": 11})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    blue, red = "#0072B2", "#D55E00"
    bars, flat, state, keys_and_values = figure_rows()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(1.1, 1))
    ratios = [theirs / mine for mine, theirs in bars.values()]
    drawn = left.barh([*bars], ratios, color=blue)
    left.bar_label(drawn, [f"{ratio:.1f}×" for ratio in ratios], padding=3)
    left.axvline(1, color="black", linestyle="--", linewidth=1)
    left.set(title="Speed relative to mamba_ssm", xlim=(0, max(ratios) + 0.8))
    left.invert_yaxis()
    contexts, memory = [*flat], [keys_and_values * context / 1e6 for context in flat]
    right.loglog(contexts, memory, "s-", color=red)
    right.loglog(contexts, [state / 1e6] * len(flat), "o-", color=blue)
    right.text(1.5e4, 2.5 * memory[2], "Transformer", color=red, ha="right")
    right.text(1e6, 1.6 * state / 1e6, f"Mamba-2: {state / 1e6:.1f} MB", color=blue, ha="right")
    fastest, slowest = min(flat.values()), max(flat.values())
    text = f"{fastest:.3f} to {slowest:.3f} ms per token"
    right.text(1e6, 0.32 * state / 1e6, text, color=blue, ha="right", size=9)
    right.set(title="Memory of one sequence", xlabel="context, tokens", ylim=(2, 2e5))
    right.set_xticks([100, 10_000, 1_000_000], ["100", "10,000", "1,000,000"])
    right.set_yticks([10, 1000, 100_000], ["10 MB", "1 GB", "100 GB"])
    right.minorticks_off()
    figure.tight_layout()
    figure.savefig(FIGURE, metadata=dict(Date=None))
    print(f"{FIGURE} is drawn from the tables of README.md")


GENERATION = dict(temperature=float, top_k=int, top_p=float, min_p=float, repetition_penalty=float)


def command_line():
    parser = argparse.ArgumentParser(description="Benchmarks of mamba2.py; tests: pytest")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("cpu", help="against transformers' own Mamba-2, on the CPU (the default)")
    commands.add_parser("errors", help="of every form of SSD in every dtype, against float64")
    commands.add_parser("figure", help="draw the README's figure from its tables")
    training = commands.add_parser("training", help="memory and speed on long sequences, on a GPU")
    training.add_argument("shape", choices=SHAPES, help="of which published model")
    lengths = dict(type=lambda text: [int(n) for n in text.split(",")])
    training.add_argument("lengths", **lengths, help="of sequences, such as 8192,1048576")
    kinds = "plain,layers,segments,both"
    methods = f"any of {kinds}: whole, checkpoints of layers, segments, both of these"
    training.add_argument("--methods", default=kinds, help=methods)
    parallel = commands.add_parser("parallel", help="several GPUs against one, under torchrun")
    default = (
        PARALLEL if CUDA else [case.replace("130m:8:4096", "tiny:8:64") for case in PARALLEL[:1]]
    )
    case = (
        "rows or sequence, DDP or FSDP2, shape, rows of a rank, length, segment_length on one GPU "
    )
    case += f"and on ranks (0: none), joined by colons, such as {PARALLEL[2]}"
    parallel.add_argument("cases", nargs="*", default=default, metavar="case", help=case)
    parallel.add_argument("--steps", type=int, default=5)
    parallel.add_argument("--checkpoints", action="store_true", help="of layers, on one GPU too")
    generation = commands.add_parser("generation", help="time of a prompt, and of a token")
    generation.add_argument("name", help=f"{', '.join(SHAPES)}, or a model's name or folder")
    counts = dict(batch=(1, "rows"), prompt=(100, "its tokens"), new=(256, "tokens after it"))
    for option, (default, what) in counts.items():
        help_ = f"{what} ({default})"
        generation.add_argument(f"--{option}", type=int, default=default, help=help_)
    generation.add_argument("--contexts", default="", help="such as 100,1000,10000: is it flat?")
    generation.add_argument("--state-dtype", help="such as bfloat16; float32 unless given")
    for option, kind in GENERATION.items():
        generation.add_argument(f"--{option.replace('_', '-')}", type=kind)
    return parser


def main():
    parser = command_line()
    arguments = parser.parse_args()
    if arguments.command == "training" and not CUDA:
        parser.error("training measures the memory of a GPU: it needs CUDA")
    if arguments.command == "parallel":
        benchmark_parallel(arguments.cases, arguments.steps, arguments.checkpoints)
    elif arguments.command == "training":
        benchmark_training(arguments.shape, arguments.lengths, arguments.methods.split(","))
    elif arguments.command == "errors":
        benchmark_errors()
    elif arguments.command == "figure":
        draw_figure()
    elif arguments.command == "generation":
        sizes = arguments.batch, arguments.prompt, arguments.new
        contexts = [int(n) for n in arguments.contexts.split(",") if n]
        sampling = {option: getattr(arguments, option) for option in GENERATION}
        benchmark_generation(arguments.name, *sizes, contexts, arguments.state_dtype, sampling)
    else:
        benchmark()


if __name__ == "__main__":
    main()
