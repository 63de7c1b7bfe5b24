"""Lost pipeline stages come back from their neighbours, from copies, or from a checkpoint."""
