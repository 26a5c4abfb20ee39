"""The launchers: what they accept, what they hand on to the script, what they build, how they end."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import sdxl_pretrain

ROOT = Path(__file__).resolve().parents[2]
ONE, EIGHT, MANY = (f"test/pretrain_full_{name}_sdxl.sh" for name in ("1m_1p", "1m_8p", "nm_np"))
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def bash(*command, cwd=ROOT, env=ENVIRONMENT, timeout=200):
    return subprocess.run(
        ["bash", *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
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
        (EIGHT, ["--batch_size", "4"], "--batch_size 4: write --batch_size=4"),
        (EIGHT, ["--output_dir", "a b"], "write --output_dir=a\\ b"),
        (EIGHT, ["--batch_size", "--demo"], "--batch_size needs a value: --batch_size=VALUE"),
        (EIGHT, ["--demo=1"], "--demo takes no value"),
        (EIGHT, ["--seed=3"], "unknown argument --seed"),
        (EIGHT, ["--seed=3"], "flags of sdxl_pretrain.py itself stand at the end, after --"),
        (EIGHT, ["--train_batch_size=3"], "sdxl_pretrain.py's --train_batch_size is --batch_size=VALUE here"),
        (EIGHT, ["--", "seed=3"], "seed=3: what follows -- starts with a flag of sdxl_pretrain.py"),
        (EIGHT, ["--", "--seed=3", "--output_dir", "x"], "--output_dir=FOLDER stands before --"),
        (EIGHT, ["--", "--train_batch_size=0"], "--batch_size=0: must be at least 1"),
        (EIGHT, ["--without"], "--without needs names"),
        (EIGHT, ["--without=flip_aug"], "--without=flip_aug: the launcher gives no --flip_aug; it gives --output_dir "),
        (EIGHT, ["--demo", "--max_train_epoch=2"], "the demo counts in steps"),
        (EIGHT, ["--demo", "--", "--max_train_epochs", "2"], "the demo counts in steps"),
    ],
)
def test_values_that_cannot_be_are_errors_before_anything_starts(launcher, arguments, message):
    done = bash(launcher, *arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stdout == ""


def test_all_that_is_wrong_with_the_arguments_is_said_at_once(tmp_path):
    words = [
        "--demo", "--nnodes=two", "--seed=3", "--batch_size", "4", "--vae", "a b", "word", "--max_train_epoch=2",
        "--without=flip,--foo", "--nproc_per_node=0", "--node_rank=x", "--dataset_name", f"--output_dir={tmp_path}/out",
        "--", "seed=3",
    ]  # fmt: skip
    done = bash(MANY, *words)
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    said = [line.removeprefix("pretrain_full_nm_np_sdxl.sh: ") for line in done.stderr.splitlines()]
    expected = [
        "unknown argument --seed; flags of sdxl_pretrain.py itself stand at the end, after --",
        "--batch_size 4: write --batch_size=4", "--vae a b: write --vae=a\\ b", "unknown argument word; ",
        "--dataset_name needs a value", "seed=3: what follows -- starts with a flag", "--nproc_per_node=0: must be",
        "--nnodes=two: must be a whole number", "--node_rank=x: must be a whole number", "--max_train_epoch: the demo",
        "--without=flip --foo: the launcher gives no --flip --foo; it gives --output_dir ",
        "arguments are --demo and --NAME=VALUE for: output_dir ",
    ]  # fmt: skip
    assert len(said) == len(expected) and all(map(str.startswith, said, expected)), done.stderr


def test_addresses_are_shown_without_their_secrets():
    web = "http:" + "//"
    given = [
        f"{web}me:hunter/22@h.test/0.tar?sig=5eaf00d",
        f"{web}me:hun?ter@h.test/0.tar",
        "pipe:KEY=5eaf00d cat 0.tar",
    ]
    for address in given:
        done = bash(ONE, "--dataset_name", address, address, f"--{address}", f"--dataset_nam={address}")
        assert done.returncode == 2 and "write --dataset_name=" in done.stderr and "unknown argument" in done.stderr
        said = done.stderr + bash(ONE, f"--dataset_name={address}", "--help").stdout
        assert not [secret for secret in ("hun", "22@", "ter@", "5eaf00d") if secret in said], said
    assert f"--dataset_name={web}h.test/0.tar" in bash(ONE, f"--dataset_name={given[0]}", "--help").stdout


def test_bad_input_ends_the_launcher_with_status_2_and_the_error_last(tmp_path):
    done = bash(EIGHT, "--nproc_per_node=2", "--dataset_name=/no/such/folder", f"--output_dir={tmp_path}")
    assert done.returncode == 2
    assert "Final result" not in done.stdout and done.stderr == ""
    printed = done.stdout.splitlines()
    assert printed[-2].startswith("training failed: rank ")
    assert printed[-1].startswith("error: ") and "/no/such/folder" in printed[-1]
    assert (tmp_path / "train_0.rank1.log").exists()  # it may have been ended before it said the same
    assert "training failed" in (tmp_path / "train_0.log").read_text()


def settings(*arguments, script):
    """What a piece of shell code prints that runs after SDXL's launchers have read their arguments."""
    launcher = "source test/pretrain_full_sdxl_settings.sh; takes_machines 1"
    done = bash("-c", f'{launcher}; resolve "$@"; {script}', "launcher", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def words(*arguments):
    """The command line that the launcher makes of its arguments, without interpreter and script."""
    return settings(*arguments, script=r'printf "%s\0" "${train[@]}"').split("\0")[:-1]


def flags(*arguments):
    """What the script reads from that command line."""
    script = sdxl_pretrain.SCRIPT
    return SimpleNamespace(**script.values(words(*arguments)))


def test_what_follows_two_dashes_wins_over_the_launchers_own_flags():
    args = flags(
        "--batch_size=2", "--max_train_epoch=3", "--", "--learning_rate=1e-5", "--lr_scheduler", "constant",
        "--optimizer_type=Lion", "--max_train_steps=7", "--shuffle_caption",
    )  # fmt: skip
    assert (args.train_batch_size, args.learning_rate, args.lr_scheduler) == (2, 1e-5, "constant")
    assert args.optimizer_type == "Lion"
    assert (args.max_train_steps, args.max_train_epochs) == (7, None)  # the script would prefer the epochs
    assert args.shuffle_caption
    assert (args.seed, args.learning_rate_te1) == (1, 1e-7)  # the launcher's


def test_flags_with_several_values_are_replaced_whole():
    assert flags("--demo").optimizer_args == ("betas=0.9,0.99", "weight_decay=0.01")
    assert flags("--demo", "--", "--optimizer_args", "a=b", "c=d e").optimizer_args == ("a=b", "c=d e")
    assert flags("--demo", "--", "--optimizer_args").optimizer_args == ()


def test_what_the_launcher_derives_from_an_argument_follows_the_flag_that_wins():
    args = flags("--batch_size=2", "--", "--train_batch_size", "3", "--max_train_epoch=13")
    assert (args.train_batch_size, args.max_train_epochs, args.case_name) == (3, 13, "SDXL_bs3_1p_perf")
    args = flags("--demo", "--", "--max_train_steps=160", "--mixed_precision=fp16")
    assert (args.lr_warmup_steps, args.sample_every_n_steps, args.mixed_precision) == (10, 160, "fp16")
    assert flags("--max_train_steps=5", "--", "--max_train_epochs=2").max_train_epochs == 2
    assert settings("--", "--resume=auto", script='echo "$resume"') == "auto\n"  # its log is continued


def test_own_flags_of_the_launcher_can_be_left_out():
    args = flags("--demo", "--without=v_parameterization,optimizer_args,learning_rate_te1", "--without=seed")
    assert (args.v_parameterization, args.optimizer_args, args.learning_rate_te1, args.seed) == (False, (), None, None)
    assert args.zero_terminal_snr and args.lr_scheduler == "cosine"
    # A flag that excludes one of the launcher's:
    assert flags("--without=optimizer_type", "--", "--use_8bit_adam").optimizer_type == "AdamW8bit"


AWKWARD = ["", " ", "a b", "a=b=c", "--x=y", "*", "$HOME", "`id`", 'say "it\'s"', "line\nbreak", "\\", "ünï 漢字"]


def test_values_keep_their_spaces_quotes_and_equals_signs():
    args = flags("--", "--optimizer_args", "x=", *AWKWARD[5:])
    assert args.optimizer_args == ("x=", *AWKWARD[5:])
    for text in AWKWARD:
        found = words(f"--model_name={text}", "--", f"--vae={text}")
        assert f"--pretrained_model_name_or_path={text}" in found and found[-1] == f"--vae={text}"


def test_an_empty_value_is_none_where_that_is_the_default_and_elsewhere_the_scripts_to_judge():
    args = flags("--resume=", "--max_train_steps=", "--output_dir=")
    assert (args.resume, args.max_train_epochs) == (None, 120)
    assert args.output_dir == ROOT / "test" / "output" / "0"
    assert flags("--vae=").vae is None  # the model's own
    assert "--mixed_precision=" in words("--mixed_precision=")


def test_the_demo_takes_the_models_that_it_is_given():
    plain, given = flags("--demo"), flags("--demo", "--vae=owner/vae", "--resolution=48,48")
    assert (plain.vae, plain.tokenizer1_path, plain.resolution) == (None, None, (64, 64))
    assert (given.vae, given.resolution) == ("owner/vae", (48, 48))


@pytest.fixture
def stand_in(tmp_path):
    """An interpreter that starts a stand-in for the trainer and for the demo's tools; it prints where and with what."""
    trainer, python = tmp_path / "trainer.py", tmp_path / "python"
    trainer.write_text(
        "import json, os, sys\n"
        "said = {'rank': os.environ.get('RANK'), 'folder': os.getcwd(), 'argv': sys.argv[1:]}\n"
        "print(json.dumps(said), flush=True)\n"
    )
    replaced = "|".join([str(ROOT / "sdxl_pretrain.py"), "tools/demo/*.py"])
    python.write_text(
        "#!/usr/bin/env bash\nwords=()\n"
        f'for word in "$@"; do case $word in {replaced}) word={trainer} ;; esac; words+=("$word"); done\n'
        f'exec {sys.executable} "${{words[@]}}"\n'
    )
    python.chmod(0o755)
    return {**ENVIRONMENT, "PYTHON": str(python)}


PASSED_ON = ["--learning_rate=1e-5", "--optimizer_args", *AWKWARD]


@pytest.mark.parametrize("arguments", [[ONE], [EIGHT, "--nproc_per_node=2"], [ONE, "--demo"]], ids=lambda a: a[-1])
def test_the_script_gets_what_follows_two_dashes_unchanged_where_the_user_stands(arguments, stand_in, tmp_path):
    launcher, *options = arguments
    out = tmp_path / "out put=1"
    done = bash(ROOT / launcher, *options, "--output_dir=out put=1", "--", *PASSED_ON, cwd=tmp_path, env=stand_in)
    assert done.returncode == 0, done.stdout + done.stderr
    logs = sorted(out.rglob("train_0*.log"))
    said = [json.loads(line) for log in logs for line in log.read_text().splitlines() if line.startswith("{")]
    assert len(said) == (2 if "--nproc_per_node=2" in options else 1)
    for one in said:
        assert one["argv"][-len(PASSED_ON) :] == PASSED_ON
        assert one["folder"] == str(tmp_path)
        assert f"--output_dir={logs[0].parent}" in one["argv"]


def test_help_tells_how_to_pass_flags_on():
    for launcher in (ONE, EIGHT, MANY):
        shown = bash(launcher, "--help").stdout
        example = next(line for line in shown.splitlines() if line.startswith("  bash test/"))
        assert example.startswith(f"  bash {launcher} ")
        own, passed_on = example.split(" -- ")
        args = flags(*shlex.split(own)[2:], "--", *shlex.split(passed_on))
        assert (args.learning_rate, args.optimizer_args) == (1e-5, ("weight_decay=0.1",))


def test_a_launcher_for_another_script_is_settings_alone(tmp_path):
    """Without a demo and in a folder of its own."""
    (tmp_path / "train.py").write_text("import sys\nprint(sys.argv[1:])\n")
    (tmp_path / "launcher.sh").write_text(
        f"source {ROOT}/test/launch.sh\n"
        f"script={os.path.relpath(tmp_path / 'train.py', ROOT)}\n"
        "argument rank 4 --network_dim\npath_argument model '' --model\n"
        'settings() { flags=(--half="$((rank / 2))"); }\nlaunch "$@"\n'
    )
    env = {**ENVIRONMENT, "DEVICE_ID": "7"}
    done = bash(tmp_path / "launcher.sh", "--rank=8", "--output_dir=out", "--", "--x", "y z", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = [f"--output_dir={tmp_path}/out", "--network_dim=8", "--half=4", "--x", "y z"]
    assert (tmp_path / "out" / "train_7.log").read_text() == f"{expected}\n"
    refused = bash(tmp_path / "launcher.sh", "--demo")
    assert refused.returncode == 2 and "--demo: there is none for" in refused.stderr


@pytest.mark.parametrize(("processes", "batch"), [(1, 16), (2, 8), (8, 2), (3, 6), (64, 1)])
def test_the_demos_global_batch_does_not_depend_on_the_number_of_processes(processes, batch):
    args = flags("--demo", f"--nproc_per_node={processes}")
    shown = (args.train_batch_size, args.max_train_steps, args.case_name)
    assert shown == (batch, 800, f"SDXL_bs{batch}_{processes}p_acc")


def test_machines_that_share_a_folder_have_logs_of_their_own():
    main, other = (
        settings(
            "--nnodes=2", "--nproc_per_node=4", "--master_ip=10.0.0.1", f"--node_rank={rank}", "--output_dir=/out",
            script='echo "$log_stem ${train[*]}"',
        )
        for rank in (0, 1)
    )  # fmt: skip
    assert main.startswith("/out/train_0 ") and other.startswith("/out/train_0.node1 ")
    assert "--case_name=SDXL_bs4_8p_acc " in main and "--case_name=SDXL_bs4_8p_acc " in other


def test_the_ascend_environment_of_many_machines_leaves_the_address_to_the_launch(tmp_path):
    (tmp_path / "set_env.sh").write_text("")
    script = (
        f"export ASCEND_TOOLKIT_HOME={tmp_path} NNODES=$nnodes; source test/env_npu.sh; "
        'echo "${HCCL_IF_IP:-none} ${HCCL_BUFFSIZE:-unset}"'
    )
    shown = settings("--nnodes=2", "--node_rank=0", "--master_ip=10.0.0.1", script=script)
    assert shown.splitlines()[-1] == "none unset"


def test_machines_that_share_a_folder_build_the_demo_once(tmp_path):
    """Two launchers at once: one part remains, complete; a third finds it and builds nothing."""
    (tmp_path / "make.py").write_text(
        "import pathlib, sys, time\n"
        "out = pathlib.Path(sys.argv[2])\n"
        "(out / 'half').write_text('1')\ntime.sleep(1)\n(out / 'whole').write_text('2')\n"
    )
    script = (
        f"source test/launch.sh; python={sys.executable}; demo_dir={tmp_path}/demo; build_part data {tmp_path}/make.py"
    )
    both = [subprocess.Popen(["bash", "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert any("building the demo's data" in text for text in printed)
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["data"]
    assert sorted(path.name for path in (tmp_path / "demo" / "data").iterdir()) == [".made_by", "half", "whole"]
    assert bash("-c", script).stdout == ""
    (tmp_path / "demo" / "data" / ".made_by").write_text("another version\n")
    (tmp_path / "demo" / "data" / "mine").write_text("mine")
    assert "is kept in" in bash("-c", script).stdout
    (kept,) = (tmp_path / "demo").glob("data.2*")
    assert (kept / "mine").exists() and not (tmp_path / "demo" / "data" / "mine").exists()
    (tmp_path / "demo" / "data" / ".made_by").unlink()
    refused = bash("-c", script)
    assert refused.returncode == 2 and f"{tmp_path}/demo/data is none of the demo's" in refused.stderr
    assert (tmp_path / "demo" / "data" / "whole").exists()


@pytest.mark.parametrize(("number", "send"), [(signal.SIGTERM, os.kill), (signal.SIGINT, os.killpg)])
def test_a_launcher_hands_a_signal_on_once_and_waits_for_what_the_trainer_does_then(tmp_path, number, send):
    """SIGTERM to the launcher alone, and Ctrl-C, which the terminal sends to all of its process group."""
    (tmp_path / "trainer.py").write_text(
        "import signal, sys, time\n"
        "def stop(*_):\n    print('stopping', flush=True)\n    time.sleep(1)\n    print('saved')\n    sys.exit(5)\n"
        f"signal.signal({number.value}, stop)\nprint('training', flush=True)\ntime.sleep(60)\n"
    )
    log = tmp_path / "log"
    script = (
        f"source test/launch.sh; output_dir={tmp_path}; open_log {log}; "
        f"run_logged {log} . {sys.executable} {tmp_path}/trainer.py || exit $?"
    )
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


WRITES = """
import pathlib, sys, time
sys.path.insert(0, "ROOT")
from library.training.state.run_lock import RunLock
with RunLock(pathlib.Path("OUT")):
    print("step 1", flush=True)
    while not pathlib.Path("OUT/end").exists():
        time.sleep(0.05)
    print("step 2", flush=True)
"""


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


@pytest.fixture
def running(tmp_path):
    """A launcher whose stand-in for the trainer has the folder and goes on until there is a file OUT/end."""
    out = tmp_path / "out"
    log = out / "train_0.log"
    (tmp_path / "train.py").write_text(WRITES.replace("ROOT", str(ROOT)).replace("OUT", str(out)))
    (tmp_path / "launcher.sh").write_text(
        f"source {ROOT}/test/launch.sh\nscript={os.path.relpath(tmp_path / 'train.py', ROOT)}\n"
        'settings() { :; }\nlaunch "$@"\n'
    )
    command = ["bash", tmp_path / "launcher.sh", f"--output_dir={out}"]
    first = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    wait_for(lambda: log.is_file() and "step 1" in log.read_text())
    yield first, log, lambda *arguments, **env: bash(*command[1:], *arguments, env=ENVIRONMENT | env)
    (out / "end").touch()
    first.wait(30)


def test_a_second_start_in_the_folder_of_a_running_one_leaves_its_log_alone(running):
    first, log, start = running
    for arguments in ([], ["--resume=auto"]):
        refused = start(*arguments)
        assert refused.returncode == 2
        assert f"--output_dir={log.parent}: another start writes train_0.log. Wait for it" in refused.stderr
        assert log.read_text() == "step 1\n"
    (log.parent / "end").touch()
    assert first.wait(30) == 0
    assert log.read_text() == "step 1\nstep 2\n"


def test_a_start_beside_a_run_with_another_log_leaves_the_log_of_before_alone(running):
    _, log, start = running
    before = log.with_name("train_1.log")
    before.write_text("a run of yesterday\n")
    refused = start(DEVICE_ID="1")
    assert refused.returncode == 2 and "another run writes there (pid: " in refused.stderr
    assert before.read_text() == "a run of yesterday\n"


def test_the_log_stays_its_trainers_when_the_launcher_is_killed(running):
    first, log, start = running
    first.kill()
    first.wait(30)
    assert start().returncode == 2
    (log.parent / "end").touch()
    wait_for(lambda: "step 2" in log.read_text())
    assert log.read_text() == "step 1\nstep 2\n"


def test_a_free_folders_log_is_written_anew_or_gone_on_with_by_a_resumed_run(running):
    first, log, start = running
    (log.parent / "end").touch()
    assert first.wait(30) == 0
    for arguments, steps in (
        ([], "12"),
        (["--resume=auto"], "1212"),
        (["--", "--resume", "auto"], "121212"),
        ([], "12"),
    ):
        assert start(*arguments).returncode == 0
        assert log.read_text() == "".join(f"step {step}\n" for step in steps)
    kept = sorted(log.parent.glob("train_0.until_*.log"))
    assert kept[-1].read_text() == "".join(f"step {step}\n" for step in "121212")


def test_a_log_that_is_a_link_is_refused_and_what_it_leads_to_stays(running, tmp_path):
    _, log, start = running
    (tmp_path / "precious").write_text("mine\n")
    log.with_name("train_1.log").symlink_to(tmp_path / "precious")
    refused = start(DEVICE_ID="1")
    assert refused.returncode == 2 and "train_1.log is a link; remove it" in refused.stderr
    assert (tmp_path / "precious").read_text() == "mine\n"


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
