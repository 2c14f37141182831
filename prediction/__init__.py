"""What predict.py is made of: files in, rows and drawings out."""
