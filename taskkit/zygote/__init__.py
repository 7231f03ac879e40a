"""The process that has imported Django with all tasks, stands still, forks those that work."""
