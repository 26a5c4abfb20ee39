"""Options of torch.compile."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.flag import OptionGroup, flag

DYNAMO_BACKEND = "inductor"
DYNAMO_BACKENDS = (
    "eager", "aot_eager", DYNAMO_BACKEND, "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi", "fx2trt", "onnxrt",
    "tensort", "ipex", "tvm",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CompilingOptions(OptionGroup):
    """Whether the U-Net's blocks are compiled, and by what."""

    title: ClassVar[str] = "compiling"
    page: ClassVar[str] = "training.md"

    torch_compile: bool = flag(False, "compile the U-Net's blocks by torch.compile, once for all buckets")
    dynamo_backend: str = flag(
        DYNAMO_BACKEND,
        "what compiles them; it is tried before training",
        choices=DYNAMO_BACKENDS,
        needs="torch_compile",
    )
