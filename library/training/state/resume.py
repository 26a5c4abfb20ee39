"""Going on where a run stopped: which training state, whether it fits, and what a new one says of its run."""

import importlib.metadata
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from library.data.training_set import TrainingSet
from library.errors import InputError
from library.options.flag import Flags
from library.options.training import TrainingOptions
from library.options.values import plain_values
from library.training.identity import bits_digest, changed
from library.training.ranks.agreement import check_agreement
from library.training.ranks.main_process import on_main_process
from library.training.ranks.rank_failure import together
from library.training.state.choice import newest_valid
from library.training.state.files import StateInfo, manifest_digest, read_state, verify
from library.training.state.states import Resumed, data_positions, parts_in
from library.training.state.tensor_rows import check_names

logger = logging.getLogger(__name__)

AUTO = "auto"  # --resume auto: the newest state that holds, else from the start
_PACKAGES = ("torch", "torch_npu", "accelerate", "fairscale", "diffusers", "transformers", "numpy", "Pillow")


@dataclass(frozen=True)
class Position:
    """What a run's course hangs on, besides the weights: it must be the same to go on."""

    plan: str  # fingerprint of the data and its order
    seed: int
    global_batch: int
    batch_size: int  # samples of a micro-batch, all of one bucket


def choose_state(resume: str | None, output_dir: Path, output_name: str | None) -> Path | None:
    """The state to go on from, whole as its manifest says; None to start from the beginning.

    Args:
        resume: a state's folder, "auto" or None, as --resume has it.

    Raises:
        InputError: the folder that was named is no whole state.
    """
    if resume is None:
        return None
    if resume != AUTO:
        verify(Path(resume))
        return Path(resume)
    found = newest_valid(output_dir, output_name)
    if found is None:
        logger.info("--resume auto: no training state in %s, training starts from the beginning", output_dir)
    return found


def check_position(saved: StateInfo, now: Position, folder: Path, anyway: bool) -> None:
    """Raise InputError if another data set, order, seed, global batch or batch size would be trained on than the
    state's run was.

    Args:
        anyway: --resume_anyway; then a warning, not an error.
    """
    then = Position(
        saved.plan,
        saved.seed,
        int(saved.metrics["global_batch"]),
        int(saved.options.get("train_batch_size", now.batch_size)),
    )
    differing = []
    if then.plan != now.plan:
        differing.append(f"the data or its buckets (fingerprint {then.plan[:12]} then, {now.plan[:12]} now)")
    if then.seed != now.seed:
        differing.append(f"--seed ({then.seed} then, {now.seed} now)")
    if then.global_batch != now.global_batch:
        differing.append(
            f"the global batch: batch size × processes × accumulation ({then.global_batch} then, "
            f"{now.global_batch} now)"
        )
    if then.batch_size != now.batch_size:
        differing.append(f"--train_batch_size ({then.batch_size} then, {now.batch_size} now)")
    if not differing:
        return
    what = f"{folder}: other than in the run that saved it: {'; '.join(differing)}"
    if not anyway:
        raise InputError(
            f"--resume {what}. The samples would not be those that follow. Go on with the same, or add --resume_anyway "
            "to train on the new order from this step on."
        )
    logger.warning("--resume_anyway: %s; the new order counts from step %d on", what, saved.step)


def check_length(step: int, steps: int, folder: Path) -> None:
    """Raise InputError if a state has done more steps than the run is long."""
    if step > steps:
        raise InputError(
            f"--resume {folder}: {step} steps are done, and the run is {steps} steps long; raise --max_train_steps (or "
            "_epochs)"
        )


def check_optimizer(saved: StateInfo, optimizer_type: str, folder: Path) -> None:
    """Raise InputError if the state holds what another optimizer keeps of each parameter; `oss` keeps AdamW's."""
    then = str(saved.options.get("optimizer_type", optimizer_type))
    if then.lower() == optimizer_type.lower() or {then.lower(), optimizer_type.lower()} == {"adamw", "oss"}:
        return
    raise InputError(
        f"--resume {folder}: it has the optimizer state of {then}, which {optimizer_type} cannot go on from. Go on "
        f"with --optimizer_type={then}, or start a new run from the checkpoint's weights."
    )


