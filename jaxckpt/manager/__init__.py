"""A run's checkpoints: which steps to save and to keep, preemption, retention."""
