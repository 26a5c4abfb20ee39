from collections import Counter

import pytest

from library.data.bad_samples import check_left_out, kind, summary, too_many
from library.errors import InputError


@pytest.mark.parametrize(
    ("bad", "seen", "samples", "share", "stops"),
    [
        (1, 4, 10**6, 0.01, False),  # the first batch: 1 of 4, but 10 of the first 1,000 are allowed
        (10, 1000, 10**6, 0.01, False),
        (11, 12, 10**6, 0.01, True),
        (100, 10**4, 10**6, 0.01, False),
        (101, 10**4, 10**6, 0.01, True),
        (1, 4, 54, 0.01, True),  # 1 of 54 is over 1 % already
        (1, 4, 54, 0.02, False),
        (1, 1, 10**6, 0.0, True),
        (10**6, 10**6, 10**6, 1.0, False),
    ],
)
def test_the_share_that_stops(bad, seen, samples, share, stops):
    assert too_many(bad, seen, samples, share) == stops


def test_an_index_that_leaves_out_too_much_is_refused_with_the_reasons():
    left_out = [(f"0.tar:{number}", f"{number}×1 px is too small") for number in range(3)] + [("0.tar:x", "no image")]
    check_left_out(left_out, 396, 0.01)
    check_left_out([], 0, 0.0)
    with pytest.raises(InputError) as error:
        check_left_out(left_out, 395, 0.01)
    message = str(error.value)
    assert "--max_bad_samples 0.01: 4 of 399 samples (1.00%)" in message
    assert "3 × N×N px is too small; 1 × no image" in message
    assert "0.tar:0: 0×1 px is too small" in message


def test_reasons_are_counted_by_kind():
    assert kind("at 0x7f3a in position 12") == kind("at 0x11 in position 345") == "at N in position N"
    many = Counter({f"reason {letter}": 10 for letter in "abcdefgh"})
    assert "and 3 other reasons" in summary(80, 100, 0.5, many)
