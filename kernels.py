"""Fused Triton kernels for mamba2.py: SSD, short convolution and norm, alone and as one operation,
forward and backward, and one token of a layer.

`mamba2.py` loads this file by its path, and asks it before each operation that a kernel may take
over: `takes_<operation>(...)` says whether `<operation>(...)`, which has the signature and the
meaning of its namesake in mamba2.py (its twin, in plain PyTorch), can run on these tensors. Where
the answer is no, mamba2.py goes on in plain PyTorch; that it did is said once, if the tensors are
on a GPU and looked like ones for a kernel. Nothing is compiled at install, only Triton at the first
call; without Triton or a GPU every answer is no. `python kernels.py` times all of it on a GPU.

    projection ──> xBC ──> causal_conv1d ──> x, B, C ──┐
           ├─────> dt ─────────────────────────────────┴──> ssd ──> y ──┐
           └─────> z ───────────────────────────────────────────────────┴──> rms_norm

A layer without a mask does all of this in one operation, `layer_middle`, with the same kernels: a
small layer waits for the CPU longer than for the GPU. The operation answers None where it cannot,
and then the three are asked one by one. For one token, without gradients, `layer_step` does all of
the first line, from projection to y, in one kernel, and `norm_linear` a norm with the projection
after it. The twins of these three are lines of the layer and of its block.

    launches     forward     conv, prep, [segment], scan, norm
                 backward    norm, prep, border, chunk, finish, conv, fold

The first call for tensors of some shapes works out tiles, grids and numbers; the next ones replay
its launches, unless PyTorch computed something for them, as a copy or zeros: see `_Recording`.

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
    x, B ──[segment]───┤                   only if b·h is too small to fill the GPU: the state that
                       │                   each segment of the sequence adds, (b, segments, h, p, n)
    x, B, C ─────────scan──> y, final      y: x's dtype; final: (b, h, p, n) fp32

Backward: the states at the chunk borders are computed again (half-precision, one pair per chunk),
then everything is parallel over chunks. A program loops over the heads that share B and C, so that
dB and dC are summed on chip; no atomics anywhere, hence the same bits every time.

    dt, A ─────────prep────> a, dt; end
    x, B, dy, C ───border──> H, dH         (b·h·c, p, n) in x's dtype: the state at every chunk's
                      │                    start, and its gradient at every chunk's end
    x, dy, H, dH, B, C ┬ dx > dx, W        W: (b·c·g·shares, s, t) in x's dtype, see `dx_part`
           two parts,  │                   and four series, sums over p, n and a chunk
         one launch    └ bc > parts        (2, b·c·g·shares, q, n) fp32: dB and dC but for W, by
                      │                    shares of a group's heads; and one series
    W, parts ──────finish──> dB, dC        sums over shares, with W C and W^T B
    series            └────> ddt, sums     the chain rule to dt; sums: one row for each chunk,
    sums ──────────_fold───> dA, dD        (b·c, h + size of dD) fp32

In a layer `prep` and `finish` also do what lies between the layer's parameters and dt, A: softplus
and its gradient, -exp(A_log) and its gradient.

Bytes through device memory for 2.7b (h 80, p 64, n 128, bf16) at b 8, l 4096, where x is 335 MB and
each of H, dH 671 MB: forward 0.69 GB (x, y and 1 % more; B and C stay in the L2 cache); backward
border 2.0, chunk 2.3 to 3.7 (x, dy and dH are read by both parts, from memory or from the L2
cache), all else 0.3 GB.

Precision: decays, cumulative sums, the state in registers and all accumulators are fp32; operands
of matrix products are in x's dtype. With fp32 inputs the backward's products are true fp32, and the
forward's have 22 bits, from three tf32 products; unless PyTorch's own switch allows tf32 as it is.
With fp16 inputs they are tf32 products of fp32 numbers, for the range, see `_operands`. No decay is
split into factors that could overflow; differences are masked, or cut off, and then exp2. With
dt·A over many powers of ten in one chunk, fp32 results keep about 5 digits, as their sums do. NaN
in an input makes NaN of all that depends on it, as in PyTorch: no minimum or maximum swallows it.

Convolution, norm and the step of a token
-----------------------------------------
Each is bound by memory: an element takes a few dozen instructions, so the time to aim for is the
bytes that must move over the bandwidth of a device copy. Bytes per element of x, for 2-byte inputs
(every input read once, every output written once):

    operation        forward                backward
    causal_conv1d    x, y              4    x, dy, dx                 6
    rms_norm         x, gate, out      6    x, gate, dout, dx, dgate 10
      without gate   x, out            4    x, dout, dx               6
    layer_step       state, new state  4    (an element of the state) -
    norm_linear      weight            2    (an element of the weight) -

Nothing but inputs is kept for the backward (of a layer's middle: the projection, and what lies
between convolution, SSD and norm): pre-activations and root mean squares are computed again from
the tiles that the backward has to read anyway. Arithmetic is fp32. Inputs are read where they lie:
rows may be any distance apart, as in a slice of a wider projection, as long as the last dimension
is contiguous.

Gradients of weights are sums over all positions. Every program sums the positions it walks over in
registers and writes one row of partial sums; `_fold_kernel` adds the rows in a fixed order. No
atomics: the same input gives the same bits.
"""

import concurrent.futures
import functools
import importlib.machinery
import importlib.util
import itertools
import math
import operator
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    TRITON = True
except ImportError as error:
    if not (error.name or "").startswith("triton"):  # something that triton needs
        raise
    TRITON = False

    class _NoTriton:
        """Stands in for whatever is named or called in the definitions of kernels."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return self

    triton = tl = TensorDescriptor = _NoTriton()

__version__ = "0.0.1"  # a number, because transformers asks any module called `kernels` for one


def _hand_over():
    """Let Hugging Face's package `kernels` have its name.

    In a folder with this file `import kernels` finds this file first, where transformers means
    Hugging Face's package. If that is installed, it is loaded in this module's place.
    """
    for folder in sys.path:
        spec = importlib.machinery.PathFinder.find_spec("kernels", [folder])
        if spec is not None and spec.origin and spec.submodule_search_locations:  # a package
            module = importlib.util.module_from_spec(spec)
            sys.modules["kernels"] = module
            spec.loader.exec_module(module)
            return


if __name__ == "kernels":
    _hand_over()


# --------------------------------------------------------------------------------------------------
# Shared by all operations: what is refused, and how PyTorch gets to know a kernel
# --------------------------------------------------------------------------------------------------

# Run kernels as Python, on a CPU, for tests. The interpreter's matrix products are wrong in
# bfloat16, which is left to plain PyTorch.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Triton compiles a kernel anew where a number is 1, or a multiple of 16, and was not before. These
# numbers change with batch and length, and are exempt: nothing would be gained, and a prompt of
# another length would wait for seconds. (NSEG, NSPLIT and HPS, of which there are few, are not.)
VARYING = """L NC BH CPS PROGRAMS dt_sb seq_sb l q_rows x_batch_units rows slots
    a_rows b_rows c_rows""".split()
jit = functools.partial(triton.jit, do_not_specialize=VARYING)
_said = set()


# There are two kinds of reason not to run a kernel. `_unfit*` give the silent ones: no kernel is
# meant for these tensors (on a CPU, in float64, empty), or they do not fit together, and then it is
# the twin's turn to say so. `_beyond*` give the limits of a kernel, of which a user should hear.


def _lies_elsewhere(tensor: Tensor) -> bool:
    """Whether a kernel would not find its numbers at its address, as they are."""
    kind = type(tensor)  # a subclass such as DTensor keeps them in other tensors
    wraps = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and kind is not FakeTensor
    return wraps or tensor.is_neg()


def _unfit(required: dict, optional: dict) -> str | None:
    """Why no kernel is meant for these tensors, by name; None if one may be."""
    if not TRITON:
        return "triton is not installed, or too old"
    compiling = torch.compiler.is_compiling()
    if not compiling:
        transformed = torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()
        if transformed or forward_ad._current_level >= 0:
            return "a transform is active, which needs to see every operation"
    device = None
    for name, tensor in (required | optional).items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            return f"{name} is not a tensor"
        if not compiling and _lies_elsewhere(tensor):
            return f"the numbers of {name} are not those at its address"
        if device is None:
            device = tensor.device
            if device.type != "cuda" and not (INTERPRET and device.type == "cpu"):
                return "the kernels need tensors on a CUDA device"
        if tensor.device != device:
            return f"{name} is not on the device of the other tensors"
        if name == "seq_idx":
            if tensor.is_floating_point() or tensor.is_complex():
                return "seq_idx does not hold integers"
        elif tensor.dtype not in DTYPES:
            return f"{name} is not bfloat16, float16 or float32"
        elif INTERPRET and tensor.dtype == torch.bfloat16:
            return f"{name} is bfloat16, which the interpreter gets wrong"
    return None


def _misshapen(*shapes) -> str | None:
    """The first of the (name, tensor or None, allowed shape, ...) with another shape; or None."""
    for name, tensor, *allowed in shapes:
        if tensor is None:
            continue
        for shape in allowed:  # a loop is faster than `any`
            if tensor.shape == shape:
                break
        else:
            return f"the shape of {name} does not fit the others, or is not one that is understood"
    return None


def _beyond_labels(seq_idx: Tensor | None) -> str | None:
    if seq_idx is not None and seq_idx.dtype not in (torch.int32, torch.int64):
        return f"seq_idx is {seq_idx.dtype}; it must be int32 or int64"
    return None


def _takes(operation: str, reason: str | None) -> bool:
    """Turn a reason that a user should hear of into an answer, and say it once."""
    if reason is None:
        return True
    if not torch.compiler.is_compiling() and (operation, reason) not in _said:
        _said.add((operation, reason))
        message = f"plain PyTorch runs instead of the kernels of {operation}: {reason}"
        warnings.warn(message, stacklevel=4)
    return False


def _refuse(operation: str, reason: str | None, twin: str | None = None) -> None:
    if reason is not None:
        twin = twin or f"mamba2.{operation}"
        raise ValueError(f"kernels.{operation}: {reason}; {twin} takes any tensors")


def _free_namespace() -> str:
    """A namespace for operators which no other execution of this file in this process has."""
    number = 1
    while hasattr(getattr(torch.ops, f"mamba2_kernels_{number}"), "ssd"):
        number += 1
    return f"mamba2_kernels_{number}"


NAMESPACE = _free_namespace()


def _operation(name, forward, backward, fake, count, kept=0):
    """`forward` as something that autograd and torch.compile know, with `backward` as its gradient.

    forward(*inputs)               some tensors, of which the last `kept` are only for the backward;
                                   inputs: tensors or None, then numbers
    backward(*gradients, *kept, *inputs)
                                   a list: the gradients of the first `count` inputs, contiguous,
                                   and an empty tensor for an input that is None; None instead of
                                   a function: there are no gradients
    fake(*inputs)                  results of forward, of which only shape and dtype count

    To torch.compile these are two opaque operators. Eager calls enter through an autograd.Function
    instead: the bookkeeping of an operator takes the CPU up to 0.5 ms, longer than the GPU needs.
    (So does that of a Function with a `setup_context`, in part: 0.1 ms, for inspect.signature.)
    """
    if not TRITON:
        return None  # nothing will ask for it, and an old torch, as 2.6, could not register it
    qualified = f"{NAMESPACE}::{name}"
    inputs_in_all = forward.__code__.co_argcount

    def answers(results):
        return results[:-kept] if kept else results

    whole = forward
    forward = _replayed(whole, 0)
    without_gradients = _replayed(lambda *inputs: answers(whole(*inputs)), 0)
    opaque = torch.library.custom_op(qualified, forward, mutates_args=())
    opaque.register_fake(fake)

    def call(*inputs):
        hidden = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
        if hidden or type(inputs[0]) not in (Tensor, nn.Parameter):
            # A FakeTensor, for one, has nothing for a kernel to read; and modes see no launches.
            return answers(opaque(*inputs))
        if backward is None or not torch.is_grad_enabled():
            return without_gradients(*inputs)
        return eager.apply(*inputs)

    if backward is None:
        return call
    backward = _replayed(backward, -inputs_in_all)
    opaque_backward = torch.library.custom_op(f"{qualified}_backward", backward, mutates_args=())

    def fake_backward(*arguments):
        x, *others = arguments[-inputs_in_all:][:count]
        return [x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, *others)]

    def save(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        tensors = [i for i in inputs if i is None or isinstance(i, Tensor)]
        ctx.save_for_backward(*tensors, *(output[len(output) - kept :] if kept else ()))
        ctx.numbers = inputs[len(tensors) :]

    def gradients(run, ctx, *given):
        saved = ctx.saved_tensors
        at = len(saved) - kept
        inputs = (*saved[:at], *ctx.numbers)
        found = [None] * len(inputs)
        if any(gradient is not None for gradient in given):
            found[:count] = run(*given, *saved[at:], *inputs)
        pairs = zip(found, inputs, strict=True)
        return tuple(gradient if isinstance(i, Tensor) else None for gradient, i in pairs)

    def opaque_gradients(ctx, *given):
        return gradients(opaque_backward, ctx, *given[: len(given) - kept])

    opaque_backward.register_fake(fake_backward)
    opaque.register_autograd(opaque_gradients, setup_context=save)

    class eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            results = forward(*inputs)
            save(ctx, inputs, results)
            return answers(results)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, *given):
            # Inputs were checked by `_unfit`. A gradient may be of any kind, and to be read at its
            # address it must be there as it is: with its sign, and not in a subclass's own tensors.
            given = [g if g is None else g.resolve_neg() for g in given]
            hidden = torch.compiler.is_compiling()
            hidden = hidden or any(g is not None and _lies_elsewhere(g) for g in given)
            return gradients(opaque_backward if hidden else backward, ctx, *given)

    return call


# What an operation launches depends only on its numbers and on the kind of its tensors: shapes,
# strides, dtypes. Working it out, with views, tile sizes and grids, takes the CPU several times as
# long as launching it, and a small model waits for that. So the first call for a kind of tensors is
# recorded, and later ones launch the same, at other addresses. An operation need not know: it is a
# function that allocates memory, takes views, and calls `_launch`. What does more is not replayed,
# but called each time. What must not happen is that it decides by anything that is not in the key.


class _Recording(TorchFunctionMode):
    """Watches a call: the memory in which its tensors lie, and what it launches.

    An area of memory is an input's, or was allocated during the call. What PyTorch computes is in
    none of them; a call that launches a kernel on it, such as on a copy, cannot be repeated: it
    `fails`, as does one that changes a tensor by PyTorch.

        areas        the inputs, then what was allocated
        area_of      by a tensor's id, in which of the areas it lies; None: in none
        launches     what `launched` noted: (run, arguments, where each pointer points)

    Another operation may run within the call, in a signal handler or a finaliser. It is recorded by
    itself, and the call around it, of which it is no part, is `interrupted`: recorded next time.
    """

    active = threading.local()  # .recording: the one of this thread

    def __init__(self, inputs):
        super().__init__()
        self.areas, self.tensors, self.launches = list(inputs), [], []
        self.area_of = {id(tensor): area for area, tensor in enumerate(inputs)}
        self.fails = self.interrupted = False
        self.outer = None

    def __enter__(self):
        self.outer = getattr(self.active, "recording", None)
        self.active.recording = self
        return super().__enter__()

    def __exit__(self, *exception):
        self.active.recording = self.outer
        return super().__exit__(*exception)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        results, name = function(*args, **(kwargs or {})), getattr(function, "__name__", "")
        for tensor in results if isinstance(results, (tuple, list)) else (results,):
            if not isinstance(tensor, Tensor) or id(tensor) in self.area_of:
                continue
            self.tensors.append(tensor)  # lives on, so that its id stays its own
            if name in ("empty", "empty_like", "new_empty"):
                self.area_of[id(tensor)] = len(self.areas)
                self.areas.append(tensor)
            else:
                views = [t for t in args if isinstance(t, Tensor) and _share(t, tensor)]
                self.area_of[id(tensor)] = self.area_of.get(id(views[0])) if views else None
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place or name == "__setitem__" or name.startswith("__i"):
            self.fails = True
        return results

    def launched(self, run, tensors, values):
        """Note run(*tensors, *values), with where each tensor, or a descriptor's, is in an area."""
        pointers = []
        for at, tensor in enumerate(tensors):
            block = None
            if isinstance(tensor, TensorDescriptor):
                layout, block = (tensor.shape, tensor.strides), tensor.block_shape
                tensor = tensor.base
            elif tensor is not None:
                layout = tensor.shape, tensor.stride()
            if tensor is not None:
                area = self.area_of.get(id(tensor))
                self.fails = self.fails or area is None
                offset = 0 if self.fails else tensor.data_ptr() - self.areas[area].data_ptr()
                pointers.append((at, area, offset, tensor.dtype, layout, block))
        self.launches.append((run, [None] * len(tensors) + list(values), pointers))


def _share(one: Tensor, other: Tensor) -> bool:
    memory = one.untyped_storage().data_ptr()
    return memory != 0 and memory == other.untyped_storage().data_ptr()


class _Replay:
    """Does what a recorded call did, with other inputs. `possible` says whether it can.

    Results are allocated one by one. All other memory, which nobody sees, is one allocation: each
    takes the CPU half as long as a launch. Kernels get addresses instead of tensors, which Triton
    would ask for theirs, and the driver whether it is right.
    """

    def __init__(self, recording, count, results):
        self.kind = type(results)
        results = [results] if isinstance(results, Tensor) else results
        self.outputs = [(t.shape, t.stride(), t.dtype) for t in results]
        areas = {area: (area, 0) for area in range(count)}  # in which tensor of a replay, and where
        self.possible = bool(recording.launches) and not recording.fails
        for i, result in enumerate(results, count):
            area = recording.area_of.get(id(result))
            whole = area is not None and result.numel() == recording.areas[area].numel()
            self.possible = self.possible and whole and area not in areas
            areas[area] = i, 0
        self.bytes = 0
        for area, tensor in enumerate(recording.areas):
            if area not in areas:
                areas[area] = count + len(results), self.bytes
                # Aligned as PyTorch does; an empty one, too, is somewhere.
                self.bytes += max(_cdiv(tensor.nbytes, 512), 1) * 512
        self.launches = []
        for run, arguments, pointers in recording.launches if self.possible else ():
            addresses, others = [], []
            for at, area, offset, *what in pointers:
                which, start = areas[area]
                if what[-1] is None and not INTERPRET:
                    addresses.append((at, which, start + offset))
                else:
                    others.append((at, which, start + offset, functools.partial(_argument, *what)))
            self.launches.append((run, arguments, addresses, others))

    def __call__(self, inputs, device):
        tensors = [
            *inputs,
            *[torch.empty_strided(*layout, dtype=t, device=device) for *layout, t in self.outputs],
        ]
        outputs = tensors[len(inputs) :]
        if self.bytes:
            tensors.append(torch.empty(self.bytes, dtype=torch.uint8, device=device))
        bases = [tensor.data_ptr() for tensor in tensors]
        stream = {}
        if not INTERPRET:
            stream["stream"] = triton.runtime.driver.active.get_current_stream(device.index)
        for run, arguments, addresses, others in self.launches:
            arguments = arguments.copy()
            for at, which, offset in addresses:
                arguments[at] = bases[which] + offset
            for at, which, offset, argument in others:
                arguments[at] = argument(tensors[which], bases[which] + offset)
            run(*arguments, **stream)
        return outputs[0] if self.kind is Tensor else self.kind(outputs)


class _Address(int):
    """What a descriptor needs of a tensor."""

    data_ptr = int.__int__


def _argument(dtype, layout, block, memory, address):
    """The tensor at the address, for the interpreter; or a descriptor of it, if it has blocks."""
    if INTERPRET:
        storage = memory.untyped_storage()
        start = (address - storage.data_ptr()) // dtype.itemsize
        base = torch.empty(0, dtype=dtype).set_(storage, start, *layout)
    else:
        base = _Address(address)
    return base if block is None else _descriptor(base, *layout, block)


