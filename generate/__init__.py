"""Generating images: latents, metadata, sampling, and the modes that load a checkpoint."""
