"""Writes the names that a real torch_npu wheel offers, for the tests to compare with: it unpacks anywhere, imports only
where CANN is.

    pip download --no-deps torch_npu==2.14.0 && python test/npu_sim/read_wheel.py torch_npu-2.14.0-*.whl
"""

import ast
import json
import re
import sys
import zipfile
from pathlib import Path

NAMES = Path(__file__).with_name("torch_npu_names.json")
MODULES = {
    "torch_npu": "torch_npu/__init__.py",
    "torch_npu.npu": "torch_npu/npu/__init__.py",
    "torch_npu.npu.amp": "torch_npu/npu/amp/__init__.py",
    "torch_npu.npu.random": "torch_npu/npu/random.py",
}
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


def main(wheel: str) -> None:
    """Read a wheel and write the list."""
    with zipfile.ZipFile(wheel) as archive:
        names = {module: names_in(archive.read(path).decode()) for module, path in MODULES.items()}
        names["torch_npu.npu"].update(name for name in ("amp", "random"))
        documented = archive.read(OPERATORS).decode()
        names["torch_npu"].update(re.findall(r'^\s+"(npu_\w+)",$', documented, re.MULTILINE))
        for member in archive.namelist():
            if re.fullmatch(r"torch_npu/lib/\S+\.so", member):
                schemas = re.findall(rb"\b(npu_\w+)\((?:Tensor|Scalar)", archive.read(member))
                names["torch_npu"].update(name.decode() for name in schemas)
    lists = {module: sorted(found) for module, found in names.items()}
    NAMES.write_text(json.dumps({"wheel": Path(wheel).name, "names": lists}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
