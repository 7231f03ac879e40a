"""A site with Django's admin, and pages that show runs: the tests' project as its visitors see it."""
