"""The ground floor: artifact, store, shard, fingerprint, configuration, events."""
