"""Step 3. TIFF without I/O: headers, tile tables and plans, tile decoding (imagecodecs).

This room takes bytes and gives values, or says which bytes it still needs. It must never open, await or cache
anything.
"""
