"""Parts of diffusers, transformers and scipy that SDXL's classes name but do not need are imported on first use.

The class of the VAE alone brings every transformer, U-Net and autoencoder of diffusers with it, the losses of object
detection and half of scipy. docs/measurements/start_up.md has what that costs. Nothing is
replaced: a package that is deferred runs its own code as soon as anybody asks it for a name.
"""

import importlib
import importlib.util
import pkgutil
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

# Packages whose __init__ imports all that is in them; modules below them can be imported without it.
_PACKAGES = (
    "diffusers.models.autoencoders",
    "diffusers.models.transformers",
    "diffusers.models.unets",
    "scipy.integrate",
    "scipy.stats",
    "transformers.models",
)
# Its modules hold functions alone, which transformers puts into a table of losses by their names.
_FUNCTIONS = "transformers.loss"
_lock = threading.RLock()


class _Deferred(ModuleType):
    """A module that has not run yet: asked for a name, it does."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":  # what importlib and inspect try out says nothing of use
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self._loaded(), name)

    def _loaded(self) -> ModuleType:
        """What stands for the module once it has run: itself, or what its code puts in its place."""
        with _lock:
            spec, kind = self.__spec__, type(self)
            if sys.modules.get(self.__name__) is self and spec is not None and spec.loader is not None:
                self.__class__ = ModuleType  # type: ignore[assignment]
                try:
                    spec.loader.exec_module(self)
                except BaseException:
                    self.__class__ = kind
                    raise
                if sys.modules[self.__name__] is not self:
                    self.__class__ = kind
            return sys.modules[self.__name__]


class _DeferredFunctions(_Deferred):
    """A module of functions that has not run yet: its names can be imported, and it runs when one is called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

        def call(*args: Any, **keywords: Any) -> Any:
            return getattr(self._loaded(), name)(*args, **keywords)

        return call


def defer_imports() -> None:
    """From now on those parts are imported on first use; what is imported already, or is not there, stays as it is."""
    for name in _PACKAGES:
        _defer(name, _Deferred)
    for found in pkgutil.iter_modules(importlib.import_module(_FUNCTIONS).__path__, f"{_FUNCTIONS}."):
        if found.name != f"{_FUNCTIONS}.loss_utils":  # the table
            _defer(found.name, _DeferredFunctions)


def _defer(name: str, kind: type[ModuleType]) -> None:
    if name in sys.modules:
        return
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # of a package above it
        return
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    module.__class__ = kind
    sys.modules[name] = module
