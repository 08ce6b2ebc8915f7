"""Tools for labels: a gallery to review them, a quality report, and export and import."""
