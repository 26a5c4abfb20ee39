"""Patches as data, and the function that applies and undoes them; only tried versions are patched.

A patch names its target as "package.module:Class.method". It is refused if the package's version is outside the range
that was tried, if the target has another signature, and if the target is patched already.
"""

import importlib
import importlib.metadata
import inspect
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet

from library.errors import InputError

logger = logging.getLogger(__name__)


class PatchError(InputError):
    """A patch does not fit the package that is installed, or its target is patched already."""


@dataclass(frozen=True)
class Patch:
    """The replacement of a function or method of another package.

    Attributes:
        target: "package.module:Class.method".
        why: what goes wrong without the patch, for the log and the ledger.
        versions: the package's versions, as requirements files write them (">=1.11,<=1.15").
        signature: the target's signature, as `inspect.signature` prints it without annotations.
        replace: returns the replacement, given the original.
        remove_when: the change in the package after which the patch can be removed.
    """

    target: str
    why: str
    versions: str
    signature: str
    replace: Callable[[Callable[..., Any]], Callable[..., Any]]
    remove_when: str

    @property
    def package(self) -> str:
        """The name of the patched distribution."""
        return self.target.partition(".")[0]


_active: dict[str, Patch] = {}


def apply(patches: Iterable[Patch]) -> Callable[[], None]:
    """Apply patches, all or none, and log a line for each.

    Returns:
        A function that restores the originals.

    Raises:
        PatchError: a patch does not fit; the message names the target, what was found and what was expected.
    """
    undone: list[Callable[[], None]] = []

    def undo() -> None:
        while undone:
            undone.pop()()

    try:
        for patch in patches:
            undone.append(_apply(patch))
            logger.info("patched %s: %s", patch.target, patch.why)
    except BaseException:
        undo()
        raise
    return undo


def _apply(patch: Patch) -> Callable[[], None]:
    if patch.target in _active:
        raise PatchError(f"{patch.target} is patched already; undo that patch first")
    _check_version(patch)
    owner, name = _owner(patch)
    original = getattr(owner, name, None)
    if not inspect.isfunction(original):
        raise PatchError(f"{patch.target}: {patch.package} {_version(patch)} has no such function to patch")
    inherited = name not in vars(owner)
    found = _signature(original)
    if found != patch.signature:
        raise PatchError(f"{patch.target} takes {found}, and the patch was written for {patch.signature}")
    setattr(owner, name, patch.replace(original))
    _active[patch.target] = patch

    def undo() -> None:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
        del _active[patch.target]

    return undo


def _version(patch: Patch) -> str:
    try:
        return importlib.metadata.version(patch.package)
    except importlib.metadata.PackageNotFoundError as error:
        raise PatchError(f"{patch.target}: {patch.package} is not installed") from error


def _check_version(patch: Patch) -> None:
    version = _version(patch)
    if not SpecifierSet(patch.versions).contains(version, prereleases=True):
        raise PatchError(
            f"{patch.target}: the patch was tried with {patch.package} {patch.versions}, and {version} is installed; "
            f"install a version in that range (requirements.txt pins one)"
        )


def _owner(patch: Patch) -> tuple[Any, str]:
    """The class or module that holds the target, and the target's name in it."""
    module, _, path = patch.target.partition(":")
    *outer, name = path.split(".")
    try:
        owner: Any = importlib.import_module(module)
        for part in outer:
            owner = getattr(owner, part)
    except (ImportError, AttributeError) as error:
        raise PatchError(f"{patch.target} is not in {patch.package} {_version(patch)}: {error}") from error
    return owner, name


def _signature(function: Callable[..., Any]) -> str:
    """A function's signature without annotations, which change more often than the parameters."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
