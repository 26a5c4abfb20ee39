"""What is secret in an address is in nothing that a run writes or prints, whether it trains, goes on or fails."""

import base64
import shutil

import pytest

from library.training.task import Task
from test.data.shard_server import ShardServer

TOKEN, SIGNATURE, KEY = "hf_tokenOfTheTest", "5eaf00d5eaf00d", "wJalrXUtnFEMI"
PASSWORD = "hun/ter@22"  # given with its slash and sign as they are in one address, escaped in the other
SECRETS = [
    TOKEN, SIGNATURE, KEY, PASSWORD, "hun%2Fter%4022", "ter@22", "hun/ter",
    base64.b64encode(f"me:{PASSWORD}".encode()).decode(),
]  # fmt: skip


@pytest.fixture
def server(small_shard, tmp_path):
    """Serves six shards, of which one is no tar."""
    folder = tmp_path / "served"
    folder.mkdir()
    for number in range(6):
        shutil.copy(small_shard / "00000.tar", folder / f"{number:05d}.tar")
    (folder / "00004.tar").write_text("<html>")
    server = ShardServer(folder)
    yield server
    server.stop()


@pytest.fixture
def run(train, server, tmp_path, monkeypatch, capfd):
    """Runs the script on an address; returns its exit status and what it printed, once nothing secret is anywhere."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "written" / "cache"))
    written = tmp_path / "written"

    def run(*arguments, data=None, status=0):
        data = data or address(server)
        options = ("--max_train_steps=2", "--stream_shuffle_buffer=4", f"--logging_dir={written / 'logs'}")
        try:
            ended = train(written / "out", *options, *arguments, data=data)
        except SystemExit as error:
            ended = error.code
        printed = "".join(capfd.readouterr())
        assert ended == status, printed
        files = [path for path in written.rglob("*") if path.is_file()]
        found = [(secret, "printed") for secret in SECRETS if secret in printed]
        found += [(secret, str(path)) for path in files for secret in SECRETS if secret.encode() in path.read_bytes()]
        found += [(secret, str(path)) for path in written.rglob("*") for secret in SECRETS if secret in str(path)]
        assert not found
        return printed

    return run


def address(server, password="hun%2Fter%4022"):
    host = server.address.partition("//")[2]
    return f"http://me:{password}@{host}/{{00000..00005}}.tar?X-Amz-Signature={SIGNATURE}"


def test_a_run_that_trains_and_goes_on(run, server, tmp_path):
    more = ("--save_state_every_n_steps=1", "--max_bad_samples=1", "--max_data_loader_n_workers=1")
    printed = run(*more)
    assert f"from {server.address}/00000.tar on" in printed
    assert server.authorization == {"Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()}
    assert "2 steps are done" in run(*more, "--resume=auto", "--max_train_steps=3")
    assert (tmp_path / "written" / "out" / "run.config.toml").read_text().count("without its credentials") == 1


def test_a_run_over_a_command(run, server, tmp_path):
    command = f"pipe:KEY={KEY} TOKEN='{TOKEN}' cat {server.folder}/{{00000..00005}}.tar"
    printed = run("--max_bad_samples=1", "--save_state_every_n_steps=1", data=command)
    assert f"from pipe:cat … {server.folder}/00000.tar on" in printed
    failing = f"pipe:KEY={KEY}; echo no $KEY {TOKEN} >&2; cat {server.folder}/absent{{0..9}}.tar"
    assert "No such file" in run(data=failing, status=2)


def test_a_run_that_fails_before_training(run, server):
    server.broken = {"00000.tar": 404}
    assert "the server says 404" in run(status=2)
    assert "is no address" in run(data=address(server, PASSWORD), status=2)  # its slash ends the host


def test_a_run_whose_server_fails_in_training(run, server, monkeypatch):
    real = Task.loss

    def loss(self, module, batch):
        server.broken = {f"{number:05d}.tar": 404 for number in range(6)}
        return real(self, module, batch)

    monkeypatch.setattr(Task, "loss", loss)
    printed = run("--max_train_steps=60", "--max_bad_samples=1", status=2)
    assert "no image to train on" in printed


def test_a_run_with_an_error_that_nobody_expects(run, server, monkeypatch):
    def loss(*_):
        raise RuntimeError(f"{address(server)} and {address(server, PASSWORD)}: {KEY}")

    monkeypatch.setattr(Task, "loss", loss)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)
    assert "RuntimeError: http://" in run(status=1)


@pytest.mark.parametrize("password", ["hun%2Fter%4022", PASSWORD])
def test_flags_and_files_that_are_wrong(run, server, tmp_path, password):
    data = address(server, password)
    for word in (f"--train_data_dri={data}", f"--resolution={data}", f"--max_train_epochs={data}", f"--vae={data}"):
        run(word, status=2)
    run("--cache_latents", data=data, status=2)
    (tmp_path / "data.toml").write_text(f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = ['{data}']\n")
    (tmp_path / "run.toml").write_text(f"vae = ['{data}']\nimage_dri = '{data}'\n")
    run(f"--config_file={tmp_path / 'run.toml'}", status=2)
    run(f"--dataset_config={tmp_path / 'data.toml'}", "--train_data_dir=", status=2)
    run(f"--config_file={tmp_path / 'written' / 'all.toml'}", "--output_config", data=data)
