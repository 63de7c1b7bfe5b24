"""Reference models: what the tests, the examples and the benchmarks save. They know nothing of jaxckpt."""
