"""Split AOIs, blocks and records into train, validation and test sets without leaks."""
