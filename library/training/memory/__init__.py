"""How much device memory a step needs.

step_memory         a run's step on shapes: its memory at a bucket, and which blocks are computed again
estimate            a step on shapes alone, and what it holds
resident            what one process holds of weights, gradients and optimizer state
meta_run            modules and steps without data, on torch's meta device
live_bytes          the bytes that tensors hold while operators run
checkpoint_policy   which blocks are computed again in backward
"""
