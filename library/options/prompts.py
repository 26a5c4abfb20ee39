"""Sample prompts: text files with options after each prompt, .toml and .json lists of the same fields."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from library.diffusion.samplers import NAMES
from library.errors import InputError
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


def read_prompts(path: Path) -> list[SamplePrompt]:
    """All prompts of a file, sizes rounded down to multiples of 8 px.

    Raises:
        InputError: the file cannot be read, holds no prompt, or an option or value is not known; names file and entry.
    """
    text = read_user_text(path, "--sample_prompts")
    if path.suffix == ".json":
        prompts = [_from_mapping(entry, f"{path}, entry {i}") for i, entry in enumerate(_json_entries(text, path), 1)]
    elif path.suffix == ".toml":
        prompts = [_from_mapping(entry, f"{path}, entry {i}") for i, entry in enumerate(_toml_entries(text, path), 1)]
    else:
        lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
        prompts = [_from_line(line, f"{path}:{n}") for n, line in lines if line and not line.startswith("#")]
    if not prompts:
        raise InputError(f"--sample_prompts {path}: holds no prompt; write one a line")
    return prompts


def _from_line(line: str, where: str) -> SamplePrompt:
    """'a red ball --w 512 --d 42' as a prompt; options are case-insensitive, the last of a kind counts."""
    prompt, *options = line.split(" --")
    values: dict[str, Any] = {}
    for option in options:
        name, _, value = option.strip().partition(" ")
        if name.lower() not in _OPTIONS:
            known = " ".join(f"--{known}" for known in _OPTIONS)
            raise InputError(f"{where}: option --{name} is not known here; {known} are")
        field, kind = _OPTIONS[name.lower()]
        try:
            values[field] = kind(value.strip())
        except ValueError as error:
            raise InputError(f"{where}: --{name} takes a number, got {value.strip()!r}") from error
    return _checked(SamplePrompt(prompt.strip(), **values), where)


def _from_mapping(entry: Any, where: str) -> SamplePrompt:
    if not isinstance(entry, Mapping) or "prompt" not in entry:
        raise InputError(f"{where}: must be a table with at least 'prompt'")
    known = {field.name: field.type for field in fields(SamplePrompt)}
    unknown = [name for name in entry if name not in known]
    if unknown:
        raise InputError(f"{where}: field {unknown[0]!r} is not known; {', '.join(known)} are")
    defaults = SamplePrompt("")
    for name, value in entry.items():
        number = name in ("width", "height", "seed", "sample_steps", "scale")
        wanted = ((int, float) if name == "scale" else (int,)) if number else (str,)
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise InputError(f"{where}: {name} must be a {'number' if number else 'text'}, got {value!r}")
    return _checked(replace(defaults, **entry), where)


def _checked(prompt: SamplePrompt, where: str) -> SamplePrompt:
    if prompt.sample_sampler is not None and prompt.sample_sampler not in NAMES:
        raise InputError(f"{where}: sampler {prompt.sample_sampler!r} is not known; {', '.join(NAMES)} are")
    if not 1 <= prompt.sample_steps <= 1000:
        raise InputError(f"{where}: sample steps must lie in 1 .. 1000, got {prompt.sample_steps}")
    if not math.isfinite(prompt.scale):
        raise InputError(f"{where}: the guidance scale must be a number, got {prompt.scale}")
    if prompt.seed is not None and not 0 <= prompt.seed < 2**64:
        raise InputError(f"{where}: seed must lie in 0 .. 2**64 - 1, got {prompt.seed}")
    if min(prompt.width, prompt.height) < 2 * VAE_FACTOR:
        raise InputError(f"{where}: {prompt.width}x{prompt.height} px is too small; at least {2 * VAE_FACTOR} a side")
    return replace(
        prompt, width=prompt.width // VAE_FACTOR * VAE_FACTOR, height=prompt.height // VAE_FACTOR * VAE_FACTOR
    )


def _json_entries(text: str, path: Path) -> list[Any]:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"--sample_prompts {path}: is not JSON: {error}") from error
    if not isinstance(entries, list):
        raise InputError(f"--sample_prompts {path}: must be a list of prompts")
    return entries


def _toml_entries(text: str, path: Path) -> list[Any]:
    """[prompt] with [[prompt.subset]] tables: what stands in [prompt] holds for all of them."""
    try:
        table = parse_toml(text).get("prompt")
    except ValueError as error:
        raise InputError(f"--sample_prompts {path}: is not TOML: {error}") from error
    if not isinstance(table, dict) or not isinstance(table.get("subset"), list):
        raise InputError(f"--sample_prompts {path}: must hold [prompt] with at least one [[prompt.subset]]")
    common = {name: value for name, value in table.items() if name != "subset"}
    return [{**common, **subset} for subset in table["subset"]]
