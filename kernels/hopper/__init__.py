"""The parts that all Hopper kernels are built from.

machine     facts about an H100
interpret   running kernels on a machine without a GPU
launch      launching a kernel, with its cost
tile_walk   lists of tiles, cut into stages and dealt to thread blocks
ring        copies through rings of shared memory
products    tensor-core products and register arrays
softmax     powers of two and hidden scores
"""
