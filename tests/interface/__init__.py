"""A project that uses Django's own Tasks interface as its documentation shows it; only the backend is ours."""
