"""Configurations of runs: each file has get_config(), some have sweep()."""
