"""HTTP in, streams out: reads the runners' pipes, keeps the store, decides what every run becomes."""
