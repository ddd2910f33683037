"""One file per attention method, with the seam that they share."""
