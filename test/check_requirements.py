"""Says whether this interpreter satisfies a requirements file: prints what is missing; exit status 0 if nothing is."""

import importlib.metadata
import re
import sys
from pathlib import Path

MIN_PYTHON = (3, 10)


def requirement_lines(path):
    """All requirements of a file and of those that it includes by -r; a later line replaces nothing, all must hold."""
    for raw in path.read_text(encoding="utf-8").splitlines():
        line = raw.split("#")[0].strip()
        if line.startswith("-r"):
            yield from requirement_lines(path.parent / line[2:].strip())
        elif line:
            yield line


def missing(path):
    """A line for each requirement that is not met."""
    if sys.version_info < MIN_PYTHON:
        return [f"python >= {'.'.join(map(str, MIN_PYTHON))} (this is {sys.version.split()[0]})"]
    try:
        from packaging.requirements import Requirement
    except ImportError:  # a fresh environment: pip carries a copy
        try:
            from pip._vendor.packaging.requirements import Requirement
        except ImportError:
            return ["packaging"]
    problems = []
    for line in requirement_lines(path):
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{line} (not installed)")
            continue
        version = re.sub(r"\+.*", "", version)  # a local build such as 2.14.1+cu130 counts as 2.14.1
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{line} (installed: {version})")
    return problems


if __name__ == "__main__":
    found = missing(Path(sys.argv[1]))
    print("\n".join(found))
    sys.exit(1 if found else 0)
