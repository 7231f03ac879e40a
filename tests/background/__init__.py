"""A site whose views run as tasks when they are asked to."""
