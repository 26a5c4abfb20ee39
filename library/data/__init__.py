"""From shards and folders to micro-batches.

index/              which images there are: rows of where the bytes are, width, height, caption
order/              who sees what when: buckets, the plan, what is held out
sample/             one image's bytes to pixels, one caption's text to what is tokenized
stream/             shards that can only be read from their beginning
cache/              latents and text states that are computed once
dataset             a run's data in one place: index, buckets, plan and loader
training_set        what a trainer wants to know of its data, indexed or streamed
loader              micro-batches of one rank, read and decoded by worker processes
bad_samples         how many samples may be bad, and what is said where there are more
report              the lines about the data that are printed before training
contact_sheet       a page that shows what a run will see (--debug_dataset)
"""
