"""The environment in which a child process sees the simulated NPU.

From a test: `sys.path.insert(0, str(TEST_FOLDER))`, `from npu_sim.environment import environment`, then
`subprocess.run(..., env=environment())`. From a shell: `python test/npu_sim/environment.py COMMAND ARGUMENT ...`.
Only child processes see it: the variables put a package named torch_npu on their path.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if str(HERE.parent) not in sys.path:
    sys.path.insert(0, str(HERE.parent))

from npu_sim import build  # noqa: E402


def reason_to_skip() -> str | None:
    """Why the simulated NPU cannot run here, for pytest's skipif; None if it can."""
    return (
        None
        if build.compiler()
        else "the simulated NPU is built on first use and there is no C++ compiler (install g++)"
    )


# Names of the device by profile, as CANN has them: the first generation, Atlas A2 and Atlas A3.
PROFILES = {"910A": "Ascend910A", "910B": "Ascend910B3", "A3": "Ascend910_9391"}


def environment(devices: int = 8, base: Mapping[str, str] = os.environ, profile: str = "910B") -> dict[str, str]:
    """The variables of `base` and those with which a child sees `devices` NPUs. Builds the extension if need be.

    Args:
        profile: which Ascend the NPUs are, of PROFILES, unless `base` has a name for them.

    Raises:
        RuntimeError: it cannot be built.
    """
    path = [str(HERE / "site"), str(ROOT), *filter(None, [base.get("PYTHONPATH")])]
    return {
        **base,
        "PYTHONPATH": os.pathsep.join(path),
        "NPU_SIM_LIBRARY": str(build.library()),
        "NPU_SIM_DEVICES": str(devices),
        "NPU_SIM_NAME": base.get("NPU_SIM_NAME", PROFILES[profile]),
        "NPU_SIM_DATA": str(HERE),
        "OMP_NUM_THREADS": base.get("OMP_NUM_THREADS", "1"),  # tests run beside others, and the models are tiny
    }


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python test/npu_sim/environment.py COMMAND [ARGUMENT ...]")
    os.execvpe(sys.argv[1], sys.argv[1:], environment())
