"""Wan's pretrained video models: files, VAE, text encoder and the transformer's weights."""
