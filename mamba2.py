"""Mamba-2 in one readable file.

    Tri Dao and Albert Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms
    Through Structured State Space Duality", ICML 2024, https://arxiv.org/abs/2405.21060 ("the
    paper" below).

What is here, in reading order:

    1. Mamba2Config       sizes, under the names of both the paper's code and transformers
    2. SSD                the sequence transformation in three forms that agree up to rounding:
                          ssd_recurrent  step by step          (Section 3.4.1, "linear mode")
                          ssd_quadratic  as masked attention   (Section 5.1,   "quadratic mode")
                          ssd            chunked: quadratic inside a chunk, recurrent between chunks
                                         (Section 6, Listing 1)
    3. Mamba2             the layer: projections, short convolution, SSD, gated norm (Section 7.1)
    4. Mamba2Model, Mamba2ForCausalLM   the language model, native to Hugging Face transformers;
                          from_pretrained loads the published checkpoints: mamba_ssm's format (its
                          config is translated in 1), transformers', and Codestral-Mamba's;
                          generate and stream write text, on CUDA with a graph for each token
    5. Slices             layer and model on a sequence of which several GPUs have a slice each

One idea carries all of it: a layer is a pure function of its input and its state,

    y, state = layer.step(u, state)

for any number of tokens. One call prefills, resumes after a pause, decodes one token in constant
time, or forks a prompt: what it was given is never changed, and calling it on any split of a
sequence gives, up to rounding, what one call on the whole would give. (Where one call ends with one
packed sequence and the next begins with another, the rows that begin anew need a state of zeros:
the model sees to that, a layer cannot know.)

Glossary: the letters of shapes, and the paper's notation for them.

    code   paper    meaning
    b               batch
    l      T        length of the sequence
    q, s   Q        positions in a chunk: of the output (q) and of the input (s); in the quadratic
                    form, in the whole sequence
    d               width of the model, d_model; elsewhere, any number of channels
    h      H        heads
    p      P        channels of a head, headdim
    n      N        size of the state of one channel, d_state
    g      G        groups of heads that share B and C;  r = h / g heads in a group
    k               taps of the short convolution, d_conv
    x      X        input of SSD, "values" in the language of attention
    dt     Δ        step size, one a head and position
    A               decay rate, one negative number a head; the paper's A_t is the decay, exp(dt A)
    B, C   B, C     "keys" and "queries": what is written to the state and read from it
    D      D        skip connection
    state  h_t      the state of a head, (p, n) numbers
    L      L        the decays between positions, a 1-semiseparable matrix

"The original" is the authors' own code, the package mamba_ssm. "Differs:" begins a note on where
this file departs on purpose from it, from the paper, or from transformers' Mamba-2, and says why.

Only torch and einops are needed for 1 to 3; the language model needs transformers. On CUDA the
fused kernels of `kernels.py`, if it lies beside this file, step in where `kernels` is mentioned,
and nowhere else. If you change the mathematics in this file, set `kernels = None`: they would go on
computing the original. MIT licence: copy this file into your own work as you like.
"""

from __future__ import annotations

import contextlib
import contextvars
import difflib
import errno
import functools
import importlib.util
import math
import sys
import threading
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

transformers_missing = None
try:
    from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
    from transformers.generation import MaxLengthCriteria, StopStringCriteria
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
except ImportError as error:
    if error.name != "transformers":  # neither missing nor too old, but broken: that must be seen
        raise
    transformers_missing = "this needs transformers: pip install 'transformers>=5.17,<5.25'"
    BaseModelOutputWithPast = CausalLMOutputWithPast = object

    class PreTrainedConfig:
        """Stands in for transformers' class, so that configuration and layer work without."""

        attribute_map = {}

        def __getattr__(self, name):
            if name in type(self).attribute_map:
                return getattr(self, type(self).attribute_map[name])
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

        def __setattr__(self, name, value):
            super().__setattr__(type(self).attribute_map.get(name, name), value)

        @classmethod
        def from_dict(cls, *args, **kwargs):
            raise ImportError(transformers_missing)

        from_pretrained = from_json_file = from_dict

        def save_pretrained(self, *args, **kwargs):
            raise ImportError(transformers_missing)

    class PreTrainedModel(nn.Module):
        """Stands in for transformers' class, and says what is missing when it is used."""

        def __init__(self, *args, **kwargs):
            raise ImportError(transformers_missing)

    class GenerationMixin:
        pass


def _load_kernels():
    """The module `kernels.py` beside this file, or None.

    It is loaded by its path, under a name of its own: never by `import kernels`, which may find
    Hugging Face's package of that name, and must keep finding it.
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
# 1. Configuration
# --------------------------------------------------------------------------------------------------


class Mamba2Config(PreTrainedConfig):
    """Sizes and options of a Mamba-2 model; the defaults are those of the published `mamba2-130m`.

    Every option has the name that transformers gives it (segment_length is ours), which is also its
    name in `config.json`, and most also answer to the name that the paper's code gives them; either
    can be passed, read and set:

        hidden_size           d_model         width of the model (768)
        num_hidden_layers     n_layer         number of layers (24)
        vocab_size                            rows of the embedding (50288)
        state_size            d_state         n, size of the state of one channel (128)
        head_dim              headdim         p, channels of a head (64)
        n_groups              ngroups         g, groups of heads that share B and C (1)
        expand                                inner width / hidden_size, not only integers (2)
        num_heads             nheads          h (None: computed, expand * hidden_size / head_dim)
        conv_kernel           d_conv          k, taps of the short convolution (4)
        chunk_size                            chunk length; above 64 means 64; speed only (256)
        segment_length                        positions that a language model takes at a time, or
                                              "auto", or 0 for all; memory and speed only (0)
        hidden_act                            of convolution and gate; only "silu" exists
        use_bias              bias            biases in in_proj and out_proj (False)
        use_conv_bias         conv_bias       bias in the convolution (True)
        time_step_limit       dt_limit        (low, high): dt is clamped to it, always ((0, inf))
        time_step_min, _max   dt_min, dt_max  dt at initialisation is log-uniform in it (0.001, 0.1)
        time_step_floor       dt_init_floor   and at least this (1e-4)
        layer_norm_epsilon    norm_epsilon    of every RMSNorm (1e-5)
        residual_in_fp32                      float32 residual stream, also of bf16 weights (True)
        initializer_range                     standard deviation of a new embedding (0.02)
        tie_word_embeddings   tie_embeddings  the head uses the embedding's weights (True)
        bos_token_id, eos_token_id, pad_token_id (all 0), use_cache (True): as everywhere

    Options that all transformers configurations have (`dtype`, `id2label`, ...) are accepted too;
    so are `rescale_prenorm_residual`, `time_step_rank` and `_name_or_path`, which `to_dict` writes,
    and which mean nothing here: out_proj is always drawn for the model's depth.

    Raises:
        TypeError: an unknown option, or one that is given under both of its names.
        ValueError: sizes that do not fit together; the message has the value, the rule and the
        remedy.
    """

    model_type = "mamba2"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {
        "d_model": "hidden_size",
        "n_layer": "num_hidden_layers",
        "d_state": "state_size",
        "headdim": "head_dim",
        "ngroups": "n_groups",
        "nheads": "num_heads",
        "d_conv": "conv_kernel",
        "bias": "use_bias",
        "conv_bias": "use_conv_bias",
        "dt_limit": "time_step_limit",
        "dt_min": "time_step_min",
        "dt_max": "time_step_max",
        "dt_init_floor": "time_step_floor",
        "norm_epsilon": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
    }

    def __init__(self, **options):
        for alias, name in self.attribute_map.items():
            if alias in options:
                if name in options:
                    raise TypeError(f"{alias!r} and {name!r} are one option: give one of them")
                options[name] = options.pop(alias)
        for name, default in _DEFAULTS.items():
            setattr(self, name, options.pop(name, default))
        beside = "rescale_prenorm_residual", "time_step_rank", "_name_or_path"
        options = {k: v for k, v in options.items() if k not in beside}
        if options.get("model_type") == self.model_type:
            del options["model_type"]
        for name in options:
            if not _is_common_option(name):
                known = [*_DEFAULTS, *self.attribute_map]
                close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
                hint = f"did you mean {close[0]!r}?" if close else "see help(Mamba2Config)"
                raise TypeError(f"Mamba2Config has no option {name!r}; {hint}")

        # Differs: the depth scaling that this option asks for belongs to our initialisation,
        # always. It is saved as False because transformers' own Mamba-2 would scale *loaded*
        # weights once more.
        self.rescale_prenorm_residual = False
        try:  # infinity has two spellings in JSON: Infinity and {"__float__": "Infinity"}
            self.time_step_limit = tuple(
                float(limit["__float__"] if isinstance(limit, dict) else limit)
                for limit in self.time_step_limit
            )
        except (TypeError, ValueError, KeyError):
            pass  # validate_architecture says what is wrong with it
        if transformers_missing is None:
            super().__init__(**options)
            # Differs: PEFT knows transformers' Mamba-2 by this name and bars LoRA on its out_proj,
            # whose weight is read there behind the module's back. Ours always calls the module. The
            # class's own model_type, "mamba2", is what is saved.
            self.model_type = "mamba2-single-file"
        self.validate_architecture()

    @property
    def d_inner(self) -> int:
        """Width inside a layer: expand * hidden_size = num_heads * head_dim."""
        return round(self.expand * self.hidden_size)

    def validate_architecture(self):
        """Compute num_heads if it is None; raise a ValueError unless the sizes make a Mamba-2.

        transformers calls this by its name, whenever it makes or changes a configuration.
        """

        def require(condition, name, rule):
            if not condition:
                raise ValueError(f"{name} = {getattr(self, name)!r}: {rule}")

        def is_number(value, kinds=(int, float)):
            return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)

        counts = "hidden_size num_hidden_layers vocab_size state_size head_dim n_groups"
        for name in (*counts.split(), "conv_kernel", "chunk_size"):
            value = getattr(self, name)
            require(is_number(value, int) and value > 0, name, "must be an integer of at least 1")
        for name in ("use_bias", "use_conv_bias", "residual_in_fp32", "tie_word_embeddings"):
            require(isinstance(getattr(self, name), bool), name, "must be True or False")
        for name in ("expand", "time_step_min", "time_step_max"):
            value = getattr(self, name)
            require(is_number(value) and value > 0, name, "must be a positive number")
        for name in ("layer_norm_epsilon", "initializer_range", "time_step_floor"):
            value = getattr(self, name)
            require(is_number(value) and value >= 0, name, "must be a number of at least 0")

        if self.num_heads is None:
            self.num_heads = self.d_inner // self.head_dim
        require(
            is_number(self.num_heads, int)
            and self.num_heads * self.head_dim == self.d_inner
            and math.isclose(self.d_inner, self.expand * self.hidden_size),
            "num_heads",
            f"num_heads * head_dim = {self.num_heads} * {self.head_dim} must equal "
            f"expand * hidden_size = {self.expand} * {self.hidden_size} = "
            f"{self.expand * self.hidden_size}; choose a head_dim that divides it, and leave "
            "num_heads out to have it computed",
        )
        rule = f"must divide the number of heads, {self.num_heads}"
        require(self.num_heads % self.n_groups == 0, "n_groups", rule)
        require(self.hidden_act == "silu", "hidden_act", "only 'silu' is implemented; leave it out")
        limit = self.time_step_limit
        is_pair = isinstance(limit, tuple) and [type(value) for value in limit] == [float, float]
        rule = "must be (low, high) with 0 <= low <= high; (0.0, math.inf) is no limit"
        require(is_pair and 0 <= limit[0] <= limit[1], "time_step_limit", rule)
        _require_segment_length(self.segment_length)
        rule = f"must be at most time_step_max, {self.time_step_max}"
        require(self.time_step_min <= self.time_step_max, "time_step_min", rule)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Read the content of a `config.json`, in transformers' format or in the original one.

        Raises:
            ValueError: it describes another architecture, or options that are not implemented.
        """
        if "ssm_cfg" in config_dict:
            config_dict = _translate_original_config(config_dict)
        elif "model_type" in config_dict and transformers_missing is None:
            if config_dict["model_type"] != cls.model_type:
                raise ValueError(
                    f"model_type = {config_dict['model_type']!r}: not a Mamba-2 checkpoint, whose "
                    f"model_type is {cls.model_type!r}"
                )
            from transformers import Mamba2Config as TheirConfig

            name = "rms_norm" if "norm_eps" in config_dict else "rmsnorm"  # of fla, of mamba_ssm
            if not config_dict.get(name, True):
                raise ValueError(
                    f"{name} = {config_dict[name]!r}: only True is implemented; the checkpoint has "
                    "no mixer.norm.weight, unless this is a mistake"
                )
            # An option that a file in their format leaves out has their default, not ours.
            config_dict = {**TheirConfig().to_dict(), **config_dict}
            if "norm_eps" in config_dict:  # flash-linear-attention's name
                config_dict["layer_norm_epsilon"] = config_dict.pop("norm_eps")
        config_dict = {cls.attribute_map.get(k, k): v for k, v in config_dict.items()}
        # Whatever else is in the file is kept as an attribute, and means nothing here.
        given = {k: v for k, v in config_dict.items() if k in _DEFAULTS or _is_common_option(k)}
        config = super().from_dict(given, **kwargs)
        handled = {*given, "model_type", "rescale_prenorm_residual"}
        for name in config_dict.keys() - handled:
            setattr(config[0] if isinstance(config, tuple) else config, name, config_dict[name])
        return config


