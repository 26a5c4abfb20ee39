"""Captions as they are trained: every option alone, their order, and properties that hold for all of them together."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.sample.captions import CaptionChanges, fill_wildcards, process_caption, tags_shown

TAGS = "a cat,  red hat , blue sky, grass,sun"


def process(text, seed=0, step=0, epoch=0, **options):
    return process_caption(text, CaptionChanges(**options), np.random.default_rng(seed), step, epoch)


def test_without_options_a_caption_stays_as_it_is():
    assert process(f" {TAGS}\n") == TAGS
    assert process("{a|b} ||| c;;;d") == "{a|b} ||| c;;;d"


def test_shuffling_keeps_all_tags_and_the_first_ones_in_place():
    results = {process(TAGS, seed, shuffle_caption=True, keep_tokens=2) for seed in range(50)}
    assert len(results) == 6  # all orders of the last three
    for result in results:
        assert result.startswith("a cat, red hat, ")
        assert sorted(result.split(", ")) == sorted(tag.strip() for tag in TAGS.split(","))


def test_shuffling_without_kept_tags_moves_the_first_one_too():
    assert len({process(TAGS, seed, shuffle_caption=True).split(", ")[0] for seed in range(50)}) == 5


def test_another_separator_leaves_commas_alone():
    assert process("one, two;three;", shuffle_caption=True, keep_tokens=9, caption_separator=";") == "one, two, three"


def test_dropout_empties_its_share_of_captions():
    dropped = sum(process(TAGS, seed, caption_dropout_rate=0.25) == "" for seed in range(2000))
    assert 420 < dropped < 580
    assert process(TAGS, caption_dropout_rate=1.0, caption_prefix="p", caption_suffix="s") == ""


def test_the_same_random_numbers_give_the_same_caption_whatever_the_dropout_rate():
    kept = [process(TAGS, seed, shuffle_caption=True, caption_dropout_rate=0.5) for seed in range(30)]
    without = [process(TAGS, seed, shuffle_caption=True) for seed in range(30)]
    assert all(one in ("", other) for one, other in zip(kept, without, strict=True))
    assert "" in kept


def test_every_nth_epoch_is_without_captions_and_the_first_one_is_number_1():
    dropped = [process(TAGS, epoch=epoch, caption_dropout_every_n_epochs=3) == "" for epoch in range(7)]
    assert dropped == [False, False, True, False, False, True, False]
    assert all(process(TAGS, epoch=epoch, caption_dropout_every_n_epochs=1) == "" for epoch in range(3))


def test_prefix_and_suffix_belong_to_the_first_and_the_last_tag():
    assert process("cat", caption_prefix="photo of", caption_suffix="outside") == "photo of cat outside"
    result = process(TAGS, 1, caption_prefix="photo of", shuffle_caption=True, keep_tokens=1)
    assert result.startswith("photo of a cat, ")
    assert process("", caption_prefix="photo", caption_suffix="outside") == "photo outside"


def test_tags_before_the_separator_and_behind_the_second_are_kept():
    caption = "1girl, hat ||| sky, grass, sun ||| sketch, best"
    options = {"keep_tokens_separator": "|||", "keep_tokens": 4}
    results = {process(caption, seed, shuffle_caption=True, **options) for seed in range(60)}
    middles = {
        f"1girl, hat, {', '.join(order)}, sketch, best" for order in itertools.permutations(("sky", "grass", "sun"))
    }
    assert results == middles
    assert process(caption, caption_tag_dropout_rate=1, **options) == "1girl, hat, sketch, best"
    assert process(caption, **options) == "1girl, hat, sky, grass, sun, sketch, best"  # it is no text to train on
    assert process("a, b ||| c", shuffle_caption=True, **options) == "a, b, c"


def test_without_its_separator_in_a_caption_keep_tokens_counts():
    results = {
        process(TAGS, seed, shuffle_caption=True, keep_tokens=4, keep_tokens_separator="|||") for seed in range(9)
    }
    assert results == {"a cat, red hat, blue sky, grass, sun"}


def test_tags_that_are_bound_are_shuffled_and_dropped_as_one():
    results = {process("a;;;b;;;c, d, e", seed, shuffle_caption=True, secondary_separator=";;;") for seed in range(60)}
    assert results == {", ".join(order) for order in itertools.permutations(("a,b,c", "d", "e"))}
    options = {"secondary_separator": ";;;", "caption_tag_dropout_rate": 0.5}
    assert {process("a;;;b", seed, **options) for seed in range(20)} == {"a,b", ""}
    assert process("a;;;b", secondary_separator=";;;", caption_separator="/") == "a/b"


def test_tag_dropout_leaves_out_its_share_of_what_is_not_kept():
    tags = [f"tag{number}" for number in range(10)]
    results = [process(",".join(tags), seed, caption_tag_dropout_rate=0.3, keep_tokens=2) for seed in range(1000)]
    left = Counter(tag for result in results for tag in result.split(", "))
    assert left["tag0"] == left["tag1"] == 1000
    assert all(640 < left[tag] < 760 for tag in tags[2:])
    assert all(result.split(", ") == [tag for tag in tags if tag in result.split(", ")] for result in results)


def test_token_warm_up_shows_more_and_more_tags_from_the_first_on():
    options = {"token_warmup_min": 2, "token_warmup_steps": 10}
    shown = [process("a,b,c,d,e", step=step, **options) for step in range(12)]
    assert shown[0] == "a, b"
    assert [len(caption.split(", ")) for caption in shown] == [
        2,
        2,
        2,
        2,
        3,
        3,
        3,
        4,
        4,
        4,
        5,
        5,
    ]  # 2 + floor(3·step/10)
    assert process("a,b,c,d,e", 3, step=5, shuffle_caption=True, **options) in (
        ", ".join(order) for order in itertools.permutations("abc")
    )
    assert process("a,b,c,d,e", token_warmup_min=0, token_warmup_steps=10) == ""
    assert process("a,b,c,d,e", keep_tokens=3, **options) == "a, b, c"
    assert process("a,b,c,d ||| e ||| f,g", keep_tokens_separator="|||", **options) == "a, b, c, d, f, g"


def test_one_line_of_several_and_one_of_the_alternatives_are_taken():
    text = "a {red|blue} cat\n\n  a dog, {{literally}} \n"
    results = Counter(process(text, seed, enable_wildcard=True) for seed in range(4000))
    assert set(results) == {"a red cat", "a blue cat", "a dog, {literally}"}
    assert 1880 < results["a dog, {literally}"] < 2120
    assert abs(results["a red cat"] - results["a blue cat"]) < 190
    assert process(text) == "a {red|blue} cat"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0c", "\x0b", "\x1c", "\x1d", "\x1e"])
def test_only_line_feeds_and_carriage_returns_end_a_line(separator):
    assert process(f"a cat{separator}sits on a mat") == "a cat sits on a mat"
    for end in ("\n", "\r\n", "\r", f"{separator}\n"):
        assert process(f"{end}a cat{end}sits") == "a cat"


def test_prefix_and_suffix_go_with_whichever_line_is_taken():
    found = {
        process("a\nb", seed, enable_wildcard=True, caption_prefix="{p|q}", caption_suffix="s") for seed in range(40)
    }
    assert found == {f"{prefix} {line} s" for prefix in "pq" for line in "ab"}


@pytest.mark.parametrize(
    ("text", "results"),
    [
        ("{a|b|}", {"a", "b", ""}),
        ("{a|{b|c} d}", {"a", "b d", "c d"}),
        ("{a", {"{a"}),
        ("a}|b", {"a}|b"}),
        ("{}", {"{}"}),
        ("{{a|b}}", {"{a|b}"}),
        ("{a|{b|c}}", {"a", "b", "c"}),
        ("{{a|b}|c}", {"a", "b", "c"}),
        ("{{a|b}|{c|d}}", set("abcd")),
        ("{x|{{y}}}", {"x", "{y}"}),
        ("{{{a|b}}}", {"{a}", "{b}"}),
        ("{{ and }}", {"{ and }"}),
        ("}} and {{", {"} and {"}),
        ("{{{{a}}}}", {"{{a}}"}),
        ("{x, y|z}, w", {"x, y, w", "z, w"}),
    ],
)
def test_wildcards(text, results):
    assert {fill_wildcards(text, np.random.default_rng(seed)) for seed in range(60)} == results


def test_no_caption_keeps_a_worker_busy_for_long():
    began = time.process_time()
    for text in ("{a|" * 300_000, "{" * 1_000_001, "{a|b}" * 200_000, "{a" * 100_000 + "}" * 100_000):
        process(text, enable_wildcard=True, shuffle_caption=True)
    assert time.process_time() - began < 10


NAMES = st.text("abcdefg ", min_size=1, max_size=6).map(str.strip).filter(bool)


@given(
    tags=st.lists(NAMES, max_size=12, unique=True),
    parts=st.none() | st.tuples(st.integers(0, 12), st.integers(0, 12)),
    options=st.builds(
        CaptionChanges,
        shuffle_caption=st.booleans(),
        keep_tokens=st.integers(0, 5),
        caption_tag_dropout_rate=st.sampled_from([0.0, 0.4, 1.0]),
        token_warmup_min=st.integers(0, 4),
        token_warmup_steps=st.sampled_from([0.0, 7.0, 7.5]),
        keep_tokens_separator=st.just("|||"),
        secondary_separator=st.just(";;;"),
        enable_wildcard=st.booleans(),
    ),
    step=st.integers(0, 9),
    seed=st.integers(0, 2**32),
)
def test_no_tag_is_doubled_or_made_up_and_kept_ones_stay(tags, parts, options, step, seed):
    """Kept ones stand first or last, in order; of the others each is there once, unless options leave it out."""
    if parts is None:
        text, first, loose, last = ", ".join(tags), tags[: options.keep_tokens], tags[options.keep_tokens :], []
    else:
        low, high = sorted(parts)
        first, loose, last = tags[:low], tags[low:high], tags[high:]
        text = " ||| ".join(map(", ".join, (first, loose, last)))
    result = process_caption(text, options, np.random.default_rng(seed), step, 0)
    found = result.split(", ") if result else []
    assert found[: len(first)] == first
    assert found[len(found) - len(last) :] == last
    middle = found[len(first) : len(found) - len(last)]
    shown = loose[: max(0, tags_shown(len(first) + len(loose), options, step) - len(first))]
    assert set(middle) <= set(shown)
    assert len(set(middle)) == len(middle)
    if not options.caption_tag_dropout_rate:
        assert sorted(middle) == sorted(shown)
    if not options.shuffle_caption:
        assert middle == [tag for tag in shown if tag in middle]


@given(tags=st.integers(0, 300), least=st.integers(0, 50), steps=st.floats(1, 1e6), step=st.integers(0, 10**6))
def test_warm_up_never_goes_back_and_ends_with_all_tags(tags, least, steps, step):
    options = CaptionChanges(token_warmup_min=least, token_warmup_steps=steps)
    now, then = tags_shown(tags, options, step), tags_shown(tags, options, step + 1)
    assert min(least, tags) <= now <= then <= tags
    assert tags_shown(tags, options, int(steps) + 1) == tags
