"""The same subject in two different images: `sdd pairs`, over the committed shards of a dataset."""
