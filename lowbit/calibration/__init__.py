"""Text for calibration and evaluation, as token ids."""
