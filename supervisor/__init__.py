"""The process tree: spawning, watching, limiting, ending processes; handing over their descriptors."""
