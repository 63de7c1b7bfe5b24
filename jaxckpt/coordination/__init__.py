"""Processes agree through the jax.distributed key-value store, with deadlines, never by a device collective."""
