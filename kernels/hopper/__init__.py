"""The parts that all Hopper kernels are built from."""
