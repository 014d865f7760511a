"""Fused Triton kernels for mamba2.py: SSD, short convolution and norm, alone and as one operation,
forward and backward, and one token of a layer.

An operation here has the signature and the meaning of its namesake in mamba2.py (its twin, in plain
PyTorch), but returns None where it cannot run on these tensors, as without Triton or a GPU. Then
mamba2.py goes on in plain PyTorch; a warning says so once, if the tensors are on a GPU and looked
like ones for a kernel. Triton compiles at the first call. `python test_mamba2.py ssd layer prefill`
times all of it on a GPU; `python test_mamba2.py targets` compiles SSD's kernels for other GPUs.

    projection ──> xBC ──> causal_conv1d ──> x, B, C ──┐
           ├─────> dt ─────────────────────────────────┴──> ssd ──> y ──┐
           └─────> z ───────────────────────────────────────────────────┴──> rms_norm

A layer without a mask does all of this in one operation, `layer_middle`; where that cannot run, the
three are asked one by one. For one token, without gradients, `layer_step` does all but the norm in
one kernel, and `norm_linear` a norm with the projection after it. The twins of these three are
lines of the layer and of its block.

Axes: b batch, l length, c chunk, q position in a chunk, h head, p headdim, n state, g group, d
channel, k tap, r row (positions of any batch). In a q x q tile of SSD, s is the position that
writes into the state and t >= s the one that reads it. Tiles carry their axes as a suffix; strides
are named tensor_s and an axis, as dt_sl.

SSD
---
Per batch element and head:

    H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t^T        the state, (p, n)
    y_t = H_t C_t + D x_t

Inside a chunk let a_q = sum of dt·A·log2(e) up to and including q, so that 2^(a_t - a_s) is the
decay from s to t. With H the state at the chunk's start and a_end = a at its last position:

    y_t   = 2^a_t C_t·H + sum_{s<=t} (B_s·C_t) 2^(a_t - a_s) dt_s x_s + D x_t
    H_end = 2^a_end H + sum_s 2^(a_end - a_s) dt_s x_s B_s^T

Forward: one program per (batch, head) walks the chunks with the state in registers, so that nothing
of size n·p per chunk ever goes to memory.

    dt, A ──prep──> a, e; end              (b·h, l) fp32 each, "series"; one number per chunk
                       │
    x, B ──[walk]──────┤                   only if b·h is too small to fill the GPU: the state that
                       │                   each segment of the sequence adds, (b, segments, h, p, n)
    x, B, C ─────────scan──> y, final      y: x's dtype; final: (b, h, p, n) fp32

Backward: the states at the chunk borders are computed again (half-precision, one pair per chunk),
then everything is parallel over chunks. A program loops over the heads that share B and C, so that
dB and dC are summed on chip; no atomics anywhere, hence the same bits every time.

    dt, A ─────────prep────> a, dt; end
    x, B, dy, C ─────walk──> H, dH         (b·h·c, p, n) in x's dtype: the state at every chunk's
                      │                    start, and its gradient at every chunk's end
    x, dy, H, dH, B, C ┬ dx > dx, W        W: (b·c·g·shares, s, t) in x's dtype, see `dx_part`
           two parts,  │                   and four series, sums over p, n and a chunk
         one launch    └ bc > parts        (2, b·c·g·shares, q, n) fp32: dB and dC but for W, by
                      │                    shares of a group's heads; and one series
    W, parts ──────total───> dB, dC        sums over shares, with W C and W^T B
    series ────────chain───> ddt, sums     the chain rule to dt; sums: one row for each chunk,
    sums ──────────sum─────> dD, dA        (b·c, 2 h) fp32

Bytes through device memory for 2.7b (h 80, p 64, n 128, bf16) at b 8, l 4096, where x is 335 MB and
each of H, dH 671 MB: forward 0.69 GB (x, y and 1 % more; B and C stay in the L2 cache); backward
border 2.0, chunk 2.3 to 3.7 (x, dy and dH are read by both parts, from memory or from the L2
cache), all else 0.3 GB.

GPUs: tile sizes and launches are in `SETTINGS`, by kind of GPU. On those without a tensor memory
accelerator, or with less shared memory, kernels read tiles by pointers; `MAMBA2_KERNELS=portable`
in the environment has any NVIDIA GPU do so. All was compiled for them, and run on an H200 only.

Precision: decays, cumulative sums, the state in registers and all accumulators are fp32; operands
of matrix products are in x's dtype. Of fp32 inputs the backward's products are true fp32 and the
forward's have 22 bits, unless PyTorch's own switch allows tf32; those of fp16 are tf32, for the
range. No decay is split into factors that could overflow; differences are masked, or cut off, and
then exp2. With dt·A over many powers of ten in one chunk, fp32 results keep about 5 digits, as
their sums do. NaN in an input makes NaN of all that depends on it: no minimum swallows it.

Convolution, norm and the step of a token
-----------------------------------------
Each is bound by memory: the time to aim for is the bytes that must move over the bandwidth of a
device copy. Bytes per element of x, of 2-byte inputs read once and outputs written once:

    operation        forward                backward
    causal_conv1d    x, y              4    x, dy, dx                 6
    rms_norm         x, gate, out      6    x, gate, dout, dx, dgate 10
      without gate   x, out            4    x, dout, dx               6
    layer_step       state, new state  4    (an element of the state) -
    norm_linear      weight            2    (an element of the weight) -

Arithmetic is fp32. Nothing but inputs is kept for the backward (of a layer's middle: the
projection, and what convolution and SSD return): the rest is computed again from the tiles that the
backward reads anyway. For gradients of weights, every program sums the positions it walks over in
registers and writes one row of partial sums; PyTorch adds the rows.
"""

import concurrent.futures
import functools
import importlib.machinery
import importlib.util
import itertools
import math
import operator
import os
import re
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    TRITON = True
except ImportError as error:
    if not (error.name or "").startswith("triton"):  # something that triton needs
        raise
    TRITON = False
    # Stands in for whatever is named or called in the definitions of kernels.
    triton = tl = TensorDescriptor = mock.MagicMock()

__version__ = "0.0.1"  # a number, because transformers asks any module called `kernels` for one


if __name__ == "kernels":
    # In a folder with this file `import kernels` finds this file first, where transformers means
    # Hugging Face's package. If that is installed, it is loaded in this module's place.
    for _folder in sys.path:
        _spec = importlib.machinery.PathFinder.find_spec("kernels", [_folder])
        if _spec is not None and _spec.origin and _spec.submodule_search_locations:  # a package
            sys.modules["kernels"] = importlib.util.module_from_spec(_spec)
            _spec.loader.exec_module(sys.modules["kernels"])
            break


# ---- Shared by all operations: what is refused, how PyTorch gets to know a kernel, and launches --

# Run kernels as Python, on a CPU, for tests. The interpreter's matrix products are wrong in
# bfloat16, which is left to plain PyTorch.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = torch.float32, torch.float16, torch.bfloat16
if INTERPRET:
    DTYPES = DTYPES[:2]
# Triton compiles a kernel anew where a number is 1, or a multiple of 16, and was not before. These
# change with batch and length, and are exempt, as any new such argument of a kernel must be:
# nothing would be gained, and a prompt of another length would wait for seconds. (NSEG, WALKS,
# NSPLIT and HPS, of which there are few, are not.)
VARYING = "L NC BH CPS PROGRAMS dt_sb seq_sb l q_rows x_batch_units rows slots".split()
jit = functools.partial(triton.jit, do_not_specialize=VARYING)
_said = set()


def _lies_elsewhere(tensor: Tensor) -> bool:
    """Whether a kernel would not find its numbers at its address, as they are: a subclass such as
    DTensor keeps them in other tensors, a FakeTensor has none."""
    return tensor.is_neg() or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


_plans = {}


def _planned(plan: Callable) -> Callable:
    """The function, computed once for all tensors of the same shape, strides, dtype and device, and
    the same other arguments. Its result must depend on nothing else."""

    @functools.wraps(plan)
    def find(*arguments):
        kinds = [
            (a.shape, a.stride(), a.dtype, a.device) if isinstance(a, Tensor) else (type(a), a)
            for a in arguments
        ]
        found = _plans.get(key := (plan, *kinds), find)
        if found is find:  # not None, which a result may be
            if len(_plans) > 4_000:  # inputs of ever new lengths
                _plans.clear()
            found = _plans[key] = plan(*arguments)
        return found

    return find


# Of operators; another execution of this file, under another name, has its own.
NAMESPACE = re.sub("[^A-Za-z0-9]", "_", __name__)


class _Operation:
    """A function of tensors as autograd and torch.compile know it, from what launches its kernels.
    Calling it gives its results, or None if kernels cannot run on these inputs.

    schema    of an operator: tensors, `Tensor?` if they may be None, then numbers -> results, the
              last of which, `kept` of them, are for the backward alone
    new       new(*inputs): results and kept, not yet written
    run       run(*results, *kept, *inputs): writes them
    axes      of each tensor, see `_sizes`
    limit     limit(sizes, *tensors), from strides, dtypes, device, and a dictionary of the sizes of
              axes and of numbers: None if the kernels can take the inputs; "" if they do not fit
              together, which is for the twin to say; else a limit that a user should hear of
    backward  backward(*gradients of the results, *kept, *inputs): a list, the gradients of all
              tensors but seq_idx, contiguous, and an empty tensor for an input that is None

    To torch.compile, forward and backward are two opaque operators. Eager calls enter through an
    autograd.Function: the bookkeeping of an operator takes the CPU up to 0.5 ms, longer than the
    GPU needs, and that of a `setup_context` 0.1 ms, for inspect.signature.
    """

    def __init__(self, name, schema, axes, limit, new, run, backward=None, kept=0):
        inputs, made = schema.removeprefix("(").split(") -> ")
        kinds = [part.split() for part in inputs.split(", ")]
        self.tensors = {name: kind == "Tensor?" for kind, name in kinds if "Tensor" in kind}
        self.numbers = [name for kind, name in kinds if "Tensor" not in kind]
        self.name, self.results, self.kept = name, made.count("Tensor") - kept, kept
        self.new, self.run, self.backward = new, run, backward
        self.limit, self.known_reason = limit, _planned(self.reason)
        self.axes = dict(zip(self.tensors, axes.split(", "), strict=True))
        self.graded = [name for name in self.tensors if name != "seq_idx"]
        if not TRITON:  # nothing will ask; an old torch, as 2.6, cannot register it
            return
        define = functools.partial(torch.library.custom_op, mutates_args=())
        self.opaque = define(f"{NAMESPACE}::{name}", self.forward, schema=schema)
        self.opaque.register_fake(lambda *inputs: _alone(new(*inputs)))
        if backward is not None:
            given = [f"Tensor? d{i}" for i in range(self.results)]
            given += [f"Tensor k{i}" for i in range(kept)]
            schema = f"({', '.join([*given, inputs])}) -> Tensor[]"
            name = f"{NAMESPACE}::{name}_backward"
            self.opaque_backward = define(name, backward, schema=schema)
            self.opaque_backward.register_fake(lambda *a: self.empty_gradients(*a[-len(kinds) :]))
            gradients = functools.partial(self.gradients, self.opaque_backward)
            self.opaque.register_autograd(gradients, setup_context=self.save)

    def __call__(self, *inputs):
        if not self.takes(*inputs):
            return None
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            made = self.opaque(*inputs)  # modes see no launches
        elif self.backward is None or not torch.is_grad_enabled():
            made = self.forward(*inputs)
        else:
            return _Eager.apply(self, *inputs)
        return made[: self.results] if self.kept else made

    def takes(self, *inputs) -> bool:
        """Whether the kernels can run. A limit of theirs is told once, as a warning."""
        compiling = torch.compiler.is_compiling()
        transformed = torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()
        if not TRITON or not compiling and (transformed or forward_ad._current_level >= 0):
            return False  # a transform needs to see every operation
        wanted = self.backward is None and torch.is_grad_enabled()
        for name, tensor in zip(self.tensors, inputs, strict=False):
            if tensor is None and self.tensors[name]:
                continue
            if not isinstance(tensor, Tensor) or wanted and tensor.requires_grad:
                return False
            if not compiling and _lies_elsewhere(tensor):
                return False
        reason = (self.reason if compiling else self.known_reason)(*inputs)  # sizes may be symbols
        if reason and not compiling and (self.name, reason) not in _said:
            _said.add((self.name, reason))
            message = f"plain PyTorch runs instead of the kernels of {self.name}: {reason}"
            warnings.warn(message, stacklevel=5)  # for the caller of the twin
        return reason is None

    def reason(self, *inputs) -> str | None:
        """As `limit`; "" also for axes, a device or a dtype for which there is no kernel."""
        tensors, device = inputs[: len(self.tensors)], inputs[0].device
        if device.type != "cuda" and not (INTERPRET and device.type == "cpu"):
            return ""
        for name, tensor in zip(self.tensors, tensors, strict=True):
            if tensor is None:
                continue
            fits = tensor.dtype in DTYPES
            if name == "seq_idx":  # integers
                fits = not (tensor.is_floating_point() or tensor.is_complex())
            if tensor.device != device or not fits:
                return ""
        sizes = _sizes(self.axes.values(), *tensors)
        if sizes is None:
            return ""
        sizes.update(zip(self.numbers, inputs[len(tensors) :], strict=True))
        return self.limit(sizes, *tensors)

    def forward(self, *inputs):
        made = self.new(*inputs)
        self.run(*made, *inputs)
        return _alone(made)

    def empty_gradients(self, *inputs):
        given = dict(zip(self.tensors, inputs, strict=False))
        return [_gradient(given[name], inputs[0]) for name in self.graded]

    def save(self, ctx, inputs, output):
        ctx.set_materialize_grads(False)
        tensors, ctx.numbers = inputs[: len(self.tensors)], inputs[len(self.tensors) :]
        ctx.save_for_backward(*tensors, *(output[self.results :] if self.kept else ()))

    def gradients(self, run, ctx, *given):
        count, given = len(self.tensors), given[: self.results]
        saved = ctx.saved_tensors  # read once, as checkpoints demand
        inputs, kept = (*saved[:count], *ctx.numbers), saved[count:]
        if all(gradient is None for gradient in given):
            return (None,) * len(inputs)
        found = dict(zip(self.graded, run(*given, *kept, *inputs), strict=True))
        pairs = zip(self.tensors, saved, strict=False)
        found = [None if tensor is None else found.get(name) for name, tensor in pairs]
        return *found, *(None for _ in ctx.numbers)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operation, *inputs):
        made = operation.forward(*inputs)
        operation.save(ctx, inputs, made)
        ctx.operation = operation
        return made[: operation.results] if operation.kept else made

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *given):
        # Inputs were checked. A gradient may be of any kind, and to be read at its address it must
        # be there as it is: with its sign, and not in a subclass's own tensors.
        given, operation = [g if g is None else g.resolve_neg() for g in given], ctx.operation
        hidden = torch.compiler.is_compiling()
        hidden = hidden or any(g is not None and _lies_elsewhere(g) for g in given)
        run = operation.opaque_backward if hidden else operation.backward
        return None, *operation.gradients(run, ctx, *given)


def _alone(made: tuple):
    return made[0] if len(made) == 1 else made


def _sizes(axes, *tensors) -> dict | None:
    """The size of each axis by its letter, or None if the tensors do not have these axes, or are
    empty. `k-1` is one less than k; `...`, at the beginning, the shape of any axes."""
    sizes = {"1": 1}
    for letters, tensor in zip(axes, tensors, strict=True):
        if tensor is None:
            continue
        letters, shape = letters.split(), tensor.shape
        if letters[0] == "...":
            rest = len(shape) - len(letters) + 1
            shape = shape[:rest], *shape[rest:]
        if len(shape) != len(letters):
            return None
        for letter, size in zip(letters, shape, strict=True):
            if letter == "k-1":
                letter, size = "k", size + 1
            empty = 0 in size if letter == "..." else size == 0
            if empty or sizes.setdefault(letter, size) != size:
                return None
    return sizes


def _allows_tf32() -> bool:
    """Whether the user lets PyTorch's own fp32 matrix products be tf32."""
    switch = torch.backends.cuda.matmul
    if hasattr(switch, "fp32_precision"):  # PyTorch 2.9; once it is set, the other raises
        return switch.fp32_precision == "tf32"
    return switch.allow_tf32


class _Plan:
    """Launches without their tensors, in turn: (kernel, grid, numbers, options).

    A kernel takes the tensors and numbers that it names; tensors that are not passed are None. If
    there is a number for the name of a tensor, it is the name of the tensor to take instead.
    `tiles` are the shape, strides and block of tensors that kernels get as descriptors.

    Triton takes longer to find the compiled kernel for some arguments, and to check descriptors,
    than to launch. So a plan keeps what it launches, and checked descriptors without their tensors,
    by all else that these depend on: dtypes, and whether addresses are multiples of 16.
    """

    def __init__(self, *calls, tiles=()):
        fusion = dict(enable_fp_fusion=True)  # Triton 3.10 fuses a·b + c only if told so
        self.calls = [(*call, options | fusion) for *call, options in calls]
        self.ready, self.taken = {}, {}
        for kernel, _, numbers, _ in calls:
            self.taken.update((numbers.get(name, name), None) for name in _tensors(kernel))
        self.tiles = {name: tile for name, tile in dict(tiles).items() if name in self.taken}

    def __call__(self, **tensors):
        device = torch.cuda.device_of(next(iter(tensors.values())))
        tensors = self.taken | tensors
        kinds = [t if t is None else (t.dtype, t.data_ptr() % 16) for t in tensors.values()]
        with device:
            if (key := tuple(kinds)) not in self.ready:
                described = tensors | self.descriptors(tensors)
                checked = [(name, vars(described[name]) | dict(base=None)) for name in self.tiles]
                self.ready[key] = checked, self.prepared(described)
            checked, launches = self.ready[key]
            for name, fields in checked:
                descriptor = TensorDescriptor.__new__(TensorDescriptor)
                vars(descriptor).update(fields, base=tensors[name])
                tensors[name] = descriptor
            for launch, pick, numbers in launches:
                launch(*pick(tensors), *numbers)

    def descriptors(self, tensors):
        return {name: TensorDescriptor(tensors[name], *tile) for name, tile in self.tiles.items()}

    def prepared(self, tensors):
        """Of each call what launches it, what picks its tensors, and its numbers."""
        device = None if INTERPRET else torch.cuda.current_device()

        def prepare(call):
            kernel, grid, numbers, options = call
            names = _tensors(kernel)
            pick = operator.itemgetter(*[numbers.get(name, name) for name in names])
            values = [numbers[name] for name in kernel.arg_names[len(names) :]]
            if INTERPRET:
                return kernel, grid, pick, values
            with torch.cuda.device(device):  # a thread begins with device 0
                compiled = kernel.warmup(*pick(tensors), *values, grid=grid, **options)
            return compiled, grid, pick, values

        # At the same time: one after the other takes half as long again.
        with concurrent.futures.ThreadPoolExecutor(len(self.calls)) as pool:
            prepared = list(pool.map(prepare, self.calls))
        return [(compiled[grid], pick, values) for compiled, grid, pick, values in prepared]


