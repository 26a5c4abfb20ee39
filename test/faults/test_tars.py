"""Tars of all kinds in a run: what is found at the start, and a shard that turns into one after it was indexed."""

import tarfile

import pytest

from library.data.index.sources import Subset
from library.data.index.table import build_index
from library.data.indexed_batches import make_loader
from library.data.micro_batch import Share
from library.data.order.bucket_rows import bucket_rows
from library.data.order.buckets import BucketOptions
from library.data.order.plan import Plan, repeated
from library.data.sample.prepare import Treatment
from test.data.conftest import write_tar
from test.data.test_tar_kinds import KINDS, of_index, of_stream, sample
from test.faults.figures import write_section

SAMPLES = 8  # of each of two shards


def replaced(folder, content):
    """How many samples of an epoch are replaced when a shard has turned into a file of that content since the index."""
    for shard in range(2):
        members = [member for number in range(SAMPLES) for member in sample(f"{shard}{number}")]
        write_tar(folder / f"{shard}.tar", members, tarfile.PAX_FORMAT)
    index = build_index([Subset(folder, ".txt")], use_cache=False)
    options = BucketOptions((32, 32), True, 16, 64, 8)
    buckets = bucket_rows(index, [options])
    plan = Plan(buckets, repeated(buckets.images_SK, index.repeats_S), 1, 2)
    (folder / "1.tar").write_bytes(content)
    batches = list(make_loader(index, buckets, plan, Share(2), [Treatment()], end_step=SAMPLES))
    assert all(len(batch) == 2 for batch in batches)
    assert all(name.startswith(f"{folder}/1.tar:") for batch in batches for name, _ in batch.quarantined)
    return sum(batch.replaced for batch in batches)


def figures(tmp_path):
    """Of each kind: how many samples are used and images are not, by the index and by the stream, and `replaced`."""
    found = {}
    for kind, (content, *_) in KINDS.items():
        path = tmp_path / "0.tar"
        path.write_bytes(content)
        (used, bad), (streamed, streamed_bad) = of_index(path), of_stream(path)
        assert (streamed, len(streamed_bad)) == (used, len(bad)), kind
        (tmp_path / "run").mkdir(exist_ok=True)
        found[kind] = len(used), len(bad), replaced(tmp_path / "run", content)
    return found


def test_a_shard_that_turns_into_another_file_costs_its_own_samples_alone(tmp_path):
    counts = figures(tmp_path)
    assert {kind: count for kind, (*_, count) in counts.items() if count != SAMPLES} == {}  # no other sample's picture


@pytest.mark.all
def test_what_becomes_of_each_kind_is_written_down(tmp_path):
    counts = figures(tmp_path)
    assert {count for *_, count in counts.values()} == {SAMPLES}
    write_section(
        "Tars of all kinds",
        [
            f"{len(counts)} small tars (`test/data/test_tar_kinds.py`), each read by the index and as a stream: both "
            "used the same samples and counted the same number of images that they did not use. Then each took the "
            f"place of one of two shards of {SAMPLES} samples after they had been indexed: the run went on, with all "
            "samples of that shard replaced by the other's, and none by whatever stood at their places now.",
            "",
            "| Kind | Samples used | Images not used |",
            "|---|---|---|",
            *(f"| {kind} | {used} | {lost} |" for kind, (used, lost, _) in counts.items()),
        ],
    )
