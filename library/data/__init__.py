"""From shards and folders to micro-batches: index, buckets, captions, plan, decode, loader."""
