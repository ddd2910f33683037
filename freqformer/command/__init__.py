"""The commands that a shell runs, and how they read configs and flags."""
