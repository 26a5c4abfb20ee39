"""The configuration that a run had, written beside its output: a file that --config_file reads again."""

from pathlib import Path
from typing import Any

from library.atomic_write import write_file
from library.options.flag import Flags
from library.options.kinds import toml_line
from library.options.training import TrainingOptions
from library.options.values import run_values

CONFIG_HEAD = "# The configuration of this run"  # the file's first words


def config_path(options: TrainingOptions) -> Path:
    """The file of a run's configuration: OUTPUT_DIR/NAME.config.toml, NAME being --output_name or "run"."""
    return options.saving.output_dir / f"{options.saving.output_name or 'run'}.config.toml"


def write_config(options: TrainingOptions, seed: int) -> None:
    """Write what every flag was, section by section of --help; None is left out.

    The file stays as it is where the run was started from it: it is the user's.

    Args:
        seed: that the run has, where --seed was not given.

    Raises:
        InputError: it cannot be written.
    """
    path, text, given = config_path(options), config_text(options, seed), options.config.config_file
    if given is not None and given.resolve() == path.resolve():
        return
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def config_text(options: TrainingOptions, seed: int) -> str:
    """The file's text."""
    values = run_values(options) | dict(options.data.outer) | {"seed": seed}
    lines = [f"{CONFIG_HEAD}, as --config_file takes it. --dataset_config is read from its own file."]
    for title, flags in Flags(type(options)).sections().items():
        written = [
            _line(flag.name, values[flag.name]) for flag in flags if flag.on_command_line and flag.in_config_file
        ]
        lines += ["", f"# {title}", *filter(None, written)]
    return "\n".join(lines) + "\n"


def _line(name: str, value: Any) -> str:
    """A flag's line; "" for one without a value."""
    return "" if value is None else toml_line(name, value)
