"""Run-time patches of accelerate and fairscale, each a piece of data; README.md in this folder is their ledger."""

from third_patch.accelerate_patch import accelerator, scheduler
from third_patch.fairscale_patch import oss
from third_patch.registry import Patch, PatchError, apply

PATCHES: tuple[Patch, ...] = (*oss.PATCHES, *accelerator.PATCHES, *scheduler.PATCHES)

__all__ = ["PATCHES", "Patch", "PatchError", "apply"]
