"""The training loop and all that a run is made of.

run                 from options to a finished run: what every script does around its task, in one order
loop                the loop: train, train_step, loss
counters            what a step did, what the loop has counted, the figures of a run
build               from options to the parts of a run: model, recipe, placement, encoders, objective, task
task                what the loop does with a batch: its loss, checkpoints, pictures
identity            what a run learns: facts and digests that ranks compare and states hold
objective           what a prediction is trained towards, and how far it is from it
recipes/            what trains, and how a prediction is made
encoders            what encodes and does not train: the VAE, and text encoders whose outputs are cached
cache_filling       VAE and text encoders run once over all samples, before training
validation          the loss on images that are held out
preview             pictures sampled while training
due                 what is due after a step: checkpoints, previews
step_profile        a trace of some steps by the device's profiler (--profile)
cadence             how often something is due
rules               rules of options that hang on the device, on torch's optimizers or on the data
inputs              the files and folders that a run reads, as its flags name them
written_names       the names that a run writes, by kind
output_names        those names against what the run reads and what lies there, before anything is loaded
output_folder       the output folder, looked at beforehand, and the figures at the end
engine/             optimizers, precision, sharding, and how a step saves memory
ranks/              what the processes of a run tell each other
state/              training states: writing, choosing, resuming
memory/             how much device memory a step needs, found by running it on shapes
log/                metrics, the lines at the start and at the end, the list of bad samples
"""
