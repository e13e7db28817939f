"""Step 5. Bytes from addresses: the only room that opens a socket.

One Protocol, `RangeReader`; everything else is a reader, or a reader around a reader. It must never know what
the bytes mean.
"""
