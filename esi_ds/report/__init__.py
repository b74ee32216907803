"""What a person sees of a finished run: tables, figures and one page, all from ``report.json``."""
