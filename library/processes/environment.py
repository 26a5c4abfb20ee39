"""What launchers leave in the environment for accelerate and torch: followed, overridden with a line, or refused.

accelerate reads some fifty variables, whoever has set them: `accelerate launch` from a configuration file that was once
made (~/.cache/huggingface/accelerate/default_config.yaml), a cluster, an earlier line of a shell. A run is what its
flags say, so none of them may act unseen.
"""

import importlib.util
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from library.errors import InputError

_OFF = ("", "no", "none", "false", "0", "off")
_KEPT = ("ACCELERATE_LOG_LEVEL", "ACCELERATE_ENABLE_RICH")
_HIDE = "hide devices by CUDA_VISIBLE_DEVICES= or ASCEND_RT_VISIBLE_DEVICES= to train on another"
_UNSET = "Unset it, and start by test/pretrain_full_*.sh, torchrun or python"
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed is not used here; --sharding=zero1 and fsdp share what its stages share",
    "ACCELERATE_USE_FSDP": "accelerate's FSDP is not used here; --sharding=fsdp shards by torch's FSDP2",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM trains no such model; --sharding=fsdp shares weights",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor and context parallelism are not built; --sharding=fsdp shares weights",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's data parallelism is not used here; start by torchrun there, too",
}
# Variables of launchers other than torchrun, by which accelerate counts processes on the CPU, and elsewhere does not.
_COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """This process among those of the run, and where they meet.

    Attributes:
        agent: torchrun's agent holds the store; else the first process does.
        attempt: text that tells the processes of one start from those of another at the same store.
    """

    rank: int
    world_size: int
    address: str
    port: int
    agent: bool
    attempt: str


def take_environment(environ: MutableMapping[str, str], mixed_precision: str) -> list[str]:
    """Take out of the environment what accelerate would follow unseen; returns a line for each thing of weight.

    Args:
        mixed_precision: the run's.

    Raises:
        InputError: a variable asks for another way of training.
    """
    for name, why in _REFUSED.items():
        if _is_on(environ.get(name, "")):
            raise InputError(f"{name}={environ[name]}: {why}. {_UNSET}")
    if importlib.util.find_spec("torch_xla") is not None:
        raise InputError(
            "torch_xla is installed: accelerate would take this for a run on TPUs, which is not built; use an "
            "environment without it"
        )
    counts = {
        "ACCELERATE_DYNAMO_BACKEND": "--torch_compile and --dynamo_backend say what is compiled",
        "ACCELERATE_MIXED_PRECISION": f"--mixed_precision={mixed_precision} counts",
        "ACCELERATE_USE_CPU": f"the device is what torch finds; {_HIDE}",
        "ACCELERATE_TORCH_DEVICE": f"the device is what torch finds; {_HIDE}",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "--gradient_accumulation_steps counts",
        "ACCELERATE_GRADIENT_CLIPPING": "--max_grad_norm counts",
        "ACCELERATE_CPU_AFFINITY": "the system places the processes",
        "ACCELERATE_DEBUG_MODE": "collectives are checked by other means here",
    }
    same = {"ACCELERATE_MIXED_PRECISION": (mixed_precision,), "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1",)}
    lines = []
    for name in [name for name in environ if name.startswith("ACCELERATE_") and name not in _KEPT]:
        value = environ.pop(name)
        acts = name == "ACCELERATE_MIXED_PRECISION" or _is_on(value)
        if acts and name in counts and value.lower() not in same.get(name, ()):
            lines.append(f"{name}={value} is not followed: {counts[name]}")
    return lines


def place_of_process(environ: MutableMapping[str, str]) -> tuple[Place | None, list[str]]:
    """Where this process is among those of the run, None where it is alone, and lines about what was filled in.

    Raises:
        InputError: variables say that there are several processes, and not how they find each other.
    """
    world_size = _number(environ, "WORLD_SIZE", 1)
    if world_size <= 1:
        _refuse_other_launchers(environ)
        return None, []
    missing = [name for name in _NEEDED if not environ.get(name)]
    if missing:
        raise InputError(
            f"WORLD_SIZE={world_size}: there are to be {world_size} processes, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set. Start by torchrun, which sets all, or unset WORLD_SIZE "
            "to train by this process alone"
        )
    rank, lines = _number(environ, "RANK", 0), []
    if rank >= world_size:
        raise InputError(f"RANK={rank} is not below WORLD_SIZE={world_size}; ranks count from 0")
    if not environ.get("LOCAL_RANK"):
        environ["LOCAL_RANK"] = "0"
        environ.setdefault("LOCAL_WORLD_SIZE", "1")
        lines.append("LOCAL_RANK is not set: this process is taken for the only one of its machine")
    attempt = f"{environ.get('TORCHELASTIC_RUN_ID', '')}/{environ.get('TORCHELASTIC_RESTART_COUNT', '')}"
    agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    port = _number(environ, "MASTER_PORT", 0)
    return Place(rank, world_size, environ["MASTER_ADDR"], port, agent, attempt), lines


def _refuse_other_launchers(environ: Mapping[str, str]) -> None:
    """Raise InputError where another launcher has started several processes, each of which would train alone."""
    for name in _COUNTS:
        if _number(environ, name, 1) > 1:
            raise InputError(
                f"{name}={environ[name]}: another launcher than torchrun has started several processes, and each would "
                "train alone. Start one torchrun on each machine (mpirun and srun can do that), or set RANK, "
                "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process"
            )


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(environ.get(name) or default)
    except ValueError as error:
        raise InputError(f"{name}={environ[name]}: must be a whole number") from error


def _is_on(value: str) -> bool:
    return value.lower() not in _OFF