_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 24,
    "vocab_size": 50288,
    "state_size": 128,
    "head_dim": 64,
    "n_groups": 1,
    "expand": 2,
    "num_heads": None,
    "conv_kernel": 4,
    "chunk_size": 256,
    "segment_length": 0,
    "hidden_act": "silu",
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_limit": (0.0, math.inf),
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": True,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "use_cache": True,
}


def _is_common_option(name: str) -> bool:
    """Whether `name` is an option of every transformers configuration."""
    if transformers_missing is not None or name == "model_type":
        return False
    if name in {"attn_implementation", "experts_implementation"}:
        return True
    return hasattr(PreTrainedConfig, name) and not callable(getattr(PreTrainedConfig, name))


def _require_segment_length(length):
    is_count = isinstance(length, int) and not isinstance(length, bool) and length >= 0
    if not (is_count or length == "auto"):
        raise ValueError(
            f"segment_length = {length!r}: must be a number of positions, 'auto', or 0 for the "
            "whole sequence at once"
        )


def _translate_original_config(original: dict) -> dict:
    """The `config.json` of the mamba_ssm package (state-spaces/mamba2-130m) in our names."""
    original, ssm = dict(original), dict(original["ssm_cfg"])
    if (layer := ssm.pop("layer", "Mamba1")) != "Mamba2":
        raise ValueError(f"ssm_cfg.layer = {layer!r}: only 'Mamba2' checkpoints can be loaded")
    for name, why in {
        "attn_layer_idx": "hybrids with attention layers are not implemented",
        "d_intermediate": "models with MLP layers are not implemented",
    }.items():
        if original.get(name):
            raise ValueError(f"{name} = {original[name]!r}: {why}")
    fixed = {"rms_norm": True}, {"rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False}
    for part, expected in zip((original, ssm), fixed, strict=True):
        for name, value in expected.items():
            if (found := part.pop(name, value)) != value:
                raise ValueError(f"{name} = {found!r}: only {value} is implemented")
    for name in ("A_init_range", "conv_init", "use_mem_eff_path"):  # no effect on loaded weights
        ssm.pop(name, None)
    multiple = original.get("pad_vocab_size_multiple", 8)
    translated = {
        "hidden_size": original["d_model"],
        "num_hidden_layers": original["n_layer"],
        "vocab_size": -(-original["vocab_size"] // multiple) * multiple,
        "residual_in_fp32": original.get("residual_in_fp32", True),
        "tie_word_embeddings": original.get("tie_embeddings", True),
    }
    for alias, value in ssm.items():
        name = Mamba2Config.attribute_map.get(alias, alias)
        if name not in _DEFAULTS:
            raise ValueError(f"ssm_cfg.{alias} = {value!r}: this option is not implemented")
        translated[name] = value
    return translated


# --------------------------------------------------------------------------------------------------
# 2. SSD, the state space dual form of a selective state space model, in three forms
# --------------------------------------------------------------------------------------------------
#
# All three compute, for each head, the selective state space model of the paper's equation (2),
#
#     state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T        (p, n)
#     y_t     = state_t C_t + D x_t                             (p)
#
# where the paper's A_t is exp(dt_t A) and its B_t is dt_t B_t (Listing 1: X is dt x, A is dt A);
# D x, a skip connection, is not in (2).
# They share one signature:
#
#     y, final_state = form(x, dt, A, B, C, D, initial_state=..., seq_idx=...)
#
#     x               (b, l, h, p)       input
#     dt              (b, l, h)          step sizes, after softplus: at least 0
#     A               (h)                negative decay rates
#     B, C            (b, l, g, n)       input and output projections; g divides h
#     D               (h), (h, p), None  skip connection
#     initial_state   (b, h, p, n)       the state before the first position; None is zero
#     seq_idx         (b, l) integers    where it changes from one position to the next, another
#                                        sequence begins, from a zero state; None is one sequence.
#                                        The initial state belongs to the first position's.
#     y               (b, l, h, p)       in x's dtype
#     final_state     (b, h, p, n)       float32, or float64 if x is
#
# l may be 0, and gradients reach every floating-point input. Inside, everything is float32 (float64
# if x is), autocast or not: states and sums of decays live long, and would not survive less. (The
# fused kernel keeps states and sums so too, but rounds the operands of its products to x's dtype.)


def _prepare(x, dt, A, B, C, D, initial_state, seq_idx):
    """Check the arguments of SSD, and give what all forms start from, in the computation's dtype.

    Returns:
        log_decay: (b, l, h), the logarithm of each step's decay: dt A, and -inf where another
            sequence begins, so that nothing of the one before is left (Section 8.3).
        D: (h, 1) or (h, p), or None.
        state: (b, h, p, n), the initial one.
    """
    _require("x", x, dims="batch, length, heads, headdim")
    _require("B", B, dims="batch, length, groups, state")
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    if g == 0 or h % g:
        raise ValueError(
            f"B has shape {tuple(B.shape)}: its number of groups, {g}, must be a divisor of the "
            f"number of heads of x, {h}"
        )
    _require("dt", dt, (b, l, h))
    _require("A", A, (h,))
    _require("B", B, (b, l, g, n))
    _require("C", C, (b, l, g, n))
    if D is not None:
        _require("D", D, (h,), (h, p))
    if initial_state is not None:
        _require("initial_state", initial_state, (b, h, p, n))
    if seq_idx is not None:
        _require("seq_idx", seq_idx, (b, l), kind="integers")

    dtype = _at_least_float32(x.dtype)
    log_decay = dt.to(dtype) * A.to(dtype)
    if seq_idx is not None:
        log_decay = log_decay.masked_fill(_borders(seq_idx)[..., None], -torch.inf)
    if D is not None:
        D = (D if D.dim() == 2 else D[:, None]).to(dtype)
    if initial_state is None:
        initial_state = x.new_zeros(b, h, p, n)
    return log_decay, D, initial_state.to(dtype)


def _require(name, tensor, *shapes, dims=None, kind="floating-point numbers"):
    """Raise unless `tensor` is a tensor of that kind, and of a shape or dims if any are given."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: it must be a tensor")
    if dims:
        fits = tensor.dim() == dims.count(",") + 1
    else:  # not `in`, which torch.compile takes for False where sizes are symbols
        fits = len(shapes) == 0 or any(tensor.shape == shape for shape in shapes)
    if not fits:
        expected = f"({dims})" if dims else " or ".join(map(str, shapes))
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must be {expected}")
    found = "floating-point numbers" if tensor.is_floating_point() else "integers"
    if tensor.is_complex() or kind not in (found, "numbers"):
        raise TypeError(f"{name} is {tensor.dtype}: it must be a tensor of {kind}")


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _borders(seq_idx: Tensor) -> Tensor:
    """(b, l) bool: whether another sequence begins at this position. The first is no border."""
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))[:, : seq_idx.shape[1]]


def _without_autocast(function):
    """Run `function(x, ...)` in the dtypes of its arguments, inside torch.autocast too."""

    @functools.wraps(function)
    def wrapped(x, *args, **kwargs):
        if not isinstance(x, Tensor) or x.device.type == "meta":  # which has no autocast
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return wrapped


@_without_autocast
def ssd_recurrent(x, dt, A, B, C, D=None, *, chunk_size=None, initial_state=None, seq_idx=None):
    """SSD step by step: equation (2) as it stands, the linear mode of Section 3.4.1.

    Time O(l p n) for each head; memory O(p n) for the state beside O(l (p + n)) for inputs and
    outputs, or O(l p n) if gradients are wanted. It is how one token is decoded, and the definition
    that the other forms are compared with. Arguments, results, dtypes: at the head of this section.
    chunk_size has no effect; with it the three forms can stand for each other.

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: dtypes that do not.
    """
    log_decay, D, state = _prepare(x, dt, A, B, C, D, initial_state, seq_idx)
    dtype, r = x.dtype, x.shape[2] // B.shape[2]
    x, dt, B, C = (t.to(state.dtype) for t in (x, dt, B, C))
    B, C = (repeat(t, "b l g n -> b l (g r) n", r=r) for t in (B, C))
    decay = log_decay.exp()[..., None, None]  # (b, l, h, 1, 1)
    xdt = (x * dt[..., None])[..., None]  # (b, l, h, p, 1)
    B, C = B[..., None, :], C[..., None, :]  # (b, l, h, 1, n)
    ys = [x[:, :0]]  # so that there is something to concatenate if l = 0
    for decay_t, xdt_t, B_t, C_t in zip(*(t.unbind(1) for t in (decay, xdt, B, C)), strict=True):
        state = torch.addcmul(decay_t * state, xdt_t, B_t)  # (b, h, p, n)
        ys.append((state * C_t).sum(-1)[:, None])  # (b, 1, h, p), on a CPU faster than state @ C_t
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
    Time O(l^2 (n + p)) and memory O(l^2) for each head. Arguments, results, dtypes: at the head of
    this section. chunk_size has no effect; with it the three forms can stand for each other.

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: dtypes that do not.
    """
    log_decay, D, state = _prepare(x, dt, A, B, C, D, initial_state, seq_idx)
    dtype, r = x.dtype, x.shape[2] // B.shape[2]
    x, dt, B, C = (t.to(state.dtype) for t in (x, dt, B, C))
    B, C = (repeat(t, "b l g n -> b (g r) l n", r=r) for t in (B, C))
    xdt = rearrange(x * dt[..., None], "b l h p -> b h l p")
    # The initial state stands before the sequence: one more place that decays start from.
    log_decay = F.pad(rearrange(log_decay, "b l h -> b h l"), (1, 0))
    decay = segsum(log_decay).exp()  # (b, h, 1+l, 1+l)
    L, from_start, to_end = decay[..., 1:, 1:], decay[..., 1:, :1], decay[..., -1:, 1:]

    y = (L * (C @ B.mT)) @ xdt + from_start * (C @ state.mT)  # (b, h, l, p)
    state = decay[..., -1:, :1] * state + (xdt.mT * to_end) @ B  # (b, h, p, n)
    y = rearrange(y, "b h l p -> b l h p")
    if D is not None:
        y = y + D * x
    return y.to(dtype), state


@_without_autocast
def ssd(x, dt, A, B, C, D=None, *, chunk_size=64, initial_state=None, seq_idx=None):
    """SSD in chunks (Section 6, Listing 1): quadratic inside a chunk, recurrent between chunks.

    With q = chunk_size positions in a chunk: time O(l (q n / r + q p + p n)) for each head, nearly
    all of it in matrix products; memory, beside the arguments, O(l p + q^2 + p n), or
    O(l (p + q + p n / q)) if gradients are wanted, for the state before each chunk. chunk_size
    changes speed, not results. Arguments, results, dtypes: at the head of this section. A fused
    kernel steps in where it can.

    Differs: Listing 1 takes all chunks at once, and the recurrence between them as one more matrix.
    The loop keeps the products of a single chunk in memory, and shows the recurrence.

    Raises:
        ValueError: shapes that do not fit together, or chunk_size < 1.
        TypeError: dtypes that do not fit.
    """
    if not (isinstance(chunk_size, int) and chunk_size >= 1) or isinstance(chunk_size, bool):
        raise ValueError(f"chunk_size = {chunk_size!r}: it must be an integer of at least 1")
    options = dict(initial_state=initial_state, seq_idx=seq_idx)
    if kernels and kernels.takes_ssd(x, dt, A, B, C, D, **options):
        return kernels.ssd(x, dt, A, B, C, D, **options)
    # A chunk of one position is a step of the recurrence.
    if isinstance(x, Tensor) and x.dim() > 1 and x.shape[1] <= 1:
        return ssd_recurrent(x, dt, A, B, C, D, **options)
    log_decay, D, state = _prepare(x, dt, A, B, C, D, **options)
    # split, not t[:, i:j], each of which would make a gradient of the whole length, mostly zeros
    chunks = zip(*(t.split(chunk_size, dim=1) for t in (x, dt, log_decay, B, C)), strict=True)
    ys = []
    for xs, dts, log_decays, Bs, Cs in chunks:
        xs, dts, Bs, Cs = (t.to(state.dtype) for t in (xs, dts, Bs, Cs))
        y, state = _ssd_chunk(xs * dts[..., None], log_decays, Bs, Cs, state)
        ys.append((y if D is None else y + D * xs).to(x.dtype))
    return torch.cat(ys, dim=1), state  # (b, l, h, p), (b, h, p, n)


def _ssd_chunk(xdt, log_decay, B, C, state):
    """One chunk, of q positions, from the state before it to the state after it.

    The numbers are the steps of Listing 1. What has to do with B and C is computed once for a group
    of heads, in one matrix product: (r p) are all channels of a group.

    Args:
        xdt: (b, q, h, p), x dt.  log_decay: (b, q, h).  B, C: (b, q, g, n).  state: (b, h, p, n).

    Returns:
        y without the skip connection: (b, q, h, p).  state: (b, h, p, n).
    """
    p, g = xdt.shape[3], B.shape[2]
    xdt = rearrange(xdt, "b q (g r) p -> b g r q p", g=g)
    log_decay = rearrange(log_decay, "b q (g r) -> b g r q", g=g)
    B, C = (rearrange(t, "b q g n -> b g q n") for t in (B, C))

    L = segsum(log_decay).exp()  # (b, g, r, q, s): decay from position s to position q
    from_start = log_decay.cumsum(-1).exp()  # (b, g, r, q): decay from before the chunk to q
    to_end = L[..., -1, :]  # (b, g, r, s): decay from s to the last position

    # 1. Diagonal block: from the inputs of the chunk to its outputs, as attention.
    scores = C @ B.mT  # (b, g, q, s)
    y = (scores[:, :, None] * L) @ xdt  # (b, g, r, q, p)
    # 2. From the inputs of the chunk to the state after it.
    written = rearrange(xdt * to_end[..., None], "b g r s p -> b g (r p) s") @ B  # (b, g, (r p), n)
    # 3. The recurrence, from the state before the chunk to the state after it.
    decay = rearrange(from_start[..., -1], "b g r -> b (g r) 1 1")
    new_state = decay * state + rearrange(written, "b g (r p) n -> b (g r) p n", p=p)
    # 4. From the state before the chunk to its outputs.
    state = rearrange(state, "b (g r) p n -> b g (r p) n", g=g)
    read = rearrange(C @ state.mT, "b g q (r p) -> b g r q p", p=p)
    y = y + from_start[..., None] * read  # (b, g, r, q, p)
    return rearrange(y, "b g r q p -> b q (g r) p"), new_state


# --------------------------------------------------------------------------------------------------
# 3. The layer
# --------------------------------------------------------------------------------------------------


class Mamba2State(NamedTuple):
    """The state of one layer: all that it remembers, and a value, which is never changed in place.

    conv  (b, k-1, h p + 2 g n)   the last inputs of the convolution, in the dtype of in_proj's
                                  output: the layer's or, in autocast, autocast's
    ssm   (b, h, p, n)            the state of SSD, float32 (float64 in a float64 layer); one that
                                  is given in half precision stays so

    Differs: the original keeps one input more, channels first, and ssm in the weights' dtype.
    """

    conv: Tensor
    ssm: Tensor


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

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    options = dict(initial_state=initial_state, seq_idx=seq_idx)
    if kernels and kernels.takes_causal_conv1d(x, weight, bias, **options):
        return kernels.causal_conv1d(x, weight, bias, **options)
    _require("x", x, dims="batch, length, channels")
    _require("weight", weight, dims="channels, taps")
    (b, l, d), k = x.shape, weight.shape[1]
    _require("weight", weight, (d, k))
    if bias is not None:
        _require("bias", bias, (d,))
    if initial_state is not None:
        _require("initial_state", initial_state, (b, k - 1, d))
    if seq_idx is not None:
        _require("seq_idx", seq_idx, (b, l), kind="integers")
    if initial_state is None:
        initial_state = x.new_zeros(b, k - 1, d)
    # 1 * so that the gradient of the initial state is no view of the window's, clone so that the
    # final state is none of the window: either would keep all of it alive.
    window = torch.cat([1 * initial_state.to(x.dtype), x], dim=1)  # (b, k-1+l, d)
    final_state = window[:, l:].clone()
    if seq_idx is not None:  # number the sequences; what came before belongs to the first
        number = F.pad(_borders(seq_idx), (k - 1, 0)).cumsum(1)  # (b, k-1+l)
        final_state = final_state.masked_fill((number[:, l:] != number[:, -1:])[..., None], 0)
    dtype = _at_least_float32(x.dtype)
    window, weight = window.to(dtype), weight.to(dtype)
    y = x.new_zeros(d, dtype=dtype) if bias is None else bias.to(dtype)
    for j in range(k):
        tap = window[:, j : j + l]  # (b, l, d)
        if seq_idx is not None:
            tap = tap.masked_fill((number[:, j : j + l] != number[:, k - 1 :])[..., None], 0)
        y = torch.addcmul(y, weight[:, j], tap)
    return F.silu(y).to(x.dtype), final_state


def rms_norm(x, weight, eps, *, gate=None, groups=1):
    """RMSNorm: x / sqrt(mean(x^2) + eps) * weight, of x * silu(gate) if there is a gate.

    Args:
        x, gate: (..., d).
        weight: (d).
        eps: added to the mean square.
        groups: the mean is taken over each of so many equal parts of the last axis (Section 8.1).

    Returns:
        (..., d), in the gate's dtype, or in weight's without a gate; computed in float32 at least.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    if kernels and kernels.takes_rms_norm(x, weight, eps, gate=gate, groups=groups):
        return kernels.rms_norm(x, weight, eps, gate=gate, groups=groups)
    _require("x", x)
    _require("weight", weight, tuple(x.shape[-1:]))
    if gate is not None:
        _require("gate", gate, tuple(x.shape))
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


class Mamba2(nn.Module):
    """The Mamba-2 layer (Section 7.1), functional in its state:

        z, xBC, dt = in_proj(u);  x, B, C = conv1d(xBC), with its SiLU
        y = ssd(x, softplus(dt + dt_bias), -exp(A_log), B, C, D)
        output = out_proj(norm(y * silu(z)))

    How dt and A are parametrised is Mamba-1's; dt is clamped to time_step_limit after softplus.

        layer = Mamba2(d_model=256)          # any options of Mamba2Config, or a Mamba2Config;
                                             # device and dtype mean what they do in nn.Linear
        y = layer(u)                         # (b, l, d) in, (b, l, d) out
        y, state = layer.step(u)             # the same, and the state after the last token
        y, state = layer.step(v, state)      # goes on from there, by any number of tokens

    It is initialised as in the original implementation. Parameter names and shapes are those of the
    published checkpoints.

    Raises:
        TypeError, ValueError: as `Mamba2Config`.
    """

    def __init__(self, config: Mamba2Config | None = None, *, device=None, dtype=None, **options):
        super().__init__()
        if config is None:
            config = Mamba2Config(**options)
        elif options:
            raise TypeError(
                "pass a Mamba2Config, or options by name: Mamba2(d_model=256); not both"
            )
        elif not isinstance(config, Mamba2Config):
            raise TypeError(
                f"config is a {type(config).__module__}.{type(config).__qualname__}: it must be "
                "this file's Mamba2Config, or left out where options are named, as d_model=256; "
                "Mamba2Config.from_dict(config.to_dict()) translates one of transformers"
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
        """Draw new weights as the original does; out_proj is scaled by depth, the layers in all,
        which a model passes.

        Projections and convolution keep PyTorch's default, uniform in +-1/sqrt(fan_in), for
        out_proj divided by sqrt(depth). Biases of projections are 0, as in the original's models.
        """

        def uniform(parameter, fan_in):
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)

        def copy(parameter, value):
            # transformers marks what it has loaded, and guards nn.init's functions against it.
            if not getattr(parameter, "_is_hf_initialized", False):
                parameter.copy_(value)

        config = self.config
        uniform(self.in_proj.weight, config.hidden_size)
        uniform(self.out_proj.weight, self.widths[0] * depth)
        uniform(self.conv1d.weight, config.conv_kernel)
        if config.use_bias:
            nn.init.zeros_(self.in_proj.bias)
            nn.init.zeros_(self.out_proj.bias)
        if config.use_conv_bias:
            uniform(self.conv1d.bias, config.conv_kernel)
        nn.init.ones_(self.norm.weight)
        nn.init.ones_(self.D)
        # A is uniform in [-16, -1]; dt log-uniform in [time_step_min, time_step_max].
        A = torch.empty_like(self.A_log, dtype=torch.float32).uniform_(1, 16)
        copy(self.A_log, A.log())
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt = torch.empty_like(A).uniform_(low, high).exp().clamp(min=config.time_step_floor)
        copy(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def step(self, u, state=None, mask=None, seq_idx=None, group=None):
        """The layer on some tokens, from a state: prefill, resuming and decoding are this call.

        Args:
            u: (b, l, d), l >= 0.
            state: the Mamba2State that an earlier call returned; None is the empty one.
            mask: (b, l), bool or 0/1, or None. Masked positions do not exist, wherever they are:
                the other outputs and the state are as if they had been left out. Their own outputs
                are 0.
            seq_idx: (b, l) integers or None. Where it changes, another sequence begins, with an
                empty state; `state` belongs to the sequence of the first position that is not
                masked.
            group: a process group, if each of its ranks has a slice of the sequence. u, mask and
                seq_idx are the slice, l may differ; `state` is the same on every rank: the one in
                front of the whole sequence. See `Slices`.

        Returns:
            y: (b, l, d), in the dtype of the projections.
            state: Mamba2State, after the last position, which is the last slice's on every rank
                of a group. The one that was passed is unchanged; gradients pass through both.

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit; the message says what would.
        """
        return self(u, state, mask, seq_idx, group, return_state=True)  # so that hooks run

    def forward(self, u, state=None, mask=None, seq_idx=None, group=None, *, return_state=False):
        """y of `step`; with return_state=True what `step` returns. Arguments: see `step`."""
        self._check(u, state, mask, seq_idx)
        if _is(self.in_proj, nn.Linear) and u.dtype != (dtype := self.in_proj.weight.dtype):
            if not torch.is_autocast_enabled(u.device.type):
                raise TypeError(f"u is {u.dtype}, the weights {dtype}: make them the same")
        if mask is not None:
            mask = _as_bool("mask", mask)
            u = u.masked_fill(~mask[..., None], 0)  # whatever was there, even a NaN
        slices = Slices.of(group, self.config, u, mask, seq_idx, state=state is not None)
        zxbcdt = self.in_proj(u)
        fused = mask is None and slices is None and self._fused(zxbcdt, state, seq_idx)
        if fused:
            y, state = fused
        else:
            z, xBC, dt = zxbcdt.split(self.widths, dim=-1)
            y, state = self._mix(xBC, dt, state, mask, seq_idx, slices)
            y = self.norm(y, gate=z)
        y = self.out_proj(y)
        if mask is not None:
            y = y.masked_fill(~mask[..., None], 0)
        return (y, state) if return_state else y

    def _fused(self, zxbcdt, state, seq_idx):
        """All between the projections, by one operation; None where kernels.py cannot do that."""
        conv1d, norm, (conv, ssm) = self.conv1d, self.norm, state or (None, None)
        if not (kernels and _is(conv1d, CausalConv1d) and _is(norm, RMSNorm)):
            return None
        weights = conv1d.weight, conv1d.bias, self.dt_bias, self.A_log, self.D, norm.weight
        given = zxbcdt, conv, ssm, seq_idx, *weights
        options = dict(groups=norm.groups, eps=norm.eps, dt_limit=self.config.time_step_limit)
        # The one exception to "never changed in place": a DecodingGraph (section 4) keeps states of
        # its own, with buffers named `out`, into which the kernel writes the new state.
        options["out"] = getattr(state, "out", None)
        fused = kernels.layer_middle(*given, **options)
        return fused and (fused[0], Mamba2State(*fused[1:]))

    def _mix(self, xBC, dt, state, mask, seq_idx, slices=None):
        """Where positions meet: convolution and SSD. (b, l, h p) and the new state."""
        (h, p, g, n), limit = self.sizes, self.config.time_step_limit
        conv, ssm = state or (None, None)
        dtype = _at_least_float32(dt.dtype)
        dt = F.softplus(dt + self.dt_bias.to(dtype)).clamp(*limit)  # (b, l, h), in dtype
        if conv is None:
            conv = xBC.new_zeros(xBC.shape[0], self.config.conv_kernel - 1, xBC.shape[2])
        if slices is not None:
            conv, conv_after = slices.states_of_convolution(xBC, conv)
        if mask is not None:
            xBC, conv, dt, seq_idx, back = _pass_over(mask, xBC, conv, dt, seq_idx)

        xBC, conv = self.conv1d(xBC, conv, seq_idx)
        x, B, C = xBC.split([h * p, g * n, g * n], dim=-1)
        scan = ssd if slices is None else functools.partial(ssd_of_slice, slices=slices)
        y, new_ssm = scan(
            x.unflatten(2, (h, p)),  # (b, l, h, p)
            dt,
            -torch.exp(self.A_log.to(dtype)),
            B.unflatten(2, (g, n)),  # (b, l, g, n)
            C.unflatten(2, (g, n)),  # (b, l, g, n)
            self.D,
            # Differs: published configs say 256, which suits the original's kernels; plain PyTorch
            # is fastest at 64, and the result is the same.
            chunk_size=min(self.config.chunk_size, 64),
            initial_state=ssm,
            seq_idx=seq_idx,
        )
        if ssm is not None and ssm.dtype.itemsize == 2:
            new_ssm = new_ssm.to(ssm.dtype)
        y = y.flatten(2)  # (b, l, h p)
        if mask is not None:
            y = _take(y, back)
        # conv is after this slice, conv_after after the last one.
        return y, Mamba2State(conv if slices is None else conv_after, new_ssm)

    def _check(self, u, state, mask, seq_idx):
        config = self.config
        _require("u", u, dims="batch, length, width")
        b, l, _ = u.shape
        _require("u", u, (b, l, config.hidden_size))
        if mask is not None:
            _require("mask", mask, (b, l), kind="numbers")
        if seq_idx is not None:
            _require("seq_idx", seq_idx, (b, l), kind="integers")
        if state is not None:
            tensors = state if isinstance(state, tuple) else ()
            if len(tensors) != 2 or not all(isinstance(tensor, Tensor) for tensor in tensors):
                kind = type(state).__name__
                raise TypeError(
                    f"state is a {kind}: it must be step's second result, a Mamba2State"
                )
            h, p, _, n = self.sizes
            _require("state.conv", state[0], (b, config.conv_kernel - 1, self.widths[1]))
            _require("state.ssm", state[1], (b, h, p, n))


def _can_ask(x: Tensor) -> bool:
    """Whether the numbers in x can be looked at: not while a graph is traced by torch.compile or
    torch.jit, or captured, nor within torch.func, nor if it is a FakeTensor."""
    if x.device.type == "meta" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if _is_transformed() or isinstance(x, FakeTensor):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _is_transformed() -> bool:
    """Whether this runs within a transform of torch.func, such as vmap or grad."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _checkpointed(function):
    """The function, which keeps nothing but its arguments and is computed again for the backward
    pass; torch.func, which knows no such thing, gets it as it is."""
    if _is_transformed():
        return function
    return functools.partial(checkpoint, function, use_reentrant=False)


def _as_bool(name: str, mask: Tensor) -> Tensor:
    """The mask as bool, once it is sure that a float one is not meant to be added to attention."""
    if mask.is_floating_point() and _can_ask(mask) and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"{name} holds other numbers than 0 and 1: it must be 1 where a position is read, 0 "
            f"where not; instead of one that is added to attention, pass {name} == 0"
        )
    return mask.bool()


def _is(module: nn.Module, kind: type) -> bool:
    """Whether calling the module is calling kind.forward: no adapter in its place, no hooks."""
    return type(module) is kind and not _is_watched(module)


def _is_watched(module: nn.Module) -> bool:
    """Whether calling the module does something beside, or instead of, its class's forward."""
    of_all = nn.modules.module
    hooks = of_all._global_forward_hooks or of_all._global_forward_pre_hooks
    hooks = hooks or of_all._global_backward_hooks or of_all._global_backward_pre_hooks
    hooks = hooks or module._forward_hooks or module._forward_pre_hooks
    hooks = hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def _take(x: Tensor, order: Tensor) -> Tensor:
    """x (b, l, ...) with the positions of each row in the order (b, l) given: (b, l, ...)."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], order]


def _pass_over(mask, xBC, conv, dt, seq_idx):
    """Arrange the inputs of convolution and SSD so that both pass over masked positions.

    The masked positions (m of them) go to the front of each row, before the convolution's
    state even, all others keep their order:

        conv | xBC    k-1 of state | l inputs, any of them masked
        becomes       m masked | k-1 of state | l - m inputs       cut after k-1 again

    So the state stands next to the first input that exists, and the last ones are at the end. SSD
    passes over the rest, where dt becomes 0: nothing is written to its state, and nothing decays.

    Returns:
        xBC, conv, dt, seq_idx in the new order, and `back` (b, l), which `_take` needs to undo it.
    """
    b, l = mask.shape
    order = mask.int().argsort(dim=1, stable=True)  # (b, l)
    dt = _take(dt.masked_fill(~mask[..., None], 0), order)
    if seq_idx is not None and l > 0:  # masked positions join the sequence of the first that is not
        first = (~mask).sum(1, keepdim=True).clamp(max=l - 1)  # (b, 1)
        position = torch.arange(l, device=mask.device)  # (l)
        seq_idx = seq_idx.gather(1, order).gather(1, torch.maximum(position, first))
    with_state = F.pad(mask, (conv.shape[1], 0), value=True).int()  # (b, k-1+l)
    window = torch.cat([1 * conv.to(xBC.dtype), xBC], dim=1)  # (b, k-1+l, ...)
    window = _take(window, with_state.argsort(dim=1, stable=True))
    conv, xBC = window.split([conv.shape[1], l], dim=1)
    return xBC, conv, dt, seq_idx, order.argsort(dim=1)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The two groups for an optimiser: `AdamW(parameter_groups(model, 0.1), lr=...)`.

    Weights of projections, convolutions and embeddings decay; A_log, D, dt_bias, norms and biases
    do not.

    Differs: the original marks the first three, `_no_weight_decay`; a copy of a parameter loses
    such a mark, and keeps its one dimension.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


# --------------------------------------------------------------------------------------------------
# 4. The language model
# --------------------------------------------------------------------------------------------------
#
# It needs names that no documentation promises, so that requirements.txt bounds the versions, and
# `test_transformers_still_has_the_private_names_that_this_file_uses` looks for each of them. Those
# of transformers, which calls or reads them in a model:
#
#     _init_weights                            draws the weights of a module
#     _is_hf_initialized                       of a parameter: loaded, not to be drawn
#     _tied_weights_keys                       the head's weight, which is the embedding's
#     _keys_to_ignore_on_load_missing          weights that a checkpoint may lack
#     _keys_to_ignore_on_load_unexpected       ... or have in excess
#     _weight_conversions                      how the names of weights were changed in loading
#     _no_split_modules                        what device_map keeps on one device
#     _set_gradient_checkpointing              refuses reentrant checkpoints, and hands each module
#     _gradient_checkpointing_func             the function that checkpoints
#     _supports_default_dynamic_cache          whether generate makes the cache
#     _prepare_cache_for_generation            makes ours, where the first forward pass needs one
#     _is_user_defined                         of a cache: lives on after generate
#     _update_model_kwargs_for_generation      after each forward pass; ends seq_idx
#     _reorder_cache                           the states of the beams that are gone on with
#     _prefill                                 the first forward pass of generate, for stream too
#     _pad_token_tensor                        of the generation config: what follows an ended text
#
# of PEFT, adapter_layer_names, by which a module is known as adapted; and of torch, in this file
# and in kernels.py:
#
#     _forward_hooks, _forward_pre_hooks       of a module, and those of all modules, whose names
#     _backward_hooks, _backward_pre_hooks     begin with global: whether a call does more than
#                                              the class's forward
#     torch._C._are_functorch_transforms_active, torch.autograd.forward_ad._current_level,
#     torch._C._len_torch_dispatch_stack, torch._subclasses.fake_tensor.FakeTensor
#                                              whether numbers are there, and nobody else watches
#     torch._foreach_copy_                     copies all states by one kernel


class Mamba2Block(nn.Module):
    """A residual block: h + layer(norm(h)). Arguments and results as `Mamba2.step`.

    From here on, h (b, l, d) is the residual stream.
    """

    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = Mamba2(config)

    def forward(self, h, state=None, mask=None, seq_idx=None, group=None):
        if mask is None and group is None and (fused := self._fused(h, state)):
            return fused
        y, state = self.mixer(self.norm(h), state, mask, seq_idx, group, return_state=True)
        return h + y, state

    def _fused(self, h, state):
        """The same for a token, by fewer kernels and roundings; None where that cannot be."""
        norm, mixer = self.norm, self.mixer
        if not (kernels and state is not None and h.shape[1] == 1 and _is(mixer, Mamba2)):
            return None
        parts = [(mixer.in_proj, nn.Linear), (mixer.out_proj, nn.Linear), (norm, RMSNorm)]
        parts += [(mixer.conv1d, CausalConv1d), (mixer.norm, RMSNorm)]
        if torch.is_autocast_enabled(h.device.type) or not all([_is(*part) for part in parts]):
            return None
        mixer._check(h, state, None, None)
        fused = kernels.block_step(h, state, norm, mixer)
        return fused and (fused[0], Mamba2State(*fused[1:]))


@dataclass(frozen=True, eq=False, repr=False)
class Mamba2Cache:
    """The state of a whole model after some tokens, and a value: nothing changes it.

    A forward pass takes one as `cache` and returns a new one; the old one can be used again, to go
    on from the same prompt in another way. Its size does not depend on how many tokens it has seen.

        states    a Mamba2State for each layer
        length    tokens seen, masked ones included
        seq_idx   (b), the label of the sequence that each row ended in, or None without packing
    """

    states: tuple[Mamba2State, ...]
    length: int = 0
    seq_idx: Tensor | None = None
    # What transformers' generation asks of a cache:
    is_compileable = False
    is_croppable = False
    is_linear = (False,)  # or it would not cut off, of a whole sequence, what the cache has seen

    def __repr__(self) -> str:
        kinds = {f"{tuple(state.ssm.shape)} {state.ssm.dtype}" for state in self.states}
        layers = f"{len(self.states)} layers of {', '.join(kinds)}"
        return f"Mamba2Cache(length={self.length}, {layers}, {self.nbytes:,} bytes)"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    @property
    def nbytes(self) -> int:
        """Bytes that the states take."""
        return sum(tensor.nbytes for state in self.states for tensor in state)

    def map(self, function) -> Mamba2Cache:
        """The cache with `function` applied to each of its tensors."""
        states = tuple(Mamba2State(*map(function, state)) for state in self.states)
        seq_idx = None if self.seq_idx is None else function(self.seq_idx)
        return Mamba2Cache(states, self.length, seq_idx)

    def select(self, rows: Tensor) -> Mamba2Cache:
        """The rows of the batch that the integers `rows` name, in that order."""
        rows = torch.as_tensor(rows)
        return self.map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def repeat(self, times: int) -> Mamba2Cache:
        """Each row `times` times in a row: (b) becomes (b times). This forks a prompt."""
        return self.map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def detach(self) -> Mamba2Cache:
        """The cache without its history of gradients."""
        return self.map(Tensor.detach)

    def to(self, *args, **kwargs) -> Mamba2Cache:
        """The cache on another device, or with ssm in another dtype; arguments as for Tensor.to.

        Steps keep the dtype of ssm: half of it takes half the memory and time, and forgets sooner
        what is small. conv, a few inputs, keeps its own.
        """

        def move(state):
            ssm = state.ssm.to(*args, **kwargs)
            _require("ssm", ssm, ssm.shape)
            return Mamba2State(state.conv.to(ssm.device), ssm)

        states = tuple(move(state) for state in self.states)
        seq_idx = None if self.seq_idx is None else self.seq_idx.to(states[0].ssm.device)
        return Mamba2Cache(states, self.length, seq_idx)

    def save(self, path):
        """Write the cache to a safetensors file."""
        from safetensors.torch import save_file

        tensors = {
            f"layers.{i}.{part}": tensor
            for i, state in enumerate(self.states)
            for part, tensor in state._asdict().items()
        }
        if self.seq_idx is not None:
            tensors["seq_idx"] = self.seq_idx
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, path, metadata={"length": str(self.length)})

    @classmethod
    def load(cls, path, device="cpu") -> Mamba2Cache:
        """Read a cache that `save` wrote."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                metadata = file.metadata() or {}
        except SafetensorError:  # no such file, though, is a FileNotFoundError
            metadata = {}
        if "length" not in metadata:
            raise ValueError(f"{str(path)!r} holds no cache: it must be a file that `save` wrote")
        n_layer = sum(name.endswith(".conv") for name in tensors)
        states = tuple(
            Mamba2State(*(tensors[f"layers.{i}.{part}"] for part in Mamba2State._fields))
            for i in range(n_layer)
        )
        return cls(states, int(metadata["length"]), tensors.get("seq_idx"))


# torch.load may make them: they hold nothing but tensors and numbers.
torch.serialization.add_safe_globals([Mamba2State, Mamba2Cache])

# What transformers calls the cache: "cache" since 5.24, "past_key_values" before. Here, both names
# mean the same in calls and in outputs. This is the one that transformers' own code must be given.
CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"


def _of_two_names(cache, past_key_values):
    """The cache, which a caller passed under one of its names."""
    if cache is not None and past_key_values is not None:
        raise TypeError("cache and past_key_values are two names of one argument: give one of them")
    return cache if past_key_values is None else past_key_values


class _TwoNames:
    """The name of an output's cache that is not CACHE, and so no field of transformers' class."""

    if CACHE == "cache":
        past_key_values = property(lambda output: output.cache)
    else:
        cache = property(lambda output: output.past_key_values)


@dataclass
class Mamba2Output(_TwoNames, BaseModelOutputWithPast):
    """last_hidden_state (b, l, d), cache, which is also past_key_values, and hidden_states."""


@dataclass
class Mamba2CausalLMOutput(_TwoNames, CausalLMOutputWithPast):
    """loss, logits (b, l, vocabulary), cache, which is also past_key_values, and hidden_states."""


class Mamba2PreTrainedModel(PreTrainedModel):
    """What the two models below share: initialisation, and loading that tolerates no mistake."""

    config_class = Mamba2Config
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Mamba2Block"]

    def _init_weights(self, module):
        if isinstance(module, Mamba2):
            module.reset_parameters(depth=self.config.num_hidden_layers)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
        elif not isinstance(module, CausalConv1d):  # of which the Mamba2 around it takes care
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, name_or_path, *args, output_loading_info=False, **kwargs):
        """Load a published or saved model; arguments as in all of transformers.

        `name_or_path` is a name on the hub or a folder, in the original mamba_ssm format, in
        transformers' format, or Codestral-Mamba's.

        Raises:
            ValueError: the checkpoint's weights are not exactly those of the model that its config
                describes, or it is of another architecture. Nothing is ever filled up with random
                weights, even if `ignore_mismatched_sizes` asks for it.
        """
        if transformers_missing is not None:
            raise ImportError(transformers_missing)
        from safetensors import SafetensorError

        options = {
            "key_mapping": {r"backbone\.embedding\.": "backbone.embeddings."},  # original format
            **kwargs,
            "ignore_mismatched_sizes": True,  # is reported below, by name
            "output_loading_info": True,
        }
        try:
            model, info = super().from_pretrained(name_or_path, *args, **options)
        except (EOFError, OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, (EOFError, SafetensorError)) or (
                # what torch says of a damaged file, and what mapping an empty one gives
                "PytorchStreamReader" in str(error) or getattr(error, "errno", 0) == errno.EINVAL
            ):
                message = f"a file of weights in {str(name_or_path)!r} is truncated or damaged"
                raise ValueError(f"{message}: {error}") from error
            raise
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[kind]:
                raise ValueError(
                    f"{str(name_or_path)!r} does not hold the weights of the {cls.__name__} that "
                    f"its config describes: {kind} {sorted(info[kind])}; a class of your own names "
                    "what is new in it as _keys_to_ignore_on_load_missing, a list of patterns"
                )
        # Or else `save_pretrained` would rename the weights back, as they were in the original.
        vars(model).pop("_weight_conversions", None)
        return (model, info) if output_loading_info else model

    def _set_gradient_checkpointing(
        self, enable=True, gradient_checkpointing_func=checkpoint, **options
    ):
        keywords = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and keywords.get("use_reentrant"):
            raise ValueError(
                f"gradient_checkpointing_kwargs = {keywords}: use_reentrant must be False, or left "
                "out; gradients would not reach the states of layers"
            )
        run = functools.partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, run, **options)

    def _reorder_cache(self, cache, beam_idx):
        return cache.select(beam_idx)