def check_weights_precision(saved: StateInfo, full_bf16: bool, folder: Path) -> None:
    """Raise InputError if the state's weights and optimizer state are of another precision than this run's."""
    then = bool(saved.options.get("full_bf16", False))
    if then != full_bf16:
        raise InputError(
            f"--resume {folder}: it was saved with{'' if then else 'out'} --full_bf16, and weights and optimizer state "
            f"of {'bf16' if then else 'fp32'} do not go on as {'fp32' if then else 'bf16'}. "
            f"{'Add' if then else 'Leave out'} --full_bf16, or start a new run from a checkpoint."
        )


def log_changed_options(
    saved: StateInfo, now: Mapping[str, Any], untold: Collection[str] = (), defaults: Mapping[str, Any] | None = None
) -> None:
    """A line of the log for each option and package version that is another one than it was.

    An option that came after the state was saved, and is not given, changes nothing.

    Args:
        now: the options by their names, as `plain_values` has them.
        untold: names of those that say nothing about the training itself.
        defaults: of the options, by their names.
    """
    for what, then, present in (("option", saved.options, now), ("version of", saved.versions, versions())):
        for name in sorted(then.keys() | present.keys()):
            before, after = then.get(name), present.get(name)
            new_and_off = name not in then and (after in (None, False) or after == (defaults or {}).get(name))
            if before != after and name not in untold and not new_and_off:
                logger.warning("changed since the state: %s %s, %s -> %s", what, name, before, after)


def resumed_state(options: TrainingOptions, accelerator: Accelerator) -> Resumed | None:
    """The state that --resume asks for: the main process chooses and verifies it, all read it.

    Raises:
        InputError: it cannot be read, or not all processes see the same one under its name; on every process.
    """
    resume, saving = options.states.resume, options.saving
    if resume is None:
        return None
    folder = on_main_process(accelerator, lambda: choose_state(resume, saving.output_dir, saving.output_name))
    if folder is None:
        return None
    with together(accelerator):
        resumed = Resumed(folder, read_state(folder, verified=True))
        seen = {f"the training state {folder}, which all must see in one --output_dir": manifest_digest(folder)}
    check_agreement(accelerator, seen)
    return resumed


def check_taken_up(accelerator: Accelerator, weights: Mapping[str, Tensor]) -> None:
    """Raise InputError where processes that hold the same weights have taken other ones out of their state's files.

    The main process alone verifies the files: another machine's may be older or damaged under the same manifest.

    Args:
        weights: those that train, by name, the same on each process.
    """
    if accelerator.num_processes > 1:  # it reads them all
        check_agreement(accelerator, {"the weights after resuming": bits_digest(weights)})


def check_resumed(resumed: Resumed, options: TrainingOptions, data: TrainingSet, seed: int, steps: int) -> None:
    """Whether this run may go on from the state."""
    info = resumed.state.info
    now = Position(data.fingerprint(), seed, data.global_batch, options.data.train_batch_size)
    check_position(info, now, resumed.folder, options.states.resume_anyway)
    check_optimizer(info, options.optimizer.optimizer_type, resumed.folder)
    check_weights_precision(info, options.precision.full_bf16, resumed.folder)
    check_length(resumed.step, steps, resumed.folder)
    data.go_on_from(data_positions(resumed.state), options.states.resume_anyway)
    flags = Flags(type(options))
    untold = [flag.name for flag in flags if not flag.told_on_resume]
    log_changed_options(info, plain_values(options), untold, flags.defaults())


def check_identity(resumed: Resumed, now: Mapping[str, str], anyway: bool) -> None:
    """Raise InputError if this run learns something else than the state's run did.

    Args:
        now: this run's identity.
        anyway: --resume_anyway; then a warning, not an error.
    """
    differing = changed(resumed.state.info.identity, now)
    if not differing:
        return
    what = f"{resumed.folder}: what is learned differs from the run that saved it: {'; '.join(differing)}"
    if not anyway:
        raise InputError(
            f"--resume {what}. The weights were trained for the former. Go on with the same, or add --resume_anyway to "
            "train them for the latter from this step on."
        )
    logger.warning("--resume_anyway: %s", what)


def check_parameters(resumed: Resumed, names: Collection[str]) -> None:
    """Raise InputError if the state is of other parameters than those that train, by their names."""
    check_names(parts_in(resumed.state).names, names)


def versions() -> dict[str, str]:
    """Versions of the packages that compute."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
