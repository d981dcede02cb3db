"""What is read off a finished run: top samples, summary, status, export. Letters: N, n, M, D as in ``reading``."""
