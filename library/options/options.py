"""The option groups that every training script has, together."""

from dataclasses import dataclass

from library.options.caches import CacheOptions
from library.options.data import DataOptions
from library.options.optimization import OptimizationOptions
from library.options.run import PreviewOptions, RunOptions, SavingOptions


@dataclass(frozen=True)
class Options:
    """One dataclass a group, as the parser filled them."""

    data: DataOptions
    caches: CacheOptions
    optimization: OptimizationOptions
    run: RunOptions
    saving: SavingOptions
    preview: PreviewOptions
