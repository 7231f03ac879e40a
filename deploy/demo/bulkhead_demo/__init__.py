"""The demo: a Django project whose tasks Bulkhead runs."""
