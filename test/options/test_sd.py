"""The flags that the scripts for SD 1.x and SD 2.x have besides those of every script."""

from dataclasses import dataclass

import pytest

from library.options.caches import CacheOptions
from library.options.flag import Flags
from library.options.sd import SDOptions
from library.options.text_encoders import SDTextEncoderOptions


@dataclass(frozen=True)
class _Options:
    sd: SDOptions
    text_encoders: SDTextEncoderOptions
    caches: CacheOptions


def _options(**values) -> _Options:
    names = {"v2", "clip_skip"}
    return _Options(
        SDOptions(**{name: value for name, value in values.items() if name in names}),
        SDTextEncoderOptions(**{k: v for k, v in values.items() if k not in names and "cache" not in k}),
        CacheOptions(**{name: value for name, value in values.items() if "cache" in name}),
    )


def test_defaults_are_the_references():
    options = _options()
    assert (options.sd.v2, options.sd.clip_skip) == (False, None)
    assert (options.text_encoders.tokenizers, options.text_encoders.rates(2e-6)) == ((None,), (0.0,))
    names = {flag.name for flag in Flags(_Options)}
    assert {"v2", "clip_skip", "tokenizer_path", "train_text_encoder", "learning_rate_te"} <= names


def test_the_text_encoder_trains_at_its_own_rate_or_the_u_nets():
    assert _options(train_text_encoder=True).text_encoders.rates(2e-6) == (2e-6,)
    assert _options(train_text_encoder=True, learning_rate_te=1e-7).text_encoders.rates(2e-6) == (1e-7,)
    assert _options(train_text_encoder=True, learning_rate_te=0.0).text_encoders.rates(2e-6) == (0.0,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate_te": 1e-7}, "--learning_rate_te=1e-07 trains nothing without --train_text_encoder"),
        (
            {"train_text_encoder": True, "cache_text_encoder_outputs": True},
            "--cache_text_encoder_outputs keeps what text encoders give that --train_text_encoder changes",
        ),
    ],
)
def test_flags_that_cannot_go_together_are_refused(values, message):
    options = _options(**values)
    (said,) = options.text_encoders.check(options)
    assert message in said
