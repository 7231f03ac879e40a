"""The demo app: tasks to look at, to run, to copy from."""
