"""Options of the data set: where it is, how images meet buckets and captions are prepared."""

from argparse import ArgumentParser, ArgumentTypeError, _ArgumentGroup
from dataclasses import dataclass
from pathlib import Path

from library.address import Address, location
from library.options.parser import non_negative_float, non_negative_int, positive_int, rate, seed

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area")


@dataclass(frozen=True)
class SubsetOptions:
    """Where some samples are, which buckets they go to and how their captions are prepared."""

    train_data_dir: Path | Address
    in_json: Path | None
    dataset_repeats: int
    is_reg: bool  # regularisation images
    dataset: int  # number of the data set that it belongs to
    class_tokens: str  # caption of images without one; "": as `N_class words` say
    resolution: tuple[int, int]  # width, height in px
    enable_bucket: bool
    min_bucket_reso: int  # px
    max_bucket_reso: int  # px
    bucket_reso_steps: int  # px
    bucket_no_upscale: bool
    caption_extension: str
    caption_separator: str
    secondary_separator: str
    caption_prefix: str
    caption_suffix: str
    enable_wildcard: bool
    shuffle_caption: bool
    keep_tokens: int
    keep_tokens_separator: str
    token_warmup_min: int  # tags
    token_warmup_step: float  # steps, or below 1 a share of the run's
    caption_dropout_rate: float
    caption_dropout_every_n_epochs: int
    caption_tag_dropout_rate: float
    flip_aug: bool
    color_aug: bool
    random_crop: bool
    face_crop_aug_range: tuple[float, float] | None  # crop's shorter side over the face's longer one
    alpha_mask: bool
    resize_interpolation: str | None
    validation_split: float  # share of the images that is held out
    validation_seed: int | None  # None: the run's


@dataclass(frozen=True)
class DataOptions:
    """All samples of a run, and how they become batches."""

    subsets: tuple[SubsetOptions, ...]
    dataset_config: Path | None
    train_batch_size: int
    shuffle_window_shards: int
    stream_shuffle_buffer: int  # samples over all processes
    max_data_loader_n_workers: int
    max_bad_samples: float  # share of all samples
    prior_loss_weight: float  # of regularisation images
    masked_loss: bool
    debug_dataset: bool
    validate_every_n_steps: int | None
    validate_every_n_epochs: int | None
    max_validation_steps: int | None  # batches

    @property
    def resolution(self) -> tuple[int, int]:
        """Width and height in px that the run is said to train at: those of its first subset."""
        return self.subsets[0].resolution


def resolution(text: str) -> tuple[int, int]:
    """An argparse type: 'W,H' or one number for a square, in px."""
    parts = text.split(",")
    if len(parts) not in (1, 2) or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ArgumentTypeError(f"must be 'width,height' or one number in px, such as 1024,1024; got {text!r}")
    return int(parts[0]), int(parts[-1])


def face_range(text: str) -> tuple[float, float]:
    """An argparse type: 'LEAST,MOST', two numbers above 0."""
    try:
        least, most = map(float, text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"must be two numbers 'LEAST,MOST', such as 2.0,4.0; got {text!r}") from None
    if not 0 < least <= most < float("inf"):
        raise ArgumentTypeError(f"must be two numbers above 0, the smaller one first; got {text!r}")
    return least, most


def separator(text: str) -> str:
    """An argparse type: a text that is not empty."""
    if not text:
        raise ArgumentTypeError("must not be empty: it is what separates a caption's tags")
    return text


def extension(text: str) -> str:
    """An argparse type: a file extension, with its dot added where it is missing."""
    return text if text.startswith(".") else f".{text}"


def add_arguments(parser: ArgumentParser) -> None:
    """Add this group's flags to a parser."""
    group = parser.add_argument_group("data set")
    group.add_argument(
        "--train_data_dir",
        type=location,
        help="folder of LAION shards (00000.tar with its .parquet), read in place, or of images with caption files; or "
        "the hub name of such a data set; or an address to stream shards from, with braces for their numbers: http, "
        "s3, 'pipe:COMMAND'",
    )
    group.add_argument(
        "--dataset_config",
        type=Path,
        help=".toml or .json with several data sets and subsets, in place of --train_data_dir",
    )
    group.add_argument(
        "--in_json", type=Path, help="metadata: captions and tags of images in folders; only the named ones are used"
    )
    group.add_argument(
        "--dataset_repeats", type=positive_int, default=1, help="how often an epoch shows each image (%(default)s)"
    )
    group.add_argument(
        "--reg_data_dir",
        type=Path,
        help="regularisation (class) images, laid out as --train_data_dir; an epoch shows as many of them as of those",
    )
    group.add_argument(
        "--prior_loss_weight",
        type=non_negative_float,
        default=1.0,
        help="weight of the loss of regularisation images (%(default)s)",
    )
    group.add_argument("--resolution", type=resolution, help="'width,height' or one number, in px")
    group.add_argument("--enable_bucket", action="store_true", help="sort images into buckets of like aspect ratio")
    group.add_argument(
        "--min_bucket_reso", type=positive_int, default=256, help="shortest bucket side in px (%(default)s)"
    )
    group.add_argument(
        "--max_bucket_reso", type=positive_int, default=1024, help="longest bucket side in px (%(default)s)"
    )
    group.add_argument(
        "--bucket_reso_steps",
        type=positive_int,
        default=64,
        help="bucket sides are multiples of it, in px (%(default)s)",
    )
    group.add_argument(
        "--bucket_no_upscale", action="store_true", help="never scale an image up; buckets follow the images"
    )
    _add_caption_arguments(group)
    _add_image_arguments(group)
    _add_validation_arguments(group)
    group.add_argument(
        "--train_batch_size", type=positive_int, default=1, help="images per device and pass (%(default)s)"
    )
    group.add_argument(
        "--shuffle_window_shards",
        type=non_negative_int,
        default=0,
        help="show the samples of so many shards before those of the next, for slow disks; 0: all (%(default)s)",
    )
    group.add_argument(
        "--stream_shuffle_buffer",
        type=positive_int,
        default=2048,
        help="samples that a stream mixes in memory, over all processes (%(default)s)",
    )
    group.add_argument(
        "--max_data_loader_n_workers",
        type=non_negative_int,
        default=8,
        help="processes that read and decode, at most the cores less one; 0: in the main process (%(default)s)",
    )
    group.add_argument(
        "--max_bad_samples",
        type=rate,
        default=0.01,
        help="share of samples that may be unusable before the run stops; 0: none, 1: all (%(default)s)",
    )


