"""Loading and saving SDXL models: the functions that scripts use."""

from library.models.checkpoint_read import load_sdxl, load_tokenizers, load_vae
from library.models.checkpoint_write import SAVE_FORMS, save_sdxl, saved_bytes

__all__ = ["SAVE_FORMS", "load_sdxl", "load_tokenizers", "load_vae", "save_sdxl", "saved_bytes"]
