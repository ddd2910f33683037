"""Wan's pretrained video models: files, autoencoders, text encoder, weights of the transformer."""
