"""Where --blocks_to_swap has nowhere to swap to, or something needs all weights on the device, the error says so."""

import pytest
import torch

import sdxl_pretrain
from library.errors import InputError
from library.training.rules import check_swapping

REQUIRED = ["--pretrained_model_name_or_path=m", "--output_dir=o", "--train_data_dir=d", "--resolution=64"]
ACCELERATOR = torch.device("cuda", 0)  # none is needed


def options(blocks_to_swap=4, **given):
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    words += [] if blocks_to_swap is None else [f"--blocks_to_swap={blocks_to_swap}"]
    return sdxl_pretrain.SCRIPT.options([*REQUIRED, *words])


@pytest.mark.parametrize(
    ("given", "device", "processes", "said"),
    [
        ({}, torch.device("cpu"), 1, "the CPU is what computes here"),
        ({"sharding": "fsdp"}, ACCELERATOR, 2, "--sharding=fsdp"),
        ({"optimizer_type": "oss", "fused_backward_pass": True}, ACCELERATOR, 8, "--sharding=oss"),
        ({}, ACCELERATOR, 2, "needs --fused_backward_pass"),
    ],
)
def test_what_cannot_go_together_is_refused(given, device, processes, said):
    with pytest.raises(InputError, match=f"--blocks_to_swap=4 .*{said}"):
        check_swapping(options(**given), device, processes)


@pytest.mark.parametrize("flag", ["torch_compile", "full_bf16"])
def test_what_needs_weights_to_stay_together_where_they_are_is_refused(flag):
    with pytest.raises(InputError, match=rf"--blocks_to_swap=4 .*--{flag}"):
        check_swapping(options(**{flag: True}), ACCELERATOR, 1)


def test_the_rest_goes():
    check_swapping(options(blocks_to_swap=None), torch.device("cpu"), 8)
    check_swapping(options(optimizer_type="oss"), ACCELERATOR, 1)  # one process has nothing to share
    check_swapping(options(fused_backward_pass=True), ACCELERATOR, 2)
