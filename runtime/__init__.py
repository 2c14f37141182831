"""What the scripts need of files, memory, processes and devices; nothing here knows of CutPaste."""
