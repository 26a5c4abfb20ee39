"""A stand-in for Ascend's torch_npu, for test processes only: the same names over a simulated NPU.

It loads the extension that $NPU_SIM_LIBRARY names (test/npu_sim/environment.py builds it and sets the variable).
"""

import os
import sys

if "NPU_SIM_LIBRARY" not in os.environ:
    raise ImportError("this torch_npu is the tests' simulated NPU; start the process with test/npu_sim/environment.py")

# `import torch` imports this package by its entry point, as the real one; when this package comes first, it must not.
_autoload_before = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import torch  # noqa: E402

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = _autoload_before


def _autoload() -> None:
    """What torch calls; importing has done it all."""


torch.ops.load_library(os.environ["NPU_SIM_LIBRARY"])
torch.utils.rename_privateuse1_backend("npu")

from torch_npu import npu  # noqa: E402

torch._register_device_module("npu", npu)
# `import torch.npu.amp` must find the modules that are loaded, not load them again.
for _name in [name for name in sys.modules if name.startswith("torch_npu.npu")]:
    sys.modules[_name.replace("torch_npu.npu", "torch.npu", 1)] = sys.modules[_name]
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)

from torch_npu._activations import (  # noqa: E402
    npu_geglu,
    npu_geglu_grad,
    npu_gelu,
    npu_gelu_backward,
    npu_rms_norm,
    npu_swiglu,
)
from torch_npu._hccl import register as _register_hccl  # noqa: E402
from torch_npu._operators import npu_fusion_attention  # noqa: E402

_register_hccl()

__version__ = "2.14.0"
__all__ = [
    "npu", "npu_fusion_attention", "npu_geglu", "npu_geglu_grad", "npu_gelu", "npu_gelu_backward", "npu_rms_norm",
    "npu_swiglu",
]  # fmt: skip
