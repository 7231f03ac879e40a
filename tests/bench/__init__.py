"""Measurements of the product, each beside a peer or a goal; none of them asserts a time."""
