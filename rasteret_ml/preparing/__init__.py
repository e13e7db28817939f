"""Step 20. Batches on the device: moved there, scaled and normalised, augmented, invalid pixels neutral."""
