"""A Django app with the one task model of django-streaming-coordinator's contest."""
