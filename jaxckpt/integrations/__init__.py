"""What training loops are made of: data iterators and the states of frameworks, saved and restored with a run."""
