"""An HTTP/1.1 client that receives bodies into preallocated memory; `pool` is the entrance."""
