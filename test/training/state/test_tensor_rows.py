"""Parts of parameters: rows written by any number of processes fill what any other number holds."""

import pytest
import torch
from torch import nn

from library.errors import InputError
from library.training.state.files import StateInfo
from library.training.state.files import read_state as read_state_folder
from library.training.state.lineage import new_lineage
from library.training.state.states import TRAINING, parts_in
from library.training.state.tensor_rows import (
    check_names,
    make_part,
    read_average,
    read_state,
    read_weight,
    rows_of,
    saved_parts,
)
from library.training.state.writer import StateWriter

INFO = StateInfo(1, 7, "", {}, {}, {}, new_lineage(None, 0, []))


def trained(seed=0, shape=(10, 3)):
    """A weight and its optimizer after two steps."""
    random = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(shape, generator=random))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for _ in range(2):
        weight.grad = torch.randn(shape, generator=random)
        optimizer.step()
    return weight, optimizer


def split(part, pieces):
    """A whole part as that many processes would write it with FSDP2, some with no rows at all."""
    size = -(-len(part["weight"]) // pieces)
    starts = [min(number * size, len(part["weight"])) for number in range(pieces)]

    def rows(tensor, start):
        return tensor[start : start + size] if tensor.dim() else tensor

    return [
        {"w": {
            "start": start,
            "weight": rows(part["weight"], start),
            "state": {key: rows(value, start) for key, value in part["state"].items()},
        }}
        for start in starts
    ]  # fmt: skip


@pytest.mark.parametrize("written_by", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("read_by", [1, 2, 4, 8])
def test_rows_of_any_number_of_processes_fill_those_of_any_other(written_by, read_by):
    weight, optimizer = trained()
    saved = saved_parts(split(make_part(weight, optimizer), written_by))
    size = -(-len(weight) // read_by)
    for reader in range(read_by):
        start = min(reader * size, len(weight))
        mine = nn.Parameter(torch.zeros_like(weight[start : start + size]))
        own = torch.optim.AdamW([mine], lr=0.1, fused=True)
        parts = saved.covering("w", start, len(mine))
        read_weight("w", mine, parts, start)
        read_state("w", mine, own, parts, start)
        assert torch.equal(mine, weight[start : start + size])
        for key, value in optimizer.state[weight].items():
            expected = value[start : start + size] if value.dim() else value
            assert torch.equal(own.state[mine][key], expected), key


def test_what_is_read_is_a_copy_that_steps_as_the_original():
    weight, optimizer = trained()
    part = make_part(weight, optimizer)
    mine = nn.Parameter(torch.zeros_like(weight))
    own = torch.optim.AdamW([mine], lr=0.1, fused=True)
    read_weight("w", mine, [part])
    read_state("w", mine, own, [part])
    weight.grad = torch.ones_like(weight)
    mine.grad = torch.ones_like(weight)
    optimizer.step()
    own.step()
    assert torch.equal(mine, weight)
    assert own.state[mine]["step"].item() == optimizer.state[weight]["step"].item() == 3


def test_a_parameter_without_state_gets_none():
    weight = nn.Parameter(torch.ones(3))
    part = make_part(weight, torch.optim.AdamW([weight]))
    mine = nn.Parameter(torch.zeros(3))
    own = torch.optim.AdamW([mine])
    read_state("w", mine, own, [part])
    assert mine not in own.state


def test_another_shape_and_missing_rows_are_named():
    weight, optimizer = trained()
    part = make_part(weight, optimizer)
    with pytest.raises(InputError, match=r"--resume: w's weight has rows of \(3,\), not \(4,\)"):
        read_weight("w", torch.zeros(10, 4), [part])
    with pytest.raises(InputError, match="w's weight has 10 of the 12 rows"):
        read_weight("w", torch.zeros(12, 3), [part])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_and_averages_that_are_no_numbers_are_named(value):
    weight, optimizer = trained()
    broken = weight.detach().clone()
    broken[4, 1] = value
    part = {**make_part(weight, optimizer), "weight": broken, "average": broken}
    for read in (read_weight, read_average):
        with pytest.raises(InputError, match=r"--resume: w's (weight|average) has numbers that are NaN or infinite"):
            read("w", torch.zeros(10, 3), [part])
    read_weight("w", torch.zeros(2, 3), [part])  # a process that holds other rows of it


def test_other_parameters_are_named():
    check_names({"a": 1}, {"a": 2})
    with pytest.raises(
        InputError, match=r"1 are not in it, such as b; 1 do not train now, such as c.*--train_text_enc"
    ):
        check_names({"a": 1, "c": 1}, {"a": 1, "b": 1})


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_rank_opens_the_files_of_those_alone_whose_rows_it_needs(tmp_path, ranks):
    """As many processes as wrote: each opens its own file; half as many: two each."""
    weight, optimizer = trained(shape=(8, 3))
    writers = [StateWriter(tmp_path, rank=rank, ranks=ranks) for rank in range(ranks)]
    for writer, parts in zip(writers, split(make_part(weight, optimizer), ranks), strict=True):
        writer.snapshot("last", INFO, {TRAINING: parts}, rows=rows_of(parts))
    for writer in writers:
        writer.finish()
    for read_by in (ranks, max(ranks // 2, 1)):
        size = 8 // read_by
        for reader in range(read_by):
            state = read_state_folder(tmp_path / "last-state")
            found = parts_in(state).covering("w", reader * size, size)
            assert torch.equal(torch.cat([part["weight"] for part in found]), weight[reader * size :][:size])
            opened = [rank for rank, objects in enumerate(state.own) if objects._read]
            assert opened == [reader * ranks // read_by + place for place in range(ranks // read_by)]
