"""How weights are updated, in which precision, where they lie.

optimizers          optimizers and learning-rate schedules by name
precision           mixed precision: one Accelerator that means the same on every device
loss_scale          the loss scaler's state, and agreement of all processes on an overflow
group_entries       what optimizers keep in their groups, and steps for some parameters at a time
by_element          whether an optimizer updates each number by itself, found by trying
trials              whether an optimizer can be trained with exactly, found by trying
placement           where a module lies and in which precision: devices, casts, swapped blocks, compiling
sharding            what each process holds of weights, gradients and optimizer state
fused_backward      parameters are updated in backward (--fused_backward_pass)
block_swap          blocks whose weights live in the CPU's memory (--blocks_to_swap)
swapped_backward    gradients and updates of swapped blocks
swap_schedule       which blocks are swapped, and which is wanted next
ema                 moving averages of what trains
bf16_update         weights, gradients and states in bf16 (--full_bf16)
rounding            rounding fp32 to bf16 up or down at random
meta_copy           copies of modules without data
compiling           whether the backend of --torch_compile works on this machine
"""
