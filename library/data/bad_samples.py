"""Samples that cannot be used: how many of a data set may be so, and what is said where there are more."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from library.errors import InputError

_JUDGED_FROM = 1000  # samples: a share of fewer would say little
_NAMED = 5


class SampleError(Exception):
    """A sample that cannot be used; the message is the reason. The caller puts another in its place."""


def too_many(bad: int, seen: int, samples: int, max_share: float) -> bool:
    """Whether a run has met more bad samples than it may.

    The share is that of the samples seen, taken as at least 1,000, or all where there are fewer: one bad sample in the
    first batch is no large share yet.

    Args:
        bad: of those seen, how many could not be used.
        seen: samples planned so far; one counts in each epoch.
        samples: of an epoch.
        max_share: --max_bad_samples.
    """
    return bad > max_share * max(seen, min(samples, _JUDGED_FROM))


def check_left_out(
    left_out: Iterable[tuple[str, str]], indexed: int, max_share: float, unnamed: Mapping[str, int] | None = None
) -> None:
    """Refuse a data set of which the index had to leave out too much.

    Args:
        left_out: (name, reason) of samples that cannot be used.
        indexed: samples that can.
        unnamed: how many more cannot be used, by reason.

    Raises:
        InputError: they are too many; the message has the reasons and how often each holds.
    """
    pairs = list(left_out)
    count = len(pairs) + sum((unnamed or {}).values())
    if count <= max_share * (count + indexed):
        return
    some = "; ".join(f"{name}: {reason}" for name, reason in pairs[:_NAMED])
    reasons = Counter(kind(reason) for _, reason in pairs)
    for reason, more in (unnamed or {}).items():
        reasons[kind(reason)] += more
    raise InputError(f"{summary(count, count + indexed, max_share, reasons)} The first: {some}")


def summary(bad: int, of: int, max_share: float, reasons: Counter[str]) -> str:
    """What a run that stops says: how many, why, and what to do."""
    listed = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(_NAMED))
    more = f"; and {len(reasons) - _NAMED} other reasons" if len(reasons) > _NAMED else ""
    return (
        f"--max_bad_samples {max_share:g}: {bad} of {of} samples ({bad / max(of, 1):.2%}) cannot be used: "
        f"{listed}{more}. Mend or remove them, fetch their shards again, or allow a larger share."
    )


def kind(reason: str) -> str:
    """A reason without its numbers, so that like ones can be counted together."""
    return re.sub(r"0x[0-9a-fA-F]+|\d+", "N", reason)
