"""Where bytes come from: HTTP, local files and other readers. The only package that opens sockets."""
