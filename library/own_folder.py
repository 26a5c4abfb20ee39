"""Folders that this project has written say which files are its own, so that nothing else in them is ever deleted."""

import json
from pathlib import Path

# A list of files, in the folder that it is of: "files" by their path in the folder, each with its size in bytes. The
# manifest of a training state (library.training.state.files) is one, too.
LIST, MANIFEST = ".written_files.json", "manifest.json"


def write_list(folder: Path) -> None:
    """List all files of a folder that this project has just written."""
    files = {str(path.relative_to(folder)): {"bytes": path.stat().st_size} for path in _files(folder)}
    (folder / LIST).write_text(json.dumps({"files": files}, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def strangers(folder: Path) -> list[str] | None:
    """The files of a folder that this project has not written as they are now; None for a folder without a list.

    Raises:
        OSError: the folder cannot be read.
    """
    for name in (LIST, MANIFEST):
        try:
            content = json.loads((folder / name).read_bytes())
            sizes = {str(file): int(entry["bytes"]) for file, entry in content["files"].items()}
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        return [
            found
            for path in _files(folder)
            if (found := str(path.relative_to(folder))) != name
            and (path.is_symlink() or sizes.get(found) != path.stat().st_size)
        ]
    return None


def is_own(folder: Path) -> bool:
    """Whether all that a folder holds was written by this project; False for a link and for what cannot be read."""
    try:
        return not folder.is_symlink() and folder.is_dir() and strangers(folder) == []
    except OSError:
        return False


def _files(folder: Path) -> list[Path]:
    """Whatever is no folder, at any depth, links not followed."""
    return [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
