"""Where --blocks_to_swap has nowhere to swap to, or something needs all weights on the device, the error says so."""

from types import SimpleNamespace

import pytest
import torch

from library.errors import InputError
from library.training.rules import check_swapping

RUN = SimpleNamespace(torch_compile=False, full_bf16=False)
ACCELERATOR = torch.device("cuda", 0)  # none is needed


def options(**given):
    plain = {"blocks_to_swap": 4, "sharding": None, "optimizer_type": "AdamW", "fused_backward_pass": False}
    return SimpleNamespace(**{**plain, **given})


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
        check_swapping(options(**given), RUN, device, processes)


@pytest.mark.parametrize("flag", ["torch_compile", "full_bf16"])
def test_what_needs_weights_to_stay_together_where_they_are_is_refused(flag):
    with pytest.raises(InputError, match=rf"--blocks_to_swap=4 .*--{flag}"):
        check_swapping(options(), SimpleNamespace(**{**vars(RUN), flag: True}), ACCELERATOR, 1)


def test_the_rest_goes():
    check_swapping(options(blocks_to_swap=None), RUN, torch.device("cpu"), 8)
    check_swapping(options(optimizer_type="oss"), RUN, ACCELERATOR, 1)  # one process has nothing to share
    check_swapping(options(fused_backward_pass=True), RUN, ACCELERATOR, 2)
