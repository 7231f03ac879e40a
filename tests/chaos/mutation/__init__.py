"""Guards of the product, each taken out of a tree that a test has started for it."""
