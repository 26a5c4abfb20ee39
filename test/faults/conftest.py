"""A tiny training run to disturb, its undisturbed twin, and the report of what the long tests measured."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from test.faults.runs import Run, Server
from test.models.small_sdxl import save_with_small_unet

STEPS = 6
ONE_MICRO_BATCH = ("--gradient_accumulation_steps=1",)  # a step of two processes


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """For all runs of these tests."""
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def smallest_sdxl_folder(sdxl, tmp_path_factory) -> Path:
    """The tiny model with a U-Net of two levels, so that a training state is written in a moment."""
    folder = tmp_path_factory.mktemp("smallest") / "sdxl"
    return save_with_small_unet(sdxl, folder, side_px=32, model_channels=32, channel_mult=(1, 2))


@pytest.fixture(scope="session")
def arguments(smallest_sdxl_folder, small_shard) -> Callable[..., list[str]]:
    """The command line of a run into `out`; what follows overrides what is said here."""

    def make(out: Path, *more: str) -> list[str]:
        return [
            f"--pretrained_model_name_or_path={smallest_sdxl_folder}", f"--train_data_dir={small_shard}",
            "--resolution=32", "--enable_bucket", "--min_bucket_reso=16", "--max_bucket_reso=64",
            "--bucket_reso_steps=8",
            "--caption_extension=.txt", "--max_data_loader_n_workers=1", "--seed=1", f"--max_train_steps={STEPS}",
            "--learning_rate=1e-3", "--train_text_encoder", "--learning_rate_te1=1e-3", "--learning_rate_te2=0",
            "--shuffle_caption", "--caption_dropout_rate=0.3", "--train_batch_size=1",
            "--gradient_accumulation_steps=2", "--save_model_as=safetensors", "--resume=auto",
            f"--output_dir={out}", *more,
        ]  # fmt: skip

    return make


@pytest.fixture
def start(server, arguments) -> Iterator[Callable[..., Run]]:
    """Starts a run into a folder; what it prints goes to a file beside it. Whatever still runs at the end is killed."""
    runs = []

    def begin(out: Path, *more: str, env: dict[str, str] | None = None, faults=(), log: str = "log") -> Run:
        run = Run(server, arguments(out, *more), out.with_name(f"{out.name}.{log}"), env or {}, faults)
        runs.append(run)
        return run

    yield begin
    for run in runs:
        run.end()


@pytest.fixture
def start_two(start) -> Callable[..., list[Run]]:
    """Starts a run of two processes, as torchrun does, but without its looking after them."""

    def begin(out: Path, *more: str, faults_of: tuple = ((), ())) -> list[Run]:
        return [
            start(out, *ONE_MICRO_BATCH, *more, env=env, faults=faults, log=f"rank{rank}")
            for rank, (env, faults) in enumerate(zip(_places_of_two(), faults_of, strict=True))
        ]

    return begin


@pytest.fixture(scope="session")
def undisturbed(server, arguments, tmp_path_factory) -> Path:
    """The output folder of a run that nothing disturbs."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run = Run(server, arguments(out), out.with_name("log"), {}, ())
    assert run.wait() == 0, run.text
    return out


@pytest.fixture(scope="session")
def undisturbed_two(server, arguments, tmp_path_factory) -> Path:
    """The same by two processes."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    ranks = [
        Run(server, arguments(out, *ONE_MICRO_BATCH), out.with_name(f"rank{rank}"), env, ())
        for rank, env in enumerate(_places_of_two())
    ]
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text
    return out


def _places_of_two() -> list[dict[str, str]]:
    """The environment by which each of two processes finds the other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
