"""One store over TensorStore and the local file system: named bytes under a root, ranges, create-if-absent, fsync."""
