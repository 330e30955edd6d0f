"""What is shown: statistics, tables, figures, one HTML page."""
