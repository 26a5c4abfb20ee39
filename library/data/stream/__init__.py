"""Shards that can only be read from their beginning: on web servers, in object stores, out of commands.

streamed_set        the data of a run that streams
reader              what one reader of a stream does: batches out of shards
shard_samples       the samples of one shard, in its order
shard_bytes         the bytes of one shard, in order; what breaks off goes on there
sample_counts       how many samples shards have, where files beside them say so
probe               a look into the first shard before training
"""
