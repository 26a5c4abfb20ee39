"""Run diffusers' own SDXL example to the end of its first optimizer step; bench/end_to_end.py calls it.

    python bench/example_start.py PACKAGES train_text_to_image_sdxl.py ARGUMENT ...

PACKAGES is a folder with what the example needs and this project does not (`datasets`). The script runs as it is; a
hook of torch's optimizers prints the time after the first step and ends the process.
"""

import os
import runpy
import sys
import time

sys.path.append(sys.argv[1])

from torch.optim.optimizer import register_optimizer_step_post_hook


def _end(*_: object) -> None:
    print(f"first step ends {time.time()} {time.process_time()}", flush=True)
    os._exit(0)


register_optimizer_step_post_hook(_end)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
