"""Step 15. Batches read on a process's loop: ahead of time, again where too little is valid, and whatever fails.

Knows the contract of a dataset that reads in two halves (`readable`), and none of the datasets.
"""
