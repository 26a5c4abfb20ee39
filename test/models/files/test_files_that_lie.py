"""Weight files made to mislead, one trick at a time: each is refused with its reason, quickly and without memory."""

import json
import resource
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import InputError
from library.families import SDXL
from library.models.files.identify import describe
from library.models.files.modelspec import read_metadata
from library.models.files.read import load_model
from library.models.files.weight_files import read_component, read_weights
from library.models.files.write import save_model

SPARSE = torch.sparse_coo_tensor(torch.zeros(1, 1).long(), torch.ones(1), (1 << 40,), check_invariants=False)


@pytest.fixture(scope="module")
def single(sdxl, tmp_path_factory) -> Path:
    return save_model(sdxl, tmp_path_factory.mktemp("single") / "tiny", "safetensors")


@pytest.fixture(autouse=True)
def _quick_and_small():
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - began < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB


def _safetensors(path: Path, header: dict | bytes, body: bytes = b"", claimed: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if claimed is None else claimed).to_bytes(8, "little") + text + body)
    return path


def _entry(shape: list[int], start: int, end: int) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "claimed"),
    [
        ({"a": _entry([2], 0, 8), "b": _entry([2], 4, 12)}, None),  # they overlap
        ({"a": _entry([1 << 30], 0, 1 << 32)}, None),  # gigabytes promised
        ({"a": _entry([1 << 62, 4], 0, 12)}, None),  # whose number of bytes runs over
        ({"a": _entry([3], 0, 8)}, None),  # a size that is not the shape's
        ({"a": _entry([2], 4, 12)}, None),  # a gap
        ({"a": _entry([3], 0, 12)}, 1 << 40),  # a header longer than the file
        ({"a": _entry([3], 0, 12)}, (1 << 64) - 1),
        ({"a": {**_entry([3], 0, 12), "dtype": "F128"}}, None),
        (b"[" * 100_000, None),
        (b'{"a": ', None),
    ],
)
def test_headers_that_lie_are_damage(tmp_path, header, claimed):
    path = _safetensors(tmp_path / "lies.safetensors", header, bytes(12), claimed)
    with pytest.raises(InputError, match=r"lies\.safetensors: damaged or cut off"):
        read_weights(path)


