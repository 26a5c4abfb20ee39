"""Before the first step, all processes make sure that they are about to train the same.

Two machines with different shards, flags or library versions would train without an error, and badly. Every process
describes what it found; where the descriptions are not the same, all of them stop with an error that names the first
process that differs from the main one, and in what.
"""

import platform
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from library.data.training_set import TrainingSet
from library.errors import InputError
from library.options.flag import Flag, Flags
from library.options.values import run_values, subset_values
from library.processes.versions import differences, software
from library.training.identity import Identity, short_digest, weights_digest

_NAMED = 5  # so many differences stand in a message

Description = dict[str, str]


def check_agreement(accelerator: Accelerator, description: Description) -> None:
    """Compare the processes' descriptions; a collective, that all of them must call.

    Raises:
        InputError: they are not the same; on every process.
    """
    if accelerator.num_processes == 1:
        return
    digests = gather_object([short_digest(repr(sorted(description.items())).encode())])
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is None:
        return
    (main_host, main), (host, theirs) = (
        broadcast_object_list([(platform.node(), description)], from_process=rank)[0] for rank in (0, other)
    )
    differ = differences(main, theirs)
    more = f" and {len(differ) - _NAMED} more" if len(differ) > _NAMED else ""
    raise InputError(
        f"the processes would not train the same: rank {other} (on {host}) differs from rank 0 (on {main_host}) in "
        f"{', '.join(differ[:_NAMED])}{more}; rank 0's first. Give every machine the same data, flags and versions"
    )


def describe_run(options: Any, seed: int, data: TrainingSet, module: nn.Module, identity: Identity) -> Description:
    """What must be the same in all processes, each entry under the name that a message gives it.

    Paths may differ: machines may have the same data in different places.
    """
    facts = {"seed": str(seed), "the model's weights": weights_digest(module)}
    return {**software(), **describe_options(options), **describe_data(data), **identity, **facts}


def describe_data(data: TrainingSet) -> Description:
    """The samples, source by source, and their order."""
    facts = {"the global batch": str(data.global_batch), "the samples' order and buckets": data.fingerprint()}
    return data.description() | facts


def describe_options(options: Any) -> Description:
    """The options that all machines must have the same of, as their flags.

    Of a path or a model's name only counts whether it is given: machines may have the same in different places.
    """
    flags = {flag.name: flag for flag in Flags(type(options))}
    subsets = subset_values(options)
    named = [(name, "", value) for name, value in run_values(options).items()]
    for number, values in enumerate(subsets, start=1):
        of = f" of subset {number}" if len(subsets) > 1 else ""
        named += [(name, of, value) for name, value in values.items() if name in flags]
    described = {f"--{name}{of}": _described(flags[name], value) for name, of, value in named}
    return {flag: value for flag, value in described.items() if value is not None}


def _described(flag: Flag, value: Any) -> str | None:
    """What must be the same of a flag's value; None for nothing."""
    if value is None and flag.kind.is_text:
        return "not given"
    if flag.same_on_ranks and not isinstance(value, Path):
        return str(value)
    return "given" if flag.kind.is_text else None