class Mamba2Model(Mamba2PreTrainedModel):
    """Embedding, blocks and final norm: the language model without its head."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # of a Mamba2ForCausalLM's checkpoint

    def __init__(self, config: Mamba2Config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Mamba2Block(config) for _ in range(config.num_hidden_layers)])
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings

    def set_input_embeddings(self, embeddings):
        self.embeddings = embeddings

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        return_dict=None,
        *,
        past_key_values=None,
        seq_idx=None,
        group=None,
        output_attentions=None,
    ):
        """Run the model on some tokens, from a cache if there is one.

        Args:
            input_ids: (b, l) integers, or inputs_embeds: (b, l, d). Exactly one of them.
            attention_mask: (b, l), or longer on the left, for what the cache has seen; 0 marks
                positions that do not exist, wherever they are. None is no such position.
            cache: the Mamba2Cache of an earlier call, which is not changed; or one of states to
                start from, such as trained ones: Mamba2Cache(states), states a tuple of one
                Mamba2State for each layer. `past_key_values` is another name for it.
            use_cache: return a new cache; None is the config's choice, and no cache in training.
            output_hidden_states: also return the input of every block, and the final output.
            return_dict: False returns a tuple.
            seq_idx: (b, l) integers, for sequences packed into one row: where it changes, another
                begins. With a cache, also where it changes from the last call to this one.
            group: a process group, if each of its ranks has a slice of the sequence. Then all that
                is (b, l, ...) here is of the slice, and what is passed as cache or states is the
                same on every rank: what is before the first slice. The cache that is returned
                is after the last slice, on every rank. See `Slices`.
            output_attentions: accepted for transformers' sake; there are none.

        Returns:
            Mamba2Output: last_hidden_state (b, l, d), cache, hidden_states.

        Raises:
            ValueError, TypeError: arguments that do not fit, or that are not in this list.
        """
        shape = _batch_and_length(input_ids, inputs_embeds)
        if inputs_embeds is not None:
            _require("inputs_embeds", inputs_embeds, (*shape, self.config.hidden_size))
        if output_attentions:
            raise ValueError("output_attentions = True: Mamba-2 has no attentions; leave it out")
        cache = _of_two_names(cache, past_key_values)
        _require_cache(cache, Mamba2Cache)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict

        past = Mamba2Cache(()) if cache is None else cache
        # Fewer in self-speculative decoding. A list, since a slice of modules is slow to make.
        layers = list(self.layers)[: self.config.num_hidden_layers]
        if len(past.states) not in (0, len(layers)):
            raise ValueError(f"{len(past.states)} states for {len(layers)} layers: give one each")
        if inputs_embeds is None:
            _require_ids("input_ids", input_ids, self.config.vocab_size)
        h = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds  # (b, l, d)
        if past.states and len(past.states[0].ssm) != len(h):
            raise ValueError(
                f"the cache has a batch of {len(past.states[0].ssm)}, and the input one of "
                f"{len(h)}: cache.repeat(times) or cache.select(rows) makes them fit"
            )
        if self.config.residual_in_fp32:
            h = h.to(_at_least_float32(h.dtype))
        mask = _as_mask(attention_mask, h.shape[:2], past.length)
        if mask is not None:
            h = h.masked_fill(~mask[..., None], 0)  # whatever was there, even a NaN
        checkpoints = self.gradient_checkpointing and self.training
        given = dict(states=len(past.states) > 0, checkpoints=checkpoints)
        slices = Slices.of(group, self.config, h, mask, seq_idx, **given)
        sequences, exists, length = slices.whole if slices else (seq_idx, mask, h.shape[1])
        if seq_idx is not None:
            past = _go_on(past, sequences, exists)

        hidden_states, new_states = [], []
        for layer, state in zip(layers, past.states or [None] * len(layers), strict=True):
            if output_hidden_states:
                hidden_states.append(h)
            if checkpoints:
                run = functools.partial(self._gradient_checkpointing_func, layer.__call__)
            else:
                run = layer
            h, state = run(h, state, mask, seq_idx, slices)
            if use_cache:  # what nobody asked for would only take memory
                new_states.append(state)
        h = self.norm_f(h)

        cache = None
        if use_cache:
            cache = Mamba2Cache(tuple(new_states), past.length + length, past.seq_idx)
        output = Mamba2Output(
            last_hidden_state=h,
            hidden_states=(*hidden_states, h) if output_hidden_states else None,
            **{CACHE: cache},
        )
        return output if return_dict else output.to_tuple()


def _batch_and_length(input_ids, inputs_embeds):
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if inputs_embeds is None:
        _require("input_ids", input_ids, dims="batch, length", kind="integers")
        return input_ids.shape
    _require("inputs_embeds", inputs_embeds, dims="batch, length, width")
    return inputs_embeds.shape[:2]


def _require_cache(cache, *kinds):
    if cache is not None and not isinstance(cache, kinds):
        raise TypeError(
            f"the cache is a {type(cache).__name__}: it must be the Mamba2Cache that an "
            "earlier call of this model returned"
        )


def _require_ids(name, ids, vocab_size, ignored=None):
    """Raise unless all are below vocab_size, or `ignored`. A GPU would have to be awaited: there it
    is a failed assertion."""
    if ids.device.type == "cpu" and _can_ask(ids):
        fits, rule = (ids >= 0) & (ids < vocab_size), f"0 to {vocab_size - 1}"
        if ignored is not None:
            fits, rule = fits | (ids == ignored), f"{rule} or {ignored}"
        if not fits.all():
            found = ids[~fits][0].item()
            raise ValueError(
                f"{name} holds {found}: it must hold {rule}; is the tokenizer the model's?"
            )


def _as_mask(attention_mask, shape, seen):
    """(b, l) bool from transformers' attention_mask, or None where nothing is masked."""
    if attention_mask is None:
        return None
    _require("attention_mask", attention_mask, dims="batch, length", kind="numbers")
    (b, l), (rows, columns) = shape, attention_mask.shape
    if rows != b or (columns != l and columns != seen + l):
        or_all = f", or {(b, seen + l)} to cover what the cache has seen too" if seen else ""
        found = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask has shape {found}: it must be {(b, l)}{or_all}")
    mask = _as_bool("attention_mask", attention_mask[:, columns - l :])
    # Nothing masked is the common case, and worth asking for.
    return None if _can_ask(mask) and bool(mask.all()) else mask


