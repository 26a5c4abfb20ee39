"""A look into the first shard of a stream before training: whether it can be read, and has images and captions."""

from itertools import islice

from library.data.index.rows import COMMON_CAPTION_EXTENSIONS
from library.data.index.tar_headers import TornTarError
from library.data.stream.shard_bytes import Patience, ShardError, store_file
from library.data.stream.shard_samples import StreamSample, StreamSubset, shard_samples
from library.errors import InputError
from library.redaction import shown_address

_LOOKED_AT = 8  # samples
_PATIENCE = Patience(timeout_s=30, tries=3)


def probe(address: str, subset: StreamSubset, flag: str, patience: Patience = _PATIENCE) -> list[str]:
    """Read the first samples, and name those whose captions have several lines.

    Raises:
        InputError: it cannot be read, has no image, or none of these samples has a caption.
    """
    what = f"{flag} {shown_address(address)}"
    _check_store(address, flag)
    found: list[StreamSample] = []
    try:
        for sample in islice(shard_samples(address, subset, patience), _LOOKED_AT):
            found.append(sample)
    except ShardError as error:
        raise InputError(f"{what}: {error}. Check address and access.") from error
    except TornTarError as error:
        if not found:
            raise InputError(f"{what}: is no tar ({error}). A stream is read from shards, *.tar.") from error
    good = [sample for sample in found if not sample.bad]
    if not good:
        some = "; ".join(f"{sample.name}: {sample.bad}" for sample in found[:3])
        raise InputError(f"{what}: no image in its first {len(found)} samples. {some}".rstrip())
    if any(sample.caption for sample in good):
        return [sample.name for sample in good if "\n" in sample.caption]
    others = sorted({name for sample in good for name in sample.others & set(COMMON_CAPTION_EXTENSIONS)})
    hint = f" They have {others[0]}: give --caption_extension {others[0]}." if others else ""
    raise InputError(
        f"{what}: none of its first {len(good)} images has a caption. Looked for '{subset.caption_extension}' "
        f"(--caption_extension) and for 'caption' in the .json.{hint}"
    )


def _check_store(address: str, flag: str) -> None:
    """Raise InputError where nothing is installed that reads this kind of address."""
    if address.startswith(("http://", "https://", "pipe:")):
        return
    scheme, place = address.partition(":")[0], shown_address(address)
    try:
        store_file(address)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{flag} {place}: {scheme}:// is read through fsspec, which says: {error}. Install fsspec and its "
            f"package for {scheme} (s3fs for s3, gcsfs for gs), or use a command: 'pipe:aws s3 cp {place} -'."
        ) from error
