"""Template tags of the project's pages."""
