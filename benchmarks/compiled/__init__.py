"""Figures read off programs that were compiled for an H100, without one."""
