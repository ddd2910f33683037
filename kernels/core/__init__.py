"""Dispatch, target device, partitioning and list codes: shared by all ops."""
