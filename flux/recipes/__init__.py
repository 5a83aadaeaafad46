"""What made the built-in models: the pictures, the training, the evaluation."""
