"""Step 3. Arrays and outlines to pictures: chips, labels in their colours, series with dates, footprints.

This room knows numpy, shapely and matplotlib, which its files load and its door does not. It must never read a
pixel, know a tensor or a table, show a window, or touch matplotlib's global state.
"""