def test_a_packed_pickle_is_refused_before_it_fills_the_memory(tmp_path):
    torch.save({"a": torch.zeros(20_000_000)}, tmp_path / "plain.ckpt")
    with zipfile.ZipFile(tmp_path / "plain.ckpt") as plain, zipfile.ZipFile(
        tmp_path / "packed.ckpt", "w", zipfile.ZIP_DEFLATED
    ) as packed:  # fmt: skip
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert (tmp_path / "packed.ckpt").stat().st_size < 1 << 20
    with pytest.raises(InputError, match=r"packed\.ckpt: refused: .* is compressed, which torch never writes"):
        read_weights(tmp_path / "packed.ckpt")


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(1).expand(1 << 32), r"made to fill the memory: its tensors take 17179869184 bytes"),
        (torch.zeros(1).as_strided((1 << 20, 1 << 20), (0, 0)), "made to fill the memory"),
        (SPARSE, "no plain tensor"),
        (torch.empty(1 << 40, device="meta"), "no plain tensor"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_few_bytes_do_not_pass_for_a_large_tensor(tmp_path, tensor, reason, zipped):
    torch.save({"big": tensor}, tmp_path / "big.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=rf"big\.ckpt: .*{reason}"):
        read_weights(tmp_path / "big.ckpt")


def test_tied_weights_are_no_lie(tmp_path):
    shared = torch.ones(1000)
    torch.save({"state_dict": {"a": shared, "b": shared}}, tmp_path / "tied.ckpt")
    assert list(read_weights(tmp_path / "tied.ckpt")[0]) == ["a", "b"]


def test_a_pickle_that_holds_itself_is_no_model(tmp_path):
    itself: dict = {}
    itself["state_dict"] = itself
    torch.save(itself, tmp_path / "round.ckpt")
    with pytest.raises(InputError, match="holds no tensors"):
        read_weights(tmp_path / "round.ckpt")


@pytest.mark.parametrize(
    "name",
    [
        "conditioner.embedders.0.transformer.text_model.encoder.layers.99999999.mlp.fc1.weight",
        "conditioner.embedders.1.model.transformer.resblocks.99999999.mlp.c_fc.weight",
        "model.diffusion_model.input_blocks.99999999.0.in_layers.0.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.99999999.norm1.weight",
        "first_stage_model.decoder.up.99999999.block.0.conv1.weight",
        "first_stage_model.encoder.down.99999999.block.0.conv1.weight",
    ],
)
def test_one_stray_name_makes_no_enormous_network(single, tmp_path, name):
    save_file({**load_file(single), name: torch.zeros(4)}, tmp_path / "stray.safetensors", read_metadata(single))
    with pytest.raises(InputError, match=r"stray\.safetensors: no (complete )?SDXL model"):
        load_model(str(tmp_path / "stray.safetensors"), SDXL)


@pytest.mark.parametrize("value", ["many", "nan", "-1", "0", "1e999"])
def test_a_scaling_factor_that_is_none_is_named(single, tmp_path, value):
    metadata = {**read_metadata(single), "sd_training.vae_scaling_factor": value}
    save_file(load_file(single), tmp_path / "m.safetensors", metadata)
    with pytest.raises(InputError, match=rf"m\.safetensors: .*vae_scaling_factor in its metadata is '{value}'"):
        load_model(str(tmp_path / "m.safetensors"), SDXL)


def test_of_many_wrong_names_ten_are_listed(single, tmp_path):
    tensors = {name: tensor for name, tensor in load_file(single).items() if "attn2" not in name or "to_k" in name}
    save_file(tensors, tmp_path / "holes.safetensors", read_metadata(single))
    with pytest.raises(InputError, match=r"tensors are missing \(([\w.]+, ){9}[\w.]+ and \d+ more\)"):
        load_model(str(tmp_path / "holes.safetensors"), SDXL)


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"lora_unet_x_attn2_to_k.lora_down.weight": (4, 2048)}, "a LoRA (or another network module), for SDXL"),
        (
            {"lora_unet_x_attn2_to_k.lora_down.weight": (4, 768)},
            "a LoRA (or another network module), for Stable Diffusion 1",
        ),
        ({"lora_te_text_model.alpha": ()}, "a LoRA (or another network module)"),
        (
            {"input_blocks.0.0.weight": (4, 4), "x.attn2.to_k.weight": (320, 1024)},
            "a U-Net alone, for Stable Diffusion 2",
        ),
        (
            {"down_blocks.0.attentions.0.attn2.to_k.weight": (320, 1280)},
            "a U-Net alone, for the SDXL refiner",
        ),
        ({"decoder.conv_in.weight": (4, 4, 3, 3)}, "a VAE alone"),
        ({"emb_params": (3, 768)}, "a textual inversion"),
    ],
)
def test_what_a_file_seems_to_be_is_told_by_names_and_widths(tensors, kind):
    assert describe({name: torch.zeros(shape) for name, shape in tensors.items()}) == kind


@pytest.mark.parametrize("listed", [["x"], {}, {"a": 5}, {"a": "../../outside.safetensors"}, {"a": ["b"]}, None])
def test_a_shard_index_that_leads_astray_is_refused(tmp_path, listed):
    name = "model.safetensors.index.json"
    (tmp_path / name).write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(InputError, match=r"index\.json: its weight_map is no list of files beside it"):
        read_component(tmp_path)


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("unet", "block_out_channels", 5),
        ("unet", "block_out_channels", [0, 0, 0]),
        ("unet", "attention_head_dim", "many"),
        ("unet", "cross_attention_dim", "wide"),
        ("unet", "in_channels", None),
        ("vae", "block_out_channels", "wide"),
        ("vae", "latent_channels", -4),
        ("text_encoder", "hidden_size", "wide"),
        ("text_encoder_2", "num_attention_heads", 0),
    ],
)
def test_configurations_of_wrong_types_are_named(sdxl, tiny_sdxl_folder, tmp_path, file, field, value):
    shutil.copytree(tiny_sdxl_folder, tmp_path / "model")
    config = tmp_path / "model" / file / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), field: value}))
    with pytest.raises(InputError, match=rf"model/{file}"):
        load_model(str(tmp_path / "model"), SDXL)
