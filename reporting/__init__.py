"""Metrics, tables, plots, the HTML report: all that people read."""
