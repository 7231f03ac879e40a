"""The tests' site with the middleware that hands requests over, last as it has to be."""

from tests.site.settings import *  # noqa: F403
from tests.site.settings import MIDDLEWARE, TASKKIT

MIDDLEWARE = [*MIDDLEWARE, "taskkit.middleware.AsyncRequestMiddleware"]
ROOT_URLCONF = "tests.background.urls"
ASGI_APPLICATION = "tests.background.asgi.application"
TASKKIT = {
    **TASKKIT,
    "ASYNC_REQUEST": {
        "anonymous": True,
        "drop_headers": ["X-Api-Key"],
        "user": "tests.background.urls.of_api_key",
        "response_bytes": 100_000,
    },
}
