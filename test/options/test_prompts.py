"""Sample prompt files: what users of the reference have written works, mistakes are named with their line."""

import hashlib
import json

import pytest

from library.errors import InputError
from library.options.prompts import SamplePrompt, read_prompts


def read(tmp_path, text, name="prompts.txt"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return list(read_prompts(path).prompts)


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
        ("\na --w wide", "p.txt", r"p.txt:2: --w takes a whole number"),
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
    (prompt,) = read_prompts(path).prompts
    assert (prompt.prompt, prompt.width) == ("a red ball", 64)


def test_all_that_is_wrong_in_a_file_is_named_at_once(tmp_path):
    texts = {
        "p.txt": "a --x 5 --w wide\nfine\n\nb --s 0 --ss unipc",
        "p.json": '[{"prompt": "a", "x": 5, "width": "wide"}, "fine", {"prompt": "b", "sample_steps": 0, '
        '"sample_sampler": "unipc"}]',
    }
    for name, text in texts.items():
        with pytest.raises(InputError) as error:
            read(tmp_path, text, name)
        said = [problem.split(name)[1] for problem in error.value.problems]
        places = [":1", ":1", ":4", ":4"] if name == "p.txt" else [", entry 1", ", entry 1", ", entry 3", ", entry 3"]
        assert [one.partition(": ")[0] for one in said] == places
        for one, word in zip(said, ("x", "wide", "unipc", "1 .. 1000"), strict=True):
            assert word in one


def test_a_line_ends_where_an_editor_ends_it(tmp_path):
    assert [each.prompt for each in read(tmp_path, "a\u2028b\x0cc\u0085d\r\ne\t--w 64\rf")] == [
        "a\u2028b\x0cc\u0085d", "e", "f",
    ]  # fmt: skip


def test_a_field_without_a_value_has_its_default(tmp_path):
    (prompt,) = read(tmp_path, '[{"prompt": "a", "seed": null, "sample_sampler": null}]', "p.JSON")
    assert prompt == SamplePrompt("a")


def test_the_file_is_read_once(tmp_path):
    """What is written into it while the run trains changes no picture, and the digest tells which text was read."""
    import sdxl_pretrain

    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n")
    words = ["--pretrained_model_name_or_path=m", "--output_dir=o", "--train_data_dir=d", "--resolution=64"]
    prompts = sdxl_pretrain.SCRIPT.options([*words, f"--sample_prompts={file}"]).preview.prompts
    file.write_text("a dog\n")
    assert [each.prompt for each in prompts.prompts] == ["a cat"]
    assert (
        str(prompts) == f"1 of {file}, as it is now (sha256 {hashlib.sha256(b'a cat' + bytes([10])).hexdigest()[:12]})"
    )
