"""Options of buckets: the sizes that images are scaled and cropped to."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from library.options.flag import DATASET, OptionGroup, flag

_LATENT_PX = 8  # the VAE makes one latent column of so many pixel columns


def resolution(text: str) -> tuple[int, int]:
    """'W,H' or one number for a square, in px."""
    parts = text.split(",")
    if len(parts) not in (1, 2) or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(
            "must be 'width,height' or one number in px, such as 1024,1024 (in a file also [width, height])"
        )
    return int(parts[0]), int(parts[-1])


@dataclass(frozen=True)
class BucketOptions(OptionGroup):
    """The resolution, and which buckets of other aspect ratios there are.

    Attributes:
        resolution: width and height of the single bucket, or whose area buckets keep to.
        min_bucket_reso, max_bucket_reso: shortest and longest side; not used with bucket_no_upscale.
    """

    title: ClassVar[str] = "resolution and buckets"
    page: ClassVar[str] = "data.md"

    resolution: tuple[int, int] = flag(
        None,
        "Train at this size in px, 'width,height' or one number for a square; it is needed, here or in "
        "--dataset_config",
        read=resolution,
        is_text=False,
        metavar="W,H",
        at=DATASET,
    )
    enable_bucket: bool = flag(False, "Sort images into buckets of like aspect ratio", at=DATASET)
    min_bucket_reso: int = flag(
        256, "Make no bucket with a side shorter than this, in px", least=1, at=DATASET, idle_without="enable_bucket"
    )
    max_bucket_reso: int = flag(
        1024, "Make no bucket with a side longer than this, in px", least=1, at=DATASET, idle_without="enable_bucket"
    )
    bucket_reso_steps: int = flag(
        64, "Make the sides of buckets multiples of this, in px", least=1, at=DATASET, idle_without="enable_bucket"
    )
    bucket_no_upscale: bool = flag(
        False,
        "Never scale an image up; the buckets follow from the images' sizes",
        at=DATASET,
        idle_without="enable_bucket",
    )

    def contradictions(self) -> Iterator[str]:
        """Say which of the sizes do not fit each other, and the way out."""
        width, height = self.resolution
        if not self.enable_bucket:
            if width % _LATENT_PX or height % _LATENT_PX:
                yield (
                    f"--resolution {width},{height}: width and height must be multiples of {_LATENT_PX}, for example "
                    f"{_up(width, _LATENT_PX)},{_up(height, _LATENT_PX)}."
                )
            return
        step, low, high = self.bucket_reso_steps, self.min_bucket_reso, self.max_bucket_reso
        if step < 1 or step % _LATENT_PX:
            yield f"--bucket_reso_steps {step} must be a multiple of {_LATENT_PX}, for example 64."
            return
        if min(width, height) < step:
            yield (
                f"--resolution {width},{height} has a side under --bucket_reso_steps {step}: "
                "raise the one or lower the other."
            )
            return
        if self.bucket_no_upscale:
            return
        for flag_, value in (("--min_bucket_reso", low), ("--max_bucket_reso", high)):
            if value % step or value < step:
                yield f"{flag_} {value} must be a multiple of --bucket_reso_steps {step}, e.g. {_up(value, step)}."
        if low > min(width, height):
            yield (
                f"--min_bucket_reso {low} is more than the shorter side of --resolution {width},{height}: "
                f"lower it to {max(step, min(width, height) // 2 // step * step)}, or raise the resolution."
            )
        if high < max(width, height):
            yield (
                f"--max_bucket_reso {high} is less than the longer side of --resolution {width},{height}: "
                f"raise it to {_up(2 * max(width, height), step)}, or lower the resolution."
            )


def _up(size: int, multiple: int) -> int:
    """The smallest multiple above 0 that is no smaller than the size."""
    return max(1, -(-size // multiple)) * multiple
