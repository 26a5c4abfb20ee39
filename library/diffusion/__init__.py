"""Noise schedules, prediction types and samplers, as functions without state.

schedule            the noise schedule, and what the network learns to predict
samplers            samplers by the names that flags use, as diffusers' schedulers
masks               masks of images as weights of the loss
random_draws        the random numbers of a training step
"""
