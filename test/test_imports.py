"""What loading a model leaves out at the start, and that it is all there once it is asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

LOAD = """
import gc, importlib.metadata, json, sys
import torch
from library.families import SDXL
from library.models.files.read import load_model

model = load_model(sys.argv[1], SDXL)
with torch.no_grad():
    model.vae.encode(torch.zeros(1, 3, 16, 16))
loaded = [name for name, module in sys.modules.items() if "Deferred" not in type(module).__name__]
marked = torch.compiler.disable(lambda value: value + 1)

from diffusers import AutoencoderKL, EulerDiscreteScheduler, FluxTransformer2DModel, UNet2DConditionModel
from transformers import BertConfig, CLIPTextModel, models
import scipy.stats
import torchvision
from transformers.loss.loss_for_object_detection import dice_loss
later = {
    "same classes": AutoencoderKL is type(model.vae) and CLIPTextModel is type(model.text_encoders[0]),
    "others": [FluxTransformer2DModel.__name__, UNet2DConditionModel.__name__, BertConfig().model_type],
    "package": models.bert.__name__,
    "median": float(scipy.stats.norm.cdf(0.0)),
    "dice": float(dice_loss(torch.full((1, 4), 50.0), torch.ones(1, 4), 1)),
    "marked": float(marked(torch.zeros(()))),
    "compiled": float(torch.compile(lambda value: torch.sin(value) + marked(value), backend="eager")(torch.zeros(()))),
    "compiler": torch._dynamo.__name__ in sys.modules and "torch._dynamo.eval_frame" in sys.modules,
    "pillow": importlib.metadata.packages_distributions()["PIL"],
    "vision": [torchvision.models.resnet18.__name__, torchvision.ops.nms.__name__],
    "collector": gc.isenabled() and gc.get_freeze_count() > 100_000,
}
print(json.dumps([loaded, later]))
"""


def run_python(*arguments):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_a_model_loads_without_what_it_does_not_use_and_leaves_all_of_it_in_reach(tiny_sdxl_folder):
    loaded, later = json.loads(run_python("-c", LOAD, tiny_sdxl_folder).stdout.splitlines()[-1])
    not_needed = {
        "diffusers.models.transformers.transformer_flux", "diffusers.models.unets.unet_2d_condition",
        "diffusers.models.autoencoders.autoencoder_tiny", "diffusers.pipelines.pipeline_utils", "scipy.optimize",
        "scipy.stats._stats_py", "transformers.models.bert.configuration_bert", "tensorboard", "pyarrow", "webdataset",
        "torch._dynamo", "torch._dynamo.eval_frame", "torch._inductor", "torchvision.models", "torchvision.ops",
        "triton",
    }  # fmt: skip
    assert "transformers.models.clip.modeling_clip" in loaded
    assert not not_needed & set(loaded)
    assert later == {
        "same classes": True,
        "others": ["FluxTransformer2DModel", "UNet2DConditionModel", "bert"],
        "package": "transformers.models.bert",
        "median": 0.5,
        "dice": 0.0,
        "marked": 1.0,
        "compiled": 1.0,
        "compiler": True,
        "pillow": ["pillow"],
        "vision": ["resnet18", "nms"],
        "collector": True,
    }


def test_help_needs_neither_torch_nor_numpy():
    """Its modules are listed on stderr by the interpreter itself."""
    done = run_python("-X", "importtime", "sdxl_pretrain.py", "--help")
    assert "--train_data_dir" in done.stdout
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in modules
    assert not {"torch", "numpy", "accelerate", "diffusers", "transformers"} & modules


def test_headers_of_pictures_are_read_without_torchvision():
    """The index is made in processes of its own, which need not wait for it."""
    run_python(
        "-c",
        "import sys, library.data.index.table, library.data.sample.decode\nassert 'torchvision' not in sys.modules",
    )
