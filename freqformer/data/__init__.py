"""From video files to batches of normalised latents.

One way: `clips` lists, `protocol` draws views, `decode` makes pixels, `encode` latents, `records`
stores them, `cache` puts these together and reads, `loader` makes batches.
"""
