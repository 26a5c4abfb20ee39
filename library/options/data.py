"""Options of the data set: where its samples are, and how they become batches."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from library.address import Address, location
from library.errors import Problems
from library.options.buckets import BucketOptions
from library.options.captions import CaptionOptions
from library.options.flag import DATASET, ONE_SUBSET, SUBSET, OptionGroup, PathTo, flag
from library.options.images import ImageOptions
from library.options.validation import HeldOutOptions, ValidationOptions

if TYPE_CHECKING:
    from library.options.training import TrainingOptions


@dataclass(frozen=True, kw_only=True)
class SourceOptions(OptionGroup):
    """Where some samples are, and how often an epoch shows them."""

    title: ClassVar[str] = "data set"
    page: ClassVar[str] = "data.md"

    train_data_dir: Path | Address = flag(
        None,
        "Train on the samples in this place: a folder of LAION shards (00000.tar with its .parquet), read "
        "in place, or of images with caption files; the hub name of such a data set; or an address to "
        "stream shards from, with braces for their numbers: http, s3, 'pipe:COMMAND'",
        read=location,
        at=ONE_SUBSET,
        key="image_dir",
        replaces=("dataset_config",),
        path_to=PathTo.DATA,
    )
    in_json: Path | None = flag(
        None,
        "Take captions and tags of images in folders from this metadata file; only the images that it names are used",
        at=ONE_SUBSET,
        key="metadata_file",
        path_to=PathTo.FILE,
    )
    dataset_repeats: int = flag(
        1, "Show each image so many times an epoch", least=1, below=2**31, at=SUBSET, key="num_repeats"
    )
    is_reg: bool = flag(
        False, "Take the images as regularisation images, which are shown as often as the others of their data set",
        at=ONE_SUBSET, on_command_line=False,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SubsetOptions(HeldOutOptions, ImageOptions, CaptionOptions, BucketOptions, SourceOptions):
    """Where some samples are, which buckets they go to and how they are prepared."""

    dataset: int = 0  # number of the data set that it belongs to
    conditioning_data_dir: Path | None = None  # a second folder of the images' stems; no flag where nothing uses it


@dataclass(frozen=True, kw_only=True)
class DataOptions(ValidationOptions, OptionGroup):
    """All samples of a run, and how they become batches."""

    title: ClassVar[str] = "data set"
    page: ClassVar[str] = "data.md"

    subsets: tuple[SubsetOptions, ...]
    outer: Mapping[str, Any] = field(default_factory=dict)  # of subsets' flags, where --dataset_config says nothing

    dataset_config: Path | None = flag(
        None,
        "Train on the data sets and subsets that this .toml or .json file describes, in place of --train_data_dir",
        replaces=("train_data_dir", "in_json", "reg_data_dir"),
    )
    reg_data_dir: Path | Address | None = flag(
        None,
        "Train also on the regularisation (class) images in this folder, laid out as --train_data_dir; an "
        "epoch shows as many of them as of the others",
        read=location,
        path_to=PathTo.DATA,
    )
    prior_loss_weight: float = flag(
        1.0,
        "Weigh the loss of regularisation images by this factor",
        least=0,
        idle_without=("reg_data_dir", "dataset_config"),
    )
    train_batch_size: int = flag(1, "Train so many images a device and pass", least=1, at=DATASET, key="batch_size")
    shuffle_window_shards: int = flag(
        0, "Show the samples of so many shards before those of the next, for slow disks; 0: shuffle over all", least=0
    )
    stream_shuffle_buffer: int = flag(2048, "Mix so many samples of a stream in memory, over all processes", least=1)
    max_data_loader_n_workers: int = flag(
        8,
        "Read and decode in so many processes, at most the cores less one; 0: in the main process",
        least=0,
        told_on_resume=False,
        same_on_ranks=False,
    )
    max_bad_samples: float = flag(
        0.01,
        "Stop the run when more than this share of the samples is unusable; 0: when any is, 1: never",
        least=0,
        most=1,
    )
    masked_loss: bool = flag(False, "Weigh the loss with masks, which come from --alpha_mask")
    debug_dataset: bool = flag(
        False,
        "Write the first 100 samples as OUTPUT_DIR/debug_dataset/index.html instead of training",
        told_on_resume=False,
    )

    @property
    def resolution(self) -> tuple[int, int]:
        """Width and height in px that the run is said to train at: those of its first subset."""
        return self.subsets[0].resolution

    @classmethod
    def from_values(cls, values: Mapping[str, Any], problems: Problems) -> "DataOptions":
        """The data of the command line, or of the file of --dataset_config if there is one."""
        from library.options.dataset_config import data_options

        return data_options(cls, values, problems)

    def check(self, options: "TrainingOptions") -> Iterator[str]:
        """Say where buckets contradict each other, a page is asked for in a dry run, or masks where there are none."""
        for subset in self.subsets:
            yield from subset.contradictions()
        if self.debug_dataset and options.run.dry_run:
            yield "--debug_dataset writes a page, and --dry_run writes nothing; give one of them"
        if self.masked_loss and not any(subset.alpha_mask for subset in self.subsets):
            yield (
                "--masked_loss has no masks: they come from the images' alpha channel; add --alpha_mask (or alpha_mask "
                "in --dataset_config), or leave it out"
            )
