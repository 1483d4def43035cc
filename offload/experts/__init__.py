"""An expert's bytes, from disk to RAM to VRAM: ``storage`` holds them, ``cache`` decides which lie where."""
