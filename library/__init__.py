"""What the training scripts share. Imports go one way: scripts, training, generation, data and models, options,
diffusion, then the modules without a folder; a layer imports only those behind it.

    script              a script: its flags, and the patches and signals around what it trains
    options/            flags and configuration files, a module for each group of flags
    training/           the loop, and everything that a run consists of
    generation/         pictures: guidance, sampling
    families/           Stable Diffusion's families, as data
    data/               from shards and folders to micro-batches
    models/             U-Net, text encoders, VAE, and the files they come from and go to
    diffusion/          noise schedules, prediction types, samplers
    processes/          several processes on one or several machines

and the modules that every layer may import:

    device              the only module that knows Ascend NPUs, NVIDIA GPUs and the CPU apart
    address             URLs and pipes that data come from
    atomic_write        files and folders that appear whole or not at all
    own_folder          which files of a folder this project has written, so that only those are deleted
    c_stderr            what C code writes to stderr during a call
    disk_space          whether a file system can hold what is about to be written
    exit_status         how a script ends: errors as one line, and statuses that a launcher can rely on
    errors              the exceptions that end a script with a message for the user
    file_kind           what a file is by its first bytes: weights, or what was saved in their place
    finite              whether tensors hold finite numbers alone
    hub                 downloads from the Hugging Face hub
    imports             imports that are deferred until their names are used
    keyed_random        random numbers as a pure function of seed, purpose and counters
    redaction           texts without the secrets of addresses, commands and the environment
    restart_command     the command by which a run that was stopped goes on
    progress_bar        progress bars that do no harm where nobody reads them any more
    signals             SIGTERM, SIGINT, SIGHUP and SIGUSR1 as flags that long work checks
    tensor_file         the safetensors format as a stream
    user_text           texts that users write, with or without a byte-order mark
"""
