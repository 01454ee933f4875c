"""Average precision, log-average miss rate, cross-modal alignment."""