def _sums(partial, *tensors):
    """The sums of rows of a matrix, as tensors like these, which lie side by side in it."""
    parts = zip(partial.split([t.numel() for t in tensors], 1), tensors, strict=True)
    return [part.sum(0).view(t.shape).to(t.dtype) for part, t in parts]


def _gradient(t, x):
    """A tensor for the gradient of an input; empty, and of x's kind, if there is none."""
    return x.new_empty(0) if t is None else t.new_empty(t.shape)


def _contiguous(*tensors):
    return [t if t is None else t.contiguous() for t in tensors]


def _tensors(kernel) -> list[str]:
    """Names of the tensors that a kernel takes, which come first."""
    return [name for name in kernel.arg_names if name.endswith(("_ptr", "_mem"))]


def _unit(*sizes: int) -> int:
    """8 if it divides every size, else 1. Kernels get sizes and strides in this unit: where they
    compute `size * 8`, the compiler sees that a thread may load 16 bytes at once. Triton finds that
    out alone only for multiples of 16, and rows of the 130m model's projection are 3,352 apart.
    """
    return 8 if all(size % 8 == 0 for size in sizes) else 1


# Whether kernels may contain PTX, the assembly of NVIDIA's GPUs.
PTX = tl.constexpr(not INTERPRET and torch.version.hip is None)


@triton.jit
def _sigmoid(v):
    """1 / (1 + exp(-v)), at twice the speed of `tl.sigmoid`, whose exp and division guard against
    tiny values, and as exact to a few units of 2^-24: what may become 0 here, 2^(-v log2 e) below
    2^-126, is added to 1, and a sigmoid below 2^-126 is as good as 0."""
    if PTX:
        power = _approximate("ex2", v * -1.4426950408889634)
        return _approximate("rcp", 1.0 + power)
    return tl.sigmoid(v)


@triton.jit
def _approximate(instruction: tl.constexpr, v):
    assembly: tl.constexpr = instruction + ".approx.ftz.f32 $0, $1;"
    return tl.inline_asm_elementwise(assembly, "=f,f", [v], tl.float32, is_pure=True, pack=1)


# ---- SSD -----------------------------------------------------------------------------------------

LOG2E = tl.constexpr(1.4426950408889634)
# A step that decays by 2^-40 leaves nothing of an fp32 state. Going no lower keeps the running sum
# small, and with it the rounding error of its differences, when dt·A is -1e6.
LOWEST = tl.constexpr(-40.0)

# tl.minimum and tl.maximum take NaN for a missing number, and return the other one, unless they are
# told to return NaN, as PyTorch does. (It is one instruction either way, from sm_80 on.)
NAN = tl.constexpr(tl.PropagateNan.ALL)

# Names that the kernels of SSD share. Numbers: L positions, NC chunks, H heads, G groups of HPG
# heads, BH = b·h, P and N the sizes of p and n, NPB tiles of PB rows in P. In the forward, NSEG
# segments of CPS chunks; in the backward, NSPLIT shares of a group, of HPS heads each, PROGRAMS =
# b·c·g·NSPLIT. Constants: Q, PB, NB and HB are the sizes of a tile along q, p, n and h, PREC the
# precision of products, STAGES the depth of the pipeline. Indices: bh = b·H + h; pb, nb the tiles.
#
# What there is one number of for each position and head: `series` is (which, b·h, l) in fp32, with
# l padded to whole chunks. `prep_kernel` writes the first three. The others belong to the backward;
# there is a set of five for each of the tiles in which a headdim above PB is taken.
SERIES_A, SERIES_E, SERIES_DT, SERIES_ROW, SERIES_COL, SERIES_OUT, SERIES_IN, SERIES_XDY = (
    tl.constexpr(i) for i in range(8)
)
SET = tl.constexpr(5)


@triton.jit
def series_at(series_ptr, which, bh, c, BH, NC, Q: tl.constexpr):
    """Where chunk c of a series begins, for batch element and head bh of BH."""
    return series_ptr + ((BH * which + bh).to(tl.int64) * NC + c) * Q


# Tensors of which kernels read whole tiles end in `_mem`. With a tensor memory accelerator (TMA)
# they are descriptors of tiles, read without a register for an address. Otherwise they are
# pointers, and a number, such as x_row, says how many times 16 bytes their rows are apart: the
# compiler must see that this is a multiple of 16 bytes to load as many at once. What a tile has
# outside the tensor reads as zero, and is not written.


@triton.jit
def load_rows(
    mem, row, b, head, q0, w0, L, W, Q: tl.constexpr, WB: tl.constexpr, TMA: tl.constexpr
):
    """The tile (Q, WB) of a (b, l, heads, W) tensor that begins at position q0, column w0. The
    states at the borders of chunks are read as such a tensor, (states, p, 1, n)."""
    if TMA:
        tile = mem.load([b, head, q0, w0]).reshape(Q, WB)
    else:
        at, mask = rows_at(mem, row, b, head, q0, w0, L, W, Q, WB)
        tile = tl.load(at, mask=mask, other=0.0)
    return tile


@triton.jit
def store_rows(
    mem, row, tile, b, head, q0, w0, L, W, Q: tl.constexpr, WB: tl.constexpr, TMA: tl.constexpr
):
    if TMA:
        mem.store([b, head, q0, w0], tile.reshape(1, 1, Q, WB))
    else:
        at, mask = rows_at(mem, row, b, head, q0, w0, L, W, Q, WB)
        tl.store(at, tile, mask=mask)


@triton.jit
def rows_at(mem, row, b, head, q0, w0, L, W, Q: tl.constexpr, WB: tl.constexpr):
    """Addresses and mask of a tile: rows of all batch elements lie evenly, heads side by side."""
    q = tl.arange(0, Q)
    w = tl.arange(0, WB)
    row *= 128 // mem.dtype.element_ty.primitive_bitwidth
    mem += (b.to(tl.int64) * L + q0) * row + head * W + w0
    return mem + (q[:, None] * row + w[None, :]), (q < L - q0)[:, None] & (w < W - w0)[None, :]


@triton.jit
def load_series(mem, which, bh, c, BH, NC, Q: tl.constexpr, TMA: tl.constexpr):
    """Chunk c of a series, for batch element and head bh of BH."""
    if TMA:
        tile = mem.load([BH * which + bh, c * Q]).reshape(Q)
    else:
        tile = tl.load(series_at(mem, which, bh, c, BH, NC, Q) + tl.arange(0, Q))
    return tile


@triton.jit
def pin(tile, PIN: tl.constexpr):
    """The tile, unchanged, but as something the compiler takes for a computed value; the assembler
    drops the move. It pays for 2-byte inputs on a GPU (PIN):

    - Triton gives a loaded tile that only matrix products read one more buffer of shared memory.
      Passing it through registers saves that, so that two programs of `scan_kernel` share a
      multiprocessor: 0.45 instead of 0.62 ms for 2.7b at b8 l4096 (H200).
    - A sum of products that only the next iteration reads is still being computed when that begins.
      If products start from zero there, as in `bc_part`, the assembler lets every single matrix
      instruction wait for the one before. Using the sum ends the overlap, and with it the waits.
    """
    if PIN:
        if tile.dtype == tl.float32:
            tile = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=f,f", [tile], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            tile = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [tile], dtype=tile.dtype, is_pure=True, pack=2
            )
    return tile


@triton.jit
def operand(tile, dtype: tl.constexpr, PREC: tl.constexpr):
    """An fp32 tile as a factor of a matrix product: in dtype, or rounded to the 10 bits of tf32,
    of which the hardware drops the rest."""
    if PREC == "tf32":
        # NaN, as GPUs compute it, has all bits but the sign's, which rounding must not carry into.
        bits = tl.minimum(tile.to(tl.int32, bitcast=True), 0x7FFFEFFF)
        tile = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tile.to(dtype)


@triton.jit
def load_state(ptr, sp, sn, p, n, mask_pn):
    """A tile of a (p, n) state in fp32, zero outside it."""
    tile = tl.load(ptr + p[:, None] * sp + n[None, :] * sn, mask=mask_pn, other=0.0)
    return tile.to(tl.float32)


@triton.jit
def softplus(v):
    """log(1 + e), e = exp(v), where 1 must not swallow the digits of a small e."""
    e = tl.exp(tl.minimum(v, 20.0, propagate_nan=NAN))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(v > 20.0, v, log1p)


@triton.jit
def clamp(v, low, high):
    return tl.minimum(tl.maximum(v, low, propagate_nan=NAN), high, propagate_nan=NAN)


@jit
def prep_kernel(
    dt_ptr, A_ptr, bias_ptr, seq_ptr, series_ptr, end_ptr, run_ptr,
    dt_sb, dt_sl, dt_sh, seq_sb, seq_sl, low, high,
    L, NC, H, BH,
    RAW: tl.constexpr, HAS_SEQ: tl.constexpr, Q: tl.constexpr, HB: tl.constexpr,
):  # fmt: skip
    """a_q = sum_{i<=q} dt_i A log2(e) in each chunk; e_q = a_q - log2(dt_q), which folds dt into
    the exponent: 2^(a_t - e_s) = 2^(a_t - a_s) dt_s; end = a_Q; run_q = number of resets so far.

    Grid (b·c, h / HB). Tile: Q positions x HB heads, read with heads adjacent, written with
    positions adjacent. RAW: dt and A are made here, as a layer does.

        dt <- load (Q, HB)           RAW: softplus(dt + bias), cut off at low and high
                                     else: NaN where it is below 0
        A  <- load (HB)              RAW: -exp(A)
        da <- max(dt · A · log2 e, -40)
        a  <- cumulative sum of da along q
        store a, a - log2 dt, dt (padded to whole chunks), sum of da
        run <- cumulative sum of seq_idx[l] != seq_idx[l-1], from 0 in every chunk

    Masked: positions past l have dt = 0, so that they do not add (their e is +inf), and da = 0,
    whatever A is: 0 · A would be NaN for an infinite one.
    """
    bc = tl.program_id(0).to(tl.int64)
    b = bc // NC
    c = bc % NC
    q = tl.arange(0, Q)
    pos = c * Q + q
    h = tl.program_id(1) * HB + tl.arange(0, HB)
    mask_q = pos < L
    mask_h = h < H
    mask_qh = mask_q[:, None] & mask_h[None, :]
    # load
    dt_at = dt_ptr + b * dt_sb + pos[:, None] * dt_sl + h[None, :] * dt_sh
    dt_qh = tl.load(dt_at, mask=mask_qh, other=0.0).to(tl.float32)
    A_h = tl.load(A_ptr + h, mask=mask_h, other=0.0).to(tl.float32)
    if RAW:
        dt_qh += tl.load(bias_ptr + h, mask=mask_h, other=0.0).to(tl.float32)[None, :]
        dt_qh = tl.where(mask_qh, clamp(softplus(dt_qh), low, high), 0.0)
        A_h = -tl.exp(A_h)
    else:
        dt_qh = tl.where(dt_qh < 0.0, float("nan"), dt_qh)  # e holds its logarithm, without a sign
    # decay
    da_qh = tl.maximum(dt_qh * (A_h * LOG2E)[None, :], LOWEST, propagate_nan=NAN)
    da_qh = tl.where(mask_qh, da_qh, 0.0)
    a_qh = tl.cumsum(da_qh, axis=0)
    # store
    bh = b * H + h
    a_at = series_at(series_ptr, SERIES_A, bh, c, BH, NC, Q)[None, :] + q[:, None]
    e_at = series_at(series_ptr, SERIES_E, bh, c, BH, NC, Q)[None, :] + q[:, None]
    dt_at = series_at(series_ptr, SERIES_DT, bh, c, BH, NC, Q)[None, :] + q[:, None]
    tl.store(a_at, a_qh, mask=mask_h[None, :])
    tl.store(e_at, a_qh - tl.log2(dt_qh), mask=mask_h[None, :])
    tl.store(dt_at, dt_qh, mask=mask_h[None, :])
    tl.store(end_ptr + bh * NC + c, tl.sum(da_qh, axis=0), mask=mask_h)
    if HAS_SEQ:
        if tl.program_id(1) == 0:
            seq = seq_ptr + b * seq_sb + pos * seq_sl
            mask_q = mask_q & (pos > 0)
            before_q = tl.load(seq - seq_sl, mask=mask_q, other=0)
            change_q = tl.load(seq, mask=mask_q, other=0) != before_q
            tl.store(run_ptr + b * (NC * Q) + pos, tl.cumsum(change_q.to(tl.int32), axis=0))


