"""Sample prompt files: what users of the reference have written works, mistakes are named with their line."""

import json

import pytest

from library.errors import InputError
from library.options.prompts import SamplePrompt, read_prompts


def read(tmp_path, text, name="prompts.txt"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_prompts(path)


def test_a_text_line_takes_options_in_any_case_and_order(tmp_path):
    assert read(
        tmp_path, "# comment\n\na red ball, 3-d --W 640 --h 517 --d 42 --s 20 --l 4.5 --n blurry, low quality"
        " --ss euler_a\nplain\n",
    ) == [
        SamplePrompt("a red ball, 3-d", "blurry, low quality", 640, 512, 42, 20, 4.5, "euler_a"),
        SamplePrompt("plain", "", 512, 512, None, 30, 7.5, None),
    ]  # fmt: skip


def test_json_and_toml_hold_the_same_fields(tmp_path):
    entry = {
        "prompt": "a cat",
        "width": 64,
        "height": 128,
        "seed": 1,
        "sample_steps": 5,
        "scale": 3,
        "negative_prompt": "dog",
    }
    expected = [SamplePrompt("a cat", "dog", 64, 128, 1, 5, 3, None)]
    assert read(tmp_path, json.dumps([entry]), "p.json") == expected
    text = '[prompt]\nwidth=64\nheight=128\nseed=1\n[[prompt.subset]]\nprompt="a cat"\nsample_steps=5\n'
    text += 'scale=3\nnegative_prompt="dog"\n'
    assert read(tmp_path, text, "p.toml") == expected


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "p.txt", "holds no prompt"),
        ("a --x 5", "p.txt", r"p.txt:1: option --x is not known"),
        ("\na --w wide", "p.txt", r"p.txt:2: --w takes a number"),
        ("a --ss unipc", "p.txt", "sampler 'unipc'"),
        ("a --s 0", "p.txt", "1 .. 1000"),
        ("a --w 8", "p.txt", "too small"),
        ("a --d -1", "p.txt", "seed"),
        ("a --l nan", "p.txt", "guidance scale"),
        ("{", "p.json", "is not JSON"),
        ('{"prompt": "a"}', "p.json", "must be a list"),
        ('[{"prompt": "a", "width": "64"}]', "p.json", "entry 1: width must be a number"),
        ('[{"prompt": "a", "colour": 1}]', "p.json", "field 'colour'"),
        ("[prompt]\n", "p.toml", r"\[\[prompt.subset\]\]"),
        ("[prompt", "p.toml", "is not TOML"),
    ],
)
def test_a_mistake_is_named(tmp_path, text, name, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, text, name)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"--sample_prompts .*none.txt"):
        read_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize("suffix", [".txt", ".toml", ".json"])
def test_a_mark_before_the_text_is_no_part_of_a_prompt(tmp_path, suffix):
    texts = {
        ".txt": "a red ball --w 64",
        ".toml": '[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = "a red ball"\n',
        ".json": '[{"prompt": "a red ball", "width": 64}]',
    }
    path = tmp_path / f"prompts{suffix}"
    path.write_text("\ufeff" + texts[suffix], encoding="utf-8")
    (prompt,) = read_prompts(path)
    assert (prompt.prompt, prompt.width) == ("a red ball", 64)
