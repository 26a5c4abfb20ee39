"""Variables of other launchers: none acts unseen."""

import importlib.util
import socket
import threading

import pytest

from library.errors import InputError
from library.processes import gathering
from library.processes.environment import Place, place_of_process, take_environment
from library.processes.gathering import wait_for_all
from library.signals import Signals


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_what_accelerate_would_follow_is_said_and_taken_away():
    environ = {
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_MODE": "default", "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "HOME": "/root",
        "ACCELERATE_LOG_LEVEL": "info",
    }  # fmt: skip
    lines = take_environment(environ, "bf16")
    assert environ == {"HOME": "/root", "ACCELERATE_LOG_LEVEL": "info"}
    assert len(lines) == 4
    assert lines[0] == (
        "ACCELERATE_DYNAMO_BACKEND=INDUCTOR is not followed: --torch_compile and --dynamo_backend say what is compiled"
    )
    assert "ACCELERATE_MIXED_PRECISION=no is not followed: --mixed_precision=bf16 counts" in lines


def test_what_accelerate_launch_sets_of_itself_is_not_worth_a_line():
    environ = {
        "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_CPU_AFFINITY": "False",
        "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_USE_DEEPSPEED": "false",
    }  # fmt: skip
    assert take_environment(environ, "fp16") == []
    assert environ == {}


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER"])
def test_another_way_of_training_is_refused(name):
    with pytest.raises(InputError, match=rf"ACCELERATE_USE_{name}=true: .*Unset it"):
        take_environment({f"ACCELERATE_USE_{name}": "true"}, "no")


def test_tpus_are_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(InputError, match="torch_xla is installed"):
        take_environment({}, "no")


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_processes_of_mpi_that_would_each_train_alone_are_refused(name):
    with pytest.raises(InputError, match=f"{name}=4: another launcher"):
        place_of_process({name: "4"})
    assert place_of_process({name: "1"}) == (None, [])
    environ = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1", name: "2"}
    assert place_of_process(environ) == (Place(1, 2, "a", 1, False, "/"), [])


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: must be a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=2 is not below WORLD_SIZE=2"),
    ],
)
def test_half_a_description_of_several_processes_is_refused(environ, message):
    with pytest.raises(InputError, match=message):
        place_of_process(environ)


def test_processes_wait_for_each_other_and_say_for_whom(monkeypatch, caplog):
    monkeypatch.setattr(gathering, "_SAY_AFTER_S", 0.1)
    caplog.set_level("INFO")
    port = free_port()
    places = [Place(rank, 3, "127.0.0.1", port, False, "") for rank in range(3)]
    stores = {}
    threads = [
        threading.Thread(target=lambda place=place: stores.update({place.rank: wait_for_all(place, Signals(), 60)}))
        for place in places
    ]
    threads[1].start()
    threads[1].join(0.5)
    threads[0].start()
    threads[1].join(1.5)
    assert threads[1].is_alive()
    threads[2].start()
    for thread in threads:
        thread.join(30)
    assert sorted(stores) == [0, 1, 2]
    assert f"waiting for rank 0 at 127.0.0.1:{port}" in caplog.text
    assert f"waiting for rank 2 of 3 processes at 127.0.0.1:{port}" in caplog.text


def test_the_store_is_asked_for_all_at_once(monkeypatch):
    """All processes ask the one store many times a second."""
    asked = []

    class Counted(gathering.PrefixStore):
        def check(self, keys):
            asked.append(keys)
            return super().check(keys)

    monkeypatch.setattr(gathering, "PrefixStore", Counted)
    with pytest.raises(InputError, match="ranks 1, 2, "):
        wait_for_all(Place(0, 200, "127.0.0.1", free_port(), False, ""), Signals(), 0.4)
    assert len(asked) < 200 + 100  # once each, to name those that are missing


def test_who_does_not_come_is_named(monkeypatch):
    with pytest.raises(InputError, match=r"ranks 1, 2 of WORLD_SIZE=3 have not come to 127.0.0.1:\d+ within"):
        wait_for_all(Place(0, 3, "127.0.0.1", free_port(), False, ""), Signals(), 0.3)
    with pytest.raises(InputError, match="rank 0 cannot be reached there"):
        wait_for_all(Place(1, 2, "127.0.0.1", free_port(), False, ""), Signals(), 0.3)