_replays = {}


def _replayed(function, at):
    """The function, recorded and replayed, on the device of its argument number `at`."""

    @functools.wraps(function)
    def run(*arguments):
        x = arguments[at]
        outer = getattr(_Recording.active, "recording", None)
        if outer is not None:
            outer.interrupted = True
        with torch.cuda.device_of(x):
            tf32 = x.dtype == torch.float32 and _allows_tf32()
            key = function, x.device, tf32, *[
                (a.shape, a.stride(), a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else a
                for a in arguments
            ]  # fmt: skip
            replay = _replays.get(key)
            if replay:
                return replay([a for a in arguments if isinstance(a, Tensor)], x.device)
            if replay is not None:
                return function(*arguments)
            inputs = [a for a in arguments if isinstance(a, Tensor)]
            if len({id(a) for a in inputs}) < len(inputs):  # which of them is used?
                return function(*arguments)
            with _Recording(inputs) as recording:
                results = function(*arguments)
            if recording.interrupted:
                return results
            if len(_replays) > 1000:  # inputs of ever new lengths
                _replays.clear()
            replay = _Replay(recording, len(inputs), results)
            _replays[key] = replay if replay.possible else False
            return results

    return run


def _allows_tf32() -> bool:
    """Whether the user lets PyTorch's own fp32 matrix products be tf32."""
    switch = torch.backends.cuda.matmul
    if hasattr(switch, "fp32_precision"):  # PyTorch 2.9; once it is set, the other raises
        return switch.fp32_precision == "tf32"
    return switch.allow_tf32


# Triton's own of these two take the CPU ten times as long.


def _cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def _power_of_2(a: int) -> int:
    """The smallest that is at least a."""
    return 1 << (a - 1).bit_length()


def _descriptor(base, shape, strides, block):
    tiles = TensorDescriptor.__new__(TensorDescriptor)  # without its checks, which take longer
    tiles.base, tiles.shape, tiles.strides, tiles.block_shape = base, shape, strides, block
    return tiles


_compiled = {}
_known = set()


def _launch(*calls):
    """Launch kernels in turn; a call is (kernel, grid, tensors, numbers, options).

    A kernel's arguments are tensors (or descriptors, or None), then numbers, then constants, which
    are among the options. To find the compiled kernel for them takes Triton longer than to launch
    it. So it is kept here, by all that a compilation may depend on: constants, numbers, dtypes, and
    whether an address is a multiple of 16.
    """
    recording = getattr(_Recording.active, "recording", None)
    for (run, values), (_, _, tensors, _, _) in zip(_runners(calls), calls, strict=True):
        run(*tensors, *values)
        if recording is not None:
            recording.launched(run, tensors, values)


def _runners(calls):
    """What launches each call's kernel, and the numbers and constants that follow its tensors."""
    if INTERPRET:
        return [
            (functools.partial(kernel[grid], **options), numbers)
            for kernel, grid, _, numbers, options in calls
        ]
    device = torch.cuda.current_device()
    keys = [_key(device, *call) for call in calls]
    found = [_compiled.get(key) for key in keys]
    if None in found:
        new = {k: call for k, call, f in zip(keys, calls, found, strict=True) if f is None}
        new = _compile(device, new)
        found = [f or new[key] for key, f in zip(keys, found, strict=True)]
    return [
        (compiled[grid], (*numbers, *constants))
        for (compiled, constants), (_, grid, _, numbers, _) in zip(found, calls, strict=True)
    ]


def _key(device, kernel, grid, tensors, numbers, options):
    """All that the compilation of a kernel may depend on."""
    types = [
        None if t is None
        else (t.dtype, t.data_ptr() % 16) if isinstance(t, Tensor)
        else t.base.dtype  # of a descriptor
        for t in tensors
    ]  # fmt: skip
    return device, kernel.fn, numbers, *options.values(), *types


def _compile(device, calls):
    """The compiled kernel for each call, by key, and the values of its constants; both are kept."""

    def compiled(call):
        kernel, grid, tensors, numbers, options = call
        with torch.cuda.device(device):  # a thread begins with device 0
            found = kernel.warmup(*tensors, *numbers, grid=grid, **options)
            getattr(found, "run", None)  # which makes its launcher, too
        constants = kernel.arg_names[len(tensors) + len(numbers) :]
        return found, [options[name] for name in constants]

    kinds = {(device, kernel, *options.values()) for kernel, _, _, _, options in calls.values()}
    if kinds <= _known:  # other numbers for the same kernel, which Triton most often has compiled
        found = map(compiled, calls.values())
    else:  # at the same time: one after the other takes half as long again
        with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
            found = list(pool.map(compiled, calls.values()))
    found = dict(zip(calls, found, strict=True))
    if len(_compiled) > 10_000:  # inputs of ever new lengths
        _compiled.clear()
    _known.update(kinds)
    _compiled.update(found)
    return found


# --------------------------------------------------------------------------------------------------
# SSD
# --------------------------------------------------------------------------------------------------

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
# b·c·g·NSPLIT, and rows of SUMS partial sums, the first WIDE of them dD's. Constants: Q, PB, NB and
# HB are the sizes of a tile along q, p, n and h, PREC the precision of products, STAGES the depth
# of the pipeline. Indices: bh = b·H + h, and pb, nb the tiles of p and n.
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


@triton.jit
def pin(tile, PIN: tl.constexpr):
    """The tile, unchanged, but as something the compiler takes for a computed value.

    The move is dropped by the assembler. It pays twice, for 2-byte inputs on a GPU (PIN):

    Triton gives a loaded tile that only matrix products read, straight from shared memory, one
    more buffer than the others. Passing it through registers once saves that buffer, which is what
    lets two programs share a multiprocessor in `scan_kernel`: 0.45 instead of 0.62 ms for 2.7b at
    b8 l4096 on an H200.

    A sum of products that nothing but the next iteration reads is still in the making when that
    begins. If products start from zero there, as in `bc_part`, the assembler lets every single
    matrix instruction wait for the one before. Using the sum ends the overlap, and with it that.
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
    dt_sb, dt_sl, dt_sh, A_sh, seq_sb, seq_sl, low, high,
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
    A_h = tl.load(A_ptr + h * A_sh, mask=mask_h, other=0.0).to(tl.float32)
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
            change_q = tl.load(seq, mask=mask_q, other=0) != tl.load(
                seq - seq_sl, mask=mask_q, other=0
            )
            tl.store(run_ptr + b * (NC * Q) + pos, tl.cumsum(change_q.to(tl.int32), axis=0))


@triton.jit
def walk(
    v_desc, K_desc, series_desc, borders_desc, end_ptr, run_ptr, state_pn, first, last, reverse,
    b, h, g, pb, nb, bh, BH, NC,
    KEEP: tl.constexpr, HAS_SEQ: tl.constexpr,
    Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The state alone, chunk after chunk: state <- 2^a_end state + (v · weight)^T K.

    Forward in time v, K = x, B and the weight is 2^(a_end - e_q); in reverse v, K = dy, C and the
    weight is 2^a_q, which is the same recurrence for the gradient of the state. Returns the last
    state and the sum of a_end (-inf past a reset). KEEP: the state before each chunk goes to
    borders_desc, in the second half of it if reverse.

        |  v^T (p, q)  |  x  |  K (q, n)  |  ->  state (p, n) in registers

    Masked by the tensor descriptors: positions past l, rows past p, columns past n read as zero.
    """
    q = tl.arange(0, Q)
    total = 0.0
    for i in tl.range(first, last, num_stages=STAGES):
        c = tl.where(reverse, NC - 1 - i, i)
        # load
        K_qn = K_desc.load([b, g, c * Q, nb * NB]).reshape(Q, NB)
        v_pq = tl.trans(v_desc.load([b, h, c * Q, pb * PB]).reshape(Q, PB))
        w_q = series_desc.load(
            [tl.where(reverse, BH * SERIES_A, BH * SERIES_E) + bh, c * Q]
        ).reshape(Q)
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
        if KEEP:
            at = tl.where(reverse, BH + bh, bh) * NC + c
            tile = operand(state_pn, v_pq.dtype, PREC).reshape(1, PB, NB)
            borders_desc.store([at, pb * PB, nb * NB], tile)
        # dot
        vw_pq = operand(v_pq * w_q[None, :], v_pq.dtype, PREC)
        state_pn *= gamma
        state_pn = tl.dot(vw_pq, K_qn, state_pn, input_precision=PREC)
    return state_pn, total


# SSD: forward -------------------------------------------------------------------------------------


@jit
def segment_kernel(
    x_desc, B_desc, series_desc, end_ptr, run_ptr, seg_ptr, decay_ptr,
    NC, H, BH, HPG, NPB, P, N, NSEG, CPS,
    HAS_SEQ: tl.constexpr, Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr,
    PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What a segment of CPS chunks adds to the state, and the decay over the whole segment.

    Grid (b · (segments - 1) · h · p/PB, n/NB): nobody needs the last segment's. Tile (PB, NB) of
    the state.

        state <- 0;  state, total <- walk(the segment's chunks)
        store state, 2^total
    """
    pid = tl.program_id(0)
    pb = pid % NPB
    h = (pid // NPB) % H
    s = (pid // NPB // H) % (NSEG - 1)
    b = pid // NPB // H // (NSEG - 1)
    nb = tl.program_id(1)
    b64 = b.to(tl.int64)
    state_pn, total = walk(
        x_desc, B_desc, series_desc, x_desc, end_ptr + (b64 * H + h) * NC, run_ptr + b64 * (NC * Q),
        tl.zeros((PB, NB), tl.float32), s * CPS, tl.minimum(s * CPS + CPS, NC), False,
        b, h, h // HPG, pb, nb, b * H + h, BH, NC,
        False, HAS_SEQ, Q, PB, NB, PREC, STAGES,
    )  # fmt: skip
    # store
    row = (b64 * NSEG + s) * H + h
    p = pb * PB + tl.arange(0, PB)
    n = nb * NB + tl.arange(0, NB)
    mask_pn = (p < P)[:, None] & (n < N)[None, :]
    tl.store(seg_ptr + (row * P + p[:, None]) * N + n[None, :], state_pn, mask=mask_pn)
    tl.store(decay_ptr + row, tl.exp2(total))


@jit
def scan_kernel(
    x_desc, B_desc, C_desc, series_desc, y_ptr,
    end_ptr, run_ptr, D_ptr, init_ptr, seg_ptr, decay_ptr, final_ptr,
    D_sh, D_sp, i_sb, i_sh, i_sp, i_sn,
    L, NC, H, BH, HPG, NPB, P, N, NSEG, CPS,
    HAS_SEQ: tl.constexpr, HAS_D: tl.constexpr, HAS_INIT: tl.constexpr, SEGMENTS: tl.constexpr,
    Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, PREC: tl.constexpr, PIN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """y_t = 2^a_t H C_t + sum_{s<=t} (B_s·C_t) 2^(a_t - e_s) x_s + D x_t, and H to the next chunk.

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

    Masked: s > t, and pairs in different runs of seq_idx; stores past l or p (reads are masked by
    the descriptors).
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
    if HAS_D:
        D_p = tl.load(D_ptr + h * D_sh + p * D_sp, mask=mask_p, other=0.0).to(tl.float32)
    end_ptr += (b64 * H + h) * NC
    half_pn = operand(state_pn, x_desc.dtype, PREC)
    for c in tl.range(seg * CPS, tl.minimum(seg * CPS + CPS, NC), num_stages=STAGES):
        # load
        B_qn = B_desc.load([b, g, c * Q, 0]).reshape(Q, NB)
        C_nq = tl.trans(C_desc.load([b, g, c * Q, 0]).reshape(Q, NB))
        x_pq = tl.trans(x_desc.load([b, h, c * Q, pb * PB]).reshape(Q, PB))
        a_q = series_desc.load([BH * SERIES_A + b * H + h, c * Q]).reshape(Q)
        e_q = series_desc.load([BH * SERIES_E + b * H + h, c * Q]).reshape(Q)
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
            y_pq += x_pq.to(tl.float32) * D_p[:, None]
        # store
        y_at = y_ptr + ((b64 * L + c * Q) * H + h) * P + q[None, :] * (H * P) + p[:, None]
        mask_pq = mask_p[:, None] & (c * Q + q < L)[None, :]
        tl.store(y_at, y_pq.to(y_ptr.dtype.element_ty), mask=mask_pq)
    if seg == NSEG - 1:
        final_ptr += (b64 * H + h) * P * N
        tl.store(final_ptr + p[:, None] * N + n[None, :], state_pn, mask=mask_pn)


# SSD: backward ------------------------------------------------------------------------------------


@jit
def border_kernel(
    x_desc, B_desc, dy_desc, C_desc, series_desc, borders_desc,
    end_ptr, run_ptr, init_ptr, dfinal_ptr, dinit_ptr,
    i_sb, i_sh, i_sp, i_sn, f_sb, f_sh, f_sp, f_sn,
    NC, H, BH, HPG, NPB, P, N,
    HAS_SEQ: tl.constexpr, HAS_INIT: tl.constexpr, HAS_DFINAL: tl.constexpr,
    Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The state H at every chunk's start, and the gradient dH of the state at every chunk's end:

        dH_{c-1} = 2^a_end dH_c + sum_t 2^a_t dy_t C_t^T        (dH_c: where chunk c ends)

    Grid (b · h · p/PB, n/NB, 2): the two directions in one launch, so that they fill the GPU
    together. They differ in their descriptors only, not in their code.

        state <- initial state            |  state <- gradient of the final state
        walk forward over (x, B) -> H     |  walk backward over (dy, C) -> dH
                                          |  store state as the gradient of the initial state
    """
    pid = tl.program_id(0)
    nb = tl.program_id(1)
    reverse = tl.program_id(2) == 1
    pb = pid % NPB
    h = (pid // NPB) % H
    b = pid // NPB // H
    b64 = b.to(tl.int64)
    p = pb * PB + tl.arange(0, PB)
    n = nb * NB + tl.arange(0, NB)
    mask_pn = (p < P)[:, None] & (n < N)[None, :]
    state_pn = tl.zeros((PB, NB), tl.float32)
    if reverse:
        v_desc, K_desc = dy_desc, C_desc
        if HAS_DFINAL:
            state_pn += load_state(dfinal_ptr + b64 * f_sb + h * f_sh, f_sp, f_sn, p, n, mask_pn)
    else:
        v_desc, K_desc = x_desc, B_desc
        if HAS_INIT:
            state_pn += load_state(init_ptr + b64 * i_sb + h * i_sh, i_sp, i_sn, p, n, mask_pn)
    state_pn, _ = walk(
        v_desc, K_desc, series_desc, borders_desc, end_ptr + (b64 * H + h) * NC,
        run_ptr + b64 * (NC * Q), state_pn, 0, NC, reverse,
        b, h, h // HPG, pb, nb, b * H + h, BH, NC, True, HAS_SEQ, Q, PB, NB, PREC, STAGES,
    )  # fmt: skip
    if HAS_INIT:
        if reverse:
            dinit_ptr += (b64 * H + h) * P * N
            tile = state_pn.to(dinit_ptr.dtype.element_ty)
            tl.store(dinit_ptr + p[:, None] * N + n[None, :], tile, mask=mask_pn)


@triton.jit
def dx_part(
    pid, x_desc, dy_desc, B_desc, C_desc, series_desc, borders_desc, dx_desc,
    series_ptr, end_ptr, run_ptr, D_ptr, W_ptr, sums_ptr, D_sh, D_sp, SUMS,
    NC, H, BH, G, HPG, NPB, P, NSPLIT, HPS,
    HAS_SEQ: tl.constexpr, D_VECTOR: tl.constexpr,
    Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
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
    k = pid % NSPLIT
    g = (pid // NSPLIT) % G
    c = (pid // NSPLIT // G) % NC
    b = pid // NSPLIT // G // NC
    q = tl.arange(0, Q)
    B_sn = B_desc.load([b, g, c * Q, 0]).reshape(Q, NB)
    C_tn = C_desc.load([b, g, c * Q, 0]).reshape(Q, NB)
    keep_st = q[:, None] <= q[None, :]
    if HAS_SEQ:
        run_q = tl.load(run_ptr + b.to(tl.int64) * (NC * Q) + c * Q + q)
        run_end = tl.load(run_ptr + b.to(tl.int64) * (NC * Q) + c * Q + Q - 1)
        keep_st = keep_st & (run_q[:, None] == run_q[None, :])
    S_st = tl.where(keep_st, tl.dot(B_sn, tl.trans(C_tn), input_precision=PREC), 0.0)
    W_st = tl.zeros((Q, Q), tl.float32)
    first = g * HPG + k * HPS
    last = tl.minimum(first + HPS, g * HPG + HPG)
    for i in tl.range(first * NPB, last * NPB, num_stages=STAGES):
        h = i // NPB
        pb = i % NPB
        bh = b * H + h
        # load
        x_sp = x_desc.load([b, h, c * Q, pb * PB]).reshape(Q, PB)
        dy_tp = dy_desc.load([b, h, c * Q, pb * PB]).reshape(Q, PB)
        dH_pn = borders_desc.load([(BH + bh) * NC + c, pb * PB, 0]).reshape(PB, NB)
        a_q = series_desc.load([BH * SERIES_A + bh, c * Q]).reshape(Q)
        dt_q = series_desc.load([BH * SERIES_DT + bh, c * Q]).reshape(Q)
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
        if not D_VECTOR:
            xdy_q = tl.sum(tl.where(q[:, None] == q[None, :], T_st, 0.0), axis=1)
        SL_st = S_st * L_st
        W_st += T_st * L_st * dt_q[:, None]
        M_st = T_st * SL_st
        col_s = tl.sum(M_st, axis=1)
        row_t = tl.sum(M_st * dt_q[:, None], axis=0)
        G_st = operand(SL_st, x_sp.dtype, PREC)
        v_sp = tl.dot(G_st, dy_tp, v_sp, input_precision=PREC)
        dx_sp = v_sp * dt_q[:, None]
        if D_VECTOR:
            p = pb * PB + tl.arange(0, PB)
            D_p = tl.load(D_ptr + h * D_sh + p * D_sp, mask=p < P, other=0.0).to(tl.float32)
            dx_sp += dy_tp.to(tl.float32) * D_p[None, :]
            dD_p = tl.sum(x_sp.to(tl.float32) * dy_tp.to(tl.float32), axis=0)
            sums_at = sums_ptr + (b * NC + c).to(tl.int64) * SUMS + h * P + p
            tl.store(sums_at, dD_p, mask=p < P)
        else:
            dx_sp += dy_tp.to(tl.float32) * tl.load(D_ptr + h * D_sh).to(tl.float32)
            xdy_at = series_at(series_ptr, pb * SET + SERIES_XDY, bh, c, BH, NC, Q)
            tl.store(xdy_at + q, xdy_q)
        # store
        dx_desc.store([b, h, c * Q, pb * PB], dx_sp.to(x_sp.dtype).reshape(1, 1, Q, PB))
        tl.store(series_at(series_ptr, pb * SET + SERIES_ROW, bh, c, BH, NC, Q) + q, row_t)
        tl.store(series_at(series_ptr, pb * SET + SERIES_COL, bh, c, BH, NC, Q) + q, col_s)
        tl.store(series_at(series_ptr, pb * SET + SERIES_OUT, bh, c, BH, NC, Q) + q, out_s)
    W_st = operand(tl.where(keep_st, W_st, 0.0), dx_desc.dtype, PREC)
    tl.store(W_ptr + (pid.to(tl.int64) * Q + q[:, None]) * Q + q[None, :], W_st)


@triton.jit
def bc_part(
    pid, x_desc, dy_desc, C_desc, series_desc, borders_desc,
    series_ptr, end_ptr, run_ptr, parts_ptr, cross_ptr,
    NC, H, BH, G, HPG, NPB, N, NSPLIT, HPS, PROGRAMS,
    HAS_SEQ: tl.constexpr, Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr,
    PREC: tl.constexpr, PIN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums over a share of a group's heads, to which `total_part` adds those with W. o as above.

        dB_s  = sum_h o_s dt_s x_s dH
        dC_t  = sum_h 2^a_t dy_t H
        in_t  = 2^a_t dy_t·(H C_t)                        what t receives from earlier chunks
        cross = 2^a_end <H, dH>                           what passes through the chunk untouched

    Tiles dB (s, n) and dC (t, n) stay in registers:

        for each head:
            in <- rows of (C H^T) ∘ dy · 2^a_t;  cross <- diagonal of H dH^T · 2^a_end
            dB += (x · o_s dt_s) dH;             dC += (dy · 2^a_t) H

    The diagonals of two products stand in for sums of elementwise products: the tensor cores have
    time to spare here, the registers have no room. Masked: columns past n.
    """
    k = pid % NSPLIT
    g = (pid // NSPLIT) % G
    c = (pid // NSPLIT // G) % NC
    b = pid // NSPLIT // G // NC
    q = tl.arange(0, Q)
    n = tl.arange(0, NB)
    pp = tl.arange(0, PB)
    C_tn = C_desc.load([b, g, c * Q, 0]).reshape(Q, NB)
    if HAS_SEQ:
        run_q = tl.load(run_ptr + b.to(tl.int64) * (NC * Q) + c * Q + q)
        run_end = tl.load(run_ptr + b.to(tl.int64) * (NC * Q) + c * Q + Q - 1)
    dB_sn = tl.zeros((Q, NB), tl.float32)
    dC_tn = tl.zeros((Q, NB), tl.float32)
    first = g * HPG + k * HPS
    last = tl.minimum(first + HPS, g * HPG + HPG)
    for i in tl.range(first * NPB, last * NPB, num_stages=STAGES):
        h = i // NPB
        pb = i % NPB
        bh = b * H + h
        # load
        x_sp = x_desc.load([b, h, c * Q, pb * PB]).reshape(Q, PB)
        dy_tp = dy_desc.load([b, h, c * Q, pb * PB]).reshape(Q, PB)
        H_pn = borders_desc.load([bh * NC + c, pb * PB, 0]).reshape(PB, NB)
        dH_pn = borders_desc.load([(BH + bh) * NC + c, pb * PB, 0]).reshape(PB, NB)
        a_q = series_desc.load([BH * SERIES_A + bh, c * Q]).reshape(Q)
        dt_q = series_desc.load([BH * SERIES_DT + bh, c * Q]).reshape(Q)
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
        cross_pp = tl.dot(H_pn, tl.trans(dH_pn), input_precision=PREC)
        cross_p = tl.sum(tl.where(pp[:, None] == pp[None, :], cross_pp, 0.0), axis=1) * gamma
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
    mask_qn = (q >= 0)[:, None] & (n < N)[None, :]
    tl.store(parts_ptr + at, dB_sn, mask=mask_qn)
    at = ((PROGRAMS + pid).to(tl.int64) * Q + q[:, None]) * N + n[None, :]
    tl.store(parts_ptr + at, dC_tn, mask=mask_qn)


@jit
def chunk_kernel(
    x_desc, dy_desc, B_desc, C_desc, series_desc, borders_desc, dx_desc,
    series_ptr, end_ptr, run_ptr, D_ptr, W_ptr, parts_ptr, cross_ptr, sums_ptr,
    D_sh, D_sp, SUMS, NC, H, BH, G, HPG, NPB, P, N, NSPLIT, HPS, PROGRAMS,
    HAS_SEQ: tl.constexpr, D_VECTOR: tl.constexpr,
    Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, PREC: tl.constexpr, PIN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """What the gradients need of each chunk: two kernels in one launch.

    Grid 2 · b · c · g · splits. Even programs run `dx_part` and odd ones `bc_part`, for the same
    chunk and the same share of a group's heads. Neighbours run at the same time, so that whichever
    comes second finds x, dy and dH in the L2 cache: they come from memory once instead of twice.
    One program for both would need more registers than there are.
    """
    pid = tl.program_id(0) // 2
    if tl.program_id(0) % 2 == 0:
        dx_part(
            pid, x_desc, dy_desc, B_desc, C_desc, series_desc, borders_desc, dx_desc,
            series_ptr, end_ptr, run_ptr, D_ptr, W_ptr, sums_ptr, D_sh, D_sp, SUMS,
            NC, H, BH, G, HPG, NPB, P, NSPLIT, HPS,
            HAS_SEQ, D_VECTOR, Q, PB, NB, PREC, STAGES,
        )  # fmt: skip
    else:
        # Two stages here: a third set of four tiles would leave room for one program only.
        bc_part(
            pid, x_desc, dy_desc, C_desc, series_desc, borders_desc,
            series_ptr, end_ptr, run_ptr, parts_ptr, cross_ptr,
            NC, H, BH, G, HPG, NPB, N, NSPLIT, HPS, PROGRAMS,
            HAS_SEQ, Q, PB, NB, PREC, PIN, 2,
        )  # fmt: skip


@triton.jit
def total_part(
    pid, nb, B_desc, C_desc, W_ptr, parts_ptr, dB_ptr, dC_ptr, dB_sl, L, NC, G, N, NSPLIT, PROGRAMS,
    Q: tl.constexpr, NB: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dB = sum over shares of W C + their dB, dC = sum over shares of W^T B + their dC.

    Tiles (q, n). Masked: columns past n, positions past l.
    """
    g = pid % G
    c = (pid // G) % NC
    b = pid // G // NC
    q = tl.arange(0, Q)
    n = nb * NB + tl.arange(0, NB)
    mask_qn = (q >= 0)[:, None] & (n < N)[None, :]
    B_sn = B_desc.load([b, g, c * Q, nb * NB]).reshape(Q, NB)
    C_tn = C_desc.load([b, g, c * Q, nb * NB]).reshape(Q, NB)
    dB_sn = tl.zeros((Q, NB), tl.float32)
    dC_tn = tl.zeros((Q, NB), tl.float32)
    for k in range(0, NSPLIT):
        # load
        share = pid * NSPLIT + k
        W_st = tl.load(W_ptr + (share.to(tl.int64) * Q + q[:, None]) * Q + q[None, :])
        at = (share.to(tl.int64) * Q + q[:, None]) * N + n[None, :]
        dB_sn += tl.load(parts_ptr + at, mask=mask_qn, other=0.0)
        at = ((PROGRAMS + share).to(tl.int64) * Q + q[:, None]) * N + n[None, :]
        dC_tn += tl.load(parts_ptr + at, mask=mask_qn, other=0.0)
        # dot
        dB_sn = tl.dot(W_st, C_tn, dB_sn, input_precision=PREC)
        dC_tn = tl.dot(tl.trans(W_st), B_sn, dC_tn, input_precision=PREC)
    # store
    at = (b.to(tl.int64) * L + c * Q + q[:, None]) * dB_sl + g * N + n[None, :]
    mask_qn = (c * Q + q < L)[:, None] & (n < N)[None, :]
    tl.store(dB_ptr + at, dB_sn.to(dB_ptr.dtype.element_ty), mask=mask_qn)
    tl.store(dC_ptr + at, dC_tn.to(dC_ptr.dtype.element_ty), mask=mask_qn)


@triton.jit
def chain_part(
    bc, h, dt_ptr, A_ptr, bias_ptr, series_ptr, cross_ptr, ddt_ptr, sums_ptr,
    A_sh, ddt_sl, low, high, SUMS, WIDE, L, NC, H, BH, NPB,
    RAW: tl.constexpr, D_VECTOR: tl.constexpr, Q: tl.constexpr,
    PB: tl.constexpr,
):  # fmt: skip
    """The gradient of the step dt_j A is all that flows across position j, from s < j to t >= j:

        f_j   = sum_{t>=j} (row_t - dt_t col_t) + sum_{t>=j} in_t + sum_{s<j} dt_s out_s + cross
                inside the chunk                  from before       to after               past it
        ddt_j = col_j + out_j + A f_j
        dA    = sum_j dt_j f_j

    RAW: to the inputs of softplus(dt + bias), where it is not cut off, and of A = -exp(A_log):

        draw_j = ddt_j · sigmoid(dt_j + bias);  dbias = sum_j draw_j;  dA_log = A · dA

    Tile (q, h). Row and column sums come from the same fp32 products, and no suffix sum is a total
    minus a prefix sum: either would cancel badly where the decay is strong.

        load row, col, in, out, and out one position earlier; add up the parts of the headdim
        f <- reversed cumulative sums + forward cumulative sum + cross
        store ddt, and this chunk's part of dA (and of dD and dbias)

    Masked: heads past h, positions past l (their dt is 0).
    """
    b = bc // NC
    c = bc % NC
    q = tl.arange(0, Q)
    pp = tl.arange(0, PB)
    mask_h = h < H
    mask_qh = mask_h[None, :] & (q >= 0)[:, None]
    mask_before = mask_h[None, :] & (q > 0)[:, None]
    bh = b * H + h
    # load
    dt_at = series_at(series_ptr, SERIES_DT, bh, c, BH, NC, Q)[None, :] + q[:, None]
    dt_qh = tl.load(dt_at, mask=mask_qh, other=0.0)
    dt_before_qh = tl.load(dt_at - 1, mask=mask_before, other=0.0)
    A_h = tl.load(A_ptr + h * A_sh, mask=mask_h, other=0.0).to(tl.float32)
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
        row_qh += tl.load(row_at[None, :] + q[:, None], mask=mask_qh, other=0.0)
        col_qh += tl.load(col_at[None, :] + q[:, None], mask=mask_qh, other=0.0)
        out_qh += tl.load(out_at[None, :] + q[:, None], mask=mask_qh, other=0.0)
        before_qh += tl.load(out_at[None, :] + q[:, None] - 1, mask=mask_before, other=0.0)
        in_qh += tl.load(in_at[None, :] + q[:, None], mask=mask_qh, other=0.0)
        if not D_VECTOR:
            xdy_at = series_at(series_ptr, pb * SET + SERIES_XDY, bh, c, BH, NC, Q)
            xdy_qh += tl.load(xdy_at[None, :] + q[:, None], mask=mask_qh, other=0.0)
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
    sums_ptr += bc.to(tl.int64) * SUMS
    at_qh = (b.to(tl.int64) * L + c * Q + q[:, None]) * ddt_sl + h[None, :]
    mask_qh = mask_h[None, :] & (c * Q + q < L)[:, None]
    if RAW:
        raw_qh = tl.load(dt_ptr + at_qh, mask=mask_qh, other=0.0).to(tl.float32)
        raw_qh += tl.load(bias_ptr + h, mask=mask_h, other=0.0).to(tl.float32)[None, :]
        step_qh = softplus(raw_qh)
        cut_qh = (step_qh < low) | (step_qh > high)  # not where it is NaN, as is the gradient then
        ddt_qh = tl.where(mask_qh & ~cut_qh, ddt_qh * tl.sigmoid(raw_qh), 0.0)
        dA_h *= A_h
        tl.store(sums_ptr + WIDE + H + h, tl.sum(ddt_qh, axis=0), mask=mask_h)
    tl.store(ddt_ptr + at_qh, ddt_qh.to(ddt_ptr.dtype.element_ty), mask=mask_qh)
    tl.store(sums_ptr + WIDE + h, dA_h, mask=mask_h)
    if not D_VECTOR:
        tl.store(sums_ptr + h, tl.sum(xdy_qh, axis=0), mask=mask_h)


@jit
def finish_kernel(
    B_desc, C_desc, dt_ptr, A_ptr, bias_ptr, series_ptr, W_ptr, parts_ptr, cross_ptr,
    dB_ptr, dC_ptr, ddt_ptr, sums_ptr,
    A_sh, dB_sl, ddt_sl, low, high, SUMS, WIDE, L, NC, H, BH, G, NPB, N, NSPLIT, PROGRAMS,
    RAW: tl.constexpr, D_VECTOR: tl.constexpr,
    Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, HB: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """From what the chunks' programs left to the gradients: two kernels in one launch.

    Grid (b·c, g · n/NB + h/HB): programs of `total_part`, one for each tile of dB, and then some of
    `chain_part`, one for every HB heads.
    """
    bc = tl.program_id(0)
    i = tl.program_id(1)
    tiles = G * tl.cdiv(N, NB)
    if i < tiles:
        total_part(
            bc * G + i % G, i // G, B_desc, C_desc, W_ptr, parts_ptr, dB_ptr, dC_ptr, dB_sl,
            L, NC, G, N, NSPLIT, PROGRAMS, Q, NB, PREC,
        )  # fmt: skip
    else:
        chain_part(
            bc, (i - tiles) * HB + tl.arange(0, HB), dt_ptr, A_ptr, bias_ptr, series_ptr,
            cross_ptr, ddt_ptr, sums_ptr, A_sh, ddt_sl, low, high, SUMS, WIDE, L, NC, H, BH, NPB,
            RAW, D_VECTOR, Q, PB,
        )  # fmt: skip


# SSD: launches ------------------------------------------------------------------------------------


def _config(x, n):
    """Q, PB, NB, warps: one set of tile sizes per (bytes per element, d_state), for every kernel
    but those of the fp32 forward without tf32, where PB is 32: see `_ssd_forward_from`.

    Q = 64 is the narrowest tile that Hopper's matrix instruction takes, and work inside a chunk
    grows with Q. PB is 64 even when the headdim is less: a padded tile costs little, while narrower
    headdim tiles are where Triton 3.4-3.7 has been seen to miscompile. Where tiles would be more
    than 16 KB each (d_state 256, or fp32), Q is halved and twice the warps share the work.
    """
    NB = max(64, n)
    fp32 = x.dtype == torch.float32
    Q = 32 if fp32 or NB == 256 else 64
    PB = 32 if fp32 and NB == 256 else 64
    return Q, PB, NB, 8 if fp32 or NB == 256 else 4


def _stages(x):
    """Pipeline depth: tiles are fetched two iterations ahead, or one if they are fp32."""
    return 2 if x.dtype == torch.float32 else 3


def _operands(*tensors):
    """The tensors as the kernels read them, and the precision of their products.

    The range of fp16 is too small for what multiplies in here, such as dt (B·C). So fp16 is read as
    fp32, multiplied as tf32, which has fp16's 10 bits and fp32's range, and accumulated in fp32.
    """
    x, precision = tensors[0], "ieee"
    if x.dtype == torch.float16:
        tensors, precision = [t.float() for t in tensors], "tf32"
    elif x.dtype == torch.float32 and x.is_cuda and _allows_tf32():
        precision = "tf32"
    return *(_addressable(t) for t in tensors), precision


@functools.cache
def _slots(device):
    """How many programs run at once: two on each multiprocessor (registers allow no more)."""
    if device.type != "cuda":
        return 8
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _segments(programs, nc, slots):
    """Into how many segments to cut the sequence, so that no more than one wave runs."""
    return max(1, min(slots // programs, nc // 4, 16))


def _split(heads, programs, slots):
    """Cut the heads of a group in (parts, heads per part), so that one wave of programs is full."""
    size = _cdiv(heads, max(1, min(heads, slots // programs)))
    return _cdiv(heads, size), size


def _addressable(t):
    """t where it lies, or a copy if the tensor memory accelerator cannot address it there: it wants
    a contiguous last axis, and a base and strides that are multiples of 16 bytes."""
    fine = t.data_ptr() % 16 == 0 and _even(t.shape, t.stride(), 16 // t.element_size())
    return t if fine else t.clone(memory_format=torch.contiguous_format)


@functools.lru_cache(1024)
def _even(shape, strides, step):
    pairs = zip(shape[:-1], strides[:-1], strict=True)
    return strides[-1] == 1 and all(n == 1 or (s > 0 and s % step == 0) for n, s in pairs)


def _tiles(t, *block):
    """Descriptor of t in tiles; what a tile has outside t reads as zero and is not written.

    A (b, l, h, w) tensor is seen as (b, h, l, w), so that a tile (Q, W) is one head's positions.
    """
    shape, stride = t.shape, t.stride()
    if t.ndim == 4:
        (b, l, h, w), (sb, sl, sh, _) = shape, stride
        shape, block = [b, h, l, w], (1, 1, *block)
        # The stride along an axis of size 1 may be anything, but has to be addressable.
        stride = [sb if b > 1 else 16, sh if h > 1 else 16, sl if l > 1 else 16, 1]
    return _descriptor(t, shape, stride, block)


def _strides(t, count):
    return t.stride() if t is not None else (0,) * count


def _D_strides(D):
    return (0, 0) if D is None else (D.stride(0), D.stride(1) if D.ndim == 2 else 0)


SIZES = 16, 32, 64, 128, 256  # of headdim and d_state


# What makes dt and A of the numbers that a layer has for them; see `prep_kernel`.
class _Raw(NamedTuple):
    dt_bias: Tensor
    low: float
    high: float


def _prepare(x, dt, A, seq_idx, raw, Q, series):
    """The series that `prep_kernel` writes, with room for others; `end`, `run`; and the call."""
    b, l, h = dt.shape
    nc = _cdiv(l, Q)
    f32 = dict(device=x.device, dtype=torch.float32)
    series, end = torch.empty(series * b * h, nc * Q, **f32), torch.empty(b * h, nc, **f32)
    # Without resets nobody reads run; `end` stands in for its address.
    run = end
    if seq_idx is not None:
        run = torch.empty(b, nc * Q, device=x.device, dtype=torch.int32)
    bias, *limit = raw or (None, 0.0, 0.0)
    tensors = dt, A, bias, seq_idx, series, end, run
    numbers = (*dt.stride(), A.stride(0), *_strides(seq_idx, 2), *limit, l, nc, h, b * h)
    options = dict(RAW=bias is not None, HAS_SEQ=seq_idx is not None, Q=Q, HB=16, num_warps=4)
    return series, end, run, (prep_kernel, (b * nc, _cdiv(h, 16), 1), tensors, numbers, options)


def _ssd_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, initial_state: Tensor | None, seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _ssd_forward_from(None, x, dt, A, B, C, D, initial_state, seq_idx)


def _ssd_forward_from(raw, x, dt, A, B, C, D, initial_state, seq_idx):
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    y = torch.empty(b, l, h, p, device=x.device, dtype=x.dtype)
    final = torch.empty(b, h, p, n, device=x.device, dtype=torch.float32)
    x, B, C, precision = _operands(x, B, C)
    Q, PB, NB, warps = _config(x, n)
    if precision == "ieee" and x.dtype == torch.float32 and not INTERPRET:
        # Three tf32 products make one of 22 bits, on the tensor cores. True fp32 products need more
        # registers than there are, and ten times as long. Of the state only 32 rows fit beside the
        # parts of the factors, whatever d_state is.
        precision, PB = "tf32x3", 32
    if initial_state is None and warps == 8:
        # Where the state begins as a constant zero, Triton 3.6 makes code for Hopper that gets y
        # wrong from the second chunk on: seen in tf32. So it is read, as any other state.
        initial_state = torch.zeros_like(final)
    nc, npb, stages = _cdiv(l, Q), _cdiv(p, PB), _stages(x)
    cps = _cdiv(nc, _segments(b * h * npb, nc, _slots(x.device)))
    nseg = _cdiv(nc, cps)
    tile = dict(HAS_SEQ=seq_idx is not None, Q=Q, PB=PB, PREC=precision, STAGES=stages)
    series, end, run, prep = _prepare(x, dt, A, seq_idx, raw, Q, 3)
    x_desc, series_desc, calls = _tiles(x, Q, PB), _tiles(series, 1, Q), [prep]
    seg = decay = None
    if nseg > 1:
        seg = torch.empty(b, nseg, h, p, n, device=x.device, dtype=torch.float32)
        decay = torch.empty(b, nseg, h, device=x.device, dtype=torch.float32)
        tensors = x_desc, _tiles(B, Q, 64), series_desc, end, run, seg, decay
        numbers = nc, h, b * h, h // g, npb, p, n, nseg, cps
        options = dict(**tile, NB=64, num_warps=4, num_stages=stages)
        grid = b * (nseg - 1) * h * npb, _cdiv(n, 64), 1
        calls.append((segment_kernel, grid, tensors, numbers, options))
    tensors = (
        x_desc, _tiles(B, Q, NB), _tiles(C, Q, NB), series_desc, y,
        end, run, D, initial_state, seg, decay, final,
    )  # fmt: skip
    numbers = (
        *_D_strides(D), *_strides(initial_state, 4),
        l, nc, h, b * h, h // g, npb, p, n, nseg, cps,
    )  # fmt: skip
    options = dict(
        **tile, HAS_D=D is not None, HAS_INIT=initial_state is not None, SEGMENTS=nseg > 1,
        NB=NB, PIN=x.element_size() == 2 and not INTERPRET, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    calls.append((scan_kernel, (b * nseg * h * npb, 1, 1), tensors, numbers, options))
    _launch(*calls)
    return y, final


def _ssd_backward(
    dy: Tensor | None, dfinal: Tensor | None,
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, initial_state: Tensor | None, seq_idx: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    dx = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    dB = torch.empty(B.shape, device=x.device, dtype=x.dtype)
    dC = torch.empty(B.shape, device=x.device, dtype=x.dtype)
    ddt = torch.empty(dt.shape, device=x.device, dtype=dt.dtype)
    given_D = torch.zeros_like(A) if D is None else D
    given = x, dt, A, B, C, given_D, initial_state, seq_idx
    (sums, dD, dA), dinit = _ssd_backward_into(dx, ddt, dB, dC, dy, dfinal, None, *given)
    _fold((sums, dD, dA))
    return [dx, ddt, dA, dB, dC, x.new_empty(0) if D is None else dD, dinit]


def _ssd_backward_into(dx, ddt, dB, dC, dy, dfinal, raw, x, dt, A, B, C, D, initial_state, seq_idx):
    """Write the first four. dB and dC have the same strides, and so have, with `raw`, dt and ddt;
    the rows of different batch elements follow one another.

    Returns:
        What `_fold` has to sum, and to where: into dD, dA, and the gradient of raw.dt_bias if there
        is one. And the gradient of the initial state.
    """
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    hpg = h // g
    dinit, dD = x.new_empty(0), torch.empty_like(D, memory_format=torch.contiguous_format)
    if initial_state is not None:
        dinit = torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    bias, *limit = raw or (None, 0.0, 0.0)
    sums_to = [dD, torch.empty(h, device=x.device, dtype=A.dtype)]
    if bias is not None:
        sums_to.append(torch.empty_like(bias, memory_format=torch.contiguous_format))
    x, B, C, dy, precision = _operands(x, B, C, torch.zeros_like(x) if dy is None else dy)
    dx_to, dx = dx, dx if dx.dtype == x.dtype else torch.empty_like(x)
    Q, PB, NB, warps = _config(x, n)
    nc, npb, stages = _cdiv(l, Q), _cdiv(p, PB), _stages(x)
    nsplit, hps = _split(hpg, 2 * b * nc * g, _slots(x.device))
    programs = b * nc * g * nsplit
    f32 = dict(device=x.device, dtype=torch.float32)
    borders = torch.empty(2 * b * h * nc, p, n, device=x.device, dtype=x.dtype)
    W = torch.empty(programs, Q, Q, device=x.device, dtype=x.dtype)
    parts = torch.empty(2 * programs, Q, n, **f32)
    cross = torch.empty(npb * b * h, nc, PB, **f32)
    # Per chunk: the parts of dD, then those of dA, then those of dt_bias's.
    wide = dD.numel()
    width = wide + (h if bias is None else 2 * h)
    sums = torch.empty(b * nc, width, **f32)
    tile = dict(Q=Q, PB=PB, PREC=precision)
    pipeline = dict(STAGES=stages, num_warps=warps, num_stages=stages)
    series, end, run, prep = _prepare(x, dt, A, seq_idx, raw, Q, 3 + 5 * npb)
    x_desc, dy_desc, series_desc = _tiles(x, Q, PB), _tiles(dy, Q, PB), _tiles(series, 1, Q)
    B_desc, C_desc, borders_desc = _tiles(B, Q, NB), _tiles(C, Q, NB), _tiles(borders, 1, PB, NB)
    tensors = (
        x_desc, B_desc, dy_desc, C_desc, series_desc, borders_desc,
        end, run, initial_state, dfinal, dinit,
    )  # fmt: skip
    strides = *_strides(initial_state, 4), *_strides(dfinal, 4)
    numbers = *strides, nc, h, b * h, hpg, npb, p, n
    options = dict(
        **tile, HAS_SEQ=seq_idx is not None, HAS_INIT=initial_state is not None,
        HAS_DFINAL=dfinal is not None, NB=NB, **pipeline,
    )  # fmt: skip
    border = border_kernel, (b * h * npb, 1, 2), tensors, numbers, options
    tensors = (
        x_desc, dy_desc, B_desc, C_desc, series_desc, borders_desc, _tiles(dx, Q, PB),
        series, end, run, D, W, parts, cross, sums,
    )  # fmt: skip
    sizes = nc, h, b * h, g, hpg, npb, p, n, nsplit, hps, programs
    options = dict(
        **tile, D_VECTOR=D.ndim == 2, HAS_SEQ=seq_idx is not None, NB=NB,
        PIN=x.element_size() == 2 and not INTERPRET, **pipeline,
    )  # fmt: skip
    numbers = *_D_strides(D), width, *sizes
    chunk = chunk_kernel, (2 * programs, 1, 1), tensors, numbers, options
    tensors = (
        _tiles(B, Q, 64), _tiles(C, Q, 64), dt, A, bias, series, W, parts, cross,
        dB, dC, ddt, sums,
    )  # fmt: skip
    numbers = (
        A.stride(0), dB.stride(1), ddt.stride(1), *limit, width, wide,
        l, nc, h, b * h, g, npb, n, nsplit, programs,
    )  # fmt: skip
    options = dict(**tile, D_VECTOR=D.ndim == 2, RAW=bias is not None, NB=64, HB=16, num_warps=4)
    grid = b * nc, g * _cdiv(n, 64) + _cdiv(h, 16), 1
    _launch(prep, border, chunk, (finish_kernel, grid, tensors, numbers, options))
    if dx is not dx_to:
        dx_to.copy_(dx)
    return (sums, *sums_to), dinit


def _ssd_fake(x, dt, A, B, C, D, initial_state, seq_idx):
    b, l, h, p = x.shape
    return x.new_empty(x.shape), x.new_empty(b, h, p, B.shape[3], dtype=torch.float32)


_ssd = _operation("ssd", _ssd_forward, _ssd_backward, _ssd_fake, count=7)


def _unfit_ssd(x, dt, A, B, C, D, initial_state, seq_idx) -> str | None:
    required = {"x": x, "dt": dt, "A": A, "B": B, "C": C}
    reason = _unfit(required, {"D": D, "initial_state": initial_state, "seq_idx": seq_idx})
    if reason is not None:
        return reason
    if x.ndim != 4 or B.ndim != 4:
        return "x and B do not have 4 dimensions"
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    if x.numel() == 0 or B.numel() == 0:
        return "x or B is empty"
    if h % g:
        return "the number of groups does not divide the number of heads"
    return _misshapen(
        ("dt", dt, (b, l, h)),
        ("A", A, (h,)),
        ("B", B, (b, l, g, n)),
        ("C", C, (b, l, g, n)),
        ("D", D, (h,), (h, p)),
        ("initial_state", initial_state, (b, h, p, n)),
        ("seq_idx", seq_idx, (b, l)),
    )


def _beyond_ssd(x, dt, A, B, C, D, initial_state, seq_idx) -> str | None:
    if B.dtype != x.dtype or C.dtype != x.dtype:
        return f"x, B and C are {x.dtype}, {B.dtype} and {C.dtype}; they must have one dtype"
    for name, size in (("headdim", x.shape[3]), ("d_state", B.shape[3])):
        if size not in SIZES:
            return f"{name} is {size}; it must be 16, 32, 64, 128 or 256"
    if x.is_cuda and not _has_room(x.device):
        return "the GPU has less shared memory than the 227 KB for which the tiles are chosen"
    return _beyond_labels(seq_idx)


@torch.compiler.assume_constant_result
def _has_room(device: torch.device) -> bool:
    return _shared_memory(device) >= 227 * 1024


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one program may use: 227 KB on Hopper and on Blackwell for data centers."""
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0)


def takes_ssd(
    x, dt, A, B, C, D=None, *, chunk_size=None, initial_state=None, seq_idx=None
) -> bool:  # fmt: skip
    """Whether `ssd` can run on these tensors; a user on a GPU is told once what it cannot."""
    given = (x, dt, A, B, C, D, initial_state, seq_idx)
    return _unfit_ssd(*given) is None and _takes("ssd", _beyond_ssd(*given))


def ssd(x, dt, A, B, C, D=None, *, chunk_size=None, initial_state=None, seq_idx=None):
    """The SSD operation; signature and meaning are those of its twin, `mamba2.ssd`.

    x (b, l, h, p); dt (b, l, h) after softplus; A (h), negative; B, C (b, l, g, n); D (h) or
    (h, p); initial_state (b, h, p, n); seq_idx (b, l), integers: where it changes, the state starts
    again from zero. Returns y (b, l, h, p) in x's dtype and the final state (b, h, p, n) in fp32.
    `chunk_size` is accepted for the twin's sake: the tile size is the kernels' own.

    A may be positive: results and gradients are right unless a state grows by 2^127 or more within
    64 positions, which is where fp32 ends. A dt below 0, which softplus never returns, counts as
    NaN, for results and gradients: y is NaN from that position on, and so is the final state. (The
    twin computes with such a dt. Looking for one would synchronise with the GPU in every call, and
    applying its sign would cost every call one more product per pair of positions.)

    x, B and C may be slices of one larger tensor: they are read where they lie if their rows are
    16-byte aligned, and copied otherwise, as float16 always is: to float32, for its range. The
    gradients cannot be differentiated again.

    Raises:
        ValueError: what the kernels cannot take, which is what `takes_ssd` says no to.
    """
    given = (x, dt, A, B, C, D, initial_state, seq_idx)
    _refuse("ssd", _unfit_ssd(*given) or _beyond_ssd(*given))
    return _ssd(*given)


# --------------------------------------------------------------------------------------------------
# Pieces of convolution, norm and step
# --------------------------------------------------------------------------------------------------


def _unit(*sizes: int) -> int:
    """8 if it divides every size, else 1.

    Sizes and strides are passed to kernels in this unit. A kernel that computes `size * 8` lets the
    compiler see that rows begin at multiples of 8 elements, so that a thread may load 16 bytes at
    once. Triton finds such facts out alone only for multiples of 16, and the rows of the 130m
    model's projection are 3,352 = 8 · 419 apart.
    """
    return 8 if all(size % 8 == 0 for size in sizes) else 1


# Whether kernels may contain PTX, the assembly of NVIDIA's GPUs.
PTX = tl.constexpr(not INTERPRET and torch.version.hip is None)


@triton.jit
def _sigmoid(v):
    """1 / (1 + exp(-v)), at twice the speed of `tl.sigmoid` and as exact to a few units of 2^-24.

    Triton's exp and division guard against tiny intermediate values, which takes more instructions
    than the exponential itself. Here such a value may become 0: 2^(-v log2 e) below 2^-126 is added
    to 1 anyway, and a sigmoid below 2^-126 is as good as 0.
    """
    if PTX:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;",
            "=f,f",
            [v * -1.4426950408889634],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;",
            "=f,f",
            [1.0 + power],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return tl.sigmoid(v)


@triton.jit
def _fold_part(
    block, partial_ptr, first_ptr, second_ptr, third_ptr, rows, columns, n_first, n_second, n_third,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[c] = Σ_r partial[r, c]: the first `n_first` columns to one tensor, the next to others.

    Tile: ROWS x COLUMNS, moved down all rows.

        sum = 0
        for block of rows:            # always in the same order
            sum += partial[block, columns]
        out[columns] = Σ over ROWS of sum

    Masked: rows and columns past the end.
    """
    c = block * COLUMNS + tl.arange(0, COLUMNS)
    sum_rc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row in range(0, rows, ROWS):
        r = row + tl.arange(0, ROWS)
        mask_rc = (r[:, None] < rows) & (c[None, :] < columns)
        at_rc = r[:, None].to(tl.int64) * columns + c[None, :]
        sum_rc += tl.load(partial_ptr + at_rc, mask=mask_rc, other=0.0)
    sum_c = tl.sum(sum_rc, axis=0)
    tl.store(first_ptr + c, sum_c, mask=c < n_first)
    c -= n_first
    tl.store(second_ptr + c, sum_c, mask=(c >= 0) & (c < n_second))
    c -= n_second
    tl.store(third_ptr + c, sum_c, mask=(c >= 0) & (c < n_third))


@jit
def _fold_kernel(
    a_ptr, a1_ptr, a2_ptr, a3_ptr, b_ptr, b1_ptr, b2_ptr, b3_ptr, c_ptr, c1_ptr, c2_ptr, c3_ptr,
    a_rows, a_columns, a1, a2, a3, b_rows, b_columns, b1, b2, b3, c_rows, c_columns, c1, c2, c3,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`_fold_part` for up to three matrices a, b, c, of which some may have no columns.

    Grid: (column blocks of a, b and c, one after the other,).
    """
    block = tl.program_id(0)
    b_block = block - tl.cdiv(a_columns, COLUMNS)
    c_block = b_block - tl.cdiv(b_columns, COLUMNS)
    if b_block < 0:
        _fold_part(
            block, a_ptr, a1_ptr, a2_ptr, a3_ptr, a_rows, a_columns, a1, a2, a3, ROWS, COLUMNS
        )
    elif c_block < 0:
        _fold_part(
            b_block, b_ptr, b1_ptr, b2_ptr, b3_ptr, b_rows, b_columns, b1, b2, b3, ROWS, COLUMNS
        )
    else:
        _fold_part(
            c_block, c_ptr, c1_ptr, c2_ptr, c3_ptr, c_rows, c_columns, c1, c2, c3, ROWS, COLUMNS
        )


def _fold(*sums: tuple[Tensor, ...]) -> None:
    """Sum the rows of up to three matrices, each into up to three tensors, one after the other."""
    # 32 columns are one 128-byte line of fp32, and give some hundred programs for a few thousand
    # columns; 64 rows at once keep enough loads in flight to read a few MB in a few microseconds.
    options = dict(ROWS=64, COLUMNS=32, num_warps=4)
    blocks, tensors, numbers = 0, [], []
    for partial, *outs in sums:
        (rows, columns), missing = partial.shape, 3 - len(outs)
        blocks += _cdiv(columns, 32)
        tensors += [partial, *outs, *[partial] * missing]
        numbers += [rows, columns, *[out.numel() for out in outs], *[0] * missing]
    missing = 3 - len(sums)
    tensors += [partial] * (4 * missing)
    numbers += [0] * (5 * missing)
    _launch((_fold_kernel, (blocks, 1, 1), tensors, tuple(numbers), options))


# --------------------------------------------------------------------------------------------------
# Causal depthwise convolution + bias + SiLU
# --------------------------------------------------------------------------------------------------
#
# u is the initial state (k-1 inputs) followed by x, and i counts positions back from t:
#
#     v[t] = bias + Σ_i weight[k-1-i] · u[t-i]        i = 0 .. k-1
#     y[t] = v[t] · σ(v[t])
#
# With seq_idx a term counts only if no sequence begins in (t-i, t].
#
# Tiles, chosen by hand on an H200: D channels wide, R rows loaded together, walked by one program
# for so many positions. 128 and 256 divide the published widths (1792 = 7 · 256, 5376 = 21 · 256).
#
# Forward: four channels a thread; eight rows in flight, 4 KB a program, cover the latency of memory
# (with one warp it is 9 % slower, with four rows 2 %). k-1 rows in 64 are read twice.
CONV_FORWARD = dict(R=8, D=256, num_warps=2)
CONV_FORWARD_ROWS = (64,)
# Backward: 17 values a channel (window, unfinished dx, taps, their sums, bias and its sum) stay in
# registers, so four channels a thread again, and only four rows of x and dy in flight. Long walks
# write fewer partial sums; short ones are for inputs that long ones would cut in too few programs.
CONV_BACKWARD = dict(R=4, D=128, num_warps=1)
CONV_BACKWARD_ROWS = (256, 128)


@triton.jit
def _if(exists, channel, d):
    """Mask for a row of d channels: all of them if the row exists, else none."""
    return channel < tl.where(exists, d, 0)


@jit
def _conv_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, seq_ptr, y_ptr, final_ptr,
    l, q_rows, d_units, x_batch_units, x_row_units,
    UNIT: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr, SEQ: tl.constexpr,
    R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """y[t] = silu(bias + Σ_i weight[k-1-i] · u[t-i]), and the last k-1 rows of u.

    Grid: (batch · blocks of q · blocks of d,), d fastest: neighbours read neighbouring memory.
    A program walks down `q_rows` positions, D channels wide, and keeps the k-1 inputs before t in
    registers, so that each row is loaded, and turned into fp32, once:

               D
           ┌────────┐   x_window   u[t-k+1] .. u[t-1]
           │        │
           ├────────┤   x_rows     u[t] .. u[t+R-1]: loaded together, before the first is used,
        R  │        │              so that their latencies overlap
           └────────┘

        for t in q0 .. q0 + q_rows - 1, R rows at a time:
            v    = bias + weight · (u[t], x_window)     # 0 if a sequence begins in (t-i, t]
            y[t] = v * sigmoid(v)
            x_window = u[t], x_window without its last
        the program with the last positions: final[j] = u[l-(k-1)+j]

    Masked: channels past d, positions past l, positions before 0 (those come from the state).
    """
    d = d_units * UNIT
    blocks_d = tl.cdiv(d, D)
    blocks_q = tl.cdiv(l, q_rows)
    program = tl.program_id(0)
    q0 = (program // blocks_d) % blocks_q * q_rows
    end = tl.minimum(q0 + q_rows, l)
    batch = (program // blocks_d // blocks_q).to(tl.int64)
    x_row = x_row_units.to(tl.int64) * UNIT
    y_row = d_units.to(tl.int64) * UNIT
    x_ptr += batch * x_batch_units * UNIT
    y_ptr += batch * l * d
    state_ptr += batch * (K - 1) * d
    final_ptr += batch * (K - 1) * d
    seq_ptr += batch * l

    channel = (program % blocks_d) * D + tl.arange(0, D)
    mask_d = channel < d
    bias_d = tl.zeros((D,), tl.float32)
    if BIAS:
        bias_d = tl.load(bias_ptr + channel, mask=mask_d, other=0.0).to(tl.float32)

    # weight[i] is the tap that looks i positions back, x_window[i-1] is u[t-i]; `start` is where
    # the sequence of position t begins, or some position before the window.
    weight = ()
    for i in tl.static_range(K):
        weight_d = tl.load(weight_ptr + channel * K + K - 1 - i, mask=mask_d, other=0.0)
        weight += (weight_d.to(tl.float32),)
    x_window = ()
    start = q0 - K
    for i in tl.static_range(1, K):
        t = q0 - i
        mask_new_d = _if(t >= 0, channel, d)
        u_d = tl.load(x_ptr + t * x_row + channel, mask=mask_new_d, other=0.0).to(tl.float32)
        if STATE:
            at_d = (K - 1 + t) * d + channel
            mask_old_d = _if(t < 0, channel, d)
            u_d += tl.load(state_ptr + at_d, mask=mask_old_d, other=0.0).to(tl.float32)
        x_window += (u_d,)
        if SEQ:  # before position 0 lies the first sequence
            after = tl.load(seq_ptr + tl.maximum(t + 1, 0))
            if tl.load(seq_ptr + tl.maximum(t, 0)) != after:
                start = tl.maximum(start, t + 1)

    x_next_ptr = x_ptr + q0 * x_row
    y_next_ptr = y_ptr + q0 * y_row
    for t0 in range(q0, end, R):
        # load
        x_rows = ()
        for j in tl.static_range(R):
            mask_row_d = _if(t0 + j < end, channel, d)
            x_rows += (tl.load(x_next_ptr + j * x_row + channel, mask=mask_row_d, other=0.0),)

        for j in tl.static_range(R):
            t = t0 + j
            u = (x_rows[j].to(tl.float32),) + x_window  # u[i] is u[t-i]
            if SEQ:
                before = tl.load(seq_ptr + tl.maximum(tl.minimum(t, l) - 1, 0))
                if tl.load(seq_ptr + tl.minimum(t, l - 1)) != before:
                    start = t

            # taps
            v_d = bias_d
            for i in tl.static_range(K):
                u_d = u[i]
                if SEQ and i > 0:
                    u_d = tl.where(t - i >= start, u_d, 0.0)
                v_d += weight[i] * u_d
            x_window = u[: K - 1]

            # store
            y_d = v_d * _sigmoid(v_d)
            tl.store(y_next_ptr + j * y_row + channel, y_d, mask=_if(t < end, channel, d))
        x_next_ptr += R * x_row
        y_next_ptr += R * y_row

    # final state, the newest row first
    if end == l:
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
            tl.store(final_ptr + (K - 1 - i) * d + channel, row_d, mask=mask_d)


@jit
def _conv_backward_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, seq_ptr, dy_ptr, dfinal_ptr, dx_ptr, dstate_ptr,
    partial_ptr,
    l, q_rows, d_units, x_batch_units, x_row_units, dx_row_units,
    UNIT: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr, SEQ: tl.constexpr,
    DFINAL: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """With dv[t] = dy[t] · silu'(v[t]):

        dx[s]       = Σ_i weight[k-1-i] · dv[s+i]     (and the same for the state, s < 0)
        dweight[j]  = Σ_t dv[t] · u[t-(k-1)+j]
        dbias       = Σ_t dv[t]

    where a term counts only if no sequence begins between its two positions.

    Grid: (batch · blocks of q · blocks of d,), d fastest. A program walks down its `q_rows`
    positions one by one, D channels wide, and k-1 positions further, because dv[s+i] reaches back.
    What it needs from other positions stays in registers, so each row of x and dy is read once
    (k-1 rows twice, at the borders of the blocks), and every sigmoid is computed once:

           x_window     u[t-k+1] .. u[t-1]       known inputs, for v[t]
           pending      dx[t-k+1] .. dx[t-1]     sums that still miss a term

        for t in q0 .. end + k-2, the rows loaded R at a time:
            v   = bias + weight · (u[t], x_window)
            dv  = dy[t] * sigmoid(v) * (1 + v * (1 - sigmoid(v)))
            dweight, dbias += dv * (u[t], x_window), dv          # while t < end
            pending += weight * dv;  dx[t-k+1] is complete: store it

    Each program leaves one row of sums: K per channel, as in weight (d, k), then one per channel.
    Masked: channels past d, rows past l, dx outside of the program's own positions.
    """
    d = d_units * UNIT
    blocks_d = tl.cdiv(d, D)
    blocks_q = tl.cdiv(l, q_rows)
    program = tl.program_id(0)
    block = (program // blocks_d).to(tl.int64)  # counts (batch, block of q)
    q0 = (program // blocks_d) % blocks_q * q_rows
    end = tl.minimum(q0 + q_rows, l)
    batch = block // blocks_q
    x_row = x_row_units.to(tl.int64) * UNIT
    dy_row = d_units.to(tl.int64) * UNIT
    dx_row = dx_row_units.to(tl.int64) * UNIT
    x_ptr += batch * x_batch_units * UNIT
    dy_ptr += batch * l * d
    dx_ptr += batch * l * dx_row
    state_ptr += batch * (K - 1) * d
    dstate_ptr += batch * (K - 1) * d
    dfinal_ptr += batch * (K - 1) * d
    seq_ptr += batch * l
    partial_ptr += block * d * (K + 1)

    channel = (program % blocks_d) * D + tl.arange(0, D)
    mask_d = channel < d
    zero_d = tl.zeros((D,), tl.float32)
    bias_d = zero_d
    if BIAS:
        bias_d = tl.load(bias_ptr + channel, mask=mask_d, other=0.0).to(tl.float32)

    # x_window[i-1] is u[t-i]; weight[i] is the tap that looks i positions back; `start` is where
    # the sequence of position t begins (or some position before the window).
    weight = ()
    dweight = ()
    for i in tl.static_range(K):
        weight_d = tl.load(weight_ptr + channel * K + K - 1 - i, mask=mask_d, other=0.0)
        weight += (weight_d.to(tl.float32),)
        dweight += (zero_d,)
    x_window = ()
    pending = ()
    start = q0 - K
    for i in tl.static_range(1, K):
        t = q0 - i
        mask_new_d = _if(t >= 0, channel, d)
        u_d = tl.load(x_ptr + t * x_row + channel, mask=mask_new_d, other=0.0)
        u_d = u_d.to(tl.float32)
        if STATE:
            at_d = (K - 1 + t) * d + channel
            mask_old_d = _if(t < 0, channel, d)
            u_d += tl.load(state_ptr + at_d, mask=mask_old_d, other=0.0).to(tl.float32)
        x_window += (u_d,)
        pending += (zero_d,)
        if SEQ:
            after = tl.load(seq_ptr + tl.maximum(t + 1, 0))
            if tl.load(seq_ptr + tl.maximum(t, 0)) != after:
                start = tl.maximum(start, t + 1)
    dbias_d = zero_d

    x_next_ptr = x_ptr + q0 * x_row
    dy_next_ptr = dy_ptr + q0 * dy_row
    for t0 in range(q0, end + K - 1, R):
        # load, R rows before the first is used, to have their latencies overlap
        x_rows = ()
        dy_rows = ()
        for j in tl.static_range(R):
            mask_row_d = _if(t0 + j < l, channel, d)
            x_rows += (tl.load(x_next_ptr + j * x_row + channel, mask=mask_row_d, other=0.0),)
            dy_rows += (tl.load(dy_next_ptr + j * dy_row + channel, mask=mask_row_d, other=0.0),)
        x_next_ptr += R * x_row
        dy_next_ptr += R * dy_row

        for j in tl.static_range(R):
            t = t0 + j
            u = (x_rows[j].to(tl.float32),) + x_window  # u[i] is u[t-i]
            if SEQ:  # past l nothing begins
                before = tl.load(seq_ptr + tl.maximum(tl.minimum(t, l) - 1, 0))
                if tl.load(seq_ptr + tl.minimum(t, l - 1)) != before:
                    start = t

            # dv
            v_d = bias_d
            for i in tl.static_range(K):
                u_d = u[i]
                if SEQ and i > 0:
                    u_d = tl.where(t - i >= start, u_d, 0.0)
                v_d += weight[i] * u_d
            sigmoid_d = _sigmoid(v_d)
            dv_d = dy_rows[j].to(tl.float32) * sigmoid_d * (1.0 + v_d * (1.0 - sigmoid_d))

            # weight and bias: the rows past `end` belong to the next program
            own_dv_d = tl.where(t < end, dv_d, 0.0)
            dbias_d += own_dv_d
            sums = ()
            for i in tl.static_range(K):
                u_d = u[i]
                if SEQ and i > 0:
                    u_d = tl.where(t - i >= start, u_d, 0.0)
                sums += (dweight[i] + own_dv_d * u_d,)
            dweight = sums

            # x: after this term the sum for s = t-(k-1) is complete
            sums = ()
            for i in tl.static_range(K):
                term_d = weight[i] * dv_d
                if SEQ and i > 0:
                    term_d = tl.where(t - i >= start, term_d, 0.0)
                if i > 0:
                    term_d += pending[i - 1]
                sums += (term_d,)
            s = t - (K - 1)
            dx_d = sums[K - 1]
            pending = sums[: K - 1]
            x_window = u[: K - 1]

            # store
            if DFINAL:  # row r of the final state is u[l-(k-1)+r]
                mask_final_d = _if((s >= tl.maximum(start, l - (K - 1))) & (s < l), channel, d)
                at_d = (s - (l - (K - 1))) * d + channel
                dx_d += tl.load(dfinal_ptr + at_d, mask=mask_final_d, other=0.0).to(tl.float32)
            mask_s_d = _if((s >= q0) & (s < end), channel, d)
            tl.store(dx_ptr + s * dx_row + channel, dx_d, mask=mask_s_d)
            if STATE:
                tl.store(dstate_ptr + t * d + channel, dx_d, mask=_if(s < 0, channel, d))

    for i in tl.static_range(K):
        tl.store(partial_ptr + channel * K + K - 1 - i, dweight[i], mask=mask_d)
    tl.store(partial_ptr + d * K + channel, dbias_d, mask=mask_d)


def _conv_blocks(b: int, l: int, d: int, channels: int, choices: tuple) -> tuple[int, int]:
    """Blocks of positions, all batches together, and their length: long unless that makes few."""
    for q_rows in choices:
        blocks = b * _cdiv(l, q_rows)
        if blocks * _cdiv(d, channels) >= 4096:
            break
    return blocks, q_rows


def _conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    (b, l, d), k = x.shape, weight.shape[-1]
    y = torch.empty((b, l, d), dtype=x.dtype, device=x.device)
    final = torch.empty((b, k - 1, d), dtype=x.dtype, device=x.device)
    unit = _conv_unit(x)
    blocks, q_rows = _conv_blocks(b, l, d, CONV_FORWARD["D"], CONV_FORWARD_ROWS)
    tensors = x, *_conv_tensors(x, weight, bias, state, seq_idx), y, final
    numbers = l, q_rows, d // unit, x.stride(0) // unit, x.stride(1) // unit
    options = _conv_flags(unit, weight, bias, state, seq_idx) | CONV_FORWARD
    grid = blocks * _cdiv(d, CONV_FORWARD["D"]), 1, 1
    _launch((_conv_forward_kernel, grid, tensors, numbers, options))
    return y, final


def _conv_tensors(x, *given):
    """The other tensors as the kernels read them; x stands in for those that are not there."""
    return [x if t is None else t.contiguous() for t in given]


def _conv_flags(unit, weight, bias, state, seq_idx):
    there = dict(BIAS=bias is not None, STATE=state is not None, SEQ=seq_idx is not None)
    return dict(UNIT=unit, K=weight.shape[-1], **there)


def _conv_backward(
    dy: Tensor | None,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
) -> list[Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums, dstate = _conv_backward_into(dx, dy, dfinal, x, weight, bias, state, seq_idx)
    _fold(sums)
    _, dweight, dbias = sums
    return [dx, dweight, dbias, dstate]


def _conv_backward_into(dx, dy, dfinal, x, weight, bias, state, seq_idx):
    """Write dx, whose batch elements follow one another.

    Returns:
        What `_fold` has to sum, and to where: into dweight and dbias, which is empty without a
        bias. And the gradient of the state.
    """
    x = x if x.stride(2) == 1 else x.contiguous()  # a saved tensor's hooks may lay it out anew
    (b, l, d), k = x.shape, weight.shape[-1]
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    dstate = x.new_empty(0) if state is None else state.new_empty(state.shape)
    unit = min(_conv_unit(x), _conv_unit(dx))
    blocks_d = _cdiv(d, CONV_BACKWARD["D"])
    blocks, q_rows = _conv_blocks(b, l, d, CONV_BACKWARD["D"], CONV_BACKWARD_ROWS)
    partial = torch.empty((blocks, d * (k + 1)), dtype=torch.float32, device=x.device)
    dy = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if dy is None else dy
    given = _conv_tensors(x, weight, bias, state, seq_idx, dy, dfinal)
    strides = x.stride(0) // unit, x.stride(1) // unit, dx.stride(1) // unit
    numbers = l, q_rows, d // unit, *strides
    options = _conv_flags(unit, weight, bias, state, seq_idx)
    options |= dict(DFINAL=dfinal is not None, **CONV_BACKWARD)
    tensors = x, *given, dx, dstate, partial
    _launch((_conv_backward_kernel, (blocks * blocks_d, 1, 1), tensors, numbers, options))
    return (partial, dweight, dbias), dstate


def _conv_fake(x, weight, bias, state, seq_idx):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2])


_conv = _operation("causal_conv1d", _conv_forward, _conv_backward, _conv_fake, count=4)


def _unfit_conv(x, weight, bias, initial_state, seq_idx) -> str | None:
    optional = {"bias": bias, "initial_state": initial_state, "seq_idx": seq_idx}
    reason = _unfit({"x": x, "weight": weight}, optional)
    if reason is not None:
        return reason
    if x.ndim != 3 or weight.ndim != 2:
        return "x does not have 3 dimensions, or weight not 2"
    (b, l, d), k = x.shape, weight.shape[1]
    if x.numel() == 0:
        return "x is empty"
    return _misshapen(
        ("weight", weight, (d, k)),
        ("bias", bias, (d,)),
        ("initial_state", initial_state, (b, k - 1, d)),
        ("seq_idx", seq_idx, (b, l)),
    )


def _conv_unit(x: Tensor) -> int:
    # Triton makes a constant of an argument that is 1, and a constant has no dtype to convert.
    return 1 if 8 in (x.shape[2], x.stride(1)) else _unit(x.shape[2], x.stride(0), x.stride(1))


def _beyond_conv(x, weight, bias, initial_state, seq_idx) -> str | None:
    if not 2 <= weight.shape[1] <= 4:
        return f"the convolution has {weight.shape[1]} taps; it must have 2 to 4"
    if x.stride(2) != 1:
        return "the channels of x are not next to each other in memory"
    if 1 in (x.shape[2], x.stride(1)):
        return "the rows of x are one element wide or apart"
    return _beyond_labels(seq_idx)


def takes_causal_conv1d(x, weight, bias=None, *, initial_state=None, seq_idx=None) -> bool:
    """Whether `causal_conv1d` can run on these tensors; what it cannot is said once, on a GPU."""
    given = (x, weight, bias, initial_state, seq_idx)
    return _unfit_conv(*given) is None and _takes("causal_conv1d", _beyond_conv(*given))


def causal_conv1d(x, weight, bias=None, *, initial_state=None, seq_idx=None):
    """silu(causal depthwise convolution of x + bias), and the inputs that the next call needs.

    Signature and meaning are those of its twin, `mamba2.causal_conv1d`:

        y[t] = silu(bias + Σ_j weight[:, j] · u[t-(k-1)+j]),   u = initial_state followed by x

    x              (b, l, d)     rows may be any distance apart, channels contiguous
    weight, bias   (d, k), (d)   k = 2 .. 4
    initial_state  (b, k-1, d)   the inputs before position 0; None: zeros
    seq_idx        (b, l)        integers; where they change a new sequence begins, and no tap looks
                                 back over that border. The state belongs to the first sequence.
    Returns y (b, l, d) and the last k-1 rows of u (b, k-1, d), both in x's dtype; rows of another
    sequence than the last position's are zeros.

    Raises:
        ValueError: what the kernel cannot take, which is what `takes_causal_conv1d` says no to.
    """
    given = (x, weight, bias, initial_state, seq_idx)
    _refuse("causal_conv1d", _unfit_conv(*given) or _beyond_conv(*given))
    if initial_state is not None:
        initial_state = initial_state.to(x.dtype)  # rounds as the twin does
    return _conv(x, weight, bias, initial_state, seq_idx)


# --------------------------------------------------------------------------------------------------
# RMSNorm, with a gate or without
# --------------------------------------------------------------------------------------------------
#
#     v   = y · silu(z), or y where there is no gate z
#     out = weight · v · scale,   scale = 1 / sqrt(mean of v² over the slice + eps)
#
# A slice of `size` = d / groups channels is cut into TILES tiles of N channels: powers of two that
# together are little wider than the slice (5,120 = 5 · 1,024; one tile would be 8,192 wide).
#
# A thread has four channels of each tile. The backward runs 16 warps on each multiprocessor, which
# fill it at 128 registers a thread; left alone, the compiler takes more for wide slices, and then
# only 8 warps fit (5,120 channels: 1.0 ms instead of 0.5).


@functools.cache
def _norm_tiles(size: int) -> dict:
    """N · TILES >= size with the fewest channels too many; R rows of short slices together."""
    if size <= 256:
        n = max(16, _power_of_2(size))
    else:
        n = min((1024, 512, 256), key=lambda n: _cdiv(size, n) * n)
    tiles = _cdiv(size, n)
    r = max(1, 1024 // _power_of_2(n * tiles))
    return dict(R=r, N=n, TILES=tiles, num_warps=r * n // 128)


@functools.cache
def _processors(device: torch.device) -> int:
    return 2 if INTERPRET else torch.cuda.get_device_properties(device).multi_processor_count


def _norm_slots(size: int, rows: int, groups: int, device: torch.device) -> tuple[int, dict]:
    """How many programs per group walk over the rows, and their tiles."""
    tiles = _norm_tiles(size)
    slots = _cdiv(_processors(device) * 16 // tiles["num_warps"], groups)
    limit = dict(maxnreg=128) if size > 2048 else {}
    return min(slots, _cdiv(rows, tiles["R"])), tiles | limit


@jit
def _norm_forward_kernel(
    y_ptr, z_ptr, weight_ptr, out_ptr,
    rows, eps, groups, size_units, y_row_units, z_row_units,
    GATE: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """out = weight · v / sqrt(mean(v²) + eps), v = y · silu(z); without GATE v = y.

    Grid: (blocks of rows · groups,), groups fastest. Tile: R rows x one slice, in TILES pieces.

                 N          N          N
           ┌──────────┬──────────┬──────┬ ─ ┐
        R  │          │          │      │   │   -> one scale per row
           └──────────┴──────────┴──────┴ ─ ┘
            <----------- size --------->

        for each piece:  v = y * z * sigmoid(z); squares += v * v       # v stays in registers
        scale = 1 / sqrt(Σ squares / size + eps)
        for each piece:  out = v * scale * weight

    Masked: rows past the end, channels past the slice.
    """
    size = size_units * UNIT
    group = tl.program_id(0) % groups
    r = (tl.program_id(0) // groups).to(tl.int64) * R + tl.arange(0, R)
    mask_r = r < rows
    y_r1 = (r * y_row_units * UNIT + group * size)[:, None]
    z_r1 = (r * z_row_units * UNIT + group * size)[:, None]
    out_r1 = (r * groups * size + group * size)[:, None]

    # load
    v = ()
    squares_rn = tl.zeros((R, N), tl.float32)
    for i in tl.static_range(TILES):
        n = i * N + tl.arange(0, N)
        mask_rn = mask_r[:, None] & (n < size)[None, :]
        v_rn = tl.load(y_ptr + y_r1 + n[None, :], mask=mask_rn, other=0.0).to(tl.float32)
        if GATE:
            z_rn = tl.load(z_ptr + z_r1 + n[None, :], mask=mask_rn, other=0.0).to(tl.float32)
            v_rn *= z_rn * _sigmoid(z_rn)
        squares_rn += v_rn * v_rn
        v += (v_rn,)
    scale_r = tl.rsqrt(tl.sum(squares_rn, axis=1) / size + eps)

    # store
    for i in tl.static_range(TILES):
        n = i * N + tl.arange(0, N)
        weight_n = tl.load(weight_ptr + group * size + n, mask=n < size, other=0.0)
        out_rn = v[i] * scale_r[:, None] * weight_n.to(tl.float32)[None, :]
        mask_rn = mask_r[:, None] & (n < size)[None, :]
        tl.store(out_ptr + out_r1 + n[None, :], out_rn, mask=mask_rn)


@jit
def _norm_backward_kernel(
    y_ptr, z_ptr, weight_ptr, dout_ptr, dy_ptr, dz_ptr, partial_ptr,
    rows, slots, eps, groups, size_units, y_row_units, z_row_units,
    dy_row_units, dz_row_units,
    GATE: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """With v̂ = v · scale and dv̂ = dout · weight, over one slice:

        dv      = scale · (dv̂ - v̂ · mean(dv̂ · v̂))
        dy, dz  = dv · silu(z), dv · y · silu'(z)     (without GATE: dy = dv)
        dweight = Σ over rows of dout · v̂

    Grid: (slots · groups,), groups fastest: about as many programs as run at a time. Program `slot`
    takes the row blocks slot, slot + slots, ... and keeps its share of dweight in registers.
    Tile: as in the forward.

        for each block of rows:
            v     from y, z;    scale = 1 / sqrt(mean(v * v) + eps)
            mean  = scale * Σ dout * weight * v / size
            dv    = scale * (dout * weight - v * scale * mean)
            dy    = dv * silu(z);   dz = dv * y * silu'(z);   dweight += dout * v * scale
        partial[slot] = dweight

    Masked: rows past the end, channels past the slice.
    """
    size = size_units * UNIT
    group = tl.program_id(0) % groups
    slot = tl.program_id(0) // groups
    dweight = ()
    for _ in tl.static_range(TILES):
        dweight += (tl.zeros((R, N), tl.float32),)

    for block in range(slot, tl.cdiv(rows, R), slots):
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
            dout += (tl.load(dout_ptr + out_r1 + n[None, :], mask=mask_rn, other=0.0),)

        # scale and mean
        squares_rn = tl.zeros((R, N), tl.float32)
        products_rn = tl.zeros((R, N), tl.float32)
        for i in tl.static_range(TILES):
            n = i * N + tl.arange(0, N)
            weight_n = tl.load(weight_ptr + group * size + n, mask=n < size, other=0.0)
            v_rn = y[i].to(tl.float32)
            if GATE:
                z_rn = z[i].to(tl.float32)
                v_rn *= z_rn * _sigmoid(z_rn)
            squares_rn += v_rn * v_rn
            products_rn += dout[i].to(tl.float32) * weight_n.to(tl.float32)[None, :] * v_rn
        scale_r1 = tl.rsqrt(tl.sum(squares_rn, axis=1) / size + eps)[:, None]
        pull_r1 = scale_r1 * scale_r1 * scale_r1 * (tl.sum(products_rn, axis=1) / size)[:, None]

        # store; v is computed again rather than kept
        sums = ()
        for i in tl.static_range(TILES):
            n = i * N + tl.arange(0, N)
            mask_rn = mask_r[:, None] & (n < size)[None, :]
            weight_n = tl.load(weight_ptr + group * size + n, mask=n < size, other=0.0)
            y_rn = y[i].to(tl.float32)
            dout_rn = dout[i].to(tl.float32)
            v_rn = y_rn
            if GATE:
                z_rn = z[i].to(tl.float32)
                sigmoid_rn = _sigmoid(z_rn)
                silu_rn = z_rn * sigmoid_rn
                v_rn *= silu_rn
            dhat_rn = dout_rn * weight_n.to(tl.float32)[None, :]
            dv_rn = scale_r1 * dhat_rn - pull_r1 * v_rn
            dy_rn = dv_rn
            if GATE:
                dy_rn *= silu_rn
                dz_rn = dv_rn * y_rn * (sigmoid_rn + silu_rn * (1.0 - sigmoid_rn))
                tl.store(dz_ptr + dz_r1 + n[None, :], dz_rn, mask=mask_rn)
            tl.store(dy_ptr + dy_r1 + n[None, :], dy_rn, mask=mask_rn)
            sums += (dweight[i] + (scale_r1 * dout_rn) * v_rn,)
        dweight = sums

    partial_ptr += (slot * groups + group).to(tl.int64) * size
    for i in tl.static_range(TILES):
        n = i * N + tl.arange(0, N)
        tl.store(partial_ptr + n, tl.sum(dweight[i], axis=0), mask=n < size)


def _rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The tensor (..., d), and how far apart its rows lie; a copy if they do not lie evenly."""
    sizes, strides = tensor.shape, tensor.stride()
    even = all(strides[i - 1] == sizes[i] * strides[i] for i in range(1, tensor.ndim - 1))
    if even and tensor.ndim > 1 and strides[-1] == 1:
        return tensor, strides[-2]
    rows = tensor.reshape(-1, sizes[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows, rows.stride(0)


def _norm_forward(y: Tensor, z: Tensor | None, weight: Tensor, eps: float, groups: int) -> Tensor:
    out = torch.empty(y.shape, dtype=(weight if z is None else z).dtype, device=y.device)
    gate, rows, size = z is not None, y.numel() // y.shape[-1], y.shape[-1] // groups
    y, y_row = _rows(y)
    z, z_row = _rows(z) if gate else (y, y_row)
    unit = _unit(size, y_row, z_row)
    tiles = _norm_tiles(size)
    numbers = rows, eps, groups, size // unit, y_row // unit, z_row // unit
    options = dict(GATE=gate, UNIT=unit, **tiles)
    grid = _cdiv(rows, tiles["R"]) * groups, 1, 1
    _launch((_norm_forward_kernel, grid, (y, z, weight.contiguous(), out), numbers, options))
    return out


def _norm_backward(
    dout: Tensor, y: Tensor, z: Tensor | None, weight: Tensor, eps: float, groups: int
) -> list[Tensor]:
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    dz = y.new_empty(0) if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    sums = _norm_backward_into(dy, dz, dout, y, z, weight, eps, groups)
    _fold(sums)
    return [dy, dz, sums[1]]


def _norm_backward_into(dy, dz, dout, y, z, weight, eps, groups):
    """Write dy, and dz if there is a z. Rows of both lie evenly.

    Returns:
        What `_fold` has to sum, and to where: into dweight.
    """
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    gate, rows, size = z is not None, y.numel() // y.shape[-1], y.shape[-1] // groups
    y, y_row = _rows(y)
    z, z_row = _rows(z) if gate else (y, y_row)
    dy, dy_row = _rows(dy)
    dz, dz_row = _rows(dz) if gate else (y, y_row)
    unit = _unit(size, y_row, z_row, dy_row, dz_row)
    slots, tiles = _norm_slots(size, rows, groups, y.device)
    partial = torch.empty((slots, size * groups), dtype=torch.float32, device=y.device)
    tensors = y, z, weight.contiguous(), dout.contiguous(), dy, dz, partial
    rows_apart = y_row // unit, z_row // unit, dy_row // unit, dz_row // unit
    numbers = rows, slots, eps, groups, size // unit, *rows_apart
    options = dict(GATE=gate, UNIT=unit, **tiles)
    _launch((_norm_backward_kernel, (slots * groups, 1, 1), tensors, numbers, options))
    return partial, dweight


def _norm_fake(y, z, weight, eps, groups):
    return y.new_empty(y.shape, dtype=(weight if z is None else z).dtype)


_norm = _operation("rms_norm", _norm_forward, _norm_backward, _norm_fake, count=3)


def _unfit_norm(x, weight, eps, gate, groups) -> str | None:
    reason = _unfit({"x": x, "weight": weight}, {"gate": gate})
    if reason is not None:
        return reason
    if not isinstance(eps, (int, float)) or not isinstance(groups, int):
        return "eps is not a number, or groups not an integer"
    if x.ndim == 0 or x.numel() == 0:
        return "x is empty"
    if groups < 1 or x.shape[-1] % groups:
        return "groups does not divide the last dimension of x"
    return _misshapen(("gate", gate, x.shape), ("weight", weight, x.shape[-1:]))


def _beyond_norm(x, weight, eps, gate, groups) -> str | None:
    if x.shape[-1] // groups > 8192:
        return f"a group has {x.shape[-1] // groups} channels; it must have at most 8192"
    return None


def takes_rms_norm(x, weight, eps, *, gate=None, groups=1) -> bool:
    """Whether `rms_norm` can run on these tensors; what it cannot is said once, on a GPU."""
    given = (x, weight, eps, gate, groups)
    return _unfit_norm(*given) is None and _takes("rms_norm", _beyond_norm(*given))


def rms_norm(x, weight, eps, *, gate=None, groups=1):
    """weight · v / sqrt(mean(v²) + eps) for each group; v = x · silu(gate), or x without a gate.

    Signature and meaning are those of its twin, `mamba2.rms_norm`. Above y is x and z the gate.

    x, gate  (..., d)   the gate often is a slice of a projection; rows may be any distance apart
    weight   (d)
    groups              equal parts of d that are normalised apart; d / groups at most 8,192
    Returns (..., d) in the gate's dtype, or in weight's without a gate.

    Raises:
        ValueError: what the kernel cannot take, which is what `takes_rms_norm` says no to.
    """
    given = (x, weight, eps, gate, groups)
    _refuse("rms_norm", _unfit_norm(*given) or _beyond_norm(*given))
    return _norm(x, gate, weight, float(eps), groups)


# --------------------------------------------------------------------------------------------------
# A layer between its projections
# --------------------------------------------------------------------------------------------------
#
# Convolution, SSD and gated norm as one operation, with the kernels above. It spares the CPU what
# lies between three operations, which a small layer waits for, and memory: softplus(dt + dt_bias)
# and -exp(A_log) are made inside SSD's kernels, and each gradient of z, xBC and dt is written to
# its columns of one tensor, the gradient of the projection.


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


def _middle_forward(
    zxbcdt: Tensor, weight: Tensor, bias: Tensor | None, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor, conv: Tensor | None, ssm: Tensor | None, seq_idx: Tensor | None,
    groups: int, eps: float, low: float, high: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    z, xBC, dt = _columns(zxbcdt.contiguous(), weight, dt_bias, norm_weight)
    xBC, conv = _conv_forward(xBC, weight, bias, conv, seq_idx)
    x, B, C = _heads(xBC, dt_bias, norm_weight, groups)
    raw = _Raw(dt_bias.contiguous(), low, high)
    y, ssm = _ssd_forward_from(raw, x, dt, A_log, B, C, D, ssm, seq_idx)
    y = y.view(z.shape)
    return _norm_forward(y, z, norm_weight, eps, groups), conv, ssm, xBC, y


def _middle_backward(
    dout: Tensor | None, dconv: Tensor | None, dssm: Tensor | None, xBC: Tensor, y: Tensor,
    zxbcdt: Tensor, weight: Tensor, bias: Tensor | None, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor, conv: Tensor | None, ssm: Tensor | None, seq_idx: Tensor | None,
    groups: int, eps: float, low: float, high: float,
) -> list[Tensor]:  # fmt: skip
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
    norm_sums = _norm_backward_into(dy, dz, dout, y, z, norm_weight, eps, groups)
    raw = _Raw(dt_bias.contiguous(), low, high)
    ssd_sums, dinit = _ssd_backward_into(
        dx, ddt, dB, dC, dy.view(x.shape), dssm, raw, x, dt, A_log, B, C, D, ssm, seq_idx
    )
    given = dconv, xBC_in, weight, bias, conv, seq_idx
    conv_sums, dstate = _conv_backward_into(dxBC_in, dxBC, *given)
    _fold(norm_sums, ssd_sums, conv_sums)
    (_, dnorm_weight), (_, dD, dA_log, ddt_bias), (_, dweight, dbias) = (
        norm_sums, ssd_sums, conv_sums
    )  # fmt: skip
    return [dwide, dweight, dbias, ddt_bias, dA_log, dD, dnorm_weight, dstate, dinit]


def _middle_fake(
    zxbcdt, weight, bias, dt_bias, A_log, D, norm_weight, conv, ssm, seq_idx, groups, eps, low, high
):
    (b, l, _), (d, _, k), h, hp = zxbcdt.shape, weight.shape, dt_bias.shape[0], norm_weight.shape[0]
    y, new_conv = zxbcdt.new_empty(b, l, hp), zxbcdt.new_empty(b, k - 1, d)
    sizes = b, h, hp // h, (d - hp) // (2 * groups)
    new_ssm = zxbcdt.new_empty(sizes, dtype=torch.float32)
    return y, new_conv, new_ssm, zxbcdt.new_empty(b, l, d), torch.empty_like(y)


_middle = _operation("layer_middle", _middle_forward, _middle_backward, _middle_fake, 9, kept=2)


def _unfit_middle(
    zxbcdt, conv, ssm, seq_idx, weight, bias, dt_bias, A_log, D, norm_weight, groups
) -> str | None:
    heads = {"dt_bias": dt_bias, "A_log": A_log, "D": D}
    required = {"zxbcdt": zxbcdt, "weight": weight, **heads, "norm_weight": norm_weight}
    reason = _unfit(required, {"conv": conv, "ssm": ssm, "seq_idx": seq_idx, "bias": bias})
    if reason is not None:
        return reason
    if zxbcdt.ndim != 3 or weight.ndim != 3 or dt_bias.ndim != 1 or norm_weight.ndim != 1:
        return "zxbcdt or weight do not have 3 dimensions, or dt_bias or norm_weight not 1"
    (b, l, _), (d, _, k), h, hp = zxbcdt.shape, weight.shape, dt_bias.shape[0], norm_weight.shape[0]
    if zxbcdt.numel() == 0 or l == 1:
        return "there are no positions, or only one, without a state"
    if h == 0 or hp % h or h % groups or d <= hp or (d - hp) % (2 * groups):
        return "the channels are not those of heads and groups"
    return _misshapen(
        ("zxbcdt", zxbcdt, (b, l, hp + d + h)),
        ("weight", weight, (d, 1, k)),
        ("bias", bias, (d,)),
        ("A_log", A_log, (h,)),
        ("D", D, (h,)),
        ("conv", conv, (b, k - 1, d)),
        ("ssm", ssm, (b, h, hp // h, (d - hp) // (2 * groups))),
        ("seq_idx", seq_idx, (b, l)),
    )


def _beyond_middle(
    zxbcdt, conv, ssm, seq_idx, weight, bias, dt_bias, A_log, D, norm_weight, groups
) -> str | None:
    hp = norm_weight.shape[0]
    p, n = hp // dt_bias.shape[0], (weight.shape[0] - hp) // (2 * groups)
    if p not in SIZES or n not in SIZES:
        return f"headdim and d_state are {p} and {n}; each must be one of {SIZES}"
    if not 2 <= weight.shape[2] <= 4 or hp // groups > 8192:
        return "the convolution does not have 2 to 4 taps, or a group has over 8192 channels"
    if zxbcdt.is_cuda and not _has_room(zxbcdt.device):
        return "the GPU has too little shared memory"
    return _beyond_labels(seq_idx)


def layer_middle(
    zxbcdt, conv, ssm, seq_idx, weight, bias, dt_bias, A_log, D, norm_weight,
    *, groups, eps, dt_limit=(0.0, math.inf), out=None,
):  # fmt: skip
    """All between a layer's projections; its twin is `mamba2.Mamba2`. One position is a step.
    None, if it cannot take these tensors: then it is the turn of the operations it consists of,
    which say what they cannot take. (To be asked before, as they are, would be one more check.)

    zxbcdt              (b, l, h p + (h p + 2 g n) + h)   the projection: z, xBC and dt
    conv, ssm           (b, k-1, h p + 2 g n), (b, h, p, n)   the Mamba2State; None: zeros
    seq_idx             (b, l)   as for `ssd` and `causal_conv1d`, or None
    weight, bias        (h p + 2 g n, 1, k), (h p + 2 g n) or None   of the convolution
    dt_bias, A_log, D   (h)
    norm_weight         (h p)
    groups, eps         of SSD and norm; of the norm
    dt_limit            dt is clamped to it after softplus
    out                 as for `layer_step`, where there is one position
    Returns norm(y · silu(z)) (b, l, h p) and the new conv in zxbcdt's dtype, and the new ssm in
    fp32, or in ssm's dtype if that is narrower. The gradients cannot be differentiated again.
    """
    if conv is not None and zxbcdt.ndim == 3 and zxbcdt.shape[1] == 1:
        if zxbcdt.shape[2] != norm_weight.shape[0] + weight.shape[0] + dt_bias.shape[0]:
            return None
        z, xBC, dt = _columns(zxbcdt, weight, dt_bias, norm_weight)
        step = xBC, dt, conv, ssm, weight, bias, dt_bias, A_log, D
        norm, limits = (z, norm_weight, eps), dict(dt_limit=dt_limit, out=out)
        if not (takes_rms_norm(*norm, gate=z, groups=groups) and takes_layer_step(*step, **limits)):
            return None
        y, conv, ssm = layer_step(*step, **limits)
        return rms_norm(y, *norm[1:], gate=z, groups=groups), conv, ssm
    given = zxbcdt, conv, ssm, seq_idx, weight, bias, dt_bias, A_log, D, norm_weight, groups
    if _unfit_middle(*given) is not None or _beyond_middle(*given) is not None:
        return None
    conv = None if conv is None else conv.to(zxbcdt.dtype)  # rounds as the twin does
    low, high = dt_limit
    y, conv, new_ssm = _middle(
        zxbcdt, weight, bias, dt_bias, A_log, D, norm_weight, conv, ssm, seq_idx,
        groups, float(eps), float(low), float(high),
    )  # fmt: skip
    if ssm is not None and ssm.dtype.itemsize == 2:
        new_ssm = new_ssm.to(ssm.dtype)
    return y, conv, new_ssm


# --------------------------------------------------------------------------------------------------
# One position of a layer
# --------------------------------------------------------------------------------------------------
#
# What a token needs between the projections of a layer, in one launch:
#
#     x, B, C = silu(bias + Σ_j weight[j] · u[j])          u: the k-1 rows of conv, then xBC
#     dt      = softplus(dt + dt_bias), clamped
#     ssm     = exp(-dt · exp(A_log)) · ssm + dt · x B^T   (p, n), for each head
#     y       = ssm C + D · x
#
# Nearly all bytes are the state's, read once and written once. A program computes B and C of its
# group once and then walks over its share of the tiles of the group's state, 8 KB each. One warp:
# more would compute B and C, and all that is one number a head, once more each. So many programs
# fit on a multiprocessor at a time, by their registers; with few rows there are not enough tiles
# for that, so they are smaller, to have the whole GPU take part.
STEP_PROGRAMS = 8
STEP_LARGE = dict(BYTES=8192, num_warps=1)
STEP_SMALL = dict(BYTES=2048, num_warps=1)


@triton.jit
def _step_inputs(xBC_ptr, conv_ptr, channel, exists, d, K: tl.constexpr):
    """The K inputs that the convolution has at this position, the oldest first."""
    u = ()
    for j in tl.static_range(K - 1):  # rounds to the dtype of xBC as the convolution does
        old = tl.load(conv_ptr + j * d + channel, mask=exists, other=0.0)
        u += (old.to(xBC_ptr.dtype.element_ty),)
    return u + (tl.load(xBC_ptr + channel, mask=exists, other=0.0),)


@triton.jit
def _step_taps(u, weight_ptr, bias_ptr, channel, exists, K: tl.constexpr, BIAS: tl.constexpr):
    """The convolution of these inputs, with bias and SiLU, rounded to their dtype."""
    v = tl.zeros(channel.shape, tl.float32)
    if BIAS:
        v += tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    for j in tl.static_range(K):
        weight = tl.load(weight_ptr + channel * K + j, mask=exists, other=0.0)
        v += weight.to(tl.float32) * u[j].to(tl.float32)
    return (v * _sigmoid(v)).to(u[0].dtype).to(tl.float32)


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
    B_u = _step_inputs(xBC_ptr, conv_ptr, B_at, mask_n, d, K)
    C_u = _step_inputs(xBC_ptr, conv_ptr, C_at, mask_n, d, K)
    if tl.program_id(1) == 0:  # now, not later, so that nothing holds them in registers
        for j in tl.static_range(1, K):
            tl.store(new_conv_ptr + (j - 1) * d + B_at, B_u[j], mask=mask_n)
            tl.store(new_conv_ptr + (j - 1) * d + C_at, C_u[j], mask=mask_n)
    B_n = _step_taps(B_u, weight_ptr, bias_ptr, B_at, mask_n, K, BIAS)
    C_n = _step_taps(C_u, weight_ptr, bias_ptr, C_at, mask_n, K, BIAS)

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
        x_u = _step_inputs(xBC_ptr, conv_ptr, x_at, mask_p, d, K)
        x_p = _step_taps(x_u, weight_ptr, bias_ptr, x_at, mask_p, K, BIAS)

        # decay
        dt = clamp(softplus(dt), low, high)
        state_pn = tl.exp(dt * A) * state_pn + x_p[:, None] * (dt * B_n)[None, :]
        y_p = tl.sum(state_pn * C_n[None, :], axis=1) + D * x_p

        # store
        tl.store(new_ssm_ptr + at_pn, state_pn, mask=mask_pn, eviction_policy="evict_first")
        tl.store(y_ptr + at_p, y_p, mask=mask_p)
        for j in tl.static_range(1, K):
            tl.store(new_conv_ptr + (j - 1) * d + x_at, x_u[j], mask=mask_p)


def _step_into(
    y, new_conv, new_ssm, xBC, dt, conv, ssm, weight, bias, dt_bias, A_log, D, low, high
):
    """Run the kernel, with results to the first three tensors."""
    (b, h, p, n), (d, _, k) = ssm.shape, weight.shape
    g, nb, programs = (
        (d - h * p) // (2 * n),
        _power_of_2(n),
        STEP_PROGRAMS * _processors(xBC.device),
    )
    large = b * h * p * nb * ssm.itemsize > programs * STEP_LARGE["BYTES"]
    config = dict(STEP_LARGE if large else STEP_SMALL)
    pb = min(max(config.pop("BYTES") // (nb * ssm.itemsize), 1), _power_of_2(p))
    tiles = h // g * _cdiv(p, pb)  # in a group
    share = _cdiv(tiles, min(tiles, _cdiv(programs, b * g)))  # of one program
    weights = [t.contiguous() for t in (conv, ssm, weight)]
    weights += [xBC if bias is None else bias.contiguous()]
    weights += [t.contiguous() for t in (dt_bias, A_log, D)]
    numbers = xBC.stride(0), dt.stride(0), h // g, share, low, high
    options = dict(G=g, P=p, N=n, K=k, BIAS=bias is not None, PB=pb, NB=nb, **config)
    tensors = xBC, dt, *weights, y, new_conv, new_ssm
    with torch.cuda.device_of(xBC):
        _launch((_step_kernel, (b * g, _cdiv(tiles, share), 1), tensors, numbers, options))


def _step_forward(
    xBC: Tensor, dt: Tensor, conv: Tensor, ssm: Tensor, weight: Tensor, bias: Tensor | None,
    dt_bias: Tensor, A_log: Tensor, D: Tensor, low: float, high: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    results = _step_fake(xBC, dt, conv, ssm, weight, bias, dt_bias, A_log, D, low, high)
    _step_into(*results, xBC, dt, conv, ssm, weight, bias, dt_bias, A_log, D, low, high)
    return results


def _step_fake(xBC, dt, conv, ssm, weight, bias, dt_bias, A_log, D, low, high):
    b, h, p, _ = ssm.shape
    return xBC.new_empty(b, 1, h * p), xBC.new_empty(conv.shape), ssm.new_empty(ssm.shape)


_step = _operation("layer_step", _step_forward, None, _step_fake, count=0)


def _unfit_step(xBC, dt, conv, ssm, weight, bias, dt_bias, A_log, D, dt_limit, out) -> str | None:
    state, weights = {"conv": conv, "ssm": ssm}, {"dt_bias": dt_bias, "A_log": A_log, "D": D}
    required = {"xBC": xBC, "dt": dt, **state, "weight": weight, **weights}
    reason = _unfit(required, {"bias": bias})
    if reason is not None:
        return reason
    if xBC.ndim != 3 or xBC.shape[1] != 1:
        return "there is not one position"
    given = [*required.values(), *([] if bias is None else [bias])]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return "gradients are wanted"
    if ssm.ndim != 4 or weight.ndim != 3 or xBC.numel() == 0 or ssm.numel() == 0:
        return "ssm does not have 4 dimensions, or weight not 3, or xBC or ssm are empty"
    (b, _, d), (h, p, n), k = xBC.shape, ssm.shape[1:], weight.shape[2]
    groups = (d - h * p) // (2 * n)
    if groups < 1 or d != h * p + 2 * groups * n or h % groups:
        return "the channels of xBC are not those of x, B and C"
    if out is not None:
        unfit = _unfit({"xBC": xBC, "out[0]": out[0], "out[1]": out[1]}, {})
        shapes = ("out[0]", out[0], (b, k - 1, d)), ("out[1]", out[1], (b, h, p, n))
        if unfit or _misshapen(*shapes):
            return unfit or _misshapen(*shapes)
    return _misshapen(
        ("dt", dt, (b, 1, h)),
        ("conv", conv, (b, k - 1, d)),
        ("ssm", ssm, (b, h, p, n)),
        ("weight", weight, (d, 1, k)),
        ("bias", bias, (d,)),
        ("dt_bias", dt_bias, (h,)),
        ("A_log", A_log, (h,)),
        ("D", D, (h,)),
    )


def _beyond_step(xBC, dt, conv, ssm, weight, bias, dt_bias, A_log, D, dt_limit, out) -> str | None:
    if ssm.shape[3] > 1024:
        return f"d_state is {ssm.shape[3]}; it must be at most 1024"
    if xBC.stride(2) != 1 or dt.stride(2) != 1:
        return "the channels of xBC, or the heads of dt, are not next to each other in memory"
    if out is not None:
        if torch.compiler.is_compiling():
            return "out is given under torch.compile, which knows only functions without effects"
        if (out[0].dtype, out[1].dtype) != (xBC.dtype, ssm.dtype):
            return "out does not have the dtypes of xBC and ssm"
        if not (out[0].is_contiguous() and out[1].is_contiguous()):
            return "out is not contiguous"
        apart = out[0].data_ptr() - conv.data_ptr()
        if -out[0].nbytes < apart < conv.nbytes:
            return "out[0] overlaps conv, which all heads read: it must have memory of its own"
    return None


def takes_layer_step(
    xBC, dt, conv, ssm, weight, bias, dt_bias, A_log, D, *, dt_limit=(0.0, math.inf), out=None
) -> bool:  # fmt: skip
    """Whether `layer_step` can run on these tensors; what it cannot is said once, on a GPU."""
    given = (xBC, dt, conv, ssm, weight, bias, dt_bias, A_log, D, dt_limit, out)
    return _unfit_step(*given) is None and _takes("layer_step", _beyond_step(*given))


def layer_step(
    xBC, dt, conv, ssm, weight, bias, dt_bias, A_log, D, *, dt_limit=(0.0, math.inf), out=None
):
    """One token in a layer, from xBC and dt to y; its twin is `mamba2.Mamba2._convolve_and_scan`.

    xBC, dt             (b, 1, h p + 2 g n), (b, 1, h)   slices of the projection
    conv, ssm           (b, k-1, h p + 2 g n), (b, h, p, n)   the Mamba2State, ssm in any dtype
    weight, bias        (h p + 2 g n, 1, k), (h p + 2 g n) or None   of the convolution
    dt_bias, A_log, D   (h)
    dt_limit            dt is clamped to it after softplus
    out                 tensors to write the new conv and ssm to, instead of new ones: for a CUDA
                        graph. out[1] may be ssm itself, out[0] must not be conv.
    Returns y (b, 1, h p) and the new conv, both in xBC's dtype, and the new ssm in ssm's dtype. The
    arithmetic is fp32. There are no gradients.

    Raises:
        ValueError: what the kernel cannot take, which is what `takes_layer_step` says no to.
    """
    given = xBC, dt, conv, ssm, weight, bias, dt_bias, A_log, D
    dt_limit = tuple(map(float, dt_limit))
    reason = _unfit_step(*given, dt_limit, out) or _beyond_step(*given, dt_limit, out)
    _refuse("layer_step", reason, twin="mamba2.Mamba2")
    if out is None:
        return _step(*given, *dt_limit)
    y = xBC.new_empty(*dt.shape[:2], ssm.shape[1] * ssm.shape[2])
    _step_into(y, *out, *given, *dt_limit)
    return y, *out


# --------------------------------------------------------------------------------------------------
# Norm and projection of a few rows
# --------------------------------------------------------------------------------------------------
#
#     out = weight · (x / sqrt(mean(x²) + eps) · norm_weight) + bias + residual
#
# of x · silu(gate) if there is a gate; the mean is one group's. With so few rows the time is that
# of reading the weight, so every program computes the norm again, from the L2 cache, in the same
# pass: the root is one number a row and group, and multiplies the finished sum. So a token of a
# layer takes three launches: `layer_step` between two of these.
NORM_LINEAR_ROWS = 2  # with more, a norm of its own and a product on tensor cores are faster
# While a tile is summed the next ones arrive, through STAGES buffers. One row without a gate leaves
# so little to compute that single warps, which never wait for each other, are faster. OB is halved
# until each multiprocessor has 4 warps.
NORM_LINEAR = dict(OB=4, KB=512, STAGES=3, num_warps=4)
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


def _norm_linear_forward(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None,
    residual: Tensor | None, eps: float, groups: int,
) -> Tensor:  # fmt: skip
    out = _norm_linear_fake(x, norm_weight, weight, bias, gate, residual, eps, groups)
    size, outputs = x.shape[-1] // groups, weight.shape[0]
    rows = x.numel() // x.shape[-1]
    x, x_row = _rows(x)
    gate_, gate_row = (x, 0) if gate is None else _rows(gate)
    residual_, residual_row = (x, 0) if residual is None else _rows(residual)
    alone = rows == 1 and gate is None
    config = dict(NORM_LINEAR_ROW if alone else NORM_LINEAR)
    config["KB"] = min(config["KB"], _power_of_2(size))
    warps = 4 * _processors(x.device)
    while config["OB"] > 1 and _cdiv(outputs, config["OB"]) * config["num_warps"] < warps:
        config["OB"] //= 2
    tensors = x, gate_, norm_weight.contiguous(), weight, x if bias is None else bias.contiguous()
    tensors += residual_, out
    numbers = x_row, gate_row, weight.stride(0), residual_row, outputs, rows, outputs, eps
    options = dict(SIZE=size, GROUPS=groups, GATE=gate is not None, BIAS=bias is not None)
    options |= dict(RESIDUAL=residual is not None, RB=_power_of_2(rows), **config)
    grid = _cdiv(outputs, config["OB"]), 1, 1
    _launch((_norm_linear_kernel, grid, tensors, numbers, options))
    return out


def _norm_linear_fake(x, norm_weight, weight, bias, gate, residual, eps, groups):
    dtype = weight.dtype
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)


_norm_linear = _operation("norm_linear", _norm_linear_forward, None, _norm_linear_fake, count=0)


def _unfit_norm_linear(x, norm_weight, eps, weight, bias, gate, groups, residual) -> str | None:
    required = {"x": x, "norm_weight": norm_weight, "weight": weight}
    optional = {"bias": bias, "gate": gate, "residual": residual}
    reason = _unfit(required, optional)
    if reason is not None:
        return reason
    given = [t for t in (*required.values(), *optional.values()) if t is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return "gradients are wanted"
    if x.ndim < 2 or x.numel() == 0 or weight.ndim != 2 or groups < 1 or x.shape[-1] % groups:
        return "x is empty or has no rows, or weight is no matrix, or groups do not divide x"
    if x.numel() > NORM_LINEAR_ROWS * x.shape[-1]:
        return f"there are more than {NORM_LINEAR_ROWS} rows"
    return _misshapen(
        ("norm_weight", norm_weight, (x.shape[-1],)),
        ("weight", weight, (weight.shape[0], x.shape[-1])),
        ("bias", bias, (weight.shape[0],)),
        ("gate", gate, x.shape),
        ("residual", residual, (*x.shape[:-1], weight.shape[0])),
    )


def _beyond_norm_linear(weight) -> str | None:
    if weight.stride(1) != 1:
        return "the rows of weight are not contiguous"
    return None


def takes_norm_linear(
    x, norm_weight, eps, weight, bias=None, *, gate=None, groups=1, residual=None
) -> bool:
    """Whether `norm_linear` can run on these tensors."""
    reason = _unfit_norm_linear(x, norm_weight, eps, weight, bias, gate, groups, residual)
    return reason is None and _takes("norm_linear", _beyond_norm_linear(weight))


def norm_linear(x, norm_weight, eps, weight, bias=None, *, gate=None, groups=1, residual=None):
    """linear(rms_norm(x, norm_weight, eps, gate, groups), weight, bias) + residual, of a few rows.

    x, gate (..., d), together at most NORM_LINEAR_ROWS rows; norm_weight (d); weight (o, d); bias
    (o); residual (..., o). Returns (..., o) in weight's dtype, or in the wider one of it and
    residual's. Nothing is rounded on the way: the arithmetic is fp32. There are no gradients.

    Raises:
        ValueError: what the kernel cannot take, which is what `takes_norm_linear` says no to.
    """
    reason = _unfit_norm_linear(x, norm_weight, eps, weight, bias, gate, groups, residual)
    reason = reason or _beyond_norm_linear(weight)
    _refuse("norm_linear", reason, twin="mamba2.Mamba2Block")
    return _norm_linear(x, norm_weight, weight, bias, gate, residual, float(eps), groups)


# Before that torch.addmm(..., out_dtype=...) refuses a float32 tensor to add to.
ADDS = torch.__version__ >= "2.10" and torch.version.hip is None


def _adds(h: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether torch.addmm can add this projection, in half precision, to h in float32."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or h.device.type != "cuda":
        return False
    halves = weight.dtype in (torch.bfloat16, torch.float16) and h.dtype == torch.float32
    return ADDS and halves and type(weight) is nn.Parameter and bias is None


def block_step(h, state, norm, layer):
    """A token in a residual block; its twin is `mamba2.Mamba2Block`. None, if it cannot be taken.

    For few rows three kernels do all of it: `norm_linear`, `layer_step`, `norm_linear`. For more,
    the matrix products are cuBLAS's, the second of which adds to h before it rounds.

    h (b, 1, d); state: a Mamba2State; norm, layer: the block's RMSNorm and Mamba2, as it makes them
    Returns the new h, conv and ssm.
    """
    first = h, norm.weight, norm.eps, layer.in_proj.weight, layer.in_proj.bias
    last = layer.norm.weight, layer.norm.eps, layer.out_proj.weight, layer.out_proj.bias
    few = takes_norm_linear(*first) and _beyond_norm_linear(last[2]) is None
    if not (few or _adds(h, *last[2:])):
        return None
    zxbcdt = norm_linear(*first) if few else layer.in_proj(norm(h))
    z, xBC, dt = zxbcdt.split_with_sizes(layer.widths, 2)
    weights = layer.conv1d.weight, layer.conv1d.bias, layer.dt_bias, layer.A_log, layer.D
    step = xBC, dt, *state, *weights
    options = dict(dt_limit=layer.config.time_step_limit, out=getattr(state, "out", None))
    rest = dict(gate=z, groups=layer.norm.groups, residual=h)
    if few and not takes_norm_linear(z, *last, **rest):  # z is as y will be
        return None
    if not takes_layer_step(*step, **options):
        return None
    y, conv, ssm = layer_step(*step, **options)
    if few:
        h = norm_linear(y, *last, **rest)
    else:
        y = layer.norm(y, gate=z)[:, 0]  # (b, h p)
        h = torch.addmm(h[:, 0], y, last[2].t(), out_dtype=h.dtype)[:, None]  # (b, 1, d)
    return h, conv, ssm


# --------------------------------------------------------------------------------------------------
# What mamba2.py asks for: a layer, a block, the decoding of a model
# --------------------------------------------------------------------------------------------------
#
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
    # A DecodingGraph keeps states of its own, with buffers named `out` for the new state.
    options["out"] = getattr(state, "out", None)
    return layer_middle(zxbcdt, conv, ssm, seq_idx, *weights, **options)


def block(block, h, state):
    """One token in a Mamba2Block, as `block_step`: h, conv and ssm; or None."""
    if state is None or h.shape[1] != 1 or not _is(block.mixer, "Mamba2"):
        return None
    norm, mixer = block.norm, block.mixer
    parts = [(mixer.in_proj, "Linear"), (mixer.out_proj, "Linear"), (norm, "RMSNorm")]
    parts += [(mixer.conv1d, "CausalConv1d"), (mixer.norm, "RMSNorm")]
    if torch.is_autocast_enabled(h.device.type) or not all([_is(*part) for part in parts]):
        return None
    return block_step(h, state, norm, mixer)


def decode(text, ids, mask, options):
    """Logits after one more token of a text, a GenerationCache, by a CUDA graph; or None.

    The first call makes `text.decoder`: a Decoder, or False if there can be none.
    """
    if ids is None or ids.shape[1] != 1 or options.get("output_hidden_states"):
        return None
    if mask is not None and not mask[:, -1].all():
        return None
    if text.decoder is None and text.current.states:
        text.decoder = False
        graph = DecodingGraph.take(text.model, text.current)
        if graph is not None:
            text.decoder = Decoder(text.model, graph, type(text.base))
    if not text.decoder:
        return None
    if text.current is not text.decoder:
        text.decoder.load(text.current)
        text.current = text.decoder
    return text.decoder(ids)


class Decoder:
    """Decodes a text with a DecodingGraph; when it is no longer used, the next text may.

    If modules or weights have been replaced or moved since the last token, or PyTorch's switches
    have changed, it frees the graph, and decodes the rest of the text by calling the model.
    """

    def __init__(self, model, graph, kind):
        self.model, self.kind = model, kind
        self.graph, self.modes, self.cache = graph, _modes(), None
        self.close = weakref.finalize(self, DecodingGraph.give_back, model, graph)
        self.close.atexit = False
        parts = [part for m in model.modules() for part in (m._modules, m._parameters) if part]
        self.views = [part.values() for part in parts]  # these follow later assignments
        self.objects = [*itertools.chain.from_iterable(self.views)]
        self.parameters = [o for o in self.objects if isinstance(o, Tensor)]
        self.addresses = [*map(Tensor.data_ptr, self.parameters)]
        self.memory = [*map(Tensor.untyped_storage, self.parameters)]  # which the graph may read

    def _replays(self):
        """Whether the graph does what calling the model would do; if not, free it."""
        objects = itertools.chain.from_iterable(self.views)
        valid = self.graph is not None and _modes() == self.modes
        valid = valid and all(map(operator.is_, objects, self.objects))
        valid = valid and [*map(Tensor.data_ptr, self.parameters)] == self.addresses
        if self.graph is not None and not valid:
            self.cache, self.graph, self.memory = self.kind(tuple(self.states())), None, None
            self.close.detach()
        return valid

    def __call__(self, ids):
        """Logits (b, 1, vocabulary) after ids (b, 1)."""
        if self._replays():
            return self.graph(ids)[:, None].clone()
        output = self.model(ids, cache=self.cache, use_cache=True, return_dict=True)
        self.cache = output.cache
        return output.logits

    def states(self):
        """conv and ssm of each layer after the last token; copies, if a graph wrote them."""
        return self.cache.states if self.graph is None else self.graph.copies()

    def load(self, cache):
        """Resume from another cache of the same sizes."""
        if self._replays():
            self.graph.load(cache)
        else:
            self.cache = cache


# Before each text, all that `_fingerprint` and `_modes` name is compared with what the graph was
# made for (1 ms for 24 layers on a slow CPU). Before each token (40 us), only `_modes`, and whether
# modules and parameters are the same objects at the same addresses: a hook, an attribute, an option
# or another layout of the same memory that is set between two tokens takes effect in the next text.


def _fingerprint(model, device) -> list | None:
    """What a step depends on, to be compared with ==; None if a graph would not do all of it.

    None for a model in training mode; for a module of any class but the model's own (adapters and
    other heads may depend on anything), or one that is compiled, or has hooks or buffers; for
    weights that are sharded, quantised, or not on the device. Values of weights are not named,
    because a graph reads them where they lie.
    """
    if model.training:
        return None
    known = {nn.Embedding, nn.ModuleList, *_kinds.values()}
    skipped, configs, parts = {"config", "generation_config"}, {}, []
    for module in model.modules():
        foreign = type(module) not in known or module._buffers or module._compiled_call_impl
        if foreign or _is_watched(module):
            return None
        own, config = vars(module), vars(module).get("config")
        if config is not None and id(config) not in configs:
            configs[id(config)] = repr(vars(config))
        options = [(key, own[key]) for key in own if key[0] != "_" and key not in skipped]
        children = [(name, id(child)) for name, child in module._modules.items()]
        parts += [type(module), configs.get(id(config)), repr(options), children]
        weights = [(name, w) for name, w in module._parameters.items() if w is not None]
        if any(type(w) is not nn.Parameter or w.device != device for _, w in weights):
            return None
        for name, w in weights:
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
    """A state (conv, ssm) in buffers of a CUDA graph; `out` is where the next one is written."""


class DecodingGraph:
    """A model's step by one token, captured as a CUDA graph: one launch instead of hundreds.

    The state lives in buffers that the graph reads and writes; `load` copies a cache into them and
    `copies` copies one out, so caches are never modified. Weights are read where they lie. Programs
    of all heads read conv, so none may overwrite it: there are two buffers for it, and two graphs,
    one from the first to the second and one back, which take turns.

    A model's last graph is kept, with buffers as large as the cache, for the next text of the same
    batch size: `DecodingGraph.idle.pop(model, None)` frees them. `DecodingGraph.enabled = False`
    does without graphs. There is none if `_fingerprint` or `_modes` is None. While one is made,
    other threads must not draw random numbers on that GPU. Decode a text on one stream throughout.
    """

    enabled = True
    capturing = threading.Lock()  # PyTorch can make one graph at a time
    idle = weakref.WeakKeyDictionary()  # model: the graph that it used last

    @classmethod
    def take(cls, model, cache):
        """A graph of the model for one text, loaded with the cache; None if there can be none."""
        tensors = [tensor for state in cache.states for tensor in state]
        if not cls.enabled or not tensors or tensors[0].device.type != "cuda":
            return None
        device = tensors[0].device
        if any(tensor.device != device for tensor in tensors) or cache.seq_idx is not None:
            return None
        modes, fingerprint = _modes(), _fingerprint(model, device)
        if modes is None or fingerprint is None or torch.cuda.is_current_stream_capturing():
            return None
        key = fingerprint, modes, type(cache), [(tensor.shape, tensor.dtype) for tensor in tensors]
        graph = cls.idle.pop(model, None)
        if graph is None or graph.made_for != key:
            graph = None  # whose memory is free before the next takes its own
            try:
                graph = cls(model, cache, key)
            except RuntimeError as error:  # such as too little memory: the next text tries again
                warnings.warn(f"this text is decoded without a CUDA graph: {error}", stacklevel=2)
                return None
        stream = torch.cuda.current_stream(device)
        stream.wait_event(graph.done)
        # Buffers may come from another stream: it must not reuse their memory before this is done.
        for buffer in {graph.token, *itertools.chain(*graph.states, *graph.others)}:
            buffer.record_stream(stream)
        graph.load(cache)
        return graph

    @classmethod
    def give_back(cls, model, graph):
        """Keep the graph for the model's next text, which may be decoded on another stream."""
        graph.done = torch.cuda.current_stream(graph.token.device).record_event()
        cls.idle[model] = graph

    def __init__(self, model, cache, key):
        self.made_for, self.states, self.others = key, [], []
        for conv, ssm in cache.states:
            state = _BufferedState((conv.clone(), ssm.clone()))
            other = _BufferedState((conv.clone(), state[1]))
            state.out, other.out = tuple(other), tuple(state)
            self.states.append(state)
            self.others.append(other)
        b, device = cache.states[0].ssm.shape[0], cache.states[0].ssm.device
        self.token = torch.zeros(b, 1, dtype=torch.int64, device=device)
        self.turns, memory, kind = [], torch.cuda.graph_pool_handle(), type(cache)
        with DecodingGraph.capturing, torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # for what is done once, such as compiling kernels
                for _ in range(2):
                    self.step(model, kind)
            torch.cuda.current_stream().wait_stream(stream)
            # Other threads may go on using the GPU.
            options = dict(pool=memory, stream=stream, capture_error_mode="thread_local")
            for _ in range(2):
                graph = torch.cuda.CUDAGraph()
                # A capture that fails would leave its stream the current one.
                with torch.cuda.stream(stream), torch.cuda.graph(graph, **options):
                    logits = self.step(model, kind)
                self.turns.append((graph, logits))
            self.done = stream.record_event()

    def step(self, model, kind):
        """The step itself, from buffers to buffers; `kind` is the class of caches."""
        cache = kind(tuple(self.states))
        output = model(self.token, cache=cache, use_cache=True, return_dict=True)
        self.states, self.others = self.others, self.states
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
            graph, logits = self.turns[0]
            graph.replay()
        self.turns.reverse()
        self.states, self.others = self.others, self.states
        return logits


def _copy(targets, sources):
    """Copy states into others, unless they are these: one kernel for conv, and one for ssm."""
    for into, out_of in zip(zip(*targets, strict=True), zip(*sources, strict=True), strict=True):
        pairs = [(to, of) for to, of in zip(into, out_of, strict=True) if to is not of]
        if pairs:
            torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))


# --------------------------------------------------------------------------------------------------
# Times: python kernels.py [words; only rows that have one in their name]
# --------------------------------------------------------------------------------------------------
#
# A row is a piece of work in bfloat16; each of its lines is one who does it. Columns:
#
#     ms       median of triton.testing.do_bench; "in graph": replayed by a CUDA graph, without the
#              CPU's time to launch each kernel
#     ratio    to our time
#     copy     the time to read inputs and weights and to write outputs once (and the gradients, of
#              a backward pass), at the bandwidth of a device copy here, as a share of the time
#     matrix   the same for the products of matrices, at the rate of one of 8,192 x 8,192; a
#              backward pass is taken to have twice the forward pass's
#     error    relative to float64, of the output or of the first input's gradient, in the first row
#              of the batch


class _Side(NamedTuple):
    who: str
    call: Callable
    inputs: tuple | None = None  # the row's, if None; others are not compared with float64
    weights: tuple = ()


class _Table:
    """What the rows below have in common: who is compared, and how it is measured."""

    def __init__(self, wanted: list[str]):
        import mamba2  # its `kernels` is this file, executed once more

        self.wanted, self.plain = wanted, mamba2
        self.ours, mamba2.kernels = mamba2.kernels, None  # from here on it is plain PyTorch
        self.peers = _peers()
        size = dict(device="cuda", dtype=torch.bfloat16)
        big, one = torch.empty(2, 2**30, **size), torch.randn(8192, 8192, **size)
        self.bandwidth = big.nbytes / self.median(lambda: big[0].copy_(big[1]))  # bytes a ms
        self.rate = 2 * 8192**3 / self.median(lambda: one @ one)  # operations a ms
        print(f"copy {self.bandwidth / 1e9:.2f} TB/s, matrix product {self.rate / 1e9:.0f} TFLOP/s")
        print(f"{'':54}{'ms':>9}{'ratio':>7}{'copy':>6}{'matrix':>7}  error")

    def median(self, call) -> float:
        from triton.testing import do_bench

        return do_bench(call, return_mode="median")

    def median_in_a_graph(self, call) -> float:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # from which a capture that fails does not return by itself
            call()
            with torch.cuda.graph(graph, stream=stream):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        return self.median(graph.replay)

    def fused(self, function):
        """The function, with mamba2 using the kernels while it runs."""

        def call(*inputs):
            self.plain.kernels = self.ours
            try:
                return function(*inputs)
            finally:
                self.plain.kernels = None

        return call

    def sides(self, work, ours, plain, **inputs) -> list[_Side]:
        theirs = [(who, call) for (of, who), call in self.peers.items() if of == work]
        pairs = [("ours", ours), ("plain", plain), *theirs]
        return [_Side(who, call, inputs.get(who)) for who, call in pairs]

    def modules(self, work, module) -> list[_Side]:
        """The sides of a module, whose peers are made from it."""
        peers = {who: make(module) for (of, who), make in self.peers.items() if of == work}
        calls = {"ours": (self.fused(module), module), "plain": (module, module)}
        calls |= {who: (peer, peer) for who, peer in peers.items()}
        return [_Side(who, call, None, tuple(of.parameters())) for who, (call, of) in calls.items()]

    def wants(self, name) -> bool:
        return not self.wanted or any(word in name for word in self.wanted)

    def row(self, name, inputs, sides, exact, flops=0, parts=("fwd", "bwd")):
        """Measure and print. parts: of fwd, bwd, fwd+bwd, and "in graph" the first and the last of
        them."""
        if not self.wants(name):
            return
        first = [t.detach()[:1] if t.ndim > 2 or not t.is_floating_point() else t for t in inputs]
        first = [t.double() if t.is_floating_point() else t for t in first]
        first[0].requires_grad_(any("bwd" in part for part in parts))
        want, dwant = _tensors(exact(*first))[0], None
        dy = torch.randn(len(inputs[0]), *want.shape[1:], device="cuda", dtype=torch.bfloat16)
        if first[0].requires_grad:
            dwant = torch.autograd.grad(want, first[0], dy[:1].double())[0]
        del first
        ours = {}
        for side in sides:
            for part in parts:
                if "graph" in part and side.who == "plain":
                    continue  # too many launches for one graph
                try:
                    ms, moved, found = self.measure(part, side, side.inputs or inputs, dy)
                except Exception as problem:  # out of memory, or a peer that does not run here
                    problem = problem.__context__ or problem  # what came first, inside a capture
                    print(f"{name}, {part}, {side.who}: {repr(problem)[:90]}")
                    break
                operations = flops * (("fwd" in part) + 2 * ("bwd" in part))
                if side.who == "ours":
                    ours[part] = ms
                ratio = f"{ms / ours[part]:7.1f}" if part in ours else f"{'-':>7}"
                copied, matrix = moved / self.bandwidth / ms, operations / self.rate / ms
                line = f"{name:26} {part:16} {side.who:10}{ms:9.4f}{ratio}"
                line += f"{copied:6.0%}{matrix:7.0%}"
                if side.inputs is None:
                    right = dwant if "bwd" in part else want
                    line += f"  {((found[:1].double() - right).norm() / right.norm()).item():.1e}"
                print(line, flush=True)

    def measure(self, part, side, inputs, dy):
        """Milliseconds, bytes, and what is compared with float64."""
        leaves = [t.detach() for t in inputs]
        moved = sum(t.nbytes for t in (*leaves, *side.weights))
        if "bwd" not in part:
            with torch.no_grad():
                outputs = _tensors(side.call(*leaves))
                call = functools.partial(side.call, *leaves)
                ms = self.median_in_a_graph(call) if "graph" in part else self.median(call)
            return ms, moved + sum(t.nbytes for t in outputs), outputs[0]
        wanted = [*(t.requires_grad_() for t in leaves), *side.weights]

        def forward():
            return _tensors(side.call(*leaves))[0]

        def backward(y):
            return torch.autograd.grad(y, wanted, dy.to(y.dtype), retain_graph=True)

        call = lambda: backward(forward())  # noqa: E731
        found = call()[0]
        moved = 2 * moved + forward().nbytes
        if part == "bwd":
            call = functools.partial(backward, forward())
        # No y may live on while a graph is captured: its AccumulateGrad nodes would be used again,
        # on the stream on which they were made.
        ms = self.median_in_a_graph(call) if "graph" in part else self.median(call)
        return ms, moved, found


def _tensors(outputs) -> list[Tensor]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [t for t in outputs if isinstance(t, Tensor)]


def _peers() -> dict:
    """By (work, peer): what peers that can be imported do, or what makes it from our module."""
    found = {}
    try:
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
        from mamba_ssm.modules import mamba2 as layers
        from mamba_ssm.ops.triton.layer_norm import rms_norm_fn
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as scan
    except Exception as error:  # it may fail to be imported in many ways
        print("without mamba_ssm:", repr(error)[:80])
    else:

        def gated_norm(x, weight, gate):
            return rmsnorm_fn(x, weight, None, z=gate, eps=1e-5, norm_before_gate=False)

        def layer(ours):
            sizes = dict(d_model=ours.config.d_model, device="cuda", dtype=torch.bfloat16)
            # Its one operation for the whole layer needs a CUDA build of causal_conv1d.
            peer = layers.Mamba2(**sizes, use_mem_eff_path=layers.causal_conv1d_fn is not None)
            peer.load_state_dict(ours.state_dict())
            return peer

        class Prefill(nn.Module):
            def __init__(self, ours):
                super().__init__()
                sizes = dict(d_model=ours.model.config.d_model, n_layer=ours.model.config.n_layer)
                built = layers.causal_conv1d_fn is not None
                config = MambaConfig(**sizes, ssm_cfg=dict(layer="Mamba2", use_mem_eff_path=built))
                config.vocab_size = ours.model.config.vocab_size
                self.model = MambaLMHeadModel(config, device="cuda", dtype=torch.bfloat16)
                weights = ours.model.state_dict().items()
                named = {name.replace("embeddings", "embedding"): w for name, w in weights}
                self.model.load_state_dict(named)

            def forward(self, ids):
                return self.model(ids, num_last_tokens=1).logits

        found["ssd", "mamba_ssm"] = lambda x, dt, A, B, C, D: scan(x, dt, A, B, C, 256, D=D)
        found["norm", "mamba_ssm"] = lambda x, weight: rms_norm_fn(x, weight, None, eps=1e-5)
        found["gated norm", "mamba_ssm"] = gated_norm
        found["layer", "mamba_ssm"], found["prefill", "mamba_ssm"] = layer, Prefill
    try:
        from fla.modules.causal_conv1d import causal_conv1d
        from fla.ops.simple_gla import chunk_simple_gla
    except Exception as error:
        print("without fla:", repr(error)[:80])
    else:
        found["conv", "fla"] = lambda *inputs: causal_conv1d(*inputs, activation="silu")
        found["ssd", "fla"] = lambda q, k, v, decay: chunk_simple_gla(q, k, v, decay, scale=1.0)
    return found


def _ssd_flops(b, l, h, p, n) -> int:
    """In chunks of 64: to and from the state, the scores, and what they weigh."""
    return 2 * b * l * h * (2 * p * n + 64 * (n + p))


def _ssd_row(table, name, b, l, h, p=64, n=128, g=1):
    wide = torch.randn(b, l, h * p + 2 * g * n, device="cuda", dtype=torch.bfloat16)
    x, B, C = wide.split([h * p, g * n, g * n], -1)
    x, B, C = x.unflatten(2, (h, p)), B.unflatten(2, (g, n)), C.unflatten(2, (g, n))
    dt = nn.functional.softplus(torch.randn(b, l, h, device="cuda") - 4)
    A, D = -torch.rand(h, device="cuda") * 15 - 1, torch.randn(h, device="cuda")
    # fla's form of it has no groups, dt or D; what it takes instead is made beforehand.
    fla = [t.repeat_interleave(h // g, 2) for t in (C, B)]
    fla = (*fla, (x * dt[..., None]).to(x.dtype), dt * A)
    sides = table.sides("ssd", table.ours.ssd, table.plain.ssd, fla=fla)
    flops = _ssd_flops(b, l, h, p, n)
    table.row(f"ssd {name}", (x, dt, A, B, C, D), sides, table.plain.ssd, flops)


def _small_rows(table, name, b, l, h, p=64, n=128):
    """Convolution, gated norm, and the norm of a residual stream."""
    draw, inner, channels = dict(device="cuda", dtype=torch.bfloat16), h * p, h * p + 2 * n
    z, xBC, _ = torch.randn(b, l, inner + channels + h, **draw).split([inner, channels, h], -1)
    ours, plain = table.ours, table.plain
    inputs = xBC, torch.randn(channels, 4, **draw), torch.randn(channels, **draw)
    sides = table.sides("conv", ours.causal_conv1d, plain.causal_conv1d)
    table.row(f"conv {name}", inputs, sides, plain.causal_conv1d)

    def norm(of):
        return lambda x, weight, gate=None: of.rms_norm(x, weight, 1e-5, gate=gate)

    inputs = torch.randn(b, l, inner, **draw), torch.randn(inner, **draw), z
    sides = table.sides("gated norm", norm(ours), norm(plain))
    table.row(f"gated norm {name}", inputs, sides, norm(plain))
    inputs = torch.randn(b, l, inner // 2, device="cuda"), torch.randn(inner // 2, **draw)
    table.row(f"norm {name}", inputs, table.sides("norm", norm(ours), norm(plain)), norm(plain))


def _layer(table, d_model):
    """A layer, and the same in float64."""
    with torch.device("cuda"):
        layer = table.plain.Mamba2(d_model=d_model).bfloat16()
    return layer, deepcopy(layer).double()


def _layer_row(table, name, b, l, d_model):
    layer, exact = _layer(table, d_model)
    h, p, _, n = layer.sizes
    u = torch.randn(b, l, d_model, device="cuda", dtype=torch.bfloat16)
    flops = 2 * b * l * (layer.in_proj.weight.numel() + layer.out_proj.weight.numel())
    flops += _ssd_flops(b, l, h, p, n)
    sides = table.modules("layer", layer)
    parts = "fwd", "fwd+bwd", "fwd in graph", "fwd+bwd in graph"
    table.row(f"layer {name}", (u,), sides, exact, flops, parts)


class _Prefill(nn.Module):
    """A language model, up to the prediction of the next token."""

    def __init__(self, mamba2, d_model, n_layer):
        super().__init__()
        config = mamba2.Mamba2Config(d_model=d_model, n_layer=n_layer)
        with torch.device("cuda"):
            self.model = mamba2.Mamba2ForCausalLM(config).bfloat16().eval()

    def forward(self, ids):
        return self.model(ids, logits_to_keep=1).logits


def _prefill_row(table, name, l, d_model, n_layer):
    model = _Prefill(table.plain, d_model, n_layer)
    mixer = model.model.backbone.layers[0].mixer
    h, p, _, n = mixer.sizes
    flops = 2 * l * (mixer.in_proj.weight.numel() + mixer.out_proj.weight.numel())
    flops = n_layer * (flops + _ssd_flops(1, l, h, p, n))
    ids = torch.randint(model.model.config.vocab_size, (1, l), device="cuda")
    sides, exact = table.modules("prefill", model), deepcopy(model).double()
    with torch.no_grad():
        table.row(f"prefill {name}", (ids,), sides, exact, flops, ("fwd", "fwd in graph"))


def _print_table(wanted: list[str]) -> None:
    if not (TRITON and torch.cuda.is_available()):
        print(
            "python kernels.py [words] times the kernels on a GPU, all rows or those with one of "
            "the words in their name, such as ssd, layer or 130m. It needs CUDA and Triton."
        )
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}")
    table = _Table(wanted)
    small = "conv", "gated norm", "norm"
    for works, make, name, *sizes in (
        (("ssd",), _ssd_row, "2.7b b8 l4096", 8, 4096, 80),
        (("ssd",), _ssd_row, "130m b8 l2048", 8, 2048, 24),
        (("ssd",), _ssd_row, "2.7b b1 l4096", 1, 4096, 80),
        (("ssd",), _ssd_row, "Codestral b2 l8192", 2, 8192, 128, 64, 128, 8),
        (small, _small_rows, "130m b8 l2048", 8, 2048, 24),
        (small, _small_rows, "2.7b b8 l4096", 8, 4096, 80),
        (("layer",), _layer_row, "130m b8 l2048", 8, 2048, 768),
        (("layer",), _layer_row, "2.7b b8 l4096", 8, 4096, 2560),
        (("prefill",), _prefill_row, "130m b1 l8192", 8192, 768, 24),
        (("prefill",), _prefill_row, "2.7b b1 l8192", 8192, 2560, 64),
    ):
        if any(table.wants(f"{work} {name}") for work in works):
            make(table, name, *sizes)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    _print_table(sys.argv[1:])
