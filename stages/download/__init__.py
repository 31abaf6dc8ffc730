"""download: original bytes, captions and provenance out of a source, into raw shards that keep still."""
