"""Options of torch.compile."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from library.options.flag import OptionGroup, flag

DYNAMO_BACKEND = "inductor"
DYNAMO_BACKENDS = (
    "eager", "aot_eager", DYNAMO_BACKEND, "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi", "fx2trt", "onnxrt",
    "tensort", "ipex", "tvm", "no",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CompilingOptions(OptionGroup):
    """Whether the U-Net's blocks are compiled, and by what."""

    title: ClassVar[str] = "compiling"
    page: ClassVar[str] = "training.md"

    torch_compile: bool = flag(False, "Compile the U-Net's blocks by torch.compile, once for all buckets")
    dynamo_backend: str = flag(
        DYNAMO_BACKEND,
        "Compile the blocks by this backend under --torch_compile; it is tried before training",
        choices=DYNAMO_BACKENDS,
    )

    def check(self, options: Any) -> Iterator[str]:
        """Say where a compiler is named and nothing is compiled, or nothing compiles what is to be compiled."""
        backend = self.dynamo_backend
        if self.torch_compile and backend == "no":
            yield "--dynamo_backend=no compiles nothing, and --torch_compile asks for it; leave one of the two out"
        if not self.torch_compile and backend not in (DYNAMO_BACKEND, "no"):
            yield (
                f"--dynamo_backend={backend} has nothing to act on without --torch_compile; add that, or leave it out"
            )
