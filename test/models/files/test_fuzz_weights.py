"""Weight files that were damaged or made to mislead: always a clear error or a model, never a crash or full memory."""

import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from library.errors import InputError
from library.families import FAMILIES
from library.models.files import read as checkpoint_read
from library.models.files.read import load_model
from library.models.files.weight_files import read_weights
from library.models.files.write import save_model
from library.models.model import Model
from library.models.unet import UNet, UNetConfig

MEMORY_BYTES = 1 << 30  # of addresses that reading may take; the model's file has 5 MB
RESIDENT_BYTES = 200 << 20  # of memory
ODD = [-1, 0, 1, 2**31, 2**63, 10**30, 1.5, "x", None, [], {}, True, [[]], float("nan")]


@pytest.fixture(scope="module")
def tiny(sdxl, sd1, tmp_path_factory) -> dict[str, Path]:
    """A model of one level, 5 MB in half precision, in every form whose files are mutated."""
    folder = tmp_path_factory.mktemp("tiny")
    config = UNetConfig(
        model_channels=64, channel_mult=(1,), num_res_blocks=1, transformer_depth=(1,), transformer_depth_middle=1,
        context_dim=sdxl.unet.config.context_dim, adm_in_channels=sdxl.unet.config.adm_in_channels,
    )  # fmt: skip
    model = Model(**{**vars(sdxl), "unet": UNet(config)})
    forms = {form: save_model(model, folder / "tiny", form, torch.float16) for form in ("safetensors", "ckpt")}
    tensors, metadata = read_weights(forms["safetensors"])
    forms["legacy"] = folder / "legacy.ckpt"
    content = {"state_dict": dict(tensors), "metadata": metadata}
    torch.save(content, forms["legacy"], _use_new_zipfile_serialization=False)
    forms["sd1"] = save_model(sd1, folder / "sd1", "safetensors", torch.float16)
    return forms


# Mutations: (content, random) -> content -----------------------------------------------------------------------------


def _flip(content: bytes, choose: random.Random, end: int | None = None) -> bytes:
    changed = bytearray(content)
    for _ in range(choose.choice([1, 1, 3, 20])):
        changed[choose.randrange(min(end or len(content), len(content)))] = choose.randrange(256)
    return bytes(changed)


def _cut(content: bytes, choose: random.Random) -> bytes:
    return content[: choose.randrange(len(content))]


def _splice(content: bytes, choose: random.Random) -> bytes:
    """A piece put in, taken out or doubled, mostly near the beginning, where headers are."""
    at = choose.randrange(len(content)) if choose.random() < 0.5 else choose.randrange(min(2000, len(content)))
    length = choose.choice([1, 8, 100, 5000])
    piece = choose.choice([b"", choose.randbytes(length), content[at : at + length] * 2])
    return content[:at] + piece + content[at + choose.choice([0, length]) :]


def _header(content: bytes, choose: random.Random) -> bytes:
    """The JSON of a safetensors header changed so that it can still be read."""
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    for _ in range(choose.choice([1, 1, 2, 5])):
        _change_entry(header, choose)
    text = json.dumps(header).encode()
    if choose.random() < 0.1:
        text = text[:-1] + b', "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}' * 2 + b"}"
    claimed = len(text) if choose.random() < 0.9 else choose.choice([0, 1, 2**31, 2**63, len(text) - 3, len(content)])
    return claimed.to_bytes(8, "little") + text + body


def _change_entry(header: dict, choose: random.Random) -> None:
    name = choose.choice(list(header))
    if name == "__metadata__":
        key = choose.choice([*header[name], "sd_training.vae_scaling_factor", "sd_training.scheduler"])
        odd = ["nan", "-1", "0", "[]", '{"prediction_type": 5}', "9" * 400, "[" * 5000]
        odd.append(header[name].get(key, "").replace(": ", choose.choice([": -", ": 9", ": [", ": "]), 1))
        header[name][key] = choose.choice(odd)
        return
    entry = header[name]
    kind = choose.randrange(7)
    if kind == 0:
        entry["shape"] = entry["shape"][::-1]
    elif kind == 1 and entry["shape"]:
        entry["shape"][choose.randrange(len(entry["shape"]))] = choose.choice(ODD)
    elif kind == 2:
        entry["data_offsets"][choose.randrange(2)] = choose.choice([*ODD, entry["data_offsets"][0] + 4])
    elif kind == 3:
        entry["dtype"] = choose.choice(["F16", "F64", "I32", "F8_E4M3", "F4", "BOOL", "X", 3, None, "C64", "U64"])
    elif kind == 4:
        del header[name]
    elif kind == 5:
        header[_other_name(name, choose)] = header.pop(name)
    else:
        entry[choose.choice(["shape", "dtype", "data_offsets", "more"])] = choose.choice(ODD)


