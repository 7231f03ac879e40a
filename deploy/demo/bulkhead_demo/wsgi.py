"""The demo as a WSGI application, for any web server that speaks WSGI."""

import os

from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "bulkhead_demo.settings")
application = get_wsgi_application()
