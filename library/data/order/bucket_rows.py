"""Which rows of an index are in which bucket, as a table a source that is kept beside the source's rows.

K: buckets of the run. S: sources of the index.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np

from library.data.fit import Fit
from library.data.index.kept_tables import Arrays, Job, Notes, Table, digest, opened, tables
from library.data.index.mapped_file import Opened
from library.data.index.rows import NAMED, row_key, row_keys
from library.data.index.sources import Source
from library.data.index.table import Index
from library.data.order.buckets import assign_buckets, check_options, fit, scaled_sizes, size_codes
from library.data.order.held_out import Choice
from library.options.buckets import BucketOptions

_VERSION = 4  # raise it whenever the same sizes and options give another table


@dataclass(frozen=True)
class Buckets:
    """The buckets of a run, each with at least one image.

    Attributes:
        options: all bucket options of the run.
        sizes_K2: (K, 2) int64 width and height; of equal options sorted.
        options_K: (K,) which options made a bucket.
        images_SK: (S, K) int32 images of each source in each bucket, but for those that are held out.
        held_SK: the same of those.
        mean_error_K: (K,) mean of |bucket's width / height - image's width / height|.
        mean_cropped_K: (K,) mean share of the scaled images that is cropped away.
        upscaled_K: (K,) int64 images that are scaled up.
        upscaled_names: of the first few of those.
        starts_S: the index's.
    """

    options: tuple[BucketOptions, ...]
    sizes_K2: np.ndarray
    options_K: np.ndarray
    images_SK: np.ndarray
    held_SK: np.ndarray
    mean_error_K: np.ndarray
    mean_cropped_K: np.ndarray
    upscaled_K: np.ndarray
    upscaled_names: tuple[str, ...]
    starts_S: np.ndarray
    _opened: Opened[Arrays] = field(repr=False, compare=False)

    def size(self, bucket: int) -> tuple[int, int]:
        """Width and height of a bucket."""
        return int(self.sizes_K2[bucket, 0]), int(self.sizes_K2[bucket, 1])

    def options_of(self, bucket: int) -> BucketOptions:
        """The options that made a bucket."""
        return self.options[self.options_K[bucket]]

    @property
    def images_K(self) -> np.ndarray:
        """(K,) int64 images of each bucket."""
        return self.images_SK.sum(axis=0, dtype=np.int64)

    @property
    def mean_error(self) -> float:
        """Mean aspect error over all images."""
        return float(self.images_K @ self.mean_error_K / self.images_K.sum())

    @property
    def mean_cropped(self) -> float:
        """Mean share that is cropped away, over all images."""
        return float(self.images_K @ self.mean_cropped_K / self.images_K.sum())

    def fit(self, bucket: int, width: int, height: int) -> Fit:
        """How an image of any size meets one bucket: scaled to cover it and cropped at the centre."""
        return fit((width, height), self.size(bucket), self.options_of(bucket))

    def rows(self, bucket: int, source: int, places_n: np.ndarray) -> np.ndarray:
        """Rows of the index: the images of a bucket in one source, by their places among those."""
        before = int(self.images_SK[source, :bucket].sum())
        return self._opened[source]["order"][before + places_n].astype(np.int64) + self.starts_S[source]

    def buckets_of(self, source: int) -> np.ndarray:
        """(images,) the bucket of each row of a source, in the rows' order; also of those that are held out."""
        parts = [(self.images_SK[source], "order"), (self.held_SK[source], "held")]
        buckets_n = np.empty(int(sum(images_K.sum() for images_K, _ in parts)), np.int32)
        for images_K, name in parts:
            if images_K.any():
                buckets_n[self._opened[source][name]] = np.repeat(np.arange(len(images_K)), images_K)
        return buckets_n

    @property
    def held_out(self) -> "HeldOut":
        """The images that are held out from training."""
        return HeldOut(self)


@dataclass(frozen=True)
class HeldOut:
    """The images of the same buckets that are held out, as `Buckets` is those to train on."""

    buckets: Buckets

    @property
    def images_SK(self) -> np.ndarray:
        """(S, K) int32 images of each source in each bucket."""
        return self.buckets.held_SK

    def rows(self, bucket: int, source: int, places_n: np.ndarray) -> np.ndarray:
        """As `Buckets.rows`."""
        before = int(self.buckets.held_SK[source, :bucket].sum())
        held = self.buckets._opened[source]["held"]
        return held[before + places_n].astype(np.int64) + self.buckets.starts_S[source]


