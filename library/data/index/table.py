"""The table of all images of a run: where their bytes are, how large they are, where their captions are.

It is a table a source, kept on disk and mapped into memory where a row is asked for. So memory and the time of a start
grow with the number of sources, not of images.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field
from functools import partial

import numpy as np

from library.data.image_header import known_kinds
from library.data.index.extras import Extra
from library.data.index.folders import scan_folder
from library.data.index.kept_tables import Arrays, Job, Notes, Table, cache_folders, kept_name, opened, tables
from library.data.index.mapped_file import Opened
from library.data.index.rows import NAMED, ROW, Part, Summary, first_few, row_key, stored_text
from library.data.index.shards import scan_shard
from library.data.index.sources import Listed, Source, Subset, find_sources, image_extensions
from library.errors import InputError

# The number is raised whenever a scan of unchanged data gives another table.
_VERSION = [10, *ROW.descr]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Index:
    """All rows of a run, in an order that depends on the data alone: subset by subset, shards and then folders by name.

    Attributes:
        subsets: what the sources' `subset` numbers.
        sources: where rows come from.
        starts_S: (sources + 1,) int64, the first row of each source; the last entry is the number of rows.
        tables: of each source.
        warnings: sentences for the user.
        bad: (name, reason) of images that were left out.
        unnamed: how many more were left out, by reason; they are in no file, and `bad` has an entry for many of them.
        fingerprint: digest of everything that the rows say, and of the sources' names and repeats.
    """

    subsets: tuple[Subset, ...]
    sources: tuple[Source, ...]
    starts_S: np.ndarray
    tables: tuple[Table, ...]
    warnings: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]
    unnamed: Counter[str]
    fingerprint: str
    _opened: Opened[Arrays] = field(repr=False, compare=False)

    def __len__(self) -> int:
        return int(self.starts_S[-1])

    @property
    def left_out(self) -> int:
        """How many samples were left out."""
        return len(self.bad) + self.unnamed.total()

    def place(self, row: int) -> tuple[int, int]:
        """The number of a row's source, and its place there."""
        number = int(np.searchsorted(self.starts_S, row, side="right")) - 1
        return number, row - int(self.starts_S[number])

    def source(self, row: int) -> Source:
        """Where a row comes from."""
        return self.sources[self.place(row)[0]]

    def sources_of(self, subset: int) -> np.ndarray:
        """(sources,) int64: the numbers of a subset's sources."""
        return np.flatnonzero([source.subset == subset for source in self.sources])

    def record(self, row: int) -> np.void:
        """What is known of a row: an element of dtype rows.ROW."""
        number, place = self.place(row)
        return self._opened[number]["rows"][place]

    def key(self, row: int) -> str:
        """The sample's key in its shard, or the file's name in its folder."""
        number, place = self.place(row)
        arrays = self._opened[number]
        return row_key(arrays["rows"][place], arrays["text"])

    def name(self, row: int) -> str:
        """What messages call an image: "shards/00000.tar:0000002", or the path of its file."""
        return self.source(row).name(self.key(row))

    def stored_caption(self, row: int) -> str:
        """The caption of a row whose caption kind is STORED."""
        number, place = self.place(row)
        arrays = self._opened[number]
        record = arrays["rows"][place]
        return stored_text(arrays["text"], int(record["caption_offset"]), int(record["caption_bytes"]))

    def extra(self, row: int, extra: Extra) -> tuple[int, int, str]:
        """Offset and bytes of an extra image of a row in its shard; in a folder its path, "" in a shard."""
        number, place = self.place(row)
        arrays = self._opened[number]
        record = arrays[extra.array()][place]
        path = stored_text(arrays["text"], int(record["path_offset"]), int(record["path_bytes"]))
        return int(record["offset"]), int(record["bytes"]), path

    @property
    def profiles(self) -> Counter[str]:
        """How many images have a colour profile that changes their colours, by the profiles' names."""
        return sum((Counter(table.notes["profiles"]) for table in self.tables), Counter())

    @property
    def repeats_S(self) -> np.ndarray:
        """(sources,) int64: how often an epoch shows each row of a source."""
        return np.array([source.repeats for source in self.sources], np.int64)


