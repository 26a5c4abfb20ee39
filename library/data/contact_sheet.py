"""A page that shows what a run will see: thumbnails of its first samples with all that goes into training with them."""

import base64
import html
import io
import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from library.atomic_write import write_file
from library.data.micro_batch import MicroBatch
from library.data.sample.extra_images import MASK

logger = logging.getLogger(__name__)

MOST_SAMPLES = 100
TITLE = "what the run will see"
_THUMBNAIL_PX = 256
# Nothing is fetched, whatever a caption or a name holds.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 14px/1.4 sans-serif; margin: 2em; background: #f4f4f4; color: #222; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 1em; }}
article {{ background: #fff; padding: .6em; overflow-wrap: anywhere; }}
img {{ max-width: 100%; display: block; margin-bottom: .4em; }}
dl {{ display: grid; grid-template-columns: auto 1fr; gap: 0 .6em; margin: .4em 0; }}
dt {{ color: #777; }}
dd {{ margin: 0; }}
.cut {{ color: #b00; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
{left_out}<main>
{samples}
</main>
</body>
</html>
"""


def write_contact_sheet(
    target: Path, batches: Iterable[MicroBatch], count_tokens: Callable[[Sequence[str]], list[int]], most_tokens: int
) -> int:
    """Write the page over the first samples, complete or not at all; returns how many it shows.

    Args:
        target: the page's file.
        batches: in the order of training; no more are asked for than are shown.
        count_tokens: of captions.
        most_tokens: of a caption that train.
    """
    entries: list[str] = []
    left_out: list[tuple[str, str]] = []
    for batch in batches:
        shown = min(len(batch), MOST_SAMPLES - len(entries))
        tokens = count_tokens(batch.captions[:shown])
        entries += [_sample(batch, number, tokens[number], most_tokens) for number in range(shown)]
        left_out += batch.quarantined
        if len(entries) >= MOST_SAMPLES:
            break
    page = _PAGE.format(
        title=TITLE,
        summary=f"The first {len(entries)} samples in the order of training.",
        left_out=_left_out(left_out),
        samples="\n".join(entries),
    )
    write_file(target, lambda path: path.write_text(page, encoding="utf-8"))
    logger.info("--debug_dataset: %d samples in %s; nothing was trained", len(entries), target)
    return len(entries)


def _sample(batch: MicroBatch, number: int, tokens: int, most_tokens: int) -> str:
    """One sample's thumbnail and facts."""
    height, width, top, left, target_h, target_w = (int(value) for value in batch.size_ids_B6[number].tolist())
    name, caption = batch.names[number], batch.captions[number]
    cut = f' <span class="cut">({tokens - most_tokens} cut off)</span>' if tokens > most_tokens else ""
    facts = {
        "name": html.escape(name),
        "step, place": f"{batch.step}, {int(batch.places_B[number])}",
        "bucket": f"{target_w}×{target_h}",
        "original": f"{width}×{height}",
        "crop": f"left {left}, top {top}",
        "size ids": f"{height}, {width}, {top}, {left}, {target_h}, {target_w}",
        "flip": "yes" if batch.mirrored and batch.mirrored[number] else "no",
        "caption": html.escape(caption) if caption else "<em>empty</em>",
        "tokens": f"{tokens} of {most_tokens}{cut}",
    }
    assert batch.images_BHWC is not None  # the sheet is made before there are caches
    pictures = _picture(batch.images_BHWC[number].numpy(), "as trained")
    for extra, images in batch.extras.items():
        pictures += _picture(images[number].numpy(), "mask: black does not count" if extra == MASK else extra)
    listed = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in facts.items())
    return f"<article>{pictures}<dl>{listed}</dl></article>"


def _picture(pixels: np.ndarray, what: str) -> str:
    """A thumbnail within the page."""
    image = Image.fromarray(pixels)
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    encoded = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{what}" title="{what}" src="data:image/jpeg;base64,{encoded}">'


def _left_out(quarantined: Sequence[tuple[str, str]]) -> str:
    """The samples that could not be read, and were replaced by those that are shown."""
    if not quarantined:
        return ""
    listed = "".join(
        f"<li>{html.escape(name)}: {html.escape(reason)}</li>" for name, reason in islice(quarantined, MOST_SAMPLES)
    )
    return f"<p>Could not be used, and others of their bucket are shown in their place:</p>\n<ul>{listed}</ul>\n"
