"""The app `shop`."""

import os

from django.apps import AppConfig


class ShopConfig(AppConfig):
    """Connects the receivers of signals."""

    name = "tests.interface"
    label = "shop"

    def ready(self) -> None:
        """See `tests.interface.heard`."""
        if os.environ.get("SHOP_HEARD"):
            from tests.interface import heard

            heard.connect()