def build_index(
    subsets: Sequence[Subset],
    *,
    use_cache: bool = True,
    progress: Callable[[Subset], Progress] = lambda subset: lambda done, total: None,
    between: Callable[[], None] = lambda: None,
) -> Index:
    """Index shards and folders of images.

    Args:
        use_cache: keep what was found, beside the data where that may be written.
        progress: from a subset to a function that is called with (done, total), shards and images in folders counted,
            if something in it has to be scanned.
        between: called between two pieces of the work, and while another process works; may raise, to end it.

    Raises:
        InputError: no such folder, no image found, or no image has a caption.
    """
    listed: list[Listed] = []
    made: list[Table] = []
    warnings: list[str] = []
    said: list[list[str]] = []  # of each subset
    for number, subset in enumerate(subsets):
        with _read_errors(subset):
            found = find_sources(subset, number)
            jobs = _jobs(subset, found.listed, use_cache)
            made += tables(jobs, progress(subset), between)
        listed += found.listed
        warnings += found.warnings
        said.append(found.warnings)
    sources = [entry.source for entry in listed]
    summaries = [Summary(**table.notes) for table in made]
    for number, subset in enumerate(subsets):
        own = [place for place, source in enumerate(sources) if source.subset == number]
        summaries_of = [summaries[place] for place in own]
        warnings += _check(subset, [sources[place] for place in own], summaries_of, said[number])
    starts_S = np.cumsum([0, *(summary.count for summary in summaries)])
    bad, unnamed = tuple(_bad(sources, summaries)), _unnamed(summaries)
    fingerprint = _fingerprint(subsets, sources, summaries)
    tables_S = tuple(made)
    return Index(
        tuple(subsets), tuple(sources), starts_S, tables_S, tuple(warnings), bad, unnamed, fingerprint, opened(tables_S)
    )


