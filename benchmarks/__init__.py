"""Side by side with peers in one run; each prints a table and writes JSON."""
