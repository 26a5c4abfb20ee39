"""Shards as a stream: from a web server that also fails, out of commands, and on from where a run stopped."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from library.address import Address
from library.data.dataset import prepare_data
from library.data.stream import probe as stream_probe
from library.data.stream import sample_counts as stream_counts
from library.data.stream import streamed_set as streams
from library.data.stream.reader import Layout, Position, Shard, StreamReader
from library.data.stream.shard_bytes import Patience
from library.data.stream.shard_samples import StreamSubset, shard_samples
from library.errors import InputError
from library.models.text import Tokens
from library.training.rules import check_without_epochs
from library.training.state.tree import pack, unpack
from test.data.shard_server import ShardServer

SHAPES = [(40, 30), (30, 40), (32, 32), (64, 24), (50, 50), (31, 42)]
SHARDS = 9
QUICK = Patience(timeout_s=0.3, tries=3, wait_s=0.01, longest_wait_s=0.02)


@pytest.fixture
def server(tmp_path, make_shard, monkeypatch):
    """Serves nine shards of twelve pictures."""
    monkeypatch.setattr(stream_probe, "_PATIENCE", QUICK)
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(SHARDS):
        make_shard(folder, number, SHAPES * 2, parquet=False)
    server = ShardServer(folder)
    yield server
    server.stop()


@pytest.fixture
def prepare(make_options, monkeypatch):
    """What a run of some processes, each of them, has as its data."""
    for module in (stream_probe, stream_counts):
        monkeypatch.setattr(module.probe if module is stream_probe else module.sample_counts, "__defaults__", (QUICK,))

    def prepare(address, *more, ranks=1, accumulation=1, batch=2, seed=3):
        options = make_options(address, f"--train_batch_size={batch}", "--stream_shuffle_buffer=24", *more)
        found = [
            prepare_data(options, seed, rank=rank, world_size=ranks, accumulation=accumulation) for rank in range(ranks)
        ]
        for data in found:
            data.layout = replace(data.layout, patience=QUICK)
        return found

    return prepare


def every(server, pattern="{00000..00008}.tar"):
    return f"{server.address}/{pattern}"


def taken(data, end, start=0):
    """The micro-batches of a process as values that can be compared, with the positions after each step."""
    batches, positions = [], {}
    for batch in data.loader(lambda captions: Tokens((torch.tensor([len(text) for text in captions]),)), end, start):
        assert len(batch) == data.layout.batch_size
        ids = [tensor.tolist() for tensor in batch.tokens.ids]
        facts = (batch.step, batch.micro, batch.names, batch.captions, batch.places_B.tolist(), ids)
        batches.append((facts, batch.images_BHWC.numpy().tobytes(), batch.size_ids_B6.tolist()))
        positions[batch.step + 1] = data.position()
    return batches, positions


def kept(position):
    """As it comes out of a training state."""
    tensors, plain = pack(position)
    return unpack(tensors, json.loads(json.dumps(plain)))


class TestEverySample:
    @pytest.mark.parametrize(("slots", "shards"), [(1, 9), (2, 9), (4, 3), (2, 1)])
    def test_a_pass_reads_each_sample_once_over_all_readers(self, server, slots, shards):
        addresses = [f"{server.address}/{number:05d}.tar" for number in range(shards)]
        options = prepare_layout(addresses, slots=slots, batch_size=1, pool=8)
        seen = Counter()
        for number in range(options.readers):
            reader = StreamReader(options, number)
            while options.part(number, reader.position.part).epoch == 0:
                reader.next_batch(lambda sample, bucket, subset, epoch, place: seen.update([(epoch, sample.name)]))
            for part, sample in reader.position.pool:
                at = options.part(number, part)
                seen.update([(at.epoch, name_of(at.shard.address, sample))])
        first = {name: count for (epoch, name), count in seen.items() if epoch == 0}
        assert len(first) == shards * 12 and set(first.values()) == {1}

    def test_another_pass_and_another_seed_come_in_another_order(self, server):
        addresses = [f"{server.address}/{number:05d}.tar" for number in range(SHARDS)]

        def order(seed, epoch):
            layout = prepare_layout(addresses, seed=seed)
            parts = [layout.part(reader, turn) for turn in range(20) for reader in range(layout.readers)]
            return [part.shard.address for part in parts if part.epoch == epoch]

        assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
        assert sorted(order(1, 1)) == addresses

    def test_each_batch_is_of_one_bucket_and_an_image_meets_its_own(self, server, prepare):
        (data,) = prepare(every(server), batch=3)
        for batch in data.loader(lambda captions: (), 20):
            height, width = batch.images_BHWC.shape[1:3]
            for original_h, original_w, *_, target_h, target_w in batch.size_ids_B6.tolist():
                assert (target_h, target_w) == (height, width)
                assert abs(original_w / original_h - width / height) < 0.4
            assert all(caption.startswith("picture ") for caption in batch.captions)

    def test_captions_are_read_as_of_an_index(self, server, prepare, make_tar, make_picture, caplog):
        """JSON as JSON, blank ones passed over, lines counted."""
        image = make_picture(32, 32)
        members = [("a.jpg", image), ("a.json", b'{"caption": "of JSON"}'), ("a.txt", b"\xef\xbb\xbf \n")]
        members += [("b.jpg", image), ("b.json", b'{"caption": "first\\nsecond"}')]
        make_tar(server.folder / "captions.tar", members)
        for more in ("--caption_extension=.json", "--caption_extension=.txt"):
            caplog.clear()
            (data,) = prepare(f"{server.address}/captions.tar", more)
            assert {text for batch in data.loader(lambda texts: (), 4) for text in batch.captions} == {
                "of JSON",
                "first",
            }
            (warning,) = [record.getMessage() for record in caplog.records if "more lines than one" in record.message]
            assert warning.startswith("1 of the first captions") and "captions.tar:b" in warning
        caplog.clear()
        prepare(f"{server.address}/captions.tar", "--enable_wildcard")
        assert "more lines" not in caplog.text


def prepare_layout(addresses, slots=1, batch_size=2, pool=16, seed=3):
    from library.options.buckets import BucketOptions

    buckets = BucketOptions((32, 32), True, 16, 64, 8)
    shards = tuple(Shard(address, 0) for address in addresses)
    return Layout(shards, (StreamSubset(".txt"),), (buckets,), seed, slots, batch_size, pool, QUICK)


def name_of(address, number):
    """The sample of that number: shards are written from the last sample to the first."""
    shard = address.rpartition("/")[2].removesuffix(".tar")
    return f"{address}:{shard}{11 - number:04d}"


class TestGoingOn:
    @pytest.mark.parametrize(
        ("ranks", "accumulation", "workers"), [(1, 1, 0), (1, 1, 4), (2, 1, 0), (2, 2, 2), (1, 2, 3)]
    )
    def test_a_run_that_stopped_goes_on_bit_for_bit(self, server, prepare, monkeypatch, ranks, accumulation, workers):
        monkeypatch.setattr("os.cpu_count", lambda: 8)
        given = {"ranks": ranks, "accumulation": accumulation}
        more = ("--shuffle_caption", "--caption_dropout_rate=0.3")
        whole = [taken(data, 14) for data in prepare(every(server), *more, **given)]
        for step in (1, 6, 13):
            again = prepare(every(server), *more, f"--max_data_loader_n_workers={workers}", **given)
            positions = [kept(found[step]) for _, found in whole]
            for data, (batches, _) in zip(again, whole, strict=True):
                data.go_on_from(positions, anyway=False)
                assert taken(data, 14, start=step)[0] == batches[step * accumulation :]

    def test_processes_may_be_exchanged_for_accumulation(self, server, prepare):
        one, two = prepare(every(server), accumulation=2), prepare(every(server), ranks=2)
        batches = sorted(facts[1:] for data in two for facts in taken(data, 6)[0])
        assert sorted(facts[1:] for facts in taken(one[0], 6)[0]) == batches

    def test_another_number_of_processes_is_refused_or_goes_on_with_the_next_shards(self, server, prepare):
        data = prepare(every(server), ranks=2)
        positions = [kept(taken(own, 3)[1][3]) for own in data]
        (other,) = prepare(every(server))
        with pytest.raises(InputError, match=r"processes × accumulation \(2 then, 1 now\)"):
            other.go_on_from(positions, anyway=False)
        other.go_on_from(positions, anyway=True)
        begun = max(found["part"] for own in positions for found in own["readers"].values()) + 1
        first = other.positions[0]
        assert first == Position(part=-(-begun * data[0].layout.readers // other.layout.readers))
        assert len(taken(other, 6, start=3)[0]) == 3

    def test_only_the_shards_of_samples_in_memory_are_read_again(self, server, prepare):
        (data,) = prepare(every(server))
        positions = [kept(taken(data, 40)[1][40])]
        read = max(found["part"] for found in positions[0]["readers"].values())
        assert read >= 1
        needed = {
            data.layout.part(int(number), part).shard.address
            for number, found in positions[0]["readers"].items()
            for part, _ in [*found["pool"], *found["waiting"], (found["part"], 0)]
        }
        server.asked.clear()
        (again,) = prepare(every(server))
        server.asked.clear()
        again.go_on_from(positions, anyway=False)
        taken(again, 40 + again.layout.readers, start=40)
        assert {f"{server.address}/{name}" for name in server.asked} <= needed | {
            data.layout.part(int(number), found["part"] + 1).shard.address
            for number, found in positions[0]["readers"].items()
        }

    def test_a_shard_that_has_lost_its_samples_is_named(self, server, prepare, make_shard):
        (data,) = prepare(every(server))
        positions = [kept(taken(data, 9)[1][9])]
        for number in range(SHARDS):
            make_shard(server.folder, number, SHAPES[:1], parquet=False)
        (again,) = prepare(every(server))
        again.go_on_from(positions, anyway=False)
        with pytest.raises(InputError, match=r"--resume: \S+\.tar has no longer the samples that it had"):
            taken(again, 12, start=9)


class TestFaults:
    @pytest.mark.parametrize("ranges", [True, False])
    def test_a_server_that_fails_stalls_and_cuts_short_changes_nothing(self, server, prepare, ranges):
        (data,) = prepare(every(server))
        whole, _ = taken(data, 60)
        server.ranges = ranges
        (again,) = prepare(every(server))
        server.faults = {
            "00001.tar": [503, 500],
            "00002.tar": [("cut", 700), ("cut", 3000)],
            "00003.tar": [("stall", 2000)],
            "00004.tar": [429, ("cut", 0)],
            "00005.tar": [("cut", 5000), 502, ("cut", 100 if ranges else 9000)],
        }
        assert taken(again, 60)[0] == whole
        assert not any(server.faults.values())

    def test_a_lost_shard_is_listed_counted_and_passed_over(self, server, prepare):
        (data,) = prepare(every(server).replace("//", "//me:secret@", 1) + "?key=secret")
        assert server.authorization == {"Basic bWU6c2VjcmV0"}
        server.broken = {"00004.tar": 503, "00006.tar": ("cut", 4000)}
        server.faults = {"00007.tar": [404]}
        server.ranges = False
        bad, lost = {}, 0
        for batch in data.loader(lambda captions: (), 60):
            assert "secret" not in repr((batch.names, batch.quarantined))
            bad.update(batch.quarantined)
            lost += batch.replaced
        shards = {name.rpartition("/")[2]: reason for name, reason in bad.items()}
        assert set(shards) == {"00004.tar", "00006.tar", "00007.tar"}
        assert "the server says 503" in shards["00004.tar"] and "3 tries" in shards["00004.tar"]
        assert "broke off at byte 4000 of " in shards["00006.tar"]
        assert "the server says 404" in shards["00007.tar"] and "tries" not in shards["00007.tar"]
        assert lost > len(bad)  # a shard counts as its samples

    def test_a_server_that_is_gone_is_an_error_that_says_so(self, server, prepare):
        (data,) = prepare(every(server) + "?key=secret")
        server.broken = {f"{number:05d}.tar": 500 for number in range(SHARDS)}
        with pytest.raises(InputError, match="no image to train on in the last 4 shards") as raised:
            taken(data, 3)
        assert "the server says 500" in str(raised.value) and "secret" not in str(raised.value)

    def test_bad_samples_are_left_out_each_with_its_reason(self, server, prepare, make_tar, make_picture):
        good = make_picture(32, 32)
        members = [
            ("a.jpg", good), ("a.txt", b"fine"), ("b.txt", b"alone"), ("c.jpg", good[:200]), ("c.txt", b"cut"),
            ("d.jpg", good), ("d.png", good), ("e.jpg", b"nothing"), ("../f.jpg", good), ("g.jpg", good),
            ("g.txt", b"\xff\xe9"), ("h.jpg", good), ("h.jpg", good), ("i.jpg", make_picture(4, 4)), ("j.jpg", good),
            ("j.json", b'{"caption": "of  JSON"}'), ("k.jpg", good), ("l.jpg", good),
        ]  # fmt: skip
        make_tar(server.folder / "bad.tar", members)
        whole = (server.folder / "bad.tar").read_bytes()
        (server.folder / "bad.tar").write_bytes(whole[: whole.rindex(b"l.jpg") + 512 + 100])
        (data,) = prepare(f"{server.address}/bad.tar", batch=1, seed=1)
        bad, captions = {}, set()
        for batch in data.loader(lambda captions: (), 30):
            bad.update({name.rpartition("/")[2].removeprefix("bad.tar:"): reason for name, reason in batch.quarantined})
            captions.update(batch.captions)
        assert captions == {"fine", "of  JSON", ""}  # k is whole, and has no caption
        for key, reason in {
            "b": "no image, only .txt", "c": "OSError", "d": "2 images", "e": "no image of a known kind",
            "f": "leads out", "g": "not UTF-8", "h": "several members", "i": "too small", "bad.tar": "inside a member",
        }.items():  # fmt: skip
            assert reason in bad[key], key
        assert len(bad) == 9


class TestAddresses:
    def test_a_command_is_run_again_from_the_start_where_it_breaks_off(self, server, prepare, tmp_path):
        flaky = tmp_path / "flaky.sh"
        flaky.write_text(
            f'if mkdir "{tmp_path}/seen.$1" 2>/dev/null; then head -c 3000 "{server.folder}/$1"; exit 1; fi\n'
            f'cat "{server.folder}/$1"\n'
        )
        (direct,) = prepare(every(server))
        (data,) = prepare(f"pipe:bash {flaky} {{00000..00008}}.tar")
        names = [[name.rpartition(":")[2] for name in facts[2]] for facts, *_ in taken(data, 12)[0]]
        assert names == [[name.rpartition(":")[2] for name in facts[2]] for facts, *_ in taken(direct, 12)[0]]
        assert (tmp_path / "seen.00000.tar").exists()

    def test_a_command_that_gives_nothing_is_ended(self, tmp_path):
        address = f"pipe:echo $$ >> {tmp_path}/pids; sleep 60"
        with pytest.raises(Exception, match=r"the command gave nothing for 0\.3 s; 3 tries"):
            next(shard_samples(address, StreamSubset(".txt"), QUICK))
        pids = (tmp_path / "pids").read_text().split()
        assert len(pids) == 3 and not any(is_running(int(pid)) for pid in pids)

    def test_what_a_command_says_of_its_end_is_the_reason(self):
        address = 'pipe:KEY=s3cr3t99; echo "no $KEY" >&2; exit 3 # 0.tar'
        with pytest.raises(Exception, match=r"^the command ended with status 3: no …; 3 tries at byte 0$"):
            next(shard_samples(address, StreamSubset(".txt"), QUICK))

    def test_credentials_go_to_their_host_alone_wherever_it_redirects_to(self, server, tmp_path):
        other = ShardServer(server.folder)
        try:
            server.moved = {"a.tar": f"{server.address}/00000.tar", "b.tar": f"{other.address}/00000.tar"}
            for name in ("a.tar", "b.tar"):
                address = f"{server.address}/{name}".replace("//", "//me:secret@", 1)
                assert len(list(shard_samples(address, StreamSubset(".txt"), QUICK))) == 12
            assert server.authorization == {"Basic bWU6c2VjcmV0"}
            assert other.authorization == {None}
        finally:
            other.stop()

    def test_what_fsspec_reaches(self, server, prepare):
        (data,) = prepare(f"file://{server.folder}/{{00000..00008}}.tar")
        (direct,) = prepare(every(server))
        ours, theirs = taken(data, 6)[0], taken(direct, 6)[0]
        assert [images for _, images, _ in ours] == [images for _, images, _ in theirs]

    def test_a_store_without_its_package_is_an_error_that_names_it(self, prepare):
        with pytest.raises(InputError, match=r"--train_data_dir s3:\S+/00000\.tar: s3:// is read through fsspec"):
            prepare("s3://bucket.test/{00000..00003}.tar")

    def test_what_is_shown_of_an_address_holds_no_secret(self):
        for text, shown in {
            "https://me:pw@host.test/a/{0..9}.tar?sig=x": "https://host.test/a/{0..9}.tar",
            "s3://bucket.test/a.tar": "s3://bucket.test/a.tar",
            "pipe:curl -s -H 'key: x' 'https://me:pw@host.test/a.tar?sig=x'": "pipe:curl … https://host.test/a.tar",
        }.items():
            assert str(Address(text)) == shown
        assert Address("http://h.test/{a,b}{0..1}.tar").shards("--train_data_dir") == [
            "http://h.test/a0.tar", "http://h.test/a1.tar", "http://h.test/b0.tar", "http://h.test/b1.tar",
        ]  # fmt: skip

    def test_lists_of_addresses_and_ipv6_ones_are_expanded(self):
        def of(text):
            shards = Address(text.replace("W:", "http:" + "//")).shards("--train_data_dir")
            return [shard.replace("http:" + "//", "") for shard in shards]

        assert of("W:[::1]:80/{0..2}.tar") == ["[::1]:80/0.tar", "[::1]:80/1.tar", "[::1]:80/2.tar"]
        assert of("W:u:p@[fe80::1%25eth0]/{a,b}.tar") == ["u:p@[fe80::1%25eth0]/a.tar", "u:p@[fe80::1%25eth0]/b.tar"]
        assert of("W:{[::1],[2001:db8::2]}/0.tar") == ["[::1]/0.tar", "[2001:db8::2]/0.tar"]
        assert of("W:h:{80..81}/{0,1}.tar") == ["h:80/0.tar", "h:80/1.tar", "h:81/0.tar", "h:81/1.tar"]
        assert of("W:[::1]/{0..1}.tar::W:[::1]/9.tar") == ["[::1]/0.tar", "[::1]/1.tar", "[::1]/9.tar"]
        assert of("pipe:cat [::1]/{0..1}.tar") == ["pipe:cat [::1]/0.tar", "pipe:cat [::1]/1.tar"]

    def test_an_ipv6_server_is_read(self, server, prepare):
        try:
            other = ShardServer(server.folder, host="::1")
        except OSError:
            pytest.skip("no IPv6 here")
        try:
            (data,) = prepare(f"{other.address}/{{00000..00008}}.tar")
            assert len(taken(data, 2)[0]) == 2
        finally:
            other.stop()

    @pytest.mark.parametrize("place", ["me:pa/ss@h.test", "me:pa?ss@h.test", "[::1", "h.test:x"])
    def test_what_is_no_address_is_said_at_once_without_its_password(self, prepare, place):
        with pytest.raises(InputError, match=r"is no address .*%2F for a slash") as raised:
            prepare("http:" + f"//{place}/a.tar")
        assert "pa" not in str(raised.value).partition("train_data_dir")[2].partition("; a user")[0].partition(" (")[0]

    def test_the_fingerprint_stays_when_the_shards_move_and_changes_with_what_is_trained(self, server, prepare):
        def of(address, *more, **given):
            return prepare(address, *more, **given)[0].fingerprint()

        first = of(every(server))
        assert of(f"file://{server.folder}/{{00000..00008}}.tar") == first
        assert of(every(server) + "?key=1", ranks=2, seed=9) == first
        commands = [f"pipe:KEY={key} cat {server.folder}/{{00000..00008}}.tar" for key in ("abcdefg", "hijklmn")]
        assert of(commands[0]) == of(commands[1]) != first  # a key that changes is no other data
        others = [of(every(server, "{00000..00007}.tar")), of(every(server), "--resolution=40")]
        assert len({first, *others, of(every(server), "--caption_extension=.json")}) == 4


class TestBefore:
    def test_what_cannot_be_streamed_is_said_before_training(self, server, prepare, make_tar, make_picture):
        make_tar(server.folder / "tags.tar", [("a.jpg", make_picture(32, 32)), ("a.tags", b"one")])
        (server.folder / "page.tar").write_text("<html>" * 200)
        for pattern, message in {
            "absent.tar": "the server says 404",
            "tags.tar": r"has a caption.*give --caption_extension \.tags",
            "page.tar": "is no tar",
            "{0..": "cannot be expanded|the server says 404",
        }.items():
            with pytest.raises(InputError, match=f"(?s)--train_data_dir http.*{message}"):
                prepare(every(server, pattern))

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ("--in_json=x.json", r"--in_json \(metadata_file\) needs an index"),
            ("--dataset_repeats=2", r"--dataset_repeats \(num_repeats\) needs an index"),
            ("--bucket_no_upscale", "--bucket_no_upscale needs an index"),
            ("--validation_split=0.1", "--validation_split needs an index"),
            ("--shuffle_window_shards=4", "--shuffle_window_shards is for data with an index"),
        ],
    )
    def test_options_that_need_an_index_are_named(self, server, prepare, option, message):
        with pytest.raises(InputError, match=message):
            prepare(every(server), option)

    def test_caches_need_an_index(self, server, all_options):
        options = all_options(f"--train_data_dir={every(server)}", "--cache_latents")
        (said,) = options.caches.check(options)
        assert said.startswith("--cache_latents needs an index, and --train_data_dir http")

    def test_epochs_follow_the_numbers_of_samples_beside_the_shards(self, server, prepare):
        assert prepare(every(server))[0].samples is None
        for number in range(SHARDS):
            (server.folder / f"{number:05d}_stats.json").write_text(json.dumps({"successes": 12}))
        assert prepare(every(server))[0].samples == 108
        (server.folder / "sizes.json").write_text(json.dumps({f"{number:05d}.tar": 11 for number in range(SHARDS)}))
        (data,) = prepare(every(server), batch=10)
        assert data.samples == 99
        assert [data.epochs.steps_before_epoch(epoch) for epoch in range(3)] == [0, 9, 19]
        assert [data.epochs.epoch_of_step(step) for step in (0, 8, 9, 18, 19)] == [0, 0, 1, 1, 2]

    def test_without_them_epochs_are_passes_and_nothing_happens_by_them(self, server, prepare, all_options):
        (data,) = prepare(every(server))
        epochs = []
        for batch in data.loader(lambda captions: (), 120):
            epochs.append(data.epochs.epoch_of_step(batch.step))
            assert data.epochs.steps_before_epoch(epochs[-1] + 1) != batch.step + 1
        assert epochs[0] == 0 and epochs[-1] >= 1

        def options(*more):
            return all_options(f"--train_data_dir={every(server)}", *more)

        with pytest.raises(InputError, match="--max_train_epochs: how many samples an epoch of this stream has"):
            check_without_epochs(options("--max_train_epochs=1"))
        check_without_epochs(options())

    def test_a_run_is_of_streams_or_of_folders(self, server, make_shard, tmp_path, make_options):
        (tmp_path / "local").mkdir()
        make_shard(tmp_path / "local", 0, SHAPES)
        first, second = make_options(every(server)), make_options(tmp_path / "local")
        with pytest.raises(InputError, match="some are addresses and some are folders"):
            streams.is_streamed(replace(first, subsets=first.subsets + second.subsets))


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ranks_get_other_samples(server, prepare):
    names = [[name for facts, *_ in taken(data, 8)[0] for name in facts[2]] for data in prepare(every(server), ranks=2)]
    assert not set(names[0]) & set(names[1])
    assert np.unique(names).size == 32