def _add_validation_arguments(group: _ArgumentGroup) -> None:
    group.add_argument(
        "--validation_split",
        type=rate,
        default=0.0,
        help="share of the images that is held out from training, to measure the loss on (%(default)s)",
    )
    group.add_argument("--validation_seed", type=seed, help="chooses those images and their noise (default: --seed)")
    group.add_argument("--validate_every_n_steps", type=positive_int, help="validate each n steps")
    group.add_argument(
        "--validate_every_n_epochs",
        type=positive_int,
        help="validate each n epochs (default: each epoch, unless steps are given)",
    )
    group.add_argument(
        "--max_validation_steps",
        type=positive_int,
        help="validate on that many batches of --train_batch_size at most (default: on all images held out)",
    )


def _add_caption_arguments(group: _ArgumentGroup) -> None:
    group.add_argument(
        "--caption_extension",
        "--caption_extention",
        type=extension,
        default=".caption",
        help="extension of caption files (%(default)s)",
    )
    group.add_argument(
        "--caption_separator", type=separator, default=",", help="what separates a caption's tags (%(default)s)"
    )
    group.add_argument(
        "--secondary_separator", default="", help="separates tags that stay together when the others are shuffled"
    )
    group.add_argument("--caption_prefix", default="", help="put before every caption, with a space between")
    group.add_argument("--caption_suffix", default="", help="put behind every caption, with a space between")
    group.add_argument(
        "--enable_wildcard",
        action="store_true",
        help="take one of {a|b|c} in a caption, and one line of a caption file, anew at each step",
    )
    group.add_argument(
        "--shuffle_caption", action="store_true", help="shuffle the tags of a caption, anew at each step"
    )
    group.add_argument(
        "--keep_tokens", type=non_negative_int, default=0, help="leave that many first tags in place (%(default)s)"
    )
    group.add_argument(
        "--keep_tokens_separator",
        default="",
        help="where a caption has it, leave the tags before it in place, and those behind it where it comes again",
    )
    group.add_argument(
        "--token_warmup_min",
        type=non_negative_int,
        default=1,
        help="tags shown at the first step of --token_warmup_step (%(default)s)",
    )
    group.add_argument(
        "--token_warmup_step",
        type=non_negative_float,
        default=0.0,
        help="show more tags step by step, and all from this one on; below 1: a share of the run (%(default)s)",
    )
    group.add_argument(
        "--caption_dropout_rate",
        type=rate,
        default=0.0,
        help="share of samples trained with an empty caption (%(default)s)",
    )
    group.add_argument(
        "--caption_dropout_every_n_epochs",
        type=non_negative_int,
        default=0,
        help="train each n-th epoch with empty captions; 0: none (%(default)s)",
    )
    group.add_argument(
        "--caption_tag_dropout_rate",
        type=rate,
        default=0.0,
        help="share of tags left out, other than kept ones (%(default)s)",
    )


def _add_image_arguments(group: _ArgumentGroup) -> None:
    group.add_argument("--flip_aug", action="store_true", help="mirror half of the samples, drawn anew at each step")
    group.add_argument(
        "--color_aug", action="store_true", help="change hue or gamma of a third of the samples a little"
    )
    group.add_argument("--random_crop", action="store_true", help="crop at random instead of at the centre")
    group.add_argument(
        "--face_crop_aug_range",
        type=face_range,
        metavar="LEAST,MOST",
        help="crop around the face that a name STEM_X_Y_W_H tells of; its shorter side is so many times the face",
    )
    group.add_argument(
        "--alpha_mask", action="store_true", help="weigh the loss with the images' alpha channel, 0 where transparent"
    )
    group.add_argument(
        "--masked_loss", action="store_true", help="weigh the loss with masks; they come from --alpha_mask"
    )
    group.add_argument(
        "--debug_dataset",
        action="store_true",
        help="write the first 100 samples as OUTPUT_DIR/debug_dataset/index.html instead of training",
    )
    group.add_argument(
        "--resize_interpolation",
        choices=INTERPOLATIONS,
        help="filter that images are scaled with (default: the fastest that keeps the quality)",
    )
