"""Sample prompts: text files with options after each prompt, .toml and .json lists of the same fields."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from library.diffusion.samplers import NAMES
from library.errors import InputError, Problems
from library.user_text import parse_toml, read_user_text

VAE_FACTOR = 8  # px per latent row or column


@dataclass(frozen=True)
class SamplePrompt:
    """One picture to sample. Sizes in px; `seed` None: a function of the run's seed, the step and the index."""

    prompt: str
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    seed: int | None = None
    sample_steps: int = 30
    scale: float = 7.5
    sample_sampler: str | None = None


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file as it was when the run started; what is written into it later is not seen.

    Attributes:
        sha256: of the text, in hexadecimal.
    """

    path: Path
    sha256: str
    prompts: tuple[SamplePrompt, ...]

    def __str__(self) -> str:
        return f"{len(self.prompts)} of {self.path}, as it is now (sha256 {self.sha256[:12]})"


# option of a text line -> field, type
_OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("sample_steps", int),
    "l": ("scale", float),
    "n": ("negative_prompt", str),
    "ss": ("sample_sampler", str),
}


def read_prompts(path: Path) -> PromptFile:
    """All prompts of a file, sizes rounded down to multiples of 8 px.

    Raises:
        InputError: the file cannot be read, holds no prompt, or options or values are not known; it names the file and
            everything that is wrong in it.
    """
    text = read_user_text(path, "--sample_prompts")
    entries = {".json": _json_entries, ".toml": _toml_entries}.get(path.suffix.lower(), _lines)
    problems, prompts = Problems(), []
    for where, entry in entries(text, path):
        with problems.noted():
            prompts.append(_prompt(entry, where))
    problems.raise_any()
    if not prompts:
        raise InputError(f"--sample_prompts {path}: holds no prompt; write one a line")
    return PromptFile(path, hashlib.sha256(text.encode()).hexdigest(), tuple(prompts))


def _prompt(entry: Any, where: str) -> SamplePrompt:
    """An entry of a file, a line of text or a table; raises InputError with all that is wrong with it."""
    values, wrong = _of_line(entry) if isinstance(entry, str) else _of_table(entry)
    prompt = SamplePrompt(**{"prompt": "", **values})
    wrong += _outside(prompt)
    if wrong:
        raise InputError(*(f"--sample_prompts {where}: {what}" for what in wrong))
    return replace(
        prompt, width=prompt.width // VAE_FACTOR * VAE_FACTOR, height=prompt.height // VAE_FACTOR * VAE_FACTOR
    )


def _of_line(line: str) -> tuple[dict[str, Any], list[str]]:
    """The fields of 'a red ball --w 512 --d 42', and what is wrong; options in any case, the last of a kind counts."""
    prompt, *options = re.split(r"\s--", f" {line}")
    values: dict[str, Any] = {"prompt": prompt.strip()}
    wrong = []
    for option in options:
        name, _, value = option.strip().partition(" ")
        if name.lower() not in _OPTIONS:
            known = " ".join(f"--{known}" for known in _OPTIONS)
            wrong.append(f"option --{name} is not known here; {known} are")
            continue
        field, kind = _OPTIONS[name.lower()]
        try:
            values[field] = kind(value.strip())
        except ValueError:
            whole = "a whole number" if kind is int else "a number"
            wrong.append(f"--{name} takes {whole}, got {value.strip()!r:.80}")
    return values, wrong


def _of_table(entry: Any) -> tuple[dict[str, Any], list[str]]:
    """The fields of a table, and what is wrong; a field without a value (null) has its default."""
    if not isinstance(entry, Mapping) or "prompt" not in entry:
        return {}, ["must be a table with at least 'prompt'"]
    known = [field.name for field in fields(SamplePrompt)]
    wrong = [f"field {name!r} is not known; {', '.join(known)} are" for name in entry if name not in known]
    values = {name: value for name, value in entry.items() if name in known and value is not None}
    for name, value in list(values.items()):
        number = name in ("width", "height", "seed", "sample_steps", "scale")
        wanted = ((int, float) if name == "scale" else (int,)) if number else (str,)
        if not isinstance(value, wanted) or isinstance(value, bool):
            wrong.append(f"{name} must be a {'number' if number else 'text'}, got {value!r:.80}")
            del values[name]
    return values, wrong


def _outside(prompt: SamplePrompt) -> Iterator[str]:
    """What of a prompt's values lies outside what can be drawn."""
    if prompt.sample_sampler is not None and prompt.sample_sampler not in NAMES:
        yield f"sampler {prompt.sample_sampler!r} is not known; {', '.join(NAMES)} are"
    if not 1 <= prompt.sample_steps <= 1000:
        yield f"sample steps must lie in 1 .. 1000, got {prompt.sample_steps}"
    if not math.isfinite(prompt.scale):
        yield f"the guidance scale must be a number, got {prompt.scale}"
    if prompt.seed is not None and not 0 <= prompt.seed < 2**64:
        yield f"seed must lie in 0 .. 2**64 - 1, got {prompt.seed}"
    if min(prompt.width, prompt.height) < 2 * VAE_FACTOR:
        yield f"{prompt.width}x{prompt.height} px is too small; at least {2 * VAE_FACTOR} a side"


def _lines(text: str, path: Path) -> Iterator[tuple[str, str]]:
    """The lines that hold a prompt; a line ends where editors say so, and not at U+2028 and its like."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield f"{path}:{number}", line.strip()


def _json_entries(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--sample_prompts {path}: is not JSON: {error}") from error
    if not isinstance(entries, list):
        raise InputError(f"--sample_prompts {path}: must be a list of prompts")
    yield from _numbered(entries, path)


def _toml_entries(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """[prompt] with [[prompt.subset]] tables: what stands in [prompt] holds for all of them."""
    try:
        table = parse_toml(text).get("prompt")
    except (ValueError, RecursionError) as error:
        raise InputError(f"--sample_prompts {path}: is not TOML: {error}") from error
    subsets = table.get("subset") if isinstance(table, dict) else None
    if not isinstance(table, dict) or not isinstance(subsets, list):
        raise InputError(f"--sample_prompts {path}: must hold [prompt] with at least one [[prompt.subset]]")
    common = {name: value for name, value in table.items() if name != "subset"}
    yield from _numbered([{**common, **subset} if isinstance(subset, dict) else subset for subset in subsets], path)


def _numbered(entries: list[Any], path: Path) -> Iterator[tuple[str, Any]]:
    for number, entry in enumerate(entries, start=1):
        yield f"{path}, entry {number}", entry
