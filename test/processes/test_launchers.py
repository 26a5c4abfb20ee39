"""The launchers for eight devices and for many machines: what they accept, what they build, how they end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ONE, EIGHT, MANY = (f"test/pretrain_full_{name}_sdxl.sh" for name in ("1m_1p", "1m_8p", "nm_np"))
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def bash(*command, timeout=200):
    return subprocess.run(
        ["bash", *map(str, command)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.parametrize(
    ("launcher", "arguments", "message"),
    [
        (ONE, ["--nproc_per_node=2"], "unknown argument --nproc_per_node"),
        (EIGHT, ["--nnodes=2"], "unknown argument --nnodes"),
        (EIGHT, ["--nproc_per_node=0"], "--nproc_per_node=0: must be at least 1"),
        (EIGHT, ["--nproc_per_node=two"], "--nproc_per_node=two: must be a whole number"),
        (EIGHT, ["--batch_size=-1"], "--batch_size=-1: must be a whole number"),
        (MANY, ["--nnodes=2", "--node_rank=0"], "--nnodes=2 needs --master_ip"),
        (MANY, ["--nnodes=2", "--master_ip=10.0.0.1"], "--nnodes=2 needs --node_rank"),
        (MANY, ["--nnodes=2", "--node_rank=2", "--master_ip=10.0.0.1"], "--node_rank=2: must be at most 1"),
        (MANY, ["--nnodes=2", "--node_rank=0", "--master_ip=10.0.0.1", "--master_port=65536"], "--master_port=65536"),
        (MANY, ["--nnodes=2", "--node_rank=0", "--master_ip=10.0.0.1", "--master_port=0"], "--master_port=0"),
        (MANY, ["--master_ip=10.0.0.1"], "--master_ip without --nnodes"),
        (MANY, ["--nodes=2"], "unknown argument --nodes"),
    ],
)
def test_values_that_cannot_be_are_errors_before_anything_starts(launcher, arguments, message):
    done = bash(launcher, *arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stdout == ""


def test_bad_input_ends_the_launcher_with_status_2_and_the_error_last(tmp_path):
    done = bash(EIGHT, "--nproc_per_node=2", "--dataset_name=/no/such/folder", f"--output_dir={tmp_path}")
    assert done.returncode == 2
    assert "Final result" not in done.stdout and done.stderr == ""
    printed = done.stdout.splitlines()
    assert printed[-2].startswith("training failed: rank ")
    assert printed[-1].startswith("error: ") and "/no/such/folder" in printed[-1]
    assert "/no/such/folder" in (tmp_path / "train_0.rank1.log").read_text()
    assert "training failed" in (tmp_path / "train_0.log").read_text()


def settings(*arguments, script):
    """Runs a piece of the launchers' code after they have read their arguments; returns its output's last line."""
    launcher = "source test/launch_sdxl.sh; known_arguments+=' nnodes nproc_per_node node_rank master_ip'"
    done = bash("-c", f'{launcher}; parse_arguments "$@"; check_machines; {script}', "launcher", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(("processes", "batch"), [(1, 16), (2, 8), (8, 2), (3, 6), (64, 1)])
def test_the_demos_global_batch_does_not_depend_on_the_number_of_processes(processes, batch):
    script = 'name_output; echo "$batch_size $max_train_steps $case_name"'
    shown = settings("--demo", f"--nproc_per_node={processes}", script=script)
    assert shown == f"{batch} 800 SDXL_bs{batch}_{processes}p_acc"


def test_machines_that_share_a_folder_have_logs_of_their_own():
    main, other = (
        settings(
            "--nnodes=2", "--nproc_per_node=4", "--master_ip=10.0.0.1", f"--node_rank={rank}", "--output_dir=/out",
            script='name_output; echo "$log_stem $case_name"',
        )
        for rank in (0, 1)
    )  # fmt: skip
    assert main == "/out/train_0 SDXL_bs4_8p_acc"
    assert other == "/out/train_0.node1 SDXL_bs4_8p_acc"


def test_the_ascend_environment_of_many_machines_leaves_the_address_to_the_launch(tmp_path):
    (tmp_path / "set_env.sh").write_text("")
    script = (
        f"export ASCEND_TOOLKIT_HOME={tmp_path} NNODES=$nnodes; source test/env_npu.sh; "
        'echo "${HCCL_IF_IP:-none} $HCCL_BUFFSIZE"'
    )
    shown = settings("--nnodes=2", "--node_rank=0", "--master_ip=10.0.0.1", script=script)
    assert shown == "none 50"


def test_machines_that_share_a_folder_build_the_demo_once(tmp_path):
    """Two launchers at once: one part remains, complete; a third finds it and builds nothing."""
    (tmp_path / "make.py").write_text(
        "import pathlib, sys, time\n"
        "out = pathlib.Path(sys.argv[2])\n"
        "(out / 'half').write_text('1')\ntime.sleep(1)\n(out / 'whole').write_text('2')\n"
    )
    script = (
        f"source test/launch_sdxl.sh; python={sys.executable}; demo_dir={tmp_path}/demo; "
        f"build_part data {tmp_path}/make.py"
    )
    both = [subprocess.Popen(["bash", "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert any("building the demo's data" in text for text in printed)
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["data"]
    assert sorted(path.name for path in (tmp_path / "demo" / "data").iterdir()) == [".made_by", "half", "whole"]
    assert bash("-c", script).stdout == ""


@pytest.mark.parametrize(("number", "send"), [(signal.SIGTERM, os.kill), (signal.SIGINT, os.killpg)])
def test_a_launcher_hands_a_signal_on_once_and_waits_for_what_the_trainer_does_then(tmp_path, number, send):
    """SIGTERM to the launcher alone, and Ctrl-C, which the terminal sends to all of its process group."""
    (tmp_path / "trainer.py").write_text(
        "import signal, sys, time\n"
        "def stop(*_):\n    print('stopping', flush=True)\n    time.sleep(1)\n    print('saved')\n    sys.exit(5)\n"
        f"signal.signal({number.value}, stop)\nprint('training', flush=True)\ntime.sleep(60)\n"
    )
    log = tmp_path / "log"
    script = f"source test/launch_sdxl.sh; run_logged {log} {sys.executable} {tmp_path}/trainer.py || exit $?"
    launcher = subprocess.Popen(
        ["bash", "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a background job's shell ignores SIGINT
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not (log.exists() and "training\n" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    send(launcher.pid, number)
    printed, _ = launcher.communicate(timeout=30)
    assert (launcher.returncode, printed) == (5, "training\nstopping\nsaved\n")
    assert log.read_text() == printed


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


@pytest.fixture
def two_machines():
    """Names of two network namespaces that see each other as 10.77.0.1 and 10.77.0.2, and nothing else."""
    names = [f"sdxl{os.getpid()}x{number}" for number in range(2)]
    links = [f"v{os.getpid()}x{number}" for number in range(2)]
    try:
        for name in names:
            if (made := ip("netns", "add", name)).returncode:
                pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
        made = ip(
            "link", "add", links[0], "netns", names[0], "type", "veth", "peer", "name", links[1], "netns", names[1]
        )
        if made.returncode:
            pytest.skip(f"veth pairs cannot be made here: {made.stderr.strip()}")
        for number, (name, link) in enumerate(zip(names, links, strict=True), start=1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names, links
    except FileNotFoundError:
        pytest.skip("network namespaces need the command `ip` (package iproute2)")
    finally:
        for name in names:
            if Path(f"/var/run/netns/{name}").exists():
                ip("netns", "delete", name)


def start_in(names, machine, *command, output):
    return subprocess.Popen(
        ["ip", "netns", "exec", names[machine], *map(str, command)],
        cwd=ROOT, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)}, stdout=output.open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.all
def test_two_machines_joined_by_a_cable_train_the_demo(two_machines, tmp_path):
    """Each in a network namespace of its own, in one shared folder; cut short, so its judge is not content."""
    names, _ = two_machines
    outputs = [tmp_path / f"machine{machine}.txt" for machine in range(2)]
    running = [
        start_in(
            names, machine, "bash", MANY, "--demo", "--nnodes=2", "--nproc_per_node=1", f"--node_rank={machine}",
            "--master_ip=10.77.0.1", "--master_port=8989", f"--output_dir={tmp_path}/demo", "--max_train_steps=6",
            output=outputs[machine],
        )
        for machine in range(2)
    ]  # fmt: skip
    statuses = [process.wait(900) for process in running]
    printed, other = (output.read_text() for output in outputs)
    assert statuses == [1, 0], printed[-3000:] + other[-3000:]
    assert "------------------ Final result ------------------" in printed
    assert "of 16 show the colour asked for" in printed and "fewer than the 12 wanted" in printed
    out = tmp_path / "demo" / "0"
    case = dict(line.split(" = ") for line in (out / "SDXL_bs8_2p_acc.log").read_text().splitlines())
    assert (case["RankSize"], case["BatchSize"]) == ("2", "8")
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 6
    assert (out / "last.safetensors").is_file() and (out / "train_0.node1.log").is_file()
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(line["updated"] for line in metrics)


@pytest.mark.all
def test_a_cut_cable_ends_both_machines_within_a_minute(two_machines, tmp_path):
    """Nothing closes a connection: the collectives alone would wait for half an hour."""
    names, links = two_machines
    outputs = [tmp_path / f"machine{machine}.txt" for machine in range(2)]
    running = [
        start_in(
            names, machine, sys.executable, "-m", "library.processes.launch", "--nnodes=2", "--nproc_per_node=1",
            f"--node_rank={machine}", "--master_ip=10.77.0.1", "--master_port=8989", "--start_timeout=60",
            f"--log={tmp_path}/train{machine}", "--", ROOT / "test" / "processes" / "worker.py", 100000,
            output=outputs[machine],
        )
        for machine in range(2)
    ]  # fmt: skip
    deadline = time.monotonic() + 60
    while not all("did step 3" in output.read_text() for output in outputs) and time.monotonic() < deadline:
        time.sleep(0.5)
    ip("-n", names[1], "link", "set", links[1], "down")
    cut = time.monotonic()
    assert [process.wait(90) for process in running] == [1, 1]
    assert time.monotonic() - cut < 60
    last = [output.read_text().splitlines()[-1] for output in outputs]
    assert last[0].startswith("training failed: machine 1 (") and "has not been heard of for 25 s" in last[0]
    assert last[1].startswith("training failed: machine 0 (") and "no longer answers at 10.77.0.1:8989" in last[1]
