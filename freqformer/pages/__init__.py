"""HTML pages, plots and mp4 files for people."""
