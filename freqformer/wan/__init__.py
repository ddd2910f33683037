"""Wan's pretrained video models: files, autoencoders, text encoder and the transformer's weights."""
