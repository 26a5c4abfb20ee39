"""The real SDXL, 2,567,463,684 parameters in the U-Net, takes training steps on a machine with 24 GB.

    bash bench/full_size.sh

The trainer itself runs (sdxl_pretrain.py: data, VAE, text encoders, loop, checkpoint), with one thing exchanged: the
model is not read, but made with random weights, in place, so that nothing is in memory twice. fp32 weights, batch 1,
gradient checkpointing, AdaFactor in backward. Reported: seconds and peak resident memory after each step, the same for
the final checkpoint, which is then compared with the weights in memory. The last line printed is one JSON object.
"""

import argparse
import contextlib
import io
import json
import platform
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sdxl_pretrain
from library import device as devices
from library.families import SDXL
from library.models.files.diffusers_config import unet_config_to_diffusers
from library.models.model import Model
from library.models.unet import UNet, UNetConfig
from tools.demo.make_tokenizer import write_tokenizer

UNET_PARAMETERS = 2_567_463_684
TINY = UNetConfig(
    model_channels=64,
    num_res_blocks=1,
    transformer_depth=(0, 1, 1),
    transformer_depth_middle=1,
    context_dim=64 + 128,
    adm_in_channels=128 + 6 * 256,
)
# Width, layers, heads and feed-forward of both text encoders, and the VAE's channels.
SIZES: dict[str, dict[str, Any]] = {
    "unet": {
        "unet": UNetConfig(), "encoders": ((768, 1, 12, 64), (1280, 1, 20, 64)), "vae": (32, 32, 32, 32),
    },
    "full": {
        "unet": UNetConfig(), "encoders": ((768, 12, 12, 3072), (1280, 32, 20, 5120)), "vae": (128, 256, 512, 512),
    },
    "tiny": {"unet": TINY, "encoders": ((64, 2, 1, 128), (128, 2, 2, 256)), "vae": (32, 32, 32, 32)},
}  # fmt: skip
OPTIMIZER = ["--optimizer_type=AdaFactor", "--optimizer_args", "relative_step=False", "scale_parameter=False"]


def materialised(make: Any) -> Any:
    """A network that is made without memory, allocated once, and filled in place by each layer's initialisation."""
    with torch.device("meta"):
        network: nn.Module = make()
    network.to_empty(device="cpu")
    for name, module in network.named_modules():
        for parameter in module.parameters(recurse=False):
            if not hasattr(module, "reset_parameters"):
                nn.init.normal_(parameter, std=0.02)
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        for buffer_name, buffer in module.named_buffers(recurse=False):
            assert buffer_name == "position_ids", f"{name}.{buffer_name}"
            buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return network.eval()


def random_model(size: str, folder: Path) -> Model:
    """All parts of SDXL with random weights, and small tokenizers whose ids are among CLIP's."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    shape = SIZES[size]
    tokenizers, encoders = [], []
    for number, (width, layers, heads, inner) in enumerate(shape["encoders"]):
        write_tokenizer(folder / f"tokenizer{number}", ["a", "picture", "of"], "!" if number else "<|endoftext|>")
        tokenizers.append(CLIPTokenizer.from_pretrained(folder / f"tokenizer{number}", local_files_only=True))
        config = CLIPTextConfig(
            vocab_size=49408, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=inner, projection_dim=width, hidden_act="gelu" if number else "quick_gelu",
            bos_token_id=0, eos_token_id=2, pad_token_id=1,
        )  # fmt: skip
        network = CLIPTextModelWithProjection if number else CLIPTextModel
        encoders.append(materialised(lambda network=network, config=config: network(config)))
    levels = len(shape["vae"])
    vae = materialised(
        lambda: AutoencoderKL(
            block_out_channels=shape["vae"], down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels, layers_per_block=2, latent_channels=4,
            scaling_factor=0.13025,
        )
    )  # fmt: skip
    unet = materialised(lambda: UNet(shape["unet"]))
    return Model(SDXL, unet, vae.requires_grad_(False), tuple(encoders), tuple(tokenizers), dict(SDXL.scheduler))


def write_pictures(folder: Path, side_px: int, count: int) -> None:
    """A shard of so many pictures, as the trainer reads them."""
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number in range(count):
            picture = io.BytesIO()
            noise = torch.randint(0, 256, (side_px, side_px, 3), dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(picture, "JPEG")
            for extension, content in (("jpg", picture.getvalue()), ("txt", b"a picture")):
                member = tarfile.TarInfo(f"{number:08d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def differing_tensors(path: Path, model: Model) -> list[str]:
    """Names of the U-Net's tensors that are not in the checkpoint as they are in memory; read one at a time."""
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        return [
            name
            for name, parameter in model.unet.named_parameters()
            if not torch.equal(file.get_tensor(f"model.diffusion_model.{name}"), parameter.detach())
        ]


