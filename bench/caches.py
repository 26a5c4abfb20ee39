"""What a micro-batch costs the loader from images and from a cache of latents, and what the VAE costs beside it.

    OMP_NUM_THREADS=1 python bench/caches.py

Photograph-like JPEGs of 1 to 4 megapixels are put into a shard and into a folder. The cache holds moments of the shape
and precision that SDXL's VAE gives; their numbers come from a stand-in, since they do not matter here. Then the same
batches are read in turns: decoded, from block files, from .npz beside the images, from memory. Times are this process's
own on one thread, medians over the rounds. The VAE is SDXL's in shape with random weights, in fp32. The last line that
is printed is one JSON object.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from data import BATCH, bucket_options, jpeg, photo_like, write_shard

from library.data.cache.block_files import BlockShelf
from library.data.cache.encodings import LatentMaking
from library.data.cache.entries import Cache, Caches, MemoryShelf, Shelf, blocks_of
from library.data.cache.fill import fill
from library.data.cache.npz_files import NpzShelf, Picture
from library.data.index.sources import Subset
from library.data.index.table import build_index
from library.data.indexed_batches import MicroBatchDataset
from library.data.micro_batch import Share
from library.data.order.bucket_rows import bucket_rows
from library.data.order.plan import Plan, repeated
from library.data.sample.prepare import Treatment
from library.models.vae import encode_moments

SIZES = ((1024, 1024), (1440, 1080), (1200, 1800), (2048, 1536))


def moments(images_BHWC: Tensor) -> tuple[Tensor, Tensor]:
    """Stand-ins for the moments of a VAE in fp16, of the same size."""
    pooled_BChw = torch.nn.functional.avg_pool2d(images_BHWC.permute(0, 3, 1, 2).float(), 8)
    mean_BChw = torch.cat([pooled_BChw, pooled_BChw[:, :1]], dim=1).half()
    return mean_BChw, mean_BChw.abs()


class Reading:
    """The same batches of one data set, from images or from a cache."""

    def __init__(self, folder: Path, target: int, shelf: Callable[["Reading", int], Shelf] | None) -> None:
        self.index = build_index([Subset(folder, ".txt")], use_cache=False)
        self.buckets = bucket_rows(self.index, [bucket_options(target)])
        caches = Caches()
        self.fill_seconds = 0.0
        if shelf is not None:
            made: dict[int, Shelf] = {}

            def shelves(source: int) -> Shelf:
                return made.setdefault(source, shelf(self, source))

            making = LatentMaking(self.index, self.buckets, [Treatment().images], "stand-in", moments, BATCH)
            self.settings = making.settings
            blocks = [block for source in range(len(self.index.sources)) for block in blocks_of(self.index, source)]
            fill(making, self.index, shelves, blocks)
            began = time.process_time()
            fill(making, self.index, shelves, blocks)
            self.fill_seconds = time.process_time() - began
            caches = Caches(latents=Cache(self.index, shelves, {}, making.settings))
        plan = Plan(self.buckets, repeated(self.buckets.images_SK, self.index.repeats_S), 0, BATCH)
        self._dataset = MicroBatchDataset(self.index, self.buckets, plan, Share(BATCH), [Treatment()], caches=caches)

    def ms(self, step: int) -> float:
        """Time in ms for each sample of a step's batch."""
        began = time.process_time()
        self._dataset[step]
        return 1000 * (time.process_time() - began) / BATCH

    def picture(self, source: int) -> Callable[[int], Picture]:
        """The names by which the .npz of a source's images are found."""
        buckets, first = self.buckets.buckets_of(source), int(self.index.starts_S[source])

        def of(index: int) -> Picture:
            record = self.index.record(first + index)
            path = self.index.sources[source].path / self.index.key(first + index)
            size = (int(record["width"]), int(record["height"]))
            return Picture(path, self.settings(first + index), size, self.buckets.size(int(buckets[index])))

        return of


def vae_ms(side_px: int) -> float:
    """Time in ms of encoding one picture by a VAE of SDXL's shape."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    ).eval()
    image_BHWC = torch.zeros(1, side_px, side_px, 3, dtype=torch.uint8)
    times = []
    for _ in range(3):
        began = time.process_time()
        encode_moments(vae, image_BHWC)
        times.append(1000 * (time.process_time() - began))
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=18)
    parser.add_argument("--targets", type=int, nargs="+", default=[1024, 512])
    parser.add_argument("--vae_px", type=int, default=256, help="side of the picture that goes through the VAE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pictures = [jpeg(photo_like(width, height, seed)) for seed, (width, height) in enumerate(SIZES)]
    found: dict[str, object] = {"vae_px": args.vae_px, "vae_ms": round(vae_ms(args.vae_px), 1)}
    with tempfile.TemporaryDirectory() as name:
        shard, folder = Path(name) / "shard", Path(name) / "folder"
        shard.mkdir()
        folder.mkdir()
        write_shard(shard / "00000.tar", pictures)
        for number in range(8 * len(pictures)):
            (folder / f"{number}.jpg").write_bytes(pictures[number % len(pictures)])
            (folder / f"{number}.txt").write_text("a picture")
        for target in args.targets:
            blocks = BlockShelf(Path(name) / f"{target}")
            readings = {
                "decoded": Reading(shard, target, None),
                "block files": Reading(shard, target, lambda _, source, shelf=blocks: shelf),  # type: ignore[misc]
                "npz": Reading(folder, target, lambda reading, source: NpzShelf(reading.picture(source))),
                "memory": Reading(shard, target, lambda _, source: MemoryShelf()),
            }
            times: dict[str, list[float]] = {kind: [] for kind in readings}
            for step in range(args.rounds):
                for kind, reading in readings.items():
                    times[kind].append(reading.ms(step % 6))
            row = {kind: round(statistics.median(values), 2) for kind, values in times.items()}
            images = 8 * len(pictures)
            row["checking a block file's entry"] = round(1000 * readings["block files"].fill_seconds / images, 2)
            print(f"{target} px, ms a sample: {row}", flush=True)
            found[f"{target}"] = row
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
