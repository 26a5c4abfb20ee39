"""Writes what a real torch_npu wheel offers, for tests to compare with: it unpacks anywhere, imports with CANN only.
Names go to torch_npu_names.json, the operators of torch that have a kernel to registered_operators.txt.

    pip download --no-deps torch_npu==2.14.0 && python test/npu_sim/read_wheel.py torch_npu-2.14.0-*.whl

What autocast casts is compiled in; autocast_lists.txt is written from the source, Ascend's repository `pytorch`:

    python test/npu_sim/read_wheel.py --autocast torch_npu/csrc/aten/AutoCastOps.cpp COMMIT
"""

import ast
import json
import re
import sys
import zipfile
from pathlib import Path

NAMES = Path(__file__).with_name("torch_npu_names.json")
REGISTERED = NAMES.with_name("registered_operators.txt")
AUTOCAST = NAMES.with_name("autocast_lists.txt")
MODULES = {
    "torch_npu": "torch_npu/__init__.py",
    "torch_npu.npu": "torch_npu/npu/__init__.py",
    "torch_npu.npu.amp": "torch_npu/npu/amp/__init__.py",
    "torch_npu.npu.random": "torch_npu/npu/random.py",
    "torch_npu.npu.utils": "torch_npu/npu/utils.py",
    "torch_npu.profiler": "torch_npu/profiler/__init__.py",
}
REGISTRATIONS = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
# The library's own words where a registered operator computes on the CPU after all.
FALLS_BACK = re.compile(rb"The operator '?aten::(\w+)(?:' is| and aten::\w+\.?\w* is| is) (?:not )?currently")
OPERATORS = "torch_npu/_op_plugin_docs.py"


def names_in(source: str) -> set[str]:
    """What a module's top level defines, imports or lists in __all__."""
    found: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update(target.id for target in targets if isinstance(target, ast.Name))
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                found.update(part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant))
    return {name for name in found if name.isidentifier() and not name.startswith("__")}


def registered(yaml: str) -> set[str]:
    """The operators of torch under `supported:`, as `name` or `name.overload`."""
    supported = re.split(r"^(?=\w+:$)", yaml.partition("\nsupported:\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    return set(re.findall(r"^(?:- |- func: |  func: )([\w.]+)(?=\(|$)", supported, re.MULTILINE))


def read_names(wheel: str) -> None:
    """Read a wheel and write both lists."""
    falls_back: set[str] = set()
    with zipfile.ZipFile(wheel) as archive:
        names = {module: names_in(archive.read(path).decode()) for module, path in MODULES.items()}
        names["torch_npu.npu"].update(name for name in ("amp", "random", "utils"))
        names["torch_npu"].add("profiler")
        documented = archive.read(OPERATORS).decode()
        names["torch_npu"].update(re.findall(r'^\s+"(npu_\w+)",$', documented, re.MULTILINE))
        operators = registered(archive.read(REGISTRATIONS).decode())
        for member in archive.namelist():
            if re.fullmatch(r"torch_npu/lib/\S+\.so", member):
                library = archive.read(member)
                schemas = re.findall(rb"\b(npu_\w+)\((?:Tensor|Scalar)", library)
                names["torch_npu"].update(name.decode() for name in schemas)
                falls_back.update(name.decode() for name in FALLS_BACK.findall(library))
    lists = {module: sorted(found) for module, found in names.items()}
    NAMES.write_text(json.dumps({"wheel": Path(wheel).name, "names": lists}, indent=1) + "\n", encoding="utf-8")
    kept = sorted(name for name in operators if name.partition(".")[0] not in falls_back)
    head = (
        f"# Operators of torch that have a kernel in {Path(wheel).name}, written by read_wheel.py from its\n"
        f"# {REGISTRATIONS}. Left out, as its library says that they compute on the CPU:\n"
        f"# {' '.join(sorted(falls_back))}\n"
    )
    REGISTERED.write_text(head + "".join(f"{name}\n" for name in kept), encoding="utf-8")


def read_autocast(source: str, commit: str) -> None:
    """Write what is cast to low precision, to fp32, to an fp32 result, and to the widest of the arguments."""
    found = re.findall(r"KERNEL_PRIVATEUSEONE\((\w+)(?:, (\w+))?, (\w+)\)", Path(source).read_text(encoding="utf-8"))
    origin = f"{Path(source).name} at {commit}"
    head = f"# What torch_npu's autocast casts, by policy; written by read_wheel.py from {origin}.\n"
    lines = sorted(f"{policy} {name}{'.' if overload else ''}{overload}\n" for name, overload, policy in found)
    AUTOCAST.write_text(head + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    read_autocast(*sys.argv[2:]) if sys.argv[1] == "--autocast" else read_names(*sys.argv[1:])
