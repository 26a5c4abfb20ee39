"""Decoding for training against its parts and against the usual pipeline; quality; how workers scale: all in one run.

    python bench/data.py
    PYTHONPATH=/where/opencv/is python bench/data.py --rounds 21

The pictures are made here: JPEGs of 1 to 4 megapixels with a photograph's spectrum (amplitude 1/f**1.2), quality 92,
4:2:0. Each goes to its SDXL bucket at 1024 and at 512 px. Three take turns on one thread, by the process's own time, so
that other work on the machine counts little:

- ours: library.data.sample.decode, encoded bytes to the pixels of the bucket
- reference: Pillow's decoding, a numpy array, OpenCV's INTER_AREA, the crop (left out where OpenCV is not installed; it
  is no requirement of this project)
- decoding: Pillow's decoding alone (libjpeg-turbo) at the reduced scale that ours takes: the bound of any pipeline

Quality is the PSNR in dB against a Lanczos filter in floating point of the fully decoded picture. Then comes what the
options of images cost, each by itself. Then the loader runs on shards of the same pictures with one worker process,
two, and so on up to the cores, by wall-clock time. The last line printed is one JSON object.
"""

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, features

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.data.fit import Fit
from library.data.index.sources import Subset
from library.data.index.table import build_index
from library.data.indexed_batches import make_loader
from library.data.micro_batch import Share
from library.data.order.bucket_rows import bucket_rows
from library.data.order.buckets import assign_buckets, fit
from library.data.order.plan import Plan, repeated
from library.data.sample.augmentation import apply_gamma, shift_hue
from library.data.sample.decode import DRAFT_MARGIN, decode
from library.data.sample.prepare import Treatment
from library.data.sample.scaling import FILTERS, Filter
from library.options.buckets import BucketOptions

SIZES = ((1024, 1024), (1440, 1080), (1200, 1800), (1600, 1600), (2048, 1536), (2000, 2000))  # 1.0 to 4.0 megapixels
TARGETS = (1024, 512)
OPTIONS_SIZE = (1440, 1080)
_SAME = ("linear", "cubic")  # other names of bilinear and bicubic
BATCH = 4
WARMUP_BATCHES = 4  # of the loader: workers start and read ahead


