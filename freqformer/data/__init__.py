"""From video files to batches of normalised latents."""
