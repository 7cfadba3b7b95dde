"""What is minimized: the loss, and beta by optimizer step."""
