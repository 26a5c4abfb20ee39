"""The page of --debug_dataset: what it shows, and that nothing in it can act or reach out."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import torch
from PIL import Image

from library.data.contact_sheet import MOST_SAMPLES, TITLE, write_contact_sheet
from library.data.micro_batch import MicroBatch

NASTY = """<script>alert(1)</script> "quoted" & 'so' <img src=x onerror=alert(1)>"""


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data + "\n"


def batch_of(count, step=0, captions=None, **more):
    colours = np.random.default_rng(step).integers(0, 256, (count, 1, 1, 3), dtype=np.uint8)
    images = np.broadcast_to(colours, (count, 32, 48, 3)).copy()
    return MicroBatch(
        torch.from_numpy(images),
        captions or ["a cat"] * count,
        torch.tensor([[100, 200, 3, 7, 32, 48]] * count, dtype=torch.float32),
        [f"data/{step}_{number}.jpg" for number in range(count)],
        step,
        0,
        torch.arange(count),
        mirrored=[number % 2 == 1 for number in range(count)],
        **more,
    )


def words(captions):
    return [len(caption.split()) for caption in captions]


def written(tmp_path, batches, most=5):
    page = tmp_path / "debug_dataset" / "index.html"
    shown = write_contact_sheet(page, iter(batches), words, most)
    return shown, page.read_text(encoding="utf-8")


def test_each_sample_is_shown_with_what_it_is_trained_with(tmp_path):
    masks = torch.full((2, 32, 48), 255, dtype=torch.uint8)
    masks[1, :, :24] = 0
    batch = batch_of(2, 4, ["one two three", "a b c d e f g"], extras={"mask": masks})
    shown, text = written(tmp_path, [batch])
    page = Page(text)
    assert shown == 2
    assert text.count(f"<title>{TITLE}</title>") == 1
    for told in ("data/4_0.jpg", "4, 1", "48×32", "200×100", "left 7, top 3", "100, 200, 3, 7, 32, 48", "3 of 5"):
        assert told in page.text, told
    assert "7 of 5" in page.text and "(2 cut off)" in page.text
    flips = re.findall(r"flip\n(yes|no)", page.text)
    assert flips == ["no", "yes"]
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    decoded = [Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))) for picture in pictures]
    assert [image.size for image in decoded] == [(48, 32)] * 4  # picture, mask, picture, mask
    assert np.abs(np.asarray(decoded[0], float) - batch.images_BHWC[0].numpy()).mean() < 3
    assert np.asarray(decoded[3])[:, :20].max() < 10 and np.asarray(decoded[3])[:, 30:].min() > 245


def test_nothing_in_names_captions_and_reasons_is_taken_for_html(tmp_path):
    batch = batch_of(1, 0, [NASTY], quarantined=[(NASTY, NASTY)])
    batch.names = [NASTY]
    _, text = written(tmp_path, [batch])
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert not [attributes for _, attributes in page.tags if "onerror" in attributes]
    assert page.text.count("alert(1)") == 8  # four times the text, as text
    assert not re.search(r"https?:|//|url\(|@import", text.replace(NASTY, ""))
    assert "default-src 'none'" in text


def test_no_more_samples_are_shown_or_asked_for_than_the_first_hundred(tmp_path):
    asked = []

    def endless():
        for step in range(1000):
            asked.append(step)
            yield batch_of(30, step)

    shown, text = written(tmp_path, endless())
    assert shown == MOST_SAMPLES == 100
    assert asked == [0, 1, 2, 3]
    assert "data/3_9.jpg" in text and "data/3_10.jpg" not in text


def test_an_empty_caption_is_said_to_be_one(tmp_path):
    _, text = written(tmp_path, [batch_of(1, captions=[""])])
    assert "<em>empty</em>" in text
