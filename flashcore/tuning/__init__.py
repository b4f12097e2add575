"""Measured best configurations, one table an architecture."""
