"""The path from data to noise, the loss target, and the sampler."""
