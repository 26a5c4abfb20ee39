"""Caches that are filled by two processes, and whose filling is stopped."""

import io
import shutil
import signal
import tarfile

import numpy as np
import pytest
from PIL import Image

from test.faults.runs import assert_undisturbed


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory):
    """A folder of two shards with 8 images each."""
    folder = tmp_path_factory.mktemp("two")
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(8):
                pixels = np.random.default_rng(8 * shard + number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
                picture = io.BytesIO()
                Image.fromarray(pixels).save(picture, "PNG")
                for name, content in ((f"{number}.png", picture.getvalue()), (f"{number}.txt", b"a red cat")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def test_two_processes_share_the_work_and_train_as_without_a_cache(start_two, two_shards, tmp_path):
    plain = tmp_path / "plain"
    ranks = start_two(plain, f"--train_data_dir={two_shards}")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text
    for name, flag in (("memory", "--cache_latents"), ("disk", "--cache_latents_to_disk")):
        out = tmp_path / name
        ranks = start_two(out, f"--train_data_dir={two_shards}", flag)
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text
        assert "cache latents: 0 entries kept, 16 computed" in ranks[0].text  # one shard each, not all by both
        assert_undisturbed(out, plain)
    assert len(list((two_shards / ".encoding_cache").rglob("*.safetensors"))) == 2


def test_a_process_that_is_stopped_while_it_fills_the_cache_stops_both_and_the_work_goes_on(
    start_two, two_shards, tmp_path
):
    """The other one is done with its own part by then, and waits."""
    data = tmp_path / "data"
    shutil.copytree(two_shards, data, ignore=shutil.ignore_patterns(".encoding_cache"))
    arguments = (f"--train_data_dir={data}", "--cache_latents_to_disk", "--max_train_steps=1")
    faults = ((), [("signal_while_caching", int(signal.SIGTERM), 5)])
    ranks = start_two(tmp_path / "out", *arguments, faults_of=faults)
    assert [rank.wait() for rank in ranks] == [143, 143], ranks[0].text + ranks[1].text
    ranks = start_two(tmp_path / "out", *arguments)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text
    kept = int(ranks[0].text.split("cache latents: ")[-1].split(" entries kept")[0])
    assert 8 + 4 <= kept <= 8 + 5


@pytest.mark.all
def test_a_run_that_is_stopped_while_it_fills_the_cache_goes_on_with_it(start, undisturbed, small_shard, tmp_path):
    data = tmp_path / small_shard.name
    shutil.copytree(small_shard, data)
    arguments = (f"--train_data_dir={data}", "--cache_latents_to_disk")
    stopped = start(tmp_path / "out", *arguments, faults=[("signal_while_caching", int(signal.SIGINT), 6)])
    assert stopped.wait() == 130, stopped.text
    again = start(tmp_path / "out", *arguments)
    assert again.wait() == 0, again.text
    assert "cache latents: 6 entries kept, 10 computed" in again.text
    assert_undisturbed(tmp_path / "out", undisturbed)
