"""From video files to batches of normalised latents.

One way: `clips` lists, `protocol` draws views, `decode` makes pixels, `encode` latents, `cache`
stores and reads them, `loader` makes batches.
"""
