"""The stream: shards -> batches, in an order that is a function of (seed, epoch, position) alone.

In the order that data flows: `shard_index` and `cache` find a sample's bytes, `order` says which sample comes when,
`buckets` which come together, to be cut to one shape, `reader` fetches it, `tar_sample` decodes it, `transform` makes a
training example of it, `dataset` and `loader` hand batches to the training loop.
"""
