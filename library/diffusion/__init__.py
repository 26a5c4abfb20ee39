"""Noise schedules, prediction types and samplers, which know no network.

schedule            the noise schedule, and what the network learns to predict
samplers            samplers by the names that flags use; most are diffusers' schedulers
ddim                DDIM and PLMS, which go along a list of timesteps
masks               masks of images as weights of the loss
random_draws        the random numbers of a training step
"""
