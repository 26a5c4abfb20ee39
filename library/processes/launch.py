"""Start a process for each device by torchrun, on one or many machines; the exit status is the first failure's.

    python -m library.processes.launch --nnodes=2 --nproc_per_node=8 --node_rank=0 --master_ip=10.0.0.1 \\
        --master_port=8989 --log=output/train_0 -- sdxl_pretrain.py ARGUMENT ...

The launchers in test/ call this module. The output of each machine's first process goes to the screen, the output of
the others to LOG.rank1.log and so on. Several machines first compare versions and settings, then watch each other.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from library.errors import InputError
from library.exit_status import EXIT_BAD_INPUT, EXIT_OK, leave_at_once
from library.processes.failures import Failure, recorded_failures, root_cause, unrecorded_failures
from library.processes.machine_watch import Watch, stopped_by
from library.processes.network_interface import network_variables
from library.processes.rendezvous import MachineGroup, connect, join_group, open_store
from library.processes.versions import software

# Each process becomes the command itself, so that signals and exit statuses are its own.
_WORKER = """
cd "$WORKER_DIR" || exit
export TORCH_DEVICE_BACKEND_AUTOLOAD="${WORKER_DEVICE_AUTOLOAD:-${TORCH_DEVICE_BACKEND_AUTOLOAD:-1}}"
if [ "$LOCAL_RANK" = 0 ]; then exec "$@"; else exec "$@" >> "$WORKER_LOG.rank$RANK.log" 2>&1; fi
"""
# A process that the user stops may have a training state to write first.
_STOP_SECONDS = 600


@dataclass(frozen=True)
class LaunchOptions:
    """This machine's number among the machines, and the command that it runs."""

    nnodes: int
    nproc_per_node: int
    node_rank: int
    master_ip: str
    master_port: int
    start_timeout: int  # seconds
    log: str  # stem
    working_dir: str  # of the processes
    command: Sequence[str]


def main(argv: list[str] | None = None) -> int:
    """Run the processes to their end; returns the exit status."""
    options = _parse(argv)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    _quieten_torchrun()
    os.environ |= {"WORKER_LOG": str(Path(options.log).absolute()), "WORKER_DIR": options.working_dir}
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // options.nproc_per_node, 1)))
    _raise_on_signals()
    try:
        cause = _run_alone(options) if options.nnodes == 1 else _run_with_others(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT
    except SignalException as error:
        return 128 + error.sigval.value
    if cause is None:
        return EXIT_OK
    print(cause.report(), file=sys.stderr, flush=True)
    return cause.status


def _parse(argv: list[str] | None) -> LaunchOptions:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    for name in ("nnodes", "nproc_per_node", "node_rank", "master_port", "start_timeout"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--master_ip", required=True)
    parser.add_argument("--log", required=True, help="stem of the logs of all processes but the first")
    parser.add_argument("--working_dir", default=".", help="where the processes run (default: here)")
    parser.add_argument("command", nargs="+", help="the script and its arguments, after --")
    return LaunchOptions(**vars(parser.parse_args(argv)))


def _quieten_torchrun() -> None:
    """Silence torchrun's loggers, whose summary of a failure would repeat ours; each logger has its own level."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed."):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _raise_on_signals() -> None:
    """Make signals raise SignalException; torchrun's handlers do the same, and it restores these when it has ended."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SignalException(f"received signal {number}", sigval=signal.Signals(number))

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)


def _run_alone(options: LaunchOptions) -> Failure | None:
    ended = _run_processes(options)
    if ended.stopped is not None:
        raise SignalException("stopped", sigval=ended.stopped)
    return root_cause(ended.failures) if ended.failures else None


def _run_with_others(options: LaunchOptions) -> Failure | None:
    """Run this machine's processes as a part of a run on several machines."""
    group = MachineGroup(options.node_rank, options.nnodes, options.master_ip, options.master_port)
    facts = {"--nnodes": str(options.nnodes), "--nproc_per_node": str(options.nproc_per_node), **software()}
    try:
        store = open_store(group, options.start_timeout)
        hosts = join_group(store, group, facts, options.start_timeout)
        for name, value in network_variables(options.master_ip, options.master_port).items():
            os.environ.setdefault(name, value)
        watch = Watch(group, hosts, lambda: connect(group))
    except RuntimeError as error:
        raise InputError(
            f"--master_ip={options.master_ip}: the main machine at {group.main_address} went away before the start; "
            "its launcher says why"
        ) from error
    ended = _run_processes(options)
    failures = list(ended.failures)
    if ended.stopped is not None and not watch.told_to_end:
        failures.append(stopped_by(ended.stopped, group.machine))
    return watch.finish(failures)


@dataclass(frozen=True)
class _Ended:
    """How this machine's processes ended; they succeeded if both fields are empty."""

    failures: Sequence[Failure] = ()
    stopped: signal.Signals | None = None  # the signal that stopped the launcher


def _run_processes(options: LaunchOptions) -> _Ended:
    """Run torchrun's agent until all processes have ended; if a process fails the agent ends the others.

    From then on SIGTERM is ignored: nothing is left to stop, and the watch, which sends it when another machine has
    failed, may send it just now; the launcher must still report why the run ended.
    """
    exits, signalled = {}, None
    with tempfile.TemporaryDirectory(prefix="launch_") as folder:
        try:
            try:
                config = _launch_config(options, folder)
                elastic_launch(config, "bash")("-c", _WORKER, "worker", sys.executable, *options.command)
            except ChildFailedError as error:
                exits = error.failures
            finally:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
        except SignalException as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signalled = error.sigval
        recorded = recorded_failures(options.node_rank, Path(folder))
    silent = unrecorded_failures(options.node_rank, exits, recorded, options.log)
    return _Ended([*recorded, *silent], signalled)


def _launch_config(options: LaunchOptions, log_folder: str) -> LaunchConfig:
    """torchrun's settings: no restarts, and time for processes that are stopped to write a training state."""
    return LaunchConfig(
        min_nodes=options.nnodes,
        max_nodes=options.nnodes,
        nproc_per_node=options.nproc_per_node,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=log_folder),
        shutdown_timeout=_STOP_SECONDS,
        **_rendezvous(options),
    )


def _rendezvous(options: LaunchOptions) -> dict[str, Any]:
    """torchrun's rendezvous settings: the main machine's store for several machines, any free port for a single one."""
    if options.nnodes == 1:
        return {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": uuid.uuid4().hex}
    return {
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{options.master_ip}:{options.master_port}",
        "rdzv_configs": {"rank": options.node_rank, "timeout": options.start_timeout},
        "run_id": "training",
    }


if __name__ == "__main__":
    leave_at_once(main())  # the watch's threads may be inside the store, which must not be torn down under them
