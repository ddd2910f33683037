"""One file per method; `registry` finds them by name. A new method is a new file and one line in `METHODS`."""