@jit
def walk_kernel(
    x_mem, B_mem, dy_mem, C_mem, series_mem, borders_mem,
    end_ptr, run_ptr, init_ptr, dfinal_ptr, dinit_ptr, seg_ptr, decay_ptr,
    x_row, B_row, dy_row, C_row, borders_row, i_sb, i_sh, i_sp, i_sn, f_sb, f_sh, f_sp, f_sn,
    L, NC, H, BH, HPG, NPB, P, N, NSEG, WALKS, CPS,
    BORDERS: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_INIT: tl.constexpr, HAS_DFINAL: tl.constexpr,
    Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """The state alone, chunk after chunk: state <- 2^a_end state + (v · weight)^T K.

    Forward in time v, K = x, B and the weight is 2^(a_end - e_q). In reverse v, K = dy, C and the
    weight is 2^a_q, which is the same recurrence for the gradient of the state:

        dH_{c-1} = 2^a_end dH_c + sum_t 2^a_t dy_t C_t^T        (dH_c: where chunk c ends)

    BORDERS: H at every chunk's start, from the initial state on, and dH at every chunk's end, from
    the gradient of the final state on, down to that of the initial state. The two directions, in
    one launch, fill the GPU together. Otherwise, forward in time: what each segment of CPS chunks
    but the last adds to the state, and the decay over the whole segment, 0 past a reset.

    Grid (b · WALKS · h · p/PB, n/NB, directions); WALKS = NSEG - 1, but with BORDERS both are 1.

        |  v^T (p, q)  |  x  |  K (q, n)  |  ->  state (p, n) in registers

    Masked: positions past l, rows past p, columns past n, which read as zero.
    """
    pid = tl.program_id(0)
    nb = tl.program_id(1)
    reverse = BORDERS and tl.program_id(2) == 1
    pb = pid % NPB
    h = (pid // NPB) % H
    s = (pid // NPB // H) % WALKS
    b = pid // NPB // H // WALKS
    b64 = b.to(tl.int64)
    bh = b * H + h
    end_ptr += (b64 * H + h) * NC
    run_ptr += b64 * (NC * Q)
    q = tl.arange(0, Q)
    p = pb * PB + tl.arange(0, PB)
    n = nb * NB + tl.arange(0, NB)
    mask_pn = (p < P)[:, None] & (n < N)[None, :]
    state_pn = tl.zeros((PB, NB), tl.float32)
    if reverse:
        v_mem, K_mem = dy_mem, C_mem
        if HAS_DFINAL:
            state_pn += load_state(dfinal_ptr + b64 * f_sb + h * f_sh, f_sp, f_sn, p, n, mask_pn)
    else:
        v_mem, K_mem = x_mem, B_mem
        if BORDERS and HAS_INIT:
            state_pn += load_state(init_ptr + b64 * i_sb + h * i_sh, i_sp, i_sn, p, n, mask_pn)
    v_row = tl.where(reverse, dy_row, x_row)
    K_row = tl.where(reverse, C_row, B_row)
    total = 0.0
    for i in tl.range(s * CPS, tl.minimum(s * CPS + CPS, NC), num_stages=STAGES):
        c = tl.where(reverse, NC - 1 - i, i)
        # load
        K_qn = load_rows(K_mem, K_row, b, h // HPG, c * Q, nb * NB, L, N, Q, NB, TMA)
        v_pq = tl.trans(load_rows(v_mem, v_row, b, h, c * Q, pb * PB, L, P, Q, PB, TMA))
        which = tl.where(reverse, SERIES_A, SERIES_E)
        w_q = load_series(series_mem, which, bh, c, BH, NC, Q, TMA)
        a_end = tl.load(end_ptr + c)
        # decay
        w_q = tl.exp2(tl.where(reverse, w_q, a_end - w_q))
        gamma = tl.exp2(a_end)
        total += a_end
        if HAS_SEQ:
            run_q = tl.load(run_ptr + c * Q + q)
            run_end = tl.load(run_ptr + c * Q + Q - 1)
            w_q = tl.where(run_q == tl.where(reverse, 0, run_end), w_q, 0.0)
            gamma = tl.where(run_end == 0, gamma, 0.0)
            total = tl.where(run_end == 0, total, float("-inf"))
        # store
        if BORDERS:
            border = tl.where(reverse, BH + bh, bh) * NC + c
            tile = operand(state_pn, v_pq.dtype, PREC)
            store_rows(
                borders_mem, borders_row, tile, border, 0, pb * PB, nb * NB, P, N, PB, NB, TMA
            )
        # dot
        vw_pq = operand(v_pq * w_q[None, :], v_pq.dtype, PREC)
        state_pn *= gamma
        state_pn = tl.dot(vw_pq, K_qn, state_pn, input_precision=PREC)
    # store
    row = (b64 * NSEG + s) * H + h
    at_pn = (row * P + p[:, None]) * N + n[None, :]
    if not BORDERS:
        tl.store(seg_ptr + at_pn, state_pn, mask=mask_pn)
        tl.store(decay_ptr + row, tl.exp2(total))
    elif HAS_INIT:
        if reverse:
            tl.store(dinit_ptr + at_pn, state_pn.to(dinit_ptr.dtype.element_ty), mask=mask_pn)


# SSD: forward -------------------------------------------------------------------------------------


@jit
def scan_kernel(
    x_mem, B_mem, C_mem, series_mem, y_ptr,
    end_ptr, run_ptr, D_ptr, init_ptr, seg_ptr, decay_ptr, final_ptr,
    i_sb, i_sh, i_sp, i_sn, L, NC, H, BH, HPG, NPB, P, N, NSEG, CPS, x_row, B_row, C_row,
    HAS_SEQ: tl.constexpr, HAS_D: tl.constexpr, HAS_INIT: tl.constexpr, SEGMENTS: tl.constexpr,
    Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, PREC: tl.constexpr, PIN: tl.constexpr,
    STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """y_t = 2^a_t H C_t + sum_{s<=t} (B_s·C_t) 2^(a_t - e_s) x_s + D x_t, and H to the next chunk.
    A change here that keeps results may cost time: compare `targets`, before and after, for spills.

    Grid b · segments · h · p/PB; neighbours share B and C through the L2 cache. The state's PB rows
    and all of n stay in registers. Everything is transposed, (p, q), so that the state and x are
    left operands, which may live in registers, and no product's result is ever transposed:

             t                          t                             n
        s  G (s, t)            p  [x^T (p, s)] G (s, t)        p  state (p, n)
           upper triangle         + [state (p, n)] C^T (n, t)     += [x^T · weight] B (s, n)

        state <- initial state, then every earlier segment's decay and addition
        for each chunk:
            G     <- (B C^T) ∘ 2^(a_t - e_s), zero below the diagonal
            y     <- (state C^T) · 2^a_t + x^T G + D x^T
            state <- 2^a_end state + (x^T · 2^(a_end - e_s)) B

    Masked: s > t, and pairs in different runs of seq_idx; positions past l, rows past p.
    """
    pid = tl.program_id(0)
    pb = pid % NPB
    h = (pid // NPB) % H
    seg = (pid // NPB // H) % NSEG
    b = pid // NPB // H // NSEG
    b64 = b.to(tl.int64)
    g = h // HPG
    p = pb * PB + tl.arange(0, PB)
    n = tl.arange(0, NB)
    q = tl.arange(0, Q)
    mask_p = p < P
    mask_pn = mask_p[:, None] & (n < N)[None, :]
    state_pn = tl.zeros((PB, NB), tl.float32)
    if HAS_INIT:
        state_pn += load_state(init_ptr + b64 * i_sb + h * i_sh, i_sp, i_sn, p, n, mask_pn)
    if SEGMENTS:
        for j in range(0, seg):
            row = (b64 * NSEG + j) * H + h
            state_pn *= tl.load(decay_ptr + row)
            state_pn += load_state(seg_ptr + row * P * N, N, 1, p, n, mask_pn)
    end_ptr += (b64 * H + h) * NC
    half_pn = operand(state_pn, x_mem.dtype if TMA else x_mem.dtype.element_ty, PREC)
    for c in tl.range(seg * CPS, tl.minimum(seg * CPS + CPS, NC), num_stages=STAGES):
        # load
        B_qn = load_rows(B_mem, B_row, b, g, c * Q, 0, L, N, Q, NB, TMA)
        C_nq = tl.trans(load_rows(C_mem, C_row, b, g, c * Q, 0, L, N, Q, NB, TMA))
        x_pq = tl.trans(load_rows(x_mem, x_row, b, h, c * Q, pb * PB, L, P, Q, PB, TMA))
        a_q = load_series(series_mem, SERIES_A, b * H + h, c, BH, NC, Q, TMA)
        e_q = load_series(series_mem, SERIES_E, b * H + h, c, BH, NC, Q, TMA)
        a_end = tl.load(end_ptr + c)
        # decay
        keep_st = q[:, None] <= q[None, :]
        in_q = tl.exp2(a_q)
        out_q = tl.exp2(a_end - e_q)
        gamma = tl.exp2(a_end)
        if HAS_SEQ:
            run_q = tl.load(run_ptr + b64 * (NC * Q) + c * Q + q)
            run_end = tl.load(run_ptr + b64 * (NC * Q) + c * Q + Q - 1)
            keep_st = keep_st & (run_q[:, None] == run_q[None, :])
            in_q = tl.where(run_q == 0, in_q, 0.0)
            out_q = tl.where(run_q == run_end, out_q, 0.0)
            gamma = tl.where(run_end == 0, gamma, 0.0)
        decay_st = tl.exp2(tl.where(keep_st, a_q[None, :] - e_q[:, None], float("-inf")))
        # dot
        S_st = tl.dot(pin(B_qn, PIN), C_nq, input_precision=PREC)
        G_st = operand(S_st * decay_st, x_pq.dtype, PREC)
        y_pq = tl.dot(pin(half_pn, PIN), C_nq, input_precision=PREC) * in_q[None, :]
        y_pq = tl.dot(x_pq, G_st, y_pq, input_precision=PREC)
        xw_pq = operand(x_pq * out_q[None, :], x_pq.dtype, PREC)
        state_pn *= gamma
        state_pn = tl.dot(xw_pq, B_qn, state_pn, input_precision=PREC)
        half_pn = operand(state_pn, x_pq.dtype, PREC)
        if HAS_D:
            y_pq += x_pq.to(tl.float32) * tl.load(D_ptr + h).to(tl.float32)
        # store
        y_at = y_ptr + ((b64 * L + c * Q) * H + h) * P + q[None, :] * (H * P) + p[:, None]
        mask_pq = mask_p[:, None] & (c * Q + q < L)[None, :]
        tl.store(y_at, y_pq.to(y_ptr.dtype.element_ty), mask=mask_pq)
    if seg == NSEG - 1:
        final_ptr += (b64 * H + h) * P * N
        tl.store(final_ptr + p[:, None] * N + n[None, :], state_pn, mask=mask_pn)


# SSD: backward ------------------------------------------------------------------------------------


@triton.jit
def dx_part(
    pid, x_mem, dy_mem, B_mem, C_mem, series_mem, borders_mem, dx_mem,
    series_ptr, end_ptr, run_ptr, D_ptr, W_ptr, x_row, dy_row, B_row, C_row, dx_row, borders_row,
    b, c, g, first, last, L, NC, H, BH, NPB, P, N,
    HAS_SEQ: tl.constexpr, Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr,
    PREC: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """With S_st = B_s·C_t, the decay L_st = 2^(a_t - a_s) for s <= t, T_st = x_s·dy_t and
    o_s = 2^(a_end - a_s):

        dx_s  = dt_s (sum_t S_st L_st dy_t + o_s dH B_s) + D dy_s
        W_st  = sum over heads of L_st dt_s T_st          (so dB = W C + ..., dC = W^T B + ...)
        row_t = sum_s dt_s M_st,  col_s = sum_t M_st      with M = T ∘ L ∘ S, in fp32, for ddt
        out_s = o_s x_s·(dH B_s)                          what x_s gives to later chunks
        xdy_s = x_s·dy_s                                  the diagonal of T, for dD

    B and S stay on chip while the program loops over its heads. Headdims above PB are taken PB rows
    at a time, as if they were more heads: all sums above are linear in them.

               t                             p                          p
        s   S, W, M (s, t)            s   x, dx (s, p)          t   dy (t, p)

        S <- B C^T
        for each head:
            v <- (B dH^T) · o_s;                 out <- rows of x ∘ v
            T <- x dy^T;                         row, col <- sums of T ∘ (S ∘ L)
            W += (T ∘ L) · dt_s
            dx <- (v + (S ∘ L) dy) · dt_s + D dy

    Masked: s > t, and pairs in different runs of seq_idx, in S and at the end in W. What L is there
    does not matter as long as it is finite, so that S ∘ L is 0: its exponents are cut off at 127.
    Other exponents are that large only if A > 0 and the state grows by 2^127 within a chunk.
    """
    q = tl.arange(0, Q)
    B_sn = load_rows(B_mem, B_row, b, g, c * Q, 0, L, N, Q, NB, TMA)
    C_tn = load_rows(C_mem, C_row, b, g, c * Q, 0, L, N, Q, NB, TMA)
    keep_st = q[:, None] <= q[None, :]
    if HAS_SEQ:
        run_q = tl.load(run_ptr + b.to(tl.int64) * (NC * Q) + c * Q + q)
        run_end = tl.load(run_ptr + b.to(tl.int64) * (NC * Q) + c * Q + Q - 1)
        keep_st = keep_st & (run_q[:, None] == run_q[None, :])
    S_st = tl.where(keep_st, tl.dot(B_sn, tl.trans(C_tn), input_precision=PREC), 0.0)
    W_st = tl.zeros((Q, Q), tl.float32)
    for i in tl.range(first * NPB, last * NPB, num_stages=STAGES):
        h = i // NPB
        pb = i % NPB
        bh = b * H + h
        # load
        x_sp = load_rows(x_mem, x_row, b, h, c * Q, pb * PB, L, P, Q, PB, TMA)
        dy_tp = load_rows(dy_mem, dy_row, b, h, c * Q, pb * PB, L, P, Q, PB, TMA)
        dH_pn = load_rows(
            borders_mem, borders_row, (BH + bh) * NC + c, 0, pb * PB, 0, P, N, PB, NB, TMA
        )
        a_q = load_series(series_mem, SERIES_A, bh, c, BH, NC, Q, TMA)
        dt_q = load_series(series_mem, SERIES_DT, bh, c, BH, NC, Q, TMA)
        a_end = tl.load(end_ptr + bh.to(tl.int64) * NC + c)
        # decay
        out_q = tl.exp2(a_end - a_q)
        if HAS_SEQ:
            out_q = tl.where(run_q == run_end, out_q, 0.0)
        L_st = tl.exp2(tl.minimum(a_q[None, :] - a_q[:, None], 127.0, propagate_nan=NAN))
        # dot: through the state at the chunk's end
        v_sp = tl.dot(B_sn, tl.trans(dH_pn), input_precision=PREC)
        v_sp *= out_q[:, None]
        out_s = tl.sum(x_sp.to(tl.float32) * v_sp, axis=1)
        # dot: inside the chunk
        T_st = tl.dot(x_sp, tl.trans(dy_tp), input_precision=PREC)
        xdy_q = tl.sum(tl.where(q[:, None] == q[None, :], T_st, 0.0), axis=1)
        SL_st = S_st * L_st
        W_st += T_st * L_st * dt_q[:, None]
        M_st = T_st * SL_st
        col_s = tl.sum(M_st, axis=1)
        row_t = tl.sum(M_st * dt_q[:, None], axis=0)
        G_st = operand(SL_st, x_sp.dtype, PREC)
        v_sp = tl.dot(G_st, dy_tp, v_sp, input_precision=PREC)
        dx_sp = v_sp * dt_q[:, None]
        dx_sp += dy_tp.to(tl.float32) * tl.load(D_ptr + h).to(tl.float32)
        # store
        tl.store(series_at(series_ptr, pb * SET + SERIES_XDY, bh, c, BH, NC, Q) + q, xdy_q)
        dx_sp = dx_sp.to(x_sp.dtype)
        store_rows(dx_mem, dx_row, dx_sp, b, h, c * Q, pb * PB, L, P, Q, PB, TMA)
        tl.store(series_at(series_ptr, pb * SET + SERIES_ROW, bh, c, BH, NC, Q) + q, row_t)
        tl.store(series_at(series_ptr, pb * SET + SERIES_COL, bh, c, BH, NC, Q) + q, col_s)
        tl.store(series_at(series_ptr, pb * SET + SERIES_OUT, bh, c, BH, NC, Q) + q, out_s)
    W_st = operand(tl.where(keep_st, W_st, 0.0), W_ptr.dtype.element_ty, PREC)
    tl.store(W_ptr + (pid.to(tl.int64) * Q + q[:, None]) * Q + q[None, :], W_st)


@triton.jit
def bc_part(
    pid, x_mem, dy_mem, C_mem, series_mem, borders_mem,
    series_ptr, end_ptr, run_ptr, parts_ptr, cross_ptr, x_row, dy_row, C_row, borders_row,
    b, c, g, first, last, L, NC, H, BH, NPB, P, N, PROGRAMS,
    HAS_SEQ: tl.constexpr, Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr,
    PREC: tl.constexpr, PIN: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Sums over a share of a group's heads, to which `total_kernel` adds those with W. o as above.

        dB_s  = sum_h o_s dt_s x_s dH
        dC_t  = sum_h 2^a_t dy_t H
        in_t  = 2^a_t dy_t·(H C_t)                        what t receives from earlier chunks
        cross = 2^a_end <H, dH>                           what passes through the chunk untouched

    Tiles dB (s, n) and dC (t, n) stay in registers:

        for each head:
            in <- rows of (C H^T) ∘ dy · 2^a_t;  cross <- diagonal of H dH^T · 2^a_end
            dB += (x · o_s dt_s) dH;             dC += (dy · 2^a_t) H

    On Hopper the diagonal of a product stands in for the sums of an elementwise product: the tensor
    cores have time to spare here, the registers have no room. Masked: columns past n.
    """
    q = tl.arange(0, Q)
    n = tl.arange(0, NB)
    pp = tl.arange(0, PB)
    C_tn = load_rows(C_mem, C_row, b, g, c * Q, 0, L, N, Q, NB, TMA)
    if HAS_SEQ:
        run_q = tl.load(run_ptr + b.to(tl.int64) * (NC * Q) + c * Q + q)
        run_end = tl.load(run_ptr + b.to(tl.int64) * (NC * Q) + c * Q + Q - 1)
    dB_sn = tl.zeros((Q, NB), tl.float32)
    dC_tn = tl.zeros((Q, NB), tl.float32)
    for i in tl.range(first * NPB, last * NPB, num_stages=STAGES):
        h = i // NPB
        pb = i % NPB
        bh = b * H + h
        # load
        x_sp = load_rows(x_mem, x_row, b, h, c * Q, pb * PB, L, P, Q, PB, TMA)
        dy_tp = load_rows(dy_mem, dy_row, b, h, c * Q, pb * PB, L, P, Q, PB, TMA)
        H_pn = load_rows(borders_mem, borders_row, bh * NC + c, 0, pb * PB, 0, P, N, PB, NB, TMA)
        dH_pn = load_rows(
            borders_mem, borders_row, (BH + bh) * NC + c, 0, pb * PB, 0, P, N, PB, NB, TMA
        )
        a_q = load_series(series_mem, SERIES_A, bh, c, BH, NC, Q, TMA)
        dt_q = load_series(series_mem, SERIES_DT, bh, c, BH, NC, Q, TMA)
        a_end = tl.load(end_ptr + bh.to(tl.int64) * NC + c)
        # decay
        in_q = tl.exp2(a_q)
        out_q = tl.exp2(a_end - a_q) * dt_q
        gamma = tl.exp2(a_end)
        if HAS_SEQ:
            in_q = tl.where(run_q == 0, in_q, 0.0)
            out_q = tl.where(run_q == run_end, out_q, 0.0)
            gamma = tl.where(run_end == 0, gamma, 0.0)
        # dot
        r_tp = tl.dot(C_tn, tl.trans(H_pn), input_precision=PREC)
        in_t = tl.sum(r_tp * dy_tp.to(tl.float32), axis=1) * in_q
        if TMA:
            cross_pp = tl.dot(H_pn, tl.trans(dH_pn), input_precision=PREC)
            cross_p = tl.sum(tl.where(pp[:, None] == pp[None, :], cross_pp, 0.0), axis=1) * gamma
        else:
            cross_p = tl.sum(H_pn.to(tl.float32) * dH_pn.to(tl.float32), axis=1) * gamma
        xw_sp = operand(x_sp * out_q[:, None], x_sp.dtype, PREC)
        dyw_tp = operand(dy_tp * in_q[:, None], x_sp.dtype, PREC)
        dB_sn = tl.dot(xw_sp, dH_pn, dB_sn, input_precision=PREC)
        dC_tn = tl.dot(dyw_tp, H_pn, dC_tn, input_precision=PREC)
        dB_sn, dC_tn = pin(dB_sn, PIN), pin(dC_tn, PIN)
        # store
        row = ((pb * BH + bh).to(tl.int64) * NC + c) * PB
        tl.store(cross_ptr + row + pp, cross_p)
        tl.store(series_at(series_ptr, pb * SET + SERIES_IN, bh, c, BH, NC, Q) + q, in_t)
    at = (pid.to(tl.int64) * Q + q[:, None]) * N + n[None, :]
    mask_1n = (n < N)[None, :]
    tl.store(parts_ptr + at, dB_sn, mask=mask_1n)
    at = ((PROGRAMS + pid).to(tl.int64) * Q + q[:, None]) * N + n[None, :]
    tl.store(parts_ptr + at, dC_tn, mask=mask_1n)


@jit
def chunk_kernel(
    x_mem, dy_mem, B_mem, C_mem, series_mem, borders_mem, dx_mem,
    series_ptr, end_ptr, run_ptr, D_ptr, W_ptr, parts_ptr, cross_ptr,
    x_row, dy_row, B_row, C_row, dx_row, borders_row,
    L, NC, H, BH, G, HPG, NPB, P, N, NSPLIT, HPS, PROGRAMS,
    HAS_SEQ: tl.constexpr, Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr,
    PREC: tl.constexpr, PIN: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """What the gradients need of each chunk: two kernels in one launch.

    Grid 2 · b · c · g · splits. Even programs run `dx_part` and odd ones `bc_part`, for the same
    chunk and the same share of a group's heads. Neighbours run at the same time, so that whichever
    comes second finds x, dy and dH in the L2 cache: they come from memory once instead of twice.
    One program for both would need more registers than there are.
    """
    pid = tl.program_id(0) // 2
    g = (pid // NSPLIT) % G
    c = (pid // NSPLIT // G) % NC
    b = pid // NSPLIT // G // NC
    first = g * HPG + pid % NSPLIT * HPS  # of its heads
    last = tl.minimum(first + HPS, g * HPG + HPG)
    if tl.program_id(0) % 2 == 0:
        dx_part(
            pid, x_mem, dy_mem, B_mem, C_mem, series_mem, borders_mem, dx_mem,
            series_ptr, end_ptr, run_ptr, D_ptr, W_ptr,
            x_row, dy_row, B_row, C_row, dx_row, borders_row,
            b, c, g, first, last, L, NC, H, BH, NPB, P, N,
            HAS_SEQ, Q, PB, NB, PREC, STAGES, TMA,
        )  # fmt: skip
    else:
        # Two stages here: a third set of four tiles would leave room for one program only.
        bc_part(
            pid, x_mem, dy_mem, C_mem, series_mem, borders_mem,
            series_ptr, end_ptr, run_ptr, parts_ptr, cross_ptr, x_row, dy_row, C_row, borders_row,
            b, c, g, first, last, L, NC, H, BH, NPB, P, N, PROGRAMS,
            HAS_SEQ, Q, PB, NB, PREC, PIN, 2, TMA,
        )  # fmt: skip


@jit
def total_kernel(
    B_mem, C_mem, W_ptr, parts_ptr, dB_ptr, dC_ptr, B_row, C_row, dB_sl,
    L, NC, G, N, NSPLIT, PROGRAMS,
    Q: tl.constexpr, NB: tl.constexpr, PREC: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dB = sum over shares of W C + their dB, dC = sum over shares of W^T B + their dC.

    Grid (b · c · g, n/NB). Tiles (q, n). Masked: columns past n, positions past l.
    """
    pid = tl.program_id(0)
    nb = tl.program_id(1)
    g = pid % G
    c = (pid // G) % NC
    b = pid // G // NC
    q = tl.arange(0, Q)
    n = nb * NB + tl.arange(0, NB)
    mask_1n = (n < N)[None, :]
    B_sn = load_rows(B_mem, B_row, b, g, c * Q, nb * NB, L, N, Q, NB, TMA)
    C_tn = load_rows(C_mem, C_row, b, g, c * Q, nb * NB, L, N, Q, NB, TMA)
    dB_sn = tl.zeros((Q, NB), tl.float32)
    dC_tn = tl.zeros((Q, NB), tl.float32)
    for k in range(0, NSPLIT):
        # load
        share = pid * NSPLIT + k
        W_st = tl.load(W_ptr + (share.to(tl.int64) * Q + q[:, None]) * Q + q[None, :])
        at = (share.to(tl.int64) * Q + q[:, None]) * N + n[None, :]
        dB_sn += tl.load(parts_ptr + at, mask=mask_1n, other=0.0)
        at = ((PROGRAMS + share).to(tl.int64) * Q + q[:, None]) * N + n[None, :]
        dC_tn += tl.load(parts_ptr + at, mask=mask_1n, other=0.0)
        # dot
        dB_sn = tl.dot(W_st, C_tn, dB_sn, input_precision=PREC)
        dC_tn = tl.dot(tl.trans(W_st), B_sn, dC_tn, input_precision=PREC)
    # store
    at = (b.to(tl.int64) * L + c * Q + q[:, None]) * dB_sl + g * N + n[None, :]
    mask_qn = (c * Q + q < L)[:, None] & (n < N)[None, :]
    tl.store(dB_ptr + at, dB_sn.to(dB_ptr.dtype.element_ty), mask=mask_qn)
    tl.store(dC_ptr + at, dC_tn.to(dC_ptr.dtype.element_ty), mask=mask_qn)


@jit
def chain_kernel(
    dt_ptr, A_ptr, bias_ptr, series_ptr, cross_ptr, ddt_ptr, sums_ptr,
    ddt_sl, low, high, L, NC, H, BH, NPB,
    RAW: tl.constexpr, Q: tl.constexpr, PB: tl.constexpr, HB: tl.constexpr,
):  # fmt: skip
    """The gradient of the step dt_j A is all that flows across position j, from s < j to t >= j:

        f_j   = sum_{t>=j} (row_t - dt_t col_t) + sum_{t>=j} in_t + sum_{s<j} dt_s out_s + cross
                inside the chunk                  from before       to after               past it
        ddt_j = col_j + out_j + A f_j
        dA    = sum_j dt_j f_j

    RAW: to the inputs of softplus(dt + bias), where it is not cut off, and of A = -exp(A_log):

        draw_j = ddt_j · sigmoid(dt_j + bias);  dbias = sum_j draw_j;  dA_log = A · dA

    Grid (b·c, h / HB). Tile (q, h).

    Row and column sums come from the same fp32 products, and no suffix sum is a total
    minus a prefix sum: either would cancel badly where the decay is strong.

        load row, col, in, out, and out one position earlier; add up the parts of the headdim
        f <- reversed cumulative sums + forward cumulative sum + cross
        store ddt, and this chunk's part of dD, dA (and dbias)

    Masked: heads past h, positions past l (their dt is 0).
    """
    bc = tl.program_id(0)
    b = bc // NC
    c = bc % NC
    h = tl.program_id(1) * HB + tl.arange(0, HB)
    q = tl.arange(0, Q)
    pp = tl.arange(0, PB)
    mask_h = h < H
    mask_1h = mask_h[None, :]
    mask_before = mask_h[None, :] & (q > 0)[:, None]
    bh = b * H + h
    # load
    dt_at = series_at(series_ptr, SERIES_DT, bh, c, BH, NC, Q)[None, :] + q[:, None]
    dt_qh = tl.load(dt_at, mask=mask_1h, other=0.0)
    dt_before_qh = tl.load(dt_at - 1, mask=mask_before, other=0.0)
    A_h = tl.load(A_ptr + h, mask=mask_h, other=0.0).to(tl.float32)
    if RAW:
        A_h = -tl.exp(A_h)
    row_qh = tl.zeros(dt_qh.shape, tl.float32)
    col_qh = tl.zeros(dt_qh.shape, tl.float32)
    in_qh = tl.zeros(dt_qh.shape, tl.float32)
    out_qh = tl.zeros(dt_qh.shape, tl.float32)
    before_qh = tl.zeros(dt_qh.shape, tl.float32)
    xdy_qh = tl.zeros(dt_qh.shape, tl.float32)
    cross_h = tl.zeros(h.shape, tl.float32)
    for pb in range(0, NPB):
        row_at = series_at(series_ptr, pb * SET + SERIES_ROW, bh, c, BH, NC, Q)
        col_at = series_at(series_ptr, pb * SET + SERIES_COL, bh, c, BH, NC, Q)
        out_at = series_at(series_ptr, pb * SET + SERIES_OUT, bh, c, BH, NC, Q)
        in_at = series_at(series_ptr, pb * SET + SERIES_IN, bh, c, BH, NC, Q)
        row_qh += tl.load(row_at[None, :] + q[:, None], mask=mask_1h, other=0.0)
        col_qh += tl.load(col_at[None, :] + q[:, None], mask=mask_1h, other=0.0)
        out_qh += tl.load(out_at[None, :] + q[:, None], mask=mask_1h, other=0.0)
        before_qh += tl.load(out_at[None, :] + q[:, None] - 1, mask=mask_before, other=0.0)
        in_qh += tl.load(in_at[None, :] + q[:, None], mask=mask_1h, other=0.0)
        xdy_at = series_at(series_ptr, pb * SET + SERIES_XDY, bh, c, BH, NC, Q)
        xdy_qh += tl.load(xdy_at[None, :] + q[:, None], mask=mask_1h, other=0.0)
        row = ((pb * BH + bh).to(tl.int64) * NC + c) * PB
        cross_at = cross_ptr + row[:, None] + pp[None, :]
        cross_h += tl.sum(tl.load(cross_at, mask=mask_h[:, None], other=0.0), axis=1)
    # decay
    f_qh = tl.cumsum(row_qh - dt_qh * col_qh, axis=0, reverse=True)
    f_qh += tl.cumsum(in_qh, axis=0, reverse=True)
    f_qh += tl.cumsum(dt_before_qh * before_qh, axis=0) + cross_h[None, :]
    ddt_qh = col_qh + out_qh + A_h[None, :] * f_qh
    dA_h = tl.sum(dt_qh * f_qh, axis=0)
    # store
    sums_ptr += bc.to(tl.int64) * ((2 + RAW) * H) + h
    at_qh = (b.to(tl.int64) * L + c * Q + q[:, None]) * ddt_sl + h[None, :]
    mask_qh = mask_h[None, :] & (c * Q + q < L)[:, None]
    if RAW:
        raw_qh = tl.load(dt_ptr + at_qh, mask=mask_qh, other=0.0).to(tl.float32)
        raw_qh += tl.load(bias_ptr + h, mask=mask_h, other=0.0).to(tl.float32)[None, :]
        step_qh = softplus(raw_qh)
        cut_qh = (step_qh < low) | (step_qh > high)  # not where it is NaN, as is the gradient then
        ddt_qh = tl.where(mask_qh & ~cut_qh, ddt_qh * tl.sigmoid(raw_qh), 0.0)
        dA_h *= A_h
        tl.store(sums_ptr + 2 * H, tl.sum(ddt_qh, axis=0), mask=mask_h)
    tl.store(ddt_ptr + at_qh, ddt_qh.to(ddt_ptr.dtype.element_ty), mask=mask_qh)
    tl.store(sums_ptr + H, dA_h, mask=mask_h)
    tl.store(sums_ptr, tl.sum(xdy_qh, axis=0), mask=mask_h)


# SSD: launches ------------------------------------------------------------------------------------


class _Settings(NamedTuple):
    """Tiles and launches of SSD's kernels, on a kind of GPU, by size of numbers and of d_state."""

    kind: str
    Q: int  # positions in a chunk
    PB: int  # rows of a tile of the state
    warps: int
    stages: int  # of the pipeline: tiles are fetched one iteration less than that ahead
    programs: int  # that run at once on a multiprocessor
    finish: int  # warps of total_kernel and chain_kernel

    @property
    def TMA(self) -> bool:
        return self.kind == "tma" or INTERPRET and not PORTABLE


# By (kind of GPU, bytes per number, whether d_state is 256). "tma" is Hopper, with a tensor memory
# accelerator and 227 KB of shared memory for one program. Q = 64 is the narrowest tile that its
# matrix instruction takes, and work in a chunk grows with Q. PB is 64 even when the headdim is
# less: a padded tile costs little, and with narrower ones Triton 3.4-3.7 has been seen to
# miscompile. Where tiles would be more than 16 KB each (d_state 256, or fp32), Q is halved and
# twice the warps share the work. In 4 bytes Hopper runs the portable kernels: its own spilled 3 KB
# in chunk_kernel, which took 7 to 20% longer in fp32 (16% less in fp16), and 16 KB for a d_state of
# 256, which took 30 times as long as 128.
#
# "portable" is all others from compute capability 8.0 on, with 99 KB: one program of 8 warps, for 4
# spill registers, and tiles one iteration ahead. (Blackwell has a tensor memory accelerator, but
# with it Triton 3.6 cannot compile walk_kernel for data centers' GPUs, and spills 3 KB in
# chunk_kernel for others.) "cdna" is AMD's MI300, where a warp is twice as wide and a program has
# 64 KB. Rows that are missing do not fit.
_IN_4_BYTES = _Settings("portable", 32, 32, 8, 2, 1, 8)
SETTINGS = {
    ("tma", 2, False): _Settings("tma", 64, 64, 4, 3, 2, 4),
    ("tma", 2, True): _Settings("tma", 32, 64, 8, 3, 2, 4),
    ("tma", 4, False): _IN_4_BYTES,
    ("portable", 2, False): _Settings("portable", 64, 64, 8, 2, 1, 4),
    ("portable", 2, True): _Settings("portable", 32, 64, 8, 2, 1, 4),
    ("portable", 4, False): _IN_4_BYTES,
    ("cdna", 2, False): _Settings("cdna", 64, 64, 4, 2, 1, 4),
}
# Choose the portable settings, which serve any NVIDIA GPU, where others would be.
PORTABLE = os.environ.get("MAMBA2_KERNELS") == "portable"


@functools.cache
def _kind(device: torch.device) -> str | None:
    """Which rows of SETTINGS are for this device."""
    if device.type != "cuda":  # the interpreter's
        return "portable" if PORTABLE else "tma"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return "cdna" if properties.gcnArchName.startswith("gfx942") else None
    memory = getattr(properties, "shared_memory_per_block_optin", 0)
    if properties.major == 9 and memory >= 227 * 1024 and not PORTABLE:
        return "tma"
    return "portable" if properties.major >= 8 and memory >= 99 * 1024 else None


def _settings(device: torch.device, dtype: torch.dtype, n: int) -> _Settings | None:
    """Those for a dtype, of which fp16 is read as fp32, and a d_state; None if there are none."""
    return SETTINGS.get((_kind(device), 2 if dtype == torch.bfloat16 else 4, n == 256))


@torch.compiler.assume_constant_result
def _has_settings(device: torch.device, dtype: torch.dtype, n: int) -> bool:
    return _settings(device, dtype, n) is not None


def _operands(settings, *tensors):
    """The tensors as the kernels read them, and the precision of their products.

    The range of fp16 is too small for what multiplies in here, such as dt (B·C). So fp16 is read as
    fp32, multiplied as tf32, which has fp16's 10 bits and fp32's range, and accumulated in fp32.
    """
    x, precision = tensors[0], "ieee"
    if x.dtype == torch.float16:
        tensors, precision = [t.float() for t in tensors], "tf32"
    elif x.dtype == torch.float32 and x.is_cuda and _allows_tf32():
        precision = "tf32"
    return *(_addressable(t, not settings.TMA) for t in tensors), precision


@functools.cache
def _processors(device: torch.device) -> int:
    """How many multiprocessors a GPU has."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def _segments(programs, nc, slots):
    """Into how many segments to cut the sequence, so that no more than one wave runs."""
    return max(1, min(slots // programs, nc // 4, 16))


def _split(heads, programs, slots):
    """Cut the heads of a group in (parts, heads per part), so that one wave of programs is full."""
    size = triton.cdiv(heads, max(1, min(heads, slots // programs)))
    return triton.cdiv(heads, size), size


def _addressable(t, even):
    """t where it lies, or a copy if the kernels cannot read it there: they want a contiguous last
    axis, a base and strides that are multiples of 16 bytes, and by pointers (even) the rows of all
    batch elements one after another, and heads side by side."""
    step = 16 // t.element_size()
    fine = t.data_ptr() % 16 == 0 and _aligned(t.shape, t.stride(), step, even)
    return t if fine else t.clone(memory_format=torch.contiguous_format)


@functools.lru_cache(1024)
def _aligned(shape, strides, step, even):
    (b, l, h, w), (sb, sl, sh, _) = shape, strides
    if even and not (h == 1 or sh == w) or even and b > 1 and l > 1 and sb != l * sl:
        return False
    pairs = zip(shape[:-1], strides[:-1], strict=True)
    return strides[-1] == 1 and all(n == 1 or (s > 0 and s % step == 0) for n, s in pairs)


def _row(t, TMA):
    """How many times 16 bytes the rows of t (b, l, h, w) are apart; a descriptor needs no such."""
    if TMA or t is None:
        return 0
    (b, l, h, w), (sb, sl, *_) = t.shape, t.stride()
    return (sl if l > 1 else sb if b > 1 else h * w) * t.element_size() // 16


def _tiling(t, *block):
    """What makes a descriptor of t in tiles (Q, W), one head's positions: t is (b, l, h, w), and
    seen as (b, h, l, w). What a tile has outside t reads as zero and is not written."""
    (b, l, h, w), (sb, sl, sh, _) = t.shape, t.stride()
    # The stride along an axis of size 1 may be anything, but has to be addressable.
    strides = [sb if b > 1 else 16, sh if h > 1 else 16, sl if l > 1 else 16, 1]
    return [b, h, l, w], strides, [1, 1, *block]


def _strides(name, t, axes):
    """Strides by name; 0 for those that t does not have, or if it is None."""
    strides = (*(() if t is None else t.stride()), 0, 0, 0, 0)
    return {f"{name}_s{axis}": stride for axis, stride in zip(axes, strides, strict=False)}


SIZES = 16, 32, 64, 128, 256  # of headdim and d_state


def _ssd_new(x, dt, A, B, *_):
    (b, _, h, p), n = x.shape, B.shape[3]
    return x.new_empty(x.shape), x.new_empty(b, h, p, n, dtype=torch.float32)


@_planned
def _ssd_plan(
    settings, Q, precision, bias, low, high, x, dt, B, C, D, init, seq_idx,
    dy=None, dfinal=None, dx=None, ddt=None, dB=None,
):  # fmt: skip
    """The launches of the forward or, with dy, of the backward; and the numbers that they take."""
    (b, l, h, p), (g, n), PB, TMA = x.shape, B.shape[2:], settings.PB, settings.TMA
    nc, npb, NB = triton.cdiv(l, Q), triton.cdiv(p, PB), max(64, n)
    slots = settings.programs * _processors(x.device)
    cps = triton.cdiv(nc, _segments(b * h * npb, nc, slots))
    nsplit, hps = _split(h // g, 2 * b * nc * g, slots)
    nseg, programs = triton.cdiv(nc, cps), b * nc * g * nsplit
    series = SERIES_ROW.value + (0 if dy is None else SET.value * npb)
    numbers = dict(
        x_row=_row(x, TMA), B_row=_row(B, TMA), C_row=_row(C, TMA), dy_row=_row(dy, TMA),
        dx_row=_row(dx, TMA), borders_row=n * x.element_size() // 16,
        **_strides("dt", dt, "blh"), **_strides("i", init, "bhpn"), **_strides("ddt", ddt, "bl"),
        **_strides("seq", seq_idx, "bl"), **_strides("f", dfinal, "bhpn"),
        **_strides("dB", dB, "bl"), low=low, high=high, L=l, NC=nc, H=h, BH=b * h, G=g, HPG=h // g,
        P=p, N=n, NPB=npb, NSEG=nseg, WALKS=nseg - 1, CPS=cps, NSPLIT=nsplit, HPS=hps,
        PROGRAMS=programs, RAW=bias is not None, HAS_SEQ=seq_idx is not None,
        HAS_INIT=init is not None, HAS_D=D is not None, HAS_DFINAL=dfinal is not None,
        SEGMENTS=nseg > 1, SERIES=series, Q=Q, PB=PB, NB=NB, HB=16, PREC=precision,
        STAGES=settings.stages, TMA=TMA,
        PIN=x.element_size() == 2 and not INTERPRET and settings.kind != "cdna",
    )  # fmt: skip
    narrow = numbers | dict(B_mem="B_narrow_mem", C_mem="C_narrow_mem", NB=64)
    tiles = dict(
        x_mem=_tiling(x, Q, PB), B_mem=_tiling(B, Q, NB), C_mem=_tiling(C, Q, NB),
        B_narrow_mem=_tiling(B, Q, 64), C_narrow_mem=_tiling(C, Q, 64),
        series_mem=([series * b * h, nc * Q], [nc * Q, 1], [1, Q]),
    )  # fmt: skip
    pipeline, blocks_h = dict(num_stages=settings.stages), triton.cdiv(h, 16)
    options, finish = dict(num_warps=settings.warps, **pipeline), dict(num_warps=settings.finish)
    calls = [(prep_kernel, (b * nc, blocks_h, 1), numbers, dict(num_warps=4))]
    if dy is None:
        if nseg > 1:
            grid = b * (nseg - 1) * h * npb, triton.cdiv(n, 64), 1
            segments = narrow | dict(dy_mem="x_mem", BORDERS=False)
            calls.append((walk_kernel, grid, segments, dict(num_warps=4, **pipeline)))
        calls.append((scan_kernel, (b * nseg * h * npb, 1, 1), numbers, options))
    else:
        of_borders = [2 * b * h * nc, 1, p, n], [p * n, 16, n, 1], [1, 1, PB, NB]
        tiles.update(dy_mem=_tiling(dy, Q, PB), dx_mem=_tiling(dx, Q, PB), borders_mem=of_borders)
        borders = numbers | dict(BORDERS=True, NSEG=1, WALKS=1, CPS=nc)
        calls += [
            (walk_kernel, (b * h * npb, 1, 2), borders, options),
            (chunk_kernel, (2 * programs, 1, 1), numbers, options),
            (total_kernel, (b * nc * g, triton.cdiv(n, 64), 1), narrow, finish),
            (chain_kernel, (b * nc, blocks_h, 1), numbers, finish),
        ]
    return _Plan(*calls, tiles=tiles if TMA else ()), numbers


def _ssd_tensors(numbers, bias, x, dt, A, B, C, D, init, seq_idx):
    """The tensors that both directions' kernels take."""
    b, (count, h, nc, Q) = len(x), (numbers[name] for name in ("SERIES", "H", "NC", "Q"))
    series = torch.empty(count * b * h, nc * Q, device=x.device, dtype=torch.float32)
    end = run = torch.empty(b * h, nc, device=x.device, dtype=torch.float32)
    if seq_idx is not None:  # else nobody reads run
        run = torch.empty(b, nc * Q, device=x.device, dtype=torch.int32)
    return dict(
        x_mem=x, B_mem=B, C_mem=C, B_narrow_mem=B, C_narrow_mem=C, series_mem=series,
        series_ptr=series, end_ptr=end, run_ptr=run, dt_ptr=dt, A_ptr=A, bias_ptr=bias, D_ptr=D,
        init_ptr=init, seq_ptr=seq_idx,
    )  # fmt: skip


def _ssd_forward(
    y, final, x, dt, A, B, C, D, initial_state, seq_idx, bias=None, low=0.0, high=0.0
):  # fmt: skip
    """With a bias, that of dt, and the limits of dt, dt and A are raw: see `prep_kernel`."""
    settings = _settings(x.device, x.dtype, B.shape[3])
    x, B, C, precision = _operands(settings, x, B, C)
    bias, A, D = _contiguous(bias, A, D)
    if precision == "ieee" and x.dtype == torch.float32 and not INTERPRET:
        # Three tf32 products make one of 22 bits, on the tensor cores. True fp32 products need more
        # registers than there are, and ten times as long.
        precision = "tf32x3"
    if initial_state is None and settings.warps == 8:
        # Where the state begins as a constant zero, Triton 3.6 makes code for Hopper that gets y
        # wrong from the second chunk on: seen in tf32. So it is read, as any other state.
        initial_state = torch.zeros_like(final)
    known = settings, settings.Q, precision, bias, low, high
    plan, numbers = _ssd_plan(*known, x, dt, B, C, D, initial_state, seq_idx)
    tensors = _ssd_tensors(numbers, bias, x, dt, A, B, C, D, initial_state, seq_idx)
    (b, h, p, n), nseg = final.shape, numbers["NSEG"]
    if nseg > 1:
        tensors["seg_ptr"] = final.new_empty(b, nseg, h, p, n)
        tensors["decay_ptr"] = final.new_empty(b, nseg, h)
    plan(**tensors, y_ptr=y, final_ptr=final)


def _ssd_backward(
    dy, dfinal, x, dt, A, B, C, D, initial_state, seq_idx, bias=None, low=0.0, high=0.0, into=None
):  # fmt: skip
    """The gradients of x, dt, A, B, C, D, the initial state and, if there is one, the bias.

    into: tensors for those of x, dt, B and C, which else are new. The last two have the same
    strides, and so have dt and its gradient if there is a bias; the rows of different batch
    elements follow one another.
    """
    (b, _, h, p), n = x.shape, B.shape[3]
    dx_to, ddt, dB, dC = into or [_gradient(t, x) for t in (x, dt, B, C)]
    dinit = _gradient(initial_state, x)
    settings = _settings(x.device, x.dtype, n)
    dy = torch.zeros_like(x) if dy is None else dy
    x, B, C, dy, precision = _operands(settings, x, B, C, dy)
    bias, A, given_D = _contiguous(bias, A, torch.zeros_like(A) if D is None else D)
    dx, Q = dx_to if dx_to.dtype == x.dtype else torch.empty_like(x), settings.Q
    if precision == "ieee" and x.element_size() == 4:
        Q = 16  # chunk_kernel spills 2 KB with 32, as a product that is true fp32 takes registers
    known = settings, Q, precision, bias, low, high
    inputs = x, dt, B, C, given_D, initial_state, seq_idx
    plan, numbers = _ssd_plan(*known, *inputs, dy, dfinal, dx, ddt, dB)
    nc, npb, programs = (numbers[name] for name in ("NC", "NPB", "PROGRAMS"))
    f32 = dict(device=x.device, dtype=torch.float32)
    sums = torch.empty(b * nc, (2 if bias is None else 3) * h, **f32)
    inputs = x, dt, A, B, C, given_D, initial_state, seq_idx
    plan(
        **_ssd_tensors(numbers, bias, *inputs),
        dy_mem=dy, dx_mem=dx, borders_mem=x.new_empty(2 * b * h * nc, p, n),
        dfinal_ptr=dfinal, dinit_ptr=dinit, W_ptr=x.new_empty(programs, Q, Q),
        parts_ptr=torch.empty(2 * programs, Q, n, **f32),
        cross_ptr=torch.empty(npb * b * h, nc, settings.PB, **f32), sums_ptr=sums, dB_ptr=dB,
        dC_ptr=dC, ddt_ptr=ddt,
    )  # fmt: skip
    if dx is not dx_to:
        dx_to.copy_(dx)
    dD, dA, *dbias = _sums(sums, *(t for t in (given_D, A, bias) if t is not None))
    return [dx_to, ddt, dA, dB, dC, x.new_empty(0) if D is None else dD, dinit, *dbias]


def _ssd_limit(sizes, x, dt, A, B, C, D, *_):
    h, p = sizes["h"], sizes["p"]
    if h % sizes["g"] or D is not None and D.shape not in ((h,), (h, p)):
        return ""
    if D is not None and D.dim() == 2:
        return "D is (h, p); it must be (h)"
    if not x.dtype == B.dtype == C.dtype:
        return f"x, B and C are {x.dtype}, {B.dtype} and {C.dtype}; they must have one dtype"
    return _state_limit(x, p, sizes["n"])


def _state_limit(x, p, n):
    if p not in SIZES or n not in SIZES:
        return f"headdim is {p} and d_state is {n}; they must be of {SIZES}"
    known = _has_settings(x.device, x.dtype, n)
    return None if known else f"no settings for a d_state of {n} in {x.dtype} fit this kind of GPU"


SSD = _Operation(
    "ssd",
    "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? initial_state, "
    "Tensor? seq_idx) -> (Tensor, Tensor)",
    axes="b l h p, b l h, h, b l g n, b l g n, ..., b h p n, b l", limit=_ssd_limit,
    new=_ssd_new, run=_ssd_forward, backward=_ssd_backward,
)  # fmt: skip


def ssd(x, dt, A, B, C, D=None, *, initial_state=None, seq_idx=None):
    """As its twin, `mamba2.ssd`, but for a D per channel; the size of chunks is the kernels' own.

    A may be positive: results and gradients are right unless a state grows by 2^127 or more within
    64 positions, which is where fp32 ends. A dt below 0, which softplus never returns, counts as
    NaN. (The twin computes with such a dt; here its sign would cost one more product per pair of
    positions, and an error a wait for the GPU.)

    x, B and C may be slices of one larger tensor: they are read where they lie if their rows are
    16-byte aligned, and copied otherwise, as float16 always is: to float32, for its range.
    """
    return SSD(x, dt, A, B, C, D, initial_state, seq_idx)


# ---- Causal depthwise convolution + bias + SiLU --------------------------------------------------
# u is the initial state (k-1 inputs) followed by x, and i counts positions back from t:
#
#     v[t] = bias + Σ_i weight[k-1-i] · u[t-i]        i = 0 .. k-1
#     y[t] = v[t] · σ(v[t])
#
# With seq_idx a term counts only if no sequence begins in (t-i, t].
#
# Backward, with dv[t] = dy[t] · silu'(v[t]), and the same condition,
#
#     dx[s]       = Σ_i weight[k-1-i] · dv[s+i]     (and the same for the state, s < 0)
#     dweight[j]  = Σ_t dv[t] · u[t-(k-1)+j]
#     dbias       = Σ_t dv[t]
#
# A program walks down its `q_rows` positions, D channels wide; backward also the k-1 after them,
# because dv[s+i] reaches back. What it needs of other positions stays in registers, so that each
# row is loaded, and turned into fp32, once (k-1 rows twice, at the borders of the blocks), and
# every sigmoid is computed once:
#
#            D
#        ┌────────┐   x_window   u[t-k+1] .. u[t-1]      known inputs, for v[t]
#        │        │   pending    dx[t-k+1] .. dx[t-1]    sums that still miss a term
#        ├────────┤
#     R  │        │   x_rows     u[t] .. u[t+R-1]        dy_rows likewise
#        └────────┘
#
# Tiles, chosen by hand on an H200: D channels wide (128 and 256 divide the published widths, 1792 =
# 7 · 256 and 5376 = 21 · 256), four to a thread; R rows loaded together; a program walks so many
# positions. Forward: eight rows in flight cover the latency of memory; with four it is 2 % slower,
# with one warp 9 %.
CONV_FORWARD = dict(R=8, D=256, num_warps=2, walks=(64,))
# Backward: 17 values a channel (window, unfinished dx, taps, their sums, bias and its sum) stay in
# registers, so only four rows of x and dy are in flight. Long walks write fewer partial sums; short
# ones are for inputs that long ones would cut in too few programs.
CONV_BACKWARD = dict(R=4, D=128, num_warps=1, walks=(256, 128))


@triton.jit
def _if(exists, channel, d):
    """Mask for a row of d channels: all of them if the row exists, else none."""
    return channel < tl.where(exists, d, 0)


# The taps are weight[i], which looks i positions back; x_window[i-1] is u[t-i], and u[i] is u[t-i];
# `start` is where the sequence of position t begins, or some position before the window.


@triton.jit
def _conv_first(
    x_ptr, x_row, weight_ptr, bias_ptr, state_ptr, seq_ptr, t, channel, d,
    K: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr, SEQ: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Bias and taps; the k-1 inputs before position t, those before 0 from the state; and `start`
    of the position before t, where the first sequence begins before position 0."""
    mask_d = channel < d
    bias_d = tl.zeros((D,), tl.float32)
    if BIAS:
        bias_d = tl.load(bias_ptr + channel, mask=mask_d, other=0.0).to(tl.float32)
    weight = ()
    for i in tl.static_range(K):
        weight_d = tl.load(weight_ptr + channel * K + K - 1 - i, mask=mask_d, other=0.0)
        weight += (weight_d.to(tl.float32),)
    x_window = ()
    for i in tl.static_range(1, K):
        mask_new_d = _if(t - i >= 0, channel, d)
        u_d = tl.load(x_ptr + (t - i) * x_row + channel, mask=mask_new_d, other=0.0).to(tl.float32)
        if STATE:
            mask_old_d = _if(t - i < 0, channel, d)
            at_d = (K - 1 + t - i) * d + channel
            u_d += tl.load(state_ptr + at_d, mask=mask_old_d, other=0.0).to(tl.float32)
        x_window += (u_d,)
    start = t - K
    if SEQ:
        for i in tl.static_range(1, K):
            after = tl.load(seq_ptr + tl.maximum(t - i + 1, 0))
            if tl.load(seq_ptr + tl.maximum(t - i, 0)) != after:
                start = tl.maximum(start, t - i + 1)
    return bias_d, weight, x_window, start


@triton.jit
def _conv_seen(term_d, i: tl.constexpr, t, start, SEQ: tl.constexpr):
    """A term between t-i and t, or 0 if a sequence begins in (t-i, t]."""
    if SEQ and i > 0:
        term_d = tl.where(t - i >= start, term_d, 0.0)
    return term_d


@triton.jit
def _conv_rows(ptr, row, t0, end, channel, d, R: tl.constexpr):
    """R rows from t0 on, loaded before the first is used, so that their latencies overlap."""
    rows = ()
    for j in tl.static_range(R):
        mask_d = _if(t0 + j < end, channel, d)
        rows += (tl.load(ptr + j * row + channel, mask=mask_d, other=0.0),)
    return rows


@triton.jit
def _zeros(count: tl.constexpr, D: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(count):
        zeros += (tl.zeros((D,), tl.float32),)
    return zeros


@triton.jit
def _conv_final(
    x_ptr, x_row, state_ptr, seq_ptr, final_ptr, channel, l, d,
    K: tl.constexpr, STATE: tl.constexpr, SEQ: tl.constexpr,
):  # fmt: skip
    """final[j] = u[l-(k-1)+j], the newest row first; 0 if a sequence begins after it."""
    joined = l > 0
    for i in tl.static_range(1, K):
        t = l - i
        if SEQ and i > 1:
            after = tl.load(seq_ptr + tl.maximum(t + 1, 0))
            joined = joined & (tl.load(seq_ptr + tl.maximum(t, 0)) == after)
        mask_new_d = _if(joined & (t >= 0), channel, d)
        row_d = tl.load(x_ptr + t * x_row + channel, mask=mask_new_d, other=0.0)
        if STATE:
            mask_old_d = _if(joined & (t < 0), channel, d)
            at_d = (K - 1 + t) * d + channel
            row_d += tl.load(state_ptr + at_d, mask=mask_old_d, other=0.0).to(row_d.dtype)
        tl.store(final_ptr + (K - 1 - i) * d + channel, row_d, mask=channel < d)


@jit
def _conv_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, seq_ptr, y_ptr, final_ptr,
    dy_ptr, dfinal_ptr, dx_ptr, dstate_ptr, partial_ptr,
    l, q_rows, d_units, x_batch_units, x_row_units, dx_row_units,
    UNIT: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr, SEQ: tl.constexpr,
    BACKWARD: tl.constexpr, DFINAL: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """y and final, the last k-1 rows of u, or BACKWARD dx, dweight and dbias, as above.

    Grid: (batch · blocks of q · blocks of d,), d fastest: neighbours read neighbouring memory.

        for t in q0 .. end - 1, or end + k-2, R rows at a time:
            v = bias + weight · (u[t], x_window)             # 0 if a sequence begins in (t-i, t]
            forward:  y[t] = v * sigmoid(v)
            backward: dv = dy[t] * sigmoid(v) * (1 + v * (1 - sigmoid(v)))
                      dweight, dbias += dv * (u[t], x_window), dv          # while t < end
                      pending += weight * dv;  dx[t-k+1] is complete: store it

    Backward, a program leaves a row: K sums per channel, as in weight (d, k), then one per channel.
    Masked: channels past d, rows past l, dx of others' positions. Before 0 comes the state.
    """
    d = d_units * UNIT
    blocks_d = tl.cdiv(d, D)
    blocks_q = tl.cdiv(l, q_rows)
    block = tl.program_id(0) // blocks_d  # of positions, in all batch elements
    batch = (block // blocks_q).to(tl.int64)
    q0 = block % blocks_q * q_rows
    end = tl.minimum(q0 + q_rows, l)
    channel = (tl.program_id(0) % blocks_d) * D + tl.arange(0, D)
    x_row = tl.full((), x_row_units, tl.int64) * UNIT
    y_row = tl.full((), d_units, tl.int64) * UNIT
    x_ptr += batch * x_batch_units * UNIT
    state_ptr += batch * (K - 1) * d
    seq_ptr += batch * l
    if BACKWARD:
        y_ptr = dy_ptr
        dx_row = tl.full((), dx_row_units, tl.int64) * UNIT
        dx_ptr += batch * l * dx_row
        dstate_ptr += batch * (K - 1) * d
        dfinal_ptr += batch * (K - 1) * d
        partial_ptr += block.to(tl.int64) * d * (K + 1)
        dweight = _zeros(K, D)
        pending = _zeros(K - 1, D)
        dbias_d = tl.zeros((D,), tl.float32)
    bias_d, weight, x_window, start = _conv_first(
        x_ptr, x_row, weight_ptr, bias_ptr, state_ptr, seq_ptr, q0, channel, d,
        K, BIAS, STATE, SEQ, D,
    )  # fmt: skip
    x_next_ptr = x_ptr + q0 * x_row
    y_next_ptr = y_ptr + batch * l * d + q0 * y_row
    for t0 in range(q0, end + (K - 1 if BACKWARD else 0), R):
        # load
        x_rows = _conv_rows(x_next_ptr, x_row, t0, l if BACKWARD else end, channel, d, R)
        x_next_ptr += R * x_row
        if BACKWARD:
            dy_rows = _conv_rows(y_next_ptr, y_row, t0, l, channel, d, R)
        for j in tl.static_range(R):
            t = t0 + j
            u = (x_rows[j].to(tl.float32),) + x_window  # u[i] is u[t-i]
            if SEQ:  # past l nothing begins
                before = tl.load(seq_ptr + tl.maximum(tl.minimum(t, l) - 1, 0))
                if tl.load(seq_ptr + tl.minimum(t, l - 1)) != before:
                    start = t

            # taps
            v_d = bias_d
            for i in tl.static_range(K):
                v_d += weight[i] * _conv_seen(u[i], i, t, start, SEQ)
            sigmoid_d = _sigmoid(v_d)
            x_window = u[: K - 1]
            if not BACKWARD:
                # store
                y_d = v_d * sigmoid_d
                tl.store(y_next_ptr + j * y_row + channel, y_d, mask=_if(t < end, channel, d))
            else:
                # weight and bias; rows past `end` are the next program's
                dv_d = dy_rows[j].to(tl.float32) * sigmoid_d * (1.0 + v_d * (1.0 - sigmoid_d))
                own_dv_d = tl.where(t < end, dv_d, 0.0)
                dbias_d += own_dv_d
                # x: dx[t] .. dx[t-k+1] with the terms of dv[t], after which the last is complete
                sums_weight = ()
                sums_x = ()
                for i in tl.static_range(K):
                    sums_weight += (dweight[i] + own_dv_d * _conv_seen(u[i], i, t, start, SEQ),)
                    term_d = _conv_seen(weight[i] * dv_d, i, t, start, SEQ)
                    if i > 0:
                        term_d += pending[i - 1]
                    sums_x += (term_d,)
                dweight = sums_weight
                pending = sums_x[: K - 1]
                # store
                s = t - (K - 1)
                dx_d = sums_x[K - 1]
                if DFINAL:  # row r of the final state is u[l-(k-1)+r]
                    mask_final_d = _if((s >= tl.maximum(start, l - (K - 1))) & (s < l), channel, d)
                    at_d = (s - (l - (K - 1))) * d + channel
                    dx_d += tl.load(dfinal_ptr + at_d, mask=mask_final_d, other=0.0).to(tl.float32)
                mask_s_d = _if((s >= q0) & (s < end), channel, d)
                tl.store(dx_ptr + s * dx_row + channel, dx_d, mask=mask_s_d)
                if STATE:
                    tl.store(dstate_ptr + t * d + channel, dx_d, mask=_if(s < 0, channel, d))
        y_next_ptr += R * y_row

    if BACKWARD:
        for i in tl.static_range(K):
            tl.store(partial_ptr + channel * K + K - 1 - i, dweight[i], mask=channel < d)
        tl.store(partial_ptr + d * K + channel, dbias_d, mask=channel < d)
    elif end == l:
        final_ptr += batch * (K - 1) * d
        _conv_final(x_ptr, x_row, state_ptr, seq_ptr, final_ptr, channel, l, d, K, STATE, SEQ)


@_planned
def _conv_plan(x, weight, bias, state, seq_idx, dfinal=None, dx=None):
    """The plan of either direction, and how many blocks of positions it has. x stands in for
    tensors that are None."""
    (b, l, d), backward = x.shape, dx is not None
    tiles = dict(CONV_BACKWARD if backward else CONV_FORWARD)
    options = dict(num_warps=tiles.pop("num_warps"))
    blocks_d = triton.cdiv(d, tiles["D"])
    for q_rows in tiles.pop("walks"):
        blocks = b * triton.cdiv(l, q_rows)
        if blocks * blocks_d >= 4096:
            break
    unit = _unit(d, *x.stride()[:2], *(dx.stride()[:2] if backward else ()))
    numbers = dict(
        l=l, q_rows=q_rows, d_units=d // unit, x_batch_units=x.stride(0) // unit,
        x_row_units=x.stride(1) // unit, dx_row_units=dx.stride(1) // unit if backward else 0,
        UNIT=unit, K=weight.shape[-1], BIAS=bias is not None, STATE=state is not None,
        SEQ=seq_idx is not None, DFINAL=dfinal is not None, BACKWARD=backward, **tiles,
    )  # fmt: skip
    given = dict(bias_ptr=bias, state_ptr=state, seq_ptr=seq_idx, dfinal_ptr=dfinal)
    numbers.update({name: "x_ptr" for name, tensor in given.items() if tensor is None})
    return _Plan((_conv_kernel, (blocks * blocks_d, 1, 1), numbers, options)), blocks


def _conv_new(x, weight, *_):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], weight.shape[-1] - 1, x.shape[2])


def _conv_forward(y, final, x, weight, bias, state, seq_idx):
    x = x if x.stride(2) == 1 else x.contiguous()
    state = None if state is None else state.to(x.dtype)  # rounds as the twin does
    weight, bias, state, seq_idx = _contiguous(weight, bias, state, seq_idx)
    plan, _ = _conv_plan(x, weight, bias, state, seq_idx)
    plan(
        x_ptr=x, weight_ptr=weight, bias_ptr=bias, state_ptr=state, seq_ptr=seq_idx, y_ptr=y,
        final_ptr=final,
    )  # fmt: skip


def _conv_backward(dy, dfinal, x, weight, bias, state, seq_idx, dx=None):
    """The gradients of all but seq_idx. dx: a tensor for that of x, whose batch elements follow one
    another; else it is new."""
    dx, dstate = _gradient(x, x) if dx is None else dx, _gradient(state, x)
    d, k = x.shape[2], weight.shape[-1]
    x = x if x.stride(2) == 1 else x.contiguous()
    state = None if state is None else state.to(x.dtype)  # as in the forward
    dy = torch.zeros_like(x) if dy is None else dy
    given = _contiguous(weight, bias, state, seq_idx, dy, dfinal)
    weight, bias, state, seq_idx, dy, dfinal = given
    plan, blocks = _conv_plan(x, weight, bias, state, seq_idx, dfinal, dx)
    partial = torch.empty(blocks, d * (k + 1), dtype=torch.float32, device=x.device)
    plan(
        x_ptr=x, weight_ptr=weight, bias_ptr=bias, state_ptr=state, seq_ptr=seq_idx, dy_ptr=dy,
        dfinal_ptr=dfinal, dx_ptr=dx, dstate_ptr=dstate, partial_ptr=partial,
    )  # fmt: skip
    dweight, dbias = _sums(partial, weight, weight[..., 0] if bias is None else bias)
    return [dx, dweight, x.new_empty(0) if bias is None else dbias, dstate]


def _conv_limit(sizes, *_):
    k = sizes["k"]
    return None if 2 <= k <= 4 else f"the convolution has {k} taps; it must be 2 to 4"


CONV = _Operation(
    "causal_conv1d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? seq_idx) -> "
    "(Tensor, Tensor)",
    axes="b l d, d k, d, b k-1 d, b l", limit=_conv_limit,
    new=_conv_new, run=_conv_forward, backward=_conv_backward,
)  # fmt: skip


def causal_conv1d(x, weight, bias=None, *, initial_state=None, seq_idx=None):
    """As its twin, `mamba2.causal_conv1d`. Rows of x may be any distance apart; if its channels are
    not next to each other, it is copied."""
    return CONV(x, weight, bias, initial_state, seq_idx)


# ---- RMSNorm, with a gate or without -------------------------------------------------------------
#     v   = y · silu(z), or y where there is no gate z
#     out = weight · v · scale,   scale = 1 / sqrt(mean of v² over the slice + eps)
#
# A slice of `size` = d / groups channels is cut into TILES tiles of N channels, a power of two, 4
# for each thread (5,120 = 5 · 1,024; one tile would be 8,192 wide). The backward runs 16 warps on
# each multiprocessor, which fill it at 128 registers a thread; left alone, the compiler takes more
# for wide slices, and then only 8 warps fit (5,120 channels: 1.0 ms instead of 0.5). With
# v̂ = v · scale and dv̂ = dout · weight, the backward computes, over a slice
#
#     dv      = scale · (dv̂ - v̂ · mean(dv̂ · v̂))
#     dy, dz  = dv · silu(z), dv · y · silu'(z)     (where there is no gate: dy = dv)
#     dweight = Σ over rows of dout · v̂


@jit
def _norm_kernel(
    y_ptr, z_ptr, weight_ptr, out_ptr, dout_ptr, dy_ptr, dz_ptr, partial_ptr,
    rows, slots, eps, groups, size_units, y_row_units, z_row_units, dy_row_units, dz_row_units,
    GATE: tl.constexpr, BACKWARD: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr,
    N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """out, or BACKWARD dy, dz and dweight, by the equations above.

    Grid: (slots · groups,), groups fastest. Program `slot` takes the blocks of rows slot, slot +
    slots, ...: one alone in the forward. Backward there are about as many programs as run at a
    time, and each keeps its share of dweight in registers. Tile: R rows x one slice, in pieces.

                 N          N          N
           ┌──────────┬──────────┬──────┬ ─ ┐
        R  │          │          │      │   │   -> one scale per row
           └──────────┴──────────┴──────┴ ─ ┘
            <----------- size --------->

        for each block of rows:
            v     = y * silu(z);    scale = 1 / sqrt(mean(v * v) + eps)
            forward:   out  = v * scale * weight
            backward:  mean = scale * Σ dout * weight * v / size
                       dv   = scale * (dout * weight - v * scale * mean)
                       dy   = dv * silu(z);   dz = dv * y * silu'(z);   dweight += dout * v * scale
        backward:  partial[slot] = dweight

    Masked: rows past the end, channels past the slice.
    """
    size = size_units * UNIT
    group = tl.program_id(0) % groups
    slot = tl.program_id(0) // groups
    dweight = ()
    for _ in tl.static_range(TILES):
        dweight += (tl.zeros((R, N), tl.float32),)

    blocks = tl.cdiv(rows, R) if BACKWARD else slot + 1
    for block in range(slot, blocks, slots if BACKWARD else 1):
        r = (block * R + tl.arange(0, R)).to(tl.int64)
        mask_r = r < rows
        y_r1 = (r * y_row_units * UNIT + group * size)[:, None]
        z_r1 = (r * z_row_units * UNIT + group * size)[:, None]
        out_r1 = (r * groups * size + group * size)[:, None]
        dy_r1 = (r * dy_row_units * UNIT + group * size)[:, None]
        dz_r1 = (r * dz_row_units * UNIT + group * size)[:, None]

        # load
        y = ()
        z = ()
        dout = ()
        for i in tl.static_range(TILES):
            n = i * N + tl.arange(0, N)
            mask_rn = mask_r[:, None] & (n < size)[None, :]
            y += (tl.load(y_ptr + y_r1 + n[None, :], mask=mask_rn, other=0.0),)
            if GATE:
                z += (tl.load(z_ptr + z_r1 + n[None, :], mask=mask_rn, other=0.0),)
            if BACKWARD:
                dout += (tl.load(dout_ptr + out_r1 + n[None, :], mask=mask_rn, other=0.0),)

        # scale and mean
        v = ()
        squares_rn = tl.zeros((R, N), tl.float32)
        products_rn = tl.zeros((R, N), tl.float32)
        for i in tl.static_range(TILES):
            v_rn = y[i].to(tl.float32)
            if GATE:
                z_rn = z[i].to(tl.float32)
                v_rn *= z_rn * _sigmoid(z_rn)
            squares_rn += v_rn * v_rn
            if BACKWARD:
                n = i * N + tl.arange(0, N)
                weight_n = tl.load(weight_ptr + group * size + n, mask=n < size, other=0.0)
                products_rn += dout[i].to(tl.float32) * weight_n.to(tl.float32)[None, :] * v_rn
            v += (v_rn,)
        scale_r1 = tl.rsqrt(tl.sum(squares_rn, axis=1) / size + eps)[:, None]
        pull_r1 = scale_r1 * scale_r1 * scale_r1 * (tl.sum(products_rn, axis=1) / size)[:, None]

        # store; backward, v is computed again rather than kept
        sums = ()
        for i in tl.static_range(TILES):
            n = i * N + tl.arange(0, N)
            mask_rn = mask_r[:, None] & (n < size)[None, :]
            weight_n = tl.load(weight_ptr + group * size + n, mask=n < size, other=0.0)
            weight_1n = weight_n.to(tl.float32)[None, :]
            if not BACKWARD:
                tl.store(out_ptr + out_r1 + n[None, :], v[i] * scale_r1 * weight_1n, mask=mask_rn)
            else:
                y_rn = y[i].to(tl.float32)
                dout_rn = dout[i].to(tl.float32)
                v_rn = y_rn
                if GATE:
                    z_rn = z[i].to(tl.float32)
                    sigmoid_rn = _sigmoid(z_rn)
                    silu_rn = z_rn * sigmoid_rn
                    v_rn *= silu_rn
                dv_rn = scale_r1 * (dout_rn * weight_1n) - pull_r1 * v_rn
                dy_rn = dv_rn
                if GATE:
                    dy_rn *= silu_rn
                    dz_rn = dv_rn * y_rn * (sigmoid_rn + silu_rn * (1.0 - sigmoid_rn))
                    tl.store(dz_ptr + dz_r1 + n[None, :], dz_rn, mask=mask_rn)
                tl.store(dy_ptr + dy_r1 + n[None, :], dy_rn, mask=mask_rn)
                sums += (dweight[i] + (scale_r1 * dout_rn) * v_rn,)
        if BACKWARD:
            dweight = sums

    if BACKWARD:
        partial_ptr += (slot * groups + group).to(tl.int64) * size
        for i in tl.static_range(TILES):
            n = i * N + tl.arange(0, N)
            tl.store(partial_ptr + n, tl.sum(dweight[i], axis=0), mask=n < size)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor (..., d), if its rows lie evenly, stride(-2) apart; else a copy."""
    sizes, strides = tensor.shape, tensor.stride()
    even = [strides[i - 1] == sizes[i] * strides[i] for i in range(1, len(sizes) - 1)]
    if len(sizes) > 1 and strides[-1] == 1 and all(even):
        return tensor
    return tensor.reshape(-1, sizes[-1]).contiguous()


@_planned
def _norm_plan(y, z, eps, groups, dy=None, dz=None):
    """The plan of either direction, and how many rows of partial sums the backward writes."""
    rows, size, backward = y.numel() // y.shape[-1], y.shape[-1] // groups, dy is not None
    widths = (1024, 512, 256) if size > 256 else (max(16, triton.next_power_of_2(size)),)
    N = min(widths, key=lambda n: triton.cdiv(size, n) * n)  # with the fewest channels too many
    tiles = triton.cdiv(size, N)
    R = max(1, 1024 // triton.next_power_of_2(N * tiles))  # rows of short slices together
    named, warps, slots = dict(y=y, z=z, dy=dy, dz=dz), R * N // 128, triton.cdiv(rows, R)
    if backward:
        slots = min(triton.cdiv(_processors(y.device) * 16 // warps, groups), slots)
    apart = {name: y.stride(-2) if t is None else t.stride(-2) for name, t in named.items()}
    unit, options = _unit(size, *apart.values()), dict(num_warps=warps)
    numbers = {f"{name}_row_units": row // unit for name, row in apart.items()}
    numbers.update(
        rows=rows, slots=slots, eps=float(eps), groups=groups, size_units=size // unit,
        GATE=z is not None, BACKWARD=backward, UNIT=unit, R=R, N=N, TILES=tiles,
    )  # fmt: skip
    if backward and size > 2048 and PTX:  # an option of NVIDIA's GPUs
        options["maxnreg"] = 128
    return _Plan((_norm_kernel, (slots * groups, 1, 1), numbers, options)), slots


def _norm_new(y, z, weight, eps, groups):
    return (y.new_empty(y.shape, dtype=(weight if z is None else z).dtype),)


def _norm_forward(out, y, z, weight, eps, groups):
    y, z = _rows(y), None if z is None else _rows(z)
    plan, _ = _norm_plan(y, z, eps, groups)
    plan(y_ptr=y, z_ptr=z, weight_ptr=weight.contiguous(), out_ptr=out)


def _norm_backward(dout, y, z, weight, eps, groups, dy=None, dz=None):
    """The gradients of y, z and weight. dy, dz: tensors for the first two, with rows that lie
    evenly; else they are new."""
    if dy is None:
        dy, dz = _gradient(y, y), _gradient(z, y)
    y, z = _rows(y), None if z is None else _rows(z)
    plan, slots = _norm_plan(y, z, eps, groups, _rows(dy), None if z is None else _rows(dz))
    partial = torch.empty(slots, y.shape[-1], dtype=torch.float32, device=y.device)
    plan(
        y_ptr=y, z_ptr=z, weight_ptr=weight.contiguous(), dout_ptr=dout.contiguous(), dy_ptr=dy,
        dz_ptr=dz, partial_ptr=partial,
    )  # fmt: skip
    return [dy, dz, *_sums(partial, weight)]


def _norm_limit(sizes, *_):
    if sizes["groups"] < 1 or sizes["d"] % sizes["groups"]:
        return ""
    size = sizes["d"] // sizes["groups"]
    return None if size <= 8192 else f"a group has {size} channels; it must be 1 to 8192"


NORM = _Operation(
    "rms_norm",
    "(Tensor x, Tensor? gate, Tensor weight, float eps, int groups) -> Tensor",
    axes="... d, ... d, d", limit=_norm_limit,
    new=_norm_new, run=_norm_forward, backward=_norm_backward,
)  # fmt: skip


def rms_norm(x, weight, eps, *, gate=None, groups=1):
    """As its twin, `mamba2.rms_norm`. Rows of x and gate, which often is a slice of a projection,
    may be any distance apart."""
    return NORM(x, gate, weight, float(eps), groups)


# ---- A layer between its projections -------------------------------------------------------------
# Convolution, SSD and gated norm as one operation, with the kernels above. It spares the CPU what
# lies between three operations, which a small layer waits for, and memory: softplus and -exp(A_log)
# are made inside SSD's kernels, and gradients of z, xBC and dt are written side by side.


def _columns(wide, weight, dt_bias, norm_weight):
    """z, xBC and dt, which lie side by side in the projection, as in its gradient."""
    widths = norm_weight.shape[0], weight.shape[0], dt_bias.shape[0]
    return wide.split_with_sizes(widths, 2)  # `split` takes twice as long


def _heads(xBC, dt_bias, norm_weight, groups):
    """x, B and C, which lie side by side after the convolution, as in their gradient."""
    (b, l, d), h, hp = xBC.shape, dt_bias.shape[0], norm_weight.shape[0]
    gn = (d - hp) // 2
    x, B, C = xBC.split_with_sizes((hp, gn, gn), 2)
    n = gn // groups
    return x.view(b, l, h, hp // h), B.view(b, l, groups, n), C.view(b, l, groups, n)


def _middle_new(
    zxbcdt, weight, bias, dt_bias, A_log, D, norm_weight, conv, ssm, seq_idx, groups, *_
):
    (b, l, _), (d, _, k), h, hp = zxbcdt.shape, weight.shape, dt_bias.shape[0], norm_weight.shape[0]
    new, n = zxbcdt.new_empty, (d - hp) // (2 * groups)
    out, y, final = new(b, l, hp), new(b, l, hp), new(b, h, hp // h, n, dtype=torch.float32)
    return out, new(b, k - 1, d), final, new(b, l, d), y


def _middle_forward(
    out, new_conv, new_ssm, xBC, y,
    zxbcdt, weight, bias, dt_bias, A_log, D, norm_weight, conv, ssm, seq_idx,
    groups, eps, low, high,
):  # fmt: skip
    z, xBC_in, dt = _columns(zxbcdt.contiguous(), weight, dt_bias, norm_weight)
    _conv_forward(xBC, new_conv, xBC_in, weight, bias, conv, seq_idx)
    x, B, C = _heads(xBC, dt_bias, norm_weight, groups)
    inputs = x, dt, A_log, B, C, D, ssm, seq_idx, dt_bias, low, high
    _ssd_forward(y.view(x.shape), new_ssm, *inputs)
    _norm_forward(out, y, z, norm_weight, eps, groups)


def _middle_backward(
    dout, dconv, dssm, xBC, y,
    zxbcdt, weight, bias, dt_bias, A_log, D, norm_weight, conv, ssm, seq_idx,
    groups, eps, low, high,
):  # fmt: skip
    zxbcdt = zxbcdt.contiguous()
    dwide = torch.empty(zxbcdt.shape, dtype=zxbcdt.dtype, device=zxbcdt.device)
    z, xBC_in, dt = _columns(zxbcdt, weight, dt_bias, norm_weight)
    dz, dxBC_in, ddt = _columns(dwide, weight, dt_bias, norm_weight)
    x, B, C = _heads(xBC, dt_bias, norm_weight, groups)
    dxBC = torch.empty(xBC.shape, dtype=xBC.dtype, device=xBC.device)
    dx, dB, dC = _heads(dxBC, dt_bias, norm_weight, groups)
    if dout is None:
        dout = torch.zeros(y.shape, dtype=y.dtype, device=y.device)
    dy = dxBC_in[..., : y.shape[2]]  # until the convolution's gradient is written there
    _, _, dnorm_weight = _norm_backward(dout, y, z, norm_weight, eps, groups, dy, dz)
    inputs = x, dt, A_log, B, C, D, ssm, seq_idx, dt_bias, low, high
    found = _ssd_backward(dy.view(x.shape), dssm, *inputs, (dx, ddt, dB, dC))
    _, _, dA_log, _, _, dD, dinit, ddt_bias = found
    given = dconv, xBC_in, weight, bias, conv, seq_idx
    _, dweight, dbias, dstate = _conv_backward(dxBC, *given, dxBC_in)
    return [dwide, dweight, dbias, ddt_bias, dA_log, dD, dnorm_weight, dstate, dinit]


def _middle_limit(sizes, zxbcdt, *_):
    """Silent: the operations that it consists of will say it."""
    d, hp, h, groups = (sizes[name] for name in ("d", "hp", "h", "groups"))
    fits = sizes["l"] > 1 and sizes["w"] == hp + d + h and hp % h == h % groups == 0
    if not fits or d <= hp or (d - hp) % (2 * groups):
        return ""
    p, n = hp // h, (d - hp) // (2 * groups)
    fits = sizes.setdefault("p", p) == p and sizes.setdefault("n", n) == n
    fits = fits and 2 <= sizes["k"] <= 4 and hp // groups <= 8192
    return None if fits and not _state_limit(zxbcdt, p, n) else ""


MIDDLE = _Operation(
    "layer_middle",
    "(Tensor zxbcdt, Tensor weight, Tensor? bias, Tensor dt_bias, Tensor A_log, Tensor D, "
    "Tensor norm_weight, Tensor? conv, Tensor? ssm, Tensor? seq_idx, int groups, float eps, "
    "float low, float high) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    axes="b l w, d 1 k, d, h, h, h, hp, b k-1 d, b h p n, b l", limit=_middle_limit,
    kept=2,  # what the convolution and SSD return
    new=_middle_new, run=_middle_forward, backward=_middle_backward,
)  # fmt: skip


def layer_middle(
    zxbcdt, conv, ssm, seq_idx, weight, bias, dt_bias, A_log, D, norm_weight,
    *, groups, eps, dt_limit=(0.0, math.inf), in_place=False,
):  # fmt: skip
    """All between a layer's projections, from z, xBC and dt to norm(y · silu(z)); one position is a
    step. Where it cannot run, it is the turn of the operations it consists of, which warn.

    zxbcdt (b, l, h p + d + h), d = h p + 2 g n. conv (b, k-1, d) and ssm (b, h, p, n) are the
    Mamba2State, weight (d, 1, k) and bias (d) the convolution's; dt is clamped to dt_limit after
    softplus; in_place is as in `layer_step`. Returns the output (b, l, h p), the new conv, and the
    new ssm, in ssm's dtype if that has 2 bytes. The gradients cannot be differentiated again.
    """
    if conv is not None and zxbcdt.ndim == 3 and zxbcdt.shape[1] == 1:
        if zxbcdt.shape[2] != norm_weight.shape[0] + weight.shape[0] + dt_bias.shape[0]:
            return None
        z, xBC, dt = _columns(zxbcdt, weight, dt_bias, norm_weight)
        step = xBC, dt, conv, ssm, weight, bias, dt_bias, A_log, D
        if not NORM.takes(z, z, norm_weight, eps, groups):  # z is as y will be
            return None
        if (result := layer_step(*step, dt_limit=dt_limit, in_place=in_place)) is None:
            return None
        y, *state = result
        return rms_norm(y, norm_weight, eps, gate=z, groups=groups), *state
    weights = weight, bias, dt_bias, A_log, D, norm_weight
    numbers = groups, float(eps), *map(float, dt_limit)
    if (results := MIDDLE(zxbcdt, *weights, conv, ssm, seq_idx, *numbers)) is None:
        return None
    y, conv, new_ssm = results
    return y, conv, new_ssm if ssm is None else new_ssm.to(ssm.dtype)


# ---- One position of a layer ---------------------------------------------------------------------
# What a token needs between the projections of a layer, in one launch:
#
#     x, B, C = silu(bias + Σ_j weight[j] · u[j])          u: the k-1 rows of conv, then xBC
#     dt      = softplus(dt + dt_bias), clamped
#     ssm     = exp(-dt · exp(A_log)) · ssm + dt · x B^T   (p, n), for each head
#     y       = ssm C + D · x
#
# Nearly all bytes are the state's, read once and written once. A program of one warp (each further
# one would compute B and C again) computes B and C of its group once, and then walks over its share
# of the tiles of the group's state. STEP_PROGRAMS fit on a multiprocessor, by their registers. A
# tile has 8 KB, or 2 KB where there would be too few for the whole GPU to take part.
STEP_PROGRAMS = 8
STEP_BYTES = 8192, 2048


@triton.jit
def _step_conv(
    xBC_ptr, conv_ptr, weight_ptr, bias_ptr, channel, exists, d,
    K: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The K inputs that the convolution has at this position, the oldest first; and what it makes
    of them, with bias and SiLU, rounded to their dtype."""
    u = ()
    for j in tl.static_range(K - 1):  # rounds to the dtype of xBC as the convolution does
        old = tl.load(conv_ptr + j * d + channel, mask=exists, other=0.0)
        u += (old.to(xBC_ptr.dtype.element_ty),)
    u += (tl.load(xBC_ptr + channel, mask=exists, other=0.0),)
    v = tl.zeros(channel.shape, tl.float32)
    if BIAS:
        v += tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    for j in tl.static_range(K):
        weight = tl.load(weight_ptr + channel * K + j, mask=exists, other=0.0)
        v += weight.to(tl.float32) * u[j].to(tl.float32)
    return u, (v * _sigmoid(v)).to(u[0].dtype).to(tl.float32)


@triton.jit
def _step_kernel(
    xBC_ptr, dt_ptr, conv_ptr, ssm_ptr, weight_ptr, bias_ptr, dt_bias_ptr, A_log_ptr, D_ptr,
    y_ptr, new_conv_ptr, new_ssm_ptr,
    xBC_sb, dt_sb, HPG, tiles, low, high,
    G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr,
    PB: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """The equations above, for some tiles of the state of one group's HPG heads.

    Grid (b · g, shares of the tiles). Tile: PB channels of a head, and all of n:

                    n
             ┌─────────────┐   B, C above it, x and y to its left
          p  │    state    │
             └─────────────┘

        B, C <- taps of the convolution
        for each tile:
            x     <- taps of the convolution;  dt <- softplus(dt + dt_bias), clamped
            state <- exp(-dt · exp(A_log)) · state + x · (dt · B), stored
            y     <- rows of state · C, summed, + D · x

    A program stores the convolution's state for its channels of x; the first of a group's programs
    also that for B and C. So ssm may be updated in place, as no other program reads a tile, but
    conv may not: all of a group read B's and C's part of it.

    Masked: rows past p, columns past n.
    """
    b = (tl.program_id(0) // G).to(tl.int64)
    g = tl.program_id(0) % G
    d = G * (HPG * P + 2 * N)
    xBC_ptr += b * xBC_sb
    dt_ptr += b * dt_sb
    conv_ptr += b * (K - 1) * d
    new_conv_ptr += b * (K - 1) * d
    n = tl.arange(0, NB)
    mask_n = n < N
    B_at = G * HPG * P + g * N + n
    C_at = B_at + G * N
    B_u, B_n = _step_conv(xBC_ptr, conv_ptr, weight_ptr, bias_ptr, B_at, mask_n, d, K, BIAS)
    C_u, C_n = _step_conv(xBC_ptr, conv_ptr, weight_ptr, bias_ptr, C_at, mask_n, d, K, BIAS)
    if tl.program_id(1) == 0:  # now, not later, so that nothing holds them in registers
        for j in tl.static_range(1, K):
            tl.store(new_conv_ptr + (j - 1) * d + B_at, B_u[j], mask=mask_n)
            tl.store(new_conv_ptr + (j - 1) * d + C_at, C_u[j], mask=mask_n)

    tiles_p: tl.constexpr = (P + PB - 1) // PB
    first = tl.program_id(1) * tiles
    for i in range(first, tl.minimum(first + tiles, HPG * tiles_p)):
        # load
        h = g * HPG + i // tiles_p
        p = i % tiles_p * PB + tl.arange(0, PB)
        mask_p = p < P
        mask_pn = mask_p[:, None] & mask_n[None, :]
        at_p = (b * (G * HPG) + h) * P + p
        at_pn = at_p[:, None] * N + n[None, :]
        state_pn = tl.load(ssm_ptr + at_pn, mask=mask_pn, other=0.0, eviction_policy="evict_first")
        state_pn = state_pn.to(tl.float32)
        dt = tl.load(dt_ptr + h).to(tl.float32) + tl.load(dt_bias_ptr + h).to(tl.float32)
        A = -tl.exp(tl.load(A_log_ptr + h).to(tl.float32))
        D = tl.load(D_ptr + h).to(tl.float32)
        x_at = h * P + p
        x_u, x_p = _step_conv(xBC_ptr, conv_ptr, weight_ptr, bias_ptr, x_at, mask_p, d, K, BIAS)

        # decay
        dt = clamp(softplus(dt), low, high)
        state_pn = tl.exp(dt * A) * state_pn + x_p[:, None] * (dt * B_n)[None, :]
        y_p = tl.sum(state_pn * C_n[None, :], axis=1) + D * x_p

        # store
        tl.store(new_ssm_ptr + at_pn, state_pn, mask=mask_pn, eviction_policy="evict_first")
        tl.store(y_ptr + at_p, y_p, mask=mask_p)
        for j in tl.static_range(1, K):
            tl.store(new_conv_ptr + (j - 1) * d + x_at, x_u[j], mask=mask_p)


@_planned
def _step_plan(xBC, dt, ssm, weight, bias, low, high):
    (b, h, p, n), (d, _, k) = ssm.shape, weight.shape
    g, nb = (d - h * p) // (2 * n), triton.next_power_of_2(n)
    programs, (large, small) = STEP_PROGRAMS * _processors(xBC.device), STEP_BYTES
    of_tile = large if b * h * p * nb * ssm.itemsize > programs * large else small
    pb = min(max(of_tile // (nb * ssm.itemsize), 1), triton.next_power_of_2(p))
    tiles = h // g * triton.cdiv(p, pb)  # in a group
    share = triton.cdiv(tiles, min(tiles, triton.cdiv(programs, b * g)))  # of one program
    numbers = dict(
        xBC_sb=xBC.stride(0), dt_sb=dt.stride(0), HPG=h // g, tiles=share, low=low, high=high,
        G=g, P=p, N=n, K=k, BIAS=bias is not None, PB=pb, NB=nb,
    )  # fmt: skip
    grid = b * g, triton.cdiv(tiles, share), 1
    return _Plan((_step_kernel, grid, numbers, dict(num_warps=1)))


def _step_run(y, new_conv, new_ssm, xBC, dt, conv, ssm, weight, bias, dt_bias, A_log, D, low, high):
    given = _contiguous(conv, ssm, weight, bias, dt_bias, A_log, D)
    conv, ssm, weight, bias, dt_bias, A_log, D = given
    _step_plan(xBC, dt, ssm, weight, bias, low, high)(
        xBC_ptr=xBC, dt_ptr=dt, conv_ptr=conv, ssm_ptr=ssm, weight_ptr=weight, bias_ptr=bias,
        dt_bias_ptr=dt_bias, A_log_ptr=A_log, D_ptr=D, y_ptr=y, new_conv_ptr=new_conv,
        new_ssm_ptr=new_ssm,
    )  # fmt: skip


def _step_new(xBC, dt, conv, ssm, *_):
    b, h, p, _ = ssm.shape
    return xBC.new_empty(b, 1, h * p), xBC.new_empty(conv.shape), ssm.new_empty(ssm.shape)


def _step_limit(sizes, xBC, dt, *_):
    d, h, p, n = (sizes[letter] for letter in "dhpn")
    groups = (d - h * p) // (2 * n)
    if groups < 1 or d != h * p + 2 * groups * n or h % groups:
        return ""
    if n > 1024:
        return f"d_state is {n}; it must be 1 to 1024"
    return None if xBC.stride(2) == dt.stride(2) == 1 else ""


STEP = _Operation(
    "layer_step",
    "(Tensor xBC, Tensor dt, Tensor conv, Tensor ssm, Tensor weight, Tensor? bias, "
    "Tensor dt_bias, Tensor A_log, Tensor D, float low, float high) -> (Tensor, Tensor, Tensor)",
    axes="b 1 d, b 1 h, b k-1 d, b h p n, d 1 k, d, h, h, h", limit=_step_limit,
    new=_step_new, run=_step_run,
)  # fmt: skip


def layer_step(
    xBC, dt, conv, ssm, weight, bias, dt_bias, A_log, D, *, dt_limit=(0.0, math.inf), in_place=False
):
    """One token in a layer, from xBC and dt to y; its twin is `mamba2.Mamba2._convolve_and_scan`.

    xBC is (b, 1, d), dt (b, 1, h), either may be a slice; other arguments are as for
    `layer_middle`. in_place: the new ssm is written over this one, which is contiguous. There are
    no gradients.
    """
    given = xBC, dt, conv, ssm, weight, bias, dt_bias, A_log, D, *map(float, dt_limit)
    if not in_place:
        return STEP(*given)
    if not STEP.takes(*given):
        return None
    y = xBC.new_empty(*dt.shape[:2], ssm.shape[1] * ssm.shape[2])
    new_conv = xBC.new_empty(conv.shape)
    _step_run(y, new_conv, ssm, *given)
    return y, new_conv, ssm


# ---- Norm and projection of a few rows -----------------------------------------------------------
#     out = weight · (x / sqrt(mean(x²) + eps) · norm_weight) + bias + residual
#
# of x · silu(gate) if there is a gate; the mean is one group's. With so few rows the time is that
# of reading the weight, so every program computes the norm again, from the L2 cache, in the same
# pass: the root is one number per row and group, and multiplies the finished sum.
NORM_LINEAR_ROWS = 2  # with more, a norm of its own and a product on tensor cores are faster
# While a tile is summed the next ones arrive, through STAGES buffers. For one row without a gate
# single warps, which never wait for each other, are faster. OB is halved until each multiprocessor
# has 4 warps.
NORM_LINEAR_TILES = dict(OB=4, KB=512, STAGES=3, num_warps=4)
NORM_LINEAR_ROW = dict(OB=8, KB=256, STAGES=3, num_warps=1)


@triton.jit
def _norm_linear_kernel(
    x_ptr, gate_ptr, norm_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr,
    x_row, gate_row, weight_row, residual_row, out_row, rows, outputs, eps,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, RB: tl.constexpr, OB: tl.constexpr, KB: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The equation above, for OB outputs of all rows. Here k is a channel of x, o one of out.

    Grid (outputs / OB). Tile: RB rows x OB outputs x KB channels of a group.

        out <- 0
        for each group:
            dot, square <- 0
            for each KB channels:
                v      <- x · silu(gate);  square += v²
                dot    += weight · (v · norm_weight)          element by element
            out += sum of dot · rsqrt(mean of square + eps)
        store out + bias + residual

    Masked: rows past `rows`, outputs past `outputs`, channels past SIZE, the width of a group.
    """
    r = tl.arange(0, RB)
    o = tl.program_id(0) * OB + tl.arange(0, OB)
    mask_r, mask_o = r < rows, o < outputs
    weight_o = weight_ptr + o.to(tl.int64) * weight_row
    out_ro = tl.zeros((RB, OB), tl.float32)
    for g in tl.static_range(GROUPS):
        dot_rok = tl.zeros((RB, OB, KB), tl.float32)
        square_rk = tl.zeros((RB, KB), tl.float32)
        for first in tl.range(0, SIZE, KB, num_stages=STAGES):
            # load
            k = first + tl.arange(0, KB)
            mask_k = k < SIZE
            mask_rk = mask_r[:, None] & mask_k[None, :]
            k = g * SIZE + k
            mask_ok = mask_o[:, None] & mask_k[None, :]
            weight_ok = tl.load(weight_o[:, None] + k[None, :], mask=mask_ok, other=0.0)
            norm_k = tl.load(norm_ptr + k, mask=mask_k, other=0.0).to(tl.float32)
            v_rk = tl.load(x_ptr + r[:, None] * x_row + k[None, :], mask=mask_rk, other=0.0)
            v_rk = v_rk.to(tl.float32)
            if GATE:
                z_at = gate_ptr + r[:, None] * gate_row + k[None, :]
                z_rk = tl.load(z_at, mask=mask_rk, other=0.0).to(tl.float32)
                v_rk *= z_rk * _sigmoid(z_rk)
            # sum
            square_rk += v_rk * v_rk
            v_rk *= norm_k[None, :]
            dot_rok += v_rk[:, None, :] * weight_ok.to(tl.float32)[None, :, :]
        root_r = tl.rsqrt(tl.sum(square_rk, axis=1) / SIZE + eps)
        out_ro += tl.sum(dot_rok, axis=2) * root_r[:, None]
    # store
    mask_ro = mask_r[:, None] & mask_o[None, :]
    if BIAS:
        out_ro += tl.load(bias_ptr + o, mask=mask_o, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        residual_at = residual_ptr + r[:, None] * residual_row + o[None, :]
        out_ro += tl.load(residual_at, mask=mask_ro, other=0.0).to(tl.float32)
    tl.store(out_ptr + r[:, None] * out_row + o[None, :], out_ro, mask=mask_ro)


@_planned
def _norm_linear_plan(x, weight, bias, gate, residual, eps, groups):
    size, outputs, rows = x.shape[-1] // groups, weight.shape[0], x.numel() // x.shape[-1]
    alone = rows == 1 and gate is None
    config = dict(NORM_LINEAR_ROW if alone else NORM_LINEAR_TILES)
    config["KB"] = min(config["KB"], triton.next_power_of_2(size))
    warps = 4 * _processors(x.device)
    while config["OB"] > 1 and triton.cdiv(outputs, config["OB"]) * config["num_warps"] < warps:
        config["OB"] //= 2
    options = dict(num_warps=config.pop("num_warps"))
    numbers = dict(
        x_row=x.stride(-2), gate_row=0 if gate is None else gate.stride(-2),
        weight_row=weight.stride(0), residual_row=0 if residual is None else residual.stride(-2),
        out_row=outputs, rows=rows, outputs=outputs, eps=float(eps), SIZE=size, GROUPS=groups,
        GATE=gate is not None, BIAS=bias is not None, RESIDUAL=residual is not None,
        RB=triton.next_power_of_2(rows), **config,
    )  # fmt: skip
    return _Plan(
        (_norm_linear_kernel, (triton.cdiv(outputs, config["OB"]), 1, 1), numbers, options)
    )


def _norm_linear_new(x, norm_weight, weight, bias, gate, residual, eps, groups):
    dtype = weight.dtype if residual is None else torch.promote_types(weight.dtype, residual.dtype)
    return (x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype),)


def _norm_linear_run(out, x, norm_weight, weight, bias, gate, residual, eps, groups):
    x, gate, residual = [t if t is None else _rows(t) for t in (x, gate, residual)]
    norm_weight, bias = _contiguous(norm_weight, bias)
    _norm_linear_plan(x, weight, bias, gate, residual, eps, groups)(
        x_ptr=x, gate_ptr=gate, norm_ptr=norm_weight, weight_ptr=weight, bias_ptr=bias,
        residual_ptr=residual, out_ptr=out,
    )  # fmt: skip


def _norm_linear_limit(sizes, x, norm_weight, weight, *_):
    rows, groups = sizes["..."].numel(), sizes["groups"]
    fits = x.dim() > 1 and rows <= NORM_LINEAR_ROWS and weight.stride(1) == 1
    return None if fits and groups >= 1 and sizes["d"] % groups == 0 else ""


NORM_LINEAR = _Operation(
    "norm_linear",
    "(Tensor x, Tensor norm_weight, Tensor weight, Tensor? bias, Tensor? gate, Tensor? residual, "
    "float eps, int groups) -> Tensor",
    axes="... d, d, o d, o, ... d, ... o", limit=_norm_linear_limit,
    new=_norm_linear_new, run=_norm_linear_run,
)  # fmt: skip


def norm_linear(x, norm_weight, eps, weight, bias=None, *, gate=None, groups=1, residual=None):
    """linear(rms_norm(x, norm_weight, eps, gate, groups), weight, bias) + residual, of a few rows.

    x and gate are (..., d), residual (..., o), norm_weight (d), weight (o, d) and bias (o). Nothing
    is rounded on the way: the arithmetic is fp32. There are no gradients.
    """
    return NORM_LINEAR(x, norm_weight, weight, bias, gate, residual, eps, groups)


# ---- What mamba2.py asks for: a layer, a block, the decoding of a model --------------------------
# Each returns None where plain PyTorch must run: a module with hooks, or an adapter in its place,
# must be called.

_kinds = {}


def register(*kinds):
    """Make the classes of a model known, by name: a fused operation or a CUDA graph may take the
    place of a call of these, and of no others."""
    _kinds.update({kind.__name__: kind for kind in kinds})


def _is(module: nn.Module, kind: str) -> bool:
    """Whether a call of the module is that kind's forward: no adapter in its place, no hooks."""
    return type(module) is _kinds.get(kind) and not _is_watched(module)


def _is_watched(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks, or another function than its class's forward."""
    of_all = nn.modules.module
    hooks = of_all._global_forward_hooks or of_all._global_forward_pre_hooks
    hooks = hooks or of_all._global_backward_hooks or of_all._global_backward_pre_hooks
    hooks = hooks or module._forward_hooks or module._forward_pre_hooks
    hooks = hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def layer(layer, zxbcdt, state, seq_idx):
    """All between the projections of a Mamba2, as `layer_middle`: y, conv and ssm; or None."""
    conv1d, norm, (conv, ssm) = layer.conv1d, layer.norm, state or (None, None)
    if not (_is(conv1d, "CausalConv1d") and _is(norm, "RMSNorm")):
        return None
    weights = conv1d.weight, conv1d.bias, layer.dt_bias, layer.A_log, layer.D, norm.weight
    options = dict(groups=norm.groups, eps=norm.eps, dt_limit=layer.config.time_step_limit)
    options["in_place"] = type(state) is _BufferedState
    return layer_middle(zxbcdt, conv, ssm, seq_idx, *weights, **options)


# Before that torch.addmm(..., out_dtype=...) refuses a float32 tensor to add to.
ADDS = torch.__version__ >= "2.10" and torch.version.hip is None


def _adds(h: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether torch.addmm can add this projection, in half precision, to h in float32."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or h.device.type != "cuda":
        return False
    halves = weight.dtype in (torch.bfloat16, torch.float16) and h.dtype == torch.float32
    return ADDS and halves and type(weight) is nn.Parameter and bias is None


def block(block, h, state):
    """One token in a Mamba2Block: h (b, 1, d), conv and ssm; or None.

    For few rows three kernels do all of it: `norm_linear`, `layer_step`, `norm_linear`. For more,
    the matrix products are cuBLAS's, the second of which adds to h before it rounds.
    """
    if state is None or h.shape[1] != 1 or not _is(block.mixer, "Mamba2"):
        return None
    norm, layer = block.norm, block.mixer
    parts = [(layer.in_proj, "Linear"), (layer.out_proj, "Linear"), (norm, "RMSNorm")]
    parts += [(layer.conv1d, "CausalConv1d"), (layer.norm, "RMSNorm")]
    if torch.is_autocast_enabled(h.device.type) or not all([_is(*part) for part in parts]):
        return None
    weight, bias = layer.out_proj.weight, layer.out_proj.bias
    eps, groups = layer.norm.eps, layer.norm.groups
    first = h, norm.weight, norm.eps, layer.in_proj.weight, layer.in_proj.bias
    zxbcdt = norm_linear(*first) if weight.stride(1) == 1 else None
    few = zxbcdt is not None
    if not (few or _adds(h, weight, bias)):
        return None
    zxbcdt = zxbcdt if few else layer.in_proj(norm(h))
    z, xBC, dt = zxbcdt.split_with_sizes(layer.widths, 2)
    last = layer.norm.weight, weight, bias, z, h, eps, groups
    if few and not NORM_LINEAR.takes(z, *last):  # z is as y will be
        return None
    weights = layer.conv1d.weight, layer.conv1d.bias, layer.dt_bias, layer.A_log, layer.D
    options = dict(dt_limit=layer.config.time_step_limit, in_place=type(state) is _BufferedState)
    if (result := layer_step(xBC, dt, *state, *weights, **options)) is None:
        return None
    y, conv, ssm = result
    if few:
        options = dict(gate=z, groups=groups, residual=h)
        h = norm_linear(y, layer.norm.weight, eps, weight, bias, **options)
    else:
        y = layer.norm(y, gate=z)[:, 0]  # (b, h p)
        h = torch.addmm(h[:, 0], y, weight.t(), out_dtype=h.dtype)[:, None]  # (b, 1, d)
    return h, conv, ssm


class Text:
    """The cache of a text while `generate` decodes it: a Mamba2Cache, or, after a step of a CUDA
    graph, the graph's buffers. `generate` passes the same Text from token to token.

    The graph is the model's as it was at the text's first step: a module, weight, hook or option
    that is replaced meanwhile takes effect in the next text, new values in the same memory at once.
    A token in another mode, as in autocast, is a step of the model.
    """

    is_compileable, is_croppable, is_linear = False, False, (False,)  # as in Mamba2Cache

    @classmethod
    def of(cls, model, cache):
        """The Text of a model on a GPU, where there may be graphs; else the cache itself."""
        return cls(model, cache) if model.device.type == "cuda" else cache

    def __init__(self, model, cache):
        self.model, self.graph = model, None  # before the first step; False if there can be none
        self.now(cache)

    def now(self, cache):
        """This, after it has got another cache."""
        self.current, self.length = cache, cache.get_seq_length()
        return self

    @property
    def states(self):
        """As of a Mamba2Cache; copies if they are in a graph."""
        if self.current is not self.graph:
            return self.current.states
        return tuple(_kinds["Mamba2State"](*state) for state in self.graph.copies())

    def get_seq_length(self, layer_idx=0):
        return self.length

    def select(self, rows):
        cache = _kinds["Mamba2Cache"](self.states, self.length)
        return self.now(cache.select(rows))

    def decode(self, ids, mask, hidden_states):
        """Logits after one more token, by a graph; or None."""
        if ids is None or ids.shape[1] != 1 or hidden_states:
            return None
        if mask is not None and not mask[:, -1].all():
            return None
        if self.graph is None and self.current.states:
            self.graph = DecodingGraph.take(self) or False
            # It reads these, wherever the model's weights go meanwhile.
            self.read = [weight.untyped_storage() for weight in self.model.parameters()]
        if not self.graph or _modes() != self.graph.modes:
            return None
        if self.current is not self.graph:
            self.graph.load(self.current)
            self.current = self.graph
        self.length += 1
        return self.graph(ids)[:, None].clone()


def _fingerprint(model) -> list | None:
    """What a step depends on, to be compared with == before each text (1 ms for 24 layers on a slow
    CPU); None if a graph would not do all of it.

    None in training mode; for a module of any class but the model's own (adapters and other heads
    may depend on anything), or one that is compiled, or has hooks or buffers; for weights that are
    sharded, quantised, or elsewhere. Values of weights do not count: a graph reads them in place.
    """
    if model.training:
        return None
    device, known, parts = model.device, {nn.Embedding, nn.ModuleList, *_kinds.values()}, []
    for name, module in model.named_modules(remove_duplicate=False):
        foreign = type(module) not in known or module._buffers or module._compiled_call_impl
        if foreign or _is_watched(module):
            return None
        options = {key: value for key, value in vars(module).items() if key[0] != "_"}
        options.pop("generation_config", None)
        if "config" in options:
            options["config"] = vars(options["config"])
        parts.append((name, id(module), type(module), repr(options)))
        for name, w in module._parameters.items():
            if w is None:
                continue
            if type(w) is not nn.Parameter or w.device != device:
                return None
            parts.append((name, w.data_ptr(), w.shape, w.stride(), w.dtype, w.is_neg()))
    return parts


def _modes() -> tuple | None:
    """PyTorch's switches that a step depends on; None if a graph cannot stand in for it."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
        return None
    names = "bf16_reduced_precision_reduction fp16_reduced_precision_reduction fp16_accumulation"
    matmul = [getattr(torch.backends.cuda.matmul, f"allow_{name}", None) for name in names.split()]
    deterministic = torch.are_deterministic_algorithms_enabled()
    return torch.is_inference_mode_enabled(), deterministic, _allows_tf32(), *matmul


class _BufferedState(tuple):
    """A state (conv, ssm) in buffers of a CUDA graph: the next ssm may be written over this one."""


class DecodingGraph:
    """A model's step by one token, captured as a CUDA graph: one launch instead of hundreds.

    The state lives in buffers that the graph reads and writes; `load` copies a cache into them and
    `copies` copies one out, so caches are never modified. A layer writes ssm over the last one; its
    conv is new, as programs of all heads read the last one, and copied into its buffer at the end.

    A model's last graph is kept, with buffers as large as the cache, for the next text of the same
    batch size: `DecodingGraph.idle.pop(model, None)` frees them. `DecodingGraph.enabled = False`
    does without graphs. There is none if `_fingerprint` or `_modes` is None. While one is made,
    other threads must not draw random numbers on that GPU. Decode a text on one stream throughout.
    """

    enabled = True
    capturing = threading.Lock()  # PyTorch can make one graph at a time
    idle = weakref.WeakKeyDictionary()  # model: the graph that it used last

    @classmethod
    def take(cls, text):
        """A graph of a text's model, with buffers for its cache; None if there can be none."""
        model, cache = text.model, text.current
        if not cls.enabled or torch.cuda.is_current_stream_capturing():
            return None
        modes, fingerprint = _modes(), _fingerprint(model)
        if modes is None or fingerprint is None:
            return None
        key = fingerprint, modes, [(t.shape, t.dtype) for state in cache.states for t in state]
        graph = cls.idle.pop(model, None)
        if graph is None or graph.made_for != key or graph.text() is not None:
            graph = None  # whose memory is free before the next takes its own
            try:
                graph = cls(model, cache, key)
            except RuntimeError as error:  # such as too little memory: the next text tries again
                warnings.warn(f"this text is decoded without a CUDA graph: {error}", stacklevel=2)
                return None
        stream = torch.cuda.current_stream(model.device)
        stream.wait_stream(graph.stream)
        graph.stream, graph.text = stream, weakref.ref(text)  # when it is gone, the next may come
        cls.idle[model] = graph
        # Buffers may come from another stream: it must not reuse their memory before this is done.
        for buffer in (graph.token, *itertools.chain(*graph.states)):
            buffer.record_stream(stream)
        return graph

    def __init__(self, model, cache, key):
        clone = functools.partial(torch.clone, memory_format=torch.contiguous_format)
        self.made_for, (_, self.modes, _) = key, key
        self.states = [_BufferedState(map(clone, state)) for state in cache.states]
        b, device = cache.states[0].ssm.shape[0], cache.states[0].ssm.device
        self.token = torch.zeros(b, 1, dtype=torch.int64, device=device)
        with DecodingGraph.capturing, torch.cuda.device(device):
            self.stream = torch.cuda.Stream()  # the last that it was used on
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.step(model)  # for what is done once, such as compiling kernels
                self.graph = torch.cuda.CUDAGraph()
                # Other threads may go on using the GPU.
                options = dict(stream=self.stream, capture_error_mode="thread_local")
                with torch.cuda.graph(self.graph, **options):
                    self.logits = self.step(model)

    def step(self, model):
        """The step itself, from buffers to buffers."""
        cache = _kinds["Mamba2Cache"](tuple(self.states))
        output = model(self.token, cache=cache, use_cache=True, return_dict=True)
        _copy(self.states, output.cache.states)
        return output.logits[:, -1]

    def load(self, cache):
        """Resume from this cache."""
        _copy(self.states, cache.states)

    def copies(self):
        """The states after the last token, copied."""
        states = [tuple(map(torch.empty_like, state)) for state in self.states]
        _copy(states, self.states)
        return states

    def __call__(self, ids):
        """The logits (b, vocabulary) after ids (b, 1); until the next call."""
        with torch.cuda.device(ids.device):
            self.token.copy_(ids)
            self.graph.replay()
        return self.logits


def _copy(targets, sources):
    """Copy states into others, unless they are these: one kernel for conv, and one for ssm."""
    for into, out_of in zip(zip(*targets, strict=True), zip(*sources, strict=True), strict=True):
        pairs = [(to, of) for to, of in zip(into, out_of, strict=True) if to is not of]
        if pairs:
            torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
