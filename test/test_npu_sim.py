"""The simulated NPU does what the trainer relies on: tensors, modules, random numbers, memory figures, fused operators,
accelerate, two processes over hccl. The checks are in npu_sim/inside/; child processes run them, once for each file.
"""

import ast
import importlib.util
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent
INSIDE = HERE / "npu_sim" / "inside"
sys.path.insert(0, str(HERE))

from npu_sim.environment import environment, reason_to_skip  # noqa: E402

needs_compiler = pytest.mark.skipif(reason_to_skip() is not None, reason=str(reason_to_skip()))


def functions(path: Path, prefix: str) -> list[str]:
    """The file's functions of that prefix; the file itself can be imported in a child only."""
    return [
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith(prefix)
    ]


FILES = ("tensors", "operators", "libraries", "generations", "estimates", "swapping")
SINGLE = [(file, name) for file in FILES for name in functions(INSIDE / f"{file}.py", "test_")]
DOUBLE = functions(INSIDE / "two_processes.py", "check_")


@pytest.fixture(scope="module")
def single_results(tmp_path_factory):
    """(file, function) -> messages of its failed cases, [] if all passed."""
    report = tmp_path_factory.mktemp("single") / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *(str(INSIDE / f"{f}.py") for f in FILES)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert report.exists(), done.stdout[-4000:] + done.stderr[-4000:]
    results: dict[tuple[str, str], list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        key = (case.get("classname").split(".")[-1], case.get("name").split("[")[0])
        bad = [part.text or part.get("message") for part in case if part.tag in ("failure", "error", "skipped")]
        results.setdefault(key, []).extend(bad)
    return results


@needs_compiler
@pytest.mark.parametrize(("file", "name"), SINGLE)
def test_in_one_process(single_results, file, name):
    assert (file, name) in single_results, "the child ended before it"
    assert not single_results[file, name], "\n\n".join(single_results[file, name])


@pytest.fixture(scope="module")
def double_results(tmp_path_factory):
    """What each of the two processes wrote."""
    folder = tmp_path_factory.mktemp("double")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(INSIDE / "two_processes.py"), str(folder)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@needs_compiler
@pytest.mark.parametrize("name", DOUBLE)
def test_in_two_processes(double_results, name):
    for rank, failures in enumerate(double_results):
        assert failures[name] is None, f"rank {rank}: {failures[name]}"


@needs_compiler
@pytest.mark.parametrize(("profile", "name"), [("910B", "Ascend910B3"), ("910A", "Ascend910A")])
def test_an_overflow_on_one_rank_repeats_the_step_on_all(tmp_path, profile, name):
    """By every way of sharding, with torch's scaler and with torch_npu's, which decides by a flag of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(INSIDE / "overflow.py"), str(tmp_path)],
        cwd=ROOT,
        env=environment(profile=profile),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"overflow{rank}.json").read_text())
        assert found == {"device": name, "world": 2}


@needs_compiler
def test_the_checks_of_a_new_machine_hold():
    command = [sys.executable, str(ROOT / "tools" / "npu_checks.py")]
    for part, shown in (
        ("versions", "loss scaler: torch.amp.grad_scaler.GradScaler"),
        ("numbers", "right: geglu against"),
    ):
        done = subprocess.run([*command, part], cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0 and shown in done.stdout and "WRONG" not in done.stdout, done.stdout + done.stderr


@needs_compiler
@pytest.mark.all
def test_the_first_run_on_a_machine_ends_with_a_report(tmp_path):
    command = ["bash", str(ROOT / "tools" / "npu_first_run.sh"), str(tmp_path)]
    variables = {**environment(2), "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    report = (tmp_path / "report.txt").read_text()
    assert done.returncode == 0 and "== 0 checks failed" in report, report + done.stderr
    assert "ok      overflow" in report and "attention: npu, float16 on npu" in report


@needs_compiler
def test_only_children_see_it():
    assert "torch_npu" not in sys.modules
    spec = importlib.util.find_spec("torch_npu")
    assert spec is None or "npu_sim" not in str(spec.origin)
    # torch imports it by its entry point, as the real one.
    looks = "import sys, torch; print(sys.modules['torch_npu'].__file__, torch.npu.device_count())"
    printed = subprocess.run(
        [sys.executable, "-c", looks], env=environment(devices=3), capture_output=True, text=True, check=True
    ).stdout.split()
    assert Path(printed[0]).is_relative_to(HERE / "npu_sim") and printed[1] == "3"


@needs_compiler
@pytest.mark.parametrize(("visible", "count"), [("2,3", 2), ("0,99,1", 1), ("99", 0)])
def test_visible_devices_are_those_that_the_variable_names(visible, count):
    looks = "import torch, torch_npu; print(torch.npu.device_count(), torch.npu.is_available())"
    variables = {**environment(), "ASCEND_RT_VISIBLE_DEVICES": visible}
    done = subprocess.run([sys.executable, "-c", looks], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(count), str(count > 0)]


# ---- building ------------------------------------------------------------------------------------------------------

COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo pretended 1.0; exit; fi
echo compiled >> "{log}"
sleep 1
while [ "$1" != -o ]; do shift; done
{action}
"""


def start_builder(folder, action):
    compiler = folder / "cxx"
    compiler.write_text(COMPILER.format(log=folder / "log", action=action))
    compiler.chmod(0o755)
    command = "from npu_sim import build; print(build.library())"
    variables = {"PYTHONPATH": str(HERE), "CXX": str(compiler), "NPU_SIM_CACHE": str(folder / "cache")}
    return subprocess.Popen(
        [sys.executable, "-c", command],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_processes_that_want_it_at_once_build_it_once(tmp_path):
    builders = [start_builder(tmp_path, 'echo library > "$2"') for _ in range(2)]
    outputs = [builder.communicate(timeout=120) for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0], outputs
    built = {Path(printed.strip()) for printed, _ in outputs}
    assert len(built) == 1 and built.pop().read_text() == "library\n"
    assert (tmp_path / "log").read_text() == "compiled\n"


def test_a_build_that_fails_says_why_and_leaves_nothing(tmp_path):
    _, errors = (builder := start_builder(tmp_path, "echo no room left >&2; exit 1")).communicate(timeout=120)
    assert builder.returncode != 0
    assert "RuntimeError: the simulated NPU does not build" in errors and "no room left" in errors
    assert not list((tmp_path / "cache").glob("*.so"))


# ---- names: what is pretended here, and what the project uses, is in the real torch_npu -----------------------------

REAL = {
    module: set(names)
    for module, names in json.loads((HERE / "npu_sim" / "torch_npu_names.json").read_text())["names"].items()
}


LIST_NAMES = """
import importlib, json, sys, torch_npu
modules = {name: importlib.import_module(name) for name in sys.argv[1:]}
own = lambda value: getattr(value, "__module__", "").startswith("torch_npu")
print(json.dumps({name: [k for k, v in vars(m).items() if k[0] != "_" and own(v)] for name, m in modules.items()}))
"""


@needs_compiler
def test_nothing_is_pretended_that_the_real_one_lacks():
    command = [sys.executable, "-c", LIST_NAMES, *REAL]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    pretended = {module: set(names) for module, names in json.loads(done.stdout).items()}
    assert {"npu_fusion_attention"} <= pretended["torch_npu"] and {"GradScaler"} <= pretended["torch_npu.npu.amp"]
    assert {f"{module}.{name}" for module, names in pretended.items() for name in names - REAL[module]} == set()


def dotted(node: ast.AST) -> str:
    """a.b.c as written; "" if it is anything else."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) and dotted(node.value) else ""


def used_names(path: Path) -> set[tuple[str, str]]:
    """(module, name) of every torch_npu.NAME, torch.npu.NAME and imported name.

    In the device module also of module.NAME and profiler.NAME.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in REAL:
            found.update((node.module, alias.name) for alias in node.names)
        if not isinstance(node, ast.Attribute):
            continue
        owner = dotted(node.value).replace("torch.npu", "torch_npu.npu")
        if path.name == "device.py":
            owner = {"module": "torch_npu.npu", "profiler": "torch_npu.profiler"}.get(owner, owner)
        if owner in REAL:
            found.add((owner, node.attr))
    return found


def test_every_name_that_the_project_uses_is_in_the_real_one():
    sources = [
        *ROOT.glob("*.py"),
        *(p for part in ("library", "third_patch", "bench", "tools") for p in (ROOT / part).rglob("*.py")),
    ]
    used = set().union(*map(used_names, sources))
    assert {("torch_npu", "npu_fusion_attention"), ("torch_npu.npu", "max_memory_allocated")} <= used
    assert {f"{module}.{name}" for module, name in used if name not in REAL[module]} == set()
