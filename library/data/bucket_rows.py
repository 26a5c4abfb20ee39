"""Which rows of an index are in which bucket, as a table a source that is kept beside the source's rows.

K: buckets of the run. S: sources of the index.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np

from library.data.buckets import BucketOptions, assign_buckets, check_options, fit, scaled_sizes, size_codes
from library.data.decode import Fit
from library.data.index import Index
from library.data.index_cache import Arrays, Job, Notes, Table, digest, opened, tables
from library.data.mapped import Opened
from library.data.rows import NAMED, row_key
from library.data.sources import Source

_VERSION = 2  # raise it whenever the same sizes and options give another table


@dataclass(frozen=True)
class Buckets:
    """The buckets of a run, each with at least one image.

    Attributes:
        options: all bucket options of the run.
        sizes_K2: (K, 2) int64 width and height; of equal options sorted.
        options_K: (K,) which options made a bucket.
        images_SK: (S, K) int32 images of each source in each bucket.
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
        """(images,) the bucket of each row of a source, in the rows' order."""
        images_K = self.images_SK[source]
        buckets_n = np.empty(int(images_K.sum()), np.int32)
        buckets_n[self._opened[source]["order"]] = np.repeat(np.arange(len(images_K)), images_K)
        return buckets_n


def bucket_rows(
    index: Index,
    options: Sequence[BucketOptions],
    progress: Callable[[int, int], None] = lambda done, total: None,
    between: Callable[[], None] = lambda: None,
) -> Buckets:
    """Sort an index into buckets.

    Args:
        options: of each subset of the index. Subsets of equal options share buckets.
        progress: called with (done, total) sources, if some have to be sorted.
        between: called between two pieces of the work, and while another process works; may raise, to end it.

    Raises:
        InputError: as check_options; or with bucket_no_upscale an image has a side under bucket_reso_steps.
    """
    for entry in options:
        check_options(entry)
    distinct = tuple(dict.fromkeys(options))
    number_of = [distinct.index(entry) for entry in options]
    endings = [f".{digest([_VERSION, asdict(entry)])}.order" for entry in options]
    jobs = []
    for source, table in zip(index.sources, index.tables, strict=True):
        file = None if table.file is None else table.file.with_suffix(endings[source.subset])
        jobs.append(Job(file, partial(_order, source, table, options[source.subset])))
    made = tables(jobs, progress, between)
    found = sorted(
        {
            (number_of[source.subset], code)
            for source, table in zip(index.sources, made, strict=True)
            for code in table.notes["codes"]
        }
    )
    column = {bucket: number for number, bucket in enumerate(found)}
    images_SK = np.zeros((len(made), len(found)), np.int32)
    error_K, cropped_K = np.zeros(len(found)), np.zeros(len(found))
    upscaled_K = np.zeros(len(found), np.int64)
    for row, (source, table) in enumerate(zip(index.sources, made, strict=True)):
        columns = [column[number_of[source.subset], code] for code in table.notes["codes"]]
        images_SK[row, columns] = table.notes["images"]
        error_K[columns] += table.notes["error"]
        cropped_K[columns] += table.notes["cropped"]
        upscaled_K[columns] += np.array(table.notes["upscaled"], np.int64)
    count_K = np.maximum(images_SK.sum(axis=0, dtype=np.int64), 1)
    starts = index.starts_S.tolist()
    upscaled = [starts[number] + row for number, table in enumerate(made) for row in table.notes["upscaled_rows"]]
    codes_K = np.array([code for _, code in found], np.int64)
    return Buckets(
        distinct,
        np.stack([codes_K >> 32, codes_K & 0xFFFFFFFF], axis=1),
        np.array([number for number, _ in found], np.int64),
        images_SK,
        error_K / count_K,
        cropped_K / count_K,
        upscaled_K,
        tuple(index.name(row) for row in upscaled[:NAMED]),
        index.starts_S,
        opened(made),
    )


def _order(source: Source, table: Table, options: BucketOptions) -> tuple[Arrays, Notes]:
    """The rows of one source, bucket by bucket; runs in any process."""
    arrays = table.open()
    rows, text = arrays["rows"], arrays["text"]
    sizes_n2 = np.stack([rows["width"], rows["height"]], axis=1).astype(np.int64)
    assigned = assign_buckets(sizes_n2, options, lambda row: source.name(row_key(rows[row], text)))
    buckets_n2 = assigned.sizes_K2[assigned.bucket_of_row]
    scaled_n2 = scaled_sizes(sizes_n2, buckets_n2, options)
    cropped_n = 1 - buckets_n2.prod(axis=1) / scaled_n2.prod(axis=1)
    upscaled_n = (scaled_n2 > sizes_n2).any(axis=1)
    kinds = len(assigned.sizes_K2)
    notes = {
        "codes": size_codes(assigned.sizes_K2).tolist(),
        "images": np.bincount(assigned.bucket_of_row, minlength=kinds).tolist(),
        "error": assigned.error_K.tolist(),
        "cropped": np.bincount(assigned.bucket_of_row, cropped_n, kinds).tolist(),
        "upscaled": np.bincount(assigned.bucket_of_row[upscaled_n], minlength=kinds).tolist(),
        "upscaled_rows": np.flatnonzero(upscaled_n)[:NAMED].tolist(),
    }
    return {"order": np.argsort(assigned.bucket_of_row, kind="stable").astype(np.int32)}, notes
