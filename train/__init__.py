"""From shards to a trained model."""
