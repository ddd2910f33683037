"""FreqFormer: attention that gives each frequency its own operator, and the video diffusion transformer around it."""
