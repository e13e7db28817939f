"""Step 7. Life inside a process: one thread with one loop, one reader, one decode pool.

How often cycles are searched is a process's affair as well (`collecting`). Nothing here exists before it is needed,
nothing survives a fork or a pickle. It must never know what runs on it.
"""
