"""The video diffusion transformer and its configuration."""
