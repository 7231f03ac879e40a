"""Migrations of the tables in the project's database."""
