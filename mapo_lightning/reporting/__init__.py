"""From runs to a report: reads what they have left behind, compares methods, draws and writes."""
