"""Results as text and figures: tables, plots and the report page."""