def photo_like(width: int, height: int, seed: int) -> Image.Image:
    """Noise with a photograph's spectrum and colours that go together."""
    random = np.random.default_rng(seed)
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    radius[0, 0] = np.inf
    layers = []
    for _ in range(3):
        phases = random.standard_normal(radius.shape) + 1j * random.standard_normal(radius.shape)
        layer = np.fft.irfft2(phases / radius**1.2, (height, width))
        layers.append(layer / layer.std())
    colours = np.stack([layers[0], 0.9 * layers[0] + 0.3 * layers[1], 0.9 * layers[0] + 0.3 * layers[2]], axis=-1)
    return Image.fromarray(np.clip(128 + 50 * colours, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    """The picture encoded as JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92)
    return file.getvalue()


def opencv() -> ModuleType | None:
    """The OpenCV module on one thread, or None if it is not installed."""
    try:
        import cv2
    except ImportError:
        return None
    cv2.setNumThreads(1)
    return cv2


@dataclass(frozen=True)
class Case:
    """One picture on its way to one bucket."""

    data: bytes
    size_wh_px: tuple[int, int]
    bucket_wh_px: tuple[int, int]
    fit: Fit

    def ours(self) -> np.ndarray:
        """Decode as training does."""
        return decode(self.data, self.bucket_wh_px, lambda width, height: self.fit)[0]

    def reference(self, cv2: ModuleType) -> np.ndarray:
        """Decode as the usual pipeline does."""
        pixels_HWC = np.array(Image.open(io.BytesIO(self.data)))
        return self.cropped(cv2.resize(pixels_HWC, self.fit.scaled_wh_px, interpolation=cv2.INTER_AREA))

    def decoding(self) -> Image.Image:
        """Decode by Pillow alone, at the scale that training uses."""
        image = Image.open(io.BytesIO(self.data))
        width, height = self.fit.scaled_wh_px
        image.draft(None, (int(width * DRAFT_MARGIN), int(height * DRAFT_MARGIN)))
        image.load()
        return image

    def exact(self) -> np.ndarray:
        """Scale the fully decoded picture by Lanczos in floating point."""
        pixels_HWC = np.asarray(Image.open(io.BytesIO(self.data)), np.float32)
        planes = [Image.fromarray(pixels_HWC[..., colour]) for colour in range(3)]
        scaled = [plane.resize(self.fit.scaled_wh_px, Image.Resampling.LANCZOS) for plane in planes]
        return self.cropped(np.stack([np.asarray(plane) for plane in scaled], axis=-1))

    def cropped(self, scaled_HWC: np.ndarray) -> np.ndarray:
        """The bucket's rectangle of the scaled picture."""
        (left, top), (width, height) = self.fit.crop_xy_px, self.bucket_wh_px
        return scaled_HWC[top : top + height, left : left + width]


def bucket_options(target: int) -> BucketOptions:
    """SDXL's buckets, or the same at half the size."""
    return BucketOptions((target, target), True, target // 2, target * 2, 64)


def cases(pictures: list[bytes], target: int) -> list[Case]:
    """The cases of all pictures at one resolution."""
    options = bucket_options(target)
    assigned = assign_buckets(np.array(SIZES), options)
    found = assigned.sizes_K2[assigned.bucket_of_row].tolist()
    return [
        Case(data, size, (width, height), fit(size, (width, height), options))
        for data, size, (width, height) in zip(pictures, SIZES, found, strict=True)
    ]


def psnr(pixels: np.ndarray, exact: np.ndarray) -> float:
    """Peak signal to noise ratio in dB of 8-bit pixels; equal ones have 99."""
    error = np.mean((pixels - exact.astype(np.float64)) ** 2)
    return min(99.0, float(10 * np.log10(255**2 / max(error, 1e-9))))


def times_ms(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median of the process's own time of each function, in ms; the functions take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            began = time.process_time()
            work()
            seconds[name].append(time.process_time() - began)
    return {name: 1000 * statistics.median(values[1:]) for name, values in seconds.items()}  # the first warms up


def measure(case: Case, cv2: ModuleType | None, rounds: int) -> dict[str, object]:
    """Times in ms and PSNR in dB of one picture."""
    works: dict[str, Callable[[], object]] = {"ours": case.ours, "decoding": case.decoding}
    exact = case.exact()
    quality = {"ours": psnr(case.ours(), exact)}
    if cv2 is not None:
        works["reference"] = partial(case.reference, cv2)
        quality["reference"] = psnr(case.reference(cv2), exact)
    return {
        "picture": case.size_wh_px,
        "bucket": case.bucket_wh_px,
        "decoded": case.decoding().size,
        "ms": times_ms(works, rounds),
        "psnr_db": quality,
    }


def sums(rows: list[dict]) -> dict[str, float]:
    """Ratios over all pictures of one resolution."""
    total = {name: sum(row["ms"][name] for row in rows) for name in rows[0]["ms"]}
    found = {"share_of_decoding_speed": total["decoding"] / total["ours"]}
    if "reference" in total:
        found["speed_over_reference"] = total["reference"] / total["ours"]
        found["least_psnr_gain_db"] = min(row["psnr_db"]["ours"] - row["psnr_db"]["reference"] for row in rows)
        found["bound_over_reference"] = total["reference"] / total["decoding"]
    return found


def write_shard(path: Path, pictures: list[bytes]) -> None:
    """A shard of the pictures with captions, each several times."""
    with tarfile.open(path, "w") as tar:
        for number in range(8 * len(pictures)):
            for extension, content in ((".jpg", pictures[number % len(pictures)]), (".txt", b"a picture")):
                info = tarfile.TarInfo(f"{number:09d}{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def loader_speed(folder: Path, target: int, workers: int, batches: int) -> float:
    """Samples per second of wall-clock time that the loader yields, without tokenizing."""
    index = build_index([Subset(folder, ".txt")], use_cache=False)
    buckets = bucket_rows(index, [bucket_options(target)])
    plan = Plan(buckets, repeated(buckets.images_SK, index.repeats_S), 0, BATCH)
    options = [Treatment()]
    loader = make_loader(
        index, buckets, plan, Share(BATCH), options, end_step=WARMUP_BATCHES + batches, workers=workers
    )
    began, samples = 0.0, 0
    for number, batch in enumerate(loader):
        if number == WARMUP_BATCHES - 1:
            began = time.perf_counter()
        elif number >= WARMUP_BATCHES:
            samples += len(batch)
    return samples / (time.perf_counter() - began)


def scaling(pictures: list[bytes], most_workers: int, batches: int) -> dict[int, dict[int, float]]:
    """Samples per second by resolution and number of workers."""
    with tempfile.TemporaryDirectory() as name:
        write_shard(Path(name) / "00000.tar", pictures)
        counts = sorted({1, 2, most_workers} & set(range(1, most_workers + 1)))
        return {
            target: {workers: loader_speed(Path(name), target, workers, batches) for workers in counts}
            for target in TARGETS
        }


def option_costs(case: Case, rounds: int) -> dict[str, float]:
    """Time in ms that each image option adds to a picture on which it acts."""
    pixels_HWC = np.ascontiguousarray(case.ours())

    def decoded(by: Filter | None = None, with_alpha: bool = False, mirrored: bool = False) -> Callable[[], object]:
        into = np.empty_like(pixels_HWC)  # as in a batch, which a mirrored picture is copied into

        def work() -> None:
            fit = replace(case.fit, mirrored=mirrored)
            into[...] = decode(case.data, case.bucket_wh_px, lambda *size: fit, by, with_alpha)[0][..., :3]

        return work

    works: dict[str, Callable[[], object]] = {
        "none": decoded(),
        "flip_aug": decoded(mirrored=True),
        "alpha_mask": decoded(with_alpha=True),
        **{f"resize_interpolation={name}": decoded(by) for name, by in FILTERS.items() if name not in _SAME},
        "color_aug, hue": lambda: shift_hue(pixels_HWC, 10.0),
        "color_aug, gamma": lambda: apply_gamma(pixels_HWC, 1.05),
    }
    found = times_ms(works, rounds)
    none = found.pop("none")
    return {name: cost if name.startswith("color") else cost - none for name, cost in found.items()}


def print_table(target: int, rows: list[dict], totals: dict[str, float]) -> None:
    """Print the figures of one resolution as a table."""
    print(f"\n{target} px: ms a picture on one thread; PSNR in dB")
    places = (("picture", 11), ("decoded", 11), ("bucket", 11), ("ours", 7), ("decoding", 9), ("reference", 10))
    print(" ".join(f"{name:>{width}}" for name, width in (*places, ("PSNR", 9), ("(ref.)", 9))))
    for row in rows:
        sizes = "".join(f"{'×'.join(map(str, row[name])):>11} " for name in ("picture", "decoded", "bucket"))
        ms, quality = row["ms"], row["psnr_db"]
        print(
            f"{sizes}{ms['ours']:7.1f} {ms['decoding']:9.1f} {ms.get('reference', float('nan')):10.1f}"
            f"{quality['ours']:10.1f} {quality.get('reference', float('nan')):9.1f}"
        )
    print("; ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in totals.items()))


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="times that each picture is decoded (%(default)s)")
    parser.add_argument("--batches", type=int, default=24, help="that the loader gives while timed (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="most worker processes (the cores)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2 = opencv()
    if cv2 is None:
        print("OpenCV is not installed: the reference pipeline is left out")
    pictures = [jpeg(photo_like(*size, seed)) for seed, size in enumerate(SIZES)]
    result: dict[str, object] = {"bench": "data", "rounds": args.rounds}
    for target in TARGETS:
        rows = [measure(case, cv2, args.rounds) for case in cases(pictures, target)]
        totals = sums(rows)
        print_table(target, rows, totals)
        result[str(target)] = {"pictures": rows, **totals}
    (case,) = [case for case in cases(pictures, TARGETS[0]) if case.size_wh_px == OPTIONS_SIZE]
    result["option_costs_ms"] = costs = option_costs(case, args.rounds)
    print(f"\nms that options add to a picture of {'×'.join(map(str, OPTIONS_SIZE))} at {TARGETS[0]} px")
    print("; ".join(f"{name} {cost:.1f}" for name, cost in costs.items()))
    print("\nloader, samples/s by worker processes")
    result["loader_samples_per_second"] = by_workers = scaling(pictures, args.workers, args.batches)
    for target, speeds in by_workers.items():
        print(f"{target:>6} px  " + "   ".join(f"{workers}: {speed:.1f}" for workers, speed in speeds.items()))
    result["versions"] = {
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "opencv": cv2.__version__ if cv2 is not None else None,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
