"""From video files, or from random fields with a known answer, to batches of normalised latents.

One way: `clips` lists, `protocol` draws views, `decode` makes pixels, `encode` latents, `cache`
stores and reads them, `loader` makes batches. `fields` draws clips instead, and `sources` opens
either.
"""
