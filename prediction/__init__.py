"""The parts of predict.py: files in, rows and drawings out."""
