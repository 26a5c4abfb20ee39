"""Quick imports at the start of a script: unneeded parts are deferred, and the garbage collector is off meanwhile.

The classes of SDXL's networks import parts of diffusers, transformers, scipy and torch that they do not need: the class
of the VAE alone imports every transformer, U-Net and autoencoder of diffusers, the losses of object detection, half of
scipy and torch's compiler. Those parts are imported on first use. Nothing is replaced: a deferred module runs its own
code when one of its names is looked up. docs/measurements/start_up.md has the cost of each part.
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
    """Import modules with the garbage collector off, which would scan all new objects again and again."""
    with _collector_at_rest(names):
        for name in names:
            importlib.import_module(name)


def import_pruned(*names: str) -> None:
    """Import modules as `import_quickly` does, and defer rarely used parts of diffusers and transformers."""
    with _collector_at_rest(names):
        _defer_imports()
        for name in names:
            importlib.import_module(name)


@contextmanager
def _collector_at_rest(names: tuple[str, ...]) -> Iterator[None]:
    """A context for importing new modules: the collector is off, and never scans their objects later (`gc.freeze`)."""
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
    """A module whose code runs when one of its names is first looked up."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":  # what importlib and inspect try out says nothing of use
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self._loaded(), name)

    def _loaded(self) -> ModuleType:
        """The module after its code has run: itself, or the object with which its code replaced it in sys.modules."""
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
    """A module of functions whose code runs when one of the functions is first called; names can be imported before."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

        def call(*args: Any, **keywords: Any) -> Any:
            return getattr(self._loaded(), name)(*args, **keywords)

        return call


class _DeferredCompiler(_Deferred):
    """torch._dynamo as long as nothing is compiled: decorators that mark functions for the compiler have no effect.

    Functions that are decorated before the compiler is loaded stay unmarked. With --torch_compile its backends are
    looked up before the classes of the networks are imported, so that it is loaded by then.
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
    """Stand in for torch._dynamo.disable, which is called with a function or returns a decorator."""
    return _unmarked if function is None else function


class _InstalledPackages(Mapping[str, list[str]]):
    """The result of importlib.metadata.packages_distributions, computed once, when a name is first looked up.

    diffusers calls the function at import, for packages whose name differs from their module's. It reads a file, or all
    file names, of every installed package.
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
    """Defer the parts named above from now on; parts that are imported already or not installed are left alone."""
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
    """The spec of a module; unlike `importlib.util.find_spec` this does not run the packages above it."""
    parent, _, _ = name.rpartition(".")
    if not parent:
        return PathFinder.find_spec(name)
    above = _spec(parent)
    folders = above.submodule_search_locations if above is not None else None
    return PathFinder.find_spec(name, folders) if folders is not None else None
