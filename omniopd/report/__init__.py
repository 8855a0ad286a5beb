"""A run folder as one HTML file that works offline: what was learned, what it cost, what the teacher said."""

from omniopd.report.page import write_report

__all__ = ["write_report"]
