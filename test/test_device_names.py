"""Only the device module names devices: no other code says cuda, npu or torch.cuda, or asks for a kind of device."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEVICE_MODULE = ROOT / "library" / "device.py"
KINDS = ("cuda", "npu", "mps", "xpu", "hpu", "mlu")
NAME = re.compile(rf"({'|'.join(KINDS)})(:\d*)?")  # "npu", "cuda:1", and the "cuda:" of f"cuda:{rank}"
ASKED_OF_TENSORS = {f"is_{kind}" for kind in KINDS}

# (file, what stands there): why it may. What is not found any more must go from this list.
ALLOWED = {
    ("library/models/attention.py", "'npu'"): "the attention backend's name in the registry",
    ("library/training/engine/placement.py", "'npu'"): "asks for the backend of that name; the flag is an NPU's",
}


def sources():
    parts = (path for part in ("library", "third_patch") for path in (ROOT / part).rglob("*.py"))
    return sorted({*ROOT.glob("*.py"), *parts} - {DEVICE_MODULE})


def named_devices(code):
    """(line, what stands there) of everything by which code says or asks which kind of device it is on."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value):
            found.append((node, repr(node.value)))
        elif isinstance(node, ast.Attribute):
            of_the_device_module = isinstance(node.value, ast.Name) and node.value.id in ("device", "devices")
            if node.attr in KINDS or (node.attr in ASKED_OF_TENSORS and not of_the_device_module):
                found.append((node, f".{node.attr}"))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            for name in (f"{module}.{alias.name}" if module else alias.name for alias in node.names):
                parts = name.split(".")
                if "torch_npu" in parts or (parts[0] == "torch" and set(KINDS) & set(parts)):
                    found.append((node, name))
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            kinds = [side for side in sides if isinstance(side, ast.Constant) and side.value == "cpu"]
            if kinds and any(isinstance(side, ast.Attribute) and side.attr == "type" for side in sides):
                found.append((node, ".type against 'cpu'"))
    return [(node.lineno, what) for node, what in found]


def test_only_the_device_module_names_devices():
    found = {}
    for path in sources():
        for line, what in named_devices(path.read_text(encoding="utf-8")):
            found.setdefault((path.relative_to(ROOT).as_posix(), what), []).append(line)
    refused = [f"{file}:{lines}: {what}" for (file, what), lines in found.items() if (file, what) not in ALLOWED]
    assert not refused, "what depends on the kind of device belongs in library/device.py"
    assert set(ALLOWED) == set(found), "what is allowed but not there must go from the list"


@pytest.mark.parametrize(
    "code",
    [
        "torch.device('cuda')",
        "x.to('npu:0')",
        "x.to(f'cuda:{rank}')",
        "torch.cuda.synchronize()",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "x.cuda()",
        "x.npu(non_blocking=True)",
        "import torch_npu",
        "import torch.cuda.amp",
        "from torch import cuda",
        "from torch.npu import amp",
        "getattr(torch, 'npu')",
        "x.is_cuda",
        "if x.device.type == 'cuda': pass",
        "if 'cpu' != x.device.type: pass",
    ],
)
def test_a_named_device_is_found(code):
    assert named_devices(code)


@pytest.mark.parametrize(
    "code",
    [
        "device.is_npu(x.device)",
        "devices.synchronize(device)",
        "torch.load(file, map_location='cpu')",
        "'the CUDA context and cuda libraries'",
        "autocast(x.device.type)",
    ],
)
def test_what_names_none_is_left_alone(code):
    assert not named_devices(code)
