"""The ``jaxckpt`` command."""