@contextmanager
def _read_errors(subset: Subset) -> Iterator[None]:
    """An operating system's error while reading the data becomes an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{subset}: {error.filename or subset.path} cannot be read: {error.strerror}") from error


def _jobs(subset: Subset, listed: Sequence[Listed], use_cache: bool) -> list[Job]:
    """A scan a source."""
    folder, of_others = cache_folders(subset.path) if use_cache else (None, None)
    jobs, kinds = [], known_kinds()
    for entry in listed:
        source, file, another = entry.source, None, None
        if folder is not None:
            name = str(source.path.relative_to(subset.path)) if source.path != subset.path else source.path.name
            made_from: list[object] = [_VERSION, source.caption_extension, source.class_words, source.share]
            state: list[object] = [entry.files, entry.captions]
            if source.extras:
                made_from.append([extra.name for extra in source.extras])
                state.append(
                    [
                        [name, image, [astuple(file) for file in files]]
                        for name, of_images in entry.extras.items()
                        for image, files in of_images.items()
                    ]
                )
            made_from.append(kinds)  # an image of a kind that Pillow lacked is left out until it knows it
            file = folder / f"{kept_name(name, made_from, state)}.rows"
            another = of_others / file.name if of_others is not None else None
        jobs.append(Job(file, partial(_scan, entry), max(1, entry.images), another))
    return jobs


def _scan(entry: Listed) -> tuple[Arrays, Notes]:
    """The table of one source; runs in any process."""
    source = entry.source
    part: Part = (
        scan_shard(source) if source.is_shard else scan_folder(source, entry.files, entry.captions, entry.extras)
    )
    return {"rows": part.rows, "text": part.text, **part.extras}, asdict(Summary.of(part))


def _fingerprint(subsets: Sequence[Subset], sources: Sequence[Source], summaries: Sequence[Summary]) -> str:
    """A digest that stays when the data is moved, and changes with whatever the order of samples depends on."""
    content = hashlib.sha256()
    for source, summary in zip(sources, summaries, strict=True):
        root = subsets[source.subset].path
        name = str(source.path.relative_to(root))
        facts = [source.subset, name, source.share, source.repeats, source.caption_extension, summary.digest]
        content.update(json.dumps(facts).encode())
    return content.hexdigest()


def _check(subset: Subset, sources: Sequence[Source], summaries: Sequence[Summary], said: Sequence[str]) -> list[str]:
    """Sentences about what was left out or lacks a caption.

    Args:
        said: sentences about what lies there and is not used.

    Raises:
        InputError: there is no image, or none has a caption.
    """
    pairs = zip(sources, summaries, strict=True)
    warnings = [f"{source.path}: {warning}" for source, summary in pairs for warning in summary.warnings]
    if bad := [": ".join(entry) for entry in _bad(sources, summaries)]:
        count = len(bad) + _unnamed(summaries).total()
        warnings.append(f"{count} images cannot be read and are left out: {first_few(bad, len(bad))}")
    if without := sum(summary.without_image for summary in summaries):
        strange = sum((Counter(summary.strange_extensions) for summary in summaries), Counter()).most_common(NAMED)
        warnings.append(
            f"{without} samples in the shards have no image ({image_extensions()}), only "
            f"{', '.join(extension for extension, _ in strange)}; they are left out."
        )
    if further := sum((Counter(summary.further_images) for summary in summaries), Counter()):
        named = ", ".join(f"{count} {extension}" for extension, count in further.most_common(NAMED))
        warnings.append(f"{further.total()} further images of samples in the shards are not used: {named}")
    if not sum(summary.count for summary in summaries):
        where = f"{len(sources)} shards and folders (images are {image_extensions()})"
        raise InputError(f"{subset}: 0 images found in {where}. {' '.join([*warnings, *said][:NAMED])}".rstrip())
    warnings += _check_captions(subset, sources, summaries, said) + _lines(subset, sources, summaries)
    return warnings + _profiles(sources, summaries)


def _profiles(sources: Sequence[Source], summaries: Sequence[Summary]) -> list[str]:
    """A sentence about colour profiles that cannot be used."""
    unusable = sum(summary.unusable_profiles for summary in summaries)
    pairs = zip(sources, summaries, strict=True)
    named = [source.name(key) for source, summary in pairs for key in summary.named_unusable_profiles]
    if not unusable:
        return []
    return [
        f"{unusable} images have a colour profile that is damaged or of other colours than theirs; they train as if "
        f"they had none: {first_few(named, unusable)}"
    ]


def _lines(subset: Subset, sources: Sequence[Source], summaries: Sequence[Summary]) -> list[str]:
    """Sentences about captions that are blank, and about those of which only one line trains."""
    found = []
    pairs = list(zip(sources, summaries, strict=True))
    if blank := sum(summary.blank for summary in summaries):
        named = [source.name(key) for source, summary in pairs for key in summary.named_blank]
        found.append(f"{blank} caption files of {subset} are blank, and count as if they were not there: "
                     f"{first_few(named, blank)}.")  # fmt: skip
    many = sum(summary.many_lines for summary in summaries)
    if many and not subset.any_line:
        named = [source.name(key) for source, summary in pairs for key in summary.named_many_lines]
        found.append(
            f"{many} captions of {subset} have more lines than one: the first that is not empty trains, the others do "
            f"not: {first_few(named, many)}. Write each caption on one line, or add --enable_wildcard, which takes one "
            "of its lines at each step."
        )
    return found


def _bad(sources: Sequence[Source], summaries: Sequence[Summary]) -> Iterator[tuple[str, str]]:
    """(name, reason) of what the scans left out."""
    for source, summary in zip(sources, summaries, strict=True):
        yield from ((source.name(key), reason) for key, reason in summary.bad)


def _unnamed(summaries: Sequence[Summary]) -> Counter[str]:
    """How many more the scans left out, by reason."""
    return sum((Counter(summary.unnamed) for summary in summaries), Counter())


def _check_captions(
    subset: Subset, sources: Sequence[Source], summaries: Sequence[Summary], said: Sequence[str]
) -> list[str]:
    """A warning where captions are missing.

    Raises:
        InputError: they are missing for all.
    """
    missing = sum(summary.without_caption for summary in summaries)
    if not missing:
        return []
    count = sum(summary.count for summary in summaries)
    others = sum((Counter(summary.other_captions) for summary in summaries), Counter())
    hint = ""
    if others:
        extension, found = others.most_common(1)[0]
        hint = f" {found} of them have a file ending in '{extension}': give --caption_extension {extension}."
        if not extension.startswith("."):
            hint = f" {found} of them have a file {extension}: rename it to NAME{subset.caption_extension}."
    looked_for = f"'{subset.caption_extension}' (--caption_extension)"
    if subset.metadata is not None:
        looked_for += f" or in {subset.metadata}"
    if missing == count:
        lies_there = " ".join([hint, *said[:NAMED]]).rstrip()
        raise InputError(
            f"{subset}: none of the {count} images has a caption. Looked for a file of the image's name ending in "
            f"{looked_for}; in shards also for 'caption' in the .json and the .parquet.{lies_there}"
        )
    pairs = zip(sources, summaries, strict=True)
    named = [source.name(key) for source, summary in pairs for key in summary.named_without_caption]
    return [
        f"{missing} of {count} images have no caption ending in {looked_for} and train with an empty one: "
        f"{first_few(named, missing)}.{hint}"
    ]
