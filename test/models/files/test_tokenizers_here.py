"""A single file without tokenizers, offline: the error offers those that lie beside it or in the hub's cache."""

import shutil

import pytest

from library.errors import InputError
from library.families import SD1, SDXL
from library.models.files.read import load_model, load_tokenizers
from library.models.files.write import save_model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, which cannot be reached."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def single(sdxl, tmp_path):
    (tmp_path / "models").mkdir()
    return save_model(sdxl, tmp_path / "models" / "last", "safetensors")


def _put(tokenizer, folder):
    tokenizer.save_pretrained(folder)


def test_without_any_the_error_says_what_is_wanted(single, cache):
    with pytest.raises(InputError) as raised:
        load_model(str(single), SDXL)
    said = str(raised.value)
    usual = SDXL.encoders[0].tokenizer
    assert said.startswith(f"{single}: a single file has no tokenizer of its own. --tokenizer1_path {usual}: ")
    assert "(a folder with tokenizer.json, or with vocab.json and merges.txt)" in said
    assert "a single file)" not in said and "On this machine" not in said


def test_those_beside_the_model_and_in_the_cache_are_offered_and_are_right(single, cache, tokenizers):
    beside = single.parent / "base" / "tokenizer"
    cached = cache / "models--owner--sdxl" / "snapshots" / "1234" / "tokenizer"
    for folder in (beside, cached):
        _put(tokenizers[0], folder)
    (single.parent / "bert").mkdir()
    (single.parent / "bert" / "tokenizer.json").write_text("{}")
    (single.parent / "bert" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(InputError) as raised:
        load_model(str(single), SDXL)
    offered = f"On this machine are: --tokenizer1_path={beside}, --tokenizer1_path={cached}."
    assert str(raised.value).endswith(offered)
    with pytest.raises(InputError, match=rf"--tokenizer2_path={beside}"):
        load_tokenizers(str(single), SDXL, (str(beside), None))
    first, second = load_model(str(single), SDXL, tokenizers=(str(beside), str(cached))).tokenizers
    assert (first.pad_token_id, second.pad_token_id) == (first.eos_token_id, 0)


def test_each_encoder_is_offered_its_own_folder(single, cache, tokenizers):
    for name, tokenizer in zip(("tokenizer", "tokenizer_2"), tokenizers, strict=True):
        _put(tokenizer, single.parent / name)
    with pytest.raises(InputError, match=rf"are: --tokenizer2_path={single.parent / 'tokenizer_2'},"):
        load_tokenizers(str(single), SDXL, (str(single.parent / "tokenizer"), None))


def test_a_copy_of_the_usual_one_under_its_name_is_taken(single, cache, tokenizers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _put(tokenizers[0], tmp_path / SD1.encoders[0].tokenizer)
    shutil.copytree(tmp_path / "openai", tmp_path / "laion")
    (tmp_path / "laion" / "clip-vit-large-patch14").rename(tmp_path / SDXL.encoders[1].tokenizer)
    assert len(load_tokenizers(str(single), SDXL)) == 2
