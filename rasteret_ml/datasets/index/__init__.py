"""The spatio-temporal index: which records match a query, and in which order."""
