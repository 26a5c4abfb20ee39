"""Who sees what when.

plan                the rows of every micro-batch, as a pure function of the seed and the step
permutation         a keyed shuffle that is computed entry by entry
buckets             which bucket an image goes to, and how it is scaled and cropped for it
bucket_rows         which rows of an index are in which bucket
row_fit             how the image of a row meets its bucket, by the size that the index has of it
held_out            images that are held out from training, to measure the loss on
regularisation      how many samples a pass takes of regularisation images
"""