NO_LABEL = torch.iinfo(torch.int64).min  # of a sequence of which every position was masked so far


def _go_on(past, seq_idx, mask):
    """The cache, with zero states in rows that begin another sequence, and labels of rows' ends."""
    last = past.seq_idx  # (b)
    if last is None:
        last = seq_idx.new_full(seq_idx.shape[:1], NO_LABEL, dtype=torch.int64)
    else:
        ended = (_first(seq_idx, mask, last) != last) & (last != NO_LABEL)  # (b)
        past = past.map(lambda t: t.masked_fill(ended.view(-1, *[1] * (t.dim() - 1)), 0))
    mask = None if mask is None else mask.flip(1)
    return Mamba2Cache(past.states, past.length, _first(seq_idx.flip(1), mask, last))


def _first(seq_idx, mask, default):
    """(b), the label of the first position of each row that is not masked; `default` if all are."""
    if mask is None:
        mask = torch.ones_like(seq_idx, dtype=torch.bool)
    seq_idx, mask = F.pad(seq_idx.long(), (0, 1)), F.pad(mask, (0, 1))  # so that there is a first
    first = seq_idx.gather(1, mask.int().argmax(1, keepdim=True))[:, 0]
    return torch.where(mask.any(1), first, default)


class Mamba2ForCausalLM(Mamba2PreTrainedModel, GenerationMixin):
    """The Mamba-2 language model, for generate, Trainer, PEFT and pipelines of transformers.

        model = Mamba2ForCausalLM.from_pretrained("state-spaces/mamba2-130m")
        ids = model.generate(**tokenizer("Mamba is", return_tensors="pt"), max_new_tokens=20)

    `generate(ids, cache=cache)` goes on from a cache. As always in transformers, ids are the whole
    sequence, or new tokens alone with an attention_mask that covers the whole sequence.
    """

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}
    accepts_loss_kwargs = True  # Trainer passes num_items_in_batch

    def __init__(self, config: Mamba2Config):
        super().__init__(config)
        self.backbone = Mamba2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # the cache is made by the forward pass

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
        return_dict=None,
        *,
        past_key_values=None,
        seq_idx=None,
        group=None,
        num_items_in_batch=None,
        segment_length=None,
        progress=False,
        output_attentions=None,
    ):
        """Logits, and with `labels` the loss. All other arguments: see `Mamba2Model.forward`.

        A long sequence can be read in segments, each from the state after the one before:

            model(ids, labels=ids, segment_length="auto").loss.backward()

        Results and gradients are the same, but nothing is as long as the sequence any more, except
        integers, and logits unless labels or logits_to_keep are given. For the backward pass only
        the states between segments are kept; a segment is computed again when its turn comes, which
        costs one more forward pass. So memory grows as s + l / s with the length s of a segment,
        and as the square root of l with the best s. A million tokens fit, in training and in
        evaluation. `gradient_checkpointing_enable()` does the same to the layers inside a segment,
        for less memory and one more forward pass.

        Args:
            labels: (b, l) integers, the tokens themselves, which are shifted here: position t
                predicts the next position of its sequence that is not masked. -100 is not
                predicted. The logits of all positions are never held at once for it.
            logits_to_keep: return logits of the last so many positions (0: all), or of those in a
                tensor of indices. None is all, but none with labels in training or in segments,
                where logits_to_keep=0 returns them.
            group: a process group, if each of its ranks has a slice of the sequence, or of each
                segment of it: see `Slices`. The loss is that of the whole sequence, on every rank.
                Gradients of parameters, averaged over the ranks as DDP and FSDP do, are one
                process's.
            num_items_in_batch: divide the summed loss by this, not by the number of predictions.
            segment_length: positions in a segment, or "auto" for about the least memory that does
                not leave a GPU idle, or 0 for the whole sequence at once. None is the config's
                choice. With a group: positions in this rank's slice of a segment, not "auto".
            progress: show a progress bar over the segments, forward and backward.

        Returns:
            Mamba2CausalLMOutput: loss, logits (b, l, vocabulary), cache, hidden_states.
        """
        cache = _of_two_names(cache, past_key_values)
        if isinstance(cache, RewindableCache):
            others = inputs_embeds, labels, seq_idx, segment_length, group
            if input_ids is None or any(other is not None for other in others):
                raise ValueError(
                    "a RewindableCache reads input_ids alone: leave out inputs_embeds, labels, "
                    "seq_idx, segment_length and group"
                )
            return cache.read(self, input_ids, attention_mask, logits_to_keep, output_hidden_states)
        if return_dict is None:
            return_dict = self.config.return_dict
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        b, l = _batch_and_length(input_ids, inputs_embeds)
        mask = _as_mask(attention_mask, (b, l), getattr(cache, "length", 0))
        # Where generate runs: its _Decoder, which has the step as a CUDA graph.
        decoder = None if torch.compiler.is_compiling() else _decoding.get()
        if decoder is not None and decoder.model is self and l == 1:
            others = mask, inputs_embeds, labels, seq_idx
            if all(other is None for other in others) and not output_hidden_states and use_cache:
                output = decoder(input_ids, cache)
                if output is not None:
                    return output
        if seq_idx is not None:
            _require("seq_idx", seq_idx, (b, l), kind="integers")
        if labels is not None:
            _require("labels", labels, (b, l), kind="integers")
            classes = getattr(self.lm_head, "out_features", self.config.vocab_size)
            _require_ids("labels", labels, classes, -100)

        length = self._segment_length(segment_length, b, l, group)
        count, targets = max(1, -(-l // length)), None
        if group is not None:
            x = input_ids if inputs_embeds is None else inputs_embeds
            given = dict(labels=labels is not None, items=num_items_in_batch is not None)
            _agree(group, x, segments=count, **given)
            if labels is not None:
                targets = _next_tokens_of_slices(labels, mask, seq_idx, length, group)
        elif labels is not None:
            targets = _next_tokens(labels.long(), mask, seq_idx)
        if count > 1 and output_hidden_states:
            raise ValueError(
                f"output_hidden_states = True, segment_length = {length}: segments are there so "
                "that nothing of this size is held; leave one of the two out"
            )

        def cut(tensor):
            return [None] * count if tensor is None else tensor.split(length, dim=1)

        segments = zip(*map(cut, (targets, input_ids, mask, inputs_embeds, seq_idx)), strict=True)
        run, passes = self._segment, 1
        if count > 1 and torch.is_grad_enabled():
            run, passes = _checkpointed(run), 2
        bar = _progress_bar(passes * count) if progress else None
        first = 0  # the first position whose logits are wanted
        if logits_to_keep is None and labels is not None and (self.training or count > 1):
            first = l + 1  # past the end: none
        elif isinstance(logits_to_keep, int) and logits_to_keep > 0:
            first = l - logits_to_keep
        losses, kept, end = [], [], 0
        with _casting_anew(input_ids if inputs_embeds is None else inputs_embeds):
            for segment in segments:
                loss, h, cache, hidden_states = run(
                    *segment,
                    bar,
                    cache=cache,
                    use_cache=use_cache if end + length >= l else True,
                    output_hidden_states=output_hidden_states,
                    group=group,
                    output_attentions=output_attentions,
                )
                losses.append(loss)
                end = min(end + length, l)
                if end >= first:
                    kept.append(h)

        loss = logits = None
        if labels is not None:
            loss, items = sum(losses), (targets != -100).sum()
            if group is not None:
                loss, items = (_all_gather(t[None], group).sum() for t in (loss, items))
            loss = loss / (items if num_items_in_batch is None else num_items_in_batch)
        if kept:
            keep = logits_to_keep
            if not torch.is_tensor(keep):
                keep = slice(-(keep or 0), None)
            logits = self.lm_head(torch.cat(kept, dim=1)[:, keep])
        output = Mamba2CausalLMOutput(
            loss=loss, logits=logits, hidden_states=hidden_states, **{CACHE: cache}
        )
        return output if return_dict else output.to_tuple()

    def _segment(self, targets, ids, mask, embeds, seq_idx, bar, **options):
        """Summed loss, last hidden state, cache, and all hidden states of a segment."""
        if bar is not None:
            bar.update()
            if bar.n == bar.total:
                bar.close()  # which shows the last update, too
        output = self.backbone(
            ids, mask, inputs_embeds=embeds, seq_idx=seq_idx, return_dict=True, **options
        )
        h, cache = output.last_hidden_state, getattr(output, CACHE)  # torch.compile follows fields
        loss = None if targets is None else self._summed_loss(h, targets)
        return loss, h, cache, output.hidden_states

    def _summed_loss(self, h, targets):
        """The summed cross entropy of logits of h (b, l, d) against targets (b, l), -100 left out.

        The logits of a few rows at a time are made, used and let go, and made again for the
        backward pass; if all rows are that few, their logits are kept for it.
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
        run = _checkpointed(summed_loss)
        return sum(summed_loss(*chunk) if len(chunks) == 1 else run(*chunk) for chunk in chunks)

    def _segment_length(self, length, b, l, group=None):
        """How many of l positions are in a segment; `length` is what the caller asked for."""
        if length is None:
            length = self.config.segment_length
        _require_segment_length(length)
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
        """The Mamba2Cache after a prompt, which can be kept, and gone on from any number of times.

        Read in segments, a prompt of any length takes the memory of one. Arguments: see `forward`;
        segment_length is "auto" unless given.
        """
        options = {"segment_length": "auto", **options, "logits_to_keep": 1}
        options |= dict(use_cache=True, return_dict=True)
        return self(input_ids, attention_mask, cache, **options).cache

    def generate(self, *args, **kwargs):
        """As in all of transformers; on CUDA, a step of the model by one token is a CUDA graph."""
        decoder = _Decoder(self)
        outer = _decoding.set(decoder)
        try:
            return super().generate(*args, **self._arguments(kwargs))
        finally:
            _decoding.reset(outer)
            decoder.close()

    def stream(self, input_ids, **options):
        """Yield the tokens, (b) by (b), that `generate(input_ids, **options)` would append.

            for token in model.stream(ids, max_new_tokens=100, do_sample=True, top_p=0.9):
                print(tokenizer.decode(token), end="", flush=True)

        transformers prepares prompt, sampling and stopping, so that all arguments mean the same.
        The loop is our own, and on CUDA much faster: states are not copied, and the host does not
        wait for a token, but asks after every eighth whether the text is over, if it may be.

        Raises:
            ValueError: options that mean more than one token after the other, such as beams.
        """
        for name in ("assistant_model", "streamer", "custom_generate"):
            if options.get(name) is not None:
                raise ValueError(f"{name} is an option of generate: stream has a loop of its own")
        if input_ids is not None:
            _require("input_ids", input_ids, dims="batch, length", kind="integers")
        # transformers loses the tokenizer on its way to a custom_generate that is a function.
        config = options.get("generation_config") or self.generation_config
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
        options = self._arguments(options)
        return super().generate(input_ids, custom_generate=type(self)._stream, **options)

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
        model_kwargs["use_cache"] = True  # whatever the config says
        # GenerationMixin's, not `prefill`: it reads the prompt and gives the model's output.
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
        pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        unfinished = torch.ones(ids.shape[0], dtype=torch.bool, device=ids.device)
        every = 8 if ids.is_cuda else 1
        tokens, overs = [], []
        logits, cache = output.logits[:, -1], output.cache
        graph = DecodingGraph.take(self, cache, DecodingGraph.weights(self)) if count > 1 else None
        try:
            for left in reversed(range(count)):
                scores = logits_processor(text[:, :length], logits.float())
                if config.do_sample:
                    token = torch.multinomial(scores.softmax(-1), 1)[:, 0]
                else:
                    token = scores.argmax(-1)
                if pads:
                    token = torch.where(unfinished, token, config._pad_token_tensor)
                if length == text.shape[1]:  # rarely: no token has to wait for all before it
                    text = F.pad(text, (0, length))
                text[:, length], length = token, length + 1
                if not criteria:
                    yield token
                else:
                    for criterion in criteria:
                        unfinished = unfinished & ~criterion(text[:, :length], scores)
                    tokens.append(token)
                    overs.append(~unfinished.any())
                    if len(tokens) == every or left == 0:
                        over = torch.stack(overs).tolist() + [True]  # waits for the GPU
                        yield from tokens[: over.index(True) + 1]
                        if over.index(True) < len(tokens):
                            return
                        tokens, overs = [], []
                if left == 0:
                    return
                last = text[:, length - 1 : length]
                if graph is not None:
                    logits = graph(last)
                else:
                    output = self(last, cache=cache, use_cache=True, return_dict=True)
                    logits, cache = output.logits[:, -1], output.cache
        finally:
            DecodingGraph.give_back(self, graph)

    def _arguments(self, given):
        """What generate was given by name, with the cache as CACHE; raises for what cannot be."""
        cache = _of_two_names(given.pop("cache", None), given.pop("past_key_values", None))
        _require_cache(cache, Mamba2Cache, RewindableCache)
        if cache is not None:
            given[CACHE] = cache
        if given.get("group") is not None:
            raise ValueError("group: read the prompt with it, and generate from the cache after it")
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and not (exists := mask[:, -1:] != 0).all():
            raise ValueError(
                f"attention_mask[{exists.long().argmin()}] ends in 0, where the row's next token "
                "would be read: pad on the left, tokenizer.padding_side = 'left'; every row needs "
                "a token"
            )
        return given

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, *args
    ):
        # transformers would write to a cache that it finds here, to mark it as the user's.
        cache = model_kwargs.pop(CACHE, None)
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, *args
        )
        speculates = generation_config.is_assistant or generation_mode == "assisted_generation"
        if cache is None and (speculates or generation_config.prefill_chunk_size is not None):
            cache = Mamba2Cache(())
        if isinstance(cache, Mamba2Cache):
            # Ids have been repeated before, for samples or beams.
            times = max(generation_config.num_beams, generation_config.num_return_sequences)
            cache = cache.repeat(times) if times > 1 else cache
            cache = RewindableCache(cache) if speculates else cache
        if cache is not None:
            model_kwargs[CACHE] = cache

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **options):
        # What is generated goes on with the prompt's last sequence; a cache knows that by itself.
        seq_idx = model_kwargs.pop("seq_idx", None)
        if seq_idx is not None and not model_kwargs.get("use_cache", True):
            model_kwargs["seq_idx"] = torch.cat([seq_idx, seq_idx[:, -1:]], dim=1)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **options)

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, inputs_embeds=None, **kwargs
    ):
        kwargs.pop("tokenizer", None)  # of stop_strings: transformers hands it on to the model
        # transformers takes ids that come with a cache for the whole sequence, unless a longer
        # attention_mask comes with them, and cuts off what the cache has seen.
        cache = kwargs.get(CACHE)
        if isinstance(cache, RewindableCache) and input_ids.shape[1] > cache.get_seq_length():
            next_sequence_length = input_ids.shape[1] - cache.get_seq_length()
        if next_sequence_length is not None and next_sequence_length <= 0:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens, and the cache has seen "
                f"{cache.get_seq_length()}: give the whole sequence with at least one token that "
                "the cache has not seen, or new tokens with an attention_mask that covers the "
                "whole sequence; inputs_embeds must be of the whole sequence"
            )
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )


def _next_tokens(labels, mask, seq_idx):
    """(b, l), for each position the label it has to predict; -100 where there is none.

    That is the label of the next position that is not masked, unless it is of another sequence.
    """
    order = back = None
    if mask is not None:
        order = mask.int().argsort(dim=1, stable=True)  # (b, l), masked positions to the front
        back = order.argsort(dim=1)

    def following(x):
        x = x if order is None else _take(x, order)
        x = F.pad(x, (0, 1), value=-100)[:, 1:]
        return x if back is None else _take(x, back)

    targets = following(labels)
    if mask is not None:
        targets = targets.masked_fill(~mask, -100)
    if seq_idx is not None:
        seq_idx = seq_idx.long()  # any integers: -100, which is put after them, fits few
        targets = targets.masked_fill(following(seq_idx) != seq_idx, -100)
    return targets


class RewindableCache:
    """A cache that can forget its last tokens, for the speculative decoding of transformers.

    A state has no way back, but it is a value: the one before all tokens that may have to be
    forgotten is kept, with these. Unlike a Mamba2Cache, this changes in place, as transformers
    expects it to.

        base    the Mamba2Cache after the tokens that are there to stay
        since   (1, m) tokens after these, which can be forgotten
        tip     the Mamba2Cache after all of them; None once only some of them were forgotten
    """

    is_compileable = False
    is_croppable = True
    is_linear = (False,)
    layers = ()  # none of them records a past of its own
    _is_user_defined = True  # it changes in place, so that a token too many has to be taken back

    def __init__(self, base: Mamba2Cache):
        self.base, self.since, self.tip = base, None, base

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.base.length + (0 if self.since is None else self.since.shape[1])

    def activate_past_recording(self):
        """Nothing to do: tokens are always remembered."""

    def crop(self, tokens: int):
        """Forget the last -tokens tokens or, if positive, all after the first `tokens`.

        If that forgets nothing, all tokens are there to stay.
        """
        length = self.get_seq_length()
        kept = min(tokens if tokens > 0 else length + tokens, length) - self.base.length
        if kept < 0:
            raise ValueError(
                f"crop({tokens}): {-kept} tokens were there to stay since the last one"
            )
        if kept == length - self.base.length:
            self.base, self.since = self.tip or self.base, None if self.tip else self.since
        elif kept == 0:
            self.since, self.tip = None, self.base
        else:
            self.since, self.tip = self.since[:, :kept], None

    def read(self, model, ids, mask, logits_to_keep, output_hidden_states):
        """The model's output for more tokens, (1, l)."""
        options = dict(use_cache=True, output_hidden_states=output_hidden_states, return_dict=True)
        if self.tip is not None:
            output = model(ids, mask, self.tip, logits_to_keep=logits_to_keep, **options)
            self.since = ids if self.since is None else torch.cat([self.since, ids], dim=1)
            self.tip = output.cache
        else:  # One pass with two rows: the first ends after `since`, and is the new base.
            m, l = self.since.shape[1], ids.shape[1]
            rows = torch.cat([self.since, ids], dim=1).expand(2, -1)
            mask = torch.ones_like(rows) if mask is None else mask[:, -(m + l) :].repeat(2, 1)
            mask[0, m:] = 0
            keep = logits_to_keep or l
            output = model(rows, mask, self.base.repeat(2), logits_to_keep=keep, **options)
            output.logits = output.logits[1:]
            if output.hidden_states is not None:
                output.hidden_states = tuple(h[1:, m:] for h in output.hidden_states)
            first, second = (output.cache.select(torch.tensor([row])) for row in range(2))
            self.base = Mamba2Cache(first.states, self.base.length + m, first.seq_idx)
            self.since, self.tip = ids, second
        output[CACHE] = self
        return output


class _BufferedState(Mamba2State):
    """A state in buffers of a CUDA graph; `out` is where a layer's kernel writes the next one."""


class DecodingGraph:
    """A model's step by one token, captured as a CUDA graph: one launch instead of hundreds.

    The state lives in buffers that the graph reads and writes; `load` copies a cache into them and
    `cache` copies one out, so that caches stay values. Weights are read where they lie. All heads
    read conv, so that none may write to it: there are two buffers, and two graphs, one from the
    first to the second and one back, which take turns.

    A model's last graph is kept, with buffers as large as the cache, for the next text of the same
    batch size: `DecodingGraph.idle.pop(model, None)` frees them. `DecodingGraph.enabled = False`
    does without graphs. There is none for a model with hooks or adapters, which a graph would not
    see change, nor with weights that are spread over several devices. While one is made, other
    threads must not draw random numbers on that GPU.
    """

    enabled = True
    capturing = threading.Lock()  # PyTorch can make one graph at a time
    idle = weakref.WeakKeyDictionary()  # model: the graph that it used last
    failed = weakref.WeakKeyDictionary()  # model: what no graph could be made for

    @classmethod
    def weights(cls, model):
        """Where the weights lie; None where a graph would not do all that the model does."""
        if not cls.enabled:
            return None
        if any(_is_watched(m) or hasattr(m, "adapter_layer_names") for m in model.modules()):
            return None
        weights = [*model.parameters()]
        if any(type(weight) is not nn.Parameter for weight in weights):  # sharded or quantised
            return None
        return tuple((weight.device, weight.data_ptr()) for weight in weights)

    @classmethod
    def take(cls, model, cache, weights):
        """A graph of the model for nobody else, loaded with the cache; None where it cannot be."""
        if weights is None or not isinstance(cache, Mamba2Cache) or not cache.states:
            return None
        device = cache.states[0].ssm.device
        if device.type != "cuda" or any(weight[0] != device for weight in weights):
            return None
        if cache.seq_idx is not None or torch.is_autocast_enabled("cuda"):
            return None
        if torch.is_grad_enabled() or torch.cuda.is_current_stream_capturing():
            return None
        sizes = [(tensor.shape, tensor.dtype) for tensor in cache.states[0]]
        modes = torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled()
        modes += (None if kernels is None else kernels._allows_tf32(),)
        key = weights, len(cache.states), *sizes, *modes
        if cls.failed.get(model) == key:
            return None
        graph = cls.idle.pop(model, None)
        if graph is None or graph.made_for != key:
            graph = None  # whose memory is free before the next takes its own
            try:
                graph = cls(model, cache, key)
            except RuntimeError as error:
                cls.failed[model] = key
                warnings.warn(f"tokens are decoded without a CUDA graph: {error}", stacklevel=2)
                return None
        torch.cuda.current_stream(device).wait_event(graph.done)
        graph.load(cache)
        return graph

    @classmethod
    def give_back(cls, model, graph):
        if graph is not None:  # whoever takes it next may use another stream
            graph.done = torch.cuda.current_stream(graph.token.device).record_event()
            cls.idle[model] = graph

    def __init__(self, model, cache, key):
        self.made_for, self.states, self.others = key, [], []
        for conv, ssm in cache.states:
            state = _BufferedState(conv.clone(), ssm.clone())
            other = _BufferedState(conv.clone(), state.ssm)
            state.out, other.out = tuple(other), tuple(state)
            self.states.append(state)
            self.others.append(other)
        b, device = cache.states[0].ssm.shape[0], cache.states[0].ssm.device
        self.token = torch.zeros(b, 1, dtype=torch.int64, device=device)
        self.turns, memory = [], torch.cuda.graph_pool_handle()
        outer = _decoding.set(None)  # it is the plain step that is captured
        try:
            with DecodingGraph.capturing, torch.cuda.device(device):
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):  # for what is done once, such as compiling kernels
                    for _ in range(2):
                        self.step(model)
                torch.cuda.current_stream().wait_stream(stream)
                # Other threads may go on using the GPU.
                options = dict(pool=memory, stream=stream, capture_error_mode="thread_local")
                for _ in range(2):
                    graph = torch.cuda.CUDAGraph()
                    # A capture that fails would leave its stream the current one.
                    with torch.cuda.stream(stream), torch.cuda.graph(graph, **options):
                        logits = self.step(model)
                    self.turns.append((graph, logits))
                self.done = stream.record_event()
        finally:
            _decoding.reset(outer)

    def step(self, model):
        """The step itself, from buffers to buffers."""
        cache = Mamba2Cache(tuple(self.states))
        output = model(self.token, cache=cache, use_cache=True, return_dict=True)
        self.states, self.others = self.others, self.states
        _copy(self.states, output.cache.states)
        return output.logits[:, -1]

    def load(self, cache):
        """Go on from this cache."""
        _copy(self.states, cache.states)

    def cache(self, length) -> Mamba2Cache:
        """The state after the last token."""
        states = tuple(Mamba2State(*map(torch.empty_like, state)) for state in self.states)
        _copy(states, self.states)
        return Mamba2Cache(states, length)

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


class _Decoder:
    """What a forward pass of one token does, while `generate` runs: a graph's step on values."""

    def __init__(self, model):
        self.model, self.graph, self.cache = model, None, None
        self.weights = DecodingGraph.weights(model) if model.device.type == "cuda" else None

    def __call__(self, ids, cache):
        """The output for ids (b, 1), or None where there can be no graph."""
        if cache is not self.cache or self.graph is None:  # not the one of the last token
            self.close()
            self.graph = DecodingGraph.take(self.model, cache, self.weights)
        if self.graph is None:
            return None
        logits = self.graph(ids)[:, None].clone()
        self.cache = self.graph.cache(cache.length + 1)
        return Mamba2CausalLMOutput(logits=logits, **{CACHE: self.cache})

    def close(self):
        DecodingGraph.give_back(self.model, self.graph)
        self.graph = self.cache = None


_decoding = contextvars.ContextVar("_decoding", default=None)  # this thread's _Decoder, if any


def _progress_bar(segments):
    from tqdm.auto import tqdm

    return tqdm(total=segments, unit=" segments")


def _casting_anew(x):
    """Autocast as it is on x's device, but without its memory of what it has cast.

    With it, a weight would be cast once for all segments, and their gradients added in bfloat16.
    """
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, cache_enabled=False)