def _other_name(name: str, choose: random.Random) -> str:
    digits = [place for place, letter in enumerate(name) if letter.isdigit()]
    if digits and choose.random() < 0.7:
        place = choose.choice(digits)
        return name[:place] + choose.choice(["99999999", "7", "-1", "", "3"]) + name[place + 1 :]
    return choose.choice([name + ".x", "x." + name, "", name.replace(".", "/"), name[: len(name) // 2]])


def _pickle_part(content: bytes, choose: random.Random) -> bytes:
    """The pickle in torch's archive changed, and the archive around it right."""
    source, target = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    packed = zipfile.ZIP_DEFLATED if choose.random() < 0.1 else zipfile.ZIP_STORED
    left_out = choose.choice(source.namelist()) if choose.random() < 0.2 else None
    with zipfile.ZipFile(target, "w", packed) as archive:
        for name in source.namelist():
            part = source.read(name)
            if name.endswith("data.pkl"):
                part = _opcodes(part, choose)
            if name != left_out:
                archive.writestr(name, part)
    return target.getvalue()


def _opcodes(part: bytes, choose: random.Random) -> bytes:
    kind = choose.randrange(4)
    if kind == 0:  # sizes that are not true
        places = [place for place in range(len(part) - 5) if part[place : place + 1] in (b"K", b"M", b"J", b"X")]
        at = choose.choice(places)
        return part[: at + 1] + struct.pack("<I", choose.choice([0, 255, 2**31 - 1, 2**32 - 1])) + part[at + 5 :]
    if kind == 1:  # an operation of another kind
        at = choose.randrange(len(part))
        return part[:at] + choose.choice([b"R", b"0", b"2", b".", b"}", b"b", b"\x81", b"\x93", b"B"]) + part[at + 1 :]
    if kind == 2:
        names = [b"collections OrderedDict", b"torch._utils _rebuild_tensor_v2", b"torch FloatStorage"]
        name = choose.choice(names).replace(b" ", b"\n")
        return part.replace(
            name, choose.choice([b"builtins\neval", b"os\nsystem", b"torch\nload", b"torch\nTensor"]), 1
        )
    return choose.choice([_flip, _cut, _splice])(part, choose)


MUTATIONS: dict[str, list[Callable[[bytes, random.Random], bytes]]] = {
    "safetensors": [_header, _header, _header, lambda c, r: _flip(c, r, 4000), _flip, _cut, _splice],
    "sd1": [_header],
    "ckpt": [_pickle_part, _pickle_part, lambda c, r: _flip(c, r, 4000), _flip, _cut, _splice],
    "legacy": [lambda c, r: _flip(c, r, 4000), lambda c, r: _opcodes(c, r), _flip, _cut, _splice],
}


# Reading them --------------------------------------------------------------------------------------------------------


def _read_all(tiny: dict[str, Path], pair: tuple, folder: Path, count: int, seed: int) -> str:
    """Read so many mutated files with bounded memory; '' or what was wrong."""
    contents = {form: path.read_bytes() for form, path in tiny.items()}
    families = tuple(FAMILIES.values())
    # In this child alone; reading them takes longest.
    checkpoint_read._tokenizers = lambda family, *_: pair[: len(family.encoders)]
    load_model(str(tiny["safetensors"]), families)  # all imports are done before memory is counted
    with Path("/proc/self/statm").open() as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, resource.RLIM_INFINITY))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {"refused": 0, "read": 0}
    for number in range(count):
        choose = random.Random(f"{seed} {number}")
        form = choose.choice(list(MUTATIONS))
        path = folder / f"x{tiny[form].suffix}"
        path.write_bytes(choose.choice(MUTATIONS[form])(contents[form], choose))
        signal.alarm(60)  # ends the child: no file may keep a reader busy for long
        try:
            load_model(str(path), families)
            outcomes["read"] += 1
        except InputError as error:
            outcomes["refused"] += 1
            if str(path) not in str(error) or len(str(error)) > 5000:
                return f"{form} {seed} {number}: no clear error: {str(error)[:500]}"
        except BaseException as error:
            shutil.copy(path, folder / f"kept{path.suffix}")
            return (
                f"{form} {seed} {number}: {type(error).__name__}: {str(error)[:300]} ({folder / f'kept{path.suffix}'})"
            )
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident)
    if outcomes["refused"] < count // 3:
        return f"hardly anything was refused: {outcomes}"
    return "" if grown < RESIDENT_BYTES else f"resident memory grew by {grown} bytes"


@pytest.mark.parametrize(
    ("count", "seed"), [(60, 0), *(pytest.param(1000, seed, marks=pytest.mark.all) for seed in range(1, 6))]
)
def test_mutated_files_end_in_a_clear_error_with_bounded_memory(tiny, tokenizers, tmp_path, count, seed):
    read, write = os.pipe()
    child = os.fork()  # for the limit of its memory, and to outlive a crash
    if child == 0:
        os.close(read)
        try:
            os.write(write, _read_all(tiny, tokenizers, tmp_path, count, seed).encode() or b"all right")
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        said = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert (said, status) == ("all right", 0)
