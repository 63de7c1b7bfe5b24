"""Device <-> host <-> storage: capture, chunk pipelines, arrays made from host bytes."""
