"""The demo: one cloud process, one device process, a report."""
