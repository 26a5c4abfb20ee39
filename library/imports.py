"""How a start imports quickly: nothing that is not needed, and with the garbage collector at rest.

SDXL's classes name much in diffusers, transformers, scipy and torch that they do not need: the class of the VAE alone
brings every transformer, U-Net and autoencoder of diffusers with it, the losses of object detection, half of scipy and
torch's compiler. Those parts are imported on first use. Nothing is replaced: a module that is deferred runs its own
code as soon as anybody asks it for a name that it must know. docs/measurements/start_up.md has what each part costs.
"""

import gc
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# Packages whose __init__ imports all that is in them; modules below them can be imported without it.
_PACKAGES = (
    "diffusers.models.autoencoders",
    "diffusers.models.transformers",
    "diffusers.models.unets",
    "scipy.integrate",
    "scipy.stats",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.ops",
    "transformers.models",
)
# Its modules hold functions alone, which transformers puts into a table of losses by their names.
_FUNCTIONS = "transformers.loss"
_COMPILER = "torch._dynamo"
_lock = threading.RLock()


def import_quickly(*names: str) -> None:
    """Import modules with the collector at rest: it would go through all that an import makes, again and again."""
    with _collector_at_rest(names):
        for name in names:
            importlib.import_module(name)


def import_pruned(*names: str) -> None:
    """The same for modules of diffusers and transformers, from now on without what few ask for in both."""
    with _collector_at_rest(names):
        _defer_imports()
        for name in names:
            importlib.import_module(name)


@contextmanager
def _collector_at_rest(names: tuple[str, ...]) -> Iterator[None]:
    """While modules are imported that are not there yet; it never goes through what they made (`gc.freeze`)."""
    if not gc.isenabled() or all(name in sys.modules for name in names):
        yield
        return
    gc.collect()  # garbage would be frozen, too
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


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


class _DeferredCompiler(_Deferred):
    """torch._dynamo while nothing is compiled: marks for the compiler stay without effect.

    What is marked before somebody compiles stays unmarked. --torch_compile asks it for its backends before the classes
    of the networks are imported, and so it has run by then.
    """

    def __getattr__(self, name: str) -> Any:
        if name in ("allow_in_graph", "assume_constant_result"):
            return _unmarked
        if name == "disable":
            return _not_disabled
        if name == "graph_break":
            return lambda msg="": None
        if name == "config":  # settings alone; its modules import it beside the package
            return importlib.import_module(f"{_COMPILER}.config")
        return super().__getattr__(name)


def _unmarked(function: Any) -> Any:
    return function


def _not_disabled(function: Any = None, recursive: bool = True, **_: Any) -> Any:
    """As torch._dynamo.disable is called: with a function, or to get a decorator."""
    return _unmarked if function is None else function


class _InstalledPackages(Mapping[str, list[str]]):
    """importlib.metadata.packages_distributions, once, and when somebody looks a name up.

    diffusers takes it at import, for packages that are named otherwise than they are imported. It reads a file, or all
    file names, of every package that is installed.
    """

    def __init__(self, read: Callable[[], Mapping[str, list[str]]]) -> None:
        self._read = read

    def __call__(self) -> Mapping[str, list[str]]:
        return self

    @cached_property
    def _found(self) -> Mapping[str, list[str]]:
        return self._read()

    def __getitem__(self, name: str) -> list[str]:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _defer_imports() -> None:
    """From now on those parts are imported on first use; what is imported already, or is not there, stays as it is."""
    packages = importlib.metadata.packages_distributions
    if not isinstance(packages, _InstalledPackages):
        importlib.metadata.packages_distributions = _InstalledPackages(packages)
    _defer(_COMPILER, _DeferredCompiler)
    for name in _PACKAGES:
        _defer(name, _Deferred)
    functions = _spec(_FUNCTIONS)
    folders = functions.submodule_search_locations if functions is not None else None
    for found in pkgutil.iter_modules(folders or [], f"{_FUNCTIONS}."):
        if found.name != f"{_FUNCTIONS}.loss_utils":  # the table
            _defer(found.name, _DeferredFunctions)


def _defer(name: str, kind: type[ModuleType]) -> None:
    if name in sys.modules:
        return
    spec = _spec(name)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    module.__class__ = kind
    sys.modules[name] = module


def _spec(name: str) -> ModuleSpec | None:
    """Where a module is, without running the packages above it as `importlib.util.find_spec` does."""
    parent, _, _ = name.rpartition(".")
    if not parent:
        return PathFinder.find_spec(name)
    above = _spec(parent)
    folders = above.submodule_search_locations if above is not None else None
    return PathFinder.find_spec(name, folders) if folders is not None else None
