"""The families of Stable Diffusion; `library.models.family` says what a family is.

sdxl                SDXL base
"""

from library.families.sdxl import SDXL as SDXL
from library.models.family import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (SDXL,)}
