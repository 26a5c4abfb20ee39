"""Processes on one and on two "machines" (launchers that meet on the loopback) start together and end together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import sdxl_pretrain
from library.processes import launch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORKER = HERE / "worker.py"
sys.path.insert(0, str(HERE.parent))

from npu_sim import environment as npu_sim  # noqa: E402

SCENARIO_SECONDS = 60  # the promise: a run that fails somewhere has ended everywhere within a minute
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Machines:
    """Launchers on this machine, each as if on one of its own."""

    def __init__(self, folder):
        self.folder, self.running, self.port = folder, [], free_port()

    def start(self, *command, machine=0, machines=1, processes=1, env=ENVIRONMENT):
        launcher = [
            sys.executable, "-m", "library.processes.launch", f"--nnodes={machines}",
            f"--nproc_per_node={processes}", f"--node_rank={machine}", "--master_ip=127.0.0.1",
            f"--master_port={self.port}", "--start_timeout=60", f"--log={self.folder}/train{machine}", "--",
        ]  # fmt: skip
        output = (self.folder / f"machine{machine}.txt").open("w")
        process = subprocess.Popen(
            [*launcher, *map(str, command)], cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT
        )
        self.running.append(process)
        return process

    def end(self, timeout=SCENARIO_SECONDS):
        """(exit status, what was printed) of each launcher, in the order of their start."""
        statuses = [process.wait(timeout) for process in self.running]
        machines = [next(word for word in process.args if word.startswith("--node_rank")) for process in self.running]
        return [
            (status, (self.folder / f"machine{machine.partition('=')[2]}.txt").read_text())
            for status, machine in zip(statuses, machines, strict=True)
        ]


@pytest.fixture
def machines(tmp_path):
    made = Machines(tmp_path)
    yield made
    for process in made.running:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def last_report(printed):
    """What the launcher says of the failure; nothing may come after it."""
    assert printed.count("training failed: ") == 1, printed[-3000:]
    return printed[printed.index("training failed: ") :]


def test_two_processes_of_one_machine_run_the_first_on_the_screen_the_other_to_its_log(machines):
    machines.start(WORKER, 3, processes=2)
    ((status, printed),) = machines.end()
    assert status == 0, printed
    assert printed.splitlines() == [f"rank 0 of 2 did step {step}" for step in range(3)]
    assert "rank 1 of 2 did step 2" in (machines.folder / "train0.rank1.log").read_text()


@pytest.mark.parametrize(
    ("end", "status", "first_line", "last_line"),
    [
        ("killed", 1, "was killed by SIGKILL", "rank 1 of 2 did step 2"),
        ("input_error", 2, "ended with exit status 2:", "error: --x is wrong"),
    ],
)
def test_a_process_that_dies_ends_the_run_with_its_error_last(machines, end, status, first_line, last_line):
    machines.start(WORKER, 500, 1, end, processes=2)
    ((got, printed),) = machines.end()
    lines = last_report(printed).splitlines()
    assert got == status
    assert "rank 1 (machine 0, " in lines[0] and first_line in lines[0]
    assert lines[-1] == last_line


def test_a_process_that_is_killed_on_one_machine_ends_the_run_on_both(machines):
    for machine in (1, 0):
        machines.start(WORKER, 500, 1, "killed", machine=machine, machines=2)
    for status, printed in machines.end():
        lines = last_report(printed).splitlines()
        assert status == 1
        assert "rank 1 (machine 1, " in lines[0] and "was killed by SIGKILL" in lines[0]


def test_what_hangs_and_does_not_hear_is_ended_when_another_machine_fails(machines):
    """Rank 1 of 3 fails while rank 2, on another machine, is stuck and deaf: no collective tells it."""
    for machine in (1, 0):
        machines.start(WORKER, 500, 0, "input_error", 1, "deaf", machine=machine, machines=2)
    for status, printed in machines.end():
        assert status == 2
        assert last_report(printed).splitlines()[-1] == "error: --x is wrong"


def test_a_launcher_that_is_stopped_stops_its_processes(machines):
    launcher = machines.start(WORKER, 5000, processes=2)
    log = machines.folder / "train0.rank1.log"
    deadline = time.monotonic() + SCENARIO_SECONDS
    while not (log.exists() and "did step" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    launcher.send_signal(signal.SIGTERM)
    ((status, _),) = machines.end()
    assert status == 128 + signal.SIGTERM
    size = log.stat().st_size
    time.sleep(0.5)
    assert log.stat().st_size == size


def test_machines_with_different_numbers_of_processes_do_not_start(machines):
    for machine in (1, 0):
        machines.start(WORKER, 3, machine=machine, machines=2, processes=1 + machine)
    for status, printed in machines.end():
        assert status == 2
        error = printed.splitlines()[-1]
        assert error.startswith("error: ") and "--nproc_per_node (1 and 2)" in error and "machine 1" in error


def train_arguments(model, data, out, accumulation):
    return [
        "sdxl_pretrain.py", f"--pretrained_model_name_or_path={model}", f"--train_data_dir={data}", "--resolution=64",
        "--enable_bucket", "--min_bucket_reso=32", "--max_bucket_reso=128", "--bucket_reso_steps=16",
        "--caption_extension=.txt", "--max_data_loader_n_workers=0", "--seed=1", "--max_train_steps=2",
        "--learning_rate=1e-3", "--train_batch_size=1", "--save_model_as=safetensors",
        f"--gradient_accumulation_steps={accumulation}", f"--output_dir={out}",
        "--case_name=case", "--ddp_timeout=1", "--optimizer_args", "eps=1e-3",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 8 pictures with captions."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for number in range(8):
        Image.new("RGB", (64, 64), ("red", "green", "blue")[number % 3]).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a photo of number {number}")
    return folder


def test_two_machines_train_as_one_and_count_the_images_of_both(machines, tiny_sdxl_folder, pictures, tmp_path):
    """On the simulated NPU where it can be built, against one process on the CPU."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    on_npu = npu_sim.reason_to_skip() is None
    env = npu_sim.environment(base=ENVIRONMENT) if on_npu else ENVIRONMENT
    arguments = train_arguments(tiny_sdxl_folder, pictures, both, 1)
    for machine in (1, 0):
        machines.start(*arguments, machine=machine, machines=2, env=env)
    (other_status, other_printed), (status, printed) = machines.end(200)
    assert (status, other_status) == (0, 0), printed + other_printed
    assert f"device: {'Ascend910B3' if on_npu else 'CPU'} x 2" in printed
    AcceleratorState._reset_state(reset_partial_state=True)
    assert sdxl_pretrain.main(train_arguments(tiny_sdxl_folder, pictures, alone, 2)[1:]) == 0
    lines, lines_alone = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (both, alone)
    )
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in lines_alone], rel=1e-5)
    case = dict(line.split(" = ") for line in (both / "case.log").read_text().splitlines())
    assert (case["RankSize"], case["BatchSize"]) == ("2", "1")
    # Two images a step, one of each process: TrainingTime is milliseconds a step.
    assert float(case["ActualFPS"]) == pytest.approx(2000 / float(case["TrainingTime"]), rel=0.02)
    assert printed.count("Final Performance") == 1 and "Final Performance" not in other_printed


