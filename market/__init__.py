"""Market data in, feature matrices out: readers, canonical schema, quality, labels, splits, simulator."""
