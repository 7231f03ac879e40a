"""The store: one SQLite file with one writer."""
