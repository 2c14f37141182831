"""Files, memory, processes and devices for the scripts; nothing here knows of CutPaste."""
