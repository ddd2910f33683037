"""Seconds from counts: a roofline model of devices, held against measurements."""
