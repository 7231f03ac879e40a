"""What the Python peers serve. Run by their own interpreters, imported by nobody."""
