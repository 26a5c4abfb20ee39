"""Model metadata after Stability's ModelSpec 1.0.0 (https://github.com/Stability-AI/ModelSpec)."""

import datetime
import json
from pathlib import Path

from library.errors import InputError

IMPLEMENTATION_STABILITY = "https://github.com/Stability-AI/generative-models"
IMPLEMENTATION_DIFFUSERS = "diffusers"
HASH_KEY = "modelspec.hash_sha256"
HASH_PLACEHOLDER = "0x" + "0" * 64  # as long as the hash that replaces it in a written file
_OPTIONAL = ("author", "description", "license", "tags", "merged_from", "timestep_range", "encoder_layer")


def modelspec(
    *,
    title: str,
    resolution_wh_px: tuple[int, int],
    prediction_type: str,
    date: datetime.datetime | None = None,
    **optional: str | None,
) -> dict[str, str]:
    """The `modelspec.*` entries of one model; architecture, implementation and hash are the writer's to add.

    Args:
        resolution_wh_px: the resolution trained for, written as WxH.
        prediction_type: "epsilon", or "v" or diffusers' "v_prediction".
        date: when it was made; now, in UTC, when None.
        optional: author, description, license, tags, merged_from, timestep_range, encoder_layer; None is left out.

    Raises:
        InputError: a prediction type that ModelSpec has no word for.
        TypeError: an optional entry that ModelSpec does not know.
    """
    unknown = sorted(set(optional) - set(_OPTIONAL))
    if unknown:
        raise TypeError(f"not in ModelSpec: {', '.join(unknown)}")
    kinds = {"epsilon": "epsilon", "v": "v", "v_prediction": "v"}
    if prediction_type not in kinds:
        raise InputError(f"prediction type {prediction_type!r} has no word in ModelSpec; it knows epsilon and v.")
    moment = date or datetime.datetime.now(datetime.timezone.utc)
    entries = {
        "sai_model_spec": "1.0.0",
        "title": title,
        "resolution": "{}x{}".format(*resolution_wh_px),
        "prediction_type": kinds[prediction_type],
        "date": moment.replace(microsecond=0, tzinfo=None).isoformat(),
        **{name: optional[name] for name in _OPTIONAL if optional.get(name) is not None},
    }
    return {f"modelspec.{name}": str(value) for name, value in entries.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in a safetensors file's header, without reading a tensor."""
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(header_size)).get("__metadata__", {})
