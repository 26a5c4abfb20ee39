"""Options of buckets: the sizes that images are scaled and cropped to."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.flag import DATASET, OptionGroup, flag


def resolution(text: str) -> tuple[int, int]:
    """'W,H' or one number for a square, in px."""
    parts = text.split(",")
    if len(parts) not in (1, 2) or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(
            "must be 'width,height' or one number in px, such as 1024,1024 (in a file also [width, height])"
        )
    return int(parts[0]), int(parts[-1])


@dataclass(frozen=True, kw_only=True)
class BucketOptions(OptionGroup):
    """The resolution, and which buckets of other aspect ratios there are."""

    title: ClassVar[str] = "resolution and buckets"
    page: ClassVar[str] = "data.md"

    resolution: tuple[int, int] = flag(  # width, height in px
        None,
        "'width,height' or one number, in px; needed, here or in --dataset_config",
        read=resolution,
        is_text=False,
        metavar="W,H",
        at=DATASET,
    )
    enable_bucket: bool = flag(False, "sort images into buckets of like aspect ratio", at=DATASET)
    min_bucket_reso: int = flag(256, "shortest bucket side in px", least=1, at=DATASET, idle_without="enable_bucket")
    max_bucket_reso: int = flag(1024, "longest bucket side in px", least=1, at=DATASET, idle_without="enable_bucket")
    bucket_reso_steps: int = flag(
        64, "bucket sides are multiples of it, in px", least=1, at=DATASET, idle_without="enable_bucket"
    )
    bucket_no_upscale: bool = flag(
        False, "never scale an image up; buckets follow the images", at=DATASET, idle_without="enable_bucket"
    )
