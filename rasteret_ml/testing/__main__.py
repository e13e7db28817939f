"""`python -m rasteret_ml.testing FOLDER`: serve a folder with range requests on loopback."""

from rasteret_ml.testing.server import main

main()
