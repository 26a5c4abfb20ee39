"""A tiny SDXL with random weights, made of what diffusers and transformers build, for all tests of models."""

import io
import logging
import os
import tarfile

import pytest
import torch
from PIL import Image

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other, above all beside loader workers


AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"  # library.exit_status sets it, so that torch does not import torch_npu


_AUTOLOAD_AT_START = os.environ.get(AUTOLOAD)


def _restore_autoload() -> None:
    if _AUTOLOAD_AT_START is None:
        os.environ.pop(AUTOLOAD, None)
    else:
        os.environ[AUTOLOAD] = _AUTOLOAD_AT_START


@pytest.fixture(autouse=True)
def nothing_left_by_a_script():
    """A script that runs within a test sets up logging and a variable; the next test is to know nothing of it.

    Nor of a script that a fixture of a whole module has run, before this one began.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    _restore_autoload()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    _restore_autoload()


WORDS = ["cat", "dog", "red", "blue", "photo", "of", "a"]


def _byte_letters() -> list[str]:
    """The printable stand-ins of the 256 bytes in byte-level BPE (Radford et al. 2019), "!" first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]


def _tokenizer(pad_token: str):
    from transformers import CLIPTokenizer

    vocabulary = [letter + end for end in ("", "</w>") for letter in _byte_letters()]
    merges = []
    for word in WORDS:
        left = word[0]
        for place, letter in enumerate(word[1:], start=1):
            right = letter + ("</w>" if place == len(word) - 1 else "")
            if (left, right) not in merges:
                merges.append((left, right))
                vocabulary.append(left + right)
            left += right
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=merges,
        pad_token=pad_token,
        model_max_length=77,
    )


@pytest.fixture(scope="session")
def tokenizers():
    """As SDXL's: the first pads with EOS, the second with "!", whose id is 0."""
    return _tokenizer("<|endoftext|>"), _tokenizer("!")


@pytest.fixture(scope="session")
def text_encoders(tokenizers):
    """CLIP-L of width 64 with 3 layers and bigG of width 128 with 2, configured as SDXL's are."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    common = {
        "vocab_size": len(tokenizers[0]),
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "initializer_factor": 4.0,  # far enough from zero that a wrong layer or place is seen
    }
    torch.manual_seed(1)
    first = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=1, projection_dim=64,
            hidden_act="quick_gelu", **common,
        )
    )  # fmt: skip
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=128, intermediate_size=160, num_hidden_layers=2, num_attention_heads=2, projection_dim=128,
            hidden_act="gelu", **common,
        )
    )  # fmt: skip
    for encoder in (first, second):
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return first.eval(), second.eval()


@pytest.fixture(scope="session")
def vae():
    """An AutoencoderKL of two levels, 32 and 64 channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
        scaling_factor=0.13025,
    ).eval()


@pytest.fixture(scope="session")
def sdxl(tokenizers, text_encoders, vae):
    """All of a tiny SDXL: three levels with none, one and two transformer layers."""
    from library.families import SDXL
    from library.models.model import Model
    from library.models.unet import UNet, UNetConfig

    torch.manual_seed(3)
    unet = UNet(
        UNetConfig(
            model_channels=64,
            channel_mult=(1, 2, 2),
            num_res_blocks=1,
            transformer_depth=(0, 1, 2),
            transformer_depth_middle=2,
            context_dim=64 + 128,
            adm_in_channels=128 + 6 * 256,
        )
    )
    for parameter in unet.parameters():  # the zero-initialised ones, too
        torch.nn.init.normal_(parameter, std=0.05)
    return Model(SDXL, unet.eval(), vae, text_encoders, tokenizers, dict(SDXL.scheduler))


def _clip(width: int, layers: int, hidden_act: str, vocabulary: int, heads: int = 1):
    """A CLIPTextModel configured as the published ones are, far from its initial values."""
    from transformers import CLIPTextConfig, CLIPTextModel

    encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=heads,
            hidden_act=hidden_act, vocab_size=vocabulary, bos_token_id=0, eos_token_id=2, pad_token_id=1,
        )
    )  # fmt: skip
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return encoder.eval()


