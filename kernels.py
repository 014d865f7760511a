"""Fused GPU kernels for mamba2.py.

`mamba2.py` loads this file by its path, and asks it before each operation that a kernel may take
over: `takes_<operation>(...)` says whether `<operation>(...)`, which has the signature and the
meaning of its namesake in mamba2.py, can run on these tensors. No kernel is written yet: every
answer is False, and mamba2.py goes on in plain PyTorch.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

__version__ = "0.0.1"  # a number, because transformers asks any module called `kernels` for one


def _hand_over():
    """Let Hugging Face's package `kernels` have its name.

    In a folder with this file `import kernels` finds this file first, where transformers means
    Hugging Face's package. If that is installed, it is loaded in this module's place.
    """
    here = Path(__file__).resolve().parent
    elsewhere = [path for path in sys.path if Path(path or ".").resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec("kernels", elsewhere)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernels"] = module
    spec.loader.exec_module(module)


if __name__ == "kernels":
    _hand_over()


def takes_ssd(x, dt, A, B, C, D=None, *, initial_state=None, seq_idx=None) -> bool:
    """Whether `ssd` can run on these tensors."""
    return False


def takes_causal_conv1d(x, weight, bias=None, *, initial_state=None, seq_idx=None) -> bool:
    """Whether `causal_conv1d` can run on these tensors."""
    return False
