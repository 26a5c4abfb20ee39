"""Flags as data: each is written once, as a field of its group, and all that knows flags walks one listing of them.

flag                what a flag is, the base of a group, and `Flags`, the listing of a script's
kinds               how a value is read from the command line and from files
command_line        a command line as values of flags, with all that is wrong in it
parser              --help of a script
parse               command line over configuration file over defaults, and the script's options out of them
values              the values of all flags out of a script's options
rules               what is checked before anything loads: `needs` of each flag, then each group's own rules
named_paths         whether what flags name is there
model_paths         whether the models that flags name are there, as far as is known without reading them
refused             flags of sd-scripts that are refused, with why and what to use
config_file         --config_file and --output_config
dataset_config      --dataset_config: several data sets, each of several subsets
saved_config        the configuration that a run had, written beside its output
read_config         a .toml or .json file as a table of keys and values
training            the groups that every training script has, together

and the groups, each with its rules:

model, text_encoders, sd        which model; its encoders; what SD 1.x and 2.x have alone
data                            where samples are and how they become batches; it has the next four
buckets, captions, images       how samples are prepared
validation                      what is held out, and when the loss on it is measured
caches, objective               encodings that are kept; what the U-Net learns to predict
optimizer, ema                  optimizer, rates and schedule; the moving average
precision, memory, compiling    how steps are computed
run, saving, states, logs       length and seed, checkpoints, training states, TensorBoard
preview, prompts                pictures that are sampled while training; the file of their prompts
"""
