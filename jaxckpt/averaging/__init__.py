"""Better models from checkpoints: weighted averages, soups, EMA; streamed, sharded, rounded once."""
