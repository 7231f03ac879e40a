"""Views that run as tasks, because the client asked for it: see `taskkit.middleware.AsyncRequestMiddleware`.

`require_async` is for views that do nothing else.
"""

from taskkit.async_request.requiring import AsyncRequestRequired, require_async

__all__ = ["AsyncRequestRequired", "require_async"]
