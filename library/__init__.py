"""What the training scripts share. Imports go one way: scripts, training, generation, data and models, options,
diffusion, ground; a layer knows those behind it alone.

    script              what stands around every script's work: logging and exit statuses
    options/            flags and configuration files, a module for each group of flags
    training/           the loop, and all that a run is made of
    generation/         prompts of pictures
    data/               from shards and folders to micro-batches
    models/             U-Net, text encoders, VAE, and the files they come from and go to
    diffusion/          noise schedules, prediction types, samplers
    processes/          several processes on one or several machines

and the ground, each a file:

    device              the only module that knows Ascend NPUs, NVIDIA GPUs and the CPU apart
    address             URLs and pipes that data come from
    atomic_write        files and folders that appear whole or not at all
    disk_space          whether a file system can hold what is about to be written
    errors              the exceptions that end a script in order
    hub                 downloads from the Hugging Face hub
    imports             quick imports at a start
    keyed_random        random numbers as a pure function of what they are for
    signals             SIGTERM, SIGINT and SIGUSR1 as flags that long work asks for
    tensor_file         the safetensors format as a stream
"""
