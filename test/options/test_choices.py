"""The values that a flag names are those that the code behind it has."""

from library.data.sample.scaling import FILTERS
from library.diffusion.samplers import NAMES
from library.options.images import INTERPOLATIONS
from library.options.optimizer import LR_SCHEDULERS, SHARDINGS
from library.options.precision import MIXED_PRECISIONS
from library.options.saving import SAVE_PRECISIONS
from library.training.engine.precision import DTYPES, SAVE_DTYPES
from library.training.engine.sharding import KINDS


def test_every_choice_is_built_and_everything_built_is_a_choice():
    from diffusers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    assert set(MIXED_PRECISIONS) == set(DTYPES)
    assert {*SAVE_PRECISIONS, None} == set(SAVE_DTYPES)
    assert set(SHARDINGS) == set(KINDS)
    assert set(INTERPOLATIONS) == set(FILTERS)
    assert set(LR_SCHEDULERS) <= {kind.value for kind in TYPE_TO_SCHEDULER_FUNCTION}
    assert len(set(NAMES)) == len(NAMES)