def bucket_rows(
    index: Index,
    options: Sequence[BucketOptions],
    progress: Callable[[int, int], None] = lambda done, total: None,
    between: Callable[[], None] = lambda: None,
    held_out: Sequence[Choice | None] | None = None,
) -> Buckets:
    """Sort an index into buckets.

    Args:
        options: of each subset of the index. Subsets of equal options share buckets.
        progress: called with (done, total) sources, if some have to be sorted.
        between: called between two pieces of the work, and while another process works; may raise, to end it.
        held_out: of each source what is held out from training; without it nothing.

    Raises:
        InputError: as check_options; or with bucket_no_upscale an image has a side under bucket_reso_steps.
    """
    for entry in options:
        check_options(entry)
    distinct = tuple(dict.fromkeys(options))
    number_of = [distinct.index(entry) for entry in options]
    endings = [f".{digest([_VERSION, asdict(entry)])}.order" for entry in options]
    jobs = []
    chosen = held_out or [None] * len(index.sources)
    for source, table, choice in zip(index.sources, index.tables, chosen, strict=True):
        ending = endings[source.subset]
        if choice is not None:
            ending = f".{digest([_VERSION, asdict(options[source.subset]), asdict(choice)])}.order"
        file = None if table.own_file is None else table.own_file.with_suffix(ending)
        another = None if table.file in (None, table.own_file) else table.file.with_suffix(ending)
        jobs.append(Job(file, partial(_order, source, table, options[source.subset], choice), another=another))
    made = tables(jobs, progress, between)
    found = sorted(
        {
            (number_of[source.subset], code)
            for source, table in zip(index.sources, made, strict=True)
            for code in (*table.notes["codes"], *table.notes.get("held_codes", ()))
        }
    )
    column = {bucket: number for number, bucket in enumerate(found)}
    images_SK = np.zeros((len(made), len(found)), np.int32)
    held_SK = np.zeros_like(images_SK) if held_out is not None else np.broadcast_to(np.int32(0), images_SK.shape)
    error_K, cropped_K = np.zeros(len(found)), np.zeros(len(found))
    upscaled_K = np.zeros(len(found), np.int64)
    for row, (source, table) in enumerate(zip(index.sources, made, strict=True)):
        columns = [column[number_of[source.subset], code] for code in table.notes["codes"]]
        images_SK[row, columns] = table.notes["images"]
        error_K[columns] += table.notes["error"]
        cropped_K[columns] += table.notes["cropped"]
        upscaled_K[columns] += np.array(table.notes["upscaled"], np.int64)
        if "held_codes" in table.notes:
            held_columns = [column[number_of[source.subset], code] for code in table.notes["held_codes"]]
            held_SK[row, held_columns] = table.notes["held_images"]
    count_K = np.maximum(images_SK.sum(axis=0, dtype=np.int64), 1)
    starts = index.starts_S.tolist()
    upscaled = [starts[number] + row for number, table in enumerate(made) for row in table.notes["upscaled_rows"]]
    codes_K = np.array([code for _, code in found], np.int64)
    return Buckets(
        distinct,
        np.stack([codes_K >> 32, codes_K & 0xFFFFFFFF], axis=1),
        np.array([number for number, _ in found], np.int64),
        images_SK,
        held_SK,
        error_K / count_K,
        cropped_K / count_K,
        upscaled_K,
        tuple(index.name(row) for row in upscaled[:NAMED]),
        index.starts_S,
        opened(made),
    )


def _order(source: Source, table: Table, options: BucketOptions, choice: Choice | None) -> tuple[Arrays, Notes]:
    """The rows of one source, bucket by bucket, and apart from them those held out; runs in any process."""
    arrays = table.open()
    rows, text = arrays["rows"], arrays["text"]
    sizes_n2 = np.stack([rows["width"], rows["height"]], axis=1).astype(np.int64)

    def sort(part: np.ndarray) -> tuple[np.ndarray, dict[str, list]]:
        """Some rows, bucket by bucket, and what there is in each bucket."""
        sizes = sizes_n2[part]
        assigned = assign_buckets(sizes, options, lambda row: source.name(row_key(rows[part[row]], text)))
        buckets_n2 = assigned.sizes_K2[assigned.bucket_of_row]
        scaled_n2 = scaled_sizes(sizes, buckets_n2, options)
        cropped_n = 1 - buckets_n2.prod(axis=1) / scaled_n2.prod(axis=1)
        upscaled_n = (scaled_n2 > sizes).any(axis=1)
        kinds = len(assigned.sizes_K2)
        return part[np.argsort(assigned.bucket_of_row, kind="stable")].astype(np.int32), {
            "codes": size_codes(assigned.sizes_K2).tolist(),
            "images": np.bincount(assigned.bucket_of_row, minlength=kinds).tolist(),
            "error": assigned.error_K.tolist(),
            "cropped": np.bincount(assigned.bucket_of_row, cropped_n, kinds).tolist(),
            "upscaled": np.bincount(assigned.bucket_of_row[upscaled_n], minlength=kinds).tolist(),
            "upscaled_rows": part[upscaled_n][:NAMED].tolist(),
        }

    if choice is None:
        order, notes = sort(np.arange(len(rows)))
        return {"order": order}, notes
    is_held = choice.holds_out(row_keys(rows, text))
    order, notes = sort(np.flatnonzero(~is_held))
    held, held_notes = sort(np.flatnonzero(is_held))
    notes |= {"held_codes": held_notes["codes"], "held_images": held_notes["images"]}
    return {"order": order, "held": held}, notes
