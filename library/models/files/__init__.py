"""Reading and writing models.

read                a model out of a diffusers folder, a single file or a hub name
write               a model to a single file or a diffusers folder
single_file         the names of one model's tensors in each kind of file
key_maps            Stability's names against diffusers' and transformers', both ways
infer_configs       configurations as far as the shapes in a single file tell them
kept_configs        what shapes do not tell: the published models', or a file's own metadata
noise_process       marks of another noise process, which are refused
kept_prediction     what a single file says about its prediction type and noise schedule
diffusers_config    a U-Net's configuration as diffusers keeps it
weight_files        tensors out of safetensors files and pickles
own_checkpoint      whether this project has written a checkpoint
modelspec           metadata after Stability's ModelSpec
layout              how many blocks and layers a model has, without reading weights
identify            what a file or folder is by its content: a model of which family, or something else
fit                 whether the parts of a model fit each other
tokenizers_here     tokenizers on this machine, which an error offers where one is missing
build               networks filled with tensors that were read, nothing initialised twice
hub                 of a model's repository on the hub, the files that training needs
"""
