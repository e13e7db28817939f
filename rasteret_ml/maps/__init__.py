"""Step 19. Predictions of chips put together to georeferenced maps: bounded memory, several ranks, taken up again.

A map is cut into square blocks. What a rank has of a block is held in memory while it is in use, else in a file of
that rank (`store`); once no chip of the plan can change a block, it is finished. At the end the parts of all ranks are
joined, block by block, to a COG.
"""
