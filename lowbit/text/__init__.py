"""Text for calibration and evaluation, and the templates that conversations are written by."""
