"""How the image of a row meets the bucket that the row was put in by the size that the index has of it."""

from library.data.bad_samples import SampleError
from library.data.fit import Fit
from library.data.index.table import Index
from library.data.order.bucket_rows import Buckets

_ASPECT_TOLERANCE = 0.03  # a third to a half of the way from one SDXL bucket to the next


def row_fit(index: Index, buckets: Buckets, row: int, bucket: int, width: int, height: int) -> Fit:
    """How an image of a width and height, as decoded, meets the bucket that was chosen by the size in the index.

    Raises:
        SampleError: the index had another size, and the bucket does not suit the image's own.
    """
    record = index.record(row)
    told_w, told_h = int(record["width"]), int(record["height"])
    options = buckets.options_of(bucket)
    if (width, height) != (told_w, told_h) and options.enable_bucket:
        said = f"{width}×{height} px, but {_by_what(index, row)} {told_w}×{told_h}: "
        if not 1 - _ASPECT_TOLERANCE < width * told_h / (height * told_w) < 1 + _ASPECT_TOLERANCE:
            raise SampleError(f"{said}another aspect ratio than its bucket was chosen for")
        bucket_w, bucket_h = buckets.size(bucket)
        if options.bucket_no_upscale and (width < bucket_w or height < bucket_h):
            raise SampleError(f"{said}less than its bucket, and --bucket_no_upscale enlarges nothing")
    return buckets.fit(bucket, width, height)


def _by_what(index: Index, row: int) -> str:
    """Where the size in the index comes from; with the way out where a file has changed under its size and time."""
    number, _ = index.place(row)
    if index.sources[number].is_shard:
        return "by its shard's parquet or JSON"
    kept = index.tables[number].file
    deleted = f", or delete {kept.parent}" if kept is not None else ""
    return f"when it was indexed (touch the file{deleted}, to have it looked at again)"
