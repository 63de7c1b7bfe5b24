"""Other libraries' interfaces to this engine."""