def test_different_data_on_two_machines_is_named_on_both(machines, tiny_sdxl_folder, pictures, tmp_path):
    other = tmp_path / "copy" / pictures.name
    shutil.copytree(pictures, other, ignore=shutil.ignore_patterns(".image_index"))
    (other / "7.png").unlink()
    for machine, data, more in ((1, other, ["--v_parameterization"]), (0, pictures, [])):
        arguments = train_arguments(tiny_sdxl_folder, data, tmp_path / "out", 1)
        machines.start(*arguments, *more, machine=machine, machines=2)
    for status, printed in machines.end():
        assert status == 2, printed[-3000:]
        report = last_report(printed)
        assert "rank 1 (on " in report and "differs from rank 0" in report
        assert "the number of samples (8 and 7)" in report and f"{pictures.name} (8 samples" in report
        assert "--v_parameterization (False and True)" in report
        assert "--train_data_dir" not in report  # where the data lies may differ


def test_a_process_that_is_later_than_the_timeout_ends_the_run(machines, tmp_path):
    """What --ddp_timeout sets, in seconds here: nobody fails, one is too slow."""
    (tmp_path / "late.py").write_text(
        "import sys, time\nfrom datetime import timedelta\n"
        "from library.exit_status import run_main\nfrom library.training.engine.precision import make_accelerator\n"
        "def work():\n"
        "    accelerator = make_accelerator('no', timedelta(seconds=3))\n"
        "    accelerator.wait_for_everyone()\n"
        "    time.sleep(3600 * accelerator.process_index)\n"
        "    accelerator.wait_for_everyone()\n"
        "sys.exit(run_main(work))\n"
    )
    machines.start(tmp_path / "late.py", processes=2)
    ((status, printed),) = machines.end()
    assert status == 1
    assert "rank 0 (machine 0, " in last_report(printed) and "imed out" in last_report(printed)


@pytest.mark.parametrize("moment", ["while torchrun ends", "afterwards"])
def test_a_signal_from_the_watch_that_comes_late_does_not_hide_the_failure(monkeypatch, moment):
    """Another machine's failure is heard just when this machine's own process has failed."""
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file="")

    def torchrun(config, entrypoint):
        def run(*command):
            if moment == "while torchrun ends":
                signal.raise_signal(signal.SIGTERM)
            raise launch.ChildFailedError("worker", {0: failure})

        return run

    def recorded(machine, folder):
        if moment == "afterwards":
            signal.raise_signal(signal.SIGTERM)
        return [failure]

    monkeypatch.setattr(launch, "elastic_launch", torchrun)
    monkeypatch.setattr(launch, "recorded_failures", recorded)
    monkeypatch.setattr(launch, "unrecorded_failures", lambda *arguments: [])
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        launch._raise_on_signals()
        options = launch.LaunchOptions(2, 1, 0, "127.0.0.1", 1, 1, "log", ".", ["train.py"])
        assert launch._run_processes(options).failures == [failure]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
