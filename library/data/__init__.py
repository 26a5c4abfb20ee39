"""From shards and folders to micro-batches.

index/              which images there are: rows of where the bytes are, width, height, caption
order/              who sees what when: buckets, the plan, what is held out
sample/             one image's bytes to pixels, one caption's text to what is tokenized
stream/             shards that can only be read from their beginning
cache/              latents and text states that are computed once
dataset             a run's data in one place: index, buckets, plan and loader
training_set        what a trainer wants to know of its data, indexed or streamed
micro_batch         what goes through the model together, and which part of a global batch is whose
indexed_batches     micro-batches of one rank out of an index
loader              micro-batches read ahead by worker processes
caption_text        a caption out of the bytes of its file: encodings, lines, JSON
image_formats/      size, orientation and colour profile of each kind of image, read from its bytes
image_header        an encoded image's size, and whether it can be decoded at a bearable cost
fit                 how an image meets its bucket: scaled, cut out, mirrored
bad_samples         samples that cannot be used, how many may be so, and what is said where there are more
report              the lines about the data that are printed before training
contact_sheet       a page that shows what a run will see (--debug_dataset)
"""
