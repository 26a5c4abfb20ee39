"""The families of Stable Diffusion; `library.models.family` says what a family is.

sd1                 SD 1.4 and 1.5
sd2                 SD 2.0 and 2.1, the base models and the 768-v ones
sdxl                SDXL base
"""

from library.families.sd1 import SD1 as SD1
from library.families.sd2 import SD2 as SD2
from library.families.sdxl import SDXL as SDXL
from library.models.family import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (SD1, SD2, SDXL)}
