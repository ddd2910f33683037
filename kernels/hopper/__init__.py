"""The parts that all Hopper kernels are built from.

machine, interpret    facts about an H100; running kernels without a GPU
launch, tile_walk     launching a kernel with its cost; lists of tiles, cut and dealt to blocks
ring, products        copies through shared memory; tensor-core products, register arrays
softmax               powers of two and hidden scores
"""