def register_with_transformers():
    """Make AutoConfig, AutoModel and AutoModelForCausalLM use this file for "mamba2"."""
    if transformers_missing is not None:
        raise ImportError(transformers_missing)
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    AutoConfig.register("mamba2", Mamba2Config, exist_ok=True)
    AutoModel.register(Mamba2Config, Mamba2Model, exist_ok=True)
    AutoModelForCausalLM.register(Mamba2Config, Mamba2ForCausalLM, exist_ok=True)


# --------------------------------------------------------------------------------------------------
# 5. One sequence on several ranks
# --------------------------------------------------------------------------------------------------


class Slices:
    """What a rank knows of a sequence of which each rank of a group has a slice (Section 8.2).

        y, state = layer.step(u, state, mask, seq_idx, group)        # u: (b, l of this rank, d)
        model(ids, labels=ids, group=group).loss.backward()          # ids: (b, l of this rank)

    In the order of ranks, the slices are the sequence; they may be of any lengths, 0 too. What
    crosses a border is what a layer's state is made of:

    - The convolution needs the last k-1 inputs before the slice: one all-gather of those of
      each slice.
    - SSD is linear in its state. Each rank scans its slice from a zero state; one all-gather of the
      (p, n) numbers after it, and of its total decay, gives the state before each slice: that
      is the recurrence between chunks (step 3 of Listing 1) with slices for chunks. What it adds to
      the outputs is one matrix product.

    In shapes here r is ranks, if not (g r), which is heads; s is segments.

    Gradients take the same way back. Each rank gets its part of the gradients of parameters, and of
    the states that were passed, of the sum of all ranks' losses: the parts add up. The loss of
    `Mamba2ForCausalLM` is the whole sequence's on every rank, R times in this sum; so it is their
    average that is one process's gradient, which is what DDP and FSDP compute.

    With segment_length, each segment is cut in slices, and a rank has its slices of all segments,
    one after the other; their number is the same on every rank. Of ids (b, l), whose segments are
    of R segment_length positions each, for R ranks, that is

        ids.unflatten(1, (-1, R, segment_length))[:, :, rank].flatten(1)

    Bytes that a rank sends in a layer, forward, to each of the R-1 others:

        b (4 h (p n + 1) + e (k-1) (h p + 2 g n))         e: bytes of a number of the projections

    whatever the length is; the same again backward, and whenever a layer is computed again, for
    gradient checkpointing or segments; all of it for each segment. In a float64 layer, 8 stands for
    4. For one row in mamba2-2.7b in bfloat16 this is 2.65 MB. Beside it, labels and options are a
    few kB for a model's whole call.

    On paper: mamba2-2.7b, 2^24 tokens on 64 GPUs with gradient checkpointing. A rank receives
    63 * 2.65 MB = 167 MB in a layer and pass, 32 GB in 64 layers and 3 passes: 0.6 s at 50 GB/s,
    beside some 14 s of computation (8 * 2.7e9 * 2^18 operations at 4e14 a second), so 4.5%. The
    share grows as R / l with the length l of a slice: twice the ranks on the same sequence make it
    four times as large. From about there on, or where 167 MB in a layer are too much memory, the
    all-gather should become a tree: pairs (decay, state) compose associatively, so that log2(R)
    exchanges of 2.65 MB do for the prefix, 16 MB instead of 167.

    Ranks that call with different options get an error, all of them, before anything else is
    exchanged. A rank that fails leaves the others waiting, until torchrun ends them or the timeout
    of `init_process_group` is over.

    Raises:
        TypeError: group is not a process group that this rank belongs to.
        ValueError: the ranks' options differ.
    """

    @classmethod
    def of(cls, group, *arguments, **options):
        """None without a group. Slices stay as they are: the model passes them on to its layers."""
        if group is None or isinstance(group, Slices):
            return group
        return cls(group, *arguments, **options)

    def __init__(self, group, config, x, mask, seq_idx, **options):
        options.update({name: getattr(config, name) for name in _DEFAULTS})
        length = sum(_agree(group, x, **options, seq_idx=seq_idx is not None))
        self.group, self.rank = group, dist.get_rank(group)
        # Of each slice, gather the sequences of the first position that exists, and of the last m.
        labels = x.new_zeros(x.shape[:2], dtype=torch.int64) if seq_idx is None else seq_idx.long()
        if mask is not None:
            labels = labels.masked_fill(~mask, NO_LABEL)
        self.order = (labels != NO_LABEL).int().argsort(dim=1, stable=True)  # (b, l)
        self.m = max(1, config.conv_kernel - 1)
        first = _first(labels, labels != NO_LABEL, NO_LABEL)  # (b)
        last = self.last(labels[..., None], NO_LABEL)[..., 0]  # (b, m)
        labels = _all_gather(torch.cat([first[:, None], last], dim=1), group)  # (r, b, 1+m)
        self.last_labels = rearrange(labels[:, :, 1:], "r b m -> b (r m)")
        labels = rearrange(labels, "r b m -> b (r m)")
        # The first and last positions of each slice: all that `_go_on` asks the whole sequence for.
        self.whole = labels, labels != NO_LABEL, length
        # (b), whether this slice begins another sequence than the one before it.
        before = labels[:, : self.rank * (1 + self.m)].flip(1)
        before = _first(before, before != NO_LABEL, first)
        self.begins = (first != before) & (first != NO_LABEL)

    def last(self, x, fill=0):
        """The last m positions that exist of x (b, l, c): (b, m, c), or fewer after `fill`."""
        x = _take(x, self.order[:, -self.m :])
        return F.pad(x, (0, 0, self.m - x.shape[1], 0), value=fill)

    def states_of_convolution(self, xBC, state):
        """The state (b, k-1, d) of the convolution before this slice, and after the last one."""
        last = rearrange(_all_gather(self.last(xBC), self.group), "r b m d -> b (r m) d")
        # causal_conv1d is called for its final state alone: with outputs that nobody reads, its
        # weights may be zeros.
        no_weight = last.new_zeros(last.shape[2], 1 + state.shape[1])

        def state_after(slices):  # of all positions, the last ones of each slice are enough
            x, labels = last[:, : slices * self.m], self.last_labels[:, : slices * self.m]
            # _pass_over wants a dt, too: any (b, l, ...) will do, for its result is dropped.
            x, before, _, labels, _ = _pass_over(labels != NO_LABEL, x, state, x, labels)
            return causal_conv1d(x, no_weight, initial_state=before, seq_idx=labels)[1]

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
    """`_next_tokens` for this rank's slices, of `length` positions in each segment."""
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
    targets = _next_tokens(labels, mask.bool(), seq_idx).split([t.shape[2] for t in pieces], dim=1)
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
