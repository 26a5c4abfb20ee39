import numpy as np

from library.data.captions import CaptionOptions, process_caption

TAGS = "a cat,  red hat , blue sky, grass,sun"


def process(text, seed=0, **options):
    return process_caption(text, CaptionOptions(**options), np.random.default_rng(seed))


def test_without_options_a_caption_stays_as_it_is():
    assert process(f" {TAGS}\n") == TAGS


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
    assert process(TAGS, caption_dropout_rate=1.0) == ""


def test_the_same_random_numbers_give_the_same_caption_whatever_the_dropout_rate():
    kept = [process(TAGS, seed, shuffle_caption=True, caption_dropout_rate=0.5) for seed in range(30)]
    without = [process(TAGS, seed, shuffle_caption=True) for seed in range(30)]
    assert all(one in ("", other) for one, other in zip(kept, without, strict=True))
    assert "" in kept
