"""Where bytes come from: HTTP, local files and stores of the caller. The only package that opens sockets.

`reader` is the protocol, `open` the default reader, `http` and `local` its two halves, `http1` the HTTP/1.1 client.
"""