def measure(size: str, side_px: int, steps: int, more: list[str], folder: Path) -> dict[str, Any]:
    """Train for so many steps and save; everything is written into `folder`."""
    from library.training import build
    from library.training.task import Task

    began = time.perf_counter()
    model = random_model(size, folder)
    made_seconds, made_peak = time.perf_counter() - began, _peak()
    write_pictures(folder / "pictures", side_px, count=8)
    configs = {"unet": unet_config_to_diffusers(model.unet.config), "text_encoder": {}, "text_encoder_2": {}}
    for part, config in configs.items():
        (folder / "model" / part).mkdir(parents=True)  # what is looked at before anything loads
        (folder / "model" / part / "config.json").write_text(json.dumps(config))
    before = {name: parameter.detach().flatten()[:4].clone() for name, parameter in model.unet.named_parameters()}
    saving = {}
    load, save = build.load_model, Task.save
    build.load_model = lambda *_, **__: model  # type: ignore[assignment]

    def timed_save(task: Any, stem: str, module: nn.Module) -> Path:
        started = time.perf_counter()
        saving["path"] = save(task, stem, module)
        saving["seconds"] = time.perf_counter() - started
        return saving["path"]

    Task.save = timed_save  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            status = sdxl_pretrain.main(
                [
                    f"--pretrained_model_name_or_path={folder / 'model'}", f"--train_data_dir={folder / 'pictures'}",
                    f"--resolution={side_px}", "--caption_extension=.txt", f"--output_dir={folder / 'out'}",
                    f"--max_train_steps={steps}", "--gradient_checkpointing", "--save_model_as=safetensors",
                    "--max_data_loader_n_workers=0", "--seed=0", "--learning_rate=1e-5", "--fused_backward_pass",
                    *OPTIMIZER, *more,
                ]
            )  # fmt: skip
    finally:
        build.load_model, Task.save = load, save  # type: ignore[method-assign]
    if status:
        raise SystemExit(status)
    saved_peak = _peak()
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    still = [name for name, old in before.items() if torch.equal(old, model.unet.get_parameter(name).flatten()[:4])]
    return {
        "unet_parameters": sum(parameter.numel() for parameter in model.unet.parameters()),
        "all_parameters": sum(
            parameter.numel()
            for part in (model.unet, model.vae, *model.text_encoders)
            for parameter in part.parameters()
        ),
        "making_seconds": made_seconds,
        "peak_gb": {
            "weights made": made_peak / 1e9,
            **{f"step {line['step']}": line["memory_bytes"] / 1e9 for line in lines},
            "checkpoint": saved_peak / 1e9,
        },
        "step_seconds": [1 / line["images_per_second"] for line in lines],
        "losses": [line["loss"] for line in lines],
        "grad_norms": [line["grad_norm"] for line in lines],
        "checkpoint_seconds": saving["seconds"],
        "checkpoint_gb": saving["path"].stat().st_size / 1e9,
        "parameters_that_did_not_move": still,
        "parameters_saved_otherwise": differing_tensors(saving["path"], model),
    }


def _peak() -> int:
    return devices.peak_memory_bytes(torch.device("cpu"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="full",
        help="unet: text encoders of one layer and a small VAE beside the U-Net",
    )
    parser.add_argument("--resolution", type=int, default=256, help="pixels a side (256)")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, help="folder on a disk with 15 GB free, removed afterwards (a temporary one)"
    )
    parser.add_argument("more", nargs="*", help="more flags for sdxl_pretrain.py, after --")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        result = measure(options.size, options.resolution, options.steps, options.more, Path(folder))
    for name, peak in result["peak_gb"].items():
        print(f"peak resident memory, {name:14}{peak:8.2f} GB")
    for number, seconds in enumerate(result["step_seconds"], start=1):
        print(f"step {number}: {seconds:.1f} s, loss {result['losses'][number - 1]:.4f}")
    print(f"checkpoint of {result['checkpoint_gb']:.2f} GB: {result['checkpoint_seconds']:.1f} s")
    wrong = result["parameters_that_did_not_move"] + result["parameters_saved_otherwise"]
    if wrong or (options.size != "tiny" and result["unet_parameters"] != UNET_PARAMETERS):
        raise SystemExit(f"not trained, or not saved, as it should be: {wrong or result['unet_parameters']}")
    print(
        json.dumps(
            {
                "bench": "full_size",
                "size": options.size,
                "resolution_px": options.resolution,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "threads": torch.get_num_threads(),
                **result,
            }
        )
    )


if __name__ == "__main__":
    main()
