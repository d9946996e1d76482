"""Inside a training loop: patches, entry, the run, its log, its boundary."""