def _four_levels(family, vae, encoder, tokenizer, **unet_fields):
    """A model of the topology of SD 1.x and 2.x: four levels, attention at the first three and in the middle."""
    import copy

    from library.models.model import Model
    from library.models.unet import UNet, UNetConfig

    unet = UNet(
        UNetConfig(
            channel_mult=(1, 2, 4, 4), transformer_depth=(1, 1, 1, 0), transformer_depth_middle=1, adm_in_channels=None,
            context_dim=encoder.config.hidden_size, **unet_fields,
        )
    )  # fmt: skip
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    vae = copy.deepcopy(vae)
    vae.register_to_config(scaling_factor=family.vae_scaling_factor)
    return Model(family, unet.eval(), vae, (encoder,), (tokenizer,), dict(family.scheduler))


@pytest.fixture(scope="session")
def sd1(tokenizers, vae):
    """All of a tiny SD 1.x: 4 heads at every width, convolutions as projections; the text encoder has 3 layers."""
    from library.families import SD1

    torch.manual_seed(4)
    encoder = _clip(48, 3, "quick_gelu", len(tokenizers[0]), heads=3)
    return _four_levels(
        SD1, vae, encoder, tokenizers[0], model_channels=32, num_heads=4, use_linear_in_transformer=False
    )


@pytest.fixture(scope="session")
def sd2_v(tokenizers, vae):
    """All of a tiny SD 2.x 768-v: heads of 16, linear projections; the text encoder has 23 layers."""
    from library.families import SD2

    torch.manual_seed(5)
    encoder = _clip(32, 23, "gelu", len(tokenizers[1]), heads=2)
    model = _four_levels(
        SD2, vae, encoder, tokenizers[1], model_channels=32, num_head_channels=16, upcast_attention=True
    )
    model.scheduler_config["prediction_type"] = "v_prediction"
    return model


@pytest.fixture(scope="session")
def tiny_sdxl_folder(sdxl, tmp_path_factory):
    """The tiny model as a diffusers folder, what a run starts from."""
    from library.models.files.modelspec import modelspec
    from library.models.files.write import save_model

    metadata = modelspec(title="tiny", resolution_wh_px=(64, 64), prediction_type="epsilon")
    return save_model(sdxl, tmp_path_factory.mktemp("tiny") / "sdxl", "diffusers_safetensors", None, metadata)


@pytest.fixture(scope="session")
def small_shard(tmp_path_factory):
    """A folder with one shard of 16 pictures of two aspect ratios; captions of tags."""
    folder = tmp_path_factory.mktemp("shards")
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number in range(16):
            colour = ("red", "green", "blue")[number % 3]
            picture = io.BytesIO()
            Image.new("RGB", ((64, 64), (96, 48))[number % 2], colour).save(picture, "JPEG")
            caption = f"a {colour} photo, of a cat, number {number}".encode()
            for extension, content in (("jpg", picture.getvalue()), ("txt", caption)):
                member = tarfile.TarInfo(f"{number:08d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


STEPS = 6


@pytest.fixture(scope="session")
def train(tiny_sdxl_folder, small_shard):
    """Runs sdxl_pretrain.py in this process; returns its exit status."""
    from accelerate.state import AcceleratorState

    import sdxl_pretrain

    def run(out, *arguments, data=small_shard):
        AcceleratorState._reset_state(reset_partial_state=True)
        return sdxl_pretrain.main(
            [
                f"--pretrained_model_name_or_path={tiny_sdxl_folder}", f"--train_data_dir={data}", "--resolution=64",
                "--enable_bucket", "--min_bucket_reso=32", "--max_bucket_reso=128", "--bucket_reso_steps=16",
                "--caption_extension=.txt", f"--output_dir={out}", "--max_data_loader_n_workers=0", "--seed=1",
                "--learning_rate=1e-3", "--train_text_encoder", "--train_batch_size=2", "--shuffle_caption",
                "--gradient_accumulation_steps=2", "--caption_dropout_rate=0.2", "--lr_scheduler=cosine_with_restarts",
                "--lr_warmup_steps=2", f"--max_train_steps={STEPS}", "--save_model_as=safetensors", "--use_ema",
                "--ema_decay=0.5", *arguments,
            ]
        )  # fmt: skip

    return run
