"""Write docs/flags/SCRIPT.md, one page for each training script, out of the script's own listing of its flags.

    python tools/write_flag_docs.py

A test compares the pages with what this writes: run it after each change of a flag.
"""

import re
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from library.options.flag import Flag, Level, in_words  # noqa: E402
from library.options.refused import REFUSED  # noqa: E402
from library.script import Script  # noqa: E402

PAGES = ROOT / "docs" / "flags"
_HEAD = "# Flags of "  # how every page begins, so that none that somebody else has put there is removed


def scripts() -> list[Script]:
    """The training scripts of the repository, by name."""
    modules = [path.stem for path in sorted(ROOT.glob("*.py")) if "\nSCRIPT = Script(" in path.read_text("utf-8")]
    return [import_module(name).SCRIPT for name in modules]


def page_of(script: Script) -> Path:
    """Where a script's flags stand."""
    return PAGES / f"{Path(script.name).stem}.md"


def page(script: Script) -> str:
    """The page of a script's flags: by section of --help, by level of a --dataset_config, and those refused."""
    summary = (script.doc or "").partition("\n")[0]
    lines = [
        f"{_HEAD}{script.name}",
        "",
        summary,
        "",
        "Every flag can be a key of `--config_file`, without its dashes; the command line wins over the file. This "
        "page is written by `python tools/write_flag_docs.py` from the flags themselves.",
    ]
    for title, flags in script.flags.sections().items():
        shown = [flag for flag in flags if flag.on_command_line]
        rows = [row for flag in shown for row in (_row(flag), *_shorthand_rows(flag))]
        pages = dict.fromkeys(flag.page for flag in shown if flag.page)
        links = [f"See {', '.join(f'[{page}](../{page})' for page in pages)}.", ""] * bool(pages)
        lines += ["", f"## {title[0].upper()}{title[1:]}", "", *links, *_table(("flag", "default", "meaning"), rows)]
    lines += ["", "## Keys of --dataset_config", ""]
    lines += ["An inner level wins over an outer one, and all of them over the command line.", ""]
    keys = [flag for flag in script.flags if flag.at is not Level.RUN]
    rows = [(_code(flag.key), _same_as(flag), flag.at.value) for flag in keys]
    lines += _table(("key", "is", "stands in"), rows)
    refused = [refused for name, refused in REFUSED.items() if name not in script.flags.by_key]
    lines += ["", "## Flags of sd-scripts that are refused", ""]
    rows = [
        (_code(f"--{each.name}"), ", ".join(map(_code, each.taken)) or "—", _with_code(each.why)) for each in refused
    ]
    lines += _table(("flag", "taken, and changes nothing", "why, and what to use"), rows)
    return "\n".join(lines) + "\n"


def _row(flag: Flag) -> tuple[str, str, str]:
    meaning = flag.help
    if flag.kind.choices:
        meaning += f". One of {', '.join(_code(str(choice)) for choice in flag.kind.choices)}"
    if flag.needs:
        meaning += f". Needs {in_words(flag.needs)}"
    if flag.idle_without:
        meaning += f". Does nothing without {in_words(flag.idle_without)}"
    return ", ".join(map(_code, flag.spellings())), _default(flag), _with_code(meaning)


def _shorthand_rows(flag: Flag) -> list[tuple[str, str, str]]:
    return [(_code(f"--{name}"), "off", _with_code(help_line)) for name, (_, help_line) in flag.shorthands.items()]


def _default(flag: Flag) -> str:
    if flag.required:
        return "required"
    if flag.kind.switch:
        return "off"
    return "—" if flag.default in (None, "", ()) else _code(str(flag.default))


def _same_as(flag: Flag) -> str:
    return _code(f"--{flag.name}") if flag.on_command_line else flag.help


def _code(text: str) -> str:
    return f"`{text}`"


def _with_code(text: str) -> str:
    """A text with the flags in it as code."""
    return re.sub(r"--\w+(=\w+)?", lambda found: _code(found[0]), text)


def _table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    cells = [titles, ("---",) * len(titles), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells]


def main() -> None:
    """Write the pages, and remove those of scripts that are gone."""
    PAGES.mkdir(exist_ok=True)
    pages = {page_of(script): page(script) for script in scripts()}
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    for path in PAGES.glob("*.md"):
        if path not in pages and path.read_text(encoding="utf-8").startswith(_HEAD):
            path.unlink()


if __name__ == "__main__":
    main()
