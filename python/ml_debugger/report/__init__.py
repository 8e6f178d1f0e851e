"""The report: what `Trace.analysis` says, as one HTML file that opens without a network."""

from ml_debugger.report.page import default_report_name, write_report

__all__ = ["default_report_name", "write_report"]
