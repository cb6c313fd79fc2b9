"""The run with calibration data: one decoder layer in memory at a time, each committed when it is done."""
